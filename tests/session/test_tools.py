"""Tools: what a declaration says, how a call is bound and recorded, and what undeclared callables are."""

from __future__ import annotations

import asyncio
import functools
import math
from pathlib import Path
from typing import Any

import pytest

import agentckpt.session.tools as tools
from agentckpt.errors import IncompatibleError
from agentckpt.ledger import Occurrences, make_call
from agentckpt.session.tools import Applied, Effect, Tool, is_async_callable, spec_of, tool
from agentckpt.types import EFFECT_CLASSES, EffectClass, ExecResult

EFFECT = Effect(key="ab" * 32, lineage="cd" * 16, turn=1, epoch=2)


@tool(effect="irreversible", intent_key=lambda version: version, verify=lambda version, effect: effect.key[:2] == version)
def deploy(version: str, effect: Effect, *, notes: str = "", retries: int = 3) -> str:
    return f"{version} {notes} {effect.key[:4]} {retries}"


def key_of(declared: Any, *args: Any, **kwargs: Any) -> bytes:
    spec = spec_of(declared, None)
    bound = spec.bind(args, kwargs)
    return make_call(
        occurrences=Occurrences(),
        lineage=bytes(16),
        turn=1,
        tool=spec.name,
        effect_class=spec.effect,
        args=bound.args,
        intent_key=bound.intent_key,
        volatile=spec.volatile,
        resources=bound.resources,
    ).key


def test_a_declaration_is_read_back() -> None:
    spec = spec_of(deploy, None)
    assert (spec.name, spec.effect, spec.effect_parameter, spec.is_async, spec.declared) == (
        "deploy", "irreversible", "effect", False, True,
    )  # fmt: skip
    assert deploy.__name__ == "deploy"
    assert repr(deploy) == "<tool deploy (irreversible)>"


def test_arguments_are_recorded_by_name_with_defaults_and_without_the_effect() -> None:
    bound = spec_of(deploy, None).bind(("v1",), {"notes": "n"})
    assert bound.args == {"version": "v1", "notes": "n", "retries": 3}
    assert bound.intent_key == "v1"
    assert bound.invoke(EFFECT) == "v1 n abab 3"


@tool(effect="idempotent")
def add(x: int, y: int = 1, *more: int, z: int = 0, **rest: Any) -> list[Any]:
    return [x, y, more, z, rest]


def test_equal_calls_have_equal_keys_however_they_are_written() -> None:
    assert key_of(add, 1) == key_of(add, x=1) == key_of(add, 1, 1) == key_of(add, 1, y=1, z=0)
    assert len({key_of(add, 1), key_of(add, 2), key_of(add, 1, 1, 5), key_of(add, 1, z=1), key_of(add, 1, other=1)}) == 5
    bound = spec_of(add, None).bind((1, 2, 3), {"z": 4, "w": 5})
    assert bound.args == {"x": 1, "y": 2, "more": [3], "z": 4, "rest": {"w": 5}}
    assert bound.invoke(EFFECT) == [1, 2, (3,), 4, {"w": 5}]


def test_wrong_arguments_fail_as_the_function_would() -> None:
    for args, kwargs in [((), {}), ((1,), {"x": 1})]:
        with pytest.raises(TypeError):
            spec_of(add, None).bind(args, kwargs)
    with pytest.raises(TypeError):
        spec_of(deploy, None).bind(("v1",), {"effect": EFFECT})


def test_the_tool_gets_its_own_arguments_and_the_record_plain_ones(tmp_path: Path) -> None:
    @tool(effect="irreversible")
    def describe(result: ExecResult, where: tuple[int, int]) -> str:
        return f"{type(result).__name__} {where}"

    bound = spec_of(describe, None).bind((ExecResult(0, "out", ""), (1, 2)), {})
    assert bound.args == {"result": {"exit_code": 0, "stdout": "out", "stderr": "", "timed_out": False}, "where": [1, 2]}
    assert bound.invoke(EFFECT) == "ExecResult (1, 2)"


def test_arguments_that_cannot_be_recorded_are_refused_by_name() -> None:
    with pytest.raises(IncompatibleError) as raised:
        spec_of(add, None).bind((1, math.nan), {})
    assert raised.value.code == "not-encodable"
    assert "add: argument y" in str(raised.value)


