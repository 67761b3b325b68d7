"""A checkpoint as a value, and its canonical bytes (section 6 of ``store/FORMAT.md``).

Invariants:
1. ``encode`` of what ``decode`` returned gives the same bytes; ``decode`` accepts nothing else.
2. Parts and children are strong references, parents weak.
3. Times, names, hosts and annotations never enter: the same instant has one id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .types import Mark, Ref

FEATURES: frozenset[str] = frozenset()
"""Manifest features that this version understands."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One immutable instant of an agent.

    ``id`` is the 32-byte id of its manifest (empty before it is stored), ``session``, ``lineage`` and ``nonce`` are 16 bytes.
    """

    session: bytes
    lineage: bytes
    turn: int
    parts: Mapping[str, tuple[str, Ref]]
    """name -> (kind, reference of the part's node)"""
    nonce: bytes
    mark: Mark
    """position in the journal of ``session``: every effect up to it belongs to this instant"""
    parents: tuple[bytes, ...] = ()
    """manifest ids, the previous head first"""
    children: Mapping[str, bytes] = field(default_factory=dict)
    """name -> manifest id"""
    in_flight: tuple[bytes, ...] = ()
    """keys of effects dispatched and not terminal at the cut"""
    undelivered: tuple[bytes, ...] = ()
    """keys of effects whose outcome had not been returned to the turn's code"""
    consistency: Mapping[str, str] = field(default_factory=dict)
    """part -> ``frozen``, ``quiescent`` or ``per-file``"""
    redaction: tuple[str, ...] = ()
    """what was scrubbed or left out, in words"""
    features: tuple[str, ...] = ()
    id: bytes = b""


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Canonical bytes of the manifest; the store's ``put("manifest", ...)`` gives its id.

    Raises ``IncompatibleError`` for a value that the format cannot hold (a wrong length, an unsorted or repeated name).
    """
    raise RuntimeError


def decode_checkpoint(data: bytes, id: bytes = b"") -> Checkpoint:
    """Read a manifest. ``id`` is what the caller verified ``data`` against.

    Raises ``IncompatibleError`` (code ``manifest-version`` or ``manifest-feature``) for a newer one and
    ``CorruptionError`` (code ``manifest-shape``) for anything that is not a manifest.
    """
    raise RuntimeError
