"""Whatever a fork or a snapshot froze is made new."""

import gc
import hashlib
import os
import random
import sys

from .wire import IDENTITY_LEN, RunnerError


class Seeds:
    """Endless independent seeds from one fork's entropy."""

    def __init__(self, entropy):
        # Both the host's bytes and the kernel's: two forks differ if either does.
        self.key = hashlib.sha512(b"zeroboot identity" + entropy + os.urandom(32)).digest()
        self.count = 0

    def take(self):
        self.count += 1
        return hashlib.sha512(self.key + self.count.to_bytes(8, "little")).digest()

    def number(self, bits=512):
        return int.from_bytes(self.take(), "little") >> (512 - bits)


class Generators:
    """Every random generator object that was alive at the snapshot. Found before it, because a walk costs milliseconds."""

    def __init__(self, known=None, walk=True):
        """`known`: what an earlier walk found. Without a walk there are none."""
        self.python, self.numpy_bits, self.numpy_states = [], [], []
        if not walk:
            return
        core = random.Random.__mro__[1]  # _random.Random, which the garbage collector does not track
        numpy_random = sys.modules.get("numpy.random")
        bit_type = getattr(numpy_random, "BitGenerator", None)
        state_type = getattr(numpy_random, "RandomState", None)
        wanted = tuple(t for t in (core, bit_type, state_type) if t is not None)
        interesting = {}

        def consider(obj):
            kind = type(obj)
            hit = interesting.get(kind)
            if hit is None:
                hit = interesting[kind] = isinstance(kind, type) and issubclass(kind, wanted)
            return hit

        # What an earlier walk found is frozen by now: the collector does not list it.
        seen = {id(obj): obj for obj in known.all()} if known else {}
        tracked = gc.get_objects()
        for obj in tracked:
            if consider(obj):
                seen[id(obj)] = obj
        # What the collector does not track is still referred to by something that it does.
        for start in range(0, len(tracked), 4096):
            for obj in gc.get_referents(*tracked[start : start + 4096]):
                if consider(obj):
                    seen[id(obj)] = obj
        del tracked
        for obj in list(seen.values()):
            if state_type is not None and isinstance(obj, state_type):
                self.numpy_states.append(obj)
                bits = obj._bit_generator
                seen.setdefault(id(bits), bits)
        for obj in seen.values():
            if bit_type is not None and isinstance(obj, bit_type):
                self.numpy_bits.append(obj)
            elif isinstance(obj, core) and not isinstance(obj, random.SystemRandom):
                self.python.append(obj)
        # The walk found the ones that must exist, or it cannot be trusted to have found the others.
        if not any(obj is random._inst for obj in self.python):
            raise RunnerError("the walk for random generators missed the one of module random")
        mtrand = sys.modules.get("numpy.random.mtrand")
        if mtrand is not None and not any(obj is mtrand._rand for obj in self.numpy_states):
            raise RunnerError("the walk for random generators missed numpy's global one")

    def all(self):
        return self.python + self.numpy_bits + self.numpy_states

    def reseed(self, seeds):
        for obj in self.python:
            # Unbound: a subclass may have made seed() do something else.
            kind = random.Random if isinstance(obj, random.Random) else random.Random.__mro__[1]
            kind.seed(obj, seeds.number())
        if not self.numpy_bits and not self.numpy_states:
            return
        numpy = sys.modules["numpy"]
        mersenne = getattr(numpy.random, "MT19937", None)

        def mersenne_key():
            return numpy.frombuffer(hashlib.shake_256(seeds.take()).digest(4 * 624), dtype=numpy.uint32).copy()

        for obj in self.numpy_bits:
            seed = numpy.random.SeedSequence(seeds.number())
            if type(obj) is mersenne:
                # The one that is always there. Its own seeding takes five times as long.
                state = {"bit_generator": "MT19937", "state": {"key": mersenne_key(), "pos": 624}}
            else:
                state = type(obj)(seed).state
            try:
                # numpy from 1.25 on takes the seed sequence along, which spawn() draws from.
                obj.__setstate__((state, seed))
                whole = obj.seed_seq is seed
            except Exception:
                whole = False
            if not whole:
                type(obj).__init__(obj, seed)
        for obj in self.numpy_states:
            # Also drops the second half of a Gaussian pair, which would survive.
            if type(obj._bit_generator) is mersenne:
                obj.set_state(("MT19937", mersenne_key(), 624, 0, 0.0))
            else:
                state = obj.get_state(legacy=False)
                state["has_gauss"], state["gauss"] = 0, 0.0
                obj.set_state(state)


def apply_identity(payload, generators):
    """Makes this fork differ from all others. Any error here means that no user code runs."""
    if len(payload) != IDENTITY_LEN:
        raise RunnerError("the identity has %d bytes, not %d" % (len(payload), IDENTITY_LEN))
    seeds = Seeds(payload[:64])
    generators.reseed(seeds)
    # uuid1: libuuid keeps a clock sequence and a node that forks would share, so take the pure Python path with our own node
    # (multicast bit set: RFC 4122 4.5), which also keeps the host's MAC address out.
    uuid = sys.modules.get("uuid")
    if uuid is not None:
        uuid._generate_time_safe = None
        uuid._node = seeds.number(48) | (1 << 40)
        for name in ("_last_timestamp", "_last_timestamp_v6", "_last_timestamp_v7"):
            if hasattr(uuid, name):
                setattr(uuid, name, None)
    tempfile = sys.modules.get("tempfile")
    if tempfile is not None:
        tempfile._name_sequence = None
        tempfile.tempdir = None
    openssl = sys.modules.get("_ssl")
    if openssl is not None:
        # Reseeds OpenSSL's primary generator, from the kernel and from this; the others notice and follow. Needed because
        # OpenSSL detects a fork by the process id, which is the same in every fork of a VM.
        openssl.RAND_add(seeds.take(), 64.0)
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = seeds.take()[:32]
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(seeds.number(63))
