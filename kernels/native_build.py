"""How the C++ kernels of kernels/cpp are compiled: the one description for installing and for running from source.

Standard library only and nothing of this package, because setup.py loads this file by its path, where torch is not
installed. The library's name carries a hash of all that it is made from, so that one which has become old is never
loaded, wherever it is. No flag is meant for the build machine: each body names its own instruction set and is chosen
at run time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent / "cpp"
LIBRARY_PREFIX = "flexquant_native_"

# Contraction would round the activations differently in a body that has fused multiply-add and in one that has not.
_COMPILE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off")
_LINK_FLAGS = ("-shared", "-pthread")
_COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """The native library could not be compiled."""


def build_library(cache_dir: Path | None = None) -> Path:
    """Finds the library that an installation has put beside its sources, or one in the cache, or compiles it into it.

    Args:
        cache_dir: Where to keep what is compiled; default `flexquant-rl` in $XDG_CACHE_HOME or ~/.cache.

    Returns:
        The shared library.

    Raises:
        BuildError: If there is no C++ compiler, or none of them can compile it.
        OSError: If the sources cannot be read or the cache cannot be written.
    """
    name = library_name()
    directory = cache_dir if cache_dir is not None else _default_cache_dir()
    for library in (SOURCE_DIR / name, directory / name):
        if library.exists():
            return library
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # what it holds is loaded: only its owner may write there
    compile_library(directory / name)
    return directory / name


def compile_library(target: Path) -> None:
    """Compiles the library with the first of $CXX, g++ and clang++ that works.

    Safe against other processes that build at the same time: each compiles into a directory of its own and renames.

    Args:
        target: The file to make; directories that are missing are made too.

    Raises:
        BuildError: If there is no C++ compiler, or none of them can compile it.
        OSError: If the sources cannot be read or the target cannot be written.
    """
    sources = cpp_files()
    if not sources:
        raise BuildError(f"no C++ sources in {SOURCE_DIR}; reinstall the package")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=target.parent) as build_dir:
        built = Path(build_dir) / target.name
        for compiler in _compilers():
            failure = _compile_and_link(compiler, sources, built)
            if failure is None:
                built.replace(target)
                return
            failures.append(failure)
    raise BuildError("; ".join(failures) or "no C++ compiler found; install g++ or clang++, or set CXX")


def library_name() -> str:
    """File name of the library that the sources as they are now would make on this system.

    Raises:
        OSError: If the sources cannot be read.
    """
    digest = hashlib.sha256()
    for path in [*cpp_files(), *sorted(SOURCE_DIR.glob("*.h"))]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    digest.update(" ".join((*_COMPILE_FLAGS, *_LINK_FLAGS, platform.system(), platform.machine())).encode())
    return f"{LIBRARY_PREFIX}{digest.hexdigest()[:16]}.so"


def cpp_files() -> list[Path]:
    """The files that are compiled, sorted."""
    return sorted(SOURCE_DIR.glob("*.cpp"))


def _default_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "flexquant-rl"


def _compilers() -> list[list[str]]:
    """Returns the commands to try; $CXX may carry arguments, such as `ccache g++`."""
    candidates = [shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"]]
    return [command for command in candidates if command and shutil.which(command[0])]


def _compile_and_link(compiler: list[str], sources: list[Path], built: Path) -> str | None:
    """Makes `built`, its objects beside it; returns None on success, otherwise one line on what went wrong."""
    objects = [built.with_name(f"{source.stem}.o") for source in sources]
    commands = [
        [*compiler, *_COMPILE_FLAGS, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    # The bodies are most of the work, a file each: two at a time take little more than half as long.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        failures = [failure for failure in pool.map(_run_compiler, commands) if failure is not None]
    if failures:
        return failures[0]
    return _run_compiler([*compiler, *_LINK_FLAGS, *map(str, objects), "-o", str(built)])


def _run_compiler(command: list[str]) -> str | None:
    """Returns None on success, otherwise one line on what went wrong."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    return f"{command[0]} failed: {errors[0] if errors else f'exit status {result.returncode}'}"
