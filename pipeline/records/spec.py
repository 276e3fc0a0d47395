"""What a cache is: the models behind `cache.json`. Pure data; nothing here opens a file or a model.

Row identity.  row = sample_index * num_views + view_index          (within a `Segment`)
Content identity.  `CacheSpec.shard_content_id(teacher, shard)` hashes all that decides the bytes of that
teacher's rows in the shard's segment: its images, its views, the teacher. Every commit record carries it, so
rows of two specs never mix in one cache, and it stays the same when the cache grows.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import xxhash
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from teachercache.pipeline.errors import CacheError

SCHEMA_VERSION: Literal[2] = 2
IMAGES = "images"  # the pseudo-teacher under which copied source images are committed
MAX_SEGMENTS = 1 << 10
MAX_TEACHERS = 1 << 8

Size = tuple[int, int]  # (height, width)
GridKind = Literal["native", "adjoint", "bilinear"]
PolicyName = Literal["imagenet_train", "imagenet_eval", "multitask_train", "multitask_eval"]
Photometric = Literal["color_jitter", "distortion"]
Flip = Literal["random", "pairs"]
Precision = Literal["float32", "bfloat16"]
Resampling = Literal["antialias", "plain"]
StoreKind = Literal["zarr", "webdataset"]


class Strict(BaseModel):
    """An immutable model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ViewPolicy(Strict):
    """How views are drawn. The drawn parameters in `views.parquet`, not this, are authoritative.

    `scale`: of imagenet_train the share of the image's area; of multitask_train how much the image is
    magnified, 0.5 to 2 where nothing is said. `jitter_probability`: of multitask_train, for each of
    brightness, contrast, saturation and hue. `photometric`: what these do to pixels, see `View`; "distortion"
    where a new multitask_train says nothing, and "color_jitter" where a cache says nothing.
    `margin`: by how many pixels of the student's input the view that is stored, and that teachers see, is
    larger than `size` each way; the student sees a window of it, which moves by whole patches of `patch`
    pixels. `flip`: "pairs" gives every crop twice, as it is and mirrored.
    """

    policy: PolicyName = "imagenet_train"
    num_views: int = Field(1, ge=1)
    size: Size = (384, 384)
    seed: int = Field(0, ge=0)
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    margin: int = Field(0, ge=0)
    patch: int = Field(16, ge=1)
    flip: Flip = "random"
    flip_probability: float = Field(0.5, ge=0, le=1)
    crop_fraction: float = Field(0.875, gt=0, le=1)
    jitter_probability: float = Field(0.5, ge=0, le=1)
    photometric: Photometric = "color_jitter"

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_multitask(cls, value: Any) -> Any:
        is_multitask = isinstance(value, dict) and value.get("policy") == "multitask_train"
        return {"scale": (0.5, 2.0), "photometric": "distortion"} | value if is_multitask else value

    @model_serializer(mode="wrap")
    def _content(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omits later additions that do not concern this policy, because its hash identifies caches."""
        fields: dict[str, Any] = content(self)
        if self.policy != "multitask_train":
            fields.pop("jitter_probability", None)
        if self.policy != "multitask_train" or self.photometric == "color_jitter":
            fields.pop("photometric", None)
        for name, old in (("margin", 0), ("patch", 16), ("flip", "random")):
            if fields.get(name) == old:
                del fields[name]
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        largest = math.inf if self.policy == "multitask_train" else 1
        if not 0 < self.scale[0] <= self.scale[1] <= largest:
            limit = "" if self.policy == "multitask_train" else " <= 1"
            raise ValueError(f"scale must satisfy 0 < low <= high{limit}, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must satisfy 0 < low <= high, got {self.ratio}")
        if min(self.size) < 1:
            raise ValueError(f"size must be two positive numbers of pixels, got {self.size}")
        if self.is_fixed and (self.num_views != 1 or self.margin):
            raise ValueError(
                f"{self.policy} is one fixed view, so num_views must be 1 and margin 0, "
                f"got {self.num_views} and {self.margin}"
            )
        if self.flip == "pairs" and self.num_views % 2:
            raise ValueError(f"flip: pairs takes an even num_views, got {self.num_views}")
        if self.margin and any(side % self.patch for side in (self.margin, *self.size)):
            raise ValueError(
                f"margin and size must be multiples of views.patch, {self.patch} pixels of the student, "
                f"got {self.margin} and {self.size}"
            )
        if self.margin > min(self.size):  # else a window may miss an image that is small amid padding
            raise ValueError(f"margin must not exceed size, got {self.margin} and {self.size}")
        return self

    @property
    def is_fixed(self) -> bool:
        return self.policy in ("imagenet_eval", "multitask_eval")

    @property
    def stored_size(self) -> Size:
        """(height, width) in pixels of the view that is stored and that teachers see."""
        return self.size[0] + self.margin, self.size[1] + self.margin

    @property
    def windows_per_axis(self) -> int:
        return self.margin // self.patch + 1

    @property
    def middle(self) -> tuple[int, int]:
        """Where the window in the middle begins: (row, column), in pixels of the view."""
        return (self.margin // self.patch // 2 * self.patch,) * 2

    def seen_grid(self, grid: Size) -> Size:
        """How many tokens of a grid over the whole view have their centres in every window."""
        rows, columns = (
            max(1, tokens * seen // stored)
            for tokens, seen, stored in zip(grid, self.size, self.stored_size, strict=True)
        )
        return rows, columns


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
    `resample_positions`: how positions are fitted to `image_size`; a cache that says nothing has the default.
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
    resample_positions: Resampling = "antialias"

    @model_serializer(mode="wrap")
    def _content(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what came later and is as it always was: caches are known by a hash of this."""
        fields: dict[str, Any] = content(self)
        if self.resample_positions == "antialias":
            fields.pop("resample_positions", None)
        return fields

    @property
    def num_levels(self) -> int:
        return len(self.block_indices)

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
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    dataset: DatasetSpec
    views: ViewPolicy
    rows_per_shard: int = Field(ge=1)
    images: Literal["reference", "copy"] = "reference"
    store: StoreKind = "zarr"
    covariance: bool = False
    segments: tuple[Segment, ...] = Field(min_length=1, max_length=MAX_SEGMENTS)
    teachers: dict[str, TeacherSpec] = Field(max_length=MAX_TEACHERS)
    created: str
    versions: dict[str, str]
    fidelity: dict[str, dict[str, float]] = {}
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
        """The names that shards belong to: every teacher, and "images" where the images are copied."""
        return [*self.teachers, *([IMAGES] if self.images == "copy" else [])]

    @property
    def num_shards(self) -> int:
        last = self.segments[-1]
        return -(-(last.first_row + last.num_rows) // self.rows_per_shard)

    def check_teachers(self, teachers: Sequence[str] | None) -> list[str]:
        """`teachers`, or all of them. Raises `CacheError` for a name that such a cache does not hold."""
        names = list(self.teachers if teachers is None else teachers)
        for name in names:
            if name not in self.teachers:
                near = difflib.get_close_matches(name, self.teachers, 1)
                raise CacheError(
                    "This cache holds no teacher of that name.",
                    got=name,
                    expected=f"one of {', '.join(self.teachers)}",
                    do=f"did you mean {near[0]}?" if near else "add the teacher with `teachercache build`",
                )
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
        """The shards of a teacher, or of the copied images, which only first views have."""
        count = range(self.num_shards)
        if teacher != IMAGES:
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

    def shard_content_id(self, teacher: str, shard: int) -> str:
        """Hash of all that decides the bytes of this teacher's rows (or of the copied images) in a shard."""
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
            for name in ("rows_per_shard", "images", "covariance", "store")
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
