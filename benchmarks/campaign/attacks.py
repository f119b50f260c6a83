"""Artifacts, models and recipes of a stranger who means harm.

Each attack plants a canary: code that would write a file, a server that would be sent a secret, a secret outside of
what a command should read, control codes that would reach a terminal. Then the commands run that a user would try.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.campaign import trial
from benchmarks.campaign.bad_models import template
from benchmarks.campaign.case import NAME, RUN, Case
from benchmarks.campaign.edits import as_link, edit_json, edit_tensors
from compile_steer.artifacts.files import save_record, without_check

CANARY, SECRET, KEY = "canary", "the-secret-of-this-machine", "OPENAI_API_KEY"
RECIPE = f"recipes/{NAME}.yaml"
CODE = f"open({CANARY!r}, 'a').close()\n"
Command = tuple[str, ...]
FOREIGN = (
    ("decompile", RECIPE, "--out", "out", "--artifact", "foreign"),
    ("audit", "model", "foreign"),
    ("export", "foreign", "--for", "vllm", "--out", "out/vllm", "--base", "model"),
    ("export", "foreign", "--for", "llama.cpp", "--out", "out/llama", "--base", "model"),
    ("show", "foreign"),
    ("push", "foreign", "--to", "a/b"),
)
REPRODUCE: Command = ("reproduce", f"finished/adapters/{NAME}-closed_form", "--to", "out/again")
ADAPTER, MERGED = f"finished/adapters/{NAME}-closed_form", f"finished/merged/{NAME}-bias-fp32"


@dataclass(frozen=True)
class Attack:
    """What a stranger prepares, and the commands that a user then tries, answering yes to every question."""

    kind: str
    name: str
    prepare: Callable[[Case], object]
    commands: Sequence[Command]


@dataclass
class Host:
    """A server that remembers every request."""

    requests: list[str] = field(default_factory=list)
    port: int = 0

    @contextmanager
    def listening(self) -> Iterator[Host]:
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8", "replace")
                host.requests.append(f"{self.headers}{body}")
                self.send_error(400)

            do_GET = do_POST  # noqa: N815  (the library's names)

            def log_message(self, *_arguments: Any) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Code:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (CODE,)


def _with_code(folder: Path) -> None:
    """A checkpoint whose settings name code beside it, for the model, its settings and its tokenizer."""
    (folder / "magic.py").write_text(CODE)
    names = {"AutoConfig": "magic.Config", "AutoModelForCausalLM": "magic.Model", "AutoTokenizer": ["magic.Tok", None]}
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            edit_json(
                folder / file, lambda found: found.update(auto_map=names, model_type="magic", tokenizer_class="Tok")
            )


def _foreign_checkpoint(case: Case) -> Path:
    return shutil.copytree(case.model, case.root / "foreign")


def _foreign_adapter(case: Case) -> Path:
    folder = case.root / "foreign"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((case.adapter / name).read_bytes())
    return folder


def _pickled(folder: Path, name: str) -> None:
    (file,) = folder.glob("*.safetensors")
    torch.save({**load_file(file), "x": _Code()}, folder / name)
    file.unlink()


def _vector(name: str, write: Callable[[Path], object], case: Case) -> None:
    write(case.root / "recipes" / name)
    case.set(extract={"method": "imported", "imported": {"file": name, "format": "caa", "layer": 1}})


def _secret(case: Case) -> Path:
    path = case.root / "secret"
    path.write_text(SECRET)
    return path


def _linked(folder: Path, secret: Path) -> None:
    for name in ("LICENSE", "notes.txt", "README.md", "tokenizer.model", "vocab.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)


def _recorded(change: Callable[[dict[str, Any]], object], case: Case) -> None:
    """Change the recipe that the finished adapter and its program carry, as one who computes the hashes again."""
    path = case.adapter / "compile_steer.json"
    content = without_check(json.loads(path.read_text()))
    change(content["recipe"])
    save_record(path, content)


def _judge(port: int, recipe: dict[str, Any]) -> None:
    score = {
        "kind": "judge",
        "base_url": f"http://127.0.0.1:{port}/v1",
        "model": "m",
        "prompt": "{reply}?",
        "api_key_env": KEY,
    }
    recipe["validate"]["score"] = score


TEMPLATE_ESCAPES = (
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[0]('x') }}{{ lipsum.__globals__['os'].popen('touch canary').read() }}",
    "{% for c in ().__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}",
    "{{ strftime_now.__globals__ }}{{ raise_exception.__globals__['os'].system('touch canary') }}",
)


def attacks(port: int) -> Iterator[Attack]:
    """Every attack that runs in a fork; `port` is that of the host that would be sent a secret."""
    code = partial(Attack, "code run from an artifact")
    yield code("a model with code beside it", lambda case: _with_code(case.model), [RUN])
    yield code("a checkpoint of a stranger with code", lambda case: _with_code(_foreign_checkpoint(case)), FOREIGN)
    read_merged = [("verify", RECIPE, "--out", "finished"), ("audit", "model", MERGED)]
    yield code("a merged folder with code", lambda case: _with_code(case.merged), read_merged)
    yield code(
        "a checkpoint that is a pickle", lambda case: _pickled(_foreign_checkpoint(case), "pytorch_model.bin"), FOREIGN
    )
    yield code(
        "an adapter that is a pickle", lambda case: _pickled(_foreign_adapter(case), "adapter_model.bin"), FOREIGN
    )
    yield code("a model that is a pickle", lambda case: _pickled(case.model, "pytorch_model.bin"), [RUN])
    for name in ("v.pt", "v.pkl", "v.bin", "v.ckpt"):
        save = partial(_vector, name, lambda path: torch.save({"v": _Code()}, path))
        yield code(f"a vector {name} by torch.save", save, [RUN])
        dump = partial(_vector, name, lambda path: path.write_bytes(pickle.dumps(_Code())))
        yield code(f"a vector {name} that is a pickle", dump, [RUN])
    for number, text in enumerate(TEMPLATE_ESCAPES):
        yield code(f"a chat template that leaves its sandbox, {number + 1}", partial(template, text), [RUN])
    tag = "extract: !!python/object/apply:os.system ['touch canary']\n"
    yield code("a recipe with a Python tag", lambda case: case.recipe.write_text(case.recipe.read_text() + tag), [RUN])
    yield code("a data set with a script", _data_script, [RUN])
    yield code("a recorded model with code", partial(_recorded, lambda r: r.update(model="./foreign")), [REPRODUCE])

    yield Attack("secret sent", "a recorded judge's address", partial(_recorded, partial(_judge, port)), [REPRODUCE])
    yield Attack(
        "secret sent", "a recorded data set's address", partial(_recorded, partial(_address, port)), [REPRODUCE]
    )

    read = partial(Attack, "file outside read")
    yield read("links in the model's folder", lambda case: _linked(case.model, _secret(case)), [RUN])
    yield read("absolute links in an adapter", lambda case: _linked(_foreign_adapter(case), _secret(case)), FOREIGN)
    yield read("links in a checkpoint", lambda case: _linked(_foreign_checkpoint(case), Path("../secret")), FOREIGN)
    yield read(
        "a chat template that is a link", lambda case: as_link(case.model / "chat_template.jinja", _secret(case)), [RUN]
    )
    yield read("data that are a link outside", lambda case: as_link(case.data(), _secret(case)), [RUN])
    yield read(
        "a recorded path upwards", partial(_recorded, lambda r: r["data"].update(train="../../../secret")), [REPRODUCE]
    )
    yield read(
        "a recorded name upwards",
        partial(_recorded, lambda r: r.update(name="../../up")),
        [REPRODUCE, ("show", ADAPTER)],
    )

    shown = partial(Attack, "control codes on a terminal")
    codes = "\x1b]0;owned\x07\x1b[2J[bold red]x[/bold red]"
    yield shown("a recorded prompt", partial(_recorded, lambda r: r.update(ask=codes)), [("show", ADAPTER), REPRODUCE])
    yield shown("a recorded model", partial(_recorded, lambda r: r.update(model=codes)), [("show", ADAPTER), REPRODUCE])
    yield shown("an adapter's base", partial(_named_base, codes), FOREIGN)
    yield shown("tensor names", partial(_named_tensors, codes), FOREIGN)
    yield shown("a chat template's own error", partial(template, "{{ raise_exception('\x1b[2J') }}"), [RUN])
    yield shown("a key of the recipe", lambda case: case.set(**{codes: 1}), [RUN])


def _data_script(case: Case) -> None:
    (case.root / "recipes" / "evil").mkdir()
    (case.root / "recipes" / "evil" / "evil.py").write_text(CODE)
    case.set(data__train={"source": "evil"})


def _address(port: int, recipe: dict[str, Any]) -> None:
    recipe["data"]["train"] = {"source": "json", "data_files": [f"http://127.0.0.1:{port}/rows.jsonl"]}


def _named_base(name: str, case: Case) -> None:
    edit_json(
        _foreign_adapter(case) / "adapter_config.json", lambda c: c.update(base_model_name_or_path=name, peft_type=name)
    )


def _named_tensors(name: str, case: Case) -> None:
    weights = _foreign_adapter(case) / "adapter_model.safetensors"
    edit_tensors(
        weights, lambda tensors: tensors.update({name: torch.ones(2, 2), f"{name}.lora_A.weight": torch.ones(2, 2)})
    )


def succeeded(base: Case, attack: Attack, host: Host) -> list[str]:
    """Try an attack; returns how it succeeded, nothing if it did not."""
    found = []
    with tempfile.TemporaryDirectory() as parent:
        case = base.copy(Path(parent).resolve() / "case")
        attack.prepare(case)
        (case.root / "secret").write_text(SECRET)
        for command in attack.commands:
            before = len(host.requests)
            outcome = trial.run(command, case.root, partial(os.environ.update, {KEY: SECRET}), answers="y\n" * 9)
            shown = outcome.output + outcome.errors
            if any(case.root.rglob(CANARY)):
                found.append(f"{command[0]} ran its code")
            if host.requests[before:]:
                found.append(f"{command[0]} called a stranger's address")
            if SECRET in shown or _holds_secret(case.root / "out"):
                found.append(f"{command[0]} gave the secret away")
            if "\x1b" in shown or "\x07" in shown:
                found.append(f"{command[0]} printed control codes")
            if (case.root.parent / "up").exists():
                found.append(f"{command[0]} wrote outside")
    return found


def _holds_secret(folder: Path) -> bool:
    files = (path for path in folder.rglob("*") if path.is_file())
    return any(SECRET.encode() in path.read_bytes() or path.is_symlink() for path in files)


def plant_modules(folder: Path) -> None:
    """Write modules with names of libraries, ours and Python's, each of which leaves a file when it is imported."""
    names = "secrets uuid json enum signal __future__ typing tokenize readline torch typer rich yaml numpy pydantic safetensors"
    for name in names.split():
        (folder / f"{name}.py").write_text(f"open({CANARY + '-' + name!r}, 'a').close()\nraise ImportError\n")


def modules_that_ran(folder: Path) -> list[str]:
    """The names of the planted modules that were imported from that folder."""
    return sorted(path.name.removeprefix(f"{CANARY}-") for path in folder.glob(f"{CANARY}-*"))


def modules_of_the_folder(folder: Path) -> list[str]:
    """Start the command by `python -m` in a folder that holds modules of libraries' names; returns those that ran."""
    plant_modules(folder)
    root = str(Path(trial.__file__).resolve().parents[2])
    for arguments in (("--help",), ("show", "nothing"), ("run", "nothing.yaml")):
        command = [sys.executable, "-m", "compile_steer", *arguments]
        subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": root}, check=False, capture_output=True)
    return modules_that_ran(folder)
