"""A real process is killed at random moments, again and again: no acknowledged commit is ever lost."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentckpt.store import Store

HERE = Path(__file__).parent
WRITER = """
import random, sys
sys.path.insert(0, sys.argv[1])
from store_drive import Book, commit, session_draft
import agentckpt.store.pack as pack, agentckpt.store.journal as journal, agentckpt.store.objects as objects
pack.TARGET_BYTES, journal.SEGMENT_BYTES, objects.INDEX_BATCH = 60_000, 20_000, 20
from agentckpt.store import Store
sid, rng, book = bytes.fromhex(sys.argv[3]), random.Random(int(sys.argv[4])), Book()
store = Store.open(sys.argv[2], create=True)
if sid not in store.view().sessions:
    store.append(lambda view: [session_draft(sid, sys.argv[3])])
while True:
    content = commit(store, sid, rng, book, num_chunks=4)
    print(content.manifest.hex(), *[ref.hex() for ref in content.objects], flush=True)
    if rng.random() < 0.1:
        store.seal()
"""


def round_of_kills(path: Path, rng: random.Random, num_writers: int) -> dict[bytes, tuple[bytes, list[bytes]]]:
    """Start writers, kill each at a random moment; what each acknowledged last: session -> (manifest, references)."""
    sids = [bytes([n + 1]) * 16 for n in range(num_writers)]
    command = [sys.executable, "-c", WRITER, str(HERE), str(path)]
    children = [
        subprocess.Popen([*command, sid.hex(), str(rng.randrange(1 << 30))], stdout=subprocess.PIPE, text=True, cwd=HERE.parent.parent)
        for sid in sids
    ]
    told = {}
    for child, sid in zip(children, sids, strict=True):
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        time.sleep(rng.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        # A line that was cut off was not told to anybody.
        lines += child.stdout.read().split("\n")[:-1]
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL, "the writer failed by itself"
        words = [bytes.fromhex(word) for word in lines[-1].split()]
        told[sid] = (words[0], words[1:])
    return told


def kill_often(path: Path, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    done = 0
    acked: dict[bytes, set[bytes]] = {}
    while done < num_kills:
        told = round_of_kills(path, rng, 2)
        done += len(told)
        if rng.random() < 0.3:
            shutil.rmtree(path / "index")
        with Store.open(path) as store:
            view = store.view()
            for sid, (manifest, refs) in told.items():
                heads = [head["manifest"] for head in view.sessions[sid].heads]
                acked.setdefault(sid, set()).add(manifest)
                assert acked[sid] <= set(heads), f"an acknowledged commit is lost (seed {seed}, after {done} kills)"
                assert manifest in heads[-2:], f"more than one head that was not acknowledged (seed {seed}, after {done} kills)"
                for ref in refs:
                    store.get(ref, 1 << 20)  # type: ignore[arg-type]
            assert store.damage() == []


def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    kill_often(tmp_path / "s", 50, seed=1)


@pytest.mark.slow
def test_killed_writers_lose_nothing_in_ten_thousand_kills(tmp_path: Path) -> None:
    for seed in range(20):
        kill_often(tmp_path / f"s{seed}", 500, seed)
        shutil.rmtree(tmp_path / f"s{seed}")
