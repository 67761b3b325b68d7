"""The verdict is clean only if nothing is wrong: every way to be wrong is tried."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest

from agentckpt.cli.render import Screen, to_plain
from agentckpt.demo.compare import count_arrivals, count_effects
from agentckpt.demo.render import render
from agentckpt.demo.results import ArmRow, BugRow, DemoResult, Forks, Kill, Resume, TurnRow, WitnessCount
from agentckpt.demo.run import RULE
from agentckpt.demo.tools import ASKED, KEYED, NEITHER
from agentckpt.demo.verdict import judge
from agentckpt.ledger import EffectRecord
from agentckpt.testing.witness import Arrival

CLEAN = WitnessCount(expected=3, arrived=3, duplicated=0, lost=0, unknown=0, num_requests=3)
WINDOW = f"in the window of {NEITHER}: the request had arrived, its outcome was not known"
GOOD = DemoResult(
    seed=1,
    num_bugs=2,
    broken=None,
    clean=False,
    reasons=(),
    killed=(Kill("model", "while the model scored edits (clamp)", True, 2, 4.0, 0.1), Kill("window", WINDOW, True, 4, 6.0, 0.0)),
    tokens_identical=True,
    files_identical=True,
    state_identical=True,
    num_tokens=400,
    num_files=295,
    witness=replace(CLEAN, unknown=1),
    bugs=(BugRow("clamp", 10, 1, 2, 5.5, "line 3: `max` -> `min`", None),),
    resumes=(Resume(3.2, {"python": 1.0, "model": 1.5}, 300, 0, None, 0, 1),),
    resume_parts={"read": 0.01},
    restore_s=0.05,
    reprefill_s=2.0,
    turns=(TurnRow(0, 0, 1000, 1000, 0.001, 0.001, 0.1), TurnRow(1, 40, 2000, 500, None, None, None)),
    arms=(ArmRow("restart", 3, 400, 3, 2, 0, 0, 9.0),),
    forks=Forks(2, 6, 0.2, 2),
    num_recomputed=0,
    worker_exit_code=14,
    seconds=10.0,
    store="kept/store",
    session="repair",
    checkpoint="ab" * 32,
    commands=("agentckpt -s kept/store log repair",),
)


def test_a_run_without_fault_is_clean() -> None:
    judged = judge(GOOD)
    assert (judged.clean, judged.exit_code) == (True, 0)
    done = judge(replace(GOOD, killed=GOOD.killed[:1], witness=CLEAN, worker_exit_code=0))
    assert (done.clean, done.exit_code) == (True, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens_identical": False}, "tokens differ"),
        ({"files_identical": False}, "files differ"),
        ({"state_identical": False}, "rankings, tries) differs"),
        ({"num_recomputed": 5}, "5 tokens were recomputed"),
        ({"broken": "kv"}, "nothing was recomputed"),
        ({"witness": replace(CLEAN, unknown=1, expected=2)}, "2 deploys were intended"),
        ({"witness": replace(CLEAN, unknown=1, duplicated=1)}, "happened twice"),
        ({"witness": replace(CLEAN, unknown=1, lost=1)}, "lost"),
        ({"witness": replace(CLEAN, unknown=2)}, "of 2 deploys is unknown"),
        ({"killed": GOOD.killed[:1]}, "of 1 deploys is unknown"),
        ({"worker_exit_code": 0}, "ended with 0"),
        ({"witness": CLEAN}, "ended with 14"),
        ({"killed": (replace(GOOD.killed[0], as_planned=False), GOOD.killed[1])}, "missed its moment"),
    ],
)
def test_each_fault_is_named(changes: dict[str, Any], words: str) -> None:
    judged = judge(replace(GOOD, **changes))
    assert (judged.clean, judged.exit_code) == (False, 1)
    assert any(words in reason for reason in judged.reasons), judged.reasons


def test_damaged_kv_that_was_recomputed_is_clean_and_says_so_in_its_exit_code() -> None:
    judged = judge(replace(GOOD, broken="kv", num_recomputed=64))
    assert (judged.clean, judged.exit_code) == (True, 3)
    assert "64 tokens recomputed" in judged.reasons[0]


def effect(tool: str, state: Any) -> EffectRecord:
    return EffectRecord(
        key="00" * 32, tool=tool, effect_class="irreversible", state=state, sandbox=False, turn=4, occurrence=0, index=0, epoch=1,
        args=None, intent_key=None, resources=(),
    )  # fmt: skip


def test_effects_are_counted_by_what_the_world_felt() -> None:
    effects = [effect(KEYED, "committed"), effect(ASKED, "verified-applied"), effect(NEITHER, "unknown")]
    arrivals = [Arrival(KEYED, "a", 2, 1), Arrival(ASKED, "b", 1, 1), Arrival(NEITHER, "c", 1, 1)]
    assert count_effects(effects, arrivals) == WitnessCount(expected=3, arrived=3, duplicated=0, lost=0, unknown=1, num_requests=4)
    assert count_effects(effects, arrivals[:2]).lost == 0, "unknown is not lost"
    assert count_effects(effects, arrivals[1:]).lost == 1
    twice = [*arrivals, Arrival(ASKED, "other", 1, 1)]
    assert count_effects(effects, twice).duplicated == 1
    assert count_effects(effects, [Arrival(ASKED, "b", 2, 2)]).duplicated == 1


def test_without_a_ledger_each_deploy_is_expected_once() -> None:
    arrivals = [Arrival(KEYED, "a", 1, 1), Arrival(KEYED, "b", 1, 1), Arrival(ASKED, "c", 1, 1)]
    assert count_arrivals(arrivals) == WitnessCount(expected=3, arrived=2, duplicated=1, lost=1, unknown=0, num_requests=3)


def test_the_rendering_holds_what_must_be_said() -> None:
    out = io.StringIO()
    render(judge(GOOD), Screen(out, io.StringIO()))
    text = out.getvalue()
    for words in (RULE, "random = (edits + 1) / (passing + 1)", WINDOW, "fast re-prefill 2.000 s", "clean", "agentckpt -s kept/store log"):
        assert words in text, words
    assert "NOT CLEAN" not in text
    again = io.StringIO()
    render(judge(replace(GOOD, files_identical=False)), Screen(again, io.StringIO()))
    assert "NOT CLEAN" in again.getvalue()


def test_the_document_has_the_promised_keys() -> None:
    document = json.loads(json.dumps(to_plain(judge(GOOD))))
    promised = {"seed", "killed", "tokens_identical", "files_identical", "witness", "restore_s", "reprefill_s", "resume_parts"}
    promised |= {"turns", "arms", "forks"}
    assert promised <= set(document)
    assert {"expected", "arrived", "duplicated", "lost", "unknown"} <= set(document["witness"])
