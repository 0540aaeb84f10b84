"""The `fq` command: quantize, profile, train, evaluate, export, generate and bench.

Each subcommand is a function whose arguments are its options; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see train.py

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import Positional

from flexquant_rl.agents.baselines import check_policy_name, make_policy
from flexquant_rl.agents.bench_env import bench_env
from flexquant_rl.agents.bits_display import coloured, has_colours, legend, numbers
from flexquant_rl.agents.command import command, print_result
from flexquant_rl.agents.contest import Contestant, compete, policy_context
from flexquant_rl.agents.export import export_run
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.report import console_table
from flexquant_rl.agents.rows import public_dict
from flexquant_rl.agents.run import check_config, load_run
from flexquant_rl.agents.training import Prepared, TrainConfig, prepare
from flexquant_rl.engine.checkpoint import is_nested_checkpoint, load_model, save_checkpoint
from flexquant_rl.engine.cost import clock_ms, measured_cost, roofline_cost
from flexquant_rl.engine.decode import DecodeSession
from flexquant_rl.engine.embedded import embedded_model_path
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory, write_json
from flexquant_rl.engine.generate import StreamedText
from flexquant_rl.engine.generate import generate as generate_tokens
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.perplexity import perplexity_by_width
from flexquant_rl.engine.policy import PROFILE_FILE, LearnedPolicy, load_policy
from flexquant_rl.engine.profile import Profile, profile_model
from flexquant_rl.engine.quantize import QuantizationConfig
from flexquant_rl.fq_env.prompts import load_windows
from flexquant_rl.fq_env.task import EnvConfig, check_kl_weight
from flexquant_rl.train import TrainArguments, train

_TIMED_PROMPT = 16


def quantize(
    source: Positional[str],
    out: Positional[Path],
    quantization: Annotated[QuantizationConfig, tyro.conf.arg(name="")] = QuantizationConfig(),  # noqa: B008
    text: tuple[Path, ...] = (),
) -> None:
    """Nests a model's weights and writes a checkpoint.

    Args:
        source: Hugging Face directory or hub name.
        out: New directory.
        quantization: How.
        text: Measures perplexity by width on the test split of these files.
    """
    check_new_directory(out)
    quantization.validate()
    if is_nested_checkpoint(Path(source)):
        raise InputError(f"{source} is a nested checkpoint already; give the model that it was made from")
    began = time.perf_counter()
    model = load_model(source, quantization, progress=lambda items: track(items, "quantising"))
    windows = _text_windows(model, text) if text else None  # bad text must not leave a checkpoint behind
    result: dict[str, object] = {"out": str(out), "bytes": save_checkpoint(model, out)}
    result["seconds"] = time.perf_counter() - began
    if windows is not None:
        result["perplexity_by_width"] = perplexity_by_width(model, windows)
    print_result(result)


def _text_windows(model: NestedCausalLM, text: tuple[Path, ...], tokens: int = 129) -> torch.Tensor:
    """Up to 32 windows of the test split of some text."""
    windows = load_windows(model.tokenizer, min(tokens, model.max_context), text).test
    return windows[:: max(1, len(windows) // 32)][:32]


def profile(
    model: Positional[str],
    text: tuple[Path, ...] = (),
    out: Path | None = None,
    source: Literal["measured", "roofline"] = "measured",
    steps: int = 300,
) -> None:
    """Measures what every unit's width costs in time on this device and in output KL.

    Args:
        model: Hugging Face directory or hub name, or a nested checkpoint.
        text: Text files; default: the held-out standard library.
        out: Where to write; default: profile.json in the model's directory.
        source: Time whole steps at random widths, or model them by the bytes they read.
        steps: Whole steps to time.
    """
    if out is None and not Path(model).is_dir():
        raise InputError(f"{model} is not a directory to write {PROFILE_FILE} into; check the name, or give --out FILE")
    target = out or Path(model) / PROFILE_FILE
    nested = load_model(model, QuantizationConfig(), progress=lambda items: track(items, "quantising"))
    windows = load_windows(nested.tokenizer, min(EnvConfig().window_tokens, nested.max_context + 1), text).train
    cost = roofline_cost(nested)
    if source == "measured":
        session = DecodeSession(nested, max_length=_TIMED_PROMPT + 1)
        session.prefill(windows[:1, :_TIMED_PROMPT])

        def time_step(bit_widths: torch.Tensor) -> float:
            twin = session.fork()
            return clock_ms(lambda: twin.step(bit_widths, windows[0, :1]), nested.device)

        cost = measured_cost(nested, time_step, num_steps=steps)
    result = profile_model(nested, windows[:12, :-1], cost, progress=lambda units: track(units, "profiling"))
    result.save(target)
    by_width = {str(b): float(cost.latency_ms(torch.full((nested.num_units,), b))) for b in nested.bit_widths}
    print_result(
        {
            "profile": str(target),
            "source": source,
            "latency_ms_by_width": by_width,
            "table_error_p50": cost.error_p50,
            "table_error_p95": cost.error_p95,
            "sensitivity": result.sensitivity.tolist(),
        }
    )


def evaluate(
    model: Positional[str],
    policy: tuple[str, ...] = ("fixed:4", "fixed:8", "knapsack:4.5"),
    text: tuple[str, ...] = (),
    dials: int = 4,
    sequences: int = 64,
    device: str = "cpu",
    mode: Literal["lossy"] = "lossy",
    env: EnvConfig = EnvConfig(),  # noqa: B008
) -> None:
    """Compares policies on the test split of some text.

    Args:
        model: Hugging Face directory or hub name, or a nested checkpoint.
        policy: Names (fixed:4, knapsack:4.5, random:4.5, entropy:1.5) or directories of exported policies.
        text: Text files; default: the held-out standard library.
        dials: Settings of the dial at which learned policies are run.
        sequences: Test sequences.
        device: cpu or cuda.
        mode: Lossy decoding: the widths chosen are the widths used.
        env: Episodes.
    """
    config = TrainConfig(model=model, text=text, env=env, device=device, test_sequences=sequences, num_dials=dials)
    check_config(config)
    if not policy:
        raise InputError("--policy names no policy; name one or more, e.g. fixed:4 knapsack:4.5")
    for name in policy:
        check_policy_name(name)
    exported = [Path(name) for name in policy if Path(name).is_dir()]
    for directory in exported:
        load_policy(directory)  # a damaged one should not be found out after minutes
    carried = Profile.load(exported[0] / PROFILE_FILE) if exported else None
    prepared = prepare(config, None, carried)
    rows = compete(prepared, _contestants(prepared, policy, dials), sequences)
    print(console_table(rows))
    print_result({"rows": [public_dict(row) for row in rows]})


def _contestants(prepared: Prepared, names: tuple[str, ...], dials: int) -> list[Contestant]:
    context = policy_context(prepared)
    found = []
    for name in names:
        if Path(name).is_dir():
            learned = load_policy(Path(name), model_fingerprint=prepared.model.fingerprint)
            found += [Contestant(learned.name, learned, dial) for dial in prepared.dials(dials).tolist()]
        else:
            found.append(Contestant(name.split(":")[0], make_policy(name, context)))
    return found


def export(run: Positional[Path], out: Positional[Path]) -> None:
    """Writes the policy of a finished run as an artefact that needs torch alone.

    Args:
        run: Directory of a run of train.py.
        out: New directory.
    """
    load_run(run)
    policy = export_run(run, out)
    print_result(
        {
            "out": str(out),
            "bytes": sum(file.stat().st_size for file in out.iterdir()),
            "units": list(policy.card.unit_names),
            "dial": [asdict(point) for point in policy.card.dial],
        }
    )


def generate(
    model: Positional[str],
    policy: str,
    prompt: str,
    max_new_tokens: int = 64,
    speed: float | None = None,
    kl_weight: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    show_bits: bool = False,
) -> None:
    """Continues a prompt with the widths that a policy chooses, token by token.

    Args:
        model: Hugging Face directory or hub name, or a nested checkpoint; `default` is the embedded model.
        policy: Directory of an exported policy.
        prompt: Text to continue.
        max_new_tokens: Tokens at most.
        speed: Modelled speedup to aim for, from the policy's own table; default: its middle setting.
        kl_weight: The dial itself, instead of a speed.
        temperature: 0 is greedy.
        seed: Of the sampling.
        show_bits: Show every token's mean width: as its background colour on a terminal, else in a line below the text.
    """
    if not Path(policy).is_dir():
        raise InputError(f"{policy} is not the directory of an exported policy; export one with `fq export RUN OUT`")
    dial = _dial_setting(load_policy(Path(policy)), speed, kl_weight)
    carried = Profile.load(Path(policy) / PROFILE_FILE)
    path = str(embedded_model_path()) if model == "default" else model
    nested = load_model(path, QuantizationConfig(), progress=lambda items: track(items, "quantising"))
    controller = load_policy(Path(policy), model_fingerprint=nested.fingerprint)
    colours = show_bits and has_colours(sys.stdout)
    ids = nested.tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"][0]
    text = StreamedText(nested.tokenizer, ids.tolist())
    began = time.perf_counter()
    tokens = []
    for token in generate_tokens(
        nested,
        controller,
        carried,
        ids,
        max_new_tokens=max_new_tokens,
        kl_weight=dial,
        temperature=temperature,
        seed=seed,
    ):
        tokens.append(token)
        piece = text.add(token.token_id)
        if colours:
            piece = coloured(piece, float(nested.mean_bit_width(token.bit_widths)), nested.bit_widths)
        print(piece, end="", flush=True)
    print()
    mean = nested.mean_bit_width(torch.stack([token.bit_widths for token in tokens]))
    if show_bits:
        print(legend(nested.bit_widths) if colours else numbers(mean.tolist()))
    print_result(
        {
            "num_tokens": len(tokens),
            "seconds": time.perf_counter() - began,
            "mean_bit_width": float(mean.mean()),
            "kl_weight": dial,
        }
    )


def _dial_setting(policy: LearnedPolicy, speed: float | None, kl_weight: float | None) -> float:
    """The KL weight to run a policy at: as given, for the speed asked for, or its middle setting."""
    if kl_weight is not None:
        if speed is not None:
            raise InputError(f"--speed {speed:g} and --kl-weight {kl_weight:g} set the same dial; give one of them")
        check_kl_weight(kl_weight)
        return kl_weight
    if speed is not None:
        return policy.kl_weight_for_speed(speed)
    points = policy.card.dial
    if not points:
        raise InputError(f"policy {policy.name!r} has no table of its dial to choose a setting from; give --kl-weight")
    return points[len(points) // 2].kl_weight


def bench(
    what: Positional[Literal["env"]],
    model: str | None = None,
    text: tuple[str, ...] = (),
    num_envs: int = 128,
    rounds: int = 5,
    json: Path | None = None,
) -> None:
    """Measures speed on this machine.

    Args:
        what: env: steps per second of the batched environment with reference KL.
        model: Default: the embedded model.
        text: Text files.
        num_envs: Rows of the batch.
        rounds: Rollouts timed.
        json: Also write the row to this file.
    """
    for name, value in (("num_envs", num_envs), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1; give --{name.replace('_', '-')} 1 or more")
    prepared = prepare(TrainConfig(model=model, text=text), None)
    say(f"timing {rounds} rollouts of {num_envs} episodes")
    row = bench_env(prepared, num_envs=num_envs, rounds=rounds)
    if json is not None:
        write_json(json, row)
    print_result(row)


def _train(arguments: Annotated[TrainArguments, tyro.conf.arg(name="")] = TrainArguments(TrainConfig())) -> None:  # noqa: B008
    """Trains a precision controller with PPO; the same as train.py.

    Args:
        arguments: What to train.
    """
    train(arguments)


COMMANDS: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "profile": profile,
    "train": _train,
    "evaluate": evaluate,
    "export": export,
    "generate": generate,
    "bench": bench,
}


def main() -> int:
    """The command `fq`."""
    return command(lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="fq", description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
