"""Answers of many programs in one batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from compile_steer.models.text import Text
from compile_steer.scoring.answers import Request, answer
from tests.helpers.tiny import LAYERS
from tests.helpers.validation import chat_model, toward_w40


def test_the_scorer_receives_the_plain_prompt() -> None:
    seen: list[str] = []

    def score(replies: Any) -> np.ndarray:
        seen.extend(reply.prompt for reply in replies)
        return np.zeros(len(replies))

    changed = Request(["w8", "w9"], ask=lambda prompt: Text(f"{prompt} w10", history=(("w7", "w8"),)))
    (plain, _same) = answer(chat_model(), [changed, Request(["w11"])], score, 4)
    assert seen == ["w8", "w9", "w11"] and len(plain.texts) == 2


def test_some_answers_may_be_shorter_than_others() -> None:
    def score(replies: Any) -> np.ndarray:
        return np.array([float(reply.ended) for reply in replies])

    prompts = ["w8 w9", "w20 w21 w22"]
    requests = [Request(prompts, max_new_tokens=limit) for limit in (2, None, 7)]
    answers = answer(chat_model(), requests, score, 4)
    for together, limit in zip(answers, (2, 4, 7), strict=True):
        (alone,) = answer(chat_model(), [Request(prompts)], score, limit)
        assert together.texts == alone.texts and (together.scores == alone.scores).all()


def test_programs_of_several_shapes_are_answered_as_each_alone() -> None:
    clamps = toward_w40(operation="clamp", projections=torch.full((7, LAYERS), 6.5))
    first, second = clamps.program(1, 0.7, "all"), clamps.program(2, 1.2, "all")

    def score(replies: Any) -> np.ndarray:
        return np.zeros(len(replies))

    prompts = ["w8 w9", "w20 w21 w22"]
    answers = answer(chat_model(), [Request(prompts, first), Request(prompts), Request(prompts, second)], score, 4)
    for together, program in zip(answers, (first, None, second), strict=True):
        if program is None:
            (alone,) = answer(chat_model(), [Request(prompts)], score, 4)
        else:
            (alone,) = answer(chat_model(), [Request(prompts, program)], score, 4)
        assert together.texts == alone.texts
