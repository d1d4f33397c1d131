"""The errors jaxinfer raises. Each message names the field, the value, the limit and the remedy."""


class JaxInferError(Exception):
    """Base of every error that is jaxinfer's own."""


class ConfigError(JaxInferError, ValueError):
    """A model's config.json or an engine setting that cannot be served."""


class CheckpointError(JaxInferError, ValueError):
    """A checkpoint whose files or tensors are missing, extra, misshaped or unsafe."""


class CapacityError(JaxInferError, ValueError):
    """Something that can never fit: a pool too small, a request larger than the pool."""


class ChatTemplateError(JaxInferError, ValueError):
    """A chat template that is missing, raises, or does not finish in time."""


class OfflineError(JaxInferError, OSError):
    """A model that is not on this machine and cannot be fetched."""


class EngineClosedError(JaxInferError, RuntimeError):
    """The engine was used after `close()`."""


class DistributedError(JaxInferError, RuntimeError):
    """Several processes serve one model, and one has died, differs from the others, or was asked what it cannot do."""


class EngineError(JaxInferError, RuntimeError):
    """A step failed on the device; the message says what was lost and what goes on."""


class EngineDeadError(EngineError):
    """A step failed, and so did starting over after it: the device is lost. Close the LLM and make a new one."""


class CacheConsumedError(JaxInferError, RuntimeError):
    """A cache was used after a step that took its memory."""
