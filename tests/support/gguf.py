"""Write tiny GGUF files as llama.cpp's converter does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "granite": "granite",
}
"""Family of `support.tiny` -> `general.architecture`."""

TOKENS = ["<unk>", "<s>", "</s>", "<|end|>", *"abcdeĠ", "ab", "Ġc", "abc"]
"""A byte-level vocabulary, far from complete."""
MERGES = ["a b", "Ġ c", "ab c"]
TYPES = [2, 3, 3, 4, *[1] * 9]

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def metadata(architecture: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a model, without the tokenizer's."""
    rope = hf.get("rope_parameters") or {}
    own = {
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": hf["head_dim"],
        "attention.value_length": hf["head_dim"],
        "attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
        "attention.sliding_window": hf.get("sliding_window"),
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
        "rope.scaling.type": rope.get("rope_type") if rope.get("rope_type") in ("linear", "yarn") else None,
        "rope.scaling.factor": rope.get("factor") if rope.get("rope_type") in ("linear", "yarn") else None,
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "attn_logit_softcapping": hf.get("attn_logit_softcapping"),
        "final_logit_softcapping": hf.get("final_logit_softcapping"),
        "attention.scale": hf.get("attention_multiplier"),
        "embedding_scale": hf.get("embedding_multiplier"),
        "residual_scale": hf.get("residual_multiplier"),
        "logit_scale": hf.get("logits_scaling"),
        "expert_count": hf.get("num_experts"),
        "expert_used_count": hf.get("num_experts_per_tok"),
        "expert_feed_forward_length": hf.get("moe_intermediate_size"),
    }
    return {"general.architecture": architecture} | {
        f"{architecture}.{key}": value for key, value in own.items() if value is not None
    }


def stored(architecture: str, hf: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint under the names and in the layout of llama.cpp."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names, found = gguf.get_tensor_name_map(arch, hf["num_hidden_layers"]), {}
    for name, value in tensors.items():
        if architecture in ("llama", "granite") and (".q_proj." in name or ".k_proj." in name):
            heads = hf["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if ".mlp.experts.gate_up_proj" in name:
            layer = name.split(".")[2]
            found[f"blk.{layer}.ffn_gate_exps.weight"], found[f"blk.{layer}.ffn_up_exps.weight"] = np.split(value, 2, 1)
            continue
        stem, _, ending = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        found[f"{names.get_name(stem)}.{ending}"] = value
    return found


def write(
    path: Path,
    values: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, gguf.GGMLQuantizationType] = {},
) -> Path:
    """Write metadata and tensors; `kinds` has the types of tensors that are not float32."""
    writer = gguf.GGUFWriter(path, values["general.architecture"])
    for key, value in values.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        kind = kinds.get(name)
        value = np.ascontiguousarray(value, np.float32)
        writer.add_tensor(name, value if kind is None else gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer(**changes: Any) -> dict[str, Any]:
    """Return the metadata of a byte-level tokenizer, with changes; None removes a value."""
    named = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": TOKENS,
        "token_type": TYPES,
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in named.items() if value is not None}
