"""Texts of many lengths, made of short ones: conversations of several turns, and prompts that begin with other texts.

A model is used behind system prompts, documents and earlier turns, and a compile must hold there too. To have every answer
written behind its own long context would take longer than the rest of a compile. It need not be: where distributions are
compared token by token, an answer that was written to its prompt alone can be read behind others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

from compile_steer.common.errors import RecipeError
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode

_ROUNDS = 3
SHORTEST = 16  # tokens; a text that is longer by itself stays as it is


def in_contexts(
    loaded: LoadedModel,
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    longest: int,
    seed: int,
    *,
    every_alone: bool = False,
) -> list[Encoded]:
    """Every second text alone, and the others joined to contexts of log-uniform lengths, at most `longest` tokens.

    Each of the others is in `_ROUNDS` contexts with others around it; its response is the last one or that of an earlier turn. The
    first context of a round is as long as it may be, for among so few none that is nearly so might be drawn. In every second
    context of several texts all but the last are no turns but plain text before its prompt, as a document is.

    Args:
        encoded: the texts' own tokens.
        every_alone: these others too, besides their contexts.
    """
    longest, generator = min(longest, loaded.positions or longest), random.Random(seed)
    numbers = list(range(len(texts)))
    generator.shuffle(numbers)
    alone, others = numbers if every_alone else numbers[::2], numbers[1::2]
    contexts = [encoded[n] for n in alone]
    for _round in range(_ROUNDS):
        generator.shuffle(others)
        waiting, length = list(others), float(longest)
        while waiting:
            group = [waiting.pop()]
            context, as_document = encoded[group[0]], len(contexts) % 2 == 1
            while waiting:
                larger = _joined(loaded, [texts[n] for n in (*group, waiting[-1])], as_document=as_document)
                if len(larger.ids) > length:
                    break
                group.append(waiting.pop())
                context = larger
            if len(group) > 1 or _round == 0:
                contexts.append(context)
            length = SHORTEST * (max(longest, SHORTEST) / SHORTEST) ** generator.random()
    generator.shuffle(contexts)  # one in five is held out, of every kind
    return contexts


def long_context(
    loaded: LoadedModel, texts: Sequence[Text], documents: Sequence[Text], tokens: int, seed: int
) -> Encoded:
    """A conversation of `texts` in about `tokens` tokens, at most; `documents` fill it up, spread before its prompts."""
    generator, filling = random.Random(seed), cycle(documents)
    order = list(texts)
    generator.shuffle(order)
    for _skipped in range(seed % max(1, len(documents))):
        next(filling)
    turns: list[Text] = []
    total = 0
    for number, text in enumerate(order):
        parts = [text.prompt]
        while documents and total + _size(loaded, parts, text) < tokens * number / len(order):
            document = next(filling)
            parts.insert(0, f"{document.prompt}\n{document.response}")
        size = _size(loaded, parts, text)
        if turns and total + size > tokens:
            break
        total += size
        turns.append(replace(text, prompt="\n\n".join(parts)))
    return _joined(loaded, turns, as_document=False)


def _size(loaded: LoadedModel, parts: Sequence[str], text: Text) -> int:
    return len(encode(loaded.tokenizer, replace(text, prompt="\n\n".join(parts))).ids)


def _joined(loaded: LoadedModel, texts: Sequence[Text], *, as_document: bool) -> Encoded:
    *earlier, last = texts
    turns = [turn for text in earlier for turn in (*text.history, (text.prompt, text.response))]
    if not as_document:
        try:
            return encode(loaded.tokenizer, replace(last, history=(*turns, *last.history)))
        except RecipeError:  # the model has no template, or one that has no conversations of several turns
            pass
    document = "\n\n".join(f"{prompt}\n{response}" for prompt, response in turns)
    return encode(loaded.tokenizer, replace(last, prompt=f"{document}\n\n{last.prompt}"))
