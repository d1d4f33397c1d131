"""Operations on device arrays, one file each: a plain-jnp oracle beside the fast version."""

from jaxinfer.kernels.attention import paged as paged
from jaxinfer.kernels.attention import xla_attention as xla_attention
