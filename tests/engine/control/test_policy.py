"""Policies as they are deployed: files that come back exactly, that are checked, and that need no learning library."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexquant_rl.engine.control.artefact import POLICY_VERSION, PROFILE_FILE, load_policy, save_policy
from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet, StaticPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SIGNAL_SCHEMA_VERSION, SignalSchema
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import file_sha256

WIDTHS = (3, 4, 5, 6, 8)
SCHEMA = SignalSchema(num_units=3, bit_widths=WIDTHS)
DIAL = (
    DialPoint(kl_weight=1000.0, speedup_modelled=1.1, output_kl_nats=0.001, mean_bit_width=7.0),
    DialPoint(kl_weight=100.0, speedup_modelled=1.5, output_kl_nats=0.01, mean_bit_width=5.0),
    DialPoint(kl_weight=10.0, speedup_modelled=2.0, output_kl_nats=0.1, mean_bit_width=4.0),
)


def random_signals(batch: int, schema: SignalSchema = SCHEMA, seed: int = 0) -> Tensor:
    return 2 * torch.randn(batch, schema.dim, generator=torch.Generator().manual_seed(seed))


def make_policy(schema: SignalSchema = SCHEMA, dial: tuple[DialPoint, ...] = DIAL) -> LearnedPolicy:
    """A policy with weights of every size, so that its choices differ from unit to unit."""
    torch.manual_seed(0)
    net = PrecisionNet(schema)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    net.set_normalisation(random_signals(50, schema, seed=1))
    card = PolicyCard(schema, "f" * 64, tuple(f"unit.{i}" for i in range(schema.num_units)), dial, {"env_steps": 10})
    return LearnedPolicy(net, card)


class ValueNet(PrecisionNet):
    """What training adds to the network."""

    def __init__(self, schema: SignalSchema) -> None:
        super().__init__(schema)
        self.value_head = torch.nn.Linear(3, 1)


def make_profile() -> Profile:
    cost = CostTable("roofline", 1.0, torch.ones(3, 5, dtype=torch.float64), WIDTHS, "f" * 64, "cpu", 1)
    return Profile(cost, torch.rand(3, 5, generator=torch.Generator().manual_seed(0)), WIDTHS, "f" * 64, 9, "8-bit")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with an exported policy."""
    out = tmp_path / "policy"
    save_policy(make_policy(), make_profile(), out)
    return out


