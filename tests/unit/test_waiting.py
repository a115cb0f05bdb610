"""Waiting for real Ray workers: results in order, the first cause of a failure, deadlines and signals with a name."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from rl.errors import BudgetRLError, ConfigError
from rl.waiting import DeadlineExceeded, StopFlag, StopRequested, WorkerFailed, WorkerLost, first_ready, wait_for

LONG_S = 120.0
"""Never waited out: only a bound should something hang."""


@ray.remote(num_cpus=0)
class Worker:
    """An actor with every way to fail."""

    def __init__(self, *, fail: bool = False) -> None:
        if fail:
            raise ValueError("the model has no head\nneither of the two names is there")

    def echo(self, value: int) -> int:
        return value

    def refuse(self) -> None:
        raise ConfigError("the setting is wrong", fix="set it to 3")

    def break_down(self) -> None:
        raise ValueError("shapes differ\n(3, 4) and (4, 3)")

    def die(self) -> None:
        os._exit(3)

    def block(self) -> None:
        threading.Event().wait()


@ray.remote(num_cpus=0, max_retries=0)
def die_alone() -> None:
    os._exit(3)


@ray.remote(num_cpus=0)
def wait_inside() -> list[Any]:
    return wait_for([Worker.remote().refuse.remote()], seconds=LONG_S, what="the inner worker")


@pytest.fixture
def worker(ray_cluster: None) -> Iterator[Any]:
    """One living actor; killed afterwards, so that a blocked one does not stay."""
    actor: Any = Worker.remote()
    yield actor
    ray.kill(actor)


@pytest.fixture
def stopped() -> StopFlag:
    """A flag that a signal has set."""
    with StopFlag() as flag:
        signal.raise_signal(signal.SIGTERM)
    return flag


def test_results_come_in_the_order_of_the_references(worker: Any) -> None:
    refs = [worker.echo.remote(i) for i in range(5)]
    assert wait_for(list(reversed(refs)), seconds=LONG_S, what="echoes") == [4, 3, 2, 1, 0]
    assert wait_for([], seconds=LONG_S, what="nothing") == []


def test_a_workers_own_error_arrives_as_it_was_raised(worker: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        wait_for([worker.refuse.remote()], seconds=LONG_S, what="the refusal")
    assert type(caught.value) is ConfigError
    assert str(caught.value) == "the setting is wrong\n  fix: set it to 3"


def test_a_workers_own_error_arrives_through_a_worker_in_between(ray_cluster: None) -> None:
    with pytest.raises(ConfigError) as caught:
        wait_for([wait_inside.remote()], seconds=LONG_S, what="the outer worker")
    assert (caught.value.cause, caught.value.fix) == ("the setting is wrong", "set it to 3")


def test_any_other_error_is_named_with_its_whole_message_and_what_was_waited_for(worker: Any) -> None:
    with pytest.raises(WorkerFailed) as caught:
        wait_for([worker.break_down.remote()], seconds=LONG_S, what="engine 3 generates")
    assert caught.value.cause == "engine 3 generates: ValueError: shapes differ (3, 4) and (4, 3)"


def test_an_actor_that_failed_to_start_gives_the_error_of_its_start_as_the_cause(ray_cluster: None) -> None:
    broken = Worker.remote(fail=True)
    with pytest.raises(WorkerLost) as caught:
        wait_for([broken.echo.remote(1)], seconds=LONG_S, what="engine 0 loads the model")
    assert caught.value.cause == (
        "engine 0 loads the model: the worker process died: ValueError: the model has no head neither of the two names is there"
    )


def test_an_actor_whose_process_dies_is_lost(ray_cluster: None) -> None:
    with pytest.raises(WorkerLost, match="scoring: the worker process died: .*worker process has died"):
        wait_for([Worker.remote().die.remote()], seconds=LONG_S, what="scoring")


def test_a_task_whose_process_dies_is_lost_too(ray_cluster: None) -> None:
    with pytest.raises(WorkerLost, match="the address: the worker process died"):
        wait_for([die_alone.remote()], seconds=LONG_S, what="the address")


def test_a_failure_is_not_kept_back_by_an_answer_that_never_comes(worker: Any) -> None:
    other = Worker.remote()
    with pytest.raises(ConfigError):
        wait_for([worker.block.remote(), other.refuse.remote()], seconds=LONG_S, what="both")


def test_a_deadline_names_the_wait_and_how_much_is_missing(worker: Any) -> None:
    other = Worker.remote()
    wait_for([other.echo.remote(1)], seconds=LONG_S, what="the other worker starts")
    refs = [other.echo.remote(1), worker.block.remote()]
    first_ready(refs, seconds=LONG_S, what="the quick one")
    with pytest.raises(DeadlineExceeded) as caught:
        wait_for(refs, seconds=1.0, what="engines take weights v7")
    assert caught.value.cause == "engines take weights v7: 1 of 2 answers missing after 1 s"
    assert "deadline" in caught.value.fix


def test_the_first_answer_is_given_back_unseen_even_when_it_is_a_failure(worker: Any) -> None:
    other = Worker.remote()
    failing = other.refuse.remote()
    assert first_ready([worker.block.remote(), failing], seconds=LONG_S, what="any") == failing


def test_a_wait_for_the_first_answer_ends_without_one_and_looks_at_least_once(worker: Any) -> None:
    assert first_ready([worker.block.remote()], seconds=0.3, what="16 rollouts, first 000001.0000.000") is None
    done = Worker.remote().echo.remote(1)
    wait_for([done], seconds=LONG_S, what="the other worker answers")
    assert first_ready([done], seconds=0.0, what="what is there already") == done


def test_a_stop_ends_either_wait_and_names_the_signal(worker: Any, stopped: StopFlag) -> None:
    ref = worker.block.remote()
    with pytest.raises(StopRequested, match="SIGTERM while waiting for rollouts"):
        wait_for([ref], seconds=LONG_S, what="rollouts", stop=stopped)
    with pytest.raises(StopRequested, match="SIGTERM while waiting for rollouts"):
        first_ready([ref], seconds=LONG_S, what="rollouts", stop=stopped)


def test_a_stop_that_comes_during_the_wait_ends_it(worker: Any) -> None:
    with StopFlag() as stop:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(StopRequested, match="SIGINT while waiting for the blocked worker"):
            wait_for([worker.block.remote()], seconds=LONG_S, what="the blocked worker", stop=stop)
        timer.join()


def test_the_second_signal_interrupts_at_once_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert not stop.is_set
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set and stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_errors_of_a_wait_are_meant_to_be_read() -> None:
    assert all(issubclass(kind, BudgetRLError) for kind in (DeadlineExceeded, WorkerLost, StopRequested))
