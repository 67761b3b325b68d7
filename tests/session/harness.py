"""A child program that is killed for real, and the parent that watches it.

The child writes lines to an event file (one ``os.write`` a line, so that a line is whole or absent); the parent waits for a
line, or for a request at the witness, and kills the child's whole process group with SIGKILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 60.0


def note(path: str, line: str) -> None:
    """Called by the child: append one line in one write."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


class Child:
    """A program of ``tests/session/programs.py`` in a process group of its own."""

    def __init__(self, program: str, folder: Path, *args: str) -> None:
        self.events = folder / "events"
        self._log = open(folder / "child.log", "ab")  # noqa: SIM115
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "session.programs", program, str(folder), *args],
            stdout=self._log, stderr=self._log, env=environment, start_new_session=True,
        )  # fmt: skip
        self.log = folder / "child.log"

    def lines(self) -> list[str]:
        return self.events.read_text().splitlines() if self.events.exists() else []

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Return when the condition holds; fail if the child ends first."""
        until = time.monotonic() + WAIT_S
        while not condition():
            if self.process.poll() is not None and not condition():
                raise AssertionError(f"the child ended ({self.process.returncode}) before {what}:\n{self.log.read_text()[-3000:]}")
            if time.monotonic() > until:
                raise AssertionError(f"no {what} after {WAIT_S} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.002)

    def wait_line(self, line: str) -> None:
        self.wait_until(lambda: line in self.lines(), f"line {line!r}")

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self._log.close()

    def finish(self) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(WAIT_S)
        finally:
            self._log.close()


def run(program: str, folder: Path, *args: str, expect: Sequence[int] = (0,)) -> Child:
    """Run to the end without a kill."""
    child = Child(program, folder, *args)
    code = child.finish()
    assert code in expect, f"exit code {code}:\n{child.log.read_text()[-3000:]}"
    return child
