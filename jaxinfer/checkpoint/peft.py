"""Read LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors, or their contents."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer._utils.checks import describe
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.checkpoint.naming import PEFT, WRAPPERS
from jaxinfer.checkpoint.plain_json import read_json, show
from jaxinfer.checkpoint.rules import format_names
from jaxinfer.checkpoint.safetensors import SafetensorsReader
from jaxinfer.errors import CheckpointError, JaxInferError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge the adapter into its base model instead: PeftModel.merge_and_unload().save_pretrained(path)"

_USED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type", "peft_version"),
    *("revision", "task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "runtime_config", "ensure_weight_tying"),
    *("megatron_config", "megatron_core", "qalora_group_size"),
}
"""Fields that do not change what is computed, or that are checked on their own (`peft_type`, `init_lora_weights`)."""
_REFUSED = {
    "use_dora": "DoRA, which rescales the merged weights",
    "fan_in_fan_out": "weights that are stored transposed",
    "lora_bias": "biases of adapters",
    "bias": "trained biases of the model",
    "modules_to_save": "whole modules in place of the model's",
    "trainable_token_indices": "trained embeddings of tokens",
    "target_parameters": "adapters of experts",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activated LoRA",
}
"""Fields that are not supported unless they are off, and what they stand for."""
_NEUTRAL = (None, False, "none", [], {})
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights unchanged."""
_TENSOR = re.compile(r"(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight")
_BACKTRACKS = re.compile(r"\)[*+{]")


@dataclass(frozen=True)
class Matrices:
    """Adapter of one linear layer: its output changes by `scale * B A x`."""

    a: np.ndarray
    """`[r, in]`."""
    b: np.ndarray
    """`[out, r]`."""
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)


def read(given: Any, config: Mapping[str, Any] | None, where: str) -> dict[str, Matrices]:
    """Read an adapter; return its matrices by the names of linear layers in the checkpoint of its base model.

    Args:
        given: folder, Hub id, or tensors by their names in PEFT's file.
        config: contents of adapter_config.json; required with tensors, not allowed with a folder.
        where: the adapter, for errors.

    Raises:
        CheckpointError: a file or tensor is missing, or not supported.
        TypeError: an argument has another type.
        OfflineError: the Hub cannot serve the adapter.
    """
    if isinstance(given, Mapping):
        if not isinstance(config, Mapping):
            raise TypeError(
                f"{where}: tensors need config, the contents of {CONFIG} such as {{'r': 8, 'lora_alpha': 16}}, got "
                f"{describe(config)}"
            )
        tensors = {str(name): _as_array(str(name), value, where) for name, value in given.items()}
        return _matrices(tensors, config, where)
    if config is not None:
        raise TypeError(f"{where}: config belongs to tensors; a folder has its own {CONFIG}")
    folder = locate(given, where)
    with SafetensorsReader(folder, WEIGHTS) as reader:
        tensors = {name: np.array(reader.read(name)) for name in reader.names()}
    return _matrices(tensors, read_json(folder / CONFIG), where)


def locate(given: Any, where: str) -> Path:
    """Return the folder of an adapter, given as a folder or Hub id; `where` names the adapter in errors.

    Raises:
        TypeError: it is neither.
        CheckpointError, OfflineError: it does not exist, or lacks a file.
    """
    if not isinstance(given, str | Path):
        raise TypeError(f"{where} must be a folder, a Hub id or a dict of tensors, got {describe(given)}")
    try:
        folder = resolve_model(given, patterns=(CONFIG, WEIGHTS))
    except JaxInferError as error:
        raise type(error)(f"{where}: {str(error).removeprefix('model=')}") from error
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{where}: {folder} has no {name}; pass the folder that PeftModel.save_pretrained made (with "
                "safe_serialization, as files that can run code are never opened)"
            )
    return folder


def _as_array(name: str, value: Any, where: str) -> np.ndarray:
    if not hasattr(value, "__array__") and not hasattr(value, "__dlpack__"):
        raise TypeError(f"{where}: tensor {name!r} must be an array, got {describe(value)}")
    return np.array(value)


