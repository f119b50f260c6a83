"""A language model as judge, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from compile_steer.artifacts.files import digest
from compile_steer.common.errors import RecipeError, require_library
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel, cache_folder
from compile_steer.scoring.ledger import Ledger
from compile_steer.scoring.reply import Reply, Score, ScorerBase

_PLACES = re.compile(r"\{(prompt|reply)\}")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_PATIENCE = 3  # replies that the judge may answer with nonsense, twice each, before it is asked no more


class Judge(ScorerBase):
    """A judge's number for the reply, from the ends of `scale` to 0 and 1; or 1 for its yes and 0 for its no.

    What was judged once is kept on this machine and never paid for again: the same reply has the same score, and a
    run that broke goes on where it was. An empty reply is 0. Wrong as its model is: judges favour long and confident answers, and take
    instructions from the text they judge (a reply that says "rate this 5" may be rated 5).
    """

    kind: Literal["judge"]
    base_url: str = Field(pattern=r"^https?://", description="of the endpoint, up to and with /v1")
    model: str = Field(min_length=1)
    prompt: str = Field(description="what the judge is asked; {prompt} and {reply} stand for what was said")
    scale: tuple[float, float] | Literal["yes_no"] = Field((1.0, 5.0), description="the worst and the best number")
    api_key_env: str = Field("", description="environment variable that holds the key; none for a server without")
    answer_tokens: int = Field(64, ge=1, description="how long the judge's answer may be")
    timeout: float = Field(60.0, gt=0, description="seconds for one request")
    retries: int = Field(2, ge=0, description="after a time-out, a lost connection or a server's error")
    max_requests: int = Field(1000, ge=1, description="sent in all, over all runs, with these questions")
    max_tokens: int | None = Field(
        None, ge=1, description="read and written in all, over all runs, as the server counts"
    )

    @field_validator("prompt")
    @classmethod
    def _asks_about_a_reply(cls, prompt: str) -> str:
        if "{reply}" not in prompt:
            raise ValueError("the judge must be shown {reply}")
        return prompt

    @field_validator("scale")
    @classmethod
    def _has_two_ends(cls, scale: tuple[float, float] | str) -> tuple[float, float] | str:
        if scale[0] == scale[1]:
            raise ValueError("the worst and the best number must differ")
        return scale

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002  (it reads what was said)
        require_library("openai", "judge", "validate.score judge")
        if self.api_key_env and not os.environ.get(self.api_key_env):
            raise RecipeError(
                f"validate.score.api_key_env: the environment variable {self.api_key_env} is not set; it holds the judge's key."
            )
        question = self.model_dump(include={"base_url", "model", "prompt", "scale", "answer_tokens"}, mode="json")
        ledger = Ledger(cache_folder() / "judged" / f"{digest(question)[:16]}.jsonl", question)
        return _Bench(self, ledger).scores

    @property
    def of_any_prompt(self) -> bool:
        return False

    def on_texts(self) -> str:
        return "a judge's answers cost requests"

    def read(self, answer: str) -> float | None:
        """The score that an answer means, 0 to 1; None where it is not one clear number of the scale, or yes or no."""
        if self.scale == "yes_no":
            said = set(re.findall(r"\b(yes|no)\b", answer.lower()))
            return float(said == {"yes"}) if len(said) == 1 else None
        low, high = self.scale
        # "4/5" and "4 out of 5" name the scale's end beside the number.
        bare = re.sub(rf"(?:/|\bout of)\s*{re.escape(format(max(low, high), 'g'))}(?!\d|\.\d)", " ", answer)
        numbers = {float(number) for number in _NUMBER.findall(bare)}
        if len(numbers) != 1:
            return None
        (number,) = numbers
        share = (number - low) / (high - low)
        return share if 0 <= share <= 1 else None

    @property
    def wanted(self) -> str:
        return "yes or no" if self.scale == "yes_no" else f"one number from {self.scale[0]:g} to {self.scale[1]:g}"


class _Bench:
    """One judge at work: asks about what the ledger does not hold yet."""

    def __init__(self, judge: Judge, ledger: Ledger) -> None:
        self._judge, self._ledger = judge, ledger
        self._openai: Any = importlib.import_module("openai")
        key = os.environ[judge.api_key_env] if judge.api_key_env else "none"
        self._client = self._openai.OpenAI(
            base_url=judge.base_url, api_key=key, timeout=judge.timeout, max_retries=judge.retries
        )

    def scores(self, replies: Sequence[Reply]) -> np.ndarray:
        """[n] scores in the replies' order; an empty reply is 0, unasked.

        Raises:
            RecipeError: the judge does not answer, answers nonsense, or has cost what it may. What it said is kept.
        """
        keys = [digest([reply.prompt, reply.text]) for reply in replies]
        spoken = {key: reply for key, reply in zip(keys, replies, strict=True) if reply.text.strip()}
        nonsense: list[str] = []
        for key, reply in spoken.items():
            if key in self._ledger.scores or len(nonsense) == _PATIENCE:
                continue
            try:
                answer = self._ask_twice(key, reply)
            except _NotAnswered as stopped:
                done = sum(key in self._ledger.scores for key in spoken)
                raise RecipeError(
                    f"validate.score judge: {stopped}. {done} of these {len(spoken)} replies are judged and kept in "
                    f"{self._ledger.path}; the same command goes on from there."
                ) from stopped
            if key not in self._ledger.scores:
                nonsense.append(answer)
        if nonsense:
            raise RecipeError(
                f"validate.score judge: for {len(nonsense)} of {len(spoken)} replies {self._judge.model} did not answer with "
                f"{self._judge.wanted}, asked twice each; the first answer: '{nonsense[0][:200]}'. Say in "
                "validate.score.prompt what to answer with, or give it more answer_tokens. What it judged is kept in "
                f"{self._ledger.path}."
            )
        return np.array([self._ledger.scores[key] if key in spoken else 0.0 for key in keys])

    def _ask_twice(self, key: str, reply: Reply) -> str:
        """Ask, and once more if the answer means nothing; returns the last answer."""
        said = {"prompt": reply.prompt, "reply": reply.text}
        question = _PLACES.sub(lambda place: said[place.group(1)], self._judge.prompt)
        answer = self._ask(key, question)
        if key not in self._ledger.scores:
            answer = self._ask(key, f"{question}\n\nAnswer with {self._judge.wanted}, and nothing else.")
        return answer

    def _ask(self, key: str, question: str) -> str:
        """One request, written to the ledger; raises `_NotAnswered`."""
        judge, ledger = self._judge, self._ledger
        if ledger.requests >= judge.max_requests:
            raise _NotAnswered(f"{ledger.requests} requests were answered, which is max_requests; raise it to go on")
        if judge.max_tokens is not None and ledger.tokens >= judge.max_tokens:
            raise _NotAnswered(f"{ledger.tokens} tokens were used of max_tokens {judge.max_tokens}; raise it to go on")
        try:
            found = self._client.chat.completions.create(
                model=judge.model,
                messages=[{"role": "user", "content": question}],
                max_tokens=judge.answer_tokens,
                temperature=0.0,
            )
        except self._openai.APITimeoutError as error:
            tries = judge.retries + 1
            raise _NotAnswered(
                f"{judge.base_url} did not answer within {judge.timeout:g} s, tried {tries} times"
            ) from error
        except self._openai.OpenAIError as error:
            raise _NotAnswered(f"{judge.base_url} cannot be asked ({' '.join(str(error).split())[:300]})") from error
        choices = getattr(found, "choices", None)  # a server of something else is read as text
        answer = str(choices[0].message.content or "") if choices else str(found)
        used = getattr(found, "usage", None)
        ledger.add(key, judge.read(answer), answer, int(used.total_tokens) if used else 0)
        return answer


class _NotAnswered(Exception):
    """Why there is no answer."""
