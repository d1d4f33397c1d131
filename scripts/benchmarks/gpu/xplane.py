"""What a profiler's trace says of a GPU: when it was busy, with which kernels, launched how."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

DEVICE, STREAM = "/device:GPU:", "Stream"
"""How planes of GPUs, and lines of what ran on them, begin; other lines of the plane say the same by HLO module."""
GRAPH_LAUNCHES = ("cuGraphLaunch", "cudaGraphLaunch")
KERNEL_LAUNCHES = ("cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernel")


@dataclass(frozen=True)
class Seen:
    """The events of a trace."""

    kernels: tuple[tuple[str, float, float], ...]
    """Name, start and end in nanoseconds of what ran on the GPU, by start; copies among it."""
    graph_launches: int
    """Command buffers the host started."""
    kernel_launches: int
    """Kernels the host started alone."""
    host_events: int

    @property
    def busy(self) -> float:
        """The share of the time from the first start to the last end in which anything ran."""
        covered, reached = 0.0, self.kernels[0][1]
        for _, start, end in self.kernels:
            covered += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return covered / (reached - self.kernels[0][1])

    def per_step(self, steps: int, most: int = 12) -> dict[str, Any]:
        """Figures of a trace of `steps` equal steps, with the `most` longest kernels by name."""
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
    """The newest trace that `jax.profiler` wrote under a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no *.xplane.pb under {folder}")
    return seen(ProfileData.from_file(str(files[-1])))


def seen(data: ProfileData) -> Seen:
    """The events of all planes."""
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
