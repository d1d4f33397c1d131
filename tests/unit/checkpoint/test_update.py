"""Weights of a running engine by name: fused on every layout of devices as the loader does it, checked, given back."""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from support import checkpoint
from support.memory import MemorySource
from support.tiny import config

from jaxinfer import functional
from jaxinfer.checkpoint import rules
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.loading import weights
from jaxinfer.loading.checksum import checksum
from jaxinfer.loading.update import WeightTable
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding.policy import Placement

pytestmark = pytest.mark.xdist_group("update")

LAYER = "model.layers.0"
EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj")


class Model(NamedTuple):
    """A loaded checkpoint."""

    tensors: dict[str, np.ndarray]
    table: WeightTable
    params: list[jax.Array]


@cache
def model(
    family: str = "llama",
    tp: int = 1,
    quantization: str | None = None,
    pad: bool = False,
    tied: bool = False,
    **how: str,
) -> Model:
    """Load a checkpoint with the loader, and return its tensors beside the parameters."""
    hf = config(family) | {"tie_word_embeddings": tied}
    tensors = {name: 0.1 * value for name, value in checkpoint.shaped(hf).items()}
    (model_family, own), mesh = weights.parse(hf), make_mesh(tp)
    options = dict(quantization=quantization, placement=Placement(how), pad_heads=pad)
    module = weights.abstract_stored(model_family, own, np.dtype(np.float32), mesh, hf=hf, **options)
    source = model_family.source(MemorySource(tensors))
    rules.load(module, model_family.weight_rules(own), source, mesh, progress=False)
    program, params = functional.split(module, mesh)
    return Model(tensors, WeightTable(program, params), params)


def one_by_one(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors with those of each expert apart, as published checkpoints have them."""
    found = {}
    for name, value in tensors.items():
        match = EXPERTS.fullmatch(name)
        if match is None:
            found[name] = value
            continue
        for expert, one in enumerate(value):
            parts = np.split(one, 2) if match[2] == "gate_up" else [one]
            for part, own in zip(parts, ("gate", "up") if match[2] == "gate_up" else ("down",), strict=True):
                found[f"{match[1]}.{expert}.{own}_proj.weight"] = part
    return found


def updated(made: Model, tensors: Mapping[str, Any], start: list[Any] | None = None, **how: bool) -> list[Any]:
    """Return the parameters after an update, by default of no parameters."""
    params = [None] * len(made.params) if start is None else list(start)
    made.table.apply(made.table.prepare(tensors, **how), params)
    return params


def on_device(tensors: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("family", "tp", "quantization", "how"),
    [
        ("llama", 1, None, {}),
        ("llama", 4, None, {}),  # each kv head on two devices, a padded vocabulary
        ("llama", 3, None, {"pad": True}),  # heads of zeros
        ("llama", 2, "int8", {}),
        ("llama", 2, "fp8", {}),
        ("qwen3_moe", 2, None, {"*.mlp": "experts"}),
        ("qwen3_moe", 2, "int8", {"*.mlp": "experts"}),
    ],
)
def test_an_update_is_what_the_loader_makes_of_the_same_tensors(family, tp, quantization, how):
    made = model(family, tp, quantization, **how)
    given = on_device(made.tensors)
    for found, param in zip(updated(made, given), made.params, strict=True):
        assert (found.dtype, found.shape, found.sharding) == (param.dtype, param.shape, param.sharding)
        if param.dtype == np.int8:  # rotated in float32, by the loader in float64
            assert np.abs(np.asarray(found, np.int32) - np.asarray(param, np.int32)).max() <= 1
            assert np.mean(np.asarray(found) != np.asarray(param)) < 1e-3
        elif quantization is None or param.dtype == jnp.float8_e4m3fn:
            np.testing.assert_array_equal(found, param)
        else:
            np.testing.assert_allclose(found, param, rtol=1e-6)
    if quantization is None:
        assert made.table.checksum(made.params) == made.table.prepare(given).report.checksum == checksum(made.tensors)
        for name, tensor in made.table.tensors(made.params):
            np.testing.assert_array_equal(tensor, made.tensors[name], name)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_experts_one_by_one_are_those_of_a_stack(quantization):
    made = model("qwen3_moe", 2, quantization, **{"*.mlp": "experts"})
    apart = updated(made, one_by_one(made.tensors))
    for found, param in zip(apart, updated(made, made.tensors), strict=True):
        assert found.sharding == param.sharding
        np.testing.assert_allclose(found, param, rtol=1e-6 if quantization else 0, atol=param.dtype == np.int8)


def test_tensors_may_lie_anywhere_and_never_come_to_the_host(monkeypatch):
    """A trainer's mesh has more devices in another order, and other axes."""
    made = model("llama", 4)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), devices=jax.devices()[::-1])
    specs = cycle([(("fsdp", "tp"), None), ("tp", "fsdp"), (None, ("fsdp", "tp")), (None, None)])

    def laid(tensor: np.ndarray, spec: tuple) -> jax.Array:
        fits = [axis if tensor.shape[i] % 8 == 0 else None for i, axis in enumerate(spec[: tensor.ndim])]
        return jax.device_put(tensor, NamedSharding(mesh, PartitionSpec(*fits)))

    given = {name: laid(tensor, spec) for (name, tensor), spec in zip(made.tensors.items(), specs, strict=False)}
    read, kind = [], type(given["model.norm.weight"])
    whole = kind.__array__

    def watched(self: jax.Array, *args: Any, **how: Any) -> np.ndarray:
        read.append(self.size)
        return whole(self, *args, **how)

    monkeypatch.setattr(kind, "__array__", watched)
    found = updated(made, given)
    assert read and max(read) <= 3, "the sums of a tensor"
    monkeypatch.undo()
    for new, param in zip(found, made.params, strict=True):
        np.testing.assert_array_equal(new, param)


