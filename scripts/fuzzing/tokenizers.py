"""Fuzz tokenizer files: tokenizer.json, the small files beside it, and formats without it."""

import base64
import functools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fuzzing.mutations import broken, broken_bytes
from fuzzing.part import Part
from jaxinfer import demo
from jaxinfer.inputs import tiktoken
from jaxinfer.inputs.byte_bpe import byte_letters
from jaxinfer.inputs.tokenizer import encode, encode_batch, id_bound, load_tokenizer, longest_token
from jaxinfer.results.detokenizer import Detokenizer

TEXTS = ("Hello wörld, it isn't 12345!\n\n\tx", " 你好 🐱 <s>[INST]</s>", "")
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SETTINGS: dict[str, Any] = {
    "add_bos_token": True,
    "added_tokens_decoder": {"0": {"content": "<unk>", "lstrip": False, "normalized": False, "special": True}},
    "additional_special_tokens": ["<s>", "</s>"],
    "bos_token": "<s>",
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
    "clean_up_tokenization_spaces": False,
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False},
    "extra_special_tokens": {"image_token": "<image>"},
    "legacy": False,
    "model_max_length": 131072,
    "pad_token": None,
    "padding_side": "left",
    "tokenizer_class": "LlamaTokenizerFast",
    "unk_token": "<unk>",
}
SPECIAL_MAP = {"eos_token": {"content": "</s>", "lstrip": False, "normalized": False}, "pad_token": "<pad>"}


@functools.cache
def whole() -> tuple[dict[str, Any], ...]:
    """Return the contents of a small tokenizer.json for each type of model."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(demo.path())  # imports modules now, so that no input's time includes it
    text = [line for line in (Path(__file__).read_text() + "".join(TEXTS)).splitlines() if line] * 2
    special = ["<unk>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁x"]
    pairs = [("▁", "a")]
    fallback = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, pairs, byte_fallback=True))
    fallback.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fallback.decoder = decoders.Sequence(steps)
    fallback.add_special_tokens(special)
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer, unigram.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.train_from_iterator(
        text, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    piece = Tokenizer(models.WordPiece(unk_token="<unk>"))
    piece.normalizer, piece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    piece.decoder = decoders.WordPiece()
    piece.train_from_iterator(
        text, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    return (*(json.loads(made.to_str()) for made in (bpe, fallback, unigram, piece)), demo_tokenizer())


def demo_tokenizer() -> dict[str, Any]:
    """Return the tokenizer.json of the packaged checkpoint."""
    return json.loads((Path(demo.path()) / "tokenizer.json").read_text())


def broken_part(rng: random.Random, said: dict[str, Any]) -> Any:
    """Corrupt one top-level part of tokenizer.json; uniform mutations would nearly always hit the vocabulary."""
    if rng.random() < 0.1:
        return broken(rng, said)
    name = rng.choice(list(said))
    made = broken(rng, {name: said[name]})
    if not isinstance(made, dict):
        return made
    return {**{key: value for key, value in said.items() if key != name}, **made}


def use(folder: Path) -> Callable[[], object]:
    """Return the call that loads the tokenizer, and encodes and decodes with it."""

    def read() -> None:
        logging.getLogger("transformers").setLevel(logging.CRITICAL)
        tokenizer = load_tokenizer(folder)
        longest_token(tokenizer)
        ids = encode(tokenizer, TEXTS[0], special=True)
        encode_batch(tokenizer, list(TEXTS), special=False)
        known = id_bound(tokenizer)
        tokens = [*ids, *range(0, known, max(1, known // 40))]
        for skip in (True, False):
            detokenizer = Detokenizer(tokenizer, prompt=tokens[:2], skip_special_tokens=skip)
            detokenizer.push(tokens)
            detokenizer.peek(tokens[-1])
            detokenizer.finish()

    return read


def make_tokenizer(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Corrupt one of the files of a tokenizer."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    how = rng.random()
    if how < 0.15:
        return make_other(rng, folder)
    said = rng.choice(whole())
    small = {
        "tokenizer_config.json": SETTINGS,
        "special_tokens_map.json": SPECIAL_MAP,
        "added_tokens.json": {"<x>": 500},
    }
    if how < 0.55:
        write(rng, folder / "tokenizer.json", said, broken_part)
        return use(folder)
    (folder / "tokenizer.json").write_text(json.dumps(said))
    name = rng.choice(list(small))
    if rng.random() < 0.5:
        # Without added_tokens_decoder transformers also reads the files of older tokenizers.
        small["tokenizer_config.json"] = {k: v for k, v in SETTINGS.items() if k != "added_tokens_decoder"}
    for other, content in small.items():
        if other == name:
            write(rng, folder / other, content, broken)
        elif rng.random() < 0.5:
            (folder / other).write_text(json.dumps(content))
    return use(folder)


def make_other(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Corrupt a tokenizer in a format without tokenizer.json."""
    name = rng.choice(("vocab.json", "merges.txt", "tekken.json", "tiktoken.model", "tokenizer.model"))
    bpe = whole()[0]["model"]
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokens = [
        bytes(letters[c] for c in text)
        for text in sorted(bpe["vocab"], key=bpe["vocab"].get)
        if len(text) > 1 and set(text) <= set(letters)
    ]
    tokens = [*(bytes([byte]) for byte in range(256)), *tokens]
    coded = [base64.b64encode(token) for token in tokens]
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"]).encode()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    if name in ("vocab.json", "merges.txt"):
        (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
        (folder / "merges.txt").write_bytes(b"#version: 0.2\n" + merges)
        if name == "vocab.json":
            write(rng, folder / name, bpe["vocab"], broken)
        else:
            (folder / name).write_bytes(broken_bytes(rng, (folder / name).read_bytes()))
    elif name == "tekken.json":
        config = {
            "pattern": r"\p{L}+|\p{N}|[^\p{L}\p{N}]+",
            "default_vocab_size": None,
            "default_num_special_tokens": 5,
        }
        listed = [{"rank": at, "token_str": text} for at, text in enumerate(("<unk>", "<s>", "</s>"))]
        vocab = [{"rank": at, "token_bytes": token.decode()} for at, token in enumerate(coded)]
        write(rng, folder / name, {"config": config, "special_tokens": listed, "vocab": vocab}, broken_part)
    elif name == "tiktoken.model":
        settings = {
            "tokenizer_class": tiktoken.CLASS,
            "bos_token": "[BOS]",
            "chat_template": "x",
            "added_tokens_decoder": {str(len(coded)): {"content": "[BOS]", "special": True}},
        }
        lines = b"\n".join(token + b" %d" % at for at, token in enumerate(coded))
        cut = rng.random() < 0.5
        (folder / name).write_bytes(broken_bytes(rng, lines) if cut else lines)
        write(rng, folder / "tokenizer_config.json", settings, (lambda _, said: said) if cut else broken)
    else:
        (folder / name).write_bytes(broken_bytes(rng, b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 9))
    return use(folder)


def write(rng: random.Random, path: Path, said: Any, breaks: Callable[[random.Random, Any], Any]) -> None:
    """Write a JSON file corrupted by `breaks` or, for some inputs, bytewise."""
    if rng.random() < 0.15:
        path.write_bytes(broken_bytes(rng, json.dumps(said).encode()))
    else:
        path.write_text(json.dumps(breaks(rng, said)))


PARTS = (Part("tokenizer", make_tokenizer),)
