"""Which parts of the standard library make which built-in topic, and as what kind of text.

A topic names modules or packages, not files, because a module may turn into a package from one Python to the next
(`pathlib` did in 3.13). All of them exist in every CPython from 3.11 on, also in distributions that leave out
`test`, `idlelib`, `tkinter`, `turtle`, `distutils` or `ensurepip`. No file belongs to two topics,
so that a policy can be learned on some topics and judged on others.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class View(StrEnum):
    """What is taken from a source file: topics that differ in kind, not only in subject."""

    SOURCE = "source"
    DOCSTRINGS = "docstrings"
    COMMENTS = "comments"
    SYNTAX_TREE = "syntax_tree"
    DOCUMENTATION = "documentation"
    UNICODE_TABLE = "unicode_table"


@dataclass(frozen=True)
class Topic:
    """One built-in corpus.

    Args:
        name: What follows `builtin:`.
        sources: Dotted-free module names relative to the library folder (`json`, `pydoc_data/topics`); `a|b` means
            the first of both that exists (`_pydatetime` holds since 3.12 what `datetime` held before).
        view: What is taken from each file.
        distinct_characters: Lines and paragraphs of this length or more occur once in the topic. Tables of short
            lines need a smaller length than prose and code.
    """

    name: str
    sources: tuple[str, ...]
    view: View = View.SOURCE
    distinct_characters: int = 40


def _topic(name: str, sources: str, view: View = View.SOURCE, distinct_characters: int = 40) -> Topic:
    return Topic(name, tuple(sources.split()), view, distinct_characters)


_TOPICS = (
    _topic("argparse", "argparse optparse getopt"),
    _topic("asyncio", "asyncio"),
    _topic(
        "comments",
        "difflib platform locale functools tracemalloc bz2 gzip mailbox profile os site sysconfig warnings pydoc"
        " _collections_abc pstats weakref webbrowser uuid mimetypes modulefinder runpy compileall zipapp",
        View.COMMENTS,
    ),
    _topic("ctypes", "ctypes subprocess socket"),
    _topic("datetime", "_pydatetime|datetime _strptime calendar zoneinfo"),
    _topic("debugger", "pdb bdb trace traceback"),
    _topic("decimal", "_pydecimal"),
    _topic(
        "docstrings",
        "pickletools collections ssl doctest operator gettext string sched pprint xmlrpc code codeop hmac types timeit"
        " contextlib lzma venv curses graphlib filecmp fileinput secrets symtable pyclbr",
        View.DOCSTRINGS,
    ),
    _topic("email", "email"),
    _topic("encodings", "encodings", distinct_characters=20),
    _topic("html", "html"),
    _topic("http", "http wsgiref"),
    _topic("importlib", "importlib zipimport pkgutil"),
    _topic("inspect", "inspect dis ast"),
    _topic("io", "_pyio codecs tempfile"),
    _topic("json", "json tomllib plistlib csv configparser"),
    _topic("logging", "logging"),
    _topic("multiprocessing", "multiprocessing"),
    _topic("pathlib", "pathlib posixpath ntpath glob fnmatch"),
    _topic("pickle", "pickle copyreg copy shelve dbm"),
    _topic("protocols", "imaplib smtplib ftplib poplib"),
    _topic("reference", "pydoc_data/topics", View.DOCUMENTATION),
    _topic("regex", "re tokenize shlex"),
    _topic("statistics", "statistics random fractions numbers heapq bisect"),
    _topic("syntax_trees", "base64 textwrap cmd queue", View.SYNTAX_TREE),
    _topic("tarfile", "tarfile zipfile shutil"),
    _topic("threading", "threading concurrent selectors socketserver"),
    _topic("typing", "typing dataclasses enum"),
    _topic("unicode", "", View.UNICODE_TABLE),
    _topic("unittest", "unittest"),
    _topic("urllib", "urllib ipaddress"),
    _topic("xml", "xml"),
)

TOPICS: dict[str, Topic] = {topic.name: topic for topic in _TOPICS}
