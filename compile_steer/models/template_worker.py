"""A process that renders chat templates for `compile_steer.models.chat`, one JSON object a line in and out.

A chat template comes with a model, so it is somebody else's code. jinja's sandbox keeps it from files and from Python, not
from looping for ever or filling the memory; a process of its own, with limits from the kernel, does. It renders through
transformers, as every stock user does, except that the clock stands.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta
from transformers.utils import chat_template_utils

_MEMORY = 1 << 30
_CHARACTERS = 10_000_000


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The rendered `text` and the `variables` that the template reads, or the `problem` that it has with `messages`."""
    day = datetime.fromisoformat(f"{request['date']}T12:00:00")
    try:
        compiled = chat_template_utils._compile_jinja_template(request["template"])
        compiled.environment.globals["strftime_now"] = day.strftime
        if request["messages"] is None:
            return {
                "variables": sorted(meta.find_undeclared_variables(compiled.environment.parse(request["template"])))
            }
        rendered, _ = chat_template_utils.render_jinja_template(
            [request["messages"]], chat_template=request["template"], add_generation_prompt=True, **request["special"]
        )
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return {"problem": describe(error)}
    except MemoryError:
        return {"problem": f"it takes more than {_MEMORY >> 30} GiB of memory"}
    (text,) = rendered
    if len(text) > _CHARACTERS:
        return {"problem": f"it makes a prompt of {len(text):,} characters"}
    return {"text": text}


def describe(error: Exception) -> str:
    """What the template itself says with raise_exception, or an error's type and message; with the line, if it is known."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:  # jinja puts the template's own lines into the traceback
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<template>" else line
        trace = trace.tb_next
    kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
    kind = "syntax error: " if type(error) is TemplateSyntaxError else kind
    return f"{kind}{' '.join(str(error).split())[:300]}{f' (its line {line})' if line and kind else ''}"


def main() -> None:
    """Answer requests until there are none."""
    statm = Path("/proc/self/statm")  # the address space that is in use, in pages; only Linux has it
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.is_file() else 0
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _MEMORY, in_use + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        # The kernel ends the process when the time is up: a handler in Python would wait for the end of one long operation.
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = json.dumps(answer(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
