"""When Gymnasium knows the ids, and that the configuration of the environments is read without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KNOWN = "assert {'FlexQuant/Decode-v1', 'FlexQuant/MeasuredDecode-v1'} <= {*gymnasium.registry}"


def run_code(code: str, cwd: Path) -> None:
    """Runs Python in a process that has imported nothing yet."""
    finished = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("module", ["flexquant_rl.fq_env.config", "flexquant_rl.fq_env"])
def test_configuration_needs_nothing_heavy(module: str, repo_root: Path) -> None:
    heavy = {"torch", "gymnasium", "numpy", "transformers"}
    loaded = f"{heavy} & {{name.split('.')[0] for name in sys.modules}}"
    run_code(f"import sys, {module}; heavy = {loaded}; assert not heavy, heavy", repo_root)


@pytest.mark.parametrize(
    "imports",
    [
        "import gymnasium, flexquant_rl.fq_env",
        "import flexquant_rl.fq_env, gymnasium",
        "from flexquant_rl.fq_env.config import EnvConfig; import gymnasium",
        "import flexquant_rl.fq_env, gymnasium, importlib; importlib.reload(flexquant_rl.fq_env)",
        "import flexquant_rl.fq_env.registration as ours, gymnasium; ours.register()",
    ],
)
def test_ids_are_known_whichever_was_imported_first(imports: str, repo_root: Path) -> None:
    run_code(f"import warnings; warnings.simplefilter('error'); {imports}; {KNOWN}", repo_root)


def test_one_finder_waits_for_gymnasium_and_leaves(repo_root: Path) -> None:
    count = "sum(getattr(finder, 'module', None) == 'gymnasium.envs.registration' for finder in sys.meta_path)"
    run_code(
        "import sys, importlib, flexquant_rl.fq_env; importlib.reload(flexquant_rl.fq_env); "
        f"assert {count} == 1; import gymnasium; assert {count} == 0",
        repo_root,
    )
