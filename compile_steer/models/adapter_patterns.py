"""The regular expressions in an adapter's settings, tried in a process with a limit of time before PEFT or we use them.

PEFT takes `target_modules`, `exclude_modules`, `layers_pattern` and the keys of patterns as regular expressions, and an adapter may
be a stranger's: `(a+)+$` takes longer than a life on the name of one module.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compile_steer.common.errors import ArtifactError, brief

_SECONDS = 1.0  # of the processor's, for all of them; a thousand names take milliseconds
_PLAIN = re.compile(r"\^?[\w.-]*\$?")
_TRY = """
import json, re, signal, sys
expressions, names, seconds = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, seconds)  # the kernel ends the process
for expression in expressions:
    compiled = re.compile(expression)
    for name in names:
        compiled.match(name), compiled.fullmatch(name)
    print(flush=True)
"""


def require_quick_patterns(path: Path, settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `ArtifactError` where a pattern in the settings of `path` is none, or takes forever on a module's name."""
    expressions = list(_expressions(settings))
    if not expressions:
        return
    tried = subprocess.run(
        [sys.executable, "-I", "-c", _TRY],
        input=json.dumps([[expression for _key, _pattern, expression in expressions], list(names), _SECONDS]),
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        key, pattern, _ = expressions[tried.stdout.count("\n")]
        reason = f"takes more than {_SECONDS:g} s on the names of {len(names)} modules"
        if tried.returncode > 0:
            reason = f"is no regular expression ({tried.stderr.strip().rpartition(chr(10))[2]:.200})"
        raise ArtifactError(f"{path}: {key}: {brief(pattern)} {reason}. Write the modules' names in its place.")


def _expressions(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, pattern, what PEFT makes of it) for each pattern that is more than a name; junk is left to other checks."""
    layers = settings.get("layers_pattern")
    patterns = [("target_modules", settings.get("target_modules"), "{}")]
    patterns += [("exclude_modules", settings.get("exclude_modules"), "{}")]
    patterns += [
        ("layers_pattern", part, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
        for part in (layers if isinstance(layers, list) else [layers])
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        held = settings.get(key)
        patterns += [(key, pattern, r"(.*\.)?({})$") for pattern in (held if isinstance(held, dict) else ())]
    for key, pattern, form in patterns:
        if isinstance(pattern, str) and not _PLAIN.fullmatch(pattern):
            yield key, pattern, form.replace("{}", pattern)
