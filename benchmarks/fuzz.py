"""Coverage-guided fuzzing of every file of a cache, and of tars that images come from.

    pip install "teachercache[fuzz]"
    python -m benchmarks.fuzz [TARGET …] [--seconds 60] [--corpus FOLDER]

Each target runs in a process of its own, as libFuzzer does not return. It begins with the file as it was
written, puts mutations of it into a small cache, with its checksums made right again where there are some,
and does all that is done with a cache. Whatever comes out that is not an error of ours ends it, and so do
more than 2 GB and more than 20 s. `tests/contract/test_hostile_files.py` is the part that runs in the suite.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import google_crc32c

ROWS_PER_SHARD = 6
TARGETS = {
    "cache.json": "zarr/cache.json",
    "commit record": "zarr/commits/alpha/00000.json",
    "quarantine list": "zarr/quarantine/00000.jsonl",
    "sample table": "zarr/samples.parquet",
    "array metadata": "zarr/teachers/alpha/codes/zarr.json",
    "shard": "zarr/teachers/alpha/codes/c/0/0/0/0/0",
    "shard index": "zarr/teachers/alpha/codes/c/1/0/0/0/0",
    "tar shard": "webdataset/teachers/alpha/00000.tar",
    "tar index": "webdataset/teachers/alpha/00001.tar",
    "image tar": "images.tar",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, help="keep the inputs that reached new code here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.exit('atheris is not installed: pip install "teachercache[fuzz]"')
    with tempfile.TemporaryDirectory() as scratch:
        corpus = arguments.corpus or Path(scratch)
        if arguments.worker:
            _fuzz(arguments.worker, Path(scratch), corpus, arguments.seconds)
        failed = [
            target for target in arguments.targets or TARGETS if not _run(target, corpus, arguments.seconds)
        ]
    if failed:
        sys.exit(f"{', '.join(failed)}: something came out that is not an error of ours")


def _run(target: str, corpus: Path, seconds: int) -> bool:
    command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", target, "--seconds", str(seconds)]
    done = subprocess.run(
        [*command, "--corpus", str(corpus / target.replace(" ", "_"))],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines()
    runs = next((line for line in reversed(lines) if line.startswith(("Done", "stat::number"))), "")
    print(f"{target}: {'sound' if done.returncode == 0 else 'FAILED'}. {runs}", flush=True)
    if done.returncode:
        print(done.stdout[-4000:], "\n".join(lines[-60:]), sep="\n", flush=True)
    return done.returncode == 0


def _fuzz(target: str, scratch: Path, corpus: Path, seconds: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["teachercache.pipeline", "teachercache.jobs.inspection"]):
        one_input, original = _prepare(target, scratch)
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "original").write_bytes(original)
    limits = [
        f"-max_total_time={seconds}",
        "-rss_limit_mb=2048",
        "-timeout=20",
        f"-max_len={4 * len(original)}",
    ]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={corpus}/", str(corpus)], one_input)
    atheris.Fuzz()


def _prepare(target: str, scratch: Path) -> tuple[Callable[[bytes], None], bytes]:
    from teachercache.pipeline.errors import TeacherCacheError
    from teachercache.pipeline.sources import open_source
    from tests.contract.test_hostile_files import make_victim, read_all, use
    from tests.images import tar_bytes

    path = scratch / TARGETS[target]
    if target == "image tar":
        photo = b"\xff\xd8\xff\xe0" + b"x" * 600
        path.write_bytes(tar_bytes([("a.jpg", photo), ("b/c.cls", b"7"), ("b/c.jpg", photo)]))

        def check() -> None:
            open_source(str(path), "webdataset").scan()
    else:
        store = TARGETS[target].split("/")[0]
        make_victim(scratch / "made", "webdataset" if store == "webdataset" else "zarr").rename(
            scratch / store
        )

        def check() -> None:  # verifying takes thirty times as long as reading
            (use if target in ("cache.json", "commit record") else read_all)(scratch / store)

    original = path.read_bytes()
    repair = _REPAIRS.get(target, bytes)

    def one_input(data: bytes) -> None:
        path.write_bytes(repair(data))
        with suppress(TeacherCacheError, IndexError):
            check()

    return one_input, original


def _sealed_record(data: bytes) -> bytes:
    from teachercache.pipeline.records.seal import UNSEALED, seal
    from tests.contract.test_hostile_files import sealed

    try:
        content = json.loads(data)
        return sealed(content) if isinstance(content, dict) else seal(data + UNSEALED.encode())
    except (ValueError, RecursionError):
        return seal(data + UNSEALED.encode())


def _sealed_again(data: bytes) -> bytes:
    """A file whose seal is somewhere in it."""
    from teachercache.pipeline.records.seal import UNSEALED, seal

    mark = UNSEALED.encode()[:9]
    start = data.rfind(mark) + len(mark)
    blank = data[:start] + b"0" * 32 + data[start + 32 :]
    return seal(blank) if UNSEALED.encode() in blank else data


def _with_index_checksum(data: bytes) -> bytes:
    """The crc32c of a shard's index, made right."""
    from teachercache.pipeline.stores.shard_format import checksum

    start = len(data) - 16 * ROWS_PER_SHARD - 4
    return data[:-4] + checksum(data[start:-4]) if start > 0 else data


def _with_tar_checksums(data: bytes) -> bytes:
    """Of a tar shard: the crc32c of every row that its index names, and of the index."""
    import numpy as np

    from teachercache.pipeline.stores.webdataset_store import index_bytes

    size = 24 * ROWS_PER_SHARD + 4
    start = len(data) - 1024 - size - (-size % 512)
    if start < 0:
        return data
    index = np.frombuffer(data[start : start + size - 4], "<u8").reshape(-1, 3).copy()
    for row in index:
        row[2] = google_crc32c.value(data[int(row[0]) : int(row[0]) + int(row[1])])
    return data[:start] + index_bytes(index) + data[start + size :]


_REPAIRS: dict[str, Callable[[bytes], bytes]] = {
    "cache.json": _sealed_record,
    "commit record": _sealed_record,
    "quarantine list": _sealed_again,
    "sample table": _sealed_again,
    "shard index": _with_index_checksum,
    "tar index": _with_tar_checksums,
}

if __name__ == "__main__":
    main()
