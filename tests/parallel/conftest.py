import pytest

from .processes import Processes


@pytest.fixture(scope="session")
def processes():
    made = Processes()
    yield made
    made.close()
