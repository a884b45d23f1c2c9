#!/usr/bin/python3
"""One end of many connections, for judging routes by packets (tests/lab/world.py).

It answers at three ports, and makes the calls that each line of standard input lists in JSON:

    [[address, source or null, port, seconds], ...]

All calls of a line are made at once. The reply is a line of JSON: what each call has read, empty
where no connection came about.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from typing import Any

ECHO = 7  # tells the caller its address, as seen from here
BULK = 19  # sends more than one window of full segments
COUNT = 9  # reads as much, and says how much came
BULK_SIZE = 300_000


def answer(connection: socket.socket, peer: str, port: int) -> None:
    connection.settimeout(20)
    with connection:
        try:
            if port == ECHO:
                connection.sendall(peer.encode())
            elif port == BULK:
                connection.sendall(b"x" * BULK_SIZE)
            else:
                connection.sendall(str(read_all(connection)).encode())
        except OSError:
            return  # the caller has lost its patience


def read_all(connection: socket.socket) -> int:
    size = 0
    while size < BULK_SIZE:
        block = connection.recv(65536)
        if not block:
            break
        size += len(block)
    return size


def listen(family: socket.AddressFamily, port: int) -> None:
    listener = socket.create_server(("", port), family=family, backlog=128)

    def serve() -> None:
        while True:
            connection, peer = listener.accept()
            thread = threading.Thread(target=answer, args=(connection, peer[0], port), daemon=True)
            thread.start()

    threading.Thread(target=serve, daemon=True).start()


def call(address: str, source: str | None, port: int, seconds: float) -> str:
    bound = (source, 0) if source else None
    try:
        with socket.create_connection((address, port), seconds, source_address=bound) as connection:
            if port == BULK:
                return str(read_all(connection))
            if port == COUNT:
                connection.sendall(b"x" * BULK_SIZE)
            return connection.recv(100).decode()
    except OSError:
        return ""


def call_all(calls: list[Any]) -> list[str]:
    replies = [""] * len(calls)

    def make(number: int) -> None:
        replies[number] = call(*calls[number])

    threads = [threading.Thread(target=make, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


if __name__ == "__main__":
    for port in (ECHO, BULK, COUNT):
        listen(socket.AF_INET, port)
        listen(socket.AF_INET6, port)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(call_all(json.loads(line))), flush=True)
