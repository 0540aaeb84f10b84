"""Profiles: output KL against float64 arithmetic, sensitivities that mean what they say, files that are checked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexquant_rl.engine.checkpoint import load_checkpoint, load_model, save_checkpoint
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.draft_times import DraftTimes
from flexquant_rl.engine.control.output_kl import output_kl_nats, reference_width
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig


def kl_in_float64(reference: list[float], other: list[float]) -> float:
    def log_probabilities(logits: list[float]) -> list[float]:
        peak = max(logits)
        total = math.log(sum(math.exp(value - peak) for value in logits))
        return [value - peak - total for value in logits]

    pairs = zip(log_probabilities(reference), log_probabilities(other), strict=True)
    return sum(math.exp(p) * (p - q) for p, q in pairs)


MEASURED = VerifyCosts("measured", 2.0, 2.0, (1.0,), (2.1, 2.3)).to_dict()
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4)


class TestOutputKl:
    @settings(max_examples=60)
    @given(LOGITS, LOGITS)
    def test_equals_float64(self, reference: list[float], other: list[float]) -> None:
        actual = output_kl_nats(torch.tensor(reference), torch.tensor(other)).item()
        assert actual == pytest.approx(kl_in_float64(reference, other), rel=1e-4, abs=1e-5)
        assert actual >= 0

    def test_shapes_and_direction(self) -> None:
        reference, other = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
        kl = output_kl_nats(reference, other)
        assert kl.shape == (2, 3)
        assert kl[1, 2].item() == pytest.approx(kl_in_float64(reference[1, 2].tolist(), other[1, 2].tolist()), rel=1e-4)
        assert not torch.allclose(kl, output_kl_nats(other, reference))
        assert torch.equal(output_kl_nats(reference, reference), torch.zeros(2, 3))

    def test_tokens_that_are_ruled_out(self) -> None:
        half = torch.tensor([0.0, 0.0, -math.inf])
        assert output_kl_nats(half, half).item() == 0
        assert output_kl_nats(half, torch.zeros(3)).item() == pytest.approx(math.log(1.5))
        assert output_kl_nats(torch.zeros(3), half).item() == math.inf


class TestSensitivity:
    def test_is_the_mean_kl_with_that_unit_alone_quantised(self, nested_model: NestedCausalLM) -> None:
        windows = torch.randint(3, 128, (3, 10))
        profile = profile_model(nested_model, windows, roofline_cost(nested_model), first=4)
        assert profile.sensitivity.shape == (3, 5)
        assert profile.num_tokens == 3 * 6
        assert profile.reference == "unquantised"
        assert profile.bit_widths == nested_model.bit_widths
        assert profile.fingerprint == nested_model.fingerprint
        session = DecodeSession(nested_model)
        reference = session.score(windows, first=4)
        for unit, column in ((0, 0), (1, 2), (2, 1)):
            widths = torch.zeros(3, dtype=torch.int64)
            widths[unit] = nested_model.bit_widths[column]
            expected = output_kl_nats(reference, session.score(windows, widths, first=4)).double().mean()
            assert profile.sensitivity[unit, column].item() == pytest.approx(expected.item(), rel=1e-3)

    def test_falls_with_the_width(self, nested_model: NestedCausalLM) -> None:
        windows = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
        sensitivity = profile_model(nested_model, windows, roofline_cost(nested_model)).sensitivity
        assert (sensitivity[:, 1:] < sensitivity[:, :-1]).all()
        assert (sensitivity > 0).all()

    def test_falls_with_the_width_on_a_real_model_and_text(self, shared_dir: Path) -> None:
        model = load_model(str(shared_dir / "models" / "stories260K"), QuantizationConfig())
        text = (shared_dir / "text" / "tinystories_valid_head.txt").read_text(encoding="utf-8")[:4000]
        token_ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"][:512]).view(4, 128)
        sensitivity = profile_model(model, token_ids, roofline_cost(model)).sensitivity
        assert (sensitivity[:, 1:] < sensitivity[:, :-1]).all()
        ratio = sensitivity[:, 0] / sensitivity[:, 2]  # two bits apart: 4 to 5 times per bit (design, section 5)
        assert ((ratio > 6) & (ratio < 60)).all()

    def test_compares_with_8_bits_where_there_is_no_other_copy(
        self, nested_model: NestedCausalLM, tmp_path: Path
    ) -> None:
        save_checkpoint(nested_model, tmp_path / "nested")
        model = load_checkpoint(tmp_path / "nested")
        assert (reference_width(nested_model), reference_width(model)) == (0, 8)
        profile = profile_model(model, torch.randint(3, 128, (2, 12)), roofline_cost(model))
        assert profile.reference == "8-bit"
        assert (profile.sensitivity[:, -1] == 0).all()
        assert (profile.sensitivity[:, :-1] > 0).all()

    def test_progress_sees_every_unit(self, nested_model: NestedCausalLM) -> None:
        seen: list[Any] = []

        def progress(items: Any) -> Any:
            for item in items:
                seen.append(item)
                yield item

        profile_model(nested_model, torch.randint(3, 128, (1, 4)), roofline_cost(nested_model), progress=progress)
        assert seen == [0, 1, 2]


class TestFile:
    @pytest.fixture
    def profile(self, nested_model: NestedCausalLM) -> Profile:
        sensitivity = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
        cost = replace(roofline_cost(nested_model), source="measured", num_threads=1, error_p50=0.01, error_p95=0.1)
        return Profile(cost, sensitivity, nested_model.bit_widths, nested_model.fingerprint, 100, "unquantised")

    def test_roundtrip(self, profile: Profile, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        profile.save(path)
        loaded = Profile.load(path)
        assert torch.equal(loaded.sensitivity, profile.sensitivity)
        assert torch.equal(loaded.cost.unit_ms, profile.cost.unit_ms)
        assert loaded.cost.to_dict() == profile.cost.to_dict()
        for name in ("bit_widths", "fingerprint", "num_tokens", "reference"):
            assert getattr(loaded, name) == getattr(profile, name)
        assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]

    def test_times_of_drafts(self, profile: Profile, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        costs = VerifyCosts("measured", 2.0, 2.0, (1.0, 1.2), (2.1, 2.3, 2.5), 0.1, 0.05)
        replace(profile, drafts=DraftTimes((3, 4), 8, costs)).save(path)
        assert Profile.load(path).drafts == DraftTimes((3, 4), 8, costs)
        profile.save(path)
        assert Profile.load(path).drafts is None

    def test_the_version_before_has_no_times_of_drafts(self, profile: Profile, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        profile.save(path)
        data = json.loads(path.read_text())
        del data["drafts"]
        path.write_text(json.dumps({**data, "version": 2}))
        loaded = Profile.load(path)
        assert loaded.drafts is None
        assert torch.equal(loaded.sensitivity, profile.sensitivity)

    def assert_refused(self, path: Path, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            Profile.load(path)
        assert "run `fq profile`" in str(caught.value)

    def test_missing_or_unreadable(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        self.assert_refused(path, "no readable profile")
        path.write_text("{")
        self.assert_refused(path, "no readable profile")
        path.write_bytes(b"\xff\xfe")
        self.assert_refused(path, "no readable profile")

    @pytest.mark.parametrize("text", ["[]", "3", "{}", '{"version": 1}'])
    def test_another_version(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "profile.json").write_text(text)
        self.assert_refused(tmp_path / "profile.json", "profile version .* this is 3")

    @pytest.mark.parametrize(
        "damage",
        [
            {"cost": None},
            {"cost": {}},
            {"cost": {"surprise": 1}},
            {"sensitivity": "high"},
            {"sensitivity": [[1.0], [1.0, 2.0]]},
            {"bit_widths": 8},
            {"drafts": 3},
            {"drafts": {"draft_widths": [3], "verify_width": 8, "costs": None}},
            {"drafts": {"draft_widths": [3], "verify_width": 8, "costs": {**MEASURED, "source": "modelled"}}},
            {"drafts": {"draft_widths": [3, 4], "verify_width": 8, "costs": MEASURED}},
            {"drafts": {"draft_widths": [8], "verify_width": 8, "costs": MEASURED}},
            {"drafts": {"draft_widths": [3], "verify_width": 8, "costs": {**MEASURED, "draft_ms": [-1.0]}}},
        ],
        ids=str,
    )
    def test_damaged_fields(self, profile: Profile, tmp_path: Path, damage: dict[str, Any]) -> None:
        path = tmp_path / "profile.json"
        profile.save(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
        self.assert_refused(path, "not a whole profile")

    @pytest.mark.parametrize("name", ["drafts", "cost", "sensitivity", "bit_widths", "fingerprint", "reference"])
    def test_missing_field(self, profile: Profile, tmp_path: Path, name: str) -> None:
        path = tmp_path / "profile.json"
        profile.save(path)
        data = json.loads(path.read_text())
        del data[name]
        path.write_text(json.dumps(data))
        self.assert_refused(path, f"not a whole profile .*{name}")
