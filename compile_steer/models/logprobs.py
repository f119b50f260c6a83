"""Log-probabilities of texts, and the KL divergence between two models' next-token distributions. All in nats.

A batch of logits is tokens x vocabulary, often gigabytes. So models are compared at their final hidden states
[n_tokens, d_model], and logits exist for one chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compile_steer.common import distributed
from compile_steer.models.forward import lm_head
from compile_steer.models.kept_passes import kept_or_compared, kept_or_made
from compile_steer.models.load import LoadedModel
from compile_steer.models.packing import PackedBatch, pack
from compile_steer.models.shared_blocks import final_hidden
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import Batch, Encoded, encode
from compile_steer.steering.hooks import LAST_PROMPT, RESPONSE
from compile_steer.steering.layout import Layout
from compile_steer.steering.program import Program

# Logits exist for a chunk of tokens: at most so many, and so many bytes in float32. A vocabulary of 262,144 has 24 to a chunk.
CHUNK_TOKENS, CHUNK_BYTES = 128, 24 * 2**20
_FAR = 40.0  # of logits: e^40 times the least that float32 holds, e^-87, is still nothing


@dataclass(frozen=True)
class TokenDivergence:
    """KL(p || q) of each token, [n] in nats, and whether p and q have the same most likely token, [n]."""

    kl: Tensor
    same_top1: Tensor

    @property
    def mean(self) -> float:
        return float(self.kl.mean())

    @property
    def rms(self) -> float:
        """Root mean square over tokens: a few broken tokens that a mean hides show here."""
        return float(self.kl.square().mean().sqrt())

    @property
    def p99(self) -> float:
        return float(self.kl.quantile(0.99))

    @property
    def top1_agreement(self) -> float:
        return float(self.same_top1.double().mean())


def divergence(model_p: nn.Module, hidden_p: Tensor, model_q: nn.Module, hidden_q: Tensor) -> TokenDivergence:
    """`own_divergence` of states that every process has: each compares a part of the tokens."""
    size = -(-len(hidden_p) // distributed.count())
    part = slice(size * distributed.rank(), size * (distributed.rank() + 1)) if distributed.count() > 1 else slice(None)
    own = own_divergence(model_p, hidden_p[part], model_q, hidden_q[part])
    cpu = own.kl.device
    return TokenDivergence(distributed.concatenate([own.kl], cpu), distributed.concatenate([own.same_top1], cpu))


def compare_models(p: LoadedModel, hidden_p: Tensor, q: LoadedModel, hidden_q: Tensor) -> TokenDivergence:
    """`divergence` of two models, from an earlier run where both keep their passes."""

    def compare() -> tuple[Tensor, Tensor]:
        compared = divergence(p.model, hidden_p, q.model, hidden_q)
        return compared.kl, compared.same_top1

    return TokenDivergence(*kept_or_compared([(p, hidden_p), (q, hidden_q)], compare))


def own_divergence(model_p: nn.Module, hidden_p: Tensor, model_q: nn.Module, hidden_q: Tensor) -> TokenDivergence:
    """Compare two models' next-token distributions at final hidden states [n, d_model], chunk by chunk."""
    kl, same_top1 = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.bool)]
    with torch.no_grad():
        for part in chunks(len(hidden_p), model_p):
            logits_p, logits_q = lm_head(model_p, hidden_p[part]), lm_head(model_q, hidden_q[part])
            same_top1.append((logits_p.argmax(dim=-1) == logits_q.argmax(dim=-1)).cpu())
            kl.append(kl_divergence(logits_p, logits_q).cpu())
    return TokenDivergence(torch.cat(kl), torch.cat(same_top1))


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q), [n] in nats and float64, from logits [n, vocab].

    Of d = logits_q - logits_p, less its mean under p, it is log E_p[e^d]. Taken as log(1 + E_p[e^d - 1]) that keeps its digits
    in float32 however near p and q are. The difference of float32 log-probabilities does not: its rounding alone gives about
    1e-7 nats, more than an exact compile.
    """
    p, d = torch.softmax(logits_p.float(), dim=-1), logits_q.float() - logits_p.float()
    d -= torch.linalg.vecdot(p, d).unsqueeze(-1)
    left = torch.linalg.vecdot(p, d).double()  # of the mean, by rounding
    far = ~(d.amax(dim=-1) < _FAR)
    kl: Tensor = torch.log1p(torch.linalg.vecdot(p, d.expm1_()).double()) - left
    if far.any():
        log_p, log_q = (torch.log_softmax(logits[far].double(), dim=-1) for logits in (logits_p, logits_q))
        kl[far] = log_p.exp().mul_(log_p - log_q).sum(dim=-1)
    return kl.clamp_(min=0.0)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in at least float32."""
    return torch.log_softmax(logits.float(), dim=-1)