def test_a_default_that_cannot_be_recorded_is_part_of_the_function() -> None:
    sentinel = object()

    @tool(effect="read")
    def look(name: str, default: object = sentinel) -> bool:
        return default is sentinel

    bound = spec_of(look, None).bind(("a",), {})
    assert bound.args == {"name": "a"}
    assert bound.invoke(EFFECT) is True
    with pytest.raises(IncompatibleError):
        spec_of(look, None).bind(("a", sentinel), {})


def test_a_direct_call_runs_the_function() -> None:
    assert deploy("v2", EFFECT) == "v2  abab 3"
    assert add(1, 2) == [1, 2, (), 0, {}]


# ---- options ----------------------------------------------------------------------------------------------------------


def test_volatile_arguments_do_not_enter_the_key() -> None:
    @tool(effect="irreversible", volatile=("asked_at", "options.trace"))
    def send(text: str, asked_at: float, options: dict[str, Any]) -> None: ...

    first = key_of(send, "hi", 1.0, {"trace": "a", "to": "ann"})
    assert first == key_of(send, "hi", 2.0, {"trace": "b", "to": "ann"})
    assert first != key_of(send, "hi", 1.0, {"trace": "a", "to": "bob"})


def test_the_intent_key_replaces_the_arguments() -> None:
    assert key_of(deploy, "v1", notes="a") == key_of(deploy, "v1", notes="b")
    assert key_of(deploy, "v1") != key_of(deploy, "v2")


@pytest.mark.parametrize(("gives", "names"), [("r/a", ("r/a",)), (["r/a", "b"], ("r/a", "b")), (None, ()), ((), ())])
def test_resources(gives: Any, names: tuple[str, ...]) -> None:
    @tool(effect="irreversible", resources=lambda x: gives)
    def change(x: int, y: int = 0) -> None: ...

    assert spec_of(change, None).bind((1,), {}).resources == names


def test_resources_that_are_no_texts_are_refused() -> None:
    @tool(effect="irreversible", resources=lambda x: [x])
    def change(x: int) -> None: ...

    with pytest.raises(IncompatibleError) as raised:
        spec_of(change, None).bind((1,), {})
    assert raised.value.code == "tool-declaration"


def test_callbacks_get_what_they_name() -> None:
    seen: list[Any] = []

    def undo(result: Any, y: int, effect: Effect, **others: Any) -> None:
        seen.append((result, y, effect.turn, others))

    @tool(effect="compensable", compensate=undo, verify=lambda x, /: Applied(x + 1))
    def change(x: int, y: int = 7) -> None: ...

    bound = spec_of(change, None).bind((1,), {})
    assert bound.verify(EFFECT) == Applied(2)
    bound.compensate(EFFECT, "made")
    assert seen == [("made", 7, 1, {"x": 1})]
    assert spec_of(deploy, None).bind(("ab",), {}).verify(EFFECT) is True


def test_sandbox_beside_the_class_sandbox_says_nothing_more() -> None:
    @tool(effect="sandbox", sandbox=True)
    def make(x: int) -> None: ...

    @tool(effect="read", sandbox=True)
    def fetch(x: int) -> None: ...

    assert spec_of(make, None).sandbox is False
    assert spec_of(fetch, None).sandbox is True


@pytest.mark.parametrize("options", [
    {"effect": "harmless"},
    {"effect": "read", "volatile": ("z",)},
    {"effect": "read", "intent_key": lambda z: z},
    {"effect": "read", "resources": lambda result: result},
    {"effect": "read", "verify": lambda result: result},
    {"effect": "read", "compensate": lambda z: z},
    {"effect": "read", "intent_key": dict},
])  # fmt: skip
def test_declarations_that_cannot_be_right_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError) as raised:

        @tool(**options)
        def change(x: int) -> None: ...

    assert raised.value.code == "tool-declaration"
    assert ("dict" if options.get("intent_key") is dict else "change") in str(raised.value)


def test_two_effect_parameters_are_refused() -> None:
    with pytest.raises(IncompatibleError):

        @tool(effect="read")
        def change(a: Effect, b: Effect) -> None: ...