def test_no_more_than_one_parameter_is_in_memory_twice():
    """Beside the weights and the tensors given; experts are filled in place, one by one."""

    class Watched(list):
        most = 0

        def __setitem__(self, place: int, value: Any) -> None:
            super().__setitem__(place, value)
            self.most = max(self.most, sum(array.nbytes for array in jax.live_arrays()))

    for name, form in ("llama", dict), ("qwen3_moe", one_by_one):
        made = model(name)
        given, start = on_device(form(made.tensors)), Watched([param.copy() for param in made.params])
        prepared, largest = made.table.prepare(given), max(rules.nbytes(param) for param in made.params)
        before = sum(array.nbytes for array in jax.live_arrays())
        made.table.apply(prepared, start)
        assert start.most <= before + largest
        for array in given.values():
            array.delete()  # as a trainer does that donates them
        for new, param in zip(start, made.params, strict=True):
            np.testing.assert_array_equal(new, param)
        for _, steps in prepared.jobs:
            for step in steps:
                used = step.program.memory_analysis()
                assert used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes <= 1.1 * largest


def test_a_partial_update_keeps_the_rest():
    """Of a layer, of a fused projection, of an expert, of the stack of experts."""
    made = model("qwen3_moe", 2)
    other = {name: tensor + 1 for name, tensor in one_by_one(made.tensors).items()}
    names = [
        f"{LAYER}.self_attn.k_proj.weight",
        f"{LAYER}.mlp.experts.3.up_proj.weight",
        f"{LAYER}.mlp.experts.5.down_proj.weight",
        f"{LAYER}.input_layernorm.weight",
    ]
    given = {name: other[name] for name in names}
    found = updated(made, given, made.params, partial=True)
    back = one_by_one({name: np.asarray(tensor) for name, tensor in made.table.tensors(found)})
    for name, tensor in one_by_one(made.tensors).items():
        np.testing.assert_array_equal(back[name], given.get(name, tensor), name)
    assert made.table.prepare(given, partial=True).report.checksum == checksum(given)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_partial_update_of_quantised_rows_keeps_those_of_other_outputs(quantization: str):
    made = model("llama", 2, quantization)
    name = f"{LAYER}.self_attn.v_proj.weight"
    found = updated(made, {name: 2 * made.tensors[name]}, made.params, partial=True)
    for end, factor in ("weight", 1), ("weight_scale", 2):
        place = made.table._places[f"layers.0.attention.qkv.{end}"]
        old, new = (np.split(np.asarray(params[place]), [32, 48], axis=1) for params in (made.params, found))
        for part, rows, kept in zip((1, 1, factor), new, old, strict=True):
            np.testing.assert_allclose(*(one.astype(np.float32) for one in (rows, part * kept)), rtol=1e-6)


