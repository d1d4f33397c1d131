"""InternVL 2 to 3.5 (arXiv:2312.14238, arXiv:2412.05271): InternViT, a projector and a decoder of the Llama lineage.

Checkpoints of transformers (`InternVLForConditionalGeneration`) and original ones (`InternVLChatModel`). The vision
tower and the projector stay in the model's dtype where weights are quantised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
from flax import nnx

from jaxinfer.checkpoint.hf import added_token
from jaxinfer.checkpoint.rules import Rule
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kv.spec import Full, State
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
    """Rows of the tower to embeddings of the language model: LayerNorm, then an MLP of the latter's width."""

    placed_whole = True
    steps = (ENCODE,)

    def __init__(self, build: Build, width: int, out: int, activation: str):
        self.mesh, self.out = build.mesh, out
        self.norm = LayerNorm(build, width, 1e-5, axes.EMBED)
        self.mlp = MLP(build, width, out, out, activation)

    def __call__(self, x: jax.Array, count: int) -> jax.Array:
        """`[n', rows, width]` over the mesh axis `data` -> the first `count`, `[n, rows, M]`, on every device."""
        rows = self.mlp(self.norm(x).reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)
        return gather(rows, count, self.mesh)

    def collectives(self) -> list[Collective]:
        """That of tiles over the axis `data`."""
        divided = self.mesh.shape.get(axes.DATA, 1) > 1
        return [Collective(ALL_GATHER, "rows of all tiles", self.out)] if divided else []


class InternVL(nnx.Module):
    """A decoder some of whose tokens take the rows that the vision tower made."""

    def __init__(self, build: Build, config: InternVLConfig):
        self.config, self.mesh = config, build.mesh
        unquantised = build._replace(quantization=None)
        self.vision_tower = VisionTower(unquantised.at("vision_tower"), config.vision)
        rows = config.vision.width * config.shuffle**2
        self.projector = Projector(unquantised.at("projector"), rows, config.text.attention.width, config.activation)
        self.language_model = Decoder(build.at("language_model"), config.text)

    def encode(self, inputs: jax.Array) -> jax.Array:
        """Tiles `[n, C, height, width]` -> rows `[n, rows, M]`, in the dtype of the weights."""
        x = self.vision_tower(divide(inputs, self.mesh))[:, 1:]
        x = pixel_shuffle(x, self.config.shuffle, transposed=self.config.transposed)
        return self.projector(x, inputs.shape[0])

    def __call__(
        self, tokens: jax.Array, step: StepContext, lanes: Cache, features: FeatureRows | None = None
    ) -> tuple[jax.Array, Cache]:
        """Token ids `[T]` -> hidden states `[T, M]` after the last norm, and the lanes as they now are."""
        return self.language_model(tokens, step, lanes, features)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[B, M]` -> float32 logits `[B, V']`."""
        return self.language_model.logits(hidden)

    def cache_specs(self) -> Sequence[Full | State]:
        """Those of the language model; the tower keeps nothing."""
        return self.language_model.cache_specs()


def pixel_shuffle(x: jax.Array, block: int, *, transposed: bool) -> jax.Array:
    """Every block of patches as one row: `[n, g * g, M]` -> `[n, (g / block)^2, block^2 * M]`.

    `transposed`: rows run down the columns of the grid, not along its rows (`ps_version` "v1").
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
"""What transformers calls the tower's parts, after `vision_tower`."""

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
"""What the original checkpoints call them, after `vision_model`."""

LINEAR: Mapping[str, str] = {".weight": ".weight", ".bias": ".bias"}
NORM: Mapping[str, str] = {".weight": ".scale", ".bias": ".bias"}


def _tower_rules(config: InternVLConfig) -> list[Rule]:
    """Names and targets within the tower."""
    vision, names, table = config.vision, ORIGINAL if config.original else OWN, []

    def add(
        name: str, target: str, leaves: Mapping[str, str], parts: tuple[str, ...] = (), layer: int | None = None
    ) -> None:
        if layer is not None:
            target = f"layers.{layer}.{target}"
        unused = layer is not None and layer >= vision.layers
        source = names[name].replace("{i}", str(layer))
        for theirs, ours in leaves.items():
            table.append(Rule(source + theirs, None if unused else target + ours, parts))

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
    """All tensors; those of transformers by the names on the Hub and by its own."""
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
            Rule(f"{projector}.{part}{theirs}", f"projector.{target}{ours}", fused) for theirs, ours in leaves.items()
        ]
    if not config.original:
        table = [replace(rule, also=(f"model.{rule.source}",)) for rule in table]
    for rule in decoder_rules(config.text):
        own = rule.source.replace("model.", "model.language_model.", 1)  # the head is not within its `model`
        target = rule.target and f"language_model.{rule.target}"
        also = () if config.original else (own,)
        table.append(replace(rule, source=f"language_model.{rule.source}", target=target, also=also))
    return table


def _from_folder(directory: Path) -> Mapping[str, int]:
    """The image token, which an original config.json leaves to its tokenizer."""
    token = added_token(directory, IMAGES.placeholder)
    return {} if token is None else {"image_token_id": token}


def _untie(config: InternVLConfig, tie: str) -> InternVLConfig:
    """Return the configuration with a head of its own."""
    return replace(config, text=replace(config.text, tied=False))


FAMILY = Family(read_config, InternVL, weight_rules, _from_folder, IMAGES, untie=_untie)
