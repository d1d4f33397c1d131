"""The capacity simulator: traces, step-time models, and schedules equal to those of a real engine."""

import json
import re
import sys

import numpy as np
import pytest
from support import scripts, tiny

from jaxinfer.sharding import plan

pytestmark = pytest.mark.xdist_group("tiny")
scripts.load("simulate")
from simulating import cli, engines, replay, times, trace
from simulating.runner import Clock, SimulatedRunner
from simulating.times import DEVICES, TERMS, Measured, Roofline
from simulating.trace import Arrival
from simulating.work import Work

LLAMA = tiny.CONFIG | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


class Unit:
    """Every step takes one second."""

    def seconds(self, work: Work) -> float:
        return 1.0

    def describe(self) -> str:
        return "a second"


def schedule_of(engine, arrivals, clock=None):
    """Replay a trace; return what each step computed, and the outcome."""
    found, schedule = [], engine.scheduler.schedule

    def recorded(*args):
        made = schedule(*args)
        chunks = [(chunk.sequence.request.id, chunk.start, chunk.count) for chunk in made.chunks]
        found.append((chunks, sorted(s.request.id for s in made.decodes), made.steps))
        return made

    engine.scheduler.schedule = recorded
    return found, replay.real(engine, arrivals) if clock is None else replay.simulated(engine, arrivals, clock)


@pytest.mark.parametrize(
    ("host", "joint"),
    [
        ({}, False),
        ({}, True),
        ({"decode_steps": 3}, False),
        ({"pool_blocks": 14}, False),
        ({"prefix_caching": False}, False),
    ],
    ids=["default", "joint steps", "several decode steps", "preempting", "no prefix cache"],
)
def test_a_simulated_engine_makes_the_decisions_of_a_real_one(host, joint, monkeypatch):
    monkeypatch.setattr(trace, "HASHED", 2 * tiny.BLOCK)
    rng = np.random.default_rng(3)
    arrivals = [
        Arrival(0.0, int(rng.integers(1, 40)), int(rng.integers(1, 14)), (int(group), int(group) + 7))
        for group in rng.integers(0, 3, 14)
    ]
    runner = tiny.joint_runner(tiny.random_runner()) if joint else tiny.random_runner()
    engine = tiny.make_engine(runner, **host)
    watch = replay.Stopwatch(engine)
    monkeypatch.setattr(replay, "real", lambda e, a, real=replay.real: real(e, a, watch))
    expected, real = schedule_of(engine, arrivals)
    assert len(watch.works) == sum(bool(chunks or decodes) for chunks, decodes, _ in expected)
    computed = sum(count for chunks, _, _ in expected for _, _, count in chunks)
    assert sum(work.tokens for step in watch.works for work in step if not work.decode) >= computed
    assert all(seconds > 0 for seconds in watch.seconds)

    clock = Clock()
    made = SimulatedRunner(runner.program, runner.params, runner.shapes, Unit(), clock)
    found, outcome = schedule_of(tiny.make_engine(made, **host), arrivals, clock)
    assert found == expected
    assert (outcome.cached, outcome.preemptions, outcome.padding) == (real.cached, real.preemptions, real.padding)
    assert (outcome.preemptions > 0) == ("pool_blocks" in host)
    assert (outcome.cached > 0) == ("prefix_caching" not in host)
    assert [answer.new_tokens for answer in outcome.answers] == [one.output for one in arrivals]
    both = sum(bool(chunks and decodes) for chunks, decodes, _ in expected)
    launches = sum(bool(chunks) + steps * bool(decodes) for chunks, decodes, steps in expected) - both * joint
    assert outcome.seconds == launches, "one second for each launch, and none between them"


def test_latencies_follow_from_arrivals_and_step_times():
    clock, runner = Clock(), tiny.random_runner()
    made = SimulatedRunner(runner.program, runner.params, runner.shapes, Unit(), clock)
    arrivals = [Arrival(0.0, 5, 3), Arrival(100.0, 5, 2), Arrival(100.5, 5, 1), Arrival(101.0, tiny.LENGTH, 1)]
    outcome = replay.simulated(tiny.make_engine(made), arrivals, clock)
    first, second, third = outcome.answers
    # The host plans a step while the one before it runs, and reads that one after it has dispatched the next.
    assert (first.first, first.seconds, first.gaps) == (1.0, 3.0, [1.0, 1.0])
    assert (second.first, second.seconds) == (1.0, 2.0)
    assert third.first == pytest.approx(1.5 + 1.0), "it came during the second's prefill and decode, and waited"
    assert len(outcome.refused) == 1 and f"has {tiny.LENGTH} tokens" in outcome.refused[0]
    assert outcome.figures()["refused"] == 1


