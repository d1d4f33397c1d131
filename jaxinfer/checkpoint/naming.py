"""Tensors of a checkpoint under the names that a weight table has for them.

Tools save the same model under other prefixes, and add tensors that no forward pass reads. `named` maps the first,
leaves out the second, and refuses checkpoints whose tensors are another kind of file: adapters and quantised weights.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxinfer.checkpoint.rules import Rule, some
from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.errors import CheckpointError

log = logging.getLogger(__name__)

_MODULES = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
WRAPPERS = re.compile(rf"^(?:(?:{_MODULES}|module|pretrained_model)\.)+|(?<=\.)(?:{_MODULES})\.")
"""Parts of names that torch.compile, FSDP, activation checkpointing, DataParallel, Lightning and TRL's models with a
value head put in when a wrapped model is saved."""

PREFIXES: Sequence[tuple[str, str]] = (
    ("", "model."),
    ("model.", ""),  # a base model saved alone, and the reverse
    ("model.language_model.model.", "model.language_model."),
    ("language_model.model.model.", "model.language_model."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.lm_head.", "lm_head."),
    ("model.language_model.lm_head.", "lm_head."),
)
"""Prefixes of names in checkpoints, each with what may stand in its place in a weight table. The first that makes a
name of the table is taken. Among them are text models that were saved from a multimodal wrapper."""

IGNORED: Sequence[str] = (
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r"(.*\.)?(attn|attention|self_attn)\.(bias|masked_bias)",
    r"(.*\.)?position_ids",
    r"(.*\.)?(encoder|decoder)\.version",
    r"(model\.)?(mtp|mtp_layers|mtp_block)\..*",
    r"(.*\.)?self_attn\.(attn\.|[kv]_proj\.)?(q|k|v|kv|prob)_scale",
    r"(score|v_head|value_head|reward_head|classifier|classification_head|qa_outputs)\..*",
)
"""Names of tensors that a forward pass of the served models does not read: buffers that are computed here, layers for
multi-token prediction, scales of caches in 8 bits, heads of reward models and of classification."""

_PREDICTING = re.compile(r"(.*\blayers\.\d+\.)(eh_proj|enorm|hnorm|shared_head)\..*")
"""Tensors that only a layer for multi-token prediction has; all with this prefix belong to it (DeepSeek-V3)."""

_ADAPTER = re.compile(
    r"base_model\.model\..*|(.*\.)?(base_layer|modules_to_save|original_module|token_adapter|lora_[AB]|"
    r"lora_embedding_[AB]|lora_magnitude_vector|vera_lambda_[bd]|hada_w\w+|lokr_w\w+|oft_[rR]|ia3_l|prompt_encoder)\b.*"
)
"""Names that PEFT gives to adapters, and to the layers of a model that is not merged with one."""
_QUANTISED = re.compile(
    r".*[._](qweight|qzeros|g_idx|weight_scale(_inv|_2)?|input_scale|output_scale|weight_packed|weight_zero_point|"
    r"weight_shape|absmax|quant_map|quant_state\..*|SCB|scales|biases|zeros|W_q|q_weight|q_scale|q_groups|q_invperm|"
    r"trellis|codes|codebooks|centroids|weight_scales|_data|_scale)"
)
"""Names of GPTQ, AWQ, compressed-tensors, ModelOpt, FP8, bitsandbytes, MLX, HQQ, ExLlama, AQLM, VPTQ, EETQ and
Quanto."""
_FLOATS = ("F16", "BF16", "F32", "F64")


class Renamed:
    """Present a source's tensors under other names."""

    def __init__(self, source: Source, names: Mapping[str, str]):
        """
        Args:
            source: where the tensors are read from.
            names: the name here -> the name in `source`; tensors without an entry are left out.
        """
        self._source, self._names = source, dict(names)

    def names(self) -> list[str]:
        """Return the names here, in the order of the mapping."""
        return list(self._names)

    def info(self, name: str) -> Info:
        """Return what is known of a tensor before it is read."""
        return self._source.info(self._names[name])

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a tensor, or a part of it."""
        return self._source.read(self._names[name], slices)

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._source.release()


def named(source: Source, table: Sequence[Rule], where: object, ignored: Iterable[str] = ()) -> Renamed:
    """Map a checkpoint's tensors to the names of a weight table, and leave out those that the model does not read.

    Names that are neither in the table nor known to be harmless stay; `rules.plan` refuses them.

    Args:
        source: the checkpoint.
        table: the model's weight table.
        where: the folder, for messages.
        ignored: patterns of further names that this model does not read, beside `IGNORED`.

    Raises:
        CheckpointError: the tensors are those of an adapter, or quantised in a format that is not read.
    """
    known, names = set(_known(table)), source.names()
    taken, found, left = known.intersection(names), {}, []
    for name in names:
        own = name if name in known else _canonical(name, known)
        if own in known and own not in found and (own == name or own not in taken):
            found[own] = name
        else:
            left.append(name)
    _check_format(where, source, found, left)
    patterns = re.compile("|".join(f"(?:{pattern})" for pattern in (*IGNORED, *ignored)))
    predicting = tuple({match[1] for match in map(_PREDICTING.fullmatch, left) if match})
    unread = [name for name in left if patterns.fullmatch(WRAPPERS.sub("", name)) or name.startswith(predicting)]
    if unread:
        log.info("%s: %d tensor(s) that the model does not read are left out: %s", where, len(unread), some(unread))
    return Renamed(source, found | {name: name for name in left if name not in set(unread)})


def _known(table: Iterable[Rule]) -> Iterator[str]:
    """Yield every name that a table has for a tensor."""
    for rule in table:
        yield rule.source
        yield from rule.also
        yield from _known(rule.instead)


def _canonical(name: str, known: set[str]) -> str:
    """Return the table's name of a tensor; the name without wrappers where it has none."""
    bare = WRAPPERS.sub("", name)
    candidates = (here + bare.removeprefix(there) for there, here in PREFIXES if bare.startswith(there))
    return bare if bare in known else next((one for one in candidates if one in known), bare)


def _check_format(where: object, source: Source, found: Mapping[str, str], left: Sequence[str]) -> None:
    """Refuse tensors of another kind of file before names and shapes are compared."""
    adapter = [name for name in left if _ADAPTER.fullmatch(name)]
    if adapter:
        raise CheckpointError(
            f"{where} has {len(adapter)} tensor(s) of a PEFT adapter: {some(adapter)}. Adapters are not read; merge it "
            "into its base model and save that: PeftModel.merge_and_unload().save_pretrained(path)."
        )
    scales = [name for name in left if _QUANTISED.fullmatch(name)]
    kinds = {name: getattr(source.info(there), "dtype", "F32") for name, there in found.items()}
    packed = [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _FLOATS]
    if scales or packed:
        raise CheckpointError(
            f"{where} is quantised in a format that is not read: {some(packed or scales)}. Use the unquantised "
            "checkpoint of this model; quantization='int8' quantises it while it is loaded."
        )
