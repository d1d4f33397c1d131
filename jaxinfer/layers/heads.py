"""How the heads of an attention lie over shards, and the heads of zeroes that make them divide."""

from dataclasses import dataclass

from jaxinfer.layers.linear import Output
from jaxinfer.layers.params import Build
from jaxinfer.sharding.rules import indivisible


@dataclass(frozen=True)
class HeadLayout:
    """Query heads in groups, one around each kv head (arXiv:2305.13245); a shard holds whole groups, or part of one.

    With `Build.pad_heads` groups, and query heads within each of them, are added until they divide. Rows of q, k and v
    and columns of the output projection that belong to them are zero, in int8 too, where their scales are zero: what
        such
    a head attends to is finite and multiplied by zero. The output is that of the checkpoint's heads alone.

    A norm over the whole width of q or k (not one a head) sums over all shards' columns, where those of padding add
    nothing, and divides by the checkpoint's width, `Output.rows`, not by the number of columns. Without groups (K = H)
    every head of k lies on one shard; where kv heads serve several, such a sum would count them as often. Its scale is
    `constant(build, (tp, output.columns(tp)), (SHARD, COLUMNS), 1.0, outputs=(output,))`.
    """

    heads: int
    """H of the checkpoint."""
    kv_heads: int
    """K of the checkpoint; divides H."""
    stored_kv_heads: int
    """K as kept, those of zeroes included, each counted once where it serves several shards."""
    stored_group: int
    """Query heads around each kv head as kept."""

    @classmethod
    def of(cls, build: Build, heads: int, kv_heads: int) -> "HeadLayout":
        """The layout over the shards of the module that is built.

        Raises:
            ConfigError: they do not divide and are not to be padded; names module, axis, sizes and remedies.
        """
        tp, group = build.tp, heads // kv_heads
        if _fits(tp, kv_heads, group):
            return cls(heads, kv_heads, kv_heads, group)
        stored_kv, stored_group = _padded(tp, kv_heads, group)
        if build.pad_heads:
            return cls(heads, kv_heads, stored_kv, stored_group)
        pad = f"pad it to {stored_kv * stored_group} (around {stored_kv} kv heads) with pad_heads=True"
        raise indivisible(
            build.path or "attention",
            f"axis 'heads' of size {heads} (around {kv_heads} kv heads)",
            tp,
            lambda count: _fits(count, kv_heads, group),
            module=build.path,
            more=pad,
        )

    @property
    def stored_heads(self) -> int:
        """H as kept, those of zeroes included."""
        return self.stored_kv_heads * self.stored_group

    def outputs(self, head_dim: int) -> tuple[Output, Output, Output]:
        """q, k and v of one fused projection; q is also the `inputs` of the output projection."""
        group = self.heads // self.kv_heads
        groups = range(self.stored_kv_heads)
        kv = tuple(k if k < self.kv_heads else None for k in groups)
        q = tuple(
            k * group + member if k < self.kv_heads and member < group else None
            for k in groups
            for member in range(self.stored_group)
        )
        return (
            Output("q", self.heads, head_dim, stored=None if None not in q else q),
            *(
                Output(name, self.kv_heads, head_dim, repeat=True, stored=None if None not in kv else kv)
                for name in ("k", "v")
            ),
        )


def _fits(tp: int, kv_heads: int, group: int) -> bool:
    return kv_heads % tp == 0 or tp % kv_heads == 0 and group % (tp // kv_heads) == 0


def _padded(tp: int, kv_heads: int, group: int) -> tuple[int, int]:
    """The fewest kv heads, and query heads around each, that `tp` shards divide."""
    if kv_heads >= tp or group == 1:  # one query head a kv head: none is on two shards
        return -(-kv_heads // tp) * tp, group
    stored_kv = next(count for count in range(kv_heads, tp + 1) if tp % count == 0)
    sharing = tp // stored_kv
    return stored_kv, -(-group // sharing) * sharing
