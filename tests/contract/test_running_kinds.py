"""Whatever a block passes on from token to token, what is measured in shared rows, batches and caches is the model's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from compile_steer.common.errors import LayoutError
from compile_steer.lowering.plan import plan
from compile_steer.models.forward import require_spans
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site
from compile_steer.validation.evaluator import PrefixCache
from tests.contract.test_measured_layout import KINDS, build
from tests.helpers.sharing import alone, answers, sharing_texts
from tests.helpers.tiny import chat_tokenizer

STATES = {
    **{kind: (family, settings) for kind, (family, settings, *_points) in KINDS.items()},
    "state beside the stream": (
        "rwkv", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    ),
    "distances in the scores": ("bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}  # fmt: skip


def loaded(kind: str) -> LoadedModel:
    model: Any = build(*STATES[kind])
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    return LoadedModel(model, chat_tokenizer(), kind, "", "")


def shift(positions: Any) -> Program:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    return Program((Intervention(Site(0, "resid_post"), "add", vector, 0.5, positions),), "", "")


@pytest.mark.parametrize("kind", STATES)
def test_what_runs_together_is_what_runs_alone(kind: str) -> None:
    one, texts, response = loaded(kind), sharing_texts()[:4], shift("response")
    require_spans(one.model)
    cache = PrefixCache(one, texts)
    for program in (None, response):
        expected = alone(one, texts, program)
        np.testing.assert_allclose(cache.mean_logprobs([program])[0], expected, atol=1e-4)
    together, single = answers(one, texts, response)
    assert together == single


def test_a_lora_that_peft_would_not_load_is_refused_before_any_work() -> None:
    refused = {
        choice.backend: choice.adapter_refusal
        for choice in plan(shift("all"), loaded("state space alone").layout).choices
    }
    assert refused["closed_form"] == "PEFT takes no LoRA on out_proj of mamba: merged checkpoint only"
    assert not any(
        c.adapter_refusal for c in plan(shift("all"), loaded("hybrid").layout).choices if c.backend == "closed_form"
    )


def test_a_model_whose_parts_do_not_make_the_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: PreTrainedModel = build(*STATES["experts"])
    own: Any = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: _halved(own(*args, **kwargs), kwargs["input_ids"]))
    with pytest.raises(LayoutError, match="do not give what the whole model gives"):
        require_spans(model)


def _halved(output: Any, input_ids: torch.Tensor) -> Any:
    output.logits = output.logits * input_ids.shape[1]
    return output


def test_a_model_whose_generation_counts_positions_otherwise_is_refused() -> None:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model: Any = build("roberta", {**sizes, "max_position_embeddings": 64, "is_decoder": True})
    one, texts = LoadedModel(model.requires_grad_(False), chat_tokenizer(), "roberta", "", ""), sharing_texts()[:4]
    expected = alone(one, texts, None)
    np.testing.assert_allclose(PrefixCache(one, texts).mean_logprobs([None])[0], expected, atol=1e-5)
    with pytest.raises(LayoutError, match="what it generates is not what its plain passes give"):
        continue_prompts(one, texts[:2], None, max_new_tokens=2)
