"""Glossary of axes: the letter of each axis in shapes, and its logical name on parameters.

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

`columns` names the outputs of one shard of a fused projection, which are not sharded further.
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
"""Logical names that the axes of parameters and cache arrays may have."""

MODEL = "model"
"""Mesh axis of tensor parallelism: weights and kv heads are sharded over it."""
DATA = "data"
"""Mesh axis over which images are sharded; everything outside the vision tower is replicated over it."""
FSDP = "fsdp"
"""Mesh axis over which weights are divided where they lie; each layer gathers its own (`layers.gathering`)."""
BATCHES = "batches"
"""Mesh axis whose indices each run an engine of their own (`axes={"data": ...}` of `LLM`)."""
REPLICA = "replica_"
"""Prefix of mesh axes over which everything is replicated."""
