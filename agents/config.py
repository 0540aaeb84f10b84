"""Everything that decides a run's result: one configuration, its defaults and the values that make no run.

Imports nothing that is slow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import tyro

from flexquant_rl.engine.benches.options import BenchConfig
from flexquant_rl.engine.control.draft_limits import NGRAM_DRAFTS, check_ngram_drafts
from flexquant_rl.engine.decoding.options import check_num_threads
from flexquant_rl.engine.decoding.sampling_bounds import check_temperature
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import check_field_types
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.config import EnvConfig

Device = Literal["cpu", "cuda"]
Latency = Literal["measured", "roofline"]
Task = Literal["lossy", "verified"]

BASELINES = ("random", "entropy", "schedule", "token", "relative-error", "regressor", "untrained")
"""Families that are tuned beside the policy; static allocations and fixed widths always compete."""
_LEAST_WINDOWS = 10
_MOST_DRAFTS = 32
_ENV_STEPS: dict[Task, int] = {"lossy": 36_864, "verified": 200_000}
_OF_LOSSY = (
    *("validation_sequences", "test_sequences", "importance_windows", "time_budgets", "baselines"),
    *("oracle_samples", "long_tokens", "num_dials", "env", "ppo"),
)
_OF_VERIFIED = ("traces", "verified")
"""Options of one task alone."""


def _check_bounds(config: object, prefix: str, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raises InputError on a field outside its bounds, both included, or infinite."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not low <= value <= high or math.isinf(value):
            limit = f"from {low:g} to {high:g}" if math.isfinite(high) else f"finite and at least {low:g}"
            raise InputError(f"{prefix}.{name}={value:g} must be {limit}; change --{prefix}.{name.replace('_', '-')}")


@dataclass(frozen=True)
class PPOConfig:
    """Hyper-parameters; saved with every run."""

    num_envs: int = 96
    """Episodes in lockstep."""
    learning_rate: float = 1e-3
    """Falls linearly: of K updates, the last one is made at 1/K of it."""
    batch_size: int = 1024
    """Transitions per gradient step."""
    num_epochs: int = 4
    """Passes over each rollout."""
    gamma: float = 0.97
    """Discount per token: keys and values written at few bits cost later tokens, so it must not be small."""
    gae_lambda: float = 0.9
    """Bias and variance of the advantage."""
    clip_range: float = 0.2
    """PPO's trust region, for each unit by itself."""
    entropy_coefficient: float = 1e-4
    """Bonus for policy entropy, mean over units."""
    value_coefficient: float = 0.5
    """Weight of the value loss, in squared deviations of the dial's advantages."""

    def validate(self) -> None:
        """Raises InputError on values that PPO cannot learn with."""
        # stable-baselines3 takes no batch of one transition.
        bounds: dict[str, tuple[float, float]] = {"num_envs": (1, math.inf), "batch_size": (2, math.inf)}
        bounds |= {"num_epochs": (1, math.inf), "gamma": (0, 1), "gae_lambda": (0, 1)}
        bounds |= {name: (0, math.inf) for name in ("entropy_coefficient", "value_coefficient")}
        bounds |= {name: (1e-12, math.inf) for name in ("learning_rate", "clip_range")}
        _check_bounds(self, "ppo", bounds)


@dataclass(frozen=True)
class VerifiedPPOConfig:
    """How a policy of drafts is trained."""

    num_envs: int = 128
    """Recorded sequences in lockstep."""
    rollout_steps: int = 32
    """Steps of each row between updates."""
    batch_size: int = 512
    """Transitions of a gradient step."""
    num_epochs: int = 10
    """Times that a rollout is gone through."""
    learning_rate: float = 2e-3
    """At the beginning; falls to 0 in a straight line."""
    gamma: float = 0.99
    """Discount of a step: a lower one shortens rounds, as drafts cost now and gain with the pass behind them."""
    gae_lambda: float = 0.95
    """Decay of the advantage estimates."""
    entropy_coefficient: float = 0.01
    """Weight of the policy entropy."""
    sees: tuple[Literal["confidences", "signals"], ...] = ("confidences", "signals")
    """What the networks of a seed look at, one network each; the one that is fastest on validation sequences is kept.
    How sure the drafts are costs little to know; signals cost several times as much."""
    embedding: bool = False
    """Whether a network that sees signals sees the embedding of the token that is read next too. With a few thousand
    recorded tokens it then learns them by heart."""

    def validate(self) -> None:
        """Raises InputError on values that PPO cannot learn with."""
        bounds: dict[str, tuple[float, float]] = dict.fromkeys(("num_envs", "num_epochs"), (1, math.inf))
        bounds |= dict.fromkeys(("rollout_steps", "batch_size"), (2, math.inf))
        bounds |= {"gamma": (0, 1), "gae_lambda": (0, 1), "entropy_coefficient": (0, math.inf)}
        _check_bounds(self, "verified.ppo", bounds | {"learning_rate": (1e-12, math.inf)})
        if not self.sees or len(set(self.sees)) < len(self.sees):
            raise InputError(f"verified.ppo.sees={' '.join(self.sees)} must name one network or each of two once")


