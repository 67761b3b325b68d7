"""The sampler draws what Philox says, samples what the softmax says, and never looks at a row's neighbours."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentckpt.engine.sampler import RACE_SPAN, SamplingParams, _threshold, draw_key, philox, sample, uniforms
from agentckpt.errors import AgentckptError, IncompatibleError

NONCE = bytes(range(16))
# Random123's kat_vectors, philox4x32 with 10 rounds: counter (4 words), key (2 words), result (4 words).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, on Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


def scalar_race(logits: list[float], param: SamplingParams, position: int, nonce: bytes) -> int:
    """The whole of sampling without top-k and top-p, token by token."""
    key = list(draw_key(param.seed, nonce))
    best, winner = -math.inf, -1
    for token, logit in enumerate(logits):
        low, high, _, _ = scalar_philox([position % (1 << 32), position >> 32, token, 0], key)
        uniform = (((high << 20) | (low >> 12)) + 0.5) / (1 << 52)
        value = (logit - max(logits)) / param.temperature - math.log(-math.log(uniform))
        if value > best:
            best, winner = value, token
    return winner


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    assert scalar_philox(words(counter), words(key)) == words(expected)
    found = philox([torch.tensor([word]) for word in words(counter)], [torch.tensor([word]) for word in words(key)])
    assert [int(word) for word in found] == words(expected)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
@settings(max_examples=200, deadline=None)
def test_philox_in_int64_equals_philox_in_integers(values: list[int]) -> None:
    found = philox([torch.tensor([word]) for word in values[:4]], [torch.tensor([word]) for word in values[4:]])
    assert [int(word) for word in found] == scalar_philox(values[:4], values[4:])


def test_uniforms_lie_strictly_between_0_and_1_and_are_fair() -> None:
    n = 200_000
    tokens = torch.arange(n)
    draws = uniforms(torch.full((n,), 123), tokens, torch.tensor([draw_key(1, NONCE)]).expand(n, 2))
    assert draws.dtype == torch.float64
    assert 0 < draws.min() < draws.max() < 1
    counts = torch.histc(draws, 100, 0, 1)
    chi_square = ((counts - n / 100) ** 2 / (n / 100)).sum().item()
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)
    extremes = torch.tensor([0.5, 2.0**52 - 0.5], dtype=torch.float64) * 2.0**-52
    race = -(-extremes.log()).log()
    assert race.isfinite().all()
    assert (race[1] - race[0]).item() == pytest.approx(RACE_SPAN, abs=1e-9)


def test_a_row_is_the_scalar_race() -> None:
    rng = random.Random(4)
    logits = torch.tensor([[rng.gauss(0, 3) for _ in range(300)] for _ in range(12)])
    params = [SamplingParams(temperature=rng.choice([0.3, 1.0, 2.0]), seed=rng.randrange(-5, 1 << 63)) for _ in range(12)]
    positions = [rng.choice([0, 1, 7, 2**31, 2**32 + 5]) for _ in range(12)]
    nonces = [rng.randbytes(16) for _ in range(12)]
    ids, _ = sample(logits, params, positions, nonces)
    assert ids == [scalar_race(row.tolist(), *rest) for row, *rest in zip(logits, params, positions, nonces)]


def mixed_batch(rows: int, seed: int) -> tuple[torch.Tensor, list[SamplingParams], list[int], list[bytes]]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    logits = torch.randn(rows, 700) * 3
    logits[::3] = (logits[::3] * 2).round() / 2  # many equal values
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 0.5, 1.0, 1.7]), top_k=rng.choice([0, 1, 5, 50, 5000]),
            top_p=rng.choice([1.0, 0.95, 0.5, 1e-9]), seed=rng.randrange(9),
        )
        for _ in range(rows)
    ]  # fmt: skip
    return logits, params, [rng.randrange(5000) for _ in range(rows)], [rng.randbytes(16) for _ in range(rows)]


def test_neither_row_nor_neighbours_enter() -> None:
    logits, params, positions, nonces = mixed_batch(60, 1)
    ids, logprobs = sample(logits, params, positions, nonces)
    order = list(range(60))
    random.Random(2).shuffle(order)
    pick = [[list_[i] for i in order] for list_ in (params, positions, nonces)]
    shuffled_ids, shuffled_logprobs = sample(logits[order], *pick)
    assert shuffled_ids == [ids[i] for i in order]
    assert shuffled_logprobs == [logprobs[i] for i in order]
    for row in range(60):
        alone = sample(logits[row : row + 1], params[row : row + 1], positions[row : row + 1], nonces[row : row + 1])
        assert alone == ([ids[row]], [logprobs[row]])


def test_every_part_of_the_key_and_the_counter_matters() -> None:
    logits = torch.zeros(1, 4096)
    base = sample(logits, [SamplingParams(temperature=1.0, seed=1)], [10], [NONCE])[0]
    assert base == sample(logits, [SamplingParams(temperature=1.0, seed=1)], [10], [NONCE])[0]
    others = [
        sample(logits, [SamplingParams(temperature=1.0, seed=2)], [10], [NONCE])[0],
        sample(logits, [SamplingParams(temperature=1.0, seed=1)], [11], [NONCE])[0],
        sample(logits, [SamplingParams(temperature=1.0, seed=1)], [10 + (1 << 32)], [NONCE])[0],
        sample(logits, [SamplingParams(temperature=1.0, seed=1)], [10], [NONCE[::-1]])[0],
    ]
    assert len({tuple(ids) for ids in [base, *others]}) == 5


def test_the_draws_are_those_of_version_1() -> None:
    """A change here changes what every stored session would draw after a restore."""
    logits = torch.linspace(-2, 2, 1000)[None]
    params = SamplingParams(temperature=1.0, seed=7)
    assert draw_key(7, NONCE) == PINNED_KEY
    assert [sample(logits, [params], [position], [NONCE])[0][0] for position in range(8)] == PINNED_IDS


PINNED_KEY = (2229155895, 994382646)
PINNED_IDS = [944, 821, 896, 314, 863, 795, 644, 937]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_the_race_samples_the_softmax(temperature: float) -> None:
    probs = torch.tensor([0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])
    n = 20_000
    params = [SamplingParams(temperature=temperature, seed=3)] * n
    ids, _ = sample(probs.log().expand(n, 8), params, range(n), [NONCE] * n)
    expected = (probs.log().double() / temperature).softmax(0) * n
    counts = torch.bincount(torch.tensor(ids), minlength=8)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 7 + 5 * math.sqrt(2 * 7)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    ids, logprobs = sample(logits, [SamplingParams()] * 2, [0, 0], [NONCE] * 2)
    assert ids == [1, 0]
    assert logprobs == pytest.approx([logits[0].log_softmax(0)[1].item(), -math.log(4)])


def test_logprobs_are_the_models_own_whatever_the_temperature() -> None:
    logits, params, positions, nonces = mixed_batch(40, 5)
    ids, logprobs = sample(logits, params, positions, nonces)
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_only_what_top_k_and_top_p_keep_is_drawn() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, -1.0]])
    n = 600
    for param, allowed in [
        (SamplingParams(temperature=5.0, top_k=2), {0, 1}),
        (SamplingParams(temperature=5.0, top_k=1), {0}),
        (SamplingParams(temperature=5.0, top_p=1e-9), {0}),
        (SamplingParams(temperature=1.0, top_p=0.64), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.63), {0}),
        (SamplingParams(temperature=5.0, top_k=3, top_p=0.999), {0, 1, 2}),
        (SamplingParams(temperature=5.0, top_k=99), {0, 1, 2, 3, 4, 5}),
    ]:
        ids, _ = sample(logits.expand(n, 6), [param] * n, range(n), [NONCE] * n)
        assert set(ids) == allowed, param


def test_values_equal_to_the_last_one_kept_are_kept_too() -> None:
    """So that the order in which a sort leaves equal values never matters."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    n = 400
    for param in (SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0, top_p=0.5)):
        ids, _ = sample(logits.expand(n, 5), [param] * n, range(n), [NONCE] * n)
        assert set(ids) == {0, 1, 2, 3}


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(seed: int) -> None:
    torch.manual_seed(seed)
    scaled = torch.randn(1, 50, dtype=torch.float64) * 2
    top_p = 0.05 + 0.9 * (seed % 97) / 97
    kept = scaled[0] >= _threshold(scaled, [SamplingParams(temperature=1.0, top_p=top_p)])[0]
    probs = scaled[0].softmax(0)
    assert probs[kept].sum() >= top_p - 1e-12
    assert probs[kept].sum() - probs[kept].min() < top_p


