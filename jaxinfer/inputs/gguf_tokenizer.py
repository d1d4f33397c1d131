"""Build the tokenizer of a GGUF file from its metadata: byte-level BPE ("gpt2"), or SentencePiece BPE ("llama").

The tokenizers equal those that Hugging Face publishes for the same models. A GGUF file has only the name of the pattern
that splits a text before merges; the patterns are those of `llama-vocab.cpp` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxinfer.checkpoint.gguf_file import GgufFile
from jaxinfer.checkpoint.gguf_folder import LINK as FILE
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.tokenizer_errors import REMEDY
from jaxinfer.errors import CheckpointError
from jaxinfer.inputs.byte_bpe import byte_letters

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
"""Values of `tokenizer.ggml.token_type`."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Character that SentencePiece writes for a space."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PATTERNS: Mapping[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "mpt", "olmo"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), r"\p{N}"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
    "tekken": TEKKEN,
}
"""Pattern that splits a text into pieces, by `tokenizer.ggml.pre`; None for GPT-2's pattern. If the pattern isolates
only digits, GPT-2's pattern splits the rest."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
"""Values of `tokenizer.ggml.pre` of vocabularies made of ranks: a piece that is a token is not merged from parts, and
texts begin with BOS unless the file says otherwise."""


def applies_to(directory: Path) -> bool:
    """Return whether the folder is that of a GGUF file, without a tokenizer.json."""
    return (directory / FILE).is_symlink() and not (directory / "tokenizer.json").is_file()


def backend(directory: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer of a GGUF file's folder.

    Returns:
        The tokenizer, and further keyword arguments of `PreTrainedTokenizerFast`.

    Raises:
        CheckpointError: the kind of tokenizer is not supported, or its metadata is incomplete or contradictory.
    """
    file = GgufFile((directory / FILE).resolve())
    kind, tokens = file.require("tokenizer.ggml.model", str), file.require("tokenizer.ggml.tokens", list)
    if kind not in _BUILDERS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}, which is not read; supported: {', '.join(_BUILDERS)}. To "
            f"serve the model, {REMEDY}."
        )
    types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if not tokens or len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} entries and tokenizer.ggml.token_type {len(types)}; "
            f"it must be one text and one type a token. Fetch the file again, or {REMEDY}."
        )
    made, add_bos = _BUILDERS[kind](file, tokens, types)
    for added, special in ((CONTROL, True), (USER_DEFINED, False)):
        texts = [text for text, own in zip(tokens, types, strict=True) if own == added and text]
        # Adding a run of spaces that the vocabulary spells differently would give it a new id.
        known = [text for text in texts if made.token_to_id(text) is not None]
        made.add_tokens([AddedToken(text, special=special, normalized=False) for text in known])
    known = {
        f"{name}_token": _token(file, f"{key}_token_id", tokens)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    known = {name: text for name, text in known.items() if text is not None}
    _add_ends(made, file, known, add_bos)
    return made, {**known, **_templates(file), "clean_up_tokenization_spaces": False}


def _byte_level(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """Build a byte-level BPE tokenizer; also return whether texts begin with BOS by default."""
    kind = file.get("tokenizer.ggml.pre", str, "default")
    if kind not in PATTERNS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre is {kind!r}, whose way of splitting a text is not supported; supported: "
            f"{', '.join(PATTERNS)}. To serve the model, {REMEDY}."
        )
    letters = byte_letters()
    alphabet = set(letters)
    vocab: dict[str, int] = {}
    for number, (text, own) in enumerate(zip(tokens, types, strict=True)):
        if own not in (CONTROL, USER_DEFINED) and not set(text) <= alphabet:  # text in UTF-8 instead of byte letters
            text = "".join(letters[byte] for byte in text.encode())
        if own != UNUSED:
            vocab.setdefault(text, number)
    merges = [tuple(merge.split(" ")) for merge in file.require("tokenizer.ggml.merges", list)]
    for number, pair in enumerate(merges):
        if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}:
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.merges[{number}] is {show(' '.join(pair))}, which is not two tokens that "
                f"join to a third. Fetch the file again, or {REMEDY}."
            )
    made = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=kind in WHOLE_WORDS))
    pattern = PATTERNS[kind]
    by_gpt2 = pattern in (None, r"\p{N}")
    isolate = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    split = [*isolate, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_gpt2)]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    if pattern is QWEN2:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made, kind in WHOLE_WORDS


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """Build a BPE tokenizer that encodes as SentencePiece; also return whether texts begin with BOS by default."""
    vocab: dict[str, int] = {}
    for number, (text, own) in enumerate(zip(tokens, types, strict=True)):
        if own != UNUSED:
            vocab.setdefault(SPACE * len(text) if text and not text.strip(" ") else text, number)
    scores = file.require("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens. Fetch the file "
            f"again, or {REMEDY}."
        )
    if file.require("general.architecture", str).startswith("gemma"):
        scores = [-float(number) for number in range(len(tokens))]  # its scores do not follow the order of its merges
    unknown = _token(file, "unknown_token_id", tokens)
    if unknown is None and UNKNOWN in types:
        unknown = tokens[types.index(UNKNOWN)]
    merges = _merges(vocab, scores)
    made = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    before = [normalizers.Prepend(SPACE)] if prefix else []
    made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after],
    )
    return made, True


