"""Tokenizers of GGUF files: the ids of the tokenizers they were made from; refusals by name."""

import pytest

pytest.importorskip("gguf", reason="reads GGUF files; it comes with the extra `test` for Python 3.11")

from support import gguf as files

from jaxinfer.checkpoint.gguf_folder import LINK
from jaxinfer.errors import CheckpointError
from jaxinfer.inputs.tokenizer import load_tokenizer

PIECES = ["<unk>", "<s>", "</s>", "  ", "<x>", "<0xC3>", "<0xA9>", "▁", "a", "b", "▁a", "ab", "▁ab", "<pad>"]
SENTENCEPIECE = dict(
    model="llama",
    pre=None,
    merges=None,
    tokens=PIECES,
    scores=[-float(i) for i in range(len(PIECES))],
    token_type=[2, 3, 3, 4, 4, 6, 6, 1, 1, 1, 1, 1, 1, 5],
)


@pytest.fixture
def load(tmp_path):
    """Make the folder of a file with this tokenizer, and load it from there."""

    def made(architecture: str = "llama", extra=(), **changes):
        values = {"general.architecture": architecture, **files.tokenizer(**changes), **dict(extra)}
        path = files.write(tmp_path / "model.tmp", values, {})
        (tmp_path / LINK).unlink(missing_ok=True)
        (tmp_path / LINK).symlink_to(path)
        return load_tokenizer(tmp_path)

    return made


def test_byte_level_merges_special_tokens_and_ends(load):
    made = load()
    assert made.encode("abc c<|end|>a</s>") == [1, 12, 11, 3, 4, 2]
    assert (made.bos_token, made.eos_token, made.unk_token, made.pad_token) == ("<s>", "</s>", "<unk>", None)
    assert made.decode([12, 11, 3, 2], skip_special_tokens=True) == "abc c<|end|>"
    assert load(pre="smollm").encode("abc") == [12]
    assert load(pre="smollm", add_bos_token=True, add_eos_token=True).encode("abc") == [1, 12, 2]
    assert load(pre=None, token_type=[2, 3, 3, 5, *[1] * 9]).get_vocab().keys() == set(files.TOKENS) - {"<|end|>"}


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("default", ["a", "  ", " 123", " b's", "\n\n"]),
        ("smollm", ["a", "   ", "1", "2", "3", " b", "'s", "\n\n"]),
        ("llama-bpe", ["a", "  ", " ", "123", " b", "'s", "\n\n"]),
        ("qwen2", ["a", "  ", " ", "1", "2", "3", " b", "'s", "\n\n"]),
        ("tekken", ["a", "  ", " ", "1", "2", "3", " b", "'s", "\n\n"]),
    ],
)
def test_texts_are_split_as_by_the_kind_of_pre_tokenizer(kind, pieces, load):
    found = load(pre=kind).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a   123 b's\n\n")
    joined = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in found]
    if kind == "default":
        pieces = ["a", "  ", " 123", " b", "'s", "\n\n"]
    assert joined == pieces


def test_sentencepiece_bytes_prefix_and_runs_of_spaces(load):
    made = load(**SENTENCEPIECE)
    assert made.encode("ab") == [1, 12]
    assert made.encode("aé<x>b") == [1, 10, 5, 6, 4, 7, 9]
    assert made.decode([12, 5, 6]) == "abé"
    assert load(**SENTENCEPIECE, add_space_prefix=False, add_bos_token=False).encode("ab ab") == [11, 12]
    gemma = load("gemma3", **SENTENCEPIECE, add_space_prefix=False)
    assert gemma.encode("a  b") == [1, 8, 3, 9] and len(gemma) == len(PIECES) - 1


def test_chat_templates_are_read_by_their_names(load):
    template = {"tokenizer.chat_template": "{{ 1 }}"}
    assert load(extra=template).chat_template == "{{ 1 }}"
    named = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ 2 }}"}
    assert load(extra=template | named).chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5', which is not read; supported: gpt2, llama"),
        ({"pre": "martian"}, "tokenizer.ggml.pre is 'martian'.*pass tokenizer=DIR"),
        ({"merges": None}, "no metadata 'tokenizer.ggml.merges'"),
        ({"merges": ["a b", "a zz"]}, r"merges\[1\] is 'a zz'"),
        ({"token_type": [1, 1]}, "tokens has 13 entries and tokenizer.ggml.token_type 2"),
        ({"eos_token_id": 99}, "eos_token_id is 99, but there are 13 tokens"),
        (SENTENCEPIECE | {"scores": [1.0]}, "scores has 1 entries for 14 tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused_by_its_field(changes, named, load):
    with pytest.raises(CheckpointError, match=named):
        load(**changes)
