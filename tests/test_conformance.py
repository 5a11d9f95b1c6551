"""Every method obeys the laws: on every kind of site, through both bridges, in every layout."""

import conformance
import pytest


@pytest.mark.parametrize("case", conformance.cases(), ids=str)
def test_laws(case):
    conformance.check(case)
