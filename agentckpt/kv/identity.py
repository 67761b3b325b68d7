"""The digests that say whether stored KV may be used (design: identity is three digests, never one).

- ``model_id`` comes with the loaded model. Another one is an error.
- ``kv_id``: another one means that KV is recomputed. Physical order, block size and tensor-parallel degree are not in it.
- ``numerics_id``: another one means that KV is used, and the report says ``compatible, not bit-exact``.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from blake3 import blake3

from ..nodes import encode
from .groups import Group


def kv_id(model_id: bytes, groups: Sequence[Group]) -> bytes:
    """32 bytes over the model and the shapes and dtypes of its KV (scales would be added here)."""
    shapes: Any = [group.body() for group in groups]
    return blake3(encode(["agentckpt kv_id 1", model_id, shapes])).digest()


def numerics_id(*, kernels: bytes, device: str, facts: Mapping[str, Any]) -> bytes:
    """32 bytes over everything that may change a bit of a result.

    ``kernels`` is the digest of the source of the code that computes; ``facts`` are the engine's own settings (piece size,
    compute dtype ...). Device or instruction set, library version and number of threads are added here.
    """
    return blake3(encode(["agentckpt numerics_id 1", kernels, _device_facts(device), dict(facts)])).digest()


def _device_facts(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"torch": str(torch.__version__), "kind": torch.device(device).type}
    if facts["kind"] == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        facts |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}", "cuda": str(torch.version.cuda)}
    else:
        facts |= {"isa": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    return facts
