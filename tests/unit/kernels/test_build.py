"""Building the CPU kernels with the machine's compiler, and the choice between a wheel's library and a built one."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxinfer.kernels.native import build, library


def compile_with(compiler: str, target: Path) -> None:
    library.build(compiler, library.THIS_MACHINE, "include", target)


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
        compile_with(str(compiler), tmp_path / "lib" / "kernels.so")
    assert len(runs) == len(library.SOURCES) and all(run.returncode is not None for run in runs)
    assert not list((tmp_path / "lib").iterdir())


def compiler_that(tmp_path, does):
    """Return the path of a compiler that runs these shell commands with `$out`, the path to write to."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nout=$2\n{does}\n')
    compiler.chmod(0o755)
    return str(compiler)


def test_a_build_moves_the_whole_library_to_its_path(tmp_path):
    target = tmp_path / "lib" / "kernels.so"
    compile_with(compiler_that(tmp_path, 'echo "a warning" >&2; echo made > "$out"'), target)
    assert target.read_text() == "made\n" and [*target.parent.iterdir()] == [target]


def test_a_failed_build_keeps_the_compilers_message(tmp_path):
    compiler = compiler_that(tmp_path, 'echo "ffi.h: no such file" >&2; exit 1')
    with pytest.raises(subprocess.CalledProcessError) as caught:
        compile_with(compiler, tmp_path / "lib" / "kernels.so")
    assert caught.value.stderr == "ffi.h: no such file\n"
    assert not list((tmp_path / "lib").iterdir())


Loads = list[Path]


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str | None, Loads]]:
    """Return a function that chooses a library on a CPU with these features; it returns the reason why none can run,
    and what was loaded.
    """

    def choose(*, flags: frozenset[str] = library.VARIANTS["avx512"], broken: bool = False) -> tuple[str | None, Loads]:
        loaded: Loads = []

        def register(path: Path) -> None:
            loaded.append(path)
            if broken and path.name == prebuilt.name:
                raise RuntimeError("the handler's API version (0.9) is incompatible")

        monkeypatch.setattr(build, "cpu_flags", lambda: flags)
        monkeypatch.setattr(build, "_register", register)
        monkeypatch.setattr(build, "_built", lambda compiler: tmp_path / "built.so")
        return build._lacking.__wrapped__(), loaded

    prebuilt = tmp_path / "prebuilt.so"
    monkeypatch.setattr(library, "prebuilt", {"avx512": prebuilt, "avx2": tmp_path / "prebuilt-avx2.so"}.__getitem__)
    monkeypatch.setenv("CXX", "true")
    return choose


def test_the_library_of_a_wheel_needs_no_compiler(loads, tmp_path, monkeypatch):
    (tmp_path / "prebuilt.so").touch()
    monkeypatch.setenv("CXX", "no-compiler")
    assert loads() == (None, [tmp_path / "prebuilt.so"])


def test_a_library_that_this_jaxlib_cannot_use_is_compiled_anew(loads, tmp_path, monkeypatch):
    (tmp_path / "prebuilt.so").touch()
    assert loads(broken=True) == (None, [tmp_path / "prebuilt.so", tmp_path / "built.so"])
    monkeypatch.setenv("CXX", "no-compiler")
    reason, loaded = loads(broken=True)
    assert reason is not None and "no C++ compiler" in reason and len(loaded) == 1


def test_without_a_wheels_library_kernels_are_compiled(loads, tmp_path):
    assert loads() == (None, [tmp_path / "built.so"])


def test_a_cpu_loads_the_library_of_its_instruction_set(loads, tmp_path):
    for name in ("prebuilt.so", "prebuilt-avx2.so"):
        (tmp_path / name).touch()
    both = library.VARIANTS["avx512"] | library.VARIANTS["avx2"]
    assert loads(flags=both) == (None, [tmp_path / "prebuilt.so"])
    assert loads(flags=both - {"avx512_bf16"}) == (None, [tmp_path / "prebuilt-avx2.so"])
    reason, loaded = loads(flags=both - {"avx512_bf16", "fma"})
    assert reason is not None and "missing: fma" in reason and loaded == []


def test_a_wheels_library_is_of_the_sources_beside_it(tmp_path, monkeypatch):
    name = library.prebuilt("avx2").name
    assert name != library.prebuilt("avx512").name
    for source in (*library.SOURCES, *library.HEADERS):
        (tmp_path / source).write_text((library.HERE / source).read_text())
    monkeypatch.setattr(library, "HERE", tmp_path)
    assert library.prebuilt("avx2").name == name
    (tmp_path / "rotate.h").write_text("// changed")
    assert library.prebuilt("avx2").name != name
