"""Running the rules of all rooms on the configs of a file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import mergekit_dare
from mergekit_dare.diagnostics.config import advice, parameters, refusals, structure
from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.config.reading import read
from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.findings import Finding, Severity, did_you_mean
from mergekit_dare.diagnostics.models import compatibility, soundness
from mergekit_dare.diagnostics.plan import rules as plan_rules
from mergekit_dare.diagnostics.rules import Findings, Rule, Subject, rule

# A flood helps nobody: beyond this number, findings are only counted.
MOST_FINDINGS = 100
_COMMENT = re.compile(r"#\s*mergekit-dare:\s*ignore\s+([\w\-, ]+)")


@rule
def unknown_rule(document: Document) -> Findings:
    """Find a comment that ignores a rule that does not exist."""
    for number, line in enumerate(document.lines, 1):
        for name in _ignored_in(line):
            if name not in RULES:
                message = f"there is no rule {name}{did_you_mean(name, RULES)}"
                yield Finding(Severity.WARNING, document.path, number, line.strip(), message)


OF_CONFIG = (*structure.RULES, *parameters.RULES, *advice.RULES, unknown_rule)
OF_FILE = (refusals.repeated_name, refusals.refused_order)
_ALL: tuple[Rule[Any], ...] = (
    structure.other_command,
    *OF_CONFIG,
    *refusals.RULES,
    *OF_FILE,
    *soundness.RULES,
    *compatibility.RULES,
    *plan_rules.RULES,
)
RULES = {rule.id: rule for rule in _ALL}


def check_file(path: str, *, files: bool = False, ignored: Collection[str] = ()) -> list[Finding]:
    """Check every document of a config file.

    Args:
        path: A YAML file with one config, or several as ``mergekit-multi`` takes them.
        files: Also plan the merge, and look at the headers of the models' files.
        ignored: Ids of rules that are skipped.

    Returns:
        The findings in the order of their lines.

    Raises:
        UnusableFileError: the file cannot be read, is not YAML, or a document is not a mapping.

    """
    documents = read(path)
    names = {document.name for document in documents if document.name}
    examinations = [Examination(document, made_here=names) for document in documents]
    return check(examinations, files=files, ignored=ignored)


def check(
    examinations: Sequence[Examination], *, files: bool = False, ignored: Collection[str] = ()
) -> list[Finding]:
    """Check the configs of one file, as :func:`check_file` does."""
    mergekit_dare.register()  # where start-up files do not run
    documents = [examination.document for examination in examinations]
    checking = _Checking(ignored, documents[0].lines)  # of the one file
    findings: list[Finding] = []
    for document in documents:
        findings += checking.of_config(document)
    if len(documents) > 1:
        findings += checking.run([refusals.repeated_name], documents)
        findings = _add_new(findings, checking.run([refusals.refused_order], documents))
    is_sound = not _has_error(findings)
    for examination in examinations if files else []:
        findings = _add_new(findings, checking.of_files(examination, and_plan=is_sound))
    findings = sorted(dict.fromkeys(findings), key=lambda finding: finding.line)
    if len(findings) > MOST_FINDINGS:
        last = findings[MOST_FINDINGS]
        message = f"{len(findings) - MOST_FINDINGS} more findings; fix these first"
        findings[MOST_FINDINGS:] = [Finding(Severity.ERROR, last.file, last.line, "", message)]
    return findings


class _Checking:
    """Runs all rules but the ignored ones: ignored everywhere, or by a comment for its line."""

    def __init__(self, ignored: Collection[str], lines: Sequence[str]) -> None:
        self._ignored = ignored
        self._lines = lines

    def run(self, rules: Iterable[Rule[Subject]], subject: Subject) -> list[Finding]:
        """Return what rules find in a subject."""
        wanted = [rule for rule in rules if rule.id not in self._ignored]
        found = [finding for rule in wanted for finding in rule(subject)]
        return [finding for finding in found if not self._is_ignored(finding)]

    def _is_ignored(self, finding: Finding) -> bool:
        lines = self._lines[finding.line - 1 : finding.line]
        return any(finding.rule in _ignored_in(line) for line in lines)

    def of_config(self, document: Document) -> list[Finding]:
        """Find what is wrong with a config alone."""
        if other := self.run([structure.other_command], document):
            return other
        findings = self.run(OF_CONFIG, document)
        for refusal in refusals.RULES:
            findings = _add_new(findings, self.run([refusal], document))
        return findings

    def of_files(self, examination: Examination, *, and_plan: bool) -> list[Finding]:
        """Find what is wrong with a config's models and, if asked for, with its plan."""
        findings: list[Finding] = []
        for named in examination.named_models:
            findings += self.run(soundness.RULES, named)
        if not and_plan or not examination.has_all_models or not examination.named_models:
            return findings
        try:
            plan = examination.plan
        except Exception:  # the rules on the config report it
            return findings
        if plan.is_of_single_files:
            return findings + self.run(plan_rules.OF_SINGLE_FILES, plan)
        findings += self._of_models_together(examination)
        if _has_error(findings) or plan.would_fetch_weights:
            return findings
        findings += self.run(plan_rules.OF_PLANNING, plan)
        for rules in (plan_rules.OF_A_PLAN, plan_rules.OF_THE_OUTPUT):
            if not _has_error(findings) and plan.refusal is None:
                findings += self.run(rules, plan)
        return findings

    def _of_models_together(self, examination: Examination) -> list[Finding]:
        findings: list[Finding] = []
        for compared in examination.comparisons:
            findings += self.run(compatibility.ALONE, compared)
        others = [c for c in examination.comparisons if c.model is not c.donor]
        for compared in others:
            # If the architecture differs, everything else does, too.
            findings += self.run([compatibility.different_architecture], compared) or self.run(
                compatibility.OF_ONE_ARCHITECTURE, compared
            )
        return findings


def _ignored_in(line: str) -> list[str]:
    """Return the ids of the rules that a comment turns off for its line."""
    found = _COMMENT.search(line)
    return [] if found is None else re.split(r"[\s,]+", found[1].strip())


def _has_error(findings: Iterable[Finding]) -> bool:
    return any(finding.severity is Severity.ERROR for finding in findings)


def _add_new(findings: list[Finding], more: Iterable[Finding]) -> list[Finding]:
    """Add what mergekit reports, except where a clearer error has already been found.

    What it reports for a config as a whole is new only if nothing else has been found.
    """
    errors = {finding.line for finding in findings if finding.severity is Severity.ERROR}
    return findings + [finding for finding in more if not _is_covered(finding, errors)]


def _is_covered(finding: Finding, errors: set[int]) -> bool:
    return finding.line in errors or (finding.line == min(errors, default=0))
