"""Run-time control on the CPU: signals and policy network of one sequence in a native call each.

`engine/control/signals.py` and `engine/control/policy.py` are the reference for what is computed here. On vectors of a
few hundred numbers torch's overhead per operation is several times the work, and a policy must cost less than the step
it decides.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.kernels import signal_constants
from flexquant_rl.kernels.native import BAD_ARGUMENT, ISA_CODES, OK, STATUS_TEXTS, Isa, choose_isa, load_library
from flexquant_rl.kernels.native_structs import (
    HIDDEN_ALIGNMENT,
    MAX_HIDDEN,
    MAX_INPUTS,
    PADDED_WIDTHS,
    ControlStruct,
    PolicyNetStruct,
)


@dataclass(frozen=True)
class PolicyNetWeights:
    """A unit-shared policy network; every matrix `[outputs, inputs]` float32 as `nn.Linear` holds it.

    Shapes: G global signals, F signals of a unit, H hidden, W widths.

    Attributes:
        mean: `[G + F]`, subtracted from the signals.
        deviation: `[G + F]`, divides them.
        encode_global: `[H, G]` and `[H]`, followed by tanh.
        first: `[H, F + H]` and `[H]`, on a unit's signals and the encoded global ones, followed by tanh.
        second: `[H, H]` and `[H]`, followed by tanh.
        width_head: `[W, H]` and `[W]`.
    """

    mean: Tensor
    deviation: Tensor
    encode_global: tuple[Tensor, Tensor]
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    width_head: tuple[Tensor, Tensor]


_NO_HORIZON = 1 << 62  # no text is as long
# Decisions that memory is made for at once: behind a pass, which leaves nothing in the caches, making a tensor takes
# 13 us, more than half of what the network takes.
_SPARE = 64
_NO_NETWORK = "there is no network to choose with; pass ControlWeights.net"


@dataclass(frozen=True)
class ControlWeights:
    """What is the same at every step.

    Attributes:
        net: The network, or None for signals alone.
        bit_widths: Stored widths, ascending.
        embedding: `[vocab, E]` float32, projected input embeddings.
        unit_constants: `[U, 2 W]` float32, log sensitivities and times saved.
        depth: `[U]` float32.
        weight_share: `[U]` float32, each unit's share of the weights.
        horizon: Position from which on its signal stays the same, if there is one.
    """

    net: PolicyNetWeights | None
    bit_widths: tuple[int, ...]
    embedding: Tensor
    unit_constants: Tensor
    depth: Tensor
    weight_share: Tensor
    horizon: int | None = None


@dataclass(frozen=True, eq=False)
class ControlMark:
    """A moment of a sequence, made by `NativeControl.mark`: opaque, a few hundred bytes and the logits of then.

    It is good for any number of rollbacks, before and after other marks and rollbacks.
    """

    _owner: NativeControl
    _logits: Tensor | None
    _vectors: bytes
    _numbers: bytes


class NativeControl:
    """Signals and policy of one sequence.

    Threads may share it: a call waits for the one before it.

    Attributes:
        dim: Length of the signal vector.

    Args:
        weights: Model and network; copied where the layout must change, else referenced.
        isa: Body to use; default: `FQ_CPU_ISA`, else the fastest.

    Raises:
        ValueError: If shapes disagree or the network is too wide for the kernel.
        RuntimeError: If there is no native library.
    """

    def __init__(self, weights: ControlWeights, *, isa: Isa | None = None) -> None:
        """Lays out the weights and allocates the state."""
        library = load_library()
        if library is None:
            raise RuntimeError("the native kernels could not be built; use the torch policy instead")
        self._kept: list[Any] = []
        self._num_units = len(weights.depth)
        self._num_widths = len(weights.bit_widths)
        self._vocab_size, num_embedding_dims = weights.embedding.shape
        num_global = signal_constants.NUM_TOKEN_SIGNALS + num_embedding_dims
        self.dim = num_global + self._num_units * (2 * self._num_widths + signal_constants.NUM_STEP_SIGNALS)
        self._logits: Tensor | None = None  # that the control points to
        self._signals = torch.empty(self.dim, dtype=torch.float32)
        self._spare: list[Tensor] = []  # for decisions to come
        net = None if weights.net is None else ctypes.addressof(self._net(weights.net, num_global))
        self._control = ControlStruct(
            net=net,
            bit_widths=self._address(torch.tensor(weights.bit_widths), (self._num_widths,), torch.int64),
            embedding=self._address(weights.embedding, (self._vocab_size, num_embedding_dims)),
            unit_constants=self._address(weights.unit_constants, (self._num_units, 2 * self._num_widths)),
            depth=self._address(weights.depth, (self._num_units,)),
            weight_share=self._address(weights.weight_share, (self._num_units,)),
            vocab_size=self._vocab_size,
            num_units=self._num_units,
            num_widths=self._num_widths,
            num_embedding_dims=num_embedding_dims,
            horizon=_NO_HORIZON if weights.horizon is None else weights.horizon,
            signals=self._signals.data_ptr(),
            **self._allocate_vectors(),
        )
        self._pointer = ctypes.addressof(self._control)
        self._numbers_pointer = self._pointer + ControlStruct.entropy.offset
        self._numbers_bytes = ctypes.sizeof(ControlStruct) - ControlStruct.entropy.offset
        self._lock = threading.Lock()  # of the state
        self._isa_code = ISA_CODES[choose_isa(isa)]
        self._library = _declared(library)

    def reset(
        self, logits: Tensor, residual_update: Tensor, crest: Tensor, next_token_id: int, kl_weight: float
    ) -> None:
        """Starts a sequence after its prompt.

        Args:
            logits: `[vocab]` float32. Kept until the next update, and not to be written to.
            residual_update: `[U]` float32.
            crest: `[U]` float32.
            next_token_id: The token that the first step will read.
            kl_weight: The dial, positive.

        Raises:
            ValueError: If a shape or dtype disagrees or the token is not in the vocabulary.
        """
        self._check_output(logits, residual_update, crest)
        with self._lock:
            status = self._library.fq_control_reset(
                self._pointer,
                logits.data_ptr(),
                residual_update.data_ptr(),
                crest.data_ptr(),
                next_token_id,
                kl_weight,
                self._isa_code,
            )
            if status == OK:
                self._logits = logits
        self._raise_for(status, f"token {next_token_id} is not in the vocabulary of {self._vocab_size}")

    def update(
        self, logits: Tensor, residual_update: Tensor, crest: Tensor, bit_widths: Tensor, next_token_id: int
    ) -> None:
        """Moves on by a step that ran at `bit_widths` `[U]` int64; the rest as for `reset`."""
        self._check_output(logits, residual_update, crest)
        _check_vector("bit_widths", bit_widths, self._num_units, torch.int64)
        if self._logits is None:
            raise ValueError("no sequence has been started; call reset first")
        with self._lock:
            status = self._library.fq_control_update(
                self._pointer,
                logits.data_ptr(),
                residual_update.data_ptr(),
                crest.data_ptr(),
                bit_widths.data_ptr(),
                next_token_id,
                self._isa_code,
            )
            if status == OK:
                self._logits = logits
        self._raise_for(status, f"token {next_token_id} is not in the vocabulary of {self._vocab_size}")

    def mark(self) -> ControlMark:
        """Remembers the state of the sequence. The logits are kept, not copied.

        Returns:
            What `rollback` returns to.
        """
        with self._lock:
            return ControlMark(
                self,
                self._logits,
                ctypes.string_at(self._vectors.data_ptr(), self._vectors.nbytes),
                ctypes.string_at(self._numbers_pointer, self._numbers_bytes),
            )

    def rollback(self, mark: ControlMark) -> None:
        """Returns to a mark: everything is, bit for bit, as if what came after it had never happened.

        Args:
            mark: A mark of this control. It may be of a sequence before the last `reset`, and stays good.

        Raises:
            ValueError: If the mark is of another control.
        """
        if mark._owner is not self:
            raise ValueError("the mark is of another NativeControl; roll back with one that this control has made")
        with self._lock:
            ctypes.memmove(self._vectors.data_ptr(), mark._vectors, len(mark._vectors))
            ctypes.memmove(self._numbers_pointer, mark._numbers, len(mark._numbers))
            self._control.logits = None if mark._logits is None else mark._logits.data_ptr()
            self._logits = mark._logits

    @property
    def top1(self) -> float:
        """Probability of the likeliest token of the newest output."""
        with self._lock:
            return float(self._control.top1)

    def signals(self) -> Tensor:
        """The signal vector, `[dim]` float32."""
        signals = torch.empty(self.dim, dtype=torch.float32)
        with self._lock:
            self._library.fq_control_signals(self._pointer, signals.data_ptr())
        return signals

    def choose(self, signals: Tensor) -> Tensor:
        """The network's bit-widths for signals `[dim]`, `[U]` int64.

        Raises:
            ValueError: If there is no network, or the signals have another shape or dtype.
        """
        _check_vector("signals", signals, self.dim, torch.float32)
        bit_widths = torch.empty(self._num_units, dtype=torch.int64)
        status = self._library.fq_control_choose(
            self._pointer, signals.data_ptr(), bit_widths.data_ptr(), self._isa_code
        )
        self._raise_for(status, _NO_NETWORK)
        return bit_widths

    def decide(self) -> Tensor:
        """The network's bit-widths after the last update, `[1, U]` int64: `choose(signals())` in one call.

        Raises:
            ValueError: If there is no network.
        """
        with self._lock:
            if not self._spare:
                with torch.inference_mode(False):  # whoever asks next may be outside of it
                    self._spare = list(torch.empty(_SPARE, 1, self._num_units, dtype=torch.int64).unbind())
            bit_widths = self._spare.pop()
            status = self._library.fq_control_decide(self._pointer, bit_widths.data_ptr(), self._isa_code)
        self._raise_for(status, _NO_NETWORK)
        return bit_widths

    def _allocate_vectors(self) -> dict[str, int]:
        """Addresses of the vectors of the state, which are together so that a mark copies them at once."""
        sizes = {"recent_widths": signal_constants.RECENT_TOKENS}
        sizes |= dict.fromkeys(("residual_update", "crest", "last_widths"), self._num_units)
        self._vectors = torch.zeros(sum(sizes.values()), dtype=torch.float32)
        parts = self._vectors.split(list(sizes.values()))
        return {name: part.data_ptr() for name, part in zip(sizes, parts, strict=True)}

    def _check_output(self, logits: Tensor, residual_update: Tensor, crest: Tensor) -> None:
        _check_vector("logits", logits, self._vocab_size, torch.float32)
        _check_vector("residual_update", residual_update, self._num_units, torch.float32)
        _check_vector("crest", crest, self._num_units, torch.float32)

    def _raise_for(self, status: int, bad_argument: str) -> None:
        if status == BAD_ARGUMENT:
            raise ValueError(bad_argument)
        if status != OK:
            raise RuntimeError(f"native control failed: {STATUS_TEXTS.get(status, status)}")

    def _net(self, weights: PolicyNetWeights, num_global: int) -> PolicyNetStruct:
        hidden = len(weights.second[1])
        num_per_unit = 2 * self._num_widths + signal_constants.NUM_STEP_SIGNALS
        if (
            hidden % HIDDEN_ALIGNMENT
            or hidden > MAX_HIDDEN
            or max(num_global, num_per_unit) > MAX_INPUTS
            or self._num_widths > PADDED_WIDTHS
        ):
            raise ValueError(
                f"a network of {num_global} global and {num_per_unit} unit signals, {hidden} hidden units and "
                f"{self._num_widths} widths; the kernel takes {MAX_INPUTS}, {MAX_INPUTS}, a multiple of "
                f"{HIDDEN_ALIGNMENT} up to {MAX_HIDDEN}, and {PADDED_WIDTHS}"
            )
        first = weights.first[0].t()
        padding = (0, PADDED_WIDTHS - self._num_widths)
        width_weight = torch.nn.functional.pad(weights.width_head[0].t(), padding)
        struct = PolicyNetStruct(
            mean=self._address(weights.mean, (num_global + num_per_unit,)),
            deviation=self._address(weights.deviation, (num_global + num_per_unit,)),
            global_weight=self._address(weights.encode_global[0].t(), (num_global, hidden)),
            global_bias=self._address(weights.encode_global[1], (hidden,)),
            context_weight=self._address(first[num_per_unit:], (hidden, hidden)),
            unit_weight=self._address(first[:num_per_unit], (num_per_unit, hidden)),
            first_bias=self._address(weights.first[1], (hidden,)),
            second_weight=self._address(weights.second[0].t(), (hidden, hidden)),
            second_bias=self._address(weights.second[1], (hidden,)),
            width_weight=self._address(width_weight, (hidden, PADDED_WIDTHS)),
            width_bias=self._address(torch.nn.functional.pad(weights.width_head[1], padding), (PADDED_WIDTHS,)),
            hidden=hidden,
        )
        self._kept.append(struct)
        return struct

    def _address(self, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        """Address of a contiguous copy or the tensor itself, kept alive."""
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
            raise ValueError(
                f"a tensor is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; pass {dtype} {list(shape)} "
                "on the CPU"
            )
        plain = tensor.detach().contiguous()
        self._kept.append(plain)
        return plain.data_ptr()


def top_probability(logits: Tensor, *, isa: Isa | None = None) -> float:
    """Probability of the likeliest token: the largest value of `logits.softmax(-1)`, without the others.

    Args:
        logits: `[vocab]` float32. Native code reads what is contiguous and on the CPU; torch does the rest.
        isa: As for `NativeControl`.
    """
    function = _top_probability_function()
    if function is None or logits.dtype != torch.float32 or logits.device.type != "cpu" or not logits.is_contiguous():
        return float(logits.softmax(-1).max())
    probability = ctypes.c_float()
    status = function(logits.data_ptr(), logits.numel(), ISA_CODES[choose_isa(isa)], ctypes.byref(probability))
    if status != OK:
        raise RuntimeError(f"native top probability failed: {STATUS_TEXTS.get(status, status)}")
    return probability.value


@functools.cache
def _top_probability_function() -> Any:
    library = load_library()
    return None if library is None else _declared(library).fq_top_probability


def _check_vector(name: str, vector: Tensor, size: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless the library can read the vector by its address."""
    if vector.dtype != dtype or tuple(vector.shape) != (size,) or not vector.is_contiguous() or vector.is_cuda:
        raise ValueError(
            f"{name} is {vector.dtype} {list(vector.shape)} on {vector.device}; pass contiguous {dtype} [{size}] on "
            "the CPU"
        )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    int64, int32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    library.fq_control_reset.argtypes = (pointer, pointer, pointer, pointer, int64, ctypes.c_float, int32)
    library.fq_control_update.argtypes = (pointer, pointer, pointer, pointer, pointer, int64, int32)
    library.fq_control_signals.argtypes = (pointer, pointer)
    library.fq_control_choose.argtypes = (pointer, pointer, pointer, int32)
    library.fq_control_decide.argtypes = (pointer, pointer, int32)
    library.fq_top_probability.argtypes = (pointer, int64, int32, pointer)
    return library