def test_masked_tokens_are_never_chosen_and_broken_logits_are_refused() -> None:
    masked = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]]).expand(200, 4)
    ids, _ = sample(masked, [SamplingParams(temperature=3.0)] * 200, range(200), [NONCE] * 200)
    assert set(ids) == {1, 3}
    for bad in ([0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]):
        for param in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)):
            with pytest.raises(AgentckptError, match="not finite"):
                sample(torch.tensor([[1.0, 2.0], bad]), [param] * 2, [0, 0], [NONCE] * 2)


def test_options_out_of_range_are_refused() -> None:
    for options in (
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_p": math.nan}, {"seed": 1 << 64}, {"seed": 1.0}, {"top_k": 1.5},
    ):  # fmt: skip
        with pytest.raises(IncompatibleError, match="sampling"):
            SamplingParams(**options)
    with pytest.raises(IncompatibleError, match="rows"):
        sample(torch.zeros(2, 3), [SamplingParams()], [0], [NONCE])
    assert sample(torch.zeros(0, 3), [], [], []) == ([], [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_tokens() -> None:
    logits, params, positions, nonces = mixed_batch(200, 9)
    ids, logprobs = sample(logits, params, positions, nonces)
    cuda_ids, cuda_logprobs = sample(logits.cuda(), params, positions, nonces)
    assert cuda_ids == ids
    assert cuda_logprobs == pytest.approx(logprobs, abs=1e-6)
    tokens, keys = torch.arange(5000), torch.tensor([draw_key(3, NONCE)]).expand(5000, 2)
    place = torch.full((5000,), 77)
    assert torch.equal(uniforms(place, tokens, keys), uniforms(place.cuda(), tokens.cuda(), keys.cuda()).cpu())
