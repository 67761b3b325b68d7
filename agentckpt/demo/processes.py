"""Workers as the parent sees them: a process group, the lines it says, and a SIGKILL that reaches all of it.

Invariants:
1. The parent decides on what it observes alone; no code of the worker knows that it will be killed.
2. A worker is the leader of its own process group; the witness is in another.
3. What a dead worker had still written to its pipe is read to the end, so that ``last`` is what it really did last.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from ..errors import StoreError


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a worker, with the time at which it arrived (``time.monotonic``)."""

    name: str
    facts: Mapping[str, Any]
    at_s: float


class Worker:
    """One run of a worker program. A context manager: leaving it kills what is left of the group."""

    def __init__(self, module: str, arguments: Sequence[str], *, log: Path, on_event: Callable[[Event], None] | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.started_s = time.monotonic()
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self.events: list[Event] = []
        self._on_event = on_event
        self._changed = threading.Condition()
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events else None

    def wait_for(self, wanted: Callable[[Event], bool], *, after: int = 0) -> Event | None:
        """The first event from number ``after`` on that is wanted; None if the worker ended without one."""
        with self._changed:
            position = after
            while True:
                while position < len(self.events):
                    if wanted(self.events[position]):
                        return self.events[position]
                    position += 1
                if self._closed:
                    return None
                self._changed.wait()

    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> bool:
        """SIGKILL to the whole group; False if the worker had ended on its own."""
        alive = self.running()
        if alive:
            os.killpg(self.pid, signal.SIGKILL)
        code = self.wait()
        return alive and code == -signal.SIGKILL

    def wait(self) -> int:
        """The exit code, once everything that it said was read; negative for a signal."""
        code = self._process.wait()
        self._reader.join()
        return code

    def expect(self, *codes: int) -> int:
        """Wait; raises ``StoreError`` with the end of the log if the exit code is another."""
        code = self.wait()
        if code not in codes:
            said = next((e.facts for e in reversed(self.events) if e.name == "stopped"), None)
            tail = self._log.read_text(errors="replace").strip()[-2000:]
            raise StoreError("a worker of the demo failed", expected=f"exit code {codes}", found=f"{code}: {said or tail}")
        return code

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        with stdout:
            for line in stdout:
                event = _event(line)
                if event is None:
                    continue
                with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()
                if self._on_event is not None:
                    self._on_event(event)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()


class Crew:
    """All workers of a demo, so that an interrupt, or the failure of one run, ends the others. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._stopped = False

    def start(self, module: str, arguments: Sequence[str], *, log: Path, on_event: Callable[[Event], None] | None = None) -> Worker:
        """A new worker. Raises ``StoreError`` after ``stop``."""
        with self._lock:
            if self._stopped:
                raise StoreError("the demo was stopped")
            worker = Worker(module, arguments, log=log, on_event=on_event)
            self._workers.append(worker)
            return worker

    def stop(self) -> None:
        """Kill every worker; no new one starts."""
        with self._lock:
            self._stopped = True
            for worker in self._workers:
                worker.kill()


def _event(line: str) -> Event | None:
    try:
        facts = cast("dict[str, Any]", json.loads(line))
        return Event(str(facts.pop("event")), facts, time.monotonic())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # the last line of a killed worker may be cut off
