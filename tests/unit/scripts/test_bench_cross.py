"""`scripts/bench.py cross` on toys: the padded projections give the same numbers for more work, and what is shared is
counted."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import calls, checkpoint, cross
from benchmarks.blocks import Read
from benchmarks.cross import OURS, PADDED, Bench, Work
from support.checkpoint import tensors
from support.cross import blocks, cross_request, cross_runner, text
from support.tiny import make_engine, run

from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding.collectives import DECODE, PREFILL

pytestmark = pytest.mark.xdist_group("bench")

TOY = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
}
WORK = Work(rows=3, document=20, context=5, repeats=1)


@pytest.fixture(scope="module")
def toy() -> Bench:
    return Bench({**cross.LARGE, **TOY, "dtype": "float32"}, WORK, dtype="float32", seed=0, kernel="xla")


@pytest.mark.slow
def test_both_ways_of_projecting_give_the_same_numbers(toy: Bench):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 32), np.float32))
    for ours, padded in zip(*(toy._modules[variant].decoder.layers for variant in (OURS, PADDED)), strict=True):
        for name in ("q", "kv"):
            own, other = (getattr(layer.cross.qkv, name)(x) for layer in (ours, padded))
            assert len(own) == len(other) == (1 if name == "q" else 2)
            np.testing.assert_allclose(own, other, rtol=0, atol=1e-6)


def test_padded_projections_are_made_whole(toy: Bench, monkeypatch: pytest.MonkeyPatch):
    """q of T tokens, k and v of S positions, against all three of both."""
    monkeypatch.setattr(calls, "PASS", 0.0)
    decode, prefill = toy.projections(DECODE), toy.projections(PREFILL)
    tokens, read = WORK.rows, WORK.rows * WORK.document
    # What the counts have beside the products are the biases.
    assert decode["padded_over_ours_gflops"] == pytest.approx(3, rel=0.02)
    assert prefill["padded_over_ours_gflops"] == pytest.approx(3 * (tokens + read) / (tokens + 2 * read), rel=0.02)
    assert decode[f"{OURS}_gflops"] == pytest.approx(2 * 2 * tokens * 32 * 32 / 1e9, rel=0.05)
    assert decode["padded_over_ours_gigabytes"] > 2 and decode["padded_over_ours_median"] > 0


@pytest.mark.slow
def test_the_whole_model_makes_the_same_tokens(toy: Bench):
    for step in (PREFILL, DECODE):
        tokens, found = {}, {}
        for variant in (OURS, PADDED):
            compiled, arguments = toy.compiled(step, variant)
            tokens[variant], found[variant] = np.asarray(compiled(*arguments)[0]), calls.cost(compiled)
        np.testing.assert_array_equal(tokens[OURS], tokens[PADDED])
        assert found[PADDED]["gflops"] > found[OURS]["gflops"] > 0


@pytest.mark.slow
def test_a_checkpoint_has_what_transformers_would_write():
    hf = {**cross.LARGE, **TOY, "dtype": "float32"}
    assert dict(checkpoint.shapes(hf)) == {name: value.shape for name, value in tensors(hf).items()}


@pytest.mark.slow
def test_blocks_of_inputs_are_those_of_distinct_ones():
    params = SamplingParams(temperature=0.5, seed=0, max_tokens=4, n=2)

    def counted(**host: object) -> Read:
        engine = make_engine(cross_runner(), **host)
        with Read(engine) as found:
            run(engine, [cross_request(str(i), text(length), params) for i, length in enumerate((33, 33, 9))])
        return found

    shared, apart = counted(), counted(prefix_caching=False)
    assert shared.held == shared.fewest == apart.fewest == blocks(33) + blocks(9)
    assert apart.held == 2 * blocks(33) + blocks(9)


@pytest.mark.slow
def test_the_report_has_all_parts(result: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cross, "SMALL", TOY)
    monkeypatch.setattr(calls, "PASS", 0.0)
    settings = ("decode_buckets=[8]", "prefill_buckets=[64]", "max_num_seqs=8", "max_num_batched_tokens=64")
    found = result(
        "cross",
        "--small",
        "--repeats=1",
        "--num-prompts=12",
        "--max-input-len=400",
        "--samples=3",
        "--beams=2",
        f"--checkpoint-dir={tmp_path / 'bart'}",
        *[f"--set={setting}" for setting in settings],
    )
    figures = found["jaxinfer"]
    assert found["work"]["documents"] == {"count": 3, "document": [8, 50], "new": 8}
    assert found["work"]["step"] == {"rows": 8, "document": 32, "context": 8, "repeats": 1}
    for step in (PREFILL, DECODE):
        for of in ("projections", "step"):
            assert figures[f"{PADDED}_ms@{step}_{of}"] > 0 and figures[f"padded_over_ours_gigabytes@{step}_{of}"] > 1
    assert figures["output_tokens_per_second"] > 0 and figures["output_tokens_per_second@int8"] > 0
    for name in ("samples", "beams"):
        assert figures[f"encoder_runs@{name}"] == figures[f"fewest_encoder_runs@{name}"] == 3
        assert figures[f"cross_blocks@{name}"] == figures[f"fewest_cross_blocks@{name}"] > 3


@pytest.mark.usefixtures("real_peers")
@pytest.mark.slow
def test_transformers_makes_the_same_tokens_of_documents(
    result: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It pads the short ones on the right, behind a mask."""
    pytest.importorskip("torch")
    monkeypatch.setattr(cross, "SMALL", TOY)
    settings = ("decode_buckets=[4]", "prefill_buckets=[64]", "max_num_seqs=4", "max_num_batched_tokens=64")
    found = result(
        "cross",
        "documents",
        "--small",
        "--repeats=1",
        "--num-prompts=16",
        "--max-input-len=400",
        "--peer=hf",
        f"--checkpoint-dir={tmp_path / 'bart'}",
        *[f"--set={setting}" for setting in settings],
    )
    assert found["peers"]["hf"]["same_tokens"] == 1.0 and found["ratio"]["hf"] > 0
