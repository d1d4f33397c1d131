"""`scripts/bench.py host`, `startup`, `roofline` and `profile` on toys: shapes, formulas, joins."""

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from benchmarks import breakdown, checkpoint, growth, hlo, hosttime, machine, placed, pooltime, shares, start
from benchmarks.shares import Costs

from jaxinfer import LLM
from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work

pytestmark = pytest.mark.xdist_group("bench")


@pytest.mark.slow
def test_host_work_is_divided_without_rest(result: Callable[..., dict], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pooltime, "POOLS", (200,))
    monkeypatch.setattr(pooltime, "blocked_head", partial(pooltime.blocked_head, tokens=512, steps=5))
    found = result("host", "--rows=5", "--lengths", "20", "--steps=12")["jaxinfer"]
    parts = ("schedule", "pack", "dispatch", "commit", "other")
    assert all(0 < found[f"{part}_ms@20"] < found["step_ms@20"] <= found["step_p90_ms@20"] for part in parts)
    assert found["detokenise_ms"] > 0 and found["detokenise_and_stop_strings_ms"] > 0
    times = ("allocate_share_release_us@200", "admit_cached_us@200", "blocked_head_first_ms")
    assert all(found[name] > 0 for name in times) and "blocked_head_adds_ms" in found


def test_host_work_that_is_not_seen_is_an_error():
    idle = SimpleNamespace(step=lambda: None)
    with pytest.raises(RuntimeError, match="without schedule, run, dispatch, commit"):
        hosttime._parts(hosttime.Clock(), idle)


def test_startup_figures_by_hand(result: Callable[..., dict], monkeypatch: pytest.MonkeyPatch):
    seconds = iter([9.0, 2.0, 8.0, 4.0, 10.0, 3.0])
    caches = []

    def run(folder: Path, settings: dict, cache: Path) -> dict[str, float]:
        assert folder == start.checkpoint() and settings == {"max_num_seqs": 3}
        caches.append(cache)
        return {"first_token": next(seconds)}

    monkeypatch.setattr(start, "run", run)
    found = result("startup", "--repeats=3", "--set=max_num_seqs=3")["jaxinfer"]
    assert [found[f"{kind}@empty_first_token_seconds"] for kind in ("min", "median", "max")] == [8.0, 9.0, 10.0]
    assert found["filled_over_empty"] == pytest.approx(3 / 9)
    assert caches[0] == caches[1] != caches[2]
    assert not any(cache.exists() for cache in caches)


@pytest.mark.slow
def test_a_second_start_finds_its_programs(tmp_path: Path):
    first, second = (start.run(start.checkpoint(), {}, tmp_path) for _ in start.STATES)
    assert any(tmp_path.iterdir())
    assert second["first_step"] < first["first_step"]
    for phases in (first, second):
        to_token = sum(phases[name] for name in ("interpreter", "import", "load", "first_step"))
        assert phases["first_token"] == pytest.approx(to_token)
        assert phases["answer"] > phases["first_token"]


def test_costs_are_those_of_the_checkpoint(tmp_path: Path, sizes: dict[str, int]):
    config = sizes | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 8, "dtype": "float32"}
    checkpoint.write(tmp_path / "toy", config, 0)
    with LLM(tmp_path / "toy", skip_tokenizer_init=True, use_tqdm=False, max_num_seqs=4, max_model_len=64) as llm:
        costs = Costs.of(llm)
    norms, looked_up = 5 * 32, 97 * 32
    assert costs.weight_bytes == 4 * (checkpoint.parameters(config) - looked_up)
    assert costs.weights == checkpoint.parameters(config) - looked_up - norms
    assert (costs.head, costs.dtype) == (97 * 32, "float32")
    assert costs.kv_bytes == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    assert costs.attention == 2 * 4 * 4 * 8


def test_shares_by_hand():
    costs = Costs(weight_bytes=1000, weights=50, head=10, kv_bytes=10, attention=3, dtype="float32")
    rates = {"read_gigabytes_per_second": 1e-6, "float32_matmul_teraops_per_second": 1e-9}
    # After 2 s two decode steps: contexts of 5 and 6, and of 4 and 5 tokens.
    seen = Trace(6.0, [], [], [[2.0, 4.0, 6.0], [1.0, 4.0, 6.0]])
    found = shares.of(Work([[1] * 4, [1] * 3], [3, 3]), seen, costs, rates)
    moved = 2 * 1000 + (5 + 6 + 4 + 5) * 10
    assert found["decode_step_ms"] == pytest.approx(2000)
    assert found["decode_gigabytes_per_step"] == pytest.approx(moved / 2 / 1e9)
    assert found["decode_share_of_read_bandwidth"] == pytest.approx(moved / 4.0 / 1e3)
    assert "prefill_ms" not in found
    one = shares.of(Work([[1] * 4], [1]), Trace(2.0, [], [], [[2.0]]), costs, rates)
    operations = 2 * 40 * 4 + 2 * 10 + 3 * (1 + 2 + 3 + 4)
    assert one == {
        "prefill_ms": 2000.0,
        "prefill_teraops": operations / 1e12,
        "prefill_share_of_matmul_rate": pytest.approx(operations / 2.0 / 1e3),
    }


