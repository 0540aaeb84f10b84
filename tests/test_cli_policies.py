"""What `--policy` may name, where prompts come from and what is printed of them: `fq generate` and `fq export`."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli_runner import Finished, run, write_text

from flexquant_rl import cli
from flexquant_rl.engine.checkpoint import load_checkpoint
from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet, StaticPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nested") / "model"
    assert run(cli.main, "quantize", tiny_model_dir, out).code == 0
    return out


@pytest.fixture(scope="module")
def profile(nested: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "profile.json"
    assert run(cli.main, "profile", nested, "--text", text, "--source", "roofline", "--out", out).code == 0
    return out


def generate(model: Path, policy: object, *options: object, prompt: str | None = "abc abc") -> Finished:
    asked = () if prompt is None else ("--prompt", prompt)
    return run(cli.main, "generate", model, "--policy", policy, *asked, "--max-new-tokens", 5, *options)


class TestNames:
    def test_one_width_needs_no_profile(self, nested: Path) -> None:
        result = generate(nested, "fixed:4").result
        assert result["mean_bit_width"] == pytest.approx((8 + 4 * 4) / 5), "the prompt is read at 8 bits"
        assert result["speedup_modelled"] == pytest.approx(
            1 / float(roofline_cost(load_checkpoint(nested)).time_share(torch.full((3,), 4)))
        )
        assert (result["kl_weight"], result["latency_source"]) == (None, "roofline")

    def test_knapsack(self, nested: Path, profile: Path, text: Path) -> None:
        result = generate(nested, "knapsack:5", "--profile", profile, "--text", text).result
        assert 3.0 < result["mean_bit_width"] < 8.0

    @pytest.mark.parametrize(
        ("policy", "said"),
        [
            ("fixed:7", "width 7 is not stored"),
            ("fixd:4", "did you mean fixed:4"),
            ("somewhere", "is not the directory of an exported policy or of a run"),
        ],
    )
    def test_wrong_names(self, nested: Path, policy: str, said: str) -> None:
        assert said in generate(nested, policy).error

    def test_a_policy_of_signals_is_served_by_nobody(self, nested: Path, profile: Path, text: Path) -> None:
        error = generate(nested, "entropy:1.5", "--profile", profile, "--text", text).error
        assert "'entropy:1.5' decides at every token" in error

    def test_a_choice_in_flight_is_served_by_nobody(self, nested: Path) -> None:
        error = generate(nested, "relative-error:0.5").error
        assert (
            "'relative-error:0.5' chooses within the pass, which no decoder does; compare it with fq evaluate" in error
        )

    @pytest.mark.parametrize("option", ["--speed", "--kl-weight"])
    def test_a_static_allocation_has_no_dial(self, nested: Path, option: str) -> None:
        assert f"{option} 1.5 sets a dial, and fixed:4 has none" in generate(nested, "fixed:4", option, 1.5).error


class TestExport:
    @pytest.mark.parametrize("name", ["knapsack:5", "fixed:4"])
    def test_a_static_allocation_is_a_policy(
        self, nested: Path, profile: Path, text: Path, tmp_path: Path, name: str
    ) -> None:
        out = tmp_path / "policy"
        options = ("--model", nested, "--profile", profile)
        result = run(cli.main, "export", name, out, *options).result
        assert (result["policy"], result["dial"]) == (name, [])
        policy = load_policy(out)
        assert isinstance(policy, StaticPolicy)
        assert generate(nested, out).result["mean_bit_width"] == pytest.approx(
            generate(nested, name, "--profile", profile).result["mean_bit_width"]
        )
        rows = run(
            *(cli.main, "evaluate", nested, "--policy", out, name, "--text", text, "--sequences", 2),
            *("--env.prompt-tokens", 8, "--env.max-new-tokens", 4),
        ).result["rows"]
        assert [row["policy"] for row in rows] == [str(out), name]
        assert rows[0]["output_kl_nats"] == rows[1]["output_kl_nats"]

    def test_one_width_is_exported_without_measuring_anything(self, nested: Path, text: Path, tmp_path: Path) -> None:
        """And is compared all the same: by a profile that is made for the comparison."""
        out = tmp_path / "policy"
        assert run(cli.main, "export", "fixed:4", out, "--model", nested).code == 0
        assert Profile.load(out / "profile.json").num_tokens == 0
        options = ("--text", text, "--sequences", 2, "--env.prompt-tokens", 8, "--env.max-new-tokens", 4)
        rows = run(cli.main, "evaluate", nested, "--policy", out, "fixed:4", *options).result["rows"]
        assert rows[0]["output_kl_nats"] == rows[1]["output_kl_nats"]

    def test_a_name_needs_a_model(self, tmp_path: Path) -> None:
        assert "name the model with --model" in run(cli.main, "export", "fixed:4", tmp_path / "out").error
        assert not (tmp_path / "out").exists()

    def test_a_run_has_its_own_model(self, tmp_path: Path) -> None:
        error = run(cli.main, "export", tmp_path, tmp_path / "out", "--model", "default").error
        assert f"--model is for a policy by name, and {tmp_path} is a run" in error


def test_a_run_stands_for_its_policy(nested: Path, profile: Path, tmp_path: Path) -> None:
    model = load_checkpoint(nested)
    schema = SignalSchema(model.num_units, model.bit_widths)
    card = PolicyCard(schema, model.fingerprint, tuple(u.name for u in model.units), (DialPoint(9.0, 1.5, 0.1, 5.0),))
    save_policy(LearnedPolicy(PrecisionNet(schema), card), Profile.load(profile), tmp_path / "run" / "policy")
    by_run = generate(nested, tmp_path / "run").result
    assert by_run["kl_weight"] == 9.0
    assert generate(nested, tmp_path / "run", "--profile", profile).error.endswith("leave it out")


class TestPrompts:
    def test_from_standard_input(self, nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc abc")))
        assert self.text(generate(nested, "fixed:8", prompt="-")) == self.text(generate(nested, "fixed:8"))

    def test_from_a_file(self, nested: Path, tmp_path: Path) -> None:
        (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfabc abc")
        finished = generate(nested, "fixed:8", "--prompt-file", tmp_path / "prompt.txt", prompt=None)
        assert self.text(finished) == self.text(generate(nested, "fixed:8"))

    @staticmethod
    def text(finished: Finished) -> str:
        assert finished.code == 0, finished.err
        return finished.out.rsplit("\n", 2)[0]

    def test_mistakes(self, nested: Path, tmp_path: Path) -> None:
        (tmp_path / "latin").write_bytes(b"caf\xe9 abc")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        cases: tuple[tuple[str | None, str | None, str], ...] = (
            (None, "latin", "byte 3 is not UTF-8"),
            (None, "none", "cannot be read (No such file or directory)"),
            (None, ".", "cannot be read (Is a directory)"),
            (None, "loop", "cannot be read (Too many levels of symbolic links)"),
            ("abc", "latin", "both --prompt and --prompt-file"),
            (None, None, "no prompt"),
        )
        for prompt, file, said in cases:
            options = () if file is None else ("--prompt-file", tmp_path / file)
            assert said in generate(nested, "fixed:8", *options, prompt=prompt).error

    def test_an_option_without_effect_is_refused(self, nested: Path, tmp_path: Path) -> None:
        assert "fixed:4 needs no profile" in generate(nested, "fixed:4", "--text", tmp_path / "nothere").error


class TestOutput:
    def test_numbers(self, nested: Path) -> None:
        result = generate(nested, "fixed:4").result
        assert result["num_tokens"] == 5
        assert result["tokens_per_s"] > 0
        assert result["prompt_seconds"] > 0
        assert result["finish_reason"] == "length"
        assert result["chat_template"] is False

    def test_quiet_is_the_text_alone(self, nested: Path) -> None:
        whole, quiet = generate(nested, "fixed:4"), generate(nested, "fixed:4", "--quiet")
        text, last, _ = whole.out.rsplit("\n", 2)
        assert json.loads(last)["num_tokens"] == 5
        assert quiet.out == text + "\n"

    def test_one_token_has_no_rate(self, nested: Path) -> None:
        options = ("generate", nested, "--policy", "fixed:4", "--prompt", "abc", "--max-new-tokens", 1)
        result = run(cli.main, *options).result
        assert (result["tokens_per_s"], result["speedup_modelled"]) == (None, None)


class TestChat:
    @pytest.fixture
    def chatty(self, tiny_model_dir: Path, tmp_path: Path) -> Path:
        """The model with a chat template."""
        model = shutil.copytree(tiny_model_dir, tmp_path / "model")
        (model / "chat_template.jinja").write_text(
            "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
            "{% if add_generation_prompt %}<a>{% endif %}"
        )
        return model

    def test_prompt_is_the_message_of_the_user(self, chatty: Path) -> None:
        chat = generate(chatty, "fixed:8")
        assert chat.result["chat_template"] is True
        by_hand = generate(chatty, "fixed:8", "--raw", prompt="<user>abc abc<a>")
        assert by_hand.result["chat_template"] is False
        assert TestPrompts.text(chat) == TestPrompts.text(by_hand)

    def test_a_template_that_refuses(self, chatty: Path) -> None:
        (chatty / "chat_template.jinja").write_text("{{ raise_exception('only poems') }}")
        error = generate(chatty, "fixed:8").error
        assert "refuses the messages (only poems)" in error
        assert "give plain text: --raw" in error


def test_a_policy_that_is_fitted_is_fitted_to_training_text(nested: Path, text: Path) -> None:
    options = ("--text", text, "--sequences", 2, "--env.prompt-tokens", 4, "--env.max-new-tokens", 6)
    names = ("regressor:0", "regressor:1e9", "fixed:4")
    rows = run(cli.main, "evaluate", nested, "--policy", *names, *options).result["rows"]
    assert [row["policy"] for row in rows] == ["regressor:0", "regressor:1e+09", "fixed:4"]
    assert rows[0]["mean_bit_width"] >= 4
    # One is read in a parallel pass, the other step by step.
    assert rows[1]["output_kl_nats"] == pytest.approx(rows[2]["output_kl_nats"], rel=1e-4), "nothing saves so much"


def test_every_family_is_compared_by_name(nested: Path, profile: Path, text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--profile", profile, "--sequences", 2, "--env.prompt-tokens", 4)
    drafts = ("draft:3,length=2", "lookups")
    names = ("random:4.5", "schedule:2", "entropy:1.5", "regressor:0.3", "relative-error:0.5", *drafts)
    out = tmp_path / "report"
    result = run(
        *(cli.main, "evaluate", nested, "--policy", *names, *options, "--env.max-new-tokens", 6, "--out", out)
    ).result
    rows = {row["policy"]: row for row in result["rows"]}
    assert set(rows) == set(names)
    for name in drafts:
        assert rows.pop(name)["output_kl_nats"] == 0, "its text is that of the reference, 8 bits"
    assert all(0 < row["output_kl_nats"] < 10 for row in rows.values())
    in_flight = rows["relative-error:0.5"]
    assert 4 < in_flight["mean_bit_width"] < 5
    assert in_flight["speedup_measured"] is None, "no decoder runs it"
    assert in_flight["speedup_modelled"] > 1
    assert "`relative-error` chooses a unit's width within the pass" in (out / "report.md").read_text()


def test_a_choice_in_flight_is_compared_alone(nested: Path, profile: Path, text: Path) -> None:
    options = ("--text", text, "--profile", profile, "--sequences", 2, "--env.prompt-tokens", 4)
    rows = run(
        *(cli.main, "evaluate", nested, "--policy", "relative-error:1,low=3,high=8", *options),
        *("--env.max-new-tokens", 6),
    ).result["rows"]
    assert [row["policy"] for row in rows] == ["relative-error:1,low=3,high=8"]


def test_a_choice_in_flight_is_combined_with_nothing(nested: Path, tmp_path: Path) -> None:
    error = run(cli.main, "combine", nested, tmp_path / "out", "--policy", "fixed:4", "relative-error:0.5").error
    assert "no decoder does" in error


@pytest.mark.parametrize("command", ["evaluate", "combine"])
def test_mistakes_name_the_commands_own_options(nested: Path, tmp_path: Path, command: str) -> None:
    arguments = (cli.main, command, nested, *((tmp_path / "out",) if command == "combine" else ()))
    for options, said in (
        (("--policy", "fixed:4", "--sequences", 0), "--sequences 0 must be at least 1"),
        (("--policy", "fixed:4", "--dials", -1), "--dials -1 must be at least 1"),
        (("--policy", "fixed:4", "fixed:5", "fixed:4"), "--policy names fixed:4 twice; name each once"),
    ):
        assert said in run(*arguments, *options).error
    assert not (tmp_path / "out").exists()