def test_effect_parameters_are_found_behind_other_spellings() -> None:
    def local_name(x: int, effect: tools.Effect) -> None: ...

    def optional(x: int, effect: Effect | None = None) -> None: ...

    def unresolvable(x: NoSuchName, effect: Effect) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    for function in (local_name, optional, unresolvable):
        assert spec_of(tool(effect="read")(function), None).effect_parameter == "effect"


# ---- methods, async ---------------------------------------------------------------------------------------------------


class Client:
    def __init__(self, name: str) -> None:
        self.name = name

    @tool(effect="irreversible", intent_key=lambda to: to)
    def send(self, to: str, effect: Effect) -> str:
        return f"{self.name} to {to} {effect.epoch}"

    async def ask(self, text: str) -> str:
        return text


def test_a_tool_may_be_a_method() -> None:
    bound = spec_of(Client("a").send, None).bind(("ann",), {})
    assert bound.args == {"to": "ann"}
    assert bound.invoke(EFFECT) == "a to ann 2"
    assert isinstance(Client.send, Tool)
    assert Client("b").send("x", effect=EFFECT) == "b to x 2"


def test_async_callables_are_recognised() -> None:
    client = Client("a")

    @functools.wraps(Client.ask)
    def wrapped(self: Client, text: str) -> Any:
        return client.ask(text)

    class Callable:
        async def __call__(self) -> None: ...

    @tool(effect="read")
    async def declared(x: int) -> int:
        return x

    assert is_async_callable(client.ask)
    assert is_async_callable(wrapped)
    assert is_async_callable(functools.partial(client.ask, text="x"))
    assert is_async_callable(Callable())
    assert not is_async_callable(deploy)
    spec = spec_of(declared, None)
    assert spec.is_async
    assert asyncio.run(spec.bind((3,), {}).invoke(EFFECT)) == 3


# ---- undeclared -------------------------------------------------------------------------------------------------------


class Box:
    """As much of a sandbox as ``spec_of`` looks at."""

    def __init__(self, effect_class: EffectClass) -> None:
        self.effect_class = effect_class

    def run(self, command: str, *, timeout_s: float = 60.0) -> ExecResult:
        return ExecResult(0, command, "")

    def read_file(self, path: str) -> bytes:
        return b""

    def write_file(self, path: str, data: bytes) -> None: ...

    def other(self) -> None: ...


def plain(x: int) -> int:
    return x


def test_undeclared_tools_are_irreversible_and_reach_the_sandbox_if_there_is_one() -> None:
    spec = spec_of(plain, None)
    assert (spec.name, spec.effect, spec.sandbox, spec.declared) == ("plain", "irreversible", False, False)
    assert spec_of(plain, Box("sandbox")).sandbox is True  # type: ignore[arg-type]


@pytest.mark.parametrize(("effect_class", "sandbox"), [("sandbox", False), ("irreversible", True)])
def test_the_sandboxs_commands_have_its_class(effect_class: EffectClass, sandbox: bool) -> None:
    box: Any = Box(effect_class)
    spec = spec_of(box.run, box)
    assert (spec.name, spec.effect, spec.sandbox) == ("sandbox.run", effect_class, sandbox)
    assert spec.bind(("ls",), {}).args == {"command": "ls", "timeout_s": 60.0}
    for method in (box.read_file, box.write_file):
        assert (spec_of(method, box).effect, spec_of(method, box).sandbox) == ("sandbox", False)
    assert spec_of(box.other, box).effect == "irreversible"
    assert spec_of(Box("sandbox").run, box).effect == "irreversible"


def test_names_that_two_runs_agree_on() -> None:
    assert spec_of(functools.partial(plain, x=1), None).name == "plain"
    assert spec_of(functools.partial(plain, x=1), None).bind((), {}).args == {"x": 1}
    assert spec_of(tool(effect="read", name="look")(lambda x: x), None).name == "look"
    for nameless in (lambda x: x, functools.partial(plain, 1)):
        with pytest.raises(IncompatibleError) as raised:
            spec_of(nameless, None)
        assert raised.value.code == "tool-declaration"


def test_every_class_can_be_declared() -> None:
    for effect_class in EFFECT_CLASSES:
        assert spec_of(tool(effect=effect_class)(plain), None).effect == effect_class
