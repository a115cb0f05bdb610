"""What `budget-rl eval` takes for the model, and the figures of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl.collection import Collected
from rl.embedded import build_tiny, tiny_tokenizer
from rl.evaluation import EvalResult, evaluate, evaluated_model, trained_steps
from rl.manifest import begin, commit
from rl.models import at_folder, local_folder
from rl.prompts import PromptEncoder, load_tokenizer
from rl.sampling_state import SamplingState
from rl.settings import ModelSettings, Settings, WarmStartSettings
from rl.types import Group, Lease, Manifest, Prompt, Shaping, WeightVersion
from rollout.budgets import BudgetPlan
from tests.builders import make_prompt, make_rollout, make_scored

TRUSTED = ModelSettings(path="someone/base", trust_remote_code=True, revision="abc123")


def test_a_hub_id_keeps_the_pinned_revision() -> None:
    model = evaluated_model(TRUSTED, Path("someone/other"))
    assert (model.path, model.revision, model.trust_remote_code) == ("someone/other", "abc123", True)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    model = evaluated_model(TRUSTED, tmp_path)
    assert (model.path, model.revision) == (str(tmp_path), None)


def test_a_checkpoint_of_a_model_from_gguf_loads_by_itself(tmp_path: Path) -> None:
    build_tiny(tmp_path / "model", WarmStartSettings(hidden_size=32, layers=1, heads=1))
    base = ModelSettings(path="~/models/base", gguf_file="q4.gguf")
    folder = local_folder(evaluated_model(base, tmp_path))
    assert folder == tmp_path / "model"
    assert load_tokenizer(at_folder(base, folder)).eos_token == "<eos>"


def test_a_folder_with_the_configured_gguf_file_is_converted_as_for_training(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").write_bytes(b"")
    assert evaluated_model(ModelSettings(path="elsewhere", gguf_file="q4.gguf"), tmp_path).gguf_file == "q4.gguf"


@pytest.mark.parametrize(("label", "root"), [("free", "eval"), ("32", "eval/32")])
def test_answers_without_a_score_are_counted_under_every_budget(label: str, root: str) -> None:
    result = EvalResult(label, accuracy=0.5, tokens=40.0, truncated=0.1, unscored=3, scored=())
    assert result.metrics() == {
        f"{root}/accuracy": 0.5,
        f"{root}/tokens": 40.0,
        f"{root}/truncated": 0.1,
        f"{root}/unscored": 3.0,
    }


# -- budgets -----------------------------------------------------------------------------------------------------------------


class _Collector:
    """Answers every lease with the same four tokens, all correct, and keeps what it was asked."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []

    def collect(self, leases: tuple[Lease, ...], **_: object) -> Collected:
        self.leases += leases
        return Collected((Group(make_prompt(0), tuple(make_scored(make_rollout(lease)) for lease in leases)),), (), 0.0, 0.0)


@pytest.mark.parametrize(
    ("budgets", "step", "labels"),
    [
        ([32, 64, "free"], 2, ["free", "32", "64"]),
        ({"kind": "range", "low": 16, "high": 128}, 2, ["free", "16", "72", "128"]),
        ({"kind": "schedule", "start": 100, "gamma": 0.25}, 2, ["free", "50"]),
        ({"kind": "schedule", "start": 100, "gamma": 0.25}, None, ["free", "25"]),
        ({"kind": "memory", "start": 40}, 2, ["free", "40"]),
    ],
)
def test_held_out_problems_are_asked_without_a_budget_and_under_a_few_of_the_source(
    budgets: object, step: int | None, labels: list[str]
) -> None:
    settings = Settings.model_validate(
        {
            "model": {"path": "org/name"},
            "data": {"source": "x.json"},
            "rollout": {
                "budgets": budgets,
                "samples_per_prompt": 6,
                "max_length": 160,
                "budget_place": "suffix",
                "budget_template": " I will answer with {budget} tokens",
            },
            "eval": {"samples": 2, "with_budgets": True},
            "max_steps": 4,
        }
    )
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, settings.data)
    plan = BudgetPlan(settings.rollout, tokenizer, encoder=encoder, max_steps=settings.max_steps)
    prompt = Prompt(id="q", question="4 + 3 =", answer="7", token_ids=encoder.encode("4 + 3 ="))
    collector = _Collector()
    results = evaluate(collector, plan, [prompt], settings, version=9, step=step)  # pyright: ignore[reportArgumentType]
    assert [result.label for result in results] == labels
    asked = [str(tokenizer.decode(list(lease.prompt.token_ids))) for lease in collector.leases]
    words = ["", *(f" I will answer with {label} tokens" for label in labels[1:])]
    assert asked == [f"4 + 3 ={said}" for said in words for _ in range(2)]
    assert {(lease.ticket, lease.min_version) for lease in collector.leases} == {(f"999999.0000.00{m}", 9) for m in range(2)}


@pytest.mark.parametrize(
    ("budgets", "labels"),
    [
        (["free", "no_think"], ["free", "no_think"]),
        ({"kind": "effort", "low": 0.5, "high": 1.5}, ["free", "x0.50", "x0.75", "x1.00", "x1.50"]),
        ({"kind": "effort", "levels": [0.8, 2.0]}, ["free", "x0.80", "x2.00"]),
    ],
)
def test_held_out_problems_are_asked_without_thinking_and_for_the_efforts_of_the_calibration(
    budgets: object, labels: list[str]
) -> None:
    rollout = {"budgets": budgets, "max_length": 160, "effort_template": "I will answer with {effort}"}
    base = {"model": {"path": "org/name"}, "data": {"source": "x.json"}, "max_steps": 1}
    settings = Settings.model_validate({**base, "rollout": rollout, "eval": {"samples": 1, "with_budgets": True}})
    collector = _Collector()
    plan = BudgetPlan(settings.rollout, tiny_tokenizer())
    results = evaluate(collector, plan, [make_prompt(0)], settings, version=0)  # pyright: ignore[reportArgumentType]
    assert [result.label for result in results] == labels


@pytest.mark.parametrize(("shaped", "learnt"), [(False, True), (True, True), (True, False)])
def test_an_evaluation_draws_as_in_training_only_when_it_is_asked_to(
    shaped: bool, learnt: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rollout = {"max_length": 160, "adaptive": {"tau": 0.1}, "reflex": {"period": 40.0}}
    base = {"model": {"path": "org/name"}, "data": {"source": "x.json"}, "max_steps": 1}
    settings = Settings.model_validate({**base, "rollout": rollout, "eval": {"samples": 1, "shaped": shaped, "temperature": 0.6}})
    state = SamplingState()
    if learnt:
        state.learn(settings.rollout, [torch.tensor([0.5, 1.5, 0.01])])
    collector = _Collector()
    plan = BudgetPlan(settings.rollout, tiny_tokenizer())
    evaluate(collector, plan, [make_prompt(0)], settings, version=0, sampling=state)  # pyright: ignore[reportArgumentType]
    (lease,) = collector.leases
    expected = state.shaping(settings.rollout) if shaped else Shaping()
    assert lease.shaping == Shaping(0.6, expected.adaptive, expected.reflex)
    assert ("no entropy statistics yet" in caplog.text) == (shaped and not learnt)


def test_only_a_checkpoint_says_after_how_many_steps_its_schedule_stands(tmp_path: Path) -> None:
    assert trained_steps(tmp_path) is None
    partial = begin(tmp_path / "checkpoints", 30)
    (partial / "state.json").write_text("{}")
    folder = commit(partial, Manifest(30, {}, 0, 0, 0.0, None, WeightVersion(30, ""), 1))
    assert trained_steps(folder) == 30
