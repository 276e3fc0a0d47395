"""Whether this machine has what the kernels in Triton ask for."""

import os
import shutil
import warnings

import torch

TRITON_SWITCH = "TEACHERCACHE_TRITON"  # 0: PyTorch's own operations take the kernels' place
LEAST_TRITON, LEAST_CAPABILITY = (3, 6), (8, 0)  # PyTorch 2.11's; TF32 and bfloat16


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_kernel(device: torch.device) -> bool:
    """Whether Triton's kernels run there; on a GPU that must do without, one warning says why."""
    if device.type != "cuda":
        return False
    reason = f"{TRITON_SWITCH}=0" if os.environ.get(TRITON_SWITCH) == "0" else _no_triton()
    found = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else LEAST_CAPABILITY
    if not reason and found < LEAST_CAPABILITY:
        reason = f"a GPU of compute capability {found[0]}.{found[1]}, expected 8.0 or newer"
    if reason:
        warnings.warn(f"Features are coded without Triton's kernels, more slowly: {reason}.", stacklevel=2)
        return False
    from teachercache.pipeline.codecs import decode_kernel, rings_kernel  # noqa: F401  they register them

    return True


def compiles(device: torch.device) -> bool:
    """Whether recipes that leave it open use torch.compile there; a GPU that cannot says why."""
    if device.type == "cuda" and (reason := _no_triton()) is not None:
        warnings.warn(f"Nothing is compiled by torch.compile: {reason}.", stacklevel=2)
        return False
    return device.type == "cuda"


def _no_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        return f"triton {triton.__version__}, expected 3.6 or newer"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (gcc, clang or CC)"
    return None
