"""Copies of a shard's source images, byte for byte, in one tar that `webdataset` can read."""

from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.stores.new_files import NewFiles
from teachercache.pipeline.stores.tar_index import TAR_END, add_member, member_key

_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}
_SUFFIXES |= {b"GI": ".gif", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif"}


def image_tar_name(shard: int) -> str:
    return f"images/{shard:05d}.tar"


class ImageTarWriter(NewFiles):
    """`members` are the byte ranges (offset, nbytes) of the images added so far, (0, 0) for an absent one."""

    def __init__(self, storage: Storage, shard: int) -> None:
        name = image_tar_name(shard)
        super().__init__(storage, [name])
        self._file = self._files[name]
        self.members: list[tuple[int, int]] = []

    def add(self, key: str, image: bytes | None) -> None:
        """Add the next sample of the shard; None stands for one that cannot be decoded."""
        if image is None:
            self.members.append((0, 0))
            return
        start = add_member(self._file, member_key(key) + _SUFFIXES.get(image[:2], ".img"), image)
        self.members.append((start, len(image)))

    def _end(self) -> None:
        self._file.write(TAR_END)
