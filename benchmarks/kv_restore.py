"""Restore of KV, verified, into an engine whose weights are loaded, beside the rates of its three steps."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from agentckpt.engine import Engine
from agentckpt.store import Store

from .rates import copy_rate, hash_rate, read_rate
from .report import Row


def run(*, quick: bool) -> list[Row]:
    num_bytes = (64 if quick else 512) * 2**20
    with tempfile.TemporaryDirectory() as scratch:
        ceilings = {"read": read_rate(Path(scratch), num_bytes), "hash": hash_rate(num_bytes), "copy": copy_rate(num_bytes)}
        restored = restore_rate(Path(scratch) / "store", num_bytes, repeat=2 if quick else 3)
    slowest = min(ceilings, key=lambda name: ceilings[name])
    mib = 2**20
    rows = [Row(f"ceiling: {name}", "MiB/s", value / mib) for name, value in ceilings.items()]
    rows.append(
        Row(
            f"verified restore of {num_bytes // mib} MiB synthetic KV",
            "MiB/s",
            restored / mib,
            against=f"min(read, hash, copy) = {slowest}",
            other=ceilings[slowest] / mib,
            goal=0.5,
        )
    )
    return rows


def restore_rate(path: Path, num_bytes: int, repeat: int) -> float:
    """Best bytes per second of prepare + commit; the bytes are compared with what was captured."""
    engine = Engine("smollm2-135m-instruct", num_blocks=8)
    per_token = int(engine.describe()["kv_bytes_per_token"])  # type: ignore[call-overload]
    num_tokens = num_bytes // per_token // 64 * 64
    loaded = engine.loaded
    engine.close()
    engine = Engine(loaded, num_blocks=num_tokens // 16 + 32)
    engine.max_tokens = num_tokens + 1024  # the model's own limit is smaller; this measures the path and not the model
    with Store.open(str(path), create=True) as store, engine:
        sequence = synthetic(engine, num_tokens)
        before = engine.kv.gather(sequence.context.runs(num_tokens - 64, num_tokens))
        expected = [bytes(view) for view in before]
        ref = sequence.capture(store, None).write().ref
        store.sync()
        sequence.close()
        best = 0.0
        for _ in range(repeat):
            fresh = engine.open_sequence()
            begun = time.perf_counter()
            report = fresh.prepare(store, ref).commit()
            best = max(best, num_tokens * per_token / (time.perf_counter() - begun))
            found = [bytes(view) for view in engine.kv.gather(fresh.context.runs(num_tokens - 64, num_tokens))]
            if found != expected or report.restored != num_tokens:
                raise AssertionError("restored KV differs from the captured one")
            fresh.close()
    return best


def synthetic(engine: Engine, num_tokens: int) -> Any:
    """A sequence with random tokens and random KV, as if it had been prefilled."""
    sequence = engine.open_sequence()
    context = sequence.context
    draw = random.Random(7)
    context.tokens.extend(draw.randrange(engine.config.vocab_size) for _ in range(num_tokens + 1))
    with engine.lock:
        context.prepare(num_tokens)
        engine.kv.view.view(torch.int16).random_(-(2**14), 2**14)
        context.wrote(num_tokens, "append")
    return sequence
