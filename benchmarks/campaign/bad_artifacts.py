"""Artifacts that are wrong: adapters of others, and files of ours that are something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.campaign.case import NAME, Bad, Case
from benchmarks.campaign.edits import SPOILS, edit_json, edit_tensors

RECIPE = f"recipes/{NAME}.yaml"
FOREIGN = "adapter"
COMMANDS: dict[str, tuple[str, ...]] = {
    "audit": ("audit", "model", FOREIGN),
    "export": ("export", FOREIGN, "--for", "vllm", "--out", "out"),
    "decompile": ("decompile", RECIPE, "--out", "out", "--artifact", FOREIGN),
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS: tuple[dict[str, Any], ...] = (
    {"r": "8"},
    {"r": 0},
    {"r": -1},
    {"r": 1.5},
    {"r": None},
    {"r": 10**9},
    {"lora_alpha": "much"},
    {"lora_alpha": None},
    {"lora_alpha": float("nan")},
    {"lora_alpha": float("inf")},
    {"peft_type": "PREFIX_TUNING"},
    {"peft_type": "MAGIC"},
    {"peft_type": 7},
    {"peft_type": None},
    {"use_dora": True},
    {"use_rslora": "yes"},
    {"rank_pattern": [1]},
    {"rank_pattern": {"down_proj": "many"}},
    {"alpha_pattern": {"down_proj": None}},
    {"alpha_pattern": {"down_proj": float("nan")}},
    {"alpha_pattern": 7},
    {"modules_to_save": ["lm_head"]},
    {"lora_bias": True},
    {"layer_replication": [[0, 4], [2, 4]]},
    {"target_parameters": ["model.layers.2.mlp.up_proj.weight"]},
    {"trainable_token_indices": [1, 2]},
    {"target_modules": ["q_proj"]},
    {"target_modules": None},
    {"target_modules": "(([a-z]|[a-z_.0-9])+)+X"},
    {"rank_pattern": {"(([a-z]|[a-z_.0-9])+)+X": 8}},
    {"exclude_modules": ".*"},
    {"init_lora_weights": "loftq"},
    {"lora_alpha": 1e300},
    {"base_model_name_or_path": ["x"]},
)
Tensors = dict[str, Tensor]
_BLOCK = re.compile(r"\.layers\.\d+\.")
# Of the tensors and the names of one pair of factors among them.
WEIGHT_EDITS: dict[str, Callable[[Tensors, str, str], object]] = {
    "nothing": lambda t, _a, _b: t.clear(),
    "A without B": lambda t, _a, b: t.pop(b),
    "B without A": lambda t, a, _b: t.pop(a),
    "ranks that differ": lambda t, a, _b: t.update({a: torch.cat([t[a], t[a]])}),
    "a width that differs": lambda t, a, _b: t.update({a: t[a][:, :-1]}),
    "a height that differs": lambda t, _a, b: t.update({b: t[b][:-1]}),
    "a vector as A": lambda t, a, _b: t.update({a: t[a][0]}),
    "NaN": lambda t, a, _b: t[a].view(-1).__setitem__(3, float("nan")),
    "infinity": lambda t, _a, b: t[b].view(-1).__setitem__(3, float("inf")),
    "integers": lambda t, a, b: t.update({a: t[a].to(torch.int8), b: t[b].to(torch.int8)}),
    "a block too many": lambda t, a, b: t.update({_BLOCK.sub(".layers.9.", name): t[name].clone() for name in (a, b)}),
    "an unknown module": lambda t, a, b: t.update({name.replace("down_proj", "magic"): t.pop(name) for name in (a, b)}),
    "an unknown suffix": lambda t, a, _b: t.update({a.replace("lora_A", "lora_C"): torch.ones(2, 48)}),
    "a magnitude of DoRA": lambda t, a, _b: t.update(
        {a.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}
    ),
    "a whole matrix beside": lambda t, _a, _b: t.update({"base_model.model.lm_head.weight": torch.ones(97, 32)}),
    "names without PEFT's prefix": lambda t, _a, _b: t.update(
        {name.removeprefix("base_model.model."): t.pop(name) for name in list(t)}
    ),
    "PEFT's prefix twice": lambda t, _a, _b: t.update({f"base_model.model.{name}": t.pop(name) for name in list(t)}),
    "names without meaning": lambda t, _a, _b: t.update({f"x{n}": t.pop(name) for n, name in enumerate(list(t))}),
}
BROKEN = {"a list": "[]", "a number": "7", "brackets": "[" * 50_000, "r twice": '{"r": 2, "r": 8, "peft_type": "LORA"}'}
BIAS, CLOSED, SUMMED = f"adapters/{NAME}-bias", f"adapters/{NAME}-closed_form", f"merged/{NAME}-bias-fp32"


def _verify(artifact: str, command: str = "verify") -> tuple[str, ...]:
    return command, RECIPE, "--out", "finished", "--artifact", f"finished/{artifact}"


# Files of the finished run, and the command that reads them.
OURS: dict[str, tuple[str, ...]] = {
    f"vectors/{NAME}.safetensors": ("compile", RECIPE, "--out", "finished", "--force"),
    f"vectors/{NAME}.directions.safetensors": ("show", f"finished/vectors/{NAME}.directions.safetensors"),
    f"vectors/{NAME}.validation.json": ("compile", RECIPE, "--out", "finished"),
    f"{SUMMED}/compile_steer.json": ("show", f"finished/{SUMMED}"),
    f"{BIAS}/patch.safetensors": _verify(BIAS, "merge"),
    **{f"{CLOSED}/{file}": _verify(CLOSED) for file in ("compile_steer.json", CONFIG, WEIGHTS)},
    **{f"{SUMMED}/{file}": _verify(SUMMED) for file in ("config.json", "model.safetensors", "tokenizer.json")},
}
RECORDS: dict[str, Callable[[Any], object]] = {
    "an unknown backend": lambda r: r.update(backend="magic"),
    "a backend that is a list": lambda r: r.update(backend=["bias"]),
    "no model": lambda r: r.pop("model"),
    "a recipe that is a text": lambda r: r.update(recipe="tide"),
    "seconds that are a text": lambda r: r.update(seconds="long"),
    "a verdict that is none": lambda r: r.update(verdict="splendid"),
    "a fingerprint of texts": lambda r: r.update(fingerprint=["a"]),
    "a form that is none": lambda r: r.update(form="papyrus"),
}


def _foreign(edit: Callable[[Path], object], case: Case) -> None:
    """Make an adapter of somebody's: ours, of which only the two files of every adapter are left; then edit it."""
    folder = case.root / FOREIGN
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((case.adapter / name).read_bytes())
    edit(folder)


