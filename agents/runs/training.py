"""From a model and some text to an exported policy, in phases that each leave their result behind for a resume.

    model -> profile.json -> static_front.safetensors -> seeds/<k>/policy -> policy

Every phase is a deterministic function of the configuration and of the files before it, so a run that was interrupted
anywhere and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.evaluate import Evaluator
from flexquant_rl.agents.policies.static import StaticFront, static_front
from flexquant_rl.agents.progress import StepBar, say, track
from flexquant_rl.agents.runs.export import PARITY_OBSERVATIONS, ExportedPolicy, check_parity
from flexquant_rl.agents.runs.imitation import clone, collect_signals
from flexquant_rl.agents.runs.ppo import PPOConfig, TrainingCallback, build_ppo, learn, precision_net
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import CostTable, roofline_cost
from flexquant_rl.engine.control.policy import (
    PROFILE_FILE,
    Decision,
    DialPoint,
    LearnedPolicy,
    PolicyCard,
    PrecisionNet,
    load_policy,
)
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import file_sha256, read_tensors, write_tensors
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.quantize import QuantizationConfig
from flexquant_rl.fq_env.prompts import PromptWindows, load_windows, spread
from flexquant_rl.fq_env.task import EnvConfig
from flexquant_rl.fq_env.vec_env import DecodeVecEnv

_PROFILE_WINDOWS = 12
_FRONT_WINDOWS = 16


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's result; saved as `config.json`."""

    model: str | None = None
    """Hugging Face directory or hub name, or a nested checkpoint; none or `default` is the embedded model."""
    text: tuple[str, ...] = ()
    """Text files for prompts; default: standard-library modules that the embedded model has not seen."""
    seeds: int = 2
    """Policies trained, each with its own seed."""
    env_steps: int = 36_864
    """Environment steps per seed; rounded up to whole rollouts."""
    seed: int = 0
    """First seed."""
    device: str = "cpu"
    """cpu or cuda."""
    profile: str | None = None
    """profile.json that `fq profile` wrote for this model, with the latencies to train and compare by; default: one
    made here, its latencies modelled by the bytes read."""
    threads: int | None = None
    """Threads of the decode steps that are timed, and of those that the profile was measured on; default: 1 with the
    lean decoder, else torch's number."""
    validation_sequences: int = 48
    """Sequences on which the best checkpoint is chosen."""
    test_sequences: int = 32
    """Sequences of the final table."""
    oracle_masks: int = 96
    """Random choices of tokens per sequence from which the oracle learns their influence; 0 leaves it out."""
    num_dials: int = 6
    """Settings of the dial in the final table."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """How the weights are nested."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Episodes and reward."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Learning."""


@dataclass(frozen=True)
class Prepared:
    """What every later phase needs.

    Attributes:
        model: The nested model.
        windows: Text of all splits.
        profile: Sensitivities and latencies, as the signals hold them.
        cost: What steps cost: the profile's table, but where policies that carry a profile are judged by another.
        front: Static allocations with measured KL.
        env: The run's episodes, the dial's range filled in.
        num_threads: Of steps that are timed, as for `open_session`.
    """

    model: NestedCausalLM
    windows: PromptWindows
    profile: Profile
    cost: CostTable
    front: StaticFront
    env: EnvConfig
    num_threads: int | None = None

    def dials(self, count: int) -> Tensor:
        """`count` KL weights, evenly spaced on a log scale over the run's range (or the fixed one)."""
        if self.env.kl_weight is not None:
            return torch.tensor([self.env.kl_weight])
        low, high = math.log(self.env.kl_weight_min), math.log(self.env.kl_weight_max)
        return torch.linspace(low, high, count).exp()


@dataclass(frozen=True)
class SeedResult:
    """One trained policy and its scores on validation text: reward per token over the static allocation."""

    seed: int
    policy: LearnedPolicy
    cloned_score: float
    best_score: float
    env_steps_per_s: float | None


