"""Files that are written together and get their names together."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Self

from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.manifest import FileRecord


class NewFiles(ABC):
    """A context manager: what was not published when it closes is dropped."""

    def __init__(self, storage: Storage, names: Iterable[str]) -> None:
        with ExitStack() as stack:
            self._files: dict[str, ChecksumWriter] = {
                name: stack.enter_context(storage.open_write(name)) for name in names
            }
            self._unpublished = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        dropped = GeneratorExit()
        self._unpublished.__exit__(type(dropped), dropped, None)

    def publish(self) -> dict[str, FileRecord]:
        """Finish the files and make them appear under their names. Returns their records."""
        self._end()
        self._unpublished.close()
        return {name: FileRecord.of(file) for name, file in self._files.items()}

    @abstractmethod
    def _end(self) -> None:
        """Write what follows the last row."""
