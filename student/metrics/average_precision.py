"""AP of boxes and masks as COCO measures it, by faster-coco-eval, which gives pycocotools' numbers."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from teachercache.pipeline.errors import extra

with extra("decoders"):
    from faster_coco_eval import COCO, COCOeval_faster

_NAMES = "AP", "AP50", "AP75", "APs", "APm", "APl"


def average_precision(
    annotations: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], of: Literal["bbox", "segm"]
) -> dict[str, float]:
    """Fractions: AP over IoU .5 to .95, at .5 and .75, and of small, medium and large things; -1 without any.

    Both as in COCO's files: `detections` with `image_id`, `category_id`, `score`, and `bbox` (x, y, width,
    height) or `segmentation` (run lengths).
    """
    if not detections:
        return dict.fromkeys(_NAMES, 0.0)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123  no file
        truth = COCO(dict(annotations))
        measured = COCOeval_faster(truth, truth.loadRes([dict(one) for one in detections]), of)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return dict(zip(_NAMES, map(float, measured.stats), strict=False))
