"""Tables of measured tiles: which calls they change, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.matmul import triton_grouped
from jaxinfer.kernels.triton import triton_tiles, tuned
from jaxinfer.kernels.triton.triton_launch import Options, Target
from jaxinfer.kernels.triton.triton_tiles import Layout

DEVICE = Target(90, 132, "NVIDIA H100 80GB HBM3")
SHAPE = dict(mean=4, groups=8, columns=1024, inner=512, itemsize=2)
KEY = "mean=4 groups=8 columns=1024 inner=512 itemsize=2"
ESTIMATED = triton_grouped.tiling(32, 8, 512, 2)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a table of the device into the user's folder."""
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path))
    tuned.table.cache_clear()
    yield (tmp_path / "NVIDIA_H100_80GB_HBM3.json").write_text
    tuned.table.cache_clear()


def chosen(**shape: int) -> triton_grouped.Tiling:
    return tuned.choose("grouped", SHAPE | shape, ESTIMATED, DEVICE)


def test_measured_tiles_replace_those_of_their_shape_and_device(write):
    entry = {"block_n": 256, "warps": 8, "us": 3.5, "estimated_us": 4.0}
    write(json.dumps({"device": DEVICE.kind, "tiles": {"grouped": {KEY: entry}}}))
    assert chosen() == replace(ESTIMATED, block_n=256, options=Options(8, ESTIMATED.options.stages))
    assert tuned.changed(ESTIMATED, tuned.entry_of(chosen())) == chosen()
    assert chosen(mean=8) == ESTIMATED
    assert tuned.choose("attend", SHAPE, ESTIMATED, DEVICE) == ESTIMATED
    assert tuned.choose("grouped", SHAPE, ESTIMATED, replace(DEVICE, kind="NVIDIA H200")) == ESTIMATED


def test_rows_of_a_query_tile_are_those_of_its_heads(write):
    layout = Layout(32, 8, 128, 128, latent=False, itemsize=2, tile=32, decode=False)
    write(json.dumps({"tiles": {"attend": {tuned.shape_text(vars(layout)): {"block_m": 16, "block_n": 32}}}}))
    estimated = triton_tiles.tiling(layout)
    assert tuned.choose("attend", vars(layout), estimated, DEVICE) == replace(estimated, block_n=32)
    assert "block_m" not in tuned.entry_of(estimated)


def test_a_device_without_a_table_gets_estimated_tiles(write):
    assert chosen() == ESTIMATED


def test_calls_are_collected_and_their_tiles_forced(write):
    with tuned.watching() as calls:
        assert chosen() == ESTIMATED
    with tuned.watching({"block_k": 32}):
        assert chosen() == replace(ESTIMATED, block_k=32)
    assert calls.estimated == {("grouped", KEY): ESTIMATED} and chosen() == ESTIMATED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no table of tiles"),
        ("[]", "is no table of tiles"),
        ('{"tiles": {"grouped": []}}', "is no table of tiles"),
        (json.dumps({"tiles": {"grouped": {KEY: 3}}}), f"grouped, {KEY}: it must be an object, got 3"),
        (
            json.dumps({"tiles": {"grouped": {KEY: {"block_n": 48}}}}),
            "block_n must be a power of two in [16, 1024], got 48",
        ),
        (
            json.dumps({"tiles": {"grouped": {KEY: {"stages": True}}}}),
            "stages must be an integer in [1, 1024], got True",
        ),
        (json.dumps({"tiles": {"grouped": {KEY: {"block_k": 8}}}}), "block_k must be a power of two in [16, 1024]"),
        (json.dumps({"tiles": {"grouped": {KEY: {"blocks": 2}}}}), "unknown field 'blocks'"),
    ],
)
def test_what_is_no_table_is_refused_with_its_name(write, text: str, message: str):
    write(text)
    with pytest.raises(ConfigError, match="NVIDIA_H100_80GB_HBM3.json") as caught:
        chosen()
    assert message in str(caught.value)
