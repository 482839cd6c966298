"""longreel.parallel.offload: what leaves the device comes back, counted and within its budget."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.parallel.config import ParallelConfig
from longreel.parallel.host_slabs import in_slabs
from longreel.parallel.mesh import build_mesh
from longreel.parallel.offload import HostStore, HostTensor
from longreel.parallel.parallelize import Batch, ParallelDiT

CONFIG = DiTConfig(depth=3, hidden_size=64, num_heads=4, conditioning="adaln", text_dim=16, max_text_tokens=4)
# 40 tokens over 2 ranks, 64 channels of 4 bytes.
ROW_BYTES = 20 * 64 * 4


def test_tensors_come_back_and_their_bytes_are_released():
    store = HostStore(min_bytes=2048, slab_bytes=1024)
    large, small, weight = torch.randn(5, 129), torch.randn(3), nn.Parameter(torch.randn(8, 128))
    store.next_block()
    kept = store.put(large)
    for stays in (small, weight):
        assert store.put(stays) is stays
        assert store.get(stays) is stays
    assert torch.equal(store.get(kept), large)
    # 2,580 bytes: rounded up to the alignment, and to whole slabs.
    assert (store.num_bytes, store.peak_bytes, store.pinned_bytes) == (3072, 3072, 3072)
    del kept
    gc.collect()
    assert (store.num_bytes, store.peak_bytes, store.pinned_bytes) == (0, 3072, 3072)


@pytest.mark.parametrize("dims", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_a_tensor_comes_back_as_it_was(dims, dtype):
    store = HostStore(min_bytes=1, slab_bytes=512)
    # Neighbours, so that a byte too far is seen.
    tensors = [torch.randint(100, (3, 17, 11)).to(dtype).permute(dims) + i for i in range(3)]
    kept = [store.put(tensor) for tensor in tensors]
    for tensor, one in zip(tensors, kept, strict=True):
        back = store.get(one)
        assert (back.dtype, back.stride()) == (dtype, tensor.stride())
        assert torch.equal(back, tensor)


def test_a_block_brings_the_one_before_it_along():
    store = HostStore(min_bytes=1)
    kept = []
    for _ in range(3):
        store.next_block()
        kept.append(store.put(torch.randn(4)))
    store.get(kept[2])
    assert kept[1][0].back is not None
    assert kept[0][0].back is None


def test_what_was_given_back_does_not_come_back_again():
    store = HostStore(min_bytes=1)
    first, second = (store.put(torch.randn(4)) for _ in range(2))
    store.get(first)
    store.get(second)
    assert first[0].back is None


def test_changing_lengths_take_no_more_than_the_longest():
    store = HostStore(min_bytes=1, slab_bytes=1024)
    for length in (4, 300, 700, 299, 123, 650, 700):
        store.next_block()
        kept = [store.put(torch.randn(length)) for _ in range(3)]
        del kept
    assert store.peak_bytes == 3 * 3072
    assert store.pinned_bytes == 9 * 1024


def test_the_budget_holds():
    store = HostStore(budget_bytes=2048, min_bytes=1, slab_bytes=1024)
    store.next_block()
    kept = store.put(torch.randn(260))
    message = r"block 1 needs 1,000 bytes .* beyond the 1,536 held, 3,072 with .* and the budget is 2,048 per rank"
    with pytest.raises(MemoryError, match=message):
        store.put(torch.randn(250))
    store.put(torch.randn(128))
    del kept
    store.put(torch.randn(250))
    assert store.pinned_bytes == 2048


def test_nothing_is_left_of_blocks_that_are_done():
    store = HostStore(min_bytes=1)
    for _ in range(3):
        store.next_block()
        block = weakref.ref(store.put(torch.randn(4))[1])
    store.next_block()
    assert block() is None


class CountingStore(HostStore):
    """Counts what leaves and what comes back."""

    def __init__(self) -> None:
        super().__init__(min_bytes=1024, slab_bytes=4096)
        self.copies = {True: 0, False: 0}

    def _copy(self, entry: HostTensor, flat: torch.Tensor, *, out: bool) -> None:
        self.copies[out] += 1
        super()._copy(entry, flat, out=out)


def held_bytes(strategy: str) -> tuple[int, int, int, int]:
    """Host bytes after forward, after backward, at the peak of two steps, and as taken from the host."""
    parallel = ParallelConfig(strategy=strategy, sp_degree=2, policy="offload", attention_provider="torch")
    torch.manual_seed(0)
    store = CountingStore()
    spread = ParallelDiT(DiT(CONFIG), build_mesh(sp_degree=2), parallel, store=store)
    shape = 1, 5, 4, 8, CONFIG.in_channels
    after = []
    for _ in range(2):
        data = {"latents": torch.randn(shape), "noise": torch.randn(shape), "text": torch.randn(1, 4, 16)}
        loss = spread.loss(Batch(**data, timestep=torch.rand(1), global_samples=1))
        after.append(store.num_bytes)
        loss.backward()
        del loss
        after.append(store.num_bytes)
    assert after[:2] == after[2:]
    # Two tensors of three blocks in two steps, once each way.
    assert store.copies == {True: 12, False: 12}
    return after[0], after[1], store.peak_bytes, store.pinned_bytes


@pytest.mark.parametrize("strategy", ["ulysses", "fastseq", "ring"])
def test_each_block_keeps_its_input_and_attentions_output_in_host_memory(run_distributed, strategy):
    for forward, backward, peak, pinned in run_distributed(held_bytes, 2, strategy):
        # 40 tokens by heads: every rank's log-sum-exps are below the smallest size.
        assert forward == peak == 3 * 2 * ROW_BYTES
        assert backward == 0
        assert pinned == in_slabs(peak, 4096)


def test_a_budget_goes_with_offload_only():
    config = ParallelConfig(policy="offload", host_memory_gib=0.5)
    for change in ({"policy": "full"}, {"host_memory_gib": 0.0}):
        with pytest.raises(
            ValueError, match="host_memory_gib must be positive and goes with policy 'offload' or 'auto'"
        ):
            replace(config, **change)