def prepare(config: TrainConfig, run_dir: Path | None, exported: Sequence[ExportedPolicy] = ()) -> Prepared:
    """Loads or quantises the model, reads the text, profiles, and solves the static allocation.

    Args:
        config: Of the run.
        run_dir: Where profile and front are kept for a resume; None keeps nothing.
        exported: Policies that will control the model. What they see of it is then the profile that they carry; of
            `config.profile` only the latencies count.

    Raises:
        InputError: If the model, the text, the profile or the policies cannot be used, or not together.
    """
    profile_path = run_dir / PROFILE_FILE if run_dir else None
    given = _given_profile(config, profile_path)
    say("loading the model and nesting its weights")
    model = load_model(
        resolve_model(config.model),
        config.quantization,
        progress=lambda items: track(items, "quantising"),
    ).to(config.device)
    for policy in exported:
        policy.card.check_model(model.fingerprint, policy.directory)
    config.env.validate()
    if len(model.bit_widths) < 2:
        raise InputError(
            f"the model stores only width {model.bit_widths[0]}, which leaves nothing to choose; nest it with two or "
            "more, e.g. --quantization.bit-widths 4 8"
        )
    windows = load_windows(model.tokenizer, config.env.window_tokens, [Path(text) for text in config.text])
    # Fails here, before any work, if an episode does not fit the context.
    DecodeSession(model, max_length=config.env.window_tokens - 1).close()
    judging = given or (exported[0].profile if exported else _profile(model, windows))
    judging.check(model, config.threads)
    if profile_path is not None and not profile_path.exists():
        judging.save(profile_path)
    profile = exported[0].profile if exported else judging
    front = _front(model, windows, replace(profile, cost=judging.cost), config.env.prompt_tokens, run_dir)
    fixed = config.env.kl_weight
    low, high = (fixed, fixed) if fixed is not None else front.dial_range()
    env = replace(config.env, kl_weight_min=low, kl_weight_max=high)
    return Prepared(model, windows, profile, judging.cost, front, env, config.threads)


def _given_profile(config: TrainConfig, kept: Path | None) -> Profile | None:
    """The profile that a run has kept, or else the one that it is told to take; read before anything slow."""
    if kept is not None and kept.exists():
        return Profile.load(kept)
    return None if config.profile is None else Profile.load(Path(config.profile))


def _profile(model: NestedCausalLM, windows: PromptWindows) -> Profile:
    say("profiling: output KL of every unit at every width")
    return profile_model(
        model,
        spread(windows.train, _PROFILE_WINDOWS)[:, :-1],
        roofline_cost(model),
        progress=lambda units: track(units, "profiling"),
    )


def _front(
    model: NestedCausalLM, windows: PromptWindows, profile: Profile, first: int, run_dir: Path | None
) -> StaticFront:
    path = run_dir / "static_front.safetensors" if run_dir else None
    solved_with = {"profile_sha256": file_sha256(run_dir / PROFILE_FILE)} if run_dir else {}
    if path is not None and path.exists():
        fix = "delete it to have it computed again"
        tensors, metadata = read_tensors(path, fix=fix)
        if metadata and metadata != solved_with:
            raise InputError(
                f"{path.with_name(PROFILE_FILE)} is not the profile that this run was started with; put that one back, "
                "or start a new run"
            )
        try:
            return StaticFront(**tensors)
        except TypeError as error:
            raise InputError(f"{path}: not a static front ({error}); {fix}") from error
    say("solving the static allocation and measuring its output KL")
    session = DecodeSession(model)
    front = static_front(profile, model.unit_weights).measured_on(
        session, spread(windows.train, _FRONT_WINDOWS)[:, :-1], first
    )
    if path is not None:
        write_tensors(path, vars(front), solved_with)
    return front


class Validation:
    """Scores networks on validation text at all dials: mean reward per token over the static allocation's.

    Args:
        prepared: Model, text, profile and front.
        num_sequences: Sequences; each plays at one of the dials.
    """

    def __init__(self, prepared: Prepared, num_sequences: int) -> None:
        windows = spread(prepared.windows.validation, num_sequences)
        dials = prepared.dials(8)
        self._dials = dials[torch.arange(len(windows)) % len(dials)]
        self._evaluator = Evaluator(prepared.model, prepared.profile, windows, prepared.env)
        self._card = policy_card(prepared)
        allocation = prepared.front.allocate(self._dials)
        self._static_reward = self._evaluator.run(_PerSequence(allocation), self._dials).reward

    def __call__(self, net: PrecisionNet) -> float:
        """Mean reward per token over the static allocation's; higher is better."""
        trace = self._evaluator.run(LearnedPolicy(net, self._card), self._dials)
        return float((trace.reward - self._static_reward).double().mean())


@dataclass(frozen=True)
class _PerSequence:
    """A static allocation of its own for each row, `[S, U]`."""

    bit_widths: Tensor
    name: str = "static"

    def __call__(self, signals: Tensor) -> Decision:
        return Decision(self.bit_widths)


def policy_card(prepared: Prepared, config: TrainConfig | None = None) -> PolicyCard:
    """The card of a policy of this run, the dial's table still empty."""
    return PolicyCard(
        schema=SignalSchema(prepared.model.num_units, prepared.model.bit_widths),
        model_fingerprint=prepared.model.fingerprint,
        unit_names=tuple(unit.name for unit in prepared.model.units),
        config={} if config is None else asdict(config),
    )


