"""Times that can be compared although a machine is noisy: interleaved in one process, medians, quartiles."""

import random
import time
from statistics import median, quantiles


def interleaved(runs, rounds, before=3):
    """Seconds of each of `runs` ({name: function that waits for its result}) in every round.

    Every round runs each once, in an order of its own: slow spells hit all alike, and so does what one leaves
    to the next, such as threads that still spin.
    """
    shuffle = random.Random(0).shuffle
    names, times = list(runs), {name: [] for name in runs}
    for i in range(-before, rounds):
        shuffle(names)
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times, name, base):
    """The ratio of the medians, with the quartiles of the ratios of single rounds as its spread."""
    single = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, _, high = quantiles(single, n=4) if len(single) > 1 else [single[0]] * 3
    return median(times[name]) / median(times[base]), low, high


def shown(found):
    """A ratio with its spread."""
    return "{:.2f} ({:.2f}-{:.2f})".format(*found)
