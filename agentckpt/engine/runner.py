"""Forwards over the paged KV. Every one is a pure function of tokens, positions and what stands in the blocks.

Invariants:
1. Blocks that a forward writes belong to one sequence alone (the scheduler prepared them); padding rows are never written.
2. A piece of one sequence is a forward of its own, so its bytes depend on nothing else that runs.
3. Prefill and decode of the same text give other bytes. Which was used stands in the spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import attend_one, attend_rows, causal_mask
from .blocks import PagedKV
from .context import Context
from .model import Model
from .scoring import Tree, tree_mask


class Runner:
    """The model on one device, with one KV tensor."""

    def __init__(self, model: Model, kv: PagedKV) -> None:
        self.model = model
        self.kv = kv
        self.device = kv.device

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def piece(self, context: Context, start: int, num_rows: int, num_valid: int, *, logits: bool) -> Tensor | None:
        """Compute ``num_valid`` positions from ``start`` in a forward of ``num_rows`` rows; logits ``[1, vocab]`` of the last one.

        Rows beyond ``num_valid`` are padding: they make the products the same as they were when more tokens followed.
        """
        if num_rows == 1:
            return self.decode([(context, start)], logits=logits)
        table = self._ids(context.table)
        ids = self._ids([*context.tokens[start : start + num_valid], *[0] * (num_rows - num_valid)])
        positions = torch.arange(start, start + num_rows, device=self.device)
        size = self.kv.block_size
        blocks, slots = table[positions[:num_valid] // size], positions[:num_valid] % size
        mask = causal_mask(num_rows, start, self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k.to(self.kv.dtype), v.to(self.kv.dtype)
            self.kv.write(layer, blocks, slots, k[:num_valid], v[:num_valid])
            past = self.kv.read(layer, table[: -(-start // size)], start, extra=num_rows)
            past[0, :, start:] = k.transpose(0, 1)
            past[1, :, start:] = v.transpose(0, 1)
            return attend_rows(q.float(), past, mask).to(q.dtype)

        hidden = self.model.forward(ids, positions, attend)
        return self.model.logits(hidden[num_valid - 1 : num_valid]) if logits else None

    @torch.inference_mode()
    def decode(self, rows: Sequence[tuple[Context, int]], *, logits: bool = True) -> Tensor | None:
        """One position each of several sequences -> logits ``[len(rows), vocab]``."""
        size = self.kv.block_size
        ids = self._ids([context.tokens[position] for context, position in rows])
        positions = self._ids([position for _, position in rows])
        places = [(context.table[position // size], position % size) for context, position in rows]
        tables = [self._ids(context.table[: position // size + 1]) for context, position in rows]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            wide, mixed = q.float(), torch.empty_like(q)
            for row, (block, slot) in enumerate(places):
                self.kv.write_one(layer, block, slot, k[row], v[row])
                mixed[row] = attend_one(wide[row], self.kv.read(layer, tables[row], rows[row][1] + 1))
            return mixed

        hidden = self.model.forward(ids, positions, attend)
        return self.model.logits(hidden) if logits else None


class Branches:
    """One tree of candidates over a sequence's KV, forwarded in packs. Its own KV is scratch and is never written to blocks."""

    def __init__(self, runner: Runner, tree: Tree, *, pack_rows: int) -> None:
        self.runner = runner
        self.tree = tree
        self.pack_rows = pack_rows
        self.done = 0
        self.found: list[tuple[int, int, float]] = []
        """(candidate, index, log-probability)"""
        self._targets = 0
        kv = runner.kv
        _, heads, layers, planes, _, dim = kv.view.shape
        with torch.inference_mode():
            self._scratch = torch.empty((layers, planes, heads, len(tree), dim), dtype=torch.float32, device=runner.device)
            self._mask = tree_mask(tree, runner.device)

    @property
    def finished(self) -> bool:
        return self.done == len(self.tree)

    @torch.inference_mode()
    def step(self, context: Context) -> None:
        """Forward the next pack. ``context`` has KV for all but its last token, which is node 0."""
        runner, tree, length = self.runner, self.tree, context.valid
        first, end = self.done, min(self.done + self.pack_rows, len(self.tree))
        table = runner._ids(context.table)
        mask = torch.cat((torch.zeros((end - first, length), device=runner.device), self._mask[first:end, :end]), dim=1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own = self._scratch[layer, :, :, :end]
            own[0, :, first:] = k.to(runner.kv.dtype).transpose(0, 1)
            own[1, :, first:] = v.to(runner.kv.dtype).transpose(0, 1)
            past = runner.kv.read(layer, table, length, extra=end)
            past[:, :, length:] = own
            return attend_rows(q.float(), past, mask).to(q.dtype)

        positions = runner._ids([length + depth for depth in tree.depths[first:end]])
        hidden = runner.model.forward(runner._ids(tree.ids[first:end]), positions, attend)
        self._read(hidden, first, end)
        self.done = end

    def _read(self, hidden: Tensor, first: int, end: int) -> None:
        wanted = []
        while self._targets < len(self.tree.targets) and self.tree.targets[self._targets][0] < end:
            wanted.append(self.tree.targets[self._targets])
            self._targets += 1
        for start in range(0, end - first, 64):
            rows = [item for item in wanted if first + start <= item[0] < first + start + 64]
            logits = self.runner.model.logits(hidden[start : start + 64])
            nodes = self.runner._ids([item[0] - first - start for item in rows])
            chosen = logits[nodes, self.runner._ids([item[1] for item in rows])] - torch.logsumexp(logits, dim=-1)[nodes]
            self.found += [(item[2], item[3], value) for item, value in zip(rows, chosen.tolist(), strict=True)]
