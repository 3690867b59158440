"""No test is on the network, nor is a Python that it starts; what is marked `sockets` reaches 127.0.0.1 alone."""

import socket
import subprocess
import sys
import urllib.request

import pytest
from refusals import take_refused

CONNECT = "import socket; socket.create_connection(({host!r}, 9), timeout=1)"


@pytest.fixture
def refused():
    """What was refused, which is no fault in these tests."""
    yield take_refused
    take_refused()


@pytest.mark.parametrize(
    "ask",
    [
        lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
        lambda: socket.getaddrinfo("localhost", 80),
        lambda: socket.gethostbyname("example.org"),
        lambda: socket.socket().bind(("127.0.0.1", 0)),
        lambda: socket.socket(socket.AF_INET6).bind(("::1", 0)),
        lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 53)),
        lambda: urllib.request.urlopen("http://example.org", timeout=1),
    ],
)
def test_a_socket_is_refused_and_written_down(ask, refused):
    with pytest.raises(Exception, match="tests open no socket"):
        ask()
    assert len(refused()) == 1


def test_what_catches_the_refusal_is_found_out(refused):
    with pytest.raises(Exception, match="tests open no socket"):
        socket.getaddrinfo("example.org", 80)
    assert refused() == ["socket.getaddrinfo example.org"]


def test_a_process_that_a_test_starts_is_refused_too(refused):
    result = subprocess.run([sys.executable, "-c", CONNECT.format(host="192.0.2.1")], capture_output=True, text=True)
    assert result.returncode and "tests open no socket" in result.stderr
    assert refused() == ["socket.getaddrinfo 192.0.2.1"]


def test_sockets_that_are_files_are_not(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX) as here:
        monkeypatch.chdir(tmp_path)  # an address has a hundred letters at most
        here.bind("here")
        here.listen()
        with socket.socket(socket.AF_UNIX) as there:
            there.connect("here")


@pytest.mark.sockets
def test_marked_tests_reach_this_machine_alone(refused):
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        here.listen()
        port = here.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        code = CONNECT.format(host="localhost").replace(" 9)", f" {port})")
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
        assert not refused()
        for address in (("192.0.2.1", 9), ("example.org", 80)):
            with pytest.raises(Exception, match="tests open no socket"):
                socket.create_connection(address, timeout=1)
