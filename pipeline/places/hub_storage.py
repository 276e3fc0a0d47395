"""A repository on the Hugging Face Hub, and how its client's errors are told."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from teachercache.pipeline.errors import CacheError, StorageError, TeacherCacheError
from teachercache.pipeline.places.remote_storage import RemoteStorage
from teachercache.pipeline.places.storage import Result

PROTOCOL = "hf://"
CARD_FILE, CROISSANT_FILE = "README.md", "croissant.json"
# No cache owns these.
BESIDE = {CARD_FILE, CROISSANT_FILE, ".gitattributes", "LICENSE", "LICENSE.md", "NOTICE"}


class HubStorage(RemoteStorage):
    """Files of `hf://datasets/user/name`, read by ranges. Each write would be a git commit: all are refused.

    A folder is listed once: open the cache again to see what was pushed since.
    """

    if_absent = (
        "check user/name; log in if it is private (`hf auth login` or HF_TOKEN); if a push was interrupted, "
        "run the same `teachercache push-cache` again"
    )

    def _retrying(self, read: Callable[..., Result], name: str, *rest: int) -> Result:
        try:
            return super()._retrying(read, name, *rest)
        except OSError as error:  # the client's, of an answer such as 403
            if getattr(getattr(error, "response", None), "status_code", 404) == 404:
                raise
            do = "check user/name, and log in with a token that may read it (`hf auth login` or HF_TOKEN)"
            raise StorageError(f"{self.url}/{name} cannot be read.", got=error, do=do) from error

    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        exactly = {"start": offset, "end": offset + nbytes, "cache_type": "none"}  # or 5 MiB more are fetched
        return self.filesystem.cat_file(self._path(name), **exactly)

    def read_ranges(self, names: Sequence[str], offsets: Sequence[int], nbytes: Sequence[int]) -> list[bytes]:
        ranges = zip(names, offsets, nbytes, strict=True)
        return self.each(lambda one: self.read_range(*one), ranges)  # its filesystem would read one by one

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise CacheError(
            "Nothing is written to a repository on the Hub file by file.",
            got=self.url,
            do="write it to a folder or an object store, then run `teachercache push-cache CACHE user/name`",
        )

    write = write_new = open_write = remove = _refuse


@contextmanager
def pushing(what: str, repository: str, error_class: type[TeacherCacheError]) -> Iterator[None]:
    """Turn the errors of the Hub's client and of its HTTP client into ours, which say what to do."""
    try:
        yield
    except TeacherCacheError:
        raise
    except Exception as error:  # huggingface_hub's own, ValueErrors and those of its HTTP client
        raise error_class(
            f"The {what} was not pushed to {repository}.",
            got=error.__cause__ if type(error) is RuntimeError else error,  # which names the file alone
            expected="a repository on the Hugging Face Hub that you may write to",
            do="log in with `hf auth login` or HF_TOKEN, with a token that may write, check the name "
            "(user/name), and run the same command again: what is there already is not sent twice",
        ) from error
