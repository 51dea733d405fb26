"""The kinds of golden files, and how each is compared with this project's own functions.

`KINDS` maps the name of a golden file to a function that lists its cases. Names with something
appended (`dit_bidirectional_2.npz`, `vae22.seed3.npz`) are of the kind they begin with. Sizes,
configurations and options come from a file's own `__meta__` and arrays.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from conformance_cases import (
    dit,
    dmd,
    facts,
    kvquant,
    lora,
    nvfp4,
    recycling,
    sampling,
    tables,
    text,
    training,
    vae,
)
from conformance_cases.golden import Golden
from conformance_cases.rows import Case, later

KINDS: dict[str, Callable[[Golden], Sequence[Case]]] = {
    "ar_training_loss": training.ar_training_loss,
    "dit_bidirectional": dit.bidirectional,
    "dit_teacher_forcing": dit.teacher_forcing,
    "dmd": dmd.distillation,
    "error_buffer": recycling.error_buffer,
    "flow_schedulers": tables.flow_schedulers,
    "lora": lora.adapted,
    "nvfp4_quantize": nvfp4.quantized,
    "rht": nvfp4.rotated,
    "sampling_i2v": sampling.videos,
    "sampling_kvquant": kvquant.quantised_cache,
    "sampling_multishot": sampling.videos,
    "teacher_forcing_masks": tables.masks,
    "umt5_encoder": text.umt5_encoder,
    "vae22": vae.full_and_streamed,
    "vae_halo": vae.halo,
}
"""What exists. Every other `.npz` is reported as not implemented."""


def golden_files(folder: Path) -> list[Path]:
    """The files of a folder that are goldens: every `.npz`, and `facts.json`."""
    return sorted([*folder.glob("*.npz"), *folder.glob("facts.json")])


def kind_of(path: Path) -> str:
    """The kind that the name of a file begins with, or the name if it begins with none."""
    known = [kind for kind in KINDS if re.match(rf"{kind}(?![a-z0-9])", path.stem)]
    return max(known, key=len, default=path.stem)


def cases_of(path: Path) -> Sequence[Case]:
    """The cases of one golden file; whatever is wrong with the file as a whole is raised."""
    if path.suffix == ".json":
        return facts.facts(path)
    kind = kind_of(path)
    return KINDS[kind](Golden(path)) if kind in KINDS else [later("all")]
