"""Licences of teachers' weights: what is known, what is said of what is not, and what a card says."""

from __future__ import annotations

import pytest
import yaml
from timm.models import get_pretrained_cfg, list_pretrained

from teachercache.cache_builder.teachers.registry import presets
from teachercache.pipeline.errors import LicenceError
from teachercache.pipeline.sharing.licences import card_header, licence_of, licence_rows, require_shareable
from tests.make_cache import teacher_spec

RESTRICTED = {
    "dinov3-license",
    "fair-noncommercial-research-license",
    "apple-amlr",
    "nvidia-open-model-license",
}
FREE = {"apache-2.0", "mit", "bsd-3-clause"}


def licence(model: str, **changes: object) -> str:
    changes = {"model": model, "pretrained": True, **changes}
    return licence_of(teacher_spec().model_copy(update=changes))


def test_every_preset_has_a_known_licence() -> None:
    found = {name: licence(preset.model) for name, preset in presets().items()}
    assert "unknown" not in found.values()
    assert found["dinov3_large"] == "dinov3-license"
    assert {found[name] for name in ("sam_large", "dinov2_base", "grounding_dino_base")} == {"apache-2.0"}


def test_no_model_of_timm_is_thought_freer_than_timm_says() -> None:
    known = {model: ours for model in list_pretrained() if (ours := licence(model)) != "unknown"}
    assert len(known) > 100
    for model, ours in known.items():
        theirs = get_pretrained_cfg(model).license
        assert ours in ("other", theirs) or {ours, theirs} <= FREE, (model, ours, theirs)


def test_no_model_that_timm_says_is_bound_is_unknown() -> None:
    bound = {model: theirs for model in list_pretrained() if (theirs := get_pretrained_cfg(model).license)}
    bound = {
        model: theirs for model, theirs in bound.items() if theirs not in FREE | {"cc-by-4.0", "unknown"}
    }
    assert len(bound) > 100
    assert [model for model in bound if licence(model) == "unknown"] == []


def test_a_file_for_a_restricted_model_may_hold_its_weights() -> None:
    assert licence("vit_large_patch16_dinov3.lvd1689m", checkpoint="/data/mine.pth") == "dinov3-license"


@pytest.mark.parametrize("changes", [{"checkpoint": "/data/mine.pth"}, {"model": "resnet50.a1_in1k"}])
def test_other_weights_are_said_to_be_unknown_and_may_be_shared(changes: dict[str, str]) -> None:
    licences = {"a": licence(**{"model": "samvit_base_patch16.sa1b", **changes})}
    assert licences == {"a": "unknown"}
    assert "| a | [unknown](#licences) | not known to teachercache" in licence_rows(licences)
    assert yaml.safe_load(card_header(licences))["license"] == "unknown"
    require_shareable(licences)


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ({"a": "mit", "b": "mit"}, {"license": "mit"}),
        ({"a": "mit", "b": "random weights"}, {"license": "mit"}),
        ({"a": "mit", "b": "unknown"}, {"license": "unknown"}),
        ({"a": "mit", "b": "apache-2.0"}, {"license": "other", "license_name": "apache-2.0-and-mit"}),
        ({}, {"license": "unknown"}),
    ],
)
def test_a_card_has_the_licence_that_all_teachers_share(
    licences: dict[str, str], expected: dict[str, str]
) -> None:
    assert yaml.safe_load(card_header(licences)) == {**expected, "teacher_licences": licences}


@pytest.mark.parametrize("name", sorted(RESTRICTED))
def test_a_restricted_licence_is_named_with_its_terms(name: str) -> None:
    with pytest.raises(LicenceError, match=rf"(?s)b is under {name}: .*https://.*--accept-licences"):
        require_shareable({"a": "mit", "b": name})
    assert f"| b | [{name}](https://" in licence_rows({"b": name})
