"""`fq sweep` with two local workers of Ray, as it is started by hand; skipped where Ray is not installed."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import TINY_EPISODES, Finished, leftovers, spawn, tree, write_text

from flexquant_rl.agents.runs.ray_trials import check_cluster
from flexquant_rl.engine.errors import InputError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'flexquant-rl[ray]'"
)

OPTIONS = (
    *TINY_EPISODES,
    *("--env-steps", 256, "--ppo.num-envs", 4, "--ppo.batch-size", 8, "--ppo.num-epochs", 1, "--seeds", 1),
    *("--validation-sequences", 3, "--test-sequences", 2, "--num-dials", 2, "--oracle-samples", 0),
    *("--long-tokens", 0, "--importance-windows", 0, "--time-budgets", 0.6, "--latency", "roofline"),
    *("--set", "ppo.learning_rate=1e-3,3e-2"),
)


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    """Returns as soon as a file of that name is there, or the process has ended; the test's own timeout ends it too."""
    while process.poll() is None and not any(folder.glob(pattern)):
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)  # Ray starts twice, and on a busy machine each start takes half a minute
def test_two_workers_interrupted_and_resumed(tmp_path: Path, tiny_model_dir: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    start = ("sweep", "--model", tiny_model_dir, "--text", text.name, "--run", "sweep", "--workers", 2, *OPTIONS)
    process = spawn("cli.py", *start, cwd=tmp_path)
    wait_for("sweep/trials/*/seeds/0/checkpoint.safetensors", tmp_path, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted; continue with: fq sweep --resume sweep"
    assert "Traceback" not in err
    assert not any(tmp_path.glob("sweep/trials/*/seeds/0/policy"))

    process = spawn("cli.py", "sweep", "--resume", "sweep", "--workers", 2, cwd=tmp_path)
    out, err = process.communicate(timeout=280)
    finished = Finished(process.returncode, out, err)
    assert finished.result["sweep"]["trials"] == 2
    assert finished.result["sweep"]["failed"] == {}
    assert len(finished.result["sweep"]["configurations"]) == 2
    logs = [path.read_text() for path in sorted(tmp_path.glob("sweep/trials/*/train.log"))]
    assert len(logs) == 2
    assert any("PPO seed 0: resumed at" in log for log in logs)
    assert "trial 2 of 2: ppo.learning_rate=" in err
    assert leftovers(tree(tmp_path)) == []


@pytest.fixture
def silent() -> Iterator[str]:
    """A port where something listens that says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_cluster_that_does_not_answer(silent: str) -> None:
    with pytest.raises(InputError, match=f"no Ray cluster answers at {silent} within 3 s; start it with `ray start"):
        check_cluster(silent, timeout_s=3)
