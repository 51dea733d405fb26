"""The judge accepts ground-truth videos, also blurred and noisy ones, and fails corrupted ones."""

import dataclasses
import re

import numpy as np
import pytest

from longlive_jax import small_world as sw
from longlive_jax.small_world import judge
from longlive_jax.small_world.metrics import summary

ATTRIBUTES = judge.ATTRIBUTES


def _rendered(specs):
    return [(sw.render(spec), spec.captions, sw.frame_bounds(spec)) for spec in specs]


def _specs(seed, videos, chunks=20, **options):
    rng = np.random.default_rng(seed)
    return [
        sw.sample_spec(rng, chunks=chunks, split=("train", "held_out")[k % 2], **options)
        for k in range(videos)
    ]


@pytest.fixture(scope="module")
def specs():
    return _specs(3, 4, chunks=16, shot_chunks=(3, 4))


@pytest.fixture(scope="module")
def clips(specs):
    return _rendered(specs)


def _judged(clips, change=lambda video, captions, bounds: (video, captions, bounds)):
    """Summary of the verdicts on clips, each altered by `change`."""
    return summary([judge.judge_video(*change(*clip)) for clip in clips])


def _rates(result, names):
    return {name: result[name]["rate"] for name in names}


def _blur(video, times):
    for _ in range(times):
        for axis in (1, 2):
            video = (np.roll(video, 1, axis) + 2 * video + np.roll(video, -1, axis)) / 4
    return video


def _noise(video, sigma, seed=0):
    rng = np.random.default_rng(seed)
    return video + sigma * rng.standard_normal(video.shape, dtype=np.float32)


RATES = (*ATTRIBUTES, "all_right", "identity_held", "cut_exact", "return_held")


def test_two_hundred_ground_truth_shots():
    clips = _rendered(_specs(11, 17, shot_chunks=(1, 2)))
    result = _judged(clips)
    assert result["shape"]["n"] >= 200 and result["cut_exact"]["n"] >= 150
    assert result["return_held"]["n"] >= 40
    assert min(_rates(result, RATES).values()) >= 0.99
    assert result["extra_cuts"] == 0 and abs(result["drift"]) < 0.002
    assert result["last_to_first"] >= 0.99


@pytest.mark.parametrize(
    "change",
    [
        lambda v: _noise(v, 0.05),
        lambda v: _blur(v, 4),
        lambda v: _noise(_blur(v, 4), 0.05),
    ],
    ids=["noise", "blur", "both"],
)
def test_blurred_and_noisy_ground_truth(clips, change):
    result = _judged(clips, lambda v, c, b: (change(v), c, b))
    assert min(_rates(result, RATES).values()) >= 0.98
    assert result["extra_cuts"] == 0


def test_shuffled_captions_fail(clips):
    result = _judged(clips, lambda v, c, b: (v, [*c[1:], c[0]], b))
    assert result["all_right"]["rate"] <= 0.05
    assert max(_rates(result, ATTRIBUTES).values()) < 0.8


def _replaced(specs, subject=None, **shot):
    """Videos with every shot altered, and the captions of the unaltered shots."""
    clips = []
    for spec in specs:
        altered = sw.VideoSpec(
            tuple(
                dataclasses.replace(
                    s,
                    subject=dataclasses.replace(
                        s.subject, **{k: f(s) for k, f in (subject or {}).items()}
                    ),
                    **{k: f(s) for k, f in shot.items()},
                )
                for s in spec.shots
            )
        )
        clips.append((sw.render(altered), spec.captions, sw.frame_bounds(spec)))
    return clips


def _next(table, word):
    names = list(table)
    return names[(names.index(word) + 1) % len(names)]


@pytest.mark.parametrize(
    ("attribute", "change"),
    [
        ("colour", {"subject": {"colour": lambda s: _next(sw.COLOURS, s.colour)}}),
        ("shape", {"subject": {"shape": lambda s: _next(sw.SHAPES, s.shape)}}),
        ("background", {"background": lambda s: _next(sw.BACKGROUNDS, s.background)}),
        ("motion", {"motion": lambda s: _next(sw.MOTIONS, s.motion)}),
    ],
)
def test_only_the_wrong_attribute_fails(specs, attribute, change):
    result = _judged(_replaced(specs[:3], **change))
    assert result[attribute]["rate"] == 0 and result["all_right"]["rate"] == 0
    assert min(_rates(result, set(ATTRIBUTES) - {attribute}).values()) == 1
    assert result["identity_held"]["rate"] == 1


