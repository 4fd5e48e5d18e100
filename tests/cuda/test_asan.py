"""The job under AddressSanitizer: a decoder's steps in every form of its products."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from emulation import asan_environment

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
def test_steps_touch_nothing_that_is_not_theirs() -> None:
    asan_environment()  # skips where the compiler has none
    steps = f"{HERE / 'test_tuning.py'}::test_every_form_gives_the_same_numbers"
    done = subprocess.run(
        [sys.executable, str(HERE / "emulation.py"), "-q", "-p", "no:cacheprovider", steps],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
