"""What the bits of a token do: estimates without bias, a fit that recovers what is there, and no more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexquant_rl.agents.config import PPOConfig, TrainConfig
from flexquant_rl.agents.evaluation.influence import Influence
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.agents.runs import importance
from flexquant_rl.agents.runs.importance import (
    Effects,
    Importance,
    choose_exponent,
    fit_importance,
    load_importance,
    measure_effects,
    token_policy,
)
from flexquant_rl.agents.runs.training import Validation
from flexquant_rl.engine.control.decision import Policy, looks
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.token_policy import ImportanceNet
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import write_tensors

SCHEMA = SignalSchema(3, (3, 4, 8))
CONFIG = TrainConfig(importance_windows=8, ppo=PPOConfig(num_envs=4))


def test_effects_are_influences_at_the_sequences_own_allocation(
    tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the KL of that allocation: a text that is harder than others at its dial has larger effects throughout."""
    tokens, front = tiny_prepared.env.max_new_tokens, tiny_prepared.front
    seen: list[Tensor] = []

    def known(model: object, windows: Tensor, bit_widths: Tensor, **options: object) -> Influence:
        seen.append(bit_widths)
        kl = front.output_kl_nats[(front.bit_widths == bit_widths).all(-1)].item()
        per_token = kl * torch.linspace(0.5, 1.5, tokens).expand(len(windows), -1)
        return Influence(units=per_token[..., None], tokens=per_token)

    monkeypatch.setattr(importance, "influences", known)
    monkeypatch.setattr(importance, "_ROWS_PER_DIAL", 2)
    found = measure_effects(tiny_prepared, 8, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.relative, torch.linspace(0.5, 1.5, tokens).double().expand(8, -1))
    # Four dials for eight sequences, from all over their range: not one allocation for all.
    assert len(seen) == 4
    assert len({tuple(one.tolist()) for one in seen}) > 1
    # The signals are those of the same dials.
    dial = found.signals[..., SignalSchema(3, tiny_prepared.model.bit_widths).index("dial")]
    for row, allocation in enumerate(seen):
        assert (dial[2 * row : 2 * row + 2] == dial[2 * row, 0]).all()
        assert torch.equal(front.allocate(10 ** dial[2 * row, :1].double())[0], allocation)


def test_effects_of_a_model(tiny_prepared: Prepared) -> None:
    found = measure_effects(tiny_prepared, 8, 4, torch.Generator().manual_seed(0))
    tokens = tiny_prepared.env.max_new_tokens
    assert found.signals.shape[1:] == (tokens, SignalSchema(3, tiny_prepared.model.bit_widths).dim)
    assert found.relative.shape == found.signals.shape[:2]
    assert len(found.relative) == 8
    assert (found.relative >= 0).all()
    assert float(found.relative.mean()) == pytest.approx(1)
    again = measure_effects(tiny_prepared, 8, 4, torch.Generator().manual_seed(0))
    assert torch.equal(found.relative, again.relative)
    assert torch.equal(found.signals, again.signals)


def test_an_allocation_without_errors_is_not_looked_at(tiny_prepared: Prepared) -> None:
    """Where 8 bits are the reference, the slowest allocation of the front has no KL and dials may choose it."""
    front = tiny_prepared.front
    kl = front.output_kl_nats.clone()
    kl[-1] = 0
    exact = replace(tiny_prepared, front=replace(front, output_kl_nats=kl))
    exact = replace(exact, env=replace(exact.env, kl_weight_min=1e6, kl_weight_max=1e7))
    assert (exact.front.best(torch.tensor([1e6])) == len(kl) - 1).all()
    found = measure_effects(exact, 8, 4, torch.Generator().manual_seed(0))
    assert bool(found.relative.isfinite().all())
    assert float(found.relative.std()) > 0


def effects(log_importance: Tensor, signals: Tensor, noise: float) -> Effects:
    """Effects of known means, with noise of either sign."""
    generator = torch.Generator().manual_seed(5)
    relative = log_importance.exp() + noise * torch.randn(log_importance.shape, generator=generator)
    return Effects(signals, relative / relative.mean())


