"""From a model and some text to what every phase needs: the nested model, its profile, the static front.

Profile and front are kept in the run's directory, so that a resume finds the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flexquant_rl.agents.config import TrainConfig
from flexquant_rl.agents.export import ExportedPolicy
from flexquant_rl.agents.policies.static_front import StaticFront, static_front
from flexquant_rl.agents.policies.unbound import PolicyContext, Recording
from flexquant_rl.agents.progress import say, track
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.allocation_kl import affordable_windows
from flexquant_rl.engine.control.artefact import PROFILE_FILE
from flexquant_rl.engine.control.cost import CostTable, roofline_cost
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.step_timer import measured_table
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import file_sha256, read_tensors, write_tensors
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.prompts import PromptWindows, load_windows, profile_windows, spread

FRONT_FILE = "static_front.safetensors"
_MOST_FRONT_WINDOWS = 16
_RECORDED_WINDOWS = 32


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
        num_threads: Threads of steps that are timed, as for `open_session`.
        static_kl_nats: Output KL of static allocations on validation text, as far as they have been read, by windows
            to choose from, windows read and widths; a changed copy begins anew.
    """

    model: NestedCausalLM
    windows: PromptWindows
    profile: Profile
    cost: CostTable
    front: StaticFront
    env: EnvConfig
    num_threads: int | None = None
    static_kl_nats: dict[tuple[int, int, tuple[int, ...]], float] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def dials(self, count: int) -> Tensor:
        """`count` KL weights, evenly spaced on a log scale over the run's range (or the fixed one)."""
        if self.env.kl_weight is not None:
            return torch.tensor([self.env.kl_weight])
        low, high = math.log(self.env.kl_weight_min), math.log(self.env.kl_weight_max)
        return torch.linspace(low, high, count).exp()


def policy_context(prepared: Prepared) -> PolicyContext:
    """What policies may know of this run's model; training text is read when the first of them asks for it."""
    model = prepared.model
    schema = SignalSchema(model.num_units, model.bit_widths)

    @cache
    def recording() -> Recording:
        from flexquant_rl.agents.evaluation.rehearsal import RecordedText  # needs Gymnasium, and serving does not

        windows = spread(prepared.windows.train, _RECORDED_WINDOWS)
        return RecordedText(model, prepared.profile, windows, prepared.env, prepared.cost, num_scored=_RECORDED_WINDOWS)

    return PolicyContext(prepared.profile, prepared.front, schema, model.fingerprint, recording)


def prepare(config: TrainConfig, run_dir: Path | None, exported: Sequence[ExportedPolicy] = ()) -> Prepared:
    """Loads or quantises the model, reads the text, profiles, and solves the static allocation.

    Args:
        config: Configuration of the run.
        run_dir: Where profile and front are kept for a resume; None keeps nothing.
        exported: Policies that will control the model. What they see of it is then the profile that they carry; of
            `config.profile` only the latencies count.

    Raises:
        InputError: If the model, the text, the profile or the policies cannot be used, or not together.
    """
    profile_path = run_dir / PROFILE_FILE if run_dir else None
    given = _given_profile(config, profile_path, carried=bool(exported))
    say("loading the model and nesting its weights")
    model = load_model(
        resolve_model(config.model),
        config.quantization,
        progress=track,
    ).to(config.device)
    for policy in exported:
        policy.card.check_model(model.fingerprint, policy.directory)
    config.env.validate()
    if len(model.bit_widths) < 2:
        raise InputError(
            f"the model stores only width {model.bit_widths[0]}, which leaves nothing to choose; nest it with two or "
            "more, e.g. --quantization.bit-widths 4 8"
        )
    texts = [Path(text) for text in config.text]
    windows = load_windows(model.tokenizer, config.env.window_tokens, texts, text_field=config.text_field)
    # Fails here, before any work, if there is nothing to choose by or an episode does not fit the context. Test text is
    # the evaluation's to open.
    _ = windows.train, windows.validation
    DecodeSession(model, max_length=config.env.window_tokens - 1).close()
    # That of a fixed width has no sensitivities: nothing was measured for it.
    carried = exported[0].profile if exported and exported[0].profile.num_tokens else None
    judging = given or carried or _profile(model, windows, config)
    judging.check(model, config.threads)
    if profile_path is not None and not profile_path.exists():
        judging.save(profile_path)
    profile = carried or judging
    front = _front(model, windows, replace(profile, cost=judging.cost), config.env.prompt_tokens, run_dir)
    fixed = config.env.kl_weight
    low, high = (fixed, fixed) if fixed is not None else front.dial_range(_fastest_asked(config, judging.cost, front))
    env = replace(config.env, kl_weight_min=low, kl_weight_max=high)
    return Prepared(model, windows, profile, judging.cost, front, env, config.threads)


