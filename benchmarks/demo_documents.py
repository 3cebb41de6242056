"""Write the demo documents, PDF reports with drawings, tables and charts: `python -m benchmarks.demo_documents FOLDER`.

Everything on a page comes from this script and from the drawings in the package, so no foreign content is needed. Page
p of report r is about drawing `r * pages + p`, so a test knows which page a name has to find. The drawing is large,
because the bundled model embeds a page in about 200x250 pixels and reads no text.
"""

from __future__ import annotations

import argparse
import random
import zlib
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from benchmarks.drawings import drawings_of_the_demo

WIDTH, HEIGHT = 480, 480  # points
DRAWING = 400
YEARS = range(2021, 2026)


def drawing_names(num_documents: int, num_pages: int) -> list[list[str]]:
    """The subject of each page of each document."""
    names, _ = drawings_of_the_demo()
    return [names[start * num_pages : (start + 1) * num_pages] for start in range(num_documents)]


def write_documents(folder: Path, num_documents: int = 20, num_pages: int = 10) -> list[list[str]]:
    """Write `report-01.pdf` and so on. Returns the subject of each page of each document."""
    folder.mkdir(parents=True, exist_ok=True)
    subjects = drawing_names(num_documents, num_pages)
    _, drawings = drawings_of_the_demo()
    for document, names in enumerate(subjects):
        pages = []
        for page, name in enumerate(names):
            place = document * num_pages + page
            pages.append((page_content(name, place), drawings[place]))
        (folder / f"report-{document + 1:02}.pdf").write_bytes(make_pdf(pages))
    return subjects


def page_content(name: str, seed: int) -> str:
    """PDF operators of one page: title, drawing, a table of invented sales, and a bar chart of them."""
    sales = [random.Random(seed * 10 + year).randint(10, 99) for year in YEARS]  # noqa: S311 - no secret
    lines = [text(40, HEIGHT - 17, 13, f"Sales of {name}, 2021 to 2025")]
    lines.append(f"q {DRAWING} 0 0 {DRAWING} {(WIDTH - DRAWING) / 2} 56 cm /Drawing Do Q")
    for row, (year, count) in enumerate(zip(YEARS, sales, strict=True)):
        lines.append(text(40 + 48 * row, 38, 9, str(year)))
        lines.append(text(40 + 48 * row, 26, 9, f"{count} t"))
        lines.append(f"0.3 0.4 0.6 rg {300 + 30 * row} 26 20 {count / 4} re f 0 0 0 rg")
    lines.append(text(40, 10, 8, f"Tonnes of {name} by year; the chart shows the same numbers."))
    return "\n".join(lines)


def text(left: float, bottom: float, size: float, content: str) -> str:
    """PDF operators that show a line of text."""
    escaped = content.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return f"BT /F {size} Tf {left} {bottom} Td ({escaped}) Tj ET"


def make_pdf(pages: Sequence[tuple[str, PIL.Image.Image]]) -> bytes:
    """A PDF of pages, each with its operators and the picture that they call /Drawing."""
    kids = " ".join(f"{4 + 3 * index} 0 R" for index in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for index, (content, picture) in enumerate(pages):
        first = 4 + 3 * index
        resources = f"<< /Font << /F 3 0 R >> /XObject << /Drawing {first + 2} 0 R >> >>"
        box = f"[0 0 {WIDTH} {HEIGHT}]"
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Resources {resources} /Contents {first + 1} 0 R >>"
        kind = f"/Type /XObject /Subtype /Image /Width {picture.width} /Height {picture.height} "
        objects += [
            page.encode(),
            stream("", content.encode("cp1252")),
            stream(kind + "/ColorSpace /DeviceRGB /BitsPerComponent 8 /Interpolate true ", picture.tobytes()),
        ]
    return join(objects)


def stream(fields: str, data: bytes) -> bytes:
    """A compressed stream object."""
    packed = zlib.compress(data)
    return f"<< {fields}/Filter /FlateDecode /Length {len(packed)} >>\nstream\n".encode() + packed + b"\nendstream"


def join(objects: Sequence[bytes]) -> bytes:
    """Objects, numbered from 1, the first of which is the catalog -> the bytes of the PDF."""
    file = bytearray(b"%PDF-1.7\n")
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(file))
        file += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    start = len(file)
    entries = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    file += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{entries}".encode()
    file += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()
    return bytes(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--pages", type=int, default=10)
    options = parser.parse_args()
    subjects = write_documents(options.folder, options.documents, options.pages)
    print(f"{len(subjects)} documents, {sum(map(len, subjects))} pages")


if __name__ == "__main__":
    main()