def test_the_machine_is_measured_in_every_dtype():
    found = machine.measure(1 << 20, 64, 2)
    assert set(found) == {"read_gigabytes_per_second", "copy_gigabytes_per_second"} | {
        f"{kind}_matmul_teraops_per_second" for kind in ("bfloat16", "float32", "int8")
    }
    assert all(value > 0 for value in found.values())


@pytest.mark.slow
def test_roofline_gives_each_work_its_share(result: Callable[..., dict]):
    flags = ["--scale=0.02", "--repeats=1", "--mebibytes=4", "--matmul-size=64"]
    found = result("roofline", "W1", "W4", *flags)["jaxinfer"]
    for name in ("decode_share_of_read_bandwidth@W1", "prefill_share_of_matmul_rate@W4"):
        assert found[name] > 0
    assert "decode_step_ms@W4" not in found


PROGRAM = """HloModule jit_decode_step

FileNames
1 "/x/jaxinfer/models/decoder.py"
2 "/x/jaxinfer/layers/linear.py"
3 "/x/jaxinfer/kernels/attention/paged.py"
4 "/x/jaxinfer/engine/sampling/sampler.py"
5 "/x/jaxinfer/layers/attention.py"

FunctionNames
1 "Decoder.__call__"
2 "product"
3 "sample"
4 "attend"
5 "Attention.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=1}
3 {file_name_id=3 function_name_id=4 line=1 end_line=1 column=1 end_column=1}
4 {file_name_id=4 function_name_id=3 line=1 end_line=1 column=1 end_column=1}
5 {file_name_id=5 function_name_id=5 line=1 end_line=1 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=5 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=3}
4 {file_location_id=3 parent_frame_id=3}
5 {file_location_id=4 parent_frame_id=1}
6 {file_location_id=1 parent_frame_id=6}

%fused (param: f32[4]) -> f32[4] {
  %param = f32[4]{0} parameter(0)
  %a = f32[4]{0} add(%param, %param), metadata={op_name="add" stack_frame_id=4}
  ROOT %b = f32[4]{0} add(%a, %a), metadata={op_name="add" stack_frame_id=4}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %dot.1 = f32[4]{0} dot(%x, %x), metadata={op_name="dot_general" stack_frame_id=3}
  %rope = f32[4]{0} add(%x, %x), metadata={op_name="add" stack_frame_id=2}
  %fusion.2 = f32[4]{0} fusion(%dot.1), kind=kLoop, calls=%fused
  %exp.4 = f32[4]{0} exponential(%x), metadata={op_name="exp" stack_frame_id=6}
  ROOT %max.3 = f32[4]{0} add(%fusion.2, %x), metadata={op_name="max" stack_frame_id=5}
}
"""


def event(name: str, thread: int, start: float, duration: float, run: str = "1") -> dict:
    """As the profiler writes them, in microseconds."""
    labels = {"hlo_module": "jit_decode_step", "hlo_op": name, "run_id": run}
    return {"ph": "X", "tid": thread, "ts": start, "dur": duration, "name": name, "args": labels}


def test_operations_are_told_apart_by_where_they_come_from():
    program = hlo.Operations.of(PROGRAM)
    found = {name: program.category(name) for name in ("dot.1", "rope", "fusion.2", "max.3", "exp.4", "unknown")}
    assert found == {
        "dot.1": "gemms",
        "rope": "rest",
        "fusion.2": "attention",
        "max.3": "sampling",
        "exp.4": "sampling",
        "unknown": "rest",
    }


def test_time_is_added_up_by_category_and_not_twice():
    events = [
        event("dot.1", 1, 0, 100),
        event("fusion.2", 1, 10, 30),
        event("max.3", 2, 20, 50),
        event("dot.1", 1, 1000, 100, "2"),
        {"ph": "X", "tid": 1, "ts": 0, "dur": 9, "name": "python", "args": {}},
        {},
    ]
    # A program of the same name that has none of these operations.
    other = hlo.Operations({"dot.9": "rest"})
    found = breakdown.table(events, {"jit_decode_step": [other, hlo.Operations.of(PROGRAM)]}, steps=2)
    assert found == pytest.approx(
        {
            "decode_step_gemms_ms": 0.085,
            "decode_step_attention_ms": 0.015,
            "decode_step_sampling_ms": 0.025,
            "decode_step_elapsed_ms": 0.1,
        }
    )
    with pytest.raises(RuntimeError, match="no operation of a decode step"):
        breakdown.table([], {}, 1)


