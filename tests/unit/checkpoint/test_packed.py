"""Test that quantised weights of published formats are dequantised as the tools that write them do.

`data/packed.safetensors` has one matrix as compressed-tensors 0.20, bitsandbytes 0.50 and MLX 0.32 pack it, each with
the values that the same tool unpacks. GPTQ, AWQ, ModelOpt and DeepSeek's blocks are packed here, value by value.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import checkpoint, loaded
from support.memory import MemorySource
from support.tiny import prompt

from jaxinfer.checkpoint.packed.declared import declared
from jaxinfer.checkpoint.packed.source import DequantisedSource
from jaxinfer.checkpoint.safetensors import DTYPES
from jaxinfer.errors import CheckpointError, ConfigError

PACKED = Path(__file__).parent / "data" / "packed.safetensors"
LLAMA = {"architectures": ["LlamaForCausalLM"]}
BFLOAT16 = 2**-7
"""Error of two roundings to bfloat16."""
AWQ_PACKING = (0, 2, 4, 6, 1, 3, 5, 7)
"""Value that AWQ puts at each position of a word."""


def _tools() -> dict[str, dict]:
    with safe_open(PACKED, "numpy") as file:
        return json.loads(file.metadata()["configs"])


def _tensors(case: str) -> dict[str, np.ndarray]:
    """Read the tensors of one case; NumPy has no FP8 of its own, so that the file's bytes are read."""
    raw = PACKED.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, found = json.loads(raw[8 : 8 + size]), {}
    for name, info in header.items():
        if name.startswith(f"{case}/"):
            start, end = (8 + size + offset for offset in info["data_offsets"])
            found[name.removeprefix(f"{case}/")] = np.frombuffer(raw[start:end], DTYPES[info["dtype"]]).reshape(
                info["shape"]
            )
    return found


def source(tensors: dict[str, np.ndarray], quantisation: dict) -> DequantisedSource:
    field = "quantization" if "quant_method" not in quantisation else "quantization_config"
    return DequantisedSource(MemorySource(tensors), declared(LLAMA | {field: quantisation}))


def assert_dequantised(made: DequantisedSource, expected: np.ndarray, rtol: float = 2e-7) -> None:
    """Compare the whole matrix, and parts that begin inside of words, groups and blocks."""
    assert made.names() == ["module.weight"] and made.info("module.weight").shape == expected.shape
    found = made.read("module.weight")
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=0)
    for rows, columns in ((slice(5, 9), slice(3, 37)), (slice(0, 1), slice(63, 65)), (slice(4, 4), slice(0, 8))):
        np.testing.assert_array_equal(made.read("module.weight", (rows, columns)), found[rows, columns])
    np.testing.assert_array_equal(made.read("module.weight", (slice(2, 7),)), found[2:7])


@pytest.mark.parametrize("case", sorted(_tools()))
def test_weights_are_those_that_the_tool_unpacks(case):
    tensors = _tensors(case)
    expected = tensors.pop("expected")
    assert np.abs(expected).max() > 1
    # compressed-tensors computes NVFP4 in bfloat16.
    assert_dequantised(source(tensors, _tools()[case]), expected, BFLOAT16 if case == "ct-nvfp4" else 2e-7)


