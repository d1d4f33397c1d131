"""LoRA adapters: each token is computed as by the model with the weights of its own adapter merged."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from support import checkpoint, four_bits
from support.cases import poison
from support.tiny import BLOCK, VOCAB, config, joint_runner, make_engine, make_request, prompt, run, shapes_of

from jaxinfer import functional
from jaxinfer.adapter import Adapter, find
from jaxinfer.config import EngineConfig
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.loading import weights
from jaxinfer.loading.adapters import AdapterTable, extended
from jaxinfer.loading.update import WeightTable
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh, plan
from jaxinfer.sharding.placement import device_bytes

RANKS = {"first": 4, "second": 2}
GREEDY = SamplingParams(temperature=0, max_tokens=9)
PREFIX = prompt(3 * BLOCK, 8)
EACH = (None, "first", "second", None, "first")
SETTINGS = dict(), dict(budget=5), dict(pool_blocks=12), dict(decode_steps=4)


class Loaded(NamedTuple):
    """A model with room for three adapters of rank 4, and its weights by name."""

    program: functional.Program
    params: list[Any]
    table: AdapterTable
    weights: WeightTable
    tensors: Mapping[str, np.ndarray]

    def install(self, name: str, tensors: Mapping[str, np.ndarray], alpha: float = 8.0, **fields: Any) -> Adapter:
        config = {"peft_type": "LORA", "r": RANKS.get(name, 4), "lora_alpha": alpha, **fields}
        return self.table.install(self.table.prepare(name, tensors, config), self.params)

    def merge(self, tensors: Mapping[str, np.ndarray], scale: float) -> None:
        """Replace the model's weights by those with an adapter merged; without tensors by its own."""
        merged = dict(self.tensors)
        for name in tensors:
            if ".lora_A." in name:
                own = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
                merged[own] = merged[own] + scale * (tensors[name.replace("lora_A", "lora_B")] @ tensors[name])
        self.weights.apply(self.weights.prepare(merged), self.params)


def load(family: str = "llama", tp: int = 1, quantization: str | None = None, **how: Any) -> Loaded:
    mesh, settings = make_mesh(tp), EngineConfig(max_adapters=3, max_adapter_rank=4)
    hf = config(family) | ({"num_attention_heads": 8} if tp > 1 else {})
    made = weights.random(hf, mesh, seed=1)
    tensors = dict(WeightTable(*functional.split(made, mesh)).tensors(functional.split(made, mesh)[1]))
    module = weights.random(hf, mesh, seed=1, quantization=quantization) if quantization else made
    program, params = functional.split(extended(module, settings, mesh), mesh, **how)
    own = WeightTable(program, params)
    table = AdapterTable(program, own.module, settings)
    if quantization is None:  # random copies of a repeated kv head differ
        own.apply(own.prepare(tensors), params)
    return Loaded(program, params, table, own, {name: np.asarray(value) for name, value in tensors.items()})


def adapter(tensors: Mapping[str, np.ndarray], name: str, size: float = 0.3) -> dict[str, np.ndarray]:
    """Return an adapter of all linear layers of attention and MLPs, under PEFT's names."""
    rng, rank, made = np.random.default_rng(len(name)), RANKS.get(name, 4), {}
    for own, tensor in tensors.items():
        if own.endswith("_proj.weight"):
            where = f"base_model.model.{own.removesuffix('.weight')}"
            (out, width), draw = tensor.shape, rng.standard_normal
            made[f"{where}.lora_A.weight"] = (draw((rank, width)) * size).astype(np.float32)
            made[f"{where}.lora_B.weight"] = (draw((out, rank)) * size / rank).astype(np.float32)
    return made


