"""Load a checkpoint's folder into a module with its weights on their devices."""

import logging
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.checkpoint import naming, orbax, rules, ties
from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.formats import warn_of_adapter
from jaxinfer.checkpoint.gguf_folder import open_weights
from jaxinfer.checkpoint.hf import read_config
from jaxinfer.checkpoint.manifest import Manifest
from jaxinfer.checkpoint.packed.declared import declared
from jaxinfer.checkpoint.packed.source import dequantised
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.size_limits import check_sizes, int_if_whole
from jaxinfer.checkpoint.source import Source
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.matmul.packed_matmul import Packing
from jaxinfer.kernels.native import build as native
from jaxinfer.kv import cache as kv_cache
from jaxinfer.layers.packing import pack, packings_of
from jaxinfer.layers.params import Build
from jaxinfer.loading import quantised
from jaxinfer.models.base import Family, LanguageModel
from jaxinfer.models.registry import architecture, family
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding import rules as sharding_rules
from jaxinfer.sharding.policy import Placement

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes of computation."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
"""Sizes in config.json that are checked for every family."""


def load(
    directory: Path,
    mesh: Mesh,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    hf: Mapping[str, Any] | None = None,
    placement: Placement = Placement(),
    pad_heads: bool = False,
    progress: bool = True,
) -> LanguageModel:
    """Load a Hugging Face folder; each weight is transferred directly to the device that owns it.

    Sizes and placement are checked from config.json and the mesh before any weight is read or allocated.

    A folder written by `loading.convert.convert` is restored as it is: its dtype, quantisation, placement and padding
    apply unless others are requested. For another mesh or placement the same values are laid out again.

    Args:
        directory: folder with config.json and weights.
        mesh: mesh that the weights are placed on.
        dtype: "bfloat16", "float16", "float32", or "auto" for the checkpoint's (`resolve_dtype`).
        quantization: "int8" and "fp8" quantise matrices as they are read (`kernels.matmul.int8_matmul`,
            `fp8_matmul`); None keeps those that the checkpoint has in 4 bits or FP8, and dequantises others; see
            `EngineConfig.quantization`.
        overrides: values merged into config.json.
        hf: contents of config.json (`checkpoint.hf.read_config`) if already read; `overrides` are then not applied.
        placement: sharding of single modules, in place of the default.
        pad_heads: whether zero heads are added if the number of heads is not divisible (`layers.heads`).
        progress: whether a progress bar is shown.

    Raises:
        ConfigError: an architecture, attribute, size, mesh or placement is not supported, or a converted folder does
            not have the requested dtype or quantisation.
        CheckpointError: files or tensors do not match the configuration.
    """
    hf = read_config(directory, overrides) if hf is None else hf
    model_family, config = parse(hf, directory)
    mesh = meshes.normalise(mesh)
    platform = mesh.devices.flat[0].platform
    how = dict(quantization=quantization, placement=placement, pad_heads=pad_heads)
    manifest = Manifest.read(directory)
    if manifest is not None:
        return _restore(directory, mesh, manifest, model_family, config, dtype, how, progress)
    how = dict(hf=hf, directory=directory, **how)
    stated = config_dtype(hf)
    kind = resolve_dtype(dtype, stated or "float32", platform, model_family)
    module = abstract_stored(model_family, config, kind, mesh, **how)
    with open_weights(directory) as reader:
        settled, source = match_tensors(model_family, config, hf, reader, directory)
        if not stated:
            kind = resolve_dtype(dtype, stored_dtype(reader), platform, model_family)
        if settled != config or not stated or declared(hf, directory) is not None:
            module = abstract_stored(model_family, settled, kind, mesh, source=source, **how)
        table = model_family.weight_rules(settled)
        rules.load(module, table, source, mesh, progress=progress, where=directory)
    return module


def _restore(
    directory: Path,
    mesh: Mesh,
    manifest: Manifest,
    model_family: Family,
    config: Any,
    dtype: str,
    how: Mapping[str, Any],
    progress: bool,
) -> LanguageModel:
    """Restore a converted folder; its dtype and layout apply unless others are requested."""
    config = ties.resolve_stored(config, model_family.weight_rules, model_family.untie, manifest.parameters)
    kind = resolve_dtype(dtype, manifest.dtype, mesh.devices.flat[0].platform, model_family)
    options = manifest.resolve_options(directory, kind, requested=dtype != "auto", **how)
    module = abstract(model_family, config, kind, mesh, **options)
    orbax.restore(module, model_family.weight_rules(config), directory, manifest, mesh, progress=progress)
    return module


