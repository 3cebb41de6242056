"""Office files -> PDF, with programs in the place of LibreOffice, and with LibreOffice where it is installed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.demo_documents import write_documents
from embedder.documents import office
from embedder.documents.office import convert_to_pdf, find_program
from embedder.documents.pages import DocumentReader
from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.regimes import CheckpointRegime
from embedder.settings import Settings

Install = Callable[[str], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that puts a Python program in the place of LibreOffice -> the folder for its notes.

    The program has the names `out`, the folder for the PDF, `notes`, and `pdf`, a PDF of two pages.
    """
    write_documents(tmp_path / "made", 1, 2)

    def write(code: str) -> Path:
        folder, notes = tmp_path / "bin", tmp_path / "notes"
        folder.mkdir(exist_ok=True)
        notes.mkdir(exist_ok=True)
        program = folder / "soffice"
        head = (
            f"#!{sys.executable} -IS\nimport os, sys, pathlib, socket, time, json\n"
            "if '--terminate_after_init' in sys.argv:\n    sys.exit()\n"
            f"notes = pathlib.Path({str(notes)!r})\n"
            "out = pathlib.Path(sys.argv[sys.argv.index('--outdir') + 1])\nout.mkdir()\n"
            f"pdf = pathlib.Path({str(tmp_path / 'made' / 'report-01.pdf')!r}).read_bytes()\n"
        )
        program.write_text(head + code)
        program.chmod(0o755)
        read = (sys.prefix, sys.base_prefix, str(tmp_path / "made"))
        monkeypatch.setattr(office, "READABLE", (*office.READABLE, *read))
        monkeypatch.setattr(office, "WRITABLE", (*office.WRITABLE, str(notes)))
        monkeypatch.setenv("PATH", str(folder))
        return notes

    return write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "-x report.docx"  # not an option of the program
    path.write_bytes(b"PK\x03\x04 a document")
    return path


def test_office_file_becomes_the_pages_of_its_pdf(install: Install, source: Path, tmp_path: Path) -> None:
    notes = install(
        "copied = pathlib.Path(sys.argv[-1]).read_bytes()\n"
        "profile = sys.argv[[arg.startswith('-env:UserInst') for arg in sys.argv].index(True)].partition('file://')[2]\n"
        "text = (pathlib.Path(profile) / 'user' / 'registrymodifications.xcu').read_text()\n"
        "(notes / 'seen').write_text(json.dumps([sys.argv[-1], copied.decode('latin-1'), text, dict(os.environ)]))\n"
        "(out / 'document.pdf').write_bytes(pdf)\n"
    )
    convert_to_pdf(source, tmp_path / "a.pdf")
    with DocumentReader(Settings()) as reader:
        assert reader.count_pages(tmp_path / "a.pdf") == 2
        assert "Sales of" in reader.render(tmp_path / "a.pdf", 2, CheckpointRegime()).text
    name, copied, profile, environment = json.loads((notes / "seen").read_text())
    assert name.endswith("/document.docx")
    assert copied.encode("latin-1") == source.read_bytes()
    for setting in ("DisableMacrosExecution", "DisableActiveContent", "BlockUntrustedRefererLinks"):
        assert setting in profile
    assert not [name for name in environment if name.startswith(("EMBEDDER", "AWS", "HF_"))]
    assert not Path(name).exists()  # the folder is removed


def test_program_has_no_network(install: Install, source: Path, tmp_path: Path) -> None:
    notes = install(
        "results = []\n"
        "for family in (socket.AF_INET, socket.AF_INET6):\n"
        "    try:\n"
        "        socket.socket(family)\n"
        "        results.append('open')\n"
        "    except OSError as error:\n"
        "        results.append(type(error).__name__)\n"
        "try:\n"
        "    socket.socket(socket.AF_UNIX).connect('/nowhere')\n"
        "except OSError as error:\n"
        "    results.append(type(error).__name__)\n"
        "(notes / 'seen').write_text(json.dumps(results))\n"
        "(out / 'document.pdf').write_bytes(pdf)\n"
    )
    convert_to_pdf(source, tmp_path / "a.pdf")
    assert json.loads((notes / "seen").read_text()) == ["PermissionError"] * 3


