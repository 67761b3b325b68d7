"""Which paths of a workspace are left alone: neither captured, nor brought back, nor deleted.

A subset of gitignore's patterns:

- ``name``, ``*.o``: that name at any depth; ``/name`` or ``a/b``: from the root of the workspace;
- a slash at the end (``build/``) matches directories only; an ignored directory is ignored whole;
- ``*`` and ``?`` do not match a slash, ``**`` does (as a whole component), ``[abc]``, ``[a-z]``, ``[!a]`` as in a shell.

No negation, no comments, no escapes: a pattern that begins with ``!`` or holds a backslash is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ..errors import IncompatibleError
from .entries import Entry


class Ignore:
    """Compiled patterns. ``patterns`` is what was given, in order."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        rules = [_compile(pattern) for pattern in self.patterns]
        self._any = _join(text for text, directory in rules if not directory)
        self._directory = _join(text for text, _ in rules)

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def __call__(self, path: bytes, is_directory: bool) -> bool:
        """Whether ``path`` (from the workspace's root, no leading slash) is ignored; its parents are not looked at."""
        rule = self._directory if is_directory else self._any
        return rule is not None and rule.fullmatch(path) is not None

    def joined(self, patterns: Iterable[str]) -> Ignore:
        """These patterns and ``patterns``."""
        return Ignore(dict.fromkeys([*self.patterns, *patterns]))


class LinkNames:
    """First names of hard-linked files where some names are left out: the first name that is not takes the place."""

    def __init__(self, left_out: Ignore) -> None:
        self._left_out = left_out
        self._moved: dict[bytes, bytes] = {}

    def first(self, entry: Entry, path: bytes) -> bytes | None:
        """The path that ``entry`` at ``path`` is a further name of, or None if it is the first one that is brought back."""
        if entry.link is None or not self._is_left_out(entry.link):
            return entry.link
        first = self._moved.setdefault(entry.link, path)
        return None if first == path else first

    def _is_left_out(self, path: bytes) -> bool:
        parts = path.split(b"/")
        return any(self._left_out(b"/".join(parts[: index + 1]), index + 1 < len(parts)) for index in range(len(parts)))


def _join(texts: Iterable[bytes]) -> re.Pattern[bytes] | None:
    alternatives = b"|".join(b"(?:" + text + b")" for text in texts)
    return re.compile(alternatives, re.DOTALL) if alternatives else None


def _compile(pattern: str) -> tuple[bytes, bool]:
    """(regular expression, whether it is for directories only)."""
    if not pattern.strip("/") or pattern.startswith("!") or "\\" in pattern:
        raise IncompatibleError(
            "this pattern is not in the supported subset", code="ignore-pattern", object=f"ignore={pattern!r}",
            hint="no negation (!), no backslashes, not empty",
        )  # fmt: skip
    body = pattern.rstrip("/")
    anchored = "/" in body
    parts = [os.fsencode(part) for part in body.strip("/").split("/")]
    text = b"" if anchored else b"(?:.*/)?"
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == b"**":
            text += b".*" if last else b"(?:.*/)?"
        else:
            text += _component(part) + (b"" if last else b"/")
    return text, pattern.endswith("/")


def _component(part: bytes) -> bytes:
    text, index = b"", 0
    while index < len(part):
        char = part[index : index + 1]
        close = part.find(b"]", index + 2) if char == b"[" else -1
        if char == b"*":
            text += b"[^/]*"
        elif char == b"?":
            text += b"[^/]"
        elif close > 0:
            inner = part[index + 1 : close]
            negated = inner[:1] == b"!"
            inner = (inner[1:] if negated else inner).replace(b"[", b"\\[").replace(b"^", b"\\^")
            text += b"(?!/)[" + (b"^" if negated else b"") + inner + b"]"
            index = close
        else:
            text += re.escape(char)
        index += 1
    return text
