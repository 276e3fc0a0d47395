"""Kill processes of real builds on a real Ray cluster, and see whether anything is lost.

    python -m benchmarks.chaos [--kills 50] [--seed 0] [--samples 192] [--raylets 3] [--kinds raylet,actor]

A cluster of a head and several raylets on this machine builds a cache again and again; whenever a few more
shards are committed, something gets SIGKILL: an actor, a raylet (a new node joins in its place), the driver,
or every process of the head (a new cluster is started). The same command goes on each time. Every finished
cache is verified in full, and compared byte by byte with one that was built without interruption.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from teachercache import FeatureCache, build
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.jobs.launch import run
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.verify import strays, verify

KINDS = {"actor": 0.4, "raylet": 0.2, "driver": 0.3, "head": 0.1}
SHARDS_IN_FLIGHT = 2
TIMEOUT_S = 300.0
ACTOR_TITLE = "ray::RayWorker"


def main() -> None:
    if sys.argv[1:2] == ["--driver"]:
        drive(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=192, help="images; two views each, 16 views a shard")
    parser.add_argument("--raylets", type=int, default=3, help="nodes beside the head, one actor each")
    parser.add_argument(
        "--kinds", type=lambda text: text.split(","), default=list(KINDS), help="what is killed, by commas"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(
        prefix="chaos"
    ) as folder:  # not below a long path: Ray has sockets there
        found = chaos(Path(folder), **vars(arguments))
    print_results(found)
    raise SystemExit(0 if found.sound else 1)


@dataclass
class Results:
    """What was killed, and what came of it. `repeated` shards were begun once more than a build needs."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    builds: int = 0
    shards: int = 0
    repeated: int = 0
    at_risk: int = 0
    rows_lost: int = 0
    duplicated: int = 0
    problems: list[str] = field(default_factory=list)
    differing_files: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def sound(self) -> bool:
        broken = self.rows_lost or self.duplicated or self.problems or self.differing_files
        return not broken and self.repeated <= self.at_risk


