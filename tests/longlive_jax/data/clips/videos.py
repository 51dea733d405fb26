"""Writes small video files whose frames encode their index, and other shared helpers."""

import dataclasses
import json
from fractions import Fraction

import av
import numpy as np

from longlive_jax.data.clips.dataset import Unusable

BITS = 8


def numbered(i, height=32, width=64):
    """A frame of eight black or white columns, which encode index `i` in binary."""
    bits = np.array([i >> b & 1 for b in range(BITS)], np.uint8) * 255
    row = np.repeat(bits, -(-width // BITS))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def numbers(video):
    """The indices of `numbered` frames, also after scaling."""
    columns = np.array_split(np.arange(video.shape[2]), BITS)
    bits = [video[:, :, c[len(c) // 2], 0].mean(axis=1) > 127 for c in columns]
    return sum(bit.astype(int) << b for b, bit in enumerate(bits)).tolist()


def write_video(path, frames, fps=24, *, size=(32, 64), codec="libx264", **more):
    """Writes a video of `frames` numbered frames.

    `more` may have:
      stamps: the time of each frame in seconds.
      audio: whether to add an audio stream.
      rotation: display rotation in degrees.
      stretch: sample aspect ratio.
      gop: frames per group of pictures.
      ahead: consecutive B-frames.
      options: options of the container.
    """
    # 1. Configure the streams.
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options=more.get("options", {})) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"  # takes odd sizes as well
        stream.codec_context.gop_size = more.get("gop", 12)
        if codec == "libx264":
            stream.options = {"crf": "18", "preset": "ultrafast", "bf": str(more.get("ahead", 2))}
        if "stretch" in more:
            stream.codec_context.sample_aspect_ratio = Fraction(more["stretch"])
        if "rotation" in more:
            stream.set_display_rotation(more["rotation"])
        sound = file.add_stream("aac", rate=44100) if more.get("audio") else None
        tick = Fraction(1, 600) if "stamps" in more else 1 / rate
        stream.codec_context.time_base = tick
        # 2. Encode.
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i, *size), format="rgb24")
            frame.pts = round(more["stamps"][i] / tick) if "stamps" in more else i
            frame.time_base = tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            write_silence(file, sound, frames / float(rate) + 1.0)
    return path


def write_silence(file, stream, seconds):
    """Writes an audio stream of silence."""
    for at in range(0, int(44100 * seconds), 1024):
        block = np.zeros((2, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 44100, at, Fraction(1, 44100)
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def cut_short(path, fraction=0.6):
    """Truncates a file to this fraction of its bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    return path


def write_caption(root, sample, shot, text):
    path = root / "caption" / sample / f"{shot}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"caption": text}))
    return path


def write_sample(root, name, *lengths, fps=24, **more):
    """Writes a sample in the folder layout: shots of these lengths, captions "<name> shot <i>"."""
    for i, length in enumerate(lengths):
        write_video(root / "video" / name / f"{i}.mp4", length, fps, **more)
        write_caption(root, name, i, f"{name} shot {i}")
    return root


@dataclasses.dataclass(frozen=True)
class ToySource:
    """A source of `count` rows, of which those in `bad` are unusable."""

    count: int
    bad: tuple[int, ...] = ()

    def __len__(self):
        return self.count

    def name(self, index):
        return f"toy {index}"

    def read(self, index, rng):
        if index in self.bad:
            raise Unusable("is bad")
        return {"index": np.array(index), "draw": rng.random(2), "text": np.array("x" * index)}
