"""Recognise checkpoint folders that jaxinfer does not read (adapters, other formats, ...) and explain the refusal."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxinfer.checkpoint.plain_json import shorten

log = logging.getLogger(__name__)

_FOLDERS: Sequence[tuple[str, str]] = (
    (
        r"adapter_config\.json",
        "it is a PEFT adapter ({found}). Pass its base model as model and this folder as adapters={{name: folder}}, or "
        "merge them and save that: PeftModel.merge_and_unload().save_pretrained(path)",
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
