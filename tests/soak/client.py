"""HTTP as an impatient client does it: connections cut in the middle, and servers that are gone for a while."""

import contextlib
import http.client
import json
import socket
import struct

SECONDS = 30.0  # without a byte, after which a connection counts as dead
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset instead of a farewell


class Unreachable(Exception):  # noqa: N818 - no error: servers that are killed are what this is about
    """Nobody answered, or not to the end. Whether the request was heard is not known."""


def request(port, method, path, body=None, headers=()):
    """Status and body of an answer; a `dict` as body is sent as JSON."""
    with _connection(port) as connection:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
        answer = connection.getresponse()
        return answer.status, answer.read()


def cut_download(port, path, after):
    """The first `after` bytes of an answer, then the connection is reset."""
    with _connection(port) as connection:
        connection.request("GET", path)
        data = connection.getresponse().read(after)
        _reset(connection)
        return data


def events(port, path, most=None):
    """Names and data of server-sent events as they come; after `most` of them the connection is reset."""
    with _connection(port) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        if answer.status != 200:
            return
        name, count = "", 0
        while line := answer.readline():
            head, _, rest = line.decode().rstrip("\n").partition(": ")
            if head == "event":
                name = rest
            elif head == "data":
                yield name, json.loads(rest)
                count += 1
                if count == most:
                    _reset(connection)
                    return


def cut_request(port, path, body):
    """Half a request, then a reset: nothing may come of it."""
    with _connection(port) as connection:
        data = json.dumps(body).encode()
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data[: len(data) // 2])
        _reset(connection)


@contextlib.contextmanager
def _connection(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        yield connection
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of a file that is closed by then
        raise Unreachable(str(error)) from error
    finally:
        connection.close()


def _reset(connection):
    if connection.sock is not None:  # an answer that was read to its end closes it by itself
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()
