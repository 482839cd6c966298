"""What every Triton kernel needs around it: is Triton here, does it interpret, and on which device does it launch.

Triton is optional: this module and its callers import it where it is used. TRITON_INTERPRET=1 is read when a kernel is
defined, so it must be set before the process imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def _found() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True where TRITON_INTERPRET=1 makes Triton run kernels on the CPU, in Python."""
    if not _found():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def require_triton(device: torch.device, provider: str = "triton") -> None:
    """Check that Triton kernels can run on tensors of this device. Traced code is checked when it launches.

    Args:
        provider: the name that was asked for, which the message repeats; `triton-hopper...` is not interpreted.

    Raises:
        ValueError: Triton is not installed, or the device is not CUDA and the interpreter is off; the message says
            which and what would work.
    """
    if torch.compiler.is_compiling():
        return
    if not _found():
        raise ValueError(
            f"provider {provider!r} is missing: the package triton is not installed; pip install 'triton>=3.6', or "
            "name provider torch (of attention in half precision also sdpa-flash)"
        )
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return
    if provider.startswith("triton-hopper"):
        raise ValueError(
            f"provider {provider!r} needs a CUDA device, a Hopper GPU, got tensors on {device}; use provider torch or "
            "auto"
        )
    raise ValueError(
        f"provider {provider!r} needs a CUDA device, got tensors on {device}; set TRITON_INTERPRET=1 before Python "
        "starts to interpret the kernels on the CPU, or use provider torch or auto"
    )


def launch_on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches on the current device, not on its arguments'.

    Raises:
        ValueError: as require_triton.
    """
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    require_triton(tensor.device)
    return contextlib.nullcontext()
