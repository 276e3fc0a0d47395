"""What a cache is: the models behind `cache.json`. Pure data; nothing here opens a file or a model.

Row identity.  row = sample_index * num_views + view_index          (within a `Segment`)
Content identity.  `CacheSpec.shard_content_id(teacher, shard)` hashes all that decides the bytes of that
teacher's rows in the shard's segment: its images, its views, the teacher. Every commit record carries it, so
rows of two specs never mix in one cache, and it stays the same when the cache grows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Self

import xxhash
from pydantic import Field, PrivateAttr, field_validator, model_validator

from teachercache.pipeline.errors import CacheError, require_known
from teachercache.pipeline.records.strict import Size, Strict
from teachercache.pipeline.records.view_policy import ViewPolicy

SCHEMA_VERSION: Literal[2] = 2
IMAGES = "images"  # the pseudo-teacher under which copied or rendered images are committed
MAX_SEGMENTS = 1 << 10
MAX_TEACHERS = 1 << 8

GridKind = Literal["native", "adjoint", "bilinear"]
Precision = Literal["float32", "bfloat16"]
Resampling = Literal["antialias", "plain"]
StoreKind = Literal["zarr", "webdataset"]
Compressor = Literal["zstd", "blosc", "lz4", "pcodec"]
ImagesKind = Literal["reference", "copy", "rendered"]


class GridSpec(Strict):
    """The token grid that is stored: the teacher's own, or one of `size` (h, w).

    `adjoint` stores ‖t‖ and the map that comes nearest to the teacher's when upsampled: SAK's flattened
    cosine and the squared error follow exactly. `bilinear` stores pooled features.
    """

    kind: GridKind = "native"
    size: Size | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "native") != (self.size is None):
            raise ValueError("grid 'native' takes no size; every other grid needs one, such as [24, 24]")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"a grid needs at least one token each way, got {self.size}")
        return self


class TeacherSpec(Strict):
    """A frozen encoder, fully resolved: two equal specs give equal features.

    `render_size` is the size at which the view is rendered; it differs from `image_size` only under
    `sak_compat`, where the rendered view is then enlarged as the authors' code does it.
    `checkpoint` says where weights came from; `weights_hash` says what they are. `tables_hash` is that of
    the codec's calibrated tables, for codecs that have some.
    `native_grid` and `width` are what the model gives; `grid` says what is stored.
    `resample_positions`: how positions are fitted to `image_size`; `layer_scale`: where random weights start
    LayerScale; a cache that says nothing has the defaults.
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
    # What came later is left out as it always was: caches are known by a hash of this.
    resample_positions: Resampling = Field("antialias", exclude_if=lambda how: how == "antialias")
    layer_scale: float | None = Field(None, exclude_if=lambda start: start is None)

    @property
    def num_levels(self) -> int:
        return len(self.block_indices)

    @property
    def is_padded(self) -> bool:
        """Whether its map ends in padding: what it sees has another aspect than the view."""
        (height, width), (rendered, across) = self.image_size, self.render_size
        return height * across != width * rendered

    @property
    def stored_grid(self) -> Size:
        return self.grid.size or self.native_grid


class DatasetSpec(Strict):
    """Which images. `location` is for people; fingerprint, count and `labels_hash` are identity.

    `listing` is the hash of the source's file list; while it stays the same, builds skip the scan.
    `labels_hash` is that of the samples' labels; None in caches made before it was introduced.
    """

    kind: str
    location: str
    num_samples: int = Field(ge=0)
    fingerprint: str
    listing: str | None = None
    labels_hash: str | None = None


class Segment(Strict):
    """A block of rows: samples × views, samples-major, starting at `first_row`.

    A cache starts with one segment. Appending samples or views appends segments, so no row on disk ever
    changes its number. `first_row` is a multiple of `rows_per_shard`. `fingerprint` is that of the segment's
    samples; None, in a cache that has never grown, means that of the dataset. `views_hash` is that of the
    segment's lines in the view table; None in caches made before it was introduced.
    """

    first_row: int = Field(ge=0)
    samples: tuple[int, int]
    views: tuple[int, int]
    fingerprint: str | None = None
    views_hash: str | None = None

    @property
    def num_views(self) -> int:
        return self.views[1] - self.views[0]

    @property
    def num_rows(self) -> int:
        return (self.samples[1] - self.samples[0]) * self.num_views


