"""Clones a warmed runner as a VM snapshot does, N times, and prints what a program in each draws.

    unshare --pid --fork python clones.py RUNNER N [--no-identity]

A fork alone would not do: the interpreter and OpenSSL notice one by hooks and by the process id. So this is a raw clone
into a new pid namespace, which runs no hook and leaves the process id at 1.
"""
import ctypes
import json
import os
import signal
import socket
import struct
import sys

PROGRAM = r"""
import json, os, random, secrets, ssl, tempfile, uuid, hashlib, email.utils, multiprocessing, premade
drawn = {
    "os.urandom": os.urandom(8).hex(),
    "random.random": random.random(),
    "random.gauss": random.gauss(0, 1),
    "secrets": secrets.token_hex(8),
    "uuid1": str(uuid.uuid1()),
    "uuid1.node": uuid.uuid1().node,
    "uuid.getnode": uuid.getnode(),
    "uuid1.clock_seq": uuid.uuid1().clock_seq * 2**48 + uuid.getnode(),
    "uuid4": str(uuid.uuid4()),
    "tempfile": next(tempfile._get_candidate_names()),
    "mkdtemp": os.path.basename(tempfile.mkdtemp()),
    "ssl.RAND_bytes": ssl.RAND_bytes(8).hex(),
    "authkey": bytes(multiprocessing.current_process().authkey).hex(),
    "premade.own": premade.own.random(),
    "premade.raw": premade.raw.random(),
    "premade.odd": premade.odd.random(),
    "premade.nested": premade.nested["a"][0][0].random(),
    "premade.pick": premade.pick(range(2**60)),
}
if premade.np is not None:
    np = premade.np
    drawn.update({
        "np.random.rand": np.random.rand(),
        "np.random.randn": np.random.randn(),
        "default_rng()": np.random.default_rng().random(),
        "premade.rng": premade.rng.random(),
        "premade.rng.spawn": premade.rng.spawn(1)[0].random() if hasattr(premade.rng, "spawn") else 0,
        "premade.legacy": premade.legacy.randn(),
        "premade.draw": premade.draw(),
    })
    for b in premade.bits:
        drawn["premade." + type(b).__name__] = int(b.random_raw())
if not hasattr(premade.np and premade.rng, "spawn"):
    drawn.pop("premade.rng.spawn", None)
print(json.dumps(drawn), flush=True)
# No agent is here, whose end of the runner a program that ends would wait for.
os._exit(0)
"""

CLONE_NEWPID, SYS_CLONE = 0x20000000, 56


def main():
    runner_path, count = sys.argv[1], int(sys.argv[2])
    reseed = "--no-identity" not in sys.argv
    sys.path.insert(1, os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(0, runner_path)
    from zeroboot_runner import life, wire

    import ssl, tempfile, uuid, random

    # State that a warm-up may leave behind.
    ssl.RAND_bytes(1), uuid.uuid1(), uuid.getnode(), next(tempfile._get_candidate_names()), random.gauss(0, 1)
    _, ready, generators, make_shell, _ = life.prepare(["--warm", "premade,ssl"])
    if not reseed:
        life.apply_identity = lambda payload, generators: None
    assert os.getpid() == 1, "run this as the first process of a pid namespace"
    libc = ctypes.PyDLL(None, use_errno=True)
    sys.stdout.flush()
    for i in range(count):
        front, control = socket.socketpair()
        out_read, out_write = os.pipe()
        pid = libc.syscall(SYS_CLONE, CLONE_NEWPID | signal.SIGCHLD, 0, 0, 0, 0)
        if pid < 0:
            raise OSError(ctypes.get_errno(), "clone")
        if pid == 0:
            front.close()
            os.dup2(out_write, 1)
            os.dup2(control.fileno(), 3)
            life.serve(ready, generators, make_shell)
        control.close()
        os.close(out_write)

        def send(kind, payload=b""):
            front.sendall(struct.pack("<IB3x", len(payload), kind) + payload)

        send(wire.IDENTITY, os.urandom(64) + bytes(24))
        send(wire.ARG, b"-c")
        send(wire.CODE, PROGRAM.encode())
        send(wire.RUN)
        with os.fdopen(out_read, "rb") as out:
            line = out.read().decode().strip()
        _, status = os.waitpid(pid, 0)
        if status != 0:
            raise SystemExit("clone %d ended with %d: %s" % (i, status, front.recv(65536)))
        front.close()
        print(line, flush=True)


main()
