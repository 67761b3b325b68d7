"""A child program that is killed for real, and the parent that watches it.

The child writes lines to an event file (one ``os.write`` a line, so that a line is whole or absent); the parent waits for a
line, or for a request at the witness, and kills the child's whole process group with SIGKILL.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

WAIT_S = 60.0


def note(path: str, line: str) -> None:
    """Called by the child: append one line in one write."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


# One process that has imported everything forks the children: real processes, without a second of start-up each.
# It takes its path from the environment alone: without this, what it is to import is not found, and that silently.
_TESTS = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS), str(_TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([f"{__package__}.programs"])


def enter(program: str, folder: str, args: Sequence[str]) -> None:
    """The child's side."""
    from . import programs

    os.setsid()
    warnings.simplefilter("error")
    log = os.open(os.path.join(folder, "child.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(programs.main(program, folder, args))


class Child:
    """A program of ``programs.py`` in a process group of its own."""

    def __init__(self, program: str, folder: Path, *args: str) -> None:
        self.events = folder / "events"
        self.log = folder / "child.log"
        self.log.touch()
        self.process = _context.Process(target=enter, args=(program, str(folder), args))
        self.process.start()

    def lines(self) -> list[str]:
        return self.events.read_text().splitlines() if self.events.exists() else []

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Return when the condition holds; fail if the child ends first."""
        until = time.monotonic() + WAIT_S
        while not condition():
            if not self.process.is_alive() and not condition():
                raise AssertionError(f"the child ended ({self.process.exitcode}) before {what}:\n{self.log.read_text()[-3000:]}")
            if time.monotonic() > until:
                raise AssertionError(f"no {what} after {WAIT_S} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.002)

    def wait_line(self, line: str) -> None:
        self.wait_until(lambda: line in self.lines(), f"line {line!r}")

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)  # it may not have a group of its own yet
        self.process.join()

    def finish(self) -> int:
        """Wait for the end; the exit code."""
        self.process.join(WAIT_S)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"no end after {WAIT_S} s:\n{self.log.read_text()[-3000:]}")
        return self.process.exitcode


def run(program: str, folder: Path, *args: str, expect: Sequence[int] = (0,)) -> Child:
    """Run to the end without a kill."""
    child = Child(program, folder, *args)
    code = child.finish()
    assert code in expect, f"exit code {code}:\n{child.log.read_text()[-3000:]}"
    return child
