"""Let the model generate its own contrast pairs, and keep those that show the behaviour on the positive side alone.

The pairs are JSONL files that a person can read and edit. This module does not import torch: reports are read with it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from compile_steer.artifacts.files import digest, load_json, reuse_or_make, save_record, save_text
from compile_steer.artifacts.paths import RunPaths, real_path
from compile_steer.artifacts.revision import identity_of
from compile_steer.common import distributed
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Advance
from compile_steer.data.behaviour import SIDES, SPLITS, Behaviour, Context, normalized, prompts_key
from compile_steer.data.section import GenerateOptions
from compile_steer.data.shapes import PAIR
from compile_steer.data.sources import Reader, Row
from compile_steer.models.text import Pair
from compile_steer.scoring.base import Reply, Score, ScorerBase
from compile_steer.scoring.text import repetition

if TYPE_CHECKING:
    from compile_steer.models.load import LoadedModel

_SHOWS = 0.5  # the score from which a response shows the behaviour
_BATCH = 96  # prompts that are continued at once
# The end of a sentence or line. A full stop after a digit may be a list's number: what follows would be an empty item.
_SENTENCE_END = re.compile(r"(?<!\d)[.!?]+[\"')\]*]*(?=\s|$)|\n")


@dataclass(frozen=True)
class SplitReport:
    """For one split the number of prompts, of responses generated (both sides, all tries), and of pairs kept.

    `dropped` counts the other prompts by reason; `examples` has a prompt and its response for each reason.
    """

    prompts: int
    generated: int
    kept: int
    dropped: dict[str, int]
    examples: dict[str, str]

    def describe(self) -> str:
        """Return one line, the most frequent reason first."""
        reasons = "; ".join(f"{n} {reason}" for reason, n in Counter(self.dropped).most_common())
        return f"{self.kept} of {self.prompts} prompts gave a pair" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class GenerationReport:
    """The reports of all splits, and the fingerprint of what the pairs were generated from."""

    kind: Literal["generation report"] = field(default="generation report", kw_only=True)
    splits: dict[str, SplitReport]
    inputs: str = ""

    @staticmethod
    def load(path: Path) -> GenerationReport:
        """Raises `ArtifactError` for a missing or damaged report."""
        return load_json(path, GenerationReport, "report on generated pairs", "Run 'compile-steer generate-pairs'.")


def kept_pairs(context: Context, options: GenerateOptions, scorer: ScorerBase, paths: RunPaths) -> Behaviour:
    """Return the data with generated responses, from the files of `paths`; generates these first if needed.

    Files that were generated from the same inputs are taken as they are, so that edits in them count. Raises
    `RecipeError` if too few pairs of a split show the behaviour, or an edited file is unusable.
    """
    model, data = context.model, context.data
    prompts = {name: [asdict(pair) for pair in data.split(name)] for name in SPLITS}
    checks = {prompt: [asdict(check) for check in checks] for prompt, checks in data.checks.items()}
    # How many pairs are needed does not change what is generated.
    settings = [options.model_dump(exclude={"min_pairs"}), scorer.model_dump(mode="json"), scorer.revision]
    identity = [identity_of(model.revision), str(model.model.dtype), context.seed]
    inputs = digest([prompts, checks, settings, identity])

    def kept(path: Path) -> GenerationReport | None:
        report = GenerationReport.load(path)
        whole = set(report.splits) == set(SPLITS) and all(paths.pairs(name).is_file() for name in SPLITS)
        return report if report.inputs == inputs and whole else None

    def make() -> GenerationReport:
        rows, splits = generate_pairs(context, options, scorer)

        def save() -> None:
            # The report marks that all files belong together, so it is removed first and written last.
            paths.generation_report.unlink(missing_ok=True)
            for name, part in rows.items():
                save_text(paths.pairs(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
            save_record(paths.generation_report, asdict(GenerationReport(splits, inputs)))

        distributed.first(save)
        return GenerationReport(splits, inputs)

    reuse_or_make(paths.generation_report, kept, make)
    return with_responses(data, options.min_pairs, paths)


def with_responses(data: Behaviour, min_pairs: int, paths: RunPaths) -> Behaviour:
    """Return `data` with the pairs of the files, edits included, in the place of its prompts, under each side's template.

    Raises `RecipeError` for an invalid row, one whose prompt is not in `data`, or fewer than `min_pairs` in a split.
    """
    reader, report = Reader(paths.out), GenerationReport.load(paths.generation_report)
    splits: dict[str, Any] = {}
    hashes, places, problems = dict(data.hashes), dict(data.places), list[str]()
    for name in report.splits:
        path = real_path(paths.pairs(name))
        # Where no pair was kept the file is empty, which the number of pairs explains better than the reader.
        rows = reader.rows(name, path, PAIR) if path.stat().st_size else []
        prompts = {pair.prompt: pair for pair in data.split(name)}
        unknown = [row["prompt"] for row in rows if row["prompt"] not in prompts]
        if unknown:
            problems.append(
                f"{paths.pairs(name)}: {len(unknown)} of its prompts are not among those of data.{name}, for example "
                f"'{unknown[0]}'. Add them there, or give the files to a recipe of kind: pairs."
            )
        known = [(prompts[row["prompt"]], row) for row in rows if row["prompt"] in prompts]
        splits[name] = tuple(
            replace(
                pair,
                positive=replace(pair.positive, response=row["positive"]),
                negative=replace(pair.negative, response=row["negative"]),
            )
            for pair, row in known
        )
        if len(known) < min_pairs:
            skipped = "" if len(report.splits) == len(SPLITS) else " The other splits were not generated."
            problems.append(
                f"data.{name}: found {len(known)} generated pairs; needed: {min_pairs}.{skipped} When they were generated "
                f"{report.splits[name].describe()}; an example of each reason is in {paths.generation_report}. "
                "Change the prompts' wording, add prompts or data.generate.tries, or lower data.generate.min_pairs."
            )
        hashes |= {name: digest(rows), prompts_key(name): data.hashes[name]}
        places |= {name: [row.place for _pair, row in known]}
    if reader.problems or problems:
        raise RecipeError([*reader.problems, *problems])
    return replace(data, **splits, hashes=hashes, places=places)


def generate_pairs(
    context: Context, options: GenerateOptions, scorer: ScorerBase
) -> tuple[dict[str, list[Row]], dict[str, SplitReport]]:
    """Let the model respond to both sides' prompts, and keep the pairs that show the behaviour on one side alone.

    Returns by split the kept rows {"prompt", "positive", "negative"}, and a report.
    """
    model, data = context.model, context.data
    score = scorer.bind(model, data)
    kept: dict[str, list[Row]] = {}
    reports: dict[str, SplitReport] = {}
    earlier: set[str] = set()
    total = 2 * sum(len(data.split(name)) for name in SPLITS)
    with context.progress.phase("generating both sides of the pairs", total) as advance:
        for name in SPLITS:
            pairs = data.split(name)
            positives, n_positive = generate_side(model, "positive", pairs, score, options, context.seed, advance)
            negatives, n_negative = generate_side(model, "negative", pairs, score, options, context.seed, advance)
            rows, reports[name] = kept_rows(pairs, positives, negatives, n_positive + n_negative, earlier)
            kept[name] = rows
            if len(rows) < options.min_pairs:
                break  # the other splits would be no use
    return kept, reports


def kept_rows(
    pairs: Sequence[Pair],
    positives: Sequence[Completion],
    negatives: Sequence[Completion],
    n_generated: int,
    earlier: set[str],
) -> tuple[list[Row], SplitReport]:
    """Return the rows of the pairs whose two sides can be used, and a report on all; adds their responses to `earlier`.

    Args:
        earlier: the responses of earlier splits: none may be in two.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for pair, positive, negative in zip(pairs, positives, negatives, strict=True):
        problem, text = next(_pair_problems(positive, negative, earlier), ("", ""))
        if problem:
            dropped[problem] += 1
            examples.setdefault(problem, f"{pair.prompt} -> {text}")
        else:
            rows.append(Row(prompt=pair.prompt, positive=positive.text, negative=negative.text))
    earlier |= {normalized(row[side]) for row in rows for side in SIDES}
    return rows, SplitReport(len(pairs), n_generated, len(rows), dict(dropped), examples)


