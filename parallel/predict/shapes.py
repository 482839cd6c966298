"""Tensors that have shapes and storages' sizes but no data: PyTorch's `meta` device under code that says `cpu`.

What FakeTensorMode does for a compiler, without the Python objects it makes for every tensor: four times as fast, which
is what lets a sweep predict hundreds of points and the planner answer while one waits. Tests hold every figure equal to
a run under FakeTensorMode. The only file that touches FSDP2's check that parameters were given data.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils._python_dispatch import TorchDispatchMode

_META = torch.device("meta")


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether func takes a device."""
    return any(argument.name == "device" for argument in func._schema.arguments)


class ShapesOnly(TorchDispatchMode):
    """Dispatch mode in which every new tensor is on `meta`, and collectives of a fake group return at once.

    Nothing in it can read a value: `.item()` raises.
    """

    def __enter__(self) -> ShapesOnly:
        # FSDP2 wants parameters with data before the first step; there is none to come.
        self._check = FSDPParamGroup._validate_no_meta_params
        FSDPParamGroup._validate_no_meta_params = _unchecked  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        FSDPParamGroup._validate_no_meta_params = self._check  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return _collective(func, args, kwargs)
        if _makes_tensors(func) and (kwargs.get("device") is not None or not any(isinstance(a, Tensor) for a in args)):
            kwargs = {**kwargs, "device": _META}
        return func(*args, **kwargs)


def _unchecked(group: FSDPParamGroup) -> None:
    """In place of FSDP2's check."""


def _collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What c10d's op returns: its handle by a call on empty tensors, as it has no kernel for `meta`, and args' own."""
    result = func(*(_emptied(argument) for argument in args), **kwargs)
    # Ops that return tensors return their first argument, before the handle.
    return (args[0], *result[1:]) if isinstance(result, tuple) else result


def _emptied(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return torch.empty(0)
    if isinstance(argument, list | tuple):
        return type(argument)(_emptied(one) for one in argument)
    return argument