def logits(loaded: Loaded, slots: list[int]) -> np.ndarray:
    """Return the logits of the last token of a prompt for each of these slots, all of them in one batch."""
    chunks = [(PREFIX, 0, len(PREFIX))] * len(slots)
    width = len(PREFIX) // BLOCK
    one = np.arange(len(slots) * width).reshape(len(slots), width)
    batch = functional.prefill_batch(chunks, one, tile=loaded.program.tile)
    each = np.repeat(np.array(slots, np.int32), len(PREFIX))
    batch = replace(batch, adapters=each)
    cache = functional.init_cache(loaded.program, len(slots) * width, BLOCK)
    step = jax.jit(functional.prefill, static_argnums=0)
    return np.asarray(step(loaded.program, loaded.params, cache, batch)[0])[:, :VOCAB]


@pytest.mark.parametrize(("family", "tp"), [("llama", 2), ("phi3", 1), ("qwen2", 8)])
def test_logits_are_those_of_the_merged_weights(family: str, tp: int):
    """Adapters of fused tensors, repeated kv heads, a divided input; mixed with none in one batch."""
    loaded = load(family, tp)
    first, second = (adapter(loaded.tensors, name) for name in RANKS)
    loaded.install("first", first, alpha=8.0)
    loaded.install("second", second, alpha=3.0, use_rslora=True)
    mixed, plain = logits(loaded, [1, -1, 0]), logits(loaded, [-1, -1, -1])
    np.testing.assert_array_equal(mixed[1], plain[1])
    assert np.abs(mixed[[0, 2]] - plain[[0, 2]]).max(axis=1).min() > 0.1
    for row, tensors, scale in ((0, second, 3 / 2**0.5), (2, first, 8 / 4)):
        loaded.merge(tensors, scale)
        np.testing.assert_allclose(mixed[row], logits(loaded, [-1, -1, -1])[row], atol=1e-4)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantised_weights_keep_their_product(quantization: str):
    """The change of the logits is that of the adapter, not of a second rounding of merged weights."""
    loaded, whole = load(quantization=quantization), load()
    tensors = adapter(loaded.tensors, "first")
    for one in (loaded, whole):
        one.install("first", tensors)
    (plain, mixed), (exact, merged) = logits(loaded, [-1, 0]), logits(whole, [-1, 0])
    error = np.abs(plain - exact).max()
    assert error > 0 and np.abs(mixed - merged).max() < 3 * error < np.abs(mixed - plain).max() / 3


def test_weights_in_4_bits_keep_their_product(tmp_path):
    """Adapters change the logits as they change those of the dequantised weights."""
    mesh, settings = make_mesh(), EngineConfig(max_adapters=3, max_adapter_rank=4)
    plain = checkpoint.write(tmp_path / "plain", {"vocab_size": VOCAB}, with_tokenizer=False)
    folder, found = four_bits.quantise(plain, tmp_path / "packed", "awq", group=16), []
    tensors = load_file(plain / "model.safetensors")
    for quantization in (None, "dequantize"):
        module = weights.load(folder, mesh, quantization=quantization, progress=False)
        program, params = functional.split(extended(module, settings, mesh), mesh)
        assert any(array.dtype == np.uint8 for array in params) == (quantization is None)
        own = WeightTable(program, params)
        one = Loaded(program, params, AdapterTable(program, own.module, settings), own, tensors)
        one.install("first", adapter(tensors, "first"))
        found.append(logits(one, [-1, 0]))
    assert np.abs(found[0][0] - found[0][1]).max() > 0.1
    np.testing.assert_allclose(*found, atol=1e-4)


@cache
def served() -> tuple[Runner, Loaded, dict[str, dict[str, np.ndarray]]]:
    loaded = load()
    made = {name: adapter(loaded.tensors, name) for name in RANKS}
    for name, tensors in made.items():
        loaded.install(name, tensors)
    runner = Runner(loaded.program, loaded.params, shapes_of(loaded.program, switched=True))
    return runner, loaded, made


def request(name: str, own: Adapter | None, tokens: list[int] = PREFIX, **fields: Any) -> Request:
    return make_request(name, tokens + prompt(5, 3), GREEDY, **fields, **({} if own is None else {"adapter": own}))


