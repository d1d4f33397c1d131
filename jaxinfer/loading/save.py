"""Export a module's weights to the tensors of a checkpoint."""

from collections.abc import Sequence

import numpy as np
from flax import nnx

from jaxinfer.checkpoint.rules import parameters
from jaxinfer.checkpoint.weight_table import Rule


def tensors(module: nnx.Module, table: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Return the weights of a module under their checkpoint names (the first name of each).

    Args:
        module: unquantised, on one device, with unpadded heads.
        table: `Family.weight_rules` of its configuration.

    Raises:
        ValueError: the module is sharded or quantised.
    """
    params, found = parameters(module), {}
    for path, param in params.items():
        if "scales_of" in param.get_metadata():
            raise ValueError(f"{path} is quantised to int8; load the module with quantization=None to export it")
    for rule in table:
        if rule.target is None or rule.tied:
            continue
        param = params[rule.target]
        values, metadata = np.asarray(param[...]), param.get_metadata()
        if rule.parts:
            outputs, stacked = metadata["outputs"], int(metadata.get("stacked", False))
            if values.shape[stacked] != 1:
                raise ValueError(
                    f"{rule.target} is sharded over {values.shape[stacked]} devices; load the module on one device"
                )
            ends = np.cumsum([output.rows for output in outputs])[:-1]
            pieces = np.split(np.take(values, 0, axis=stacked), ends, axis=stacked)
            named = dict(zip((output.name for output in outputs), pieces, strict=True))
            values = np.concatenate([named[part] for part in rule.parts], axis=stacked)
        found[rule.source] = np.ascontiguousarray(values)
    return found
