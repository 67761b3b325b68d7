"""What is reachable from where: the walk behind prune and verify. It knows references, and of a manifest its parts and children.

Invariants:
1. Strong references are always followed; weak ones only below a part whose weak data is wanted; a manifest's own weak
   references (its parents) never: old checkpoints can go.
2. A node is read once, however many checkpoints hold it. What cannot be read is noted and does not stop the walk.
3. What is held: every checkpoint of every session that was not removed, every tagged one, and their children; and what
   the records of these sessions refer to (large values, post-states of sandboxes), those of their ancestors included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import AgentckptError, CorruptionError, IncompatibleError, NotFoundError
from ..nodes import MAX_NODE_BYTES, decode_node
from ..types import KIND_NAME, REF_BYTES, Ref, Source
from .ids import make_ref, show_ref
from .view import SessionView, View

_MANIFEST_BYTE = 3
_CHUNK_BYTE = 1


class PartKey(NamedTuple):
    """One part of one checkpoint, as ``drop`` records name it."""

    manifest: bytes
    part: str


class Links(NamedTuple):
    """The references of one node."""

    strong: tuple[Ref, ...] = ()
    weak: tuple[Ref, ...] = ()


@dataclass(frozen=True, slots=True)
class ManifestLinks:
    """What the store knows of a checkpoint: its parts (name -> kind, reference) and its children."""

    parts: Mapping[str, tuple[str, Ref]] = field(default_factory=dict)
    children: tuple[Ref, ...] = ()


@dataclass(slots=True)
class Reached:
    """What a walk found. ``strong`` must exist; ``weak`` is wanted and not strong; ``manifests`` by id."""

    strong: set[Ref] = field(default_factory=set)
    weak: set[Ref] = field(default_factory=set)
    manifests: dict[bytes, ManifestLinks] = field(default_factory=dict)

    @property
    def all(self) -> set[Ref]:
        return self.strong | self.weak

    def parts(self) -> Iterator[tuple[PartKey, str, Ref]]:
        """(key, kind, reference) of every part of every checkpoint."""
        for manifest, links in self.manifests.items():
            for name, (kind, ref) in links.parts.items():
                yield PartKey(manifest, name), kind, ref


def holders(view: View) -> dict[bytes, list[str]]:
    """Manifest id -> what holds it, in words, for every checkpoint that stays."""
    held: dict[bytes, list[str]] = {}
    for session in live_sessions(view):
        for manifest in dict.fromkeys(bytes(head["manifest"]) for head in session.heads):
            held.setdefault(manifest, []).append(f"session {session.name}")
    for tag, manifest in sorted(view.tags.items()):
        held.setdefault(manifest, []).append(f"tag {tag}")
    return held


def live_sessions(view: View) -> list[SessionView]:
    """Sessions that were not removed, by name."""
    return sorted((s for s in view.sessions.values() if not s.removed), key=lambda s: (s.name, s.sid))


def journal_refs(view: View) -> dict[Ref, list[str]]:
    """Reference -> sessions in words, for every object that records refer to: ``{"$ref": reference}`` and ``post``.

    A fork sees its ancestors' effects as its own, so theirs are held too, even if they were removed.
    """
    wanted: dict[bytes, SessionView] = {}
    waiting = live_sessions(view)
    while waiting:
        session = waiting.pop()
        if session.sid not in wanted:
            wanted[session.sid] = session
            parent = view.sessions.get((session.parent or {}).get("sid", b""))
            waiting.extend([parent] if parent else [])
    held: dict[Ref, list[str]] = {}
    for session in wanted.values():
        bodies = [*(entry.body for entry in session.entries), *session.heads, *session.annotations.values()]
        for ref in {ref for body in bodies for ref in _refs_in(body)}:
            held.setdefault(ref, []).append(f"session {session.name}")
    return held


def _refs_in(body: Mapping[str, object]) -> Iterator[Ref]:
    """Only where the library puts them: a user's own value may look like a reference further in."""
    values = body.get("values")
    fields = [*body.values(), *(values.values() if isinstance(values, Mapping) else ())]
    found = [body.get("post"), *(field["$ref"] for field in fields if isinstance(field, Mapping) and field.keys() == {"$ref"})]
    for ref in found:
        if isinstance(ref, bytes) and len(ref) == REF_BYTES and ref[0] in KIND_NAME:
            yield Ref(ref)


