#!/usr/bin/env python3
"""awsproxy: see each AWS call, check its signature, and answer it.

AWS clients (the command line, every SDK, `curl --aws-sigv4`) sign their HTTP requests
with Signature Version 4.  This one file stands where AWS would stand: it verifies the
signature as strictly as AWS does, finds out which operation is meant, and answers Amazon
SQS itself from memory, in JSON or in XML as the request asks.

Run it, and call it with the AWS command line:

    python awsproxy.py --port 8081
    aws --endpoint-url http://localhost:8081 sqs create-queue --queue-name jobs

Learn Signature Version 4 with curl; change any signed header and read the refusal:

    curl localhost:8081 --aws-sigv4 aws:amz:us-east-1:sqs --user dummykey:dummysecret \\
         -H 'X-Amz-Target: AmazonSQS.ListQueues' -d '{}'

Use it from a test, without a socket:

    proxy = awsproxy.Proxy(awsproxy.DEMO_CLIENTS)
    reply = proxy.handle(awsproxy.Request("POST", "/", headers, io.BytesIO(body)))

What happens to a call:

    socket -> Request -> verify -> Call -> Sqs -+
              (wire)     (who?)    (what?)      |
    socket <- Reply  <--------------------------+-- error, in the caller's own protocol

The chapters, each using only earlier ones:

    1  Messages              Request, Call, Reply, ServiceError
    2  HTTP/1.1 framing      parse_head, body_framing, chunked decoding
    3  Signature Version 4   parse, canonicalize, verify
    4  Wire protocols        AWS JSON, AWS Query, REST
    5  SQS in memory         Queue, Message, Sqs, OPERATIONS
    8  The proxy             Proxy.handle, AccessLog
    9  The server            RequestHandler, Server
    10 Command line          build_parser, main

Chapters 1 to 4 are pure: bytes in, bytes out, the time an argument.  The names in
`__all__` are what the README shows and what stays; everything else may change.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import collections
import configparser
import datetime
import email.utils
import functools
import hashlib
import heapq
import hmac
import http.client
import http.server
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import shlex
import signal
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Protocol,
    Sequence,
    Set,
    Tuple,
    Union,
)
from xml.sax.saxutils import escape

__version__ = "0.1.0"
__all__ = ["DEMO_CLIENTS", "Client", "Proxy", "Reply", "Request", "Server", "ServiceError", "main"]

log = logging.getLogger("awsproxy")


# ==== 1. Messages: Request, Call, Reply, ServiceError ====
#
# Request and Reply are HTTP and know nothing of AWS; Call is a Request that has been
# understood.  All are immutable: a stage makes a new value or raises ServiceError.

Headers = Tuple[Tuple[str, str], ...]  # wire order, wire case, repeats kept, text is latin-1


class Body(Protocol):
    """A request body: any binary reader."""

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, all that is left if negative, b"" at the end."""


def _present() -> bool:
    return False


@dataclass(frozen=True)
class Request:
    """An HTTP request as it arrived: nothing decoded, nothing merged, the body unread.

    `target` is the raw request target; text is latin-1, so that encoding it as latin-1
    gives back the bytes that were signed.  `peer` is the client's address.  `abandoned()`
    tells whether the client has gone away in the meantime.
    """

    method: str
    target: str
    headers: Headers
    body: Body
    peer: str = ""
    abandoned: Callable[[], bool] = _present

    def __repr__(self) -> str:
        return f"Request({self.method!r}, {self.path!r})"  # the rest may hold what signs

    @cached_property
    def fields(self) -> Mapping[str, List[str]]:
        """The header values under each name in lower case, in the order received."""
        fields: Dict[str, List[str]] = {}
        for name, value in self.headers:
            fields.setdefault(name.lower(), []).append(value)
        return fields

    def header(self, name: str) -> Optional[str]:
        """Return the first value of the header of this name (in lower case), or None."""
        values = self.fields.get(name)
        return values[0] if values else None

    @property
    def path(self) -> str:
        """The target up to its first question mark, still percent-encoded."""
        return self.target.partition("?")[0]

    @cached_property
    def query(self) -> Sequence[Tuple[bytes, bytes]]:
        """The decoded (name, value) pairs of the query string, in order, repeats kept.

        `k` alone means `k=`; `+` is a space, as AWS reads it.
        Raises ServiceError MalformedQueryString for a `%` that two hex digits don't follow.
        """
        text = self.target.partition("?")[2]
        if not text:
            return ()
        if BROKEN_ESCAPE.search(text):
            raise ServiceError("MalformedQueryString", "The query string has a broken escape.")
        raw = text.replace("+", " ").encode("latin-1")
        parts = (part.partition(b"=") for part in raw.split(b"&") if part)
        unquote = urllib.parse.unquote_to_bytes
        return [(unquote(name), unquote(value)) for name, _, value in parts]


BROKEN_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")


class Reply(NamedTuple):
    """An HTTP response ready to send, but for its framing headers and its date."""

    status: int
    headers: Headers
    body: bytes


class Client(NamedTuple):
    """A key that callers may sign with, and the name and the account it stands for."""

    name: str
    access_key_id: str
    secret_access_key: str
    session_token: str = ""
    account_id: str = ""  # "" is the account of the proxy

    def __repr__(self) -> str:
        return f"Client({self.name!r}, {self.access_key_id!r})"


Clients = Mapping[str, Sequence[Client]]  # by access key id; same id, other token: another row


@dataclass(frozen=True)
class Call:
    """A Request that has been understood: which operation, with what input, by whom.

    `input` is keyed as the service's model spells its members, whichever the wire protocol.
    """

    request: Request
    service: str
    operation: str
    input: Mapping[str, Any]
    region: str
    caller: Client
    base_url: str = ""  # what a QueueUrl begins with

    @property
    def action(self) -> str:
        """The operation as IAM policies spell it, such as `sqs:SendMessage`."""
        return f"{self.service}:{self.operation}"


class Fault(NamedTuple):
    """How an error is spelled: its HTTP status, its code in XML, its `__type` in JSON."""

    status: int
    code: str
    type: str


def _framework(status: int, code: str, shape: str = "") -> Fault:
    return Fault(status, code, f"com.amazon.coral.service#{shape or code + 'Exception'}")


def _modelled(status: int, shape: str, code: str = "") -> Fault:
    return Fault(status, code or shape, f"com.amazonaws.sqs#{shape}")


_SQS = "AWS.SimpleQueueService."


def _prefixed(shape: str, status: int = 400) -> Fault:
    return _modelled(status, shape, _SQS + shape)


# Statuses and spellings: the SQS service model, and answers recorded from AWS.
ERRORS: Mapping[str, Fault] = {
    # HTTP framing; nothing in AWS's models names these.
    "BadRequest": _framework(400, "BadRequest"),
    "ExpectationFailed": _framework(417, "ExpectationFailed"),
    "IncompleteBody": _framework(400, "IncompleteBody"),
    "RequestEntityTooLarge": _framework(413, "RequestEntityTooLarge"),
    "RequestHeaderFieldsTooLarge": _framework(431, "RequestHeaderFieldsTooLarge"),
    "RequestTimeout": _framework(408, "RequestTimeout"),
    # Authentication ("Common Error Types" of each API reference).
    "AccessDenied": _framework(403, "AccessDenied"),
    "IncompleteSignature": _framework(400, "IncompleteSignature"),
    "InvalidClientTokenId": _framework(403, "InvalidClientTokenId", "UnrecognizedClientException"),
    "MalformedQueryString": _framework(400, "MalformedQueryString"),
    "MissingAuthenticationToken": _framework(403, "MissingAuthenticationToken"),
    "SignatureDoesNotMatch": _framework(403, "SignatureDoesNotMatch", "InvalidSignatureException"),
    # The same from Amazon S3 ("Error responses" of its API reference).
    "AuthorizationHeaderMalformed": _framework(400, "AuthorizationHeaderMalformed"),
    "AuthorizationQueryParametersError": _framework(400, "AuthorizationQueryParametersError"),
    "InvalidAccessKeyId": _framework(403, "InvalidAccessKeyId"),
    "InvalidArgument": _framework(400, "InvalidArgument"),
    "InvalidRequest": _framework(400, "InvalidRequest"),
    "InvalidToken": _framework(400, "InvalidToken"),
    "InvalidURI": _framework(400, "InvalidURI"),
    "NotImplemented": _framework(501, "NotImplemented"),
    "RequestTimeTooSkewed": _framework(403, "RequestTimeTooSkewed"),
    "XAmzContentSHA256Mismatch": _framework(400, "XAmzContentSHA256Mismatch"),
    # Dispatch and decoding.
    "InternalFailure": _framework(500, "InternalFailure", "InternalFailure"),
    "InvalidAction": _framework(400, "InvalidAction", "UnknownOperationException"),
    "InvalidParameterValue": _framework(400, "InvalidParameterValue"),
    "MissingParameter": _framework(400, "MissingParameter", "MissingRequiredParameterException"),
    "SerializationException": _framework(400, "MalformedInput", "SerializationException"),
    "UnknownOperation": _framework(404, "UnknownOperation", "UnknownOperationException"),
    # Modelled by Amazon SQS.
    "InvalidAttributeName": _modelled(400, "InvalidAttributeName"),
    "InvalidAttributeValue": _modelled(400, "InvalidAttributeValue"),
    "BatchEntryIdsNotDistinct": _prefixed("BatchEntryIdsNotDistinct"),
    "BatchRequestTooLong": _prefixed("BatchRequestTooLong"),
    "EmptyBatchRequest": _prefixed("EmptyBatchRequest"),
    "InvalidBatchEntryId": _prefixed("InvalidBatchEntryId"),
    "InvalidMessageContents": _modelled(400, "InvalidMessageContents"),
    "OverLimit": _modelled(403, "OverLimit"),
    "PurgeQueueInProgress": _prefixed("PurgeQueueInProgress", 403),
    "QueueDeletedRecently": _prefixed("QueueDeletedRecently"),
    "QueueDoesNotExist": _modelled(400, "QueueDoesNotExist", _SQS + "NonExistentQueue"),
    "QueueNameExists": _modelled(400, "QueueNameExists", "QueueAlreadyExists"),
    "ReceiptHandleIsInvalid": _modelled(404, "ReceiptHandleIsInvalid"),
    "ResourceNotFoundException": _modelled(404, "ResourceNotFoundException"),
    "TooManyEntriesInBatchRequest": _prefixed("TooManyEntriesInBatchRequest"),
    "UnsupportedOperation": _prefixed("UnsupportedOperation"),
}


class ServiceError(Exception):
    """Any answer that is not success; the caller's wire protocol renders it.

    `code` is a key of ERRORS (KeyError otherwise).  `detail` holds further elements that
    Amazon S3 puts into its error document, by name.
    """

    def __init__(self, code: str, message: str, **detail: str) -> None:
        super().__init__(message)
        self.code = code
        self.fault = ERRORS[code]
        self.message = message
        self.detail = detail


# ==== 2. HTTP/1.1 framing: parse_head, body_framing, LengthBody, ChunkedBody ====
#
# http.server's own parser rewrites a target that begins with `//` (cpython#99220), reads a
# bare CR as the end of a header line and drops what follows a malformed one.  A verifier
# needs the bytes that were signed, and a proxy that guesses where a request ends can be
# made to read one request as two.  So a head is parsed here, strictly (RFC 9112), and what
# cannot be framed beyond doubt is refused.

MAX_HEAD = 65536  # bytes, request line and blank line included
MAX_HEADERS = 100
CRLF = "\r\n"

_TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([^\0- \x7f]+) HTTP/1\.([01])")
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\0-\x08\n-\x1f\x7f]*)")
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%-]+(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")
_DIGITS = re.compile("[0-9]{1,18}")
_CHUNKED = re.compile("(?ai:chunked)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})([ \t]*;[\t -~\x80-\xff]*)?\r\n")

# What is wrong with a line that _FIELD_LINE does not match; the first that applies.
_FIELD_FAULTS = tuple(
    (re.compile(pattern), fault)
    for pattern, fault in (
        ("\0", "a NUL"),
        ("\r", "a CR that no LF follows"),
        ("\n", "a LF that no CR precedes"),
        ("^[ \t]", "a continued (folded) header line"),
        ("^[^:]*$", "a header line without a colon"),
        ("^[^:]*[ \t]:", "a blank before the colon of a header line"),
        (f"^(?!{_TOKEN}:)", "a header name that is not a token"),
        ("", "a control character in a header value"),
    )
)


class Head(NamedTuple):
    """A request line and its header lines."""

    method: str
    target: str
    version: str  # "1.0" or "1.1"
    headers: Headers


def parse_head(raw: bytes) -> Head:
    """Return the parts of a request head, given with its final blank line.

    The target is kept to the byte.  Raises ServiceError BadRequest, or
    RequestHeaderFieldsTooLarge for more than MAX_HEAD bytes or MAX_HEADERS lines (RFC 9112, 2 to
    5; 3.2.2's absolute-form is refused, as AWS does).
    """
    if len(raw) > MAX_HEAD:
        raise ServiceError(
            "RequestHeaderFieldsTooLarge", f"The request head is longer than {MAX_HEAD} bytes."
        )
    text = raw.decode("latin-1")
    if not text.endswith(CRLF + CRLF):
        raise ServiceError("BadRequest", "The request head does not end with CR LF CR LF.")
    request_line, *lines = text[:-4].split(CRLF)
    match = _REQUEST_LINE.fullmatch(request_line)
    if not match:
        raise ServiceError("BadRequest", "The request line is not 'METHOD /target HTTP/1.1'.")
    method, target, minor = match.groups()
    if not target.startswith("/") or "#" in target:
        raise ServiceError(
            "BadRequest", "The request target must be a path, with a query or none (origin-form)."
        )
    if len(lines) > MAX_HEADERS:
        raise ServiceError(
            "RequestHeaderFieldsTooLarge", f"A request may have {MAX_HEADERS} header lines."
        )
    headers = []
    hosts = 0
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if not match:
            fault = next(fault for pattern, fault in _FIELD_FAULTS if pattern.search(line))
            raise ServiceError("BadRequest", f"The request head contains {fault}.")
        name, value = match.groups()
        value = value.strip(" \t")
        headers.append((name, value))
        if len(name) == 4 and name.lower() == "host":
            hosts += 1
            if not _HOST.fullmatch(value):
                raise ServiceError("BadRequest", "The Host header is not a host and port.")
    if hosts > 1 or (not hosts and minor == "1"):
        raise ServiceError("BadRequest", "The request must have one Host header.")
    return Head(method, target, "1." + minor, tuple(headers))


_REFUSED_LINE = re.compile(rf"({_TOKEN}) (/[^\0- \x7f]*)?")
_REFUSED_FIELDS = re.compile("^([A-Za-z0-9-]+):[ \t]*([^\0\r\n]*)", re.MULTILINE)


def salvage_head(raw: bytes) -> Head:
    """Return what can be told of a head that was refused, so as to refuse it in its protocol."""
    text = raw.decode("latin-1")
    line = _REFUSED_LINE.match(text)
    fields = _REFUSED_FIELDS.findall(text)[:MAX_HEADERS]
    return Head(line[1] if line else "", (line and line[2]) or "/", "1.0", tuple(fields))


def asks_to_close(request: Request) -> bool:
    """Whether the connection is to end with the answer (RFC 9112, 9.6)."""
    values = request.fields.get("connection", ())
    return any("close" in map(str.strip, value.lower().split(",")) for value in values)


def expects_continue(head: Head) -> bool:
    """Whether the client waits for `100 Continue` before it sends the body (RFC 9110, 10.1.1).

    Raises ServiceError ExpectationFailed for anything else that it expects.
    """
    expected = [value.lower() for name, value in head.headers if name.lower() == "expect"]
    if head.version == "1.0" or not expected:
        return False
    if set(expected) != {"100-continue"}:
        raise ServiceError("ExpectationFailed", "The only Expect is 100-continue.")
    return True


def body_framing(head: Head, max_body: int) -> Optional[int]:
    """Return how many bytes of body follow the head, None if they come chunked.

    Raises ServiceError BadRequest where two readers could disagree about the end of the
    body (RFC 9112, 6.1 to 6.3), RequestEntityTooLarge for a length above `max_body`.
    """
    lengths, codings = [], []
    for name, value in head.headers:
        if len(name) in (14, 17):
            lower = name.lower()
            if lower == "content-length":
                lengths.append(value)
            elif lower == "transfer-encoding":
                codings.append(value)
    if codings:
        if head.version == "1.0":
            raise ServiceError("BadRequest", "HTTP/1.0 knows no Transfer-Encoding.")
        if lengths:
            raise ServiceError(
                "BadRequest", "A request has Content-Length or Transfer-Encoding, not both."
            )
        if len(codings) > 1 or not _CHUNKED.fullmatch(codings[0]):
            raise ServiceError("BadRequest", "The only Transfer-Encoding understood is 'chunked'.")
        return None
    if not lengths:
        return 0
    if len(set(lengths)) > 1 or not _DIGITS.fullmatch(lengths[0]):
        raise ServiceError("BadRequest", "Content-Length must be one decimal number.")
    length = int(lengths[0])
    if length > max_body:
        raise _too_large(max_body)
    return length


def _too_large(max_body: int) -> ServiceError:
    return ServiceError(
        "RequestEntityTooLarge", f"The request body is longer than {max_body} bytes."
    )


class Source(Protocol):
    """Where a body is read from: a buffered binary stream."""

    def read(self, size: int = -1) -> bytes:
        """As io.BufferedIOBase.read."""

    def readline(self, size: int = -1) -> bytes:
        """As io.IOBase.readline."""


class LengthBody:
    """A body of a known number of bytes.

    `begin` is called before the first byte is read, so that `100 Continue` is sent only
    once the body is wanted.  `unread` tells whether the stream still holds some of it.
    """

    def __init__(
        self, source: Source, length: int, begin: Optional[Callable[[], None]] = None
    ) -> None:
        self._source = source
        self._left = length
        self._begin = begin

    @property
    def unread(self) -> bool:
        """Whether bytes of this body are still in the stream."""
        return self._left > 0

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, all if negative; ServiceError IncompleteBody if too few."""
        if self._begin and self._left:
            self._begin()
            self._begin = None
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._source.read(wanted) if wanted else b""
        self._left -= len(data)
        if len(data) < wanted:
            raise ServiceError("IncompleteBody", "The request body ended before its length.")
        return data


class ChunkedBody:
    """A body in the chunked coding (RFC 9112, 7.1), of `limit` bytes at the most.

    Chunk extensions and trailers are read and dropped.  Raises ServiceError BadRequest for
    anything but the grammar, RequestEntityTooLarge, IncompleteBody.
    """

    def __init__(
        self, source: Source, limit: int, begin: Optional[Callable[[], None]] = None
    ) -> None:
        self._source = source
        self._limit = self._room = limit
        self._begin = begin
        self._left = 0  # bytes left of the present chunk
        self.unread = True

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes of the decoded body, all if negative, b"" at its end."""
        if self._begin:
            self._begin()
            self._begin = None
        parts = []
        while self.unread and size:
            if not self._left and not self._next_chunk():
                break
            wanted = self._left if size < 0 else min(size, self._left)
            data = self._source.read(wanted)
            if len(data) < wanted:
                raise ServiceError("IncompleteBody", "The request body ended within a chunk.")
            parts.append(data)
            self._left -= wanted
            size -= wanted if size > 0 else 0
            if not self._left and self._line() != b"\r\n":
                raise ServiceError("BadRequest", "A chunk is longer than its size.")
        return b"".join(parts)

    def _next_chunk(self) -> bool:
        match = _CHUNK_SIZE.fullmatch(self._line())
        if not match:
            raise ServiceError("BadRequest", "A chunk does not begin with its size in hex.")
        self._left = int(match[1], 16)
        self._room -= self._left
        if self._room < 0:
            raise _too_large(self._limit)
        if not self._left:
            self._skip_trailers()
            self.unread = False
        return self.unread

    def _skip_trailers(self) -> None:
        for _ in range(MAX_HEADERS + 1):
            line = self._line().decode("latin-1")
            if line == CRLF:
                return
            if not line.endswith(CRLF) or not _FIELD_LINE.fullmatch(line[:-2]):
                raise ServiceError("BadRequest", "A trailer is not a header line.")
        raise ServiceError("RequestHeaderFieldsTooLarge", "The body has too many trailers.")

    def _line(self) -> bytes:
        line = self._source.readline(4096)
        if not line:
            raise ServiceError("IncompleteBody", "The request body ended before its last chunk.")
        return line


def encode_reply(reply: Reply, date: str, close: bool, head_only: bool = False) -> bytes:
    """Return the bytes of a whole response, framed by its length (RFC 9112, 6.2).

    `close` announces that the connection ends here; `head_only` is for an answer to HEAD.
    Raises ValueError for a header that would break out of its line (RFC 9110, 5.5).
    """
    lines = [f"HTTP/1.1 {reply.status} {http.client.responses.get(reply.status, '')}"]
    lines += [f"{name}: {value}" for name, value in reply.headers]
    lines.append(f"Date: {date}")
    if reply.status >= 200 and reply.status not in (204, 304):
        lines.append(f"Content-Length: {len(reply.body)}")
    if close:
        lines.append("Connection: close")
    text = CRLF.join(lines) + CRLF + CRLF
    if not text.count("\r") == text.count("\n") == len(lines) + 1 or "\0" in text:
        raise ValueError("a line break or NUL in a response header")
    head = text.encode("latin-1")
    return head if head_only or reply.status in (204, 304) else head + reply.body


# ==== 3. Signature Version 4: parse_authorization, canonical_request, string_to_sign, verify ====
#
# The caller and we each reduce the request to one text, sign it with the same secret, and
# compare.  All trouble comes from reducing it differently: so the raw target, the raw header
# values in their order, and latin-1 both ways.  Sources: IAM User Guide, "Create a signed AWS
# API request"; Amazon S3 API Reference, "Authenticating Requests (AWS Signature Version 4)".
#
# There is one decision, `verify`, and its default is refusal.  The identity it returns is the
# key whose signature was just checked; nothing later reads it from the request again.

ALGORITHM = "AWS4-HMAC-SHA256"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
MAX_PRESIGNED_SECONDS = 604800
S3_FAMILY = frozenset({"s3", "s3-express", "s3-object-lambda", "s3-outposts"})


class Profile(NamedTuple):
    """How the requests of a service are reduced to their canonical form."""

    normalize_path: bool = True  # dot segments resolved, and the path encoded once more
    declared_payload: bool = False  # x-amz-content-sha256 stands for the body in the signature
    unsigned_token: bool = False  # clients append the session token after signing


PROFILES: Mapping[str, Profile] = {
    **dict.fromkeys(S3_FAMILY, Profile(normalize_path=False, declared_payload=True)),
    "iotdevicegateway": Profile(unsigned_token=True),  # "Protocols", AWS IoT Developer Guide
}
_GENERAL = Profile()

# Why a request can be refused: its code, its code from Amazon S3's family, its message, and the
# message from S3's family if that is another.  The messages are AWS's own where they are known,
# since people search for them.
_NOT_SIGNED = "There were headers present in the request which were not signed: {}"
_HASH_MISMATCH = "The provided 'x-amz-content-sha256' header does not match what was computed."
_SKEWED = "The difference between the request time and the server's time is too large."
_DATELESS = "AWS authentication requires a valid Date or x-amz-date header"
_VERSION_2 = (
    "The authorization mechanism you have provided is not supported: it is Signature Version 2."
    ' Please use AWS4-HMAC-SHA256 (boto3: Config(signature_version="s3v4")).'
)
_COMPUTED = (
    "\n\nThe Canonical String for this request should have been\n'{}'\n\n"
    "The String-to-Sign should have been\n'{}'\n{}"
)
REFUSALS: Mapping[str, Sequence[str]] = {
    "unsigned": (
        "MissingAuthenticationToken", "AccessDenied",
        "Request is missing Authentication Token",
    ),
    "several": (
        "SignatureDoesNotMatch", "InvalidArgument",
        "Only one auth mechanism allowed: one Authorization header, or X-Amz-* query parameters.",
    ),
    "version 2": ("IncompleteSignature", "InvalidRequest", _VERSION_2),
    "version 2 of s3": ("InvalidRequest", "InvalidRequest", _VERSION_2),  # it names no service
    "scheme": (
        "MissingAuthenticationToken", "InvalidArgument",
        "Request is missing Authentication Token: the Authorization header is of type '{}'."
        " Please use AWS4-HMAC-SHA256.",
    ),
    "algorithm": (
        "IncompleteSignature", "InvalidArgument",
        "Unsupported AWS 'algorithm': '{}'. Please use AWS4-HMAC-SHA256.",
    ),
    "query algorithm": (
        "IncompleteSignature", "AuthorizationQueryParametersError",
        "Unsupported AWS 'algorithm': '{}'. Please use AWS4-HMAC-SHA256.",
    ),
    "header parameter": (
        "IncompleteSignature", "AuthorizationHeaderMalformed",
        "{} Authorization=AWS4-HMAC-SHA256",
    ),
    "query parameter": (
        "IncompleteSignature", "AuthorizationQueryParametersError",
        "{} Re-examine the query-string parameters.",
    ),
    "credential": (
        "IncompleteSignature", "AuthorizationHeaderMalformed",
        "Credential must have exactly 5 slash-delimited elements,"
        " e.g. keyid/date/region/service/term, got '{}'.",
    ),
    "no date": (
        "IncompleteSignature", "AccessDenied", "{} Authorization=AWS4-HMAC-SHA256", _DATELESS,
    ),
    "date": (
        "IncompleteSignature", "AccessDenied",
        "Date must be in ISO-8601 'basic format'. Got '{}'."
        " See http://en.wikipedia.org/wiki/ISO_8601",
        _DATELESS,
    ),
    "past": (
        "SignatureDoesNotMatch", "RequestTimeTooSkewed",
        "Signature expired: {} is now earlier than {} ({} - {}.)", _SKEWED,
    ),
    "future": (
        "SignatureDoesNotMatch", "RequestTimeTooSkewed",
        "Signature not yet current: {} is still later than {} ({} + {}.)", _SKEWED,
    ),
    "expired": (
        "SignatureDoesNotMatch", "AccessDenied",
        "Signature expired: {} is now earlier than {}.", "Request has expired",
    ),
    "not yet valid": (
        "SignatureDoesNotMatch", "AccessDenied",
        "Signature not yet current: {} is still later than {} ({} + {}.)",
        "Request is not valid yet",
    ),
    "scope": (
        "SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "{0}",
        "The authorization header is malformed; {1}",
    ),
    "query scope": (
        "SignatureDoesNotMatch", "AuthorizationQueryParametersError", "{0}",
        "Error parsing the X-Amz-Credential parameter; {1}",
    ),
    "key": (
        "InvalidClientTokenId", "InvalidAccessKeyId",
        "The security token included in the request is invalid.",
        "The AWS Access Key Id you provided does not exist in our records.",
    ),
    "token": (
        "InvalidClientTokenId", "InvalidToken",
        "The security token included in the request is invalid",
    ),
    "host": (
        "SignatureDoesNotMatch", "AccessDenied",
        "'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization.",
    ),
    "unsigned headers": ("SignatureDoesNotMatch", "AccessDenied", _NOT_SIGNED),
    "absent headers": (
        "SignatureDoesNotMatch", "AccessDenied",
        "There were signed headers which the request does not have: {}",
    ),
    "no payload": (
        "SignatureDoesNotMatch", "InvalidRequest",
        "Missing required header for this request: x-amz-content-sha256",
    ),
    "payload": (
        "SignatureDoesNotMatch", "InvalidArgument",
        "x-amz-content-sha256 must be the sha256 value of the body in lower-case hex, not '{}';"
        " UNSIGNED-PAYLOAD is for Amazon S3 alone.",
        "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, STREAMING-UNSIGNED-PAYLOAD-TRAILER,"
        " STREAMING-AWS4-HMAC-SHA256-PAYLOAD, STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER or a"
        " valid sha256 value.",
    ),
    "streaming": (
        "SignatureDoesNotMatch", "NotImplemented",
        "A body sent in signed chunks ({}) is not implemented."
        " Send the sha256 value of the whole body as x-amz-content-sha256.",
    ),
    "body": ("SignatureDoesNotMatch", "XAmzContentSHA256Mismatch", _HASH_MISMATCH),
    "signature": (
        "SignatureDoesNotMatch", "SignatureDoesNotMatch",
        "The request signature we calculated does not match the signature you provided."
        " Check your AWS Secret Access Key and signing method."
        f" Consult the service documentation for details.{_COMPUTED}",
        "The request signature we calculated does not match the signature you provided."
        f" Check your key and signing method.{_COMPUTED}",
    ),
    "uri": ("InvalidURI", "InvalidURI", "Couldn't parse the specified URI."),
    "query": (
        "MalformedQueryString", "InvalidURI",
        "The query string contains a '%' that begins no escape.",
        "Couldn't parse the specified URI.",
    ),
}  # fmt: skip


class CredentialScope(NamedTuple):
    """What a signature is good for: one day, one region, one service."""

    date: str
    region: str
    service: str
    terminator: str = "aws4_request"

    def __str__(self) -> str:
        return "/".join(self)


class Authorization(NamedTuple):
    """What the caller claims, read from the header or from a presigned query alike.

    Its repr leaves out the signature and the session token.
    """

    access_key_id: str
    scope: CredentialScope
    signed_headers: Tuple[str, ...]
    signature: str
    amz_date: str  # ISO 8601 basic
    expires: Optional[int] = None  # seconds after amz_date; None where none is given
    presigned: bool = False
    session_token: Optional[str] = None
    dated_by: str = "x-amz-date"  # the header or query parameter that gave amz_date

    def __repr__(self) -> str:
        return f"Authorization({self.access_key_id!r}, {self.scope}, {self.amz_date!r})"


class Verified(NamedTuple):
    """Who has signed a request, for what, and the body that was signed."""

    client: Client
    scope: CredentialScope
    body: bytes


# Bounded, since anybody may send anything here.
_CLAIM = re.compile("([^/,\\s]{1,128})/([^/,\\s]{0,16})/([^/,\\s]{0,64})/([^/,\\s]{0,64})/")
_CLAIM_IN_HEADER = re.compile("Credential=([^,]{0,300})")
_CLAIM_IN_QUERY = re.compile("[?&](?i:x-amz-credential)=([^&]{0,600})")


def claim(request: Request) -> Tuple[str, CredentialScope]:
    """Return the access key id and scope that the request names, unverified; "" where none.

    Good for choosing how an answer looks and for the log, never for a decision.
    """
    header = request.header("authorization")
    texts = _CLAIM_IN_HEADER.findall(header) if header else []
    if not header and "=" in request.target:
        found = _CLAIM_IN_QUERY.findall(request.target)
        texts = [urllib.parse.unquote(text, "latin-1") for text in found]
    for match in filter(None, map(_CLAIM.match, texts)):
        access_key_id, date, region, service = match.groups()
        return access_key_id, CredentialScope(date, region, service)
    return "", CredentialScope("", "", "")


def refusal(reason: str, request: Request, *values: object, **detail: str) -> ServiceError:
    """Return the error for a row of REFUSALS, as the service that the request names spells it."""
    code, s3_code, message, *s3_message = REFUSALS[reason]
    if claim(request)[1].service not in S3_FAMILY:
        return ServiceError(code, message.format(*values), **detail)
    return ServiceError(s3_code, (s3_message or [message])[0].format(*values), **detail)


# ---- Parsing ----

_AMZ_DATE = re.compile("[0-9]{8}T[0-9]{6}Z")
_SHA256_HEX = re.compile("[0-9a-f]{64}")
_SIGNED_HEADERS = re.compile("[!#$%&'*+.^_`|~0-9a-z-]+(;[!#$%&'*+.^_`|~0-9a-z-]+)*")
_SCOPE_NAME = re.compile("[A-Za-z0-9_-]{1,64}")
_PARAMETERS = ("Credential", "Signature", "SignedHeaders")
_QUERY_PARAMETERS = {
    name.lower().encode(): name
    for name in (
        "X-Amz-Algorithm",
        "X-Amz-Credential",
        "X-Amz-Date",
        "X-Amz-Expires",
        "X-Amz-SignedHeaders",
        "X-Amz-Signature",
        "X-Amz-Security-Token",
    )
}
_PRESIGNED_MARKS = (b"x-amz-algorithm", b"x-amz-credential", b"x-amz-signature")


def parse_authorization(request: Request) -> Authorization:
    """Return what the request claims, from its Authorization header or its query string.

    Raises the ServiceError for a request that claims nothing, claims it twice, in another
    scheme than AWS4-HMAC-SHA256, or not in the exact syntax.
    """
    headers = request.fields.get("authorization", ())
    if BROKEN_ESCAPE.search(request.target.partition("?")[2]):
        raise refusal("query", request)
    names = {name.lower() for name, _ in request.query}
    presigned = not names.isdisjoint(_PRESIGNED_MARKS)
    if len(headers) + presigned > 1:
        raise refusal("several", request)
    if presigned:
        return _parse_query(request)
    if headers:
        return _parse_header(request, headers[0])
    if b"signature" in names and names & {b"awsaccesskeyid", b"signatureversion"}:
        of_s3 = b"signatureversion" not in names
        raise refusal("version 2 of s3" if of_s3 else "version 2", request)
    raise refusal("unsigned", request)


def _parse_header(request: Request, header: str) -> Authorization:
    reason = "header parameter"
    scheme, _, rest = header.partition(" ")
    if scheme != ALGORITHM:
        if scheme == "AWS":
            raise refusal("version 2 of s3", request)
        reason = "algorithm" if scheme.startswith("AWS4-") else "scheme"
        raise refusal(reason, request, scheme[:40] if rest else "")
    given: Dict[str, str] = {}
    for part in rest.split(",") if rest else ():
        name, equals, value = part.strip(" \t").partition("=")
        if not equals:
            fault = f"'{name[:40]}' not a valid key=value pair (missing equal-sign)."
            raise refusal(reason, request, fault)
        if name not in _PARAMETERS or name in given:
            fault = "is given twice" if name in given else "is no parameter of this algorithm"
            raise refusal(reason, request, f"'{name[:40]}' {fault}.")
        given[name] = value
    faults = [
        f"Authorization header requires '{name}' parameter."
        for name in _PARAMETERS
        if not given.get(name)
    ]
    amz_date, dated_by = _single(request, "x-amz-date"), "x-amz-date"
    if amz_date is None:
        amz_date, dated_by = _date_header(request), "date"
    if amz_date is None:
        faults.append(
            "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header."
        )
    if amz_date is None or faults:
        undated = amz_date is None and len(faults) == 1
        raise refusal("no date" if undated else reason, request, " ".join(faults))
    access_key_id, scope = _parse_credential(request, given["Credential"], "credential")
    return Authorization(
        access_key_id,
        scope,
        _parse_signed_headers(request, given["SignedHeaders"], reason),
        _parse_signature(request, given["Signature"], reason),
        amz_date,
        session_token=_single(request, "x-amz-security-token"),
        dated_by=dated_by,
    )


def _parse_query(request: Request) -> Authorization:
    reason = "query parameter"
    given: Dict[str, str] = {}
    for raw_name, raw_value in request.query:
        name = _QUERY_PARAMETERS.get(raw_name.lower())
        if name is None:
            continue
        # Case variants and repeats have let one check see another value than the next
        # (CVE-2022-2385); nobody needs them.
        if name in given or raw_name != name.encode():
            raise refusal(reason, request, f"'{name}' must be given once, spelled so.")
        given[name] = raw_value.decode("latin-1")
    if given.get("X-Amz-Algorithm", ALGORITHM) not in (ALGORITHM, ""):
        raise refusal("query algorithm", request, given["X-Amz-Algorithm"][:40])
    missing = [
        name
        for name in _QUERY_PARAMETERS.values()
        if name not in ("X-Amz-Security-Token", "X-Amz-Expires") and not given.get(name)
    ]
    if not missing:
        access_key_id, scope = _parse_credential(request, given["X-Amz-Credential"], reason)
        if scope.service in S3_FAMILY and not given.get("X-Amz-Expires"):
            missing.append("X-Amz-Expires")
    if missing:
        fault = f"AWS query-string parameters must include '{missing[0]}'."
        raise refusal(reason, request, fault)
    return Authorization(
        access_key_id,
        scope,
        _parse_signed_headers(request, given["X-Amz-SignedHeaders"], reason),
        _parse_signature(request, given["X-Amz-Signature"], reason),
        given["X-Amz-Date"],
        _parse_expires(request, given.get("X-Amz-Expires")),
        presigned=True,
        session_token=given.get("X-Amz-Security-Token"),
    )


def _parse_credential(
    request: Request, credential: str, reason: str
) -> Tuple[str, CredentialScope]:
    parts = credential.split("/")
    if len(parts) != 5:
        fault = REFUSALS["credential"][2].format(credential[:200])
        raise refusal(reason, request, credential[:200] if reason == "credential" else fault)
    return parts[0], CredentialScope(*parts[1:])


def _parse_signed_headers(request: Request, text: str, reason: str) -> Tuple[str, ...]:
    names = tuple(text.split(";"))
    ascending = all(map(str.__lt__, names, names[1:]))
    if not _SIGNED_HEADERS.fullmatch(text) or not ascending:
        fault = "SignedHeaders must be distinct lower-case names, sorted, joined by ';'."
        raise refusal(reason, request, fault)
    return names


def _parse_signature(request: Request, text: str, reason: str) -> str:
    if not _SHA256_HEX.fullmatch(text):
        fault = "Signature must be 64 lower-case hexadecimal digits."
        raise refusal(reason, request, fault)
    return text


def _parse_expires(request: Request, text: Optional[str]) -> Optional[int]:
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,6}", text):
        raise refusal("query parameter", request, "X-Amz-Expires should be a number.")
    if not 1 <= int(text) <= MAX_PRESIGNED_SECONDS:
        fault = f"X-Amz-Expires must be from 1 to {MAX_PRESIGNED_SECONDS} seconds (a week)."
        raise refusal("query parameter", request, fault)
    return int(text)


def _single(request: Request, name: str) -> Optional[str]:
    values = request.fields.get(name)
    if values and len(values) > 1:
        raise refusal("header parameter", request, f"'{name}' must be given once.")
    return values[0] if values else None


def _date_header(request: Request) -> Optional[str]:
    """Return the Date header in ISO 8601 basic format, from that or from RFC 9110's, 5.6.7."""
    value = _single(request, "date")
    if value is None or _AMZ_DATE.fullmatch(value):
        return value
    try:
        moment = email.utils.parsedate_to_datetime(value)
        return iso_basic(calendar.timegm(moment.utctimetuple()))
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise refusal("date", request, value[:80]) from error


