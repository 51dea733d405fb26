"""Preview pictures: at every evaluation the model in training samples a few prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from longlive_jax.io.checkpoint import TOKENIZER
from longlive_jax.io.models import load_model
from longlive_jax.io.pictures import strip
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.umt5 import Tokenizer
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel.hosts import gather_to_hosts, is_first_process
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import ShotScript
from longlive_jax.sampling.settings import spec_for
from longlive_jax.training.state import Params


@dataclasses.dataclass(frozen=True)
class PreviewSpec:
    """A video with one shot per prompt, sampled on a single device; none without prompts.

    The model, the VAE and the text encoder of the checkpoint must fit on that device beside the
    training state.

    Attributes:
      prompts: prompt of every shot.
      seconds: duration of a shot.
      seed: seed of the video.
    """

    prompts: tuple[str, ...] = ()
    seconds: float = 2.0
    seed: int = 0


class Preview:
    """Samples previews from training parameters; compiles once."""

    def __init__(
        self, spec: PreviewSpec, checkpoint: Path, model: DiTConfig, settings: Mapping[str, Any]
    ):
        """`settings` are fields of `SampleSpec`; VAE and text encoder are the checkpoint's."""
        self._spec, self._checkpoint, self._model = spec, checkpoint, model
        self._settings = settings
        self._engine: Engine | None = None

    def write(self, params: Params, step: int, workdir: Path, *, steps: Sequence[int] = ()) -> None:
        """Writes `sample_<step>.png`, one row per prompt, on the first process.

        With `steps` there is a picture for each of these numbers of model calls per chunk,
        `sample_<step>_<n>_steps.png`.
        """
        spec = self._spec
        if not spec.prompts:
            return
        params = gather_to_hosts(params)
        if not is_first_process():
            return
        params = jax.device_put(params, jax.local_devices()[0])
        # Prompts are encoded again, because their keys and values depend on the parameters.
        self._engine = self._engine or self._load(params)
        self._engine = engine = self._engine.with_params(params)
        script = ShotScript.of(*spec.prompts, seconds=spec.seconds, seed=spec.seed)
        settings = {f"_{n}_steps": {"steps": n} for n in steps} or {"": {}}
        for suffix, changes in settings.items():
            frames = Pipeline(engine.with_settings(**changes)).sample(script)[0]
            shots = np.split(frames, engine.timeline([script]).cut_frames(0))
            strip(workdir / f"sample_{step:06d}{suffix}.png", shots, spec.prompts)

    def _load(self, params: Params) -> Engine:
        graphdef, _ = abstract(lambda: DiT(self._model, rngs=nnx.Rngs(0)))
        vae, umt5 = (load_model(self._checkpoint, name) for name in ("vae", "umt5"))
        spec = spec_for(self._checkpoint, self._settings)
        tokenizer = Tokenizer(self._checkpoint / TOKENIZER)
        return Engine(with_params(graphdef, params), vae, umt5, tokenizer, spec)
