"""The wheel: its contents, its use away from the checkout, and that it gets along with Hugging Face's `kernels`.

`make wheel-check` runs these tests on the wheel made of the source archive (`FLEXQUANT_WHEEL`); otherwise one is built
from a copy of the tree, with the library that this checkout has already. Nothing here needs a network.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.utils import import_utils

from flexquant_rl.kernels import native_build

pytestmark = pytest.mark.slow

FOLDERS = ("kernels", "engine", "fq_env", "agents")
FOLDERS_WITHOUT_INIT = ("kernels", "engine", "agents")
SHIPPED_SUFFIXES = {".py", ".c", ".cpp", ".h", ".json", ".html"}
NOT_SOURCE = (
    *(".git", ".venv", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"),
    "*.so",  # of an editable install
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command to its end and returns its standard output; shows its error output where it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel under test."""
    given = os.environ.get("FLEXQUANT_WHEEL")
    if given:
        return Path(given).resolve()
    work = tmp_path_factory.mktemp("wheel")
    environment = {}
    if native_build._compilers():
        # Compiling takes a minute. The library in the cache was made of the same sources by the same command.
        environment["CXX"] = str(write_compiler(work, f"cp {shlex.quote(str(native_build.build_library()))}"))
    return build_wheel(copy_tree(repo_root, work), **environment)


def write_compiler(directory: Path, command: str) -> Path:
    """Writes a stand-in for the compiler: the command gets one more argument, the library to make."""
    path = directory / "c++"
    path.write_text(f'#!/bin/sh\nset -e\nfor last; do :; done\n{command} "$last"\n')
    path.chmod(0o755)
    return path


def copy_tree(repo_root: Path, work: Path) -> Path:
    """A copy, because setuptools builds inside the tree and would pick up what an earlier build left there."""
    return Path(shutil.copytree(repo_root, work / "tree", symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE)))


