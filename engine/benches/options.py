"""The options of `fq bench`, benchmark by benchmark. Imports nothing that is slow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from flexquant_rl.engine.decoding.options import check_num_threads
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.config import QuantizationConfig


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of every benchmark."""

    rounds: int = 16
    """Turns of every provider; in every second round their order is reversed."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the result to this file."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain."""
        self._check_positive("rounds")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1; give --{name.replace('_', '-')} 1 or more")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(BenchOptions):
    """A benchmark of `fq bench` with its options."""

    name: ClassVar[str]
    """As in `fq bench NAME`."""
    tests: ClassVar[tuple[str, ...]]
    """Test files that must pass before a number counts, relative to the checkout."""


@dataclass(frozen=True, kw_only=True)
class GemvBench(BenchConfig):
    """The CPU product over bitplanes, beside torch's own products."""

    name: ClassVar[str] = "gemv"
    tests: ClassVar[tuple[str, ...]] = ("tests/kernels/test_native_gemv.py",)

    shape: tuple[int, int] = (4096, 4096)
    """Outputs and inputs; inputs are a multiple of 128."""
    num_tokens: int = 1
    """Rows of activations, 1 to 16."""
    bit_widths: tuple[int, ...] = (3, 4, 5, 6, 8)
    """Widths to time."""
    group_size: Literal[32, 64, 128] = 128
    """Inputs that share scale and offset."""
    mode: Literal["int8", "float32"] = "int8"
    """Activations rounded to int8 or kept."""
    threads: int = 1
    """Threads of every provider."""
    ring_mb: int = 1100
    """Distinct weights per provider, MiB; they should be larger than the cache."""
    peers: bool = True
    """Time torch's products too."""
    seed: int = 0
    """Seed of weights and activations."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain or there is no native library."""
        # Here, not above: torch takes seconds, and a command's --help reads this file.
        from flexquant_rl.kernels.bitplane import INPUT_ALIGNMENT
        from flexquant_rl.kernels.native import MAX_TOKENS

        super().validate()
        self._check_positive("ring_mb")
        check_num_threads(self.threads)
        num_outputs, num_inputs = self.shape
        if num_outputs < 1 or num_inputs < 1 or num_inputs % INPUT_ALIGNMENT:
            raise InputError(
                f"shape={num_outputs} {num_inputs} must be positive, inputs a multiple of {INPUT_ALIGNMENT}; "
                "give e.g. --shape 4096 4096"
            )
        if not 1 <= self.num_tokens <= MAX_TOKENS:
            raise InputError(f"num_tokens={self.num_tokens} must be within 1..{MAX_TOKENS}; give --num-tokens 1")
        if not self.bit_widths or not all(1 <= width <= 8 for width in self.bit_widths):
            raise InputError(f"bit_widths={self.bit_widths} must be within 1..8; give e.g. --bit-widths 3 4 8")
        _check_native()


