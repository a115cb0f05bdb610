"""Draws a finished or running run from its metrics.jsonl: a table of steps and a figure of accuracy and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rl.console import COLUMNS, STEP_WIDTH, Column, cell
from rl.run_folder import read_lines, replace_text

TABLE_ROWS = 25
"""Rows of the table, about; longer runs are thinned out to every k-th step, first and last always kept."""

Rows = list[dict[str, Any]]

# Okabe-Ito: told apart with any colour vision.
_MAIN, _EVAL = "#0072B2", "#D55E00"
_SMOOTHED_PARTS = 20
_WINDOW_LIMIT = 25


def write_table(metrics_path: Path, out_path: Path, *, columns: tuple[Column, ...] = COLUMNS) -> None:
    """Write the run as a table with the console's columns, evaluations below; Markdown for ``.md``, aligned text otherwise.

    Raises ValueError when the metrics file holds no step.
    """
    rows = _rows(metrics_path)
    trained = [row for row in rows if "time/step" in row or "train/accuracy" in row]
    every = max(1, -(-len(trained) // TABLE_ROWS))
    chosen = [row for i, row in enumerate(trained) if i == 0 or (i + 1) % every == 0 or i == len(trained) - 1]
    steps = [["step", *(column.title for column in columns)]]
    steps += [[str(row["step"]), *(cell(row, column) for column in columns)] for row in chosen]
    parts = [table_text(steps, markdown=out_path.suffix == ".md")] if len(steps) > 1 else []
    evaluations = _evaluations(rows)
    if len(evaluations) > 1:
        parts.append(table_text(evaluations, markdown=out_path.suffix == ".md"))
    replace_text(out_path, "\n".join(parts))


def draw_curves(metrics_path: Path, out_path: Path) -> None:
    """Draw accuracy and response length over steps (raw, smoothed, per budget, evaluations) and one against the other, as PNG.

    Smoothing is the mean of a trailing window. Raises ValueError when the metrics file holds no step.
    """
    rows = _rows(metrics_path)
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    accuracy = figure.add_subplot(grid[0, 0])
    tokens = figure.add_subplot(grid[1, 0], sharex=accuracy)
    frontier = figure.add_subplot(grid[:, 1])
    _draw_over_steps(accuracy, rows, "accuracy")
    _draw_over_steps(tokens, rows, "tokens")
    accuracy.set_ylabel("accuracy (share correct)")
    accuracy.tick_params(labelbottom=False)
    tokens.set_ylabel("response length (tokens)")
    tokens.set_xlabel("step")
    tokens.xaxis.set_major_locator(MaxNLocator(integer=True))
    tokens.set_ylim(bottom=0)
    accuracy.set_ylim(0, 1)
    _draw_frontier(frontier, rows)
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(8, max(1, len(labels))),
        columnspacing=1.2,
        fontsize=9,
        frameon=False,
    )
    for axes in (accuracy, tokens, frontier):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    draft = out_path.with_name(f".{out_path.name}.part")
    canvas.print_figure(draft, dpi=130, format="png")
    draft.replace(out_path)


def _rows(metrics_path: Path) -> Rows:
    """One row per step, in order; a step and an evaluation of the same number are one row."""
    merged: dict[int, dict[str, Any]] = {}
    for line in read_lines(metrics_path):
        merged.setdefault(line["step"], {}).update(line)
    if not merged:
        raise ValueError(f"{metrics_path} holds no step; the run ended before its first report")
    return [merged[step] for step in sorted(merged)]


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, rows without it (or with null) left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


_WORDS = {"free": "no budget", "no_think": "no thinking"}


def _labels(rows: Rows) -> list[str]:
    """Budget labels in the run: numbers and ranges of them (``64-127``) in order, then efforts (``x0.50``), then the words."""
    names = {name.split("/")[1] for row in rows for name in row if name.startswith("budget/")}

    def place(label: str) -> tuple[int, float, str]:
        first = label.partition("-")[0]
        if first.isdigit():
            return 0, float(first), ""
        return (1, float(first[1:]), "") if first.startswith("x") else (2, 0.0, label)

    return sorted(names, key=place)


def _window(count: int) -> int:
    return max(1, min(_WINDOW_LIMIT, count // _SMOOTHED_PARTS))


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, of fewer at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def _colours(labels: list[str]) -> Mapping[str, Any]:
    shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, max(1, sum(label != "free" for label in labels))))
    numbered = dict(zip((label for label in labels if label != "free"), shades, strict=False))
    return {**numbered, "free": "#7f7f7f"}


def _draw_over_steps(axes: Axes, rows: Rows, quantity: str) -> None:
    labels = _labels(rows)
    colours = _colours(labels)
    for label in labels if len(labels) > 1 else []:
        steps, values = _series(rows, f"budget/{label}/{quantity}")
        name = _WORDS.get(label, f"{'effort' if label.startswith('x') else 'budget'} {label}")
        axes.plot(steps, _smoothed(values, _window(len(values))), color=colours[label], linewidth=1.0, label=name)
    steps, values = _series(rows, f"train/{quantity}")
    window = _window(len(values))
    if window > 1:
        axes.plot(steps, values, color=_MAIN, linewidth=0.8, alpha=0.3, label="each step")
    name = f"all rollouts, mean of {window} steps" if window > 1 else "all rollouts"
    axes.plot(steps, _smoothed(values, window), color=_MAIN, linewidth=2.2, label=name)
    steps, values = _series(rows, f"eval/{quantity}")
    if len(values):
        axes.plot(
            steps,
            values,
            "D",
            color=_EVAL,
            markersize=7,
            markeredgecolor="white",
            label="held-out problems",
            zorder=5,
            clip_on=False,
        )


def _draw_frontier(axes: Axes, rows: Rows) -> None:
    both = [row for row in rows if row.get("train/tokens") is not None and row.get("train/accuracy") is not None]
    steps, lengths = _series(both, "train/tokens")
    _, shares = _series(both, "train/accuracy")
    window = _window(len(lengths))
    x, y = _smoothed(lengths, window), _smoothed(shares, window)
    axes.plot(x, y, color=_MAIN, linewidth=1, alpha=0.5)
    points = axes.scatter(x, y, c=steps, cmap="viridis", s=16, zorder=3)
    figure = axes.get_figure()
    if figure is not None and len(steps) > 1:
        figure.colorbar(points, ax=axes, label="step", location="bottom", aspect=40, pad=0.02, ticks=MaxNLocator(integer=True))
    tested = [row for row in rows if row.get("eval/tokens") is not None and row.get("eval/accuracy") is not None]
    for row in tested:
        axes.plot(row["eval/tokens"], row["eval/accuracy"], "D", color=_EVAL, markersize=8, markeredgecolor="white", zorder=5)
    for row in tested if len(tested) <= 2 else (tested[0], tested[-1]):
        where = (row["eval/tokens"], row["eval/accuracy"])
        axes.annotate(f"step {row['step']}", where, xytext=(7, -13), textcoords="offset points", color=_EVAL, fontsize=9)
    axes.set_xlabel("mean response length (tokens); left is cheaper")
    axes.set_ylabel("accuracy (share correct)")
    axes.margins(0.12)


def _evaluations(rows: Rows) -> list[list[str]]:
    tested = [row for row in rows if row.get("eval/accuracy") is not None]
    names = sorted({name for row in tested for name in row if name.startswith("eval/")}, key=lambda name: (name.count("/"), name))
    return [["step", *names]] + [[str(row["step"]), *(_number(row.get(name)) for name in names)] for row in tested]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def table_text(cells: list[list[str]], *, markdown: bool) -> str:
    """Right-aligned cells, first row the titles; a Markdown table, or aligned plain text."""
    widths = [max(STEP_WIDTH, *(len(row[i]) for row in cells)) for i in range(len(cells[0]))]
    padded = [[f"{text:>{width}}" for text, width in zip(row, widths, strict=True)] for row in cells]
    if not markdown:
        return "".join(" ".join(row) + "\n" for row in padded)
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|\n"
    lines = ["| " + " | ".join(row) + " |\n" for row in padded]
    return lines[0] + rule + "".join(lines[1:])
