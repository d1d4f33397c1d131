"""Buckets: every one that a plan can need is compiled by a warm-up, and there are few."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product, starmap

import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import CONFIG, shapes

from jaxinfer.config import EngineConfig
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.buckets import (
    SAMPLING,
    Needs,
    all_buckets,
    copy_widths,
    decode_bucket,
    joint_bucket,
    prefill_bucket,
    read_size,
)
from jaxinfer.engine.runner.logits import SampleLogits
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.engine.sizing.bucket_sizes import joint_buckets
from jaxinfer.errors import ConfigError
from jaxinfer.functional import Program, split
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

SIZES = shapes(
    rows=20,
    decode_buckets=(4, 8, 20),
    prefill_buckets=(16, 48),
    joint_buckets=((48, 5), (48, 12)),
    switched=False,
)


@pytest.fixture(scope="module")
def program() -> Program:
    mesh = make_mesh(1)
    model_family, config = weights.parse(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    return split(weights.abstract(model_family, config, jnp.dtype("float32"), mesh), mesh)[0]


@pytest.mark.parametrize("kernel", ["xla", "native"])
@pytest.mark.parametrize(("switched", "contiguous"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    "sampling", [SAMPLING, ("greedy",), ("random",), ("truncated", "logprobs"), ("edited",), ("edited", "beams")]
)
def test_every_bucket_of_a_plan_is_among_all_buckets(program, kernel, switched, contiguous, sampling):
    program, sizes = replace(program, kernel=kernel), replace(SIZES, switched=switched, contiguous=contiguous)
    known = set(all_buckets(program, sizes, sampling))
    levels = [Level.GREEDY, *(level for level in Level if level.name.lower() in sampling)]
    counts, prompt = (
        (-1, 0, 1, 2, 5) if "logprobs" in sampling else (-1,),
        sorted({False, "prompt_logprobs" in sampling}),
    )
    met, searches = set(), "beams" in sampling
    beams = [Needs(level, candidates=count) for level in (Level.GREEDY, Level.EDITED) for count in (2, 16) if searches]
    for needs in (*starmap(Needs, product(levels, counts, prompt)), *beams):
        met |= {prefill_bucket(program, sizes, tokens, needs) for tokens in range(1, 49)}
        own = needs._replace(prompt_logprobs=False)
        most = sizes.width * sizes.block_size // 128
        read_sizes = {n: range(1, sizes.width + 1) if contiguous else range(n, n * most + 1) for n in range(1, 21)}
        met |= {decode_bucket(program, sizes, n, k, own) for n, reads in read_sizes.items() for k in reads}
        if needs.candidates:
            continue
        met |= {joint_bucket(program, sizes, 30, n, 1, own) for n in range(1, 12)}
    assert met == known


def test_a_bucket_supports_the_needed_features(program):
    """The bucket has exactly the needed level; log-probabilities are those of the chosen token alone, or the maximum
    number, as always with the highest level.
    """
    for level, count in product(Level, (-1, 0, 1, 2, 5)):
        bucket = decode_bucket(program, SIZES, 3, 3, Needs(level, count))
        found = 5 if level is Level.EDITED else {0: 1, 2: 5}.get(count, count)
        assert (bucket.level, bucket.logprobs, bucket.prompt_logprobs) == (level, found, -1)
        bucket = prefill_bucket(program, SIZES, 10, Needs(level, count, True))
        assert bucket.logprobs >= count and bucket.prompt_logprobs == 5


def test_layers_are_compiled_once_for_each_size_and_samplers_for_few_numbers_of_rows(program):
    """Ten variants of the sampler for each of three numbers of rows, whatever the sizes of steps."""
    sizes = dict(decode_buckets=(1, 8, 32, 64, 128, 256), prefill_buckets=(256, 512, 1024, 2048), joint_buckets=())
    sizes = replace(SIZES, rows=256, prefill_rows=64, **sizes)
    keys = Programs(replace(program, kernel="native"), sizes, []).keys()
    buckets = [key for key in keys if isinstance(key, Bucket)]
    kinds = Counter((bucket.kind, bucket.prompt_logprobs >= 0) for bucket in buckets)
    assert kinds == {("decode", False): 6, ("prefill", False): 4, ("prefill", True): 4}
    assert all(bucket.pending and bucket.level is Level.GREEDY and bucket.logprobs == -1 for bucket in buckets)
    samplers = [key for key in keys if isinstance(key, SampleLogits)]
    assert Counter(key.rows for key in samplers) == {8: 10, 64: 10, 256: 10} and len(set(samplers)) == 30
    for bucket in buckets:
        assert bucket.logit_rows == min(rows for rows in (8, 64, 256) if rows >= bucket.rows)


def test_decodes_of_a_joint_step_take_places_of_padding(program):
    """Not a larger bucket than the chunks need, and no more sequences than there are rows of logits."""
    fits = partial(joint_bucket, program, SIZES, needs=Needs())
    assert fits(tokens=40, decodes=8, samples=4).decodes == 12 and fits(tokens=40, decodes=4, samples=1).decodes == 5
    assert fits(tokens=40, decodes=9, samples=0) is None, "49 tokens"
    assert fits(tokens=15, decodes=2, samples=0) is None, "17 tokens, where chunks alone need 16"
    assert fits(tokens=30, decodes=12, samples=1) is None, "13 sequences"
    assert fits(tokens=10, decodes=2, samples=1) is None, "no joint step has 16 tokens"


def test_joint_steps_are_compiled_where_they_pay(program):
    """For two numbers of sequences, each with at least four tokens; on a CPU only where they are requested."""
    native, tokens = replace(program, kernel="native"), (32, 64, 256, 512)

    def found(program=native, gpu=False, rows=64, **settings):
        return joint_buckets(program, EngineConfig(**settings), rows, tokens, gpu=gpu)

    assert found(joint_steps=True) == ((64, 16), (256, 16), (256, 64), (512, 16), (512, 64))
    assert found(rows=8, joint_steps=True) == ((32, 8), (64, 8), (256, 8), (512, 8)) == found(rows=8, gpu=True)
    assert found() == () == found(joint_steps=False, gpu=True)
    assert found(replace(native, kernel="triton"), gpu=True, rows=128) == ((256, 64), (512, 64), (512, 128))
    for program, settings, reason in (
        (replace(native, kernel="xla"), {}, "attention_kernel 'xla'"),
        (native, {"deterministic": True}, "deterministic=True"),
    ):
        assert found(program, **settings) == ()
        with pytest.raises(ConfigError, match=f"joint_steps=True does not support {reason}.*; leave it out"):
            found(program, joint_steps=True, **settings)


def test_a_switched_bucket_has_one_program(program):
    sizes = replace(SIZES, switched=True, joint_buckets=())
    native = replace(program, kernel="native")
    assert len(all_buckets(native, sizes)) == len(sizes.decode_buckets) + len(sizes.prefill_buckets)


@pytest.mark.parametrize(("rows", "widths"), [(4, (4,)), (16, (16,)), (64, (16, 64))])
def test_copies_have_room_for_all_rows(rows, widths):
    assert copy_widths(shapes(rows=rows)) == widths


def test_a_contiguous_step_reads_the_blocks_of_its_longest_row(program):
    sizes = replace(SIZES, contiguous=True, width=200, block_size=4)
    nothing = np.zeros((3, 2), np.int32)
    for longest, width in ((1, 32), (127, 32), (128, 64), (600, 200), (799, 200)):
        found = read_size(sizes, np.array([3, longest, 0]), nothing)
        assert decode_bucket(replace(program, kernel="xla"), sizes, 3, found, Needs()).width == width
        assert decode_bucket(replace(program, kernel="native"), sizes, 3, found, Needs()).width == 200
    assert read_size(sizes, np.array([3]), np.array([[0, 41]])) == 11, "encoder positions count, too"
    assert copy_widths(sizes) == (16, 256)
