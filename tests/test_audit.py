"""`make check` says which versions nobody has looked up, and never calls that a clean audit."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*packages: dict[str, Any]) -> dict[str, Any]:
    return {"dependencies": list(packages)}


FINE = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (2)"}
HOLED = {"name": "c", "version": "3", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1", "4.0"]}]}


def test_a_report_is_counted_package_by_package(audit: ModuleType) -> None:
    """Bug: pip-audit's own last line is "No known vulnerabilities found" when it could look up nothing."""
    assert audit.verdict("pypi", report(UNKNOWN, UNKNOWN)) == (
        "NOT AUDITED: pypi knows 0 of 2 pinned versions", 0, False, False,
    )  # fmt: skip
    assert audit.verdict("pypi", report(FINE, UNKNOWN)) == (
        "audited: pypi knows 1 of 2 pinned versions and no vulnerability; NOT AUDITED: b", 1, False, False,
    )  # fmt: skip
    assert audit.verdict("osv", report(FINE)) == (
        "audited: osv knows 1 of 1 pinned versions and no vulnerability", 1, True, False,
    )  # fmt: skip
    text, known, complete, vulnerable = audit.verdict("osv", report(FINE, UNKNOWN, HOLED))
    assert text.splitlines() == [
        "VULNERABLE (osv knows 2 of 3 pinned versions):",
        "  c 3: PYSEC-1, fixed in 3.1 or 4.0",
    ]
    assert (known, complete, vulnerable) == (2, False, True)
    assert audit.verdict("osv", None, "ConnectionError").text == (
        "NOT AUDITED: osv could not be asked (ConnectionError)"
    )


@pytest.mark.parametrize(
    ("reports", "strict", "code", "says"),
    [
        ({"pypi": report(FINE)}, True, 0, "audited: pypi knows 1 of 1"),
        # The second service is asked if the first one knows nothing.
        ({"pypi": report(UNKNOWN), "osv": report(FINE)}, True, 0, "audited: osv knows 1 of 1"),
        ({"pypi": report(FINE, UNKNOWN)}, False, 0, "NOT AUDITED: b"),
        ({"pypi": report(FINE, UNKNOWN)}, True, 1, "NOT AUDITED: b"),
        ({"pypi": report(HOLED)}, False, 1, "VULNERABLE"),
        (
            {},
            False,
            0,
            "could not be asked (off)\nNOT AUDITED: osv could not be asked (off)",
        ),
        ({}, True, 1, "NOT AUDITED: pypi could not be asked (off)"),
    ],
)
def test_exit_codes(
    audit: ModuleType,
    reports: dict[str, Any],
    strict: bool,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bug: `make check` fails on a train, or passes with a known hole."""
    monkeypatch.setattr(audit, "asked", lambda service: (reports.get(service), "off"))
    monkeypatch.setattr(audit, "find_spec", lambda _: object())
    assert audit.main(["--strict"] if strict else []) == code
    assert says in capsys.readouterr().out
    monkeypatch.setattr(audit, "find_spec", lambda _: None)
    assert audit.main([]) == 1
    assert "NOT AUDITED: pip-audit is not installed" in capsys.readouterr().out


def test_a_service_that_cannot_be_asked_is_named_without_its_address(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: an index's address with a password in the log of a check; a hang without end."""
    last = "requests.exceptions.ConnectionError: https://user:secret@index/ refused"

    def failed(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", f"Traceback\n{last}\n")

    monkeypatch.setattr(subprocess, "run", failed)
    assert audit.asked("pypi") == (None, "ConnectionError")

    def slow(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("pip-audit", 1)

    monkeypatch.setattr(subprocess, "run", slow)
    assert audit.asked("pypi") == (None, "no answer within 180 s")


def test_packages_that_do_not_fit_fail(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a broken requirement passes because the advisories are fine."""
    broken = subprocess.CompletedProcess([], 1, "a 1 requires b, which is not installed.\n", "")
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: broken)
    monkeypatch.setattr(audit, "asked", lambda _: (report(FINE), ""))
    monkeypatch.setattr(audit, "find_spec", lambda _: object())
    assert audit.main([]) == 1
    assert "a 1 requires b" in capsys.readouterr().out