_BUILDERS: Mapping[str, Callable[[GgufFile, list[str], list[int]], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
"""Builder by `tokenizer.ggml.model`."""


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return all splits of each token into two known tokens, best score of the joined token first.

    Splits of one token, and tokens of one score, are in the order of transformers' conversions.
    """
    found: list[tuple[float, int, int, str]] = []
    for text, number in vocab.items():
        ways = [at for at in range(1, len(text)) if text[:at] in vocab and text[at:] in vocab]
        ways.sort(key=lambda at: (vocab[text[:at]], vocab[text[at:]]))
        found += [(scores[number], at, len(text) - at, text) for at in ways]
    found.sort(key=lambda way: way[:3], reverse=True)
    return [(text[:at], text[at:]) for _, at, _, text in found]


def _token(file: GgufFile, key: str, tokens: list[str]) -> str | None:
    """Return the text of the special token whose id is in metadata `key`; None if the file has none."""
    number = file.get(f"tokenizer.ggml.{key}", int)
    if number is not None and number >= len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.{key} is {number}, but there are {len(tokens)} tokens. Fetch the file again, "
            f"or {REMEDY}."
        )
    return None if number is None else tokens[number]


def _add_ends(made: Tokenizer, file: GgufFile, known: Mapping[str, str], add_bos: bool) -> None:
    """Make the tokenizer add BOS and EOS to texts if the file sets this."""
    bos = known.get("bos_token") if file.get("tokenizer.ggml.add_bos_token", bool, add_bos) else None
    eos = known.get("eos_token") if file.get("tokenizer.ggml.add_eos_token", bool, False) else None
    if bos is None and eos is None:
        return

    def around(name: str) -> list[str]:
        return [*([] if bos is None else [bos]), name, *([] if eos is None else [eos])]

    made.post_processor = processors.TemplateProcessing(
        single=around("$A"),
        pair=[*around("$A:0"), *around("$B:1")],
        special_tokens=[(text, made.token_to_id(text)) for text in (bos, eos) if text is not None],
    )


def _templates(file: GgufFile) -> dict[str, Any]:
    """Return the chat templates: one, or several by their names."""
    key = "tokenizer.chat_template"
    default, names = file.get(key, str), file.get("tokenizer.chat_templates", list, [])
    named = {name: file.require(f"{key}.{name}", str) for name in names if name != "default"}
    if default is not None and not named:
        return {"chat_template": default}
    return {"chat_template": {**({} if default is None else {"default": default}), **named}} if named else {}
