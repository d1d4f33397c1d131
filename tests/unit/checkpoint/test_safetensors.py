"""Test the safetensors reader: it reads exactly the requested bytes, and every error names file and tensor."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint.hf import read_config
from jaxinfer.checkpoint.safetensors import INDEX, SINGLE, SafetensorsReader
from jaxinfer.checkpoint.safetensors_header import DTYPES
from jaxinfer.errors import CheckpointError


def write(path: Path, header: str | bytes | dict, data: bytes = b"", length: int | None = None) -> None:
    """Write a file with the given header, valid or not."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def shards(folder: Path, weight_map: dict[str, object], **files: dict[str, np.ndarray]) -> None:
    for stem, tensors in files.items():
        save_file(tensors, folder / f"{stem}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, *named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        SafetensorsReader(folder)
    for text in named:
        assert text in str(error.value)


@pytest.fixture
def ramp() -> np.ndarray:
    return np.arange(60, dtype=np.float32).reshape(6, 10)


def test_reads_one_file_whole_and_in_parts(tmp_path, ramp):
    save_file({"a.weight": ramp, "b": np.float16([1.5]), "scalar": np.array(7, np.int64)}, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader:
        assert sorted(reader.names()) == ["a.weight", "b", "scalar"]
        info = reader.info("a.weight")
        assert (info.file, info.dtype, info.shape) == (tmp_path / SINGLE, "F32", (6, 10))
        assert reader.total_bytes == 240 + 2 + 8
        np.testing.assert_array_equal(reader.read("a.weight"), ramp)
        rows = reader.read("a.weight", (slice(2, 4),))
        np.testing.assert_array_equal(rows, ramp[2:4])
        columns = reader.read("a.weight", (slice(None), slice(3, 7, 1)))
        np.testing.assert_array_equal(columns, ramp[:, 3:7])
        assert reader.read("a.weight", (slice(6, 5),)).shape == (0, 10)
        assert reader.read("scalar") == 7 and reader.read("scalar").shape == ()
        assert reader.read("scalar", ()) == 7


def test_a_part_is_a_view_of_the_file_and_outlives_the_reader(tmp_path, ramp):
    save_file({"a": ramp}, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader:
        whole, rows = reader.read("a"), reader.read("a", (slice(2, 4),))
        assert np.shares_memory(whole, rows) and not rows.flags.owndata and not rows.flags.writeable
        reader.release()
        np.testing.assert_array_equal(rows, ramp[2:4])
    np.testing.assert_array_equal(rows, ramp[2:4])
    with pytest.raises(CheckpointError, match="closed"):
        reader.read("a")


def test_release_gives_back_the_pages_that_were_read(tmp_path):
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def resident_mib() -> float:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1024

    save_file({"a": np.ones(2**25, np.uint8)}, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader:
        before = resident_mib()
        rows = reader.read("a", (slice(0, 2**12),))
        assert rows.sum() == 2**12
        assert resident_mib() - before < 8, "a part must not read the whole"
        assert reader.read("a").sum() == 2**25
        assert resident_mib() - before > 24
        reader.release()
        assert resident_mib() - before < 8
        assert rows.sum() == 2**12


@pytest.mark.parametrize("name", DTYPES)
def test_reads_every_dtype_unaligned_too(tmp_path, name):
    dtype = DTYPES[name]
    values = np.asarray([0, 1, 1, 2], np.float32).astype(dtype)
    size = values.nbytes
    header = {"odd": entry(0, 3), "x": entry(3, 3 + size, [2, 2], name)}
    write(tmp_path / SINGLE, header, b"abc" + values.tobytes())
    with SafetensorsReader(tmp_path) as reader:
        found = reader.read("x")
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(np.float32), values.reshape(2, 2).astype(np.float32))


def test_bfloat16_goes_to_jax(tmp_path):
    values = np.asarray([[1.0, -2.5], [0.0, 3.0]], ml_dtypes.bfloat16)
    save_file({"x": values}, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader:
        found = jnp.array(reader.read("x", (slice(1, 2),)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.device_get(found), values[1:])


def test_reads_shards_and_metadata_and_empty_tensors(tmp_path, ramp):
    none = np.zeros((0, 4), np.float32)
    save_file({"a": ramp, "none": none}, tmp_path / "one.safetensors", {"format": "pt"})
    weight_map = {"a": "one.safetensors", "none": "one.safetensors", "b": "two.safetensors"}
    shards(tmp_path, weight_map, two={"b": ramp + 1})
    with SafetensorsReader(tmp_path) as reader:
        assert sorted(reader.names()) == ["a", "b", "none"]
        assert reader.info("b").file == tmp_path / "two.safetensors"
        np.testing.assert_array_equal(reader.read("b", (slice(5, 6),)), ramp[5:] + 1)
        assert reader.read("none").shape == (0, 4)


def test_shards_may_be_links_out_of_the_folder_as_in_the_hubs_cache(tmp_path, ramp):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), folder.mkdir()
    save_file({"a": ramp}, blobs / "0123")
    (folder / "one.safetensors").symlink_to(blobs / "0123")
    shards(folder, {"a": "one.safetensors"})
    with SafetensorsReader(folder) as reader:
        np.testing.assert_array_equal(reader.read("a"), ramp)


@pytest.mark.parametrize(
    "part",
    [
        (slice(0, 7),),
        (slice(-1, None),),
        (slice(0, 4, 2),),
        (slice(0, -1),),
        (slice(None),) * 3,
    ],
)
def test_parts_that_numpy_would_clip_are_refused(tmp_path, ramp, part):
    save_file({"a": ramp}, tmp_path / SINGLE)
    refused_part = pytest.raises(CheckpointError, match=r"'a' of shape \(6, 10\)")
    with SafetensorsReader(tmp_path) as reader, refused_part:
        reader.read("a", part)


def test_an_unknown_tensor_is_named(tmp_path, ramp):
    save_file({"a": ramp}, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader, pytest.raises(CheckpointError, match="'b'"):
        reader.read("b")


def test_a_truncated_file_names_file_tensor_and_bytes(tmp_path):
    save_file({"a": np.ones(100, np.uint8), "z": np.ones(1000, np.uint8)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-400])
    refused(tmp_path, SINGLE, "'z'", "truncated", str(len(whole)), str(len(whole) - 400))


TWICE = (
    '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": '
    '{"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}'
)


@pytest.mark.parametrize(
    ("header", "data", "named"),
    [
        (TWICE, b"ab", ["'a'", "twice"]),
        ("{not json", b"", ["bad header"]),
        (b'{"a": "\xff"}', b"", ["bad header"]),
        ("[" * 100_000, b"", ["bad header"]),
        ("[1]", b"", ["bad header", "list"]),
        ({"a": 3}, b"", ["'a'", "dtype"]),
        ({"a": entry(0, 1, dtype="F4")}, b"a", ["'a'", "'F4'", "BF16"]),
        ({"a": entry(0, 1, dtype=["U8"])}, b"a", ["'a'", "dtype"]),
        ({"a": entry(0, 1, [-1])}, b"a", ["'a'", "[-1]"]),
        ({"a": entry(0, 1, [True])}, b"a", ["'a'", "[True]"]),
        ({"a": entry(0, 1, [1.0])}, b"a", ["'a'", "[1.0]"]),
        ({"a": entry(0, 4, [3])}, b"abcd", ["'a'", "3 bytes", "4"]),
        ({"a": entry(0, 1, [2**62, 2**62])}, b"a", ["'a'", str(2**124)]),
        ({"a": {**entry(0, 1), "data_offsets": [1, 0]}}, b"a", ["'a'", "[1, 0]"]),
        ({"a": {**entry(0, 1), "data_offsets": [0]}}, b"a", ["'a'", "[0]"]),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"abc", ["'b'", "overlaps"]),
        ({"a": entry(0, 2), "b": entry(3, 4)}, b"abcd", ["'b'", "gap"]),
        ({"a": entry(1, 2)}, b"ab", ["'a'", "gap"]),
        ({"a": entry(0, 2)}, b"abc", ["end at byte 70", "has 71 bytes"]),
        ({"a": entry(0, 9)}, b"abc", ["'a'", "truncated"]),
    ],
)
def test_a_bad_header_names_what_is_wrong(tmp_path, header, data, named):
    write(tmp_path / SINGLE, header, data)
    refused(tmp_path, SINGLE, *named)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", ["truncated", "found 0"]),
        (b"\x08\0\0", ["truncated", "found 3"]),
        ((1000).to_bytes(8, "little") + b"{}", ["truncated", "1008", "found 10"]),
        ((2**60).to_bytes(8, "little") + b"{}", ["bad header", str(2**60), "100000000"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git LFS", "git lfs pull"]),
    ],
)
def test_a_file_without_a_header_is_refused(tmp_path, content, named):
    (tmp_path / SINGLE).write_bytes(content)
    refused(tmp_path, SINGLE, *named)


@pytest.mark.parametrize(
    "file",
    [
        "../one.safetensors",
        "/etc/one.safetensors",
        "..\\one.safetensors",
        "C:one.safetensors",
        "a/../../one.safetensors",
        "one.bin",
        "",
        3,
        None,
        "a\0.safetensors",
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, ramp, file):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": ramp}, tmp_path / "one.safetensors")
    shards(folder, {"a": file})
    refused(folder, "'a'", repr(file), "inside the folder")


def test_an_index_and_its_shards_must_agree(tmp_path, ramp):
    shards(tmp_path, {"a": "one.safetensors", "b": "absent.safetensors"}, one={"a": ramp})
    refused(tmp_path, "'b'", "'absent.safetensors'", INDEX)
    swapped = {"a": "two.safetensors", "c": "one.safetensors"}
    shards(tmp_path, swapped, one={"a": ramp, "c": ramp}, two={"d": ramp})
    refused(tmp_path, "'a'", "'two.safetensors'", "lacks it")
    both = {"a": "one.safetensors", "d": "two.safetensors"}
    shards(tmp_path, both, one={"a": ramp}, two={"a": ramp, "d": ramp})
    refused(tmp_path, "'a'", "one.safetensors", "two.safetensors", "two files")


def test_a_name_in_an_index_that_its_shard_lacks_is_left_out_with_a_warning(tmp_path, ramp, caplog):
    """Saving a model whose head has become tied leaves the head's name in the index; transformers reads the shards."""
    shards(tmp_path, {"a": "one.safetensors", "lm_head.weight": "one.safetensors"}, one={"a": ramp})
    with SafetensorsReader(tmp_path) as reader:
        assert reader.names() == ["a"]
    assert "1 tensor(s) that their files lack" in caplog.text and "lm_head.weight (one.safetensors)" in caplog.text


def test_an_index_as_published_is_read(tmp_path, ramp):
    """Cover links as in the Hub's cache, two of them to one file, a size that is not an integer, and other formats."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    blobs.mkdir()
    (folder / "original").mkdir(parents=True)
    save_file({"a": ramp, "b": ramp}, blobs / "0a1b")
    for name in ("one.safetensors", "two.safetensors"):
        (folder / name).symlink_to("../blobs/0a1b")
    save_file({"c": ramp}, folder / "consolidated.safetensors")
    save_file({"c": ramp}, folder / "original/model.safetensors")
    index = {
        "metadata": {"total_size": 1.5e3, "by": "a tool"},
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
    }
    for metadata in (index["metadata"], None):
        (folder / INDEX).write_text(json.dumps(index | {"metadata": metadata}))
        with SafetensorsReader(folder) as reader:
            assert reader.names() == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ["PEFT adapter", "merge_and_unload"]),
        (["model-Q4_K_M.gguf"], ["path of the file", "model-Q4_K_M.gguf"]),
        (["params.json", "consolidated.safetensors", "tekken.json"], ["original format of Meta or Mistral"]),
        (["params.json", "consolidated.00.pth"], ["original format of Meta or Mistral"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ["run code", "save_pretrained"]),
        (["model-00001-of-00002.safetensors"], ["model-00001-of-00002.safetensors", "Fetch the missing file"]),
        (["model.onnx", "model.onnx_data"], ["ONNX", "safetensors checkpoint"]),
        (["onnx/model.onnx", "tokenizer.json"], ["ONNX", "safetensors checkpoint"]),
        (["openvino_model.bin", "openvino_model.xml"], ["OpenVINO", "safetensors checkpoint"]),
        (["global_step10/mp_rank_00_model_states.pt", "zero_to_fp32.py", "training_args.bin"], ["zero_to_fp32.py"]),
        (["pytorch_model_fsdp_0/__0_0.distcp"], ["accelerate merge-weights"]),
        (["checkpoint-500/model.safetensors", "training_args.bin"], ["Pass one of its checkpoints: checkpoint-500"]),
        (["training_args.bin", "optimizer.pt"], ["Pass the folder that save_pretrained"]),
    ],
)
def test_a_folder_of_another_kind_is_refused_by_what_it_is(tmp_path, files, named):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    assert all(text in str(error.value) for text in [*named, "config.json"])
    refused(tmp_path, SINGLE, *named)


def test_a_link_to_nothing_is_named(tmp_path):
    """As in the Hub's cache after a blob was removed: the link is dangling."""
    for name in ("config.json", SINGLE):
        (tmp_path / name).symlink_to(f"../../blobs/{name}")
    with pytest.raises(CheckpointError, match=r"config\.json is a link to .*/blobs/config\.json, which is absent"):
        read_config(tmp_path)
    refused(tmp_path, SINGLE, "is a link to", "which is absent")


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "{}",
        "[]",
        "nonsense",
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
    ],
)
def test_a_bad_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, INDEX)


def test_other_formats_are_refused_with_the_reason_and_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, SINGLE, INDEX, "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, "pytorch_model.bin", "code", "save_pretrained")
    refused(tmp_path / "absent", "absent", "nothing")