class TestActions:
    def test_static_allocation_is_the_same_at_every_token(self) -> None:
        policy = StaticAllocation("knapsack:4.5", torch.tensor([3, 4, 8]))
        assert policy.name == "knapsack:4.5"
        assert policy(random_signals(4)).bit_widths.tolist() == [[3, 4, 8]] * 4

    def test_learned_policy_takes_the_best_width(self) -> None:
        policy = make_policy()
        signals = random_signals(200)
        widths = policy(signals).bit_widths
        assert widths.shape == (200, 3)
        assert widths.dtype == torch.int64
        assert set(widths.flatten().tolist()) == set(WIDTHS), "every width is chosen somewhere"
        best = policy.net.logits(signals).argmax(-1)
        assert widths.tolist() == [[WIDTHS[column] for column in row] for row in best.tolist()]

    @pytest.mark.parametrize("num_units", [1, 3, 33])
    @pytest.mark.parametrize("batch", [1, 2, 64])
    def test_serving_equals_the_network_exactly(self, num_units: int, batch: int) -> None:
        schema = SignalSchema(num_units, WIDTHS)
        policy = make_policy(schema)
        for seed in range(10):
            signals = random_signals(batch, schema, seed)
            logits = policy._logits(signals).view(batch, num_units, len(WIDTHS))
            assert torch.equal(logits, policy.net.logits(signals))
            assert torch.equal(policy(signals).bit_widths, torch.tensor(WIDTHS)[logits.argmax(-1)])

    def test_training_on_leaves_the_policy_as_it_is(self) -> None:
        live = make_policy().net.train()
        policy = LearnedPolicy(live, make_policy().card)
        signals = random_signals(20)
        before, logits = policy(signals).bit_widths, policy.net.logits(signals)
        with torch.no_grad():
            for tensor in live.state_dict().values():
                tensor.add_(1.0)
        assert torch.equal(policy(signals).bit_widths, before)
        assert torch.equal(policy.net.logits(signals), logits), "what is saved is what was served"
        assert live.training, "the caller's network is left alone"

    @pytest.mark.gpu
    def test_device_is_the_signals_one(self, device: torch.device) -> None:
        policy, signals = make_policy(), random_signals(20)
        on_gpu = LearnedPolicy(policy.net.to(device), policy.card)
        expected = make_policy()(signals).bit_widths
        for chooser in (make_policy(), on_gpu):
            for given in (signals, signals.to(device)):
                widths = chooser(given)
                assert widths.device.type == given.device.type
                assert torch.equal(widths.cpu(), expected)

    def test_rows_do_not_see_each_other(self) -> None:
        policy = make_policy()
        signals = random_signals(6)
        other = signals.clone()
        other[1:] = random_signals(5, seed=9)
        torch.testing.assert_close(policy.net.logits(signals)[0], policy.net.logits(other)[0])

    def test_units_share_one_network(self) -> None:
        """Permuted units get permuted widths: nothing depends on a unit's place."""
        net = make_policy().net
        signals = random_signals(5)
        token, unit = SCHEMA.split(signals)
        order = [2, 0, 1]
        permuted = torch.cat([token, unit[:, order].flatten(1)], dim=1)
        torch.testing.assert_close(net.logits(permuted), net.logits(signals)[:, order])

    def test_any_depth_has_the_same_parameters(self) -> None:
        shapes = [
            {name: tensor.shape for name, tensor in PrecisionNet(SignalSchema(depth, WIDTHS)).state_dict().items()}
            for depth in (1, 3, 65)
        ]
        assert shapes[0] == shapes[1] == shapes[2]

    def test_untrained_network_is_indifferent(self) -> None:
        torch.manual_seed(0)
        probabilities = PrecisionNet(SCHEMA).logits(random_signals(50)).softmax(-1)
        torch.testing.assert_close(probabilities, torch.full_like(probabilities, 0.2), atol=0.03, rtol=0)

    def test_normalisation_standardises_what_it_was_set_from(self) -> None:
        net = PrecisionNet(SCHEMA)
        signals = 5 + 3 * random_signals(400)
        signals[:, 0] = 7.0  # a signal that never changes must not be divided by zero
        net.set_normalisation(signals)
        token, unit = net.normalised(signals)
        assert torch.equal(token[:, 0], torch.zeros(400))
        torch.testing.assert_close(token[:, 1:].mean(0), torch.zeros(SCHEMA.num_global - 1), atol=1e-4, rtol=0)
        torch.testing.assert_close(token[:, 1:].std(0), torch.ones(SCHEMA.num_global - 1))
        torch.testing.assert_close(unit.flatten(0, 1).std(0), torch.ones(SCHEMA.num_per_unit))


class TestDial:
    @pytest.mark.parametrize(("speed", "kl_weight"), [(1.0, 1000.0), (2.0, 10.0)])
    def test_nearest_setting(self, speed: float, kl_weight: float) -> None:
        assert make_policy().card.setting_for_speed(speed).kl_weight == kl_weight

    def test_between_two_settings(self) -> None:
        """Half way between two speeds: the dial and the KL at their geometric mean, the width at its mean."""
        points = sorted(make_policy().card.dial, key=lambda point: point.speedup_modelled)
        slow, fast = points[-2:]
        speed = (slow.speedup_modelled + fast.speedup_modelled) / 2
        found = make_policy().card.setting_for_speed(speed)
        assert found.speedup_modelled == speed
        assert found.kl_weight == pytest.approx((slow.kl_weight * fast.kl_weight) ** 0.5)
        assert found.output_kl_nats == pytest.approx((slow.output_kl_nats * fast.output_kl_nats) ** 0.5)
        assert found.mean_bit_width == pytest.approx((slow.mean_bit_width + fast.mean_bit_width) / 2)

    @pytest.mark.parametrize("speed", [0.5, 2.1, float("nan"), float("inf")])
    def test_speed_out_of_reach(self, speed: float) -> None:
        with pytest.raises(InputError, match=r"speed .* is outside 1 to 2\.00.*--kl-weight"):
            make_policy().card.setting_for_speed(speed)

    def test_policy_that_was_never_judged(self) -> None:
        with pytest.raises(InputError, match="outside"):
            make_policy(dial=()).card.setting_for_speed(1.0)