def chaos(
    folder: Path, *, kills: int, seed: int, samples: int, raylets: int, kinds: Sequence[str] = tuple(KINDS)
) -> Results:
    """Build and kill below `folder` until `kills` processes were killed and the last cache is whole."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # before ray is imported; or it leaves one
    start = time.monotonic()
    images = make_images(folder / "images", samples, seed)
    found = Results(seed)
    generator = random.Random(seed)
    plan = schedule(generator, kills, kinds)
    cluster = ChaosCluster(folder, raylets)
    try:
        reference = build_once(cluster, recipe_for(folder / "reference", images))
        while plan:
            recipe = recipe_for(folder / f"cache{found.builds}", images)
            started = build_under_fire(cluster, recipe, plan, generator, found)
            judge(FeatureCache.open(recipe.cache), reference, started, found)
            shutil.rmtree(recipe.cache)
    finally:
        cluster.stop()
    found.wall_s = time.monotonic() - start
    return found


def schedule(generator: random.Random, kills: int, kinds: Sequence[str]) -> list[str]:
    """Every kind once, if there are so many, and the rest by their weights."""
    first = generator.sample(kinds, min(len(kinds), kills))
    return first + generator.choices(kinds, [KINDS[kind] for kind in kinds], k=kills - len(first))


def recipe_for(cache: Path, images: Path) -> BuildRecipe:
    teacher = {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 224, "codec": "f32"}
    return BuildRecipe.model_validate(
        {
            "cache": str(cache),
            "source": str(images),
            "teachers": {"tiny": teacher | {"grid": "bilinear", "grid_size": [4, 4]}},
            "views": {"num_views": 2, "size": [64, 64]},
            "rows_per_shard": 16,
            "runner": {
                "kind": "ray",
                "batch_size": 4,
                "decode_threads": 1,
                "gpus_per_actor": 0,
                "shards_in_flight": SHARDS_IN_FLIGHT,
                "max_attempts": 20,
            },
        }
    )


def make_images(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8))
        image = coarse.resize((320, 240), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.jpg")
    return folder


class ChaosCluster:
    """A head without CPUs and nodes of one CPU each, as processes of this machine; none else is touched."""

    def __init__(self, folder: Path, raylets: int) -> None:
        self._folder, self._nodes, self._starts = folder, raylets, 0
        self._start()

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        self._starts += 1
        self._place = {"temp_dir": str(self._folder / f"r{self._starts}"), "include_dashboard": False}
        self._cluster = Cluster()
        self._head = self._cluster.add_node(num_cpus=0, **self._place)
        self._workers: list[Any] = []
        self._raylets = set[str]()
        for _ in range(self._nodes):
            self.add_node()

    @property
    def address(self) -> str:
        address: str = self._cluster.address
        return address

    def stop(self) -> None:
        for node in [*self._workers, self._head]:  # Cluster.shutdown() would ask the head, which may be dead
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        for process in psutil.process_iter():  # some actors outlive a raylet that was killed
            with _may_end():
                if process.environ().get("RAY_RAYLET_PID") in self._raylets:
                    process.kill()

    def restart(self) -> None:
        self.stop()
        self._start()

    def actors(self) -> list[psutil.Process]:
        found = []
        for raylet in (_pid(node, "raylet") for node in self._workers):
            if psutil.pid_exists(raylet):
                for process in psutil.Process(raylet).children(recursive=True):
                    with _may_end():
                        if " ".join(process.cmdline()).startswith(ACTOR_TITLE):
                            found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def kill_actor(self, generator: random.Random) -> bool:
        actors = self.actors()
        if actors:
            with _may_end():
                generator.choice(actors).kill()
        return bool(actors)

    def kill_node(self, generator: random.Random) -> None:
        """One raylet; its other processes end with it. Another node joins."""
        node = self._workers.pop(generator.randrange(len(self._workers)))
        os.kill(_pid(node, "raylet"), signal.SIGKILL)
        self.add_node()

    def add_node(self, **resources: int) -> None:
        self._workers.append(self._cluster.add_node(**{"num_cpus": 1, **resources}))
        self._raylets.add(str(_pid(self._workers[-1], "raylet")))

    def remove_node(self) -> None:
        """The newest."""
        self._cluster.remove_node(self._workers.pop())

    def kill_head(self) -> None:
        for processes in self._head.all_processes.values():
            for process in processes:
                process.process.kill()


def _pid(node: Any, kind: str) -> int:
    pid: int = node.all_processes[kind][0].process.pid
    return pid


class _may_end:
    """Processes that are looked at may end meanwhile."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, psutil.Error)


class Driver:
    """The build in a process of its own. `log` has a line for every shard that is begun, over all drivers."""

    def __init__(self, cluster: ChaosCluster, recipe: BuildRecipe) -> None:
        self.log = Path(f"{recipe.cache}.log")
        self.begun_before = begun(self.log)
        command = [
            sys.executable,
            "-m",
            "benchmarks.chaos",
            "--driver",
            recipe.model_dump_json(),
            str(self.log),
        ]
        environment = os.environ | {"RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1])

    @property
    def works(self) -> bool:
        return begun(self.log) > self.begun_before

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)


