"""Compare tekken.json, read without mistral-common, with tiktoken and, if installed, mistral-common."""

import base64
import json
import random
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from jaxinfer.errors import ChatTemplateError, CheckpointError
from jaxinfer.inputs import byte_bpe, tekken
from jaxinfer.inputs.chat import render_chat
from jaxinfer.inputs.tokenizer import encode, id_bound, load_tokenizer
from jaxinfer.results.detokenizer import Detokenizer

PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CONTROL = tekken.FIRST
MERGED, SPECIAL = 400, 24
TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
TEXTS = ("Hello wörld, it isn't 12345!\n\n\tx = f(y)", " 你好 🐱🐶", "\x00\u0301a\ufffd", "aaaaaaaa   ")


@pytest.fixture(scope="module")
def said() -> dict:
    """Return the content of a small tekken.json."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text(), *TEXTS], trainer)
    byte_of = {letter: byte for byte, letter in enumerate(byte_bpe.byte_letters())}
    learned = [text for text, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1]) if len(text) > 1]
    tokens = [*(bytes([byte]) for byte in range(256)), *(bytes(byte_of[letter] for letter in text) for text in learned)]
    return {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": SPECIAL + MERGED - 8,
            "default_num_special_tokens": SPECIAL,
            "version": "v7",
        },
        "vocab": [
            {"rank": at, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for at, token in enumerate(tokens)
        ],
        "special_tokens": [{"rank": at, "token_str": text, "is_control": True} for at, text in enumerate(CONTROL)],
    }


def write(folder: Path, said: dict, **changes: object) -> Path:
    """Write a Mistral checkpoint folder with the file."""
    (folder / "tekken.json").write_text(json.dumps({**said, **changes}))
    (folder / "config.json").write_text('{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def texts() -> list[str]:
    rng = random.Random(0)
    kinds = "aZé中日한 \n\r\t'sLlɐ1٣.,!?\u0301🐱\u3000\x00/"
    return [*TEXTS, *("".join(rng.choice(kinds) for _ in range(rng.randint(1, 40))) for _ in range(200))]


@pytest.fixture(params=["tiktoken", "mistral_common"])
def reference(request, said, tmp_path):
    """Return the reference's encoder from a text to ids, BOS included."""
    if request.param == "tiktoken":
        tiktoken = pytest.importorskip("tiktoken")
        ranks = {base64.b64decode(one["token_bytes"]): one["rank"] for one in said["vocab"][: MERGED - 8]}
        made = tiktoken.Encoding("tekken", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        return lambda text: [1, *(SPECIAL + token for token in made.encode(text))]
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    made = tekken.Tekkenizer.from_file(write(tmp_path, said) / "tekken.json")
    return lambda text: made.encode(text, bos=True, eos=False)


def test_ids_and_text_are_those_of_the_reference(said, reference, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, said))
    for text in texts():
        ids = encode(tokenizer, text, special=True)
        assert ids == reference(text), text
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.push(ids) + detokenizer.finish() == text


def test_control_tokens_and_chat(said, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, said))
    assert id_bound(tokenizer) == SPECIAL + MERGED - 8
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 11)
    prompt = render_chat(tokenizer, [{"role": "user", "content": "a"}])
    assert prompt == "<s>[INST]a[/INST]"
    ids = encode(tokenizer, prompt, special=False)
    assert ids == [1, 3, SPECIAL + ord("a"), 4]
    assert tokenizer.convert_ids_to_tokens(SPECIAL - 1) == "<SPECIAL_23>"
    assert Detokenizer(tokenizer).push(ids) == "a"


def test_a_file_that_lists_no_control_tokens_has_the_first_ones(said, tmp_path):
    tokenizer = load_tokenizer(
        write(
            tmp_path,
            said,
            special_tokens=None,
            config={**said["config"], "default_num_special_tokens": 20, "default_vocab_size": None},
        )
    )
    assert tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "<pad>", "[TOOL_CONTENT]"]) == [9, 11, 19]
    assert id_bound(tokenizer) == 20 + MERGED


def test_a_tokenizer_json_beside_it_is_taken(said, byte_bpe, tmp_path):
    write(tmp_path, said)
    byte_bpe.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == byte_bpe.get_vocab()


def test_a_tokenizer_of_mistral_common_serves_text_and_refuses_chat(said, tmp_path):
    pytest.importorskip("mistral_common")
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(write(tmp_path, said))
    assert type(made).__name__ == "MistralCommonBackend"
    assert load_tokenizer(made) is made
    for text in texts():
        ids = encode(made, text, special=True)
        for spaces in (True, False):
            detokenizer = Detokenizer(made, spaces_between_special_tokens=spaces)
            assert "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish() == text
    with pytest.raises(ChatTemplateError, match="pass the folder of its tekken.json"):
        render_chat(made, [{"role": "user", "content": "a"}], chat_template=TEMPLATE)


def test_mistral_common_is_not_imported(said, tmp_path):
    before = "mistral_common" in sys.modules
    load_tokenizer(write(tmp_path, said))
    assert ("mistral_common" in sys.modules) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "config must be an object with the string pattern"),
        ({"config": {"pattern": 3}}, "config must be"),
        ({"config": {"pattern": "("}, "special_tokens": None}, "could not be read"),
        (
            {"config": {"pattern": "x", "default_vocab_size": "5"}},
            "config.default_vocab_size is '5'; it must be a whole number",
        ),
        ({"config": {"pattern": "x", "default_vocab_size": 5}}, "default_vocab_size is 5; with 20 control tokens"),
        ({"config": {"pattern": "x", "default_num_special_tokens": 2}}, "there are 20 control tokens"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "ranks of special_tokens must be 0 to 0"),
        ({"special_tokens": [{"rank": 0}]}, "special_tokens must be a list of objects"),
        ({"special_tokens": [{"rank": 0, "token_str": "a"}, {"rank": 1, "token_str": "a"}]}, "'a' twice"),
        ({"vocab": 3}, "vocab must be a list"),
        ({"vocab": [3] * 400}, r"vocab\[0\] is 3"),
        ({"vocab": [{"rank": 0, "token_bytes": "YQ=="}] * 400}, r"vocab\[1\] is .*rank 1"),
    ],
)
def test_what_does_not_fit_is_named(said, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write(tmp_path, said, **changes))
