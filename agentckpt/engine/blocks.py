"""Which block belongs to whom: counts, pins, and the paged KV tensor itself.

Invariants:
1. free + used = total; a block is used while a sequence refers to it or a capture pins it.
2. A slot is written only by the one sequence that refers to the block, and only at or beyond every pinned length;
   any other write goes to a copy (``writable`` says which).
3. ``version`` of a block changes whenever bytes below its filled length stop being what they were: when the block is given
   out anew, and when a slot below the filled length is written. (block, version) therefore names bytes.
4. A freed block keeps its bytes until it is given out again, oldest first, so that a later look-up can revive it.

Nothing here is thread-safe: the engine's lock guards it. The bytes below a pinned length may be read without the lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch

from ..errors import CapacityError
from ..kv.capture import Run
from ..kv.groups import Group

Order = Literal["block", "layer"]
KV_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
BlockName = tuple[int, int]
"""(block, version)"""


class BlockPool:
    """Counts of ``num_blocks`` blocks of ``block_size`` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.refs = [0] * num_blocks
        self.version = [0] * num_blocks
        self.filled = [0] * num_blocks
        self._pins: dict[int, list[int]] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_pinned(self) -> int:
        """Blocks that a capture holds."""
        return len(self._pins)

    def allocate(self) -> int:
        """A block for one sequence, the one freed longest ago. Raises ``CapacityError`` when none is free."""
        if not self._free:
            raise CapacityError(object="KV pool", expected="a free block", found=f"all {self.num_blocks} in use")
        block, _ = self._free.popitem(last=False)
        self.refs[block] = 1
        self.version[block] += 1
        self.filled[block] = 0
        return block

    def share(self, block: int) -> None:
        """One more sequence refers to ``block``, which may be free but must still hold its bytes (``names`` says so)."""
        self._free.pop(block, None)
        self.refs[block] += 1

    def release(self, block: int) -> None:
        if self.refs[block] < 1:
            raise AssertionError(f"block {block} released more often than taken")
        self.refs[block] -= 1
        self._free_if_unused(block)

    def pin(self, block: int, length: int) -> None:
        """Keep the first ``length`` slots of ``block`` as they are until ``unpin``."""
        self._pins.setdefault(block, []).append(length)

    def unpin(self, block: int, length: int) -> None:
        lengths = self._pins[block]
        lengths.remove(length)
        if not lengths:
            del self._pins[block]
            self._free_if_unused(block)

    def _free_if_unused(self, block: int) -> None:
        if self.refs[block] == 0 and block not in self._pins:
            self._free[block] = None

    def pinned_length(self, block: int) -> int:
        return max(self._pins.get(block, (0,)))

    def writable(self, block: int, slot: int) -> bool:
        """May its one sequence write ``slot`` in place?"""
        return self.refs[block] == 1 and slot >= self.pinned_length(block)

    def note_write(self, block: int, first: int, end: int) -> None:
        """Slots ``first`` to ``end`` are about to be written."""
        if first < self.filled[block]:
            self.version[block] += 1
        self.filled[block] = end

    def name(self, block: int) -> BlockName:
        return block, self.version[block]

    def holds(self, name: BlockName, length: int) -> bool:
        """Does the block still hold the ``length`` slots that were meant by ``name``?"""
        return self.version[name[0]] == name[1] and self.filled[name[0]] >= length

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Raise ``AssertionError`` unless counts and free list agree with the tables of all sequences."""
        refs = [0] * self.num_blocks
        for table in tables:
            for block in table:
                refs[block] += 1
        wrong = [block for block in range(self.num_blocks) if refs[block] != self.refs[block]]
        if wrong:
            raise AssertionError(f"blocks {wrong[:8]}: counted {[refs[b] for b in wrong[:8]]}, noted {[self.refs[b] for b in wrong[:8]]}")
        used = {block for block in range(self.num_blocks) if refs[block] or block in self._pins}
        if used & self._free.keys() or len(used) + len(self._free) != self.num_blocks:
            raise AssertionError(f"{len(used)} used + {len(self._free)} free != {self.num_blocks} blocks")
        if any(length > self.filled[block] for block, lengths in self._pins.items() for length in lengths):
            raise AssertionError("a pin reaches beyond what its block holds")


class PagedKV:
    """The one KV tensor, seen as ``[block, head, layer, plane, token, dim]`` whatever its physical order.

    ``order="block"`` makes a block one contiguous run; ``order="layer"`` puts layers and planes outermost.
    K is plane 0 and V plane 1. Values are rounded to ``dtype`` when they are written, before anything attends to them.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        group: Group,
        device: torch.device,
        order: Order = "block",
    ) -> None:
        self.block_size = block_size
        self.groups: tuple[Group, ...] = (group,)
        self.device = device
        self.dtype = KV_DTYPES[group.planes[0].dtype]
        num_layers, dim = len(group.layers), group.planes[0].shape[0]
        shape = (num_blocks, group.heads, num_layers, 2, block_size, dim)
        if order == "layer":
            shape = (num_layers, 2, num_blocks, group.heads, block_size, dim)
        with torch.inference_mode(False):
            stored = torch.zeros(shape, dtype=self.dtype, device=device)
        self.view = stored if order == "block" else stored.permute(2, 3, 0, 1, 4, 5)
        self._layers = [self.view[:, :, layer] for layer in range(num_layers)]

    @property
    def num_bytes(self) -> int:
        return self.view.numel() * self.view.element_size()

    def write(self, layer: int, blocks: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store ``k`` and ``v`` ``[T, head, dim]`` at (``blocks[T]``, ``slots[T]``)."""
        view = self._layers[layer]
        view[blocks, :, 0, slots] = k.to(self.dtype)
        view[blocks, :, 1, slots] = v.to(self.dtype)

    def write_one(self, layer: int, block: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store one token's ``k`` and ``v`` ``[head, dim]``."""
        cell = self._layers[layer][block, :, :, slot]
        cell[:, 0] = k
        cell[:, 1] = v

    def read(self, layer: int, table: torch.Tensor, length: int, extra: int = 0) -> torch.Tensor:
        """f32 ``[plane, head, length + extra, dim]`` of the first ``length`` tokens of the blocks in ``table``.

        The last ``extra`` rows are left for the caller to fill.
        """
        size = self.block_size
        view = self._layers[layer]
        num_blocks, heads, planes, _, dim = table.numel(), *view.shape[1:]
        if extra == 0:
            out = torch.empty((planes, heads, num_blocks, size, dim), dtype=torch.float32, device=self.device)
            out.copy_(view.index_select(0, table).permute(2, 1, 0, 3, 4))
            return out.view(planes, heads, num_blocks * size, dim)[:, :, :length]
        flat = torch.empty((planes, heads, length + extra, dim), dtype=torch.float32, device=self.device)
        if length:
            whole = view.index_select(0, table).permute(2, 1, 0, 3, 4).reshape(planes, heads, num_blocks * size, dim)
            flat[:, :, :length] = whole[:, :, :length]
        return flat

    def copy_block(self, source: int, target: int) -> None:
        self.view[target].copy_(self.view[source])

    def gather(self, runs: Sequence[Run]) -> list[memoryview]:
        """One buffer a head, ``[layer, plane, token, dim]``; reads pinned slots and needs no lock."""
        count = sum(run[2] for run in runs)
        staged, views = self.staging(count)
        done = 0
        with torch.inference_mode():
            for block, slot, length in runs:
                staged[:, :, :, done : done + length].copy_(self.view[block, :, :, :, slot : slot + length])
                done += length
        return views

    def staging(self, num_tokens: int) -> tuple[torch.Tensor, list[memoryview]]:
        """Host memory ``[head, layer, plane, token, dim]``, and the bytes of each head."""
        _, heads, layers, planes, _, dim = self.view.shape
        with torch.inference_mode(False):
            staged = torch.empty((heads, layers, planes, num_tokens, dim), dtype=self.dtype)
        flat = staged.view(torch.uint8).view(heads, -1).numpy()
        return staged, [memoryview(flat[head]) for head in range(heads)]

    def scatter(self, runs: Sequence[Run], staged: torch.Tensor) -> None:
        """The reverse of ``gather``."""
        done = 0
        with torch.inference_mode():
            for block, slot, count in runs:
                self.view[block, :, :, :, slot : slot + count].copy_(staged[:, :, :, done : done + count])
                done += count
