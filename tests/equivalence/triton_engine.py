"""An engine with the interpreted Triton kernel gives the same tokens as with XLA's attention.

Run by `test_triton.py` in a subprocess, as triton's interpreter permanently patches parts of its language.
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
    """Runners of one model with Triton's and with XLA's attention."""
    mesh = make_mesh()
    module = weights.random(CONFIG | HYBRIDS.get(request.param, {"architectures": [ARCHITECTURES["llama"]]}), mesh)
    xla, params = split(module, mesh, attention_kernel="xla", matmul_kernel="xla")
    tile = attention.prefill_tile("triton", module.config.query_group, CONFIG["head_dim"], 4)
    with interpreted() as patch:
        patch.setattr(triton_launch, "target", lambda mesh: Target(90, 2))
        sizes = shapes(groups=xla.layout.groups)
        yield Runner(replace(xla, kernel="triton", tile=tile), params, sizes), Runner(xla, params, sizes)


def test_greedy_tokens_are_the_same(runners: tuple[Runner, Runner]):
    """Prompts in one and in several chunks, in one batch, and a prefix that two of them share."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [prompt(5), prompt(37, 1), prompt(37, 1)[:20] + prompt(4, 2)]
    triton, xla = (
        run(make_engine(runner), [make_request(str(i), ids, params) for i, ids in enumerate(prompts)])
        for runner in runners
    )
    assert triton == xla
    assert [len(tokens) for samples in triton for tokens in samples] == [6, 6, 6]