# ---- Canonical form ----


def canonical_path(path: str, normalize: bool) -> str:
    """Return the canonical URI of a raw path.

    With `normalize` (every service but S3's family): empty and dot segments resolved on the
    encoded text, then each byte percent-encoded, `%` too.  Without: each segment decoded and
    encoded once, so that `//`, `..` and `%2F` stay what they are, parts of an object key.
    Raises ServiceError InvalidURI for a broken escape or a `..` above the root.
    """
    if path in ("", "/"):
        return "/"
    if BROKEN_ESCAPE.search(path):
        raise ServiceError("InvalidURI", REFUSALS["uri"][2])
    segments = path.encode("latin-1").split(b"/")
    if not normalize:
        unquote = urllib.parse.unquote_to_bytes
        return "/".join(urllib.parse.quote(unquote(segment), safe="") for segment in segments)
    kept: List[bytes] = []
    for segment in segments:
        if segment == b"..":
            if not kept:
                raise ServiceError("InvalidURI", "The path leads above its root.")
            kept.pop()
        elif segment not in (b"", b"."):
            kept.append(segment)
    slash = b"/" if kept and path.endswith("/") else b""
    return urllib.parse.quote(b"/" + b"/".join(kept) + slash, safe="/")


def canonical_query(pairs: Sequence[Tuple[bytes, bytes]], without: Sequence[bytes] = ()) -> str:
    """Return the decoded pairs encoded anew and sorted by name, then value.

    They are sorted as pairs: in the joined text `=` would come after `-`.
    """
    quote = urllib.parse.quote
    encoded = [(quote(k, safe=""), quote(v, safe="")) for k, v in pairs if k not in without]
    return "&".join(f"{name}={value}" for name, value in sorted(encoded))


_BLANKS = re.compile("[ \t]+")


def canonical_headers(fields: Mapping[str, Sequence[str]], names: Sequence[str]) -> str:
    """Return a line for each name; values trimmed, blanks collapsed, repeats joined in order."""
    lines = []
    for name in names:
        value = ",".join([value.strip(" \t") for value in fields[name]])
        if "  " in value or "\t" in value:
            value = _BLANKS.sub(" ", value)
        lines.append(f"{name}:{value}\n")
    return "".join(lines)


def canonical_parts(
    request: Request, authorization: Authorization, payload_hash: str, profile: Profile
) -> Tuple[str, ...]:
    """Return the lines of a canonical request: method, path, query, headers, names, payload."""
    without = [b"X-Amz-Signature"] if authorization.presigned else []
    if authorization.presigned and profile.unsigned_token:
        without.append(b"X-Amz-Security-Token")
    return (
        request.method,
        canonical_path(request.path, profile.normalize_path),
        canonical_query(request.query, without),
        canonical_headers(request.fields, authorization.signed_headers),
        ";".join(authorization.signed_headers),
        payload_hash,
    )


def canonical_request(
    request: Request, authorization: Authorization, payload_hash: str, profile: Profile
) -> bytes:
    """Return the text that both sides hash."""
    parts = canonical_parts(request, authorization, payload_hash, profile)
    return "\n".join(parts).encode("latin-1")


def string_to_sign(amz_date: str, scope: CredentialScope, canonical: bytes) -> bytes:
    """Return what is signed: the algorithm, the time, the scope, the canonical request's hash."""
    digest = hashlib.sha256(canonical).hexdigest()
    return f"{ALGORITHM}\n{amz_date}\n{scope}\n{digest}".encode("latin-1")


@lru_cache(maxsize=1024)
def signing_key(secret_access_key: str, scope: CredentialScope) -> bytes:
    """Return the key derived for one day, region and service.

    Kept for the next call; asked for only with the secret of a known key, so that strangers
    cannot fill the cache.  `cache_clear` it when secrets change.
    """
    key = b"AWS4" + secret_access_key.encode("utf-8")
    for part in scope:
        key = hmac.digest(key, part.encode("latin-1"), "sha256")
    return key


def signature(secret_access_key: str, scope: CredentialScope, text: bytes) -> str:
    """Return the signature of a string to sign, in lower-case hex."""
    return hmac.digest(signing_key(secret_access_key, scope), text, "sha256").hex()


# ---- Verification ----


@lru_cache(maxsize=256)
def epoch(amz_date: str) -> int:
    """Return the seconds since 1970 of a time such as 20150830T123600Z; ValueError for others."""
    if not _AMZ_DATE.fullmatch(amz_date):
        raise ValueError(amz_date)
    moment = datetime.datetime.strptime(amz_date, "%Y%m%dT%H%M%SZ")
    return calendar.timegm(moment.timetuple())


def iso_basic(seconds: float) -> str:
    """Return a time in ISO 8601 basic format: 0 gives 19700101T000000Z."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y%m%dT%H%M%SZ")


def verify(
    request: Request,
    clients: Clients,
    now: float,
    *,
    service: Optional[str] = None,
    regions: Sequence[str] = (),
    clock_skew: int = 900,
    must_be_signed: Sequence[str] = (),
    profiles: Mapping[str, Profile] = PROFILES,
) -> Verified:
    """Return who signed the request, for what, and its body; or raise the ServiceError why not.

    `service` is the one that the request is for, where it says so apart from its scope;
    `regions` are those allowed, all if empty; `must_be_signed` are headers that decide what
    the request means.  The body is read only when the head alone gives no reason to refuse.
    """
    # 1. The framing was judged before there was a Request.
    # 2. and 3. One claim, in one form, well formed.
    authorization = parse_authorization(request)
    profile = profiles.get(authorization.scope.service, _GENERAL)
    # 4. and 5. A date, near now.
    _check_time(request, authorization, now, clock_skew)
    # 6. The scope is of that day, and for us.
    _check_scope(request, authorization, service, regions)
    # 7. A key we know, with its token.
    client = _find_client(request, authorization, clients)
    # 8. Whatever decides what the request means is signed.
    _check_signed_headers(request, authorization, profile, must_be_signed)
    # 9. What the head says of the body is what the service allows.
    declared = _declared_payload(request, authorization, profile)
    # 10. The signature; from the head alone if that declares the body's hash.
    if declared is not None:
        _check_signature(request, authorization, profile, client, declared)
    body = request.body.read()
    if declared == "UNSIGNED-PAYLOAD":
        return Verified(client, authorization.scope, body)
    computed = hashlib.sha256(body).hexdigest()
    if declared is None:
        _check_signature(request, authorization, profile, client, computed)
    # 11. The body is the declared one.
    elif declared != computed:
        raise refusal(
            "body",
            request,
            ClientComputedContentSHA256=declared,
            S3ComputedContentSHA256=computed,
        )
    return Verified(client, authorization.scope, body)


def _check_time(request: Request, claimed: Authorization, now: float, skew: int) -> None:
    try:
        signed_at = epoch(claimed.amz_date)
    except ValueError as error:
        raise refusal("date", request, claimed.amz_date[:80]) from error
    if claimed.expires is not None and now > signed_at + claimed.expires:
        end, server = iso_basic(signed_at + claimed.expires), iso_basic(now)
        given = {"X-Amz-Expires": str(claimed.expires), "Expires": end, "ServerTime": server}
        raise refusal("expired", request, end, server, **given)
    if claimed.expires is None and now > signed_at + skew:
        reason, limit = "past", now - skew
    elif now < signed_at - skew:
        reason = "future" if claimed.expires is None else "not yet valid"
        limit = now + skew
    else:
        return
    window = f"{skew // 60} min" if skew % 60 == 0 else f"{skew} s"
    raise refusal(
        reason,
        request,
        claimed.amz_date,
        iso_basic(limit),
        iso_basic(now),
        window,
        RequestTime=claimed.amz_date,
        ServerTime=iso_basic(now),
        MaxAllowedSkewMilliseconds=str(skew * 1000),
    )


def _check_scope(
    request: Request, claimed: Authorization, service: Optional[str], regions: Sequence[str]
) -> None:
    scope, day = claimed.scope, claimed.amz_date[:8]
    faults: List[Tuple[str, str]] = []  # as most services tell it, as Amazon S3 does
    if scope.terminator != "aws4_request":
        given = scope.terminator[:40]
        faults.append((
            f"Credential should be scoped with a valid terminator: 'aws4_request', not '{given}'.",
            f'incorrect terminal "{given}". This endpoint uses "aws4_request".',
        ))  # fmt: skip
    if scope.date != day:
        given = scope.date[:40]
        faults.append((
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from"
            f" HTTP: '{given}' != '{day}', from '{claimed.amz_date}'.",
            f"Invalid credential date \"{given}\". This date is not the same as X-Amz-Date:"
            f' "{day}".',
        ))  # fmt: skip
    if not _SCOPE_NAME.fullmatch(scope.region) or (regions and scope.region not in regions):
        given, expected = scope.region[:40], regions[0] if regions else "us-east-1"
        faults.append((
            f"Credential should be scoped to a valid region, not '{given}'.",
            f"the region '{given}' is wrong; expecting '{expected}'",
        ))  # fmt: skip
    if not _SCOPE_NAME.fullmatch(scope.service) or service not in (None, scope.service):
        faults.append((
            f"Credential should be scoped to correct service: '{service or ''}'.",
            f'incorrect service "{scope.service[:40]}". This endpoint belongs to "{service}".',
        ))  # fmt: skip
    if faults:
        reason = "query scope" if claimed.presigned else "scope"
        told = " ".join(general for general, _ in faults)
        raise refusal(reason, request, told, faults[0][1], **dict(zip(("Region",), regions)))


def _find_client(request: Request, claimed: Authorization, clients: Clients) -> Client:
    candidates = clients.get(claimed.access_key_id)
    if not candidates:
        raise refusal("key", request, AWSAccessKeyId=claimed.access_key_id[:128])
    token = (claimed.session_token or "").encode("latin-1")
    for client in candidates:
        if hmac.compare_digest(client.session_token.encode("utf-8"), token):
            return client
    raise refusal("token", request)


def _check_signed_headers(
    request: Request, claimed: Authorization, profile: Profile, must_be_signed: Sequence[str]
) -> None:
    fields, signed = request.fields, claimed.signed_headers
    if "host" not in signed:
        raise refusal("host", request)
    absent = [name for name in signed if name not in fields]
    if absent:
        raise refusal("absent headers", request, ", ".join(absent))
    unsigned = [
        name
        for name in fields
        if name not in signed
        and (
            name.startswith("x-amz-")
            or name in must_be_signed
            or (name == claimed.dated_by and not claimed.presigned)
        )
    ]
    if profile.declared_payload and "x-amz-content-sha256" in unsigned:
        unsigned.remove("x-amz-content-sha256")  # it is a line of the canonical request anyway
    if profile.unsigned_token and "x-amz-security-token" in unsigned:
        unsigned.remove("x-amz-security-token")
    if unsigned:
        names = ", ".join(unsigned)
        raise refusal("unsigned headers", request, names, HeadersNotSigned=names)
    if claimed.presigned:
        _check_hoisted(request)


def _check_hoisted(request: Request) -> None:
    """Refuse an x-amz-* header that differs from the query parameter of its name."""
    for raw_name, raw_value in request.query:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name.startswith("x-amz-") and request.fields.get(name, [value]) != [value]:
            fault = f"'{name[:40]}' differs between header and query."
            raise refusal("query parameter", request, fault)


def _declared_payload(request: Request, claimed: Authorization, profile: Profile) -> Optional[str]:
    """Return the payload line that the head declares, or None where the body must be hashed."""
    value = _single(request, "x-amz-content-sha256")
    if value is None and not profile.declared_payload:
        return None
    if value is None and claimed.presigned:
        hoisted = [v for name, v in request.query if name.lower() == b"x-amz-content-sha256"]
        value = hoisted[0].decode("latin-1") if hoisted else "UNSIGNED-PAYLOAD"
    if value is None:
        raise refusal("no payload", request)
    if _SHA256_HEX.fullmatch(value) or (value == "UNSIGNED-PAYLOAD" and profile.declared_payload):
        return value
    raise refusal(
        "streaming" if value.startswith("STREAMING-") else "payload", request, value[:60]
    )


_TOKEN_SHOWN = re.compile("((?i:x-amz-(?:security|s3session)-token)[:=])[^\n&]*")
_PORT = re.compile("^(host:.*?):[0-9]+$", re.MULTILINE)

# What curl and others are known to sign in place of the canonical form, by version: for each
# line of the canonical request that they get wrong, what they have there, and what to do.
DEVIATIONS: Sequence[Tuple[int, Callable[[Request, str], str], str]] = (
    (1, lambda request, _: request.path,
     "it signed the path as sent, not encoded once more: curl does from 8.9 on"),
    (2, lambda request, _: request.target.partition("?")[2],
     "it signed the query as sent: sort its parameters, write each as name=value with both"
     " percent-encoded, or take curl 8.13 or newer"),
    (2, lambda request, _: "&".join(sorted(request.target.partition("?")[2].split("&"))),
     "it signed the query sorted, but not percent-encoded as RFC 3986 says"),
    (3, lambda _, headers: _PORT.sub(r"\1", headers),
     "it signed the Host without its port: curl before 7.86 does"),
    (5, lambda *_: EMPTY_SHA256,
     "it signed an empty body: in place of curl's -T or -F use --data-binary"),
)  # fmt: skip


def explain_mismatch(
    request: Request, claimed: Authorization, parts: Sequence[str], secret_access_key: str
) -> str:
    """Return what the client has signed instead, if that is a known deviation; else ""."""
    choices: List[Dict[str, str]] = [{part: ""} for part in parts]
    for line, deviate, advice in DEVIATIONS:
        choices[line].setdefault(deviate(request, parts[line]), advice)
    for chosen in itertools.product(*choices):
        text = string_to_sign(claimed.amz_date, claimed.scope, "\n".join(chosen).encode("latin-1"))
        computed = signature(secret_access_key, claimed.scope, text)
        if hmac.compare_digest(computed, claimed.signature):
            faults = "; ".join(filter(None, map(dict.__getitem__, choices, chosen)))
            return f"\nYour client is not wrong about the key, but about the form: {faults}.\n"
    return ""


def _check_signature(
    request: Request, claimed: Authorization, profile: Profile, client: Client, payload_hash: str
) -> None:
    """Compare in constant time; the refusal shows what we computed, less the session token."""
    parts = canonical_parts(request, claimed, payload_hash, profile)
    canonical = "\n".join(parts)
    text = string_to_sign(claimed.amz_date, claimed.scope, canonical.encode("latin-1"))
    computed = signature(client.secret_access_key, claimed.scope, text)
    if hmac.compare_digest(computed, claimed.signature):  # both ASCII
        return
    shown = _TOKEN_SHOWN.sub(r"\1<redacted>", canonical)[:16384]
    signed = text.decode("latin-1")
    raise refusal(
        "signature",
        request,
        shown,
        signed,
        explain_mismatch(request, claimed, parts, client.secret_access_key),
        AWSAccessKeyId=claimed.access_key_id,
        StringToSign=signed,
        SignatureProvided=claimed.signature,
        StringToSignBytes=text.hex(" "),
        CanonicalRequest=shown,
        CanonicalRequestBytes=shown.encode("latin-1").hex(" "),
    )


# ==== 4. Wire protocols: wire_protocol, AwsJson, AwsQuery, Rest, RpcV2 ====
#
# The protocol is chosen from the head alone by a function that cannot fail, so that even the
# refusal of nonsense looks as the caller expects; the body is decoded only after its signature
# held.  Sources: Smithy 2.0, "AWS protocols" (the order in which they claim a request); the
# answers of Amazon SQS as recorded, where the protocols are silent.

# ---- Shapes: what a service model says of an operation's input ----

STRING, INTEGER, BLOB = "String", "Integer", "Blob"


class ListOf(NamedTuple):
    """A list; in the query protocol its elements are numbered from 1."""

    element: Shape


class MapOf(NamedTuple):
    """A map with string keys; in the query protocol a numbered list of pairs."""

    value: Shape


class Structure(NamedTuple):
    """Members by name, and which of them must be given."""

    members: Mapping[str, Shape]
    required: Sequence[str]


Shape = Union[str, ListOf, MapOf, Structure]


def structure(declared: str, shapes: Mapping[str, Shape]) -> Structure:
    """Return the structure declared by its members, as in `Id* Delay:int Tags*:map`.

    A `*` marks what must be given; behind the colon is a name in `shapes`, none for a string.
    """
    members, required = {}, []
    for member in declared.split():
        marked, _, shape = member.partition(":")
        name = marked.rstrip("*")
        members[name] = shapes[shape] if shape else STRING
        if name != marked:
            required.append(name)
    return Structure(members, required)


class Operation(NamedTuple):
    """An operation of a service: its input, the members of its output, what answers it.

    `output` is None for an operation that has none (a void one).  `method` takes the service
    object and a Call and returns the output.
    """

    name: str
    input: Structure
    output: Optional[Sequence[str]]
    method: Callable[[Any, Call], Optional[Mapping[str, Any]]]


def operations(owner: type, shapes: Mapping[str, Shape], table: str) -> Mapping[str, Operation]:
    """Return the operations of a table by name, each answered by the owner's method of that name.

    A line is the operation, its input as `structure` takes it, and `->` before its output.
    """
    found = {}
    for line in table.strip().splitlines():
        declared, arrow, output = line.partition("->")
        name, _, members = declared.strip().partition(" ")
        method = getattr(owner, re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())
        returned = output.split() if arrow else None
        found[name] = Operation(name, structure(members, shapes), returned, method)
    return found


class QueryName(NamedTuple):
    """How the query protocol spells a flattened list or map; {} is the operation's name."""

    element: str
    key: str = ""
    value: str = ""


class Model(NamedTuple):
    """What the wire protocols need to know of a service.

    `query_names` are the members that the query protocol spells in its own way.
    `not_on_queues` are the operations that a queue's own URL refuses.
    """

    operations: Mapping[str, Operation]
    query_names: Mapping[str, QueryName]
    not_on_queues: frozenset[str] = frozenset()


# ---- Choosing the protocol ----

TARGET_PREFIXES = {"sqs": "AmazonSQS"}  # of X-Amz-Target, by name in the credential scope
TARGET_SERVICES = {prefix: service for service, prefix in TARGET_PREFIXES.items()}
QUERY_NAMESPACES = {"sqs": "http://queue.amazonaws.com/doc/2012-11-05/"}
QUERY_SERVICES = frozenset(
    "autoscaling cloudformation cloudsearch ec2 elasticache elasticbeanstalk elasticloadbalancing"
    " iam monitoring rds redshift sdb sns sqs sts".split()
)
_FORM = "application/x-www-form-urlencoded"
_QUEUE_PATH = re.compile(r"(?:/[^/]+)*?/[0-9]{12}/[A-Za-z0-9_-]{1,80}(?:\.fifo)?/?")


def _media_type(request: Request) -> str:
    return (request.header("content-type") or "").partition(";")[0].strip(" \t").lower()


def _query_value(request: Request, wanted: bytes) -> Optional[str]:
    try:
        values = [value for name, value in request.query if name == wanted]
    except ServiceError:  # a broken query string; verify refuses it
        return None
    return values[0].decode("utf-8", "replace") if values else None


def _query_action(request: Request) -> Optional[str]:
    return _query_value(request, b"Action")


def _wants_json(request: Request) -> bool:
    accepted = request.header("accept") or ""
    return "application/json" in accepted or _query_value(request, b"ContentType") == "JSON"


