"""Distribution of attention heads over shards, and padding with zero heads to make them divide."""

from dataclasses import dataclass

from jaxinfer.layers.linear import Output
from jaxinfer.layers.params import Build
from jaxinfer.sharding.rules import indivisible


@dataclass(frozen=True)
class HeadLayout:
    """Query heads grouped around each kv head (arXiv:2305.13245); a shard holds whole groups, or part of one.

    With `Build.pad_heads`, kv heads, and query heads in each group, are added until they divide over the shards. The
    added rows of q, k and v and columns of the output projection are zero (for int8 their scales are zero), so a
    padding head's output is finite and multiplied by zero: the result is that of the checkpoint's heads alone.

    A norm over the whole width of q or k (not per head) sums over the columns of all shards, where padding adds
    nothing, and divides by the checkpoint's width, `Output.rows`, not by the number of columns. With K = H every key
    head lies on one shard; kv heads repeated on several shards would be counted once per shard. The norm's scale is
    `constant(build, (tp, output.columns(tp)), (SHARD, COLUMNS), 1.0, outputs=(output,))`.
    """

    heads: int
    """H of the checkpoint."""
    kv_heads: int
    """K of the checkpoint; divides H."""
    stored_kv_heads: int
    """K as stored, padding included; heads repeated on several shards count once."""
    stored_group: int
    """Query heads per kv head as stored, padding included."""

    @classmethod
    def of(cls, build: Build, heads: int, kv_heads: int) -> "HeadLayout":
        """Compute the layout over the shards of the module being built.

        Raises:
            ConfigError: the heads do not divide over the shards and `build.pad_heads` is False; names module, axis,
                sizes and remedies.
        """
        tp, group = build.tp, heads // kv_heads
        if _fits(tp, kv_heads, group):
            return cls(heads, kv_heads, kv_heads, group)
        stored_kv, stored_group = _padded(tp, kv_heads, group)
        if build.pad_heads:
            return cls(heads, kv_heads, stored_kv, stored_group)
        pad = f"pad to {stored_kv * stored_group} ({stored_kv} kv heads) with pad_heads=True"
        raise indivisible(
            build.path or "attention",
            f"axis 'heads' of size {heads} ({kv_heads} kv heads)",
            tp,
            lambda count: _fits(count, kv_heads, group),
            module=build.path,
            more=pad,
        )

    @property
    def stored_heads(self) -> int:
        """H as stored, padding included."""
        return self.stored_kv_heads * self.stored_group

    def kv_heads_on(self, tp: int) -> int:
        """Return K of the cache over `tp` shards, where heads are repeated if there are more shards."""
        return self.stored_kv_heads if tp % self.stored_kv_heads else max(tp, self.stored_kv_heads)

    def outputs(self, head_dim: int) -> tuple[Output, Output, Output]:
        """Return the outputs q, k and v of a fused projection; q is also the `inputs` of the output projection."""
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
    """Return the smallest padded number of kv heads, and query heads per kv head, that divides over `tp` shards."""
    if kv_heads >= tp or group == 1:  # multi-head attention: no head is repeated
        return -(-kv_heads // tp) * tp, group
    stored_kv = next(count for count in range(kv_heads, tp + 1) if tp % count == 0)
    sharing = tp // stored_kv
    return stored_kv, -(-group // sharing) * sharing
