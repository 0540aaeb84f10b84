"""Behaviour cloning of static allocations: PPO starts where what is known beforehand leads.

That is the best static allocation at the dial, times the importance that the signals give the token, where it has been
learned.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flexquant_rl.agents.policies.static_front import StaticFront
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.policy import PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.fq_env.vec_env import DecodeVecEnv

if TYPE_CHECKING:  # which validates as the training does that clones
    from flexquant_rl.agents.runs.importance import Importance

_TEMPERATURE = 0.01
"""Reward per token, in full-width steps, that makes a width e times less likely than the static one: PPO explores what
is cheap. On the embedded model the static width has a probability of 0.59 on average."""
_MARGIN = 0.3
"""Other widths are at least this many temperatures behind: the clone's best-scored widths are the static ones."""


def collect_signals(env: DecodeVecEnv, front: StaticFront, generator: torch.Generator) -> Tensor:
    """Plays one episode per row at the static widths of random dials, now and then one width off.

    The last step of the episodes is left out: nobody would look at what it leads to.

    Returns:
        Signals `[n, dim]`.
    """
    signals = [torch.as_tensor(env.reset())]
    for _ in range(env.episodes.config.max_new_tokens - 1):
        columns = env.task.to_actions(Decision(front.allocate(env.episodes.kl_weight)))
        shift = torch.randint(-1, 2, columns.shape, generator=generator)
        moved = torch.rand(columns.shape, generator=generator) < 0.2
        columns = (columns + shift * moved).clamp(0, len(env.episodes.model.bit_widths) - 1)
        signals.append(torch.as_tensor(env.step(columns.numpy())[0]))
    return torch.cat(signals)


def clone(
    net: PrecisionNet,
    signals: Tensor,
    front: StaticFront,
    profile: Profile,
    dials: tuple[float, float],
    *,
    importance: Importance | None = None,
    num_steps: int = 900,
    batch_size: int = 512,
    learning_rate: float = 4e-3,
    generator: torch.Generator,
) -> float:
    """Fits a network to static allocations, softened by what leaving them costs; sets its normalisation first.

    The rows of one rollout hold few settings of the dial, so every sample's dial is drawn afresh and its label follows.

    Args:
        net: Trained in place.
        signals: `[n, dim]` recorded signals.
        front: Gives the labels.
        profile: Profile of the model.
        dials: Range of the dial.
        importance: Multiplies the dial by what the signals say of a token; None for plain static allocations.
        num_steps: Gradient steps.
        batch_size: Samples per step.
        learning_rate: Falls linearly to zero.
        generator: Draws samples and dials.

    Returns:
        Share of units whose best-scored width is that of the label, on fresh dials.
    """
    net.set_normalisation(signals)
    device = net.mean.device  # signals, front and profile are on the CPU, as environments give them
    widths = torch.tensor(net.schema.bit_widths)
    dial_idx = net.schema.index("dial")
    low, high = math.log10(dials[0]), math.log10(dials[1])

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        picked = signals[torch.randint(len(signals), (size,), generator=generator)].clone()
        picked[:, dial_idx] = low + (high - low) * torch.rand(size, generator=generator)
        # Beyond the range of the dial as well: the least important token at its lower end is worth less than that.
        prices = 10 ** picked[:, dial_idx] * (1.0 if importance is None else importance(picked))
        return picked, prices, torch.searchsorted(widths, front.allocate(prices))

    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / num_steps)
        picked, prices, columns = batch(batch_size)
        targets = _targets(front, profile, prices, columns)
        loss = F.cross_entropy(net.logits(picked.to(device)).flatten(0, 1), targets.to(device).flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        picked, _, columns = batch(4 * batch_size)
        return float((net.logits(picked.to(device)).argmax(-1).cpu() == columns).float().mean())


def _targets(front: StaticFront, profile: Profile, kl_weight: Tensor, columns: Tensor) -> Tensor:
    """Boltzmann policy over what leaving the static allocation in one unit costs, `[n, U, W]` probabilities."""
    others = (front.marginal_rewards(profile, kl_weight) / _TEMPERATURE).clamp_max(-_MARGIN)
    return others.scatter(-1, columns[..., None], 0.0).softmax(-1).float()