def chunks(n: int, model: nn.Module) -> Iterator[slice]:
    """Slices that cover n tokens, each of so few that their logits by `model` take little memory."""
    vocabulary = Layout.of(model).model.get_output_embeddings().weight.shape[0]
    size = max(1, min(CHUNK_TOKENS, CHUNK_BYTES // (4 * vocabulary)))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def token_logprobs(model: nn.Module, states: Tensor, targets: Tensor, rows: Tensor | None = None) -> Tensor:
    """Log-probability of each of k target tokens, [k] in nats; differentiable.

    Args:
        states: final hidden states, [n, d_model].
        targets: token ids, [k].
        rows: the state that predicts each target, [k]; None if k = n and target i is predicted by state i.
    """

    def of_chunk(states: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        if not shared:
            return log_softmax(lm_head(model, states))[rows, targets]
        # Equal but for the last bit, by which the numbers of validation reports would change.
        logits = lm_head(model, states).float()
        return logits[rows, targets] - logits.logsumexp(dim=-1)[rows]

    shared = rows is not None
    rows = torch.arange(len(states), device=states.device) if rows is None else rows
    result = torch.empty(len(targets), device=states.device)
    for part in chunks(len(states), model):
        here = ((rows >= part.start) & (rows < part.stop)).nonzero()[:, 0]
        inputs = (states[part], targets[here], rows[here] - part.start)
        # With gradients, a chunk's logits are computed again in the backward pass rather than kept.
        grad = torch.is_grad_enabled()
        result[here] = checkpoint(of_chunk, *inputs, use_reentrant=False) if grad else of_chunk(*inputs)
    return result


def response_logprobs(model: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
    """Log p(response) of each row, [batch] in nats, from the final states [batch, time, d_model]; differentiable."""
    chosen = batch.predicts_response
    targets = torch.roll(batch.input_ids, -1, dims=1)[chosen]
    sums = torch.zeros(len(chosen), device=hidden.device)
    return sums.index_add(0, chosen.nonzero()[:, 0], token_logprobs(model, hidden[chosen], targets))


def packed_logprobs(model: nn.Module, batch: PackedBatch, states: Tensor) -> tuple[Tensor, Tensor]:
    """The texts of a batch that have a response, [k], and the mean log-probability of its tokens, [k] in nats a token.

    `states` are the batch's final hidden states, [rows * time, d_model].
    """
    with torch.no_grad():
        logprobs = token_logprobs(model, states[batch.nodes], batch.targets, batch.rows)
    texts, owner, count = batch.texts.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(texts), device=logprobs.device).index_add_(0, owner, logprobs)
    return texts.cpu(), (sums / count).double().cpu()


def mean_logprobs(loaded: LoadedModel, encoded: Sequence[Encoded], program: Program | None = None) -> np.ndarray:
    """Mean log-probability of each text's response tokens, [n] in nats a token, steered by `program` if given."""

    def run() -> tuple[Tensor]:
        result, own = torch.zeros(len(encoded), dtype=torch.float64), distributed.share(range(len(encoded)))
        for batch in pack(loaded, [encoded[row] for row in own]):
            states = final_hidden(loaded, batch, program).flatten(end_dim=1)
            texts, means = packed_logprobs(loaded.model, batch, states)
            result[torch.tensor(own)[texts]] = means
        distributed.sum_over_all(result)
        return (result,)

    (result,) = kept_or_made(loaded, encoded, program, run, of="mean log p")
    return result.numpy()


def encode_pairs(loaded: LoadedModel, pairs: Sequence[Pair]) -> list[Encoded]:
    """Encode both sides of n pairs under their plain prompts: n positives, then n negatives.

    The margin measures what the model would rather *say* to the same prompt, so an instruction that a template adds
    for extraction is left out here.
    """
    sides = [Text(p.prompt, p.positive.response) for p in pairs] + [Text(p.prompt, p.negative.response) for p in pairs]
    return [encode(loaded.tokenizer, side) for side in sides]


def margins(logprobs: np.ndarray) -> np.ndarray:
    """Log-likelihood margins [n], positive minus negative, from the mean log-probabilities [2n] of `encode_pairs`."""
    return np.asarray(np.subtract(*np.split(logprobs, 2)))


def logprob_margins(loaded: LoadedModel, pairs: Sequence[Encoded], program: Program | None = None) -> np.ndarray:
    """Log-likelihood margin of each of n encoded pairs, [n] in nats a token, steered by `program` if given."""
    return margins(mean_logprobs(loaded, pairs, program))


@dataclass(frozen=True)
class FinalStates:
    """Final hidden states of some texts, [n_tokens, d_model], text after text."""

    # Apart, because a chat template's tokens are the same in every prompt, and would flatter a mean.
    response: Tensor  # where a response token is predicted
    prompt: Tensor  # at all other tokens; what several texts begin with is here once
    repeats: Tensor  # how many tokens of the texts each of these is
    # Of each of the response's positions, [n_tokens]: index of the text, number of the response in it, and tokens read so far.
    texts: Tensor
    turns: Tensor
    before: Tensor

    def first(self, count: int) -> Tensor:
        """`response` of the first `count` texts."""
        return self.of_texts(0, count)

    def of_texts(self, start: int, stop: int) -> Tensor:
        """`response` of the texts `start` to `stop` - 1."""
        return self.response[((self.texts >= start) & (self.texts < stop)).to(self.response.device)]


def final_states(loaded: LoadedModel, encoded: Sequence[Encoded], program: Program | None = None) -> FinalStates:
    """Run the whole model, steered by `program` if given, and return the real tokens' final hidden states."""
    made = kept_or_made(loaded, encoded, program, lambda: _final_states(loaded, encoded, program), of="final states")
    response, prompt, *others = made
    return FinalStates(response.to(loaded.device), prompt.to(loaded.device), *others)


def _final_states(loaded: LoadedModel, encoded: Sequence[Encoded], program: Program | None) -> tuple[Tensor, ...]:
    """The fields of `FinalStates`."""
    response, prompt, places, owners = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    own, (given, repeats) = distributed.share(range(len(encoded))), _given_tokens(encoded)
    for batch in pack(loaded, [encoded[row] for row in own]):
        final = final_hidden(loaded, batch, program).flatten(end_dim=1)
        for text, path in batch.paths.items():
            roles = torch.tensor(encoded[own[text]].roles)
            predicts = functional.pad(roles[1:] == RESPONSE, (0, 1))  # the last token has none to predict
            response.append(final[path[predicts.to(path.device)]])
            prompt.append(final[path[given[own[text]].to(path.device)]])
            turns, before = (roles == LAST_PROMPT).cumsum(dim=0)[predicts], predicts.nonzero()[:, 0] + 1
            places.append(torch.stack([torch.full_like(before, own[text]), turns, before], dim=1))
            owners.append(torch.full((len(prompt[-1]),), own[text]))
    at, cpu = loaded.device, torch.device("cpu")
    # In the order of the texts, however they were packed and shared.
    every = distributed.concatenate(places, cpu)
    order, of_prompt = (which.argsort(stable=True) for which in (every[:, 0], distributed.concatenate(owners, cpu)))
    states = distributed.concatenate(response, at)[order.to(at)], distributed.concatenate(prompt, at)[of_prompt.to(at)]
    return *states, repeats, *every[order].unbind(dim=1)


def _given_tokens(encoded: Sequence[Encoded]) -> tuple[list[Tensor], Tensor]:
    """The positions of each text that predict no response token, without those that an earlier text begins with too; and how
    many texts have each, [n]."""
    beginnings, counts, positions = dict[tuple[int, int, int], int](), dict[int, int](), list[Tensor]()
    for text in encoded:
        roles, read, own = text.roles, -1, list[int]()
        for place, (token, role) in enumerate(zip(text.ids, roles, strict=True)):
            read = beginnings.setdefault((read, token, role), len(beginnings))  # the number of what was read so far
            if roles[place + 1 : place + 2] != [RESPONSE]:
                own += [place] if read not in counts else []
                counts[read] = counts.get(read, 0) + 1
        positions.append(torch.tensor(own, dtype=torch.long))
    return positions, torch.tensor(list(counts.values()))


def mean_at_prompts(p: LoadedModel, states_p: FinalStates, q: LoadedModel, states_q: FinalStates) -> float:
    """Mean KL(p || q) at the tokens that predict no response, from the final states of both on the same texts."""
    kl = compare_models(p, states_p.prompt, q, states_q.prompt).kl
    return float(kl @ states_q.repeats.to(kl)) / int(states_q.repeats.sum())


def answer_logprobs(model: nn.Module, encoded: Sequence[Encoded], states: FinalStates) -> np.ndarray:
    """Log p of the last response of each text, [n] in nats, from the texts' final states; those of earlier turns are given."""
    result = torch.zeros(len(encoded), dtype=torch.float64)
    with torch.no_grad():
        for row, text in distributed.share(list(enumerate(encoded))):
            targets = torch.tensor(text.ids[text.n_prompt :], device=states.response.device)
            of_text = states.of_texts(row, row + 1)
            result[row] = token_logprobs(model, of_text[len(of_text) - len(targets) :], targets).double().sum()
    distributed.sum_over_all(result)
    return result.numpy()
