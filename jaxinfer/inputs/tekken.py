"""Read Mistral's tokenizer format, `tekken.json`, without the package mistral-common.

The tokenizer class of mistral-common encodes control tokens in a text as plain text, so that rendered chats cannot be
encoded. Here control tokens are added tokens, as in the tokenizer.json of Mistral checkpoints that have both files.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from jaxinfer.checkpoint.plain_json import read_json, show
from jaxinfer.errors import CheckpointError
from jaxinfer.inputs import byte_bpe

FILE = "tekken.json"
MAX_TOKENS = 2**22
"""Maximum number of tokens in a file; Mistral's files have 2^17."""
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
"""Control tokens with a role in transformers; the BOS token is prepended to each text."""
FIRST = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
"""Control tokens of files without a `special_tokens` list (up to version 7), in the order of their ids."""


def applies_to(directory: Path) -> bool:
    """Return whether the folder has tekken.json and no tokenizer.json."""
    return (directory / FILE).is_file() and not (directory / "tokenizer.json").is_file()


def backend(directory: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer of a folder with tekken.json.

    Returns:
        The tokenizer, and further keyword arguments of `PreTrainedTokenizerFast`.

    Raises:
        CheckpointError: a field is invalid; the error names the field and its value.
    """
    path = directory / FILE
    contents = read_json(path)
    config = contents.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("pattern"), str):
        raise CheckpointError(f"{path}: config must be an object with the string pattern, found {show(config)}.")
    control = _control(contents.get("special_tokens"), config, path)
    entries = contents.get("vocab")
    if not isinstance(entries, list):
        raise CheckpointError(f"{path}: vocab must be a list of tokens, found {show(entries)}.")
    size = _count(config, "default_vocab_size", len(entries) + len(control), path)
    if not len(control) + 256 <= size <= len(entries) + len(control):
        raise CheckpointError(
            f"{path}: config.default_vocab_size is {size}; with {len(control)} control tokens and {len(entries)} "
            f"others it must be {len(control) + 256} to {len(control) + len(entries)}."
        )
    ranks = _ranks(entries[: size - len(control)], path)
    made = byte_bpe.from_ranks(ranks, config["pattern"], {text: at for at, text in enumerate(control)})
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    known = {name: text for name, text in NAMED.items() if text in control}
    if "bos_token" in known:
        first = known["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, control.index(first))]
        )
    return made, {**known, "clean_up_tokenization_spaces": False}


def _control(listed: Any, config: dict[str, Any], path: Path) -> list[str]:
    """Return the texts of the control tokens, in the order of their ids."""
    texts = list(FIRST)
    if listed is not None:
        if not isinstance(listed, list) or not all(
            isinstance(one, dict) and isinstance(one.get("token_str"), str) and one["token_str"] for one in listed
        ):
            raise CheckpointError(
                f"{path}: special_tokens must be a list of objects with token_str, found {show(listed)}."
            )
        ranks = [one.get("rank") for one in listed]
        if ranks != list(range(len(listed))):
            raise CheckpointError(
                f"{path}: the ranks of special_tokens must be 0 to {len(listed) - 1}, found {show(ranks)}."
            )
        texts = [one["token_str"] for one in listed]
    count = _count(config, "default_num_special_tokens", len(texts), path)
    if count < len(texts):
        raise CheckpointError(
            f"{path}: config.default_num_special_tokens is {count}, but there are {len(texts)} control tokens."
        )
    texts += [f"<SPECIAL_{at}>" for at in range(len(texts), count)]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise CheckpointError(f"{path}: special_tokens has {show(twice)} twice.")
    return texts


def _count(config: dict[str, Any], name: str, default: int, path: Path) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_TOKENS:
        raise CheckpointError(
            f"{path}: config.{name} is {show(value)}; it must be a whole number from 0 to {MAX_TOKENS}."
        )
    return value


def _ranks(entries: list[Any], path: Path) -> dict[bytes, int]:
    """Return bytes of each token -> rank, which is the token's index in the list."""
    ranks: dict[bytes, int] = {}
    for at, entry in enumerate(entries):
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}: vocab[{at}] is {show(entry)}; it must have token_bytes in base64."
            ) from error
        if not token or token in ranks or entry.get("rank") != at:
            raise CheckpointError(f"{path}: vocab[{at}] is {show(entry)}; it must have rank {at} and bytes of its own.")
        ranks[token] = at
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise CheckpointError(f"{path}: vocab has no token for the byte {missing}, so some texts cannot be encoded.")
    return ranks
