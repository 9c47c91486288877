# SPDX-License-Identifier: MIT
"""Plants bugs in a copy of the CUDA kernels, one at a time, and requires that the executor's checks report each.

    python tests/simt/mutants.py                 all of them, as a Markdown table
    python tests/simt/mutants.py --only stem     those whose name contains a word
    python tests/simt/mutants.py --sample 8      some, drawn with --seed
    python tests/simt/mutants.py --list          names and what is planted

Every barrier, fence and wait of every kernel is dropped or weakened without being listed; mutant_table.py lists the
other bugs, and those that change nothing, with the reason. Exit status: 0 all is as the tables say, 1 a mutant
survives, or one that is listed as equivalent is reported.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simt import counts, harness, mutant_table

ROOT = harness.SIMT.parent.parent
BASE = ROOT / "build" / "simt"


@dataclass(frozen=True)
class Mutant:
    file: str  # in csrc/cuda
    line: int
    begin: int  # what is replaced, in characters from the beginning of the file
    end: int
    text: str
    plants: str
    equivalent: str = ""  # the reason why nothing can report it

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.plants}"


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    caught: str  # by what; "" where nothing did
    detail: str
    seconds: float

    @property
    def as_expected(self) -> bool:
        return bool(self.caught) != bool(self.mutant.equivalent)


#: What is planted wherever the pattern is found: the pattern, its replacement, what that is.
EVERYWHERE = (
    (r"__syncthreads\(\);", ";", "no barrier"),
    (r"__syncwarp\(\w*\);", ";", "no __syncwarp"),
    (r"__threadfence\(\);", ";", "no fence"),
    (r"wait_copies<(\d)>\(\);", lambda found: f"wait_copies<{int(found[1]) + 1}>();", "a weaker wait"),
    (r"wait_for_previous_kernel\(\);", ";", "no wait for the previous kernel"),
)


def code_of(text: str) -> str:
    """The text with its comments blanked, so that positions stay."""
    return re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), text)


def all_mutants() -> list[Mutant]:
    """Those of EVERYWHERE and of the table, in the order of the files.

    Raises:
        LookupError: an entry of the table no longer fits its kernel.
    """
    return sorted([*_everywhere(), *_listed()], key=lambda mutant: (mutant.file, mutant.line, mutant.plants))


def _everywhere() -> Iterator[Mutant]:
    for path in sorted((harness.CSRC / "cuda").glob("*.cu*")):
        if path.name.startswith("device"):
            continue  # its place is taken by the stand-in; the probes are its tests
        text = path.read_text()
        lines = text.splitlines()
        for pattern, replacement, plants in EVERYWHERE:
            for found in re.finditer(pattern, code_of(text)):
                line = text.count("\n", 0, found.start()) + 1
                near = " ".join(lines[line - 1 : line + 1])  # the comment says which one it is
                reasons = [
                    reason
                    for file, what, words, reason in mutant_table.EQUIVALENT_EVERYWHERE
                    if file == path.name and what == plants and words in near
                ]
                yield Mutant(
                    path.name,
                    line,
                    *found.span(),
                    found.expand(replacement) if isinstance(replacement, str) else replacement(found),
                    plants,
                    reasons[0] if reasons else "",
                )


def _listed() -> Iterator[Mutant]:
    for entry in mutant_table.LISTED:
        path = harness.CSRC / "cuda" / entry.file
        text = path.read_text() if path.exists() else ""
        places = [at.start() for at in re.finditer(re.escape(entry.code), text)]
        if len(places) != 1:
            raise LookupError(
                f"mutant_table.py, {entry.file}, {entry.plants!r}: {entry.code!r} is there {len(places)} times, "
                "not once: the kernel has changed, change the entry too"
            )
        line = text.count("\n", 0, places[0]) + 1
        end = places[0] + len(entry.code)
        yield Mutant(entry.file, line, places[0], end, entry.instead, entry.plants, entry.equivalent)


# ---------------------------------------------------------------------------------------------------------------- run


class Bench:
    """The base builds, whose objects mutants share."""

    def __init__(self, modes: Sequence[str]) -> None:
        self.modes = modes
        self._includes: dict[str, dict[str, str]] = {}

    def prepare(self, mode: str) -> None:
        harness.build(BASE / mode, mode, ("driver",))
        import ninja

        listed = subprocess.run(
            [Path(ninja.BIN_DIR) / "ninja", "-C", BASE / mode, "-t", "deps"], capture_output=True, text=True, check=True
        )
        self._includes[mode] = {}
        for block in re.split(r"\n\n", listed.stdout):
            target, _, rest = block.partition(":")
            self._includes[mode][target.strip()] = rest

    def units(self, mode: str, file: str) -> list[Path]:
        """The sources that have to be compiled again for a change of this file."""
        if file in mutant_table.UNITS:
            return [harness.CSRC / "cuda" / name for name in mutant_table.UNITS[file]]
        kernels = sorted((harness.CSRC / "cuda").glob("*.cu"))
        return [
            source
            for source in kernels
            if f"/cuda/{file}\n" in self._includes[mode][harness.object_name(source)] + "\n"
        ]

    def compile(self, mode: str, mutant: Mutant, folder: Path) -> Path:
        csrc = folder / "csrc"
        if not csrc.exists():
            shutil.copytree(harness.CSRC, csrc)
            target = csrc / "cuda" / mutant.file
            text = target.read_text()
            if text.count("\n", 0, mutant.begin) + 1 != mutant.line:
                raise RuntimeError(f"{mutant.name}: the kernels were edited meanwhile")
            target.write_text(text[: mutant.begin] + mutant.text + text[mutant.end :])
        objects = {path.name: path for path in (BASE / mode).glob("*.executor.o")}
        for source in harness.programs_of()["driver"]:
            objects[harness.object_name(source)] = BASE / mode / harness.object_name(source)
        for source in self.units(mode, mutant.file):
            changed = csrc / "cuda" / source.name
            built = folder / f"{mode}.{harness.object_name(changed)}"
            command = f"{harness.compile_command(mode, 'kernel', csrc)} {changed} -o {built}"
            subprocess.run(
                shlex.split(command), check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            objects[harness.object_name(source)] = built
        program = folder / f"driver-{mode}"
        link = shlex.split(harness.link_command(mode))
        subprocess.run([*link, *map(str, objects.values()), "-o", program], check=True)
        return program

    def judge(self, mutant: Mutant) -> Outcome:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-") as name:
            caught, detail = self._judge(mutant, Path(name))
        return Outcome(mutant, caught, detail, time.monotonic() - start)

    def _judge(self, mutant: Mutant, folder: Path) -> tuple[str, str]:
        for mode in self.modes:
            try:
                program = self.compile(mode, mutant, folder)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"{mutant.name}: does not compile\n{error.output}") from error
            for order in CHECKS[mode]:
                for options, cases in mutant_table.runs(mutant.file):
                    try:
                        result = harness.run(mode, program, *shlex.split(order), *options, *cases, timeout=300)
                    except subprocess.TimeoutExpired:
                        return "timeout", f"{mode}, {order}"
                    if found := verdict(mode, program, result):
                        return found, f"{order} {' '.join(options)}".strip()
        return "", ""


#: In this order: the cheap ones first. The first that reports ends the trial.
CHECKS = {
    "plain": (
        "--schedule forward --reach yes",
        "--schedule backward --blocks-at-once 3",
        "--schedule random:5 --blocks-at-once 4",
    ),
    "tsan": ("--schedule random:6 --blocks-at-once 2 --capability 90",),
    "asan": ("--schedule forward", "--schedule forward --guard before"),
    "count": ("--schedule forward",),
}


def verdict(mode: str, program: Path, result: subprocess.CompletedProcess[str]) -> str:
    """Which checker reported, by the exit status of a driver and what it counted; "" if none did."""
    if result.returncode == 0:
        found = counts.conflicts(counts.parse(program, result.stdout)) if mode == "count" else []
        return f"counters: bank conflicts, {found[0].place}" if found else ""
    if result.returncode == 4:
        return "executor: " + result.stderr.split("simt: ", 1)[-1].splitlines()[0][:80]
    names = {1: "wrong result", 3: "guard page", 65: "AddressSanitizer, UBSan", 66: "ThreadSanitizer"}
    return names.get(result.returncode, f"exit status {result.returncode}")


def check_clean(files: Sequence[str], modes: Sequence[str]) -> None:
    """The kernels as they are pass what the mutants have to fail."""
    done = set()
    for file in files:
        for mode in modes:
            program = BASE / mode / "driver"
            for order in CHECKS[mode]:
                for options, cases in mutant_table.runs(file):
                    arguments = (*shlex.split(order), *options, *cases)
                    if (mode, arguments) in done:
                        continue
                    done.add((mode, arguments))
                    result = harness.run(mode, program, *arguments)
                    if found := verdict(mode, program, result):
                        command = f"{program} {' '.join(arguments)}"
                        raise RuntimeError(
                            f"{file} without a mutant: {found}\n{command}\n{result.stdout}{result.stderr}"
                        )


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown."""
    lines = ["| kernel | planted | caught by |", "|---|---|---|"]
    for outcome in outcomes:
        mutant = outcome.mutant
        by = outcome.caught or (f"equivalent: {mutant.equivalent}" if mutant.equivalent else "**survives**")
        if outcome.caught and mutant.equivalent:
            by += f" **though listed as equivalent: {mutant.equivalent}**"
        lines.append(f"| {mutant.file}:{mutant.line} | {mutant.plants} | {by.replace('|', '/')} |")
    real = [outcome for outcome in outcomes if not outcome.mutant.equivalent]
    caught = sum(bool(outcome.caught) for outcome in real)
    lines += ["", f"{len(outcomes)} planted, {len(outcomes) - len(real)} equivalent, {caught} of {len(real)} caught."]
    by_checker: dict[str, int] = {}
    for outcome in real:
        checker = outcome.caught.split(":")[0] or "nothing"
        by_checker[checker] = by_checker.get(checker, 0) + 1
    lines.append(
        "By the first that reported: " + ", ".join(f"{n} {name}" for name, n in sorted(by_checker.items())) + "."
    )
    return "\n".join(lines)


def trial(mutants: Sequence[Mutant], modes: Sequence[str] = tuple(CHECKS), jobs: int = 2) -> list[Outcome]:
    """Judges the mutants by the checks of these builds, after the clean kernels have passed them."""
    bench = Bench(modes)
    for mode in modes:
        bench.prepare(mode)
    check_clean(sorted({mutant.file for mutant in mutants}), modes)
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(bench.judge, mutants):
            outcomes.append(outcome)
            state = outcome.caught or ("equivalent" if outcome.mutant.equivalent else "SURVIVES")
            print(f"{outcome.seconds:6.1f} s  {outcome.mutant.name}: {state}", file=sys.stderr, flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", help="mutants whose name contains this")
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=CHECKS, default=list(CHECKS), help="default: all four")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in all_mutants() if not arguments.only or arguments.only in mutant.name]
    if arguments.sample is not None:
        mutants = sorted(
            random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants))), key=lambda m: m.name
        )
    if arguments.list:
        for mutant in mutants:
            print(mutant.name + (f" (equivalent: {mutant.equivalent})" if mutant.equivalent else ""))
        return 0
    outcomes = trial(mutants, arguments.modes, arguments.jobs)
    print(table(outcomes))
    return not all(outcome.as_expected for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
