"""A name server on loopback that knows one name, as Docker's and Kubernetes' know a service."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dns import flags, message, rdatatype, rrset

NAME = "servers.test"


@dataclass
class Names:
    """What it answers.

    Attributes:
        port: UDP, on 127.0.0.1.
        addresses: of `NAME`; a test changes them.
    """

    port: int
    addresses: list[str] = field(default_factory=list)


@contextmanager
def name_server(addresses: list[str]) -> Iterator[Names]:
    """Answers until the end."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        names = Names(listener.getsockname()[1], addresses)
        thread = threading.Thread(target=_answer, args=(listener, names))
        thread.start()
        try:
            yield names
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
                waker.sendto(b"", ("127.0.0.1", names.port))
            thread.join()


def _answer(listener: socket.socket, names: Names) -> None:
    while True:
        data, sender = listener.recvfrom(4096)
        if not data:
            return
        asked = message.from_wire(data)
        answer = message.make_response(asked)
        answer.flags |= flags.AA
        (question,) = asked.question
        if question.rdtype == rdatatype.A and question.name.to_text(omit_final_dot=True) == NAME and names.addresses:
            answer.answer.append(rrset.from_text(question.name, 1, "IN", "A", *names.addresses))
        listener.sendto(answer.to_wire(), sender)
