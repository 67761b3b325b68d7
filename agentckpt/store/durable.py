"""Files that appear under their name only when they are durable as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from .io import IO
from .segment import SegmentHeader, encode_segment_header, segment_path


def write_durable(io: IO, temporary: str, path: str, pieces: Sequence[bytes], *, mode: int = 0o600) -> None:
    """Publish a small file whole: temp, fdatasync, rename, directory sync. Raises ``OSError``."""
    with suppress(FileNotFoundError):
        io.unlink(temporary)
    file = io.write_new(temporary, mode=mode)
    try:
        file.pwritev(0, pieces)
        file.fdatasync()
    finally:
        file.close()
    io.rename(temporary, path)
    io.fsync_dir(path.rpartition("/")[0])


def create_journal(io: IO, root: str, store_id: bytes) -> None:
    """The first segment, durable. ``journal/`` exists."""
    header = encode_segment_header(SegmentHeader(store_id, 1, 0, 1))
    write_durable(io, f"{root}/journal/{1:016d}.tmp", segment_path(root, 1), [header])