class Completion(NamedTuple):
    """A response that the model generated; `problem` is empty if it can be used."""

    text: str
    problem: str = ""


def generate_side(
    model: LoadedModel,
    side: Literal["positive", "negative"],
    pairs: Sequence[Pair],
    score: Score,
    options: GenerateOptions,
    seed: int,
    advance: Advance,
) -> tuple[list[Completion], int]:
    """Generate one side's responses; return the last one for each pair [n], and how many were generated in all.

    The first try is greedy, the others are sampled at `options.temperature`; only what failed is tried again.
    """
    from compile_steer.models.generate import continue_prompts, ended, response_text

    completions: dict[int, Completion] = {}
    n_generated = 0
    for attempt in range(options.tries):
        left = [n for n in range(len(pairs)) if n not in completions or completions[n].problem]
        for at in range(0, len(left), _BATCH):
            rows = left[at : at + _BATCH]
            encoded = continue_prompts(
                model,
                [pairs[n].positive if side == "positive" else pairs[n].negative for n in rows],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature if attempt else 0.0,
                seed=seed + attempt,
            )
            ends = [ended(model, text) for text in encoded]
            texts = [response_text(model, text) for text in encoded]
            whole = [text if end else cut(text) for text, end in zip(texts, ends, strict=True)]
            # Scorers know a reply by its plain prompt.
            replies = [Reply(pairs[n].prompt, text, end) for n, text, end in zip(rows, whole, ends, strict=True)]
            for n, text, usable, value in zip(rows, texts, whole, score(replies), strict=True):
                completions[n] = Completion(usable or text, completion_problem(side, usable, float(value), options))
            n_generated += len(rows)
            advance(len(rows))
    return [completions[n] for n in range(len(pairs))], n_generated


def cut(text: str) -> str:
    """Return a text that was stopped midway up to its last whole sentence or line; empty if it has none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def completion_problem(side: str, text: str, score: float, options: GenerateOptions) -> str:
    """Return why a response cannot be used as that side of a pair, empty if it can; `score` is how much it shows."""
    shows = score >= _SHOWS
    if not text:
        return f"{side}: no whole sentence within {options.max_new_tokens} tokens"
    if shows != (side == "positive"):
        return f"{side} shows the behaviour" if shows else f"{side} does not show the behaviour"
    return f"{side} repeats itself" if repetition(text) > options.max_repetition else ""


def _pair_problems(positive: Completion, negative: Completion, earlier: set[str]) -> Iterator[tuple[str, str]]:
    """Yield every reason why two responses are no pair, with the text at fault."""
    yield from ((side.problem, side.text) for side in (positive, negative) if side.problem)
    if normalized(positive.text) == normalized(negative.text):
        yield "both sides are the same", positive.text
    for text, _problem in (positive, negative):
        if normalized(text) in earlier:
            yield "an earlier split has the same response", text