def test_each_request_has_its_own_adapter():
    """In a batch of several adapters, in chunks or joint steps, preempted, with cached prefixes: as merged weights."""
    runner, loaded, made = served()
    by_name = loaded.table.by_name
    expected = {}
    for name in (None, *RANKS):
        loaded.merge(made.get(name, {}), 8 / RANKS.get(name, 1))
        expected[name] = run(make_engine(runner), [request("a", None)])[0]
    loaded.merge({}, 0)
    assert len({str(tokens) for tokens in expected.values()}) == 3
    both = joint_runner(runner)
    for one, settings in (*((runner, own) for own in SETTINGS), (both, dict(budget=7))):
        engine = make_engine(one, **settings)
        poison(one)
        for _ in range(2):
            wanted = [request(str(i), by_name.get(name)) for i, name in enumerate(EACH)]
            assert run(engine, wanted) == [expected[name] for name in EACH]
        assert (engine.scheduler.preempted > 0) == ("pool_blocks" in settings)
        if not settings:
            assert all(one.cached_tokens >= len(PREFIX) for one in wanted)  # of requests with the same adapter


def test_an_adapter_is_replaced_without_compiling_and_shares_no_block_with_the_old_one():
    runner, loaded, made = served()
    engine = make_engine(runner)
    [before] = run(engine, [request("a", loaded.table.by_name["first"])])
    programs, others = set(runner.programs.temporaries), run(engine, [request("b", loaded.table.by_name["second"])])
    loaded.table.drop("first", loaded.params)
    try:
        again = loaded.install("first", {name: value * 1.5 for name, value in made["first"].items()})
        assert again.slot == 0
        changed = request("c", again)
        assert run(engine, [changed]) != [before] and changed.cached_tokens == 0
        assert run(engine, [request("d", loaded.table.by_name["second"])]) == others
    finally:
        loaded.table.drop("first", loaded.params)
        same = loaded.install("first", made["first"])
    hit = request("e", same)
    assert run(engine, [hit]) == [before] and hit.cached_tokens >= len(PREFIX)  # of equal content, added again
    assert set(runner.programs.temporaries) == programs


@pytest.mark.slow
def test_deterministic_steps_give_the_same_bits_in_any_batch():
    loaded = load(deterministic=True)
    for name in RANKS:
        loaded.install(name, adapter(loaded.tensors, name))
    runner = Runner(loaded.program, loaded.params, shapes_of(loaded.program, switched=True))
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
    by_name = loaded.table.by_name

    def of(names: tuple[str | None, ...]) -> list[tuple[list[int], list[float]]]:
        own = [{} if name is None else {"adapter": by_name[name]} for name in names]
        wanted = [make_request(str(i), PREFIX, params, **one) for i, one in enumerate(own)]
        tokens = run(make_engine(runner), wanted)
        values = [[float(logprob) for logprob, *_ in one.sequences[0].logprobs] for one in wanted]
        return list(zip([sample[0] for sample in tokens], values, strict=True))

    assert of(EACH) == [of((name,))[0] for name in EACH]


