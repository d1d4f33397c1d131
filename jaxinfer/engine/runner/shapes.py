"""Sizes that fix the shapes of the compiled steps."""

from dataclasses import dataclass

from jaxinfer.config import RAW_LOGPROBS
from jaxinfer.kernels.attention.xla_attention import decode_items
from jaxinfer.kv.contiguous import Regions


@dataclass(frozen=True)
class Shapes:
    """Sizes that fix the shapes of the compiled steps."""

    num_blocks: int
    """N: number of cache blocks."""
    block_size: int
    """P: positions in a block."""
    rows: int
    """R: maximum number of running sequences."""
    width: int
    """W: number of blocks of the longest sequence."""
    decode_buckets: tuple[int, ...]
    prefill_buckets: tuple[int, ...]
    prefill_rows: int
    """Maximum number of sequences in a prefill."""
    max_logprobs: int
    max_length: int
    """Maximum length of a sequence in tokens, at most W * P."""
    sampled_vocab: int
    """Number of token ids that may be sampled; the embedding may have more rows than the tokenizer has ids."""
    groups: int = 1
    """G: number of groups of layers, each with a block table."""
    switched: bool = False
    """Whether one program per bucket contains the whole sampler and skips at run time what no row needs. If not, each
    step is two programs, of its logits and of the sampler."""
    feature_slots: int = 0
    """Number of encoder inputs whose features the feature pool holds; 0 if the model has no encoder."""
    encode_buckets: tuple[int, ...] = ()
    """Numbers of inputs that encoder steps are compiled for."""
    cross_buckets: tuple[int, ...] = ()
    """Numbers of values (such as text tokens) that encoder steps for cross-attention are compiled for."""
    state_slots: int = 0
    """Number of slots of recurrent state; 0 without recurrent layers."""
    contiguous: bool = False
    """Whether each row has W fixed blocks (`kv.contiguous`) instead of a block table."""
    logprobs_mode: str = RAW_LOGPROBS
    """Logits from which log-probabilities are computed (`EngineConfig.logprobs_mode`)."""
    capture: tuple[str, ...] = ()
    """Paths of the modules whose outputs all steps return (`functional.taps`)."""

    verify_buckets: tuple[int, ...] = ()
    """Numbers of tokens of the steps that verify drafts; empty without speculative decoding."""
    draft_tokens: int = 0
    """Maximum number of tokens that a draft model makes at once; 0 without one."""
    joint_buckets: tuple[tuple[int, int], ...] = ()
    """Tokens, and sequences sampled after prompts or decoded, of joint steps (`runner.joint`), ascending; empty if
    prefills and decodes are always steps of their own."""

    @property
    def regions(self) -> Regions:
        """Layout of the rows' blocks in a contiguous cache."""
        return Regions(self.rows, self.width, self.groups)

    def items_bucket(self, rows: int, items: int) -> int:
        """Return the number of work items a decode step of `rows` rows is compiled for: `rows` or a doubling of it."""
        size = rows
        while size < items:
            size *= 2
        return min(size, decode_items(rows, self.width * self.block_size, self.block_size))
