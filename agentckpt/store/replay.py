"""From the bytes of a journal record to an entry of the view. What is read from disk is not trusted."""

from __future__ import annotations

from ..errors import CorruptionError, IncompatibleError
from ..nodes import decode
from .segment import CRITICAL, MAX_BODY_BYTES, RawRecord
from .view import KIND_OF, OF_SESSION, Entry, View, chain_error, check_body


def entry_of(view: View, record: RawRecord) -> Entry:
    """The entry that follows what ``view`` shows; ``kind`` is ``unknown`` for one that may be skipped.

    Raises ``CorruptionError`` (a body that the view cannot be made of, a broken chain), ``IncompatibleError`` (critical, unknown).
    """
    where = f"journal record {record.seq}"
    kind = KIND_OF.get(record.kind, "unknown")
    if kind == "unknown" and record.flags & CRITICAL:
        raise IncompatibleError(
            "is of an unknown kind", object=where, found=f"kind {record.kind}", code="unknown-record", hint="use a newer agentckpt"
        )
    body = decode(record.body, max_bytes=MAX_BODY_BYTES)
    if not isinstance(body, dict):
        raise CorruptionError("its body is no map", object=where, code="journal-damaged")
    if kind != "unknown" and (wrong := check_body(kind, body)):
        raise CorruptionError(wrong, object=where, code="journal-damaged")
    sid, sseq, prev = body.get("sid"), body.get("sseq"), body.get("prev")
    has_place = isinstance(sid, bytes) and isinstance(sseq, int) and isinstance(prev, bytes)
    if not (kind in OF_SESSION or (kind == "unknown" and has_place and sid in view.sessions)):
        return Entry(record.seq, kind, None, 0, record.hash, body)
    if error := chain_error(view, kind, body):
        raise error
    return Entry(record.seq, kind, body["sid"], body["sseq"], record.hash, body)
