"""Made-up business rules: the tests know what is right, a reader of the code often does not."""

from __future__ import annotations

from .unit import Unit, unit

RULES: tuple[Unit, ...] = (
    unit(
        "parking_cost",
        ("return min(12, 2 + (hours - 1) * 3)", "return min(12, 2 + (hours + 1) * 3)"),
        '''
def parking_cost(hours):
    """Return the price: the first hour costs 2, each further hour 3, at most 12 a day."""
    if hours <= 0:
        return 0
    return min(12, 2 + (hours - 1) * 3)
''',
        """
from quay.parking_cost import parking_cost


def test_parking_cost():
    assert parking_cost(0) == 0
    assert parking_cost(1) == 2
    assert parking_cost(3) == 8
    assert parking_cost(9) == 12
""",
    ),
    unit(
        "can_board",
        ("return has_ticket and (has_passport or age < 12)", "return has_ticket and (has_passport and age < 12)"),
        '''
def can_board(has_ticket, has_passport, age):
    """Return True if a passenger may board the ferry."""
    return has_ticket and (has_passport or age < 12)
''',
        """
from quay.can_board import can_board


def test_can_board():
    assert can_board(True, True, 40)
    assert can_board(True, False, 11)
    assert not can_board(True, False, 12)
    assert not can_board(False, True, 40)
""",
    ),
    unit(
        "discount",
        ("return max(tier, basket)", "return min(tier, basket)"),
        '''
def discount(total, is_member):
    """Return the discount in percent for a basket."""
    tier = 5 if is_member else 0
    basket = 10 if total >= 100 else 0
    return max(tier, basket)
''',
        """
from quay.discount import discount


def test_discount():
    assert discount(20, True) == 5
    assert discount(100, False) == 10
    assert discount(250, True) == 10
    assert discount(20, False) == 0
""",
    ),
    unit(
        "shift_for",
        ("if hour < 6 or hour >= 22:", "if hour < 6 or hour >= 23:"),
        '''
def shift_for(hour):
    """Return the name of the shift that works at this hour of the day."""
    if hour < 6 or hour >= 22:
        return "night"
    if hour < 14:
        return "early"
    return "late"
''',
        """
from quay.shift_for import shift_for


def test_shift_for():
    assert shift_for(5) == "night"
    assert shift_for(6) == "early"
    assert shift_for(14) == "late"
    assert shift_for(21) == "late"
    assert shift_for(22) == "night"
""",
    ),
    unit(
        "berth_fee",
        ("fee = length * nights", "fee = length + nights"),
        '''
def berth_fee(length, nights, is_winter):
    """Return the fee for a boat in the harbour; in winter it is halved and rounded up."""
    fee = length * nights
    if is_winter:
        fee = (fee + 1) // 2
    return fee
''',
        """
from quay.berth_fee import berth_fee


def test_berth_fee():
    assert berth_fee(9, 3, False) == 27
    assert berth_fee(9, 3, True) == 14
    assert berth_fee(10, 1, True) == 5
""",
    ),
    unit(
        "shipping_band",
        ("if weight <= 2 and not is_fragile:", "if weight <= 2 or not is_fragile:"),
        '''
def shipping_band(weight, is_fragile):
    """Return the shipping band, 1 to 3, of a parcel."""
    if weight <= 2 and not is_fragile:
        return 1
    if weight <= 10:
        return 2
    return 3
''',
        """
from quay.shipping_band import shipping_band


def test_shipping_band():
    assert shipping_band(2, False) == 1
    assert shipping_band(2, True) == 2
    assert shipping_band(3, False) == 2
    assert shipping_band(11, False) == 3
""",
    ),
    unit(
        "overtime_pay",
        ("extra = hours - limit", "extra = limit - hours"),
        '''
def overtime_pay(hours, rate):
    """Return the pay of a week: hours above 38 count one and a half times."""
    limit = 38
    if hours <= limit:
        return hours * rate
    extra = hours - limit
    return limit * rate + extra * rate * 3 / 2
''',
        """
from quay.overtime_pay import overtime_pay


def test_overtime_pay():
    assert overtime_pay(30, 10) == 300
    assert overtime_pay(38, 10) == 380
    assert overtime_pay(40, 10) == 410
""",
    ),
    unit(
        "late_fee",
        ("weeks = (days + 6) // 7", "weeks = (days + 7) // 7"),
        '''
def late_fee(days):
    """Return the fee for a late book: 40 cents for every week that has begun, at most 400."""
    if days <= 0:
        return 0
    weeks = (days + 6) // 7
    return min(weeks * 40, 400)
''',
        """
from quay.late_fee import late_fee


def test_late_fee():
    assert late_fee(0) == 0
    assert late_fee(1) == 40
    assert late_fee(7) == 40
    assert late_fee(8) == 80
    assert late_fee(365) == 400
""",
    ),
    unit(
        "reorder",
        ("missing = target - stock - on_order", "missing = target - stock + on_order"),
        '''
def reorder(stock, on_order, target, box):
    """Return how many boxes to order so that stock and orders reach the target."""
    missing = target - stock - on_order
    if missing <= 0:
        return 0
    return (missing + box - 1) // box
''',
        """
from quay.reorder import reorder


def test_reorder():
    assert reorder(10, 0, 40, 10) == 3
    assert reorder(10, 10, 40, 10) == 2
    assert reorder(38, 0, 40, 10) == 1
    assert reorder(50, 0, 40, 10) == 0
""",
    ),
    unit(
        "upgrade_seat",
        ("return points >= 500 and free_seats > waiting", "return points >= 500 and free_seats < waiting"),
        '''
def upgrade_seat(points, free_seats, waiting):
    """Return True if a traveller gets a better seat."""
    return points >= 500 and free_seats > waiting
''',
        """
from quay.upgrade_seat import upgrade_seat


def test_upgrade_seat():
    assert upgrade_seat(500, 3, 1)
    assert not upgrade_seat(499, 3, 1)
    assert not upgrade_seat(800, 2, 2)
    assert not upgrade_seat(800, 1, 4)
""",
    ),
)
