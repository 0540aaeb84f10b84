"""Names on the hub without a network: what was downloaded is used, anything else is one line within seconds."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from flexquant_rl.agents.tasks.identity import plain_model_sha256
from flexquant_rl.engine import hub
from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.loading import load_causal_lm, local_model
from flexquant_rl.engine.quantisation.config import QuantizationConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of downloads."""
    path = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    return path


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "PATIENCE_S", 0.5)
        yield


def download(cache: Path, source: Path, name: str) -> None:
    """Puts a model into the cache as a download does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def refusal(name: str) -> str:
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        load_causal_lm(name)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_offline() -> None:
    message = refusal("someone/some-model")
    assert "someone/some-model is not a directory, was not downloaded before" in message
    assert "HF_HUB_OFFLINE is set" in message


def test_hub_that_does_not_answer(silent_hub: None) -> None:
    message = refusal("someone/some-model")
    assert "the hub cannot be asked" in message
    assert "check the name or the network" in message


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "the hub cannot be asked" in refusal("someone/some-model")


def test_patience_leaves_time_for_a_command_to_start() -> None:
    assert hub.PATIENCE_S <= 5


def test_no_name_at_all() -> None:
    assert "neither a directory nor a name on the hub" in refusal("no such model?")


def test_what_was_downloaded_is_used(cache: Path, tiny_model_dir: Path) -> None:
    download(cache, tiny_model_dir, "someone/tiny")
    hf_model, tokenizer = load_causal_lm("someone/tiny")
    assert hf_model.config.num_hidden_layers == 2
    assert tokenizer("a")["input_ids"] == [97]


def test_also_where_the_hub_is_silent(cache: Path, tiny_model_dir: Path, silent_hub: None) -> None:
    download(cache, tiny_model_dir, "someone/tiny")
    assert load_causal_lm("someone/tiny")[0].config.num_hidden_layers == 2


def test_a_nested_checkpoint_by_its_name(cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))
    save_checkpoint(model, tmp_path / "nested")
    download(cache, tmp_path / "nested", "someone/nested")
    found = load_model("someone/nested")
    assert (found.fingerprint, found.config) == (model.fingerprint, model.config)


def test_where_the_files_of_a_model_are(cache: Path, tiny_model_dir: Path) -> None:
    download(cache, tiny_model_dir, "someone/tiny")
    directory = local_model("someone/tiny")
    assert plain_model_sha256(directory) == plain_model_sha256(tiny_model_dir)
    for path in (str(tiny_model_dir), "./none", "a/b/c", "none.gguf", "folder/none.gguf"):
        assert local_model(path) == Path(path)
    with pytest.raises(InputError, match="was not downloaded before"):
        local_model("someone/other")


def test_the_same_checks_hold_for_a_name(cache: Path, tiny_model_dir: Path) -> None:
    download(cache, tiny_model_dir, "someone/tiny")
    snapshot = cache / "models--someone--tiny" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    assert "someone/tiny" in refusal("someone/tiny")
