"""Faults as they lie on disk: each a function of an artifact's folder and the base's, which changes the first alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compile_steer.artifacts.provenance import Provenance

Plant = Callable[[Path, Path], None]
Tensors = dict[str, Tensor]
# What the verifier itself is given: as it should be, a program for the response alone, a base that a hook was left on.
VerifierState = Literal["sound", "response only", "hooked base"]


@dataclass(frozen=True)
class Fault:
    """What is wrong with which form, and how to make it so.

    `several_ranks`: it takes an adapter of a rank above 1, as linear edits have (`compile.dial`), and a neuron that is a constant
    has not.
    """

    name: str
    form: Literal["adapter", "merged-fp32"]
    plant: Plant
    verifier: VerifierState = "sound"
    several_ranks: bool = False


def plant(fault: Plant, folder: Path, base: Path) -> None:
    """Plant it as a compiler that made this mistake would have left it: the record of the files is of the faulty ones.

    A change of files that are recorded otherwise is refused whatever it does, and shows nothing of the measurements.
    """
    fault(folder, base)
    Provenance.read(folder).write(folder)


def weights_file(folder: Path) -> Path:
    """The folder's one file of weights; raises `ValueError` for none or several."""
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} files of weights; needed: one, not split.")
    return found[0]


@contextmanager
def _weights(folder: Path) -> Iterator[Tensors]:
    path = weights_file(folder)
    tensors = load_file(path)
    yield tensors
    save_file({name: one.contiguous().clone() for name, one in tensors.items()}, path, metadata={"format": "pt"})


