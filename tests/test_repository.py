"""What stands around the code: workflows, templates, metadata. They name real files, targets and versions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import autotp_plan
from tests.helpers.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PYTHONS = re.findall(r"Python :: (3\.\d+)", PYPROJECT)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def steps(workflow: Any) -> list[Any]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_and_little_else(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    allowed = {
        ("docs", "deploy"): {"pages": "write", "id-token": "write"},
        ("release", "publish"): {"id-token": "write"},
    }
    for name, job in workflow["jobs"].items():
        assert job.get("permissions", {}) == allowed.get((path.stem, name), {}), name
        assert job["timeout-minutes"] <= 60, name
    for step in steps(workflow):
        if "checkout" in step.get("uses", ""):
            assert step["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_by_major_version(path: Path) -> None:
    for step in steps(read(path)):
        if "uses" in step:
            assert re.fullmatch(r"(actions/[a-z-]+@v\d+|pypa/gh-action-pypi-publish@release/v1)", step["uses"])


def test_workflows_run_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    called = {
        name.replace("${{ matrix.versions }}", version)
        for path in WORKFLOWS
        for name in re.findall(r"run: make ([a-z-]+(?:\$\{\{ matrix\.versions \}\})?)", path.read_text())
        for version in ("oldest", "newest")
    }
    assert {"check", "test", "docs", "test-wheel", "test-oldest", "test-newest"} <= called <= targets


def test_every_python_of_the_classifiers_is_tested() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    assert jobs["check"]["strategy"]["matrix"]["python"] == PYTHONS == ["3.10", "3.11", "3.12", "3.13"]
    assert jobs["wheel"]["strategy"]["matrix"]["python"] == [PYTHONS[0], PYTHONS[-1]]
    assert f'requires-python = ">={PYTHONS[0]}"' in PYPROJECT


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert {line.split()[0] for line in listed.splitlines()} == set(phony.split())


def test_what_targets_make_is_ignored_by_git_and_cleaned() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".venv/", ".venv-*/", "build/", "dist/", "/site/"} <= set(ignored)
    (clean,) = re.findall(r"^clean:.*\n((?:\t.*\n?)+)", MAKEFILE, re.MULTILINE)
    made = set(re.findall(r"-m venv (\.venv-\w+)", MAKEFILE))
    assert len(made) >= 4 and all(folder in clean.split() for folder in made)


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == autotp_plan.__version__
    assert citation["license"] == "Apache-2.0"
    assert f'Source = "{citation["repository-code"]}"' in PYPROJECT
    assert re.search(
        rf"^## ({re.escape(autotp_plan.__version__)}|Unreleased)\b", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path: Path) -> None:
    form = read(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    kinds = {"markdown", "textarea", "input", "checkboxes"}
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in form["body"]} <= kinds
    assert len({field["id"] for field in asked}) == len(asked) and all(field["attributes"]["label"] for field in asked)
    assert "autotp-plan" in path.read_text()


def test_what_issue_forms_ask_for() -> None:
    wanted = {"bug": "autotp-plan --version", "wrong_numbers": "autotp-plan verify", "model": "config.json"}
    assert {path.stem for path in FORMS} == set(wanted)
    for path in FORMS:
        required = [field for field in read(path)["body"] if field.get("validations", {}).get("required")]
        assert any(wanted[path.stem] in field["attributes"]["label"] for field in required)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md"])
def test_documents_name_files_that_exist(name: str) -> None:
    named = re.findall(r"`((?:\.?[\w-]+/)+[\w.-]*|[\w.-]+\.(?:md|toml|cff|txt))`", (ROOT / name).read_text())
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lower_bounds.py"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split("==") for line in done.stdout.split())
    assert {
        "torch",
        "deepspeed",
        "transformers",
        "accelerate",
        "safetensors",
        "click",
        "isal",
        "ray",
        "peft",
    } <= found.keys()
    assert not {"pytest", "ruff", "mypy", "autotp-plan"} & found.keys()
    for name, version in found.items():
        assert re.search(rf'"{name}(\[train\])?>={re.escape(version)}[",]', PYPROJECT), name
