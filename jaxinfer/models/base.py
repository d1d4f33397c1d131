"""The contract between a model family and the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.checkpoint.rules import Rule
from jaxinfer.checkpoint.source import Source
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kv.spec import Full, State
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.layers.params import Build
from jaxinfer.media import CrossReader, ImageFormat, ReaderSources, TextReader


@dataclass(frozen=True)
class Features:
    """What a model reads beside tokens: an encoder turns each input into rows that take the places of tokens."""

    modality: str
    """The name under `multi_modal_data`: "image"."""
    shape: tuple[int, ...]
    """Of one input: pixel values `(C, height, width)` of a tile, as transformers' processor gives them."""
    rows: int
    """Embeddings `[rows, M]` that one input becomes, in the order of the tokens whose places they take."""
    placeholder: int
    """The token id in whose places they go; -1: the checkpoint does not say which."""


@runtime_checkable
class TokenRule(Protocol):
    """Which tokens may come next, on the device. Static: compiled steps close over it, so it is hashable."""

    def __call__(
        self, logits: jax.Array, history: jax.Array, position: jax.Array, begin: jax.Array, says: jax.Array
    ) -> jax.Array:
        """`[B, V']` -> `[B, V']`, -inf for what may not come.

        Args:
            logits: `[B, V']`.
            history: `[B, L]` the tokens of each row, prompt first.
            position: `[B]` of the token to be made.
            begin: `[B]` tokens of the prompt.
            says: `[B]` what the prompt's reader tells it (`media.CrossPrompt.rule`); rows of 0 are left as they are.
        """
        ...


@dataclass(frozen=True)
class CrossSource:
    """What the encoder reads whose positions the decoder's tokens attend to."""

    modality: str
    """"text"; or the name under `multi_modal_data`: "audio", "image"."""
    shape: tuple[int, ...]
    """Of one value: () of a token id, `(mel bins, frames)`, `(tiles, C, height, width)`. Token ids are int32, all else
    float32."""
    rows: int
    """Positions that one value becomes, at most (`media.EncoderInput.kept`)."""
    longest: int
    """The most positions of one request."""
    joint: bool = False
    """Whether the values of an input are encoded together, as the tokens of a text are; otherwise each by itself."""
    numbers: int = 0
    """A: integers that come with each value."""
    beyond: int = 0
    """Token ids from the vocabulary's end on that prompts may have: they have embeddings, and are never made."""
    rule: TokenRule | None = None
    """What decides, beside the logits, which token may come next."""


@partial(jax.tree_util.register_dataclass, data_fields=["pool", "index"], meta_fields=[])
@dataclass(frozen=True)
class FeatureRows:
    """Which tokens of a step take an encoder's row in the place of their own embedding."""

    pool: Any
    """`[F, M]` rows that encoders have made."""
    index: Any
    """`[T]` int32 row of the pool of each token; -1: the token's own embedding."""


@runtime_checkable
class ModelConfig(Protocol):
    """What the engine reads of a model's configuration."""

    vocab_size: int
    num_layers: int

    @property
    def features(self) -> Features | None:
        """What the model reads beside tokens; None: nothing."""
        ...

    @property
    def cross(self) -> CrossSource | None:
        """What the encoder reads that tokens attend to; None: there is none."""
        ...

    @property
    def query_group(self) -> int:
        """Query heads that share a kv head, in the layer where they are fewest; decides the tiles of a prefill."""
        ...

    @property
    def max_length(self) -> int:
        """The longest sequence whose numbers are the model's own."""
        ...

    def length_key(self, prompt_length: int) -> bytes:
        """What of a prompt's length changes its keys, so that prefixes are told apart by it."""
        ...

    @property
    def recompute_after(self) -> int | None:
        """Tokens after which the positions of the whole sequence change, so that it is computed again; or None."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """An NNX module that the engine can run. All state lies in the lanes that go in and out."""

    config: ModelConfig

    def __call__(
        self, tokens: jax.Array, step: StepContext, lanes: Cache, features: FeatureRows | None = None
    ) -> tuple[jax.Array, Cache]:
        """Token ids `[T]` -> hidden states `[T, M]` after the last norm, and the lanes as they now are."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[B, M]` -> float32 logits `[B, V']`; columns past the vocabulary are -inf."""
        ...

    def cache_specs(self) -> Sequence[Full | State]:
        """What each layer keeps."""
        ...


@runtime_checkable
class MultimodalModel(LanguageModel, Protocol):
    """A language model whose `config.features` is not None."""

    def encode(self, inputs: jax.Array) -> jax.Array:
        """Inputs `[n, *features.shape]` -> embeddings `[n, features.rows, M]` in the model's dtype.

        Under jit. Where the mesh has an axis `data` the n inputs are divided over it, with others of zeroes until it
        divides them; the result is whole on every device.
        """
        ...


@runtime_checkable
class CrossModel(LanguageModel, Protocol):
    """A language model whose `config.cross` is not None: some of its `cache_specs` are `kv.spec.Cross`."""

    def encode_cross(self, inputs: jax.Array, numbers: jax.Array, step: EncodeStep, lanes: Cache) -> Cache:
        """Inputs `[U, *cross.shape]` and `[U, cross.numbers]` int32 -> the lanes with keys and values of all cross
        layers.

        Under jit. Integers are as they came, floats in the dtype of the activations.
        """
        ...


@dataclass(frozen=True)
class Family:
    """One family of checkpoints: how its config is read, its module built, its tensors named."""

    read_config: Callable[[ConfigReader], Any]
    build: Callable[[Build, Any], nnx.Module]
    weight_rules: Callable[[Any], Sequence[Rule]]
    from_folder: Callable[[Path], Mapping[str, Any]] = lambda _: {}
    """Fields of config.json that other files of the folder say where it does not."""
    images: ImageFormat | None = None
    """How its prompts name images, and its images become tiles; None: the family reads none."""
    reader: Callable[[ReaderSources], CrossReader] = TextReader
    """What reads the prompts of a model with cross-attention."""
    source: Callable[[Source], Source] = lambda source: source
    """A checkpoint's tensors as the weight table knows them, where they are kept otherwise."""
    untie: Callable[[Any, str], Any] = lambda config, tie: replace(config, tied=False)
    """The configuration without a tie (`Rule.tied`), for checkpoints whose tensors differ."""
    ignored: Sequence[str] = ()
    """Patterns of tensors that the model does not read, beside those of `checkpoint.naming`."""
    float16: bool = True
    """Whether float16 holds its activations; False: they overflow."""
    stored_dtype: str = "float32"
    """The dtype that weights are planned in where config.json states none."""
