"""Operations on device arrays, one file each: a plain-jnp oracle beside the fast version."""

from jaxinfer.kernels import paged as paged
from jaxinfer.kernels import xla_attention as xla_attention
