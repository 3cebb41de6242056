"""Progress in log lines."""

from __future__ import annotations

import logging

import pytest

from embedder.model.progress import LoggedProgress


def test_progress_is_a_log_line_after_each_interval(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoggedProgress, "INTERVAL_S", 0.0)
    with caplog.at_level(logging.INFO), LoggedProgress(total=4_000_000_000, desc="Downloading", unit="B") as progress:
        progress.update(1_000_000_000)
        progress.update(2_000_000_000)
    assert "Downloading: 1.00G of 4.00G B" in caplog.messages
    assert "Downloading: 3.00G of 4.00G B" in caplog.messages
    assert not any(capsys.readouterr())


def test_what_is_done_soon_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert list(LoggedProgress(range(100), desc="Loading weights")) == list(range(100))
    assert not caplog.messages
