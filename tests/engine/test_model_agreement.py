"""The model computes what transformers computes on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentckpt.engine.gguf_loader import open_gguf
from agentckpt.engine.load import LoadedModel, load_model, resolve

transformers = pytest.importorskip("transformers")
LogitsOf = Callable[[LoadedModel, list[list[int]]], list[Tensor]]


@pytest.mark.model
def test_smollm2_agrees_with_transformers_over_a_few_hundred_tokens(smollm2: LoadedModel, logits_of: LogitsOf, text: str) -> None:
    config, source, _ = open_gguf(resolve("smollm2-135m-instruct"))
    reference_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(reference_config)
    state = {name: source.get(name) for name in source.shapes()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference.load_state_dict(state, assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference_config)
    ids = smollm2.tokenizer.encode(text + text)
    assert len(ids) > 400
    with torch.inference_mode():
        expected = reference.eval()(torch.tensor([ids])).logits[0]
    found = logits_of(smollm2, [ids])[0]
    assert (found - expected).abs().max().item() < 1e-3
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.model
def test_smollm2_answers_a_question(smollm2: LoadedModel, logits_of: LogitsOf) -> None:
    """Rows of q and k in the wrong order would leave shapes right and the words wrong."""
    tokenizer = smollm2.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.encode(tokenizer.render(question, add_generation_prompt=True))
    answer: list[int] = []
    while not answer or answer[-1] not in tokenizer.eos_ids:
        answer.append(int(logits_of(smollm2, [ids + answer])[0][-1].argmax()))
        assert len(answer) < 12
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_tiny_model_agrees_with_transformers(name: str, tiny_models: dict[str, Path], logits_of: LogitsOf) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_models[name], dtype=torch.float32, attn_implementation="eager")
    loaded = load_model(tiny_models[name])
    ids = torch.randint(0, 512, (300,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    found = logits_of(loaded, [ids.tolist()])[0]
    assert found.abs().max() > 1
    assert (found - expected).abs().max().item() < 1e-3
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_sequences_of_one_flat_batch_do_not_meet(tiny_models: dict[str, Path], logits_of: LogitsOf) -> None:
    loaded = load_model(tiny_models["qwen3"])
    sequences = [list(range(20)), list(range(100, 107)), [5]]
    for together, ids in zip(logits_of(loaded, sequences), sequences):
        torch.testing.assert_close(together, logits_of(loaded, [ids])[0], atol=1e-4, rtol=1e-4)


def test_half_precision_stays_near(tiny_models: dict[str, Path], logits_of: LogitsOf) -> None:
    ids = list(range(50))
    exact = logits_of(load_model(tiny_models["llama"]), [ids])[0]
    rounded = logits_of(load_model(tiny_models["llama"], dtype="bfloat16"), [ids])[0]
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().mean() < 0.1 * exact.abs().mean()


def test_the_older_spelling_of_rope_reads_the_same(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from agentckpt.engine.config import config_from_hf

    raw = json.loads((tiny_models["llama"] / "config.json").read_text())
    new = config_from_hf(raw, origin="new")
    rope = raw.pop("rope_parameters")
    old = config_from_hf(raw | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}, origin="old")
    assert new == old
    assert new.rope_scaling is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_cuda_agrees_with_the_cpu(name: str, tiny_models: dict[str, Path], logits_of: LogitsOf) -> None:
    ids = list(range(300))
    expected = logits_of(load_model(tiny_models[name]), [ids])[0]
    loaded = load_model(tiny_models[name], device="cuda")

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    hidden = loaded.model.forward(torch.tensor(ids, device="cuda"), torch.arange(300, device="cuda"), attend)
    torch.testing.assert_close(loaded.model.logits(hidden).cpu(), expected, atol=1e-2, rtol=1e-2)
