"""Do the tested versions have known vulnerabilities, and do the installed packages fit together?

    python tools/audit.py              a service that cannot be asked is said, and is no failure
    python tools/audit.py --strict     … and is one

`pip check` looks at the installed packages, pip-audit asks the advisories of PyPI, then those of OSV, about
every version in constraints.txt. pip-audit calls an audit clean that could not ask about a single package, so
its report is counted here, package by package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "constraints.txt"
SERVICES = ("pypi", "osv")
SECONDS = 180
AS_WRITTEN = argparse.RawDescriptionHelpFormatter
COMMAND = ("-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off")


class Verdict(NamedTuple):
    """What one service says."""

    text: str
    known: int = 0
    """Versions that it could look up."""
    complete: bool = False
    vulnerable: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=AS_WRITTEN)
    parser.add_argument("--strict", action="store_true", help="fail unless every version was audited")
    strict = parser.parse_args(arguments).strict
    fits = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    print(fits.stdout.strip() or fits.stderr.strip())
    if find_spec("pip_audit") is None:
        print("NOT AUDITED: pip-audit is not installed. `make setup` does it.")
        return 1
    found = audited()
    print(found.text)
    return int(fits.returncode != 0 or found.vulnerable or (strict and not found.complete))


def audited() -> Verdict:
    """The verdict of the first service that knows any version; else what all of them say."""
    said = []
    for service in SERVICES:
        found = verdict(service, *asked(service))
        if found.known:
            return found
        said.append(found.text)
    return Verdict("\n".join(said))


def asked(service: str) -> tuple[Mapping[str, Any] | None, str]:
    """pip-audit's report, or None and why there is none."""
    command = [sys.executable, *COMMAND, "--requirement", str(PINNED), "--vulnerability-service", service]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {SECONDS} s"
    try:
        return json.loads(done.stdout), ""
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return None, last.partition(":")[0].rpartition(".")[2]  # its name: the text may hold an address


def verdict(service: str, report: Mapping[str, Any] | None, why: str = "") -> Verdict:
    """What a report says, counted package by package."""
    if report is None:
        return Verdict(f"NOT AUDITED: {service} could not be asked ({why})")
    packages = report["dependencies"]
    skipped = [one["name"] for one in packages if "skip_reason" in one]
    known = len(packages) - len(skipped)
    count = f"{known} of {len(packages)} pinned versions"
    bad = [
        f"  {one['name']} {one['version']}: {hole['id']}, fixed in {' or '.join(hole['fix_versions']) or '-'}"
        for one in packages
        for hole in one.get("vulns", ())
    ]
    if bad:
        return Verdict("\n".join([f"VULNERABLE ({service} knows {count}):", *bad]), known, vulnerable=True)
    if not known:
        return Verdict(f"NOT AUDITED: {service} knows {count}")
    rest = f"; NOT AUDITED: {', '.join(skipped)}" if skipped else ""
    return Verdict(f"audited: {service} knows {count} and no vulnerability{rest}", known, not skipped)


if __name__ == "__main__":
    sys.exit(main())
