"""The network of a learned policy of drafts: observation to action, two hidden layers. Needs torch alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from flexquant_rl.engine.control.drafting_rules import Actions
from flexquant_rl.engine.control.policy import HIDDEN
from flexquant_rl.engine.control.verified_signals import OUTPUT_NAMES, Observations, Sees, VerifiedSchema

_SMALLEST_DEVIATION = 1e-3
_OUTPUTS = slice(len(OUTPUT_NAMES))  # of an observation: what describes the newest output


class DraftingNet(nn.Module):
    """Scores of verifying and of a draft at each level.

    Args:
        schema: What observations are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, schema: VerifiedSchema) -> None:
        super().__init__()
        self.schema = schema
        self.register_buffer("mean", torch.zeros(schema.dim))
        self.register_buffer("std", torch.ones(schema.dim))
        self.encode = nn.Sequential(nn.Linear(schema.dim, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.action_head = nn.Linear(HIDDEN, schema.num_levels + 1)
        self.float()  # whatever torch's default is

    def forward(self, observations: Tensor) -> Tensor:
        """`[R, dim]` float32 to scores `[R, L + 1]`."""
        scores: Tensor = self.action_head(self.encode((observations - self.mean) / self.std))
        return scores

    @property
    def sees(self) -> Sees:
        """What it looks at: signals, unless it ignores all that needs them."""
        ignored = [bool(self.std[part].isinf().all()) for part in (_OUTPUTS, _embedding(self.schema))]
        return "confidences" if all(ignored) else "signals"

    def policy(self) -> LearnedDrafting:
        """What takes the best action, by a copy of the weights as they are now."""
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and then replaced
            net = DraftingNet(self.schema)
        net.load_state_dict(self.state_dict())
        return LearnedDrafting(net.cpu().eval())


class LearnedDrafting:
    """A `DraftingPolicy`: the best-scored action of a network that is trained no further.

    Args:
        net: The network.
    """

    def __init__(self, net: DraftingNet) -> None:
        self.net = net
        self._mean, self._std = net.mean.numpy(), net.std.numpy()
        linears = (net.encode[0], net.encode[2], net.action_head)
        *self._hidden, self._head = (_frozen(linear) for linear in linears)

    def __call__(self, observations: Observations) -> Actions:
        """The actions of the rows. A step has one row, where torch's modules take longer than the products."""
        hidden = (observations - self._mean) / self._std
        for weight, bias in self._hidden:
            hidden = np.tanh(hidden @ weight + bias)
        weight, bias = self._head
        actions: Actions = (hidden @ weight + bias).argmax(-1)
        return actions


def _frozen(linear: nn.Module) -> tuple[Observations, Observations]:
    """Transposed weight and bias."""
    assert isinstance(linear, nn.Linear)
    return np.ascontiguousarray(linear.weight.detach().numpy().T), linear.bias.detach().numpy().copy()


def normalisation(
    schema: VerifiedSchema, observations: Tensor, *, sees: Sees = "signals", embedding: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of recorded observations `[n, dim]`; 1 for what does not vary.

    Where the deviation is infinite, the network sees 0 whatever is observed: at the embedding, if it is left out, and
    at all that needs signals, if it sees no more than `confidences`.
    """
    mean, std = observations.mean(0), observations.std(0, correction=min(1, len(observations) - 1))
    std = torch.where(std < _SMALLEST_DEVIATION, torch.ones_like(std), std)
    if sees != "signals":
        std[_OUTPUTS] = torch.inf
    if sees != "signals" or not embedding:
        std[_embedding(schema)] = torch.inf
    return mean, std


def _embedding(schema: VerifiedSchema) -> slice:
    """Elements of the token that is read next; they come last."""
    return slice(schema.dim - schema.num_embedding_dims, schema.dim)
