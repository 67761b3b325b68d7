"""``Session``: a name over checkpoints, and the live parts that it captures.

Several threads and tasks may use one session: calls, sequence operations and cuts are ordered by its own short locks. On an
event loop's thread nothing here does I/O or waits, except where a synchronous tool is called without ``submit``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import ConflictError, IncompatibleError
from ..handles import Handle
from ..ledger import EffectRecord
from ..store import Store
from ..types import Sandbox, Value
from .calls import refuse_inside
from .dispatch import Dispatcher
from .executor import chain, on_loop_thread, run, submit
from .fork import Fork, Promotion, allowed_classes, exchange_owned, grow, release, start, take, take_over
from .live import Difference, Divergence, Live
from .opening import Durability, Opened, Options, open_session
from .report import CheckpointInfo, RestoreReport, TurnMetrics
from .sequence import Sequences
from .turn import Turn, TurnEnd, Turns
from .values import to_value


class Session:
    """An agent's session. Made by ``Session.open``; a context manager, also an asynchronous one.

    Leaving the block without an exception closes the open turn with a cut; an exception leaves the turn open, and the next
    run executes it again.
    """

    def __init__(self, options: Options | None, opened: Opened | None = None) -> None:
        """Use ``Session.open``."""
        self._options = options
        self._branches: list[Branch] = []
        self._opened: Opened | None = None
        self._given_back = False
        if opened is not None:
            self._start(opened)

    # ---- opening and closing -------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        store: str | Path | Store,
        name: str,
        *,
        kv: Any = None,
        sandbox: str | Path | Sandbox | None = None,
        state: Any = None,
        at: str | None = None,
        on_divergence: Divergence = "raise",
        durability: Durability = "commit",
        tenant: str = "local",
    ) -> Session:
        """Make a session (cut 0 is published before this returns) or restore its head.

        ``store``: a ``Store``, or a path; a store is made only in an absent or empty directory. ``kv``: an engine, or a map of
        part name to engine. ``sandbox``: a path or a ``Sandbox``. ``state``: a factory (a fork needs a second object) or an
        object with ``state_dict`` and ``load_state_dict``. ``at``: an older checkpoint of this session to roll back to: a new
        nonce, and effects later than it become ``orphans``. ``on_divergence``: what to do when a recovered turn asks for
        something else than its records. ``durability="none"`` flushes nothing.

        Inside a running event loop nothing happens before ``await`` or ``async with``; elsewhere the session is open when this
        returns. Raises ``ConflictError`` (a live owner elsewhere), ``NotFoundError``, ``IncompatibleError`` (another model, a
        missing part, a store inside the sandbox), ``CorruptionError``, ``StoreError``, ``CapacityError``.
        """
        session = cls(Options(store, name, kv, sandbox, state, at, on_divergence, durability, tenant))
        if not on_loop_thread():
            session._open_here()
        return session

    def _open_here(self) -> None:
        if self._opened is None:
            assert self._options is not None
            self._start(open_session(self._options))

    def _start(self, opened: Opened) -> None:
        self._opened = opened
        self._cutter = opened.cutter
        self._dispatcher = Dispatcher(opened.live, opened.cutter)
        self._turn = Turn(opened.live, self._dispatcher)
        self._end = TurnEnd(opened.live, opened.cutter)

    def __await__(self) -> Generator[Any, None, Self]:
        yield from submit("work", self._open_here).__await__()
        return self

    def __enter__(self) -> Self:
        self._open_here()
        return self

    async def __aenter__(self) -> Self:
        return await self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._live.turn_open:
                    self._end.close()
                self._settle()
        finally:
            self._shut()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._live.turn_open:
                    await self._end.close_async()
                await submit("turns", self._settle)
        finally:
            await self._last_calls()
            await submit("turns", self._shut)

    async def _last_calls(self) -> None:
        """On an event loop: refuse further calls, and wait for those under way without holding a worker."""
        if self._opened is not None:
            self._opened.live.closed = True
            for future in self._opened.live.in_flight.waiting():
                await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> Handle[None]:
        """Wait for the calls under way and give everything back; an open turn stays open (no cut). Idempotent."""
        self._refuse_inside("close")
        return run("turns", self._shut)

    def _settle(self) -> None:
        """Wait for the cut that is under way; raise what it ran into."""
        gate = self._cutter.gate()
        if gate is not None:
            gate.result()
        self._cutter.raise_error()

    def _shut(self) -> None:
        opened = self._opened
        if opened is None or self._given_back:
            return
        self._given_back = True
        with ExitStack() as last:  # from the end; what fails keeps nothing after it from being given back
            if opened.owns_store:
                last.callback(opened.live.store.close)
            if opened.lease is not None:
                last.callback(opened.lease.release)
            for part in opened.owned_parts:
                last.callback(part.close)
            for branch in self._branches:
                last.callback(branch.release)
            last.callback(self._cutter.wait)
            # No tool outlives the lease: another owner could restore the sandbox under it.
            opened.live.closed = True
            for future in opened.live.in_flight.waiting():
                future.result()

    @property
    def _live(self) -> Live:
        if self._opened is None:
            raise ConflictError("the session is not open yet", code="not-open", hint="await it, or use `async with`")
        return self._opened.live

    def _check(self) -> None:
        self._live.check_open()
        self._cutter.raise_error()

    # ---- what it holds -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._live.name

    @property
    def id(self) -> str:
        """32 hex digits; never reused, unlike the name."""
        return self._live.sid.hex()

    @property
    def store(self) -> Store:
        return self._live.store

    @property
    def kv(self) -> Any:
        """The live sequence, recorded; for ``kv={"planner": ...}`` a map of them."""
        kv = self._live.kv
        return kv["kv"] if set(kv) == {"kv"} else Sequences(kv)

    @property
    def sandbox(self) -> Any:
        """The ``Sandbox``. Commands run through it directly are not recorded: ``turn.call(session.sandbox.run, ...)`` does."""
        return self._live.sandbox

    @property
    def state(self) -> Any:
        """The user's object; ask for it anew after a restore or a promotion."""
        return None if self._live.state is None else self._live.state.value

    @property
    def restored(self) -> RestoreReport | None:
        """None for a session that was made by this opening."""
        return self._live.restored

    @property
    def head(self) -> str | None:
        """Id of the last published checkpoint, 64 hex digits."""
        head = self._live.head
        return None if head is None else head.manifest.hex()

    @property
    def turn_number(self) -> int:
        """The open turn, or the last one that ended; 0 before the first."""
        return self._live.turn

    @property
    def orphans(self) -> tuple[EffectRecord, ...]:
        """Effects that stand in the world although the session went back: facts that the model can be shown."""
        live = self._live
        with live.lock:
            return (*live.ledger.orphans, *live.orphaned)

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Sandbox commands that were run again after a crash and said something else than their record."""
        return tuple(self._live.differences)

    @property
    def metrics(self) -> list[TurnMetrics]:
        """What each cut cost, oldest first (the last 4096)."""
        return list(self._live.metrics)

    def effects(self) -> tuple[EffectRecord, ...]:
        """All effects of this session and, up to the fork, of its ancestors."""
        live = self._live
        with live.lock:
            return live.ledger.effects

    def reveal(self, handle: Mapping[str, Any]) -> Any:
        """The secret behind what a tool of class ``authority`` returned. It is in no record and no checkpoint: a restored session or
        a branch gets ``ConflictError`` (code ``authority-spent``; inside a tool that means *not applied*) and asks for a new grant.
        """
        return self._live.vault.reveal(handle)

    # ---- work ----------------------------------------------------------------------------------------------------

    def turns(self, until: Callable[[], Any] | None = None) -> Turns:
        """The loop: each step ends the turn before with a cut, evaluates ``until``, and begins a turn.

        What was done before the loop asked for its first turn is a turn of its own.
        """
        return Turns(self._turn, self._live, self._end, self._check, until)

    def checkpoint(self, message: str | None = None) -> Handle[CheckpointInfo]:
        """A cut now. Inside a turn the turn ends here and the next one begins: a recovered program starts its loop's body anew.

        Tools under way are waited for first; on an event loop ``state_dict()`` is then called on a worker thread.
        """
        live = self._live
        self._check_durable("checkpoint")
        self._refuse_inside("checkpoint")
        if on_loop_thread() and live.in_flight.waiting():
            return submit("turns", lambda: self._cut(message, wait=True).result())
        return self._cut(message, wait=not on_loop_thread())

    def _cut(self, message: str | None, *, wait: bool) -> Handle[CheckpointInfo]:
        live = self._live
        was_open = live.turn_open
        handle = self._end.close(message) if wait else self._end.cut(message)
        assert handle is not None
        if was_open:
            live.open_turn()
        return handle

    def annotate(self, **values: Value) -> Handle[None]:
        """Store facts beside a checkpoint: inside a turn the one that ends it, else the head."""
        self._check()
        live = self._live
        plain = to_value(values, "annotation")
        assert isinstance(plain, dict)
        if live.turn_open:
            self._end.annotations.append(plain)
            return Handle.of(None)
        gate = self._cutter.gate()
        if gate is None:
            return run("quick", lambda: self._write_note(plain))
        done: Future[None] = Future()
        gate._future.add_done_callback(lambda _: chain(submit("quick", lambda: self._write_note(plain)), done))
        return Handle(done)

    def _write_note(self, values: dict[str, Value]) -> None:
        live = self._live
        head = None if live.head is None else live.head.manifest
        live.log.append([("annotate", {"manifest": head, "values": values})])

    def fork(
        self,
        n: int,
        *,
        seeds: Sequence[int] | None = None,
        effects: str | Iterable[str] = "deny",
        durable: bool = True,
        at: str | None = None,
    ) -> Fork:
        """``n`` branches of the live parts as they stand: shared KV blocks, a copied directory, new state objects.

        ``seeds``: one number a branch, part of its nonce. ``effects``: ``"deny"``, ``"grant"`` (idempotent and compensable), or
        classes by name. ``durable=False`` writes nothing: a crash loses such branches, and the turn makes them again, with the
        same draws. ``at``: fork an older checkpoint instead.

        Raises (in the handle) ``IncompatibleError`` (no factory for the state, bad options), ``CapacityError``, ``ConflictError``.
        """
        self._check()
        self._refuse_inside("fork")
        if n < 1 or (seeds is not None and len(seeds) != n):
            raise IncompatibleError(
                "needs a seed for each branch", code="bad-option", object="fork", expected=f"{n} seeds, n >= 1", found=repr(seeds)
            )
        allowed = allowed_classes(effects)
        if not durable and allowed != allowed_classes("deny"):
            raise IncompatibleError(
                "a branch that writes nothing cannot have effects in the world: their intents would not be durable", code="bad-option",
                object="fork", expected='effects="deny"', found=repr(effects),
            )  # fmt: skip
        live = self._live
        taken = take(live, n, seeds)

        def make() -> list[Branch]:
            if durable and (gate := self._cutter.gate()) is not None:
                gate.result()
            opened = grow(live, taken, allowed=allowed, durable=durable, at=at)
            branches = [Branch(self, each, seedling.seed) for each, seedling in zip(opened, taken.seedlings, strict=True)]
            self._branches.extend(branches)
            return branches

        return Fork(start("work", make))

    def promote(self, branch: Branch) -> Handle[CheckpointInfo | None]:
        """Take over a branch: its directory, sequences, state, ledger entries and nonce; all other branches of it are released.

        Inside a turn this is durable with the turn's cut (the handle gives None); outside, with a cut at once. Raises (in the
        handle) ``ConflictError`` (not a branch of this session, released already, a call begun and not finished).
        """
        self._check()
        self._refuse_inside("promote")
        return start("turns", lambda: self._promote(branch))

    def _promote(self, branch: Branch) -> CheckpointInfo | None:
        if branch not in self._branches or branch.released:
            raise ConflictError(
                "is no live branch of this session", code="no-branch", object=f"branch {branch.name}", hint="promote before release"
            )
        promotion = take_over(self._live, self._cutter, branch._live, branch._cutter)
        assert self._opened is not None
        assert branch._opened is not None
        exchange_owned(self._opened, branch._opened)
        self._end.promotions.append(promotion)
        release([each for each in self._branches if each is not branch])
        branch.release()
        self._branches.clear()
        if self._live.turn_open:
            return None
        handle = self._end.cut()
        return None if handle is None else handle.result()

    def _refuse_inside(self, what: str) -> None:
        if self._opened is not None:
            for each in (self, *self._branches):
                refuse_inside(each._live.lineage, what)

    def _check_durable(self, what: str) -> None:
        self._check()
        if not self._live.log.durable:
            raise ConflictError(f"a branch that writes nothing has no {what}", code="not-durable", object=f"branch {self._live.name}")


class Branch(Session):
    """A fork of a session: the same surface, its own parts, and ``meta`` for what the search wants to remember."""

    def __init__(self, parent: Session, opened: Opened, seed: int | None) -> None:
        super().__init__(None, opened)
        self.parent = parent
        self.seed = seed
        self.meta: dict[str, Any] = {}

    def call(self, tool: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """``Turn.call`` outside a loop."""
        return self._turn.call(tool, *args, **kwargs)

    def submit(self, tool: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Handle[Any]:
        """``Turn.submit`` outside a loop."""
        return self._turn.submit(tool, *args, **kwargs)

    def generate(self, function: Callable[..., Any], /, **request: Any) -> Any:
        """``Turn.generate`` outside a loop."""
        return self._turn.generate(function, **request)

    @property
    def released(self) -> bool:
        return self._live.closed

    def release(self) -> None:
        """Free the live parts. Idempotent."""
        self._shut()


__all__ = ["Branch", "Promotion", "Session"]