@pytest.mark.slow
def test_a_profile_finds_every_category(result: Callable[..., dict], tmp_path: Path):
    found = result("profile", "--batch-size=2", "--input-len=9", "--steps=3", f"--out={tmp_path}")["jaxinfer"]
    for kind in ("decode_step", "prefill"):
        for category in ("attention", "gemms", "rest", "sampling", "elapsed"):
            assert found[f"{kind}_{category}_ms"] > 0
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.slow
def test_placements_are_ratios_to_all_sharded(result: Callable[..., dict]):
    jax.devices()  # JAX has started, so that this makes no other devices for the tests after it
    found = result("placement", "--devices=2", "--batch-size=2", "--context=16", "--repeats=3")
    assert (found["work"]["devices"], found["work"]["rows"]) == (2, 2)
    figures, names = found["jaxinfer"], ("attention_replicated", "mlp_replicated", "replicated")
    assert set(figures) == {f"step_ms@{name}" for name in ("sharded", *names)} | {
        f"over_sharded@{name}" for name in names
    }
    assert all(value > 0 for value in figures.values())


GROWTH = ("growth", "--batch-size=2", "--input-len=37", "--output-len=23", "--lengths=3", "--repeats=2", "--step=16")


@pytest.mark.slow
def test_growth_makes_a_cache_anew_where_it_concatenates_alone(result: Callable[..., dict], tmp_path: Path):
    plot = [f"--plot={tmp_path / 'growth.png'}"] if find_spec("matplotlib") else []
    found = result(*GROWTH, "--max-position-embeddings=512", *plot)["jaxinfer"]
    assert [name for name in found if name.startswith("step_ms@paged_")] == [f"step_ms@paged_{n}" for n in (37, 48, 59)]
    assert all(found[f"same_tokens@{name}"] == 1 for name in growth.METHODS)
    cache = found["cache_mib"]
    assert cache == 2 * 64 * 2 * 2 * 2 * 8 * 4 / 2**20  # rows, positions, layers, keys and values, heads, dim, float32
    for name, aliased in ((growth.CONTIGUOUS, cache), (growth.ROOMY, 240 / 64 * cache), (growth.PAGED, cache)):
        assert found[f"aliased_mib@{name}"] == aliased and found[f"made_anew_mib@{name}"] < cache / 20
    assert found["aliased_mib@concatenation"] == 0
    assert found["made_anew_mib@concatenation"] == pytest.approx(60 / 64 * cache, rel=0.02)
    peaks = {name: found[f"peak_mib@{name}"] - found[f"temporary_mib@{name}"] for name in growth.METHODS}
    assert peaks["concatenation"] > peaks["contiguous"] + 0.8 * cache
    assert found["times_as_fast_as_concatenation@contiguous"] > 0 and found["four_times_the_room_over_once"] > 0
    assert not plot or (tmp_path / "growth.png").stat().st_size > 1000


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match="matplotlib, of the extra `notebook`"):
        growth.plot({}, growth.Work(1, 2, 3, 4, 5, 6), tmp_path / "growth.png")


def test_what_is_measured_begins_and_ends_with_the_generation():
    assert growth.Work(8, 3072, 1024, 128, 9, 7).measured == (3072, 3200, 3328, 3456, 3584, 3711, 3839, 3967, 4095)
    assert growth.Work(8, 5, 3, 128, 9, 7).measured == (5, 6, 7)


def test_growth_by_hand():
    """Two lengths, two rounds each; a round of concatenation takes twice as long as contiguous in three of four."""
    seconds = {
        "concatenation": [[2.0, 4.0], [6.0, 3.0]],
        "contiguous": [[1.0, 2.0], [3.0, 3.0]],
        "contiguous_x4": [[1.0, 2.0], [3.0, 3.0]],
        "paged": [[2.0, 4.0], [6.0, 6.0]],
    }
    found = growth._summary(seconds, growth.Work(1, 1000, 501, 4, 2, 2))
    assert (
        found["times_as_fast_as_concatenation@contiguous"] == 2 and found["times_as_fast_as_concatenation@paged"] == 1
    )
    assert found["contiguous_over_paged"] == 0.5 and found["four_times_the_room_over_once"] == 1
    assert found["step_ms@contiguous"] == (1500 + 3000) / 2
    assert found["ms_per_1000_positions@contiguous"] == pytest.approx((3000 - 1500) / 0.5)


def test_a_ratio_is_of_the_same_round(monkeypatch: pytest.MonkeyPatch):
    jax.devices()
    rounds = {
        "sharded": [1.0, 2.0, 4.0],
        "attention_replicated": [2.0, 4.0, 8.0],
        "mlp_replicated": [1.0, 2.0, 4.0],
        "replicated": [4.0, 2.0, 8.0],
    }
    monkeypatch.setattr(placed.steptime, "Model", lambda *given: None)
    monkeypatch.setattr(placed.steptime, "measure", lambda *given: rounds)
    found = placed.measure({}, 2, 8, 16, 3)
    assert found["step_ms@sharded"] == 2000
    assert found["over_sharded@attention_replicated"] == found["over_sharded@replicated"] == 2
