"""Try XLA options for the steps one at a time, each in its own compilation."""

import gc

import jax

from benchmarks.gpu import engines, models
from benchmarks.gpu.context import Context, Figures

LAYERS = 8
"""Layers of the 8 B shape: enough that the head does not dominate, few enough to compile often."""
PROMPT, STEPS = 2048, 64
CANDIDATES: dict[str, dict[str, bool | int | str] | None] = {
    "default": None,
    "optimization_level O0": {"optimization_level": 9},
    "optimization_level O1": {"optimization_level": 19},
    "latency hiding scheduler": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "Triton GEMM off": {"xla_gpu_enable_triton_gemm": False},
    "cuBLASLt on": {"xla_gpu_enable_cublaslt": True},
    "autotune level 0": {"xla_gpu_autotune_level": 0},
    "autotune level 2": {"xla_gpu_autotune_level": 2},
    "command buffers off": {"xla_gpu_enable_command_buffer": ""},
    "command buffers from 1 kernel": {"xla_gpu_graph_min_graph_size": 1},
    "GEMM fusions all": {"xla_gpu_triton_gemm_any": True},
}
"""Name -> XLA options; `optimization_level` takes the values of `jax_optimization_level`."""


def run(context: Context) -> Figures:
    """Measure a decode step and a prefill of the engine under each candidate, in milliseconds."""
    shape = context.size(models.LLAMA_8B | {"num_hidden_layers": LAYERS}, models.TOY)
    prompt, steps = context.size((PROMPT, STEPS), (16, 8))
    candidates = context.size(CANDIDATES, dict.fromkeys(("default", "again")))
    figures: Figures = dict(context.kept) | {"layers": shape["num_hidden_layers"], "prompt": prompt}
    module = models.random(shape, engines.make_mesh())
    for name, options in candidates.items():
        if f"{name}: decode ms" in figures:
            continue
        engine = engines.engine_of(
            module,
            compiler_options=options,
            max_num_seqs=1,
            max_model_len=prompt + steps + 16,
            prefill_buckets=(prompt,),
            max_num_batched_tokens=prompt,
            kv_cache_memory_bytes=1 << 30,
        )
        try:
            figures[f"{name}: prefill ms"] = 1e3 * engines.prefill(engine, tokens=prompt)
            figures[f"{name}: decode ms"] = 1e3 * engines.decode(engine, rows=1, prompt=prompt, steps=steps).seconds
            figures[f"{name}: compile seconds"] = sum(engine.runner.compile_seconds.values())
        except (RuntimeError, jax.errors.JaxRuntimeError) as error:  # an option unknown to this XLA version
            figures[f"{name}: decode ms"] = str(error).splitlines()[0][:160]
        context.save(figures)
        engine.close()
        del engine
        gc.collect()  # free its cache before the next engine is made
    times = {key: value for key, value in figures.items() if key.endswith("decode ms") and isinstance(value, float)}
    if not times:
        raise RuntimeError(f"no candidate ran: {figures['default: decode ms']}")
    return figures | {"fastest_decode": min(times, key=times.__getitem__).removesuffix(": decode ms")}
