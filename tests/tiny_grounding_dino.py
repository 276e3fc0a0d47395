"""A small whole GroundingDINO with random weights, and a tokenizer whose vocabulary has BERT's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertTokenizer, GroundingDinoConfig, GroundingDinoForObjectDetection

from teachercache.cache_builder.teachers import grounding_dino as module

TINY = "grounding-dino-of-tests"
SWIN = (8, (1, 1, 2, 1), (1, 2, 4, 8), 4, 224)  # as of `module._SWINS`, where tests put it
_BERTS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?", 1037: "a"}
_WORDS = ("cat", "dog", "red", "tree", "##s")


def tiny_grounding_dino() -> Any:
    text = BertConfig(
        vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )
    config = GroundingDinoConfig(
        backbone_config=module._config(TINY).backbone_config,
        text_config=text,
        num_queries=3,
        encoder_layers=1,
        decoder_layers=2,
    )
    torch.manual_seed(5)
    model = GroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which begin as zeros and ones
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.fixture(autouse=True, scope="module")
def tiny_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module._SWINS, TINY, SWIN)
        yield


@pytest.fixture(scope="module")
def whole(tiny_model: None) -> Any:
    """A whole detector with this Swin and small remaining parts."""
    return tiny_grounding_dino()


@pytest.fixture(scope="module")
def folder(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights as transformers saves them, under the names of the published files, and a tokenizer."""
    path = tmp_path_factory.mktemp("weights") / "detector"
    whole.save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    words = _BERTS | {1040 + number: word for number, word in enumerate(_WORDS)}
    vocabulary = {words.get(number, f"[unused{number}]"): number for number in range(1100)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
