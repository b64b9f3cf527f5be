"""A module that a template warms: it holds generators of its own, as real packages do."""
import _random
import random

own = random.Random(1)
raw = _random.Random(2)


class Odd(random.Random):
    def seed(self, *args, **kwargs):
        pass  # a subclass that cannot be seeded the usual way


odd = Odd()
nested = {"a": [(random.Random(3),)]}
pick = random.Random(4).choice  # only a bound method is left of it

try:
    import numpy as np
except ImportError:
    np = None
else:
    rng = np.random.default_rng(1)
    legacy = np.random.RandomState(2)
    legacy.randn()  # leaves half of a Gaussian pair behind
    bits = [np.random.Philox(3), np.random.SFC64(4), np.random.MT19937(5), np.random.PCG64(6)]
    draw = np.random.Generator(np.random.PCG64(7)).random  # only a bound method
    np.random.seed(8)
