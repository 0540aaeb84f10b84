"""The choice of the next token, greedy or sampled, and its entry in the books, without the host.

Sampling adds noise to the scores and takes the best (the Gumbel-max trick), so it needs neither softmax nor sort. The
noise is a counter-based generator's (Philox): a function of seed, step and token, the same under replay and without.
"""
# Kernel functions are Triton's own dialect; the launchers above them are checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.kernels.launching import check_tensor, jit, next_power_of_two, require_triton, tl

_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class TokenBook:
    """What the loop over tokens writes down, all on one device.

    Attributes:
        token: `[1]` int64, the token that the next step reads.
        position: `[1]` int64, tokens in the cache: where the next step writes.
        count: `[1]` int64, steps since the prompt.
        temperature: `[1]` float32, 0 is greedy.
        seed: `[1]` int64, of the sampling.
        token_log: `[C]` int64; entry i is the token chosen after step i, entry 0 the one after the prompt.
        width_log: `[C, U]` int32, the widths of the same step.
        best: `[B]` float32 and `[B]` int32, the best score and its token in each block of the vocabulary.
    """

    token: Tensor
    position: Tensor
    count: Tensor
    temperature: Tensor
    seed: Tensor
    token_log: Tensor
    width_log: Tensor
    best: tuple[Tensor, Tensor]

    @staticmethod
    def allocate(vocab_size: int, num_units: int, capacity: int, *, device: torch.device | str) -> TokenBook:
        """Allocates for a vocabulary, U units and a log of C steps."""
        blocks = -(-vocab_size // _BLOCK)

        def one(dtype: torch.dtype) -> Tensor:
            return torch.zeros(1, dtype=dtype, device=device)

        return TokenBook(
            token=one(torch.int64),
            position=one(torch.int64),
            count=one(torch.int64),
            temperature=one(torch.float32),
            seed=one(torch.int64),
            token_log=torch.zeros(capacity, dtype=torch.int64, device=device),
            width_log=torch.zeros(capacity, num_units, dtype=torch.int32, device=device),
            best=(
                torch.empty(blocks, dtype=torch.float32, device=device),
                torch.empty(blocks, dtype=torch.int32, device=device),
            ),
        )


def choose_token(logits: Tensor, bit_widths: Tensor, book: TokenBook, *, is_first: bool = False) -> Tensor:
    """Chooses the next token and writes it and the step's widths into the book.

    Takes ``argmax(logits + temperature * noise)``, the first of equal ones, which is a draw from
    ``softmax(logits / temperature)``. Never synchronises, allocates nothing. Two launches.

    Args:
        logits: `[V]` float32.
        bit_widths: `[U]` int32 of the step that put them out.
        book: Updated: token, logs, and unless `is_first` position and count by one. A full log takes no more entries.
        is_first: Whether the logits are the prompt's, so that no step has been made.

    Returns:
        `book.token`.

    Raises:
        ValueError: If a tensor has another dtype, shape, device or stride.
        RuntimeError: If Triton is not installed.
    """
    device = logits.device
    require_triton(device)
    check_tensor("logits", logits, dtype=torch.float32, shape=(-1,), device=device)
    (vocab_size,), blocks = logits.shape, -(-logits.numel() // _BLOCK)
    num_units = book.width_log.shape[1]
    check_tensor("bit_widths", bit_widths, dtype=torch.int32, shape=(num_units,), device=device)
    for name, tensor in zip(("best score", "best token"), book.best, strict=True):
        check_tensor(name, tensor, dtype=(torch.float32, torch.int32), shape=(blocks,), device=device)
    _best_kernel[(blocks,)](
        logits,
        book.temperature,
        book.seed,
        book.count,
        *book.best,
        VOCAB_SIZE=vocab_size,
        IS_FIRST=is_first,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    _book_kernel[(1,)](
        *book.best,
        bit_widths,
        book.token,
        book.position,
        book.count,
        book.token_log,
        book.width_log,
        num_units,
        book.token_log.shape[0],
        NUM_BLOCKS=blocks,
        IS_FIRST=is_first,
        BLOCK_BLOCKS=next_power_of_two(blocks),
        BLOCK_UNITS=next_power_of_two(num_units),
        num_warps=1,
    )
    return book.token


@jit(do_not_specialize_on_alignment=["temperature_ptr", "seed_ptr", "count_ptr"])
def _best_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    count_ptr,
    best_ptr,
    token_ptr,
    VOCAB_SIZE: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(logits_ptr + token, mask=token < VOCAB_SIZE, other=float("-inf"))
    temperature = tl.load(temperature_ptr)
    if temperature > 0:
        step = tl.load(count_ptr).to(tl.int32)
        if not IS_FIRST:
            step += 1
        zero = tl.zeros([BLOCK], tl.int32)
        random, _, _, _ = tl.philox(tl.load(seed_ptr), token, zero + step, zero, zero)
        # 23 bits and a half are all that float32 holds: strictly between 0 and 1, so both logarithms are finite. With
        # one bit more the largest would round to 1, and its token win whatever its score.
        uniform = ((random >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-7
        scores -= temperature * tl.log(-tl.log(uniform))
    tl.store(best_ptr + block, tl.max(scores, axis=0))
    best = block * BLOCK + tl.argmax(scores, axis=0, tie_break_left=True)
    # Among NaN any lane may be the best: the next step must read a token that exists all the same.
    tl.store(token_ptr + block, tl.minimum(best, VOCAB_SIZE - 1))


@jit(
    do_not_specialize=["num_units", "capacity"],
    do_not_specialize_on_alignment=["bit_widths_ptr", "token_ptr", "position_ptr", "count_ptr"],
)
def _book_kernel(
    best_ptr,
    best_token_ptr,
    bit_widths_ptr,
    token_ptr,
    position_ptr,
    count_ptr,
    token_log_ptr,
    width_log_ptr,
    num_units,
    capacity,
    NUM_BLOCKS: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    block = tl.arange(0, BLOCK_BLOCKS)
    best = tl.load(best_ptr + block, mask=block < NUM_BLOCKS, other=float("-inf"))
    best_block = tl.minimum(tl.argmax(best, axis=0, tie_break_left=True), NUM_BLOCKS - 1)  # as above
    token = tl.load(best_token_ptr + best_block).to(tl.int64)
    unit = tl.arange(0, BLOCK_UNITS)
    widths = tl.load(bit_widths_ptr + unit, mask=unit < num_units, other=0)
    count = tl.load(count_ptr)
    position = tl.load(position_ptr)
    if not IS_FIRST:
        count += 1
        position += 1
    tl.debug_barrier()  # every thread has read the counters before one of them writes
    tl.store(token_ptr, token)
    tl.store(position_ptr, position)
    tl.store(count_ptr, count)
    if count < capacity:
        tl.store(token_log_ptr + count, token)
        tl.store(width_log_ptr + count * num_units + unit, widths, mask=unit < num_units)