has_landlock = sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1  # its version


@pytest.mark.skipif(not has_landlock, reason="no Landlock in this kernel")
def test_program_has_no_files_but_its_own(install: Install, source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the user")
    notes = install(
        "results = {}\n"
        "def attempt(name, action):\n"
        "    try:\n"
        "        action()\n"
        "        results[name] = 'done'\n"
        "    except OSError as error:\n"
        "        results[name] = type(error).__name__\n"
        "secret = notes.parent / 'secret'\n"
        "own = pathlib.Path(os.environ['HOME']) / 'own'\n"
        "attempt('read', secret.read_text)\n"
        "attempt('list', lambda: os.listdir(notes.parent))\n"
        "attempt('list home', lambda: os.listdir('/root' if os.getuid() == 0 else '/home'))\n"
        "attempt('environment', pathlib.Path(f'/proc/{os.getppid()}/environ').read_bytes)\n"
        "attempt('overwrite', lambda: secret.write_text(''))\n"
        "attempt('create', lambda: (notes.parent / 'new').write_text(''))\n"
        "attempt('link', lambda: (os.symlink(secret, own), own.read_text()))\n"
        "attempt('remove', secret.unlink)\n"
        "attempt('signal', lambda: os.kill(os.getppid(), 0))\n"
        "attempt('write', lambda: own.with_name('other').write_text(''))\n"
        "attempt('execute', lambda: os.close(os.open('/usr/bin/env', os.O_RDONLY)))\n"
        "(notes / 'seen').write_text(json.dumps(results))\n"
        "(out / 'document.pdf').write_bytes(pdf)\n"
    )
    convert_to_pdf(source, tmp_path / "a.pdf")
    seen = json.loads((notes / "seen").read_text())
    assert seen.pop("signal") in ("PermissionError", "done")  # since Linux 6.12
    allowed = [name for name, result in seen.items() if result == "done"]
    assert allowed == ["write", "execute"]
    assert set(seen.values()) == {"PermissionError", "done"}
    assert (tmp_path / "secret").read_text() == "of the user"


def test_program_that_takes_too_long_is_killed_with_what_it_has_started(
    install: Install, source: Path, tmp_path: Path
) -> None:
    notes = install(
        "child = os.fork()\n"
        "(notes / str(os.getpid())).touch()\n"
        "if child:\n"
        "    (notes / 'ready').touch()\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(MediaTooLarge, match=r"took more than 2 s; convert it to PDF"):
        convert_to_pdf(source, tmp_path / "a.pdf", timeout_s=2)
    started = [int(path.name) for path in notes.iterdir() if path.name.isdecimal()]
    assert len(started) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, started))
    assert not (tmp_path / "a.pdf").exists()


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("code", ["", "sys.exit(3)", "os.kill(os.getpid(), 11)", "(out / 'document.pdf').mkdir()"])
def test_file_that_cannot_be_converted_says_so(code: str, install: Install, source: Path, tmp_path: Path) -> None:
    install(code)
    with pytest.raises(InvalidMedia, match="LibreOffice cannot convert this file"):
        convert_to_pdf(source, tmp_path / "a.pdf")
    assert not (tmp_path / "a.pdf").exists()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit(137)"])  # LibreOffice's launcher exits
def test_program_that_is_killed_is_started_once_more(end: str, install: Install, source: Path, tmp_path: Path) -> None:
    notes = install(
        f"(notes / f'{{time.time_ns()}}').touch()\nif len(os.listdir(notes)) < 2:\n    {end}\n"
        "(out / 'document.pdf').write_bytes(pdf)\n"
    )
    convert_to_pdf(source, tmp_path / "a.pdf")
    assert len(list(notes.iterdir())) == 2
    install(f"(notes / f'{{time.time_ns()}}').touch()\n{end}\n")
    with pytest.raises(InvalidMedia, match="LibreOffice was killed while it converted this file"):
        convert_to_pdf(source, tmp_path / "b.pdf")
    assert len(list(notes.iterdir())) == 4