def wire_protocol(request: Request) -> WireProtocol:
    """Return the protocol that the request speaks, from its head.  Never raises."""
    smithy = request.header("smithy-protocol")
    if smithy is not None:
        return RpcV2(smithy)
    media_type = _media_type(request)
    version = "1.1" if media_type == "application/x-amz-json-1.1" else "1.0"
    if "x-amz-target" in request.fields:
        return AWS_JSON[version]
    service = claim(request)[1].service
    query = AWS_QUERY_JSON if _wants_json(request) else AWS_QUERY
    if service not in S3_FAMILY and _query_action(request) is not None:
        return AwsJson(version, ("content-type",)) if "json" in media_type else query
    if media_type.startswith("application/x-amz-json-"):
        return AWS_JSON[version]
    if service in QUERY_SERVICES:
        return query
    if not service and request.method == "POST" and media_type in ("", _FORM):
        return query
    return Rest(of_xml=not service or service in S3_FAMILY)


class WireProtocol:
    """How a request names its operation and carries its input, and how it is answered."""

    must_be_signed: Sequence[str] = ()  # headers on which this reading of the request rests

    def service(self, request: Request) -> Optional[str]:
        """Return the service that the head names apart from its credential scope, or None."""
        return None

    def operation(self, request: Request, body: bytes) -> Tuple[str, Any]:
        """Return the operation's name, "" where there is none, and what `input` decodes."""
        raise NotImplementedError

    def input(self, request: Request, encoded: Any, model: Model, operation: Operation) -> Any:
        """Return the operation's input, checked against its shape.

        Raises ServiceError SerializationException or MissingParameter.
        """
        raise _invalid_action(operation.name)

    def output(
        self, call: Call, model: Model, output: Optional[Mapping[str, Any]], request_id: str
    ) -> Reply:
        """Return the answer of an operation that succeeded; None is the output of a void one."""
        raise NotImplementedError

    def fault(self, request: Request, error: ServiceError) -> Fault:
        """Return how the error is spelled for this request.

        Amazon SQS, which anybody may be allowed to call, denies access to the unsigned.
        """
        service = self.service(request) or claim(request)[1].service
        if error.code == "MissingAuthenticationToken" and service in ("sqs", ""):
            return ERRORS["AccessDenied"]
        return error.fault

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """Return the answer that refuses."""
        raise NotImplementedError


def _invalid_action(operation: str) -> ServiceError:
    return ServiceError(
        "InvalidAction", f"The action {operation[:80]} is not valid for this endpoint."
    )


def _side(status: int) -> str:
    return "Sender" if status < 500 else "Receiver"


# ---- AWS JSON 1.0 and 1.1 ----


class AwsJson(WireProtocol):
    """X-Amz-Target names the operation, the body is a JSON object (Smithy: awsJson1_0, 1_1).

    Or `Action` in the query string names it, and the Content-Type says that this is JSON.
    """

    def __init__(self, version: str, must_be_signed: Sequence[str] = ()) -> None:
        self.content_type = f"application/x-amz-json-{version}"
        self.must_be_signed = must_be_signed

    def service(self, request: Request) -> Optional[str]:
        """As the prefix of X-Amz-Target tells."""
        return TARGET_SERVICES.get((request.header("x-amz-target") or "").rpartition(".")[0])

    def operation(self, request: Request, body: bytes) -> Tuple[str, Any]:
        """What X-Amz-Target has behind its last dot, or else `Action`; and the body."""
        targets = request.fields.get("x-amz-target")
        if targets is None:
            return _query_action(request) or "", body
        prefix, _, name = targets[0].rpartition(".")
        expected = TARGET_PREFIXES.get(claim(request)[1].service, prefix)
        if len(targets) > 1 or prefix != expected:
            raise _invalid_action(", ".join(targets))
        return name, body

    def input(self, request: Request, encoded: Any, model: Model, operation: Operation) -> Any:
        """No body at all is an empty object."""
        try:
            document = read_json(encoded.decode("utf-8") or "{}")
        except ValueError as error:
            raise ServiceError("SerializationException", "The body is not JSON.") from error
        return _from_json(operation.input, document)

    def output(
        self, call: Call, model: Model, output: Optional[Mapping[str, Any]], request_id: str
    ) -> Reply:
        """A void operation is answered by no body at all."""
        body = b"" if output is None else _to_json(output)
        return Reply(200, self._headers(request_id), body)

    def fault(self, request: Request, error: ServiceError) -> Fault:
        """Amazon SQS tells 403 from 400 in JSON too; the other services do not."""
        fault = super().fault(request, error)
        service = self.service(request) or claim(request)[1].service
        return (
            fault if service in ("sqs", "") or fault.status != 403 else fault._replace(status=400)
        )

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """With the code that the query protocol would have used in a header."""
        status, code, shape = self.fault(request, error)
        headers = (*self._headers(request_id), ("x-amzn-query-error", f"{code};{_side(status)}"))
        return Reply(status, headers, _to_json({"__type": shape, "message": error.message}))

    def _headers(self, request_id: str) -> Headers:
        return (("x-amzn-RequestId", request_id), ("Content-Type", self.content_type))


AWS_JSON = {version: AwsJson(version) for version in ("1.0", "1.1")}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # RFC 8259, 6


def _short_integer(digits: str) -> int:
    if len(digits) > 20:  # to convert very many takes a time that grows with their square
        raise ValueError("a number is too long")
    return int(digits)


_JSON = json.JSONDecoder(parse_constant=_no_constant, parse_int=_short_integer)


def read_json(text: str) -> Any:
    """Return what a JSON document says.  Raises ValueError for anything else."""
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def _base64_text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _to_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), default=_base64_text).encode("ascii")


_KINDS = {
    bool: "BOOLEAN_VALUE",
    type(None): "NULL_VALUE",
    list: "START_ARRAY",
    dict: "START_OBJECT",
    str: "STRING_VALUE",
}


def _from_json(shape: Shape, value: Any) -> Any:
    """Return a JSON value as its shape wants it; unknown members and nulls are left out."""
    if isinstance(shape, Structure):
        members = _expect(dict, value, "a structure")
        present = {
            name: _from_json(shape.members[name], member)
            for name, member in members.items()
            if member is not None and name in shape.members
        }
        return _with_required(shape, present)
    if isinstance(shape, ListOf):
        return [_from_json(shape.element, element) for element in _expect(list, value, "a list")]
    if isinstance(shape, MapOf):
        pairs = _expect(dict, value, "a map")
        return {key: _from_json(shape.value, item) for key, item in pairs.items()}
    if shape == INTEGER:
        return _expect(int, value, "an Integer")
    text = _expect(str, value, "a String" if shape == STRING else "a Blob")
    return text if shape == STRING else _from_base64(text)


def _expect(kind: type, value: Any, wanted: str) -> Any:
    if type(value) is not kind:  # True is an int to isinstance
        got = _KINDS.get(type(value), "NUMBER_VALUE")
        raise ServiceError("SerializationException", f"{got} can not be converted to {wanted}")
    return value


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except ValueError as error:
        raise ServiceError("SerializationException", "A Blob is not base64.") from error


def _with_required(shape: Structure, members: Dict[str, Any]) -> Dict[str, Any]:
    for name in shape.required:
        if name not in members:
            raise ServiceError(
                "MissingParameter", f"The request must contain the parameter {name}."
            )
    return members


# ---- AWS Query ----


class AwsQuery(WireProtocol):
    """`Action` and the input as form fields, in the query string or the body; XML back.

    Smithy calls it awsQuery.  Besides POST it takes GET, and a queue's own URL, whose path
    then stands for QueueUrl, as Amazon SQS does.
    """

    def operation(self, request: Request, body: bytes) -> Tuple[str, Any]:
        """The field `Action`, and all fields."""
        fields = self._fields(request, body)
        if "Action" not in fields:
            raise ServiceError("UnknownOperation", "The request names no Action.")
        return fields["Action"], fields

    def _fields(self, request: Request, body: bytes) -> Dict[str, str]:
        """Return the fields of query string and body; refuse one name with two values."""
        try:
            pairs = [(k.decode("utf-8"), v.decode("utf-8")) for k, v in request.query]
            if body and _media_type(request) not in ("", _FORM):
                raise ValueError("not a form")
            if body:
                pairs += urllib.parse.parse_qsl(
                    body.decode("utf-8"),
                    keep_blank_values=True,
                    errors="strict",
                    max_num_fields=MAX_FORM_FIELDS,
                )
        except ValueError as error:
            raise ServiceError("SerializationException", "The form is malformed.") from error
        fields: Dict[str, str] = {}
        for name, value in pairs:
            if fields.setdefault(name, value) != value:
                raise ServiceError(
                    "MalformedQueryString", f"The parameter {name[:80]} has two values."
                )
        return fields

    def input(self, request: Request, encoded: Any, model: Model, operation: Operation) -> Any:
        """On the path of a queue, that is the QueueUrl unless a field says another."""
        fields: Dict[str, str] = encoded
        if _QUEUE_PATH.fullmatch(request.path):
            if operation.name in model.not_on_queues:
                raise _invalid_action(operation.name)
            fields.setdefault("QueueUrl", request.path)
        return _from_form(operation.input, _form_tree(fields), model.query_names, operation.name)

    def output(
        self, call: Call, model: Model, output: Optional[Mapping[str, Any]], request_id: str
    ) -> Reply:
        """A void operation's response has no result element."""
        parts: List[str] = []
        if output is not None:
            _write_xml(parts, f"{call.operation}Result", output, model.query_names, call.operation)
        parts.append(f"<ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata>")
        return self._reply(200, f"{call.operation}Response", call.service, parts, request_id)

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """As AWS answers, down to the empty Detail."""
        if error.code == "UnknownOperation":
            body = b"<UnknownOperationException/>"
            return Reply(404, self._headers(request_id), body)
        status, code, _ = self.fault(request, error)
        parts = [
            f"<Error><Type>{_side(status)}</Type>",
            f"<Code>{code}</Code>",
            f"<Message>{xml_text(_query_message(error))}</Message>",
            f"<Detail/></Error><RequestId>{request_id}</RequestId>",
        ]
        service = claim(request)[1].service or "sqs"
        return self._reply(status, "ErrorResponse", service, parts, request_id)

    def _reply(
        self, status: int, root: str, service: str, parts: Sequence[str], request_id: str
    ) -> Reply:
        namespace = QUERY_NAMESPACES.get(service)
        xmlns = f' xmlns="{namespace}"' if namespace else ""
        text = f'<?xml version="1.0"?><{root}{xmlns}>{"".join(parts)}</{root}>'
        return Reply(status, self._headers(request_id), text.encode("utf-8", "replace"))

    def _headers(self, request_id: str) -> Headers:
        return (("x-amzn-RequestId", request_id), ("Content-Type", "text/xml"))


class AwsQueryJson(AwsQuery):
    """AWS Query, answered in JSON: what SQS does for `Accept: application/json` since of old.

    Members are spelled as within AWS, maps are lists of pairs, and what is absent is null.
    """

    def output(
        self, call: Call, model: Model, output: Optional[Mapping[str, Any]], request_id: str
    ) -> Reply:
        """Wrapped as in XML."""
        response: Dict[str, Any] = {"ResponseMetadata": {"RequestId": request_id}}
        members = model.operations[call.operation].output
        if output is not None and members is not None:
            response[f"{call.operation}Result"] = {
                _INTERNAL_NAMES.get(name, name): _as_pairs(output.get(name), model, name)
                for name in members
            }
        document = _to_json({f"{call.operation}Response": response})
        return Reply(200, self._headers(request_id), document)

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """The same elements as in XML; what names no Action gets XML here too."""
        if error.code == "UnknownOperation":
            return AWS_QUERY.error(request, error, request_id)
        status, code, _ = self.fault(request, error)
        fault = {"Type": _side(status), "Code": code, "Message": _query_message(error)}
        document = _to_json({"Error": fault, "RequestId": request_id})
        return Reply(status, self._headers(request_id), document)

    def _headers(self, request_id: str) -> Headers:
        return (("x-amzn-RequestId", request_id), ("Content-Type", "application/json"))


AWS_QUERY = AwsQuery()
AWS_QUERY_JSON = AwsQueryJson()
_INTERNAL_NAMES = {"QueueUrls": "queueUrls", "Messages": "messages"}


def _as_pairs(value: Any, model: Model, member: str) -> Any:
    """Return a member of an output with its maps as lists of pairs, at any depth."""
    spelled = model.query_names.get(member)
    if isinstance(value, dict):
        if spelled and spelled.key:
            return [
                {spelled.key: key, spelled.value: _as_pairs(item, model, "")}
                for key, item in value.items()
            ]
        return {name: _as_pairs(item, model, name) for name, item in value.items()}
    return [_as_pairs(item, model, "") for item in value] if isinstance(value, list) else value


MAX_FORM_FIELDS = 10000  # a full SendMessageBatch has some 400
MAX_FORM_DEPTH = 12
_NUMBER = re.compile("-?[0-9]{1,18}")
_INDEX = re.compile("[0-9]{1,9}")

# Where XML says something else than JSON.
_QUERY_MESSAGES = {
    "QueueDoesNotExist": "The specified queue does not exist for this wsdl version."
}


def _query_message(error: ServiceError) -> str:
    return _QUERY_MESSAGES.get(error.code, error.message)


def _form_tree(fields: Mapping[str, str]) -> Dict[str, Any]:
    """Return fields such as `Tag.1.Key` as nested maps; a node's own value is under ""."""
    root: Dict[str, Any] = {}
    for name, value in fields.items():
        node = root
        for part in name.split(".", MAX_FORM_DEPTH):
            node = node.setdefault(part, {})
        node[""] = value
    return root


def _from_form(
    shape: Shape, node: Mapping[str, Any], names: Mapping[str, QueryName], operation: str
) -> Any:
    """Return what a node of the form tree says, in the types of its shape."""
    if isinstance(shape, Structure):
        present = {}
        for name, member in shape.members.items():
            spelled = names.get(name)
            below = node.get(spelled.element.format(operation) if spelled else name)
            if below is None and spelled:
                below = node.get(name)  # the whole of an empty list: `Entries=`
            if below is not None:
                present[name] = _from_form_member(member, below, names, operation, spelled)
        return _with_required(shape, present)
    text = node.get("", "")
    if shape == INTEGER:
        if not _NUMBER.fullmatch(text):
            raise ServiceError("SerializationException", f"'{text[:40]}' is not an integer.")
        return int(text)
    return text if shape == STRING else _from_base64(text)


def _from_form_member(
    shape: Shape,
    node: Mapping[str, Any],
    names: Mapping[str, QueryName],
    operation: str,
    spelled: Optional[QueryName],
) -> Any:
    if not isinstance(shape, (ListOf, MapOf)):
        return _from_form(shape, node, names, operation)
    numbered = [node[index] for index in sorted(filter(_INDEX.fullmatch, node), key=int)]
    if isinstance(shape, ListOf):
        if not numbered and node.get(""):  # `AttributeName=All`, from clients of old
            numbered = [node]
        return [_from_form(shape.element, below, names, operation) for below in numbered]
    key, value = (spelled.key, spelled.value) if spelled else ("key", "value")
    return {
        below.get(key, {}).get("", ""): _from_form(
            shape.value, below.get(value, {}), names, operation
        )
        for below in numbered
    }


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(text: str) -> str:
    """Return the text as XML content: a CR must not become a LF, nor a NUL break the document."""
    return escape(_NOT_XML.sub("\ufffd", text), {'"': "&quot;", "\r": "&#xD;"})


def _write_xml(
    parts: List[str],
    element: str,
    value: Any,
    names: Mapping[str, QueryName],
    operation: str,
) -> None:
    """Append an element and all that is in it; lists and maps are flattened."""
    if not isinstance(value, dict):
        text = _base64_text(value) if isinstance(value, bytes) else str(value)
        text = text.lower() if isinstance(value, bool) else text
        parts.append(f"<{element}>{xml_text(text)}</{element}>")
        return
    if not value:
        parts.append(f"<{element}/>")
        return
    parts.append(f"<{element}>")
    for name, member in value.items():
        spelled = names.get(name)
        if spelled is None:
            _write_xml(parts, name, member, names, operation)
        elif spelled.key:
            for key, item in member.items():
                pair = {spelled.key: key, spelled.value: item}
                _write_xml(parts, spelled.element, pair, names, operation)
        else:
            for item in member:
                _write_xml(parts, spelled.element.format(operation), item, names, operation)
    parts.append(f"</{element}>")


# ---- REST, and what is only refused ----


class Rest(WireProtocol):
    """Method and path name the operation (Smithy: restXml, restJson1); here the method does."""

    def __init__(self, of_xml: bool) -> None:
        self.of_xml = of_xml

    def operation(self, request: Request, body: bytes) -> Tuple[str, Any]:
        """The method, as in `s3:GET`."""
        return request.method, body

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """As Amazon S3 answers, or as the services of restJson1 do."""
        status, code, shape = error.fault
        headers: Headers = (("x-amzn-RequestId", request_id),)
        if not self.of_xml:
            headers += (
                ("Content-Type", "application/json"),
                ("x-amzn-ErrorType", shape.rpartition("#")[2]),
            )
            return Reply(status, headers, _to_json({"message": error.message}))
        elements = {"Code": code, "Message": error.message, **error.detail}
        parts: List[str] = []
        document = {**elements, "Resource": request.path, "RequestId": request_id, "HostId": ""}
        _write_xml(parts, "Error", document, {}, "")
        text = '<?xml version="1.0" encoding="UTF-8"?>\n' + "".join(parts)
        headers += (("x-amz-request-id", request_id), ("Content-Type", "application/xml"))
        return Reply(status, headers, text.encode("utf-8", "replace"))


