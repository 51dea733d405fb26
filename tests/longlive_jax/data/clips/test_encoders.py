"""Real encoders: what is read back equals what training would have encoded on the fly."""

import json
import shutil

import numpy as np
import pytest

from longlive_jax.data.clips.batches import collate
from longlive_jax.data.clips.clip_plan import JoinSpec, plan
from longlive_jax.data.clips.dataset import find_samples
from longlive_jax.data.clips.encoders import check_made_by, checkpoint_encoders, encode_video
from longlive_jax.data.clips.encoding import EncodeSpec, encode_dataset
from longlive_jax.data.clips.latents import clip_latents
from longlive_jax.data.clips.loader import ClipFeed, FeedSpec
from longlive_jax.data.clips.source import VideoClips, lengths_of, read_clip
from longlive_jax.data.clips.store import EncodedClips
from longlive_jax.io.checkpoint import TOKENIZER
from longlive_jax.io.models import load_model
from longlive_jax.models.umt5 import Tokenizer, encode_prompts
from longlive_jax.spec import UserError
from tests.longlive_jax.data.clips.models import TEXT_DIM, Z_DIM, write_encoders
from tests.longlive_jax.data.clips.videos import write_sample

JOIN = JoinSpec(chunks=3, chunk_frames=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    write_sample(root, "cat", 14, 12, fps=25)
    return write_sample(root, "dog", 22)


def spec(**changes):
    return EncodeSpec(**{"join": JOIN, "size": (64, 32), "text_len": 48} | changes)


@pytest.fixture(scope="module")
def stored(checkpoint, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "out"
    made = spec(dtype="float32")
    encoders = checkpoint_encoders(checkpoint, made, dtype="float32")
    encode_dataset(find_samples(root), out, spec=made, encoders=encoders)
    return EncodedClips(out)


@pytest.mark.parametrize("index", [0, 1])
def test_read_back_equals_encoded_on_the_fly(checkpoint, root, stored, index):
    vae, umt5 = (load_model(checkpoint, name) for name in ("vae", "umt5"))
    tokenizer = Tokenizer(checkpoint / TOKENIZER)
    sample = find_samples(root)[index]
    clip = plan(lengths_of(sample), JOIN)
    video = read_clip(sample, clip, (64, 32))
    captions = [shot.caption for shot in sample.shots]

    def text(prompt):
        return np.asarray(encode_prompts(umt5, tokenizer, [prompt], length=48)[0])

    wanted = clip_latents(clip, captions, encode_video(vae, video, chunk_frames=2), text)
    for name, array in vars(stored[index]).items():
        assert array.dtype == vars(wanted)[name].dtype
        np.testing.assert_array_equal(array, vars(wanted)[name])


def test_training_gets_the_same_samples_from_videos_and_from_the_store(checkpoint, root, stored):
    """Same feed, same order: the one encodes what the other has encoded."""
    vae = load_model(checkpoint, "vae")
    feed_spec = FeedSpec(batch=2)
    videos = VideoClips(find_samples(root), JOIN, (64, 32), anywhere=False)
    with ClipFeed(videos, feed_spec) as live, ClipFeed(stored, feed_spec) as read:
        for _ in range(3):
            raw, rows = next(live), next(read)
            for i, video in enumerate(raw["video"]):
                latents = encode_video(vae, video, chunk_frames=2)
                np.testing.assert_array_equal(rows["latents"][i], latents)
            for name in ("mask", "cut", "shot"):
                np.testing.assert_array_equal(rows[name], raw[name])
            batch, text = collate(rows, stored.empty)
            assert batch["target"].shape == (2, 6, 4, 2, Z_DIM)
            assert text.shape == (2, 3, 48, TEXT_DIM)


def test_half_precision_at_rest(checkpoint, root, stored, tmp_path):
    half = spec(dtype="float16", text_dtype="bfloat16")
    encoders = checkpoint_encoders(checkpoint, half, dtype="float32")
    encode_dataset(find_samples(root), tmp_path / "out", spec=half, encoders=encoders)
    clip = EncodedClips(tmp_path / "out")[0]
    np.testing.assert_array_equal(clip.latents, stored[0].latents.astype(np.float16))
    np.testing.assert_array_equal(clip.text, stored[0].text.astype(clip.text.dtype))
    assert clip.text.dtype.name == "bfloat16"


def test_latents_of_other_models_are_refused(checkpoint, stored, tmp_path):
    check_made_by(stored, checkpoint)
    check_made_by(stored, shutil.copytree(checkpoint, tmp_path / "same"))
    settings = tmp_path / "same" / "longlive.json"
    other = json.loads(settings.read_text())
    other["arrays"]["vae"]["quant_conv.kernel"] += "0"  # other parameters have other fingerprints
    settings.write_text(json.dumps(other))
    with pytest.raises(UserError, match="encoded by another vae"):
        check_made_by(stored, tmp_path / "same")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (64, 40)}, "not divisible by 32; nearest below: 64x32"),
        ({"join": JoinSpec(temporal_stride=8)}, "4 frames one latent"),
    ],
)
def test_settings_that_do_not_fit_the_vae(checkpoint, changes, message):
    with pytest.raises(UserError, match=message):
        checkpoint_encoders(checkpoint, spec(**changes), dtype="float32")


def test_a_prompt_too_long_is_said(checkpoint, caplog):
    short = spec(text_len=3)
    text = checkpoint_encoders(checkpoint, short, dtype="float32").text()
    assert text("a red circle on a white background moves left").shape == (3, TEXT_DIM) and text(
        ""
    ).shape == (1, TEXT_DIM)
    assert any("the text encoder reads 3" in r.getMessage() for r in caplog.records)
