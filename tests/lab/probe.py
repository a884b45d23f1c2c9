#!/usr/bin/python3
"""Packets as judges: `probe.py serve` tells each TCP caller its address as seen from here;
`probe.py ask ADDRESS [SOURCE]` calls such a server, from SOURCE if given, and prints what it says.
"""

from __future__ import annotations

import select
import socket
import sys

PORT = 7
PATIENCE = 2.0  # seconds until a connection counts as failed


def serve() -> None:
    listeners = [socket.create_server(("", PORT), family=socket.AF_INET, backlog=128)]
    listeners.append(socket.create_server(("", PORT), family=socket.AF_INET6, backlog=128))
    print("ready", flush=True)
    while True:
        for listener in select.select(listeners, [], [])[0]:
            connection, peer = listener.accept()
            with connection:
                connection.sendall(peer[0].encode())


def ask(address: str, source: str | None) -> None:
    bound = (source, 0) if source else None
    with socket.create_connection((address, PORT), PATIENCE, source_address=bound) as connection:
        print(connection.recv(100).decode())


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    try:
        ask(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
    except OSError as error:
        sys.exit(f"probe.py: {error}")
