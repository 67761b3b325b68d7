"""Run by test_processes: restores a sequence from a store in a process of its own, continues it, prints what came out."""

from __future__ import annotations

import json
import sys

import torch
from blake3 import blake3

from agentckpt.engine import Engine
from agentckpt.store import Store
from agentckpt.types import Ref


def main(path: str, ref: str, options: str) -> None:
    torch.set_num_threads(1)
    chosen = json.loads(options)
    store = Store.open(path, mode="ro")
    with Engine("smollm2-135m-instruct", num_blocks=64, recompute=chosen.pop("recompute", "exact")) as engine:
        sequence = engine.open_sequence(nonce=b"n" * 16)
        report = sequence.prepare(store, Ref(bytes.fromhex(ref))).commit()
        restored = digest(engine, sequence)
        made = sequence.generate(**chosen).result(120)
        result = {"report": [report.restored, report.recomputed, report.continuation], "kv": restored, "after": digest(engine, sequence)}
        result |= {"ids": list(made.ids), "logprobs": [value.hex() for value in made.logprobs]}
    store.close()
    json.dump(result, sys.stdout)


def digest(engine: Engine, sequence: object) -> str:
    context = sequence.context  # type: ignore[attr-defined]
    return blake3(b"".join(bytes(view) for view in engine.kv.gather(context.runs(0, context.computed)))).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
