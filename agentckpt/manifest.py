"""A checkpoint as a value, its canonical bytes (section 6 of ``store/FORMAT.md``), and the invariants of the cut.

Invariants:
1. ``encode`` of what ``decode`` returned gives the same bytes; ``decode`` accepts nothing else.
2. Parts and children are strong references, parents weak; each reference is named exactly once, in a fixed order
   (parts by name, then children by name).
3. Times, names, hosts and annotations never enter: the same instant has one id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from .errors import AgentckptError, CorruptionError, IncompatibleError
from .nodes import Node, decode_node, encode_node
from .types import ID_BYTES, KIND_BYTE, Mark, Ref

VERSION: Final = 1
FEATURES: Final[frozenset[str]] = frozenset()
"""Manifest features that this version understands."""
CONSISTENCIES: Final = frozenset({"frozen", "quiescent", "per-file"})
_BODY_KEYS: Final = frozenset(
    {
        "v", "features", "session", "lineage", "turn", "parents", "parts", "children", "nonce", "mark", "in_flight", "undelivered",
        "consistency", "redaction",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One immutable instant of an agent.

    ``id`` is the 32-byte id of its manifest (empty before it is stored), ``session``, ``lineage`` and ``nonce`` are 16 bytes.
    """

    session: bytes
    lineage: bytes
    turn: int
    """number of whole turns behind it; cut 0 has 0"""
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


