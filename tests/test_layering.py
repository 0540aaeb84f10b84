"""The dependency arrow: `kernels <- engine <- fq_env <- agents <- train.py, cli.py`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"kernels": set(), "engine": {"kernels"}, "fq_env": {"engine"}, "agents": {"fq_env", "engine"}}
LEARNING = {"gymnasium", "stable_baselines3", "tensorboard"}
FORBIDDEN = {
    "kernels": LEARNING | {"transformers"},
    "engine": LEARNING,
    "fq_env": {"stable_baselines3", "tensorboard"},
    "agents": set(),
}
VEC_ENV_MODULES = {"fq_env/vec_env.py"}  # SB3's VecEnv is the interface that it implements


def sources(folder: str) -> list[Path]:
    """The Python files of a folder; there are some."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ holds no Python file"
    return files


def imported_modules(path: Path) -> Iterator[str]:
    """Yields the dotted name of everything that a file imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write flexquant_rl.<folder>.<module>"
            # `from flexquant_rl import engine` names a layer in its second half.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", ALLOWED)
def test_layer_imports_only_downwards(layer: str) -> None:
    targets = set()
    for path in sources(layer):
        for module in imported_modules(path):
            package, _, rest = module.partition(".")
            if package == "flexquant_rl":
                targets.add(target := rest.split(".")[0])
                assert target == layer or target in ALLOWED[layer], f"{path.relative_to(ROOT)} imports {module}"
    assert targets == {layer} | ALLOWED[layer], "an allowed import is not made, or imports are not understood"


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_stays_free_of_heavier_packages(layer: str) -> None:
    for path in sources(layer):
        name = path.relative_to(ROOT).as_posix()
        forbidden = FORBIDDEN[layer] - ({"stable_baselines3"} if name in VEC_ENV_MODULES else set())
        for module in imported_modules(path):
            assert module.split(".")[0] not in forbidden, f"{name} imports {module}"


@pytest.mark.parametrize("layer", ALLOWED)
def test_nothing_imports_the_entry_points(layer: str) -> None:
    for path in sources(layer):
        for module in imported_modules(path):
            assert not module.startswith(("flexquant_rl.train", "flexquant_rl.cli", "train.", "cli.")), (
                f"{path}: {module}"
            )


@pytest.mark.parametrize("layer", ALLOWED)
def test_no_bare_import_of_a_layer(layer: str) -> None:
    # Ruff bans it too; a bare import makes a second copy of a module, or finds Hugging Face's `kernels`.
    scripts = sorted(ROOT.glob("*.py"))
    assert {ROOT / "train.py", ROOT / "cli.py"} <= {*scripts}
    for path in [*sources(layer), *sources("tests"), *sources("benchmarks"), *scripts]:
        for module in imported_modules(path):
            assert module.split(".")[0] != layer, f"{path.relative_to(ROOT)} imports {module}"


def test_checks_find_a_planted_import(tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text("def f():\n    from flexquant_rl import agents\n    import flexquant_rl.agents.runs.ppo as ppo\n")
    assert [*imported_modules(path)] == ["flexquant_rl.agents", "flexquant_rl.agents.runs.ppo"]


def test_every_layer_is_checked() -> None:
    assert [*ALLOWED] == [*FORBIDDEN] == ["kernels", "engine", "fq_env", "agents"]
    assert all((ROOT / name).is_file() for name in VEC_ENV_MODULES)


def test_serving_imports_are_light() -> None:
    """A policy loads with torch alone: no learning library, and no transformers."""
    code = (
        "import sys, flexquant_rl.engine.control.policy; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = (LEARNING | {"transformers", "matplotlib", "triton"}).intersection(result.stdout.split())
    assert not heavy, f"import flexquant_rl.engine.control.policy also imports {sorted(heavy)}"
