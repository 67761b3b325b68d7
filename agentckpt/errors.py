"""The exceptions of agentckpt.

The class says what a handler would do, ``.code`` says exactly what happened.

    AgentckptError
    |-- NotFoundError        (LookupError)   no such store, session, checkpoint, object      exit 10
    |-- AmbiguousIdError     (ValueError)    a short id that fits several checkpoints        exit 2
    |-- ConflictError        (RuntimeError)  a live owner elsewhere, a moved head            exit 11
    |-- IncompatibleError    (ValueError)    another model, a newer format                   exit 13
    |-- CorruptionError      (ValueError)    bytes that are not what their name says         exit 12
    |-- CapacityError        (OSError)       disk, quota or KV pool is full                  exit 1
    |-- EffectUnknownError   (RuntimeError)  an effect may or may not have happened          exit 14
    |-- DivergenceError      (RuntimeError)  a recovered turn did something else             exit 1
    |-- ToolError            (RuntimeError)  a tool raised; the record says what             exit 1
    `-- StoreError           (OSError)       the store could not be read or written          exit 1

``NotApplied`` is raised *by* a tool to say that its effect definitely did not happen.
"""

from __future__ import annotations


class AgentckptError(Exception):
    """Base of every error raised on purpose.

    ``str()`` gives one line: object, what was expected, what was found. ``hint`` is what to do next.
    """

    exit_code = 1
    default_code = "error"

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        object: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        facts = [f"expected {expected}"] * (expected is not None) + [f"found {found}"] * (found is not None)
        head = ": ".join(text for text in (object, message) if text)
        self.message = "; ".join([head, *facts] if head else facts)
        super().__init__(self.message)
        self.code = code or self.default_code
        self.object = object
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


def _rebuild(cls: type[AgentckptError], message: str, state: dict[str, object]) -> AgentckptError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class NotFoundError(AgentckptError, LookupError):
    """There is no such store, session, checkpoint, part, path or object."""

    exit_code = 10
    default_code = "not-found"


class AmbiguousIdError(AgentckptError, ValueError):
    """A short id or a name that fits more than one object."""

    exit_code = 2
    default_code = "ambiguous-id"


class ConflictError(AgentckptError, RuntimeError):
    """Somebody else owns the session, or its head moved in between."""

    exit_code = 11
    default_code = "conflict"


class IncompatibleError(AgentckptError, ValueError):
    """Sound data that this model, engine or version cannot use."""

    exit_code = 13
    default_code = "incompatible"


class CorruptionError(AgentckptError, ValueError):
    """Bytes that do not match their name, length or checksum."""

    exit_code = 12
    default_code = "corrupt"


class CapacityError(AgentckptError, OSError):
    """Disk, quota, or the engine's KV pool is full."""

    default_code = "capacity"


class EffectUnknownError(AgentckptError, RuntimeError):
    """An effect was dispatched and its outcome is not known; it is not repeated."""

    exit_code = 14
    default_code = "effect-unknown"


class DivergenceError(AgentckptError, RuntimeError):
    """A recovered turn asked for something other than what the journal recorded."""

    default_code = "divergence"


class ToolError(AgentckptError, RuntimeError):
    """A tool raised. ``type_name`` is the name of the original exception's class."""

    default_code = "tool"

    def __init__(self, message: str = "", *, type_name: str = "Exception", **kwargs: str | None) -> None:
        super().__init__(message, **kwargs)
        self.type_name = type_name


class StoreError(AgentckptError, OSError):
    """The store could not be read or written (I/O error, not a store, read-only)."""

    default_code = "store"


class NotApplied(Exception):
    """Raised by a tool: the effect definitely did not happen, so it is ``failed`` and not ``unknown``."""


EXIT_CODES: dict[int, str] = {
    0: "ok",
    1: "failed",
    2: "usage",
    3: "done but incomplete (KV recomputed)",
    10: "not found",
    11: "conflict",
    12: "corrupt",
    13: "incompatible",
    14: "effect outcome unknown",
    130: "interrupted",
}
