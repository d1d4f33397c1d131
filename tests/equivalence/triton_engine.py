"""An engine whose attention is the Triton kernel, interpreted, makes the tokens that XLA's attention makes.

Run by `test_triton.py` in a process of its own: triton's interpreter replaces parts of its language for good.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.interpret import interpreted
from support.tiny import ARCHITECTURES, CONFIG, HYBRIDS, make_engine, make_request, prompt, run, shapes

from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Target
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(params=["llama", "alternating"])
def runners(request: pytest.FixtureRequest) -> Iterator[tuple[Runner, Runner]]:
    """Triton's and XLA's, of one model."""
    mesh = make_mesh()
    module = weights.random(CONFIG | HYBRIDS.get(request.param, {"architectures": [ARCHITECTURES["llama"]]}), mesh)
    xla, params = split(module, mesh, attention_kernel="xla", matmul_kernel="xla")
    tile = attention.prefill_tile("triton", module.config.query_group, CONFIG["head_dim"], 4)
    with interpreted() as patch:
        patch.setattr(triton_launch, "target", lambda mesh: Target(90, 2))
        sizes = shapes(groups=xla.layout.groups)
        yield Runner(replace(xla, kernel="triton", tile=tile), params, sizes), Runner(xla, params, sizes)


def test_greedy_tokens_are_the_same(runners: tuple[Runner, Runner]):
    """Prompts in one chunk and in several, beside each other, and a prefix that two of them share."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [prompt(5), prompt(37, 1), prompt(37, 1)[:20] + prompt(4, 2)]
    triton, xla = (
        run(make_engine(runner), [make_request(str(i), ids, params) for i, ids in enumerate(prompts)])
        for runner in runners
    )
    assert triton == xla
    assert [len(tokens) for samples in triton for tokens in samples] == [6, 6, 6]
