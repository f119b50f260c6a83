"""Multiple choice: chosen letters against the model's own logits, and the score of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Question
from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode
from compile_steer.scoring.answers import Request, answer
from compile_steer.scoring.base import Reply, Score
from compile_steer.scoring.model_based import letter_tokens
from compile_steer.steering.hooks import prompt_roles, steered
from compile_steer.steering.program import Program
from tests.helpers.captures import n_hooks
from tests.helpers.scoring import behaviour, make_replies, make_scorer
from tests.helpers.tiny import chat_tokenizer, intervention, loaded, program, tokenizer

FAMILY = "gemma2"
MODEL = loaded(FAMILY)
LETTERS = (("w20", "w21"), ("w30", "w31", "w32", "w33"), ("w40", "w41", "w42"))
QUESTIONS = {
    f"w{n}": Question(f"w{n} " + " ".join(f"w{50 + (n * k) % 40}" for k in range(1, 2 + n % 7)), LETTERS[n % 3], n % 2)
    for n in range(60, 84)
}
STEERING = program(FAMILY, intervention(positions="last_prompt", coefficient=3.7))
OTHER = Program((intervention(positions="last_prompt", coefficient=-4.9, seed=5),), STEERING.model, STEERING.revision)


def chosen_by_hand(question: Question, under: Program | None, text: str | None = None) -> str:
    """The likeliest letter after this prompt alone, by a plain forward pass."""
    ids = torch.tensor([encode(MODEL.tokenizer, Text(text or question.prompt)).ids])
    tokens = [int(letter[1:]) for letter in question.letters]
    with torch.no_grad():
        if under is None:
            logits = MODEL.model(input_ids=ids).logits[0, -1]
        else:
            with steered(MODEL.model, under, roles=prompt_roles(torch.ones_like(ids))):
                logits = MODEL.model(input_ids=ids).logits[0, -1]
    return question.letters[int(logits[tokens].argmax())]


def right(questions: Mapping[str, Question]) -> Score:
    return lambda replies: np.array(
        [float(r.text == questions[r.prompt].letters[questions[r.prompt].answer]) for r in replies]
    )


def test_choices_equal_those_of_each_question_alone_under_its_program() -> None:
    prompts, hooks = list(QUESTIONS), n_hooks(MODEL.model)
    programs = (None, STEERING, OTHER)
    requests = [Request(prompts), Request(prompts, STEERING), Request(prompts[3:], OTHER)]
    results = answer(MODEL, requests, right(QUESTIONS), 5, QUESTIONS)
    for request, under, result in zip(requests, programs, results, strict=True):
        expected = [chosen_by_hand(QUESTIONS[prompt], under) for prompt in request.prompts]
        assert result.texts == expected
        answers = [QUESTIONS[prompt].letters[QUESTIONS[prompt].answer] for prompt in request.prompts]
        assert list(result.scores) == [float(a == b) for a, b in zip(expected, answers, strict=True)]
        assert list(result.ended) == [1.0] * len(request.prompts)
        assert list(result.repetition) == [0.0] * len(request.prompts)
    assert results[0].texts != results[1].texts and results[0].texts[3:] != results[2].texts, (
        "steering moves some choice"
    )
    assert 0 < results[0].scores.mean() < 1
    assert n_hooks(MODEL.model) == hooks


def test_open_prompts_beside_questions_are_answered_in_full() -> None:
    prompts = ["w7 w8", "w60", "w12", "w61"]
    (result,) = answer(MODEL, [Request(prompts, STEERING)], lambda replies: np.ones(len(replies)), 6, QUESTIONS)
    completions = continue_prompts(MODEL, [Text("w7 w8"), Text("w12")], STEERING, max_new_tokens=6)
    assert [result.texts[0], result.texts[2]] == [response_text(MODEL, completion) for completion in completions]
    assert [result.texts[1], result.texts[3]] == [chosen_by_hand(QUESTIONS[p], STEERING) for p in ("w60", "w61")]


def test_a_request_with_a_changed_prompt_is_scored_by_the_plain_one() -> None:
    seen: list[str] = []

    def score(replies: Sequence[Reply]) -> np.ndarray:
        seen.extend(reply.prompt for reply in replies)
        return np.full(len(replies), 0.25)

    requests = [
        Request(["w60", "w9"], ask=lambda prompt: Text(f"{prompt} w13")),
        Request(["w61"], scored=False),
        Request(["w60"]),
    ]
    changed, sample, plain = answer(MODEL, requests, score, 4, QUESTIONS)
    assert seen == ["w60", "w9", "w60"]
    assert changed.texts[0] == chosen_by_hand(QUESTIONS["w60"], None, QUESTIONS["w60"].prompt + " w13")
    (completion,) = continue_prompts(MODEL, [Text("w9 w13")], max_new_tokens=4)
    assert changed.texts[1] == response_text(MODEL, completion)
    assert list(changed.scores) == [0.25, 0.25] and list(plain.scores) == [0.25]
    assert np.isnan(sample.scores).all() and sample.texts == [chosen_by_hand(QUESTIONS["w61"], None)]


def test_letters_must_be_different_single_tokens() -> None:
    assert letter_tokens(tokenizer(), ("w20", "w33")) == [20, 33]
    assert letter_tokens(chat_tokenizer(), ("w20", "w33")) == [20, 33]
    with pytest.raises(RecipeError, match="'w7 w8' is 2 tokens.*Use other letters"):
        letter_tokens(tokenizer(), ("w20", "w7 w8"))
    with pytest.raises(RecipeError, match="'A' is unknown; 'B' is unknown"):
        letter_tokens(tokenizer(), ("A", "B", "w9"))
    with pytest.raises(RecipeError, match="w20, w20 are not all different tokens"):
        letter_tokens(tokenizer(), ("w20", "w20"))


def items(answers: Sequence[int], letters: tuple[str, ...] = ("w20", "w21")) -> dict[str, Question]:
    return {f"validation {n}": Question(f"validation {n}", letters, answer) for n, answer in enumerate(answers)}


def test_a_choice_scores_1_for_the_right_letter() -> None:
    score = make_scorer(kind="choice").bind(MODEL, behaviour([("w20", "w21")] * 2, questions=items([0, 1])))
    assert list(score(make_replies("w20", "w21", "w20 w20", ""))) == [1.0, 0.0, 0.0, 0.0]
    assert list(score(make_replies("w20", "w21", prompt="validation 1"))) == [0.0, 1.0]


def test_data_without_questions_are_refused() -> None:
    with pytest.raises(
        RecipeError, match="1 of the 3 prompts .* are not multiple-choice questions, the first 'validation 2'"
    ):
        make_scorer(kind="choice").bind(MODEL, behaviour([("a", "b")] * 3, questions=items([0, 1])))
    with pytest.raises(RecipeError, match="'A' is unknown"):
        make_scorer(kind="choice").bind(MODEL, behaviour([("a", "b")] * 2, questions=items([0, 1], ("A", "w20"))))


def test_data_with_one_right_letter_are_refused() -> None:
    data = behaviour([("a", "b")] * 4, questions=items([0, 0, 0, 1]))
    score = make_scorer(kind="choice").bind(MODEL, data)
    stuck = [reply for n in range(4) for reply in make_replies("w20", prompt=f"validation {n}")]
    assert score(stuck).mean() == 0.75
    with pytest.raises(RecipeError, match="the right letter of all 4 questions .* is w20"):
        make_scorer(kind="choice").bind(MODEL, behaviour([("a", "b")] * 4, questions=items([0, 0, 0, 0])))


def test_steering_towards_a_letter_changes_the_choice() -> None:
    """The steering reaches the very position that chooses: towards one letter's read-out row, that letter wins."""
    head = MODEL.model.get_output_embeddings().weight
    towards = head[21].float() - head[20].float()
    towards_letter = intervention(layer=3, positions="last_prompt", coefficient=60.0)
    pushed = Program((replace(towards_letter, vector=towards / towards.norm()),), STEERING.model, STEERING.revision)
    prompts = [f"validation {n}" for n in range(6)]
    questions = {p: Question(f"w{60 + n} w{70 + n}", ("w20", "w21"), n % 2) for n, p in enumerate(prompts)}
    forward, back = answer(MODEL, [Request(prompts, pushed), Request(prompts, -pushed)], right(questions), 3, questions)
    assert forward.texts == ["w21"] * 6 and back.texts == ["w20"] * 6
    assert forward.scores.mean() == back.scores.mean() == 0.5
