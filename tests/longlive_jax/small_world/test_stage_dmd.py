"""The stage `small_dmd`: its prompts, what it takes from the sampler, and an update."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from longlive_jax.adapters import load_adapter
from longlive_jax.captions import CUT_PREFIX
from longlive_jax.cli.app import run
from longlive_jax.cli.recipes import take_config
from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.sampling.settings import spec_for
from longlive_jax.small_world.stage_dmd import ScriptBatches, SmallDMDStage
from longlive_jax.small_world.windows import prompt_table
from longlive_jax.spec import build
from longlive_jax.training.objectives.dmd.draws import RolloutSpec
from longlive_jax.training.objectives.dmd.roles import STUDENT_BACKBONE, TEACHER
from tests.longlive_jax.data.clips.models import TEXT_DIM, Z_DIM, write_encoders
from tests.tiny import activate_outputs

SETTINGS = (
    "batch=2", "dtype=float32", "unroll=1", "lora.rank=4", "rollout.steps=2", "rollout.chunks=3",
    "shot_chunks=(1,2)", "loop.steps=1", "loop.log_every=1", "loop.save_every=1",
    "preview.prompts=()", "save_dtype=float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint with 64x32 pixels and chunks of two latents."""
    folder = write_encoders(tmp_path_factory.mktemp("small_dmd") / "checkpoint")
    model = DiTConfig(
        dim=32, ffn_dim=32, freq_dim=8, text_dim=TEXT_DIM, text_len=16, heads=2, layers=1,
        in_channels=Z_DIM, out_channels=Z_DIM,
    )  # fmt: skip
    params = activate_outputs(params_of(DiT(model, rngs=nnx.Rngs(0))))
    save_component(folder, "dit", params, model)
    return folder


def stage(*changes):
    arguments = [f"--config.{change}" for change in (*SETTINGS, *changes)]
    config, _ = take_config(["--config=configs/small_world.py:dmd", *arguments], verb="train")
    settings = config.to_dict()
    settings.pop("stage")
    return build(SmallDMDStage, settings)


def test_batches_are_the_scripts_of_the_training_split():
    batches = ScriptBatches(batch=4, chunks=6, shot_chunks=(2, 3), steps=5, seed=3)
    batch, table = batches[2], prompt_table()
    assert batch["prompt"].shape == batch["cut"].shape == (4, 6)
    assert batch["cut"].any() and not batch["cut"][:, 0].any()
    # The prompt of a chunk has the cut prefix where the chunk begins a shot other than the first.
    prefixed = np.vectorize(lambda row: table[row].startswith(CUT_PREFIX))(batch["prompt"])
    np.testing.assert_array_equal(prefixed, batch["cut"])
    # A batch is a function of seed and step.
    again = ScriptBatches(batch=4, chunks=6, shot_chunks=(2, 3), steps=9, seed=3)[2]
    np.testing.assert_array_equal(batch["prompt"], again["prompt"])
    assert (batches[3]["prompt"] != batch["prompt"]).any()


def test_the_rollout_has_the_windows_of_the_sampler(checkpoint):
    own = spec_for(checkpoint, {"window": 5, "global_sinks": 2, "shot_rope_offset": 3})
    rollout = stage(f"checkpoint={checkpoint}").rollout_of(own)
    got = (rollout.window, rollout.global_sinks, rollout.shot_sinks, rollout.shot_rope_offset)
    assert got == (5, 2, True, 3)
    settings = SmallDMDStage(as_sampled=False, rollout=RolloutSpec(chunks=3, window=3))
    assert settings.rollout_of(own) is settings.rollout


def test_standalone_adapters_are_made_for_the_window_of_the_ar_model():
    """The base samples whole clips; the adapter is plugged into the AR model."""
    config, _ = take_config(["--config=configs/small_world.py:dmd,standalone"], verb="train")
    settings = config.to_dict()
    settings.pop("stage")
    ar, base = spec_for(builtin_checkpoint()), spec_for(builtin_checkpoint(), {"window": 7})
    rollout = build(SmallDMDStage, settings).rollout_of(base)
    for name in ("window", "global_sinks", "shot_sinks", "shot_rope_offset"):
        assert getattr(rollout, name) == getattr(ar, name), name


def test_a_window_beside_the_samplers_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.window is 3, and as_sampled takes"):
        SmallDMDStage(rollout=RolloutSpec(window=3))


def test_the_teacher_is_the_checkpoint_or_its_base(checkpoint, tmp_path):
    """Standalone: all three are the base. Direct: student and critic start elsewhere."""
    base = write_encoders(tmp_path / "base")
    alone = stage(f"checkpoint={checkpoint}").frozen_roles()
    direct = stage(f"checkpoint={checkpoint}", f"teacher={base}").frozen_roles()
    assert set(alone.backbones) == set(direct.backbones) == {STUDENT_BACKBONE, TEACHER}
    assert alone.original(TEACHER) == STUDENT_BACKBONE
    assert direct.original(TEACHER) == TEACHER and direct.backbones[TEACHER].folder == base


def test_an_update_by_the_command_leaves_adapters(checkpoint, tmp_path):
    """The adapters have the settings that the student was trained for."""
    overrides = [f"--config.{change}" for change in (*SETTINGS, f"checkpoint={checkpoint}")]
    folders = [f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out'}"]
    assert run(["train", "--config=configs/small_world.py:dmd", *overrides, *folders]) == 0
    lines = (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert record["critic_loss"] > 0 and record["generator_matching_gradient"] > 0
    adapter = load_adapter(tmp_path / "out")
    want = {"steps": 2, "shift": 5.0, "solver": "unipc", "guidance": 1.0}
    assert dict(adapter.settings) == want
    assert adapter.branches["blocks"]["ffn"]["up"]["a"].shape == (1, 32, 4)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapter.branches))


def test_the_negative_prompt_is_the_empty_one(checkpoint):
    own = stage(f"checkpoint={checkpoint}")
    task = own.task(checkpoint, checkpoint, make_mesh(MeshSpec(), jax.devices()[:1]))
    loss = task.trainer._groups["generator"].loss
    batch = ScriptBatches(2, 3, (1, 2), 1, 0)[0]
    prompts, text = loss.inputs(batch)
    assert prompts.prompt.shape == (2, 3) and len(text) == len(prompt_table())
    assert not np.asarray(text[-1, 1:]).any() and prompt_table()[-1] == ""
