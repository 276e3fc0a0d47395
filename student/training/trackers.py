"""The trackers of a run: those that accelerate knows by name, each with what it can show and keep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import RecipeError, extra
from teachercache.pipeline.records.manifest import SPEC_NAME

with extra("train"):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

PICTURES: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}, "swanlab": {}}
"""Arguments of `log_images`, of trackers that take pictures (N, H, W, 3) uint8 by tag."""
_KEEP_FILE: dict[str, Callable[[Any, str], object]] = {
    "wandb": lambda tracker, file: tracker.tracker.log_artifact(file, name="cache", type="dataset"),
    "mlflow": lambda tracker, file: tracker.log_artifact(file),
    "comet_ml": lambda tracker, file: tracker.tracker.log_asset(file),
    "clearml": lambda tracker, file: tracker.tracker.upload_artifact("cache", file),
}


def missing_trackers(names: Sequence[str]) -> Iterator[RecipeError]:
    """Those whose package is not installed."""
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in installed:
            yield RecipeError(
                "The package of a tracker is not installed.",
                got=f"trackers: {name}",
                expected=f"one of {', '.join(installed) or 'none'}",
                do=f"pip install {name.replace('aim', 'aim<4')!r}, or take it out of trackers",
            )


def names_for(tracker: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` by names that the tracker takes: to MLflow each is a file, which cannot be a folder too."""
    return {key.replace("/", "."): one for key, one in values.items()} if tracker == "mlflow" else values


def start_trackers(
    names: Sequence[str], output: Path, config: Mapping[str, Any], cache: FeatureCache | None, first_step: int
) -> list[GeneralTracker]:
    """On the main process. `config` is what the run is, flat, and is stored by each; those that have
    artifacts keep `cache.json`. Raises `RecipeError` where one does not start."""
    trackers = list[GeneralTracker]()
    config = {**config, "cache_id": cache.spec.cache_id} if cache else config
    run_name = output.resolve().name
    settings: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": first_step},
        "wandb": {"name": run_name, "dir": str(output)},
        "mlflow": {"run_name": run_name},
        "swanlab": {"experiment_name": run_name},
        "trackio": {"name": run_name},
    }
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = [output] if kind.requires_logging_directory else []
        try:
            project = {"tensorboard": name, "aim": run_name}.get(name, "teachercache")
            tracker = kind(project, *place, **settings.get(name, {}))
            tracker.start()
            if name == "tensorboard":  # whose own form of a configuration is a run beside the run
                tracker.log({"config": "".join(f"    {key}: {config[key]}\n" for key in config)}, first_step)
            else:
                plain = {key: str(one) if isinstance(one, list) else one for key, one in config.items()}
                tracker.store_init_configuration(plain)
            if cache is not None and name in _KEEP_FILE:
                (output / SPEC_NAME).write_bytes(cache.storage.read(SPEC_NAME))
                _KEEP_FILE[name](tracker, str(output / SPEC_NAME))
        except OSError:
            raise
        except Exception as error:  # each has its own
            raise RecipeError(
                f"The tracker {name} does not start.",
                got=f"{type(error).__name__}: {error}",
                expected="a service that answers, and an account that is logged in to it",
                do="log in, or take it out of trackers",
            ) from error
        trackers.append(tracker)
    return trackers
