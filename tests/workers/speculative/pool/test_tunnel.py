"""Channels in TLS: every frame arrives as in plain text, strangers are refused, and nothing waits."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.tls import DEFAULT_SERVER_NAME, Certificates
from tests.certificates import Authority, serial_of
from tests.workers.speculative.pool.ends import (
    TOKEN,
    VOCAB_SIZE,
    VOCABULARY,
    Counting,
    ScriptedDrafter,
    hello,
    lanes,
    target_of,
    until,
)
from workers.speculative.pool import lane as lane_module
from workers.speculative.pool.channel import LENGTH, MAX_FRAME_BYTES, MAX_UNSENT_BYTES, Channel, wait_for_any
from workers.speculative.pool.client import Pool
from workers.speculative.pool.members import Members
from workers.speculative.pool.server import MAX_STRANGERS, DraftServer
from workers.speculative.pool.tunnel import Tunnel

Ends = tuple[Channel, Channel]


@pytest.fixture
def connect() -> Iterator[Callable[..., Ends]]:
    """Two ends of one connection: the client's and the server's."""
    with ExitStack() as exits:

        def connected(client: Certificates | None, server: Certificates | None) -> Ends:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                near = Channel.connect(f"127.0.0.1:{listener.getsockname()[1]}", client)
                accepted, _ = listener.accept()
            far = Channel.accepted(accepted, server)
            exits.callback(near.close)
            exits.callback(far.close)
            return near, far

        yield connected


@pytest.fixture
def ends(connect: Callable[..., Ends], certificates: Certificates) -> Ends:
    return connect(certificates, certificates)


def pump(ends: Ends, got: dict[Channel, list[bytes]]) -> None:
    for end in ends:
        end.flush()
        got[end] += end.receive()


def exchange(ends: Ends, num_near: int, num_far: int) -> tuple[list[bytes], list[bytes]]:
    """What each end has received when they have this many frames."""
    near, far = ends
    got: dict[Channel, list[bytes]] = {near: [], far: []}

    def has_all() -> bool:
        pump(ends, got)
        return len(got[near]) >= num_near and len(got[far]) >= num_far

    until(has_all, "frames")
    return got[near], got[far]


def await_ends(ends: Ends) -> None:
    def are_closed() -> bool:
        pump(ends, {end: [] for end in ends})
        return not any(end.is_open for end in ends)

    until(are_closed, "the end of both")


def test_frames_come_whole_and_in_order_both_ways(ends: Ends) -> None:
    near, far = ends
    frames = [bytes([number % 256]) * (number % 50) for number in range(500)]
    near.send(b"said before the handshake")
    assert near.has_unsent
    for frame in frames:
        far.send(frame)
    assert exchange(ends, len(frames), 1) == (frames, [b"said before the handshake"])
    assert not near.has_unsent
    assert near.trouble == far.trouble == ""


def test_nothing_goes_over_the_wire_in_plain_text(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        channel = Channel.connect(f"127.0.0.1:{listener.getsockname()[1]}", certificates)
        raw, _ = listener.accept()
    channel.send(b"the session token")
    tunnel, wire = Tunnel(certificates, is_server=True), bytearray()
    raw.settimeout(10)
    said = b""
    while not said:
        wire += (data := raw.recv(1 << 16))
        said, answer = tunnel.unseal(data)
        raw.sendall(answer)
        channel.receive()
    assert b"the session token" in said
    assert b"the session token" not in wire
    channel.close()
    raw.close()


def test_the_largest_frame_passes(ends: Ends) -> None:
    near, _ = ends
    largest = bytes(range(256)) * (MAX_FRAME_BYTES // 256)
    near.send(largest)
    near.send(b"next")
    assert near.is_open
    assert exchange(ends, 0, 2)[1] == [largest, b"next"]


@pytest.mark.parametrize("is_over", [True, False], ids=["after", "before"])
def test_who_never_reads_is_given_up_at_the_bound(ends: Ends, is_over: bool) -> None:
    """After the handshake and before it."""
    near, far = ends
    if is_over:
        far.send(b"hello")
        exchange(ends, 1, 0)
    num_sent = 0
    while near.is_open:
        near.send(bytes(1 << 20))
        num_sent += 1 << 20
        assert num_sent < 3 * MAX_UNSENT_BYTES
    assert num_sent >= MAX_UNSENT_BYTES


def test_a_wait_misses_nothing_that_came_together(ends: Ends) -> None:
    """All that has been decrypted is handed out at once: the socket says all there is to know."""
    near, far = ends
    near.send(b"hello")
    exchange(ends, 0, 1)
    for number in range(100):
        far.send(bytes([number]) * 1000)
    got: list[bytes] = []
    while len(got) < 100:
        wait_for_any([near], 20)
        read = near.receive()
        assert read, "a wait ended, or did not, for nothing"
        got += read
    assert got == [bytes([number]) * 1000 for number in range(100)]


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    """The standard library's own idea of a client."""
    issued = authority.issue("other program")
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    context.load_cert_chain(issued.cert_file, issued.key_file)
    return context


