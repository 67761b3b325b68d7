"""Tools: what a call may do outside, declared once beside the function.

Invariants:
1. What is recorded of a call is a function of the call alone: arguments are bound by the signature, defaults applied, and stored
   by parameter name, so that ``f(1)``, ``f(x=1)`` and ``f(1, y=<the default>)`` are one call.
2. An argument that cannot be recorded is refused before anything is dispatched.
3. Nothing undeclared is trusted: it is ``irreversible``, and reaches the sandbox if there is one.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar, overload

from ..errors import IncompatibleError
from ..types import EFFECT_CLASSES, EffectClass, Sandbox, Value
from .values import to_value

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
    """What a ``verify`` callback returns to say that the effect happened, and with which result."""

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
        signature = _signature_of(self.function)
        parameters = [parameter for name, parameter in signature.parameters.items() if name != self.effect_parameter]
        bound = signature.replace(parameters=parameters).bind(*args, **kwargs)
        given = frozenset(bound.arguments)
        bound.apply_defaults()
        values = _recorded(self.name, bound.arguments, given)
        intent_key = None if self.intent_key is None else _call_by_name(self.intent_key, bound.arguments)
        resources = None if self.resources is None else _call_by_name(self.resources, bound.arguments)
        return BoundCall(
            spec=self,
            args=values,
            intent_key=to_value(intent_key, f"{self.name}: intent key"),
            resources=_resource_names(self.name, resources),
            arguments=dict(bound.arguments),
        )


@dataclass(frozen=True, slots=True)
class BoundCall:
    """One call: ``args`` as plain values for the record, and what the function itself is given."""

    spec: ToolSpec
    args: dict[str, Value]
    intent_key: Value
    """what the declared ``intent_key`` gives; None where none is declared: then the arguments are the intent"""
    resources: tuple[str, ...]
    arguments: dict[str, Any] = field(repr=False)
    """the arguments themselves, by parameter name, not converted"""

    def invoke(self, effect: Effect) -> Any:
        """Run the function: its result, or its awaitable if ``spec.is_async``. Not converted yet: see ``to_value``."""
        signature = _signature_of(self.spec.function)
        arguments = dict(self.arguments)
        if self.spec.effect_parameter is not None:
            arguments[self.spec.effect_parameter] = effect
        bound = inspect.BoundArguments(signature, arguments)
        return self.spec.function(*bound.args, **bound.kwargs)

    def verify(self, effect: Effect) -> Any:
        """Ask ``verify``: True or ``Applied(value)`` (it happened), False (definitely not), None (cannot tell).

        An awaitable if the callback is async. The session checks first that ``spec.verify`` is there.
        """
        assert self.spec.verify is not None
        return _call_by_name(self.spec.verify, {"effect": effect, **self.arguments})

    def compensate(self, effect: Effect, result: Any) -> Any:
        """Undo the effect: the callback gets the tool's arguments that it names, and ``result`` and ``effect`` if it names these."""
        assert self.spec.compensate is not None
        return _call_by_name(self.spec.compensate, {"effect": effect, "result": result, **self.arguments})


