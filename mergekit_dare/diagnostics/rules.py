"""What a rule is: a function from its subject to findings, with an id and a sentence.

The rules are beside their subjects, in ``config``, ``models`` and ``plan``; ``checking`` runs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from mergekit_dare.diagnostics.findings import Finding

Subject = TypeVar("Subject")
Findings = Iterator[Finding]


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One kind of finding.

    Attributes:
        id: Its name in ``--ignore``: the function's name with hyphens.
        sentence: What it finds: the first line of the function's docstring.
        find: Returns what it finds in a subject.

    """

    id: str
    sentence: str
    find: Callable[[Subject], Findings]

    def __call__(self, subject: Subject) -> Findings:
        """Yield the findings, each with the rule's id."""
        for finding in self.find(subject):
            yield replace(finding, rule=self.id)


def rule(find: Callable[[Subject], Findings]) -> Rule[Subject]:
    """Make a function a rule, from its name and its docstring."""
    sentence = (inspect.getdoc(find) or "").splitlines()[0]
    return Rule(find.__name__.replace("_", "-"), sentence, find)
