"""A teacher whose shards outlived `cache.json`: they count as its own only if their records say so."""

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import CacheMismatchError
from teachercache.pipeline.records.integrity import record_problem
from teachercache.pipeline.records.manifest import SPEC_NAME, Manifest, tables_name
from teachercache.pipeline.records.spec import CacheSpec, TeacherSpec


def kept_teacher(manifest: Manifest, spec: CacheSpec, name: str, weights_hash: str) -> TeacherSpec | None:
    """Teacher `name` of `spec` with the weights and tables of its committed shards; None without shards.

    Raises `CacheMismatchError` when they are those of another spec.
    """
    shards = manifest.committed_shards(name)
    if not shards:
        return None
    tables = tables_name(name)
    has_tables = get_codec(spec.teachers[name].codec).needs_tables and manifest.storage.exists(tables)
    hashes = {
        "weights_hash": weights_hash,
        "tables_hash": manifest.storage.checksum(tables) if has_tables else None,
    }
    teacher = spec.teachers[name].model_copy(update=hashes)
    whole = spec.changed(teachers={**spec.teachers, name: teacher})
    store = FeatureCache(manifest.storage, whole).store
    for shard, record in manifest.commits(name, shards).items():
        if (problem := record_problem(record, whole, store.shard_files(name, shard))) is not None:
            raise CacheMismatchError(
                f"{SPEC_NAME} is gone, and the remaining shards are not those of this recipe.",
                got=problem.reason,
                expected="the recipe, images, weights and library versions of the cache",
                do=f"restore {SPEC_NAME} from a copy, correct the recipe, or choose another place (cache=…)",
            )
    return teacher
