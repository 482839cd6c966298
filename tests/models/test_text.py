"""models/text.py: the same numbers everywhere, and features that tell captions apart."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from longreel.models.text import BOS, EOS, PAD, ByteTextEncoder

DIGEST = (
    "import hashlib; from longreel.models.text import ByteTextEncoder; "
    "features = ByteTextEncoder(32, 20).encode(['a red bus', '']); "
    "print(hashlib.sha256(features.numpy().tobytes()).hexdigest())"
)


def test_features_are_the_same_in_another_process():
    digests = [
        subprocess.run(
            [sys.executable, "-c", prefix + DIGEST], capture_output=True, text=True, check=True
        ).stdout.strip()
        for prefix in ("", "import torch; torch.manual_seed(7); torch.rand(5); ")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 64


def test_features_have_the_recorded_values():
    # Recorded once: a change of table, seed or formula makes every trained checkpoint read other captions.
    features = ByteTextEncoder(8, 6).encode(["ab"])[0, 1]
    expected = torch.tensor([-0.159098, -0.0997, 0.615416, 0.173947, -0.118035, 0.881195, -0.601134, 0.742566])
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-6)


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ByteTextEncoder(8, 6).encode(["x"])
    assert torch.equal(torch.get_rng_state(), before)


def test_shape_dtype_and_symbols():
    encoder = ByteTextEncoder(16, 6)
    features = encoder.encode(["a", "", "abcdefgh"])
    assert features.shape == (3, 6, 16)
    assert features.dtype == torch.float32
    assert encoder.encode([]).shape == (0, 6, 16)
    assert encoder.tokenize("a") == [BOS, ord("a"), EOS, PAD, PAD, PAD]
    assert encoder.tokenize("") == [BOS, EOS, PAD, PAD, PAD, PAD]
    assert encoder.tokenize("abcdefgh") == [BOS, *b"abcd", EOS]


def test_long_captions_are_cut_between_characters():
    # 4 bytes of room; each of these characters takes 3.
    assert ByteTextEncoder(16, 6).tokenize("漢字") == [BOS, *"漢".encode(), EOS, PAD]
    assert ByteTextEncoder(16, 6).tokenize("é\ud800") == [BOS, *"é?".encode(), EOS, PAD]


def test_features_have_about_unit_variance():
    features = ByteTextEncoder(512, 64).encode(["A long caption about a train that crosses a bridge in the fog."])
    assert 0.8 < features.double().square().mean() < 1.2


@pytest.mark.parametrize(("one", "other"), [("ab", "ba"), ("a dog bites a man", "a man bites a dog"), ("a", "")])
def test_pooled_mean_tells_captions_apart(one, other):
    encoder = ByteTextEncoder(256, 64)
    pooled = encoder.encode([one, other]).mean(dim=1)
    assert (pooled[0] - pooled[1]).square().mean().sqrt() > 0.01


def test_first_half_says_the_byte_wherever_it_stands():
    encoder = ByteTextEncoder(64, 12)
    early, late = encoder.encode(["xxa", "xxxxa"]).double()
    pads = encoder.encode([""]).double()[0]
    # Taking away the pad at the same position takes away the sinusoid.
    difference = (early[3] - pads[3]) - (late[5] - pads[5])
    assert difference[:32].abs().max() < 1e-6
    assert difference[32:].norm() > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ByteTextEncoder(7, 6), "text_dim must be even"),
        (lambda: ByteTextEncoder(8, 2), "max_tokens must be at least 3"),
        (lambda: ByteTextEncoder(8, 6).encode("a caption"), "sequence of strings"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
