"""Messages to ids: what a chat template's rendering adds to a text that is already there.

A conversation is a list of (role, first position, content). Ids that stand in the sequence are never tokenised again: the
rendering of the whole conversation must begin with their text, and only what follows is tokenised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..errors import IncompatibleError
from ..kv.capture import Message
from ..nodes import encode


class ChatTokenizer(Protocol):
    """What is needed of ``Tokenizer``."""

    eos_ids: frozenset[int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...
    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str: ...


def extend(
    tokenizer: ChatTokenizer, tokens: Sequence[int], messages: Sequence[Message], added: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[Message]]:
    """The ids that ``added`` messages append to ``tokens``, and the whole conversation after that.

    What was written since the last message became part of the tokens is taken as the assistant's message. Raises
    ``IncompatibleError`` if the template's rendering does not begin with the text that is there.
    """
    for message in added:
        _check(message)
    base = messages[0][1] if messages else len(tokens)
    present = tokenizer.decode(tokens[base:])
    for before in _readings(tokenizer, tokens, messages, base, present):
        full = tokenizer.render([*map(as_mapping, before), *added], add_generation_prompt=True)
        if full.startswith(present):
            return _suffix(tokenizer, before, added, full, len(present), len(tokens))
    raise IncompatibleError(
        "the chat template's rendering does not begin with the text that is there", code="not-a-suffix", object="message",
        expected="a template that only adds", found="a template that rewrites earlier text",
        hint="append several messages as one list, or append text or ids instead",
    )  # fmt: skip


def as_mapping(message: Message) -> dict[str, Any]:
    """The message as the template sees it."""
    role, _, content = message
    return {"role": role, **content} if isinstance(content, dict) else {"role": role, "content": content}


def as_message(message: Mapping[str, Any], position: int) -> Message:
    """(role, position, content); content is a map of all other keys if there are others than ``content``."""
    others = {key: value for key, value in message.items() if key != "role"}
    plain = others.keys() == {"content"} and not isinstance(others["content"], dict)
    return (message["role"], position, others["content"] if plain else others)


def _check(message: Mapping[str, Any]) -> None:
    if not isinstance(message.get("role"), str):
        raise IncompatibleError(object="message", expected="a role", found=", ".join(map(str, message)), code="bad-message")
    encode(dict(message))  # raises where it could not be stored


def _readings(
    tokenizer: ChatTokenizer, tokens: Sequence[int], messages: Sequence[Message], base: int, present: str
) -> Iterator[list[Message]]:
    """Conversations that the present text may be a rendering of, likeliest first."""
    known = list(messages)
    if not known:
        yield []
        return
    while known:
        shown = [as_mapping(message) for message in known]
        prompt = tokenizer.render(shown, add_generation_prompt=True)
        if present.startswith(prompt):
            written = present[len(prompt) :]
            reply = ("assistant", _position(tokenizer, tokens, base, prompt), _less_eos(tokenizer, written))
            yield [*known, reply] if written else known
        whole = tokenizer.render(shown, add_generation_prompt=False).rstrip()
        if len(known) == len(messages) and present.startswith(whole):
            yield known  # cut where the next message began
        if known.pop()[0] != "assistant":
            return


def _less_eos(tokenizer: ChatTokenizer, text: str) -> str:
    for id in tokenizer.eos_ids:
        ending = tokenizer.token_bytes(id).decode("utf-8", "replace")
        if ending and text.endswith(ending):
            return text[: -len(ending)]
    return text


def _position(tokenizer: ChatTokenizer, tokens: Sequence[int], base: int, prompt: str) -> int:
    """The first position after ``prompt``, which starts at ``base``."""
    left = len(prompt.encode("utf-8", "surrogatepass"))
    position = base
    while left > 0 and position < len(tokens):
        left -= len(tokenizer.token_bytes(tokens[position]))
        position += 1
    return position


def _suffix(
    tokenizer: ChatTokenizer, before: list[Message], added: Sequence[Mapping[str, Any]], full: str, start: int, length: int
) -> tuple[list[int], list[Message]]:
    text = full[start:]
    conversation = list(before)
    for index, message in enumerate(added):
        position = length
        if index:
            rendered = tokenizer.render([*map(as_mapping, before), *added[:index]], add_generation_prompt=False)
            if full.startswith(rendered):
                position += len(tokenizer.encode(text[: max(0, len(rendered) - start)]))
        conversation.append(as_message(message, position))
    return tokenizer.encode(text), conversation