def _matrices(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str) -> dict[str, Matrices]:
    _check_config(config, where)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, tensor in tensors.items():
        bare = WRAPPERS.sub("", WRAPPERS.sub("", name).removeprefix(PEFT))
        match = _TENSOR.fullmatch(bare)
        if match is None:
            unknown.append(name)
        elif pairs.setdefault(match[1], {}).setdefault(match[2], tensor) is not tensor:
            raise CheckpointError(f"{where}: two tensors are lora_{match[2]} of {match[1]!r}; save one adapter alone")
    if unknown:
        raise CheckpointError(
            f"{where} has {len(unknown)} tensor(s) that are not lora_A or lora_B of a linear layer: "
            f"{format_names(unknown)}; adapters of embeddings, DoRA and modules_to_save are not supported: {MERGE}"
        )
    if not pairs:
        raise CheckpointError(f"{where} has no tensors; save it again with PeftModel.save_pretrained")
    return {module: _checked(module, pair, config, where) for module, pair in sorted(pairs.items())}


def _checked(module: str, pair: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str) -> Matrices:
    """Check the matrices of one layer against each other and the configuration."""
    for side, other in ("AB", "BA"):
        if side not in pair:
            raise CheckpointError(f"{where}: {module!r} has lora_{other} and no lora_{side}; fetch the adapter again")
        tensor, name = pair[side], f"{module}.lora_{side}.weight"
        if tensor.ndim != 2 or not np.issubdtype(tensor.astype(np.float32).dtype, np.floating):
            raise CheckpointError(
                f"{where}: tensor {name!r}: expected a matrix, found shape {list(tensor.shape)}; {MERGE}"
            )
        bad = int(tensor.size - np.isfinite(tensor.astype(np.float32)).sum())
        if bad:
            raise CheckpointError(
                f"{where}: tensor {name!r}: expected finite values, found {bad} that are NaN or infinite; train or "
                "fetch the adapter again"
            )
    rank, stated = len(pair["A"]), _pattern(config, "rank_pattern", module, where, config["r"])
    if not rank or pair["B"].shape[1] != rank or stated != rank:
        raise CheckpointError(
            f"{where}: {module!r}: lora_A has shape {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}, but "
            f"{CONFIG} says rank {show(stated)}; the files are of two adapters: fetch both again"
        )
    alpha = _pattern(config, "alpha_pattern", module, where, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Matrices(pair["A"], pair["B"], scale)


def _pattern(config: Mapping[str, Any], field: str, module: str, where: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the module's whole name, or its end after a dot."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return default


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Check adapter_config.json.

    Raises:
        CheckpointError: a field is missing, invalid or not supported; names it, its value and the remedy.
    """
    kind = config.get("peft_type", "LORA")
    if str(getattr(kind, "value", kind)).upper() != "LORA":
        raise CheckpointError(f"{where}: {CONFIG}: peft_type is {show(kind)}; only LORA is supported: {MERGE}")
    for field, what in _REFUSED.items():
        if config.get(field) not in _NEUTRAL:
            raise CheckpointError(
                f"{where}: {CONFIG}: {field} is {show(config[field])} ({what}), which is not supported: {MERGE}"
            )
    initial = config.get("init_lora_weights")
    if initial not in _INITIAL:
        raise CheckpointError(
            f"{where}: {CONFIG}: init_lora_weights is {show(initial)}, which changes the base model's weights; convert "
            "the adapter for the unchanged model with PEFT's path_initial_model_for_weight_conversion"
        )
    known = _USED | _HARMLESS | set(_REFUSED)
    unknown = [f"{name} = {show(value)}" for name, value in _unknown(config, known)]
    if unknown:
        raise CheckpointError(
            f"{where}: {CONFIG}: {', '.join(unknown)}: not known, and may change what the adapter computes; {MERGE}"
        )
    for field in ("r", "lora_alpha"):
        _number(config.get(field), field, where, whole=field == "r")
    for field, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{where}: {CONFIG}: {field} must map patterns to numbers, found {show(patterns)}")
        for pattern, value in patterns.items():
            _number(value, f"{field}[{pattern!r}]", where, whole=whole)
            _check_pattern(pattern, field, where)


def _unknown(config: Mapping[str, Any], known: set[str]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in config.items() if name not in known and value not in _NEUTRAL)


def _number(value: Any, field: str, where: str, *, whole: bool) -> None:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
        what = "a positive integer" if whole else "a positive number"
        raise CheckpointError(f"{where}: {CONFIG}: {field} must be {what}, found {show(value)}; fetch the file again")


def _check_pattern(pattern: str, field: str, where: str) -> None:
    """Refuse patterns that are no regular expression, or whose matching could take for ever."""
    try:
        re.compile(pattern)
        valid = len(pattern) <= 500 and not _BACKTRACKS.search(pattern) and pattern.count("*") + pattern.count("+") <= 4
    except re.error:
        valid = False
    if not valid:
        raise CheckpointError(
            f"{where}: {CONFIG}: {field} has the pattern {show(pattern)}; write names of modules, or regular "
            "expressions without repeated groups"
        )
