import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, here and in the processes that tests start: at test sizes more threads cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Same examples in every run, on a slow machine too.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def nothing_left_over():
    """What a training run sets for the whole process does not reach the next test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of reference data (recorded updates of upstream, videos), named by HRSSM_TEST_DATA."""
    folder = os.environ.get("HRSSM_TEST_DATA")
    if not folder:
        pytest.skip("HRSSM_TEST_DATA does not name the folder of reference data")
    assert Path(folder).is_dir(), f"HRSSM_TEST_DATA={folder} is not a folder"
    return Path(folder)
