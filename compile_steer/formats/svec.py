"""`.svec`: the JSON of IBM's activation-steering library (Lee et al. 2409.05907).

Direction K was read at hidden_states[K + 1], the output of block K; the library adds it to the input of block K. Which
of the two is meant the file cannot say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compile_steer.artifacts.files import save_json
from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import NUMBER, Foreign, Given, LayerConvention, numbers, placed, read_json

_MEANINGS = "activation-steering reads a direction as block says, and adds it as hidden_state says."


def read(path: Path, given: Given) -> Foreign:
    """The vectors of a file; raises `ArtifactError` where it is damaged, something else, or of unsaid blocks."""
    content = read_json(path, "the .svec of activation-steering")
    directions = content.get("directions")
    if not isinstance(directions, dict) or not directions:
        raise ArtifactError(f"{path} has no 'directions'; needed: the .svec of activation-steering.")
    foreign = [key for key in directions if re.fullmatch(NUMBER, key) is None]
    if foreign:
        raise ArtifactError(f"{path}: directions {', '.join(map(repr, foreign))}; needed: numbers of blocks.")
    keyed = {int(key): numbers(path, f"direction {key}", values) for key, values in directions.items()}
    return placed(path, keyed, given.layer_convention, "direction {}", _MEANINGS, str(content.get("model_type", "")))


def write(path: Path, vectors: Mapping[int, Tensor], model_type: str, convention: LayerConvention) -> None:
    """Write `vectors`, block -> [d_model]; a JSON number holds an fp32 number exactly."""
    shift = 1 if convention == "hidden_state" else 0
    directions = {str(layer + shift): vector.detach().float().tolist() for layer, vector in sorted(vectors.items())}
    save_json(path, {"model_type": model_type, "directions": directions, "explained_variances": {}})
