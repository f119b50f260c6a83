"""The stage `extract` with a few options, on data that have only training pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compile_steer.data.behaviour import Behaviour, Context
from compile_steer.extraction.options import ExtractOptions
from compile_steer.extraction.stage import extract
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair
from compile_steer.recipe import Recipe
from compile_steer.steering.directions import Directions

SEED = 3


def training_data(*pairs: Pair) -> Behaviour:
    return Behaviour(pairs, (), (), (), (), (), {})


def extract_with(model: LoadedModel, data: Behaviour, positions: str = "all", /, **options: Any) -> Directions:
    """Directions by these extract options, and by the defaults of the others."""
    return extract(Context(model, data, SEED), ExtractOptions.model_validate(options), positions=positions)


def tiny_recipe(positions: str = "all", /, **options: Any) -> Recipe:
    """A recipe with these extract options, whose data files do not exist."""
    names = ("train", "validation", "test", "neutral", "heldout", "calibration")
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": "tiny",
            "seed": SEED,
            "data": {name: f"{name}.jsonl" for name in names},
            "validate": {"score": {"kind": "lowercase"}, "positions": positions},
            "extract": options,
            "folder": Path(),
        }
    )
