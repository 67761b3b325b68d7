"""What happens to one call: matched, or intended, dispatched and concluded.

Invariants:
1. The gate: nothing is dispatched before the previous turn's cut is published, nor after the session was closed; closing waits
   for what is under way.
2. An intent of a class that reaches the world is durable before the dispatch, and its outcome before it is returned.
3. A call whose post-state is recorded has the sandbox alone from dispatch to capture.
4. What a call gives is the decoded record, on the first run as on a replay.
5. After a crash every call follows ``ledger/table.py``; ``unknown`` is asked (``verify``) or raised, never repeated silently.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from time import perf_counter
from typing import Any

from ..errors import ConflictError, DivergenceError, EffectUnknownError
from ..handles import Handle
from ..ledger import Call, EffectRecord, Match, make_call
from .calls import (
    INTERRUPTED,
    INTERRUPTIONS,
    Begun,
    Invocation,
    Plan,
    displaced,
    error_named,
    guarded,
    is_answer,
    post_missing,
    refuse_nested,
    unknown,
)
from .cut import Cutter
from .difference import first_difference
from .live import Live
from .records import Records
from .steps import Invoke, Job, Ordered, Procedure, Wait
from .tools import Applied
from .values import to_value


class Dispatcher:
    """Calls of one session."""

    def __init__(self, live: Live, cutter: Cutter) -> None:
        self._live = live
        self._cutter = cutter
        self._records = Records(live)

    # ---- the procedure -------------------------------------------------------------------------------------------

    def plan(self, invocation: Invocation) -> Handle[Plan]:
        """Queue the match of a call now; its procedure may run later, elsewhere."""
        refuse_nested(invocation)
        return self._live.strand.submit(lambda: self._decide(invocation, False, []))

    def procedure(self, invocation: Invocation, *, begun: bool = False, planned: Handle[Plan] | None = None) -> Procedure:
        """All of one call, as steps. The value, or ``Begun`` for an adapter."""
        live = self._live
        if planned is None:
            refuse_nested(invocation)
            decided: list[Plan] = []
            try:
                plan: Plan = yield Ordered(live.strand, lambda: self._decide(invocation, begun, decided))
            except BaseException:
                for each in decided:  # interrupted while it was being decided
                    live.in_flight.leave(each.key)
                raise
        else:
            plan = planned.result()
        try:
            yield from self._pass_gate()
            live.check_open()
            if plan.match.orphan and plan.match.record is not None:
                record = plan.match.record
                yield Job(lambda: self._records.note_match(record))
            value = yield from self._follow(plan, begun)
            live.undelivered.discard(plan.key)
            return value
        except BaseException as error:
            if isinstance(error, EffectUnknownError):
                live.asked.add(plan.key.hex())
            if is_answer(error):
                live.undelivered.discard(plan.key)
            else:
                self._records.not_returned(plan)
            live.in_flight.leave(plan.key)
            raise
        finally:
            if not begun:
                live.in_flight.leave(plan.key)

    def _decide(self, invocation: Invocation, begun: bool, decided: list[Plan]) -> Plan:
        live = self._live
        live.check_open()
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
            owed = self._records.returnable.pop((call.tool, call.canonical), None)
            match = Match(owed, "record") if owed is not None else self._repeated_request(call) or live.ledger.match(call)
            if match.action == "new" and invocation.effect_class == "model":
                self._check_request(call, turn)
            if match.displaced is not None and live.on_divergence != "continue":
                raise displaced(match.call, match.displaced, self._records.load)
            live.in_flight.enter(match.call.key, begun=begun)
            decided.append(Plan(invocation, match, turn, deliver=owed is not None))
        return decided[0]

    def _repeated_request(self, call: Call) -> Match | None:
        # A model call that failed and is tried again is the same effect: one record, so that a replay sees one call.
        if call.effect_class != "model":
            return None
        before = self._records.failed_requests.pop(call.canonical, None)
        if before is None:
            return None
        return Match(call=before, action="run", layer="arguments", record=self._live.ledger.get(before.key))

    def _check_request(self, call: Call, turn: int) -> None:
        left = [record for record in self._live.ledger.unmatched if record.effect_class == "model" and record.turn == turn]
        if not left or self._live.on_divergence == "continue":
            return
        recorded = self._records.load(left[0].args)
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

    def _follow(self, plan: Plan, begun: bool) -> Generator[Any, Any, Any]:
        if plan.deliver:
            return (yield Job(lambda: self._records.deliver(plan)))
        action, record = plan.match.action, plan.match.record
        if action == "record" and record is not None:
            return (yield Job(lambda: self._records.result(plan, record, begun)))
        if action == "record-and-install" and record is not None:
            yield from self._enter_sandbox(alone=True)
            try:
                yield Job(lambda: self._records.install(record))
            finally:
                self._live.turnstile.leave()
            return (yield Job(lambda: self._records.result(plan, record, begun)))
        if action == "void" and record is not None:
            return (yield from self._run_again(plan, record, begun))
        if action == "post-missing" and record is not None:
            raise post_missing(record)
        if action == "unknown" and record is not None:
            return (yield from self._ask(plan, record, begun))
        return (yield from self._dispatch(plan, begun))

    # ---- dispatch ------------------------------------------------------------------------------------------------

    def _dispatch(self, plan: Plan, begun: bool) -> Generator[Any, Any, Any]:
        self._check_allowed(plan.invocation)
        if begun:
            yield Job(lambda: self._records.intend(plan))
            return Begun(plan, self._records.effect(plan), recorded=False)
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
            yield Job(lambda: self._records.intend(plan))
        except INTERRUPTIONS:
            # The intent stands and the tool was never called: that is known, so it is said.
            yield Job(lambda: self._records.conclude_intended(plan))
            raise
        effect = self._records.effect(plan)
        try:
            result = yield Invoke(lambda: guarded(invocation, effect), invocation.is_async)
        except Exception as error:
            raised = error
        except INTERRUPTIONS:
            yield Job(lambda: self._records.conclude(plan, "unknown", error=INTERRUPTED))
            raise
        else:
            try:
                return (yield Job(lambda: self._records.succeed(plan, result)))
            except INTERRUPTIONS:
                self._records.keep_returnable(plan)
                raise
        failure = yield Job(lambda: self._records.fail(plan, raised))
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

    # ---- after a crash -------------------------------------------------------------------------------------------

    def _run_again(self, plan: Plan, record: EffectRecord, begun: bool) -> Generator[Any, Any, Any]:
        """The class ``sandbox``: its files are gone with the crash, its words stay in the conversation."""
        if begun:
            return Begun(plan, self._records.effect(plan), recorded=False, void=True)
        found: Any = None
        yield from self._enter_sandbox(alone=False)
        try:
            result = yield Invoke(lambda: guarded(plan.invocation, self._records.effect(plan)), plan.invocation.is_async)
            found = to_value(result)
        except Exception as error:
            found = list(error_named(error))
        finally:
            self._live.turnstile.leave()
        yield Job(lambda: self._records.compare(plan, record, found))
        return (yield Job(lambda: self._records.result(plan, record, begun)))

    def _ask(self, plan: Plan, record: EffectRecord, begun: bool) -> Generator[Any, Any, Any]:
        verify = plan.invocation.verify
        if verify is None:
            raise unknown(record.tool, record.key, record.turn, "it was dispatched and its outcome is not known")
        try:
            answer = yield Invoke(lambda: verify(self._records.effect(plan)), plan.invocation.verify_is_async)
        except Exception as error:
            raise unknown(record.tool, record.key, record.turn, f"verify raised {type(error).__name__}: {error}") from error
        if answer is None:
            raise unknown(record.tool, record.key, record.turn, "verify cannot tell")
        if answer is False:
            yield Job(lambda: self._records.resolve(plan, "verified-not", None))
            plan.match = replace(plan.match, action="run", record=self._live.ledger.get(plan.key))
            return (yield from self._dispatch(plan, begun))
        value = self._records.recordable(plan, answer.value) if isinstance(answer, Applied) else None
        yield Job(lambda: self._records.resolve(plan, "verified-applied", value))
        resolved = self._live.ledger.get(plan.key) or record
        if plan.invocation.sandbox and resolved.post is None:
            raise post_missing(resolved)
        return (yield Job(lambda: self._records.result(plan, resolved, begun)))

    # ---- adapters ------------------------------------------------------------------------------------------------

    def finish(self, begun: Begun, value: Any, error: Exception | None) -> Any:
        """The outcome of a begun call, recorded; returns the decoded value or raises as a call would. Blocking."""
        if begun.recorded:
            raise ConflictError("the call has a recorded result", code="already-finished", object=begun.plan.invocation.tool)
        record = begun.plan.match.record
        try:
            if begun.void and record is not None:
                self._records.compare(begun.plan, record, to_value(value) if error is None else list(error_named(error)))
                return self._records.result(begun.plan, record, begun=False)
            if error is not None:
                raise self._records.fail(begun.plan, error) from error
            return self._records.succeed(begun.plan, value)
        finally:
            self._live.in_flight.leave(begun.plan.key)
