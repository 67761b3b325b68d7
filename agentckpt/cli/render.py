"""Values to text: the only module that knows terminals, colours, units and columns."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from ..errors import AgentckptError

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Screen:
    """Where a command prints. Text from a store is escaped: it may hold terminal control sequences."""

    def __init__(self, out: TextIO, err: TextIO, *, json: bool = False, quiet: bool = False, color: bool = False) -> None:
        self.out, self.err, self.json, self.quiet, self.color = out, err, json, quiet, color

    def line(self, text: str = "") -> None:
        print(text, file=self.out)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=self.err)

    def style(self, text: str, name: str) -> str:
        return f"\x1b[{STYLES[name]}m{text}\x1b[0m" if self.color else text

    def error(self, error: AgentckptError) -> None:
        if self.json:
            facts = {"error": error.code, "message": str(error), "object": error.object, "expected": error.expected,
                     "found": error.found, "hint": error.hint, "exit_code": error.exit_code}  # fmt: skip
            print(json.dumps(facts), file=self.err)
            return
        print(f"error: {clean(str(error))}", file=self.err)
        if error.hint:
            print(f"\nhint: {clean(error.hint)}", file=self.err)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> None:
        """Aligned columns without borders; columns in ``right`` are numbers."""
        body = [[clean(cell) for cell in row] for row in rows]
        widths = [max(len(row[i]) for row in [list(header), *body]) for i in range(len(header))]
        flush = set(right)
        for number, row in enumerate([list(header), *body]):
            cells = [cell.rjust(w) if i in flush else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
            text = "  ".join(cells).rstrip()
            self.line(self.style(text, "dim") if number == 0 else text)


def clean(text: str) -> str:
    """Control characters made visible, so that stored text cannot drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def size(num_bytes: float) -> str:
    """Bytes in binary units with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def ago(when_s: float | None, now_s: float | None = None) -> str:
    """A time as distance from now."""
    if not when_s:
        return "-"
    gone = max(0.0, (now_s if now_s is not None else time.time()) - when_s)
    for limit, step, unit in ((90, 1, "s"), (90 * 60, 60, "min"), (36 * 3600, 3600, "h")):
        if gone < limit:
            return f"{gone / step:.0f} {unit} ago"
    return f"{gone / 86400:.0f} days ago"


def short(identity: bytes | str | None, length: int = 8) -> str:
    if identity is None:
        return "-"
    return (identity.hex() if isinstance(identity, bytes) else identity)[:length]


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def to_plain(value: Any) -> Any:
    """Dataclasses, bytes and tuples as what JSON knows; bytes become hex."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "exit_code"}
    if isinstance(value, Mapping):
        return {key.hex() if isinstance(key, bytes) else str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value