class CacheSpec(Strict):
    """The content of `cache.json`. `fidelity`: what each teacher's codec lost on the calibration sample.

    `covariance`: whether the statistics of the features keep it, 8 C² bytes per level and shard.
    `images`: what the cache holds of them: nothing, copies of their files, or the pixels of every row.
    `compressor`: of the rows of a Zarr store; like the store, it changes no row and no identity.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    dataset: DatasetSpec
    views: ViewPolicy
    rows_per_shard: int = Field(ge=1)
    images: ImagesKind = "reference"
    store: StoreKind = "zarr"
    compressor: Compressor | None = Field(None, exclude_if=lambda chosen: chosen is None)
    covariance: bool = False
    segments: tuple[Segment, ...] = Field(min_length=1, max_length=MAX_SEGMENTS)
    teachers: dict[str, TeacherSpec] = Field(max_length=MAX_TEACHERS)
    created: str
    versions: dict[str, str]
    fidelity: dict[str, dict[str, float]] = Field({})
    cache_id: str = ""
    _content_ids: dict[str, list[str]] = PrivateAttr(default_factory=dict)  # by teacher, one per segment

    @field_validator("views", mode="before")
    @classmethod
    def _photometric_of_older_caches(cls, value: Any) -> Any:
        return {"photometric": "color_jitter"} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for segment in self.segments:
            if segment.num_views < 1 or self.rows_per_shard % segment.num_views:
                raise ValueError(
                    f"rows_per_shard must be a multiple of num_views, so that a shard holds whole samples: "
                    f"got {self.rows_per_shard} and {segment.num_views}"
                )
        for name in (*self.teachers, IMAGES):
            self._content_ids[name] = [self._segment_content_id(name, segment) for segment in self.segments]
        identity = self.identity()
        if self.cache_id and self.cache_id != identity:
            raise ValueError(
                f"cache_id is {self.cache_id}, but the spec hashes to {identity}: cache.json was edited"
            )
        object.__setattr__(self, "cache_id", identity)
        return self

    @property
    def num_rows(self) -> int:
        """Rows in all segments, without the padding of each segment's last shard."""
        return sum(segment.num_rows for segment in self.segments)

    @property
    def teachers_and_images(self) -> list[str]:
        """The names that shards belong to: every teacher, and "images" where the cache holds any."""
        return [*self.teachers, *([IMAGES] if self.images != "reference" else [])]

    @property
    def with_arrays(self) -> list[str]:
        """The names that arrays belong to: every teacher, and "images" where these are rendered."""
        return [*self.teachers, *([IMAGES] if self.images == "rendered" else [])]

    def render_size(self, name: str) -> Size:
        """The size at which a teacher, or the student (name "images"), sees a stored view."""
        return self.views.stored_size if name == IMAGES else self.teachers[name].render_size

    @property
    def num_shards(self) -> int:
        last = self.segments[-1]
        return -(-(last.first_row + last.num_rows) // self.rows_per_shard)

    def check_teachers(self, teachers: Sequence[str] | None) -> list[str]:
        """`teachers`, or all of them. Raises `CacheError` for a name that such a cache does not hold."""
        names = list(self.teachers if teachers is None else teachers)
        for name in names:
            do = "add the teacher with `teachercache build`"
            require_known("cached teacher", name, self.teachers, do, CacheError)
        return names

    def shard_segment(self, shard: int) -> Segment:
        return self.segments[self.segment_index(shard)]

    def segment_index(self, shard: int) -> int:
        """Which segment a shard belongs to."""
        start = shard * self.rows_per_shard
        for index, segment in enumerate(self.segments):
            if segment.first_row <= start < segment.first_row + segment.num_rows:
                return index
        raise IndexError(f"shard {shard} is not in 0…{self.num_shards - 1}")

    def shards(self, teacher: str) -> list[int]:
        """The shards of a teacher, or of the images: of copies, those of first views."""
        count = range(self.num_shards)
        if teacher in self.with_arrays:
            return list(count)
        return [shard for shard in count if self.shard_segment(shard).views[0] == 0]

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

    @property
    def random_weights(self) -> list[str]:
        """The teachers that were never trained."""
        return [name for name, teacher in self.teachers.items() if not teacher.pretrained]

    def shard_content_id(self, teacher: str, shard: int) -> str:
        """Hash of all that decides the bytes of this teacher's rows (or of the images) in a shard."""
        return self._content_ids[teacher][self.segment_index(shard)]

    def content_id(self, teacher: str) -> str:
        """Hash of all that decides the bytes of this teacher's rows, in all shards."""
        first, *more = self._content_ids[teacher]
        return digest([first, *more]) if more else first

    def _segment_content_id(self, teacher: str, segment: Segment) -> str:
        """Independent of where the segment lies, so that a merged cache recognises it."""
        num_samples = segment.samples[1] - segment.samples[0]
        base = {
            "schema_version": self.schema_version,
            "dataset": [num_samples, segment.fingerprint or self.dataset.fingerprint],
            "views": self.views.model_dump(mode="json") | {"num_views": segment.views[1]},
            "rows_per_shard": self.rows_per_shard,
        }
        if segment.views[0]:
            base["first_view"] = segment.views[0]
        if teacher == IMAGES:
            return digest(base | {"images": self.images})
        spec = self.teachers[teacher].model_dump(mode="json", exclude={"checkpoint"})  # the hash is identity
        return digest(base | {"teacher": spec})

    def identity(self) -> str:
        content = {
            "segments": [segment.model_dump(mode="json", exclude_none=True) for segment in self.segments],
            "contents": {name: self.content_id(name) for name in (*sorted(self.teachers), IMAGES)},
        }
        if self.dataset.labels_hash is not None:
            content["labels"] = self.dataset.labels_hash
        return digest(content)

    def differences(self, other: CacheSpec) -> dict[str, tuple[object, object]]:
        """What decides rows and features and differs between the specs: (ours, theirs) by name.

        Fields of a teacher are compared where both have it, except for where its weights lie.
        """
        pairs: dict[str, tuple[object, object]] = {
            name: (getattr(self, name), getattr(other, name))
            for name in ("rows_per_shard", "images", "covariance", "store", "compressor")
        }
        pairs["source.kind"] = self.dataset.kind, other.dataset.kind
        pairs["teachers"] = sorted(self.teachers), sorted(other.teachers)
        parts: list[tuple[str, Strict, Strict]] = [("views", self.views, other.views)]
        for name in self.teachers.keys() & other.teachers.keys():
            parts.append((f"teachers.{name}", self.teachers[name], other.teachers[name]))
        for part, ours, theirs in parts:
            for field in type(ours).model_fields.keys() - {"checkpoint"}:
                pairs[f"{part}.{field}"] = getattr(ours, field), getattr(theirs, field)
        return {name: (one, two) for name, (one, two) in pairs.items() if one != two}

    def changed(self, **changes: Any) -> CacheSpec:
        """This spec with other fields, checked again, with the new `cache_id`."""
        return CacheSpec.model_validate(self.model_dump() | changes | {"cache_id": ""})


def digest(value: Any) -> str:
    """xxh3-128 of the canonical JSON of `value`, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()
