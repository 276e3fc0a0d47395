"""GroundingDINO behind its image side: from four maps and a prompt to boxes.

B  images      Q  queries      T  tokens of the prompt      P  phrases
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.errors import RecipeError
from teachercache.student.zero_shot import load_whole


class Detector:
    """`model`: a `GroundingDinoForObjectDetection` of transformers, which loses its image side; `tokenizer`:
    its own. `width` and `num_maps`: of the maps that it takes, from fine to coarse."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.width, self.num_maps = model.config.d_model, model.config.num_feature_levels
        self._maps = _GivenMaps(model.model.backbone.position_embedding)
        model.model.backbone = self._maps
        model.model.input_proj_vision = nn.ModuleList(nn.Identity() for _ in range(self.num_maps))

    @classmethod
    def load(cls, place: str) -> Self:
        """A name on the Hub, or a folder. Raises `WeightsNotFoundError`."""
        return cls(*load_whole("GroundingDinoForObjectDetection", place, unused="model.backbone."))

    @torch.no_grad()
    def __call__(
        self, maps: Sequence[Tensor], shown_BHW: Tensor, phrases: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Boxes (B, Q, 4), x and y of the centre, width and height as fractions of the image; and scores
        (B, Q, P), of each phrase the mean of its tokens' probabilities, as the authors score COCO.

        `maps` (B, `width`, h, w) are what the encoder takes; `shown_BHW` is 0 where pixels are padding, else
        1. Raises `RecipeError` for a prompt that is too long.
        """
        prompt = ". ".join(phrase.replace(".", " ") for phrase in phrases) + "."
        ids_T = self.tokenizer(prompt, return_tensors="pt")["input_ids"][0]
        if len(ids_T) > (most := self.model.config.max_text_len):
            raise RecipeError(
                "The prompt is too long for GroundingDINO.",
                got=f"{len(ids_T)} tokens",
                expected=f"{most} at most",
                do="ask in several runs",
            )
        self.model.to(shown_BHW.device)
        self._maps.maps = maps
        found = self.model(
            pixel_values=shown_BHW[:, None],  # whose size alone is asked for
            pixel_mask=shown_BHW,
            input_ids=ids_T.to(shown_BHW.device).expand(len(shown_BHW), -1),
        )
        full_stop = self.tokenizer.convert_tokens_to_ids(".")
        places = groupby(range(1, len(ids_T) - 1), lambda place: int(ids_T[place]) == full_stop)
        of_phrases = [list(group) for is_stop, group in places if not is_stop]
        probabilities_BQT = found.logits.sigmoid()
        means = [probabilities_BQT[..., tokens].mean(-1) for tokens in of_phrases]
        return found.pred_boxes, torch.stack(means, dim=-1)


def read_prompt(prompt: str) -> list[str]:
    """The phrases of "cat. dog.", in small letters. Raises `RecipeError` for none, and for one twice."""
    phrases = [phrase.strip().lower() for phrase in prompt.split(".") if phrase.strip()]
    without = [phrase for phrase in phrases if not any(letter.isalpha() for letter in phrase)]
    if not phrases or without or len({*phrases}) < len(phrases):
        raise RecipeError(
            "The prompt does not say what to look for.",
            got=repr(prompt),
            expected="nouns, each once, with a full stop after each",
            do='write it such as: --prompt "cat. dog."',
        )
    return phrases


class _GivenMaps(nn.Module):
    """In the place of the backbone: it returns `maps`, with their masks and positions."""

    def __init__(self, position_embedding: nn.Module) -> None:
        super().__init__()
        self.position_embedding = position_embedding
        self.maps: Sequence[Tensor] = ()

    def forward(self, _: Tensor, shown_BHW: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        masks = [F.interpolate(shown_BHW[None].float(), one.shape[2:])[0].bool() for one in self.maps]
        pairs = list(zip(self.maps, masks, strict=True))
        return pairs, [self.position_embedding(one, mask).to(one.dtype) for one, mask in pairs]
