"""How much the bits of a token matter, as far as the signals before it can tell: learned before PPO starts.

What low widths at a token cost is its own output KL and that of all later tokens, through keys and values. When the
text is given, backward passes measure this influence of all tokens at once (`evaluation/influence.py`). A small network
learns the expected influence from the signals, as a multiple of an average token's. A static allocation at the dial
times a power of that multiple spends its bits where they count. The power is below 1 where the multiple is noisy;
validation text chooses it. A second network learns the same from the input token's embedding alone. What it says can be
looked up, so its policy costs a step nothing.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.evaluation.influence import influences
from flexquant_rl.agents.evaluation.rehearsal import signals_at
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.training import Validation
from flexquant_rl.engine.control.decision import Decision, Policy, looks
from flexquant_rl.engine.control.policy import PolicyCard
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.token_policy import ImportanceNet, TokenPolicy
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_tensors, write_tensors
from flexquant_rl.fq_env.prompts import spread
from flexquant_rl.fq_env.task import draw_kl_weights

# Backward passes: the influence of one token is known to a factor of 2, and more tokens teach more than more passes.
_NUM_SAMPLES = 4
# Sequences that share a dial, and so the widths whose errors are measured.
_ROWS_PER_DIAL = 8
_EXPONENTS = (0.25, 0.5, 0.75, 1.0)
_SMALLEST_NATS = 1e-12
IMPORTANCE_FILE = "importance.safetensors"
TOKEN_DIR = "by_token"
"""Where a run keeps the policy that looks at the input token alone."""
_TOKEN = "token."


class Importance(ImportanceNet):
    """What a token needs, from the signals before it.

    Args:
        schema: What the signals are.
    """

    def __init__(self, schema: SignalSchema) -> None:
        super().__init__(schema.num_global + schema.num_per_unit)
        self.schema = schema

    def features(self, signals: Tensor) -> Tensor:
        """The global signals, and the means of the unit signals over units: `[n, dim]` -> `[n, F]`."""
        global_signals, unit_signals = self.schema.split(signals)
        return torch.cat([global_signals, unit_signals.mean(1)], dim=-1)

    def forward(self, signals: Tensor) -> Tensor:
        """The multiple, raised to the exponent; signals `[n, dim]` -> `[n]`."""
        return self.multiple(self.features(signals))


@dataclass(frozen=True)
class Importances:
    """What a run has learned of tokens.

    Attributes:
        by_signals: From all signals: what PPO starts from.
        by_token: From the embedding of the input token alone; None in a run of a version that did not learn it.
    """

    by_signals: Importance
    by_token: ImportanceNet | None


@dataclass(frozen=True)
class Effects:
    """What the bits of tokens do.

    Attributes:
        signals: `[S, T, dim]` before each token, at the static allocation of the sequence's dial.
        relative: `[S, T]`, KL that the allocation's errors at the token add, over what they add on average; mean 1.
    """

    signals: Tensor
    relative: Tensor


def load_importance(
    config: TrainConfig, prepared: Prepared, run_dir: Path, validation: Validation | None = None
) -> Importances | None:
    """Learns the importance of tokens, or reads what the run has kept; None where the configuration leaves it out.

    Args:
        config: Configuration of the run.
        prepared: Model, text, profile and front.
        run_dir: Where it is kept.
        validation: That of the run, of `config.validation_sequences`; default: a new one.

    Raises:
        InputError: If what was kept is damaged.
    """
    if not config.importance_windows:
        return None
    schema = SignalSchema(prepared.model.num_units, prepared.model.bit_widths)
    net, of_token = Importance(schema), ImportanceNet(schema.num_embedding_dims)
    path = run_dir / IMPORTANCE_FILE
    if path.exists():
        return _kept(path, net, of_token)
    shutil.rmtree(run_dir / TOKEN_DIR, ignore_errors=True)  # of what was learned before
    say("learning which tokens need their bits")
    generator = torch.Generator().manual_seed(config.seed)
    effects = measure_effects(prepared, config.importance_windows, config.ppo.num_envs, generator)
    signals = effects.signals.flatten(0, 1)
    validation = validation or Validation(prepared, config.validation_sequences)
    policies: tuple[tuple[ImportanceNet, str, Tensor, Policy], ...] = (
        (net, "the signals explain", net.features(signals), _ByImportance(net, prepared)),
        (
            of_token,
            "the input token alone explains",
            signals[:, schema.embedding_columns],
            token_policy(of_token, config, prepared),
        ),
    )
    for part, what, features, policy in policies:
        explained = fit_importance(part, features, effects.relative, generator)
        say(f"{what} {explained:.1%} of the deviance of what tokens need")
        score = choose_exponent(part, policy, prepared, validation)
        say(f"validation reward over static {score:+.4f} with it to the power of {float(part.exponent):g}")
    of_tokens = {f"{_TOKEN}{name}": tensor for name, tensor in of_token.state_dict().items()}
    write_tensors(path, net.state_dict() | of_tokens, {})
    return Importances(net, of_token)


def _kept(path: Path, net: Importance, of_token: ImportanceNet) -> Importances:
    """What a run has kept, read into networks of its model."""
    fix = "delete it to have it learned again"
    tensors, _ = read_tensors(path, fix=fix)
    of_tokens = {name.removeprefix(_TOKEN): tensors.pop(name) for name in [*tensors] if name.startswith(_TOKEN)}
    try:
        net.load_state_dict(tensors)
        if of_tokens:
            of_token.load_state_dict(of_tokens)
    except RuntimeError as error:
        raise InputError(f"{path}: not of this model ({error}); {fix}") from error
    return Importances(net, of_token if of_tokens else None)


def token_policy(net: ImportanceNet, config: TrainConfig, prepared: Prepared) -> TokenPolicy:
    """The policy that looks at the input token alone; it sees no position, and so has no horizon."""
    card = PolicyCard.of_model(prepared.model, asdict(config))
    return TokenPolicy(net, *prepared.front.envelope(), card)


def choose_exponent(net: ImportanceNet, policy: Policy, prepared: Prepared, validation: Validation) -> float:
    """Sets the exponent of a net with which a policy of it earns most on validation text; 0 is the static allocation.

    Returns:
        Mean reward per token over static, in full-width steps.
    """
    # A network pays for looking whatever it chooses.
    scores = {0.0: -prepared.profile.cost.controller_share if looks(policy) else 0.0}
    for exponent in _EXPONENTS:
        net.exponent.fill_(exponent)
        scores[exponent] = validation.score(policy)
    best = max(scores, key=lambda exponent: scores[exponent])
    net.exponent.fill_(best)
    return scores[best]


@dataclass(frozen=True)
class _ByImportance:
    """The static allocation at the dial times the importance of the token: what a clone is to learn."""

    net: Importance
    prepared: Prepared
    name: str = "static by importance"

    def __call__(self, signals: Tensor) -> Decision:
        dial = 10 ** signals[:, self.net.schema.index("dial")]
        return Decision(self.prepared.front.allocate(dial * self.net(signals)))


def measure_effects(prepared: Prepared, num_windows: int, num_rows: int, generator: torch.Generator) -> Effects:
    """Measures what low widths at each token cost, on training text.

    Args:
        prepared: Model, text, static front.
        num_windows: Sequences, as far as the text goes.
        num_rows: Sequences at a time.
        generator: Draws dials, as episodes have them, and directions.
    """
    windows = spread(prepared.windows.train, num_windows)
    draws = np.random.default_rng(int(torch.randint(1 << 31, (), generator=generator)))
    dials = torch.from_numpy(draw_kl_weights(draws, prepared.env, math.ceil(len(windows) / _ROWS_PER_DIAL)))
    dials = dials.repeat_interleave(_ROWS_PER_DIAL)[: len(windows)]
    kl = prepared.front.output_kl_nats
    # Where 8 bits are the reference, the slowest allocation has no errors to look at: the one before it has.
    points = prepared.front.best(dials).clamp_max(max(int((kl > 0).sum()) - 1, 0))
    own = prepared.front.bit_widths[points]
    signals = torch.cat(
        [
            signals_at(prepared.model, prepared.profile, windows[rows], prepared.env, own[rows], dials[rows])
            for rows in torch.arange(len(windows)).split(num_rows)
        ]
    )
    parts = []
    for begin in track(range(0, len(windows), _ROWS_PER_DIAL), "influence of tokens"):
        found = influences(
            prepared.model,
            windows[begin : begin + _ROWS_PER_DIAL, :-1],
            own[begin],
            first=prepared.env.prompt_tokens,
            num_samples=_NUM_SAMPLES,
            generator=generator,
        )
        parts.append(found.tokens.double() / max(float(kl[points[begin]]), _SMALLEST_NATS))
    relative = torch.cat(parts)
    return Effects(signals, relative / relative.mean().clamp_min(1e-6))


def fit_importance(
    net: ImportanceNet,
    features: Tensor,
    relative: Tensor,
    generator: torch.Generator,
    *,
    num_steps: int = 600,
    batch_size: int = 2048,
    learning_rate: float = 3e-3,
) -> float:
    """Fits the expected effect by Poisson's deviance, which asks for a mean and takes noise of either sign.

    Every fifth sequence is held out; the state that is best on these is kept.

    Args:
        net: Trained in place.
        features: `[S * T, F]` of the tokens of S sequences, one after the other.
        relative: `[S, T]`, what was measured: see `Effects`.
        generator: Draws batches.
        num_steps: Gradient steps.
        batch_size: Tokens per step.
        learning_rate: Of AdamW.

    Returns:
        Share of the deviance of the held-out sequences that is explained; 0 where nothing could be learned.
    """
    net.mean.copy_(features.mean(0))
    net.std.copy_(features.std(0).clamp_min(1e-4))
    # From the generator that is given, so that a resumed run learns the same.
    first = net.layers[0]
    assert isinstance(first, nn.Linear)
    nn.init.orthogonal_(first.weight, generator=generator)
    nn.init.zeros_(first.bias)
    is_held_out = (torch.arange(len(relative)) % 5 == 0).repeat_interleave(relative.shape[1])
    relative = relative.float().flatten()
    seen = (~is_held_out).nonzero()[:, 0]

    def deviance(picked: Tensor) -> Tensor:
        log = net.log(features[picked])
        return (log.exp() - relative[picked] * log).mean()

    best, best_state = float("inf"), net.state_dict()
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=1e-2)
    start = None
    for step in range(num_steps + 1):
        if step % 25 == 0:
            with torch.no_grad():
                value = float(deviance(is_held_out))
            start = value if start is None else start
            if value < best:
                best, best_state = value, {name: tensor.clone() for name, tensor in net.state_dict().items()}
        loss = deviance(seen[torch.randint(len(seen), (batch_size,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.load_state_dict(best_state)
    assert start is not None
    return 1 - best / start
