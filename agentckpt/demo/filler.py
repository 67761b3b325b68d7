"""Modules around the ones under test: real, importable, and the same in every run. They give the workspace its size."""

from __future__ import annotations

import random

NUM_PER_KIND = 60

_PORT = '''"""Distances from {name}, in nautical miles."""

NAME = "{name}"
DISTANCES = {{
{rows}
}}


def distance(port):
    """Return the distance to another port. Raises KeyError for one that is not served."""
    return DISTANCES[port]


def nearest():
    """Return the port that is nearest."""
    return min(DISTANCES, key=DISTANCES.get)
'''

_VESSEL = '''"""The vessel {name}: holds and speed."""

NAME = "{name}"
HOLDS = [
{rows}
]
SPEED = {speed}


def capacity():
    """Return the volume of all holds in cubic metres."""
    return sum(volume for _, volume in HOLDS)


def hours_for(miles):
    """Return the hours that a distance takes, rounded up."""
    return -(-miles // SPEED)
'''

_TARIFF = '''"""Tariff {name}: cents a unit by goods class."""

NAME = "{name}"
CENTS = {{
{rows}
}}


def price(goods, units):
    """Return the price in cents. Raises KeyError for goods that the tariff does not know."""
    return CENTS[goods] * units


def cheapest():
    """Return the goods class with the lowest price."""
    return min(CENTS, key=CENTS.get)
'''

_LOG = '''"""Arrivals in week {name}: (day, minute of the day, crates)."""

WEEK = "{name}"
ARRIVALS = [
{rows}
]


def crates_on(day):
    """Return the crates that arrived on a day, 0 to 6."""
    return sum(crates for when, _, crates in ARRIVALS if when == day)


def busiest_day():
    """Return the day with the most crates; the first one of several."""
    return max(range(7), key=crates_on)
'''

_SYLLABLES = (
    "ba",
    "cor",
    "den",
    "el",
    "fa",
    "gri",
    "hol",
    "in",
    "jas",
    "ke",
    "lor",
    "mun",
    "nor",
    "os",
    "pel",
    "ri",
    "sund",
    "tor",
    "ul",
    "vik",
)


def filler_modules() -> dict[str, str]:
    """``{path below the package: source}`` of ``4 * NUM_PER_KIND`` modules and their ``__init__`` files."""
    files: dict[str, str] = {}
    for kind in (_port, _vessel, _tariff, _log):
        package = kind.__name__.strip("_") + "s"
        files[f"{package}/__init__.py"] = f'"""Generated records: {package}."""\n'
        for number in range(NUM_PER_KIND):
            draw = random.Random(f"{package}/{number}")
            files[f"{package}/{package[:-1]}_{number:03d}.py"] = kind(draw, number)
    return files


def _port(draw: random.Random, number: int) -> str:
    rows = "\n".join(f'    "{_name(draw)}": {draw.randint(4, 900)},' for _ in range(24))
    return _PORT.format(name=_name(draw), rows=rows)


def _vessel(draw: random.Random, number: int) -> str:
    rows = "\n".join(f"    ({hold}, {draw.randint(20, 400)})," for hold in range(draw.randint(8, 30)))
    return _VESSEL.format(name=_name(draw), rows=rows, speed=draw.randint(8, 24))


def _tariff(draw: random.Random, number: int) -> str:
    rows = "\n".join(f'    "{_name(draw)}": {draw.randint(10, 5000)},' for _ in range(28))
    return _TARIFF.format(name=_name(draw), rows=rows)


def _log(draw: random.Random, number: int) -> str:
    rows = "\n".join(f"    ({draw.randint(0, 6)}, {draw.randint(0, 1439)}, {draw.randint(1, 60)})," for _ in range(40))
    return _LOG.format(name=number, rows=rows)


def _name(draw: random.Random) -> str:
    return "".join(draw.choice(_SYLLABLES) for _ in range(3)).capitalize()