@dataclass(frozen=True)
class VerifiedConfig:
    """What is recorded for --task verified, and how policies of drafts are trained on it."""

    tokens: int = 4000
    """Tokens to record in all; fewer where texts end by themselves."""
    widths: tuple[float, ...] = (3, 4, 5, 6)
    """Widths that draft. One between stored widths, 3.5 say, is an allocation over the units by --profile."""
    depth: int = 8
    """Tokens drafted from every position: drafts of a round at most."""
    verify_width: int = 8
    """Width that the output equals."""
    prompt_tokens: int = 64
    """Tokens of a prompt."""
    max_new_tokens: int = 96
    """Tokens of a continuation at most; end-of-text tokens end it earlier."""
    ngram_drafts: int = NGRAM_DRAFTS
    """Drafts at most that a round finds in the text so far, no more than its depth, and 2 behind a lookup that was
    mostly wrong. Such rounds are verified at once;
    where nothing is found the policy decides. 0 looks none up."""
    live_prompts: int = 2
    """Test prompts that every policy continues by the clock, beside plain decoding; 0 leaves the clock out."""
    ppo: VerifiedPPOConfig = field(default_factory=VerifiedPPOConfig)
    """Learning."""

    def validate(self) -> None:
        """Raises InputError on values that make no recording of any model."""
        for name, least in (("tokens", 1), ("depth", 1), ("prompt_tokens", 1), ("max_new_tokens", 2)):
            if getattr(self, name) < least:
                option = f"--verified.{name.replace('_', '-')}"
                raise InputError(f"verified.{name}={getattr(self, name)} must be at least {least}; change {option}")
        check_ngram_drafts(self.ngram_drafts, "verified.ngram_drafts")
        if self.live_prompts < 0:
            raise InputError(f"verified.live_prompts={self.live_prompts} must not be negative; 0 leaves the clock out")
        self.ppo.validate()


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's result; saved as `config.json`."""

    task: Task = "lossy"
    """lossy: the widths chosen are the widths used; verified: low widths draft, and nothing is lost against
    --verified.verify-width. Options of the one are refused with the other."""

    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; none or `default` is the embedded model."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES")] = ()
    """Text files for prompts; default: standard-library modules that the embedded model has not seen."""
    text_field: str | None = None
    """Field of the rows of .jsonl files that is the text, outer.inner for one inside another; default: all of them."""
    seeds: int = 2
    """Policies trained, each with its own seed."""
    env_steps: int | None = None
    """Environment steps per seed; rounded up to whole rollouts. Default: 36,864; with --task verified, whose steps need
    no model, 200,000."""
    seed: int = 0
    """First seed."""
    device: Device = "cpu"
    """Where the model runs."""
    profile: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """profile.json that `fq profile` wrote for this model, with the latencies to train and compare by, or the times of
    drafts and passes for --task verified; default: the one in the model's directory, else one made here."""
    latency: Latency | None = None
    """Latencies of a profile made here: whole steps timed on this device, or modelled by the bytes they read; default:
    measured, but modelled for the embedded model, whose steps are too short for their bytes to show. With --task
    verified times are always measured, and measured times them here whatever lies in the model's directory."""
    threads: int | None = None
    """Threads of the decode steps that are timed, and of those that the profile was measured on; default: 1 with the
    lean decoder, else torch's number."""
    validation_sequences: int = 48
    """Sequences on which the best checkpoint is chosen; the time budgets are met on 24 of them at most."""
    test_sequences: int = 32
    """Sequences of the final table."""
    importance_windows: int = 192
    """Sequences of training text on which a run learns what tokens need their bits: for the start of PPO and for the
    policy by tokens. 0 starts PPO from plain static allocations, and makes no policy by tokens."""
    time_budgets: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SHARES")] = (0.5, 0.6, 0.7, 0.8)
    """Shares of the time at the largest width that every family is asked for in the final table. The dial is trained
    down to the smallest one in reach."""
    baselines: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = ("random", "entropy", "schedule", "token")
    """Families beside static and fixed in the final table, each tuned at every budget: random, entropy, schedule, token
    (what the run has learned of tokens, looked up), relative-error (a reference that no decoder here can serve),
    regressor, untrained; the last three are left out for the time they take."""
    oracle_samples: int = 16
    """Backward passes per sequence from which the oracles learn the influence of tokens and units, whose logarithm has
    a standard error of 0.36 with 16; 0 leaves the oracles out."""
    long_tokens: int = 512
    """Tokens of a second, longer comparison, as far as the context goes; 0 leaves it out."""
    num_dials: int = 6
    """Settings of the dial for which the exported policy knows its speed and KL."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """How the weights are nested."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Episodes and reward."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Learning."""
    traces: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """With --task verified: a recording of the model by `fq record`; default: one is made in the run's directory."""
    verified: VerifiedConfig = field(default_factory=VerifiedConfig)
    """Drafts."""

    @property
    def steps_per_seed(self) -> int:
        """The environment steps, the default filled in."""
        return _ENV_STEPS[self.task] if self.env_steps is None else self.env_steps


