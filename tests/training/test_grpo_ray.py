"""Rollouts over Ray actors bring the flights that are flown without Ray, and survive an actor's death."""

import functools
import os
import signal
import subprocess
import sys
from collections import deque
from dataclasses import replace

import pytest
import torch
from rollout_world import PATIENT, flier, flight_bytes, flight_tasks, tiny_policy

from worldvln_edge.config import ConfigError
from worldvln_edge.training.environments.pool import LocalEnvironments
from worldvln_edge.training.grpo.candidates import candidates_of
from worldvln_edge.training.grpo.collection import CollectionConfig
from worldvln_edge.training.grpo.early_stopping import early_stopping_rules
from worldvln_edge.training.grpo.fly_collection import collect
from worldvln_edge.training.grpo.ray_rollout import RayConfig, RayFlier, RayWorkers

OPEN = functools.partial(LocalEnvironments, config=replace(PATIENT, processes=1, per_process=8))
TASKS, CONFIG = flight_tasks(2), CollectionConfig(candidates=5)


def test_ray_is_not_imported_unless_it_flies():
    code = "import sys; import worldvln_edge.training.grpo.ray_rollout as r; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_ray_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r'Ray is not installed .*; pip install "worldvln-edge\[ray\]", or fly without'
    ):
        RayWorkers(OPEN, RayConfig(workers=1)).__enter__()


def test_impossible_workers_are_refused():
    with pytest.raises(
        ConfigError, match="workers >= 1, cpus_per_worker >= 1 and gpus_per_worker >= 0, found 0, 1 and"
    ):
        RayConfig(workers=0)
    workers, policy = RayWorkers(OPEN, RayConfig(workers=1)), tiny_policy()
    with pytest.raises(ConfigError, match="waves must be >= 1, found 0"):
        RayFlier(policy, workers, waves=0)
    with pytest.raises(RuntimeError, match="use RayWorkers as a context manager"):
        next(RayFlier(policy, workers).fly(deque(candidates_of(TASKS, 1))))
    policy.model.to("meta")
    with pytest.raises(ConfigError, match="the networks are on meta, so every Ray worker needs a GPU"):
        RayFlier(policy, workers)


class SlowRay:
    """Ray on a machine that is too busy: what it raises then is a bare exception."""

    def __init__(self, resources: dict[str, float] | None = None):
        self.is_shut_down, self._resources = False, resources

    def is_initialized(self) -> bool:
        return self._resources is not None

    def init(self, **options) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")

    def shutdown(self) -> None:
        self.is_shut_down = True

    def cluster_resources(self) -> dict[str, float]:
        return self._resources or {}


def test_ray_that_does_not_start_in_time_is_a_clear_error(monkeypatch):
    slow = SlowRay()
    monkeypatch.setitem(sys.modules, "ray", slow)
    with pytest.raises(
        ConfigError, match=r"Ray did not start here \(The current node timed out during startup.\); a bus"
    ):
        RayWorkers(OPEN, RayConfig(workers=1)).__enter__()
    assert slow.is_shut_down


def test_workers_that_fit_nowhere_are_refused_instead_of_waited_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SlowRay({"CPU": 4.0}))
    with pytest.raises(ConfigError, match="5 Ray workers need 5 CPUs and 0 GPUs, the cluster has 4 and 0; start fewer"):
        RayWorkers(OPEN, RayConfig(workers=5)).__enter__()
    with pytest.raises(ConfigError, match="2 Ray workers need 2 CPUs and 2 GPUs, the cluster has 4 and 0; start fewer"):
        RayWorkers(OPEN, RayConfig(workers=2, gpus_per_worker=1)).__enter__()


@pytest.mark.slow
def test_two_workers_bring_the_same_files_as_no_ray_and_a_killed_one_loses_its_flights_only(tmp_path):
    pytest.importorskip("ray")
    threads, rules = torch.get_num_threads(), early_stopping_rules()
    torch.set_num_threads(1)  # as in the workers, so that the networks round alike
    try:
        with OPEN() as environments:
            collect(tmp_path / "local", flier(environments, rules=rules), TASKS, CONFIG)
    finally:
        torch.set_num_threads(threads)
    with RayWorkers(OPEN, RayConfig(workers=2)) as workers:
        other = tiny_policy(policy_scales="all")
        collect(tmp_path / "other", RayFlier(other, workers), TASKS[:1], CollectionConfig(candidates=2))
        collect(tmp_path / "ray", RayFlier(tiny_policy(), workers, rules=rules), TASKS, CONFIG)
        assert flight_bytes(tmp_path / "ray") == flight_bytes(tmp_path / "local")
        assert (tmp_path / "ray" / "settings.json").read_bytes() == (tmp_path / "local" / "settings.json").read_bytes()

        import ray

        pid = ray.get(workers.actors[0].__ray_call__.remote(lambda worker: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        collection = collect(tmp_path / "killed", RayFlier(tiny_policy(), workers, rules=rules), TASKS, CONFIG)
        assert (collection.report.flights, collection.report.failed) == (10, ())
        assert {(one.code, one.attempt, "worker that flew it died" in one.message) for one in collection.lost()} == {
            ("lost", 0, True)
        }
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_named(monkeypatch, tmp_path):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray looks for a cluster of this machine
    with pytest.raises(ConfigError, match=r"no Ray cluster at 'auto' .*leave the address out to start one here"):
        RayWorkers(OPEN, RayConfig(workers=1, address="auto")).__enter__()
