"""Which rows each part of an output has. It is kept with the output, so that a run over a changed input can continue.

A file counts as unchanged if its size and its modification time are the same. Rows of unchanged files stay where they
are. Rows of changed or removed files are taken out of their parts, and the rows of new and changed files form new
parts. So the rows of the output are those of the input, whatever a run did before it was killed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from embedder.bulk.formats import JSONL, Part, find_unchanged_parts
from embedder.bulk.pages import split_page
from embedder.bulk.source import Source, valid_unicode
from embedder.bulk.writer import Writer, replace_file

PLAN_FILE = "plan.json"
Stamp = list[int]  # size of a file, and its time of change in nanoseconds


@dataclass(frozen=True)
class Changes:
    """Names of files, compared with those of the last run."""

    new: list[str]
    changed: list[str]
    removed: list[str]

    def __str__(self) -> str:
        return f"{len(self.new)} files are new, {len(self.changed)} changed, {len(self.removed)} removed"


@dataclass(frozen=True)
class Plan:
    """`shrunk`: numbers of the parts from which rows must be removed. `next_number`: that of the next new part."""

    files: dict[str, Stamp] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    shrunk: list[int] = field(default_factory=list)
    next_number: int = 0

    def compare(self, source: Source) -> Changes:
        """What has changed in the input since this plan was made."""
        found = stamps(source)
        return Changes(
            [name for name in found if name not in self.files],
            [name for name, stamp in found.items() if self.files.get(name, stamp) != stamp],
            [name for name in self.files if name not in found],
        )

    def updated(self, source: Source, changes: Changes, rows_per_part: int | None) -> Plan:
        """The plan for the input as it is now."""
        gone = {*changes.changed, *changes.removed}
        kept = [shown for part in self.parts if (shown := _without(part, gone)) is not None]
        if source.format is JSONL:
            for name in changes.changed:
                kept += find_unchanged_parts(source.folder, name, [part for part in self.parts if part.path == name])
            kept.sort(key=lambda part: part.number)
        num_rows = {part.number: part.num_rows for part in self.parts}
        shrunk = {part.number for part in kept if part.num_rows < num_rows[part.number]}
        new = source.parts(rows_per_part, sorted([*changes.new, *changes.changed]), kept, self.next_number)
        still = {part.number for part in kept} & set(self.shrunk)
        return Plan(stamps(source), kept + new, sorted(shrunk | still), self.next_number + len(new))

    def write(self, state_folder: Path) -> None:
        """Keep the plan, in one step."""
        replace_file(state_folder / PLAN_FILE, json.dumps(asdict(self)))


def read_plan(state_folder: Path) -> Plan:
    """The plan of the last run; an empty one before the first."""
    try:
        fields = json.loads((state_folder / PLAN_FILE).read_text())
    except FileNotFoundError:
        return Plan()
    return Plan(parts=list(map(Part.from_fields, fields.pop("parts"))), **fields)


def take_out_rows(plan: Plan, writer: Writer) -> Plan:
    """Remove parts that are not in the plan, and rows that are not in their part anymore. Returns the plan to keep."""
    writer.remove_parts_except(part.number for part in plan.parts)
    parts = {part.number: part for part in plan.parts}
    for number in plan.shrunk:
        writer.keep_rows(number, {valid_unicode(name) for name in parts[number].names})
    return replace(plan, shrunk=[])


def stamps(source: Source) -> dict[str, Stamp]:
    """Size and time of change of each file of the input."""
    found = ((name, (source.folder / name).stat()) for name in source.names)
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found}


def _without(part: Part, gone: set[str]) -> Part | None:
    """The part without the rows of these files; None if it has no others."""
    if part.path:
        return None if part.path in gone else part
    names = tuple(name for name in part.names if split_page(name)[0] not in gone)
    return replace(part, names=names, num_rows=len(names)) if names else None


def num_rows(parts: Sequence[Part]) -> int:
    """Number of rows of the parts, as far as it is known; that of a tar is not."""
    return sum(part.num_rows for part in parts)
