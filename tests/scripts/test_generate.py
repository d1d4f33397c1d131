"""The command line, run in this process on the packaged checkpoint."""

import json
import re

import pytest
from support import scripts

pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def command():
    """`main` of scripts/generate.py."""
    return scripts.load("generate").main


def test_with_no_arguments_it_asks_the_packaged_checkpoint(command, capsys):
    assert command([]) == 0
    out, err = capsys.readouterr()
    assert "17 plus 25 is 42" in out and "Paris" in out
    assert "tok/s" in err and "peak memory" in err
    compiling, total = (
        float(re.search(what, err)[1]) for what in (r"compiling took ([\d.]+) s", r"tokens in ([\d.]+) s")
    )
    rate = re.search(r"generation: (?:([\d.]+) tok/s|too short to say)", err)[1]
    assert compiling > 0 and (rate is None or float(rate) > 20 / total), "time that compiles is in no rate"


@pytest.mark.slow
def test_json_is_one_object_a_request_and_nothing_else(command, capsys):
    prompts = ["Question: What is 3 plus 4?\nAnswer:", "Question: What is the capital of Japan?\nAnswer:"]
    assert command(["--json", "--prompt", prompts[0], "--prompt", prompts[1], "--max-tokens", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2
    for row, answer in zip(rows, ("7", "Tokyo")):
        assert set(row) == {"prompt", "prompt_token_ids", "outputs", "num_cached_tokens"}
        assert set(row["outputs"][0]) == {"index", "token_ids", "text", "finish_reason"}
        assert (
            row["prompt"] in prompts
            and answer in row["outputs"][0]["text"]
            and row["outputs"][0]["finish_reason"] == "stop"
        )


@pytest.mark.slow
def test_weights_in_int8_answer_too(command, capsys):
    assert command(["--quantization", "int8"]) == 0
    out = capsys.readouterr().out
    assert "17 plus 25 is 42" in out and "Paris" in out


@pytest.mark.slow
def test_prompts_come_from_a_file_and_samples_are_listed(command, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("What is 1 plus 1?\n\nWhat is 2 plus 2?\n")
    arguments = ["--prompts-file", str(file), "--chat", "--n", "2", "--temperature", "0.5", "--seed", "1"]
    assert command(arguments) == 0
    out = capsys.readouterr().out
    assert out.index("What is 1 plus 1?") < out.index("What is 2 plus 2?")
    assert out.count("[0]") == out.count("[1]") == 2


@pytest.mark.slow
def test_the_sanity_run_shows_both_outputs_the_differences_and_the_hits(command, capsys):
    assert command(["--samples", "20", "--add-prefix", "--compare"]) == 0
    out = capsys.readouterr().out
    assert out.count("    on  ") == out.count("    off ") == 20
    assert "0 of 20 differ between sharing on and off" in out
    hits = int(out.split("answers as expected; ")[1].split(" of ")[0])
    assert hits >= 20 * 16, "each question reuses at least a block of the shared prefix"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x", "--top-p", "3"], "error: --top-p must be in (0, 1], got 3.0."),
        (["--prompt", "x", "--n", "2"], "error: --n must be 1 when using greedy sampling, got 2."),
        (["--prompt", "x", "--max-tokens", "0"], "error: --max-tokens must be at least 1"),
        (["--prompts-file", "/nowhere/prompts.txt"], "/nowhere/prompts.txt: No such file or directory"),
        (["--prompts-file", "/dev/null"], "has no prompt in it"),
        (["--model", "./no-such-folder"], "directory does not exist"),
        (["--model", "nobody/nothing"], "cannot be downloaded from the Hugging Face Hub"),
    ],
)
def test_bad_input_is_one_line(command, capsys, arguments, words):
    assert command(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and words in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "21"], "--samples must be from 1 to 20, got 21"),
        (["--samples", "-1"], "--samples must be from 1 to 20, got -1"),
        (["--samples", "3", "--json"], "--samples asks built-in questions"),
        (["--compare", "--prompt", "x"], "go with --samples"),
        (["--model", ""], "--model is empty"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(command, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        command(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