class RpcV2(WireProtocol):
    """Smithy RPC v2, CBOR and JSON: recognized in order to be refused in its own form."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol if protocol == "rpc-v2-json" else "rpc-v2-cbor"

    def operation(self, request: Request, body: bytes) -> Tuple[str, Any]:
        """Raise: no operation is taken in this protocol."""
        raise ServiceError(
            "InvalidAction",
            "The Smithy RPC v2 protocols are not understood; call in AWS JSON or AWS Query.",
        )

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """A map of `__type` and `message`."""
        status, code, shape = error.fault
        document = {"__type": shape, "message": error.message}
        of_cbor = self.protocol == "rpc-v2-cbor"
        body = _cbor_strings(document) if of_cbor else _to_json(document)
        headers = (
            ("x-amzn-RequestId", request_id),
            ("Smithy-Protocol", self.protocol),
            ("Content-Type", "application/cbor" if of_cbor else "application/json"),
            ("x-amzn-query-error", f"{code};{_side(status)}"),
        )
        return Reply(status, headers, body)


def _cbor_strings(document: Mapping[str, str]) -> bytes:
    """Return a small map of text to text in CBOR (RFC 8949, 3.1: major types 5 and 3)."""
    parts = [bytes([0xA0 | len(document)])]
    for item in itertools.chain.from_iterable(document.items()):
        text = item.encode("utf-8", "replace")
        parts.append(b"\x7a" + len(text).to_bytes(4, "big") + text)
    return b"".join(parts)


# ==== 5. SQS in memory: Message, Queue, FifoQueue, Sqs, OPERATIONS ====
#
# The measure is Amazon SQS as recorded, not its emulators.  All state is here, under one lock;
# a call that waits does so on its queue's condition, which shares that lock, so that a send
# wakes the waiters of its own queue alone.  Clock, randomness and waiting are passed in.
#
# A message is visible, or hidden until some time: delayed if it was never received, in flight
# if it was.  What was due by now happens when a queue is next looked at (`advance`).

SECONDS_HELD = 43200  # longest visibility timeout, counted from the receive
SECONDS_DEDUPLICATED = 300
SECONDS_COOLING = 60  # between two purges, and between deleting a queue and making it anew
MAX_IN_FLIGHT = 120000
MAX_ATTRIBUTES = 10
MAX_BATCH = 10
MAX_BATCH_BYTES = 1048576
MAX_MOVES_PER_SECOND = 500


# Why SQS refuses: the code and the message, AWS's own where it is known.
_VALUE = "Value {} for parameter {} is invalid. Reason: {}"
_CHARACTERS = "#x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF"
_RESOURCE = "arn:<partition>:<service>:<region>:<account-id>:<resource-id>"
SQS_REFUSALS: Mapping[str, Tuple[str, str]] = {
    "invalid": ("InvalidParameterValue", "{}"),
    "value": ("InvalidParameterValue", _VALUE),
    "missing": ("MissingParameter", "The request must contain the parameter {}."),
    # Queues.
    "no queue": ("QueueDoesNotExist", "The specified queue does not exist."),
    "queue name": (
        "InvalidParameterValue",
        "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length",
    ),
    "fifo name": (
        "InvalidParameterValue",
        "The name of a FIFO queue can only include alphanumeric characters, hyphens, or"
        " underscores, must end with .fifo suffix and be 1 to 80 in length",
    ),
    "exists": (
        "QueueNameExists",
        "A queue already exists with the same name and a different value for attribute {}",
    ),
    "deleted recently": (
        "QueueDeletedRecently",
        "You must wait 60 seconds after deleting a queue before you can create another with the"
        " same name.",
    ),
    "purged recently": (
        "PurgeQueueInProgress",
        "Only one PurgeQueue operation on {} is allowed every 60 seconds.",
    ),
    "attribute name": ("InvalidAttributeName", "Unknown Attribute {}."),
    "of fifo alone": (
        "InvalidAttributeName",
        "You can specify the {} only when FifoQueue is set to true.",
    ),
    "attribute value": ("InvalidAttributeValue", "Invalid value for the parameter {}."),
    "queue type": (
        "InvalidAttributeValue",
        "Invalid value for the parameter FifoQueue. Reason: Modifying queue type is not"
        " supported.",
    ),
    "two encryptions": (
        "InvalidAttributeName",
        "You can use one type of server-side encryption (SSE) at one time. You can either enable"
        " KMS SSE or SQS SSE.",
    ),
    "token": ("InvalidParameterValue", "Invalid or expired next token."),
    "actions": ("OverLimit", "{} Actions were found, maximum allowed is 7."),
    # Messages.
    "characters": (
        "InvalidMessageContents",
        f"Invalid characters found. Valid unicode characters are {_CHARACTERS}",
    ),
    "attributes": (
        "InvalidParameterValue",
        "Number of message attributes [{}] exceeds the allowed maximum [10].",
    ),
    "attribute": ("InvalidParameterValue", "Message (user) attribute '{}' must {}."),
    "list values": (
        "UnsupportedOperation",
        "Message (user) attribute '{}' has a list of values, which is not supported.",
    ),
    "number": (
        "InvalidParameterValue",
        "Can't cast the value of message (user) attribute '{}' to a number.",
    ),
    "system attribute": (
        "InvalidParameterValue",
        "Message system attribute '{}' is invalid: only AWSTraceHeader, a String, can be sent.",
    ),
    "too long": (
        "InvalidParameterValue",
        "One or more parameters {}. Reason: Message must be shorter than {} bytes.",
    ),
    "deduplication": (
        "InvalidParameterValue",
        "The queue should either have ContentBasedDeduplication enabled or"
        " MessageDeduplicationId provided explicitly",
    ),
    "in flight": ("OverLimit", "Too many messages are in flight."),
    "handle": (
        "ReceiptHandleIsInvalid",
        'The input receipt handle "{}" is not a valid receipt handle.',
    ),
    # Batches.
    "no entries": (
        "EmptyBatchRequest",
        "There should be at least one {}RequestEntry in the request.",
    ),
    "entries": (
        "TooManyEntriesInBatchRequest",
        "Maximum number of entries per request are {}. You have sent {}.",
    ),
    "entry id": (
        "InvalidBatchEntryId",
        "A batch entry id can only contain alphanumeric characters, hyphens and underscores. It"
        " can be at most 80 letters long.",
    ),
    "entry ids": ("BatchEntryIdsNotDistinct", "Id {} repeated."),
    "batch too long": (
        "BatchRequestTooLong",
        "Batch requests cannot be longer than {} bytes. You have sent {} bytes.",
    ),
    # Message move tasks.
    "arn": (
        "InvalidParameterValue",
        f"You must use this format to specify the {{}}: {_RESOURCE}",
    ),
    "no resource": (
        "ResourceNotFoundException",
        "The resource that you specified for the {} parameter doesn't exist.",
    ),
    "no dead letters": (
        "InvalidParameterValue",
        "Source queue must be configured as a Dead Letter Queue.",
    ),
    "running": (
        "InvalidParameterValue",
        "There is already a task running. Only one active task is allowed for a source queue arn"
        " at a given time.",
    ),
    "task handle": ("InvalidParameterValue", "Value for parameter TaskHandle is invalid."),
    "no task": ("ResourceNotFoundException", "Task does not exist."),
}


def sqs_refusal(reason: str, *values: object) -> ServiceError:
    """Return the error for a row of SQS_REFUSALS."""
    code, message = SQS_REFUSALS[reason]
    return ServiceError(code, message.format(*values))


def _bad_value(value: object, parameter: str, reason: str) -> ServiceError:
    return sqs_refusal("value", value, parameter, reason)


# ---- Messages and queues ----


class Message:
    """A message and where it stands."""

    __slots__ = (
        "attributes", "body", "first_received", "hidden_until", "last_received", "message_id",
        "received", "sent", "system",
    )  # fmt: skip

    def __init__(
        self,
        message_id: str,
        body: str,
        attributes: Mapping[str, Mapping[str, Any]],
        system: Dict[str, str],
        sent: float,
    ) -> None:
        self.message_id = message_id
        self.body = body
        self.attributes = attributes
        self.system = system  # system attributes that do not change with a receive
        self.sent = sent
        self.received = 0  # how often
        self.first_received = 0.0
        self.last_received = 0.0
        self.hidden_until = 0.0  # 0 while it is visible

    @property
    def group(self) -> str:
        """The message group id; "" where none was given."""
        return self.system.get("MessageGroupId", "")


class Queue:
    """A standard queue: its settings, and its messages.

    Every operation on a message is O(log n) or better in the number of messages.
    """

    fifo = False

    def __init__(
        self,
        key: Tuple[str, str, str],
        serial: int,
        settings: Dict[str, str],
        now: float,
        lock: Any,
    ) -> None:
        self.region, self.account, self.name = key
        self.arn = "arn:aws:sqs:" + ":".join(key)
        self.url_path = f"/{self.account}/{self.name}"
        self.serial = serial  # tells queues apart that had the same name one after another
        self.settings = settings  # by the names of SETTINGS, those that are set
        self.tags: Dict[str, str] = {}
        self.created = self.modified = now
        self.purged = -math.inf
        self.deleted = False
        self.changed = threading.Condition(lock)
        self.tasks: Deque[MoveTask] = collections.deque(maxlen=10)
        self.messages: OrderedDict[str, Message] = OrderedDict()  # in the order of arrival
        self.delayed = self.in_flight = 0
        self._visible: OrderedDict[str, Message] = OrderedDict()
        self._hidden: List[Tuple[float, int, Message]] = []  # a heap; stale entries are skipped
        self._strays: List[Tuple[float, int, Message]] = []  # a heap of those older than the last
        self._order = itertools.count()

    def number(self, setting: str) -> int:
        """Return a setting that is a number."""
        return int(self.settings[setting])

    def add(self, message: Message, delay: int = 0) -> None:
        """Take in a message, hidden for its delay."""
        if self.messages and message.sent < next(reversed(self.messages.values())).sent:
            heapq.heappush(self._strays, (message.sent, next(self._order), message))
        self.messages[message.message_id] = message
        message.hidden_until = 0.0
        self._arrive(message)
        if delay:
            self.hide(message, message.sent + delay)
        else:
            self._offer(message)

    def hide(self, message: Message, until: float) -> None:
        """Make a message invisible until then."""
        self._withdraw(message)
        message.hidden_until = until
        self._count_hidden(message, 1)
        entry = (until, next(self._order), message)
        heapq.heappush(self._hidden, entry)
        if self._hidden[0] is entry:
            self.changed.notify_all()  # who waits must now wait for less
        if len(self._hidden) > 2 * len(self.messages) + 64:
            self._hidden = [entry for entry in self._hidden if self._is_due(entry)]
            heapq.heapify(self._hidden)

    def show(self, message: Message) -> None:
        """Make a message visible, behind those that are."""
        self._withdraw(message)
        self._offer(message)

    def remove(self, message: Message) -> None:
        """Drop a message, wherever it stands."""
        self._withdraw(message)
        del self.messages[message.message_id]

    def clear(self) -> None:
        """Drop all messages."""
        for held in (self.messages, self._visible, self._hidden, self._strays):
            held.clear()
        self.delayed = self.in_flight = 0

    def advance(self, now: float) -> None:
        """Let happen what was due by now: messages come back, or are too old."""
        hidden = self._hidden
        while hidden and hidden[0][0] <= now:
            entry = heapq.heappop(hidden)
            if self._is_due(entry):
                self.show(entry[2])
        oldest = now - self.number("MessageRetentionPeriod")
        while self._strays and self._strays[0][0] <= oldest:
            stray = heapq.heappop(self._strays)[2]
            if self.messages.get(stray.message_id) is stray:
                self.remove(stray)
        while self.messages:
            message = next(iter(self.messages.values()))
            if message.sent > oldest:
                break
            self.remove(message)

    def next_change(self, deadline: float) -> float:
        """Return when a hidden message may come back, `deadline` if that is earlier."""
        return min(deadline, self._hidden[0][0]) if self._hidden else deadline

    def pick(self, limit: int) -> List[Message]:
        """Return up to `limit` messages that may be received now, in their order."""
        return list(itertools.islice(self._visible.values(), limit))

    def _is_due(self, entry: Tuple[float, int, Message]) -> bool:
        until, _, message = entry
        present = self.messages.get(message.message_id) is message
        return present and message.hidden_until == until

    def _count_hidden(self, message: Message, change: int) -> None:
        if message.received:
            self.in_flight += change
        else:
            self.delayed += change

    def _arrive(self, message: Message) -> None:
        """Called when a message comes in, before it is visible or hidden."""

    def _offer(self, message: Message) -> None:
        self._visible[message.message_id] = message
        self.changed.notify()

    def _withdraw(self, message: Message) -> None:
        """Undo `hide` or `_offer`."""
        if message.hidden_until:
            self._count_hidden(message, -1)
            message.hidden_until = 0.0
        else:
            self._visible.pop(message.message_id, None)


class Sent(NamedTuple):
    """What a FIFO queue remembers of a message that was sent."""

    at: float
    message_id: str
    sequence_number: str


class FifoQueue(Queue):
    """A queue whose messages come in the order of their group, each sent once.

    Of a group, only what stands before its first hidden message may be received: so a group is
    locked while its first message is in flight ("Amazon SQS FIFO delivery logic").
    """

    fifo = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Fixed when the queue is made: AWS takes a later change without heeding it.
        self._scoped_to_group = self.settings["DeduplicationScope"] == "messageGroup"
        self._groups: Dict[str, OrderedDict[str, Message]] = {}
        self._ready: OrderedDict[str, None] = OrderedDict()  # groups, by their turn
        self._sent: OrderedDict[Tuple[str, str], Sent] = OrderedDict()
        self.attempts: OrderedDict[str, Tuple[float, List[Tuple[Message, float]]]] = OrderedDict()

    def first_sent(self, system: Mapping[str, str], sent: Sent) -> Sent:
        """Return the first sent with that deduplication id in five minutes; `sent` if none was."""
        oldest = sent.at - SECONDS_DEDUPLICATED
        while self._sent and next(iter(self._sent.values())).at <= oldest:
            self._sent.popitem(last=False)
        group = system["MessageGroupId"] if self._scoped_to_group else ""
        return self._sent.setdefault((group, system["MessageDeduplicationId"]), sent)

    def clear(self) -> None:
        """Drop all messages, and the memory of those sent."""
        super().clear()
        for held in (self._groups, self._ready, self._sent):
            held.clear()

    def change_delay(self, now: float) -> None:
        """Hold delayed messages to the present delay; on a standard queue they keep theirs."""
        delay = self.number("DelaySeconds")
        for message in self.messages.values():
            if message.hidden_until and not message.received:
                self.hide(message, message.sent + delay)
        self.advance(now)

    def next_change(self, deadline: float) -> float:
        """The oldest message may expire, too, and free its group."""
        retained = self.number("MessageRetentionPeriod")
        expiry = [
            message.sent + retained for message in itertools.islice(self.messages.values(), 1)
        ]
        return min(super().next_change(deadline), *expiry) if expiry else deadline

    def pick(self, limit: int) -> List[Message]:
        """As many as can be of one group, then of the next."""
        picked: List[Message] = []
        for group in self._ready:
            for message in self._groups[group].values():
                if message.hidden_until or len(picked) == limit:
                    break
                picked.append(message)
            if len(picked) == limit:
                break
        return picked

    def remove(self, message: Message) -> None:
        """Drop a message, which may free its group."""
        self._withdraw(message)
        del self.messages[message.message_id]
        group = self._groups[message.group]
        del group[message.message_id]
        if not group:
            del self._groups[message.group]
        self._turn(message.group)

    def hide(self, message: Message, until: float) -> None:
        """Make a message invisible, and so those behind it."""
        super().hide(message, until)
        self._turn(message.group)

    def _arrive(self, message: Message) -> None:
        self._groups.setdefault(message.group, OrderedDict())[message.message_id] = message

    def _offer(self, message: Message) -> None:
        self._turn(message.group)

    def _turn(self, name: str) -> None:
        """Give the group a turn if its first message is visible, or else none."""
        group = self._groups.get(name)
        if not group or next(iter(group.values())).hidden_until:
            self._ready.pop(name, None)
        elif name not in self._ready:
            self._ready[name] = None
            self.changed.notify()


class MoveTask:
    """Messages on their way out of a dead-letter queue ("StartMessageMoveTask")."""

    def __init__(self, given: Mapping[str, Any], task_id: str, to_move: int, now: float) -> None:
        self.task_id = task_id
        self.source_arn: str = given["SourceArn"]
        self.destination_arn: str = given.get("DestinationArn", "")
        self.rate: int = given.get("MaxNumberOfMessagesPerSecond", 0)
        self.started = now
        self.to_move = to_move
        self.moved = 0
        self.status = "RUNNING"
        self.failure = ""

    @property
    def handle(self) -> str:
        """What names the task while it runs."""
        document = {"taskId": self.task_id, "sourceArn": self.source_arn}
        return _base64_text(_to_json(document))

    def due(self, now: float) -> int:
        """Return how many messages should have moved by now."""
        rate = self.rate or MAX_MOVES_PER_SECOND
        burst = 1 if self.rate else rate
        return burst + int((now - self.started) * rate + 0.001)  # a float falls short of its tick

    def next_move(self) -> float:
        """Return when the next message is to move."""
        rate = self.rate or MAX_MOVES_PER_SECOND
        burst = 1 if self.rate else rate
        return self.started + (self.moved - burst + 1) / rate

    def output(self) -> Mapping[str, Any]:
        """Return what ListMessageMoveTasks says of it."""
        output = {
            "TaskHandle": self.handle if self.status == "RUNNING" else "",
            "Status": self.status,
            "SourceArn": self.source_arn,
            "DestinationArn": self.destination_arn,
            "MaxNumberOfMessagesPerSecond": self.rate,
            "FailureReason": self.failure,
        }
        output = {name: value for name, value in output.items() if value}
        output["ApproximateNumberOfMessagesMoved"] = self.moved
        output["ApproximateNumberOfMessagesToMove"] = self.to_move
        output["StartedTimestamp"] = int(self.started * 1000)
        return output


# ---- Queue attributes ----


class Setting(NamedTuple):
    """A queue attribute that can be set: its default, "" for none, and its normal form.

    `normal` raises ValueError for what is not allowed.
    """

    default: str
    normal: Callable[[str], str]
    fifo: bool = False  # of FIFO queues alone


def _whole(low: int, high: int) -> Callable[[str], str]:
    def normal(text: str) -> str:
        if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
            raise ValueError(text)
        return str(int(text))

    return normal


def _one_of(*allowed: str) -> Callable[[str], str]:
    by_lower = {value.lower(): value for value in allowed}

    def normal(text: str) -> str:
        if text.lower() not in by_lower:
            raise ValueError(text)
        return by_lower[text.lower()]

    return normal


def _a_policy(text: str) -> str:
    if not isinstance(read_json(text), dict):
        raise ValueError(text)
    return text


def _redrive_policy(text: str) -> str:
    try:
        policy = read_json(text)
        target, count = str(policy["deadLetterTargetArn"]), str(policy["maxReceiveCount"])
    except (ValueError, TypeError, KeyError) as error:
        raise _bad_value(
            text[:2048], "RedrivePolicy", "Redrive policy is not valid JSON."
        ) from error
    if not _NUMBER.fullmatch(count) or not 1 <= int(count) <= 1000:
        reason = f"Invalid value for maxReceiveCount: {count}, valid values are from 1 to 1000"
        raise _bad_value(text, "RedrivePolicy", f"{reason} both inclusive.")
    return _to_json({"deadLetterTargetArn": target, "maxReceiveCount": int(count)}).decode()


def _redrive_allow_policy(text: str) -> str:
    try:
        policy = read_json(text)
        permission, sources = policy["redrivePermission"], policy.get("sourceQueueArns", [])
    except (ValueError, TypeError, KeyError, AttributeError):
        permission, sources = "", []
    by_queue = permission == "byQueue"
    if permission not in ("allowAll", "denyAll", "byQueue") or not isinstance(sources, list):
        raise _bad_value(text[:2048], "RedriveAllowPolicy", "Amazon SQS can't read the policy.")
    if by_queue != bool(sources) or len(sources) > 10:
        reason = "sourceQueueArns, from 1 to 10, go with byQueue and with nothing else."
        raise _bad_value(text, "RedriveAllowPolicy", reason)
    return text


def _reuse_period(text: str) -> str:
    normal = _whole(60, 86400)(text)
    return "" if normal == "300" else normal  # the default is not shown


_BOOLEAN = _one_of("true", "false")

SETTINGS: Mapping[str, Setting] = {
    "DelaySeconds": Setting("0", _whole(0, 900)),
    "MaximumMessageSize": Setting("1048576", _whole(1024, 1048576)),
    "MessageRetentionPeriod": Setting("345600", _whole(60, 1209600)),
    "ReceiveMessageWaitTimeSeconds": Setting("0", _whole(0, 20)),
    "VisibilityTimeout": Setting("30", _whole(0, SECONDS_HELD)),
    "SqsManagedSseEnabled": Setting("true", _BOOLEAN),
    "KmsMasterKeyId": Setting("", str),
    "KmsDataKeyReusePeriodSeconds": Setting("", _reuse_period),
    "Policy": Setting("", _a_policy),
    "RedrivePolicy": Setting("", _redrive_policy),
    "RedriveAllowPolicy": Setting("", _redrive_allow_policy),
    "FifoQueue": Setting("true", _BOOLEAN, fifo=True),
    "ContentBasedDeduplication": Setting("false", _BOOLEAN, fifo=True),
    "DeduplicationScope": Setting("queue", _one_of("queue", "messageGroup"), fifo=True),
    "FifoThroughputLimit": Setting(
        "perQueue", _one_of("perQueue", "perMessageGroupId"), fifo=True
    ),
}
COMPUTED_ATTRIBUTES: Mapping[str, Callable[[Queue], object]] = {
    "QueueArn": lambda queue: queue.arn,
    "CreatedTimestamp": lambda queue: int(queue.created),
    "LastModifiedTimestamp": lambda queue: int(queue.modified),
    "ApproximateNumberOfMessages": lambda queue: (
        len(queue.messages) - queue.in_flight - queue.delayed
    ),
    "ApproximateNumberOfMessagesNotVisible": lambda queue: queue.in_flight,
    "ApproximateNumberOfMessagesDelayed": lambda queue: queue.delayed,
}


def normal_settings(given: Mapping[str, str], fifo: bool) -> Dict[str, str]:
    """Return queue attributes in their normal form, "" for one that is to be unset.

    Raises ServiceError InvalidAttributeName, InvalidAttributeValue, InvalidParameterValue.
    """
    settings: Dict[str, str] = {}
    for name, text in given.items():
        setting = SETTINGS.get(name)
        if setting is None or (setting.fifo and not fifo):
            known = name in ("DeduplicationScope", "FifoThroughputLimit")
            raise sqs_refusal("of fifo alone" if known else "attribute name", name)
        try:
            unset = not text and not setting.default
            settings[name] = "" if unset else setting.normal(text)
        except ValueError as error:
            raise sqs_refusal("attribute value", name) from error
    if settings.get("FifoQueue") == "false":
        raise sqs_refusal("queue type")
    return settings


def check_encryption(settings: Mapping[str, str]) -> None:
    """Refuse settings that ask for two kinds of encryption at once."""
    if settings.get("KmsMasterKeyId") and settings.get("SqsManagedSseEnabled") == "true":
        raise sqs_refusal("two encryptions")


# ---- What may be sent ----

_QUEUE_NAME = re.compile("[A-Za-z0-9_-]{1,80}")
_FIFO_NAME = re.compile(r"(?=.{6,80}\Z)[A-Za-z0-9_-]+\.fifo")
_QUEUE_ARN = re.compile("arn:[a-z-]+:sqs:[A-Za-z0-9_-]+:[0-9]{12}:[A-Za-z0-9_.-]{1,80}")
_BATCH_ID = re.compile("[A-Za-z0-9_-]{1,80}")
_GROUP_ID = re.compile("[!-~]{1,128}")
_ATTRIBUTE_NAME = re.compile(r"(?!(?i:aws\.|amazon\.))(?!\.)[\w.-]{1,256}(?<!\.)")
_DATA_TYPE = re.compile(r"(String|Number|Binary)(\.[^\0-\x1f\ud800-\udfff]{1,248})?")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def attributes_md5(attributes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the digest of message attributes ("Amazon SQS message metadata")."""
    digest = hashlib.md5(usedforsecurity=False)
    for name, attribute in sorted(attributes.items()):
        binary = "BinaryValue" in attribute
        value = attribute["BinaryValue"] if binary else attribute["StringValue"].encode()
        for part in (name.encode(), attribute["DataType"].encode()):
            digest.update(len(part).to_bytes(4, "big") + part)
        digest.update((b"\2" if binary else b"\1") + len(value).to_bytes(4, "big") + value)
    return digest.hexdigest()


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _check_body(body: str) -> None:
    if not body:
        raise sqs_refusal("missing", "MessageBody")
    if _NOT_XML.search(body):
        raise sqs_refusal("characters")


