"""The kernels that torch.compile would make for a GPU that is not there, by the bytes that they move.

Inductor lowers and fuses a function of fake CUDA tensors as for an H100, and is stopped where it would write
code. A kernel reads and writes each of its buffers once; autotuning is off, as by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch._aot_autograd import runtime_wrappers
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config, ir, scheduler
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.exc import InductorError
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.virtualized import V
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import register_dataclass, tree_flatten, tree_unflatten

from benchmarks.fake_gpu import OTHER_FLOPS, TENSOR_FLOPS, TF32_FLOPS, Roofline, Work, aten, tensors_of
from teachercache.pipeline.codecs import Encoded
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.student.losses.distillation import AdjointTarget, LossOutput, Target

_H100 = SimpleNamespace(
    type="cuda",
    index=0,
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)
for _result in (Encoded, FeatureMoments, Target, AdjointTarget, LossOutput):
    register_dataclass(_result)


class _FusedError(Exception):
    """Ends the compiler where it would write code."""


@contextmanager
def _an_h100(end: Callable[[Any], None], side_by_side: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for target, name, new in (
            (torch.cuda, "get_device_properties", lambda *_, **__: _H100),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "is_available", lambda: False),  # which some libraries make ask `device_count`
            (CudaInterface, "get_device_properties", staticmethod(lambda *_: _H100)),
            (CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
            (scheduler, "has_triton", lambda *_: True),
            (scheduler.Scheduler, "codegen", end),
        ):
            stack.enter_context(patch.object(target, name, new))
        # It would compute constants on the device.
        stack.enter_context(config.patch(joint_graph_constant_folding=False, combo_kernels=side_by_side))
        yield


def fused(function: Callable[..., Any], tensors: list[Tensor], side_by_side: bool = False) -> Work:
    """What the compiled function asks of a GPU; inside `fake_gpu`.

    `side_by_side`: small kernels run as one.
    """
    work = Work()

    def end(found: Any) -> None:
        for node in found.nodes:
            _count(work, node)
        raise _FusedError

    graph = make_fx(lambda *inputs: tensors_of(function(*inputs)))(*tensors)
    with _an_h100(end, side_by_side), torch.no_grad():
        try:
            compile_fx(graph, tensors)
        except InductorError as error:
            if "_FusedError" not in str(error):
                raise
    return work


def fused_with_gradient(function: Callable[..., Any], *inputs: Any) -> tuple[Work, Work]:
    """What a function and its gradient ask of a GPU, compiled as training compiles them; inside `fake_gpu`.

    `inputs` are fake tensors of the CPU, where autograd runs: the two graphs are moved from there.
    """
    counts = list[Work]()

    def count(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        with torch.no_grad():
            counts.append(fused(_OnGPU(gm).run, [_on_gpu(one) for one in example_inputs], side_by_side=True))
        return make_boxed_func(gm.forward)

    compiler = aot_function(
        lambda *given: tensors_of(function(*given)),
        count,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    constants = patch.object(torch._dynamo.utils, "assert_no_fake_params_or_buffers")
    copies = patch.object(runtime_wrappers, "copy", SimpleNamespace(deepcopy=lambda graph: graph))
    with constants, copies:  # both look into the memory of constants, which fake ones do not have
        total = sum(one.sum() for one in compiler(*inputs) if one.requires_grad)
        torch.autograd.grad(total, [one for one in tensors_of(inputs) if one.requires_grad])
    forward, backward = counts
    return forward, backward


def _on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


class _OnGPU(Interpreter):
    """Runs a graph that was made on the CPU, with the GPU's attention."""

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _on_gpu(super().get_attr(target, args, kwargs))  # a constant

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("cuda")}
        if target is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return aten._scaled_dot_product_flash_attention(*args[:3], **kwargs)[:2]
        if target is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            lengths = args[1].shape[2], args[2].shape[2]
            seed = torch.empty(2, dtype=torch.int64, device="cuda")
            args = (*args[:6], None, None, *lengths, *args[6:8], seed, seed)
            return aten._scaled_dot_product_flash_attention_backward(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _count(work: Work, node: Any) -> None:
    nbytes = node.get_read_write_buffers_sizes() - _overstated(node)
    if isinstance(node.node, ir.MultiOutput):  # one of the outputs of the kernel before it
        nbytes = sum(V.graph.get_dep_size_hint(dep) for dep in node.read_writes.writes)
        work.nbytes += nbytes
        work.nbytes_by_kernel["outputs"] += nbytes
    elif not isinstance(node, scheduler.NopKernelSchedulerNode):
        origins = [one.node.get_origin_node() for one in node.get_nodes() if one.node is not None]
        if "nearest_rings" in str(getattr(node.node, "op_overload", "")):
            tokens, *_, bits, _ = next(iter(node.node.get_origins())).args
            work.add_rings(tokens.meta["val"], bits)
            nbytes = 0  # what gathers the tokens that are left
        if "decode_hadamard" in str(origins):
            work.add("restore", 0)  # the outliers
        names = dict.fromkeys(str(origin).rstrip("_0123456789") for origin in origins)
        work.add("+".join(names), nbytes, *_products(node, origins))


def _overstated(node: Any) -> int:
    """Of buffers of which a fused kernel touches some places, Inductor counts all places."""
    nodes: Sequence[Any] = node.get_nodes() if isinstance(node, scheduler.FusedSchedulerNode) else []
    touched = dict[str, dict[Any, int]]()
    for one in nodes:
        sides = V.graph.sizevars.optimization_hints([side for ranges in one.get_ranges() for side in ranges])
        for dep in one.read_writes.reads_and_writes():
            told = isinstance(dep, StarDep) or (isinstance(dep, MemoryDep) and dep.is_indirect())
            places = math.prod(sides) if told else V.graph.sizevars.optimization_hint(dep.get_numel())
            touched.setdefault(dep.name, {})[dep] = places
    buffers: dict[str, Any] = {name: V.graph.try_get_buffer(name) for name in touched}
    return sum(
        max(0, V.graph.sizevars.optimization_hint(buffer.get_numel()) - sum(touched[name].values()))
        * buffer.get_dtype().itemsize
        for name, buffer in buffers.items()
        if buffer is not None
    )


def _products(node: Any, origins: list[Any]) -> tuple[int, float]:
    flops = node.estimate_flops() or 0
    if isinstance(node.node, ir.FallbackKernel):  # attention: Inductor does not know its own
        origins = [one for one in node.node.get_origins() if one.target is node.node.op_overload]
        flops = sum(count_flops_fx(origin) or 0 for origin in origins)
    tensors = [one.meta["val"] for origin in origins if origin for one in origin.all_input_nodes]
    if "decode_hadamard" in str(origins):
        *_, left, right = tensors
        return 2 * origins[0].meta["val"].numel() * (len(left) + len(right)), TF32_FLOPS
    wide = {torch.float32, torch.float64} & {one.dtype for one in tensors if isinstance(one, Tensor)}
    return int(flops), OTHER_FLOPS if wide else TENSOR_FLOPS


_known = dict[Hashable, Any]()


def compiled(function: Callable[..., Any], roofline: Roofline, key: Hashable = None) -> Callable[..., Any]:
    """Stands for `torch.compile(function)`: it computes as `function`, and counts as that would.

    `key` tells functions apart whose arguments look the same.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        def of_tensors(*given: Tensor) -> Any:
            new_args, new_kwargs = given_again(given)
            return function(*new_args, **new_kwargs)

        with roofline.silent():
            out = function(*args, **kwargs)
            tensors, given_again, looks = _arguments(args, kwargs)
            name = getattr(function, "__qualname__", "")
            signature = (name, key, torch.is_autocast_enabled("cuda"), *looks)
            if signature not in _known:
                _known[signature] = fused(of_tensors, tensors)
        roofline.work.include(_known[signature])
        return out

    return run


def trained(module: nn.Module, roofline: Roofline) -> Callable[..., Any]:
    """Stands for `torch.compile(module)` in training, on fake tensors of the CPU: what its gradient asks for
    is added to the stage "backward" at once, and gradients end at its outputs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with roofline.silent():
            out = module(*args, **kwargs)
            tensors, given_again, looks = _arguments(args, kwargs)
            signature = (type(module), *looks)
            if signature not in _known:
                _known[signature] = fused_with_gradient(
                    lambda parameters, *given: functional_call(module, parameters, *given_again(given)),
                    dict(module.named_parameters()),
                    *tensors,
                )
            leaves, structure = tree_flatten(out)
            ends = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
        forward, backward = _known[signature]
        roofline.work.include(forward)
        with roofline.stage("backward"):
            roofline.work.include(backward)
        return tree_unflatten(ends, structure)

    return run


def _arguments(args: Any, kwargs: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any], list[Any]]:
    """The tensors among these, what puts others in their places, and how they look."""
    leaves, structure = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def given_again(tensors: Sequence[Tensor]) -> Any:
        given = leaves.copy()
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return tree_unflatten(given, structure)

    looks = [
        (leaf.shape, leaf.stride(), leaf.dtype)
        if isinstance(leaf, Tensor)
        else str(getattr(leaf, "name", leaf))
        for leaf in leaves
    ]
    return [leaves[place] for place in places], given_again, looks
