#!/usr/bin/python3
"""Packets as judges: `probe.py serve` tells each TCP caller its address as seen from here;
`probe.py ask ADDRESS [SOURCE]` calls such a server, from SOURCE if given, and prints what it says;
`probe.py watch ADDRESS` calls it ten times a second, and prints a line when answers stop or start:
"silent" or "answers", and the seconds since it last heard something.
"""

from __future__ import annotations

import select
import socket
import sys
import time

PORT = 7
PATIENCE = 5.0  # seconds until a connection counts as failed
PACE = 0.1  # seconds between the calls of `watch`, and how long one of them waits


def serve() -> None:
    listeners = [socket.create_server(("", PORT), family=socket.AF_INET, backlog=128)]
    listeners.append(socket.create_server(("", PORT), family=socket.AF_INET6, backlog=128))
    print("ready", flush=True)
    while True:
        for listener in select.select(listeners, [], [])[0]:
            connection, peer = listener.accept()
            with connection:
                connection.sendall(peer[0].encode())


def call(address: str, source: str | None = None, patience: float = PATIENCE) -> str:
    bound = (source, 0) if source else None
    with socket.create_connection((address, PORT), patience, source_address=bound) as connection:
        return connection.recv(100).decode()


def watch(address: str) -> None:
    heard, said = time.monotonic(), ""
    while True:
        try:
            call(address, patience=PACE)
            now = "answers"
        except OSError:
            now = "silent"
        if now != said:
            print(now, round(time.monotonic() - heard, 1), flush=True)
        if now == "answers":
            heard = time.monotonic()
            time.sleep(PACE)
        said = now


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    if sys.argv[1] == "watch":
        watch(sys.argv[2])
    try:
        print(call(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
    except OSError as error:
        sys.exit(f"probe.py: {error}")
