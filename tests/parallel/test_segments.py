"""longreel.parallel.strategies.segments: offsets that kernels take."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longreel.parallel.strategies.segments import kernel_offsets


@pytest.mark.parametrize("real_beside", [True, False])
def test_offsets_made_in_a_fake_mode_are_not_kept(real_beside):
    like = torch.zeros(1)
    # Lengths of no other test.
    offsets = (0, 30011, 70001 + real_beside)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(kernel_offsets(offsets, like if real_beside else torch.zeros(1))) is not torch.Tensor
    kept = kernel_offsets(offsets, like)
    assert type(kept) is torch.Tensor
    assert kept.tolist() == list(offsets)
    assert kernel_offsets(offsets, like) is kept
