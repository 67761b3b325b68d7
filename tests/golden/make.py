"""Writes the golden stores of format 1 beside this file: ``python -m tests.golden.make``.

They are committed and never written again by a later version: a reader of format 1 must go on reading them.
Secret, clock and randomness are fixed, so that two runs of the same version write the same ids.

    format1               everything: sealed packs and the open pack of a killed writer, two segments, all parts, a fork, a tag,
                          a removed session, dropped KV, a large value of a record, an unknown record that may be skipped
    unknown-feature       config names a feature that readers must know
    format2               config is of format 2
    encrypted             the head's manifest has key id 1 and scrambled bytes
    unknown-record        the journal ends with a critical record of kind 99
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "store"))

from worlds import append, checkpoint, effect, new_session, octets, put_tree, remove

from agentckpt.nodes import decode, encode
from agentckpt.store import Draft, Store
from agentckpt.store.ids import check8, check16, hash32, make_ref
from agentckpt.store.io import RealIO
from agentckpt.store.prune import prune

HERE = Path(__file__).parent
SECRET = octets("golden secret", 32)
BAD = ("unknown-feature", "format2", "encrypted", "unknown-record")


class FixedIO(RealIO):
    """Real files; clock and randomness count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def now(self) -> float:
        self.count += 1
        return 1_700_000_000.0 + self.count / 8

    def random(self, n: int) -> bytes:
        self.count += 1
        return octets(f"random {self.count}", n)


def make_full(path: Path) -> None:
    """The store ``format1``; ``path`` must not exist. Left as a killed writer leaves it."""
    io = FixedIO()
    with Store.init(path, secret=SECRET, io=io) as store:
        main, gone = new_session(store, "main"), new_session(store, "gone")
        checkpoint(store, main, kv=70, items=3, files={"a.txt": b"hello\n", "src/b.py": b"print(1)\n" * 100})
        checkpoint(store, gone, kv=66)
        value = store.put("chunk", encode("long text " * 8000), compress=True)
        store.sync()
        effect(store, main, "v1", {"$ref": value}, put_tree(store, "post", {"made": octets("made", 700)}))
        store.sync()
        checkpoint(store, main, kv=140, items=40, files={"a.txt": b"hello, world\n", "src/b.py": b"print(1)\n" * 100})
        append(store, Draft("annotate", main.sid, {"manifest": main.manifests[1], "values": {"reward": 0.75}}))
        append(store, Draft("tag", None, {"tag": "good", "manifest": main.manifests[0]}))
        remove(store, gone)
        prune(store, kv="keep-last=1", max_unused=0.0)
    skip = add_record(path, {"note": "from a later version", "sid": main.sid, "sseq": 0, "prev": b""}, kind=99, critical=False)
    with max((path / "journal").glob("*.log")).open("ab") as file:
        file.write(octets("a record that was torn", 40))  # void: the next writer begins a second segment
    writer = Store.open(path, io=io)
    assert writer.view().seq == skip
    fork = new_session(writer, "fork", parent=main)
    checkpoint(writer, fork, kv=75, kv_label="main", items=4, children={"main": main.manifests[1]})
    writer.put("chunk", octets("never synced", 300))  # stays in memory: a kill loses it


def add_record(path: Path, body: dict[str, object], *, kind: int, critical: bool) -> int:
    """Append a record of any kind to the last segment; returns its number."""
    with Store.open(path, mode="ro") as store:
        view = store.view()
    session = view.sessions.get(body.get("sid"))  # type: ignore[arg-type]
    if session is not None:
        body = {**body, "sseq": session.sseq + 1, "prev": session.hash}
    data = encode({**body, "time": 1_700_000_099.0})
    segment = max((path / "journal").glob("*.log"))
    length = segment.stat().st_size
    head = struct.pack("<4sBBBBIIQQ", b"\x89AKJ", 1, kind, int(critical), 0, len(data), 0, view.seq + 1, length)
    with segment.open("ab") as file:
        file.write(head + check16(head + data) + data + bytes(-len(data) % 16))
    return view.seq + 1


def make_small(path: Path) -> bytes:
    """One session with one checkpoint; returns the manifest's id."""
    with Store.init(path, secret=SECRET, io=FixedIO()) as store:
        return checkpoint(store, new_session(store, "main"), items=2)


def change_config(path: Path, **changes: object) -> None:
    data = (path / "config").read_bytes()
    body = encode({**decode(data[12:-32], max_bytes=1 << 16), **changes})
    head = data[:8] + struct.pack("<I", len(body)) + body
    (path / "config").write_bytes(head + hash32(head))


def encrypt_manifest(path: Path, manifest: bytes) -> None:
    """What an encrypting version would leave: key id 1, a sound header, bytes that mean nothing without the key."""
    with Store.open(path, mode="ro") as store:
        at = store.location(make_ref("manifest", manifest))
    assert at is not None
    file = path / "packs" / at.pack[:2] / at.pack
    data = bytearray(file.read_bytes())
    data[at.offset + 48] = 1
    data[at.offset + 56 : at.offset + 64] = check8(bytes(data[at.offset : at.offset + 56]))
    payload = slice(at.offset + 64, at.offset + 64 + at.stored_bytes)
    data[payload] = bytes(byte ^ 0x5A for byte in data[payload])
    file.write_bytes(data)


def make_bad(name: str, path: Path) -> None:
    """One of the stores that must be refused."""
    manifest = make_small(path)
    if name == "unknown-feature":
        change_config(path, features={"read": ["x-new"], "write": ["x-new"], "prune": []})
    elif name == "format2":
        change_config(path, format=2)
    elif name == "encrypted":
        encrypt_manifest(path, manifest)
    else:
        add_record(path, {"what": "nobody knows"}, kind=99, critical=True)


def summary(path: Path) -> dict[str, object]:
    """What a reader must find in ``format1``: ids by session, and one hash over everything that they reach."""
    with Store.open(path, mode="ro") as store:
        view = store.view()
        reached = sorted(ref for name in store.packs() for ref, _ in store.pack_entries(name))
        return {
            "sessions": {s.name: [head["manifest"].hex() for head in s.heads] for s in view.sessions.values()},
            "removed": sorted(s.name for s in view.sessions.values() if s.removed),
            "marks": {s.name: [s.sseq, s.hash.hex()] for s in view.sessions.values()},
            "tags": {tag: manifest.hex() for tag, manifest in view.tags.items()},
            "drops": sorted([manifest.hex(), part] for manifest, part in view.drops),
            "num_objects": len(reached),
            "objects": hash32(b"".join(ref + hash32(store.get(ref, 1 << 24)) for ref in reached)).hex(),
        }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = {name: Path(folder) / name for name in ("format1", *BAD)}
        make_full(made["format1"])
        for name in BAD:
            make_bad(name, made[name])
        for name, path in made.items():
            shutil.rmtree(HERE / name, ignore_errors=True)
            shutil.copytree(path, HERE / name, ignore=shutil.ignore_patterns("index"))
            for lease in (HERE / name / "leases").iterdir():
                lease.write_bytes(b"")  # its content names the machine that wrote it
    (HERE / "format1.json").write_text(json.dumps(summary(HERE / "format1"), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
