"""Paged KV cache: host bookkeeping (`pool`, `prefix`), device memory as donated arrays (`cache`)."""

from jaxinfer.kv import cache as cache
from jaxinfer.kv import digests as digests
from jaxinfer.kv import pool as pool
from jaxinfer.kv import prefix as prefix
from jaxinfer.kv import spec as spec
