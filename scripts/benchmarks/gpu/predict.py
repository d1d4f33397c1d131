"""Predict rows from programs compiled for an H100 without one: `bench.py gpu --predict`.

The model: a step takes the longer of its bytes at the bandwidth that copies reach and its operations at the rate that
large products reach, and a gap for each kernel. The three constants are estimates; the first run on a GPU measures
them (`roofline`, `command-buffers`), and shows where the model is wrong. Models of 2 and 3 layers are compiled, and the
difference is taken for each further layer.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu import attention, compiled, cost, models, projections
from benchmarks.gpu.cost import Cost

PEAK_BANDWIDTH, PEAK_RATE = 3.352e12, 989e12
"""Of an H100 SXM: bytes, and bfloat16 operations, per second (NVIDIA's data sheet)."""
COPY_SHARE, MATMUL_SHARE, GAP = 0.92, 0.70, 1.0e-6
"""Estimates: share of the peak bandwidth that copies reach, share of the peak rate that large products reach, seconds
between kernels of a command buffer."""
BANDWIDTH, RATE = COPY_SHARE * PEAK_BANDWIDTH, MATMUL_SHARE * PEAK_RATE


def seconds(step: Cost) -> float:
    """Return the predicted seconds of a step."""
    return step.least(BANDWIDTH, RATE) + GAP * step.kernels


def of_model(hf: Mapping[str, Any], kind: str, **sizes: int) -> Cost:
    """Return the cost of a step of all layers, without attention's own reads and products."""
    two, three = (_compiled(dict(hf) | {"num_hidden_layers": layers}, kind, sizes) for layers in (2, 3))
    more = hf["num_hidden_layers"] - 2
    return Cost(*(a + more * (b - a) for a, b in ((getattr(two, n), getattr(three, n)) for n in vars(two))))


def _compiled(hf: dict[str, Any], kind: str, sizes: Mapping[str, int]) -> Cost:
    program, lowered = compiled.step_and_lowered(hf, kind, 1, **sizes)
    step = cost.of(program.executable.as_text(), lowered, len(program.kernels))
    return step.more(bytes=program.sampler.moved_bytes)


def kv_bytes(hf: Mapping[str, Any], positions: int) -> int:
    """Return the bytes of keys and values of `positions` positions over all layers."""
    return 2 * 2 * hf["num_hidden_layers"] * hf["num_key_value_heads"] * hf["head_dim"] * positions


def predictions() -> dict[str, str]:
    """Return the predicted figures by row; compiles eight programs, two minutes on two cores."""
    found = {"roofline": f"copy {BANDWIDTH / 1e12:.2f} TB/s, matmul {RATE / 1e12:.0f} TFLOP/s (assumed)"}
    hf = models.LLAMA_8B
    step = of_model(hf, "decode", rows=1).more(bytes=kv_bytes(hf, 256))
    taken = seconds(step)
    found["decode-1"] = f"{1e3 * taken:.2f} ms, {step.bytes / taken / PEAK_BANDWIDTH:.0%} of peak bandwidth"
    found["command-buffers"] = f"2 a step, busy {1 - GAP * step.kernels / taken:.0%} ({step.kernels:.0f} kernels)"
    tokens = 4096
    causal = 4 * hf["num_attention_heads"] * hf["head_dim"] * hf["num_hidden_layers"] * tokens * (tokens + 1) // 2
    step = of_model(hf, "prefill", rows=1, chunk=tokens).more(flops=causal)
    taken = seconds(step)
    found["prefill-4096"] = f"{1e3 * taken:.0f} ms, {step.flops / taken / RATE:.0%} of the matmul rate"
    found["throughput-64"] = throughput(models.LLAMA_1B)
    bytes_ = 2 * 64 * 4096 * 2 * attention.KV_HEADS * attention.DIM
    taken = bytes_ / BANDWIDTH + 2 * GAP
    found["attention-decode"] = f"{1e6 * taken:.0f} us, {bytes_ / BANDWIDTH / taken:.0%} of copy bandwidth"
    width, rank = sum(projections.KDA_COLUMNS), projections.KDA_COLUMNS[-1]
    bytes_ = 2 * (width * projections.KDA_DEPTH + 2 * rank * projections.KDA_COLUMNS[0])
    found["kda-decode"] = f"{1e6 * (bytes_ / BANDWIDTH + 2 * GAP):.1f} us"
    text, image, model, q, kv = 16 * 32, 16 * 6404, 4096, 4096, 2 * 1024
    ours, padded = text * q + image * kv, (text + image) * (q + kv)
    found["cross-attention"] = f"{2e3 * ours * model / RATE:.2f} ms, {padded / ours:.1f} x"
    found["growth"] = growth(models.LLAMA_1B)
    return found


def throughput(hf: Mapping[str, Any]) -> str:
    """Predict 64 requests of 512 + 256 tokens: prefills of 2048 tokens, then decode steps of 64 rows."""
    decode = seconds(of_model(hf, "decode", rows=64).more(bytes=kv_bytes(hf, 64 * (512 + 128))))
    prefill = seconds(of_model(hf, "prefill", rows=8, chunk=2048))
    whole = 64 * 512 / 2048 * prefill + 256 * decode
    return f"{64 * 256 / whole:,.0f} tokens/s (decode {1e3 * decode:.2f} ms, prefill of 2048 {1e3 * prefill:.1f} ms)"


def growth(hf: Mapping[str, Any]) -> str:
    """Predict concatenation over paged growth of 8 sequences from 3072 to 4096 positions: K/V written again."""
    step = of_model(hf, "decode", rows=8)
    live = kv_bytes(hf, 8 * 3584)
    paged, copied = seconds(step.more(bytes=live)), seconds(step.more(bytes=3 * live))
    return f"{copied / paged:.2f} x over concatenation ({1e3 * paged:.2f} ms a step)"


def table() -> str:
    """Return the predictions as a Markdown table."""
    return "\n".join(
        ["| row | predicted |", "|---|---|", *(f"| `{n}` | {text} |" for n, text in predictions().items())]
    )
