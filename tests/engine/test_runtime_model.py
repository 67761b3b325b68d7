"""The runtime on SmolLM2-135M-Instruct: agreement with transformers, the determinism ladder, scores, stops, a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from agentckpt.engine import Engine
from agentckpt.engine.gguf_loader import open_gguf
from agentckpt.engine.load import LoadedModel, resolve
from agentckpt.engine.sequence import Sequence as LiveSequence
from tests.kv.support import DictStore

pytestmark = pytest.mark.model
PROMPT = "def binary_search(items, target):\n    low, high = 0, len(items) - 1\n    while low <= high:\n"


@pytest.fixture(scope="module")
def engine(smollm2: LoadedModel) -> Iterator[Engine]:
    with Engine(smollm2, num_blocks=256) as made:
        yield made
        made.check()


@pytest.fixture(scope="module")
def exact(smollm2: LoadedModel) -> Iterator[Engine]:
    with Engine(smollm2, num_blocks=128, kv_dtype="f32", max_batch_tokens=128) as made:
        yield made
        made.check()


def kv_bytes(engine: Engine, sequence: LiveSequence) -> list[bytes]:
    assert sequence.context.valid == sequence.num_computed
    return [bytes(view) for view in engine.kv.gather(sequence.context.runs(0, sequence.num_computed))]


def opened(engine: Engine, item: object = PROMPT) -> LiveSequence:
    sequence = engine.open_sequence(nonce=b"n" * 16)
    sequence.append(item)  # type: ignore[arg-type]
    return sequence


def test_greedy_text_with_f32_kv_equals_transformers(exact: Engine) -> None:
    transformers = pytest.importorskip("transformers")
    config, source, _ = open_gguf(resolve("smollm2-135m-instruct"))
    reference_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, eos_token_id=2, pad_token_id=2, bos_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(reference_config)
    state = {name: source.get(name) for name in source.shapes()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference.load_state_dict(state, assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference_config)
    sequence = opened(exact)
    ids = list(sequence.tokens)
    with torch.inference_mode():
        expected = reference.eval().generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
    made = sequence.generate(max_tokens=24).result(120)
    assert list(made.ids) == expected[len(ids) :]
    sequence.close()


def test_a_chat_of_two_turns(engine: Engine) -> None:
    sequence = opened(engine, {"role": "user", "content": "What is the capital of France?"})
    first = sequence.generate(max_tokens=20).result(60)
    assert (first.text, first.stop_reason) == ("The capital of France is Paris.", "eos")
    sequence.append({"role": "user", "content": "And of Italy?"})
    second = sequence.generate(max_tokens=20).result(60)
    assert "Rome" in second.text
    rendered = engine.tokenizer.render(
        [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And of Italy?"},
        ],
        add_generation_prompt=True,
    )
    assert engine.tokenizer.decode(sequence.tokens) == rendered + engine.tokenizer.decode(second.ids)
    sequence.close()


def test_a_stop_string_ends_the_text(engine: Engine) -> None:
    free = opened(engine).generate(max_tokens=30).result(60)
    stop = free.text[12:16]
    made = opened(engine).generate(max_tokens=30, stop=stop).result(60)
    assert made.stop_reason == "stop"
    assert made.text == free.text[: free.text.index(stop)]
    assert made.ids == free.ids[: len(made.ids)]
    assert stop in engine.tokenizer.decode(made.ids)
    assert stop not in engine.tokenizer.decode(made.ids[:-1])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 11}])
def test_the_ladder_restored_bytes_logits_continuation(engine: Engine, smollm2: LoadedModel, options: dict[str, float]) -> None:
    store = DictStore()
    sequence = opened(engine)
    sequence.generate(max_tokens=8, **options).result(60)  # type: ignore[arg-type]
    sequence.append("\n    # a comment\n" * 5)
    sequence.generate(max_tokens=12, **options).result(60)  # type: ignore[arg-type]
    ref = sequence.capture(store, None).write().ref
    before = kv_bytes(engine, sequence)
    with Engine(smollm2, num_blocks=64, block_size=32, kv_order="layer") as other:
        twin = other.open_sequence(nonce=b"n" * 16)
        report = twin.prepare(store, ref).commit()
        assert report.continuation == "exact"
        assert kv_bytes(other, twin) == before, "rung a"
        logits = [one_more(one, engine_of) for one, engine_of in ((sequence, engine), (twin, other))]
        assert torch.equal(logits[0], logits[1]), "rung b"
        ends = [one.generate(max_tokens=12, **options).result(60) for one in (sequence, twin)]  # type: ignore[arg-type]
        assert ends[0] == ends[1], "rung c"
        assert kv_bytes(engine, sequence) == kv_bytes(other, twin)
    sequence.close()


def one_more(sequence: LiveSequence, engine: Engine) -> torch.Tensor:
    """Next-token logits of a fork, decoded alone."""
    fork = sequence.fork(1)[0]
    with engine.lock:
        fork.context.prepare(fork.context.computed + 1)
    logits = engine._runner.decode([(fork.context, fork.context.computed)])
    fork.context.trim()
    fork.close()
    assert logits is not None
    return logits


def test_recompute_along_the_spans_is_bit_equal(smollm2: LoadedModel) -> None:
    store = DictStore()
    with Engine(smollm2, num_blocks=64, max_batch_tokens=64) as engine:
        sequence = opened(engine, engine.tokenizer.encode(PROMPT * 9)[:200])
        sequence.generate(max_tokens=4).result(60)
        sequence.truncate(150)  # in the middle of a piece
        sequence.append("\n    middle = (low + high) // 2\n")
        sequence.generate(max_tokens=6).result(60)
        before = kv_bytes(engine, sequence)
        ref = sequence.capture(store, None).write().ref
    del store.objects[store.chunks(ref)[1][1]]
    with Engine(smollm2, num_blocks=64, max_batch_tokens=64) as other:
        twin = other.open_sequence(nonce=b"n" * 16)
        report = twin.prepare(store, ref).commit()
        assert (report.restored, report.recomputed) == (64, len(twin.tokens) - 65)
        assert report.continuation == "exact"
        assert kv_bytes(other, twin) == before
        fast = other.open_sequence().prepare(store, ref, recompute="fast")
        assert fast.commit().continuation == "prefix-equivalent"


def test_scores_equal_independent_forwards(exact: Engine) -> None:
    sequence = opened(exact)
    candidates = [
        "        middle = (low + high) // 2\n",
        "        middle = (low - high) // 2\n",
        "        middle = low\n",
        "        return\n",
    ]
    scores = sequence.score(candidates).result(60)
    for candidate, score in zip(candidates, scores, strict=True):
        ids = exact.tokenizer.encode(candidate)
        alone = opened(exact)
        forced = alone.generate(forced=ids).result(60)
        assert list(score.logprobs) == pytest.approx(list(forced.logprobs), abs=1e-4)
        alone.close()
    assert scores[0].total == max(score.total for score in scores[:2])
    sequence.close()


def test_branches_go_their_own_ways(engine: Engine) -> None:
    sequence = opened(engine)
    sequence.generate(max_tokens=3).result(60)
    before = kv_bytes(engine, sequence)
    forks = sequence.fork(4, nonces=[bytes([i]) * 16 for i in range(4)])
    made = [handle.result(60).ids for handle in [fork.generate(max_tokens=12, temperature=1.2, seed=1) for fork in forks]]
    assert len(set(made)) == 4
    assert kv_bytes(engine, sequence) == before
    again = [one.generate(max_tokens=12, temperature=1.2, seed=1) for one in sequence.fork(4, nonces=[bytes([i]) * 16 for i in range(4)])]
    assert [handle.result(60).ids for handle in again] == made


def test_long_contexts_cross_pieces(exact: Engine) -> None:
    ids: Sequence[int] = exact.tokenizer.encode(PROMPT * 15)[:300]
    sequence = opened(exact, ids)
    made = sequence.generate(max_tokens=2).result(120)
    assert sequence.spans == [(0, 300, "append"), (300, 1, "decode")]
    scored = opened(exact, ids[:170])
    score = scored.score([[*ids[170:], made.ids[0]]]).result(120)[0]
    assert score.logprobs[-1] == pytest.approx(made.logprobs[0], abs=1e-3)
