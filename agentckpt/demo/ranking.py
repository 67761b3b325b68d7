"""The order in which edits are tried: by the model's own log-probabilities.

The model has read the tests and then ``PASSED``, and is asked how likely the module is with each edit. The score of an
edit is the line-sum rule: from the first token in which the edited module differs from the original, to the end of the
edited line,

    sum(log p of the edited text) - sum(log p of the original text)

both under the same context. What follows the line is left out: it is the same text in both. The rule compares tokens and
not characters because an indentation merges with the line break before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..handles import Handle
from ..types import Score
from .edits import Edit

PASSED = "\n# All tests above pass.\n\n"


class Scorer(Protocol):
    """The part of a live sequence that ranking needs; ``session.kv`` is one."""

    def encode(self, item: str) -> list[int]: ...

    def score(self, candidates: Sequence[Sequence[int]]) -> Handle[list[Score]]: ...


def rank(kv: Scorer, source: str, edits: Sequence[Edit]) -> list[tuple[int, float]]:
    """``(index in edits, gain in nats over the original)``, the likeliest first; equal gains keep the order of ``edits``.

    ``kv`` stands at the end of the prompt and is left as it was.
    """
    changed = [kv.encode(through_line(edit.text, edit.line)) for edit in edits]
    lines = sorted({edit.line for edit in edits})
    original = {line: kv.encode(through_line(source, line)) for line in lines}
    scores = kv.score([*original.values(), *changed]).result()
    before = dict(zip(lines, scores))
    gains = []
    for index, (edit, ids, score) in enumerate(zip(edits, changed, scores[len(lines) :], strict=True)):
        split = first_difference(original[edit.line], ids)
        gains.append((index, sum(score.logprobs[split:]) - sum(before[edit.line].logprobs[split:])))
    return sorted(gains, key=lambda gain: -gain[1])


def through_line(text: str, line: int) -> str:
    """The text up to the end of a line (from 1), without its line break."""
    return "\n".join(text.split("\n")[:line])


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first position in which two token sequences differ; the shorter length if one begins the other."""
    for index, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return index
    return min(len(one), len(other))
