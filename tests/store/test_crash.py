"""The crash proof: after any crash every acknowledged commit is whole and every other head is old or new.

The production code runs on a model of POSIX in which un-synced writes vanish, reorder and tear; the machine dies before every
operation that changes something. ``test_mutations.py`` shows that these tests notice each flush that is left out.
"""

from __future__ import annotations

import pytest
import store_crash
from store_crash import QUICK_SEEDS, Violation

LONG_SEEDS = tuple(range(60))


@pytest.mark.parametrize("lab", store_crash.LABS)
def test_the_machine_dies_at_every_operation(lab: str) -> None:
    seeds = range(30) if lab == "birth" else QUICK_SEEDS
    assert store_crash.run(lab, seeds) > (20 if lab == "birth" else 100)


def test_a_process_is_killed_at_every_operation_and_then_the_machine_dies() -> None:
    assert store_crash.kill((0, 1, 3), every=8) > 80
    assert store_crash.kill_birth(range(6)) > 20


@pytest.mark.parametrize("lab", store_crash.LABS)
def test_without_flushes_the_crash_tests_fail(lab: str) -> None:
    with pytest.raises(Violation, match="operation"):
        store_crash.run(lab, range(10), durability="none")


def test_a_violation_can_be_seen_again() -> None:
    with pytest.raises(Violation) as first:
        store_crash.run("main", QUICK_SEEDS, durability="none")
    number, seed = (int(str(first.value).split(word)[1].split()[0].strip(",:")) for word in ("operation", "seed"))
    with pytest.raises(Violation) as second:
        store_crash.run("main", (seed,), durability="none", only=number)
    assert str(second.value) == str(first.value)


@pytest.mark.slow
@pytest.mark.parametrize("lab", store_crash.LABS)
def test_the_machine_dies_at_every_operation_in_many_ways(lab: str) -> None:
    store_crash.run(lab, LONG_SEEDS)


@pytest.mark.slow
def test_a_process_is_killed_and_the_machine_dies_at_every_pair_of_operations() -> None:
    store_crash.kill(LONG_SEEDS[:12], every=1)
