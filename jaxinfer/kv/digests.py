"""Digests that identify a block of tokens by its content and everything before it in the sequence."""

import hashlib
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

Tokens: TypeAlias = np.ndarray | bytes
"""Token ids as an integer array, or as the bytes of little-endian int32."""

Extras: TypeAlias = Mapping[int, bytes]
"""Extra content of blocks beside their tokens, by block number in the sequence; empty for blocks not in it."""

NO_EXTRAS: Extras = {}
TOKEN_BYTES = 4
"""Bytes of a token id, as hashed and compared."""


def block_digest(parent: bytes, tokens: Tokens, extra: bytes = b"") -> bytes:
    """Compute the 32-byte digest of a block of tokens [P] whose parent is a block or the root."""
    return hashlib.sha256(parent + as_bytes(tokens) + extra).digest()


def root(*salt: bytes) -> bytes:
    """Compute the parent digest of first blocks, 32 bytes, from all parts of the salt."""
    # Parts are length-prefixed, so that ("ab", "c") and ("a", "bc") differ.
    parts = b"".join(len(part).to_bytes(8, "little") + part for part in salt)
    return hashlib.sha256(b"jaxinfer prefix root" + parts).digest()


def as_bytes(tokens: Tokens) -> bytes:
    """Encode tokens as little-endian int32, so that digests do not depend on the machine or dtype."""
    return tokens if isinstance(tokens, bytes) else np.asarray(tokens, "<i4").tobytes()