def pack(values: np.ndarray, bits: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Pack rows of integers into words, one value after the other; `order` is used for 4 bits."""
    rows, columns = values.shape
    words = [[0] * -(-columns * bits // 32) for _ in range(rows)]
    for row in range(rows):
        for column in range(columns):
            at = column * bits if bits != 4 else column // 8 * 32 + 4 * order.index(column % 8)
            value = int(values[row, column]) << (at % 32)
            words[row][at // 32] |= value & 0xFFFFFFFF
            if value >> 32:
                words[row][at // 32 + 1] |= value >> 32
    return np.array(words, np.uint32).view(np.int32)


def integers(bits: int, group: int, rows: int = 32, columns: int = 64, sorted_groups: bool = True):
    """Return random codes, zero points, scales and each column's group, and the matrix that they stand for."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (rows, columns))
    order = np.arange(columns) // group
    order = order if sorted_groups else rng.permutation(order)
    zeros, scales = rng.integers(1, 2**bits, (rows, columns // group)), rng.random((rows, columns // group)) + 0.5
    scales = scales.astype(np.float16)
    return codes, zeros, scales, order, (codes - zeros[:, order]) * scales[:, order].astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "group", "layout", "activation_order"),
    [
        (4, 16, None, False),
        (4, 16, "gptq_v2", True),
        (8, 32, "gptq", True),
        (3, 32, "gptq", False),
        (2, 64, None, True),
    ],
)
def test_gptq(bits, group, layout, activation_order):
    codes, zeros, scales, order, expected = integers(bits, group, sorted_groups=not activation_order)
    tensors = {
        "module.qweight": pack(codes, bits).T.copy(),
        "module.qzeros": pack(zeros.T - (layout != "gptq_v2"), bits),
        "module.scales": scales.T.copy(),
        "module.g_idx": order.astype(np.int32),
    }
    stated = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": activation_order}
    made = source(tensors, stated | ({"checkpoint_format": layout} if layout else {}))
    assert_dequantised(made, expected)


def test_awq():
    codes, zeros, scales, _, expected = integers(4, 32)
    tensors = {
        "module.qweight": pack(codes.T, 4, AWQ_PACKING),
        "module.qzeros": pack(zeros.T, 4, AWQ_PACKING),
        "module.scales": scales.T.copy(),
    }
    stated = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    assert_dequantised(source(tensors, stated), expected)


@pytest.mark.parametrize("block", [[8, 16], None])
def test_fp8_with_blocks_that_do_not_divide_the_matrix_and_with_one_scale(block):
    rng, (rows, columns) = np.random.default_rng(0), (20, 72)
    values = rng.normal(size=(rows, columns)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random((3, 5) if block else ()).astype(np.float32) + np.float32(0.5)
    each = np.kron(scales, np.ones((8, 16), np.float32))[:rows, :columns] if block else scales
    name = "module.weight_scale_inv" if block else "module.weight_scale"
    tensors = {"module.weight": values, name: np.asarray(scales), "module.input_scale": np.float32(1).reshape(1)}
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    assert_dequantised(source(tensors, stated), values.astype(np.float32) * each)


def test_nvfp4_of_modelopt():
    tensors = _tensors("ct-nvfp4")
    expected = tensors.pop("expected")
    tensors["module.weight"] = tensors.pop("module.weight_packed")
    tensors["module.weight_scale_2"] = 1 / tensors.pop("module.weight_global_scale")[0]
    tensors["module.input_scale"] = np.ones(1, np.float32)
    assert_dequantised(source(tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}), expected, BFLOAT16)


def quantise(folder: Path) -> Path:
    """Quantise a tiny checkpoint's projections in GPTQ's layout; return a folder with their dequantised values."""
    tensors, plain, rng = load_file(folder / "model.safetensors"), {}, np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, module = tensors.pop(name), name.removesuffix(".weight")
        rows, columns = weight.shape
        codes, order = rng.integers(0, 16, (rows, columns)), rng.permutation(np.arange(columns) // 16)
        zeros = rng.integers(1, 16, (rows, columns // 16))
        scales = (rng.random(zeros.shape) * 0.05 + 0.01).astype(np.float16)
        plain[name] = ((codes - zeros[:, order]) * scales[:, order].astype(np.float32)).astype(np.float32)
        tensors[f"{module}.qweight"] = pack(codes, 4).T.copy()
        tensors[f"{module}.qzeros"] = pack(zeros.T - 1, 4)
        tensors[f"{module}.scales"], tensors[f"{module}.g_idx"] = scales.T.copy(), order.astype(np.int32)
    other = folder.parent / "plain"
    other.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value for name, value in tensors.items() if "_proj." not in name} | plain, other / "model.safetensors"
    )
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    save_file(tensors, folder / "model.safetensors")
    return other


@pytest.mark.parametrize(("tp", "quantization"), [(1, None), (2, None), (2, "int8")])
def test_a_quantised_checkpoint_loads_as_its_dequantised_weights(tp, quantization, tmp_path):
    folder = checkpoint.write(tmp_path / "quantised", with_tokenizer=False)
    other = quantise(folder)
    (_, found), (_, expected) = (loaded.load(one, "float32", tp, quantization) for one in (folder, other))
    assert len(found) == len(expected)
    for own, wanted in zip(found, expected, strict=True):
        assert own.sharding == wanted.sharding
        np.testing.assert_array_equal(own, wanted)
    if tp == 1:
        prompts, following = [prompt(7, 0)], [prompt(3, 1)]
        ours, theirs = (loaded.logits(one, prompts, following) for one in (folder, other))
        np.testing.assert_array_equal(ours[0], theirs[0])


def damaged(case: str, name: str, change) -> DequantisedSource:
    tensors = {key: value for key, value in _tensors(case).items() if key != "expected"}
    if change is None:
        del tensors[f"module.{name}"]
    else:
        tensors[f"module.{name}"] = change(tensors[f"module.{name}"])
    return source(tensors, _tools()[case])


@pytest.mark.parametrize(
    ("case", "name", "change", "message"),
    [
        ("ct-int4-group", "weight_shape", None, "'module.weight_shape' is missing"),
        ("ct-int4-group", "weight_shape", lambda x: x + 1, r"\[12, 16\] does not hold a matrix of shape \[13, 129\]"),
        ("ct-int4-group", "weight_scale", lambda x: np.repeat(x, 2, 1), r"4 group\(s\) for 128 columns.*groups of 64"),
        ("ct-int4-asymmetric", "weight_zero_point", lambda x: x[:1], r"expected shape \[2, 4\], found \[1, 4\]"),
        ("ct-fp8-block", "weight_scale", lambda x: x[:1], r"\[1, 2\] does not fit a matrix.*blocks of 8 x 64"),
        ("ct-nvfp4", "weight_global_scale", None, "'module.weight_global_scale' is missing"),
        ("ct-mxfp4", "weight_scale", lambda x: x[:, :3], r"expected shape \[12, 4\], found \[12, 3\]"),
        ("bnb-nf4-nested", "weight", lambda x: x[:-1], "has 767 bytes and 16 values of codes"),
        ("bnb-nf4-nested", "weight.nested_absmax", lambda x: x[:0], "do not fit quant_state"),
        ("bnb-nf4", "weight.absmax", lambda x: x[1:], "has 23 values; 1536 values in blocks of 64 need 24"),
        ("bnb-nf4", "weight.quant_state.bitsandbytes__nf4", lambda x: x[1:], "is not the JSON object"),
        ("mlx-4", "scales", lambda x: x[:, :1], r"do not fit integers of 4 bits in groups of 64"),
        ("mlx-4", "biases", None, "'module.biases' is missing"),
    ],
)
def test_tensors_that_contradict_the_format_are_named(case, name, change, message):
    with pytest.raises(CheckpointError, match=message):
        damaged(case, name, change)


def test_groups_of_gptq_are_checked():
    codes, zeros, scales, order, _ = integers(4, 16)
    tensors = {"m.qweight": pack(codes, 4).T.copy(), "m.qzeros": pack(zeros.T, 4), "m.scales": scales.T.copy()}
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    with pytest.raises(CheckpointError, match="'m.g_idx' has groups from 0 to 4; there are 4"):
        source(tensors | {"m.g_idx": np.where(order == 3, 4, order).astype(np.int32)}, stated)
    with pytest.raises(CheckpointError, match=r"4 group\(s\) for 64 columns: .*groups of 128"):
        source(tensors, stated | {"group_size": 128})
    with pytest.raises(CheckpointError, match="'m.qzeros' is missing"):
        source({name: value for name, value in tensors.items() if name != "m.qzeros"}, stated)


def test_a_declaration_without_quantised_tensors_is_refused():
    with pytest.raises(
        CheckpointError, match=r"no tensor is of this format.*hf_overrides=\{'quantization_config': None"
    ):
        source({"m.weight": np.ones((4, 4), np.float32)}, {"quant_method": "fp8"})


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "aqlm"}, "'aqlm'.*this format is not read.*hf_overrides"),
        ({"quant_method": ["gptq"]}, "this format is not read"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 64}, "bits=5 is not one of 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0 must be -1 or a positive integer"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}}, "dynamic: modules with settings of their own"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version='gemv' is not gemm"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size=\[128\] must be two positive"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ' is not one of FP8"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format='marlin-24' is not one of"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "sparse weights are not read",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "transform_config": {"config_groups": {"u": {}}},
            },
            "weights that need transformed activations",
        ),
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, "mode='mxfp4' is not affine"),
        (True, "this format is not read"),
    ],
)
def test_formats_and_settings_that_are_not_read_are_refused(stated, message):
    field = "quantization_config" if not isinstance(stated, dict) or "quant_method" in stated else "quantization"
    with pytest.raises(ConfigError, match=message):
        declared(LLAMA | {field: stated})


def test_mlx_is_read_for_architectures_whose_weights_it_keeps():
    with pytest.raises(ConfigError, match="MLX changes weights of this architecture"):
        declared({"architectures": ["Qwen3NextForCausalLM"], "quantization": {"bits": 4, "group_size": 64}})


@pytest.mark.parametrize(
    ("packing", "method"), [("auto_round:auto_gptq", "gptq"), ("auto_round:auto_awq", "awq"), ("auto_round:nvfp", None)]
)
def test_auto_round_is_read_by_its_packing(packing, method):
    stated = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 128}
    if method is None:
        with pytest.raises(ConfigError, match="'auto-round'.*this format is not read"):
            declared(LLAMA | {"quantization_config": stated})
    else:
        format = declared(LLAMA | {"quantization_config": stated})
        assert (format.method, format.bits, format.group_sizes) == (method, (4,), (128,))
