"""What the agent remembers beside its tokens and files, and the small decisions that are functions of text.

Nothing here knows of checkpoints: ``Agent`` is any object with ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from ..session.state import AppendList
from .tools import DEPLOYS


class Agent:
    """The loop's own state. There is no plan in it: what failed, where the search stands, what was done."""

    def __init__(self) -> None:
        self.failing: list[str] | None = None
        """units whose tests fail, the present one first; None before the tests were run"""
        self.order: list[int] = []
        """edits of the present unit, the likeliest first"""
        self.num_tried = 0
        self.closed = AppendList()
        """one map a closed bug: unit, candidates, tries, edit, digest of the ranking, and the assertion that was kept or None"""
        self.deployed: list[str] = []

    @property
    def done(self) -> bool:
        return self.failing == [] and len(self.deployed) == len(DEPLOYS)

    def state_dict(self) -> Mapping[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.failing = None if state["failing"] is None else list(state["failing"])
        self.order = list(state["order"])
        self.num_tried = state["num_tried"]
        self.closed = AppendList(state["closed"])
        self.deployed = list(state["deployed"])


def failing_units(output: str) -> list[str]:
    """The units named by the test runner's summary, sorted."""
    return sorted(set(re.findall(r"^FAILED tests/test_(\w+)\.py", output, re.MULTILINE)))


def function_at(source: str, line: int) -> str:
    """The name of the top-level function that a line (from 1) belongs to. Raises ``ValueError``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or node.lineno):
            return node.name
    raise ValueError(f"line {line} is in no function")


def checked_assertion(text: str, function: str, tests: str) -> str | None:
    """The assertion if it says something that the tests do not have yet, else None.

    Taken: ``assert f(...) == ...``, ``assert f(...)`` and ``assert not f(...)`` with literals only: a line that compares a call
    with itself would pass for every function.
    """
    line = text.strip()
    try:
        match ast.parse(line).body:
            case [ast.Assert(test=ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[right]), msg=None)]:
                said = [*call.args, right]
            case [ast.Assert(test=(ast.Call() as call) | ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call), msg=None)]:
                said = list(call.args)
            case _:
                return None
        for argument in said:
            ast.literal_eval(argument)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    good = isinstance(call.func, ast.Name) and call.func.id == function and call.args and not call.keywords
    return line if good and line not in tests else None
