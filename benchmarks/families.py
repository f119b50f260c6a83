"""Every model type that transformers maps to a causal LM: is its layout found, what compiles exactly, and is that so.

Each type is built tiny with random weights. Numbers prove a layout, each the largest difference of the logits over
what the steering changes: hooks against an addition made by hand; hooks at `mlp_out` against that same addition, which
holds only if the point and its factor are right; and biases in the weights against hooks. Two more prove how it is run:
texts that share rows against each alone, in log p, and answers of a padded batch against those written token by token.
"""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.record import Record, table
from benchmarks.tiny_models import TYPES, build, randomise
from compile_steer.common.errors import CompileSteerError, library_errors, plain
from compile_steer.lowering.exact import bias_patch, bias_refusal, orthogonalise, orthogonalise_refusal
from compile_steer.models.forward import require_spans
from compile_steer.models.load import LoadedModel
from compile_steer.steering.blocks import stream, with_first
from compile_steer.steering.hooks import steered
from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Intervention, Program, ablate_everywhere
from compile_steer.steering.sites import Point, Site
from compile_steer.tools.inspect_model import FITTED, BlockKind, inspect_layout, ranges
from compile_steer.validation.evaluator import PrefixCache
from tests.helpers.sharing import alone, answers, sharing_texts
from tests.helpers.tiny import chat_tokenizer

_SECONDS = 20  # that a type may take
_TOLERANCE = 1e-3
_IDS = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(1))
# The families in use most in 2026, and the types that their checkpoints name.
_MOST_USED: dict[str, tuple[str, ...]] = {
    "Llama": ("llama",), "Qwen2, Qwen2.5": ("qwen2",), "Qwen3": ("qwen3",), "Qwen3-MoE": ("qwen3_moe",),
    "Qwen3.5": ("qwen3_5", "qwen3_5_text", "qwen3_5_moe"), "Gemma 2": ("gemma2",), "Gemma 3": ("gemma3", "gemma3_text"),
    "Gemma 4": ("gemma4", "gemma4_text"), "Mistral": ("mistral",), "Ministral 3": ("ministral3",), "Mixtral": ("mixtral",),
    "Phi-3, Phi-4": ("phi3",), "DeepSeek V3": ("deepseek_v3",), "GLM 4": ("glm4", "glm4_moe"), "OLMo 2, OLMo 3": ("olmo2", "olmo3"),
    "Falcon": ("falcon", "falcon_h1"), "Command R": ("cohere", "cohere2"), "LFM2": ("lfm2", "lfm2_moe"),
    "Granite 4 hybrid": ("granitemoehybrid",), "gpt-oss": ("gpt_oss",), "SmolLM3": ("smollm3",),
}  # fmt: skip


class _TooSlow(BaseException):
    """A type took longer than its time; no exception that a library's own code, or what translates its errors, would catch."""


class _NotBuilt(CompileSteerError):
    """The model could not be built tiny, so nothing is known of it."""


class _NotSteered(CompileSteerError):
    """The model was measured, but does not run under hooks or with a patch."""


@dataclass
class Family:
    """What is known of a type.

    Attributes:
        blocks: name and number; '' where there is no layout.
        kinds: the points of each kind of block.
        exact: what compiles exactly, by what.
        errors: the proofs: relative differences by name.
        not_exact: why what is not exact is not.
        refused: why there is no layout; `built` is False where there is no tiny model either.
    """

    name: str
    blocks: str = ""
    kinds: str = ""
    exact: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    not_exact: str = ""
    refused: str = ""
    built: bool = True

    @property
    def handled(self) -> bool:
        """Found, and every proof holds."""
        return not self.refused and all(error < _TOLERANCE for error in self.errors.values())

    @property
    def status(self) -> str:
        """One word, or the proof that failed."""
        if self.refused:
            return "refused" if self.built else "not built"
        failed = [f"{name} {error:.0e}" for name, error in self.errors.items() if not error < _TOLERANCE]
        if failed:
            return f"WRONG: {', '.join(failed)}"
        return "found" if "`" in self.kinds else "resid_post alone"