def _fastest_asked(config: TrainConfig, cost: CostTable, front: StaticFront) -> float:
    """The time share that is left for the widths of a policy that looks, at the smallest budget in its reach."""
    left = [budget - cost.controller_share for budget in config.time_budgets]
    return min((share for share in left if share >= float(front.time_share.min())), default=math.inf)


def check_budgets(config: TrainConfig, prepared: Prepared) -> None:
    """Raises InputError if no time budget is in reach of any static allocation: nothing could be compared."""
    fastest = float(prepared.cost.time_share(prepared.front.bit_widths).min())
    if fastest > max(config.time_budgets):
        example = " ".join(f"{fastest + part * (1 - fastest):.2f}" for part in (0.25, 0.5, 0.75))
        raise InputError(
            f"time_budgets={' '.join(map(str, config.time_budgets))!r} are out of reach: the fastest allocation takes "
            f"{fastest:.3f} of the time at the largest width, by the {prepared.cost.source} table; give e.g. "
            f"--time-budgets {example}"
        )


def profile_beside(model: str | None) -> Path | None:
    """The profile that `fq profile` left in the model's directory, if there is one."""
    path = None if model is None else Path(model) / PROFILE_FILE
    return path if path is not None and path.is_file() else None


def _given_profile(config: TrainConfig, kept: Path | None, *, carried: bool) -> Profile | None:
    """The profile that a run has kept, or the one that it is told to take or finds; read before anything slow."""
    if kept is not None and kept.exists():
        return Profile.load(kept)
    if config.profile is not None:
        return Profile.load(Path(config.profile))
    found = None if carried or config.latency is not None else profile_beside(config.model)
    return None if found is None else Profile.load(found)


def _profile(model: NestedCausalLM, windows: PromptWindows, config: TrainConfig) -> Profile:
    is_embedded = resolve_model(config.model) == resolve_model(None)
    if (config.latency or ("roofline" if is_embedded else "measured")) == "measured":
        say("profiling: latency of steps at many widths")
        cost = measured_table(model, windows.train[:, :-1], num_threads=config.threads)
    else:
        cost = roofline_cost(model)
    say("profiling: output KL of every unit at every width")
    profiled = profile_windows(model, windows.train)
    return profile_model(model, profiled, cost, progress=lambda units: track(units, "profiling"))


def _front(
    model: NestedCausalLM, windows: PromptWindows, profile: Profile, first: int, run_dir: Path | None
) -> StaticFront:
    path = run_dir / FRONT_FILE if run_dir else None
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
    solved = static_front(profile, model.unit_weights)
    read = windows.train[:, :-1]
    num_windows = affordable_windows(model, solved.bit_widths, read.shape[1], _MOST_FRONT_WINDOWS)
    front = solved.measured_on(
        DecodeSession(model), spread(read, num_windows), first, progress=lambda layers: track(layers, "measuring")
    )
    if path is not None:
        write_tensors(path, vars(front), solved_with)
    return front