def _check_attributes(attributes: Mapping[str, Mapping[str, Any]]) -> None:
    if len(attributes) > MAX_ATTRIBUTES:
        raise sqs_refusal("attributes", len(attributes))
    for name, attribute in attributes.items():
        if attribute.get("StringListValues") or attribute.get("BinaryListValues"):
            raise sqs_refusal("list values", name)
        kind = _DATA_TYPE.fullmatch(attribute.get("DataType", ""))
        if not _ATTRIBUTE_NAME.fullmatch(name):
            raise sqs_refusal("attribute", name[:256], "have a name that is allowed")
        if not kind:
            reason = "have a type that begins with String, Number or Binary"
            raise sqs_refusal("attribute", name, reason)
        value = attribute.get("BinaryValue" if kind[1] == "Binary" else "StringValue")
        if not value or len({"StringValue", "BinaryValue"} & set(attribute)) > 1:
            reason = f"contain a non-empty value of type '{kind[1]}'"
            raise sqs_refusal("attribute", name, reason)
        if isinstance(value, str) and _NOT_XML.search(value):
            raise sqs_refusal("attribute", name, "contain valid characters alone")
        if kind[1] == "Number" and not _DECIMAL.fullmatch(value):
            raise sqs_refusal("number", name)


def _check_system(attributes: Mapping[str, Mapping[str, Any]]) -> None:
    for name, attribute in attributes.items():
        if name != "AWSTraceHeader" or attribute.get("DataType") != "String":
            raise sqs_refusal("system attribute", name[:80])
    _check_attributes(attributes)


def _size(entry: Mapping[str, Any]) -> int:
    """Return the bytes of a message that count: body, and names, types, values of attributes."""
    size = len(entry["MessageBody"].encode("utf-8", "surrogatepass"))
    for name, attribute in entry.get("MessageAttributes", {}).items():
        size += len(name.encode("utf-8", "surrogatepass"))
        for value in attribute.values():
            encoded = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            size += len(encoded)
    return size


def _in_range(value: int, low: int, high: int, parameter: str, reason: str) -> int:
    if not low <= value <= high:
        raise _bad_value(value, parameter, reason)
    return value


def _visibility(seconds: int) -> int:
    reason = f"Must be between 0 and {SECONDS_HELD}, if provided."
    return _in_range(seconds, 0, SECONDS_HELD, "VisibilityTimeout", reason)


def _check_id(given: Mapping[str, Any], parameter: str) -> None:
    value = given.get(parameter)
    if value is not None and not _GROUP_ID.fullmatch(value):
        reason = f"{parameter} can only include alphanumeric and punctuation characters."
        raise _bad_value(value[:256], parameter, f"{reason} 1 to 128 in length.")


def _check_fifo(queue: Queue, entry: Mapping[str, Any], in_batch: bool) -> None:
    """Refuse what does not fit the kind of queue; in a batch this fails the whole batch."""
    _check_id(entry, "MessageGroupId")
    _check_id(entry, "MessageDeduplicationId")
    if not queue.fifo:
        if "MessageDeduplicationId" in entry:
            reason = "The request includes a parameter that is not valid for this queue type."
            value = entry["MessageDeduplicationId"]
            raise _bad_value(value, "MessageDeduplicationId", reason)
        return
    if "MessageGroupId" not in entry:
        missing = sqs_refusal("missing", "MessageGroupId")
        raise sqs_refusal("invalid", missing.message) if in_batch else missing
    by_content = queue.settings["ContentBasedDeduplication"] == "true"
    if "MessageDeduplicationId" not in entry and not by_content:
        raise sqs_refusal("deduplication")


# ---- The operations ----


