"""The line-sum rule, against a model of our own whose probabilities can be written down."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from agentckpt.demo.edits import Edit
from agentckpt.demo.ranking import first_difference, rank, through_line
from agentckpt.handles import Handle
from agentckpt.types import Score

SOURCE = "def f(a):\n    x = a + 1\n    return x\n"


class CharacterModel:
    """Tokens are characters; a character's log-probability is ``weights``' or -1. It asks for the full candidates."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.num_scored = 0

    def encode(self, item: str) -> list[int]:
        return [ord(character) for character in item]

    def score(self, candidates: Sequence[Sequence[int]]) -> Handle[list[Score]]:
        self.num_scored += len(candidates)
        values = [tuple(self.weights.get(chr(i), -1.0) for i in ids) for ids in candidates]
        return Handle.of([Score(sum(v), v) for v in values])


def edit(old: str, new: str) -> Edit:
    text = SOURCE.replace(old, new)
    line = next(i for i, (a, b) in enumerate(zip(SOURCE.split("\n"), text.split("\n")), 1) if a != b)
    return Edit(text, line, old, new)


def test_only_the_rest_of_the_edited_line_counts() -> None:
    edits = [edit("a + 1", "a - 1"), edit("a + 1", "a * 1"), edit("return x", "return a")]
    model = CharacterModel({"-": -5.0, "*": -0.5, "+": -2.0, "x": -3.0, "\n": -1000.0})
    assert rank(model, SOURCE, edits) == [(2, pytest.approx(2.0)), (1, pytest.approx(1.5)), (0, pytest.approx(-3.0))]
    assert model.num_scored == 2 + 3, "the original once for each edited line, and each edit"


def test_a_longer_edit_pays_for_its_tokens() -> None:
    gains = dict(rank(CharacterModel({}), SOURCE, [edit("return x", "return x + 1"), edit("x = a", "y = a")]))
    assert gains[0] == pytest.approx(-4.0)
    assert math.isclose(gains[1], 0.0)


def test_equal_gains_keep_the_order_of_the_text() -> None:
    edits = [edit("a + 1", "a - 1"), edit("a + 1", "a * 1"), edit("a + 1", "a % 1")]
    assert [index for index, _ in rank(CharacterModel({}), SOURCE, edits)] == [0, 1, 2]


def test_through_line_and_first_difference() -> None:
    assert through_line("a\nb\nc\n", 2) == "a\nb"
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2
    assert first_difference([], [1]) == 0
