"""Falcon H1 (`FalconH1ForCausalLM`, arXiv:2507.22448): attention and Mamba-2 beside each other in every layer.

Multipliers (muP, arXiv:2203.03466) scale embeddings, keys, inputs and outputs of both, the MLP and logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import jax

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.weight_table import Rule, expand, renamed
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention.paged import KVCache
from jaxinfer.kv.spec import Spec
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.mamba import Mamba, MambaSpec
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.norms import scale_by
from jaxinfer.layers.params import Build
from jaxinfer.layers.recurrent import RecurrentState
from jaxinfer.models.bamba import NAMES
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, Layer, Pass, weight_rules
from jaxinfer.models.decoder_config import FULL, DecoderConfig
from jaxinfer.models.decoder_reader import read_config
from jaxinfer.models.mamba_reader import mamba_spec
from jaxinfer.models.recurrent_rules import mamba_rules


@dataclass(frozen=True, kw_only=True)
class FalconH1Config(DecoderConfig):
    """Decoder with a Mamba-2 layer beside each attention layer."""

    mamba: MambaSpec
    inputs: tuple[float, float]
    """Factors on the inputs of Mamba and of attention."""
    outputs: tuple[float, float]
    """Factors on their outputs."""
    mlp_factors: tuple[float, float]
    """Factors on the MLP's gate, before its activation, and on its output."""


class FalconH1Layer(Layer):
    """Layer whose attention is the sum of attention and Mamba-2; its cache is the state and keys and values."""

    def __init__(self, build: Build, config: FalconH1Config, number: int):
        super().__init__(build, config, number)
        self.mamba = Mamba(build.at("mamba"), config.mamba)
        self.inputs, self.outputs, self.mlp_factors = config.inputs, config.outputs, config.mlp_factors

    def attend(
        self,
        x: jax.Array,
        kv_cache: tuple[RecurrentState, KVCache],
        rope: tuple[jax.Array, jax.Array] | None,
        step: StepContext,
    ) -> tuple[jax.Array, tuple[RecurrentState, KVCache]]:
        """Add up Mamba and attention, `[T, M]` to `[T, M]`; also return the layer's new state, keys and values."""
        (state, keys), (to_mamba, to_attention) = kv_cache, (scale_by(x, factor) for factor in self.inputs)
        scanned, state = self.mamba(to_mamba, state, step.states)
        attended, keys = self.attention(to_attention, keys, rope, step)
        y = scale_by(scanned, self.outputs[0]) + scale_by(attended, self.outputs[1])
        return y, (state, keys)

    def feed_forward(self, x: jax.Array, step: StepContext) -> jax.Array:
        """Apply the MLP to `[T, M]`."""
        gate, up = self.mlp.gate_up(x)
        y = ACTIVATIONS[self.mlp.activation](scale_by(gate, self.mlp_factors[0])) * up
        return scale_by(self.mlp.down(y), self.mlp_factors[1])


class FalconH1Decoder(Decoder):
    """Decoder whose layers have two places each in the cache: the state, then keys and values."""

    def __init__(self, build: Build, config: FalconH1Config):
        super().__init__(build, config, FalconH1Layer)

    def apply(
        self,
        number: int,
        layer: Layer,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        step: StepContext,
        run: Pass,
    ) -> jax.Array:
        """Apply a layer to `[T, M]`, and replace its entries of the cache."""
        state, keys = (step.array_index(2 * number + place) for place in (0, 1))
        call = self.remembering(partial(layer, rope=rope, step=step.of(2 * number + 1)), step)
        x, (run.cache[state], run.cache[keys]) = call(x, (run.cache[state], run.cache[keys]))
        return x

    def cache_specs(self) -> Sequence[Spec]:
        """Return what each layer caches."""
        return [part.cache_spec for layer in self.layers for part in (layer.mamba, layer.attention)]


def config(reader: ConfigReader) -> FalconH1Config:
    """Read the configuration; the multiplier of keys is part of the scores' scale."""
    reader.defaults_if_absent(num_key_value_heads=8, mamba_d_ssm=1024)
    reader.defaults(max_position_embeddings=8192, rms_norm_eps=1e-5)
    reader.require("mamba_use_mlp", True)
    reader.require("attn_layer_indices")
    reader.skip("num_logits_to_keep", "mlp_expansion_factor", "layers_block_type", "layer_types")
    bias, layers = reader.get_bool("attention_bias", False), reader.get_int("num_hidden_layers")
    made = read_config(
        reader, qkv_bias=bias, out_bias=bias, mlp_bias=reader.get_bool("mlp_bias", False), kinds=(FULL,) * layers
    )
    eps = made.norm_eps if reader.get_bool("mamba_rms_norm", False) else None
    mamba = replace(
        mamba_spec(reader, eps, width=reader.get_int("mamba_d_ssm", None)),
        out_bias=reader.get_bool("projectors_bias", False),
        gate_first=not reader.get_bool("mamba_norm_before_gate", True),
        multipliers=_factors(reader, "ssm_multipliers", 5),
    )
    scale = made.attention.head_dim**-0.5 * reader.get_float("key_multiplier", 1.0)
    made = replace(
        made,
        attention=replace(made.attention, scale=scale),
        embedding_scale=reader.get_float("embedding_multiplier", 1.0),
        round_embedding_scale=False,
        logit_scale=reader.get_float("lm_head_multiplier", 1.0),
    )
    ends = [
        tuple(reader.get_float(f"{part}_{end}_multiplier", 1.0) for part in ("ssm", "attention"))
        for end in ("in", "out")
    ]
    values = {field.name: getattr(made, field.name) for field in fields(made)}
    return FalconH1Config(
        **values, mamba=mamba, inputs=ends[0], outputs=ends[1], mlp_factors=_factors(reader, "mlp_multipliers", 2)
    )


def _factors(reader: ConfigReader, name: str, count: int) -> tuple[float, ...]:
    """Read a list of `count` finite numbers; ones if it is absent."""
    found = reader.get_list(name, [1.0] * count)
    if len(found) != count or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in found):
        raise ConfigError(f"{reader.family}: {name}={show(found)} must be a list of {count} numbers")
    return tuple(map(float, found))


def rules(config: FalconH1Config) -> list[Rule]:
    """Return the weight table."""
    mamba = mamba_rules(config.mamba, target="layers.{i}.mamba")
    return renamed(weight_rules(config, block=FalconH1Layer), NAMES) + expand(mamba, config.num_layers)


FAMILY = Family({"FalconH1ForCausalLM": "falcon_h1"}, config, FalconH1Decoder, rules)
