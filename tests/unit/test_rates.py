"""`plan --measure`: what this machine sustains replaces what the plan assumes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import foresee, prepare
from teachercache.cache_builder.plan import Plan
from teachercache.cache_builder.rates import Rates, _seconds_each, measure_rates
from teachercache.jobs.cli import app
from tests.make_cache import build_recipe, make_images

TEACHERS = {
    name: {"model": f"vit_tiny_patch16_{size}", "pretrained": False, "image_size": size}
    for name, size in (("small", 224), ("large", 384))
}


@pytest.fixture(scope="module")
def recipe() -> BuildRecipe:
    return build_recipe("nothing", "nowhere", teachers=TEACHERS, plan={"measure_s": 1.5})


@pytest.fixture(scope="module")
def plan(recipe: BuildRecipe) -> Plan:
    return foresee(recipe, 100, 10_000)


def test_passes_grow_to_the_batch_and_the_first_half_does_not_count() -> None:
    counts: list[int] = []

    def run(count: int) -> None:
        time.sleep(0.001 * count if counts else 0.05)  # the first one loads
        counts.append(count)

    each = _seconds_each(run, 4, 0.2)
    assert counts[:4] == [1, 2, 4, 4]
    assert set(counts[4:]) == {4}
    assert 0.001 <= each < 0.02


def test_one_pass_is_enough_where_a_second_would_take_too_long() -> None:
    counts: list[int] = []

    def run(count: int) -> None:
        time.sleep(0.05)
        counts.append(count)

    _seconds_each(run, 4, 0.06)
    assert counts == [1]


def test_a_compiled_teacher_is_given_whole_batches_since_it_fills_others_up() -> None:
    counts: list[int] = []
    _seconds_each(lambda count: counts.append(count), 4, 0.001, least=4)
    assert set(counts) == {4}


def test_a_gpu_computes_while_cores_decode_and_a_cpu_does_both(plan: Plan) -> None:
    forward = {"small": 0.1, "large": 0.4}
    for device, second in (("CPU", 0.5 + 0.2), ("NVIDIA H100", 0.5)):
        measured = replace(plan, measured=Rates(forward, 0.2, device))
        assert measured.views_per_s == pytest.approx(1 / second)
        assert measured.gpu_hours == pytest.approx(plan.spec.num_rows * second / 3600)
    slow = replace(plan, measured=Rates(forward, 2.0, "NVIDIA H100"))
    assert slow.views_per_s == pytest.approx(0.5)


def test_what_is_assumed_follows_from_the_arithmetic(plan: Plan) -> None:
    flops = 2e9 * sum(teacher.gmacs for teacher in plan.teachers)
    assert plan.rates.device is None
    assert plan.views_per_s == pytest.approx(plan.prices.tflops * 1e12 / flops)


def test_made_images_and_random_weights_are_measured_before_there_is_anything() -> None:
    one = {"small": {"model": "vit_small_patch14_dinov2.lvd142m", "image_size": 28}}  # of the Hub
    rates = measure_rates(build_recipe("nothing", "nowhere", teachers=one, plan={"measure_s": 0.5}))
    assert rates.forward_s.keys() == {"small"}
    assert rates.forward_s["small"] > 0


def test_images_are_the_sources_own_and_those_that_do_not_decode_are_passed_over(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 3)
    (images / "broken.jpg").write_bytes(b"no image")
    of_images = build_recipe(tmp_path / "cache", images, teachers=TEACHERS, plan={"measure_s": 1.5})
    drafted, _, planned = prepare(of_images, Console(quiet=True))
    rates = measure_rates(of_images, drafted)
    assert rates.forward_s.keys() == {"small", "large"}
    assert min(rates.forward_s.values()) > 0
    assert 0 < rates.decode_s < 1
    assert replace(planned, measured=rates).views_per_s < planned.views_per_s


def test_the_plan_says_what_was_measured_on_what(recipe: BuildRecipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
    command = ["plan", str(tmp_path / "recipe.yaml"), "--samples", "1000", "--measure", "runner.device=cpu"]
    overrides = [f"cache={tmp_path / 'cache'}", "plan.measure_s=0.3"]
    done = CliRunner().invoke(app, [*command, *overrides])
    assert done.exit_code == 0, done.output
    assert "measured on CPU, which decodes " in done.output
    assert "img/s of a CPU" in done.output
    assert "TFLOP/s sustained" not in done.output
    assert not (tmp_path / "cache").exists()


def test_how_long_must_be_some_time() -> None:
    done = CliRunner().invoke(app, ["plan", "demo", "--samples", "9", "--measure", "plan.measure_s=0"])
    assert "plan.measure_s: Input should be greater than 0" in str(done.exception)
