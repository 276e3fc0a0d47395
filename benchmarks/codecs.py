"""Rate, fidelity and speed of every codec on several kinds of features, or on those of a cache.

    python -m benchmarks.codecs                      synthetic features, a random ViT and trained teachers
    python -m benchmarks.codecs --cache PATH         the teachers of a cache stored as f16 or f32
    python -m benchmarks.codecs --ideas              also what was tried and not kept
    python -m benchmarks.codecs --compressors        also what Zarr's compressors make of them

Prints one table and, last, one line of JSON. Speeds are GB/s of float16 features, the median of several
runs into fresh memory. A codec is calibrated on rows that are not measured. On a GPU there are two more
columns: decoding compiled by torch.compile, and the limit, one copy kernel that moves as many bytes (half of
what decoding reads and writes, read once and written once). Take --rows 64 there: fewer fit its cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from benchmarks import signals, trained
from benchmarks.codec_ideas import IDEAS
from teachercache.pipeline.codecs import Encoded, codec_names, get_codec
from teachercache.pipeline.codecs.fidelity import compare, measure_fidelity
from teachercache.pipeline.records.spec import Compressor
from teachercache.pipeline.stores.through_zarr import encoded_rows, open_quietly
from teachercache.pipeline.stores.zarr_metadata import chunks_json

LEVELS, GRID = 4, (24, 24)
TRAINED_GRID = 16, 16
COLUMNS = {  # key: (head, format)
    "float16_ratio": ("of f16", ".4f"),
    "cosine_mean": ("cosine", ".5f"),
    "cosine_p1": ("1st pct.", ".5f"),
    "relative_l2": ("rel. L2", ".4f"),
    "raw_cosine_mean": ("raw cosine", ".5f"),
    "raw_cosine_p1": ("1st pct.", ".5f"),
    "encode_gb_per_s": ("encode", ".3f"),
    "decode_gb_per_s": ("decode", ".2f"),
    "compiled_decode_gb_per_s": ("compiled", ".1f"),
    "copy_gb_per_s": ("copy", ".1f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", help="measure on the features of this cache")
    parser.add_argument("--teacher", help="one teacher of the cache (default: all)")
    parser.add_argument("--rows", type=int, default=8, help="rows to calibrate on, and as many to measure")
    parser.add_argument("--width", type=int, default=1024, help="channels of synthetic features")
    parser.add_argument("--signals", nargs="+", help="these alone, of those that it prints (default: all)")
    parser.add_argument("--codecs", nargs="+", default=codec_names())
    parser.add_argument("--ideas", action="store_true", help="also codecs that did not win (slow)")
    parser.add_argument("--compressors", action="store_true", help="also compressed, codec by codec")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing; 0 measures no speed")
    args = parser.parse_args()

    results = []
    for name, sample, features in _signals(args):
        for codec in args.codecs:
            print(f"{name}: {codec}", file=sys.stderr)
            results.append({"signal": name, "codec": codec} | measure(codec, sample, features, args.repeats))
            for compressor in get_args(Compressor) if args.compressors else ():
                found = measure_compressed(codec, compressor, sample, features, args.repeats)
                results.append({"signal": name, "codec": f"{codec}, {compressor}"} | found)
        for idea in IDEAS if args.ideas else ():
            results.append({"signal": name, "codec": f"({idea})"} | measure_idea(idea, sample, features))
    Console(width=120).print(_table(results))
    machine = {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "codecs", "machine": machine, "results": results}))


def _signals(args: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, calibration sample and the rows that are measured."""
    if args.cache:
        rows = signals.of_cache(args.cache, args.teacher, 2 * args.rows, seed=0)
        for name, x in rows.items():
            yield name, x[::2].to(args.device), x[1::2].to(args.device)
        return
    shape = args.rows, LEVELS, GRID, args.width
    kinds: dict[str, Callable[[int], Tensor]] = {
        "white": partial(signals.white, *shape),
        "heavy-tailed": partial(signals.heavy_tailed, *shape),
        "massive": partial(signals.massive, *shape),
        "correlated": partial(signals.correlated, *shape),
        "related levels": partial(signals.correlated, *shape, between_levels=0.3),
        "random ViT": partial(signals.photographs, args.rows, GRID),
        "DINOv2-S": partial(trained.features, trained.DINOV2, args.rows, TRAINED_GRID),
        "VGG16, ReLU": partial(trained.features, trained.VGG, args.rows, TRAINED_GRID),
    }
    if reason := trained.missing():
        print(reason, file=sys.stderr)
        del kinds["DINOv2-S"], kinds["VGG16, ReLU"]
    if strangers := set(args.signals or ()) - kinds.keys():
        raise SystemExit(f"no signal {', '.join(sorted(strangers))} here; there are: {'; '.join(kinds)}")
    for name in args.signals or kinds:
        yield name, kinds[name](0).to(args.device), kinds[name](1).to(args.device)


