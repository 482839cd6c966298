"""Live bytes and peaks against hand-computed cases, on real and on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from longreel.parallel.predict.lifetimes import StorageTracker

KIB = 1024


@pytest.fixture(params=["real", "fake"])
def tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.param == "real" else FakeTensorMode():
        yield


def _kib(num: int = 1) -> Tensor:
    return torch.zeros(num * 256)


@pytest.mark.usefixtures("tensors")
def test_views_count_once_and_free_with_the_last_one() -> None:
    with StorageTracker() as tracker:
        x = _kib(4)
        view = x.view(2, -1)[0].t()
        assert tracker.current == 4 * KIB
        del x
        assert tracker.current == 4 * KIB
        del view
        assert tracker.current == 0
    assert tracker.peak == 4 * KIB


@pytest.mark.usefixtures("tensors")
def test_in_place_adds_nothing_and_out_of_place_peaks_with_its_inputs() -> None:
    with StorageTracker() as tracker:
        x = _kib(4)
        x.add_(1)
        assert tracker.peak == 4 * KIB
        x = x + 1
        assert tracker.peak == 8 * KIB
        assert tracker.current == 4 * KIB


@pytest.mark.usefixtures("tensors")
def test_resized_storage_counts_at_its_size() -> None:
    plain = torch.UntypedStorage.resize_
    with StorageTracker() as tracker:
        x = _kib(4)
        x.untyped_storage().resize_(0)
        assert tracker.current == 0
        x.untyped_storage().resize_(2 * KIB)
        assert tracker.current == 2 * KIB
    assert torch.UntypedStorage.resize_ is plain


@pytest.mark.usefixtures("tensors")
def test_storages_from_before_count_when_tracked_once() -> None:
    x = _kib(3)
    with StorageTracker() as tracker:
        tracker.track(x, x[1:])
        assert tracker.current == 3 * KIB


@pytest.mark.usefixtures("tensors")
def test_peaks_are_filed_by_phase() -> None:
    with StorageTracker() as tracker:
        kept = _kib(1)
        tracker.phase = "work"
        (_kib(5), _kib(2))
        tracker.phase = "rest"
    assert tracker.peaks == {"start": KIB, "work": 8 * KIB, "rest": KIB}
    assert kept.numel() == 256


class _Squares(nn.Module):
    """Saves for backward the input of every square: `depth` tensors."""

    def __init__(self, depth: int, *, recompute: bool) -> None:
        super().__init__()
        self.depth, self.recompute = depth, recompute

    def _squares(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = x.square()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._squares, x, use_reentrant=False) if self.recompute else self._squares(x)


@pytest.mark.usefixtures("tensors")
@pytest.mark.parametrize(("recompute", "kept"), [(False, 5), (True, 2)], ids=["kept", "recomputed"])
def test_checkpointing_keeps_the_input_alone(recompute: bool, kept: int) -> None:
    with StorageTracker() as tracker:
        x = _kib(1).requires_grad_()
        y = _Squares(4, recompute=recompute)(x)
        # x and y live in any case; without recomputation x and three results are saved.
        assert tracker.current == kept * KIB
        y.sum().backward()
        del y
        # x and its gradient.
        assert tracker.current == 2 * KIB
    # While the last square's gradient is computed: x, its three successors, y, and three terms of the gradient; with
    # recomputation no more, as what the whole stretch kept before it keeps now.
    assert 8 * KIB <= tracker.peak < 8.1 * KIB


class _Opener:
    """Opens one custom op, and gives one aten op a workspace."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self._body = body

    def body(self, func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        return self._body if func is torch.ops.longreel_test.doubled.default else None

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        return 100 * KIB if func is torch.ops.aten.exp.default else 0


def _doubled(x: Tensor) -> Tensor:
    return (x.repeat(8) * 2)[: x.numel()].clone()


@torch.library.custom_op("longreel_test::doubled", mutates_args=())
def _doubled_op(x: Tensor) -> Tensor:
    return _doubled(x)


@_doubled_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@pytest.mark.usefixtures("tensors")
def test_an_opened_op_shows_what_it_holds_inside() -> None:
    with StorageTracker() as closed:
        _doubled_op(_kib(1))
    with StorageTracker(_Opener(_doubled)) as opened:
        y = _doubled_op(_kib(1))
        assert opened.current == KIB == y.numel() * 4
    assert closed.peak == 2 * KIB
    # x, its eight-fold copy and the product of that.
    assert opened.peak == 17 * KIB


@pytest.mark.usefixtures("tensors")
def test_workspace_counts_beside_arguments_and_result_for_its_op_only() -> None:
    with StorageTracker(_Opener(_doubled)) as tracker:
        _kib(1).exp()
        assert tracker.current == 0
    assert tracker.peak == 102 * KIB
