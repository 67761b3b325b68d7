"""All figures of the whole path: what a turn writes, restore, pauses, exposed time, and the demo's own kills and restores."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from . import kv_restore, metadata, turns
from .report import Row

TAIL_BYTES = 64 * 23040
"""one tail block of SmolLM2: 64 tokens, 30 layers, K and V, 3 heads of 64 dimensions in bf16"""
KV_BYTES = 23040


def run(*, quick: bool) -> list[Row]:
    rows = [*metadata.run(quick=quick), *kv_restore.run(quick=quick), *turns.run(quick=quick)]
    return rows + demo(num_bugs=2 if quick else 4)


def demo(*, num_bugs: int) -> list[Row]:
    command = [sys.executable, "-m", "agentckpt", "demo", "--bugs", str(num_bugs), "--seed", "3", "--json", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the demo failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    rows = [
        Row("demo: restore of the killed agent's KV, files, state", "s", found["restore_s"], against="fast re-prefill of the same context",
            other=found["reprefill_s"]),
    ]  # fmt: skip
    first = found["resumes"][0]
    rows.append(Row("demo: SIGKILL to going on", "s", first["total_s"]))
    rows += [Row(f"demo: SIGKILL to going on, {name}", "s", seconds) for name, seconds in first["parts"].items()]
    before, worst = 0, 0.0
    for turn in found["turns"]:
        # Files that a turn changes are far below the 16 KiB that the bound allows beside KV.
        bound = 1.1 * KV_BYTES * max(0, turn["num_tokens"] - before) + TAIL_BYTES + 16 * 1024
        worst = max(worst, turn["new_bytes"] / bound)
        before = turn["num_tokens"]
    rows.append(
        Row(
            "demo: bytes given to the store by a cut, before it drops what it has / bound, worst turn", "ratio", worst, goal=1.0, best="low"
        )
    )
    return rows
