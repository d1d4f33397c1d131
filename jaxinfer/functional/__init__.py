"""Pure functions over (params, cache, batch) for JAX users; see `program`."""

from jaxinfer.functional.program import Array as Array
from jaxinfer.functional.program import DecodeBatch as DecodeBatch
from jaxinfer.functional.program import PrefillBatch as PrefillBatch
from jaxinfer.functional.program import Program as Program
from jaxinfer.functional.program import abstract_cache as abstract_cache
from jaxinfer.functional.program import decode as decode
from jaxinfer.functional.program import decode_hidden as decode_hidden
from jaxinfer.functional.program import encode as encode
from jaxinfer.functional.program import encode_cross as encode_cross
from jaxinfer.functional.program import encode_step as encode_step
from jaxinfer.functional.program import init_cache as init_cache
from jaxinfer.functional.program import prefill as prefill
from jaxinfer.functional.program import prefill_batch as prefill_batch
from jaxinfer.functional.program import prefill_hidden as prefill_hidden
from jaxinfer.functional.program import split as split
from jaxinfer.functional.program import tile_count as tile_count
