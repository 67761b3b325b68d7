"""Results of ``authority`` effects (tokens, credentials): the record holds a handle, the secret stays in this process.

Invariants:
1. A secret never enters a record, a state or an error; the handle says which effect gave it and nothing else.
2. A secret is there only for the session, in the process, that got it. For a restored session and for every branch the grant is
   spent: a one-time token may have been used, and two holders of one credential cannot be told apart.
3. A spent handle is a definite failure of whoever asks: nothing was dispatched with it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

from ..errors import ConflictError, IncompatibleError, NotApplied
from ..types import Value

HANDLE_FIELD: Final = "$authority"


class SpentError(ConflictError, NotApplied):
    """The grant behind a handle is not this session's any more. Raised inside a tool it means *not applied*."""

    default_code = "authority-spent"


def authority_handle(key: str, tool: str) -> dict[str, Value]:
    """What stands in a record, and what the program gets, in place of the result of an ``authority`` effect."""
    return {"tool": tool, HANDLE_FIELD: key}


class Vault:
    """The secrets of one session in one process. Thread-safe. Never copied, pickled or printed."""

    def __init__(self) -> None:
        self._secrets: dict[str, Any] = {}
        self._lock = threading.Lock()

    def keep(self, key: str, tool: str, secret: Any) -> dict[str, Value]:
        """Hold what the tool returned; its handle."""
        with self._lock:
            self._secrets[key] = secret
        return authority_handle(key, tool)

    def reveal(self, handle: Mapping[str, Any]) -> Any:
        """What the tool returned. Raises ``SpentError`` (a ``ConflictError``, code ``authority-spent``), ``IncompatibleError``."""
        key = handle.get(HANDLE_FIELD) if isinstance(handle, Mapping) else None
        if not isinstance(key, str):
            raise IncompatibleError(
                code="no-handle", object="authority handle", expected="what an authority tool returned", found=type(handle).__name__
            )
        with self._lock:
            if key in self._secrets:
                return self._secrets[key]
        raise SpentError(
            "the grant belongs to another run or branch", object=f"authority {handle.get('tool')} {key[:12]}",
            expected="a grant of this session in this process", found="a handle whose secret is gone", hint="ask for a new grant",
        )  # fmt: skip

    def take_over(self, other: Vault) -> None:
        """Promote: the branch's grants become this session's, and are spent for the branch."""
        with other._lock:
            moved, other._secrets = other._secrets, {}
        with self._lock:
            self._secrets.update(moved)

    def __repr__(self) -> str:
        return f"<vault of {len(self._secrets)} secrets>"

    def __reduce__(self) -> str:
        raise TypeError("a vault stays in its process")
