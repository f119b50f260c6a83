"""Score the same pairs and control texts under many programs, computing what the programs share only once.

Shared are the blocks below the first steered one, the tokens that several texts begin with, and the vocabulary at
every position that predicts no response. Programs of one shape run as rows of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compile_steer.common import distributed
from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import encode_pairs, margins, own_divergence, packed_logprobs
from compile_steer.models.packing import BATCH_TOKENS, pack
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.scoring.questions import PlainQuestion, answer_texts, right_answers
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program


class ContrastEvaluator:
    """Contrast pairs, control texts and plain questions, with the base's scores of them."""

    def __init__(
        self,
        loaded: LoadedModel,
        pairs: Sequence[Pair],
        control_texts: Sequence[Text] = (),
        questions: Sequence[PlainQuestion] = (),
    ) -> None:
        self._pairs = PrefixCache(loaded, encode_pairs(loaded, pairs))
        self._control = PrefixCache(loaded, [encode(loaded.tokenizer, text) for text in control_texts])
        self._questions, texts = questions, [text for question in questions for text in answer_texts(question)]
        self._answers = PrefixCache(loaded, [encode(loaded.tokenizer, text) for text in texts])
        # The base is scored once, before any block is skipped.
        self.base_margins = margins(self._pairs.mean_logprobs([None])[0])
        self._base_control = self._control.mean_logprobs([None])[0]
        self.base_right = self.right_answers(None)

    def advance(self, program: Program) -> None:
        """Cache the blocks below `program`; no later program may act below it."""
        self._pairs.advance(program.first_layer)
        self._control.advance(program.first_layer)
        self._answers.advance(program.first_layer)

    def effects(self, programs: Sequence[Program]) -> np.ndarray:
        """[n_programs, n_pairs] change of the log-likelihood margin, in nats per token."""
        steered_margins = [margins(logprobs) for logprobs in self._pairs.mean_logprobs(programs)]
        values = np.array(steered_margins).reshape(len(programs), len(self.base_margins))
        return np.asarray(values - self.base_margins)

    def perplexity_ratio(self, program: Program) -> float:
        """Perplexity of control text under `program` over the base's, as the geometric mean over texts."""
        return float(np.exp(self.log_perplexity(program).mean()))

    def log_perplexity(self, program: Program) -> np.ndarray:
        """[n_texts] log of the ratio of each control text alone."""
        if not len(self._base_control):
            raise ValueError("this evaluator has no control texts")
        # Differences of mean log-probabilities, so that long texts do not outweigh short ones.
        return np.asarray(self._base_control - self._control.mean_logprobs([program])[0])

    def right_answers(self, program: Program | None) -> np.ndarray:
        """[n_questions] how much of the likelihood of right and wrong answers is the right one's, 0 to 1."""
        return right_answers(self._answers.mean_logprobs([program])[0], self._questions)

    def lost_answers(self, program: Program) -> float:
        """How much less that is than the base's, on average; 0 without questions."""
        return float((self.base_right - self.right_answers(program)).mean()) if self._questions else 0.0

    def divergence(self, program: Program) -> float:
        """KL(steered || base) on the responses of control texts, in nats per token."""
        return self._control.divergence(program)


class PrefixCache:
    """Texts whose hidden states at the input of one block are kept. The block only moves up, so a sweep goes upwards."""

    def __init__(self, loaded: LoadedModel, encoded: Sequence[Encoded]) -> None:
        self._loaded, self._n, self._layer = loaded, len(encoded), 0
        # Neighbours in lexicographic order share the most tokens, so that a process has some of them in a row.
        size, order = -(-len(encoded) // distributed.count()), sorted(range(len(encoded)), key=lambda i: encoded[i].ids)
        self._own = sorted(order[size * distributed.rank() :][:size]) if distributed.count() > 1 else sorted(order)
        own = [encoded[row] for row in self._own]
        self._batches = pack(loaded, own)
        self._hidden: list[Tensor | None] = [None] * len(self._batches)

    def advance(self, layer: int) -> None:
        """Move the kept states up to the input of block `layer`, so that the blocks below it are not run again."""
        if layer < self._layer:
            raise ValueError(f"the cached states are at block {self._layer}; they cannot go back to {layer}")
        if layer > self._layer:
            self._hidden = [self._run(index, 1, stop=layer) for index in range(len(self._batches))]
            self._layer = layer

    def mean_logprobs(self, programs: Sequence[Program | None]) -> np.ndarray:
        """Mean log-probability of each response, [n_programs, n] in nats per token; None is the base.

        Raises:
            ValueError: a program acts below the cached states.
        """
        for program in programs:
            if program is not None and program.first_layer < self._layer:
                raise ValueError(f"the cached states at block {self._layer} are above {program.describe()}")
        # Rows of one batch share the pattern of hooks; programs of several shapes run one by one.
        same_shape = len({None if program is None else program.shape for program in programs}) == 1
        result = torch.zeros(len(programs), self._n, dtype=torch.float64)
        for index, batch in enumerate(self._batches):
            width = max(1, BATCH_TOKENS // batch.roles.numel()) if same_shape else 1
            for start in range(0, len(programs), width):
                for row, states in enumerate(self._states(index, programs[start : start + width]), start):
                    texts, means = packed_logprobs(self._loaded.model, batch, states)
                    result[row, torch.tensor(self._own)[texts]] = means
        distributed.sum_over_all(result)
        return result.numpy()

    def divergence(self, program: Program) -> float:
        """KL(steered || base), the mean over the positions that predict the responses, in nats per token."""
        model, parts = self._loaded.model, []
        for index, batch in enumerate(self._batches):
            # Only where a response token is predicted: logits elsewhere would cost the most and say nothing.
            base, states = (self._states(index, [each])[0][batch.nodes] for each in (None, program))
            parts.append(own_divergence(model, states, model, base).kl)
        return float(distributed.concatenate(parts, torch.device("cpu")).mean())

    def _states(self, index: int, programs: Sequence[Program | None]) -> Tensor:
        """Final hidden states [n_programs, rows * time, d_model] of a batch; either all programs are None, or none is."""
        batch, n = self._batches[index], len(programs)
        # Each program has all the rows of the batch, one program after the other.
        per_row = [program for program in programs if program is not None for _row in batch.roles]
        chosen = programs[0] if n == 1 else per_row  # one program for the whole batch needs one vector only
        with steered(self._loaded.model, chosen, roles=batch.roles.repeat(n, 1)):
            hidden = self._run(index, n)
        return hidden.reshape(n, batch.roles.numel(), -1)

    def _run(self, index: int, copies: int, stop: int | None = None) -> Tensor:
        batch, kept = self._batches[index], self._hidden[index]
        with torch.no_grad():
            return run_blocks(
                self._loaded.model,
                batch.input_ids.repeat(copies, 1),
                batch.attention_mask.repeat(copies, *[1] * (batch.attention_mask.ndim - 1)),
                position_ids=None if batch.position_ids is None else batch.position_ids.repeat(copies, 1),
                start=self._layer,
                stop=stop,
                hidden=None if kept is None else kept.repeat(copies, 1, 1),
            )
