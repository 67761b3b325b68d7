"""A second reader of a store, from FORMAT.md alone, in under 100 lines of code. Raises ValueError, KeyError or ZstdError."""

from pathlib import Path
from struct import unpack, unpack_from

import cbor2
import zstandard
from blake3 import blake3

KINDS = {1: "chunk", 2: "node", 3: "manifest"}
NAMES = {1: "session", 3: "head", 9: "name", 10: "tag", 12: "tombstone", 13: "drop"}


def need(condition, what):
    if not condition:
        raise ValueError(what)


def digest(data, length=32):
    return blake3(data).digest(length)


def cbor(data):
    value = cbor2.loads(data)
    need(cbor2.dumps(value, canonical=True) == data, "not the one encoding")
    return value


class Reader:
    """``sessions`` {sid: {name, heads, mark, removed}}, ``tags``, ``drops``, ``journal`` [(kind, body)], ``places`` {ref: where}."""

    def __init__(self, path):
        self.path, self.sessions, self.tags, self.drops, self.journal, self.places = Path(path), {}, {}, {}, [], {}
        data = (self.path / "config").read_bytes()
        end = 12 + unpack_from("<I", data, 8)[0]
        need(data[:8] == b"AGCKPT1\n" and digest(data[:end]) == data[end:], "config")
        body = cbor(data[12:end])
        need(body["format"] <= 1 and body["hash"] == "blake3" and not body["features"]["read"], "a newer format or feature")
        secret, self.id = body["tenants"]["local"]["secret"], body["store"]
        self.keys = {k: blake3(secret, derive_key_context="agentckpt v1 " + kind).digest() for k, kind in KINDS.items()}
        segments = [(int(f.stem), f.read_bytes()) for f in sorted(self.path.glob("journal/*.log"))]
        for (name, data), follower in zip(segments, [d for _, d in segments[1:]] + [None]):
            magic, version, _, _, store, number, _, first = unpack_from("<8sHHI16sQQQ", data)
            need((magic, version, store, number, digest(data[:56], 8)) == (b"AGCKJRNL", 1, self.id, name, data[56:64]), "segment header")
            self._segment(data, first, follower and unpack_from("<Q", follower, 40)[0])
        for file in sorted(self.path.glob("packs/**/*.pack")) + sorted(self.path.glob("packs/*.open")):
            self._pack(file, file.read_bytes())

    def _segment(self, data, seq, valid_length):
        at, stop, waiting, place = 64, len(data) if valid_length is None else valid_length, [], 64
        while place < stop and (found := self._record(data, place)) is not None:
            (kind, flags, number, _, place), body, seq = *found, seq + 1
            need(number == seq - 1 and (kind <= 14 or not flags & 1), "a gap in the journal, or an unknown critical record")
            waiting.append((NAMES.get(kind, kind), body))
            at, waiting = (at, waiting) if flags & 2 else (place, [self._apply(*each) for each in waiting] and [])
        need(valid_length in (None, at), "a segment ends before the length that its successor names")
        later = (self._record(data[:stop], p) for p in range(at, stop, 16) if data[p : p + 4] == b"\x89AKJ")
        need(all(found is None or found[0][3] <= at for found in later), "damage in the journal")

    def _record(self, data, at):
        magic, version, kind, flags, _, length, _, seq, synced = unpack_from("<4sBBBBIIQQ", head := data[at : at + 32].ljust(32, b"\0"))
        check, body, end = data[at + 32 : at + 48], data[at + 48 : at + 48 + length], at + 48 + length + -length % 16
        whole = (magic, version) == (b"\x89AKJ", 1) and length <= 1 << 20 and end <= len(data) and digest(head + body, 16) == check
        return ((kind, flags, seq, synced, end), cbor(body)) if whole else None

    def _apply(self, kind, body):
        self.journal.append((kind, body))
        if "sseq" in body:
            session = self.sessions.setdefault(body["sid"], {"name": None, "heads": [], "mark": (0, bytes(32)), "removed": False})
            need((body["sseq"], body["prev"]) == (session["mark"][0] + 1, session["mark"][1]), "a gap in a session's chain")
            session["mark"] = (body["sseq"], digest(cbor2.dumps(body, canonical=True)))
            session["removed"] |= kind == "tombstone"
            session["heads"] += [body] if kind == "head" else []
        if kind in ("session", "name") and body["sid"]:
            self.sessions[body["sid"]]["name"] = body["name"]
        elif kind in ("tag", "drop"):
            (self.tags if kind == "tag" else self.drops)[body.get("tag") or (body["manifest"], body["part"])] = body["manifest"]

    def _pack(self, file, data):
        need(data[:8] == b"AGCKPACK" and digest(data[:56], 8) == data[56:64] and data[16:32] == self.id, "pack header")
        if file.suffix == ".pack":
            magic, offset, count, name = unpack("<8sQQ32s", data[-64:-8])
            need(magic == b"AGCKFOOT" and digest(data[-64:-8], 8) == data[-8:] and name.hex() == file.stem, "trailer")
            rows = self._payload(data, offset)[1]
            need(digest(rows) == name and len(cbor(rows)) == count, "footer")
            self.places |= {row[0]: (file, row[1]) for row in cbor(rows)}
            return
        at, places = 64, [p for p in range(64, len(data) - 79, 64) if (self._header(data, p) or [0] * 3)[2] == 16]
        while at < len(data) and (header := self._header(data, at)):
            self.places |= {bytes([header[2]]) + header[5]: (file, at)} if header[2] in KINDS else {}
            at += 64 + header[7] + -header[7] % 64
        need(all(unpack_from("<Q", data, p + 64)[0] <= at for p in places), "damage in an open pack")

    def _header(self, data, at):
        head = data[at : at + 64]
        good = len(head) == 64 and head[:4] == b"\x89AKR" and digest(head[:56], 8) == head[56:]
        return unpack_from("<4sBBBB32sIII4s", head) if good and at + 64 + unpack_from("<I", head, 44)[0] <= len(data) else None

    def _payload(self, data, at):
        _, version, kind, codec, flags, ident, plain, stored, key, _ = self._header(data, at) or [0] * 10
        need((version, key, flags & 128) == (1, 0, 0) and codec < 2 and plain <= 16 << 20, "a newer or encrypted record")
        payload = data[at + 64 : at + 64 + stored]
        need((zstandard.frame_content_size(payload) if codec else stored) == plain, "length")
        payload = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False) if codec else payload
        return bytes([kind]) + ident, payload

    def get(self, ref):
        found, plain = self._payload(self.places[ref][0].read_bytes(), self.places[ref][1])
        need(found == ref and blake3(plain, key=self.keys[ref[0]]).digest() == ref[1:], "not what its name says")
        return plain

    def closure(self, ref):
        """{ref: bytes, or [type, strong, weak, body]} of all below ``ref``; absent weak references and parents are left out."""
        found, waiting = {}, [ref]
        while waiting:
            if (ref := waiting.pop()) not in found:
                found[ref] = self.get(ref) if ref[0] == 1 else cbor(self.get(ref))
                waiting += [] if ref[0] == 1 else found[ref][1] + [r for r in found[ref][2] if r in self.places and ref[0] != 3]
        return found
