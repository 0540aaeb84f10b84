"""Every Python block of docs/serving.md runs as it is written, one after the other, beside an exported policy."""

from __future__ import annotations

from typing import Any

import pytest
from document_blocks import BLOCK, DOCS, run_blocks, save_random_policy

from flexquant_rl import load_model

DOCUMENT = DOCS / "serving.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[str]]]:
    """The names that the blocks have left, and what each block has printed."""
    directory = tmp_path_factory.mktemp("serving")
    save_random_policy(load_model(keep_reference=False), directory / "policy")
    return run_blocks(DOCUMENT, directory)


def test_the_first_block_streams_text_in_ten_lines(ran: tuple[dict[str, Any], list[list[str]]]) -> None:
    block = BLOCK.search(DOCUMENT.read_text(encoding="utf-8"))
    assert block is not None
    assert block[1].count("\n") <= 10
    _, printed = ran
    assert len("".join(printed[0])) > 10


def test_requests_of_threads_get_what_they_get_alone(ran: tuple[dict[str, Any], list[list[str]]]) -> None:
    names, _ = ran
    engine = names["Engine"](names["model"], names["policy"], names["profile"], max_length=256)
    alone = ["".join(token.text for token in engine.generate(request)) for request in names["requests"]]
    assert names["texts"] == alone
    assert len({*alone}) == len(names["prompts"])


def test_the_other_blocks_do_what_they_say(ran: tuple[dict[str, Any], list[list[str]]]) -> None:
    names, printed = ran
    _, dials, fixed, _, sampled, cancelled, likelihoods = printed
    assert dials == ["5: 2.00x, 0.0500 nats", "20: 1.50x, 0.0100 nats"]
    assert names["dial"] == 20.0
    assert len("".join(fixed)) > 10
    assert sampled[-1] in ("eos", "stop", "length")
    assert cancelled == ["4 cancelled"]
    assert [line.partition(" nats, greedy: ")[2] in ("True", "False") for line in likelihoods] == [True, True]
