"""Buckets: every one that a plan can need is compiled by a warm-up, and there are few."""

from collections import Counter
from dataclasses import replace
from itertools import product, starmap

import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import CONFIG, shapes

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.buckets import (
    SAMPLING,
    Needs,
    all_buckets,
    copy_widths,
    decode_bucket,
    prefill_bucket,
    read_size,
)
from jaxinfer.engine.runner.logits import SampleLogits
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.functional import Program, split
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

SIZES = shapes(rows=20, decode_buckets=(4, 8, 20), prefill_buckets=(16, 48), switched=False)


@pytest.fixture(scope="module")
def program() -> Program:
    mesh = make_mesh(1)
    model_family, config = weights.parse(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    return split(weights.abstract(model_family, config, jnp.dtype("float32"), mesh), mesh)[0]


@pytest.mark.parametrize("kernel", ["xla", "native"])
@pytest.mark.parametrize(("switched", "contiguous"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("sampling", [SAMPLING, ("greedy",), ("random",), ("truncated", "logprobs"), ("edited",)])
def test_every_bucket_of_a_plan_is_among_all_buckets(program, kernel, switched, contiguous, sampling):
    program, sizes = replace(program, kernel=kernel), replace(SIZES, switched=switched, contiguous=contiguous)
    known = set(all_buckets(program, sizes, sampling))
    levels = [Level.GREEDY, *(level for level in Level if level.name.lower() in sampling)]
    counts, prompt = (
        (-1, 0, 1, 2, 5) if "logprobs" in sampling else (-1,),
        sorted({False, "prompt_logprobs" in sampling}),
    )
    met = set()
    for needs in starmap(Needs, product(levels, counts, prompt)):
        met |= {prefill_bucket(program, sizes, tokens, needs) for tokens in range(1, 49)}
        own = needs._replace(prompt_logprobs=False)
        most = sizes.width * sizes.block_size // 128
        read_sizes = {n: range(1, sizes.width + 1) if contiguous else range(n, n * most + 1) for n in range(1, 21)}
        met |= {decode_bucket(program, sizes, n, k, own) for n, reads in read_sizes.items() for k in reads}
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
    sizes = dict(decode_buckets=(1, 8, 32, 64, 128, 256), prefill_buckets=(256, 512, 1024, 2048))
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


def test_a_switched_bucket_has_one_program(program):
    sizes = replace(SIZES, switched=True)
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
