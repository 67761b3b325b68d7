"""The golden stores of format 1 are read as on the day they were written, by the library and by the independent reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zstandard
from independent_reader import Reader
from worlds import checkpoint, new_session, octets

from agentckpt.errors import IncompatibleError
from agentckpt.manifest import decode_checkpoint
from agentckpt.nodes import MerkleList, decode_node
from agentckpt.store import Store
from agentckpt.store.ids import hash32, make_ref
from agentckpt.store.prune import prune
from agentckpt.store.verify import verify
from tests.golden.make import BAD, change_config, make_bad, make_full, make_small, summary

GOLDEN = Path(__file__).parent.parent / "golden"
EXPECTED = json.loads((GOLDEN / "format1.json").read_text())


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "format1", tmp_path / "format1"))


def test_the_library_reads_the_golden_store(golden: Path) -> None:
    assert summary(golden) == EXPECTED
    assert summary(GOLDEN / "format1") == EXPECTED, "in place, read-only"
    with Store.open(golden) as store:
        report = verify(store, "data")
        assert (report.ok, report.num_dropped) == (True, 2)
        assert store.view().session_named("main").annotations
        for manifests in EXPECTED["sessions"].values():
            for manifest in map(bytes.fromhex, manifests):
                if store.has(make_ref("manifest", manifest)):
                    decode_checkpoint(store.get(make_ref("manifest", manifest), 1 << 20), manifest)


def test_the_independent_reader_reads_the_same() -> None:
    reader = Reader(GOLDEN / "format1")
    sessions = list(reader.sessions.values())
    assert {s["name"]: [head["manifest"].hex() for head in s["heads"]] for s in sessions} == EXPECTED["sessions"]
    assert {s["name"]: [s["mark"][0], s["mark"][1].hex()] for s in sessions} == EXPECTED["marks"]
    assert sorted(s["name"] for s in sessions if s["removed"]) == EXPECTED["removed"]
    assert {tag: manifest.hex() for tag, manifest in reader.tags.items()} == EXPECTED["tags"]
    assert sorted([manifest.hex(), part] for manifest, part in reader.drops) == EXPECTED["drops"]
    assert len(reader.places) == EXPECTED["num_objects"]
    assert hash32(b"".join(ref + hash32(reader.get(ref)) for ref in sorted(reader.places))).hex() == EXPECTED["objects"]
    with Store.open(GOLDEN / "format1", mode="ro") as store:
        for session in sessions:
            for head in [] if session["removed"] else session["heads"]:
                for ref, found in reader.closure(make_ref("manifest", head["manifest"])).items():
                    data = store.get(ref, 1 << 24)
                    node = None if ref[0] == 1 else decode_node(data)
                    assert found == data if node is None else found[:3] == [node.type, list(node.strong), list(node.weak)]


def test_a_part_of_the_golden_store_means_what_it_meant() -> None:
    with Store.open(GOLDEN / "format1", mode="ro") as store:
        view = store.view()
        main = view.session_named("main")
        assert main.head is not None
        cut = decode_checkpoint(store.get(make_ref("manifest", main.head["manifest"]), 1 << 20))
        state = decode_node(store.get(cut.parts["state"][1], 1 << 20))
        items = list(MerkleList.open(state.body["lists"][0], state.strong, state.weak).items(store))
        assert [item.value for item in items] == [{"step": i, "text": f"main {i}", "score": i / 8} for i in range(40)]
        kv = decode_node(store.get(cut.parts["kv"][1], 1 << 20))
        assert (kv.body["n"], kv.body["computed"], kv.body["tail_block"]["len"]) == (140, 139, 11)
        blocks = list(MerkleList.open(kv.body["blocks"], kv.strong, kv.weak).items(store))
        chunks = [store.get(ref, 1 << 20) for block in blocks for ref in block.weak]
        assert chunks == [octets(f"main block {b} head {h}", 4096) for b in range(2) for h in range(2)]


def test_state_and_files_of_the_golden_store_come_back(tmp_path: Path) -> None:
    from agentckpt.sandbox import Workspace
    from agentckpt.session.state import read_state

    with Store.open(GOLDEN / "format1", mode="ro") as store:
        main = store.view().session_named("main")
        for head, hello, num_items in zip(main.heads, (b"hello\n", b"hello, world\n"), (3, 40), strict=True):
            cut = decode_checkpoint(store.get(make_ref("manifest", head["manifest"]), 1 << 20))
            state = read_state(store, cut.parts["state"][1])
            assert list(state) == ["big", "log", "done", "goal", "digest"]
            assert (state["big"], state["done"], state["goal"], len(state["log"])) == (1 << 70, num_items > 30, "main", num_items)
            workspace = Workspace(tmp_path / f"tree{num_items}")
            workspace.prepare(store, cut.parts["sandbox"][1]).commit()
            assert (workspace.read_file("a.txt"), workspace.read_file("src/b.py")) == (hello, b"print(1)\n" * 100)
            workspace.close()


def test_the_golden_store_can_be_written_and_pruned(golden: Path) -> None:
    with Store.open(golden) as store:
        session = new_session(store, "today")
        checkpoint(store, session, kv=70, items=50)
        prune(store, max_unused=0.0)
        assert verify(store, "data").ok
    assert len(Reader(golden).sessions) == 4


def test_this_version_still_writes_the_same_ids(tmp_path: Path) -> None:
    make_full(tmp_path / "format1")
    assert summary(tmp_path / "format1") == EXPECTED


def read_head(path: Path, mode: str) -> bytes:
    with Store.open(path, mode=mode) as store:  # type: ignore[arg-type]
        session = store.view().session_named("main")
        assert session.head is not None
        return store.get(make_ref("manifest", session.head["manifest"]), 1 << 20)


def read_all(path: Path) -> list[bytes]:
    reader = Reader(path)
    return [reader.get(ref) for ref in sorted(reader.places)]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_what_this_version_cannot_know_is_refused_and_not_called_damaged(tmp_path: Path, name: str, mode: str) -> None:
    path = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "index" not in file.parts}
    with pytest.raises(IncompatibleError) as caught:
        read_head(path, mode)
    assert caught.value.exit_code == 13
    assert caught.value.code in {"unknown-feature", "newer-format", "encrypted", "unknown-record"}
    assert {file: data for file, data in before.items() if file.read_bytes() != data and file.name != "_writers"} == {}
    with pytest.raises(ValueError, match=r"newer|unknown critical"):
        read_all(path)


@pytest.mark.parametrize("name", BAD)
def test_verify_and_prune_refuse_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    make_bad(name, path)
    for act in (lambda store: verify(store, "data"), lambda store: prune(store)):
        with pytest.raises(IncompatibleError):
            with Store.open(path) as store:
                act(store)


def test_a_feature_needed_to_prune_alone_refuses_prune_alone(tmp_path: Path) -> None:
    make_small(tmp_path / "s")
    change_config(tmp_path / "s", features={"read": [], "write": [], "prune": ["x-new"]})
    with Store.open(tmp_path / "s") as store:
        assert verify(store, "data").ok
        with pytest.raises(IncompatibleError):
            prune(store)


def test_the_independent_reader_is_independent_and_short() -> None:
    text = (Path(__file__).parent / "independent_reader.py").read_text()
    assert "agentckpt" not in text.replace('"agentckpt v1 "', "").replace("agentckpt.", "")
    assert "import agentckpt" not in text
    assert sum(bool(line.strip()) for line in text.splitlines()) < 100


def test_it_never_takes_damaged_bytes_for_sound_ones(tmp_path: Path) -> None:
    """Flip a bit in every 7th byte of a store: the reader refuses it, or what it reads is the same; only the journal's last
    records may go, as a torn tail would."""
    path = tmp_path / "s"
    make_small(path)

    def everything() -> list[bytes]:
        reader = Reader(path)
        heads = [head["manifest"] for session in reader.sessions.values() for head in session["heads"]]
        return [reader.get(ref) for manifest in heads for ref in reader.closure(b"\x03" + manifest)]

    sound = everything()
    for file in [path / "config", *path.glob("packs/*/*.pack"), *path.glob("journal/*.log")]:
        data = file.read_bytes()
        num_refused = num_flips = 0
        for at in range(0, len(data), 7):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            num_flips += 1
            try:
                assert everything() in ([sound, []] if file.suffix == ".log" else [sound]), f"{file.name} at {at}: other data"
            except (ValueError, KeyError, zstandard.ZstdError):
                num_refused += 1
        file.write_bytes(data)
        assert num_refused > num_flips * {"": 0.99, ".pack": 0.5, ".log": 0.3}[file.suffix], f"{file.name}: {num_refused} of {num_flips}"
