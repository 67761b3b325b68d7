"""Cost follows change: counts of bytes, objects and flushes of a turn, through the whole path. No clock here."""

from __future__ import annotations

import pytest

from benchmarks.metadata import HISTORIES, TURN_TOKENS, Cost, measure


@pytest.fixture(scope="module")
def costs() -> dict[int, Cost]:
    return {history: measure(history, num_turns=64) for history in (1_000, 100_000)}


def test_a_turns_metadata_is_flat_in_the_length_of_the_history(costs: dict[int, Cost]) -> None:
    short, long = costs[1_000], costs[100_000]
    assert long.metadata_bytes <= 1.3 * short.metadata_bytes
    assert long.num_objects <= 1.3 * short.num_objects


def test_a_turn_takes_two_flushes(costs: dict[int, Cost]) -> None:
    # The rest is sealed packs: one more flush each, at most one in these 64 turns.
    for cost in costs.values():
        assert 2 <= cost.num_flushes <= 2 + 2 / 64


def test_new_bytes_of_a_checkpoint_follow_the_new_tokens_and_changed_files(costs: dict[int, Cost]) -> None:
    kv_bytes_per_token = 2 * 2 * 2 * 8 * 2  # layers, planes, heads, dim, bf16: the tiny model's
    file_bytes = 4096
    for cost in costs.values():
        bound = 1.1 * (TURN_TOKENS * kv_bytes_per_token + file_bytes) + 64 * kv_bytes_per_token + 16 * 1024
        assert cost.written_bytes <= bound


@pytest.mark.slow
def test_a_turns_metadata_is_flat_to_a_million_tokens() -> None:
    found = [measure(history) for history in HISTORIES]
    assert max(cost.metadata_bytes for cost in found) <= 1.3 * min(cost.metadata_bytes for cost in found)