@contextmanager
def _json(path: Path) -> Iterator[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    yield content
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


# ----------------------------------------------------------------------------------------- adapters


def _pairs(tensors: Tensors) -> list[tuple[str, str]]:
    """The names of (lora_A, lora_B), the one whose product is largest first."""
    names = [(name, name.replace(".lora_A.", ".lora_B.")) for name in tensors if ".lora_A." in name]
    return sorted(names, key=lambda pair: -float(torch.linalg.norm(tensors[pair[1]] @ tensors[pair[0]])))


def scaled(factor: float) -> Plant:
    """Every B times `factor`."""

    def plant(folder: Path, _base: Path) -> None:
        with _weights(folder) as tensors:
            for _a, b in _pairs(tensors):
                tensors[b] *= factor

    return plant


def _further(name: str, blocks: int) -> str:
    return re.sub(r"\.(layers|h)\.(\d+)\.", lambda found: f".{found[1]}.{int(found[2]) + blocks}.", name, count=1)


def moved(blocks: int) -> Plant:
    """Every pair, and the module it is for, so many blocks further on."""

    def plant(folder: Path, _base: Path) -> None:
        with _weights(folder) as tensors:
            kept = {_further(name, blocks): one for name, one in tensors.items()}
            tensors.clear()
            tensors.update(kept)
        with _json(folder / "adapter_config.json") as config:
            config["target_modules"] = [_further(name, blocks) for name in config["target_modules"]]

    return plant


def rank_cut(folder: Path, _base: Path) -> None:
    """One row of every A and one column of every B are left; raises `ValueError` where there are no more."""
    with _json(folder / "adapter_config.json") as config:
        if config["r"] == 1:
            raise ValueError(f"{folder} has rank 1; needed: more, to cut.")
        config["r"] = config["lora_alpha"] = 1
    with _weights(folder) as tensors:
        for a, b in _pairs(tensors):
            tensors[a], tensors[b] = tensors[a][:1], tensors[b][:, :1]


def configured(**changes: Any) -> Plant:
    """Other values in the adapter's config; a callable is given the old one."""

    def plant(folder: Path, _base: Path) -> None:
        with _json(folder / "adapter_config.json") as config:
            config |= {key: new(config[key]) if callable(new) else new for key, new in changes.items()}

    return plant


def largest_zeroed(folder: Path, _base: Path) -> None:
    """The tensor that matters most is all zeros."""
    with _weights(folder) as tensors:
        tensors[_pairs(tensors)[0][1]].zero_()


def largest_missing(folder: Path, _base: Path) -> None:
    """The pair that matters most is not in the file, though the config names its module."""
    with _weights(folder) as tensors:
        for name in _pairs(tensors)[0]:
            del tensors[name]


def overflown(folder: Path, _base: Path) -> None:
    """The same product with its size in A, cast to half precision: what is above 65,504 there is infinite."""
    with _weights(folder) as tensors:
        for a, b in _pairs(tensors):
            size = 2 * 65504 / float(tensors[a].abs().max())
            tensors[a], tensors[b] = (tensors[a] * size).half(), (tensors[b] / size).half()


def of_another_model(folder: Path, _base: Path) -> None:
    """As from a model of the same shape: what each neuron means is another's, here by permutation."""
    with _weights(folder) as tensors:
        for a, b in _pairs(tensors):
            generator = torch.Generator().manual_seed(tensors[a].shape[1])
            tensors[a] = tensors[a][:, torch.randperm(tensors[a].shape[1], generator=generator)]
            tensors[b] = tensors[b][torch.randperm(tensors[b].shape[0], generator=generator)]


# ----------------------------------------------------------------------------------- merged checkpoints


def _change(tensors: Tensors, base: Path) -> Tensors:
    """What merging added, by name; a tensor that the base lacks was 0 there."""
    before = load_file(weights_file(base))
    changes = {name: one - before[name] if name in before else one.clone() for name, one in tensors.items()}
    return {name: change for name, change in changes.items() if bool(change.any())}


def times_merged(factor: float) -> Plant:
    """The base plus so many times what was merged: 0 drops it, 2 is merging twice."""

    def plant(folder: Path, base: Path) -> None:
        with _weights(folder) as tensors:
            for name, change in _change(tensors, base).items():
                tensors[name] += (factor - 1) * change

    return plant


def merged_elsewhere(blocks: int) -> Plant:
    """What was merged, so many blocks further on."""

    def plant(folder: Path, base: Path) -> None:
        with _weights(folder) as tensors:
            changes = _change(tensors, base)
            for name, change in changes.items():
                tensors[name] -= change
            for name, change in changes.items():
                tensors[_further(name, blocks)] += change

    return plant


def of_another_revision(folder: Path, _base: Path) -> None:
    """Merged into weights that were trained a little further: every matrix is off by 1 %."""
    generator = torch.Generator().manual_seed(0)
    with _weights(folder) as tensors:
        for one in tensors.values():
            if one.ndim == 2:
                noise = torch.randn(one.shape, generator=generator)
                one += 0.01 * one.norm() / noise.norm() * noise


def biases_off(folder: Path, _base: Path) -> None:
    """The config says that there are no biases in the MLP, so a stock loader leaves them out without an error."""
    with _json(folder / "config.json") as config:
        config["mlp_bias"] = False


def other_rotation(folder: Path, _base: Path) -> None:
    """A config with another base of the rotary embedding, as a model of longer context has."""
    with _json(folder / "config.json") as config:
        holder = config.get("rope_parameters") or config
        holder["rope_theta"] *= 4


def other_tokenizer(folder: Path, _base: Path) -> None:
    """Every ordinary token has another's number."""
    with _json(folder / "tokenizer.json") as content:
        special = {one["id"] for one in content["added_tokens"]}
        vocabulary = content["model"]["vocab"]
        plain = {token: number for token, number in vocabulary.items() if number not in special}
        vocabulary |= dict(zip(plain, reversed(plain.values()), strict=True))


def other_template(folder: Path, _base: Path) -> None:
    """A chat template of another family; raises `FileNotFoundError` where the artifact has none."""
    path = folder / "chat_template.jinja"
    path.stat()
    path.write_text(
        "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}",
        encoding="utf-8",
    )


# ------------------------------------------------------------------------------------------- of both


def claims(**changes: Any) -> Plant:
    """The artifact says something else of its origin."""

    def plant(folder: Path, _base: Path) -> None:
        replace(Provenance.read(folder), **changes).write(folder)

    return plant


def truncated(folder: Path, _base: Path) -> None:
    """The last hundred bytes of the weights are missing."""
    path = weights_file(folder)
    path.write_bytes(path.read_bytes()[:-100])


def untouched(_folder: Path, _base: Path) -> None:
    """Nothing: this one must pass."""
