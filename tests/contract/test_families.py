"""Every family at every point: what the hooks mean there, and what the bias backend may and may not do.

`refusals.txt` is the golden file of legality: one line a family, point, positions and operation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compile_steer.behaviour import Behaviour
from compile_steer.errors import ArtifactError
from compile_steer.export.merged import merged_model
from compile_steer.hooks import RESPONSE, steered
from compile_steer.layout import FAMILIES as KNOWN
from compile_steer.layout import Layout
from compile_steer.lower import Job, bias
from compile_steer.models import Loaded, quiet
from compile_steer.passes import canonical
from compile_steer.patch import WeightPatch
from compile_steer.program import OPERATIONS, POINTS, Intervention, Point, Program
from compile_steer.progress import Meter
from compile_steer.recipe import Compile
from tests.tiny import (
    FAMILIES,
    LAYERS,
    MIDSTREAM,
    Padded,
    build,
    captured,
    edit,
    intervention,
    loaded,
    logits,
    program,
    relative_error,
    texts,
    vector,
)

GOLDEN = Path(__file__).with_name("refusals.txt")
LAYER = 2
EVERYWHERE = [(family, point) for family in FAMILIES for point in POINTS]
Save = Callable[[str], Loaded]


def test_every_known_family_is_tested_here() -> None:
    assert set(FAMILIES) == set(KNOWN)


# ------------------------------------------------------------------------------------ what hooks mean


def expected(family: str, one: Intervention, inputs: Padded) -> dict[str, torch.Tensor]:
    """The residual stream right after the edit, from the base's own streams and the definition."""
    model = loaded(family).model
    with captured(family, model) as base:
        logits(model, inputs)
    layer, point = one.site.layer, one.site.point
    change = edit(one, base.at(one.site)) - base.at(one.site)
    if "all" not in one.scopes:
        change = change * (inputs.roles == RESPONSE).unsqueeze(-1)
    if point == "resid_pre":
        return {"before": base.before[layer] + change}
    if point == "attn_out" and MIDSTREAM[family] is not None:
        return {"middle": base.middle[layer] + change}
    return {"after": base.after[layer] + change}


