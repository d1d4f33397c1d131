"""Translate the metadata of a GGUF file to the config.json and generation_config.json of the same model.

Keys of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and `gguf/constants.py` of its Python
package. As in config.json, a key of the architecture that nothing reads is refused, because it may change the numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxinfer.checkpoint.gguf_file import GgufFile
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import CheckpointError, ConfigError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Rope parameters of all Llama 3.1, 3.2 and 3.3 models, which GGUF files keep as a tensor of divisors."""
ROPE_FREQS = "rope_freqs.weight"
GEMMA2_27B, GEMMA3_27B = 46, 62
"""Numbers of layers of the Gemma models whose attention scores are scaled by hidden_size / heads, not head_dim."""
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_HARMLESS = ("attention.causal",)


class _Keys:
    """Reader of the metadata of one architecture that records which keys were read."""

    def __init__(self, file: GgufFile, name: str):
        self.file, self.name = file, name
        self._read = {f"{name}.{key}" for key in _HARMLESS}

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        self._read.add(f"{self.name}.{key}")
        return self.file.get(f"{self.name}.{key}", kind, default)

    def require(self, key: str, kind: type) -> Any:
        self._read.add(f"{self.name}.{key}")
        return self.file.require(f"{self.name}.{key}", kind)

    def uniform(self, key: str, default: int | None = None) -> int:
        """Return a number that some files state for each layer; all layers must have the same."""
        value = self.file.metadata.get(f"{self.name}.{key}")
        if not isinstance(value, list):
            return self.require(key, int) if default is None else self.get(key, int, default)
        self._read.add(f"{self.name}.{key}")
        if len(set(value)) != 1:
            raise ConfigError(f"{self.file.path}: {self.name}.{key} differs between layers, which is not supported.")
        return value[0]

    def finish(self) -> None:
        """Refuse keys that were not read."""
        metadata = self.file.metadata
        left = [key for key in metadata if key.startswith(f"{self.name}.") and key not in self._read]
        if left:
            found = ", ".join(f"{key}={show(metadata[key])}" for key in left)
            raise ConfigError(
                f"{self.file.path} has metadata that is not read and may change the numbers: {found}. Use the "
                "safetensors checkpoint of this model."
            )


