"""Files and functions of the library stay short enough to be read at one go."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "agentckpt").rglob("*.py"))
MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 65


def too_long(source: str) -> list[str]:
    """The file, and the functions in it, that are over the limits."""
    num_lines = len(source.splitlines())
    found = [f"the file has {num_lines} lines"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{node.name} has {length} lines")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_can_be_read_at_one_go(path: Path) -> None:
    assert too_long(path.read_text(encoding="utf-8")) == []


def test_the_limits_would_be_noticed() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert too_long(f"def f():\n{body}") == [f"f has {MAX_FUNCTION_LINES + 1} lines"]
    assert too_long("x = 1\n" * (MAX_FILE_LINES + 1)) == [f"the file has {MAX_FILE_LINES + 1} lines"]
