"""What is wrong with a mergekit config, found without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable

import mergekit_dare
from mergekit_dare.diagnostics import host, rules
from mergekit_dare.diagnostics.document import Document, read
from mergekit_dare.diagnostics.findings import Finding, Severity, UnusableFileError

__all__ = ["Finding", "Severity", "UnusableFileError", "check_file"]

# A flood helps nobody: of more findings, the rest are counted.
MOST_FINDINGS = 100


def check_file(path: str, *, files: bool = False) -> list[Finding]:
    """Check every document of a config file.

    Args:
        path: A YAML file with one config, or several as ``mergekit-multi`` takes them.
        files: Also plan the merge, and look at the headers of those models' files that are on
            this machine.

    Returns:
        The findings in the order of their lines.

    Raises:
        UnusableFileError: the file cannot be read, is not YAML, or a document is no mapping.

    """
    return check_documents(read(path), files=files)


def check_documents(documents: list[Document], *, files: bool = False) -> list[Finding]:
    """Check the documents of one file, as :func:`check_file` does."""
    mergekit_dare.register()  # where start-up files do not run
    findings: list[Finding] = []
    for document in documents:
        findings += _check(document)
    if len(documents) > 1:
        findings += _names(documents)
        findings = _add_new(findings, host.dependencies(documents))
    if files:
        from mergekit_dare.diagnostics import files_check

        made_here = {document.name for document in documents if document.name}
        is_sound = all(finding.severity is not Severity.ERROR for finding in findings)
        for document in documents:
            found = files_check.check(document, made_here, and_plan=is_sound)
            findings = _add_new(findings, found)
    findings = sorted(dict.fromkeys(findings), key=lambda finding: finding.line)
    if len(findings) > MOST_FINDINGS:
        last = findings[MOST_FINDINGS]
        message = f"{len(findings) - MOST_FINDINGS} more findings; mend these first"
        findings[MOST_FINDINGS:] = [Finding(Severity.ERROR, last.file, last.line, "", message)]
    return findings


def _check(document: Document) -> list[Finding]:
    if other := list(rules.other_command(document)):
        return other
    findings = [finding for rule in rules.RULES for finding in rule(document)]
    for rule in host.HOST_RULES:
        findings = _add_new(findings, rule(document))
    return findings


def _add_new(findings: list[Finding], more: Iterable[Finding]) -> list[Finding]:
    """Add what mergekit says, but not where an error has been named already in better words.

    What it says of a whole config is new only if nothing else has been found.
    """
    errors = {finding.line for finding in findings if finding.severity is Severity.ERROR}
    return findings + [finding for finding in more if not _is_covered(finding, errors)]


def _is_covered(finding: Finding, errors: set[int]) -> bool:
    return finding.line in errors or (finding.line == min(errors, default=0))


def _names(documents: list[Document]) -> list[Finding]:
    """Find names that are used twice in a file for mergekit-multi."""
    findings = []
    seen: set[str | None] = set()
    for document in documents:
        name = document.name
        if name in seen:
            what = f"the name {name} is used twice" if name else "two merges have no name"
            findings.append(document.finding(document.root, f"{what}; only one may go without"))
        seen.add(name)
    return findings