def test_frozen_and_reversed_motion_fail(clips):
    moving = sum("still" not in text for _, captions, _ in clips for text in captions)
    for change in (
        lambda v, b: [np.repeat(v[i:i + 1], j - i, 0) for i, j in b],
        lambda v, b: [v[i:j][::-1] for i, j in b],
    ):  # fmt: skip
        result = _judged(clips, lambda v, c, b, f=change: (np.concatenate(f(v, b)), c, b))
        motion = result["motion"]
        assert motion["n"] - round(motion["rate"] * motion["n"]) == moving > 8
        assert result["shape"]["rate"] == 1


def test_wrong_speed_fails(specs):
    spec = next(s for s in specs if any(x.motion == "left" for x in s.shots))
    video, bounds = sw.render(spec), sw.frame_bounds(spec)
    k = next(i for i, x in enumerate(spec.shots) if x.motion == "left")
    i, j = bounds[k]
    fast = np.concatenate([video[:i], video[i:j:3], video[j:]])
    cut = i + len(range(i, j, 3))
    shifted = [(a if a <= i else a - (j - cut), b if b <= i else b - (j - cut)) for a, b in bounds]
    assert not judge.judge_video(fast, spec.captions, shifted).shots[k].correct["motion"]


@pytest.mark.parametrize("late", [-4, -1, 1, 4, 16])
def test_a_cut_on_the_wrong_frame_fails(clips, late):
    result = _judged(
        clips, lambda v, c, b: (v[np.clip(np.arange(len(v)) - late, 0, len(v) - 1)], c, b)
    )
    assert result["cut_exact"]["rate"] == 0
    assert result["cut_found"]["rate"] == 1


def test_missing_and_extra_cuts(specs):
    spec = dataclasses.replace(specs[0], shots=specs[0].shots[:2])
    (_, cut), (_, end) = sw.frame_bounds(spec)
    uncut = sw.VideoSpec((dataclasses.replace(spec.shots[0], chunks=spec.chunks),))
    verdict = judge.judge_video(sw.render(uncut), spec.captions, [(0, cut), (cut, end)])
    assert verdict.cuts[0].frame is None and not verdict.extra_cuts
    verdict = judge.judge_video(sw.render(spec), uncut.captions, [(0, end)])
    assert verdict.extra_cuts == (cut,)


@pytest.mark.parametrize("kind", ["normal", "uniform", "gray"])
def test_no_attribute_is_read_from_noise(clips, kind):
    rng = np.random.default_rng(0)
    draw = {
        "normal": lambda shape: np.clip(rng.normal(0, 0.5, shape), -1, 1),
        "uniform": lambda shape: rng.uniform(-1, 1, shape),
        "gray": np.zeros,
    }[kind]
    result = _judged(clips[:2], lambda v, c, b: (draw(v.shape).astype(np.float32), c, b))
    names = ("shape", "colour", "motion", "all_right", "identity_held", "cut_found", "return_held")
    assert max(_rates(result, names).values()) == 0
    if kind != "gray":
        assert result["background"]["rate"] == 0
    assert result["quarters"][0]["error"] > 0.1


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"marker": _next(sw.MARKERS, s.marker)},
        lambda s: {"radius": s.radius + (2.0 if s.radius < 15 else -2.0)},
        lambda s: {"colour": _next(sw.COLOURS, s.colour)},
        lambda s: {"shape": _next(sw.SHAPES, s.shape)},
    ],
    ids=["marker", "size", "colour", "shape"],
)
def test_an_identity_swap_within_a_shot_fails(specs, change):
    other = [
        {"subject": {k: lambda s, k=k: change(s.subject)[k] for k in change(spec.shots[0].subject)}}
        for spec in specs[:3]
    ]
    for spec, options in zip(specs[:3], other, strict=True):
        video, bounds = sw.render(spec), sw.frame_bounds(spec)
        swapped = _replaced([spec], **options)[0][0]
        for start, stop in bounds:
            middle = start + round(0.6 * (stop - start))
            video[middle:stop] = swapped[middle:stop]
        verdict = judge.judge_video(video, spec.captions, bounds)
        assert not any(shot.identity_held for shot in verdict.shots)
        assert all(shot.caption_correct for shot in verdict.shots)  # by a majority of frames


