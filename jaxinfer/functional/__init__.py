"""Pure functions over (params, cache, batch) for JAX users; see `forward`, `program` and `batch`."""

from jaxinfer.functional.batch import Array as Array
from jaxinfer.functional.batch import DecodeBatch as DecodeBatch
from jaxinfer.functional.batch import PrefillBatch as PrefillBatch
from jaxinfer.functional.batch import prefill_batch as prefill_batch
from jaxinfer.functional.batch import tile_count as tile_count
from jaxinfer.functional.forward import decode as decode
from jaxinfer.functional.forward import decode_hidden as decode_hidden
from jaxinfer.functional.forward import encode_cross as encode_cross
from jaxinfer.functional.forward import encode_joint as encode_joint
from jaxinfer.functional.forward import encode_step as encode_step
from jaxinfer.functional.forward import prefill as prefill
from jaxinfer.functional.forward import prefill_hidden as prefill_hidden
from jaxinfer.functional.program import Program as Program
from jaxinfer.functional.program import abstract_cache as abstract_cache
from jaxinfer.functional.program import encode as encode
from jaxinfer.functional.program import init_cache as init_cache
from jaxinfer.functional.program import split as split
