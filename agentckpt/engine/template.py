"""Chat templates: messages to text, exactly as transformers renders them.

A template comes with the model and is untrusted code: it runs in jinja2's immutable sandbox, sees plain values only, and can reach
neither ``dict`` nor ``namespace`` internals.

Source of the environment (flags, filters, globals, the ``generation`` tag): ``apply_chat_template`` of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import IncompatibleError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_DEPTH = 64
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""the names under which a message may carry its reasoning; templates read the first"""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it only renders its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """``dict(...)`` for templates, without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` for templates; names that begin with an underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} on a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], cache_size=0
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def plain(value: Any, depth: int = 0) -> Any:
    """A copy made of None, bool, int, float, str, list, tuple and dict only. Raises ``IncompatibleError`` for anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth > MAX_DEPTH:
        raise IncompatibleError(code="bad-message", object="chat message", expected=f"at most {MAX_DEPTH} levels", found="more")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key, depth + 1): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    raise IncompatibleError(
        code="bad-message", object="chat message", expected="text, numbers, lists and objects", found=type(value).__name__
    )


class ChatTemplate:
    """One compiled template. Thread-safe."""

    def __init__(self, text: str, special_tokens: Mapping[str, str], *, origin: str = "chat template") -> None:
        """``special_tokens``: names such as ``bos_token`` to their text. Raises ``IncompatibleError`` for an invalid template."""
        self.text = text
        self.origin = origin
        self._special = dict(special_tokens)
        if len(text) > MAX_TEMPLATE_CHARS:
            raise self._error(f"{len(text)} characters", expected=f"at most {MAX_TEMPLATE_CHARS}")
        try:
            self._template = _environment().from_string(text)
        except (jinja2.exceptions.TemplateError, RecursionError) as error:
            raise self._error(str(error), expected="a jinja template") from error

    def _error(self, found: str, *, expected: str) -> IncompatibleError:
        return IncompatibleError(code="bad-template", object=self.origin, expected=expected, found=found)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The conversation as text. ``now`` is the time that a template with ``strftime_now`` sees (default: the clock's).

        Raises ``IncompatibleError`` where the template refuses the messages.
        """
        values = {
            **self._special,
            **plain(variables or {}),
            "messages": [_with_reasoning(plain(message)) for message in messages],
            "tools": None if tools is None else plain(list(tools)),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": _clock(now),
        }
        try:
            return self._template.render(values)
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise self._error(str(error) or type(error).__name__, expected="messages that the template accepts") from error


def _clock(now: datetime | None) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        return (now or datetime.now()).strftime(form)

    return strftime_now


def _with_reasoning(message: Any) -> Any:
    """Reasoning under any of its names is offered under the one that templates read."""
    if not isinstance(message, dict):
        return message
    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
