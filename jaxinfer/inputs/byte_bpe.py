"""Convert tiktoken ranks to a byte-level BPE tokenizer of the `tokenizers` package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers


def from_ranks(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int] = {}) -> Tokenizer:
    """Build a byte-level BPE tokenizer from tiktoken ranks.

    tiktoken merges the two neighbours whose joined token has the lowest rank.

    Args:
        ranks: bytes of each token -> its rank.
        pattern: regular expression that splits a text into pieces; merges do not cross piece boundaries.
        special: special token text -> id, numbered from 0; the ranks are shifted up by their count. The caller must
            still register them as added tokens.
    """
    vocab, merges = _as_pairs(ranks, len(special))
    made = Tokenizer(models.BPE({**special, **vocab}, merges, fuse_unk=False, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def byte_letters() -> list[str]:
    """Return a printable character for each byte, as GPT-2 and `tokenizers`' ByteLevel map them.

    Printable bytes map to themselves, the others to the code points from 256 on.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def _as_pairs(ranks: Mapping[bytes, int], first: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary, with ids from `first` on, and the merges.

    The merges are all splits of each token into two known tokens, in the order of the ranks.
    """
    letters = byte_letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}

    def ways(token: bytes) -> Iterator[tuple[bytes, bytes]]:
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        return iter(sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])))

    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = [(spelt[left], spelt[right]) for token in ordered for left, right in ways(token)]
    return {spelt[token]: first + ranks[token] for token in ordered}, merges
