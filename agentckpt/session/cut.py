"""The cut: one instant of all parts, written in the background, visible with one journal record.

Invariants:
1. The instant is fixed on the caller's side: ``state_dict()`` is called at once, a sequence is pinned after the operations
   queued before the cut, and the sandbox stands still: its capture holds back commands, and no tool is dispatched before the cut
   is published (the gate).
2. Cuts of one session publish in order; one is being written and at most one waits. A newer one supersedes the waiting one,
   and the handle of the superseded one says so.
3. Nothing is visible before the head record is durable; a cut that fails releases its pins and changes nothing.
4. Two flushes a cut: what the parts wrote, then the head.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from ..errors import ConflictError
from ..handles import Handle
from ..manifest import Checkpoint, CutFacts, check_cut, encode_checkpoint
from ..types import KIND_BYTE, PartRef, Pending, Ref, Value
from .executor import Watched, pool, run
from .live import Head, Live
from .report import CheckpointInfo, TurnMetrics


@dataclass(slots=True)
class Cut:
    """A cut between its instant and its publication."""

    turn: int
    reason: str
    message: str | None
    nonce: bytes
    state: Pending | None
    others: Mapping[str, Handle[Pending]]
    """sequences and sandbox: pinned on a pool thread where the caller is an event loop"""
    in_flight: tuple[bytes, ...]
    undelivered: tuple[bytes, ...]
    records: Sequence[tuple[str, Mapping[str, Any]]]
    """ledger records that become durable with this cut (promote)"""
    annotations: Sequence[Mapping[str, Value]]
    parents: tuple[bytes, ...]
    """beside the previous head: the promoted branch's checkpoint"""
    started_s: float
    pause_s: float = 0.0
    exposed_s: float = 0.0
    requested: Watched[CheckpointInfo] = field(default_factory=Watched)
    superseded: list[Cut] = field(default_factory=list)


