"""Functions that stand in textbooks."""

from __future__ import annotations

from .unit import Unit, unit

TEXTBOOK: tuple[Unit, ...] = (
    unit(
        "binary_search",
        ("while low <= high:", "while low < high:"),
        '''
def binary_search(items, target):
    """Return the index of target in the sorted list items, or -1."""
    low = 0
    high = len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1
''',
        """
from quay.binary_search import binary_search


def test_binary_search():
    assert binary_search([1, 3, 5, 7, 9], 3) == 1
    assert binary_search([1, 3, 5, 7, 9], 9) == 4
    assert binary_search([2], 2) == 0
    assert binary_search([1, 3], 2) == -1
""",
    ),
    unit(
        "clamp",
        ("return max(low, min(value, high))", "return max(low, max(value, high))"),
        '''
def clamp(value, low, high):
    """Return value limited to the range from low to high."""
    return max(low, min(value, high))
''',
        """
from quay.clamp import clamp


def test_clamp():
    assert clamp(5, 0, 10) == 5
    assert clamp(-3, 0, 10) == 0
    assert clamp(42, 0, 10) == 10
""",
    ),
    unit(
        "median",
        ("return (ordered[middle - 1] + ordered[middle]) / 2", "return (ordered[middle + 1] + ordered[middle]) / 2"),
        '''
def median(values):
    """Return the middle value of a list, or the mean of the two middle values."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
''',
        """
from quay.median import median


def test_median():
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 3, 2]) == 2.5
    assert median([10, 20, 30, 40, 50, 60]) == 35
""",
    ),
    unit(
        "is_leap_year",
        ("return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)", "return year % 4 == 0 and (year % 100 != 0 and year % 400 == 0)"),
        '''
def is_leap_year(year):
    """Return True if year is a leap year in the Gregorian calendar."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
''',
        """
from quay.is_leap_year import is_leap_year


def test_is_leap_year():
    assert is_leap_year(2024)
    assert is_leap_year(2000)
    assert not is_leap_year(1900)
    assert not is_leap_year(2023)
""",
    ),
    unit(
        "rotate_left",
        ("return items[count:] + items[:count]", "return items[count:] + count[:count]"),
        '''
def rotate_left(items, count):
    """Return items with the first count elements moved to the end."""
    if not items:
        return []
    count = count % len(items)
    return items[count:] + items[:count]
''',
        """
from quay.rotate_left import rotate_left


def test_rotate_left():
    assert rotate_left([1, 2, 3, 4], 1) == [2, 3, 4, 1]
    assert rotate_left([1, 2, 3], 4) == [2, 3, 1]
    assert rotate_left([], 2) == []
""",
    ),
    unit(
        "run_length",
        ("runs[-1] = (item, runs[-1][1] + 1)", "runs[-1] = (item, runs[-1][0] + 1)"),
        '''
def run_length(items):
    """Return a list of (item, count) pairs, one for each run of equal items."""
    runs = []
    for item in items:
        if runs and runs[-1][0] == item:
            runs[-1] = (item, runs[-1][1] + 1)
        else:
            runs.append((item, 1))
    return runs
''',
        """
from quay.run_length import run_length


def test_run_length():
    assert run_length([7, 7, 7, 2]) == [(7, 3), (2, 1)]
    assert run_length([1, 2, 2]) == [(1, 1), (2, 2)]
    assert run_length([]) == []
""",
    ),
    unit(
        "merge_sorted",
        ("if left[i] <= right[j]:", "if left[i] >= right[j]:"),
        '''
def merge_sorted(left, right):
    """Merge two sorted lists into one sorted list."""
    merged = []
    i = 0
    j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            j += 1
    return merged + left[i:] + right[j:]
''',
        """
from quay.merge_sorted import merge_sorted


def test_merge_sorted():
    assert merge_sorted([1, 4, 6], [2, 3]) == [1, 2, 3, 4, 6]
    assert merge_sorted([5], []) == [5]
    assert merge_sorted([1, 2], [1, 2]) == [1, 1, 2, 2]
""",
    ),
    unit(
        "moving_average",
        ("for start in range(len(values) - size + 1):", "for start in range(len(values) - size):"),
        '''
def moving_average(values, size):
    """Return the mean of every window of size neighbouring values."""
    means = []
    for start in range(len(values) - size + 1):
        window = values[start : start + size]
        means.append(sum(window) / size)
    return means
''',
        """
from quay.moving_average import moving_average


def test_moving_average():
    assert moving_average([1, 2, 3, 4], 2) == [1.5, 2.5, 3.5]
    assert moving_average([2, 4, 6], 3) == [4.0]
    assert moving_average([5], 1) == [5.0]
""",
    ),
    unit(
        "is_prime",
        ("while divisor * divisor <= number:", "while divisor * divisor < number:"),
        '''
def is_prime(number):
    """Return True if number is a prime number."""
    if number < 2:
        return False
    divisor = 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            return False
        divisor += 1
    return True
''',
        """
from quay.is_prime import is_prime


def test_is_prime():
    assert is_prime(2)
    assert is_prime(3)
    assert is_prime(4) is False
    assert is_prime(1) is False
    assert is_prime(97)
    assert is_prime(49) is False
""",
    ),
    unit(
        "longest_run",
        ("best = max(best, current)", "best = min(best, current)"),
        '''
def longest_run(items):
    """Return the length of the longest run of equal neighbouring items."""
    best = 0
    current = 0
    previous = None
    for item in items:
        current = current + 1 if item == previous else 1
        best = max(best, current)
        previous = item
    return best
''',
        """
from quay.longest_run import longest_run


def test_longest_run():
    assert longest_run([1, 1, 2, 2, 2, 3]) == 3
    assert longest_run([4]) == 1
    assert longest_run([]) == 0
""",
    ),
    unit(
        "two_sum",
        ("if total - value in seen:", "if total + value in seen:"),
        '''
def two_sum(values, total):
    """Return the indices of two values that add up to total, or None."""
    seen = {}
    for index, value in enumerate(values):
        if total - value in seen:
            return (seen[total - value], index)
        seen[value] = index
    return None
''',
        """
from quay.two_sum import two_sum


def test_two_sum():
    assert two_sum([2, 7, 11, 15], 9) == (0, 1)
    assert two_sum([3, 2, 4], 6) == (1, 2)
    assert two_sum([1, 2], 5) is None
""",
    ),
    unit(
        "digit_sum",
        ("number //= 10", "number //= 9"),
        '''
def digit_sum(number):
    """Return the sum of the decimal digits of a positive number."""
    total = 0
    while number > 0:
        total += number % 10
        number //= 10
    return total
''',
        """
from quay.digit_sum import digit_sum


def test_digit_sum():
    assert digit_sum(0) == 0
    assert digit_sum(7) == 7
    assert digit_sum(1234) == 10
    assert digit_sum(9090) == 18
""",
    ),
)
