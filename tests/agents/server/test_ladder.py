"""A ladder served: each request takes the rung that its speed or its verify width asks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import PROMPTS, Running, alone, completion, refusal, running

from flexquant_rl.agents import export
from flexquant_rl.agents.commands.servable import load_rungs, load_servable
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.ladder import Ladder, Mode, Rung, write_ladder
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.serving import Engine

RUNGS: tuple[tuple[str, Mode, int | None, float, float], ...] = (
    ("draft:3,length=3", "lossless", 8, 1.2, 0.001),
    ("draft:3,verify=5", "verified", 5, 1.4, 0.01),
    ("fixed:4", "lossy", None, 1.8, 0.2),
)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ladder") / "dial"
    rungs = []
    for place, (name, mode, verify, speed, kl_nats) in enumerate(RUNGS):
        found = load_servable("default", name)
        save_policy(found.policy, found.profile, directory / str(place))
        rungs.append(Rung(str(place), name, mode, verify, None, speed, kl_nats))
    write_ladder(directory, Ladder(found.model.fingerprint, "unquantised", 1, tuple(rungs)))
    return directory


@pytest.fixture(scope="module")
def ladder_server(ladder: Path) -> Iterator[Running]:
    found = load_servable("default", str(ladder))
    with running(found, rungs=load_rungs(str(ladder), found.model.fingerprint)) as server:
        yield server


def test_the_rung_that_the_server_was_started_with_is_the_default(ladder: Path) -> None:
    found = load_servable("default", str(ladder), verify_width=5)
    with running(found, rungs=load_rungs(str(ladder), found.model.fingerprint)) as server, server.client() as client:
        assert completion(client, max_tokens=4)["choices"][0]["flexquant"]["policy"] == "draft:3,verify=5"
    with pytest.raises(InputError, match="trained for model"):
        load_rungs(str(ladder), "f" * 64)


def test_the_default_rung_is_read_once(ladder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_servable("default", str(ladder))
    read: list[Path] = []
    load = export.load_exported

    def noted(directory: Path, name: str | None = None) -> export.ExportedPolicy:
        read.append(directory)
        return load(directory, name)

    monkeypatch.setattr(export, "load_exported", noted)
    rungs = load_rungs(str(ladder), found.model.fingerprint, found)
    assert rungs is not None
    assert read == [ladder / "1", ladder / "2"]
    assert rungs.policies["0"] is found.policy


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({}, "draft:3,length=3"),
        ({"speed": 1.4}, "draft:3,verify=5"),
        ({"verify_width": 5}, "draft:3,verify=5"),
        ({"speed": 1.5}, "fixed:4"),
        ({"full_width": True}, "fixed:8"),
    ],
)
def test_a_request_takes_its_rung(ladder_server: Running, fields: dict[str, object], policy: str) -> None:
    with ladder_server.client() as client:
        answer = completion(client, max_tokens=16, **fields)["choices"][0]
    assert answer["flexquant"]["policy"] == policy
    found = load_servable("default", policy)
    assert answer["text"] == alone(Engine(found.model, found.policy, found.profile), PROMPTS[0], 16)


def test_what_is_on_no_rung_is_refused(ladder_server: Running) -> None:
    with ladder_server.client() as client:
        for fields, words in (
            ({"speed": 2.5}, "beyond 1.80"),
            ({"speed": -1}, "greater than 0"),
            ({"verify_width": 6}, "choose one of 5, 8"),
            ({"kl_weight": 3.0}, "give speed"),
        ):
            answer = client.post("/v1/completions", json={"prompt": "a", **fields})
            assert words in refusal(answer, 400)["message"]
        facts = client.get("/v1/models").json()["data"][0]["flexquant"]
    assert [(rung["speed"], rung["verify_width"]) for rung in facts["dial"]] == [(1.2, 8), (1.4, 5), (1.8, None)]
    assert (facts["speeds_are"], facts["why_no_dial"]) == ("measured", None)


def test_a_directory_that_is_no_ladder_has_no_rungs(tmp_path: Path) -> None:
    assert load_rungs(str(tmp_path), "") is None
    assert load_rungs("fixed:4", "") is None
