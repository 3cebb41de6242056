"""PDF files that are encrypted, broken, enormous or made to block a reader, by name."""

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
    piece = b"q " * 2**19
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)  # compressed once, because that takes longer than the tests
    block = compressor.compress(piece) + compressor.flush(zlib.Z_FULL_FLUSH)
    count, checksum = num_bytes // len(piece), 1
    for _ in range(count):
        checksum = zlib.adler32(piece, checksum)
    packed = b"\x78\xda" + block * count + compressor.flush() + checksum.to_bytes(4, "big")
    body = b"<< /Filter /FlateDecode /Length %d >>\nstream\n%b\nendstream" % (len(packed), packed)
    return join(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 100] /Contents 4 0 R >>",
            body,
        ]
    )


def resources(content: bytes, named: str, *objects: bytes, page: str = "") -> bytes:
    """A PDF of one page that names other objects, the first of which has the number 5."""
    fields = f"/MediaBox [0 0 100 100] /Contents 4 0 R /Resources << {named} >> {page}"
    return join(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            f"<< /Type /Page /Parent 2 0 R {fields} >>".encode(),
            stream("", content),
            *objects,
        ]
    )


def form(content: bytes, fields: str = "") -> bytes:
    """A form XObject, which draws itself and others by the names /A and /B."""
    xobjects = "/Resources << /XObject << /A 5 0 R /B 6 0 R >> >>"
    return stream(f"/Type /XObject /Subtype /Form /BBox [0 0 100 100] {xobjects} {fields} ", content)


def deep_page_tree(depth: int) -> bytes:
    """A page under so many levels of page trees."""
    levels = [
        f"<< /Type /Pages /Kids [{number + 1} 0 R] /Count 1 /Parent {max(1, number - 1)} 0 R >>".encode()
        for number in range(2, depth + 2)
    ]
    page = f"<< /Type /Page /Parent {depth + 1} 0 R /MediaBox [0 0 100 100] >>".encode()
    return join([b"<< /Type /Catalog /Pages 2 0 R >>", *levels, page])


def object_stream(fields: str, content: bytes) -> bytes:
    """A PDF whose page tree is said to be in an object stream."""
    return pdf(kids="7 0 R", count="1") + b"\n5 0 obj\n" + stream(f"/Type /ObjStm {fields} ", content) + b"\nendobj\n"


def image(width: int, height: int, fields: str = "/ColorSpace /DeviceRGB ") -> bytes:
    """An image that has more pixels than data."""
    kind = f"/Type /XObject /Subtype /Image /Width {width} /Height {height} /BitsPerComponent 8 "
    return stream(kind + fields, b"\0" * 1000)


def doubling(levels: int) -> list[bytes]:
    """Forms each of which draws the next one twice: 2 ** levels drawings."""
    forms = [
        stream(
            f"/Type /XObject /Subtype /Form /BBox [0 0 100 100] /Resources << /XObject << /N {number + 6} 0 R >> >> ",
            b"/N Do /N Do",
        )
        for number in range(levels)
    ]
    return [*forms, stream("/Type /XObject /Subtype /Form /BBox [0 0 100 100] ", b"0 0 9 9 re f")]


def annotations(count: int) -> bytes:
    """A page with so many annotations, all of one appearance."""
    listed = " ".join(["6 0 R"] * count)
    note = b"<< /Type /Annot /Subtype /Square /Rect [0 0 90 90] /C [1 0 0] /AP << /N 5 0 R >> >>"
    return resources(b"", "", form(b"0 0 9 9 re f"), note, page=f"/Annots [{listed}]")


