"""`kvplug doctor` and `kvplug config`: what decides whether and how kvplug runs here."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kvplug.cli import output

__all__ = ["config", "doctor"]

_STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "fault": "bold red"}

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def doctor(as_json: Json = False) -> None:
    """Check what kvplug needs here, and suggest a fix for each fault. Exit status 1: kvplug cannot work here."""
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
                found.append(f"\n-> {finding.fix}", style="cyan")
            table.add_row(
                output.cell(finding.name), output.cell(finding.status.value, style=_STYLES[finding.status.value]), found
            )
        output.show(table)
        faults = sum(finding.status.value == "fault" for finding in findings)
        output.say("")
        output.say(
            "kvplug can work here"
            if not faults
            else f"{faults} fault{'s' * (faults > 1)}: kvplug can't work here until fixed"
        )
    if not verdict["ok"]:
        raise typer.Exit(1)


def config(as_json: Json = False) -> None:
    """Print every setting, its value and its source. Exit status 1: at least one setting cannot be used."""
    from kvplug.config import config_path, explain

    settings, wrong = explain()
    for problem in wrong:
        output.complain(problem)
    if as_json:
        output.emit_json({one.name: {"value": one.value, "source": one.source} for one in settings})
        raise typer.Exit(bool(wrong))
    table = output.table("setting", "value", "from")
    for one in settings:
        table.add_row(
            output.cell(one.name),
            output.cell(one.text),
            output.cell(one.source, style="dim" if one.source == "default" else ""),
        )
    output.show(table)
    path, named = config_path()
    output.say("")
    output.say(f"settings file: {path}" + ("" if named or os.path.lexists(path) else " (not there)"))
    raise typer.Exit(bool(wrong))
