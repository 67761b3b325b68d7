"""Choosing the next token. The draw is a function of (seed, lineage nonce, position, token id): there is no generator to save.

Each candidate token gets its own exponential variate E from a counter-based generator; the winner of the race is the token with the
smallest E / p, which falls on token i with probability p_i. It is computed as the largest ``logit / temperature - log E``.

Invariants:
1. Neither the row of the batch, nor the other rows, nor the order of a sort enters: candidates are chosen by comparing values with a
   threshold (equal values are kept together), and a candidate's draw depends on its own id alone.
2. The integers drawn are exact on every device (int64 arithmetic only). The race is run in float64, so two devices can disagree only if
   two of its values lie within some 1e-15 of each other.
3. Ties go to the lowest token id; temperature 0 is argmax.

Sources: Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and Random123's kat_vectors. The
exponential race is the Gumbel-max trick (Maddison et al., arXiv 1411.0030) written with -log of a uniform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import blake3
import torch
from torch import Tensor

from ..errors import AgentckptError, IncompatibleError

PURPOSE_TOKEN = 0
"""word 3 of the counter: what the draw decides. Other purposes take other numbers and never disturb these."""
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
UNIFORM_BITS = 52
"""(n + 1/2) / 2**52 is exact in float64 and never 0 or 1"""
RACE_SPAN = math.log(math.log(2.0) * (UNIFORM_BITS + 1)) + math.log(2.0) * (UNIFORM_BITS + 1)
"""largest minus smallest value of -log E: a logit further than this below the best can not win"""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence samples. ``top_k`` 0 and ``top_p`` 1 mean no limit; ``top_p`` applies to what ``top_k`` left.

    Raises ``IncompatibleError`` (a ``ValueError``) for values outside their ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "an integer, 0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed, isinstance(self.seed, int) and -(1 << 63) <= self.seed < 1 << 64, "a 64-bit integer"),
        )
        for name, value, good, expected in rules:
            if not good:
                raise IncompatibleError(code="bad-option", object=f"sampling: {name}", expected=expected, found=str(value))


@lru_cache(maxsize=4096)
def draw_key(seed: int, nonce: bytes) -> tuple[int, int]:
    """The two 32-bit key words for a seed and a lineage nonce: BLAKE3 of (seed mod 2**64, nonce), first 64 bits."""
    digest = blake3.blake3(
        (seed & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") + nonce, derive_key_context="agentckpt sampling key v1"
    ).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 elementwise: 4 counter words and 2 key words (int64 tensors of one shape, values below 2**32) -> 4 words.

    A product of two 32-bit words wraps in int64, but modulo 2**64: its bits are right, and the mask undoes the sign of the shift.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (right >> 32 & WORD) ^ b ^ first, right & WORD, (left >> 32 & WORD) ^ d ^ second, left & WORD
        first, second = (first + WEYL[0]) & WORD, (second + WEYL[1]) & WORD
    return a, b, c, d


def uniforms(positions: Tensor, tokens: Tensor, keys: Tensor, *, purpose: int = PURPOSE_TOKEN) -> Tensor:
    """One float64 in (0, 1) for each candidate: positions[n], tokens[n] int64, keys[n, 2] int64."""
    counter = (positions & WORD, positions >> 32 & WORD, tokens, torch.full_like(tokens, purpose))
    low, high, _, _ = philox(counter, (keys[:, 0], keys[:, 1]))
    whole = (high << 20) | (low >> 12)
    return (whole.double() + 0.5) * 2.0**-UNIFORM_BITS


@torch.inference_mode()
def sample(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], nonces: Sequence[bytes]
) -> tuple[list[int], list[float]]:
    """One token a row.

    logits: float32[B, V] on any device, not changed. ``positions[i]`` is the index that the new token will have in its sequence.
    Returns token ids, and their log-probability in nats under the model itself (log-softmax of the raw logits).
    Raises ``AgentckptError`` (code ``non-finite-logits``) if a row holds NaN or +inf, or nothing but -inf.
    """
    if not len(logits) == len(params) == len(positions) == len(nonces):
        sizes = f"{len(logits)}, {len(params)}, {len(positions)}, {len(nonces)}"
        raise IncompatibleError(code="bad-option", object="sample", expected="as many params, positions, nonces as rows", found=sizes)
    if len(logits) == 0:
        return [], []
    wide = logits.double()
    normaliser = torch.logsumexp(wide, dim=-1, keepdim=True)
    chosen = wide.argmax(dim=-1)
    racing = [row for row, param in enumerate(params) if param.temperature > 0]
    if racing:
        rows = torch.tensor(racing, device=logits.device)
        keys = [draw_key(params[row].seed, nonces[row]) for row in racing]
        chosen[rows] = _race(wide[rows], [params[row] for row in racing], [positions[row] for row in racing], keys)
    logprobs = (wide.gather(1, chosen[:, None]) - normaliser)[:, 0].float()
    values = logprobs.tolist()
    if not all(math.isfinite(value) for value in values):
        bad = [row for row, value in enumerate(values) if not math.isfinite(value)]
        raise AgentckptError("the model's logits are not finite", code="non-finite-logits", object=f"batch rows {bad}")
    return chosen.tolist(), values


def _race(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], keys: Sequence[tuple[int, int]]) -> Tensor:
    """float64[B, V] -> the winners, int64[B]. Every row's temperature is above 0."""
    device = logits.device
    temperature = torch.tensor([param.temperature for param in params], dtype=torch.float64, device=device)
    best = logits.max(dim=-1, keepdim=True).values
    scaled = (logits - best) / temperature[:, None]
    candidates = scaled >= torch.maximum(_threshold(scaled, params), torch.tensor(-RACE_SPAN, dtype=torch.float64, device=device))
    rows, tokens = candidates.nonzero(as_tuple=True)
    place = torch.tensor(positions, dtype=torch.int64, device=device)[rows]
    draws = uniforms(place, tokens, torch.tensor(keys, dtype=torch.int64, device=device)[rows])
    race = torch.full_like(scaled, -math.inf)
    race[rows, tokens] = scaled[rows, tokens] - (-draws.log()).log()
    return race.argmax(dim=-1)


def _threshold(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """float64[B, 1]: the smallest value that top-k and then top-p keep in each row."""
    lowest = torch.full((len(params), 1), -math.inf, dtype=torch.float64, device=scaled.device)
    limited = [row for row, param in enumerate(params) if 0 < param.top_k < scaled.shape[1]]
    if limited:
        counts = torch.tensor([params[row].top_k for row in limited], device=scaled.device)
        rows = torch.tensor(limited, device=scaled.device)
        top = scaled[rows].topk(max(params[row].top_k for row in limited), dim=-1).values
        lowest[rows] = top.gather(1, counts[:, None] - 1)
    nucleus = [row for row, param in enumerate(params) if param.top_p < 1]
    if nucleus:
        rows = torch.tensor(nucleus, device=scaled.device)
        share = torch.tensor([params[row].top_p for row in nucleus], dtype=torch.float64, device=scaled.device)
        kept = scaled[rows].masked_fill(scaled[rows] < lowest[rows], -math.inf).sort(dim=-1, descending=True).values
        probs = kept.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        count = (before < share[:, None]).sum(dim=-1).clamp(min=1)
        lowest[rows] = kept.gather(1, count[:, None] - 1)
    return lowest
