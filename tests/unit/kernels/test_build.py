"""Building the CPU kernels with the machine's compiler."""

import subprocess
from pathlib import Path

import pytest

from jaxinfer.kernels.native import build


def test_an_interrupted_build_ends_its_compilers(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexec sleep 600\n")
    compiler.chmod(0o755)
    runs, interrupts = [], iter([KeyboardInterrupt])

    class Run(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            runs.append(self)

        def communicate(self, *args):
            for interrupt in interrupts:
                raise interrupt
            return super().communicate(*args)

    monkeypatch.setattr(subprocess, "Popen", Run)
    with pytest.raises(KeyboardInterrupt):
        build._build(str(compiler), Path(build.__file__).parent, tmp_path / "lib" / "kernels.so")
    assert len(runs) == len(build.SOURCES) and all(run.returncode is not None for run in runs)
    assert not list((tmp_path / "lib").iterdir())