def train_seed(config: TrainConfig, prepared: Prepared, seed: int, directory: Path) -> SeedResult:
    """Clones the static knapsack, improves it with PPO and saves the network that was best on validation text."""
    policy_dir = directory / "policy"
    if (policy_dir / "policy.json").exists():
        policy = load_policy(
            policy_dir,
            model_fingerprint=prepared.model.fingerprint,
            name=f"ppo seed {seed}",
            repair=f"delete {policy_dir} to have it made again from the checkpoint",
        )
        scores = policy.card.config["scores"]
        return SeedResult(seed, policy, scores["cloned"], scores["best"], scores["env_steps_per_s"])
    validation = Validation(prepared, config.validation_sequences)
    session = DecodeSession(prepared.model, num_rows=config.ppo.num_envs, max_length=prepared.env.window_tokens - 1)
    env = DecodeVecEnv(
        session,
        prepared.profile,
        prepared.windows.train,
        prepared.env,
        num_envs=config.ppo.num_envs,
        seed=seed,
        static=prepared.front.allocate if prepared.env.source == "replay" else None,
    )
    ppo = build_ppo(env, config.ppo, seed=seed, device=config.device)
    bar = StepBar(f"PPO seed {seed}", config.env_steps)
    checkpoint = directory / "checkpoint.safetensors"
    callback = TrainingCallback(
        checkpoint, validation, on_update=lambda steps, score: bar.update(steps, f"best over static {score:+.4f}")
    )
    if checkpoint.exists():
        callback.restore(ppo, env)
        say(f"PPO seed {seed}: resumed at {ppo.num_timesteps} env steps")
    else:
        generator = torch.Generator().manual_seed(seed)
        signals = collect_signals(env, prepared.front, generator)
        dials = (prepared.env.kl_weight_min, prepared.env.kl_weight_max)
        net = precision_net(ppo)
        agreement = clone(net, signals, prepared.front, prepared.profile, dials, generator=generator)
        say(f"PPO seed {seed}: cloned the static allocation, {agreement:.1%} of widths agree")
    began, steps_before = time.monotonic(), ppo.num_timesteps
    learn(ppo, callback, config.env_steps, directory / "tensorboard")
    rate = (ppo.num_timesteps - steps_before) / (time.monotonic() - began) if ppo.num_timesteps > steps_before else None
    bar.close()
    env.close()
    precision_net(ppo).load_state_dict(callback.best_state)
    exported = PrecisionNet(env.batch.schema)
    exported.load_state_dict({name: tensor.cpu() for name, tensor in callback.best_state.items()})
    policy = LearnedPolicy(exported, _trained_card(config, prepared, callback, rate), f"ppo seed {seed}")
    # A resume takes `policy` for finished, so it gets its name only when it has been checked.
    unchecked = directory / "policy.unchecked"
    shutil.rmtree(unchecked, ignore_errors=True)
    policy.save(unchecked, prepared.profile)
    recorded = torch.as_tensor(ppo.rollout_buffer.observations).reshape(-1, env.batch.schema.dim)
    check_parity(unchecked, recorded[:PARITY_OBSERVATIONS], lambda signals: ppo.predict(signals, deterministic=True)[0])
    unchecked.rename(policy_dir)
    scores = f"{callback.first_score:+.4f} cloned, {callback.best_score:+.4f} best"
    say(f"PPO seed {seed}: validation reward over static {scores}")
    return SeedResult(seed, policy, callback.first_score, callback.best_score, rate)


def _trained_card(
    config: TrainConfig, prepared: Prepared, callback: TrainingCallback, env_steps_per_s: float | None
) -> PolicyCard:
    card = policy_card(prepared, config)
    scores = {
        "cloned": callback.first_score,
        "best": callback.best_score,
        "env_steps_per_s": env_steps_per_s,
    }
    return replace(card, config={**card.config, "scores": scores})


def with_dial_table(policy: LearnedPolicy, prepared: Prepared, num_sequences: int, num_dials: int) -> LearnedPolicy:
    """Measures speed and KL of a policy at each setting of the dial on validation text and writes them on its card."""
    evaluator = Evaluator(
        prepared.model, prepared.profile, spread(prepared.windows.validation, num_sequences), prepared.env
    )
    points = []
    for dial in prepared.dials(num_dials).tolist():
        trace = evaluator.run(policy, dial)
        points.append(
            DialPoint(dial, trace.speedup, float(trace.output_kl_nats.mean()), float(trace.mean_bit_width.mean()))
        )
    evaluator.close()
    return LearnedPolicy(policy.net, replace(policy.card, dial=tuple(points)), "ppo")
