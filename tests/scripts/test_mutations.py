"""The list of known bugs must fit the code that it is put into."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    from mutations import MUTATIONS
finally:
    sys.path.pop(0)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_known_bug_can_be_put_in_and_has_tests_to_notice_it(mutation):
    text = (ROOT / "llmrl" / "dqn" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.old != mutation.new
    for name in mutation.tests:
        assert (ROOT / "tests" / "llmrl" / "dqn" / f"test_{name}.py").is_file()


def test_names_of_known_bugs_differ():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
