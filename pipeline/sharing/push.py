"""Push a cache, or a part of it, to a data set on the Hugging Face Hub."""

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetInfo, HfApi

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError, CacheMismatchError
from teachercache.pipeline.places.hub_storage import BESIDE, PROTOCOL, pushing
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.own_places import PIPE
from teachercache.pipeline.rearranging.rearrangement import Rearrangement
from teachercache.pipeline.rearranging.subset import subset
from teachercache.pipeline.records.manifest import SPEC_NAME
from teachercache.pipeline.records.spec import digest
from teachercache.pipeline.sharing.card import cards
from teachercache.pipeline.sharing.licences import licence_of, require_shareable

_LAST = [SPEC_NAME, *BESIDE]
_SECRET = re.compile(rf"{PIPE}.|//[^/]*@|\?.*=")  # a command, user:password@ or a signed URL
log = logging.getLogger(__name__)


def push_cache(
    cache: str,
    repository: str,
    *,
    teachers: Sequence[str] | None = None,
    levels: Sequence[int] | None = None,
    fraction: float | None = None,
    private: bool = False,
    accept_licences: bool = False,
    run: Callable[[Rearrangement], FeatureCache] = Rearrangement.run,
) -> str:
    """Push a complete cache with its card to "user/name", made if it is not there, and return the address.

    What is pushed is first laid out as a `subset` beside the cache (for one at a URL, in the working folder),
    filled by `run` and removed at the end. `cache.json` is committed last, so a repository holds a cache once
    it holds all of it; after any stop the same call continues.

    Raises `IncompleteCacheError`, `LicenceError` for what may not simply be public, `CacheMismatchError`
    where the repository holds something else, `CacheError` if the Hub refuses it.
    """
    source = FeatureCache.open(cache)
    source.require_complete(teachers)
    kept = source.check_teachers(teachers)
    if not private and not accept_licences:
        licences = {name: licence_of(source.spec.teachers[name]) for name in kept}
        require_shareable(licences, source.num_samples if source.spec.images != "reference" else 0)
    here = cache if isinstance(source.storage, LocalStorage) else cache.rstrip("/").rpartition("/")[2]
    choice = digest([source.spec.cache_id, repository, kept, levels, fraction])
    folder = Path(f"{Path(here).resolve()}.push-{choice[:8]}")
    api = HfApi()
    place: dict[str, Any] = {"repo_id": repository, "repo_type": "dataset"}
    with pushing("cache", repository, CacheError):
        address = str(api.create_repo(**place, private=private, exist_ok=True))
    pushed = run(subset(cache, str(folder), teachers=kept, levels=levels, fraction=fraction))
    if _SECRET.search(pushed.spec.dataset.location):
        log.warning("the images' place is not pushed, since it may hold a key; readers name their own")
        hidden = pushed.spec.dataset.model_copy(update={"location": PIPE})  # which no reader follows
        pushed.manifest.write_spec(pushed.spec.model_copy(update={"dataset": hidden}))
    for name, text in cards(pushed, repository).items():
        (folder / name).write_text(text)
    with pushing("cache", repository, CacheError):
        try:
            _require_own(api.dataset_info(repository), pushed, private)
        except CacheError:  # no later push needs what was laid out
            shutil.rmtree(folder)
            raise
        api.upload_folder(**place, folder_path=folder, ignore_patterns=[*_LAST])
        api.upload_folder(**place, folder_path=folder, allow_patterns=_LAST)
    shutil.rmtree(folder)
    return address


def _require_own(there: DatasetInfo, pushed: FeatureCache, private: bool) -> None:
    """Raises unless there is nothing, this cache, or what it was before it grew; and no public eye on it."""
    files = {file.rfilename for file in there.siblings or ()} - BESIDE
    others = sorted(files - {name for name, _ in pushed.storage.walk()})
    if not others and SPEC_NAME in files:
        ours, older = pushed.spec, FeatureCache.open(f"{PROTOCOL}datasets/{there.id}").spec
        for name in older.teachers:
            if name not in ours.teachers or ours.shard_content_id(name, 0) != older.shard_content_id(name, 0):
                others = [f"{SPEC_NAME} of another cache"]
    if others:
        raise CacheMismatchError(
            f"{there.id} holds something else.",
            got=f"{len(others)} other files, such as {others[0]}",
            expected="an empty repository, one that is not there yet, or an earlier push of this cache",
            do="choose another name, or delete what is there",
        )
    if private and not there.private:
        do = "make it private in its settings, or choose another name"
        raise CacheError(f"{there.id} is public.", do=do)
