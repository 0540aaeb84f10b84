"""What other libraries' formats lose on the text of an analysis, what they read, and how long a step takes in them.

llama.cpp quantises a file of the unquantised weights by its own rules; the values of its file are put into the model,
which reads the text in float32, as every strategy is judged. HQQ puts modules of its own into the model. Times are of
each library's own decoding.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from flexquant_rl.agents.analysis.measure import Format, PeerTurn, summary_row, tokens_rows
from flexquant_rl.agents.analysis.rows import Plan, StrategyRow, TokensRow, WindowRow
from flexquant_rl.agents.analysis.strategies import HQQ, LLAMA_CPP, PEER_GROUPS, PEER_TYPES, PEER_WIDTHS
from flexquant_rl.agents.progress import say, track
from flexquant_rl.engine.benches.gguf_values import quantise_gguf, read_values
from flexquant_rl.engine.benches.llama_cpp import LlamaCppSession, check_writable, has_llama_cpp, write_gguf
from flexquant_rl.engine.context_length import max_context
from flexquant_rl.engine.control.allocation_kl import TextFacts
from flexquant_rl.engine.control.cost import clock_ms
from flexquant_rl.engine.control.output_kl import ReferenceDistribution
from flexquant_rl.engine.control.step_timer import MAX_PAIRS, ROUND_STEPS
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import make_units
from flexquant_rl.engine.quantisation.config import QuantizationConfig

_BLOCK = 32
"""Weights that share a scale in llama.cpp's formats; in a k-quant it is 32 of 256."""
_BITS: dict[str, int] = dict(PEER_TYPES)
_CPU = torch.device("cpu")


def has_hqq() -> bool:
    """Whether hqq is installed."""
    return importlib.util.find_spec("hqq") is not None


def check_peers() -> None:
    """Raises InputError unless one of the libraries is installed."""
    if not has_llama_cpp() and not has_hqq():
        raise InputError(
            "--peers measures llama.cpp and HQQ, and neither is installed; install the extra: "
            'pip install "flexquant-rl[bench]"'
        )


