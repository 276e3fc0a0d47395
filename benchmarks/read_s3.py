"""How fast an epoch of tars comes from an object store: as a stream, and by one range a row.

    python -m benchmarks.read --s3

moto's S3 on loopback, in a process of its own; each repeat takes both loaders in turn and each a whole pass,
in the same order of rows, opened anew. Images of a build's source, a tar of JPEGs, are read both ways too.
moto reads a whole object for every range of it, so the ratios are more than a real store has; there a range
costs its latency.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.loading.loader import FeatureLoader, Sampler
from teachercache.pipeline.loading.streaming import StreamSampler
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.sources import open_source
from tests.images import encode, tar_bytes
from tests.make_cache import make_cache, make_images, teacher_spec

WIDTHS = {96: "442 kB", 1024: "4.7 MB"}  # bytes of a row: 4 levels × 24×24 × the width, float16
GOAL = 1.0
_THREADS = 4


def compare(num_rows: int, batch_size: int, repeats: int) -> None:
    """Print MB/s of both, by the size of a row, and the ratios beside their goal."""
    table = Table("row", "stream, MB/s", "ranges, MB/s", "stream / ranges", title="Over loopback S3")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, loopback_s3():
        images = make_images(Path(folder) / "images", num_rows)
        for width, size in WIDTHS.items():
            url, spec = f"s3://bucket/{width}", teacher_spec(width=width, grid=24, codec="f16")
            make_cache(
                url, images, teachers={"t": spec}, num_views=1, samples_per_shard=32, store="webdataset"
            )
            speeds: dict[str, list[float]] = {"stream": [], "ranges": []}
            for _ in range(repeats):
                for name, found in speeds.items():
                    found.append(_mb_per_s(url, batch_size, streams=name == "stream"))
            pairs = zip(speeds["stream"], speeds["ranges"], strict=True)
            ratio = statistics.median(one / other for one, other in pairs)
            medians = {name: statistics.median(found) for name, found in speeds.items()}
            table.add_row(size, *(f"{medians[name]:,.0f}" for name in speeds), f"{ratio:.2f}")
            results[size] = medians | {"stream / ranges": ratio}
        results["images"] = _source_images_per_s(num_rows, repeats)
    Console().print(table)
    told = ", ".join(f"{name} {value:,.0f}" for name, value in results["images"].items())
    print(f"images of a build's source a second, {_THREADS} threads for ranges: {told}")
    print(f"stream / ranges: goal at least {GOAL:g}, each row size")
    print(json.dumps({"benchmark": "read_s3", "rows": num_rows, "results": results, "cpus": os.cpu_count()}))


def _source_images_per_s(num_images: int, repeats: int) -> dict[str, float]:
    """Of a tar at s3://bucket, whose images a shard holds in their order; medians."""
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    jpeg = encode(Image.fromarray(noise), quality=70)
    open_storage("s3://bucket").write("set.tar", tar_bytes((f"{i:04d}.jpg", jpeg) for i in range(num_images)))
    source = open_source("s3://bucket/set.tar")
    rows = source.scan().select(["path", "offset", "nbytes"]).to_pylist()
    places = [(row["offset"], row["nbytes"]) for row in rows]
    seconds: dict[str, list[float]] = {"stream": [], "ranges": []}
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            assert len(list(source.stream("set.tar", places))) == num_images
            between = time.perf_counter()
            assert len(list(pool.map(lambda row: source.read(**row), rows))) == num_images
            seconds["stream"].append(between - start)
            seconds["ranges"].append(time.perf_counter() - between)
    rates = {name: num_images / statistics.median(found) for name, found in seconds.items()}
    return rates | {"kB an image": len(jpeg) / 1e3}


class _SameRows:
    """A stream's rows, for a loader that asks for them one by one."""

    def __init__(self, sampler: StreamSampler) -> None:
        self.batch, self.epochs = sampler.batch, sampler.epochs
        self.batch_size_per_process = sampler.batch_size_per_process


def _mb_per_s(url: str, batch_size: int, *, streams: bool) -> float:
    cache = FeatureCache.open(url)
    drawing = StreamSampler(cache, batch_size_per_process=batch_size, shuffle_buffer=2 * batch_size)
    sampler: Sampler = drawing if streams else _SameRows(drawing)
    steps = cache.num_rows // batch_size
    start, nbytes = time.perf_counter(), 0
    with FeatureLoader(cache, sampler, images=False, threads=_THREADS) as loader:
        for batch in islice(loader, steps):
            nbytes += sum(encoded.nbytes for encoded in batch.features.values())
        seconds = time.perf_counter() - start
    return nbytes / 1e6 / seconds


@contextmanager
def loopback_s3() -> Iterator[None]:
    """An empty bucket, s3://bucket, for this process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}",
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test"),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        import s3fs

        s3fs.S3FileSystem().makedirs("bucket")
        yield
    finally:
        server.terminate()
        server.join()


def _serve(port_to: Connection) -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class OneContinue(WSGIRequestHandler):
        """werkzeug would write "100 Continue" a second time."""

        protocol_version = "HTTP/1.1"

        def handle_expect_100(self) -> bool:
            return True

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app: Any = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=OneContinue)
    port_to.send(server.server_port)
    server.serve_forever()
