"""Accuracy from a file of questions, on the packaged checkpoint; how numbers are read; perplexity of a text."""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from support import scripts

from jaxinfer import demo

pytestmark = pytest.mark.xdist_group("demo")
COUNT = 40


@pytest.fixture(scope="module")
def script():
    """scripts/eval.py."""
    return scripts.load("eval")


@pytest.fixture(scope="module")
def asked() -> list:
    return demo.heldout_questions(COUNT)


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He has 5 + 3 = 8.\n#### 8", "8"),
        ("#### 1,234", "1234"),
        ("#### $18.00", "18"),
        ("so 3, then 12.", "12"),
        ("it is -7 degrees", "-7"),
        ("#### 4\nQuestion 9", "4"),
        ("#### 1\n#### 2 of 3", "2"),
        ("2.50 dollars", "2.5"),
        ("none", None),
        ("####", None),
        ("####\n", None),
        ("5 and ####", None),
        ("1,2,3,", "123"),
    ],
)
def test_the_number_of_a_text(script, text, expected):
    assert script.number(text) == (None if expected is None else Decimal(expected))


def test_what_counts_as_right(script):
    marked, plain = script.Question("?", "2 + 2 = 4\n#### 4"), script.Question("?", "It is 4.")
    assert marked.is_right("2 and 2 make 4.0") and marked.is_right("7 #### 4 done 5")
    assert not marked.is_right("4, or 5") and not marked.is_right("four") and not marked.is_right("")
    assert plain.is_right(" It is 4.\n") and not plain.is_right("4") and not plain.is_right("It is 4. And")


@pytest.mark.slow
def test_accuracy_is_that_of_the_answers(script, asked, tmp_path, capsys):
    """Every fourth line has an answer that nobody gives; by text and, with the mark, by number."""
    rows = [{"question": one.text, "answer": one.answer if i % 4 else "nobody says so"} for i, one in enumerate(asked)]
    command = ["--questions", write(tmp_path / "q.jsonl", rows), "--max-tokens", "40", "--json", "--wrong", "2"]
    assert script.main(command) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["questions"], found["cut_off"]) == (COUNT, 0)
    assert found["right"] == round(found["accuracy"] * COUNT) and 0.65 <= found["accuracy"] <= 0.75
    assert found["settings"]["fuse_projections"] is True and found["seconds"] > 0
    assert said.err.count("not 'nobody says so'") == 2


@pytest.mark.slow
def test_sums_are_judged_by_their_number_with_and_without_fusion(script, asked, tmp_path, capsys):
    sums = [one for one in asked if one.kind == "sum"]
    rows = [{"question": one.text, "answer": f"so\n#### {one.answer.rstrip('.').split()[-1]}"} for one in sums]
    path = write(tmp_path / "sums.jsonl", rows)
    found = []
    for fuse, more in (("--fuse-projections", []), ("--no-fuse-projections", []), ("--fuse-projections", ["--chat"])):
        assert script.main(["--questions", path, fuse, "--max-tokens", "32", *more]) == 0
        found.append(capsys.readouterr().out.split(" in ")[0])
    assert found[0] == found[1] and found[0].startswith("accuracy 1.0000" if len(sums) < 12 else "accuracy ")
    assert f"of {len(sums)} right" in found[2]


@pytest.mark.slow
def test_examples_are_not_asked_and_few_tokens_cut_off(script, capsys):
    assert script.main(["--questions", "demo", "--limit", "6", "--shots", "2", "--max-tokens", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["questions"], found["cut_off"], found["right"]) == (6, 6, 0)


@pytest.mark.slow
def test_the_perplexity_of_an_answer_is_below_that_of_the_same_words_in_disorder(script, asked, tmp_path, capsys):
    """The packaged checkpoint knows the answers; tokens that begin a window without a BOS token are not scored."""
    words = " ".join(one.answer for one in asked[:8]).split(" ")
    found = []
    for order in (words, sorted(words)):
        (tmp_path / "text").write_text(" ".join(order))
        assert script.main(["--perplexity", str(tmp_path / "text"), "--window", "24", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert 1 < found[0]["perplexity"] < found[1]["perplexity"] / 2
    assert found[0]["windows"] * 23 >= found[0]["tokens"] > (found[0]["windows"] - 1) * 23


@pytest.mark.parametrize("content", [None, b" \n", b"\xff"])
def test_what_is_wrong_with_a_text_is_named(script, content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert script.main(["--perplexity", str(tmp_path / "text")]) == 2
    assert re.search(r"--perplexity .*text.*(No such file|no text in it|not UTF-8)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, [], "No such file"),
        ("", [], "no question in it"),
        ("{", [], "line 1 is not JSON"),
        ('{"question": "a", "answer": "b"}\n[1]', [], 'line 2: "question" must be text'),
        ('{"question": "a"}', [], 'line 1: "answer" must be text'),
        ('{"question": " ", "answer": "b"}', [], '"question"'),
        ('{"question": "a", "answer": "#### x"}', [], "no number behind ####"),
        (
            '{"question": "a", "answer": "b"}',
            ["--shots", "1"],
            "--shots 1 takes the first lines .* there are 1; ask for fewer",
        ),
    ],
)
def test_what_is_wrong_is_named(script, content, more, message, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_text(content)
    assert script.main(["--questions", str(path), *more]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("flag", "value"), [("--limit", "0"), ("--shots", "-1"), ("--max-tokens", "0")])
def test_flags_out_of_range(script, flag, value, capsys):
    with pytest.raises(SystemExit):
        script.main(["--questions", "demo", flag, value])
    assert flag in capsys.readouterr().err