def test_a_return_with_another_identity_fails():
    a = sw.Subject("circle", "red", 14.0, "white")
    b = sw.Subject("square", "blue", 16.0, "black")
    for changes, marker, size in (({}, 1, 1), ({"marker": "cyan"}, 0, 1), ({"radius": 17.0}, 1, 0)):
        again = dataclasses.replace(a, **changes)
        spec = sw.VideoSpec(
            tuple(
                sw.ShotSpec(subject, "mint", motion, x, 30.0, 2)
                for subject, motion, x in ((a, "left", 10.0), (b, "up", 30.0), (again, "up", 50.0))
            )
        )
        (back,) = judge.judge_video(sw.render(spec), spec.captions, sw.frame_bounds(spec)).returns
        assert (back.first, back.again) == (0, 2)
        assert (back.same_marker, back.same_size, back.same_identity) == (
            marker,
            size,
            marker and size,
        )


def test_fading_and_blurring_increase_the_drift(clips):
    def fade(v, c, b):
        return v * np.linspace(1, 0.4, len(v), dtype=np.float32)[:, None, None, None], c, b

    def soften(v, c, b):
        third = len(v) // 3
        return np.concatenate([v[:third], _blur(v[third:-third], 6), _blur(v[-third:], 20)]), c, b

    assert abs(_judged(clips[:3])["drift"]) < 0.002
    faded, softened = _judged(clips[:3], fade), _judged(clips[:3], soften)
    assert faded["drift"] > 0.1 and softened["drift"] > 0.05
    assert softened["quarters"][0]["sharpness"] > 0.9 > 0.5 > softened["quarters"][3]["sharpness"]
    errors = [quarter["error"] for quarter in faded["quarters"]]
    assert errors == sorted(errors)


def test_quarters_locate_mistakes(clips):
    def break_end(v, c, b):
        part = len(v) * 3 // 4
        return np.concatenate([v[:part], np.zeros_like(v[part:])]), c, b

    result = _judged(clips[:3], break_end)
    rates = [quarter["all_right"]["rate"] for quarter in result["quarters"]]
    assert rates == [1, 1, 1, 0] and result["last_to_first"] == 0


def test_readings_are_precise(specs, clips):
    for spec, (video, _, bounds) in zip(specs[:2], clips[:2], strict=True):
        verdict = judge.judge_video(video, spec.captions, bounds)
        for shot, observed in zip(spec.shots, verdict.shots, strict=True):
            assert observed.marker == shot.subject.marker
            assert abs(observed.radius - shot.subject.radius) < 0.1
            expected = np.multiply(sw.SPEED, sw.MOTIONS[shot.motion])
            np.testing.assert_allclose(observed.velocity, expected, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, c, b: (v, c[:-1], b), "give one of each per shot"),
        (lambda v, c, b: (v[:-1], c, b), "do not tile"),
        (lambda v, c, b: (v, c, [(0, 5), *b[1:]]), "do not tile"),
        (lambda v, c, b: (v, [*c[:-1], "a dog runs"], b), "has 3 words"),
        (lambda v, c, b: (v[:, :-2], c, b), re.escape(f"[f, {sw.HEIGHT}, {sw.WIDTH}, 3]")),
        (lambda v, c, b: (v.astype(np.uint8), c, b), "must be floats in .*, got uint8"),
        (lambda v, c, b: (np.where(v >= v.max(), np.nan, v), c, b), "not finite"),
    ],
)
def test_invalid_input_is_rejected(clips, change, message):
    with pytest.raises(ValueError, match=message):
        judge.judge_video(*change(*clips[0]))


def test_single_frames_and_short_shots():
    spec = sw.sample_spec(np.random.default_rng(0), chunks=1)
    verdict = judge.judge_video(sw.render(spec)[:1], spec.captions, [(0, 1)])
    assert verdict.shots[0].correct["shape"] and not verdict.shots[0].correct["motion"]
