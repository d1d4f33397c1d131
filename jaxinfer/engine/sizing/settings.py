"""Settings that affect the host alone."""

from dataclasses import dataclass

from jaxinfer.config import EngineConfig
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.speculative_config import SpeculativeConfig


@dataclass(frozen=True)
class HostSettings:
    """Settings that change no array shape, so that engines with different ones can use one runner in turn."""

    pool_blocks: int
    token_budget: int
    prefix_caching: bool = True
    block_sharing: bool = True
    check_invariants: bool = False
    log_interval: float = 10.0
    decode_steps: int | str = 1
    speculative: SpeculativeConfig | None = None

    @classmethod
    def of(cls, config: EngineConfig, runner: Runner) -> "HostSettings":
        """Take the settings from the engine's configuration, limited by the runner's shapes."""
        blocks = min(config.pool_blocks or runner.shapes.num_blocks, runner.shapes.num_blocks)
        largest = runner.shapes.prefill_buckets[-1]
        return cls(
            blocks,
            min(config.max_num_batched_tokens or largest, largest),
            config.enable_prefix_caching,
            config.enable_block_sharing,
            config.check_invariants,
            config.log_interval,
            config.decode_steps,
            config.speculative_config,
        )
