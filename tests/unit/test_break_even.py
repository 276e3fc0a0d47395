"""What `plan` says of teachers in every training against a cache: figures by hand, overrides, advice."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from io import StringIO
from math import inf
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from teachercache.cache_builder.build_recipe import GPUS, BuildRecipe, PlanRecipe
from teachercache.cache_builder.builder import foresee, prepare
from teachercache.cache_builder.plan import BreakEven, Plan, advice, break_even
from teachercache.jobs.cli import app
from teachercache.jobs.inspection.tables import plan_table
from teachercache.jobs.recipes import find_recipe
from teachercache.pipeline.errors import RecipeError, TeacherCacheError
from teachercache.pipeline.records.spec import GridSpec, Segment
from tests.make_cache import build_recipe, make_cache, make_images

IMAGENET = 1_281_167
ARRAYS = 5  # of a teacher at 4 bits: codes, scales, places and values of outliers, norms


@pytest.fixture(scope="module")
def vitl() -> Plan:
    """SAK's three ViT-L teachers at 4 bits, to be built of ImageNet-1k in a bucket."""
    recipe = find_recipe(BuildRecipe, "imagenet1k_vitl_4bit", ["cache=memory://nothing_here"])
    return foresee(recipe, IMAGENET, 110_000)


def at(plan: Plan, **prices: object) -> Plan:
    return replace(plan, prices=PlanRecipe.model_validate(prices))


def costs(plan: Plan, **prices: object) -> BreakEven:
    return break_even(at(plan, **prices))


def test_three_vit_l_teachers_take_124_gpu_hours_a_run_at_86_views_a_second(vitl: Plan) -> None:
    """30 × 1,281,167 / 86 / 3600 = 124.1; a view is 221 + 221 + 1308 GMACs."""
    rate = 86 * 2e9 * sum(teacher.gmacs for teacher in vitl.teachers) / 1e12
    plan = at(vitl, teacher_tflops_per_gpu=rate, usd_per_gpu_hour=2, runs=3)
    assert plan.views_per_s == pytest.approx(86)
    assert break_even(plan).online_gpu_hours == pytest.approx(124.15, abs=0.01)
    assert break_even(plan).online == pytest.approx(3 * 124.15 * 2, abs=0.1)
    assert plan.gpu_hours == pytest.approx(124.15 / 30, abs=0.01)


def test_the_default_gpu_comes_near_that(vitl: Plan) -> None:
    assert vitl.prices.tflops == 300
    assert vitl.views_per_s == pytest.approx(86, rel=0.01)


def test_what_binds_a_build_is_the_slowest_of_teachers_cores_and_storage(vitl: Plan) -> None:
    slow: dict[str, object] = {"render_ms": 10, "cores_per_gpu": 2, "storage_gb_per_s": 8, "gpus": 8}
    limits = at(vitl, teacher_tflops_per_gpu=1e6, **slow).limits
    assert limits["decoding"] == pytest.approx(200)
    assert limits["storage"] == pytest.approx(1e9 / vitl.bytes_per_row)
    assert limits["teachers"] > 1000
    assert min(limits, key=limits.__getitem__) == "decoding"


def test_building_keeping_and_reading_by_hand(vitl: Plan) -> None:
    """3.56 MB a view: 4.56 TB, which 8 GPUs write and read at 1 GB/s in 4,560 s."""
    assert vitl.total_bytes == pytest.approx(4.56e12, rel=1e-3)
    found = costs(vitl, usd_per_gpu_hour=2, usd_per_tb_month=20, months=6, epochs=10, runs=2)
    assert found.build == pytest.approx(2 * 4.15, rel=2e-3)
    assert found.keep == pytest.approx(20 * 6 * 4.56, rel=1e-3)
    requests = 20 * IMAGENET * 3 * ARRAYS
    assert found.read == pytest.approx(requests * 0.4e-6)
    slow = costs(vitl, usd_per_gpu_hour=2, storage_gb_per_s=1, usd_per_million_requests=0, epochs=10, runs=2)
    assert slow.build == pytest.approx(2 * 8 * 4560 / 3600, rel=2e-3)
    assert slow.read == pytest.approx(20 * 2 * 8 * (4560 - 1281) / 3600, rel=2e-3)


