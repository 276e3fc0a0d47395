"""What all models of recipes and caches share."""

from pydantic import BaseModel, ConfigDict

Size = tuple[int, int]  # (height, width)


class Strict(BaseModel):
    """An immutable model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
