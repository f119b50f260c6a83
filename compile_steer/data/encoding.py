"""What a model's tokenizer and chat template make of the data, looked at before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from compile_steer.common.errors import RecipeError, brief, several
from compile_steer.data.behaviour import SIDES, SPLITS, Behaviour
from compile_steer.models.text import Text

if TYPE_CHECKING:
    from compile_steer.models.load import LoadedModel
    from compile_steer.models.tokens import Encoded


def check_texts(
    loaded: LoadedModel, data: Behaviour, new_tokens: Mapping[str, int] = MappingProxyType({})
) -> tuple[str, ...]:
    """Encode all data once; returns what a reader of the measurements should know.

    Args:
        new_tokens: how long an answer to the prompts of a part may be, by the part's name.

    Raises:
        RecipeError: a text that the chat template refuses, changes or drops, or that is longer than what the model has
            learned; a pair whose sides are the same tokens (some tokenizers drop case, accents or spaces).
    """
    from compile_steer.models.chat import open_reasoning  # not with the module: they import torch

    notes, problems = [*data.notes, open_reasoning(loaded.tokenizer)], []
    pairs = {name: data.split(name) for name in SPLITS} | {"other_behaviour": data.other_behaviour}
    parts = {name: [side for pair in part for side in (pair.positive, pair.negative)] for name, part in pairs.items()}
    parts |= {name: list(getattr(data, name)) for name in ("neutral", "heldout", "calibration")}
    for name, texts in parts.items():
        keys = SIDES if name in pairs else ("response",)
        section = "validate.other_behaviour" if name == "other_behaviour" else f"data.{name}"
        rows = data.places.get(name, [section] * (len(texts) // len(keys)))
        places = [(row, key) for row in rows for key in keys]
        encoded, note, wrong = _encode_part(loaded, section, texts, places, new_tokens.get(name, 0))
        notes.append(note)
        problems += several(list(dict.fromkeys(wrong)))
        if not wrong and name in pairs:
            sides = zip(pairs[name], rows, encoded[::2], encoded[1::2], strict=True)
            same = [
                (pair, row)
                for pair, row, positive, negative in sides
                if positive == negative and pair.positive.response
            ]
            if same:
                pair, row = same[0]
                place = "" if row == section else f"{row}, "
                problems.append(
                    f"{section}: the two sides of {len(same)} of {len(pairs[name])} pairs are the same tokens for this "
                    f"model, for example {brief(pair.positive.response)} and {brief(pair.negative.response)} ({place}prompt "
                    f"{brief(pair.prompt)}). Remove them, or make the sides differ in more than the tokenizer drops."
                )
    if problems:
        raise RecipeError(problems)
    return tuple(note for note in notes if note)


def _encode_part(
    loaded: LoadedModel, section: str, texts: Sequence[Text], places: Sequence[tuple[str, str]], new_tokens: int
) -> tuple[list[Encoded], str, list[str]]:
    """Return a part's texts as tokens, a remark on them ('' if there is nothing to say), and their problems.

    Args:
        places: the row of each text, "train.jsonl:2", and the key of its response there.
    """
    from compile_steer.models.tokens import encode_checked, too_long

    encoded, problems, apart = [], [], []
    far = loaded.positions and 16 * loaded.positions + 1000  # characters; a token has about four
    for text, (place, key) in zip(texts, places, strict=True):
        # Of a text that is far too long its start says so, in a fraction of the time.
        start = Text(text.prompt[:far], text.response[:far])
        cut = far and start != replace(text, history=(), system="")
        try:
            tokens, joined = encode_checked(loaded.tokenizer, start if cut else text)
            if cut and len(tokens.ids) <= (loaded.positions or 0):
                cut, (tokens, joined) = False, encode_checked(loaded.tokenizer, text)
        except RecipeError as error:
            lines = (line.removeprefix("data: ") for line in error.problems)
            problems += [
                f"{place}: {f'{key}: ' + line[10:] if line.startswith('response: ') else line}" for line in lines
            ]
            continue
        encoded.append(tokens)
        if not tokens.n_prompt:
            problems.append(f"{place}: the model's tokenizer makes no token of the prompt {brief(text.prompt)}.")
        apart += [] if joined else [text]
        if loaded.positions is not None and max(len(tokens.ids), tokens.n_prompt + new_tokens) > loaded.positions:
            long = "prompt" if tokens.n_prompt + new_tokens > loaded.positions else f"prompt and {key}"
            problems.append(f"{place}: {long}: {too_long(loaded, tokens, new_tokens, 'at least ' if cut else '')}")
    note = apart and (
        f"{section}: of {len(apart)} of {len(texts)} texts the model's tokenizer makes other tokens where prompt and "
        f"response are encoded at once, as it does of {brief(apart[0].prompt)} with {brief(apart[0].response)}. They are "
        "encoded apart, as a model that answers sees its prompt."
    )
    return encoded, note or "", problems