def test_a_build_whose_cores_decode_slower_than_its_teachers_see_is_one_of_decoding() -> None:
    """A small CLIP, and 18 cores for a GPU that take 36 ms a view."""
    recipe = find_recipe(BuildRecipe, "imagenet1k_kpu_clip", ["cache=memory://nothing_here"])
    plan = at(foresee(recipe, IMAGENET, 110_000), render_ms=36, cores_per_gpu=18, usd_per_gpu_hour=2)
    assert plan.views_per_s > plan.limits["decoding"] == pytest.approx(500)
    assert break_even(plan).build == pytest.approx(2 * IMAGENET / 500 / 3600)
    text = StringIO()
    Console(file=text, width=120).print(plan_table(plan))
    written = 8 * 500 * plan.read_bytes_per_row / 1e9
    assert f"writes {written:.2f} GB/s on 8 GPUs of 500 views/s each" in text.getvalue()


def test_a_folder_costs_no_requests(vitl: Plan) -> None:
    assert costs(vitl).read > 0
    assert costs(replace(vitl, free_bytes=10**15)).read == 0


def test_at_the_break_even_both_cost_the_same(vitl: Plan) -> None:
    epochs = costs(vitl).epochs
    found = costs(vitl, epochs=epochs / 2, runs=2)
    assert found.online == pytest.approx(found.cached)
    assert found.epochs == pytest.approx(epochs)


@pytest.mark.parametrize(
    ("prices", "advice"),
    [
        ({"usd_per_million_requests": 0}, "cache; it pays from 9.42 epochs"),
        (
            {"usd_per_tb_month": 0, "epochs": 0.5},
            "do not cache: too dear to build; it pays from 2.61",
        ),
        ({"months": 36}, "do not cache: too dear to keep; it pays from "),
        ({"usd_per_million_requests": 0.5, "epochs": 9}, "do not cache: too dear to keep"),
        ({"storage_gb_per_s": 0.1}, "do not cache: to read an epoch costs no less than to run the teachers"),
        ({"usd_per_gpu_hour": 0}, "do not cache: to read an epoch costs no less"),
    ],
)
def test_the_advice_says_why(vitl: Plan, prices: dict[str, float], advice: str) -> None:
    found = costs(vitl, **prices)
    assert found.verdict.startswith(advice)
    assert (found.cached < found.online) == found.verdict.startswith("cache")
    assert found.epochs == inf or "pays from" in found.verdict


def test_the_rates_of_gpus_are_shares_of_their_peaks() -> None:
    assert {"a100", "h100", "h200", "l40s", "rtx4090"} <= GPUS.keys()
    for gpu in GPUS.values():
        assert gpu.origin == "computed"
        assert gpu.forward == float(f"{0.3 * gpu.peak:.2g}")
        assert gpu.training == float(f"{0.2 * gpu.peak:.2g}")


def test_a_gpu_brings_its_rate_and_its_price(vitl: Plan) -> None:
    a100, h100 = (costs(vitl, gpu=name) for name in ("a100", "h100"))
    assert a100.online_gpu_hours == pytest.approx(h100.online_gpu_hours * 300 / 94)
    assert a100.online / h100.online == pytest.approx(300 / 94 * 2 / 3)
    stated = costs(vitl, gpu="a100", teacher_tflops_per_gpu=150, usd_per_gpu_hour=1)
    assert stated.online == pytest.approx(stated.online_gpu_hours)
    assert stated.online_gpu_hours == pytest.approx(h100.online_gpu_hours * 2)


@pytest.mark.parametrize("width", [80, 120])
def test_the_plan_says_it_on_lines_that_fit_a_terminal(vitl: Plan, width: int) -> None:
    plan, text = at(vitl, months=24), StringIO()
    Console(file=text, width=width).print(plan_table(plan))
    printed = text.getvalue()
    for line in (
        "GPU-hours  4.15 at 300 TFLOP/s sustained by a GPU (h100, computed)",
        "building   writes 2.44 GB/s on 8 GPUs of 85.7 views/s each",
        "at most    85.7 by teachers, 1,850 by decoding, 351 by storage views/s of a GPU:",
        "online     $373.55 for teachers, 124.5 GPU-hours a run: 1 × 30 epochs",
        "prices     $3 a GPU-hour, $23 a TB-month × 24, $0.4 a million requests, 10 GB/s",
        f"advice     {break_even(plan).verdict}",
    ):
        assert re.search(re.escape(line) + r"[\n ]", printed)


def test_the_plan_of_a_few_images_is_in_seconds() -> None:
    recipe = find_recipe(BuildRecipe, "imagenet1k_kpu_vitb", ["cache=memory://nothing_here"])
    text = StringIO()
    Console(file=text, width=120).print(plan_table(foresee(recipe, 16, 110_000)))
    assert re.search(r"^GPU-seconds +0\.\d+ at ", text.getvalue(), re.M)
    assert re.search(r" [\d.]+ GPU-(seconds|minutes) a run", text.getvalue())
    assert not re.search(r"\de[-+]\d", text.getvalue())


