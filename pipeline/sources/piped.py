"""Tars that commands print, as `webdataset` names them: `pipe:curl -s https://host/train-{000..146}.tar`.

Its `gopen` runs the commands and its `expand_urls` finds the braces. A build reads images by key and more
than once, which no pipe gives, so each tar is streamed once into a folder and then read there as any other.
Tars at `s3://` or `hf://` are read where they are (`tar.py`), with the store's own credentials and retries.
"""

import os
import tarfile
from pathlib import Path

import xxhash

from teachercache.pipeline.errors import SourceError, extra
from teachercache.pipeline.places.local_storage import LocalStorage


def fetched(location: str) -> LocalStorage:
    """The folder with the tars of a `pipe:` location, in order; those of an earlier run are kept.

    Raises `SourceError` for a command that fails, and for a tar that ends early.
    """
    with extra("build"):
        from webdataset.gopen import gopen
        from webdataset.shardlists import expand_urls
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    storage = LocalStorage(caches / "teachercache/pipes" / xxhash.xxh3_64_hexdigest(location.encode()))
    for number, url in enumerate(expand_urls(location)):
        if storage.exists(name := f"{number:06d}.tar"):
            continue
        end = b""
        try:
            with storage.open_write(name) as file, gopen(url) as stream:
                while block := stream.read(1 << 20):
                    file.write(block)
                    end = (end + block)[-tarfile.BLOCKSIZE :]
                if end != bytes(tarfile.BLOCKSIZE):
                    raise EOFError(f"{file.nbytes:,} bytes without the zeros that end a tar")
        except (EOFError, OSError) as error:
            raise SourceError(
                f"The stream of {url} ends early, or cannot be read.",
                got=error,
                expected="a command that prints a whole tar and exits with 0",
                do="try the command in a shell, and run the same build again: whole tars are kept",
            ) from error
    return storage
