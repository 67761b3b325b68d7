"""What happens to one call: matched, or intended, dispatched and concluded.

Invariants:
1. The gate: nothing is dispatched before the previous turn's cut is published.
2. An intent of a class that reaches the world is durable before the dispatch, and its outcome before it is returned.
3. A call whose post-state is recorded has the sandbox alone from dispatch to capture.
4. What a call gives is the decoded record, on the first run as on a replay.
5. After a crash every call follows ``ledger/table.py``; ``unknown`` is asked (``verify``) or raised, never repeated silently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from ..errors import ConflictError, DivergenceError, EffectUnknownError, IncompatibleError, NotApplied, ToolError
from ..handles import Handle
from ..ledger import Call, EffectRecord, Match, intent_body, make_call, matched_body, outcome_body, resolve_body
from ..ledger.values import load_value
from ..types import EffectClass, EffectState, Ref, Value
from .cut import Cutter
from .difference import first_difference
from .live import Difference, Live
from .steps import Invoke, Job, Ordered, Procedure, Wait
from .tools import Applied, Effect
from .values import from_value, to_value

LAZY_CLASSES: frozenset[EffectClass] = frozenset({"read", "sandbox"})
"""Their records are flushed with whatever flushes next."""

INTERRUPTIONS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)
INTERRUPTED = ("Interrupted", "the call was interrupted")

_inside_call: ContextVar[bool] = ContextVar("agentckpt_inside_call", default=False)


@dataclass(frozen=True, slots=True)
class Invocation:
    """One call as the user made it, bound and with plain arguments."""

    tool: str
    effect_class: EffectClass
    args: dict[str, Value]
    invoke: Callable[[Effect], Any]
    is_async: bool = False
    sandbox: bool = False
    """it reaches the sandbox beside its class"""
    intent_key: Value = None
    resources: tuple[str, ...] = ()
    volatile: tuple[str, ...] = ()
    verify: Callable[[Effect], Any] | None = None
    verify_is_async: bool = False

    @property
    def reaches_sandbox(self) -> bool:
        return self.sandbox or self.effect_class == "sandbox"


@dataclass(slots=True)
class Plan:
    """A call with its key, and what is to be done about it."""

    invocation: Invocation
    match: Match
    turn: int

    @property
    def call(self) -> Call:
        return self.match.call

    @property
    def key(self) -> bytes:
        return self.match.call.key


@dataclass(frozen=True, slots=True)
class Begun:
    """What ``begin`` gives an adapter: run the effect and ``finish``, or take the recorded ``value``."""

    plan: Plan
    effect: Effect
    recorded: bool
    value: Any = None
    void: bool = False
    """run it again for what it does to the sandbox; ``finish`` gives the recorded value"""

    @property
    def key(self) -> str:
        return self.effect.key


class Dispatcher:
    """Calls of one session."""

    def __init__(self, live: Live, cutter: Cutter) -> None:
        self._live = live
        self._cutter = cutter
        self._failed_requests: dict[bytes, Call] = {}

    # ---- the procedure -------------------------------------------------------------------------------------------

    def plan(self, invocation: Invocation) -> Handle[Plan]:
        """Queue the match of a call now; its procedure may run later, elsewhere."""
        _refuse_nested(invocation)
        return self._live.strand.submit(lambda: self._decide(invocation, begun=False))

    def procedure(self, invocation: Invocation, *, begun: bool = False, planned: Handle[Plan] | None = None) -> Procedure:
        """All of one call, as steps. The value, or ``Begun`` for an adapter."""
        live = self._live
        if planned is None:
            _refuse_nested(invocation)
            plan: Plan = yield Ordered(live.strand, lambda: self._decide(invocation, begun))
        else:
            plan = planned.result()
        try:
            yield from self._pass_gate()
            if plan.match.orphan and plan.match.record is not None:
                record = plan.match.record
                yield Job(lambda: self._note_match(record))
            return (yield from self._follow(plan, begun))
        except BaseException as error:
            if isinstance(error, EffectUnknownError):
                live.asked.add(plan.key.hex())
            live.in_flight.leave(plan.key)
            raise
        finally:
            if not begun:
                live.in_flight.leave(plan.key)

    def _decide(self, invocation: Invocation, begun: bool) -> Plan:
        live = self._live
        turn = live.open_turn()
        with live.lock:
            live.num_calls += 1
            call = make_call(
                occurrences=live.occurrences,
                lineage=live.lineage,
                turn=turn,
                tool=invocation.tool,
                effect_class=invocation.effect_class,
                args=invocation.args,
                sandbox=invocation.sandbox,
                intent_key=invocation.intent_key,
                volatile=invocation.volatile,
                resources=invocation.resources,
            )
            match = self._repeated_request(call) or live.ledger.match(call)
            if match.action == "new" and invocation.effect_class == "model":
                self._check_request(call, turn)
            if match.displaced is not None and live.on_divergence != "continue":
                raise _displaced(match.call, match.displaced, self._load)
            live.in_flight.enter(match.call.key, begun=begun)
        return Plan(invocation, match, turn)

    def _repeated_request(self, call: Call) -> Match | None:
        # A model call that failed and is tried again is the same effect: one record, so that a replay sees one call.
        if call.effect_class != "model":
            return None
        before = self._failed_requests.pop(call.canonical, None)
        if before is None:
            return None
        return Match(call=before, action="run", layer="arguments", record=self._live.ledger.get(before.key))

    def _check_request(self, call: Call, turn: int) -> None:
        left = [record for record in self._live.ledger.unmatched if record.effect_class == "model" and record.turn == turn]
        if not left or self._live.on_divergence == "continue":
            return
        recorded = self._load(left[0].args)
        expected, found = first_difference(recorded, call.args)
        raise DivergenceError(
            "the recovered turn asks the model something else", object=f"turn {turn}, call {self._live.num_calls}, {call.tool}",
            expected=expected, found=found, hint='the recorded request was paid for; on_divergence="continue" drops it',
        )  # fmt: skip

    def _pass_gate(self) -> Generator[Any, Any, None]:
        live = self._live
        self._cutter.raise_error()
        gate = self._cutter.gate()
        handles: list[Handle[Any]] = [] if gate is None else [gate]
        handles += [append for sequence in live.kv.values() if (append := sequence.append_waiting()) is not None]
        if not handles:
            return
        started = perf_counter()
        try:
            yield Wait(handles)
        except Exception:
            self._cutter.raise_error()  # the same error, which counts as seen now
            raise
        if gate is not None:
            self._cutter.add_exposed(perf_counter() - started)

    def _note_match(self, record: EffectRecord) -> None:
        self._live.log.append([("resolve", matched_body(record, epoch=self._live.log.epoch, turn=self._live.turn))], durable=False)

    def _follow(self, plan: Plan, begun: bool) -> Generator[Any, Any, Any]:
        action, record = plan.match.action, plan.match.record
        if action == "record" and record is not None:
            return (yield Job(lambda: self._result(plan, record, begun)))
        if action == "record-and-install" and record is not None:
            yield from self._enter_sandbox(alone=True)
            try:
                yield Job(lambda: self._install(record))
            finally:
                self._live.turnstile.leave()
            return (yield Job(lambda: self._result(plan, record, begun)))
        if action == "void" and record is not None:
            return (yield from self._run_again(plan, record, begun))
        if action == "post-missing" and record is not None:
            raise _post_missing(record)
        if action == "unknown" and record is not None:
            return (yield from self._ask(plan, record, begun))
        return (yield from self._dispatch(plan, begun))

    # ---- dispatch ------------------------------------------------------------------------------------------------

    def _dispatch(self, plan: Plan, begun: bool) -> Generator[Any, Any, Any]:
        self._check_allowed(plan.invocation)
        if begun:
            yield Job(lambda: self._intend(plan))
            return Begun(plan, self._effect(plan), recorded=False)
        if not plan.invocation.reaches_sandbox:
            return (yield from self._perform(plan))
        yield from self._enter_sandbox(alone=plan.invocation.sandbox)
        try:
            return (yield from self._perform(plan))
        finally:
            self._live.turnstile.leave()

    def _perform(self, plan: Plan) -> Generator[Any, Any, Any]:
        invocation = plan.invocation
        try:
            yield Job(lambda: self._intend(plan))
        except INTERRUPTIONS:
            # The intent stands and the tool was never called: that is known, so it is said.
            yield Job(lambda: self._conclude_intended(plan))
            raise
        effect = self._effect(plan)
        try:
            result = yield Invoke(lambda: _guarded(invocation, effect), invocation.is_async)
        except Exception as error:
            raised = error
        except INTERRUPTIONS:
            yield Job(lambda: self._conclude(plan, "unknown", error=INTERRUPTED))
            raise
        else:
            try:
                return (yield Job(lambda: self._succeed(plan, result)))
            except asyncio.CancelledError:
                self._live.undelivered.add(plan.key)
                raise
        failure = yield Job(lambda: self._fail(plan, raised))
        if failure is raised:
            raise failure
        raise failure from raised

    def _enter_sandbox(self, *, alone: bool) -> Generator[Any, Any, None]:
        ticket = self._live.turnstile.enter(alone)
        try:
            yield Wait([ticket])
        except BaseException:
            ticket._future.add_done_callback(lambda _: self._live.turnstile.leave())
            raise

    def _check_allowed(self, invocation: Invocation) -> None:
        allowed = self._live.allowed
        if allowed is not None and invocation.effect_class not in allowed:
            raise ConflictError(
                f"a branch may not have effects of class {invocation.effect_class!r}", code="effects-denied", object=invocation.tool,
                expected=f"one of {sorted(allowed)}", found=invocation.effect_class,
                hint='session.fork(n, effects="grant") or the class by name',
            )  # fmt: skip

    def _effect(self, plan: Plan) -> Effect:
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

    def _intend(self, plan: Plan) -> None:
        live = self._live
        with live.lock:
            record = live.ledger.get(plan.key)
        packed = live.log.pack(dict(plan.call.args))
        body = intent_body(plan.call, epoch=live.log.epoch, record=record, args=packed)
        durable = plan.invocation.effect_class not in LAZY_CLASSES
        live.log.append([("intent", body)], segments=True, durable=durable)

    def _succeed(self, plan: Plan, result: Any) -> Any:
        """Record the outcome; the decoded value."""
        try:
            value = self._recorded(plan, result)
            packed = self._live.log.pack(value)
        except Exception as error:
            # The effect happened, only its result cannot be kept: that is no failure of the effect.
            self._conclude(
                plan, "committed" if plan.invocation.effect_class not in (*LAZY_CLASSES, "model") else "unknown", error=_named(error)
            )
            raise
        self._conclude(plan, "committed", value=packed)
        return from_value(value)

    def _recorded(self, plan: Plan, result: Any) -> Value:
        """What may stand in the record: the result, or the handle of a secret."""
        if plan.invocation.effect_class == "authority":
            return self._live.vault.keep(plan.key.hex(), plan.invocation.tool, result)
        return to_value(result)

    def _fail(self, plan: Plan, error: Exception) -> Exception:
        """Record what was raised; what the caller gets."""
        invocation, named = plan.invocation, _named(error)
        if invocation.effect_class in LAZY_CLASSES:
            self._conclude(plan, "raised", error=named)
            return _tool_error(invocation.tool, named)
        if isinstance(error, NotApplied):
            self._conclude(plan, "failed", error=named)
            return _tool_error(invocation.tool, named)
        self._conclude(plan, "unknown", error=named)
        if invocation.effect_class == "model":
            with self._live.lock:
                self._failed_requests[plan.call.canonical] = plan.call
            return error
        return _unknown(invocation.tool, plan.key.hex(), plan.turn, f"{named[0]}: {named[1]}")

    def _conclude(self, plan: Plan, state: EffectState, *, value: Value = None, error: tuple[str, str] | None = None) -> None:
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
        late = live.log.append_outcome(body, durable=invocation.effect_class not in LAZY_CLASSES)
        live.in_flight.leave(plan.key)
        if late:
            raise ConflictError(
                "the session has a newer owner; the outcome was recorded as late", code="stale-epoch", object=live.name,
                found=f"epoch {live.log.epoch}",
            )  # fmt: skip

    def _conclude_intended(self, plan: Plan) -> None:
        with self._live.lock:
            record = self._live.ledger.get(plan.key)
        if record is not None and record.state == "intended":
            lazy = plan.invocation.effect_class in LAZY_CLASSES
            self._conclude(plan, "raised" if lazy else "failed", error=INTERRUPTED)

    def _capture_post(self) -> Ref | None:
        live = self._live
        if live.sandbox is None or not live.log.durable:
            return None
        previous = live.post or (live.head.refs.get("sandbox") if live.head else None)
        reference = live.sandbox.capture(live.store, previous).write().ref
        live.store.sync()
        live.post = reference
        return reference

    # ---- after a crash -------------------------------------------------------------------------------------------

    def _result(self, plan: Plan, record: EffectRecord, begun: bool) -> Any:
        """What the record says: its value, or its error."""
        if record.error is not None:
            if record.state == "committed":
                raise IncompatibleError(f"its result could not be recorded: {record.error[1]}", code="not-encodable", object=record.tool)
            raise _tool_error(record.tool, record.error)
        value = from_value(self._load(record.value))
        if not begun:
            return value
        self._live.in_flight.leave(plan.key)
        return Begun(plan, self._effect(plan), recorded=True, value=value)

    def _load(self, value: Value) -> Value:
        return load_value(value, self._live.store.get)

    def _install(self, record: EffectRecord) -> None:
        live = self._live
        if live.sandbox is None or record.post is None:
            raise _post_missing(record)
        live.sandbox.prepare(live.store, record.post).commit()
        live.post = record.post

    def _run_again(self, plan: Plan, record: EffectRecord, begun: bool) -> Generator[Any, Any, Any]:
        """The class ``sandbox``: its files are gone with the crash, its words stay in the conversation."""
        if begun:
            return Begun(plan, self._effect(plan), recorded=False, void=True)
        found: Any = None
        yield from self._enter_sandbox(alone=False)
        try:
            result = yield Invoke(lambda: _guarded(plan.invocation, self._effect(plan)), plan.invocation.is_async)
            found = to_value(result)
        except Exception as error:
            found = list(_named(error))
        finally:
            self._live.turnstile.leave()
        yield Job(lambda: self._compare(plan, record, found))
        return (yield Job(lambda: self._result(plan, record, begun)))

    def _compare(self, plan: Plan, record: EffectRecord, found: Any) -> None:
        recorded = list(record.error) if record.error is not None else self._load(record.value)
        if recorded != found:
            self._live.differences.append(Difference(record.key, record.tool, plan.turn, recorded, found))

    def _ask(self, plan: Plan, record: EffectRecord, begun: bool) -> Generator[Any, Any, Any]:
        verify = plan.invocation.verify
        if verify is None:
            raise _unknown(record.tool, record.key, record.turn, "it was dispatched and its outcome is not known")
        try:
            answer = yield Invoke(lambda: verify(self._effect(plan)), plan.invocation.verify_is_async)
        except Exception as error:
            raise _unknown(record.tool, record.key, record.turn, f"verify raised {type(error).__name__}: {error}") from error
        if answer is None:
            raise _unknown(record.tool, record.key, record.turn, "verify cannot tell")
        if answer is False:
            yield Job(lambda: self._resolve(plan, "verified-not", None))
            plan.match = replace(plan.match, action="run", record=self._live.ledger.get(plan.key))
            return (yield from self._dispatch(plan, begun))
        value = self._recorded(plan, answer.value) if isinstance(answer, Applied) else None
        yield Job(lambda: self._resolve(plan, "verified-applied", value))
        resolved = self._live.ledger.get(plan.key) or record
        if plan.invocation.sandbox and resolved.post is None:
            raise _post_missing(resolved)
        return (yield Job(lambda: self._result(plan, resolved, begun)))

    def _resolve(self, plan: Plan, state: EffectState, value: Value) -> None:
        live = self._live
        with live.lock:
            record = live.ledger.get(plan.key)
        if record is None:
            raise ConflictError("the effect is gone from the ledger", code="no-effect", object=plan.invocation.tool)
        packed = live.log.pack(value)
        live.log.append([("resolve", resolve_body(record, state, epoch=live.log.epoch, by="verify", value=packed))])
        with live.lock:
            live.ledger.match(plan.call)  # now it has an answer, so the record is taken

    # ---- adapters ------------------------------------------------------------------------------------------------

    def finish(self, begun: Begun, value: Any, error: Exception | None) -> Any:
        """The outcome of a begun call, recorded; returns the decoded value or raises as a call would. Blocking."""
        if begun.recorded:
            raise ConflictError("the call has a recorded result", code="already-finished", object=begun.plan.invocation.tool)
        record = begun.plan.match.record
        try:
            if begun.void and record is not None:
                self._compare(begun.plan, record, to_value(value) if error is None else list(_named(error)))
                return self._result(begun.plan, record, begun=False)
            if error is not None:
                raise self._fail(begun.plan, error) from error
            return self._succeed(begun.plan, value)
        finally:
            self._live.in_flight.leave(begun.plan.key)


def _refuse_nested(invocation: Invocation) -> None:
    if _inside_call.get():
        raise ConflictError(
            "a tool was called by a tool", code="nested-call", object=invocation.tool,
            hint="call the function directly: the outer call is the record, and its replay would not reach the inner one",
        )  # fmt: skip


def _guarded(invocation: Invocation, effect: Effect) -> Any:
    """Run the user's function so that a call from within it is noticed."""
    if invocation.is_async:
        return _guarded_async(invocation, effect)
    token = _inside_call.set(True)
    try:
        return invocation.invoke(effect)
    finally:
        _inside_call.reset(token)


