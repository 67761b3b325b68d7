"""One name in a directory, and how it stands in a node (``store/FORMAT.md`` section 6, *sandbox*).

Invariants, checked when an entry is written and again when it is read:
1. A name is 1-255 bytes, not ``.`` or ``..``, without ``/`` and NUL.
2. A file's content stands in exactly one place: inline (at most ``INLINE_BYTES``), in chunks (at most ``MAX_CHUNKS``), or in a
   ``file`` node.
3. Mode bits are at most 07777; files never carry set-uid or set-gid (dropped by policy).
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CorruptionError
from ..nodes import ref_kind
from ..types import Ref

INLINE_BYTES = 512
MAX_CHUNKS = 64
MAX_NAME_BYTES = 255
MAX_TARGET_BYTES = 4095
MAX_FILE_BYTES = 1 << 60
MAX_DEPTH = 200
"""directories inside one another; deeper trees are refused at capture and at restore"""

EntryType = Literal["f", "d", "l"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file (``f``), directory (``d``) or symbolic link (``l``)."""

    name: bytes
    type: EntryType
    mode: int
    """permission bits, at most 07777"""
    mtime_ns: int
    size: int = 0
    """bytes of a file; 0 for others"""
    inline: bytes | None = None
    """a small file's content, or a link's target"""
    chunks: tuple[Ref, ...] = ()
    node: Ref | None = None
    """a directory's node, or a big file's"""
    link: bytes | None = None
    """path (from the root) of the first name of a hard-linked file"""


def kept_mode(st_mode: int) -> int:
    """The mode bits that are captured and brought back: set-uid and set-gid are dropped from files."""
    mode = stat.S_IMODE(st_mode)
    return mode & 0o1777 if stat.S_ISREG(st_mode) else mode


def content_of(entry: Entry | None) -> tuple[object, ...]:
    """What must be equal for two entries to hold the same bytes."""
    return () if entry is None else (entry.type, entry.size, entry.inline, entry.chunks, entry.node)


def check_name(name: object, where: str) -> bytes:
    if type(name) is not bytes or not 0 < len(name) <= MAX_NAME_BYTES or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise CorruptionError("a name that no file may have", code="bad-name", object=where, found=repr(name)[:80])
    return name


def encode_entry(entry: Entry, strong: list[Ref]) -> dict[str, Any]:
    """The entry's map; its references are appended to ``strong``."""
    check_name(entry.name, "entry")
    item: dict[str, Any] = {"n": entry.name, "t": entry.type, "m": entry.mode, "mt": entry.mtime_ns}
    if entry.link is not None:
        item["h"] = entry.link
    if entry.type == "f":
        item["s"] = entry.size
    if entry.inline is not None:
        item["x"] = entry.inline
    elif entry.node is not None:
        item["d" if entry.type == "d" else "b"] = len(strong)
        strong.append(entry.node)
    else:
        item["c"] = [len(strong), len(entry.chunks)]
        strong.extend(entry.chunks)
    return item


_KEYS = {
    "f": ({"n", "t", "m", "mt", "s"}, {"x", "c", "b"}),
    "d": ({"n", "t", "m", "mt"}, {"d"}),
    "l": ({"n", "t", "m", "mt"}, {"x"}),
}


def decode_entry(item: object, strong: Sequence[Ref], where: str) -> Entry:
    """Raises ``CorruptionError`` naming the directory and the name."""
    if not isinstance(item, dict):
        raise CorruptionError("an entry is no map", code="bad-entry", object=where)
    name = check_name(item.get("n"), where)
    here = f"{where}/{name.decode('utf-8', 'backslashreplace')}"
    kind = item.get("t")
    if kind not in ("f", "d", "l"):  # a tuple: what was decoded may not be hashable
        raise CorruptionError("unknown type of entry", code="bad-entry", object=here, found=repr(kind)[:40])
    needed, content = _KEYS[kind]
    present = set(item) & content
    if not needed <= set(item) or len(present) != 1 or set(item) - needed - content - {"h"} or (kind != "f" and "h" in item):
        raise CorruptionError("an entry has the wrong keys", code="bad-entry", object=here, found=", ".join(sorted(item))[:80])
    mode, mtime_ns = _integer(item["m"], 0o7777, here), _integer(item["mt"], 1 << 63, here, low=-(1 << 63))
    size = _integer(item["s"], MAX_FILE_BYTES, here) if kind == "f" else 0
    link = item.get("h")
    if link is not None:
        if type(link) is not bytes:
            raise CorruptionError("the path of a hard link is not bytes", code="bad-entry", object=here)
        for part in link.split(b"/"):
            check_name(part, here)
    inline, chunks, node = _content(item, kind, size, strong, here)
    if kind == "f":
        mode &= 0o1777
    return Entry(name, kind, mode, mtime_ns, size, inline, chunks, node, link)


def _content(
    item: Mapping[str, Any], kind: str, size: int, strong: Sequence[Ref], here: str
) -> tuple[bytes | None, tuple[Ref, ...], Ref | None]:
    if "x" in item:
        inline = item["x"]
        limit = INLINE_BYTES if kind == "f" else MAX_TARGET_BYTES
        sound = type(inline) is bytes and len(inline) <= limit
        if not sound or (len(inline) != size if kind == "f" else not inline or b"\0" in inline):
            raise CorruptionError("inline content does not fit the entry", code="bad-entry", object=here)
        return inline, (), None
    if "c" in item:
        span = item["c"]
        if type(span) is not list or len(span) != 2:
            raise CorruptionError("chunks are not [first, count]", code="bad-entry", object=here)
        count = _integer(span[1], MAX_CHUNKS, here)
        first = _integer(span[0], len(strong) - count, here)
        chunks = tuple(strong[first : first + count])
        if any(ref_kind(ref) != "chunk" for ref in chunks):
            raise CorruptionError("content that is no chunk", code="bad-entry", object=here)
        return None, chunks, None
    node = strong[_integer(item["d" if kind == "d" else "b"], len(strong) - 1, here)]
    if ref_kind(node) != "node":
        raise CorruptionError("a reference of the wrong kind", code="bad-entry", object=here)
    return None, (), node


def _integer(value: object, high: int, here: str, *, low: int = 0) -> int:
    if type(value) is not int or not low <= value <= high:
        raise CorruptionError("a number out of range", code="bad-entry", object=here, expected=f"{low} to {high}", found=repr(value)[:40])
    return value
