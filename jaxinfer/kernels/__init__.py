"""Device kernels: each operation has a plain-jnp reference beside its fast versions."""

from jaxinfer.kernels.attention import paged as paged
from jaxinfer.kernels.attention import xla_attention as xla_attention
