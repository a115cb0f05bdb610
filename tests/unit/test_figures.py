from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from rl.console import COLUMNS
from rl.figures import _labels, draw_curves, write_table
from rl.run_folder import append_lines


def _metrics(path: Path, *, steps: int) -> Path:
    append_lines(path, [{"step": 0, "eval/accuracy": 0.5, "eval/tokens": 80.0}])
    for step in range(1, steps + 1):
        line = {"step": step, "train/accuracy": 0.5 + step / 1000, "train/tokens": 80.0 - step / 10, "adv/mean": None}
        append_lines(
            path,
            [
                line
                | {"budget/32/accuracy": 0.4, "budget/32/tokens": 30.0, "budget/free/accuracy": 0.6, "budget/free/tokens": 80.0}
            ],
        )
    append_lines(path, [{"step": steps, "eval/accuracy": 0.75, "eval/tokens": 55.0}])
    return path


def test_a_short_run_has_every_step_in_the_table(tmp_path: Path) -> None:
    write_table(_metrics(tmp_path / "metrics.jsonl", steps=3), tmp_path / "table.txt")
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert lines[0].split() == ["step", *(column.title for column in COLUMNS)]
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["1", "0.501", "79.9", "-"],
        ["2", "0.502", "79.8", "-"],
        ["3", "0.503", "79.7", "-"],
    ]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[5].split() == ["step", "eval/accuracy", "eval/tokens"]
    assert [line.split() for line in lines[6:]] == [["0", "0.500", "80.0"], ["3", "0.750", "55.0"]]


def test_a_long_run_is_thinned_out_but_keeps_both_ends(tmp_path: Path) -> None:
    write_table(_metrics(tmp_path / "metrics.jsonl", steps=300), tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().split("\n\n")[0].splitlines()
    steps = [int(line.split("|")[1]) for line in lines[2:]]
    assert steps == [1, *range(12, 301, 12)]
    assert set(lines[1]) == set("|-:")


@pytest.mark.parametrize("steps", [0, 1, 2, 120])
def test_the_figure_is_drawn_for_any_length_of_run(tmp_path: Path, steps: int) -> None:
    draw_curves(_metrics(tmp_path / "metrics.jsonl", steps=steps), tmp_path / "curves.png")
    image = imread(tmp_path / "curves.png")
    assert image.shape[0] > 500 and image.shape[1] > 1000
    assert image[..., :3].min() < 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_budgets_are_in_order_of_their_numbers_then_efforts_then_words(tmp_path: Path) -> None:
    labels = ("no_think", "free", "512-1023", "x1.00-1.41", "64-127", "1", "x0.50", "96", "128-255")
    lines = [
        {"step": s, "train/accuracy": 0.5, "train/tokens": 9.0} | {f"budget/{x}/tokens": 9.0 for x in labels} for s in (1, 2)
    ]
    append_lines(tmp_path / "metrics.jsonl", lines)
    assert _labels(lines) == ["1", "64-127", "96", "128-255", "512-1023", "x0.50", "x1.00-1.41", "free", "no_think"]
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_a_run_without_a_step_is_an_error_not_an_empty_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no step"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with pytest.raises(ValueError, match="holds no step"):
        write_table(tmp_path / "missing.jsonl", tmp_path / "table.md")
