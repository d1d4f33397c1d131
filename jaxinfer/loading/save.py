"""From a module back to the tensors of a checkpoint, by the weight table that reads them."""

from collections.abc import Sequence

import numpy as np
from flax import nnx

from jaxinfer.checkpoint.rules import Rule, parameters


def tensors(module: nnx.Module, table: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The weights of a module on one device under the names of its checkpoint, the first of each where it has several.

    Args:
        module: with whole heads, as on one device without padding, and not quantised.
        table: `Family.weight_rules` of its configuration.

    Raises:
        ValueError: a module that was divided or quantised: what it keeps is laid out for its devices.
    """
    params, found = parameters(module), {}
    for path, param in params.items():
        if "scales_of" in param.get_metadata():
            raise ValueError(
                f"{path}: int8 has not the numbers of the checkpoint; load the module without quantization"
            )
    for rule in table:
        if rule.target is None or rule.tied:
            continue
        param = params[rule.target]
        values, metadata = np.asarray(param[...]), param.get_metadata()
        if rule.parts:
            outputs, stacked = metadata["outputs"], int(metadata.get("stacked", False))
            if values.shape[stacked] != 1:
                raise ValueError(
                    f"{rule.target} is divided over {values.shape[stacked]} devices; load the module on one"
                )
            ends = np.cumsum([output.rows for output in outputs])[:-1]
            pieces = np.split(np.take(values, 0, axis=stacked), ends, axis=stacked)
            named = dict(zip((output.name for output in outputs), pieces, strict=True))
            values = np.concatenate([named[part] for part in rule.parts], axis=stacked)
        found[rule.source] = np.ascontiguousarray(values)
    return found
