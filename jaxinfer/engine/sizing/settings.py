"""What of the configuration an engine is free to change."""

from dataclasses import dataclass

from jaxinfer.config import EngineConfig
from jaxinfer.engine.runner.runner import Runner


@dataclass(frozen=True)
class HostSettings:
    """What of the configuration changes no array: several engines may share one runner in turn."""

    pool_blocks: int
    token_budget: int
    prefix_caching: bool = True
    block_sharing: bool = True
    check_invariants: bool = False
    log_interval: float = 10.0
    decode_steps: int | str = 1

    @classmethod
    def of(cls, config: EngineConfig, runner: Runner) -> "HostSettings":
        """From the engine's configuration."""
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
        )
