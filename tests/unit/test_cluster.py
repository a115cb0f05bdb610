"""Where the actors of a run are placed and what they see: refusals before the start, places on a real Ray, waits that end."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from rl.cluster import Workforce, check_engine_build, device_environment, held_by_others, ranks_are_here, reserve_places
from rl.errors import ConfigError
from rl.settings import Settings
from rl.waiting import DeadlineExceeded, StopFlag, StopRequested, wait_for


def make(**sections: Any) -> Settings:
    return Settings.model_validate({"model": {"path": "org/name"}, "data": {"source": "x.json"}, "max_steps": 1, **sections})


def test_the_gpu_build_of_the_engine_is_refused_on_cpus_with_what_to_write_instead() -> None:
    with pytest.raises(ConfigError) as caught:
        check_engine_build(make(), gpu_build=True)
    for advice in ("rollout.gpus_per_worker=0.5 learner.gpus_per_rank=0.5", "hardware=gpu_node", "budget-rl[cpu]"):
        assert advice in str(caught.value)


def test_each_build_is_accepted_on_its_own_device() -> None:
    check_engine_build(make(), gpu_build=False)
    check_engine_build(make(rollout={"gpus_per_worker": 0.5}), gpu_build=True)


def test_what_others_hold_is_told_with_what_is_free_and_how_long_the_run_waits() -> None:
    settings = make(rollout={"workers": 2, "gpus_per_worker": 1, "start_deadline_s": 90}, learner={"gpus_per_rank": 1})
    total = {"CPU": 16.0, "GPU": 4.0}
    assert held_by_others(settings, total, total) == ""
    note = held_by_others(settings, total, {"CPU": 16.0, "GPU": 1.0})
    assert "needs 3 GPUs and 1 of 4 are free" in note
    assert "CPU" not in note
    assert "start_deadline_s=90" in note
    assert "3 GPUs and 0 of 4" in held_by_others(settings, total, {"CPU": 16.0})  # Ray leaves out what is used up


def test_an_actor_without_gpus_sees_none() -> None:
    assert device_environment(0) == {"CUDA_VISIBLE_DEVICES": ""}
    assert device_environment(0.5) == {}  # Ray names the GPU it assigned


def test_a_place_is_as_large_as_the_settings_say_and_lies_on_this_node(ray_cluster: None) -> None:
    places = reserve_places(make(learner={"ranks": 2, "cpus_per_rank": 0.25}).learner)
    try:
        wait_for([group.ready() for group in places], seconds=60, what="places")
        assert [bundle for group in places for bundle in group.bundle_specs] == [{"CPU": 0.25}, {"CPU": 0.25}]
        assert ranks_are_here(places)
    finally:
        for group in places:
            ray.util.remove_placement_group(group)


def test_a_rank_that_finds_no_place_gives_up_at_the_deadline_or_on_ctrl_c(ray_cluster: None) -> None:
    cpus = ray.cluster_resources()["CPU"]
    settings = make(rollout={"start_deadline_s": 0.5}, learner={"cpus_per_rank": cpus})
    (holder,) = reserve_places(make(learner={"cpus_per_rank": cpus}).learner)
    workforce = Workforce(settings)
    try:
        wait_for([holder.ready()], seconds=60, what="the place")
        with pytest.raises(DeadlineExceeded, match=f"places for 1 learner ranks of {cpus:g} CPUs(.|\n)*ray status"):
            workforce.launch_learners(Path("never read"))
        workforce.close()
        with StopFlag() as stop, pytest.raises(StopRequested, match="SIGINT while waiting for places"):
            signal.raise_signal(signal.SIGINT)
            workforce.launch_learners(Path("never read"), stop=stop)
    finally:
        workforce.close()  # also the place it still waits for
        ray.util.remove_placement_group(holder)
