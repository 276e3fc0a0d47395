"""What of CLIP stays when a student takes the place of its vision tower: the text model, and the norm and
projection that end the image side.

B  images      K  classes      C  width of the vision tower      P  width of the joint space
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.student.zero_shot import load_whole

_AUTHORS = {  # transformers' names of the vision tower → those of the authors' checkpoints, which timm reads
    "vision_model.": "visual.",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class Clip:
    """`model`: a `CLIPModel` of transformers; `tokenizer`: its own."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.width: int = model.config.vision_config.hidden_size

    @classmethod
    def load(cls, place: str) -> Self:
        """A name on the Hub, or a folder. Raises `WeightsNotFoundError`."""
        return cls(*load_whole("CLIPModel", place))

    @torch.no_grad()
    def embed(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """(K, P): for each class the mean direction of its name in all templates, of length 1."""
        return torch.stack(
            [self._direction([each.replace("{}", name) for each in templates]) for name in names]
        )

    @torch.no_grad()
    def logits(self, tokens_BC: Tensor, names_KP: Tensor) -> Tensor:
        """(B, K) of class tokens after the last block, raw as caches and students hold them."""
        ended_BC = self.model.vision_model.post_layernorm(tokens_BC)
        images_BP = F.normalize(self.model.visual_projection(ended_BC), dim=1)
        return self.model.logit_scale.exp() * images_BP @ names_KP.T

    def vision_weights(self) -> dict[str, Tensor]:
        """The vision tower's, under the names of the authors' checkpoints."""
        weights = {"visual.proj": self.model.visual_projection.weight.T.contiguous()}
        for name, tensor in self.model.vision_model.state_dict(prefix="vision_model.").items():
            for ours, theirs in _AUTHORS.items():
                name = name.replace(ours, theirs)
            weights[name] = tensor
        for name in [name for name in weights if ".q_proj." in name]:
            parts = [weights.pop(name.replace(".q_proj.", f".{one}_proj.")) for one in "qkv"]
            weights[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        return weights

    def _direction(self, texts: list[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        ids_TN, mask_TN = (read[key].to(self.model.device) for key in ("input_ids", "attention_mask"))
        pooled_TC = self.model.text_model(input_ids=ids_TN, attention_mask=mask_TN).pooler_output
        return F.normalize(F.normalize(self.model.text_projection(pooled_TC), dim=1).mean(0), dim=0)
