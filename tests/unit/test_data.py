from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rl.data import DataError, Problems, load_problems, normalise, to_json
from rl.settings import DataSettings

SUMS = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}


def sums(**changes: Any) -> DataSettings:
    values = {"source": "reasoning_gym:chain_sum", "task": SUMS, "size": 300, "held_out": 50} | changes
    return DataSettings(**values)


def questions(problems: Problems) -> list[str]:
    return [normalise(p.question) for p in problems.held_out + problems.train + problems.extra]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files read by a test are converted inside its own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, count: int) -> Path:
    rows = [{"question": f"What is {i} + 1?", "answer": i + 1, "level": "easy"} for i in range(count)]
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def test_the_embedded_task_has_at_least_20000_distinct_questions_and_its_parts_share_none() -> None:
    problems = load_problems(sums(size=8192, held_out=256), extra=20_000)
    assert (len(problems.train), len(problems.held_out), len(problems.extra)) == (8192, 256, 20_000)
    assert len(set(questions(problems))) == 8192 + 256 + 20_000


def test_held_out_problems_are_the_same_whatever_else_is_asked_for() -> None:
    small, large = load_problems(sums()), load_problems(sums(size=2000), extra=500)
    assert small.held_out == large.held_out
    assert small.train == large.train[:300]


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    first, again, other = (load_problems(sums(seed=s)) for s in (3, 3, 4))
    assert first == again
    assert len(set(questions(first)) & set(questions(other))) < 35  # only the few 3-term sums may come up in both


def test_the_entry_holds_all_that_a_reasoning_gym_scorer_needs() -> None:
    import reasoning_gym

    problem = load_problems(sums()).train[0]
    entry = json.loads(problem.entry_json)
    assert entry["question"] == problem.question
    assert entry["metadata"]["source_dataset"] == "chain_sum"
    assert reasoning_gym.get_score_answer_fn("chain_sum")(answer=problem.answer, entry=entry) == 1.0


def test_the_id_is_the_start_of_the_hash_of_the_question() -> None:
    problem = load_problems(sums()).train[0]
    assert problem.id == hashlib.sha256(problem.question.encode()).hexdigest()[:16]


def test_a_task_that_is_too_small_says_how_many_questions_it_has() -> None:
    tiny = sums(task={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})  # 10 * 10 * {+, -}
    with pytest.raises(DataError, match="gave 200 distinct questions"):
        load_problems(tiny)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(DataError, match="no task 'chain_sums'; did you mean chain_sum"):
        load_problems(sums(source="reasoning_gym:chain_sums"))


def test_an_unknown_task_parameter_names_the_nearest() -> None:
    with pytest.raises(DataError, match="no parameter 'max_term'; did you mean max_terms"):
        load_problems(sums(task={"max_term": 4}))


def test_task_parameters_that_contradict_each_other_are_refused_with_the_reason() -> None:
    with pytest.raises(DataError, match="max_terms must be >= min_terms"):
        load_problems(sums(task={"min_terms": 5, "max_terms": 3}))


def test_a_seed_among_the_task_parameters_is_sent_to_its_own_key() -> None:
    with pytest.raises(DataError, match=r"set data\.seed instead"):
        load_problems(sums(task={"seed": 1}))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json"])
def test_every_file_format_gives_the_same_problems(name: str, tmp_path: Path, cache: None) -> None:
    path = write_rows(tmp_path / name, 40)
    problems = load_problems(DataSettings(source=str(path), held_out=10), extra=5)
    assert (len(problems.train), len(problems.held_out), len(problems.extra)) == (25, 10, 5)
    assert set(questions(problems)) == {f"What is {i} + 1?" for i in range(40)}
    first = problems.train[0]
    assert json.loads(first.entry_json) == {"question": first.question, "answer": int(first.answer), "level": "easy"}


