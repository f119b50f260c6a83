"""Read a model and its tokenizer from a folder, checked: no weight is random or left over, no token without a row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from compile_steer.artifacts.files import read_json
from compile_steer.artifacts.revision import read_settings
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.common.errors import ArtifactError, CompileSteerError, LayoutError, brief, shell_word
from compile_steer.models.claims import require_counts, require_numbers
from compile_steer.models.libraries import quiet_library_errors, read_config

_REMEDY = "Get or make the model again."
_SHOWN = 3  # names in a message
DEQUANTISED_HERE = "fp8", "mxfp4", "compressed-tensors", "bitsandbytes"  # by `models.dequantise`
OF_OTHERS = (
    "name the unquantised release; an adapter that is compiled on that may be loaded on the quantised one by PEFT or vLLM, but is "
    "verified on the release alone."
)
_QUANTIZED = "quantization_config", "compression_config"
# Types of weights that can be edited. Integers are also masks and positions of older checkpoints, which are not loaded.
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_TOKENIZERS = r"(?!Auto)\w*Tokenizer(Fast)?|(Tokenizers|Python|SentencePiece|MistralCommon)Backend"
_NO_WEIGHTS = (".attn.bias", ".attention.bias", ".masked_bias", ".position_ids", ".inv_freq")


def read_model(
    folder: Path,
    dtype: torch.dtype,
    explain: Callable[[str], CompileSteerError],
    kind: Any = AutoModelForCausalLM,
    spread: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedModel:
    """The model in `folder`, with every weight from its files; `kind` is the class of transformers that loads it.

    Args:
        spread: how transformers is to lay the weights over several devices; without it all are in main memory.

    Raises `ArtifactError` for a folder that is not one whole model, and `explain(reason)` where transformers cannot load it.
    """
    shapes = {name: shape for name, (_kind, shape) in require_plain(folder).items()}
    _require_family(folder, kind)
    with quiet_library_errors(lambda reason: explain(f"config.json or generation_config.json: {reason}")):
        config = read_config(folder)
        require_numbers(folder / "config.json", config, shapes, kind)
        model, loading = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by their names
            output_loading_info=True,
            **spread,
        )
    loaded: PreTrainedModel = model
    require_loaded(folder, loaded, loading)
    return loaded


def _require_family(folder: Path, kind: Any) -> None:
    """Raise `ArtifactError` for a family that transformers does not have, or has no causal language model of."""
    config = read_json(folder / "config.json", _REMEDY)
    family = config["model_type"]
    if family not in CONFIG_MAPPING_NAMES:
        own = ", and code that comes with it (auto_map) is never run" if "auto_map" in config else ""
        raise ArtifactError(
            f"{folder / 'config.json'}: model_type {brief(family)} is no family of transformers {transformers.__version__}{own}. "
            "Needed: a family that transformers has itself, or a newer transformers."
        )
    if kind is AutoModelForCausalLM and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ArtifactError(
            f"{folder} is a {brief(_saved_as(config.get('architectures'), family))}, of the family {family}, which has no "
            "causal language model in transformers; needed: a decoder that writes text. Encoders and encoder-decoders cannot "
            "be steered."
        )


def _saved_as(architectures: object, other: str) -> object:
    """The class that a config.json says the model was saved as; `other` where it names none."""
    return architectures[0] if isinstance(architectures, list) and architectures else other


def read_tokenizer(
    folder: Path, model: PreTrainedModel, explain: Callable[[str], CompileSteerError]
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, whose every token `model` has a row for; raises as `read_model`.

    Where it has no padding token, its end-of-text token pads; raises `LayoutError` where it has neither.
    """
    with quiet_library_errors(lambda reason: explain(f"tokenizer.json or tokenizer_config.json: {reason}")):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=model.config, trust_remote_code=False
        )
        if (folder / "tokenizer.json").is_file() and type(tokenizer) is not TokenizersBackend:
            # Many classes build the steps that split and normalise text anew; all other readers take those of the file.
            tokens = {
                name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")
            }
            tokenizer = TokenizersBackend.from_pretrained(folder, **tokens)
        ids = tokenizer("x y")["input_ids"]
    drops = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None)
    if not ids or drops:
        reason = f"leaves out merges at random (dropout {drops})" if drops else "makes no tokens of a text"
        raise ArtifactError(f"{folder / 'tokenizer.json'}: its model {reason}. Get it from the publisher again.")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise LayoutError(f"the tokenizer of '{folder}' has neither a padding nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    require_rows(folder, model, tokenizer)
    return tokenizer


def require_plain(folder: Path) -> Mapping[str, tuple[str, list[int]]]:
    """The type and shape of each tensor in `folder`, where it is one whole model of floating-point weights.

    Raises `ArtifactError` for an adapter beside it, anything quantised, and settings that are damaged or of another model.
    """
    settings, specs = read_settings(folder), Checkpoint(folder).specs
    config = settings["config.json"] if "config.json" in settings else read_json(folder / "config.json", _REMEDY)
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, dict) else [config]
    problems = []
    if not isinstance(config.get("model_type"), str):
        problems.append(
            f"{folder / 'config.json'}: model_type is {brief(config.get('model_type'))}; needed: the name of its family."
        )
    problems += _unusable_names(folder, settings)
    for part in parts:
        rows, pad = part.get("vocab_size"), part.get("pad_token_id")
        if isinstance(rows, int) and isinstance(pad, int) and pad >= rows:
            problems.append(f"{folder / 'config.json'}: pad_token_id is {pad}; needed: below vocab_size, {rows}.")
    if (folder / "adapter_config.json").exists():
        problems.append(
            f"{folder} holds an adapter (adapter_config.json) beside the model, and transformers would load both. Merge it first "
            "(PEFT's merge_and_unload, then save_pretrained to a new folder), or move the adapter out of the folder."
        )
    if config.get("transformers_weights") is not None:
        problems.append(
            f"{folder / 'config.json'}: transformers_weights names other files than the standard ones, which only some "
            "readers follow. Remove the key, and give the files their standard names."
        )
    by = next((part[key] for part in parts for key in _QUANTIZED if part.get(key) is not None), None)
    stored = {name: kind for name, (kind, _shape) in specs.items() if kind not in _FLOATS}
    packed = [f"{name} ({kind})" for name, kind in sorted(stored.items()) if not name.endswith(_NO_WEIGHTS)]
    if by is not None or packed:
        how = f"as {_listed(packed)} {'is' if len(packed) == 1 else 'are'}"
        if by is not None:
            how = f"by {(by.get('quant_method') if isinstance(by, dict) else None) or 'its config.json'}"
        problems.append(
            f"{folder} is quantised, {how}: such weights cannot be steered or edited as they stand. Name the unquantised "
            "release, or a copy that the library that quantised it has de-quantised and saved"
            + (
                f": compile-steer base {shell_word(folder)} --dequantize --out DIR."
                if how[3:] in DEQUANTISED_HERE
                else "."
            )
        )
    if problems:
        raise ArtifactError(problems)
    require_counts(folder / "config.json", config, {name: shape for name, (_kind, shape) in specs.items()})
    return specs


