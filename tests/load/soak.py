"""What breaks in a round of the soak, and what may come of it.

| round | what happens all the while |
|---|---|
| kills | SIGKILL for workers, now and then for a zygote; SIGSTOP for a worker, which is never continued |
| descriptors | the server has hardly any descriptors left for two seconds at a time |
| server | as kills; at the end `kill -9` of the server, under load |

Beside the load of wrk, whose requests also take all the memory and all the descriptors of their sandboxes, sandboxes that
live are made, used and ended. The log of every second server is a disk that is full. The clock is left alone: it is all
of the host's.
"""

import collections
import json
import os
import random
import resource
import signal
import threading
import urllib.error
import urllib.request
import uuid

KINDS = ["kills", "descriptors", "server"]
SECONDS = 15
LIVE = 4
# What a request may be told when something broke.
HONEST = {"sandbox_failed", "sandbox_not_found", "not_ready", "busy", "concurrency_limited", "rate_limited", "sandbox_gone"}


class Lost(Exception):
    """An honest error, or no answer because the server is gone."""


class Round:
    def __init__(self, kind, server, family):
        self.kind, self.server, self.family = kind, server, family
        self.over, self.lock, self.problems = threading.Event(), threading.Lock(), []
        self.broken = {"workers": 0, "zygotes": 0, "stopped_workers": 0, "starved": 0}
        self.live = {"live_right": 0, "live_lost": 0}
        self.wrk, self.why = {}, collections.Counter()

    def run(self, load):
        threads = [threading.Thread(target=self.live_client) for _ in range(LIVE)]
        threads.append(threading.Thread(target=self.starve if self.kind == "descriptors" else self.kill_some))
        for thread in threads:
            thread.start()
        if self.kind == "server":
            # Under load: what is at work now is lost, and nothing else was.
            threading.Timer(SECONDS - 1, lambda: os.kill(self.server.pid, signal.SIGKILL)).start()
        try:
            self.wrk = load()
        finally:
            self.over.set()
            for thread in threads:
                thread.join()
        self.judge()
        return self

    def judge(self):
        wrk, broken = self.wrk, self.broken
        if wrk["wrong"]:
            self.problems.append(f"{wrk['wrong']} wrong answers")
        if wrk["right"] == 0:
            self.problems.append("no right answer")
        if self.kind == "descriptors":
            return
        # A killed worker costs one request, a killed zygote all that its workers were at.
        cost = broken["workers"] + broken["zygotes"] * 200
        if wrk["failed"] > cost or wrk["stopped"] > broken["stopped_workers"]:
            self.problems.append(f"{wrk['failed']} failed, {wrk['stopped']} stopped: {broken}")
        if wrk["not_ready"] and not broken["zygotes"]:
            self.problems.append("not ready, and nobody killed a zygote")
        if self.kind == "kills" and any(wrk[what] for what in ("connect_errors", "read_errors", "write_errors", "timeouts")):
            self.problems.append("broken connections")

    def counts(self):
        wrk = {what: self.wrk[what] for what in ("right", "busy", "limited", "failed", "not_ready", "stopped", "wrong")}
        return {**wrk, **self.live, **self.broken}

    def report(self):
        return {"phase": f"soak, {self.kind}", **self.wrk, **self.live, "live_lost_by": self.why, "broken": self.broken, "problems": self.problems}

    def count(self, what, more=1):
        with self.lock:
            self.live[what] += more

    # ---- what breaks

    def kill_some(self):
        """Mostly workers. Never the program in a sandbox: that is an outcome, not a failure."""
        number = 0
        while not self.over.wait(0.25):
            zygotes, workers, _inside = self.family(self.server.pid)
            number += 1
            what, among, how = "workers", workers, signal.SIGKILL
            if number % 16 == 0:
                what, among = "zygotes", zygotes
            elif number % 8 == 3:
                what, how = "stopped_workers", signal.SIGSTOP
            if among:
                try:
                    os.kill(random.choice(among), how)
                    self.broken[what] += 1
                except ProcessLookupError:
                    pass

    def starve(self):
        pid = self.server.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        while not self.over.wait(3):
            few = len(os.listdir(f"/proc/{pid}/fd")) + random.randrange(4)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(few, before[0]), before[1]))
            self.broken["starved"] += 1
            self.over.wait(2)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    # ---- sandboxes that live

    def ask(self, method, path, body=None, raw=False):
        data = body if raw or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/octet-stream" if raw else "application/json"}
        request = urllib.request.Request(self.server.base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
            code = json.loads(text).get("code") if text[:1] == b"{" else None
            if code in HONEST:
                raise Lost(code) from None
            self.problems.append(f"{method} {path}: {error.code} {text[:300]!r}")
            raise Lost("dishonest") from None
        except (OSError, EOFError) as error:
            raise Lost(repr(error)) from None
        return text if raw or method in ("DELETE", "GET") else json.loads(text)

    def live_client(self):
        while not self.over.is_set():
            sandbox = None
            try:
                made = self.ask("POST", "/v1/sandboxes", {"timeout_seconds": 40})
                sandbox = f"/v1/sandboxes/{made['id']}"
                self.use(sandbox)
            except Lost as why:
                self.count("live_lost")
                self.why[str(why)[:80]] += 1
                self.over.wait(0.2)
            finally:
                if sandbox:
                    try:
                        self.ask("DELETE", sandbox)
                    except Lost:
                        pass  # it ended before, or ends with its lease

    def use(self, sandbox):
        nonce = uuid.uuid4().hex
        steps = [
            (lambda: self.ask("POST", f"{sandbox}/run", {"code": f"x = '{nonce}'", "timeout_seconds": 20})["outcome"], "ok"),
            (lambda: self.ask("PUT", f"{sandbox}/files?path=nonce", nonce.encode(), raw=True) and None, None),
            (lambda: self.ask("POST", f"{sandbox}/commands", {"command": "cat nonce", "timeout_seconds": 20})["stdout"], nonce),
            (lambda: self.ask("POST", f"{sandbox}/run", {"code": "print(x)", "timeout_seconds": 20})["stdout"], nonce + "\n"),
            (lambda: self.ask("GET", f"{sandbox}/files?path=nonce").decode(), nonce),
        ]
        for step, expected in steps:
            got = step()
            if got != expected:
                # Its worker was killed or stopped in the middle: then it has said nothing of anybody else's.
                words = str(got)
                if any(len(word) == 32 and word != nonce for word in words.split()):
                    self.problems.append(f"crossed: {got!r} instead of {expected!r}")
                raise Lost(words)
            self.count("live_right")
