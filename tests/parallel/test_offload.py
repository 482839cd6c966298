"""longreel.parallel.offload: what leaves the device comes back, counted and within its budget."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.offload import HostStore
from longreel.parallel.parallelize import Batch, ParallelDiT

CONFIG = DiTConfig(depth=3, hidden_size=64, num_heads=4, conditioning="adaln", text_dim=16, max_text_tokens=4)
# 40 tokens over 2 ranks, 64 channels of 4 bytes.
ROW_BYTES = 20 * 64 * 4


def test_tensors_come_back_and_their_bytes_are_released():
    store = HostStore(min_bytes=64)
    large, small = torch.randn(4, 8), torch.randn(3)
    store.next_block()
    kept = store.put(large)
    assert store.put(small) is small
    assert store.get(small) is small
    assert torch.equal(store.get(kept), large)
    assert store.num_bytes == store.peak_bytes == 128
    del kept
    gc.collect()
    assert (store.num_bytes, store.peak_bytes) == (0, 128)


def test_a_block_brings_the_one_before_it_along():
    store = HostStore(min_bytes=1)
    kept = []
    for _ in range(3):
        store.next_block()
        kept.append(store.put(torch.randn(4)))
    store.get(kept[2])
    assert kept[1][0].back is not None
    assert kept[0][0].back is None


def test_the_budget_holds():
    store = HostStore(budget_bytes=100, min_bytes=1)
    store.next_block()
    kept = store.put(torch.randn(20))
    with pytest.raises(MemoryError, match=r"block 1 needs 40 bytes .* beyond the 80 held, and the budget is 100"):
        store.put(torch.randn(10))
    del kept
    store.put(torch.randn(10))


def held_bytes(strategy: str) -> tuple[int, int, int]:
    """Host bytes after forward, after backward, and at the peak of two steps."""
    parallel = ParallelConfig(strategy=strategy, sp_degree=2, policy="offload", attention_provider="torch")
    torch.manual_seed(0)
    store = HostStore(min_bytes=1024)
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
    return after[0], after[1], store.peak_bytes


@pytest.mark.parametrize("strategy", ["ulysses", "fastseq", "ring"])
def test_each_block_keeps_its_input_and_attentions_output_in_host_memory(run_distributed, strategy):
    for forward, backward, peak in run_distributed(held_bytes, 2, strategy):
        # 40 tokens by heads: every rank's log-sum-exps are below the smallest size.
        assert forward == peak == 3 * 2 * ROW_BYTES
        assert backward == 0


def test_a_budget_goes_with_offload_only():
    config = ParallelConfig(policy="offload", host_memory_gib=0.5)
    for change in ({"policy": "full"}, {"host_memory_gib": 0.0}):
        with pytest.raises(ValueError, match="host_memory_gib must be positive and goes with policy 'offload' or 'auto'"):
            replace(config, **change)
