"""The connection to a judge: which address may be contacted, what is sent there, and how long and large an answer may be.

A recipe can come from a stranger, alone or inside an artifact. So an address that it names is contacted only where the
user confirms it, and the library that sends the requests is held to what this module says.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from compile_steer.common.errors import RecipeError, brief

HOSTS = "COMPILE_STEER_JUDGE_HOSTS"
"""The environment variable with the hosts, or HOST:PORT, that the user confirms, separated by commas."""
_KEY_ENDING = "_API_KEY"
_LARGEST = 1 << 20  # bytes of an answer
_SENT = {"host", "accept", "content-type", "content-length", "connection", "user-agent"}
_Answer = TypeVar("_Answer")


def require_confirmed(base_url: str, own: bool = True) -> None:
    """Raise `RecipeError` unless the user confirms the address; one on this machine needs that only if not `own`.

    Args:
        own: the recipe is a file that the user named, not the record of an artifact.
    """
    host, place = _place(base_url)
    confirmed = {entry.strip().lower() for entry in os.environ.get(HOSTS, "").split(",")} - {""}
    if not (confirmed & {host, place} or (own and _is_here(host))):
        raise RecipeError(
            f"validate.score.base_url: the {'' if own else 'recorded '}recipe would send texts to {brief(base_url)}. If you "
            f"trust that address, confirm it: export {HOSTS}={place}"
        )


def read_key(variable: str, base_url: str) -> str:
    """The key in an environment variable, for an address that was confirmed; raises `RecipeError`."""
    if not variable:
        return "none"
    problem = ""
    if not variable.endswith(_KEY_ENDING):
        problem = f"{brief(variable)} is not the name of a judge's key, which ends in {_KEY_ENDING}"
    elif urlsplit(base_url).scheme != "https" and not _is_here(_place(base_url)[0]):
        problem = f"{brief(base_url)} is not encrypted; a key is sent by https alone"
    elif not os.environ.get(variable):
        problem = f"the environment variable {variable} is not set; it holds the judge's key"
    if problem:
        raise RecipeError(f"validate.score.api_key_env: {problem}.")
    return os.environ[variable]


def _place(base_url: str) -> tuple[str, str]:
    """Host, and host with port where the address names one."""
    try:
        parts = urlsplit(base_url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise RecipeError(f"validate.score.base_url: {brief(base_url)} is no address ({error}).") from error
    if not host or "@" in parts.netloc:
        raise RecipeError(
            f"validate.score.base_url: {brief(base_url)}; needed: https://HOST/..., without a name or password."
        )
    return host, host if port is None else f"{host}:{port}"


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_client(base_url: str, key: str, timeout: float, retries: int) -> Any:
    """The `openai` client of an address: no redirects, no header that another environment variable asks for."""
    open_ai: Any = importlib.import_module("openai")  # by name, because it is an optional library

    def only_ours(request: Any) -> None:
        for name in set(request.headers) - _SENT:
            del request.headers[name]
        request.headers["authorization"] = f"Bearer {key}"

    def no_more_than(response: Any) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("its answer is compressed, which was not asked for")
        response.stream = _limited(response.stream)

    http = open_ai.DefaultHttpxClient(
        follow_redirects=False,
        timeout=timeout,
        headers={"accept-encoding": "identity"},
        event_hooks={"request": [only_ours], "response": [no_more_than]},
    )
    return open_ai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=retries, http_client=http)


def _limited(stream: Any) -> Any:
    """A response's stream that fails beyond `_LARGEST` bytes; of a subclass of its own class, which the library checks."""

    class Limited(type(stream)):  # type: ignore[misc]  # the class is the library's, which may be missing
        def __init__(self) -> None: ...

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for part in stream:
                size += len(part)
                if size > _LARGEST:
                    raise ValueError(f"its answer is longer than {_LARGEST:,} bytes")
                yield part

        def close(self) -> None:
            stream.close()

    return Limited()


def within(seconds: float, ask: Callable[[], _Answer]) -> _Answer:
    """What `ask` returns or raises; `TimeoutError` where it takes longer: a library's limits are for each byte anew."""
    done: list[Callable[[], _Answer]] = []

    def work() -> None:
        try:
            answer = ask()
            done.append(lambda: answer)
        except BaseException as error:
            failure = error

            def fail() -> _Answer:
                raise failure

            done.append(fail)

    # A daemon: a server that never ends its answer must not keep the process from ending.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError
    return done[0]()