@dataclass(frozen=True, kw_only=True)
class EnvBench(BenchConfig):
    """Steps per second of the batched environment, that of drafts included."""

    name: ClassVar[str] = "env"
    tests: ClassVar[tuple[str, ...]] = ("tests/fq_env/test_vec_env.py", "tests/fq_env/test_trace_rounds.py")

    model: str | None = None
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; none or `default` is the embedded model."""
    text: tuple[str, ...] = ()
    """Text files; default: the held-out standard library."""
    traces: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A recording by `fq record`: times the environment of drafts over it, which needs no model."""
    num_envs: int = 128
    """Rows of the batch."""
    rounds: int = 5
    """Rollouts timed."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain."""
        super().validate()
        self._check_positive("num_envs")
        for name in ("model", "text"):
            if self.traces is not None and getattr(self, name):
                raise InputError(f"--{name} is not for a recording, which needs none; leave it or --traces out")


@dataclass(frozen=True, kw_only=True)
class DraftsBench(BenchConfig):
    """Text with and without drafts, beside llama.cpp with and without."""

    name: ClassVar[str] = "drafts"
    tests: ClassVar[tuple[str, ...]] = (
        "tests/engine/control/test_rounds.py",
        "tests/engine/benches/test_llama_cpp_drafts.py",
    )

    model: str = "default"
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
    reference: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With a nested checkpoint: the model that it was made from, for llama.cpp."""
    policy: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[POLICY ...]")] = (
        *("draft:3,length=3", "draft:3,length=5"),
        "draft:3,length=6,confidence=0.4",
    )
    """What is timed beside plain decoding at the largest width: drafts and static allocations by name, lookups (drafts
    of the text so far alone), directories of exported policies; none leaves plain decoding alone."""
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")] = ()
    """Text files whose test split prompts are cut from, the same number from each; default: the held-out standard
    library."""
    text_field: str | None = None
    """Field of jsonl rows that has the text; default: their chats, else all their strings."""
    prompts: int = 8
    """Prompts in all."""
    prompt_tokens: int = 64
    """Tokens of a prompt."""
    new_tokens: int = 96
    """Tokens of a continuation at most. The first comes from the prompt's pass and is not timed."""
    temperature: float = 0.0
    """0 continues greedily. Above it, texts are samples: they are not compared, and llama.cpp is not timed."""
    threads: tuple[int, ...] = (2,)
    """Threads of all; with several numbers each has rows of its own, all timed in the same run."""
    draft_lengths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="[INT ...]")] = (3, 5, 8)
    """Drafts of a round at most for llama.cpp's draft model; every one is timed. None leaves it out."""
    p_min: tuple[float, ...] = (0.0, 0.75)
    """Its stop rule: the least probability of a draft, 0 for none; every one is timed with every length."""
    peers: bool = True
    """Time llama.cpp too, where it is installed."""
    profile: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With a policy's name: profile.json of the model; default: the one in its directory, else made where needed."""
    rounds: int = 3
    """Turns of everybody on every prompt, after one on the first prompt that does not count."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain."""
        super().validate()
        self._check_positive("prompts", "prompt_tokens")
        if self.new_tokens < 2:
            raise InputError(f"new_tokens={self.new_tokens} leaves nothing to time; give --new-tokens 2 or more")
        check_temperature(self.temperature)
        if not self.threads or len(set(self.threads)) < len(self.threads):
            raise InputError(f"threads={self.threads} must be one or more different numbers; give e.g. --threads 1 2")
        for num_threads in self.threads:
            check_num_threads(num_threads)
        if len(set(self.policy)) < len(self.policy):
            raise InputError(f"--policy {' '.join(self.policy)} names one policy twice; name each once")
        if not all(1 <= length <= _MOST_DRAFTS for length in self.draft_lengths):
            raise InputError(
                f"draft_lengths={self.draft_lengths} must be within 1..{_MOST_DRAFTS}; give e.g. --draft-lengths 3 5 8"
            )
        if not self.p_min or not all(0 <= p_min < 1 for p_min in self.p_min):
            raise InputError(f"p_min={self.p_min} must be 0 or more and below 1; give e.g. --p-min 0 0.75")


