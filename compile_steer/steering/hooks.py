"""The reference semantics of a program: the model with hooks on.

Whatever is compiled is compared with this file, so it shares no code with the backends. It is right in prefill and in
cached decoding, for left and right padding and for prompts of different lengths: what a token is (prompt, last prompt
token, response) is known per row, never inferred from its column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.blocks import stream, with_first
from compile_steer.steering.layout import Layout
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Scope, Site

# Roles of a token, [batch, time] int8. The last prompt token is a prompt token too.
PAD, PROMPT, LAST_PROMPT, RESPONSE = 0, 1, 2, 3
_ROLES_OF: dict[Scope, tuple[int, ...]] = {
    "all": (PROMPT, LAST_PROMPT, RESPONSE),
    "prompt": (PROMPT, LAST_PROMPT),
    "last_prompt": (LAST_PROMPT,),
    "response": (RESPONSE,),
}


def in_scope(roles: Tensor, scopes: frozenset[Scope]) -> Tensor:
    """Boolean [batch, time]: the positions whose role belongs to any of `scopes`."""
    chosen = sorted({role for scope in scopes for role in _ROLES_OF[scope]})
    return torch.isin(roles, torch.tensor(chosen, dtype=roles.dtype, device=roles.device))


def prompt_roles(attention_mask: Tensor) -> Tensor:
    """Roles of a batch that holds prompts only: the last token that is not padding is LAST_PROMPT."""
    mask = attention_mask.bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(dim=1, keepdim=True)
    return torch.where(mask, torch.where(columns == last, LAST_PROMPT, PROMPT), PAD).to(torch.int8)


class _Roles:
    """Follows the model's forward passes and knows the role of each token of the current one.

    A pass that continues from a cache is the response. Without a cache, so is what a pass appends to the ids of the
    prompt before it, which is how `generate(use_cache=False)` runs.
    """

    def __init__(self, explicit: Tensor | None) -> None:
        self._explicit = explicit
        self._past = 0
        self._mask: Tensor | None = None
        self._prompt: Tensor | None = None
        self.shape: tuple[int, int] = (0, 0)  # [batch, time] of the current pass

    def observe(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self._past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        # generate() may pass a prepared 4-d mask; only the 2-d one shows the padding.
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        ids = kwargs.get("input_ids", args[0] if args else None)
        read = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
        if isinstance(read, Tensor):
            self.shape = read.shape[0], read.shape[1]
        before = self._prompt
        continues = (
            ids is not None
            and before is not None
            and ids.shape[0] == before.shape[0]
            and ids.shape[1] > before.shape[1]
            and torch.equal(ids[:, : before.shape[1]], before)
        )
        if self._past == 0 and not continues:
            self._prompt = ids

    def current(self, hidden: Tensor) -> Tensor:
        """Roles [batch, time] of `hidden` [batch, time, d_model]."""
        batch, time = hidden.shape[:2]
        response = torch.full((batch, time), RESPONSE, dtype=torch.int8, device=hidden.device)
        if self._explicit is None:
            if self._past > 0:
                return response
            width = time if self._prompt is None else self._prompt.shape[1]
            mask = torch.ones(batch, time, device=hidden.device) if self._mask is None else self._mask.to(hidden.device)
            return torch.cat([prompt_roles(mask[:, :width]), response[:, width:]], dim=1)
        explicit = self._explicit.to(hidden.device)
        known = explicit.shape[1]
        if self._past > 0 and known == self._past + time:
            return explicit[:, self._past :]
        if self._past >= known:  # the roles are the prompt's, and this pass comes after it
            return response
        # generate(use_cache=False) runs the prompt again with what was generated after it.
        if self._past == 0 and self._prompt is not None and time > known == self._prompt.shape[1]:
            return torch.cat([explicit, response[:, known:]], dim=1)
        if explicit.shape != (batch, time):
            raise ArtifactError(
                f"roles are {list(self._explicit.shape)} but the model runs {[batch, time]}; "
                "give the roles of exactly this batch, or none to have them inferred."
            )
        return explicit


@dataclass(frozen=True)
class _Edit:
    """One edit h + strength * (shift - basis basis^T h), for a whole batch or with a row each.

    Attributes:
        basis: [d_model, 1], [batch, d_model, 1], or None.
        shift: [d_model] or [batch, 1, d_model].
        strength: a number or [batch, 1, 1].
        scopes: the tokens that are edited.
    """

    basis: Tensor | None
    shift: Tensor
    strength: float | Tensor
    scopes: frozenset[Scope]

    def __call__(self, hidden: Tensor, roles: _Roles) -> Tensor:
        if self.shift.ndim == 3 and self.shift.shape[0] != hidden.shape[0]:
            raise ArtifactError(
                f"{self.shift.shape[0]} programs for a batch of {hidden.shape[0]} rows; needed: one for all, or one a row."
            )
        change = self.shift.to(hidden)
        if self.basis is not None:
            basis = self.basis.to(hidden)
            change = change - (hidden @ basis) @ basis.mT
        if isinstance(self.strength, Tensor):
            # float32 times bfloat16 is float32: the stream must keep the model's type
            change = (self.strength.to(hidden.device) * change).to(hidden.dtype)
        else:
            change = self.strength * change
        # Roles are worked out only where they matter: a program at all positions costs one addition.
        if "all" not in self.scopes:
            change = change * in_scope(roles.current(hidden), self.scopes).unsqueeze(-1)
        return hidden + change


def _edits(programs: Sequence[Program], layout: Layout) -> list[tuple[Site, _Edit]]:
    """Turn one program, or a batch of programs of one shape, into edits in running order."""
    # In a batch a row with coefficient 0 is the base, so that only what is switched off is left out.
    rows = [p.active if len(programs) == 1 else tuple(i for i in p.interventions if i.enabled) for p in programs]
    if len({p.shape for p in programs}) > 1:
        raise ArtifactError(
            "programs that run as rows of one batch must have the same number of interventions and must share sites, "
            "operations and positions."
        )
    edits = []
    for group in zip(*rows, strict=True):
        first: Intervention = group[0]
        basis, shift = first.normal_form()
        strength: float | Tensor = first.coefficient
        if len(group) > 1:
            bases, shifts = zip(*(i.normal_form() for i in group), strict=True)
            basis = None if basis is None else torch.stack(bases)
            shift = torch.stack(shifts).unsqueeze(1)
            strength = torch.tensor([i.coefficient for i in group]).view(-1, 1, 1)
        # The point is defined on the stream: where the family scales a sublayer's output before adding it, the same
        # edit has to be made before that factor.
        scale = layout.stream_scale(first.site.layer, first.site.point)
        edits.append((first.site, _Edit(basis, shift / scale, strength, first.scopes)))
    # Stable: within one module, edits of the block's output come before those of the next block's input.
    return sorted(edits, key=lambda edit: edit[0].point == "resid_pre")


@contextmanager
def steered(
    model: nn.Module, program: Program | Sequence[Program] | None, *, roles: Tensor | None = None
) -> Iterator[None]:
    """Run `model` under `program` inside the block.

    Args:
        model: a causal language model of a known family (PEFT-wrapped or not).
        program: one program for every row, or one per row of the batch (same sites and operations), which
            is how a sweep runs many coefficients or directions at once. None leaves the model as it is.
        roles: [batch, time] int8 roles (see `prompt_roles`) of a teacher-forced batch, or of the prompts that `generate`
            receives (earlier turns of the assistant are responses too); what follows them is the response. A pass
            from a cache takes the roles of prompt and response together. None: a pass that starts a cache is all
            prompt.

    Raises:
        LayoutError: the model lacks a site. ArtifactError: another width, or rows that do not match.
    """
    if program is None:
        yield
        return
    layout = Layout.of(model)
    programs = [program] if isinstance(program, Program) else list(program)
    for p in programs:
        p.require(p.model, p.revision, layout.d_model, layout.n_layers)
    follow = _Roles(roles)
    with ExitStack() as stack:
        # Both: the backbone alone is run too, and some models run a part of their backbone past its own call.
        for module in dict.fromkeys((layout.model, layout.backbone)):
            stack.callback(module.register_forward_pre_hook(follow.observe, with_kwargs=True).remove)
        # Prepended, so that transformers' own capture of hidden states sees the steered ones; in reverse,
        # so that they still run in the program's order.
        for site, edit in reversed(_edits(programs, layout)):
            module = layout.hook_module(site)
            if site == Site(0, "resid_pre"):
                hook = _input_hook(edit, follow)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            else:
                handle = module.register_forward_hook(_output_hook(edit, follow), prepend=True)
            stack.callback(handle.remove)
        yield


def _input_hook(edit: _Edit, roles: _Roles) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:  # most families pass the hidden states by position, some by name
            return (edit(args[0], roles), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"], roles)}

    return hook


def _output_hook(edit: _Edit, roles: _Roles) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        hidden = stream(output)
        # Some models hand their MLP all tokens in one row.
        batch = hidden.view(*roles.shape, -1) if hidden.dim() == 2 else hidden
        edited = edit(batch, roles).view_as(hidden)
        return with_first(output, edited)

    return hook
