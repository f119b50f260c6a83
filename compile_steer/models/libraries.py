"""The libraries that load models, made quiet, their settings made neutral, and their errors translated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compile_steer.common.errors import CompileSteerError, library_errors

# Settings of a config.json that choose no other numbers but other code (a hub id among them), or tuples as outputs.
NEUTRAL: dict[str, Any] = {
    "attn_implementation": None,
    "experts_implementation": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}


@contextmanager
def quiet_library_errors(explain: Callable[[str], CompileSteerError]) -> Iterator[None]:
    """Silence the libraries that load models, and raise `explain(reason)` where they fail on a file or name."""
    with library_errors(explain), quiet():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and all warnings inside the block."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:  # not where a block around this one has silenced them
            transformers_logging.enable_progress_bar()


def read_config(source: Path | dict[str, Any]) -> PreTrainedConfig:
    """The config of a model's folder, or of the content of a config.json, with the `NEUTRAL` settings."""
    config: PreTrainedConfig
    with quiet():
        if isinstance(source, Path):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **NEUTRAL)
        else:
            config = type(AutoConfig.for_model(source["model_type"])).from_dict(deepcopy(source), **NEUTRAL)
    text: Any = config.get_text_config()
    text.return_dict, text.output_hidden_states = True, False
    for part in (config, text):  # also where the file names its private spelling
        part._attn_implementation = part._experts_implementation = None
    return config


def without_weights(config: PreTrainedConfig, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The model of `config` on torch's meta device: modules, names and shapes; `kind` is the class that makes it."""
    with torch.device("meta"), quiet():
        return cast(PreTrainedModel, kind.from_config(config, trust_remote_code=False))
