"""Trace and lower the program of a key."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.device_state import (
    abstract_cache,
    abstract_edits,
    abstract_features,
    abstract_rows,
    install_tables,
    replicated,
    shardings,
)
from jaxinfer.engine.runner.draft_steps import DraftFill, DraftSteps, abstract_draft_arguments, make_draft_step
from jaxinfer.engine.runner.encode_steps import (
    abstract_encode_arguments,
    abstract_joint_arguments,
    encode_joint_step,
    encode_step,
    make_encode_step,
)
from jaxinfer.engine.runner.keys import Copies, Encode, EncodeCross, EncodeJoint, InstallTables, Key
from jaxinfer.engine.runner.logits import SampleLogits, abstract_sample_arguments, make_sample_logits
from jaxinfer.engine.runner.mixed import Mixed
from jaxinfer.engine.runner.mixed_step import mixed_step
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.runner.steps import abstract_arguments, make_step
from jaxinfer.engine.sampling.sampler import install
from jaxinfer.functional import Program
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kv import cache as kv_cache


def lower(
    key: Key,
    program: Program,
    shapes: Shapes,
    params: Sequence[Any],
    options: Mapping[str, Any] | None,
    draft_params: Sequence[Any] = (),
) -> jax.stages.Lowered:
    """Trace and lower a program; the other arguments are those of `Programs`."""
    if isinstance(key, DraftFill | DraftSteps):
        step = make_draft_step(program, shapes, key, options)
        return step.lower(draft_params, *abstract_draft_arguments(program, shapes, key))
    if isinstance(key, Bucket | Mixed):
        body = mixed_step if isinstance(key, Mixed) else None
        step = make_step(program, shapes, key, options, body)
        return step.lower(params, *abstract_arguments(program, shapes, key))
    if isinstance(key, SampleLogits):
        arguments = abstract_sample_arguments(program, shapes, key)
        return make_sample_logits(program, shapes, key, options).lower(*arguments)
    sharding = replicated(program)
    array = partial(jax.ShapeDtypeStruct, sharding=sharding)
    if isinstance(key, Encode | EncodeJoint):
        if isinstance(key, Encode):
            body, inputs = partial(encode_step, program), array((key.count, *program.features.shape), np.float32)
            arguments = abstract_features(program, shapes), inputs, array((key.count,), np.int32)
        else:
            body, arguments = partial(encode_joint_step, program, key), abstract_joint_arguments(program, shapes, key)
        options = None if options is None else dict(options)
        step = jax.jit(body, donate_argnums=1, out_shardings=sharding, compiler_options=options)
        return step.lower(params, *arguments)
    if isinstance(key, EncodeCross):
        step = make_encode_step(program, shapes, key, options)
        return step.lower(params, *abstract_encode_arguments(program, shapes, key))
    if isinstance(key, Copies):
        cache, ids = abstract_cache(program, shapes), array((key.width,), np.int32)
        native = program.kernel == attention.NATIVE and program.mesh.size == 1
        copy = partial(kv_cache.copy_blocks, native=native)
        copy = jax.jit(copy, donate_argnums=0, out_shardings=shardings(cache))
        return copy.lower(cache, ids, ids)
    if isinstance(key, InstallTables):
        entries = array((4, key.width), np.int32)
        fill = jax.jit(install_tables, donate_argnums=0, out_shardings=sharding)
        return fill.lower(abstract_rows(program, shapes), entries)
    edits, number = abstract_edits(program, shapes), array((), np.int32)
    history, bias = (array(one.shape[1:], one.dtype) for one in edits)
    return jax.jit(install, donate_argnums=0, out_shardings=sharding).lower(edits, number, history, number, bias)
