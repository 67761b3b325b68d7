"""The ``state`` part: whatever the user's object gives as ``state_dict()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..types import Pending, Ref, Sink, Source, Staged, Stateful

StateLike = Stateful | Callable[[], Stateful]


class AppendList(Sequence[Any]):
    """A list that only grows (or is cleared): it costs a checkpoint what was appended.

    Items are JSON's values plus bytes, dataclasses and tuples converted by ``to_value``; what is read back cannot be changed.
    """

    def __init__(self, items: Iterable[Any] = ()) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Iterable[Any]) -> None: ...

    def clear(self) -> None: ...

    def copy(self) -> AppendList: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...


class StatePart:
    """Kind ``state``: wraps one ``Stateful`` object, or a factory of them (a fork needs a second object)."""

    kind = "state"

    def __init__(self, state: StateLike) -> None:
        """``state``: an object with ``state_dict`` and ``load_state_dict``, or a class or function that makes one."""

    @property
    def value(self) -> Any:
        """The live object (``session.state``). A restore with a factory replaces it, so do not keep it."""

    def capture(self, sink: Sink, previous: Ref | None) -> Pending:
        """Calls ``state_dict()`` and freezes what it gives, now; encodes in ``Pending.write``.

        Raises ``IncompatibleError`` (code ``not-encodable``) naming the path of a value that cannot be stored.
        """
        raise RuntimeError

    def prepare(self, source: Source, ref: Ref) -> Staged:
        """Read and check the state; ``commit`` loads it into the object, or into a new one from the factory."""
        raise RuntimeError

    def fork(self, n: int) -> Sequence[StatePart]:
        """``n`` parts on new objects from the factory. Raises ``IncompatibleError`` (code ``no-factory``) without one."""
        raise RuntimeError

    def close(self) -> None: ...
