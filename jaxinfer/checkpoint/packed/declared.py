"""Read what config.json and files of quantisation tools declare about a checkpoint's quantised format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.plain_json import read_json, shorten, show
from jaxinfer.checkpoint.size_limits import is_int
from jaxinfer.errors import ConfigError

FIELDS = ("quantization_config", "compression_config", "quantization")
"""Fields of config.json that declare a quantised format; `quantization` is MLX's."""
PARTS = ("text_config", "llm_config")
"""Nested configurations that may have one of `FIELDS`."""
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json that declare a quantised format: NVIDIA ModelOpt's, GPTQ's and AWQ's."""
MXFP4_ARCHITECTURE = ("GptOssForCausalLM", "gpt_oss")
"""Architecture and `model_type` whose experts in MXFP4 are read by `checkpoint.gpt_oss_weights`."""
MLX_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "SmolLM3", "Olmo2", "Granite")
)
"""Architectures whose tensors MLX keeps as they are. It stacks the experts of others and changes some of their norms
and convolutions."""

READ = "fp8, fbgemm_fp8, compressed-tensors, modelopt (FP8, NVFP4), gptq, awq, bitsandbytes, MLX, mxfp4 of gpt-oss"
"""Formats that are read, as messages list them."""
_REMEDY = "Use the checkpoint of this model in bfloat16, float16 or float32, or in a format that is read"

