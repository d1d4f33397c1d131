"""`scripts/bench.py gpu` and `compiled` without a GPU: rows at toy sizes, what is kept, and the reader of traces."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import checkpoint
from benchmarks.gpu import (
    attention,
    cli,
    compiled,
    cost,
    engines,
    gpu_tests,
    growth,
    models,
    predict,
    report,
    rows,
    suite,
    worker,
    xplane,
)
from benchmarks.gpu.context import Context, bandwidth_shares
from benchmarks.gpu.rows import ROWS, Goal, Row
from benchmarks.peer import Peer
from jax.profiler import ProfileData
from support.lowering import moved_bytes, require_cuda_compiler

from jaxinfer.commands.bench.work import random_work
from jaxinfer.kernels.attention import paged
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, Scoring, Slots
from jaxinfer.loading import weights as loading
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("bench")

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
QUICK = ("roofline", "kda-decode")


def bench(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench.py"), "gpu", f"--out={out}", "--dry-run", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    done = bench(out, "--only", *QUICK)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_rows_write_their_figures_and_a_report(dry: Path):
    results = {name: json.loads((dry / f"{name}.json").read_text()) for name in QUICK}
    assert {result["status"] for result in results.values()} == {"done"}
    assert results["roofline"]["figures"]["copy_gb_per_second"] > 0
    assert results["kda-decode"]["figures"]["fused_us"] > 0
    whole = json.loads((dry / "report.json").read_text())
    assert set(whole["rows"]) == set(QUICK)
    assert whole["machine"]["platform"] == "cpu" and whole["machine"]["versions"]["jax"] == jax.__version__
    table = (dry / "report.md").read_text()
    assert "dry run" in table
    assert "reached" not in table, "toy sizes reach nothing"


@pytest.mark.slow
def test_what_is_done_is_not_done_again_unless_forced(dry: Path, capsys: pytest.CaptureFixture[str]):
    stamps = [(dry / f"{name}.json").stat().st_mtime_ns for name in QUICK]
    args = ["--out", str(dry), "--dry-run", "--only", *QUICK, "--seconds", "0"]
    assert cli.main(args) == 0
    assert [(dry / f"{name}.json").stat().st_mtime_ns for name in QUICK] == stamps
    assert "not run" not in capsys.readouterr().err
    assert cli.main([*args, "--force"]) == 0, "no time is left: nothing can be run, but what was there is gone"
    assert "kda-decode: not run, 0 s have passed" in capsys.readouterr().err


def test_wrong_requests_are_said_on_one_line_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--out", str(tmp_path), "--only", "nothing"]) == 1
    assert "no such row; there are roofline," in capsys.readouterr().err
    (tmp_path / "kimi-linear.json").write_text(json.dumps({"dry": True, "status": "done"}))
    assert cli.main(["--out", str(tmp_path), "--only", "kimi-linear"]) == 1
    assert "results of a dry run" in capsys.readouterr().err
    assert not (tmp_path / "roofline.log").exists()


WORKER = """
import json, pathlib, sys, time
name, out = sys.argv[1:3]
path = pathlib.Path(out, name + ".json")
before = json.loads(path.read_text())["figures"] if path.exists() else {}
result = {"row": name, "what": "", "dry": True, "seconds": 1.0, "reason": ""}
path.write_text(json.dumps(result | {"status": "partial", "figures": before | {"a": len(before)}}))
if name == "slow" and not before:
    time.sleep(600)
if name == "broken":
    sys.exit(3)
path.write_text(json.dumps(result | {"status": "done", "figures": before | {"b": len(before)}}))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Three rows: one is too slow at first, one breaks."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(suite, "WORKER", (sys.executable, str(worker)))
    made = tuple(Row(name, "", "", 10.0 if name == "slow" else 120.0) for name in ("slow", "quick", "broken"))
    for module in (suite, rows, report):
        monkeypatch.setattr(module, "ROWS", made)
    return Namespace(out=tmp_path / "out", only=None, force=False, dry_run=True, seconds=600.0, peer_python="")


