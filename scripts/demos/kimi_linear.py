"""Train a small Kimi-Linear through jaxinfer's own layers: two Kimi Delta Attention layers, one MLA layer, and
experts.
"""

from __future__ import annotations

import json
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from safetensors.numpy import save_file

from demos.text import BOS, END, EOS, MAX_LENGTH, PAD
from jaxinfer import LLM, SamplingParams
from jaxinfer.checkpoint.rules import parameters
from jaxinfer.functional import training
from jaxinfer.loading import save as saving
from jaxinfer.loading import weights as loading
from jaxinfer.sharding import make_mesh

LENGTHS = (64, 128, MAX_LENGTH)
"""Batch lengths; a step is compiled for each."""
CONFIG = dict(
    architectures=["KimiLinearForCausalLM"],
    model_type="kimi_linear",
    hidden_size=128,
    num_hidden_layers=3,
    layer_types=["linear_attention", "linear_attention", "full_attention"],
    mlp_layer_types=["dense", "sparse", "sparse"],
    linear_num_heads=4,
    linear_head_dim=32,
    linear_conv_kernel_dim=4,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    n_shared_experts=1,
    routed_scaling_factor=1.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    dtype="float32",
    bos_token_id=BOS,
    eos_token_id=[EOS, END],
    pad_token_id=PAD,
)
"""Contents of config.json, except for the vocabulary size."""


class Trainer:
    """Trainer of the decoder, float32."""

    def __init__(self, vocabulary: int, seed: int, _threads: int):
        """Build the model; `_threads` is unused, because XLA uses every thread available to the process."""
        self.config = CONFIG | {"vocab_size": vocabulary}
        self.module = loading.random(self.config, make_mesh(1), seed=seed)
        start_decays(self.module, np.random.default_rng(seed))
        training.prepare(self.module)
        self.graph, state = nnx.split(self.module, nnx.Param)
        leaves, self.tree = jax.tree.flatten(state)
        # Drop the sharding of the one-device mesh: results of a step have none, so the step would be compiled twice.
        self.weights = dict(zip(parameters(self.module), map(jnp.asarray, map(np.asarray, leaves)), strict=True))
        self.parameters = sum(leaf.size for leaf in leaves)
        self.optimizer = optimizer_for(self.weights)
        self.state = self.optimizer.init(self.weights)

    def step(self, ids: np.ndarray, weights: np.ndarray, rate: float) -> float:
        """Train on a batch; return the loss before the update."""
        batch = jnp.asarray(ids, jnp.int32), jnp.asarray(weights), jnp.float32(rate)
        loss, self.weights, self.state = self._step(self.weights, self.state, *batch)
        return float(loss)

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _step(
        self, weights: dict[str, jax.Array], state: Any, ids: jax.Array, wanted: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        loss, gradient = jax.value_and_grad(self._loss)(weights, ids, wanted)
        updates, state = self.optimizer.update(gradient, state, weights)
        return loss, {path: value + rate * updates[path] for path, value in weights.items()}, state

    def _loss(self, weights: dict[str, jax.Array], ids: jax.Array, wanted: jax.Array) -> jax.Array:
        """Return the weighted mean of the next-token cross-entropy."""
        module = nnx.merge(self.graph, jax.tree.unflatten(self.tree, list(weights.values())))
        losses = optax.softmax_cross_entropy_with_integer_labels(training.logits(module, ids)[:, :-1], ids[:, 1:])
        return jnp.sum(losses * wanted[:, 1:]) / jnp.sum(wanted[:, 1:])

    def save(self, out: pathlib.Path) -> None:
        """Write the weights in float32, config.json and generation_config.json."""
        model_family, config = loading.parse(self.config)
        module = nnx.merge(self.graph, jax.tree.unflatten(self.tree, list(self.weights.values())))
        save_file(saving.tensors(module, model_family.weight_rules(config)), out / "model.safetensors")
        (out / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        said = {name: self.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (out / "generation_config.json").write_text(json.dumps(said, indent=2) + "\n")


def start_decays(module: nnx.Module, rng: np.random.Generator) -> None:
    """Initialise the decay parameters: rates of 1 to 16 over time steps of 0.001 to 0.1, as in Mamba 2
    (arXiv:2405.21060).
    """
    for path, param in parameters(module).items():
        if path.endswith(".decay"):
            param.set_value(jnp.log(jnp.asarray(rng.uniform(1, 16, param.shape), jnp.float32)))
        elif path.endswith(".decay_bias"):
            times = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), param.shape))
            param.set_value(
                jnp.asarray(np.log(np.expm1(times)), jnp.float32)
            )  # inverse of the softplus that the layer applies


def optimizer_for(weights: dict[str, jax.Array]) -> optax.GradientTransformation:
    """Build the optimizer: Muon (K. Jordan, 2024) for the layers' matrices, AdamW for the rest; `step` multiplies by
    the rate.
    """
    matrices = {
        path: MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
        if path.startswith("layers.") and path.endswith((".weight", ".up"))
        else None
        for path in weights
    }
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(1.0, weight_decay=0.1, consistent_rms=0.2, adam_b2=0.98, muon_weight_dimension_numbers=matrices),
    )


def answers(folder: pathlib.Path, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Generate greedy answers of up to `limit` tokens."""
    with LLM(folder, skip_tokenizer_init=True, use_tqdm=False) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=limit), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
