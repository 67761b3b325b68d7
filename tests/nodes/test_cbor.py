"""The encoding has one form a value, agrees with cbor2, and refuses everything else without allocating for it."""

from __future__ import annotations

import enum
import math
import resource
from typing import Any

import cbor2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentckpt.errors import CorruptionError, IncompatibleError
from agentckpt.nodes import MAX_DEPTH, ListSlot, decode, encode

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-(1 << 80), 1 << 80) | st.text(st.characters(exclude_categories=["Cs"]))
    | st.floats(allow_nan=False, allow_infinity=False) | st.floats(width=16, allow_nan=False, allow_infinity=False) | st.binary()
)  # fmt: skip
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=30)
BIG = 1 << 20


def same(a: Any, b: Any) -> bool:
    """Equal, and of equal types: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b) and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@given(VALUES)
def test_what_is_encoded_is_decoded_and_equals_cbor2(value: Any) -> None:
    data = encode(value)
    assert same(decode(data, max_bytes=BIG), value)
    assert data == cbor2.dumps(value, canonical=True)
    assert same(cbor2.loads(data), value)


@given(st.binary(max_size=40))
@example(bytes.fromhex("a2616101616102"))
@example(bytes.fromhex("c24900ffffffffffffffff"))
@settings(max_examples=400)
def test_accepted_bytes_equal_their_own_encoding(data: bytes) -> None:
    try:
        value = decode(data, max_bytes=BIG)
    except CorruptionError:
        return
    assert encode(value) == data


@given(VALUES, st.data())
def test_a_changed_byte_is_refused_or_is_another_value(value: Any, choose: st.DataObject) -> None:
    data = bytearray(encode(value))
    at = choose.draw(st.integers(0, len(data) - 1))
    data[at] ^= 1 << choose.draw(st.integers(0, 7))
    try:
        other = decode(data, max_bytes=BIG)
    except CorruptionError:
        return
    assert not same(other, value)


REFUSED = {
    "integer 0 in two bytes": "1800", "255 in three": "1900ff", "in five": "1a0000ffff", "in nine": "1b00000000ffffffff",
    "length in two bytes": "5800", "text length": "780161", "array length": "980100", "map length": "b8016100",
    "tag in three bytes": "d90002490100000000000000ff", "half that fits no more": "fa3f800000", "double for a half": "fb3ff0000000000000",
    "NaN": "f97e00", "infinity": "f97c00", "minus infinity": "f9fc00", "NaN double": "fb7ff8000000000001",
    "repeated key": "a2616101616102", "keys out of order": "a2616201616102", "longer key first": "a262616101616202",
    "key is no text": "a10102", "key is bytes": "a1416102", "indefinite array": "9f00ff", "indefinite text": "7f6161ff", "break": "ff",
    "undefined": "f7", "simple value 0": "e0", "simple value 32": "f820", "reserved head": "1c", "trailing byte": "0000", "nothing": "",
    "small integer as tag 2": "c24101", "leading zero": "c2490000000000000000ff", "tag 2 of text": "c26161", "date": "c11a00000001",
    "decimal": "c4821b7fffffffffffffff01", "pattern": "d8236161", "shared": "d81c80", "slot of text": "d99fc46161",
    "slot too large": "d99fc41b0000000100000000", "not UTF-8": "61ff", "surrogate": "63eda080", "cut": "6261", "cut array": "8200",
}  # fmt: skip


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_other_forms_are_refused(data: str) -> None:
    with pytest.raises(CorruptionError) as caught:
        decode(bytes.fromhex(data), max_bytes=BIG)
    assert caught.value.code == "not-canonical"


@pytest.mark.parametrize(
    "head", ["9b7fffffffffffffff", "9a7fffffff", "bb7fffffffffffffff", "5b7fffffffffffffff", "7b7fffffffffffffff", "ba3fffffff"]
)
def test_a_declared_length_allocates_nothing(head: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (bytes.fromhex(head) + bytes(1000), bytes.fromhex(head) * 60):
        with pytest.raises(CorruptionError):
            decode(data, max_bytes=BIG)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_depth_and_length_are_bounded() -> None:
    deep: Any = 0
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert decode(encode(deep), max_bytes=BIG) == deep
    with pytest.raises(IncompatibleError):
        encode([deep])
    with pytest.raises(CorruptionError, match="nested too deep"):
        decode(b"\x81" + encode(deep), max_bytes=BIG)
    with pytest.raises(CorruptionError, match="nested too deep"):
        decode(b"\x81" * 500_000, max_bytes=BIG)
    with pytest.raises(CorruptionError) as caught:
        decode(encode([1, 2, 3]), max_bytes=3)
    assert caught.value.code == "too-long"
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(IncompatibleError):
        encode(cycle)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": math.nan}]}, "value['a'][1]['b']"),
        ([math.inf], "value[0]"),
        ({"a": {1: 2}}, "value['a']"),
        ([{1, 2}], "value[0]"),
        ([object()], "value[0]"),
        ([Colour.RED], "value[0]"),
        (["\ud800"], "value[0]"),
        ({"\ud800": 1}, "value"),
        ([bytearray(1)], "value[0]"),
        (1j, "value"),
        ([ListSlot(-1)], "value[0]"),
        ([ListSlot(1 << 32)], "value[0]"),
    ],
)
def test_what_has_no_encoding_is_named_by_its_path(value: Any, path: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        encode(value)
    assert caught.value.object == path
    assert caught.value.code == "not-encodable"
    assert caught.value.hint is not None


def test_known_bytes() -> None:
    """From RFC 8949 appendix A, and the one tag of ours."""
    known = [
        (0, "00"), (23, "17"), (24, "1818"), (1000000, "1a000f4240"), (18446744073709551615, "1bffffffffffffffff"),
        (18446744073709551616, "c249010000000000000000"), (-18446744073709551616, "3bffffffffffffffff"),
        (-18446744073709551617, "c349010000000000000000"), (-1, "20"), (0.0, "f90000"), (-0.0, "f98000"), (1.1, "fb3ff199999999999a"),
        (65504.0, "f97bff"), (100000.0, "fa47c35000"), (5.960464477539063e-8, "f90001"), (False, "f4"), (True, "f5"), (None, "f6"),
        (b"\x01\x02\x03\x04", "4401020304"), ("IETF", "6449455446"), ("水", "63e6b0b4"), ([1, [2, 3], [4, 5]], "8301820203820405"),
        ({"a": 1, "b": [2, 3]}, "a26161016162820203"), ({"b": 1, "aa": 2}, "a2616201626161" + "02"), (ListSlot(3), "d99fc403"),
    ]  # fmt: skip
    for value, data in known:
        assert encode(value).hex() == data
        assert same(decode(bytes.fromhex(data), max_bytes=100), value)
    assert encode((1, (2,))) == encode([1, [2]])
