"""Every error that teachercache raises on purpose, in one tree.

    TeacherCacheError
    ├── RecipeError (ValueError)              a recipe or an override that makes no sense
    ├── ArgumentError (ValueError)            arguments of a call that do not fit it or each other
    ├── SourceError
    │   ├── SourceNotFoundError (FileNotFoundError)
    │   ├── EmptySourceError                  a source without a single image
    │   └── ImageDecodeError                  one image; quarantined, never ends a build
    ├── TeacherError
    │   ├── UnknownTeacherError (KeyError)
    │   ├── TeacherInputError (ValueError)    an input size, block or grid that cannot work
    │   └── WeightsNotFoundError (FileNotFoundError)
    ├── CacheError
    │   ├── CacheNotFoundError (FileNotFoundError)
    │   ├── UnknownKeyError (KeyError)        a key of no sample, or the end of several
    │   ├── CacheMismatchError                another spec at the same path
    │   ├── IncompleteCacheError              shards are not committed yet
    │   ├── AlreadyCommittedError             another job committed this shard; ours is dropped
    │   ├── IrregularFileError (FileNotFoundError)   a pipe, a device or a folder where a file should be
    │   └── CorruptShardError                 a commit record whose files differ
    ├── CodecError (ValueError)
    ├── DiskSpaceError (OSError)
    ├── StorageError (OSError)                a file or a store that failed on every attempt
    ├── BuildError                            shards failed; everything else is committed
    │   └── BuildInterruptedError             a signal or a hang ended the build; the same command continues
    ├── MissingExtraError (ImportError)       a package that an extra of `pip install` brings
    ├── TrainingError (FloatingPointError)    a loss that is no longer finite
    ├── CheckpointError                       a checkpoint that does not fit the run
    └── LicenceError                          a public push of what a teacher's licence restricts

A message says what was got, what was expected and what to do: `explain()` gives it that form.
"""

import difflib
import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_ROOM = "a place with room for what is still to be written"
_PLACE_ERRORS = {  # what is expected, and what to do
    errno.ENOSPC: (_ROOM, "free some space there, or choose a larger disk"),
    errno.EDQUOT: (_ROOM, "raise the quota, or choose another place"),
    errno.EROFS: ("a place where this user can make and delete files", "mount the place writable"),
    errno.EFBIG: (
        "a place that takes files of this size",
        "raise the limit (ulimit -f), or choose another place",
    ),
}


def explain(problem: str, *, got: object = None, expected: object = None, do: str | None = None) -> str:
    """One message in the house form: problem, then `got`, `expected` and `do`, each on its own line."""
    lines = [problem]
    for label, value in (("got", got), ("expected", expected), ("do", do)):
        if value is not None:
            lines.append(f"  {label + ':':<10}{value}")
    return "\n".join(lines)


def in_a_line(error: BaseException) -> str:
    """What an error says, for lists of many."""
    problem, got = getattr(error, "problem", f"{type(error).__name__}: {error}"), getattr(error, "got", None)
    return (problem if got is None else f"{problem.rstrip('.')}: {got}").splitlines()[0]


def place_error(error: BaseException, url: str) -> dict[str, str] | None:
    """`got`, `expected` and `do` for an error of the place written to (such as a full disk), else None."""
    if not isinstance(error, OSError) or error.errno not in _PLACE_ERRORS:
        return None
    expected, do = _PLACE_ERRORS[error.errno]
    got = f"{error.strerror}: {error.filename or url}".rstrip(": ")
    return {"got": got, "expected": expected, "do": f"{do}; then run the same command again"}


class TeacherCacheError(Exception):
    """Base of every error that a user can act on.

    Keyword arguments other than the problem are formatted by `explain()`.
    """

    def __init__(
        self, problem: str, *, got: object = None, expected: object = None, do: str | None = None
    ) -> None:
        self.problem, self.got = problem, got
        super().__init__(explain(problem, got=got, expected=expected, do=do))

    def __str__(self) -> str:  # KeyError and OSError would otherwise repr() or number the message
        return str(self.args[0])

    def __reduce__(self) -> tuple[object, ...]:  # errors cross process borders (Ray) as plain text
        return type(self), (str(self.args[0]),)