def roofline(hf, device="h100", devices=1):
    made = plan(hf, tensor_parallel_size=devices)
    family, parsed = engines.weights.parse(hf, None)
    module = engines.weights.abstract(family, parsed, np.dtype("bfloat16"), tiny.make_mesh(devices))
    return made, Roofline(DEVICES[device], module, made, 2)


def work(decode=True, tokens=1, rows=1, kv=(0,), pairs=(0,)):
    return Work(decode, tokens, rows, kv, pairs)


def test_a_step_takes_the_longer_of_its_bytes_and_its_operations():
    big = LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "tie_word_embeddings": False}
    made, model = roofline(big)
    table = next(row for row in made.rows if row.path == "embedding.weight")
    gaps = 11 * 2 * 1e-6
    read = made.device_bytes - table.device_bytes  # a step reads few rows of the embedding
    assert model.seconds(work()) == pytest.approx(read / (0.92 * 3.352e12) + gaps, rel=1e-3)
    operations = 2 * 4096 * read / 2
    assert model.seconds(work(tokens=4096)) == pytest.approx(operations / (0.70 * 989e12) + gaps, rel=1e-3)
    position = 2 * 2 * big["num_hidden_layers"] * big["num_key_value_heads"] * big["head_dim"]
    more = model.seconds(work(kv=(10**6,))) - model.seconds(work())
    assert more == pytest.approx(1e6 * position / (0.92 * 3.352e12))
    tied, shared = roofline(big | {"tie_word_embeddings": True})
    assert shared.seconds(work()) == pytest.approx(tied.device_bytes / (0.92 * 3.352e12) + gaps, rel=1e-3)


def test_experts_that_no_token_chooses_are_not_read():
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 2048, "hidden_size": 1024}
    hf = LLAMA | moe | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    made, model = roofline(hf)
    experts = sum(row.device_bytes for row in made.rows if row.path.split(".")[-2] in ("down", "gate_up"))
    base, all_read = model.seconds(work()), model.seconds(work(tokens=64))
    assert all_read - base == pytest.approx(experts * (0.75 - 0.75**64) / (0.92 * 3.352e12), rel=0.02)
    sharded = roofline(hf, devices=2)[1]
    assert sharded.seconds(work(tokens=64)) > all_read / 2, "collectives are not free"


def test_windows_bound_what_attention_reads():
    from simulating.work import attended

    assert attended(np.array([10, 100]), [], None) == (110, 110)
    assert attended(np.array([10, 100]), [], 16) == (26, 26)
    assert attended(np.array([], int), [(0, 3)], None) == (3, 6)
    assert attended(np.array([], int), [(0, 3)], 2) == (3, 5)
    assert attended(np.array([], int), [(4, 256)], None) == (132 + 260, sum(range(5, 261)))
    assert attended(np.array([7]), [(0, 1)], None) == (8, 8)


def test_a_measured_model_finds_the_coefficients_and_ignores_slow_steps():
    rng = np.random.default_rng(0)
    true = dict(zip(TERMS, (3e-3, 2e-4, 1e-6, 5e-3, 1e-4, 2e-8), strict=True))
    steps = [
        [work(bool(decode), int(tokens), 8, (int(pairs),), (int(pairs),))]
        for decode, tokens, pairs in zip(
            rng.integers(0, 2, 200), rng.integers(1, 512, 200), rng.integers(1, 90_000, 200), strict=True
        )
    ]
    exact = Measured("m", true, 0, 0, 0)
    seconds = [sum(map(exact.seconds, step)) for step in steps]
    seconds[::20] = [10 * one for one in seconds[::20]]
    found = Measured.fit("m", steps, seconds)
    assert found.seconds_per == pytest.approx(true, rel=1e-3) and found.median_error < 1e-3
    with pytest.raises(ValueError, match="5 steps were measured, fewer than the 6 terms"):
        Measured.fit("m", steps[:5], seconds[:5])


