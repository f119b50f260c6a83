"""What computes the same is measured once; what only looks the same is measured by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from compile_steer.artifacts.provenance import Provenance
from compile_steer.models import tokens
from compile_steer.models.text import Text
from compile_steer.verification import stage
from compile_steer.verification.parity import Parity
from compile_steer.verification.reference import Reference
from compile_steer.verification.stage import verify_artifact
from tests.helpers.verification import PROGRAM_HASH, VerifierCase, make_reference

SETTINGS: dict[str, Any] = {"prompts_per_set": 2, "long": 0, "free_tokens": 4, "capability": 2}
UNSEEN = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def adapter(case: VerifierCase) -> Parity:
    return case.parity_of(case.adapter())


def refuse(*_args: object) -> None:
    raise AssertionError("measured again")


def verified(case: VerifierCase, folder: Path, reference: Reference | None = None) -> Parity:
    return verify_artifact(reference or case.reference, folder, PROGRAM_HASH)


def test_a_merge_that_computes_what_its_adapter_does_takes_over_its_measurements(
    case: VerifierCase, adapter: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "measure", refuse)
    merged = verified(case, rewritten(case.merged_adapter(), 1))
    assert (
        "are those of closed_form adapter: it computes the same, with equal weights, and log p within"
        in merged.inherited
        and not adapter.inherited
    )
    assert merged.behaviour == adapter.behaviour and merged.capability == adapter.capability
    assert merged.prompt_sets == adapter.prompt_sets and merged.adapter is None
    assert merged.divergence.kl.value == pytest.approx(adapter.divergence.kl.value, rel=1e-4)
    kept = {check.name for check in adapter.checks} - {"adapter at scale 0", "random adapters"}
    assert {check.name for check in merged.checks} == kept, "every check of a whole model is made"


def test_an_exact_compile_takes_over_those_of_the_steered_model(
    case: VerifierCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = verified(case, case.merged("alone"), unknown(case))
    assert not alone.inherited
    monkeypatch.setattr(stage, "measure", refuse)
    exact = verified(case, case.merged())
    assert "are those of the steered model" in exact.inherited and exact.passed
    for one, other in zip(exact.prompt_sets, alone.prompt_sets, strict=True):
        assert other.kl == pytest.approx(one.kl, abs=1e-9) and one.greedy == other.greedy
        assert one.sampled == other.sampled
    assert exact.capability == alone.capability and exact.behaviour.sample == alone.behaviour.sample
    tests = zip(exact.behaviour.tests, alone.behaviour.tests, strict=True)
    assert all(one.difference == pytest.approx(other.difference, abs=1e-5) for one, other in tests)


def rewritten(folder: Path, indent: int) -> Path:
    """The same artifact in other files: what its configuration says, written otherwise."""
    (path,) = [*folder.glob("config.json"), *folder.glob("adapter_config.json")]
    path.write_text(json.dumps(json.loads(path.read_text()), indent=indent))
    Provenance.read(folder).write(folder)
    return folder


def test_the_same_files_are_read_once(case: VerifierCase, adapter: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "reload", refuse)
    folder = case.adapter("the-same")
    replace(Provenance.read(folder), backend="distill", seconds=7.0).write(folder)
    other = verified(case, folder)
    assert other.inherited == "measurements are those of closed_form adapter: the files are the same"
    assert (other.backend, other.compile_seconds) == ("distill", 7.0)
    assert other.checks == adapter.checks and other.divergence == adapter.divergence
    assert other.sha256 == adapter.sha256
    for changed in ({"backend": "orthogonalise"}, {"fingerprint": [0.0]}, {"form": "merged-fp32"}):
        replace(Provenance.read(folder), **changed).write(folder)
        with pytest.raises(AssertionError, match="again"):
            verified(case, folder)


def unknown(case: VerifierCase) -> Reference:
    """A reference that has measured nothing that an artifact could be the same as."""
    reference = make_reference(case.base, case.program, **case.verify)
    reference.measured = []
    return reference


def spoil(folder: Path, what: str) -> None:
    """A fault that the texts of the verifier hardly show, or not at all; the record is of the faulty files."""
    weights = load_file(folder / "model.safetensors")
    if what == "weights":
        weights["model.layers.1.mlp.down_proj.weight"] *= 1 + 1e-3
    elif what == "a token of no text":
        weights[UNSEEN][-1] += 1.0
    elif what == "end of an answer":
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, 50]}))
    elif what == "configuration":
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 200}))
    elif what == "names of tokens":
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"w50"', '"w-50"'))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Provenance.read(folder).write(folder)


@pytest.mark.parametrize(
    "what", ["weights", "a token of no text", "end of an answer", "configuration", "names of tokens"]
)
def test_one_that_may_not_do_the_same_is_measured(case: VerifierCase, adapter: Parity, what: str) -> None:
    folder = case.merged_adapter(what.replace(" ", "-"))
    spoil(folder, what)
    assert verified(case, folder).inherited == ""


@pytest.mark.parametrize("what", ["end of an answer", "configuration", "names of tokens"])
def test_of_one_that_reads_otherwise_nothing_is_taken_over(case: VerifierCase, what: str) -> None:
    """Its weights are the same, and what it computes of the verifier's texts; but it was measured first."""
    faulty, sound = case.merged_adapter(f"{what.replace(' ', '-')}-first"), case.merged_adapter("sound-after")
    spoil(faulty, what)
    reference = unknown(case)
    assert verified(case, faulty, reference).inherited == ""
    assert verified(case, sound, reference).inherited == ""


