"""PDF files that are encrypted, broken, enormous or made to hold a reader up, by name."""

from __future__ import annotations

import zlib

from benchmarks.demo_documents import join, stream

ENCRYPTED = (
    b"<< /Filter /Standard /V 1 /R 2 /P -44 /O <" + b"41" * 32 + b"> /U <" + b"42" * 32 + b"> >>"
)  # no password fits


def pdf(
    content: bytes = b"", *, box: str = "0 0 100 100", page: str = "", kids: str = "3 0 R", count: str = "1"
) -> bytes:
    """A PDF of one page."""
    return join(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
            f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents 4 0 R {page} >>".encode(),
            stream("", content),
        ]
    )


def encrypted() -> bytes:
    """A PDF that opens only with a password."""
    plain = join([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 0 >>", ENCRYPTED])
    return plain.replace(b"/Root 1 0 R", b"/Root 1 0 R /Encrypt 3 0 R /ID [<00> <00>]")


def bomb(num_bytes: int) -> bytes:
    """A PDF with a page of `num_bytes` bytes of operators, in a thousandth of that."""
    packed = zlib.compress(b"q " * (num_bytes // 2), 9)
    body = b"<< /Filter /FlateDecode /Length %d >>\nstream\n%b\nendstream" % (len(packed), packed)
    return join(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 100] /Contents 4 0 R >>",
            body,
        ]
    )


GOOD = pdf(b"1 0 0 rg 0 0 100 100 re f")

# Files that are refused as a whole, and a part of the reason
REFUSED = {
    "no-pdf": (b"hello", "not a PDF or TIFF file"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "ZIP archive"),
    "empty": (b"", "empty (0 bytes)"),
    "only-a-header": (b"%PDF-1.7\n", "damaged"),
    "cut-off": (GOOD[:60], "damaged"),
    "zero-pages": (pdf(kids="", count="0"), "no pages"),
    "encrypted": (encrypted(), "encrypted and needs a password"),
    "broken-tiff": (b"II*\0\xff\xff\xff\xff", "TIFF"),
}
# Files that open, with a page that is refused
BAD_PAGES = {
    "no-size": pdf(box="0 0 0 0", page="/Rotate 0"),
    "too-wide": pdf(box="0 0 100000 10"),
    "billion-points": pdf(box="0 0 1000000000 1000000000"),
}
# Files that are unusual, but can be rendered or refused: in either case the reader goes on
ODD = {
    "broken-xref": GOOD.replace(b"startxref\n", b"startxref\n9"),
    "no-trailer": GOOD[: GOOD.index(b"trailer")],
    "junk-before": b"junk\n" * 10 + GOOD,
    "javascript": GOOD.replace(
        b"/Pages 2 0 R >>", b"/Pages 2 0 R /OpenAction << /S /JavaScript /JS (app.alert\\(1\\)) >> >>"
    ),
    "launch": GOOD.replace(b"/Pages 2 0 R >>", b"/Pages 2 0 R /OpenAction << /S /Launch /F (/bin/sh) >> >>"),
    "page-tree-loop": pdf(kids="2 0 R", count="5"),
    "page-is-its-parent": pdf(kids="3 0 R 3 0 R 3 0 R", count="3"),
    "count-lies": pdf(count="1000000"),
    "negative-count": pdf(count="-5"),
    "contents-loop": GOOD.replace(b"/Contents 4 0 R", b"/Contents 3 0 R"),
    "missing-contents": GOOD.replace(b"/Contents 4 0 R", b"/Contents 9 0 R"),
    "missing-font": pdf(b"BT /F9 20 Tf 10 10 Td (hello) Tj ET"),
    "deep-dictionary": GOOD.replace(b"/Contents", b"/X " + b"[" * 5000 + b"]" * 5000 + b" /Contents"),
    "nested-saves": pdf(b"q " * 100_000),
    "bomb": bomb(200 * 2**20),
    "huge-operands": pdf(b"1e308 0 0 1e308 0 0 cm 0 0 1e308 1e308 re f"),
    "not-operators": pdf(bytes(range(256)) * 100),
    "truncated-stream": GOOD.replace(b"/Length ", b"/Length 9"),
    "infinite-dash": pdf(b"[0.0000001] 0 d 0 0 m 100 100 l S"),
    "user-unit": pdf(page="/UserUnit 1e30"),
    "rotated": pdf(page="/Rotate 12345"),
}
