"""models/autoencoders.py: one interface over raw pixels, the VQ-VAE and diffusers' VAE, through their real loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longreel.models.autoencoders import AutoencoderConfig, build_autoencoder

NAMES = ("raw", "vqvae", "sd-vae")
FACTORS = {"raw": (1, 1, 3), "vqvae": (2, 4, 4), "sd-vae": (1, 4, 4)}


@pytest.fixture
def build(tiny_model: Callable[[str], Path]) -> Callable[..., object]:
    def make(name: str, **options: object) -> object:
        path = None if name == "raw" else str(tiny_model(name))
        return build_autoencoder(AutoencoderConfig(autoencoder=name, autoencoder_path=path, **options))

    return make


def video(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
def test_shapes_follow_the_stated_factors(build, name):
    model = build(name)
    assert (model.time_factor, model.space_factor, model.channels) == FACTORS[name]
    clip = video(2, 4, 16, 24)
    latents = model.encode(clip)
    assert latents.shape == (
        2,
        4 // model.time_factor,
        16 // model.space_factor,
        24 // model.space_factor,
        model.channels,
    )
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    decoded = model.decode(latents)
    assert decoded.shape == clip.shape
    assert decoded.dtype == torch.float32
    assert latents.std() > 0.01
    assert decoded.std() > 0.001
    assert torch.equal(latents, model.encode(clip))


@pytest.mark.parametrize("name", ["vqvae", "sd-vae"])
def test_frame_batch_does_not_change_the_result(build, name):
    clip = video(1, 12, 16, 16)
    latents = build(name, frame_batch=12).encode(clip)
    decoded = build(name, frame_batch=12).decode(latents)
    for frames in (1, 2, 5):
        model = build(name, frame_batch=frames)
        torch.testing.assert_close(model.encode(clip), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.decode(latents), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_a_batch_do_not_mix(build, name):
    model = build(name)
    both = model.encode(torch.cat([video(1, 4, 16, 16), video(1, 4, 16, 16, seed=2)]))
    torch.testing.assert_close(both[1:], model.encode(video(1, 4, 16, 16, seed=2)), rtol=0, atol=1e-5)


def test_sd_vae_is_diffusers_with_scale_and_shift(build, tiny_model):
    from diffusers import AutoencoderKL

    model, theirs = build("sd-vae"), AutoencoderKL.from_pretrained(tiny_model("sd-vae"))
    clip = video(1, 3, 16, 16)
    frames = clip[0].permute(0, 3, 1, 2)
    with torch.no_grad():
        z = (theirs.encode(frames).latent_dist.mean - 0.25) * 0.5
        pictures = theirs.decode(z / 0.5 + 0.25).sample
    latents = model.encode(clip)
    torch.testing.assert_close(latents[0], z.permute(0, 2, 3, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latents)[0], pictures.permute(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_sd_vae_is_found_in_a_pipeline_folder(tiny_model, tmp_path):
    (tmp_path / "vae").symlink_to(tiny_model("sd-vae"))
    config = AutoencoderConfig(autoencoder="sd-vae", autoencoder_path=str(tmp_path))
    assert build_autoencoder(config).space_factor == 4


def test_half_precision_weights_stay_near(build):
    clip = video(1, 4, 16, 16)
    whole, half = build("sd-vae").encode(clip), build("sd-vae", autoencoder_dtype="bf16").encode(clip)
    assert half.dtype == torch.float32
    assert 0 < (whole - half).abs().max() < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"autoencoder": "jpeg"}, "autoencoder must be one of raw, vqvae, sd-vae; got 'jpeg'"),
        ({"autoencoder_path": "x"}, "'raw' takes no autoencoder_path"),
        ({"autoencoder": "vqvae"}, "'vqvae' needs autoencoder_path: the folder of its weights$"),
        ({"autoencoder": "sd-vae"}, "needs autoencoder_path: the folder of its weights or a hub name"),
        ({"frame_batch": 0}, "frame_batch must be at least 1"),
        ({"autoencoder_dtype": "fp8"}, "autoencoder_dtype must be one of fp32, fp16, bf16"),
    ],
)
def test_configuration_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**fields)


@pytest.mark.parametrize("name", NAMES)
def test_bad_shapes_are_named(build, name):
    model = build(name)
    with pytest.raises(ValueError, match=r"video must be \[B, T, H, W, 3\]"):
        model.encode(torch.zeros(4, 16, 16, 3))
    with pytest.raises(ValueError, match="latents must be"):
        model.decode(torch.zeros(1, 2, 4, 4, 7))
    if model.space_factor > 1:
        with pytest.raises(ValueError, match="has W = 18, not a multiple of the autoencoder's factor 4"):
            model.encode(torch.zeros(1, 4, 16, 18, 3))


@pytest.mark.parametrize("damage", ["missing", "no-weights", "truncated", "other", "lacking"])
@pytest.mark.parametrize("name", ["vqvae", "sd-vae"])
def test_damaged_folder_is_one_line(tiny_model, tmp_path, name, damage):
    folder = tmp_path / "model"
    if damage != "missing":
        folder.mkdir()
        for path in tiny_model(name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    (weights,) = folder.glob("*.safetensors") if damage != "missing" else (None,)
    if damage == "no-weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "other":
        next(folder.glob("*.json")).write_text(json.dumps({"hidden": 4, "what": 1}))
    elif damage == "lacking":
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        state.pop(sorted(state)[0])
        save_file(state, weights)
    with pytest.raises(ValueError, match=str(folder)) as raised:
        build_autoencoder(AutoencoderConfig(autoencoder=name, autoencoder_path=str(folder)))
    assert "\n" not in str(raised.value)
