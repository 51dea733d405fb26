"""Stand-ins for encoders that count, and a dataset for them."""

import collections

import numpy as np

from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.dataset import find_samples
from longlive_jax.data.clips.encoding import Encoders, EncodeSpec, encode_dataset
from tests.longlive_jax.data.clips.videos import cut_short, numbers, write_caption, write_sample

SPEC = EncodeSpec(
    join=JoinSpec(chunks=2, chunk_frames=2),
    size=(32, 64),
    windows=0,
    text_len=6,
    dtype="float32",
    shard=3,
)


class Counting:
    """Encoders that remember what they were asked for, and stop when told to."""

    def __init__(self, stop_after=None, error=KeyboardInterrupt):
        self.videos, self.prompts, self.loaded = [], [], collections.Counter()
        self.stop_after, self.error = stop_after, error

    def encoders(self, **identity):
        return Encoders(
            text=self.load_text,
            video=self.load_video,
            latent_bytes=4 * 2 * 4 * 3,
            identity={"vae": "v", "umt5": "u", **identity},
        )

    def load_text(self):
        self.loaded["text"] += 1
        return self.text

    def load_video(self):
        self.loaded["video"] += 1
        return self.video

    def text(self, prompt):
        self.prompts.append(prompt)
        return np.full((1 + len(prompt) % 5, 4), len(prompt), np.float32)

    def video(self, frames):
        if len(self.videos) == self.stop_after:
            raise self.error
        self.videos.append(tuple(numbers(frames)))
        latents = frames[::4].reshape(-1, 2, 16, 4, 16, 3).mean(axis=(2, 4))
        return latents.astype(np.float32)


def write_dataset(root):
    """Seven clips of 13 frames: one of them cut short, two with one caption; a sample too short."""
    write_sample(root, "a", 30)
    write_sample(root, "b", 7, 21)
    write_sample(root, "c", 13, options={"movflags": "faststart"})
    write_sample(root, "d", 27)
    write_sample(root, "e", 12)
    write_caption(root, "d", 0, "a shot 0")
    cut_short(root / "video" / "c" / "0.mp4", 0.7)
    return root


def run(root, out, counting, spec=SPEC, **identity):
    samples = find_samples(root)
    return encode_dataset(samples, out, spec=spec, encoders=counting.encoders(**identity))


def texts_of(root, out, counting, spec=SPEC):
    samples = find_samples(root)
    encoders = counting.encoders()
    return encode_dataset(samples, out, spec=spec, encoders=encoders, texts_only=True)
