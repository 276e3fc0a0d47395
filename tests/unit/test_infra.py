"""Cluster files cannot be run here; they can be read, and must call what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import ray
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from jsonschema import Draft202012Validator
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private import commands
from ray.autoscaler._private.util import prepare_config, validate_config

from teachercache.cache_builder.runner import ABANDON_S, FINISH_S
from teachercache.jobs.recipes import SHIPPED

INFRA = Path(__file__).parents[2] / "infra"
ROOT = INFRA.parent
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml_is_read(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_accelerate_reads_its_configuration() -> None:
    config = load_config_from_file(str(INFRA / "accelerate" / "one_node.yaml"))
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sbatch"], ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sbatch"], ids=lambda path: path.name)
def test_every_step_of_slurm_has_the_cpus_of_its_task(path: Path) -> None:
    """From Slurm 22.05 on, srun takes them over from sbatch only when told."""
    steps = re.findall(r"^(?:exec )?srun .*$", path.read_text().replace("\\\n", " "), re.MULTILINE)
    assert steps
    assert all('--cpus-per-task="$SLURM_CPUS_PER_TASK"' in step for step in steps), steps


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_called_is_there(path: Path) -> None:
    text = path.read_text()
    for script in re.findall(r"\bjobs/\w+\.py|\binfra/[\w./]+\w", text):
        assert (ROOT / script).exists(), script
    for recipe in re.findall(r"\b(?:imagenet1k|sak)_\w+", text):
        assert (SHIPPED / f"{recipe}.yaml").exists(), recipe


def copied_into_the_image() -> set[str]:
    copies = re.findall(r"^COPY (.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    return {name for names in copies for name in names.split()}


def test_the_image_copies_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    texts = {project["project"]["readme"], *project["project"]["license-files"]}
    packages |= {path.name for path in (ROOT / "teachercache").iterdir() if path.is_symlink()}
    assert copied_into_the_image() == packages | texts | {"pyproject.toml", "constraints.txt"}


@pytest.mark.parametrize("package", ["wget", "gcc", "libc6-dev"])
def test_the_image_has_what_the_probes_of_kuberay_and_triton_call(package: str) -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert re.search(rf"^RUN .*apt-get install .* {package}\b", text, re.MULTILINE)


@pytest.fixture
def cluster() -> dict[str, Any]:
    """infra/ray/cluster.yaml as `ray up` reads it: by Ray's schema, with Ray's defaults."""
    config: dict[str, Any] = prepare_config(yaml.safe_load((INFRA / "ray" / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_ray_finds_no_fault_with_the_start_of_the_head(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(commands.cli_logger, "warning", lambda text, *parts: warnings.append(text))
    commands.warn_about_bad_start_command(cluster["head_start_ray_commands"])
    assert warnings == []
    commands.warn_about_bad_start_command(["ray start --head"])
    assert len(warnings) == 1


def test_the_head_takes_jobs_from_elsewhere_by_token_alone(cluster: dict[str, Any]) -> None:
    (head,) = (text for text in cluster["head_start_ray_commands"] if "ray start" in text)
    (worker,) = (text for text in cluster["worker_start_ray_commands"] if "ray start" in text)
    assert "--dashboard-host=0.0.0.0" in head
    assert all("RAY_AUTH_MODE=token ray start" in text for text in (head, worker))
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_nodes_of_ray_get_what_they_install(cluster: dict[str, Any]) -> None:
    mounts = {there: here for there, here in cluster["file_mounts"].items() if "/.ray/" not in there}
    assert set(mounts.values()) == copied_into_the_image()
    assert all(there == f"~/teachercache/{here}" for there, here in mounts.items())
    (setup,) = cluster["setup_commands"]
    assert setup.startswith("cd ~/teachercache && ")


# --- schemas -------------------------------------------------------------------------------------------

SCHEMAS = yaml.safe_load((ROOT / "tests" / "goldens" / "cluster_schemas.yaml").read_text())["$defs"]
FREE = {"labels", "annotations", "limits", "requests", "rayStartParams", "nodeSelector", "envs", "secrets"}


def documents(name: str) -> list[dict[str, Any]]:
    document = yaml.safe_load((INFRA / "kuberay" / name).read_text())
    return document["items"] if document["kind"] == "List" else [document]


def validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": SCHEMAS})


GIVEN = {
    "RayJob": documents("rayjob.yaml")[0],
    **{one["kind"]: one for one in documents("priority.yaml")},
    "skypilot": yaml.safe_load((INFRA / "skypilot" / "build.yaml").read_text()),
    "prometheus": yaml.safe_load((INFRA / "monitoring" / "alerts.yaml").read_text()),
}


def misspelt(value: Any, free: bool = False) -> Iterator[Any]:
    """The document, each time with one key spelt wrongly, but not those of one's own choice."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        if isinstance(value, dict) and not free:
            yield {f"{name}s" if name == key else name: one for name, one in value.items()}
        for wrong in misspelt(part, free=key in FREE):
            changed = dict(value) if isinstance(value, dict) else list(value)
            changed[key] = wrong
            yield changed