def test_a_row_over_its_limit_keeps_what_it_had_and_goes_on_the_next_time(fake: Namespace):
    def status() -> dict[str, str]:
        found = json.loads((fake.out / "report.json").read_text())["rows"]
        return {name: row["status"] for name, row in found.items()}

    assert suite.run(fake) == 0
    assert status() == {"slow": "partial", "quick": "done", "broken": "partial"}
    slow, broken = (json.loads((fake.out / f"{name}.json").read_text()) for name in ("slow", "broken"))
    assert slow["reason"] == "ended after 10 s" and slow["figures"] == {"a": 0}
    assert "code 3" in broken["reason"]
    suite.run(fake)
    assert status()["slow"] == "done"
    assert json.loads((fake.out / "slow.json").read_text())["figures"] == {"a": 0, "b": 1}


def test_rows_bring_those_they_need_and_are_in_order():
    assert [row.name for row in rows.chosen(["prefill-4096"])] == ["roofline", "prefill-4096"]
    assert rows.chosen(None) == list(ROWS)
    for number, row in enumerate(ROWS):
        assert set(row.needs) <= {before.name for before in ROWS[:number]}


def test_a_goal_is_reached_or_not_and_never_guessed(monkeypatch: pytest.MonkeyPatch):
    row = Row("r", "what", "", 1.0, (Goal("x", "2", at_least=2), Goal("y", "8 us", at_most=8)))
    monkeypatch.setattr(report, "ROWS", (row,))

    def cells(result: dict[str, Any] | None) -> list[list[str]]:
        text = report.markdown({"versions": {}}, {} if result is None else {"r": result})
        return [[c.strip() for c in line.split("|")[4:6]] for line in text.splitlines() if line.startswith("| r ")]

    base = {"status": "done", "reason": "", "dry": False, "seconds": 1.0}
    assert cells(None) == [["not yet measured", ""]] * 2
    assert cells(base | {"figures": {"x": 2.5, "y": 9.0}}) == [["x = 2.5", "reached"], ["y = 9", "not reached"]]
    skipped = base | {"status": "skipped", "reason": "no room", "figures": {"y": 8.0}}
    assert cells(skipped) == [["not yet measured", "no room"], ["y = 8", "reached"]]


def test_shares_are_of_the_copy_bandwidth_that_was_measured(tmp_path: Path):
    context = Context(tmp_path, True, "")
    assert bandwidth_shares(context, "x", 3e9) == {"x_gb_per_second": 3.0}
    (tmp_path / "roofline.json").write_text(json.dumps({"figures": {"copy_gb_per_second": 4.0}}))
    assert bandwidth_shares(context, "x", 3e9)["x_share_of_copy"] == pytest.approx(0.75)


TRACE = """
planes { name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "gemm" } } event_metadata { key: 2 value { id: 2 name: "norm" } }
  lines { name: "Stream #7(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 }
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 1000000 }
    events { metadata_id: 1 offset_ps: 7000000 duration_ps: 3000000 } }
  lines { name: "Stream #8(Memcpy)" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 3000000 duration_ps: 1500000 } }
  lines { name: "XLA Ops" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } } }
planes { name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "cuGraphLaunch" } }
  event_metadata { key: 2 value { id: 2 name: "cuLaunchKernel" } }
  lines { name: "python" events { metadata_id: 1 } events { metadata_id: 2 } events { metadata_id: 1 } } }
"""


def test_a_trace_says_how_busy_the_gpu_was():
    found = xplane.seen(ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(TRACE)))
    # 4.5 of the overlapping two, 1, and 3 of 10 us.
    assert found.busy == pytest.approx(0.85)
    figures = found.per_step(2)
    assert (figures["graph_launches_a_step"], figures["lone_kernel_launches_a_step"]) == (1, 0.5)
    assert figures["kernels_a_step"] == 2 and figures["kernel_us_a_step"] == pytest.approx(9.5 / 2)
    assert figures["longest"][0] == "3.5 us, 1 x gemm"


def test_the_fewest_bytes_by_hand():
    hf = models.llama(4, 1, 2, 1, 6, 10)
    products = [(4, 8), (4, 4), (4, 12), (6, 4)]
    layer = sum(a * b + compiled.ROWS * (a + b) for a, b in products) + 2 * 4
    rest = 4 * 10 + compiled.ROWS * 4 + 4 + 2 * compiled.ROWS * 4
    assert compiled.fewest_bytes(hf, "decode", 1) == 2 * (layer + rest) + 4 * compiled.ROWS * 10