def match_tensors(
    model_family: Family, config: Any, hf: Mapping[str, Any], reader: Source, directory: Path
) -> tuple[Any, Source]:
    """Adapt the configuration to the checkpoint's ties; return it with the tensors under weight table names.

    Raises:
        CheckpointError: the tensors are those of an adapter, or quantised in an unsupported format.
    """
    warn_of_adapter(directory)
    reader = dequantised(reader, hf, directory)
    source = naming.rename_tensors(
        model_family.source(reader),
        model_family.weight_rules(config),
        directory,
        [*model_family.ignored, *_predicting(hf)],
    )
    return ties.resolve(config, model_family.weight_rules, model_family.untie, source), source


def _predicting(hf: Mapping[str, Any]) -> Iterator[str]:
    """Yield patterns of multi-token prediction layers, which checkpoints number after the model's own layers."""
    layers = int_if_whole(hf.get("num_hidden_layers"))
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        count = int_if_whole(hf.get(name))
        if isinstance(layers, int) and isinstance(count, int):
            yield from (rf"model\.layers\.{layers + i}\..*" for i in range(min(count, 64)))


def parse(hf: Mapping[str, Any], directory: Path | None = None) -> tuple[Family, Any]:
    """Read family and model configuration of a config.json, extended by other files of its folder.

    Raises:
        ConfigError: as `load`.
    """
    model_family = family(hf)
    added = {} if directory is None else model_family.from_folder(directory)
    hf = {**hf, **{name: value for name, value in added.items() if hf.get(name) is None}}
    check_sizes(hf, *SIZES)
    reader = ConfigReader(hf, architecture(hf))
    config = model_family.read_config(reader)
    reader.finish()
    return model_family, config


def abstract(
    model_family: Family,
    config: Any,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
    *,
    quantization: str | None = None,
    placement: Placement = Placement(),
    pad_heads: bool = False,
    packings: Mapping[str, Packing] = {},
) -> LanguageModel:
    """Build the module with shapes in place of arrays.

    Args:
        model_family, config: as returned by `parse`.
        dtype: dtype of the weights that are not quantised.
        mesh: mesh, or an abstract one, which needs no devices.
        quantization: "int8" or None.
        placement, pad_heads: as for `load`.
        packings: weights that are codes of 4 bits or FP8, by path (`layers.packing.pack`).

    Raises:
        ConfigError: the placement names unknown modules or contradicts itself, the mesh is not supported by the model,
            or something is not divisible over it.
    """
    mesh = meshes.normalise(mesh)
    meshes.check_data_axis(mesh, config.features is not None and config.features.joint is None)
    meshes.check_fsdp(mesh, config.features is None and config.cross is None)
    build = partial(Build, dtype=dtype, mesh=mesh, quantization=quantization, placement=placement, pad_heads=pad_heads)
    module = nnx.eval_shape(lambda: pack(model_family.build(build(nnx.Rngs(0)), config), packings))
    module.architecture = model_family.architecture  # selects the weight table of `LLM.update_weights`
    placement.check(*placeable(module), with_experts(module))
    for path, param in rules.parameters(module).items():
        sharding_rules.of(mesh, param.get_metadata(), param.shape, path)
    kv_cache.abstract(module.cache_specs(), 1, 1, dtype, mesh)
    return module


def abstract_stored(
    model_family: Family,
    config: Any,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
    *,
    hf: Mapping[str, Any],
    quantization: str | None = None,
    directory: Path | None = None,
    source: Source | None = None,
    **how: Any,
) -> LanguageModel:
    """Build the module of a checkpoint with shapes in place of arrays, its weights in codes where they are kept so.

    Args:
        model_family, config, dtype, mesh: as for `abstract`.
        hf: contents of config.json.
        quantization: as for `load`.
        directory: checkpoint folder, if there is one.
        source: the tensors under the names of the weight table; without it, what config.json says counts.
        **how: `placement` and `pad_heads`.

    Raises:
        ConfigError: as `abstract`, or the quantisation is not the checkpoint's.
    """
    applied = quantised.applied(quantization, hf, directory)
    module = abstract(model_family, config, dtype, mesh, quantization=applied, **how)
    tensors = rules.sources(model_family.weight_rules(config), source)
    stated = config_dtype(hf)
    packings = quantised.packings(module, mesh, quantization, hf, directory, tensors, source, stated)
    return abstract(model_family, config, dtype, mesh, **how, packings=packings) if packings else module


def placeable(module: nnx.Module) -> tuple[list[str], list[str]]:
    """Return the paths of modules that a placement may name, and of modules inside of one that is placed as a whole.

    A module is placed as a whole if its class says so (`no_split`): all of its parts are sharded in the same way.
    """
    parts = {tuple(map(str, path)): part for path, part in nnx.iter_modules(module) if path}
    wholes = {path for path, part in parts.items() if getattr(part, "no_split", False)}
    modules, inside = [], []
    for path in sorted(parts):
        within = any(path[:end] in wholes for end in range(1, len(path)))
        (inside if within else modules).append(".".join(path))
    return modules, inside