@pytest.fixture(scope="module")
def llama() -> Loaded:
    loaded = load()
    loaded.install("there", adapter(loaded.tensors, "there"))
    return loaded


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
FAR = Q.replace("0", "7")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {f"{Q}B.weight": np.ones((3, 4), np.float32)},
            r"lora_B.weight': expected shape \[64, 4\], found \[3, 4",
        ),
        (
            {f"{Q}A.weight": np.ones((4, 5), np.float32)},
            r"expected shape \[4, 32\], found \[4, 5\].*another base",
        ),
        ({f"{Q}A.weight": np.ones((8, 32)), f"{Q}B.weight": np.ones((64, 8))}, "rank 8, and max_adapter_rank is 4"),
        ({f"{Q}A.weight": np.full((4, 32), np.inf)}, "found 128 that are NaN or infinite"),
        ({f"{FAR}A.weight": np.ones((4, 32)), f"{FAR}B.weight": np.ones((64, 4))}, "no linear layer 'model.layers.7"),
        ({"lm_head.lora_A.weight": np.ones((4, 32)), "lm_head.lora_B.weight": np.ones((97, 4))}, "'lm_head' cannot"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_anything_changes(llama: Loaded, changes: dict, said: str):
    before = list(llama.params)
    given = {f"{Q}A.weight": np.ones((4, 32)), f"{Q}B.weight": np.ones((64, 4))} | changes
    with pytest.raises(ValueError, match=said):
        llama.table.prepare("new", given, {"r": 8 if "rank 8" in said else 4, "lora_alpha": 1})
    assert list(llama.table.by_name) == ["there"]
    assert all(one is other for one, other in zip(before, llama.params, strict=True))


def test_too_many_adapters_and_unknown_names_are_refused(llama: Loaded):
    tensors = adapter(llama.tensors, "there")
    with pytest.raises(ValueError, match="'there' is there already"):
        llama.install("there", tensors)
    try:
        for name in ("a", "b"):
            llama.install(name, tensors)
        with pytest.raises(ConfigError, match="are 3 adapters, and max_adapters is 3; remove one of 'there', 'a', 'b'"):
            llama.install("c", tensors)
    finally:
        for name in ("a", "b"):
            llama.table.drop(name, llama.params)
    with pytest.raises(ValueError, match="adapter 'a' is unknown; there are: 'there'"):
        find(llama.table.by_name, "a", "prompt 0")
    with pytest.raises(ValueError, match="this LLM takes none"):
        find(None, "a", "prompt 0")


def test_experts_cannot_have_adapters():
    """Attention beside them can."""
    loaded = load("qwen3_moe")
    expert, (out, width) = next((name, t.shape[-2:]) for name, t in loaded.tensors.items() if "experts" in name)
    module = expert.removesuffix(".weight")
    given = {f"{module}.lora_A.weight": np.ones((4, width)), f"{module}.lora_B.weight": np.ones((out, 4))}
    with pytest.raises(CheckpointError, match="experts.*cannot have an adapter|has no linear layer"):
        loaded.install("new", given)
    attention = {name: tensor for name, tensor in loaded.tensors.items() if "self_attn" in name}
    assert loaded.install("new", adapter(attention, "new")).modules == 8


@pytest.mark.parametrize("tp", [1, 2])
def test_a_plan_counts_what_an_engine_holds(tp: int):
    """Bytes of adapters on each device, and the all-reduce of each row-parallel projection."""
    hf, settings = config("llama"), {"max_adapters": 3, "max_adapter_rank": 4}
    bare, made = (plan(hf, mesh={"model": tp}, **own) for own in ({}, settings))
    mesh = make_mesh(tp)
    _, params = functional.split(extended(weights.random(hf, mesh), EngineConfig(**settings), mesh), mesh)
    rows = [row for row in made.rows if ".adapters." in row.path]
    assert sum(row.device_bytes for row in made.rows) == sum(map(device_bytes, params))
    assert sum(row.device_bytes for row in bare.rows) + sum(row.device_bytes for row in rows) == sum(
        row.device_bytes for row in made.rows
    )
    assert made.checkpoint_bytes == bare.checkpoint_bytes
    added = [one for one in made.exchanges if one not in bare.exchanges]
    assert [one.row_bytes for one in added] == ([12 * 4] * 4 if tp == 2 else [])


def test_new_weights_keep_adapters():
    """Also where all arrays were dropped; and they are no part of the weights."""
    loaded = load()
    loaded.install("first", adapter(loaded.tensors, "first"))
    before = [np.asarray(array) for array in loaded.params]
    given = {name: np.asarray(value) for name, value in loaded.weights.tensors(loaded.params)}
    assert given.keys() == loaded.tensors.keys()
    assert not [path for path, _ in nnx.to_flat_state(loaded.weights.state(loaded.params)) if "adapters" in path]
    loaded.params[:] = [None] * len(loaded.params)
    loaded.weights.apply(loaded.weights.prepare(given), loaded.params)
    loaded.table.restore(loaded.params)
    for one, other in zip(before, loaded.params, strict=True):
        np.testing.assert_array_equal(one, np.asarray(other))
