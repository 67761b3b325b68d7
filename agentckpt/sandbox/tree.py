"""Stored trees by themselves: walk, read one path, compare two, restore into a directory.

Nothing here needs a live workspace; the command line's ``cat``, ``diff``, ``show`` and ``restore`` stand on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConflictError, CorruptionError, IncompatibleError, NotFoundError
from ..nodes import Node, encode_node, get_node, ref_kind
from ..types import PartReport, Ref, Source
from .content import read_content
from .dirs import Budget, read_directory
from .entries import Entry, content_of
from .ignore import Ignore
from .scan import check_depth, join, show

VERSION = 1
MAX_READ_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Tree:
    """A sandbox part's own node."""

    root: Ref
    mode: int
    """of the root directory"""
    mtime_ns: int
    backend: str
    consistency: str
    ignored: tuple[str, ...]
    facts: Mapping[str, Any]


def encode_tree(tree: Tree) -> bytes:
    body = {
        "v": VERSION, "backend": tree.backend, "consistency": tree.consistency, "root": 0, "m": tree.mode, "mt": tree.mtime_ns,
        "ignored": list(tree.ignored), "facts": dict(tree.facts),
    }  # fmt: skip
    return encode_node(Node("tree", [tree.root], (), body))


def read_tree(source: Source, ref: Ref) -> Tree:
    """Raises ``NotFoundError``, ``CorruptionError``, ``IncompatibleError`` (a newer version)."""
    node = get_node(source, ref, type="tree")
    body = node.body
    if not isinstance(body, dict) or type(body.get("v")) is not int:
        raise CorruptionError("a tree node has another shape", code="bad-tree", object=ref.hex()[:14])
    if body["v"] != VERSION:
        raise IncompatibleError("a sandbox of another version", code="newer-version", expected=str(VERSION), found=str(body["v"]))
    root, ignored, facts = body.get("root"), body.get("ignored"), body.get("facts")
    mode, mtime_ns = body.get("m"), body.get("mt")
    sound = (
        type(root) is int and 0 <= root < len(node.strong) and ref_kind(node.strong[root]) == "node"
        and type(mode) is int and 0 <= mode <= 0o7777 and type(mtime_ns) is int and abs(mtime_ns) < 1 << 63
        and isinstance(ignored, list) and all(isinstance(text, str) for text in ignored) and isinstance(facts, dict)
        and isinstance(body.get("backend"), str) and isinstance(body.get("consistency"), str)
    )  # fmt: skip
    if not sound:
        raise CorruptionError("a tree node has another shape", code="bad-tree", object=ref.hex()[:14])
    assert isinstance(root, int)
    assert isinstance(mode, int)
    assert isinstance(mtime_ns, int)
    assert isinstance(ignored, list)
    assert isinstance(facts, dict)
    return Tree(node.strong[root], mode, mtime_ns, body["backend"], body["consistency"], tuple(ignored), facts)


def walk_tree(source: Source, ref: Ref) -> Iterator[tuple[bytes, Entry]]:
    """(path, entry) of everything in the tree ``ref``, directories before what they hold, names ascending."""
    yield from _walk(source, read_tree(source, ref).root, b"", Budget(), 0)


def _walk(source: Source, root: Ref, path: bytes, budget: Budget, depth: int) -> Iterator[tuple[bytes, Entry]]:
    check_depth(depth, path)
    for entry in read_directory(source, root, budget, show(path)):
        here = join(path, entry.name)
        yield here, entry
        if entry.type == "d" and entry.node is not None:
            yield from _walk(source, entry.node, here, budget, depth + 1)


