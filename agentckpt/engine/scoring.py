"""Candidates as one tree of tokens, so that a common prefix is computed once and all branches go through in one forward.

Node 0 is the last token of the sequence; a node's parent is the token before it. The log-probability of a candidate's token
is read at its parent, so a candidate's last token needs no forward unless it is the prefix of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Tree:
    """Parents stand before their children; ``depths`` count from node 0."""

    ids: list[int]
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    targets: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(node, token, candidate, index in the candidate), in order of nodes once ``build`` returned"""

    def __len__(self) -> int:
        return len(self.ids)


def build(last: int, candidates: Sequence[tuple[int, Sequence[int]]]) -> Tree:
    """The tree of (candidate number, ids) behind the token ``last``."""
    tree = Tree([last])
    children: dict[tuple[int, int], int] = {}
    for number, ids in candidates:
        node = 0
        for index, token in enumerate(ids):
            tree.targets.append((node, token, number, index))
            if index + 1 == len(ids):
                break
            child = children.setdefault((node, token), len(tree))
            if child == len(tree):
                tree.ids.append(token)
                tree.parents.append(node)
                tree.depths.append(tree.depths[node] + 1)
            node = child
    tree.targets.sort()
    return tree


def group(last: int, candidates: Sequence[Sequence[int]], max_nodes: int) -> list[Tree]:
    """Trees of at most ``max_nodes`` nodes (more only where one candidate alone is longer); neighbours share prefixes."""
    order = sorted(range(len(candidates)), key=lambda number: list(candidates[number]))
    trees: list[Tree] = []
    pending: list[tuple[int, Sequence[int]]] = []
    size = 0
    for number in order:
        if pending and size + len(candidates[number]) > max_nodes:
            trees.append(build(last, pending))
            pending, size = [], 0
        pending.append((number, candidates[number]))
        before = candidates[pending[-2][0]] if len(pending) > 1 else ()
        size += len(candidates[number]) - _common(before, candidates[number])
    return [*trees, build(last, pending)] if pending else trees


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


def tree_mask(tree: Tree, device: torch.device) -> torch.Tensor:
    """Additive f32 ``[nodes, nodes]``: 0 where the column is the row itself or an ancestor, else -inf."""
    mask = torch.full((len(tree), len(tree)), float("-inf"))
    for node, parent in enumerate(tree.parents):
        if node:
            mask[node, : parent + 1] = mask[parent, : parent + 1]
        mask[node, node] = 0.0
    return mask.to(device)
