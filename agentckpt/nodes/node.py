"""Nodes: ``[type, strong references, weak references, body]``; bodies name references by position.

So whoever walks references (prune, verify, push) needs to know nothing of what a node means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import CorruptionError, IncompatibleError
from ..types import KIND_NAME, REF_BYTES, Buffer, Kind, Ref, Sink, Source
from .cbor import decode, encode

MAX_NODE_BYTES = 16 << 20
"""FORMAT.md section 2: the plaintext of any object"""


class Node(NamedTuple):
    """One node. ``body`` is what ``cbor.encode`` accepts."""

    type: str
    strong: Sequence[Ref] = ()
    weak: Sequence[Ref] = ()
    body: Any = None


def check_ref(ref: object) -> Ref:
    """``ref`` if it has the form of a reference. Raises ``CorruptionError``."""
    if type(ref) is not bytes or len(ref) != REF_BYTES or ref[0] not in KIND_NAME:
        found = f"{len(ref)} bytes {ref[:4].hex()}..." if isinstance(ref, bytes) else type(ref).__name__
        raise CorruptionError("is no reference", object="node", code="bad-reference", expected="kind byte 1-3 and 32 bytes", found=found)
    return Ref(ref)


def ref_kind(ref: Ref) -> Kind:
    """``chunk``, ``node`` or ``manifest``. Raises ``CorruptionError``."""
    return KIND_NAME[check_ref(ref)[0]]


def encode_node(node: Node) -> bytes:
    """Canonical bytes. Raises ``IncompatibleError`` for a body that has no encoding or a node of over 16 MiB."""
    if type(node.type) is not str or not node.type:
        raise IncompatibleError("has no type", object="node", code="not-encodable")
    for ref in (*node.strong, *node.weak):
        check_ref(ref)
    data = encode([node.type, list(node.strong), list(node.weak), node.body])
    if len(data) > MAX_NODE_BYTES:
        raise IncompatibleError(
            "is too long", object=f"node of type {node.type}", code="too-long", expected=f"at most {MAX_NODE_BYTES} bytes",
            found=f"{len(data)}", hint="store large values as chunks and refer to them",
        )  # fmt: skip
    return data


def decode_node(data: Buffer, *, max_bytes: int = MAX_NODE_BYTES) -> Node:
    """The node whose canonical bytes are ``data``. Raises ``CorruptionError``. The body is not looked into."""
    value = decode(data, max_bytes=max_bytes)
    if type(value) is not list or len(value) != 4 or type(value[0]) is not str or not value[0]:
        raise CorruptionError("is no node", object="node", code="bad-node", expected="[type, strong, weak, body]")
    type_name, strong, weak, body = value
    if type(strong) is not list or type(weak) is not list:
        raise CorruptionError("has no lists of references", object=f"node of type {type_name}", code="bad-node")
    return Node(type_name, tuple(check_ref(ref) for ref in strong), tuple(check_ref(ref) for ref in weak), body)


def put_node(sink: Sink, node: Node, *, kind: Kind = "node", compress: bool = False) -> Ref:
    """Encode and store. References are incompressible, so ``compress`` pays only for bodies of text."""
    return sink.put(kind, encode_node(node), compress=compress)


def get_node(source: Source, ref: Ref, *, type: str | None = None, max_bytes: int = MAX_NODE_BYTES) -> Node:
    """Read and decode. Raises ``NotFoundError``, ``CorruptionError`` (also if the node is not of ``type``)."""
    if ref_kind(ref) == "chunk":
        raise CorruptionError("is a chunk, not a node", object=ref.hex(), code="bad-node")
    node = decode_node(source.get(ref, max_bytes), max_bytes=max_bytes)
    if type is not None and node.type != type:
        raise CorruptionError("is of another type", object=f"node {ref.hex()[:14]}", code="bad-node", expected=type, found=node.type)
    return node
