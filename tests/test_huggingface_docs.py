"""Every Python block of docs/huggingface.md runs as it is written, on the embedded model."""

from __future__ import annotations

import re
from pathlib import Path

from document_blocks import DOCS, run_blocks, save_random_policy

from flexquant_rl import load_model
from flexquant_rl.engine.checkpoint import WEIGHTS_NOTE
from flexquant_rl.engine.embedded import embedded_model_path
from flexquant_rl.engine.huggingface.quantizer import nested_model

DOCUMENT = DOCS / "huggingface.md"


def test_the_blocks_do_what_they_say(tmp_path: Path) -> None:
    ours = load_model(keep_reference=False)
    save_random_policy(ours, tmp_path / "policy")
    names, (_, printed) = run_blocks(DOCUMENT, tmp_path, {"MODEL": str(embedded_model_path())})
    assert nested_model(names["model"]).fingerprint == ours.fingerprint
    assert load_model(str(tmp_path / "nested")).fingerprint == ours.fingerprint
    mean, *widths = printed
    assert 3 < float(mean.removesuffix(" bits")) < 8
    assert len(widths) == names["tokens"].shape[1] - names["prompt"]["input_ids"].shape[1] - 1
    assert len({*widths}) > 1
    assert names["text"].startswith("def main():")
    assert len(names["text"]) > len("def main():") + 10


def test_the_refusal_is_quoted_as_it_is() -> None:
    text = re.sub(r"\s+", " ", DOCUMENT.read_text(encoding="utf-8"))
    assert WEIGHTS_NOTE in text
