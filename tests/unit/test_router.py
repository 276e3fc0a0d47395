"""The router against Eq. 4 written out, and the fusions of the task decoder against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import RecipeError
from teachercache.student.models.task_decoder import Router, TaskDecoder

EXPERTS, WIDTH, GRID, IMAGE_SIZE = 4, 16, (2, 3), (32, 48)
TASKS = {"semseg": 5, "depth": 1}


def a_router() -> Router:
    torch.manual_seed(0)
    router = Router(WIDTH, EXPERTS).double()
    for parameter in router.parameters():  # values that no initialisation hides
        nn.init.normal_(parameter)
    return router


def logits_by_hand(router: Router, tokens_BnD: Tensor) -> tuple[Tensor, Tensor]:
    """h and e of Eq. 4, (B, E) each, one patch after the other."""
    first, norm, _, second = router.mlp
    assert isinstance(first, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(second, nn.Linear)
    total_B2E: Tensor = torch.zeros((), dtype=torch.float64)
    for token_BD in tokens_BnD.unbind(1):
        hidden = token_BD @ first.weight.T + first.bias
        centred = hidden - hidden.mean(-1, keepdim=True)
        hidden = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        hidden = hidden * norm.weight + norm.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        total_B2E = total_B2E + hidden @ second.weight.T + second.bias
    mean_B2E = total_B2E / tokens_BnD.shape[1]
    return mean_B2E[:, :EXPERTS], mean_B2E[:, EXPERTS:]


def softmax(logits_BE: Tensor) -> Tensor:
    return logits_BE.exp() / logits_BE.exp().sum(1, keepdim=True)


def test_gates_are_those_of_equation_4() -> None:
    router = a_router()
    tokens_BnD = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    h_BE, e_BE = logits_by_hand(router, tokens_BnD)
    torch.testing.assert_close(router.eval()(tokens_BnD), softmax(h_BE), rtol=1e-12, atol=1e-12)
    router.train()
    torch.manual_seed(5)
    got = router(tokens_BnD)
    torch.manual_seed(5)
    noise_BE = torch.randn(3, EXPERTS, dtype=torch.float64) * (1 + e_BE.exp()).log()
    torch.testing.assert_close(got, softmax(h_BE + noise_BE), rtol=1e-12, atol=1e-12)


def test_gates_are_one_for_a_whole_image_and_add_up_to_one() -> None:
    router = a_router().eval()
    tokens_BnD = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    gates_BE = router(tokens_BnD)
    torch.testing.assert_close(gates_BE.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(router(tokens_BnD[:, torch.randperm(6)]), gates_BE)


def a_decoder(fusion: str, num_experts: int = EXPERTS) -> TaskDecoder:
    torch.manual_seed(0)
    return TaskDecoder(WIDTH, num_experts, TASKS, IMAGE_SIZE, fusion, "simple").double().eval()


@pytest.mark.parametrize("fusion", ["mor", "sum", "concat"])
def test_each_fusion_is_what_its_name_says(fusion: str) -> None:
    decoder = a_decoder(fusion)
    experts_SBEnD = [torch.randn(2, EXPERTS, 6, WIDTH, dtype=torch.float64) for _ in range(4)]
    predictions, gates = decoder(experts_SBEnD, GRID)
    for task, channels in TASKS.items():
        maps = []
        for level, experts_BEnD in enumerate(experts_SBEnD):
            experts = list(experts_BEnD.unbind(1))
            if fusion == "mor":
                gates_BE = decoder.routers[task][level](experts[0])
                assert torch.equal(gates[task][:, level], gates_BE)
                weighted = [gates_BE[:, i, None, None] * expert for i, expert in enumerate(experts)]
                fused = weighted[0] + weighted[1] + weighted[2] + weighted[3]
            elif fusion == "sum":
                fused = experts[0] + experts[1] + experts[2] + experts[3]
            else:
                fused = torch.cat(experts, dim=-1)
            maps.append(fused.transpose(1, 2).reshape(2, -1, *GRID))
        quarter = decoder.heads[task](maps)
        expected = nn.functional.interpolate(quarter, IMAGE_SIZE, mode="bilinear")
        assert predictions[task].shape == (2, channels, *IMAGE_SIZE)
        torch.testing.assert_close(predictions[task], expected, rtol=1e-10, atol=1e-10)
    assert (gates.keys() == TASKS.keys()) if fusion == "mor" else (gates == {})


def test_concatenated_experts_make_the_heads_of_table_19() -> None:
    """820M parameters by concatenation, 378M by addition: the heads are what differs."""
    heads = {}
    for fusion in ("sum", "concat"):
        with torch.device("meta"):
            tasks = {"semseg": 21, "parts": 7, "saliency": 2, "normals": 3, "boundary": 1}
            decoder = TaskDecoder(768, 4, tasks, (512, 512), fusion, "simple")
        heads[fusion] = sum(parameter.numel() for parameter in decoder.parameters())
    assert (heads["concat"] - heads["sum"]) / 1e6 == pytest.approx(820 - 378, abs=1)


@pytest.mark.parametrize(
    ("fusion", "decoder", "num_experts", "message"),
    [
        ("moe", "simple", 2, "did you mean mor"),
        ("sum", "upper", 2, "did you mean upernet"),
        ("mor", "simple", 1, "routers have nothing"),
    ],
)
def test_what_cannot_be_built_says_why(fusion: str, decoder: str, num_experts: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TaskDecoder(WIDTH, num_experts, TASKS, IMAGE_SIZE, fusion, decoder)
