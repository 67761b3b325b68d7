"""The store's config file: what this directory is (FORMAT.md section 2).

Invariants:
1. It is written once: temp file, fdatasync, rename, directory sync; a directory is a store when it stands there.
2. The skeleton (directories, first journal segment) is durable before the config is.
3. It holds the secret of tenant ``local``: mode 0600.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import CorruptionError, IncompatibleError, NotFoundError, StoreError
from ..nodes import decode, encode
from ..types import Value
from .ids import SECRET_BYTES, check16, hash32
from .io import IO, read_file

MAGIC: Final = b"AGCKPT1\n"
FORMAT: Final = 1
MAX_CONFIG_BYTES: Final = 1 << 20
STORE_ID_BYTES: Final = 16
KNOWN_FEATURES: Final[frozenset[str]] = frozenset()
CHUNKING: Final = {"min": 16 << 10, "avg": 64 << 10, "max": 256 << 10}


@dataclass(frozen=True)
class StoreConfig:
    """The body of ``config``, checked."""

    store_id: bytes
    tenants: Mapping[str, Mapping[str, bytes]] = field(repr=False)
    features: Mapping[str, tuple[str, ...]]
    chunking: Mapping[str, int]

    def secret_of(self, tenant: str, given: Mapping[str, bytes] | None) -> bytes:
        """The secret of ``tenant``. ``NotFoundError`` if the store does not know it or no key was given."""
        entry = self.tenants.get(tenant)
        if entry is None:
            raise NotFoundError(
                "is no tenant of this store", object=tenant, expected=f"one of {', '.join(sorted(self.tenants))}", code="no-tenant"
            )
        if "secret" in entry:
            return entry["secret"]
        secret = (given or {}).get(tenant)
        if secret is None:
            raise NotFoundError(
                "its secret is not in the store", object=f"tenant {tenant}", code="no-tenant-key", hint="give it as tenant_keys="
            )
        if len(secret) != SECRET_BYTES or check16(secret) != entry["check"]:
            raise IncompatibleError("the given secret is not the one of this store", object=f"tenant {tenant}", code="wrong-tenant-key")
        return secret

    def require(self, *operations: str) -> None:
        """``IncompatibleError`` if one of these operations (read, write, prune) needs a feature that is unknown here."""
        for operation in operations:
            unknown = sorted(set(self.features.get(operation, ())) - KNOWN_FEATURES)
            if unknown:
                raise IncompatibleError(
                    f"to {operation} it needs features that this version does not know",
                    object="store",
                    found=", ".join(unknown),
                    code="unknown-feature",
                    hint="use a newer agentckpt",
                )


def new_config(*, store_id: bytes, secret: bytes, tenants: Mapping[str, bytes]) -> StoreConfig:
    """What ``init`` writes. Secrets of tenants other than ``local`` leave only a check value."""
    for name, value in {"local": secret, **tenants}.items():
        if len(value) != SECRET_BYTES:
            raise IncompatibleError(
                "has a secret of the wrong length",
                object=f"tenant {name}",
                expected=f"{SECRET_BYTES} bytes",
                found=f"{len(value)}",
                code="bad-secret",
            )
    table: dict[str, dict[str, bytes]] = {name: {"check": check16(value)} for name, value in tenants.items()}
    table["local"] = {"secret": secret}
    return StoreConfig(store_id, table, {"read": (), "write": (), "prune": ()}, dict(CHUNKING))


def encode_config(config: StoreConfig) -> bytes:
    body = encode(
        {
            "format": FORMAT,
            "features": {name: list(values) for name, values in config.features.items()},
            "hash": "blake3",
            "store": config.store_id,
            "tenants": {name: dict(entry) for name, entry in config.tenants.items()},
            "chunking": dict(config.chunking),
        }
    )
    head = MAGIC + struct.pack("<I", len(body)) + body
    return head + hash32(head)


def decode_config(data: bytes) -> StoreConfig:
    """Raises ``CorruptionError``, or ``IncompatibleError`` for a newer format."""
    if not data.startswith(MAGIC) or len(data) < 12:
        raise _damaged("does not begin with the store's magic")
    end = 12 + int(struct.unpack_from("<I", data, 8)[0])
    if len(data) != end + 32 or hash32(data[:end]) != data[end:]:
        raise _damaged("its hash does not match")
    body = decode(data[12:end], max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(body, dict):
        raise _damaged("its body is no map")
    number = body.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise _damaged("it has no format number")
    if number > FORMAT:
        raise IncompatibleError(
            "is of a newer format",
            object="store",
            expected=f"format {FORMAT} or older",
            found=str(number),
            code="newer-format",
            hint="use a newer agentckpt",
        )
    if body.get("hash") != "blake3":
        raise IncompatibleError("uses another hash", object="store", expected="blake3", found=str(body.get("hash")), code="unknown-hash")
    return StoreConfig(_store_id(body), _tenants(body), _features(body), _chunking(body))


def read_config(io: IO, root: str) -> StoreConfig:
    """The config of the store at ``root``; ``NotFoundError`` (nothing there), ``StoreError`` (not a store, unreadable)."""
    try:
        return decode_config(read_file(io, f"{root}/config", MAX_CONFIG_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot be read ({error.strerror})", object=f"{root}/config", code="unreadable") from error
    if not io.exists(root):
        raise NotFoundError("there is no store", object=root, code="no-store", hint="create=True or `agentckpt init` makes one")
    raise StoreError(
        "is not a store: it has no config file", object=root, code="not-a-store", hint="a new store needs an absent or empty directory"
    )


def _damaged(what: str) -> CorruptionError:
    return CorruptionError(what, object="config", code="config-damaged")


def _store_id(body: Mapping[str, Value]) -> bytes:
    found = body.get("store")
    if not isinstance(found, bytes) or len(found) != STORE_ID_BYTES:
        raise _damaged("it has no store id")
    return found


def _tenants(body: Mapping[str, Value]) -> dict[str, dict[str, bytes]]:
    found: Any = body.get("tenants")
    if not isinstance(found, dict):
        raise _damaged("it has no tenants")
    for entry in found.values():
        secret = isinstance(entry, dict) and isinstance(entry.get("secret"), bytes) and len(entry["secret"]) == SECRET_BYTES
        check = isinstance(entry, dict) and isinstance(entry.get("check"), bytes) and len(entry["check"]) == 16
        if not (secret or check):
            raise _damaged("a tenant has neither secret nor check value")
    return found


def _features(body: Mapping[str, Value]) -> dict[str, tuple[str, ...]]:
    found = body.get("features")
    if not isinstance(found, dict) or not all(isinstance(v, list) and all(isinstance(t, str) for t in v) for v in found.values()):
        raise _damaged("it has no features")
    return {name: tuple(str(text) for text in values) for name, values in found.items() if isinstance(values, list)}


def _chunking(body: Mapping[str, Value]) -> dict[str, int]:
    found = body.get("chunking")
    if not isinstance(found, dict):
        return dict(CHUNKING)
    return {name: value for name, value in found.items() if isinstance(value, int)}
