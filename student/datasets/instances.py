"""Things one by one: as a map of whose each pixel is (`labels.IGNORE`), and as COCO writes them."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.errors import extra

with extra("decoders"):
    from faster_coco_eval import mask as run_lengths

from teachercache.student.datasets.labelled_dataset import LabelledDataset


def instance_map(masks_NHW: NDArray[np.bool_], classes_N: NDArray) -> NDArray[np.int32]:
    """Where masks overlap, the smaller one is in front."""
    map_HW = np.zeros(masks_NHW.shape[1:], np.int32)
    for n in np.argsort(-masks_NHW.sum((1, 2)), kind="stable"):
        map_HW[masks_NHW[n]] = 256 * (n + 1) + classes_N[n] + 1
    return map_HW


def things(map_HW: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The class and the mask (H, W) of each."""
    for code in np.unique(map_HW[map_HW > 0]):
        yield int(code) % 256 - 1, map_HW == code


def encode_mask(mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """Run lengths, as COCO's results have them."""
    encoded = run_lengths.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": list(mask_HW.shape), "counts": encoded["counts"].decode()}


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Polygons, run lengths or encoded ones, as annotations have them → (H, W). Raises `ValueError`."""
    try:
        return np.asarray(run_lengths.decode(run_lengths.segmToRle(segmentation, width, height)), bool)
    except RuntimeError as error:  # of the library, for anything else
        raise ValueError(str(error)) from error


def coco_annotations(dataset: LabelledDataset, numbers: Iterable[int]) -> dict[str, Any]:
    """What COCO's tools measure against, of some images of a data set. An image's id is its number, a
    category's that of the class."""
    images, annotations = [], list[dict[str, Any]]()
    for number in numbers:
        map_HW = dataset.labels(number, ["instances"])["instances"]
        images.append({"id": number, "height": map_HW.shape[0], "width": map_HW.shape[1]})
        for thing, mask_HW in things(map_HW):
            encoded = encode_mask(mask_HW)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": thing,
                    "iscrowd": 0,
                    "area": int(mask_HW.sum()),
                    "bbox": run_lengths.toBbox(encoded).tolist(),
                    "segmentation": encoded,
                }
            )
    classes = dataset.decoder_tasks["instances"]
    categories = [{"id": number, "name": str(number)} for number in range(classes)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}
