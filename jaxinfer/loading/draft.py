"""The draft model of speculative decoding: checked from its config.json and tokenizer, then loaded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.checkpoint.hf import read_config
from jaxinfer.checkpoint.hub import ALLOW_PATTERNS, resolve_model
from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import Group
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.inputs.tokenizer import id_bound, load_tokenizer
from jaxinfer.kernels.attention.choose import check_cache_dtype
from jaxinfer.kv.groups import layout
from jaxinfer.kv.spec import Full, Kind, Lent
from jaxinfer.loading import weights
from jaxinfer.models.base import LanguageModel, ModelConfig
from jaxinfer.speculative_config import DRAFT_MODEL


@dataclass(frozen=True)
class DraftCheckpoint:
    """A draft model whose weights are not loaded."""

    name: str
    directory: Path
    hf: Mapping[str, Any]
    """Contents of config.json."""

    @classmethod
    def find(
        cls, config: EngineConfig, group: Group | None = None, *, patterns: Sequence[str] = ALLOW_PATTERNS
    ) -> "DraftCheckpoint | None":
        """Find the draft model of the settings; None if they have none. `patterns`: files that are needed.

        Raises:
            ConfigError: several processes serve the model.
            CheckpointError, OfflineError: there is no such checkpoint.
        """
        speculative = config.speculative_config
        if speculative is None or speculative.method != DRAFT_MODEL:
            return None
        if group is not None:
            raise ConfigError(
                "speculative_config: a draft model is not supported where several processes serve one model; use "
                "method 'ngram', or leave it out"
            )
        with _named(speculative.model):
            directory = resolve_model(speculative.model, patterns=patterns)
            return cls(speculative.model, directory, read_config(directory))

    def check(self, target: ModelConfig, tokenizer: Any, config: EngineConfig, mesh: Mesh) -> None:
        """Check that the model can draft for another one.

        Args:
            target: configuration of the model that is served.
            tokenizer: its tokenizer; None if only token ids are served.
            config: the engine's settings.
            mesh: mesh of both models.

        Raises:
            ConfigError: the vocabularies differ, or a layer is not supported.
        """
        own = self.check_layers(config, mesh)
        with _named(self.name):
            self._check_vocabulary(target, tokenizer, own)

    def check_layers(self, config: EngineConfig, mesh: Mesh | AbstractMesh) -> ModelConfig:
        """Check that all layers have full attention over tokens; return the configuration. Raises as `check`."""
        with _named(self.name):
            family, own = weights.parse(self.hf, self.directory)
            stored = weights.config_dtype(self.hf) or family.stored_dtype
            check_cache_dtype(config.kv_cache_dtype, weights.resolve_dtype(config.dtype, stored, "", family))
            module = weights.abstract(family, own, jnp.dtype("float32"), mesh, pad_heads=config.pad_heads)
            specs = tuple(module.cache_specs())
            if own.features is not None or own.cross is not None:
                raise ConfigError("it has an encoder, and a draft model reads tokens alone; choose a text model")
            if any(not isinstance(spec, Full | Lent) or spec.kind != Kind() for spec in specs):
                kinds = sorted({spec.kind.name for spec in specs if spec.kind != Kind()})
                raise ConfigError(
                    f"it has layers of kind {', '.join(kinds)}, and a draft model's layers must all have full "
                    "attention; choose another one"
                )
            if layout(specs).groups > 1:
                raise ConfigError("its layers need cache arrays of different shapes; choose another draft model")
            return own

    def _check_vocabulary(self, target: ModelConfig, tokenizer: Any, own: ModelConfig) -> None:
        """Check that both models have the same tokens; embeddings may be padded to different sizes."""
        theirs = None if tokenizer is None else _tokenizer(self.directory)
        if theirs is not None:
            mine, other = tokenizer.get_vocab(), theirs.get_vocab()
            if mine != other:
                raise ConfigError(
                    f"its tokenizer has {len(other)} tokens and differs from the served model's, which has "
                    f"{len(mine)}; choose a draft model with the same tokenizer"
                )
        least = target.vocab_size if theirs is None else id_bound(tokenizer)
        if own.vocab_size < least or (theirs is None and own.vocab_size != least):
            raise ConfigError(
                f"its vocab_size is {own.vocab_size}, and the served model has {least} token ids; choose a draft model "
                "with the same vocabulary"
            )

    def load(self, config: EngineConfig, mesh: Mesh, *, progress: bool) -> LanguageModel:
        """Load the model to a mesh.

        Raises:
            ConfigError, CheckpointError: see `loading.weights.load`.
        """
        how = dict(dtype=config.dtype, hf=self.hf, pad_heads=config.pad_heads, progress=progress)
        with _named(self.name):
            return weights.load(self.directory, mesh, **how)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say in errors that they are about the draft model."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"speculative_config: draft model {name!r}: {error}") from error


def _tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a folder; None if it has none that can be read."""
    try:
        return load_tokenizer(directory)
    except CheckpointError:
        return None