@pytest.mark.parametrize("kind", GIVEN)
def test_what_clusters_are_given_keeps_to_their_schemas(kind: str) -> None:
    validator(kind).validate(GIVEN[kind])


@pytest.mark.parametrize("kind", GIVEN)
def test_the_schemas_find_every_key_that_is_misspelt(kind: str) -> None:
    wrong = list(misspelt(GIVEN[kind]))
    assert len(wrong) >= 5
    assert [one for one in wrong if validator(kind).is_valid(one)] == []


# --- Kubernetes ----------------------------------------------------------------------------------------


@pytest.fixture
def groups() -> dict[str, dict[str, Any]]:
    """Of the RayJob: the head and the workers by name."""
    cluster = GIVEN["RayJob"]["spec"]["rayClusterSpec"]
    workers = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **workers}


def test_a_rayjob_scales_from_no_gpu_at_all(groups: dict[str, dict[str, Any]]) -> None:
    cluster = GIVEN["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["rayVersion"] == ray.__version__
    assert GIVEN["RayJob"]["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    gpu = groups["gpu"]
    assert gpu["replicas"] == gpu["minReplicas"] == 0 < gpu["maxReplicas"]


def test_workers_are_placed_on_spot_machines_with_gpus(groups: dict[str, dict[str, Any]]) -> None:
    """Both are tainted where they are: by the device plugin, and by the cloud."""
    pod = groups["gpu"]["template"]["spec"]
    (spot,) = pod["nodeSelector"].items()
    assert spot == ("cloud.google.com/gke-spot", "true")
    tolerated = {one["key"]: one.get("value") for one in pod["tolerations"]}
    assert tolerated == {"nvidia.com/gpu": None, spot[0]: spot[1]}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_every_pod_has_the_keys_of_the_stores_and_the_priority_that_is_defined(
    groups: dict[str, dict[str, Any]],
) -> None:
    defined = {document["kind"]: document["metadata"]["name"] for document in documents("priority.yaml")}
    labels = GIVEN["RayJob"]["metadata"]["labels"]
    assert labels.keys() == {"kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"}
    assert labels["kueue.x-k8s.io/priority-class"] == defined["WorkloadPriorityClass"]
    for group in groups.values():
        assert group["template"]["spec"]["priorityClassName"] == defined["PriorityClass"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "teachercache-store"}}]


