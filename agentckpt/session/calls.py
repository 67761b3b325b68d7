"""A call on its way: what was asked for, what is to be done about it, and the words for what went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..errors import ConflictError, DivergenceError, EffectUnknownError, IncompatibleError, ToolError
from ..ledger import Call, EffectRecord, Match
from ..types import EffectClass, Value
from .difference import first_difference
from .tools import Effect

LAZY_CLASSES: frozenset[EffectClass] = frozenset({"read", "sandbox"})
"""Their records are flushed with whatever flushes next."""

INTERRUPTIONS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)
INTERRUPTED = ("Interrupted", "the call was interrupted")

_NOWHERE: frozenset[str] = frozenset()
_inside: ContextVar[frozenset[str]] = ContextVar("agentckpt_inside_calls_of", default=_NOWHERE)
"""lineages of the sessions whose tools are running here"""


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
    deliver: bool = False
    """an equal call was made before, and its outcome could not be returned: this one gets it"""

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


def refuse_nested(invocation: Invocation) -> None:
    if _inside.get():
        raise ConflictError(
            "a tool was called by a tool", code="nested-call", object=invocation.tool,
            hint="call the function directly: the outer call is the record, and its replay would not reach the inner one",
        )  # fmt: skip


def refuse_inside(lineage: bytes, what: str) -> None:
    """For what waits for the tools under way: a tool that asked for it would wait for itself."""
    if lineage.hex() in _inside.get():
        raise ConflictError(
            "was asked for by a tool of the same session", code="nested-call", object=what, expected="the loop, between calls",
            found="a tool that is running", hint="return from the tool first",
        )  # fmt: skip


def guarded(invocation: Invocation, effect: Effect) -> Any:
    """Run the user's function so that a call from within it is noticed."""
    if invocation.is_async:
        return guarded_async(invocation, effect)
    token = _inside.set(_inside.get() | {effect.lineage})
    try:
        return invocation.invoke(effect)
    finally:
        _inside.reset(token)


async def guarded_async(invocation: Invocation, effect: Effect) -> Any:
    token = _inside.set(_inside.get() | {effect.lineage})
    try:
        return await invocation.invoke(effect)
    finally:
        _inside.reset(token)


def error_named(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)


def is_answer(error: BaseException) -> bool:
    """True if this is what the record says of the call, so that the caller has its outcome."""
    return isinstance(error, ToolError) or (isinstance(error, IncompatibleError) and error.code == "not-encodable")


def tool_error(tool: str, named: tuple[str, str]) -> ToolError:
    return ToolError(f"raised {named[0]}: {named[1]}", type_name=named[0], object=tool)


def unknown(tool: str, key: str, turn: int, why: str) -> EffectUnknownError:
    return EffectUnknownError(
        f"turn {turn}, effect {key[:12]}: {why}", object=tool, expected="a known outcome", found="unknown",
        hint=f"find out whether it happened, then `agentckpt resolve {key[:12]}`; or declare verify= on the tool",
    )  # fmt: skip


def displaced(call: Call, record: EffectRecord, load: Callable[[Value], Value]) -> DivergenceError:
    # Said before the call is dispatched: at the end of the turn the second effect would already stand beside the first.
    expected, found = f"{record.tool}", f"{call.tool}"
    if call.tool == record.tool:
        expected, found = first_difference(load(record.args), call.args)
    return DivergenceError(
        "the recovered turn calls something else", object=f"turn {call.turn}, call {call.index + 1}", expected=expected, found=found,
        hint="code between calls must be a function of state, results and model output",
    )  # fmt: skip


def post_missing(record: EffectRecord) -> EffectUnknownError:
    return EffectUnknownError(
        f"turn {record.turn}, effect {record.key[:12]}: it is done in the world, but what it did to the sandbox is not known",
        code="post-missing", object=record.tool, expected="the sandbox's post-state beside the outcome", found="none",
        hint="bring the sandbox into order by hand, then `agentckpt resolve`",
    )  # fmt: skip
