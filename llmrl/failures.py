"""How a command ends badly: one clear message on stderr and an exit code, instead of a traceback.

    2    what a person typed or a file contained, no write access, a full disk
    130  Ctrl-C

Anything else is a mistake of the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130

_NO_ACCESS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def reported_failures(on_interrupt: str) -> Iterator[None]:
    """Reports what goes wrong inside the block and ends the command.

    Args:
        on_interrupt: What to say after Ctrl-C: what was kept and how to go on.

    Raises:
        typer.Exit: With the exit code, after the message was printed.
    """
    try:
        yield
    except KeyboardInterrupt:
        print_message("interrupted", on_interrupt, style="yellow")
        raise typer.Exit(INTERRUPTED_CODE) from None
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        print_message("error", told, style="red", by_all=getattr(error, "told_by_all", False))
        raise typer.Exit(USER_ERROR_CODE) from None


def explain(error: BaseException) -> str | None:
    """What to tell about an error that is not the program's mistake; None if it is.

    Libraries wrap what the operating system said, so the causes are looked at too.
    """
    # Here, because the package registers its environments, and `--help` needs none of that.
    from llmrl_envs.errors import UserError

    if isinstance(error, UserError):
        return str(error)
    for link in _chain(error):
        if _is_disk_full(link):
            return str(UserError("no space left on the device", where=_filename(link), expected="free disk space"))
        if isinstance(link, OSError) and link.errno in _NO_ACCESS:
            return str(UserError("no access", where=_filename(link), got=link.strerror))
    return None


def print_message(label: str, text: str, *, style: str, by_all: bool = False) -> None:
    """Prints to stderr. Of several processes of one job only the first does, so that nothing stands there twice.

    Args:
        label: What kind of message it is.
        text: The message.
        style: Of the label.
        by_all: Print in every process: the first may be the one that is gone.
    """
    from rich.console import Console

    if os.environ.get("RANK", "0") != "0" and not by_all:
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"{label}:", style=f"bold {style}", end=" ")
    console.print(text, markup=False)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_SPACE
    # Writers in other languages (safetensors, Arrow) pass the system's words on, not its error number.
    return "No space left on device" in str(error) or "StorageFull" in str(error)


def _filename(error: BaseException) -> str | None:
    name = getattr(error, "filename", None)
    return None if name is None else str(name)
