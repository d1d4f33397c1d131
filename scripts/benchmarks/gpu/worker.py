"""Run one row in its own process: `python -m benchmarks.gpu.worker ROW OUT PEER_PYTHON [dry]`."""

import json
import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.context import Context, Figures, Skip
from benchmarks.gpu.rows import ROWS


def main(name: str, out: str, peer_python: str, mode: str = "") -> None:
    """Run the row and write OUT/ROW.json, also if it fails."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder, dry = Path(out), mode == "dry"
    # Later rows reuse the compilations of earlier ones, including the autotuning of products.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    row, start = next(row for row in ROWS if row.name == name), time.perf_counter()
    path = folder / f"{name}.json"
    kept = json.loads(path.read_text())["figures"] if path.exists() else {}

    def write(status: str, figures: Figures, reason: str = "") -> None:
        result = {
            "row": name,
            "what": row.what,
            "status": status,
            "reason": reason,
            "dry": dry,
            "seconds": time.perf_counter() - start,
            "figures": figures,
        }
        swap(path, result)

    partial: Figures = dict(kept)

    def save(figures: Figures) -> None:
        partial.update(figures)
        write("partial", partial)

    try:
        figures = row.run(Context(folder, dry, peer_python, kept, save))
    except Skip as reason:
        write("skipped", partial, str(reason))
    except Exception as error:
        traceback.print_exc()
        short = f"{type(error).__name__}: {error}"
        # Out of memory does not count as a failure of the row.
        write("skipped" if "RESOURCE_EXHAUSTED" in short else "failed", partial, short[:500])
    else:
        write("done", figures)
    swap(folder / "device.json", device())


def swap(path: Path, value: Any) -> None:
    """Write JSON atomically: an interruption leaves the old file or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1))
    new.replace(path)


def device() -> dict[str, str]:
    """Return the device and versions that the figures apply to."""
    import jaxlib

    first = jax.devices()[0]
    found = {
        "device": first.device_kind,
        "platform": first.platform,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
        "runtime": first.client.platform_version.replace("\n", " "),
    }
    stats = first.memory_stats()
    return found | ({"memory_limit": str(stats["bytes_limit"])} if stats and "bytes_limit" in stats else {})


if __name__ == "__main__":
    main(*sys.argv[1:])
