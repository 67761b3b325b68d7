"""The words and Protocols that all layers share. No logic.

A ``Ref`` is 33 bytes: one kind byte (1 chunk, 2 node, 3 manifest) and the 32-byte id. A store walks references
without knowing what a part is, so the kind must stand beside the id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NewType, Protocol, runtime_checkable

if TYPE_CHECKING:
    from .handles import Handle

Kind = Literal["chunk", "node", "manifest"]
KIND_BYTE: dict[str, int] = {"chunk": 1, "node": 2, "manifest": 3}
KIND_NAME: dict[int, Kind] = {1: "chunk", 2: "node", 3: "manifest"}
ID_BYTES = 32
REF_BYTES = 33

Ref = NewType("Ref", bytes)
"""kind byte + 32-byte id"""

Buffer = bytes | bytearray | memoryview
Value = None | bool | int | float | str | bytes | list["Value"] | dict[str, "Value"]
"""What may stand in a state, a tool's arguments or its result: JSON's values plus bytes. NaN is refused."""

EffectClass = Literal["read", "sandbox", "model", "idempotent", "compensable", "irreversible", "authority"]
EFFECT_CLASSES: tuple[EffectClass, ...] = (
    "read", "sandbox", "model", "idempotent", "compensable", "irreversible", "authority",
)  # fmt: skip
EffectState = Literal[
    "intended", "committed", "raised", "failed", "unknown", "verified-applied", "verified-not", "compensated", "resolved",
]  # fmt: skip
Consistency = Literal["frozen", "quiescent", "per-file"]
Continuation = Literal["exact", "compatible, not bit-exact", "prefix-equivalent"]


class Mark(NamedTuple):
    """A position in one session's journal: ``sseq`` and the hash of that record's body; ``(0, zeros)`` is before the first."""

    seq: int
    hash: bytes


class Sink(Protocol):
    """Where a part puts its objects. Thread-safe. Nothing is durable before the session's commit."""

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        """Store ``data`` (at most 16 MiB) unless it is known, and return its reference."""
        ...


class Source(Protocol):
    """Where a part reads its objects from. Thread-safe. What it returns was verified against the reference."""

    def get(self, ref: Ref, max_bytes: int) -> bytes:
        """Raises ``NotFoundError`` (absent), ``CorruptionError`` (damaged, or longer than ``max_bytes``)."""
        ...

    def read_into(self, ref: Ref, target: memoryview) -> None:
        """Verified read of an object of exactly ``len(target)`` bytes into ``target``; errors as ``get``."""
        ...

    def has(self, ref: Ref) -> bool: ...


@dataclass(frozen=True, slots=True)
class PartRef:
    """What ``Pending.write`` returns: the part's own node, and facts about the capture for the journal's head record.

    ``facts`` are small plain values: ``logical_bytes``, ``new_bytes``, ``num_tokens``, ``pause_s``, ``consistency`` ...
    """

    kind: str
    ref: Ref
    facts: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartReport:
    """What came back of one part. Counts are tokens for ``kv``, files for ``sandbox``."""

    kind: str
    restored: int = 0
    recomputed: int = 0
    rejected: int = 0
    reason: str | None = None
    """why anything was rejected or recomputed"""
    continuation: Continuation | None = None
    consistency: str | None = None
    lost: tuple[str, ...] = ()
    """sockets, processes, ignored paths, secrets to supply: in words"""
    displaced: str | None = None
    """path of a changed tree that the restore moved aside"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """time by step: read, verify, copy, recompute, exchange ..."""


class Pending(Protocol):
    """A capture whose instant is fixed and whose bytes are not yet written."""

    def write(self) -> PartRef:
        """Put everything into the sink; runs on a worker thread, once. Releases the pins also when it raises."""
        ...

    def cancel(self) -> None:
        """Release the pins without writing. Idempotent."""
        ...


class Staged(Protocol):
    """A restore that was verified and built aside; the live part is untouched."""

    def commit(self) -> PartReport:
        """Take over. Idempotent: it is redone after a crash."""
        ...

    def abort(self) -> None: ...


class Part(Protocol):
    """One stateful component of an agent."""

    kind: str

    def capture(self, sink: Sink, previous: Ref | None) -> Pending:
        """Fix the instant now (pin, copy integers) and return; the heavy work is in ``Pending.write``.

        ``previous`` is the reference of the last published capture of this part, or None.
        """
        ...

    def prepare(self, source: Source, ref: Ref) -> Staged: ...

    def fork(self, n: int) -> Sequence[Part]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote: ``ids`` through the token that completes the stop, ``text`` ends before it."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: str
    """``stop``, ``eos``, ``length``"""


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability (nats) of one candidate continuation: the sum, and one value a token."""

    total: float
    logprobs: tuple[float, ...]


