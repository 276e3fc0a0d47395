"""PASCAL-Context and NYUD-v2, in small folders laid out as the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat
from skimage.morphology import thin

from teachercache.pipeline.errors import RecipeError, SourceError, SourceNotFoundError
from teachercache.pipeline.sources import open_source
from teachercache.student.datasets import DATASETS, dataset_class, open_dataset
from teachercache.student.datasets.labels import IGNORE, label_boundaries, partition_boundaries
from teachercache.student.losses.tasks import TASK_LOSSES
from teachercache.student.metrics import BoundaryBenchmark

HEIGHT, WIDTH = 20, 30
SPLITS = {"train": ["2008_000002", "2008_000003"], "val": ["2008_000007"]}
KEYS = [key for keys in SPLITS.values() for key in keys]
RNG = np.random.default_rng(0)
WALL, SKY = 440, 360  # classes of PASCAL-Context with and without normals


def save(path: Path, array: NDArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def save_mat(path: Path, **variables: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def write_lists(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, keys in SPLITS.items():
        (folder / f"{split}.txt").write_text("\n".join(keys) + "\n")


def mask(rows: slice, columns: slice) -> NDArray[np.uint8]:
    array = np.zeros((HEIGHT, WIDTH), np.uint8)
    array[rows, columns] = 1
    return array


def struct_array(items: Sequence[Mapping[str, object]]) -> NDArray:
    """A MATLAB struct array, with one element too, and () without any."""
    if not items:
        return np.zeros((0, 0))
    array = np.empty((1, len(items)), [(name, object) for name in items[0]])
    for i, item in enumerate(items):
        array[0, i] = tuple(item.values())
    return array


def thing(class_ind: int, parts: dict[str, NDArray]) -> dict[str, object]:
    pieces = [{"part_name": name, "mask": area} for name, area in parts.items()]
    return {
        "class": "thing",
        "class_ind": class_ind,
        "mask": mask(slice(2, 18), slice(2, 20)),
        "parts": struct_array(pieces),
    }


PERSON = thing(
    15,
    {
        "head": mask(slice(0, 4), slice(4, 8)),
        "leye": mask(slice(1, 2), slice(5, 6)),
        "torso": mask(slice(4, 10), slice(3, 9)),
        "ruarm": mask(slice(4, 8), slice(9, 11)),
        "llarm": mask(slice(8, 10), slice(9, 11)),
        "luleg": mask(slice(10, 14), slice(4, 8)),
        "rfoot": mask(slice(14, 16), slice(4, 8)),
    },
)
SECOND_PERSON = thing(15, {"neck": mask(slice(0, 2), slice(20, 25))})
DOG = thing(12, {"head": mask(slice(0, 20), slice(25, 30)), "muzzle": mask(slice(3, 4), slice(26, 27))})


@pytest.fixture
def pascal(tmp_path: Path) -> Path:
    write_lists(tmp_path / "ImageSets/Context")
    for number, key in enumerate(KEYS):
        save(tmp_path / f"JPEGImages/{key}.jpg", RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
        folder = "VOC12" if number != 1 else "pascal-context"
        semseg = Image.fromarray(np.full((HEIGHT, WIDTH), 15 + number, np.uint8), "L").convert("P")
        semseg.putpixel((0, 0), 255)
        (tmp_path / "semseg" / folder).mkdir(parents=True, exist_ok=True)
        semseg.save(tmp_path / f"semseg/{folder}/{key}.png")
        things = [[DOG, PERSON, SECOND_PERSON], [thing(15, {})], [DOG]][number]
        annotation = {"imname": key, "objects": struct_array(things)}
        save_mat(tmp_path / f"human_parts/{key}.mat", anno=annotation)
        save(tmp_path / f"sal_distill/{key}.png", mask(slice(0, 5), slice(0, 5)) * 130 + np.uint8(100))
        normals = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        normals[:] = (255, 128, 128)
        save(tmp_path / f"normals_distill/{key}.png", normals)
        classes = np.full((HEIGHT, WIDTH), WALL, np.uint16)
        classes[:, 12:] = SKY
        save_mat(tmp_path / f"pascal-context/trainval/{key}.mat", LabelMap=classes)
    (tmp_path / "JPEGImages/2009_unlisted.jpg").write_bytes(b"of VOC, in no split")
    return tmp_path


NYUD_FORMS = {
    "invpt": {"images": "png", "segmentation": "png", "depth": "npy", "normals": "png", "edge": "png"},
    "mti_net": {"images": "jpg", "segmentation": "png", "depth": "npy", "normals": "npy", "edge": "npy"},
    "astmt": {"images": "jpg", "segmentation": "mat", "depth": "mat", "normals": "jpg", "edge": "png"},
}
NORMAL = np.array([0.6, -0.8, 0.0])


@pytest.fixture(params=NYUD_FORMS)
def nyud(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_lists(tmp_path / "gt_sets")
    form = NYUD_FORMS[request.param]
    semseg = np.repeat(np.arange(WIDTH) % 41, HEIGHT).reshape(WIDTH, HEIGHT).T.astype(np.uint8)
    depth = np.full((HEIGHT, WIDTH), 2.5, np.float32)
    depth[0, :3] = 0, np.nan, -1
    normals = np.broadcast_to(NORMAL * 0.97, (HEIGHT, WIDTH, 3)).copy()
    normals[10:] = 0
    edge = mask(slice(5, 6), slice(0, WIDTH))
    for key in KEYS:
        save(tmp_path / f"images/{key}.{form['images']}", RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
        for name, array in (("segmentation", semseg), ("depth", depth), ("normals", normals), ("edge", edge)):
            path = tmp_path / name / f"{key}.{form[name]}"
            if form[name] == "mat":
                save_mat(path, **{name: array})
            elif form[name] == "npy":
                save(path, array.astype(np.float32))
            elif name == "normals":
                save(path, np.rint((array + 1) * 127.5).astype(np.uint8))
            else:
                save(path, array * np.uint8(255) if name == "edge" else array)
    return tmp_path


def test_nyud_is_read_in_all_the_formats_that_it_comes_in(nyud: Path) -> None:
    dataset = open_dataset("nyud", nyud)
    assert dataset.keys == SPLITS["train"]
    labels = dataset.labels(0)
    assert labels.keys() == dataset.tasks.keys()
    expected = (np.arange(WIDTH) % 41 - 1) % 256
    assert np.array_equal(labels["semseg"], np.broadcast_to(expected, (HEIGHT, WIDTH)))
    assert labels["depth"][0, :3].tolist() == [0, 0, 0]
    assert (labels["depth"].ravel()[3:] == 2.5).all()
    np.testing.assert_allclose(labels["normals"][:, :6, 20], np.tile(NORMAL[:, None], 6), atol=0.03)
    np.testing.assert_allclose(np.linalg.norm(labels["normals"][:, :6], axis=0), 1, atol=1e-6)
    assert not labels["normals"][:, 16:].any()  # a JPEG's blocks of 8 smear the rows between
    assert np.array_equal(labels["boundary"], mask(slice(5, 6), slice(0, WIDTH)))


def test_pascal_context_is_read(pascal: Path) -> None:
    dataset = open_dataset("pascal_context", pascal)
    assert dataset.keys == SPLITS["train"]
    labels = dataset.labels(0)
    assert labels.keys() == dataset.tasks.keys()
    assert labels["semseg"][0, 0] == 255
    assert (labels["semseg"].ravel()[1:] == 15).all()
    assert (dataset.labels(1, ["semseg"])["semseg"].ravel()[1:] == 16).all()  # from the other folder
    assert np.array_equal(labels["saliency"], mask(slice(0, 5), slice(0, 5)))
    known = np.zeros((HEIGHT, WIDTH), bool)
    known[:, :12] = True
    assert np.array_equal(np.linalg.norm(labels["normals"], axis=0) > 0, known)
    np.testing.assert_allclose(labels["normals"][:, 5, 5], [1, 0, 0], atol=0.01)
    rows, columns = np.nonzero(labels["boundary"])
    assert set(columns) <= {11, 12}
    assert len(set(rows)) == len(rows) >= HEIGHT - 1  # thinned; a line may lose an end


def test_parts_are_merged_to_six_and_ignored_without_a_person(pascal: Path) -> None:
    dataset = open_dataset("pascal_context", pascal)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    for part, rows, columns in (
        (1, slice(0, 4), slice(4, 8)),
        (2, slice(4, 10), slice(3, 9)),
        (3, slice(4, 8), slice(9, 11)),
        (4, slice(8, 10), slice(9, 11)),
        (5, slice(10, 14), slice(4, 8)),
        (6, slice(14, 16), slice(4, 8)),
        (2, slice(0, 2), slice(20, 25)),
    ):
        expected[rows, columns] = part
    assert np.array_equal(dataset.labels(0, ["parts"])["parts"], expected)
    without_parts = dataset.labels(1, ["parts"])["parts"]
    without_person = open_dataset("pascal_context", pascal, "val").labels(0, ["parts"])["parts"]
    assert (without_parts == 255).all()
    assert (without_person == 255).all()


def test_boundaries_are_those_of_a_laplacian_by_hand() -> None:
    classes = RNG.integers(0, 3, (6, 8)).repeat(4, 0).repeat(4, 1)
    height, width = classes.shape
    edges = np.zeros(classes.shape, bool)
    for y in range(height):
        for x in range(width):
            around = [
                classes[reflected(y + dy, height), reflected(x + dx, width)]
                for dy, dx in ((1, 0), (-1, 0), (0, 1), (0, -1))
            ]
            edges[y, x] = sum(around) != 4 * classes[y, x]
    assert np.array_equal(label_boundaries(classes), thin(edges))


def seg2bmap(classes: NDArray) -> NDArray[np.bool_]:
    """By loops: a pixel whose neighbour below, on the right, or both, is of another class."""
    height, width = classes.shape
    edges = np.zeros(classes.shape, bool)
    for y in range(height):
        for x in range(width):
            after = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (1, 1))]
            edges[y, x] = any(
                classes[place] != classes[y, x] for place in after if place[0] < height and place[1] < width
            )
    return edges


def bwmorph_thin(image: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """By loops: Guo and Hall's two subiterations, as MATLAB's manual has them for bwmorph(…, 'thin', Inf)."""
    image = np.pad(image, 1)
    before = ~image
    while not np.array_equal(image, before):
        before = image
        for second in (False, True):
            deleted = np.zeros_like(image)
            for y, x in zip(*np.nonzero(image), strict=True):
                around = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1))
                x1, x2, x3, x4, x5, x6, x7, x8, x9 = (bool(image[y + dy, x + dx]) for dy, dx in around)
                crossings = sum(
                    not one and (two or three)
                    for one, two, three in ((x1, x2, x3), (x3, x4, x5), (x5, x6, x7), (x7, x8, x9))
                )
                pairs = (
                    (x1 or x2) + (x3 or x4) + (x5 or x6) + (x7 or x8),
                    (x2 or x3) + (x4 or x5) + (x6 or x7) + (x8 or x9),
                )
                kept_side = (x6 or x7 or not x4) and x5 if second else (x2 or x3 or not x8) and x1
                deleted[y, x] = crossings == 1 and min(pairs) in (2, 3) and not kept_side
            image = image & ~deleted
    return image[1:-1, 1:-1]


def test_predictions_are_measured_against_seism_s_boundaries(pascal: Path) -> None:
    for scale in (1, 4):  # single pixels, and squares
        classes = RNG.integers(0, 3, (20 // scale, 28 // scale)).repeat(scale, 0).repeat(scale, 1)
        assert np.array_equal(partition_boundaries(classes), bwmorph_thin(seg2bmap(classes)))
    dataset = open_dataset("pascal_context", pascal, "val")
    learnt, measured = (dataset.labels(0, measured=flag) for flag in (False, True))
    assert np.array_equal(np.nonzero(measured["boundary"]), (range(HEIGHT), [11] * HEIGHT))
    assert not np.array_equal(measured["boundary"], learnt["boundary"])
    assert all(np.array_equal(learnt[task], measured[task]) for task in learnt if task != "boundary")


def test_a_perfect_thin_prediction_scores_100() -> None:
    stairs = np.tri(40, 40)
    assert (seg2bmap(stairs).sum(), partition_boundaries(stairs).sum()) == (78, 40)
    benchmark = BoundaryBenchmark(nms_radius=None)
    target = partition_boundaries(stairs)
    benchmark.update(target.astype(float), target)
    assert benchmark.compute().ods_f == 1


def test_nyud_is_measured_against_the_thinned_outline_of_its_lines(nyud: Path) -> None:
    """SEISM reads the boundaries of NYUD-v2 and treats them as it does a partition."""
    learnt, measured = (open_dataset("nyud", nyud).labels(0, measured=flag) for flag in (False, True))
    assert np.array_equal(measured["boundary"], bwmorph_thin(seg2bmap(learnt["boundary"])))
    assert measured["boundary"].sum(1).tolist() == [*[0] * 5, WIDTH - 1, *[0] * 14]
    assert all(np.array_equal(learnt[task], measured[task]) for task in learnt if task != "boundary")


def reflected(index: int, length: int) -> int:
    """OpenCV's BORDER_REFLECT_101."""
    return abs(index) if index < length else 2 * length - 2 - index


