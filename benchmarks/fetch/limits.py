"""What this machine could do at most: bytes from a socket to the disk, decoded, or written, and nothing else done."""

import os
import socket
import threading
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from benchmarks.fetch.data import MIB
from benchmarks.fetch.job import Job, NotThisCase
from benchmarks.fetch.server import BUCKET


def raw_sockets(job: Job) -> Callable[[], None]:
    """Return the limit of the network path: four sockets, ``recv_into`` and ``pwrite``, nothing checked."""
    if job.case != "file":
        raise NotThisCase
    size = job.source.stat().st_size
    url = urlsplit(job.endpoint)

    def part(descriptor: int, start: int, end: int) -> None:
        with socket.create_connection((url.hostname, url.port)) as link:
            text = f"GET /{BUCKET}/{job.key} HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{end - 1}\r\n\r\n"
            link.sendall(text.encode())
            buffer = bytearray(256 * 1024)
            view = memoryview(buffer)
            got = link.recv_into(view)
            at = start
            begin = buffer.index(b"\r\n\r\n") + 4
            while True:
                os.pwrite(descriptor, view[begin:got], at)
                at += got - begin
                if at >= end:
                    return
                begin, got = 0, link.recv_into(view)

    def run() -> None:
        descriptor = os.open(job.target / job.key, os.O_WRONLY | os.O_CREAT)
        step = -(-size // 4)
        bounds = [(start, min(start + step, size)) for start in range(0, size, step)]
        threads = [threading.Thread(target=part, args=(descriptor, *bound)) for bound in bounds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(descriptor)

    return run


def decode_zlib(job: Job) -> Callable[[], None]:
    """Return the limit of unpacking with the standard library: gzip decoded from memory, kept nowhere."""
    return _decode_alone(job, zlib.decompressobj)


def decode_isal(job: Job) -> Callable[[], None]:
    """Return the same with isal, which the extra brings."""
    from isal import isal_zlib  # noqa: PLC0415 - the row's own

    return _decode_alone(job, isal_zlib.decompressobj)


def decode_zlib_ng(job: Job) -> Callable[[], None]:
    """Return the same with zlib-ng."""
    from zlib_ng import zlib_ng  # noqa: PLC0415 - the row's own

    return _decode_alone(job, zlib_ng.decompressobj)


def _decode_alone(job: Job, make: Callable[[int], Any]) -> Callable[[], None]:
    if job.case != "archive":
        raise NotThisCase

    def run() -> None:
        decoder = make(31)
        with job.source.open("rb", buffering=0) as stored:
            data = stored.read(256 * 1024)
            while data:
                decoder.decompress(data, MIB)
                data = decoder.unconsumed_tail or stored.read(256 * 1024)

    return run


def write_alone(job: Job) -> Callable[[], None]:
    """Return the limit of the disk: the same bytes from memory, to as many files."""
    files = [job.source] if job.case != "folder" else sorted(job.source.iterdir())
    if job.case == "archive":
        raise NotThisCase  # the decoder is the limit there
    blocks = [path.read_bytes() for path in files[:1]]

    def run() -> None:
        for path in files:
            with (job.target / path.name).open("wb", buffering=0) as out:
                view = memoryview(blocks[0])
                while view:
                    view = view[out.write(view[: 4 * MIB]) :]

    return run
