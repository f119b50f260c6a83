"""A tiny model with a program and what was compiled from it on disk, for the tests of the verifier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour, Context
from compile_steer.export.adapter import write_patch
from compile_steer.export.merged import write_merged
from compile_steer.models.load import LoadedModel
from compile_steer.models.source import revision_of
from compile_steer.models.text import Pair, Text
from compile_steer.recipe import Recipe
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.verification.parity import Parity
from compile_steer.verification.reference import Reference
from compile_steer.verification.stage import verify_artifact
from tests.helpers.tiny import HIDDEN, VOCAB, build, chat_tokenizer, intervention

SPLITS = ("train", "validation", "test", "neutral", "heldout", "calibration")
WRITER, BLOCK = "mlp.down_proj", 1
PROGRAM_HASH = "hash of the program"


class RecordedNotes(Progress):
    """Keeps the notes that are printed before the work goes on."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def words(seed: int, count: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(6, 97, (count,), generator=torch.Generator().manual_seed(seed)))


def behaviour(**changes: Any) -> Behaviour:
    """Test pairs that the program below moves, held-out prompts and neutral texts; all short."""
    pairs = tuple(
        Pair(Text(words(n, 4), f"w40 {words(n + 300, 3)}"), Text(words(n, 4), f"w50 {words(n + 600, 2)}"), words(n, 4))
        for n in range(12)
    )
    neutral = tuple(Text(words(n, 4), words(n + 400, 6)) for n in range(9000, 9006))
    heldout = tuple(Text(words(n, 3 + n % 3)) for n in range(7000, 7008))
    return Behaviour(**{
        **{name: () for name in ("train", "validation", "calibration")},
        "test": pairs, "neutral": neutral, "heldout": heldout, "hashes": {}, **changes,
    })  # fmt: skip


def recipe(**verify: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": "tiny",
            "seed": 3,
            "ask": "w9 w8",
            "data": {name: f"{name}.jsonl" for name in SPLITS},
            "validate": {"score": {"kind": "keywords", "patterns": ["w4[0-9]"]}},
            "verify": {"max_new_tokens": 6, "capability": 0, **verify},
            "folder": Path(),
        }
    )


def make_reference(
    base: LoadedModel,
    program: Program,
    data: Behaviour | None = None,
    progress: Progress | None = None,
    **verify: Any,
) -> Reference:
    """The reference of the recipe above, for other data if given."""
    options = recipe(**verify)
    context = Context(base, data or behaviour(), options.seed, progress or Progress())
    return Reference(context, program, options.verify, options.validate_.score, options.ask)


@dataclass
class VerifierCase:
    """A base on disk, the program, and the folder in which artifacts are written."""

    folder: Path
    base: LoadedModel
    program: Program
    verify: dict[str, Any]

    @staticmethod
    def of(
        folder: Path,
        positions: str = "all",
        tokenizer: PreTrainedTokenizerFast | None = None,
        vocab_size: int = VOCAB,
        **verify: Any,
    ) -> VerifierCase:
        model, words = build("llama", max_position_embeddings=128, vocab_size=vocab_size), tokenizer or chat_tokenizer()
        model.save_pretrained(folder / "base")
        words.save_pretrained(folder / "base")
        base = LoadedModel(model, words, "tiny-llama", revision_of(str(folder / "base")), str(folder / "base"))
        program = Program((intervention(layer=BLOCK, positions=positions),), base.id, base.revision)
        return VerifierCase(folder, base, program, verify)

    @cached_property
    def reference(self) -> Reference:
        return make_reference(self.base, self.program, **self.verify)

    @property
    def module(self) -> str:
        return f"model.layers.{BLOCK}.{WRITER}"

    def origin(self, form: str, backend: str) -> Provenance:
        return Provenance(
            "tiny", backend, form, self.base.id, self.base.revision, "tiny.safetensors", PROGRAM_HASH, "report hash",
            "pass", False, "recipe hash", {}, 3, 1.5, "inputs",
        )  # fmt: skip

    def merged(self, name: str = "merged") -> Path:
        """The exact compile: the constant as the writer's bias."""
        (one,) = self.program.interventions
        patch = WeightPatch(bias={self.module: one.coefficient * one.vector}, config_flags=("mlp_bias",))
        folder = self.folder / name
        write_merged(folder, patch, self.base, "fp32", self.origin("merged-fp32", "bias"), "")
        return folder

    @property
    def patch(self) -> WeightPatch:
        """A poor approximation, of rank 3 on two Linears: constant where the writer's input is, plus noise."""
        (one,) = self.program.interventions
        generator = torch.Generator().manual_seed(5)
        edits = {}
        for module in (self.module, f"model.layers.{BLOCK + 1}.self_attn.o_proj"):
            d_in = self.base.model.get_submodule(module).in_features
            B = torch.cat([(one.coefficient * one.vector)[:, None], torch.randn(HIDDEN, 2, generator=generator)], dim=1)
            edits[module] = LowRank(B, 0.3 * torch.randn(3, int(d_in), generator=generator))
        return WeightPatch(edits)

    def adapter(self, name: str = "adapter") -> Path:
        """The patch as an adapter."""
        folder = self.folder / name
        write_patch(folder, self.patch, self.base, self.origin("adapter", "closed_form"), "")
        return folder

    def merged_adapter(self, name: str = "merged-adapter", precision: str = "fp32") -> Path:
        """The same patch, merged."""
        folder = self.folder / name
        write_merged(folder, self.patch, self.base, precision, self.origin(f"merged-{precision}", "closed_form"), "")
        return folder

    def parity_of(self, folder: Path) -> Parity:
        return verify_artifact(self.reference, folder, PROGRAM_HASH)
