"""The ONNX graph of a policy scores and chooses as the policy does, for any number of rows."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from cli_runner import run
from hypothesis import given, settings
from hypothesis import strategies as st

from flexquant_rl import cli
from flexquant_rl.agents import onnx_policy
from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.onnx_policy import ONNX_FILE, TOLERANCE, check_extra, check_onnx, write_onnx
from flexquant_rl.agents.runs.run import new_run
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.errors import InputError

WIDTHS = (3, 4, 5, 6, 8)


def policy_of(num_units: int, widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> LearnedPolicy:
    """A random network with a normalisation of its own."""
    schema = SignalSchema(num_units, widths, horizon=64)
    net = PrecisionNet(schema)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        net.mean.copy_(torch.randn(net.mean.shape, generator=generator))
        net.std.copy_(torch.rand(net.std.shape, generator=generator) + 0.5)
    return LearnedPolicy(net, PolicyCard(schema, "0" * 64, tuple(f"unit.{index}" for index in range(num_units))))


def packages() -> None:
    """Skips a test where the extra is not installed."""
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")


@settings(max_examples=8)
@given(st.integers(1, 9), st.sampled_from([WIDTHS, (8,), (2, 8)]), st.integers(1, 5), st.integers(0, 2**31))
def test_graph_equals_the_policy_in_float64(num_units: int, widths: tuple[int, ...], num_rows: int, seed: int) -> None:
    packages()
    import onnx
    from onnx.reference import ReferenceEvaluator

    policy = policy_of(num_units, widths, seed)
    signals = torch.randn(num_rows, policy.card.schema.dim, generator=torch.Generator().manual_seed(seed + 1))
    constants, nodes = onnx_policy._graph(policy)
    assert {name for _, inputs, _, _ in nodes for name in inputs} >= constants.keys(), "a constant is not used"
    with TemporaryDirectory() as folder:
        write_onnx(policy, Path(folder) / ONNX_FILE)
        check_onnx(Path(folder) / ONNX_FILE, policy, signals)
        model = onnx.load(Path(folder) / ONNX_FILE)
    widths_found, scores = ReferenceEvaluator(model).run(None, {"signals": signals.numpy()})
    expected = policy.net.double().logits(signals.double()).detach()
    assert float((torch.from_numpy(scores) - expected).abs().max()) < TOLERANCE
    assert widths_found.shape == (num_rows, num_units)
    assert set(widths_found.flatten().tolist()) <= set(widths)


def test_parity_through_onnx_runtime(tmp_path: Path) -> None:
    packages()
    import onnx

    policy = policy_of(5)
    write_onnx(policy, tmp_path / ONNX_FILE)
    signals = 2 * torch.randn(300, policy.card.schema.dim, generator=torch.Generator().manual_seed(1))
    assert len(policy(signals).bit_widths.unique()) > 2
    check_onnx(tmp_path / ONNX_FILE, policy, signals)
    check_onnx(tmp_path / ONNX_FILE, policy, signals[:1])
    with pytest.raises(RuntimeError, match="widths from the policy's"):
        check_onnx(tmp_path / ONNX_FILE, policy_of(5, seed=1), signals)
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / ONNX_FILE).metadata_props}
    assert facts["model_fingerprint"] == "0" * 64
    assert SignalSchema.from_dict(json.loads(facts["schema"])) == policy.card.schema
    assert json.loads(facts["unit_names"]) == [f"unit.{index}" for index in range(5)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, as far as exporting looks at it."""
    policy = policy_of(3)
    cost = CostTable("roofline", 0.1, torch.ones(3, 5, dtype=torch.float64), WIDTHS, "0" * 64, "cpu", None)
    profile = Profile(cost, torch.zeros(3, 5), WIDTHS, "0" * 64, 9, "8-bit")
    with new_run(TrainConfig(), tmp_path / "run") as folder:
        for name in ("seeds/0/policy", "policy"):
            save_policy(policy, profile, folder / name)
    return folder


def test_export_writes_it_beside_the_policy(run_dir: Path, tmp_path: Path) -> None:
    packages()
    result = run(cli.main, "export", run_dir, tmp_path / "out", "--onnx").result
    assert (tmp_path / "out" / ONNX_FILE).is_file()
    assert result["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    found = run(cli.main, "inspect", tmp_path / "out", "--json").result
    assert (found["kind"], found["has_onnx"]) == ("learned policy", True)


def test_without_the_extra_it_is_one_line(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = onnx_policy.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_policy.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    with pytest.raises(InputError, match="onnxruntime; install the extra"):
        check_extra()
    error = run(cli.main, "export", run_dir, tmp_path / "out", "--onnx").error
    assert 'pip install "flexquant-rl[onnx]"' in error
    assert not (tmp_path / "out").exists()


def test_static_allocations_have_no_network(tmp_path: Path) -> None:
    error = run(cli.main, "export", "fixed:4", tmp_path / "out", "--onnx").error
    assert error == "--onnx writes the network of a lossy run, and fixed:4 is none; leave it out"
