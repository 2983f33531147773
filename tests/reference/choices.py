"""Which cases make_reference.py saves, and masks that leave every query a key."""
from itertools import combinations

import numpy as np


def pairwise(options, possible, rng):
    """Return a short list of cases that contains, if possible, all pairs of values of any two options."""
    def covers(case, pair):
        return all(case[name] == value for name, value in pair)

    missing = [((a, x), (b, y)) for a, b in combinations(options, 2)
               for x in range(len(options[a])) for y in range(len(options[b]))]
    cases = []
    while missing:
        draws = ({name: int(rng.integers(len(values))) for name, values in options.items()} | dict(missing[0])
                 for _ in range(1000))
        valid = [case for case in draws if possible(**{name: options[name][x] for name, x in case.items()})][:50]
        if not valid:
            missing.pop(0)
            continue
        best = max(valid, key=lambda case: sum(covers(case, pair) for pair in missing))
        missing = [pair for pair in missing if not covers(best, pair)]
        cases.append({name: options[name][x] for name, x in best.items()})
    return cases


def visible(n, window_size, causal=False, look_backward=1, look_forward=None, exact_windowsize=False, **_):
    """Return a bool array (n, n) for arguments of LocalAttention, and the number of windows in the span of one."""
    forward = int(not causal) if look_forward is None else look_forward
    i, j = np.ogrid[:n, :n]
    first = i if exact_windowsize else i // window_size * window_size
    last = first + (0 if exact_windowsize else window_size - 1) + window_size * forward
    sees = (j >= first - window_size * look_backward) & (j <= last) & ((j <= i) | (not causal))
    return sees, look_backward + 1 + forward


def varied(n, shared_qk=False, **args):
    """Whether a query can choose between keys: without a choice, the scores have no gradient."""
    return visible(n, **args)[0].sum(axis=-1).max() > 1 + shared_qk


def random_mask(rng, b, sees):
    """Return a bool array (b, n). A query that would see nothing sees itself."""
    mask = rng.random((b, len(sees))) < .6
    return mask | ~(mask @ sees.T)