def fit(net: Importance, known: Effects, generator: torch.Generator, num_steps: int) -> float:
    features = net.features(known.signals.flatten(0, 1))
    return fit_importance(net, features, known.relative, generator, num_steps=num_steps)


def test_what_the_signals_tell_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    signals = torch.randn(60, 50, SCHEMA.dim, generator=generator)
    known = 0.8 * signals[..., SCHEMA.index("token_entropy")] - 0.5 * signals[..., SCHEMA.index("embedding_3")]
    net = Importance(SCHEMA)
    explained = fit(net, effects(known, signals, noise=2.0), generator, num_steps=300)
    assert 0.05 < explained < 1
    fresh = torch.randn(2000, SCHEMA.dim, generator=generator)
    truth = 0.8 * fresh[:, SCHEMA.index("token_entropy")] - 0.5 * fresh[:, SCHEMA.index("embedding_3")]
    assert torch.corrcoef(torch.stack([net(fresh).log(), truth]))[0, 1] > 0.9
    assert float(net(fresh).log().std()) == pytest.approx(float(truth.std()), rel=0.25)


def test_noise_teaches_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    signals = torch.randn(200, 50, SCHEMA.dim, generator=generator)
    net = Importance(SCHEMA)
    explained = fit(net, effects(torch.zeros(200, 50), signals, noise=2.0), generator, num_steps=300)
    assert 0 <= explained < 0.01
    assert float(net(signals.flatten(0, 1)).log().std()) < 0.25


def test_a_fit_repeats() -> None:
    signals = torch.randn(20, 10, SCHEMA.dim, generator=torch.Generator().manual_seed(0))
    nets = [Importance(SCHEMA), Importance(SCHEMA)]
    for net in nets:
        known = effects(signals[..., 0], signals, noise=0.5)
        fit(net, known, torch.Generator().manual_seed(3), num_steps=50)
    assert torch.equal(nets[0](signals[0]), nets[1](signals[0]))


def assert_equal_nets(found: ImportanceNet | None, expected: ImportanceNet | None) -> None:
    assert found is not None
    assert expected is not None
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def test_a_run_keeps_what_it_has_learned(
    tiny_prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_importance(replace(CONFIG, importance_windows=0), tiny_prepared, tmp_path) is None
    assert [*tmp_path.iterdir()] == []
    first = load_importance(CONFIG, tiny_prepared, tmp_path)
    monkeypatch.setattr(importance, "measure_effects", lambda *_: pytest.fail("measured already"))
    again = load_importance(CONFIG, tiny_prepared, tmp_path)
    assert first is not None
    assert again is not None
    assert_equal_nets(again.by_signals, first.by_signals)
    assert_equal_nets(again.by_token, first.by_token)
    path = tmp_path / "importance.safetensors"
    # What a version before wrote: what the token alone tells was not learned.
    older = tmp_path / "older"
    older.mkdir()
    write_tensors(older / path.name, first.by_signals.state_dict(), {})
    of_older = load_importance(CONFIG, tiny_prepared, older)
    assert of_older is not None
    assert of_older.by_token is None
    assert_equal_nets(of_older.by_signals, first.by_signals)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="importance.safetensors: .*delete it to have it learned again"):
        load_importance(CONFIG, tiny_prepared, tmp_path)


