"""Codecs learn their tables and are judged on a sample of rows, or take the tables of another cache."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from teachercache.cache_builder.teachers import Teacher
from teachercache.pipeline.codecs import codec_names, get_codec
from teachercache.pipeline.codecs.fidelity import measure_fidelity
from teachercache.pipeline.errors import CacheMismatchError, CodecError, EmptySourceError, ImageDecodeError
from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import Manifest
from teachercache.pipeline.records.spec import CacheSpec, GridSpec
from teachercache.pipeline.records.stats_files import read_tables
from teachercache.pipeline.sources import Source, decode_image
from teachercache.pipeline.views import View, render_view

LEAST_COSINE = 0.95  # 99% of the tokens keep this much; int3-hadamard keeps .98 of usual features


@dataclass(frozen=True)
class CalibrationSample:
    """Views spread evenly over the samples, and where their images are. Small, to send to processes."""

    source: Source
    places: tuple[tuple[str, int, int], ...]
    views: tuple[View, ...]
    num_rows: int

    def pixels(self, size: tuple[int, int], limit: int | None = None) -> Tensor:
        """uint8 (R, 3, height, width): the first `num_rows` (or `limit`) views whose images decode."""
        num_rows = min(limit or self.num_rows, self.num_rows)
        renders: list[Tensor] = []
        for place, view in zip(self.places, self.views, strict=True):
            if len(renders) == num_rows:
                break
            with suppress(ImageDecodeError):  # the build will quarantine it, with the reason
                renders.append(render_view(decode_image(self.source.read(*place)), view, size))
        if not renders:
            raise EmptySourceError(
                "None of the images of the calibration sample can be decoded.",
                got=f"{len(self.places)} images of {self.source.location}",
                expected="images that decode",
                do="try to open some of them with an image viewer",
            )
        return torch.stack(renders)


@dataclass(frozen=True)
class Calibration:
    """A codec's tables (none for codecs without), and what it lost on the sample.

    `better`: where that is more than `LEAST_COSINE` allows, the advised codecs that lose less, and what their
    `cosine_p1` is.
    """

    tables: dict[str, Tensor]
    fidelity: dict[str, float]
    better: dict[str, float] = field(default_factory=dict)

    def require_fidelity(self, teacher: str, codec: str) -> None:
        """Raises `CodecError` where the codec ruins these features."""
        if self.fidelity["cosine_p1"] >= LEAST_COSINE:
            return
        better = ", ".join(f"{name} ({cosine:.3f})" for name, cosine in self.better.items())
        raise CodecError(
            f"Codec {codec} loses too much of the features of teacher {teacher}.",
            got="token cosines of {cosine_mean:.3f}, 1% below {cosine_p1:.3f}".format(**self.fidelity),
            expected=f"1% below no less than {LEAST_COSINE}",
            do=f"set teachers.{teacher}.codec to one that keeps to it: {better}; or set accept_loss=true",
        )


def raw_losses(spec: CacheSpec, names: Iterable[str]) -> Iterator[str]:
    """A line for each of these teachers whose features lose more, as they are, than `LEAST_COSINE` allows."""
    for name in names:
        if (p1 := spec.fidelity.get(name, {}).get("raw_cosine_p1", 1)) < LEAST_COSINE:
            yield (
                f"Codec {spec.teachers[name].codec} loses much of the raw features of teacher {name}: 1% of"
                f" the token cosines are below {p1:.3f}. Train with distillation.targets=standardised (on no"
                " adjoint grid), or choose another codec."
            )


@torch.inference_mode()
def sample_features(
    teacher: Teacher, sample: CalibrationSample, grid: GridSpec, batch_size: int, limit: int | None = None
) -> Tensor:
    """The sample's features as they enter the codec, (R, S, h, w, C) float32 on the CPU."""
    device = next(teacher.parameters()).device
    batches = sample.pixels(teacher.spec.render_size, limit).split(batch_size)
    maps = (stored_form(teacher(batch.to(device)).feature_maps_BSHWC, grid)[0] for batch in batches)
    return torch.cat([map_.float().cpu() for map_ in maps])


def calibrate(
    teachers: Mapping[str, Teacher], sample: CalibrationSample, batch_size: int
) -> dict[str, Calibration]:
    """Tables and fidelity of every teacher's codec on the sample."""
    results = {}
    for name, teacher in teachers.items():
        codec = get_codec(teacher.spec.codec)
        limit = None if codec.needs_tables else batch_size  # a plain codec learns nothing and loses little
        features_RSHWC = sample_features(teacher, sample, teacher.spec.grid, batch_size, limit).clone()
        codec.calibrate(features_RSHWC)
        fidelity = measure_fidelity(codec, features_RSHWC)
        better = _better_codecs(features_RSHWC) if fidelity.cosine_p1 < LEAST_COSINE else {}
        results[name] = Calibration(codec.state(), asdict(fidelity), better)
    return results


def _better_codecs(features_RSHWC: Tensor) -> dict[str, float]:
    """Of the advised codecs that fit, those of `LEAST_COSINE`."""
    found = {}
    for codec in map(get_codec, codec_names("advised")):
        rows_RSHWC = features_RSHWC[: codec.trial_rows[1]]
        if codec.fits(rows_RSHWC.shape[-1]) and len(rows_RSHWC) >= codec.trial_rows[0]:
            found[codec.name] = measure_fidelity(codec.calibrate(rows_RSHWC), rows_RSHWC).cosine_p1
    return {name: cosine for name, cosine in found.items() if cosine >= LEAST_COSINE}


def other_tables(url: str | None, spec: CacheSpec, names: Iterable[str]) -> dict[str, Calibration]:
    """Tables and fidelity from the cache at `url`, for those of the named teachers whose codecs need tables.

    Caches encoded with the same tables can be merged. Hashes that a teacher of `spec` does not have yet are
    not compared. Raises `CacheMismatchError` with every reason why features encoded with these tables could
    not be merged with that cache, and `CacheError` where it cannot be read.
    """
    if url is None:
        return {}
    manifest = Manifest(open_storage(url))
    other = manifest.spec()
    calibrated = [name for name in names if get_codec(spec.teachers[name].codec).needs_tables]
    held = ", ".join(other.teachers) or "no teacher"
    differences = [
        f"teachers.{name}: that cache has {held}" for name in calibrated if name not in other.teachers
    ]
    for what, (there, here) in other.differences(spec).items():
        of, _, own = what.partition(".")
        name, _, key = own.rpartition(".")
        unknown = here is None and key in ("weights_hash", "tables_hash")
        if of == "teachers" and name in calibrated and not unknown:
            differences.append(f"{what}: {there!r} there, {here!r} here")
    if differences:
        raise CacheMismatchError(
            "The codec tables of that cache are not for these teachers:\n  - " + "\n  - ".join(differences),
            got=f"tables_from={url}",
            expected="a cache whose teachers of the same names have the same settings and weights",
            do="use the settings of that cache, or leave tables_from out: the codecs then learn their own "
            "tables, and the two caches cannot be merged",
        )
    return {
        name: Calibration(
            read_tables(manifest, name, other.teachers[name].tables_hash),
            dict(other.fidelity.get(name, {})),
        )
        for name in calibrated
    }
