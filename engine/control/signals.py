"""What a policy sees: the one place where features are computed, for training and serving alike.

All signals are known *before* the step whose widths they decide. They are scaled by fixed functions to be of order one
and clipped to ±`SIGNAL_LIMIT`, so that a policy carries no running normaliser that could drift between training and
serving.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexquant_rl.kernels import signal_constants as constants
from flexquant_rl.kernels.bitplane import NUM_PLANES

if TYPE_CHECKING:  # a deployed policy imports this module, and must not pull in transformers with it
    from flexquant_rl.engine.control.profile import Profile
    from flexquant_rl.engine.decoding.decoder import DecoderModel, StepOutput

SIGNAL_SCHEMA_VERSION = constants.SIGNAL_SCHEMA_VERSION
SIGNAL_LIMIT = constants.SIGNAL_LIMIT
# The projection is part of the schema, so these are fixed.
_PROJECTION_SEED = 20_250_612
_PROJECTION_STEPS = 4
_PROJECTION_TOKENS = 16_384  # whose covariance is taken
_MAX_COUNT = 1 << 16  # of units, or of dimensions of the embedding, in a file: more would fill the memory with names
_ROW_SCALARS = ("entropy", "entropy_ema", "surprisal", "step_kl", "probe_kl", "since_probe", "position", "dial")


@dataclass(frozen=True)
class SignalSchema:
    """Names and order of the signals of a model with `num_units` units.

    Attributes:
        num_units: U.
        bit_widths: Stored widths, ascending (W of them).
        num_embedding_dims: Size of the projection of the input token's embedding.
        horizon: Tokens after which the signal of the position stays as it is, because the policy
            has seen no later ones; None: there is no such limit.
    """

    num_units: int
    bit_widths: tuple[int, ...]
    num_embedding_dims: int = 32
    horizon: int | None = None

    @cached_property
    def global_names(self) -> tuple[str, ...]:
        """Signals of the token."""
        return (
            "token_entropy",  # nats / 4
            "token_entropy_ema",  # nats / 4
            "perplexity_entropy",  # log(1 + exp(ema)) / 4
            "top1_probability",
            "top_margin",  # top-1 minus top-2 probability
            "surprisal",  # of the token about to be read, nats / 4
            "step_kl",  # log10 of KL(last output || the one before)
            "probe_kl",  # log10 of the output KL at the last probe
            "tokens_since_probe",  # log scale, 1 at 256 or never
            "mean_width_16",  # mean over the last 16 tokens / 8
            "position",  # log(1 + tokens decoded, the horizon at most) / 4
            "dial",  # log10 of the KL weight
            *(f"embedding_{index}" for index in range(self.num_embedding_dims)),
        )

    @cached_property
    def unit_names(self) -> tuple[str, ...]:
        """Signals of each unit."""
        return (
            *(f"log_sensitivity_{b}" for b in self.bit_widths),
            *(f"time_saved_{b}" for b in self.bit_widths),
            "residual_update",
            "crest",
            "last_width",  # / 8
            "depth",  # 0 first layer ... 1 head
        )

    @property
    def num_global(self) -> int:
        """G."""
        return len(self.global_names)

    @property
    def num_per_unit(self) -> int:
        """F."""
        return len(self.unit_names)

    @property
    def dim(self) -> int:
        """Length of the signal vector: G + U * F."""
        return self.num_global + self.num_units * self.num_per_unit

    @property
    def embedding_columns(self) -> slice:
        """Where in the vector the projected embedding of the input token is."""
        return slice(self.num_global - self.num_embedding_dims, self.num_global)

    def index(self, name: str) -> int:
        """Position of a global signal in the vector."""
        return self.global_names.index(name)

    def index_in_unit(self, name: str) -> int:
        """Position of a unit signal within a unit's block."""
        return self.unit_names.index(name)

    def split(self, signals: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, dim]` -> global `[B, G]` and per-unit `[B, U, F]`."""
        per_unit = signals[:, self.num_global :].view(len(signals), self.num_units, self.num_per_unit)
        return signals[:, : self.num_global], per_unit

    def last_widths(self, signals: Tensor) -> Tensor:
        """Widths of the previous step, `[B, U]` int64, as the signals carry them."""
        _, per_unit = self.split(signals)
        return (per_unit[..., self.index_in_unit("last_width")] * constants.WIDTH_SCALE).round().long()

    def width_signal(self, bit_width: int) -> float:
        """The signal of a width, as `last_width` carries it: exact, for a row of plain numbers."""
        return bit_width / constants.WIDTH_SCALE

    def nats(self, signal: float) -> float:
        """Nats of the signal of an entropy or a surprisal, of a row of plain numbers."""
        return signal * constants.NATS_SCALE

    def retold(self, signals: Tensor, kl_weight: float, last_widths: Tensor, mean_widths: Tensor) -> Tensor:
        """Recorded signals as a policy would see them that chose other widths; the model's output stays as it was.

        Args:
            signals: `[B, dim]` of one step; not changed.
            kl_weight: The dial.
            last_widths: `[B, U]` widths of the previous step, after a prompt the largest ones.
            mean_widths: `[B, t]` mean widths of all steps since the prompt, oldest first.
        """
        told = signals.clone()
        prompt = torch.full((len(signals), constants.RECENT_TOKENS), float(max(self.bit_widths)))
        recent = torch.cat([prompt, mean_widths.float()], dim=1)[:, -constants.RECENT_TOKENS :]
        told[:, self.index("mean_width_16")] = recent.mean(-1) / constants.WIDTH_SCALE
        told[:, self.index("dial")] = math.log10(kl_weight)
        _, per_unit = self.split(told)
        per_unit[..., self.index_in_unit("last_width")] = last_widths.float() / constants.WIDTH_SCALE
        return told

    def is_first_step(self, signals: Tensor) -> Tensor:
        """`[B]` bool: whether nothing has been decoded since the prompt."""
        return signals[:, self.index("position")] == 0

    def token_entropy_nats(self, signals: Tensor) -> Tensor:
        """`[B]` entropy of the last output distribution."""
        return signals[:, self.index("token_entropy")] * constants.NATS_SCALE

    def entropy_ema_nats(self, signals: Tensor) -> Tensor:
        """`[B]` moving average of the entropies of the output distributions."""
        return signals[:, self.index("token_entropy_ema")] * constants.NATS_SCALE

    def surprisal_nats(self, signals: Tensor) -> Tensor:
        """`[B]` surprisal of the token about to be read."""
        return signals[:, self.index("surprisal")] * constants.NATS_SCALE

    def tokens_decoded(self, signals: Tensor) -> Tensor:
        """`[B]` int64 tokens since the prompt; exact up to 100,000 of them, beyond that to six digits."""
        return (signals[:, self.index("position")] * constants.POSITION_SCALE).expm1().round().long()

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the version."""
        return {
            "version": SIGNAL_SCHEMA_VERSION,
            "num_units": self.num_units,
            "bit_widths": list(self.bit_widths),
            "num_embedding_dims": self.num_embedding_dims,
            "horizon": self.horizon,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> SignalSchema:
        """Reads the JSON form; the caller checks `version`.

        Raises:
            KeyError, TypeError, ValueError: If it is not what `to_dict` writes.
        """
        counts = data["num_units"], data["num_embedding_dims"]
        bit_widths = tuple(data["bit_widths"])
        if not all(type(count) is int and 0 <= count <= _MAX_COUNT for count in counts):
            raise ValueError(f"the signals' counts are not whole numbers up to {_MAX_COUNT}")
        check_widths(bit_widths)
        horizon = data["horizon"]
        if horizon is not None and not (type(horizon) is int and horizon >= 0):
            raise ValueError("the signals' horizon is no whole number")
        return SignalSchema(counts[0], bit_widths, counts[1], horizon)


def check_widths(bit_widths: tuple[Any, ...]) -> None:
    """Raises ValueError unless these, read from a file, are bit-widths of a nested model, ascending."""
    if not bit_widths or not all(type(width) is int and 0 < width <= NUM_PLANES for width in bit_widths):
        raise ValueError(f"bit_widths are not whole numbers from 1 to {NUM_PLANES}")
    if sorted(set(bit_widths)) != [*bit_widths]:
        raise ValueError("bit_widths do not ascend")


@dataclass(frozen=True)
class SignalMark:
    """The state of all rows of a `SignalTracker` at one moment, by name; every tensor is `[R, ...]`."""

    rows: dict[str, Tensor]


class SignalTracker:
    """Follows R sequences and turns what the model put out into signals.

    Args:
        schema: Which signals.
        profile: Sensitivities and latencies of the units.
        embedding: `[vocab, d]` input embeddings.
        depths: `[U]` relative depth of each unit, 0 to 1.
        num_rows: R.
    """

    def __init__(
        self, schema: SignalSchema, profile: Profile, embedding: Tensor, depths: Sequence[float], num_rows: int
    ) -> None:
        self.schema = schema
        self._projected = project_embedding(embedding, schema.num_embedding_dims)
        device = embedding.device
        depth = torch.tensor(depths, dtype=torch.float32)[:, None]
        self._static = unit_constants(profile, schema).to(device).expand(num_rows, -1, -1)
        self._depth = depth.to(device).expand(num_rows, -1, -1)
        largest = float(max(schema.bit_widths))
        shapes = {
            "log_probs": (num_rows, len(embedding)),
            "embedding": (num_rows, schema.num_embedding_dims),
            "recent_widths": (num_rows, constants.RECENT_TOKENS),
            "last_widths": (num_rows, schema.num_units),
            "residual_update": (num_rows, schema.num_units),
            "crest": (num_rows, schema.num_units),
            **dict.fromkeys(_ROW_SCALARS, (num_rows,)),
        }
        self._rows = {
            name: torch.full(shape, largest if "widths" in name else 0.0, dtype=torch.float32, device=device)
            for name, shape in shapes.items()
        }

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """Starts rows after their prompts.

        Args:
            output: Output of the prefill, `[R', ...]`.
            next_token_ids: `[R']` int64, the token that the first step will read.
            kl_weight: `[R']` the dial: price of a nat of output KL in full-width steps.
            rows: `[R']` int64; default all.
        """
        top = float(max(self.schema.bit_widths))
        for name in ("recent_widths", "last_widths"):
            self._put(name, rows, torch.full_like(self._rows[name], top) if rows is None else top)
        for name, value in (
            ("position", 0.0),
            ("step_kl", 0.0),
            ("probe_kl", constants.KL_FLOOR_NATS),
            ("since_probe", constants.TOKENS_SINCE_PROBE_LIMIT),
        ):
            self._put(name, rows, torch.full_like(self._rows[name], value) if rows is None else value)
        self._put("dial", rows, kl_weight.to(self._rows["dial"].device, torch.float32).log10())
        self._observe(output, next_token_ids, rows, first=True)

    def update(
        self,
        output: StepOutput,
        bit_widths: Tensor,
        next_token_ids: Tensor,
        mean_width: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        """Moves rows on by one token.

        Args:
            output: Output of the step, `[R', ...]`.
            bit_widths: `[R', U]` int64 that the step ran at.
            next_token_ids: `[R']` int64, the token that the next step will read.
            mean_width: `[R']` parameter-weighted mean of `bit_widths`.
            rows: `[R']` int64; default all.
        """
        device = self._rows["recent_widths"].device
        recent = self._of("recent_widths", rows)
        mean_width = mean_width.to(device, torch.float32)
        self._put("recent_widths", rows, torch.cat([recent[:, 1:], mean_width[:, None]], dim=1))
        self._put("last_widths", rows, bit_widths.to(device, torch.float32))
        for name in ("position", "since_probe"):
            self._put(name, rows, self._of(name, rows) + 1)
        self._observe(output, next_token_ids, rows, first=False)

    def observe_probe(self, output_kl_nats: Tensor, rows: Tensor) -> None:
        """Tells rows the output KL `[R']` that a probe has just measured."""
        self._put("probe_kl", rows, output_kl_nats.float().clamp_min(constants.KL_FLOOR_NATS))
        self._put("since_probe", rows, 0.0)

    def mark(self) -> SignalMark:
        """Remembers the state of all rows; costs nothing, since every change makes a new tensor."""
        return SignalMark(dict(self._rows))

    def rollback(self, mark: SignalMark, rows: Tensor | None = None) -> None:
        """Returns rows to a mark, as if what they saw since had never happened.

        Args:
            mark: What `mark` of this tracker returned.
            rows: `[R']` int64; default all.
        """
        for name, held in mark.rows.items():
            self._put(name, rows, held if rows is None else held[rows])

    def _clamped(self, position: Tensor) -> Tensor:
        horizon = self.schema.horizon
        return position if horizon is None else position.clamp_max(horizon)

    def _of(self, name: str, rows: Tensor | None) -> Tensor:
        return self._rows[name] if rows is None else self._rows[name][rows]

    def _put(self, name: str, rows: Tensor | None, value: Tensor | float) -> None:
        """Replaces the state of rows, never in place: marks keep the old tensor."""
        if rows is None:
            assert isinstance(value, Tensor)
            self._rows[name] = value
            return
        changed = self._rows[name].clone()
        changed[rows] = value
        self._rows[name] = changed

    def _observe(self, output: StepOutput, next_token_ids: Tensor, rows: Tensor | None, *, first: bool) -> None:
        log_probs = log_probabilities(output.logits)
        probs = log_probs.exp()
        entropy = -(probs * log_probs).sum(-1)
        if first:
            self._put("entropy_ema", rows, entropy)
        else:
            self._put("step_kl", rows, step_kl_nats(log_probs, self._of("log_probs", rows)))
            average = constants.EMA_DECAY * self._of("entropy_ema", rows) + (1 - constants.EMA_DECAY) * entropy
            self._put("entropy_ema", rows, average)
        tokens = next_token_ids.to(log_probs.device)
        self._put("entropy", rows, entropy)
        self._put("log_probs", rows, log_probs)
        self._put("surprisal", rows, -log_probs.gather(1, tokens[:, None])[:, 0])
        self._put("embedding", rows, self._projected[tokens])
        self._put("residual_update", rows, output.residual_update)
        self._put("crest", rows, output.crest)

    def top1_probability(self, row: int) -> float:
        """Probability of the likeliest token of the newest output of one row."""
        return float(self._rows["log_probs"][row].max().exp())

    def signals(self, rows: Tensor | None = None) -> Tensor:
        """The signal vectors of all rows or of some, `[R', dim]` float32, within ±`SIGNAL_LIMIT`."""
        state = self._rows if rows is None else {name: held[rows] for name, held in self._rows.items()}
        longest = math.log1p(constants.TOKENS_SINCE_PROBE_LIMIT)
        top2 = state["log_probs"].topk(2, dim=-1).values.exp()
        columns = [
            state["entropy"] / constants.NATS_SCALE,
            state["entropy_ema"] / constants.NATS_SCALE,
            torch.log1p(state["entropy_ema"].exp()) / constants.NATS_SCALE,
            top2[:, 0],
            top2[:, 0] - top2[:, 1],
            state["surprisal"] / constants.NATS_SCALE,
            state["step_kl"].clamp_min(constants.KL_FLOOR_NATS).log10() / constants.DECADES_SCALE,
            state["probe_kl"].clamp_min(constants.KL_FLOOR_NATS).log10() / constants.DECADES_SCALE,
            torch.log1p(state["since_probe"]).clamp_max(longest) / longest,
            state["recent_widths"].mean(-1) / constants.WIDTH_SCALE,
            torch.log1p(self._clamped(state["position"])) / constants.POSITION_SCALE,
            state["dial"],
        ]
        per_unit = torch.cat(
            [
                self._static if rows is None else self._static[rows],
                state["residual_update"].clamp_min(constants.STATISTIC_FLOOR).log10()[..., None],
                state["crest"].clamp_min(constants.STATISTIC_FLOOR).log10()[..., None],
                state["last_widths"][..., None] / constants.WIDTH_SCALE,
                self._depth if rows is None else self._depth[rows],
            ],
            dim=-1,
        )
        vector = torch.cat([torch.stack(columns, dim=1), state["embedding"], per_unit.flatten(1)], dim=1)
        return vector.clamp(-SIGNAL_LIMIT, SIGNAL_LIMIT)


def log_probabilities(logits: Tensor) -> Tensor:
    """What logits `[..., vocab]` say of the next token: log-probabilities, float32, none below a finite floor."""
    return logits.float().log_softmax(-1).clamp_min(constants.LOG_PROBABILITY_FLOOR)


def step_kl_nats(log_probs: Tensor, previous: Tensor) -> Tensor:
    """KL(this output || the one before) of log-probabilities `[..., vocab]`, `[...]` nats."""
    return (log_probs.exp() * (log_probs - previous)).sum(-1).clamp_min(0)


OUTPUT_SIGNALS = ("token_entropy_nats", "top1_probability", "top_margin", "surprisal_nats", "step_kl_nats")
"""What signals need to know of one output, unscaled; the columns of `output_signals`."""


def output_signals(log_probs: Tensor, next_token_ids: Tensor, previous: Tensor | None) -> Tensor:
    """What the signals say of outputs, before they are averaged or scaled: `OUTPUT_SIGNALS`, as `SignalTracker` has it.

    Args:
        log_probs: `[B, vocab]` float32, of `log_probabilities`.
        next_token_ids: `[B]` int64, the tokens that are read next.
        previous: `[B, vocab]`, the outputs one token earlier; None after a prompt, where there are none.

    Returns:
        `[B, 5]` float32.
    """
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    top2 = log_probs.topk(2, dim=-1).values.exp()
    surprisal = -log_probs.gather(1, next_token_ids[:, None])[:, 0]
    step_kl = torch.zeros_like(entropy) if previous is None else step_kl_nats(log_probs, previous)
    return torch.stack([entropy, top2[:, 0], top2[:, 0] - top2[:, 1], surprisal, step_kl], dim=1)


def unit_constants(profile: Profile, schema: SignalSchema) -> Tensor:
    """Signals of the units that no step changes: log sensitivities and times saved, `[U, 2 W]` float32."""
    sensitivity = profile.sensitivity.clamp_min(constants.KL_FLOOR_NATS).log10()
    unit_ms = profile.cost.unit_ms
    saved = (unit_ms[:, -1:] - unit_ms) / profile.cost.latency_ms(profile.cost.full_width())
    # Time saved is a share of a step; times U makes it of order one for any depth.
    return torch.cat([sensitivity / constants.DECADES_SCALE, saved * schema.num_units], dim=1).float()


def project_embedding(embedding: Tensor, num_dims: int) -> Tensor:
    """Projects centred input embeddings on the directions in which they vary most, `[vocab, num_dims]` float32.

    Each column has unit variance; those beyond the size of an embedding are 0. The directions are found by a few steps
    of orthogonal iteration from a fixed start, not by a decomposition. Unlike eigenvectors the result changes little
    where embeddings change little, and has no sign of its own to choose, so every machine finds the same one.
    """
    centred = embedding.float() - embedding.float().mean(0)
    picked = torch.linspace(0, len(centred) - 1, min(len(centred), _PROJECTION_TOKENS), dtype=torch.float64)
    sample = centred[picked.round().long().to(centred.device)]
    covariance = (sample.T @ sample).double().cpu()
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    start = torch.randn(len(covariance), min(num_dims, len(covariance)), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(start).Q
    for _ in range(_PROJECTION_STEPS):
        basis, triangle = torch.linalg.qr(covariance @ basis)
        basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)  # libraries differ in these signs
    projected = centred @ basis.float().to(centred.device)
    deviation = projected.std(0)
    # A direction in which nothing varies holds rounding errors, which are not to be magnified.
    projected = projected / deviation.clamp_min(1e-4 * float(deviation.max())).clamp_min(1e-12)
    return torch.nn.functional.pad(projected, (0, num_dims - projected.shape[1]))


def unit_depths(model: DecoderModel) -> list[float]:
    """Relative depth of each unit: 0 at the first layer, 1 at the head."""
    last = max(unit.layer_idx for unit in model.units) or 1
    return [unit.layer_idx / last for unit in model.units]
