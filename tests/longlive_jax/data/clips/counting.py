"""Stand-ins for encoders that record their calls, and a dataset for them."""

import collections

import numpy as np

from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.dataset import find_samples
from longlive_jax.data.clips.encode_spec import Encoders, EncodeSpec
from longlive_jax.data.clips.encoding import encode_dataset, encode_scripts
from longlive_jax.data.clips.scripts import sample_scripts
from tests.longlive_jax.data.clips.videos import cut_short, numbers, write_caption, write_sample

SPEC = EncodeSpec(
    join=JoinSpec(chunks=2, chunk_frames=2),
    size=(32, 64),
    windows=0,
    text_len=6,
    dtype="float32",
    shard=3,
)


class CountingEncoders:
    """Encoders that record what they encode; `error` is raised after `stop_after` videos.

    Attributes:
      videos: frame numbers of each encoded video.
      prompts: encoded prompts.
      loaded: number of times that each model was loaded.
    """

    def __init__(self, stop_after=None, error=KeyboardInterrupt):
        self.videos, self.prompts, self.loaded = [], [], collections.Counter()
        self.stop_after, self.error = stop_after, error

    def encoders(self, **identity):
        return Encoders(
            load_text_encoder=self.load_text_encoder,
            load_vae=self.load_vae,
            latent_bytes=4 * 2 * 4 * 3,
            identity={"vae": "v", "umt5": "u", **identity},
        )

    def load_text_encoder(self):
        self.loaded["text"] += 1
        return self.encode_text

    def load_vae(self):
        self.loaded["video"] += 1
        return self.encode_video

    def encode_text(self, prompt):
        self.prompts.append(prompt)
        return np.full((1 + len(prompt) % 5, 4), len(prompt), np.float32)

    def encode_video(self, frames):
        if len(self.videos) == self.stop_after:
            raise self.error
        self.videos.append(tuple(numbers(frames)))
        latents = frames[::4].reshape(-1, 2, 16, 4, 16, 3).mean(axis=(2, 4))
        return latents.astype(np.float32)


def write_dataset(root):
    """Seven clips of 13 frames, one of them in a truncated file, and a sample that is too short.

    Two clips have the same caption.
    """
    write_sample(root, "a", 30)
    write_sample(root, "b", 7, 21)
    write_sample(root, "c", 13, options={"movflags": "faststart"})
    write_sample(root, "d", 27)
    write_sample(root, "e", 12)
    write_caption(root, "d", 0, "a shot 0")
    cut_short(root / "video" / "c" / "0.mp4", 0.7)
    return root


def encode(root, out, encoders, spec=SPEC, **identity):
    """Encodes the dataset in `root`; `identity` replaces fingerprints of the encoders."""
    samples = find_samples(root)
    return encode_dataset(samples, out, spec=spec, encoders=encoders.encoders(**identity))


def encode_texts(root, out, encoders, spec=SPEC, **options):
    """Encodes the captions of the dataset in `root` as scripts, and no clips."""
    scripts = sample_scripts(find_samples(root))
    return encode_scripts(scripts, out, spec=spec, encoders=encoders.encoders(), **options)
