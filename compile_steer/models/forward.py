"""Run a span of a model's blocks, its output head, or read the activations of every block.

Steered and base model compute the same thing below the first steered block, so extraction, sweeps, calibration and
distillation run that prefix once and start from its hidden states. All of it goes through the model's own forward:
blocks outside the span hand their input on unchanged while the family's code makes masks and position embeddings, so
no family needs a copy of its forward pass here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from compile_steer.common import distributed
from compile_steer.common.errors import LayoutError, library_errors
from compile_steer.common.progress import Advance
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Readout, Text
from compile_steer.models.tokens import Batch, batches, encode
from compile_steer.steering.blocks import stream, token_ids
from compile_steer.steering.compare import differ, distance, tolerance_of
from compile_steer.steering.hooks import LAST_PROMPT, PAD, RESPONSE
from compile_steer.steering.layout import Layout
from compile_steer.steering.sites import Point, Site

# What a configuration says of its file, not of what the model computes.
_OF_THE_FILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
_SHARES_ROWS: dict[object, bool] = {}


def run_blocks(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    position_ids: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Run blocks start .. stop-1 and return their output, [batch, time, d_model].

    Hooks that are registered (a program, a patch) act inside the span as they would in a full pass.

    Args:
        input_ids: [batch, time], right-padded.
        attention_mask: [batch, time], 1 for real tokens; or an additive mask, [batch, 1, time, time].
        position_ids: [batch, time]; None counts from 0.
        start: the first block to run; above 0 it receives `hidden`, [batch, time, d_model].
        stop: the block before which to stop. The number of blocks stops before the final norm, None after it.
    """
    layout = Layout.of(model)
    blocks = layout.blocks
    end = len(blocks) if stop is None else stop
    caught: list[Tensor] = []

    def skip(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return layout.block_output(hidden_states)

    def catch(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        caught.append(hidden_states)
        return skip(hidden_states)

    def inject(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            if not start <= index < end:
                stack.enter_context(_forward_replaced(block, catch if index == end else skip))
        if stop == len(blocks):  # there is no further block to catch the output of the last one
            stack.callback(blocks[-1].register_forward_hook(lambda _m, _a, out: caught.append(stream(out))).remove)
        if start > 0:  # prepended, so that a program's own hook on the input of this block still acts on `hidden`
            stack.callback(blocks[start].register_forward_pre_hook(inject, with_kwargs=True, prepend=True).remove)
        output = layout.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
    return caught[0] if caught else output.last_hidden_state


def lm_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [n, vocab] of final hidden states [n, d_model], with the family's own scaling and soft cap."""
    layout = Layout.of(model)
    final = _Final(last_hidden_state=hidden.unsqueeze(0))
    with _forward_replaced(layout.backbone, lambda *_args, **_kwargs: final):
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        logits: Tensor = layout.model(input_ids=token, use_cache=False).logits
    return logits[0]


class _Final(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]  # the library has no types
    """What a backbone returns; whatever else a head reads of it (router logits, the state of a recurrence) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def require_spans(model: PreTrainedModel) -> None:
    """Raise `LayoutError` unless a pass cut in two, and the head by itself, give what the whole model gives on 8 tokens."""
    layout, input_ids = Layout.of(model), token_ids(model)[:1]
    mask, middle = torch.ones_like(input_ids), layout.n_layers // 2
    name = type(model).__name__
    with (
        torch.no_grad(),
        library_errors(lambda reason: LayoutError(f"a part of {name} cannot be run by itself ({reason}).")),
    ):
        whole = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0]
        below = run_blocks(model, input_ids, mask, stop=middle)
        logits = lm_head(model, run_blocks(model, input_ids, mask, start=middle, hidden=below)[0])
    if logits.shape != whole.shape or differ(logits, whole, whole.dtype):
        raise LayoutError(
            f"{name}: its blocks and head, run one after another, do not give what the whole model gives, so what a fit or a "
            "measurement sees would not be the model's own."
        )


def settings_of(model: nn.Module) -> dict[str, object]:
    """The configuration but for names, versions and biases: what acts on long texts only is there."""
    config = Layout.of(model).model.config.to_dict()
    return {key: value for key, value in config.items() if not (key in _OF_THE_FILE or key.endswith("bias"))}


def code_of(model: nn.Module) -> object:
    """What tells models that run the same code in the same way, whatever their weights: base, artifacts, rounded copies."""
    layout, settings = Layout.of(model), json.dumps(settings_of(model), sort_keys=True, default=str)
    inner = layout.model
    return type(inner), settings, inner.config._attn_implementation, inner.dtype, str(layout.device)


def shares_rows(model: nn.Module) -> bool:
    """Whether two texts with a common beginning, in one row with a mask of ancestors, give what each gives alone.

    True of attention; a state that is passed on from token to token knows no mask. Measured once for a code, on 7 tokens.
    """
    if (code := code_of(model)) not in _SHARES_ROWS:
        ids, _SHARES_ROWS[code] = token_ids(cast(PreTrainedModel, model))[:1, :7], False
        first, second = [0, 1, 2, 3, 4], [0, 1, 2, 5, 6]
        seen = torch.ones(7, 7, dtype=torch.bool, device=ids.device).tril()
        seen[5:, 3:5] = False
        dtype = cast(PreTrainedModel, model).dtype
        mask = torch.zeros(1, 1, 7, 7, dtype=dtype, device=ids.device).masked_fill(~seen, torch.finfo(dtype).min)
        places = torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=ids.device)
        with suppress(LayoutError), library_errors(LayoutError), torch.no_grad():  # some take no mask of that shape
            row = run_blocks(model, ids, mask, position_ids=places)[0]
            alone = [run_blocks(model, ids[:, path], torch.ones_like(ids[:, path]))[0] for path in (first, second)]
            together = torch.cat([row[first], row[second]])
            _SHARES_ROWS[code] = distance(together, torch.cat(alone)) < tolerance_of(dtype)
    return _SHARES_ROWS[code]


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate, for one, replaces a module's forward in the same way
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def capture(layout: Layout, batch: Batch, point: Point, through: int | None = None) -> list[Tensor]:
    """Run blocks 0 to `through` (None: all) once; return each one's activation at `point`, [batch, time, d_model]."""
    count = layout.n_layers if through is None else through + 1
    caught: list[Tensor] = []  # modules run in the blocks' order

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if point == "resid_pre":
            output = args or kwargs["hidden_states"]
        caught.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack, torch.no_grad():
        for layer, block in enumerate(layout.blocks[:count]):
            module = block if point == "resid_pre" else layout.hook_module(Site(layer, point))
            stack.callback(module.register_forward_hook(catch, with_kwargs=True).remove)
        run_blocks(layout.model, batch.input_ids, batch.attention_mask, stop=count)
    return [activation * layout.stream_scale(layer, point) for layer, activation in enumerate(caught)]


def read_activations(
    loaded: LoadedModel,
    texts: Sequence[Text],
    *,
    point: Point,
    readout: Readout,
    through: int | None = None,
    advance: Advance = lambda _n: None,
) -> Tensor:
    """Return [n_texts, n_layers, d_model] fp32: each text's activation at `point` of every block.

    Args:
        readout: 'response_mean' averages over the response tokens; 'last_prompt' takes the token whose
            output predicts the first response token.
        through: the last block to read, so that n_layers is one more; None reads all.
        advance: called with the number of texts just done.

    Raises `LayoutError` where an activation is NaN or infinite.
    """
    layout = loaded.layout
    result = torch.zeros(len(texts), layout.n_layers if through is None else through + 1, layout.d_model)
    own = distributed.share(range(len(texts)))
    for batch in batches(loaded, [encode(loaded.tokenizer, texts[row]) for row in own]):
        chosen = (batch.roles == (RESPONSE if readout == "response_mean" else LAST_PROMPT)).float()
        weights = chosen / chosen.sum(dim=1, keepdim=True).clamp(min=1.0)  # [batch, time], each row sums to 1
        rows = torch.tensor(own)[list(batch.rows)]
        for layer, hidden in enumerate(capture(layout, batch, point, through)):
            result[rows, layer] = torch.einsum("bt,btd->bd", weights, hidden.float()).cpu()
        advance(len(batch.rows) * distributed.count())
    distributed.sum_over_all(result)  # of every text, one process has what is not 0
    finite = torch.isfinite(result).all(dim=(0, 2))
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise LayoutError(
            f"the activations at {Site(first, point)} are NaN or infinite. Load the model in float32 "
            "(--dtype float32); if they stay so, its weights are damaged."
        )
    return result


def median_norms(loaded: LoadedModel, texts: Sequence[Text], point: Point) -> Tensor:
    """[n_layers] median norm of the activations at `point` of every block, over all tokens of `texts`."""
    norms: list[Tensor] = []
    for batch in batches(loaded, [encode(loaded.tokenizer, text) for text in distributed.share(texts)]):
        states = capture(loaded.layout, batch, point)
        norms.append(torch.stack([hidden[batch.roles != PAD].float().norm(dim=-1).cpu() for hidden in states]))
    # The median, because the first token's norm is a hundred times the others' in many models.
    norms = [norm for part in distributed.gather(norms) for norm in part]
    return torch.cat(norms, dim=1).median(dim=1).values