def measure(name: str, sample: Tensor, features: Tensor, repeats: int) -> dict[str, Any]:
    codec = get_codec(name).calibrate(sample)
    found = dataclasses.asdict(measure_fidelity(codec, features))
    if not repeats:
        return found
    encoded = codec.encode(features)
    float16_gb = 2 * features.numel() / 1e9
    on_gpu = gpu_speeds(encoded, features, repeats) if features.is_cuda else {}
    return (
        found
        | on_gpu
        | {
            "encode_gb_per_s": float16_gb / _median_s(lambda: codec.encode(features), repeats),
            "decode_gb_per_s": float16_gb
            / _median_s(lambda: encoded.decode(features.device, torch.float16), repeats),
        }
    )


_buffer = default_buffer_prototype().buffer.from_bytes


def measure_compressed(
    name: str, compressor: Compressor, sample: Tensor, features: Tensor, repeats: int
) -> dict[str, Any]:
    """The bytes in a Zarr store, and the speeds of codec and zarr together, from and to memory.

    What it loses is what the codec loses.
    """
    codec = get_codec(name).calibrate(sample)
    rows, *shape, width = features.shape
    layouts = codec.layout(shape[0], (shape[1], shape[2]), width)
    texts = {array: chunks_json(layout, rows, compressor) for array, layout in layouts.items()}
    chunks = dict[str, dict[str, Any]]()

    def write() -> None:
        for array, tensor in codec.encode(features).tensors().items():
            suffix = "/0" * (tensor.ndim - 1)
            encoded = encoded_rows(texts[array], tensor.cpu().numpy())
            files = {f"c/{row}{suffix}": data for row, data in enumerate(encoded)}
            chunks[array] = {name: _buffer(data) for name, data in files.items()}

    def read() -> None:
        arrays = {
            array: torch.from_numpy(
                open_quietly(MemoryStore({"zarr.json": _buffer(texts[array])} | of_array), mode="r")[:]
            )
            for array, of_array in chunks.items()
        }
        Encoded(codec, arrays).decode(features.device, torch.float16)

    write()
    nbytes = sum(len(chunk) for of_array in chunks.values() for chunk in of_array.values())
    float16_gb = 2 * features.numel() / 1e9
    found = {"float16_ratio": nbytes / 1e9 / float16_gb}
    if repeats:
        found |= {"encode_gb_per_s": float16_gb / _median_s(write, repeats)}
        found |= {"decode_gb_per_s": float16_gb / _median_s(read, repeats)}
    return found


def gpu_speeds(encoded: Encoded, features: Tensor, repeats: int) -> dict[str, float]:
    compiled = compiled_decode(encoded)
    source = torch.empty(
        (encoded.nbytes + 2 * features.numel()) // 2, dtype=torch.uint8, device=features.device
    )
    target = torch.empty_like(source)
    runs = {
        "compiled_decode": lambda: compiled(features.device),
        "copy": lambda: target.copy_(source),
    }
    float16_gb = 2 * features.numel() / 1e9
    return {f"{name}_gb_per_s": float16_gb / _median_s(run, repeats) for name, run in runs.items()}


def compiled_decode(
    encoded: Encoded, backend: str | Callable[..., Any] = "inductor"
) -> Callable[[torch.device], Tensor]:
    """Decoding to float16 as one compiled graph, by device; an error where it is not one.

    Nothing of what was compiled before is left: after eight codecs PyTorch would run the next ones eagerly.
    """
    torch._dynamo.reset()
    decode = torch.compile(encoded.codec.decode_tensors, fullgraph=True, dynamic=False, backend=backend)
    return lambda device: decode(encoded.tensors(), device, torch.float16)


def measure_idea(name: str, sample: Tensor, features: Tensor) -> dict[str, Any]:
    """On the CPU; it is encoded and decoded in one, so there is one speed."""
    start = time.perf_counter()
    decoded = IDEAS[name](sample.cpu(), features.cpu())
    seconds = time.perf_counter() - start
    row_bytes = get_codec("int4-hadamard").calibrate(sample).encode(features[:1]).nbytes
    fidelity = compare(features.cpu(), decoded, row_bytes)
    return dataclasses.asdict(fidelity) | {"encode_gb_per_s": 2 * features.numel() / 1e9 / seconds}


def _median_s(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _table(results: list[dict[str, Any]]) -> Table:
    columns = {key: column for key, column in COLUMNS.items() if any(key in result for result in results)}
    table = Table("signal", "codec", *(head for head, _ in columns.values()))
    for before, result in zip([None, *results], results, strict=False):
        if before and before["signal"] != result["signal"]:
            table.add_section()
        cells = (format(result[key], spec) if key in result else "" for key, (_, spec) in columns.items())
        table.add_row(result["signal"], result["codec"], *cells)
    return table


if __name__ == "__main__":
    main()
