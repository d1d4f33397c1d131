"""Registry of architectures: each file of this folder with a `FAMILY` declares its own."""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.models.base import Family, LanguageModel

ALIASES: Mapping[str, str] = {"LLaMAForCausalLM": "LlamaForCausalLM", "PhiMoEForCausalLM": "PhimoeForCausalLM"}
"""Architecture names written by early versions of transformers, or by the code that a model was published with."""
SHARDED = "FSDP"
"""Prefix that PyTorch's `fully_shard` puts before the name of a model's class, which is saved as its architecture."""
WRAPPERS = ("PeftModel", "PeftModelForCausalLM", "PeftModelForSeq2SeqLM")
"""Classes around a model that some tools save as its architecture; `model_type` says what is inside."""


@cache
def families() -> Mapping[str, Family]:
    """Return the families of all supported architectures, by the architecture's name, sorted.

    Raises:
        ConfigError: two files declare the same architecture or model type.
    """
    found: dict[str, Family] = {}
    owners: dict[str, str] = {}
    for module in pkgutil.walk_packages([str(Path(__file__).parent)], "jaxinfer.models."):
        family = getattr(importlib.import_module(module.name), "FAMILY", None)
        for name, kind in family.architectures.items() if family is not None else ():
            for key in (name, kind):
                if key in owners:
                    raise ConfigError(f"{owners[key]} and {module.name} both declare {key!r}; remove one of them")
                owners[key] = module.name
            found[name] = replace(family, architecture=name)
    return dict(sorted(found.items()))


@cache
def model_types() -> Mapping[str, str]:
    """Return `model_type` in config.json -> architecture, for files without `architectures`."""
    return {family.architectures[name]: name for name, family in families().items()}


def architecture(config: Mapping[str, object]) -> str:
    """Return the supported architecture named by a config.json, or implied by its `model_type`.

    Raises:
        ConfigError: the architecture is not supported; the message lists those that are.
    """
    named, kind = config.get("architectures") or [], config.get("model_type")
    wrapped = not named or (isinstance(named, list) and all(name in WRAPPERS for name in named))
    if wrapped and isinstance(kind, str) and kind in model_types():
        return model_types()[kind]
    for name in named if isinstance(named, list) else []:
        name = ALIASES.get(name, name).removeprefix(SHARDED) if isinstance(name, str) else ""
        if name in families():
            return name
    raise ConfigError(
        f"config.json: architectures is {show(named)} (model_type {show(kind)}), which is not supported; "
        f"supported: {', '.join(families())}{_nearest(named, kind)}"
    )


def _nearest(named: object, kind: object) -> str:
    """Return the end of a message that names the supported architecture with the most similar name."""
    types = model_types()
    known = {name.lower(): name for name in families()} | {kind.lower(): name for kind, name in types.items()}
    given = [*(named if isinstance(named, list) else ()), kind]
    for name in (name.lower()[:200] for name in given if isinstance(name, str)):
        if found := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
            return (
                f". Nearest by name: {known[found[0]]}; if this model is computed in the same way, pass "
                f"hf_overrides={{'architectures': [{known[found[0]]!r}]}}"
            )
    return ""


def family(config: Mapping[str, object]) -> Family:
    """Return the family of a checkpoint, given its config.json.

    Raises:
        ConfigError: as `architecture`.
    """
    return families()[architecture(config)]


def family_of(module: LanguageModel, what: str) -> Family:
    """Return the family of a module that was made from a checkpoint's config.json.

    Args:
        module: the model.
        what: for which the names of tensors are needed, for the message.

    Raises:
        ConfigError: the module does not name its architecture.
    """
    name = getattr(module, "architecture", "")
    if not name:
        raise ConfigError(
            f"{what}: this {type(module).__name__} does not say its architecture, by which the names of tensors are "
            "known; make it with loading.weights.load or loading.weights.random"
        )
    return family({"architectures": [name]})
