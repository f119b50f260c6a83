"""A behaviour's data: contrast pairs in three disjoint splits, prompts, and how text becomes tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from compile_steer.errors import RecipeError
from compile_steer.files import digest
from compile_steer.hooks import LAST_PROMPT, PAD, PROMPT, RESPONSE

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Text:
    """A user prompt and the assistant's response to it (empty where only the prompt matters)."""

    prompt: str
    response: str = ""


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in the behaviour, and the plain prompt that both came from."""

    positive: Text
    negative: Text
    prompt: str


@dataclass(frozen=True)
class Behaviour:
    """All data of one behaviour. The splits share no prompt and no response, checked when read.

    `neutral` texts measure drift and perplexity, `heldout` prompts (other topics) are for verification
    alone, `calibration` prompts are what the compiler may see besides the training pairs.
    """

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    neutral: tuple[Text, ...]
    heldout: tuple[str, ...]
    calibration: tuple[str, ...]
    hashes: dict[str, str]


class Reader:
    """Reads JSONL files and gathers every problem, to be raised once."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.hashes: dict[str, str] = {}

    def rows(self, name: str, path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
        """The rows of one file; a row with a missing, extra, empty or non-text field is a problem."""
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON text may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"data.{name}: {path} cannot be read ({getattr(error, 'strerror', None) or error}).")
            return []
        rows = [row for n, line in enumerate(lines, 1) if line.strip() and (row := self._row(path, n, line, keys))]
        if not rows and not any(line.strip() for line in lines):
            self.problems.append(
                f"data.{name}: {path} is empty; needed: one JSON object a line with {', '.join(keys)}."
            )
        self.hashes[name] = digest(rows)
        return rows

    def _row(self, path: Path, number: int, line: str, keys: Sequence[str]) -> dict[str, str] | None:
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            self.problems.append(f"{where}: not JSON ({error.msg}).")
            return None
        if not isinstance(row, dict) or set(row) != set(keys):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            self.problems.append(f"{where}: found {found}; needed the keys {', '.join(keys)}.")
            return None
        bad = [key for key in keys if not isinstance(row[key], str) or not row[key].strip()]
        if bad:
            self.problems.append(f"{where}: {', '.join(bad)} must be text that is not empty.")
            return None
        return {key: row[key] for key in keys}


