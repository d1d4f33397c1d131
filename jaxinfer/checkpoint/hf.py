"""Reads the JSON of a Hugging Face folder as plain data, and a model's configuration strictly.

Nothing here runs code that a checkpoint names. `ConfigReader` hands out typed fields and, at the end,
refuses what nobody read: an attribute that jaxinfer does not know may change the numbers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.layers.rope_config import ROPE_FIELDS, RopeConfig

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON file read. An index of a 100,000-tensor checkpoint is about 10 MiB."""

SIZE_CAPS = {
    "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**20, "moe_intermediate_size": 2**20,
    "num_hidden_layers": 1024, "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 2**14,
    "d_model": 2**17, "encoder_layers": 1024, "decoder_layers": 1024, "encoder_attention_heads": 4096,
    "decoder_attention_heads": 4096, "encoder_ffn_dim": 2**20, "decoder_ffn_dim": 2**20,
    "num_experts": 2**14, "num_local_experts": 2**14, "max_position_embeddings": 2**27,
}
"""Largest value accepted of each size in a config.json; far above any real model, far below an overflow."""

HARMLESS = frozenset("""
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout
    attention_probs_dropout_prob attn_implementation attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty
    do_sample dropout dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_range
    keys_to_ignore_at_inference label2id length_penalty max_length max_new_tokens min_length model_type
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_logits_to_keep
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
""".split())
"""Attributes of config.json that do not change a forward pass at inference: names, labels, dropout,
defaults of training and of `generate`."""

_TOKENIZER_FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
READ_QUANTISED = ("mxfp4",)
"""Quantisations of checkpoints that a family can read (gpt-oss, `checkpoint.interleaved`), by their `quant_method`."""
_QUANTISED = ("quantization_config", "compression_config", "quantization")
REQUIRED: Any = object()
"""Default of a field that must be there."""

Default = TypeVar("Default")


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object.

    Raises CheckpointError naming the file: unreadable, too large, no object, NaN, a name given twice.
    Infinity is accepted, for real configurations use it.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; a JSON file may have {MAX_JSON_BYTES}.")
        value = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=refuse_duplicates,
                           parse_constant=_no_nan)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except RecursionError:
        raise CheckpointError(f"{path} is not usable JSON: nested too deeply.") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is not usable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def read_config(directory: Path, hf_overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads config.json and lays `hf_overrides` on top (`lay_over`, whose errors it raises).

    Raises CheckpointError for a missing or unreadable file.
    """
    path = directory / "config.json"
    if not path.is_file():
        names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
        found = _shorten(", ".join(names)) or "nothing"
        raise CheckpointError(f"{directory} has no config.json; found {found}. Pass the folder that "
                              "save_pretrained or the Hub made.")
    return lay_over(read_json(path), hf_overrides)


def lay_over(config: Mapping[str, Any], hf_overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What config.json says with `hf_overrides` on top, name by name; None means "as if it were not there".

    So within the configuration of a part as well: `{"vision_config": {"name": None}}`.

    Raises ConfigError for a quantised checkpoint, TypeError for overrides that are no dict.
    """
    overrides = {} if hf_overrides is None else hf_overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(name, str) for name in overrides):
        raise TypeError(f"hf_overrides must be a dict of config.json names, found {_show(overrides)}.")
    config = dict(config)
    for name, value in overrides.items():
        part = name.endswith("_config") and isinstance(value, Mapping) and isinstance(config.get(name), dict)
        config[name] = {**config[name], **value} if part else value
    if config.get("auto_map"):
        logger.info("config.json names code of its own (auto_map): ignored, never executed.")
    for name in _QUANTISED:
        method = config[name].get("quant_method") if isinstance(config.get(name), Mapping) else None
        if config.get(name) and method not in READ_QUANTISED:  # which family reads it is the family's affair
            raise ConfigError(f"{name}={_show(config[name])}: quantised checkpoints are not supported "
                              f"(supported: {', '.join(READ_QUANTISED)}). Use the unquantised checkpoint of this model.")
    return config


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Reads generation_config.json; {} when there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def added_token(directory: Path, text: str) -> int | None:
    """The id of a token that was added to the folder's tokenizer, from its files as plain data; None: not found."""
    found = {name: read_json(directory / name) for name in _TOKENIZER_FILES if (directory / name).is_file()}
    ids = [found.get("added_tokens.json", {}).get(text)]
    listed = found.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for name, token in listed.items() if isinstance(listed, dict) else ():
        ids += [int(name)] if isinstance(token, dict) and token.get("content") == text and name.isdecimal() else []
    listed = found.get("tokenizer.json", {}).get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        ids += [token.get("id")] if isinstance(token, dict) and token.get("content") == text else []
    return next(filter(_is_int, ids), None)


