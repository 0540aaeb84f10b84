"""Widths by the token about to be read: what it needs is looked up, and nothing that a step puts out is looked at."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flexquant_rl.engine.control.decision import BlindPolicy, Decision, joined_rows
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard
from flexquant_rl.engine.control.signals import SIGNAL_LIMIT, project_embedding

_HIDDEN = 32
_LARGEST_LOG = 3.0
_NET = "net."


class ImportanceNet(nn.Module):
    """The expected effect of a token's bits over that of an average token, from F features of it.

    Args:
        num_features: F.

    Attributes:
        mean: `[F]` of the features.
        std: `[F]`, their deviation.
        exponent: The power of the multiple that pays: below 1 where the multiple is noisy.
    """

    mean: Tensor
    std: Tensor
    exponent: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.register_buffer("exponent", torch.ones(()))
        last = nn.Linear(_HIDDEN, 1)
        # An average token, until something is learned.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(num_features, _HIDDEN), nn.Tanh(), last)
        self.float()

    def log(self, features: Tensor) -> Tensor:
        """Logarithm of the multiple, `[n, F]` -> `[n]`."""
        found: Tensor = self.layers((features - self.mean) / self.std)[:, 0]
        return found.clamp(-_LARGEST_LOG, _LARGEST_LOG)

    def multiple(self, features: Tensor) -> Tensor:
        """The multiple, raised to the exponent, `[n, F]` -> `[n]`."""
        with torch.inference_mode():
            return (self.exponent * self.log(features)).exp()


class TokenPolicy(BlindPolicy):
    """The best static allocation at the dial times what the token about to be read needs.

    Args:
        net: What a token needs, from its projected embedding as signals have it.
        bit_widths: `[P, U]` int64, allocations from fastest to slowest.
        prices: `[P - 1]` float64, ascending: from the i-th price of a nat on, allocation i + 1 is better than i.
        card: What it belongs to.
        name: As it appears in tables.
    """

    def __init__(
        self, net: ImportanceNet, bit_widths: Tensor, prices: Tensor, card: PolicyCard, name: str = "token"
    ) -> None:
        self.net = net
        self.bit_widths = bit_widths
        self.prices = prices
        self.card = card
        self.name = name
        self._table: tuple[tuple[int, int], TokenTable] | None = None

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`; of the signals it reads the dial and the embedding of the input token."""
        schema = self.card.schema
        told = signals.cpu()
        price = 10 ** told[:, schema.index("dial")] * self.net.multiple(told[:, schema.embedding_columns])
        found = torch.bucketize(price.double(), self.prices, right=True)
        return Decision(self.bit_widths[found].to(signals.device))

    def with_card(self, card: PolicyCard) -> TokenPolicy:
        """The same with another card."""
        return TokenPolicy(self.net, self.bit_widths, self.prices, card, self.name)

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, for a file."""
        net = {f"{_NET}{name}": tensor for name, tensor in self.net.state_dict().items()}
        return net | {"bit_widths": self.bit_widths, "prices": self.prices}

    @staticmethod
    def from_state_dict(tensors: dict[str, Tensor], card: PolicyCard, name: str) -> TokenPolicy:
        """The policy in a file.

        Raises:
            KeyError, RuntimeError, ValueError: If it is not what `state_dict` writes for a model of this card.
        """
        net = ImportanceNet(card.schema.num_embedding_dims)
        net.load_state_dict({key.removeprefix(_NET): value for key, value in tensors.items() if key.startswith(_NET)})
        widths, prices = tensors["bit_widths"], tensors["prices"]
        if widths.dtype != torch.int64 or widths.dim() != 2 or widths.shape[1] != card.schema.num_units:
            raise ValueError(f"its allocations are {list(widths.shape)} {widths.dtype}")
        if not set(widths.flatten().tolist()) <= set(card.schema.bit_widths):
            raise ValueError("its allocations have widths that are not stored")
        ascend = tuple(prices.shape) == (len(widths) - 1,) and bool((prices.diff() > 0).all())
        if prices.dtype != torch.float64 or not ascend:
            raise ValueError(f"its prices do not ascend from one of {len(widths)} allocations to the next")
        return TokenPolicy(net, widths, prices, card, name)

    def needs(self, embedding: Tensor) -> Tensor:
        """What every token needs, over what an average one does: embeddings `[vocab, d]` -> `[vocab]` on the CPU."""
        projected = project_embedding(embedding, self.card.schema.num_embedding_dims).cpu()
        return self.net.multiple(projected.clamp(-SIGNAL_LIMIT, SIGNAL_LIMIT))

    def table(self, embedding: Tensor) -> TokenTable:
        """The table for a model's embeddings `[vocab, d]`, made once: it takes a look at the whole vocabulary."""
        key = embedding.data_ptr(), len(embedding)
        if self._table is None or self._table[0] != key:
            self._table = key, TokenTable(self, embedding)
        return self._table[1]


DialPolicy = LearnedPolicy | TokenPolicy
"""Policies that have a dial."""


class TokenTable:
    """A `TokenPolicy` as it is served: two look-ups for each token. Threads may share it.

    Args:
        policy: The policy.
        embedding: `[vocab, d]` input embeddings of the model.
    """

    def __init__(self, policy: TokenPolicy, embedding: Tensor) -> None:
        self._needs: list[float] = policy.needs(embedding).tolist()
        self._prices: list[float] = policy.prices.tolist()
        self._allocations = policy.bit_widths.split(1)  # P times [1, U]

    def widths(self, token_ids: Sequence[int], kl_weights: Sequence[float]) -> Tensor:
        """Widths for the tokens of B rows, each at its dial, `[B, U]` int64."""
        prices = (dial * self._needs[token] for token, dial in zip(token_ids, kl_weights, strict=True))
        return joined_rows([self._allocations[bisect_right(self._prices, price)] for price in prices])