Message = Mapping[str, Any]
Appendable = str | Message | Sequence[int] | Sequence[Message]


class LiveSequence(Part, Protocol):
    """One sequence in an engine: the ``kv`` part of a session. One operation at a time; forks are independent."""

    nonce: bytes
    """16 bytes; enters sampling, never effect keys"""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def num_computed(self) -> int:
        """Positions whose KV is valid: at most ``len(tokens) - 1``."""
        ...

    def encode(self, item: Appendable) -> list[int]:
        """The ids that ``append(item)`` would add now. Raises ``IncompatibleError`` if they are no pure suffix."""
        ...

    def append(self, item: Appendable) -> Handle[tuple[int, ...]]:
        """Add ids, text or messages; the handle is done when the ids stand in ``tokens`` (KV may follow lazily)."""
        ...

    def generate(
        self,
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        forced: Sequence[int] | None = None,
    ) -> Handle[Generation]:
        """Decode. ``forced`` feeds recorded ids one at a time (so that KV is bit-equal) and samples nothing."""
        ...

    def request_digest(self, **options: Any) -> bytes:
        """32 bytes over (position, sampling options, seed, stop): what makes a recorded generation reusable."""
        ...

    def score(self, candidates: Sequence[str | Sequence[int]]) -> Handle[list[Score]]:
        """Log-probs of each candidate after the present tokens, on forks that share the blocks."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on. Records the edit in the lineage."""
        ...

    def fork(self, n: int) -> Sequence[LiveSequence]: ...


class EngineLike(Protocol):
    """What ``Session.open(kv=engine)`` needs of an engine."""

    def open_sequence(self, *, nonce: bytes) -> LiveSequence:
        """A new, empty sequence. A restore goes through its ``prepare``."""
        ...

    def describe(self) -> Mapping[str, Value]:
        """``model``, ``model_id``, ``kv_id``, ``numerics_id`` (hex), ``device``, ``kv_dtype`` ..."""
        ...


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command in a sandbox did. ``exit_code`` is negative for a signal; None if it timed out."""

    exit_code: int | None
    stdout: str
    stderr: str
    timed_out: bool = False


class Sandbox(Part, Protocol):
    """A place where an agent's tools run and whose files are part of the checkpoint."""

    path: str
    """the workspace's root on this host"""

    @property
    def denies_network(self) -> bool:
        """True only where the backend enforces it; only then is the effect class of ``run`` ``sandbox``."""
        ...

    @property
    def effect_class(self) -> EffectClass: ...

    def run(self, command: str | Sequence[str], *, timeout_s: float = 60.0, input: str | None = None) -> ExecResult: ...

    def read_file(self, path: str) -> bytes: ...

    def write_file(self, path: str, data: bytes | str) -> None: ...

    def fork(self, n: int) -> Sequence[Sandbox]: ...

    def exchange(self, other: Sandbox) -> None:
        """Swap trees with a fork of this sandbox in one atomic step (promote)."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """PyTorch's own convention: the ``state`` part."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...
