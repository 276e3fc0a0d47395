"""Logs what a recipe takes from the environment (`${oc.env:HOME}`): recipes, too, come from strangers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

log = logging.getLogger(__name__)
_names: ContextVar[set[str] | None] = ContextVar("names", default=None)


def _env(name: str, *default: str | None) -> str | None:
    if (names := _names.get()) is not None:
        names.add(name)
    return oc.env(name, *default)


# However deeply it is nested in other interpolations.
OmegaConf.register_resolver("oc.env", _env, replace=True)


@contextmanager
def named_variables(recipe: object) -> Iterator[None]:
    """Log the names, not the values, of the variables that are read meanwhile."""
    names = set[str]()
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)
        if names:
            log.warning("recipe %s takes from the environment: %s", recipe, ", ".join(sorted(names)))
