"""Merkle lists: the same items give the same root, an append costs O(1) nodes, damage is refused."""

from __future__ import annotations

from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from agentckpt.errors import CorruptionError, IncompatibleError, NotFoundError
from agentckpt.nodes import MerkleList, Node, decode, decode_node, encode, encode_node, get_node, put_node
from agentckpt.types import KIND_BYTE, Buffer, Kind, Ref


class Objects:
    """A Sink and a Source in memory that counts."""

    def __init__(self) -> None:
        self.data: dict[Ref, bytes] = {}
        self.num_puts = 0
        self.put_bytes = 0
        self.num_gets = 0
        self.fail_at: int | None = None

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        if self.fail_at == self.num_puts:
            self.fail_at = None
            raise OSError("full")
        self.num_puts += 1
        self.put_bytes += len(data)
        ref = Ref(bytes([KIND_BYTE[kind]]) + blake3(bytes(data)).digest())
        self.data[ref] = bytes(data)
        return ref

    def get(self, ref: Ref, max_bytes: int) -> bytes:
        self.num_gets += 1
        if ref not in self.data:
            raise NotFoundError("absent", object=ref.hex())
        return self.data[ref]

    def read_into(self, ref: Ref, target: memoryview) -> None:
        target[:] = self.get(ref, len(target))

    def has(self, ref: Ref) -> bool:
        return ref in self.data

    def reset(self) -> None:
        self.num_puts = self.put_bytes = self.num_gets = 0


def some_ref(i: int, kind: int = 1) -> Ref:
    return Ref(bytes([kind]) + blake3(i.to_bytes(8, "little")).digest())


def refs_of(i: int) -> tuple[list[Ref], list[Ref]]:
    return [some_ref(i, 1 + i % 3)] * (i % 3), [some_ref(i + 1)] * (i % 2)


def build(objects: Objects, n: int, owning: bool = False) -> MerkleList:
    made = MerkleList()
    for i in range(n):
        made.append(objects, i, *(refs_of(i) if owning else ()))
    return made


def root_of(items: MerkleList, before: int = 0) -> tuple[dict[str, Any], list[Ref], list[Ref]]:
    strong, weak = [some_ref(-1 % 2**64)] * before, [some_ref(5)] * before
    return items.root(strong, weak), strong, weak


SIZES = [0, 1, 15, 16, 17, 255, 256, 257, 272, 4095, 4096, 4097, 5000]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("owning", [False, True])
def test_a_list_comes_back_from_its_root(n: int, owning: bool) -> None:
    objects = Objects()
    root, strong, weak = root_of(build(objects, n, owning), before=3)
    assert (root["s"], root["w"], root["n"]) == (3, 3, n)
    root = decode(encode(root), max_bytes=1 << 20)
    opened = MerkleList.open(root, strong, weak)
    assert len(opened) == n
    got = list(opened.items(objects))
    assert [item.value for item in got] == list(range(n))
    if owning:
        assert [(list(item.strong), list(item.weak)) for item in got] == [refs_of(i) for i in range(n)]
        assert ("t" in root) == any(any(refs_of(i)) for i in range(n - n % 16, n))
    else:
        assert "t" not in root
    assert root_of(opened, before=3) == (root, strong, weak)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "truncate", "reopen", "copy"]), st.integers(0, 700)), max_size=12), st.booleans())
def test_any_history_equals_a_plain_list(steps: list[tuple[str, int]], owning: bool) -> None:
    objects = Objects()
    items = MerkleList()
    plain: list[int] = []
    for step, number in steps:
        if step == "append":
            for _ in range(number):
                items.append(objects, len(plain), *(refs_of(len(plain)) if owning else ()))
                plain.append(len(plain))
        elif step == "truncate":
            plain = plain[: number if number < len(plain) else len(plain)]
            items.truncate(objects, len(plain))
        elif step == "reopen":
            items = MerkleList.open(*root_of(items))
        else:
            twin, items = items, items.copy()
            for _ in range(number % 40):
                twin.append(objects, "other")
        start = number if number <= len(plain) else 0
        assert [item.value for item in items.items(objects, start)] == plain[start:]
        assert [item.value for item in items.items(objects, start, start + 20)] == plain[start : start + 20]
        assert root_of(items) == root_of(build(Objects(), len(plain), owning)), "the same items give the same root"


def million() -> tuple[Objects, MerkleList]:
    """A list of 16^5 - 1 items, whose subtrees are equal so that only a few nodes exist."""
    objects = Objects()
    levels = [[put_node(objects, Node("list", (), (), {"l": 0, "e": [7] * 16}))] * 15]
    for level in range(1, 4):
        levels.append([put_node(objects, Node("list", (levels[-1][0],) * 16, (), {"l": level}))] * 15)
    root = {"n": 16**5 - 1, "e": [7] * 15, "k": [15] * 4, "s": 0, "w": 0}
    return objects, MerkleList.open(root, [ref for refs in levels for ref in refs], [])


def test_an_append_to_a_million_items_writes_few_nodes_and_bytes() -> None:
    objects, items = million()
    objects.reset()
    items.append(objects, 7)  # fills a node on each of the five levels: the worst case there is
    assert (objects.num_puts, objects.num_gets) == (5, 0)
    assert len(encode(root_of(items)[0])) < 40
    objects.reset()
    for i in range(1600):
        items.append(objects, i)
    assert objects.num_puts == 100 + 6
    assert objects.num_gets == 0
    assert len(items) == 16**5 + 1600
    assert [item.value for item in items.items(objects, 16**5 - 2, 16**5 + 2)] == [7, 7, 0, 1]


