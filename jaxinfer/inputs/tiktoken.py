"""Read Moonshot's (Kimi's) tokenizers, a file of tiktoken ranks (`tiktoken.model`) whose class is checkpoint code.

The file has one line per token: its bytes in base64, and its rank, which is its id. The rest of that class is restated
here as data, so that no checkpoint code runs: how text is split before merging, and which ids are added tokens.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jaxinfer.checkpoint.plain_json import read_json
from jaxinfer.errors import CheckpointError
from jaxinfer.inputs import byte_bpe

FILE = "tiktoken.model"
CLASS = "TikTokenTokenizer"
"""Name of Moonshot's class in tokenizer_config.json (`tokenizer_class`)."""
ADDED = 256
"""Number of added-token ids after the ranks; ids without a text in tokenizer_config.json are
`<|reserved_token_ID|>`."""
MAX_BYTES = 64 * 2**20
"""Maximum size of the file; a file of 163,584 tokens has 2.8 MiB."""

_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
SPLIT = "|".join(
    [
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Regular expression that splits a text into pieces, which merges do not cross: runs of Han characters, words by their
case with an English ending, up to three digits, punctuation, white space."""

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = ("model_max_length", "chat_template")


def applies_to(directory: Path) -> bool:
    """Return whether the folder has tiktoken.model and no tokenizer.json."""
    return (directory / FILE).is_file() and not (directory / "tokenizer.json").is_file()


def backend(directory: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer of a folder with tiktoken.model.

    Returns:
        The tokenizer, and further keyword arguments of `PreTrainedTokenizerFast`.

    Raises:
        CheckpointError: the tokenizer class, and so its text splitting, is unknown, or a file is invalid.
    """
    path = directory / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    named = settings.get("tokenizer_class")
    if named != CLASS:
        raise CheckpointError(
            f"{directory / FILE} does not say how text is split before merging, and tokenizer_class in "
            f"tokenizer_config.json is {named!r}; known is {CLASS!r}. Add a tokenizer.json, which transformers writes "
            "if it may run the checkpoint's code."
        )
    ranks = read_ranks(directory / FILE)
    made = byte_bpe.from_ranks(ranks, SPLIT)
    made.add_tokens(_added(settings.get("added_tokens_decoder"), len(ranks), path))
    known = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    for name in _NAMED:
        text = settings.get(name)
        text = text.get("content") if isinstance(text, Mapping) else text
        if text is None:
            continue
        if not isinstance(text, str) or made.token_to_id(text) is None:
            raise CheckpointError(f"{path}: {name} is {text!r}, which is no token of {FILE} or added_tokens_decoder.")
        known[name] = text
    return made, {**known, "clean_up_tokenization_spaces": False}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a file of tiktoken ranks.

    Returns:
        Bytes of each token -> rank; the ranks are 0 to n - 1.

    Raises:
        CheckpointError: the file is invalid; the error names the file and the line, or the missing token.
    """
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a file of ranks may have {MAX_BYTES}.")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            text, rank = line.split()
            token, place = base64.b64decode(text, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}, line {number} is {line[:80]!r}; it must be a token in base64 and a rank."
            ) from error
        if not token or token in ranks:
            what = "there twice" if token else "empty"
            raise CheckpointError(f"{path}, line {number}: the token {token[:40]!r} is {what}.")
        ranks[token] = place
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks of its {len(ranks)} tokens must be 0 to {len(ranks) - 1}, each once.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{path} has no token for the byte {missing[0]}, so some texts cannot be encoded.")
    return ranks


def _added(listed: Any, first: int, path: Path) -> list[AddedToken]:
    """Return the added tokens, in the order of their ids; `listed` is already checked (`tokenizer_files.check`)."""
    texts: dict[int, Mapping[str, Any]] = {}
    for name, token in listed.items() if isinstance(listed, Mapping) else ():
        if not first <= int(name) < first + ADDED:
            raise CheckpointError(
                f"{path}: added_tokens_decoder names id {name}; behind the {first} tokens of {FILE} there are {first} "
                f"to {first + ADDED - 1}."
            )
        texts[int(name)] = token
    named = [texts.get(at, {"content": f"<|reserved_token_{at}|>"}) for at in range(first, first + ADDED)]
    contents = [token["content"] for token in named]
    twice = next((text for text in contents if contents.count(text) > 1), None)
    if twice is not None:
        raise CheckpointError(f"{path}: added_tokens_decoder has {twice!r} twice.")
    return [AddedToken(token["content"], special=bool(token.get("special", True)), normalized=False) for token in named]