async def _guarded_async(invocation: Invocation, effect: Effect) -> Any:
    token = _inside_call.set(True)
    try:
        return await invocation.invoke(effect)
    finally:
        _inside_call.reset(token)


def _named(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _tool_error(tool: str, named: tuple[str, str]) -> ToolError:
    return ToolError(f"raised {named[0]}: {named[1]}", type_name=named[0], object=tool)


def _unknown(tool: str, key: str, turn: int, why: str) -> EffectUnknownError:
    return EffectUnknownError(
        f"turn {turn}, effect {key[:12]}: {why}", object=tool, expected="a known outcome", found="unknown",
        hint=f"find out whether it happened, then `agentckpt effects resolve {key[:12]}`; or declare verify= on the tool",
    )  # fmt: skip


def _displaced(call: Call, record: EffectRecord, load: Callable[[Value], Value]) -> DivergenceError:
    # Said before the call is dispatched: at the end of the turn the second effect would already stand beside the first.
    expected, found = f"{record.tool}", f"{call.tool}"
    if call.tool == record.tool:
        expected, found = first_difference(load(record.args), call.args)
    return DivergenceError(
        "the recovered turn calls something else", object=f"turn {call.turn}, call {call.index + 1}", expected=expected, found=found,
        hint="code between calls must be a function of state, results and model output",
    )  # fmt: skip


def _post_missing(record: EffectRecord) -> EffectUnknownError:
    return EffectUnknownError(
        f"turn {record.turn}, effect {record.key[:12]}: it is done in the world, but what it did to the sandbox is not known",
        code="post-missing", object=record.tool, expected="the sandbox's post-state beside the outcome", found="none",
        hint="bring the sandbox into order by hand, then `agentckpt effects resolve`",
    )  # fmt: skip
