"""A language model as judge, behind any OpenAI-compatible endpoint, and the ledger of its answers."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from compile_steer.artifacts.files import digest, parse_record
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, RecipeError, brief, library_errors, plain, require_library
from compile_steer.common.reading import Malformed, read_json_lines
from compile_steer.scoring.base import Reply, Score, ScorerBase
from compile_steer.scoring.judge_client import open_client, read_key, require_confirmed, within

if TYPE_CHECKING:
    from compile_steer.data.behaviour import Behaviour
    from compile_steer.models.load import LoadedModel

# Replies without a readable answer, after which the judge is asked no more: it would not answer the rest either.
_MAX_UNREADABLE = 3


class Judge(ScorerBase):
    """The judge's number for the reply, from the ends of `scale` to 0 and 1; or 1 for its yes and 0 for its no.

    Every answer is kept on this machine and never paid for again: the same reply has the same score, and an interrupted
    run resumes where it stopped. An empty reply is 0. Wrong as its model is: judges favour long and confident answers,
    and follow instructions in the text they judge (a reply that says "rate this 5" may be rated 5).
    """

    unfit_for_data_texts: ClassVar[str] = "a judge's answers cost requests"

    kind: Literal["judge"]
    base_url: str = Field(pattern=r"^https?://", description="of the endpoint, up to and with /v1")
    model: str = Field(min_length=1, description="the judge's name at the endpoint")
    prompt: str = Field(description="the question to the judge; {prompt} and {reply} are replaced by the texts")
    scale: tuple[float, float] | Literal["yes_no"] = Field((1.0, 5.0), description="the worst and the best number")
    api_key_env: str = Field(
        "", description="environment variable, ..._API_KEY, that holds the key; none for a server without"
    )
    answer_tokens: int = Field(64, ge=1, description="maximum length of the judge's answer")
    timeout: float = Field(60.0, gt=0, description="seconds for one request")
    retries: int = Field(2, ge=0, description="after a time-out, a lost connection or a server's error")
    max_requests: int = Field(1000, ge=1, description="total over all runs with this question")
    max_tokens: int | None = Field(None, ge=1, description="total read and written over all runs, as the server counts")

    @field_validator("prompt")
    @classmethod
    def _shows_the_reply(cls, prompt: str) -> str:
        if "{reply}" not in prompt:
            raise ValueError("the judge must be shown {reply}")
        return prompt

    @field_validator("scale")
    @classmethod
    def _has_two_ends(cls, scale: tuple[float, float] | str) -> tuple[float, float] | str:
        if scale[0] == scale[1]:
            raise ValueError("the worst and the best number must differ")
        return scale

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002
        from compile_steer.models.source import cache_folder

        require_library("openai", "judge", "validate.score judge")
        require_confirmed(self.base_url)
        key = read_key(self.api_key_env, self.base_url)
        # What may change an answer; limits and time-outs may change without losing the answers.
        settings = self.model_dump(include={"base_url", "model", "prompt", "scale", "answer_tokens"}, mode="json")
        ledger = Ledger(cache_folder() / "judged" / f"{digest(settings)[:16]}.jsonl", settings)
        client = open_client(self.base_url, key, self.timeout, self.retries)
        return lambda replies: distributed.first(lambda: self._scores(client, ledger, replies))

    @property
    def needs_no_labels(self) -> bool:
        return False

    def read(self, answer: str) -> float | None:
        """Return the score of an answer, 0 to 1; None if it is not one clear number of the scale, or yes or no."""
        if self.scale == "yes_no":
            words = set(re.findall(r"\b(yes|no)\b", answer.lower()))
            return float(words == {"yes"}) if len(words) == 1 else None
        low, high = self.scale
        # "4/5" and "4 out of 5" name the end of the scale beside the number.
        bare = re.sub(rf"(?:/|\bout of)\s*{re.escape(format(max(low, high), 'g'))}(?!\d|\.\d)", " ", answer)
        numbers = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", bare)}
        if len(numbers) != 1:
            return None
        score = (numbers.pop() - low) / (high - low)
        return score if 0 <= score <= 1 else None

    def _scores(self, client: Any, ledger: Ledger, replies: Sequence[Reply]) -> np.ndarray:
        """Return the scores [n] in the replies' order; an empty reply is 0 without a request.

        Raises:
            RecipeError: the judge does not answer, its answers cannot be read, or a limit is reached. All answers are kept.
        """
        # By content, so that the same reply in another run or under another program is the same entry.
        keys = [digest([reply.prompt, reply.text]) for reply in replies]
        written = {key: reply for key, reply in zip(keys, replies, strict=True) if reply.text.strip()}
        expected = "yes or no" if self.scale == "yes_no" else f"one number from {self.scale[0]:g} to {self.scale[1]:g}"
        known, unreadable = ledger.scores, list[str]()
        for key, reply in written.items():
            if key in known or len(unreadable) == _MAX_UNREADABLE:
                continue
            try:
                answer, score = self._ask(client, ledger, key, reply)
                if score is None:
                    reminder = f"\n\nAnswer with {expected}, and nothing else."
                    answer, score = self._ask(client, ledger, key, reply, reminder)
            except _NoAnswer as error:
                done = sum(key in ledger.scores for key in written)
                raise RecipeError(
                    f"validate.score judge: {error}. {done} of these {len(written)} replies are judged and kept in "
                    f"{ledger.path}; the same command resumes there."
                ) from error
            if score is None:
                unreadable.append(answer)
        if unreadable:
            raise RecipeError(
                f"validate.score judge: for {len(unreadable)} of {len(written)} replies {self.model} did not answer with "
                f"{expected}, asked twice each; the first answer: {brief(unreadable[0])}. State the expected answer in "
                f"validate.score.prompt, or raise answer_tokens. Its other answers are kept in {ledger.path}."
            )
        known = ledger.scores
        return np.array([known[key] if key in written else 0.0 for key in keys])

    def _ask(self, client: Any, ledger: Ledger, key: str, reply: Reply, reminder: str = "") -> tuple[str, float | None]:
        """Send one request and write its answer to the ledger; returns the answer and its score; raises `_NoAnswer`."""
        texts = {"prompt": reply.prompt, "reply": reply.text}
        # One pass over the template: text of a prompt that looks like {reply} must stay as it is.
        question = re.sub(r"\{(prompt|reply)\}", lambda place: texts[place.group(1)], self.prompt) + reminder
        # Before the request, so that the limits are never exceeded.
        if len(ledger.rows) >= self.max_requests:
            raise _NoAnswer(f"{len(ledger.rows)} requests were answered, which is max_requests; raise it to continue")
        used = sum(row.tokens for row in ledger.rows)  # unreadable answers have cost as much as others
        if self.max_tokens is not None and used >= self.max_tokens:
            raise _NoAnswer(f"{used} tokens were used of max_tokens {self.max_tokens}; raise it to continue")
        open_ai = importlib.import_module("openai")
        # Between tries the library waits, as long as the server asks.
        limit = (self.retries + 1) * self.timeout + 30 * self.retries
        request = partial(
            client.chat.completions.create,
            model=self.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=self.answer_tokens,
            temperature=0.0,  # the kept score should be the one that another request would give
        )
        try:
            with library_errors(RecipeError):
                completion = within(limit, request)
        except RecipeError as error:
            cause = error.__cause__
            if isinstance(cause, TimeoutError | open_ai.APITimeoutError):
                tries = f"within {self.timeout:g} s, tried {self.retries + 1} times"
                raise _NoAnswer(f"{self.base_url} did not answer {tries}") from error
            reason = " ".join(plain(f"{cause} {cause.__cause__ or ''}" if cause else str(error)).split())
            raise _NoAnswer(f"{self.base_url} cannot be asked ({reason[:300]})") from error
        choices = getattr(completion, "choices", None)  # a server of something else returns plain text
        answer = str(choices[0].message.content or "") if choices else str(completion)
        usage = getattr(completion, "usage", None)  # many local servers do not count tokens
        score = self.read(answer)
        ledger.add(key, score, answer, int(usage.total_tokens) if usage else 0)
        return answer, score


class _NoAnswer(Exception):
    """Why the judge gave no answer."""


@dataclass(frozen=True)
class Answer:
    """What the judge said of the reply with the key `reply`; the score is None where the answer could not be read."""

    reply: str
    score: float | None
    answer: str
    tokens: int  # that were read and written


class Ledger:
    """An append-only JSONL file: the judge's settings, then a line per answer."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises `ArtifactError` if the file cannot be read or written."""
        self.path, self.rows = path, list[Answer]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = list(read_json_lines(path)) if path.exists() else []
            unfinished = bool(lines) and not path.read_bytes().endswith(b"\n")
        except (OSError, Malformed) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); it keeps the judge's answers. Remove it.") from error
        for number, row in lines:
            # A line that is no JSON is one in which a writer was stopped. The first has the settings.
            if isinstance(row, dict) and "reply" in row:
                self.rows.append(parse_record(row, Answer, f"{path}, line {number} is damaged", "Remove this line."))
        if not lines:
            self._append(json.dumps({"judge": settings}, ensure_ascii=False) + "\n")
        elif unfinished:
            self._append("\n")  # so that the next answer is not joined to a line that was cut off

    @property
    def scores(self) -> dict[str, float]:
        """The last score of each reply by its key."""
        return {row.reply: row.score for row in self.rows if row.score is not None}

    def add(self, key: str, score: float | None, answer: str, tokens: int) -> None:
        """Keep one answer about the reply `key`; a score of None is an unreadable answer."""
        self.rows.append(Answer(key, score, answer, tokens))
        self._append(json.dumps(asdict(self.rows[-1]), ensure_ascii=False) + "\n")

    def _append(self, text: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ArtifactError(
                f"{self.path} cannot be written ({error.strerror}); it keeps the judge's answers."
            ) from error
