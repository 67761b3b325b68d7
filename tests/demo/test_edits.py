"""The enumeration is whole, blind to the planted bug, and touches one line; every planted bug is one edit away."""

from __future__ import annotations

import pytest

from agentckpt.demo.catalogue import CATALOGUE, Unit
from agentckpt.demo.edits import enumerate_edits


def texts(source: str) -> set[str]:
    return {edit.text for edit in enumerate_edits(source)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a < b", "a <= b"),
        ("a and b or not a", "a or b or not a"),
        ("a and b or not a", "a and b or a"),
        ("a + b", "a // b"),
        ("a - b", "b - a"),
        ("(a + 1) - b", "(a + 2) - b"),
        ("max(a, b)", "min(a, b)"),
        ("divmod(a, b)", "divmod(b, a)"),
        ("a[b]", "a[b - 1]"),
        ("a[3]", "a[2]"),
        ("a in b", "a not in b"),
        ("a is not None", "a is None"),
        ("-a", "a"),
        ("range(a)", "range(a + 1)"),
        ("True", "False"),
        ("a / 2", "a // 2"),
        ("(a) < (b)", "(a) >= (b)"),
    ],
)
def test_each_kind_of_edit_is_made(before: str, after: str) -> None:
    frame = 'def f(a, b):\n    """Doc 1."""\n    return {}\n'
    assert frame.format(after) in texts(frame.format(before))


def test_the_docstring_is_left_alone() -> None:
    assert texts('def f(a):\n    """Add 1 < 2."""\n    return a\n') == set()


@pytest.mark.parametrize("unit", CATALOGUE, ids=lambda u: u.name)
def test_every_planted_bug_is_one_edit_away(unit: Unit) -> None:
    edits = enumerate_edits(unit.buggy)
    assert unit.source in {edit.text for edit in edits}
    assert len({edit.text for edit in edits}) == len(edits)
    assert unit.buggy not in {edit.text for edit in edits}
    assert len(edits) >= 10


@pytest.mark.parametrize("unit", CATALOGUE, ids=lambda u: u.name)
def test_an_edit_changes_the_line_that_it_names(unit: Unit) -> None:
    before = unit.buggy.split("\n")
    for edit in enumerate_edits(unit.buggy):
        after = edit.text.split("\n")
        assert len(after) == len(before)
        assert [i + 1 for i in range(len(before)) if before[i] != after[i]] == [edit.line]
        assert edit.old in before[edit.line - 1]


def test_the_enumeration_is_a_function_of_the_text() -> None:
    source = CATALOGUE[0].buggy
    assert enumerate_edits(source) == enumerate_edits(str(source))


def test_a_pooled_module_has_hundreds_of_edits() -> None:
    assert [len(enumerate_edits(unit.buggy)) > 150 for unit in CATALOGUE[-2:]] == [True, True]
