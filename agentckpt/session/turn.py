"""A turn, and the loop over turns.

Invariants:
1. A turn begins when the loop asks for it and ends, with a cut, when the loop asks for the next one. ``until`` is evaluated
   after each cut's instant.
2. An exception leaves the turn open: no cut, and the next run executes it again.
3. A record that nothing matched when the turn ends is a ``DivergenceError`` (or, asked for, an orphan).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar, overload

from ..errors import DivergenceError, IncompatibleError
from ..handles import Handle
from ..types import Value
from .calls import Begun, Invocation
from .cut import Cutter
from .dispatch import Dispatcher
from .executor import run, submit
from .live import Live
from .report import CheckpointInfo
from .steps import drive, drive_async
from .tools import ToolSpec, spec_of
from .values import to_value

T = TypeVar("T")


class Turn:
    """One step of the agent's loop: its tool calls and hosted model calls. Several threads and tasks may use it."""

    def __init__(self, live: Live, dispatcher: Dispatcher) -> None:
        self._live = live
        self._dispatcher = dispatcher

    @property
    def number(self) -> int:
        """1 for the first turn of a session; the number of the cut that ends it."""
        return self._live.turn

    @overload
    def call(self, tool: Callable[..., Awaitable[T]], /, *args: Any, **kwargs: Any) -> Awaitable[T]: ...
    @overload
    def call(self, tool: Callable[..., T], /, *args: Any, **kwargs: Any) -> T: ...
    def call(self, tool: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a tool, or return what the journal recorded of this call.

        A sync tool gives its value (this thread waits), an async one an awaitable. Maps come back as ``Result`` (attribute
        access), on the first run as on a replay. In a task, ``submit`` keeps a sync tool off the event loop.

        Raises ``ToolError`` (the tool raised; ``read``, ``sandbox``, or ``NotApplied``), ``EffectUnknownError``,
        ``ConflictError`` (a stale owner, a denied class, an overlap), ``DivergenceError``, and what a failed cut left behind.
        """
        spec, invocation = self._invocation(tool, args, kwargs)
        procedure = self._dispatcher.procedure(invocation)
        return drive_async(procedure) if spec.is_async else drive(procedure)

    def submit(self, tool: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Handle[Any]:
        """``call`` of a sync tool on a worker thread: for parallel calls, and for tasks. Errors as ``call``, in the handle."""
        spec, invocation = self._invocation(tool, args, kwargs)
        if spec.is_async:
            raise IncompatibleError("an async tool is awaited", code="async-tool", object=spec.name, hint="await turn.call(tool, ...)")
        planned = self._dispatcher.plan(invocation)  # now, so that calls are numbered in the order in which they were made
        return submit("tools", lambda: drive(self._dispatcher.procedure(invocation, planned=planned)))

    def generate(self, function: Callable[..., Any], /, **request: Any) -> Any:
        """Ask a hosted model: request, response and usage are recorded.

        On recovery the same request returns the recorded response and is not paid for twice; another one is a
        ``DivergenceError``. The response is a ``Result``: the plain value of what the client returned, with attribute access.
        A failed request raises what the client raised, and may be made again. Streams cannot be recorded.
        """
        target = inspect.unwrap(function)
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(target)
        name = getattr(target, "__qualname__", type(function).__name__)
        invocation = Invocation(
            tool=f"{getattr(target, '__module__', '')}.{name}",
            effect_class="model",
            args=_plain_request(request),
            invoke=lambda effect: function(**request),
            is_async=is_async,
        )
        procedure = self._dispatcher.procedure(invocation)
        return drive_async(procedure) if is_async else drive(procedure)

    def begin(self, tool: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Handle[Begun]:
        """For adapters that run the tool themselves: the intent is durable (or the call has a record) when the handle is done.

        If ``.recorded`` is false, run the effect with ``.key`` and call ``finish``; else take ``.value``.
        """
        invocation = self._invocation(tool, args, kwargs)[1]
        procedure = self._dispatcher.procedure(invocation, begun=True)
        return run("tools", lambda: drive(procedure))

    def finish(self, begun: Begun, value: Any = None, *, error: Exception | None = None) -> Handle[Any]:
        """Record the outcome of a begun call; the decoded value, or what ``call`` would raise."""
        return run("tools", lambda: self._dispatcher.finish(begun, value, error))

    def _invocation(self, tool: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ToolSpec, Invocation]:
        sandbox = self._live.sandbox
        spec = _granted(spec_of(tool, sandbox), self._live)
        bound = spec.bind(args, kwargs)
        verify = spec.verify
        return spec, Invocation(
            tool=spec.name,
            effect_class=spec.effect,
            args=bound.args,
            invoke=bound.invoke,
            is_async=spec.is_async,
            sandbox=spec.sandbox and sandbox is not None,
            intent_key=bound.intent_key,
            resources=bound.resources,
            volatile=spec.volatile,
            verify=None if verify is None else bound.verify,
            verify_is_async=inspect.iscoroutinefunction(verify),
        )


def _granted(spec: ToolSpec, live: Live) -> ToolSpec:
    """The class ``sandbox`` is granted only where the backend denies the network (or its user declared it harmless)."""
    if spec.effect != "sandbox" or (live.sandbox is not None and live.sandbox.effect_class == "sandbox"):
        return spec
    return replace(spec, effect="irreversible", sandbox=live.sandbox is not None)


def _plain_request(request: dict[str, Any]) -> dict[str, Value]:
    plain = to_value(request, "request")
    assert isinstance(plain, dict)
    return plain


class TurnEnd:
    """Closes the open turn: waits for what is under way, checks that every record was matched, and starts the cut."""

    def __init__(self, live: Live, cutter: Cutter) -> None:
        self._live = live
        self._cutter = cutter
        self.annotations: list[dict[str, Value]] = []
        self.promotions: list[Any] = []

    def close(self, message: str | None = None) -> Handle[CheckpointInfo] | None:
        """From a thread."""
        started = perf_counter()
        for future in self._live.in_flight.waiting():
            future.result()
        return self.cut(message, waited_s=perf_counter() - started)

    async def close_async(self, message: str | None = None) -> Handle[CheckpointInfo] | None:
        started = perf_counter()
        for future in self._live.in_flight.waiting():
            await asyncio.shield(asyncio.wrap_future(future))
        for sequence in self._live.kv.values():
            await sequence.quiet()
        handle = self.cut(message, waited_s=perf_counter() - started)
        await self._cutter.instant()
        return handle

    def cut(self, message: str | None = None, *, waited_s: float = 0.0) -> Handle[CheckpointInfo] | None:
        """The instant: the turn is over and its cut is on its way. None for a branch that writes nothing."""
        live = self._live
        self._check_left()
        if not live.log.durable:
            live.turn_open = False
            return None
        promotions, self.promotions = self.promotions, []
        annotations, self.annotations = self.annotations, []
        try:
            handle = self._cutter.cut(
                "promote" if promotions else "cut",
                message,
                records=[record for promotion in promotions for record in promotion.records],
                annotations=annotations,
                parents=tuple(parent for promotion in promotions for parent in promotion.parents),
            )
        except BaseException:
            self.promotions, self.annotations = [*promotions, *self.promotions], [*annotations, *self.annotations]
            raise
        live.turn_open = False
        return handle

    def _check_left(self) -> None:
        live = self._live
        segments = live.segments.left()
        with live.lock:
            left = live.ledger.unmatched
        effects = [record for record in left if record.turn == live.turn and record.key not in live.asked]
        if not segments and not effects:
            return
        if live.on_divergence == "continue":
            live.segments.drop_left()
            live.orphaned += [record for record in effects if record.key not in {known.key for known in live.orphaned}]
            return
        if segments:
            first = f"{segments[0].op}, operation {segments[0].index} of {segments[0].part}"
        else:
            first = f"call of {effects[0].tool} with {effects[0].args!r}"
        raise DivergenceError(
            "the recovered turn ended without something that it did before", object=f"turn {live.turn}",
            expected=first, found=f"the end of the turn, with {len(segments)} operations and {len(effects)} calls unmatched",
            hint='code between the calls must be a function of state, results and model output; or on_divergence="continue"',
        )  # fmt: skip


class Turns:
    """The loop: ``for turn in session.turns()`` or ``async for turn in session.turns()``."""

    def __init__(self, turn: Turn, live: Live, end: TurnEnd, check: Callable[[], None], until: Callable[[], Any] | None) -> None:
        self._turn = turn
        self._live = live
        self._end = end
        self._check = check
        self._until = until

    def __iter__(self) -> Iterator[Turn]:
        return self

    def __next__(self) -> Turn:
        self._check()
        if self._live.turn_open:
            self._end.close()
        if self._until is not None and self._until():
            raise StopIteration
        self._live.open_turn()  # ``until`` or another thread may have begun it
        return self._turn

    def __aiter__(self) -> Turns:
        return self

    async def __anext__(self) -> Turn:
        self._check()
        if self._live.turn_open:
            await self._end.close_async()
        done = self._until() if self._until is not None else False
        if inspect.isawaitable(done):
            done = await done
        if done:
            raise StopAsyncIteration
        self._live.open_turn()
        return self._turn