@pytest.mark.parametrize(("family", "point"), EVERYWHERE)
def test_an_edit_changes_the_stream_at_its_point_by_its_definition_and_nothing_below(family: str, point: Point) -> None:
    model = loaded(family).model
    inputs = Padded.of(texts(), "left")
    real = inputs.attention_mask.bool()
    with captured(family, model) as base:
        logits(model, inputs)
    for operation in OPERATIONS:
        for positions in ("all", "response"):
            one = intervention(operation, point, LAYER, positions=positions)
            ((where, wanted),) = expected(family, one, inputs).items()
            with steered(model, program(family, one), roles=inputs.roles), captured(family, model) as streams:
                logits(model, inputs)
            found = getattr(streams, where)[LAYER]
            assert relative_error(found[real], wanted[real]) < 1e-5
            untouched = getattr(base, where)[LAYER]
            assert relative_error(found[real], untouched[real]) > 1e-3
            if positions == "response":
                prompt = real & (inputs.roles != RESPONSE)
                assert torch.equal(found[prompt], untouched[prompt])
            for layer in range(LAYER):
                assert torch.equal(streams.before[layer], base.before[layer])
                if (layer, point) != (LAYER - 1, "resid_pre"):
                    assert torch.equal(streams.after[layer], base.after[layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_of_the_first_block_is_the_embeddings(family: str) -> None:
    model = loaded(family).model
    inputs = Padded.of(texts(), "right")
    one = intervention("clamp", "resid_pre", 0)
    wanted = expected(family, one, inputs)["before"]
    with steered(model, program(family, one)), captured(family, model) as streams:
        logits(model, inputs)
    assert relative_error(streams.before[0], wanted) < 1e-5


# --------------------------------------------------------------------------------- the bias backend


def job(one: Loaded, steering: Program) -> Job:
    nothing = Behaviour((), (), (), (), (), (), {})
    return Job(canonical(steering), one, nothing, Compile(), 0, Meter())


def reloaded(one: Loaded, patch: WeightPatch, folder: Path) -> torch.nn.Module:
    """The merged checkpoint as a user's plain transformers would load it."""
    merged = merged_model(one.source, patch)
    with quiet():
        merged.save_pretrained(folder)
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    found: torch.nn.Module = model.eval()
    return found


def must_equal_hooks(one: Loaded, steering: Program, folder: Path) -> WeightPatch:
    """Lower, merge, save and reload; compare with the hooks on both padding sides and through the cache."""
    patch = bias.lower(job(one, steering))
    compiled = reloaded(one, patch, folder)
    for side in ("left", "right"):
        inputs = Padded.of(texts(), side)
        with steered(one.model, steering):
            wanted = logits(one.model, inputs)
        assert relative_error(logits(compiled, inputs), wanted) < 1e-5
        assert relative_error(logits(one.model, inputs), wanted) > 1e-3
    prompts = Padded.of(texts(((5, 0), (2, 0), (4, 0))), "left")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    with steered(one.model, steering):
        wanted_tokens = one.model.generate(**ids, **settings)
    assert torch.equal(compiled.generate(**ids, **settings), wanted_tokens)  # type: ignore[operator]
    return patch


def legal_points(family: str) -> list[Point]:
    layout = loaded(family).layout
    return [
        p for p in POINTS if bias.refusal(canonical(program(family, intervention("add", p, LAYER))), layout) is None
    ]


@pytest.mark.parametrize(("family", "point"), EVERYWHERE)
def test_where_a_bias_is_legal_the_reloaded_checkpoint_equals_the_hooks(
    family: str, point: Point, saved: Save, tmp_path: Path
) -> None:
    steering = program(family, intervention("add", point, LAYER))
    if point not in legal_points(family):
        assert bias.refusal(canonical(steering), saved(family).layout)
        return
    patch = must_equal_hooks(saved(family), steering, tmp_path / "merged")
    assert len(patch.bias) == 1
    assert not patch.low_rank


@pytest.mark.parametrize("family", [family for family in FAMILIES if legal_points(family)])
def test_several_shifts_share_biases_and_equal_the_hooks(family: str, saved: Save, tmp_path: Path) -> None:
    points = legal_points(family)
    several = [intervention("add", p, 1 + n % 2, coefficient=1.1 + n, seed=n) for n, p in enumerate(points)]
    several += [intervention("add", points[-1], LAYERS - 1, coefficient=-0.7, seed=9)]
    several += [intervention("add", points[0], 1, coefficient=-0.9, seed=8)]  # onto the first one's own bias
    patch = must_equal_hooks(saved(family), program(family, *several), tmp_path / "merged")
    assert 1 < len(patch.bias) < len(several) or len(points) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_checkpoint_that_has_biases_already_keeps_them(family: str, tmp_path: Path) -> None:
    switches = {"attention_bias": True} | ({"mlp_bias": True} if family == "llama" else {})
    model = build(family, **switches)
    model.save_pretrained(tmp_path / "base")
    one = replace(loaded(family), model=model, source=str(tmp_path / "base"))
    steering = program(family, *(intervention("add", point, 1) for point in legal_points(family)))
    patch = must_equal_hooks(one, steering, tmp_path / "merged")
    assert patch.switches == ()


def test_a_neox_whose_sublayers_run_in_sequence_is_the_same_to_the_bias(tmp_path: Path) -> None:
    model = build("gpt_neox", use_parallel_residual=False)
    model.save_pretrained(tmp_path / "base")
    one = replace(loaded("gpt_neox"), model=model, source=str(tmp_path / "base"))
    steering = program("gpt_neox", *(intervention("add", point, 1, seed=n) for n, point in enumerate(POINTS)))
    must_equal_hooks(one, steering, tmp_path / "merged")


def test_a_switch_names_only_the_biases_that_are_needed(saved: Save) -> None:
    for points, switches in (
        (["mlp_out"], ("mlp_bias",)),
        (["attn_out", "resid_post"], ("attention_bias", "mlp_bias")),
    ):
        steering = program("llama", *(intervention("add", point, 1) for point in points))  # type: ignore[arg-type]
        assert bias.lower(job(saved("llama"), steering)).switches == switches
    assert bias.lower(job(saved("gpt2"), program("gpt2", intervention()))).switches == ()


def test_a_family_whose_checkpoint_lacks_its_biases_is_refused_before_any_work() -> None:
    model = build("gpt_neox", attention_bias=False)
    steering = canonical(program("gpt_neox", intervention("add", "attn_out", 1)))
    assert bias.refusal(steering, loaded("gpt_neox").layout) is None
    found = bias.refusal(steering, Layout.of(model))
    assert found is not None
    assert "attention.dense" in found


def test_one_illegal_intervention_refuses_the_whole_program_and_names_itself() -> None:
    steering = program("llama", intervention(layer=1), intervention("ablate", "mlp_out", 3))
    found = bias.refusal(canonical(steering), loaded("llama").layout)
    assert found == "ablate at mlp_out 3: a bias cannot ablate; it only shifts"


def test_nothing_lies_below_the_first_block() -> None:
    steering = canonical(program("gpt2", intervention("add", "resid_pre", 0)))
    assert bias.refusal(steering, loaded("gpt2").layout) == "add at resid_pre 0: no writer lies below block 0"


# --------------------------------------------------------------------------------------- golden file


def legality() -> list[str]:
    lines = []
    for family in FAMILIES:
        layout = loaded(family).layout
        for point in POINTS:
            for positions in ("all", "response"):
                for operation in OPERATIONS:
                    one = intervention(operation, point, LAYER, positions=positions)
                    reason = bias.refusal(canonical(program(family, one)), layout)
                    lines.append(f"{family} {point} {positions} {operation}: {reason or 'legal'}")
    return sorted(lines)


def test_legality_is_the_golden_one() -> None:
    found = legality()
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text("\n".join(found) + "\n", encoding="utf-8")
    golden = GOLDEN.read_text(encoding="utf-8").splitlines() if GOLDEN.is_file() else []
    changed = sorted(set(found) ^ set(golden))
    assert found == golden, (
        f"{len(changed)} lines differ from {GOLDEN.name}, first: {changed[:4]}. If the new ones are right: "
        "UPDATE_GOLDEN=1 python -m pytest tests/contract/test_families.py -k golden, and look at the difference."
    )


def test_the_golden_file_is_what_the_design_says() -> None:
    lines = dict(line.split(": ", 1) for line in GOLDEN.read_text(encoding="utf-8").splitlines())
    legal = {line.split()[0] for line, reason in lines.items() if reason == "legal"}
    assert legal == {"llama", "granite", "smollm3", "gpt2", "gpt_neox", "phi", "qwen3"}
    assert {line.split()[1] for line, r in lines.items() if r == "legal" and line.startswith("qwen3 ")} == {"attn_out"}
    assert all(reason != "legal" for line, reason in lines.items() if " response " in line or not line.endswith(" add"))
    for family in ("gemma2", "gemma3_text", "olmo2"):
        assert "normalises what its writers write" in lines[f"{family} resid_post all add"]


# ------------------------------------------------------------------------------------------- merging


def test_a_patch_for_other_modules_or_widths_is_refused(saved: Save) -> None:
    source = saved("gpt2").source
    for patch, message in (
        (
            WeightPatch(bias={"transformer.h.9.mlp.c_proj": vector(0)}),
            r"h\.9\.mlp\.c_proj, which the base does not have",
        ),
        (WeightPatch(bias={"transformer.h.1.mlp.c_proj": vector(0, width=31)}), "no bias of width 31"),
        (
            WeightPatch(bias={"transformer.h.1.mlp.c_proj": vector(0) / 0}),
            "NaN or infinity in transformer.h.1.mlp.c_proj",
        ),
    ):
        with pytest.raises(ArtifactError, match=message):
            merged_model(source, patch)
    with pytest.raises(ArtifactError, match=r"no bias of width 32 on model\.layers\.1\.mlp\.down_proj"):
        merged_model(saved("mistral").source, WeightPatch(bias={"model.layers.1.mlp.down_proj": vector(0)}))
