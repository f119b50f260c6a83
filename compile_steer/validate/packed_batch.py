"""Texts packed into rows as tries: tokens that several texts begin with are computed once.

The chat template opens every text with the same tokens, and both sides of a pair share the whole prompt. A
token sees exactly the tokens before it in its own text (a mask of ancestors) at its own place in it (position
ids), so this is the same mathematics as a row a text. A sliding window would need a mask of its own, so there
texts that are longer than the window stay rows of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from compile_steer.models.tokens import Encoded
from compile_steer.steering.hooks import PAD, RESPONSE
from compile_steer.steering.layout import Layout

# Attention costs time^2: past a few hundred tokens a longer row costs more than sharing the template again.
_ROW_TOKENS = 512
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Packed:
    """A batch of rows. `input_ids`, `roles` and `position_ids` are [rows, time].

    `attention_mask` is [rows, 1, time, time], 0 or the lowest number (added to the scores), or [rows, time]
    where each row is one text. Response token i of the batch is `targets[i]`, of text `texts[i]`, and is predicted at
    the flat position `nodes[which[i]]`; a position that predicts tokens of several texts is in `nodes` once.
    """

    input_ids: Tensor
    roles: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    nodes: Tensor
    which: Tensor
    targets: Tensor
    texts: Tensor

    @property
    def n_tokens(self) -> int:
        """Padded tokens."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Packed:
        return Packed(*(getattr(self, name.name).to(device) for name in fields(self)))


@dataclass
class _Row:
    """One row: a trie of (token, role) in the order of its texts."""

    ids: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    children: dict[tuple[int, int, int], int] = field(default_factory=dict)
    paths: dict[int, list[int]] = field(default_factory=dict)

    def added(self, text: Encoded) -> int:
        """How many tokens the text would add."""
        node = -1
        for depth, key in enumerate(zip(text.ids, text.roles, strict=True)):
            found = self.children.get((node, *key))
            if found is None:
                return len(text.ids) - depth
            node = found
        return 0

    def add(self, index: int, text: Encoded) -> None:
        node, path = -1, []
        for depth, (token, role) in enumerate(zip(text.ids, text.roles, strict=True)):
            key = (node, token, role)
            if key not in self.children:
                self.children[key] = len(self.ids)
                self.ids.append(token)
                self.roles.append(role)
                self.depths.append(depth)
                self.parents.append(node)
            node = self.children[key]
            path.append(node)
        self.paths[index] = path

    def sees(self) -> Tensor:
        """[time, time] booleans: what each token may look at, itself and its ancestors."""
        found = torch.eye(len(self.ids), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[node] |= found[parent]
        return found


def can_share(layout: Layout, texts: Sequence[Encoded]) -> bool:
    """False where a sliding window is shorter than the longest text."""
    config = layout.model.config
    window = getattr(config, "sliding_window", None)
    on = getattr(config, "use_sliding_window", True)  # Qwen's switch
    return not window or not on or max(len(text.ids) for text in texts) <= window


def pack(layout: Layout, texts: Sequence[Encoded], pad_id: int, dtype: torch.dtype) -> list[Packed]:
    """Pack `texts` for the model; `dtype` is the model's, for the masks."""
    shared = can_share(layout, texts)
    rows = sorted(_tries(texts) if shared else _alone(texts), key=lambda row: len(row.ids))
    return [_batch(group, texts, pad_id, dtype if shared else None) for group in _groups(rows)]


def _tries(texts: Sequence[Encoded]) -> list[_Row]:
    """Rows of at most `_ROW_TOKENS` (or one text), as even as can be: a batch is as long as its longest row."""
    rows = _filled(texts, _ROW_TOKENS)
    longest = max(len(row.ids) for row in rows)
    low, high = longest // 2, longest
    while high - low > 8:
        middle = (low + high) // 2
        even = _filled(texts, middle)
        if len(even) == len(rows):
            high = middle
        else:
            low = middle
    return _filled(texts, high)


def _filled(texts: Sequence[Encoded], limit: int) -> list[_Row]:
    """Rows filled one after the other; in lexicographic order texts with a common beginning meet."""
    rows = [_Row()]
    for index in sorted(range(len(texts)), key=lambda i: list(zip(texts[i].ids, texts[i].roles, strict=True))):
        if rows[-1].ids and len(rows[-1].ids) + rows[-1].added(texts[index]) > limit:
            rows.append(_Row())
        rows[-1].add(index, texts[index])
    return rows


def _alone(texts: Sequence[Encoded]) -> list[_Row]:
    rows = []
    for index, text in enumerate(texts):
        rows.append(_Row())
        rows[-1].add(index, text)
    return rows


def _groups(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows of similar length, at most `_BATCH_TOKENS` padded tokens together; `rows` are sorted by length."""
    group: list[_Row] = []
    for row in rows:
        if group and (len(group) + 1) * len(row.ids) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _batch(rows: Sequence[_Row], texts: Sequence[Encoded], pad_id: int, dtype: torch.dtype | None) -> Packed:
    time = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), time), pad_id, dtype=torch.long)
    roles = torch.full((len(rows), time), PAD, dtype=torch.int8)
    positions = torch.zeros(len(rows), time, dtype=torch.long)
    sees = torch.eye(time, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding looks at itself: no empty softmax
    predicted: list[tuple[int, int, int]] = []
    for at, row in enumerate(rows):
        n = len(row.ids)
        ids[at, :n] = torch.tensor(row.ids)
        roles[at, :n] = torch.tensor(row.roles, dtype=torch.int8)
        positions[at, :n] = torch.tensor(row.depths)
        sees[at, :n, :n] = row.sees()
        for index, path in row.paths.items():
            text = texts[index]
            predicted += [(at * time + path[t - 1], text.ids[t], index) for t in _predicted(text)]
    flat, targets, owners = (torch.tensor(column, dtype=torch.long) for column in zip(*predicted, strict=True))
    nodes, which = torch.unique(flat, return_inverse=True)
    mask = (roles != PAD).long()
    if dtype is not None:
        mask = torch.zeros(len(rows), 1, time, time, dtype=dtype)
        mask.masked_fill_(~sees.unsqueeze(1), torch.finfo(dtype).min)
    return Packed(ids, roles, positions, mask, nodes, which, targets, owners)


def _predicted(text: Encoded) -> list[int]:
    """The positions of the response's tokens, earlier turns' included: those that the token before them predicts."""
    return [t for t, role in enumerate(text.roles) if role == RESPONSE and t > 0]
