"""Versions of everything that can change a feature, kept in `cache.json` and in every commit record."""

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("teachercache", "torch", "torchvision", "timm", "transformers", "pillow", "numpy", "zarr")


@cache
def versions() -> dict[str, str]:
    """{package: version}; a package that is not installed is left out."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
