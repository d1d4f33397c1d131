"""Declarations of the tests' data of a family, read from the files in tests/families."""

import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FULL, SLIDING, LINEAR_LAYER = "full_attention", "sliding_attention", "linear_attention"
"""Kinds of layers, as in `layer_types`."""
CONFIGS = Path(__file__).resolve().parents[1] / "real/configs"
"""Folder of published config.json files."""
TOLERANCE = 1e-4
"""Absolute tolerance of a float32 logit; ignoring an option must change the logits by 100 times as much."""
LENGTHS = (3, 17, 40, 1)
"""Lengths of the prompts of a batch: part of a chunk, more than one, several, a single token."""
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    n_shared_experts=1,
    routed_scaling_factor=1.5,
    head_dim=None,
)
"""Fields of config.json for latent attention (MLA) and experts of DeepSeek models."""

NULL: Any = object()
"""Marks an attribute of config.json that a case sets to null; None removes the attribute."""
Change = Callable[[Any], Any]
"""Function from a reference model to one that ignores an option (`support.reference_changes`)."""


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint of a family with some options enabled, compared with transformers."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes of config.json relative to the family's tiny model: None removes an attribute, `NULL` sets it to null."""
    without: Mapping[str, Change] = field(default_factory=dict)
    """Option -> the reference of a program that ignores it."""
    lengths: tuple[int, ...] = LENGTHS
    head: float = 0.7
    cached: bool = True
    """Whether transformers may use its cache."""
    tolerance: float = TOLERANCE
    distinct: int = 15
    """Minimum number of distinct output tokens, so that their equality is meaningful (exclusive)."""


@dataclass(frozen=True)
class Published:
    """A published config.json, which must be parsed and planned unchanged."""

    hub: str
    """Id on the Hub."""
    source: str
    """Where the values are from: "the file on the Hub" and its revision, "the defaults of transformers' NAME", or "from
    memory of the published values; not compared with the file"."""
    config: Mapping[str, Any] | None = None
    """The values; None if a file in `tests/real/configs` has them."""


@dataclass(frozen=True)
class FamilyData:
    """Tests' data of a family.

    Its tiny model is `support.tiny.CONFIG` with the changes of `config`; a change to None removes an attribute.
    """

    published: Mapping[str, Published]
    """Published configs by name; together they have all architectures of the family."""
    architecture: str = ""
    """Architecture of the tiny model; empty if the family is compared with transformers in test files of its own."""
    variant: bool = False
    """Whether the layers are those of other families with other options. Then the family is compared with transformers
    only; equivalences and plans are those of the layers."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the tiny model's config.json: what `support.tiny.CONFIG` lacks, with values that are no default."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields that a config.json of the family must state beside the sizes, or numbers of heads that divide its own."""
    cases: Mapping[str, Case] = field(default_factory=dict)
    """Parity cases by name; the first one also runs through the engine."""


@cache
def families() -> Mapping[str, FamilyData]:
    """Return the data of all families, by name.

    Raises:
        ValueError: two families have a case or a published config of the same name.
    """
    folder = Path(__file__).resolve().parents[1] / "families"
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    found = {name: importlib.import_module(f"families.{name}").DATA for name in names}
    for kind in ("cases", "published"):
        counts = Counter(entry for data in found.values() for entry in getattr(data, kind))
        if twice := [entry for entry, count in counts.items() if count > 1]:
            raise ValueError(f"{kind} of the same name in two files of tests/families: {', '.join(twice)}; rename one")
    return found


def published() -> dict[str, dict[str, Any]]:
    """Return all published config.json files by name."""
    return {
        name: dict(entry.config) if entry.config is not None else json.loads((CONFIGS / f"{name}.json").read_text())
        for data in families().values()
        for name, entry in data.published.items()
    }
