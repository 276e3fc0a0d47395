"""What a launcher decides of a run: its processes and their devices. The recipe alone states the arithmetic.

accelerate also takes arithmetic from variables, which a launcher's configuration or a shell may have set.
Here each of them is overruled, with a line that says so, or refused.
"""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.places.cores import stay_near
from teachercache.student.training.decoder_recipe import AnyRecipe

_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor, context, sequence or sharded)",
}
_OFF = {"", "0", "no", "n", "false", "f", "off"}


def accelerator_for(recipe: AnyRecipe) -> Accelerator:
    """Raises `RecipeError` for what the environment asks for and this trainer cannot do or must not heed."""
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "").lower() not in _OFF:
            raise RecipeError(
                "The launcher would split the student, which this trainer needs whole in every process.",
                got=f"{engine} ({variable}={os.environ[variable]})",
                expected="data parallelism: one process, or several under MULTI_GPU or MULTI_CPU (DDP); "
                "checkpoints, clip_norm and the finished student are those of a whole model",
                do="launch with infra/accelerate/one_node.yaml or torchrun; for more memory lower "
                "batch_size_per_process and raise gradient_accumulation_steps",
            )
    for variable, unset in (("ACCELERATE_FP8_BACKEND", "no"), ("NVIDIA_TF32_OVERRIDE", "")):
        if (value := os.environ.get(variable, unset)).lower() != unset:
            raise RecipeError(
                "A variable of the environment would change the arithmetic that the recipe states.",
                got=f"{variable}={value}",
                expected=f"mixed_precision: {recipe.mixed_precision}, as in the recipe",
                do=f"unset {variable} (or take it out of the launcher's configuration)",
            )
    torch.set_float32_matmul_precision("highest")  # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE begins with "high"
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # unless told so, it runs one process on CPUs, silently
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(recipe.gradient_accumulation_steps),
            dynamo_plugin=TorchDynamoPlugin("no", "default", False, False, use_regional_compilation=False),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
        if accelerator.device.type == "meta":
            raise ValueError("device meta holds no numbers")
    except (ImportError, ValueError, RuntimeError) as error:
        there = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("ACCELERATE_")]
        raise RecipeError(
            "accelerate does not start with what the environment says.",
            got=f"{error} (beside {', '.join(sorted(there)) or 'no variable ACCELERATE_…'})",
            expected="processes and devices that are there",
            do="correct or unset the variable, or start with `accelerate launch` or `torchrun`",
        ) from error
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        stay_near(torch.cuda.get_device_properties(accelerator.device))
    stated = recipe.mixed_precision, recipe.gradient_accumulation_steps
    assert stated == (accelerator.mixed_precision, accelerator.gradient_accumulation_steps)
    return accelerator


def overruled(recipe: AnyRecipe) -> list[str]:
    """One line for each variable that says otherwise than the recipe, which holds; `accelerate launch` sets
    some of them to "no" unasked."""
    steps, clip_norm = recipe.gradient_accumulation_steps, recipe.clip_norm
    precision = recipe.mixed_precision
    stated = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (steps, f"gradient_accumulation_steps: {steps}"),
        "ACCELERATE_GRADIENT_CLIPPING": (clip_norm, f"clip_norm: {clip_norm}"),
        "ACCELERATE_MIXED_PRECISION": (precision, f"mixed_precision: {precision}"),
        "ACCELERATE_DOWNCAST_BF16": ("no", f"mixed_precision: {precision}"),
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("no", f"mixed_precision: {precision}"),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "student.compile alone"),
    }
    return [
        f"{variable}={value} in the environment is ignored: the recipe states {text}."
        for variable, (own, text) in stated.items()
        if (value := os.environ.get(variable, "")).lower() not in {*_OFF, str(own)}
    ]
