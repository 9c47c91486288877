# SPDX-License-Identifier: MIT
"""``repvgg-cuda gpu-check``: the truth about the CUDA kernels on the GPU of this machine, in minutes and in one file.

Builds for that GPU, runs the tests that need one, checks the kernels under compute-sanitizer, measures the machine's
ceilings, then layers and networks against PyTorch's ways, and puts the performance model's predictions beside it.

This process only starts others, one per stage, and never touches the GPU itself: a kernel that takes its process down,
or does not end, costs its own stage. What a stage has found is on disk after every step, and in the report after the
stage. ``--dry-run`` goes the same way on the CPU (:class:`repvgg_cuda.devices.DryRunDevice`), to find what is broken in
this file and below before there is a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from repvgg_cuda import gpu_report, gpu_stages
from repvgg_cuda.branches import require
from repvgg_cuda.files import write_text_atomically

#: Bumped when a reader of the JSON would have to change. docs/gpu-check.md describes it.
SCHEMA = 1

ROOT = Path(__file__).resolve().parent.parent
REPORT, PAGE, PICTURES = "gpu-check.json", "gpu-check.md", "gpu-check.html"

#: Lines of a stage's output that the report keeps, where it failed.
LOG_LINES = 60

#: Between asking a stage to end and ending it.
GRACE_S = 10.0


class StageError(Exception):
    """A stage failed, for this reason."""


class StageSkipped(Exception):
    """A stage does not apply here, for this reason."""


@dataclass
class Check:
    """One run of the command: where to, how, and what has been found so far."""

    out: Path
    dry_run: bool
    results: dict[str, Any] = field(default_factory=dict)
    log: str = ""  # of the stage that runs

    def command(self, arguments: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> int | None:
        """Runs it in the checkout for at most so long; keeps its output. Returns its exit status; None: out of time.

        It is asked to end first (SIGINT, at which pytest writes what it has), then its whole group is killed.
        """
        environment = {**os.environ, "PYTHONPATH": _python_path(), **(env or {})}
        if self.dry_run:
            environment["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads would only wait for each other
        log = self.out / "stage.log"
        with log.open("w") as output:
            with _interruptible():
                process = subprocess.Popen(
                    arguments,
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            try:
                status: int | None = process.wait(timeout=max(seconds, 1.0))
            except subprocess.TimeoutExpired:
                status = None
                _signal_group(process, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE_S)
            finally:
                _signal_group(process, signal.SIGKILL)
                process.wait()
        self.log = log.read_text(errors="replace")
        log.unlink()
        return status

    def part(self, name: str, seconds: float, prefix: Sequence[str] = ()) -> dict[str, Any]:
        """Runs a part of :mod:`repvgg_cuda.gpu_stages` in a process of its own; its findings, also if it died.

        Raises:
            StageError: it died, ran out of time or found nothing.
        """
        path = self.out / f"{name}.part.json"
        path.unlink(missing_ok=True)
        options = ["--part", name, "--seconds", f"{seconds:.0f}", "--out", str(self.out)]
        options += ["--dry-run"] if self.dry_run else []
        status = self.command([*prefix, sys.executable, "-m", "repvgg_cuda", "gpu-check", *options], seconds + GRACE_S)
        found: dict[str, Any] = {}
        if path.exists():
            found = json.loads(path.read_text())
            path.unlink()
        self.results.setdefault("parts", {})[name] = found
        if status is None:
            raise StageError(f"it did not end within {seconds + GRACE_S:.0f} s; what it had found is in the report")
        if status != 0:
            raise StageError(f"exit status {status}: {last_line(self.log)}")
        if not found:
            raise StageError("it left no result")
        return found


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What is started here may be interrupted, also where a shell runs this in the background, with SIGINT ignored."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


# -------------------------------------------------------------------------------------------------------------- stages


def build(check: Check, seconds: float) -> dict[str, Any]:
    """For this GPU alone, in place; then a fresh process must find code for it in the module."""
    capability = "8.0" if check.dry_run else gpu_capability(check)
    env = {"TORCH_CUDA_ARCH_LIST": capability, "REPVGG_CUDA_BUILD": "auto" if check.dry_run else "cuda"}
    what = ["--version"] if check.dry_run else ["--quiet", "build_ext", "--inplace"]
    begin = time.monotonic()
    status = check.command([sys.executable, "setup.py", *what], seconds, env)
    if status != 0:
        raise StageError("out of time" if status is None else f"setup.py failed: {last_line(check.log)}")
    ask = "import json, repvgg_cuda; print(json.dumps(repvgg_cuda.build_info()))"
    check.command([sys.executable, "-W", "ignore", "-c", ask], 60)
    info = json.loads(last_line(check.log)) if check.log.strip().endswith("}") else {}
    archs = [arch.removesuffix("+PTX") for arch in info.get("cuda_archs", [])]
    if not check.dry_run and capability not in archs:
        raise StageError(f"the module at hand has no code for compute capability {capability}: {info or check.log}")
    return {"capability": capability, "seconds": round(time.monotonic() - begin, 1), "module": info}


def gpu_capability(check: Check) -> str:
    ask = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    status = check.command([sys.executable, "-c", ask], 60)
    if status != 0:
        raise StageError(f"torch finds no CUDA GPU: {last_line(check.log)}; --dry-run rehearses without one")
    return last_line(check.log)


def machine(check: Check, seconds: float) -> dict[str, Any]:
    """The environment, and what the GPU can do at most."""
    return check.part("machine", seconds)


def tests(check: Check, seconds: float) -> dict[str, Any]:
    """``pytest -m cuda``; in a rehearsal tests/test_cuda.py alone, on stand-ins."""
    results = check.out / "tests.xml"
    chosen = ["tests/test_cuda.py"] if check.dry_run else ["tests"]
    options = ["-m", "cuda", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--maxfail=100"]
    options += ["--tb=short", f"--junitxml={results}"]
    env = {gpu_stages.DRY_RUN_VARIABLE: "1"} if check.dry_run else {}
    status = check.command([sys.executable, "-m", "pytest", *chosen, *options], seconds, env)
    try:
        found = gpu_stages.read_junit(results)
    except (OSError, SyntaxError) as error:
        raise StageError(f"pytest left no results ({error}): {last_line(check.log)}") from None
    finally:
        results.unlink(missing_ok=True)
    check.results["tests"] = found
    if status is None:
        raise StageError(f"out of time after {found['passed']} passed and {found['failed']} failed tests")
    if status != 0 or found["failed"] or not found["passed"]:
        raise StageError(f"{found['failed']} tests failed, {found['passed']} passed: {last_line(check.log)}")
    return found


def sanitizer(check: Check, seconds: float) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck on a run of every row."""
    tool = find_tool("compute-sanitizer")
    if tool is None and not check.dry_run:
        raise StageSkipped("there is no compute-sanitizer on the path or in CUDA_HOME/bin")
    found: dict[str, Any] = {}
    for name in ("memcheck", "racecheck"):
        prefix = [] if check.dry_run else [str(tool), "--tool", name, "--error-exitcode", "86"]
        try:
            smoke = check.part("smoke", seconds / 2 - GRACE_S, prefix)
            found[name] = {"problems": 0, "runs": len(smoke["runs"]), "summary": sanitizer_summary(check.log)}
        except StageError as error:
            found[name] = {"problems": None, "error": str(error), "log": tail(check.log)}
        check.results["sanitizer"] = found
    failed = {name: result["error"] for name, result in found.items() if "error" in result}
    if failed:
        raise StageError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    return found


