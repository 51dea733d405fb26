"""The training stages of `longlive train`, by their name in a config.

All stages of a model write to one checkpoint directory; a later stage reads the output of earlier
ones.
"""

from longlive_jax.small_world.stage_base import BaseStage
from longlive_jax.small_world.stage_dit import DiTStage
from longlive_jax.small_world.stage_dmd import SmallDMDStage
from longlive_jax.small_world.stage_text import TextStage
from longlive_jax.small_world.stage_vae import VAEStage
from longlive_jax.training.stages.stage import RunSpec
from longlive_jax.training.stages.wan_ar import WanARStage
from longlive_jax.training.stages.wan_dmd import WanDMDStage

STAGES: dict[str, type[RunSpec]] = {
    "vae": VAEStage,
    "text": TextStage,
    "base": BaseStage,
    "ar": DiTStage,
    "clips": WanARStage,
    "dmd": WanDMDStage,
    "small_dmd": SmallDMDStage,
}