NORM, QUERY = f"{LAYER}.input_layernorm.weight", f"{LAYER}.self_attn.q_proj.weight"
WRONG: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "missing": ({QUERY: None}, f"lacks 1 tensor.*{QUERY}.*partial=True"),
    "extra": ({"model.layers.7.mlp.up_proj.weight": np.zeros(2, np.float32)}, "does not know: 'model.layers.7"),
    "misshaped": ({NORM: np.zeros(31, np.float32)}, rf"{NORM}.*expected shape \[32\], found \[31\]"),
    "transposed": ({QUERY: np.zeros((32, 64), np.float32)}, rf"{QUERY}.*expected shape \[64, 32\], found \[32, 64\]"),
    "a dtype that is rounded": ({NORM: np.zeros(32)}, f"{NORM}.*expected dtype float32, found float64; pass cast=True"),
    "integers": (
        {NORM: np.zeros(32, np.int32)},
        f"{NORM}.*expected dtype float32 or bfloat16 or float16, found int32; convert it",
    ),
    "a NaN": ({NORM: np.full(32, np.nan, np.float32)}, f"{NORM}.*expected finite values, found 32 that are NaN"),
    "infinite on a device": ({NORM: jnp.full(32, -jnp.inf)}, f"{NORM}.*found 32 that are NaN or infinite"),
    "an adapter": ({f"{LAYER}.self_attn.q_proj.lora_A.weight": np.zeros((4, 32), np.float32)}, "PEFT adapter"),
    "8 bits": ({f"{LAYER}.self_attn.q_proj.weight_scale": np.zeros(64, np.float32)}, "quantised"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_tensor_is_named_before_anything_is_replaced(wrong):
    changes, message = WRONG[wrong]
    given = {name: value for name, value in (model().tensors | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        model().table.prepare(given)


def test_wrong_weights_of_the_engine_s_own_form_are_named():
    made = model()
    whole = nnx.to_pure_dict(made.table.state(made.params))

    def refused(message: str, **changes: Any) -> None:
        state = {name: value for name, value in (whole | changes).items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            made.table.prepare(nnx.State(state))

    refused("lacks 1 parameter.*'head.weight'", head=None)
    refused("does not know: 'tail.weight'", tail={"weight": jnp.zeros(1)})
    refused(r"'norm.scale': expected shape \[32\], found \[3\]", norm={"scale": jnp.zeros(3)})
    refused("'norm.scale': expected dtype float32, found int8", norm={"scale": jnp.zeros(32, jnp.int8)})
    refused("'norm.scale': expected finite values, found 1 that", norm={"scale": jnp.zeros(32).at[5].set(jnp.nan)})
    deleted = jnp.zeros(32)
    deleted.delete()
    refused("'norm.scale' is an array that was deleted", norm={"scale": deleted})


@pytest.mark.parametrize("tree", [None, {}, [jnp.zeros(2)], {"a": {"b": jnp.zeros(2)}}, {"a": 1.0}, {3: jnp.zeros(2)}])
def test_what_is_no_tree_of_weights_is_a_type_error(tree):
    with pytest.raises(TypeError, match="update_weights"):
        model().table.prepare(tree)


def test_dtypes_that_lose_nothing_are_taken_and_others_rounded_if_asked():
    made = model()
    short = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in made.tensors.items()}
    wide = {name: tensor.astype(np.float64) for name, tensor in made.tensors.items()}
    for new, param in zip(updated(made, wide, cast=True), made.params, strict=True):
        np.testing.assert_array_equal(new, param)
    exact = {name: tensor.astype(np.float32) for name, tensor in short.items()}
    for new, other in zip(updated(made, short), updated(made, exact), strict=True):
        np.testing.assert_array_equal(new, other)
    assert made.table.prepare(short).report.checksum == checksum(exact)
    with pytest.raises(CheckpointError, match="NaN or infinite in float32"):
        made.table.prepare(made.tensors | {NORM: np.full(32, 1e300)}, cast=True)


@pytest.mark.parametrize(("kind", "tp"), [("int8", 1), ("fp8", 2)])
def test_values_without_scales_are_not_rounded_to_codes(kind: str, tp: int):
    made = model("llama", tp, kind)
    [weight, *_] = [one for one in jax.tree.leaves(made.table.state(made.params)) if one.dtype.itemsize == 1]
    state = jax.tree.map(lambda one: one.astype(jnp.float32) if one is weight else one, made.table.state(made.params))
    with pytest.raises(CheckpointError, match=f"expected codes of dtype {weight.dtype.name}, found float32"):
        made.table.prepare(state, partial=True, cast=True)


def test_tied_tensors_must_agree():
    tensors, table, _ = model(tied=True)
    embedding = tensors["model.embed_tokens.weight"]
    alone, both = (table.prepare(given).report for given in (tensors, tensors | {"lm_head.weight": embedding.copy()}))
    assert both.tensors == alone.tensors + 1
    with pytest.raises(CheckpointError, match="'lm_head.weight' and 'model.embed_tokens.weight' differ.*one parameter"):
        table.prepare(tensors | {"lm_head.weight": embedding + 1})


def test_names_need_weights_that_are_not_quantised_and_an_architecture():
    for kind, tp in (("int8", 1), ("fp8", 2)):
        with pytest.raises(ConfigError, match=f"quantised to {kind}, .*names='jaxinfer'"):
            list(model("llama", tp, kind).table.tensors([]))
    made = model()
    module = made.table.module
    del module.architecture
    try:
        with pytest.raises(ConfigError, match="Decoder does not say its architecture"):
            WeightTable(*functional.split(module)).prepare(made.tensors)
    finally:
        module.architecture = "LlamaForCausalLM"


def test_the_checksum_is_that_of_the_documentation():
    """By its definition, one element after another."""
    tensor = np.array([[1.5, -0.0, 3e-39], [7.0, 2.0, -1.0]], np.float32)

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ (x >> 16)

    bits = [int(value) for value in tensor.view(np.uint32).ravel()]
    first = sum(mix(b ^ i * 0x9E3779B9 & 0xFFFFFFFF) for i, b in enumerate(bits)) & 0xFFFFFFFF
    second = sum(mix(b + i * 0x85EBCA6B + 1 & 0xFFFFFFFF) for i, b in enumerate(bits)) & 0xFFFFFFFF
    expected = hashlib.sha256(f"a float32 2x3 {first:08x}{second:08x}\n".encode()).hexdigest()
    assert checksum({"a": tensor}) == checksum({"a": jnp.asarray(tensor)}) == expected
    assert checksum({"a": tensor.T.copy()}) != expected != checksum({"a": tensor.reshape(3, 2)})