def _shared(keys: _Keys) -> dict[str, Any]:
    """Return the config.json fields that all decoders have."""
    file = keys.file
    width, heads = keys.require("embedding_length", int), keys.uniform("attention.head_count")
    if not heads or width % heads and keys.get("attention.key_length", int) is None:
        raise CheckpointError(f"{file.path}: {keys.name}.attention.head_count={heads} does not divide {width}.")
    head_dim = keys.get("attention.key_length", int, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, int, head_dim) != head_dim:
            raise ConfigError(
                f"{file.path}: {keys.name}.{key} is {keys.get(key, int)}, which differs from head_dim={head_dim}; "
                "that is not supported for this architecture."
            )
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no tensor {EMBEDDING!r} with two axes: it is not a language model.")
    vocab = keys.get("vocab_size", int, embedding.shape[0])
    known = len(file.get("tokenizer.ggml.tokens", list, []))
    if embedding.shape != (vocab, width) or known > vocab:
        raise CheckpointError(
            f"{file.path} contradicts itself: tensor {EMBEDDING!r} has shape {list(embedding.shape)}, but "
            f"{keys.name}.vocab_size is {vocab}, {keys.name}.embedding_length is {width} and the tokenizer has {known} "
            "tokens."
        )
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": keys.uniform("feed_forward_length"),
        "num_hidden_layers": keys.require("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.uniform("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.require("context_length", int),
        "rms_norm_eps": keys.require("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(keys, head_dim),
        "tie_word_embeddings": HEAD not in file.tensors,
    }


def _rope(keys: _Keys, head_dim: int) -> dict[str, Any]:
    theta = keys.get("rope.freq_base", float, 10_000.0)
    kind = keys.get("rope.scaling.type", str, "none")
    factor = keys.get("rope.scaling.factor", float)
    original = keys.get("rope.scaling.original_context_length", int)
    keys.get("rope.scaling.finetuned", bool)
    if ROPE_FREQS in keys.file.tensors:
        return {"rope_theta": theta, "rope_type": "llama3", **_llama3(keys.file, theta, head_dim)}
    if kind == "none" or kind == "linear" and factor in (None, 0.0, 1.0):
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        return {
            "rope_theta": theta,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise ConfigError(
        f"{keys.file.path}: {keys.name}.rope.scaling.type={kind!r} with factor {factor} and original_context_length "
        f"{original} is not supported; supported: none, linear, and yarn with both."
    )


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, float]:
    """Return the parameters of Llama 3's rope whose divisors the file keeps as a tensor.

    Raises:
        ConfigError: the divisors are not those of a Llama 3.
    """
    info = file.tensors[ROPE_FREQS]
    end = info.offset + info.rows * info.row_bytes
    found = np.frombuffer(file.bytes[info.offset : end], np.float32) if info.kind == "F32" else np.zeros(0)
    factor = float(found.max(initial=0))
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    with np.errstate(divide="ignore"):
        expected = 1 / ((1 - smooth) / factor + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise ConfigError(
            f"{file.path}: the divisors of tensor {ROPE_FREQS!r} are not those of Llama 3.1 to 3.3; other scalings of "
            "ropes are not read from GGUF. Use the safetensors checkpoint of this model."
        )
    return {"factor": factor, **LLAMA3}


def _llama(keys: _Keys) -> dict[str, Any]:
    names = keys.file.tensors
    if keys.get("expert_count", int, 0) or keys.get("expert_used_count", int, 0):
        raise ConfigError(f"{keys.file.path}: mixtures of experts of the architecture llama are not read from GGUF.")
    return {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_gate.bias" in names}


def _granite(keys: _Keys) -> dict[str, Any]:
    stated = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    return _llama(keys) | {name: keys.require(key, float) for name, key in stated.items()}


def _gemma(keys: _Keys, large: int) -> dict[str, Any]:
    width, heads = keys.require("embedding_length", int), keys.uniform("attention.head_count")
    by_heads = keys.require("block_count", int) == large
    return {
        "sliding_window": keys.require("attention.sliding_window", int),
        "query_pre_attn_scalar": width / heads if by_heads else keys.get("attention.key_length", int, width // heads),
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": keys.get("final_logit_softcapping", float),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", float),
    }


def _gemma2(keys: _Keys) -> dict[str, Any]:
    defaults = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    return {name: defaults.get(name) if value is None else value for name, value in _gemma(keys, GEMMA2_27B).items()}


def _gemma3(keys: _Keys) -> dict[str, Any]:
    local = keys.get("rope.freq_base_swa", float, 10_000.0)
    stated = _rope(keys, keys.get("attention.key_length", int, 0))
    if stated["rope_theta"] == 10_000.0 and "gemma3.rope.freq_base" not in keys.file.metadata:
        stated["rope_theta"] = 1_000_000.0
    ropes = {"full_attention": stated, "sliding_attention": {"rope_theta": local, "rope_type": "default"}}
    return _gemma(keys, GEMMA3_27B) | {"rope_parameters": ropes}


def _qwen3moe(keys: _Keys) -> dict[str, Any]:
    return {
        "num_experts": keys.require("expert_count", int),
        "num_experts_per_tok": keys.require("expert_used_count", int),
        "moe_intermediate_size": keys.require("expert_feed_forward_length", int),
        "norm_topk_prob": keys.get("expert_weights_norm", bool, True),
    }


ARCHITECTURES: Mapping[str, tuple[str, str, Callable[[_Keys], dict[str, Any]]]] = {
    "llama": ("LlamaForCausalLM", "llama", _llama),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", lambda _: {}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", lambda _: {}),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3moe),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", _gemma2),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text", _gemma3),
    "granite": ("GraniteForCausalLM", "granite", _granite),
}
"""`general.architecture` -> architecture and `model_type` of config.json, and reader of the architecture's own keys."""


def architecture(file: GgufFile) -> str:
    """Return the supported architecture of a file.

    Raises:
        ConfigError: the architecture is not supported, or the file is a part of a model.
    """
    found = file.require("general.architecture", str)
    if found not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path}: general.architecture is {found!r}, which is not read from GGUF; supported: "
            f"{', '.join(ARCHITECTURES)}. Use the safetensors checkpoint of this model."
        )
    parts = file.get("split.count", int, 1)
    if parts > 1:
        raise ConfigError(
            f"{file.path} is one of {parts} parts of a model; join them first: llama-gguf-split --merge FIRST OUT.gguf"
        )
    if file.get("general.type", str, "model") != "model":
        raise ConfigError(f"{file.path}: general.type is {file.get('general.type', str)!r}; it must be 'model'.")
    return found


def config(file: GgufFile) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises:
        CheckpointError: metadata is missing, of the wrong type or contradicted by a tensor.
        ConfigError: the architecture or a value is not supported, or a key is unknown.
    """
    found = architecture(file)
    name, model_type, own = ARCHITECTURES[found]
    keys = _Keys(file, found)
    made = {"architectures": [name], "model_type": model_type, "dtype": _dtype(file), **_shared(keys), **own(keys)}
    keys.finish()
    return made | _special(file)


def generation_config(file: GgufFile) -> dict[str, Any]:
    """Return the contents of generation_config.json: all ids that end a text.

    GGUF names the end of a turn and of a message (`eot`, `eom`) beside the end of the text.
    """
    found = [file.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(number for number in found if number is not None))
    return _special(file) | ({"eos_token_id": ends} if ends else {})


def _special(file: GgufFile) -> dict[str, int]:
    named = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: file.get(f"tokenizer.ggml.{key}_token_id", int) for name, key in named.items()}
    return {name: number for name, number in found.items() if number is not None}


def _dtype(file: GgufFile) -> str:
    """Return the dtype to run in: that of the matrices, bfloat16 if they are quantised."""
    kinds = {info.kind for info in file.tensors.values() if len(info.shape) > 1}
    if kinds <= {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"
