"""`fq bench`: one benchmark, after the tests of what it times."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from flexquant_rl.agents.commands.options import BenchCommand
from flexquant_rl.agents.commands.process import FAILURE, print_result
from flexquant_rl.agents.commands.servable import check_exists
from flexquant_rl.agents.config import DraftsBench
from flexquant_rl.agents.progress import say, track
from flexquant_rl.agents.runs.bench_drafts import bench_drafts
from flexquant_rl.agents.runs.bench_env import bench_env
from flexquant_rl.engine.benches.decode import bench_decode
from flexquant_rl.engine.benches.gemv import bench_gemv
from flexquant_rl.engine.benches.gptq import bench_gptq
from flexquant_rl.engine.benches.harness import BenchRefusedError, Row, run_bench, run_tests, table
from flexquant_rl.engine.benches.options import DecodeBench, GemvBench, GptqBench, PolicyBench, VerifyBench
from flexquant_rl.engine.benches.policy import bench_policy
from flexquant_rl.engine.benches.verify import bench_verify
from flexquant_rl.fq_env.text_files import documents_of


def _check_drafts(what: DraftsBench) -> None:
    """Raises InputError on policies and text that there are none of: the tests, which come first, take minutes."""
    for policy in what.policy:
        check_exists(policy)
    for path in what.text:
        next(documents_of(path, text_field=what.text_field))


def bench(command: BenchCommand) -> None:
    """Times, and prints table and rows."""
    what = command.what
    what.validate()
    if isinstance(what, DraftsBench):
        _check_drafts(what)

    def rounds(items: Iterable[int]) -> Iterable[int]:
        return track(items, f"timing {what.name}")

    def measure() -> list[Row]:
        if isinstance(what, GemvBench):
            return bench_gemv(what, rounds)
        if isinstance(what, VerifyBench):
            return bench_verify(what, rounds, say)
        if isinstance(what, DecodeBench):
            return bench_decode(what, rounds, say)
        if isinstance(what, PolicyBench):
            return bench_policy(what, rounds)
        if isinstance(what, GptqBench):
            return bench_gptq(what, rounds)
        if isinstance(what, DraftsBench):
            return bench_drafts(what, rounds, say)
        return bench_env(what, rounds)

    try:
        result = run_bench(what.name, what.tests, measure, path=what.json, progress=say, gate=run_tests)
    except BenchRefusedError as error:  # neither bad input nor a bug that its traceback would explain
        say(f"error: {error}")
        sys.exit(FAILURE)
    print(table(result["rows"]))
    print_result(result)