def sanitizer_summary(log: str) -> str:
    return next((line.lstrip("= ") for line in reversed(log.splitlines()) if "SUMMARY" in line), "")


def probes(check: Check, seconds: float) -> dict[str, Any]:
    """The wrappers of tensor-core and copy instructions: their bits here against the host stand-in's."""
    end = time.monotonic() + seconds
    source, nvcc = ROOT / "tests" / "simt" / "probes.cu", find_tool("nvcc")
    with tempfile.TemporaryDirectory() as folder:
        here, stand_in = [f"{folder}/here"], [f"{folder}/probes"]
        if check.dry_run:
            here = stand_in = [sys.executable, "-c", f"print({gpu_stages.DRY_PROBES!r})"]
        elif not source.is_file() or nvcc is None:
            raise StageSkipped(
                "there is no nvcc" if nvcc is None else f"this checkout has no {source.relative_to(ROOT)}"
            )
        else:
            capability = gpu_capability(check).replace(".", "")
            stand_in.append(capability)
            compile_here = [nvcc, "-std=c++20", f"-arch=sm_{capability}", "-I", "csrc", "-o", here[0], str(source)]
            for command in (compile_here, [sys.executable, str(source.with_name("build.py")), folder, "probes"]):
                if (status := check.command(command, end - time.monotonic())) != 0:
                    raise StageError("out of time" if status is None else f"{command[0]}: {last_line(check.log)}")
        results = []
        for command in (here, stand_in):
            if check.command(command, end - time.monotonic()) != 0:
                raise StageError(f"{command[0]}: {last_line(check.log)}")
            results.append(json.loads(check.log))
    differing = gpu_stages.compare_probes(*results)
    found = check.results["probes"] = {"probes": len(results[0]["probes"]), "differing": differing}
    if differing:
        raise StageError("; ".join(differing)[:1000])
    return found


def layers(check: Check, seconds: float) -> dict[str, Any]:
    """RepVGG's layers against every way of PyTorch, and the model's prediction beside them."""
    return check.part("layers", seconds)


def networks(check: Check, seconds: float) -> dict[str, Any]:
    """Whole networks, with torch.compile among the ways."""
    return check.part("networks", seconds)


