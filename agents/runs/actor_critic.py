"""The network that is trained, actor and critic, and the interface around it that stable-baselines3 asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from flexquant_rl.engine.control.policy import HIDDEN, PrecisionNet
from flexquant_rl.engine.control.signals import SignalSchema


class ActorCriticNet(PrecisionNet):
    """The network that is trained: a `PrecisionNet` with a value head that sees the pooled units.

    Args:
        schema: What the signals are.
    """

    def __init__(self, schema: SignalSchema) -> None:
        super().__init__(schema)
        self.encode_value = nn.Sequential(
            nn.Linear(schema.num_per_unit + schema.num_global, HIDDEN),
            nn.Tanh(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.Tanh(),
        )
        self.value_head = nn.Linear(HIDDEN, 1)
        self.float()  # whatever torch's default is

    def actor_and_critic(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The weights that choose widths, and those of the value head."""
        critic = [*self.encode_value.parameters(), *self.value_head.parameters()]
        of_critic = set(map(id, critic))
        return [weight for weight in self.parameters() if id(weight) not in of_critic], critic

    def values(self, signals: Tensor) -> Tensor:
        """`[B, dim]` -> `[B, 1]`: expected return."""
        global_signals, unit_signals = self.normalised(signals)
        context = global_signals[:, None].expand(-1, unit_signals.shape[1], -1)
        pooled = self.encode_value(torch.cat([unit_signals, context], dim=-1)).mean(1)
        value: Tensor = self.value_head(pooled)
        return value


class UnitSharedPolicy(ActorCriticPolicy):
    """SB3's interface around an `ActorCriticNet`, whose actor is what is exported.

    Args:
        observation_space: The environment's.
        action_space: `MultiDiscrete([W] * U)`.
        lr_schedule: Learning rate by remaining progress.
        schema: What the observations are.
        **kwargs: Passed on by SB3.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        lr_schedule: Callable[[float], float],
        *,
        schema: SignalSchema,
        **kwargs: Any,
    ) -> None:
        self._schema = schema
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        self.net = ActorCriticNet(self._schema)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr_schedule(1), eps=1e-5)

    def _distribution(self, obs: Tensor) -> Distribution:
        return self.action_dist.proba_distribution(action_logits=self.net.logits(obs).flatten(1))

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions `[B, U]`, values `[B, 1]` and log-probabilities `[B]`."""
        distribution = self._distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.net.values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-probabilities and policy entropy of given actions."""
        distribution = self._distribution(obs)
        return self.net.values(obs), distribution.log_prob(actions), distribution.entropy()

    def unit_log_probs(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each unit's own choice and policy entropy of each unit.

        Args:
            obs: `[B, dim]`.
            actions: `[B, U]` int64.

        Returns:
            Both `[B, U]`, nats.
        """
        log_probs = self.net.logits(obs).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, actions[..., None])[..., 0], entropy

    def get_distribution(self, obs: Any) -> Distribution:
        """The action distribution."""
        return self._distribution(obs)

    def predict_values(self, obs: Any) -> Tensor:
        """Values `[B, 1]`."""
        return self.net.values(obs)
