"""Do the tests notice the bugs that well-known DQN libraries have shipped? Puts each into a copy and runs the tests.

    python scripts/check_mutations.py                        # all, some minutes; where processes can fork
    python scripts/check_mutations.py --quick                # the best known bugs, one variant of each
    python scripts/check_mutations.py --only truncation      # those with the word in their name
    python scripts/check_mutations.py --output mutations.json

Exits with 0 only if the tests pass on the unchanged copy and fail on every changed one. A change whose text is not
found exactly once, or that stops the tests from starting, is an error of this list and counts as not caught.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
WARM = ("torch", "gymnasium", "hypothesis", "pydantic", "safetensors.torch")  # imported once for all runs
COPIED = ("llmrl", "envs", "tests/llmrl/dqn", "pyproject.toml")


@dataclass(frozen=True)
class Outcome:
    """What the tests said."""

    name: str
    caught: bool
    detail: str  # the first test that failed, or why nothing did
    seconds: float


def make_copy(folder: Path) -> None:
    """Copies what the tests need."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, target)


def run_tests(folder: Path, names: tuple[str, ...]) -> tuple[int, str]:
    """Runs test files of a copy; returns pytest's exit code and the first failure, or its last lines."""
    output = folder / "output.txt"
    child = os.fork()  # a fresh process that need not import torch again, which takes longer than most tests
    if child == 0:
        os._exit(_pytest(folder, [f"tests/llmrl/dqn/test_{name}.py" for name in names], output))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    printed = output.read_text(errors="replace")
    failed = re.search(r"^FAILED \S*?::(.*?)(?: - .*)?$", printed, re.MULTILINE)
    return code, failed.group(1) if failed else printed[-1500:]


def _pytest(folder: Path, files: list[str], output: Path) -> int:
    """In a process of its own: runs test files of a copy against the copy."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(_paths(folder))
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / ".hypothesis")
    sys.path[:0] = _paths(folder)
    code = int(pytest.main(["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files]))
    sys.stdout.flush()
    return code


def _paths(folder: Path) -> list[str]:
    return [str(folder), str(folder / "envs")]


def check_import(folder: Path) -> None:
    """Makes sure that tests in the copy import the copy."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_paths(folder))}
    command = [sys.executable, "-c", "import llmrl.dqn; print(llmrl.dqn.__file__)"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    if not Path(done.stdout.strip()).resolve().is_relative_to(folder.resolve()):
        raise SystemExit(f"expected the tests to import the copy in {folder}, got {done.stdout.strip()}")


def try_mutation(folder: Path, mutation: Mutation) -> Outcome:
    """Puts one bug in, runs the tests, takes it out again."""
    start = time.perf_counter()
    file = folder / "llmrl" / "dqn" / mutation.file
    text = file.read_text()
    found = text.count(mutation.old)
    if found != 1:
        return Outcome(mutation.name, False, f"text found {found} times in {mutation.file}, expected 1", 0.0)
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        code, detail = run_tests(folder, mutation.tests)
    finally:
        file.write_text(text)
    if code == 0:
        detail = f"all of {', '.join(mutation.tests)} pass"
    return Outcome(mutation.name, code == 1, detail, time.perf_counter() - start)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the first variant of each known bug")
    parser.add_argument("--only", default="", help="only mutations whose name contains this")
    parser.add_argument("--output", type=Path, help="write the outcomes as JSON")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if (m.quick or not arguments.quick) and arguments.only in m.name]
    if not chosen:
        parser.error(f"--only: expected part of the name of a mutation, got {arguments.only!r}")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in WARM:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_copy(folder)
        check_import(folder)
        code, detail = run_tests(folder, tuple(sorted({test for m in chosen for test in m.tests})))
        print(
            f"{'passes' if code == 0 else 'FAILS '}  the unchanged copy{'' if code == 0 else ': ' + detail}", flush=True
        )
        outcomes = []
        for mutation in chosen if code == 0 else []:
            outcomes.append(outcome := try_mutation(folder, mutation))
            print(f"{'caught' if outcome.caught else 'MISSED'}  {outcome.name}: {outcome.detail}", flush=True)
    num_caught = sum(outcome.caught for outcome in outcomes)
    print(f"{num_caught} of {len(chosen)} mutations caught")
    if arguments.output is not None:
        report = {
            "unchanged_passes": code == 0,
            "num_mutations": len(chosen),
            "num_caught": num_caught,
            "mutations": [asdict(outcome) for outcome in outcomes],
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if code == 0 and num_caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
