"""Every family at every point: what the hooks mean there, and which backends may lower what.

`refusals.txt` is the golden file of legality: one line a family, point, positions, operation and backend.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
import torch

from compile_steer.lowering.plan import BACKENDS
from compile_steer.steering.hooks import RESPONSE, steered
from compile_steer.steering.passes import canonical
from compile_steer.steering.program import Intervention
from compile_steer.steering.sites import OPERATIONS, POINTS, Point
from tests.helpers.captures import MIDSTREAM, captured
from tests.helpers.tiny import (
    ALL_SITES,
    FAMILIES,
    LAYER,
    Padded,
    edit,
    intervention,
    loaded,
    logits,
    program,
    relative_error,
    texts,
)

GOLDEN = Path(__file__).with_name("refusals.txt")


# ------------------------------------------------------------------------------------ what hooks mean


def expected(family: str, action: Intervention, inputs: Padded) -> dict[str, torch.Tensor]:
    """The residual stream right after the edit, from the base's own streams and the definition."""
    model = loaded(family).model
    with captured(family, model) as base:
        logits(model, inputs)
    layer, point = action.site.layer, action.site.point
    change = edit(action, base.at(action.site)) - base.at(action.site)
    if "all" not in action.scopes:
        change = change * (inputs.roles == RESPONSE).unsqueeze(-1)
    if point == "resid_pre":
        return {"before": base.before[layer] + change}
    if point == "attn_out" and MIDSTREAM[family] is not None:
        return {"middle": base.middle[layer] + change}
    return {"after": base.after[layer] + change}


@pytest.mark.parametrize(("family", "point"), ALL_SITES)
def test_an_edit_changes_the_stream_at_its_point_by_its_definition_and_nothing_below(family: str, point: Point) -> None:
    model = loaded(family).model
    inputs = Padded.of(texts(), "left")
    real = inputs.attention_mask.bool()
    with captured(family, model) as base:
        logits(model, inputs)
    for operation in OPERATIONS:
        for positions in ("all", "response"):
            action = intervention(operation, point, LAYER, positions=positions)
            ((where, target),) = expected(family, action, inputs).items()
            with steered(model, program(family, action), roles=inputs.roles), captured(family, model) as streams:
                logits(model, inputs)
            actual = getattr(streams, where)[LAYER]
            assert relative_error(actual[real], target[real]) < 1e-5
            untouched = getattr(base, where)[LAYER]
            assert relative_error(actual[real], untouched[real]) > 1e-3
            if positions == "response":
                prompt = real & (inputs.roles != RESPONSE)
                assert torch.equal(actual[prompt], untouched[prompt])
            for layer in range(LAYER):
                assert torch.equal(streams.before[layer], base.before[layer])
                if (layer, point) != (LAYER - 1, "resid_pre"):
                    assert torch.equal(streams.after[layer], base.after[layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_of_the_first_block_is_the_embeddings(family: str) -> None:
    model = loaded(family).model
    inputs = Padded.of(texts(), "right")
    action = intervention("clamp", "resid_pre", 0)
    target = expected(family, action, inputs)["before"]
    with steered(model, program(family, action)), captured(family, model) as streams:
        logits(model, inputs)
    assert relative_error(streams.before[0], target) < 1e-5


# --------------------------------------------------------------------------------------- golden file


def legality() -> list[str]:
    lines = []
    for family, point, positions, operation in product(FAMILIES, POINTS, ("all", "response"), OPERATIONS):
        action = intervention(operation, point, LAYER, positions=positions)
        for name, backend in BACKENDS.items():
            reason = backend.refusal(canonical(program(family, action)), loaded(family).layout)
            lines.append(f"{family} {point} {positions} {operation} {name}: {reason or 'legal'}")
    return sorted(lines)


def test_legality_is_the_golden_one() -> None:
    lines = legality()
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")
    golden = GOLDEN.read_text(encoding="utf-8").splitlines() if GOLDEN.is_file() else []
    changed = sorted(set(lines) ^ set(golden))
    assert lines == golden, (
        f"{len(changed)} lines differ from {GOLDEN.name}, first: {changed[:4]}. If the new ones are right: "
        "UPDATE_GOLDEN=1 python -m pytest tests/contract/test_families.py -k golden, and look at the difference."
    )


def test_the_golden_file_is_what_the_design_says() -> None:
    lines = {
        tuple(key.split()): r for key, r in (line.split(": ", 1) for line in GOLDEN.read_text("utf-8").splitlines())
    }
    legal = {key for key, reason in lines.items() if reason == "legal"}

    def families(backend: str) -> set[str]:
        return {key[0] for key in legal if key[4] == backend}

    assert families("bias") == {
        *("llama", "granite", "smollm3", "gpt2", "gpt_neox", "phi", "qwen3", "qwen3_moe", "gpt_oss")
    }
    assert {key[1] for key in legal if key[0] == "qwen3" and key[4] == "bias"} == {"attn_out"}
    assert families("retarget") == {"mistral", "qwen2"}
    assert families("orthogonalise") == set(FAMILIES) - {"gemma2", "gemma3_text", "olmo2"}
    fitted = ("closed_form", "distill", "full", "full_cut")
    assert all(families(backend) == set(FAMILIES) for backend in fitted)
    exact = {key for key in legal if key[4] not in fitted}
    assert all(key[2] == "all" for key in exact)
    assert {key[3] for key in exact if key[4] != "orthogonalise"} == {"add"}
    for family in ("gemma2", "gemma3_text", "olmo2"):
        assert "normalises what its output projections write" in lines[family, "resid_post", "all", "add", "bias"]
