"""Compare tokenizers of tiktoken ranks (Kimi checkpoints) with tiktoken's algorithm; no checkpoint code may run."""

import base64
import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from jaxinfer.errors import CheckpointError
from jaxinfer.inputs import byte_bpe
from jaxinfer.inputs import tiktoken as tiktoken
from jaxinfer.inputs.chat import render_chat
from jaxinfer.inputs.tokenizer import id_bound, load_tokenizer
from jaxinfer.results.detokenizer import Detokenizer
from jaxinfer.results.text_stream import TextStream

MERGED = 900
BOS, END, TOOL = MERGED, MERGED + 2, MERGED + 5
TEXTS = (
    "The cat's hat, HTTPServer and iPhone15 don't AREN'T  equal 12345678 times.\r\n\r\n  x = f(y)\t# ok\n",
    "你好，世界 hello世界 日本語テスト 한국어 test中文Mixed",
    "naïve Café ÉCOLE straße Ǆungla ǅ",
    "🐱🐶👩‍👩‍👧 e\u0301 \u00a0\u3000\u2028 a\u200bb",
    "   leading",
    "trailing   ",
    " \n \n",
    "1 22 333 4444 ٣٤٥٦",
    "'S 'll 'LL it'ſ",
    "a",
    "",
    "\x00\x85\ufffd\U0010ffff",
    "aaaaaaaaaaaaaaa",
)
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        + CONTRACTION,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        + CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""The complete split pattern of Moonshot's class."""
SETTINGS = dict(
    tokenizer_class="TikTokenTokenizer",
    auto_map={"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    bos_token="[BOS]",
    eos_token={"__type": "AddedToken", "content": "[EOS]"},
    pad_token="[PAD]",
    unk_token="[UNK]",
    additional_special_tokens=["<|im_end|>"],
    model_max_length=1048576,
    added_tokens_decoder={
        str(at): {"content": text, "special": special, "normalized": False}
        for at, text, special in (
            (BOS, "[BOS]", True),
            (MERGED + 1, "[EOS]", True),
            (END, "<|im_end|>", True),
            (TOOL, "<|tool_call_begin|>", False),
            (MERGED + 254, "[UNK]", True),
            (MERGED + 255, "[PAD]", True),
        )
    },
    chat_template="{% for m in messages %}<|im_{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}",
)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Train ranks on the texts: the 256 bytes, then merged tokens."""
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
    own = (Path(__file__).read_text(), Path(tiktoken.__file__).read_text(), *TEXTS)
    backend.train_from_iterator([*own, *TEXTS, *TEXTS], trainer)
    letters = {letter: byte for byte, letter in enumerate(byte_bpe.byte_letters())}
    found = {bytes(letters[c] for c in text): rank for text, rank in backend.get_vocab().items()}
    assert len(found) == MERGED
    return found


def write(folder: Path, ranks: dict[bytes, int], **changes: object) -> Path:
    """Write a folder with the file, tokenizer_config.json, and checkpoint code that must not run."""
    folder.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | changes))
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('code of the checkpoint was run')")
    return folder


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory):
    return write(tmp_path_factory.mktemp("kimi"), ranks)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def plain(ranks: dict[bytes, int], text: str) -> list[int]:
    """Encode with tiktoken's algorithm: in each piece, repeatedly merge the first pair whose join has the lowest
    rank."""
    ids = []
    for piece in regex.findall(PATTERN, text, flags=regex.V1):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while True:
            joins = [
                (ranks[a + b], at) for at, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
            ]
            if not joins:
                break
            at = min(joins)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(params=["plain", "tiktoken"])
def encode(request, ranks) -> Callable[[str], list[int]]:
    """Return the reference encoder: `plain`, or the tiktoken library if installed."""
    if request.param == "plain":
        return lambda text: plain(ranks, text)
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}).encode


def noise(count: int) -> list[str]:
    """Return random texts of characters that the split pattern treats differently."""
    rng = random.Random(0)
    kinds = "aZé中日한 \n\r\t'sLlɐǅ1٣.,!?\u0301🐱\u3000\x00\x7f\xadⅣªʰ々〇"
    return ["".join(rng.choice(kinds) for _ in range(rng.randint(1, 40))) for _ in range(count)]


def test_ids_are_those_of_tiktoken(tokenizer, encode):
    for text in (*TEXTS, *noise(400)):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids == encode(text), text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_added_tokens(tokenizer, ranks):
    reserved = f"<|reserved_token_{MERGED + 3}|>"
    assert id_bound(tokenizer) == len(tokenizer) == MERGED + tiktoken.ADDED
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, MERGED + 1)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (MERGED + 255, MERGED + 254)
    ids = tokenizer.encode(f"[BOS]cat<|im_end|>{reserved}<|tool_call_begin|>", add_special_tokens=False)
    assert ids == [BOS, *plain(ranks, "cat"), END, MERGED + 3, TOOL]
    assert tokenizer.decode(ids) == f"[BOS]cat<|im_end|>{reserved}<|tool_call_begin|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cat<|tool_call_begin|>", "as its entry says"


@pytest.mark.parametrize("skip", [True, False])
def test_streamed_pieces_add_up(tokenizer, skip):
    for text in (*TEXTS, *noise(40)):
        ids = [BOS, *tokenizer.encode(text), END]
        stream = TextStream(Detokenizer(tokenizer, skip_special_tokens=skip))
        pieces = [stream.push([token]) for token in ids] + [stream.finish()]
        assert "".join(pieces) == (text if skip else f"[BOS]{text}<|im_end|>")
        assert "\ufffd" not in "".join(pieces).replace(text, "")


def test_the_chat_template_is_the_folder_s(ranks, tokenizer, tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    assert render_chat(tokenizer, chat) == "<|im_user|>hi<|im_end|>"
    (write(tmp_path, ranks) / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert render_chat(load_tokenizer(tmp_path), chat) == "hi!"


def test_no_code_is_run_and_that_is_said(folder, caplog):
    with caplog.at_level(logging.INFO, "jaxinfer"):
        load_tokenizer(folder)
    assert "not run" in caplog.text
    assert not any("tokenization_kimi" in name for name in sys.modules)


def test_a_tokenizer_json_beside_it_is_taken(ranks, tokenizer, tmp_path):
    write(tmp_path, ranks)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert not tiktoken.applies_to(tmp_path)
    assert load_tokenizer(tmp_path).encode("cat") == tokenizer.encode("cat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_class": "QWenTokenizer"}, "'QWenTokenizer'; known is 'TikTokenTokenizer'.*tokenizer.json"),
        ({"tokenizer_class": None}, "tokenizer_class .* is None"),
        ({"added_tokens_decoder": {"5": {"content": "x"}}}, f"names id 5; behind the {MERGED} tokens"),
        ({"added_tokens_decoder": {str(MERGED + 256): {"content": "x"}}}, f"names id {MERGED + 256}"),
        ({"added_tokens_decoder": {"x": {"content": "x"}}}, "has 'x'"),
        ({"added_tokens_decoder": {str(BOS): {}}}, "object with content"),
        ({"added_tokens_decoder": {str(BOS): {"content": "x"}, str(END): {"content": "x"}}}, "'x' twice"),
        ({"bos_token": "[NOT]"}, r"bos_token is '\[NOT\]'"),
        ({"eos_token": 3}, "eos_token is 3"),
    ],
)
def test_what_does_not_fit_is_named(ranks, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write(tmp_path, ranks, **changes))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"YQ==", "line 2 is b'YQ=='"),
        (b"YQ== x", "line 2"),
        (b"Y! 5", "line 2"),
        (b"YWI= 5 6", "line 2"),
        (b" 0", "line 2"),
        (b"AA== 1", "there twice"),
        (b"AQ== 2", "must be 0 to 1, each once"),
        (b"AQ== 1", "no token for the byte 2"),
    ],
)
def test_a_file_that_is_not_of_ranks(tmp_path, line, message):
    path = tmp_path / "tiktoken.model"
    path.write_bytes(b"AA== 0\n" + line + b"\n")
    with pytest.raises(CheckpointError, match=message):
        tiktoken.read_ranks(path)
