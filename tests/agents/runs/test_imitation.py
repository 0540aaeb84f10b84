"""Cloning: the network starts as the static allocation, at every dial."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake_session import FakeModel, fake_profile
from toy_training import TOY_CONFIG, mean_reward, toy_env, toy_front, toy_policy, toy_windows

from flexquant_rl.agents.runs.imitation import clone, collect_signals
from flexquant_rl.agents.runs.importance import Importance
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.policy import PrecisionNet

MODEL = FakeModel(carry=0.5)
FRONT = toy_front(MODEL)
DIALS = FRONT.dial_range()
CONFIG = replace(TOY_CONFIG, kl_weight=None, kl_weight_min=DIALS[0], kl_weight_max=DIALS[1])


def collect(seed: int = 0, num_envs: int = 32) -> torch.Tensor:
    env = toy_env(MODEL, config=CONFIG, num_envs=num_envs, seed=seed)
    return collect_signals(env, FRONT, torch.Generator().manual_seed(seed))


def cloned(num_steps: int, dials: tuple[float, float] = DIALS) -> tuple[PrecisionNet, float]:
    torch.manual_seed(0)
    net = PrecisionNet(toy_env(MODEL, num_envs=1).episodes.schema)
    generator = torch.Generator().manual_seed(0)
    return net, clone(net, collect(), FRONT, fake_profile(MODEL), dials, num_steps=num_steps, generator=generator)


@pytest.fixture(scope="module")
def clone_and_agreement() -> tuple[PrecisionNet, float]:
    return cloned(600)


def test_signals_are_whole_episodes_at_many_dials() -> None:
    env = toy_env(MODEL, config=CONFIG, num_envs=32)
    schema = env.episodes.schema
    signals = collect_signals(env, FRONT, torch.Generator().manual_seed(0))
    assert signals.shape == (32 * CONFIG.max_new_tokens, schema.dim)
    assert bool(signals.isfinite().all())
    facts = env.last_facts  # of the last but one step: nobody looks at what the last one leads to
    assert facts is not None
    assert facts.position.tolist() == [CONFIG.max_new_tokens - 2] * 32
    positions = signals[:, schema.index("position")].view(CONFIG.max_new_tokens, 32)
    assert (positions[0] == 0).all()
    assert (positions.diff(dim=0) > 0).all()
    dials = signals[:, schema.index("dial")]
    assert len(dials.unique()) == 32
    # Mostly the static widths, now and then one off, so that the clone has seen what it leads to.
    last = schema.last_widths(signals[32:])
    static = FRONT.allocate(10 ** dials[32:])
    share = float((last == static).float().mean())
    assert 0.75 < share < 0.97
    columns, expected = (torch.searchsorted(torch.tensor(MODEL.bit_widths), widths) for widths in (last, static))
    assert int((columns - expected).abs().max()) == 1


def test_collecting_is_reproducible() -> None:
    assert torch.equal(collect(seed=4), collect(seed=4))
    assert not torch.equal(collect(seed=4), collect(seed=5))


def test_clone_reproduces_the_allocation_on_fresh_dials(clone_and_agreement: tuple[PrecisionNet, float]) -> None:
    net, agreement = clone_and_agreement
    assert agreement >= 0.98
    # Judged again, without clone()'s own sampling: other text, dials that nothing was collected at.
    fresh = collect(seed=77)
    dials = torch.linspace(DIALS[0], DIALS[1], len(fresh)).log10()
    fresh[:, net.schema.index("dial")] = dials
    expected = FRONT.allocate(10**dials)
    widths = toy_policy(net, MODEL)(fresh).bit_widths
    assert float((widths == expected).float().mean()) >= 0.98
    assert len(expected.unique(dim=0)) > 5  # the dial has to be read


@pytest.mark.gpu
def test_clone_on_a_gpu(device: torch.device) -> None:
    net = PrecisionNet(toy_env(MODEL, num_envs=1).episodes.schema).to(device)
    generator = torch.Generator().manual_seed(0)
    agreement = clone(net, collect(), FRONT, fake_profile(MODEL), DIALS, num_steps=200, generator=generator)
    assert agreement > 0.8
    assert net.mean.device.type == device.type


def test_clone_earns_what_static_earns(clone_and_agreement: tuple[PrecisionNet, float]) -> None:
    net, _ = clone_and_agreement
    dial = (DIALS[0] * DIALS[1]) ** 0.5
    config = replace(CONFIG, kl_weight=dial)
    static = StaticAllocation("static", FRONT.allocate(torch.tensor([dial]))[0])
    windows = toy_windows(config)
    learned = mean_reward(toy_policy(net, MODEL), MODEL, windows, config)
    assert learned == pytest.approx(mean_reward(static, MODEL, windows, config), rel=0.03)


def test_clone_still_explores(clone_and_agreement: tuple[PrecisionNet, float]) -> None:
    """PPO needs probability on the widths beside the static one, or it has nothing to learn from."""
    net, _ = clone_and_agreement
    with torch.no_grad():
        probs = net.logits(collect(seed=3)).softmax(-1)
    best = probs.max(-1).values
    assert 0.5 < float(best.mean()) < 0.999
    assert float(best.min()) < 0.9


def test_clone_spends_bits_by_importance() -> None:
    """Labels are those of the dial times what the signals say of the token."""
    schema = toy_env(MODEL, num_envs=1).episodes.schema
    low, high = DIALS
    mean_log = (math.log10(low) + math.log10(high)) / 2

    class Surprised(Importance):
        """Tokens after a surprise count four times, others a quarter."""

        def forward(self, signals: torch.Tensor) -> torch.Tensor:
            return torch.where(signals[:, schema.index("surprisal")] > 0, 4.0, 0.25)

    torch.manual_seed(0)
    net = PrecisionNet(schema)
    signals = collect()
    signals[:, schema.index("surprisal")] = torch.randn(len(signals), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    agreement = clone(
        net,
        signals,
        FRONT,
        fake_profile(MODEL),
        DIALS,
        importance=Surprised(schema),
        num_steps=900,
        generator=generator,
    )
    assert agreement > 0.9
    fresh = signals[:200].clone()
    fresh[:, schema.index("dial")] = mean_log
    policy = toy_policy(net, MODEL)
    means = []
    for surprisal in (-1.0, 1.0):
        fresh[:, schema.index("surprisal")] = surprisal
        means.append(float(policy(fresh).bit_widths.float().mean()))
    expected = [float(FRONT.allocate(torch.tensor([10**mean_log * factor])).float().mean()) for factor in (0.25, 4.0)]
    assert means == pytest.approx(expected, abs=0.25)
    assert expected[1] - expected[0] > 1


def test_normalisation_comes_from_the_signals(clone_and_agreement: tuple[PrecisionNet, float]) -> None:
    net, _ = clone_and_agreement
    global_signals, unit_signals = net.normalised(collect())
    varying = global_signals.std(0) > 1e-2
    assert float(global_signals.mean(0).abs().max()) < 1e-2
    torch.testing.assert_close(global_signals.std(0)[varying], torch.ones(int(varying.sum())), atol=0.05, rtol=0)
    assert bool(unit_signals.isfinite().all())


def test_one_dial_is_enough() -> None:
    net, agreement = cloned(60, (5.0, 5.0))
    assert agreement >= 0.98
    signals = collect()
    signals[:, net.schema.index("dial")] = torch.tensor(5.0).log10()
    assert (toy_policy(net, MODEL)(signals).bit_widths == FRONT.allocate(torch.tensor([5.0]))).float().mean() >= 0.98
