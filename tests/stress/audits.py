"""How often an audit flags a sound reward: ``python -m tests.stress.audits --audits 200`` prints the share.

Each sound reward is what people say of a text and an error that the text alone decides, on other texts each time
(`tests.benchmarks.audit.rewards.sound`); at most 5 % of the audits may flag anything.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

from benchmarks.audit.command import examine
from benchmarks.audit.config import checks_named
from benchmarks.audit.subject import Subject
from rlaif_env.statistics import interval_text, wilson
from tests.benchmarks.audit.rewards import JudgeOfGroups, materials, sound


def false_alarms(
    audits: int, *, checks: Sequence[str] = (), first: int = 0, groups: bool = False
) -> tuple[int, Counter[str]]:
    """How many audits of sound rewards, or judges of groups, flagged something, and what, with its number."""
    flagged, what = 0, Counter[str]()
    for seed in range(first, first + audits):
        subject = Subject(JudgeOfGroups(seed=seed) if groups else sound(seed), materials(seed))
        found = examine(subject, checks_named(checks))
        flagged += bool(found.flags)
        what.update(f"{finding.check}: {finding.name}" for finding in found.flags)
    return flagged, what


def main() -> None:
    """Print the share of audits with a false alarm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audits", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--checks", nargs="*", default=())
    parser.add_argument("--groups", action="store_true", help="judges of groups instead of rewards of rows")
    config = parser.parse_args()
    flagged, what = false_alarms(config.audits, checks=config.checks, first=config.first, groups=config.groups)
    share = interval_text(wilson(flagged, config.audits), ".1%")
    print(f"{flagged} of {config.audits} sound rewards were flagged: {share}")
    for name, count in what.most_common():
        print(f"  {count:4d}  {name}")


if __name__ == "__main__":
    main()
