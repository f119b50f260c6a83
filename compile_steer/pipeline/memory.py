"""Memory by stage, from a model's config.json and the recipe alone, before anything is loaded.

Counted is what grows with the model or the texts; what libraries take by themselves is `LIBRARIES` on a CPU. The formulas
are checked against measured peaks by `benchmarks.scale`, part memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compile_steer.common import distributed
from compile_steer.common.errors import CompileSteerError, RecipeError
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.checked import require_plain
from compile_steer.models.libraries import quiet_library_errors, read_config, without_weights
from compile_steer.models.load import DTYPES, choose_device
from compile_steer.models.logprobs import CHUNK_BYTES, CHUNK_TOKENS
from compile_steer.models.source import find_model
from compile_steer.recipe import Recipe

LIBRARIES = 0.3 * 2**30  # bytes of a process that has imported torch and transformers
BATCH_TOKENS = 4096  # of a forward pass, padded
_GENERATED_ROWS = 160
_CHARACTERS = 3.5  # to a token of most texts, so that the estimate errs upwards
_TEMPLATE = 24  # tokens of a chat template
_SPARE = 1.1  # what is planned must fit with so much room, for the formulas are good to some per cent


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides its memory: numbers in all, and the widths of one block."""

    parameters: int
    blocks: int
    d_model: int
    d_mlp: int
    d_heads: int
    d_kv: int
    vocabulary: int
    number_bytes: int

    @staticmethod
    def of(folder: Path, dtype: torch.dtype) -> ModelSize:
        """Read a model's folder; nothing but config.json is opened."""
        config = read_config(folder)
        text: Any = config.get_text_config()
        parameters = sum(value.numel() for value in without_weights(config).parameters())
        d_model, heads = text.hidden_size, text.num_attention_heads
        head = getattr(text, "head_dim", None) or d_model // heads
        # Of a mixture of experts those that a token goes through.
        inner = getattr(text, "intermediate_size", None) or 4 * d_model
        active = getattr(text, "num_experts_per_tok", None) or 1
        inner = active * (getattr(text, "moe_intermediate_size", None) or inner)
        kv = getattr(text, "num_key_value_heads", None) or heads
        size = torch.finfo(dtype).bits // 8
        return ModelSize(
            parameters, text.num_hidden_layers, d_model, inner, heads * head, kv * head, text.vocab_size, size
        )

    @property
    def weights(self) -> float:
        """Bytes of the weights."""
        return float(self.parameters * self.number_bytes)

    def forward(self, tokens: int) -> float:
        """Bytes that one block's pass over a batch holds at once: the stream, two norms in float32, and the MLP's three parts."""
        attention = self.d_heads * 2 + self.d_kv * 2
        return tokens * (self.number_bytes * (3 * self.d_model + max(3 * self.d_mlp, attention)) + 8.0 * self.d_model)

    def extraction(self, tokens: int) -> float:
        """The activations of all blocks, once as they are and once scaled."""
        batch = min(tokens, BATCH_TOKENS)
        return 2.0 * batch * self.blocks * self.d_model * self.number_bytes + self.forward(batch)

    def generation(self, rows: int, length: int) -> float:
        """Keys and values of all rows, grown by copying, and the logits of one step in float32 with two of their kind."""
        cache = 2.0 * rows * length * self.d_kv * self.number_bytes
        return (self.blocks + 1) * cache + rows * self.vocabulary * (self.number_bytes + 12.0)

    def closed_form(self, tokens: int) -> float:
        """Three hidden states a token; the sums of both halves in float64, and of solving five matrices of each kind more."""
        states = 3.0 * tokens * self.d_model * self.number_bytes
        # Of both output projections together, or of the MLP's beside its input.
        inputs = self.d_mlp + max(self.d_heads, self.d_model)
        square, across = 8.0 * inputs**2, 8.0 * inputs * self.d_model
        fit = 2 * (square + across) + max(self.forward(min(tokens, BATCH_TOKENS)), 4 * square + 3 * across)
        return states + max(fit, self.comparison)

    @property
    def comparison(self) -> float:
        """Two models' distributions at a chunk of tokens (see `logprobs.chunks`), in six arrays of float64."""
        return 48.0 * self.vocabulary * max(1, min(CHUNK_TOKENS, CHUNK_BYTES // (4 * self.vocabulary)))

    def distillation(self, tokens: int, batch: int, recompute_every: int, rank: int) -> float:
        """Two states a token, the inputs of all blocks of a batch and the insides of those that are kept, and four copies of a LoRA."""
        kept = self.blocks * (1 - 1 / recompute_every) if recompute_every else self.blocks
        inside = 4.0 * batch * (8 * self.d_model + 2 * self.d_heads + 2 * self.d_kv + 4 * self.d_mlp)
        lora = 16.0 * rank * self.blocks * (6 * self.d_model + 2 * self.d_heads + 3 * self.d_mlp)
        states = 2.0 * tokens * self.d_model * self.number_bytes
        return states + 4.0 * batch * self.d_model * self.blocks + (kept + 1) * inside + lora

    def verification(self, tokens: int) -> float:
        """The artifact beside the base until both are found to be equal, then states of three models."""
        states = 4.0 * tokens * self.d_model * self.number_bytes
        return max(self.weights, states + max(self.forward(min(tokens, BATCH_TOKENS)), self.comparison))


class _NoSizeError(CompileSteerError):
    """config.json does not say what is needed here."""


def plan_memory(size: ModelSize, recipe: Recipe, data: Behaviour) -> dict[str, float]:
    """Bytes of each stage, weights included."""
    options, verify = recipe.compile, recipe.verify
    calibration = options.calibration.prompts * (_length(data.calibration) + options.calibration.max_new_tokens)
    training = options.distill.prompts * (_length(data.calibration) + options.calibration.max_new_tokens)
    sides = [side for pair in data.train for side in (pair.positive, pair.negative)]
    rows = min(_GENERATED_ROWS, max(1, recipe.validate_.prompts))
    answer = _length([pair.positive for pair in data.test]) + recipe.validate_.max_new_tokens
    heldout = (verify.heldout + verify.neutral) * (_length(data.heldout) + verify.max_new_tokens)
    stages = {
        "extraction": size.extraction(round(len(sides) / 2 * _length(sides))),
        "validation": size.generation(rows, answer) + size.forward(BATCH_TOKENS),
        "writing texts": size.generation(
            options.calibration.batch, _length(data.calibration) + options.calibration.max_new_tokens
        ),
        "closed_form": size.closed_form(calibration),
        "distill": size.distillation(
            training, options.distill.batch_tokens, options.distill.recompute_every, options.distill.rank
        ),
        "verification": size.verification(heldout),
    }
    if options.backends != "auto":
        fitted = {"closed_form", "distill"} - {*options.backends}
        stages = {name: value for name, value in stages.items() if name not in fitted}
    else:
        del stages["distill"]
    return {name: size.weights + value for name, value in stages.items()}


def _length(texts: Any) -> int:
    """Tokens of a text, on average and rounded up."""
    characters = [len(text.prompt) + len(text.response) + len(text.system) for text in texts]
    return round(sum(characters) / max(1, len(characters)) / _CHARACTERS) + _TEMPLATE


def free_memory(device: torch.device) -> float | None:
    """Bytes that the device has for this process; None where that cannot be said."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def peak_memory(folder: Path, recipe: Recipe, data: Behaviour) -> float | None:
    """Bytes that a whole run needs at once; None for a family with other words for its sizes."""
    if (size := _size(folder, recipe)) is None:
        return None
    plan = _by_all({**plan_memory(size, recipe, data), "base": size.weights}, choose_device(recipe.device))
    # The verifier is a process beside the one that compiled, which still holds the base.
    return max(*plan.values(), plan["verification"] + plan["base"])


def require_memory(recipe: Recipe, data: Behaviour) -> str:
    """Return the plan in one line; raises `RecipeError`, with what would fit, where a stage needs more than there is."""
    folder = find_model(recipe.model).folder
    require_plain(folder)
    if (size := _size(folder, recipe)) is None:
        return "memory is not planned for this family: its config.json has other keys"
    device = choose_device(recipe.device)
    plan = _by_all(plan_memory(size, recipe, data), device)
    line = ", ".join(f"{name} {_gib(value)}" for name, value in plan.items())
    stage, most = max(plan.items(), key=lambda item: item[1])
    free = free_memory(device)
    if recipe.device_map is None and free is not None and most * _SPARE > free:
        raise RecipeError(
            [
                f"memory: {stage} needs about {_gib(most)}, of which weights {_gib(size.weights)}; {device} has {_gib(free)} free.",
                *_remedies(size, recipe, data, free),
            ]
        )
    return f"memory planned: weights {_gib(size.weights)}; with them {line}"


def _size(folder: Path, recipe: Recipe) -> ModelSize | None:
    try:
        with quiet_library_errors(_NoSizeError):
            return ModelSize.of(folder, DTYPES[recipe.dtype])
    except _NoSizeError:  # a family with other words for its sizes; or damaged, which loading explains
        return None


def _by_all(plan: dict[str, float], device: torch.device) -> dict[str, float]:
    """What all processes that share a device need on it, of what one does."""
    if device.type != "cpu":
        return plan
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if distributed.count() > 1 else 1
    return {name: here * (value + LIBRARIES) for name, value in plan.items()}


def _remedies(size: ModelSize, recipe: Recipe, data: Behaviour, free: float) -> list[str]:
    """What would fit, tried by the same formulas."""
    remedies = []
    half = replace(size, number_bytes=2)
    if recipe.dtype == "float32" and _SPARE * max(plan_memory(half, recipe, data).values()) < free:
        remedies.append("dtype: bfloat16 would fit.")
    block = size.weights / size.blocks
    others = {
        name: value - size.weights for name, value in plan_memory(size, recipe, data).items() if name != "distill"
    }
    if "distill" not in recipe.compile.backends and _SPARE * (2 * block + max(others.values())) < free:
        remedies.append("device_map: auto would fit: what is too much goes to main memory and disk, and takes longer.")
    return remedies or ["Needed: a device with more memory, a smaller model, or fewer and shorter texts."]


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"
