"""The cache is sized by what compiled steps need; a limit of the device's memory is faked on the CPU."""

from collections import Counter
from collections.abc import Callable

import jax
import pytest
from support import tiny

from jaxinfer.config import EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.runner.keys import Copies, InstallTables, Key
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.warmup import warm_up
from jaxinfer.engine.sizing import memory
from jaxinfer.engine.sizing.setup import build_engine
from jaxinfer.errors import CapacityError
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("llama")

SETTINGS = dict(
    max_model_len=tiny.LENGTH,
    max_num_seqs=8,
    max_num_batched_tokens=16,
    block_size=4,
    decode_buckets=(8,),
    prefill_buckets=(16,),
)
AMPLE, SCARCE = 1 << 28, 600_000
"""Bytes: more than the rows can use, and so few that they bound the cache."""


@pytest.fixture
def device_limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives every device so many bytes, of which nothing is said to be in use."""

    def set_limit(size: int) -> None:
        monkeypatch.setattr(memory, "memory_stats", lambda device: {"bytes_limit": size, "bytes_in_use": 0})

    return set_limit


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, Key]]:
    """How often each program is compiled: by the blocks of its cache and its key."""
    found: Counter[tuple[int, Key]] = Counter()
    lower = Programs.lower

    def count(self: Programs, key: Key) -> jax.stages.Lowered:
        found[self._shapes.num_blocks, key] += 1
        return lower(self, key)

    monkeypatch.setattr(Programs, "lower", count)
    return found


def build(family: str = "llama", **settings) -> Engine:
    mesh = make_mesh(1)
    return build_engine(weights.random(tiny.config(family), mesh), EngineConfig.of(SETTINGS | settings), mesh)


def held(engine: Engine) -> int:
    """Bytes of all arrays that an engine keeps on its device, from the arrays."""
    runner = engine.runner
    runner.prepare(("edited",))
    return sum(array.nbytes for array in jax.tree.leaves([runner.params, runner.cache, runner.edits, runner.rows]))


def test_without_a_limit_nothing_is_compiled_ahead(compiled):
    engine = build()
    assert not compiled and engine.runner.memory.temporaries is None and engine.runner.memory.limit is None


def test_the_size_that_a_user_sets_wins(device_limit, compiled):
    device_limit(1000)
    engine = build(kv_cache_memory_bytes=1 << 17)
    assert engine.runner.memory.cache == 1 << 17 and not compiled


def test_what_was_compiled_to_measure_is_run(device_limit, compiled, caplog):
    device_limit(AMPLE)
    engine = build()
    programs, measured = engine.runner.programs, set(compiled)
    assert len(measured) == 3 and {key for _, key in measured} == set(programs.temporaries)
    params = SamplingParams(max_tokens=4, temperature=0)
    tiny.run(engine, [tiny.make_request(str(i), tiny.prompt(9, i), params) for i in range(8)])
    assert set(compiled.values()) == {1}
    assert len(set(compiled) - measured) == 1, "entries of block tables; decode and prefill were there"
    use, found = (
        engine.runner.memory,
        {metric.name.removeprefix("jaxinfer:"): metric.value for metric in engine.readings()},
    )
    assert found["step_temporaries_bytes"] == use.temporaries and found["memory_limit_bytes"] == AMPLE
    assert (
        sum(found[f"{name}_bytes"] for name in ("weights", "kv_cache", "device_arrays", "step_temporaries"))
        == use.total
    )
    programs.room = 10
    programs.get(Copies(3))
    assert "Copies(width=3) needs" in caplog.text and "10 B are left" in caplog.text


@pytest.mark.slow
def test_all_there_is_fits_in_the_share_of_the_limit(device_limit, compiled):
    device_limit(SCARCE)
    engine = build()
    runner, use = engine.runner, engine.runner.memory
    assert use.cache == sum(array.nbytes for array in jax.tree.leaves(runner.cache)) < 0.9 * SCARCE
    rounds = len({blocks for blocks, _ in compiled})
    assert rounds == 2 and len(compiled) == 6, "a first candidate, and the size that its temporaries leave"
    warm_up(runner.programs, ("edited", "logprobs", "prompt_logprobs"), use_tqdm=False)
    assert set(compiled.values()) == {1}
    # Installing tables takes 64 KiB for every model: more than the steps of this one, with native kernels.
    others = {key: size for key, size in runner.programs.temporaries.items() if not isinstance(key, InstallTables)}
    assert max(others.values()) == use.temporaries, "no other step needs more"
    assert held(engine) + use.temporaries == use.total <= 0.9 * SCARCE
    block = use.cache // runner.shapes.num_blocks
    assert 0.9 * SCARCE - use.total < block + memory.LEAST_GAIN * use.cache + SCARCE / memory.ROUNDING, (
        "no more is left over"
    )


@pytest.mark.slow
def test_states_are_fitted_as_well(device_limit):
    device_limit(2 * SCARCE)
    engine = build("kimi_linear", max_num_seqs=2, decode_buckets=(2,))
    assert held(engine) + max(engine.runner.programs.temporaries.values()) == engine.runner.memory.total <= 1.8 * SCARCE


def test_too_little_memory_is_said_with_all_figures(device_limit, monkeypatch):
    monkeypatch.setattr(memory, "measure", lambda program, shapes, programs: 300_000)
    device_limit(SCARCE // 2)
    figures = (
        r"the cache.*\(gpu_memory_utilization 0.9 of the 293 KiB a device.* less .* in use \(weights .*\), 293 KiB of "
        r"temporaries of steps and .* of arrays .*\).*lower max_num_batched_tokens or "
        r"max_num_seqs.*tensor_parallel_size"
    )
    with pytest.raises(CapacityError, match=figures):
        build()
