#!/usr/bin/env python3
"""A load test of `zeroboot serve` with wrk: 200 connections for 60 seconds.

Every answer must be right or an honest 429 or 503. Afterwards descriptors, processes, mounts and memory must be back where
they were. With --kill, zygotes and workers are killed with SIGKILL all the while: then 5xx answers are allowed too (the
requests that were in a killed sandbox), and the service must return by itself.

usage: bench/http-load.py [--program PATH] [--connections 200] [--seconds 60] [--kill]
needs: wrk (Debian: apt-get install wrk)
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent


def children(pid):
    """All descendants of a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
            except (OSError, IndexError):
                pass
    found, rest = [], [pid]
    while rest:
        below = parents.get(rest.pop(), [])
        found += below
        rest += below
    return found


def state(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "processes": len(children(pid)),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "rss_mib": round(rss / 1024, 1),
    }


def get(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()


def healthy(base):
    try:
        return json.loads(get(base + "/v1/health"))["status"] == "ok"
    except OSError:
        return False


def wait(what, seconds, done):
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return None


def run(base, connections, seconds):
    wrk = subprocess.run(
        ["wrk", "--threads", "2", "--connections", str(connections), "--duration", f"{seconds}s", "--timeout", "60s",
         "--script", str(HERE / "http-load.lua"), base],
        stdout=subprocess.PIPE, text=True, check=True,
    )
    print(wrk.stdout)
    line = next(line for line in wrk.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def killer(server, stop, killed):
    while not stop.wait(0.5):
        # Zygotes are the server's children, everything below them is workers. Mostly workers, now and then a zygote.
        below = children(server)
        direct = [pid for pid in below if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == server] if below else []
        pool = direct if random.random() < 0.1 else [pid for pid in below if pid not in direct]
        if pool:
            try:
                os.kill(random.choice(pool), signal.SIGKILL)
                killed.append(1)
            except ProcessLookupError:
                pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=str(HERE.parent / "target/release/zeroboot"))
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--port", type=int, default=18090)
    parser.add_argument("--kill", action="store_true")
    args = parser.parse_args()
    base = f"http://127.0.0.1:{args.port}"
    log = open("/dev/null", "wb")
    server = subprocess.Popen([args.program, "serve", "--listen", f"127.0.0.1:{args.port}"], stdout=log, stderr=log)
    problems = []
    try:
        if problem := wait("service", 60, lambda: healthy(base)):
            sys.exit(problem)
        # Once around, so that what is made on first use is there: threads, buffers, the pool's usual size.
        run(base, args.connections, 3)
        time.sleep(3)
        before = state(server.pid)
        stop, killed = threading.Event(), []
        if args.kill:
            threading.Thread(target=killer, args=(server.pid, stop, killed), daemon=True).start()
        result = run(base, args.connections, args.seconds)
        stop.set()

        def back():
            after = state(server.pid)
            return all(after[key] <= before[key] for key in ("descriptors", "processes", "mounts")) and healthy(base)

        if problem := wait("descriptors, processes and mounts back at the start's level", 60, back):
            problems.append(problem)
        after = state(server.pid)
        if after["rss_mib"] > before["rss_mib"] * 1.5 + 32:
            problems.append(f"memory: {before['rss_mib']} MiB before, {after['rss_mib']} MiB after")
        if result["right"] == 0:
            problems.append("no right answer")
        if not args.kill:
            if result["wrong"]:
                problems.append(f"{result['wrong']} wrong answers")
            if any(result[key] for key in ("connect_errors", "read_errors", "write_errors", "timeouts")):
                problems.append("broken connections")
        summary = {"before": before, "after": after, "killed": len(killed), **result,
                   "answers_per_second": round((result["right"] + result["busy"]) / result["seconds"], 1), "problems": problems}
        print(json.dumps(summary, indent=2))
    finally:
        server.terminate()
        server.wait(60)
    left = children(server.pid)
    if left:
        problems.append(f"processes left behind: {left}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
