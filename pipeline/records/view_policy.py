"""`ViewPolicy`: how the views of a cache are drawn, and what of them a student sees."""

import math
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from teachercache.pipeline.records.strict import Size, Strict

PolicyName = Literal["imagenet_train", "imagenet_eval", "multitask_train", "multitask_eval"]
Photometric = Literal["color_jitter", "distortion"]
Flip = Literal["random", "pairs"]


class ViewPolicy(Strict):
    """How views are drawn. The drawn parameters in `views.parquet`, not this, are authoritative.

    The colours are brightness, contrast, saturation and hue, see `View`; a new multitask_train that says
    nothing of `photometric` has "distortion", and a cache "color_jitter". The view that is stored, and that
    teachers see, is larger than `size` by `margin` each way, in pixels of the student's input.
    """

    policy: PolicyName = Field("imagenet_train", description="How crops are drawn.")
    num_views: int = Field(1, ge=1, description="Views of each image.")
    size: Size = Field(
        (384, 384), description="Input of a student in pixels: (height, width), or one for both."
    )
    seed: int = Field(0, ge=0, description="Seed of the crops.")
    scale: tuple[float, float] = Field(
        (0.08, 1.0),
        description="Share of the image's area; of multitask_train the zoom, 0.5 to 2 by default.",
    )
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="Width over height of a crop.")
    margin: int = Field(0, ge=0, description="Pixels that teachers see beyond a student's window.")
    patch: int = Field(16, ge=1, description="A student's patch in pixels; windows move by patches.")
    flip: Flip = Field("random", description="pairs: every crop twice, as it is and mirrored.")
    flip_probability: float = Field(0.5, ge=0, le=1, description="How likely a crop is mirrored.")
    crop_fraction: float = Field(0.875, gt=0, le=1, description="Part of a side that imagenet_eval keeps.")
    jitter_probability: float = Field(
        0.5, ge=0, le=1, description="Chance of each colour change of multitask_train."
    )
    photometric: Photometric = Field("color_jitter", description="How colours of multitask_train change.")

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | str) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_multitask(cls, value: Any) -> Any:
        is_multitask = isinstance(value, dict) and value.get("policy") == "multitask_train"
        return {"scale": (0.5, 2.0), "photometric": "distortion"} | value if is_multitask else value

    @model_serializer(mode="wrap")
    def _content(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omits later additions that do not concern this policy, because its hash identifies caches."""
        fields: dict[str, Any] = content(self)
        if self.policy != "multitask_train":
            fields.pop("jitter_probability", None)
        if self.policy != "multitask_train" or self.photometric == "color_jitter":
            fields.pop("photometric", None)
        for name, old in (("margin", 0), ("patch", 16), ("flip", "random")):
            if fields.get(name) == old:
                del fields[name]
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        largest = math.inf if self.policy == "multitask_train" else 1
        for name, (low, high), most in (("scale", self.scale, largest), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                limit = " <= 1" if most == 1 else ""
                raise ValueError(f"{name} must satisfy 0 < low <= high{limit}, got {(low, high)}")
        if min(self.size) < 1:
            raise ValueError(f"size must be two positive numbers of pixels, got {self.size}")
        if self.is_fixed and (self.num_views != 1 or self.margin):
            raise ValueError(
                f"{self.policy} is one fixed view, so num_views must be 1 and margin 0, "
                f"got {self.num_views} and {self.margin}"
            )
        if self.flip == "pairs" and self.num_views % 2:
            raise ValueError(f"flip: pairs takes an even num_views, got {self.num_views}")
        if self.margin and any(side % self.patch for side in (self.margin, *self.size)):
            raise ValueError(
                f"margin and size must be multiples of views.patch, {self.patch} pixels of the student, "
                f"got {self.margin} and {self.size}"
            )
        if self.margin > min(self.size):  # else a window may miss an image that is small amid padding
            raise ValueError(f"margin must not exceed size, got {self.margin} and {self.size}")
        return self

    @property
    def is_fixed(self) -> bool:
        return self.policy in ("imagenet_eval", "multitask_eval")

    @property
    def stored_size(self) -> Size:
        """(height, width) in pixels of the view that is stored and that teachers see."""
        return self.size[0] + self.margin, self.size[1] + self.margin

    @property
    def windows_per_axis(self) -> int:
        return self.margin // self.patch + 1

    @property
    def middle(self) -> tuple[int, int]:
        """Where the window in the middle begins: (row, column), in pixels of the view."""
        return (self.margin // self.patch // 2 * self.patch,) * 2

    def seen_grid(self, grid: Size) -> Size:
        """How many tokens of a grid over the whole view have their centres in every window."""
        rows, columns = (
            max(1, tokens * seen // stored)
            for tokens, seen, stored in zip(grid, self.size, self.stored_size, strict=True)
        )
        return rows, columns
