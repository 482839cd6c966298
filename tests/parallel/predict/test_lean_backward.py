"""What FastSeq's backward by chunks is worth under policies that save memory, by the cost model.

`pytest -m slow -s tests/parallel/predict/test_lean_backward.py` prints the table of docs/parallel.md.
"""

from __future__ import annotations

from unittest import mock

import pytest

from longreel.models.config import dit_xl_2
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict import predict
from longreel.parallel.strategies import fastseq_attention

GIB = 1 << 30


def predicted(seq_len: int, degree: int, limit: int) -> predict.Prediction:
    parallel = ParallelConfig(strategy="fastseq", sp_degree=degree, policy="keep_attention", precision="bf16")
    case = predict.PredictionCase(model=dit_xl_2(), parallel=parallel, num_gpus=8, target="H800", seq_len=seq_len)
    with mock.patch.multiple(fastseq_attention, LEAN_SUMS_BYTES=limit, LEAN_MIN_RANKS=2):
        predict.trace_shape.cache_clear()
        try:
            return predict.predict_step(case)
        finally:
            # Traces of this limit are nobody else's.
            predict.trace_shape.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degree", "seq_len"),
    [
        *((8, tokens) for tokens in (32768, 131072, 819200, 4000000)),
        *((2, tokens) for tokens in (32768, 131072, 819200)),
    ],
)
def test_chunks_hide_communication_for_the_memory_of_their_sums(degree, seq_len, capsys):
    at_once, by_chunks = (predicted(seq_len, degree, limit) for limit in (0, 1 << 60))
    with capsys.disabled():
        for name, found in (("at once", at_once), ("by chunks", by_chunks)):
            exposed, memory = found.breakdown["sequence"], found.memory_bytes / GIB
            print(f"\nP {degree} {seq_len:>9} {name:9} {found.step_s:9.3f} s {exposed:.4f} s exposed {memory:.1f} GiB")
    assert by_chunks.breakdown["sequence"] < at_once.breakdown["sequence"]
    # fp32 sums of dQ, dK and dV, and of dW of this rank's heads.
    sums = (seq_len + 1152) * 3 * 1152 // degree * 4
    assert at_once.memory_bytes < by_chunks.memory_bytes < at_once.memory_bytes + sums
