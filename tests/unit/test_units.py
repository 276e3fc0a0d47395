"""Numbers as people read them: no exponents, and units that fit."""

from __future__ import annotations

import pytest

from teachercache.pipeline.units import human_bytes, human_hours, human_number, human_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (4.149, "4.15"),
        (12345.6, "12,300"),
        (2e6, "2,000,000"),
        (4.2e-5, "0.000042"),
        (-0.5, "-0.5"),
    ],
)
def test_a_number_has_no_exponent(value: float, text: str) -> None:
    assert human_number(value) == text


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (7.78e-05, "0.28 seconds"),
        (0.3, "18 minutes"),
        (4.15, "4.15 hours"),
        (12345, "12,300 hours"),
        (0, "0 hours"),
    ],
)
def test_hours_are_said_in_the_unit_that_fits(hours: float, text: str) -> None:
    assert " ".join(human_hours(hours)) == text


def test_bytes_and_seconds_never_have_one_either() -> None:
    assert human_bytes(2e19) == "20,000 PB"
    assert human_bytes(3.2e11, "FLOP") == "320 GFLOP"
    assert human_seconds(5e8) == "5,790 days"
    assert human_seconds(2e-5) == "0.00002 s"