def build_wheel(tree: Path, **environment: str) -> Path:
    """Builds the wheel of a tree with what is installed here."""
    out = tree.parent / "out"
    pip_wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out)
    run(sys.executable, *pip_wheel, tree, cwd=tree.parent, **environment)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """The names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    pip_install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target)
    run(sys.executable, *pip_install, wheel, cwd=target)
    return target


def run_installed(installed: Path, cwd: Path, *arguments: str, **environment: str) -> str:
    """Runs Python on the installed wheel; `-S` keeps an editable install of the checkout out of the way."""
    paths = [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    path = os.pathsep.join(dict.fromkeys(paths))
    return run(sys.executable, "-S", *arguments, cwd=cwd, PYTHONPATH=path, **environment)


def test_wheel_holds_the_package_and_nothing_else(names: set[str], repo_root: Path) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flexquant_rl"}
    inside = {name.removeprefix("flexquant_rl/") for name in names if name.startswith("flexquant_rl/")}
    assert {name.split("/")[0] for name in inside if "/" in name} == {*FOLDERS, "assets"}
    modules = {path.name for path in repo_root.glob("*.py")} - {"setup.py"}
    assert {name for name in inside if "/" not in name} == {"__init__.py", "py.typed", *modules}
    libraries = {name for name in inside if re.fullmatch(r"kernels/cpp/flexquant_native_[0-9a-f]{16}\.so", name)}
    for folder in FOLDERS:
        sources = (path for path in (repo_root / folder).rglob("*") if path.suffix in SHIPPED_SUFFIXES)
        assert {name for name in inside if name.startswith(f"{folder}/")} - libraries == {
            path.relative_to(repo_root).as_posix() for path in sources
        }
    assert len(libraries) == bool(native_build._compilers()), "one library where there is a compiler"


@pytest.mark.parametrize("folder", FOLDERS_WITHOUT_INIT)
def test_no_init_file(folder: str, names: set[str], repo_root: Path) -> None:
    # With one, `python train.py` makes our folder a package that transformers takes for Hugging Face's.
    assert not (repo_root / folder / "__init__.py").exists()
    assert f"flexquant_rl/{folder}/__init__.py" not in names


def test_metadata(wheel: Path, names: set[str]) -> None:
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        parser.read_string(archive.read(entry_points).decode())
    assert dict(parser["console_scripts"]) == {"fq": "flexquant_rl.cli:main", "fq-train": "flexquant_rl.train:main"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_every_module_imports_elsewhere(installed: Path, names: set[str], tmp_path: Path) -> None:
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in names
        if name.endswith(".py") and not name.startswith("flexquant_rl/assets/")
    )
    code = (
        "import importlib\n"
        f"for name in {modules!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(installed)!r}), module.__file__\n"
        "print('all imported')"
    )
    assert run_installed(installed, tmp_path, "-c", code).splitlines()[-1] == "all imported"


def test_wheel_serves_every_python_on_this_platform(wheel: Path, names: set[str]) -> None:
    (tag_file,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(tag_file).decode()
    platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert re.findall(r"^Tag: (.*)$", text, flags=re.MULTILINE) == [f"py3-none-{platform_tag}"]
    assert "Root-Is-Purelib: false" in text


@pytest.mark.skipif(not native_build._compilers(), reason="no C++ compiler here, so the wheel has no library")
def test_installed_library_needs_no_compiler(installed: Path, tmp_path: Path) -> None:
    """Nothing is compiled, written to a cache or warned about."""
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from flexquant_rl.kernels.native import supported_isas\n"
        "from flexquant_rl.kernels.native_build import build_library\n"
        "print(build_library(), 'portable' in supported_isas())"
    )
    env = {"PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    library, works = run_installed(installed, tmp_path, "-c", code, **env).splitlines()[-1].rsplit(" ", 1)
    assert Path(library).is_relative_to(installed)
    assert works == "True"
    assert list(tmp_path.iterdir()) == []


def test_installs_without_a_compiler(repo_root: Path, tmp_path: Path) -> None:
    wheel = build_wheel(copy_tree(repo_root, tmp_path), PATH=str(tmp_path), CXX="")
    with zipfile.ZipFile(wheel) as archive:
        assert "flexquant_rl/kernels/cpp/api.cpp" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.skipif(not native_build._compilers(), reason="no C++ compiler here, so nothing to put there")
def test_editable_install_puts_the_library_beside_its_sources(repo_root: Path, tmp_path: Path) -> None:
    tree = copy_tree(repo_root, tmp_path)
    old = tree / "kernels" / "cpp" / "flexquant_native_0123456789abcdef.so"
    old.write_bytes(b"of older sources")
    compiler = write_compiler(tmp_path, "echo library >")
    code = f"import setuptools.build_meta as backend; backend.build_editable({str(tmp_path / 'out')!r})"
    (tmp_path / "out").mkdir()
    run(sys.executable, "-c", code, cwd=tree, CXX=str(compiler))
    (library,) = (tree / "kernels" / "cpp").glob("*.so")
    assert library.name == native_build.library_name()
    assert library.read_text() == "library\n"


def test_editable_install_is_one_line_in_a_pth_file(repo_root: Path, tmp_path: Path) -> None:
    """Editors and type checkers read such a file; an import hook they do not see."""
    tree = copy_tree(repo_root, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    code = f"import setuptools.build_meta as backend; print(backend.build_editable({str(out)!r}))"
    name = run(sys.executable, "-c", code, cwd=tree, PATH=str(tmp_path), CXX="").splitlines()[-1]
    with zipfile.ZipFile(out / name) as archive:
        (pth,) = (member for member in archive.namelist() if "/" not in member)
        assert pth.endswith(".pth")
        assert archive.read(pth).decode().split() == [str(tree)]


@pytest.mark.parametrize("module", ["tests", "setup", "benchmarks", "docs", "engine.tests"])
def test_what_is_not_the_package_cannot_be_imported_from_it(module: str, repo_root: Path) -> None:
    code = f"import flexquant_rl.{module}"
    result = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"No module named 'flexquant_rl.{module}'" in result.stderr


def test_source_archive_holds_files_in_place_of_links_and_no_tests(repo_root: Path, tmp_path: Path) -> None:
    """`make wheel-check` builds the wheel from the archive; this finds a missing file without compiling."""
    tree = copy_tree(repo_root, tmp_path)
    code = f"import setuptools.build_meta as backend; print(backend.build_sdist({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", code, cwd=tree).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    inside = {member.name.split("/", 1)[1] for member in members if "/" in member.name}
    native = (path for path in (repo_root / "kernels").rglob("*") if path.suffix in SHIPPED_SUFFIXES)
    assert {"setup.py", *(f"flexquant_rl/{path.relative_to(repo_root).as_posix()}" for path in native)} <= inside
    assert not [name for name in inside if name.endswith(".so")]
    assert not {name.split("/")[0] for name in inside} & {"tests", "docs", "benchmarks", *FOLDERS, "assets", "train.py"}


def test_embedded_model_ships(installed: Path, repo_root: Path, tmp_path: Path) -> None:
    files = {path.name for path in (repo_root / "assets" / "tiny-code-llama").glob("*")}
    if not files:
        pytest.skip("this checkout has no embedded model yet")
    code = "from flexquant_rl.engine.embedded import embedded_model_path; print(embedded_model_path())"
    path = Path(run_installed(installed, tmp_path, "-c", code).splitlines()[-1])
    assert path.is_relative_to(installed)
    assert {file.name for file in path.iterdir()} == files


@pytest.fixture
def huggingface_kernels(tmp_path: Path) -> Path:
    """A folder with a stand-in for Hugging Face's `kernels` distribution, of a version that transformers accepts."""
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    assert Version(version) < Version(getattr(import_utils, "KERNELS_MAX_VERSION", "99"))
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    if name[0].isupper():\n"
        "        return type(name, (), {})\n"
        "    return lambda *args, **kwargs: lambda target: target\n"
    )
    info = site / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return site


def test_huggingface_kernels_beside_us(huggingface_kernels: Path, repo_root: Path) -> None:
    # `python -c` puts the working directory first on sys.path, as `python train.py` and `python -m pytest` do.
    code = (
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "import kernels, flexquant_rl.kernels.bitplane as ours\n"
        "print(is_kernels_available(), kernels.__file__, ours.__file__, sep='\\n')"
    )
    env = {"PYTHONPATH": str(huggingface_kernels)}
    available, theirs, ours = run(sys.executable, "-c", code, cwd=repo_root, **env).splitlines()[-3:]
    assert available == "True"
    assert Path(theirs).is_relative_to(huggingface_kernels)
    assert Path(ours).resolve() == repo_root / "kernels" / "bitplane.py"