def test_a_job_that_is_stopped_gets_the_time_to_end(
    groups: dict[str, dict[str, Any]], cluster: dict[str, Any]
) -> None:
    (container,) = groups["head"]["template"]["spec"]["containers"]
    (given,) = (one["value"] for one in container["env"] if one["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    assert float(given) > FINISH_S + ABANDON_S
    assert f"RAY_JOB_STOP_WAIT_TIME_S={given} " in " ".join(cluster["head_start_ray_commands"])
    assert groups["gpu"]["template"]["spec"]["terminationGracePeriodSeconds"] > FINISH_S + ABANDON_S


# --- SkyPilot ------------------------------------------------------------------------------------------


def test_skypilot_is_given_bash_and_the_variables_that_it_names() -> None:
    task = GIVEN["skypilot"]
    assert task["resources"]["use_spot"] is True
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    named = set(re.findall(r"\$(?!SKYPILOT)([A-Z_]+)", task["run"]))
    assert named == {"RECIPE", "SOURCE", "CACHE"} <= task["envs"].keys()


RAY = """#!/usr/bin/env bash
case "$*" in
  health-check*) test -e "$HOME/head" ;;
  *--head*--block) trap 'rm "$HOME/head"; exit' TERM; touch "$HOME/head"; while :; do sleep 0.05; done ;;
  *--address=*--block) while test -e "$HOME/head"; do sleep 0.05; done; exit 1 ;;
esac
"""


@pytest.mark.parametrize("status", [0, 3])
def test_every_rank_of_skypilot_ends_when_the_build_has_ended(tmp_path: Path, status: int) -> None:
    """Ray and the build are stood in for: the script is what is tried."""
    (tmp_path / "teachercache/bin").mkdir(parents=True)
    (tmp_path / "teachercache/bin/activate").touch()
    for name, text in (
        ("ray", RAY),
        ("sleep", "#!/bin/sh\nexec /bin/sleep 0.02\n"),
        ("python", f"#!/bin/sh\n/bin/sleep 0.5\nexit {status}\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    given = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1"}
    ranks = [
        subprocess.Popen(["bash", "-c", GIVEN["skypilot"]["run"]], env={**given, "SKYPILOT_NODE_RANK": rank})
        for rank in "10"
    ]
    try:
        assert [rank.wait(30) for rank in ranks] == [0, status]
    finally:
        for rank in ranks:
            rank.kill()


# --- monitoring ----------------------------------------------------------------------------------------


def metrics() -> set[str]:
    """Of a build, as Prometheus sees them."""
    made = re.findall(r'(Counter|Gauge)\(\s*"(\w+)"', (ROOT / "cache_builder/ray_runner.py").read_text())
    return {f"ray_{name}{'_total' * (kind == 'Counter')}" for kind, name in made}


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"ray_teachercache_\w+", expression))


def test_the_dashboard_shows_every_metric_that_builds_have() -> None:
    board = json.loads((INFRA / "monitoring" / "grafana.json").read_text())
    assert {"title", "uid", "schemaVersion", "time", "panels", "templating"} <= board.keys()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    (source,) = board["templating"]["list"]
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["datasource"] == {"type": source["query"], "uid": f"${{{source['name']}}}"}
        assert all({"refId", "expr"} <= target.keys() for target in panel["targets"])
    shown = {name for panel in panels for target in panel["targets"] for name in names_in(target["expr"])}
    assert shown == metrics()


def test_alerts_ask_for_metrics_that_builds_have() -> None:
    path = INFRA / "monitoring" / "alerts.yaml"
    (group,) = GIVEN["prometheus"]["groups"]
    for rule in group["rules"]:
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert set() < names_in(rule["expr"]) <= metrics()
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "rules", path], check=True)


PRIVATE = """
.env .env.local .envrc .aws/credentials .aws/config .ssh/id_rsa .netrc .git/config .kube/config
.config/gcloud/application_default_credentials.json .huggingface/token .venv/lib/site.py id_rsa
id_ed25519.pub server.pem tls.key credentials credentials.json credentials.yaml secrets.yaml
my-service-account.json token.txt jobs/.env jobs/id_rsa jobs/server.pem pipeline/credentials.yaml
student/.aws/credentials jobs/recipes/secret.yaml data/train/image.jpg train/image.jpg labels.parquet
train-00000.tar weights.pth runs/one/model.safetensors caches/one/cache.json
one.cache/teachers/t/codes/c/0/0 imagenet/cache.json imagenet/teachers/t/zarr.json core.12345 notes.txt
build.log wandb/run.yaml student/checkpoint.pt pipeline/__pycache__/a.pyc
"""


def test_ray_sends_the_code_and_nothing_else(tmp_path: Path) -> None:
    """By Ray's own function of `ray job submit --working-dir .`; keys and data may lie anywhere."""
    packages = [
        ROOT / name for name in ("teachercache", "cache_builder", "jobs", "pipeline", "student", "benchmarks")
    ]
    for package in packages:
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    code = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    code |= {"pyproject.toml", "my_recipe.yaml", "my_job.py"}
    for name in {*PRIVATE.split(), *code}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    create_package(str(tmp_path), tmp_path.parent / f"{tmp_path.name}.zip", include_gitignore=True)
    with ZipFile(tmp_path.parent / f"{tmp_path.name}.zip") as packed:
        sent = {name for name in packed.namelist() if not name.endswith("/")}
    assert sent == code