def main() -> None:
    """Examine every type and write docs/FAMILIES.md."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    families = []
    for name in TYPES:
        families.append(examine(name))
        print(f"{name:<28} {families[-1].status}", flush=True)
    record: Record[Family] = Record("FAMILIES", "Every model type", "python -m benchmarks.families")
    record.save(*page(families))


def examine(name: str) -> Family:
    """Build, measure and prove one type; what goes wrong is its reason."""
    family = Family(name)
    try:
        with _limit():
            with library_errors(_NotBuilt):
                model = build(name)
                randomise(model)
                if hasattr(model.get_input_embeddings(), "weight"):
                    _logits(model, _IDS)  # sizes that do not fit each other are the builder's fault
            layout = Layout.of(model)
            _describe(family, layout)
            with library_errors(_NotSteered):
                _prove(family, model, layout)
    except _TooSlow:
        family.refused = f"it takes more than {_SECONDS} s"
        family.built = bool(family.blocks)
    except _NotBuilt as error:
        family.refused, family.built = _one_line(error), False
    except CompileSteerError as error:
        family.refused = _one_line(error)
    return family


def _one_line(error: Exception) -> str:
    return plain(" ".join(str(error).split()).rstrip("."))


@contextmanager
def _limit() -> Iterator[None]:
    def stop(_number: int, _frame: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _describe(family: Family, layout: Layout) -> None:
    inspection = inspect_layout(layout)
    family.blocks = f"{inspection.n_layers} in `{inspection.blocks}`"
    family.kinds = "; ".join(_points(kind) for kind in inspection.kinds)
    by: dict[str, list[str]] = {}
    reasons = []
    for kind in inspection.kinds:
        for row in kind.points:
            for operation, found in (row.exact or {}).items():
                if found.backend is not None:
                    by.setdefault(found.backend, []).append(f"{operation} {row.point}")
                elif operation == "add":
                    reasons.append(found.refusals["bias"].partition(": ")[2])
    if inspection.everywhere.backend is not None:
        by.setdefault(inspection.everywhere.backend, []).append("ablate everywhere")
    family.exact = [f"{name}: {', '.join(dict.fromkeys(what))}" for name, what in by.items()]
    family.not_exact = "; ".join(dict.fromkeys(reasons))


def _points(kind: BlockKind) -> str:
    rows = [row for row in kind.points if row.module]
    found = ", ".join(f"`{row.module}`{f' x {row.multiplier:.3g}' if row.multiplier != 1 else ''}" for row in rows)
    return f"{ranges(kind.layers)}: {found or 'none but the block'}"


# ---------------------------------------------------------------------------------------------- proofs


def _prove(family: Family, model: PreTrainedModel, layout: Layout) -> None:
    """Compare hooks with an addition by hand, and exact weights with hooks."""
    layer = layout.n_layers // 2
    ids = _IDS
    vector = torch.randn(layout.d_model, generator=torch.Generator().manual_seed(2))
    base = _logits(model, ids)

    def at(point: Point, operation: Any = "add") -> Program:
        return Program((Intervention(Site(layer, point), operation, vector, 0.5),), "", "")

    def under(program: Program) -> Tensor:
        with steered(model, program):
            return _logits(model, ids)

    def patched(patch: WeightPatch) -> Tensor:
        with with_patch(model, patch):
            return _logits(model, ids)

    hooks = under(at("resid_post"))
    handle = layout.blocks[layer].register_forward_hook(
        lambda _m, _a, output: with_first(output, stream(output) + 0.5 * vector)
    )
    by_hand = _logits(model, ids)
    handle.remove()
    family.errors["hooks"] = _error(hooks, by_hand, base)
    sublayer = layout.measured.sublayers[layer].get("mlp")
    if sublayer is not None and sublayer.last:
        family.errors["mlp_out"] = _error(under(at("mlp_out")), by_hand, base)
    points: tuple[Point, ...] = ("resid_post", "mlp_out", "attn_out")
    for point in points:
        program = at(point)
        if bias_refusal(program, layout) is None:
            family.errors[f"bias at {point}"] = _error(patched(bias_patch(program, layout)), under(program), base)
    everywhere = Program(ablate_everywhere(vector / vector.norm(), layout.n_layers), "", "")
    if orthogonalise_refusal(everywhere, layout) is None:
        family.errors["orthogonalise"] = _error(patched(orthogonalise(everywhere, layout)), under(everywhere), base)
    loaded, response = LoadedModel(model, chat_tokenizer(), family.name, "", ""), at("resid_post")
    response = replace(response, interventions=tuple(replace(i, positions="response") for i in response.interventions))
    require_spans(loaded.model)
    texts = sharing_texts()[:4]
    single, plain_single = (torch.from_numpy(alone(loaded, texts, program)) for program in (response, None))
    together = torch.from_numpy(PrefixCache(loaded, texts).mean_logprobs([response])[0])
    family.errors["shared rows"] = _error(together, single, plain_single)
    written, single_pass = answers(loaded, texts, response)
    family.errors["answers"] = 0.0 if written == single_pass else float("inf")


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits


def _error(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """The largest deviation over the largest effect; infinite where there is no effect or a NaN."""
    effect = float((wanted - base).abs().max())
    return float((found - wanted).abs().max()) / effect if effect > 0 else float("inf")


# ------------------------------------------------------------------------------------------------ page


def page(families: Sequence[Family]) -> list[str]:
    """The lines of docs/FAMILIES.md."""
    counts = Counter(family.status.partition(":")[0] for family in families)
    built = len(families) - counts["not built"]
    by_name = {family.name: family for family in families}
    worst = max((e for f in families if f.handled for e in f.errors.values()), default=0.0)
    return [
        f"transformers {transformers.__version__} maps {len(families)} model types to a causal LM. {built} were built tiny (4 "
        f"blocks, width 64, random weights, gains that differ). Of these {counts['found']} have points inside their blocks, and "
        f"{counts['resid_post alone']} can be steered at the blocks' outputs alone, where nothing compiles exactly; hooks, additions "
        f"by hand, exact weights and texts that share rows agree to {worst:.0e} of what they change, and a batch's answers are those "
        f"of whole passes. {counts['refused']} are refused, {counts['WRONG']} disagree; {counts['not built']} could "
        "not be built tiny, so nothing is said of them.",
        "",
        "Tiny models show that points, factors and biases are right, not how well a fitted backend does on trained weights.",
        "",
        "## The families in use most",
        "",
        *table("family | types | status | exact by", (_named(name, by_name, types) for name, types in _MOST_USED.items())),
        "",
        "## Every type",
        "",
        f"By fit, wherever there is a layout: {', '.join(FITTED)}. `resid_post` and `resid_pre` are at every block. A type whose "
        "blocks lie in `model.language_model` is the text backbone of a model with other parts. *Largest error*: of the proofs.",
        "",
        *table(
            "type | status | blocks | points | exact by | largest error | not exact, or refused, because", map(_row, families)
        ),
    ]  # fmt: skip


def _named(name: str, families: dict[str, Family], types: Sequence[str]) -> Sequence[str]:
    known = [families[one] for one in types if one in families]
    exact = list(dict.fromkeys(e.partition(":")[0] for family in known for e in family.exact))
    status = "; ".join(dict.fromkeys(family.status for family in known))
    return name, ", ".join(f"`{one}`" for one in types), status, ", ".join(exact) or "fit alone"


def _row(family: Family) -> Sequence[str]:
    worst = f"{max(family.errors.values()):.0e} ({len(family.errors)})" if family.errors else ""
    reason = family.refused or family.not_exact
    cells = (family.blocks, family.kinds, "; ".join(family.exact), worst, reason)
    return f"`{family.name}`", family.status, *(cell.replace("|", "\\|") for cell in cells)


if __name__ == "__main__":
    main()
