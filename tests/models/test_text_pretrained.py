"""models/text_pretrained.py: T5 and CLIP through transformers' loading, on tiny random weights."""

from __future__ import annotations

import pytest
import torch

from longreel.models.text import TextEncoderConfig, build_text_encoder
from longreel.models.text_pretrained import PretrainedTextEncoder

CAPTIONS = ["a red square moves to the right", "a blue circle", "", "a red square moves to the right"]


@pytest.fixture
def build(tiny_model):
    def make(kind: str, **options: object):
        return PretrainedTextEncoder(kind, str(tiny_model(kind)), **options)

    return make


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_shape_and_the_same_features_alone_or_in_a_batch(build, kind):
    encoder = build(kind, max_tokens=12, batch_size=2)
    assert (encoder.text_dim, encoder.max_tokens) == (16, 12)
    features = encoder.encode(CAPTIONS)
    assert features.shape == (4, 12, 16)
    assert features.dtype == torch.float32
    assert torch.equal(features[0], features[3])
    assert not torch.allclose(features[0], features[1])
    torch.testing.assert_close(build(kind, max_tokens=12).encode([CAPTIONS[1]])[0], features[1], rtol=0, atol=1e-5)
    assert encoder.encode([]).shape == (0, 12, 16)


def test_t5_is_transformers_with_zeros_at_pads(build, tiny_model):
    from transformers import AutoTokenizer, T5EncoderModel

    model, tokenizer = (cls.from_pretrained(tiny_model("t5")) for cls in (T5EncoderModel, AutoTokenizer))
    ids = tokenizer([CAPTIONS[1]], return_tensors="pt").input_ids
    with torch.no_grad():
        alone = model.eval()(input_ids=ids).last_hidden_state[0]
    features = build("t5", max_tokens=30).encode([CAPTIONS[1]])[0]
    torch.testing.assert_close(features[: len(alone)], alone, rtol=0, atol=1e-5)
    assert len(alone) < 30
    assert not features[len(alone) :].any()


def test_clip_is_transformers_without_a_mask(build, tiny_model):
    from transformers import AutoTokenizer, CLIPTextModel

    model, tokenizer = (cls.from_pretrained(tiny_model("clip")) for cls in (CLIPTextModel, AutoTokenizer))
    ids = tokenizer(["a dog"], return_tensors="pt", padding="max_length", max_length=20).input_ids
    with torch.no_grad():
        theirs = model.eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(build("clip").encode(["a dog"]), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_captions_seen_before_are_not_computed_again(build, kind):
    encoder = build(kind, max_tokens=8)
    runs: list[int] = []
    encoder._model.register_forward_hook(lambda *_: runs.append(1))
    first = encoder.encode(CAPTIONS)
    assert len(runs) == 1
    assert torch.equal(encoder.encode(CAPTIONS[::-1]), first.flip(0))
    assert len(runs) == 1
    encoder.cache_bytes = 4 * 8 * 16
    encoder.encode(["another"])
    encoder.encode([CAPTIONS[0]])
    assert len(runs) == 3
    assert len(encoder._cache) == 1


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_long_and_broken_captions_are_cut_not_refused(build, kind):
    encoder = build(kind, max_tokens=10)
    features = encoder.encode(["a red square " * 80_000, "\ud800 broken", "x" * 1_000_000])
    assert features.shape == (3, 10, 16)
    assert features.isfinite().all()
    torch.testing.assert_close(
        features[:1], build(kind, max_tokens=10).encode(["a red square " * 20]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_pipeline_folder_is_understood(tiny_model, tmp_path, kind):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for path in tiny_model(kind).iterdir():
        part = "text_encoder" if path.name in ("config.json", "model.safetensors") else "tokenizer"
        (tmp_path / part / path.name).symlink_to(path)
    # transformers asks for the kind of model where the tokenizer is.
    encoder = build_text_encoder(TextEncoderConfig(text_encoder=kind, text_path=str(tmp_path), max_text_tokens=8))
    plain = build_text_encoder(TextEncoderConfig(text_encoder=kind, text_path=str(tiny_model(kind)), max_text_tokens=8))
    assert torch.equal(encoder.encode(["a"]), plain.encode(["a"]))


def test_other_kinds_and_incomplete_weights_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"text_path: .* holds a model of type 'clip_text_model', not t5"):
        PretrainedTextEncoder("t5", str(tiny_model("clip")))
    with pytest.raises(ValueError, match="text_path: '/nowhere' is neither a folder nor a hub name"):
        PretrainedTextEncoder("t5", "/nowhere")
    from safetensors.torch import load_file, save_file

    for path in tiny_model("clip").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("fc1.weight"))
    save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a CLIPTextModel, the first: .*fc1\.weight"):
        PretrainedTextEncoder("clip", str(tmp_path))
    with pytest.raises(ValueError, match="max_tokens must be at least 2 and at most 20"):
        PretrainedTextEncoder("clip", str(tiny_model("clip")), max_tokens=21)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_encoder": "bert"}, "text_encoder must be one of bytes, t5, clip; got 'bert'"),
        ({"text_encoder": "t5"}, "'t5' needs text_path"),
        ({"text_path": "x"}, "'bytes' is built in and takes no text_path"),
        ({"text_batch": 0}, "text_batch must be at least 1"),
        ({"text_dtype": "int8"}, "text_dtype must be one of"),
    ],
)
def test_configuration_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        TextEncoderConfig(**fields)
