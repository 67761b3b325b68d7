"""Manifests: canonical bytes, strict reading, and the invariants of the cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from agentckpt.errors import AgentckptError, CorruptionError, IncompatibleError
from agentckpt.manifest import Checkpoint, CutFacts, check_cut, decode_checkpoint, encode_checkpoint
from agentckpt.nodes import Node, decode_node, encode_node
from agentckpt.types import Mark, Ref

NODE = Ref(b"\x02" + b"n" * 32)
OTHER = Ref(b"\x02" + b"m" * 32)
CHUNK = Ref(b"\x01" + b"c" * 32)


def example(**changes: Any) -> Checkpoint:
    made = Checkpoint(
        session=b"s" * 16,
        lineage=b"l" * 16,
        turn=3,
        parts={"state": ("state", NODE), "sandbox": ("sandbox", OTHER)},
        nonce=b"n" * 16,
        mark=Mark(7, b"h" * 32),
        parents=(b"p" * 32, b"q" * 32),
        children={"helper": b"c" * 32},
        in_flight=(b"i" * 32,),
        undelivered=(b"u" * 32,),
        consistency={"sandbox": "quiescent"},
        redaction=("secret TOKEN removed",),
    )
    return dataclasses.replace(made, **changes)


def test_a_checkpoint_comes_back() -> None:
    data = encode_checkpoint(example())
    assert decode_checkpoint(data, b"i" * 32) == example(id=b"i" * 32)


def test_the_bytes_are_those_of_the_format() -> None:
    kind, strong, weak, body = decode_node(encode_checkpoint(example()))
    assert kind == "manifest"
    assert list(strong) == [OTHER, NODE, b"\x03" + b"c" * 32]
    assert list(weak) == [b"\x03" + b"p" * 32, b"\x03" + b"q" * 32]
    assert body == {
        "v": 1,
        "features": [],
        "session": b"s" * 16,
        "lineage": b"l" * 16,
        "turn": 3,
        "parents": [0, 1],
        "parts": {"sandbox": {"kind": "sandbox", "ref": 0}, "state": {"kind": "state", "ref": 1}},
        "children": {"helper": 2},
        "nonce": b"n" * 16,
        "mark": {"seq": 7, "hash": b"h" * 32},
        "in_flight": [b"i" * 32],
        "undelivered": [b"u" * 32],
        "consistency": {"sandbox": "quiescent"},
        "redaction": ["secret TOKEN removed"],
    }


def test_the_order_in_which_parts_were_named_does_not_matter() -> None:
    turned = dict(reversed(list(example().parts.items())))
    assert encode_checkpoint(example(parts=turned)) == encode_checkpoint(example())


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
ids = st.binary(min_size=32, max_size=32)


@given(
    parts=st.dictionaries(names, st.tuples(names, ids.map(lambda id: Ref(b"\x02" + id))), max_size=4),
    parents=st.lists(ids, unique=True, max_size=3).map(tuple),
    children=st.dictionaries(names, ids, max_size=3),
    turn=st.integers(0, 1 << 40),
    in_flight=st.lists(ids, unique=True, max_size=3).map(tuple),
)
def test_any_checkpoint_comes_back(**changes: Any) -> None:
    checkpoint = example(consistency={}, **changes)
    assert decode_checkpoint(encode_checkpoint(checkpoint)) == checkpoint


@pytest.mark.parametrize(
    "changes",
    [
        {"session": b"short"},
        {"nonce": bytearray(16)},
        {"turn": -1},
        {"turn": True},
        {"mark": Mark(-1, bytes(32))},
        {"mark": Mark(1, b"")},
        {"parents": (b"p" * 32, b"p" * 32)},
        {"parents": (b"p" * 31,)},
        {"in_flight": (b"x",)},
        {"parts": {"state": ("state", CHUNK)}, "consistency": {}},
        {"parts": {"": ("state", NODE)}, "consistency": {}},
        {"parts": {"state": ("", NODE)}, "consistency": {}},
        {"children": {"a": b"short"}},
        {"consistency": {"nobody": "frozen"}},
        {"redaction": ("",)},
        {"features": (3,)},
    ],
)
def test_values_that_the_format_cannot_hold_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError) as raised:
        encode_checkpoint(example(**changes))
    assert raised.value.code == "manifest-value"


def with_body(**changes: Any) -> bytes:
    kind, strong, weak, body = decode_node(encode_checkpoint(example()))
    return encode_node(Node(kind, strong, weak, {**body, **changes}))


def test_newer_manifests_are_incompatible_and_not_corrupt() -> None:
    for changes, code in [({"v": 2, "more": 1}, "manifest-version"), ({"features": ["x-future"]}, "manifest-feature")]:
        with pytest.raises(IncompatibleError) as raised:
            decode_checkpoint(with_body(**changes))
        assert raised.value.code == code


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 0},
        {"v": "1"},
        {"more": 1},
        {"session": b"s"},
        {"turn": -1},
        {"turn": "3"},
        {"parents": [0, 2]},
        {"parents": [1, 0]},
        {"parents": [0]},
        {"parents": {"0": 0}},
        {"parents": [True, 1]},
        {"parts": {"state": {"kind": "state", "ref": 9}}},
        {"parts": {"state": {"kind": "state"}}},
        {"parts": {"state": ["state", 1]}},
        {"parts": {"sandbox": {"kind": "sandbox", "ref": 1}, "state": {"kind": "state", "ref": 0}}},
        {"parts": {"sandbox": {"kind": "sandbox", "ref": 2}, "state": {"kind": "state", "ref": 1}}},
        {"children": {"helper": 0}},
        {"children": {}},
        {"mark": {"seq": 7}},
        {"mark": None},
        {"in_flight": [b"short"]},
        {"undelivered": [b"u" * 32, b"u" * 32]},
        {"consistency": {"sandbox": 1}},
        {"redaction": None},
        {"features": None},
    ],
)
def test_bad_shapes_are_corruption(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError):
        decode_checkpoint(with_body(**changes))


def test_other_nodes_are_no_manifests() -> None:
    for data in (encode_node(Node("state", (), (), {"v": 1})), b"", b"\x00", encode_node(Node("manifest", (), (), None))):
        with pytest.raises(CorruptionError):
            decode_checkpoint(data)


@given(st.data())
def test_damage_is_a_typed_error(data: st.DataObject) -> None:
    good = encode_checkpoint(example())
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    try:
        decoded = decode_checkpoint(bad)
    except AgentckptError:
        return
    assert encode_checkpoint(decoded) == bad


# ---- the invariants of the cut --------------------------------------------------------------------------------------


GOOD = CutFacts(
    open_keys=frozenset({b"i" * 32}),
    outcome_keys=frozenset({b"u" * 32}),
    tokens={"kv": (10, 9), "empty": (0, 0)},
    sandbox_seq={"sandbox": 7},
    last_outcome_seq=6,
    next_dispatch_seq=8,
    has_manifest=lambda manifest: True,
)


def test_a_good_cut_passes() -> None:
    check_cut(example(), GOOD)


@pytest.mark.parametrize(
    ("changes", "facts", "code"),
    [
        ({"in_flight": ()}, {}, "cut-in-flight"),
        ({"undelivered": (b"x" * 32,)}, {}, "cut-undelivered"),
        ({"consistency": {}}, {}, "cut-sandbox"),
        ({"consistency": {"sandbox": "surely"}}, {}, "cut-sandbox"),
        ({}, {"sandbox_seq": {"sandbox": 5}}, "cut-sandbox"),
        ({}, {"sandbox_seq": {"sandbox": 8}}, "cut-sandbox"),
        ({}, {"tokens": {"kv": (10, 10)}}, "cut-tokens"),
        ({}, {"tokens": {"kv": (0, 1)}}, "cut-tokens"),
        ({}, {"has_manifest": lambda manifest: manifest != b"c" * 32}, "cut-parents"),
    ],
)
def test_each_broken_invariant_has_its_code(changes: dict[str, Any], facts: dict[str, Any], code: str) -> None:
    with pytest.raises(CorruptionError) as raised:
        check_cut(example(**changes), dataclasses.replace(GOOD, **facts))
    assert raised.value.code == code


def test_parents_may_be_gone() -> None:
    check_cut(example(children={}), dataclasses.replace(GOOD, has_manifest=lambda manifest: False))