@dataclass(frozen=True, kw_only=True)
class DecodeBench(BenchConfig):
    """A decoded token of a random Llama, beside Hugging Face generate and llama.cpp."""

    name: ClassVar[str] = "decode"
    tests: ClassVar[tuple[str, ...]] = ("tests/kernels/test_native_decoder.py", "tests/engine/decoding/test_lean.py")

    rounds: int = 8
    """Turns of every provider; in every second round their order is reversed."""
    hidden_size: int = 768
    """Width of the model."""
    num_layers: int = 12
    """Decoder layers."""
    num_heads: int = 12
    """Attention heads."""
    ffn_size: int = 2048
    """Width of the MLP."""
    vocab: int = 32_000
    """Tokens of the vocabulary."""
    prompt_tokens: int = 16
    """Read before the first timed token."""
    new_tokens: int = 32
    """Timed tokens in a turn."""
    bit_widths: tuple[int, ...] = (3, 4, 5, 6, 8)
    """Widths to time, each for the whole model."""
    threads: tuple[int, ...] = (1,)
    """Threads of every provider; with several numbers each has rows of its own, all timed in the same run."""
    peers: bool = True
    """Time Hugging Face and, where it is installed, llama.cpp too."""
    seed: int = 0
    """Seed of weights and prompt."""

    @property
    def quantization(self) -> QuantizationConfig:
        """How the random model is nested."""
        return QuantizationConfig(bit_widths=tuple(sorted({*self.bit_widths, 8})))

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain or there is no native library."""
        super().validate()
        self._check_positive("num_layers", "num_heads", "ffn_size", "vocab", "prompt_tokens", "new_tokens")
        if not self.threads or len(set(self.threads)) < len(self.threads):
            raise InputError(f"threads={self.threads} must be one or more different numbers; give e.g. --threads 1 2")
        for num_threads in self.threads:
            check_num_threads(num_threads)
        if self.hidden_size < 1 or self.hidden_size % (2 * self.num_heads):
            raise InputError(
                f"hidden_size={self.hidden_size} must be a multiple of twice the {self.num_heads} heads; "
                "give e.g. --hidden-size 768 --num-heads 12"
            )
        self.quantization.validate()
        _check_native()


@dataclass(frozen=True, kw_only=True)
class VerifyBench(DecodeBench):
    """A pass over several tokens, as drafts are verified, beside a step and llama.cpp's own batches."""

    name: ClassVar[str] = "verify"
    tests: ClassVar[tuple[str, ...]] = ("tests/kernels/test_native_gemv.py", "tests/kernels/test_native_decoder.py")

    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Hugging Face directory, hub name, nested checkpoint or .gguf file to time instead of a random Llama; `default` is
    the embedded model."""
    reference: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With a nested checkpoint: the model that it was made from, for llama.cpp."""
    num_tokens: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 16)
    """Tokens of a pass, 1 to 16 and 1 among them: what a pass costs is given in steps."""
    new_tokens: int = 4
    """Timed passes in a turn."""
    bit_widths: tuple[int, ...] = (5, 6, 8)
    """Widths to time, each for the whole model."""
    peers: bool = True
    """Time llama.cpp too, where it is installed."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain or there is no native library."""
        from flexquant_rl.kernels.native import MAX_TOKENS

        super().validate()
        if self.reference is not None and self.model is None:
            raise InputError(
                f"reference={self.reference} is what a nested checkpoint was made from, and none is timed; give "
                "--model too, or leave --reference out"
            )
        if 1 not in self.num_tokens or not all(1 <= count <= MAX_TOKENS for count in self.num_tokens):
            raise InputError(
                f"num_tokens={self.num_tokens} must be within 1..{MAX_TOKENS} and have 1 among them; "
                "give e.g. --num-tokens 1 4 8"
            )


@dataclass(frozen=True, kw_only=True)
class PolicyBench(BenchConfig):
    """The exported policy and its signals, one sequence, random weights."""

    name: ClassVar[str] = "policy"
    tests: ClassVar[tuple[str, ...]] = (
        "tests/engine/control/test_policy.py",
        "tests/engine/control/test_signals.py",
        "tests/engine/control/test_controller.py",
    )

    units: int = 32
    """Units whose width is chosen."""
    vocab: int = 32_000
    """Size of the output distribution that the signals describe."""
    seed: int = 0
    """Seed of the weights."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain."""
        super().validate()
        self._check_positive("units", "vocab")


@dataclass(frozen=True, kw_only=True)
class GptqBench(BenchConfig):
    """How gptq chooses the codes of one group of inputs, random weights."""

    name: ClassVar[str] = "gptq"
    tests: ClassVar[tuple[str, ...]] = ("tests/kernels/test_code_search.py", "tests/engine/quantisation/test_gptq.py")

    num_outputs: int = 1536
    """Rows of the weight."""
    group_size: Literal[32, 64, 128] = 128
    """Inputs that share scale and offset."""
    num_threads: int = 1
    """Threads of both providers."""
    seed: int = 0
    """Seed of the weights."""

    def validate(self) -> None:
        """Raises InputError if an option is out of its domain."""
        super().validate()
        self._check_positive("num_outputs")
        check_num_threads(self.num_threads)
        _check_native()


def _check_native() -> None:
    from flexquant_rl.kernels.native import load_library

    if load_library() is None:
        raise InputError("there are no native kernels to time; install g++ or clang++")
