"""Tools: what a call may do outside, declared once beside the function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from ..types import EffectClass, Sandbox, Value

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Effect:
    """What a tool learns about its own call, in a parameter annotated ``agentckpt.Effect``."""

    key: str
    """64 hex digits; the same on every attempt: send it as the idempotency key"""
    lineage: str
    turn: int
    epoch: int
    """of the owner that dispatches: a remote side that remembers the largest one can refuse a stale worker"""
    occurrence: int = 0
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Applied:
    """A ``verify`` callback returns it to say that the effect happened, and with which result."""

    value: Any = None


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A callable and what was declared about it."""

    name: str
    function: Callable[..., Any]
    effect: EffectClass
    sandbox: bool = False
    """it reaches the sandbox as well as the world"""
    is_async: bool = False
    effect_parameter: str | None = None
    volatile: tuple[str, ...] = ()
    intent_key: Callable[..., Any] | None = None
    resources: Callable[..., Any] | None = None
    verify: Callable[..., Any] | None = None
    compensate: Callable[..., Any] | None = None
    declared: bool = True

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> BoundCall:
        """Bind by signature, defaults applied. Raises ``TypeError`` as the function itself would, and
        ``IncompatibleError`` (code ``not-encodable``) naming the argument that cannot be recorded."""
        raise RuntimeError


@dataclass(frozen=True, slots=True)
class BoundCall:
    """Arguments of one call: ``args`` as plain values for the record, and what the function itself is given."""

    spec: ToolSpec
    args: dict[str, Value]
    intent_key: Value
    resources: tuple[str, ...]

    def invoke(self, effect: Effect) -> Any:
        """Run the function: its result, or its awaitable if ``spec.is_async``. Not encoded yet: see ``to_value``."""

    def verify(self, effect: Effect) -> Any:
        """Ask ``verify`` (an awaitable if it is async): True or ``Applied(value)``, False (definitely not), None (cannot tell)."""

    def compensate(self, effect: Effect, value: Any) -> Any:
        """Undo: the callback gets the tool's arguments it names, and ``result`` if it names that."""


class Tool(Generic[P, R]):
    """A declared tool. Still callable: a direct call runs the function and records nothing."""

    spec: ToolSpec

    def __init__(self, spec: ToolSpec) -> None: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        raise RuntimeError


def tool(
    function: Callable[P, R] | None = None,
    *,
    effect: EffectClass,
    intent_key: Callable[..., Any] | None = None,
    volatile: Sequence[str] = (),
    resources: Callable[..., Any] | None = None,
    verify: Callable[..., Any] | None = None,
    compensate: Callable[..., Any] | None = None,
    sandbox: bool = False,
    name: str | None = None,
) -> Callable[[Callable[P, R]], Tool[P, R]]:
    """Declare a tool."""
    raise RuntimeError


def spec_of(function: Callable[..., Any], sandbox: Sandbox | None) -> ToolSpec:
    """The declaration of any callable: undeclared ones are ``irreversible``, with ``sandbox=True`` when there is one.

    ``sandbox.run`` has the sandbox's own effect class, ``read_file`` and ``write_file`` are of class ``sandbox``.
    """
    raise RuntimeError
