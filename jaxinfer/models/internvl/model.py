"""InternVL 2 to 3.5 (arXiv:2312.14238, arXiv:2412.05271): InternViT, a projector and a decoder of the Llama lineage.

Supports checkpoints of transformers (`InternVLForConditionalGeneration`) and original ones (`InternVLChatModel`). With
quantised weights the vision tower and the projector stay in the model's dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
from flax import nnx

from jaxinfer.checkpoint.hf import added_token
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kv.spec import Spec
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norms import LayerNorm
from jaxinfer.layers.params import Build
from jaxinfer.layers.vision import VisionTower, divide, gather
from jaxinfer.models.base import Family, FeatureRows
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.decoder import weight_rules as decoder_rules
from jaxinfer.models.internvl.config import InternVLConfig, read_config
from jaxinfer.models.internvl.images import IMAGES
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_GATHER, ENCODE, Collective


class Projector(nnx.Module):
    """Projector from tower rows to embeddings of the language model: LayerNorm, then an MLP of the model's width."""

    no_split = True
    steps = (ENCODE,)

    def __init__(self, build: Build, width: int, out: int, activation: str):
        self.mesh, self.out = build.mesh, out
        self.norm = LayerNorm(build, width, 1e-5, axes.EMBED)
        self.mlp = MLP(build, width, out, out, activation)

    def __call__(self, x: jax.Array, count: int) -> jax.Array:
        """Project `[n', rows, width]`, divided over mesh axis `data`, to replicated `[n, rows, M]`, n = `count`."""
        rows = self.mlp(self.norm(x).reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)
        return gather(rows, count, self.mesh)

    def collectives(self) -> list[Collective]:
        """List the all-gather of tiles over mesh axis `data`."""
        divided = self.mesh.shape.get(axes.DATA, 1) > 1
        return [Collective(ALL_GATHER, "rows of all tiles", self.out)] if divided else []