def test_options_of_the_command_override_the_recipe(tmp_path: Path) -> None:
    plan = ["plan", "imagenet1k_kpu_vitb", "--samples", "1000", f"cache={tmp_path / 'cache'}"]
    done = CliRunner().invoke(
        app, [*plan, "--runs", "3", "--epochs", "7.5", "--gpu", "l40s", "plan.months=2"]
    )
    assert done.exit_code == 0, done.output
    assert "110 TFLOP/s sustained by a GPU (l40s, computed)" in done.output
    assert "3 × 7.5 epochs" in done.output
    assert "$1 a GPU-hour, $23 a TB-month × 2" in done.output
    done = CliRunner().invoke(app, [*plan, "--tflops-per-gpu", "86"])
    assert "86 TFLOP/s sustained by a GPU (stated)" in done.output
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (["--gpu", "h10"], "did you mean h100?"),
        (["--gpu", "RTX4090"], "plan.gpu: Input should be 'a100', 'h100'"),
        (["--epochs", "0"], "plan.epochs: Input should be greater than 0 (got '0')"),
        (["--epochs", "inf"], "plan.epochs: Input should be a finite number"),
        (["--runs", "0"], "plan.runs: Input should be greater than or equal to 1"),
        (["--runs", "many"], "plan.runs: Input should be a valid integer"),
        (["--tflops-per-gpu", "-1"], "plan.teacher_tflops_per_gpu: Input should be greater than 0"),
        (["plan.usd_per_gpu_hour=-1"], "plan.usd_per_gpu_hour: Input should be greater than or equal to 0"),
        (["plan.usd_per_tb_month=-1"], "plan.usd_per_tb_month: Input should be greater than or equal to 0"),
        (["plan.storage_gb_per_s=0"], "plan.storage_gb_per_s: Input should be greater than 0"),
        (["plan.usd_per_tb=1"], "did you mean usd_per_tb_month?"),
    ],
)
def test_what_cannot_be_meant_is_refused(stated: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["plan", "imagenet1k_vitb", "--samples", "10", *stated])
    assert done.exit_code
    assert isinstance(done.exception, TeacherCacheError)
    assert message in str(done.exception)


def test_a_training_is_planned_with_the_same_table(tmp_path: Path) -> None:
    train = ["train", "sak_stage1_small", "--dry-run", "--samples", "1000"]
    assert "at 62 TFLOP/s" in CliRunner().invoke(app, [*train, "--gpu", "a100"]).output
    assert "at 50 TFLOP/s" in CliRunner().invoke(app, [*train, "--tflops-per-gpu", "50"]).output
    refused = CliRunner().invoke(app, [*train, "--gpu", "a10"])
    assert "did you mean a100?" in str(refused.exception)


@pytest.mark.parametrize("images", ["reference", "copy"])
def test_a_plan_before_there_are_images_is_the_plan_of_such_images(tmp_path: Path, images: str) -> None:
    recipe = build_recipe(tmp_path / "cache", tmp_path / "images", images=images)
    foreseen = foresee(recipe, 8, 1000)
    sizes = [path.stat().st_size for path in make_images(tmp_path / "images", 8).iterdir()]
    seen = prepare(recipe, Console(quiet=True))[2]
    assert foreseen.spec.num_shards == seen.spec.num_shards == 3
    assert foreseen.num_files == seen.num_files
    assert foreseen.gpu_hours == seen.gpu_hours
    copied = images == "copy"
    assert (foreseen.image_bytes, seen.image_bytes) == (8000 * copied, sum(sizes) * copied)
    assert foreseen.total_bytes - foreseen.image_bytes == seen.total_bytes - seen.image_bytes


def test_a_plan_without_images_wants_a_new_cache_and_no_budget(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"got: +budget=6000000(.|\n)*leave --samples out"):
        foresee(build_recipe(tmp_path / "cache", "nowhere", budget="6MB"), 8, 1000)
    make_cache(tmp_path / "cache", make_images(tmp_path / "images", 2))
    with pytest.raises(RecipeError, match=r"got: +a cache at .*cache"):
        foresee(build_recipe(tmp_path / "cache", "nowhere"), 8, 1000)


