"""What a restore costs beside the fast re-prefill of the same context, with nothing else running.

    python -m agentckpt.demo.probe STORE CHECKPOINT

The prefill comes first: a restored context would be a prefix hit for it. Both are followed by the wait for one next-token
distribution, so that neither is counted before the attention state can be used.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from ..cli.stores import find
from .compare import tokens_of
from .worker import say


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agentckpt.demo.probe", description="Time a restore and a re-prefill.")
    parser.add_argument("store")
    parser.add_argument("checkpoint")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args(arguments)
    import agentckpt
    from agentckpt.engine import Engine

    with agentckpt.Store.open(options.store, mode="ro") as store:
        tokens = tokens_of(store, find(store, store.view(), options.checkpoint).checkpoint)
        with Engine(options.model) as engine:
            warm(engine, tokens)
            reprefill_s = timed_prefill(engine, tokens)
            begin = time.perf_counter()
            report = agentckpt.restore(store, options.checkpoint, kv=engine)
            wait_for_logits(report.live["kv"], tokens)
            restore_s = time.perf_counter() - begin
    say(
        "probed",
        reprefill_s=reprefill_s,
        restore_s=restore_s,
        parts=dict(report.parts["kv"].seconds),
        restored=report.parts["kv"].restored,
        tokens=len(tokens),
    )
    return 0


def warm(engine: Any, tokens: list[int]) -> None:
    """One small prefill of something else, so that what is done once a process is charged to neither."""
    sequence = engine.open_sequence(nonce=bytes(16))
    sequence.append(tokens[:128][::-1]).result()
    wait_for_logits(sequence, tokens)
    sequence.close()


def timed_prefill(engine: Any, tokens: list[int]) -> float:
    begin = time.perf_counter()
    sequence = engine.open_sequence(nonce=bytes(16))
    sequence.append(tokens).result()
    wait_for_logits(sequence, tokens)
    seconds = time.perf_counter() - begin
    sequence.close()
    return seconds


def wait_for_logits(sequence: Any, tokens: list[int]) -> None:
    sequence.score([[tokens[0]]]).result()


if __name__ == "__main__":
    raise SystemExit(main())
