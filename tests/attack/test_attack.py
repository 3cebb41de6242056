"""A short campaign of random attacks leaves quiet callers their answers, and nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack import campaign
from tests.conftest import start_server

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:lance is not fork-safe")  # other tests import it; the attackers do not use it
def test_quiet_callers_are_answered_next_to_random_attacks(tmp_path: Path) -> None:
    """The latencies are printed, not compared: they are those of the machine, too."""
    server = start_server(tmp_path, **campaign.SETTINGS)
    try:
        report = campaign.run(server, seconds=15, seed=1)
    finally:
        status = server.stop()
    print("\n".join(report.lines()))
    assert not report.faults()
    assert status == 0
    assert "Traceback" not in server.log.read_text()
