"""Sessions: the only composer of store, ledger, manifest, sandbox and engine.

Read ``session.py`` (the surface), then ``turn.py``, ``dispatch.py`` (one call), ``cut.py`` (one checkpoint), ``opening.py``
(recovery), ``fork.py``.
"""

from __future__ import annotations

from .appendlist import AppendList
from .calls import Begun
from .live import Difference
from .report import CheckpointInfo, RestoreReport, TurnMetrics
from .restore import restore
from .session import Branch, Session
from .tools import Applied, Effect, Tool, tool
from .turn import Turn
from .values import Result

__all__ = [
    "AppendList",
    "Applied",
    "Begun",
    "Branch",
    "CheckpointInfo",
    "Difference",
    "Effect",
    "RestoreReport",
    "Result",
    "Session",
    "Tool",
    "Turn",
    "TurnMetrics",
    "restore",
    "tool",
]