class Cutter:
    """Cuts of one session."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._running: Cut | None = None
        self._waiting: Cut | None = None
        self._failed: Cut | None = None
        self._broken: BaseException | None = None
        self._newest: Cut | None = None

    # ---- the caller's side ---------------------------------------------------------------------------------------

    def cut(
        self,
        reason: str = "cut",
        message: str | None = None,
        *,
        records: Sequence[tuple[str, Mapping[str, Any]]] = (),
        annotations: Sequence[Mapping[str, Value]] = (),
        parents: tuple[bytes, ...] = (),
        here: bool = False,
    ) -> Handle[CheckpointInfo]:
        """Fix the instant now, write it in the background (``here``: on this thread). Never does I/O itself otherwise."""
        live = self._live
        started = perf_counter()
        refs = live.head.refs if live.head is not None else {}
        others: dict[str, Handle[Pending]] = {}
        # First what may raise in the user's code: then nothing is pinned yet.
        state = live.state.capture(live.store, refs.get("state")) if live.state is not None else None
        for name, sequence in live.kv.items():
            others[name] = sequence.capture(live.store, refs.get(name))
        if (sandbox := live.sandbox) is not None:
            previous = live.post or refs.get("sandbox")
            others["sandbox"] = run("quick", lambda: sandbox.capture(live.store, previous))
        cut = Cut(
            turn=live.turn,
            reason=reason,
            message=message,
            nonce=live.nonce,
            state=state,
            others=others,
            in_flight=live.in_flight.begun(),
            undelivered=tuple(sorted(live.undelivered)),
            records=records,
            annotations=annotations,
            parents=parents,
            started_s=started,
            pause_s=perf_counter() - started,
        )
        self._newest = cut
        if here:
            self._write_or_fail(cut)
        else:
            self._enqueue(cut)
        return cut.requested

    def _enqueue(self, cut: Cut) -> None:
        with self._lock:
            if self._running is None:
                self._running = cut
                pool("work").submit(self._work)
                return
            before, self._waiting = self._waiting, cut
            if before is None:
                return
            cut.superseded = [*before.superseded, before]
            cut.records = [*before.records, *cut.records]
            cut.annotations = [*before.annotations, *cut.annotations]
            cut.parents = (*before.parents, *cut.parents)
            cut.undelivered = tuple(sorted({*before.undelivered, *cut.undelivered}))
            cut.reason = before.reason if before.reason != "cut" else cut.reason
        _release(before)

    def gate(self) -> Handle[CheckpointInfo] | None:
        """The newest cut that is not published yet: what every dispatch waits for.

        Raises ``ConflictError`` (code ``cut-failed``) while the last cut is one that failed: the turn before this one is not
        durable, so nothing may be dispatched after it.
        """
        with self._lock:
            newest, broken = self._waiting or self._running, self._broken
        if newest is not None:
            return Handle(newest.requested._future)
        if broken is not None:
            raise ConflictError(
                f"the last cut failed: {type(broken).__name__}: {broken}", code="cut-failed", object=f"session {self._live.name}",
                hint="session.checkpoint() tries again when the cause is gone",
            ) from broken  # fmt: skip
        return None

    async def instant(self) -> None:
        """Return when every part of the newest cut is pinned. What failed there surfaces with the cut."""
        for handle in self._newest.others.values() if self._newest is not None else ():
            with suppress(Exception):
                await handle

    def add_exposed(self, seconds: float) -> None:
        """Somebody waited for the present cut."""
        with self._lock:
            if self._running is not None:
                self._running.exposed_s += seconds
            elif self._live.metrics:
                last = self._live.metrics.pop()
                self._live.metrics.append(_with_exposed(last, seconds))

    def wait(self) -> None:
        """Return when no cut is under way, however it ended. Blocking."""
        with self._idle:
            self._idle.wait_for(lambda: self._running is None)

    def raise_error(self) -> None:
        """Raise what a cut in the background ran into, once, and not if somebody saw it in the cut's own handle."""
        with self._lock:
            failed, self._failed = self._failed, None
        error = failed.requested.unseen_error() if failed is not None else None
        if error is not None:
            raise error

    # ---- the worker's side ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            cut = self._running
            assert cut is not None
            self._write_or_fail(cut)
            with self._lock:
                self._running, self._waiting = self._waiting, None
                if self._running is None:
                    self._idle.notify_all()
                    return

    def _write_or_fail(self, cut: Cut) -> None:
        try:
            info = self._publish(cut)
        except BaseException as error:
            _release(cut)
            self._live.metrics.append(_metrics(cut, {}, error))
            with self._lock:
                self._failed, self._broken = cut, error
            for each in (cut, *cut.superseded):
                each.requested._future.set_exception(error)
            return
        with self._lock:
            self._broken = None
        cut.requested._future.set_result(info)
        for each in cut.superseded:
            each.requested._future.set_result(_for_superseded(info, each.turn))

    def _publish(self, cut: Cut) -> CheckpointInfo:
        live = self._live
        parts = self._write_parts(cut)
        if cut.records:
            live.log.append(cut.records, durable=False)
        checkpoint = self._checkpoint(cut, parts)
        check_cut(checkpoint, self._facts(checkpoint, parts))
        manifest = live.store.put("manifest", encode_checkpoint(checkpoint))
        pack = live.store.sync()
        generation = 1 if live.head is None else live.head.generation + 1
        info = _info(cut, parts, manifest, generation)
        body = self._head_body(cut, info, manifest, [pack.name, pack.length] if pack is not None else None)
        notes = [("annotate", {"manifest": manifest[1:], "values": dict(values)}) for values in cut.annotations]
        live.log.append([("head", body), *notes])
        live.head = Head(bytes(manifest[1:]), generation, cut.turn, {name: part.ref for name, part in parts.items()})
        live.post = None
        live.metrics.append(_metrics(cut, parts))
        return info

    def _write_parts(self, cut: Cut) -> dict[str, PartRef]:
        written: dict[str, PartRef] = {}
        # The longest pause first: pins are given back as soon as their bytes are in the sink.
        for name, handle in cut.others.items():
            written[name] = handle.result().write()
        if cut.state is not None:
            written["state"] = cut.state.write()
        return written

    def _checkpoint(self, cut: Cut, parts: Mapping[str, PartRef]) -> Checkpoint:
        live = self._live
        previous = () if live.head is None else (live.head.manifest,)
        with live.lock:
            mark, still_open = live.ledger.mark, {bytes.fromhex(record.key) for record in live.ledger.open_effects}
        consistency = {name: str(part.facts["consistency"]) for name, part in parts.items() if part.facts.get("consistency")}
        return Checkpoint(
            session=live.sid,
            lineage=live.lineage,
            turn=cut.turn,
            parts={name: (part.kind, part.ref) for name, part in parts.items()},
            nonce=cut.nonce,
            mark=mark,
            parents=(*previous, *cut.parents),
            in_flight=tuple(sorted({*cut.in_flight, *still_open})),
            undelivered=cut.undelivered,
            consistency=consistency,
        )

    def _facts(self, checkpoint: Checkpoint, parts: Mapping[str, PartRef]) -> CutFacts:
        live = self._live
        with live.lock:
            still_open = frozenset(bytes.fromhex(record.key) for record in live.ledger.open_effects)
            known = frozenset(key for key in checkpoint.undelivered if live.ledger.get(key) is not None)
        return CutFacts(open_keys=still_open, outcome_keys=known, tokens=_lengths(parts))

    def _head_body(self, cut: Cut, info: CheckpointInfo, manifest: Ref, pack: list[Any] | None) -> dict[str, Any]:
        live = self._live
        return {
            "manifest": bytes(manifest[1:]),
            "previous": None if live.head is None else live.head.manifest,
            "epoch": live.log.epoch,
            "generation": info.generation,
            "reason": cut.reason,
            "nonce": cut.nonce,
            "message": cut.message,
            "pack": pack,
            "facts": {"turn": cut.turn, "pause_s": cut.pause_s, "parts": {name: dict(facts) for name, facts in info.parts.items()}},
        }


