"""Set the attention kernel of modules that run without the paged cache's step context."""

from flax import nnx


class AttentionModule(nnx.Module):
    """Base of recurrent layers and of encoders' attention, whose kernel the setting `attention_kernel` selects."""

    attention_kernel: str = "xla"
    """Implementation (`kernels.attention.choose`); set by `use_attention`."""


def use_attention(module: nnx.Module, kernel: str) -> None:
    """Set the attention implementation of every `AttentionModule` in a module."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, AttentionModule):
            part.attention_kernel = kernel
