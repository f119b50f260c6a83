"""Batches of texts in which the tokens that several texts begin with are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch
from torch import Tensor

from compile_steer.models.forward import shares_rows
from compile_steer.models.load import LoadedModel
from compile_steer.models.tokens import Encoded, require_room
from compile_steer.steering.hooks import PAD, RESPONSE

# Attention costs time^2: past a few hundred tokens a longer row costs more than computing the template again.
_ROW_TOKENS = 512
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class PackedBatch:
    """A batch of rows that hold several texts each. `input_ids`, `roles` and `position_ids` are [rows, time].

    `attention_mask` is [rows, 1, time, time], 0 or the lowest number (added to the attention scores). Where each row is one
    text it is [rows, time], and `position_ids` is None: the model counts positions as it does alone. Response token i of the
    batch is `targets[i]`, of text `texts[i]`, and is predicted at the flat position `nodes[rows[i]]`; a position that predicts
    tokens of several texts is in `nodes` once. `paths` has the flat position of every token of each text.
    """

    input_ids: Tensor
    roles: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor
    nodes: Tensor
    rows: Tensor
    targets: Tensor
    texts: Tensor
    paths: dict[int, Tensor]

    def to(self, device: torch.device) -> PackedBatch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, paths={text: path.to(device) for text, path in self.paths.items()})


@dataclass
class _Row:
    """Texts that share their beginnings: a tree of tokens, flattened in the order in which the texts were added."""

    ids: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)

    def add(self, index: int, tokens: Sequence[tuple[int, int]], shared: Sequence[int]) -> list[int]:
        """Add a text, ids with their roles, whose first tokens are the nodes `shared`; returns the nodes of all its tokens."""
        new, size = tokens[len(shared) :], len(self.ids)
        path = self.paths[index] = [*shared, *range(size, size + len(new))]
        self.ids += [token for token, _role in new]
        self.roles += [role for _token, role in new]
        self.depths += range(len(shared), len(tokens))
        return path


def pack(loaded: LoadedModel, texts: Sequence[Encoded]) -> list[PackedBatch]:
    """Pack texts into rows so that tokens that several texts begin with are computed once.

    A chat template opens every text with the same tokens, and both sides of a pair have the same prompt. A token attends
    to the tokens before it in its own text (a mask of ancestors) and has its own place in it (position ids), so this is
    the same mathematics as one text per row, but in models whose blocks pass a state on from token to token: there, and where
    a text is longer than a row or than the attention's window, it has a row of its own.

    Raises `RecipeError` for a text that is longer than what the model has learned.
    """
    require_room(loaded, texts)
    limit = min(_ROW_TOKENS, _window(loaded) or _ROW_TOKENS)
    if len(texts) < 2 or not shares_rows(loaded.model):
        limit = 0
    # In lexicographic order texts with a common beginning are neighbours.
    tokens = [list(zip(text.ids, text.roles, strict=True)) for text in texts]
    short = sorted((i for i, text in enumerate(tokens) if len(text) <= limit), key=tokens.__getitem__)
    alone = _fill_rows(tokens, [i for i, text in enumerate(tokens) if len(text) > limit], 0)
    rows = _fill_rows(tokens, short, _ROW_TOKENS)
    if rows:
        # A batch is as long as its longest row: find the lowest limit that needs no more rows.
        low, high = max(len(row.ids) for row in rows) // 2, max(len(row.ids) for row in rows)
        while high - low > 8:
            middle = (low + high) // 2
            low, high = (low, middle) if len(_fill_rows(tokens, short, middle)) == len(rows) else (middle, high)
        rows = _fill_rows(tokens, short, high)
    dtype = loaded.model.dtype
    batches = [_batch(group, texts, loaded.pad_id, dtype) for group in _grouped(rows)]
    batches += [_batch(group, texts, loaded.pad_id, None) for group in _grouped(alone)]
    return [batch.to(loaded.device) for batch in batches]


def _grouped(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows of similar length, in groups of at most `BATCH_TOKENS` padded tokens."""
    groups = list[list[_Row]]()
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if not groups or (len(groups[-1]) + 1) * len(row.ids) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return groups


def _window(loaded: LoadedModel) -> int | None:
    """How far back the model's attention sees in some block; None where it sees all."""
    config = loaded.model.config.get_text_config()  # of a wrapper, the language model's
    used = getattr(config, "use_sliding_window", True)  # Qwen has a window in its config and a flag that turns it off
    sizes = [getattr(config, "sliding_window", None) if used else None, getattr(config, "attention_chunk_size", None)]
    return min((size for size in sizes if size), default=None)


def _fill_rows(texts: Sequence[list[tuple[int, int]]], order: Sequence[int], limit: int) -> list[_Row]:
    """Fill one row after the other with up to `limit` tokens, or one text. `order` is lexicographic, so that the longest
    beginning that a text shares with its row is the one that it shares with the text before it."""
    rows, path, before = list[_Row](), list[int](), list[tuple[int, int]]()
    for index in order:
        tokens = texts[index]
        pairs = zip(before, tokens, strict=False)
        shared = path[: sum(1 for _pair in takewhile(lambda pair: pair[0] == pair[1], pairs))]
        if not rows or len(rows[-1].ids) + len(tokens) - len(shared) > limit:
            rows.append(_Row())
            shared = []
        path, before = rows[-1].add(index, tokens, shared), tokens
    return rows


def _batch(rows: Sequence[_Row], texts: Sequence[Encoded], pad_id: int, dtype: torch.dtype | None) -> PackedBatch:
    time = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), time), pad_id, dtype=torch.long)
    roles = torch.full((len(rows), time), PAD, dtype=torch.int8)
    positions = torch.zeros(len(rows), time, dtype=torch.long)
    own_mask = dtype is not None
    # Padding sees itself: no empty softmax.
    visible = torch.eye(time if own_mask else 0, dtype=torch.bool).repeat(len(rows), 1, 1)
    predicted, paths = list[tuple[int, int, int]](), dict[int, Tensor]()
    for number, row in enumerate(rows):
        n = len(row.ids)
        ids[number, :n] = torch.tensor(row.ids)
        roles[number, :n] = torch.tensor(row.roles, dtype=torch.int8)
        positions[number, :n] = torch.tensor(row.depths)
        for index, path in row.paths.items():
            text, nodes = texts[index], torch.tensor(path)
            paths[index] = nodes + number * time
            if own_mask:  # a token attends to itself and to those before it in its text
                before = torch.ones(len(path), len(path), dtype=torch.bool).tril()
                visible[number, nodes.unsqueeze(1), nodes] |= before
            # The response's tokens, those of earlier turns included, each predicted by the token before it.
            places = [t for t, role in enumerate(text.roles) if role == RESPONSE and t > 0]
            predicted += [(number * time + path[t - 1], text.ids[t], index) for t in places]
    flat, targets, owners = torch.tensor(predicted, dtype=torch.long).reshape(-1, 3).unbind(dim=1)
    nodes, predictor = torch.unique(flat, return_inverse=True)
    mask = (roles != PAD).long()
    if dtype is not None:
        mask = torch.zeros(len(rows), 1, time, time, dtype=dtype)
        mask.masked_fill_(~visible.unsqueeze(1), torch.finfo(dtype).min)
    places_in_text = positions if own_mask else None
    return PackedBatch(ids, roles, places_in_text, mask, nodes, predictor, targets, owners, paths)
