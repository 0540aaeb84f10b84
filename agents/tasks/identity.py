"""What answers and times depend on, as digests: rows of a policy are kept as long as it is the very same one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from flexquant_rl.agents.commands.servable import Servable
from flexquant_rl.engine.control.artefact import CARD_FILE, PROFILE_FILE, WEIGHTS_FILE, policy_directory
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.drafting_rules import rule_to_dict
from flexquant_rl.engine.control.token_policy import DialPolicy
from flexquant_rl.engine.files import file_sha256, json_sha256

_WEIGHTS = (".safetensors", ".gguf")
_PLAIN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def policy_sha256(named: str, servable: Servable) -> str:
    """Digest of what a policy is: the files of a directory or of a ladder's rung, what a name was bound to.

    Args:
        named: As `--policy` named it.
        servable: What that is.
    """
    path, policy = Path(named), servable.policy
    if path.is_dir():
        directory = policy_directory(path if servable.rung is None else path / servable.rung.folder)
        return json_sha256([file_sha256(directory / name) for name in (CARD_FILE, WEIGHTS_FILE, PROFILE_FILE)])
    assert not isinstance(policy, DialPolicy), "no name has learned anything"
    if isinstance(policy, DeployedDrafts):
        assert policy.facts.rule is not None, "no name has learned anything"
        levels, verify = policy.level_bit_widths.tolist(), policy.verify_bit_widths.tolist()
        return json_sha256([rule_to_dict(policy.facts.rule), levels, verify])
    return json_sha256(policy.bit_widths.tolist())


def plain_model_sha256(path: Path) -> str:
    """Digest of an unquantised model's configuration, tokenizer and weights: of a directory or one file."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    kept = [file for file in files if file.suffix in _WEIGHTS or file.name in _PLAIN]
    return json_sha256([[file.name, file_sha256(file)] for file in kept])


def timing_sha256(profile: Path | None, threads: int | None, prompts: Sequence[Tensor], num_tokens: int) -> str:
    """Digest of what the times of policies depend on besides the policies.

    Args:
        profile: File of the latency table; None where there is none.
        threads: Threads of a step.
        prompts: `[T]` int64 each.
        num_tokens: Tokens that are timed behind each.
    """
    table = "" if profile is None else file_sha256(profile)
    return json_sha256([table, threads, [prompt.tolist() for prompt in prompts], num_tokens])
