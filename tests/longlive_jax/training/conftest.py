"""Encoded clips and a small checkpoint, and a compilation cache for all training tests."""

import jax
import pytest
from flax import nnx

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiT, DiTConfig
from tests.longlive_jax.data.clips.models import TEXT_DIM, Z_DIM, write_encoders
from tests.longlive_jax.data.clips.videos import write_sample
from tests.tiny import activate_outputs

DIT = DiTConfig(
    dim=64, ffn_dim=64, freq_dim=8, text_dim=TEXT_DIM, text_len=48, heads=4, layers=2,
    in_channels=Z_DIM, out_channels=Z_DIM,
)  # fmt: skip


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """Directory of JAX's persistent compilation cache.

    A resumed run needs the same programs as the run that it resumes, so each is compiled once.
    """
    return tmp_path_factory.mktemp("compilation_cache")


@pytest.fixture(scope="module", autouse=True)
def use_compilation_cache(compilation_cache):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A directory with `checkpoint` (all components), `videos`, and `encoded` clips of 4 chunks."""
    folder = tmp_path_factory.mktemp("clips")
    checkpoint = write_encoders(folder / "checkpoint")
    params = activate_outputs(params_of(DiT(DIT, rngs=nnx.Rngs(0))))
    save_component(checkpoint, "dit", params, DIT)
    for name, *lengths in (("a", 40), ("b", 18, 16), ("c", 30, 20), ("d", 33), ("e", 31, 9)):
        write_sample(folder / "videos", name, *lengths)
    command = [
        "data", "encode", f"--source={folder / 'videos'}", f"--checkpoint={checkpoint}",
        f"--out={folder / 'encoded'}", "--chunks=4", "--dtype=float32", "--pad",
    ]  # fmt: skip
    assert run(command) == 0
    return folder
