"""Every method obeys the laws: on every kind of site, through both bridges, in every layout."""

import conformance
import pytest


@pytest.mark.parametrize("case", conformance.cases(), ids=str)
def test_laws(case):
    """What is asserted stands in conformance.py, a function for each law."""
    conformance.check(case)
