from __future__ import annotations

import time

import pytest
import torch

from teachercache.student.timing import StageTimer, bottleneck


def test_stages_add_up_until_they_are_taken() -> None:
    timer = StageTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.stage("forward"):
            time.sleep(0.01)
    timer.add("wait", 1.5)
    taken = timer.take()
    assert taken["wait"] == 1.5
    assert taken["forward"] >= 0.02
    assert timer.take() == {}


@pytest.mark.parametrize(
    ("seconds", "sentence"),
    [
        (
            {"wait": 1, "forward": 3, "backward": 6, "read": 99},
            "Bottleneck: the backward pass, 60% of 5 s per step",
        ),
        (
            {"wait": 3, "forward": 1, "read": 8, "decode": 2},
            "75% of 2 s per step, mostly for reading features",
        ),
        (
            {"wait": 3, "forward": 1, "read": 2, "decode": 8},
            "75% of 2 s per step, mostly for decoding images",
        ),
        ({}, "No step was left to take."),
    ],
)
def test_the_bottleneck_is_named(seconds: dict[str, float], sentence: str) -> None:
    assert sentence in bottleneck(seconds, steps=2)
