"""A small behaviour and its validation on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour, Context
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.recipe import Recipe
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Program
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.stage import Validation, validate
from tests.helpers.tiny import HIDDEN, LAYERS, build, chat_tokenizer, revision

SPLITS = ("train", "validation", "test", "neutral", "heldout", "calibration")


@cache
def chat_model() -> LoadedModel:
    return LoadedModel(build("qwen2", 5), chat_tokenizer(), "tiny-qwen2", revision("qwen2"), "")


def words(seed: int, count: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(6, 97, (count,), generator=torch.Generator().manual_seed(seed)))


def pairs(start: int, count: int) -> tuple[Pair, ...]:
    """Positives hold w40, which the score looks for."""
    return tuple(
        Pair(
            Text(prompt := words(seed, 4), f"w40 {words(seed + 300, 3)} w40"),
            Text(prompt, f"w50 {words(seed + 600, 2)} w50"),
            prompt,
        )
        for seed in range(start, start + count)
    )


def behaviour() -> Behaviour:
    neutral = tuple(Text(words(seed, 4), words(seed + 400, 6)) for seed in range(9000, 9005))
    return Behaviour(pairs(1000, 6), pairs(3000, 8), pairs(5000, 12), neutral, (), (), {})


def recipe(folder: Path = Path(), **options: Any) -> Recipe:
    chosen = {
        "layers": [2, 3],
        "coefficients": [1.6, 2.5],
        "prompts": 8,
        "sweep_prompts": 4,
        "sweep_pairs": 6,
        "sweep_neutral": 4,
        "control_pairs": 6,
        "max_new_tokens": 5,
        "max_perplexity_ratio": 20.0,
        "max_repetition": 0.9,
        "dose_prompts": 2,
        "questions": 8,
        "control_prompts": 4,
        "wordings": 2,
        **options,
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": "tiny",
            "seed": 3,
            "data": {name: f"{name}.jsonl" for name in SPLITS},
            "validate": {"score": {"kind": "keywords", "patterns": ["w40"]}, **chosen},
            "folder": folder,
        }
    )


def toward_w40(**changes: Any) -> Directions:
    """Towards the embedding of w40, which is the head's row of it too; as long as the stream is."""
    table = chat_model().model.get_input_embeddings().weight
    difference = table[40] - table[50]
    generator = torch.Generator().manual_seed(8)
    vectors = torch.stack([7.0 * difference / difference.norm()] * LAYERS)
    shuffled = torch.randn(6, LAYERS, HIDDEN, generator=generator)
    shuffled = 7.0 * shuffled / shuffled.norm(dim=-1, keepdim=True)
    return replace(Directions(vectors, shuffled, "tiny-qwen2", revision("qwen2"), "resid_post", "inputs"), **changes)


def options(**changes: Any) -> ValidateOptions:
    return recipe(**changes).validate_


def program_at(layer: int, coefficient: float) -> Program:
    return toward_w40().program(layer, coefficient, "all")


def context(data: Behaviour | None = None, progress: Progress | None = None) -> Context:
    return Context(chat_model(), behaviour() if data is None else data, 3, progress or Progress())


def validated(
    directions: Directions, data: Behaviour | None = None, progress: Progress | None = None, **changes: Any
) -> Validation:
    """The whole stage, with `changes` of the recipe's section."""
    settings = recipe(**changes)
    return validate(
        context(data, progress),
        directions,
        settings.validate_,
        readout=settings.extract.readout,
        ask=settings.ask,
        too_high=settings.too_high,
        name=settings.name,
    )


@cache
def usual_validation() -> Validation:
    return validated(toward_w40())
