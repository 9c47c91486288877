# SPDX-License-Identifier: MIT
"""A benchmark's record: JSON lines, first what the figures depend on, then one line per row, samples included."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repvgg_cuda.branches import require
from repvgg_cuda.ceilings import Ceilings
from repvgg_cuda.comparison import Row
from repvgg_cuda.files import write_text_atomically

#: Bumped when a reader would have to change.
SCHEMA = 2


@dataclass
class Run:
    """One run: how it was asked for, where it ran, what that machine can do at most, what was found.

    ``warnings`` are reasons to distrust the times. ``rows`` grows while the run goes on.
    """

    options: dict[str, Any]
    environment: dict[str, Any]
    ceilings: Ceilings | None = None
    warnings: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether any row is wrong or raised. A refusal is an answer, not a failure."""
        return any(row.status in ("wrong", "error") for row in self.rows)

    def to_lines(self) -> str:
        head = {
            "kind": "run",
            "schema": SCHEMA,
            "options": self.options,
            "environment": self.environment,
            "ceilings": None if self.ceilings is None else self.ceilings.to_dict(),
            "warnings": self.warnings,
        }
        lines = [head, *({"kind": "row", **dataclasses.asdict(row)} for row in self.rows)]
        return "".join(json.dumps(line) + "\n" for line in lines)

    def to_csv(self) -> str:
        """The rows without their samples, after the environment in lines that begin with "#"."""
        text = io.StringIO()
        for key, value in [*self.environment.items(), *self.options.items()]:
            text.write(f"# {key}: {json.dumps(value)}\n")
        names = [each.name for each in dataclasses.fields(Row) if each.name != "samples_ns"]
        writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in self.rows)
        return text.getvalue()

    def write(self, path: Path) -> None:
        """All of it, anew; or CSV where the name says so."""
        write_text_atomically(path, self.to_csv() if path.suffix == ".csv" else self.to_lines())

    def by_case(self) -> dict[tuple[str, str, str, int], list[Row]]:
        """Rows by (suite, case, caches, threads), in the order in which they were measured."""
        cases: dict[tuple[str, str, str, int], list[Row]] = {}
        for row in self.rows:
            cases.setdefault((row.suite, row.case, row.caches, row.threads), []).append(row)
        return cases


def read(path: Path) -> Run:
    """Raises RuntimeError, naming the line, unless the file is a record of a schema this version knows."""
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise RuntimeError(f"{path} is not text; give the file that `repvgg-cuda bench --json FILE` wrote") from None
    run: Run | None = None
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError:
            raise RuntimeError(
                f"{where} is not JSON; give the file that `repvgg-cuda bench --json FILE` wrote"
            ) from None
        require(isinstance(fields, dict), f"{where} must be a JSON object, got {type(fields).__name__}")
        if run is None:
            run = _head(fields, where)
        else:
            run.rows.append(_row(fields, where))
    require(run is not None, f"{path} is empty; give the file that `repvgg-cuda bench --json FILE` wrote")
    assert run is not None
    return run


def _head(fields: Mapping[str, Any], where: str) -> Run:
    schema = fields.get("schema")
    require(
        fields.get("kind") == "run" and schema == SCHEMA,
        f"{where} must begin a benchmark record of schema {SCHEMA}, got schema {schema}",
    )
    try:
        ceilings = fields["ceilings"]
        return Run(
            dict(fields["options"]),
            dict(fields["environment"]),
            None if ceilings is None else Ceilings.from_dict(ceilings),
            list(fields["warnings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"{where} lacks a field, or has another one than a record has: {error}") from None


def _row(fields: Mapping[str, Any], where: str) -> Row:
    values = {key: value for key, value in fields.items() if key != "kind"}
    try:
        return Row(**{**values, "samples_ns": tuple(values["samples_ns"])})
    except (KeyError, TypeError) as error:
        raise RuntimeError(f"{where} is not a row of a benchmark record: {error}") from None


def joined(runs: Sequence[Run]) -> Run:
    """Several runs as one to look at: the first one's environment, everyone's rows."""
    first = runs[0]
    rows = [row for run in runs for row in run.rows]
    warnings = list(dict.fromkeys(warning for run in runs for warning in run.warnings))
    return Run(first.options, first.environment, first.ceilings, warnings, rows)
