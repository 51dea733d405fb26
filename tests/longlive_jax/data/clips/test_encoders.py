"""Real encoders: clips of a store equal those that training would encode online."""

import json
import shutil

import numpy as np
import pytest

from longlive_jax.data.clips.batches import collate
from longlive_jax.data.clips.clip_plan import JoinSpec, plan_clip
from longlive_jax.data.clips.dataset import find_samples
from longlive_jax.data.clips.encode_spec import EncodeSpec
from longlive_jax.data.clips.encoders import check_encoded_by, checkpoint_encoders, encode_video
from longlive_jax.data.clips.encoding import encode_dataset
from longlive_jax.data.clips.latents import clip_latents
from longlive_jax.data.clips.loader import ClipFeed, FeedSpec
from longlive_jax.data.clips.source import VideoClips, read_clip, shot_lengths
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
    float32 = spec(dtype="float32")
    encoders = checkpoint_encoders(checkpoint, float32, dtype="float32")
    encode_dataset(find_samples(root), out, spec=float32, encoders=encoders)
    return EncodedClips(out)


@pytest.mark.parametrize("index", [0, 1])
def test_stored_clips_equal_clips_encoded_online(checkpoint, root, stored, index):
    vae, umt5 = (load_model(checkpoint, name) for name in ("vae", "umt5"))
    tokenizer = Tokenizer(checkpoint / TOKENIZER)
    sample = find_samples(root)[index]
    clip = plan_clip(shot_lengths(sample), JOIN)
    video = read_clip(sample, clip, (64, 32))
    captions = [shot.caption for shot in sample.shots]

    def encode_prompt(prompt):
        return np.asarray(encode_prompts(umt5, tokenizer, [prompt], length=48)[0])

    latents = encode_video(vae, video, chunk_frames=2)
    expected = clip_latents(clip, captions, latents, encode_prompt)
    for name, array in vars(stored[index]).items():
        assert array.dtype == vars(expected)[name].dtype
        np.testing.assert_array_equal(array, vars(expected)[name])


def test_training_reads_the_same_samples_from_videos_and_from_the_store(checkpoint, root, stored):
    """Both feeds have the same order, and encoding the videos gives the stored latents."""
    vae = load_model(checkpoint, "vae")
    feed_spec = FeedSpec(batch=2)
    videos = VideoClips(find_samples(root), JOIN, (64, 32), anywhere=False)
    with ClipFeed(videos, feed_spec) as video_feed, ClipFeed(stored, feed_spec) as feed:
        for _ in range(3):
            raw, rows = next(video_feed), next(feed)
            for i, video in enumerate(raw["video"]):
                latents = encode_video(vae, video, chunk_frames=2)
                np.testing.assert_array_equal(rows["latents"][i], latents)
            for name in ("mask", "cut", "shot"):
                np.testing.assert_array_equal(rows[name], raw[name])
            batch, text = collate(rows, stored.empty_text_features)
            assert batch["target"].shape == (2, 6, 4, 2, Z_DIM)
            assert text.shape == (2, 3, 48, TEXT_DIM)


def test_half_precision_storage(checkpoint, root, stored, tmp_path):
    half = spec(dtype="float16", text_dtype="bfloat16")
    encoders = checkpoint_encoders(checkpoint, half, dtype="float32")
    encode_dataset(find_samples(root), tmp_path / "out", spec=half, encoders=encoders)
    clip = EncodedClips(tmp_path / "out")[0]
    np.testing.assert_array_equal(clip.latents, stored[0].latents.astype(np.float16))
    np.testing.assert_array_equal(
        clip.text_features, stored[0].text_features.astype(clip.text_features.dtype)
    )
    assert clip.text_features.dtype.name == "bfloat16"


def test_latents_of_other_models_are_rejected(checkpoint, stored, tmp_path):
    check_encoded_by(stored, checkpoint)
    check_encoded_by(stored, shutil.copytree(checkpoint, tmp_path / "same"))
    settings = tmp_path / "same" / "longlive.json"
    other = json.loads(settings.read_text())
    other["arrays"]["vae"]["quant_conv.kernel"] += "0"  # other parameters have other fingerprints
    settings.write_text(json.dumps(other))
    with pytest.raises(UserError, match="encoded by another vae"):
        check_encoded_by(stored, tmp_path / "same")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (64, 40)}, "must be divisible by 32, got 64x40 .* nearest below: 64x32"),
        ({"join": JoinSpec(temporal_stride=8)}, "temporal_stride of the VAE must be 8, .* got 4"),
    ],
)
def test_settings_that_do_not_match_the_vae(checkpoint, changes, message):
    with pytest.raises(UserError, match=message):
        checkpoint_encoders(checkpoint, spec(**changes), dtype="float32")


def test_truncated_prompt_is_logged(checkpoint, caplog):
    short = spec(text_len=3)
    encode = checkpoint_encoders(checkpoint, short, dtype="float32").load_text_encoder()
    assert encode("a red circle on a white background moves left").shape == (3, TEXT_DIM)
    assert encode("").shape == (1, TEXT_DIM)
    assert any("the text encoder reads 3" in r.getMessage() for r in caplog.records)