def pictures(check: Check, seconds: float) -> dict[str, Any]:
    """A page with pictures of the float16 rows, for a browser."""
    from repvgg_cuda import charts, page  # matplotlib is no dependency of the rest

    try:
        charts.require_matplotlib()
    except RuntimeError as error:
        raise StageSkipped(str(error)) from None
    run = gpu_report.as_run({"results": check.results, "dry_run": check.dry_run})
    if run is None:
        raise StageSkipped("nothing was measured")
    write_text_atomically(check.out / PICTURES, page.whole(run))
    return {"file": PICTURES}


class Stage(NamedTuple):
    """``seconds``: its share of the time. What earlier stages leave is added."""

    run: Callable[[Check, float], dict[str, Any]]
    seconds: float

    @property
    def name(self) -> str:
        return self.run.__name__


#: In order; the seconds add up to 480.
STAGES = (
    Stage(build, 110.0),
    Stage(machine, 30.0),
    Stage(tests, 90.0),
    Stage(probes, 30.0),
    Stage(layers, 80.0),
    Stage(networks, 80.0),
    Stage(sanitizer, 50.0),
    Stage(pictures, 10.0),
)


def find_tool(name: str) -> str | None:
    homes = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"])
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=f"{home}/bin") for home in homes)), None)


def tail(log: str) -> list[str]:
    return log.splitlines()[-LOG_LINES:]


# --------------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``repvgg-cuda gpu-check``."""
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("gpu-check"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="rehearse it without a GPU: no time means anything")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--skip", nargs="+", choices=names, metavar="STAGE", default=[], help="leave these out")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="times as long for every stage (default: 1)"
    )
    parser.add_argument("--part", choices=list(gpu_stages.PARTS), help=argparse.SUPPRESS)  # how it calls itself
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Runs the stages; the exit code is 1 if one failed. A part, if ``args`` asks for one."""
    args.out = args.out.absolute()
    if args.part is not None:
        return gpu_stages.run_part(args.part, args.out, args.seconds, dry_run=args.dry_run)
    require(args.scale > 0, f"gpu-check: --scale must be positive, got {args.scale}")
    require(
        (ROOT / "setup.py").is_file() and (ROOT / "tests").is_dir(),
        "gpu-check: it builds and tests a checkout of repvgg_cuda, and this is an installed copy; run it in a checkout",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in STAGES if (args.only is None or s.name in args.only) and s.name not in args.skip]
    check = Check(args.out, args.dry_run)
    report = run_stages(check, [stage._replace(seconds=stage.seconds * args.scale) for stage in chosen])
    print(f"wrote {args.out / REPORT} (please send it to us), {PAGE} and, with pictures, {PICTURES}")
    return int(report["exit_code"])


def run_stages(check: Check, stages: Sequence[Stage]) -> dict[str, Any]:
    """Each in turn, whatever became of the one before; the report is written after each."""
    begin = time.monotonic()
    end = begin + sum(stage.seconds for stage in stages)
    report: dict[str, Any] = {
        "kind": "gpu-check",
        "schema": SCHEMA,
        "dry_run": check.dry_run,
        "started": now(),
        "finished": None,
        "exit_code": None,
        "stages": [{"name": stage.name, "status": "not run", "seconds": 0.0, "note": ""} for stage in stages],
        "results": check.results,
    }
    write(report, check.out)
    for i, stage in enumerate(stages):
        print(f"{stage.name}: {(stage.run.__doc__ or '').splitlines()[0]}", flush=True)
        left = end - time.monotonic() - sum(later.seconds for later in stages[i + 1 :])
        with outcome(check, report["stages"][i]):
            check.log = ""
            result = stage.run(check, left)
            if stage.name not in ("machine", "layers", "networks"):  # those keep theirs under "parts"
                check.results[stage.name] = result
        shown = report["stages"][i]
        print(f"  {shown['status']} after {shown['seconds']} s{': ' * bool(shown['note'])}{shown['note']}", flush=True)
        write(report, check.out)
    report["exit_code"] = int(any(stage["status"] == "failed" for stage in report["stages"]))
    report["finished"] = now()
    write(report, check.out)
    return report


@contextlib.contextmanager
def outcome(check: Check, entry: dict[str, Any]) -> Iterator[None]:
    """The border of a stage: whatever it raises becomes its entry, with the end of its log."""
    begin = time.monotonic()
    try:
        yield
        entry["status"] = "ok"
    except StageSkipped as reason:
        entry |= {"status": "skipped", "note": str(reason)}
    except Exception as error:
        what = str(error) if isinstance(error, StageError) else f"{type(error).__name__}: {error}"
        entry |= {"status": "failed", "note": what, "log": tail(check.log)}
    entry["seconds"] = round(time.monotonic() - begin, 1)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write(report: Mapping[str, Any], out: Path) -> None:
    write_text_atomically(out / REPORT, json.dumps(report, indent=1) + "\n")
    write_text_atomically(out / PAGE, gpu_report.render(report))