def test_validation_chooses_how_far_to_go(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exponent of the best score stays, and at 0 the allocation is static, whatever the network says."""
    net = Importance(SignalSchema(3, tiny_prepared.model.bit_widths))
    seen: list[float] = []
    found = {0.25: -0.1, 0.5: -0.2, 0.75: -0.1, 1.0: -0.5}

    def score(self: Validation, policy: Policy) -> float:
        seen.append(float(net.exponent))
        return found[seen[-1]]

    monkeypatch.setattr(Validation, "score", score)
    validation = Validation(tiny_prepared, 8)
    policy = importance._ByImportance(net, tiny_prepared)
    assert choose_exponent(net, policy, tiny_prepared, validation) == 0  # nothing is better than static
    assert float(net.exponent) == 0
    seen.clear()
    found |= {0.25: 0.3, 0.5: 0.2}
    assert choose_exponent(net, policy, tiny_prepared, validation) == 0.3
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert float(net.exponent) == 0.25
    torch.nn.init.constant_(net.layers[2].bias, 1.0)  # type: ignore[arg-type]
    signals = torch.zeros(2, net.schema.dim)
    assert net(signals).log().tolist() == pytest.approx([0.25, 0.25])
    monkeypatch.undo()
    net.exponent.fill_(0.0)
    assert Validation(tiny_prepared, 8).score(policy) == 0


def test_looking_is_paid_at_every_exponent(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that chooses static allocations looks as well: a gain may be smaller than what looking costs."""
    cost = replace(
        tiny_prepared.cost, controller_ms=0.03 * float(tiny_prepared.cost.latency_ms(torch.tensor([8, 8, 8])))
    )
    costly = replace(tiny_prepared, cost=cost, profile=replace(tiny_prepared.profile, cost=cost))
    net = Importance(SignalSchema(3, costly.model.bit_widths))
    validation = Validation(costly, 8)
    net.exponent.fill_(0.0)
    policy = importance._ByImportance(net, costly)
    at_zero = validation.score(policy)
    assert at_zero == pytest.approx(-0.03)
    monkeypatch.setattr(Validation, "score", lambda self, policy: {0.5: -0.02}.get(float(net.exponent), -0.1))
    assert choose_exponent(net, policy, costly, validation) == -0.02
    assert float(net.exponent) == 0.5
    monkeypatch.setattr(Validation, "score", lambda self, policy: -0.1)
    assert choose_exponent(net, policy, costly, validation) == pytest.approx(at_zero)
    assert float(net.exponent) == 0


def test_what_the_token_alone_tells_costs_nothing(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = replace(tiny_prepared.cost, controller_ms=0.03)
    costly = replace(tiny_prepared, cost=cost, profile=replace(tiny_prepared.profile, cost=cost))
    net = ImportanceNet(SignalSchema(3, costly.model.bit_widths).num_embedding_dims)
    policy = token_policy(net, CONFIG, costly)
    assert not looks(policy)
    net.exponent.fill_(0.0)
    assert Validation(costly, 8).score(policy) == 0  # the static allocation of every dial
    monkeypatch.setattr(Validation, "score", lambda self, policy: -0.001)
    assert choose_exponent(net, policy, costly, Validation(costly, 8)) == 0


def test_the_token_is_learned_from_what_was_measured_once(
    tiny_prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_importance(CONFIG, tiny_prepared, tmp_path)
    assert found is not None
    assert found.by_token is not None
    schema = found.by_signals.schema
    said = capsys.readouterr().err
    assert "the signals explain" in said
    assert "the input token alone explains" in said
    # What no signal but the embedding says moves nothing.
    signals = torch.randn(50, schema.dim, generator=torch.Generator().manual_seed(0))
    other = torch.randn(50, schema.dim, generator=torch.Generator().manual_seed(1))
    for kept in (schema.embedding_columns, schema.index("dial")):
        other[:, kept] = signals[:, kept]
    policy = token_policy(found.by_token, CONFIG, tiny_prepared)
    assert torch.equal(policy(signals).bit_widths, policy(other).bit_widths)


def test_no_multiple_is_beyond_all_measure() -> None:
    net = Importance(SCHEMA)
    torch.nn.init.constant_(net.layers[2].bias, 1e6)  # type: ignore[arg-type]
    assert net(torch.zeros(2, SCHEMA.dim)).log().tolist() == pytest.approx([3.0, 3.0])
    assert math.isfinite(float(net(torch.full((1, SCHEMA.dim), 1e4))))
