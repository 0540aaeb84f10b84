"""What a file or directory of ours is, of which model, and whether it is whole: every artefact has one reader here.

Each is recognised by the file that only it has, and then read by the loader that its users read it with. What that
refuses is refused here with the same line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open

from flexquant_rl.agents.analysis.rows import PLAN_FILE as ANALYSIS_FILE
from flexquant_rl.agents.analysis.rows import RowStore, StrategyRow
from flexquant_rl.agents.evaluation.rows import LONG_ROWS_FILE, REPORT_FILE, ROWS_FILE
from flexquant_rl.agents.export import load_exported
from flexquant_rl.agents.inspected_results import (
    JSON_FILES,
    Facts,
    draft_facts,
    eval_facts,
    evaluation_facts,
    is_evaluation,
    rows_facts,
    tasks_facts,
)
from flexquant_rl.agents.onnx_policy import ONNX_FILE, onnx_facts
from flexquant_rl.agents.runs.run import load_run, load_sweep
from flexquant_rl.agents.tasks.rows import PLAN_FILE as TASKS_FILE
from flexquant_rl.engine.checkpoint import is_nested_checkpoint, load_checkpoint
from flexquant_rl.engine.control.artefact import CARD_FILE, PROFILE_FILE
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts, drafts_to_dict
from flexquant_rl.engine.control.ladder import LADDER_FILE, read_ladder
from flexquant_rl.engine.control.policy import StaticPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.token_policy import TokenPolicy
from flexquant_rl.engine.control.traces import EMBEDDING_FILE, PLAN_FILE, read_plan, read_sequence, read_traces
from flexquant_rl.engine.control.traces import sequence_path as trace_path
from flexquant_rl.engine.errors import InputError, first_line
from flexquant_rl.engine.files import read_json
from flexquant_rl.engine.loading import GGUF_SUFFIX, check_gguf
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.plain_model import check_directory, check_stored, weight_files
from flexquant_rl.engine.quantisation.unfinished import START_FILE

CONFIG_FILE = "config.json"
_DEMO_PARTS = ("nested", "verified", "lossy")
_KINDS = (
    "a model (a directory or .gguf file), a nested checkpoint, a policy, a run, a sweep, a profile (profile.json), a "
    "recording, an analysis, what `fq combine`, `fq demo`, `fq evaluate`, `fq tasks` or `fq bench` wrote, an ONNX "
    "policy (policy.onnx), costs of drafts (costs.json) or evaluation rows (eval.jsonl)"
)


def inspected(path: Path) -> Facts:
    """What is at a path, ready for JSON.

    Args:
        path: File or directory.

    Returns:
        `path`, `kind`, `complete`, `bytes`, `modified` (UTC), and what the kind of thing has: its model, widths,
        fingerprints and sizes. What is not complete says under `missing` what it lacks.

    Raises:
        InputError: If there is nothing, or nothing of ours, or it is damaged.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; give the path of {_KINDS}")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        kind, facts = _directory(path)
    else:
        files = [path]
        kind, facts = _file(path)
    newest = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
    return {
        "path": str(path),
        "kind": kind,
        "complete": not facts.get("missing"),
        "bytes": sum(file.stat().st_size for file in files),
        "modified": datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
        **facts,
    }


def _directory(path: Path) -> tuple[str, Facts]:
    if is_nested_checkpoint(path):
        return "nested checkpoint", _nested(path)
    readers: Mapping[str, Callable[[Path], tuple[str, Facts]]] = {
        CARD_FILE: _policy,
        PLAN_FILE: _recording,
        ANALYSIS_FILE: _analysis,
        LADDER_FILE: _ladder,
        TASKS_FILE: lambda path: ("tasks", tasks_facts(path)),
        CONFIG_FILE: _run_or_model,
    }
    for name, reader in readers.items():
        if (path / name).is_file():
            return reader(path)
    if is_evaluation(path):
        return "evaluation", evaluation_facts(path)
    if (path / START_FILE).is_file():
        return "unfinished checkpoint", {"missing": "run the same `fq quantize` command again for the rest"}
    if any((path / part).is_dir() for part in _DEMO_PARTS[1:]):
        return "demo", _demo(path)
    if (path / PROFILE_FILE).is_file() or (path / ROWS_FILE).is_file():
        file = path / (PROFILE_FILE if (path / PROFILE_FILE).is_file() else ROWS_FILE)
        raise InputError(f"{path} holds no {CONFIG_FILE}, so it is no run or model; name its file itself, e.g. {file}")
    raise InputError(f"{path} holds none of {', '.join(readers)}; give the path of {_KINDS}")


