"""Adapters of strangers: what PEFT would ignore, start at random or never end on is refused by every command in the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from compile_steer.export.adapter import write_lora
from compile_steer.models.load import LoadedModel
from compile_steer.models.reload import reload
from compile_steer.steering.low_rank import LowRank
from compile_steer.tools.decompile import _fine_tuned
from compile_steer.tools.serving.export import export
from tests.helpers.auditing import DOWN, look, on_disk
from tests.helpers.tiny import FFN, HIDDEN, Padded, logits, relative_error, texts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = f"base_model.model.{DOWN}"
CATASTROPHE = "(([a-z]|[a-z_.0-9])+)+X"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return on_disk("llama", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compile_steer.models.adapter_patterns._SECONDS", 0.1)


def adapter(
    folder: Path, base: LoadedModel, settings: dict[str, Any], change: Callable[[dict[str, Tensor]], object]
) -> Path:
    """An adapter of rank 1 on one projection, with changed settings and tensors."""
    folder.mkdir()
    write_lora(folder, {DOWN: LowRank(torch.ones(HIDDEN, 1) / 9, torch.ones(1, FFN) / 9)}, base.source, False)
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.update({name.replace(old, new): tensors.pop(name)}) for name in list(tensors)]


def scaled(letter: str, factor: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[f"{KEY}.lora_{letter}.weight"].mul_(factor)


REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], str]] = {
    "rslora is a text": ({"use_rslora": "yes"}, len, f"{CONFIG}.*use_rslora: found 'yes'"),
    "blocks repeated": ({"layer_replication": [[0, 4], [2, 4]]}, len, "layer_replication is"),
    "integers": ({}, lambda t: t.update({name: t[name].char() for name in t}), f"{DOWN}: the factors are no floats"),
    "complex": ({}, lambda t: t.update({name: t[name] + 0j for name in t}), f"{DOWN}: the factors are no floats"),
    "a matrix beside": ({}, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "lm_head.weight is not one"),
    "infinity": ({}, scaled("B", float("inf")), f"{DOWN}: it holds NaN or infinity"),
    "NaN in A alone": ({}, scaled("A", float("nan")), f"{DOWN}: it holds NaN or infinity"),
    "a scale that overflows": ({"lora_alpha": 1e300}, len, f"{DOWN}: .*float32 cannot hold"),
    "a product that overflows": ({}, lambda t: [factor.mul_(1e21) for factor in t.values()], f"{DOWN}: .*float32 cannot hold"),
    "no rank": ({"r": 0}, len, f"{CONFIG}.*r: found 0"),
    "a huge rank": ({"r": 10**12}, len, f"rank 1, {CONFIG} says 1000000000000"),
    "targets without it": ({"target_modules": ["q_proj"]}, len, f"{DOWN} has factors, but target_modules"),
    "targets of another case": ({"target_modules": "MODEL.*"}, len, f"{DOWN} has factors, but target_modules"),
    "no targets": ({"target_modules": None}, len, "target_modules names no modules"),
    "excluded": ({"exclude_modules": ["down_proj"]}, len, f"{DOWN} has factors, but target_modules"),
    "another block": ({"target_modules": ["down_proj"], "layers_to_transform": [0]}, len, f"{DOWN} has factors, but target_modules"),
    "no prefix": ({}, renamed("base_model.model.", ""), "is not base_model.model. and the name"),
    "prefix twice": ({}, renamed("base_model.", "base_model.model.base_model."), "is not base_model.model. and the name"),
    "control codes": ({}, renamed("down_proj", "down\x1b[2J"), r"is not base_model.model. and the name"),
    "adapter's name within": ({}, renamed(".weight", ".default.weight"), "is not one of a pair"),
    "targets that never match": ({"target_modules": CATASTROPHE}, len, f"{CONFIG}: target_modules: .*takes more than 0.1 s"),
    "alphas that never match": ({"alpha_pattern": {CATASTROPHE: 1}}, len, f"{CONFIG}: alpha_pattern: .*takes more than 0.1 s"),
    "targets that are no pattern": ({"target_modules": "(down"}, len, f"{CONFIG}: target_modules: .*is no regular expression"),
    "LoftQ": ({"init_lora_weights": "loftq"}, len, "init_lora_weights is loftq: its base is not"),
    "CorDA": ({"init_lora_weights": "corda"}, len, "init_lora_weights is corda: its base is not"),
    "modules saved": ({"modules_to_save": ["lm_head"]}, len, "modules_to_save is .*: whole modules"),
    "a base that is a list": ({"base_model_name_or_path": ["x"]}, len, f"{CONFIG}.*base_model_name_or_path: found"),
    "an empty factor": ({}, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(8, 0)}), f"{DOWN}: lora_A is .8, 0."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_three_commands_refuse_it_in_the_same_words(case: str, base: LoadedModel, tmp_path: Path) -> None:
    settings, change, message = REFUSED[case]
    folder = adapter(tmp_path / "theirs", base, settings, change)
    problems = []
    commands: list[Callable[[], object]] = [
        lambda: _fine_tuned(folder, base),
        lambda: look(base, folder),
        lambda: export(folder, "vllm", tmp_path / "out"),
    ]
    for command in commands if "never" not in case else commands[:1]:
        with pytest.raises(ArtifactError, match=message) as caught:
            command()
        assert all(str(folder) in problem for problem in caught.value.problems)
        problems.append(caught.value.problems)
    assert all(other == problems[0] for other in problems)
    assert not (tmp_path / "out").exists()


MISFITS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object]]] = {
    "a block too many": ({"target_modules": "all-linear"}, renamed("layers.1", "layers.9")),
    "an unknown module": ({"target_modules": ["magic"]}, renamed("down_proj", "magic")),
    "a module of no matrix": ({"target_modules": ["input_layernorm"]}, renamed("mlp.down_proj", "input_layernorm")),
    "another width": ({}, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(1, FFN - 1)})),
    "another height": ({}, lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(HIDDEN + 1, 1)})),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("engine", ["vllm", "transformers", "llama.cpp"])
def test_an_adapter_of_another_base_is_not_exported(case: str, engine: Any, base: LoadedModel, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "theirs", base, *MISFITS[case])
    for named in (None, base.source):
        with pytest.raises(ArtifactError, match=r"theirs: .*the base.*made for"):
            export(folder, engine, tmp_path / "out", named)
    with pytest.raises(ArtifactError, match="theirs"):
        _fine_tuned(folder, base)
    with pytest.raises(ArtifactError, match="theirs|Name the base"):
        look(base, folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.1\.mlp\.(down|side)_proj"},
        {"target_modules": ["down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"lora_alpha": 0},
        {"lora_alpha": -8.5},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}},
        {"task_type": None, "peft_version": "9.9"},
        {"base_model_name_or_path": "https://host/model\x1b[2J"},
    ],
    ids=str,
)
def test_what_is_read_is_what_peft_computes(settings: dict[str, Any], base: LoadedModel, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "theirs", base, settings, scaled("A", 3.0))
    batch = Padded.of(texts(), "right")
    expected = logits(reload(folder, base).model, batch)
    assert relative_error(logits(_fine_tuned(folder, base).model, batch), expected) < 1e-6
    export(folder, "transformers", tmp_path / "out")
    assert relative_error(logits(reload(tmp_path / "out", base).model, batch), expected) < 1e-6


def test_a_pattern_that_never_ends_is_refused_before_peft_sees_it(base: LoadedModel, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "theirs", base, {"rank_pattern": {CATASTROPHE: 1}}, len)
    with pytest.raises(ArtifactError, match=f"{CONFIG}: rank_pattern: .*takes more than 0.1 s"):
        reload(folder, base)
