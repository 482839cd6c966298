"""longreel.kernels.numerics: the metric that every parity test and the benchmark's gate rest on."""

from __future__ import annotations

import math

import pytest
import torch

from longreel.kernels.numerics import gradient_errors, relative_error


def test_relative_error_of_a_known_pair():
    assert relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.4 / 5, rel=1e-6)
    assert relative_error(torch.tensor([1.0]), torch.tensor([0.0]), floor=10.0) == pytest.approx(0.1)


def test_nan_and_a_zero_reference_never_pass():
    assert relative_error(torch.tensor([math.nan]), torch.tensor([1.0])) == math.inf
    assert relative_error(torch.tensor([math.inf]), torch.tensor([1.0])) == math.inf
    assert relative_error(torch.tensor([1e-30]), torch.tensor([0.0])) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


def test_a_vanishing_gradient_is_measured_against_its_modules_biases():
    reference = {"blocks.0.kv.bias": torch.tensor([2.0]), "blocks.0.k.bias": torch.tensor([0.0])}
    noise = reference | {"blocks.0.k.bias": torch.tensor([1e-12])}
    assert gradient_errors(noise, reference)["blocks.0.k.bias"] == pytest.approx(5e-13)
    # Another block's biases do not excuse it.
    other = {"blocks.1.kv.bias": torch.tensor([2.0]), "blocks.0.k.bias": torch.tensor([0.0])}
    assert gradient_errors(other | {"blocks.0.k.bias": torch.tensor([1e-12])}, other)["blocks.0.k.bias"] == math.inf


def test_missing_gradients_and_shapes_are_errors():
    with pytest.raises(ValueError, match=r"different parameters: .*'b'"):
        gradient_errors({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match="must have one shape"):
        relative_error(torch.ones(2), torch.ones(3))
