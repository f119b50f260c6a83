"""The errors a user can cause, each with one message that says what was found, needed and what to do.

Whoever raises one has gathered every problem of that input first, so that nobody corrects a recipe one line at a time. The
command line prints the message and exits with code 2; a check that ran and failed is a result, not an error (code 1).
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import reprlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# What acts on a terminal or reorders its text: control codes but line breaks and tabs, bidirectional and invisible
# formatting (joiners stay: scripts and emoji need them), and halves of characters, which no stream can encode.
_ACTS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e0fff]"
)
_LONGEST = 4000  # characters of one problem
CHILD = "COMPILE_STEER_LOCK"  # the environment variable that hands a command's locks to a process that it starts


class CompileSteerError(Exception):
    """Base of every error that is the input's fault. `problems` holds one line per problem."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        given = (problems,) if isinstance(problems, str) else problems
        self.problems: tuple[str, ...] = tuple(_cut(problem, _LONGEST) for problem in given)
        super().__init__("\n".join(self.problems))


class RecipeError(CompileSteerError):
    """A recipe, its data or a command line value is unusable."""


class LayoutError(CompileSteerError):
    """The model is missing, of an unknown family, or lacks the site that was asked for."""


class CannotLower(CompileSteerError):
    """No backend or file format, or not the one asked for, can express the program."""


class ArtifactError(CompileSteerError):
    """A file on disk is missing, damaged, foreign, or made for another model."""


class EngineError(CompileSteerError):
    """A serving engine is not installed, or its worker crashed, hung or left no answer."""


class InternalError(Exception):
    """Something of ours went wrong that no input should be able to cause: exit code 3."""


def is_child() -> bool:
    """True where another command of ours started this process, and tells the user how it ended."""
    return CHILD in os.environ


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP), "Remove what is in the way"),
    errno.ENAMETOOLONG: "Use a shorter name",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n)"),
}


def disk_remedy(number: int | None) -> str:
    """What to do about an error of the disk or the system, by its number: the beginning of a sentence."""
    return _REMEDIES.get(number or 0, "Make it writable")


def several(problems: Sequence[str], shown: int = 5) -> list[str]:
    """The first problems, and how many more there are: a wrong file repeats one mistake thousands of times."""
    more = len(problems) - shown
    return [*problems[:shown], *([f"{more:,} more like this."] if more > 0 else [])]


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: object) -> str:
    """A value from outside as Python writes it, but on one short line: control codes are escaped, the middle is left out."""
    return _BRIEF.repr(value)


def plain(text: str) -> str:
    """Text from outside as a terminal may be given it: what would act on it is written as an escape, as `\\x1b`."""
    return _ACTS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shell_word(value: object) -> str:
    """A value from outside as one word of a shell line that a person may copy: quoted, and no option of a command."""
    text = str(value)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _cut(text: str, limit: int) -> str:
    start, end = 2 * limit // 3, limit // 3
    return text if len(text) <= limit else f"{text[:start]} [{len(text) - start - end} characters] {text[-end:]}"


def require_library(library: str, extra: str, feature: str, otherwise: str = "") -> None:
    """Raise `RecipeError` where the `library` that `feature` needs is missing; `otherwise` is a sentence on doing without it."""
    if importlib.util.find_spec(library.replace("-", "_")) is None:
        raise RecipeError(
            f"{feature} needs the library {library}, which is not installed: pip install 'compile-steer[{extra}]'. "
            f"{otherwise}".rstrip()
        )


@contextmanager
def library_errors(explain: Callable[[str], CompileSteerError]) -> Iterator[None]:
    """Raise `explain(reason)` where a library fails on a file or a name; hold nothing but the library's call inside.

    The one place besides the boundary that catches everything, because no library says what it raises for a damaged file:
    tokenizers raise `Exception` itself, safetensors an error of their own, GGUF readers whatever a wrong offset leads to,
    and a panic in Rust is not even an `Exception`.
    """
    try:
        yield
    except (CompileSteerError, InternalError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # the user stopped it
        lines = str(error).strip().splitlines()  # later lines are advice on other uses
        line = " ".join(part.strip() for part in (lines[:2] if lines and lines[0].endswith(":") else lines[:1]))
        # The error of a missing key, say, is the bare key.
        raise explain(_cut(line if " " in line else f"{type(error).__name__} {line}".rstrip(), 300)) from error