def test_another_implementation_is_understood(certificates: Certificates, context: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        raw = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    channel, answers = Channel.accepted(accepted, certificates), []

    def speak() -> None:
        with context.wrap_socket(raw, server_hostname=DEFAULT_SERVER_NAME) as end:
            end.sendall(LENGTH.pack(3) + b"abc")
            answers.append(end.recv(100))
            with contextlib.suppress(ssl.SSLError):  # it need not say goodbye, too
                end.unwrap()

    thread = threading.Thread(target=speak)
    thread.start()
    got: list[bytes] = []
    until(lambda: got.extend(channel.receive()) or got, "a frame")
    assert got == [b"abc"]
    channel.send(b"de")
    until(lambda: channel.receive() == [] and not channel.is_open, "the end")
    raw.close()
    thread.join()
    assert answers == [LENGTH.pack(2) + b"de"]


PARTS = st.lists(st.builds(lambda part, times: part * times, st.binary(max_size=8), st.integers(0, 1000)), max_size=4)


@settings(deadline=None)
@given(PARTS, PARTS, st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_bytes_may_come_in_any_pieces(
    member: Certificates, up: list[bytes], down: list[bytes], sizes: list[int]
) -> None:
    client, server = Tunnel(member, is_server=False), Tunnel(member, is_server=True)
    to_server, to_client = bytearray(client.seal(b"")), bytearray()
    for part in up:
        to_server += client.seal(part)
    for part in down:
        to_client += server.seal(part)
    said, heard = b"", b""
    pieces = itertools.cycle(sizes)
    while to_server or to_client:
        size = next(pieces)
        opened, answer = server.unseal(bytes(to_server[:size]))
        del to_server[:size]
        said, to_client = said + opened, to_client + answer
        opened, answer = client.unseal(bytes(to_client[:size]))
        del to_client[:size]
        heard, to_server = heard + opened, to_server + answer
    assert (said, heard) == (b"".join(up), b"".join(down))
    assert client.trouble == server.trouble == ""


@pytest.fixture(scope="module")
def member(certificates: Certificates) -> Certificates:
    return certificates


# Strangers


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"))


@pytest.fixture
def strangers(authority: Authority, other: Authority) -> dict[str, Certificates | None]:
    foreign = other.issue("stranger")
    return {
        "none": None,
        "expired": authority.certificates(authority.expired("expired")),
        "other authority": Certificates(foreign.cert_file, foreign.key_file, authority.ca_file, section="cluster.tls"),
        "wrong name": authority.certificates(authority.issue("elsewhere", host="elsewhere.internal")),
    }


CLIENTS = {
    "none": "cannot be trusted (wrong version number)",
    "expired": "cannot be trusted (certificate has expired)",
    "other authority": "cannot be trusted (unable to get local issuer certificate)",
}
SERVERS = {
    "none": "has not greeted within 0.2 s; perhaps one of the two lacks cluster.tls, or hangs",
    "expired": "cannot be trusted (certificate has expired)",
    "other authority": "cannot be trusted (unable to get local issuer certificate)",
    "wrong name": "cannot be trusted (Hostname mismatch, certificate is not valid for 'headwater.internal')",
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "RECONNECT_S", 0.01)
    monkeypatch.setattr(lane_module, "GREETING_S", 0.2)


@pytest.fixture
def server(certificates: Certificates) -> Iterator[tuple[DraftServer, str]]:
    made = DraftServer(
        [Counting()],
        token=TOKEN,
        vocabulary=VOCABULARY,
        vocab_size=VOCAB_SIZE,
        max_sequences=8,
        certificates=certificates,
    )
    yield made, made.start("127.0.0.1")
    made.stop()


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_strange_target_is_refused_and_that_is_said_once(
    server: tuple[DraftServer, str],
    certificates: Certificates,
    strangers: dict[str, Certificates | None],
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, address = server
    lane = lanes(strangers[kind])("0", address, hello())
    until(lambda: lane.receive() == [] and lane.epoch >= 3, "several attempts")
    assert not lane.is_ready
    lane.close()
    said = [record.message for record in caplog.records if record.name.endswith("server")]
    assert said == [f"a target at 127.0.0.1 {CLIENTS[kind]}"]
    with target_of(address, certificates=certificates) as target:
        assert target.frames


def test_a_target_that_is_refused_learns_that_it_is(
    server: tuple[DraftServer, str], strangers: dict[str, Certificates | None], caplog: pytest.LogCaptureFixture
) -> None:
    lane = lanes(strangers["expired"])("0", server[1], hello())
    until(lambda: lane.receive() == [] and lane.epoch >= 3, "several attempts")
    lane.close()
    said = [record.message for record in caplog.records if record.name.endswith("lane")]
    assert len(said) == 1
    assert "refuses this side (ssl" in said[0]
    assert "certificate expired)" in said[0]


@pytest.mark.parametrize("kind", SERVERS)
def test_a_strange_drafter_is_never_spoken_to_and_that_is_said_once(
    certificates: Certificates,
    strangers: dict[str, Certificates | None],
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ScriptedDrafter(certificates=strangers[kind]) as drafter:
        pool = Pool(Members({"0": drafter.address}), hello(), deadline_s=0.002, make_lane=lanes(certificates))
        with contextlib.closing(pool):
            until(lambda: pool.propose([], 1) == [] and pool._lanes["0"].epoch >= 3, "several attempts")
            assert pool.stats.num_drafters == 0
        assert drafter.hellos == []
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert said == [f"the drafter at {drafter.address} {SERVERS[kind]}"]


def test_who_says_nothing_holds_nobody_up(server: tuple[DraftServer, str], certificates: Certificates) -> None:
    """Half a handshake, or none, from many: the latest are kept, and members are served."""
    made, address = server
    host, port = address.split(":")
    begin = Tunnel(certificates, is_server=False).seal(b"")
    with ExitStack() as exits, target_of(address, certificates=certificates) as target:
        for number in range(2 * MAX_STRANGERS):
            raw = exits.enter_context(socket.create_connection((host, int(port))))
            raw.sendall(begin[: number * 20])
            target.ask()
        assert made.stats.num_targets <= MAX_STRANGERS + 1
    made.check()


def test_a_drafter_that_says_nothing_holds_nobody_up(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        pool = Pool(Members({"0": address}), hello(), deadline_s=0.002, make_lane=lanes(certificates))
        with contextlib.closing(pool):
            for _ in range(50):
                assert pool.propose([], 1) == []
            assert pool.stats.num_drafters == 0
            assert pool.stats.wait_s == 0


def test_a_channel_that_is_tampered_with_ends(ends: Ends, certificates: Certificates) -> None:
    client, server = Tunnel(certificates, is_server=False), Tunnel(certificates, is_server=True)
    _, answer = server.unseal(client.seal(b""))
    _, answer = client.unseal(answer)
    server.unseal(answer)
    sealed = bytearray(client.seal(b"a draft"))
    sealed[-1] ^= 1
    assert server.unseal(bytes(sealed))[0] == b""
    assert server.trouble == "cannot be trusted (decryption failed or bad record mac)"


# Rotation


def test_a_new_channel_has_the_new_certificate_and_the_old_one_goes_on(
    authority: Authority, certificates: Certificates, connect: Callable[..., Ends]
) -> None:
    issued, renewed = authority.issue("drafter"), authority.issue("renewed")
    server = authority.certificates(issued)
    before = connect(certificates, server)
    before[0].send(b"one")
    exchange(before, 0, 1)
    first_serial = shown_by(before[1], before[0])
    issued.replace(renewed)
    after = connect(certificates, server)
    after[0].send(b"two")
    exchange(after, 0, 1)
    assert first_serial == issued.serial
    assert shown_by(after[1], after[0]) == renewed.serial
    before[0].send(b"three")
    assert exchange(before, 0, 1)[1] == [b"three"]


def shown_by(server: Channel, client: Channel) -> int:
    assert client._tunnel is not None
    shown = client._tunnel._tls.getpeercert(binary_form=True)
    assert shown is not None
    return serial_of(ssl.DER_cert_to_PEM_cert(shown).encode())
