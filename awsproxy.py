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
import configparser
import datetime
import email.utils
import functools
import hashlib
import heapq
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
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
    Dict,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Protocol,
    Sequence,
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
            raise ServiceError(
                "MalformedQueryString", "The query string contains a '%' that begins no escape."
            )
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
    "InvalidMessageContents": _modelled(400, "InvalidMessageContents"),
    "OverLimit": _modelled(403, "OverLimit"),
    "QueueDoesNotExist": _modelled(400, "QueueDoesNotExist", _SQS + "NonExistentQueue"),
    "QueueNameExists": _modelled(400, "QueueNameExists", "QueueAlreadyExists"),
    "ReceiptHandleIsInvalid": _modelled(404, "ReceiptHandleIsInvalid"),
    "UnsupportedOperation": _modelled(400, "UnsupportedOperation", _SQS + "UnsupportedOperation"),
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
    RequestHeaderFieldsTooLarge for more than MAX_HEADERS lines (RFC 9112, 2 to 5; 3.2.2's
    absolute-form is refused, as AWS does).
    """
    request_line, *lines = raw.decode("latin-1")[:-4].split(CRLF)
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
        if len(codings) > 1 or codings[0].lower() != "chunked":
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

# Why a request can be refused: its code, its code from Amazon S3's family, its message.  The
# messages are AWS's own where they are known, since people search for them.
_NOT_SIGNED = "There were headers present in the request which were not signed: {}"
_HASH_MISMATCH = "The provided 'x-amz-content-sha256' header does not match what was computed."
REFUSALS: Mapping[str, Tuple[str, str, str]] = {
    "unsigned": (
        "MissingAuthenticationToken", "AccessDenied",
        "Request is missing Authentication Token",
    ),
    "several": (
        "SignatureDoesNotMatch", "InvalidArgument",
        "Only one auth mechanism allowed: one Authorization header, or X-Amz-* query parameters.",
    ),
    "version 2": (
        "IncompleteSignature", "InvalidRequest",
        "The authorization mechanism you have provided is not supported: it is Signature Version"
        " 2. Please use AWS4-HMAC-SHA256 (boto3: Config(signature_version=\"s3v4\")).",
    ),
    "scheme": (
        "MissingAuthenticationToken", "InvalidArgument",
        "Request is missing Authentication Token: the Authorization header is of type '{}'."
        " Please use AWS4-HMAC-SHA256.",
    ),
    "algorithm": (
        "IncompleteSignature", "InvalidArgument",
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
    "date": (
        "IncompleteSignature", "AccessDenied",
        "Date must be in ISO-8601 'basic format'. Got '{}'."
        " See http://en.wikipedia.org/wiki/ISO_8601",
    ),
    "past": (
        "SignatureDoesNotMatch", "RequestTimeTooSkewed",
        "Signature expired: {} is now earlier than {} ({} - {}.)",
    ),
    "future": (
        "SignatureDoesNotMatch", "RequestTimeTooSkewed",
        "Signature not yet current: {} is still later than {} ({} + {}.)",
    ),
    "expired": (
        "SignatureDoesNotMatch", "AccessDenied",
        "Request has expired: it was good until {}, and it is now {}.",
    ),
    "scope": ("SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "{}"),
    "key": (
        "InvalidClientTokenId", "InvalidAccessKeyId",
        "The security token included in the request is invalid.",
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
        " Consult the service documentation for details.\n\n"
        "The Canonical String for this request should have been\n'{}'\n\n"
        "The String-to-Sign should have been\n'{}'\n",
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
    """What the caller claims, read from the header or from a presigned query alike."""

    access_key_id: str
    scope: CredentialScope
    signed_headers: Tuple[str, ...]
    signature: str
    amz_date: str  # ISO 8601 basic
    expires: Optional[int] = None  # seconds after amz_date; None where none is given
    presigned: bool = False
    session_token: Optional[str] = None
    dated_by: str = "x-amz-date"  # the header or query parameter that gave amz_date


class Verified(NamedTuple):
    """Who has signed a request, for what, and the body that was signed."""

    client: Client
    scope: CredentialScope
    body: bytes


_CLAIM = re.compile(r"Credential=([^/,\s]+)/([^/,\s]*)/([^/,\s]*)/([^/,\s]*)/")


def claim(request: Request) -> Tuple[str, CredentialScope]:
    """Return the access key id and scope that the request names, unverified; "" where none.

    Good for choosing how an answer looks and for the log, never for a decision.
    """
    text = request.header("authorization") or ""
    match = _CLAIM.search(text)
    if not match and "credential=" in request.target.lower():
        match = _CLAIM.search(urllib.parse.unquote(request.target, "latin-1"))
    if not match:
        return "", CredentialScope("", "", "")
    access_key_id, date, region, service = match.groups()
    return access_key_id, CredentialScope(date, region, service)


def refusal(reason: str, request: Request, *values: object, **detail: str) -> ServiceError:
    """Return the error for a row of REFUSALS, with the code that its service would use."""
    code, s3_code, message = REFUSALS[reason]
    of_s3 = claim(request)[1].service in S3_FAMILY
    return ServiceError(s3_code if of_s3 else code, message.format(*values), **detail)


# ---- Parsing ----

_AMZ_DATE = re.compile("[0-9]{8}T[0-9]{6}Z")
_SHA256_HEX = re.compile("[0-9a-f]{64}")
_SIGNED_HEADERS = re.compile("[!#$%&'*+.^_`|~0-9a-z-]+(;[!#$%&'*+.^_`|~0-9a-z-]+)*")
_SCOPE_NAME = re.compile("[A-Za-z0-9_-]{1,64}")
_PARAMETERS = ("Credential", "SignedHeaders", "Signature")
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
    names = {name.lower() for name, _ in request.query}
    presigned = not names.isdisjoint(_PRESIGNED_MARKS)
    if len(headers) + presigned > 1:
        raise refusal("several", request)
    if presigned:
        return _parse_query(request)
    if headers:
        return _parse_header(request, headers[0])
    if b"signature" in names and names & {b"awsaccesskeyid", b"signatureversion"}:
        raise refusal("version 2", request)
    raise refusal("unsigned", request)


def _parse_header(request: Request, header: str) -> Authorization:
    reason = "header parameter"
    scheme, _, rest = header.partition(" ")
    if scheme != ALGORITHM:
        if scheme == "AWS":
            raise refusal("version 2", request)
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
        raise refusal(reason, request, " ".join(faults))
    access_key_id, scope = _parse_credential(request, given["Credential"])
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
    access_key_id, scope = _parse_credential(request, given.get("X-Amz-Credential", ""))
    optional = {"X-Amz-Security-Token"}
    if scope.service not in S3_FAMILY:
        optional.add("X-Amz-Expires")
    for name in _QUERY_PARAMETERS.values():
        if name not in optional and not given.get(name):
            fault = f"AWS query-string parameters must include '{name}'."
            raise refusal(reason, request, fault)
    if given["X-Amz-Algorithm"] != ALGORITHM:
        raise refusal("algorithm", request, given["X-Amz-Algorithm"][:40])
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


def _parse_credential(request: Request, credential: str) -> Tuple[str, CredentialScope]:
    parts = credential.split("/")
    if len(parts) != 5:
        raise refusal("credential", request, credential[:200])
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
    if not re.fullmatch("[0-9]{1,18}", text):
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
    except (TypeError, ValueError, IndexError) as error:
        raise refusal("date", request, value[:80]) from error
    return iso_basic(calendar.timegm(moment.utctimetuple()))


# ---- Canonical form ----


def canonical_path(path: str, normalize: bool) -> str:
    """Return the canonical URI of a raw path.

    With `normalize` (every service but S3's family): empty and dot segments resolved on the
    encoded text, then each byte percent-encoded, `%` too.  Without: each segment decoded and
    encoded once, so that `//`, `..` and `%2F` stay what they are, parts of an object key.
    Raises ServiceError InvalidURI for a broken escape or a `..` above the root.
    """
    if path == "/":
        return path
    if BROKEN_ESCAPE.search(path):
        raise ServiceError("InvalidURI", "Couldn't parse the specified URI.")
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


def canonical_request(
    request: Request, authorization: Authorization, payload_hash: str, profile: Profile
) -> bytes:
    """Return the text that both sides hash: method, path, query, headers, payload hash."""
    without = [b"X-Amz-Signature"] if authorization.presigned else []
    if authorization.presigned and profile.unsigned_token:
        without.append(b"X-Amz-Security-Token")
    return "\n".join(
        (
            request.method,
            canonical_path(request.path, profile.normalize_path),
            canonical_query(request.query, without),
            canonical_headers(request.fields, authorization.signed_headers),
            ";".join(authorization.signed_headers),
            payload_hash,
        )
    ).encode("latin-1")


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
        raise refusal("expired", request, end, server, Expires=end, ServerTime=server)
    if claimed.expires is None and now > signed_at + skew:
        reason, limit = "past", now - skew
    elif now < signed_at - skew:
        reason, limit = "future", now + skew
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
    faults = []
    if scope.terminator != "aws4_request":
        faults.append(
            "Credential should be scoped with a valid terminator: 'aws4_request',"
            f" not '{scope.terminator[:40]}'."
        )
    if scope.date != day:
        faults.append(
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date"
            f" from HTTP: '{scope.date[:40]}' != '{day}', from '{claimed.amz_date}'."
        )
    if not _SCOPE_NAME.fullmatch(scope.region) or (regions and scope.region not in regions):
        faults.append(f"Credential should be scoped to a valid region, not '{scope.region[:40]}'.")
    if not _SCOPE_NAME.fullmatch(scope.service) or service not in (None, scope.service):
        faults.append(f"Credential should be scoped to correct service: '{service or ''}'.")
    if faults:
        raise refusal("scope", request, " ".join(faults), **dict(zip(("Region",), regions)))


def _find_client(request: Request, claimed: Authorization, clients: Clients) -> Client:
    candidates = clients.get(claimed.access_key_id)
    if not candidates:
        raise refusal("key", request)
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


_TOKEN_SHOWN = re.compile("(x-amz-security-token:|X-Amz-Security-Token=)[^\n&]*")


def _check_signature(
    request: Request, claimed: Authorization, profile: Profile, client: Client, payload_hash: str
) -> None:
    """Compare in constant time; the refusal shows what we computed, less the session token."""
    canonical = canonical_request(request, claimed, payload_hash, profile)
    text = string_to_sign(claimed.amz_date, claimed.scope, canonical)
    computed = signature(client.secret_access_key, claimed.scope, text)
    if hmac.compare_digest(computed, claimed.signature):  # both ASCII
        return
    shown = _TOKEN_SHOWN.sub(r"\1<redacted>", canonical.decode("latin-1"))[:16384]
    signed = text.decode("latin-1")
    raise refusal(
        "signature",
        request,
        shown,
        signed,
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
    required: frozenset[str] = frozenset()


Shape = Union[str, ListOf, MapOf, Structure]


def structure(*required: str, **members: Shape) -> Structure:
    """Return a structure of the members given, those named in `required` being so."""
    return Structure(members, frozenset(required))


class Operation(NamedTuple):
    """An operation of a service: its input, and what answers it.

    `method` takes the service object and a Call and returns the output; None for an
    operation that has none.
    """

    name: str
    input: Structure
    method: Callable[[Any, Call], Optional[Mapping[str, Any]]]


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

TARGET_SERVICES = {"AmazonSQS": "sqs"}  # prefix of X-Amz-Target -> name in the credential scope
QUERY_NAMESPACES = {"sqs": "http://queue.amazonaws.com/doc/2012-11-05/"}
QUERY_SERVICES = frozenset(
    "autoscaling cloudformation cloudsearch ec2 elasticache elasticbeanstalk elasticloadbalancing"
    " iam monitoring rds redshift sdb sns sqs sts".split()
)
_FORM = "application/x-www-form-urlencoded"
_QUEUE_PATH = re.compile("(?:/[^/]+)*?/([0-9]{12})/([A-Za-z0-9_.-]{1,80})/?")


def _media_type(request: Request) -> str:
    return (request.header("content-type") or "").partition(";")[0].strip(" \t").lower()


def _query_action(request: Request) -> Optional[str]:
    try:
        values = [value for name, value in request.query if name == b"Action"]
    except ServiceError:  # a broken query string; verify refuses it
        return None
    return values[0].decode("utf-8", "replace") if values else None


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
    if service not in S3_FAMILY and _query_action(request) is not None:
        return AwsJson(version, ("content-type",)) if "json" in media_type else AWS_QUERY
    if media_type.startswith("application/x-amz-json-"):
        return AWS_JSON[version]
    if service in QUERY_SERVICES:
        return AWS_QUERY
    if not service and request.method == "POST" and media_type in ("", _FORM):
        return AWS_QUERY
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

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """Return the answer that refuses."""
        raise NotImplementedError


def _invalid_action(operation: str) -> ServiceError:
    return ServiceError(
        "InvalidAction", f"The action {operation[:80]} is not valid for this endpoint."
    )


def _fault(error: ServiceError, service: str) -> Fault:
    """Amazon SQS, which anybody may be allowed to call, denies access to the unsigned."""
    if error.code == "MissingAuthenticationToken" and service in ("sqs", ""):
        return ERRORS["AccessDenied"]
    return error.fault


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
        target = request.header("x-amz-target")
        return (target.rpartition(".")[2] if target else _query_action(request) or ""), body

    def input(self, request: Request, encoded: Any, model: Model, operation: Operation) -> Any:
        """No body at all is an empty object."""
        try:
            document = json.loads(encoded.decode("utf-8") or "{}", parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ServiceError("SerializationException", "The body is not JSON.") from error
        return _from_json(operation.input, document)

    def output(
        self, call: Call, model: Model, output: Optional[Mapping[str, Any]], request_id: str
    ) -> Reply:
        """A void operation is answered by no body at all."""
        body = b"" if output is None else _to_json(output)
        return Reply(200, self._headers(request_id), body)

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """Amazon SQS tells 403 from 400 in JSON too; the other services do not."""
        service = self.service(request) or claim(request)[1].service
        status, code, shape = _fault(error, service)
        if status == 403 and service not in ("sqs", ""):
            status = 400
        headers = (*self._headers(request_id), ("x-amzn-query-error", f"{code};{_side(status)}"))
        return Reply(status, headers, _to_json({"__type": shape, "message": error.message}))

    def _headers(self, request_id: str) -> Headers:
        return (("x-amzn-RequestId", request_id), ("Content-Type", self.content_type))


AWS_JSON = {version: AwsJson(version) for version in ("1.0", "1.1")}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # RFC 8259, 6


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
            if body and _media_type(request) in ("", _FORM):
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
        service = claim(request)[1].service
        status, code, _ = _fault(error, service)
        parts = [
            f"<Error><Type>{_side(status)}</Type>",
            f"<Code>{code}</Code>",
            f"<Message>{xml_text(_QUERY_MESSAGES.get(error.code, error.message))}</Message>",
            f"<Detail/></Error><RequestId>{request_id}</RequestId>",
        ]
        return self._reply(status, "ErrorResponse", service or "sqs", parts, request_id)

    def _reply(
        self, status: int, root: str, service: str, parts: Sequence[str], request_id: str
    ) -> Reply:
        namespace = QUERY_NAMESPACES.get(service)
        xmlns = f' xmlns="{namespace}"' if namespace else ""
        text = f'<?xml version="1.0"?><{root}{xmlns}>{"".join(parts)}</{root}>'
        return Reply(status, self._headers(request_id), text.encode("utf-8", "replace"))

    def _headers(self, request_id: str) -> Headers:
        return (("x-amzn-RequestId", request_id), ("Content-Type", "text/xml"))


AWS_QUERY = AwsQuery()
MAX_FORM_FIELDS = 10000  # a full SendMessageBatch has some 400
MAX_FORM_DEPTH = 12
_NUMBER = re.compile("-?[0-9]{1,18}")
_INDEX = re.compile("[0-9]{1,9}")

# Where XML says something else than JSON.
_QUERY_MESSAGES = {
    "QueueDoesNotExist": "The specified queue does not exist for this wsdl version."
}


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


# ==== 5. SQS in memory: Message, Queue, Sqs, OPERATIONS ====
#
# The measure is Amazon SQS as recorded, not its emulators.  All state is here, under one lock;
# a call that waits does so on its queue's condition, which shares that lock, so that a send
# wakes the waiters of its own queue alone.  Clock, randomness and waiting are passed in.

SECONDS_HELD = 43200  # longest visibility timeout, counted from the receive
MAX_IN_FLIGHT = 120000
MAX_ATTRIBUTES = 10

_QUEUE_NAME = re.compile("[A-Za-z0-9_-]{1,80}")
_ATTRIBUTE_NAME = re.compile(r"(?!(?i:aws\.|amazon\.))(?!\.)[\w.-]{1,256}(?<!\.)")
_DATA_TYPE = re.compile(r"(String|Number|Binary)(\.[^\0]{1,248})?")
_READ_ONLY = frozenset(
    "QueueArn CreatedTimestamp LastModifiedTimestamp ApproximateNumberOfMessages"
    " ApproximateNumberOfMessagesNotVisible ApproximateNumberOfMessagesDelayed".split()
)


class Limit(NamedTuple):
    """The default and the range of a queue attribute that is a number."""

    default: int
    low: int
    high: int


LIMITS = {
    "DelaySeconds": Limit(0, 0, 900),
    "MaximumMessageSize": Limit(1048576, 1024, 1048576),
    "MessageRetentionPeriod": Limit(345600, 60, 1209600),
    "ReceiveMessageWaitTimeSeconds": Limit(0, 0, 20),
    "VisibilityTimeout": Limit(30, 0, SECONDS_HELD),
}


class Message:
    """A message and where it stands."""

    __slots__ = (
        "attributes",
        "body",
        "first_received",
        "hidden_until",
        "message_id",
        "received",
        "sent",
        "serial",
        "system",
    )

    def __init__(
        self, message_id: str, serial: int, body: str, attributes: Any, system: Any, sent: float
    ) -> None:
        self.message_id = message_id
        self.serial = serial
        self.body = body
        self.attributes: Mapping[str, Mapping[str, Any]] = attributes
        self.system: Dict[str, str] = system
        self.sent = sent
        self.received = 0
        self.first_received = 0.0
        self.hidden_until = 0.0  # 0 while it is visible


class Queue:
    """A queue: its settings, and its messages, visible or hidden until some time.

    Every operation is O(log n) or better in the number of messages.
    """

    def __init__(self, url_path: str, serial: int, numbers: Dict[str, int], lock: Any) -> None:
        self.url_path = url_path  # "/{account}/{name}"
        self.serial = serial  # tells queues apart that had the same name one after another
        self.numbers = numbers  # by the names of LIMITS
        self.tags: Dict[str, str] = {}
        self.changed = threading.Condition(lock)
        self.deleted = False
        self.messages: OrderedDict[str, Message] = OrderedDict()  # in the order of arrival
        self.visible: OrderedDict[str, Message] = OrderedDict()
        self._hidden: List[Tuple[float, int, Message]] = []  # a heap; stale entries are skipped
        self._order = itertools.count()

    def add(self, message: Message, delay: int) -> None:
        """Take in a message, hidden for its delay."""
        self.messages[message.message_id] = message
        if delay:
            self.hide(message, message.sent + delay)
        else:
            self.visible[message.message_id] = message
            self.changed.notify()

    def hide(self, message: Message, until: float) -> None:
        """Make a message invisible until then."""
        self.visible.pop(message.message_id, None)
        message.hidden_until = until
        heapq.heappush(self._hidden, (until, next(self._order), message))
        if len(self._hidden) > 2 * len(self.messages) + 64:
            self._hidden = [entry for entry in self._hidden if self._is_due(entry)]
            heapq.heapify(self._hidden)

    def _is_due(self, entry: Tuple[float, int, Message]) -> bool:
        until, _, message = entry
        present = self.messages.get(message.message_id) is message
        return present and message.hidden_until == until

    def remove(self, message: Message) -> None:
        """Drop a message, wherever it stands."""
        self.messages.pop(message.message_id, None)
        self.visible.pop(message.message_id, None)

    def clear(self) -> None:
        """Drop all messages."""
        self.messages.clear()
        self.visible.clear()
        self._hidden.clear()

    def advance(self, now: float) -> None:
        """Let happen what was due by now: messages come back, or are too old."""
        hidden = self._hidden
        while hidden and hidden[0][0] <= now:
            entry = heapq.heappop(hidden)
            if self._is_due(entry):
                message = entry[2]
                message.hidden_until = 0.0
                self.visible[message.message_id] = message
                self.changed.notify()
        oldest = now - self.numbers["MessageRetentionPeriod"]
        while self.messages:
            message = next(iter(self.messages.values()))
            if message.sent > oldest:
                break
            self.remove(message)

    def next_change(self, deadline: float) -> float:
        """Return when a hidden message may come back, `deadline` if that is earlier."""
        return min(deadline, self._hidden[0][0]) if self._hidden else deadline

    def receive(self, limit: int, timeout: int, now: float) -> List[Message]:
        """Return up to `limit` visible messages, now hidden for the timeout."""
        taken = list(itertools.islice(self.visible.values(), limit))
        for message in taken:
            message.received += 1
            message.first_received = message.first_received or now
            self.visible.pop(message.message_id)
            if timeout:
                self.hide(message, now + timeout)
            else:
                self.visible[message.message_id] = message
        return taken


def _invalid(message: str) -> ServiceError:
    return ServiceError("InvalidParameterValue", message)


def _in_range(value: int, low: int, high: int, name: str, reason: str) -> int:
    if not low <= value <= high:
        raise _invalid(f"Value {value} for parameter {name} is invalid. Reason: {reason}")
    return value


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


class Sqs:
    """The queues of all accounts and regions, and the operations on them."""

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        secret: Optional[bytes] = None,
        wait: Callable[[threading.Condition, float], Any] = threading.Condition.wait,
    ) -> None:
        self._clock = clock
        self._new_id = new_id
        self._secret = secret or os.urandom(32)  # receipt handles of others are not ours
        self._wait = wait
        self._lock = threading.RLock()
        self._queues: Dict[Tuple[str, str, str], Queue] = {}  # by region, account, name
        self._serials = itertools.count(1)

    def answer(self, call: Call) -> Optional[Mapping[str, Any]]:
        """Return the output of a call; the queues are untouched where it raises ServiceError."""
        with self._lock:
            return OPERATIONS[call.operation].method(self, call)

    # ---- Queues ----

    def _queue(self, call: Call) -> Queue:
        path = urllib.parse.urlsplit(call.input.get("QueueUrl", "")).path.rstrip("/")
        account, _, name = path.rpartition("/")
        account = account.rpartition("/")[2] or call.caller.account_id
        queue = self._queues.get((call.region, account, name))
        if queue is None or account != call.caller.account_id:
            raise ServiceError("QueueDoesNotExist", "The specified queue does not exist.")
        queue.advance(self._clock())
        return queue

    def create_queue(self, call: Call) -> Mapping[str, Any]:
        """Make a queue, or find one of that name whose attributes do not differ."""
        name, given = call.input.get("QueueName", ""), call.input.get("Attributes", {})
        if not _QUEUE_NAME.fullmatch(name):
            raise _invalid(
                "Can only include alphanumeric characters, hyphens, or underscores."
                " 1 to 80 in length"
            )
        numbers = {}
        for attribute, text in given.items():
            if attribute not in LIMITS:
                raise ServiceError("InvalidAttributeName", f"Unknown Attribute {attribute}.")
            limit = LIMITS[attribute]
            if not _NUMBER.fullmatch(text) or not limit.low <= int(text) <= limit.high:
                raise ServiceError(
                    "InvalidAttributeValue", f"Invalid value for the parameter {attribute}."
                )
            numbers[attribute] = int(text)
        account = call.caller.account_id
        key = (call.region, account, name)
        queue = self._queues.get(key)
        if queue is None:
            defaults = {attribute: limit.default for attribute, limit in LIMITS.items()}
            serial = next(self._serials)
            queue = Queue(f"/{account}/{name}", serial, {**defaults, **numbers}, self._lock)
            queue.tags = dict(call.input.get("tags", {}))
            self._queues[key] = queue
        for attribute, number in numbers.items():
            if queue.numbers[attribute] != number:
                raise ServiceError(
                    "QueueNameExists",
                    "A queue already exists with the same name and a different value for"
                    f" attribute {attribute}",
                )
        return {"QueueUrl": call.base_url + queue.url_path}

    def get_queue_url(self, call: Call) -> Mapping[str, Any]:
        """Return the URL of a queue, given its name."""
        name = call.input.get("QueueName", "")
        if not name:
            raise _invalid("Value for parameter QueueName is invalid. Reason: Must be specified.")
        owner = call.input.get("QueueOwnerAWSAccountId") or call.caller.account_id
        queue = self._queues.get((call.region, owner, name))
        if queue is None or owner != call.caller.account_id:
            raise ServiceError("QueueDoesNotExist", "The specified queue does not exist.")
        return {"QueueUrl": call.base_url + queue.url_path}

    def list_queues(self, call: Call) -> Mapping[str, Any]:
        """Return the URLs of the caller's queues in the region, by name, a page at a time."""
        prefix = call.input.get("QueueNamePrefix", "")
        most = _in_range(
            call.input.get("MaxResults", 1000), 1, 1000, "MaxResults", "Must be between 1 and 1000"
        )
        after = _from_base64(call.input.get("NextToken", "")).decode("utf-8", "replace")
        mine = (call.region, call.caller.account_id)
        names = sorted(
            key[2]
            for key in self._queues
            if key[:2] == mine and key[2].startswith(prefix) and key[2] > after
        )
        page = names[:most]
        output: Dict[str, Any] = {}
        if page:
            base = f"{call.base_url}/{call.caller.account_id}/"
            output["QueueUrls"] = [base + name for name in page]
        if len(names) > most and "MaxResults" in call.input:
            output["NextToken"] = _base64_text(page[-1].encode())
        return output

    def purge_queue(self, call: Call) -> None:
        """Drop all messages of a queue: visible, hidden and delayed."""
        self._queue(call).clear()

    def delete_queue(self, call: Call) -> None:
        """Drop a queue; calls that wait on it learn that it is gone."""
        queue = self._queue(call)
        _, account, name = queue.url_path.split("/")
        del self._queues[call.region, account, name]
        queue.deleted = True
        queue.changed.notify_all()

    # ---- Messages ----

    def send_message(self, call: Call) -> Mapping[str, Any]:
        """Take in a message; it is visible after its delay."""
        queue = self._queue(call)
        body, attributes = call.input["MessageBody"], call.input.get("MessageAttributes", {})
        system = call.input.get("MessageSystemAttributes", {})
        if not body:
            raise ServiceError(
                "MissingParameter", "The request must contain the parameter MessageBody."
            )
        if _NOT_XML.search(body):
            raise ServiceError(
                "InvalidMessageContents",
                "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD |"
                " #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF",
            )
        size = len(body.encode()) + self._check_attributes(attributes)
        if size > queue.numbers["MaximumMessageSize"]:
            raise _invalid(
                "One or more parameters are invalid. Reason: Message must be shorter than"
                f" {queue.numbers['MaximumMessageSize']} bytes."
            )
        self._check_attributes(system)
        if set(system) - {"AWSTraceHeader"}:
            raise _invalid("The only message system attribute that can be sent is AWSTraceHeader.")
        delay = _in_range(
            call.input.get("DelaySeconds", queue.numbers["DelaySeconds"]),
            *LIMITS["DelaySeconds"][1:],
            "DelaySeconds",
            "DelaySeconds must be >= 0 and <= 900.",
        )
        kept = {name: value["StringValue"] for name, value in system.items()}
        kept["SenderId"] = call.caller.access_key_id
        now = self._clock()
        message = Message(self._new_id(), next(self._serials), body, attributes, kept, now)
        queue.add(message, delay)
        output = {"MessageId": message.message_id, "MD5OfMessageBody": _md5(body)}
        if attributes:
            output["MD5OfMessageAttributes"] = attributes_md5(attributes)
        if system:
            output["MD5OfMessageSystemAttributes"] = attributes_md5(system)
        return output

    def _check_attributes(self, attributes: Mapping[str, Mapping[str, Any]]) -> int:
        """Return the size of message attributes in bytes, or refuse them."""
        if len(attributes) > MAX_ATTRIBUTES:
            raise _invalid(
                f"Number of message attributes [{len(attributes)}] exceeds the allowed maximum"
                f" [{MAX_ATTRIBUTES}]."
            )
        size = 0
        for name, attribute in attributes.items():
            kind = _DATA_TYPE.fullmatch(attribute.get("DataType", ""))
            if not _ATTRIBUTE_NAME.fullmatch(name) or not kind:
                raise _invalid(f"Message (user) attribute '{name[:80]}' has a bad name or type.")
            value = attribute.get("BinaryValue" if kind[1] == "Binary" else "StringValue")
            if not value or (isinstance(value, str) and _NOT_XML.search(value)):
                raise _invalid(
                    f"Message (user) attribute '{name}' must contain a non-empty value of type"
                    f" '{kind[1]}'."
                )
            encoded = value if isinstance(value, bytes) else value.encode()
            size += len(name.encode()) + len(kind[0].encode()) + len(encoded)
        return size

    def receive_message(self, call: Call) -> Mapping[str, Any]:
        """Return messages, hidden from others from now on; wait for the first if asked to."""
        queue = self._queue(call)
        given = call.input
        limit = _in_range(
            given.get("MaxNumberOfMessages", 1), 1, 10, "MaxNumberOfMessages",
            "Must be between 1 and 10, if provided.",
        )  # fmt: skip
        patience = _in_range(
            given.get("WaitTimeSeconds", queue.numbers["ReceiveMessageWaitTimeSeconds"]), 0, 20,
            "WaitTimeSeconds", "Must be >= 0 and <= 20, if provided.",
        )  # fmt: skip
        timeout = _in_range(
            given.get("VisibilityTimeout", queue.numbers["VisibilityTimeout"]), 0, SECONDS_HELD,
            "VisibilityTimeout", "Must be >= 0 and <= 43200, if provided.",
        )  # fmt: skip
        now = self._clock()
        deadline = now + patience
        while not queue.visible and now < deadline:
            self._wait(queue.changed, queue.next_change(deadline) - now)
            if queue.deleted:
                raise ServiceError("QueueDoesNotExist", "The specified queue does not exist.")
            now = self._clock()
            queue.advance(now)
            if call.request.abandoned():
                if queue.visible:
                    queue.changed.notify()  # the wake-up was for a message; pass it on
                return {}
        if len(queue.messages) - len(queue.visible) >= MAX_IN_FLIGHT:
            raise ServiceError("OverLimit", "Too many messages are in flight.")
        received = queue.receive(limit, timeout, now)
        if not received:
            return {}
        return {"Messages": [self._received(queue, message, given) for message in received]}

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

    def delete_message(self, call: Call) -> None:
        """Drop a received message; nothing happens if it is gone already."""
        queue = self._queue(call)
        message = self._of_handle(queue, call.input["ReceiptHandle"])
        if message:
            queue.remove(message)

    def _receipt_handle(self, queue: Queue, message: Message) -> str:
        text = f"{queue.serial}:{message.message_id}:{message.received}".encode()
        return "AQEB" + _base64_text(hmac.digest(self._secret, text, "sha256")[:12] + text)

    def _of_handle(self, queue: Queue, handle: str) -> Optional[Message]:
        """Return the message of a handle, None if gone; ReceiptHandleIsInvalid if not ours."""
        try:
            raw = base64.b64decode(handle[4:].encode("ascii"), validate=True)
        except ValueError:
            raw = b""
        text = raw[12:]
        genuine = hmac.compare_digest(hmac.digest(self._secret, text, "sha256")[:12], raw[:12])
        serial, _, rest = text.decode("latin-1").partition(":")
        if not genuine or not handle.startswith("AQEB") or serial != str(queue.serial):
            raise ServiceError(
                "ReceiptHandleIsInvalid",
                f'The input receipt handle "{handle}" is not a valid receipt handle.',
            )
        return queue.messages.get(rest.partition(":")[0])


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _asks_for(pattern: str, name: str) -> bool:
    if pattern in ("All", ".*", "*"):
        return True
    return name.startswith(pattern[:-2]) if pattern.endswith(".*") else name == pattern


_VALUES = MapOf(structure(DataType=STRING, StringValue=STRING, BinaryValue=BLOB))
_NAMES = ListOf(STRING)

OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "CreateQueue",
            structure(QueueName=STRING, Attributes=MapOf(STRING), tags=MapOf(STRING)),
            Sqs.create_queue,
        ),
        Operation(
            "DeleteMessage",
            structure("ReceiptHandle", QueueUrl=STRING, ReceiptHandle=STRING),
            Sqs.delete_message,
        ),
        Operation("DeleteQueue", structure(QueueUrl=STRING), Sqs.delete_queue),
        Operation(
            "GetQueueUrl",
            structure(QueueName=STRING, QueueOwnerAWSAccountId=STRING),
            Sqs.get_queue_url,
        ),
        Operation(
            "ListQueues",
            structure(QueueNamePrefix=STRING, NextToken=STRING, MaxResults=INTEGER),
            Sqs.list_queues,
        ),
        Operation("PurgeQueue", structure(QueueUrl=STRING), Sqs.purge_queue),
        Operation(
            "ReceiveMessage",
            structure(
                QueueUrl=STRING,
                AttributeNames=_NAMES,
                MessageSystemAttributeNames=_NAMES,
                MessageAttributeNames=_NAMES,
                MaxNumberOfMessages=INTEGER,
                VisibilityTimeout=INTEGER,
                WaitTimeSeconds=INTEGER,
                ReceiveRequestAttemptId=STRING,
            ),
            Sqs.receive_message,
        ),
        Operation(
            "SendMessage",
            structure(
                "MessageBody",
                QueueUrl=STRING,
                MessageBody=STRING,
                DelaySeconds=INTEGER,
                MessageAttributes=_VALUES,
                MessageSystemAttributes=_VALUES,
            ),
            Sqs.send_message,
        ),
    )
}

