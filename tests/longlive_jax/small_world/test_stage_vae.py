"""The stage `vae`: phases of images and clips, refused settings, and export."""

import dataclasses

import jax
import numpy as np
import pytest

from longlive_jax.io.checkpoint import load_component
from longlive_jax.models.vae import VAEConfig
from longlive_jax.parallel.mesh import MeshSpec
from longlive_jax.small_world import world
from longlive_jax.small_world.stage_vae import Phase, VAEStage
from longlive_jax.training.loop import LoopSpec
from tests.longlive_jax.training.toy_task import one_device

TINY = VAEConfig(
    encoder_dim=4, decoder_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), res_blocks=1,
    decoder_res_blocks=1, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
)  # fmt: skip
IMAGES, CLIPS = Phase(steps=3, batch=4, frames=1), Phase(steps=2, batch=2, frames=5)


def stage(*phases, **settings):
    """A stage whose loop has as many steps as the phases, unless `loop` is given."""
    phases = phases or (IMAGES, CLIPS)
    settings.setdefault("loop", LoopSpec(steps=sum(phase.steps for phase in phases)))
    return VAEStage(model=TINY, phases=phases, held_out_clips=1, **settings)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return stage().task(folder / "out", folder, one_device())


def batches_from(task, start):
    with task.batches.feed(start) as feed:
        return list(feed)


def test_phases_must_sum_to_the_steps_of_the_loop():
    with pytest.raises(ValueError, match=r"phases have 5 steps, loop\.steps is 6; make them equal"):
        stage(loop=LoopSpec(steps=6))


@pytest.mark.parametrize("axis", ["sp", "fsdp"])
def test_only_data_parallelism_is_supported(axis):
    with pytest.raises(ValueError, match=rf"mesh\.{axis} must be 1 in this stage, got 2"):
        stage(mesh=MeshSpec(**{axis: 2}))


def test_every_microbatch_must_divide_over_the_data_axis():
    assert stage(mesh=MeshSpec(data=2)).mesh.data == 2
    with pytest.raises(ValueError, match=r"2 samples of a microbatch do not divide .*data = 4"):
        stage(mesh=MeshSpec(data=4))
    with pytest.raises(ValueError, match=r"batch = 4 does not divide by loop\.accumulate = 3"):
        stage(loop=LoopSpec(steps=5, accumulate=3))


def test_batches_are_a_function_of_the_step(task):
    """A resumed run gets the batches of the uninterrupted one, across the change of phase."""
    uninterrupted = batches_from(task, 0)
    assert len(uninterrupted) == 5
    for start in (2, 4):
        jax.tree.map(
            np.testing.assert_array_equal, batches_from(task, start), uninterrupted[start:]
        )
    assert (uninterrupted[0]["video"] != uninterrupted[1]["video"]).any()


def test_batches_have_the_size_and_length_of_their_phase(task):
    size = (world.HEIGHT, world.WIDTH)
    shapes = [batch["video"].shape for batch in batches_from(task, 0)]
    assert shapes == [(4, 1, *size, 3)] * 3 + [(2, 5, *size, 3)] * 2


def test_pixels_of_the_subject_weigh_more(task):
    """The background has weight 1, the subject 1 + `subject_weight`."""
    weight = batches_from(task, 0)[0]["weight"]
    assert set(np.unique(weight)) == {1.0, 1.0 + stage().subject_weight}


def test_the_export_contains_parameters_and_latent_statistics(task, tmp_path):
    weights = task.trainer.init().weights
    task.export(weights, tmp_path)
    params, settings = load_component(tmp_path, "vae")
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(weights["vae"]))
    mean, std = (settings[name] for name in ("latent_mean", "latent_std"))
    assert len(mean) == len(std) == TINY.z_dim
    assert mean != dataclasses.asdict(TINY)["latent_mean"] and min(std) > 0