class Peers:
    """The formats of other libraries that can be measured here, of one model.

    Args:
        path: Directory or name of the model.
        plan: Sizes of the analysis.
        windows: `[n, first + T + 1]` int64.
    """

    def __init__(self, path: str, plan: Plan, windows: Tensor) -> None:
        self._plan = plan
        self._windows = windows
        self._model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self._model, self.tokenizer = load_causal_lm(path)
        self._linears = [name for unit in make_units(self._model, QuantizationConfig()) for name in unit.linears]
        self._num_weights = plan.num_weights
        self._has_llama_cpp = self._can_write()
        self._has_hqq = self._can_replace()

    def _can_write(self) -> bool:
        if not has_llama_cpp():
            say("llama.cpp: left out (it is not installed; pip install 'flexquant-rl[bench]' adds it)")
            return False
        try:
            check_writable(self._model, "Q8_0")
        except InputError as error:
            say(f"llama.cpp: left out ({error})")
            return False
        return True

    def _can_replace(self) -> bool:
        if not has_hqq():
            say("HQQ: left out (it is not installed; pip install 'flexquant-rl[bench]' adds it)")
            return False
        modules = [self._model.get_submodule(name) for name in self._linears]
        # Its groups go on from one row to the next; only the last one of a matrix must be whole.
        fit = all(isinstance(one, nn.Linear) and not one.weight.numel() % max(PEER_GROUPS) for one in modules)
        if not fit:
            say(f"HQQ: left out (a matrix is no linear, or its weights are not whole groups of {max(PEER_GROUPS)})")
        return fit

    def names(self) -> list[str]:
        """The strategies that their rows have."""
        found = [f"{LLAMA_CPP}:{type_}" for type_, _ in PEER_TYPES] if self._has_llama_cpp else []
        return found + ([f"{HQQ}:g{size}" for size in PEER_GROUPS] if self._has_hqq else [])

    def rows(self, name: str, text: Sequence[WindowRow]) -> tuple[list[StrategyRow], list[TokensRow]]:
        """What one of them loses on all the text.

        Args:
            name: One of `names`.
            text: The reference's rows of the same windows.
        """
        rows, tokens = [], []
        for stored, model in self._quantised(name):
            facts = model_facts(self._model, model, self._windows, first=self._plan.first, label=name)
            rows.append(summary_row(stored, facts, text))
            tokens += tokens_rows(self.tokenizer, name, stored.bit_width, facts)
        return rows, tokens

    def _quantised(self, name: str) -> Iterator[tuple[Format, PreTrainedModel]]:
        """A model of each width that a name stands for."""
        library, _, form = name.partition(":")
        if library == LLAMA_CPP:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as directory:
                file = self._gguf_file(Path(directory), form)
                seconds = time.perf_counter() - began
                model = copy.deepcopy(self._model)
                num_bytes = read_values(file, model)
            total = sum(num_bytes[linear] for linear in self._linears)
            yield Format(name, _BLOCK, _BITS[form], total / self._num_weights, seconds), model
            return
        for bit_width in PEER_WIDTHS:
            began = time.perf_counter()
            model, total = with_hqq(self._model, self._linears, bit_width, int(form.removeprefix("g")))
            seconds = time.perf_counter() - began
            yield Format(name, int(form[1:]), bit_width, total / self._num_weights, seconds), model

    def _gguf_file(self, directory: Path, type_: Any) -> Path:
        """A file of this type, quantised by llama.cpp."""
        source, file = directory / "f16.gguf", directory / f"{type_}.gguf"
        write_gguf(self._model, source, "F16")
        quantise_gguf(source, file, type_)
        source.unlink()
        return file

    @contextmanager
    def turns(self, name: str, num_threads: int) -> Iterator[list[PeerTurn]]:
        """Steps of one of them halfway through the first window, for `time_rows`; of each width that it stands for."""
        num_held = max(1, min(self._windows.shape[1] // 2, max_context(self._model) - MAX_PAIRS))
        prompt, token_id = self._windows[0, :num_held].tolist(), int(self._windows[0, 0])
        library, _, form = name.partition(":")
        if library == LLAMA_CPP:
            with tempfile.TemporaryDirectory() as directory:
                file = self._gguf_file(Path(directory), form)
                session = LlamaCppSession(file, max_length=num_held + MAX_PAIRS, num_threads=num_threads)
                with closing(session):
                    session.prefill(prompt)
                    yield [PeerTurn(name, _BLOCK, _BITS[form], _llama_cpp_turn(session, num_held, token_id))]
            return
        size, found = int(form.removeprefix("g")), []
        for width in PEER_WIDTHS:
            model, _ = with_hqq(self._model, self._linears, width, size)
            found.append(PeerTurn(name, size, width, _module_turn(model, prompt, token_id, num_threads)))
        yield found


def model_facts(
    reference: PreTrainedModel, model: PreTrainedModel, windows: Tensor, *, first: int, label: str
) -> TextFacts:
    """What a model says at every token of a text, against a reference; arguments as for `allocation_facts`."""
    columns = []
    for window in track(windows, f"{label}: text"):
        with torch.inference_mode():
            base, own = (_call(one, window[None, :-1]).logits[0, first:].float() for one in (reference, model))
            distribution, following = ReferenceDistribution(base), window[first + 1 :, None]
            nll = own.logsumexp(-1) - own.gather(-1, following)[:, 0]
            top1 = own.argmax(-1)
            columns.append((distribution.kl_nats(own), nll, distribution.top1 == top1, top1))
    return TextFacts(*(torch.stack(column) for column in zip(*columns, strict=True)))


def with_hqq(
    hf_model: PreTrainedModel, linears: Sequence[str], bit_width: int, group_size: int
) -> tuple[PreTrainedModel, int]:
    """A copy of a model with some of its linears in HQQ's format; all other tensors are shared.

    HQQ's own settings, computing in float32, which is the fastest on a CPU. Scales and zero points are rounded to
    float16, as the library stores them by default.

    Returns:
        The copy, and the bytes of these linears: packed codes, scales and zero points.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = copy.deepcopy(hf_model, {id(parameter): parameter for parameter in hf_model.parameters()})
    num_bytes = 0
    for name in track(linears, f"{HQQ}: {bit_width} bits in groups of {group_size}"):
        config = BaseQuantizeConfig(nbits=bit_width, group_size=group_size)
        quantised = HQQLinear(
            _linear(hf_model, name), config, compute_dtype=torch.float32, device="cpu", del_orig=False
        )
        num_bytes += int(quantised.W_q.nbytes)
        for key in ("scale", "zero"):
            quantised.meta[key] = quantised.meta[key].half().float()
            num_bytes += 2 * int(quantised.meta[key].numel())
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, quantised)
    return model, num_bytes


def _linear(hf_model: PreTrainedModel, name: str) -> nn.Linear:
    module = hf_model.get_submodule(name)
    assert isinstance(module, nn.Linear), "peers are measured of models made of plain linears"
    return module


def _call(hf_model: PreTrainedModel, token_ids: Tensor, **options: Any) -> Any:
    return hf_model(input_ids=token_ids, **({"use_cache": False} | options))


def _llama_cpp_turn(session: LlamaCppSession, num_held: int, token_id: int) -> Callable[[], float]:
    def turn() -> float:
        times = [clock_ms(lambda: session.step(token_id), _CPU) for _ in range(ROUND_STEPS)]
        session.truncate(num_held)
        return statistics.median(times)

    return turn


def _module_turn(
    hf_model: PreTrainedModel, prompt: Sequence[int], token_id: int, num_threads: int
) -> Callable[[], float]:
    """A step of Hugging Face's modules, one in a turn: they take long."""
    cache = DynamicCache(config=hf_model.config)
    with torch.inference_mode():
        _call(hf_model, torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def turn() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            with torch.inference_mode():
                return clock_ms(
                    lambda: _call(hf_model, torch.tensor([[token_id]]), past_key_values=cache, use_cache=True), _CPU
                )
        finally:
            torch.set_num_threads(before)
            cache.crop(-1)  # a negative number of tokens to forget

    return turn
