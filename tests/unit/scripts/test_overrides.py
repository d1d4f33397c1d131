"""`--hf-overrides` of every command that reads a model, and `scripts/fuzz.py`, which breaks what they read."""

import argparse
import json
import random

import pytest
from benchmarks.checkpoint import laid_over
from fuzzing import cli as fuzz
from fuzzing import mutations, part
from support import checkpoint, scripts, tiny

from jaxinfer import cli
from jaxinfer.checkpoint.hf import read_config
from jaxinfer.commands.overrides import parse_overrides


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the value is not JSON: Expecting property name"),
        ("[1]", "the value must be a JSON object of config.json's names, not list"),
        ("@absent.json", "cannot read absent.json: No such file"),
        ("[" * 100_000, "the value is not JSON"),
    ],
)
def test_what_is_no_object_is_said_in_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match=message) as error:
        parse_overrides(text)
    assert "\n" not in str(error.value)


def test_a_file_says_the_same(tmp_path):
    (tmp_path / "x.json").write_text('{"what": null}')
    assert parse_overrides(f"@{tmp_path / 'x.json'}") == parse_overrides('{"what": null}') == {"what": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose config.json has an attribute that nobody knows."""
    made = checkpoint.write(tmp_path_factory.mktemp("model"), tiny.config("llama"), with_tokenizer=False)
    (made / "config.json").write_text(json.dumps(json.loads((made / "config.json").read_text()) | {"what": 3}))
    return made


def test_a_plan_and_a_conversion_take_it(folder, tmp_path, capsys):
    from placements import cli as placement

    from jaxinfer.checkpoint.hub import resolve_model
    from jaxinfer.loading import convert, weights
    from jaxinfer.sharding import make_mesh

    assert placement.main([f"--model={folder}"]) == 2
    assert "--hf-overrides '{\"what\": null}'" in capsys.readouterr().err
    assert placement.main([f"--model={folder}", "--hf-overrides", '{"what": null}']) == 0
    args = scripts.load("convert").parse(
        [f"--model={folder}", f"--out={tmp_path / 'out'}", '--hf-overrides={"what": null}']
    )
    convert.convert(resolve_model(args.model), args.out, make_mesh(1), overrides=args.hf_overrides, progress=False)
    assert "what" not in json.loads((args.out / "config.json").read_text())
    weights.load(args.out, make_mesh(1), progress=False)


def test_what_is_measured_is_a_folder_that_says_so(folder, tmp_path):
    made = laid_over(folder, {"what": None, "rope_theta": 5.0}, tmp_path)
    assert read_config(made) == {name: v for name, v in read_config(folder).items() if name != "what"} | {
        "rope_theta": 5.0
    }
    assert (made / "model.safetensors").samefile(folder / "model.safetensors")


def test_every_other_command_has_the_flag():
    from benchmarks import flags

    given = ["--hf-overrides", '{"x": 1}']
    parsed = [
        *(cli.parse([command, *given])[1] for command in ("generate", "chat", "plan")),
        cli.parse(["serve", "M", *given])[1],
        scripts.load("eval").parse(["--questions=demo", *given]),
        flags.make_parser().parse_args(["throughput", "--model=M", *given]),
    ]
    assert [args.hf_overrides for args in parsed] == [{"x": 1}] * 6


# --- Fuzzing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", fuzz.PARTS, ids=lambda one: one.name)
def test_broken_files_give_public_errors(one):
    """A few of those that `.ci/run` tries for 30 seconds."""
    failures = [found for case in range(60) if (found := part.run(one, seed=1, case=case))]
    assert not failures, failures[0]


def test_the_same_number_breaks_a_file_in_the_same_way():
    tree = {"a": [1, 2.5, {"b": "x"}], "c": None}
    first, again = (mutations.broken(random.Random(5), tree) for _ in range(2))
    assert repr(first) == repr(again) != repr(tree)
    assert tree == {"a": [1, 2.5, {"b": "x"}], "c": None}


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: {}["x"], "KeyError"),
        (lambda: len(3), "TypeError"),
        (lambda: int("x"), "ValueError"),
    ],
)
def test_what_python_says_of_a_value_is_no_public_error(read, said):
    found = part.run(part.Part("x", lambda rng, folder: read), 0, 0)
    assert found is not None and said in found.report


def test_an_input_that_takes_too_long_is_reported(monkeypatch):
    monkeypatch.setattr(part, "LIMIT", 0.05)

    def forever() -> None:
        while True:
            pass

    found = part.run(part.Part("x", lambda rng, folder: forever), 0, 0)
    assert found is not None and "no answer after 0.05 s" in found.report
