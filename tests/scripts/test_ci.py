"""The ready-made CI: linted by the tools that its users have, and consistent with the command line. Never run here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
ACTION = ROOT / ".github" / "actions" / "quantize" / "action.yml"
WORKFLOW = ROOT / ".github" / "workflows" / "quantize.yml"
GITLAB = ROOT / "scripts" / "ci" / "gitlab.yml"
DOCKERFILES = sorted((ROOT / "scripts" / "ci").glob("Dockerfile*"))
YAMLLINT = "{extends: default, rules: {line-length: {max: 120}, document-start: disable, truthy: {check-keys: false}}}"


def tool(name: str) -> str:
    """The path of a linter in this environment; the test is skipped if it is not installed."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if found is None:
        pytest.skip(f"{name} is not installed (actionlint comes from GitHub, the others with the extra dev)")
    return found


def passes(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def scripts() -> dict[str, str]:
    """Every shell script in the files, by where it is."""
    found = {f"action: {step.get('name')}": step["run"] for step in load(ACTION)["runs"]["steps"] if "run" in step}
    job = load(GITLAB)[".aphroquant"]
    return found | {"gitlab": "\n".join([*job["before_script"], *job["script"]])}


@pytest.mark.parametrize("path", [ACTION, WORKFLOW, GITLAB], ids=lambda path: path.name)
def test_the_yaml_is_tidy(path: Path) -> None:
    passes(tool("yamllint"), "--strict", "--config-data", YAMLLINT, path)


@pytest.mark.parametrize(
    ("path", "schema"),
    [(ACTION, "vendor.github-actions"), (WORKFLOW, "vendor.github-workflows"), (GITLAB, "vendor.gitlab-ci")],
)
def test_each_file_keeps_the_schema_of_its_service(path: Path, schema: str) -> None:
    passes(tool("check-jsonschema"), "--builtin-schema", schema, path)


def test_actionlint_finds_nothing() -> None:
    passes(tool("actionlint"), "-no-color", WORKFLOW)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    passes(tool("hadolint"), path)


def test_there_is_an_image_for_processors_and_one_for_gpus() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cuda"]


@pytest.mark.parametrize("place", list(scripts()))
def test_scripts_are_bash_and_take_inputs_from_the_environment_only(place: str) -> None:
    script = scripts()[place]
    assert "${{" not in script  # an input in the text of a script is a script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_workflow_hands_its_inputs_to_the_action() -> None:
    inputs = load(ACTION)["inputs"]
    step = load(WORKFLOW)["jobs"]["quantize"]["steps"][-1]
    assert step["uses"].startswith("aphroquant/aphroquant/.github/actions/quantize@v")
    assert set(step["with"]) <= set(inputs)
    assert {name for name, entry in inputs.items() if entry.get("required")} <= set(step["with"])


def test_every_version_is_the_project_s_own() -> None:
    import aphroquant

    for path in (WORKFLOW, GITLAB):
        assert set(re.findall(r"\bv(\d+\.\d+\.\d+)\b", path.read_text())) == {aphroquant.__version__}


@pytest.mark.parametrize("place", [place for place in scripts() if "pipeline run" in scripts()[place]])
def test_commands_and_options_are_those_of_the_command_line(place: str) -> None:
    from aphroquant.cli import cli

    context = cli.make_context("aphroquant", ["doctor"], resilient_parsing=True)
    pipeline = cli.get_command(context, "pipeline")
    if pipeline is None:
        pytest.skip("this release has no command pipeline yet")
    known = {name for option in pipeline.get_command(context, "run").params for name in option.opts}  # type: ignore
    used = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"pip\S* install.*", "", scripts()[place])))
    assert used
    assert used <= known
