"""Compile a Triton kernel for a GPU that is not there, and read off what it uses: for tests and the codegen report.

Registers and local memory come from the cuobjdump inside the triton package, instructions from PTX and SASS.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One kernel compiled for one target.

    num_warps counts those that a warp-specialised kernel adds. registers are per thread, at the start; local_bytes is
    the stack of a thread (spilled registers live there); shared_bytes is per program. ttir (a Gluon kernel's ttgir),
    ptx and sass are the texts of the stages.
    """

    name: str
    num_warps: int
    registers: int
    local_bytes: int
    shared_bytes: int
    ttir: str
    ptx: str
    cubin: bytes

    @cached_property
    def sass(self) -> str:
        """Disassembly."""
        return _cuobjdump("-sass", self.cubin)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory in the machine code; none without local memory."""
        if not self.local_bytes:
            return 0
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass))

    def programs_per_sm(self, *, registers: int = 65536, shared_bytes: int = 233472, threads: int = 2048) -> int:
        """Programs that fit on one multiprocessor; the defaults are Hopper's (228 KiB, 1 KiB reserved per program)."""
        # Registers are handed out to warps in units of 256, that is 8 per thread.
        per_program = -(-self.registers // 8) * 8 * 32 * self.num_warps
        by_shared = shared_bytes // (self.shared_bytes + 1024)
        return min(registers // per_program, by_shared, threads // (32 * self.num_warps))


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    options: Mapping[str, Any] | None = None,
    capability: int = 90,
) -> CompiledKernel:
    """Compile as a launch with these arguments would, for an NVIDIA GPU of this capability; needs no GPU.

    Args:
        kernel: a @triton.jit or @gluon.jit function, defined with the interpreter off.
        arguments: a value for every parameter. For a pointer a tensor (meta tensors will do, taken as starting at 16
            bytes unless their storage offset says otherwise) or its torch.dtype; an int gets the type and the
            divisibility by 16 that its value has in a launch; a TMA descriptor stands for itself; the kernel's
            tl.constexpr parameters and None are compiled in.
        num_warps, num_stages: launch options. options: further ones, as maxnreg.
        capability: 90 for sm_90.

    Raises:
        ValueError: arguments are missing or unknown, or the kernel was defined under the interpreter.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    if not isinstance(kernel, triton.runtime.JITFunction):
        raise ValueError(f"kernel {kernel} is not compilable: it was defined with TRITON_INTERPRET=1; unset it")
    if set(arguments) != set(kernel.arg_names):
        odd = sorted(set(arguments) ^ set(kernel.arg_names))
        raise ValueError(f"arguments of {kernel.__name__} must be {kernel.arg_names}; missing or unknown: {odd}")
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constants or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constexprs[name] = value
            continue
        signature[name], aligned = _argument_type(value)
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    compiled = triton.compile(
        source(kernel, signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
    )
    usage = _cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return CompiledKernel(
        name=kernel.__name__,
        # More than asked for where a kernel is warp-specialised.
        num_warps=compiled.metadata.num_warps,
        registers=found["REG"],
        local_bytes=found["STACK"] + found["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        ttir=str(compiled.asm["ttir" if "ttir" in compiled.asm else "ttgir"]),
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
    )


def _argument_type(value: Any) -> tuple[str, bool]:
    """Triton's type name of a launch argument, and whether it counts as divisible by 16."""
    if isinstance(value, torch.dtype):
        return _POINTERS[value], True
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if hasattr(value, "block_shape"):
        # A TMA descriptor; Gluon's names the layout in shared memory too.
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}{layout}>", False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise ValueError(f"argument {value!r} is neither a tensor or dtype (pointer), an int, a float nor a bool")


def _cuobjdump(flag: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # cuobjdump finds its disassembler through PATH.
        command = [str(tool), flag, file.name]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env={"PATH": str(tool.parent)}
        ).stdout