class Walker:
    """Walks references through a ``Source``; remembers the links of every node it read, and what it could not read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._links: dict[Ref, Links] = {}
        self._manifests: dict[Ref, ManifestLinks] = {}
        self.unreadable: dict[Ref, AgentckptError] = {}
        """node or manifest -> why; ``NotFoundError`` if it is absent"""

    def walk(self, manifests: Iterable[bytes], others: Iterable[Ref] = (), *, unwanted: Collection[tuple[bytes, str]] = ()) -> Reached:
        """Everything below these checkpoints, their children and ``others``; without weak data of the ``unwanted`` parts."""
        found = Reached()
        waiting = [make_ref("manifest", manifest) for manifest in manifests]
        while waiting:
            ref = waiting.pop()
            if ref in found.strong:
                continue
            found.strong.add(ref)
            links = self._manifest(ref)
            found.manifests[ref[1:]] = links
            waiting.extend(links.children)
            self._follow(self._below_manifest(ref, links), found.strong, weak=False)
        self._follow(others, found.strong, weak=False)
        seen: set[Ref] = set()
        for key, _, ref in found.parts():
            if key not in unwanted:
                self._follow([ref], seen, weak=True)
        found.weak = seen - found.strong
        return found

    def weak_below(self, ref: Ref) -> set[Ref]:
        """What is reachable from the node of a part only through weak references."""
        strong: set[Ref] = set()
        every: set[Ref] = set()
        self._follow([ref], strong, weak=False)
        self._follow([ref], every, weak=True)
        return every - strong

    def links(self, ref: Ref) -> Links:
        """The references of an object; none for a chunk, and for what cannot be read."""
        if ref[0] == _CHUNK_BYTE:
            return Links()
        if ref not in self._links:
            self._links[ref] = self._read(ref)
        return self._links[ref]

    def touched_by(self, bad: Collection[Ref]) -> set[Ref]:
        """All objects read so far from which one of ``bad`` is reachable, ``bad`` included; not through a manifest's parents."""
        above: dict[Ref, list[Ref]] = {}
        for ref, links in self._links.items():
            for child in (*links.strong, *(() if ref[0] == _MANIFEST_BYTE else links.weak)):
                above.setdefault(child, []).append(ref)
        touched: set[Ref] = set()
        waiting = list(bad)
        while waiting:
            ref = waiting.pop()
            if ref not in touched:
                touched.add(ref)
                waiting.extend(above.get(ref, ()))
        return touched

    def _follow(self, start: Iterable[Ref], seen: set[Ref], *, weak: bool) -> None:
        waiting = list(start)
        while waiting:
            ref = waiting.pop()
            if ref in seen:
                continue
            seen.add(ref)
            links = self.links(ref)
            waiting.extend(links.strong)
            if weak and ref[0] != _MANIFEST_BYTE:
                waiting.extend(links.weak)

    def _below_manifest(self, ref: Ref, links: ManifestLinks) -> list[Ref]:
        """Its strong references, its children excepted: these are walked as checkpoints."""
        children = set(links.children)
        return [child for child in self.links(ref).strong if child not in children]

    def _read(self, ref: Ref) -> Links:
        try:
            node = decode_node(self._source.get(ref, MAX_NODE_BYTES))
            if ref[0] == _MANIFEST_BYTE:
                self._manifests[ref] = _manifest_links(ref, node.type, node.body, tuple(node.strong))
        except (NotFoundError, CorruptionError) as error:
            self.unreadable[ref] = error
            return Links()
        return Links(tuple(node.strong), tuple(node.weak))

    def _manifest(self, ref: Ref) -> ManifestLinks:
        self.links(ref)
        return self._manifests.get(ref, ManifestLinks())


def _manifest_links(ref: Ref, type: str, body: object, strong: tuple[Ref, ...]) -> ManifestLinks:
    """Raises ``CorruptionError``, and ``IncompatibleError`` for a version whose parts this one might not see."""
    if type != "manifest" or not isinstance(body, dict):
        raise CorruptionError("is no manifest", object=show_ref(ref), code="manifest-shape")
    if body.get("v") != 1 or body.get("features") != []:
        raise IncompatibleError(
            "is of a newer version", object=show_ref(ref), expected="version 1 without features",
            found=f"version {body.get('v')!r}, {body.get('features')!r}", code="manifest-version", hint="use a newer agentckpt",
        )  # fmt: skip
    try:
        parts = {str(name): (str(part["kind"]), strong[_position(part["ref"])]) for name, part in body["parts"].items()}
        children = tuple(strong[_position(at)] for at in body["children"].values())
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CorruptionError(f"is no manifest ({error!r})", object=show_ref(ref), code="manifest-shape") from None
    if any(child[0] != _MANIFEST_BYTE for child in children):
        raise CorruptionError("has a child that is no manifest", object=show_ref(ref), code="manifest-shape")
    return ManifestLinks(parts, children)


def _position(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no position")
    return value