def read_behaviour(files: dict[str, Path], positive_template: str, negative_template: str) -> Behaviour:
    """Read and check all data of a behaviour; raises one `RecipeError` with every problem.

    Args:
        files: paths by name: train, validation, test, neutral, heldout, calibration.
        positive_template, negative_template: what the user says in each side of a pair; `{prompt}` stands
            for the row's prompt ("{prompt} Answer in lowercase." against "{prompt}").
    """
    reader = Reader()
    rows = {name: reader.rows(name, files[name], ("prompt", "positive", "negative")) for name in SPLITS}
    neutral = reader.rows("neutral", files["neutral"], ("prompt", "response"))
    prompts = {name: reader.rows(name, files[name], ("prompt",)) for name in ("heldout", "calibration")}
    reader.problems += _repeats({**rows, "neutral": neutral, **prompts})
    for name, template in (("positive", positive_template), ("negative", negative_template)):
        if template.count("{prompt}") != 1:
            reader.problems.append(f"data.{name}_template '{template}' must contain {{prompt}} exactly once.")
    for name in SPLITS:
        same = [row["prompt"] for row in rows[name] if row["positive"].strip() == row["negative"].strip()]
        if same and positive_template == negative_template:
            reader.problems.append(
                f"data.{name}: positive and negative are the same text for '{same[0]}' ({len(same)} pairs)."
            )
    if reader.problems:
        raise RecipeError(reader.problems)

    def pairs(name: str) -> tuple[Pair, ...]:
        return tuple(
            Pair(
                Text(positive_template.replace("{prompt}", row["prompt"]), row["positive"]),
                Text(negative_template.replace("{prompt}", row["prompt"]), row["negative"]),
                row["prompt"],
            )
            for row in rows[name]
        )

    return Behaviour(
        pairs("train"),
        pairs("validation"),
        pairs("test"),
        tuple(Text(row["prompt"], row["response"]) for row in neutral),
        tuple(row["prompt"] for row in prompts["heldout"]),
        tuple(row["prompt"] for row in prompts["calibration"]),
        reader.hashes,
    )


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _repeats(files: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    """A line for each prompt that stands twice, within a file or across files, and for each response across splits."""
    answers: dict[str, str] = {}
    for name in SPLITS:
        for text in {_key(row[side]) for row in files[name] for side in ("positive", "negative")}:
            before = answers.setdefault(text, name)
            if before != name:
                yield f"data: the response '{text}' is in both {before} and {name}; the splits must not overlap."
    seen: dict[str, str] = {}
    for name, rows in files.items():
        for row in rows:
            before = seen.setdefault(_key(row["prompt"]), name)
            if before != name:
                yield f"data: the prompt '{row['prompt']}' is in both {before} and {name}; the splits must not overlap."
        keys = [_key(row["prompt"]) for row in rows]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            yield f"data.{name}: the prompt '{key}' stands {keys.count(key)} times."


# ---------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation; the first `n_prompt` are the prompt, template tokens included."""

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True)
class Batch:
    """A right-padded batch, and where each row came from. All tensors are [batch, time]."""

    input_ids: Tensor
    attention_mask: Tensor
    roles: Tensor
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.roles.to(device), self.rows)

    @property
    def predicts_response(self) -> Tensor:
        """Boolean [batch, time]: positions whose next token belongs to the response."""
        following = torch.zeros_like(self.roles, dtype=torch.bool)
        following[:, :-1] = self.roles[:, 1:] == RESPONSE
        return following

    @property
    def n_tokens(self) -> int:
        return int(self.attention_mask.sum())


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as the model is asked it: through the chat template, or as it is for a plain model."""
    if tokenizer.chat_template is None:
        return prompt
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return str(text)


def encode(tokenizer: PreTrainedTokenizerBase, text: Text) -> Encoded:
    """Tokenise prompt and response apart, so that the boundary is the same whatever the response."""
    # A chat template writes its special tokens itself; a plain prompt needs the tokenizer's own.
    special = tokenizer.chat_template is None
    prompt = tokenizer(prompt_text(tokenizer, text.prompt), add_special_tokens=special)["input_ids"]
    joint = "" if tokenizer.chat_template is not None or not text.response or text.response[0].isspace() else " "
    response = tokenizer(joint + text.response, add_special_tokens=False)["input_ids"] if text.response else []
    return Encoded((*prompt, *response), len(prompt))


def batches(encoded: Sequence[Encoded], pad_id: int, *, max_tokens: int = 4096) -> Iterator[Batch]:
    """Right-padded batches of similar length, each of at most `max_tokens` padded tokens."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * len(encoded[index].ids) > max_tokens:
            yield pad(encoded, group, pad_id)
            group = []
        group.append(index)
    if group:
        yield pad(encoded, group, pad_id)


def pad(encoded: Sequence[Encoded], rows: Iterable[int], pad_id: int) -> Batch:
    """One right-padded batch of the chosen rows."""
    chosen = tuple(rows)
    time = max(len(encoded[row].ids) for row in chosen)
    input_ids = torch.full((len(chosen), time), pad_id, dtype=torch.long)
    roles = torch.full((len(chosen), time), PAD, dtype=torch.int8)
    for at, row in enumerate(chosen):
        one = encoded[row]
        input_ids[at, : len(one.ids)] = torch.tensor(one.ids)
        roles[at, : one.n_prompt] = PROMPT
        roles[at, one.n_prompt - 1] = LAST_PROMPT
        roles[at, one.n_prompt : len(one.ids)] = RESPONSE
    return Batch(input_ids, (roles != PAD).long(), roles, chosen)
