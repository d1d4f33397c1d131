"""Map tensor names of a checkpoint to the names of a weight table.

Tools save the same model with other prefixes, and add tensors that no forward pass reads. `rename_tensors` renames the
former, drops the latter, and refuses adapters and quantised weights.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxinfer.checkpoint.packed.matrix import Kept
from jaxinfer.checkpoint.rules import format_names
from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.errors import CheckpointError

log = logging.getLogger(__name__)

_MODULES = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
WRAPPERS = re.compile(rf"^(?:(?:{_MODULES}|module|pretrained_model)\.)+|(?<=\.)(?:{_MODULES})\.")
"""Name components inserted by torch.compile, FSDP, activation checkpointing, DataParallel, Lightning and TRL's
value-head models when a wrapped model is saved."""

PEFT = "base_model.model."
"""Prefix of all tensors of a model that was saved inside a PeftModel, with its adapter merged."""

PREFIXES: Sequence[tuple[str, str]] = (
    ("", "model."),
    ("model.", ""),  # a base model saved without its head, and the reverse
    ("model.language_model.model.", "model.language_model."),
    ("language_model.model.model.", "model.language_model."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.lm_head.", "lm_head."),
    ("model.language_model.lm_head.", "lm_head."),
)
"""Checkpoint prefixes and their replacements. The first pair that yields a name of the weight table is used.
Includes text models saved from a multimodal wrapper."""

IGNORED: Sequence[str] = (
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r"(.*\.)?(attn|attention|self_attn)\.(bias|masked_bias)",
    r"(.*\.)?position_ids",
    r"(.*\.)?(encoder|decoder)\.version",
    r"(model\.)?(mtp|mtp_layers|mtp_block)\..*",
    r"(.*\.)?self_attn\.(attn\.|[kv]_proj\.)?(q|k|v|kv|prob)_scale",
    r"(score|v_head|value_head|reward_head|classifier|classification_head|qa_outputs)\..*",
)
"""Patterns of tensors that no supported forward pass reads: buffers that jaxinfer computes, multi-token-prediction
layers, scales of 8-bit caches, and heads of reward models and classifiers."""

_PREDICTING = re.compile(r"(.*\blayers\.\d+\.)(eh_proj|enorm|hnorm|shared_head)\..*")
"""Pattern of tensors that occur only in multi-token-prediction layers (DeepSeek-V3); every tensor with the matched
prefix belongs to such a layer."""

_ADAPTER = re.compile(
    r"base_model\.model\..*|(.*\.)?(base_layer|modules_to_save|original_module|token_adapter|lora_[AB]|"
    r"lora_embedding_[AB]|lora_magnitude_vector|vera_lambda_[bd]|hada_w\w+|lokr_w\w+|oft_[rR]|ia3_l|prompt_encoder)\b.*"
)
"""Pattern of PEFT's tensor names, for adapters and for unmerged models with an adapter."""
_QUANTISED = re.compile(
    r".*[._](qweight|qzeros|g_idx|weight_scale(_inv|_2)?|input_scale|output_scale|weight_packed|weight_zero_point|"
    r"weight_shape|absmax|quant_map|quant_state\..*|SCB|scales|biases|zeros|W_q|q_weight|q_scale|q_groups|q_invperm|"
    r"trellis|codes|codebooks|centroids|weight_scales|_data|_scale)"
)
"""Pattern of tensor names of GPTQ, AWQ, compressed-tensors, ModelOpt, FP8, bitsandbytes, MLX, HQQ, ExLlama, AQLM,
VPTQ, EETQ and Quanto."""
_FLOATS = ("F16", "BF16", "F32", "F64")


