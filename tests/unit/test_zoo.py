"""What a zoo says about runs that are on disk: table, JSON, picture, tracking."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from rl.evaluation import EvalResult, write_per_problem
from rl.run_folder import RunFolder, append_lines
from rl.settings import TrackingSettings
from rl.types import BudgetKind, VerdictStatus
from rl.zoo import (
    Evaluation,
    Result,
    Row,
    Status,
    ZooError,
    caps_text,
    compare,
    figures_text,
    metrics_of,
    read_evaluation,
    read_result,
    write_reports,
)
from rl.zoo_figures import draw_zoo, spread_out
from rl.zoo_tracking import PARENT_TAG, track_zoo
from tests.builders import make_lease, make_rollout, make_scored

Given = Mapping[str, Sequence[tuple[int, int]]]
"""Problem -> (right, length) of each answer."""

BEFORE: Given = {"a": [(1, 100), (0, 100)], "b": [(0, 159), (1, 41)]}
AFTER: Given = {"a": [(1, 40), (1, 40)], "b": [(0, 80), (1, 40)]}


def answers(given: Given) -> dict[str, dict[str, Any]]:
    """As an evaluation writes them."""
    return {
        problem: {
            "accuracy": sum(c for c, _ in each) / len(each),
            "tokens": sum(n for _, n in each) / len(each),
            "correct": [c for c, _ in each],
            "lengths": [n for _, n in each],
        }
        for problem, each in given.items()
    }


def evaluation(step: int, given: Given, *, budgets: Mapping[int, Given] | None = None) -> Evaluation:
    return Evaluation(step, 1000.0 * step, answers(given), {b: answers(each) for b, each in (budgets or {}).items()})


def result(
    *evaluations: Evaluation, recipe: str = "grpo", status: Status = "finished", kind: BudgetKind | None = None, error: str = ""
) -> Result:
    return Result(recipe, status, error, 4, 4000.0, 1.5, evaluations, kind)


def write_run(folder: Path, *, steps: int, evaluated: Mapping[int, Mapping[str, Given]]) -> Path:
    """A run folder as training leaves it: metrics of every step and a file for each evaluation, by label."""
    folder.mkdir(parents=True)
    for step in range(steps + 1):
        if step:
            append_lines(folder / "metrics.jsonl", [{"step": step, "tokens/total": 500.0 * step, "time/step": 30.0}])
        if step in evaluated:
            content = {"step": step, "results": {label: answers(given) for label, given in evaluated[step].items()}}
            (folder / f"eval-{step}.json").write_text(json.dumps(content))
            append_lines(folder / "metrics.jsonl", [{"step": step, "eval/accuracy": 0.5, "time/eval": 9.0}])
    return folder


# -- reading -----------------------------------------------------------------------------------------------------------------


def test_a_run_is_read_with_its_tokens_minutes_and_evaluations(tmp_path: Path) -> None:
    evaluated = {0: {"free": BEFORE}, 2: {"free": AFTER, "32": BEFORE, "x1.50": AFTER}}
    found = read_result(write_run(tmp_path / "grpo", steps=3, evaluated=evaluated), "grpo", status="finished")
    assert (found.steps, found.tokens_spent, found.minutes) == (3, 1500.0, 1.5)
    assert [(e.step, e.tokens_spent) for e in found.evaluations] == [(0, 0.0), (2, 1000.0)]
    assert found.evaluations[1].free == answers(AFTER)
    assert found.evaluations[1].budgets == {32: answers(BEFORE)}


def test_an_evaluation_is_written_answer_by_answer_and_read_back(tmp_path: Path) -> None:
    asked = [make_lease(group=0, member=0), make_lease(group=0, member=1), make_lease(group=1)]
    lengths, verdicts = (3, 5, 2), (VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.TRUNCATED)
    scored = tuple(
        make_scored(make_rollout(lease, generated=[8] * length), status=verdict)
        for lease, length, verdict in zip(asked, lengths, verdicts, strict=True)
    )
    write_per_problem(tmp_path / "eval-7.json", [EvalResult("free", 0.0, 0.0, 0.0, 0, scored)], step=7)
    found = read_evaluation(tmp_path / "eval-7.json", tokens_spent=9.0)
    assert (found.step, found.tokens_spent, found.budgets) == (7, 9.0, {})
    assert found.free == {
        "q0": {"accuracy": 0.5, "tokens": 4.0, "correct": [1, 0], "lengths": [3, 5]},
        "q1": {"accuracy": 0.0, "tokens": 2.0, "correct": [0], "lengths": [2]},
    }


def test_an_evaluation_of_a_course_that_was_left_is_not_read(tmp_path: Path) -> None:
    """A resume cuts metrics.jsonl back to the checkpoint; files of later evaluations stay."""
    folder = write_run(tmp_path / "grpo", steps=1, evaluated={1: {"free": AFTER}})
    (folder / "eval-9.json").write_text("damaged")
    assert [e.step for e in read_result(folder, "grpo", status="unfinished").evaluations] == [1]


def test_a_run_that_never_began_is_read_as_nothing(tmp_path: Path) -> None:
    found = read_result(tmp_path / "none", "grpo", status="failed", error="no model")
    assert (found.steps, found.tokens_spent, found.evaluations) == (0, 0.0, ())


@pytest.mark.parametrize(
    "text", [None, "{", '{"step": 0, "results": {"free": {"a": {"accuracy": 1.0}}}}', '{"step": 0, "results": {"free": {}}}']
)
def test_an_evaluation_without_answers_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "eval-0.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ZooError, match=r"eval-0\.json"):
        read_evaluation(path)


# -- comparing ---------------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_recipe_are_those_worked_by_hand() -> None:
    start, row = compare(evaluation(0, BEFORE), [result(evaluation(4, AFTER))], max_length=160)
    assert (start.recipe, start.accuracy, start.tokens, start.aes, start.gain) == ("start", 0.5, 100.0, None, None)
    assert (row.accuracy, row.tokens, row.steps, row.tokens_spent, row.minutes) == (0.75, 50.0, 4, 4000.0, 1.5)
    assert row.aes == pytest.approx(0.5 + 3 * 0.5)  # half as long, and half again as often right
    assert row.tokens_per_correct == pytest.approx(50 / 0.75)
    assert row.accuracy_at == {20: 0.0, 40: 0.75, 80: 0.75, 160: 0.75}
    assert start.accuracy_at == {20: 0.0, 40: 0.0, 80: 0.25, 160: 0.5}
    # The recipe is nowhere below the start, so it is the frontier; the start lacks .75 at 40, .5 up to 99, .25 up to 160.
    assert row.gap == 0.0
    assert start.gap == pytest.approx((0.75 + 59 * 0.5 + 61 * 0.25) / 160)
    assert row.gain is not None and row.gain.estimate == pytest.approx(0.25)
    # Problem a gains .5, problem b nothing: the draws are 0, .25 and .5.
    assert (row.gain.low, row.gain.high) == (0.0, 0.5)


def test_an_earlier_evaluation_counts_for_the_frontier_and_the_curve() -> None:
    _, row = compare(evaluation(0, BEFORE), [result(evaluation(2, AFTER), evaluation(4, BEFORE))], max_length=160)
    assert [(p["step"], p["tokens_spent"], p["accuracy"]) for p in row.curve] == [(2, 2000.0, 0.75), (4, 4000.0, 0.5)]
    assert row.accuracy == 0.5 and row.gap is not None and row.gap > 0


@pytest.mark.parametrize(
    ("kind", "kept", "distance"), [(BudgetKind.AT_MOST, 0.5, None), (BudgetKind.EXACT, None, 17.0), (None, None, None)]
)
def test_budgets_are_kept_or_missed_according_to_their_kind(
    kind: BudgetKind | None, kept: float | None, distance: float | None
) -> None:
    asked = {32: {"a": [(1, 30)], "b": [(0, 40)]}, 64: {"a": [(1, 20)], "b": [(0, 78)]}}  # away by 2, 8, 44 and 14
    _, row = compare(evaluation(0, BEFORE), [result(evaluation(4, AFTER, budgets=asked), kind=kind)], max_length=160)
    assert (row.kept, row.distance) == (kept, distance)


def test_only_problems_that_all_evaluations_have_are_compared() -> None:
    with_more = {**AFTER, "c": [(0, 160)]}
    _, row = compare(evaluation(0, BEFORE), [result(evaluation(4, with_more))], max_length=160)
    assert (row.accuracy, row.tokens) == (0.75, 50.0)
    with pytest.raises(ZooError, match="share no problem"):
        compare(evaluation(0, BEFORE), [result(evaluation(4, {"c": [(0, 160)]}))], max_length=160)


def test_a_start_without_right_answers_has_no_aes_and_a_recipe_without_any_no_cost() -> None:
    nothing: Given = {"a": [(0, 100)], "b": [(0, 100)]}
    start, row = compare(evaluation(0, nothing), [result(evaluation(4, nothing))], max_length=160)
    assert (row.aes, row.tokens_per_correct, start.tokens_per_correct) == (None, None, None)
    assert row.gain is not None and row.gain.estimate == 0.0


def test_a_failed_recipe_is_in_the_table_without_figures() -> None:
    failed = result(evaluation(2, AFTER), status="failed", error="the disk is full")
    start, row = compare(evaluation(0, BEFORE), [failed], max_length=160)
    assert (row.status, row.error, row.accuracy, row.aes, row.gain) == ("failed", "the disk is full", None, None, None)
    assert len(row.curve) == 1
    line = figures_text([start, row], markdown=False).splitlines()[-1].split()
    assert line == ["grpo", "4", "4,000", "failed", "-", "-", "-", "-", "-", "-", "1.5"]


def test_without_any_evaluation_there_is_still_a_table() -> None:
    rows = compare(None, [result(status="failed", error="no model")], max_length=160)
    assert [(row.recipe, row.status) for row in rows] == [("grpo", "failed")]
    assert caps_text(rows, markdown=True) == ""


def test_a_finished_run_without_evaluation_is_an_error_not_an_empty_line() -> None:
    with pytest.raises(ZooError, match="grpo was never evaluated"):
        compare(evaluation(0, BEFORE), [result()], max_length=160)


# -- writing -----------------------------------------------------------------------------------------------------------------


def some_rows(count: int = 1) -> list[Row]:
    runs = [result(evaluation(2, BEFORE), evaluation(4, AFTER), recipe=f"recipe{i}") for i in range(count)]
    return compare(evaluation(0, BEFORE), [*runs, result(status="failed", recipe="broken", error="no room")], max_length=160)


def test_the_reports_hold_figures_caps_failures_and_notes(tmp_path: Path) -> None:
    write_reports(tmp_path, some_rows(), allowance=60_000, notes=["mind the words"])
    text = (tmp_path / "zoo.md").read_text()
    assert "60,000 response tokens" in text
    assert "- broken failed: no room" in text and "- mind the words" in text
    line = next(line for line in text.splitlines() if line.strip("| ").startswith("recipe0"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("recipe0", "4", "4,000", "0.750", "+25.0 [+0.0, +50.0]", "50.0", "+2.00", "66.7", "-", "0.000", "1.5"),
    ]
    content = json.loads((tmp_path / "zoo.json").read_text())
    assert [row["recipe"] for row in content["rows"]] == ["start", "recipe0", "broken"]
    assert content["rows"][1]["aes"] == pytest.approx(2.0) and content["max_tokens"] == 60_000


def test_only_figures_that_are_known_become_metrics() -> None:
    found = metrics_of(some_rows())
    assert found["recipe0/aes"] == pytest.approx(2.0) and found["start/accuracy"] == 0.5
    assert "start/aes" not in found and "recipe0/kept" not in found and "broken/accuracy" not in found


@pytest.mark.parametrize("count", [1, 6, 25])
def test_a_picture_is_drawn_of_any_number_of_recipes(tmp_path: Path, count: int) -> None:
    draw_zoo(some_rows(count), tmp_path / "zoo.png")
    image = imread(tmp_path / "zoo.png")
    assert image.shape[0] > 500 and image.shape[1] > 900
    assert image[..., :3].min() < 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.png"]


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe"):
        draw_zoo(compare(None, [result(status="failed")], max_length=160), tmp_path / "zoo.png")


def test_labels_that_would_overlap_are_moved_apart_about_their_middle() -> None:
    assert spread_out([0.1, 0.9], gap=0.2) == [0.1, 0.9]
    assert spread_out([0.5, 0.5], gap=0.2) == pytest.approx([0.4, 0.6])
    assert spread_out([0.7, 0.5, 0.6], gap=0.2) == pytest.approx([0.8, 0.4, 0.6])
    # A crowd that grows into its neighbour takes it in.
    assert spread_out([0.5, 0.5, 0.65], gap=0.2) == pytest.approx([0.35, 0.55, 0.75])
    assert spread_out([], gap=0.2) == []


def test_one_mlflow_run_holds_the_zoo_and_is_the_parent_of_its_recipes(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    (tmp_path / "start.yaml").write_text("seed: 0\n")
    (tmp_path / "zoo.md").write_text("# table\n")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    child = client.create_run(client.create_experiment("budget-rl")).info.run_id
    runs = [RunFolder(tmp_path / name) for name in ("grpo", "never-began")]
    runs[0].path.mkdir()
    runs[0].mlflow_run.write_text(json.dumps({"run_id": child, "store": "here"}))
    for _ in range(2):
        track_zoo(
            TrackingSettings(),
            RunFolder(tmp_path / "zoo"),
            config=tmp_path / "start.yaml",
            params={"max_tokens": 7},
            metrics={"grpo/aes": 0.5},
            artifacts=[tmp_path / "zoo.md"],
            runs=runs,
            complete=True,
        )
    parent = json.loads((tmp_path / "zoo" / "mlflow-run.json").read_text())["run_id"]
    found = client.get_run(parent)
    assert (found.info.status, found.data.metrics, found.data.params) == ("FINISHED", {"grpo/aes": 0.5}, {"max_tokens": "7"})
    assert {file.path for file in client.list_artifacts(parent)} == {"start.yaml", "zoo.md"}
    assert client.get_run(child).data.tags[PARENT_TAG] == parent
    assert len(client.search_runs([found.info.experiment_id])) == 2
