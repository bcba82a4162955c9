"""Settings of every test process, before the first import of torch and the Hugging Face libraries; the slow tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from slow import SECOND_HALF, is_slow

# The user's caches and tokens stay out of the tests, and what the tests cache goes with them.
_HOME = tempfile.mkdtemp(prefix="dsv4q-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

os.environ |= {
    # The tensors are tiny: threads cost more than they bring, and one thread always adds up in the same order.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HOME": _HOME,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for _name in (
    "HF_DATASETS_CACHE", "HF_HUB_CACHE", "FORCE_COLOR", "CLICOLOR_FORCE", "RANK", "WORLD_SIZE", "LOCAL_RANK",
    "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
):  # fmt: skip
    os.environ.pop(_name, None)


@pytest.fixture(scope="module")
def saved_after_every_block() -> Iterator[None]:
    """Residual streams are; by the clock, how often a run changes the disk would depend on its pace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4q.run.residuals.WORK_PER_SAVE", 0)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, so that `-m "not slow"` is the fast set, and the two halves of `make test`."""
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
        if not item.get_closest_marker("slow") or item.path.name in SECOND_HALF:
            item.add_marker(pytest.mark.second_half)
