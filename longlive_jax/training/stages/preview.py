"""What a model in training makes of a few prompts: a picture at every evaluation."""

import dataclasses
from collections.abc import Mapping
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
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.script import ShotScript
from longlive_jax.sampling.settings import spec_for
from longlive_jax.training.state import Params


@dataclasses.dataclass(frozen=True)
class PreviewSpec:
    """A video of one shot a prompt, sampled whole on one device; none without prompts.

    The model, the VAE and the text encoder of the checkpoint must fit on that device beside the
    state that is being trained.
    """

    prompts: tuple[str, ...] = ()
    seconds: float = 2.0
    seed: int = 0


class Preview:
    """Samples with the parameters it is given; compiles once. `settings` as of `SampleSpec`."""

    def __init__(
        self, spec: PreviewSpec, checkpoint: Path, model: DiTConfig, settings: Mapping[str, Any]
    ):
        self._spec, self._checkpoint, self._model = spec, checkpoint, model
        self._settings = settings
        self._pipe: Pipeline | None = None

    def write(self, params: Params, step: int, workdir: Path) -> None:
        """Writes `sample_<step>.png`, a row a shot, if there are prompts; by the first process."""
        spec = self._spec
        if not spec.prompts:
            return
        params = gather_to_hosts(params)
        if not is_first_process():
            return
        params = jax.device_put(params, jax.local_devices()[0])
        self._pipe = self._pipe or self._made(params)
        self._pipe.params = params
        script = ShotScript.of(*spec.prompts, seconds=spec.seconds, seed=spec.seed)
        frames, laid = self._pipe.sample(script)[0], self._pipe.plan([script])
        shots = np.split(frames, laid.cut_frames(0))
        strip(workdir / f"sample_{step:06d}.png", shots, spec.prompts)

    def _made(self, params: Params) -> Pipeline:
        graphdef, _ = abstract(lambda: DiT(self._model, rngs=nnx.Rngs(0)))
        vae, umt5 = (load_model(self._checkpoint, name) for name in ("vae", "umt5"))
        spec = spec_for(self._checkpoint, self._settings)
        tokenizer = Tokenizer(self._checkpoint / TOKENIZER)
        return Pipeline(with_params(graphdef, params), vae, umt5, tokenizer, spec)