def _demo(path: Path) -> Facts:
    """The parts of what `fq demo` makes, as far as they are there."""
    parts: Facts = {}
    for name in _DEMO_PARTS:
        kind, facts = _directory(path / name) if (path / name).is_dir() else ("missing", {})
        parts[name] = f"{kind}, not complete" if facts.get("missing") else kind
    is_whole = not any(part == "missing" or part.endswith("not complete") for part in parts.values())
    return {"parts": parts, "missing": None if is_whole else f"continue with: fq demo --out {path}"}


def _file(path: Path) -> tuple[str, Facts]:
    if path.suffix == GGUF_SUFFIX:
        return "gguf model", _gguf(path)
    if path.suffix == ".jsonl":
        return rows_facts(path)
    if path.name == ONNX_FILE:
        return "ONNX policy", onnx_facts(path)
    if path.suffix != ".json":
        raise InputError(f"{path} is no file of ours by its name; give the path of {_KINDS}")
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); restore the file") from error
    for kind, (names, facts_of) in JSON_FILES.items():
        if isinstance(data, dict) and names <= data.keys():
            return kind, facts_of(data, path)
    if not isinstance(data, dict) or not {"sensitivity", "cost"} & data.keys():
        raise InputError(f"{path} is no profile; name the directory it belongs to, or give the path of {_KINDS}")
    return "profile", _profile(Profile.load(path))


def _nested(path: Path) -> Facts:
    model = load_checkpoint(path)  # every byte is checked on the way
    profile = path / PROFILE_FILE
    return {
        **_config_facts(read_json(path / CONFIG_FILE)),
        "fingerprint": model.fingerprint,
        "bit_widths": list(model.bit_widths),
        "method": model.config.method,
        "group_size": model.config.group_size,
        "unit": model.config.unit,
        "units": [unit.name for unit in model.units],
        "nested_weights": int(model.unit_weights.sum()),
        "bytes_by_width": _bytes_by_width(model),
        "context_tokens": model.max_context,
        "calibration": None if model.calibration is None else asdict(model.calibration),
        "tuning": None if model.tuning is None else asdict(model.tuning),
        "profile": _of_model(Profile.load(profile), model.fingerprint, profile) if profile.is_file() else None,
    }


def _bytes_by_width(model: NestedCausalLM) -> dict[str, int]:
    """Bytes of nested weights that a token reads at each width."""
    return {
        str(width): sum(model.weight_bytes(unit, width) for unit in range(model.num_units))
        for width in model.bit_widths
    }


def _of_model(profile: Profile, fingerprint: str, path: Path) -> Facts:
    if profile.fingerprint != fingerprint:
        raise InputError(
            f"{path} is of model {profile.fingerprint[:12]}, but beside it is {fingerprint[:12]}; run "
            "`fq profile` again"
        )
    return _profile(profile)


def _profile(profile: Profile) -> Facts:
    cost = profile.cost
    full = float(cost.latency_ms(cost.full_width()))
    return {
        "model_fingerprint": profile.fingerprint,
        "bit_widths": list(profile.bit_widths),
        "num_units": len(profile.sensitivity),
        "tokens": profile.num_tokens,
        "reference": profile.reference,
        "latency_source": cost.source,
        "device": cost.device,
        "decoder": cost.decoder,
        "num_threads": cost.num_threads,
        "full_width_ms": full,
        "table_error_p50": cost.error_p50,
        "drafts": None if profile.drafts is None else profile.drafts.shares(),
    }


