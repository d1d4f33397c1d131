"""Measure an 8 B-shaped Llama: decode of one sequence, prefill, start-up, and a trace of decode steps."""

import shutil
from typing import Any

import jax

from benchmarks.gpu import cost, engines, models, xplane
from benchmarks.gpu.context import Context, Figures, Skip, bandwidth_shares
from benchmarks.gpu.engines import Subject

PROMPT, STEPS = 128, 256
"""Prompt tokens and decode steps of the sequence."""
TRACED = 32
"""Number of traced decode steps."""


def _subject(context: Context, *, prompt: int, new: int) -> Subject:
    """Make the model and an engine for one sequence whose prompt is prefilled in one step."""
    return engines.build(context.size(models.LLAMA_8B, models.TOY), **_settings(prompt, new))


def _settings(prompt: int, new: int) -> dict[str, Any]:
    return {
        "max_num_seqs": 1,
        "max_model_len": prompt + new,
        "prefill_buckets": (prompt,),
        "max_num_batched_tokens": prompt,
    }


def _decoding(context: Context) -> tuple[Subject, int, int]:
    """Return the subject, the prompt length, and the number of measured steps."""
    prompt, steps = context.size((PROMPT, STEPS), (8, 16))
    return _subject(context, prompt=prompt, new=steps + 16), prompt, steps


def decode(context: Context) -> Figures:
    """Measure the milliseconds of a decode step, and its bandwidth over weights and live keys and values."""
    subject, prompt, steps = _decoding(context)
    engine = subject.engine
    found = engines.decode(engine, rows=1, prompt=prompt, steps=steps)
    weights = models.step_bytes(subject.module)
    bytes_ = weights + subject.token_bytes * found.positions
    return {
        "kernel": engine.runner.program.kernel,
        "prompt_tokens": prompt,
        "steps": steps,
        "ms_a_step": 1e3 * found.seconds,
        "tokens_per_second": 1 / found.seconds,
        "weight_bytes_a_step": weights,
        "kv_bytes_a_step": subject.token_bytes * found.positions,
        "init_seconds": subject.init_seconds,
        "compile_seconds": subject.compile_seconds,
        **bandwidth_shares(context, "step", bytes_ / found.seconds),
        **cost.roofline(context, found.seconds, _with_attention(engine, subject.token_bytes * found.positions)),
    }


def _with_attention(engine: Any, bytes_: float) -> cost.Cost | None:
    """Return the cost of a decode step, with the keys and values that the attention kernel reads."""
    step = cost.of_step(engine, "decode")
    return None if step is None else step.more(bytes=bytes_ if engine.runner.program.kernel == "triton" else 0)


def prefill(context: Context) -> Figures:
    """Measure the rate of a prompt's products, including causal attention, relative to that of large products in the
    same run.
    """
    tokens = context.size(4096, 64)
    subject = _subject(context, prompt=tokens, new=1)
    seconds = engines.prefill(subject.engine, tokens=tokens)
    spec = subject.module.config.attention
    each, head = models.matrix_sizes(subject.module)
    gemms = 2 * (each * tokens + head)
    # Scores and weighted values of every query over the keys up to its position.
    attention = 4 * spec.heads * spec.head_dim * subject.module.config.num_layers * tokens * (tokens + 1) // 2
    figures = {
        "kernel": subject.engine.runner.program.kernel,
        "tokens": tokens,
        "ms": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": (gemms + attention) / seconds / 1e12,
        "gemm_tflops": gemms / seconds / 1e12,
        "compile_seconds": subject.compile_seconds,
    }
    step = cost.of_step(subject.engine, "prefill")
    own = attention if subject.engine.runner.program.kernel == "triton" else 0
    figures |= cost.roofline(context, seconds, None if step is None else step.more(flops=own))
    rate = context.figures("roofline").get("matmul_square_tflops")
    if rate:
        figures |= {"share_of_matmul": figures["tflops"] / rate, "gemm_share_of_matmul": figures["gemm_tflops"] / rate}
    return figures


def command_buffers(context: Context) -> Figures:
    """Trace decode steps: how busy the GPU was, graph launches and kernels per step."""
    subject, prompt, _ = _decoding(context)
    engine, steps = subject.engine, context.size(TRACED, 4)
    engines.decode(engine, rows=1, prompt=prompt, steps=steps)
    engines.start_decode(engine, rows=1, prompt=prompt, steps=steps)
    folder = context.out / "command-buffers.trace"
    shutil.rmtree(folder, ignore_errors=True)
    jax.block_until_ready(engine.runner.rows.tokens)
    with jax.profiler.trace(str(folder)):
        seconds = engines.run_steps(engine, steps)
    engines.drain(engine)
    found = xplane.read(folder)
    figures = {"steps": steps, "ms_a_step_traced": 1e3 * seconds / steps, "host_events": found.host_events}
    if not found.kernels:
        if context.dry:
            return figures
        raise Skip("the trace holds no events of a GPU; is CUPTI installed?")
    return figures | found.per_step(steps)


def startup(context: Context) -> Figures:
    """Measure the seconds until the steps of one sequence are compiled, with an empty and a filled compilation
    cache.
    """
    cache = context.out / "startup.compiled"
    shutil.rmtree(cache, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    prompt, steps = context.size((PROMPT, 8), (8, 4))
    subject = _subject(context, prompt=prompt, new=steps + 16)
    figures: Figures = {"init_seconds": subject.init_seconds}
    engine = subject.engine
    for state in ("cold", "warm"):
        if state == "warm":
            engine.close()
            engine.runner.cache.clear()  # free the cache before the next engine is made
            jax.clear_caches()
            engine = engines.engine_of(subject.module, **_settings(prompt, steps + 16))
        engines.decode(engine, rows=1, prompt=prompt, steps=steps)
        seconds = {str(bucket): taken for bucket, taken in engine.runner.compile_seconds.items()}
        figures |= {f"{state}_seconds": sum(seconds.values()), f"{state} steps": seconds}
        context.save(figures)
    return figures
