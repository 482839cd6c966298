"""bench/exchange_backends.py: what it prints, refuses and compares."""

from __future__ import annotations

import contextlib
import io
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longreel.bench import exchange_backends
from longreel.bench.exchange_backends import ExchangeConfig, Layer

TINY = {"rows": 4, "hidden": 32, "num_heads": 4, "precision": "fp32", "repeats": 2}


def printed(strategy: str) -> str:
    config = ExchangeConfig(strategy=strategy, exchanges=("p2p",), **TINY)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exchange_backends.work(config, torch.device("cpu"))
    return out.getvalue()


@pytest.mark.parametrize("strategy", ["fastseq", "ring"])
def test_the_first_rank_prints_a_line_per_back_end(run_distributed, strategy):
    first, second = run_distributed(printed, 2, strategy)
    assert second == ""
    assert first.startswith("p2p")
    assert first.count(" ms") == 2
    assert len(first.splitlines()) == 1


def refusal_of_a_difference() -> str:
    real, calls = Layer.step, []

    def wrong_the_second_time(layer: Layer) -> list[torch.Tensor]:
        calls.append(layer)
        tensors = real(layer)
        return [tensors[0] + 1e-6, *tensors[1:]] if len(calls) == 2 and dist.get_rank() == 1 else tensors

    config = ExchangeConfig(exchanges=("p2p", "symmetric"), **TINY)
    built = Layer(config, "p2p", torch.device("cpu"))
    with (
        mock.patch.object(Layer, "step", wrong_the_second_time),
        mock.patch.object(exchange_backends, "Layer", return_value=built),
        pytest.raises(RuntimeError, match="'symmetric' differs") as caught,
    ):
        exchange_backends.work(config, torch.device("cpu"))
    return str(caught.value)


def test_different_bits_on_one_rank_stop_all(run_distributed):
    for message in run_distributed(refusal_of_a_difference, 2):
        assert "nothing was timed" in message


def test_without_devices_symmetric_is_one_line_of_error(capsys):
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert exchange_backends.main(["--rows", "4", "--precision", "fp32"]) == 2
    assert "exchange 'symmetric' needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"hidden": 33}, "hidden 33 must be a multiple of num_heads 4"),
        ({"exchanges": ()}, "exchanges must name"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ExchangeConfig(**{**TINY, **wrong})
