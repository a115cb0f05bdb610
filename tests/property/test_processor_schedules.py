"""A thousand random schedules of requests: no state leaks from one to another, and both vLLM interfaces give the same rows."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from rl.behaviour import Vocabulary
from rl.embedded import VOCABULARY, tiny_tokenizer
from rollout.processor import ShapingProcessor
from tests.processor_world import (
    DRAFTS,
    LENGTH,
    SLOTS,
    Request,
    RowsOfV1,
    SlotsOfV2,
    random_request,
    stand_in_config,
    tiny_vocabulary,
)

SCHEDULES, STEPS, TOKENS = 1000, 8, len(VOCABULARY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processors(folder: Path) -> tuple[ShapingProcessor, SlotsOfV2]:
    """One of each for all schedules, as an engine keeps its own for all its requests."""
    return ShapingProcessor(stand_in_config(folder), torch.device("cpu"), False), SlotsOfV2(folder)


def _check_rows(
    present: list[Request], rows: RowsOfV1, slots: SlotsOfV2, random: Random, vocabulary: Vocabulary, generator: torch.Generator
) -> None:
    drafts = {id(r): [random.choice((5, vocabulary.end)) for _ in range(random.randrange(DRAFTS + 1))] for r in present}
    raw = {id(r): torch.randn(1 + len(drafts[id(r)]), TOKENS, generator=generator) * 3 for r in present}
    raw |= {id(r): torch.randn(1, TOKENS, generator=generator) for r in rows.rows if id(r) not in raw}
    v1 = rows.processor.apply(torch.stack([raw[id(r)][0] for r in rows.rows]))
    order = random.sample(present, len(present))
    context = slots.context(order, drafts)
    v2 = slots.processor.apply(torch.cat([raw[id(r)] for r in order]), context)
    again = slots.processor.apply(torch.cat([raw[id(r)] for r in order]), context)
    assert torch.equal(v2, again)  # a second call in the same step changes nothing
    cut = random.randrange(len(order) + 1)  # large steps are handed over in parts, whole requests each
    parts = [
        slots.processor.apply(torch.cat([raw[id(r)] for r in part]), slots.context(part, drafts))
        for part in (order[:cut], order[cut:])
        if part
    ]
    assert torch.equal(v2, torch.cat(parts))
    start = 0
    for request in order:
        found = v2[start : start + len(raw[id(request)])]
        start += len(found)
        own = v1[next(i for i, r in enumerate(rows.rows) if r is request)]
        assert torch.equal(own, found[0])
        for k, row in enumerate(found):
            expected = request.expected(raw[id(request)][k], vocabulary, drafts[id(request)][:k])
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=2e-5)
            if request.shaping.reflex is None and request.shaping.adaptive is None:
                assert torch.equal(row, raw[id(request)][k])


def test_a_thousand_random_schedules_never_mix_requests_and_both_interfaces_agree(
    processors: tuple[ShapingProcessor, SlotsOfV2],
) -> None:
    v1, slots = processors
    vocabulary, generator = tiny_vocabulary(), torch.Generator().manual_seed(0)
    rows = RowsOfV1(v1)
    shaped = closed = preempted_closed = 0
    for schedule in range(SCHEDULES):
        random = Random(schedule)
        running, waiting = list(rows.rows), []  # what the schedule before left behind goes on, or is aborted below
        for _ in range(STEPS):
            for request in list(running):
                full = len(request.prompt) + len(request.output) > LENGTH - DRAFTS - 3
                if full or random.random() < 0.2:  # finished, aborted or preempted
                    running.remove(request)
                    rows.leave(request)
                    slots.leave(request)
                    if not full and random.random() < 0.4:
                        waiting.append(request)  # preempted: it comes back with what it had
                        preempted_closed += vocabulary.end in request.output
            entering = [waiting.pop() for _ in range(len(waiting)) if random.random() < 0.6]
            entering += [random_request(random, vocabulary, TOKENS) for _ in range(random.randrange(3))]
            entering = entering[: SLOTS - len(running)]
            for request in entering:
                slots.enter(request, random)
            slots.processor.apply_staged_writes()
            rows.step(entering, random)
            running += entering
            if not running:
                continue
            # Some sit out: V1 has a row of them all the same, V2 has none.
            scheduled = random.sample(running, random.randrange(1, len(running) + 1))
            _check_rows(scheduled, rows, slots, random, vocabulary, generator)
            shaped += sum(r.shaping.reflex is not None for r in running)
            for request in scheduled:
                accepted = [random.choice((5, 6, 7, vocabulary.end if random.random() < 0.2 else 8))
                            for _ in range(random.randrange(1, DRAFTS + 2))]  # fmt: skip
                request.output += accepted
                slots.commit(request, accepted)
                closed += vocabulary.end in request.output
    assert min(shaped, closed, preempted_closed) > 100  # the schedules did what they are for


def test_a_token_that_is_not_known_yet_counts_but_is_looked_at_later(folder: Path) -> None:
    """Under asynchronous scheduling -1 stands for a token until it is known."""
    processor = ShapingProcessor(stand_in_config(folder), torch.device("cpu"), False)
    vocabulary, random = tiny_vocabulary(), Random(0)
    request = next(r for r in iter(lambda: random_request(random, vocabulary, TOKENS), None)
                   if r.shaping.reflex is not None and r.shaping.adaptive is None and not r.resumed
                   and r.shaping.reflex.schedule == "constant" and r.shaping.reflex.last is None)  # fmt: skip
    rows = RowsOfV1(processor)
    rows.step([request], Random(1))
    request.output += [5, -1]
    assert processor.apply(torch.zeros(1, TOKENS))[0, vocabulary.words[0]] == -3.0
    request.output[1] = vocabulary.end
    assert not processor.apply(torch.zeros(1, TOKENS)).any()
