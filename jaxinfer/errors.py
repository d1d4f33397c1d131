"""Exceptions raised by jaxinfer. Messages name the field, the value, the limit and the remedy."""


class JaxInferError(Exception):
    """Base class of jaxinfer's exceptions."""


class ConfigError(JaxInferError, ValueError):
    """A model's config.json or an engine setting is not supported."""


class CheckpointError(JaxInferError, ValueError):
    """Files or tensors of a checkpoint or of `LLM.update_weights` are missing, unexpected, misshaped or unsafe."""


class CapacityError(JaxInferError, ValueError):
    """A pool or request can never fit: the pool is too small, or the request larger than the pool."""


class ChatTemplateError(JaxInferError, ValueError):
    """A chat template is missing, raises an error, or exceeds its time limit."""


class OfflineError(JaxInferError, OSError):
    """A model is not on this machine and cannot be downloaded."""


class EngineClosedError(JaxInferError, RuntimeError):
    """The engine was used after `close()`, or in a fork of its process."""


class DistributedError(JaxInferError, RuntimeError):
    """One of the processes serving a model has died, differs from the others, or got an unsupported call."""


class EngineError(JaxInferError, RuntimeError):
    """A step failed on the device; the message says what was lost and what continues."""


class DraftError(EngineError):
    """A step of the draft model failed; the requests continue without drafts."""


class JointStepError(EngineError):
    """A joint step failed; from now on its prefills and decodes run as two steps."""


class EngineDeadError(EngineError):
    """A step and the recovery from it failed: the device is lost. Close the LLM and create a new one."""


class CacheConsumedError(JaxInferError, RuntimeError):
    """A cache was used after its buffers were donated to a step."""
