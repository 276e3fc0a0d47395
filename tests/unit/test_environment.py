"""The recipe states the arithmetic, whatever a launcher or a shell has set beside it."""

from __future__ import annotations

import re
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils import DynamoBackend

from teachercache.pipeline.errors import RecipeError
from teachercache.student.training.environment import accelerator_for, overruled
from tests.train_recipes import train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

OVERRULED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("2", "gradient_accumulation_steps: 1"),
    "ACCELERATE_MIXED_PRECISION": ("fp16", "mixed_precision: no"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "student.compile alone"),
    "ACCELERATE_GRADIENT_CLIPPING": ("1.0", r"clip_norm: 0\.0"),
    "ACCELERATE_DOWNCAST_BF16": ("true", "mixed_precision: no"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("1", "mixed_precision: no"),
}
"""Value → what the run says it states. Left alone, they would accumulate twice as often, compute in float16
or TF32, compile, clip, or round sums to bfloat16."""

REFUSED = {
    "ACCELERATE_USE_FSDP": ("true", "FSDP"),
    "ACCELERATE_USE_DEEPSPEED": ("true", "DeepSpeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("1", "Megatron-LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("yes", "a parallelism_config"),
    "ACCELERATE_FP8_BACKEND": ("TE", "mixed_precision: no"),
    "NVIDIA_TF32_OVERRIDE": ("0", "mixed_precision: no"),
    "ACCELERATE_TORCH_DEVICE": ("nonsense", "processes and devices that are there"),
    "ACCELERATE_USE_CPU": ("perhaps", "processes and devices that are there"),
}

WITHOUT_EFFECT = {
    *("DYNAMO_MODE", "DYNAMO_USE_FULLGRAPH", "DYNAMO_USE_DYNAMIC", "DYNAMO_USE_REGIONAL_COMPILATION"),
    *("FP8_OPT_LEVEL", "CONFIG_DS_FIELDS"),  # of what is refused, as are all DEEPSPEED_…
    *(
        "BYPASS_DEVICE_MAP",
        "INIT_INCLUDE_BUFFERS",
    ),  # of models split by a device map, made by `init_on_device`
    "ALLOW_CP_STANDALONE",
}
PLACES_AND_WORDS = {
    *("USE_CPU", "TORCH_DEVICE", "CPU_AFFINITY", "USE_SAGEMAKER", "SAGEMAKER_DISTRIBUTED_TYPE"),
    *("DEBUG_MODE", "DEBUG_RDV_FILE", "LOG_LEVEL", "ENABLE_RICH", "NUM_PROCESSES", "IN_TPU_POD"),
}


@pytest.mark.parametrize("variable", OVERRULED)
def test_what_the_recipe_states_holds(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = train_recipe("cache", tmp_path)
    value, states = OVERRULED[variable]
    monkeypatch.setenv(variable, value)
    torch.set_float32_matmul_precision("high")  # as torch begins with the last one
    accelerator = accelerator_for(recipe)
    assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (1, "no")
    assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert torch.get_float32_matmul_precision() == "highest"
    (line,) = overruled(recipe)
    assert re.search(f"^{variable}={value} .*{states}", line)


@pytest.mark.parametrize("variable", REFUSED)
def test_what_cannot_be_overruled_is_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    value, message = REFUSED[variable]
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=rf"{variable}={value}|{value}") as error:
        accelerator_for(train_recipe("cache", tmp_path))
    assert message in str(error.value)


def test_what_a_plain_launch_sets_is_no_news(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        **{"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default", "USE_CPU": "False"},
        **{"DYNAMO_USE_FULLGRAPH": "False", "DYNAMO_USE_DYNAMIC": "False"},
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    recipe = train_recipe("cache", tmp_path, mixed_precision="bf16", gradient_accumulation_steps=3)
    accelerator = accelerator_for(recipe)
    assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (3, "bf16")
    assert overruled(recipe) == []


def test_a_process_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    accelerator_for(train_recipe("cache", tmp_path, mixed_precision="bf16"))
    with pytest.raises(RecipeError, match="already been initialized"):
        accelerator_for(train_recipe("cache", tmp_path))


def test_every_variable_of_accelerate_was_looked_at() -> None:
    """A newer one may read others: find out what they do, and add them above."""
    known = {name.removeprefix("ACCELERATE_") for name in OVERRULED | REFUSED}
    found = set()
    root = Path(accelerate.__file__).parent
    for file in root.rglob("*.py"):
        if not {"commands", "test_utils"} & set(file.relative_to(root).parts):
            found |= set(re.findall(r"ACCELERATE_([A-Z0-9]+(?:_[A-Z0-9]+)*)(?!\w)", file.read_text()))
    settled = known | WITHOUT_EFFECT | PLACES_AND_WORDS
    assert {name for name in found - settled if not name.startswith("DEEPSPEED_")} == set()
