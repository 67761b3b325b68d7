"""Loading a checkpoint's parts: everything is verified and built aside first, then each part takes over.

Invariants:
1. Until ``commit_parts`` the live parts are untouched; a failure aborts whatever was built aside.
2. ``commit`` of each part is idempotent: after a crash the same parts are prepared and committed again.
3. ``agentckpt.restore`` moves no head, takes no lease and dispatches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from ..errors import IncompatibleError
from ..manifest import Checkpoint, decode_checkpoint
from ..sandbox import Workspace
from ..store import Store
from ..types import KIND_BYTE, EngineLike, Part, PartReport, Ref, Sandbox, Source, Staged
from .report import RestoreReport
from .state import StatePart

MAX_MANIFEST_BYTES = 16 * 2**20
NONCE_BYTES = 16


@dataclass(slots=True)
class Prepared:
    """Parts built aside, in the order in which they are committed."""

    staged: dict[str, Staged] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def abort(self) -> None:
        for staged in self.staged.values():
            staged.abort()


def read_checkpoint(store: Store, manifest: bytes) -> Checkpoint:
    """The checkpoint of a 32-byte manifest id; ``NotFoundError``, ``CorruptionError``, ``IncompatibleError``."""
    return decode_checkpoint(store.get(Ref(bytes([KIND_BYTE["manifest"]]) + manifest), MAX_MANIFEST_BYTES), manifest)


def prepare_parts(source: Source, checkpoint: Checkpoint, parts: Mapping[str, Part]) -> Prepared:
    """Verify and build aside every part of the checkpoint.

    Raises ``IncompatibleError`` (code ``part-missing`` or ``part-kind``) if a part has nowhere to go.
    """
    for name, (kind, _) in checkpoint.parts.items():
        _check_part(checkpoint, name, kind, parts.get(name))
    prepared = Prepared()
    try:
        for name, (_, ref) in checkpoint.parts.items():
            started = perf_counter()
            prepared.staged[name] = parts[name].prepare(source, ref)
            prepared.seconds[f"prepare.{name}"] = perf_counter() - started
    except BaseException:
        prepared.abort()
        raise
    return prepared


def commit_parts(prepared: Prepared) -> dict[str, PartReport]:
    """Let every part take over, the state last: its object may look at the others."""
    reports = {}
    for name in sorted(prepared.staged, key=lambda name: (name == "state", name)):
        started = perf_counter()
        reports[name] = prepared.staged[name].commit()
        prepared.seconds[f"commit.{name}"] = perf_counter() - started
    return reports


def _check_part(checkpoint: Checkpoint, name: str, kind: str, part: Part | None) -> None:
    where = f"checkpoint {checkpoint.id.hex()[:12]}, part {name!r}"
    if part is None:
        option = {"sandbox": "sandbox=", "state": "state="}.get(name, "kv=")
        raise IncompatibleError(
            "nothing was given to load it into", code="part-missing", object=where, expected=f"{option} for a part of kind {kind!r}",
            found="none", hint=f"pass {option}... as when the session was made",
        )  # fmt: skip
    if part.kind != kind:
        raise IncompatibleError("another kind of part", code="part-kind", object=where, expected=kind, found=part.kind)


def restore(store: str | Path | Store, id: str, *, kv: Any = None, sandbox: Any = None, state: Any = None) -> RestoreReport:
    """Load the parts of a checkpoint into live objects; no head moves and nothing is dispatched. Blocking.

    ``id``: hex digits (at least 4), a tag, or a session's name (its head). ``kv``: a live sequence, an engine (the new sequence
    stands in ``report.live``), or a map of part name to either. ``sandbox``: a path or a ``Sandbox``. ``state``: an object or a
    factory. A part of the checkpoint for which nothing is given is left out.

    Raises ``NotFoundError``, ``AmbiguousIdError``, ``CorruptionError``, ``IncompatibleError``, ``ConflictError`` (a target that
    may not be replaced).
    """
    if isinstance(store, Store):
        return _restore(store, id, kv, sandbox, state)
    opened = Store.open(store, mode="ro")
    try:
        return _restore(opened, id, kv, sandbox, state)
    finally:
        opened.close()


def _restore(store: Store, id: str, kv: Any, sandbox: Any, state: Any) -> RestoreReport:
    started = perf_counter()
    view = store.view()
    checkpoint = read_checkpoint(store, resolve_id(store, id))
    owner = view.sessions.get(checkpoint.session)
    parts = _targets(kv, sandbox, state, checkpoint.nonce)
    wanted = {name: checkpoint.parts[name] for name in checkpoint.parts if name in parts}
    for name in parts.keys() - wanted.keys():
        raise IncompatibleError(
            f"the checkpoint has no part {name!r}", code="part-missing", object=f"checkpoint {checkpoint.id.hex()[:12]}",
            expected=f"one of {sorted(checkpoint.parts)}", found=name,
        )  # fmt: skip
    seconds = {"read": perf_counter() - started}
    prepared = prepare_parts(store, _with_parts(checkpoint, wanted), parts)
    reports = commit_parts(prepared)
    return RestoreReport(
        checkpoint=checkpoint.id.hex(),
        session=owner.name if owner is not None else checkpoint.session.hex(),
        turn=checkpoint.turn,
        mode="load",
        epoch=owner.epoch if owner is not None else 0,
        parts=reports,
        seconds={**seconds, **prepared.seconds},
        live={name: part.value if isinstance(part, StatePart) else part for name, part in parts.items()},
    )


def resolve_id(store: Store, id: str) -> bytes:
    """The manifest that a session's name (its head), a tag or a short hex id means."""
    view = store.view()
    if id in view.names:
        head = view.sessions[view.names[id]].head
        if head is not None:
            return bytes(head["manifest"])
    return store.find_manifest(id)


def _with_parts(checkpoint: Checkpoint, parts: Mapping[str, tuple[str, Ref]]) -> Checkpoint:
    from dataclasses import replace

    return replace(checkpoint, parts=parts)


def _targets(kv: Any, sandbox: Any, state: Any, nonce: bytes) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, given in named_engines(kv).items():
        parts[name] = open_sequence(given, name, nonce) if hasattr(given, "open_sequence") else given
    if sandbox is not None:
        parts["sandbox"] = as_sandbox(sandbox)
    if state is not None:
        parts["state"] = StatePart(state)
    return parts


def named_engines(kv: Any) -> dict[str, Any]:
    """``kv=`` as a map of part name to engine; raises ``IncompatibleError`` (code ``part-name``) for a name that is taken."""
    if kv is None:
        return {}
    named = dict(kv) if isinstance(kv, Mapping) else {"kv": kv}
    for name in named:
        if not isinstance(name, str) or not name or name in ("sandbox", "state"):
            raise IncompatibleError("not a name for a sequence", code="part-name", object="kv=", found=repr(name))
    return named


def open_sequence(engine: EngineLike, name: str, nonce: bytes) -> Any:
    """A new sequence; several of one session draw from nonces of their own."""
    return engine.open_sequence(nonce=nonce_of(nonce, name))


def nonce_of(nonce: bytes, name: str) -> bytes:
    """The sampling nonce of a part: the session's own for ``kv``, derived from it for others."""
    from blake3 import blake3

    return nonce if name == "kv" else blake3(nonce + name.encode(), derive_key_context="agentckpt v1 part nonce").digest(NONCE_BYTES)


def as_sandbox(sandbox: Any) -> Sandbox:
    """A ``Workspace`` on a path; anything else is a sandbox already."""
    return Workspace(sandbox) if isinstance(sandbox, str | Path) else sandbox