def test_empty_file_is_refused(install: Install, source: Path, tmp_path: Path) -> None:
    """LibreOffice makes an empty page of it."""
    install("(out / 'document.pdf').write_bytes(pdf)\n")
    source.write_bytes(b"")
    with pytest.raises(InvalidMedia, match=r"^the document is empty \(0 bytes\)$"):
        convert_to_pdf(source, tmp_path / "a.pdf")


def test_link_in_the_place_of_the_pdf_is_refused(install: Install, source: Path, tmp_path: Path) -> None:
    install("(out / 'document.pdf').symlink_to('/etc/passwd')")
    with pytest.raises(InvalidMedia, match="cannot convert"):
        convert_to_pdf(source, tmp_path / "a.pdf")


def test_without_libreoffice_the_error_says_what_to_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program() is None
    with pytest.raises(InvalidMedia, match="LibreOffice, which is not installed"):
        convert_to_pdf(source, tmp_path / "a.pdf")


@pytest.mark.slow
@pytest.mark.skipif(find_program() is None, reason="no LibreOffice")
def test_real_libreoffice_converts_and_refuses(tmp_path: Path) -> None:
    sockets = set(Path("/tmp").glob("OSL_PIPE_*"))
    (tmp_path / "a.rtf").write_text(r"{\rtf1\ansi Hello from RTF\par\page Second page\par}")
    (tmp_path / "bad.docx").write_bytes(b"PK\x03\x04 no document" + os.urandom(100))
    convert_to_pdf(tmp_path / "a.rtf", tmp_path / "a.pdf")
    with DocumentReader(Settings()) as reader:
        assert reader.count_pages(tmp_path / "a.pdf") == 2
        assert "Second page" in reader.render(tmp_path / "a.pdf", 2, CheckpointRegime()).text
    with pytest.raises(InvalidMedia):
        convert_to_pdf(tmp_path / "bad.docx", tmp_path / "bad.pdf")
    assert set(Path("/tmp").glob("OSL_PIPE_*")) == sockets


def test_folder_with_office_files_is_read_where_libreoffice_is_installed(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="comes with the `bulk` extra")
    from embedder.bulk.source import Columns, Source

    folder, state = tmp_path / "input", tmp_path / "out" / "_bulk"
    write_documents(folder, 1, 1)
    for name in ("a.docx", "bad.odt"):
        (folder / name).write_bytes(b"PK" + name.encode())
    notes = install(
        "(notes / f'{time.time_ns()}').touch()\n"
        "if b'bad' in pathlib.Path(sys.argv[-1]).read_bytes():\n"
        "    sys.exit(1)\n"
        "(out / 'document.pdf').write_bytes(pdf)\n"
    )
    for _ in range(2):  # the second time as a run that is resumed
        source = Source(folder, Columns(), Settings(), state)
        (part,) = source.parts(10)
        rows = list(source.rows(part))
        source.close()
        assert [row.id for row in rows] == ["a.docx#page=1", "a.docx#page=2", "bad.odt", "report-01.pdf#page=1"]
        assert isinstance(rows[2].fields, InvalidMedia)
        assert [row.text is not None for row in rows] == [True, True, False, True]
    assert len(list(notes.iterdir())) == 2  # each file was converted once
    monkeypatch.setenv("PATH", str(tmp_path))
    source = Source(folder, Columns(), Settings(), state)
    assert source.num_left_out == {
        ".docx (LibreOffice is not installed)": 1,
        ".odt (LibreOffice is not installed)": 1,
    }
    (folder / "report-01.pdf").unlink()
    with pytest.raises(ValueError, match=r"2 office files need LibreOffice, which is not installed"):
        Source(folder, Columns(), Settings(), state)