@pytest.mark.parametrize("kind", DATASETS)
def test_tasks_are_those_of_the_losses(kind: str) -> None:
    tasks = dataset_class(kind).tasks
    assert tasks.keys() <= IGNORE.keys()
    for task, channels in tasks.items():
        assert TASK_LOSSES[task].channels in (None, channels)


def test_check_names_what_is_missing(pascal: Path) -> None:
    dataset = open_dataset("pascal_context", pascal)
    lists, *files = dataset.check()
    assert (lists.found, lists.expected) == (2, 4998)
    assert all((finding.found, finding.expected) == (2, 2) for finding in files)
    (pascal / "human_parts/2008_000003.mat").unlink()
    (pascal / "semseg/pascal-context/2008_000003.png").unlink()
    found = {finding.what.split()[0]: finding for finding in dataset.check()}
    assert found["parts"].missing == ("human_parts/2008_000003.mat",)
    assert (found["semseg"].found, found["semseg"].expected) == (1, 2)
    assert found["images"].found == 2
    with pytest.raises(SourceNotFoundError, match="teachercache datasets pascal_context"):
        dataset.labels(1, ["parts"])


def test_a_split_that_is_not_there_is_an_error(pascal: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no split 'test'"):
        open_dataset("pascal_context", pascal, "test")
    with pytest.raises(SourceNotFoundError, match=r"gt_sets/train\.txt"):
        open_dataset("nyud", pascal)
    with pytest.raises(RecipeError, match="pascal_context"):
        open_dataset("pascal", pascal)


def test_labels_of_another_size_than_their_image_are_an_error(pascal: Path) -> None:
    save(pascal / f"sal_distill/{KEYS[0]}.png", np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    with pytest.raises(SourceError, match="saliency labels of 2008_000002"):
        open_dataset("pascal_context", pascal).labels(0)


@pytest.mark.parametrize(
    ("file", "task"), [("human_parts/{}.mat", "parts"), ("sal_distill/{}.png", "saliency")]
)
def test_a_damaged_file_is_named(pascal: Path, file: str, task: str) -> None:
    (pascal / file.format(KEYS[0])).write_bytes(b"garbage" * 40)
    with pytest.raises(SourceError, match=f"{task} labels of 2008_000002"):
        open_dataset("pascal_context", pascal).labels(0)


def test_nothing_is_unpickled(nyud: Path) -> None:
    np.save(nyud / f"depth/{KEYS[0]}.npy", np.array([{}], dtype=object))
    with pytest.raises(SourceError, match="depth labels"):
        open_dataset("nyud", nyud).labels(0, ["depth"])


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_list_cannot_name_files_outside_of_the_folder(pascal: Path, key: str) -> None:
    (pascal / "ImageSets/Context/train.txt").write_text(f"{KEYS[0]}\n{key}\n")
    with pytest.raises(SourceError, match="lists an impossible key"):
        open_dataset("pascal_context", pascal)


def test_links_are_a_source_under_the_keys_of_the_split(pascal: Path, tmp_path: Path) -> None:
    dataset = open_dataset("pascal_context", pascal, "val")
    for _ in range(2):  # the second time over what is there
        folder = dataset.link_images(tmp_path / "links")
    samples = open_source(folder).scan()
    assert samples["key"].to_pylist() == dataset.keys
    path, offset, nbytes = (samples[name][0].as_py() for name in ("path", "offset", "nbytes"))
    assert (
        open_source(folder).read(path, offset, nbytes)
        == (pascal / f"JPEGImages/{dataset.keys[0]}.jpg").read_bytes()
    )
