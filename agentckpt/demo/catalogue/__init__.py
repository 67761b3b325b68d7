"""Two dozen small modules with a bug to plant in each. The list was fixed before any model ranked an edit of it.

Three kinds: functions that stand in textbooks, made-up business rules (where reading the code naturally often does not
tell what is right), and modules that pool several functions, so that the place of the bug must be found too.

Invariants, each tested for every unit:
1. The tests pass on ``source`` and fail on ``buggy``.
2. ``source`` is among the single edits of ``buggy`` that ``edits.enumerate_edits`` makes: every planted bug is one edit away.
3. ``source`` and ``buggy`` differ in one line; nothing of the difference is given to the search.
"""

from __future__ import annotations

from .pooled import POOLED
from .rules import RULES
from .textbook import TEXTBOOK
from .unit import Unit

CATALOGUE: tuple[Unit, ...] = TEXTBOOK + RULES + POOLED

__all__ = ["CATALOGUE", "Unit"]
