"""Chain links, groups and digests against their formulas in FORMAT.md section 6."""

from __future__ import annotations

import struct

import pytest
from blake3 import blake3

from agentckpt.errors import CorruptionError, IncompatibleError
from agentckpt.kv import chain
from agentckpt.kv.groups import Group, Plane, full_group, read_groups, total_heads
from agentckpt.kv.identity import kv_id, numerics_id


def test_a_link_is_the_hash_of_the_one_before_and_16_tokens() -> None:
    secret, identity, tokens = b"s" * 32, b"k" * 32, list(range(1, 50))
    key = blake3(secret, derive_key_context="agentckpt v1 chain").digest()
    expected = [blake3(identity, key=key).digest()]
    assert chain.seed(secret, identity) == expected[0]
    for first in (0, 16, 32):
        expected.append(blake3(expected[-1] + struct.pack("<16I", *tokens[first : first + 16])).digest())
    links: list[bytes] = []
    chain.grow(links, expected[0], tokens, 31)
    chain.grow(links, expected[0], tokens, 49)
    assert links == expected[1:]
    with pytest.raises(ValueError, match="16 tokens"):
        chain.extend(links[0], [1])


def test_tenants_and_models_do_not_share_links() -> None:
    seeds = {chain.seed(secret * 32, identity * 32) for secret in (b"a", b"b") for identity in (b"c", b"d")}
    assert len(seeds) == 4


def test_a_group_says_how_large_a_chunk_is() -> None:
    group = full_group(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bf16")
    assert group.chunk_bytes(64) == 480 * 1024
    assert total_heads([group, group]) == 6
    assert read_groups([group.body()]) == (group,)
    scaled = Group((0,), "full", 2, (Plane("k", "int8", (8,)), Plane("scale", "f32", ())))
    assert scaled.chunk_bytes(10) == 10 * (8 + 4)
    assert read_groups([scaled.body()]) == (scaled,)


@pytest.mark.parametrize("kind", ["window", "latent", "opaque-state"])
def test_reserved_groups_are_named_and_refused(kind: str) -> None:
    body = full_group(num_layers=1, num_kv_heads=1, head_dim=8, dtype="f32").body() | {"kind": kind}
    with pytest.raises(IncompatibleError, match=kind):
        read_groups([body])


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"}, {"heads": 0}, {"heads": 1 << 40}, {"heads": True}, {"layers": "0"}, {"layers": [-1]}, {"planes": None},
        {"planes": [{"name": "k", "dtype": "f8", "shape": [8]}]}, {"planes": [{"name": "k", "dtype": "f32", "shape": [1 << 30]}]},
        {"planes": [{"name": "k", "dtype": "f32", "shape": [1, 1, 1, 1, 1]}]}, {"planes": [3]},
    ],
)  # fmt: skip
def test_groups_of_a_wrong_form_are_refused(change: dict[str, object]) -> None:
    body = full_group(num_layers=1, num_kv_heads=1, head_dim=8, dtype="f32").body() | change
    with pytest.raises(CorruptionError):
        read_groups([body])
    for other in (None, [3], [{}], [body] * 65):
        with pytest.raises(CorruptionError):
            read_groups(other)


def test_the_digests_cover_what_they_say() -> None:
    base = full_group(num_layers=2, num_kv_heads=2, head_dim=8, dtype="bf16")
    other = full_group(num_layers=2, num_kv_heads=2, head_dim=8, dtype="f32")
    assert len({kv_id(b"m" * 32, [base]), kv_id(b"m" * 32, [other]), kv_id(b"n" * 32, [base])}) == 3
    numerics = {numerics_id(kernels=k, device="cpu", facts={"piece": p}) for k in (b"a", b"b") for p in (1, 2)}
    assert len(numerics) == 4
