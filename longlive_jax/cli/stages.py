"""The stages that `longlive train` knows, by the name that a config gives.

A later stage reads what the earlier ones wrote to the same checkpoint directory.
"""

from longlive_jax.small_world.stage_dit import DiTStage
from longlive_jax.small_world.stage_text import TextStage
from longlive_jax.small_world.stage_vae import VAEStage
from longlive_jax.training.stages.stage import RunSpec
from longlive_jax.training.stages.wan_ar import WanARStage

STAGES: dict[str, type[RunSpec]] = {
    "vae": VAEStage,
    "text": TextStage,
    "ar": DiTStage,
    "clips": WanARStage,
}