_COMPRESSED = (
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION")


@dataclass(frozen=True)
class Declared:
    """Quantised format of a checkpoint's weights."""

    method: str
    """"fp8", "compressed-tensors", "modelopt", "gptq", "awq", "bitsandbytes", "mlx" or "mxfp4"."""
    where: str
    """Field or file that declares it, for messages."""
    bits: tuple[int, ...] = ()
    """Bits per integer; several where groups of modules differ. Empty if the format has one width only."""
    group_sizes: tuple[int, ...] = ()
    """Columns that share a scale; -1 is all. Several where groups of modules differ; empty if not declared."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, for formats with blocks of both."""
    zero_offset: int = 0
    """Value that is added to stored zero points: GPTQ's first format stores them minus one."""
    fp8: bool = False
    """Whether all quantised weights are FP8 (e4m3)."""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Settings as declared."""


def declared(config: Mapping[str, Any], directory: Path | None = None) -> Declared | None:
    """Return the quantised format that a checkpoint declares; None if its weights are not quantised.

    Args:
        config: contents of config.json.
        directory: checkpoint folder, searched for `FILES`; None reads config.json alone.

    Raises:
        ConfigError: the format is not read, or a setting of it is not; names the field or file and the setting.
        CheckpointError: one of `FILES` is unreadable.
    """
    for part in ("", *PARTS):
        values = config.get(part) if part else config
        for name in FIELDS if isinstance(values, Mapping) else ():
            if values.get(name):
                nothing = {part: {name: None}} if part else {name: None}
                remedy = f"if the weights of this folder are not quantised in fact, pass hf_overrides={nothing}"
                return _read(f"{part}.{name}" if part else name, values[name], config, remedy)
    for path in (directory / name for name in FILES if directory is not None):
        if path.is_file():
            found = _read_file(path, config)
            if found is not None:
                return found
    return None


def _read_file(path: Path, config: Mapping[str, Any]) -> Declared | None:
    """Read one of `FILES`. A file that names no format of weights is ignored, since some tools leave such files."""
    content = read_json(path)
    inner = content.get("quantization") if isinstance(content.get("quantization"), Mapping) else content
    if not any(inner.get(name) for name in ("quant_algo", "quant_method", "bits", "w_bit")):
        return None
    tool = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}[path.name]
    remedy = "if these weights are not quantised in fact, remove the file"
    return _read(str(path), {"quant_method": tool, **inner}, config, remedy)


def _read(where: str, value: Any, config: Mapping[str, Any], remedy: str) -> Declared:
    settings = value if isinstance(value, Mapping) else {}
    method = settings.get("quant_method")
    if method is None and where == "quantization" or method is None and "quantization" in config:
        method = "mlx" if is_int(settings.get("bits")) else None
    if isinstance(method, str) and method.lower().replace("_", "-") in ("auto-round", "intel/auto-round"):
        packing = str(settings.get("packing_format", ""))
        method = next((name for name in ("gptq", "awq") if name in packing), method)
    readers = {
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
        "compressed-tensors": _compressed,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
        "gptq": _gptq,
        "awq": _awq,
        "bitsandbytes": _bitsandbytes,
        "mlx": _mlx,
        "mxfp4": _mxfp4,
    }
    reader = readers.get(method.lower()) if isinstance(method, str) else None
    fault = "this format is not read" if reader is None else None
    if reader is not None:
        made = reader(where, settings, config)
        if isinstance(made, Declared):
            return made
        fault = made
    stated = f"{method!r} ({shorten(show(value), 120)})" if method else shorten(show(value), 120)
    raise ConfigError(
        f"{where}={stated}: quantised checkpoints: {fault} (formats that are read: {READ}). {_REMEDY}; {remedy}."
    )


def _fp8(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Declared | str:
    block = settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        return f"weight_block_size={show(block)} must be two positive integers"
    return Declared("fp8", where, block=tuple(block) if block else None, fp8=True, settings=settings)


def _compressed(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Declared | str:
    groups = settings.get("config_groups")
    groups = [one for one in groups.values() if isinstance(one, Mapping)] if isinstance(groups, Mapping) else []
    formats = {str(one) for one in (settings.get("format"), *(one.get("format") for one in groups)) if one}
    if not formats or formats - set(_COMPRESSED):
        return f"format={show(settings.get('format'))} is not one of {', '.join(_COMPRESSED)}"
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        return f"sparsity_config.format={show(sparsity.get('format'))}: sparse weights are not read"
    transforms = settings.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        return "transform_config: weights that need transformed activations are not read"
    weights = [one["weights"] for one in groups if isinstance(one.get("weights"), Mapping)]
    blocks = [one.get("block_structure") for one in weights if one.get("block_structure")]
    if any(not _is_block(one) for one in blocks) or len({tuple(one) for one in blocks}) > 1:
        return f"block_structure={show(blocks)} must be two positive integers, equal in all groups"
    return Declared(
        "compressed-tensors",
        where,
        bits=tuple(sorted({one["num_bits"] for one in weights if is_int(one.get("num_bits"))})),
        group_sizes=tuple(sorted({one["group_size"] for one in weights if is_int(one.get("group_size"))})),
        block=tuple(blocks[0]) if blocks else None,
        fp8=bool(weights) and all(one.get("type") == "float" and one.get("num_bits") == 8 for one in weights),
        settings=settings,
    )


def _modelopt(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Declared | str:
    inner = settings.get("quantization") if isinstance(settings.get("quantization"), Mapping) else settings
    algorithm = inner.get("quant_algo")
    if algorithm not in _MODELOPT:
        return f"quant_algo={show(algorithm)} is not one of {', '.join(_MODELOPT)}"
    fp8 = algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
    return Declared("modelopt", where, fp8=fp8, settings=inner)


def _gptq(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Declared | str:
    layout = settings.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        return f"checkpoint_format={show(layout)} is not one of gptq, gptq_v2"
    if settings.get("dynamic"):
        return "dynamic: modules with settings of their own are not read"
    return _integers("gptq", where, settings, (2, 3, 4, 8), 1 if layout == "gptq" else 0)


def _awq(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Declared | str:
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm":
        return f"version={show(version)} is not gemm"
    names = {"bits": settings.get("w_bit"), "group_size": settings.get("q_group_size")}
    return _integers("awq", where, {**{k: v for k, v in names.items() if v is not None}, **settings}, (4,), 0)


def _integers(
    method: str, where: str, settings: Mapping[str, Any], widths: tuple[int, ...], zero_offset: int
) -> Declared | str:
    bits, size = settings.get("bits"), settings.get("group_size", -1)
    if not is_int(bits) or bits not in widths:
        return f"bits={show(bits)} is not one of {', '.join(map(str, widths))}"
    if not is_int(size) or not (size == -1 or size > 0):
        return f"group_size={show(size)} must be -1 or a positive integer"
    return Declared(method, where, bits=(bits,), group_sizes=(size,), zero_offset=zero_offset, settings=settings)


def _bitsandbytes(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Declared | str:
    if not settings.get("load_in_4bit") and not settings.get("load_in_8bit"):
        return "neither load_in_4bit nor load_in_8bit is true"
    return Declared("bitsandbytes", where, settings=settings)


def _mlx(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Declared | str:
    named = config.get("architectures") or [None]
    if not isinstance(named, list) or named[0] not in MLX_ARCHITECTURES:
        return f"MLX changes weights of this architecture ({show(named)}) beside quantising them"
    if settings.get("mode", "affine") != "affine":
        return f"mode={show(settings.get('mode'))} is not affine"
    if not is_int(settings.get("bits")) or not is_int(settings.get("group_size")):
        return f"bits={show(settings.get('bits'))} and group_size={show(settings.get('group_size'))} must be integers"
    every = [settings, *(one for one in settings.values() if isinstance(one, Mapping))]
    return Declared(
        "mlx",
        where,
        bits=tuple(sorted({one["bits"] for one in every if is_int(one.get("bits"))})),
        group_sizes=tuple(sorted({one["group_size"] for one in every if is_int(one.get("group_size"))})),
        settings=settings,
    )


def _mxfp4(where: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Declared | str:
    architecture, model_type = MXFP4_ARCHITECTURE
    named = config.get("architectures")
    own = architecture in named if isinstance(named, list) and named else config.get("model_type") == model_type
    return Declared("mxfp4", where, settings=settings) if own else f"it is read for {architecture} alone"


def _is_block(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_int(one) and one > 0 for one in value)
