"""`kvplug doctor` and `kvplug config`: what decides whether and how kvplug runs here."""

from __future__ import annotations

import os

from kvplug.cli import output

__all__ = ["config", "doctor"]

_STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "fault": "bold red"}


def doctor(*, as_json: bool) -> int:
    """Check what kvplug needs here. 1: it cannot work here."""
    from kvplug.doctor import examine, report

    findings = examine()
    verdict = report(findings)
    if as_json:
        output.emit_json(verdict)
    else:
        table = output.table("check", "", "found")
        for finding in findings:
            found = output.cell(finding.found)
            if finding.fix:
                found += output.cell(f"-> {finding.fix}", style="cyan")
            status = finding.status.value
            table.add_row(finding.name, output.cell(status, style=_STYLES[status]), found)
        output.show(table)
        faults = sum(finding.status.value == "fault" for finding in findings)
        output.say("")
        output.say(
            "kvplug can work here"
            if not faults
            else f"{faults} fault{'s' * (faults > 1)}: kvplug can't work here until fixed"
        )
    return int(not verdict["ok"])


def config(*, as_json: bool) -> int:
    """Print every setting. 1: at least one cannot be used."""
    from kvplug.config import config_path, explain

    settings, wrong = explain()
    for problem in wrong:
        output.complain(problem)
    if as_json:
        output.emit_json({one.name: {"value": one.value, "source": one.source} for one in settings})
        return int(bool(wrong))
    table = output.table("setting", "value", "from")
    for one in settings:
        table.add_row(one.name, one.text, output.cell(one.source, style="dim" if one.source == "default" else ""))
    output.show(table)
    path, named = config_path()
    output.say("")
    output.say(f"settings file: {path}" + ("" if named or os.path.lexists(path) else " (not there)"))
    return int(bool(wrong))
