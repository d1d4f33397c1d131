"""State of an engine's cache at one moment, as a value: blocks by owner, requests, hits and misses, the prefix tree."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxinfer._utils import html
from jaxinfer.recording import palette
from jaxinfer.recording.events import CACHED, FREE, Owner, as_runs

SHOWN = 40
"""Number of prefixes and of requests that the text and HTML list."""


@dataclass(frozen=True)
class RequestState:
    """A sequence that runs or waits."""

    owner: Owner
    phase: str
    """"waiting", "prefill", "decode", or "preempted"."""
    blocks: int
    """Number of blocks that it holds, shared ones included."""
    length: int
    """Number of positions in the cache."""


@dataclass(frozen=True)
class Prefix:
    """Blocks of the prefix tree that follow each other without a branch and have the same number of holders."""

    depth: int
    """Number of branches above."""
    blocks: int
    """Number of blocks of tokens."""
    holders: int
    """Number of sequences that hold them now; 0 for cached ones."""
    tokens: tuple[int, ...]
    """Token ids; empty for an encoder's input."""
    kind: str = "tokens"
    """"tokens", or "encoder input"."""
    text: str | None = None
    """The tokens' text, shortened; None without a tokenizer."""

    @property
    def shown(self) -> str:
        """Text, or token ids, on one line."""
        if self.kind != "tokens":
            return self.kind
        return repr(self.text) if self.text is not None else " ".join(map(str, self.tokens[:16]))


@dataclass(frozen=True, repr=False, eq=False)
class CacheState:
    """Cache of an engine between two steps. Shown with its requests, hits, misses and the prefix tree."""

    codes: np.ndarray
    """Code of each block, which tells its owner, `[N]` int32 (`recording.events`); numbers are those of `requests`."""
    block_size: int
    groups: int
    """Number of blocks that one block of tokens takes: one in each group of layers."""
    requests: tuple[RequestState, ...]
    waiting: int
    """Number of sequences that wait, those beyond `requests` included."""
    queried_tokens: int
    """Number of prompt tokens that were looked up in the prefix cache so far."""
    hit_tokens: int
    """Number of those that were found."""
    lookups: Mapping[str, int]
    """Number of requests by miss reason (`RequestMetrics.cache_miss_reason`); "complete" is not a miss."""
    preemptions: int
    compiling: bool = False
    """Whether the next step waits for programs that are being compiled."""
    prefixes: tuple[Prefix, ...] = ()
    """The prefix tree, depth first."""
    more_prefixes: int = 0
    """Number of blocks of the tree that `prefixes` leaves out."""

    @property
    def num_blocks(self) -> int:
        """N, all blocks."""
        return len(self.codes)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of blocks that are free, cached, held by one sequence, and shared by several."""
        codes = self.codes
        masks = {"free": codes == FREE, "cached": codes == CACHED, "one owner": codes > 0, "shared": codes < CACHED}
        return {name: int(mask.sum()) for name, mask in masks.items()}

    @property
    def hit_rate(self) -> float:
        """Fraction of the prompt tokens looked up so far that were found."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values, without the prefix tree; blocks as runs of `[code, length]`."""
        return {
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "groups": self.groups,
            "counts": self.counts,
            "codes": as_runs(self.codes),
            "waiting": self.waiting,
            "queried_tokens": self.queried_tokens,
            "hit_tokens": self.hit_tokens,
            "lookups": dict(self.lookups),
            "preemptions": self.preemptions,
            "compiling": self.compiling,
            "requests": [
                {
                    "number": one.owner.number,
                    "label": one.owner.label,
                    "phase": one.phase,
                    "prompt_tokens": one.owner.prompt_tokens,
                    "cached_tokens": one.owner.cached_tokens,
                    "miss_reason": one.owner.miss_reason,
                    "tokens": one.owner.tokens,
                    "blocks": one.blocks,
                    "arrival": one.owner.arrival,
                }
                for one in self.requests
            ],
        }

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        lines = [
            f"CacheState({self.num_blocks} blocks of {self.block_size} tokens: {counts}; {len(self.requests)} "
            f"sequences, {self.waiting} waiting; {self.hit_tokens} of {self.queried_tokens} prompt tokens found)"
        ]
        lines += [f"  {reason}: {count} request(s)" for reason, count in self.lookups.items()]
        lines += [
            f"  {'  ' * p.depth}{p.blocks} block(s), {_holders(p.holders)}: {p.shown}" for p in self.prefixes[:SHOWN]
        ]
        return "\n".join([*lines, *self._left_out("  ")])

    def _left_out(self, before: str = "") -> list[str]:
        left = sum(p.blocks for p in self.prefixes[SHOWN:]) + self.more_prefixes
        return [f"{before}and {left} more blocks of prefixes"] if left else []

    def _repr_html_(self) -> str:
        parts = [(palette.KINDS[name], count, f"{name}: {count} blocks") for name, count in self.counts.items()]
        found = f"{self.hit_tokens:,} of {self.queried_tokens:,} prompt tokens were found"
        each = "" if self.groups == 1 else f"; a block of tokens takes {self.groups}, one in each group of layers"
        return html.element(
            html.title("Cache", f"{self.num_blocks:,} blocks of {self.block_size} tokens{each}"),
            html.bar(parts, self.num_blocks),
            html.tiles(
                [
                    (f"{100 * self.hit_rate:.1f}%", found),
                    (f"{sum(r.phase != 'waiting' for r in self.requests):,}", "sequences run"),
                    (f"{self.waiting:,}", "sequences wait"),
                    (f"{self.preemptions:,}", "preemptions"),
                ]
            ),
            self._tables(),
        )

    def _tables(self) -> str:
        made = ""
        if self.lookups:
            made += html.table(["why no more of a prompt was found", "requests"], list(self.lookups.items()))
        if self.requests:
            rows = [
                (r.owner.label, r.phase, r.owner.prompt_tokens, r.owner.cached_tokens, r.owner.tokens, r.blocks)
                for r in self.requests[:SHOWN]
            ]
            made += html.table(["sequence", "phase", "prompt", "found", "output", "blocks"], rows)
        if self.prefixes:
            rows = [
                (f"{chr(0xA0) * 4 * p.depth}{p.shown}", p.blocks, _holders(p.holders)) for p in self.prefixes[:SHOWN]
            ]
            made += html.table(["prefix", "blocks", "held by"], rows)
        return made + "".join(f'<p class="dim">{line}</p>' for line in self._left_out())


def _holders(count: int) -> str:
    return "cached" if not count else f"{count} sequence{'s' if count > 1 else ''}"