class Tool(Generic[P, R]):
    """A declared tool. Still callable: a direct call runs the function and records nothing."""

    def __init__(self, spec: ToolSpec) -> None:
        self.spec = spec
        functools.update_wrapper(self, spec.function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.spec.function(*args, **kwargs)  # type: ignore[no-any-return]

    @overload
    def __get__(self, instance: None, owner: type) -> Tool[P, R]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Tool[..., R]: ...

    def __get__(self, instance: object | None, owner: type) -> Tool[Any, R]:
        """A tool declared on a method is bound to its object like any function."""
        if instance is None:
            return self
        return Tool(replace(self.spec, function=types.MethodType(self.spec.function, instance)))

    def __repr__(self) -> str:
        return f"<tool {self.spec.name} ({self.spec.effect})>"


def tool(
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
    """Declare what a function does outside; sync or async.

    - ``effect``: ``read``, ``sandbox``, ``model``, ``idempotent`` (honours the key), ``compensable``, ``irreversible``, ``authority``
    - ``intent_key``: what makes two calls the same intent (payee and amount); default: all arguments but the volatile ones
    - ``volatile``: arguments that may differ between two runs of the same call (dotted names reach into maps)
    - ``resources``: names of what it changes; another call on one of them after a restore is refused
    - ``verify``: asked about an unknown effect: True or ``Applied(value)``, False (definitely not applied), None (cannot tell)
    - ``compensate``: undoes it; may also name ``result`` and ``effect``
    - ``sandbox``: it also reaches the session's sandbox
    - ``name``: what the ledger calls it; default the function's name

    ``intent_key``, ``resources``, ``verify`` and ``compensate`` get the tool's arguments by the names that they take.
    Raises ``IncompatibleError`` (code ``tool-declaration``) for names that the function does not have.
    """

    def declare(function: Callable[P, R]) -> Tool[P, R]:
        spec = ToolSpec(
            name=name or _name_of(function, qualified=False),
            function=function,
            effect=effect,
            sandbox=sandbox and effect != "sandbox",
            is_async=is_async_callable(function),
            effect_parameter=_effect_parameter(function),
            volatile=tuple(volatile),
            intent_key=intent_key,
            resources=resources,
            verify=verify,
            compensate=compensate,
        )
        _check_declaration(spec)
        return Tool(spec)

    return declare


def spec_of(function: Callable[..., Any], sandbox: Sandbox | None) -> ToolSpec:
    """The declaration of any callable: undeclared ones are ``irreversible``, with ``sandbox=True`` when there is one.

    The session's ``sandbox.run`` has the sandbox's own effect class; ``read_file`` and ``write_file`` are of class ``sandbox``.
    Raises ``IncompatibleError`` (code ``tool-declaration``) for what has no name that two runs agree on.
    """
    if isinstance(function, Tool):
        return function.spec
    method = getattr(function, "__name__", "")
    owned = sandbox is not None and getattr(function, "__self__", None) is sandbox
    if sandbox is not None and owned and method in ("run", "read_file", "write_file"):
        effect: EffectClass = sandbox.effect_class if method == "run" else "sandbox"
        return ToolSpec(f"sandbox.{method}", function, effect, sandbox=effect != "sandbox", is_async=is_async_callable(function))
    return ToolSpec(
        name=_name_of(function, qualified=True),
        function=function,
        effect="irreversible",
        sandbox=sandbox is not None,
        is_async=is_async_callable(function),
        effect_parameter=_effect_parameter(function),
        declared=False,
    )


def is_async_callable(function: Callable[..., Any]) -> bool:
    """True if calling it gives an awaitable: also behind ``functools.partial`` and decorators that keep ``__wrapped__``."""
    while isinstance(function, functools.partial):
        function = function.func
    inner = inspect.unwrap(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def _recorded(tool_name: str, arguments: Mapping[str, Any], given: frozenset[str]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, argument in arguments.items():
        try:
            values[name] = to_value(argument, f"{tool_name}: argument {name}")
        except IncompatibleError:
            # A default such as a sentinel object is part of the function, not of the call.
            if name in given:
                raise
    return values


def _resource_names(tool_name: str, found: Any) -> tuple[str, ...]:
    if found is None:
        return ()
    names = (found,) if isinstance(found, str) else tuple(found)
    for name in names:
        if not isinstance(name, str):
            _refuse(tool_name, "resources that are texts", type(name).__name__)
    return names


def _call_by_name(callback: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call with those arguments that the callback has parameters for."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, parameter in _signature_of(callback).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update({other: value for other, value in arguments.items() if other not in named})
        elif name not in arguments:
            continue
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(arguments[name])
        else:
            named[name] = arguments[name]
    return callback(*positional, **named)


def _check_declaration(spec: ToolSpec) -> None:
    if spec.effect not in EFFECT_CLASSES:
        _refuse(spec.name, f"an effect class: {', '.join(EFFECT_CLASSES)}", repr(spec.effect))
    parameters = _signature_of(spec.function).parameters
    known = set(parameters) - {spec.effect_parameter}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    strangers = {path.split(".")[0] for path in spec.volatile} - known
    if strangers and not takes_any:
        _refuse(spec.name, f"volatile names among {sorted(known)}", str(sorted(strangers)))
    extra = {"intent_key": set(), "resources": set(), "verify": {"effect"}, "compensate": {"effect", "result"}}
    for option, more in extra.items():
        callback = getattr(spec, option)
        if callback is None:
            continue
        for name, parameter in _signature_of(callback).parameters.items():
            variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if not variable and name not in known | more and parameter.default is parameter.empty:
                _refuse(spec.name, f"{option} with parameters among {sorted(known | more)}", repr(name))


def _effect_parameter(function: Callable[..., Any]) -> str | None:
    """The parameter annotated ``Effect``. Annotations that cannot be evaluated are compared by their text."""
    try:
        hints: dict[str, Any] = typing.get_type_hints(function)
    except Exception:
        hints = {}
    found = None
    for name, parameter in _signature_of(function).parameters.items():
        annotation = hints.get(name, parameter.annotation)
        if annotation is Effect or Effect in typing.get_args(annotation) or _names_effect(annotation):
            if found is not None:
                _refuse(_name_of(function, qualified=False), "one parameter annotated agentckpt.Effect", f"{found!r} and {name!r}")
            found = name
    return found


def _names_effect(annotation: Any) -> bool:
    return isinstance(annotation, str) and annotation in ("Effect", "agentckpt.Effect", "tools.Effect")


def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        _refuse(getattr(function, "__name__", repr(function)), "a function with a signature", "none", "wrap it in a function of your own")


def _name_of(function: Callable[..., Any], *, qualified: bool) -> str:
    if isinstance(function, functools.partial):
        if function.args:
            _refuse(repr(function.func), "a partial of named arguments only", "positional ones, which the record would not show")
        return _name_of(function.func, qualified=qualified)
    name = getattr(function, "__qualname__" if qualified else "__name__", None) or type(function).__name__
    if name.endswith("<lambda>"):
        _refuse("a lambda", "a tool with a name that two runs agree on", "<lambda>", "define a function, or declare it with name=...")
    return str(name)


def _refuse(name: str, expected: str, found: str, hint: str | None = None) -> NoReturn:
    raise IncompatibleError(code="tool-declaration", object=f"tool {name}", expected=expected, found=found, hint=hint)
