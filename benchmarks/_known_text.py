"""What is known of a token when its bits are chosen, and how well that predicts what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.in_flight import read_in_flight
from flexquant_rl.agents.evaluation.influence import influences
from flexquant_rl.agents.evaluation.rehearsal import RecordedText
from flexquant_rl.agents.evaluation.relative_error import entry_linears, relative_errors
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.agents.progress import track
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.files import read_tensors, write_tensors
from flexquant_rl.fq_env.prompts import Split, spread

BEFORE = "signals, embedding left out"
TODAY = "signals of today"
IN_FLIGHT = "today + hidden state, 48 directions"
_ROWS_PER_PASS = 8
_RECORDED_ROWS = 64
_SMALLEST = 1e-12
_RANDOM_FEATURES = 256
_RIDGES = (30.0, 300.0, 3000.0)


@dataclass(frozen=True)
class Text:
    """What is known of S sequences of T tokens, recorded at one width in the middle.

    Attributes:
        windows: `[S, window_tokens]`.
        influence: `[S, T, U]` nats.
        plain: `[S, T, F]` signals without embedding, and the statistics of all units.
        embedding: `[S, T, E]` the signals' projection of the input token's embedding.
        own_entropy: `[S, T, 1]` entropy of the output after the token, nats.
        token_kl: `[S, T]` output KL at `bit_width` everywhere, nats.
        inputs: For each unit `[S, T, K]`, what its first linear reads.
    """

    windows: Tensor
    influence: Tensor
    plain: Tensor
    embedding: Tensor
    own_entropy: Tensor
    token_kl: Tensor
    inputs: tuple[Tensor, ...]

    def first(self, count: int) -> Text:
        """Its first sequences."""
        columns = {name: value[:count] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Text(inputs=tuple(inputs[:count] for inputs in self.inputs), **columns)


def read_text(prepared: Prepared, out: Path, split: Split, count: int, *, bit_width: int, samples: int) -> Text:
    """Measures what is known of some windows of a split, or finds it in a directory."""
    windows = spread(prepared.windows.split(split), count)
    influence = _kept(out / f"influence_{split}", lambda: _influence(prepared, windows, bit_width, samples))
    known = _kept(out / f"known_{split}", lambda: _known(prepared, windows, bit_width))
    width = prepared.model.bit_widths[len(prepared.model.bit_widths) // 2]
    return Text(windows=windows, inputs=unit_inputs(prepared, windows, width), **influence, **known)


def _kept(path: Path, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a file holds, or what is measured and written to it."""
    file = path.with_suffix(".safetensors")
    if not file.exists():
        write_tensors(file, measure(), {})
    return read_tensors(file, fix="delete it to have it measured again")[0]


def _influence(prepared: Prepared, windows: Tensor, bit_width: int, samples: int) -> dict[str, Tensor]:
    model, first = prepared.model, prepared.env.prompt_tokens
    generator = torch.Generator().manual_seed(0)
    found = influences(
        model,
        windows[:, :-1],
        torch.full((model.num_units,), bit_width),
        first=first,
        num_samples=samples,
        generator=generator,
        progress=lambda parts: track(parts, "influences"),
    )
    return {"influence": found.units}


def _known(prepared: Prepared, windows: Tensor, bit_width: int) -> dict[str, Tensor]:
    model = prepared.model
    columns: dict[str, list[Tensor]] = {name: [] for name in ("plain", "embedding", "own_entropy", "token_kl")}
    schema = SignalSchema(model.num_units, model.bit_widths)
    low = torch.full((model.num_units,), bit_width)
    for part in track(windows.split(_RECORDED_ROWS), "signals"):
        text = RecordedText(model, prepared.profile, part, prepared.env, prepared.cost, num_scored=len(part))
        for name, column in zip(columns, _columns(schema, text, low), strict=True):
            columns[name].append(column)
    return {name: torch.cat(parts) for name, parts in columns.items()}


def _columns(schema: SignalSchema, text: RecordedText, low: Tensor) -> tuple[Tensor, ...]:
    """Signals without embedding, embedding, entropy of the own output, KL at a width."""
    signals = text.signals
    shape = signals.shape[:2]
    tokens, units = schema.split(signals.flatten(0, 1))
    embedded = [index for index, name in enumerate(schema.global_names) if name.startswith("embedding")]
    others = [index for index in range(schema.num_global) if index not in embedded]
    statistics = units[..., [schema.index_in_unit(name) for name in ("residual_update", "crest")]].flatten(1)
    entropy = schema.token_entropy_nats(tokens).view(shape)
    # The next token's signals hold it; behind the last token nothing does.
    own = torch.cat([entropy[:, 1:], entropy.mean(1, keepdim=True)], dim=1)
    plain = torch.cat([tokens[:, others], statistics], dim=1)
    return plain.view(*shape, -1), tokens[:, embedded].view(*shape, -1), own[..., None], text.token_kl_nats(low)


