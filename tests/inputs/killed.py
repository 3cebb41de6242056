"""Decoding processes that somebody kills in the middle of a task, as the kernel does when memory is short."""

from __future__ import annotations

from typing import Any

import pytest

from embedder.inputs.decoder_process import DecoderProcess


def kill_at(monkeypatch: pytest.MonkeyPatch, kind: str, times: int = 1) -> list[str]:
    """Kill the process that is about to get a message of this type, `times` times. Returns the list of the kills."""
    send, kills = DecoderProcess.send, []

    def send_or_kill(process: DecoderProcess, descriptor: int | None = None, **message: Any) -> None:
        if message["type"] == kind and len(kills) < times:
            assert process._process is not None
            process._process.kill()
            process._process.wait()
            kills.append(kind)
        send(process, descriptor, **message)

    monkeypatch.setattr(DecoderProcess, "send", send_or_kill)
    return kills