def check_device(device: str) -> None:
    """Raises InputError unless a model can be put there."""
    import torch  # here, not above: it takes seconds, and a command's --help reads this file

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda, but torch sees no CUDA device; use --device cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device={device!r} is unknown; use cpu or cuda")


def check_config(config: TrainConfig) -> None:
    """Raises InputError on values that make no run."""
    check_field_types(config)
    _check_task(config)
    for name in ("seeds", "env_steps", "validation_sequences", "test_sequences", "num_dials"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1; give --{name.replace('_', '-')} 1 or more")
    if not 0 <= config.seed <= 2**32 - config.seeds:
        raise InputError(f"seed={config.seed} is not one that NumPy takes; use 0 to {2**32 - config.seeds}")
    if config.importance_windows and config.importance_windows < _LEAST_WINDOWS:
        raise InputError(
            f"importance_windows={config.importance_windows} must be at least {_LEAST_WINDOWS}, as every fifth one is "
            "held out; 0 leaves the importance of tokens out"
        )
    if config.long_tokens < 0:
        raise InputError(f"long_tokens={config.long_tokens} must not be negative; 0 leaves the long comparison out")
    for budget in config.time_budgets or (math.nan,):
        if not 0 < budget <= 1:
            raise InputError(
                f"time_budgets={' '.join(map(str, config.time_budgets))!r} must be shares of full-width time above 0 "
                "and up to 1, at least one; give e.g. --time-budgets 0.5 0.6 0.7 0.8"
            )
    for name in config.baselines:
        if name not in BASELINES:
            raise InputError(f"baselines={name!r} is unknown; choose from --baselines {' '.join(BASELINES)}")
    if config.oracle_samples < 0:
        raise InputError(f"oracle_samples={config.oracle_samples} must not be negative; 0 leaves the oracles out")
    if config.env.source != "replay" or config.env.action != "bit_widths":
        raise InputError(
            f"env.source={config.env.source} with env.action={config.env.action} is for agents of your own; "
            "train.py needs env.source=replay and env.action=bit_widths"
        )
    if config.env.probe_every:
        # Serving makes no probes: what the policy learned to look at would stand still wherever it runs.
        raise InputError(
            f"env.probe_every={config.env.probe_every}: probes are for agents of your own, nothing that serves a "
            "policy makes them; leave --env.probe-every out"
        )
    if config.latency is not None:
        if config.latency not in get_args(Latency):
            raise InputError(f"latency={config.latency} is not known; choose one of {', '.join(get_args(Latency))}")
        if config.profile is not None:
            raise InputError(
                f"--latency {config.latency} is for a profile made here, and --profile {config.profile} brings its own "
                "latencies; leave one of them out"
            )
    check_device(config.device)
    if config.threads is not None:
        check_num_threads(config.threads)
    config.quantization.validate()
    config.env.validate()
    config.ppo.validate()
    config.verified.validate()


def _check_task(config: TrainConfig) -> None:
    """Raises InputError on a task that there is none of, or on options of the other one."""
    if config.task not in get_args(Task):
        raise InputError(f"task={config.task} is not known; choose one of {', '.join(get_args(Task))}")
    default = TrainConfig()
    for name in _OF_LOSSY if config.task == "verified" else _OF_VERIFIED:
        value = getattr(config, name)
        if value != getattr(default, name):
            shown = "" if is_dataclass(value) else f" {value}"
            other = "lossy" if config.task == "verified" else "verified"
            option = f"--{name.replace('_', '-')}{'.*' if is_dataclass(value) else ''}{shown}"
            raise InputError(f"{option} is for --task {other}, and the task is {config.task}; leave it out")
    if config.task == "verified" and config.latency == "roofline":
        raise InputError(
            "--latency roofline counts the bytes of a step, and has no time for a pass over several tokens; leave it "
            "out: drafts and passes are timed on this device"
        )