def test_a_plan_without_images_tells_everything_at_once(tmp_path: Path) -> None:
    teachers = {"a": {"preset": "dinov2_small", "codec": "nope"}, "b": {"preset": "nonsuch"}}
    with pytest.raises(RecipeError, match=r"2 problems(.|\n)*'nope'(.|\n)*'nonsuch'"):
        foresee(build_recipe(tmp_path / "cache", "nowhere", teachers=teachers), 8, 1000)


def advised(plan: Plan) -> str:
    text = StringIO()
    Console(file=text, width=120).print(plan_table(plan))
    return text.getvalue().partition("advice ")[2].partition("\n")[2]


def test_a_second_view_is_advised_with_what_it_costs(vitl: Plan) -> None:
    said = "views.num_views=2 went about 90% of the way from one view to fresh crops (docs/views.md)"
    assert advised(vitl) == f"better     {said}, +4.56 TB\n"


def test_four_bits_are_advised_with_what_they_save() -> None:
    recipe = find_recipe(BuildRecipe, "imagenet1k_vitl", ["cache=memory://nothing_here", "views.num_views=2"])
    plan = foresee(recipe, IMAGENET, 110_000)
    line = "teachers.NAME.codec=int4-hadamard: .0005 less than f16's .3260 on adjoint grids (docs/views.md)"
    assert advice(plan) == {"smaller": f"{line}, -27.2 TB"}
    native = [
        replace(one, spec=one.spec.model_copy(update={"grid": GridSpec()}), bytes_per_row=10**9)
        for one in plan.teachers
    ]
    assert ".0003 less than f16's .3260 on native" in advice(replace(plan, teachers=(*native,)))["smaller"]


def test_more_views_than_four_are_advised_against_with_what_they_cost(vitl: Plan) -> None:
    def of(**views: object) -> dict[str, str]:
        policy = vitl.spec.views.model_copy(update=views)
        segment = Segment(first_row=0, samples=(0, IMAGENET), views=(0, policy.num_views))
        spec = vitl.spec.model_copy(update={"views": policy, "segments": (segment,)})
        return advice(replace(vitl, spec=spec))

    line = "views.num_views=4 went all of the way from one view to fresh crops (docs/views.md), -9.12 TB"
    assert of(num_views=6) == {"fewer": line}
    assert of(num_views=4) == of(num_views=6, flip="pairs") == of(num_views=6, policy="multitask_train") == {}


def test_no_view_is_advised_where_there_is_but_one_and_no_margin_at_all(vitl: Plan) -> None:
    views = vitl.spec.views
    fixed = views.model_copy(update={"policy": "imagenet_eval"})
    assert advised(replace(vitl, spec=vitl.spec.model_copy(update={"views": fixed}))) == ""
    wide = views.model_copy(update={"margin": 64})
    assert advice(replace(vitl, spec=vitl.spec.model_copy(update={"views": wide}))) == {
        "better": "views.margin=0: wide views reached .2885, plain ones .3255 (docs/views.md)"
    }


def test_the_figures_of_the_advice_are_those_of_the_page() -> None:
    """Rows of its table: mean similarity, and the share of the way in the next column."""
    page = (Path(__file__).parents[2] / "docs/views.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .*?(\.\d{4}).*? \| (.*?) \|", page, re.M)
    of = {name.strip("*"): (float(similarity), way) for name, similarity, way in rows}
    curve = yaml.safe_load(files("teachercache.cache_builder").joinpath("curve.yaml").read_text())
    assert of["2 views"][1] in curve["views"]
    assert int(of["4 views"][1].strip("%")) >= 100
    assert "num_views=4 went all of the way" in curve["fewer"]
    plain = of["1 view"][0]
    wide = of["1 wide view, margin 32 px"][0]
    assert [*map(float, re.findall(r"\.\d{4}", curve["margin"]))] == [wide, plain]
    for said, grid, bits in (
        ("bits", "native", of["1 view, `int4-hadamard`, native"][0]),
        ("bits_adjoint", "adjoint", plain),
    ):
        half = of[f"1 view, `f16`, {grid}"][0]
        assert f"on {grid} grids" in curve[said]
        assert [*map(float, re.findall(r"\.\d{4}", curve[said]))] == pytest.approx([half - bits, half])


def test_teachers_that_share_a_forward_pass_are_planned_with_it(tmp_path: Path) -> None:
    plan = ["plan", "imagenet1k_kpu_gdino", "--samples", "1000", f"cache={tmp_path / 'cache'}"]
    done = CliRunner().invoke(app, plan, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.exception
    (line,) = (line for line in done.output.splitlines() if "img/s of a GPU" in line)
    assert line.count("in the pass of another") == 3
