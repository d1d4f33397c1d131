"""`examples/ray_batch.py`: what is left to compute, broken lines; with Ray, a killed actor and a second run."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
from support import ray_processes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
ray_batch = importlib.import_module("ray_batch")  # by this name the actors import it
pytestmark = pytest.mark.xdist_group("demo")


def test_only_blocks_without_a_file_are_left(tmp_path):
    prompts = [f"prompt {i}" for i in range(7)]
    assert [row["index"] for row in ray_batch.missing_rows(prompts, 3, tmp_path)] == list(range(7))
    ray_batch.block_file(tmp_path, 1).write_text('{"index": 3}\n{"index": 4}\n{"index": 5}\n')
    (tmp_path / "block-000000.7.part").write_text('{"index": 0')  # an actor died while it wrote
    left = ray_batch.missing_rows(prompts, 3, tmp_path)
    assert [(row["index"], row["block"]) for row in left] == [(0, 0), (1, 0), (2, 0), (6, 2)]
    ray_batch.block_file(tmp_path, 0).write_text('{"index": 0}\n')
    assert [one["index"] for one in ray_batch.merge(tmp_path)] == [0, 3, 4, 5]


@pytest.mark.parametrize("line", ["{", "[1]", '{"prompt": 3}', '{"prompt": ""}', '{"text": "a"}'])
def test_a_broken_line_is_named(line, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3"):
        ray_batch.read_prompts(file)


@pytest.mark.slow
def test_results_are_complete_and_in_order_when_an_actor_is_killed(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from jaxinfer import demo

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'examples'}:{ROOT / 'tests'}")
    from support import dying_actor

    file, out, died = tmp_path / "prompts.jsonl", tmp_path / "out", tmp_path / "died"
    monkeypatch.setenv(dying_actor.DIED, str(died))
    monkeypatch.setattr(ray_batch, "Generate", dying_actor.DyingGenerate)
    file.write_text("".join(json.dumps({"prompt": f"What is {i} plus {i + 3}?"}) + "\n" for i in range(24)))
    settings = json.dumps({"max_model_len": 64, "max_num_seqs": 4})
    args = argparse.Namespace(model=str(demo.path()), prompts=file, out=out, actors=2, block=4, max_tokens=8, cpus=1)
    args.settings = settings
    ray_processes.start()
    try:
        assert ray_batch.run(args) == 0
        assert died.exists()
        results = (out / "results.jsonl").read_text()
        assert [json.loads(line)["index"] for line in results.splitlines()] == list(range(24))
        ray_batch.block_file(out, 2).unlink()
        assert ray_batch.run(args) == 0 and (out / "results.jsonl").read_text() == results
    finally:
        ray.shutdown()
