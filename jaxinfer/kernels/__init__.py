"""Operations on device arrays, one file each: a plain-jnp oracle beside the fast version."""

from jaxinfer.kernels import paged_attention as paged_attention
