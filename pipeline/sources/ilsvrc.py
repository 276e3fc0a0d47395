"""`ILSVRC2012_img_train.tar` as ImageNet distributes it: a tar of one tar per class."""

from collections.abc import Iterator
from functools import partial
from posixpath import basename, splitext

import pyarrow as pa

from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.sources.keys import printable
from teachercache.pipeline.sources.source import SampleRows, file_kind, is_image_name
from teachercache.pipeline.sources.tar import TarMember, TarSource, read_range, tar_members


class ILSVRCSource(TarSource):
    """Images stay where they are, two tars deep, and are read by byte range.

    The key is the name of the image, such as `n01440764_10026`; the label is its class, `n01440764`.
    """

    kind = "ilsvrc"

    def _units(self) -> Iterator[tuple[str, TarMember]]:
        """(path, member) of outer tars: usually a class, else a `problem`."""
        for path, nbytes in self._containers():
            with self.place.storage.open_read(path) as file:
                for member in tar_members(file, 0, nbytes):
                    if is_image_name(member.name):
                        raise SourceError(
                            f"{path} is not a tar of class tars.",
                            got=f"an image in it, {printable(member.name)}",
                            expected="one tar for each class, as in ILSVRC2012_img_train.tar",
                            do="give the path of that tar alone, or set kind: webdataset for a flat one",
                        )
                    if member.problem is None or is_class_tar(member.name):
                        yield path, member._replace(problem=None)
                    if member.problem is not None:
                        yield path, member

    def _scan_unit(self, unit: tuple[str, TarMember]) -> pa.Table:
        path, (name, start, nbytes, problem) = unit
        rows = SampleRows()
        if problem is not None:
            rows.reject(path, start, nbytes, problem, name)
            return rows.table()
        if not is_class_tar(name):
            rows.left_out[file_kind(name)] += 1
            return rows.table()
        wnid = splitext(basename(name))[0]
        with self.place.storage.open_read(path) as file:
            for member in tar_members(file, start, start + nbytes, rows.left_out):
                key = splitext(member.name)[0]
                if member.problem is not None:
                    rows.reject(path, member.offset, member.nbytes, member.problem, key)
                elif is_image_name(member.name):
                    read_first = partial(read_range, file, member.offset)
                    rows.add(key, f"{wnid}/{key}", path, member.offset, member.nbytes, wnid, read_first)
                else:
                    rows.left_out[file_kind(member.name)] += 1
        return rows.table()


def is_class_tar(name: str) -> bool:
    return splitext(name)[1].lower() == ".tar" and not basename(name).startswith(".")
