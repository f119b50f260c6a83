"""The stage: prompts -> pairs in JSONL, which a person can read and edit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from compile_steer.artifacts.files import digest, save_text
from compile_steer.artifacts.paths import RunPaths
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.common.progress import Advance, Progress
from compile_steer.data.behaviour import SPLITS, Behaviour, normalized, prompts_key
from compile_steer.data.section import GenerateOptions, PairsData
from compile_steer.data.sources import Reader
from compile_steer.extract.completions import Answer, Side, write_side
from compile_steer.extract.generation_report import SplitReport, WritingReport
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair
from compile_steer.recipe import Recipe
from compile_steer.scoring.base import Score


def write(
    recipe: Recipe, options: GenerateOptions, loaded: LoadedModel, asked: Behaviour, paths: RunPaths, progress: Progress
) -> Behaviour:
    """The behaviour with the responses that its pairs lack, from the files of `paths`; writes those first if need be.

    Files that were written from the same inputs are taken as they are now, so what a person mended in them counts.

    Args:
        asked: as read from the recipe's data, with pairs whose responses are empty.

    Raises:
        RecipeError: too few pairs of a split show the behaviour, or an edited file is unusable.
    """
    inputs = _inputs(recipe, options, loaded, asked)
    if not _is_kept(paths, inputs):
        distributed.require_alone("writing pairs")
        _write(recipe, options, loaded, asked, paths, inputs, progress)
    return _read(options, asked, paths)


def _inputs(recipe: Recipe, options: GenerateOptions, loaded: LoadedModel, asked: Behaviour) -> str:
    """Fingerprint of what the pairs depend on; how many are needed is not among it."""
    pairs = {name: [asdict(pair) for pair in asked.split(name)] for name in SPLITS}
    checks = {prompt: [asdict(check) for check in found] for prompt, found in asked.checks.items()}
    how = [options.model_dump(exclude={"min_pairs"}), recipe.validate_.score.model_dump(mode="json")]
    return digest([pairs, checks, how, loaded.id, loaded.revision, recipe.dtype, recipe.seed])


def _is_kept(paths: RunPaths, inputs: str) -> bool:
    try:
        kept = WritingReport.load(paths.writing)
    except ArtifactError:
        return False  # none yet, or damaged: written again, and replaced as a whole
    return kept.inputs == inputs and all(paths.pairs(name).is_file() for name in SPLITS)


def _write(
    recipe: Recipe,
    options: GenerateOptions,
    loaded: LoadedModel,
    asked: Behaviour,
    paths: RunPaths,
    inputs: str,
    progress: Progress,
) -> None:
    score = recipe.validate_.score.bind(loaded, asked)
    answers = 2 * sum(len(asked.split(name)) for name in SPLITS)
    seen: set[str] = set()
    splits: dict[str, SplitReport] = {}
    files: dict[Path, str] = {}
    with progress.phase("the model writes both sides of its pairs", answers) as advance:
        for name in SPLITS:
            rows, splits[name] = _write_split(asked.split(name), loaded, score, options, recipe.seed, seen, advance)
            files[paths.pairs(name)] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    paths.writing.unlink(missing_ok=True)  # the report is the mark that all files belong together: it goes last
    for path, text in files.items():
        save_text(path, text)
    WritingReport(splits, inputs).save(paths.writing)


def _write_split(
    pairs: Sequence[Pair],
    loaded: LoadedModel,
    score: Score,
    options: GenerateOptions,
    seed: int,
    seen: set[str],
    advance: Advance,
) -> tuple[list[dict[str, str]], SplitReport]:
    """The rows of one split, and what became of the others.

    Args:
        seen: the responses of the splits before; this one's are added.
    """
    prompts = [pair.prompt for pair in pairs]
    sides = [Side("positive", [p.positive for p in pairs], True), Side("negative", [p.negative for p in pairs], False)]
    answered, written = zip(
        *(write_side(loaded, side, prompts, score, options, seed, advance) for side in sides), strict=True
    )
    rows: list[dict[str, str]] = []
    dropped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for prompt, positive, negative in zip(prompts, *answered, strict=True):
        problem, text = _dropped(positive, negative, seen)
        if problem:
            dropped[problem] += 1
            examples.setdefault(problem, f"{prompt} -> {text}")
        else:
            rows.append({"prompt": prompt, "positive": positive.text, "negative": negative.text})
    seen |= {normalized(row[side]) for row in rows for side in ("positive", "negative")}
    return rows, SplitReport(len(pairs), sum(written), len(rows), dict(dropped), examples)


def _dropped(positive: Answer, negative: Answer, seen: set[str]) -> tuple[str, str]:
    """Why two answers are no pair, with the one that is at fault; or nothing."""
    for one in (positive, negative):
        if one.problem:
            return one.problem, one.text
    if normalized(positive.text) == normalized(negative.text):
        return "both sides are the same", positive.text
    for one in (positive, negative):
        if normalized(one.text) in seen:
            return "an earlier split has the same answer", one.text
    return "", ""


def _read(options: GenerateOptions, asked: Behaviour, paths: RunPaths) -> Behaviour:
    """The pairs on disk, put together with what each side was asked; raises `RecipeError`."""
    reader = Reader(paths.pairs("train").parent)
    report = WritingReport.load(paths.writing)
    found: dict[str, tuple[Pair, ...]] = {}
    short: list[str] = []
    for name in SPLITS:
        path = paths.pairs(name)
        rows = reader.rows(name, path.resolve(), PairsData.keys) if path.stat().st_size else []
        known = {pair.prompt: pair for pair in asked.split(name)}
        foreign = [row["prompt"] for row in rows if row["prompt"] not in known]
        if foreign:
            reader.problems.append(
                f"{path}: {len(foreign)} of its prompts are not among those of data.{name}, as '{foreign[0]}'. Add them "
                "there, or give the files to a recipe of kind: pairs."
            )
        found[name] = tuple(_answered(known[row["prompt"]], row) for row in rows if row["prompt"] in known)
        if len(found[name]) < options.min_pairs:
            short.append(
                f"data.{name}: {len(found[name])} written pairs, needed: {options.min_pairs}. When they were written "
                f"{report.splits[name].describe()}; an answer for each reason is in {paths.writing}. Ask in other words, "
                "give more prompts or data.generate.tries, or lower data.generate.min_pairs."
            )
    if reader.problems or short:
        raise RecipeError([*reader.problems, *short])
    train, validation, test = (found[name] for name in SPLITS)
    prompts = {prompts_key(name): asked.hashes[name] for name in SPLITS}
    hashes = {**asked.hashes, **reader.hashes, **prompts}
    return replace(asked, train=train, validation=validation, test=test, hashes=hashes)


def _answered(pair: Pair, row: dict[str, str]) -> Pair:
    positive = replace(pair.positive, response=row["positive"])
    return replace(pair, positive=positive, negative=replace(pair.negative, response=row["negative"]))
