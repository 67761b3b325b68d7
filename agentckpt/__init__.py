"""agentckpt: checkpoint, restore, fork and migrate LLM agents."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from .errors import NotApplied as NotApplied
    from .sandbox import Workspace as Workspace
    from .session import AppendList as AppendList
    from .session import Applied as Applied
    from .session import Effect as Effect
    from .session import Session as Session
    from .session import restore as restore
    from .session import tool as tool
    from .store import Store as Store

# Loaded when first used: `import agentckpt` costs nothing, and torch comes only with `agentckpt.engine`.
_HOMES = {
    "AppendList": "session",
    "Applied": "session",
    "Effect": "session",
    "NotApplied": "errors",
    "Session": "session",
    "Store": "store",
    "Workspace": "sandbox",
    "restore": "session",
    "tool": "session",
}

__all__ = ["AppendList", "Applied", "Effect", "NotApplied", "Session", "Store", "Workspace", "errors", "restore", "tool"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