def _policy(path: Path) -> tuple[str, Facts]:
    exported = load_exported(path)
    card, policy = exported.card, exported.policy
    is_of_drafts = isinstance(policy, DeployedDrafts)
    kind = "static policy" if isinstance(policy, StaticPolicy) else "learned policy"
    kind = "policy by tokens" if isinstance(policy, TokenPolicy) else kind
    facts: Facts = {
        "name": read_json(path / CARD_FILE)["name"],
        "mode": "verified" if is_of_drafts else "lossy",
        "model": card.config.get("model"),
        "model_fingerprint": card.model_fingerprint,
        "bit_widths": list(card.schema.bit_widths),
        "units": list(card.unit_names),
        "dial": [asdict(point) for point in card.dial],
        "horizon": card.schema.horizon,
        "profile": _profile(exported.profile),
        "has_onnx": (path / ONNX_FILE).is_file(),
    }
    if isinstance(policy, StaticPolicy):
        facts["allocation"] = policy.bit_widths.tolist()
    if isinstance(policy, DeployedDrafts):
        return "policy of drafts", facts | {"drafts": drafts_to_dict(policy)}
    return kind, facts


def _ladder(path: Path) -> tuple[str, Facts]:
    ladder = read_ladder(path)
    for rung in ladder.rungs:
        load_exported(path / rung.folder).card.check_model(ladder.model_fingerprint, path / rung.folder)
    return "ladder of policies", {
        "model_fingerprint": ladder.model_fingerprint,
        "reference": ladder.reference,
        "tokens": ladder.num_tokens,
        "rungs": {str(place): rung.words() for place, rung in enumerate(ladder.rungs)},
    }


def _recording(path: Path) -> tuple[str, Facts]:
    plan = read_plan(path)
    present = [index for index in range(len(plan.sequences)) if trace_path(path, index).is_file()]
    is_whole = len(present) == len(plan.sequences) and (path / EMBEDDING_FILE).is_file()
    traces = read_traces(path).sequences if is_whole else [read_sequence(path, plan, index) for index in present]
    sources = sorted({planned.source for planned in plan.sequences})
    return "recording", {
        "model_fingerprint": plan.fingerprint,
        "decoder": plan.decoder,
        "verify_width": plan.verify_width,
        "draft_widths": list(plan.draft_widths),
        "depth": plan.depth,
        "sequences": len(present),
        "planned_sequences": len(plan.sequences),
        "tokens": sum(trace.num_tokens for trace in traces),
        "sources": sources,
        "missing": None if is_whole else "run the same `fq record` command again for the rest",
    }


def _analysis(path: Path) -> tuple[str, Facts]:
    store = RowStore(path)
    plan, rows = store.read_plan(), store.read(StrategyRow)
    is_whole = bool(rows) and (path / REPORT_FILE).is_file()
    return "analysis", {
        "model": plan.model,
        "reference": plan.reference,
        "bit_widths": list(plan.bit_widths),
        "text": list(plan.text) or ["held-out standard library"],
        "calibration": list(plan.calibration),
        "windows": plan.num_windows,
        "window_tokens": plan.window_tokens,
        "strategies": list(dict.fromkeys(row.strategy for row in rows)),
        "output_kl_nats": {f"{row.strategy} at {row.bit_width} bits": row.output_kl_nats for row in rows},
        "missing": None if is_whole else "run the same `fq analyse` command again for the rest",
    }


def _run_or_model(path: Path) -> tuple[str, Facts]:
    try:
        data = read_json(path / CONFIG_FILE)
    except (OSError, ValueError) as error:
        raise InputError(f"{path / CONFIG_FILE} is not readable JSON ({error}); restore the file") from error
    if isinstance(data, dict) and isinstance(data.get("config"), dict) and "model_type" not in data:
        return ("sweep", _run(path, is_sweep=True)) if "sweep" in data else ("run", _run(path, is_sweep=False))
    return "model", _plain(path)


