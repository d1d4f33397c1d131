"""Nodes of the prefix index, and the result of matching a prompt with them."""

from enum import StrEnum
from typing import NamedTuple


class MatchEnd(StrEnum):
    """Why a prefix match ended."""

    COMPLETE = "complete"
    """Every requested block is cached."""
    NO_FULL_BLOCK = "below one block"
    """The prompt is shorter than one block."""
    ABSENT = "absent"
    """The next block was never published, or its eviction is no longer remembered."""
    EVICTED = "evicted under pressure"
    """The next block was published and has been evicted; a larger pool would have kept it."""
    WINDOW = "window evicted"
    """The prefix is known, but a block of the window before its end has been evicted."""
    SALT = "salt differs"
    """The first block's tokens are cached with another image or salt."""
    COLLISION = "collision"
    """The digest is cached with different content; the match is rejected."""


class Node:
    """A block of tokens after a prefix, with the cache blocks of each kind; nodes form a tree of prefixes."""

    __slots__ = ("children", "content", "digest", "ids", "linked", "parent")

    def __init__(self, digest: bytes, parent: bytes, content: bytes, kinds: int) -> None:
        self.digest, self.parent = digest, parent
        self.content = content
        """Tokens and extra of the block."""
        self.ids: list[tuple[int, ...]] = [()] * kinds
        """Block ids of each kind, one per group; () for kinds without the block, as behind a window."""
        self.children = 0
        """Number of child nodes."""
        self.linked = False
        """Whether the parent is a node that counts this one as a child; False for the first block of a prefix."""


class Match(NamedTuple):
    """Nodes of the longest known prefix, first block first, and why it ends there."""

    nodes: list[Node]
    reason: MatchEnd
