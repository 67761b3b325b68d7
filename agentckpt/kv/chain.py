"""Prefix identity: a chain of links over 16 tokens each (FORMAT.md section 6, "Chain links").

A link names a text from its start under one kv_id and one tenant. It is a hint for reuse, never an address: decode and
prefill of the same text give other bytes. Links end at multiples of 16 tokens whatever the engine's block size, so every
engine meets the same keys.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from blake3 import blake3

LINK_TOKENS = 16
CONTEXT = "agentckpt v1 chain"


def seed(tenant_key: bytes, kv_id: bytes) -> bytes:
    """``link(-1)``: 32 bytes from the tenant's secret and the kv_id."""
    return blake3(kv_id, key=blake3(tenant_key, derive_key_context=CONTEXT).digest()).digest()


def extend(link: bytes, tokens: Sequence[int]) -> bytes:
    """The link after ``tokens`` (exactly 16 of them)."""
    if len(tokens) != LINK_TOKENS:
        raise ValueError(f"a link covers {LINK_TOKENS} tokens, not {len(tokens)}")
    return blake3(link + struct.pack("<16I", *tokens)).digest()


def grow(links: list[bytes], start: bytes, tokens: Sequence[int], length: int) -> None:
    """Extend ``links`` in place so that it covers the whole links among the first ``length`` tokens."""
    for index in range(len(links), length // LINK_TOKENS):
        before = links[-1] if links else start
        links.append(extend(before, tokens[index * LINK_TOKENS : (index + 1) * LINK_TOKENS]))
