"""From a checkpoint's folder to a module with its weights on their devices."""

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
from jaxinfer.checkpoint.formats import warn_of_adapter
from jaxinfer.checkpoint.hf import ConfigReader, check_sizes, read_config, whole
from jaxinfer.checkpoint.manifest import Manifest
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.safetensors import SafetensorsReader
from jaxinfer.checkpoint.source import Source
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.native import build as native
from jaxinfer.kv import cache as kv_cache
from jaxinfer.layers.params import Build
from jaxinfer.models.base import Family, LanguageModel
from jaxinfer.models.registry import architecture, family
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding import rules as sharding_rules
from jaxinfer.sharding.policy import Placement

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
"""What is computed in."""

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
"""Sizes that are checked whatever the family; those of experts may be 0 where there are none."""


def load(
    directory: Path,
    mesh: Mesh,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    placement: Placement = Placement(),
    pad_heads: bool = False,
    progress: bool = True,
) -> LanguageModel:
    """Reads a Hugging Face folder; each weight goes straight to the device that owns it.

    With `quantization="int8"` matrices are quantised as they are read (`kernels.int8_matmul`), with `pad_heads` heads
    of zeroes are added where the checkpoint's do not divide (`layers.heads`). Sizes and placement are checked from
    config.json and the mesh, before a weight is read or memory taken for one.

    A folder that `loading.convert.convert` wrote is restored as it is: its own dtype, quantisation, placement and
    padding hold for what is not asked for. Another mesh or placement gets the same numbers, laid out anew.

    Raises:
        ConfigError: an architecture, attribute, size, mesh or placement that is not served, or a dtype or quantisation
            whose numbers a converted folder has not.
        CheckpointError: files or tensors that do not fit the configuration.
    """
    hf = read_config(directory, overrides)
    served, config = parse(hf, directory)
    mesh = meshes.normalise(mesh)
    platform, how = (
        mesh.devices.flat[0].platform,
        dict(quantization=quantization, placement=placement, pad_heads=pad_heads),
    )
    manifest = Manifest.read(directory)
    if manifest is not None:
        config = ties.settle_stored(config, served.weight_rules, served.untie, manifest.parameters)
        kind = resolve_dtype(dtype, manifest.dtype, platform, served)
        module = abstract(served, config, kind, mesh, **manifest.settle(directory, kind, asked=dtype != "auto", **how))
        orbax.restore(module, served.weight_rules(config), directory, manifest, mesh, progress=progress)
        return module
    said = said_dtype(hf)
    module = abstract(served, config, resolve_dtype(dtype, said or "float32", platform, served), mesh, **how)
    with SafetensorsReader(directory) as reader:
        settled, source = settle(served, config, hf, reader, directory)
        if settled != config or not said:
            kind = resolve_dtype(dtype, said or stored_dtype(reader), platform, served)
            module = abstract(served, settled, kind, mesh, **how)
        rules.load(module, served.weight_rules(settled), source, mesh, progress=progress, where=directory)
    return module


def settle(
    served: Family, config: Any, hf: Mapping[str, Any], reader: SafetensorsReader, directory: Path
) -> tuple[Any, Source]:
    """Return the configuration with the ties that the tensors have, and the tensors under the names of the weight
    table.

    Raises:
        CheckpointError: tensors of an adapter, or quantised in a format that is not read.
    """
    warn_of_adapter(directory)
    source = naming.named(
        served.source(reader), served.weight_rules(config), directory, [*served.ignored, *_predicting(hf)]
    )
    return ties.settle(config, served.weight_rules, served.untie, source), source


def _predicting(hf: Mapping[str, Any]) -> Iterator[str]:
    """Yield the patterns of layers that predict further tokens, which checkpoints number after the model's own."""
    layers = whole(hf.get("num_hidden_layers"))
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        count = whole(hf.get(name))
        if isinstance(layers, int) and isinstance(count, int):
            yield from (rf"model\.layers\.{layers + i}\..*" for i in range(min(count, 64)))


def parse(hf: Mapping[str, Any], directory: Path | None = None) -> tuple[Family, Any]:
    """Read the family and the model configuration of a config.json, with what other files of its folder add to it.

    Raises:
        ConfigError: as `load`.
    """
    served = family(hf)
    added = {} if directory is None else served.from_folder(directory)
    hf = {**hf, **{name: value for name, value in added.items() if hf.get(name) is None}}
    check_sizes(hf, *SIZES)
    reader = ConfigReader(hf, architecture(hf))
    config = served.read_config(reader)
    reader.finish()
    return served, config


def abstract(
    served: Family,
    config: Any,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
    *,
    quantization: str | None = None,
    placement: Placement = Placement(),
    pad_heads: bool = False,
) -> LanguageModel:
    """The module with shapes in the place of arrays.

    Raises:
        ConfigError: a placement that names what is not there or contradicts itself, a mesh that is not for this model,
            or something that does not divide over it.
    """
    mesh = meshes.normalise(mesh)
    meshes.check_data_axis(mesh, config.features is not None)
    build = partial(Build, dtype=dtype, mesh=mesh, quantization=quantization, placement=placement, pad_heads=pad_heads)
    module = nnx.eval_shape(lambda: served.build(build(nnx.Rngs(0)), config))
    placement.check(*placeable(module), with_experts(module))
    for path, param in rules.parameters(module).items():
        sharding_rules.of(mesh, param.get_metadata(), param.shape, path)
    kv_cache.abstract(module.cache_specs(), 1, 1, dtype, mesh)
    return module