class Sqs:
    """The queues of all accounts and regions, and the operations on them.

    With `cooldown`, a queue may be purged, and made anew under a deleted name, only when 60
    seconds have passed, as on AWS.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        secret: Optional[bytes] = None,
        wait: Callable[[threading.Condition, float], Any] = threading.Condition.wait,
        cooldown: bool = False,
    ) -> None:
        self._clock = clock
        self._new_id = new_id
        self._secret = secret or os.urandom(32)  # receipt handles of others are not ours
        self._wait = wait
        self._cooldown = cooldown
        self._lock = threading.RLock()
        self._queues: Dict[Tuple[str, str, str], Queue] = {}  # by region, account, name
        self._deleted: Dict[Tuple[str, str, str], float] = {}
        self._running: List[MoveTask] = []
        self._serials = itertools.count(1)

    def answer(self, call: Call) -> Optional[Mapping[str, Any]]:
        """Return the output of a call; the queues are untouched where it raises ServiceError."""
        with self._lock:
            if self._running:
                self._move_messages(self._clock())
            output: Optional[Mapping[str, Any]] = OPERATIONS[call.operation].method(self, call)
            return output

    # ---- Queues ----

    def _queue(self, call: Call) -> Queue:
        """Return the queue of a QueueUrl: its last two segments count, or the name alone."""
        path = call.input.get("QueueUrl", "").rstrip("/")
        rest, slash, name = path.rpartition("/")
        account = rest.rpartition("/")[2] if slash else call.caller.account_id
        return self._found(call, account, name)

    def _found(self, call: Call, account: str, name: str) -> Queue:
        queue = self._queues.get((call.region, account, name))
        if queue is None or account != call.caller.account_id:
            raise sqs_refusal("no queue")
        queue.advance(self._clock())
        return queue

    def _by_arn(self, arn: str) -> Optional[Queue]:
        parts = arn.split(":")
        return self._queues.get((parts[3], parts[4], parts[5])) if len(parts) == 6 else None

    def create_queue(self, call: Call) -> Mapping[str, Any]:
        """Make a queue, or find one of that name whose attributes do not differ."""
        name, given = call.input.get("QueueName", ""), call.input.get("Attributes", {})
        fifo = given.get("FifoQueue", "").lower() == "true"
        if fifo and not _FIFO_NAME.fullmatch(name):
            raise sqs_refusal("fifo name")
        if not fifo and not _QUEUE_NAME.fullmatch(name):
            raise sqs_refusal("queue name")
        settings = normal_settings(given, fifo)
        check_encryption(settings)
        now, key = self._clock(), (call.region, call.caller.account_id, name)
        queue = self._queues.get(key)
        if queue:
            for attribute, value in settings.items():
                if queue.settings.get(attribute, "") != value:
                    raise sqs_refusal("exists", attribute)
            return {"QueueUrl": call.base_url + queue.url_path}
        if self._cooldown and now < self._deleted.get(key, -math.inf) + SECONDS_COOLING:
            raise sqs_refusal("deleted recently")
        defaults = {
            attribute: setting.default
            for attribute, setting in SETTINGS.items()
            if setting.default and (fifo or not setting.fifo)
        }
        kind = FifoQueue if fifo else Queue
        queue = kind(key, next(self._serials), {**defaults, **settings}, now, self._lock)
        self._check_redrive(queue, settings)
        self._drop_unset(queue)
        queue.tags = dict(call.input.get("tags", {}))
        self._queues[key] = queue
        return {"QueueUrl": call.base_url + queue.url_path}

    def _check_redrive(self, queue: Queue, settings: Mapping[str, str]) -> None:
        """Refuse a RedrivePolicy whose target is missing, of the other kind, or unwilling."""
        text = settings.get("RedrivePolicy")
        if not text:
            return
        arn = json.loads(text)["deadLetterTargetArn"]
        target = queue if arn == queue.arn else self._by_arn(arn)
        reason = ""
        if target is None or target.region != queue.region:
            reason = "Dead letter target does not exist."
        elif target.fifo != queue.fifo:
            reason = "Dead-letter queue must be same type of queue as the source."
        elif target.settings.get("RedriveAllowPolicy"):
            policy = json.loads(target.settings["RedriveAllowPolicy"])
            allowed = policy["redrivePermission"]
            named = queue.arn in policy.get("sourceQueueArns", [])
            if allowed == "denyAll" or (allowed == "byQueue" and not named):
                reason = "The RedriveAllowPolicy of the dead-letter queue does not allow it."
        if reason:
            raise _bad_value(text, "RedrivePolicy", reason)

    def _drop_unset(self, queue: Queue) -> None:
        if queue.settings.get("KmsMasterKeyId"):
            queue.settings["SqsManagedSseEnabled"] = "false"
        queue.settings = {name: value for name, value in queue.settings.items() if value}

    def get_queue_url(self, call: Call) -> Mapping[str, Any]:
        """Return the URL of a queue, given its name."""
        name = call.input.get("QueueName", "")
        if not name:
            message = "Value for parameter QueueName is invalid. Reason: Must be specified."
            raise sqs_refusal("invalid", message)
        owner = call.input.get("QueueOwnerAWSAccountId") or call.caller.account_id
        return {"QueueUrl": call.base_url + self._found(call, owner, name).url_path}

    def _page(self, call: Call, member: str, queues: Iterable[Queue]) -> Mapping[str, Any]:
        """Return a page of queue URLs, by name; a token only if a page was asked for."""
        reason = "Must be between 1 and 1000, if provided."
        most = _in_range(call.input.get("MaxResults", 1000), 1, 1000, "MaxResults", reason)
        try:
            after = _from_base64(call.input.get("NextToken", "")).decode("utf-8")
        except (ServiceError, UnicodeDecodeError) as error:
            raise sqs_refusal("token") from error
        ordered = sorted(queues, key=lambda queue: queue.name)
        left = [queue for queue in ordered if queue.name > after]
        output: Dict[str, Any] = {}
        if left:
            output[member] = [call.base_url + queue.url_path for queue in left[:most]]
        if len(left) > most and "MaxResults" in call.input:
            output["NextToken"] = _base64_text(left[most - 1].name.encode())
        return output

    def list_queues(self, call: Call) -> Mapping[str, Any]:
        """Return the URLs of the caller's queues in the region, by name, a page at a time."""
        prefix, mine = call.input.get("QueueNamePrefix", ""), (call.region, call.caller.account_id)
        chosen = (q for key, q in self._queues.items() if key[:2] == mine)
        return self._page(call, "QueueUrls", (q for q in chosen if q.name.startswith(prefix)))

    def list_dead_letter_source_queues(self, call: Call) -> Mapping[str, Any]:
        """Return the URLs of the queues whose dead letters go to this one."""
        arn = self._queue(call).arn
        sources = (q for q in self._queues.values() if self._dead_letter_arn(q) == arn)
        return self._page(call, "queueUrls", sources)

    def _dead_letter_arn(self, queue: Queue) -> str:
        text = queue.settings.get("RedrivePolicy")
        return json.loads(text)["deadLetterTargetArn"] if text else ""

    def get_queue_attributes(self, call: Call) -> Mapping[str, Any]:
        """Return the attributes asked for, those that are set."""
        queue, asked = self._queue(call), call.input.get("AttributeNames", [])
        for name in asked:
            if name not in SETTINGS and name not in COMPUTED_ATTRIBUTES and name != "All":
                raise sqs_refusal("attribute name", name)
        shown = {**SETTINGS, **COMPUTED_ATTRIBUTES} if "All" in asked else asked
        attributes = {}
        for name in shown:
            if name in COMPUTED_ATTRIBUTES:
                attributes[name] = str(COMPUTED_ATTRIBUTES[name](queue))
            elif name in queue.settings:
                attributes[name] = queue.settings[name]
        return {"Attributes": attributes} if attributes else {}

    def set_queue_attributes(self, call: Call) -> None:
        """Change attributes of a queue; all of them or none."""
        queue = self._queue(call)
        settings = normal_settings(call.input["Attributes"], queue.fifo)
        both = "SqsManagedSseEnabled" in settings
        check_encryption({**queue.settings, **settings} if both else settings)
        self._check_redrive(queue, settings)
        queue.settings = {**queue.settings, **settings}
        self._drop_unset(queue)
        queue.modified = self._clock()
        if isinstance(queue, FifoQueue) and "DelaySeconds" in settings:
            queue.change_delay(queue.modified)

    def purge_queue(self, call: Call) -> None:
        """Drop all messages of a queue: visible, in flight and delayed."""
        queue, now = self._queue(call), self._clock()
        if self._cooldown and now < queue.purged + SECONDS_COOLING:
            raise sqs_refusal("purged recently", queue.name)
        queue.purged = now
        queue.clear()

    def delete_queue(self, call: Call) -> None:
        """Drop a queue; calls that wait on it learn that it is gone."""
        queue = self._queue(call)
        key = (queue.region, queue.account, queue.name)
        del self._queues[key]
        if self._cooldown:
            self._deleted[key] = self._clock()
        queue.deleted = True
        queue.changed.notify_all()

    # ---- Tags and permissions ----

    def tag_queue(self, call: Call) -> None:
        """Add tags to a queue, or change them."""
        self._queue(call).tags.update(call.input["Tags"])

    def untag_queue(self, call: Call) -> None:
        """Take tags off a queue."""
        tags = self._queue(call).tags
        for key in call.input["TagKeys"]:
            tags.pop(key, None)

    def list_queue_tags(self, call: Call) -> Mapping[str, Any]:
        """Return the tags of a queue."""
        tags = self._queue(call).tags
        return {"Tags": tags} if tags else {}

    def add_permission(self, call: Call) -> None:
        """Add a statement to the queue's policy, which is kept and not enforced."""
        queue, label = self._queue(call), call.input["Label"]
        accounts, actions = call.input["AWSAccountIds"], call.input["Actions"]
        if not _BATCH_ID.fullmatch(label):
            reason = "Can only include alphanumeric characters, hyphens, or underscores."
            raise _bad_value(label[:80], "Label", f"{reason} 1 to 80 in length")
        if len(actions) > 7:
            raise sqs_refusal("actions", len(actions))
        for name, values in (("AWSAccountId", accounts), ("ActionName", actions)):
            if not values:
                raise sqs_refusal("missing", f"{name}.1")
        for action in actions:
            if action != "*" and action not in OPERATIONS:
                reason = "Please refer to the appropriate WSDL for a list of valid actions."
                raise _bad_value(f"SQS:{action[:80]}", "ActionName", reason)
        policy = json.loads(queue.settings.get("Policy", "{}"))
        statements = self._statements(policy)
        if any(statement.get("Sid") == label for statement in statements):
            raise _bad_value(label, "Label", "Already exists.")
        principals = [f"arn:aws:iam::{account}:root" for account in accounts]
        spelled = [f"SQS:{action}" for action in actions]
        statement = {
            "Sid": label,
            "Effect": "Allow",
            "Principal": {"AWS": principals if len(principals) > 1 else principals[0]},
            "Action": spelled if len(spelled) > 1 else spelled[0],
            "Resource": queue.arn,
        }
        empty = {"Version": "2008-10-17", "Id": f"{queue.arn}/SQSDefaultPolicy"}
        self._set_policy(queue, {**empty, **policy, "Statement": [*statements, statement]})

    def remove_permission(self, call: Call) -> None:
        """Take a statement out of the queue's policy; with the last the policy goes."""
        queue, label = self._queue(call), call.input["Label"]
        policy = json.loads(queue.settings.get("Policy", "{}"))
        statements = self._statements(policy)
        left = [statement for statement in statements if statement.get("Sid") != label]
        if len(left) == len(statements):
            raise _bad_value(label[:80], "Label", "can't find label.")
        self._set_policy(queue, {**policy, "Statement": left} if left else {})

    def _statements(self, policy: Mapping[str, Any]) -> List[Dict[str, Any]]:
        found = policy.get("Statement", [])
        return [
            item for item in (found if isinstance(found, list) else [found]) if type(item) is dict
        ]

    def _set_policy(self, queue: Queue, policy: Mapping[str, Any]) -> None:
        queue.settings["Policy"] = _to_json(policy).decode() if policy else ""
        self._drop_unset(queue)
        queue.modified = self._clock()

    # ---- Sending ----

    def send_message(self, call: Call) -> Mapping[str, Any]:
        """Take in a message; it is visible after its delay."""
        queue = self._queue(call)
        _check_fifo(queue, call.input, in_batch=False)
        return self._send(queue, call, call.input, "are invalid")

    def send_message_batch(self, call: Call) -> Mapping[str, Any]:
        """Take in up to ten messages, each on its own."""
        queue, entries = self._queue(call), self._entries(call)
        size = sum(map(_size, entries))
        if size > MAX_BATCH_BYTES:
            raise sqs_refusal("batch too long", MAX_BATCH_BYTES, size)
        for entry in entries:
            _check_fifo(queue, entry, in_batch=True)
        return self._each(
            entries, lambda entry: self._send(queue, call, entry, "cannot be validated")
        )

    def _send(
        self, queue: Queue, call: Call, entry: Mapping[str, Any], too_long: str
    ) -> Mapping[str, Any]:
        body, attributes = entry["MessageBody"], entry.get("MessageAttributes", {})
        system = entry.get("MessageSystemAttributes", {})
        _check_body(body)
        most = queue.number("MaximumMessageSize")
        if _size(entry) > most:
            raise sqs_refusal("too long", too_long, most)
        _check_attributes(attributes)
        _check_system(system)
        delay, now = self._delay(queue, entry), self._clock()
        kept = {"SenderId": call.caller.access_key_id}
        if "MessageGroupId" in entry:
            kept["MessageGroupId"] = entry["MessageGroupId"]
        trace = call.request.header("x-amzn-trace-id")
        if "AWSTraceHeader" in system:
            kept["AWSTraceHeader"] = system["AWSTraceHeader"]["StringValue"]
        elif trace:
            kept["AWSTraceHeader"] = trace
        sent = first = Sent(now, self._new_id(), self._sequence_number())
        if isinstance(queue, FifoQueue):
            by_content = hashlib.sha256(body.encode()).hexdigest
            kept["MessageDeduplicationId"] = entry.get("MessageDeduplicationId") or by_content()
            kept["SequenceNumber"] = sent.sequence_number
            first = queue.first_sent(kept, sent)
        if first is sent:
            queue.add(Message(sent.message_id, body, attributes, kept, now), delay)
        output = {"MessageId": first.message_id, "MD5OfMessageBody": _md5(body)}
        if attributes:
            output["MD5OfMessageAttributes"] = attributes_md5(attributes)
        if system:
            output["MD5OfMessageSystemAttributes"] = attributes_md5(system)
        if queue.fifo:
            output["SequenceNumber"] = first.sequence_number
        return output

    def _sequence_number(self) -> str:
        return f"{next(self._serials):020d}"

    def _delay(self, queue: Queue, entry: Mapping[str, Any]) -> int:
        reason = "DelaySeconds must be >= 0 and <= 900."
        of_queue = queue.number("DelaySeconds")
        given = _in_range(entry.get("DelaySeconds", of_queue), 0, 900, "DelaySeconds", reason)
        if not queue.fifo:
            return given
        if given and "DelaySeconds" in entry:
            reason = "The request include parameter that is not valid for this queue type."
            raise _bad_value(given, "DelaySeconds", reason)
        return of_queue

    # ---- Batches ----

    def _entries(self, call: Call) -> Sequence[Mapping[str, Any]]:
        """Return the entries of a batch; refuse the whole of it for what is wrong with it."""
        entries: Sequence[Mapping[str, Any]] = call.input["Entries"]
        if not entries:
            raise sqs_refusal("no entries", call.operation)
        if len(entries) > MAX_BATCH:
            raise sqs_refusal("entries", MAX_BATCH, len(entries))
        seen: Set[str] = set()
        for entry in entries:
            if not _BATCH_ID.fullmatch(entry["Id"]):
                raise sqs_refusal("entry id")
        for entry in entries:
            if entry["Id"] in seen:
                raise sqs_refusal("entry ids", entry["Id"])
            seen.add(entry["Id"])
        return entries

    def _each(
        self,
        entries: Sequence[Mapping[str, Any]],
        act: Callable[[Mapping[str, Any]], Optional[Mapping[str, Any]]],
    ) -> Mapping[str, Any]:
        """Return what became of each entry; one that fails leaves the others be."""
        successful, failed = [], []
        for entry in entries:
            try:
                successful.append({"Id": entry["Id"], **(act(entry) or {})})
            except ServiceError as error:
                failed.append(
                    {
                        "Id": entry["Id"],
                        "SenderFault": True,
                        "Code": error.fault.code,
                        "Message": error.message,
                    }
                )
        outcome = (("Successful", successful), ("Failed", failed))
        return {member: results for member, results in outcome if results}

    # ---- Receiving ----

    def receive_message(self, call: Call) -> Mapping[str, Any]:
        """Return messages, hidden from others from now on; wait for the first if asked to."""
        queue, given = self._queue(call), call.input
        limit = _in_range(
            given.get("MaxNumberOfMessages", 1), 1, 10, "MaxNumberOfMessages",
            "Must be between 1 and 10, if provided.",
        )  # fmt: skip
        patience = _in_range(
            given.get("WaitTimeSeconds", queue.number("ReceiveMessageWaitTimeSeconds")), 0, 20,
            "WaitTimeSeconds", "Must be >= 0 and <= 20, if provided.",
        )  # fmt: skip
        timeout = _visibility(given.get("VisibilityTimeout", queue.number("VisibilityTimeout")))
        _check_id(given, "ReceiveRequestAttemptId")
        now = self._clock()
        deadline = now + patience
        while True:
            messages = self._again(queue, given, timeout, now)
            messages = messages or self._take(queue, limit, timeout, now)
            if messages or now >= deadline:
                break
            self._wait(queue.changed, self._next_change(queue, deadline) - now)
            now = self._clock()
            if self._running:
                self._move_messages(now)
            if queue.deleted:
                raise sqs_refusal("no queue")
            queue.advance(now)
            if call.request.abandoned():
                if queue.pick(1):
                    queue.changed.notify()  # the wake-up was for a message; pass it on
                return {}
        if not messages:
            if queue.in_flight >= MAX_IN_FLIGHT and not queue.fifo and not patience:
                raise sqs_refusal("in flight")
            return {}
        self._remember(queue, given, messages, now)
        return {"Messages": [self._received(queue, message, given) for message in messages]}

    def _next_change(self, queue: Queue, deadline: float) -> float:
        moves = [task.next_move() for task in self._running]
        return min([queue.next_change(deadline), *moves])

    def _take(self, queue: Queue, limit: int, timeout: int, now: float) -> List[Message]:
        """Return up to `limit` messages, received now; those received too often are moved."""
        target, most = self._dead_letters(queue)
        taken: List[Message] = []
        dead: List[Message] = []
        while len(taken) < limit:
            room = limit if queue.fifo else max(0, MAX_IN_FLIGHT - queue.in_flight)
            picked = queue.pick(min(limit - len(taken), room))
            if not picked:
                break
            for message in picked:
                if target and message.received >= most:
                    queue.remove(message)
                    dead.append(message)
                else:
                    message.received += 1
                    message.first_received = message.first_received or now
                    message.last_received = now
                    queue.hide(message, now + timeout)
                    taken.append(message)
        if not timeout:
            for message in taken:
                queue.show(message)
        for message in dead:
            assert target
            self._bury(queue, target, message, now)
        return taken

    def _dead_letters(self, queue: Queue) -> Tuple[Optional[Queue], int]:
        """Return where messages go, and after how many receives; None for nowhere."""
        text = queue.settings.get("RedrivePolicy")
        if not text:
            return None, 0
        policy = json.loads(text)
        return self._by_arn(policy["deadLetterTargetArn"]), policy["maxReceiveCount"]

    def _bury(self, queue: Queue, target: Queue, message: Message, now: float) -> None:
        """Give a message to the dead-letter queue; the count of its receives goes on."""
        message.system = {**message.system, "DeadLetterQueueSourceArn": queue.arn}
        if target.fifo:
            message.sent = now  # a standard queue keeps it ("Amazon SQS dead-letter queues")
        target.add(message)
        onward, most = self._dead_letters(target)
        if onward and message.received >= most:  # two waiters would move it to and fro for ever
            target.hide(message, now + target.number("VisibilityTimeout") + 1)

    def _again(
        self, queue: Queue, given: Mapping[str, Any], timeout: int, now: float
    ) -> List[Message]:
        """Return what the same attempt has received, if nothing has happened to it since."""
        attempt = given.get("ReceiveRequestAttemptId")
        if attempt is None or not isinstance(queue, FifoQueue):
            return []
        then, received = queue.attempts.pop(attempt, (-math.inf, []))
        untouched = all(
            queue.messages.get(message.message_id) is message and message.hidden_until == until
            for message, until in received
        )
        if not untouched or now >= then + SECONDS_DEDUPLICATED:
            return []
        for message, _ in received:
            queue.hide(message, now + timeout)
        return [message for message, _ in received]

    def _remember(
        self, queue: Queue, given: Mapping[str, Any], messages: Sequence[Message], now: float
    ) -> None:
        attempt = given.get("ReceiveRequestAttemptId")
        if attempt is None or not isinstance(queue, FifoQueue):
            return
        attempts = queue.attempts
        while attempts and next(iter(attempts.values()))[0] <= now - SECONDS_DEDUPLICATED:
            attempts.popitem(last=False)
        attempts[attempt] = (now, [(message, message.hidden_until) for message in messages])

    def _received(
        self, queue: Queue, message: Message, given: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        output: Dict[str, Any] = {
            "MessageId": message.message_id,
            "ReceiptHandle": self._receipt_handle(queue, message),
            "MD5OfBody": _md5(message.body),
            "Body": message.body,
        }
        asked = {*given.get("AttributeNames", ()), *given.get("MessageSystemAttributeNames", ())}
        if asked:
            system = {
                **message.system,
                "SentTimestamp": str(int(message.sent * 1000)),
                "ApproximateReceiveCount": str(message.received),
                "ApproximateFirstReceiveTimestamp": str(int(message.first_received * 1000)),
            }
            shown = {k: v for k, v in system.items() if k in asked or "All" in asked}
            if shown:
                output["Attributes"] = shown
        names = given.get("MessageAttributeNames", ())
        chosen = {
            name: value
            for name, value in message.attributes.items()
            if any(_asks_for(pattern, name) for pattern in names)
        }
        if chosen:
            output["MD5OfMessageAttributes"] = attributes_md5(chosen)
            output["MessageAttributes"] = chosen
        return output

    # ---- What is done with a receipt handle ----

    def _receipt_handle(self, queue: Queue, message: Message) -> str:
        text = f"{queue.serial}:{message.message_id}:{message.received}".encode()
        return "AQEB" + _base64_text(hmac.digest(self._secret, text, "sha256")[:12] + text)

    def _of_handle(self, queue: Queue, handle: str) -> Tuple[Optional[Message], bool]:
        """Return the message of a handle, None if gone, and whether this receive still holds it.

        Raises ServiceError ReceiptHandleIsInvalid for what was never issued for the queue.
        """
        try:
            raw = base64.b64decode(handle[4:].encode("ascii"), validate=True)
        except ValueError:
            raw = b""
        text = raw[12:]
        genuine = hmac.compare_digest(hmac.digest(self._secret, text, "sha256")[:12], raw[:12])
        serial, _, rest = text.decode("latin-1").partition(":")
        if not genuine or not handle.startswith("AQEB") or serial != str(queue.serial):
            raise sqs_refusal("handle", handle)
        message_id, _, count = rest.partition(":")
        message = queue.messages.get(message_id)
        held = message is not None and message.hidden_until > 0 and count == str(message.received)
        return message, held

    def delete_message(self, call: Call) -> None:
        """Drop a received message; nothing happens if it is gone already."""
        self._delete(self._queue(call), call.input["ReceiptHandle"])

    def delete_message_batch(self, call: Call) -> Mapping[str, Any]:
        """Drop up to ten received messages."""
        queue, entries = self._queue(call), self._entries(call)
        return self._each(entries, lambda entry: self._delete(queue, entry["ReceiptHandle"]))

    def _delete(self, queue: Queue, handle: str) -> None:
        message, held = self._of_handle(queue, handle)
        if message and queue.fifo and not held:
            raise _bad_value(handle, "ReceiptHandle", "The receipt handle has expired.")
        if message:
            queue.remove(message)

    def change_message_visibility(self, call: Call) -> None:
        """Hide a received message for so many seconds from now on; 0 shows it at once."""
        self._change(self._queue(call), call.input)

    def change_message_visibility_batch(self, call: Call) -> Mapping[str, Any]:
        """Hide or show up to ten received messages."""
        queue, entries = self._queue(call), self._entries(call)
        return self._each(entries, lambda entry: self._change(queue, entry))

    def _change(self, queue: Queue, entry: Mapping[str, Any]) -> None:
        if "VisibilityTimeout" not in entry:
            raise sqs_refusal("missing", "VisibilityTimeout")
        timeout, handle = _visibility(entry["VisibilityTimeout"]), entry["ReceiptHandle"]
        message, held = self._of_handle(queue, handle)
        if message is None or (queue.fifo and not held):
            reason = "Message does not exist or is not available for visibility timeout change."
            raise _bad_value(handle, "ReceiptHandle", reason)
        now = self._clock()
        if now + timeout > message.last_received + SECONDS_HELD:
            reason = "Total VisibilityTimeout for the message is beyond the limit"
            raise _bad_value(timeout, "VisibilityTimeout", f"{reason} [{SECONDS_HELD} seconds]")
        if timeout:
            queue.hide(message, now + timeout)
        else:
            queue.show(message)

    # ---- Moving messages out of a dead-letter queue ----

    def start_message_move_task(self, call: Call) -> Mapping[str, Any]:
        """Begin to move messages from a dead-letter queue to their own, or elsewhere."""
        given, now = call.input, self._clock()
        source = self._arn_of(call, "SourceArn")
        if "DestinationArn" in given and self._arn_of(call, "DestinationArn").fifo != source.fifo:
            message = "The source and the destination must be queues of the same type."
            raise sqs_refusal("invalid", message)
        rate = given.get("MaxNumberOfMessagesPerSecond", 1)
        reason = f"Must be between 1 and {MAX_MOVES_PER_SECOND}, if provided."
        _in_range(rate, 1, MAX_MOVES_PER_SECOND, "MaxNumberOfMessagesPerSecond", reason)
        if all(self._dead_letter_arn(queue) != source.arn for queue in self._queues.values()):
            raise sqs_refusal("no dead letters")
        if any(task.source_arn == source.arn for task in self._running):
            raise sqs_refusal("running")
        visible = len(source.messages) - source.in_flight - source.delayed
        task = MoveTask(given, self._new_id(), visible, now)
        source.tasks.appendleft(task)
        self._running.append(task)
        handle = task.handle
        self._move_messages(now)
        for queue in self._queues.values():
            queue.changed.notify_all()  # who waits must now wait for less
        return {"TaskHandle": handle}

    def _arn_of(self, call: Call, parameter: str) -> Queue:
        arn = call.input[parameter]
        if not _QUEUE_ARN.fullmatch(arn):
            raise sqs_refusal("arn", parameter)
        queue = self._by_arn(arn)
        if queue is None or (queue.region, queue.account) != (call.region, call.caller.account_id):
            raise sqs_refusal("no resource", parameter)
        queue.advance(self._clock())
        return queue

    def list_message_move_tasks(self, call: Call) -> Mapping[str, Any]:
        """Return the latest tasks of a source queue, newest first."""
        source = self._arn_of(call, "SourceArn")
        reason = "Must be between 1 and 10, if provided."
        most = _in_range(call.input.get("MaxResults", 1), 1, 10, "MaxResults", reason)
        tasks = list(itertools.islice(source.tasks, most))
        return {"Results": [task.output() for task in tasks]} if tasks else {}

    def cancel_message_move_task(self, call: Call) -> Mapping[str, Any]:
        """Stop a running task; what has moved stays where it is."""
        try:
            document = read_json(_from_base64(call.input["TaskHandle"]).decode())
            task_id, arn = document["taskId"], document["sourceArn"]
        except (ServiceError, ValueError, TypeError, KeyError) as error:
            raise sqs_refusal("task handle") from error
        for task in self._running:
            if task.task_id == task_id and task.source_arn == arn:
                task.status = "CANCELLED"
                self._running.remove(task)
                return {"ApproximateNumberOfMessagesMoved": task.moved}
        raise sqs_refusal("no task")

    def _move_messages(self, now: float) -> None:
        """Move what the running tasks should have moved by now."""
        for task in list(self._running):
            source = self._by_arn(task.source_arn)
            if source:
                source.advance(now)
            due = min(task.due(now), task.to_move)
            while source and task.moved < due and task.status == "RUNNING":
                picked = source.pick(1)
                if not picked:
                    break
                arn = task.destination_arn or picked[0].system.get("DeadLetterQueueSourceArn", "")
                target = self._by_arn(arn)
                if target is None:
                    task.status = "FAILED"
                    task.failure = ERRORS["QueueDoesNotExist"].code
                else:
                    source.remove(picked[0])
                    self._redrive(target, picked[0], now)
                    task.moved += 1
            if source is None:
                task.status, task.failure = "FAILED", ERRORS["QueueDoesNotExist"].code
            elif task.status == "RUNNING" and (task.moved >= task.to_move or not source.pick(1)):
                task.status = "COMPLETED"
            if task.status != "RUNNING":
                self._running.remove(task)

    def _redrive(self, target: Queue, message: Message, now: float) -> None:
        """Send a dead letter again: a new message with a new id ("Configure a DLQ redrive")."""
        kept = {k: v for k, v in message.system.items() if k != "DeadLetterQueueSourceArn"}
        if target.fifo:
            kept["SequenceNumber"] = self._sequence_number()
        target.add(Message(self._new_id(), message.body, message.attributes, kept, now))


def _asks_for(pattern: str, name: str) -> bool:
    if pattern in ("All", ".*", "*"):
        return True
    return name.startswith(pattern[:-2]) if pattern.endswith(".*") else name == pattern


# ---- The table of operations ----

_SHAPES: Dict[str, Shape] = {
    "int": INTEGER,
    "blob": BLOB,
    "list": ListOf(STRING),
    "blobs": ListOf(BLOB),
    "map": MapOf(STRING),
}
_SHAPES["attributes"] = MapOf(
    structure(
        "DataType StringValue BinaryValue:blob StringListValues:list BinaryListValues:blobs",
        _SHAPES,
    )
)
_SENT = (
    "MessageBody* DelaySeconds:int MessageAttributes:attributes"
    " MessageSystemAttributes:attributes MessageDeduplicationId MessageGroupId"
)
for _entry, _members in (
    ("to_change", "Id* ReceiptHandle* VisibilityTimeout:int"),
    ("to_delete", "Id* ReceiptHandle*"),
    ("to_send", f"Id* {_SENT}"),
):
    _SHAPES[_entry] = ListOf(structure(_members, _SHAPES))

# Operation, input, and behind the arrow the output; no arrow: it has none.  QueueUrl is required
# too, but who leaves it out is told that there is no such queue.
OPERATIONS: Mapping[str, Operation] = operations(
    Sqs,
    _SHAPES,
    f"""
    AddPermission QueueUrl Label* AWSAccountIds*:list Actions*:list
    CancelMessageMoveTask TaskHandle* -> ApproximateNumberOfMessagesMoved
    ChangeMessageVisibility QueueUrl ReceiptHandle* VisibilityTimeout*:int
    ChangeMessageVisibilityBatch QueueUrl Entries*:to_change -> Successful Failed
    CreateQueue QueueName Attributes:map tags:map -> QueueUrl
    DeleteMessage QueueUrl ReceiptHandle*
    DeleteMessageBatch QueueUrl Entries*:to_delete -> Successful Failed
    DeleteQueue QueueUrl
    GetQueueAttributes QueueUrl AttributeNames:list -> Attributes
    GetQueueUrl QueueName QueueOwnerAWSAccountId -> QueueUrl
    ListDeadLetterSourceQueues QueueUrl NextToken MaxResults:int -> queueUrls NextToken
    ListMessageMoveTasks SourceArn* MaxResults:int -> Results
    ListQueueTags QueueUrl -> Tags
    ListQueues QueueNamePrefix NextToken MaxResults:int -> QueueUrls NextToken
    PurgeQueue QueueUrl
    ReceiveMessage QueueUrl AttributeNames:list MessageSystemAttributeNames:list \
        MessageAttributeNames:list MaxNumberOfMessages:int VisibilityTimeout:int \
        WaitTimeSeconds:int ReceiveRequestAttemptId -> Messages
    RemovePermission QueueUrl Label*
    SendMessage QueueUrl {_SENT} -> MessageId MD5OfMessageBody MD5OfMessageAttributes \
        MD5OfMessageSystemAttributes SequenceNumber
    SendMessageBatch QueueUrl Entries*:to_send -> Successful Failed
    SetQueueAttributes QueueUrl Attributes*:map
    StartMessageMoveTask SourceArn* DestinationArn MaxNumberOfMessagesPerSecond:int -> TaskHandle
    TagQueue QueueUrl Tags*:map
    UntagQueue QueueUrl TagKeys*:list
    """,
)

SQS_MODEL = Model(
    OPERATIONS,
    {
        "AWSAccountIds": QueryName("AWSAccountId"),
        "Actions": QueryName("ActionName"),
        "AttributeNames": QueryName("AttributeName"),
        "Attributes": QueryName("Attribute", "Name", "Value"),
        "BinaryListValues": QueryName("BinaryListValue"),
        "Entries": QueryName("{}RequestEntry"),
        "Failed": QueryName("BatchResultErrorEntry"),
        "MessageAttributeNames": QueryName("MessageAttributeName"),
        "MessageAttributes": QueryName("MessageAttribute", "Name", "Value"),
        "MessageSystemAttributeNames": QueryName("MessageSystemAttributeName"),
        "MessageSystemAttributes": QueryName("MessageSystemAttribute", "Name", "Value"),
        "Messages": QueryName("Message"),
        "QueueUrls": QueryName("QueueUrl"),
        "Results": QueryName("{}ResultEntry"),
        "StringListValues": QueryName("StringListValue"),
        "Successful": QueryName("{}ResultEntry"),
        "TagKeys": QueryName("TagKey"),
        "Tags": QueryName("Tag", "Key", "Value"),
        "queueUrls": QueryName("QueueUrl"),
        "tags": QueryName("Tag", "Key", "Value"),
    },
    frozenset({"CreateQueue", "ListQueues"}),
)


# ==== 8. The proxy: Exchange, AccessLog, Proxy ====

DEMO_CLIENTS: Clients = {
    "dummykey": (
        Client("demo", "dummykey", "dummysecret"),
        Client("demo", "dummykey", "dummysecret", "dummysession"),
    )
}


class Exchange(NamedTuple):
    """A call and its answer, as the log sees them."""

    started: float
    seconds: float
    peer: str
    access_key_id: str  # with "?" in front where its signature did not hold
    action: str
    status: int
    error: str  # the code, or "-"
    request_id: str


class Proxy:
    """Answers requests: who calls is verified, what is meant is found, and the reply made.

    `clients` are the keys that callers may sign with; without `verified` nobody needs one.
    """

    def __init__(
        self,
        clients: Clients,
        *,
        verified: bool = True,
        clock_skew: int = 900,
        regions: Sequence[str] = (),
        account_id: str = "000000000000",
        public_url: str = "",
        observe: Optional[Callable[[Exchange], None]] = None,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        sqs: Optional[Sqs] = None,
    ) -> None:
        self.clients = clients
        self._verified = verified
        self._clock_skew = clock_skew
        self._regions = regions
        self._account_id = account_id
        self._public_url = public_url.rstrip("/")
        self._observe = observe
        self._clock = clock
        self._new_id = new_id
        self._sqs = sqs or Sqs(clock)

    def handle(self, request: Request, refused: Optional[ServiceError] = None) -> Reply:
        """Answer one request.  Never raises: whatever goes wrong becomes a Reply.

        `refused` is what its framing was refused for, if it was.
        """
        started, request_id = self._clock(), self._new_id()
        wire = wire_protocol(request)
        call, error = None, "-"
        try:
            if refused:
                raise refused
            call = self._call(request, wire, started)
            output = self._sqs.answer(call)
            reply = wire.output(call, SQS_MODEL, output, request_id)
        except ServiceError as service_error:
            error = wire.fault(request, service_error).code
            reply = wire.error(request, service_error, request_id)
        except Exception:
            log.exception("request %s failed", request_id)
            error = "InternalFailure"
            reply = wire.error(request, ServiceError(error, "See the log."), request_id)
        if call:
            key, action = call.caller.access_key_id, call.action
        else:
            key, scope = claim(request)
            key, action = "?" + key if key else "-", f"{scope.service or '-'}:-"
        if self._observe:
            self._observe(
                Exchange(
                    started,
                    self._clock() - started,
                    request.peer,
                    key,
                    action,
                    reply.status,
                    error,
                    request_id,
                )
            )
        return reply

    def _call(self, request: Request, wire: WireProtocol, now: float) -> Call:
        service = wire.service(request)
        if self._verified:
            client, scope, body = verify(
                request,
                self.clients,
                now,
                service=service,
                regions=self._regions,
                clock_skew=self._clock_skew,
                must_be_signed=wire.must_be_signed,
            )
        else:
            key, scope = claim(request)
            region = scope.region or (self._regions or ("us-east-1",))[0]
            scope = CredentialScope("", region, service or scope.service or "sqs")
            client, body = Client("anonymous", key or "anonymous", ""), request.body.read()
        client = client._replace(account_id=client.account_id or self._account_id)
        name, encoded = wire.operation(request, body)
        if scope.service != "sqs":
            raise ServiceError(
                "AccessDenied",
                f"No route answers {scope.service}:{name[:80]}: of all services this proxy"
                " answers Amazon SQS.",
            )
        operation = OPERATIONS.get(name)
        if not operation:
            raise _invalid_action(name)
        given = wire.input(request, encoded, SQS_MODEL, operation)
        base_url = self._public_url or f"http://{request.header('host') or 'localhost'}"
        return Call(request, scope.service, name, given, scope.region, client, base_url)


class AccessLog:
    """Writes a line for each exchange, as text or as JSON."""

    def __init__(self, stream: Any, of_json: bool) -> None:
        self._stream = stream
        self._of_json = of_json

    def __call__(self, exchange: Exchange) -> None:
        """Write one line, in one write; control characters are escaped."""
        moment = datetime.datetime.fromtimestamp(exchange.started, datetime.timezone.utc)
        stamp = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        milliseconds = round(exchange.seconds * 1000, 2)
        fields = {
            "time": stamp,
            "client": exchange.peer,
            "key": exchange.access_key_id,
            "action": exchange.action,
            "status": exchange.status,
            "error": exchange.error,
            "ms": milliseconds,
            "request_id": exchange.request_id,
        }
        if self._of_json:
            line = json.dumps(fields)
        else:
            line = " ".join(str(value) for value in fields.values())
            line = line.encode("unicode_escape").decode("ascii")
        try:
            self._stream.write(line + "\n")
        except OSError:
            return  # whoever reads the log is gone, and the log is where it would be told


# ==== 9. The server: RequestHandler, Server ====


@lru_cache(maxsize=4)
def _http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


class RequestHandler(http.server.BaseHTTPRequestHandler):
    """Turns bytes into Requests and Replies into bytes; decides nothing about AWS."""

    server: Server
    disable_nagle_algorithm = True  # with it on, a keep-alive call waits 40 ms (cpython#108736)
    rbufsize = 65536  # a small call arrives in one recv

    def setup(self) -> None:
        """Take the server's timeout."""
        super().setup()
        self.connection.settimeout(self.server.timeout_seconds)

    def handle_one_request(self) -> None:
        """Answer one request; the connection goes on only if all of it was read."""
        self.close_connection = True
        try:
            raw = self._read_head()
            if raw:
                self._answer(raw)
        except OSError:  # silent for too long, or gone: nobody is left to be told
            self.close_connection = True

    def _answer(self, raw: bytes) -> None:
        refused: Optional[ServiceError] = None
        body: Union[LengthBody, ChunkedBody] = LengthBody(self.rfile, 0)
        try:
            head = parse_head(raw)
            body = self._body(head)
        except ServiceError as error:
            refused = error
            head = salvage_head(raw)
        method, target, version, headers = head
        peer = self.client_address[0]
        request = Request(method, target, headers, body, peer, self._abandoned)
        reply = self.server.proxy.handle(request, refused)
        unread = refused is not None or body.unread
        close = self.close_connection = unread or version == "1.0" or asks_to_close(request)
        data = encode_reply(reply, _http_date(int(time.time())), close, method == "HEAD")
        self.connection.sendall(data)
        if unread:
            self._linger()

    def _read_head(self) -> bytes:
        """Return a request head with its blank line, b"" at the end of the connection.

        An empty line before it is passed over (RFC 9112, 2.2).
        """
        buffered = self.rfile.peek()  # type: ignore[attr-defined]
        end = buffered.find(b"\r\n\r\n")
        if end > 0 and buffered[:1] != b"\r":
            return self.rfile.read(end + 4)
        line = self.rfile.readline(3) if buffered[:1] == b"\r" else b""
        lines = [line if line != b"\r\n" else b""]
        size = 0
        while size <= MAX_HEAD:
            line = self.rfile.readline(MAX_HEAD + 1 - size)
            lines.append(line)
            size += len(line)
            if line == b"\r\n" or not line.endswith(b"\r\n"):
                break
        return b"".join(lines)

    def _body(self, head: Head) -> Union[LengthBody, ChunkedBody]:
        limit = self.server.max_body
        length = body_framing(head, limit)
        begin = self._continue if expects_continue(head) else None
        if length is None:
            return ChunkedBody(self.rfile, limit, begin)
        return LengthBody(self.rfile, length, begin)

    def _continue(self) -> None:
        self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _abandoned(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _linger(self) -> None:
        """Drop what still arrives, for a moment: a reset would overtake the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(0.5)
        for _ in range(1024):
            if not self.connection.recv(65536):
                return


class Server(http.server.ThreadingHTTPServer):
    """Listens, and hands each connection to a RequestHandler in a thread of its own."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(
        self,
        address: Tuple[str, int],
        proxy: Proxy,
        *,
        max_body: int = 16777216,
        timeout: float = 60,
        every_half_second: Callable[[], None] = lambda: None,
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.proxy = proxy
        self.max_body = max_body
        self.timeout_seconds = timeout
        self._every_half_second = every_half_second
        super().__init__(address, RequestHandler)

    def server_bind(self) -> None:
        """Bind without asking a name server for our name."""
        socketserver.TCPServer.server_bind(self)

    def service_actions(self) -> None:
        """Called by serve_forever each half second."""
        self._every_half_second()


# ==== 10. Command line: read_clients, build_parser, main ====

_KEY_ID = re.compile("[A-Za-z0-9._-]{3,128}")
_ACCOUNT_ID = re.compile("[0-9]{12}")


def read_clients(path: str) -> Clients:
    """Return the clients of a file in the format of the AWS shared credentials file.

    Each section is a client: aws_access_key_id, aws_secret_access_key, and, if wanted,
    aws_session_token and aws_account_id.  One key may stand in several sections with
    different tokens.  Raises OSError, or ValueError that says what is wrong where.
    """
    parser = configparser.RawConfigParser(default_section="")
    try:
        with open(path, encoding="utf-8") as lines:
            parser.read_file(lines)
    except configparser.Error as error:
        raise ValueError(str(error).splitlines()[0]) from error
    clients: Dict[str, List[Client]] = {}
    for name in parser.sections():
        section = parser[name]
        key, secret = section.get("aws_access_key_id", ""), section.get("aws_secret_access_key")
        if not _KEY_ID.fullmatch(key) or not secret:
            raise ValueError(
                f"[{name}] needs aws_access_key_id (3 to 128 letters, digits, '.', '_', '-')"
                " and aws_secret_access_key"
            )
        account = section.get("aws_account_id", "")
        if account and not _ACCOUNT_ID.fullmatch(account):
            raise ValueError(f"[{name}] aws_account_id must be 12 digits")
        client = Client(name, key, secret, section.get("aws_session_token", ""), account)
        same_key = clients.setdefault(key, [])
        if any(other.session_token == client.session_token for other in same_key):
            raise ValueError(f"[{name}] repeats the key and token of another section")
        same_key.append(client)
    if not clients:
        raise ValueError("it has no section")
    return clients


class ClientsFile:
    """Keeps a proxy's clients as a file has them; a broken new version leaves the old ones."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp = self._stamp_now()
        self.clients = read_clients(path)

    def _stamp_now(self) -> Tuple[int, int]:
        try:
            status = os.stat(self.path)
        except OSError:  # gone; to read it will say so
            return 0, 0
        return status.st_mtime_ns, status.st_size

    def refresh(self, proxy: Proxy) -> None:
        """Read the file again if it has changed, and give the proxy what it says."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            proxy.clients = read_clients(self.path)
        except (OSError, ValueError) as error:
            log.error("%s not read again, its clients stay as they were: %s", self.path, error)
            return
        signing_key.cache_clear()
        log.warning("%s read again: %d keys", self.path, len(proxy.clients))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Says the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        shown = action.default not in (None, False, [], argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


class _Parser(argparse.ArgumentParser):
    """Reads `@FILE` as a shell would read its lines."""

    def convert_arg_line_to_args(self, arg_line: str) -> List[str]:
        """Split a line of a file of flags."""
        return shlex.split(arg_line, comments=True)


class _Version(argparse.Action):
    """Names the copy: people carry this file about."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        with open(__file__, "rb") as source:
            digest = hashlib.sha256(source.read()).hexdigest()
        print(f"awsproxy {__version__} (sha256 {digest[:12]})")
        parser.exit()


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], Any]:
    def number(text: str) -> float:  # argparse shows this name in its message
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return number


def _account_id(text: str) -> str:
    if not _ACCOUNT_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 12 digits")
    return text


def _public_url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is not http(s)://host[:port][/path]")
    return text.rstrip("/")


_EXAMPLES = """\
examples:
  python awsproxy.py --port 8081                       the demo client, dummykey
  python awsproxy.py --host 0.0.0.0 --clients clients  clients of your own
  python awsproxy.py @flags                            flags from a file
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="awsproxy",
        fromfile_prefix_chars="@",
        formatter_class=_Formatter,
        description="Verify the signature of each AWS call, and answer Amazon SQS from memory.",
        epilog=_EXAMPLES,
    )
    _add_listening(parser.add_argument_group("where to listen").add_argument)
    _add_callers(parser.add_argument_group("who may call").add_argument)
    add = parser.add_argument_group("Amazon SQS in memory").add_argument
    add("--account-id", metavar="ID", type=_account_id, default="000000000000",
        help="account that queues belong to")  # fmt: skip
    add("--cooldown", action="store_true",
        help="for 60 s refuse another PurgeQueue, or a deleted queue's name")  # fmt: skip
    add = parser.add_argument_group("what to print").add_argument
    add("--log-format", choices=("text", "json"), default="text", help="form of the log lines")
    add("--quiet", action="store_true", help="print no line for each call")
    add("--version", action=_Version, nargs=0, help="print version and sha256 of this file")
    return parser


def _add_listening(add: Callable[..., Any]) -> None:
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_number(int, 0, 65535), default=8081, metavar="PORT",
        help="port to listen on; 0 picks one")  # fmt: skip
    add("--public-url", type=_public_url, metavar="URL",
        help="what queue URLs begin with, if not http:// and the Host of the request")  # fmt: skip
    add("--max-body", type=_number(int, 1, 1 << 40), default=16777216, metavar="BYTES",
        help="longest request body taken")  # fmt: skip
    add("--timeout", type=_number(float, 0.1, 86400), default=60, metavar="SECONDS",
        help="how long a connection may stay silent")  # fmt: skip


def _add_callers(add: Callable[..., Any]) -> None:
    add("--clients", metavar="FILE",
        help="keys that callers sign with, a section each as in ~/.aws/credentials; read again"
        " when it changes (without: dummykey with secret dummysecret, on loopback)")  # fmt: skip
    add("--no-verify", action="store_true",
        help="take calls unsigned or wrongly signed; on loopback only")  # fmt: skip
    add("--clock-skew", type=_number(int, 0, 604800), default=900, metavar="SECONDS",
        help="how far a caller's clock may be off")  # fmt: skip
    add("--region", action="append", default=[], metavar="REGION",
        help="a region that calls may be signed for, repeatable; without, any")  # fmt: skip


def _fail(message: str) -> int:
    print(f"awsproxy: {message}", file=sys.stderr)
    return 2


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program with these arguments, the command line's if None; return its exit code."""
    options = build_parser().parse_args(argv)
    logging.basicConfig(format="awsproxy: %(message)s", level=logging.INFO)
    watched = None
    clients = DEMO_CLIENTS
    if options.clients:
        try:
            watched = ClientsFile(options.clients)
            clients = watched.clients
        except (OSError, ValueError) as error:
            return _fail(f"the clients file {options.clients} cannot be used: {error}")
    access_log = AccessLog(sys.stderr, options.log_format == "json")
    proxy = Proxy(
        clients,
        verified=not options.no_verify,
        clock_skew=options.clock_skew,
        regions=options.region,
        account_id=options.account_id,
        public_url=options.public_url or "",
        sqs=Sqs(cooldown=options.cooldown),
        observe=None if options.quiet else access_log,
    )
    refresh = functools.partial(watched.refresh, proxy) if watched else _nothing
    try:
        server = Server(
            (options.host, options.port),
            proxy,
            max_body=options.max_body,
            timeout=options.timeout,
            every_half_second=refresh,
        )
    except (OSError, UnicodeError) as error:
        return _fail(
            f"cannot listen on {options.host} port {options.port}: {error};"
            " choose others with --host and --port (0 picks a free one)"
        )
    with server:
        return _serve(server, options)


def _nothing() -> None:
    return None


def _serve(server: Server, options: argparse.Namespace) -> int:
    address, port = server.server_address[:2]
    if not ipaddress.ip_address(str(address).partition("%")[0]).is_loopback:
        if options.no_verify:
            return _fail("--no-verify is for a loopback --host alone, and this is not one")
        if not options.clients:
            return _fail("the demo client is for a loopback --host alone; name --clients FILE")
    if options.no_verify:
        log.warning("--no-verify: no signature is checked, whoever reaches this port may call")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"listening on http://{host}:{port}", file=sys.stderr, flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    # A module that imports awsproxy must get this one, not a second copy (cpython#103390).
    sys.modules.setdefault("awsproxy", sys.modules[__name__])
    sys.exit(main())
