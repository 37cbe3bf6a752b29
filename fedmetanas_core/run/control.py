"""Two questions to a SuperLink on this machine: are you up, and how is the run?

`flwr list` takes seconds of processor time for each answer, because a Python with all of Flower starts; this takes
milliseconds, so it can be asked every second while clients train. The messages are protobuf (flwr/proto/control.proto
and run.proto of Flower 1.41), and only a few fields of them are needed.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator

from fedmetanas_core.errors import RunFailedError

_RUN_ID = 1  # ListRunsRequest.run_id
_RUN_ENTRY, _ENTRY_VALUE = 1, 2  # ListRunsResponse.run_dict is a list of (key, value) messages
_RUN_STATUS = 10  # Run.status
_STATUS, _SUB_STATUS, _DETAILS = 1, 2, 3  # fields of RunStatus


class ControlApi:
    """The Control API of a SuperLink on this machine without TLS. Every method raises OSError if nobody answers."""

    def __init__(self, port: int, timeout_s: float = 10.0) -> None:
        self._port = port
        self._timeout_s = timeout_s

    def is_healthy(self) -> bool:
        """True once the SuperLink accepts requests."""
        try:
            return self._request("GET", "/health", b"")[0] == 200
        except OSError:
            return False

    def run_status(self, run_id: int) -> tuple[str, str]:
        """(status, details): pending, starting, running, or finished:completed, :failed or :stopped."""
        answer = self._post("/v1/control/list-runs", _number_field(_RUN_ID, run_id))
        for entry in _fields(answer, _RUN_ENTRY):
            for run in _fields(entry, _ENTRY_VALUE):
                for state in _fields(run, _RUN_STATUS):
                    parts = [b"".join(_fields(state, field)).decode() for field in (_STATUS, _SUB_STATUS, _DETAILS)]
                    return ":".join(filter(None, parts[:2])), parts[2]
        raise RunFailedError(f"the SuperLink knows no run {run_id}")

    def _post(self, path: str, body: bytes) -> bytes:
        code, answer = self._request("POST", path, body)
        if code >= 500:
            raise ConnectionError(f"the SuperLink answered {path} with {code}")
        if code != 200:
            raise RunFailedError(f"the SuperLink refused {path} ({code}): {answer[:300].decode(errors='replace')}")
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        # Not urllib: a proxy in the environment must not see a request to this machine.
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout_s)

    def _request(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        connection = self._connection()
        try:
            media = "application/protobuf"
            connection.request(method, path, body or None, {"content-type": media, "accept": media})
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"no proper answer on port {self._port}: {error!r}") from error
        finally:
            connection.close()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number_field(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise RunFailedError("the SuperLink's answer ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes, wanted: int) -> Iterator[bytes]:
    """The contents of every length-delimited field number `wanted` (strings and messages) of one message."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _read_varint(data, at)
        elif kind == 2:
            size, at = _read_varint(data, at)
            if tag >> 3 == wanted:
                yield data[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise RunFailedError(f"the SuperLink's answer is not the protobuf of Flower 1.41 (wire type {kind})")