def test_random_weights_are_of_the_models_shapes_and_size():
    mesh = make_mesh()
    made = {path: np.asarray(array) for path, array in models.arrays(models.random(models.TOY, mesh))}
    other = dict(models.arrays(loading.random(models.TOY, mesh)))
    assert {p: (a.shape, a.dtype) for p, a in made.items()} == {p: (a.shape, a.dtype) for p, a in other.items()}
    for path, array in made.items():
        if array.ndim == 1:
            assert (array == 1).all()
        else:
            expected = array.shape[-1] ** -0.5
            assert array.std() == pytest.approx(expected, rel=0.1), path
            assert abs(array.mean()) < expected / 10
    gates = [array for path, array in made.items() if "gate_up" in path]
    assert not np.array_equal(*gates[:2]), "each has values of its own"


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_every_weight_but_an_embedding_apart(tied: bool):
    module = models.random(models.TOY | {"tie_word_embeddings": tied}, make_mesh())
    sizes = {path: array.nbytes for path, array in models.arrays(module)}
    apart = 0 if tied else sizes["embedding.weight"]
    assert models.step_bytes(module) == sum(sizes.values()) - apart
    each, head = models.matrix_sizes(module)
    assert head == 64 * 259 and each == sum(s // 4 for p, s in sizes.items() if "layers" in p and "norm" not in p)


def test_a_token_touches_of_the_experts_those_it_is_routed_to():
    module = models.random(models.KIMI_LINEAR_TOY, make_mesh(1))
    experts, chosen, layers, weights = 6, 3, 3, 3 * 24 * 32
    assert models.step_bytes(module) - models.touched_bytes(module) == layers * (experts - chosen) * weights * 4


@pytest.mark.parametrize("grows", [False, True])
def test_contiguous_caches_attend_as_the_oracle(grows: bool):
    rng, batch, length = np.random.default_rng(0), 2, 6
    q, k, v = (rng.normal(size=(batch, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    kv_cache = KVCache(*(rng.normal(size=(batch, 2, length, 8)).astype(np.float32) for _ in range(2)))
    blocks, last = np.arange(batch), np.full(batch, length - 1)
    step, slots, scoring = DecodeRows(blocks[:, None], last + 1), Slots(blocks, last), Scoring(8**-0.5)
    # Growing, the oldest has gone and the rest has moved up.
    moved = jax.tree.map(lambda array: np.roll(array, -1, axis=2), kv_cache) if grows else kv_cache

    @jax.jit
    def both(
        q: Any, k: Any, v: Any, kv_cache: KVCache, moved: KVCache, slots: Slots, step: DecodeRows
    ) -> tuple[Any, Any]:
        written = paged.write(moved, k, v, slots)
        wanted = paged.reference(q, written, step.tables, slots.blocks, slots.offsets, scoring), written
        return growth.Contiguous(grows).decode(q, k, v, kv_cache, slots, step, scoring), wanted

    found, wanted = both(q, k, v, kv_cache, moved, slots, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_a_decode_problem_counts_its_live_bytes():
    given = attention.problem((3, 0, 17), jnp.float32, 8)
    assert given.live_bytes == 2 * 20 * attention.KV_HEADS * 8 * 4
    assert given.slots.blocks.tolist()[1] == given.kv_cache.keys.shape[0] == 3, "an empty row writes nowhere"
    assert given.rows.tables.shape == (3, 2)


@pytest.mark.slow
def test_a_timed_step_is_a_decode_step(monkeypatch: pytest.MonkeyPatch):
    """Between the clock's two readings all rows decode in every step; what is said of their positions is so."""
    made = engines.build(models.TOY, max_num_seqs=4, max_model_len=64, max_num_batched_tokens=32)
    engine, plans, timed = made.engine, [], []
    run, dispatch = engines.run_steps, engine.runner.run

    def watched(engine: Any, steps: int) -> float:
        plans.clear()
        taken = run(engine, steps)
        timed[:] = plans
        return taken

    monkeypatch.setattr(engine.runner, "run", lambda plan, *rest: plans.append(plan) or dispatch(plan, *rest))
    monkeypatch.setattr(engines, "run_steps", watched)
    found = engines.decode(engine, rows=3, prompt=5, steps=6)
    assert [(len(plan.decodes), len(plan.chunks)) for plan in timed] == [(3, 0)] * 6
    assert found.positions == pytest.approx(np.mean([plan.positions + 1 for plan in timed]))
    assert not engine.has_work
    assert 0 < engines.prefill(engine, tokens=20, repeats=2) < 10


@pytest.mark.slow
def test_compiled_prints_a_line_for_each_program(capsys: pytest.CaptureFixture[str]):
    require_cuda_compiler()
    assert compiled.main(["--model=0.25B", "--step=decode", "--tp", "1", "--layers=2"]) == 0
    names, _, cells = ([c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines())
    found = dict(zip(names, cells, strict=True))
    assert (found["command buffers"], found["launched alone"], found["large copies"]) == ("1", "4", "0")
    assert int(found["kernels"]) > 2 * int(found["a layer"]) > 0
    assert 1 <= float(found["bytes / fewest"]) < 1.2


@pytest.mark.slow
def test_transformers_with_a_static_cache_makes_the_same_tokens(tmp_path: Path):
    pytest.importorskip("torch")
    checkpoint.write(tmp_path / "toy", models.TOY | {"tie_word_embeddings": True}, 0)
    work, tokens = random_work(3, (12, 12), (6, 6), vocab=models.TOY["vocab_size"], seed=0), []
    for name in ("hf", "hf-static"):
        system = Peer(name, sys.executable, tmp_path / "toy", "auto")
        tokens.append(system.run(work).tokens)
        system.close()
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_every_row_runs_at_toy_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In this process: starting one for each row takes most of the time. The fixture `dry` starts them."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(gpu_tests, "FOLDER", "tests/gpu/test_grouped.py")
    try:
        for row in ROWS:
            worker.main(row.name, str(tmp_path), sys.executable, "dry")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert suite.run(cli.parser().parse_args([f"--out={tmp_path}", "--dry-run"])) == 0, "nothing is run again"
    results = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {name: row["status"] for name, row in results.items()} == {row.name: "done" for row in ROWS}
    for row in ROWS:
        # What only a GPU has is missing, and nothing takes its place.
        assert all(
            goal.figure in results[row.name]["figures"]
            or "share" in goal.figure
            or row.name in ("command-buffers", "throughput-static", "throughput-batching")
            for goal in row.goals
        ), row.name
    for name in ("decode-1", "prefill-4096"):
        figures = results[name]["figures"]
        assert figures["roofline_ms"] > 0 and figures["roofline_bytes"] > 1e3  # a CPU's own kernels are not counted


def test_no_row_takes_more_than_45_seconds():
    """So that the first minutes on a GPU give figures; the time of a row that goes on later is its limit again."""
    assert max(row.limit for row in ROWS) <= 45


def test_a_prediction_is_the_longer_of_bytes_and_operations_and_a_gap_a_kernel():
    reads, computes = cost.Cost(predict.BANDWIDTH, 1, 1000), cost.Cost(1, 2 * predict.RATE)
    assert predict.seconds(reads) == pytest.approx(1 + 1000 * predict.GAP)
    assert predict.seconds(computes) == pytest.approx(2)
    hf = models.llama(4, 3, 2, 1, 6, 10)
    assert predict.kv_bytes(hf, 5) == 5 * 3 * 2 * 2 * 2


def test_operations_of_products_are_counted_at_each_call():
    """`einsum` is a function of its own in the module."""
    call = jax.jit(lambda x, w: jax.nn.relu(x @ w) @ w + jnp.einsum("ab,bc->ac", x, w) @ jnp.einsum("ab,bc->ac", w, w))
    text = call.lower(jnp.ones((3, 8)), jnp.ones((8, 8))).as_text()
    assert cost.product_flops(text) == 4 * 2 * 3 * 8 * 8 + 2 * 8 * 8 * 8


def test_bytes_are_counted_beside_tuples_of_many_arrays():
    text = """
ENTRY %main {
  %p.1 = f32[4]{0} parameter(0)
  %t.2 = (f32[4]{0}, f32[4]{0}, /*index=2*/f32[4]{0}) sort(%p.1)
  ROOT %add.3 = f32[4]{0} add(%p.1, %t.2)
}
"""
    assert moved_bytes(text) == (48 + 16) + (16 + 16 + 48)
