"""models/vqvae.py: causal in time, exact in pieces, codes that decode to themselves, and it learns."""

from __future__ import annotations

import pytest
import torch

from longreel.models.autoencoders import psnr
from longreel.models.vqvae import VQVAE, VQVAEConfig, load_vqvae, save_vqvae

SMALL = {"hidden": 8, "channels": 4, "codebooks": 2, "codebook_size": 16}


def video(frames: int = 8, size: int = 16) -> torch.Tensor:
    return torch.rand(1, frames, size, size, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1


def trained(**sizes: int) -> VQVAE:
    """A model whose codebooks hold codes of the video above, and whose last convolutions are not zero any more."""
    model = VQVAE(VQVAEConfig(**(SMALL | sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        for _ in range(3):
            _, _, quantised = model(video())
    model.fit_latent_scale(quantised)
    return model.eval()


@pytest.mark.parametrize(("time", "space"), [(1, 2), (1, 8), (2, 4), (4, 4), (4, 2)])
def test_factors_are_those_of_the_configuration(time, space):
    model = trained(time_factor=time, space_factor=space)
    latents = model.encode(video())
    assert latents.shape == (1, 8 // time, 16 // space, 16 // space, 4)
    assert model.decode(latents).shape == (1, 8, 16, 16, 3)


def test_a_latent_frame_sees_no_later_frame():
    model = trained()
    with torch.no_grad():
        whole = model(video())[0]
        changed = video()
        changed[:, 4:] = -changed[:, 4:]
        other = model(changed)[0]
    assert torch.equal(whole[:, :4], other[:, :4])
    assert not torch.equal(whole[:, 4:], other[:, 4:])


@pytest.mark.parametrize("frames", [2, 4])
def test_pieces_carry_what_was_seen(frames):
    model = trained()
    model.frame_batch = 8
    whole = model.encode(video())
    model.frame_batch = frames
    torch.testing.assert_close(model.encode(video()), whole, rtol=0, atol=1e-6)
    alone = torch.cat([model.encode(piece) for piece in video().split(frames, dim=1)], dim=1)
    assert (alone - whole).abs().max() > 1e-3


def test_latents_decode_to_the_codes_they_are_and_small_errors_vanish():
    model = trained()
    latents = model.encode(video())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert torch.equal(model.decode(latents), model.decode(latents + noise))
    codes = latents.unflatten(-1, (2, 2)).flatten(0, -3)
    for group in range(2):
        assert 1 < len(torch.unique(codes[:, group], dim=0)) <= 16


def test_latents_have_unit_scale():
    model = trained()
    latents = model.encode(video()).flatten(0, -2)
    torch.testing.assert_close(latents.mean(0), torch.zeros(4), atol=0.3, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(4), atol=0.3, rtol=0)


def test_training_starts_above_the_mean_colour_of_patches():
    model = VQVAE(VQVAEConfig(**SMALL))
    model.quantizer = Exact()
    patches = video().reshape(1, 4, 2, 4, 4, 4, 4, 3)
    mean = patches.mean(dim=(2, 4, 6), keepdim=True).expand_as(patches).reshape(1, 8, 16, 16, 3)
    with torch.no_grad():
        start = model(video())[0]
    # The fourth channel is the slope of the brightness along one axis.
    assert 0 < psnr(start, video()) - psnr(mean, video()) < 1
    ramp = torch.linspace(-0.5, 0.5, 16).view(1, 1, 1, 16, 1).expand(1, 8, 16, 16, 3)
    with torch.no_grad():
        assert psnr(model(ramp)[0], ramp) > 35


class Exact(torch.nn.Module):
    """A quantiser that changes nothing."""

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        return vectors, None, torch.zeros(1)


def test_large_pictures_are_quantised_in_pieces(monkeypatch):
    model = trained()
    whole = model.encode(video())
    monkeypatch.setattr("longreel.models.vqvae._ROWS", 7)
    assert torch.equal(model.encode(video()), whole)


def test_saved_model_gives_the_same_bits(tmp_path):
    model = trained()
    save_vqvae(model, tmp_path / "m")
    loaded = load_vqvae(tmp_path / "m").eval()
    assert torch.equal(model.encode(video()), loaded.encode(video()))
    assert torch.equal(model.decode(model.encode(video())), loaded.decode(loaded.encode(video())))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["vqvae.json", "vqvae.safetensors"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_factor": 3}, "time_factor must be a power of two and at least 1, got 3"),
        ({"space_factor": 1}, "space_factor must be a power of two and at least 2, got 1"),
        ({"channels": 6}, "channels 6 is not a multiple of codebooks 4"),
        ({"codebook_size": 1}, "codebook_size must be at least 2"),
    ],
)
def test_configuration_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**fields)