SQS_MODEL = Model(
    OPERATIONS,
    {
        "Attributes": QueryName("Attribute", "Name", "Value"),
        "AttributeNames": QueryName("AttributeName"),
        "MessageAttributeNames": QueryName("MessageAttributeName"),
        "MessageAttributes": QueryName("MessageAttribute", "Name", "Value"),
        "MessageSystemAttributeNames": QueryName("MessageSystemAttributeName"),
        "MessageSystemAttributes": QueryName("MessageSystemAttribute", "Name", "Value"),
        "Messages": QueryName("Message"),
        "QueueUrls": QueryName("QueueUrl"),
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
            error = service_error.fault.code
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
        self._stream.write(line + "\n")


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
        body: Union[LengthBody, ChunkedBody] = LengthBody(self.rfile, 0)
        head = None
        try:
            raw = self._read_head()
            if not raw:
                return
            try:
                head = parse_head(raw)
                request, body = self._request(head)
                reply = self.server.proxy.handle(request)
            except ServiceError as error:
                headers = head.headers if head else _salvage(raw)
                request = Request("", "/", headers, io.BytesIO(), self.client_address[0])
                reply = self.server.proxy.handle(request, error)
                head = None
            keep = head is not None and head.version == "1.1" and not body.unread
            if keep and "close" not in (request.header("connection") or "").lower():
                self.close_connection = False
            data = encode_reply(
                reply,
                _http_date(int(time.time())),
                self.close_connection,
                request.method == "HEAD",
            )
            self.connection.sendall(data)
            if self.close_connection:
                self._linger()
        except (ConnectionError, socket.timeout):
            self.close_connection = True  # nobody is left to be told

    def _read_head(self) -> bytes:
        """Return a request head with its blank line, b"" at the end of the connection."""
        buffered = self.rfile.peek()  # type: ignore[attr-defined]
        end = buffered.find(b"\r\n\r\n")
        if end >= 0:
            return self.rfile.read(end + 4)
        lines: List[bytes] = []
        size = 0
        while size <= MAX_HEAD:
            line = self.rfile.readline(MAX_HEAD + 1 - size)
            if not line:
                return b""
            lines.append(line)
            size += len(line)
            if line == b"\r\n" or not line.endswith(b"\r\n"):
                break
        return b"".join(lines)

    def _request(self, head: Head) -> Tuple[Request, Union[LengthBody, ChunkedBody]]:
        limit = self.server.max_body
        length = body_framing(head, limit)
        expects = [value for name, value in head.headers if name.lower() == "expect"]
        begin = None
        if expects and head.version == "1.1":
            if expects[0].lower() != "100-continue":
                raise ServiceError("ExpectationFailed", "The only Expect is 100-continue.")
            begin = self._continue
        body: Union[LengthBody, ChunkedBody]
        if length is None:
            body = ChunkedBody(self.rfile, limit, begin)
        else:
            body = LengthBody(self.rfile, length, begin)
        peer = self.client_address[0]
        return Request(head.method, head.target, head.headers, body, peer, self._abandoned), body

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


def _salvage(raw: bytes) -> Headers:
    """Return what header lines can be told from a broken head, to answer in its protocol."""
    lines = re.findall("^([A-Za-z-]+):[ \t]*([^\r\n]*)", raw.decode("latin-1"), re.MULTILINE)
    return tuple(lines[:MAX_HEADERS])


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
        status = os.stat(self.path)
        return status.st_mtime_ns, status.st_size

    def refresh(self, proxy: Proxy) -> None:
        """Read the file again if it has changed, and give the proxy what it says."""
        try:
            stamp = self._stamp_now()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            proxy.clients = read_clients(self.path)
        except (OSError, ValueError) as error:
            log.error("%s not read again, its clients stay as they were: %s", self.path, error)
            return
        signing_key.cache_clear()
        log.warning("%s read again: %d keys", self.path, len(proxy.clients))


class _Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line: str) -> List[str]:
        return shlex.split(line, comments=True)


class _Version(argparse.Action):
    """Names the copy: people carry this file about."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        with open(__file__, "rb") as source:
            digest = hashlib.sha256(source.read()).hexdigest()
        print(f"awsproxy {__version__} (sha256 {digest[:12]})")
        parser.exit()


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], Any]:
    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    convert.__name__ = "number"  # argparse names it in its message
    return convert


def _account_id(text: str) -> str:
    if not _ACCOUNT_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 12 digits")
    return text


def _public_url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is not http(s)://host[:port][/path]")
    return text


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="awsproxy",
        fromfile_prefix_chars="@",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Verify the signature of each AWS call, and answer Amazon SQS from memory.",
        epilog="examples:\n"
        "  python awsproxy.py --port 8081                       the demo client, dummykey\n"
        "  python awsproxy.py --host 0.0.0.0 --clients clients  clients of your own\n"
        "  python awsproxy.py @flags                            flags from a file\n",
    )
    add = parser.add_argument_group("where to listen").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add(
        "--port",
        type=_number(int, 0, 65535),
        default=8081,
        metavar="PORT",
        help="port to listen on; 0 picks one (default: %(default)s)",
    )
    add(
        "--public-url",
        type=_public_url,
        metavar="URL",
        help="what queue URLs begin with (default: http:// and the Host of the request)",
    )
    add(
        "--max-body",
        type=_number(int, 1, 1 << 40),
        default=16777216,
        metavar="BYTES",
        help="longest request body taken (default: %(default)s)",
    )
    add(
        "--timeout",
        type=_number(float, 0.1, 86400),
        default=60,
        metavar="SECONDS",
        help="how long a connection may stay silent (default: %(default)s)",
    )
    add = parser.add_argument_group("who may call").add_argument
    add(
        "--clients",
        metavar="FILE",
        help="keys that callers sign with, a section each as in ~/.aws/credentials; read again"
        " when it changes (default: key dummykey, secret dummysecret, loopback only)",
    )
    add(
        "--no-verify",
        action="store_true",
        help="take calls unsigned or wrongly signed; loopback only",
    )
    add(
        "--clock-skew",
        type=_number(int, 0, 604800),
        default=900,
        metavar="SECONDS",
        help="how far a caller's clock may be off (default: %(default)s)",
    )
    add(
        "--region",
        action="append",
        default=[],
        metavar="REGION",
        help="a region that calls may be signed for; may be given again (default: any)",
    )
    add(
        "--account-id",
        type=_account_id,
        default="000000000000",
        metavar="ID",
        help="account that queues belong to (default: %(default)s)",
    )
    add = parser.add_argument_group("what to print").add_argument
    add(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="form of the line printed for each call (default: %(default)s)",
    )
    add("--quiet", action="store_true", help="print no line for each call")
    add("--version", action=_Version, nargs=0, help="print version and sha256 of this file")
    return parser  # fmt: skip


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
