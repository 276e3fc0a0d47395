"""The checkpoints of ViT-Adapter's authors (github.com/czczup/ViT-Adapter), with the names of their code."""

import re
from collections.abc import Mapping

from torch import Tensor

from teachercache.pipeline.errors import CheckpointError
from teachercache.student.kpu.vit_adapter import ViTAdapter

_RENAMED = (
    (r"^spm\.stem\.(\d+)\.", lambda match: f"prior.stem.{int(match[1]) // 3}.{int(match[1]) % 3}."),
    (r"^spm\.conv(\d)\.", lambda match: f"prior.stages.{int(match[1]) - 2}."),
    (r"^spm\.fc(\d)\.", lambda match: f"prior.projections.{int(match[1]) - 1}."),
    (r"^level_embed$", "scale_embedding"),
    (r"^norm(\d)\.", lambda match: f"norms.{int(match[1]) - 1}."),
    (r"^interactions\.(\d+)\.injector\.", r"injectors.\1."),
    (r"^interactions\.(\d+)\.extractor\.", r"extractors.\1.0."),
    (
        r"^interactions\.(\d+)\.extra_extractors\.(\d+)\.",
        lambda match: f"extractors.{match[1]}.{int(match[2]) + 1}.",
    ),
    (r"\.feat_norm\.", ".feature_norm."),
    (r"\.attn\.sampling_offsets\.", ".attention.offsets."),
    (r"\.attn\.attention_weights\.", ".attention.weights."),
    (r"\.attn\.value_proj\.", ".attention.values."),
    (r"\.attn\.output_proj\.", ".attention.output."),
    (r"\.ffn\.fc1\.", ".ffn.enter."),
    (r"\.ffn\.dwconv\.dwconv\.", ".ffn.depthwise."),
    (r"\.ffn\.fc2\.", ".ffn.leave."),
)
_OF_ADAPTER = r"(backbone\.)?((spm|interactions|up|norm\d)\..+|level_embed)"


def load_vit_adapter(adapter: ViTAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Give a new `adapter` the weights among `tensors`, the `state_dict` of a checkpoint: those of its ViT
    and of a decoder are left out.

    Raises `CheckpointError`, and leaves the adapter as it is, where they are not all of this adapter's, as
    where its norm is not "sync_batch".
    """
    own = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(_OF_ADAPTER, name):
            renamed = match[2]
            for pattern, replacement in _RENAMED:
                renamed = re.sub(pattern, replacement, renamed)
            own[renamed] = tensor
    ours, theirs = (
        {name: tuple(one.shape) for name, one in of.items()} for of in (adapter.state_dict(), own)
    )
    if wrong := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
        raise CheckpointError(
            "The checkpoint does not hold this ViT-Adapter.",
            got=f"{len(wrong)} that are missing, unknown or of another shape, such as {', '.join(wrong[:3])}",
            expected=f"its {len(ours)} tensors, by the names of ViT-Adapter's code",
            do="build the KPU on a ViT of the checkpoint's width, with norm='sync_batch'",
        )
    adapter.load_state_dict(own)
