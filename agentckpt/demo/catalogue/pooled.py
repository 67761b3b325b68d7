"""Modules of several functions: one of them is wrong, and the search is over the edits of all."""

from __future__ import annotations

from .unit import Unit, unit

POOLED: tuple[Unit, ...] = (
    unit(
        "tides",
        ("return minutes_between(start, end) // steps", "return minutes_between(start, steps) // steps"),
        '''
def to_minutes(hours, minutes):
    """Return a time of the day in minutes after midnight."""
    return hours * 60 + minutes


def minutes_between(start, end):
    """Return the minutes from start to end, over midnight if end is earlier."""
    if end >= start:
        return end - start
    return end + 24 * 60 - start


def step_length(start, end, steps):
    """Return the whole minutes of each step between two tides."""
    if steps <= 0:
        return 0
    return minutes_between(start, end) // steps


def is_open(minute, low_tide, margin):
    """Return True if the lock is open: not within margin minutes of low tide."""
    return abs(minute - low_tide) > margin


def depth_at(minute, low_tide, low_depth, high_depth):
    """Return the depth: it rises evenly from low tide for 360 minutes, then falls again."""
    phase = (minute - low_tide) % 720
    if phase > 360:
        phase = 720 - phase
    return low_depth + (high_depth - low_depth) * phase // 360
''',
        """
from quay.tides import depth_at, is_open, minutes_between, step_length, to_minutes


def test_to_minutes():
    assert to_minutes(2, 30) == 150


def test_minutes_between():
    assert minutes_between(60, 90) == 30
    assert minutes_between(1430, 10) == 20


def test_step_length():
    assert step_length(60, 180, 4) == 30
    assert step_length(1380, 60, 2) == 60
    assert step_length(60, 180, 0) == 0


def test_is_open():
    assert is_open(200, 100, 60)
    assert not is_open(160, 100, 60)
    assert not is_open(40, 100, 60)


def test_depth_at():
    assert depth_at(100, 100, 2, 8) == 2
    assert depth_at(280, 100, 2, 8) == 5
    assert depth_at(640, 100, 2, 8) == 5
""",
    ),
    unit(
        "manifest_rules",
        ("if weight > limit or count > slots:", "if weight > limit or count >= slots:"),
        '''
def total_weight(crates):
    """Return the weight of all crates, given as (count, weight) pairs."""
    total = 0
    for count, weight in crates:
        total += count * weight
    return total


def fits(weight, count, limit, slots):
    """Return True if a load fits on the deck."""
    if weight > limit or count > slots:
        return False
    return True


def split_evenly(count, holds):
    """Return how many crates go into each hold; the first holds take what is left over."""
    base = count // holds
    extra = count % holds
    return [base + 1 if hold < extra else base for hold in range(holds)]


def surcharge(weight, is_cold):
    """Return the surcharge: 5 for each begun 100 kilograms, twice that if cold."""
    steps = (weight + 99) // 100
    if is_cold:
        steps = steps * 2
    return steps * 5


def balance_point(loads):
    """Return the balance point, rounded down, of (place, weight) pairs."""
    moment = 0
    weight = 0
    for place, load in loads:
        moment += place * load
        weight += load
    if weight == 0:
        return 0
    return moment // weight
''',
        """
from quay.manifest_rules import balance_point, fits, split_evenly, surcharge, total_weight


def test_total_weight():
    assert total_weight([(2, 30), (1, 5)]) == 65
    assert total_weight([]) == 0


def test_fits():
    assert fits(100, 4, 100, 4)
    assert fits(90, 1, 100, 4)
    assert not fits(101, 4, 100, 4)
    assert not fits(100, 5, 100, 4)


def test_split_evenly():
    assert split_evenly(7, 3) == [3, 2, 2]
    assert split_evenly(4, 2) == [2, 2]


def test_surcharge():
    assert surcharge(100, False) == 5
    assert surcharge(101, False) == 10
    assert surcharge(250, True) == 30


def test_balance_point():
    assert balance_point([(2, 10), (8, 10)]) == 5
    assert balance_point([(1, 3), (5, 1)]) == 2
    assert balance_point([]) == 0
""",
    ),
)
