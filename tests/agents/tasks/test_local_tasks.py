"""Tasks made of files: the true answer stands in the text, wrong ones elsewhere, and the same files make the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import write_text

from flexquant_rl.agents.tasks.local_tasks import LOCAL_TASKS, SOURCE, MadeTask, make_task
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env.text_files import documents_of

CODE = "".join(
    f"def function_{index}(first, second):\n    value = first + {index} * second\n\n\n" for index in range(99)
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", num_chunks=12)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "code.py"
    path.write_text(CODE, encoding="utf-8")
    return path


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n} + {n}?", "answer": f"{n} + {n} = {2 * n}.\n#### {2 * n:,}"} for n in range(600, 620)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_one_passage_follows_and_three_do_not(text: Path) -> None:
    made = make_task(LOCAL_TASKS["continuation"], [text]).documents
    documents = [*documents_of(text)]
    assert len(made) == len(documents) > 4
    for document in made:
        (own,) = (whole for whole in documents if whole.startswith(document["context"]))
        follows = [own.startswith(f"{document['context']} {choice}") for choice in document["choices"]]
        assert follows == [place == document["gold"] for place in range(4)]
        others = [choice for place, choice in enumerate(document["choices"]) if place != document["gold"]]
        assert all(any(f" {choice}" in whole for whole in documents if whole is not own) for choice in others)
        assert len({*document["choices"]}) == 4
    assert len({document["gold"] for document in made}) > 1
    assert len({document[SOURCE] for document in made}) == len(made)


def test_files_take_turns(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8").upper(), encoding="utf-8")
    made = make_task(LOCAL_TASKS["continuation"], [text, other]).documents
    assert [document["context"].isupper() for document in made[:4]] == [False, True, False, True]
    # Wrong choices are of the same file: its style gives nothing away.
    assert all(
        {choice.isupper() for choice in document["choices"]} == {document["context"].isupper()} for document in made
    )


def test_a_line_goes_on_where_its_first_half_ends(code: Path) -> None:
    made = make_task(LOCAL_TASKS["line"], [code]).documents
    assert made
    for document in made:
        assert f"{document['context']} {document['answer']}\n" in CODE
        assert 300 < len(document["context"]) < 900
        assert "\n" not in document["answer"]


def test_the_standard_library_stands_in_and_its_modules_stay_together() -> None:
    made = make_task(LOCAL_TASKS["line"], []).documents
    sources = [document[SOURCE] for document in made]
    assert len(made) > 100 > len({*sources}) > 5


def test_rows_end_with_newlines_alone(tmp_path: Path) -> None:
    """JSON strings may hold other separators as they are, and programs that do not escape them write them so."""
    path, separators = tmp_path / "rows.jsonl", "\u2028 \u2029 \x85"
    rows = [{"question": f"a {separators} {number}", "answer": f"#### {number}"} for number in range(6)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    made = make_task(LOCAL_TASKS["gsm8k"], [path]).documents
    assert [document["question"] for document in made] == [row["question"] for row in rows]


def test_answers_are_numbers_and_examples_are_not_asked(gsm8k: Path, tmp_path: Path) -> None:
    made = make_task(LOCAL_TASKS["gsm8k"], [gsm8k])
    assert made.documents[0]["number"] == "1200"
    made.write(tmp_path / "tasks")
    lines = {name: (tmp_path / "tasks" / f"gsm8k{name}.jsonl").read_text().splitlines() for name in ("", "-examples")}
    assert (len(lines[""]), len(lines["-examples"])) == (17, 3)
    assert not {*lines[""]} & {*lines["-examples"]}


@pytest.mark.parametrize("name", ["continuation", "line"])
def test_the_same_files_make_the_same_task(name: str, text: Path, code: Path) -> None:
    path = text if name == "continuation" else code
    assert make_task(LOCAL_TASKS[name], [path]) == make_task(LOCAL_TASKS[name], [path])
    changed = MadeTask(LOCAL_TASKS[name], make_task(LOCAL_TASKS[name], [path]).documents[1:])
    assert changed.sha256 != make_task(LOCAL_TASKS[name], [path]).sha256


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short for a passage.", encoding="utf-8")
    with pytest.raises(InputError, match="0 documents for task continuation .*give more text"):
        make_task(LOCAL_TASKS["continuation"], [short])
    with pytest.raises(InputError, match="task gsm8k is made of files; name them with --gsm8k FILE"):
        make_task(LOCAL_TASKS["gsm8k"], [])
    rows = tmp_path / "rows.jsonl"
    for content, said in (
        ('{"question": "1?", "answer": "2"}', ":1 is no row of GSM8K"),
        ("{", "cannot be read as JSON"),
    ):
        rows.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=said):
            make_task(LOCAL_TASKS["gsm8k"], [rows])
