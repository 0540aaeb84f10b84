"""PPO's update for a policy that decides many units at once, at prices that differ from row to row.

It replaces the `train` of stable-baselines3, which multiplies the units' probabilities into one ratio and normalises
all advantages together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.utils import explained_variance
from torch import Tensor, nn

from flexquant_rl.agents.runs.actor_critic import UnitSharedPolicy

_ROWS_PER_BIN = 12
_MAX_BINS = 8


@dataclass(frozen=True)
class _Batch:
    """N transitions of a rollout.

    Attributes:
        observations: `[N, dim]` float32.
        actions: `[N, U]` int64.
        log_probs: `[N, U]`, of the actions, by the policy that played them.
        advantages: `[N]`, normalised.
        returns: `[N]`.
        scale: `[N]`, what the advantages were divided by.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    scale: Tensor

    def __getitem__(self, picked: Tensor) -> _Batch:
        return _Batch(**{name: tensor[picked] for name, tensor in vars(self).items()})


class UnitPPO(PPO):
    """PPO with one clipped ratio per unit and advantages that are normalised per dial.

    A token's advantage is credited to each unit's choice through that unit's own ratio,
    `mean over units of min(r_u A, clip(r_u) A)`. At the start of an update its gradient is that of the joint ratio,
    divided by U. But the joint ratio of 30 units leaves `1 +- clip_range` when each unit has moved by a thirtieth of
    it, so with it the clip tightens with the depth of the model. Means over units keep the weights of entropy and
    value, and the bound of the gradient's norm, the same at any depth.

    Uses of the base class: `clip_range`, `ent_coef`, `vf_coef`, `max_grad_norm`, `batch_size`, `n_epochs`.
    """

    policy: UnitSharedPolicy

    def train(self) -> None:
        """Updates the policy on the rollout; logs means over all its gradient steps."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        rollout = self._rollout()
        logged: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.n_epochs):
            for picked in self._minibatches(len(rollout.returns)):
                for name, value in self._gradient_step(rollout[picked]).items():
                    logged[name].append(value)
            self._n_updates += 1
        for name, values in logged.items():
            self.logger.record(name, float(np.mean(values)))
        buffer = self.rollout_buffer
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        self.logger.record("policy/explained_variance", explained)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _minibatches(self, size: int) -> Iterator[Tensor]:
        # NumPy's global generator, as in the base class: checkpoints hold its state.
        order = torch.from_numpy(np.random.permutation(size)).to(self.device)  # noqa: NPY002
        # What is left over joins the last batch: gradient steps of a few transitions are noise.
        count = max(size // self.batch_size, 1)
        return iter(order.tensor_split([self.batch_size * index for index in range(1, count)]))

    def _rollout(self) -> _Batch:
        buffer = self.rollout_buffer

        def flat(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, device=self.device).flatten(0, 1)

        observations, actions = flat(buffer.observations), flat(buffer.actions).long()
        # The buffer keeps the units' joint probability only; the policy is still the one that played.
        with torch.no_grad():
            chunks = zip(observations.split(self.batch_size), actions.split(self.batch_size), strict=True)
            log_probs = torch.cat([self.policy.unit_log_probs(*chunk)[0] for chunk in chunks])
        dial = observations[:, self.policy.net.schema.index("dial")]
        advantages, scale = normalised_by_dial(flat(buffer.advantages), dial, num_rows=buffer.n_envs)
        return _Batch(observations, actions, log_probs, advantages, flat(buffer.returns), scale)

    def _gradient_step(self, batch: _Batch) -> dict[str, float]:
        """One step of the optimizer; returns what is to be logged of it, by tag."""
        clip_range: float = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        log_probs, entropy = self.policy.unit_log_probs(batch.observations, batch.actions)
        log_ratio = log_probs - batch.log_probs
        policy_loss = -unit_objective(log_ratio, batch.advantages, clip_range)
        # In units of the dial's own scale, or the highest dials would own the value function too.
        errors = (batch.returns - self.policy.net.values(batch.observations)[:, 0]) / batch.scale
        value_loss, entropy_loss = errors.square().mean(), -entropy.mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        self.policy.optimizer.zero_grad()
        loss.backward()
        # Actor and critic share no weight. Bounded together, the critic's gradient would shorten the actor's.
        for parameters in self.policy.net.actor_and_critic():
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.policy.optimizer.step()
        ratio, log_ratio = log_ratio.detach().exp(), log_ratio.detach()
        approx_kl = (ratio - 1 - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip_range).float().mean()
        return {
            "train/policy_gradient_loss": policy_loss.item(),
            "train/value_loss": value_loss.item(),
            "policy/policy_entropy": -entropy_loss.item(),
            "policy/approx_kl": approx_kl.item(),
            "policy/clip_fraction": clip_fraction.item(),
        }


def unit_objective(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped objective, each unit by itself: mean of `min(r A, clip(r) A)`, which is to rise.

    Args:
        log_ratio: `[N, U]`, log-probability of each unit's choice now, less what it was when it was played.
        advantages: `[N]`; all units of a token share one.
        clip_range: A ratio beyond `1 +- clip_range` earns nothing more.

    Returns:
        Scalar.

    References:
        PPO, arXiv:1707.06347, equation 7, with one ratio per unit.
    """
    ratio, shared = log_ratio.exp(), advantages[:, None]
    return torch.min(ratio * shared, ratio.clamp(1 - clip_range, 1 + clip_range) * shared).mean()


def normalised_by_dial(advantages: Tensor, dial: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
    """Standardises advantages among those of similar dials: mean 0 and deviation 1 within each bin of the log dial.

    A nat costs a hundred times as much at one end of the dial as at the other, so that advantages normalised together
    are those of the dearest nats, and the other dials learn nothing.

    Args:
        advantages: `[N]`.
        dial: `[N]`, log10 of the KL weights; drawn evenly over their range.
        num_rows: Episodes that were played side by side. A bin has about twelve of them, so that its deviation is known
            well; there are 1 to 8 bins.

    Returns:
        The advantages, `[N]`, and the deviation that each was divided by, `[N]`.
    """
    num_bins = min(max(num_rows // _ROWS_PER_BIN, 1), _MAX_BINS)
    low, high = dial.min(), dial.max()
    bins = ((dial - low) / (high - low).clamp_min(1e-6) * num_bins).long().clamp_max(num_bins - 1)
    counts = torch.zeros(num_bins, device=dial.device).index_add_(0, bins, torch.ones_like(dial)).clamp_min(1)
    mean = torch.zeros_like(counts).index_add_(0, bins, advantages) / counts
    centred = advantages - mean[bins]
    scale = (torch.zeros_like(counts).index_add_(0, bins, centred.square()) / counts).sqrt().clamp_min(1e-8)[bins]
    return centred / scale, scale
