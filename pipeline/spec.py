"""What a cache is: the models behind `cache.json`. Pure data; nothing here opens a file or a model.

Row identity.  row = sample_index * num_views + view_index          (within a `Segment`)
Content identity.  `CacheSpec.content_id(teacher)` hashes all that decides the bytes of that teacher's
rows. Every commit record carries it, so rows of two specs can never be mixed in one cache.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION: Literal[1] = 1
IMAGES = "images"  # the pseudo-teacher under which copied source images are committed

Size = tuple[int, int]  # (height, width)
GridKind = Literal["native", "adjoint", "bilinear"]
PolicyName = Literal["imagenet_train", "imagenet_eval"]
Precision = Literal["float32", "bfloat16"]


class Strict(BaseModel):
    """A model that rejects unknown keys and cannot be changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ViewPolicy(Strict):
    """How views are drawn. The drawn parameters in `views.parquet`, not this, are the truth."""

    policy: PolicyName = "imagenet_train"
    num_views: int = Field(1, ge=1)
    size: Size = (384, 384)
    seed: int = Field(0, ge=0)
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = Field(0.5, ge=0, le=1)
    crop_fraction: float = Field(0.875, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must satisfy 0 < low <= high, got {self.ratio}")
        if min(self.size) < 1:
            raise ValueError(f"size must be two positive numbers of pixels, got {self.size}")
        if self.policy == "imagenet_eval" and self.num_views != 1:
            raise ValueError(
                f"imagenet_eval is one fixed centre crop, so num_views must be 1, got {self.num_views}"
            )
        return self


class GridSpec(Strict):
    """The token grid that is stored: the teacher's own, or one of `size` (h, w).

    `adjoint` stores Uᵀt and ‖t‖, from which SAK's flattened cosine and the squared error follow exactly;
    `bilinear` stores pooled features.
    """

    kind: GridKind = "native"
    size: Size | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "native") != (self.size is None):
            raise ValueError("grid 'native' takes no size; every other grid needs one, such as [24, 24]")
        return self


class TeacherSpec(Strict):
    """A frozen encoder, fully resolved: two equal specs give equal features.

    `render_size` is the size at which the view is rendered; it differs from `image_size` only under
    `sak_compat`, where the rendered view is then enlarged as the authors' code does it.
    `checkpoint` says where weights came from; `weights_hash` says what they are. `tables_hash` is that of
    the codec's calibrated tables, for codecs that have some.
    `native_grid` and `width` are what the model gives; `grid` says what is stored.
    """

    model: str
    pretrained: bool = True
    checkpoint: str | None = None
    random_seed: int = 0
    weights_hash: str | None = None
    tables_hash: str | None = None
    image_size: Size
    render_size: Size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    block_indices: tuple[int, ...]
    native_grid: Size
    width: int
    grid: GridSpec = GridSpec()
    codec: str = "f16"
    cls_token: bool = False
    global_width: int | None = None
    precision: Precision = "float32"

    @property
    def num_levels(self) -> int:
        return len(self.block_indices)

    @property
    def stored_grid(self) -> Size:
        return self.grid.size or self.native_grid


class DatasetSpec(Strict):
    """Which images. `location` is for people; only the fingerprint and the count are identity."""

    kind: str
    location: str
    num_samples: int = Field(ge=0)
    fingerprint: str


class Segment(Strict):
    """A block of rows: samples × views, samples-major, starting at `first_row`.

    A cache starts with one segment. Appending samples or views appends a segment, so no row that is
    on disk ever changes its number. `first_row` is a multiple of `rows_per_shard`.
    """

    first_row: int = Field(ge=0)
    samples: tuple[int, int]
    views: tuple[int, int]

    @property
    def num_views(self) -> int:
        return self.views[1] - self.views[0]

    @property
    def num_rows(self) -> int:
        return (self.samples[1] - self.samples[0]) * self.num_views


class CacheSpec(Strict):
    """The content of `cache.json`. `fidelity`: what each teacher's codec lost on the calibration sample."""

    schema_version: Literal[1] = SCHEMA_VERSION
    dataset: DatasetSpec
    views: ViewPolicy
    rows_per_shard: int = Field(ge=1)
    images: Literal["reference", "copy"] = "reference"
    store: Literal["zarr"] = "zarr"
    segments: tuple[Segment, ...]
    teachers: dict[str, TeacherSpec]
    created: str
    versions: dict[str, str]
    fidelity: dict[str, dict[str, float]] = {}
    cache_id: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rows_per_shard % self.views.num_views:
            raise ValueError(
                f"rows_per_shard must be a multiple of num_views, so that a shard holds whole samples: "
                f"got {self.rows_per_shard} and {self.views.num_views}"
            )
        identity = self.identity()
        if self.cache_id and self.cache_id != identity:
            raise ValueError(
                f"cache_id is {self.cache_id}, but the spec hashes to {identity}: cache.json was edited"
            )
        object.__setattr__(self, "cache_id", identity)
        return self

    @property
    def num_rows(self) -> int:
        """Rows in all segments, the padding of each segment's last shard not counted."""
        return sum(segment.num_rows for segment in self.segments)

    @property
    def num_shards(self) -> int:
        last = self.segments[-1]
        return -(-(last.first_row + last.num_rows) // self.rows_per_shard)

    def shard_segment(self, shard: int) -> Segment:
        start = shard * self.rows_per_shard
        for segment in self.segments:
            if segment.first_row <= start < segment.first_row + segment.num_rows:
                return segment
        raise IndexError(f"shard {shard} is not in 0…{self.num_shards - 1}")

    def shard_rows(self, shard: int) -> range:
        """The rows that exist in a shard (the last one of a segment may be short)."""
        segment = self.shard_segment(shard)
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, segment.first_row + segment.num_rows))

    def shard_samples(self, shard: int) -> range:
        """The samples whose views are the rows of a shard, `shard_segment(shard).num_views` each."""
        segment, rows = self.shard_segment(shard), self.shard_rows(shard)
        first, last = ((row - segment.first_row) // segment.num_views for row in (rows[0], rows[-1]))
        return range(segment.samples[0] + first, segment.samples[0] + last + 1)

    def content_id(self, teacher: str) -> str:
        """Hash of all that decides the bytes of this teacher's rows (or of the copied images)."""
        base = {
            "schema_version": self.schema_version,
            "dataset": [self.dataset.num_samples, self.dataset.fingerprint],
            "views": self.views.model_dump(mode="json"),
            "rows_per_shard": self.rows_per_shard,
        }
        if teacher == IMAGES:
            return digest(base | {"images": self.images})
        spec = self.teachers[teacher].model_dump(mode="json", exclude={"checkpoint"})  # the hash is identity
        return digest(base | {"teacher": spec})

    def identity(self) -> str:
        return digest(
            {
                "segments": [segment.model_dump(mode="json") for segment in self.segments],
                "contents": {name: self.content_id(name) for name in (*sorted(self.teachers), IMAGES)},
            }
        )


def digest(value: Any) -> str:
    """xxh3-128 of the canonical JSON of `value`, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()