def many_characters(count: int) -> bytes:
    """A red page with so many characters, in lines of 1,000."""
    lines = b"(" + b"a" * 1000 + b") Tj T* "
    content = b"1 0 0 rg 0 0 100 100 re f BT /F 1 Tf 1 TL 0 9 Td " + lines * (count // 1000) + b" ET"
    return resources(content, "/Font << /F 5 0 R >>", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")


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
    "form-draws-itself": resources(b"/A Do", "/XObject << /A 5 0 R >>", form(b"/A Do")),
    "forms-draw-each-other": resources(b"/A Do", "/XObject << /A 5 0 R >>", form(b"/B Do /B Do"), form(b"/A Do /A Do")),
    "form-bomb": resources(b"/N Do", "/XObject << /N 5 0 R >>", *doubling(40)),
    "pattern-in-itself": resources(
        b"/Pattern cs /P scn 0 0 100 100 re f",
        "/Pattern << /P 5 0 R >>",
        stream(
            "/Type /Pattern /PatternType 1 /PaintType 1 /TilingType 1 /BBox [0 0 1 1] /XStep 0.0001 /YStep 0.0001 "
            "/Resources << /Pattern << /P 5 0 R >> >> ",
            b"/Pattern cs /P scn 0 0 1 1 re f",
        ),
    ),
    "font-that-writes-itself": resources(
        b"BT /F 20 Tf 10 10 Td (aaaa) Tj ET",
        "/Font << /F 5 0 R >>",
        b"<< /Type /Font /Subtype /Type3 /FontBBox [0 0 1 1] /FontMatrix [1 0 0 1 0 0] /CharProcs << /a 6 0 R >> "
        b"/Encoding << /Differences [97 /a] >> /FirstChar 97 /LastChar 97 /Widths [1] "
        b"/Resources << /Font << /F 5 0 R >> >> >>",
        stream("", b"BT /F 1 Tf (aaaa) Tj ET"),
    ),
    "soft-mask-of-itself": resources(
        b"/G gs 0 0 100 100 re f",
        "/ExtGState << /G 5 0 R >>",
        b"<< /Type /ExtGState /SMask << /S /Luminosity /G 6 0 R >> >>",
        stream(
            "/Type /XObject /Subtype /Form /BBox [0 0 100 100] /Group << /S /Transparency >> "
            "/Resources << /ExtGState << /G 5 0 R >> >> ",
            b"/G gs 0 0 100 100 re f",
        ),
    ),
    "huge-image": resources(b"100 0 0 100 0 0 cm /I Do", "/XObject << /I 5 0 R >>", image(60_000, 60_000)),
    "image-of-2-to-the-31": resources(b"/I Do", "/XObject << /I 5 0 R >>", image(2**31 - 1, 2**31 - 1)),
    "image-that-masks-itself": resources(
        b"100 0 0 100 0 0 cm /I Do", "/XObject << /I 5 0 R >>", image(9, 9, "/ColorSpace /DeviceRGB /SMask 5 0 R ")
    ),
    "negative-image": resources(b"/I Do", "/XObject << /I 5 0 R >>", image(-5, -5)),
    "many-annotations": annotations(20_000),
    "deep-page-tree": deep_page_tree(3000),
    "not-a-number": pdf(b"nan inf -inf 1e999 0 0 cm 0 0 nan inf re f 1e38 1e38 m 1e39 -1e39 l S"),
    "negative-box": pdf(b"0 0 50 50 re f", box="100 100 0 0"),
    "box-of-words": pdf(box="a b c d"),
    "crop-outside": pdf(page="/CropBox [500 500 600 600]"),
    "object-stream-in-itself": object_stream("/N 1 /First 4 /Extends 5 0 R", b"5 0 << >>"),
    "object-stream-of-millions": object_stream("/N 2000000000 /First 4", b"7 0 << /Type /Pages >>"),
    "xref-leads-to-itself": GOOD.replace(b"/Root 1 0 R", b"/Prev %d /Root 1 0 R" % GOOD.index(b"xref")),
    "catalog-missing": GOOD.replace(b"/Root 1 0 R", b"/Root 99 0 R"),
    "filters-in-a-row": GOOD.replace(b"/Filter /FlateDecode", b"/Filter [" + b"/FlateDecode " * 2000 + b"]"),
    "unknown-filter": GOOD.replace(b"/FlateDecode", b"/NoSuchOne"),
    "length-of-itself": GOOD.replace(b"/Length ", b"/Length 4 0 R /L "),
    "negative-length": GOOD.replace(b"/Length ", b"/Length -"),
}
