"""The regressor: finds what costs, pays for it where it is worth the time, and does not depend on anything random."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from policy_checks import fake_context, signals_of
from torch import Tensor

from flexquant_rl.agents.policies.regressor import Regressor, fit_log_kl
from flexquant_rl.engine.errors import InputError

CONTEXT = fake_context()
SCHEMA = CONTEXT.schema


@dataclass(frozen=True)
class FakeRecording:
    """Text whose KL at width 4 rises with the surprisal, and is a quarter of that at every bit more."""

    signals: Tensor

    def token_kl_nats(self, bit_widths: Tensor) -> Tensor:
        mean = float(bit_widths.double().mean())
        return (SCHEMA.surprisal_nats(self.signals.flatten(0, 1)) - 4).exp().view(4, 50) * 4 ** (4 - mean)


def surprises(nats: Tensor) -> Tensor:
    signals = signals_of(SCHEMA, torch.ones(len(nats)))
    signals[:, SCHEMA.index("surprisal")] = nats / 4
    return signals


def recording() -> FakeRecording:
    generator = torch.Generator().manual_seed(0)
    return FakeRecording(surprises(6 * torch.rand(200, generator=generator)).view(4, 50, -1))


FITTED = replace(CONTEXT, recording=recording)


def test_ridge_regression_finds_a_linear_law() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(5000, 3, generator=generator)
    features[:, 2] = 1.0  # never changes, and gets no weight
    kl = torch.stack([(0.5 * features[:, 0] - 4).exp(), (0.25 * features[:, 1] - 6).exp()], dim=-1)
    fitted = fit_log_kl(features, kl)
    torch.testing.assert_close(fitted(features), kl.double().log(), atol=0.02, rtol=0)
    assert fitted.coefficients[2].tolist() == [0, 0]


def test_the_tokens_that_cost_most_get_the_high_widths() -> None:
    signals = surprises(torch.linspace(0, 6, 25))
    shares = []
    for multiplier in (0.0, 0.1, 1.0, 10.0, 1e4):
        widths = Regressor(multiplier).bind(FITTED)(signals).bit_widths
        assert widths.shape == (25, 4)
        assert (widths == widths[:, :1]).all()
        assert (widths[:, 0].diff() >= 0).all(), "the more is saved, the higher"
        shares.append(float((widths == 5).double().mean()))
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    assert 0 < shares[2] < 1


def test_allocations_of_the_front_and_the_same_fit_every_time() -> None:
    signals = surprises(torch.linspace(0, 6, 25))
    one, other = (Regressor(0.3, low=3.4, high=4.6).bind(FITTED)(signals).bit_widths for _ in range(2))
    assert torch.equal(one, other)
    allowed = {tuple(CONTEXT.front.nearest(mean).tolist()) for mean in (3.4, 4.6)}
    assert {tuple(row) for row in one.tolist()} <= allowed


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"multiplier": -1.0}, "multiplier=-1 must be finite and not negative"),
        ({"multiplier": math.inf}, "multiplier=inf must be finite"),
        ({"low": 0}, "low=0 is no width"),
        ({"high": 9}, "high=9 is no width"),
        ({"low": 5}, "low=5 must be below high=5"),
    ],
)
def test_no_policy_of_any_model(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Regressor(**({"multiplier": 1.0} | parameters))


def test_no_policy_of_this_model() -> None:
    with pytest.raises(InputError, match="'regressor:1,high=7': width 7 is not stored"):
        Regressor(1.0, high=7).bind(FITTED)
    with pytest.raises(InputError, match="'regressor:1' has to be fitted to text"):
        Regressor(1.0).bind(CONTEXT)
