"""Registry of architectures; a family's file is imported on first use."""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import replace

from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.models.base import Family

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "KimiLinearForCausalLM": "kimi_linear",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "SmolLM3ForCausalLM": "smollm3",
    "SeedOssForCausalLM": "seed_oss",
    "Exaone4ForCausalLM": "exaone4",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "HeliumForCausalLM": "helium",
    "GraniteForCausalLM": "granite",
    "Cohere2ForCausalLM": "cohere2",
    "GptOssForCausalLM": "gpt_oss",
    "BartForConditionalGeneration": "bart",
    "MBartForConditionalGeneration": "mbart",
    "InternVLForConditionalGeneration": "internvl.model",
    "InternVLChatModel": "internvl.model",
    "WhisperForConditionalGeneration": "whisper.model",
    "MllamaForConditionalGeneration": "mllama.model",
}
"""`architectures` in config.json -> module in this folder with the family's `FAMILY`."""

MODEL_TYPES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "granite": "GraniteForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "helium": "HeliumForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "internvl_chat": "InternVLChatModel",
    "whisper": "WhisperForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}
"""`model_type` in config.json -> architecture, for files without `architectures`."""
ALIASES: Mapping[str, str] = {"LLaMAForCausalLM": "LlamaForCausalLM"}
"""Architecture names written by early versions of transformers."""
SHARDED = "FSDP"
"""Prefix that PyTorch's `fully_shard` puts before the name of a model's class, which is saved as its architecture."""
WRAPPERS = ("PeftModel", "PeftModelForCausalLM", "PeftModelForSeq2SeqLM")
"""Classes around a model that some tools save as its architecture; `model_type` says what is inside."""


def architecture(config: Mapping[str, object]) -> str:
    """Return the supported architecture named by a config.json, or implied by its `model_type`.

    Raises:
        ConfigError: the architecture is not supported; the message lists those that are.
    """
    named, kind = config.get("architectures") or [], config.get("model_type")
    wrapped = not named or (isinstance(named, list) and all(name in WRAPPERS for name in named))
    if wrapped and isinstance(kind, str) and kind in MODEL_TYPES:
        return MODEL_TYPES[kind]
    for name in named if isinstance(named, list) else []:
        name = ALIASES.get(name, name).removeprefix(SHARDED) if isinstance(name, str) else ""
        if name in ARCHITECTURES:
            return name
    raise ConfigError(
        f"config.json: architectures is {show(named)} (model_type {show(kind)}), which is not supported; "
        f"supported: {', '.join(ARCHITECTURES)}{_nearest(named, kind)}"
    )


def _nearest(named: object, kind: object) -> str:
    """Return the end of a message that names the supported architecture whose name is most alike."""
    known = {name.lower(): name for name in ARCHITECTURES} | {name.lower(): MODEL_TYPES[name] for name in MODEL_TYPES}
    given = [*(named if isinstance(named, list) else ()), kind]
    for name in (name.lower()[:200] for name in given if isinstance(name, str)):
        if found := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
            return (
                f". Nearest by name: {known[found[0]]}; if this model is computed in the same way, pass "
                f"hf_overrides={{'architectures': [{known[found[0]]!r}]}}"
            )
    return ""


def family(config: Mapping[str, object]) -> Family:
    """Return the family of a checkpoint, given its config.json.

    Raises:
        ConfigError: as `architecture`.
    """
    name = architecture(config)
    return replace(importlib.import_module(f"jaxinfer.models.{ARCHITECTURES[name]}").FAMILY, architecture=name)
