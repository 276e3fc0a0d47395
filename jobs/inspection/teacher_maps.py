"""One pass over the maps of a teacher: what is kept of them once they are no longer in memory."""

from collections.abc import Iterator

from torch import Tensor

from teachercache.jobs.inspection.feature_facts import FactCollector, LevelFacts, common_grid
from teachercache.pipeline.errors import CacheError, in_a_line
from teachercache.pipeline.exploring.feature_pictures import finite, heat, png_uri, token_norms
from teachercache.pipeline.exploring.map_reader import MapReader, level_name

_COMMON_TOKENS = 2048


class TeacherMaps:
    """Pictures (data URIs by row and level), statistics by level, and tokens to compare with other teachers'.

    `level_names` are those that pictures use. `damaged` says why a row could not be read. `common_tokens`
    holds, for each row, (levels, n, C) tokens of places that are the same in all teachers.
    """

    def __init__(self, reader: MapReader, name: str) -> None:
        self.name = name
        self.spec = reader.cache.spec.teachers[name]
        self.level_names = [level_name(self.spec, level) for level in range(self.spec.num_levels)]
        self.damaged: dict[int, str] = {}
        self.pictures: dict[tuple[int, int], str] = {}
        self.norm_pictures: dict[tuple[int, int], str] = {}
        self.common_tokens: dict[int, Tensor] = {}
        self.levels: list[LevelFacts] = []
        collector = FactCollector(self.spec.num_levels, self.spec.width)
        for row, maps_SHWC in self._readable(reader):
            collector.add(maps_SHWC)
            self.common_tokens[row] = _common_tokens(reader, maps_SHWC)
        if self.common_tokens:
            self.levels = collector.levels()
            for row, maps_SHWC in self._readable(reader):
                self._draw(reader, row, maps_SHWC)

    def _readable(self, reader: MapReader) -> Iterator[tuple[int, Tensor]]:
        for row in reader.rows:
            try:
                yield row, reader.maps(self.name, row)
            except CacheError as error:
                self.damaged[row] = in_a_line(error)

    def _draw(self, reader: MapReader, row: int, maps_SHWC: Tensor) -> None:
        for level, (level_facts, map_HWC) in enumerate(zip(self.levels, maps_SHWC, strict=True)):
            basis = reader.basis(self.name, level)
            self.pictures[row, level] = png_uri(basis.picture(map_HWC))
            self.norm_pictures[row, level] = png_uri(heat(token_norms(map_HWC), *level_facts.norm_range))


def _common_tokens(reader: MapReader, maps_SHWC: Tensor) -> Tensor:
    grids = [reader.cache.spec.teachers[name].stored_grid for name in reader.teachers]
    grid = min(height for height, _ in grids), min(width for _, width in grids)
    tokens_SNC = common_grid(finite(maps_SHWC), grid)
    return tokens_SNC[:, :: -(-len(reader.rows) * tokens_SNC.shape[1] // _COMMON_TOKENS)].clone()
