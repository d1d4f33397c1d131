"""What a row is given, and how it says that it cannot be run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Name -> number, text, or a list of numbers."""

PEAK_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA H200": 4.8e12,
}
"""Bytes a second of a device's memory by NVIDIA's data sheets, by JAX's `device_kind`."""


class Skip(Exception):
    """A row cannot be run here; the message says what it lacks."""


@dataclass(frozen=True)
class Context:
    """Where and how a row runs."""

    out: Path
    """The folder of all results."""
    dry: bool
    """Toy sizes, to see that the code runs."""
    peer_python: str
    """An interpreter with torch and transformers."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Figures of an earlier run of this row that was cut short."""
    save: Callable[[Figures], None] = lambda figures: None
    """Keeps what has been measured so far, should the row be cut short."""

    def size(self, full: Any, toy: Any) -> Any:
        """`toy` in a dry run."""
        return toy if self.dry else full

    def figures(self, row: str) -> Figures:
        """What another row found; empty if it has not run."""
        path = self.out / f"{row}.json"
        return json.loads(path.read_text())["figures"] if path.exists() else {}


def bandwidth_shares(context: Context, name: str, rate: float) -> Figures:
    """A rate in bytes a second as shares of the data sheet's and of the copy bandwidth, where these are known."""
    shares = {f"{name}_gb_per_second": rate / 1e9}
    peak, copied = peak_bandwidth(), context.figures("roofline").get("copy_gb_per_second")
    if peak is not None:
        shares[f"{name}_share_of_peak"] = rate / peak
    if copied:
        shares[f"{name}_share_of_copy"] = rate / 1e9 / copied
    return shares


def peak_bandwidth() -> float | None:
    """Bytes a second of the device in use by its data sheet, if it is known here."""
    import jax

    return PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