class InternVL(nnx.Module):
    """InternVL: a decoder in which rows of the vision tower replace the embeddings of image tokens."""

    def __init__(self, build: Build, config: InternVLConfig):
        self.config, self.mesh = config, build.mesh
        unquantised = build._replace(quantization=None)
        self.vision_tower = VisionTower(unquantised.at("vision_tower"), config.vision)
        rows = config.vision.width * config.shuffle**2
        self.projector = Projector(unquantised.at("projector"), rows, config.text.attention.width, config.activation)
        self.language_model = Decoder(build.at("language_model"), config.text)

    def encode(self, inputs: jax.Array) -> jax.Array:
        """Encode tiles `[n, C, height, width]` to rows `[n, rows, M]` in the dtype of the weights."""
        x = self.vision_tower(divide(inputs, self.mesh))[:, 1:]
        x = pixel_shuffle(x, self.config.shuffle, transposed=self.config.transposed)
        return self.projector(x, inputs.shape[0])

    def __call__(
        self, tokens: jax.Array, step: StepContext, cache: Cache, features: FeatureRows | None = None
    ) -> tuple[jax.Array, Cache]:
        """Compute hidden states `[T, M]` after the final norm for token ids `[T]`; also return the new cache arrays."""
        return self.language_model(tokens, step, cache, features)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`."""
        return self.language_model.logits(hidden)

    def cache_specs(self) -> Sequence[Spec]:
        """Return what each layer of the language model caches; the tower caches nothing."""
        return self.language_model.cache_specs()


def pixel_shuffle(x: jax.Array, block: int, *, transposed: bool) -> jax.Array:
    """Merge blocks of patches into rows: `[n, g * g, M]` to `[n, (g / block)^2, block^2 * M]`.

    `transposed`: rows run down the columns of the grid instead of along its rows (`ps_version` "v1").
    """
    count, side = x.shape[0], round(x.shape[1] ** 0.5)
    blocks = x.reshape(count, side // block, block, side // block, block, -1)
    order = (0, 3, 1, 2, 4, 5) if transposed else (0, 1, 3, 2, 4, 5)
    return blocks.transpose(order).reshape(count, (side // block) ** 2, -1)


OWN: Mapping[str, str] = {
    "embedding.cls": "embeddings.cls_token",
    "embedding.positions": "embeddings.position_embeddings",
    "embedding": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "attention_norm": "encoder.layer.{i}.layernorm_before",
    "attention_scale": "encoder.layer.{i}.lambda_1",
    "attention.q": "encoder.layer.{i}.attention.q_proj",
    "attention.k": "encoder.layer.{i}.attention.k_proj",
    "attention.v": "encoder.layer.{i}.attention.v_proj",
    "attention.q_norm": "encoder.layer.{i}.attention.q_norm",
    "attention.k_norm": "encoder.layer.{i}.attention.k_norm",
    "attention.out": "encoder.layer.{i}.attention.projection_layer",
    "mlp_norm": "encoder.layer.{i}.layernorm_after",
    "mlp_scale": "encoder.layer.{i}.lambda_2",
    "mlp.up": "encoder.layer.{i}.mlp.fc1",
    "mlp.down": "encoder.layer.{i}.mlp.fc2",
}
"""transformers' names of the tower's parts, below `vision_tower`."""

ORIGINAL: Mapping[str, str] = {
    "embedding.cls": "embeddings.class_embedding",
    "embedding.positions": "embeddings.position_embedding",
    "embedding": "embeddings.patch_embedding",
    "attention_norm": "encoder.layers.{i}.norm1",
    "attention_scale": "encoder.layers.{i}.ls1",
    "attention.qkv": "encoder.layers.{i}.attn.qkv",
    "attention.q_norm": "encoder.layers.{i}.attn.q_norm",
    "attention.k_norm": "encoder.layers.{i}.attn.k_norm",
    "attention.out": "encoder.layers.{i}.attn.proj",
    "mlp_norm": "encoder.layers.{i}.norm2",
    "mlp_scale": "encoder.layers.{i}.ls2",
    "mlp.up": "encoder.layers.{i}.mlp.fc1",
    "mlp.down": "encoder.layers.{i}.mlp.fc2",
}
"""Original checkpoints' names of the tower's parts, below `vision_model`."""

LINEAR: Mapping[str, str] = {".weight": ".weight", ".bias": ".bias"}
NORM: Mapping[str, str] = {".weight": ".scale", ".bias": ".bias"}


def _tower_rules(config: InternVLConfig) -> list[Rule]:
    """Return the weight rules of the tower, with names and targets relative to it."""
    vision, names, table = config.vision, ORIGINAL if config.original else OWN, []

    def add(
        name: str, target: str, leaves: Mapping[str, str], parts: tuple[str, ...] = (), layer: int | None = None
    ) -> None:
        if layer is not None:
            target = f"layers.{layer}.{target}"
        unused = layer is not None and layer >= vision.layers
        source = names[name].replace("{i}", str(layer))
        for hf_name, own_name in leaves.items():
            table.append(Rule(source + hf_name, None if unused else target + own_name, parts))

    whole = {"": ""}
    add("embedding.cls", "embedding.cls", whole)
    add("embedding", "embedding", LINEAR)
    if vision.positions:
        add("embedding.positions", "embedding.positions", whole)
    if vision.final_norm:
        add("norm", "norm", NORM)
    norm = NORM if vision.norm == "layer_norm" else {".weight": ".scale"}
    qkv = LINEAR if vision.qkv_bias else {".weight": ".weight"}
    for layer in range(config.stored_layers):
        for part in ("attention", "mlp"):
            add(f"{part}_norm", f"{part}_norm", norm, layer=layer)
            add(f"{part}_scale", f"{part}_scale", whole, layer=layer)
        for parts in [("q", "k", "v")] if config.original else [("q",), ("k",), ("v",)]:
            add(f"attention.{''.join(parts)}", "attention.qkv", qkv, parts, layer)
        for part in ("q", "k") if vision.qk_norm_eps is not None else ():
            add(f"attention.{part}_norm", "attention.norm_scale", {".weight": ""}, (part,), layer)
        add("attention.out", "attention.out", LINEAR, layer=layer)
        add("mlp.up", "mlp.up", LINEAR, ("up",), layer)
        add("mlp.down", "mlp.down", LINEAR, layer=layer)
    if not config.original:
        unneeded = ["embeddings.mask_token", *([] if vision.final_norm else ["layernorm.weight", "layernorm.bias"])]
        table += [Rule(name, None) for name in unneeded]
    return table


def weight_rules(config: InternVLConfig) -> list[Rule]:
    """Return the weight rules of all tensors; those of transformers by their names on the Hub and its newer ones."""
    tower, projector, parts = (
        ("vision_model", "mlp1", ("0", "1", "3"))
        if config.original
        else ("vision_tower", "multi_modal_projector", ("layer_norm", "linear_1", "linear_2"))
    )
    table = [
        replace(rule, source=f"{tower}.{rule.source}", target=rule.target and f"vision_tower.{rule.target}")
        for rule in _tower_rules(config)
    ]
    for part, target, leaves in zip(parts, ("norm", "mlp.up", "mlp.down"), (NORM, LINEAR, LINEAR), strict=True):
        fused = ("up",) if target == "mlp.up" else ()
        table += [
            Rule(f"{projector}.{part}{hf_name}", f"projector.{target}{own_name}", fused)
            for hf_name, own_name in leaves.items()
        ]
    if not config.original:
        table = [replace(rule, also=(f"model.{rule.source}",)) for rule in table]
    for rule in decoder_rules(config.text):
        own = rule.source.replace("model.", "model.language_model.", 1)  # the head is outside of `model`
        target = rule.target and f"language_model.{rule.target}"
        also = () if config.original else (own,)
        table.append(replace(rule, source=f"language_model.{rule.source}", target=target, also=also))
    return table


def _from_folder(directory: Path) -> Mapping[str, int]:
    """Read the image token's id, which original checkpoints keep in the tokenizer's files."""
    token = added_token(directory, IMAGES.placeholder)
    return {} if token is None else {"image_token_id": token}


def _untie(config: InternVLConfig, tie: str) -> InternVLConfig:
    """Return the configuration with an untied head."""
    return replace(config, text=replace(config.text, tied=False))


FAMILY = Family(
    {"InternVLForConditionalGeneration": "internvl", "InternVLChatModel": "internvl_chat"},
    read_config,
    InternVL,
    weight_rules,
    _from_folder,
    IMAGES,
    untie=_untie,
)