def placeable(module: nnx.Module) -> tuple[list[str], list[str]]:
    """Paths of the modules that a placement may name, and of those that lie inside one which is placed as a whole.

    A module is placed as a whole if its class says so (`placed_whole`): its parts are divided alike.
    """
    parts = {tuple(map(str, path)): part for path, part in nnx.iter_modules(module) if path}
    wholes = {path for path, part in parts.items() if getattr(part, "placed_whole", False)}
    modules, inside = [], []
    for path in sorted(parts):
        within = any(path[:end] in wholes for end in range(1, len(path)))
        (inside if within else modules).append(".".join(path))
    return modules, inside


def with_experts(module: nnx.Module) -> list[str]:
    """Paths of the modules that have experts (`has_experts` on their class)."""
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
    """A model of this configuration with random weights, made where they will lie: for benchmarks.

    Heads of padding are random as well: they cost what they will, and the numbers mean nothing anyway.
    """
    mesh = meshes.normalise(mesh)
    served, config = parse(hf)
    kind = resolve_dtype(dtype, said_dtype(hf) or "bfloat16", mesh.devices.flat[0].platform, served)
    how = dict(quantization=quantization, placement=placement, pad_heads=pad_heads)
    module = abstract(served, config, kind, mesh, **how)
    graph, state = nnx.split(module)
    shardings = [
        sharding_rules.of(mesh, param.get_metadata(), param.shape, path)
        for path, param in rules.parameters(module).items()
    ]

    def make() -> list[jax.Array]:
        made = served.build(Build(nnx.Rngs(seed), kind, mesh, **how), config)
        return jax.tree.leaves(nnx.split(made)[1])

    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), jax.jit(make, out_shardings=shardings)()))


def resolve_dtype(asked: str, stored: str, platform: str, served: Family | None = None) -> jnp.dtype:
    """Return the dtype to run in: what was asked for, or the checkpoint's where the device is good at it.

    A family whose activations overflow in float16 runs float16 weights in bfloat16.

    Raises:
        ConfigError: float16 was asked for, and such a family; or the checkpoint's dtype is not one to compute in.
    """
    overflows = served is not None and not served.float16
    if asked == "float16" and overflows:
        raise ConfigError(
            "dtype='float16' is not supported for this architecture: its activations overflow, and every request would "
            "end in an error; use dtype='bfloat16' or 'float32'"
        )
    kind = jnp.dtype(_dtype_name(stored) if asked == "auto" else asked)
    if asked != "auto":
        return kind
    if platform == "cpu" and kind != jnp.float32:
        if kind == jnp.float16 or jax.__version_info__ < (0, 11) and native.lacking() is not None:
            _say_float32(str(kind))
            return jnp.dtype(jnp.float32)
    if kind == jnp.float16 and overflows:
        log.warning("the weights are float16, in which activations of this architecture overflow; it runs in bfloat16")
        return jnp.dtype(jnp.bfloat16)
    return kind


def _dtype_name(stored: str) -> str:
    """Name the dtype to compute in of a checkpoint in `stored`, as config.json calls it."""
    name = stored.removeprefix("torch.")
    name = {"float64": "float32", "double": "float32", "float": "float32", "half": "float16"}.get(name, name)
    if name not in DTYPES:
        raise ConfigError(
            f"config.json: dtype (torch_dtype) is {show(stored)}; jaxinfer computes in {', '.join(DTYPES)}: pass "
            "dtype, "
            "for instance 'bfloat16', if the weights are numbers of such a kind"
        )
    return name


@cache
def _say_float32(stored: str) -> None:
    log.warning(
        "a %s checkpoint runs in float32: on this CPU with jax %s that is faster; dtype=%r keeps it",
        stored,
        jax.__version__,
        stored,
    )


def said_dtype(hf: Mapping[str, Any]) -> str:
    """Return what config.json, or else the configuration of its text model, says that the weights are; empty:
    nothing."""
    for values in (hf, hf.get("text_config"), hf.get("llm_config")):
        for name in ("dtype", "torch_dtype") if isinstance(values, Mapping) else ():
            if isinstance(values.get(name), str) and values[name] not in ("", "auto"):
                return values[name]
            if values.get(name) not in (None, "", "auto"):
                raise ConfigError(f"config.json: {name} is {show(values[name])}; it must be a name such as 'bfloat16'")
    return ""


def stored_dtype(reader: SafetensorsReader) -> str:
    """That of the first tensor of floating-point numbers."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    found = [names[i.dtype] for i in map(reader.info, reader.names()) if i.dtype in names]
    return found[0] if found else "float32"