def test_each_text_is_encoded_once_for_an_artifact_that_takes_over(
    case: VerifierCase, adapter: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, encoded, encode = (
        rewritten(case.merged_adapter("encoded"), 3),
        list[tuple[object, Text]](),
        tokens.encode_checked,
    )

    def counted(tokenizer: PreTrainedTokenizerBase, text: Text) -> tuple[tokens.Encoded, bool]:
        encoded.append((tokenizer, text))
        return encode(tokenizer, text)

    monkeypatch.setattr(tokens, "encode_checked", counted)
    assert verified(case, folder).inherited
    texts = [text for tokenizer, text in encoded if tokenizer is not case.base.tokenizer]
    assert len(texts) == len(encoded) == sum(map(len, case.reference.texts))


def test_nothing_is_taken_over_from_a_report_on_disk(case: VerifierCase, adapter: Parity) -> None:
    adapter.save(case.folder / "adapter" / "parity.json")
    assert verified(case, case.merged_adapter("later"), unknown(case)).inherited == ""


def test_rounding_is_measured_where_it_can_matter(case: VerifierCase, adapter: Parity) -> None:
    folder = case.merged_adapter("rounded", "bf16")
    rounded = verified(case, folder)
    assert "rounding moves it by KL" in rounded.inherited and rounded.behaviour == adapter.behaviour
    assert rounded.rounding is not None and rounded.rounding.kl_edited is None
    assert rounded.divergence.kl != adapter.divergence.kl, "the KL is its own"
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 0.1 * torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Provenance.read(folder).write(folder)
    assert verified(case, folder).inherited == ""


def test_an_adapter_that_computes_what_another_does_takes_over_all_but_its_own_controls(
    case: VerifierCase, adapter: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rewritten(case.adapter("of-another-backend"), 1)
    replace(Provenance.read(folder), backend="distill").write(folder)
    monkeypatch.setattr(stage, "measure", refuse)
    other = verified(case, folder)
    assert "are those of closed_form adapter: it computes the same" in other.inherited
    assert other.behaviour == adapter.behaviour and other.wordings == adapter.wordings
    assert other.adapter == adapter.adapter, "measured by itself, with the same outcome"


def test_an_adapter_with_an_edit_of_a_token_that_no_text_has_is_measured(case: VerifierCase, adapter: Parity) -> None:
    folder = case.adapter("with-embeddings")
    config, weights = folder / "adapter_config.json", load_file(folder / "adapter_model.safetensors")
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "target_modules": [*settings["target_modules"], "model.embed_tokens"]}))
    width, words = case.base.layout.d_model, case.base.model.get_input_embeddings().weight.shape[0]
    rank = settings["rank_pattern"].get("model.embed_tokens", settings["r"])
    A = torch.zeros(rank, words)
    A[:, -1] = 1.0
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    weights |= {f"{prefix}A": A, f"{prefix}B": torch.ones(width, rank)}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    Provenance.read(folder).write(folder)
    assert verified(case, folder).inherited == ""
