"""Demo questions: held-out data is not in training texts, and the packaged checkpoint is small and complete."""

import json
import random
import re
import subprocess
import sys

import pytest

from jaxinfer import demo
from jaxinfer.demo import corpus, documents, facts

PAIR = re.compile(r"(?<!\d)(\d+)(?: plus | \+ | and )(\d+)(?!\d)")
COMPARED = re.compile(r"(?<!\d)(\d+)(?: or | is larger than | is smaller than )(\d+)(?!\d)")
MAX_BYTES = 8_000_000


def _bare(text: str) -> str:
    """Normalize a text as training does at times: no capitals and no final punctuation."""
    return text.lower().rstrip("?.!")


@pytest.fixture(scope="module")
def trained_texts() -> list[str]:
    rng = random.Random("any training text")
    made = (documents.training_document(rng) for _ in range(30_000))
    return [piece.text for document in made for piece in document.pieces]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pattern"), [("sum", PAIR), ("compare", COMPARED)], ids=["sum", "compare"])
def test_held_out_pairs_are_in_no_training_text(trained_texts, kind, pattern):
    seen = {tuple(map(int, pair)) for text in trained_texts for pair in pattern.findall(text)}
    held = {pair for pair in seen if corpus.is_pair_held_out(kind, *pair)}
    assert len(seen) > 4000
    assert held == set()


def test_held_out_questions_are_in_no_training_text(trained_texts):
    unframed = (text.removeprefix("Question: ").removesuffix("\nAnswer:").strip() for text in trained_texts)
    asked = {_bare(text) for text in unframed}
    held = {_bare(question.text) for question in corpus.heldout_questions(2000, seed=3)}
    assert len(asked) > 10_000
    assert asked & held == set()


def test_holding_out_is_symmetric_and_about_a_tenth():
    pairs = [(a, b) for a in range(100) for b in range(100)]
    held = {pair for pair in pairs if corpus.is_pair_held_out("sum", *pair)}
    assert held == {(b, a) for a, b in held}
    assert 0.08 < len(held) / len(pairs) < 0.12


def test_questions_are_deterministic_distinct_and_differ_by_seed():
    first = corpus.heldout_questions(300)
    assert first == corpus.heldout_questions(300)
    assert first[:100] == corpus.heldout_questions(100)
    assert len({question.text for question in first}) == 300
    assert first != corpus.heldout_questions(300, seed=1)


def test_questions_are_the_same_in_another_process():
    code = "from jaxinfer import demo; print([q.text for q in demo.heldout_questions(50)])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([question.text for question in demo.heldout_questions(50)])


@pytest.mark.parametrize("n", [-1, 5001])
def test_a_count_out_of_range_is_named(n):
    with pytest.raises(ValueError, match=f"n must be from 0 to 5000, got {n}"):
        corpus.questions("train", n)


def test_sums_and_comparisons_have_the_right_answer():
    for question in corpus.questions("train", 3000) + corpus.heldout_questions(1000):
        numbers = [int(number) for number in re.findall(r"\d+", question.answer)]
        if question.kind == "sum":
            assert numbers[2] == sum(map(int, re.findall(r"\d+", question.text))) == sum(numbers[:2])
        if question.kind == "compare":
            assert (numbers[0] > numbers[1]) == ("larger" in question.answer)
            assert ("smaller" in question.text) == ("smaller" in question.answer)
            assert sorted(numbers) == sorted(map(int, re.findall(r"\d+", question.text)))


def test_no_two_facts_share_a_phrasing():
    phrasings = [text for fact in (*facts.all_facts(), *facts.SMALL_TALK) for text in fact.phrasings]
    assert len(phrasings) == len(set(phrasings))


def test_only_the_whole_answer_is_correct():
    question = corpus.Question("What is 1 plus 2?", "1 plus 2 is 3.", "sum")
    assert question.prompt == "Question: What is 1 plus 2?\nAnswer:"
    assert question.chat_messages == [{"role": "user", "content": "What is 1 plus 2?"}]
    assert question.is_correct(" 1 plus 2 is 3.\n")
    assert not question.is_correct("1 plus 2 is 33.")
    assert not question.is_correct("1 plus 2 is 3. 2 plus 2 is 4.")
    assert not question.is_correct("")


def test_sample_questions_are_answered_by_the_corpus():
    samples = demo.sample_questions()
    known = {q.text: q.answer for split in ("train", "heldout") for q in corpus.questions(split, 5000)}
    known |= {text: fact.answer for fact in facts.all_facts() for text in fact.phrasings}
    assert len(samples) == len({text for text, _ in samples}) == 20
    checked = [known[text].count(answer) for text, answer in samples if text in known]
    assert set(checked) == {1}
    assert len(checked) >= 12


def test_shared_prefix_is_an_instruction_of_training_and_ends_with_a_blank_line():
    prefix = demo.shared_prefix()
    assert prefix.endswith(".\n\n")
    assert 40 <= len(prefix.split()) <= 60


def test_the_packaged_checkpoint_is_small_and_holds_only_known_files():
    files = {file.name: file.stat().st_size for file in demo.path().iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) < MAX_BYTES


def test_the_packaged_tensors_are_bfloat16_and_one_to_four_million():
    raw = (demo.path() / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    assert {entry["dtype"] for entry in tensors} == {"BF16"}
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors) // 2
    assert 1_000_000 <= size <= 4_000_000


def test_the_packaged_configuration_names_every_end_token():
    config = json.loads((demo.path() / "config.json").read_text())
    generation = json.loads((demo.path() / "generation_config.json").read_text())
    vocabulary = json.loads((demo.path() / "tokenizer.json").read_text())["model"]["vocab"]
    ends = [vocabulary["<|end_of_text|>"], vocabulary["<|end|>"]]
    assert config["eos_token_id"] == generation["eos_token_id"] == ends
    assert config["bos_token_id"] == generation["bos_token_id"] == vocabulary["<|begin_of_text|>"]
    assert config["pad_token_id"] == generation["pad_token_id"] == vocabulary["<|pad|>"]
    assert config["vocab_size"] == len(vocabulary)
    assert config["max_position_embeddings"] >= 1024
    assert "auto_map" not in config
