"""Build a teacher cache on a Ray cluster.

    teachercache submit RECIPE key=value …

RECIPE is a YAML file, or the name of one in jobs/recipes (for example imagenet1k_vitl). Overrides:

    cache=/data/cache                   where the cache goes (absolute, or s3://…)
    source.path=/data/imagenet/train    a folder, tar(s) or Parquet files
    teachers=[dinov2_large,sam_large]   presets, or any timm model
    views.num_views=4                   crops of each image
    runner.num_actors=8                 actors (default: the whole cluster)

Run the same command again after any failure: it computes only what is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: it imports this checkout's packages, installed or not
    sys.path[0] = next(
        str(folder) for folder in Path(__file__).resolve().parents if (folder / "teachercache").is_dir()
    )
    # So do the workers of a cluster that it starts.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{sys.path[0]}{os.pathsep}{path}" if path else sys.path[0]

from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import build
from teachercache.jobs.launch import recipe_and_overrides, require_absolute_in_job, run
from teachercache.jobs.recipes import find_recipe
from teachercache.pipeline.sources.several import own_places
from teachercache.pipeline.terminal import Terminal


def main() -> None:
    path, overrides = recipe_and_overrides(__doc__ or "")
    recipe = find_recipe(BuildRecipe, path, ["runner.kind=ray", *overrides])
    require_absolute_in_job("cache", recipe.cache)
    for place in own_places(recipe.source.path, recipe.source.kind):
        require_absolute_in_job("source.path", place)
    result = build(recipe, Terminal())
    print(f"cache {result.cache.storage.url}: {result.views} views in {result.wall_s:.1f} s")


if __name__ == "__main__":
    run(main)
