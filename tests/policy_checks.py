"""What the tests of policies share: a model to bind to, signals to decide by, and what every policy must do."""

from __future__ import annotations

import torch
from fake_session import FakeModel, FakeSession, fake_profile, fake_windows
from torch import Tensor

from flexquant_rl.agents.policies.families import bind_policy
from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.policies.static_front import static_front
from flexquant_rl.agents.policies.unbound import PolicyContext, UnboundPolicy
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.kernels.signal_constants import NATS_SCALE, POSITION_SCALE, WIDTH_SCALE


def fake_context(model: FakeModel | None = None) -> PolicyContext:
    """A fake model as policies know it; its front is whole."""
    model = model or FakeModel()
    profile = fake_profile(model)
    schema = SignalSchema(model.num_units, model.bit_widths)
    return PolicyContext(profile, static_front(profile, model.unit_weights, num_points=1000), schema, model.fingerprint)


def signals_of(
    schema: SignalSchema, entropy_nats: Tensor, *, last_widths: Tensor | None = None, tokens_decoded: int | Tensor = 0
) -> Tensor:
    """Signals `[B, dim]` with a given smoothed entropy, last widths (default: 8) and tokens since the prompt."""
    signals = torch.zeros(len(entropy_nats), schema.dim)
    signals[:, schema.index("token_entropy_ema")] = entropy_nats / NATS_SCALE
    signals[:, schema.index("position")] = torch.as_tensor(tokens_decoded).float().log1p() / POSITION_SCALE
    per_unit = signals[:, schema.num_global :].view(len(signals), schema.num_units, schema.num_per_unit)
    per_unit[..., schema.index_in_unit("last_width")] = 1.0 if last_widths is None else last_widths / WIDTH_SCALE
    return signals


def check_protocol(unbound: UnboundPolicy) -> None:
    """Plays a batch of episodes: `[B, U]` int64 of stored widths, whatever the number of rows."""
    model = FakeModel()
    context = fake_context(model)
    policy = bind_policy(unbound, context)
    assert policy.name == policy_name(unbound)
    config = EnvConfig(prompt_tokens=3, max_new_tokens=6)
    windows = fake_windows(5, config.window_tokens)
    episodes = Episodes(FakeSession(model, num_rows=5), context.profile, windows, config)
    rows = torch.arange(5)
    episodes.start(rows, rows, torch.full((5,), 4.0), torch.zeros_like(rows))
    for _ in range(6):
        decision = policy(episodes.signals())
        widths = decision.bit_widths
        assert widths.shape == (5, 4)
        assert widths.dtype == torch.int64
        assert set(widths.flatten().tolist()) <= set(model.bit_widths)
        episodes.step(decision)
    assert policy(episodes.signals()[:1]).bit_widths.shape == (1, 4)
