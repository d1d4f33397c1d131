"""Summarise the GPU events of a profiler trace: busy time, kernels and launches."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

DEVICE, STREAM = "/device:GPU:", "Stream"
"""Prefixes of GPU planes and of their stream lines; other lines of a plane repeat the events by HLO module."""
GRAPH_LAUNCHES = ("cuGraphLaunch", "cudaGraphLaunch")
KERNEL_LAUNCHES = ("cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernel")


@dataclass(frozen=True)
class Seen:
    """GPU events of a trace."""

    kernels: tuple[tuple[str, float, float], ...]
    """Name, start and end in nanoseconds of kernels and copies on the GPU, sorted by start."""
    graph_launches: int
    """Number of command buffers launched by the host."""
    kernel_launches: int
    """Number of kernels launched by the host outside of command buffers."""
    host_events: int

    @property
    def busy(self) -> float:
        """Share of the time between the first start and the last end in which the GPU was busy."""
        covered, reached = 0.0, self.kernels[0][1]
        for _, start, end in self.kernels:
            covered += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return covered / (reached - self.kernels[0][1])

    def per_step(self, steps: int, most: int = 12) -> dict[str, Any]:
        """Return figures per step of a trace of `steps` equal steps, with the `most` longest kernels by name."""
        total, calls = Counter[str](), Counter[str]()
        for name, start, end in self.kernels:
            total[name] += end - start
            calls[name] += 1
        return {
            "busy_share": self.busy,
            "graph_launches_a_step": self.graph_launches / steps,
            "lone_kernel_launches_a_step": self.kernel_launches / steps,
            "kernels_a_step": len(self.kernels) / steps,
            "kernel_us_a_step": sum(total.values()) / steps / 1e3,
            "longest": [
                f"{ns / steps / 1e3:.1f} us, {calls[name] / steps:g} x {name}" for name, ns in total.most_common(most)
            ],
        }


def read(folder: Path) -> Seen:
    """Read the newest trace that `jax.profiler` wrote under a folder.

    Raises:
        FileNotFoundError: the folder has no trace.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no *.xplane.pb under {folder}")
    return seen(ProfileData.from_file(str(files[-1])))


def seen(data: ProfileData) -> Seen:
    """Collect the GPU events of all planes."""
    kernels, host = [], Counter[str]()
    for plane in data.planes:
        for line in plane.lines:
            if not plane.name.startswith(DEVICE):
                host.update(event.name for event in line.events)
            elif line.name.startswith(STREAM):
                kernels += [(e.name, e.start_ns, e.start_ns + e.duration_ns) for e in line.events]
    return Seen(
        tuple(sorted(kernels, key=lambda kernel: kernel[1])),
        sum(host[name] for name in GRAPH_LAUNCHES),
        sum(host[name] for name in KERNEL_LAUNCHES),
        host.total(),
    )
