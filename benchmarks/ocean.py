"""What most pages are about: the ocean recipe on the embedded model, and how far a compiled model is from the steered one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from benchmarks.record import ROOT
from compile_steer.artifacts.revision import EMBEDDED
from compile_steer.common.progress import Progress
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import CompileOptions
from compile_steer.models.forward import run_blocks
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import TokenDivergence, divergence, final_states
from compile_steer.models.source import find_model
from compile_steer.models.tokens import Encoded, batches, encode
from compile_steer.pipeline.artifacts import compile_program, merge
from compile_steer.pipeline.run import Run
from compile_steer.recipe import read_recipe
from compile_steer.steering.hooks import PAD
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program

# How much the pages measure: more than the recipe's own budget, and what the figures before it was made quick rest on.
_MEASURED = [
    "budget=standard", "validate.layers=[10,12,14]", "validate.coefficients=[1.5,2,2.5]", "validate.sweep_pairs=16",
    "validate.few_shot=2", "validate.tolerances={}",
    "validate.control_pairs=12", "validate.dose_prompts=4", "validate.prompts=24", "validate.max_new_tokens=32",
    "compile.backends=[bias,closed_form,distill]", "compile.calibration.prompts=120",
    "compile.calibration.max_new_tokens=40", "compile.distill.block_steps=300", "compile.distill.prompts=32",
    "compile.distill.epochs=1", "verify.max_new_tokens=32", "verify.heldout=24", "verify.pairs=16",
    "verify.neutral=16", "verify.prompts=10", "verify.long=0",
]  # fmt: skip

# How much a recipe compiles with that says nothing of it.
STANDARD_COMPILE = tuple(
    f"compile.{part}.{key}={getattr(getattr(CompileOptions(), part), key)}"
    for part, key in [
        ("calibration", "prompts"), ("calibration", "max_new_tokens"),
        ("distill", "prompts"), ("distill", "block_steps"), ("distill", "epochs"),
    ]
)  # fmt: skip


def ocean(settings: Sequence[str], out: Path, progress: Progress) -> Run:
    """The ocean recipe, with `settings` in place of its own."""
    return opened("ocean", [*_MEASURED, *settings], out, progress)


def opened(name: str, settings: Sequence[str], out: Path, progress: Progress) -> Run:
    """A recipe of this repository, with `settings` in place of its own."""
    return Run.open(read_recipe(ROOT / "recipes" / f"{name}.yaml", settings), out, progress)


def committed_program(run: Run) -> Program:
    """The validated ocean program of this repository, canonical."""
    program = Program.load(ROOT / "vectors" / "ocean.safetensors")
    run.model.layout.require_program(program, run.model.id, run.model.revision)
    return canonical(program)


def compile_committed(run: Run) -> None:
    """Compile the validated ocean program of this repository in the run's folder, and merge it; what is there is kept."""
    shutil.copytree(ROOT / "vectors", run.paths.program.parent, dirs_exist_ok=True)
    compile_program(run)
    merge(run)


def lowering_of(run: Run, program: Program, **changes: object) -> Lowering:
    """What the backends are given, with `changes` of the recipe's options for compiling."""
    options = run.recipe.compile.model_copy(update=changes)
    return Lowering(canonical(program), run.model, run.data.calibration, options, run.recipe.seed, run.progress)


def stream(run: Run, layer: int, count: int) -> torch.Tensor:
    """The base's residual stream after block `layer` on control text, [n_tokens, d_model], without each text's
    first token, whose norm is a hundred times the others' in many models."""
    model, states = run.model, []
    encoded = [encode(model.tokenizer, text) for text in run.data.neutral[:count]]
    for batch in batches(model, encoded):
        with torch.no_grad():
            hidden = run_blocks(model.model, batch.input_ids, batch.attention_mask, stop=layer + 1)
        real = batch.roles != PAD
        first = real & (real.cumsum(dim=1) == 1)
        states.append(hidden[real & ~first].float().cpu())
    return torch.cat(states)


def as_mistral(folder: Path) -> None:
    """The embedded model's weights as stock code saves them for another family: in bfloat16, in shards."""
    source = find_model(EMBEDDED).folder
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = MistralConfig(**{**base.config.to_dict(), "model_type": "mistral", "sliding_window": None})
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.save_pretrained(folder, max_shard_size="80MB")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@dataclass(frozen=True)
class HeldOut:
    """Continuations of held-out prompts by the steered model, its final states there, and KL(steered || base)."""

    model: LoadedModel
    texts: list[Encoded]
    steered: torch.Tensor
    base: TokenDivergence

    @staticmethod
    def of(run: Run, program: Program, count: int = 32, max_new_tokens: int = 40) -> HeldOut:
        """Sampled at temperature 1, at most `max_new_tokens` each."""
        model, prompts = run.model, run.data.heldout[:count]
        texts = continue_prompts(model, prompts, program, max_new_tokens=max_new_tokens, temperature=1.0, seed=1)
        steered, base = (final_states(model, texts, one).response for one in (program, None))
        return HeldOut(model, texts, steered, divergence(model.model, steered, model.model, base))

    def divergence_of(self, other: LoadedModel) -> TokenDivergence:
        """KL(steered || other)."""
        return divergence(self.model.model, self.steered, other.model, final_states(other, self.texts).response)

    def patched(self, patch: WeightPatch) -> TokenDivergence:
        """KL(steered || base with `patch`)."""
        with with_patch(self.model.model, patch):
            return self.divergence_of(self.model)

    def remaining(self, found: TokenDivergence) -> float:
        """The fraction of KL(steered || base) that is left."""
        return found.mean / self.base.mean
