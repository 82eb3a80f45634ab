"""aphroquant doctor: what is usable here, why not, and whether each kernel computes the right numbers."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, Any

import click

from aphroquant.cli.json_report import STANDARD_OUTPUT, check_json_target, write_json
from aphroquant.errors import UsageError

if TYPE_CHECKING:
    from aphroquant.diagnosis import Finding
    from aphroquant.kernels.self_test import Outcome

_WIDTH = 110
_EXIT_FAILED = 1


@click.command()
@click.option("--build", is_flag=True, help="Compile the CUDA kernels ahead, in parallel, into the kernel cache.")
@click.option("--jobs", type=click.IntRange(1), help="Compilers that --build runs at a time (default: all processors).")
@click.option("--tests/--no-tests", default=True, show_default=True, help="Test each kernel against a reference.")
@click.option("--verbose", "-v", is_flag=True, help="Show the tests that passed, too.")
@click.option("--json", "json_file", metavar="FILE", help="Write the report here as JSON; - for standard output.")
def command(build: bool, jobs: int | None, tests: bool, verbose: bool, json_file: str | None) -> int:
    """Show what is usable on this machine, and test each kernel in seconds.

    Ends with 1 if a kernel gives wrong numbers, crashes or does not compile. A machine without a GPU is no failure.
    """
    check_json_target(json_file)
    if jobs is not None and not build:
        raise UsageError("--jobs is for --build")
    from aphroquant.diagnosis import findings
    from aphroquant.kernels.cuda.device import obstacle

    talk = json_file != STANDARD_OUTPUT
    found = list(findings())
    for finding in found if talk else []:
        _show_finding(finding)
    report: dict[str, Any] = {"findings": [{"subject": finding.subject, **finding.to_dict()} for finding in found]}
    failures = 0
    if build:
        if reason := obstacle():
            raise UsageError(f"--build has no GPU to compile for: {reason}")
        report["build"], errors = _build(jobs, talk)
        failures += len(errors)
    if tests:
        outcomes = _run_tests(obstacle() is None, talk, verbose)
        report["self_tests"] = [outcome.to_dict() for outcome in outcomes]
        failures += sum(outcome.problem is not None for outcome in outcomes)
    if json_file is not None:
        write_json(json_file, report | {"failures": failures})
    return _EXIT_FAILED if failures else 0


def _show_finding(finding: Finding) -> None:
    mark = {True: "ok", False: "no", None: ""}[finding.usable]
    _show_line(finding.subject, mark, finding.text)
    if finding.hint:
        _show_line("", "", f"hint: {finding.hint}")


def _show_line(subject: str, mark: str, text: str) -> None:
    indent = " " * 19
    wrapped = textwrap.wrap(text, _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    click.echo(f"{subject:15}{mark:4}" + f"\n{indent}".join(wrapped))


def _build(jobs: int | None, talk: bool) -> tuple[dict[str, Any], list[str]]:
    """Compile the listed kernels for every GPU found. (what was done, error messages)"""
    import os

    import torch

    from aphroquant.kernels.cuda.compiler import KernelCompileError, compile_all
    from aphroquant.kernels.cuda.device import gpu
    from aphroquant.kernels.cuda.variants import prebuilt_variants

    found = {gpu(index).architecture for index in range(torch.cuda.device_count()) if gpu(index).obstacle is None}
    work = [(v.source, v.macros, name) for name in sorted(found) for v in prebuilt_variants(name)]
    start = time.perf_counter()
    results = compile_all(work, jobs or len(os.sched_getaffinity(0)))
    errors = [str(result) for result in results if isinstance(result, KernelCompileError)]
    seconds = time.perf_counter() - start
    if talk:
        _show_line(
            "build", "no" if errors else "ok", f"{len(work)} kernels for {', '.join(sorted(found))} in {seconds:.1f} s"
        )
        for error in errors:
            click.echo(error)
    return {"kernels": len(work), "seconds": seconds, "errors": errors}, errors


def _run_tests(with_gpu: bool, talk: bool, verbose: bool) -> list[Outcome]:
    from aphroquant.kernels.cpu.library import obstacle
    from aphroquant.kernels.self_test import run_self_tests

    devices = ([] if obstacle() else ["cpu"]) + (["cuda"] if with_gpu else [])
    outcomes: list[Outcome] = []
    for device in devices:
        start, here = time.perf_counter(), []
        for outcome in run_self_tests(device):
            here.append(outcome)
            if talk and (verbose or outcome.problem):
                _show_outcome(outcome)
        failed = sum(outcome.problem is not None for outcome in here)
        if talk:
            passed = f"{len(here) - failed} of {len(here)} passed in {time.perf_counter() - start:.1f} s"
            _show_line(f"tests, {device}", "no" if failed else "ok", passed)
        outcomes += here
    return outcomes


def _show_outcome(outcome: Outcome) -> None:
    if outcome.problem:
        _show_line("", "no", f"{outcome.name}: {outcome.problem}")
        return
    _show_line("", "ok", f"{outcome.name}: relative error {outcome.error:.1e}, {outcome.seconds * 1e3:.0f} ms")
