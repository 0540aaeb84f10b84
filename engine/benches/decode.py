"""Times a decoded token: our lean decoder at every width beside Hugging Face's `generate` and llama.cpp.

All providers decode greedily from the same random Llama and the same prompt. A token's time is that of one step and the
choice of the next token; the prompt's pass is not in it.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from flexquant_rl.engine.benches.ceilings import memory_ring, read_provider
from flexquant_rl.engine.benches.clocks import HostClock, host_clock
from flexquant_rl.engine.benches.harness import (
    Provider,
    Row,
    Track,
    Turn,
    add_ratios,
    add_tokens_per_s,
    interleave,
    rows,
)
from flexquant_rl.engine.benches.llama_cpp import GGUF_BITS, LlamaCppSession, has_llama_cpp, write_gguf
from flexquant_rl.engine.benches.options import DecodeBench
from flexquant_rl.engine.control.controller import StaticController
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.decoding.decoder import Decoder
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest

_LEAN = "lean"
_READ_RING_BYTES = 1 << 28  # larger than caches; small enough to go round within a turn, as a model's weights do
_READS_PER_TURN = 64


@dataclass(frozen=True)
class _Task:
    """What every provider does.

    Attributes:
        config: What to time.
        prompt: `[1, T]` token ids that decoding starts after.
        clock: One for all rows, or they could not be compared.
    """

    config: DecodeBench
    prompt: Tensor
    clock: HostClock


@dataclass(frozen=True)
class _Group:
    """What is timed with one number of threads: the plain read, our own decoder, and the peers."""

    num_threads: int
    read: Provider
    ours: list[Provider]
    peers: list[Provider]

    @property
    def providers(self) -> list[Provider]:
        return [self.read, *self.ours, *self.peers]


def bench_decode(
    config: DecodeBench, track: Track = iter, progress: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Times all providers.

    Args:
        config: What to time.
        track: Wraps the loop over rounds.
        progress: Takes one line about what happens.

    Returns:
        One row per provider and number of threads.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(max(config.threads))
    clock = host_clock(max(config.threads))
    hf_model = random_llama(config)
    task = _Task(config, torch.randint(config.vocab, (1, config.prompt_tokens)), clock)
    progress("nesting the weights")
    nested = nest(copy.deepcopy(hf_model), no_tokenizer(), config.quantization, keep_reference=False)
    with ExitStack() as stack, torch.inference_mode():
        peers = _peers(task, hf_model, stack, progress) if config.peers else {}
        ring = memory_ring(_READ_RING_BYTES)
        groups = [
            _Group(
                num_threads,
                read_provider(clock, ring, num_threads, _READS_PER_TURN),
                _lean_providers(task, nested, num_threads),
                peers.get(num_threads, []),
            )
            for num_threads in config.threads
        ]
        for group in groups:
            for provider in group.providers:
                provider.turn = _with_torch_threads(provider.turn, group.num_threads)
        interleave([provider for group in groups for provider in group.providers], config.rounds, track)
    common = {
        "op": "decode",
        "model": {"hidden": config.hidden_size, "layers": config.num_layers, "heads": config.num_heads}
        | {"ffn": config.ffn_size, "vocab": config.vocab},
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "clock": clock.name,
        "seed": config.seed,
    }
    found = []
    for group in groups:
        own = rows(group.providers, common | {"num_threads": group.num_threads})
        add_tokens_per_s(own)
        add_ratios(own, _LEAN, [peer.name for peer in group.peers])
        found += own
    return found


def _with_torch_threads(turn: Turn, num_threads: int) -> Turn:
    """A turn with torch's number of threads, which belongs to the whole process, set before it."""

    def with_threads() -> Iterable[float]:
        torch.set_num_threads(num_threads)
        return turn()

    return with_threads


def random_llama(config: DecodeBench) -> LlamaForCausalLM:
    """A random float32 Llama of the asked-for shape, ready to decode."""
    llama = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        vocab_size=config.vocab,
        max_position_embeddings=_max_length(config),
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,  # every provider decodes all its tokens
        dtype="float32",
    )
    hf_model: LlamaForCausalLM = LlamaForCausalLM(llama).float()
    hf_model.eval().requires_grad_(False)
    return hf_model


def _max_length(config: DecodeBench) -> int:
    return config.prompt_tokens + config.new_tokens


