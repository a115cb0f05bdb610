from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest

from rl.data import DataError, Problem, load_problems
from rl.embedded import tiny_tokenizer
from rl.errors import ConfigError
from rl.prompts import PromptEncoder
from rl.settings import DataSettings, RolloutSettings, WarmStartSettings
from rl.traces import TRACE_BUDGETS, Trace, make_traces, parse_sum

DATA = DataSettings(
    source="reasoning_gym:chain_sum",
    task={"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1},
    size=1,
    held_out=1,
)
ROLLOUT = RolloutSettings(max_length=160)
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def problems() -> Sequence[Problem]:
    return load_problems(DATA, extra=3000).extra


def traces(problems: Sequence[Problem], *, rollout: RolloutSettings = ROLLOUT, **changes: float) -> list[Trace]:
    settings = WarmStartSettings.model_validate(changes)
    return make_traces(problems, settings=settings, rollout=rollout, tokenizer=TOKENIZER, encoder=PromptEncoder(TOKENIZER, DATA))


def text(trace: Trace) -> str:
    return str(TOKENIZER.decode(list(trace.response_ids)))


def mean_length(traces: list[Trace]) -> float:
    return statistics.mean(len(t.response_ids) for t in traces)


def test_the_terms_of_a_sum_carry_their_signs() -> None:
    assert parse_sum("State the final answer to the following arithmetic problem: 4 + 3 - 5 - -6 =") == [4, 3, -5, 6]


@pytest.mark.parametrize("question", ["What is 4 plus 3?", "problem: 4 * 3 =", "problem: 4 + =", "problem: 4 ="])
def test_another_kind_of_question_is_refused(question: str) -> None:
    with pytest.raises(DataError, match="not a chain_sum question(?s:.*)warm_start=null"):
        parse_sum(question)


def test_another_task_is_told_from_an_unknown_word() -> None:
    with pytest.raises(DataError, match="only has a teacher for that task"):
        traces([Problem(question="How many legs do 4 dogs have?", answer="16", entry_json="{}")])


def test_without_errors_and_re_checks_a_trace_is_the_plain_working() -> None:
    problem = Problem(question="State the problem: 4 + 9 - 15 =", answer="-2", entry_json="{}")
    (trace,) = traces([problem], error_rate=0.0, recheck_rate=0.0, budget_share=0.0)
    assert text(trace) == "<think>\n4 + 9 = 13\n13 - 15 = -2\n</think>-2<eos>"
    assert trace.correct
    assert TOKENIZER.decode(list(trace.prompt_ids)) == problem.question


def test_every_trace_opens_once_closes_once_ends_and_fits(problems: Sequence[Problem]) -> None:
    for trace in traces(problems):
        written = text(trace)
        assert len(trace.response_ids) <= 160
        assert written.startswith("<think>")
        assert written.count("<think>") == written.count("</think>") == written.count("<eos>") == 1
        opening = f"<think> I will answer the question with {trace.budget} tokens\n" if trace.budget else "<think>\n"
        assert written.startswith(opening)


def test_correct_means_that_the_written_answer_is_the_reference(problems: Sequence[Problem]) -> None:
    for problem, trace in zip(problems, traces(problems, error_rate=0.2), strict=True):
        answer = text(trace).partition("</think>")[2].removesuffix("<eos>")
        assert trace.correct == (answer == problem.answer)


def test_the_written_answer_is_the_result_of_the_last_line(problems: Sequence[Problem]) -> None:
    for trace in traces(problems, error_rate=0.3):
        working, _, answer = text(trace).removesuffix("<eos>").partition("\n</think>")
        last = working.splitlines()[-1].removesuffix(" ok").removesuffix(" no")
        assert last.endswith(f"= {answer}")


def test_a_re_check_says_ok_exactly_when_it_repeats_the_result_before_it(problems: Sequence[Problem]) -> None:
    seen = set()
    for trace in traces(problems, error_rate=0.3):
        lines = text(trace).splitlines()
        for before, line in zip(lines, lines[1:], strict=False):
            if " check " in line:
                same = before.removesuffix(" ok").removesuffix(" no").split("= ")[1] == line.split("= ")[1].split()[0]
                assert line.endswith(" ok" if same else " no")
                seen.add(same)
    assert seen == {True, False}


def test_the_same_settings_give_the_same_traces_and_more_problems_change_none(problems: Sequence[Problem]) -> None:
    assert traces(problems[:50]) == traces(problems)[:50]
    assert traces(problems[:50]) != traces(problems[:50], seed=1)


def test_the_teacher_errs_and_over_thinks_like_the_model_it_stands_for(problems: Sequence[Problem]) -> None:
    unprompted = [t for t in traces(problems, error_rate=0.18) if t.budget == 0]
    assert 0.57 < statistics.mean(t.correct for t in unprompted) < 0.69
    assert 60 < mean_length(unprompted) < 80
    assert mean_length(traces(problems, recheck_rate=0.0, budget_share=0.0)) < 35


def test_lengths_follow_the_budget_in_order(problems: Sequence[Problem]) -> None:
    budgeted = traces(problems, budget_share=1.0)
    means = [mean_length([t for t in budgeted if t.budget == b]) for b in TRACE_BUDGETS]
    assert means == sorted(means)
    assert means[0] < 52 and means[2] == pytest.approx(64, abs=10) and means[-1] > 90


def test_half_of_the_traces_open_with_a_budget_by_default(problems: Sequence[Problem]) -> None:
    share = statistics.mean(t.budget > 0 for t in traces(problems))
    assert share == pytest.approx(0.5, abs=0.03)


def test_budgets_above_the_cap_are_not_asked_for(problems: Sequence[Problem]) -> None:
    short = traces(problems, rollout=RolloutSettings(max_length=80), budget_share=1.0)
    assert {t.budget for t in short} == {32, 48, 64}
    assert max(len(t.response_ids) for t in short) <= 80


@pytest.mark.parametrize(
    ("budgets", "low", "high"),
    [
        ({"kind": "range", "low": 40, "high": 90}, 40, 90),
        ({"kind": "range", "low": 40, "high": 90, "scale": "log_uniform"}, 40, 90),
        ({"kind": "schedule", "start": 100, "gamma": 0.5}, 50, 100),
        ({"kind": "memory", "start": 64, "floor": 30}, 30, 160),
    ],
)
def test_the_teacher_is_asked_for_any_budget_that_the_run_may_ask_for(
    problems: Sequence[Problem], budgets: dict[str, object], low: int, high: int
) -> None:
    rollout = RolloutSettings.model_validate({"budgets": budgets, "max_length": 160})
    made = traces(problems, rollout=rollout, budget_share=1.0)
    asked = {trace.budget for trace in made}
    assert (min(asked), max(asked)) == (pytest.approx(low, abs=2), pytest.approx(high, abs=2))
    assert low <= min(asked) and max(asked) <= high and len(asked) > 40
    assert all(text(t).startswith(f"<think> I will answer the question with {t.budget} tokens\n") for t in made)


def test_a_log_uniform_range_asks_for_small_budgets_more_often_than_a_uniform_one(problems: Sequence[Problem]) -> None:
    def median(scale: str) -> float:
        budgets = {"kind": "range", "low": 20, "high": 159, "scale": scale}
        rollout = RolloutSettings.model_validate({"budgets": budgets, "max_length": 160})
        return statistics.median(t.budget for t in traces(problems[:1000], rollout=rollout, budget_share=1.0))

    assert median("uniform") == pytest.approx(89.5, abs=6)
    assert median("log_uniform") == pytest.approx(56.6, abs=5)  # sqrt(20 * 160)


def test_the_teacher_reads_a_budget_where_the_run_will_write_it(problems: Sequence[Problem]) -> None:
    words = " I will answer with {budget} tokens"
    behind = RolloutSettings(budgets=[64], max_length=160, budget_place="suffix", budget_template=words)
    (trace,) = traces(problems[:1], rollout=behind, budget_share=1.0)
    question = problems[0].question
    assert TOKENIZER.decode(list(trace.prompt_ids)) == f"{question} I will answer with {trace.budget} tokens"
    assert trace.budget > 0 and text(trace).startswith("<think>\n")
    silent = RolloutSettings(budgets=[64], max_length=160, budget_place="none", hard_budgets=True)
    (trace,) = traces(problems[:1], rollout=silent, budget_share=1.0)
    assert (TOKENIZER.decode(list(trace.prompt_ids)), trace.budget) == (question, 0)


def test_a_cap_below_the_bare_working_is_refused(problems: Sequence[Problem]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.max_length=20 is too short for the working"):
        traces(problems, rollout=RolloutSettings(max_length=20))


def test_the_teacher_thinks_as_long_as_an_effort_asks_for(problems: Sequence[Problem]) -> None:
    words = "I will answer the question with {effort}"
    efforts = {"kind": "effort", "levels": [0.5, 1.0, 3.0]}
    rollout = RolloutSettings.model_validate({"max_length": 160, "budgets": efforts, "effort_template": words})
    found = traces(problems, rollout=rollout, budget_share=1.0)
    lengths = [
        mean_length([t for t in found if text(t).startswith(f"<think> {words[:-8]}{r}")]) for r in ("0.50", "1.00", "3.00")
    ]
    assert 1.25 * lengths[0] < lengths[1] and 1.25 * lengths[1] < lengths[2]
    asked = [t for t in traces(problems, rollout=rollout, budget_share=0.25) if words[:20] in text(t)]
    assert len(asked) / len(problems) == pytest.approx(0.25, abs=0.03)
    assert all(t.budget == 0 for t in found)


def test_the_teacher_answers_some_at_once_only_where_members_may_be_opened_without_thinking(problems: Sequence[Problem]) -> None:
    rollout = RolloutSettings.model_validate({"max_length": 160, "budgets": ["free", "no_think"], "samples_per_prompt": 4})
    at_once = [t for t in traces(problems, rollout=rollout) if text(t).startswith("<think></think>")]
    assert len(at_once) / len(problems) == pytest.approx(0.2, abs=0.03)
    assert all(len(t.response_ids) < 8 for t in at_once) and 0.5 < statistics.mean(t.correct for t in at_once) < 1
    assert not any(text(t).startswith("<think></think>") for t in traces(problems))
