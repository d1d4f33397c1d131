"""Gemma 4 (`Gemma4ForCausalLM`): full layers with wider heads, keys shared between layers, inputs of each layer.

The published models differ in what they use: E2B and E4B share keys and values and have per-layer inputs, 31B and
26B-A4B have keys that are values in full layers, and 26B-A4B has experts beside each MLP.

Of checkpoints that read images and audio (`Gemma4ForConditionalGeneration`) only the text model is served.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.weight_table import Rule, expand, renamed
from jaxinfer.errors import ConfigError
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.gathering import gather
from jaxinfer.layers.moe import MoE, MoEConfig
from jaxinfer.layers.norms import RMSNorm, Scaling
from jaxinfer.layers.params import Build, constant
from jaxinfer.layers.per_layer import PerLayerInput, PerLayerInputs
from jaxinfer.layers.router import RouterConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, Layer, Pass, weight_rules
from jaxinfer.models.decoder_config import AFTER, BEFORE, FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, text_part, window_of
from jaxinfer.models.moe_rules import MoENames, moe_rules
from jaxinfer.sharding import axes

NOT_ABOUT_TEXT = ("vision_config", "audio_config", "vision_soft_tokens_per_image", "eoa_token_index")
"""Attributes of config.json about images and audio."""
NOT_TEXT = (r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\..*",)
"""Patterns of the tensors of towers and projectors."""
ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
}
"""`rope_parameters` of a file without them."""
SCALING = Scaling(wide=True)
EXPERTS_NORMS = {
    "mlp_own_norm": "post_feedforward_layernorm_1",
    "experts_norm": "pre_feedforward_layernorm_2",
    "experts_post_norm": "post_feedforward_layernorm_2",
}
"""Norms of layers with experts: attribute name to name in checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(DecoderConfig):
    """Decoder with inputs of each layer, and experts beside its MLPs."""

    input_width: int = 0
    """P: width of a layer's inputs; 0 for none."""
    input_vocab: int = 0
    """Rows of their table."""
    experts: MoEConfig | None = None
    """Mixture of experts whose output is added to that of the MLP."""
    wide_lent: bool = False
    """Whether layers without keys and values have an MLP of twice the width."""

    def ffn_of(self, layer: int) -> int:
        """Return the width of a layer's MLP."""
        return self.ffn * (2 if self.wide_lent and self.lender_of(layer) is not None else 1)


