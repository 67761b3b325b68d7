"""The parent's side: it sees events, kills the whole group at the drawn moment, and says what it hit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agentckpt.demo.kills import Plan, carry_out, draw_plans
from agentckpt.demo.processes import Crew, Worker
from agentckpt.demo.tools import ASKED, DEPLOYS, KEYED, NEITHER
from agentckpt.errors import StoreError
from agentckpt.testing.witness import Witness, post

TALKER = """
import json, subprocess, sys, time
for event in json.loads(sys.argv[1]):
    if event == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        event = {"event": "child", "pid": child.pid}
    if event == "sleep":
        time.sleep(60)
    else:
        print(json.dumps(event) if isinstance(event, dict) else event, flush=True)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def talker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "talker_program.py").write_text(TALKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd()]))
    return tmp_path


def start(place: Path, events: str, code: int = 0) -> Worker:
    return Worker("talker_program", [events, str(code)], log=place / "log")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_events_are_read_and_garbage_is_passed_over(talker: Path) -> None:
    with start(talker, '[{"event": "one", "turn": 2}, "not json", {"no": "event"}, {"event": "two"}]') as worker:
        assert worker.wait_for(lambda event: event.name == "two") is not None
        assert worker.wait_for(lambda event: event.name == "three") is None, "it ended without one"
        assert worker.expect(0) == 0
    assert [event.name for event in worker.events] == ["one", "two"]
    assert worker.events[0].facts == {"turn": 2}


def test_another_exit_code_is_an_error_that_shows_the_log(talker: Path) -> None:
    with start(talker, '[{"event": "stopped", "message": "why"}]', 7) as worker, pytest.raises(StoreError, match=r"7.*why"):
        worker.expect(0, 14)


def test_a_kill_reaches_the_whole_group(talker: Path) -> None:
    with start(talker, '["child", "sleep"]') as worker:
        event = worker.wait_for(lambda event: event.name == "child")
        assert event is not None
        assert alive(event.facts["pid"])
        assert worker.kill()
        deadline = time.monotonic() + 20
        while alive(event.facts["pid"]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(event.facts["pid"])
        assert not worker.kill(), "it is dead already"


def test_a_crew_that_is_stopped_is_dead_and_starts_nobody(talker: Path) -> None:
    crew = Crew()
    workers = [crew.start("talker_program", ['["sleep"]', "0"], log=talker / "log") for _ in range(2)]
    crew.stop()
    assert [worker.running() for worker in workers] == [False, False]
    with pytest.raises(StoreError, match="stopped"):
        crew.start("talker_program", ['["sleep"]', "0"], log=talker / "log")


@pytest.mark.parametrize(
    ("kind", "events", "as_planned", "words"),
    [
        ("model", '[{"event": "scoring", "bug": "b", "turn": 4}, "sleep"]', True, "scored edits (b)"),
        ("model", '[{"event": "scoring", "bug": "b", "turn": 4}, {"event": "scored"}, "sleep"]', False, "after it said scored"),
        ("tool", '[{"event": "forked", "bug": "b", "turn": 4}, "sleep"]', True, "in forks (b)"),
        ("model", '[{"event": "scoring", "bug": "a", "turn": 4}]', False, "missed"),
    ],
)
def test_a_kill_says_what_it_hit(talker: Path, kind: str, events: str, as_planned: bool, words: str) -> None:
    plan = Plan(kind, 1, "", 0.3)  # type: ignore[arg-type]
    with Witness.start() as witness, start(talker, events) as worker:
        kill = carry_out(plan, worker, witness, ["a", "b"])
    assert (kill.as_planned, kill.turn) == (as_planned, 4)
    assert words in kill.hit


def test_the_window_is_between_arrival_and_answer(talker: Path) -> None:
    (talker / "talker_program.py").write_text(
        "import sys\nfrom agentckpt.testing.witness import post\n"
        f"post(sys.argv[1] + '/deploy', {{'tool': {ASKED!r}}}, key='k')\nprint('{{\"event\": \"answered\"}}', flush=True)\n"
    )
    with Witness.start() as witness:
        witness.delay(ASKED, 30.0)
        with Worker("talker_program", [witness.url], log=talker / "log") as worker:
            kill = carry_out(Plan("window", 2, ASKED, 0.05), worker, witness, ["a", "b"])
        assert kill.as_planned
        assert worker.events == []
        assert [arrival.num_applied for arrival in witness.seen()] == [1]


def test_a_window_that_never_opens_is_missed(talker: Path) -> None:
    with Witness.start() as witness, start(talker, "[]") as worker:
        post(f"{witness.url}/deploy", {"tool": ASKED}, key="of an earlier run")
        assert not carry_out(Plan("window", 2, ASKED, 0.0), worker, witness, ["a", "b"]).as_planned


def test_plans_follow_the_seed_and_every_window_is_drawn_by_some() -> None:
    assert draw_plans(5, 12) == draw_plans(5, 12)
    plans = [draw_plans(seed, 12) for seed in range(60)]
    assert {plan[2].tool for plan in plans} == {KEYED, ASKED, NEITHER} == {deploy.spec.name for deploy in DEPLOYS}
    assert all(4 <= first.bug <= second.bug < 12 for first, second, _ in plans)
    assert [plan.kind for plan in draw_plans(1, 1)] == ["model", "tool", "window"]