def check_sizes(config: Mapping[str, Any], *fields: str, part: str = "") -> None:
    """Raises ConfigError unless each of `fields` that is present is a whole number from 1 to its cap.

    Meant to run before anything is allocated. Absent fields pass: whether a default exists is the family's
    affair. Fields are names of `SIZE_CAPS`. The configurations of parts (`vision_config`) are checked alike;
    `part` is what errors put before a name of theirs.
    """
    for name in fields:
        value, cap = config.get(name), SIZE_CAPS[name]
        if value is not None and (not _is_int(value) or not 1 <= value <= cap):
            raise ConfigError(f"{part}{name}={_show(value)} must be a whole number from 1 to {cap}.")
    for name, value in config.items() if not part else ():
        if name.endswith("_config") and isinstance(value, Mapping):
            check_sizes(value, *fields, part=f"{name}.")


class ConfigReader:
    """Typed, counted access to one config.json (or one object inside it).

    A field may be absent or null wherever a default is given. Every getter raises ConfigError naming the
    family, the field and the value; `finish` raises for what no getter asked for.
    """

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.config = config
        self.family = family
        self._consumed: set[str] = set()
        self._parts: dict[str, ConfigReader] = {}

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value as it stands, or `default`."""
        self._consumed.add(name)
        value = self.config.get(name)
        if value is None and default is REQUIRED:
            raise ConfigError(f"{self.family}: config.json has no {name}, and it has no default.")
        return default if value is None else value

    def get_int(self, name: str, default: Default = REQUIRED, *, least: int = 1) -> int | Default:
        """A whole number from `least` to the field's cap of `SIZE_CAPS` (2^31 - 1 for other fields)."""
        most = SIZE_CAPS.get(name, 2**31 - 1)
        expected = f"a whole number from {least} to {most}"
        return self._typed(name, default, expected, lambda value: _is_int(value) and least <= value <= most)

    def get_float(self, name: str, default: Default = REQUIRED) -> float | Default:
        """A finite number."""
        value = self._typed(name, default, "a finite number", _is_finite)
        return float(value) if _is_int(value) else value

    def get_bool(self, name: str, default: Default = REQUIRED) -> bool | Default:
        """true or false."""
        return self._typed(name, default, "true or false", lambda value: isinstance(value, bool))

    def get_str(self, name: str, default: Default = REQUIRED) -> str | Default:
        """A string."""
        return self._typed(name, default, "a string", lambda value: isinstance(value, str))

    def part(self, name: str, **changed: Any) -> ConfigReader:
        """Of the configuration of a part of the model, the object `name`, with values laid over it.

        `finish` of this one finishes it as well.
        """
        value = self._typed(name, REQUIRED, "an object", lambda value: isinstance(value, Mapping))
        self._parts[name] = ConfigReader({**value, **changed}, f"{self.family}, {name}")
        return self._parts[name]

    def defaults(self, **values: Any) -> None:
        """What config.json means where it does not have these fields at all."""
        self.config = {**values, **self.config}

    def rope(self, head_dim: int, **changed: Any) -> RopeConfig:
        """The rotary embedding that the fields of `ROPE_FIELDS` describe, with values laid over them."""
        self.skip(*ROPE_FIELDS)
        return RopeConfig.from_hf({**self.config, **changed}, head_dim)

    def skip(self, *names: str) -> None:
        """Marks fields that the family knows and does not need."""
        self._consumed.update(names)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raises ConfigError for each attribute that was not read and may change the numbers.

        Passed over: `HARMLESS`, `ignored` (what this family knows to be harmless), None, False and empty.
        """
        left = {name: reader._left() for name, reader in self._parts.items()}
        left = {**self._left(ignored), **{name: found for name, found in left.items() if found}}
        if left:
            found = ", ".join(f"{name}={_show(value)}" for name, value in left.items())
            nothing = {name: dict.fromkeys(value) if name in self._parts else None for name, value in left.items()}
            raise ConfigError(f"{self.family}: config.json has unknown attributes, which "
                              f"may change the numbers: {found}. If they are known to be harmless, pass "
                              f"hf_overrides={nothing}.")

    def _left(self, ignored: Iterable[str] = ()) -> dict[str, Any]:
        known = self._consumed.union(HARMLESS, ignored)
        return {name: value for name, value in self.config.items()
                if name not in known and value is not None and value is not False and not _is_empty(value)}

    def _typed(self, name: str, default: Any, expected: str, accepts: Callable[[Any], bool]) -> Any:
        value = self.get(name, default)
        if self.config.get(name) is not None and not accepts(value):
            raise ConfigError(f"{self.family}: {name}={_show(value)} must be {expected}.")
        return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if _is_int(value):
        return abs(value) < 2**1000
    return isinstance(value, float) and math.isfinite(value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (str, list, dict)) and not value


def _show(value: Any) -> str:
    """A value for a message, cut short. Python refuses to write integers of thousands of digits."""
    if _is_int(value) and abs(value) >= 2**100:
        return f"an integer of {value.bit_length()} bits"
    return _shorten(repr(value))


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that refuses a name given twice, of which json would silently keep the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {_shorten(twice)!r} is given twice")
    return result


def _no_nan(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is not a number a checkpoint may state")
    return float(text)
