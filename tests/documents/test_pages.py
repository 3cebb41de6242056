"""Documents as pages: sizes, text, order, and what happens to files that are broken or hostile."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest

from benchmarks.demo_documents import make_pdf, text, write_documents
from embedder.documents.limits import MAX_TEXT_BYTES
from embedder.documents.pages import MAX_DOCUMENT_BYTES, DocumentReader
from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.regimes import CheckpointRegime
from embedder.settings import Settings
from tests.documents.hostile_pdfs import BAD_PAGES, GOOD, ODD, REFUSED, join, many_characters, pdf
from tests.inputs.killed import kill_at

REGIME = CheckpointRegime()


@pytest.fixture(scope="module")
def reader() -> Iterator[DocumentReader]:
    with DocumentReader(Settings()) as reader:
        yield reader


def write(folder: Path, data: bytes, name: str = "a.pdf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_pages_have_their_text_and_their_order(tmp_path: Path, reader: DocumentReader) -> None:
    ((*names,),) = write_documents(tmp_path, 1, 3)
    path = tmp_path / "report-01.pdf"
    assert reader.count_pages(path) == 3
    for number, name in ((3, names[2]), (1, names[0]), (2, names[1])):
        assert f"Sales of {name}, 2021 to 2025" in reader.render(path, number, REGIME).text


def test_text_with_non_ascii_characters_is_kept(tmp_path: Path, reader: DocumentReader) -> None:
    path = write(tmp_path, make_pdf([(text(10, 10, 20, "Grüße – naïve"), PIL.Image.new("RGB", (2, 2)))]))
    assert reader.render(path, 1, REGIME).text == "Grüße – naïve"


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ("0 0 595 842", (960, 1344)),  # A4: the whole budget of 1,310,720 pixels, less what rounding to 32 takes
        ("0 0 3000 3000", (1120, 1120)),  # a poster is rendered no larger
        ("0 0 144 72", (384, 192)),  # a label: 200 dots per inch
    ],
)
def test_page_is_rendered_in_the_size_that_is_embedded(
    box: str, size: tuple[int, int], tmp_path: Path, reader: DocumentReader
) -> None:
    image = reader.render(write(tmp_path, pdf(b"1 0 0 rg 0 0 3000 3000 re f", box=box)), 1, REGIME).image
    assert image.size == size
    step = REGIME.resize_image(image.height, image.width)
    assert (step.width, step.height) == size
    assert image.getpixel((size[0] // 2, size[1] // 2)) == (255, 0, 0)


def test_pages_of_a_tiff_are_read_in_every_order(tmp_path: Path, reader: DocumentReader) -> None:
    pages = [PIL.Image.new("RGB", (320, 320), color) for color in ("red", "lime", "blue")]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    path = tmp_path / "a.tiff"
    assert reader.count_pages(path) == 3
    colors = [reader.render(path, number, REGIME).image.getpixel((5, 5)) for number in (2, 3, 1)]
    assert colors == [(0, 255, 0), (0, 0, 255), (255, 0, 0)]


def test_page_of_a_tiff_in_the_color_space_lab_is_read(tmp_path: Path, reader: DocumentReader) -> None:
    PIL.Image.new("LAB", (320, 320), (255, 128, 128)).save(tmp_path / "a.tiff")
    pixel = reader.render(tmp_path / "a.tiff", 1, REGIME).image.getpixel((5, 5))
    assert isinstance(pixel, tuple)
    assert min(pixel) >= 254


@pytest.mark.parametrize("name", REFUSED)
def test_document_that_cannot_be_used_is_refused_with_the_reason(
    name: str, tmp_path: Path, reader: DocumentReader
) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(InvalidMedia, match=re.escape(reason)):
        reader.count_pages(write(tmp_path, data))


def pdf_of_many_pages(count: int) -> bytes:
    """Blank pages, the last of which is twice as wide."""
    first = 3
    kids = " ".join(f"{number} 0 R" for number in range(first, first + count))
    page = "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {} 100] >>"
    return join(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
            *[page.format(100).encode()] * (count - 1),
            page.format(200).encode(),
        ]
    )


def test_document_of_10000_pages_is_opened_and_one_of_too_many_is_refused(
    tmp_path: Path, reader: DocumentReader
) -> None:
    path = write(tmp_path, pdf_of_many_pages(10_000))
    assert reader.count_pages(path) == 10_000
    first, last = (reader.render(path, number, REGIME).image for number in (1, 10_000))
    assert first.width == first.height < last.width / 1.5
    with pytest.raises(MediaTooLarge, match="document of more than 20000 pages; allowed: up to 20000"):
        reader.count_pages(write(tmp_path, pdf_of_many_pages(20_001), "b.pdf"))


def test_document_of_too_many_bytes_is_refused_without_reading_it(tmp_path: Path, reader: DocumentReader) -> None:
    path = write(tmp_path, GOOD)
    with path.open("ab") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)  # sparse
    with pytest.raises(MediaTooLarge, match=f"document of {MAX_DOCUMENT_BYTES + 1} bytes"):
        reader.count_pages(path)


@pytest.mark.parametrize("name", BAD_PAGES)
def test_page_of_an_impossible_size_is_refused(name: str, tmp_path: Path, reader: DocumentReader) -> None:
    path = write(tmp_path, BAD_PAGES[name])
    if name == "no-size":  # PDFium gives it the size of a letter
        assert reader.render(path, 1, REGIME).image.size == (992, 1280)
    else:
        with pytest.raises(InvalidMedia):
            reader.render(path, 1, REGIME)


def test_page_that_does_not_exist_is_refused(tmp_path: Path, reader: DocumentReader) -> None:
    with pytest.raises(InvalidMedia, match="page 2; the document has pages 1 to 1"):
        reader.render(write(tmp_path, GOOD), 2, REGIME)


def test_folder_and_pipe_in_the_place_of_a_document_are_refused(tmp_path: Path, reader: DocumentReader) -> None:
    os.mkfifo(tmp_path / "pipe.pdf")
    for path in (tmp_path, tmp_path / "pipe.pdf", tmp_path / "missing.pdf"):
        with pytest.raises(InvalidMedia):
            reader.count_pages(path)


def test_page_with_too_much_text_is_rendered_without_it(tmp_path: Path, reader: DocumentReader) -> None:
    path = write(tmp_path, many_characters(12_000_000))
    with pytest.raises((InvalidMedia, MediaTooLarge)):
        reader.render(path, 1, REGIME)
    page = reader.render(path, 1, REGIME, with_text=False)
    assert (page.image.getpixel((5, 5)), page.text) == ((255, 0, 0), "")


@pytest.mark.parametrize("kind", ["open", "size", "render"])
def test_page_whose_process_is_killed_is_rendered_once_more(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, GOOD)
    kills = kill_at(monkeypatch, kind)
    with DocumentReader(Settings()) as reader:
        assert reader.count_pages(path) == 1
        assert reader.render(path, 1, REGIME).image.getpixel((5, 5)) == (255, 0, 0)
    assert kills == [kind]


def test_process_that_is_killed_again_costs_its_page_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, GOOD)
    kills = kill_at(monkeypatch, "render", times=6)
    with DocumentReader(Settings()) as reader:
        for number in range(3):
            with pytest.raises(InvalidMedia, match=r"failed on this file \(status -9\)"):
                reader.render(path, 1, REGIME)
            assert len(kills) == 2 * (number + 1)
        with pytest.raises(InvalidMedia, match="not rendered: 3 pages of this document"):
            reader.render(path, 1, REGIME)
        assert reader.render(write(tmp_path, GOOD, "b.pdf"), 1, REGIME).image.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.slow
def test_hostile_documents_neither_stop_the_reader_nor_take_its_memory(tmp_path: Path) -> None:
    files = {**{name: data for name, (data, _) in REFUSED.items()}, **BAD_PAGES, **ODD}
    assert sum(b"%PDF" in data for data in files.values()) >= 50
    peaks = []
    with DocumentReader(Settings(decode_timeout_s=3.0)) as reader:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.05):
                process = reader._process._process
                if process is not None and process.poll() is None:
                    try:
                        peaks.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096)
                    except (OSError, IndexError):
                        continue

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            for name, data in files.items():
                path = write(tmp_path, data, f"{name}.pdf")
                for number in (1, 2):
                    with contextlib.suppress(InvalidMedia, MediaTooLarge):
                        page = reader.render(path, number, REGIME)
                        assert page.image.width * page.image.height <= REGIME.max_pixels, name
                        assert len(page.text) <= MAX_TEXT_BYTES, name
                good = write(tmp_path, GOOD, "good.pdf")
                assert reader.render(good, 1, REGIME).image.getpixel((5, 5)) == (255, 0, 0), name
        finally:
            stop.set()
            thread.join()
    assert max(peaks) < 2**30
