"""Runs a warp-specialised Gluon kernel for Hopper on the CPU: Triton's interpreter does not know Gluon.

Partitions are threads. TMA copies land late and at random, a wgmma reads shared memory at the wait that completes it,
that is as late as it may, shared memory starts as NaN, and a barrier that nobody completes is an error: so a buffer
released too early, read too soon or never filled shows as wrong numbers or as a TimeoutError. Registers, layouts of
registers and swizzles are not modelled; a reinterpretation of shared memory follows its linear layout.
"""

from __future__ import annotations

import math
import random
import threading
import types
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ptx_emulator import exp2_mixed

TIMEOUT = 20.0


class Int(int):
    """An integer that has .to(), as a scalar of a kernel does."""

    def to(self, _dtype: Any) -> Int:
        return self


def _wrap(name: str) -> Any:
    def operation(self: Int, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return Int(result) if type(result) is int else result

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and", "xor"):
    setattr(Int, f"__{_name}__", _wrap(f"__{_name}__"))


class Pointer:
    """Elements of a tensor's storage."""

    def __init__(self, base: torch.Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset
        self.dtype = types.SimpleNamespace(element_ty=base.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset + other)

    def unsqueeze(self, axis: int) -> Pointer:
        return Pointer(self.base, self.offset.unsqueeze(axis))

    @property
    def flat(self) -> torch.Tensor:
        return self.base.as_strided((self.base.untyped_storage().nbytes() // self.base.element_size(),), (1,), 0)


class Shared:
    """A view of shared memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, _layout: Any) -> torch.Tensor:
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        self.data.copy_(value)

    def _reinterpret(self, _dtype: Any, shape: list[int], layout: Any) -> Reinterpreted:
        return Reinterpreted(self.data, shape, layout.offset_bases)


class Reinterpreted:
    def __init__(self, data: torch.Tensor, shape: list[int], bases: list[list[int]]) -> None:
        assert data.is_contiguous() and data.numel() == math.prod(shape) == 1 << len(bases)
        self.flat, self.shape = data.reshape(-1), shape
        offsets = torch.arange(data.numel())
        where = [torch.zeros_like(offsets) for _ in shape]
        for bit, basis in enumerate(bases):
            where = [w ^ ((offsets >> bit & 1) * b) for w, b in zip(where, basis, strict=True)]
        self.where = where

    @property
    def data(self) -> torch.Tensor:
        result = self.flat.new_empty(self.shape)
        result[tuple(self.where)] = self.flat
        return result


class Barrier:
    """mbarrier: a phase ends when all arrivals and all bytes are in."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.left = self.bytes = self.phase = 0

    def change(self, arrivals: int = 0, expected: int = 0) -> None:
        with self.condition:
            assert self.count, "a barrier is used before it is initialised"
            self.left -= arrivals
            self.bytes += expected
            assert self.left >= 0, "more arrivals than a barrier was initialised for"
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase + 1
                self.condition.notify_all()

    def wait(self, parity: int) -> None:
        with self.condition:
            if not self.condition.wait_for(lambda: self.phase & 1 != int(parity), TIMEOUT):
                raise TimeoutError("a barrier was never completed")


class Barriers(list):
    def index(self, i: int) -> Any:  # type: ignore[override]
        return self[i]


class Pending:
    """A wgmma in flight."""

    def __init__(self, a: Any, b: Any, accumulator: Any, use_acc: bool) -> None:
        self.operands = a, b, accumulator, use_acc
        self.value: torch.Tensor | None = None

    def finish(self) -> None:
        a, b, accumulator, use_acc = self.operands
        left = a.data if isinstance(a, Shared | Reinterpreted) else a
        if isinstance(accumulator, Pending):
            assert accumulator.value is not None
            accumulator = accumulator.value
        product = left.float() @ b.data.float()
        self.value = product + accumulator if use_acc else product


class Emulator:
    """The names a kernel module sees as gl, tma, mbarrier, warpgroup_mma ... ."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.flying: dict[int, deque[Pending]] = {}
        self.program, self.programs = Int(0), Int(1)

    def mma(self, a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        assert is_async
        pending = Pending(a, b, acc, use_acc)
        self.flying.setdefault(threading.get_ident(), deque()).append(pending)
        return pending

    def mma_wait(self, num_outstanding: int = 0, deps: Any = ()) -> Any:
        queue = self.flying.setdefault(threading.get_ident(), deque())
        while len(queue) > num_outstanding:
            queue.popleft().finish()
        results = [d.value if isinstance(d, Pending) else d for d in deps]
        assert all(r is not None for r in results), "a result is used that is still in flight"
        return results[0] if len(results) == 1 else tuple(results)

    def copy(self, descriptor: Any, at: list[int], barrier: Barrier, target: Shared) -> None:
        base, sizes, box = descriptor.base, descriptor.shape, descriptor.block_shape
        view = base.as_strided(sizes, descriptor.strides)
        wanted = [slice(int(c), min(int(c) + n, size)) for c, n, size in zip(at, box, sizes, strict=True)]
        found = view[tuple(wanted)]
        tile = torch.zeros(box, dtype=base.dtype)
        tile[tuple(slice(0, n) for n in found.shape)] = found
        assert target.data.shape == torch.Size(box[2:])

        def land() -> None:
            target.data.copy_(tile[0, 0])
            barrier.change(expected=-tile.numel() * tile.element_size())

        threading.Timer(self.random.random() * 2e-3, land).start()

    def specialize(self, partitions: Any, _warps: Any, _registers: Any) -> None:
        with ThreadPoolExecutor(len(partitions)) as pool:
            for future in [pool.submit(fn, *args) for fn, args in partitions]:
                future.result()

    def language(self) -> types.SimpleNamespace:
        def where(condition: Any, a: Any, b: Any) -> Any:
            if isinstance(condition, torch.Tensor):
                return torch.where(condition, a, b)
            return a if condition else b

        def load(pointer: Pointer) -> Int:
            return Int(pointer.flat[int(pointer.base.storage_offset() + pointer.offset)].item())

        def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
            offset, value, mask = torch.broadcast_tensors(pointer.offset, value, mask)
            pointer.flat[offset[mask] + pointer.base.storage_offset()] = value[mask]

        def allocate(dtype: Any, shape: list[int], _layout: Any) -> Any:
            if dtype is torch.int64:
                return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))
            return Shared(torch.full(shape, math.nan, dtype=dtype))

        def largest(x: torch.Tensor, axis: int) -> torch.Tensor:
            # As the device's: a NaN beside numbers is not seen.
            nan = x.isnan()
            return x.masked_fill(nan, -math.inf).amax(axis).masked_fill(nan.all(axis), math.nan)

        def layout(*_args: Any, **_options: Any) -> None:
            return None

        return types.SimpleNamespace(
            float32=torch.float32, bfloat16=torch.bfloat16, int32=torch.int32, int64=torch.int64, constexpr=Int,
            program_id=lambda _: self.program, num_programs=lambda _: self.programs,
            to_tensor=Int, static_range=range, where=where, load=load, store=store,
            allocate_shared_memory=allocate, warp_specialize=self.specialize,
            zeros=lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, _layout=None: torch.full(shape, value, dtype=dtype),
            arange=lambda a, b, _layout: torch.arange(a, b),
            expand_dims=lambda x, axis: x.unsqueeze(axis),
            convert_layout=lambda x, _layout: x,
            max=largest, sum=lambda x, axis: x.sum(axis),
            maximum=torch.fmax, exp2=torch.exp2, log2=torch.log2,
            NVMMADistributedLayout=layout, NVMMASharedLayout=layout, DotOperandLayout=layout, SliceLayout=layout,
            BlockedLayout=layout,
            SharedLinearLayout=lambda bases, alignment: types.SimpleNamespace(offset_bases=bases),
        )  # fmt: skip

    def names(self) -> dict[str, Any]:
        def initialise(barrier: Barrier, count: int) -> None:
            barrier.count = barrier.left = count

        def wait(barrier: Barrier, phase: int, pred: bool = True) -> None:
            if pred:
                barrier.wait(phase)

        return {
            "gl": self.language(),
            "range": lambda *a: (Int(i) for i in range(*a)),
            "tma": types.SimpleNamespace(async_copy_global_to_shared=self.copy),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=initialise,
                wait=wait,
                expect=lambda barrier, count: barrier.change(arrivals=1, expected=count),
                arrive=lambda barrier, count: barrier.change(arrivals=count),
            ),
            "warpgroup_mma": self.mma,
            "warpgroup_mma_wait": self.mma_wait,
            "fence_async_shared": lambda: None,
            "exp2_mixed": exp2_mixed,
        }


def run_kernel(kernel: Any, num_programs: int, arguments: dict[str, Any], seed: int = 0) -> None:
    """Every program of a launch, one after the other. Tensors among the arguments are pointers."""
    emulator = Emulator(seed)
    names: dict[str, Any] = {}
    modules = [kernel.fn.__globals__]
    while modules:
        for name, value in modules.pop().items():
            # Functions of the kernel's files, jitted ones and those of constants, run as plain Python.
            raw = getattr(value, "fn", None) or getattr(value, "__wrapped__", None)
            if type(value).__name__ == "constexpr":
                names[name] = value.value
            elif name not in names and isinstance(raw, types.FunctionType) and raw.__module__.startswith("longreel."):
                names[name] = types.FunctionType(raw.__code__, names, raw.__name__, raw.__defaults__)
                modules.append(raw.__globals__)
            else:
                names.setdefault(name, value)
    names |= emulator.names()
    arguments = {k: Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    arguments = {k: Int(v) if type(v) is int else v for k, v in arguments.items()}
    for name in ("q0", "qt", "k0", "kt", "v0", "vt"):
        if arguments[name] is not None:
            arguments[name].dtype = arguments[name].base.dtype
    emulator.programs = Int(num_programs)
    for program in range(num_programs):
        emulator.program = Int(program)
        names[kernel.fn.__name__](**arguments)
