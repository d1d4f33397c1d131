"""Recognise checkpoint formats that jaxinfer does not read (quantised, adapters, ...) and explain the refusal."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.plain_json import read_json, shorten, show
from jaxinfer.errors import ConfigError

log = logging.getLogger(__name__)

READ_QUANTISED: Mapping[str, tuple[str, str]] = {"mxfp4": ("GptOssForCausalLM", "gpt_oss")}
"""Supported `quant_method` values (`checkpoint.gpt_oss_weights`), each with the architecture and `model_type` of the
checkpoints that use it."""
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json that mark a quantised checkpoint: NVIDIA ModelOpt's, GPTQ's and AWQ's."""
_FIELDS = ("quantization_config", "compression_config", "quantization")
_PARTS = ("text_config", "llm_config")
_REMEDY = "Use the checkpoint of this model in bfloat16, float16 or float32"


def refuse_quantised(config: Mapping[str, Any], directory: Path | None = None) -> None:
    """Refuse a checkpoint that config.json or a quantisation tool's file declares to be in an unsupported quantised
    format.

    Args:
        config: contents of config.json.
        directory: checkpoint folder, searched for `QUANTISATION_FILES`; None checks config.json alone.

    Raises:
        ConfigError: the format is unsupported, or unsupported for this architecture; names the field or file and the
            format.
        CheckpointError: one of `QUANTISATION_FILES` is unreadable.
    """
    for part in ("", *_PARTS):
        values = config.get(part) if part else config
        for field in _FIELDS if isinstance(values, Mapping) else ():
            if values.get(field):
                _check(f"{part}.{field}" if part else field, values[field], config, part or field)
    for name in QUANTISATION_FILES if directory is not None else ():
        if (directory / name).is_file():
            _check_file(directory / name, config)


_FOLDERS: Sequence[tuple[str, str]] = (
    (
        r"adapter_config\.json",
        "it is a PEFT adapter ({found}). Adapters are not read; merge it into its base model and save that: "
        "PeftModel.merge_and_unload().save_pretrained(path)",
    ),
    (r".*\.gguf", "it holds GGUF files ({found}). Pass the path of the file as the model"),
    (
        r"params\.json|consolidated\.safetensors",
        "it holds the original format of Meta or Mistral ({found}), which is not read. Use the folder in the format of "
        "transformers, which the Hub has beside it",
    ),
    (r".*\.safetensors", "found {found}. Fetch the missing file"),
    (
        r"openvino_.*",
        "it holds OpenVINO files ({found}), which are not read. Use the safetensors checkpoint of this model",
    ),
    (
        r"global_step\d+|zero_to_fp32\.py|pytorch_model_fsdp_\d+|.*\.distcp",
        "it holds the weights in the pieces of a training run ({found}). Join them first: `python zero_to_fp32.py . .` "
        "(DeepSpeed) or `accelerate merge-weights` (FSDP)",
    ),
    (r"checkpoint-\d+", "it is the output of a training run. Pass one of its checkpoints: {found}"),
    (
        r"(?!training_args|optimizer|scheduler|rng_state).*\.(bin|pt|pth|ckpt|pkl|h5|msgpack|npz)",
        "only {found}. Reading such files can run code that they carry, so they are never opened. Convert them "
        "where you trust them: load the model with transformers and write it with save_pretrained(path)",
    ),
    (
        r"onnx|.*\.onnx(_data)?",
        "it holds an ONNX export ({found}), which is not read. Use the safetensors checkpoint of this model",
    ),
)
"""Patterns of file and folder names that identify an unsupported checkpoint folder, each with the message that
explains it and the remedy. The first match is used."""


def explain_missing(directory: Path, wanted: str) -> str:
    """Explain why a folder without `wanted` cannot be loaded: what it holds instead, and the remedy.

    Args:
        directory: checkpoint folder.
        wanted: name of the missing file; alternatives are separated by " or ".
    """
    for path in (directory / name for name in wanted.split(" or ")):
        if path.is_symlink():
            return f"{path} is a link to {os.readlink(path)}, which is absent. Fetch it again: `hf download`."
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    for pattern, reason in _FOLDERS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return f"{directory} has no {wanted}: {reason.format(found=shorten(', '.join(found)))}."
    shown = shorten(", ".join(names)) or "nothing"
    return f"{directory} has no {wanted}; found {shown}. Pass the folder that save_pretrained or the Hub made."


def warn_of_adapter(directory: Path) -> None:
    """Warn that a PEFT adapter in the same folder as the model's weights is not applied."""
    if (directory / "adapter_config.json").is_file():
        log.warning(
            "%s has a PEFT adapter (adapter_config.json) beside the model's weights: it is not applied. If the weights "
            "are not merged already, merge them: PeftModel.merge_and_unload().save_pretrained(path).",
            directory,
        )


def _check(field: str, value: Any, config: Mapping[str, Any], override: str) -> None:
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    reader = READ_QUANTISED.get(method) if isinstance(method, str) else None
    if reader is not None and _is(config, *reader):
        return
    supported = ", ".join(f"{name} of {architecture}" for name, (architecture, _) in READ_QUANTISED.items())
    stated = f"{method!r} ({shorten(show(value), 120)})" if method else show(value)
    nothing = {override: None} if field == override else {override: {field.rpartition(".")[2]: None}}
    raise ConfigError(
        f"{field}={stated}: quantised checkpoints are not supported in this format (supported: {supported}). "
        f"{_REMEDY}; if the weights of this folder are not quantised in fact, pass hf_overrides={nothing}."
    )


def _is(config: Mapping[str, Any], architecture: str, model_type: str) -> bool:
    named = config.get("architectures")
    return architecture in named if isinstance(named, list) and named else config.get("model_type") == model_type


def _check_file(path: Path, config: Mapping[str, Any]) -> None:
    """Check one of `QUANTISATION_FILES`; a file that names no weight format is ignored, since some tools leave such
    files.
    """
    content = read_json(path)
    inner = content.get("quantization") if isinstance(content.get("quantization"), Mapping) else content
    method = inner.get("quant_algo") or inner.get("quant_method") or inner.get("bits") or inner.get("w_bit")
    if not method or str(method).lower() in READ_QUANTISED:
        return
    raise ConfigError(
        f"{path} says that the weights are quantised ({shorten(show(dict(inner)), 120)}), and checkpoints of this "
        f"format are not supported. {_REMEDY}; if these weights are not quantised in fact, remove the file."
    )
