"""The contract between a model family and the engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.checkpoint.rules import Rule
from jaxinfer.kernels.paged import Lane
from jaxinfer.kv.spec import Full
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.params import Build


@runtime_checkable
class ModelConfig(Protocol):
    """What the engine reads of a model's configuration."""

    vocab_size: int
    num_layers: int

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
        self, tokens: jax.Array, step: StepContext, lanes: list[Lane]
    ) -> tuple[jax.Array, list[Lane]]:
        """Token ids `[T]` -> hidden states `[T, M]` after the last norm, and the lanes as they now are."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[B, M]` -> float32 logits `[B, V']`; columns past the vocabulary are -inf."""
        ...

    def cache_specs(self) -> Sequence[Full]:
        """What each layer keeps."""
        ...


@dataclass(frozen=True)
class Family:
    """One family of checkpoints: how its config is read, its module built, its tensors named."""

    read_config: Callable[[ConfigReader], Any]
    build: Callable[[Build, Any], nnx.Module]
    weight_rules: Callable[[Any], Sequence[Rule]]
