"""The records of calls, written and read: the blocking half of ``dispatch.py``, run on threads that may wait.

Invariants:
1. An intent of a class that reaches the world is durable when ``intend`` returns, and an outcome when ``conclude`` does.
2. The post-state of a call that reaches the sandbox is durable before its outcome.
3. A call whose outcome could not be written or returned is never dispatched again by an equal call: that one gets the outcome.
4. A stale owner's outcome is kept as late evidence, and the caller is told.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConflictError, IncompatibleError, NotApplied
from ..ledger import Call, EffectRecord, intent_body, matched_body, outcome_body, resolve_body
from ..ledger.values import load_value
from ..types import EffectState, Ref, Value
from .calls import INTERRUPTED, LAZY_CLASSES, Begun, Plan, error_named, post_missing, tool_error, unknown
from .live import Difference, Live
from .tools import Effect
from .values import from_value, to_value


class Records:
    """What is written and read for the calls of one session."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.failed_requests: dict[bytes, Call] = {}
        """model calls that raised, by canonical arguments: a repetition is the same effect"""
        self.returnable: dict[tuple[str, bytes], Call] = {}
        """calls with an outcome that was not returned, by tool and canonical arguments"""

    def note_match(self, record: EffectRecord) -> None:
        self._live.log.append([("resolve", matched_body(record, epoch=self._live.log.epoch, turn=self._live.turn))], durable=False)

    def effect(self, plan: Plan) -> Effect:
        live, call = self._live, plan.call
        record = plan.match.record
        return Effect(
            key=call.key.hex(),
            lineage=live.lineage.hex(),
            turn=plan.turn,
            epoch=live.log.epoch,
            occurrence=call.occurrence,
            attempt=1 if record is None else record.num_dispatches + 1,
        )

    def intend(self, plan: Plan) -> None:
        live = self._live
        with live.lock:
            record = live.ledger.get(plan.key)
        packed = live.log.pack(dict(plan.call.args))
        body = intent_body(plan.call, epoch=live.log.epoch, record=record, args=packed)
        durable = plan.invocation.effect_class not in LAZY_CLASSES
        live.log.append([("intent", body)], segments=True, durable=durable)

    def succeed(self, plan: Plan, result: Any) -> Any:
        """Record the outcome; the decoded value."""
        try:
            value = self.recordable(plan, result)
            packed = self._live.log.pack(value)
        except Exception as error:
            # The effect happened, only its result cannot be kept: that is no failure of the effect.
            self.conclude(
                plan, "committed" if plan.invocation.effect_class not in (*LAZY_CLASSES, "model") else "unknown", error=error_named(error)
            )
            raise
        self.conclude(plan, "committed", value=packed)
        return from_value(value)

    def recordable(self, plan: Plan, result: Any) -> Value:
        """What may stand in the record: the result, or the handle of a secret."""
        if plan.invocation.effect_class == "authority":
            return self._live.vault.keep(plan.key.hex(), plan.invocation.tool, result)
        return to_value(result)

    def fail(self, plan: Plan, error: Exception) -> Exception:
        """Record what was raised; what the caller gets."""
        invocation, named = plan.invocation, error_named(error)
        if invocation.effect_class in LAZY_CLASSES:
            self.conclude(plan, "raised", error=named)
            return tool_error(invocation.tool, named)
        if isinstance(error, NotApplied):
            self.conclude(plan, "failed", error=named)
            return tool_error(invocation.tool, named)
        self.conclude(plan, "unknown", error=named)
        if invocation.effect_class == "model":
            with self._live.lock:
                self.failed_requests[plan.call.canonical] = plan.call
            return error
        return unknown(invocation.tool, plan.key.hex(), plan.turn, f"{named[0]}: {named[1]}")

    def conclude(self, plan: Plan, state: EffectState, *, value: Value = None, error: tuple[str, str] | None = None) -> None:
        live, invocation = self._live, plan.invocation
        if invocation.effect_class in LAZY_CLASSES and state == "unknown":
            state = "raised"
        post = (
            self._capture_post()
            if invocation.sandbox and state in ("committed", "raised", "failed") and invocation.effect_class != "sandbox"
            else None
        )
        with live.lock:
            record = live.ledger.get(plan.key)
        body = outcome_body(plan.key, state, epoch=live.log.epoch, value=value, error=error, post=post, record=record)
        try:
            late = live.log.append_outcome(body, durable=invocation.effect_class not in LAZY_CLASSES)
        except Exception:
            self.keep_returnable(plan)
            raise
        finally:
            live.in_flight.leave(plan.key)
        if late:
            raise ConflictError(
                "the session has a newer owner; the outcome was recorded as late", code="stale-epoch", object=live.name,
                found=f"epoch {live.log.epoch}",
            )  # fmt: skip

    def keep_returnable(self, plan: Plan) -> None:
        """The effect happened and the caller does not know its outcome: an equal call must not have it happen again."""
        if plan.invocation.effect_class in LAZY_CLASSES:
            return
        with self._live.lock:
            self.returnable[plan.invocation.tool, plan.call.canonical] = plan.call
            self._live.undelivered.add(plan.key)

    def not_returned(self, plan: Plan) -> None:
        """Something came between a record and its caller: the next equal call gets it."""
        if plan.deliver:
            self.keep_returnable(plan)
        elif plan.match.record is not None:
            with self._live.lock:
                self._live.ledger.give_back(plan.key)

    def deliver(self, plan: Plan) -> Any:
        """The outcome that an equal call before could not be given."""
        live = self._live
        try:
            live.log.append([])  # what is owed to the journal comes first
        except Exception:
            self.keep_returnable(plan)
            raise
        record = live.ledger.get(plan.key)
        if record is None or not record.finished:
            raise unknown(plan.invocation.tool, plan.key.hex(), plan.turn, "its outcome was lost")
        return self.result(plan, record, begun=False)

    def conclude_intended(self, plan: Plan) -> None:
        with self._live.lock:
            record = self._live.ledger.get(plan.key)
        if record is not None and record.state == "intended":
            lazy = plan.invocation.effect_class in LAZY_CLASSES
            self.conclude(plan, "raised" if lazy else "failed", error=INTERRUPTED)

    def _capture_post(self) -> Ref | None:
        live = self._live
        if live.sandbox is None or not live.log.durable:
            return None
        previous = live.post or (live.head.refs.get("sandbox") if live.head else None)
        reference = live.sandbox.capture(live.store, previous).write().ref
        live.store.sync()
        live.post = reference
        return reference

    def result(self, plan: Plan, record: EffectRecord, begun: bool) -> Any:
        """What the record says: its value, or its error."""
        if record.error is not None:
            if record.state == "committed":
                raise IncompatibleError(f"its result could not be recorded: {record.error[1]}", code="not-encodable", object=record.tool)
            raise tool_error(record.tool, record.error)
        value = from_value(self.load(record.value))
        if not begun:
            return value
        self._live.in_flight.leave(plan.key)
        return Begun(plan, self.effect(plan), recorded=True, value=value)

    def load(self, value: Value) -> Value:
        return load_value(value, self._live.store.get)

    def install(self, record: EffectRecord) -> None:
        live = self._live
        if live.sandbox is None or record.post is None:
            raise post_missing(record)
        live.sandbox.prepare(live.store, record.post).commit()
        live.post = record.post

    def compare(self, plan: Plan, record: EffectRecord, found: Any) -> None:
        recorded = list(record.error) if record.error is not None else self.load(record.value)
        if recorded != found:
            self._live.differences.append(Difference(record.key, record.tool, plan.turn, recorded, found))

    def resolve(self, plan: Plan, state: EffectState, value: Value) -> None:
        live = self._live
        with live.lock:
            record = live.ledger.get(plan.key)
        if record is None:
            raise ConflictError("the effect is gone from the ledger", code="no-effect", object=plan.invocation.tool)
        packed = live.log.pack(value)
        live.log.append([("resolve", resolve_body(record, state, epoch=live.log.epoch, by="verify", value=packed))])
        with live.lock:
            live.ledger.match(plan.call)  # now it has an answer, so the record is taken