def _run(path: Path, *, is_sweep: bool) -> Facts:
    config, swept = load_sweep(path) if is_sweep else (load_run(path), None)
    policy = _policy(path / "policy")[1] if (path / "policy" / CARD_FILE).is_file() else None
    profile = _profile(Profile.load(path / PROFILE_FILE)) if (path / PROFILE_FILE).is_file() else None
    read = draft_facts if config.task == "verified" else eval_facts
    rows = {name: read(path / name) for name in (ROWS_FILE, LONG_ROWS_FILE) if (path / name).is_file()}
    owner = profile or policy
    parts = {
        "policies of seeds": is_sweep or len(_finished_seeds(path)) >= config.seeds,
        "policy": policy is not None,
        ROWS_FILE: ROWS_FILE in rows,
        REPORT_FILE: (path / REPORT_FILE).is_file(),
    }
    missing = [name for name, is_there in parts.items() if not is_there]
    program = "fq sweep" if is_sweep else "python train.py"
    return {
        "model": config.model or "default",
        "model_fingerprint": None if owner is None else owner["model_fingerprint"],
        "task": config.task,
        "text": list(config.text),
        "seeds": config.seeds,
        "finished_seeds": _finished_seeds(path),
        "env_steps": config.steps_per_seed,
        "swept": None if swept is None else {name: list(values) for name, values in swept.items()},
        "policy": policy,
        "profile": profile,
        "rows": rows,
        "missing": f"{', '.join(missing)}; continue with: {program} --resume {path}" if missing else None,
    }


def _finished_seeds(path: Path) -> list[str]:
    folders = (card.parent.parent for card in path.glob(f"**/seeds/*/policy/{CARD_FILE}"))
    return sorted(folder.relative_to(path).as_posix() for folder in folders)


def _plain(path: Path) -> Facts:
    config = check_directory(str(path), path)
    files = weight_files(str(path), path)
    check_stored(str(path), files)
    dtypes: dict[str, int] = {}
    num_tensors = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                part = tensors.get_slice(name)
                dtypes[part.get_dtype()] = dtypes.get(part.get_dtype(), 0) + math.prod(part.get_shape())
                num_tensors += 1
    profile = path / PROFILE_FILE
    return {
        **_config_facts(config),
        "weight_files": [file.name for file in files],
        "tensors": num_tensors,
        "weights": sum(dtypes.values()),
        "weights_by_dtype": dtypes,
        "profile": _profile(Profile.load(profile)) if profile.is_file() else None,
    }


def _gguf(path: Path) -> Facts:
    check_gguf(path)
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        types: dict[str, int] = {}
        for tensor in reader.tensors:
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    except Exception as error:  # the reader checks nothing, and fails wherever a damaged file leads it
        raise InputError(f"{path}: damaged or cut short ({first_line(error)}); download it again") from error
    names = {"layers": "block_count", "hidden_size": "embedding_length", "context_tokens": "context_length"}
    fields = {fact: reader.fields.get(f"{architecture}.{name}") for fact, name in names.items()}
    return {
        "architecture": architecture,
        **{fact: None if field is None else field.contents() for fact, field in fields.items()},
        "tensors": len(reader.tensors),
        "weights": sum(types.values()),
        "weights_by_type": types,
    }


def _config_facts(config: Mapping[str, Any]) -> Facts:
    """What config.json says of a model, whatever the family calls it."""
    text = config.get("text_config")
    entries = {**config, **(text if isinstance(text, dict) else {})}
    names = {
        "layers": ("num_hidden_layers", "n_layer", "num_layers"),
        "hidden_size": ("hidden_size", "n_embd", "d_model"),
        "vocab_size": ("vocab_size",),
    }
    found = {fact: next((entries[key] for key in keys if key in entries), None) for fact, keys in names.items()}
    return {"model_type": config.get("model_type"), "architectures": config.get("architectures"), **found}


def described(facts: Facts, indent: str = "") -> list[str]:
    """Facts as lines for a person: one a line, what is empty left out, long lists by their number."""
    lines = []
    for name, value in facts.items():
        if value is None or value in ([], {}):
            continue
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *described(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            return f"{len(value)} settings"
        many = 12
        rest = f", ... ({len(value)} in all)" if len(value) > many else ""
        return ", ".join(map(_shown, value[:many])) + rest
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value > 9999:
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
