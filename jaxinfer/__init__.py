"""jaxinfer: inference engine for Hugging Face checkpoints, on JAX.

`models`, `sharding` and `kv` are the public subpackages.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer import distributed as distributed
    from jaxinfer import functional as functional
    from jaxinfer import kv as kv
    from jaxinfer import loading as loading
    from jaxinfer import models as models
    from jaxinfer import sharding as sharding
    from jaxinfer.async_llm import AsyncLLM as AsyncLLM
    from jaxinfer.config import EngineConfig as EngineConfig
    from jaxinfer.llm import LLM as LLM
    from jaxinfer.models.whisper.transcription import Segment as Segment
    from jaxinfer.models.whisper.transcription import Transcript as Transcript
    from jaxinfer.outputs import CompletionOutput as CompletionOutput
    from jaxinfer.outputs import Logprob as Logprob
    from jaxinfer.outputs import RequestOutput as RequestOutput
    from jaxinfer.sampling_params import RequestOutputKind as RequestOutputKind
    from jaxinfer.sampling_params import SamplingParams as SamplingParams
    from jaxinfer.speculative_config import SpeculativeConfig as SpeculativeConfig
    from jaxinfer.steering import Steering as Steering
    from jaxinfer.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_MODULES = {
    "AsyncLLM": "async_llm",
    "EngineConfig": "config",
    "LLM": "llm",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "RequestOutputKind": "sampling_params",
    "SamplingParams": "sampling_params",
    "SpeculativeConfig": "speculative_config",
    "Steering": "steering",
    "Segment": "models.whisper.transcription",
    "StructuredOutputsParams": "structured_outputs",
    "Transcript": "models.whisper.transcription",
}
_SUBPACKAGES = ("demo", "distributed", "functional", "kv", "loading", "models", "sharding")
_FROM_ABOVE = {("jaxinfer.sharding", "plan"): "jaxinfer.loading.plan"}
"""Names exposed in a subpackage but defined in a module of a higher layer: (subpackage, name) -> module."""
__all__ = [*_MODULES, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package stays cheap."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"jaxinfer.{_MODULES[name]}"), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"jaxinfer.{name}")
    raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")


def name_from_above(module: str, name: str) -> Any:
    """Return a name of a subpackage that is defined in a higher layer (`_FROM_ABOVE`).

    Raises:
        AttributeError: `_FROM_ABOVE` has no such name for the subpackage.
    """
    if (module, name) in _FROM_ABOVE:
        return getattr(importlib.import_module(_FROM_ABOVE[module, name]), name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