@dataclass(frozen=True, slots=True)
class CutFacts:
    """What ``check_cut`` compares a checkpoint with. What is left empty is not checked.

    ``open_keys``: effects up to the mark that are not terminal; ``outcome_keys``: effects up to the mark that have an outcome;
    ``tokens``: part -> (number of tokens, positions with valid KV); ``sandbox_seq``: part -> journal position when the sandbox
    was captured; ``last_outcome_seq`` and ``next_dispatch_seq``: the last outcome up to the mark, the first intent after it.
    """

    open_keys: frozenset[bytes] = frozenset()
    outcome_keys: frozenset[bytes] | None = None
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sandbox_seq: Mapping[str, int] = field(default_factory=dict)
    last_outcome_seq: int = 0
    next_dispatch_seq: int | None = None
    has_manifest: Callable[[bytes], bool] | None = None


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Canonical bytes of the manifest; the store's ``put("manifest", ...)`` gives its id.

    Raises ``IncompatibleError`` (code ``manifest-value``) for a value that the format cannot hold.
    """
    _check_values(checkpoint, _refuse_value)
    strong: list[Ref] = []
    parts: dict[str, Any] = {}
    for name, (kind, ref) in sorted(checkpoint.parts.items()):
        parts[name] = {"kind": kind, "ref": len(strong)}
        strong.append(ref)
    children: dict[str, Any] = {}
    for name, manifest in sorted(checkpoint.children.items()):
        children[name] = len(strong)
        strong.append(_manifest_ref(manifest))
    body = {
        "v": VERSION,
        "features": list(checkpoint.features),
        "session": checkpoint.session,
        "lineage": checkpoint.lineage,
        "turn": checkpoint.turn,
        "parents": list(range(len(checkpoint.parents))),
        "parts": parts,
        "children": children,
        "nonce": checkpoint.nonce,
        "mark": {"seq": checkpoint.mark.seq, "hash": checkpoint.mark.hash},
        "in_flight": list(checkpoint.in_flight),
        "undelivered": list(checkpoint.undelivered),
        "consistency": dict(checkpoint.consistency),
        "redaction": list(checkpoint.redaction),
    }
    return encode_node(Node("manifest", strong, [_manifest_ref(parent) for parent in checkpoint.parents], body))


def decode_checkpoint(data: bytes, id: bytes = b"") -> Checkpoint:
    """Read a manifest. ``id`` is what the caller verified ``data`` against.

    Raises ``IncompatibleError`` (code ``manifest-version`` or ``manifest-feature``) for a newer one and
    ``CorruptionError`` (code ``manifest-shape``, or what the node itself says) for anything that is not a manifest.
    """
    node = decode_node(data)
    if node.type != "manifest":
        _refuse_shape("type", "manifest", node.type)
    body = node.body
    if type(body) is not dict or type(body.get("v")) is not int:
        _refuse_shape("body", "a map with a version", type(body).__name__)
    _check_known(body)
    try:
        checkpoint = _read_body(body, node, id)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, AgentckptError):
            raise
        _refuse_shape("body", "the fields of a manifest", f"{type(error).__name__}: {error}")
    _check_values(checkpoint, _refuse_shape)
    if encode_checkpoint(checkpoint) != data:
        _refuse_shape("references", "each part and child once, in order of their names", "another order, or one that nothing names")
    return checkpoint


def check_cut(checkpoint: Checkpoint, facts: CutFacts) -> None:
    """The invariants of the cut, checked when it is written and again when it is restored.

    Raises ``CorruptionError`` with code ``cut-in-flight`` (1), ``cut-undelivered`` (2), ``cut-sandbox`` (3), ``cut-tokens`` (4)
    or ``cut-parents`` (5); the numbers are those of the design.
    """
    missing = facts.open_keys - set(checkpoint.in_flight)
    if missing:
        _refuse_cut("cut-in-flight", "every effect up to the mark terminal or in_flight", f"{_short(missing)} neither")
    if facts.outcome_keys is not None and not set(checkpoint.undelivered) <= facts.outcome_keys:
        strangers = set(checkpoint.undelivered) - facts.outcome_keys
        _refuse_cut("cut-undelivered", "undelivered effects that have an outcome up to the mark", f"{_short(strangers)} without")
    _check_sandboxes(checkpoint, facts)
    for name, (num_tokens, num_computed) in facts.tokens.items():
        if not 0 <= num_computed <= max(0, num_tokens - 1):
            _refuse_cut("cut-tokens", f"part {name!r}: computed <= tokens - 1", f"{num_computed} of {num_tokens}")
    if facts.has_manifest is not None:
        absent = {manifest for manifest in checkpoint.children.values() if not facts.has_manifest(manifest)}
        if absent:
            _refuse_cut("cut-parents", "children that exist", f"{_short(absent)} absent")


def _check_sandboxes(checkpoint: Checkpoint, facts: CutFacts) -> None:
    for name, (kind, _) in checkpoint.parts.items():
        if kind == "sandbox" and checkpoint.consistency.get(name) not in CONSISTENCIES:
            found = repr(checkpoint.consistency.get(name))
            _refuse_cut("cut-sandbox", f"part {name!r}: consistency one of {sorted(CONSISTENCIES)}", found)
    for name, seq in facts.sandbox_seq.items():
        late = facts.next_dispatch_seq is not None and seq >= facts.next_dispatch_seq
        if seq < facts.last_outcome_seq or late:
            expected = f"part {name!r} captured after position {facts.last_outcome_seq} and before any later dispatch"
            _refuse_cut("cut-sandbox", expected, f"position {seq}")


def _check_known(body: Mapping[str, Any]) -> None:
    if body["v"] > VERSION:
        raise IncompatibleError(
            code="manifest-version", object="manifest", expected=f"version <= {VERSION}", found=str(body["v"]), hint="use a newer agentckpt"
        )
    features = body.get("features")
    unknown = sorted(set(map(str, features)) - FEATURES) if isinstance(features, list) else []
    if unknown:
        raise IncompatibleError(
            code="manifest-feature", object="manifest", expected=f"features within {sorted(FEATURES)}", found=str(unknown),
            hint="use a newer agentckpt",
        )  # fmt: skip
    if body["v"] != VERSION or set(body) != _BODY_KEYS:
        _refuse_shape("body", f"version {VERSION} with the keys {sorted(_BODY_KEYS)}", f"version {body['v']}, {sorted(body)}")


def _read_body(body: Mapping[str, Any], node: Node, id: bytes) -> Checkpoint:
    def at(refs: Sequence[Ref], position: Any) -> Ref:
        if type(position) is not int or not 0 <= position < len(refs):
            _refuse_shape("reference", f"a position below {len(refs)}", repr(position)[:40])
        return refs[position]

    parts = {}
    for name, part in _map(body, "parts").items():
        if type(part) is not dict or set(part) != {"kind", "ref"}:
            _refuse_shape(f"part {name!r}", "{kind, ref}", repr(part)[:40])
        parts[name] = (part["kind"], at(node.strong, part["ref"]))
    mark = _map(body, "mark")
    if set(mark) != {"seq", "hash"}:
        _refuse_shape("mark", "{seq, hash}", str(sorted(mark)))
    return Checkpoint(
        session=body["session"],
        lineage=body["lineage"],
        turn=body["turn"],
        parts=parts,
        nonce=body["nonce"],
        mark=Mark(mark["seq"], mark["hash"]),
        parents=tuple(_manifest_id(at(node.weak, position)) for position in _list(body, "parents")),
        children={name: _manifest_id(at(node.strong, position)) for name, position in _map(body, "children").items()},
        in_flight=tuple(_list(body, "in_flight")),
        undelivered=tuple(_list(body, "undelivered")),
        consistency=_map(body, "consistency"),
        redaction=tuple(_list(body, "redaction")),
        features=tuple(_list(body, "features")),
        id=id,
    )


def _check_values(checkpoint: Checkpoint, refuse: Callable[[str, str, str], NoReturn]) -> None:
    """Types and lengths, of values that the caller made and of values that were read."""

    def octets(name: str, value: object, length: int) -> None:
        if type(value) is not bytes or len(value) != length:
            refuse(name, f"{length} bytes", f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__)

    def texts(name: str, values: Sequence[object]) -> None:
        for value in values:
            if type(value) is not str or not value:
                refuse(name, "texts that are not empty", repr(value)[:40])

    for name in ("session", "lineage", "nonce"):
        octets(name, getattr(checkpoint, name), 16)
    octets("mark hash", checkpoint.mark.hash, 32)
    for name, number in (("turn", checkpoint.turn), ("mark seq", checkpoint.mark.seq)):
        if type(number) is not int or number < 0:
            refuse(name, "an integer >= 0", repr(number)[:40])
    for name, keys in (("in_flight", checkpoint.in_flight), ("undelivered", checkpoint.undelivered), ("parents", checkpoint.parents)):
        for key in keys:
            octets(name, key, 32)
        if len(set(keys)) != len(keys):
            refuse(name, "each once", "one twice")
    for name, (kind, ref) in checkpoint.parts.items():
        texts("part", (name, kind))
        octets(f"part {name!r}", ref, ID_BYTES + 1)
        if ref[0] != KIND_BYTE["node"]:
            refuse(f"part {name!r}", "a reference to a node", f"kind {ref[0]}")
    for name, manifest in checkpoint.children.items():
        texts("child", (name,))
        octets(f"child {name!r}", manifest, ID_BYTES)
    texts("redaction", checkpoint.redaction)
    texts("features", checkpoint.features)
    texts("consistency", (*checkpoint.consistency.keys(), *checkpoint.consistency.values()))
    if not set(checkpoint.consistency) <= set(checkpoint.parts):
        refuse("consistency", "names of parts", str(sorted(checkpoint.consistency)))


def _map(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    if type(body[name]) is not dict:
        _refuse_shape(name, "a map", type(body[name]).__name__)
    return dict(body[name])


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    if type(body[name]) is not list:
        _refuse_shape(name, "a list", type(body[name]).__name__)
    return list(body[name])


def _manifest_ref(manifest: bytes) -> Ref:
    return Ref(bytes([KIND_BYTE["manifest"]]) + manifest)


def _manifest_id(ref: Ref) -> bytes:
    if ref[0] != KIND_BYTE["manifest"]:
        _refuse_shape("parent or child", "a reference to a manifest", f"kind {ref[0]}")
    return ref[1:]


def _short(keys: Sequence[bytes] | frozenset[bytes] | set[bytes]) -> str:
    return ", ".join(sorted(key.hex()[:12] for key in keys)[:4])


def _refuse_value(name: str, expected: str, found: str) -> NoReturn:
    raise IncompatibleError(code="manifest-value", object=f"checkpoint field {name}", expected=expected, found=found)


def _refuse_shape(name: str, expected: str, found: str) -> NoReturn:
    raise CorruptionError(code="manifest-shape", object=f"manifest field {name}", expected=expected, found=found)


def _refuse_cut(code: str, expected: str, found: str) -> NoReturn:
    raise CorruptionError(code=code, object="checkpoint", expected=expected, found=found, hint="restore an older checkpoint")
