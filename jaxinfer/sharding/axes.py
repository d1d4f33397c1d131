"""The glossary of axes: one letter in shapes, one logical name on parameters.

| letter | meaning                  | logical name on a parameter's axis |
|--------|--------------------------|------------------------------------|
| T      | tokens in a step         |                                    |
| B      | sequences in a step      |                                    |
| S      | key positions            |                                    |
| M      | model width              | `embed`                            |
| H      | query heads              | `heads`                            |
| K      | key/value heads          | `kv_heads`                         |
| D      | head dim                 | `head_dim`                         |
| F      | feed-forward width       | `ffn`                              |
| V      | vocabulary               | `vocab`                            |
| E      | experts                  | `expert`                           |
| N      | blocks of the cache      | `blocks`                           |
| P      | positions in a block     | `block`                            |
| tp     | shards of a fused weight | `shard`                            |

`columns` names the outputs of one shard of a fused projection: never divided again.
"""

SHARD = "shard"
COLUMNS = "columns"
EMBED = "embed"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
FFN = "ffn"
VOCAB = "vocab"
EXPERT = "expert"
BLOCKS = "blocks"
BLOCK = "block"
SLOTS = "slots"

LOGICAL_AXES = frozenset({SHARD, COLUMNS, EMBED, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EXPERT, BLOCKS, BLOCK, SLOTS})
"""Every logical name a parameter or a cache array may carry."""

MODEL = "model"
"""The mesh axis over which tensor-parallel weights are divided."""
DATA = "data"
"""The mesh axis over which images are divided; what is not of a vision tower has a copy on each of its devices."""
