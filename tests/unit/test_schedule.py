from __future__ import annotations

import math

import pytest

from teachercache.student.training.train_recipe import ScheduleRecipe


def rates(warmup_steps: int, total_steps: int) -> list[float]:
    schedule = ScheduleRecipe(max_steps=total_steps, final_lr=0.1)
    return [schedule.rate(step, 1.0, (total_steps, warmup_steps)) for step in range(total_steps + 1)]


def test_warms_up_linearly_to_the_peak_and_falls_as_a_cosine() -> None:
    values = rates(4, 24)
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    expected = [0.55 + 0.45 * math.cos(math.pi * k / 20) for k in range(21)]
    assert values[4:] == pytest.approx(expected)
    assert values[14] == pytest.approx(0.55)
    assert values[24] == pytest.approx(0.1)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert rates(0, 1) == pytest.approx([1.0, 0.1])


def test_stays_at_the_final_rate_behind_the_end() -> None:
    assert ScheduleRecipe(max_steps=10, final_lr=0.1).rate(99, 1.0, (10, 0)) == pytest.approx(0.1)
