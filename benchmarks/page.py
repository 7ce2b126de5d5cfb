"""How fast is the page of demo.py, what does a visitor cost, and is anything left over when visitors have gone?

Visitors without a page: each sees every picture at once. Pictures per second, CPU share of one core and memory with 1,
2 and 4 of them; from "say" to the first picture of a decision under the new sentence; then an hour in which they come
and go. Writes benchmarks/page.json.

    python -m benchmarks.page      # an hour and five minutes; SOAK = 60 for a look
"""

import contextlib
import json
import multiprocessing
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import demo
from support import checks, run_files

SESSIONS = (1, 2, 4)
SECONDS = 20  # per number of sessions
SENTENCES = 50  # said for the latency
SOAK = 3600  # seconds
OUTPUT = Path(__file__).with_suffix(".json")


def serve(port):
    """A server in a process of its own."""
    demo.PORT, demo.OPEN_BROWSER = port, False
    demo.serve()


def visit(address, until, said=()):
    """Watch until a time and say the sentences of `said`; returns arrival times of pictures, delays of sentences."""
    pictures, latencies, told, asked = [], [], None, 0.0
    with connect(f"ws://{address}/drive") as socket:
        socket.recv()
        said = list(said)
        while time.monotonic() < until:
            message = json.loads(socket.recv(timeout=30))
            if "drives" not in message:
                continue
            pictures.append(time.monotonic())
            socket.send('{"seen": true}')
            if told is not None and message["told"] == told:
                latencies.append(pictures[-1] - asked)
                told = None
            if message["drives"][0]["end"]:
                socket.send('{"restart": true}')
            if said and told is None and random.random() < 0.1:
                told, asked = said.pop(0), time.monotonic()
                socket.send(json.dumps({"say": told}))
    return pictures, latencies


def resources(pid):
    """CPU seconds, resident memory in MB and threads of a process."""
    facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return (int(facts[11]) + int(facts[12])) / os.sysconf("SC_CLK_TCK"), memory, int(facts[17])


def together(address, pid, count):
    """A row of what `count` visitors at once get and cost."""
    until = time.monotonic() + SECONDS
    cpu, *_ = resources(pid)
    with ThreadPoolExecutor(count) as pool:
        rates = list(pool.map(lambda _: len(visit(address, until)[0]) / SECONDS, range(count)))
    used, memory, _ = resources(pid)
    time.sleep(6)  # until these sessions have ended
    row = {"sessions": count, "pictures_per_second": round(float(np.mean(rates)), 1), "slowest": round(min(rates), 1)}
    return row | {"cpu_share": round((used - cpu) / SECONDS, 2), "memory_mb": round(memory)}


def soak(address, pid):
    """Visitors come, say something, and go; memory and threads at the beginning and at the end."""

    def come_and_go(until):
        while time.monotonic() < until:
            with contextlib.suppress(ConnectionClosed, TimeoutError):
                visit(address, min(until, time.monotonic() + random.uniform(2, 20)), ["Stop.", "Drive on."])

    until, samples = time.monotonic() + SOAK, []
    visitors = [threading.Thread(target=come_and_go, args=(until,)) for _ in range(3)]
    for thread in visitors:
        thread.start()
    while any(thread.is_alive() for thread in visitors):
        time.sleep(min(60, SOAK / 10))
        samples.append(round(resources(pid)[1]))
    time.sleep(6)
    return {"seconds": SOAK, "memory_mb": samples, "threads_after": resources(pid)[2]}


def main():
    torch.set_num_threads(1)
    port = random.randrange(20_000, 30_000)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    server.start()
    address = f"127.0.0.1:{port}"
    while server.is_alive():
        with contextlib.suppress(OSError):
            visit(address, time.monotonic() + 3)
            break
        time.sleep(0.5)
    else:
        raise checks.BadInput("the page's server ended, see above")
    time.sleep(6)  # until that session has ended
    threads = resources(server.pid)[2]
    rows = [together(address, server.pid, count) for count in SESSIONS]
    said = [f"{'Keep left' if i % 2 else 'Drive slowly'}, {i}." for i in range(SENTENCES)]
    _, latencies = visit(address, time.monotonic() + 10 * SENTENCES * 10 / 25 + 5, said)
    measured = {
        "together": rows,
        "latency_ms": {
            "median": round(1000 * float(np.median(latencies))),
            "worst": round(1000 * max(latencies)),
            "of": len(latencies),
        },
        "soak": soak(address, server.pid) | {"threads_before": threads},
    }
    print(json.dumps(measured, indent=1))
    run_files.write_json(OUTPUT, measured | run_files.run_facts())
    server.terminate()


if __name__ == "__main__":
    checks.run(main)
