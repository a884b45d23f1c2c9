#!/usr/bin/python3
"""Packets as judges: `probe.py serve` tells each TCP caller its address as seen from here;
`probe.py ask ADDRESS [SOURCE]` calls such a server, from SOURCE if given, and prints what it says;
`probe.py ask-each ADDRESS SOURCE [ADDRESS SOURCE]...` makes all these calls, and prints a line for
each, empty where nobody answers;
`probe.py watch ADDRESS` calls it ten times a second, and prints a line when answers stop or start:
"silent" or "answers", and the seconds since it last heard something.
"""

from __future__ import annotations

import select
import socket
import sys
import time

PORT = 7
PATIENCE = 20.0  # seconds until a connection counts as failed; a virtual machine may need many
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


def ask_each(addresses: list[str], sources: list[str]) -> None:
    for address, source in zip(addresses, sources):
        try:
            print(call(address, source))
        except OSError:
            print()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    if sys.argv[1] == "watch":
        watch(sys.argv[2])
    if sys.argv[1] == "ask-each":
        ask_each(sys.argv[2::2], sys.argv[3::2])
        sys.exit()
    try:
        print(call(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
    except OSError as error:
        sys.exit(f"probe.py: {error}")
