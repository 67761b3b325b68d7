"""The recovery table, cell by cell, with a real SIGKILL at the point in question. The witness says what the world felt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentckpt.sandbox import Workspace
from agentckpt.testing.witness import Witness

from .harness import Child, run

TURN_2_TOKENS = 4
"""what the run after the kill samples: only the second turn, never the one that was killed"""


@pytest.fixture(scope="module")
def witness() -> Iterator[Witness]:
    with Witness.start(honoured=["idempotent"]) as started:
        yield started


class Cell:
    """One tool in a folder of its own, killed once, then run again."""

    def __init__(self, tool: str, folder: Path, witness: Witness) -> None:
        self.tool, self.folder, self.witness = tool, folder, witness
        (folder / "workspace").mkdir()
        (folder / "witness").write_text(witness.url)
        self.value: Any = None
        self.num_different = 0
        self.before = witness.num_requests(tool)

    @property
    def num_requests(self) -> int:
        return self.witness.num_requests(self.tool) - self.before

    def killed_at(self, point: str) -> None:
        (self.folder / "stop-at").write_text(point)
        child = Child("cell", self.folder, self.tool)
        child.wait_line(point)
        child.kill()
        self.value = next((json.loads(line.removeprefix("value ")) for line in child.lines() if line.startswith("value ")), None)
        (self.folder / "stop-at").unlink()
        (self.folder / "events").unlink()

    def finishes(self) -> Any:
        """Runs to the end without asking the model again for the killed turn; the call's result."""
        child = run("cell", self.folder, self.tool)
        lines = dict(line.split(" ", 1) for line in child.lines() if " " in line)
        assert int(lines["sampled"]) == TURN_2_TOKENS
        self.num_different = int(lines["different"])
        return json.loads(lines["result"])[0]

    def stops(self) -> None:
        """Ends with the exit code of an unknown outcome, however often: it does not decay."""
        for _ in range(2 if self.tool == "irreversible" else 1):
            run("cell", self.folder, self.tool, expect=[14])


@pytest.fixture
def cell(request: pytest.FixtureRequest, tmp_path: Path, witness: Witness) -> Cell:
    tool = str(request.param)
    if tool == "sandbox" and not Workspace(tmp_path / "probe").denies_network:
        pytest.skip("this kernel gives no network namespace, so the class sandbox is not granted")
    return Cell(tool, tmp_path, witness)


@pytest.mark.parametrize("cell", ["read", "model", "idempotent", "compensable", "irreversible", "authority", "asked"], indirect=True)
def test_finished_gives_the_record(cell: Cell) -> None:
    cell.killed_at("returned")
    assert cell.value is not None
    assert cell.finishes() == cell.value
    assert cell.num_requests == 1
    # What an authority granted is a handle in the record, never the grant itself.
    assert ("seen by the witness" in str(cell.value)) == (cell.tool != "authority")


@pytest.mark.parametrize("cell", ["sandbox"], indirect=True)
def test_finished_in_the_sandbox_is_void_and_its_words_stay(cell: Cell) -> None:
    cell.killed_at("returned")
    assert cell.finishes() == cell.value
    assert cell.num_requests == 2
    assert cell.num_different == 1


@pytest.mark.parametrize("cell", ["both"], indirect=True)
def test_finished_in_world_and_sandbox_brings_the_post_state_back(cell: Cell) -> None:
    cell.killed_at("returned")
    receipt = cell.folder / "workspace" / "receipt"
    written = receipt.read_text()
    receipt.unlink()
    assert cell.finishes() == written
    assert receipt.read_text() == written
    assert cell.num_requests == 1


@pytest.mark.parametrize("cell", ["sandbox", "read", "model"], indirect=True)
def test_not_finished_and_harmless_runs_again(cell: Cell) -> None:
    cell.killed_at("done")
    cell.finishes()
    assert cell.num_requests == 2


@pytest.mark.parametrize("cell", ["idempotent"], indirect=True)
def test_not_finished_and_idempotent_is_sent_again_with_the_same_key(cell: Cell) -> None:
    cell.killed_at("done")
    assert cell.finishes() == "seen by the witness, 1"
    assert cell.num_requests == 2
    assert cell.witness.seen("idempotent")[-1].num_applied == 1


@pytest.mark.parametrize("point", ["dispatched", "done"])
@pytest.mark.parametrize("cell", ["compensable", "irreversible", "authority", "both"], indirect=True)
def test_not_finished_and_irreversible_is_unknown(cell: Cell, point: str) -> None:
    cell.killed_at(point)
    cell.stops()
    assert cell.num_requests == (1 if point == "done" else 0)


@pytest.mark.parametrize("cell", ["asked"], indirect=True)
def test_not_finished_but_verified_as_applied(cell: Cell) -> None:
    cell.killed_at("done")
    assert cell.finishes() == "seen by the witness, verified"
    assert cell.num_requests == 1


@pytest.mark.parametrize("cell", ["asked"], indirect=True)
def test_not_finished_and_verified_as_not_applied_runs(cell: Cell) -> None:
    cell.killed_at("dispatched")
    cell.finishes()
    assert cell.num_requests == 1
