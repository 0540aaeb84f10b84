"""One training seed: clone the static allocation, improve it with PPO, keep the network that validation chose.

A deterministic function of the configuration and of the files before it, so a seed that was interrupted anywhere and
resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.evaluation.evaluate import Evaluator
from flexquant_rl.agents.export import PARITY_OBSERVATIONS, check_parity
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.agents.progress import StepBar, say
from flexquant_rl.agents.runs.imitation import clone, collect_signals
from flexquant_rl.agents.runs.ppo import TrainingCallback, build_ppo, learn, precision_net
from flexquant_rl.agents.runs.tensorboard_log import hyper_parameters
from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.decision import Policy, StaticAllocation
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.token_policy import DialPolicy
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_tensors, write_tensors
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.prompts import spread
from flexquant_rl.fq_env.task import LossyTask
from flexquant_rl.fq_env.vec_env import DecodeVecEnv

if TYPE_CHECKING:  # which uses the validation below
    from flexquant_rl.agents.runs.importance import Importances

_CLONED_FILE = "cloned.safetensors"
_POLICY_DIR = "policy"


@dataclass(frozen=True)
class SeedResult:
    """One trained policy and its scores on validation text: reward per token over static, in full-width steps.

    Attributes:
        seed: Training seed.
        policy: With the network that validation chose.
        curve: `(env steps, score)` of every network that was validated; the first one is the clone, before any update.
        env_steps_per_s: Of the process that ended the training; None where it found it ended.
        cloned: The network before PPO; None where the directory is of a version that did not keep it.
    """

    seed: int
    policy: LearnedPolicy
    curve: tuple[tuple[int, float], ...]
    env_steps_per_s: float | None
    cloned: LearnedPolicy | None = None

    @property
    def chosen(self) -> tuple[int, float]:
        """Env steps and score of the network that validation chose."""
        return max(self.curve, key=lambda point: point[1])

    @property
    def cloned_score(self) -> float:
        """Score before any update."""
        return self.curve[0][1]

    @property
    def best_score(self) -> float:
        """Score of the network that validation chose."""
        return self.chosen[1]

    @property
    def last_score(self) -> float:
        """Score after the last update."""
        return self.curve[-1][1]


class Validation:
    """Scores networks on validation text at all dials: mean reward per token over the static allocation's.

    The static allocation is run with the first score: a run that has ended asks for none.

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
        self._static = StaticAllocation("static", prepared.front.allocate(self._dials))

    @cached_property
    def _static_reward(self) -> Tensor:
        """`[S, T]`."""
        return self._evaluator.run(self._static, self._dials).reward

    def __call__(self, net: PrecisionNet) -> float:
        """The score of a network."""
        return self.score(LearnedPolicy(net, self._card))

    def score(self, policy: Policy) -> float:
        """Mean reward per token over the static allocation's; higher is better."""
        trace = self._evaluator.run(policy, self._dials)
        return float((trace.reward - self._static_reward).double().mean())

    def close(self) -> None:
        """Frees the session."""
        self._evaluator.close()


def policy_card(prepared: Prepared, config: TrainConfig | None = None) -> PolicyCard:
    """The card of a policy of this run, the dial's table still empty."""
    recorded = {} if config is None else asdict(config)
    return PolicyCard.of_model(prepared.model, recorded, horizon=prepared.env.max_new_tokens)


