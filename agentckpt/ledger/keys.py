"""Effect keys and calls: who asks for what, in a form that two runs of the same program agree on.

``key = BLAKE3-256(encode(["agentckpt effect v1", lineage, turn, tool, identity, occurrence]))`` where identity is
``["key", declared intent key]``, or ``["args", canonical arguments]`` for a tool that declares none. ``encode`` is the
deterministic CBOR of ``agentckpt.nodes``. Canonical arguments are the keyword arguments less the declared volatile fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from blake3 import blake3

from ..errors import IncompatibleError
from ..nodes import encode
from ..types import EffectClass, Value

KEY_CONTEXT = "agentckpt effect v1"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool, ready to be matched. ``args`` are plain values by parameter name."""

    key: bytes
    """32 bytes"""
    lineage: bytes
    turn: int
    tool: str
    effect_class: EffectClass
    sandbox: bool
    args: dict[str, Value]
    intent_key: Value
    """the declared intent key, or None"""
    occurrence: int
    """ordinal among the calls of this turn with equal (tool, identity)"""
    index: int = 0
    """ordinal among all calls of this turn"""
    resources: tuple[str, ...] = ()
    volatile: tuple[str, ...] = ()
    canonical: bytes = field(default=b"", repr=False)
    """encoding of the arguments less the volatile fields"""


def canonical_arguments(args: Mapping[str, Value], volatile: Sequence[str] = ()) -> bytes:
    """Encode ``args`` less the ``volatile`` fields. A dotted name (``"options.time"``) reaches into nested maps.

    Raises ``IncompatibleError`` for values that are not JSON's values plus bytes.
    """
    stripped: Value = dict(args)
    for path in volatile:
        stripped = _without(stripped, path.split("."))
    return encode(stripped)


def _without(value: Value, path: Sequence[str]) -> Value:
    if not isinstance(value, dict) or path[0] not in value:
        return value
    rest = {name: item for name, item in value.items() if name != path[0]}
    if len(path) > 1:
        rest[path[0]] = _without(value[path[0]], path[1:])
    return rest


def identity_of(canonical: bytes, intent_key: Value) -> bytes:
    """What makes two calls of one tool the same intent: the declared key if there is one, else the arguments."""
    return encode(["args", canonical] if intent_key is None else ["key", intent_key])


def derive_key(*, lineage: bytes, turn: int, tool: str, identity: bytes, occurrence: int) -> bytes:
    """32 bytes; see the top of this file."""
    return blake3(encode([KEY_CONTEXT, lineage, turn, tool, identity, occurrence])).digest()


def next_occurrence(call: Call) -> Call:
    """The same call under the key of the next occurrence: for a key that another timeline has used."""
    occurrence = call.occurrence + 1
    identity = identity_of(call.canonical, call.intent_key)
    key = derive_key(lineage=call.lineage, turn=call.turn, tool=call.tool, identity=identity, occurrence=occurrence)
    return replace(call, key=key, occurrence=occurrence)


class Occurrences:
    """Counts calls within one execution of one turn, all and equal ones. Start a new one whenever the turn starts (again)."""

    def __init__(self) -> None:
        self._next: dict[tuple[str, bytes], int] = {}
        self._num_calls = 0

    def take_index(self) -> int:
        """The ordinal of this call among all, from 0."""
        self._num_calls += 1
        return self._num_calls - 1

    def take(self, tool: str, identity: bytes) -> int:
        """The ordinal of this call, from 0."""
        number = self._next.get((tool, identity), 0)
        self._next[tool, identity] = number + 1
        return number


def make_call(
    *,
    occurrences: Occurrences,
    lineage: bytes,
    turn: int,
    tool: str,
    effect_class: EffectClass,
    args: Mapping[str, Value],
    sandbox: bool = False,
    intent_key: Value = None,
    volatile: Sequence[str] = (),
    resources: Sequence[str] = (),
) -> Call:
    """Derive the key of a call and take its occurrence number and its index.

    Raises ``IncompatibleError`` (code ``call-turn``) for a negative turn, and for arguments that cannot be encoded.
    """
    if turn < 0:
        raise IncompatibleError("a call belongs to a turn", code="call-turn", object=tool, expected="turn >= 0", found=str(turn))
    canonical = canonical_arguments(args, volatile)
    identity = identity_of(canonical, intent_key)
    occurrence = occurrences.take(tool, identity)
    return Call(
        key=derive_key(lineage=lineage, turn=turn, tool=tool, identity=identity, occurrence=occurrence),
        lineage=lineage,
        turn=turn,
        tool=tool,
        effect_class=effect_class,
        sandbox=sandbox,
        args=dict(args),
        intent_key=intent_key,
        occurrence=occurrence,
        index=occurrences.take_index(),
        resources=tuple(resources),
        volatile=tuple(volatile),
        canonical=canonical,
    )
