"""A `Decoder` without a model, whose output KL and best bit-widths are known in closed form.

Each token belongs to a class, and each class needs each unit to a known degree: a unit at width b costs
`need[class, unit] * 4 ** (3 - b)` nats, and the costs of the units add up. The step's distribution is the reference's,
scaled by `exp(-kl)`, with the rest of the probability on a token that the reference never chooses: then
KL(reference || step) is that sum to float precision. With `carry`, a share of the previous token's cost is paid again,
as keys and values written at few bits are.

Import it as `from fake_session import FakeSession` (pyproject.toml puts `tests` on the path).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.decoder import (
    ExtendOutput,
    StepOutput,
    check_bit_widths,
    check_tokens,
    check_truncation,
    check_width_shape,
)
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import Unit

VOCAB_SIZE = 32
NUM_CLASSES = 4
EOS_TOKEN_ID = 30
SINK_TOKEN_ID = 31  # takes the probability that a low width loses; no text and no reference ever holds it
_KL_RATIO = 4.0  # per bit, as measured on real models
_SINK_LOGIT = -40.0


@dataclass(frozen=True)
class FakeModel:
    """What `DecoderModel` asks for, plus `unit_weights` and `need`."""

    num_units: int = 4
    bit_widths: tuple[int, ...] = (3, 4, 5, 6, 8)
    max_context: int = 256
    carry: float = 0.0
    has_reference: bool = True
    vocab_size: int = VOCAB_SIZE
    fingerprint: str = "fake"
    eos_token_ids: tuple[int, ...] = (EOS_TOKEN_ID,)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def units(self) -> tuple[Unit, ...]:
        """Layers and, last, a head; each of 1,000 weights, the head of 500."""
        return tuple(
            Unit("head", "head", index, ("lm_head",), 500)
            if index == self.num_units - 1
            else Unit(f"layer.{index}", "layer", index, (f"layers.{index}",), 1000)
            for index in range(self.num_units)
        )

    @property
    def unit_weights(self) -> Tensor:
        """`[U]` int64."""
        return torch.tensor([unit.num_weights for unit in self.units])

    @property
    def need(self) -> Tensor:
        """`[NUM_CLASSES, U]` nats at width 3: class c needs unit `c % U` ten times and more as much as the others."""
        need = torch.full((NUM_CLASSES, self.num_units), 0.02, dtype=torch.float64)
        classes = torch.arange(NUM_CLASSES)
        need[classes, classes % self.num_units] = 0.2 + 0.1 * classes.double()
        return need

    def embedding_matrix(self) -> Tensor:
        """`[vocab, 4]`: the class, one-hot, and a little noise, so that a policy can read it off the signals."""
        noise = torch.randn(VOCAB_SIZE, NUM_CLASSES, generator=torch.Generator().manual_seed(0)) * 0.05
        return noise + torch.nn.functional.one_hot(token_class(torch.arange(VOCAB_SIZE)), NUM_CLASSES)

    def mean_bit_width(self, bit_widths: Tensor) -> Tensor:
        """Parameter-weighted mean of `[..., U]`."""
        weights = self.unit_weights.float()
        return (bit_widths.float() * weights).sum(-1) / weights.sum()

    def own_kl_nats(self, token_ids: Tensor, bit_widths: Tensor) -> Tensor:
        """KL that reading tokens `[...]` at `[..., U]` costs by itself; width 0 costs nothing. `[...]` float64."""
        penalty = torch.where(bit_widths == 0, 0.0, _KL_RATIO ** (3.0 - bit_widths.double()))
        return (self.need[token_class(token_ids)] * penalty).sum(-1)

    def logits(self, token_ids: Tensor, kl_nats: Tensor) -> Tensor:
        """`[...]` tokens and KL -> `[..., vocab]` float32."""
        base = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        base[:, SINK_TOKEN_ID] = _SINK_LOGIT
        logits = base.log_softmax(-1)[token_ids] - kl_nats[..., None]
        logits[..., SINK_TOKEN_ID] = torch.log(-torch.expm1(-kl_nats)).clamp_min(_SINK_LOGIT)
        return logits.float()


def token_class(token_ids: Tensor) -> Tensor:
    """What a token is like: `[...]` -> 0 to NUM_CLASSES - 1."""
    return token_ids % NUM_CLASSES


class FakeSession:
    """Implements `Decoder` over a `FakeModel`; checks its arguments as `DecodeSession` does."""

    def __init__(self, model: FakeModel | None = None, *, num_rows: int = 1, max_length: int = 256) -> None:
        self._model = model or FakeModel()
        self._num_rows = num_rows
        self._max_length = max_length
        self._lengths = torch.zeros(num_rows, dtype=torch.int64)
        self._past_kl = torch.zeros(num_rows, max_length + 1, dtype=torch.float64)  # after each number of tokens
        self.is_closed = False

    @property
    def model(self) -> FakeModel:
        return self._model

    @property
    def lengths(self) -> Tensor:
        self._check_open()
        return self._lengths

    @property
    def max_length(self) -> int:
        return self._max_length

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        self._check_open()
        rows = torch.arange(self._num_rows) if rows is None else rows
        if bit_widths is None:
            bit_widths = torch.full((self._model.num_units,), max(self._model.bit_widths))
        check_tokens(self, prompt_ids, rows, is_prompt=True)
        kl = self._kl_nats(prompt_ids, bit_widths)[:, -1]
        self._lengths[rows] = prompt_ids.shape[1]
        self._past_kl[rows, self._lengths[rows]] = kl
        return self._output(prompt_ids[:, -1], kl)

    def extend(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> ExtendOutput:
        self._check_open()
        rows = torch.arange(self._num_rows) if rows is None else rows
        check_tokens(self, token_ids, rows)
        num_tokens = token_ids.shape[1]
        check_width_shape(bit_widths, len(rows), num_tokens)
        own = self._model.own_kl_nats(token_ids, self._expand(bit_widths, len(rows), num_tokens))
        outputs = []
        for index in range(num_tokens):
            past = self._past_kl[rows, self._lengths[rows]]
            self._lengths[rows] += 1
            kl = own[:, index] + self._model.carry * past
            self._past_kl[rows, self._lengths[rows]] = kl
            outputs.append(self._output(token_ids[:, index], kl))
        return ExtendOutput(
            *(
                torch.stack([getattr(output, name) for output in outputs], dim=1)
                for name in ("logits", "residual_update", "crest")
            )
        )

    def step(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> StepOutput:
        return self.extend(token_ids[..., None], bit_widths, rows=rows).at(0)

    def truncate(self, lengths: Tensor) -> None:
        check_truncation(lengths, self.lengths)
        self._lengths = lengths.clone()

    def score(self, token_ids: Tensor, bit_widths: Tensor | None = None, *, first: int = 0) -> Tensor:
        self._check_open()
        if bit_widths is None:
            bit_widths = torch.zeros(self._model.num_units, dtype=torch.int64)
        kl = self._kl_nats(token_ids, bit_widths)
        return self._model.logits(token_ids[:, first:], kl[:, first:])

    def fork(self) -> FakeSession:
        self._check_open()
        twin = FakeSession(self._model, num_rows=self._num_rows, max_length=self._max_length)
        twin._lengths, twin._past_kl = self._lengths.clone(), self._past_kl.clone()
        return twin

    def close(self) -> None:
        self.is_closed = True

    def _kl_nats(self, token_ids: Tensor, bit_widths: Tensor) -> Tensor:
        own = self._model.own_kl_nats(token_ids, self._expand(bit_widths, *token_ids.shape))
        kl, past = torch.zeros_like(own), torch.zeros(len(own), dtype=torch.float64)
        for position in range(own.shape[1]):
            past = own[:, position] + self._model.carry * past
            kl[:, position] = past
        return kl

    def _expand(self, bit_widths: Tensor, rows: int, length: int) -> Tensor:
        check_bit_widths(bit_widths, self._model.bit_widths, self._model.num_units)
        if not self._model.has_reference and bool((bit_widths == 0).any()):
            raise InputError("width 0 was asked for, but this model holds nested weights only")
        if bit_widths.ndim == 2:
            bit_widths = bit_widths[:, None, :]
        return bit_widths.expand(rows, length, self._model.num_units)

    def _output(self, token_ids: Tensor, kl: Tensor) -> StepOutput:
        need = self._model.need[token_class(token_ids)].float()
        return StepOutput(self._model.logits(token_ids, kl), 0.1 + need, torch.full_like(need, 2.0))

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("this FakeSession is closed")


class MarkovSession(FakeSession):
    """Three tokens, of which each follows the one before with probabilities that the width decides."""

    def extend(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> ExtendOutput:
        self._lengths = self._lengths + token_ids.shape[1]
        statistics = torch.ones(*token_ids.shape, self.model.num_units)
        return ExtendOutput(transitions(int(bit_widths[0]))[token_ids], statistics, statistics)


def transitions(bit_width: int) -> Tensor:
    """`[3, 3]` logits."""
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(bit_width)) * 1.5


def fake_profile(model: FakeModel) -> Profile:
    """The true profile: sensitivities are means over classes, latency is bytes and a fixed tenth of a full step."""
    widths = torch.tensor(model.bit_widths, dtype=torch.float64)
    unit_ms = model.unit_weights.double()[:, None] * widths / 8e3
    penalty = _KL_RATIO ** (3.0 - widths)
    return Profile(
        cost=CostTable(
            source="roofline",
            fixed_ms=float(unit_ms[:, -1].sum()) / 9,
            unit_ms=unit_ms,
            bit_widths=model.bit_widths,
            fingerprint=model.fingerprint,
            device="cpu",
            num_threads=1,
        ),
        sensitivity=(model.need.mean(0)[:, None] * penalty).float(),
        bit_widths=model.bit_widths,
        fingerprint=model.fingerprint,
        num_tokens=1,
        reference="unquantised" if model.has_reference else "8-bit",
    )


def fake_windows(num_windows: int, length: int, *, seed: int = 0) -> Tensor:
    """Random text `[n, length]` without end-of-sequence tokens, all classes equally often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 28, (num_windows, length), generator=generator)


def optimal_bit_widths(model: FakeModel, token_ids: Tensor, kl_weight: float | Tensor) -> Tensor:
    """Widths `[R, U]` of the largest reward at tokens `[R]`, by trying all; exact for `carry=0`."""
    cost = fake_profile(model).cost
    candidates = torch.tensor(list(itertools.product(model.bit_widths, repeat=model.num_units)))
    kl = model.own_kl_nats(token_ids[:, None], candidates[None])  # [R, candidates]
    dial = torch.as_tensor(kl_weight, dtype=torch.float64).view(-1, 1)
    return candidates[(-cost.time_share(candidates) - dial * kl).argmax(-1)]
