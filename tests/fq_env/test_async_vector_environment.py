"""Gymnasium's asynchronous vector environment with its defaults: workers are forked from a process that has threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys, warnings
import gymnasium, torch
names, options = json.loads(sys.argv[1])
torch.set_num_threads(2)
matrix = torch.randn(512, 512)
for _ in range(3):
    matrix = (matrix @ matrix).sin()  # OpenMP's threads exist from here on
warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
for name in names:
    alone = gymnasium.make(name, **options)
    alone.reset(seed=5)
    actions = [alone.action_space.sample() for _ in range(3)]
    expected = [alone.step(action)[0].tolist() for action in actions]
    envs = gymnasium.make_vec(name, num_envs=2, vectorization_mode="async", **options)
    envs.reset(seed=[5, 6])
    found = [envs.step([action, action])[0][0].tolist() for action in actions]
    envs.close()
    print(name, json.dumps(found == expected), torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked here")
def test_forked_workers_give_what_one_environment_gives(
    tiny_model_dir: Path, text_file: Path, profile_path: Path, repo_root: Path
) -> None:
    paths = {"model": str(tiny_model_dir), "texts": [str(text_file)], "profile": str(profile_path)}
    options = {**paths, "prompt_tokens": 4, "max_new_tokens": 4}
    names = [f"flexquant_rl.fq_env:FlexQuant/{name}-v1" for name in ("Decode", "MeasuredDecode")]
    arguments = json.dumps([names, options])
    with subprocess.Popen(
        [sys.executable, "-c", CODE, arguments],
        cwd=repo_root,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a test that fails leaves no worker behind
    ) as process:
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("the workers hang")
    assert process.returncode == 0, err
    assert out.splitlines()[-2:] == [f"{name} true 2" for name in names], "the parent keeps its threads"