def _lengths(parts: Mapping[str, PartRef]) -> dict[str, tuple[int, int]]:
    """(tokens, positions with KV) of the parts that say so."""
    found = {}
    for name, part in parts.items():
        tokens, computed = part.facts.get("num_tokens"), part.facts.get("num_computed")
        if isinstance(tokens, int) and isinstance(computed, int):
            found[name] = (tokens, computed)
    return found


def _release(cut: Cut) -> None:
    """Give back the pins of a cut that will not be written (any more)."""
    for handle in cut.others.values():
        _cancel(handle)
    if cut.state is not None:
        cut.state.cancel()


def _cancel(handle: Handle[Pending]) -> None:
    def cancel(done: Future[Pending]) -> None:
        if done.exception() is None:
            done.result().cancel()

    handle._future.add_done_callback(cancel)


def _info(cut: Cut, parts: Mapping[str, PartRef], manifest: Ref, generation: int) -> CheckpointInfo:
    assert manifest[0] == KIND_BYTE["manifest"]
    return CheckpointInfo(
        id=manifest[1:].hex(),
        turn=cut.turn,
        generation=generation,
        reason=cut.reason,
        message=cut.message,
        parts={name: dict(part.facts) for name, part in parts.items()},
        pause_s=cut.pause_s,
        durable_s=perf_counter() - cut.started_s,
    )


def _for_superseded(info: CheckpointInfo, turn: int) -> CheckpointInfo:
    return CheckpointInfo(info.id, info.turn, info.generation, info.reason, info.message, info.parts, turn, info.pause_s, info.durable_s)


def _metrics(cut: Cut, parts: Mapping[str, PartRef], error: BaseException | None = None) -> TurnMetrics:
    def total(fact: str) -> int:
        numbers = [part.facts.get(fact) for part in parts.values()]
        return sum(number for number in numbers if isinstance(number, int))

    return TurnMetrics(
        turn=cut.turn,
        num_tokens=total("num_tokens"),
        logical_bytes=total("logical_bytes"),
        new_bytes=total("new_bytes"),
        pause_s=cut.pause_s,
        exposed_s=cut.exposed_s + cut.pause_s,
        durable_s=perf_counter() - cut.started_s,
        error=None if error is None else f"{type(error).__name__}: {error}",
    )


def _with_exposed(metrics: TurnMetrics, seconds: float) -> TurnMetrics:
    return replace(metrics, exposed_s=metrics.exposed_s + seconds)
