"""Whatever a fork or a snapshot froze is made new."""

import gc
import hashlib
import os
import random
import sys

from .streams import ctypes
from .wire import IDENTITY_LEN, RunnerError

# _random.Random, which the garbage collector does not track.
CORE = random.Random.__mro__[1]


class Seeds:
    """Endless independent seeds from one fork's entropy."""

    def __init__(self, entropy):
        # Both the host's bytes and the kernel's: two forks differ if either does.
        self.key = hashlib.sha512(b"zeroboot identity" + entropy + os.urandom(32)).digest()
        self.count = 0

    def take(self):
        self.count += 1
        return hashlib.sha512(self.key + self.count.to_bytes(8, "little")).digest()

    def bytes(self, count):
        return hashlib.shake_256(self.take()).digest(count)

    def number(self, bits=512):
        return int.from_bytes(self.take(), "little") >> (512 - bits)


class Generators:
    """Every random generator object that was alive at the snapshot. Found before it, because a walk costs milliseconds."""

    def __init__(self, known=None, walk=True):
        """`known`: what an earlier walk found. Without a walk there are none."""
        self.python, self.numpy_bits, self.numpy_states, self.memories = [], [], [], {}
        self.halves_dropped = False
        if not walk:
            return
        numpy_random = sys.modules.get("numpy.random")
        bit_type = getattr(numpy_random, "BitGenerator", None)
        state_type = getattr(numpy_random, "RandomState", None)
        wanted = tuple(t for t in (CORE, bit_type, state_type) if t is not None)
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
            elif isinstance(obj, CORE) and not isinstance(obj, random.SystemRandom):
                self.python.append(obj)
        mersenne = getattr(numpy_random, "MT19937", None)
        self.memories = {id(obj): mersenne_memory(obj) for obj in self.numpy_bits if type(obj) is mersenne}
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
            # The base's own: a subclass may have made seed() do something else, and Random's does this alone.
            CORE.seed(obj, seeds.number())
            if isinstance(obj, random.Random):
                obj.gauss_next = None
        if not self.numpy_bits and not self.numpy_states:
            return
        if not self.halves_dropped:
            # The second half of a Gaussian pair would survive.
            for obj in self.numpy_states:
                state = obj.get_state(legacy=False)
                state["has_gauss"], state["gauss"] = 0, 0.0
                obj.set_state(state)
        make_sequence = sys.modules["numpy"].random.SeedSequence
        for obj in self.numpy_bits:
            sequence = make_sequence(seeds.number())
            memory = self.memories.get(id(obj))
            try:
                if memory is not None:
                    memory[:] = seeds.bytes(len(memory))
                    take_sequence(obj, sequence)
                else:
                    # numpy from 1.25 on takes the seed sequence along, which spawn() draws from.
                    obj.__setstate__((type(obj)(sequence).state, sequence))
                whole = obj.seed_seq is sequence
            except Exception:
                whole = False
            if not whole:
                type(obj).__init__(obj, sequence)

    def settle(self):
        """To be called when they have been seeded, and draw nothing up to the next time."""
        self.halves_dropped = True


def mersenne_memory(obj):
    """The words of a Mersenne Twister of numpy's, if they are where its address says. To set them through numpy takes half a millisecond."""
    try:
        state = obj.state["state"]
        words = (ctypes.c_uint32 * 625).from_address(obj.ctypes.state_address)
        if list(words) != [int(word) for word in state["key"]] + [state["pos"]]:
            return None
        # Without the position. It says that all words are used up.
        state["pos"] = 624
        obj.state = {"bit_generator": "MT19937", "state": state}
        return memoryview(words).cast("B")[:2496] if words[624] == 624 else None
    except Exception:
        return None


def take_sequence(obj, sequence):
    """Gives a bit generator a seed sequence and leaves its state alone."""
    try:
        obj.__setstate__((None, sequence))
    except TypeError:
        # It has the sequence by then, and refuses the state. The caller looks.
        pass


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
