"""What a model's settings claim, compared with the tensors that its files hold, before memory or time is spent on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig

from compile_steer.common.errors import ArtifactError, brief, several
from compile_steer.models.libraries import without_weights

Shapes = Mapping[str, Sequence[int]]
# What a library builds one after another, in config.json and in a GGUF's fields; `max_window_layers` builds nothing.
_COUNTS = re.compile(r"(?!max_).*(layer|block|expert|depth|label)s?(_count)?")
# Far beyond what differs between a model and its files in earnest, where the message names the tensors instead.
_SPARE_COUNT, _SPARE_NUMBERS = 100, 2**26
_LABELS = 10**4  # a language model has none, but their names are built


def require_counts(file: Path, settings: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise `ArtifactError` where the settings in `file` count many more blocks or experts than there are tensors of.

    Args:
        shapes: of the tensors, by their names.
    """
    numbers = [int(number) for name in shapes for number in re.findall(r"(?<!\w)\d{1,6}(?!\w)", name)]
    blocks = min(max(numbers, default=-1) + 1, len(shapes))
    experts = max([blocks, *(shape[0] for shape in shapes.values() if len(shape) > 2)])  # all of them in one tensor
    problems = [
        f"{file}: {name} is {brief(value)}; needed: at most {2 * most + _SPARE_COUNT:,}, by the tensors' names and shapes."
        for name, value in _integers(settings)
        for most in (experts if "expert" in name else _LABELS if "label" in name else blocks,)
        if value > 2 * most + _SPARE_COUNT and _COUNTS.fullmatch(name.rpartition(".")[2])
    ]
    if problems:
        raise ArtifactError([*several(problems), "Settings and weights are not of one model. Get it again."])


def require_numbers(file: Path, config: PreTrainedConfig, shapes: Shapes, kind: Any = AutoModelForCausalLM) -> None:
    """Raise `ArtifactError` where `config`, read from `file`, describes a model much larger than its tensors; `kind` loads it."""
    model = without_weights(config, kind)
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(map(math.prod, shapes.values()))
    widest = max((max(shape, default=1) for shape in shapes.values()), default=0)
    if needed > 2 * stored + _SPARE_NUMBERS:
        sizes = [f"{name} {value}" for name, value in _integers(config.to_dict()) if value > max(widest, 64)]
        raise ArtifactError(
            f"{file} describes a model of {needed:,} numbers, its tensors hold {stored:,}, in no dimension more than {widest:,}"
            f" ({', '.join(several(sizes)) or 'defaults stand for what it leaves out'}). Settings and weights are not of one "
            "model. Get it again."
        )


def _integers(settings: Any, place: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in nested settings, with its place."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from _integers(value, f"{place}.{name}" if place else str(name))
    elif isinstance(settings, int) and not isinstance(settings, bool):
        yield place, settings
