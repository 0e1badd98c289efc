"""What the tests of scores share."""

import pytest

from locvlm.evaluation.meteor import Meteor, MeteorUnavailable, shared


@pytest.fixture(scope="session")
def meteor() -> Meteor:
    """The one METEOR process of the test run; starting it takes some ten seconds."""
    try:
        return shared()
    except MeteorUnavailable as fault:
        pytest.skip(str(fault))