def train_seed(
    config: TrainConfig,
    prepared: Prepared,
    seed: int,
    directory: Path,
    importances: Importances | None = None,
    validation: Validation | None = None,
) -> SeedResult:
    """Clones static allocations, improves on them with PPO and saves the network that was best on validation text.

    Args:
        config: Configuration of the run.
        prepared: Model, text, profile and front.
        seed: Training seed.
        directory: Where checkpoint and policy are kept.
        importances: What the run has learned of tokens; None to start from plain static allocations.
        validation: That of the run, of `config.validation_sequences`; default: a new one.
    """
    if (directory / _POLICY_DIR / "policy.json").exists():
        return _finished(prepared, seed, directory)
    validation = validation or Validation(prepared, config.validation_sequences)
    session = DecodeSession(prepared.model, num_rows=config.ppo.num_envs, max_length=prepared.env.window_tokens - 1)
    static = prepared.front.allocate if prepared.env.source == "replay" else None
    env = DecodeVecEnv(
        Episodes(session, prepared.profile, prepared.windows.train, prepared.env),
        LossyTask(prepared.model, prepared.profile, prepared.env, static=static),
        seed=seed,
    )
    ppo = build_ppo(env, config.ppo, seed=seed, device=config.device)
    bar = StepBar(f"PPO seed {seed}", config.steps_per_seed)
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
        importance = None if importances is None else importances.by_signals
        agreement = clone(
            net, signals, prepared.front, prepared.profile, dials, importance=importance, generator=generator
        )
        what = "the static allocation" if importance is None else "static allocations by the importance of tokens"
        say(f"PPO seed {seed}: cloned {what}, {agreement:.1%} of widths agree")
        write_tensors(directory / _CLONED_FILE, net.actor().cpu().state_dict())
    began, steps_before = time.monotonic(), ppo.num_timesteps
    learn(ppo, callback, config.steps_per_seed, directory / "tensorboard", hyper_parameters(config, seed))
    rate = (ppo.num_timesteps - steps_before) / (time.monotonic() - began) if ppo.num_timesteps > steps_before else None
    bar.close()
    env.close()
    precision_net(ppo).load_state_dict(callback.best_state)
    exported = precision_net(ppo).actor().cpu()
    policy = LearnedPolicy(exported, _trained_card(config, prepared, callback, rate), f"ppo seed {seed}")
    # A resume takes `policy` for finished, so it gets its name only when it has been checked.
    unchecked = directory / "policy.unchecked"
    shutil.rmtree(unchecked, ignore_errors=True)
    save_policy(policy, prepared.profile, unchecked)
    recorded = torch.as_tensor(ppo.rollout_buffer.observations).reshape(-1, exported.schema.dim)
    check_parity(unchecked, recorded[:PARITY_OBSERVATIONS], lambda signals: ppo.predict(signals, deterministic=True)[0])
    unchecked.rename(directory / _POLICY_DIR)
    say(
        f"PPO seed {seed}: validation reward over static {callback.first_score:+.4f} cloned, "
        f"{callback.best_score:+.4f} best, {callback.last_score:+.4f} at the end"
    )
    cloned = _load_cloned(prepared, directory, seed)
    return SeedResult(seed, policy, tuple(callback.curve), rate, cloned)


def _finished(prepared: Prepared, seed: int, directory: Path) -> SeedResult:
    """What a seed that has been trained left in its directory."""
    policy_dir = directory / _POLICY_DIR
    policy = load_policy(
        policy_dir,
        model_fingerprint=prepared.model.fingerprint,
        name=f"ppo seed {seed}",
        repair=f"delete {policy_dir} to have it made again from the checkpoint",
    )
    if not isinstance(policy, LearnedPolicy):
        raise InputError(f"{policy_dir} holds no learned policy; delete it to have it made again")
    try:
        scores = policy.card.config["scores"]
        curve = tuple((int(env_steps), float(score)) for env_steps, score in scores["curve"])
        env_steps_per_s = scores["env_steps_per_s"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{policy_dir} does not say how its training went; delete it to have it made again") from error
    return SeedResult(seed, policy, curve, env_steps_per_s, _load_cloned(prepared, directory, seed))


def _load_cloned(prepared: Prepared, directory: Path, seed: int) -> LearnedPolicy | None:
    """The network as it was before PPO, if the seed's directory has it."""
    path = directory / _CLONED_FILE
    if not path.exists():
        return None
    fix = "delete it to have the run evaluated without the untrained policy"
    card = policy_card(prepared)
    net = PrecisionNet(card.schema)
    try:
        net.load_state_dict(read_tensors(path, fix=fix)[0])
    except RuntimeError as error:
        raise InputError(f"{path}: tensors do not fit this run's model; {fix}") from error
    return LearnedPolicy(net, card, f"untrained seed {seed}")


def _trained_card(
    config: TrainConfig, prepared: Prepared, callback: TrainingCallback, env_steps_per_s: float | None
) -> PolicyCard:
    card = policy_card(prepared, config)
    scores = {"curve": [list(point) for point in callback.curve], "env_steps_per_s": env_steps_per_s}
    return replace(card, config={**card.config, "scores": scores})


def with_dial_table(policy: DialPolicy, prepared: Prepared, num_sequences: int, num_dials: int) -> DialPolicy:
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
    return policy.with_card(replace(policy.card, dial=tuple(points)))
