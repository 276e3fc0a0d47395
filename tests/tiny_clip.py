"""A small whole CLIP with random weights and a tokenizer of words; its vision tower as a timm model."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

SIZE, PATCH, WIDTH, JOINT = 32, 8, 32, 16
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "a", "photo", "of", "drawing", ".", "cat", "dog", "tree")
default_cfgs = generate_default_cfgs(
    {
        "vit_tests_clip": {
            "input_size": (3, SIZE, SIZE),
            "num_classes": JOINT,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "mean": (0.48145466, 0.4578275, 0.40821073),
            "std": (0.26862954, 0.26130258, 0.27577711),
        }
    }
)
sys.modules[__name__].__dict__.setdefault("__all__", [])


@register_model  # type: ignore[untyped-decorator]
def vit_tests_clip(pretrained: bool = False, **keys: Any) -> Any:
    fixed = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "patch_size": PATCH, "act_layer": "quick_gelu"}
    norm = {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
    return build_model_with_cfg(
        *(VisionTransformer, "vit_tests_clip", pretrained),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 2, "feature_cls": "getter"},
        **{**fixed, **norm, **keys},
    )


def tiny_clip(seed: int = 0, width: int = WIDTH) -> CLIPModel:
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * width}
    text = {"vocab_size": len(WORDS), "hidden_size": 24, "max_position_embeddings": 12, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=text | layers,
        vision_config={"hidden_size": width, "image_size": SIZE, "patch_size": PATCH} | layers,
        projection_dim=JOINT,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for (
            name,
            parameter,
        ) in model.named_parameters():  # norms and biases too
            if name != "logit_scale":
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    numbers = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


def save_clip(folder: Path, seed: int = 0, width: int = WIDTH) -> Path:
    tiny_clip(seed, width).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_vision(weights: dict[str, torch.Tensor], path: Path) -> str:
    save_file(weights, path)
    return str(path)
