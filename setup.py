"""Compiles the C++ kernels into the package; everything else about the package is in pyproject.toml.

The library is plain C++ behind a C ABI: one wheel per platform serves every Python (`py3-none-<platform>`). It is
optional. Where no compiler is found the package installs all the same and computes in torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# In a checkout its folders are links to those beside it, in a source archive they are folders.
PACKAGE_DIR = ROOT / "flexquant_rl"
NATIVE_DIR = Path("flexquant_rl", "kernels", "cpp")
PACKAGE = "flexquant_rl.kernels.cpp"


def load_native_build() -> ModuleType:
    """Loads kernels/native_build.py by its path: the package itself needs torch, which no build has."""
    spec = importlib.util.spec_from_file_location("native_build", PACKAGE_DIR / "kernels" / "native_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NATIVE = load_native_build()


class BuildNative(build_ext):
    """Compiles the library with the package's own command instead of a Python extension's."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the suffix of a Python version: the library is loaded with ctypes."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compiles into the build directory, or says in one line why there will be no library."""
        target = Path(self.get_ext_fullpath(ext.name))
        remove_libraries(target.parent)
        try:
            NATIVE.compile_library(target)
        except (NATIVE.BuildError, OSError) as error:
            self.warn(f"no native CPU kernels, the package will fall back to torch (slow): {error}")

    def copy_extensions_to_source(self) -> None:
        """Puts the library of an editable install beside its sources, in the place of older ones."""
        remove_libraries(NATIVE.SOURCE_DIR)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """Tags the wheel for any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def remove_libraries(directory: Path) -> None:
    """Removes libraries of other sources, which would be shipped although nothing loads them."""
    for path in directory.glob(f"{NATIVE.LIBRARY_PREFIX}*.so"):
        path.unlink()


native_library = Extension(
    f"{PACKAGE}.{Path(NATIVE.library_name()).stem}",
    sources=[(NATIVE_DIR / path.name).as_posix() for path in NATIVE.cpp_files()],
    optional=True,
)
setup(
    ext_modules=[native_library],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