def with_experts(module: nnx.Module) -> list[str]:
    """Return the paths of modules with experts (`has_experts` on their class)."""
    return [".".join(map(str, path)) for path, part in nnx.iter_modules(module) if getattr(part, "has_experts", False)]


def random(
    hf: Mapping[str, Any],
    mesh: Mesh,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    seed: int = 0,
    placement: Placement = Placement(),
    pad_heads: bool = False,
) -> LanguageModel:
    """Build a model with random weights, initialised on their devices; for benchmarks.

    Padding heads are random as well: their cost is that of real ones, and the values have no meaning anyway.

    Args:
        hf: contents of config.json.
        seed: seed of the initialisation.
        mesh, dtype, quantization, placement, pad_heads: as for `load`.

    Raises:
        ConfigError: as `load`.
    """
    mesh = meshes.normalise(mesh)
    model_family, config = parse(hf)
    kind = resolve_dtype(dtype, config_dtype(hf) or "bfloat16", mesh.devices.flat[0].platform, model_family)
    how = dict(placement=placement, pad_heads=pad_heads)
    module = abstract_stored(model_family, config, kind, mesh, hf=hf, quantization=quantization, **how)
    packings, how["quantization"] = packings_of(module), quantised.applied(quantization, hf)
    graph, state = nnx.split(module)
    shardings = [
        sharding_rules.of(mesh, param.get_metadata(), param.shape, path)
        for path, param in rules.parameters(module).items()
    ]

    def make() -> list[jax.Array]:
        made = pack(model_family.build(Build(nnx.Rngs(seed), kind, mesh, **how), config), packings)
        return jax.tree.leaves(nnx.split(made)[1])

    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), jax.jit(make, out_shardings=shardings)()))


def resolve_dtype(requested: str, stored: str, platform: str, model_family: Family | None = None) -> jnp.dtype:
    """Return the dtype to run in: the requested one, or the checkpoint's if the device computes it fast.

    Families whose activations overflow in float16 run float16 weights in bfloat16.

    Args:
        requested: dtype setting of the user, "auto" for the checkpoint's.
        stored: dtype of the checkpoint, as named in config.json.
        platform: "cpu" or "gpu", of the devices; empty to ignore which dtypes they compute fast.
        model_family: family of the model, if known.

    Raises:
        ConfigError: float16 is requested for such a family, or the checkpoint's dtype is not supported for computation.
    """
    overflows = model_family is not None and not model_family.float16
    if requested == "float16" and overflows:
        raise ConfigError(
            "dtype='float16' is not supported for this architecture: its activations overflow float16, so that every "
            "request would fail; use dtype='bfloat16' or 'float32'"
        )
    kind = jnp.dtype(_dtype_name(stored) if requested == "auto" else requested)
    if requested != "auto":
        return kind
    if platform == "cpu" and kind != jnp.float32:
        if kind == jnp.float16 or jax.__version_info__ < (0, 11) and native.lacking() is not None:
            _warn_float32(str(kind))
            return jnp.dtype(jnp.float32)
    if kind == jnp.float16 and overflows:
        log.warning("the weights are float16, but this architecture's activations overflow it; running in bfloat16")
        return jnp.dtype(jnp.bfloat16)
    return kind


def _dtype_name(stored: str) -> str:
    """Return the computation dtype for a checkpoint with dtype `stored`, as named in config.json."""
    name = stored.removeprefix("torch.")
    name = {"float64": "float32", "double": "float32", "float": "float32", "half": "float16"}.get(name, name)
    if name not in DTYPES:
        raise ConfigError(
            f"config.json: dtype (torch_dtype) is {show(stored)}; supported: {', '.join(DTYPES)}. If the weights can "
            "be converted, pass dtype, for instance 'bfloat16'"
        )
    return name


@cache
def _warn_float32(stored: str) -> None:
    log.warning(
        "a %s checkpoint runs in float32, which is faster on this CPU with jax %s; pass dtype=%r to keep its dtype",
        stored,
        jax.__version__,
        stored,
    )


def config_dtype(hf: Mapping[str, Any]) -> str:
    """Return the dtype stated by config.json or its text model's configuration; empty if there is none."""
    for values in (hf, hf.get("text_config"), hf.get("llm_config")):
        for name in ("dtype", "torch_dtype") if isinstance(values, Mapping) else ():
            if isinstance(values.get(name), str) and values[name] not in ("", "auto"):
                return values[name]
            if values.get(name) not in (None, "", "auto"):
                raise ConfigError(f"config.json: {name} is {show(values[name])}; it must be a name such as 'bfloat16'")
    return ""


def stored_dtype(reader: Source) -> str:
    """Return the dtype of the first floating-point tensor."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    found = [names[i.dtype] for i in map(reader.info, reader.names()) if i.dtype in names]
    return found[0] if found else "float32"
