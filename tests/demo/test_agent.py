"""The agent's small decisions, and its state through ``state_dict``."""

from __future__ import annotations

import pytest

from agentckpt.demo.agent import Agent, checked_assertion, failing_units, function_at

TESTS = "from quay.clamp import clamp\n\n\ndef test_clamp():\n    assert clamp(5, 0, 10) == 5\n"


def test_failing_units_are_read_from_the_summary() -> None:
    output = (
        "F.F\n=== short test summary info ===\nFAILED tests/test_b.py::test_b - assert 1 == 2\n"
        "FAILED tests/test_a.py::test_x\nFAILED tests/test_a.py::test_y\n3 failed in 0.04s\n"
    )
    assert failing_units(output) == ["a", "b"]
    assert failing_units("3 passed in 0.01s") == []


def test_function_at() -> None:
    source = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    assert [function_at(source, line) for line in (1, 2, 6)] == ["f", "f", "g"]
    with pytest.raises(ValueError):
        function_at(source, 3)


@pytest.mark.parametrize(
    "line",
    ["assert clamp(1, 0, 3) == 1", "assert clamp(-1, 0, 3)", "assert not clamp(0, 0, 3)", "assert clamp([1], {}, 'x') == (1, None)"],
)
def test_an_assertion_of_literals_is_taken(line: str) -> None:
    assert checked_assertion(line, "clamp", TESTS) == line


@pytest.mark.parametrize(
    "line",
    [
        "assert clamp(5, 0, 10) == 5",  # the tests have it
        "assert clamp(1, 0, 3) == clamp(1, 0, 3)",  # says nothing
        "assert clamp(x, 0, 3) == 1",
        "assert other(1, 0, 3) == 1",
        "assert clamp() == 1",
        "assert clamp(1, 0, high=3) == 1",
        "assert clamp(1, 0, 3) == 1; import os",
        "assert clamp(1, 0, 3) != 1",
        "assert clamp(1, 0, 3) == 1 or True",
        "assert clamp(1, 0, 3), 'why'",
        "assert clamp(1, 0, 3) == 1, 'why'",
        "assert (1, 0, 3) == (1, 0, 3)",
        "assert clamp(1, 0",
        "assert clamp(" + "(" * 5000,
        "",
        "\x00",
    ],
)
def test_other_lines_are_not(line: str) -> None:
    assert checked_assertion(line, "clamp", TESTS) is None


def test_the_state_goes_through_a_state_dict() -> None:
    agent = Agent()
    agent.failing, agent.order, agent.num_tried, agent.deployed = ["a"], [2, 0, 1], 3, ["x"]
    agent.closed.append({"bug": "b", "tries": 1})
    other = Agent()
    other.load_state_dict(agent.state_dict())
    assert {**vars(other), "closed": list(other.closed)} == {**vars(agent), "closed": list(agent.closed)}
    agent.order.append(9)
    assert other.order == [2, 0, 1], "a loaded state shares nothing with its source"
