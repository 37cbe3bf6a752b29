"""How long clients take side by side: more workers than cores share these."""

from collections.abc import Sequence
from itertools import pairwise


def makespan(seconds: Sequence[float], workers: int, cores: int) -> float:
    """Until all tasks are done that ``workers`` take in this order, each the next one when it has ended its last.

    ``seconds`` are those of a core; where more tasks run than there are cores, all get the same share of them.
    """
    waiting, running, elapsed = list(reversed(seconds)), list[float](), 0.0
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(waiting.pop())
        least, slowdown = min(running), max(1.0, len(running) / cores)
        elapsed += least * slowdown
        running = [left - least for left in running if left - least > 1e-12]
    return elapsed


def alike(seconds: float, count: int, workers: int, cores: int) -> float:
    """The same for so many equal tasks: turns of all workers, and a last one of those that are left."""
    turns, left = divmod(count, workers)
    return seconds * (turns * max(1.0, workers / cores) + (max(1.0, left / cores) if left else 0.0))


def between(at: float, points: Sequence[tuple[float, float]]) -> float:
    """The value at this place, on straight lines through the points; in proportion to the place beyond them."""
    known = sorted(points)
    if at <= known[0][0] or len(known) == 1:
        place, value = known[0]
        return value * at / place if place else value
    if at >= known[-1][0]:
        place, value = known[-1]
        return value * at / place if place else value
    for (left, low), (right, high) in pairwise(known):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left) if right > left else low
    raise AssertionError("a place between the points")