class RecipeError(TeacherCacheError, ValueError):
    """A recipe file or a `key=value` override that makes no sense."""


class ArgumentError(TeacherCacheError, ValueError):
    """Arguments of a call in Python that do not fit it or each other."""


def require_known(
    what: str,
    name: str,
    known: Collection[str],
    do: str | None = None,
    error: type[TeacherCacheError] = RecipeError,
) -> None:
    """Raise `error`, with the nearest known name or else what to `do`, unless `name` is known."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise error(
            f"There is no {what} of this name.",
            got=name,
            expected=f"one of {', '.join(known)}",
            do=f"did you mean {near[0]}?" if near else do,
        )


class Problems(list[TeacherCacheError]):
    """What stands in the way, asked of all before any is raised: one hides no other."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is raised, and go on."""
        try:
            yield
        except TeacherCacheError as error:
            self.append(error)

    def require_none(self) -> None:
        """Raise a single problem as it is, and several as one `RecipeError` that lists them."""
        if len(self) == 1:
            raise self[0]
        if self:
            listed = "\n  - ".join(str(problem).replace("\n", "\n    ") for problem in self)
            raise RecipeError(f"There are {len(self)} problems:\n  - {listed}")


class SourceError(TeacherCacheError):
    """A problem with the images that a cache is built from."""


class SourceNotFoundError(SourceError, FileNotFoundError):
    """The folder, tar or Parquet file is not there."""


class EmptySourceError(SourceError):
    """The place exists and holds no image that a source of this kind reads."""


class ImageDecodeError(SourceError):
    """One image cannot be turned into pixels; the builder quarantines it and goes on."""


class TeacherError(TeacherCacheError):
    """A problem with a teacher."""


class UnknownTeacherError(TeacherError, KeyError):
    """Neither a preset of ours nor a timm model."""


class TeacherInputError(TeacherError, ValueError):
    """An input size, a block index or a grid that this architecture cannot take."""


class WeightsNotFoundError(TeacherError, FileNotFoundError):
    """Pretrained weights are neither on the hub nor in a file."""


class CacheError(TeacherCacheError):
    """A problem with a cache on disk."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """No cache at this path."""


class UnknownKeyError(CacheError, KeyError):
    """A key that no sample has, or in which the keys of several end."""


class CacheMismatchError(CacheError):
    """The cache at this path was built with another spec."""


class IncompleteCacheError(CacheError):
    """The shards of requested rows are not committed."""


class AlreadyCommittedError(CacheError):
    """Another job has committed this shard in the meantime; a build handles this itself."""


class IrregularFileError(CacheError, FileNotFoundError):
    """A pipe, a device or a folder under the name of a file; it counts as missing."""


class CorruptShardError(CacheError):
    """A shard's files are not those that its commit record states."""


class CodecError(TeacherCacheError, ValueError):
    """Values that a codec cannot hold, or tensors that it cannot decode."""


class DiskSpaceError(TeacherCacheError, OSError):
    """The plan does not fit the disk, or the disk is full."""


class StorageError(TeacherCacheError, OSError):
    """A file could not be read, or a store did not answer, in several attempts; the data may still be sound.

    Its `errno` is always EIO: the system failed, not the content of a file.
    """

    errno = errno.EIO


class BuildError(TeacherCacheError):
    """Some shards failed for good; every other shard is committed."""


class BuildInterruptedError(BuildError):
    """A build, or one of its processes, was ended before all shards were done; the same command continues.

    `exit_status` follows the shell's convention: 143 after SIGTERM, 130 after Ctrl-C.
    """

    exit_status = 1


class MissingExtraError(TeacherCacheError, ImportError):
    """A package that `pip install teachercache` alone does not bring."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of what the extra `name` brings. Raises `MissingExtraError` where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        problem = f"This needs {error.name}, which is not installed: pip install 'teachercache[{name}]'"
        raise MissingExtraError(problem) from error


class TrainingError(TeacherCacheError, FloatingPointError):
    """Training cannot go on: the loss is no longer finite."""


class CheckpointError(TeacherCacheError):
    """A checkpoint that is missing, damaged or from another run, or a folder that another run writes to."""


class LicenceError(TeacherCacheError):
    """A public push of what the licences that it comes from do not simply let everybody have."""