def unit_inputs(prepared: Prepared, windows: Tensor, bit_width: int) -> tuple[Tensor, ...]:
    """What the first linear of each unit reads, `[S, T, K]` each, all units at one width; 0 is the reference."""
    model = prepared.model
    parts: list[dict[int, Tensor]] = []
    for part in windows[:, :-1].split(_ROWS_PER_PASS):
        seen: dict[int, Tensor] = {}

        def choose(unit_idx: int, inputs: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[unit_idx] = inputs.clone()
            return torch.full(inputs.shape[:2], bit_width)

        read_in_flight(model, part, choose, first=prepared.env.prompt_tokens)
        parts.append(seen)
    return tuple(torch.cat([seen[unit_idx] for seen in parts]) for unit_idx in range(model.num_units))


Build = Callable[[Text, slice, int, Tensor], Tensor]
"""Text, its rows, unit, what enters the unit `[R, T, K]` -> features `[R, T, F]`."""

Multiples = Callable[[Text, slice, int, Tensor], Tensor]
"""As `Build`, but the logarithm of the multiple of a unit's mean influence, `[R, T]`."""


def feature_sets(prepared: Prepared, train: Text, bit_width: int) -> dict[str, Build]:
    """By name, what is known when a unit's width is chosen."""
    schema = SignalSchema(prepared.model.num_units, prepared.model.bit_widths)
    entropy = schema.index("token_entropy")
    entries = entry_linears(prepared.model)
    high = max(prepared.model.bit_widths)
    bases = [_main_directions(inputs) for inputs in train.inputs]

    def today(text: Text, rows: slice) -> Tensor:
        return torch.cat([text.plain[rows], text.embedding[rows]], dim=-1)

    def hidden(count: int) -> Build:
        return lambda text, rows, unit, inputs: torch.cat([today(text, rows), inputs @ bases[unit][:, :count]], dim=-1)

    def error(text: Text, rows: slice, unit: int, inputs: Tensor) -> Tensor:
        relative = relative_errors(inputs, entries[unit], bit_width, high)[..., None].log()
        norm = inputs.norm(dim=-1, keepdim=True).clamp_min(_SMALLEST).log()
        return torch.cat([today(text, rows), relative, norm], dim=-1)

    return {
        "entropy before the token": lambda text, rows, unit, inputs: text.plain[rows][..., entropy, None],
        BEFORE: lambda text, rows, unit, inputs: text.plain[rows],
        TODAY: lambda text, rows, unit, inputs: today(text, rows),
        "today + relative error of the unit": error,
        "today + hidden state, 16 directions": hidden(16),
        IN_FLIGHT: hidden(48),
        "today + hidden state, all of it": lambda text, rows, unit, inputs: torch.cat([today(text, rows), inputs], -1),
        "today + entropy after the token (too late)": lambda text, rows, unit, inputs: torch.cat(
            [today(text, rows), text.own_entropy[rows]], dim=-1
        ),
    }


def _main_directions(inputs: Tensor) -> Tensor:
    """`[S, T, K]` -> `[K, K]`, the directions in which the inputs vary most first."""
    flat = inputs.flatten(0, 1)
    values, vectors = torch.linalg.eigh((flat - flat.mean(0)).T.double().cov())
    return vectors[:, values.argsort(descending=True)].float()


@dataclass(frozen=True)
class Predictor:
    """Ridge regression on standardised features and on random functions of them.

    Attributes:
        mean: `[F]`.
        std: `[F]`.
        directions: `[F, H]`; the functions are tanh of these sums.
        coefficients: `[1 + F + H]`, the constant first.
    """

    mean: Tensor
    std: Tensor
    directions: Tensor
    coefficients: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """`[..., F]` -> `[...]`."""
        return self.design(features) @ self.coefficients

    def design(self, features: Tensor) -> Tensor:
        """`[..., F]` -> `[..., 1 + F + H]`."""
        inputs = (features - self.mean) / self.std
        return torch.cat([torch.ones_like(inputs[..., :1]), inputs, (inputs @ self.directions).tanh()], dim=-1)


def fit(features: Tensor, target: Tensor) -> Predictor:
    """Fits `[S, T, F]` to `[S, T]`; every fifth sequence is held out and chooses how much coefficients shrink."""
    generator = torch.Generator().manual_seed(0)
    flat = features.flatten(0, 1)
    num_features = flat.shape[1]
    directions = torch.randn(num_features, _RANDOM_FEATURES, generator=generator) / num_features**0.5
    blank = Predictor(flat.mean(0), flat.std(0).clamp_min(1e-4), directions, torch.empty(0))
    is_held = torch.arange(len(features)) % 5 == 0
    design, held = (blank.design(features[which]).flatten(0, 1) for which in (~is_held, is_held))
    answers, held_answers = (target[which].flatten() for which in (~is_held, is_held))
    gram, moments = (design.T @ design).double(), (design.T @ answers).double()
    shrink = torch.eye(len(gram), dtype=torch.float64)
    shrink[0, 0] = 0.0  # not the constant
    tried = [torch.linalg.solve(gram + ridge * shrink, moments).float() for ridge in _RIDGES]
    best = min(tried, key=lambda found: float((held @ found - held_answers).square().mean()))
    return Predictor(blank.mean, blank.std, directions, best)


def explained(predicted: Tensor, target: Tensor) -> float:
    """R2 on text that nothing was fitted to."""
    return 1 - float((predicted - target).square().mean() / (target - target.mean()).square().mean())


def log_influence(text: Text) -> Tensor:
    """`[S, T, U]`."""
    return text.influence.clamp_min(_SMALLEST).log()


def token_log_kl(text: Text) -> Tensor:
    """`[S, T]`."""
    return text.token_kl.clamp_min(_SMALLEST).log()
