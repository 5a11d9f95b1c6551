"""The table in invariants.md has every invariant, and every test it names exists."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent
ROWS = [line for line in (ROOT / "invariants.md").read_text().splitlines() if re.match(r"\| C\d+ ", line)]


def test_every_invariant_has_its_row():
    assert [int(re.match(r"\| C(\d+)", row)[1]) for row in ROWS] == list(range(1, 63))
    assert all(row.split("|")[3].strip() for row in ROWS)


def test_every_test_that_is_named_exists():
    named = 0
    for row in ROWS:
        file = None
        for name, test in re.findall(r"`([\w/]+\.py)?(?:::(test_\w+))?`", row):
            file = name or file
            if name:
                assert (ROOT / name).exists(), row
            if test:
                named += 1
                assert f"def {test}(" in (ROOT / file).read_text(), (test, row)
    assert named > 50
