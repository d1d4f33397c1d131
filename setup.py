"""Optional part of the build: JAXINFER_PREBUILT=1 puts compiled CPU kernels into the wheel (CONTRIBUTING.md).

Without it, and wherever they cannot be compiled, the wheel is pure Python and the kernels are compiled on first use.
All other configuration is in pyproject.toml.
"""

import importlib.util
import os
import platform
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WANTED = os.environ.get("JAXINFER_PREBUILT", "0") == "1"
ROOT = Path(__file__).parent
NATIVE = Path("jaxinfer", "kernels", "native")


def libraries() -> ModuleType:
    """Return the module that compiles the kernels, without the package, whose dependencies are not installed here."""
    spec = importlib.util.spec_from_file_location("library", ROOT / NATIVE / "library.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headers() -> str:
    """Return the requirement of the oldest jaxlib supported: newer ones run what was compiled with its headers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (lowest,) = (name for name in project["dependencies"] if name.startswith("jaxlib>="))
    return lowest.partition(",")[0].replace(">=", "==")


def compiled(target: Path) -> bool:
    """Compile the kernels into the folder `target`; return whether that was possible, and print why not."""
    native, jaxlib = libraries(), importlib.util.find_spec("jaxlib")
    compiler = native.find_compiler()
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        reason = "they are for Linux on x86-64"
    elif compiler is None:
        reason = f"there is no C++ compiler ({', '.join(native.COMPILERS)}, or CXX)"
    elif jaxlib is None:
        reason = "jaxlib, which has XLA's headers, is not installed"
    else:
        include = str(Path(jaxlib.submodule_search_locations[0]) / "include")
        try:
            for variant in native.VARIANTS:
                native.build(compiler, native.any_machine(variant), include, native.prebuilt(variant, target))
            return True
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"{compiler} failed: {getattr(error, 'stderr', None) or error}"
    print(f"warning: the wheel has no compiled CPU kernels: {reason}")
    return False


class Package(Distribution):
    """Belongs among the packages of a platform once it has kernels."""

    has_kernels = False

    def has_ext_modules(self) -> bool:
        """Return whether there is compiled code."""
        return self.has_kernels or super().has_ext_modules()


class BuildPy(build_py):
    """Copies the package, and compiles its kernels beside it where that is asked for."""

    def run(self) -> None:
        """Run the command."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / NATIVE
        for left in target.glob("prebuilt-*.so"):  # of an earlier build in this folder
            left.unlink()
        self.distribution.has_kernels = WANTED and compiled(target)


class BdistWheel(bdist_wheel):
    """Makes a wheel of this platform, for any Python, if it has compiled kernels: they do not use Python."""

    def run(self) -> None:
        """Run the command."""
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of interpreter, ABI and platform."""
        return ("py3", "none", super().get_tag()[2])


setup(
    distclass=Package,
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    setup_requires=[headers()] if WANTED else [],
)
