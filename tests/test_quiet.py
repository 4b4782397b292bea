"""What libraries say while they load is not heard; what others say meanwhile is, and all is as it was afterwards."""

import logging
import threading
import warnings

import pytest

from cogvx_fast.quiet import _LATER, quiet_imports


@pytest.fixture
def heard(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_libraries_are_quiet_and_others_are_heard(heard):
    with quiet_imports():
        logging.warning("by nobody")
        logging.getLogger("torchao.kernel").warning("torchao")
        logging.getLogger("uvicorn.error").info("a server")
        logging.error("an error")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    logging.info("after")
    logging.getLogger("torchao.kernel").warning("torchao, after")
    assert heard() == ["a server", "an error", "after", "torchao, after"]


def test_blocks_of_several_threads_leave_all_as_it_was(heard):
    levels = [logging.getLogger(name).level for name in ("", "torchao")]
    filters = list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with quiet_imports():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with quiet_imports():
        thread.start()
        assert inside.wait(10)
    logging.warning("one is still inside")
    leave.set()
    thread.join()
    logging.warning("none is")
    assert heard() == ["none is"]
    assert [logging.getLogger(name).level for name in ("", "torchao")] == levels
    assert not logging.getLogger().filters
    assert {f[1].pattern for f in warnings.filters if f not in filters} <= {_LATER}


def test_an_error_in_a_block_ends_it(heard):
    with pytest.raises(ImportError), quiet_imports():
        raise ImportError
    logging.warning("after")
    assert heard() == ["after"]
