"""Rows of the paper's tables, to set beside ours: percent, degrees (normals) and metres (depth)."""

from __future__ import annotations

PASCAL_CONTEXT: dict[str, dict[str, float]] = {
    "Single-task baseline, ViT-B (SAK, Table 13)": {
        "semseg": 80.25,
        "parts": 70.54,
        "saliency": 84.54,
        "normals": 13.57,
        "boundary": 74.22,
    },
    "Multi-task baseline, ViT-B (SAK, Table 13)": {
        "semseg": 76.76,
        "parts": 65.26,
        "saliency": 84.39,
        "normals": 13.98,
        "boundary": 70.37,
    },
    "SAK, ViT-B of ViT-B teachers (SAK, Table 12)": {
        "semseg": 81.65,
        "parts": 72.38,
        "saliency": 84.87,
        "normals": 14.05,
        "boundary": 73.23,
    },
    "SAK, ViT-B of ViT-L teachers (SAK, Table 13)": {
        "semseg": 81.88,
        "parts": 74.30,
        "saliency": 84.79,
        "normals": 14.02,
        "boundary": 74.09,
    },
}
NYUD: dict[str, dict[str, float]] = {
    "Single-task baseline, ViT-B (SAK, Table 14)": {
        "semseg": 51.15,
        "depth": 0.5792,
        "normals": 19.77,
        "boundary": 77.35,
    },
    "Multi-task baseline, ViT-B (SAK, Table 14)": {
        "semseg": 49.27,
        "depth": 0.5823,
        "normals": 19.92,
        "boundary": 75.88,
    },
    "SAK, ViT-B of ViT-L teachers (SAK, Table 14)": {
        "semseg": 59.93,
        "depth": 0.4942,
        "normals": 17.60,
        "boundary": 78.60,
    },
}
PAPER_RESULTS = {"pascal_context": PASCAL_CONTEXT, "nyud": NYUD}
"""By data set; the first row of each is the baseline that multi-task gains refer to (SAK, Eq. 7)."""
