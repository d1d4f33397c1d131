"""jaxinfer: Hugging Face checkpoints in, text out, on JAX.

`models`, `sharding` and `kv` are the package's public wings.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer import distributed as distributed
    from jaxinfer import functional as functional
    from jaxinfer import kv as kv
    from jaxinfer import models as models
    from jaxinfer import sharding as sharding
    from jaxinfer.config import EngineConfig as EngineConfig
    from jaxinfer.llm import LLM as LLM
    from jaxinfer.outputs import CompletionOutput as CompletionOutput
    from jaxinfer.outputs import Logprob as Logprob
    from jaxinfer.outputs import RequestOutput as RequestOutput
    from jaxinfer.sampling_params import RequestOutputKind as RequestOutputKind
    from jaxinfer.sampling_params import SamplingParams as SamplingParams
    from jaxinfer.transcription import Segment as Segment
    from jaxinfer.transcription import Transcript as Transcript

__version__ = "0.1.0"

_HOMES = {
    "EngineConfig": "config", "LLM": "llm", "CompletionOutput": "outputs", "Logprob": "outputs",
    "RequestOutput": "outputs", "RequestOutputKind": "sampling_params", "SamplingParams": "sampling_params",
    "Segment": "transcription", "Transcript": "transcription",
}  # fmt: skip
_WINGS = ("demo", "distributed", "functional", "kv", "models", "sharding")
__all__ = [*_HOMES, *_WINGS]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: importing the package costs nothing but itself."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxinfer.{_HOMES[name]}"), name)
    if name in _WINGS:
        return importlib.import_module(f"jaxinfer.{name}")
    raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
