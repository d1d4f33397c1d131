"""Interfaces between model families and the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.source import Source
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kv.spec import Spec
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.layers.params import Build
from jaxinfer.media import CrossReader, ImageFormat, ReaderSources, TextReader
from jaxinfer.media.inputs import Features


@runtime_checkable
class TokenRule(Protocol):
    """Mask of the tokens that may come next, on the device. Static and hashable, as steps close over it."""

    def __call__(
        self, logits: jax.Array, history: jax.Array, position: jax.Array, begin: jax.Array, flags: jax.Array
    ) -> jax.Array:
        """Mask logits `[B, V']`: return them with -inf for forbidden tokens.

        Args:
            logits: `[B, V']`.
            history: tokens of each row, prompt first, `[B, L]`.
            position: position of the token to sample, `[B]`.
            begin: number of prompt tokens, `[B]`.
            flags: parameter set by the prompt's reader (`media.CrossPrompt.rule`), `[B]`; rows with 0 are returned
                unchanged.
        """
        ...


@dataclass(frozen=True)
class CrossSource:
    """Encoder inputs whose positions the decoder's tokens attend to."""

    modality: str
    """"text", or the key in `multi_modal_data`: "audio", "image"."""
    shape: tuple[int, ...]
    """Shape of one value: () for a token id, `(mel bins, frames)`, `(tiles, C, height, width)`. Token ids are int32,
    everything else float32.
    """
    rows: int
    """Maximum number of positions per value (see `media.EncoderInput.num_positions`)."""
    longest: int
    """Maximum number of positions per request."""
    joint: bool = False
    """Whether the values of an input are encoded together, like the tokens of a text, or each by itself."""
    numbers: int = 0
    """A: number of integers that come with each value."""
    beyond: int = 0
    """Number of token ids above the vocabulary that prompts may contain: they have embeddings, but are never
    sampled.
    """
    rule: TokenRule | None = None
    """Mask of the tokens that may come next, if the model has one."""


