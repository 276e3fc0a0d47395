"""Several sources as one: ImageNet-21k and a part of Open Images, say (KPU, "Datasets").

Keys and paths begin with the name of their source. The location is a JSON object, {name: {"path": …, "kind":
…}}, or {name: path} where the kinds are to be detected.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Self

import pyarrow.compute as pc
import xxhash

from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.sources.source import Scanned, Source

KIND = "several"


class SeveralSources(Source):
    kind = KIND

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = dict(sorted(sources.items()))
        self.location = json.dumps(
            {name: {"path": one.location, "kind": one.kind} for name, one in self._sources.items()}
        )

    @classmethod
    def at(cls, location: str, open_one: Callable[[str, str], Source]) -> Self:
        """Raises `SourceError` for a location that does not name them, and what `open_one` raises."""
        return cls({name: open_one(one["path"], one["kind"]) for name, one in places(location).items()})

    @property
    def is_local(self) -> bool:
        return all(one.is_local for one in self._sources.values())

    def listing(self) -> str:
        listings = "".join(f"{one.listing()} {name}\n" for name, one in self._sources.items())
        return xxhash.xxh3_128_hexdigest(listings.encode())

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        name, _, own = path.partition("/")
        if name not in self._sources:
            raise self._gone(path)
        return self._sources[name].read(own, offset, nbytes)

    @property
    def streams(self) -> bool:
        return any(one.streams for one in self._sources.values())

    def stream(self, path: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        name, _, own = path.partition("/")
        return self._sources[name].stream(own, places) if name in self._sources else iter(())

    def units(self) -> Iterable[Any]:
        return ((name, unit) for name, one in self._sources.items() for unit in one.units())

    def scan_unit(self, unit: Any) -> Scanned:
        name, own = unit
        table, left_out = self._sources[name].scan_unit(own)
        for column in ("key", "path", "qualified_key"):
            named = pc.binary_join_element_wise(f"{name}/", table[column], "")
            table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), named)
        return table, left_out

    def names(self) -> Iterator[str]:
        return chain.from_iterable(one.names() for one in self._sources.values())

    def other_files(self) -> Iterable[str]:
        return chain.from_iterable(one.other_files() for one in self._sources.values())


def own_places(location: str, kind: str) -> list[str]:
    """The place of a source, or those of several."""
    return [one["path"] for one in places(location).values()] if kind == KIND else [location]


def places(location: str) -> dict[str, dict[str, str]]:
    """{name: {"path", "kind"}} of a location. Raises `SourceError`."""
    try:
        found = {
            str(name): {"kind": "auto"} | ({"path": place} if isinstance(place, str) else place)
            for name, place in json.loads(location).items()
        }
        sound = found and all(
            one.keys() == {"path", "kind"} and all(isinstance(value, str) for value in one.values())
            for one in found.values()
        )
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound or any("/" in name or not name.strip(".") for name in found):
        raise SourceError(
            "This does not say where several sources are.",
            got=location,
            expected='the place of each by its name, as JSON: {"in21k": "/data/in21k", "open": "/data/open"}',
            do="name the places like this, each source as in the recipe that built the cache",
        )
    return found
