"""``OSError`` of the I/O interface becomes a typed error of the store."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ..errors import AgentckptError, CapacityError, StoreError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def io_errors(what: str) -> Iterator[None]:
    """``CapacityError`` for a full disk or quota, ``StoreError`` for any other ``OSError``; typed errors pass."""
    try:
        yield
    except AgentckptError:
        raise
    except OSError as error:
        raise typed(error, what) from error


def typed(error: OSError, what: str) -> AgentckptError:
    """The typed form of an ``OSError``."""
    if error.errno in _FULL:
        return CapacityError(
            "there is no space left",
            object=what,
            code="no-space",
            hint="free some space (`agentckpt rm`, `agentckpt prune`), then try again",
        )
    name = errno.errorcode.get(error.errno or 0, "I/O error")
    return StoreError(f"I/O failed: {name} ({error.strerror or error})", object=str(error.filename or what), code="io-error")
