"""Whether clipping and off-policy correction treat long and short answers, and every budget, alike; pure.

A correction that leaves out or damps long answers more often trains the length without saying so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

DECILES = 10


def fairness_metrics(
    rows_M5: torch.Tensor, length_N: Sequence[int], label_N: Sequence[str], *, clip: bool, correction: bool
) -> dict[str, float]:
    """Shares by decile of length (1 the shortest) and by budget, over all passes of a step.

    ``<what>/decile/<d>`` and ``<what>/budget/<label>`` with `clip` (loss tokens whose ratio clip is active), `correction/capped`
    (loss tokens whose weight was cut at the cap) and `correction/rejected` (rollouts left out); `correction/rejected` alone is
    the overall share.

    Shapes: rows_M5 (M, 5) from `rl.replay.rollout_rows`, one row per rollout and pass; length_N in tokens; label_N budget labels.
    """
    if rows_M5.numel() == 0:
        return {}
    index = rows_M5[:, 0].long()
    sums = torch.zeros((len(length_N), 4), dtype=torch.float64).index_add_(0, index, rows_M5[:, 1:].double())
    passes = torch.zeros(len(length_N), dtype=torch.float64).index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    order = sorted(range(len(length_N)), key=lambda i: (length_N[i], i))
    parts = {f"decile/{d + 1}": order[len(order) * d // DECILES : len(order) * (d + 1) // DECILES] for d in range(DECILES)}
    for label in dict.fromkeys(label_N):
        parts[f"budget/{label}"] = [i for i, other in enumerate(label_N) if other == label]
    columns = {"clip": (1, clip), "correction/capped": (2, correction), "correction/rejected": (3, correction)}
    metrics: dict[str, float] = {}
    for name, (column, wanted) in columns.items():
        if not wanted:
            continue
        total = passes if name == "correction/rejected" else sums[:, 0]
        for part, members in parts.items():
            if members:
                metrics[f"{name}/{part}"] = float(sums[members, column].sum() / total[members].sum().clamp(min=1.0))
    if correction:
        metrics["correction/rejected"] = float(sums[:, 3].sum() / passes.sum())
    return metrics


def unfair_rejection(metrics: dict[str, float]) -> str | None:
    """What to say when the correction leaves out the longest answers far more often than the shortest; None when it does not."""
    short, long = metrics.get("correction/rejected/decile/1"), metrics.get(f"correction/rejected/decile/{DECILES}")
    if short is None or long is None or long - short <= 0.1:
        return None
    return (
        f"the correction leaves out {long:.0%} of the longest tenth of answers and {short:.0%} of the shortest, which trains "
        "length; use correction_mask=geometric, or none"
    )
