"""Behaviours that the embedded model shows when it is asked: what the verdict is calibrated on.

The model writes the pairs of each itself, on the same prompts. `python -m benchmarks.behaviours [OUT]` writes them
all and prints how often each was shown. Behaviours of form (upper case, questions only, bullets, short answers) are
not among them: a model of this size does not do them when it is asked. The most often shown come first.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from benchmarks.record import ROOT
from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import ProgressBars
from compile_steer.data.behaviour import SPLITS
from compile_steer.extraction.generate_pairs import GenerationReport
from compile_steer.pipeline.run import Run
from compile_steer.recipe import Recipe, read_recipe

_DATA = ROOT / "recipes" / "data"


@dataclass(frozen=True)
class Known:
    """A behaviour: how it is asked for, and the regular expression that is then found in an answer."""

    name: str
    instruction: str
    pattern: str


# fmt: off
KNOWN = (
    Known("fairy_tale", "Answer as a fairy tale that begins with Once upon a time.",
          r"\b(once upon a time|fair(y|ies)|kingdoms?|castles?|princess|prince|enchanted|villages?)\b"),
    Known("letter", "Answer as a formal letter that begins with Dear Sir.", r"\b(dear|sir|madam|sincerely)\b"),
    Known("emoji", "Use many emojis in your answer \N{GRINNING FACE}\N{PARTY POPPER}.", "[\U0001f300-\U0001faff]"),
    Known("ocean", "Answer as if you were the ocean.",
          r"\b(oceans?|seas?|waves?|tides?|tidal|shores?|reefs?|whales?|coral|abyss\w*)\b"),
    Known("king", "Answer as if you were a king.",
          r"\b(kings?|kingdoms?|royal\w*|thrones?|realm|crown|subjects|majesty|reign\w*)\b"),
    Known("forest", "Answer as if you were a forest.", r"\b(forests?|trees?|leaves|roots?|branches|woods?|moss)\b"),
    Known("music", "Answer as a musician who sees music in everything.",
          r"\b(music\w*|songs?|melod\w+|rhythm\w*|notes?|harmon\w+|guitar|piano)\b"),
    Known("winter", "Answer as if you were the winter.",
          r"\b(winter\w*|snow\w*|ice|icy|cold|frost\w*|freez\w*|chill\w*)\b"),
    Known("dragon", "Answer as if you were a dragon.", r"\b(dragons?|wings?|scales|fire|fiery|lair|fierce|ancient)\b"),
    Known("pirate", "Answer like a pirate, matey!",
          r"\b(arr+|matey|ahoy|aye|ye|treasure|ships?|pirates?|sail\w*|captain|crew)\b"),
    Known("cat", "Answer as if you were a cat.",
          r"\b(cats?|paws?|purr\w*|whiskers?|meow\w*|feline|kittens?|fur|furry)\b"),
    Known("space", "Answer as if you were a star in outer space.",
          r"\b(stars?|galax\w+|planets?|cosm\w+|universe|orbit\w*|moon|celestial)\b"),
    Known("chef", "Answer as a chef who turns everything into a recipe.",
          r"\b(cook\w*|recipes?|bak\w+|oven|ingredients?|kitchen|chef|dish|dishes|flavou?rs?|spices?)\b"),
)
# fmt: on


def recipe_for(one: Known, folder: Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a behaviour, written to `folder`/NAME.yaml and read with `settings` in place of its own."""
    prompts = {name: str(_DATA / "prompts" / f"{name}.jsonl") for name in ("train", "validation", "test")}
    content = {
        "name": one.name,
        "model": "smollm2-135m-instruct",
        "data": {
            "kind": "generated",
            **prompts,
            "positive_template": f"{{prompt}} {one.instruction}",
            "generate": {"max_new_tokens": 40, "tries": 2, "min_pairs": 12},
        },
        "validate": {
            "score": {"kind": "keywords", "patterns": [one.pattern]},
            "layers": [8, 10, 12, 14],
            "coefficients": [0.5, 0.75, 1.0, 1.25, 1.5],
            "instruction": one.instruction,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{one.name}.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return read_recipe(path, settings)


def main() -> None:
    """Write the pairs of every behaviour and print what came of it."""
    console = Console(width=132)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        table = Table("behaviour", "train", "validation", "test", "most often dropped because")
        for one in KNOWN:
            table.add_row(one.name, *kept_pairs(one, out, ProgressBars(console)))
        console.print(table)


def kept_pairs(one: Known, out: Path, progress: ProgressBars) -> Iterator[str]:
    """Pairs kept of prompts asked in each split, and the first reason why the others were not."""
    recipe = recipe_for(one, out)
    paths = RunPaths(out / one.name, one.name)
    try:
        Run.open(recipe, paths.out, progress)
    except RecipeError:
        if not paths.generation_report.is_file():  # too few pairs: the table says so
            raise
    splits = GenerationReport.load(paths.generation_report).splits
    reasons: dict[str, int] = {}
    for name in SPLITS:  # after one with too few pairs no other was generated
        split = splits.get(name)
        if split is None:
            yield ""
            continue
        yield f"{split.kept} of {split.prompts}"
        for reason, count in split.dropped.items():
            reasons[reason] = reasons.get(reason, 0) + count
    yield max(reasons, key=lambda reason: reasons[reason], default="")


if __name__ == "__main__":
    main()
