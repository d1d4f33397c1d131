"""Define the context a row runs in, and how a row reports that it cannot run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Figures of a row: name -> number, text, or list of numbers."""

PEAK_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA H200": 4.8e12,
}
"""Memory bandwidth in bytes per second from NVIDIA's data sheets, by JAX's `device_kind`."""


class Skip(Exception):
    """Raised by a row that cannot run here; the message names what is missing."""


@dataclass(frozen=True)
class Context:
    """Settings of a row's run."""

    out: Path
    """Folder of all results."""
    dry: bool
    """Whether to use toy sizes, to check that the code runs."""
    peer_python: str
    """Python interpreter with torch and transformers."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Figures of an earlier, interrupted run of this row."""
    save: Callable[[Figures], None] = lambda figures: None
    """Function that saves the figures measured so far, in case the row is interrupted."""

    def size(self, full: Any, toy: Any) -> Any:
        """Return `toy` in a dry run, else `full`."""
        return toy if self.dry else full

    def figures(self, row: str) -> Figures:
        """Return the figures of another row; empty if it has not run."""
        path = self.out / f"{row}.json"
        return json.loads(path.read_text())["figures"] if path.exists() else {}


def bandwidth_shares(context: Context, name: str, rate: float) -> Figures:
    """Return a rate in bytes per second as shares of the data sheet's bandwidth and of the copy bandwidth, where
    known.
    """
    shares = {f"{name}_gb_per_second": rate / 1e9}
    peak, copied = peak_bandwidth(), context.figures("roofline").get("copy_gb_per_second")
    if peak is not None:
        shares[f"{name}_share_of_peak"] = rate / peak
    if copied:
        shares[f"{name}_share_of_copy"] = rate / 1e9 / copied
    return shares


def peak_bandwidth() -> float | None:
    """Return the data sheet's bandwidth of the device in use in bytes per second; None if it is unknown."""
    import jax

    return PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
