"""What readers of the documentation bring with them: small checkpoints, weights and videos."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.vae import VAE, VAEConfig
from longlive_jax.models.wan import DiT
from tests.docs.blocks import REPOSITORY
from tests.longlive_jax.data.clips.models import Z_DIM, random_params, write_encoders
from tests.longlive_jax.data.clips.videos import write_sample, write_video
from tests.longlive_jax.training.conftest import DIT
from tests.tiny import activate_outputs

SCRIPT = """
shots:
  - {prompt: a red circle moves left on a mint background, chunks: 2}
  - {prompt: a blue square moves up on a gray background, chunks: 2}
"""


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs are compiled once for all commands, each of which builds its own functions."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def belongings(tmp_path_factory):
    """A folder with what the pages assume: checkpoints, datasets, a script, foreign weights."""
    folder = tmp_path_factory.mktemp("reader")
    # 1. Checkpoints of tiny models.
    checkpoint = write_encoders(folder / "checkpoints" / "5b")
    vae = VAEConfig(
        encoder_dim=4,
        decoder_dim=4,
        z_dim=Z_DIM,
        res_blocks=1,
        latent_mean=(0.0,) * Z_DIM,
        latent_std=(1.0,) * Z_DIM,
    )
    params = random_params(lambda: VAE(vae, rngs=nnx.Rngs(0)))
    save_component(checkpoint, "vae", params, vae, overwrite=True)
    params = activate_outputs(params_of(DiT(DIT, rngs=nnx.Rngs(0))))
    save_component(checkpoint, "dit", params, DIT)
    for name in ("wan22_5b", "ar_5b"):
        shutil.copytree(checkpoint, folder / "checkpoints" / name)
    # 2. Videos and a script.
    for name, *lengths in (("a", 40), ("b", 18, 16), ("c", 30, 20), ("d", 33), ("e", 31, 9)):
        write_sample(folder / "DATASET", name, *lengths)
    for name, caption in (("walk", "moves left on a mint"), ("jump", "moves up on a gray")):
        write_video(folder / "CLIPS" / f"{name}.mp4", 64, size=(64, 64))
        (folder / "CLIPS" / f"{name}.txt").write_text(f"a red circle {caption} background")
    (folder / "shots.yaml").write_text(SCRIPT)
    Image.new("RGB", (64, 64)).save(folder / "first.png")
    encode = ["data", "encode", f"--source={folder / 'DATASET'}", f"--checkpoint={checkpoint}"]
    options = ["--size=64x32", "--chunks=4", "--dtype=float32", "--pad", "--text_dtype=bfloat16"]
    assert run([*encode, f"--out={folder / 'clips' / '64s'}", *options]) == 0
    shutil.copytree(folder / "clips" / "64s", folder / "clips" / "16s")
    # 3. Files of other libraries.
    packed = folder / "packed"
    assert run(["export", f"--source={checkpoint}", f"--out={folder / 'PATH/TO/WEIGHTS'}"]) == 0
    assert run(["quantize", f"--checkpoint={checkpoint}", f"--out={packed}"]) == 0
    assert run(["export", f"--source={packed}", f"--out={folder / 'exported'}"]) == 0
    (model,) = (folder / "exported").rglob("*.pt")
    shutil.copy(model, folder / "model_4o6.pt")
    save_file(lora_of(DIT), folder / "lora.safetensors")
    return folder


def lora_of(cfg, rank=2):
    """Tensors of a LoRA in PEFT's naming, for all matrices of a DiT's blocks."""
    attention = {f"{a}.{m}": (cfg.dim,) * 2 for a in ("self_attn", "cross_attn") for m in "qkvo"}
    shapes = attention | {"ffn.0": (cfg.dim, cfg.ffn_dim), "ffn.2": (cfg.ffn_dim, cfg.dim)}
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(cfg.layers):
        for name, (inputs, outputs) in shapes.items():
            key = f"base_model.model.blocks.{layer}.{name}"
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = rng.normal(size=shape) * 0.01
                tensors[f"{key}.lora_{side}.weight"] = values.astype(np.float32)
    return tensors


@pytest.fixture
def reader(belongings, tmp_path):
    """A reader's folder: `belongings`, and the folders of the clone that commands name."""
    folder = tmp_path / "reader"
    shutil.copytree(belongings, folder)
    for name in ("configs", "launch", "examples", "longlive_jax"):
        if (REPOSITORY / name).exists():
            (folder / name).symlink_to(REPOSITORY / name)
    return folder