def drive(recipe: str, log: str) -> None:
    logging.basicConfig(filename=log, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("teachercache.cache_builder.runner").setLevel(logging.DEBUG)
    with Path(f"{log}.console").open("a") as file:
        run(lambda: (build(BuildRecipe.model_validate_json(recipe), Console(file=file)), None)[1])


def begun(log: Path) -> int:
    """How many times a shard was begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sum("starts, attempt" in line for line in lines)


def build_once(cluster: ChaosCluster, recipe: BuildRecipe) -> FeatureCache:
    status = Driver(cluster, recipe).wait()
    assert status == 0, f"the uninterrupted build ended with status {status}"
    return FeatureCache.open(recipe.cache)


def build_under_fire(
    cluster: ChaosCluster, recipe: BuildRecipe, plan: list[str], generator: random.Random, found: Results
) -> int:
    """Run the same command until the cache is whole, taking kills from `plan`. Returns shards begun."""
    driver = Driver(cluster, recipe)
    commits = Path(recipe.cache) / "commits" / "tiny"
    while plan:
        target = len(_committed(commits)) + generator.randint(1, 3)
        delay_s = generator.uniform(0, 0.3)
        if not _await_commits(commits, target, driver):
            break
        time.sleep(delay_s)
        kind = plan.pop(0)
        found.at_risk += SHARDS_IN_FLIGHT * (1 if kind in ("actor", "raylet") else cluster._nodes)
        if kind == "actor" and not cluster.kill_actor(generator):
            plan.append(kind)
            continue
        if kind == "raylet":
            cluster.kill_node(generator)
        if kind == "driver":
            driver.process.kill()
        if kind == "head":
            cluster.kill_head()
        found.kills[kind] += 1
        print(f"kill {found.kills.total()}: {kind}, {len(_committed(commits))} shards committed", flush=True)
        if kind in ("driver", "head"):
            driver.wait()
            if kind == "head":
                cluster.restart()
            driver = Driver(cluster, recipe)
    while (status := driver.wait()) != 0:
        print(f"the driver ended with status {status}; again", flush=True)
        driver = Driver(cluster, recipe)
    return begun(driver.log)


def _committed(commits: Path) -> list[Path]:
    return list(commits.glob("*.json"))


def _await_commits(commits: Path, count: int, driver: Driver) -> bool:
    """Until the driver works and so many shards are committed; False when it has ended before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not driver.works or len(_committed(commits)) < count:
        if driver.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"nothing is committed for {TIMEOUT_S:.0f} s; see {driver.log}"
        time.sleep(0.05)
    return True


def judge(cache: FeatureCache, reference: FeatureCache, started: int, found: Results) -> None:
    """Compare a finished cache with the reference."""
    found.builds += 1
    found.shards += cache.spec.num_shards
    found.repeated += started - cache.spec.num_shards
    records = cache.commits("tiny")
    found.rows_lost += cache.num_rows - sum(record.num_rows for record in records.values())
    found.rows_lost += cache.num_samples - cache.valid_samples().size
    found.duplicated += len(records) - cache.spec.num_shards
    found.problems += [problem.reason for problem in verify(cache, full=True)] + strays(cache)
    found.problems += cache.storage.sweep()
    ours, theirs = content(cache.storage), content(reference.storage)
    found.differing_files += sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )


def content(storage: Storage) -> dict[str, str]:
    """Checksums of every file; of commit records (they state times) and the spec, what must be equal."""
    return dict(_content(storage))


def _content(storage: Storage) -> Iterator[tuple[str, str]]:
    times = {"created", "seconds", "host", "worker", "finished", "checksum"}
    for name, _ in storage.walk():
        if name.endswith(".json") and not name.startswith("teachers/"):
            stated = json.loads(storage.read(name))
            yield name, json.dumps({key: value for key, value in stated.items() if key not in times})
        else:
            yield name, storage.checksum(name)


def print_results(found: Results) -> None:
    facts = {
        **{f"kills: {kind}": found.kills[kind] for kind in KINDS},
        "kills": found.kills.total(),
        "builds that ended whole": found.builds,
        "shards of these builds": found.shards,
        "shards computed twice": found.repeated,
        "shards in flight at the kills, at most": found.at_risk,
        "rows lost": found.rows_lost,
        "rows duplicated": found.duplicated,
        "problems found by verify --full": len(found.problems),
        "files that differ from the uninterrupted build": len(found.differing_files),
    }
    table = Table(title=f"Chaos, seed {found.seed}", title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    Console().print(table)
    for line in found.problems + found.differing_files:
        print(line)
    print(json.dumps({"seed": found.seed, **facts, "wall_s": round(found.wall_s, 1), "sound": found.sound}))


if __name__ == "__main__":
    main()