def no_tokenizer() -> PreTrainedTokenizerFast:
    """Random token ids need none, but a nested model carries one."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def _lean_providers(task: _Task, model: NestedCausalLM, num_threads: int) -> list[Provider]:
    decoder = LeanDecoder(model, max_length=_max_length(task.config), num_threads=num_threads)
    return [_lean_provider(task, model, LeanSession(decoder), width) for width in task.config.bit_widths]


def _lean_provider(task: _Task, model: NestedCausalLM, session: Decoder, width: int) -> Provider:
    widths = torch.full((model.num_units,), width)
    runner = PolicyRunner(session, StaticController(StaticAllocation(f"fixed:{width}", widths)))

    def turn() -> list[float]:
        runner.start(task.prompt, torch.ones(1))
        return [task.clock.seconds(runner.step) for _ in range(task.config.new_tokens)]

    num_bytes = sum(model.weight_bytes(unit, width) for unit in range(model.num_units))
    return Provider(_LEAN, turn, num_bytes, {"bit_width": width})


class _TokenTimes(BaseStreamer):
    """Notes when `generate` hands over each token."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.moments: list[float] = []

    def put(self, value: Tensor) -> None:
        self.moments.append(self._now())

    def end(self) -> None:
        pass


def _peers(
    task: _Task, hf_model: LlamaForCausalLM, stack: ExitStack, progress: Callable[[str], None]
) -> dict[int, list[Provider]]:
    """Hugging Face in two dtypes and, where it is installed, llama.cpp, by number of threads."""
    in_bf16: Any = copy.deepcopy(hf_model)
    hf_models = (hf_model, in_bf16.to(torch.bfloat16))
    peers = {n: [_hf_provider(task, model) for model in hf_models] for n in task.config.threads}
    if not has_llama_cpp():
        progress("llama.cpp is not installed and left out; pip install 'flexquant-rl[bench]' adds it")
        return peers
    progress("writing the same weights as GGUF")
    for num_threads, provider in _llama_cpp_providers(task, hf_model, stack):
        peers[num_threads].append(provider)
    return peers


def _hf_provider(task: _Task, hf_model: LlamaForCausalLM) -> Provider:
    model: Any = hf_model
    mask = torch.ones_like(task.prompt)

    def turn() -> list[float]:
        streamer = _TokenTimes(task.clock.now)
        options = {"max_new_tokens": task.config.new_tokens, "do_sample": False, "streamer": streamer}
        model.generate(task.prompt, attention_mask=mask, **options)
        tokens = streamer.moments[1:]  # the first moment is the prompt's, the first token comes from the prompt's pass
        return [later - earlier for earlier, later in itertools.pairwise(tokens)]

    bits = 32 if hf_model.dtype == torch.float32 else 16
    num_bytes = _num_weights(hf_model) * bits // 8
    return Provider(f"hf_generate_{'fp32' if bits == 32 else 'bf16'}", turn, num_bytes, {"bit_width": bits})


def _llama_cpp_providers(task: _Task, hf_model: LlamaForCausalLM, stack: ExitStack) -> Iterator[tuple[int, Provider]]:
    """Numbers of threads with a provider each; a file serves all of them."""
    config = task.config
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for gguf_type, bits in GGUF_BITS.items():
        path = directory / f"{gguf_type}.gguf"
        write_gguf(hf_model, path, gguf_type)
        for num_threads in config.threads:
            session = LlamaCppSession(path, max_length=_max_length(config), num_threads=num_threads)
            stack.callback(session.close)
            name, num_bytes = f"llama_cpp_{gguf_type.lower()}", int(_num_weights(hf_model) * bits / 8)
            yield num_threads, Provider(name, _llama_cpp_turn(task, session), num_bytes, {"bit_width": bits})


def _llama_cpp_turn(task: _Task, session: LlamaCppSession) -> Turn:
    prompt = task.prompt[0].tolist()

    def turn() -> list[float]:
        token = int(session.prefill(prompt).argmax())

        def step() -> None:
            nonlocal token
            token = int(session.step(token).argmax())

        return [task.clock.seconds(step) for _ in range(task.config.new_tokens)]

    return turn


def _num_weights(hf_model: LlamaForCausalLM) -> int:
    """Weights that a step reads whole: all but the embedding, of which it reads a row."""
    linears = (module for module in hf_model.modules() if isinstance(module, torch.nn.Linear))
    return sum(linear.weight.numel() for linear in linears)
