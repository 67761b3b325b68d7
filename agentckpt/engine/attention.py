"""Attention of new rows over the paged KV, in f32, grouped queries together. Torch operations only.

K and V that a row attends to are always the values rounded to the KV dtype, whether they come from the pool or from the
same forward. Each sequence has operations of its own, so that no sequence's bytes depend on who is beside it here.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend_rows(q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``q[T, Hq, D]`` over ``kv[2, Hkv, S, D]`` -> ``[T, Hq, D]``.

    ``mask[T, S]`` is added to the scores (0 or -inf). None means causal over rows that are all of the sequence (T = S).
    """
    rows, heads, dim = q.shape
    kv_heads, length = kv.shape[1], kv.shape[2]
    group = heads // kv_heads
    grouped = q.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3)
    keys = kv[0].unsqueeze(1).expand(kv_heads, group, length, dim)
    values = kv[1].unsqueeze(1).expand(kv_heads, group, length, dim)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3).reshape(rows, heads, dim)


def attend_one(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """One row ``q[Hq, D]`` over all of ``kv[2, Hkv, S, D]`` -> ``[Hq, D]``."""
    heads, dim = q.shape
    kv_heads = kv.shape[1]
    grouped = q.view(kv_heads, 1, heads // kv_heads, dim)
    return scaled_dot_product_attention(grouped, kv[0].unsqueeze(1), kv[1].unsqueeze(1)).reshape(heads, dim)


def causal_mask(num_rows: int, context: int, device: torch.device) -> torch.Tensor | None:
    """Additive mask of ``num_rows`` rows behind ``context`` tokens; None where plain causal attention is meant."""
    if context == 0:
        return None
    columns = torch.arange(context + num_rows, device=device)
    rows = torch.arange(context, context + num_rows, device=device)
    return torch.zeros((num_rows, context + num_rows), device=device).masked_fill_(columns[None, :] > rows[:, None], float("-inf"))
