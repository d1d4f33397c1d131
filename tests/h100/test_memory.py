"""The memory of H100s and smaller cards divided for an 8B Llama, its largest steps compiled with no GPU present.

Two layers stand for 32: the temporaries of steps do not depend on their number.
"""

from functools import cache, partial

import pytest
from support import compiler
from support.lowering import abstract_model, h100_mesh, require_cuda_compiler

from jaxinfer.config import EngineConfig
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.logits import SampleLogits
from jaxinfer.engine.sizing import memory
from jaxinfer.engine.sizing.memory import DeviceMemory, Fitted
from jaxinfer.engine.sizing.setup import choose_shapes
from jaxinfer.errors import CapacityError
from jaxinfer.loading import weights
from jaxinfer.sharding import plan

pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.usefixtures("cuda_compiler"), pytest.mark.slow]

LLAMA_8B = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    dtype="bfloat16",
)
GB = 10**9
STEPS = 6 * 256 * 128256 * 4
"""Bytes that a sampler of 256 rows needs for all that it can do: six arrays of logits, with its input."""


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    require_cuda_compiler()


def fit(limit: int, layers: int = 2) -> Fitted:
    """Divides `limit` bytes, of which the weights of all 32 layers are taken."""
    hf = LLAMA_8B | {"num_hidden_layers": layers}
    program, params = abstract_model(hf, h100_mesh(1))
    config = EngineConfig(compiler_options=compiler.GPU)
    whole = plan(LLAMA_8B).device_bytes
    assert whole == 16_060_522_496
    device = DeviceMemory(limit, whole, whole, config.gpu_memory_utilization)
    return memory.fit(program, params, config, device, partial(choose_shapes, weights.parse(hf)[1], program, config))


@cache
def on_24_gb() -> Fitted:
    return fit(24 * GB)


def test_weights_cache_and_steps_of_an_8b_model_fit_in_24_gb():
    fitted = on_24_gb()
    programs, use = fitted.programs, fitted.use
    needed = programs.temporaries
    sampler = max(size for key, size in needed.items() if isinstance(key, SampleLogits))
    prefill = max(size for key, size in needed.items() if getattr(key, "kind", "") == "prefill")
    assert prefill < 350 << 20 and STEPS <= sampler <= 1.01 * STEPS
    arrays = 256 * 4 * (32768 + 128256)  # histories and biases of the sampler
    cache_bytes = fitted.shapes.num_blocks * 2 * 2 * 16 * 8 * 128 * 2
    assert use.cache == cache_bytes and arrays <= use.arrays < arrays + (3 << 20)
    total = 16_060_522_496 + cache_bytes + arrays + max(needed.values())
    assert 0.9 * 24 * GB - 0.03 * cache_bytes < total <= 0.9 * 24 * GB


def test_the_programs_that_measure_are_those_that_run():
    """The first candidate was right for the shape at hand: nothing was compiled for another size of the cache."""
    keys = on_24_gb().programs.seconds
    kinds = sorted(key.kind for key in keys if isinstance(key, Bucket))
    assert kinds == ["decode", "prefill", "prefill"] and len(keys) == 6, "a joint step is a prefill with decodes"


def test_they_fit_in_80_gb_and_not_in_18_gb(monkeypatch: pytest.MonkeyPatch):
    """18 GB are what JAX takes of a card of 24 GB unless XLA_CLIENT_MEM_FRACTION is set."""
    steps = on_24_gb().use.temporaries
    monkeypatch.setattr(memory, "measure", lambda program, shapes, programs: steps)
    use = fit(80 * GB).use
    assert use.total <= 0.9 * 80 * GB < use.total + 0.03 * use.cache
    with pytest.raises(CapacityError, match=r"in use \(weights 14.96 GiB\).*XLA_CLIENT_MEM_FRACTION"):
        fit(18 * GB)


def test_a_plan_gives_the_cache_what_the_engine_gives_it():
    use = on_24_gb().use
    made = plan(LLAMA_8B, memory=24 * GB, step_bytes=use.temporaries + use.arrays)
    assert use.cache <= made.cache_bytes <= 1.03 * use.cache
