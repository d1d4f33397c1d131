"""Which family serves which architecture; a family's file is imported when it is asked for."""

import importlib
from collections.abc import Mapping

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
    "Olmo3ForCausalLM": "olmo3",
    "GraniteForCausalLM": "granite",
    "Cohere2ForCausalLM": "cohere2",
    "GptOssForCausalLM": "gpt_oss",
    "BartForConditionalGeneration": "bart",
    "MBartForConditionalGeneration": "mbart",
    "InternVLForConditionalGeneration": "internvl",
    "InternVLChatModel": "internvl",
    "WhisperForConditionalGeneration": "whisper",
    "MllamaForConditionalGeneration": "mllama",
}
"""`architectures` in config.json -> the file in this folder, whose `FAMILY` is used."""


def family(config: Mapping[str, object]) -> Family:
    """The family of a checkpoint by its config.json.

    Raises:
        ConfigError: an architecture that is not in the table; lists what is.
    """
    named = config.get("architectures") or []
    for name in named if isinstance(named, list) else []:
        if name in ARCHITECTURES:
            return importlib.import_module(f"jaxinfer.models.{ARCHITECTURES[name]}").FAMILY
    raise ConfigError(
        f"config.json: architectures is {named!r} (model_type {config.get('model_type')!r}), which is not supported; "
        f"supported: {', '.join(ARCHITECTURES)}"
    )
