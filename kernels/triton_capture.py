"""The launches that a launcher would make, without a GPU: to compile kernels at the arguments production gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from longreel.kernels import triton_common


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedLaunch:
    """One launch that was not made: compile_kernel takes what it holds; num_programs is the size of its grid."""

    kernel: Any
    arguments: dict[str, Any]
    num_programs: int
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any]


def captured_launches(launcher: Callable[..., Any], *tensors: Any, **options: Any) -> list[CapturedLaunch]:
    """Call a launcher on meta tensors and return its launches in order; nothing runs.

    Args:
        launcher: a function that launches @triton.jit kernels, as the forward of an op.
        tensors, options: its arguments, tensors on the meta device.
    """
    launches: list[CapturedLaunch] = []
    with _recording(launches):
        launcher(*tensors, **options)
    return launches


@contextmanager
def _recording(launches: list[CapturedLaunch]) -> Iterator[None]:
    from triton.runtime import JITFunction

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        defaults = {p.name: p.default for p in kernel.params if p.has_default}
        arguments = {name: given.get(name, defaults.get(name)) for name in kernel.arg_names}
        rest = {name: value for name, value in options.items() if name not in arguments}
        launches.append(
            CapturedLaunch(
                kernel=kernel,
                arguments=arguments,
                num_programs=math.prod(grid),
                num_warps=rest.pop("num_warps", 4),
                num_stages=rest.pop("num_stages", 3),
                options=rest,
            )
        )

    run, check = JITFunction.run, triton_common.require_triton
    JITFunction.run = record
    triton_common.require_triton = _on_any_device
    try:
        yield
    finally:
        JITFunction.run = run
        triton_common.require_triton = check


def _on_any_device(device: torch.device, provider: str = "triton") -> None:
    """In place of require_triton: meta tensors are on no device that Triton knows."""