@partial(jax.tree_util.register_dataclass, data_fields=["pool", "index"], meta_fields=[])
@dataclass(frozen=True)
class FeatureRows:
    """Encoder rows that replace the embeddings of some tokens of a step."""

    pool: Any
    """Feature pool: rows computed by encoders, `[F, M]`, or wider with DeepStack (`media.inputs.Joint.width`)."""
    index: Any
    """Row of the pool for each token, `[T]` int32; -1 for the token's own embedding."""

    def placed(self, embedded: jax.Array) -> list[jax.Array]:
        """Return embeddings `[T, M]` with those of the pool in their places, then what layers get added (DeepStack).

        A row of the pool has the embedding first, then M columns for the output of each of the first layers; tokens
        without a row get zeros there.
        """
        rows = jnp.take(self.pool, self.index, axis=0, mode="clip").astype(embedded.dtype)
        first, *deeper = jnp.split(rows, self.pool.shape[1] // embedded.shape[1], axis=1)
        takes = (self.index >= 0)[:, None]
        return [jnp.where(takes, first, embedded), *(jnp.where(takes, one, 0) for one in deeper)]


@runtime_checkable
class ModelConfig(Protocol):
    """Attributes of a model's configuration that the engine reads."""

    vocab_size: int
    num_layers: int

    @property
    def features(self) -> Features | None:
        """Encoder inputs that replace token embeddings; None if there are none."""
        ...

    @property
    def cross(self) -> CrossSource | None:
        """Encoder inputs for cross-attention; None without it."""
        ...

    @property
    def query_group(self) -> int:
        """Query heads per kv head, the minimum over layers; determines the size of prefill tiles."""
        ...

    @property
    def max_length(self) -> int:
        """Maximum sequence length that the model supports."""
        ...

    def length_key(self, prompt_length: int) -> bytes:
        """Return a salt for prefix hashes, if keys depend on the prompt's length."""
        ...

    @property
    def recompute_after(self) -> int | None:
        """Length in tokens beyond which rope changes for the whole sequence, so that it is recomputed; or None."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """An NNX module that the engine can run. All state is in the cache arrays passed in and out."""

    config: ModelConfig

    def __call__(
        self, tokens: jax.Array, step: StepContext, cache: Cache, features: FeatureRows | None = None
    ) -> tuple[jax.Array, Cache]:
        """Compute hidden states `[T, M]` after the final norm for token ids `[T]`; also return the new cache arrays."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`; columns past the vocabulary are -inf."""
        ...

    def cache_specs(self) -> Sequence[Spec]:
        """Return what each layer caches."""
        ...


@runtime_checkable
class MultimodalModel(LanguageModel, Protocol):
    """A language model whose `config.features` is not None."""

    def encode(self, inputs: jax.Array) -> jax.Array:
        """Encode inputs `[n, *features.shape]` to embeddings `[n, features.rows, M]` in the model's dtype.

        Called under jit. If the mesh has an axis `data`, the n inputs, padded with zeros to a multiple of its size, are
        divided over it; the result is replicated.
        """
        ...


@runtime_checkable
class JointModel(LanguageModel, Protocol):
    """A language model whose `config.features.joint` is not None: its encoder sees whole inputs."""

    def encode_joint(self, inputs: jax.Array, numbers: jax.Array, step: EncodeStep) -> jax.Array:
        """Encode values `[U, *features.shape]` with integers `[U, A]` to rows `[U, features.rows, width]`.

        Called under jit. Values of several inputs lie one after another; `step` says which positions see each other.
        """
        ...


@runtime_checkable
class CrossModel(LanguageModel, Protocol):
    """A language model whose `config.cross` is not None: some of its `cache_specs` are `kv.spec.Cross`."""

    def encode_cross(self, inputs: jax.Array, numbers: jax.Array, step: EncodeStep, cache: Cache) -> Cache:
        """Encode inputs `[U, *cross.shape]` into the cache's cross-attention keys and values.

        Inputs come with integers `[U, cross.numbers]`.

        Called under jit. Integer inputs keep their dtype, floats have the dtype of the activations.
        """
        ...


@dataclass(frozen=True)
class Family:
    """A family of checkpoints: how to read its config, build its module and name its tensors.

    A file of this folder declares its family as `FAMILY`, by which `registry.families` finds it.
    """

    architectures: Mapping[str, str]
    """Names in config.json's `architectures` -> the `model_type` that goes with each."""
    read_config: Callable[[ConfigReader], Any]
    build: Callable[[Build, Any], nnx.Module]
    weight_rules: Callable[[Any], Sequence[Rule]]
    from_folder: Callable[[Path], Mapping[str, Any]] = lambda _: {}
    """Read config.json fields that the family's checkpoints keep in other files of the folder."""
    images: ImageFormat | None = None
    """Image markers of prompts and tiling of images; None if the family reads no images."""
    reader: Callable[[ReaderSources], CrossReader] = TextReader
    """Reader of the prompts of a model with cross-attention."""
    source: Callable[[Source], Source] = lambda source: source
    """Wrap a checkpoint that stores tensors in another layout, so that it yields them as the weight table names
    them. It must also work on arrays of JAX (`loading.update`).
    """
    restore: Callable[[str, Any], Any] = lambda name, values: values
    """Return an array of the weight table in the checkpoint's layout, given its name: the inverse of `source`."""
    untie: Callable[[Any, str], Any] = lambda config, tie: replace(config, tied=False)
    """Return the configuration without a tie (`Rule.tied`), for checkpoints whose tied tensors differ."""
    ignored: Sequence[str] = ()
    """Patterns of tensors that the model does not read, in addition to those of `checkpoint.naming`."""
    float16: bool = True
    """Whether float16 can hold the activations without overflow."""
    stored_dtype: str = "float32"
    """Dtype of the weights assumed by the plan if config.json states none."""
    architecture: str = ""
    """Name in config.json's `architectures` that the family was looked up by (`registry.family`)."""
