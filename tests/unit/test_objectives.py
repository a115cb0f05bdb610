"""What a micro-batch is optimised for, on scores that are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rl.batch import pack_rollouts, pad_rows
from rl.guidance import Guidance
from rl.objective_settings import LossSettings
from rl.objectives import distillation_objective
from rl.policy import Scores
from rl.replay import Distillation, OldScores
from tests.builders import make_lease, make_prompt, make_rollout


def test_a_token_that_no_teacher_was_asked_about_leaves_the_gradient_finite() -> None:
    rollout = make_rollout(make_lease(prompt=make_prompt(0, token_ids=(1,))), generated=[5, 6], logp_T=[-1.0, -1.0])
    batch = pack_rollouts([rollout], torch.ones(1), torch.zeros(1))
    # alpha is 0 where nobody asked, so that beta_0 / alpha has no value there
    guidance = Guidance(weight_T=torch.tensor([0.0, 0.0, 2.0]), alpha_T=torch.tensor([0.0, 0.0, 0.5]))
    micro = pad_rows(replace(batch, guidance=guidance), [0])
    logp_T, divergence_T = torch.full((2,), -1.0), torch.tensor([3.0, 7.0], requires_grad=True)
    scores = Scores(logp_T, logp_T, torch.ones(2), None, divergence=divergence_T)
    totals: dict[str, Any] = {}
    task = Distillation(mode="topk", beta0=0.1)
    loss = distillation_objective(micro, OldScores.of(scores), scores, totals, task=task, settings=LossSettings())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * 0.1 / 0.5 * 7)
    assert divergence_T.grad is not None and divergence_T.grad.tolist() == pytest.approx([0.0, 2 * 0.1 / 0.5])
    assert totals["sum/distil_tokens"] == 1 and totals["sum/distil_kl"] == 7