class Renamed:
    """Source that presents the tensors of another source under new names."""

    def __init__(self, source: Source, names: Mapping[str, str]):
        """Initialise the mapping.

        Args:
            source: source of the tensors.
            names: new name -> name in `source`; tensors without an entry are left out.
        """
        self._source, self._names = source, dict(names)

    def names(self) -> list[str]:
        """Return the new names, in the order of the mapping."""
        return list(self._names)

    def original(self, name: str) -> str:
        """Return the name that a tensor has in the other source."""
        return self._names[name]

    def info(self, name: str) -> Info:
        """Return a tensor's shape and dtype."""
        return self._source.info(self._names[name])

    def packed(self, name: str) -> Kept | None:
        """Return a quantised matrix that can be kept in 4 bits, or None (`DequantisedSource.packed`)."""
        find = getattr(self._source, "packed", None)
        return find and find(self._names[name])

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a tensor, or the part selected by slices of step 1, one per leading axis."""
        return self._source.read(self._names[name], slices)

    def release(self) -> None:
        """Release the memory of data read so far."""
        self._source.release()


def rename_tensors(source: Source, table: Sequence[Rule], where: object, ignored: Iterable[str] = ()) -> Renamed:
    """Rename a checkpoint's tensors to the names of a weight table, and drop those that the model does not read.

    Unknown tensors are kept; `rules.plan` refuses them.

    Args:
        source: checkpoint to read from.
        table: weight table of the model.
        where: checkpoint folder, for error messages.
        ignored: patterns of further tensors that this model does not read, in addition to `IGNORED`.

    Raises:
        CheckpointError: the tensors belong to an adapter, or are quantised in an unsupported format.
    """
    known, names = set(known_names(table)), source.names()
    taken, found, left = known.intersection(names), {}, []
    bare = {name: WRAPPERS.sub("", name) for name in names}
    if all(name.startswith(PEFT) for name in bare.values()):
        bare = {name: WRAPPERS.sub("", short.removeprefix(PEFT)) for name, short in bare.items()}
    for name in names:
        own = name if name in known else canonical(bare[name], known)
        if own in known and own not in found and (own == name or own not in taken):
            found[own] = name
        else:
            left.append(name)
    _check_format(where, source, found, left)
    patterns = re.compile("|".join(f"(?:{pattern})" for pattern in (*IGNORED, *ignored)))
    predicting = tuple({match[1] for match in map(_PREDICTING.fullmatch, left) if match})
    unread = [name for name in left if patterns.fullmatch(bare[name]) or name.startswith(predicting)]
    if unread:
        log.info(
            "%s: %d tensor(s) that the model does not read are left out: %s", where, len(unread), format_names(unread)
        )
    return Renamed(source, found | {name: name for name in left if name not in set(unread)})


def known_names(table: Iterable[Rule]) -> Iterator[str]:
    """Yield every tensor name in a weight table."""
    for rule in table:
        yield rule.source
        yield from rule.also
        yield from known_names(rule.instead)


def canonical(bare: str, known: set[str]) -> str:
    """Map a tensor name without wrapper components to the weight table; return it unchanged if the table has none."""
    candidates = (here + bare.removeprefix(there) for there, here in PREFIXES if bare.startswith(there))
    return bare if bare in known else next((one for one in candidates if one in known), bare)


def _check_format(where: object, source: Source, found: Mapping[str, str], left: Sequence[str]) -> None:
    """Refuse adapters and quantised weights before names and shapes are compared."""
    adapter = [name for name in left if _ADAPTER.fullmatch(name)]
    if adapter:
        raise CheckpointError(
            f"{where} has {len(adapter)} tensor(s) of a PEFT adapter: {format_names(adapter)}. Pass the base model as "
            "model and the adapter's folder as adapters={name: folder}, or merge them and save that: "
            "PeftModel.merge_and_unload().save_pretrained(path)."
        )
    scales = [name for name in left if _QUANTISED.fullmatch(name)]
    kinds = {name: getattr(source.info(there), "dtype", "F32") for name, there in found.items()}
    packed = [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _FLOATS]
    if scales or packed:
        raise CheckpointError(
            f"{where} is quantised in a format that is not read, or that config.json does not declare: "
            f"{format_names(packed or scales)}. Use the unquantised "
            "checkpoint of this model; quantization='int8' quantises it while it is loaded."
        )
