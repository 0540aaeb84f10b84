"""An exported policy chooses what was trained, and needs nothing of what trained it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_session import FakeModel, fake_profile
from safetensors.torch import load_file, save_file
from stable_baselines3 import PPO
from torch import Tensor
from toy_training import toy_env, toy_front, toy_policy

from flexquant_rl.agents.config import PPOConfig
from flexquant_rl.agents.export import check_parity, export_run
from flexquant_rl.agents.runs.imitation import clone, collect_signals
from flexquant_rl.agents.runs.ppo import build_ppo, precision_net
from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.policy import LearnedPolicy, PrecisionNet
from flexquant_rl.engine.errors import InputError

MODEL = FakeModel(carry=0.5)

SERVE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"stable_baselines3", "gymnasium", "tensorboard"}:
            raise ImportError(f"{name} is not there when a policy is served")

sys.meta_path.insert(0, Refuse())

from pathlib import Path
from safetensors.torch import load_file, save_file
from flexquant_rl.engine.control.artefact import load_policy

directory, observations, out = map(Path, sys.argv[1:])
policy = load_policy(directory)
save_file({"bit_widths": policy(load_file(observations)["observations"]).bit_widths}, out)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.fixture(scope="module")
def trained() -> tuple[PPO, Tensor]:
    """PPO around a cloned network, so that widths differ between units and dials, and 1,000 recorded observations."""
    front = toy_front(MODEL)
    env = toy_env(MODEL, num_envs=64)
    ppo = build_ppo(env, PPOConfig(num_envs=64), seed=0)
    generator = torch.Generator().manual_seed(0)
    signals = collect_signals(env, front, generator)[:1000]
    dials = front.dial_range()
    clone(precision_net(ppo), signals, front, fake_profile(MODEL), dials, num_steps=60, generator=generator)
    names = env.episodes.schema
    low, high = torch.tensor(dials).log10().tolist()
    signals[:, names.index("dial")] = low + (high - low) * torch.rand(len(signals), generator=generator)
    return ppo, signals


def predict(ppo: PPO, observations: np.ndarray) -> np.ndarray:
    return ppo.predict(observations, deterministic=True)[0]


@pytest.fixture
def run_dir(tmp_path: Path, trained: tuple[PPO, Tensor]) -> Path:
    """A finished run, as far as exporting looks at it."""
    for name in ("seeds/0/policy", "policy"):
        save_policy(toy_policy(precision_net(trained[0]), MODEL), fake_profile(MODEL), tmp_path / "run" / name)
    return tmp_path / "run"


def test_export_of_a_run_equals_sb3(run_dir: Path, tmp_path: Path, trained: tuple[PPO, Tensor]) -> None:
    ppo, observations = trained
    out = tmp_path / "exported"
    policy = export_run(run_dir, out)
    assert isinstance(policy, LearnedPolicy)
    assert sorted(file.name for file in out.iterdir()) == ["policy.json", "policy.safetensors", "profile.json"]
    check_parity(out, observations, lambda signals: predict(ppo, signals))
    widths = torch.tensor(MODEL.bit_widths)[torch.as_tensor(predict(ppo, observations.numpy()))]
    assert torch.equal(policy(observations).bit_widths, widths)
    assert len(widths.unique(dim=0)) > 5  # a policy that always chooses the same would prove little
    for file in out.iterdir():
        assert file.read_bytes() == (run_dir / "policy" / file.name).read_bytes()


def test_export_of_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="no finished policy.*--resume"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_overwrites_nothing(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        export_run(run_dir, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_export_of_a_damaged_run(run_dir: Path, tmp_path: Path) -> None:
    path = run_dir / "policy" / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="no readable policy"):
        export_run(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["policy.safetensors", "profile.json"])
def test_export_of_a_run_that_lacks_a_file(run_dir: Path, tmp_path: Path, name: str) -> None:
    """Exporting again would not bring it back: the advice does."""
    (run_dir / "policy" / name).unlink()
    with pytest.raises(InputError, match=f"{name}.*delete {run_dir / 'policy'} .* train.py --resume {run_dir}$"):
        export_run(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_checked_policy_is_exported(run_dir: Path, tmp_path: Path, trained: tuple[PPO, Tensor]) -> None:
    """A run's policy whose weights SB3 was never compared with."""
    shutil.rmtree(run_dir / "policy")
    net = PrecisionNet(precision_net(trained[0]).schema)
    save_policy(toy_policy(net, MODEL), fake_profile(MODEL), run_dir / "policy")
    with pytest.raises(InputError, match="weights are those of no training seed.*--resume"):
        export_run(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_that_chooses_otherwise_never_gets_its_name(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, read with another list of widths."""
    card = json.loads((run_dir / "policy" / "policy.json").read_text())
    card["schema"]["bit_widths"] = [2, 4, 5, 6, 8]
    (run_dir / "policy" / "policy.json").write_text(json.dumps(card))
    with pytest.raises(RuntimeError, match="widths differ"):
        export_run(run_dir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_that_is_copied_badly_never_gets_its_name(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(source: Path, target: Path) -> None:
        content = bytearray(source.read_bytes())
        content[-30] ^= 1
        target.write_bytes(content)

    monkeypatch.setattr("flexquant_rl.agents.export.shutil.copyfile", flip)
    with pytest.raises(RuntimeError, match="does not hold what was copied"):
        export_run(run_dir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("name", "index"), [("width_head.bias", 1), ("mean", 11), ("encode_unit.0.weight", (0, 0))])
def test_parity_check_is_loud(tmp_path: Path, trained: tuple[PPO, Tensor], name: str, index: int) -> None:
    """One number of the network or of its normalisation is not the trained one."""
    ppo, observations = trained
    net = precision_net(ppo).actor()
    save_policy(toy_policy(net, MODEL), fake_profile(MODEL), tmp_path / "same")
    check_parity(tmp_path / "same", observations, lambda signals: predict(ppo, signals))
    net.state_dict()[name][index] += 1.0
    save_policy(toy_policy(net, MODEL), fake_profile(MODEL), tmp_path / "changed")
    with pytest.raises(RuntimeError, match=r"[1-9]\d* of 4000 widths differ"):
        check_parity(tmp_path / "changed", observations, lambda signals: predict(ppo, signals))


def test_edited_weights_do_not_even_load(run_dir: Path, trained: tuple[PPO, Tensor]) -> None:
    ppo, observations = trained
    path = run_dir / "policy" / "policy.safetensors"
    weights = load_file(path)
    weights["width_head.bias"][1] += 1.0
    save_file(weights, path)
    with pytest.raises(InputError):
        check_parity(run_dir / "policy", observations, lambda signals: predict(ppo, signals))


def test_one_differing_width_is_enough(run_dir: Path, trained: tuple[PPO, Tensor]) -> None:
    ppo, observations = trained

    def almost(signals: np.ndarray) -> np.ndarray:
        actions = predict(ppo, signals).copy()
        actions[-1, -1] = (actions[-1, -1] + 1) % 5
        return actions

    with pytest.raises(RuntimeError, match="1 of 4000 widths differ"):
        check_parity(run_dir / "policy", observations, almost)


def test_served_without_the_training_libraries(
    run_dir: Path, tmp_path: Path, trained: tuple[PPO, Tensor], repo_root: Path
) -> None:
    """A process in which SB3, Gymnasium and TensorBoard cannot be imported gives the very widths that SB3 predicts."""
    ppo, observations = trained
    assert len(observations) == 1000
    out = tmp_path / "exported"
    export_run(run_dir, out)
    save_file({"observations": observations}, tmp_path / "observations.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", SERVE, str(out), str(tmp_path / "observations.safetensors"), str(tmp_path / "widths")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = torch.tensor(MODEL.bit_widths)[torch.as_tensor(predict(ppo, observations.numpy()))]
    assert torch.equal(load_file(tmp_path / "widths")["bit_widths"], expected)
    loaded = set(result.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"stable_baselines3", "gymnasium", "tensorboard", "transformers", "matplotlib"}


def test_rows_do_not_influence_each_other(run_dir: Path, trained: tuple[PPO, Tensor]) -> None:
    policy = load_policy(run_dir / "policy")
    observations = trained[1]
    together = policy(observations[:64]).bit_widths
    assert torch.equal(together, torch.cat([policy(observations[row : row + 1]).bit_widths for row in range(64)]))
