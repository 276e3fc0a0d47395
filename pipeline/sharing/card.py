"""What a repository on the Hub says of the cache in it: a dataset card, and Croissant's metadata."""

import hashlib
import json
from pathlib import Path
from string import Template

import yaml

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.places.hub_storage import CARD_FILE, CROISSANT_FILE
from teachercache.pipeline.records.manifest import SAMPLES_NAME, VIEWS_NAME
from teachercache.pipeline.sharing.licences import card_header, licence_of, licence_rows
from teachercache.pipeline.units import human_bytes


def cards(cache: FeatureCache, repository: str) -> dict[str, str]:
    """Texts by file: README.md for people and the Hub, and JSON-LD by mlcommons.org/croissant/1.0.

    They say what is in it and how it was made, its bytes and fidelity, how to load it, under which licences.
    """
    spec, licences = cache.spec, {name: licence_of(teacher) for name, teacher in cache.spec.teachers.items()}
    nbytes = {
        name: sum(record.nbytes for record in cache.commits(name).values())
        for name in spec.teachers_and_images
    }
    words = {
        "repository": repository,
        "name": repository.rpartition("/")[2],
        "first": cache.teachers[0],
        "cache_id": spec.cache_id,
        "created": spec.created,
        "made": yaml.safe_dump(spec.model_dump(mode="json", include={"views", "versions"})),
        "summary": f"Features of {cache.num_samples:,} images, in {cache.num_views} views of "
        f"{' × '.join(map(str, spec.views.size))} pixels each, by {len(spec.teachers)} frozen vision models: "
        f"{cache.num_rows:,} rows, {human_bytes(sum(nbytes.values()))}.",
        "teachers": "\n".join(_row(cache, name, nbytes[name]) for name in cache.teachers),
        "images": "are in it, under a licence of their own"
        if spec.images != "reference"
        else "are not in it",
        "header": card_header(licences),
        "licences": licence_rows(licences),
        "licences_json": json.dumps([f"{teacher}: {name}" for teacher, name in licences.items()]),
        "samples_sha256": hashlib.sha256(cache.storage.read(SAMPLES_NAME)).hexdigest(),
        "views_sha256": hashlib.sha256(cache.storage.read(VIEWS_NAME)).hexdigest(),
    }
    words["loading"] = _filled(f"card_{spec.store}.md", words)
    return {CARD_FILE: _filled("card.md", words), CROISSANT_FILE: _filled(CROISSANT_FILE, words)}


def _filled(name: str, words: dict[str, str]) -> str:
    return Template(Path(__file__).with_name(f"{name}.template").read_text()).substitute(words)


def _row(cache: FeatureCache, name: str, nbytes: int) -> str:
    teacher, fidelity = cache.spec.teachers[name], cache.spec.fidelity.get(name, {}).get("cosine_mean")
    weights = f"`{teacher.weights_hash}`" if teacher.pretrained else "random: a trial, no use"
    blocks = ", ".join(map(str, teacher.block_indices))
    grid = f"{' × '.join(map(str, (*teacher.stored_grid, teacher.width)))} ({teacher.grid.kind})"
    cosine = "not measured" if fidelity is None else f"{fidelity:.4f}"
    cells = (name, teacher.model, weights, blocks, grid, teacher.codec, human_bytes(nbytes), cosine)
    return f"| {' | '.join(cells)} |"
