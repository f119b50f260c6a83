"""No artifact of a stranger runs code, makes PEFT or transformers load something from elsewhere, or asks a question."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_steer.common.errors import ArtifactError, CompileSteerError
from compile_steer.export.adapter import write_lora
from compile_steer.models.load import load
from compile_steer.models.reload import reload
from compile_steer.scoring.classifier import _pretrained
from compile_steer.steering.low_rank import LowRank
from tests.helpers.tiny import loaded, saved

PACKAGE = Path(__file__).parents[2] / "compile_steer"
CODE = "open({ran!r}, 'w')\nclass Evil: pass\n"


def _with_code(folder: Path, file: str, auto_map: dict[str, Any]) -> None:
    ran = folder.parent / "ran"
    (folder / "evil.py").write_text(CODE.format(ran=str(ran)))
    path = folder / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "auto_map": auto_map, "model_type": "evil", "architectures": ["Evil"]}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    saved("llama", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", ["load", "reload", "classifier"])
def test_code_of_a_model_folder_is_never_run(
    model: Path, how: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    _with_code(model, "config.json", {name: "evil.Evil" for name in classes})
    if known:  # a family that transformers knows itself
        content = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**content, "model_type": "llama"}))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
                                "tokenizer_class": "evil.Evil"}))  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda *_args: "y")  # what a user who is asked may well answer
    base = loaded("llama")
    calls: dict[str, Callable[[], object]] = {
        "load": lambda: load(str(model)),
        "reload": lambda: reload(model, base),
        "classifier": lambda: _pretrained(str(model), "LABEL_0", base.device),
    }
    try:
        calls[how]()
    except CompileSteerError as error:
        assert "Traceback" not in str(error)
    assert not (model.parent / "ran").exists()


def test_every_loading_call_refuses_code_by_itself() -> None:
    call = re.compile(r"\bAuto\w+\.from_(?:pretrained|config)\((?:[^()]|\([^()]*\))*\)", re.DOTALL)
    for path in PACKAGE.rglob("*.py"):
        if path.name != "engine_support.py":  # text that is printed
            for found in call.findall(path.read_text(encoding="utf-8")):
                assert "trust_remote_code=False" in found or "(FOLDER)" in found, f"{path}: {found}"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = loaded("llama")
    name = next(name for name, module in base.model.named_modules() if name.endswith("mlp.down_proj"))
    weight = base.model.get_submodule(name).weight
    (tmp_path / "adapter").mkdir()
    write_lora(
        tmp_path / "adapter",
        {name: LowRank(torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1]))},
        "x",
        False,
    )
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "./evil",
         "tokenizer_kwargs": {"trust_remote_code": True}},
        {"peft_type": "XLORA", "adapters": {"0": "/somewhere/else"}},
        {"peft_type": "CPT", "tokenizer_name_or_path": "./evil"},
        {"peft_type": "../evil"},
        {"peft_type": None},
        {"megatron_config": {"x": 1}, "megatron_core": "evil.module"},
        {"r": 2**40},
        {"rank_pattern": {"down_proj": 2**40}},
    ],
)  # fmt: skip
def test_adapter_that_wants_more_than_its_own_files(adapter: Path, changes: dict[str, Any]) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ArtifactError, match=r"adapter_config\.json (has|claims)"):
        reload(adapter, loaded("llama"))


def test_pickle_beside_an_adapter_is_not_read(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors does not exist"):
        reload(adapter, loaded("llama"))


@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoModelForSpeechSeq2Seq", "Trainer", "os.system", 7])
def test_only_a_tokenizer_is_loaded_as_one(model: Path, name: object) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": name}))
    with pytest.raises(ArtifactError, match="tokenizer_class is .*needed: the name of a tokenizer's class"):
        load(str(model), device="cpu")