class Gemma4Layer(Layer):
    """Layer whose MLP and experts are added up, with its own inputs, and scaled as a whole."""

    def __init__(self, build: Build, config: Gemma4Config, number: int):
        super().__init__(build, config, number)
        width, more = config.attention.width, (config.norm_eps, config.norm_scaling)
        self.experts = None if config.experts is None else MoE(build.at("experts"), width, config.experts)
        if config.experts is not None:
            for name in EXPERTS_NORMS:
                setattr(self, name, RMSNorm(build.at(name), width, more[0], axes.EMBED, more[1]))
        sizes = width, config.input_width, config.activation
        self.inputs = PerLayerInput(build.at("inputs"), *sizes, *more) if config.input_width else None
        self.scale = constant(build, (1,), (None,), 1.0)

    @staticmethod
    def norm_names(config: Gemma4Config) -> Mapping[str, str]:
        """Return the norms of a layer: attribute name to name in checkpoints."""
        return {**Layer.norm_names(config), **({} if config.experts is None else EXPERTS_NORMS)}

    def __call__(
        self,
        x: jax.Array,
        kv_cache: Any,
        rope: tuple[jax.Array, jax.Array] | None,
        step: StepContext,
        inputs: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Map hidden states `[T, M]` to `[T, M]`, with the layer's inputs `[T, P]`; also return its new cache."""
        y, kv_cache = self.attend(self.attention_norm(x), kv_cache, rope, step)
        x = x + self.attention_post_norm(y)
        y = self.mlp(self.mlp_norm(x))
        if self.experts is not None:
            chosen = self.experts(self.experts_norm(x), step, ranked=x)
            y = self.mlp_own_norm(y) + self.experts_post_norm(chosen)
        x = x + self.mlp_post_norm(y)
        return (x if inputs is None else x + self.inputs(x, inputs)) * self.scale[...], kv_cache


class Gemma4Decoder(Decoder):
    """Decoder with inputs of each layer."""

    def __init__(self, build: Build, config: Gemma4Config):
        super().__init__(build, config, Gemma4Layer)
        sizes = config.input_vocab, (config.num_layers, config.input_width), config.attention.width
        more = config.norm_eps, config.norm_scaling
        self.inputs = PerLayerInputs(build.at("inputs"), *sizes, *more) if config.input_width else None

    def beside(self, tokens: jax.Array, x: jax.Array, step: StepContext) -> jax.Array | None:
        """Return the inputs of all layers, `[T, L, P]`."""
        if self.inputs is None:
            return None
        inputs, x = gather(self.inputs, self.mesh, x)
        made = inputs(tokens, x)
        return jnp.where(step.real[:, None, None], made, 0) if step.deterministic else made

    def more(self, number: int, run: Pass) -> Mapping[str, Any]:
        """Return further arguments of a layer's call: its inputs."""
        return {} if run.beside is None else {"inputs": run.beside[:, number]}


def config(reader: ConfigReader) -> Gemma4Config:
    """Read the configuration; a bidirectional attention of "vision" is that of images alone.

    The `text_config` of a multimodal checkpoint may omit what equals the default.
    """
    whole, reader = reader, text_part(reader, NOT_ABOUT_TEXT)
    if reader is not whole:
        reader.defaults(hidden_size=2304, intermediate_size=9216, num_hidden_layers=30)
    reader.defaults_if_absent(sliding_window=512, hidden_size_per_layer_input=256)
    reader.defaults(
        vocab_size=262_144,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131_072,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        rope_parameters=ROPES,
    )
    reader.require("use_bidirectional_attention", "vision")
    bias, kinds = reader.get_bool("attention_bias", False), _kinds(reader)
    shared = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        window=window_of(reader),
        kinds=kinds,
        activation="hidden_activation",
        local_rope={},
        full_heads=_full_heads(reader, kinds),
    )
    each = dict(scale=1.0, norm_scaling=SCALING, value_norm=True)
    keys = reader.get_bool("attention_k_eq_v", False)
    shared = replace(
        shared,
        attention=replace(shared.attention, keys_are_values=keys, **each),
        local_attention=replace(shared.local_attention, **each),
        norms=(BEFORE, AFTER),
        norm_scaling=SCALING,
        embedding_scale=shared.attention.width**0.5,
        logit_softcap=reader.get_float("final_logit_softcapping", None, above=0),
        lent_layers=_lent_layers(reader, kinds),
    )
    values = {field.name: getattr(shared, field.name) for field in fields(shared)}
    return Gemma4Config(
        **values,
        **_inputs(reader, shared.vocab_size),
        experts=_experts(reader, shared.norm_eps),
        wide_lent=reader.get_bool("use_double_wide_mlp", False),
    )


def _kinds(reader: ConfigReader) -> tuple[str, ...]:
    """Return the kind of each layer; by default each sixth is full, and the last one always."""
    layers = reader.get_int("num_hidden_layers")
    kinds = layer_kinds(reader, [FULL if number % 6 == 0 else SLIDING for number in range(1, layers + 1)])
    return (*kinds[:-1], FULL)


