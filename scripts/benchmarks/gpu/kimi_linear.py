"""Measure decoding of one sequence with Kimi-Linear's widths, relative to the weights that a token uses."""

from benchmarks.gpu import cost, engines, models
from benchmarks.gpu.context import Context, Figures, bandwidth_shares

PROMPT, STEPS = 128, 256
"""Prompt tokens and decode steps of the sequence."""


def decode(context: Context) -> Figures:
    """Measure the milliseconds of a decode step, and the bandwidth over the weights that a token uses (its routed
    experts only).
    """
    prompt, steps = context.size((PROMPT, STEPS), (8, 16))
    subject = engines.build(
        context.size(models.KIMI_LINEAR, models.KIMI_LINEAR_TOY),
        max_num_seqs=1,
        max_model_len=prompt + steps + 16,
        prefill_buckets=(prompt,),
        max_num_batched_tokens=prompt,
    )
    found = engines.decode(subject.engine, rows=1, prompt=prompt, steps=steps)
    # XLA knows the products of all experts' shapes; a token touches those that it is routed to.
    touched = cost.Cost(models.touched_bytes(subject.module), 2 * models.touched_bytes(subject.module) / 2)
    weights, config = models.touched_bytes(subject.module), subject.module.config
    return {
        "kernel": subject.engine.runner.program.kernel,
        "layers": config.num_layers,
        "prompt_tokens": prompt,
        "steps": steps,
        "ms_a_step": 1e3 * found.seconds,
        "tokens_per_second": 1 / found.seconds,
        "weight_bytes_a_step": weights,
        "weight_bytes": models.step_bytes(subject.module),
        "init_seconds": subject.init_seconds,
        "compile_seconds": subject.compile_seconds,
        **bandwidth_shares(context, "step", weights / found.seconds),
        **cost.roofline(context, found.seconds, touched),
    }
