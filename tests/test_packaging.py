"""The wheel: its contents, its use away from the checkout, and that it gets along with Hugging Face's `kernels`.

`make wheel-check` runs these tests on the wheel made of the source archive (`FLEXQUANT_WHEEL`); otherwise one is built
from a copy of the tree. Nothing here needs a network.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.utils import import_utils

pytestmark = pytest.mark.slow

FOLDERS = ("kernels", "engine", "fq_env", "agents")
FOLDERS_WITHOUT_INIT = ("kernels", "engine", "agents")
SHIPPED_SUFFIXES = {".py", ".c", ".cpp", ".h", ".json"}
NOT_SOURCE = (".git", ".venv", "venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


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
    # A copy, because setuptools builds inside the tree and would pick up what an earlier build left there.
    shutil.copytree(repo_root, work / "tree", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    pip_wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", work / "out")
    run(sys.executable, *pip_wheel, work / "tree", cwd=work)
    (path,) = (work / "out").glob("*.whl")
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


def run_installed(installed: Path, cwd: Path, *arguments: str) -> str:
    """Runs Python on the installed wheel; `-S` keeps an editable install of the checkout out of the way."""
    paths = [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return run(sys.executable, "-S", *arguments, cwd=cwd, PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)))


def test_wheel_holds_the_package_and_nothing_else(names: set[str], repo_root: Path) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flexquant_rl"}
    inside = {name.removeprefix("flexquant_rl/") for name in names if name.startswith("flexquant_rl/")}
    assert "py.typed" in inside
    allowed = {*FOLDERS, "assets"}
    assert {name.split("/")[0] for name in inside if "/" in name} <= allowed
    assert {name for name in inside if "/" not in name} == {"py.typed", *(path.name for path in repo_root.glob("*.py"))}
    for folder in FOLDERS:
        sources = (path for path in (repo_root / folder).rglob("*") if path.suffix in SHIPPED_SUFFIXES)
        assert {name for name in inside if name.startswith(f"{folder}/")} == {
            path.relative_to(repo_root).as_posix() for path in sources
        }


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
