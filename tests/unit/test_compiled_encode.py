"""What a build computes between a teacher and the disk compiles into one graph and stays what it is."""

from __future__ import annotations

import torch

from teachercache.cache_builder.compute import _encode
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.spec import GridSpec


def test_compiled_encoding_and_statistics_are_the_plain_ones_up_to_ties() -> None:
    maps_BSHWC = torch.randn(2, 2, 9, 9, 128, generator=torch.Generator().manual_seed(0))
    grid = GridSpec(kind="adjoint", size=(8, 8))
    codec = get_codec("int4-hadamard").calibrate(stored_form(maps_BSHWC, grid)[0])
    (plain, plain_norms), plain_moments = _encode(maps_BSHWC, codec, grid), FeatureMoments.of(maps_BSHWC)
    compiled = torch.compile(_encode, fullgraph=True, dynamic=False)
    fast, norms = compiled(maps_BSHWC, codec, grid)
    moments = torch.compile(FeatureMoments.of, fullgraph=True, dynamic=False)(maps_BSHWC)

    assert bool(fast.finite)
    for name in ("outlier_places", "outlier_values"):
        assert torch.equal(fast.arrays[name], plain.arrays[name])
    # Where two of a token's scales, or two levels of a value, are equally near, rounding decides.
    other_scales = fast.arrays["scales"] != plain.arrays["scales"]
    assert other_scales.float().mean() < 0.01
    other_codes = (fast.arrays["codes"] != plain.arrays["codes"])[~other_scales]
    assert other_codes.float().mean() < 0.002
    errors = [(encoded.decode() - stored_form(maps_BSHWC, grid)[0]).norm() for encoded in (fast, plain)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(norms, plain_norms)
    torch.testing.assert_close(moments.mean_SC, plain_moments.mean_SC, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments.squares_SC, plain_moments.squares_SC, rtol=1e-5, atol=0)
