"""Settings of the server: one frozen dataclass, each field with unit and default."""

from dataclasses import dataclass

from jaxinfer.errors import ConfigError


@dataclass(frozen=True)
class ServerConfig:
    """Limits and identity of a server. Requests over a limit are refused with an error that names it."""

    model_name: str
    """Name of the model in requests and responses."""
    api_key: str | None = None
    """Key that requests must carry, as `Authorization: Bearer KEY` or `x-api-key: KEY`; None for no check."""
    debug_cache: bool = False
    """Whether `/debug/cache` shows blocks and requests: ids, numbers of tokens and times, no text. The engine's steps
    are recorded while the page is open.
    """
    profile_dir: str | None = None
    """Folder for traces of JAX's profiler, which `POST /start_profile` and `/stop_profile` start and end; None for no
    such endpoints.
    """
    max_body_bytes: int = 32 << 20
    """Maximum size of a request body; images arrive in it as data URLs."""
    body_timeout: float = 60.0
    """Seconds within which the headers of a request must arrive, and then its body."""
    write_timeout: float = 60.0
    """Seconds that a client may leave a part of a streamed response unread before its request is aborted."""
    max_n: int = 64
    """Maximum number of samples of a request: `n` times the number of prompts."""
    max_tokens: int | None = None
    """Maximum `max_tokens` of a request; None for no limit but the model's length."""
    max_concurrent_requests: int = 1024
    """Maximum number of requests that are accepted at the same time, running or waiting."""
    max_queue_length: int = 512
    """Maximum number of sequences that wait in the engine; above it new requests are refused."""

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ConfigError("model_name cannot be empty: it names the model in requests and responses")
        if self.api_key is not None and not self.api_key:
            raise ConfigError("api_key cannot be empty: leave it out to check no key")
        for name in ("max_body_bytes", "max_n", "max_tokens", "max_concurrent_requests", "max_queue_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.debug_cache, bool):
            raise ConfigError(f"debug_cache must be True or False, got {self.debug_cache!r}")
        if self.profile_dir is not None and not (isinstance(self.profile_dir, str) and self.profile_dir):
            raise ConfigError(f"profile_dir must be the path of a folder, got {self.profile_dir!r}")
        for name in ("body_timeout", "write_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86400:
                raise ConfigError(f"{name} must be a number of seconds in (0, 86400], got {value!r}")
