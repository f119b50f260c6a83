"""A merged checkpoint: the base's own folder with W + B A (or whole changes, and biases) summed in fp32 and cast once.

The tensors are rewritten one at a time and the other files copied. So memory holds one matrix, and what the library makes of the
base in memory (another tokenizer, another spelling of the config) never takes the place of what the base says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from compile_steer.artifacts.files import read_json
from compile_steer.artifacts.provenance import CARD, Provenance
from compile_steer.artifacts.tensors import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    checkpoint_files,
    read_metadata,
    stream_tensors,
)
from compile_steer.artifacts.writing import new_folder
from compile_steer.common.errors import ArtifactError, several
from compile_steer.export.model_folder import copy_side_files, patched_content
from compile_steer.models.libraries import quiet, read_config, without_weights
from compile_steer.models.load import LoadedModel
from compile_steer.models.older_readers import CONFIG, with_older_rope, write_settings
from compile_steer.steering.low_rank import LowRank, weight_delta
from compile_steer.steering.patch import WeightPatch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_Edit = tuple[str, LowRank | Tensor]  # the module as the patch names it, and the change of one of its parameters
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FLOATS = ("F64", *_KINDS.values())
_REMEDY = "Get or make it again."


def write_merged(
    folder: Path, patch: WeightPatch, loaded: LoadedModel, precision: str, provenance: Provenance, card: str
) -> None:
    """Write the base's folder with the patch in its weights, whole or not at all.

    Raises:
        ArtifactError: the patch names a module that the base lacks, has another shape, gives NaN, or a value that the
            precision cannot hold.
    """
    merged = MergedCheckpoint(Path(loaded.source), patch)
    with new_folder(folder) as new:
        merged.write_weights(new, PRECISIONS[precision])
        copy_side_files(merged.folder, new, loaded.prompt_template)
        write_settings(new / CONFIG, merged.config_content(PRECISIONS[precision]))
        provenance.write(new)
        (new / CARD).write_text(card, encoding="utf-8")


def merged_model(source: str, patch: WeightPatch) -> PreTrainedModel:
    """The base at `source` in fp32 with `patch` in its weights; raises `ArtifactError`."""
    merged = MergedCheckpoint(Path(source), patch)
    tensors = {name: merged.tensor(name) for names in merged.files.values() for name in names}
    problems = [line for name, tensor in tensors.items() for line in merged.problems(name, tensor, torch.float32)]
    if problems:
        raise ArtifactError(several(problems))
    with quiet():
        return cast(
            PreTrainedModel,
            type(merged.model).from_pretrained(
                None, config=merged.model.config, state_dict=tensors, dtype=torch.float32
            ),
        )


class MergedCheckpoint:
    """The tensors of a base with a patch in them, one at a time, under the names that the base's files give them.

    Attributes:
        files: the base's files, each with the names of its tensors and of those that the patch adds.
        model: the patched model without weights: its names, shapes and config.
    """

    def __init__(self, folder: Path, patch: WeightPatch) -> None:
        """Raises `ArtifactError` with every module that the patch and the base do not agree on."""
        self.folder = folder
        self._base = Checkpoint(folder)
        self._content = patched_content(folder, patch)
        self.model = without_weights(read_config(self._content))
        self._edits = _edits(patch, self.model)
        # Two modules that share a matrix get one each where the patch changes what one of them computes.
        shared = self.model.all_tied_weights_keys
        self._copies = shared if patch.untie or self._edits.keys() & {*shared, *shared.values()} else {}
        if self._copies:
            self._content["tie_word_embeddings"] = False
            self.model = without_weights(read_config(self._content))
        self.files = {file: list(names) for file, names in checkpoint_files(folder).items()}
        self._added: dict[str, str] = {}  # name -> the tensor beside which it is saved
        self._parameters: dict[str, str] = {}  # name -> parameter of the model
        # What the model does not load, and the other towers: both are kept byte for byte.
        self._unused: set[str] = set()
        self._match(has_new_biases=bool(patch.config_flags or patch.architecture), exactly=bool(patch.architecture))

    def _match(self, *, has_new_biases: bool, exactly: bool) -> None:
        """Find the parameter that each tensor of the files becomes, as transformers does, and the tensors to add."""
        parameters, prefix = self.model.state_dict(), self.model.base_model_prefix
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        joined: dict[str, str] = {}  # parameters that the library makes of several tensors, or in pieces of one
        for name in self._base.files:
            parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
            if parameter not in parameters:
                plain, _pattern = rename_source_key(name, [], [], prefix, parameters)
                parameter, pattern = (plain, None) if plain in parameters else (parameter, pattern)
            if pattern is not None:
                targets = next(entry.target_patterns for entry in converters if pattern in entry.source_patterns)
                joined |= {parameter.replace(targets[0], target): name for target in targets}
            elif parameter in parameters:
                self._parameters[name] = parameter
            else:
                self._unused.add(name)
        present = {*self._parameters.values(), *joined}
        tied = {name for pair in self.model.all_tied_weights_keys.items() if present & {*pair} for name in pair}
        problems = [
            f"the patch edits {parameter}, which {self.folder} holds in other pieces ({joined[parameter]} ...)."
            for parameter in sorted(self._edits.keys() & joined.keys())
        ]
        names = {parameter: name for name, parameter in self._parameters.items()}
        lacking = []
        for parameter in sorted(parameters.keys() - present - tied):
            beside = names.get(self._copies.get(parameter, f"{parameter.removesuffix('bias')}weight"))
            if beside is None or not (parameter in self._copies or (has_new_biases and parameter.endswith(".bias"))):
                lacking.append(parameter)
                continue
            # A bias is named as its weight is; a head as a file of this family names it.
            (name,) = revert_weight_conversion(self.model, {parameter: parameters[parameter]})
            name = name if parameter in self._copies else f"{beside.removesuffix('weight')}bias"
            self._added[name], self._parameters[name] = beside, parameter
            self.files[self._base.files[beside]].append(name)
        if lacking:
            problems.append(f"the base at {self.folder} lacks weights: {', '.join(lacking[:3])} ...")
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        unknown = [name for name in sorted(self._unused) if not any(re.search(pattern, name) for pattern in ignored)]
        if unknown and exactly:
            shown = ", ".join(unknown[:3])
            problems.append(f"{type(self.model).__name__} has no place for {shown} of the base at {self.folder}.")
        if problems:
            raise ArtifactError(several(problems))
        towers = _towers(self.model) - self._edits.keys()
        self._unused |= {name for name, parameter in self._parameters.items() if parameter in towers}

    def tensor(self, name: str) -> Tensor:
        """One tensor: in fp32 where the patch changes or adds it, else as it was saved."""
        parameter = self._parameters.get(name, "")
        if name in self._added and parameter not in self._copies:
            tensor = torch.zeros(self.model.get_parameter(parameter).shape)  # a new bias adds nothing but the patch
        else:
            saved = self._base.tensor(self._added.get(name, name))
            assert saved is not None, "`name` is one of the checkpoint's"
            tensor = saved
        for module, change in self._edits.get(parameter, ()):
            delta = change.to("cpu")
            if isinstance(delta, LowRank):
                delta = weight_delta(self.model.get_submodule(module), delta)
            tensor = tensor.float() + delta
        return tensor

    def problems(self, name: str, tensor: Tensor, dtype: torch.dtype) -> list[str]:
        """Why the tensor cannot be written as `dtype`."""
        parameter = self._parameters.get(name, name)
        edits = self._edits.get(parameter, ())
        if edits and not bool(torch.isfinite(tensor).all()):
            return [f"merging gives NaN or infinity in {edits[0][0]}; nothing was written."]
        limit, largest = torch.finfo(dtype).max, 0.0
        if tensor.numel() and tensor.dtype != dtype:  # without a copy, which would double what a matrix takes
            largest = float(torch.stack(torch.aminmax(tensor)).abs().max())
        if name in self._unused or not largest > limit:
            return []
        type_name = str(dtype).removeprefix("torch.")  # the cast would make it infinite
        return [f"{parameter} holds {largest:.4g}, beyond {limit:g}, the largest of {type_name}; nothing was written."]

    def write_weights(self, new: Path, dtype: torch.dtype) -> None:
        """Write the weights to the folder `new` as `dtype`, file by file as the base has them; raises `ArtifactError`."""
        problems: list[str] = []
        names = {name: self._new_name(name) for names in self.files.values() for name in names}
        old = {name: other for other, name in names.items()}

        def cast_once(name: str) -> Tensor:
            tensor = self.tensor(old[name])
            problems.extend(self.problems(old[name], tensor, dtype))
            return tensor.to(dtype) if self._is_cast(old[name]) else tensor

        size, weight_map = 0, dict[str, str]()
        for file, held in self.files.items():
            specs = {names[name]: self._spec(name, dtype) for name in held}
            target = new / file.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"format": "pt", **read_metadata(file)}
            size += stream_tensors(target, specs, cast_once, metadata, lambda name: self._place(old[name], dtype))
            weight_map |= dict.fromkeys(specs, str(file.relative_to(self.folder)))
        if problems:
            raise ArtifactError([*several(problems), "Merge at a wider precision: merged-bf16 or merged-fp32."])
        if [*weight_map.values()] != [SINGLE_FILE] * len(weight_map):
            content = read_json(self.folder / INDEX_FILE, _REMEDY)
            content["metadata"]["total_size"] = size
            write_settings(new / INDEX_FILE, {**content, "weight_map": weight_map})

    def config_content(self, dtype: torch.dtype) -> dict[str, Any]:
        """The content of the merged folder's config.json: the base's with what the patch and the precision need."""
        keys = {"dtype", "torch_dtype"} & self._content.keys() or {"torch_dtype"}
        content = {**self._content, **dict.fromkeys(sorted(keys), str(dtype).removeprefix("torch."))}
        content.pop("auto_map", None)  # the folder holds no code
        return with_older_rope(content)

    def _new_name(self, name: str) -> str:
        """The name under which a tensor is written: its own, with the prefix that old readers need beside a head."""
        full = f"{self.model.base_model_prefix}.{name}"
        return full if self._copies and self._parameters.get(name) == full else name

    def _is_cast(self, name: str) -> bool:
        """True of floating-point weights that the model loads; what it does not load is kept as it is."""
        return name in self._added or (name not in self._unused and self._base.specs[name][0] in _FLOATS)

    def _place(self, name: str, dtype: torch.dtype) -> tuple[Path, int] | None:
        """Where the bytes of a tensor lie that is written as it was saved; None of one that is computed."""
        same = name not in self._added and self._spec(name, dtype)[0] == self._base.specs[name][0]
        return self._base.places[name] if same and self._parameters.get(name, "") not in self._edits else None

    def _spec(self, name: str, dtype: torch.dtype) -> tuple[str, list[int]]:
        if name in self._added:
            return _KINDS[dtype], list(self.model.get_parameter(self._parameters[name]).shape)
        kind, shape = self._base.specs[name]
        return _KINDS[dtype] if self._is_cast(name) else kind, shape


def _edits(patch: WeightPatch, model: nn.Module) -> dict[str, list[_Edit]]:
    """The edits of each parameter of `model`; raises `ArtifactError` with all that do not fit it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    edits: dict[str, list[_Edit]] = {}
    problems: list[str] = []
    matrices: Iterator[_Edit] = chain(patch.low_rank.items(), patch.dense.items())
    for name, change in matrices:
        weight = parameters.get(f"{name}.weight")
        if weight is None:
            problems.append(f"the patch edits {name}, which the base does not have.")
            continue
        shape = [len(change.B), change.A.shape[1]] if isinstance(change, LowRank) else list(change.shape)
        if isinstance(change, LowRank) and isinstance(modules[name], Conv1D):
            shape.reverse()
        if shape != list(weight.shape):
            problems.append(f"the patch of {name} is {shape}, the base's weight {list(weight.shape)}.")
        edits.setdefault(f"{name}.weight", []).append((name, change))
    for name, shift in patch.bias.items():
        # A bias is named by its module, or by the parameter itself where a mixture of experts has one.
        parameter = name if name in parameters else f"{name}.bias"
        if name not in parameters and name not in modules:
            problems.append(f"the patch edits {name}, which the base does not have.")
        elif parameter not in parameters or parameters[parameter].shape[-1:] != shift.shape:
            problems.append(f"the base has no bias of width {shift.shape[0]} on {name}.")
        edits.setdefault(parameter, []).append((name, shift))
    if problems:
        raise ArtifactError(several(problems))
    return edits


def _towers(model: PreTrainedModel) -> set[str]:
    """The parameters of a wrapper beside its text model and head: towers for images and sound, and what leads from them."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    own = {id(value) for part in parts if part is not None for value in part.parameters()}
    is_wrapper = model.config.get_text_config() is not model.config
    return {name for name, value in model.named_parameters() if id(value) not in own} if is_wrapper else set()
