"""Check the vocabulary files that transformers converts if a folder has no tokenizer.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.tokenizer_errors import REMEDY
from jaxinfer.errors import CheckpointError
from jaxinfer.inputs.tokenizer_files import TOKENIZER, describe_content, read_object, read_text

SENTENCEPIECE = "tokenizer.model"
_VOCABULARY = re.compile(r"vocab|merges|bpe|piece|\.(model|spm|tiktoken)$")
"""Pattern of the names of vocabulary files."""

_PROBES = ("a  two  spaces, it's 12345!\n\tx", "a 你好, мир — नमस्ते 🐱 é ﬁ Ⅳ \x00")
"""Texts that reveal wrong conversions: runs of spaces, digits, several scripts, normalised characters, bytes."""


def check_vocabulary(directory: Path) -> None:
    """Check the vocabulary files from which transformers builds a tokenizer without tokenizer.json.

    For a folder without any of them, transformers silently builds a tokenizer of special tokens only.

    Raises:
        CheckpointError: files are missing or broken; the error names them and the broken entry.
    """
    names = {path.name for path in directory.iterdir()}
    if TOKENIZER in names:
        return
    if SENTENCEPIECE in names:
        _check_model_file(directory)
    elif not any(_VOCABULARY.search(name) for name in names):
        raise CheckpointError(
            f"{directory} has no tokenizer: none of {TOKENIZER}, {SENTENCEPIECE}, vocab.json with merges.txt, "
            f"tekken.json or tiktoken.model is there. Fetch it, or {REMEDY}."
        )
    elif "vocab.json" in names and not any(name.endswith((".model", ".spm")) for name in names):
        for text, token in read_object(directory / "vocab.json").items():
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise CheckpointError(
                    f"{directory / 'vocab.json'}: {show(text)} has the id {show(token)}; it must be a whole number "
                    "from 0."
                )
        if "merges.txt" not in names:
            raise CheckpointError(f"{directory} has vocab.json without merges.txt: fetch it, or a tokenizer.json.")
        _check_merges(directory / "merges.txt")


def agrees_with_sentencepiece(tokenizer: Any, directory: Path) -> bool:
    """Return whether a tokenizer converted from tokenizer.model encodes to the same ids as SentencePiece.

    The first token is not compared: adding a space before a text is a setting of the tokenizer.
    """
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(directory / SENTENCEPIECE))
    return all(tokenizer.encode(text, add_special_tokens=False)[1:] == reference.encode(text)[1:] for text in _PROBES)


def _check_model_file(directory: Path) -> None:
    """Check that tokenizer.model is a SentencePiece model and that sentencepiece is installed to convert it."""
    path = directory / SENTENCEPIECE
    kind = model_kind(path)
    if kind == "tiktoken":
        raise CheckpointError(
            f"{path} holds tiktoken's ranks, which do not say how text is split and which tokens are special; "
            "give the tokenizer.json of this model."
        )
    if kind is None:
        raise CheckpointError(
            f"{path} is neither a SentencePiece model nor a file of tiktoken's ranks: {describe_content(path)}. Fetch "
            "it again."
        )
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"{directory} has its tokenizer as a SentencePiece model alone ({SENTENCEPIECE}), which transformers "
            "converts with the package sentencepiece: pip install sentencepiece; or give the tokenizer.json of this "
            "model."
        ) from None


def model_kind(path: Path) -> str | None:
    """Return the format of a file by its content: "sentencepiece", "tiktoken" (a file of ranks), or None for others."""
    with path.open("rb") as file:
        head = file.read(4096)
    first = head.split(b"\n", 1)[0].split()
    if len(first) == 2 and first[1].isdigit():
        return "tiktoken"
    # A SentencePiece model is a protobuf message whose field 1 is a message whose field 1 is a string.
    at = 1
    while at < min(len(head), 5) and head[at] & 0x80:
        at += 1
    return "sentencepiece" if head[:1] == b"\n" and head[at + 1 : at + 2] == b"\n" else None


def _check_merges(path: Path) -> None:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip() and not line.startswith("#") and len(line.split()) != 2:
            raise CheckpointError(f"{path}, line {number} is {show(line[:80])}; it must be two parts of a token.")
