"""Memory in huge pages behaves like any other; whether the system grants them is its own affair."""

import gc
import mmap
import sys
from pathlib import Path

import pytest
import torch

from flexquant_rl.kernels import huge_pages
from flexquant_rl.kernels.huge_pages import ALIGNMENT, HUGE_PAGE_BYTES

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_a_block_is_zeros_aligned_and_writable() -> None:
    for num_bytes in (1, 100, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 64):
        block = huge_pages.empty(num_bytes)
        assert block.shape == (num_bytes,)
        assert block.dtype == torch.uint8
        assert not block.any()
        assert block.data_ptr() % ALIGNMENT == 0
        block.fill_(7)
        assert bool((block == 7).all())


def test_blocks_do_not_overlap_and_views_keep_them() -> None:
    first, second = huge_pages.empty(HUGE_PAGE_BYTES).fill_(1), huge_pages.empty(HUGE_PAGE_BYTES).fill_(2)
    view = first[100:200].view(torch.int32)
    del first
    gc.collect()
    huge_pages.empty(HUGE_PAGE_BYTES).fill_(3)
    assert bool((view == 0x01010101).all())
    assert bool((second == 2).all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_copies_are_equal_and_where_they_were_asked_for(dtype: torch.dtype) -> None:
    source = torch.randint(-100, 100, (8, 3, 7)).to(dtype)
    first = huge_pages.aligned(source.nbytes)
    block = huge_pages.empty(first + source.nbytes)
    copy = huge_pages.copied(source.transpose(0, 1), block, first)
    assert torch.equal(copy, source.transpose(0, 1))
    assert copy.is_contiguous()
    assert copy.data_ptr() == block.data_ptr() + first
    assert not block[:first].any()


def test_zeros_large_and_small() -> None:
    for shape in (torch.Size((3, 5)), torch.Size((2, 1024, 1024))):
        tensor = huge_pages.zeros(shape, torch.float32)
        assert tensor.shape == shape
        assert tensor.dtype == torch.float32
        assert not tensor.any()


def test_mistakes_are_value_errors() -> None:
    block = huge_pages.empty(128)
    for first in (1, 128, -64):
        with pytest.raises(ValueError, match="do not fit"):
            huge_pages.copied(torch.zeros(4), block, first)
    with pytest.raises(ValueError, match="num_bytes=0"):
        huge_pages.empty(0)


def test_without_huge_pages_it_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    block = huge_pages.empty(HUGE_PAGE_BYTES)
    assert not block.any()
    block.fill_(1)


@pytest.mark.skipif(
    sys.platform != "linux" or not THP.exists() or "[never]" in THP.read_text(), reason="no huge pages on this system"
)
def test_the_system_is_asked_for_huge_pages() -> None:
    block = huge_pages.empty(4 * HUGE_PAGE_BYTES)
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= block.data_ptr() < high
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert " hg" in flags
