"""``model_id``: which weights these are, in 32 bytes; and the digests of tokenizer and chat template.

``model_id`` covers the bytes of the weight files, what dequantisation makes of them, and the config's arithmetic (shapes, RoPE, norms).
It does not cover the dtype or device of the computation (that is the numerics' identity) nor where generation ends.

Dequantisation is covered by its effect: for each quantised type in the file, the digest of some blocks as they came out. So another
version of the dequantising package gives the same id if and only if it gives the same weights.

Reading 100 MB costs some 30 ms from the page cache; the digest of a file is kept in a mapping that the caller may pass and persist.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import blake3

from ..errors import ConflictError, NotFoundError
from .config import ModelConfig

FileKey = tuple[str, int, int, int]
"""(absolute path, inode, size, modification time in ns)"""
DigestCache = MutableMapping[FileKey, bytes]
"""what file digests are kept in: a dict will do"""
MEMORY_CACHE: DigestCache = {}
"""used where the caller passes no cache: lives as long as the process"""
DIGEST_BYTES = 32
THREADED_BYTES = 1 << 20
"""below this the hash's threads cost more than they bring"""


def digest(purpose: str, parts: Iterable[bytes]) -> bytes:
    """BLAKE3-256 under a context string of ours, over parts that are each preceded by their length (8 bytes, little endian)."""
    hasher = blake3.blake3(derive_key_context=f"agentckpt {purpose} v1")
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8, floats in their shortest round-trip form; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")


def file_key(path: Path) -> FileKey:
    try:
        status = path.stat()
    except OSError as error:
        raise NotFoundError("a weight file is missing", object=str(path), expected="a file", found=str(error)) from error
    return str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns


def file_digest(path: Path, *, cache: DigestCache | None = None) -> bytes:
    """BLAKE3-256 of a file's bytes. Raises ``NotFoundError``; ``ConflictError`` if the file changed while it was read."""
    cache = MEMORY_CACHE if cache is None else cache
    key = file_key(path)
    known = cache.get(key)
    if known is not None and len(known) == DIGEST_BYTES:
        return known
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO if key[2] > THREADED_BYTES else 1)
    hasher.update_mmap(key[0])
    if file_key(path) != key:
        raise ConflictError("the file changed while it was read", code="file-changed", object=str(path))
    cache[key] = hasher.digest()
    return cache[key]


def model_id(config: ModelConfig, files: Sequence[Path], recipe: Mapping[str, bytes], *, cache: DigestCache | None = None) -> bytes:
    """32 bytes. ``files``: the weight files in a fixed order; ``recipe``: digest of sample output by quantised type (empty: none)."""
    parts = [canonical_json(config.arithmetic())]
    parts += [part for name in sorted(recipe) for part in (name.encode(), recipe[name])]
    parts += [b"files", *(file_digest(path, cache=cache) for path in files)]
    return digest("model id", parts)


def tokenizer_id(spec_bytes: bytes) -> bytes:
    """32 bytes over the tokenizer's whole specification in canonical form."""
    return digest("tokenizer id", [spec_bytes])


def template_id(template: str | None) -> bytes | None:
    """32 bytes over the chat template's text, or None where there is none."""
    return None if template is None else digest("chat template id", [template.encode("utf-8", "surrogatepass")])
