"""A student in its teachers' place: classes by CLIP, boxes by GroundingDINO (KPU, Figure 3)."""

from pathlib import Path
from typing import Any

from teachercache.pipeline.errors import WeightsNotFoundError, extra


def load_whole(kind: str, place: str, unused: str = "-") -> tuple[Any, Any]:
    """transformers' model `kind` in float32 and eval mode, and its tokenizer. `place`: a name on the Hub, a
    folder that transformers saved, or a file in it. Weights under the prefix `unused` may be missing.

    Raises `WeightsNotFoundError` where there is no such model, or some of its weights would be random.
    """
    with extra("decoders"):
        import transformers
    source = str(Path(place).parent) if Path(place).is_file() else place
    try:
        whole = getattr(transformers, kind)
        model, report = whole.from_pretrained(source, dtype="float32", output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        missing = [key for key in sorted(report["missing_keys"]) if not key.startswith(unused)]
        problem = f"{len(missing)} missing weights: {', '.join(missing[:4])}" if missing else ""
    except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise WeightsNotFoundError(
            f"There is no {kind} to load from {place}.",
            got=problem,
            expected="a name on the Hugging Face Hub, or a folder with configuration, weights and tokenizer",
            do="check it; without a network, download the model where there is one and pass its folder",
        )
    return model.eval().requires_grad_(False), tokenizer
