"""Read the config.json attributes of Mamba-2 layers that families share."""

import math

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.errors import ConfigError
from jaxinfer.layers.mamba import MambaSpec

NO_LIMIT = [0.0, {"__float__": "Infinity"}]
"""No limit of the time steps, as transformers writes an infinite number."""


def mamba_spec(reader: ConfigReader, eps: float | None, *, width: int | None = None) -> MambaSpec:
    """Read the sizes and biases of Mamba-2 layers, `mamba_*`.

    Args:
        reader: config.json.
        eps: epsilon of the gated norm; None for no norm.
        width: columns of all heads; by default `mamba_expand` times `hidden_size`.

    Raises:
        ConfigError: sizes do not fit each other.
    """
    reader.skip("mamba_chunk_size")  # tokens of a chunk of transformers' own prefill
    require_no_limit(reader)
    hidden, heads = reader.get_int("hidden_size"), reader.get_int("mamba_n_heads", 128)
    expanded = reader.get_int("mamba_expand", 2) * hidden
    width = expanded if width is None else width
    head_dim = reader.divide("the width of Mamba layers", width, "mamba_n_heads", heads)
    if reader.get("mamba_d_head", "auto") != "auto" and reader.get_int("mamba_d_head") != head_dim:
        raise ConfigError(
            f"{reader.family}: mamba_d_head is {reader.get('mamba_d_head')}, but {width} columns of "
            f"mamba_n_heads = {heads} heads have {head_dim} each; correct one of them"
        )
    groups = reader.get_int("mamba_n_groups", 1)
    reader.divide("mamba_n_heads", heads, "mamba_n_groups", groups)
    bias = reader.get_bool("mamba_proj_bias", False)
    return MambaSpec(
        hidden,
        heads,
        head_dim,
        groups,
        reader.get_int("mamba_d_state", 256),
        reader.get_int("mamba_d_conv", 4, least=2),
        conv_bias=reader.get_bool("mamba_conv_bias", True),
        in_bias=bias,
        out_bias=bias,
        norm_eps=eps,
    )


def require_no_limit(reader: ConfigReader) -> None:
    """Refuse limits of the time steps: transformers applies them to prompts and not to the tokens after them."""
    reader.require("time_step_limit", NO_LIMIT, [0.0, math.inf])