def test_traces_of_all_formats(tmp_path):
    own, mooncake, azure = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.csv"
    rows = [
        {"arrival": 2, "prompt_tokens": 3, "output_tokens": 4},
        {"arrival": 1, "prompt_tokens": 5, "output_tokens": 6},
    ]
    own.write_text("\n\n".join(map(json.dumps, rows)))
    assert trace.read(own) == [Arrival(0, 5, 6), Arrival(1, 3, 4)]
    assert trace.read(own, rate=4, limit=2)[1].at == 0.25
    row = {"timestamp": 1500, "input_length": 1100, "output_length": 9, "hash_ids": [4, 5, 6]}
    mooncake.write_text(json.dumps(row | {"timestamp": 500}) + "\n" + json.dumps(row | {"hash_ids": [4, 5, 7]}))
    first, second = trace.read(mooncake)
    a, b = first.tokens(0, 1000), second.tokens(1, 1000)
    assert second.at == 1.0 and len(a) == len(b) == 1100 and a.dtype == np.int32
    assert (a[:1024] == b[:1024]).all() and (a[1024:] != b[1024:]).any()
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690+00:00,396,109\n"
    )
    found = trace.read(azure)
    assert found[1].at == pytest.approx(4.314579) and (found[1].prompt, found[1].output) == (396, 109)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests; write one a line"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: expected an object"),
        ('{"arrival": 0, "prompt_tokens": 3}', "line 1: none of output_length, output_tokens, GeneratedTokens"),
        ('{"arrival": -1, "prompt_tokens": 3, "output_tokens": 1}', "arrival must be a time of at least 0, got -1"),
        ('{"arrival": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens must be an integer of at least 1"),
        ('{"arrival": 0, "prompt_tokens": 1.5, "output_tokens": 1}', "at least 1, got 1.5"),
        ('{"arrival": 0, "prompt_tokens": 1, "output_tokens": true}', "at least 1, got True"),
        (
            '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}',
            "hash_ids must be a list of int",
        ),
    ],
)
def test_a_broken_trace_is_refused_by_line_and_field(tmp_path, text, message):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        trace.read(path)


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["simulate.py", *map(str, words)])
    try:
        status = cli.main()
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr()


def test_the_command_simulates_a_gpu_from_a_config_alone(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 4096}))
    file = tmp_path / "t.jsonl"
    file.write_text('{"arrival": 0, "prompt_tokens": 30, "output_tokens": 8}\n' * 3)
    given = ("--model", tmp_path, "--trace", file, "--device", "l4")
    status, shown = command(monkeypatch, capsys, *given, "--json", "--set", "max_num_seqs=2")
    assert status == 0, shown.err
    found = json.loads(shown.out)
    assert status == 0 and found["rows"] == 2 and found["simulated"]["completed"] == 3
    assert found["simulated"]["max_running"] == 2 and "never run on one" in found["step_times"]
    status, shown = command(monkeypatch, capsys, *given, "--memory", "1KiB")
    assert status == 2 and "leaves no room for a cache; raise --tensor-parallel-size" in shown.err
    status, shown = command(monkeypatch, capsys, *given, "--set", "max_num_seq=2")
    assert status == 2 and "did you mean 'max_num_seqs'?" in shown.err
    status, shown = command(monkeypatch, capsys, *given)
    assert status == 0 and "completed requests" in shown.out and "1 x l4" in shown.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give exactly one of --device, --measure and --step-times"),
        (["--device", "h100"], "--trace is needed"),
        (["--device", "h101", "--trace", "x"], "'h101' must be one of h100, h200"),
        (["--step-times", "x", "--trace", "x", "--memory", "1GiB"], "belong to --device"),
        (["--device", "h100", "--trace", "x", "--check"], "it needs --step-times"),
        (["--device", "h100", "--trace", "x", "--memory", "1GX"], "--memory: '1GX' must be a size"),
        (["--device", "h100", "--trace", "/nowhere/x.jsonl"], "No such file"),
        (["--step-times", __file__, "--trace", __file__], "not JSON|is not a file of --measure"),
    ],
)
def test_bad_command_lines_end_with_status_2_and_a_sentence(monkeypatch, capsys, words, message):
    status, shown = command(monkeypatch, capsys, *words)
    assert status == 2
    assert re.search(message, shown.err), shown.err


def test_the_script_counts_the_devices_of_its_command_line_before_jax_starts():
    from simulating.arguments import simulated_devices

    assert simulated_devices(["simulate.py", "--device", "h100", "--tensor-parallel-size", "4"]) == 4
    assert simulated_devices(["simulate.py", "--step-times", "x"]) == 0


def test_packed_weights_are_multiplied_like_others():
    made = [plan(LLAMA | tiny.FOUR_BITS, quantization=kept).rows for kept in (None, "dequantize")]
    assert {row.dtype for row in made[0]} >= {"uint8"}
    assert times._elements(made[0]) == times._elements(made[1])
