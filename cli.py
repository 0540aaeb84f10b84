"""The `fq` command: quantize, profile, train, evaluate, export, generate and bench.

Each subcommand is a function whose arguments are its options; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see train.py

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from transformers import PreTrainedTokenizerBase
from tyro.conf import Positional

from flexquant_rl.agents.command import FAILURE, command, print_result
from flexquant_rl.agents.config import TrainConfig, check_config, check_device
from flexquant_rl.agents.evaluation.contest import Contestant, compete, contestant, policy_context
from flexquant_rl.agents.evaluation.report import console_table
from flexquant_rl.agents.evaluation.rows import public_dict
from flexquant_rl.agents.export import export_run, load_exported, load_exported_together
from flexquant_rl.agents.policies.families import PPO, parse_policy
from flexquant_rl.agents.policies.unbound import UnboundPolicy
from flexquant_rl.agents.preparation import Prepared, prepare
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.bench_env import EnvBench, bench_env
from flexquant_rl.agents.runs.run import load_run
from flexquant_rl.engine.benches.decode import DecodeBench, bench_decode
from flexquant_rl.engine.benches.gemv import GemvBench, bench_gemv
from flexquant_rl.engine.benches.harness import BenchRefusedError, Row, run_bench, run_tests
from flexquant_rl.engine.benches.harness import table as bench_table
from flexquant_rl.engine.benches.policy import PolicyBench, bench_policy
from flexquant_rl.engine.bits_display import coloured, has_colours, legend, numbers
from flexquant_rl.engine.checkpoint import is_nested_checkpoint, load_model, save_checkpoint
from flexquant_rl.engine.control.cost import measured_cost, roofline_cost
from flexquant_rl.engine.control.policy import PROFILE_FILE, LearnedPolicy, load_policy
from flexquant_rl.engine.control.profile import profile_model, reference_name
from flexquant_rl.engine.control.request import GeneratedToken
from flexquant_rl.engine.control.step_timer import MAX_PAIRS, StepTimer
from flexquant_rl.engine.decoding.choice import DecoderName, check_num_threads, open_session
from flexquant_rl.engine.embedded import DEFAULT_MODEL, resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import check_new_directory
from flexquant_rl.engine.model import NestedCausalLM, load_causal_lm, max_context, nest
from flexquant_rl.engine.quantisation.perplexity import perplexity_by_width
from flexquant_rl.engine.quantisation.quantize import QuantizationConfig
from flexquant_rl.engine.serving import encode
from flexquant_rl.engine.serving import generate as generate_tokens
from flexquant_rl.fq_env.config import EnvConfig, check_kl_weight
from flexquant_rl.fq_env.prompts import cut_windows, file_documents, load_windows, spread
from flexquant_rl.fq_env.stdlib_text import stdlib_text
from flexquant_rl.train import TrainArguments, train

# Tokens of a calibration window, and windows at most: 16,384 tokens are 23 for each input of the embedded model's
# widest linear.
_CALIBRATION_WINDOW, _CALIBRATION_WINDOWS = 256, 64
_TEXT_WINDOWS = 32
_PROFILE_WINDOWS = 12


def quantize(
    source: Positional[str],
    out: Positional[Path],
    method: Literal["rtn", "gptq"] | None = None,
    group_size: int = QuantizationConfig.group_size,
    bit_widths: tuple[int, ...] = QuantizationConfig.bit_widths,
    unit: Literal["layer", "half"] = QuantizationConfig.unit,
    quantize_head: bool = QuantizationConfig.quantize_head,
    calibration: tuple[Path, ...] = (),
    text: tuple[Path, ...] = (),
) -> None:
    """Nests a model's weights and writes a checkpoint.

    Args:
        source: Hugging Face directory or hub name; `default` is the embedded model.
        out: New directory.
        method: rtn rounds to nearest, gptq fits codes to calibration text; default: gptq where there is some, else rtn.
        group_size: Consecutive inputs that share a scale and an offset: 32, 64 or 128.
        bit_widths: Widths that get their own fitted scale and offset, ascending, the last is 8.
        unit: What gets one width of its own: a decoder layer, or its attention and MLP separately.
        quantize_head: Whether the output head is stored nested and is one more unit.
        calibration: Text files, whose training split the weights are fitted to; rtn then refits scales and offsets. For
            the embedded model gptq reads held-out standard library where no file is named.
        text: Measures perplexity by width on the test split of these files.
    """
    check_new_directory(out)
    chosen = method or ("gptq" if calibration else "rtn")
    config = QuantizationConfig(chosen, group_size, bit_widths, unit, quantize_head)
    config.validate()
    path = resolve_model(source)
    if is_nested_checkpoint(Path(path)):
        raise InputError(f"{source} is a nested checkpoint already; give the model that it was made from")
    calibrated = bool(calibration) or chosen == "gptq"
    if calibrated and not calibration and Path(path).resolve() != Path(resolve_model(DEFAULT_MODEL)).resolve():
        raise InputError("--method gptq fits the weights to text; give it some with --calibration FILE")
    began = time.perf_counter()
    hf_model, tokenizer = load_causal_lm(path)
    tokens = min(_CALIBRATION_WINDOW, max_context(hf_model))
    model = nest(
        hf_model,
        tokenizer,
        config,
        calibration=_calibration_windows(tokenizer, calibration, tokens) if calibrated else None,
        progress=lambda items: track(items, "quantising"),
    )
    windows = _text_windows(model, text) if text else None  # bad text must not leave a checkpoint behind
    result: dict[str, object] = {"out": str(out), "bytes": save_checkpoint(model, out)}
    result["seconds"] = time.perf_counter() - began
    if model.calibration is not None:
        result["calibration_tokens"] = model.calibration.num_tokens
    if windows is not None:
        result["perplexity_by_width"] = perplexity_by_width(model, windows)
    print_result(result)


def _calibration_windows(tokenizer: PreTrainedTokenizerBase, files: tuple[Path, ...], tokens: int) -> torch.Tensor:
    """Windows of the training split of some text, `[n, tokens]` int64; no file stands for the standard library."""
    for path in files:
        if not path.is_file():
            raise InputError(f"{path} is not a file; --calibration takes text files")
    documents = file_documents(files)["train"] if files else list(stdlib_text("policy-train").values())
    windows = cut_windows(tokenizer, documents, tokens, tokens - 1)
    if not len(windows):
        raise InputError(
            f"the calibration text's training split ({sum(map(len, documents))} characters) holds no window of "
            f"{tokens} tokens; give more text with --calibration FILE"
        )
    return spread(windows, _CALIBRATION_WINDOWS)


def _text_windows(model: NestedCausalLM, text: tuple[Path, ...], tokens: int = 129) -> torch.Tensor:
    """Windows of the test split of some text, `[n, tokens]` int64."""
    return spread(load_windows(model.tokenizer, min(tokens, model.max_context), text).test, _TEXT_WINDOWS)


def profile(
    model: Positional[str],
    text: tuple[Path, ...] = (),
    out: Path | None = None,
    source: Literal["measured", "roofline"] = "measured",
    steps: int = 300,
    threads: int | None = None,
) -> None:
    """Measures what every unit's width costs in time on this device and in output KL.

    Args:
        model: Hugging Face directory or hub name, or a nested checkpoint; `default` is the embedded model.
        text: Text files; default: the held-out standard library.
        out: Where to write; default: profile.json in the model's directory, for `default` in the current one.
        source: Time whole steps at random widths, or model them by the bytes they read.
        steps: Whole steps to time.
        threads: Threads of a timed step; default: 1 with the lean decoder, else torch's number.
    """
    home = Path() if model == DEFAULT_MODEL else Path(model)
    if out is None and not home.is_dir():
        raise InputError(f"{model} is not a directory to write {PROFILE_FILE} into; check the name, or give --out FILE")
    if threads is not None:
        if source == "roofline":
            raise InputError(
                f"--threads {threads} is for measured steps and --source roofline times none; leave it out"
            )
        check_num_threads(threads)
    target = out or home / PROFILE_FILE
    nested = load_model(resolve_model(model), QuantizationConfig(), progress=lambda items: track(items, "quantising"))
    windows = load_windows(nested.tokenizer, min(EnvConfig().window_tokens, nested.max_context + 1), text).train
    cost = roofline_cost(nested)
    if source == "measured":
        # Halfway through an episode, so that attention costs what it costs on average.
        num_held = max(1, min(windows.shape[1] // 2, nested.max_context - MAX_PAIRS))
        session = open_session(nested, max_length=num_held + MAX_PAIRS, num_threads=threads)
        session.prefill(windows[:1, :num_held])
        timer = StepTimer(session, windows[0, :1])
        cost = measured_cost(nested, timer, num_steps=steps, num_threads=threads)
    profiled = spread(windows, _PROFILE_WINDOWS)[:, :-1]
    result = profile_model(nested, profiled, cost, progress=lambda units: track(units, "profiling"))
    result.save(target)
    by_width = {str(b): float(cost.latency_ms(torch.full((nested.num_units,), b))) for b in nested.bit_widths}
    print_result(
        {
            "profile": str(target),
            "source": source,
            "decoder": cost.decoder,
            "num_threads": cost.num_threads if cost.decoder else None,
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
    profile: Path | None = None,
    threads: int | None = None,
    mode: Literal["lossy"] = "lossy",
    env: EnvConfig = EnvConfig(),  # noqa: B008
) -> None:
    """Compares policies on the test split of some text.

    Args:
        model: Hugging Face directory or hub name, or a nested checkpoint; `default` is the embedded model.
        policy: Names (fixed:4, knapsack:4.5, random:4.5, entropy:1.5), with more parameters as key=value
            (entropy:1.5,one_way=true); directories of exported policies; classes of your own, as module:Class or
            module:Class:key=value,..., found from the current directory (docs/extending.md).
        text: Text files; default: the held-out standard library.
        dials: Settings of the dial at which learned policies are run.
        sequences: Test sequences.
        device: cpu or cuda.
        profile: profile.json that `fq profile` wrote for this model, with the latencies to compare by; default: those
            that exported policies carry, else modelled by the bytes read.
        threads: Threads of the timed steps, and of those that a measured profile holds; default: 1 with the lean
            decoder, else torch's number.
        mode: Lossy decoding: the widths chosen are the widths used.
        env: Episodes.
    """
    config = TrainConfig(
        model=model,
        text=text,
        env=env,
        device=device,
        profile=None if profile is None else str(profile),
        threads=threads,
        test_sequences=sequences,
        num_dials=dials,
    )
    check_config(config)
    if not policy:
        raise InputError("--policy names no policy; name one or more, e.g. fixed:4 knapsack:4.5")
    # Before the model: a wrong name or a damaged policy should not be found out after minutes.
    unbound = {name: parse_policy(name) for name in policy if not Path(name).is_dir()}
    exported = load_exported_together([Path(name) for name in policy if Path(name).is_dir()])
    if exported:
        config = replace(config, quantization=exported[0].quantization)
    prepared = prepare(config, None, exported)
    rows = compete(prepared, _contestants(prepared, policy, unbound, dials), sequences)
    print(console_table(rows))
    print_result(
        {
            "latency_source": prepared.cost.source,
            "reference": reference_name(prepared.model),
            "rows": [public_dict(row) for row in rows],
        }
    )


def _contestants(
    prepared: Prepared, names: tuple[str, ...], unbound: dict[str, UnboundPolicy], dials: int
) -> list[Contestant]:
    """Policies in the order of their names; those in directories at every setting of the dial."""
    context = policy_context(prepared)
    found = []
    for name in names:
        if name in unbound:
            found.append(contestant(unbound[name], context))
        else:
            learned = load_policy(Path(name), model_fingerprint=prepared.model.fingerprint)
            family = f"{PPO.name}:{learned.name}"  # a front of its own, whatever the directory's name
            found += [Contestant(family, learned, dial) for dial in prepared.dials(dials).tolist()]
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
    device: str = "cpu",
    decoder: DecoderName = "auto",
    threads: int | None = None,
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
        seed: Seed of the sampling.
        show_bits: Show every token's mean width: as its background colour on a terminal, else in a line below the text.
        device: cpu or cuda.
        decoder: The lean decoder (Llama, Mistral, Qwen2 and Qwen3; a native call per token on a CPU, a captured graph
            on a GPU) or Hugging Face's modules; auto: lean where it can run the model.
        threads: Threads of a step; default: 1 with the lean decoder, else torch's number. A captured graph has none.
    """
    check_device(device)
    if threads is not None:
        check_num_threads(threads)
    if not Path(policy).is_dir():
        raise InputError(f"{policy} is not the directory of an exported policy; export one with `fq export RUN OUT`")
    exported = load_exported(Path(policy))
    dial = _dial_setting(exported.policy, speed, kl_weight)
    nested = load_model(resolve_model(model), exported.quantization, progress=lambda items: track(items, "quantising"))
    exported.card.check_model(nested.fingerprint, exported.directory)
    nested.to(device)
    began = time.perf_counter()
    stream = generate_tokens(
        nested,
        exported.policy,
        exported.profile,
        encode(nested, prompt),
        max_new_tokens=max_new_tokens,
        kl_weight=dial,
        temperature=temperature,
        seed=seed,
        decoder=decoder,
        num_threads=threads,
    )
    mean = _print_text(nested, stream, show_bits)
    print_result(
        {
            "num_tokens": len(mean),
            "seconds": time.perf_counter() - began,
            "mean_bit_width": float(mean.mean()),
            "kl_weight": dial,
        }
    )


