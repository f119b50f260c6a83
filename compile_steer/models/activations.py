"""Read activations at one point of every block in a single pass over the texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compile_steer.common.errors import LayoutError
from compile_steer.common.progress import Advance
from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import Batch, batches, encode
from compile_steer.steering.hooks import LAST_PROMPT, PAD, RESPONSE
from compile_steer.steering.layout import Layout
from compile_steer.steering.sites import Point, Site

Readout = Literal["response_mean", "last_prompt"]


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
        through: the last block that is wanted, so that n_layers is one more; None wants all.
        advance: called with the number of texts just done.

    Raises:
        LayoutError: an activation is NaN or infinite (the message names the first such block).
    """
    encoded = [encode(loaded.tokenizer, text) for text in texts]
    layout = loaded.layout
    result = torch.empty(len(texts), layout.n_layers if through is None else through + 1, layout.d_model)
    for batch in batches(encoded, int(loaded.tokenizer.pad_token_id)):
        batch = batch.to(loaded.device)
        weights = _readout_weights(batch, readout)
        rows = torch.tensor(batch.rows)
        for layer, hidden in enumerate(capture(layout, batch, point, through)):
            result[rows, layer] = torch.einsum("bt,btd->bd", weights, hidden.float()).cpu()
        advance(len(batch.rows))
    finite = torch.isfinite(result).all(dim=(0, 2))
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise LayoutError(
            f"the activations at {Site(first, point)} are NaN or infinite. Load the model in float32 "
            "(--dtype float32); if they stay so, its weights are damaged."
        )
    return result


def median_norms(loaded: LoadedModel, texts: Sequence[Text], point: Point) -> Tensor:
    """[n_layers] median norm of the activations at `point` of every block, over all tokens of `texts`.

    The median, because the first token's norm is a hundred times the others' in many models.
    """
    encoded = [encode(loaded.tokenizer, text) for text in texts]
    norms: list[Tensor] = []
    for batch in batches(encoded, int(loaded.tokenizer.pad_token_id)):
        batch = batch.to(loaded.device)
        states = capture(loaded.layout, batch, point)
        norms.append(torch.stack([hidden[batch.roles != PAD].float().norm(dim=-1).cpu() for hidden in states]))
    return torch.cat(norms, dim=1).median(dim=1).values


def _readout_weights(batch: Batch, readout: Readout) -> Tensor:
    """[batch, time] weights that sum to 1 over each row's tokens of interest."""
    chosen = (batch.roles == (RESPONSE if readout == "response_mean" else LAST_PROMPT)).float()
    return chosen / chosen.sum(dim=1, keepdim=True).clamp(min=1.0)


def capture(layout: Layout, batch: Batch, point: Point, through: int | None = None) -> list[Tensor]:
    """One pass through the backbone; the activation at `point` of each block, [batch, time, d_model].

    Args:
        through: the last block that is wanted; those above it are not run. None wants all.
    """
    count = layout.n_layers if through is None else through + 1
    caught: dict[int, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for layer, block in enumerate(layout.blocks[:count]):
            if point == "resid_pre":
                handle = block.register_forward_pre_hook(_input_catcher(caught, layer), with_kwargs=True)
            else:
                handle = layout.hook_module(Site(layer, point)).register_forward_hook(_output_catcher(caught, layer))
            stack.callback(handle.remove)
        run_blocks(layout.model, batch.input_ids, batch.attention_mask, stop=count)
    scale = layout.residual_multiplier if point in ("attn_out", "mlp_out") else 1.0
    return [caught[layer] * scale for layer in range(count)]


def _input_catcher(caught: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught[layer] = args[0] if args else kwargs["hidden_states"]

    return hook


def _output_catcher(caught: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        caught[layer] = output[0] if isinstance(output, tuple) else output

    return hook
