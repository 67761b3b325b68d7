"""Values of the world outside as plain values, and back: what a record can hold."""

from __future__ import annotations

from typing import Any

from ..types import Value


class Result(dict[str, Any]):
    """A recorded map with attribute access: ``turn.call(session.sandbox.run, ...).exit_code``.

    The first run and a replay both return it, so that code behind them sees one type.
    """


def to_value(item: Any, path: str = "value") -> Value:
    """A fresh plain copy: equal to what decoding its encoding gives.

    Tuples become lists, maps with text keys become dicts, dataclasses and pydantic models the dict of their fields, buffers bytes.
    Raises ``IncompatibleError`` (code ``not-encodable``) with the path of what cannot be stored (NaN, sets, objects, cycles).
    """
    raise RuntimeError


def from_value(value: Value) -> Any:
    """What user code gets for a recorded value: maps as ``Result``, all else as it is."""
