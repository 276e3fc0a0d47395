"""Build a teacher cache on a Ray cluster.

    ray job submit --working-dir . -- python jobs/cache_teachers.py RECIPE key=value …

RECIPE is a YAML file, or the name of one in jobs/recipes (for example imagenet1k_vitl). Overrides:

    cache=/data/cache                   where the cache goes (absolute, or s3://…)
    source.path=/data/imagenet/train    a folder, tar(s) or Parquet files
    teachers=[dinov2_large,sam_large]   presets, or any timm model
    views.num_views=4                   crops of each image
    runner.num_actors=8                 actors (default: the whole cluster)

Run the same command again after any failure: it computes only what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The checkout instead of this folder: it also runs where teachercache is not installed.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache_builder.builder import build
from cache_builder.recipe import BuildRecipe
from jobs.launch import recipe_and_overrides, require_absolute_in_job, run
from pipeline.recipe import load_recipe
from pipeline.terminal import Terminal


def main() -> None:
    path, overrides = recipe_and_overrides(__doc__ or "")
    recipe = load_recipe(BuildRecipe, path, ["runner.kind=ray", *overrides])
    require_absolute_in_job("cache", recipe.cache)
    require_absolute_in_job("source.path", recipe.source.path)
    result = build(recipe, Terminal())
    print(f"cache {result.cache.storage.url}: {result.views} views in {result.wall_s:.1f} s")


if __name__ == "__main__":
    run(main)
