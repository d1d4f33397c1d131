"""Load the parts of an `LLM`: module on its mesh, tokenizer, prompt readers, default parameters, EOS ids."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxinfer import distributed
from jaxinfer.checkpoint.hf import read_config, read_generation_config
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.checkpoint.manifest import Manifest
from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import Group
from jaxinfer.engine.multihost import handshake
from jaxinfer.engine.sizing.setup import longest_sequence
from jaxinfer.errors import ConfigError
from jaxinfer.inputs.generation_config import FORCED, default_params, eos_ids, forced_id
from jaxinfer.inputs.loaded_model import LoadedModel
from jaxinfer.inputs.tokenizer import load_tokenizer
from jaxinfer.kernels.attention.choose import check_cache_dtype
from jaxinfer.kernels.attention.quantised_cache import AUTO
from jaxinfer.loading import weights
from jaxinfer.loading.draft import DraftCheckpoint
from jaxinfer.media import ImageProcessor, MediaReader, ReaderSources, TextReader
from jaxinfer.media.inputs import Features
from jaxinfer.models.base import LanguageModel
from jaxinfer.models.registry import family
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.policy import Placement
from jaxinfer.sharding.serving_mesh import Axes, serving_mesh


@dataclass(frozen=True)
class ModelArguments:
    """Model arguments of `LLM`."""

    model: str | Path | nnx.Module
    tokenizer: Any = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    overrides: Mapping[str, Any] | None = None


def place(
    given: Mesh | None, axes: Axes | None, config: EngineConfig, size_given: bool, group: Group | None
) -> tuple[Mesh, EngineConfig]:
    """Return the mesh, the user's or one over `tensor_parallel_size` devices, and the settings matching it.

    Args:
        given: the user's mesh, if any.
        axes: the engine's axes, mapped to the names that they have in the mesh; None if the names are the same.
        config: the settings.
        size_given: whether tensor_parallel_size was passed by the user.
        group: processes that serve the model together.

    Raises:
        ConfigError: the mesh, its axes and the size contradict each other.
    """
    if axes is not None:
        if given is None:
            raise ConfigError(f"axes is {axes!r}, but there is no mesh whose axes it names; pass mesh= as well")
        given = serving_mesh(given, axes)
    if given is None:
        mesh = make_mesh(config.tensor_parallel_size)
        if group is not None:
            distributed.check_mesh(mesh)
        return mesh, config
    mesh = meshes.normalise(given, config.tensor_parallel_size if size_given else None)
    return mesh, dataclasses.replace(config, tensor_parallel_size=meshes.size(mesh))


def open_model(
    arguments: ModelArguments, config: EngineConfig, mesh: Mesh, group: Group | None, *, progress: bool
) -> LoadedModel:
    """Load a model from a checkpoint, or wrap a given module.

    Configuration, tokenizer and processors are read before the weights, which take longest, so that errors in them are
    reported at once.

    Args:
        arguments: model, tokenizer and their options.
        config: the engine's settings.
        mesh: mesh that the weights are placed on, or that the given module is on.
        group: processes that serve the model together; all must have the same files, and only the first needs a
            tokenizer.
        progress: whether a progress bar is shown.

    Raises:
        ConfigError, CheckpointError, OfflineError, DistributedError: see `jaxinfer.errors`.
    """
    follows, draft = group is not None and group.process > 0, DraftCheckpoint.find(config, group)
    if isinstance(arguments.model, nnx.Module):
        _check_module(arguments.model, config, mesh)
        directory, params = None, SamplingParams()
        hf, generation, model_config = {}, {}, arguments.model.config
    else:
        directory = resolve_model(arguments.model, arguments.revision)
        if group is not None:
            handshake.check_checkpoint(group, directory)
        hf, generation = read_config(directory, arguments.overrides), read_generation_config(directory)
        params = default_params(generation, encoder_decoder=bool(hf.get("is_encoder_decoder")))
        model_family, model_config = weights.parse(hf, directory)
        longest_sequence(model_config, config)
        if config.kv_cache_dtype != AUTO:
            manifest, platform = Manifest.read(directory), mesh.devices.flat[0].platform
            stored = (weights.config_dtype(hf) or "float32") if manifest is None else manifest.dtype
            dtype = weights.resolve_dtype(config.dtype, stored, platform, model_family)
            check_cache_dtype(config.kv_cache_dtype, dtype)
    source = directory if arguments.tokenizer is None else arguments.tokenizer
    tokenizer = None if source is None or arguments.skip_tokenizer_init or follows else load_tokenizer(source)
    ends = eos_ids(hf, generation, tokenizer)
    if draft is not None:
        draft.check(model_config, tokenizer, config, mesh)
    features = model_config.features
    media = None if features is None else _media_reader(features, tokenizer, directory, hf)
    sources = ReaderSources(model_config, hf, generation, tokenizer, directory)
    reader = None
    if model_config.cross is not None:
        reader = (TextReader if directory is None else family(hf).reader)(sources)
    forced = {name: forced_id({name: sources.lookup(name)}, name) for name in FORCED}
    module = arguments.model if directory is None else _load_weights(directory, hf, config, mesh, progress)
    own = None if draft is None else draft.load(config, mesh, progress=progress)
    return LoadedModel(module, tokenizer, media, reader, params, ends, forced, generation, own)


def _load_weights(
    directory: Path, hf: Mapping[str, Any], config: EngineConfig, mesh: Mesh, progress: bool
) -> LanguageModel:
    return weights.load(
        directory,
        mesh,
        dtype=config.dtype,
        quantization=config.quantization,
        hf=hf,
        placement=Placement.of(config.placement),
        pad_heads=config.pad_heads,
        progress=progress,
    )


def _media_reader(features: Features, tokenizer: Any, directory: Path | None, hf: Mapping[str, Any]) -> MediaReader:
    """Build the reader of images; for a module without a checkpoint it accepts token ids and pixel values only."""
    if directory is None:
        return MediaReader(features)
    form = family(hf).images
    processor = None if form is None else ImageProcessor(form, directory, hf, features.shape)
    return MediaReader(features, tokenizer, form, processor)


def _check_module(module: nnx.Module, config: EngineConfig, mesh: Mesh) -> None:
    """Refuse settings that only apply when a checkpoint is loaded, and a mesh that does not match the module."""
    for name in ("quantization", "placement", "pad_heads"):
        value = getattr(config, name)
        if value not in (None, False):
            raise ConfigError(
                f"{name} is {value!r}, but the weights of a module are already loaded; remove it, and create "
                f"the module with loading.weights.load(directory, mesh, {name}=...)"
            )
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        if not isinstance(leaf.get_value(), jax.Array):
            raise ConfigError(
                f"the module's {'.'.join(map(str, path))} is a shape without values; load the weights with "
                "loading.weights.load(directory, mesh)"
            )
    features = getattr(module.config, "features", None)
    meshes.check_data_axis(mesh, features is not None and features.joint is None)
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(nnx.state(module))]
    for own in {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}:
        if own.shape != mesh.shape or (own.devices != mesh.devices).any():
            raise ConfigError(
                f"the module's weights are on a mesh of {_axes(own)}, but the engine's mesh is {_axes(mesh)}; pass "
                "the mesh= or tensor_parallel_size that it was loaded with"
            )


def _axes(mesh: Mesh) -> str:
    return f"{dict(mesh.shape)} over devices {[device.id for device in mesh.devices.flat]}"