def _print_text(model: NestedCausalLM, stream: Iterable[GeneratedToken], show_bits: bool) -> torch.Tensor:
    """Prints tokens as they come, on request with their widths; returns the mean width of each, `[n]` float32."""
    colours = show_bits and has_colours(sys.stdout)
    means = []
    for token in stream:
        means.append(model.mean_bit_width(token.bit_widths))
        piece = coloured(token.text, float(means[-1]), model.bit_widths) if colours else token.text
        print(piece, end="", flush=True)
    print()
    mean = torch.stack(means)
    if show_bits:
        print(legend(model.bit_widths) if colours else numbers(mean.tolist()))
    return mean


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
    what: Annotated[
        Annotated[GemvBench, tyro.conf.subcommand("gemv", prefix_name=False)]
        | Annotated[DecodeBench, tyro.conf.subcommand("decode", prefix_name=False)]
        | Annotated[PolicyBench, tyro.conf.subcommand("policy", prefix_name=False)]
        | Annotated[EnvBench, tyro.conf.subcommand("env", prefix_name=False)],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Measures speed on this machine. In a checkout the tests of what is timed run first and must pass.

    Args:
        what: What to time.
    """
    what.validate()

    def rounds(items: Iterable[int]) -> Iterable[int]:
        return track(items, f"timing {what.name}")

    def measure() -> list[Row]:
        if isinstance(what, GemvBench):
            return bench_gemv(what, rounds)
        if isinstance(what, DecodeBench):
            return bench_decode(what, rounds, say)
        if isinstance(what, PolicyBench):
            return bench_policy(what, rounds)
        return bench_env(what, rounds)

    try:
        result = run_bench(what.name, what.tests, measure, path=what.json, progress=say, gate=run_tests)
    except BenchRefusedError as error:  # neither bad input nor a bug that its traceback would explain
        say(f"error: {error}")
        sys.exit(FAILURE)
    print(bench_table(result["rows"]))
    print_result(result)


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