def _setting(settings: dict[str, Any], folder: Path) -> None:
    edit_json(folder / CONFIG, lambda found: found.update(settings))


def _weights(change: Callable[[Tensors, str, str], object], folder: Path) -> None:
    def apply(tensors: Tensors) -> None:
        a = next(name for name in sorted(tensors) if name.endswith("down_proj.lora_A.weight"))
        change(tensors, a, a.replace("lora_A", "lora_B"))

    edit_tensors(folder / WEIGHTS, apply)


# What cannot be seen without the base, which an export for vLLM needs not.
AGAINST_BASE = ("a width that differs", "a height that differs", "a block too many", "an unknown module")


def _of_adapter(name: str, edit: Callable[[Path], object], file: str) -> Iterator[Bad]:
    for command, arguments in COMMANDS.items():
        if command == "export" and name in AGAINST_BASE:
            continue
        yield Bad(f"artifact: {command} of an adapter with {name}", partial(_foreign, edit), (file,), arguments, True)


def _ours(file: str, edit: Callable[[Path], object], case: Case) -> None:
    edit(case.finished / file)


def inputs() -> Iterator[Bad]:
    """Adapters of others by every command that takes one; our own files by the command that reads them."""
    for settings in SETTINGS:
        yield from _of_adapter(json.dumps(settings)[1:-1], partial(_setting, settings), FOREIGN)
    for name, change in WEIGHT_EDITS.items():
        yield from _of_adapter(name, partial(_weights, change), FOREIGN)
    for name, text in BROKEN.items():
        edit = partial(_written, CONFIG, text)
        yield from _of_adapter(f"{CONFIG} of {name}", edit, CONFIG)
    for file in (CONFIG, WEIGHTS):
        yield from _of_adapter(f"no {file}", partial(_removed, file), FOREIGN)
        for name, spoil in SPOILS.items():
            yield from _of_adapter(f"{file} that is {name}", partial(_inside, file, spoil), file)
    for file, command in OURS.items():
        for name, spoil in SPOILS.items():
            edit_case = partial(_ours, file, spoil)
            yield Bad(f"artifact: {file} that is {name}", edit_case, (Path(file).name,), command, True)
    for name, record in RECORDS.items():
        file = f"{CLOSED}/compile_steer.json"
        edit_case = partial(_ours, file, partial(edit_json, change=record))
        yield Bad(f"artifact: record with {name}", edit_case, (f"{NAME}-closed_form",), OURS[file], True)


def _written(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)


def _removed(name: str, folder: Path) -> None:
    (folder / name).unlink()


def _inside(name: str, spoil: Callable[[Path], object], folder: Path) -> None:
    spoil(folder / name)
