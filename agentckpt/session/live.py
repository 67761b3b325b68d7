"""What a running session holds: its parts, its place in the journal, and what is going on right now. No I/O here.

Invariants:
1. ``turn_lock`` guards the turn's fields, for moments only, so that an event loop's thread may take it. ``lock`` guards the
   ledger: matching may read a large recorded value from the store, so a loop's thread never takes it on its own.
2. ``turn`` is the number of the open turn, or of the last one that ended; a published head never has a larger one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConflictError
from ..handles import Handle
from ..ledger import EffectRecord, Ledger, Occurrences, Vault
from ..store import Store
from ..types import EffectClass, Ref, Sandbox, Value
from .executor import Strand
from .log import Log
from .report import CheckpointInfo, RestoreReport, TurnMetrics
from .segments import Segments

if TYPE_CHECKING:
    from .sequence import RecordingSequence
    from .state import StatePart

MAX_KEPT_METRICS = 4096
Divergence = Literal["raise", "continue"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A sandbox command that ran again on the restored sandbox and said something else than the record."""

    key: str
    tool: str
    turn: int
    recorded: Any
    found: Any


@dataclass(frozen=True, slots=True)
class Head:
    """The last published checkpoint of a session."""

    manifest: bytes
    generation: int
    turn: int
    refs: Mapping[str, Ref] = field(default_factory=dict)
    """reference of each part's node"""


class InFlight:
    """Calls between their intent and their outcome. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[bytes, Future[None]] = {}
        self._begun: set[bytes] = set()

    def enter(self, key: bytes, *, begun: bool = False) -> None:
        """``begun``: an adapter runs the call, so nobody can say when it ends, and a cut records it instead of waiting."""
        with self._lock:
            if begun:
                self._begun.add(key)
            else:
                self._running[key] = Future()

    def leave(self, key: bytes) -> None:
        with self._lock:
            self._begun.discard(key)
            future = self._running.pop(key, None)
        if future is not None:
            future.set_result(None)

    def waiting(self) -> list[Future[None]]:
        with self._lock:
            return list(self._running.values())

    def begun(self) -> tuple[bytes, ...]:
        with self._lock:
            return tuple(sorted(self._begun))


class Turnstile:
    """Commands share the sandbox; a call whose post-state is captured has it alone. First come, first served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._alone = False
        self._queue: deque[tuple[bool, Future[None]]] = deque()

    def enter(self, alone: bool) -> Handle[None]:
        future: Future[None] = Future()
        with self._lock:
            self._queue.append((alone, future))
            opened = self._admit()
        for each in opened:
            each.set_result(None)
        return Handle(future)

    def leave(self) -> None:
        with self._lock:
            self._num_inside -= 1
            self._alone = False
            opened = self._admit()
        for each in opened:
            each.set_result(None)

    def _admit(self) -> list[Future[None]]:
        opened = []
        while self._queue:
            alone, future = self._queue[0]
            if self._alone or (alone and self._num_inside):
                break
            self._queue.popleft()
            self._num_inside += 1
            self._alone = alone
            opened.append(future)
        return opened


@dataclass
class Live:
    """A session at work."""

    store: Store
    sid: bytes
    name: str
    lineage: bytes
    nonce: bytes
    log: Log
    ledger: Ledger
    segments: Segments
    lock: threading.RLock
    kv: dict[str, RecordingSequence] = field(default_factory=dict)
    sandbox: Sandbox | None = None
    state: StatePart | None = None
    head: Head | None = None
    turn: int = 0
    turn_open: bool = False
    on_divergence: Divergence = "raise"
    allowed: frozenset[EffectClass] | None = None
    """effect classes that a branch may dispatch; None: all"""
    restored: RestoreReport | None = None
    occurrences: Occurrences = field(default_factory=Occurrences)
    vault: Vault = field(default_factory=Vault)
    in_flight: InFlight = field(default_factory=InFlight)
    turnstile: Turnstile = field(default_factory=Turnstile)
    strand: Strand = field(default_factory=lambda: Strand("quick"))
    undelivered: set[bytes] = field(default_factory=set)
    differences: list[Difference] = field(default_factory=list)
    metrics: deque[TurnMetrics] = field(default_factory=lambda: deque(maxlen=MAX_KEPT_METRICS))
    orphaned: list[EffectRecord] = field(default_factory=list)
    """effects of a recovered turn that its new execution did not ask for (``on_divergence="continue"``)"""
    asked: set[str] = field(default_factory=set)
    """effects of the open turn whose call raised ``EffectUnknownError``"""
    num_calls: int = 0
    """calls of the open turn"""
    num_forks: int = 0
    """forks of the open turn"""
    post: Ref | None = None
    """the sandbox's last captured post-state, if later than the head"""
    closed: bool = False
    turn_lock: threading.Lock = field(default_factory=threading.Lock)

    def open_turn(self) -> int:
        """The number of the open turn; opens the next one if none is."""
        with self.turn_lock:
            if not self.turn_open:
                self._begin_turn()
            return self.turn

    def _begin_turn(self) -> None:
        self.turn += 1
        self.turn_open = True
        self.occurrences = Occurrences()
        self.asked = set()
        self.num_calls = self.num_forks = 0
        self.segments.begin_turn(self.turn)

    def check_open(self) -> None:
        """Raises ``ConflictError`` (code ``closed``) if the session was closed."""
        if self.closed:
            raise ConflictError("the session is closed", code="closed", object=f"session {self.name}", hint="open it again")

    def parts(self) -> dict[str, str]:
        """Name -> kind of the parts that this session has."""
        names = dict.fromkeys(self.kv, "kv")
        if self.sandbox is not None:
            names["sandbox"] = "sandbox"
        if self.state is not None:
            names["state"] = "state"
        return names


Gate = Callable[[], Handle[CheckpointInfo] | None]
Facts = Mapping[str, Value]
