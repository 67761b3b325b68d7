"""``OSError`` of the I/O interface becomes a typed error of the store."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ..errors import AgentckptError, CapacityError, StoreError

_HINTS: Final = {
    errno.EROFS: "the medium is read-only: it can be listed, verified and restored from, but not written",
    errno.EACCES: "the store belongs to another user, or its mode forbids it",
    errno.EPERM: "the store belongs to another user, or its mode forbids it",
    errno.EMFILE: "too many files are open in this process (`ulimit -n`)",
}
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
    place, hint = str(error.filename or what), _HINTS.get(error.errno or 0)
    return StoreError(f"I/O failed: {name} ({error.strerror or error})", object=place, code="io-error", hint=hint)
