"""The numbers of all requests of an engine, one row per slot, and the one function that shapes logits with them."""

from __future__ import annotations

import numpy as np
import torch

from kernels import TemperatureRule, shape_logits_
from rollout.parameters import RequestShaping
from rollout.reflex import COLUMNS, bias_by_columns, reflex_columns
from rollout.temperature import rule_of

PLAIN_RULE = TemperatureRule(0.0, 0.0, 0.0, tau=0.0)
"""Leaves the temperature alone."""
RULE_COLUMNS = 7
WIDTH = COLUMNS + RULE_COLUMNS + 1
"""Reflex, temperature rule, and how many tokens of the prompt were generated earlier."""


class SlotNumbers:
    """Per slot: the numbers of its request's shaping, on the host, with a copy on the device.

    A slot is overwritten whole by each request that enters it, so nothing of the one before can stay.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.host = torch.zeros((slots, WIDTH), dtype=torch.float64)
        self.host[:, COLUMNS : COLUMNS + RULE_COLUMNS] = PLAIN_RULE.columns(1, torch.device("cpu")).double()
        self.plain = self.host[0].clone()
        self.device_copy = self.host.to(device, copy=True)
        self.reflexive = np.zeros(slots, dtype=bool)
        self.adaptive = np.zeros(slots, dtype=bool)

    def fill(self, slot: int, shaping: RequestShaping) -> None:
        """Set the row of a slot (on the host) to a request's shaping."""
        rule = rule_of(shaping.adaptive) or PLAIN_RULE
        row = [*reflex_columns(shaping.reflex), *rule.columns(1, torch.device("cpu"))[0].tolist(), float(shaping.generated)]
        self.host[slot] = torch.tensor(row, dtype=torch.float64)
        self.reflexive[slot], self.adaptive[slot] = shaping.reflex is not None, shaping.adaptive is not None

    def clear(self, slot: int) -> None:
        """Set a slot back to no shaping."""
        self.host[slot] = self.plain
        self.reflexive[slot] = self.adaptive[slot] = False

    def swap(self, one: int, other: int) -> None:
        """Exchange two slots."""
        pair, swapped = [one, other], [other, one]
        self.host[pair] = self.host[swapped]
        self.reflexive[pair], self.adaptive[pair] = self.reflexive[swapped], self.adaptive[swapped]

    @property
    def shaped(self) -> np.ndarray:
        """Which slots' requests are shaped at all."""
        return self.reflexive | self.adaptive


def shape_rows_(
    logits_BV: torch.Tensor,
    numbers_BF: torch.Tensor,
    generated_B: torch.Tensor,
    closed_B: torch.Tensor,
    *,
    bias_ids: torch.Tensor | None,
    reflexive: bool,
    adaptive: bool,
) -> torch.Tensor:
    """Shape raw logits in place, each row by its request's numbers, and return them; the base temperature is left to the sampler.

    ``z <- (z + bias(t) 1[v in bias_ids]) / factor(H)``; rows without shaping come out bit for bit as they went in.

    Shapes: logits_BV (B, V) float32; numbers_BF (B, 15) rows of :class:`SlotNumbers`; generated_B (B) integer, tokens generated
    before; closed_B (B) bool, whether ``</think>`` is among them. ``reflexive``, ``adaptive``: whether any row is.
    """
    rule = None
    if adaptive:
        rule = TemperatureRule(*numbers_BF[:, COLUMNS : COLUMNS + RULE_COLUMNS].float().unbind(dim=1))
    if not reflexive:
        return shape_logits_(logits_BV, temperature_rule=rule)
    bias_B = bias_by_columns(generated_B, closed_B, numbers_BF[:, :COLUMNS])
    return shape_logits_(logits_BV, temperature_rule=rule, bias_ids=bias_ids, bias_B=bias_B)
