"""The runner on a Ray cluster; the one module that imports ray.

Plain actors, fed from a queue of shards, give back commit records and nothing else: features go from
the actor to the store. An actor that dies (its process, its node, preemption) is replaced, and the
shards it had in flight are queued again; extraction is idempotent, so running one twice is harmless.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cache_builder.calibrate import Calibration, CalibrationSample
from cache_builder.recipe import RunnerRecipe
from cache_builder.runner import FailedShard, OnCommit, Runner, Task, describe
from cache_builder.worker import Worker
from pipeline.errors import BuildError, TeacherCacheError
from pipeline.spec import TeacherSpec

_TICK_S = 1.0
_RESIZE_EVERY_S = 5.0


@dataclass(eq=False)
class _Actor:
    """An actor of the pool, the call it has to answer before it gets shards, and its shards in flight."""

    handle: Any
    opening: Any = None
    running: dict[Any, tuple[Task, float]] = field(default_factory=dict)


class RayRunner(Runner):
    """As many actors as the cluster has room for (or `num_actors`), each with all teachers loaded."""

    def __init__(self, recipe: RunnerRecipe, teachers: Mapping[str, TeacherSpec]) -> None:
        super().__init__(recipe, teachers)
        self._connected_here = not ray.is_initialized()
        if self._connected_here:
            _connect()
        self._failed_starts = 0
        self._actors = [self._start_actor() for _ in range(self._wanted_actors())]

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        if self._connected_here:
            ray.shutdown()

    def weights_hashes(self) -> dict[str, str]:
        hashes: dict[str, str] = _get(self._actors[0].handle.weights_hashes.remote())
        return hashes

    def calibrate(self, sample: CalibrationSample, names: Collection[str]) -> dict[str, Calibration]:
        answer: dict[str, Calibration] = _get(self._actors[0].handle.calibrate.remote(sample, list(names)))
        return answer

    def run(self, url: str, tasks: Sequence[Task], on_commit: OnCommit) -> list[FailedShard]:
        queue, failed = deque(tasks), list[FailedShard]()
        for actor in self._actors:
            actor.opening = actor.handle.open.remote(url)
        last_resize = time.monotonic()
        while queue or any(actor.running for actor in self._actors):
            for actor in self._actors:
                while queue and actor.opening is None and len(actor.running) < self.recipe.shards_in_flight:
                    task = queue.popleft()
                    call = actor.handle.extract.remote(task.shard, task.names)
                    actor.running[call] = task, time.monotonic()
            for actor, call in self._answered():
                self._take(actor, call, url, queue, failed, on_commit)
            self._end_hung_actors()
            if time.monotonic() - last_resize > _RESIZE_EVERY_S:
                self._use_new_nodes(url)
                last_resize = time.monotonic()
        return failed

    def _answered(self) -> list[tuple[_Actor, Any]]:
        owners = {call: actor for actor in self._actors for call in actor.running}
        owners |= {actor.opening: actor for actor in self._actors if actor.opening is not None}
        done, _ = ray.wait(list(owners), num_returns=1, timeout=_TICK_S)
        return [(owners[call], call) for call in done]

    def _take(
        self,
        actor: _Actor,
        call: Any,
        url: str,
        queue: deque[Task],
        failed: list[FailedShard],
        on_commit: OnCommit,
    ) -> None:
        try:
            answer = ray.get(call)
        except RayActorError as error:
            if actor in self._actors:  # its other calls answer with the same death
                self._check_can_start(actor, error)
                self._actors[self._actors.index(actor)] = self._start_actor(url)
                for task, _ in actor.running.values():
                    self.retry_or_fail(task, f"the process that ran it died: {error}", queue, failed)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if call is actor.opening:  # no shard can be extracted by an actor that cannot open the cache
                raise cause from error
            self.retry_or_fail(actor.running.pop(call)[0], describe(cause), queue, failed)
        else:
            if call is actor.opening:
                actor.opening = None
            else:
                del actor.running[call]
                on_commit(answer)

    def _check_can_start(self, dead: _Actor, error: RayActorError) -> None:
        """Give up when actors keep dying before they have opened the cache."""
        self._failed_starts = self._failed_starts + 1 if dead.opening is not None else 0
        if self._failed_starts >= self.recipe.max_attempts * len(self._actors):
            raise BuildError(
                "The Ray actors die before they can open the cache.",
                got=str(error),
                expected="actors that load the teachers and open the cache",
                do="look at the actors' logs (ray logs); memory and missing packages are the usual reasons",
            ) from error

    def _end_hung_actors(self) -> None:
        """Kill actors with a shard over its time; their calls then answer with `RayActorError`."""
        if self.recipe.shard_timeout_s is None:
            return
        for actor in self._actors:
            oldest = min((started for _, started in actor.running.values()), default=None)
            if oldest is not None and time.monotonic() - oldest > self.recipe.shard_timeout_s:
                ray.kill(actor.handle)

    def _use_new_nodes(self, url: str) -> None:
        self._actors += [self._start_actor(url) for _ in range(self._wanted_actors() - len(self._actors))]

    def _start_actor(self, url: str | None = None) -> _Actor:
        options: dict[str, Any] = {
            "num_cpus": self.recipe.cpus_per_actor,
            "num_gpus": self._gpus_per_actor(),
            "max_concurrency": self.recipe.shards_in_flight,
        }
        handle = ray.remote(Worker).options(**options).remote(dict(self.teachers), self.recipe)
        return _Actor(handle, handle.open.remote(url) if url else None)

    def _gpus_per_actor(self) -> float:
        if self.recipe.gpus_per_actor is not None:
            return self.recipe.gpus_per_actor
        return 1.0 if ray.cluster_resources().get("GPU") else 0.0

    def _wanted_actors(self) -> int:
        if self.recipe.num_actors is not None:
            return self.recipe.num_actors
        resources, gpus = ray.cluster_resources(), self._gpus_per_actor()
        room = int(resources.get("CPU", 0) / self.recipe.cpus_per_actor)
        if gpus:
            room = min(room, int(resources.get("GPU", 0) / gpus))
        if not room:
            raise BuildError(
                "No node of this Ray cluster has room for one actor.",
                got=f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs in all",
                expected=f"{self.recipe.cpus_per_actor:g} CPUs and {gpus:g} GPUs for each actor",
                do="start nodes, or lower runner.cpus_per_actor and runner.gpus_per_actor",
            )
        return room


def _connect() -> None:
    """Join the cluster of this job or machine, or start a private one on this machine."""
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        # Ray guards a new cluster with a token. One given here leaves no ~/.ray/auth_token behind, which
        # would turn authentication on for every later `ray start` of this user.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(address="local", include_dashboard=False, **quiet)


def _get(call: Any) -> Any:
    """`ray.get`, with our own errors as they were raised in the actor (its constructor included)."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, TeacherCacheError):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise BuildError(
            "A Ray actor could not load the teachers.",
            got=str(error),
            expected="an actor that builds every teacher of the recipe",
            do="mend the reason above; `teachercache build … runner.kind=local` shows it without Ray",
        ) from error
