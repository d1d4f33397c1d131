"""jaxinfer as the rollout engine of tunix (`google-tunix`), Google's library for post-training in JAX.

    ClusterConfig(rollout_engine=functools.partial(Rollout, model="Qwen/Qwen3-0.6B"), ...)

tunix makes the `Rollout`, asks it for samples, and gives it the trainer's weights after each step.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

from jaxinfer.errors import ConfigError
from jaxinfer.llm import LLM
from jaxinfer.loading import weights as loading
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

Tensors = Mapping[str, jax.Array]
"""Tensors by name."""
_MAPPINGS = ("params", "params_safetensors")
"""Modules of a tunix model's package that say how its parameters are made of a checkpoint's tensors."""


class Rollout(BaseRollout):
    """Rollout engine of a tunix `RLCluster`, for tunix' Llama 3, Qwen 2 and Qwen 3, and others with `to_hf`.

    Args:
        rollout_actor: tunix' model, whose weights are served.
        tokenizer: tunix' tokenizer adapter. It makes the tokens of prompts and the texts of samples.
        mesh: tunix' mesh of the rollout.
        rollout_config: tunix' settings of sampling and lengths.
        model: the served model: a directory or Hub id, or the contents of its config.json.
        to_hf: converts the actor's parameters, by their dotted paths, to tensors by Hugging Face names; by default as
            the actor's package of tunix reads a checkpoint.
        **settings: fields of `EngineConfig`; the engine has the maximum length of `rollout_config` unless
            `max_model_len` is among them.

    Raises:
        ConfigError: the actor's weights cannot be named, or a setting is invalid.
    """

    def __init__(
        self,
        *,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        mesh: Mesh,
        rollout_config: RolloutConfig,
        model: str | Path | Mapping[str, Any],
        to_hf: Callable[[Tensors], Tensors] | None = None,
        **settings: Any,
    ):
        self._tokenizer = tokenizer
        longest = rollout_config.max_prompt_length + rollout_config.max_tokens_to_generate
        settings = {"max_model_len": longest} | settings
        if isinstance(model, Mapping):
            own = make_mesh(1, devices=list(mesh.devices.flat))
            model = loading.random(model, own, dtype=settings.pop("dtype", "auto"))
            settings["mesh"] = own
        self._llm = LLM(model, skip_tokenizer_init=True, use_tqdm=False, **settings)
        self._to_hf = to_hf or _named_as_checkpoint(rollout_actor, self._llm.weights())
        self.update_params(nnx.state(rollout_actor, nnx.Param))

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **kwargs: Any) -> RolloutOutput:
        """Sample one completion for each prompt.

        Args:
            prompts: texts; equal ones are computed once, and sampled on their own.
            rollout_config: lengths, temperature, top-p, top-k, seed and EOS tokens.
            **kwargs: none.

        Returns:
            Texts and tokens without their EOS token, as tunix' own sampler gives them. Log-probabilities are those of
            the distribution at temperature 1, before top-p and top-k.

        Raises:
            TypeError: `kwargs` has an entry.
            ValueError: a prompt is longer than `max_prompt_length`, or a parameter is invalid.
        """
        if kwargs:
            raise TypeError(f"generate: {', '.join(kwargs)} is not supported; set it in the RolloutConfig")
        config, limit = rollout_config, rollout_config.max_prompt_length
        tokens = [self._tokens(prompt) for prompt in prompts]
        for index, ids in enumerate(tokens):
            if len(ids) > limit:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens, and max_prompt_length is {limit}; raise it in the "
                    "RolloutConfig, or shorten the prompt"
                )
        ends = [int(token) for token in config.eos_tokens or [self.eos_id()]]
        params = [self._params(config, ends, index) for index in range(len(prompts))]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in tokens], params, use_tqdm=False)
        made, logprobs = [], []
        for output in outputs:
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            count = len(ids) - int(bool(ids) and ids[-1] in ends)
            made.append(np.array(ids[:count], np.int32))
            pairs = zip(ids[:count], completion.logprobs or ())
            logprobs.append(np.array([step[token].logprob for token, step in pairs], np.float32))
        return RolloutOutput(
            text=[self._tokenizer.decode(ids.tolist()) for ids in made],
            logits=[],
            tokens=made,
            left_padded_prompt_tokens=np.array(
                [[self.pad_id()] * (limit - len(ids)) + ids for ids in tokens], np.int32
            ).reshape(len(tokens), limit),
            logprobs=logprobs if config.return_logprobs else None,
        )

    def get_per_token_logps(
        self, prompt_tokens: jax.Array | np.ndarray, completion_tokens: jax.Array | np.ndarray
    ) -> jax.Array:
        """Return the log-probabilities of completions, float32 `[B, L]`, at temperature 1.

        Args:
            prompt_tokens: `[B, P]`, padded on the left.
            completion_tokens: `[B, L]`, padded on the right; the result is 0 at padding.
        """
        pad, result = self.pad_id(), np.zeros(completion_tokens.shape, np.float32)
        rows = [
            (_without_padding(prompt, pad, left=True), _without_padding(completion, pad, left=False))
            for prompt, completion in zip(np.asarray(prompt_tokens), np.asarray(completion_tokens), strict=True)
        ]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
        asked = [index for index, (_, completion) in enumerate(rows) if completion]
        # The last token of a sequence that fills the model's length cannot be part of a prompt: one more is sampled.
        whole = [{"prompt_token_ids": rows[index][0] + rows[index][1]} for index in asked]
        for index, output in zip(asked, self._llm.generate(whole, params, use_tqdm=False)):
            prompt, completion = rows[index]
            found = zip(completion, output.prompt_logprobs[len(prompt) :], strict=True)
            result[index, : len(completion)] = [step[token].logprob for token, step in found]
        return jnp.asarray(result)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Give the engine the actor's weights, on their devices.

        Args:
            params: the actor's `nnx.state` of parameters.
            filter_types: kinds of parameters in `params`.

        Raises:
            ConfigError: `params` has LoRA parameters alone, which would have to be merged first, or a parameter
                without a Hugging Face name.
            CheckpointError: a tensor is missing or of another shape; the old weights stay.
        """
        if filter_types and nnx.LoRAParam in filter_types:
            raise ConfigError(
                "update_params: the actor trains LoRA parameters, which this rollout does not merge; train its own "
                "parameters, or pass to_hf= that merges them and an actor without LoRA"
            )
        # tunix forbids transfers to the host here. The update checks three sums of each tensor there, and no weights.
        with jax.transfer_guard("allow"):
            self._llm.update_weights(self._to_hf(_flat(params)), cast=True)

    def pad_id(self) -> int:
        """Return the tokenizer's padding token."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """Return the tokenizer's end token."""
        return self._tokenizer.eos_id()

    def model(self) -> None:
        """Return no model: tunix takes that for weights apart from the actor's, and gives them after each step.

        tunix compares the structure of any other with the actor's, and the engine's is its own (`llm.module`).
        """

    @property
    def llm(self) -> LLM:
        """The engine."""
        return self._llm

    def _tokens(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, with one BOS, as tunix' own sampler does."""
        start = [self._tokenizer.bos_id()] if self._tokenizer.bos_id() else []
        return [int(token) for token in self._tokenizer.dedup_bos_ids(start + list(self._tokenizer.encode(prompt)))]

    def _params(self, config: RolloutConfig, ends: Sequence[int], index: int) -> SamplingParams:
        """Return the parameters of the prompt at `index` of a call."""
        seed = None if config.seed is None else int(np.asarray(config.seed).reshape(-1)[-1]) + index
        return SamplingParams(
            temperature=config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=-1 if config.top_k is None else config.top_k,
            max_tokens=config.max_tokens_to_generate,
            stop_token_ids=list(ends),
            seed=seed,
            logprobs=0,
        )


def _without_padding(row: np.ndarray, pad: int, *, left: bool) -> list[int]:
    """Return the tokens of a padded row."""
    real = np.flatnonzero(row != pad)
    if not real.size:
        return []
    return row[real[0] :].tolist() if left else row[: real[-1] + 1].tolist()


def _flat(state: Any) -> dict[str, jax.Array]:
    """Return the arrays of a state by their dotted paths."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _named_as_checkpoint(actor: nnx.Module, served: Mapping[str, jax.Array]) -> Callable[[Tensors], Tensors]:
    """Return the inverse of how an actor's package of tunix reads a checkpoint's tensors.

    Args:
        actor: tunix' model.
        served: the engine's tensors, for their names and shapes.

    Raises:
        ConfigError: its package has no mapping, or parameters that are not made of one tensor each.
    """
    made = _mapping(actor)
    places: dict[str, tuple[str, tuple[int, ...], Any]] = {}
    for name, tensor in served.items():
        for pattern, (path, transform) in made.items():
            if re.fullmatch(pattern, name):
                places[re.sub(pattern, path, name)] = name, tuple(tensor.shape), transform
    unnamed = sorted(_flat(nnx.state(actor, nnx.Param)).keys() - places)
    if unnamed:
        raise ConfigError(
            f"{len(unnamed)} parameter(s) of the actor ({type(actor).__name__}) are not one tensor of the served model "
            f"each, {unnamed[0]!r} is the first; pass to_hf=, which converts parameters by path to tensors by Hugging "
            "Face names"
        )

    def convert(params: Tensors) -> Tensors:
        return {places[path][0]: _restore(array, *places[path][1:]) for path, array in params.items()}

    return convert


def _restore(array: jax.Array, shape: tuple[int, ...], transform: Any) -> jax.Array:
    """Return a checkpoint's tensor from the parameter that `transform`, a permutation and a shape, made of it."""
    permuted = transform and transform[0]
    if not permuted:
        return array.reshape(shape)
    return array.reshape([shape[axis] for axis in permuted]).transpose(np.argsort(permuted).tolist())


def _mapping(actor: nnx.Module) -> Mapping[str, Any]:
    """Return the mapping of an actor's package: patterns of tensors to paths of parameters and transformations."""
    package = type(actor).__module__.rpartition(".")[0]
    for name in _MAPPINGS:
        try:
            found = importlib.import_module(f"{package}.{name}")
        except ImportError:
            continue
        if hasattr(found, "_get_key_and_transform_mapping"):
            return found._get_key_and_transform_mapping(actor.config)
    raise ConfigError(
        f"the actor is a {type(actor).__module__}.{type(actor).__name__}, for which tunix does not say how checkpoints "
        "are read; pass to_hf=, which converts parameters by path to tensors by Hugging Face names"
    )
