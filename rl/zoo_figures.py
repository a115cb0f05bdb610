"""One picture of a zoo: accuracy against response length, a curve per recipe from the start they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rl.zoo import START, Row

# Okabe-Ito and Tol's muted scheme, without the pale ones: told apart with any colour vision. Beyond twelve recipes they come
# again: every curve is named at its end.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#332288", "#882255", "#117733", "#999933", "#661100", "#44AA99"),
)
_LEAST_SPAN = 0.05
"""Of accuracy: the axis covers so much at least, or it would show noise as a landscape."""
_LABEL_HEIGHT = 0.032
"""Of the axes: two labels closer than this would overlap."""
_LABEL_X = 1.03
"""Labels stand in a column right of the axes, whose right edge is 1."""


def draw_zoo(rows: Sequence[Row], out_path: Path) -> None:
    """Draw the evaluations of every row as a PNG: mean response length against accuracy, without a budget.

    The start is a star; a curve runs from it through a recipe's evaluations to an arrow at the last one, named beside the axes.
    Runs that did not finish are dotted. Raises ValueError when no row has an evaluation.
    """
    drawn = [row for row in rows if row.curve]
    if not drawn:
        raise ValueError("no recipe has an evaluation to draw")
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    start = next((row.curve[0] for row in drawn if row.recipe == START), None)
    recipes = [row for row in drawn if row.recipe != START]
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(recipes))]
    for row, colour in zip(recipes, colours, strict=True):
        _draw_recipe(axes, row, start, colour)
    if start is not None:
        axes.plot(start["tokens"], start["accuracy"], "*", color="black", markersize=15, markeredgecolor="white", zorder=6)
        where = (start["tokens"], start["accuracy"])
        axes.annotate("start", where, xytext=(8, 6), textcoords="offset points", fontsize=9, fontweight="bold")
    axes.set_xlabel("mean response length on held-out problems (tokens); left is cheaper")
    axes.set_ylabel("accuracy (share correct); up is better")
    axes.margins(0.08)
    low, high = axes.get_ylim()
    pad = max(0.0, _LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - pad, high + pad)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _name_ends(axes, recipes, colours)
    draft = out_path.with_name(f".{out_path.name}.part")
    canvas.print_figure(draft, dpi=130, format="png")
    draft.replace(out_path)


def spread_out(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Positions near the wanted ones, in the same order of size, no two closer than ``gap``.

    Neighbours that are too close are moved apart about their common middle, so that a crowd grows evenly to both sides.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    crowds: list[list[int]] = []
    for i in order:
        crowds.append([i])
        while len(crowds) > 1 and _low(crowds[-1], wanted, gap) - _high(crowds[-2], wanted, gap) < gap:
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    placed = [0.0] * len(wanted)
    for crowd in crowds:
        for k, i in enumerate(crowd):
            placed[i] = _low(crowd, wanted, gap) + k * gap
    return placed


def _low(crowd: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return sum(wanted[i] for i in crowd) / len(crowd) - gap * (len(crowd) - 1) / 2


def _high(crowd: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return _low(crowd, wanted, gap) + gap * (len(crowd) - 1)


def _draw_recipe(axes: Axes, row: Row, start: Mapping[str, float] | None, colour: str) -> None:
    points = [*([start] if start is not None else []), *(point for point in row.curve if point["step"] > 0 or start is None)]
    x, y = [point["tokens"] for point in points], [point["accuracy"] for point in points]
    style = "-" if row.status == "finished" else ":"
    axes.plot(x, y, style, color=colour, linewidth=1.6, alpha=0.85)
    axes.plot(x[1 if start is not None else 0 :], y[1 if start is not None else 0 :], "o", color=colour, markersize=4, zorder=4)
    if row.status == "finished" and len(points) > 1 and (x[-1], y[-1]) != (x[-2], y[-2]):
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "mutation_scale": 16, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x[-1], y[-1]), xytext=(x[-2], y[-2]), arrowprops=arrow, zorder=5)


def _name_ends(axes: Axes, rows: Sequence[Row], colours: Sequence[str]) -> None:
    """The recipes' names in a column beside the axes, each at the height of its last point and tied to it by a thin line."""
    low, high = axes.get_ylim()
    wanted = [(row.curve[-1]["accuracy"] - low) / (high - low) for row in rows]
    for row, colour, height in zip(rows, colours, spread_out(wanted, gap=_LABEL_HEIGHT), strict=True):
        axes.annotate(
            row.recipe if row.status == "finished" else f"{row.recipe} ({row.status})",
            (row.curve[-1]["tokens"], row.curve[-1]["accuracy"]),
            xytext=(_LABEL_X, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5, "shrinkB": 4},
        )