def _unusable_names(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """What the settings name as tokens and as the tokenizer's class, where that is neither."""
    for file in ("config.json", "generation_config.json"):
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = settings.get(file, {}).get(key)
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
                yield f"{folder / file}: {key} is {brief(value)}; needed: the number of a token."
    for file in ("config.json", "tokenizer_config.json"):
        name = settings.get(file, {}).get("tokenizer_class")
        # The library would load whatever class of its own has that name.
        if name is not None and not re.fullmatch(_TOKENIZERS, str(name)):
            yield f"{folder / file}: tokenizer_class is {brief(name)}; needed: the name of a tokenizer's class."


def require_loaded(folder: Path, model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` unless every weight of `model` comes from a file of `folder`, and none is left over.

    Args:
        loading: what transformers says about loading it (`output_loading_info=True`).
    """
    kind, problems = type(model).__name__, list(loading["error_msgs"])
    if missing := loading["missing_keys"]:
        problems.append(
            f"{folder} lacks {_counted(missing)} that its config.json's {kind} needs: {_listed(missing)}; transformers would fill "
            "them with random numbers."
        )
    if unexpected := loading["unexpected_keys"]:
        problems.append(
            f"{folder} holds {_counted(unexpected)} that its config.json's {kind} has no place for: {_listed(unexpected)}."
        )
    if mismatched := loading["mismatched_keys"]:
        shapes = [f"{name} is {list(held)}, needed {list(needed)}" for name, held, needed in mismatched]
        problems.append(f"{folder} holds weights of other shapes than its config.json says: {_listed(shapes)}.")
    if problems:
        saved = _saved_as(model.config.architectures, kind)
        other = f"It was saved as a {brief(saved)}; needed: a {kind}, a decoder with its head."
        raise ArtifactError(
            [*problems, other if saved != kind else f"Weights and config.json are not of one model. {_REMEDY}"]
        )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embeddings.weight:
        raise ArtifactError(
            f"{folder}: config.json says tie_word_embeddings, but the head's weights are others than the embeddings'; some readers "
            "use the one, some the other. Set tie_word_embeddings to false, or remove the head's tensor."
        )
    # In the type that was asked for: float16 cannot hold all that bfloat16 can.
    rotations = [(name, value) for name, value in model.named_buffers() if "inv_freq" in name]  # as config.json says
    infinite = [name for name, value in (*model.named_parameters(), *rotations) if not _finite(value)]
    if infinite:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ArtifactError(f"{folder}: NaN or infinity, in {dtype}, in {_listed(infinite)}. {_REMEDY}")


def require_rows(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ArtifactError` unless every token that the tokenizer or the settings name has a row in the embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    files = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*token*.json")) if beyond else ""
    # A token that no file names is the library's own default for the family: no text means it.
    named = (token for token in beyond if json.dumps(token) in files or json.dumps(token, ensure_ascii=False) in files)
    beyond_rows = [f"{token!r} is {beyond[token]}" for token in named]
    for settings in (model.config, getattr(model, "generation_config", None), tokenizer):  # of a classifier none
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(settings, name, None)
            numbers = value if isinstance(value, list | tuple) else [value]
            beyond_rows += [f"{name} is {number}" for number in numbers if isinstance(number, int) and number >= rows]
    if beyond_rows:
        raise ArtifactError(
            f"{folder}: the embeddings have {rows} rows, for tokens 0 to {rows - 1}; {_listed(set(beyond_rows))}. Name other tokens in "
            "tokenizer_config.json and generation_config.json, or give the model the rows: "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def _finite(value: torch.Tensor) -> bool:
    if not value.numel() or value.is_meta:  # what stays on disk is read block by block, and NaN shows in activations
        return True
    low, high = torch.aminmax(value.detach())  # unlike isfinite, without a copy of the tensor
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _counted(names: Iterable[str]) -> str:
    count = len(list(names))
    return f"{count} weight{'s' if count > 1 else ''}"


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