class TestFiles:
    def test_roundtrip(self, saved: Path) -> None:
        original, loaded = make_policy(), load_policy(saved, model_fingerprint="f" * 64)
        assert sorted(file.name for file in saved.iterdir()) == ["policy.json", "policy.safetensors", "profile.json"]
        assert Profile.load(saved / PROFILE_FILE).sensitivity.tolist() == make_profile().sensitivity.tolist()
        assert loaded.card == original.card
        assert loaded.name == "policy"
        assert load_policy(saved, name="mine").name == "mine"
        signals = random_signals(1000)
        assert torch.equal(loaded(signals).bit_widths, original(signals).bit_widths)
        assert torch.equal(loaded.net.logits(signals), original.net.logits(signals))
        assert not loaded.net.training

    def test_what_only_training_needs_is_left_out(self, tmp_path: Path) -> None:
        net = ValueNet(SCHEMA)
        save_policy(LearnedPolicy(net, make_policy().card), make_profile(), tmp_path / "policy")
        stored = load_file(tmp_path / "policy" / "policy.safetensors")
        assert stored.keys() == PrecisionNet(SCHEMA).state_dict().keys()
        assert torch.equal(stored["width_head.weight"], net.width_head.weight)

    def test_static_allocation(self, tmp_path: Path) -> None:
        card = replace(make_policy().card, dial=())
        original = StaticPolicy("knapsack:4.5", torch.tensor([3, 8, 4]), card)
        save_policy(original, make_profile(), tmp_path / "policy")
        loaded = load_policy(tmp_path / "policy", model_fingerprint="f" * 64)
        assert isinstance(loaded, StaticPolicy)
        assert (loaded.name, loaded.card) == ("knapsack:4.5", card)
        assert loaded(random_signals(2)).bit_widths.tolist() == [[3, 8, 4]] * 2
        assert load_policy(tmp_path / "policy", name="mine").name == "mine"

    @pytest.mark.parametrize(
        ("widths", "match"),
        [([3, 8], "not the widths of 3 units"), ([3, 8, 7], r"width 7 is not stored, \[3, 4, 5, 6, 8\] are")],
    )
    def test_static_allocation_that_does_not_fit(self, tmp_path: Path, widths: list[int], match: str) -> None:
        save_policy(StaticPolicy("mine", torch.tensor(widths), make_policy().card), make_profile(), tmp_path / "policy")
        self.assert_refused(tmp_path / "policy", match)

    def test_another_kind(self, saved: Path) -> None:
        self.edit(saved, kind="surprising")
        self.assert_refused(saved, "kind 'surprising' is not learned, token, static or drafts")

    def test_is_a_few_kilobytes(self, saved: Path) -> None:
        assert sum(file.stat().st_size for file in saved.iterdir()) < 200_000

    def test_existing_output_is_kept(self, saved: Path) -> None:
        before = (saved / "policy.json").read_bytes()
        with pytest.raises(InputError, match="exists and is not empty"):
            save_policy(make_policy(dial=()), make_profile(), saved)
        assert (saved / "policy.json").read_bytes() == before

    def test_failed_save_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: Path, data: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("flexquant_rl.engine.control.artefact.write_json", fail)
        with pytest.raises(OSError, match="No space left"):
            save_policy(make_policy(), make_profile(), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_another_model(self, saved: Path) -> None:
        load_policy(saved)
        with pytest.raises(InputError, match=r"trained for model f{12}, but this one is e{12}; train a policy"):
            load_policy(saved, model_fingerprint="e" * 64)

    def edit(self, path: Path, **changes: Any) -> None:
        data = json.loads((path / "policy.json").read_text())
        (path / "policy.json").write_text(json.dumps({**data, **changes}))

    def test_another_policy_version(self, saved: Path) -> None:
        self.edit(saved, version=POLICY_VERSION + 1)
        with pytest.raises(InputError, match="policy version 4 with signal schema 2, but this program reads 3 with 2"):
            load_policy(saved)

    def test_another_signal_schema(self, saved: Path) -> None:
        self.edit(saved, schema={**SCHEMA.to_dict(), "version": SIGNAL_SCHEMA_VERSION + 1})
        with pytest.raises(InputError, match="policy version 3 with signal schema 3, but this program reads 3 with 2"):
            load_policy(saved)

    @pytest.mark.parametrize("name", ["policy.safetensors", "profile.json"])
    def test_flipped_byte(self, saved: Path, name: str) -> None:
        whole = bytearray((saved / name).read_bytes())
        whole[-20] ^= 1
        (saved / name).write_bytes(whole)
        self.assert_refused(saved, f"{name}: sha256 .* but policy.json says")

    def test_missing_profile(self, saved: Path) -> None:
        (saved / "profile.json").unlink()
        self.assert_refused(saved, "no readable policy.*profile.json")

    @pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
    @pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
    def test_damaged_file(self, saved: Path, name: str, damage: str) -> None:
        file = saved / name
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-10] if damage == "truncated" else b"\xff" * 100)
        self.assert_refused(saved, "no readable policy")

    @pytest.mark.parametrize(
        "changes",
        [
            {"schema": None},
            {"schema": {"version": SIGNAL_SCHEMA_VERSION}},
            {"schema": {**SCHEMA.to_dict(), "num_units": "many"}},
            {"dial": [{"kl_weight": 1.0}]},
            {"dial": 3},
            {"unit_names": None},
        ],
        ids=str,
    )
    def test_damaged_card(self, saved: Path, changes: dict[str, Any]) -> None:
        self.edit(saved, **changes)
        self.assert_refused(saved, "not a policy|not a whole policy")

    def test_card_that_is_no_object(self, saved: Path) -> None:
        (saved / "policy.json").write_text("[]")
        self.assert_refused(saved, "not a policy")

    @pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
    def test_tensors_that_do_not_fit(self, saved: Path, damage: str) -> None:
        tensors = load_file(saved / "policy.safetensors")
        if damage == "missing":
            del tensors["mean"]
        elif damage == "extra":
            tensors["surprise"] = torch.zeros(1)
        else:
            tensors["width_head.bias"] = torch.zeros(4)
        save_file(tensors, saved / "policy.safetensors")
        self.edit(saved, weights_sha256=file_sha256(saved / "policy.safetensors"))
        self.assert_refused(saved, "tensors do not fit")

    def test_tensors_of_another_width_list(self, saved: Path) -> None:
        self.edit(saved, schema=SignalSchema(3, (3, 8)).to_dict())
        self.assert_refused(saved, "tensors do not fit")

    def assert_refused(self, path: Path, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_policy(path)
        assert "export" in str(caught.value)
        assert "\n" not in str(caught.value)


IN_A_PLAIN_PROCESS = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"gymnasium", "stable_baselines3", "tensorboard"}:
            raise ModuleNotFoundError(f"serving must not import {name}")

sys.meta_path.insert(0, Absent())

import torch
from flexquant_rl.engine.control.artefact import load_policy

policy = load_policy(Path(sys.argv[1]))
signals = torch.tensor(json.loads(Path(sys.argv[2]).read_text()))
print(json.dumps(policy(signals).bit_widths.tolist()))
"""


def test_serving_needs_no_learning_library(saved: Path, tmp_path: Path) -> None:
    signals = random_signals(20)
    (tmp_path / "signals.json").write_text(json.dumps(signals.tolist()))
    command = [sys.executable, "-c", IN_A_PLAIN_PROCESS, str(saved), str(tmp_path / "signals.json")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == make_policy()(signals).bit_widths.tolist()
