"""The form of KV in the store: groups of layers, and the shape of one chunk (FORMAT.md section 6).

A group is a set of layers whose KV has one shape. Its content-addressed unit is one chunk per (64 tokens, head), in the
order ``[layer, plane, token, dim]``, dense, little endian. K, V and quantisation scales are planes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptionError, IncompatibleError

BLOCK_TOKENS = 64
"""Tokens of KV in a block of the store."""
DTYPE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4}
GROUP_KINDS = ("full", "window", "latent", "opaque-state")
MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_DIM = 65536


@dataclass(frozen=True, slots=True)
class Plane:
    """One tensor of a group: ``shape`` is what one token of one head holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def token_bytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share one shape. ``window`` is the number of live tokens of a window group, else None."""

    layers: tuple[int, ...]
    kind: str
    heads: int
    planes: tuple[Plane, ...]
    window: int | None = None

    def chunk_bytes(self, num_tokens: int) -> int:
        """Bytes of one chunk (one head) that holds ``num_tokens`` tokens."""
        return len(self.layers) * num_tokens * sum(plane.token_bytes for plane in self.planes)

    def body(self) -> dict[str, Any]:
        planes = [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in self.planes]
        return {"layers": list(self.layers), "kind": self.kind, "window": self.window, "heads": self.heads, "planes": planes}


def full_group(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: str) -> Group:
    """The one group of a model whose layers all attend to everything."""
    planes = (Plane("k", dtype, (head_dim,)), Plane("v", dtype, (head_dim,)))
    return Group(tuple(range(num_layers)), "full", num_kv_heads, planes)


def read_groups(raw: object) -> tuple[Group, ...]:
    """Groups from a decoded ``kv`` node.

    Raises ``CorruptionError`` on a wrong form, ``IncompatibleError`` on a kind that format 1 reserves.
    """
    if not isinstance(raw, list) or len(raw) > 64:
        raise CorruptionError(object="kv groups", expected="a list of at most 64", found=type(raw).__name__)
    return tuple(_read_group(item) for item in raw)


def _read_group(raw: object) -> Group:
    if not isinstance(raw, Mapping):
        raise CorruptionError(object="kv group", expected="a map", found=type(raw).__name__)
    kind = raw.get("kind")
    if kind in GROUP_KINDS and kind != "full":
        raise IncompatibleError(object="kv group", expected="kind full", found=str(kind), hint="a newer version is needed to use this KV")
    layers, heads, planes = raw.get("layers"), raw.get("heads"), raw.get("planes")
    if kind != "full" or not _ints(layers, MAX_LAYERS, 0) or not _ints([heads], MAX_HEADS, 1) or not isinstance(planes, list):
        raise CorruptionError(object="kv group", expected="layers, kind, heads, planes", found=repr(raw)[:120])
    assert isinstance(layers, list)
    assert isinstance(heads, int)
    return Group(tuple(layers), "full", heads, tuple(_read_plane(plane) for plane in planes))


def _read_plane(raw: object) -> Plane:
    shape = raw.get("shape") if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or raw.get("dtype") not in DTYPE_BYTES or not _ints(shape, MAX_DIM, 1) or len(shape or ()) > 4:
        raise CorruptionError(object="kv plane", expected="name, dtype, shape", found=repr(raw)[:120])
    return Plane(str(raw.get("name")), str(raw["dtype"]), tuple(shape or ()))


def _ints(values: object, top: int, least: int) -> bool:
    return isinstance(values, list) and len(values) <= top and all(type(v) is int and least <= v <= top for v in values)


def total_heads(groups: Sequence[Group]) -> int:
    """Chunks of one block."""
    return sum(group.heads for group in groups)
