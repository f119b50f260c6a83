"""A tiny model that generates pairs now and then, and a recipe that has it do so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from compile_steer.artifacts.paths import RunPaths
from compile_steer.data.behaviour import SPLITS, Behaviour, Context
from compile_steer.extraction.generate_pairs import GenerationReport, kept_pairs
from compile_steer.models.load import LoadedModel
from compile_steer.recipe import Recipe
from tests.helpers.tiny import VOCAB, build

N_PROMPTS = 24
OPTIONS = {"max_new_tokens": 7, "min_pairs": 4, "tries": 3, "temperature": 1.3, "max_repetition": 0.4}
PATTERN = r"\bw[4-6]\d"  # a behaviour that a random model shows now and then


def generating_model() -> LoadedModel:
    """A tiny model of which every third word ends a sentence."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "user": 4, "assistant": 5}
    words |= {f"w{n}" + "x." * (n % 3 == 0): n for n in range(6, VOCAB)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return LoadedModel(build("llama", seed=3), tokenizer, "tiny-llama", "sha256:tiny", "")


def generating_recipe(folder: Path, **data: Any) -> Recipe:
    """Prompts of two words, all different; the positive side's prompt has a third word."""
    words = [f"w{n}" for n in range(6, VOCAB) if n % 3]
    prompts = iter([f"{words[n % 31]} {words[31 + n // 31]}" for n in range(3 * N_PROMPTS + 12)])
    for name in SPLITS:
        rows = [json.dumps({"prompt": next(prompts)}) for _ in range(N_PROMPTS)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    for name in ("neutral", "heldout", "calibration"):
        row = {"prompt": next(prompts)} | ({"response": "w7 w8"} if name == "neutral" else {})
        (folder / f"{name}.jsonl").write_text(json.dumps(row))
    files = {name: f"{name}.jsonl" for name in (*SPLITS, "neutral", "heldout", "calibration")}
    section = {**files, "kind": "generated", "positive_template": "{prompt} w50", "generate": OPTIONS, **data}
    return Recipe.model_validate(
        {
            "name": "generated",
            "model": "tiny",
            "seed": 5,
            "data": section,
            "validate": {"score": {"kind": "keywords", "patterns": [PATTERN]}},
            "folder": folder,
        }
    )


def generated(recipe: Recipe, model: LoadedModel, out: Path) -> tuple[Behaviour, GenerationReport]:
    """The recipe's data with their generated responses, and the report on them, from the files in `out`."""
    assert recipe.data.generation is not None
    paths = RunPaths(out, recipe.name)
    context = Context(model, recipe.data.read(recipe.folder), recipe.seed)
    data = kept_pairs(context, recipe.data.generation, recipe.validate_.score, paths)
    return data, GenerationReport.load(paths.generation_report)


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