def test_truncating_and_reading_a_million_items_reads_few_nodes() -> None:
    objects, items = million()
    objects.reset()
    twin = items.copy()
    twin.truncate(objects, 777_777)
    assert (objects.num_puts, objects.num_gets) == (0, 4)
    assert len(MerkleList.open(*root_of(twin))) == len(twin) == 777_777
    objects.reset()
    assert len(list(items.items(objects, 555_555, 555_558))) == 3
    assert objects.num_gets <= 8
    objects.reset()
    assert len(list(items.items(objects, len(items) - 3))) == 3
    assert objects.num_gets == 0


def test_a_failed_write_leaves_the_list_as_it_was() -> None:
    objects = Objects()
    items = build(objects, 255)
    before = root_of(items)
    objects.fail_at = objects.num_puts + 1  # the second of the two nodes that item 256 fills
    with pytest.raises(OSError):
        items.append(objects, 255)
    assert root_of(items) == before
    items.append(objects, 255)
    assert root_of(items) == root_of(build(Objects(), 256))


@pytest.mark.parametrize(
    "change",
    [
        {"n": 18}, {"n": -1}, {"n": True}, {"n": 16**20 + 1}, {"e": []}, {"e": [1, 2]}, {"k": [2]}, {"k": []}, {"k": [1, 0]},
        {"s": 1}, {"s": -1}, {"s": 1 << 70}, {"t": []}, {"t": [[1, 0, 0]]}, {"t": [[-1, 0]]}, {"t": [[2, 0]]}, {"t": [[0, 1]]},
        {"t": [[1, 0]]}, {"x": 1}, {"k": None}, {"e": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_root_is_refused(change: dict[str, Any]) -> None:
    root, strong, weak = root_of(build(Objects(), 17))
    with pytest.raises(CorruptionError):
        MerkleList.open(root | change, strong, weak)
    bads: list[Any] = [None, [], {}, 3]
    for bad in bads:
        with pytest.raises(CorruptionError):
            MerkleList.open(bad, strong, weak)


@pytest.mark.parametrize(
    "node",
    [
        Node("other", (), (), {"l": 0, "e": [1] * 16}),
        Node("list", (), (), {"l": 1}),
        Node("list", (), (), {"l": False, "e": [1] * 16}),
        Node("list", (), (), {"l": 0, "e": [1] * 15}),
        Node("list", (), (), {"l": 0}),
        Node("list", (some_ref(1),), (), {"l": 0, "e": [1] * 16}),
        Node("list", (), (some_ref(1),), {"l": 0, "e": [1] * 16, "t": [[0, 0]] * 16}),
        Node("list", (), (), {"l": 0, "e": [1] * 16, "t": [[0, 1]] * 16}),
        Node("list", (), (), []),
    ],
    ids=str,
)
def test_a_bad_node_is_refused(node: Node) -> None:
    objects = Objects()
    ref = put_node(objects, node)
    items = MerkleList.open({"n": 16, "e": [], "k": [1], "s": 0, "w": 0}, [ref], [])
    with pytest.raises(CorruptionError):
        list(items.items(objects))
    with pytest.raises(CorruptionError):
        items.truncate(objects, 3)
    absent = MerkleList.open({"n": 16, "e": [], "k": [1], "s": 0, "w": 0}, [some_ref(9, 2)], [])
    with pytest.raises(NotFoundError):
        list(absent.items(objects))


def test_a_node_comes_back_and_its_kind_is_checked() -> None:
    objects = Objects()
    node = Node("state", (some_ref(1), some_ref(2, 2)), (some_ref(3, 3),), {"v": 1})
    assert decode_node(encode_node(node)) == node
    ref = put_node(objects, node, kind="manifest")
    assert ref[0] == 3
    assert get_node(objects, ref, type="state") == node
    with pytest.raises(CorruptionError, match="another type"):
        get_node(objects, ref, type="kv")
    with pytest.raises(CorruptionError, match="is a chunk"):
        get_node(objects, some_ref(1))


@pytest.mark.parametrize(
    "value",
    [
        ["t", [], []], ["t", [], [], 1, 2], [1, [], [], 1], ["", [], [], 1], ["t", None, [], 1], ["t", [], {}, 1],
        ["t", [b"\x01" * 32], [], 1], ["t", [b"\x01" * 34], [], 1], ["t", [b"\x00" * 33], [], 1], ["t", [], [b"\x04" * 33], 1],
        ["t", ["x" * 33], [], 1], {"t": 1}, 7,
    ],
    ids=str,
)  # fmt: skip
def test_bytes_that_are_no_node_are_refused(value: Any) -> None:
    with pytest.raises(CorruptionError):
        decode_node(encode(value))


def test_a_node_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(CorruptionError):
        encode_node(Node("t", (Ref(b"short"),)))
    with pytest.raises(IncompatibleError) as caught:
        encode_node(Node("t", (), (), b"x" * (16 << 20)))
    assert caught.value.code == "too-long"
    with pytest.raises(CorruptionError):
        decode_node(encode_node(Node("t", (), (), "long enough")), max_bytes=10)