def read_path(source: Source, ref: Ref, path: str | bytes, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
    """A file's content (a link's target). Raises ``NotFoundError``, ``IncompatibleError`` for a directory or over ``max_bytes``."""
    parts = [part for part in os.fsencode(path).split(b"/") if part not in (b"", b".")]
    node: Ref | None = read_tree(source, ref).root
    entry: Entry | None = None
    budget = Budget()
    for part in parts:
        if node is None or (entry is not None and entry.type != "d"):
            entry = None
            break
        entry = next((item for item in read_directory(source, node, budget, show(part)) if item.name == part), None)
        if entry is None:
            break
        node = entry.node
    if not parts or (entry is not None and entry.type == "d"):
        raise IncompatibleError("is a directory", code="is-directory", object=show(os.fsencode(path)))
    if entry is None:
        raise NotFoundError("no such path in this checkpoint", code="no-path", object=show(os.fsencode(path)))
    if entry.size > max_bytes:
        raise IncompatibleError("is too large", code="too-long", object=show(os.fsencode(path)), found=f"{entry.size} bytes")
    return b"".join(read_content(source, entry, show(os.fsencode(path)))) if entry.type == "f" else entry.inline or b""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two trees. ``before`` and ``after`` are None where there is no such path."""

    path: bytes
    kind: Literal["added", "removed", "changed", "touched"]
    """``touched``: only mode or mtime differ"""
    before: Entry | None
    after: Entry | None


def tree_diff(source: Source, ref_a: Ref, ref_b: Ref) -> list[Change]:
    """What differs, paths ascending; equal directories are not read. Costs what changed."""
    changes: list[Change] = []
    _diff(source, read_tree(source, ref_a).root, read_tree(source, ref_b).root, b"", Budget(), changes, 0)
    return changes


def _diff(source: Source, a: Ref, b: Ref, path: bytes, budget: Budget, changes: list[Change], depth: int) -> None:
    if a == b:
        return
    check_depth(depth, path)
    old = {entry.name: entry for entry in read_directory(source, a, budget, show(path))}
    new = {entry.name: entry for entry in read_directory(source, b, budget, show(path))}
    for name in sorted(old.keys() | new.keys()):
        here, before, after = join(path, name), old.get(name), new.get(name)
        if before == after:
            continue
        if before is not None and after is not None and before.type == after.type == "d":
            assert before.node is not None
            assert after.node is not None
            if (before.mode, before.mtime_ns) != (after.mode, after.mtime_ns) and before.node == after.node:
                changes.append(Change(here, "touched", before, after))
            _diff(source, before.node, after.node, here, budget, changes, depth + 1)
        elif before is not None and after is not None and before.type == after.type:
            changes.append(Change(here, "touched" if content_of(before) == content_of(after) else "changed", before, after))
        else:
            for entry, kind in ((before, "removed"), (after, "added")):
                if entry is not None:
                    _whole(source, entry, here, budget, changes, kind == "added", depth)


def _whole(source: Source, entry: Entry, path: bytes, budget: Budget, changes: list[Change], added: bool, depth: int) -> None:
    def change(where: bytes, item: Entry) -> Change:
        return Change(where, "added", None, item) if added else Change(where, "removed", item, None)

    changes.append(change(path, entry))
    if entry.type == "d" and entry.node is not None:
        changes.extend(change(where, item) for where, item in _walk(source, entry.node, path, budget, depth + 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``restore_tree`` would write."""

    target: str
    num_files: int
    num_directories: int
    num_symlinks: int
    num_bytes: int
    consistency: str


def restore_tree(source: Source, ref: Ref, target_dir: str, *, dry_run: bool = False, overwrite: bool = False) -> Plan | PartReport:
    """Write a stored tree to ``target_dir``, which must be absent or an empty directory, or any directory with ``overwrite=True``: then
    it is exchanged as ``Workspace`` does, and the old tree is kept beside it and named in the report's ``displaced``.

    With ``dry_run`` everything but file contents is read and checked, and a ``Plan`` is returned. Raises ``ConflictError``,
    ``CapacityError``, ``CorruptionError``, ``NotFoundError``; then the target is as it was.
    """
    from .restore import prepare_tree  # it stands on this module

    target = os.path.realpath(target_dir)
    if not overwrite and os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise ConflictError("is not empty", code="target-not-empty", object=target, hint="name an absent or empty directory")
    if dry_run:
        return plan_tree(source, ref, target)
    staged = prepare_tree(source, ref, target, Ignore(()))
    try:
        return staged.commit()
    except BaseException:
        staged.abort()
        raise


def plan_tree(source: Source, ref: Ref, target: str) -> Plan:
    """Count what stands in a tree. Raises as ``restore_tree``."""
    tree = read_tree(source, ref)
    counts = {"f": 0, "d": 0, "l": 0}
    num_bytes = 0
    for _, entry in _walk(source, tree.root, b"", Budget(), 0):
        counts[entry.type] += 1
        num_bytes += entry.size if entry.link is None else 0
    return Plan(target, counts["f"], counts["d"], counts["l"], num_bytes, tree.consistency)
