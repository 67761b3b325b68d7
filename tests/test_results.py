"""What a document quotes is what a committed result says."""

from __future__ import annotations

import json

from benchmarks.quote import RESULT, ROOT, replaced


def test_the_readmes_figures_are_those_of_the_committed_result() -> None:
    text = (ROOT / "README.md").read_text()
    assert replaced(text, json.loads(RESULT.read_text())) == text


def test_a_result_has_the_one_shape() -> None:
    found = json.loads(RESULT.read_text())
    assert {"benchmark", "commit", "machine", "rows"} <= set(found)
    for row in found["rows"]:
        assert set(row) == {"metric", "unit", "ours", "against", "other", "ratio", "goal", "met"}
        assert not found["commit"].endswith("-dirty")
