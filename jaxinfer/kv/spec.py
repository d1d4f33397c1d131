"""What a layer keeps: stated by the model, one entry a layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Full:
    """Keys and values of every position, in blocks that never change once full."""

    kv_heads: int
    """K of the layer, padded ones included; the cache repeats heads where there are more shards."""
    head_dim: int
    """D."""
    replicated: bool = False
    """Whether the layer is computed whole on every device: each then has all heads (`sharding.policy`)."""

    def heads_on(self, tp: int) -> int:
        """K of the array over `tp` shards."""
        return self.kv_heads if self.replicated or tp % self.kv_heads else tp

    def block_bytes(self, block_size: int, itemsize: int, tp: int) -> int:
        """Bytes of one block of this layer, keys and values, over all `tp` shards."""
        copies = tp if self.replicated else 1
        return 2 * self.heads_on(tp) * copies * block_size * self.head_dim * itemsize