def _full_heads(reader: ConfigReader, kinds: tuple[str, ...]) -> tuple[int, int]:
    """Return kv heads and head dim of full layers, from `per_layer_config` or the attributes that it replaced."""
    kv_heads, head_dim = reader.get_int("num_key_value_heads"), reader.get_int("global_head_dim", 512)
    stated = reader.get_int("num_global_key_value_heads", None)
    if reader.get_bool("attention_k_eq_v", False) and stated:
        kv_heads = stated
    each = reader.get("per_layer_config", None)
    if each is None:
        return kv_heads, head_dim
    kv_heads, head_dim = reader.get_int("num_key_value_heads"), reader.get_int("head_dim")
    full = {number for number, kind in enumerate(kinds) if kind == FULL}
    numbers = isinstance(each, Mapping) and all(isinstance(key, str) and key.isdecimal() for key in each)
    if numbers and not each:  # full layers have the shape of the others
        return kv_heads, head_dim
    known = {"head_dim", "num_key_value_heads"}
    first = next(iter(each.values())) if numbers else None
    # transformers pads the numbers of layers with zeros.
    alike = isinstance(first, Mapping) and {*map(int, each)} == full and all(own == first for own in each.values())
    if not alike or not set(first) <= known:
        raise ConfigError(
            f"{reader.family}: per_layer_config={show(each)} must have the same head_dim and num_key_value_heads for "
            f"each full layer ({', '.join(map(str, sorted(full)))}) and nothing else; jaxinfer has one shape a kind"
        )
    own = ConfigReader(first, f"{reader.family}, per_layer_config")
    return own.get_int("num_key_value_heads", kv_heads), own.get_int("head_dim", head_dim)


def _lent_layers(reader: ConfigReader, kinds: tuple[str, ...]) -> int:
    """Read the number of last layers without keys and values."""
    lent = reader.get_int("num_kv_shared_layers", 0, least=0)
    left = kinds[: max(0, len(kinds) - lent)]
    if set(left) != set(kinds):
        raise ConfigError(
            f"{reader.family}: num_kv_shared_layers={lent} leaves {len(left)} of {len(kinds)} layers with keys and "
            f"values, and of these none is {' or '.join(sorted(set(kinds) - set(left)))}; choose fewer"
        )
    return lent


def _inputs(reader: ConfigReader, vocab: int) -> dict[str, int]:
    """Read the sizes of the layers' inputs."""
    width = reader.get_int("hidden_size_per_layer_input", 0, least=0)
    rows = reader.get_int("vocab_size_per_layer_input", 262_144)
    if width and rows < vocab:
        raise ConfigError(
            f"{reader.family}: vocab_size_per_layer_input={rows} is below vocab_size={vocab}; each token needs its row"
        )
    return {"input_width": width, "input_vocab": rows if width else 0}


def _experts(reader: ConfigReader, eps: float) -> MoEConfig | None:
    """Read the mixture of experts."""
    enabled = reader.get_bool("enable_moe_block", False)
    reader.skip("num_experts", "top_k_experts", "moe_intermediate_size")
    if not enabled:
        return None
    return MoEConfig(
        reader.get_int("num_experts"),
        reader.get_int("top_k_experts"),
        reader.get_int("moe_intermediate_size"),
        RouterConfig(input_norm=eps, expert_scale=True),
        reader.get_str("hidden_activation"),
    )


def rules(config: Gemma4Config) -> list[Rule]:
    """Return the weight table."""
    layer, table = "model.layers.{i}", [Rule("model.layers.{i}.layer_scalar", "layers.{i}.scale")]
    if config.experts is not None:
        made = moe_rules(config.experts, MoENames(("{i}",), router="router"), "model.layers", "layers.{i}.experts")
        table += renamed(made, {".router.weight": ".router.proj.weight"})
    if config.input_width:
        table += [
            Rule("model.embed_tokens_per_layer.weight", "inputs.embedding.weight"),
            Rule("model.per_layer_model_projection.weight", "inputs.projection.weight"),
            Rule("model.per_layer_projection_norm.weight", "inputs.norm.scale"),
            Rule(f"{layer}.per_layer_input_gate.weight", "layers.{i}.inputs.gate.weight"),
            Rule(f"{layer}.per_layer_projection.weight", "layers.{i}.inputs.out.weight"),
            Rule(f"{layer}.post_per_layer_input_norm.weight", "layers.{i}.inputs.norm.scale"),
        ]
    return weight_rules(config, block=Gemma4Layer) + expand(table, config.num_layers)


FAMILY = Family(
    {"Gemma4ForCausalLM": "gemma4_text", "Gemma4ForConditionalGeneration": "gemma4"},
    config,
    Gemma4Decoder,
    rules,
    ignored=NOT_TEXT,
    float16=False,
)
