"""Ports of tests: never one that the kernel may give to a connection, never twice."""
import socket

from tests.ports import LOCAL_RANGE, LOWEST, candidates, free_port


def test_candidates_lie_outside_of_the_kernels_range():
    assert candidates(32_768, 60_999) == [*range(LOWEST, 32_768), *range(61_000, 65_536)]
    assert candidates(1_024, 65_535) == [*range(LOWEST, 65_536)]


def test_ports_differ_and_can_be_listened_on():
    ports = [free_port() for _ in range(20)]
    first, last = map(int, LOCAL_RANGE.read_text().split())
    assert len({*ports}) == 20 and {*ports} <= {*candidates(first, last)}
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("", port))
            listener.listen()
