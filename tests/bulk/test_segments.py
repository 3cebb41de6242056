"""Clips cut into segments: a row each, embedded as if only that part had been sent, resumable, found by the search."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from embedder import Embedder
from embedder.errors import InvalidRequest
from embedder.inputs.items import Video
from embedder.inputs.video import frames_of_segment
from tests.conftest import encoded, picture
from tests.inputs.killed import kill_at
from tests.inputs.test_video import clip, every_frame

pytest.importorskip("pyarrow", reason="comes with the `bulk` extra")

import pyarrow.parquet as pq

from embedder.bulk.segments import ClipMeter, segment_names, split_segment
from embedder.bulk.thumbnails import make_thumbnail
from embedder.search.__main__ import main
from embedder.search.page_images import PageImages
from embedder.settings import Settings
from tests.bulk.without_ray import run_bulk


@pytest.mark.parametrize(
    ("duration_s", "segment_s", "expected"),
    [
        (30, 10, ["0,10", "10,20", "20,30"]),
        (34.9, 10, ["0,10", "10,20", "20,34.9"]),
        (35.04, 10, ["0,10", "10,20", "20,30", "30,35.04"]),
        (3, 10, ["0,3"]),
        (0.04, 10, ["0,0.04"]),
        (1, 0.4, ["0,0.4", "0.4,0.8", "0.8,1"]),
        (36000, 18000, ["0,18000", "18000,36000"]),
    ],
)
def test_clip_is_cut_into_segments_and_a_short_rest_belongs_to_the_last(
    duration_s: float, segment_s: float, expected: list[str]
) -> None:
    names = segment_names("a/b#t=1,2.mp4", duration_s, segment_s)
    assert names == [f"a/b#t=1,2.mp4#t={one}" for one in expected]
    segments = [split_segment(name) for name in names]
    assert {path for path, _ in segments} == {"a/b#t=1,2.mp4"}
    assert [segment[0] for _, segment in segments[1:] if segment] == [s[1] for _, s in segments[:-1] if s]


def test_clip_whose_process_is_killed_is_measured_and_shown_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(num_frames=50)
    with ClipMeter(Settings()) as meter:
        expected = meter.duration_s(data), make_thumbnail({"video": Video(data)}, Settings())
        for kind in ("open", "decode"):
            kills = kill_at(monkeypatch, kind)
            assert meter.duration_s(data) == expected[0] > 0
            assert make_thumbnail({"video": Video(data)}, Settings()) == expected[1]
            assert kills


def test_row_of_a_whole_file_has_no_segment() -> None:
    for name in ("a.mp4", "a.mp4#t=1", "a.mp4#t=x,2", "a.pdf#page=3", "#t=1,2"):
        assert split_segment(name) == (name, None)


def test_every_frame_is_in_one_segment() -> None:
    for num_frames, fps, seconds in ((250, 25.0, 3), (100, 29.97, 0.4), (7, 0.5, 2), (61, 30000 / 1001, 1)):
        names = segment_names("a.mp4", num_frames / fps, seconds)
        ranges = [frames_of_segment(num_frames, fps, split_segment(name)[1]) for name in names]
        assert [frame for one in ranges for frame in one] == list(range(num_frames))
    assert frames_of_segment(10, 5.0, (7.0, 9.0)) == range(9, 10)  # after the end: the last frame


@pytest.mark.parametrize("segment", [(-1, 2), (3, 3), (4, 3), (float("nan"), 3)])
def test_impossible_segment_is_refused(segment: tuple[float, float]) -> None:
    with pytest.raises(InvalidRequest, match="segment: got"):
        Video(b"", segment=segment)
    with pytest.raises(InvalidRequest, match="of an encoded video"):
        Video((b"",), segment=(0, 1))


@pytest.mark.slow  # many decoding processes
def test_segments_are_rows_that_equal_their_part_and_are_found(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    data = clip(num_frames=50)  # two seconds
    (folder / "a.mp4").write_bytes(data)
    (folder / "b.png").write_bytes(encoded(picture(40, 48)))
    (folder / "broken.mp4").write_bytes(data[:900])
    checkpoint = embedder.checkpoint.folder
    command = folder, output, "--segment-seconds", "0.8", "--rows-per-part", "2", "--thumbnails"
    names = ["a.mp4#t=0,0.8", "a.mp4#t=0.8,1.6", "a.mp4#t=1.6,2"]
    assert run_bulk(monkeypatch, checkpoint, *command) == (3, [*names, "b.png", "broken.mp4"])
    rows = [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["id"] for row in rows] == [*names, "b.png", "broken.mp4"]
    assert [(row["start_s"], row["end_s"]) for row in rows[:4]] == [(0, 0.8), (0.8, 1.6), (1.6, 2), (None, None)]
    assert rows[4]["error"].startswith("invalid_media: ")
    for row, start, end in zip(rows, (0.0, 0.8, 1.6), (0.8, 1.6, 2.0), strict=False):
        part = embedder.embed([{"video": Video(data, segment=(start, end))}])[0]
        np.testing.assert_allclose(row["embedding"], part, atol=1e-6)
    thumbnail = np.array(PIL.Image.open(io.BytesIO(rows[1]["thumbnail"])))
    frame = np.array(every_frame(data)[20].resize(thumbnail.shape[1::-1]))
    assert np.abs(thumbnail.astype(int) - frame).mean() < 6

    next(output.glob("part-0000000*")).unlink()  # as after a kill
    assert run_bulk(monkeypatch, checkpoint, *command) == (3, names[:2])
    images = PageImages(folder, Settings())
    assert images.render(names[1], 65536) != images.render(names[0], 65536)
    assert images.source(names[1]) == folder / "a.mp4"
    images.close()

    capsys.readouterr()
    PIL.Image.fromarray(thumbnail).save(tmp_path / "query.png")
    assert main([str(output), "--image", str(tmp_path / "query.png"), "--json"]) == 0
    found = {one["id"]: one for one in json.loads(capsys.readouterr().out)}
    assert len(found) == 4
    assert [found[names[1]][field] for field in ("file", "page", "start_s", "end_s")] == ["a.mp4", None, 0.8, 1.6]
    assert main([str(output), "red"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["score", "file", "seconds"]
    assert any(line.split()[1:3] == ["a.mp4", "0.8-1.6"] for line in lines)


def test_segment_equals_the_clip_of_only_these_frames(embedder: Embedder) -> None:
    """Motion JPEG codes each frame by itself, so a clip of some frames has the same pixels."""
    kind = "Motion JPEG in Matroska"
    whole, start = clip(kind, num_frames=50), clip(kind, num_frames=25)
    first, cut = embedder.embed([{"video": Video(whole, segment=(0.0, 1.0))}, {"video": start}])
    np.testing.assert_allclose(first, cut, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--segment-seconds", "0"], "--segment-seconds: got 0.0; allowed: 0.1 and more"),
        (["--segment-seconds", "nan"], "--segment-seconds: got nan; allowed"),
        (["--segment-seconds", "5"], "--segment-seconds: the input is not a folder of clips"),
    ],
)
def test_segments_of_other_inputs_are_refused(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "red"}\n')
    with pytest.raises(SystemExit, match="2"):
        run_bulk(monkeypatch, random_checkpoint, tmp_path / "a.jsonl", tmp_path / "out", *arguments)
    assert reason in capsys.readouterr().err
