"""Export a module's weights to the tensors of a checkpoint."""

from collections.abc import Sequence

import numpy as np
from flax import nnx

from jaxinfer.checkpoint.fusing import named, unfuse
from jaxinfer.checkpoint.rules import parameters
from jaxinfer.checkpoint.weight_table import Rule


def tensors(module: nnx.Module, table: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Return the weights of a module under their checkpoint names (the first name of each), on the host.

    Args:
        module: unquantised module.
        table: `Family.weight_rules` of its configuration.

    Raises:
        ValueError: the module is quantised.
    """
    params, found = parameters(module), {}
    for path, param in params.items():
        if "scales_of" in param.get_metadata():
            raise ValueError(f"{path} is quantised; load the module with quantization='dequantize' to export it")
    for path, (layout, rules) in named(params, table).items():
        parts = unfuse(layout, [rule.parts for rule in rules], np.asarray(params[path][...]))
        found.update({rule.source: np.ascontiguousarray(part) for rule, part in zip(rules, parts, strict=True)})
    return {rule.source: found[rule.source] for rule in table if rule.source in found}