def test_a_file_is_read_up_to_the_size_asked_for(tmp_path: Path, cache: None) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 40)
    assert len(load_problems(DataSettings(source=str(path), held_out=10, size=12)).train) == 12


def test_questions_that_differ_only_in_white_space_are_one(tmp_path: Path, cache: None) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["What is 1 + 1?", "What  is 1 + 1?", " What is 1 + 1?\n", "What is 2 + 2?", "What is 3 + 3?"]
    path.write_text("".join(json.dumps({"question": q, "answer": "2"}) + "\n" for q in texts))
    problems = load_problems(DataSettings(source=str(path), held_out=1))
    assert sorted(questions(problems)) == ["What is 1 + 1?", "What is 2 + 2?", "What is 3 + 3?"]


def test_a_missing_file_names_the_nearest_beside_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 1)
    with pytest.raises(DataError, match=r"no file .*trian\.jsonl; did you mean train\.jsonl"):
        load_problems(DataSettings(source=str(tmp_path / "trian.jsonl")))


def test_a_missing_column_names_those_that_exist(tmp_path: Path, cache: None) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 5)
    settings = DataSettings(source=str(path), answer_column="anwser")
    with pytest.raises(
        DataError, match=r"data\.answer_column.*'anwser'; did you mean answer\? \(there are: answer, level, question\)"
    ):
        load_problems(settings)


@pytest.mark.parametrize("content", ["", "[]"])
def test_an_empty_file_is_refused(content: str, tmp_path: Path, cache: None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match="rows"):
        load_problems(DataSettings(source=str(path)))


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, cache: None) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("not a table")
    with pytest.raises(DataError, match="could not be read as parquet"):
        load_problems(DataSettings(source=str(path)))


def test_a_file_too_small_for_the_held_out_part_is_refused(tmp_path: Path, cache: None) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 40)
    with pytest.raises(DataError, match=r"40 distinct questions; data\.held_out=40"):
        load_problems(DataSettings(source=str(path), held_out=40))


def test_a_row_without_an_answer_is_refused(tmp_path: Path, cache: None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": null}\n')
    with pytest.raises(DataError, match="no value in column 'answer'"):
        load_problems(DataSettings(source=str(path), held_out=1))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_list_of_answers_gives_several_golds_in_its_order(name: str, tmp_path: Path, cache: None) -> None:
    path = tmp_path / name
    rows = [{"question": "Half?", "answer": ["1/2", "0.5"]}, {"question": "One?", "answer": ["1"]}]
    if name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(DataSettings(source=str(path), held_out=1))
    golds = {p.question: (p.answer, p.other_answers) for p in problems.held_out + problems.train}
    assert golds == {"Half?": ("1/2", ("0.5",)), "One?": ("1", ())}


@pytest.mark.parametrize("answers", ["[]", '["1", null]'])
def test_a_row_whose_list_of_answers_has_a_gap_is_refused(answers: str, tmp_path: Path, cache: None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": ["1"]}\n{"question": "b", "answer": ' + answers + "}\n")
    with pytest.raises(DataError, match="no value in column 'answer'"):
        load_problems(DataSettings(source=str(path), held_out=1))


def test_an_unreachable_hub_says_to_give_a_local_file() -> None:
    script = "from rl.data import *; load_problems(DataSettings(source='some/dataset'))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "could not fetch 'some/dataset' from the hub" in done.stderr
    assert ".parquet/.json/.jsonl file as data.source" in done.stderr


def test_loading_problems_needs_no_torch() -> None:
    script = (
        "import sys; from rl.data import *; "
        "load_problems(DataSettings(source='reasoning_gym:chain_sum', size=5, held_out=5)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_values_that_json_cannot_hold_become_text() -> None:
    value = {(1, 2): datetime.date(2020, 1, 2), "list": (1, float("nan"), None, True)}
    assert json.loads(to_json(value)) == {"(1, 2)": "2020-01-02", "list": [1, "nan", None, True]}
