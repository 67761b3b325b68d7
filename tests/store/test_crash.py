"""The crash proof: after any crash every acknowledged commit is whole and every other head is old or new.

The production code runs on a model of POSIX in which un-synced writes vanish, reorder and tear; the machine dies before every
operation that changes something. ``test_mutations.py`` shows that these tests notice each flush that is left out.
"""

from __future__ import annotations

from contextlib import suppress

import pytest
import store_crash
import worlds
from store_crash import QUICK_SEEDS, Violation

from agentckpt.store import Store
from agentckpt.store.ids import make_ref
from agentckpt.store.prune import prune
from agentckpt.testing.faults import Fault, FaultyIO, SimulatedCrash
from agentckpt.testing.posix_model import ALL_LOST, PosixModel

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


@pytest.mark.parametrize("seed", range(6))
def test_prune_keeps_the_durable_one_of_two_copies(seed: int) -> None:
    """A dead writer's pack ends in un-synced records, which a later writer wrote again: only the later copies are durable."""
    model = PosixModel(seed)
    with Store.init("s", io=model) as store:
        session = worlds.new_session(store, "main")
    victim = FaultyIO(model, [Fault("fdatasync", "crash", path="*.open")])
    with suppress(SimulatedCrash):
        store = Store.open("s", io=victim)
        worlds.checkpoint(store, session, kv=130, files={"a": bytes(3000)})
    store_crash.release_locks(model)
    assert victim.crashed
    worlds.checkpoint(Store.open("s", io=model), session, kv=130, files={"a": bytes(3000)})
    store_crash.release_locks(model)
    with Store.open("s", io=model) as store:
        needed = {ref: store.get(ref, 1 << 24) for ref in worlds.closure(store, [make_ref("manifest", session.manifests[-1])])}
        assert len(needed) > 5
        prune(store, max_unused=0.0)
    with Store.open("s", io=model.crash(ALL_LOST)) as store:
        assert {ref: store.get(ref, 1 << 24) for ref in needed} == needed
