#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Copyright 2026 the awsproxy authors
"""awsproxy: see each AWS call, check its signature, answer it here or pass it on.

AWS clients (the command line, every SDK, `curl --aws-sigv4`) sign their HTTP requests with
Signature Version 4.  This file is a proxy between them and AWS.  It verifies the signature as
strictly as AWS does, and finds out which operation the client calls.  It answers Amazon SQS from
memory, or signs the call again with the real credentials and forwards it.

    python awsproxy.py --port 8081
    aws --endpoint-url http://localhost:8081 sqs create-queue --queue-name jobs
    curl localhost:8081 --aws-sigv4 aws:amz:us-east-1:sqs --user dummykey:dummysecret \\
         -H 'X-Amz-Target: AmazonSQS.ListQueues' -d '{}'

`Proxy.handle` does this with each call, and needs no socket:

    socket -> Request -> verify -> Call -> policy -> before hooks -+-> a target answers -+
              wire:      who?      what?   may they?               +-> a hook answers ---+
    socket <- Reply <-------------------------- after hooks <---- error, in their protocol <+

Read these first: [3.1] to [3.5] are Signature Version 4 in reading order, some 600 lines.  Then
[8.10], the steps of each call.

Contents.  Each chapter uses only earlier ones.  Chapters 1 to 4 are pure: bytes in, bytes out, the
time is an argument.  README documents the names in `__all__`, which stay; all others may change.

    1 Messages: [1.1] HTTP messages  [1.2] Clients and calls  [1.3] Errors
    2 HTTP/1.1 framing: [2.1] The head of a request  [2.2] Bodies  [2.3] Responses
    3 Signature Version 4: [3.1] Parsing  [3.2] Canonical request
        [3.3] String to sign, signing key, signature  [3.4] Rules of services  [3.5] Verification
        [3.6] Refusals  [3.7] Presigned URLs  [3.8] Mistakes of signers
        [3.9] Bodies that are checked as they stream  [3.10] Signing  [3.11] Removing a signature
        [3.12] Heads that repeat
    4 Wire protocols: [4.1] Operations and the shapes of their input
        [4.2] Which protocol a service speaks  [4.3] AWS JSON  [4.4] AWS Query
        [4.5] Actions of Amazon S3  [4.6] REST  [4.7] RPC v2 CBOR
    5 SQS in memory: [5.1] Limits and refusals  [5.2] Messages and queues  [5.3] Queue attributes,
        and checks of messages  [5.4] The operations  [5.5] The model of Amazon SQS
        [5.6] Queue URLs: the caller gets ours, the upstream gets its own
    6 Upstream: [6.1] Endpoints  [6.2] Our own credentials  [6.3] Connections  [6.4] Forwarding
    7 Hooks: [7.1] Workers and exchanges  [7.2] The interface of hooks  [7.3] The access log
        [7.4] Explanations  [7.5] Metrics  [7.6] Messages in flight
        [7.7] Protection of an ECS task  [7.8] The inspector
    8 The proxy: [8.1] Targets  [8.2] Routes  [8.3] Policies  [8.4] What a call needs
        [8.5] Guard and learning  [8.6] The tape  [8.7] Paths of our own  [8.8] The store
        [8.9] Hooks, and calls that wait  [8.10] The proxy
    9 The server: [9.1] Connections  [9.2] The event loop
    10 Command line: [10.1] The files of clients and queues  [10.2] Flags  [10.3] The program
        [10.4] Processes  [10.5] In a test process  [10.6] A saved request
        [10.7] Routes of the flags

The life of a request whose head has no template yet (see HeadTemplate), function by function:

    every call: PeerConnection.readable, PeerConnection.next_request, HeadTemplates.parse,
        parse_head, body_framing, Proxy.begin, parse_authorization, wire_protocol, Proxy._verify,
        verify_head, verify_body, canonical_parts, string_to_sign, signature, Proxy._find_call,
        AwsJson.meaning, Proxy._find_target, Proxy._act
    then, if embedded: Embedded.answer, Sqs.send_message, AwsJson.output, Proxy._save,
        Proxy.observed, Metrics.observe, PeerConnection.send_outcome, encode_reply
    or, if forwarded: Upstream.begin, sign, Pending.send, Server.wait, Pending.proceed,
        Upstream.arrived, Proxy.observed, PeerConnection.send_outcome, encode_reply
    or, for a long poll: Embedded.answer, Sqs.receive_message, Pending, Server.work, Pending.wait,
        Sqs.receive_message, AwsJson.output, Proxy.observed, encode_reply
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import configparser
import contextlib
import copy
import dataclasses
import datetime
import difflib
import email.utils
import errno
import fnmatch
import functools
import gc
import hashlib
import heapq
import hmac
import html
import http.client
import http.server
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import queue as queues
import random
import re
import resource
import select
import selectors
import shlex
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import urllib.request
import zlib
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, BinaryIO, Callable, NamedTuple, NoReturn, Optional, Protocol, Union
from urllib.parse import quote, unquote_to_bytes
from xml.etree import ElementTree
from xml.sax.saxutils import escape

__version__ = "0.2.0"
__all__ = ["DEMO_CLIENTS", "Client", "Guard", "Hook", "MovableClock", "Policy", "Proxy",
    "Recorder", "Reply", "Request", "Route", "Server", "ServiceError", "Sqs", "Store", "Tape",
    "main", "running"]  # fmt: skip

log = logging.getLogger("awsproxy")


# ==== 1. Messages: Request, Call, Reply, ServiceError ====
# Request and Reply are HTTP and know nothing of AWS.  A Call is a Request whose caller and
# operation are known.  A stage makes a new value or raises ServiceError.

# [1.1] HTTP messages
Headers = tuple[tuple[str, str], ...]  # wire order, wire case, repeats kept, text is latin-1
Fields = Mapping[str, list[str]]  # by name in lower case, the values in the order received
MAX_PARAMETERS = 2000  # in a query string: each one costs time in the canonical request
BROKEN_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
BASE64 = re.compile("(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def fields_of(headers: Iterable[tuple[str, str]]) -> Fields:
    """Return the header values by name in lower case."""
    fields: dict[str, list[str]] = {}
    for name, value in headers:
        fields.setdefault(name.lower(), []).append(value)
    return fields


def pairs(table: str) -> dict[str, str]:
    """Return a table that is written as `name=value` words."""
    return dict(entry.split("=", 1) for entry in table.split())


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a question that names the most similar known word, or ""."""
    close = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f"; did you mean {close[0]}?" if close else ""


class Body(Protocol):
    """A request body: any binary reader."""

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, all the rest if negative, b"" at the end."""


@dataclass(eq=False)
class Request:
    """An HTTP request as it arrived: nothing decoded or merged, the body unread, never changed."""

    method: str
    target: str  # raw; text that is encoded as latin-1 gives back the signed bytes
    headers: Headers
    body: Body
    peer: str = ""  # the client's address
    abandoned: Callable[[], bool] = lambda: False  # returns whether the client has hung up
    template: Optional[HeadTemplate] = field(default=None, init=False)  # of the head

    def __repr__(self) -> str:
        return f"Request({self.method!r}, {self.path!r})"  # the rest may hold secrets

    @functools.cached_property
    def fields(self) -> Fields:
        """Return the header values under each name in lower case, in the order received."""
        return fields_of(self.headers)

    def with_headers(self, headers: Headers) -> Request:
        """Return the same request with other headers."""
        return Request(self.method, self.target, headers, self.body, self.peer, self.abandoned)

    def header(self, name: str) -> Optional[str]:
        """Return the first value of the header of this name (in lower case), or None."""
        return self.fields.get(name, (None,))[0]

    @property
    def path(self) -> str:
        """Return the target up to its first question mark, still percent-encoded."""
        return self.target.partition("?")[0]

    @functools.cached_property
    def query(self) -> Sequence[tuple[bytes, bytes]]:
        """Return the decoded (name, value) pairs of the query string, in order, repeats kept.

        `k` alone means `k=`; `+` is a space, as AWS reads it.  Or raise MalformedQueryString."""
        text = self.target.partition("?")[2]
        if BROKEN_ESCAPE.search(text):
            raise ServiceError("MalformedQueryString", "The query string has a broken escape.")
        if text.count("&") >= MAX_PARAMETERS:
            raise ServiceError("MalformedQueryString", f"More than {MAX_PARAMETERS} parameters.")
        raw = text.replace("+", " ").encode("latin-1")
        parts = (part.partition(b"=") for part in raw.split(b"&") if part)
        return [(unquote_to_bytes(k), unquote_to_bytes(v)) for k, _, v in parts]


class Reply(NamedTuple):
    """An HTTP response without its framing headers and its date."""

    status: int
    headers: Headers
    body: Union[bytes, Iterable[bytes]]  # bytes, or blocks of a body that streams


# [1.2] Clients and calls
class Client(NamedTuple):
    """A key that callers may sign with, its name and its account."""

    name: str
    access_key_id: str
    secret_access_key: str
    session_token: str = ""
    account_id: str = ""  # "" is the account of the proxy
    upstream_profile: str = ""  # chooses the credentials of forwarded calls
    upstream_role_arn: str = ""  # the role to assume for forwarded calls
    policy: Any = None  # a Policy, or a Watched file of one

    def __repr__(self) -> str:
        return f"Client({self.name!r}, {self.access_key_id!r})"


@dataclass
class Call:
    """A Request whose caller, operation and input are known."""

    request: Request
    wire: WireProtocol
    service: str
    operation: str
    region: str
    caller: Client
    body: Body  # verified
    payload_hash: str = ""  # verified
    presigned: bool = False
    base_url: str = ""  # the beginning of a QueueUrl
    encoded: Any = None  # the form from which `input` is decoded
    began: float = math.inf  # on the monotonic clock
    path: str = ""  # of a REST call, as patterns spell it
    signed_headers: Sequence[str] = ()  # the signature covers them
    bucket: str = ""  # of Amazon S3, if the Host names it
    other_paths: Sequence[str] = ()  # other readings of the path, which need the same route
    route: Optional[Route] = field(default=None, init=False)  # the route that decided
    decision: Optional[Decision] = field(default=None, init=False)  # of the client's policy
    advice: str = field(default="", init=False)  # the flag that would allow it
    may_wait: bool = field(default=True, init=False)
    changed: bool = field(default=False, init=False)  # whether a hook has changed the input
    upstream_seconds: float = field(default=0.0, init=False)
    upstream_host: str = field(default="", init=False)  # that the call was sent to
    upstream_id: str = field(default="", init=False)  # the request id in the upstream's answer
    upstream_key: str = field(default="", init=False)  # that it was signed with
    sent: Optional[Request] = field(default=None, init=False)  # to the upstream, signed again
    body_hash: Callable[[], str] = field(default=str, init=False)  # of a recorded call
    unsigned: bool = field(default=False, init=False)  # whether it goes upstream unsigned
    ignored: Sequence[str] = field(default=(), init=False)  # parameters that are no input
    rewrites: Sequence[Rewrite] = field(default=(), init=False)  # change the forwarded request

    action: str = field(init=False)  # as `sqs:SendMessage`, `lambda:POST/2015-03-31/functions`

    def __post_init__(self) -> None:
        self.action = f"{self.service}:{self.operation}{self.path}"

    @functools.cached_property
    def input(self) -> dict[str, Any]:
        """Return the operation's input; its keys are the names in the service's model."""
        return self.wire.input(self)


Rewrite = Callable[[Call, Request], Optional[Request]]
Act = Callable[[], Reply]  # returns a reply, and may block
Spool = Callable[[Body], tuple[Body, str]]  # returns a body to read again, and its SHA-256
Clients = Mapping[str, Sequence[Client]]  # by access key id, which several tokens may share
_DEMO = Client("demo", "dummykey", "dummysecret")
DEMO_CLIENTS: Clients = {"dummykey": (_DEMO, _DEMO._replace(session_token="dummysession"))}
Clock = Callable[[], float]


class WouldWait(Exception):
    """The call must wait, and it may not."""


# [1.3] Errors
# The HTTP status of an error, its code in XML and its `__type` in JSON.
Fault = collections.namedtuple("Fault", "status code type")
_CORAL = "com.amazon.coral.service#"
_SQS, _LEGACY = "com.amazonaws.sqs#", "AWS.SimpleQueueService."
# A line: the code in XML, the type in JSON, and the errors; * is the error's name.  The status is
# 400 unless another follows the name.  Sources: the SQS service model; "Common Error Types" of the
# API references; "Error responses" of Amazon S3; recorded answers.  HTTP framing has no model.
_FAULTS = f"""
    * {_CORAL}*Exception AccessDenied:403 AuthFailure:401 AuthorizationHeaderMalformed \
        AuthorizationQueryParametersError BadDigest BadRequest ExpectationFailed:417 \
        IncompleteBody IncompleteSignature InvalidAccessKeyId:403 InvalidArgument \
        InvalidParameterValue InvalidRequest InvalidToken InvalidURI MalformedQueryString \
        MalformedTrailerError MissingAction MissingAuthenticationToken:403 \
        MissingContentLength:411 NotImplemented:501 OutcomeUnknown RequestEntityTooLarge:413 \
        RequestHeaderFieldsTooLarge:431 RequestTimeTooSkewed:403 RequestTimeout \
        XAmzContentSHA256Mismatch
    * {_CORAL}* InternalFailure:500 ServiceUnavailable:503
    * {_CORAL}UnknownOperationException InvalidAction UnknownOperation:404
    * {_CORAL}MissingRequiredParameterException MissingParameter
    * {_CORAL}UnrecognizedClientException InvalidClientTokenId:403
    * {_CORAL}InvalidSignatureException SignatureDoesNotMatch:403
    MalformedInput {_CORAL}* SerializationException
    * {_SQS}* InvalidAttributeName InvalidAttributeValue InvalidMessageContents OverLimit:403 \
        ReceiptHandleIsInvalid:404 ResourceNotFoundException:404
    {_LEGACY}NonExistentQueue {_SQS}* QueueDoesNotExist
    QueueAlreadyExists {_SQS}* QueueNameExists
    {_LEGACY}* {_SQS}* BatchEntryIdsNotDistinct BatchRequestTooLong EmptyBatchRequest \
        InvalidBatchEntryId PurgeQueueInProgress:403 QueueDeletedRecently \
        TooManyEntriesInBatchRequest UnsupportedOperation
"""
ERRORS: Mapping[str, Fault] = {
    name: Fault(int(status or 400), code.replace("*", name), shape.replace("*", name))
    for code, shape, *errors in map(str.split, _FAULTS.strip().splitlines())
    for name, _, status in (error.partition(":") for error in errors)}  # fmt: skip


class ServiceError(Exception):
    """An answer that is not a success; the caller's wire protocol renders it."""

    def __init__(self, code: str, message: str, **detail: str) -> None:
        super().__init__(message)
        self.code = code  # a key of ERRORS
        self.fault = ERRORS[code]
        self.message = message
        self.detail = detail  # more elements of Amazon S3's error document
        self.reason = ""  # the row of REFUSALS, if it is one
        self.proof: Optional[Proof] = None  # of a wrong signature
        self.cause = ""  # why the signature is wrong, if that is known
        self.theirs: Optional[Proof] = None  # the steps of the signer that made it, if known


# ==== 2. HTTP/1.1 framing: parse_head, body_framing, Stream, FramedBody ====
# http.server's own parser is lenient: it rewrites a target that begins with `//` (cpython#99220)
# and drops the lines after a malformed one.  A verifier needs the bytes that were signed.  This
# chapter parses heads strictly (RFC 9112), and refuses a request whose framing is in doubt.

# [2.1] The head of a request
MAX_HEAD = 65536  # bytes, request line and blank line included
MAX_HEADERS = 500  # lines: S3 metadata may have more than a hundred short entries
METHODS = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"})
CRLF = "\r\n"
_TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([^\0- \x7f]+) HTTP/1\.([01])")
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\0-\x08\n-\x1f\x7f]*)")
_FIELD_LINES = re.compile(rf"(?:{_TOKEN}:[^\0-\x08\n-\x1f\x7f]*\r\n)*")
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%-]+(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")
_DIGITS = re.compile("[0-9]{1,18}")
BARE_LF = re.compile(rb"(?<!\r)\n")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})([ \t]*;[\t -~\x80-\xff]*)?\r\n")
UNTIL_CLOSE = -1
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")
_FIELD_FAULTS = {  # of a line that _FIELD_LINE does not match; the first pattern that it contains
    "\0": "a NUL", "\r": "a CR that no LF follows", "\n": "a LF that no CR precedes",
    "^[ \t]": "a continued (folded) header line", "^[^:]*$": "a header line without a colon",
    "^[^:]*[ \t]:": "a blank before the colon of a header line",
    f"^(?!{_TOKEN}:)": "a header name that is not a token",
    "": "a control character in a header value"}  # fmt: skip


def _parse_fields(block: str) -> Headers:
    lines = block.split(CRLF)
    if not _FIELD_LINES.fullmatch(block):
        wrong = next(line for line in lines if not _FIELD_LINE.fullmatch(line))
        fault = next(it for pattern, it in _FIELD_FAULTS.items() if re.search(pattern, wrong))
        raise ValueError(f"contains {fault}")  # no value, which may repeat a secret
    fields = [line.partition(":") for line in lines[:-1]]
    return tuple([(name, value.strip(" \t")) for name, _, value in fields])


class Head(NamedTuple):
    """A request line and its header lines."""

    method: str
    target: str  # as it is, to the byte
    version: str  # "1.0" or "1.1"
    headers: Headers
    fields: Fields
    template: Optional[HeadTemplate] = None

    def request(self, body: Body, peer: str, abandoned: Callable[[], bool]) -> Request:
        """Return the request with this head."""
        request = Request(self.method, self.target, self.headers, body, peer, abandoned)
        request.__dict__["fields"], request.template = self.fields, self.template  # known already
        return request


def parse_head(raw: bytes) -> Head:
    """Return the parts of a head that ends with a blank line (RFC 9112, 2-5); or ServiceError."""
    if len(raw) > MAX_HEAD:
        raise ServiceError("RequestHeaderFieldsTooLarge", f"The head exceeds {MAX_HEAD} bytes.")
    text = raw.decode("latin-1")
    if not text.endswith(CRLF + CRLF):
        raise ServiceError("BadRequest", "The request head does not end with CR LF CR LF.")
    request_line, _, block = text[:-2].partition(CRLF)
    if not (match := _REQUEST_LINE.fullmatch(request_line)):
        raise ServiceError("BadRequest", "The request line is not 'METHOD /target HTTP/1.1'.")
    method, target, minor = match.groups()
    if method not in METHODS:  # RFC 9110, 9.1
        raise not_implemented(method)
    if not target.startswith("/") or "#" in target:  # AWS, too, refuses an absolute-form (3.2.2)
        raise ServiceError("BadRequest", "The target must be a path, with or without a query.")
    try:
        headers = _parse_fields(block)
    except ValueError as error:
        raise ServiceError("BadRequest", f"The request head {error}.") from error
    if len(headers) > MAX_HEADERS:
        raise ServiceError("RequestHeaderFieldsTooLarge", f"More than {MAX_HEADERS} headers.")
    fields = fields_of(headers)
    hosts = fields.get("host", ())
    if len(hosts) > 1 or (not hosts and minor == "1"):
        raise ServiceError("BadRequest", "The request must have one Host header.")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise ServiceError("BadRequest", "The Host header is not a host and port.")
    return Head(method, target, "1." + minor, headers, fields)


def not_implemented(method: str) -> ServiceError:
    """Return the refusal of a method that no AWS service has."""
    return ServiceError("NotImplemented", f"No AWS service has the method {method[:40]}.")


def salvage_head(raw: bytes) -> Head:
    """Return the readable parts of a refused head, to refuse the request in its protocol."""
    text = raw.decode("latin-1")
    line = re.match(rf"({_TOKEN}) (/[^\0- \x7f]*)?", text)
    headers = tuple(re.findall("(?m)^([A-Za-z0-9-]+):[ \t]*([^\0\r\n]*)", text)[:MAX_HEADERS])
    method, target = (line[1], line[2] or "/") if line else ("", "/")
    return Head(method, target, "1.0", headers, fields_of(headers))


def expects_continue(head: Head) -> bool:
    """Return whether the client waits for `100 Continue`; refuse any other expectation."""
    expected = head.fields.get("expect") if head.version == "1.1" else None
    if expected and {value.lower() for value in expected} != {"100-continue"}:
        raise ServiceError("ExpectationFailed", "The only Expect is 100-continue.")
    return expected is not None


def body_framing(head: Head) -> Optional[int]:
    """Return the length of the body, None if chunked; ServiceError if in doubt (RFC 9112, 6)."""
    try:
        if "transfer-encoding" in head.fields and head.version == "1.0":
            raise ValueError("HTTP/1.0 has no Transfer-Encoding")
        if "transfer-encoding" in head.fields and "content-length" in head.fields:
            raise ValueError("Content-Length excludes Transfer-Encoding")
        return _framing(head.fields, 0)
    except ValueError as error:
        raise ServiceError("BadRequest", f"{error}.") from error


def _framing(fields: Fields, undeclared: int) -> Optional[int]:
    if codings := fields.get("transfer-encoding"):
        if len(codings) > 1 or codings[0].lower() != "chunked":
            raise ValueError("The only Transfer-Encoding understood is 'chunked'")
        return None
    if not (lengths := fields.get("content-length")):
        return undeclared
    if len(set(lengths)) > 1 or not _DIGITS.fullmatch(lengths[0]):
        raise ValueError("Content-Length must be one decimal number")
    return int(lengths[0])


def too_large(max_body: int) -> ServiceError:
    """Return the refusal of a body that is longer than `max_body` bytes."""
    return ServiceError("RequestEntityTooLarge", f"The body is longer than {max_body} bytes.")


# [2.2] Bodies
class Stream:
    """A buffered binary stream over `receive`, which returns b"" at the end."""

    def __init__(self, receive: Callable[[int], bytes], buffer: bytes = b"") -> None:
        self.buffer = buffer  # received and not read
        self._receive = receive

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, which is no less than 0; fewer only at the end of the stream."""
        if len(self.buffer) < size:
            whole = bytearray(self.buffer)  # small parts kept one by one would take more room
            while len(whole) < size and (data := self._receive(min(size - len(whole), 262144))):
                whole += data
            self.buffer = bytes(whole)
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def read_some(self, size: int) -> bytes:
        """Return up to `size` bytes, as soon as there are any."""
        data = self.buffer or self._receive(size)
        self.buffer = data[size:]
        return data[:size]

    def readline(self, size: int) -> bytes:
        """Return up to the next LF, and up to `size` bytes."""
        while b"\n" not in self.buffer and len(self.buffer) < size:
            if not (data := self._receive(8192)):  # few: each line copies the rest of the buffer
                break
            self.buffer += data
        end = self.buffer.find(b"\n", 0, size) + 1 or size
        line, self.buffer = self.buffer[:end], self.buffer[end:]
        return line


class FramedBody:
    """A body of `length` bytes, or a chunked body of up to `limit` bytes (RFC 9112, 7.1).

    It drops extensions and trailers of chunks.  `begin` sends `100 Continue` before any read."""

    def __init__(self, source: Stream, length: Optional[int], limit: int = sys.maxsize,
            begin: Optional[Callable[[], None]] = None) -> None:  # fmt: skip
        self.unread = length != 0  # whether bytes of this body are still in the stream
        self._source, self._chunked, self._begin = source, length is None, begin
        self._left = length or 0  # bytes of the body, or of the present chunk
        self._limit = self._room = limit

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, all if negative; fewer only at the end of the body."""
        return Stream(self.read_some).read(size if size >= 0 else sys.maxsize)

    def read_some(self, size: int) -> bytes:
        """Return up to `size` bytes as soon as there are any; ServiceError if it ends too soon."""
        if self._begin:  # of an empty body, too: some clients wait for the 100 of the next one
            self._begin()
            self._begin = None
        if not (self._left or (self._chunked and self.unread and self._has_chunk())):
            return b""
        if not (data := self._source.read_some(min(size, self._left))):
            raise ServiceError("IncompleteBody", "The body ended before its length.")
        self._left -= len(data)
        if not self._left and self._chunked and self._line() != b"\r\n":
            raise ServiceError("BadRequest", "A chunk is longer than its size.")
        self.unread = self._chunked or self._left > 0
        return data

    def _has_chunk(self) -> bool:
        """Return whether a chunk follows; read its size, or all that stands after the last one."""
        if not (match := _CHUNK_SIZE.fullmatch(self._line())):
            raise ServiceError("BadRequest", "A chunk does not begin with its size in hex.")
        self._left = int(match[1], 16)
        self._room -= self._left
        if self._room < 0:
            raise too_large(self._limit)
        for count, trailer in enumerate(() if self._left else iter(self._line, b"\r\n")):
            if count >= MAX_HEADERS:
                raise ServiceError("RequestHeaderFieldsTooLarge", "There are too many trailers.")
            if not _FIELD_LINES.fullmatch(trailer.decode("latin-1")):
                raise ServiceError("BadRequest", "A trailer is not a header line.")
        self.unread = self._left > 0
        return self.unread

    def _line(self) -> bytes:
        if not (line := self._source.readline(4096)):
            raise ServiceError("IncompleteBody", "The body ended before its last chunk.")
        return line


# [2.3] Responses
class ResponseHead(NamedTuple):
    """The head of a response; `keeps` means that the connection stays open after it."""

    status: int
    headers: Headers
    keeps: bool
    length: Optional[int]  # of the body, None if chunked, or UNTIL_CLOSE


def read_head(source: Stream) -> bytes:
    """Return a head with its blank line, b"" at the end; ValueError if too long or cut short."""
    head = bytearray()
    for line in iter(functools.partial(source.readline, MAX_HEAD + 1), b""):
        head += line
        if len(head) > MAX_HEAD:
            raise ValueError("the head of the answer is too long")
        if line in (b"\r\n", b"\n"):
            return bytes(head)
    if head:
        raise ValueError("the head of the answer is not complete")
    return b""


def parse_response_head(raw: bytes, method: str) -> ResponseHead:
    """Return the head of an answer to a request of this method; ValueError if it is malformed."""
    status_line, _, block = (raw.decode("latin-1").rstrip(CRLF) + CRLF).partition(CRLF)
    if not (match := _STATUS_LINE.fullmatch(status_line)):
        raise ValueError(f"it begins with {status_line[:40]!r}")
    headers, status = _parse_fields(block), int(match[2])
    fields, bodiless = fields_of(headers), method == "HEAD" or status < 200 or status in (204, 304)
    options = ",".join(fields.get("connection", ())).lower()
    keeps = "close" not in options and (match[1] == "1" or "keep-alive" in options)
    return ResponseHead(status, headers, keeps, 0 if bodiless else _framing(fields, UNTIL_CLOSE))


def _encode_lines(lines: Sequence[str]) -> bytes:
    text = CRLF.join(lines) + CRLF + CRLF
    if not text.count("\r") == text.count("\n") == len(lines) + 1 or "\0" in text:
        raise ValueError("a line break or NUL in a header")
    return text.encode("latin-1")


def encode_head(request: Request) -> bytes:
    """Return the bytes of a request's head; ValueError for a line break or NUL in a line."""
    fields = [f"{name}: {value}" for name, value in request.headers]
    return _encode_lines([f"{request.method} {request.target} HTTP/1.1", *fields])


def encode_reply(reply: Reply, date: str, close: bool, head_only: bool = False,
        streams: Optional[str] = None) -> bytes:  # fmt: skip
    """Return the bytes of a whole response, framed by its length (RFC 9112, 6.2).

    `close` announces the end of the connection; `head_only` is for an answer to HEAD.  `streams`
    is for the head of a streaming body: the header that frames the body, or "".  The reply's own
    Date and Content-Length stay.  Raise ValueError for a line break in a header."""
    status, headers, body = reply
    assert isinstance(body, bytes)  # a body that streams is not encoded as a whole
    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    names = [name.lower() for name, _ in headers]
    if "date" not in names:
        lines.append(f"Date: {date}")
    bodiless = status < 200 or status in (204, 304) or (head_only and not body)
    if streams:
        lines.append(streams)
    elif streams is None and not bodiless and "content-length" not in names:
        lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    head = _encode_lines(lines)
    return head if head_only or bodiless or streams is not None else head + body


# ==== 3. Signature Version 4: parse_authorization, canonical_parts, verify, sign ====
# The caller and the proxy each reduce the request to one text and sign it with the same secret.
# Both texts must agree to the byte, so this chapter reads the raw target and raw header values,
# and decodes and encodes them as latin-1.  Sources: IAM User Guide, "Create a signed AWS API
# request"; Amazon S3 API Reference, "Authenticating Requests (AWS Signature Version 4)".
#
# `verify_head` and `verify_body` decide, and refuse by default.  They return the client whose key
# they have just checked.  No later code reads the identity from the request again.
# To add a refusal: write a row of REFUSALS, and raise refusal(name, request, values).

# [3.1] Parsing
ALGORITHM = "AWS4-HMAC-SHA256"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class CredentialScope(NamedTuple):
    """The day, the region and the service that a signature is valid for."""

    date: str
    region: str
    service: str
    terminator: str = "aws4_request"

    def __str__(self) -> str:
        return "/".join(self)


class Authorization(NamedTuple):
    """The claims of a caller, in the header or a presigned query; the repr has no secrets."""

    access_key_id: str
    scope: CredentialScope
    signed_headers: tuple[str, ...]
    signature: str
    amz_date: str  # ISO 8601 basic
    expires: Optional[int] = None  # seconds after amz_date
    presigned: bool = False
    session_token: Optional[str] = None

    def __repr__(self) -> str:
        return f"Authorization({self.access_key_id!r}, {self.scope}, {self.amz_date!r})"


_AMZ_DATE = re.compile("[0-9]{8}T[0-9]{6}Z")
_SHA256_HEX = re.compile("[0-9a-f]{64}")
_SIGNED_HEADERS = re.compile("[!#$%&'*+.^_`|~0-9a-z-]+(;[!#$%&'*+.^_`|~0-9a-z-]+)*")
_SCOPE_NAME = re.compile("[A-Za-z0-9_-]{1,64}")
_BLANKS = re.compile("[ \t]+")
_TOKEN_SHOWN = re.compile("((?i:x-amz-(?:security|s3session)-token|authorization)[:=])[^\n&]*")
_Claims = tuple[str, CredentialScope, tuple[str, ...]]  # key id, scope and signed headers
_PARAMETERS = ("Credential", "Signature", "SignedHeaders")
_AREAS = pairs("""us-east=2 us-west=2 us-gov-east=1 us-gov-west=1 eu-central=2 eu-north=1 eu-west=3
    eu-south=2 ap-east=2 ap-south=2 ap-northeast=3 ap-southeast=7 ca-central=1 ca-west=1 sa-east=1
    mx-central=1 me-central=1 me-south=1 il-central=1 af-south=1 cn-north=1 cn-northwest=1""")
REGIONS = [f"{area}-{n + 1}" for area, count in _AREAS.items() for n in range(int(count))]


def authorization_of(request: Request) -> Authorization:
    """Return the authorization of a request, parsed once and then kept with the request."""
    found: Optional[Authorization] = request.__dict__.get("claimed")
    if found is None:
        found = request.__dict__["claimed"] = parse_authorization(request)
    return found


def parse_authorization(request: Request) -> Authorization:
    """Parse the Authorization header or presigned query.  Raise ServiceError if not just one."""
    headers = request.fields.get("authorization", ())
    if len(headers) == 1 and "?" not in request.target:
        return _parse_header(request, headers[0])
    query = request.target.partition("?")[2]
    if BROKEN_ESCAPE.search(query):
        raise refusal("query", request)
    names = {name.lower() for name, _ in request.query}  # it refuses too many, which would cost
    # Some readers look at the raw query and some at the decoded one; no client escapes these.
    for escaped in re.findall("(?:^|&)([^=&%]*%[^=&]*)", query):
        if "x-amz-" in (name := urllib.parse.unquote(escaped[:120], "latin-1")[:40]).lower():
            raise refusal("query parameter", request, f"Spell '{name}' without percent-encoding.")
    presigned = not names.isdisjoint({b"x-amz-algorithm", b"x-amz-credential", b"x-amz-signature"})
    if len(headers) + presigned > 1:
        raise refusal("several", request)
    if presigned:
        return _parse_query(request)
    if headers:
        return _parse_header(request, headers[0])
    if b"signature" in names and names & {b"awsaccesskeyid", b"signatureversion"}:
        raise _version_2(request)
    kind = request.header("content-type") or ""
    is_form_post = request.method == "POST" and kind.startswith("multipart/form-data")
    by_curl = (request.header("user-agent") or "").startswith("curl/")
    hint = " (curl signs if --user KEY:SECRET stands next to --aws-sigv4)" if by_curl else ""
    raise refusal("form post" if is_form_post else "unsigned", request, hint)


def _version_2(request: Request) -> ServiceError:
    marks = {name.lower() for name, _ in request.query} & {b"action", b"signatureversion"}
    of_s3 = not marks and "x-amz-target" not in request.fields
    return refusal("version 2 of s3" if of_s3 else "version 2", request)


def _parse_header(request: Request, header: str) -> Authorization:
    reason, date = "header parameter", _single(request, "x-amz-date")
    scheme, _, rest = header.partition(" ")
    if scheme == "AWS":
        raise _version_2(request)
    if scheme != ALGORITHM:
        reason = "algorithm" if scheme.startswith("AWS4-") else "scheme"
        raise refusal(reason, request, scheme[:40] if rest else "")
    given: dict[str, str] = {}
    for part in rest.split(",") if rest else ():
        name, equals, value = part.strip(" \t").partition("=")
        if not equals or name not in _PARAMETERS or name in given:
            fault = "is given twice" if name in given else "is no parameter of this algorithm"
            fault = fault if equals else "not a valid key=value pair (missing equal-sign)"
            raise refusal(reason, request, f"'{name[:40]}' {fault}.")
        given[name] = value
    requires = "Authorization header requires"
    faults = [f"{requires} '{name}' parameter." for name in _PARAMETERS if not given.get(name)]
    if faults and "," not in rest and " " in rest.strip():
        faults.append("Separate the parameters with commas.")
    if date is None and (date := _date_header(request)) is None:
        reason = "header parameter" if faults else "no date"
        faults.append(f"{requires} existence of either a 'X-Amz-Date' or a 'Date' header.")
    if date is None or faults:
        raise refusal(reason, request, " ".join(faults))
    claims = _parse_claims(request, "header", *map(given.__getitem__, _PARAMETERS))
    token = _single(request, "x-amz-security-token")
    return Authorization(*claims, given["Signature"], date, None, False, token)


def _parse_claims(request: Request, place: str, credential: str, made: str, names: str) -> _Claims:
    """Return the parts of the credential and of SignedHeaders; check the form of a signature."""
    reason = f"{place} parameter"
    key, *scope = credential.split("/")
    if len(scope) != 4:
        if place == "header":
            raise refusal("credential", request, credential[:200])
        raise refusal(reason, request, REFUSALS["credential"][2].format(credential[:200]))
    signed = tuple(names.split(";"))
    if not _SIGNED_HEADERS.fullmatch(names) or not all(map(str.__lt__, signed, signed[1:])):
        wrong = [f" ('{b[:40]}' after '{a[:40]}')" for a, b in zip(signed, signed[1:]) if a >= b]
        fault = "SignedHeaders must be distinct lower-case names, sorted, joined by ';'"
        raise refusal(reason, request, f"{fault}{''.join(wrong[:1])}.")
    if not _SHA256_HEX.fullmatch(made):
        raise refusal(reason, request, "Signature must be 64 lower-case hexadecimal digits.")
    return key, CredentialScope(*scope), signed


def _single(request: Request, name: str) -> Optional[str]:
    value, *more = request.fields.get(name, (None,))
    if more:
        raise refusal("header parameter", request, f"'{name}' must be given once.")
    return value


def _date_header(request: Request) -> Optional[str]:
    """Return the Date header in ISO 8601 basic format; RFC 9110, 5.6.7, has another."""
    value = _single(request, "date")
    if value is None or _AMZ_DATE.fullmatch(value):
        return value
    try:
        moment = email.utils.parsedate_to_datetime(value)
        return (moment - (moment.utcoffset() or datetime.timedelta())).strftime("%Y%m%dT%H%M%SZ")
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise refusal("date", request, value[:80]) from error


# [3.2] Canonical request
def canonical_path(path: str, normalize: bool) -> str:
    """Return the canonical URI of a raw path, or raise ServiceError InvalidURI."""
    if path in ("", "/"):
        return "/"
    if BROKEN_ESCAPE.search(path):
        raise ServiceError("InvalidURI", REFUSALS["uri"][2])
    segments = path.encode("latin-1").split(b"/")
    if not normalize:  # in S3's family `//`, `..` and `%2F` are parts of an object key, and stay
        return "/".join(quote(unquote_to_bytes(segment), safe="") for segment in segments)
    kept: list[bytes] = []
    for segment in segments:
        if segment == b"..":
            if not kept:
                raise ServiceError("InvalidURI", "The path leads above its root.")
            kept.pop()
        elif segment not in (b"", b"."):
            kept.append(segment)
    slash = b"/" if kept and path.endswith("/") else b""
    return quote(b"/" + b"/".join(kept) + slash, safe="/")  # each byte once more, `%` too


def canonical_query(pairs: Sequence[tuple[bytes, bytes]], without: Sequence[bytes] = ()) -> str:
    """Encode the decoded pairs again, and sort the pairs, not their text: `=` comes after `-`."""
    encoded = [(quote(k, safe=""), quote(v, safe="")) for k, v in pairs if k not in without]
    return "&".join(f"{name}={value}" for name, value in sorted(encoded))


def canonical_headers(fields: Mapping[str, Sequence[str]], names: Sequence[str]) -> str:
    """Return a line for each name: trim values, collapse blanks, join repeats in order."""
    text = ""
    for name in names:
        values = fields[name]
        value = values[0] if len(values) == 1 else ",".join([v.strip(" \t") for v in values])
        text += name + ":" + value.strip(" \t") + "\n"
    return _BLANKS.sub(" ", text) if "  " in text or "\t" in text else text


def canonical_parts(request: Request, authorization: Authorization, payload_hash: str,
        profile: Profile) -> tuple[str, ...]:  # fmt: skip
    """Return the lines of a canonical request: method, path, query, headers, names, payload."""
    path, _, query = request.target.partition("?")
    if query:
        unsigned = [b"X-Amz-Signature"] + [b"X-Amz-Security-Token"] * profile.unsigned_token
        query = canonical_query(request.query, unsigned if authorization.presigned else ())
    path, signed = canonical_path(path, profile.normalize_path), authorization.signed_headers
    headers = canonical_headers(request.fields, signed)
    return request.method, path, query, headers, ";".join(signed), payload_hash


# [3.3] String to sign, signing key, signature
def string_to_sign(amz_date: str, scope: CredentialScope, canonical: bytes) -> bytes:
    """Return the string to sign: algorithm, time, scope, hash of the canonical request."""
    digest = hashlib.sha256(canonical).hexdigest()
    return f"{ALGORITHM}\n{amz_date}\n{scope}\n{digest}".encode("latin-1")


@functools.lru_cache(maxsize=1024)
def signing_key(secret_access_key: str, scope: CredentialScope) -> bytes:
    """Return the key for one day, region and service.  Call `cache_clear` if secrets change."""
    key = b"AWS4" + secret_access_key.encode("utf-8")  # strangers' secrets never come here
    for part in scope:
        key = hmac.digest(key, part.encode("latin-1"), "sha256")
    return key


def signature(secret_access_key: str, scope: CredentialScope, text: bytes) -> str:
    """Return the signature of a string to sign, in lower-case hex."""
    return hmac.digest(signing_key(secret_access_key, scope), text, "sha256").hex()


@functools.lru_cache(maxsize=256)
def epoch(amz_date: str) -> int:
    """Return the seconds since 1970 of a time such as 20150830T123600Z, or raise ValueError."""
    if not _AMZ_DATE.fullmatch(amz_date):
        raise ValueError(amz_date)
    return int(datetime.datetime.strptime(amz_date, "%Y%m%dT%H%M%S%z").timestamp())


def iso_basic(seconds: float) -> str:
    """Return a time in ISO 8601 basic format: 0 gives 19700101T000000Z."""
    return _utc(math.floor(seconds), "%Y%m%dT%H%M%SZ")


@functools.lru_cache(maxsize=16)
def _utc(second: int, form: str) -> str:
    return datetime.datetime.fromtimestamp(second, datetime.timezone.utc).strftime(form)


# [3.4] Rules of services
S3_FAMILY = frozenset({"s3", "s3express", "s3-object-lambda", "s3-outposts"})


class Profile(NamedTuple):
    """The rules of a service for canonical requests and payloads."""

    normalize_path: bool = True  # resolve dot segments, and encode the path once more
    declared_payload: bool = False  # x-amz-content-sha256 stands for the body in the signature
    unsigned_token: bool = False  # clients append the session token after signing
    unsigned_token_header: bool = False  # the same for calls that have an Authorization header
    clock_skew: int = 900  # seconds that a caller's clock may differ from ours
    unsigned_body: str = ""  # a pattern of "METHOD /path" whose body need not be signed
    sends_hash: bool = False  # the service demands x-amz-content-sha256


PROFILES: Mapping[str, Profile] = {
    **dict.fromkeys(S3_FAMILY, Profile(normalize_path=False, declared_payload=True)),
    "iotdevicegateway": Profile(unsigned_token=True),  # "Protocols", AWS IoT Developer Guide
    # Clients of these send it unsigned (soto#151, soto-core#99); it is compared anyway.
    **dict.fromkeys(("kinesis", "sns", "sqs"), Profile(unsigned_token_header=True)),
    # AWS gives these five minutes, as measured by others (ministack#1745).
    **dict.fromkeys(("kms", "lambda", "monitoring", "route53"), Profile(clock_skew=300)),
    **dict.fromkeys(("glacier", "aoss"), Profile(sends_hash=True)),
    # VPC Lattice takes no other payload line ("SigV4 authenticated requests for VPC Lattice").
    "vpc-lattice-svcs": Profile(unsigned_body=".*", sends_hash=True),
    # The operations that the service models mark with v4-unsigned-body.
    "ebs": Profile(unsigned_body="PUT /snapshots/[^/]+/blocks/[^/]+"),
    "lex": Profile(unsigned_body="POST /bots?/.+/(content|utterance)"),
    "mediastore": Profile(unsigned_body="PUT /.+"),
    "omics": Profile(unsigned_body="PUT /sequencestore/[^/]+/upload/[^/]+/part")}  # fmt: skip
_GENERAL = Profile()


# [3.5] Verification
class Proof(NamedTuple):
    """The steps of a signature, as the proxy computed them."""

    parts: Sequence[str]  # method, path, query, headers, signed headers, payload line
    string_to_sign: bytes
    signature: str

    def __repr__(self) -> str:
        return f"Proof({self.string_to_sign!r})"  # the rest may hold secrets


class Verified(NamedTuple):
    """A verified request: its client, its scope and the body that was signed."""

    client: Client
    scope: CredentialScope
    body: Body
    payload_hash: str  # the payload line of the canonical request
    presigned: bool
    signed_headers: Sequence[str] = ()
    proof: Optional[Proof] = None


class Proven(NamedTuple):
    """The result of verify_head."""

    claimed: Authorization
    profile: Profile
    client: Client
    declared: Optional[str]  # the payload line; None if the body must be hashed
    other_host: str  # that the client may have signed, if a reverse proxy replaced Host
    may_search: Callable[[], bool]  # for the cause of a wrong signature
    proof: Optional[Proof] = None


def verify_head(request: Request, clients: Clients, now: float, service: Optional[str] = None,
        regions: Sequence[str] = (), clock_skew: Optional[int] = None,
        must_be_signed: Sequence[str] = (), profiles: Mapping[str, Profile] = PROFILES,
        private: bool = True, other_host: str = "",
        may_search: Callable[[], bool] = lambda: True,
        before: Optional[Proven] = None) -> Proven:  # fmt: skip
    """Check everything that the head proves.  If it declares no hash, the body must be hashed.

    service: the service that the request names apart from its scope
    regions: the allowed regions; all if empty
    clock_skew: seconds; replaces the clock_skew of the service's profile
    must_be_signed: headers that decide what the request means
    private: whether the request came by TLS or from this machine, as an unsigned body must
    other_host: a Host that clients may have signed, if a reverse proxy replaced it
    may_search: whether to search for the cause of a wrong signature, which takes some 20 ms
    before: the result for a head of the same template; its scope, client and headers were right"""
    # The order counts: the error of a later check would tell a stranger more.
    client = before and before.client
    if before:
        (header,), (amz_date,) = request.fields["authorization"], request.fields["x-amz-date"]
        key, scope, signed, *_, token = before.claimed
        made = Authorization(key, scope, signed, header[-64:], amz_date, None, False, token)
        request.__dict__["claimed"] = made
    claimed = authorization_of(request)
    profile = profiles.get(claimed.scope.service, _GENERAL)
    _check_time(request, claimed, now, profile.clock_skew if clock_skew is None else clock_skew)
    if not client:
        _check_scope(request, claimed, service, regions)
        client = _find_client(request, claimed, clients)
        _check_signed_headers(request, claimed, profile, must_be_signed)
    declared = _declared_payload(request, claimed, profile, private)
    proven = Proven(claimed, profile, client, declared, other_host, may_search)
    if declared is not None:  # otherwise `verify_body` checks the signature
        proven = proven._replace(proof=_check_signature(request, proven, declared, io.BytesIO()))
    return proven


def verify_body(request: Request, proven: Proven, spool: Spool) -> Verified:
    """Check what the head does not prove.  A body of S3's family is checked while it is read."""
    claimed, profile, client, declared, _, _, proof = proven
    scope, presigned, signed = claimed.scope, claimed.presigned, claimed.signed_headers
    if declared and (profile.declared_payload or declared == "UNSIGNED-PAYLOAD"):
        body = streamed_body(request, declared, ChunkSigner(client.secret_access_key, claimed))
        return Verified(client, scope, body, declared, presigned, signed, proof)
    body, computed = spool(request.body)
    if declared is None:
        proof = _check_signature(request, proven, computed, body)
    else:
        _check_hash(request, declared, computed)
    return Verified(client, scope, body, computed, presigned, signed, proof)


def _check_time(request: Request, claimed: Authorization, now: float, skew: int) -> None:
    try:
        signed_at = epoch(claimed.amz_date)
    except ValueError as error:
        raise refusal("date", request, claimed.amz_date[:80]) from error
    end = signed_at + (skew if claimed.expires is None else claimed.expires)
    if signed_at - skew <= now <= end:
        return
    server, early = iso_basic(now), now < signed_at - skew
    if claimed.expires is not None and not early:
        given = {"X-Amz-Expires": str(claimed.expires), "Expires": iso_basic(end)}
        raise refusal("expired", request, iso_basic(end), server, **given, ServerTime=server)
    reason = ("future" if claimed.expires is None else "not yet valid") if early else "past"
    limit = now + skew if early else now - skew
    window = f"{skew // 60} min" if skew % 60 == 0 else f"{skew} s"
    given = {"RequestTime": claimed.amz_date, "ServerTime": server}
    given["MaxAllowedSkewMilliseconds"] = str(skew * 1000)
    late = refusal(reason, request, claimed.amz_date, iso_basic(limit), server, window, **given)
    hours, rest = divmod(signed_at - now + 900, 3600)
    if hours and rest < 1800:
        late.message += f" Your clock is {hours:+g} hours off: sign in UTC, not local time."
    raise late


def _check_scope(request: Request, claimed: Authorization, service: Optional[str],
        regions: Sequence[str]) -> None:  # fmt: skip
    scope, day = claimed.scope, claimed.amz_date[:8]
    right = (scope.terminator == "aws4_request",
        scope.date == day,
        _SCOPE_NAME.fullmatch(scope.region) and (not regions or scope.region in regions),
        _SCOPE_NAME.fullmatch(scope.service) and service in (None, scope.service))  # fmt: skip
    if all(right):
        return
    date, region, name, end = (part[:40] for part in scope)
    meant = (region not in REGIONS and did_you_mean(region, regions or REGIONS)) or "."
    texts = (  # of most services, and of Amazon S3
        (f"Credential should be scoped with a valid terminator: 'aws4_request', not '{end}'.",
         f'incorrect terminal "{end}". This endpoint uses "aws4_request".'),
        ("Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from"
         f" HTTP: '{date}' != '{day}', from '{claimed.amz_date}'.",
         f'Invalid credential date "{date}". This date is not the same as X-Amz-Date: "{day}".'),
        (f"Credential should be scoped to a valid region, not '{region}'{meant}",
         f"the region '{region}' is wrong; expecting '{(*regions, 'us-east-1')[0]}'"),
        (f"Credential should be scoped to correct service: '{service or ''}'.",
         f'incorrect service "{name}". This endpoint belongs to "{service}".'))  # fmt: skip
    faults = [text for text, is_right in zip(texts, right) if not is_right]
    reason = "query scope" if claimed.presigned else "scope"
    told = " ".join(general for general, _ in faults)
    raise refusal(reason, request, told, faults[0][1], **dict(zip(("Region",), regions)))


def _find_client(request: Request, claimed: Authorization, clients: Clients) -> Client:
    if not (candidates := clients.get(claimed.access_key_id)):
        told = _DEMO in clients.get(_DEMO.access_key_id, ())  # other keys are not
        hint = " (awsproxy knows the key dummykey, with the secret dummysecret)" if told else ""
        raise refusal("key", request, hint, AWSAccessKeyId=claimed.access_key_id[:128])
    token = (claimed.session_token or "").encode("latin-1")
    for client in candidates:
        if hmac.compare_digest(client.session_token.encode("utf-8"), token):
            return client
    hint = "this key has no session token: unset AWS_SESSION_TOKEN"
    if any(client.session_token for client in candidates):
        hint = "the session token is not this key's"
    raise refusal("token", request, hint)


def _check_signed_headers(request: Request, claimed: Authorization, profile: Profile,
        must_be_signed: Sequence[str]) -> None:  # fmt: skip
    signed = claimed.signed_headers
    if "host" not in signed:
        raise refusal("host", request)
    fields = request.fields
    if absent := [name for name in signed if name not in fields]:
        raise refusal("absent headers", request, ", ".join(absent))
    is_dated = claimed.presigned or "x-amz-date" in fields  # otherwise Date gave the time
    must = must_be_signed if is_dated else (*must_be_signed, "date")
    safe = {*signed, "x-amz-content-sha256"}  # the hash is compared with the body anyway
    if profile.unsigned_token or (profile.unsigned_token_header and not claimed.presigned):
        safe.add("x-amz-security-token")
    if unsigned := [n for n in fields if n not in safe and (n.startswith("x-amz-") or n in must)]:
        names = ", ".join(unsigned)
        raise refusal("unsigned headers", request, names, HeadersNotSigned=names)
    for raw_name, raw_value in request.query if claimed.presigned else ():
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name.startswith("x-amz-") and fields.get(name, [value]) != [value]:
            raise refusal("query parameter", request, f"'{name[:40]}' differs from the header.")


def _declared_payload(request: Request, claimed: Authorization, profile: Profile,
        private: bool) -> Optional[str]:  # fmt: skip
    """Return the payload line that the head declares, or None where the body must be hashed."""
    value = _single(request, "x-amz-content-sha256")
    if value == "UNSIGNED-PAYLOAD" and profile.unsigned_body and private:
        if re.fullmatch(profile.unsigned_body, f"{request.method} {request.path}"):
            return value
    # The client of S3 on Outposts' own API sends no hash.
    of_outposts = claimed.scope.service == "s3-outposts" and request.path[:12] == "/S3Outposts/"
    if value is None and (of_outposts or not profile.declared_payload):
        return None
    if value is None and claimed.presigned:
        hoisted = [v for name, v in request.query if name.lower() == b"x-amz-content-sha256"]
        value = hoisted[0].decode("latin-1") if hoisted else "UNSIGNED-PAYLOAD"
    if value is None:
        raise refusal("no payload", request)
    if _SHA256_HEX.fullmatch(value) or (value == "UNSIGNED-PAYLOAD" and profile.declared_payload):
        return value
    streams = value in (STREAMING, f"{STREAMING}-TRAILER", STREAMING_UNSIGNED)
    if not (profile.declared_payload and streams):
        version_4a = profile.declared_payload and re.match("STREAMING.*-ECDSA-", value)
        raise refusal("streaming" if version_4a else "payload", request, value[:60])
    if request.method != "PUT":  # only PutObject and UploadPart take one
        raise refusal("stream", request)
    return value


def prove(claimed: Authorization, secret: str, parts: Sequence[str]) -> Proof:
    """Return the steps from the lines of a canonical request to a signature."""
    text = string_to_sign(claimed.amz_date, claimed.scope, "\n".join(parts).encode("latin-1"))
    return Proof(parts, text, signature(secret, claimed.scope, text))


def _check_signature(request: Request, proven: Proven, payload_hash: str, body: Body) -> Proof:
    """Compare in constant time.  The refusal shows our canonical request, without the token."""
    claimed, profile, client, _, other_host, *_ = proven
    secret = client.secret_access_key
    parts = canonical_parts(request, claimed, payload_hash, profile)
    proof = prove(claimed, secret, parts)
    if hmac.compare_digest(proof.signature, claimed.signature):  # both are ASCII
        return proof
    if other_host:
        headers = re.sub("(?m)^host:.*$", lambda _: f"host:{other_host}", parts[3])
        other = prove(claimed, secret, (*parts[:3], headers, *parts[4:]))
        if hmac.compare_digest(other.signature, claimed.signature):
            # From here on the request has the Host that the client signed.
            fields = {**request.fields, "host": [other_host]}
            request.__dict__.update(fields=fields, template=None)  # it is not the head's Host
            return other
    shown = _TOKEN_SHOWN.sub(r"\1<redacted>", "\n".join(parts))[:16384]
    signed = proof.string_to_sign.decode("latin-1")
    data, cause, theirs = body.getvalue() if isinstance(body, io.BytesIO) else b"", "", None
    if proven.may_search():
        cause, theirs = find_cause(request, claimed, secret, parts, data)
    error = refusal(
        "signature", request, AWSAccessKeyId=claimed.access_key_id, StringToSign=signed,
        SignatureProvided=claimed.signature, StringToSignBytes=proof.string_to_sign.hex(" "),
        CanonicalRequest=shown, CanonicalRequestBytes=shown.encode("latin-1").hex(" ")
    )  # fmt: skip
    error.message += f"\n\nThe Canonical String for this request should have been\n'{shown}'\n\n"
    error.message += f"The String-to-Sign should have been\n'{signed}'\n"
    error.message += cause and f"\n{cause}\n"
    error.proof, error.cause, error.theirs = proof, cause, theirs
    raise error


def _check_hash(request: Request, declared: str, computed: str) -> None:
    if computed != declared:
        detail = {"ClientComputedContentSHA256": declared, "S3ComputedContentSHA256": computed}
        raise refusal("body", request, computed, **detail)


# [3.6] Refusals
# Reason, [code, code of Amazon S3's family]: message | message of that family if it differs, AWS's
# own where known, since people search for it.  The default code is SignatureDoesNotMatch.
_REFUSALS = """
    unsigned [MissingAuthenticationToken AccessDenied]: Request is missing Authentication Token{}
    form post [MissingAuthenticationToken AccessDenied]: awsproxy verifies no browser form POST. \
        Upload with a presigned PUT (boto3: generate_presigned_url) instead.
    several [InvalidArgument]: Only one auth mechanism allowed: a header or query parameters.
    version 2 [IncompleteSignature InvalidRequest]: The authorization mechanism you have provided \
        is not supported: it is Signature Version 2. Please use AWS4-HMAC-SHA256 (boto3: \
        Config(signature_version="s3v4")).
    scheme [MissingAuthenticationToken InvalidArgument]: Request is missing Authentication Token: \
        the Authorization header is of type '{}'. Please use AWS4-HMAC-SHA256.
    algorithm [IncompleteSignature InvalidArgument]: Unsupported AWS 'algorithm': '{}'. Please \
        use AWS4-HMAC-SHA256.
    query algorithm [IncompleteSignature AuthorizationQueryParametersError]: Unsupported AWS \
        'algorithm': '{}'. Please use AWS4-HMAC-SHA256.
    header parameter [IncompleteSignature AuthorizationHeaderMalformed]: {} \
        Authorization=AWS4-HMAC-SHA256
    query parameter [IncompleteSignature AuthorizationQueryParametersError]: {} Re-examine the \
        query-string parameters.
    credential [IncompleteSignature AuthorizationHeaderMalformed]: Credential must have exactly 5 \
        slash-delimited elements, e.g. keyid/date/region/service/term, got '{}'.
    no date [IncompleteSignature AccessDenied]: {} Authorization=AWS4-HMAC-SHA256 \
        | AWS authentication requires a valid Date or x-amz-date header
    date [IncompleteSignature AccessDenied]: Date must be in ISO-8601 'basic format'. Got '{}'. \
        See http://en.wikipedia.org/wiki/ISO_8601 \
        | AWS authentication requires a valid Date or x-amz-date header
    past [RequestTimeTooSkewed]: Signature expired: {} is now earlier than {} ({} - {}.) \
        | The difference between the request time and the server's time is too large.
    future [RequestTimeTooSkewed]: Signature not yet current: {} is still later than {} \
        ({} + {}.) | The difference between the request time and the server's time is too large.
    expired [AccessDenied]: Signature expired: {} is now earlier than {}. | Request has expired
    not yet valid [AccessDenied]: Signature not yet current: {} is still later than {} \
        ({} + {}.) | Request is not valid yet
    scope [AuthorizationHeaderMalformed]: {0} | The authorization header is malformed; {1}
    query scope [AuthorizationQueryParametersError]: {0} \
        | Error parsing the X-Amz-Credential parameter; {1}
    key [InvalidClientTokenId InvalidAccessKeyId]: The security token included in the request is \
        invalid.{} | The AWS Access Key Id you provided does not exist in our records.{}
    token [InvalidClientTokenId InvalidToken]: \
        The security token included in the request is invalid ({})
    host [AccessDenied]: 'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization.
    unsigned headers [AccessDenied]: There were headers present in the request which were not \
        signed: {}
    absent headers [AccessDenied]: There were signed headers which the request does not have: {}
    no payload [InvalidRequest]: Missing required header for this request: x-amz-content-sha256
    payload [InvalidArgument]: x-amz-content-sha256 must be the sha256 value of the body in \
        lower-case hex, not '{}'; UNSIGNED-PAYLOAD is for Amazon S3 and for a few operations, \
        with TLS. | x-amz-content-sha256 must be UNSIGNED-PAYLOAD, \
        STREAMING-UNSIGNED-PAYLOAD-TRAILER, STREAMING-AWS4-HMAC-SHA256-PAYLOAD, \
        STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER or a valid sha256 value.
    streaming [NotImplemented]: Signature Version 4A ({}) is not implemented; use AWS4-HMAC-SHA256.
    stream [InvalidRequest]: The value of x-amz-content-sha256 header is invalid.
    body [XAmzContentSHA256Mismatch]: The provided 'x-amz-content-sha256' header does not match \
        what was computed. (The body that arrived has the SHA-256 {}.)
    signature [SignatureDoesNotMatch]: The request signature we calculated does not match the \
        signature you provided. Check your AWS Secret Access Key and signing method. Consult the \
        service documentation for details. | The request signature we calculated does not match \
        the signature you provided. Check your key and signing method.
    uri [InvalidURI InvalidURI]: Couldn't parse the specified URI.
    query [MalformedQueryString InvalidURI]: The query string contains a '%' that begins no \
        escape. | Couldn't parse the specified URI.
"""
_REFUSAL = re.compile(r"(?m)^ (.+?) \[(?:(\w+) )?(\w+)\]: (.+?)(?: \| (.+))?$")
REFUSALS: dict[str, Sequence[str]] = {
    reason: (code or "SignatureDoesNotMatch", s3_code, message, in_s3 or message)
    for reason, code, s3_code, message, in_s3 in _REFUSAL.findall(re.sub(" +", " ", _REFUSALS))
}
REFUSALS["version 2 of s3"] = ("InvalidRequest", "InvalidRequest", *REFUSALS["version 2"][2:])
Claim = tuple[str, CredentialScope]  # an access key id, and what it signs for
# Bounded, since anybody may send anything here.
_CLAIM = re.compile("([^/,\\s]{1,128})/([^/,\\s]{0,16})/([^/,\\s]{0,64})/([^/,\\s]{0,64})/")


def refusal(reason: str, request: Request, *values: object, **detail: str) -> ServiceError:
    """Return the error of a row of REFUSALS, in the words of the service that is called."""
    claimed = request.__dict__.get("claimed")  # None while it is being parsed
    scope: CredentialScope = claimed.scope if claimed else _salvaged_claim(request)[1]
    code, message = REFUSALS[reason][scope.service in S3_FAMILY :: 2]  # the two families alternate
    error = ServiceError(code, message.format(*values), **detail)
    error.reason = reason
    return error


def claim(request: Request) -> Claim:
    """Return the unverified key id and scope of a request, even a malformed one; "" for none."""
    found: Optional[Claim] = request.__dict__.get("salvaged")
    if found is None:
        with contextlib.suppress(ServiceError):
            return authorization_of(request)[:2]
        found = request.__dict__["salvaged"] = _salvaged_claim(request)
    return found


def _salvaged_claim(request: Request) -> Claim:
    header = request.header("authorization")
    pattern = "Credential=([^,]{0,300})" if header else "[?&](?i:x-amz-credential)=([^&]{0,600})"
    for text in re.findall(pattern, header or request.target):
        if match := _CLAIM.match(text if header else urllib.parse.unquote(text, "latin-1")):
            return match[1], CredentialScope(match[2], match[3], match[4])
    return "", CredentialScope("", "", "")


# [3.7] Presigned URLs
_PRESIGNED = "Algorithm Credential Date Expires SignedHeaders Signature Security-Token".split()
_QUERY_PARAMETERS = {f"x-amz-{name.lower()}".encode(): f"X-Amz-{name}" for name in _PRESIGNED}


def _parse_query(request: Request) -> Authorization:
    reason = "query parameter"
    given: dict[str, str] = {}
    for raw_name, raw_value in request.query:
        if name := _QUERY_PARAMETERS.get(raw_name.lower()):
            # Case variants and repeats have let two checks see two values (CVE-2022-2385).
            if name in given or raw_name != name.encode():
                raise refusal(reason, request, f"'{name}' must be given once, spelled so.")
            given[name] = raw_value.decode("latin-1")
    if given.get("X-Amz-Algorithm", ALGORITHM) not in (ALGORITHM, ""):
        raise refusal("query algorithm", request, given["X-Amz-Algorithm"][:40])
    of_s3 = not S3_FAMILY.isdisjoint(given.get("X-Amz-Credential", "").split("/")[3:4])
    optional = {"X-Amz-Security-Token"} if of_s3 else {"X-Amz-Security-Token", "X-Amz-Expires"}
    for name in _QUERY_PARAMETERS.values():
        if not given.get(name) and name not in optional:
            raise refusal(reason, request, f"AWS query-string parameters must include '{name}'.")
    claims = _parse_claims(request, "query", *(given[f"X-Amz-{name}"] for name in _PARAMETERS))
    expires = given.get("X-Amz-Expires")
    if expires is not None and not re.fullmatch("[0-9]{1,6}", expires):
        raise refusal(reason, request, "X-Amz-Expires should be a number.")
    seconds = int(expires) if expires else None
    if seconds is not None and not 1 <= seconds <= 604800:
        raise refusal(reason, request, "X-Amz-Expires must be from 1 to 604800 seconds (a week).")
    made, amz_date = given["X-Amz-Signature"], given["X-Amz-Date"]
    return Authorization(*claims, made, amz_date, seconds, True, given.get("X-Amz-Security-Token"))


# [3.8] Mistakes of signers
# If a signature does not match, this section computes what broken signers compute, until one
# mistake, or two of them, give the signature that came.  So a cause is never guessed.

# What a signer computes, in this order.  In `string_to_sign`, @ stands for the hash of the
# canonical request, @@ for the same in upper case, and # for the canonical request itself.
# `canonical_request` is what stands between the lines of the canonical request.
_FIELDS = """method path query headers signed_headers payload string_to_sign secret scope
    canonical_request""".split()
# Fields; pairs of a pattern in their right value, and what signers write instead (- is nothing, \b
# removes the line, <...> is a text of _mistakes); and what the mistake is, where {} is the field.
# The first row that explains a signature wins.
MISTAKES = r"""
    secret | ^AWS4 | - | left out the prefix AWS4 of the secret
    secret | \Z | \n | \Z | <blank> | ^AWS4 | AWS4<blank> | left white space around the secret
    secret | ^AWS4(.*) | AWS4"\1" | ^AWS4(.*) | AWS4'\1' | signed with quotes around the secret
    secret | ^AWS4.* | AWS4 | ^AWS4.* | AWS4<key> | signed with an empty secret or with the key id
    secret | ^ | AWS4 | ^AWS4 | aws4 | wrote AWS4 twice or in lower case before the secret
    secret | ^AWS4.* | AWS4<quoted> | / | \\/ | [+] | <blank> | escaped or decoded the secret
    scope | ^[0-9]+ | <date> | derived the key from the time: take the first 8 digits, the date
    scope | /aws4_request | - | aws4_ | aws4 | derived the key without the last step, aws4_request
    scope | (.+?)/(.+?)/ | \2/\1/ | /(.+)/(.+)/ | /\2/\1/ | ^([^/]+)/([^/]+)/([^/]+)/ | \
        \3/\2/\1/ | derived the key in the wrong order: it is date, region, service, aws4_request
    scope | ^ | hex: | ^ | base64: | ^ | last hex: | took a derived key in hex or base64, not bytes
    scope | ^ | swapped: | ^ | all swapped: | swapped key and message of HMAC
    string_to_sign | \A.*\n | - | <date>\n | - | <scope>\n | - | left out a line of the {}
    string_to_sign headers | <date> | <extended>Z | <date> | <extended>.000Z | T[0-9]+Z$ | - | \
        signed another form of the time in the {} than it sent in X-Amz-Date
    string_to_sign | /aws4_request | - | <scope> | <key>/<scope> | <region>/<service> | \
        <service>/<region> | did not write the scope as date/region/service/aws4_request in the {}
    string_to_sign | @ | # | @ | @@ | did not hash the canonical request, or wrote upper case
    string_to_sign | (<date>)\n(.*) | \2\n\1 | swapped time and scope in the {}
    string_to_sign | \Z | \n | ended the {} with a newline
    headers string_to_sign canonical_request | \n | \r\n | \n | \\n | \n | - | wrote CR LF, a \
        backslash and n, or nothing for each newline of the {}
    method query headers signed_headers payload | (?s).+ | - | left out the {}
    path | /\Z | - | \Z | / | ^/ | - | left out a slash at an end of the path, or added one
    path | (?s).+ | / | signed / instead of the path
    path query | %(?:25)?20 | + | wrote a blank in the {} as +, not %20
    path query | ~ | %7E | encoded the ~ of the {}
    path | / | %2F | (?<=.)/ | %2F | percent-encoded the slashes of the path
    path | ^ | http://<host> | ^ | https://<host> | signed the whole URL instead of the path
    query | =(?![^&]) | - | left out the = of parameters without a value
    query | %20 | %2B | signed a '+' in the query as %2B: it is a blank, write %20 or %2B
    query | %2B | %20 | signed %2B in the query as a blank (curl 8.14 to 8.18 do)
    query | %2F | / | %3A | : | did not encode the slashes or the colons of the query
    query | ^ | ? | began the query with ?
    query | &(?=X-Amz-SignedHeaders=) | &X-Amz-Signature=& | signed an empty X-Amz-Signature, too
    headers | ^(host:.*):\d+$ | \1 | signed the Host without its port, as curl before 7.86 does
    headers | ^host:.* | host:<forwarded> | signed the Host of X-Forwarded-Host, which a reverse \
        proxy changed: set 'proxy_set_header Host $http_host;' in nginx, or --public-url
    headers | ^host:.* | host:<service>.<region>.<aws> | ^host:.* | host:<service>.<aws> | \
        host:127.0.0.1 | host:localhost | host:localhost | host:127.0.0.1 | signed the Host of \
        AWS, or swapped localhost and 127.0.0.1: sign the host that you call
    headers | ^host:.* | \g<0>:80 | ^host:.* | \g<0>:443 | ^host: | host:http:// | ^host: | \
        host:https:// | signed the Host with a default port or with http://: leave them out
    headers | \n\Z | - | \Z | \n | wrote no blank line after the canonical headers, or two
    headers | ^([^:\n]+): | \1:<blank> | wrote a blank after the colons of the headers
    headers | ^(content-length:).* | \g<1><count> | signed Content-Length in characters, not bytes
    headers | ^(x-amz-content-sha256:).*$ | \1<empty> | sent another X-Amz-Content-Sha256
    headers | ^(content-type:[^;\n]*);.*$ | \1 | signed the Content-Type without its charset
    headers | ^(content-type:.*)$ | \1; charset=utf-8 | signed the Content-Type with a charset
    signed_headers | ; | , | ; | ;<blank> | \Z | ; | did not join the {} with ; alone
    payload | ^UNSIGNED-PAYLOAD | <empty> | signed the hash of an empty body, not UNSIGNED-PAYLOAD
    payload | (?s).+ | <empty> | signed the hash of an empty body (curl -T, -F: use --data-binary)
    payload | (?s).+ | UNSIGNED-PAYLOAD | signed UNSIGNED-PAYLOAD instead of the body's hash
    scope | ^([^/]+)/[^/]+ | \1/us-east-1 | derived the key for the region us-east-1, not its own
    string_to_sign | @ | (stdin)=<blank>@ | @ | SHA2-256(stdin)=<blank>@ | @ | @<blank><blank>- | \
        left words of openssl or sha256sum next to the hash of the canonical request
    method | POST | GET | signed the method GET
    path | ^/[^/]+(?=/) | - | ^ | /<bucket> | left out the path's first segment, or added a bucket
    query | \A\Z | \b | left out the line of the empty query: keep it, empty
    query | &X-Amz-Security-Token=[^&]* | - | added X-Amz-Security-Token after signing: sign it
    payload | (?s).+ | \b | \Z | \n | did not end the canonical request with the body's hash
    secret | ^AWS4(.*) | AWS4b'\1' | signed with b'' around the secret: decode it before AWS4
    string_to_sign | (?s).+ | @ | (?s).+ | # | signed the canonical request or its hash, not the {}
"""
MAX_CANDIDATES = 4800  # pairs for one signature: some 19 ms
MAX_SEARCHED = 6144  # characters of a canonical request, and bytes of a body
_NAME_OF_TEXT = re.compile("<([a-z]+)>")
Draft = tuple[str, ...]  # what a signer computes, in the order of _FIELDS
Mistake = tuple[int, str, str, str]  # place in _FIELDS, pattern, new text, description
Mistakes = Iterator[Mistake]
_ROWS: list[Mistake] = [
    (_FIELDS.index(name), pattern, written.lstrip("-"), words.format(name.replace("_", " ")))
    for row in MISTAKES.replace("\\\n        ", "").strip().splitlines()
    for names, *changes, words in [row.strip().split(" | ")]
    for name in names.split()
    for pattern, written in zip(changes[::2], changes[1::2])]  # fmt: skip


def _others(request: Request, claimed: Authorization, parts: Sequence[str],
        body: bytes) -> Iterator[Sequence[str]]:  # fmt: skip
    """Yield a field, a mistake, and what signers who make it write as the whole field."""
    unquote = functools.partial(urllib.parse.unquote, encoding="latin-1")
    path, _, query = request.target.partition("?")
    raw = [part for part in query.split("&") if not part.startswith("X-Amz-Signature=")]
    written = [canonical_query([it]) for it in request.query if it[0] != b"X-Amz-Signature"]
    for name, right in (("path", parts[1]), ("query", parts[2])):
        plain = re.sub("%(25)?(2[1789A])", lambda match: unquote(f"%{match[2]}"), right)
        lower = re.sub("%..", lambda match: match[0].lower(), right)
        yield name, "did not percent-encode !'()* in the {}, or in lower case", plain, lower
        words = "encoded the {} too often (a path of S3 once, other paths twice, a query once)"
        yield name, words, quote(right, "/=&")
    yield "path", "did not resolve the dots and empty segments of the {}", quote(path)
    yield "path", "signed the {} as sent: encode it once more, as curl since 8.14", path
    yield "path", "encoded the {} once, not twice", quote(unquote(path))
    yield "path", "did not percent-encode the {}", unquote(path)
    yield "path", "signed the query as a part of the {}", request.target
    with contextlib.suppress(ServiceError):  # the path leads above its root
        resolved = quote(unquote(unquote(canonical_path(path, True))))
        yield "path", "resolved dots and empty segments of the {}, which S3 keeps", resolved
    hint = "write each as name=value with both percent-encoded, or take curl 8.19 or newer"
    yield "query", f"signed the {{}} as sent: sort its parameters, {hint}", "&".join(raw)
    yield "query", "did not percent-encode the {}", "&".join(sorted(raw)), unquote(parts[2])
    by_case = sorted(written, key=str.lower)
    yield "query", "did not sort the {} by its bytes", "&".join(written), "&".join(by_case)
    last = canonical_query([*dict(request.query).items()], [b"X-Amz-Signature"])
    yield "query", "signed only the last parameter of each name", last
    yield "method", "signed the {} in lower case", request.method.lower()
    sent = [(n, v) for n, v in request.headers if n.lower() in claimed.signed_headers]
    by_name = sorted(sent, key=lambda header: header[0].lower())
    blanks = [f"{name.lower()}:{value}\n" for name, value in by_name]
    yield "headers", "kept several blanks in a header: write one", "".join(blanks)
    yield "headers", "wrote the values of the {} in lower case", parts[3].lower()
    every = sorted((n.lower(), " ".join(v.split())) for n, v in request.headers)
    unlisted = [(n, v) for n, v in every if n not in ("authorization", "user-agent")]
    unsorted = [(name.lower(), value) for name, value in sent]
    order = "did not write the {} in lower case and sorted"
    more = "wrote headers that SignedHeaders does not name into the {}"
    for fault, lines in ((order, unsorted), (order, by_name), (order, sent), (more, unlisted)):
        yield "headers", fault, "".join(f"{name}:{value}\n" for name, value in lines)
        yield "signed_headers", fault, ";".join(name for name, _ in lines)
    # If the body streams or is long, only its hash is known.
    hashed = parts[5] if _SHA256_HEX.fullmatch(parts[5]) else hashlib.sha256(body).hexdigest()
    in_base64 = base64.b64encode(bytes.fromhex(hashed)).decode()
    yield "payload", "wrote the body's hash in upper case or base64", hashed.upper(), in_base64
    yield "payload", "wrote the body itself instead of its hash", body.decode("latin-1")
    for fault, bodies in _other_bodies(body, hashed):
        yield "payload", fault, *[hashlib.sha256(it).hexdigest() for it in bodies]


def _other_bodies(body: bytes, hashed: str) -> Iterator[tuple[str, Sequence[bytes]]]:
    """Yield a mistake, and what signers who make it hash in place of the body."""
    yield "hashed the hex of the body's hash", [hashed.encode()]
    lf = body.replace(b"\r\n", b"\n")
    newlines = (body.rstrip(b"\r\n"), body + b"\n", lf, lf.replace(b"\n", b"\r\n"))
    yield "hashed the body with other newlines than it sent", newlines
    yield "hashed the body as a string in JSON", [json.dumps(body.decode("latin-1")).encode()]
    swapped = (body.replace(b"%20", b"+"), body.replace(b"+", b"%20"))
    yield "hashed the body with + for %20, or %20 for +", swapped
    yield "hashed {{}} instead of the body", [b"{}"]
    with contextlib.suppress(ValueError, RecursionError):  # it is no JSON
        dumps, tight = functools.partial(json.dumps, json.loads(body)), (",", ":")
        plain, compact = functools.partial(dumps, ensure_ascii=False), dumps(separators=tight)
        packed = plain(separators=tight)
        php = compact.replace("/", r"\/")
        go = re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", packed)
        ordered = (dumps(sort_keys=True), dumps(sort_keys=True, separators=tight))
        forms = (compact, dumps(), dumps(indent=2), packed, plain(), plain(indent=2), php, go)
        words = "hashed other JSON than it sent: with other blanks, order or escapes"
        yield words, [form.encode() for form in (*ordered, *forms)]


def _mistakes(request: Request, claimed: Authorization, secret: str, parts: Sequence[str],
        body: bytes) -> Mistakes:  # fmt: skip
    date, scope, host = claimed.amz_date, claimed.scope, request.header("host") or ""
    texts = {"blank": " ", "key": claimed.access_key_id, "quoted": urllib.parse.quote_plus(secret),
        "date": date, "extended": re.sub("(....)(..)(..T..)(..)(..)Z", r"\1-\2-\3:\4:\5", date),
        "scope": str(scope), "region": scope.region, "service": scope.service, "host": host,
        "bucket": host.partition(".")[0], "aws": "amazonaws.com", "empty": EMPTY_SHA256,
        "count": str(len(body.decode("utf-8", "replace"))),
        "forwarded": (request.header("x-forwarded-host") or "").partition(",")[0].strip(),
    }  # fmt: skip
    for at, pattern, written, words in _ROWS:
        pattern = _NAME_OF_TEXT.sub(lambda it: re.escape(texts[it[1]]), pattern)
        written = _NAME_OF_TEXT.sub(lambda it: texts[it[1]].replace("\\", r"\\"), written)
        yield at, pattern, written, words
    for name, words, *others in _others(request, claimed, parts, body):
        at, words = _FIELDS.index(name), words.format(name.replace("_", " "))
        for other in others:
            yield at, "(?s).+", other.replace("\\", r"\\"), words


def _families(claimed: Authorization, parts: Sequence[str]) -> Mistakes:
    """Yield mistakes of which there are many; they are not paired with others."""
    for method in sorted(METHODS):
        yield 0, ".+", method, f"signed the method {method}"
    for name in claimed.signed_headers:
        yield 3, f"^{re.escape(name)}:.*\n", "", f"left {name} out of the canonical headers"
    services = "sqs s3 sns sts iam ec2 lambda dynamodb execute-api apigateway kinesis es"
    for kind, others in (("region", (*REGIONS, "aws-global")), ("service", services.split())):
        right = getattr(claimed.scope, kind)
        for other in others:
            words = f"derived the key for the {kind} {other}, and its scope says {right}"
            yield 8, ".+", str(claimed.scope._replace(**{kind: other})), words
    parameters = parts[2].split("&")
    for added in parameters[:32]:
        rest = "&".join(it for it in parameters if it != added).replace("\\", r"\\")
        yield 2, ".+", rest, f"added {added.partition('=')[0]} to the query after signing"


def _drafts(base: Draft, singles: Mistakes, families: Mistakes) -> Iterator[tuple[Draft, str]]:
    """Yield what broken signers compute: with one mistake, then with two; and the mistakes."""
    found: dict[Draft, Mistake] = {}
    for mistake in singles:
        draft = _with(base, mistake)
        if draft != base and found.setdefault(draft, mistake) is mistake:
            yield draft, mistake[3]
    yield from ((_with(base, mistake), mistake[3]) for mistake in families)
    every = itertools.combinations(found.items(), 2)
    pairs = (it for it in every if it[0][1][:2] != it[1][1][:2])  # they replace the same text
    for (one, first), (other, second) in itertools.islice(pairs, MAX_CANDIDATES):
        at, words = second[0], f"{first[3]}, and it {second[3]}"
        if first[0] == at:  # their order counts
            yield _with(one, second), words
            yield _with(other, first), words
        else:
            yield (*one[:at], other[at], *one[at + 1 :]), words


def _with(draft: Draft, mistake: Mistake) -> Draft:
    at, pattern, written, _ = mistake
    return (*draft[:at], re.sub(pattern, written, draft[at], flags=re.M), *draft[at + 1 :])


def find_cause(request: Request, claimed: Authorization, secret: str, parts: Sequence[str],
        body: bytes) -> tuple[str, Optional[Proof]]:  # fmt: skip
    """Return what the signer did wrong, and its steps; "" for a request that is too long."""
    if sum(map(len, parts)) > MAX_SEARCHED:
        return "", None
    sent, body = len(body), body if len(body) <= MAX_SEARCHED else b""
    text = f"{ALGORITHM}\n{claimed.amz_date}\n{claimed.scope}\n@"
    base = (*parts, text, f"AWS4{secret}", str(claimed.scope), "\n")
    singles = _mistakes(request, claimed, secret, parts, body)
    key_of, hash_of = functools.cache(_broken_key), functools.cache(_broken_hash)
    for draft, words in _drafts(base, singles, _families(claimed, parts)):
        *lines, text, first_key, steps, joint = draft
        digest = hash_of(joint, *lines)
        text = text.replace("@@", digest.upper()).replace("#", "\n".join(lines))
        signed = text.replace("@", digest).encode("latin-1", "replace")
        given = key_of(first_key, steps), signed
        by, of = given[::-1] if steps.startswith("all swapped:") else given
        if hmac.digest(by, of, "sha256").hex() == claimed.signature:
            return f"Your signer {words}.", Proof(draft[:6], signed, claimed.signature)
    arrived = f" ({sent} bytes of it arrived)" if sent else ""
    return (
        "No usual mistake of a signer gives this signature: the secret is probably another one."
        " Check for another profile, another key's secret, and blanks in the secret. Otherwise"
        f" compare the canonical request, and the hash of the body{arrived}, with your own."
    ), None


def _broken_hash(joint: str, *lines: str) -> str:
    canonical = "\n".join(lines).replace("\n\b", "").replace("\n", joint)
    return hashlib.sha256(canonical.encode("latin-1", "replace")).hexdigest()


def _broken_key(secret: str, scope: str) -> bytes:
    """Return a signing key; the words before the scope say how it is derived."""
    how, _, rest = scope.rpartition(":")
    key = secret.encode()
    for part in rest.encode().split(b"/"):
        by, of = (part, key) if "swapped" in how else (key, part)
        mac = hmac.digest(by, of, "sha256")
        key = {"hex": mac.hex().encode(), "base64": base64.b64encode(mac)}.get(how, mac)
    return key.hex().encode() if how == "last hex" else key


# [3.9] Bodies that are checked as they stream
# Each reader returns its last byte only after it has checked the whole body.  So a sender that
# passes the body on can stop before the body is complete.
STREAMING = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
STREAMING_UNSIGNED = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


@dataclass(eq=False)
class CheckedBody:
    """A body that comes in blocks, each of which is checked before it comes."""

    blocks: Iterator[bytes]
    _held = memoryview(b"")  # the part of the latest block that is not returned yet

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, all if negative, b"" at the end; ServiceError if wrong."""
        if size < 0:
            return b"".join(iter(lambda: self.read(65536), b""))
        held = self._held or memoryview(next(self.blocks, b""))  # its slices copy nothing
        self._held = held[size:]
        return bytes(held[:size])


def hashed_blocks(request: Request, declared: str) -> Iterator[bytes]:
    """Yield a body that must have the declared SHA-256."""
    digest, held = hashlib.sha256(), b""
    for block in iter(lambda: request.body.read(65536), b""):
        digest.update(block)
        if held:
            yield held
        held = block
    _check_hash(request, declared, digest.hexdigest())
    yield held


class ChunkSigner:
    """Signs each chunk ("Transferring Payload in Multiple Chunks", Amazon S3 API Reference)."""

    def __init__(self, secret: str, claimed: Authorization) -> None:
        self._secret, self._scope = secret, claimed.scope
        self._about = f"{claimed.amz_date}\n{claimed.scope}"
        self._previous = claimed.signature

    def chunk(self, data: bytes) -> str:
        """Return the signature of the next chunk."""
        return self._next("PAYLOAD", f"{EMPTY_SHA256}\n{hashlib.sha256(data).hexdigest()}")

    def trailers(self, trailers: Mapping[str, str]) -> str:
        """Return the signature of the trailers, in order of their names."""
        lines = [f"{name}:{value}\n" for name, value in sorted(trailers.items())]
        return self._next("TRAILER", hashlib.sha256("".join(lines).encode()).hexdigest())

    def _next(self, kind: str, rest: str) -> str:
        text = f"{ALGORITHM}-{kind}\n{self._about}\n{self._previous}\n{rest}"
        self._previous = signature(self._secret, self._scope, text.encode("latin-1"))
        return self._previous


Signer = Optional[ChunkSigner]  # None if chunks are not signed, or not checked
MAX_CHUNK = 16777216  # bytes of a signed chunk, all held until its signature is checked
MAX_TRAILERS = 16
_CRC32 = "x-amz-checksum-crc32"
# The checksums of hashlib.  CRC-32 comes from zlib; crc32c and crc64nvme are not in Python.
CHECKSUMS = {"x-amz-checksum-sha1": hashlib.sha1, "x-amz-checksum-sha256": hashlib.sha256}
_IN_BASE64 = {"crc32": 8, "crc32c": 8, "crc64nvme": 12, "sha1": 28, "sha256": 44}  # characters
CHECKSUM_LENGTHS = {f"x-amz-checksum-{name}": length for name, length in _IN_BASE64.items()}
_CHUNK_HEADER = re.compile(rb"([0-9A-Fa-f]{1,10})(?:;chunk-signature=([0-9a-f]{64}))?\r\n")
# minio-go ends a trailer with LF CR LF, and some clients leave the very last line out.
_TRAILERS = re.compile(rf"(?s)((?:{_TOKEN}:[\t -~]*(?:\r\n|\n(?:\r\n)?))*)(?:\r\n(.*))?".encode())
_incomplete = functools.partial(ServiceError, "IncompleteBody")


@dataclass(eq=False)
class AwsChunkedBody(CheckedBody):
    """The decoded content of an aws-chunked body."""

    length: int
    signed: bool
    announced: Sequence[str]  # the names in x-amz-trailer, in lower case
    trailers: dict[str, str]  # complete once the body is read


# A method of the body would make a cycle, and so keep the chunks of an abandoned body in memory.
def _chunks(stream: Stream, unread: int, signer: Signer, announced: Sequence[str], checked: bool,
        trailers: dict[str, str]) -> Iterator[bytes]:  # fmt: skip
    """Yield content; check the last, empty chunk and the trailers with the chunk before."""
    checks = {name: CHECKSUMS[name]() for name in announced if name in CHECKSUMS}
    left, last, data, crc = 0, b"", None, 0
    while data != b"":
        if not left:
            match = _CHUNK_HEADER.fullmatch(stream.readline(4096))
            if not match or (checked and bool(signer) != bool(match[2])):
                raise _incomplete("A chunk must begin with its size and, if signed, signature.")
            left, given = int(match[1], 16), match[2]
            if unread and not left:
                raise _incomplete("The chunks hold less than x-amz-decoded-content-length.")
            if signer and left > MAX_CHUNK:
                raise _incomplete(f"A signed chunk is longer than {MAX_CHUNK} bytes.")
        wanted = left if signer else min(left, 65536)
        data = stream.read(wanted)
        if len(data) < wanted:
            raise _incomplete("The body ended within a chunk.")
        if signer:
            _compare(signer.chunk(data), given, "a chunk of the body")
        left, unread = left - wanted, unread - wanted
        if unread < 0:
            raise _incomplete("The chunks hold more than x-amz-decoded-content-length.")
        for check in checks.values():
            check.update(data)
        crc = zlib.crc32(data, crc) if _CRC32 in announced else 0
        if data and not left and stream.read(2) != b"\r\n":
            raise _incomplete("A chunk is longer than its size, or its end is missing.")
        if unread:
            yield data
        elif data:
            last = data
    signed_with = _read_trailers(stream, trailers, bool(signer) or not checked)
    if sorted(trailers) != sorted(announced):
        raise ServiceError("MalformedTrailerError", "The trailers are not those of x-amz-trailer.")
    if signer and announced:
        _compare(signer.trailers(trailers), signed_with, "the trailers")
    sums = {_CRC32: crc.to_bytes(4, "big"), **{n: check.digest() for n, check in checks.items()}}
    for name, value in trailers.items():
        length, computed = CHECKSUM_LENGTHS.get(name), sums.get(name)
        if length and not (len(value) == length and BASE64.fullmatch(value)):
            raise ServiceError("InvalidRequest", f"Value for {name} header is invalid.")
        if computed and base64.b64encode(computed).decode("ascii") != value:
            checksum = name.rpartition("-")[2].upper()
            message = f"The {checksum} you specified did not match the calculated checksum."
            raise ServiceError("BadDigest", message)
    yield last


def _read_trailers(stream: Stream, trailers: dict[str, str], may_be_signed: bool) -> bytes:
    """Read the rest of a body into `trailers`, and return their signature, b"" if it has none."""
    match = _TRAILERS.fullmatch(stream.read(65536))
    text = match[1].decode("ascii") if match else ""
    found = [(name.lower(), value.strip()) for name, value in re.findall("(.+?):(.*)", text)]
    trailers.update(found)
    if not match or len(trailers) < len(found) or not all(trailers.values()):
        raise ServiceError("MalformedTrailerError", "The trailers of the body are malformed.")
    if match[2] or stream.read(1):
        raise ServiceError("BadRequest", "Something follows the last chunk.")
    is_signed = may_be_signed and found and found[-1][0] == "x-amz-trailer-signature"
    return trailers.popitem()[1].encode() if is_signed else b""


def _compare(computed: str, given: bytes, place: str) -> None:
    if not hmac.compare_digest(computed.encode(), given):
        raise ServiceError("SignatureDoesNotMatch", f"{REFUSALS['signature'][3]} (in {place})")


def aws_chunks(body: AwsChunkedBody, signer: Signer, size: int = 65536) -> Iterator[bytes]:
    """Yield a body in aws-chunked form; `signer` signs the chunks and trailers."""
    blocks = iter(functools.partial(Stream(body.read).read, size), b"")
    for data in itertools.chain(blocks, (b"",)):
        signed = f";chunk-signature={signer.chunk(data)}" if signer else ""
        trailers = {} if data else body.trailers  # they follow the last, empty chunk
        lines = [f"{name}:{value}\r\n" for name, value in trailers.items()]
        if signer and trailers:
            lines.append(f"x-amz-trailer-signature:{signer.trailers(trailers)}\r\n")
        header = f"{len(data):x}{signed}\r\n".encode()
        yield b"".join((header, data, "".join(lines).encode(), b"\r\n"))


def aws_chunked_length(body: AwsChunkedBody, size: int = 65536) -> Optional[int]:
    """Return the length of what `aws_chunks` yields; None if a trailer is unknown."""
    if not CHECKSUM_LENGTHS.keys() >= set(body.announced):
        return None
    signed = len(";chunk-signature=") + 64 if body.signed else 0
    whole, rest = divmod(body.length, size)
    chunks = ((size, whole), (rest, bool(rest)), (0, 1))
    total = sum((len(f"{n:x}\r\n\r\n") + signed + n) * count for n, count in chunks)
    total += sum(len(f"{name}:\r\n") + CHECKSUM_LENGTHS[name] for name in body.announced)
    closing = len("x-amz-trailer-signature:\r\n") + 64 if body.signed and body.announced else 0
    return total + closing


def streamed_body(request: Request, declared: str, signer: Signer) -> Body:
    """Return the reader for a body of Amazon S3's family; without a signer, it only decodes."""
    if not declared.startswith("STREAMING-"):
        unchecked = declared == "UNSIGNED-PAYLOAD" or not signer
        body = request.body if unchecked else CheckedBody(hashed_blocks(request, declared))
        # An empty body has no last byte to keep until its hash is known.
        length = (request.header("content-length") or "").strip("0")
        return body if length or "transfer-encoding" in request.fields else io.BytesIO(body.read())
    length = request.header("x-amz-decoded-content-length") or ""
    if not _DIGITS.fullmatch(length):
        message = "You must provide the x-amz-decoded-content-length HTTP header."
        raise ServiceError("MissingContentLength", message)
    named = (request.header("x-amz-trailer") or "").lower()
    announced = tuple(filter(None, map(str.strip, named.split(","))))
    if bool(announced) != declared.endswith("-TRAILER") or len(announced) > MAX_TRAILERS:
        raise ServiceError("MalformedTrailerError", "x-amz-trailer must name the body's trailers.")
    of_chunks = None if declared == STREAMING_UNSIGNED else signer
    stream, size, trailers = Stream(request.body.read), int(length), dict[str, str]()
    blocks = _chunks(stream, size, of_chunks, announced, bool(signer), trailers)
    return AwsChunkedBody(blocks, size, bool(of_chunks), announced, trailers)


# [3.10] Signing
class Credentials(NamedTuple):
    """Keys to sign with; `expires` is in seconds since 1970."""

    access_key_id: str
    secret_access_key: str
    session_token: str = ""
    expires: float = math.inf

    def __repr__(self) -> str:
        return f"Credentials({self.access_key_id!r})"


_SIGNED = {"host", "date", "content-type", "content-md5"}  # and x-amz-*: no proxy changes them


def sign(outgoing: Request, payload_hash: str, keys: Credentials, scope: CredentialScope,
        amz_date: str, declares: bool = False) -> tuple[Request, Authorization]:  # fmt: skip
    """Return the signed request and its authorization; `declares` adds x-amz-content-sha256."""
    added = [("X-Amz-Date", amz_date)]
    if keys.session_token:
        added.append(("X-Amz-Security-Token", keys.session_token))
    profile = PROFILES.get(scope.service, _GENERAL)
    if declares or profile.declared_payload or profile.sends_hash:
        added.append(("X-Amz-Content-Sha256", payload_hash))
    request = outgoing.with_headers((*outgoing.headers, *added))
    key, fields = keys.access_key_id, request.fields
    names = tuple(sorted([n for n in fields if n in _SIGNED or n[:6] == "x-amz-"]))
    claimed = Authorization(key, scope, names, "", amz_date)
    parts = canonical_parts(request, claimed, payload_hash, profile)
    made = prove(claimed, keys.secret_access_key, parts).signature
    header = f"{ALGORITHM} Credential={key}/{scope}, SignedHeaders={parts[4]}, Signature={made}"
    signed = request.with_headers((*request.headers, ("Authorization", header)))
    return signed, Authorization(key, scope, names, made, amz_date)


# [3.11] Removing a signature
HOP_BY_HOP = frozenset("""connection keep-alive proxy-authenticate proxy-authorization te upgrade
    proxy-connection trailer transfer-encoding""".split())  # RFC 9110, 7.6.1  # fmt: skip
# Headers of other proxies; they and X-Forwarded-* stay only if the caller signed them.
_OF_THE_WAY = frozenset({"forwarded", "via"})
# Hop-by-hop headers, the caller's signature, and headers that forwarding sets again.
_SET_AGAIN = HOP_BY_HOP.union("""authorization content-length date expect host x-amz-date
    x-amz-content-sha256 x-amz-s3session-token x-amz-security-token""".split())  # fmt: skip
# Amazon S3 ignores checksums of an empty body (aws-sdk-js-v3#4448).
_UNUSED = re.compile(r"x-amz-(checksum-|(content-sha256|sdk-checksum-algorithm)\Z)")
_KEPT_BACK = HOP_BY_HOP | _OF_THE_WAY | {"content-length", "expect", "host"}  # if unsigned


def end_to_end(headers: Headers, dropped: frozenset[str] = HOP_BY_HOP,
        signed: Sequence[str] = ()) -> list[tuple[str, str]]:  # fmt: skip
    """Return the headers without those dropped and the unsigned ones that Connection names."""
    if listed := ",".join([value for name, value in headers if name.lower() == "connection"]):
        # Signed headers decide what the request means; Connection must not remove them.
        named = {token.strip().lower() for token in listed.split(",")} - {*_SIGNED, *signed}
        dropped = dropped.union(n for n in named if not n.startswith(("x-amz-", "content-")))
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def strip_presigned(target: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a target without its signature, and the x-amz-* headers that SDKs put into it."""
    path, mark, query = target.partition("?")
    kept, hoisted = [], []
    for part in query.split("&"):
        name, _, value = part.partition("=")
        lower = urllib.parse.unquote(name, "latin-1").lower()
        if not lower.startswith("x-amz-"):
            kept.append(part)
        elif lower.encode("latin-1") not in _QUERY_PARAMETERS and not _UNUSED.match(lower):
            header = urllib.parse.unquote_plus(value, "latin-1")
            if not _FIELD_LINE.fullmatch(f"{lower}:{header}"):
                raise ServiceError("BadRequest", f"{name[:80]} cannot be a header.")
            hoisted.append((lower, header))
    return (f"{path}?{'&'.join(kept)}" if mark and kept else path), hoisted


def without_chunks(headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the headers of a body that leaves its aws-chunked form."""
    kept = []
    for name, value in headers:
        if name.lower() == "content-encoding":
            codings = map(str.strip, value.split(","))
            value = ",".join(coding for coding in codings if coding.lower() != "aws-chunked")
            kept += [(name, value)] if value else []
        elif name.lower() != "x-amz-decoded-content-length":
            kept.append((name, value))
    return kept


# [3.12] Heads that repeat
# An SDK changes a few values of each head.  A template keeps what the rest of a verified head has
# decided: protocol and client (`Proxy._check_head`), and the head that goes upstream
# (`Upstream._again`).  No check that is skipped may depend on what varies: so the day is fixed.
# By header: the pattern of the part that varies, and of the whole value with %s for that part.
_VARYING = {"x-amz-date": ("[0-9]{6}", "[0-9]{8}T(%s)Z"),
    "authorization": ("[0-9a-f]{64}", f"{ALGORITHM} [ -~]*Signature=(%s)"),
    "x-amz-content-sha256": ("[0-9a-f]{64}", "(%s)"), "content-length": ("[0-9]{1,9}", "(%s)"),
    "amz-sdk-invocation-id": ("[0-9A-Za-z-]{36}", "(%s)")}  # fmt: skip


class HeadTemplate:
    """The pattern of a verified head, and results that all heads share that match it.

    known: the service, the WireProtocol and the Proven of a Proxy, and the token for its clients
    sent: the Sent of an Upstream"""

    known: Any = None
    sent: Any = None
    is_learned = False  # whether `read` can be called

    def learn(self, head: Head) -> bool:
        """Make `read` accept heads like this one; False if its signature is not at the end."""
        self._first, self._varying = head[:5], []
        pattern = re.escape(f"{head.method} {head.target} HTTP/{head.version}")
        for index, (name, value) in enumerate(head.headers):
            part, whole = _VARYING.get(name.lower(), ("", ""))
            form = re.escape(value)
            if match := part and re.fullmatch(whole % part, value):
                start, end = match.span(1)
                form = f"({re.escape(value[:start])}{part}{re.escape(value[end:])})"
                self._varying.append((index, name, name.lower()))
            pattern += f"\r\n{re.escape(name)}: {form}"
        self._match = re.compile(f"{pattern}\r\n\r\n").fullmatch
        self.is_learned = {"authorization", "x-amz-date"} <= {it[2] for it in self._varying}
        return self.is_learned

    def read(self, text: str) -> Optional[Head]:
        """Return the parts of a head that matches, or None."""
        if not (match := self._match(text)):
            return None
        method, target, version, same, known = self._first
        headers, fields = [*same], {field: [*values] for field, values in known.items()}
        for (index, name, lower), value in zip(self._varying, match.groups()):
            headers[index], fields[lower] = (name, value), [value]
        return Head(method, target, version, tuple(headers), fields, self)


class HeadTemplates:
    """The templates of a server; the oldest ones go if there are too many."""

    MOST, SAME, PAUSE = 50, 8, 64  # credentials, templates of each, heads between two learned
    HEADERS, LONGEST = 32, 4096  # headers and characters of a head: a template takes up to 60 KB

    def __init__(self) -> None:
        self._pause, self._templates = 0, dict[str, list[HeadTemplate]]()  # by credential

    def parse(self, raw: bytes, before: Head) -> Head:
        """Parse a head as parse_head does; `before` is the last head of the connection."""
        self._pause, text, last = self._pause - 1, raw.decode("latin-1"), before.template
        if last and last.known and not last.is_learned and self._pause < 0:
            self._learn(last, before, text)
        for template in self._templates.get(text.partition("Credential=")[2][:60], ()):
            if head := template.read(text):
                return head
        return Head(*parse_head(raw)[:5], HeadTemplate())

    def _learn(self, template: HeadTemplate, head: Head, following: str) -> None:
        request_line = f"{head.method} {head.target} HTTP/{head.version}"
        if not following.startswith(request_line):
            return  # each call to Amazon S3, say, has another target
        self._pause = self.PAUSE
        text = CRLF.join([request_line, *(f"{n}: {v}" for n, v in head.headers), CRLF])
        key, signed = text.partition("Credential=")[2][:60], head.fields.get("authorization", [""])
        is_short = len(text) <= self.LONGEST and len(head.headers) <= self.HEADERS
        is_usual = len(head.fields) == len(head.headers) and "x-amz-date" in head.fields
        if is_short and is_usual and key in signed[0]:
            same = self._templates.setdefault(key, [])
            if len(self._templates) > self.MOST:
                del self._templates[next(iter(self._templates))]  # the oldest
            if not any(it.read(text) for it in same):
                if template.learn(head):
                    self._templates[key] = [*same[1 - self.SAME :], template]


# ==== 4. Wire protocols: wire_protocol, AwsJson, AwsQuery, Rest, RpcV2 ====
# The invariant of this chapter: routes, hooks, the log and the metrics see the operation that
# the upstream runs, or the call is refused.  So the service in the credential scope, which the
# signature covers, chooses the protocol.  If a service speaks two, a signed header chooses.  The
# protocol reads the operation from one place, and refuses a request that names an operation
# anywhere else: another reader might look there.
# `wire_protocol` cannot fail, so that every refusal has the form that the caller expects.
# Sources: the SDKs' service models; Smithy 2.0, "AWS protocols"; recordings of Amazon SQS.


# [4.1] Operations and the shapes of their input
class Shape(NamedTuple):
    """Describes a value: a text, a number, a structure, or a list or map of one shape.

    In the query protocol a list is numbered from 1, and a map is a numbered list of pairs."""

    kind: type  # of the value in JSON
    wanted: str  # what an error calls it
    element: Optional[Shape] = None  # of a list, or of a map with string keys
    members: Mapping[str, Shape] = {}  # of a structure, by name
    required: Sequence[str] = ()  # names of members


def structure(declared: str, shapes: Mapping[str, Shape]) -> Shape:
    """Return the structure of a text such as `Id* Delay:int`; `*` marks a required member."""
    spelled = [member.partition(":")[::2] for member in declared.split()]
    members = {name.rstrip("*"): shapes[shape or "text"] for name, shape in spelled}
    required = [name[:-1] for name, _ in spelled if name.endswith("*")]
    return Shape(dict, "a structure", None, members, required)


class Operation(NamedTuple):
    """An operation of a service."""

    input: Shape
    output: Optional[Sequence[str]]  # its members; None for a void operation
    names: Names
    method: Callable[[Any, Call], Output]  # of the service object


Members = Mapping[str, Any]  # of a structure, by name
Output = Optional[Members]  # of an operation; None for a void one
Hosts = Iterable[str]  # names of the proxy besides localhost
# The names of a flattened list or map in the query protocol.
QueryName = collections.namedtuple("QueryName", "element key value", defaults=("", ""))
Names = Mapping[str, QueryName]  # of members that the query protocol spells in its own way
STRING, INTEGER, BLOB = Shape(str, "a String"), Shape(int, "an Integer"), Shape(str, "a Blob")
list_of, map_of = functools.partial(Shape, list, "a list"), functools.partial(Shape, dict, "a map")
UNKNOWN_OPERATION = Operation(structure("", {}), (), {}, lambda service, call: None)
MODELS: dict[str, Operation] = {}  # by action; a service's chapter adds its own


def read_again(body: Body) -> bytes:
    """Return all of a body that can be read again, and rewind it."""
    if isinstance(body, io.BytesIO):
        return body.getvalue()
    if not isinstance(body, io.IOBase):
        raise ServiceError("SerializationException", "The body can be read only once.")
    body.seek(0)
    data: bytes = body.read()
    body.seek(0)
    return data


# [4.2] Which protocol a service speaks
# The version of each query API, which its XML namespace ends in.
QUERY_VERSIONS = pairs("""autoscaling=2011-01-01 cloudformation=2010-05-15 cloudsearch=2013-01-01
    elasticache=2015-02-02 elasticbeanstalk=2010-12-01 elasticloadbalancing=2015-12-01
    iam=2010-05-08 importexport=2010-06-01 monitoring=2010-08-01 rds=2014-10-31 redshift=2012-12-01
    sdb=2009-04-15 ses=2010-12-01 sns=2010-03-31 sqs=2012-11-05 sts=2011-06-15""")
# The signing names that speak each protocol; a name that is not here speaks REST-JSON alone.  A
# service of AWS JSON may speak RPC v2 too: a request in it has no X-Amz-Target, so a service that
# does not know RPC v2 finds no operation.  EC2's own form of AWS Query is under "query".
_PROTOCOLS = f"""json IoTSecuredTunneling acm acm-pca aco-automation airflow-serverless aoss
    application-autoscaling applicationinsights apprunner appstream arc-region-switch athena
    autoscaling-plans aws-marketplace b2bi backup-gateway bcm-dashboards bcm-data-exports
    bcm-pricing-calculator bcm-recommended-actions bedrock billing budgets cassandra ce cloud9
    cloudcontrolapi cloudhsm cloudtrail cloudwatch codebuild codecommit codeconnections codedeploy
    codepipeline codestar-connections cognito-identity cognito-idp comprehend comprehendmedical
    compute-optimizer config cost-optimization-hub cur datapipeline datasync dax devicefarm
    directconnect discovery dms ds dynamodb ec2-instance-connect ecr ecr-public ecs
    elasticmapreduce events evs firehose fms forecast frauddetector freetier fsx gamelift
    globalaccelerator glue health healthlake identitystore inspector interconnect invoicing
    iotfleetwise iotthingsgraph kendra kendra-ranking kinesis kinesisanalytics kms license-manager
    lightsail logs lookoutequipment machinelearning marketplacecommerceanalytics mediastore
    memorydb mgh monitoring mturk-requester network-firewall odb organizations osm partnercentral
    partnercentral-account partnercentral-benefits partnercentral-channel partnercentral-marketing
    partnercentral-selling payment-cryptography payments pcs personalize pi pricing proton
    redshift-data redshift-serverless rekognition route53-recovery-cluster route53domains
    route53resolver sagemaker secretsmanager servicecatalog servicediscovery servicequotas ses
    shield sms-voice snowball sqs ssm ssm-contacts sso states storagegateway support swf tagging
    textract timestream timestream-influxdb transcribe transfer translate verifiedpermissions
    voiceid waf waf-regional wafv2 workmail workspaces workspaces-instances;
    query ec2 {" ".join(QUERY_VERSIONS)};
    rest-json aoss aws-marketplace bedrock cloudsearch iam mediastore payment-cryptography
    personalize s3-outposts sagemaker sdb servicecatalog ses sms-voice;
    rest-xml cloudfront route53 s3 s3-object-lambda s3-outposts s3express"""
_SPOKEN = [row.split() for row in _PROTOCOLS.split(";")]
SPEAKS: Mapping[str, frozenset[str]] = {
    it: frozenset(row[0] for row in _SPOKEN if it in row) for row in _SPOKEN for it in row[1:]
}
REST_JSON = frozenset({"rest-json"})
# The service of an X-Amz-Target.  Old clients put the second prefix next to a form.
TARGET_SERVICES = pairs("""AmazonSQS=sqs AmazonSQSv20121105=sqs
    AWSCognitoIdentityService=cognito-identity AWSCognitoIdentityProviderService=cognito-idp""")
_OLD_TARGET = "AmazonSQSv20121105."
_TARGET_PREFIX = re.compile(r"(?:com\.amazonaws\.(?:[a-z0-9]+\.)+)?[A-Za-z0-9_]+")
_FORM = "application/x-www-form-urlencoded"
_QUEUE_PATH = re.compile(r"(?:/[^/]+)*?/[0-9]{12}/[A-Za-z0-9_-]{1,80}(?:\.fifo)?/?")
_RPC_PATH = re.compile("/service/[A-Za-z0-9_.]{1,128}/operation/([^/]{0,256})/?")
_SERVICE_NAME = re.compile("[a-z0-9][a-z0-9_-]{0,63}")
_CHARSET = re.compile('(?i:charset)[^=;]{0,20}=[ \t]*"?([^";, \t]{0,40})')
_JSON_PATH = re.compile("/20[0-9]{2}-[01][0-9]-[0-3][0-9]/|/v2/email/")  # of REST-JSON services
MAX_ELEMENTS = 500000  # of a document: the decoder blocks all other threads
MAX_FORM_FIELDS = 10000  # a full SendMessageBatch has some 400
MAX_FORM_DEPTH = 12
MAX_UNZIPPED = 2097152  # bytes
MAX_IGNORED = 20  # parameters that the log names
_PARAMETER = re.compile("[A-Za-z0-9.]{1,80}")  # other names may be pieces of a body
_NO_INPUT = re.compile(r"""(?x)(?i:x-amz-)|(AWSAccessKeyId|Action|Expires|QueueUrl|
    SecurityToken|Signature(Method|Version)?|Timestamp|Version)(\.|\Z)""")  # of a query call
_NUMBER = re.compile("-?[0-9]{1,18}")
_INDEX = re.compile("[0-9]{1,9}")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_KINDS = pairs("""bool=BOOLEAN_VALUE NoneType=NULL_VALUE list=START_ARRAY dict=START_OBJECT
    str=STRING_VALUE""")


def _media_type(request: Request) -> str:
    return request.fields.get("content-type", ("",))[0].partition(";")[0].strip(" \t").lower()


def _query_values(request: Request, wanted: bytes) -> list[str]:
    with contextlib.suppress(ServiceError):  # `verify_head` refuses it
        return [value.decode("utf-8", "replace") for n, value in request.query if n == wanted]
    return []


def wire_protocol(request: Request, service: str = "") -> WireProtocol:
    """Return the protocol that a service, the claimed one if "", reads in.  Never raises."""
    service, fields = service or claim(request)[1].service, request.fields
    media_type = _media_type(request)
    if not service:  # take a service of the protocol that the request seems to speak
        is_form = request.method == "POST" and media_type in ("", _FORM)
        is_json = "x-amz-target" in fields or media_type.startswith("application/x-amz-json-")
        if is_form or is_json or "smithy-protocol" in fields or _query_values(request, b"Action"):
            service = "sqs"
        elif request.path.startswith(("/2013-04-01/", "/2020-05-31/")):  # Route 53 and CloudFront
            service = "route53"
        elif media_type != "application/json" and not _JSON_PATH.match(request.path):
            service = "s3"
    speaks = SPEAKS.get(service, REST_JSON)
    version = "1.1" if media_type == "application/x-amz-json-1.1" else "1.0"
    if "json" in speaks:
        if "smithy-protocol" in fields:
            return RpcV2(fields["smithy-protocol"][0])
        if "x-amz-target" in fields:
            is_old = fields["x-amz-target"][0].startswith(_OLD_TARGET)
            return AWS_QUERY_TARGET if is_old and media_type == _FORM else AWS_JSON[version]
        if service != "sqs" and _RPC_PATH.fullmatch(request.path):
            return RpcV2("")
        if len(speaks) == 1:
            return AWS_JSON[version]
    if service == "sqs" and "json" in media_type:
        return AwsJson(version, ("content-type",))
    if "query" in speaks and (request.path == "/" or "rest-json" not in speaks):
        return AWS_QUERY
    if "rest-xml" in speaks:
        return REST_S3 if service in S3_FAMILY else REST_XML
    return REST


def check_one_reading(request: Request, wire: WireProtocol, service: str) -> None:
    """Raise ServiceError if another reader could find another operation in the request."""
    fields = request.fields
    if service not in SPEAKS and (service.isdigit() or not _SERVICE_NAME.fullmatch(service)):
        example = "they are lower case, as in curl's --aws-sigv4 aws:amz:us-east-1:sqs"
        raise ambiguous(wire, f"'{service[:40]}' is no signing name: {example}")
    if len(fields.get("content-type", ())) > 1 or len(fields.get("content-encoding", ())) > 1:
        raise ambiguous(wire, "it has two Content-Type or Content-Encoding headers")
    if "x-amz-target" in fields and not wire.reads_target:
        raise ambiguous(wire, f"{service} does not read X-Amz-Target")
    if "smithy-protocol" in fields and not isinstance(wire, RpcV2):
        raise ambiguous(wire, f"{service} does not read Smithy-Protocol")
    for name, _ in request.query if "?" in request.target else ():
        if name.lower() == b"x-amz-target":
            raise ambiguous(wire, "X-Amz-Target is a header, not a query parameter")
        if name == b"Action" and not wire.reads_action:
            raise ambiguous(wire, f"{service} does not read the query parameter Action here")


def ambiguous(wire: WireProtocol, fault: str) -> ServiceError:
    """Return the refusal of a request that could be read in two ways."""
    code = "InvalidRequest" if wire is REST_S3 else "InvalidAction"
    return ServiceError(code, f"It is not certain which operation the request names: {fault}.")


def check_queue_path(wire: WireProtocol, request: Request, queue_url: str) -> None:
    """Refuse a path that could be the URL of a queue other than QueueUrl."""
    segments = request.path.split("/")[1:]
    if "%" in request.path or not all(segments[:-1]) or {".", ".."} & set(segments):
        raise ambiguous(wire, "its path is not the path of a queue")
    of_path, of_url = request.path.rstrip("/").split("/"), queue_url.rstrip("/").split("/")[-2:]
    if queue_url and len(of_path) > 2 and of_path[-len(of_url) :] != of_url:
        raise ambiguous(wire, "its path names one queue, and QueueUrl another")


class Meaning(NamedTuple):
    """The operation that a request asks for."""

    operation: str
    encoded: Any = None  # the form from which the input is decoded
    path: str = ""  # of a REST call, as patterns spell it
    other_paths: Sequence[str] = ()  # other forms of it that a service might read
    bucket: str = ""  # of Amazon S3, or the account of S3 Control, if the Host names it


class WireProtocol:
    """Reads the operation and the input of a request, and writes the answer."""

    must_be_signed: Sequence[str] = ()  # headers that this reading of the request depends on
    content_type = ""  # of an answer
    reads_target = False  # whether X-Amz-Target may name the operation
    reads_action = False  # whether the query parameter Action may
    is_opaque = False  # whether bodies are passed on unread

    def service(self, request: Request) -> Optional[str]:
        """Return the service that the head names outside the credential scope, or None."""
        target = request.header("x-amz-target") if self.reads_target else None
        return TARGET_SERVICES.get(target.rpartition(".")[0]) if target else None

    def named(self, request: Request) -> str:
        """Return the operation that the head names, "" if the body does; for the log."""
        target = (request.header("x-amz-target") or "") if self.reads_target else ""
        return target.rpartition(".")[2] or "".join(_query_values(request, b"Action")[:1])

    def meaning(self, request: Request, service: str, body: Body, hosts: Hosts = ()) -> Meaning:
        """Return the operation; ServiceError if the request names none, or could name two."""
        raise NotImplementedError

    def input(self, call: Call) -> dict[str, Any]:
        """Return the call's input, checked against the model of the service if there is one."""
        return {}

    def reencode(self, call: Call) -> bytes:
        """Return a body with the changed input of the call."""
        raise NotImplementedError

    def output(self, call: Call, output: Output, request_id: str) -> Reply:
        """Return the answer of an operation that succeeded."""
        raise NotImplementedError

    def fault(self, request: Request, error: ServiceError) -> Fault:
        """Return how the error is spelled for this request."""
        # Amazon SQS, which anybody may be allowed to call, denies access to the unsigned.
        service = self.service(request) or claim(request)[1].service
        if error.code == "MissingAuthenticationToken" and service in ("sqs", ""):
            return ERRORS["AccessDenied"]
        if service == "ec2" and error.code in ("InvalidClientTokenId", "SignatureDoesNotMatch"):
            return ERRORS["AuthFailure"]
        return error.fault

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        """Return the answer that reports an error."""
        raise NotImplementedError

    def _reply(self, status: int, request_id: str, body: bytes, *more: tuple[str, str]) -> Reply:
        headers = (("x-amzn-RequestId", request_id), ("Content-Type", self.content_type), *more)
        return Reply(status, headers, body)


def _invalid_action(operation: str, known: Iterable[str] = ()) -> ServiceError:
    hint = did_you_mean(operation[:80], known).replace("; d", " D")
    message = f"The action {operation[:80]} is not valid for this endpoint.{hint}"
    return ServiceError("InvalidAction", message)


@functools.lru_cache(maxsize=1024)  # it keeps valid names alone, which are short
def _operation_name(name: str) -> str:
    if not re.fullmatch("[A-Za-z][A-Za-z0-9]{0,127}", name):
        raise _invalid_action(name)
    return name


def _content(request: Request, body: Body) -> bytes:
    """Return a body of JSON or form fields, unzipped; ServiceError if its coding is in doubt."""
    data = read_again(body)
    kind = request.fields.get("content-type", ("",))[0]
    if ",".join(_CHARSET.findall(kind)).lower() not in ("", "utf-8", "utf8", "us-ascii"):
        raise ServiceError("SerializationException", "The body must be in UTF-8.")
    coding = request.fields.get("content-encoding", ("identity",))[0].lower()
    if coding in ("identity", "aws-chunked"):
        return data
    if coding != "gzip":
        raise ServiceError("SerializationException", "The Content-Encoding is unknown.")
    unzip = zlib.decompressobj(31)
    try:
        plain = unzip.decompress(data, MAX_UNZIPPED)
    except zlib.error as error:
        raise ServiceError("SerializationException", "The body is not gzip.") from error
    if not unzip.eof or unzip.unused_data or data[3] != 0:  # a flag means a name or comment
        raise ServiceError("SerializationException", "The body is not all gzip.")
    return plain


def _side(status: int) -> str:
    return "Sender" if status < 500 else "Receiver"


# [4.3] AWS JSON
class AwsJson(WireProtocol):
    """X-Amz-Target names the operation, the body is a JSON object (Smithy: awsJson1_0, 1_1).

    In a call to Amazon SQS, `Action` in the query string may, if the Content-Type is signed."""

    reads_target = reads_action = True

    def __init__(self, version: str, must_be_signed: Sequence[str] = ()) -> None:
        self.content_type = f"application/x-amz-json-{version}"
        self.must_be_signed = must_be_signed

    def meaning(self, request: Request, service: str, body: Body, hosts: Hosts = ()) -> Meaning:
        if request.method != "POST":
            raise ambiguous(self, "a call in AWS JSON is a POST")
        if request.path != "/" and (service != "sqs" or _RPC_PATH.fullmatch(request.path)):
            raise ambiguous(self, "its path could name one, too; that of AWS JSON is /")
        actions = []
        if "?" in request.target:  # Action is the only parameter, of calls to Amazon SQS alone
            actions = _query_values(request, b"Action")
            others = {name for name, _ in request.query} - {b"Action", b"Version"}
            others = {name.lower() for name in others} - _QUERY_PARAMETERS.keys()
            if len(actions) > 1 or (others if service == "sqs" else actions):
                raise ambiguous(self, "the body is JSON, and the query string has parameters")
        name = "".join(actions)
        if targets := request.fields.get("x-amz-target"):
            prefix, _, name = targets[0].rpartition(".")
            of_sqs = TARGET_SERVICES.get(prefix) == "sqs"
            of_service = of_sqs if service == "sqs" else _TARGET_PREFIX.fullmatch(prefix)
            if len(targets) > 1 or not of_service or (actions and actions != [name]):
                error = _invalid_action(", ".join(targets))
                if not prefix:
                    example = "AmazonSQS" if service == "sqs" else "DynamoDB_20120810"
                    error.message += f" X-Amz-Target needs a prefix, as in {example}.{name[:80]}."
                raise error
        name = _operation_name(name)
        document = self._document(request, body)
        if service == "sqs" and request.path != "/":  # which some servers take for QueueUrl
            named = document.get("QueueUrl") if isinstance(document, dict) else ""
            check_queue_path(self, request, named if isinstance(named, str) else "")
            operation = MODELS.get(f"sqs:{name}")
            if operation and "QueueUrl" in operation.input.members and not named:
                raise ambiguous(self, "its path is that of a queue, and it has no QueueUrl")
        return Meaning(name, document)

    def _document(self, request: Request, body: Body) -> Any:
        """Return the document in the body, None for CBOR; an empty body is an empty object."""
        text = _content(request, body)
        if "cbor" in _media_type(request):  # Amazon Kinesis and its older SDKs
            return None
        if len(text) > MAX_ELEMENTS and sum(map(text.count, (b",", b"[", b"{"))) > MAX_ELEMENTS:
            raise ServiceError("SerializationException", "The body has too many elements.")
        try:
            return read_json(text.decode("utf-8") or "{}")
        except ValueError as error:
            raise ServiceError("SerializationException", f"Body is not JSON: {error}.") from error

    def input(self, call: Call) -> dict[str, Any]:
        if call.encoded is None:
            raise ServiceError("SerializationException", "The body is not JSON, but CBOR.")
        document: dict[str, Any] = _expect(dict, call.encoded, "a structure")
        operation = MODELS.get(call.action)
        if operation is None:
            return copy.deepcopy(document)
        if unknown := document.keys() - operation.input.members.keys():
            call.ignored = _shown_names(unknown)
        return dict(_from_json(operation.input, document))

    def reencode(self, call: Call) -> bytes:
        known = self.input(call)
        return _to_json({k: v for k, v in call.encoded.items() if k not in known} | call.input)

    def output(self, call: Call, output: Output, request_id: str) -> Reply:
        return self._reply(200, request_id, b"" if output is None else _to_json(output))

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        status, code, shape = self.fault(request, error)
        document = _to_json({"__type": shape, "message": error.message})
        # These services spoke AWS Query first.
        if (self.service(request) or claim(request)[1].service) in ("sqs", "monitoring", ""):
            in_query = ("x-amzn-query-error", f"{code};{_side(status)}")
            return self._reply(status, request_id, document, in_query)
        return self._reply(400 if status in (401, 403) else status, request_id, document)


def _short_int(digits: str) -> int:
    if len(digits) > 20:  # the time of a conversion grows with the square of the digits
        raise ValueError("a number is too long")
    return int(digits)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):  # readers choose different ones (RFC 8259, 4)
        raise ValueError("an object has one key twice")
    return members


def _base64_text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


# NaN and Infinity are not JSON (RFC 8259, 6): int() raises ValueError.
_JSON = json.JSONDecoder(parse_constant=int, parse_int=_short_int, object_pairs_hook=_each_once)
_COMPACT = json.JSONEncoder(check_circular=False, separators=(",", ":"), default=_base64_text)


def read_json(text: str) -> Any:
    """Return the value of a JSON document; ValueError if malformed, or if a key is repeated."""
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def _to_json(document: Mapping[str, Any]) -> bytes:
    return _COMPACT.encode(document).encode()


def _from_json(shape: Shape, value: Any) -> Any:
    """Return a JSON value of that shape, without unknown members and nulls."""
    value = _expect(shape.kind, value, shape.wanted)
    if shape.kind is str or shape.kind is int:
        return _from_base64(value) if shape is BLOB else value
    if element := shape.element:
        if shape.kind is list:
            return [_from_json(element, item) for item in value]
        return {key: _from_json(element, item) for key, item in value.items()}
    own = shape.members
    present = {k: _from_json(own[k], v) for k, v in value.items() if v is not None and k in own}
    for name in shape.required:
        if name not in present:
            message = f"The request must contain the parameter {name}."
            raise ServiceError("MissingParameter", message)
    return present


def _expect(kind: type, value: Any, wanted: str) -> Any:
    if type(value) is not kind:  # True is an int to isinstance
        got = _KINDS.get(type(value).__name__, "NUMBER_VALUE")
        raise ServiceError("SerializationException", f"{got} can not be converted to {wanted}")
    return value


def _from_base64(text: str) -> bytes:
    if not BASE64.fullmatch(text):  # b64decode is lenient before Python 3.11
        raise ServiceError("SerializationException", "A Blob is not base64.")
    return base64.b64decode(text)


# [4.4] AWS Query
class AwsQuery(WireProtocol):
    """`Action` and the input are form fields in the query string or the body; answers are XML.

    A GET is allowed, and so is the URL of a queue: it stands for QueueUrl (Smithy: awsQuery)."""

    content_type = "text/xml"
    reads_action = True

    def meaning(self, request: Request, service: str, body: Body, hosts: Hosts = ()) -> Meaning:
        content = _content(request, body)
        if request.method not in ("GET", "HEAD", "POST") or (content and request.method != "POST"):
            raise ambiguous(self, "a call in AWS Query is a POST, or a GET without a body")
        try:
            pairs = [(k.decode("utf-8"), v.decode("utf-8")) for k, v in request.query]
            if content and _media_type(request) not in ("", _FORM):
                raise ValueError("not a form")
            text, most = content.decode("utf-8"), MAX_FORM_FIELDS
            pairs += urllib.parse.parse_qsl(text, True, errors="strict", max_num_fields=most)
        except ValueError as error:
            raise ServiceError("SerializationException", "The form is malformed.") from error
        if sum(name.lower() == "action" for name, _ in pairs) > 1:
            raise ambiguous(self, "Action is given twice")
        fields: dict[str, str] = {}
        for name, value in pairs:
            if fields.setdefault(name, value) != value:
                raise ServiceError("MalformedQueryString", f"{name[:80]} is given two values.")
        if "Action" not in fields:
            code = "UnknownOperation" if service == "sqs" else "MissingAction"
            raise ServiceError(code, "The request names no Action.")
        name = _operation_name(fields["Action"])
        if fields.get("Operation", name) != name:  # as some services call it
            raise ambiguous(self, "Operation and Action differ")
        if self.reads_target and request.fields["x-amz-target"] != [_OLD_TARGET + name]:
            raise ambiguous(self, "X-Amz-Target and Action differ")
        if service == "sqs":
            check_queue_path(self, request, fields.get("QueueUrl", ""))
        return Meaning(name, fields)

    def input(self, call: Call) -> dict[str, Any]:
        fields: dict[str, str] = dict(call.encoded)
        operation = MODELS.get(call.action)
        if operation is None:
            return {k: v for k, v in fields.items() if k not in ("Action", "Version")}
        if _QUEUE_PATH.fullmatch(call.request.path):
            if call.operation in ("CreateQueue", "ListQueues"):
                raise _invalid_action(call.operation)
            fields.setdefault("QueueUrl", call.request.path)
        names, shape = operation.names, operation.input
        tree: dict[str, Any] = {}  # `Tag.1.Key` as nested maps; a map has its own value under "."
        nodes: dict[str, Any] = {}  # the map of each field, by the name of the field
        for name, value in fields.items():
            if name.count(".") < MAX_FORM_DEPTH:  # no input is deeper
                nodes[name] = tree
                for part in name.split("."):
                    nodes[name] = nodes[name].setdefault(part, {})
                nodes[name]["."] = value
        given = _from_form(shape, tree, names, QueryName(""))
        members = {names[it].element if it in names else it for it in shape.members}
        left = [name for name, node in nodes.items() if "." in node]
        for name in (it for it in left if it.partition(".")[0] in members):  # has no such part
            raise ServiceError("InvalidParameterValue", f"{name[:80]} is not understood.")
        call.ignored = _shown_names(name for name in left if not _NO_INPUT.match(name))
        return dict(_from_json(shape, given))

    def reencode(self, call: Call) -> bytes:
        kept = [(k, call.encoded[k]) for k in ("Action", "Version") if k in call.encoded]
        names = MODELS.get(call.action, UNKNOWN_OPERATION).names
        return urllib.parse.urlencode([*kept, *_to_form(_spelled(call.input, names))]).encode()

    def output(self, call: Call, output: Output, request_id: str) -> Reply:
        names = MODELS.get(call.action, UNKNOWN_OPERATION).names
        members = {} if output is None else {f"{call.operation}Result": _spelled(output, names)}
        members["ResponseMetadata"] = {"RequestId": request_id}
        document = self._document(call.service, f"{call.operation}Response", members)
        return self._reply(200, request_id, document)

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        if error.code == "UnknownOperation":
            return self._reply(404, request_id, b"<UnknownOperationException/>")
        status, code, _ = self.fault(request, error)
        message = error.message
        if error.code == "QueueDoesNotExist":  # not so in JSON
            message = message.replace("not exist.", "not exist for this wsdl version.", 1)
        fault = {"Type": _side(status), "Code": code, "Message": message}
        versions = _query_values(request, b"Version")  # an unsigned request names no service
        of_version = next((name for name, it in QUERY_VERSIONS.items() if it in versions), "sqs")
        service, root = claim(request)[1].service or of_version, "ErrorResponse"
        members: Members = {"Error": {**fault, "Detail": {}}, "RequestId": request_id}
        if service == "ec2":
            del fault["Type"]
            members, root = {"Errors": {"Error": fault}, "RequestID": request_id}, "Response"
        return self._reply(status, request_id, self._document(service, root, members))

    def _document(self, service: str, root: str, members: Members) -> bytes:
        host = "queue" if service == "sqs" else service
        scheme = "https" if service in ("iam", "sts") else "http"
        folder = "docs" if service == "elasticbeanstalk" else "doc"
        version = QUERY_VERSIONS.get(service)
        xmlns = f' xmlns="{scheme}://{host}.amazonaws.com/{folder}/{version}/"' if version else ""
        return f'<?xml version="1.0"?>{_xml(root, members, xmlns)}'.encode("utf-8", "replace")


def _shown_names(names: Iterable[str]) -> Sequence[str]:
    return [n if _PARAMETER.fullmatch(n) else "..." for n in itertools.islice(names, MAX_IGNORED)]


def _from_form(shape: Shape, node: dict[str, Any], names: Names, spelled: QueryName) -> Any:
    """Return what JSON would have for a node of the form tree, and remove it from the tree."""
    if shape.kind is str or shape.kind is int:
        text = node.pop(".", "")
        if shape is INTEGER and not _NUMBER.fullmatch(text):
            raise ServiceError("SerializationException", f"'{text[:40]}' is not an integer.")
        return int(text) if shape is INTEGER else text
    if shape.element is None:
        present = {}
        for name, member in shape.members.items():
            spelled = names.get(name, QueryName(name))
            # An empty list is `Entries=`, and some clients write Tags for tags.
            spellings = (spelled.element, name, name[:1].upper() + name[1:])
            below = next((node[it] for it in spellings if it in node), None)
            if below is not None:
                present[name] = _from_form(member, below, names, spelled)
        return present
    numbered = [node[index] for index in sorted(filter(_INDEX.fullmatch, node), key=int)]
    alone = not numbered and (node.get(".") or set(node) - {"."})
    if alone:  # old clients send `AttributeName=All`, and samples of AWS `Attribute.Name=...`
        numbered = [node]
    elif node.get(".") == "":
        del node["."]  # the whole of an empty list or map
    if shape.kind is list:
        return [_from_form(shape.element, below, names, spelled) for below in numbered]
    if alone and spelled.key not in node:
        raise ServiceError("InvalidParameterValue", "A map of the form is not understood.")
    pairs = [(it.get(spelled.key, {}), it.get(spelled.value, {})) for it in numbered]
    return {k.pop(".", ""): _from_form(shape.element, it, names, spelled) for k, it in pairs}


def _spelled(value: Any, names: Names) -> Any:
    """Return a value with the names of AWS Query, where a map is a list of pairs."""
    if isinstance(value, list):
        return [_spelled(item, names) for item in value]
    if isinstance(value, bytes):
        return _base64_text(value)
    if not isinstance(value, dict):
        return str(value).lower() if isinstance(value, bool) else str(value)
    members = {}
    for name, item in value.items():
        element, key, of_value = names.get(name) or (name, "", "")
        if key and isinstance(item, dict):
            item = [{key: k, of_value: v} for k, v in item.items()]
        members[element] = _spelled(item, names)
    return members


def _to_form(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Return the form fields of a value that `_spelled` returned."""
    if not isinstance(value, (dict, list)):
        return [(name, value)]
    items: Iterable[Any] = value.items() if isinstance(value, dict) else enumerate(value, 1)
    return [it for k, v in items for it in _to_form(v, f"{name}.{k}" if name else k)]


def _xml(element: str, value: Any, attributes: str = "") -> str:
    """Return an element with its content, or one for each item of a list."""
    if isinstance(value, list):
        return "".join([_xml(element, item) for item in value])
    if not isinstance(value, dict):
        text = escape(_NOT_XML.sub("\ufffd", value), {'"': "&quot;", "\r": "&#xD;"})
        return f"<{element}>{text}</{element}>"
    members = "".join([_xml(name, item) for name, item in value.items()])
    return f"<{element}{attributes}>{members}</{element}>" if value else f"<{element}/>"


# [4.5] Actions of Amazon S3
# The actions of Amazon S3 ("Actions, resources, and condition keys for Amazon S3").  A line has
# the level, methods with their actions, and sub-resources in the query; `-` is no sub-resource.
# The word after a sub-resource replaces `*`.  Without a Delete action, DELETE needs the Put.
_S3_TABLE = """service: GET=ListAllMyBuckets PUT=CreateBucket DELETE=DeleteBucket: -
    bucket: GET=ListBucket HEAD=ListBucket PUT=CreateBucket DELETE=DeleteBucket: -
    bucket: GET=Get* PUT=Put*: abac=BucketAbac accelerate=AccelerateConfiguration acl=BucketAcl \
        logging=BucketLogging notification=BucketNotification versioning=BucketVersioning \
        object-lock=BucketObjectLockConfiguration requestPayment=BucketRequestPayment
    bucket: GET=Get*Configuration PUT=Put*Configuration DELETE=Put*Configuration: \
        analytics=Analytics encryption=Encryption intelligent-tiering=IntelligentTiering \
        inventory=Inventory lifecycle=Lifecycle metrics=Metrics replication=Replication
    bucket: GET=GetBucket* PUT=PutBucket* DELETE=PutBucket*: cors=CORS tagging=Tagging \
        ownershipControls=OwnershipControls publicAccessBlock=PublicAccessBlock
    bucket: GET=Get* PUT=Put* DELETE=Delete*: policy=BucketPolicy website=BucketWebsite
    bucket: GET=*: location=GetBucketLocation policyStatus=GetBucketPolicyStatus \
        session=CreateSession uploads=ListBucketMultipartUploads versions=ListBucketVersions
    bucket: POST=*: delete=DeleteObject
    bucket: PUT=UpdateBucketMetadata*Configuration: metadataAnnotationTable=AnnotationTable \
        metadataInventoryTable=InventoryTable metadataJournalTable=JournalTable
    bucket: GET=Get* POST=Create* DELETE=Delete*: metadataTable=BucketMetadataTableConfiguration \
        metadataConfiguration=BucketMetadataTableConfiguration
    object: GET=GetObject HEAD=GetObject PUT=PutObject DELETE=DeleteObject: -
    object: GET=Get* PUT=Put*: acl=ObjectAcl legal-hold=ObjectLegalHold retention=ObjectRetention
    object: GET=Get* PUT=Put* DELETE=Delete*: annotation=ObjectAnnotation tagging=ObjectTagging
    object: GET=Get*: attributes=ObjectAttributes torrent=ObjectTorrent
    object: PUT=*: encryption=UpdateObjectEncryption renameObject=RenameObject
    object: POST=*: restore=RestoreObject select=GetObject uploads=PutObject
    object: GET=ListMultipartUploadParts PUT=PutObject POST=PutObject \
        DELETE=AbortMultipartUpload: uploadId"""
S3_ACTIONS = {  # by level, sub-resource and method
    (level, subresource.strip("-"), method): action.replace("*", noun)
    for level, methods, words in re.findall(r"(\w+): (.*): (.*)", _S3_TABLE)
    for method, action in pairs(methods).items()
    for subresource, _, noun in [word.partition("=") for word in words.split()]}  # fmt: skip
_S3_SUBRESOURCES = frozenset(subresource for _, subresource, _ in S3_ACTIONS if subresource)
# The actions of a call with a versionId.
_S3_VERSIONED = {it: it.replace("Object", "ObjectVersion", 1) for it in S3_ACTIONS.values()
    if re.fullmatch("(Delete|Get)Object|.*Object(Acl|Annotation|Attributes|Tagging|Torrent)", it)
}  # fmt: skip
_S3_CONTROL = "/v20180820/"  # where the paths of the S3 Control API begin
_BUCKET = re.compile("[A-Za-z0-9._-]{1,255}")
_ODD_PATH = re.compile("//|/[.]|%|;|[^!-~]")


def host_name(host: str) -> str:
    """Return a Host in lower case, without its port and the brackets of an IPv6 address."""
    return (host[1:].partition("]") if host.startswith("[") else host.partition(":"))[0].lower()


def bucket_of_host(host: str, hosts: Hosts = ()) -> str:
    """Return the bucket in a Host such as `bucket.localhost:8081`, or ""; or ServiceError."""
    name = host_name(host)
    own = [".localhost", *(f".{own}" for own in hosts)]
    suffixes = (*own, ".amazonaws.com", ".amazonaws.com.cn")
    suffix = next((suffix for suffix in suffixes if f".{name}".endswith(suffix)), "")
    if not suffix and "." in name.rstrip(".") and not re.fullmatch("[0-9.]+", name):
        message = f"It is not certain whether the Host '{name[:80]}' begins with a bucket. Start"
        message += " the proxy with --host-name NAME, where NAME is its own part of the Host."
        raise ServiceError("InvalidRequest", message)  # a wrong guess would lose an object
    labels = name[: -len(suffix)].split(".") if suffix and len(name) > len(suffix) else []
    for index in reversed(range(len(labels))[-3:]):  # s3.dualstack.REGION
        if labels[index].startswith(("s3-accesspoint", "s3-website")) or "vpce" in labels:
            break  # the label before is no bucket
        if labels[index] == "s3" or labels[index].startswith(("s3-", "s3express-")):
            return ".".join(labels[:index])
    if labels and suffix not in own:
        raise ServiceError("InvalidRequest", f"The Host '{name[:80]}' is none of Amazon S3's.")
    return ".".join(labels)


def s3_meaning(request: Request, service: str, of_host: str) -> Meaning:
    """Return the action of a request to Amazon S3 as IAM spells it; ServiceError if in doubt."""
    # An SDK puts the account into the Host of S3 Control, where a bucket could stand.
    if re.fullmatch("([0-9]{12})?", of_host) and request.path.startswith(_S3_CONTROL):
        return rest_meaning(request)._replace(bucket=of_host)
    bucket, key = of_host, request.path[1:]
    if not of_host:
        bucket, _, key = key.partition("/")
    level = "object" if key else "bucket" if bucket or request.path != "/" else "service"
    name = urllib.parse.unquote(bucket, "latin-1")
    disguised = name != bucket and f"/{name}/" == _S3_CONTROL
    if level != "service" and (not _BUCKET.fullmatch(name) or name in (".", "..") or disguised):
        raise ServiceError("InvalidURI", "The name of the bucket is not allowed.")
    parameters = {name.decode("latin-1") for name, _ in request.query}
    found = sorted(parameters & _S3_SUBRESOURCES)
    if len(found) > 1:
        raise ambiguous(REST_S3, f"{found[0]} and {found[1]} are both sub-resources")
    method = {"HEAD": "GET", "OPTIONS": "GET", "PATCH": "PUT"}.get(request.method, request.method)
    strongest = S3_ACTIONS.get((level, "", method), "PutObject")  # of the method at that level
    action = S3_ACTIONS.get((level, "".join(found), request.method), strongest)
    if "versionId" in parameters and level == "object":
        action = _S3_VERSIONED.get(action, action)
    if service == "s3express" and action == "ListAllMyBuckets":
        action = "ListAllMyDirectoryBuckets"
    return Meaning(action, bucket=of_host)


def rest_meaning(request: Request) -> Meaning:
    """Return the method and the path of a request, with the path as patterns spell it.

    `%2F`, `%25` and the escapes of characters that no path may contain stay escaped.  Raise
    ServiceError InvalidURI if services could split the path into different segments."""
    path = request.path
    if not _ODD_PATH.search(path):
        return Meaning(request.method, path=path)
    if BROKEN_ESCAPE.search(path):
        raise ServiceError("InvalidURI", REFUSALS["uri"][2])
    segments = map(unquote_to_bytes, path.encode("latin-1").split(b"/"))
    plain = "/".join(quote(segment, safe="!$&'()*+,;=:@~") for segment in segments)
    # Some servers decode %2F, and some drop the parameters after a semicolon.
    others = {plain.replace("%2F", "/"), re.sub(";[^/]*", "", plain)} - {plain}
    for spelled in (plain, *others):
        inner = spelled[1:].split("/")
        if not all(inner[:-1]) or {".", ".."} & set(inner) or "%00" in spelled:
            raise ServiceError("InvalidURI", "The path has an empty, '.' or '..' segment, or NUL.")
    return Meaning(request.method, path=plain, other_paths=tuple(others))


# [4.6] REST
class Rest(WireProtocol):
    """Method and path name the operation (Smithy: restXml, restJson1)."""

    def __init__(self, form: str) -> None:
        self.form = form  # of errors: "json", "xml", or "s3" for Amazon S3's own XML
        self.content_type = "application/json" if form == "json" else "application/xml"

    def named(self, request: Request) -> str:
        with contextlib.suppress(ServiceError):  # a broken path or query string
            meaning = self.meaning(request, claim(request)[1].service, request.body)
            return meaning.operation + meaning.path
        return request.method

    def meaning(self, request: Request, service: str, body: Body, hosts: Hosts = ()) -> Meaning:
        if service not in S3_FAMILY:
            return rest_meaning(request)
        bucket = bucket_of_host(request.header("host") or "", hosts)
        if service in ("s3", "s3express"):
            return s3_meaning(request, service, bucket)
        path = canonical_path(request.path, normalize=False)  # any text is an object key
        return Meaning(request.method, path=path, bucket=bucket)

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        status, code, shape = self.fault(request, error)
        if self.form == "json":
            kind, document = shape.rpartition("#")[2], _to_json({"message": error.message})
            return self._reply(status, request_id, document, ("x-amzn-ErrorType", kind))
        if self.form == "xml":
            fault = {"Type": _side(status), "Code": code, "Message": error.message}
            xml = _xml("ErrorResponse", {"Error": fault, "RequestId": request_id})
        else:
            place = {"Resource": request.path[:1024], "RequestId": request_id, "HostId": ""}
            xml = _xml("Error", {"Code": code, "Message": error.message, **error.detail, **place})
        document = f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode("utf-8", "replace")
        return self._reply(status, request_id, document, ("x-amz-request-id", request_id))


AWS_JSON = {version: AwsJson(version) for version in ("1.0", "1.1")}
AWS_QUERY, AWS_QUERY_TARGET = AwsQuery(), AwsQuery()
AWS_QUERY_TARGET.reads_target = True
REST, REST_XML, REST_S3 = Rest("json"), Rest("xml"), Rest("s3")


# [4.7] RPC v2 CBOR
class RpcV2(WireProtocol):
    """The path names the operation, and the CBOR or JSON is passed on unread (Smithy RPC v2)."""

    is_opaque = True

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol if protocol == "rpc-v2-json" else "rpc-v2-cbor"
        self.content_type = f"application/{self.protocol[-4:]}"

    def named(self, request: Request) -> str:
        return request.path.rpartition("/")[2]

    def meaning(self, request: Request, service: str, body: Body, hosts: Hosts = ()) -> Meaning:
        match = _RPC_PATH.fullmatch(request.path)
        if request.fields.get("smithy-protocol") != [self.protocol]:
            raise ambiguous(self, "Smithy-Protocol is not rpc-v2-cbor or rpc-v2-json")
        if not match or request.method != "POST" or request.target != request.path.rstrip("/"):
            raise ambiguous(self, "RPC v2 is a POST to /service/NAME/operation/NAME alone")
        if _media_type(request) not in ("", self.content_type):
            raise ambiguous(self, f"the Content-Type of {self.protocol} is {self.content_type}")
        return Meaning(_operation_name(match[1]))

    def error(self, request: Request, error: ServiceError, request_id: str) -> Reply:
        status, code, shape = self.fault(request, error)
        document = {"__type": shape, "message": error.message}
        body = _to_json(document)
        if self.protocol == "rpc-v2-cbor":  # a map of two texts (RFC 8949, 3.1: types 5 and 3)
            texts = [text.encode("utf-8", "replace") for pair in document.items() for text in pair]
            body = b"\xa2" + b"".join(b"\x7a" + len(it).to_bytes(4, "big") + it for it in texts)
        in_query = ("x-amzn-query-error", f"{code};{_side(status)}")
        return self._reply(status, request_id, body, ("Smithy-Protocol", self.protocol), in_query)


# ==== 5. SQS in memory: Message, Queue, Sqs, OPERATIONS ====
# The answers follow recordings of Amazon SQS, not its emulators.  One lock protects all state.
# Each queue has a condition with that lock: a send wakes only the calls that wait for this queue.
# A message is visible, or hidden until some time: delayed if it was never received, otherwise in
# flight.  `advance` shows and expires messages when a call next uses the queue.
# To add an operation: write a method of Sqs with its name in snake case, without `Batch`, and a
# part of _OPERATIONS; write the query spelling of a new list or map into _SPELLED.  To add a
# refusal: write a row of SQS_REFUSALS and raise sqs_refusal(name, values).

# [5.1] Limits and refusals
SECONDS_HELD = 43200  # longest visibility timeout, counted from the receive
SECONDS_DEDUPLICATED = 300
MAX_WAIT = 5  # seconds of a poll before the proxy checks whether its client has hung up
MAX_IN_FLIGHT = 120000
MAX_LOOK = 4194304  # characters of the bodies that a look into a queue returns
MAX_POLICY_DEPTH = 32
MAX_BATCH_BYTES = 1048576
MAX_MOVES_PER_SECOND = 500
Attributes = Mapping[str, Members]  # of a message, by name
Settings = Mapping[str, str]  # queue attributes that callers can set, by name

# Reason, [code], message: AWS's own where known.  Default: the reason, or InvalidParameterValue.
_SQS_REFUSALS = """
    invalid: {}
    value: Value {} for parameter {} is invalid. Reason: {}
    missing [MissingParameter]: The request must contain the parameter {}.
    no queue [QueueDoesNotExist]: The specified queue does not exist.
    name: Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length
    fifo name: The name of a FIFO queue can only include alphanumeric characters, hyphens, or \
        underscores, must end with .fifo suffix and be 1 to 80 in length
    no name: Value for parameter QueueName is invalid. Reason: Must be specified.
    exists [QueueNameExists]: A queue already exists with the same name and a different value for \
        attribute {}
    attribute name [InvalidAttributeName]: Unknown Attribute {}.
    fifo only [InvalidAttributeName]: You can specify the {} only when FifoQueue is set to true.
    attribute value [InvalidAttributeValue]: Invalid value for the parameter {}.
    queue type [InvalidAttributeValue]: Invalid value for the parameter FifoQueue. Reason: \
        Modifying queue type is not supported.
    two encryptions [InvalidAttributeName]: You can use one type of server-side encryption (SSE) \
        at one time. You can either enable KMS SSE or SQS SSE.
    actions [OverLimit]: {} Actions were found, maximum allowed is 7.
    characters [InvalidMessageContents]: Invalid characters found. Valid unicode characters are \
        #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF
    attributes: Number of message attributes [{}] exceeds the allowed maximum [10].
    attribute: Message (user) attribute '{}' must {}.
    list values [UnsupportedOperation]: Message (user) attribute '{}' must not be a list.
    number: Can't cast the value of message (user) attribute '{}' to a number.
    system: Message system attribute '{}' is invalid: only AWSTraceHeader, a String, can be sent.
    too long: One or more parameters {}. Reason: Message must be shorter than {} bytes.
    deduplication: The queue should either have ContentBasedDeduplication enabled or \
        MessageDeduplicationId provided explicitly
    in flight [OverLimit]: Too many messages are in flight.
    handle [ReceiptHandleIsInvalid]: The input receipt handle "{}" is not a valid receipt handle.
    EmptyBatchRequest: There should be at least one {}RequestEntry in the request.
    TooManyEntriesInBatchRequest: Maximum number of entries per request are 10. You have sent {}.
    InvalidBatchEntryId: A batch entry id can only contain alphanumeric characters, hyphens and \
        underscores. It can be at most 80 letters long.
    BatchEntryIdsNotDistinct: Id {} repeated.
    BatchRequestTooLong: Batch requests cannot be longer than {} bytes. You have sent {} bytes.
    arn: You must use this format to specify the {}: \
        arn:<partition>:<service>:<region>:<account-id>:<resource-id>
    ResourceNotFoundException: The resource that you specified for the {} parameter doesn't exist.
    no dead letters: Source queue must be configured as a Dead Letter Queue.
    running: There is already a task running. Only one active task is allowed for a source queue \
        arn at a given time.
    task handle: Value for parameter TaskHandle is invalid.
    no task [ResourceNotFoundException]: Task does not exist.
"""
SQS_REFUSALS = {
    name: (code or (name if name in ERRORS else "InvalidParameterValue"), " ".join(text.split()))
    for name, code, text in re.findall(r"(?m)^ +(.+?)(?: \[(\w+)\])?: (.+)", _SQS_REFUSALS)
}


def sqs_refusal(reason: str, *values: object) -> ServiceError:
    """Return the error for a row of SQS_REFUSALS."""
    code, message = SQS_REFUSALS[reason]
    shown = (value[:2048] if isinstance(value, str) else value for value in values)
    return ServiceError(code, message.format(*shown))


def refuse_if(fault: object, reason: str, *values: object) -> None:
    """Raise the error for a row of SQS_REFUSALS if there is a fault."""
    if fault:
        raise sqs_refusal(reason, *values)


# [5.2] Messages and queues
@dataclass(eq=False)
class Message:
    """A message and its state."""

    message_id: str
    body: str
    attributes: Attributes
    system: dict[str, str]  # system attributes that do not change with a receive
    sent: float
    received: int = 0  # how often
    received_before: int = 0  # how often from other queues; redrive policies ignore it
    first_received: float = 0.0
    last_received: float = 0.0
    hidden_until: float = 0.0  # 0 while it is visible
    is_saved: bool = False  # whether a store has the message in its present queue


class Changes(NamedTuple):
    """The changes since a store last saved the queues."""

    messages: dict[tuple[int, str], tuple[Queue, Message]]  # by serial and id
    queues: set[Queue]  # whose settings, tags or tasks have changed
    memory: list[tuple[Any, ...]]  # rows of a table
    cleared: set[int]  # the serials of queues that lost all messages


class Queue:
    """A standard or FIFO queue ("FIFO delivery logic"); operations on a message are O(log n)."""

    changes: Optional[Changes] = None  # for a store

    def __init__(self, arn: str, serial: int, settings: Settings, now: float, lock: Any) -> None:
        self.arn = arn
        self.region, self.account, self.name = arn.split(":")[3:]
        self.serial = serial  # distinguishes queues that had the same name one after another
        self.fifo = "FifoQueue" in settings
        self.settings: Settings = {}
        self.tags: dict[str, str] = {}
        self.created = now
        self.changed = threading.Condition(lock)
        self.tasks: collections.deque[MoveTask] = collections.deque(maxlen=10)
        self._order = itertools.count()
        # AWS accepts a later change of the scope, and ignores it.
        self.scoped_to_group = settings.get("DeduplicationScope") == "messageGroup"
        self.clear()
        self.change(settings, now)

    def clear(self) -> None:
        """Drop all messages."""
        self.messages: OrderedDict[str, Message] = OrderedDict()  # in the order of arrival
        self.delayed = self.in_flight = 0
        self._ready: OrderedDict[str, Message] = OrderedDict()  # by id or group, the next first
        self._hidden: list[tuple[float, int, Message]] = []  # a heap; stale entries are skipped
        self._by_age: list[tuple[float, str]] = []  # a heap of message ids; stale ones, too
        # Of FIFO queues alone.
        self._groups: dict[str, OrderedDict[str, Message]] = collections.defaultdict(OrderedDict)
        # By group and deduplication id: time, message id, sequence number.
        self.sends: OrderedDict[tuple[str, ...], tuple[Any, ...]] = OrderedDict()
        if self.changes is not None:
            self.changes.cleared.add(self.serial)
            self.changes.queues.add(self)
            self.changes.memory[:] = [row for row in self.changes.memory if row[0] != self.serial]
        self.changed.notify_all()

    def change(self, settings: Settings, now: float) -> None:
        """Change settings, given in their normal form; "" unsets one."""
        changed = {**self.settings, **settings}
        if changed.get("KmsMasterKeyId"):
            changed["SqsManagedSseEnabled"] = "false"
        self.settings = {name: value for name, value in changed.items() if value}
        self.modified = now
        if self.fifo and "DelaySeconds" in settings:  # a standard queue's messages keep their own
            for message in self.messages.values():
                if message.hidden_until and not message.received:
                    self.hide(message, message.sent + self.number("DelaySeconds"))
            self.advance(now)

    @property
    def visible(self) -> int:
        """Return how many messages may be received now."""
        return len(self.messages) - self.in_flight - self.delayed

    def number(self, setting: str) -> int:
        """Return a setting that is a number."""
        return int(self.settings[setting])

    def policy(self, setting: str) -> dict[str, Any]:
        """Return a setting that is a JSON object, {} if it is not set."""
        text = self.settings.get(setting)
        return dict(json.loads(text)) if text else {}

    def add(self, message: Message, delay: int = 0) -> None:
        """Add a message, hidden for its delay."""
        self.messages[message.message_id] = message
        message.is_saved = False
        if self.changes is not None:  # a message that comes back takes the last place
            self.changes.messages.pop((self.serial, message.message_id), None)
        heapq.heappush(self._by_age, (message.sent, message.message_id))
        self.hide(message, message.sent + delay if delay else 0.0)

    def hide(self, message: Message, until: float) -> None:
        """Hide a message until that time; 0 shows it, behind the other visible messages."""
        change = bool(until) - bool(message.hidden_until)
        message.hidden_until = until
        if self.changes is not None:
            self.changes.messages[self.serial, message.message_id] = (self, message)
        if message.received:
            self.in_flight += change
        else:
            self.delayed += change
        # Keep in `_ready` what a receive may take: a message, or a group by its first one.
        name, first = message.message_id, self.messages.get(message.message_id)
        if self.fifo:
            group = self._groups[message.system["MessageGroupId"]]
            if first:
                group[name] = message  # keeps its place
            else:
                del group[name]
            name, first = message.system["MessageGroupId"], next(iter(group.values()), None)
            if not group:
                del self._groups[name]
        if not self.fifo or not first or first.hidden_until:
            self._ready.pop(name, None)  # a group keeps its place, a message takes the last one
        if first and not first.hidden_until:
            self._ready[name] = first
            self.changed.notify()
        if until:
            if not self._hidden or until < self._hidden[0][0]:
                self.changed.notify_all()  # the waiters must wake up earlier
            heapq.heappush(self._hidden, (until, next(self._order), message))
        if len(self._hidden) + len(self._by_age) > 4 * len(self.messages) + 128:
            held = {it[2]: it for it in self._hidden if self.holds(it[2], it[0])}  # once each
            self._hidden = sorted(held.values())
            self._by_age = sorted((it.sent, it.message_id) for it in self.messages.values())

    def remove(self, message: Message) -> None:
        """Drop a message, visible or not."""
        del self.messages[message.message_id]
        self.hide(message, 0.0)

    def saved_form(self) -> tuple[int, str, bytes]:
        """Return the row of the queue in a store: its serial, its ARN and the rest in JSON."""
        more = {"settings": self.settings, "tags": self.tags, "scoped": self.scoped_to_group}
        more |= {"tasks": [dataclasses.asdict(task) for task in self.tasks]}
        more |= {"created": self.created, "modified": self.modified}
        return self.serial, self.arn, json.dumps(more).encode()

    def advance(self, now: float) -> None:
        """Let happen what was due by now: messages come back, or are too old."""
        back = []
        while self._hidden and self._hidden[0][0] <= now:
            until, _, message = heapq.heappop(self._hidden)
            if self.holds(message, until):
                self.hide(message, 0.0)
                back.append(message)
        for message in reversed(back):  # in front of the messages that were never received
            if message.received and not self.fifo:
                self._ready.move_to_end(message.message_id, last=False)
        oldest = now - self.number("MessageRetentionPeriod")
        while self._by_age and self._by_age[0][0] <= oldest:
            expired = self.messages.get(heapq.heappop(self._by_age)[1])
            if expired and expired.sent <= oldest:
                self.remove(expired)
        while self.sends and next(iter(self.sends.values()))[0] <= now - SECONDS_DEDUPLICATED:
            self.sends.popitem(last=False)

    def next_change(self, deadline: float) -> float:
        """Return when a message may come back or expire, which may free its group."""
        back = [until for until, _, _ in self._hidden[:1]]
        ends = [sent + self.number("MessageRetentionPeriod") for sent, _ in self._by_age[:1]]
        return min([deadline, *back, *ends])

    def pick(self, limit: int) -> list[Message]:
        """Return up to `limit` messages that may be received now, in their order.

        A FIFO queue gives the messages of a group up to a hidden one, then the next group's."""
        if not self.fifo:
            return list(itertools.islice(self._ready.values(), limit))
        groups = (self._groups[name].values() for name in self._ready)
        ready = (itertools.takewhile(lambda it: not it.hidden_until, group) for group in groups)
        return list(itertools.islice(itertools.chain.from_iterable(ready), limit))

    def holds(self, message: Message, until: float) -> bool:
        """Return whether the queue has this message, and hides it until that time."""
        return self.messages.get(message.message_id) is message and message.hidden_until == until


@dataclass(eq=False)
class MoveTask:
    """A task that moves messages out of a dead-letter queue ("StartMessageMoveTask")."""

    given: Members  # the input that started it
    handle: str  # names it while it runs
    to_move: int
    started: float
    moved: int = 0
    status: str = "RUNNING"

    def next_move(self) -> float:
        """Return when the next message is due; without a rate, each second has a burst."""
        rate = self.given.get("MaxNumberOfMessagesPerSecond")
        at_once = 0 if rate else MAX_MOVES_PER_SECOND - 1
        return self.started + (self.moved - at_once) / (rate or MAX_MOVES_PER_SECOND)

    def output(self) -> Mapping[str, Any]:
        """Return the task as an element of the output of ListMessageMoveTasks."""
        failure = {"FailureReason": ERRORS["QueueDoesNotExist"].code}
        only = {"RUNNING": {"TaskHandle": self.handle}, "FAILED": failure}
        return {**self.given, **only.get(self.status, {}), "Status": self.status,
            "ApproximateNumberOfMessagesMoved": self.moved,
            "ApproximateNumberOfMessagesToMove": self.to_move,
            "StartedTimestamp": int(self.started * 1000)}  # fmt: skip


# [5.3] Queue attributes, and checks of messages
def _whole(low: int, high: int, text: str) -> str:
    if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
        raise ValueError(text)
    return str(int(text))


def _one_of(*allowed: str) -> Callable[[str], str]:
    return lambda text: {value.lower(): value for value in allowed}[text.lower()]


def _policy(text: str) -> str:
    """Return the text of a policy; ValueError if it is no object, or too deep to write again."""
    policy = read_json(text)
    level: list[Any] = [policy]
    for _ in range(MAX_POLICY_DEPTH):
        nodes = [list(node.values()) if isinstance(node, dict) else node for node in level]
        level = [below for node in nodes if isinstance(node, list) for below in node]
    if level or not isinstance(policy, dict):
        raise ValueError(text)
    return text


def _redrive_policy(text: str) -> str:
    reason = "Redrive policy is not valid JSON."
    try:
        policy = json.loads(_policy(text))
        target, count = str(policy["deadLetterTargetArn"]), str(policy["maxReceiveCount"])
        reason = f"Invalid value for maxReceiveCount: {count}, valid values are from 1 to 1000"
        reason += " both inclusive."
        normal = {"deadLetterTargetArn": target, "maxReceiveCount": int(_whole(1, 1000, count))}
    except (ValueError, KeyError) as error:
        raise sqs_refusal("value", text, "RedrivePolicy", reason) from error
    return _to_json(normal).decode()


def _redrive_allow_policy(text: str) -> str:
    reason = "Amazon SQS can't read the policy."
    with contextlib.suppress(ValueError):
        policy = json.loads(_policy(text))
        permission, sources = policy.get("redrivePermission"), policy.get("sourceQueueArns", [])
        if permission in ("allowAll", "denyAll", "byQueue") and isinstance(sources, list):
            if (permission == "byQueue") == bool(sources) and len(sources) <= 10:
                return text
            reason = "sourceQueueArns, from 1 to 10, go with byQueue and with nothing else."
    raise sqs_refusal("value", text, "RedriveAllowPolicy", reason)


# What callers can set: the default, "" for none, and the normal form or ValueError or KeyError.
SETTINGS: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "DelaySeconds": ("0", functools.partial(_whole, 0, 900)),
    "MaximumMessageSize": ("1048576", functools.partial(_whole, 1024, 1048576)),
    "MessageRetentionPeriod": ("345600", functools.partial(_whole, 60, 1209600)),
    "ReceiveMessageWaitTimeSeconds": ("0", functools.partial(_whole, 0, 20)),
    "VisibilityTimeout": ("30", functools.partial(_whole, 0, SECONDS_HELD)),
    "SqsManagedSseEnabled": ("true", _one_of("true", "false")),
    "KmsMasterKeyId": ("", str),
    "KmsDataKeyReusePeriodSeconds": ("", functools.partial(_whole, 60, 86400)),
    "Policy": ("", _policy),
    "RedrivePolicy": ("", _redrive_policy),
    "RedriveAllowPolicy": ("", _redrive_allow_policy),
    "FifoQueue": ("true", _one_of("true", "false")),
    "ContentBasedDeduplication": ("false", _one_of("true", "false")),
    "DeduplicationScope": ("queue", _one_of("queue", "messageGroup")),
    "FifoThroughputLimit": ("perQueue", _one_of("perQueue", "perMessageGroupId"))}  # fmt: skip
_FIFO_SETTINGS = frozenset(name for name in SETTINGS if re.search("Fifo|Deduplication", name))
_FIFO_NAME = re.compile(r"(?=.{6,80}\Z)[A-Za-z0-9_-]+\.fifo")
_QUEUE_ARN = re.compile("arn:[a-z-]+:sqs:[A-Za-z0-9_-]+:[0-9]{12}:[A-Za-z0-9_.-]{1,80}")
_LABEL = re.compile("[A-Za-z0-9_-]{1,80}")  # also a queue's name and the id of a batch entry
_GROUP_ID = re.compile("[!-~]{1,128}")
_ATTRIBUTE_NAME = re.compile(r"(?!(?i:aws\.|amazon\.))(?!\.)(?!.{0,255}\.\.)[\w.-]{1,256}(?<!\.)")
_DATA_TYPE = re.compile(r"(?:String|Number|Binary)(\.[^\0-\x1f\ud800-\udfff]{1,248})?")
_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_UPTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # includes suspend if possible
_BOOTED = time.time() - time.clock_gettime(_UPTIME)


def normal_settings(given: Settings, fifo: bool, current: Settings) -> Settings:
    """Return queue attributes in their normal form, "" for one to unset; or ServiceError."""
    settings: dict[str, str] = {}
    for name, text in given.items():
        known = name in SETTINGS and (fifo or name not in _FIFO_SETTINGS)
        is_named = name in ("DeduplicationScope", "FifoThroughputLimit")
        refuse_if(not known, "fifo only" if is_named else "attribute name", name)
        try:
            default, normal = SETTINGS[name]
            settings[name] = normal(text) if text or default else ""
        except (ValueError, KeyError) as error:
            raise sqs_refusal("attribute value", name) from error
    refuse_if(settings.get("FifoQueue") == "false", "queue type")
    key = {**current, **settings}.get("KmsMasterKeyId")
    refuse_if(key and settings.get("SqsManagedSseEnabled") == "true", "two encryptions")
    return settings


def attributes_md5(attributes: Attributes) -> str:
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


def _check_attributes(attributes: Attributes) -> None:
    refuse_if(len(attributes) > 10, "attributes", len(attributes))
    for name, attribute in attributes.items():
        lists = attribute.get("StringListValues") or attribute.get("BinaryListValues")
        refuse_if(lists, "list values", name)
        allowed, data_type = _ATTRIBUTE_NAME.fullmatch(name), attribute.get("DataType", "")
        refuse_if(not allowed, "attribute", name[:256], "have a name that is allowed")
        known, kind = _DATA_TYPE.fullmatch(data_type), data_type.partition(".")[0]
        refuse_if(not known, "attribute", name, "begin its type with String, Number or Binary")
        value: Any = attribute.get("BinaryValue" if kind == "Binary" else "StringValue")
        no_value = not value or {"StringValue", "BinaryValue"} <= attribute.keys()
        refuse_if(no_value, "attribute", name, f"contain a non-empty value of type '{kind}'")
        if isinstance(value, str) and _NOT_XML.search(value):
            raise sqs_refusal("attribute", name, "contain valid characters alone")
        refuse_if(kind == "Number" and not _DECIMAL.fullmatch(value), "number", name)


def _size(entry: Members) -> int:
    """Return the bytes of the body, and of the names, types and values of the attributes."""
    parts = [entry["MessageBody"]]
    for name, attribute in entry.get("MessageAttributes", {}).items():
        parts += (name, *attribute.values())
    return sum(len(p.encode("utf-8", "surrogatepass") if type(p) is str else p) for p in parts)


def _in_range(given: Members, name: str, default: int, low: int, high: int) -> int:
    value: int = given.get(name, default)
    if not low <= value <= high:
        raise sqs_refusal("value", value, name, f"Must be between {low} and {high}, if provided.")
    return value


def _check_id(given: Members, parameter: str) -> None:
    value = given.get(parameter)
    if value is not None and not _GROUP_ID.fullmatch(value):
        reason = f"{parameter} can only include alphanumeric and punctuation characters."
        raise sqs_refusal("value", value[:256], parameter, f"{reason} 1 to 128 in length.")


def _check_fifo(call: Call, queue: Queue, entry: Members) -> None:
    """Refuse an entry that does not fit the kind of queue, and with it the whole batch."""
    _check_id(entry, "MessageGroupId")
    _check_id(entry, "MessageDeduplicationId")
    given = entry.get("MessageDeduplicationId")
    reason = "The request includes a parameter that is not valid for this queue type."
    refuse_if(given and not queue.fifo, "value", given, "MessageDeduplicationId", reason)
    if queue.fifo and "MessageGroupId" not in entry:
        missing = sqs_refusal("missing", "MessageGroupId")
        raise missing if entry is call.input else sqs_refusal("invalid", missing.message)
    by_content = queue.settings.get("ContentBasedDeduplication") == "true"
    refuse_if(queue.fifo and given is None and not by_content, "deduplication")


def steady_time() -> float:
    """Return seconds since 1970, without later changes of the system's clock."""
    return _BOOTED + time.clock_gettime(_UPTIME)


def random_id() -> str:
    """Return a random UUID (RFC 9562, 5.4), five times as fast as the uuid module."""
    digits = f"{random.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def _arn(call: Call, account: str, name: str = "") -> str:
    return f"arn:aws:sqs:{call.region}:{account}:{name}"


# [5.4] The operations
def _on_each(act: Callable[[Sqs, Call, Queue, Members], Output]) -> Callable[[Sqs, Call], Output]:
    """Make a method that acts on the input of a call, or on each entry of a batch.

    A wrong batch fails as a whole; a failed entry does not affect the others."""

    @functools.wraps(act)
    def method(sqs: Sqs, call: Call) -> Output:
        queue = sqs._queue(call)
        if not call.operation.endswith("Batch"):
            return act(sqs, call, queue, call.input)
        entries, output = call.input["Entries"], collections.defaultdict(list)
        refuse_if(not entries, "EmptyBatchRequest", call.operation)
        refuse_if(len(entries) > 10, "TooManyEntriesInBatchRequest", len(entries))
        ids = [entry["Id"] for entry in entries]
        refuse_if(not all(map(_LABEL.fullmatch, ids)), "InvalidBatchEntryId")
        for index, repeated in enumerate(ids):
            refuse_if(repeated in ids[:index], "BatchEntryIdsNotDistinct", repeated)
        if call.operation == "SendMessageBatch":
            size = sum(map(_size, entries))
            refuse_if(size > MAX_BATCH_BYTES, "BatchRequestTooLong", MAX_BATCH_BYTES, size)
            for entry in entries:
                _check_fifo(call, queue, entry)
        for entry in entries:
            try:
                result = act(sqs, call, queue, entry) or {}
                output["Successful"].append({"Id": entry["Id"], **result})
            except ServiceError as error:
                fault = {"SenderFault": True, "Code": error.fault.code, "Message": error.message}
                output["Failed"].append({"Id": entry["Id"], **fault})
        return output

    return method


class Sqs:
    """The queues of all accounts and regions.

    The method of an operation follows the SQS API Reference.  Nothing enforces queue policies."""

    changes: Optional[Changes] = None  # for a store
    is_failing = False  # whether the store's last commit failed
    _draining = False

    def __init__(self, clock: Clock = steady_time, new_id: Callable[[], str] = random_id,
            secret: bytes = b"", wait: Callable[[threading.Condition, float],
            Any] = threading.Condition.wait) -> None:  # fmt: skip
        self._clock, self._new_id, self._wait = clock, new_id, wait
        self.secret = secret or os.urandom(32)  # authenticates receipt handles
        self.lock = threading.RLock()
        self.queues: dict[str, Queue] = {}  # by ARN
        self._running: dict[str, MoveTask] = {}  # by SourceArn
        self.serials = itertools.count(1)
        self.commit: Callable[[], None] = lambda: None  # saves the changes; of a store

    def perform(self, call: Call) -> Output:
        """Return the output of a call; ServiceError, and then the queues are unchanged."""
        if self.is_failing:
            self.commit()  # or refuse: the disk must take the earlier calls first
        with self.lock:
            self._move_messages()
            return OPERATIONS[call.operation].method(self, call)

    def restore(self, serial: int, arn: str, more: str) -> Queue:
        """Add a queue that a store has kept, without its messages."""
        old = json.loads(more)
        queue = self.queues[arn] = Queue(arn, serial, old["settings"], old["modified"], self.lock)
        queue.tags, queue.created = old["tags"], old["created"]
        queue.tasks.extend(MoveTask(**task) for task in old["tasks"])
        queue.scoped_to_group = old["scoped"]
        self._running.update((arn, task) for task in queue.tasks if task.status == "RUNNING")
        return queue

    def drain(self) -> None:
        """Make all calls that wait for messages return without messages."""
        self._draining = True
        self.wake()

    def wake(self) -> None:
        """Make all calls that wait for messages look at their queue again."""
        with self.lock:
            for queue in self.queues.values():
                queue.changed.notify_all()

    def overview(self, limit: int = 10000) -> Sequence[Members]:
        """Return the first queues with their counts, attributes and tags."""
        described = []
        with self.lock:
            for arn in heapq.nsmallest(limit, self.queues):
                now, it = self._clock(), self.queues[arn]
                it.advance(now)
                oldest = max(0.0, now - next((m.sent for m in it.messages.values()), now))
                described.append({"name": it.name, "region": it.region, "account": it.account,
                    "visible": it.visible, "in_flight": it.in_flight, "delayed": it.delayed,
                    "oldest_seconds": oldest, "attributes": it.settings, "tags": it.tags
                })  # fmt: skip
        return described

    def look(self, region: str, account: str, name: str, limit: int = 1000) -> list[Members]:
        """Return the first messages of a queue and their states; ServiceError for no queue.

        Without a region, take the first one that has the queue.  Nothing changes."""
        ending = f":{region}:{account}:{name}" if region else f":{account}:{name}"
        found: list[Members] = []
        hidden_groups, room = set(), MAX_LOOK
        with self.lock:
            queue = next((it for arn, it in self.queues.items() if arn.endswith(ending)), None)
            if queue is None:
                raise sqs_refusal("no queue")
            queue.advance(self._clock())
            for message in itertools.islice(queue.messages.values(), limit):
                room -= len(message.body)
                if room < 0 and found:
                    break
                # A hidden message of a FIFO queue blocks the later messages in its group.
                group = message.system.get("MessageGroupId") if queue.fifo else None
                state = "blocked" if group in hidden_groups else "visible"
                if message.hidden_until:
                    state = "in flight" if message.received else "delayed"
                    hidden_groups.add(group or message.message_id)
                every = {"AttributeNames": ["All"], "MessageAttributeNames": ["All"]}
                found.append({"State": state, **self._message_output(queue, message, every)})
        return [{k: v for k, v in it.items() if k != "ReceiptHandle"} for it in found]

    def reset(self, name: str = "") -> int:
        """Drop all queues, or the messages of the queues of one name.  Return how many queues."""
        with self.lock:
            chosen = [it for it in self.queues.values() if name in ("", it.name)]
            for queue in chosen:
                queue.clear()
            if not name:
                self.queues.clear()
                self._running.clear()
            return len(chosen)

    def _queue(self, call: Call) -> Queue:
        """Return the queue that the last two segments of QueueUrl name, or the only one."""
        rest, slash, name = call.input.get("QueueUrl", "").rstrip("/").rpartition("/")
        account = rest.rpartition("/")[2] if slash else call.caller.account_id
        return self._found(call, _arn(call, account, name), "no queue")

    def _found(self, call: Call, arn: str, *refusal: str) -> Queue:
        queue = self.queues.get(arn)
        if queue is None or not arn.startswith(_arn(call, call.caller.account_id)):
            error, own = sqs_refusal(*refusal), [call.caller.account_id, arn.split(":")[-1]]
            regions = [it.split(":")[3] for it in self.queues if it.split(":")[4:] == own]
            if regions and refusal == ("no queue",):
                error.message += f" (Your account has a queue of this name in {regions[0]}.)"
            raise error
        queue.advance(self._clock())
        if self.changes is not None and not call.operation.startswith(_KEEP_QUEUES):
            self.changes.queues.add(queue)
        return queue

    def create_queue(self, call: Call) -> Mapping[str, Any]:
        name, given = call.input.get("QueueName", ""), call.input.get("Attributes", {})
        fifo = given.get("FifoQueue", "").lower() == "true"
        if not (_FIFO_NAME if fifo else _LABEL).fullmatch(name):
            raise sqs_refusal("fifo name" if fifo else "name")
        settings = normal_settings(given, fifo, {})
        now, arn = self._clock(), _arn(call, call.caller.account_id, name)
        queue = self.queues.get(arn)
        if queue is None:
            defaults = {k: v for k, (v, _) in SETTINGS.items() if fifo or k not in _FIFO_SETTINGS}
            queue = Queue(arn, next(self.serials), {**defaults, **settings}, now, self.lock)
            self._check_redrive(queue, settings)
            queue.tags, queue.changes = dict(call.input.get("tags", {})), self.changes
        for attribute, value in settings.items():
            refuse_if(queue.settings.get(attribute, "") != value, "exists", attribute)
        self.queues[arn] = queue
        return self.get_queue_url(call)

    def _check_redrive(self, queue: Queue, settings: Settings) -> None:
        text = settings.get("RedrivePolicy")
        if not text:
            return
        arn = json.loads(text)["deadLetterTargetArn"]
        target = queue if arn == queue.arn else self.queues.get(arn)
        if target is None or (target.region, target.account) != (queue.region, queue.account):
            raise sqs_refusal("value", text, "RedrivePolicy", "Dead letter target does not exist.")
        reason = "Dead-letter queue must be same type of queue as the source."
        refuse_if(target.fifo != queue.fifo, "value", text, "RedrivePolicy", reason)
        policy = target.policy("RedriveAllowPolicy") or {"redrivePermission": "allowAll"}
        named = queue.arn in policy.get("sourceQueueArns", [])
        denied = not named and policy["redrivePermission"] != "allowAll"
        reason = "The RedriveAllowPolicy of the dead-letter queue does not allow it."
        refuse_if(denied, "value", text, "RedrivePolicy", reason)

    def get_queue_url(self, call: Call) -> Mapping[str, Any]:
        name = call.input.get("QueueName", "")
        refuse_if(not name, "no name")
        owner = call.input.get("QueueOwnerAWSAccountId") or call.caller.account_id
        queue = self._found(call, _arn(call, owner, name), "no queue")
        return {"QueueUrl": f"{call.base_url}/{queue.account}/{name}"}

    def _page(self, call: Call, member: str, queues: Iterable[Queue]) -> Members:
        """Return a page of queue URLs by name, with a token only if MaxResults is given."""
        most = _in_range(call.input, "MaxResults", 1000, 1, 1000)
        token, start = call.input.get("NextToken"), call.input.get("QueueNamePrefix", "")
        try:
            after = _from_base64(token).decode("utf-8") if token else ""
        except (ServiceError, UnicodeDecodeError) as error:
            raise sqs_refusal("invalid", "Invalid or expired next token.") from error
        prefix = _arn(call, call.caller.account_id, start)
        left = sorted(it.name for it in queues if it.arn.startswith(prefix) and it.name > after)
        page = [f"{call.base_url}/{call.caller.account_id}/{name}" for name in left[:most]]
        output: dict[str, Any] = {member: page} if page else {}
        if len(left) > most and "MaxResults" in call.input:
            output["NextToken"] = _base64_text(left[most - 1].encode())
        return output

    def list_queues(self, call: Call) -> Mapping[str, Any]:
        return self._page(call, "QueueUrls", self.queues.values())

    def list_dead_letter_source_queues(self, call: Call) -> Mapping[str, Any]:
        return self._page(call, "queueUrls", self._sources_of(self._queue(call)))

    def _sources_of(self, target: Queue) -> list[Queue]:
        policies = [(queue, queue.policy("RedrivePolicy")) for queue in self.queues.values()]
        return [q for q, policy in policies if policy.get("deadLetterTargetArn") == target.arn]

    def get_queue_attributes(self, call: Call) -> Mapping[str, Any]:
        queue, asked = self._queue(call), call.input.get("AttributeNames", [])
        computed = {"QueueArn": queue.arn, "CreatedTimestamp": str(int(queue.created)),
            "LastModifiedTimestamp": str(int(queue.modified)),
            "ApproximateNumberOfMessages": str(queue.visible),
            "ApproximateNumberOfMessagesNotVisible": str(queue.in_flight),
            "ApproximateNumberOfMessagesDelayed": str(queue.delayed)}  # fmt: skip
        known, values = {**SETTINGS, **computed}, {**queue.settings, **computed}
        for name in asked:
            refuse_if(name not in known and name != "All", "attribute name", name)
        shown = known if "All" in asked else asked
        attributes = {name: values[name] for name in shown if name in values}
        return {"Attributes": attributes} if attributes else {}

    def set_queue_attributes(self, call: Call) -> None:
        queue = self._queue(call)
        settings = normal_settings(call.input["Attributes"], queue.fifo, queue.settings)
        self._check_redrive(queue, settings)
        queue.change(settings, self._clock())

    def purge_queue(self, call: Call) -> None:
        self._queue(call).clear()

    def delete_queue(self, call: Call) -> None:
        queue = self._queue(call)
        del self.queues[queue.arn]
        queue.clear()  # a store must not save what the queue holds
        self._running.pop(queue.arn, None)

    def tag_queue(self, call: Call) -> None:
        self._queue(call).tags.update(call.input["Tags"])

    def untag_queue(self, call: Call) -> None:
        tags = self._queue(call).tags
        for key in call.input["TagKeys"]:
            tags.pop(key, None)

    def list_queue_tags(self, call: Call) -> Mapping[str, Any]:
        tags = self._queue(call).tags
        return {"Tags": tags} if tags else {}

    def add_permission(self, call: Call) -> None:
        queue, label = self._queue(call), call.input["Label"]
        accounts, actions = call.input["AWSAccountIds"], call.input["Actions"]
        if not _LABEL.fullmatch(label):
            raise sqs_refusal("value", label[:80], "Label", SQS_REFUSALS["name"][1])
        refuse_if(len(actions) > 7, "actions", len(actions))
        for name, values in (("AWSAccountId", accounts), ("ActionName", actions)):
            refuse_if(not values, "missing", f"{name}.1")
        for action in (it for it in actions if it != "*" and it not in OPERATIONS):
            reason = "Please refer to the appropriate WSDL for a list of valid actions."
            raise sqs_refusal("value", f"SQS:{action[:80]}", "ActionName", reason)
        listed = self._statements(queue)
        sids = [statement.get("Sid") for statement in listed]
        refuse_if(label in sids, "value", label, "Label", "Already exists.")
        principals = [f"arn:aws:iam::{account}:root" for account in accounts]
        spelled = [f"SQS:{action}" for action in actions]
        statement = {"Sid": label, "Effect": "Allow",
            "Principal": {"AWS": principals if len(principals) > 1 else principals[0]},
            "Action": spelled if len(spelled) > 1 else spelled[0], "Resource": queue.arn
        }  # fmt: skip
        empty = {"Version": "2008-10-17", "Id": f"{queue.arn}/SQSDefaultPolicy"}
        policy = {**empty, **queue.policy("Policy"), "Statement": [*listed, statement]}
        queue.change({"Policy": _to_json(policy).decode()}, self._clock())

    def remove_permission(self, call: Call) -> None:
        queue, label = self._queue(call), call.input["Label"]
        listed = self._statements(queue)
        left = [statement for statement in listed if statement.get("Sid") != label]
        refuse_if(len(left) == len(listed), "value", label[:80], "Label", "can't find label.")
        policy = {**queue.policy("Policy"), "Statement": left}
        queue.change({"Policy": _to_json(policy).decode() if left else ""}, self._clock())

    def _statements(self, queue: Queue) -> list[dict[str, Any]]:
        found = queue.policy("Policy").get("Statement", [])
        return [it for it in (found if isinstance(found, list) else [found]) if type(it) is dict]

    @_on_each
    def send_message(self, call: Call, queue: Queue, entry: Members) -> Members:
        body, attributes = entry["MessageBody"], entry.get("MessageAttributes", {})
        system = entry.get("MessageSystemAttributes", {})
        if entry is call.input:  # a batch has checked all its entries
            _check_fifo(call, queue, entry)
        refuse_if(not body, "missing", "MessageBody")
        refuse_if(not body.isprintable() and _NOT_XML.search(body), "characters")
        most = queue.number("MaximumMessageSize")
        reason = "are invalid" if entry is call.input else "cannot be validated"
        refuse_if(_size(entry) > most, "too long", reason, most)
        _check_attributes(attributes)
        for name, attribute in system.items():
            if name != "AWSTraceHeader" or attribute.get("DataType") != "String":
                raise sqs_refusal("system", name[:80])
        _check_attributes(system)
        delay, now = _in_range(entry, "DelaySeconds", 0, 0, 900), self._clock()
        reason = "The request include parameter that is not valid for this queue type."
        refuse_if(queue.fifo and delay, "value", delay, "DelaySeconds", reason)
        if queue.fifo or "DelaySeconds" not in entry:
            delay = queue.number("DelaySeconds")
        trace = system.get("AWSTraceHeader", {}).get("StringValue")
        given = {
            "SenderId": call.caller.access_key_id, "MessageGroupId": entry.get("MessageGroupId"),
            "AWSTraceHeader": trace or call.request.header("x-amzn-trace-id")}  # fmt: skip
        kept = {name: value for name, value in given.items() if value}
        new_id = self._new_id()
        output = {"MessageId": new_id, "MD5OfMessageBody": _md5(body)}
        if attributes:
            output["MD5OfMessageAttributes"] = attributes_md5(attributes)
        if system:
            output["MD5OfMessageSystemAttributes"] = attributes_md5(system)
        if queue.fifo:
            by_content = hashlib.sha256(body.encode()).hexdigest
            kept["MessageDeduplicationId"] = entry.get("MessageDeduplicationId") or by_content()
            kept["SequenceNumber"] = f"{next(self.serials):020d}"
            group = kept["MessageGroupId"] if queue.scoped_to_group else ""
            key = (group, kept["MessageDeduplicationId"])
            if key not in queue.sends:
                queue.sends[key] = noted = now, new_id, kept["SequenceNumber"]
                if queue.changes is not None:
                    row = (queue.serial, json.dumps(key), now, json.dumps(noted))
                    queue.changes.memory.append(row)
            _, output["MessageId"], output["SequenceNumber"] = queue.sends[key]  # of the first
        if output["MessageId"] == new_id:
            queue.add(Message(new_id, body, attributes, kept, now), delay)
        return output

    def receive_message(self, call: Call) -> Mapping[str, Any]:
        queue, given = self._queue(call), call.input
        limit = _in_range(given, "MaxNumberOfMessages", 1, 1, 10)
        waits, hides = map(queue.number, ("ReceiveMessageWaitTimeSeconds", "VisibilityTimeout"))
        patience = _in_range(given, "WaitTimeSeconds", waits, 0, 20)
        timeout = _in_range(given, "VisibilityTimeout", hides, 0, SECONDS_HELD)
        _check_id(given, "ReceiveRequestAttemptId")
        now = self._clock()
        deadline = now + patience
        while not (messages := self._take(queue, limit, timeout, now)):
            if now >= deadline or self._draining:
                full = queue.in_flight >= MAX_IN_FLIGHT and not queue.fifo
                refuse_if(full and not patience, "in flight")
                return {}
            if not call.may_wait:
                raise WouldWait
            due = [queue.next_change(deadline), *(it.next_move() for it in self._running.values())]
            self._wait(queue.changed, min(min(due) - now, MAX_WAIT))
            now = self._clock()
            self._move_messages()
            refuse_if(self._queue(call) is not queue, "no queue")
            if call.request.abandoned():
                queue.changed.notify()  # pass the wake-up on to another waiter
                return {}
        return {"Messages": [self._message_output(queue, message, given) for message in messages]}

    def _take(self, queue: Queue, limit: int, timeout: int, now: float) -> list[Message]:
        """Receive up to `limit` messages; move messages that were received too often."""
        policy = queue.policy("RedrivePolicy")
        target = self.queues.get(policy.get("deadLetterTargetArn", ""))
        taken: list[Message] = []
        dead: list[Message] = []
        most = limit if queue.fifo else min(limit, MAX_IN_FLIGHT - queue.in_flight)
        while len(taken) < most and (picked := queue.pick(most - len(taken))):
            for message in picked:
                times = message.received - message.received_before
                if target and times >= policy["maxReceiveCount"]:
                    queue.remove(message)
                    dead.append(message)
                else:
                    message.received += 1
                    message.first_received = message.first_received or now
                    message.last_received = now
                    queue.hide(message, now + timeout)
                    taken.append(message)
        for message in () if timeout else taken:
            queue.hide(message, 0.0)
        for message in dead:
            assert target
            message.system = {**message.system, "DeadLetterQueueSourceArn": queue.arn}
            message.received_before = message.received
            if target.fifo:
                message.sent = now  # a standard queue keeps it ("Amazon SQS dead-letter queues")
            target.add(message)
        return taken

    def _message_output(self, queue: Queue, message: Message, given: Members) -> Members:
        text = f"{queue.serial}:{message.message_id}:{message.received}".encode()
        handle = hmac.digest(self.secret, text, "sha256")[:12] + text
        output: dict[str, Any] = {
            "MessageId": message.message_id, "ReceiptHandle": "AQEB" + _base64_text(handle),
            "MD5OfBody": _md5(message.body), "Body": message.body}  # fmt: skip
        asked = {*given.get("AttributeNames", ()), *given.get("MessageSystemAttributeNames", ())}
        if asked:
            system = {**message.system, "SentTimestamp": str(int(message.sent * 1000)),
                "ApproximateReceiveCount": str(message.received),
                "ApproximateFirstReceiveTimestamp": str(int(message.first_received * 1000))
            }  # fmt: skip
            if shown := {k: v for k, v in system.items() if k in asked or "All" in asked}:
                output["Attributes"] = shown
        names, them = given.get("MessageAttributeNames", ()), message.attributes
        every = "All" in names or "*" in names
        starts = tuple([it[:-2] for it in names if it[-2:] == ".*"])
        chosen = {k: v for k, v in them.items() if every or k in names or k.startswith(starts)}
        if chosen:
            output["MD5OfMessageAttributes"] = attributes_md5(chosen)
            output["MessageAttributes"] = chosen
        return output

    def _of_handle(self, queue: Queue, handle: str) -> tuple[Optional[Message], bool]:
        """Return the message of a handle, or None, and whether its receive still holds it."""
        raw = base64.b64decode(handle[4:]) if BASE64.fullmatch(handle, 4) else b""
        text = raw[12:]
        genuine = hmac.compare_digest(hmac.digest(self.secret, text, "sha256")[:12], raw[:12])
        serial, message_id, count = (text.decode() if genuine else "::").split(":", 2)
        refuse_if(not handle.startswith("AQEB") or serial != str(queue.serial), "handle", handle)
        message = queue.messages.get(message_id)
        held = message is not None and message.hidden_until > 0 and count == str(message.received)
        return message, held

    @_on_each
    def delete_message(self, call: Call, queue: Queue, entry: Members) -> None:
        handle = entry["ReceiptHandle"]
        message, held = self._of_handle(queue, handle)
        if message and queue.fifo and not held:
            raise sqs_refusal("value", handle, "ReceiptHandle", "The receipt handle has expired.")
        if message:
            queue.remove(message)

    @_on_each
    def change_message_visibility(self, call: Call, queue: Queue, entry: Members) -> None:
        refuse_if("VisibilityTimeout" not in entry, "missing", "VisibilityTimeout")
        timeout = _in_range(entry, "VisibilityTimeout", 0, 0, SECONDS_HELD)
        handle, now = entry["ReceiptHandle"], self._clock()
        message, held = self._of_handle(queue, handle)
        if message is None or (queue.fifo and not held):
            reason = "Message does not exist or is not available for visibility timeout change."
            raise sqs_refusal("value", handle, "ReceiptHandle", reason)
        too_long = now + timeout > message.last_received + SECONDS_HELD
        reason = "Total VisibilityTimeout for the message is beyond the limit [43200 seconds]"
        refuse_if(too_long, "value", timeout, "VisibilityTimeout", reason)
        queue.hide(message, now + timeout if timeout else 0.0)

    def start_message_move_task(self, call: Call) -> Mapping[str, Any]:
        given, source = call.input, self._arn_of(call, "SourceArn")
        if "DestinationArn" in given and self._arn_of(call, "DestinationArn").fifo != source.fifo:
            raise sqs_refusal("invalid", "Source and destination must be of the same queue type.")
        _in_range(given, "MaxNumberOfMessagesPerSecond", 1, 1, MAX_MOVES_PER_SECOND)
        refuse_if(not self._sources_of(source), "no dead letters")
        refuse_if(source.arn in self._running, "running")
        handle = _base64_text(_to_json({"taskId": self._new_id(), "sourceArn": source.arn}))
        task = self._running[source.arn] = MoveTask(given, handle, source.visible, self._clock())
        source.tasks.appendleft(task)
        self._move_messages()
        self.wake()  # the waiters must wake up earlier
        return {"TaskHandle": handle}

    def _arn_of(self, call: Call, parameter: str) -> Queue:
        arn = call.input[parameter]
        refuse_if(not _QUEUE_ARN.fullmatch(arn), "arn", parameter)
        return self._found(call, arn, "ResourceNotFoundException", parameter)

    def list_message_move_tasks(self, call: Call) -> Mapping[str, Any]:
        source = self._arn_of(call, "SourceArn")
        tasks = list(itertools.islice(source.tasks, _in_range(call.input, "MaxResults", 1, 1, 10)))
        return {"Results": [task.output() for task in tasks]} if tasks else {}

    def cancel_message_move_task(self, call: Call) -> Mapping[str, Any]:
        handle = call.input["TaskHandle"]
        try:
            document = read_json(_from_base64(handle).decode())
            _, arn = document["taskId"], _expect(str, document["sourceArn"], "a String")
        except (ServiceError, ValueError, TypeError, KeyError) as error:
            raise sqs_refusal("task handle") from error
        self._found(call, arn, "ResourceNotFoundException", "SourceArn")
        refuse_if(arn not in self._running or self._running[arn].handle != handle, "no task")
        task = self._running.pop(arn)
        task.status = "CANCELLED"
        return {"ApproximateNumberOfMessagesMoved": task.moved}

    def _move_messages(self) -> None:
        for task in self._running.values():
            task.status = self._move(task, self._clock())
        self._running = {arn: it for arn, it in self._running.items() if it.status == "RUNNING"}

    def _move(self, task: MoveTask, now: float) -> str:
        """Move the messages of a task that should have moved by now, and return its status."""
        source = self.queues[task.given["SourceArn"]]
        source.advance(now)
        if self.changes is not None:
            self.changes.queues.add(source)
        while task.moved < task.to_move and (picked := source.pick(1)):
            if task.next_move() > now + 0.000001:  # a float may be short
                return "RUNNING"
            dead, system = picked[0], dict(picked[0].system)
            of_source = system.pop("DeadLetterQueueSourceArn", "")
            target = self.queues.get(task.given.get("DestinationArn", of_source))
            if target is None:
                return "FAILED"
            if target.fifo:
                system["SequenceNumber"] = f"{next(self.serials):020d}"
            source.remove(dead)
            # A new message with a new id ("Configure a dead-letter queue redrive").
            target.add(Message(self._new_id(), dead.body, dead.attributes, system, now))
            task.moved += 1
        return "COMPLETED"


# [5.5] The model of Amazon SQS
_SHAPES: dict[str, Shape] = {"text": STRING, "int": INTEGER, "blob": BLOB}
_SHAPES.update(map=map_of(STRING), list=list_of(STRING), blobs=list_of(BLOB))
_TYPED = "DataType StringValue BinaryValue:blob StringListValues:list BinaryListValues:blobs"
_SHAPES["attributes"] = map_of(structure(_TYPED, _SHAPES))
_SENT = "MessageBody* DelaySeconds:int MessageDeduplicationId MessageGroupId"
_SENT += " MessageAttributes:attributes MessageSystemAttributes:attributes"
_SHAPES["to_change"] = list_of(structure("Id* ReceiptHandle* VisibilityTimeout:int", _SHAPES))
_SHAPES["to_delete"] = list_of(structure("Id* ReceiptHandle*", _SHAPES))
_SHAPES["to_send"] = list_of(structure(f"Id* {_SENT}", _SHAPES))

# An operation, its input for `structure`, and `->` before the output if it has one.
# QueueUrl is required too, but AWS answers a call without it with QueueDoesNotExist.
_OPERATIONS = f"""AddPermission QueueUrl Label* AWSAccountIds*:list Actions*:list;
    CancelMessageMoveTask TaskHandle* -> ApproximateNumberOfMessagesMoved; ChangeMessageVisibility
    QueueUrl ReceiptHandle* VisibilityTimeout*:int; ChangeMessageVisibilityBatch QueueUrl
    Entries*:to_change -> Successful Failed; CreateQueue QueueName Attributes:map tags:map ->
    QueueUrl; DeleteMessage QueueUrl ReceiptHandle*; DeleteMessageBatch QueueUrl Entries*:to_delete
    -> Successful Failed; DeleteQueue QueueUrl; GetQueueAttributes QueueUrl AttributeNames:list ->
    Attributes; GetQueueUrl QueueName QueueOwnerAWSAccountId -> QueueUrl;
    ListDeadLetterSourceQueues QueueUrl NextToken MaxResults:int -> queueUrls NextToken;
    ListMessageMoveTasks SourceArn* MaxResults:int -> Results; ListQueueTags QueueUrl -> Tags;
    ListQueues QueueNamePrefix NextToken MaxResults:int -> QueueUrls NextToken; PurgeQueue
    QueueUrl; ReceiveMessage QueueUrl AttributeNames:list MessageSystemAttributeNames:list
    MessageAttributeNames:list MaxNumberOfMessages:int VisibilityTimeout:int WaitTimeSeconds:int
    ReceiveRequestAttemptId -> Messages; RemovePermission QueueUrl Label*; SendMessage QueueUrl
    {_SENT} -> MessageId MD5OfMessageBody MD5OfMessageAttributes MD5OfMessageSystemAttributes
    SequenceNumber; SendMessageBatch QueueUrl Entries*:to_send -> Successful Failed;
    SetQueueAttributes QueueUrl Attributes*:map; StartMessageMoveTask SourceArn* DestinationArn
    MaxNumberOfMessagesPerSecond:int -> TaskHandle; TagQueue QueueUrl Tags*:map; UntagQueue
    QueueUrl TagKeys*:list"""
# The QueryName of each list and map; {} is the operation.
_SPELLED = pairs("""
    Attributes=Attribute:Name:Value MessageAttributes=MessageAttribute:Name:Value
    MessageSystemAttributes=MessageSystemAttribute:Name:Value Tags=Tag:Key:Value tags=Tag:Key:Value
    Entries={}RequestEntry Failed=BatchResultErrorEntry Results={}ResultEntry
    Successful={}ResultEntry Actions=ActionName AWSAccountIds=AWSAccountId Messages=Message
    AttributeNames=AttributeName MessageAttributeNames=MessageAttributeName TagKeys=TagKey
    MessageSystemAttributeNames=MessageSystemAttributeName BinaryListValues=BinaryListValue
    StringListValues=StringListValue QueueUrls=QueueUrl queueUrls=QueueUrl
""")
OPERATIONS: Mapping[str, Operation] = {
    name: Operation(
        structure(spec, _SHAPES), output.split() if arrow else None,
        {k: QueryName(*it.replace("{}", name).split(":")) for k, it in _SPELLED.items()},
        getattr(Sqs, re.sub("(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Batch")).lower()))
    for given, arrow, output in [it.partition("->") for it in _OPERATIONS.split(";")]
    for name, spec in [given.split(None, 1)]}  # fmt: skip
MODELS.update({f"sqs:{name}": it for name, it in OPERATIONS.items()})
# The operations that begin so change messages at most.
_KEEP_QUEUES = ("Get", "List", "Send", "Receive", "ChangeMessage", "DeleteMessage")


# [5.6] Queue URLs: the caller gets ours, the upstream gets its own
_URL_OPERATIONS = {name for name, it in OPERATIONS.items() if "Url" in str(it.output)}
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # of a document that makes no sense
# In an answer in XML or JSON, up to the path.
_QUEUE_URL = re.compile(rb'(<QueueUrl>|[:,\[]\s*")https?:(?:\\?/){2}[^/<"\\]*(?=\\?/[^"])')


def _upstream_url(url: str, call: Call, endpoint: Endpoint) -> str:
    """Return the upstream's URL of a queue in place of our URL; any other URL stays."""
    ours = url.startswith(call.base_url + "/")
    return endpoint.origin + url[len(call.base_url) :] if ours else url


def restore_queue_url(text: str, call: Call, endpoint: Endpoint) -> str:
    """Return a form with the upstream's QueueUrl in place of our QueueUrl."""

    def _restored(field: re.Match[str]) -> str:
        given = urllib.parse.unquote_plus(field[1])
        url = _upstream_url(given, call, endpoint)
        return field[0] if url == given else f"QueueUrl={urllib.parse.quote(url, safe='')}"

    return re.sub("(?<![^&])QueueUrl=([^&]*)", _restored, text)


def restore_in_json(body: bytes, call: Call, endpoint: Endpoint) -> bytes:
    """Return a JSON document with the upstream's QueueUrl in place of our QueueUrl."""
    with contextlib.suppress(*_MALFORMED):  # the upstream refuses such documents
        given = (call.input if call.changed else call.encoded)["QueueUrl"]
        if (restored := _upstream_url(given, call, endpoint)) != given:
            return _to_json({**read_json(body.decode("utf-8")), "QueueUrl": restored})
    return body


def rewrite_queue_urls(call: Call, reply: Reply) -> Reply:
    """Return the answer with our queue URLs in place of the upstream's."""
    is_output = reply.status == 200 and call.operation in _URL_OPERATIONS
    if not is_output or not isinstance(reply.body, bytes):
        return reply
    base = call.base_url.encode()
    return reply._replace(body=_QUEUE_URL.sub(lambda match: match[1] + base, reply.body))


def found_in(reply: Reply, element: re.Pattern[bytes], member: str, key: str) -> list[str]:
    """Return each `key` in a list of an SQS answer, or in XML each match of `element`."""
    body = reply.body if reply.status == 200 and isinstance(reply.body, bytes) else b"{}"
    with contextlib.suppress(*_MALFORMED):
        if not any(n.lower() == "content-type" and "json" in v for n, v in reply.headers):
            return [html.unescape(found.decode()) for found in element.findall(body)]
        return [item[key] for item in read_json(body.decode()).get(member) or []]
    return []


def receipt_handles(reply: Reply) -> list[str]:
    """Return the receipt handles of an answer to ReceiveMessage."""
    return found_in(reply, re.compile(rb"<ReceiptHandle>([^<]*)<"), "Messages", "ReceiptHandle")


# ==== 6. Upstream: endpoint_for, CredentialChain, Pool, Upstream ====
# All client I/O.  The proxy removes the sender's signature from a verified call, signs the call
# with its own credentials and sends it.  Every other byte of path and query stays the same.
# The route, the verified scope and the meaning of the call decide the host.
# To add a source of credentials: write a method of CredentialChain that returns Credentials, or
# raises NotSetUp if nothing chooses the source and NoKeys if it fails.  Put it into `find`.


# [6.1] Endpoints
class Endpoint(NamedTuple):
    """An origin to send to."""

    scheme: str
    host: str  # IPv6 without its brackets
    port: int
    region: str = ""  # calls are signed for it; "" stands for the region of the call

    @property
    def authority(self) -> str:
        """The Host header, with the port if it is not the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """The URL up to its path."""
        return f"{self.scheme}://{self.authority}"


DEFAULT_PORTS = {"http": 80, "https": 443}
# By the beginning of a region: partition, DNS suffix, dual-stack DNS suffix (partitions.json), and
# the region that the calls of global services are signed for.
PARTITIONS = (
    ("cn-", "aws-cn", "amazonaws.com.cn", "api.amazonwebservices.com.cn", "cn-northwest-1"),
    ("us-gov-", "aws-us-gov", "amazonaws.com", "api.aws", "us-gov-west-1"),
    ("us-iso-", "aws-iso", "c2s.ic.gov", "api.aws.ic.gov", "us-iso-east-1"),
    ("us-isob-", "aws-iso-b", "sc2s.sgov.gov", "api.aws.scloud", "us-isob-east-1"),
    ("us-isof-", "aws-iso-f", "csp.hci.ic.gov", "api.aws.hci.ic.gov", "us-isof-south-1"),
    ("eu-isoe-", "aws-iso-e", "cloud.adc-e.uk", "api.cloud-aws.adc-e.uk", "eu-isoe-west-1"),
    ("eusc-", "aws-eusc", "amazonaws.eu", "api.amazonwebservices.eu", "eusc-de-east-1"),
    ("", "aws", "amazonaws.com", "api.aws", "us-east-1"))  # fmt: skip
# The first part of a host, by signing name: PREFIX or PREFIX=PATTERN; the first match counts.
# The prefix "-" stands for a customer's own host.  A pattern must match the beginning of
# X-Amz-Target, of SERVICE.OPERATION in RPC v2, or of PATH#METHOD; it may go on in the next line
# after a |.  In a prefix, & is the signing name, and \1 the first group.
ENDPOINT_PREFIXES = {
    service: [row.partition("=")[::2] for row in rows]
    for service, *rows in map(str.split, re.sub(r"\|\s+", "|", r"""
    account-access &-runtime=/access[/#]; acm acm-acme=.*Acme; agent-registry &=.*/discoverable
    &-control; aidevops cp.&=/(v\d|tags)/ dp.&; airflow ops.&=/metrics/ env.&=/(clitoken|restapi|
    webtoken)/ api.&; aoss -=/; appconfig appconfigdata=/configuration; appstream appstream2;
    appsync -=/(graphql|event)[/#]; aps &-workspaces=/workspaces/[^/]+/(alertmanager/)?api/;
    arc-region-switch &-control-plane=.*(Plans?|Resource|Checks)$; aws-marketplace
    agreement-marketplace=AWSMPCommerceService entitlement.marketplace=AWSMPEnt
    reporting-marketplace=/getBuyer discovery-marketplace=/\d{4}-
    deployment-marketplace=/(catalogs|tags)/ catalog.marketplace=/\w+# metering.marketplace;
    awsssoportal portal.sso; bedrock &-runtime=/(async-invoke|guardrail(-checks)?|model)[/#]
    &-data-automation-runtime=AmazonBedrockKeystoneRuntime &-data-automation=/(blueprints|
    data-automation-|\w+BlueprintOpt) &-agent-runtime=/(agenticR|generateQ|optimize-p|rerank|
    retrieveA|sessions|tags/.*session)|/agents/(.*/agentAliases/|[^/]+#POST)|/flows/(.*/executions|
    [^/]+/aliases/[^/]+#POST)|/knowledgebases/.*(/retrieve#|-document-acl|/content#)
    &-agent=/(agents|flows|knowledgebases|prompts|resourcepolicy|retrieval\w+|tags)/;
    bedrock-agentcore &=/(ab-tests|agentins|evaluations|harnesses/invoke|recommend|registry-rec|
    identities/(Comp|GetWorkloadA|[a-fo-p])|payments/\w+Payment)|/[^/]+/[^/]+/(actor|command|event|
    extract|generat|ingest|invo|memoryR|retrieve|save|sess|stopr|tools) &-control; cassandra
    &-streams=KeyspacesStreams; chime messaging-&=/(channel|endpoints|app-instances/.*/streaming)
    identity-&=/app-instance media-pipelines-&=/(sdk-)?media-
    meetings-&=/(meetings(?!.*/dial-outs)|tags) voice-&=/(emergency|phone-number|search|settings|
    sip-|voice-); cloudhsm cloudhsmv2=BaldrApiService; cloudsearch -=/2013-01-01/; cloudwatch
    cloudwatch-omni; connect contact-lens=/realtime-; dataexchange api-fulfill.&=/v1#; deadline
    scheduling.&=.*s/[^/]+/workers(#POST|/[^/]+(/schedule)?#PATCH)|.*/workers/[^/]+/(batchGet|
    fleet-roles|queue-roles) management.&; detective api.&; dynamodb streams.&=DynamoDBStreams
    search-&=.*SearchVectors; ecr api.&; ecr-public api.&; es &=/20\d\d- -; events
    eventsv2=AWSEventsV2; execute-api participant.connect=/participant/ -; geo
    metadata.&=/metadata/v0/jobs \1.&=/(\w{1,20})/v0/\w+/[^/]+/(?!consumers|list-consumers)
    cp.\1.&=/(\w{1,20})/v0/ cp.metadata.&; forecast forecastquery=AmazonForecastRuntime; geo-places
    places.geo; geo-maps maps.geo; geo-routes routes.geo; health-agent streaming.&=/medical-scribe
    runtime.&=/domain/[^/]+/; healthlake datatransformation.&=.*(DataTransf|ProfileWithAgent); iam
    iam-toolbox=/authorization-details/; iot-jobs-data data.jobs.iot; iotdata data-ats.iot;
    iotdeviceadvisor api.&; iotdevicegateway -; iotmanagedintegrations api.&; IoTSecuredTunneling
    api.tunneling.iot; iotsitewise monitor.&=/(access-policies|dashboards|portals|projects)
    data.&=/(assistant|jobs|properties|queries|workspaces/.*/(dataset-export|enrichment|executions|
    get-capture|queries|searches)) api.&; iottwinmaker data.&=/workspaces/.*/entity-properties
    api.&; iotwireless api.&; ivs ivsrealtime=/\w+(Composition|ConnectionT|EncoderC|IngestC|
    Participant|PublicKey|Stage|Storage); kafka-cluster -; kinesis &-queues=.*Queue; lakeformation
    query-&=/(GetQuery|GetWorkUnits|StartQuery) data-&=/GetWorkUnitR; lambda &=/20\d\d- -; lex
    runtime.&=/bot/ runtime-v2-&=/bots/[^/]+/botAliases/ models.&=/(intents|slottypes|migrations|
    builtins/[is])|/(bots|exports)/#GET|/(bots|imports)/[^/]+#|/bots/[^/]+/(aliases|versions|
    utterances(#|/[^#])) models-v2-&; logs stream-&=.*(GetLogObject|StartLiveTail); mediastore
    data.&=/; mediatailor api.&; medical-imaging runtime-&=/datastore/.*/(imageSet/|search);
    memorydb memory-db; mgh migrationhub-config=AWSMigrationHubMulti; mobiletargeting pinpoint;
    neptune-db -; neptune-graph -=/(queries|summary); omics storage-&=/\w+store/[^/]+/re(adset|
    ference)/[^/]+#GET|.*/upload/[^/]+/(complete|part)# control-storage-&=/(referencestore|
    s3accesspolicy|sequencestore) tags-&=/tags/ analytics-&=/(annotationStore|import|share|
    variantStore) workflows-&; partnercentral &-prm; payment-cryptography dataplane.&=/\w+/\w+#|
    /keys/ controlplane.&; personalize &-runtime=/(action-rec|personalize-ranking|recommendations)
    &-events=/\w+(-\w+)?#; pricing api.&; qapps data.&; rum dataplane.&=/appmonitors/; s3
    s3-control=/v20180820/; s3express &-control; sagemaker
    training-session-runtime.&=/(v1/)?training-sessions metrics.&=/Batch(Get|Put)Metrics
    job-runtime.&=/(complete-rollout|sample|update-reward) featurestore-runtime.&=/(Batch|
    FeatureGroup) edge.&=/(GetDe|SendHeart) runtime.&=/endpoints/ a2i-runtime.&=/human-loops
    inferencerouter-runtime.&=/inference-routers gateway-runtime.&=/global-inference api.&;
    servicecatalog &-appregistry=/(app|att|conf|sync|tags); servicediscovery
    data-&=.*DiscoverInstances; ses mail-manager=MailManagerSvc email; signer data-&=/revocations;
    sms-voice &.pinpoint=/v1; sso-oauth oidc; states sync-&=.*(StartSyncExecution|TestState);
    sustainability api.&; thinclient api.&; timestream ingest.&=.*(BatchLoad|Database|Records|
    Table) query.&; vpc-lattice-svcs -; wellarchitected &-agent=/api/v1/agent; wickr admin.&
    """).split(";"))}  # fmt: skip
# The prefixes for PREFIX@PARTITION, PREFIX@fips (the default is PREFIX-fips) and PREFIX@dual.
VARIANT_PREFIXES = pairs("""
    data-ats.iot@aws-cn=data.ats.iot transcribe@aws-cn=cn.transcribe batch@fips=fips.batch
    eks@fips=fips.eks api.sagemaker@fips=api-fips.sagemaker runtime.lex@fips=runtime-fips.lex
    data-ats.iot@fips=data.iot-fips transcribe@fips=fips.transcribe models.lex@fips=models-fips.lex
    runtime.sagemaker@fips=runtime-fips.sagemaker metrics.sagemaker@fips=metrics-fips.sagemaker
    api.detective@dual=detective api.ecr@dual=ecr api.tunneling.iot@dual=api.iot-tunneling
    ingest.timestream@dual=timestream-ingest es@dual=aos query.timestream@dual=timestream-query
    elasticfilesystem@dual=efs streams.dynamodb@dual=streams-dynamodb kafka@dual=kafka-api""")
# The region in the hosts of global services, by PREFIX, PREFIX@PARTITION or PREFIX@REGION; "-"
# stands for none, "main" for the region that they are signed for.
GLOBAL_REGIONS = {
    prefix: region.strip("-") for region, *prefixes in map(str.split, """
    - budgets cloudfront iam@aws importexport@aws route53 savingsplans@aws sdb@us-east-1 waf@aws;
    global codecatalyst@aws partnercentral-channel@aws partnercentral-prm@aws; us-gov
    iam@aws-us-gov route53@aws-us-gov; us-west-2 globalaccelerator@aws networkmanager@aws
    route53-recovery-control-config@aws; cn-north-1 iam@aws-cn support@aws-cn; main account
    arc-region-switch-control-plane@aws artifact bcm-dashboards bcm-data-exports
    bcm-pricing-calculator bcm-recommended-actions billing billingconductor@aws budgets@aws-eusc ce
    chime@aws cloudfront@aws-cn freetier@aws iam invoicing networkmanager notifications-contacts
    organizations payments pricingplanmanager route53-recovery-control-config route53domains@aws
    shield@aws support tax""".split(";")) for prefix in prefixes}  # fmt: skip
# Prefixes that have only dual-stack hosts (NAME.REGION.api.aws).
DUAL_STACK_ONLY = re.compile(r"""(?x)
    account-access.*|acm-acme|agent-registry.*|airflow-serverless|api\.iotmanagedintegrations
    |api\.sustainability|apiportal|application-signals|arc-region-switch.*|backup-search|bcm-.*
    |billing|cassandra-streams|cloudwatch-omni|codecatalyst|continuum|[cd]p\.aidevops|datazone
    |discovery-marketplace|dsql|eks-auth|freetier|gameliftstreams|(.*\.)?health-agent|interconnect
    |invoicing|(job|training-session)-runtime\.sagemaker|kendra-ranking|mpa
    |network-security-manager|networkflowmonitor|notifications(-contacts)?|osm|partnercentral-.*
    |payments|pricingplanmanager|qbusiness|route53globalresolver|s3files|s3vectors|security-ir
    |securityagent|signin|supportauthz|uxc|workspaces-instances""")
# GovCloud's prefixes whose plain hosts use FIPS.
GOVCLOUD_FIPS = re.compile(r"""(?x)
    access-analyzer|acm(-pca)?|appconfig|autoscaling|batch|clouddirectory|cloudformation|cloudtrail
    |config|connect|databrew|dms|dynamodb|ec2|eks|elasticache|elasticbeanstalk|elasticloadbalancing
    |elasticmapreduce|events|glacier|greengrass|guardduty|iam|kafka|kinesis|logs|mediaconvert
    |monitoring|networkmanager|oidc|organizations|outposts|portal\.sso|ram|rds|redshift
    |route53(resolver)?|servicequotas|sns|sqs|ssm|sso|states|sts|swf""")
_AWS_HOST = re.compile(
    r"(.+)\.(?:(?:amazonaws|api\.amazonwebservices)\.(?:com\.cn|eu)|amazonaws\.com|api\.aws)"
)
_REGION = re.compile("[a-z]{2,4}(?:-[a-z]+){1,4}-[0-9]{1,2}")
_ZONAL = re.compile(r".*(s3express-[a-z0-9-]{1,40}\.([a-z0-9-]{1,40})\.amazonaws\.com(?:\.cn)?)")
_SERVICES_BY_PREFIX = {
    it.replace("&", name): name for name, rows in ENDPOINT_PREFIXES.items() for it, _ in rows
}  # fmt: skip
Variants = tuple[bool, bool]  # whether endpoints use FIPS, and whether they are dual-stack


def endpoint_for(service: str, region: str, target: str = "", path: str = "/",
        method: str = "POST", variants: Variants = (False, False)) -> Endpoint:  # fmt: skip
    """Return the endpoint of AWS for a signing name and region, both already checked as names.

    X-Amz-Target, path and method tell services apart that share a signing name (source: the
    endpoint rule sets of botocore).  Raise ServiceError AccessDenied for a customer's own host."""
    rpc = _RPC_PATH.fullmatch(path)
    operation = target or (f"{path.split('/')[2]}.{rpc[1]}" if rpc else f"{path}#{method}")
    rows = (*ENDPOINT_PREFIXES.get(service, ()), ("&", ""))
    template, match = next((it, m) for it, form in rows if (m := re.match(form, operation)))
    prefix = match.expand(template.replace("&", service))
    if prefix == "-":
        message = f"This proxy forwards to AWS, and this host of {service} is a customer's own."
        raise ServiceError("AccessDenied", f"{message} Add: --route '{service}:*=https://HOST'")
    return _endpoint_at(prefix, region, *variants)


@functools.lru_cache(maxsize=256)
def _endpoint_at(prefix: str, region: str, fips: bool, dualstack: bool) -> Endpoint:
    _, partition, suffix, dual, main = next(it for it in PARTITIONS if region.startswith(it[0]))
    ending = "-fips" if fips else ""
    places = map(GLOBAL_REGIONS.get, (f"{prefix}@{region}", f"{prefix}@{partition}", prefix))
    place = next((it for it in places if it is not None), region).replace("main", main)
    if dualstack and prefix in ("s3", "s3-control", "s3express-control"):
        prefix += f"{ending}.dualstack"
    elif DUAL_STACK_ONLY.fullmatch(prefix) or (dualstack and prefix != "secretsmanager"):
        suffix, place = dual, place or "global"
        prefix = VARIANT_PREFIXES.get(f"{prefix}@dual", prefix) + ending
    elif fips and not (partition == "aws-us-gov" and GOVCLOUD_FIPS.fullmatch(prefix)):
        prefix = VARIANT_PREFIXES.get(f"{prefix}@fips", prefix + ending)
    else:
        prefix = VARIANT_PREFIXES.get(f"{prefix}@{partition}", prefix)
    host = ".".join(filter(None, (prefix, place, suffix))).lower()
    return Endpoint("https", host, 443, place if _REGION.fullmatch(place) else main)


def parse_endpoint(url: str) -> Endpoint:
    """Return the endpoint of an http(s) URL without a path, or raise ValueError."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is not None:
        raise ValueError("the URL must not have a user name")
    goes_on = parts.path not in ("", "/") or parts.query or parts.fragment
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or goes_on:
        raise ValueError(f"{url!r} is not http(s)://host[:port]")
    if is_link_local(parts.hostname):
        raise ValueError(f"{parts.hostname} is a link-local address, which serves credentials")
    port, region = parts.port or DEFAULT_PORTS[parts.scheme], service_of_host(parts.hostname)[1]
    return Endpoint(parts.scheme, parts.hostname, port, region)


def is_aws_host(host: str) -> bool:
    """Return whether a Host is a name of AWS."""
    return _AWS_HOST.fullmatch(host_name(host)) is not None


def service_of_host(host: str) -> tuple[str, str]:
    """Return the signing name and the region in a host of AWS, or "" for each."""
    if not (match := _AWS_HOST.fullmatch(host_name(host))):
        return "", ""
    labels = [it for it in match[1].split(".") if it not in ("dualstack", "global", "vpce")][-6:]
    places = [at for at, label in enumerate(labels) if _REGION.fullmatch(label)]
    region = labels.pop(places[-1]) if places else ""
    prefixes = [".".join(labels[at:]).replace("-fips", "") for at in range(len(labels))] or [""]
    prefix = next(filter(_SERVICES_BY_PREFIX.get, prefixes), prefixes[-1])
    return _SERVICES_BY_PREFIX.get(prefix, prefix), region


def is_link_local(host: str) -> bool:
    """Return whether a host is a link-local address, or serves credentials in IPv6."""
    with contextlib.suppress(OSError, ValueError):  # inet_aton knows 2852039166, 0xa9fea9fe, ...
        address = ipaddress.ip_address(host if ":" in host else socket.inet_aton(host))
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_link_local or str(address) in ("fd00:ec2::23", "fd00:ec2::254")
    return False


# [6.2] Our own credentials
class NoKeys(Exception):
    """A source has no credentials; `passing` if it may have some in a moment."""

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class NotSetUp(NoKeys):
    """Nothing chooses this source: the next one is tried."""


@contextlib.contextmanager
def raising(kind: Any, told: str, *failures: type[Exception]) -> Iterator[None]:
    """Raise `kind` with this text for each failure; %s stands for the text of the failure."""
    failures = (NoKeys, *failures)
    try:
        yield
    except failures as error:
        passing = (error.passing,) if isinstance(error, NoKeys) and kind is NoKeys else ()
        before, mark, after = told.rpartition("%s")
        raise kind(f"{before}{mark and error}{after}", *passing) from error


@functools.lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Return the context of all our connections; AWS_CA_BUNDLE names the authorities to trust."""
    return ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)


def fetch(url: str, headers: Mapping[str, str], timeout: float = 5, **how: Any) -> bytes:
    """Return the body of a successful answer, or raise NoKeys, within `timeout` seconds.

    `how` is `data` and `method` for urllib.  Local addresses bypass the environment's proxies."""
    _, host = split_url(url)
    outcome: queues.SimpleQueue[Union[tuple[int, bytes], Exception]] = queues.SimpleQueue()

    def _ask() -> None:
        try:
            near = is_link_local(host) or is_loopback(host)
            # Any answer is returned: an error may tell why, a redirection would take our tokens.
            opener = urllib.request.OpenerDirector()
            opener.add_handler(urllib.request.ProxyHandler({} if near else None))
            opener.add_handler(urllib.request.HTTPHandler())
            opener.add_handler(urllib.request.HTTPSHandler(context=tls_context()))
            request = urllib.request.Request(url, headers=dict(headers), **how)
            with opener.open(request, timeout=timeout) as answer:
                outcome.put((answer.status, answer.read(1048576)))
        except Exception as error:
            outcome.put(error)

    # In a thread: the timeout of a socket starts again with each byte.
    threading.Thread(target=_ask, daemon=True).start()
    try:
        found = outcome.get(timeout=timeout)
    except queues.Empty as late:
        raise NoKeys(f"{host} took longer than {timeout} s", passing=True) from late
    if isinstance(found, OSError):
        raise NoKeys(f"{host} did not answer: {getattr(found, 'reason', found)}", passing=True)
    if isinstance(found, Exception):  # its text may quote a token
        raise NoKeys(f"{host} could not be asked: {type(found).__name__}")
    status, body = found
    if status < 300:
        return body
    text = body.decode("latin-1")
    passing = status >= 500 or status == 429 or bool(_PASSING.search(text))
    told = "".join(f": {''.join(message)}" for message in _MESSAGE.findall(text)[:1])
    raise NoKeys(f"{host} answered {status}{told}", passing)


def split_url(url: str) -> tuple[str, str]:
    """Return the scheme and the host of an http or https URL.  Raise NoKeys for another."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.hostname and parts.scheme in DEFAULT_PORTS:
            return parts.scheme, parts.hostname
    raise NoKeys(f"{url[:80]!r} is no http or https URL")


@functools.lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Return whether the name or address of a host means this machine."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return host == "localhost"


def _expiry(text: Any) -> float:
    """Return the seconds since 1970 of an ISO 8601 time, infinity for no time."""
    if not text:
        return math.inf
    with raising(NoKeys, f"the expiration {str(text)[:40]!r} is no time", ValueError):
        moment = datetime.datetime.fromisoformat(re.sub("(Z|UTC)$", "+00:00", str(text)))
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()


def _credentials(key: Any, secret: Any, token: Any, expiration: Any = None) -> Credentials:
    for value in (key, secret, token or "none"):
        if not isinstance(value, str) or not re.fullmatch("[!-~]+", value):
            raise NoKeys("the keys found are malformed")
    return Credentials(key, secret, token or "", _expiry(expiration))


def _document(text: bytes) -> Mapping[str, Any]:
    with raising(NoKeys, "the answer is no JSON object", ValueError, TypeError):
        return dict(read_json(text.decode("utf-8")))


_PASSING = re.compile("<Code>(?:Throttl|RequestLimitExceeded|IDPCommunicationError)")
_MESSAGE = re.compile('<Message>([^<]{1,300})|"(?:m|M)essage" *: *"([^"]{1,300})')
_CONTAINER_HOSTS = ("169.254.170.2", "169.254.170.23", "fd00:ec2::23")
Section = Mapping[str, str]  # of a profile
_KEY_SETTINGS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_HOST_FIELDS = ("AccessKeyId", "SecretAccessKey", "Token", "Expiration")  # of containers and EC2
_STS_FIELDS = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")  # and of processes
_ROLE_SETTINGS = ("role_arn", "role_session_name", "duration_seconds", "external_id")


@dataclass(eq=False, repr=False)  # the environment may hold secrets
class CredentialChain:
    """Finds the credentials to sign with, in the order of the AWS SDKs; assumes `role_arn`."""

    environ: Mapping[str, str]
    chosen: str = ""  # a profile; it excludes other sources
    role_arn: str = ""
    session_name: str = ""
    fetch: Callable[..., bytes] = fetch
    clock: Clock = time.time
    _instance: Optional[Credentials] = field(default=None, init=False)  # of EC2 metadata, the last

    @property
    def profile(self) -> str:
        """The name of the profile: the chosen one, the environment's, or `default`."""
        names = (self.chosen, *map(self.environ.get, ("AWS_DEFAULT_PROFILE", "AWS_PROFILE")))
        return next(filter(None, names), "default")

    def find(self) -> Credentials:
        """Return credentials.  Raise NoKeys with the sources that were tried and their reasons."""
        sources: list[tuple[str, Callable[[], Credentials]]] = [
            ("environment", self._from_environment), ("web identity", self._from_web_identity),
            (f"profile {self.profile}", lambda: self._from_profile(self.profile)),
            ("container", self._from_container), ("EC2 metadata", self._from_metadata),
        ]  # fmt: skip
        settings = self._settings()
        if self.chosen:
            sources = sources[2:3]
        elif settings.get("role_arn") and not settings.get("web_identity_token_file"):
            sources[1:3] = sources[2], sources[1]  # a role of the profile before web identity
        tried: list[str] = []
        for name, source in sources:
            try:
                found = source()
            except NoKeys as error:
                tried.append(f"{name}: {error}")
                if isinstance(error, NotSetUp):
                    continue
                passing = error.passing and (name != "EC2 metadata" or " answered " in str(error))
                raise NoKeys("; ".join(tried), passing) from error  # the next is another identity
            role = {"role_arn": self.role_arn, "role_session_name": self.session_name}
            return self._assume(found, role) if self.role_arn else found
        raise NoKeys("; ".join(tried))

    def _from_environment(self) -> Credentials:
        key, secret, token = map(self.environ.get, map(str.upper, _KEY_SETTINGS))
        if not key or not secret:
            reason = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not both set"
            raise NoKeys(reason) if key else NotSetUp(reason)
        return _credentials(key, secret, token)

    def _from_web_identity(self) -> Credentials:
        path, role = map(self.environ.get, ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"))
        if not path:
            raise NotSetUp("AWS_WEB_IDENTITY_TOKEN_FILE is not set")
        if not role:
            raise NoKeys("AWS_ROLE_ARN is not set")
        return self._with_web_identity(path, role, self.environ.get("AWS_ROLE_SESSION_NAME"))

    def _from_container(self) -> Credentials:
        relative = self.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
        full = self.environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
        url = f"http://169.254.170.2{relative}" if relative else full
        if not url:
            raise NotSetUp("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI and _FULL_URI are not set")
        scheme, host = split_url(url)
        if scheme == "http" and host not in _CONTAINER_HOSTS and not is_loopback(host):
            raise NoKeys(f"{host} is neither https nor an address of a container's host")
        path = self.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
        token = _read_text(path) if path else self.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN")
        headers = {"Authorization": token} if token else {}
        return _credentials(*map(_document(self.fetch(url, headers)).get, _HOST_FIELDS))

    def _from_metadata(self) -> Credentials:
        """Return the keys of the EC2 instance; extend expired ones (SDKs: static stability)."""
        now, reason = self.clock(), "it still returns the old ones"
        try:
            self._instance = self._ask_metadata()
        except NoKeys as error:
            if not self._instance or self._instance.expires > now:
                raise
            reason = str(error)
        if self._instance.expires > now:
            return self._instance
        seconds = random.uniform(120, 600)  # until the next try: the jitter of botocore
        text = "EC2 metadata has no new credentials (%s); using the expired ones for %d seconds"
        log.warning(text, reason, seconds)
        return self._instance._replace(expires=now + CredentialCache.AHEAD + seconds)

    def _ask_metadata(self) -> Credentials:
        if self.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            raise NoKeys("AWS_EC2_METADATA_DISABLED is true")
        given = self.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
        base = (given or "http://169.254.169.254").rstrip("/") + "/latest"
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        hint = "%s (in a container, the hop limit of the instance's metadata must be 2)"
        with raising(NoKeys, hint):
            token = self.fetch(f"{base}/api/token", lifetime, data=b"", method="PUT", timeout=1)
        headers = {"X-aws-ec2-metadata-token": token.decode("latin-1")}
        roles = f"{base}/meta-data/iam/security-credentials/"
        role = self.fetch(roles, headers, timeout=1).decode("latin-1").strip()
        answer = self.fetch(roles + urllib.parse.quote(role), headers, timeout=1)
        return _credentials(*map(_document(answer).get, _HOST_FIELDS))

    def _file(self, variable: str, default: str) -> Mapping[str, Section]:
        parser = configparser.RawConfigParser(default_section="", strict=False)
        path = os.path.expanduser(self.environ.get(variable) or default)
        text = _read_text(path) if os.path.exists(path) else ""
        with raising(NoKeys, f"{path} is malformed", configparser.Error):
            parser.read_string(text)
        return {" ".join(it.split()): dict(parser.items(it)) for it in parser.sections()}

    def _section(self, profile: str) -> dict[str, str]:
        config = self._file("AWS_CONFIG_FILE", "~/.aws/config")
        own = self._file("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials").get(profile, {})
        # [profile default] has the last word over [default]; a name with blanks may be quoted.
        settings = dict(config.get("default", {}) if profile == "default" else {})
        for name in (profile, f"'{profile}'", f'"{profile}"'):
            settings.update(config.get(f"profile {name}", {}))
        if "aws_access_key_id" in own or "credential_process" in {**settings, **own}:
            # Take both keys from one file; keys in the config file come after a process.
            settings = {name: it for name, it in settings.items() if name not in _KEY_SETTINGS}
        settings.update(own)
        if not settings:
            reason = "there is no such section in ~/.aws/config and ~/.aws/credentials"
            raise NotSetUp(reason) if profile == "default" else NoKeys(reason)
        settings.update(config.get(f"sso-session {settings.get('sso_session', '')}", {}))
        return settings

    def _settings(self) -> Section:
        with contextlib.suppress(NoKeys):
            return self._section(self.profile)
        return {}

    def _from_profile(self, profile: str, visited: tuple[str, ...] = ()) -> Credentials:
        settings = self._section(profile)
        role, account = settings.get("role_arn"), settings.get("sso_account_id")
        keys = settings.get("aws_access_key_id") and settings.get("aws_secret_access_key")
        if profile in visited and not (keys and visited[-1] == profile):
            raise NoKeys(f"the profile {profile} is, by way of others, its own source")
        if keys and (visited or not (role or account)):  # a source profile gives its keys first
            return _credentials(*map(settings.get, _KEY_SETTINGS))
        command = f"aws configure export-credentials --profile {shlex.quote(profile)}"
        remedy = f"credential_process = {command} --format process"
        if role:
            if path := settings.get("web_identity_token_file"):
                return self._with_web_identity(path, role, settings.get("role_session_name"))
            if settings.get("mfa_serial"):
                raise NoKeys(f"the proxy cannot ask for the code of mfa_serial; {remedy}")
            return self._assume(self._source_of(settings, (*visited, profile)), settings)
        if account:
            return self._from_sso(profile, settings)
        if settings.get("credential_process"):
            return _from_process(settings["credential_process"])
        if settings.get("login_session"):
            raise NoKeys(f"the proxy cannot use its login_session; add to its profile: {remedy}")
        partly = settings.get("aws_access_key_id") or settings.get("sso_role_name")
        reason = "it has no keys, process, role, SSO account or login session"
        raise NoKeys(reason) if partly else NotSetUp(reason)

    def _source_of(self, settings: Section, visited: tuple[str, ...]) -> Credentials:
        source = {"Environment": self._from_environment, "EcsContainer": self._from_container,
            "Ec2InstanceMetadata": self._from_metadata,
        }.get(settings.get("credential_source", ""))  # fmt: skip
        with raising(NoKeys, "%s"):  # not NotSetUp: the role chooses this source
            if settings.get("source_profile"):
                return self._from_profile(settings["source_profile"], visited)
            if source:
                return source()
        raise NoKeys("its role has neither source_profile nor a known credential_source")

    def _from_sso(self, profile: str, settings: Section) -> Credentials:
        """Return keys for the SSO token that `aws sso login` cached; only a login renews it."""
        session, region = settings.get("sso_session"), settings.get("sso_region") or self.region()
        chosen = ("--sso-session", session) if session else ("--profile", profile)
        remedy = f"run `aws sso login {shlex.join(chosen)}`"
        name = session or settings.get("sso_start_url", "")
        digest = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        with raising(NoKeys, f"its SSO token is not cached; {remedy}", KeyError):
            cached = _document(_read_text(f"~/.aws/sso/cache/{digest}.json").encode())
            token, expires = str(cached["accessToken"]), _expiry(cached["expiresAt"])
        if expires <= self.clock():
            raise NoKeys(f"its SSO token has expired; {remedy}")
        role, account = settings.get("sso_role_name", ""), settings["sso_account_id"]
        query = urllib.parse.urlencode({"role_name": role, "account_id": account})
        portal = endpoint_for("awsssoportal", region, variants=self.variants)
        url = f"{portal.origin}/federation/credentials?{query}"
        try:
            answer = self.fetch(url, {"x-amz-sso_bearer_token": token})
        except NoKeys as error:
            remedy = "" if error.passing else f"; if its SSO session has ended, {remedy}"
            raise NoKeys(f"{error}{remedy}", error.passing) from error
        with raising(NoKeys, "the SSO portal's answer holds no credentials", KeyError, TypeError):
            got = _document(answer)["roleCredentials"]
            found = _credentials(got["accessKeyId"], got["secretAccessKey"], got["sessionToken"])
            return found._replace(expires=got["expiration"] / 1000)

    @functools.cached_property
    def variants(self) -> Variants:
        """The choices of environment and profile: FIPS endpoints, dual-stack endpoints."""
        names, settings = ("use_fips_endpoint", "use_dualstack_endpoint"), self._settings()
        chosen = [self.environ.get(f"AWS_{it.upper()}") or settings.get(it, "") for it in names]
        return chosen[0].lower() == "true", chosen[1].lower() == "true"

    def region(self) -> str:
        """Return the region to ask for tokens in: the environment's, the profile's, us-east-1."""
        named = self.environ.get("AWS_REGION") or self.environ.get("AWS_DEFAULT_REGION")
        return named or self._settings().get("region") or "us-east-1"

    def _assume(self, source: Credentials, settings: Section) -> Credentials:
        fields = {name.title().replace("_", ""): settings.get(name) for name in _ROLE_SETTINGS}
        with raising(NoKeys, f"the role {settings['role_arn']} cannot be assumed: %s"):
            return self._ask_sts(source, Action="AssumeRole", **fields)

    def _with_web_identity(self, path: str, role: str, session: Optional[str]) -> Credentials:
        fields = dict(RoleArn=role, RoleSessionName=session, WebIdentityToken=_read_text(path))
        return self._ask_sts(None, Action="AssumeRoleWithWebIdentity", **fields)

    def _ask_sts(self, source: Optional[Credentials], **fields: Optional[str]) -> Credentials:
        endpoint = endpoint_for("sts", region := self.region(), variants=self.variants)
        name = fields["RoleSessionName"] or "awsproxy"
        # AssumeRole takes 2 to 64 of these characters.
        fields["RoleSessionName"] = re.sub("[^A-Za-z0-9_+=,.@-]", "-", name)[:64].ljust(2, "-")
        form = {"Version": "2011-06-15", **{key: it for key, it in fields.items() if it}}
        body = urllib.parse.urlencode(form).encode()
        headers: Headers = (("Host", endpoint.authority), ("Content-Type", _FORM))
        if source:
            request = Request("POST", "/", headers, io.BytesIO(body))
            date, payload_hash = iso_basic(self.clock()), hashlib.sha256(body).hexdigest()
            scope = CredentialScope(date[:8], region, "sts")
            headers = sign(request, payload_hash, source, scope, date)[0].headers
        answer = self.fetch(f"{endpoint.origin}/", dict(headers), data=body).decode("latin-1")
        found = dict(re.findall(f"<({'|'.join(_STS_FIELDS)})>([^<]*)<", answer))
        if len(found) < 4:
            raise NoKeys("the answer of STS holds no credentials")
        return _credentials(*map(found.get, _STS_FIELDS))


def _read_text(path: str) -> str:
    with raising(NoKeys, f"{path} cannot be read: %s", OSError, UnicodeDecodeError):
        return pathlib.Path(os.path.expanduser(path)).read_text("utf-8").strip()


def _from_process(command: str) -> Credentials:
    try:
        words = shlex.split(command)
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise NoKeys(f"its process failed: {type(error).__name__}") from error
    if done.returncode:
        told = " ".join(done.stderr.decode("utf-8", "replace").split())[-300:]
        raise NoKeys(f"its process ended with {done.returncode}: {told or 'it says nothing'}")
    return _credentials(*map(_document(done.stdout).get, _STS_FIELDS))


@dataclass(eq=False, repr=False)
class CredentialCache:
    """Keeps the credentials of a chain, and renews them before they expire.

    One thread renews at a time; the others use the old credentials while these are valid."""

    AHEAD = 300  # seconds before the expiration at which the first renewal is tried
    RETRY = 10  # seconds between tries that fail; 1 if the failure may pass

    chain: CredentialChain
    clock: Clock = time.time
    variants: Variants = (False, False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _current: Credentials = field(default=Credentials("", "", expires=math.nan), init=False)
    _next_try: float = field(default=-math.inf, init=False)  # and -inf once AWS has refused them
    _failure: Optional[NoKeys] = field(default=None, init=False)  # of the last try

    def ready(self) -> Optional[Credentials]:
        """Return credentials if they need no renewal, and so no waiting."""
        now, keys = self.clock(), self._current
        return keys if now < self._next_try and now < keys.expires else None

    def get(self) -> Credentials:
        """Return credentials that are valid now.  Raise NoKeys if no source has any."""
        if not self._lock.acquire(blocking=not self._current.expires > self.clock()):
            return self._current  # they are valid, and somebody is renewing them
        try:
            return self.ready() or self._renew(self.clock())
        finally:
            self._lock.release()

    def _renew(self, now: float) -> Credentials:
        if self._failure and now < self._next_try:
            raise NoKeys(str(self._failure), self._failure.passing)
        try:
            found = self.chain.find()
            if found.expires <= now:
                raise NoKeys("the credentials found have expired")
            self._current, self._failure = found, None  # first: `ready` takes no lock
            self._next_try = max(found.expires - self.AHEAD, now + self.RETRY)
        except NoKeys as reason:
            self._failure = reason
            self._next_try = now + (1 if reason.passing else self.RETRY)
            log.warning("credentials not renewed: %s", reason)
            if not self._current.expires > now:
                raise
        return self._current

    def expire(self, refused: Credentials) -> bool:
        """Mark credentials as refused by AWS, and return whether a renewal may help."""
        fresh = refused is self._current and not self._failure and self._next_try > -math.inf
        if fresh:
            self._next_try = -math.inf
        return fresh or refused is not self._current

    @property
    def seconds_left(self) -> float:
        """The seconds until the present credentials expire; without credentials, not a number."""
        return self._current.expires - self.clock()


@dataclass(eq=False, repr=False)
class Keyring:
    """The credentials to forward a client's calls with: the proxy's, or those it names."""

    environ: Mapping[str, str]
    profile: str = ""
    fetch: Callable[..., bytes] = fetch
    clock: Clock = time.time
    _caches: dict[tuple[str, str, str], CredentialCache] = field(default_factory=dict, init=False)

    def seconds_left(self) -> float:
        """Return how long the credentials that end first are good."""
        seconds = [cache.seconds_left for cache in list(self._caches.values())]
        return min((it for it in seconds if not math.isnan(it)), default=math.nan)

    def of(self, client: Client) -> CredentialCache:
        """Return the credentials of a client; the name of the client names the role session."""
        role = client.upstream_role_arn
        key = (client.upstream_profile or self.profile, role, client.name if role else "")
        if key not in self._caches:  # two threads may get here, and one of them is the first
            chain = CredentialChain(self.environ, *key, self.fetch, self.clock)
            self._caches.setdefault(key, CredentialCache(chain, self.clock, chain.variants))
        return self._caches[key]


# [6.3] Connections
RECEIVE = "sqs:ReceiveMessage"
UPSTREAM_SECONDS = 900  # the longest wait for an answer: as long as AWS Lambda runs a function
STALE_SECONDS = 1  # a kept connection that ends so soon was closed before the call arrived
POLL_SECONDS = 65  # the longest wait for ReceiveMessage: longer than the longest poll


@functools.lru_cache(maxsize=64)
def forms_of_token(token: str) -> tuple[bytes, ...]:
    """Return the texts in which an upstream may repeat our session token."""
    if len(token) < 16:  # AWS has no shorter token.  A short text may be in any answer by chance.
        return ()
    quoted = {urllib.parse.quote(token, safe=safe) for safe in ("", "/", "/+=")}
    lower = {re.sub("%..", lambda escape: escape[0].lower(), form) for form in quoted}
    forms = {token, token.replace("/", r"\/"), token.encode().hex(" "), *quoted, *lower}
    return tuple(form.encode() for form in forms)


def hide(data: bytes, secrets: Iterable[bytes]) -> bytes:
    """Return the data with asterisks in place of each secret."""
    for secret in secrets:
        data = data.replace(secret, b"*" * len(secret))
    return data


def keep_alive(connection: socket.socket) -> None:
    """Probe an idle connection each minute: NAT gateways forget it after six minutes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):  # of Linux; of macOS; of both
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), 60)


class UpstreamError(Exception):
    """The failure of a connection."""


class Connection:
    """A kept connection to an upstream, for one exchange at a time."""

    def __init__(self, endpoint: Endpoint, connect_timeout: float) -> None:
        self.endpoint = endpoint
        self.timeout = math.inf  # of an exchange: see `Pool.allow`
        self.spoiled = False  # whether a request was not sent completely, or may stay unread
        self.heard = False  # whether any byte of an answer has arrived
        self.idle_since = 0.0  # that is, it is new
        self.deadline = math.inf  # when the head of the answer must have arrived
        self.abandoned: Callable[[], bool] = lambda: False  # whether its client has left
        failures = OSError, UnicodeError, http.client.HTTPException
        with raising(UpstreamError, f"no connection to {endpoint.origin}: %s", *failures):
            client = _connector(endpoint, connect_timeout)
            client.connect()  # and no more: its parser is slow
        self.socket, self._client = client.sock, client
        self.selector: Any = None  # the selector of the loop, if only the loop uses it
        keep_alive(self.socket)
        self.source = Stream(self._receive)
        self._arrival = select.poll()
        self._arrival.register(self.socket, select.POLLIN)

    def unwatch(self) -> None:
        """Remove the connection from the loop, so that another thread can use it."""
        if self.selector:
            with contextlib.suppress(KeyError):  # the loop has ended
                self.selector.unregister(self.socket)
            self.selector = None

    def close(self) -> None:
        """Close the connection; only the loop may close one that it watches."""
        self.unwatch()
        self._client.close()

    def _receive(self, size: int) -> bytes:
        until = min(self.deadline, time.monotonic() + self.timeout)
        while not self.has_arrived(max(0.0, min(0.5, until - time.monotonic()))):
            if self.abandoned():
                raise ConnectionAbortedError("the client has left")
            if time.monotonic() >= until:
                raise socket.timeout("the answer arrives too slowly")
        data = self.socket.recv(size)
        self.heard = self.heard or bool(data)
        return data

    def has_arrived(self, seconds: float) -> bool:
        """Return whether something can be received within that time."""
        decrypted = isinstance(self.socket, ssl.SSLSocket) and self.socket.pending()
        return bool(decrypted or self._arrival.poll(seconds * 1000))

    def send_until_answered(self, data: bytes) -> bool:
        """Send the data.  Stop and return False if an answer or the end of the stream arrives."""
        left = memoryview(data)
        poll = select.poll()
        poll.register(self.socket, select.POLLIN | select.POLLOUT)
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            while left:
                if not (seen := poll.poll(self.timeout * 1000)):
                    raise UpstreamError(f"{self.endpoint.origin} stopped reading a request")
                if seen[0][1] != select.POLLOUT and (not self.receive_now() or self.source.buffer):
                    return False  # otherwise it was a TLS record without data
                with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
                    left = left[self.socket.send(left) :]
            return True
        return False

    def send_now(self, data: bytes) -> bool:
        """Send the data without waiting, if nothing has arrived; return whether all was sent."""
        if self.socket.gettimeout() != 0:
            self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            return not self.has_arrived(0) and self.socket.send(data) == len(data)
        return False

    def receive_now(self) -> bool:
        """Read what has arrived, as far as a whole reply, and return whether more may arrive."""
        try:
            data = self.socket.recv(MAX_WHOLE_REPLY + 1)
        except OSError as error:
            return isinstance(error, (BlockingIOError, ssl.SSLWantReadError))
        self.source.buffer += data
        self.heard = self.heard or bool(data)
        return bool(data)


def _connector(endpoint: Endpoint, timeout: float) -> http.client.HTTPConnection:
    """Return the way to an endpoint: for https, through HTTPS_PROXY except to this machine."""
    host, port = endpoint.host, endpoint.port
    if endpoint.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=timeout)
    how: dict[str, Any] = {"timeout": timeout, "context": tls_context()}
    proxy = urllib.request.getproxies().get("https")
    if not proxy or urllib.request.proxy_bypass(host) or is_link_local(host) or is_loopback(host):
        return http.client.HTTPSConnection(host, port, **how)
    parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    tunnel = http.client.HTTPSConnection(parts.hostname or "", parts.port or 80, **how)
    login = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
    about = {"Proxy-Authorization": f"Basic {_base64_text(login.encode())}"}
    tunnel.set_tunnel(host, port, about if parts.username else {})
    return tunnel


class Pool:
    """Connections by endpoint; idle ones are kept for the next call."""

    IDLE_SECONDS = 15  # AWS closes idle connections after 20 seconds or more
    MOST = 256  # idle connections for each endpoint

    def __init__(self, connect_timeout: float = 5, timeout: float = UPSTREAM_SECONDS) -> None:
        self._connect_timeout, self._timeout = connect_timeout, timeout
        self._lock = threading.Lock()
        # By endpoint, and the thread whose loop watches them, or 0.
        self._idle: dict[tuple[Endpoint, int], list[Connection]] = {}
        self.draining = False  # whether polls must end
        self.given_up: set[Connection] = set()  # their messages will be put back

    def idle(self, endpoint: Endpoint, thread: int = 0) -> Optional[Connection]:
        """Return a kept connection that is still open, or None."""
        oldest = time.monotonic() - self.IDLE_SECONDS
        with self._lock:
            while idle := self._idle.get((endpoint, thread)):
                kept = idle.pop()
                # The loop closes a watched connection that ends.
                has_ended = kept.socket.fileno() < 0 if thread else kept.has_arrived(0)
                if kept.idle_since > oldest and not has_ended:
                    return kept
                kept.close()
        return None

    def take(self, endpoint: Endpoint, fresh: bool = False) -> Connection:
        """Return a kept connection, or a new one."""
        kept = None if fresh else self.idle(endpoint)
        return kept or Connection(endpoint, self._connect_timeout)

    def allow(self, connection: Connection, call: Call) -> None:
        """Set how long the answer to a call may take, and how to see that the client has left."""
        connection.timeout, connection.abandoned = self._timeout, call.request.abandoned
        if call.action == RECEIVE:  # its messages must be put back if the client has left
            connection.timeout = min(POLL_SECONDS, self._timeout)
            connection.abandoned = lambda: self.draining and not connection.heard

    def close_idle(self) -> None:
        """Close the connections that have idled for too long."""
        oldest = time.monotonic() - self.IDLE_SECONDS
        with self._lock:
            for idle in self._idle.values():
                while idle and idle[0].idle_since < oldest:
                    idle.pop(0).close()
            self._idle = {key: idle for key, idle in self._idle.items() if idle}

    def give(self, connection: Connection, keep: bool) -> None:
        """Keep a connection if request and answer are complete, or close it."""
        if keep and not connection.spoiled and not connection.source.buffer:
            connection.idle_since, connection.heard = time.monotonic(), False
            with self._lock:
                key = connection.endpoint, threading.get_ident() if connection.selector else 0
                idle = self._idle.setdefault(key, [])
                if len(idle) < self.MOST:
                    idle.append(connection)
                    return
        connection.close()


# [6.4] Forwarding
# The codes for a wrong signature.  The text of such an error repeats the signed request.
_mismatch = re.compile("(Incomplete|Invalid)Signature(Exception)?|SignatureDoesNotMatch").fullmatch
_REFUSED = (400, 401, 403)
_BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})  # some servers ignore their bodies
_ANSWER_DROPS = HOP_BY_HOP | {"content-length"}  # if the proxy frames the answer itself
MAX_WHOLE_REPLY = 65536  # bytes; longer replies stream
MAX_SQS_ANSWER = 16777216  # bytes: ten messages of 1 MiB in all, each character escaped
NOBODY = Credentials("", "")  # for calls that go upstream unsigned
# Names of roles and paths: the log shows them, callers must not see them.
_PRIVATE = re.compile(r"arn:[^\s;,]{1,300}|(?<![\w/.:])[~/][^\s;,:]{2,300}")
_CODE_IN_BODY = re.compile(
    rb'<Code>([\w.-]{1,128})<|"(?:__type|[Cc]ode)" *: *"(?:[^"#]*#)?([\w.-]{1,128})"')  # fmt: skip


def error_code(reply: Reply) -> str:
    """Return the error code in the answer of an upstream or a hook, or "-"."""
    fields = fields_of(reply.headers)
    for name, end in (("x-amzn-query-error", ";"), ("x-amzn-errortype", ":")):
        code = fields.get(name, [""])[0].partition(end)[0].rpartition("#")[2]
        if re.fullmatch("[A-Za-z0-9._-]{1,128}", code):
            return code
    found = _CODE_IN_BODY.search(reply.body) if isinstance(reply.body, bytes) else None
    return (found[1] or found[2]).decode() if found else "-"


def _without(headers: Iterable[tuple[str, str]], *names: str) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in names]


def is_repeatable(call: Call) -> bool:
    """Return whether a second run of the call changes nothing more."""
    # See RFC 9110, 9.2.2.  In the query protocol, a GET can send messages.
    idempotent = call.request.method in {*_BODILESS, "PUT"} and isinstance(call.wire, Rest)
    return idempotent or call.operation.startswith(("Get", "List", "Describe", "BatchGet", "Head"))


def sqs_call(host: str, operation: str, document: Members, region: str, caller: Client) -> Call:
    """Return a call to Amazon SQS that the proxy makes itself."""
    headers = (("Host", host), ("X-Amz-Target", f"AmazonSQS.{operation}"))
    request, wire = Request("POST", "/", headers, io.BytesIO(_to_json(document))), AWS_JSON["1.0"]
    return Call(request, wire, "sqs", operation, region, caller, request.body, encoded=document)


def queue_call(call: Call, operation: str, **more: Any) -> Call:
    """Return a call that the proxy makes itself about the queue of another call."""
    url = call.input.get("QueueUrl") or call.request.path
    document = {"QueueUrl": call.base_url + url if url.startswith("/") else url, **more}
    host = call.request.header("host") or "localhost"
    made = sqs_call(host, operation, document, call.region, call.caller)
    made.base_url = call.base_url
    return made


@dataclass(eq=False)
class Attempt:
    """A call for an upstream: its request before it is signed, and how to send that."""

    call: Call
    endpoint: Endpoint
    request: Request
    payload_hash: str
    keys: Credentials = NOBODY
    data: bytes = b""  # the signed request that `begin` made, for a Pending to send
    begun: bool = False  # whether the Pending has sent it on the connection that `begin` chose
    connection: Connection = field(init=False)
    secrets: tuple[bytes, ...] = ()  # our session token and signature, which no answer may repeat


# A request of a template before it was signed; each header with its name in lower case, too.
Sent = collections.namedtuple("Sent", "upstream endpoint target headers")


@dataclass(eq=False, repr=False)
class Upstream:
    """Signs calls for their client and sends them to AWS, or to another endpoint."""

    may_block = True

    endpoint: Optional[Endpoint]
    credentials: Callable[[Client], CredentialCache]
    pool: Pool
    clock: Clock = time.time

    @property
    def name(self) -> str:
        """The target's name in a route: `aws`, or an origin."""
        return self.endpoint.origin if self.endpoint else "aws"

    def answer(self, call: Call, request_id: str) -> Reply:
        """Forward the call and return the answer, or raise ServiceError.  A long body streams."""
        attempt = self._prepared(call)
        for rewrite in call.rewrites:
            request = rewrite(call, attempt.request) or attempt.request
            if request.body is not attempt.request.body:
                data = request.body.read()
                headers = _without(request.headers, "content-length", "transfer-encoding")
                about = (*headers, ("Content-Length", str(len(data))))
                request = dataclasses.replace(request, headers=about, body=io.BytesIO(data))
                attempt.payload_hash = hashlib.sha256(data).hexdigest()
            attempt.request = request
        call.upstream_seconds = -time.monotonic()  # `_final` adds its own time
        return self._settled(attempt)

    def begin(self, call: Call) -> Optional[Attempt]:
        """Return the attempt of a small call, ready to send, or None if it would have to wait."""
        keys = NOBODY if call.unsigned else self.credentials(call.caller).ready()
        if not keys or not isinstance(call.body, io.BytesIO):
            return None
        if call.request.method in _BODILESS and read_again(call.body):
            return None
        template = call.request.template
        sent = template and template.sent
        again = sent and sent.upstream is self and sent.endpoint == self._endpoint_of(call)
        attempt = self._again(call, sent) if sent and again else self._prepared(call)
        attempt.keys = keys
        if template and template.is_learned and not again:
            headers = [(name.lower(), name, value) for name, value in attempt.request.headers]
            template.sent = Sent(self, attempt.endpoint, attempt.request.target, headers)
        signed, _ = self._signed(attempt)
        attempt.data = encode_head(signed) + read_again(signed.body)
        idle, endpoint = self.pool.idle, attempt.endpoint
        if kept := idle(endpoint, threading.get_ident()) or idle(endpoint):
            attempt.connection = kept
            self.pool.allow(kept, call)
        return attempt if kept else None

    def _again(self, call: Call, sent: Sent) -> Attempt:
        """Return the attempt of a call whose head has the template of a call that was sent."""
        body, payload_hash = self._body(call, sent.endpoint)
        invocation = call.request.header("amz-sdk-invocation-id") or ""
        given = {"content-length": str(len(read_again(body))), "amz-sdk-invocation-id": invocation}
        headers = tuple([(name, given.get(lower, value)) for lower, name, value in sent.headers])
        request = Request(call.request.method, sent.target, headers, body, call.request.peer)
        call.upstream_host = sent.endpoint.authority
        return Attempt(call, sent.endpoint, request, payload_hash)

    def arrived(self, attempt: Attempt) -> Optional[Reply]:
        """Return a complete answer, None for a part of one; WouldWait if a worker must read it."""
        call, connection = attempt.call, attempt.connection
        ended = not connection.receive_now()
        buffer = connection.source.buffer
        end = buffer.find(b"\r\n\r\n") + 4
        if ended or len(buffer) > MAX_WHOLE_REPLY or (end == 3 and BARE_LF.search(buffer)):
            raise WouldWait
        if end == 3:
            return None
        try:
            head = parse_response_head(hide(buffer[:end], attempt.secrets), call.request.method)
        except ValueError as error:
            raise WouldWait from error  # the worker reads the head again, and refuses it
        if (length := head.length) is None or length == UNTIL_CLOSE or head.status < 200:
            raise WouldWait
        if len(buffer) < end + length:
            return None
        if head.status in _REFUSED or (call.action == RECEIVE and call.request.abandoned()):
            raise WouldWait
        body, connection.source.buffer = buffer[end:][:length], buffer[end + length :]
        return self._final(call, self._whole(attempt, head, head.keeps, body))

    def let_go(self, attempt: Attempt) -> Callable[[], None]:
        """Give up a poll, and return a function that makes its messages visible again."""
        attempt.connection.abandoned = lambda: False
        self.pool.given_up.add(attempt.connection)
        return functools.partial(self._put_back, attempt)

    def _put_back(self, attempt: Attempt) -> None:
        try:
            self._release(attempt.call, receipt_handles(self._reply(attempt)))
        except (UpstreamError, ServiceError) as error:
            attempt.connection.close()
            log.warning("messages may stay invisible: the upstream did not answer: %s", error)
        finally:
            self.pool.given_up.discard(attempt.connection)

    def _settled(self, attempt: Attempt) -> Reply:
        """Return the answer for the caller.  Put messages back if the client has left."""
        call, reply = attempt.call, self._exchange(attempt)
        body = reply.body if isinstance(reply.body, bytes) else b""
        expired = reply.status in _REFUSED and re.search(b"ExpiredToken|RequestExpired", body)
        if expired and not call.unsigned and self.credentials(call.caller).expire(attempt.keys):
            if isinstance(attempt.request.body, io.IOBase):
                reply = self._exchange(attempt)  # signs it again
        if call.action == RECEIVE and call.request.abandoned():
            self._release(call, receipt_handles(reply))
            reply = call.wire.output(call, {}, random_id())  # no messages
        return self._final(call, reply)

    def _final(self, call: Call, reply: Reply) -> Reply:
        fields = fields_of(reply.headers)
        found = fields.get("x-amzn-requestid") or fields.get("x-amz-request-id") or ["-"]
        call.upstream_id = found[0]
        call.upstream_seconds += time.monotonic()
        if reply.status in _REFUSED and not call.unsigned and _mismatch(error_code(reply)):
            # The upstream's text repeats our signed request, so the caller gets another.
            log.error("the upstream refuses our signature: check the key and clock of the proxy")
            message = "The upstream of this proxy refuses the proxy's own signature."
            message += " Check the credentials and the clock of the proxy; yours are good."
            request_id = fields.get("x-amzn-requestid", [random_id()])[0]
            error = ServiceError("SignatureDoesNotMatch", message)
            return call.wire.error(call.request, error, request_id[:128])
        return rewrite_queue_urls(call, reply) if call.service == "sqs" else reply

    def _endpoint_of(self, call: Call) -> Endpoint:
        if self.endpoint:
            return self.endpoint
        if not _REGION.fullmatch(call.region):
            # Some hosts below amazonaws.com are customers', so only regions may name one.
            meant = did_you_mean(call.region, REGIONS) or "."
            message = f"This proxy forwards to AWS, which has no region '{call.region}'{meant}"
            raise ServiceError("AccessDenied", message)
        host = call.request.header("host") or ""
        # Only the Host names a zone ("Regional and Zonal endpoints for directory buckets").
        zonal = _ZONAL.fullmatch(host_name(host)) if call.service == "s3express" else None
        if zonal and zonal[2] == call.region:
            return Endpoint("https", zonal[1], 443, call.region)
        target, method = call.request.header("x-amz-target") or "", call.request.method
        path = call.request.path if call.wire.is_opaque else call.path or "/"
        fips, dualstack = self.credentials(call.caller).variants
        if is_aws_host(host := host[len(call.bucket) :]):
            fips = fips or "fips" in host
            dualstack = dualstack or "dualstack" in host or ".api.aws" in host
        return endpoint_for(call.service, call.region, target, path, method, (fips, dualstack))

    def _prepared(self, call: Call) -> Attempt:
        request, endpoint, target = call.request, self._endpoint_of(call), call.request.target
        if call.changed:  # the body is encoded again, and not compressed
            request = request.with_headers(tuple(_without(request.headers, "content-encoding")))
        target, hoisted = strip_presigned(target) if call.presigned else (target, [])
        of_proxies = {n for n in request.fields if n in _OF_THE_WAY or n[:12] == "x-forwarded-"}
        dropped = _KEPT_BACK if call.unsigned else _SET_AGAIN
        dropped |= of_proxies.difference(call.signed_headers)
        headers = end_to_end(request.headers, dropped, call.signed_headers)
        headers += _without(hoisted, *fields_of(headers)) if hoisted else []
        if call.service in S3_FAMILY:
            target, endpoint = self._bucket_host(call, target, endpoint)
        elif call.service == "sqs":
            path, mark, query = target.partition("?")
            named = request.header("x-amz-target") or ""
            if isinstance(call.wire, AwsJson) and (mark or named.startswith(_OLD_TARGET)):
                mark = query = ""  # Action moves into X-Amz-Target
                headers = _without(headers, "x-amz-target")
                headers.append(("X-Amz-Target", f"AmazonSQS.{call.operation}"))
            elif isinstance(call.wire, AwsQuery):  # the form names the action; we read XML
                headers = _without(headers, "x-amz-target", "accept")
            target = path + mark + restore_queue_url(query, call, endpoint) if mark else path
        body, payload_hash = self._body(call, endpoint)
        if isinstance(body, AwsChunkedBody):
            plain = payload_hash == "UNSIGNED-PAYLOAD"
            length = body.length if plain else aws_chunked_length(body)
            headers = without_chunks(headers) if plain else headers
        elif isinstance(body, io.IOBase):
            length = body.seek(0, io.SEEK_END)
        elif "transfer-encoding" in request.fields:
            why = "You must provide the Content-Length HTTP header."
            raise ServiceError("MissingContentLength", why)
        else:
            length = int(request.header("content-length") or 0)
        if isinstance(call.wire, AwsJson) and not re.search("json|cbor", _media_type(request)):
            # curl's default is the type of a form.
            headers = _without(headers, "content-type")
            headers.append(("Content-Type", call.wire.content_type))
        headers.insert(0, ("Host", endpoint.authority))
        if length is None:
            headers.append(("Transfer-Encoding", "chunked"))
        elif length or request.method in ("POST", "PUT", "PATCH"):
            headers.append(("Content-Length", str(length)))
        sent = Request(request.method, target, tuple(headers), body, request.peer)
        call.upstream_host = endpoint.authority
        return Attempt(call, endpoint, sent, payload_hash)

    def _body(self, call: Call, endpoint: Endpoint) -> tuple[Body, str]:
        body, payload_hash = call.body, call.payload_hash
        if call.service == "vpc-lattice-svcs":  # see PROFILES
            return body, "UNSIGNED-PAYLOAD"
        if isinstance(body, AwsChunkedBody) and not body.signed:
            # Only its trailers, if it has any, need the aws-chunked form.
            return body, STREAMING_UNSIGNED if body.announced else "UNSIGNED-PAYLOAD"
        if not isinstance(body, io.BytesIO) and not (call.changed or call.service == "sqs"):
            return body, payload_hash or "UNSIGNED-PAYLOAD"
        data = read_again(body)
        sent = call.wire.reencode(call) if call.changed else data
        if call.service == "sqs" and not call.wire.is_opaque:
            if isinstance(call.wire, AwsJson):
                sent = restore_in_json(sent, call, endpoint)
            else:
                sent = restore_queue_url(sent.decode("latin-1"), call, endpoint).encode("latin-1")
        if sent == data and payload_hash:
            return body, payload_hash
        return io.BytesIO(sent), hashlib.sha256(sent).hexdigest()

    def _bucket_host(self, call: Call, target: str, endpoint: Endpoint) -> tuple[str, Endpoint]:
        bucket, of_control = call.bucket, call.path.startswith(_S3_CONTROL)
        account = call.request.header("x-amz-account-id") or ""
        if of_control and not bucket and _ACCOUNT_ID.fullmatch(account):
            bucket = account
        if not bucket or (self.endpoint and of_control):
            return target, endpoint
        if self.endpoint or "." in bucket:  # no TLS certificate covers dots
            return f"/{bucket}{target}", endpoint
        return target, endpoint._replace(host=f"{bucket}.{endpoint.host}")

    def _exchange(self, attempt: Attempt, fresh: bool = False) -> Reply:
        """Return the answer.  If a kept connection has ended, send a repeatable call once more."""
        call, begun, attempt.begun = attempt.call, attempt.begun, False
        if not begun:
            try:
                attempt.keys = NOBODY if call.unsigned else self.credentials(call.caller).get()
                attempt.connection = self.pool.take(attempt.endpoint, fresh)
            except NoKeys as reason:
                code = "ServiceUnavailable" if reason.passing else "AccessDenied"
                why = _PRIVATE.sub("...", str(reason))[:500]
                raise ServiceError(code, f"The proxy has no keys to sign with: {why}") from reason
            except UpstreamError as error:
                raise self._given_up(call, error, unread=True) from error
            self.pool.allow(attempt.connection, call)
        connection = attempt.connection
        try:
            if not begun:
                self._send(attempt)
            return self._reply(attempt)
        except UpstreamError as error:
            if call.action == RECEIVE and connection.abandoned():
                threading.Thread(target=self.let_go(attempt), daemon=True).start()
                return call.wire.output(call, {}, random_id())  # no messages
            connection.close()
            stale = not (connection.heard or connection.abandoned()) and connection.idle_since > 0
            if not (stale and is_repeatable(call) and isinstance(attempt.request.body, io.IOBase)):
                unread = stale and call.upstream_seconds + time.monotonic() < STALE_SECONDS
                raise self._given_up(call, error, unread) from error
        except Exception:
            connection.close()  # the body was wrong, and was not sent completely
            raise
        return self._exchange(attempt, fresh=True)

    def _given_up(self, call: Call, error: UpstreamError, unread: bool = False) -> ServiceError:
        """Return the refusal of a call.  SDKs retry 503, and a call must not run twice."""
        log.warning("upstream: %s", error)
        if unread or is_repeatable(call):
            return ServiceError("ServiceUnavailable", "The upstream of this proxy is unavailable.")
        message = "The proxy lost the upstream's answer. The call may have run:"
        return ServiceError("OutcomeUnknown", f"{message} look before you repeat it.")

    def _signed(self, attempt: Attempt) -> tuple[Request, Optional[Authorization]]:
        call, request, keys = attempt.call, attempt.request, attempt.keys
        if call.unsigned:
            return request, None
        amz_date = iso_basic(self.clock())
        scope = CredentialScope(amz_date[:8], attempt.endpoint.region or call.region, call.service)
        call.upstream_key = keys.access_key_id
        payload_hash, given = attempt.payload_hash, call.request.fields
        declares = "x-amz-content-sha256" in given or payload_hash == "UNSIGNED-PAYLOAD"
        call.sent, claimed = sign(request, payload_hash, keys, scope, amz_date, declares)
        attempt.secrets = (*forms_of_token(keys.session_token), claimed.signature.encode())
        return call.sent, claimed

    def _send(self, attempt: Attempt) -> None:
        connection, (signed, claimed) = attempt.connection, self._signed(attempt)
        body = signed.body
        if isinstance(body, io.IOBase):
            body.seek(0)
        blocks: Iterator[bytes] = iter(lambda: body.read(65536), b"")
        if isinstance(body, AwsChunkedBody) and attempt.payload_hash != "UNSIGNED-PAYLOAD":
            signer = ChunkSigner(attempt.keys.secret_access_key, claimed) if claimed else None
            blocks = aws_chunks(body, signer if body.signed else None)
        if "transfer-encoding" in signed.fields:
            framed = itertools.chain(blocks, (b"",))
            blocks = (b"%x\r\n%b\r\n" % (len(block), block) for block in framed)
        first = next(blocks, b"")  # raises for a wrong body before anything is sent
        connection.spoiled = True
        data = itertools.chain((encode_head(signed) + first,), blocks)
        is_sent = all(map(connection.send_until_answered, data))
        # An upstream that ignores the body would read it as the next request.
        connection.spoiled = not is_sent or (bool(first) and signed.method in _BODILESS)

    def _reply(self, attempt: Attempt) -> Reply:
        call, connection, secrets = attempt.call, attempt.connection, attempt.secrets
        source = connection.source
        connection.deadline = time.monotonic() + connection.timeout
        connection.socket.settimeout(connection.timeout)
        status = 100
        try:
            while status < 200:
                head = parse_response_head(hide(read_head(source), secrets), call.request.method)
                status, length = head.status, head.length
        except (OSError, ValueError) as error:
            why = str(error) or "connection closed"
            raise UpstreamError(f"no answer from {connection.endpoint.origin}: {why}") from error
        is_framed = length != UNTIL_CLOSE
        reader: Union[Stream, FramedBody] = FramedBody(source, length) if is_framed else source
        keep = head.keeps and is_framed
        is_short = length is not None and 0 <= length <= MAX_WHOLE_REPLY
        if not is_short:
            connection.deadline = math.inf  # each block of a stream has its own timeout
        start = b""
        if is_short or call.service == "sqs" or head.status in _REFUSED:
            limit = MAX_SQS_ANSWER if call.service == "sqs" else MAX_WHOLE_REPLY
            try:
                start = reader.read(limit + 1)
            except (OSError, ServiceError) as error:
                raise UpstreamError(f"half an answer from {connection.endpoint.origin}") from error
            if len(start) <= limit:
                return self._whole(attempt, head, keep, start)
            if _mismatch(error_code(Reply(head.status, head.headers, start))):
                return self._whole(attempt, head, False, start)  # the rest shows our request
            if call.service == "sqs":
                raise UpstreamError("an answer of Amazon SQS is too long")
        elif head.status < 300 and call.service in ("s3", "s3express"):
            secrets = ()  # an object stays as it was stored
        headers = end_to_end(head.headers, _ANSWER_DROPS if length is None else HOP_BY_HOP)
        blocks = itertools.chain((start,), iter(functools.partial(reader.read_some, 65536), b""))
        shown = (hide(block, secrets) for block in blocks)  # but no secret cut between blocks
        return Reply(head.status, tuple(headers), self._stream(attempt, shown, keep))

    def _whole(self, attempt: Attempt, head: ResponseHead, keep: bool, body: bytes) -> Reply:
        self.pool.give(attempt.connection, keep)
        # An answer to HEAD has the length of a body, but no body.
        dropped = HOP_BY_HOP if attempt.call.request.method == "HEAD" else _ANSWER_DROPS
        headers = tuple(end_to_end(head.headers, dropped))
        return Reply(head.status, headers, hide(body, attempt.secrets))

    def _stream(self, attempt: Attempt, body: Iterable[bytes], keep: bool) -> Iterator[bytes]:
        """Yield the answer's body.  Raise OSError or ServiceError if it is incomplete."""
        complete = False
        try:
            yield from filter(None, body)
            complete = True
        finally:
            self.pool.give(attempt.connection, keep and complete)

    def _release(self, received: Call, handles: Sequence[str]) -> None:
        if not handles:
            return
        now = {"VisibilityTimeout": 0}
        entries = [{"Id": str(n), "ReceiptHandle": it, **now} for n, it in enumerate(handles)]
        call = queue_call(received, "ChangeMessageVisibilityBatch", Entries=entries)
        message = "the receiver of %d messages has left; making them visible again: %s"
        try:
            status = self.answer(call, "").status
            log.warning(message, len(handles), f"the upstream answered {status}")
        except ServiceError as error:
            log.warning(message, len(handles), error)


# ==== 7. Hooks: Exchange, Workers, Hook, HookFile, AccessLog, Metrics, InFlight, ... ====
# Everything that watches or changes calls is a hook, also the proxy's own log and metrics.
# To add a metric: count in Metrics.observe and write the count in Metrics.text; for a value that
# is read on demand, call metrics.gauge(name, help, function) in Program.
MAX_SHOWN = 256  # characters of a caller's text in a log line
Counts = collections.Counter[tuple[Any, ...]]  # by the values of their labels
_ATTEMPT = re.compile("attempt=([0-9]{1,3})")
_COLOURS = {2: 32, 3: 36, 4: 33, 5: 31}  # of a status: green, cyan, yellow, red (ECMA-48)
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_NUMBERS = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}
_GAUGE_JOINS = {"in_flight": max, "credentials_seconds": min, "build_info": max}  # others add
Ask = Callable[[Call, str], int]  # returns the visibility timeout of the queue of a call
Run = Callable[[Callable[[], None]], None]  # runs a function in the background
# The functions of a hook, None for what it has not.  The last one is no hook on its own.
HookMethods = collections.namedtuple("HookMethods", "before rewrite after observe concerns")


# [7.1] Workers and exchanges
class Workers:
    """Threads for tasks that may block: a new one only if none is idle."""

    IDLE_SECONDS = 30

    def __init__(self) -> None:
        self._tasks: queues.SimpleQueue[Callable[[], None]] = queues.SimpleQueue()
        self._idle = threading.Semaphore(0)  # counts the threads that no task is meant for

    def end(self) -> None:
        """End the idle threads now, and the others after their tasks."""
        self.IDLE_SECONDS = 0
        while self._idle.acquire(blocking=False):
            self._tasks.put(sys.exit)

    def run(self, task: Callable[[], None]) -> None:
        """Run the task in a thread; RuntimeError if the system has no more threads."""
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._work, daemon=True).start()
        self._tasks.put(task)

    def _work(self) -> None:
        while True:
            try:
                self._tasks.get(timeout=self.IDLE_SECONDS)()
                self._idle.release()
            except queues.Empty:
                if self._idle.acquire(blocking=False):  # no task waits for this thread
                    return


class Exchange:
    """A request and its result, for `Hook.observe`."""

    verified: Optional[Verified] = None  # None before the signature is checked
    call: Optional[Call] = None  # None before the operation is known
    outcome: Optional[Outcome] = None  # ends the plot of Proxy.begin
    unsigned = False  # whether it has no signature, and a route may let it through
    in_loop = False  # whether the event loop waits for an upstream
    spooled: Optional[BinaryIO] = None  # the temporary file of a long body
    status = reply_bytes = 0
    error = "-"  # the error code in the answer
    reason = ""  # the row of REFUSALS if the signature was refused, or "policy"
    refused: Optional[ServiceError] = None
    seconds = 0.0
    reply: Optional[Reply] = None  # of an embedded call, it leaves when the store has saved it

    def __init__(self, request: Request, at: float, request_id: str, service: str = "") -> None:
        self.request = request
        self.started = at  # seconds since 1970
        self.began = time.monotonic()
        self.request_id = request_id
        if known := request.template and request.template.known:
            self.service, self.wire, *_ = known
        else:
            self.service = service or claim(request)[1].service
            self.wire = wire_protocol(request, self.service)

    @property
    def access_key_id(self) -> str:
        """Return the key that signed it, with a `?` in front if the signature was not verified."""
        if self.call:
            return self.call.caller.access_key_id
        claimed = claim(self.request)[0]
        return f"?{claimed}" if claimed else "-"

    @property
    def action(self) -> str:
        """Return the action; without a Call, the one that the head names."""
        if self.call:
            return self.call.action
        service = self.wire.service(self.request) or claim(self.request)[1].service
        return f"{service or '-'}:{self.wire.named(self.request)[:MAX_SHOWN] or '-'}"

    @property
    def answered_by(self) -> str:
        """The host that a call was sent to, or what answered it here."""
        if not self.call or not self.call.route:
            return "-"
        return self.call.upstream_host[:MAX_SHOWN] or getattr(self.call.route.target, "name", "-")

    @property
    def request_bytes(self) -> int:
        """Return the Content-Length, 0 if it is missing or malformed."""
        length = self.request.header("content-length")
        return int(length) if length and _DIGITS.fullmatch(length) else 0

    @property
    def attempt(self) -> int:
        """Return the number of the SDK's attempt, from 1 on; 0 if it is unknown."""
        match = _ATTEMPT.search(self.request.header("amz-sdk-request") or "")
        return int(match[1]) if match else 0


# [7.2] The interface of hooks
class Hook:
    """Watches or changes calls; a subclass, or a module, has some of these functions.

    `before` runs in the order of the hooks, `after` and `observe` in reverse.  A ServiceError of
    a hook is the answer.  Any other exception is logged, and the call gets InternalFailure."""

    def concerns(self, call: Call) -> bool:
        """Return whether to run `before`, `rewrite` and `after` for this call; do not block."""
        return True

    def before(self, call: Call) -> Optional[Reply]:
        """Return a Reply to answer a verified call, None to let it go on.

        If the hook changes `call.input`, the call is encoded again in its own protocol."""

    def rewrite(self, call: Call, outgoing: Request) -> Optional[Request]:
        """Return another request to sign and send, without hop-by-hop headers, or None."""

    def after(self, call: Call, reply: Reply) -> Optional[Reply]:
        """Return another answer, or None to keep this one of the proxy or the upstream."""

    def observe(self, exchange: Exchange) -> None:
        """Look at an answered or refused request; do not block."""


def run_hook(act: Callable[..., Any], *given: Any) -> Any:
    """Return what the code of a hook returns; turn a SystemExit and the like into RuntimeError."""
    try:
        return act(*given)
    except Exception:
        raise
    except BaseException as error:  # a hook may call sys.exit(), which would end the process
        raise RuntimeError(f"a hook raised {type(error).__name__}: {error}") from error


def stamp_of(path: str) -> Optional[tuple[int, ...]]:
    """Return values that change with a file: () for no file, None for a pipe or a device."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return None  # it is read only once: to open a FIFO may wait for its writer
        return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns
    return ()


class Watched:
    """Keeps the value of `read` for a file, and reads again if this file or `more` changes."""

    def __init__(self, read: Callable[[str], Any], path: str, more: str = "") -> None:
        self._read, self._paths = read, (path, more)
        self._stamps = list(map(stamp_of, self._paths))
        self.value = read(path)

    def refresh(self) -> bool:
        """Read the files again if they have changed, and return whether there is a new value."""
        stamps = list(map(stamp_of, self._paths))
        if stamps == self._stamps or None in stamps:
            return False
        self._stamps = stamps
        try:
            self.value = self._read(self._paths[0])
        except (OSError, ValueError) as error:
            log.error("%s not read again, keeping the old contents: %s", self._paths[0], error)
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self._stamps = []
            return False
        log.warning("%s read again", self._paths[0])
        return True


def _read_hook(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"awsproxy_hook_{pathlib.Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError("its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        run_hook(spec.loader.exec_module, module)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    known, moments = HookMethods._fields, HookMethods._fields[:-1]
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if own and inspect.isfunction(value) and name not in known and name[0] != "_":
            meant = did_you_mean(name, known)
            raise ValueError(f"{name} is no moment of a hook{meant} (a _ makes it private)")
        if name in known and not callable(value):
            raise ValueError(f"{name} is no function")
    if not any(hasattr(module, moment) for moment in moments):
        raise ValueError(f"it has none of {', '.join(moments)}")
    return module


HookFile = functools.partial(Watched, _read_hook)  # a hook in a file; its value is the module


# [7.3] The access log
class LineWriter:
    """Writes lines to a stream in a thread, so that callers never wait for a slow reader."""

    MOST = 5000  # lines that wait; more are dropped and counted
    PAUSE = 0.02  # seconds after a write; the lines of this time are written together
    # Lines that one write takes whole, so that no other process can cut them; or a longer line.
    SHORT = re.compile(rf"(?s).{{0,{select.PIPE_BUF - 1}}}\n|.+?\n|.+")

    def __init__(self, stream: Any, path: str = "") -> None:
        self.dropped = 0
        self._stream, self._path = stream, path
        self.is_terminal = bool(getattr(stream, "isatty", bool)())
        self.in_colour = self.is_terminal and not os.environ.get("NO_COLOR")  # no-color.org
        # Lines, and functions to call when the lines before them are written.
        self._lines: queues.SimpleQueue[Union[str, Callable[[], None]]] = queues.SimpleQueue()
        self._batch: list[Union[str, Callable[[], None]]] = []  # that is being written
        threading.Thread(target=self._work, daemon=True).start()

    def write(self, line: str) -> None:
        """Queue a line for the thread, or drop it if too many lines wait."""
        if self._lines.qsize() + len(self._batch) < self.MOST:
            self._lines.put(line)
        else:
            self.dropped += 1

    def reopen(self) -> None:
        """Let the thread open the log file again, because it was moved."""
        if self._path:
            self._lines.put(self._open)

    def close(self, timeout: float = 1.0) -> None:
        """Wait until all lines are written, up to `timeout` seconds."""
        written = threading.Event()
        self._lines.put(written.set)
        written.wait(timeout)

    def _work(self) -> None:
        while True:
            self._batch = [self._lines.get()]
            self._batch += [self._lines.get() for _ in range(self._lines.qsize())]
            lines = [it for it in self._batch if isinstance(it, str)]
            try:
                for piece in self.SHORT.findall("".join(lines)):
                    self._stream.write(piece)
                    self._stream.flush()
            except (OSError, ValueError):  # the reader is gone
                self.dropped += len(lines)
            batch, self._batch = self._batch, []
            for act in filter(callable, batch):
                act()
            time.sleep(self.PAUSE)

    def _open(self) -> None:
        try:
            old, self._stream = self._stream, open_log(self._path)
        except OSError as error:
            log.error("the log file cannot be opened again; keeping the old one: %s", error)
            return
        with contextlib.suppress(OSError, ValueError):  # its buffer cannot be written
            old.close()


class AccessLog(Hook):
    """Writes a line without secrets for each exchange; columns and colours are for a terminal."""

    def __init__(self, stream: Any, form: str) -> None:
        self._stream, self._form = stream, form

    def observe(self, exchange: Exchange) -> None:
        """Write one line, in one write.  Texts that callers sent are escaped and cut."""
        second, fraction = divmod(exchange.started, 1)
        call, route = exchange.call, exchange.call and exchange.call.route
        decision, reason = call and call.decision, exchange.reason
        if decision and reason == "policy":
            reason += f" {decision.statement or 'none'} {decision.resource}"
        fields = {"time": f"{_utc(int(second), '%Y-%m-%dT%H:%M:%S')}.{int(fraction * 1000):03d}Z",
            "peer": exchange.request.peer, "key": exchange.access_key_id,
            "action": exchange.action[:MAX_SHOWN], "status": exchange.status,
            "error": exchange.error, "ms": round(exchange.seconds * 1000, 2),
            "request_id": exchange.request_id,
            "route": route.pattern if route else "-", "target": exchange.answered_by,
            "upstream_request_id": (call and call.upstream_id) or "-",
            "reason": reason.replace(" ", "-") or "-"}  # fmt: skip
        if self._form == "json":
            proof, key = exchange.verified and exchange.verified.proof, call and call.upstream_key
            fields |= {"resource": decision.resource if decision else "-",
                "decision": decision.verdict if decision else "-",
                "statement": decision.statement if decision else "-",
                "canonical_request": proof.string_to_sign[-64:].decode() if proof else "-",
                "upstream_key": key or "-",
                "upstream_role": (call and key and call.caller.upstream_role_arn) or "-",
                "client": call.caller.name if call else "-",
                "region": call.region if call else claim(exchange.request)[1].region or "-",
                "upstream_ms": round(max(0.0, call.upstream_seconds if call else 0.0) * 1000, 2),
                "request_bytes": exchange.request_bytes, "reply_bytes": exchange.reply_bytes,
                "attempt": exchange.attempt,
                "user_agent": exchange.request.header("user-agent") or "-"}  # fmt: skip
            line = json.dumps({name: _cut(value) for name, value in fields.items()})
        elif self._form == "text":
            line = " ".join(map(str, fields.values()))
            is_plain = line.isascii() and line.isprintable() and "\\" not in line
            if not is_plain or len(line) >= 1024 or line.count(" ") >= len(fields):
                line = " ".join(map(_one_word, fields.values()))
        else:  # in columns, for a person
            words = {name: _one_word(value) for name, value in fields.items()}
            status = words["status"]
            if self._form == "colours":
                status = f"\033[{_COLOURS.get(exchange.status // 100, 0)}m{status}\033[0m"
            line = f"{words['time'][11:23]}  {status} {fields['ms']:>8.1f} ms  {words['peer']:<9}"
            line += f"  {words['key']:<16}  {words['action']:<32}  {words['target']:<8}"
            faults = [words[name] for name in ("error", "reason") if words[name] != "-"]
            line = f"{line}  {': '.join(faults)}".rstrip()
        self._stream.write(line + "\n")


def _one_word(value: Any) -> str:
    """Return a field of a text line: one short word in printable ASCII."""
    text = str(value)[:MAX_SHOWN].encode("unicode_escape").decode("ascii")[:MAX_SHOWN]
    return text.replace(" ", r"\x20") or "-"


def _cut(value: Any) -> Any:
    """Return a field of a JSON line, cut short: JSON may turn one character into twelve."""
    if not isinstance(value, str) or len(value) <= MAX_SHOWN // 8:
        return value
    text = value[:MAX_SHOWN]
    return text if text.isascii() and text.isprintable() else text[: MAX_SHOWN // 8]


def open_log(path: str) -> Any:
    """Return a log file that is written line by line.  Raise OSError if it cannot be opened."""
    return open(path, "a", buffering=1, encoding="ascii", errors="backslashreplace")


# [7.4] Explanations
Step = tuple[str, Sequence[tuple[str, str]]]  # a title, and lines with their labels
_SECRET = re.compile(  # a header, or a parameter of a query
    rf"(?is)^((?:cookie2?|proxy-authorization|[\w-]{{0,99}}(?:token|customer-key)"
    rf"|authorization(?!: (?-i:{ALGORITHM}) )): ?).*"
    r"|((?:^|(?<=[?&;]))(?=[^&;=]{0,99}(?:token|assertion|%))[^&;=]{0,99}=)[^&;]*")  # fmt: skip
_SIGNATURE_SHOWN = re.compile("(?i)(Signature=[^&, ]{12})[^&, ]*")
MAX_EXPLANATION = 16384  # characters


def explain(exchange: Exchange) -> Iterator[Step]:
    """Yield a call step by step, without secrets, tokens and bodies."""
    call, verified, refused = exchange.call, exchange.verified, exchange.refused
    proof = verified.proof if verified else refused and refused.proof
    body = f"{exchange.request_bytes} bytes"
    if verified and _SHA256_HEX.fullmatch(verified.payload_hash):
        body += f", SHA-256 {verified.payload_hash}"
    yield "request", [*_shown_request(exchange.request), ("body", body)]
    if proof:
        yield from _explained_signature(exchange.request, proof)
    verdict = "no signature was checked"
    if refused:
        verdict = f"{exchange.error}: {refused.message.partition(chr(10))[0]}"
    elif verified and proof:
        who = f"client [{verified.client.name}], key {verified.client.access_key_id}"
        verdict = f"the signature is right: {who}"
    cause = [("cause", refused.cause)] if refused and refused.cause else []
    yield "verdict", [("", verdict), *cause]
    if call and call.route:
        route = f"{call.action} matches {call.route.pattern}, answered by {exchange.answered_by}"
        yield "route", [("", route)]
    if call and call.sent:
        yield f"sent to {call.upstream_host}", _shown_request(call.sent)
    if exchange.status:
        size, took = f"{exchange.reply_bytes} bytes", f"{exchange.seconds * 1000:.1f} ms"
        yield "reply", [("", f"{exchange.status}, {size}, {took}")]


def _without_secrets(text: str) -> str:
    return _SIGNATURE_SHOWN.sub(r"\1...", _SECRET.sub(r"\1\2<hidden>", text))


def _shown_request(request: Request) -> Sequence[tuple[str, str]]:
    head = f"{request.method} {_without_secrets(request.target)} HTTP/1.1"
    return [("", head), *(("", _without_secrets(f"{name}: {it}")) for name, it in request.headers)]


def _explained_signature(request: Request, proof: Proof) -> Sequence[Step]:
    claimed = authorization_of(request)
    method, path, query, block, names, payload = proof.parts
    canonical = [("method", method), ("path", path), ("query", _without_secrets(query))]
    canonical += [("header", _without_secrets(it)) for it in block.removesuffix("\n").split("\n")]
    canonical += [("", ""), ("signed headers", names), ("payload hash", payload)]
    about = ("algorithm", "time", "scope", "hash of step 1")
    text = [*zip(about, proof.string_to_sign.decode("latin-1").split("\n"))]
    # The secret of the demo client is public.
    demo, earlier = _DEMO.secret_access_key, '"AWS4" + secret'
    is_demo, key = prove(claimed, demo, proof.parts) == proof, b"AWS4" + demo.encode()
    chain = []
    for name, part in zip(("kDate", "kRegion", "kService", "kSigning"), claimed.scope):
        key = hmac.digest(key, part.encode("latin-1"), "sha256")
        chain.append((name, f'HMAC({earlier}, "{part}")' + (f" = {key.hex()}" if is_demo else "")))
        earlier = name
    both = (("computed", proof.signature), ("received", claimed.signature))
    cut = [(name, value if is_demo else f"{value[:12]}...") for name, value in both]
    cut.append(("", "they are equal" if proof.signature == claimed.signature else "they differ"))
    return [("1 canonical request", canonical), ("2 string to sign", text),
        ("3 signing key", chain), ("4 signature: HMAC(kSigning, step 2)", cut)]  # fmt: skip


def explanation(steps: Iterable[Step], coloured: bool = False) -> str:
    """Return the text of an explanation in ASCII, cut at MAX_EXPLANATION characters."""
    lines = []
    for title, labelled in steps:
        lines.append(f"\033[1m{title}\033[0m" if coloured else title)
        for label, line in labelled:  # a refusal may repeat what a caller sent
            shown = re.sub("[^ -~]", lambda match: f"\\x{ord(match[0]):02x}", line)
            lines.append(f"  {label:<15} {shown}".rstrip() if label else f"  {shown}")
    return "\n".join(lines)[:MAX_EXPLANATION]


class Explainer(AccessLog):
    """Prints an explanation of each call."""

    def observe(self, exchange: Exchange) -> None:
        """Print one explanation, in one write."""
        title = f"==== {_one_word(exchange.action)} {exchange.status} {exchange.error}"
        text = explanation([(title, ()), *explain(exchange)], self._form == "colours")
        self._stream.write(text + "\n\n")


# [7.5] Metrics
class Metrics(Hook):
    """Counts calls for Prometheus.

    Strangers cannot add names without limit.  Without a verified signature the client is "-".
    New operations are "other" after MAX_OPERATIONS, codes after MAX_ROWS, all after twice that."""

    MAX_OPERATIONS = 500
    MAX_ROWS = 5000
    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
    THROTTLES = frozenset("OverLimit RequestLimitExceeded RequestThrottled SlowDown Throttling"
        " ThrottlingException TooManyRequestsException".split())  # fmt: skip

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: set[tuple[str, str]] = {("-", "-")}
        self._rows: dict[tuple[Any, ...], list[int]] = {}  # by client, service, ..., attempt
        self._bytes_in = self._bytes_out = 0
        self._refusals = Counts()
        self._targets = Counts()  # by route and host
        self._sums = {"request": 0.0, "upstream": 0.0}  # of seconds
        self._times = {name: [0] * (len(self.BOUNDS) + 1) for name in self._sums}  # by bound
        self._gauges: dict[str, tuple[str, str, Callable[[], Any]]] = {}

    def gauge(self, name: str, help_text: str, read: Callable[[], Any], labels: str = "") -> None:
        """Add a gauge; `read` returns its value, or with labels a map from labels to values."""
        self._gauges[name] = (help_text, labels, read)

    def observe(self, exchange: Exchange) -> None:
        """Count one exchange."""
        call = exchange.call
        of_call = (call.caller.name, call.service, call.operation) if call else ("-", "-", "-")
        key = (*of_call, exchange.status, exchange.error, exchange.attempt)
        with self._lock:
            row = self._rows.get(key) or self._rows.setdefault(self._new_row(key), [0])
            row[0] += 1
            self._bytes_in += exchange.request_bytes
            self._bytes_out += exchange.reply_bytes
            self._time("request", exchange.seconds)
            if call and call.upstream_seconds > 0:
                self._time("upstream", call.upstream_seconds)
            if exchange.reason:
                self._refusals[(exchange.reason,)] += 1
            if call and call.route:
                target = (call.route.pattern, exchange.answered_by)
                if target not in self._targets and len(self._targets) >= self.MAX_OPERATIONS:
                    target = (call.route.pattern, "other")
                self._targets[target] += 1

    def _time(self, name: str, seconds: float) -> None:
        self._times[name][bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self._sums[name] += seconds

    def _new_row(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the key that counts such calls, a common one if there are too many."""
        client, service, operation, status, code, attempt = key
        if len(self._operations) <= self.MAX_OPERATIONS:
            self._operations.add((service, operation))
        if (service, operation) not in self._operations:
            service = operation = "other"
        code = code if len(self._rows) < self.MAX_ROWS else "other"
        key = (client, service, operation, status, code, min(attempt, 10))
        if len(self._rows) >= 2 * self.MAX_ROWS and key not in self._rows:
            return ("other", "other", "other", status // 100 * 100, "other", 0)
        return key

    @property
    def total(self) -> int:
        """Return how many requests were answered."""
        return sum(self._times["request"])

    def text(self) -> str:
        """Return all metrics (Prometheus, "Exposition formats", text format 0.0.4)."""
        page: list[str] = []
        calls, attempts, throttles = Counts(), Counts(), Counts({(): 0})
        sizes = {("in",): self._bytes_in, ("out",): self._bytes_out}
        with self._lock:
            for key, (count,) in self._rows.items():
                *_, status, code, attempt = key
                calls[key[:-1]] += count
                attempts[(attempt,)] += count
                throttles[()] += count if code in self.THROTTLES or status == 429 else 0
            for name, names, about, counts in (
                ("requests", "client service operation status code", "Requests answered.", calls),
                ("attempts", "attempt", "Requests by attempt of their SDK; 0 is none.", attempts),
                ("refusals", "reason", "Signatures refused.", self._refusals),
                ("targets", "route target", "Calls by route and target.", self._targets),
                ("bytes", "direction", "Bytes of bodies.", sizes),
                ("throttles", "", "Answers that throttle.", throttles)):  # fmt: skip
                page += _lines(f"{name}_total", names, sorted(counts.items()), "counter", about)
            for name, counted in self._times.items():
                buckets = zip(zip((*self.BOUNDS, "+Inf")), itertools.accumulate(counted))
                page += _lines(f"{name}_seconds", "", (), "histogram", f"Time the {name} took.")
                page += _lines(f"{name}_seconds_bucket", "le", buckets)
                page += _lines(f"{name}_seconds_sum", "", [((), self._sums[name])])
                page += _lines(f"{name}_seconds_count", "", [((), sum(counted))])
        for name, (about, labels, read) in self._gauges.items():
            values = read() if labels else {(): read()}
            page += _lines(name, labels, values.items(), "gauge", about)
        copy, about = (__version__, file_sha256()[:12]), "Which copy of the file this is."
        page += _lines("build_info", "version sha256", [(copy, 1)], "gauge", about)
        return "\n".join(page) + "\n"


def _lines(name: str, names: str, samples: Any, kind: str = "", about: str = "") -> Iterator[str]:
    """Yield a line for each sample: the values of the labels with these names, and its own."""
    if kind:
        yield from (f"# HELP awsproxy_{name} {about}", f"# TYPE awsproxy_{name} {kind}")
    for labels, value in samples:
        pairs = zip(names.split(), labels)
        text = ",".join(f'{label}="{str(it).translate(_ESCAPES)}"' for label, it in pairs)
        shown = f"{{{text}}}" if text else ""
        yield f"awsproxy_{name}{shown} {_NUMBERS.get(repr(value), repr(value))}"


def join_metrics(pages: Sequence[str], _: int) -> str:
    """Return the metrics of several processes as if one had counted all calls."""
    families: dict[str, dict[str, Any]] = {}  # lines without their numbers, and the numbers
    for line in itertools.chain(*(page.strip("\n").split("\n") for page in pages)):
        text, last = line.rsplit(" ", 1)
        if line.startswith("#"):
            family = families.setdefault(name := line.split(" ")[2], {})
            family[line] = None
            continue
        number: float = int(last) if last.isdigit() else float(last)
        join: Any = _GAUGE_JOINS.get(name[len("awsproxy_") :], operator.add)
        family[text] = join(family[text], number) if text in family else number
    lines = itertools.chain(*(family.items() for family in families.values()))
    shown = (it if n is None else f"{it} {_NUMBERS.get(repr(n), repr(n))}" for it, n in lines)
    return "\n".join(shown) + "\n"


@functools.lru_cache(maxsize=1)
def file_sha256() -> str:
    """Return the SHA-256 of this file in hex."""
    return hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()


# [7.6] Messages in flight
class InFlight(Hook):
    """Counts the messages that workers hold by queue, of SQS in memory and of forwarded SQS.

    A worker holds a message from its receive until it is deleted, made visible, or times out."""

    REMEMBERED = 2 * MAX_IN_FLIGHT  # receipt handles
    XML_ID = re.compile(rb"<\w+BatchResultEntry>\s*<Id>([^<]*)<")
    # The queue is region/account/name.  The timeout ends at `until`: infinity while it is unknown.
    # The hold began at `since`, on the monotonic clock.
    Hold = collections.namedtuple("Hold", "queue until since")
    NOTED = frozenset("ChangeMessageVisibility DeleteMessage DeleteQueue PurgeQueue"
        " ReceiveMessage SetQueueAttributes".split())  # fmt: skip

    def __init__(self, ask: Ask, run: Run, clock: Clock = steady_time) -> None:
        self._ask, self._run, self._clock = ask, run, clock
        self.others: Sequence[int] = ()  # pipes to other processes, which hold the same messages
        self._heard = b""  # a part of a line from another process
        self._lock = threading.Lock()
        # Messages and receipt handles by hash: a handle of AWS's is up to 1,024 bytes long.
        self._messages: OrderedDict[int, tuple[int, str]] = OrderedDict()  # by handle
        self._held: dict[int, InFlight.Hold] = {}  # by message id
        self._deleted: OrderedDict[int, float] = OrderedDict()  # message ids, since when
        self._ends: list[tuple[float, int]] = []  # a heap; stale entries are skipped
        self._timeouts: dict[tuple[str, float], int] = {}  # by queue and minute

    def counts(self) -> dict[str, int]:
        """Return how many messages are held, by queue."""
        with self._lock:
            self._expire()
            return dict(collections.Counter(h.queue.split("/", 1)[1] for h in self._held.values()))

    @property
    def total(self) -> int:
        """Return how many messages are held."""
        with self._lock:
            self._expire()
            return len(self._held)

    def forget(self, name: str = "") -> None:
        """Forget all messages, or only those in queues whose region/account/name ends so."""
        self._share("_forget", name)

    def _share(self, change: str, *given: Any) -> None:
        """Change the counts here and in the other processes, by the method of this name."""
        with self._lock:
            getattr(self, change)(*given)
        line = f"{_COMPACT.encode([change, *given])}\n".encode() if self.others else b""
        for pipe in self.others if len(line) <= select.PIPE_BUF else ():  # not in two parts
            with contextlib.suppress(OSError):  # it hangs or has ended: its counts expire
                os.write(pipe, line)

    def hear(self, pipe: int) -> None:
        """Make the changes that other processes share through a pipe."""
        *lines, self._heard = (self._heard + os.read(pipe, 65536)).split(b"\n")
        for change, *given in map(json.loads, lines):
            with self._lock:
                getattr(self, change)(*given)

    def _forget(self, name: Optional[str]) -> None:
        self._timeouts.clear()
        if name is not None:
            held = self._held.items() if name else ()
            self._held = {m: it for m, it in held if not f"/{it.queue}".endswith(f"/{name}")}

    def observe(self, exchange: Exchange) -> None:
        """Count the messages of an answered call."""
        if exchange.call and exchange.reply:
            self.note(exchange.call, exchange.reply)

    def note(self, call: Call, reply: Reply) -> None:
        """Count the messages of a call and its answer."""
        noted = call.operation.removesuffix("Batch") in self.NOTED and call.service == "sqs"
        if not noted or reply.status != 200 or call.wire.is_opaque:
            return
        operation, given = call.operation, call.input
        url: str = given.get("QueueUrl") or call.request.path
        *_, account, name = ("", *url.rstrip("/").split("/"))
        queue = f"{call.region}/{account or call.caller.account_id}/{name}"
        if operation == "ReceiveMessage":
            self._take(call, queue, given.get("VisibilityTimeout"), reply)
        elif operation in ("DeleteQueue", "PurgeQueue", "SetQueueAttributes"):
            self._share("_forget", None if operation == "SetQueueAttributes" else queue)
        else:
            entries = [given]
            if operation.endswith("Batch"):
                done = set(found_in(reply, self.XML_ID, "Successful", "Id"))
                entries = [entry for entry in given["Entries"] if entry["Id"] in done]
            ended = [(hash(it["ReceiptHandle"]), it.get("VisibilityTimeout")) for it in entries]
            self._share("_end", call.began, ended)

    def _take(self, call: Call, queue: str, timeout: Optional[int], reply: Reply) -> None:
        ids = found_in(reply, re.compile(rb"<MessageId>([^<]*)<"), "Messages", "MessageId")
        if not ids:
            return
        now = self._clock()
        if timeout is None:
            timeout = self._timeouts.get((queue, now // 60))
        until = math.inf if timeout is None else now + timeout
        taken = [(hash(it), hash(handle)) for it, handle in zip(ids, receipt_handles(reply))]
        self._share("_add", call.began, queue, until, taken)
        if timeout is None:
            self._run(functools.partial(self._learn, call, queue, now, [it for it, _ in taken]))

    def _add(self, began: float, queue: str, until: float, taken: Sequence[Sequence[int]]) -> None:
        self._expire()
        for message_id, handle in taken:
            if self._deleted.get(message_id, -math.inf) > began:
                continue  # by another handle, while this answer was on its way
            self._messages[handle] = message_id, queue
            self._hold(message_id, queue, until)
        while len(self._messages) > self.REMEMBERED:
            self._messages.popitem(last=False)

    def _learn(self, call: Call, queue: str, taken: float, ids: Sequence[int]) -> None:
        """Ask for the visibility timeout of messages that were received at `taken`."""
        try:
            timeout = self._ask(call, queue)
        except Exception as error:
            log.warning("the timeout of %s is not known, assuming 30 s: %s", queue, error)
            timeout = 30  # the default of SQS
        with self._lock:
            if len(self._timeouts) >= 1000:
                self._timeouts.clear()
            self._timeouts[queue, self._clock() // 60] = timeout
        self._share("_extend", queue, taken + timeout, ids)

    def _extend(self, queue: str, until: float, ids: Sequence[int]) -> None:
        for message_id in ids:
            if self._held.get(message_id, ())[:2] == (queue, math.inf):  # its end is unknown
                self._hold(message_id, queue, until)

    def _hold(self, message_id: int, queue: str, until: float) -> None:
        self._held[message_id] = self.Hold(queue, until, time.monotonic())
        heapq.heappush(self._ends, (until, message_id))
        if len(self._ends) > 2 * len(self._held) + 1000:
            self._ends = sorted((hold.until, held_id) for held_id, hold in self._held.items())

    def _end(self, began: float, given: Sequence[tuple[int, Optional[int]]]) -> None:
        """End or change the holds of messages; any handle of a message works in its own queue."""
        for handle, timeout in given:
            message_id, queue = self._messages.get(handle, (0, ""))
            hold = self._held.get(message_id)
            if not queue or (hold and hold.queue != queue):
                continue
            if timeout:
                self._hold(message_id, queue, self._clock() + timeout)
            elif timeout is None:
                self._held.pop(message_id, None)
                del self._messages[handle]
                self._deleted[message_id] = time.monotonic()
                if len(self._deleted) > self.REMEMBERED // 100:
                    self._deleted.popitem(last=False)
            elif hold and hold.since < began:  # not received again since
                del self._held[message_id]

    def _expire(self) -> None:
        while self._ends and self._ends[0][0] <= self._clock():
            until, message_id = heapq.heappop(self._ends)
            if (hold := self._held.get(message_id)) and hold.until == until:
                del self._held[message_id]


# [7.7] Protection of an ECS task
class TaskProtection(InFlight):
    """Keeps an ECS task from being scaled in while messages are in flight.

    It asks for protection before the first messages are handed out, renews it, and gives it back
    with the last one.  A failing agent fails no receive ("Task scale-in protection endpoint")."""

    PATIENCE = 3  # seconds that a receive may wait for the agent
    MINUTES = 60  # of protection, at the least; it is renewed after half of them
    BACKOFF = (1, 2, 5, 10, 30, 60)

    def __init__(self, agent_uri: str, ask: Ask, run: Run, clock: Clock = steady_time) -> None:
        super().__init__(ask, run, clock)
        self._url = f"{agent_uri.rstrip('/')}/task-protection/v1/state"
        self._fetch = fetch
        self._protected_until = self._not_before = 0.0
        self._pauses = iter(self.BACKOFF)
        self._agent = threading.Lock()  # one request at a time

    def concerns(self, call: Call) -> bool:
        """Return whether the answer may have to wait for protection."""
        return call.operation == "ReceiveMessage" and call.service == "sqs"

    def observe(self, exchange: Exchange) -> None:
        """Count the messages of other calls, and give protection back with the last message."""
        if exchange.call and not self.concerns(exchange.call):
            super().observe(exchange)
        if self._protected_until and not self.total:
            self.tend_later()

    def after(self, call: Call, reply: Reply) -> Reply:
        """Count the received messages; with the first, wait up to PATIENCE for protection."""
        try:
            self.note(call, reply)
        except Exception as error:  # an upstream may accept what the model does not
            log.warning("in flight: the messages of %s are not counted: %r", call.operation, error)
        if self.total and self._protected_until <= self._clock():
            self.tend()
        return reply

    def tend_later(self) -> None:
        """Run `tend` in the background, if it would not wait; call this every half second."""
        waits = self._agent.locked() or self._clock() < self._not_before
        if not waits and (self._protected_until or self.total):
            self._run(self.tend)

    def tend(self) -> None:
        """Ask for protection, renew it or give it back, if necessary."""
        with self._agent:
            now, busy = self._clock(), self.total > 0
            with self._lock:
                ends = [hold.until for hold in self._held.values() if hold.until < math.inf]
            minutes = min(max(self.MINUTES, math.ceil((max(ends, default=now) - now) / 30)), 2880)
            due = busy and self._protected_until - now < minutes * 30
            if now < self._not_before or not (due or (self._protected_until and not busy)):
                return
            wanted = {"ProtectionEnabled": busy, **({"ExpiresInMinutes": minutes} if busy else {})}
            if not busy:  # the next receive must wait, and ask again
                self._protected_until = min(self._protected_until, now)
            given = (self._url, {"Content-Type": "application/json"}, self.PATIENCE)
            try:
                answer = json.loads(self._fetch(*given, data=_to_json(wanted), method="PUT"))
                if failure := answer.get("failure") or answer.get("error"):
                    raise ValueError(failure.get("Reason") or failure.get("Code"))
            except (NoKeys, ValueError, AttributeError, RecursionError) as error:
                pause = next(self._pauses, self.BACKOFF[-1])
                self._not_before = self._clock() + pause  # not `now`: the agent may hang
                log.warning("task protection not changed, next try in %d s: %s", pause, error)
                return
            self._pauses = iter(self.BACKOFF)
            self._protected_until = now + minutes * 60 if busy else 0.0


# [7.8] The inspector
class Inspector(Hook):
    """Keeps the last calls for the page at `/_awsproxy/`, in a bounded room."""

    MOST = 200
    MOST_TEXT = 65536  # characters of one call
    MOST_BODY = 4096

    def __init__(self, least_number: Callable[[], int] = int) -> None:
        self._lock, self._least_number, self._last = threading.Lock(), least_number, 0
        self._calls: collections.deque[tuple[int, str]] = collections.deque(maxlen=self.MOST)

    def observe(self, exchange: Exchange) -> None:
        """Keep one call."""
        call, verified, reply = exchange.call, exchange.verified, exchange.reply
        theirs, steps = exchange.refused and exchange.refused.theirs, [*explain(exchange)]
        if verified and verified.client.secret_access_key == _DEMO.secret_access_key:
            # The secret of the demo client is public, so its bodies may be shown.
            sent = verified.body.getvalue() if isinstance(verified.body, io.BytesIO) else b""
            answered = reply.body if reply and isinstance(reply.body, bytes) else b""
            for title, body in (("request body", sent), ("reply body", answered)):
                text = body[: self.MOST_BODY].decode("utf-8", "replace")
                steps.append((title, [("", line) for line in text.splitlines()]))
        if call and call.upstream_seconds > 0:
            steps += [("upstream", [("", f"answered in {call.upstream_seconds * 1000:.1f} ms")])]
        kept = {"time": f"{_utc(int(exchange.started), '%H:%M:%S')}Z", "status": exchange.status,
            "action": exchange.action[:MAX_SHOWN], "key": exchange.access_key_id[:MAX_SHOWN],
            "error": exchange.error.replace("-", ""), "ms": round(exchange.seconds * 1000, 2),
            "theirs": _explained_signature(exchange.request, theirs)[:2] if theirs else (),
            "steps": steps}  # fmt: skip
        with self._lock:
            kept["number"] = self._last = max(self._last + 1, self._least_number())
            text = json.dumps(kept)
            if len(text) > self.MOST_TEXT:
                text = json.dumps({**kept, "steps": [("too long to be kept", ())], "theirs": ()})
            self._calls.append((self._last, text))

    def since(self, number: int) -> str:
        """Return the calls after a number (all, if it is too high), the oldest first, as JSON."""
        with self._lock:
            after = number if number <= max(self._last, self._least_number()) else 0
            return f"[{','.join(text for at, text in self._calls if at > after)}]"


def join_calls(pages: Sequence[str], until: int) -> str:
    """Return the calls of several processes up to a number; others may have a later one."""
    calls = sorted(itertools.chain(*map(json.loads, pages)), key=operator.itemgetter("number"))
    return json.dumps([it for it in calls if it["number"] <= until][-Inspector.MOST :])


def page_policy() -> tuple[str, str]:
    """Return the header that allows only the page's own script and style."""
    inline = re.findall(r"(?s)<(?:style|script)>(.*?)</", PAGE)
    style, script = (_base64_text(hashlib.sha256(text.encode()).digest()) for text in inline)
    allowed = f"script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'"
    none = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return "Content-Security-Policy", f"{none}; img-src data:; {allowed}"


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>awsproxy: calls</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark } a { color: inherit } input { font: inherit }
body { margin: auto; max-width: 75rem; padding: 0 1rem 2rem; font: 15px/1.5 system-ui, sans-serif }
header, summary { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline }
h1, h2 { font-size: 1.25rem; margin: 1rem 0 .5rem } h3 { font-size: 1rem; margin: .8rem 0 .2rem }
details { border: 1px solid #8888; margin: .3rem 0 }
summary { padding: .3rem .6rem; background: #8882; cursor: pointer } summary b { width: 2.5rem }
.good { color: light-dark(#14713d, #6fd39b) } .bad { color: light-dark(#b3261e, #ff8a80) }
details > div { padding: 0 .6rem .6rem } #table { display: block; overflow-x: auto }
table { font: 13px/1.45 ui-monospace, monospace }
td { white-space: pre-wrap; overflow-wrap: anywhere }
td, th { text-align: left; vertical-align: top; padding: 0 .8rem 0 0 }
th { font-weight: normal; opacity: .7; white-space: nowrap }
</style>
<header><h1>awsproxy</h1><a href="#queues">Queues</a>
<label>Show only <input id="filter" type="search" placeholder="SendMessage, 403, ..."></label>
<span id="state" role="status">Waiting for calls.</span></header>
<main><section id="calls" aria-label="Calls, the last one first"></section>
<h2 id="queues">Queues</h2><table id="table"></table></main>
<script>
"use strict";
const $ = (id) => document.getElementById(id);
const row = (label, ...cells) => make("tr", make("th", label), ...cells);
function make(tag, ...inner) {
  const made = document.createElement(tag);
  made.append(...inner);
  return made;
}

// Mark the characters of a text between the beginning and the end that it shares with another.
function marked(text, other) {
  const longer = other.length - text.length;
  let start = 0, end = text.length;
  while (start < end && text[start] === other[start]) start++;
  while (end > Math.max(start, start - longer) && text[end - 1] === other[end - 1 + longer]) end--;
  const middle = text === other ? "" : make("mark", text.slice(start, end) || "\u2038");
  return make("td", text.slice(0, start), middle, text.slice(end));
}

function step([title, lines], theirs) {
  const signed = theirs.find(([name]) => name === title)?.[1], table = make("table");
  if (signed) table.append(row("", make("th", "awsproxy computed"), make("th", "client signed")));
  for (let at = 0; at < Math.max(lines.length, signed?.length ?? 0); at++) {
    const [label, ours] = lines[at] || ["", ""], [name, other] = signed?.[at] || ["", ""];
    const cells = signed ? [marked(ours, other), marked(other, ours)] : [make("td", ours)];
    table.append(row(label || name, ...cells));
  }
  return [make("h3", title), table];
}

let last = 0;
function add(call) {
  const status = make("b", call.status);
  status.className = call.status < 400 ? "good" : "bad";
  const about = [call.time, call.action, `${call.ms} ms`, call.key, call.error];
  const entry = make("details", make("summary", status, ...about.map((it) => make("span", it))),
    make("div", ...call.steps.flatMap((it) => step(it, call.theirs))));
  entry.dataset.text = [call.status, ...about].join(" ").toLowerCase();
  $("calls").prepend(entry);
  $("calls").children[200]?.remove();
  last = call.number;
  $("state").replaceChildren(`The last ${$("calls").children.length} calls.`);
}

function filter() {
  const wanted = $("filter").value.toLowerCase();
  for (const entry of $("calls").children) entry.hidden = !entry.dataset.text.includes(wanted);
}

async function update() {
  const calls = await (await fetch(`calls?after=${last}`)).json();
  if (calls[0]?.number <= last) $("calls").replaceChildren();  // it was restarted
  calls.forEach(add);
  filter();
  const answer = await fetch("queues"), queues = answer.ok ? await answer.json() : [];
  const names = ["region", "account", "visible", "in_flight", "delayed"];
  $("table").replaceChildren(row("name", ...names.map((name) => make("th", name))),
    ...queues.map((it) => row(it.name, ...names.map((name) => make("td", it[name])))));
}
const poll = () => update()
  .catch((error) => $("state").replaceChildren(`awsproxy does not answer: ${error.message}`))
  .finally(() => setTimeout(poll, 1000));

$("filter").oninput = filter;
poll();
</script>
"""


# ==== 8. The proxy: Embedded, Route, Policy, Guard, Tape, Store, Pending, Proxy ====


# [8.1] Targets
class Target(Protocol):
    """An object that answers the calls of a route."""

    may_block: bool  # whether it may wait for an answer

    def answer(self, call: Call, request_id: str) -> Reply:
        """Return the answer, or raise ServiceError."""


@dataclass(eq=False)
class Embedded:
    """Answers Amazon SQS from memory, and the operation of AWS STS that clients start with."""

    sqs: Sqs
    name = "embedded"
    may_block = False  # a call that would wait raises WouldWait

    def answer(self, call: Call, request_id: str) -> Reply:
        """Return the answer in the caller's protocol."""
        if call.action == "sts:GetCallerIdentity":
            client = call.caller
            arn = f"arn:aws:iam::{client.account_id}:user/{client.name}"
            identity = {"Arn": arn, "UserId": client.access_key_id, "Account": client.account_id}
            return call.wire.output(call, identity, request_id)
        if call.service != "sqs":
            raise ServiceError("AccessDenied", f"'embedded' answers only SQS, not {call.action}.")
        if call.wire.is_opaque:
            raise ServiceError("InvalidAction", "No RPC v2 here: call in AWS JSON or AWS Query.")
        if call.operation not in OPERATIONS:
            raise _invalid_action(call.operation, OPERATIONS)
        try:
            output = self.sqs.perform(call)
            if call.may_wait:  # in a worker; the loop commits the calls of a turn together
                self.sqs.commit()
            return call.wire.output(call, output, request_id)
        except ServiceError as error:
            members = OPERATIONS[call.operation].input.members
            for name in call.ignored[:1]:
                error.message += f" ({name} is no parameter{did_you_mean(name, members)})"
            raise


DEFAULT_ROUTES = (("sqs:*", "embedded"), ("sts:GetCallerIdentity", "embedded"))


class Deny:
    """Refuses each call, as an IAM policy does."""

    name = "deny"
    may_block = False

    def answer(self, call: Call, request_id: str) -> Reply:
        """Raise ServiceError AccessDenied."""
        who = f"arn:aws:iam::{call.caller.account_id}:user/{call.caller.name}"
        message = f"User: {who} is not authorized to perform: {call.action[:MAX_SHOWN]}."
        if call.route:
            message += f" The route '{call.route.pattern}=deny' of this proxy refused the call."
            message += f" To allow the call, put {call.advice} before this route."
        raise ServiceError("AccessDenied", message)


# [8.2] Routes
def _actions(table: str) -> set[str]:
    """Return the actions of a table, `service operation ...; service ...`, in lower case."""
    rows = [row.split() for row in table.lower().split(";")]
    return {f"{service}:{operation}" for service, *operations in rows for operation in operations}


# IAM's prefix for a signing name, if they differ (source: Service Authorization Reference).
IAM_PREFIXES = pairs("""cloudcontrolapi=cloudformation iot-jobs-data=iotjobsdata,iot iotdata=iot
    iotsecuredtunneling=iot monitoring=cloudwatch mturk-requester=mechanicalturk
    partnercentral-account=partnercentral partnercentral-benefits=partnercentral
    partnercentral-channel=partnercentral partnercentral-marketing=partnercentral
    partnercentral-selling=partnercentral tagging=tag ioteventsdata=iotevents""")
_PARTIQL = "PartiQLSelect,PartiQLInsert,PartiQLUpdate,PartiQLDelete"
# The actions of the same service that IAM asks for, if no action has the operation's name.
IAM_ACTIONS = pairs(f"""kms:reencrypt=ReEncryptFrom,ReEncryptTo sns:publishbatch=Publish
    dynamodb:batchexecutestatement={_PARTIQL} dynamodb:executestatement={_PARTIQL}
    dynamodb:executetransaction={_PARTIQL} dynamodb:transactgetitems=GetItem
    dynamodb:transactwriteitems=PutItem,UpdateItem,DeleteItem,ConditionCheckItem
    secretsmanager:batchgetsecretvalue=GetSecretValue sqs:deletemessagebatch=DeleteMessage
    sqs:changemessagevisibilitybatch=ChangeMessageVisibility sqs:sendmessagebatch=SendMessage
    timestream:query=Select""")
# In these services, BatchX needs the action X.
_BATCHES = re.compile("(?:bcm-pricing-calculator|iotfleetwise|verifiedpermissions):batch([a-z]+)")
# Actions that return AWS credentials, or a token that AWS exchanges for them (source: the SDKs'
# service models).  IAM cannot forbid some of them, such as GetSessionToken.
CREDENTIAL_ACTIONS = _actions("""account-access GET/access/credentials; awsssoportal
    GET/federation/credentials; cloudwatch GetSpaceCredentialsForOrganization GetSpaceDataAccess;
    codepipeline GetJobDetails GetThirdPartyJobDetails PollForJobs; cognito-identity
    GetCredentialsForIdentity GetOpenIdToken*; datazone GET/v2/domains/*/connections/*
    GET/v2/domains/*/environments/*/credentials; deadline GET/2023-10-12/farms/*-roles; eks-auth
    POST/clusters/*/assume-role-for-pod-identity; finspace-api GET/credentials/programmatic
    POST/datasets/*/dataviewsv2/*/external-access-details POST/workingLocationV1; gamelift
    CreateBuild GetComputeAccess RequestUploadCredentials; iam CreateAccessKey
    CreateServiceSpecificCredential ResetServiceSpecificCredential; iot POST/keys-and-certificate
    POST/provisioning-templates/*/provisioning-claim; lakeformation
    POST/AssumeDecoratedRoleWithSAML POST/GetTemporary*; license-manager CreateToken
    GetAccessToken; s3express CreateSession; signin POST/v1/token; lightsail CreateBucketAccessKey
    GetBucketAccessKeys; s3 CreateSession GET/v20180820/accessgrantsinstance/dataaccess; ssm
    CreateActivation GetAccessToken; sso-oauth POST/token; sts AssumeRo* GetDelegatedAccessToken
    GetFederationToken GetScopedCredentials GetSessionToken GetWebIdentityToken""")
# Actions that AWS answers without a signature, as the SDKs' service models say.
UNSIGNED_ACTIONS = _actions("""
    awsssoportal get/federation/credentials get/assignment/accounts get/assignment/roles
    post/logout; cognito-identity getcredentialsforidentity getid getopenidtoken unlinkidentity;
    cognito-idp associatesoftwaretoken changepassword completewebauthnregistration confirmdevice
    confirmforgotpassword confirmsignup deleteuser deleteuserattributes deletewebauthncredential
    forgetdevice forgotpassword getdevice gettokensfromrefreshtoken getuser
    getuserattributeverificationcode getuserauthfactors globalsignout initiateauth listdevices
    listusersessions listwebauthncredentials resendconfirmationcode respondtoauthchallenge
    revoketoken revokeusersession setusermfapreference setusersettings signup
    startwebauthnregistration updateautheventfeedback updatedevicestatus updateuserattributes
    verifysoftwaretoken verifyuserattribute; signin post/v1/token; sso-oauth post/client/register
    post/device_authorization post/token; sts assumerolewithsaml assumerolewithwebidentity""")
BEARER_SERVICES = frozenset({"account-access", "agent-registry", "bedrock", "codecatalyst"})


def glob_matches(pattern: str, text: str) -> bool:
    """Return whether the pattern matches all of the text; `*` is any text, `?` one character."""
    # It takes linear time: fnmatch lets no `*` backtrack.  It keeps the last regexes.
    return fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


def names_of(action: str) -> Sequence[str]:
    """Return the folded names of an action."""
    service, _, operation = _folded(action).partition(":")
    method, slash, _ = operation.partition("/")
    names = [operation.rstrip("/"), operation.rstrip("/") + "/", method] if slash else [operation]
    services = (service, *filter(None, IAM_PREFIXES.get(service, "").split(",")))
    return [f"{prefix}:{name}" for prefix in services for name in names]


def needed_actions(action: str) -> Sequence[str]:
    """Return the actions that IAM needs instead of one that it does not know."""
    folded, batch = action.lower(), _BATCHES.fullmatch(action.lower())
    needed = IAM_ACTIONS.get(folded, batch[1] if batch else "").split(",")
    return [f"{folded.partition(':')[0]}:{name}" for name in filter(None, needed)]


def _folded(action: str) -> str:
    """Return an action or a pattern in lower case, except for its path."""
    name, slash, path = action.partition("/")
    return name.lower() + slash + path


def passes_unsigned(action: str) -> bool:
    """Return whether AWS may answer an action without Signature Version 4."""
    is_bearer = action.partition(":")[0].lower() in BEARER_SERVICES and not set("*?") & set(action)
    return is_bearer or _folded(action) in UNSIGNED_ACTIONS


def hands_out_credentials(action: str) -> bool:
    """Return whether the answer to an action holds AWS credentials."""
    names = [name.lower() for name in names_of(action)]
    return any(glob_matches(row, name) for row in CREDENTIAL_ACTIONS for name in names)


class Route(NamedTuple):
    """A pattern of actions, as in an IAM policy, and the target that answers them."""

    pattern: str
    target: Target

    def matches(self, action: str) -> bool:
        """Return whether the pattern matches an action: loosely to deny it, strictly to allow it.

        Only an allowed path must have the same case.  If IAM needs several actions, one of them
        is enough to deny the call, and all of them allow it."""
        every, fold = (any, str.lower) if isinstance(self.target, Deny) else (all, _folded)
        pattern = fold(self.pattern)
        if any(glob_matches(pattern, fold(name)) for name in names_of(action)):
            return True
        needed = needed_actions(action)
        return bool(needed) and every(glob_matches(pattern, it.lower()) for it in needed)

    def names_exactly(self, action: str) -> bool:
        """Return whether the pattern has no wildcard and is the action with its whole path."""
        pattern, names = _folded(self.pattern), names_of(action)
        whole = [name for name in names if "/" in name] or names
        return not set("*?") & set(pattern) and pattern in whole


_NAMES = (*SPEAKS, *PROFILES, *ENDPOINT_PREFIXES, *",".join(IAM_PREFIXES.values()).split(","))
_KNOWN_NAMES = {name.lower(): name for name in _NAMES}
_OF_S3 = sorted({*S3_ACTIONS.values(), *_S3_VERSIONED.values()})
_KNOWN_OPERATIONS: Mapping[str, Iterable[str]] = {"sqs": OPERATIONS, "s3": _OF_S3,
    "s3express": [*_OF_S3, "ListAllMyDirectoryBuckets"]}  # fmt: skip


def nearest_pattern(pattern: str) -> Optional[str]:
    """Return None if a pattern can match an action; otherwise a similar pattern, or ""."""
    prefix, colon, operation = pattern.lower().partition(":")
    named = [it for name, it in _KNOWN_NAMES.items() if colon and glob_matches(prefix, name)]
    if set(pattern) == {"*"} or any(_can_match(service, operation) for service in named):
        return None
    if colon and not named and not difflib.get_close_matches(prefix, _KNOWN_NAMES, 1, 0.85):
        return None  # most services of REST are not known here
    near = named or _KNOWN_NAMES.values()
    known = [f"{it}:{name}" for it in near for name in (*_KNOWN_OPERATIONS.get(it, ()), "*")]
    return "".join(difflib.get_close_matches(pattern, known, 1, 0.4))


def _can_match(service: str, pattern: str) -> bool:
    known, spoken = _KNOWN_OPERATIONS.get(service), SPEAKS.get(service, REST_JSON)
    if pattern and "/" not in pattern and (known or spoken & {"json", "query"}):
        return any(glob_matches(pattern, name.lower()) for name in known or [pattern])
    method = re.sub("[*?].*", "*", pattern).partition("/")[0]
    is_rest = bool(spoken & {"rest-json", "rest-xml"})
    return is_rest and any(glob_matches(method, it.lower()) for it in METHODS)


# [8.3] Policies
# If a call can be read in several ways, an Allow must match all of them (strictly), and a Deny
# any of them (loosely).  NotAction and NotResource swap the two.
MAX_TEXT = 1024  # characters of a name or an ARN; a longer one is an unknown resource
MAX_CACHED = 1024  # decisions of a policy
_ACTION = re.compile(r"\*|[A-Za-z0-9_-]{1,64}:[!-~]+")
_RESOURCE = re.compile(r"\*|arn:[a-z*?-]+:[a-z0-9-]+:(?:[^:]*:[^:]*:(?s:.+)|(?:[^:]*:)?[^:]*\*)")
_PLACES = re.compile("^arn:[^:]*(?=:)(?:(:[^:]*:[^:]*:)[^:]*(?=:|[*]$))?")  # the rest stays
_OF_REST = re.compile(r"(?:\*+|any|get|head|put|post|delete|patch|options)(?:/.*)?")
# The actions of calls with the path of a function (source: the service model of Lambda).
_LAMBDA = pairs("""GET=GetFunction DELETE=DeleteFunction POST/invocations=InvokeFunction
    POST/response-streaming-invocations=InvokeFunction POST/invoke-async=InvokeAsync
    GET/configuration=GetFunctionConfiguration PUT/configuration=UpdateFunctionConfiguration
    PUT/code=UpdateFunctionCode GET/policy=GetPolicy POST/policy=AddPermission
    GET/versions=ListVersionsByFunction POST/versions=PublishVersion GET/aliases=ListAliases
    POST/aliases=CreateAlias""")
_LAMBDA_NAMES = re.compile("|".join((*_LAMBDA.values(), "Invoke.*")).lower())
_S3_BYPASS = "bypassgovernanceretention"  # an action that a header needs, but no operation
_FUNCTION_PATH = re.compile("/20[0-9]{2}-[0-9]{2}-[0-9]{2}/functions/([^/]+)((?:/[^/]+)*)/?")


class Resource(NamedTuple):
    """An ARN, or only its beginning if it is not `whole`."""

    text: str
    whole: bool = True

    @property
    def pattern(self) -> str:
        """Return the narrowest pattern that matches the resource."""
        text = self.text if self == NO_RESOURCE else _without_wildcards(self.text)
        return text if self.whole else f"{text}*"


UNKNOWN = Resource("", whole=False)
NO_RESOURCE = Resource("*")  # of an action that IAM ties to no resource
Need = tuple[str, Resource]  # an action, and the resource that it is about


class Decision(NamedTuple):
    """The answer of a policy, and the statement, action and resource that decided."""

    allowed: bool
    statement: str = ""  # its number and Sid, "" if none matched
    action: str = ""
    resource: str = ""
    verdict: str = "allow"  # or deny; or observe, if a refused call passes


class Statement(NamedTuple):
    """A statement of a policy; `not_actions` and `not_resources` negate the lists."""

    label: str
    allows: bool
    actions: Sequence[str]
    not_actions: bool = False
    resources: Sequence[str] = ("*",)
    not_resources: bool = False

    def applies(self, strict: Iterable[str], loose: Iterable[str], resource: Resource) -> bool:
        """Return whether the statement is about an action, by its names, on a resource."""
        names = loose if self.allows == self.not_actions else strict
        listed = any(_names(pattern, name) for pattern in self.actions for name in names)
        if listed == self.not_actions:
            return False
        matches = _touches if self.allows == self.not_resources else _covers
        return any(matches(it, resource) for it in self.resources) != self.not_resources


def _names(pattern: str, name: str) -> bool:
    """Return whether a pattern names an action.  `Get*` names no REST call; `GET/*` does."""
    service, _, operation = name.partition(":")
    of, _, meant = pattern.partition(":") if ":" in pattern else (service, "", pattern)
    if _OF_REST.fullmatch(operation.lower()) and not _OF_REST.fullmatch(meant.lower()):
        return False
    return of == service and glob_matches(meant, operation)


def _covers(pattern: str, resource: Resource) -> bool:
    """Return whether all readings of a resource match.  `*` matches within a part of the ARN."""
    parts = pattern.split(":", 5)
    texts = resource.text.split(":", len(parts) - 1)
    whole = resource.whole or pattern[-1] == "*"
    return whole and len(texts) == len(parts) and all(map(glob_matches, parts, texts))


def _touches(pattern: str, resource: Resource) -> bool:
    """Return whether a reading of a resource may match, in any partition and account."""
    pattern, text = (_PLACES.sub(r"arn:\1", it) for it in (pattern, resource.text))
    start = re.split("[*?]", pattern, maxsplit=1)[0]
    may = text.startswith(start) or start.startswith(text)
    return glob_matches(pattern, text) if resource.whole else may


def iam_name(action: str) -> str:
    """Return the name of an action in IAM.  A REST call without one keeps its path."""
    service, _, operation = action.partition(":")
    method, slash, path = operation.partition("/")
    if service == "lambda" and (match := _FUNCTION_PATH.fullmatch(slash + path)):
        operation = _LAMBDA.get(method + match[2], operation)
    return f"{IAM_PREFIXES.get(service, service).partition(',')[0]}:{operation}"


class Policy:
    """An IAM policy without conditions: a Deny wins, and a call needs an Allow.

    Sources: IAM User Guide, "Policy evaluation logic" and "IAM JSON policy elements"."""

    def __init__(self, statements: Iterable[Statement]) -> None:
        self.statements = sorted(statements, key=lambda statement: statement.allows)
        self._known = functools.lru_cache(maxsize=MAX_CACHED)(self._decide)

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Return the policy of a JSON document.  Raise ValueError if a part is not supported."""
        with raising(ValueError, "the policy is too deeply nested", RecursionError):
            document = json.loads(text, object_pairs_hook=_marked)
        _check_members("the policy", document, ("Version", "Id", "Statement"))
        if document.get("Version", "2012-10-17") not in ("2012-10-17", "2008-10-17"):
            raise ValueError("the Version of the policy must be 2012-10-17")
        listed = document.get("Statement")
        listed = [listed] if isinstance(listed, dict) else listed
        if not isinstance(listed, list):
            raise ValueError("the policy needs a list of statements as Statement")
        return cls(_statement(number, given) for number, given in enumerate(listed, 1))

    @classmethod
    def read(cls, path: str, more: Sequence[Statement] = ()) -> Policy:
        """Return the policy of a file, with more statements.  Raise OSError or ValueError."""
        return cls((*more, *cls.parse(pathlib.Path(path).read_text("utf-8")).statements))

    def decide(self, needs: Iterable[Need], called: str = "") -> Decision:
        """Return the first refusal of an action on a resource, otherwise the last permission.

        needs: what must be allowed, as `needs_of` returns it
        called: the action of the call; a statement that names it may deny the call, too"""
        decision = Decision(False)
        for action, it in needs:
            short = len(action) + len(called) + len(it.text) <= 2 * MAX_TEXT
            decision = (self._known if short else self._decide)(action, it, called or action)
            if not decision.allowed:
                break
        return decision

    def _decide(self, action: str, resource: Resource, called: str) -> Decision:
        strict = [*map(_folded, (*names_of(action), iam_name(action)))]
        loose = [name.lower() for name in (*strict, *names_of(called), iam_name(called))]
        if loose[-1].startswith("lambda:") and "/" in loose[-1]:  # it may be any operation
            loose.append("lambda:any/operation")
        decided = (it for it in self.statements if it.applies(strict, loose, resource))
        first = next(decided, Statement("", False, ()))
        return Decision(first.allows, first.label, iam_name(action), resource.pattern)


def _marked(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object.  If a key is repeated, add a member that no policy has."""
    found = dict(members)
    return found if len(found) == len(members) else {"a key twice": None, **found}


def _check_members(owner: str, given: Any, known: Iterable[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{owner} is not a JSON object")
    for key in given.keys() - known:
        raise ValueError(f"{owner} has {key[:80]}, which this proxy does not support")


def _statement(number: int, given: Any) -> Statement:
    owner = f"statement {number}"
    _check_members(owner, given, "Sid Effect Action NotAction Resource NotResource".split())
    effect, sid = given.get("Effect"), given.get("Sid", "")
    if effect not in ("Allow", "Deny"):
        raise ValueError(f"{owner} needs Allow or Deny as Effect")
    if not isinstance(sid, str) or not re.fullmatch("[A-Za-z0-9]{0,100}", sid):
        raise ValueError(f"{owner} needs a Sid of letters and digits, at most 100")
    actions, not_actions = _listed(owner, given, "Action")
    if not_actions == (effect == "Allow"):
        actions = [wide.lower() for it in actions for wide in _widened(owner, it)]
    listed = [*map(_folded, actions)], not_actions, *_listed(owner, given, "Resource")
    return Statement(f"{number} {sid}".strip(), effect == "Allow", *listed)


def _listed(owner: str, given: Mapping[str, Any], element: str) -> tuple[Sequence[str], bool]:
    """Return the patterns of an element or its negation, and whether it is the negation."""
    form = _ACTION if element == "Action" else _RESOURCE
    found = [key for key in (element, f"Not{element}") if key in given]
    if len(found) != 1:
        raise ValueError(f"{owner} needs either {element} or Not{element}")
    values = [given[found[0]]] if isinstance(given[found[0]], str) else given[found[0]]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{owner} needs a text or a list of texts as {found[0]}")
    for it in values:
        if isinstance(it, str) and "${" in it:
            raise ValueError(f"{owner} has a policy variable, which this proxy does not support")
        if not isinstance(it, str) or not form.fullmatch(it) or it != it.strip():
            raise ValueError(f"{owner} has {it!r:.80}, which is no valid {found[0]}")
    return values, found[0] != element


def _widened(owner: str, pattern: str) -> Sequence[str]:
    """Return an action to deny, and a pattern for REST calls that may mean it without a name."""
    service, _, operation = pattern.lower().partition(":")
    if (service == "lambda" and _LAMBDA_NAMES.fullmatch(operation)) or operation == _S3_BYPASS:
        return [pattern, "lambda:any/*"] if service == "lambda" else [pattern]
    of_rest = pattern == "*" or _OF_REST.fullmatch(operation)
    foreign = service in ("budgets", "cassandra") or glob_matches(pattern.lower(), "iam:passrole")
    is_known = of_rest or (service in _KNOWN_NAMES and not foreign)  # nearest_pattern knows it
    nearest = nearest_pattern(pattern) if is_known else ""
    if nearest is not None:
        hint = f"; did you mean {nearest}?" if nearest else f": use {service}:* or METHOD/path"
        raise ValueError(f"{owner} has {pattern}, which can match no call here{hint}")
    return [pattern] if of_rest else [pattern, f"{service}:*/*"]


_SECRETS = "get*credential* get*token* get*password* get*instanceaccess* execute-api:*".split()
READ_ONLY = (
    Statement("read_only", False, [*sorted(CREDENTIAL_ACTIONS), *_SECRETS]),
    Statement("read_only", True, "get* get/* list* describe* head* head/* batchget*".split()),
)


# [8.4] What a call needs
_OF_A_QUEUE = "|".join(name for name, it in OPERATIONS.items() if "QueueUrl" in it.input.members)
# A line: the service, its operations, and the members that name all their resources.  A member has
# an ARN.  NAME:KIND may have a name instead.  Marks: @ a queue's URL, + an ARN that may be cut,
# > an index of the table, # the owner's account, - the operation needs no resource.
_NAMING = [line.split(None, 2) for line in f"""
    sqs {_OF_A_QUEUE} QueueUrl@
    sqs CreateQueue QueueName:
    sqs GetQueueUrl QueueOwnerAWSAccountId# QueueName:
    sqs StartMessageMoveTask|ListMessageMoveTasks SourceArn DestinationArn
    sqs ListQueues -
    dynamodb ((Put|Get|Update|Delete)Item|(Create|Delete|Update|Describe)Table|Query|Scan) \
        TableName:table/ IndexName> GlobalTableSourceArn
    dynamodb (Describe|Update)(TimeToLive|ContinuousBackups)|CreateBackup TableName:table/
    dynamodb ListTables|DescribeLimits|DescribeEndpoints -
    sns Publish(Batch)?|(Add|Remove)Permission|Subscribe TopicArn TargetArn PhoneNumber
    sns [GS]etTopicAttributes|DeleteTopic|ConfirmSubscription|ListSubscriptionsByTopic TopicArn
    sns Unsubscribe|[GS]etSubscriptionAttributes SubscriptionArn
    sns CreateTopic Name:
    sns ListTopics|ListSubscriptions -
    kms (En|De)crypt|GenerateDataKey.*|(Generate|Verify)Mac|Sign|Verify|DescribeKey KeyId:key/
    kinesis PutRecords?|DescribeStream(Summary)?|ListShards|GetShardIterator \
        StreamName:stream/ StreamARN StreamId
    states Start(Sync)?Execution|(Describe|Update|Delete)StateMachine stateMachineArn
    secretsmanager (?!BatchGet|Create|GetRandom|List(?!SecretV)).* SecretId+
    sts GetCallerIdentity -
""".strip().splitlines()]  # fmt: skip
_AWS_NAME = re.compile("[A-Za-z0-9_.-]{1,255}")
_ARN = re.compile("arn:aws[a-z-]{0,20}:([a-z0-9-]{1,40}:[a-z0-9-]{0,40}):[0-9]{12}:"
    "([A-Za-z0-9_./:$#+=,@-]+)")  # fmt: skip
_QUEUE_ADDRESS = re.compile(
    r"(?:https?://[A-Za-z0-9.:\[\]-]+)?(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*?"
    r"/([0-9]{12})/([A-Za-z0-9_-]{1,80}(?:\.fifo)?)/?")  # fmt: skip
_FUNCTION = re.compile(  # function:NAME and ACCOUNT:NAME could also be NAME:QUALIFIER
    r"(?:(?:arn:aws[a-z-]{0,20}:lambda:([a-z0-9-]{1,40}):)?([0-9]{12}):function:)?"
    r"((?!function:|[0-9]{12}:)[A-Za-z0-9_-]{1,140}(?::(?:\$LATEST|[A-Za-z0-9_-]{1,128}))?)"
)
# For other operations: those whose members do not name the resource; members that never name one.
_NEW = re.compile("Create|Generate|Import|List(?!Tags)|Register|Run|BatchGetSecret|GetRandom")
_NO_NAME = re.compile("Action|Version|(?i:(client|client_?request|next|idempotency)_?token)")
# Names of access points and other aliases, which stand for another bucket.
_NO_BUCKET = re.compile(r"(?:-s3alias|--[a-z]+-s3|\.mrap)$|accesspoint|object-lambda|[^a-z0-9.-]")
_OF_OBJECTS = re.compile("(?!(?:Get|Put)Bucket).*Object|AbortMultipart|ListMultipart")
_S3_NAME = re.compile("x-amz-(?!date|content-sha256|security-token)|delete$")
# An operation of S3, a header or query parameter, and the action that the call then needs, too
# ("Required permissions for Amazon S3 API operations").  The body of `delete` may name versions.
_S3_NEEDS = [line.split() for line in """
    PutObject x-amz-(acl|grant-.*) PutObjectAcl
    PutObject x-amz-tagging PutObjectTagging
    PutObject x-amz-object-lock-(mode|retain.*) PutObjectRetention
    PutObject x-amz-object-lock-legal-hold PutObjectLegalHold
    DeleteObject delete DeleteObjectVersion
    CreateBucket x-amz-(acl|grant-.*) PutBucketAcl
    CreateBucket x-amz-bucket-object-lock-enabled PutBucketObjectLockConfiguration
    CreateBucket x-amz-bucket-object-lock-enabled PutBucketVersioning
    CreateBucket x-amz-object-ownership PutBucketOwnershipControls
    GetObjectAttributes x-amz-object-attributes GetObject
    GetObjectVersionAttributes x-amz-object-attributes GetObjectVersion
    .* x-amz-bypass-governance-retention BypassGovernanceRetention
""".strip().splitlines()]  # fmt: skip
_PARTS = frozenset({"Get", "Put", "Update", "Delete", "ConditionCheck"})  # of a transaction
MAX_NEEDS = 128  # actions and resources of a call


def needs_of(call: Call) -> Sequence[Need]:
    """Return the actions that a call needs, at least one, each with its resource."""
    finders = {"dynamodb": _of_dynamodb, "s3": _of_s3, "lambda": _of_lambda}
    found = [*finders.get(call.service, _of_members)(call)]
    if call.action == "sqs:StartMessageMoveTask":
        source, *targets = (resource for _, resource in found)
        found += [("sqs:ReceiveMessage", source), ("sqs:DeleteMessage", source)]
        found += [("sqs:SendMessage", it) for it in targets or [UNKNOWN]]
    found += [(f"{call.service}:{call.operation}{it}", UNKNOWN) for it in call.other_paths]
    return found if len(found) <= MAX_NEEDS else [*{(name, UNKNOWN): 0 for name, _ in found}]


def _needing(action: str, *resources: Resource) -> Sequence[Need]:
    needed = needed_actions(action) or [action]
    return tuple((name, it) for it in dict.fromkeys(resources) for name in needed)


@functools.lru_cache(maxsize=MAX_CACHED)
def _row(service: str, operation: str) -> Optional[Sequence[tuple[str, str, str]]]:
    """Return name, mark and kind of the members that name all resources; None if unknown."""
    for name, operations, members in _NAMING:
        if name == service and re.fullmatch(operations, operation):
            return re.findall(r"([A-Za-z-]+)([:@+#>]?)(\S*)", members)
    return None


def needs_key(call: Call) -> Optional[tuple[Any, ...]]:
    """Return the values that its needs depend on; None if they may depend on others, too."""
    row, request = _row(call.service, call.operation), call.request
    if row is None or not isinstance(call.encoded, dict):
        return None
    values = [call.encoded.get(name) for name, _, _ in row]
    if request.target != "/" and row[0][1] == "@" and _QUEUE_PATH.fullmatch(request.path):
        values.append(request.path)
    for it in values:
        if it is not None and (type(it) is not str or len(it) > MAX_TEXT):
            return None
    return (call.service, call.operation, call.region, call.caller.account_id, *values)


def _of_members(call: Call) -> Sequence[Need]:
    key, row = needs_key(call), _row(call.service, call.operation)
    if key is None or row is None:
        named = () if row or _NEW.match(call.operation) else _arns_of(call.service, call.encoded)
        return _needing(call.action, *(named or [UNKNOWN]))
    account, *values = key[3:]
    found = [NO_RESOURCE for name, _, _ in row if name == "-"]
    for (_, mark, kind), value in zip((*row, ("", "@", "")), values):
        if value is None:
            continue
        if mark == "#":
            account = value
        elif mark == ">":
            known = _AWS_NAME.fullmatch(value) and UNKNOWN not in found
            found += [Resource(f"{it.text}/index/{value}") if known else UNKNOWN for it in found]
        else:
            found.append(_named(call, mark, kind, value, account))
    return _needing(call.action, *(found or [UNKNOWN]))


def _arns_of(service: str, document: Any) -> Sequence[Resource]:
    """Return the ARNs among the members, and UNKNOWN if others may name resources, too."""
    found = []
    for name, value in document.items() if isinstance(document, dict) else ():
        for it in value if isinstance(value, list) else [value]:
            arn = _ARN.fullmatch(it) if isinstance(it, str) and len(it) <= MAX_TEXT else None
            known = arn and arn[1].startswith(f"{service}:") and ":alias/" not in it
            if known or not (_NO_NAME.fullmatch(name) or isinstance(it, (int, float, type(None)))):
                found.append(Resource(it) if known else UNKNOWN)
    return found


def _named(call: Call, mark: str, kind: str, value: Any, account: str) -> Resource:
    """Return the resource that a member names.  `mark` and `kind` are from _NAMING."""
    if type(value) is not str or len(value) > MAX_TEXT:
        return UNKNOWN
    if mark == "@":
        url = _QUEUE_ADDRESS.fullmatch(value)
        region = service_of_host(value.partition("://")[2].partition("/")[0])[1]
        if not url or region not in ("", call.region) or "/queue/" in value:
            return UNKNOWN
        account, value = url.groups()
    elif value.startswith("arn:"):
        arn = _ARN.fullmatch(value)
        if not (arn and arn[1] == f"{call.service}:{call.region}" and arn[2].startswith(kind)):
            return UNKNOWN
        good = mark != ":" or _AWS_NAME.fullmatch(value.split(":", 5)[5][len(kind) :])
        return Resource(value, mark != "+") if good else UNKNOWN
    known = mark in (":", "@") and _AWS_NAME.fullmatch(value)
    return _in_account(call, call.region, account, kind + value) if known else UNKNOWN


def _in_account(call: Call, region: str, account: str, name: str) -> Resource:
    place = f"{region}:{account}"
    arn = f"arn:{_partition(region)}:{call.service}:{place}:{name}"
    return Resource(arn) if re.fullmatch("[a-z0-9-]{1,40}:[0-9]{12}", place) else UNKNOWN


def _partition(region: str) -> str:
    return next(row[1] for row in PARTITIONS if region.startswith(row[0]))


def _of_dynamodb(call: Call) -> Sequence[Need]:
    document = call.encoded if isinstance(call.encoded, dict) else {}
    tables, parts = document.get("RequestItems"), document.get("TransactItems")
    named: Iterable[tuple[str, Any]] = ()
    if call.operation in ("BatchGetItem", "BatchWriteItem") and isinstance(tables, dict):
        named = ((call.operation, name) for name in tables)
    if call.operation in ("TransactGetItems", "TransactWriteItems") and isinstance(parts, list):
        named = (it for part in parts for it in _of_part(call.operation, part))
    found: list[Need] = []
    for operation, name in itertools.islice(named, MAX_NEEDS + 1):
        table = _named(call, ":", "table/", name, call.caller.account_id)
        found += _needing(f"dynamodb:{operation}", table)
    return tuple(dict.fromkeys(found)) if 0 < len(found) <= MAX_NEEDS else _of_members(call)


def _of_part(operation: str, part: Any) -> Iterator[tuple[str, Any]]:
    members: Any = part if isinstance(part, dict) and part else {"": None}
    for kind, entry in members.items():
        known = kind in _PARTS and isinstance(entry, dict)
        yield (f"{kind}Item", entry.get("TableName")) if known else (operation, None)


def _of_lambda(call: Call) -> Sequence[Need]:
    path = _FUNCTION_PATH.fullmatch(call.path)
    qualifiers = [it.decode("latin-1") for name, it in call.request.query if name == b"Qualifier"]
    match = _FUNCTION.fullmatch(":".join((path[1], *qualifiers))) if path else None
    if not path or not match or match[1] not in (None, call.region):
        return _needing(call.action, UNKNOWN)
    account = match[2] or call.caller.account_id
    # Operations other than invocations may ignore the qualifier.
    name = match[3] if path[2].endswith("invocations") else match[3].partition(":")[0]
    found = [_in_account(call, call.region, account, f"function:{it}") for it in (match[3], name)]
    return _needing(call.action, *found)


def _of_s3(call: Call) -> Sequence[Need]:
    path, operation = call.request.path[1:], call.operation
    bucket, _, key = path.partition("/")
    bucket, key = (call.bucket, path) if call.bucket else (_decoded(bucket) or "", key)
    resources = _in_bucket(call.region, bucket, _decoded(key), bool(_OF_OBJECTS.match(operation)))
    if call.path or operation == "ListAllMyBuckets":
        resources = [UNKNOWN if call.path else NO_RESOURCE]
    query = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in call.request.query]
    fields = fields_of((*call.request.headers, *query))  # a presigned URL has its headers there
    given = {name: values for name, values in fields.items() if _S3_NAME.match(name)}
    actions = [operation]
    for of, form, action in _S3_NEEDS if given else ():
        if re.fullmatch(of, operation) and any(map(re.compile(form).fullmatch, given)):
            actions.append(action)
    if (b"versionId", b"") in call.request.query:  # it may mean the latest version
        actions += [it.replace("ObjectVersion", "Object") for it in actions]
    found = [(f"s3:{action}{call.path}", it) for it in resources for action in actions]
    for source in given.get("x-amz-copy-source", ()):  # percent-encoded, maybe + for a space
        path, _, version = source.partition("?versionId=")
        action = "s3:GetObjectVersion" if version else "s3:GetObject"
        for spelled in {path, path.replace("+", " ")}:
            text = "" if {"?", "#"} & {*path} else _decoded(spelled) or ""
            bucket, _, key = text.removeprefix("/").partition("/")
            found += [(action, it) for it in _in_bucket(call.region, bucket, key or None, True)]
    return tuple(dict.fromkeys(found))


def _decoded(text: str) -> Optional[str]:
    """Return a percent-decoded text, None if the encoding is malformed or not UTF-8."""
    with contextlib.suppress(ValueError):
        if not BROKEN_ESCAPE.search(text):
            return unquote_to_bytes(text.encode("latin-1")).decode("utf-8")
    return None


def _in_bucket(region: str, bucket: str, key: Optional[str], objects: bool) -> list[Resource]:
    """Return each resource that a server may understand by a bucket and a key."""
    if not bucket or key is None or len(key) > MAX_TEXT or _NO_BUCKET.search(bucket):
        return [UNKNOWN]
    arn = f"arn:{_partition(region)}:s3:::{bucket}"
    if not key:
        return [Resource(f"{arn}/", whole=False) if objects else Resource(arn)]
    # S3 takes `//` and `..` as they are.  Another server may normalize the path.
    dots = re.search(r"(?:^|/)\.\.?(?:/|$)", key)
    plain = re.sub("//+", "/", key.lstrip("/"))
    return [Resource(f"{arn}/{key}"), UNKNOWN if dots or not plain else Resource(f"{arn}/{plain}")]


# [8.5] Guard and learning
MAX_LEARNED = 1000  # needs of a client; then as many again, shortened to their folders
_WITHOUT_POLICY = Decision(True, "no policy")


class Guard:
    """Checks calls against the policies of their clients, and learns what the clients need.

    observe: log the calls that a policy refuses, and let them pass"""

    def __init__(self, observe: bool = False) -> None:
        self._observe = observe
        self._passed: dict[tuple[Any, ...], Decision] = {}
        self._learned: dict[tuple[str, bool], dict[Need, None]] = {}  # by client, and if refused
        self._full: set[str] = set()

    def check(self, call: Call) -> None:
        """Set the decision of a call.  Raise ServiceError if the policy refuses the call."""
        client, key = call.caller, needs_key(call)
        policy = client.policy.value if isinstance(client.policy, Watched) else client.policy
        known = (policy, client.name, *key) if key and not call.other_paths else ()
        if passed := self._passed.get(known):
            call.decision = passed
            return
        needs, action = needs_of(call), call.action
        call.decision = decision = policy.decide(needs, action) if policy else _WITHOUT_POLICY
        if policy and not decision.allowed:
            call.decision = decision._replace(verdict="observe" if self._observe else "deny")
            missing = [it for it in needs if not policy.decide([it], action).allowed]
            is_new, error = self._learn(client.name, missing, True), refusal_of(client, decision)
            if not self._observe:
                raise error
            if is_new:
                log.warning("would be refused without --policy-mode observe: %a", error.message)
        self._learn(client.name, needs)
        if known and decision.allowed:
            if len(self._passed) >= MAX_CACHED:
                self._passed.clear()
            self._passed[known] = decision

    def _learn(self, client: str, needs: Iterable[Need], refused: bool = False) -> bool:
        """Remember needs of a client's calls, allowed or refused; return whether any is new."""
        known = self._learned.setdefault((client, refused), {})
        before = len(known)
        for action, of in needs:
            if len(known) >= MAX_LEARNED and (action, of) not in known and "/" in of.text:
                of = Resource(of.text[: of.text.rindex("/") + 1], whole=False)  # its folder
            is_short = len(action) + len(of.text) <= 2 * MAX_TEXT
            if (action, of) in known or (is_short and len(known) < 2 * MAX_LEARNED):
                known[action, of] = None
            else:
                self._full.add(client)
        return len(known) > before

    def learned(self, client: str, refused: bool = False) -> Mapping[str, Any]:
        """Return the least policy that allows the past calls of a client, or the refused ones.

        A statement lists all resources that share its actions.  The Id is "incomplete" if the
        guard could not remember all needs."""
        known = list(self._learned.get((client, refused), ()))
        allowed = [(it.pattern, _without_wildcards(iam_name(action))) for action, it in known]
        return _least_policy(allowed, client in self._full)


def _least_policy(allowed: Iterable[tuple[str, str]], incomplete: bool) -> Mapping[str, Any]:
    """Return the policy that allows pairs of a resource and an action."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for pattern, pairs in itertools.groupby(sorted({*allowed}), operator.itemgetter(0)):
        groups.setdefault(tuple(name for _, name in pairs), []).append(pattern)
    shared = sorted(groups.items())
    found = [{"Effect": "Allow", "Action": [*names], "Resource": it} for names, it in shared]
    about = {"Id": "incomplete"} if incomplete else {}
    return {**about, "Version": "2012-10-17", "Statement": found}


def join_policies(pages: Sequence[str], _: int) -> str:
    """Return the policy that allows all that the learned policies of several processes allow."""
    learned = [json.loads(page) for page in pages]
    statements = itertools.chain(*(it["Statement"] for it in learned))
    pairs = (itertools.product(it["Resource"], it["Action"]) for it in statements)
    return json.dumps(_least_policy(itertools.chain(*pairs), any("Id" in it for it in learned)))


def _without_wildcards(text: str) -> str:
    """Return a text with `?` for each character that a policy would not take literally."""
    return re.sub(r"[*?]|\$(?=\{)|^\s|\s$", "?", text)


def refusal_of(client: Client, decision: Decision) -> ServiceError:
    """Return the refusal of a call, in the words of AWS."""
    statement, action, resource = decision[1:4]
    who = f"arn:aws:iam::{client.account_id}:user/{client.name}"
    message = f"User: {who} is not authorized to perform: {action[:MAX_SHOWN]} on resource: "
    why = f"statement {statement} of its policy denies it" if statement else ""
    message += f"{resource[:MAX_SHOWN]} because {why or 'no statement of its policy allows it'}."
    message += f" awsproxy refused this call of the client {client.name}."
    if resource == "*" and not statement:
        message += " awsproxy knows no resource of this call, so only Resource * allows it."
    error = ServiceError("AccessDenied", message)
    error.reason = "policy"
    return error


# [8.6] The tape
# A line of a tape is a JSON object: the action of a call, its region and its input, and the
# answer.  README describes the members.  Only the last member, body_base64, may be long.
MAX_INLINE = 49152  # bytes of a body that is kept as text; a multiple of three, for base64
MAX_LINE = 1048576  # bytes of a line without a long body_base64
_BASE64_MEMBER = b', "body_base64": "'
_ENTRY: Mapping[str, type] = {  # its members
    **dict.fromkeys("action region error message body_base64".split(), str), "status": int,
    **dict.fromkeys(("input", "headers", "output"), dict), "body": object}  # fmt: skip
# Headers of a REST call that belong to its input; members that differ in each call, or are secret.
_REST_INPUT = re.compile("range|if-.*|x-amz-(?!date|content-sha|user-agent|sdk-|checksum|trailer"
    "|decoded|mfa|.*(?:token|customer-key)$).*")  # fmt: skip
_INVENTED = re.compile("(?i)(client(_?request)?|idempotency|security|access|auth)_?token|x-amz-.*"
    "|awsaccesskeyid|.*password.*|secret(string|binary|hash)")  # fmt: skip
_NOT_KEPT = re.compile("(?i)date|set-cookie|connection|authorization|.*token")
_HAS_SECRETS = re.compile(  # actions whose answers may hold secrets
    "(?i)credential|token|password|auth|secretvalue|signup|keypair|instanceaccess|loginprofile"
    "|startsession|executecommand|federat|presigned|streamingurl|userpoolclient")  # fmt: skip
_SECRET_TEXT = re.compile(  # in signed URLs, and in members of JSON at any depth
    r"(?i)((?:X-Amz-(?:Signature|Security-Token|Credential)|access_token|[?&, ]Signature)"
    r'(?:=|%3D|\\+u003d))[^&"\\\s<]*|("[\w.-]{0,40}password\\*": ?\\*")[^"\\]*')  # fmt: skip
Entry = Mapping[str, Any]
Tracks = dict[tuple[str, ...], collections.deque[Entry]]  # by action, region, input; "" is any


def tape_input(call: Call) -> Entry:
    """Return the input that distinguishes calls of an action.  Call `hash_body` before."""
    try:
        if isinstance(call.encoded, dict):
            try:
                given = read_json(_to_json(call.input).decode())
            except ServiceError:  # the upstream may still understand it
                given = copy.deepcopy(call.encoded)  # RecursionError long before a tape has one
            given = _with_queue_urls(given, call) if call.service == "sqs" else given
            found = {name: it for name, it in given.items() if not _INVENTED.fullmatch(name)}
        else:
            target, hoisted = strip_presigned(call.request.target)
            path, mark, query = target.partition("?")
            path = f"/{call.bucket}{path}" if call.bucket else path
            target = path + mark + "&".join(sorted(query.split("&")))
            found = {"method": call.request.method, "target": target}
            fields = {n: ", ".join(it) for n, it in call.request.fields.items()} | dict(hoisted)
            found |= {name: it for name, it in fields.items() if _REST_INPUT.fullmatch(name)}
            if digest := call.body_hash():
                found["body_sha256"] = digest
        text = json.dumps(found, sort_keys=True, allow_nan=False).encode()
    except (ValueError, RecursionError):  # a number is too large, or the input too deep
        return {"body_sha256": call.body_hash()}
    return found if len(text) <= MAX_INLINE else {"input_sha256": hashlib.sha256(text).hexdigest()}


def _with_queue_urls(document: Entry, call: Call, base: str = "") -> dict[str, Any]:
    """Return an input or output of Amazon SQS in which `base` begins each queue URL."""

    def _based(url: Any) -> Any:
        if isinstance(url, list):
            return [*map(_based, url)]
        return base + re.sub("^https?://[^/]*", "", str(url).removeprefix(call.base_url))

    return {k: _based(v) if re.fullmatch("(?i)queueurls?", k) else v for k, v in document.items()}


def _blocks_of(reader: Any) -> Iterator[bytes]:
    return iter(lambda: reader.read(MAX_INLINE), b"")


def hash_body(call: Call) -> None:
    """Set `body_hash`: once the body is read, it returns the SHA-256, "" for an empty body."""
    digest, body = hashlib.sha256(), call.body

    def _noted(blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            digest.update(block)
            yield block

    if isinstance(body, io.IOBase):  # in memory, or in a file
        body.seek(0)
        collections.deque(_noted(_blocks_of(body)), 0)
        body.seek(0)
    elif isinstance(body, CheckedBody):
        body.blocks = _noted(body.blocks)
    else:
        call.body = CheckedBody(_noted(_blocks_of(body)))
    call.body_hash = lambda: digest.hexdigest().replace(EMPTY_SHA256, "")


class Recorder(Hook):
    """Appends each forwarded call and its answer to a tape, without credentials."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._append(())  # raises OSError at the start, not at the first call

    def concerns(self, call: Call) -> bool:
        """Return whether the call is signed and forwarded, and its answer holds no secrets."""
        secret = hands_out_credentials(call.action) or _HAS_SECRETS.search(call.action)
        forwards = call.route and isinstance(call.route.target, Upstream)
        return bool(forwards and not secret and not call.unsigned)

    def before(self, call: Call) -> None:
        """Compute the hash of the body while the body is sent."""
        hash_body(call)

    def after(self, call: Call, reply: Reply) -> Optional[Reply]:
        """Record the answer, or return a Reply that is recorded when it has streamed."""
        if not isinstance(reply.body, bytes):
            return reply._replace(body=self._streamed(call, reply, reply.body))
        self._record(call, reply, io.BytesIO(reply.body))
        return None

    def _streamed(self, call: Call, reply: Reply, blocks: Iterable[bytes]) -> Iterator[bytes]:
        with tempfile.SpooledTemporaryFile(MAX_INLINE) as kept:
            for block in blocks:
                kept.write(block)
                yield block
            kept.seek(0)
            self._record(call, reply, kept)

    def _record(self, call: Call, reply: Reply, body: Any) -> None:
        answer, start = _of_sqs(call, reply), body.read(MAX_INLINE)
        if not answer:
            headers = {n: v for n, v in reply.headers if not _NOT_KEPT.fullmatch(n)}
            answer = {"status": reply.status, "headers": headers}
            with contextlib.suppress(ValueError):
                answer |= {"body": start.decode()} if len(start) < MAX_INLINE else {}
        about = {"action": call.action, "region": call.region, "input": tape_input(call)}
        line = _masked({**about, **answer}).encode()
        parts: Iterable[bytes] = (line, b"\n")
        if "headers" in answer and "body" not in answer:
            coded = map(base64.b64encode, itertools.chain((start,), _blocks_of(body)))
            parts = itertools.chain((line[:-1], _BASE64_MEMBER), coded, (b'"}\n',))
        try:
            self._append(parts)
        except OSError as error:
            log.error("a call is missing from the tape %s: %s", self._path, error)

    def _append(self, parts: Iterable[bytes]) -> None:
        private = functools.partial(os.open, mode=0o600)
        with self._lock, open(self._path, "ab", buffering=0, opener=private) as file:
            end = file.tell()
            try:
                file.writelines(parts)
            except OSError:
                os.ftruncate(file.fileno(), end)  # half a line would make the tape unreadable
                raise


def _of_sqs(call: Call, reply: Reply) -> dict[str, Any]:
    """Return the output or error of an SQS reply in AWS JSON; {} for another reply."""
    data, is_json = reply.body, call.service == "sqs" and isinstance(call.wire, AwsJson)
    if not is_json or not isinstance(data, bytes) or len(data) >= MAX_LINE // 4:
        return {}
    members = OPERATIONS.get(call.operation, UNKNOWN_OPERATION).output or ()
    with contextlib.suppress(ValueError, AttributeError):
        found = read_json(data.decode() or "{}")
        if reply.status >= 400:
            message = found.get("message") or found.get("Message") or ""
            return {"status": reply.status, "error": error_code(reply), "message": message}
        found = {name: it for name, it in found.items() if name in members}
        return {"output": _with_queue_urls(found, call)}
    return {}


def read_tape(path: str) -> Tracks:
    """Return the entries of a tape, in their order.  Raise OSError or ValueError."""
    tracks: Tracks = {}
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            begin, place = file.tell() - len(line), {}
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                head = line.rpartition(_BASE64_MEMBER)[0]
                line, place = head + b"}", {"at": begin + len(head + _BASE64_MEMBER)}
                rest = iter(lambda: file.readline(65536), b"")
                if not any(part.endswith((b"\n", b"}")) for part in rest):
                    raise ValueError(f"line {number} is cut off, or longer than {MAX_LINE} bytes")
            with raising(ValueError, f"line {number}: %s", ValueError):
                entry = {**_checked(read_json(line.decode())), **place} if line.strip() else None
            if entry:
                key = (entry["action"], entry.get("region", ""), _masked(entry.get("input")))
                tracks.setdefault(key, collections.deque()).append(entry)
    return tracks


def _masked(given: Any) -> str:
    """Return an input or entry as JSON with sorted keys, without secrets; "" for None."""
    text = json.dumps(given, sort_keys=True)
    return "" if given is None else _SECRET_TEXT.sub(r"\1\2masked", text)


def _checked(entry: Any) -> Entry:
    """Return an entry of a tape.  Raise ValueError if the entry has a fault."""
    if not isinstance(entry, dict) or "action" not in entry:
        raise ValueError('it needs an action, as in {"action": "sqs:ListQueues", "output": {}}')
    for name, value in entry.items():
        if name not in _ENTRY:
            raise ValueError(f"it has an unknown member {name[:80]}{did_you_mean(name, _ENTRY)}")
        if not isinstance(value, _ENTRY[name]):
            raise ValueError(f"{name} cannot be {value!r:.40}")
    headers = (*entry.get("headers", {}).items(), ("error", entry.get("error", "")))
    if fault := fault_of_reply(Reply(entry.get("status", 200), headers, b"")):
        raise ValueError(f"its answer cannot be {fault}")
    base64.b64decode(entry.get("body_base64", ""), validate=True)
    return entry


class Tape:
    """Answers from a file: the nth equal call gets the nth answer, and later ones the last."""

    may_block = True  # it reads whole bodies, and the tape

    def __init__(self, path: str) -> None:
        self.name = f"tape:{path}"
        self._path = path
        self._file = Watched(read_tape, path)
        self._lock = threading.Lock()

    def answer(self, call: Call, request_id: str) -> Reply:
        """Return the answer of an equal call.  If the tape has none, raise ServiceError."""
        hash_body(call)
        collections.deque(_blocks_of(call.body), 0)
        given = tape_input(call)
        with self._lock:
            self._file.refresh()
            tracks: Tracks = self._file.value
            for place in itertools.product((call.region, ""), (_masked(given), "")):
                if track := tracks.get((call.action, *place)):
                    entry = track.popleft() if len(track) > 1 else track[0]
                    return self._played(entry, call, request_id)
        message = f"{self.name} has no entry for {call.action} with this region and input."
        raise ServiceError("AccessDenied", message)

    def _played(self, entry: Entry, call: Call, request_id: str) -> Reply:
        if "error" in entry:
            code, status = entry["error"], entry.get("status", 400)
            known = next((k for k, it in ERRORS.items() if code in (k, it.code)), "")
            error = ServiceError(known or "AccessDenied", entry.get("message", ""))
            error.fault = Fault(status, *(error.fault[1:] if known else (code, code)))
            raise error
        if "output" in entry and isinstance(call.wire, (AwsJson, AwsQuery)):
            operation, output = MODELS.get(call.action, UNKNOWN_OPERATION), entry["output"]
            if call.service == "sqs":
                output = _with_queue_urls(output, call, call.base_url)
            return call.wire.output(call, None if operation.output is None else output, request_id)
        text = entry.get("body", entry.get("output", ""))
        body: Any = (text if isinstance(text, str) else json.dumps(text)).encode(errors="replace")
        if "at" in entry:
            body = self._long_body(entry["at"])
        elif "body_base64" in entry:
            body = base64.b64decode(entry["body_base64"])
        defaults = {"x-amzn-RequestId": request_id, "Content-Type": call.wire.content_type}
        headers = _without(entry.get("headers", defaults).items(), *HOP_BY_HOP)
        if isinstance(body, bytes) and call.request.method != "HEAD":
            headers = _without(headers, "content-length")
        reply = Reply(entry.get("status", 200), tuple(headers), body)
        return rewrite_queue_urls(call, reply) if call.service == "sqs" else reply

    def _long_body(self, at: int) -> Iterator[bytes]:
        with open(self._path, "rb") as file:
            file.seek(at)
            for block in _blocks_of(file):
                coded, end, _ = block.partition(b'"')
                yield base64.b64decode(coded)
                if end:
                    return


# [8.7] Paths of our own
_PLAIN = "text/plain; charset=utf-8"
# The prefixes that botocore puts before our name for some operations.
_HOST_PREFIX = re.compile(
    "^(analytics|(control-)?storage|data|query|runtime|stream|sync|tags|workflows)-")  # fmt: skip


@dataclass
class Status:
    """Serves the paths under `/_awsproxy/`; no bucket has such a name."""

    PREFIX = "/_awsproxy/"
    LOCALSTACK = "/_aws/sqs/messages"  # where LocalStack shows messages

    metrics: Metrics
    in_flight: Optional[InFlight] = None
    sqs: Optional[Sqs] = None
    reset: Optional[Callable[[str], int]] = None  # returns how many queues it has emptied
    inspector: Optional[Inspector] = None
    guard: Optional[Guard] = None
    draining: bool = False
    others: Sequence[str] = ()  # the sockets of other processes, whose pages belong to ours

    def reply_to(self, request: Request, hosts: frozenset[str] = frozenset(),
            any_address: bool = False) -> Reply:  # fmt: skip
        """Return the reply for a path, or the refusal of a web page's request.  Never raises."""
        try:
            check_page(request, hosts, any_address)
            if self.sqs and f"{request.path}/".startswith(f"{self.LOCALSTACK}/"):
                return _localstack(self.sqs, request, request.path[len(self.LOCALSTACK) :])
            return self._joined(request, time.time_ns() // 1000, self._answer(request))
        except ServiceError as error:
            return REST.error(request, error, random_id())
        except Exception:
            log.exception("the request for %s failed", request.path)
            return _own_reply(500, "the request failed; see standard error\n")

    def _joined(self, request: Request, began: int, reply: Reply) -> Reply:
        """Return the page with the same pages of other processes; this may block."""
        join = PAGE_JOINS.get(request.path.replace(self.PREFIX, "", 1))
        if not (join and self.others and reply.status == 200 and isinstance(reply.body, bytes)):
            return reply
        try:
            others = [_ask_process(path, request.target) for path in self.others]
        except (OSError, ValueError, http.client.HTTPException) as error:
            return _own_reply(503, f"another process does not answer: {error}\n")
        return reply._replace(body=join([reply.body.decode(), *others], began).encode())

    def _answer(self, request: Request) -> Reply:
        queue, client, of = (_query_values(request, it) for it in (b"queue", b"client", b"of"))
        numbers = dict(re.findall("[?&](after|limit)=([0-9]{1,18})", request.target))
        after, limit = int(numbers.get("after", 0)), int(numbers.get("limit", 100))
        page = request.path.replace(self.PREFIX, "", 1)
        if request.method not in (("POST",) if page == "reset" else ("GET", "HEAD")):
            return _own_reply(405, "only GET and HEAD are allowed, and POST for reset\n")
        if page in ("health", "ready"):
            leaves = page == "ready" and self.draining
            return _own_reply(503, "draining\n") if leaves else _own_reply(200, "ok\n")
        if page == "in-flight" and self.in_flight:
            return _own_reply(200, json.dumps(self.in_flight.counts()), "application/json")
        if page == "metrics":
            return _own_reply(200, self.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")
        if page == "reset" and self.reset:
            if "" in queue or len(queue) != ("?" in request.target):  # a slip must not drop all
                return _own_reply(400, "queue must name one queue\n")
            return _own_json({"queues": self.reset("".join(queue))})
        if page == "policy" and self.guard:
            if len(client) != 1:
                return _own_reply(400, "client must name one client\n")
            return _own_json(self.guard.learned(client[0], "refused" in of))
        if page == "queues" and self.sqs:
            return _own_json(self.sqs.overview())
        if page.startswith("queues/") and page.count("/") == 3 and self.sqs:
            _, region, account, name = page.split("/")
            return _own_json(self.sqs.look(region, account, name, min(limit, 1000)))
        if page == "calls" and self.inspector:
            return _own_reply(200, self.inspector.since(after), "application/json")
        if page == "" and self.inspector:
            return _own_reply(200, PAGE, "text/html", page_policy())
        return _own_reply(404, "the paths are health, ready, metrics, in-flight, policy, queues,"
            " queues/REGION/ACCOUNT/NAME, reset\n")  # fmt: skip


def _own_reply(status: int, text: str, kind: str = _PLAIN, *more: tuple[str, str]) -> Reply:
    headers = (("x-amzn-RequestId", random_id()), ("Content-Type", kind), *more)
    return Reply(status, headers, text.encode("utf-8"))


def _ask_process(path: str, target: str) -> str:
    """Return the page of another process, which listens on the socket at `path`."""
    client = http.client.HTTPConnection("localhost")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client.sock:
        client.sock.settimeout(2)
        client.sock.connect(path)
        client.request("GET", target)
        answer = client.getresponse()
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        return answer.read().decode()


def _join_counts(pages: Sequence[str], _: int) -> str:
    """Return the messages in flight: a process that has just started may not know all."""
    counts = (collections.Counter(json.loads(page)) for page in pages)
    return json.dumps(functools.reduce(operator.or_, counts))  # the larger one of each


# Functions that join pages of several processes; of calls, those up to some microsecond.
PAGE_JOINS: Mapping[str, Callable[[Sequence[str], int], str]] = {"metrics": join_metrics,
    "in-flight": _join_counts, "policy": join_policies, "calls": join_calls}  # fmt: skip


def _localstack(sqs: Sqs, request: Request, path: str) -> Reply:
    """Return messages as LocalStack does ("SQS", "Developer endpoints", LocalStack docs)."""
    names = (b"QueueUrl", b"ShowInvisible", b"ShowDelayed")
    url, *shown = ("".join(_query_values(request, name)) for name in names)
    invisible, delayed = (it.lower() in ("true", "1") for it in shown)
    host, *segments = (url or path).rpartition("://")[2].split("/")
    *_, region, account, name = ["", "", "", *segments]
    host = host.replace("localhost.localstack.cloud", "api.aws")
    region, messages = region or service_of_host(host)[1], []
    states = ("in flight", "blocked") * invisible + ("visible",) + ("delayed",) * delayed
    try:
        found = sqs.look(region, account, name)
    except ServiceError as error:
        return AWS_QUERY.error(request, error, random_id())
    for message in (it for state in states for it in found if it["State"] == state):
        marks = {"IsVisible": message["State"] != "in flight"} if invisible else {}
        marks |= {"IsDelayed": message["State"] == "delayed"} if delayed else {}
        attributes = {**message["Attributes"], "SenderId": account, **marks}
        more = {"ReceiptHandle": "SQS/BACKDOOR/ACCESS", "Attributes": attributes}
        messages.append({**{k: v for k, v in message.items() if k != "State"}, **more})
    call = sqs_call("localhost", "ReceiveMessage", {}, region, _DEMO)
    reply = AWS_QUERY.output(call, {"Messages": messages}, random_id())
    if "json" not in (request.header("accept") or "") or not isinstance(reply.body, bytes):
        return reply
    root = ElementTree.fromstring(reply.body)
    return _own_json({root.tag.rpartition("}")[2]: _json_of_xml(root)})


def _json_of_xml(element: ElementTree.Element) -> Any:
    """Return the text of an element or its children; only repeated children are a list."""
    children: dict[str, list[Any]] = {}
    for child in element:
        children.setdefault(child.tag.rpartition("}")[2], []).append(_json_of_xml(child))
    return {name: it if len(it) > 1 else it[0] for name, it in children.items()} or element.text


def _own_json(document: Any) -> Reply:
    return _own_reply(200, _to_json(document).decode(), "application/json")


def is_preflight(request: Request) -> bool:
    """Return whether a request is a browser's CORS preflight."""
    fields = request.fields
    asked = fields.get("access-control-request-method", ("",))[0] in METHODS
    unsigned = "origin" in fields and "authorization" not in fields
    length = fields.get("content-length", ("0",))[0].strip("0")
    empty = not length and "transfer-encoding" not in fields and len(request.target) <= 8192
    return request.method == "OPTIONS" and asked and unsigned and empty


def check_page(request: Request, hosts: frozenset[str], any_address: bool = False,
        preflight: bool = False) -> None:  # fmt: skip
    """Raise ServiceError AccessDenied for a request that another site's web page may have sent.

    Browsers name the page's origin (Fetch Metadata Request Headers, 2.3; RFC 6454, 7).  If the
    attacker's name resolves to our address, it is in the Host (DNS rebinding).  `hosts` are our
    names next to localhost, loopback addresses and the names of AWS."""
    fields = request.fields
    host = (fields.get("host") or ("",))[0].lower()
    named, fault = "origin" in fields or "sec-fetch-site" in fields, ""
    if len(host) > 255 or (host and not _is_own_host(host, hosts, any_address)):
        fault = f"The Host '{host[:80]}' is not a name of this proxy (see --public-url)."
    elif named and not preflight:  # which runs nothing
        sites = ",".join(fields.get("sec-fetch-site", ("none",))).lower().split(",")
        origins = [value.strip().lower().partition("://")[2] for value in fields.get("origin", ())]
        if not {"same-origin", "none"}.issuperset(map(str.strip, sites)):
            fault = "A web page of another site sent this request (Sec-Fetch-Site)."
        elif any(origin != host or not host for origin in origins):
            fault = "A web page of another origin sent this request (Origin)."
    if fault:
        raise ServiceError("AccessDenied", f"{fault} awsproxy refused it.")


@functools.lru_cache(maxsize=256)
def _is_own_host(host: str, hosts: frozenset[str], any_address: bool) -> bool:
    name = _HOST_PREFIX.sub("", host_name(host))
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        own = (".localhost", ".127.0.0.1", *(f".{host}" for host in hosts))
        return f".{name}".endswith(own) or is_aws_host(name)
    return any_address or address.is_loopback or name in hosts


# [8.8] The store
_SCHEMA = """
    create table about (name text primary key, value blob);
    create table queues (serial integer primary key, arn text, more text);
    create table messages (n integer primary key, serial integer, id text, received integer,
        before integer, first real, last real, hidden real, sent real, system text, body text,
        attributes text, unique (serial, id));
    create table memory (serial integer, key text, at real, kept text,
        primary key (serial, key)) without rowid;
    pragma application_id = 1635218553; pragma user_version = 1;
"""
_OUR_FILE = (1635218553, 1)  # "awpy", and the version of the schema
_COLUMNS = "id, body, attributes, system, sent, received, before, first, last"  # of a Message


class Store:
    """Keeps the queues of an Sqs in a SQLite file.

    One commit saves the changes of all calls that the loop answers together, and no reply to them
    leaves before it.  A process that is killed loses nothing that it has acknowledged."""

    def __init__(self, path: str, sqs: Sqs, full: bool = False) -> None:
        """Open or create the file, and fill an empty Sqs.  Raise ValueError if that fails."""
        sqlite3 = importlib.import_module("sqlite3")  # it takes 1 MB
        self._sqs, self._changes = sqs, Changes({}, set(), [], set())
        self._lock, self._cleaned = threading.Lock(), 0.0
        self._unsaved: list[tuple[str, Sequence[tuple[Any, ...]]]] = []
        try:
            self._file = sqlite3.connect(path, 0, isolation_level=None, check_same_thread=False)
            self._open(full)
            with sqs.lock:
                self._load()
            self._file.execute("commit")  # now: a damaged file is not changed
        except (sqlite3.Error, ValueError, LookupError, TypeError, ServiceError) as error:
            fault = f"it is damaged, or no store: {' '.join(str(error).split())[:200]}"
            fault = "another process uses it" if "locked" in str(error) else fault
            if hasattr(self, "_file"):
                self._file.close()
            raise ValueError(fault) from error

    def _open(self, full: bool) -> None:
        ask = self._file.execute
        ask("pragma locking_mode = exclusive")
        mark = ask("select * from pragma_application_id, pragma_user_version").fetchone()
        is_new = not ask("select count(*) from sqlite_master").fetchone()[0]
        if mark != ((0, 0) if is_new else _OUR_FILE):
            raise ValueError(f"of another program or version (its mark is {mark})")
        how = ("pragma journal_mode = wal", f"pragma synchronous = {'full' if full else 'normal'}")
        for statement in (*how, "begin exclusive", *(_SCHEMA.split(";")[:-1] if is_new else ())):
            ask(statement)
        if is_new:
            ask("insert into about values ('secret', ?), ('starts', 0)", (os.urandom(32),))
        ask("update about set value = value + 1 where name = 'starts'")

    def _load(self) -> None:
        ask, sqs = self._file.execute, self._sqs
        about = dict(ask("select name, value from about"))
        queues = {row[0]: sqs.restore(*row) for row in ask("select serial, arn, more from queues")}
        rows = ask(f"select serial, hidden, {_COLUMNS} from messages order by n")
        for serial, until, message_id, body, more, system, *state in rows:
            attributes = _from_json(_SHAPES["attributes"], json.loads(more)) if more else {}
            message = Message(message_id, body, attributes, json.loads(system), *state)
            queues[serial].add(message)
            if until:
                queues[serial].hide(message, float(until))
            message.is_saved = True
        for serial, key, kept in ask("select serial, key, kept from memory order by at"):
            queues[serial].sends[tuple(json.loads(key))] = tuple(json.loads(kept))
        for queue in queues.values():
            queue.changes = self._changes
        sqs.changes, sqs.commit, sqs.secret = self._changes, self.commit, about["secret"]
        sqs.serials = itertools.count(about["starts"] * 10**12)

    def commit(self) -> None:
        """Save all changes.  Raise ServiceError ServiceUnavailable if the disk takes none."""
        if not (any(self._changes) or self._lock.locked() or self._unsaved):
            return
        with self._lock:
            with self._sqs.lock:
                self._unsaved += self._statements()
            old = steady_time() - SECONDS_DEDUPLICATED
            if self._cleaned < old:
                self._cleaned = steady_time()
                self._unsaved.append(("delete from memory where at < ?", [(old,)]))
            try:
                with self._file:  # it commits, or rolls back
                    self._file.execute("begin")
                    for statement, rows in self._unsaved:
                        self._file.executemany(statement, rows)
            except self._file.Error as error:
                if not self._sqs.is_failing:
                    log.error("the store cannot be written: %s", error)
                self._sqs.is_failing = True
                raise ServiceError("ServiceUnavailable", "The call cannot be saved.") from error
            self._unsaved.clear()
            self._sqs.is_failing = False

    def _statements(self) -> list[tuple[str, Sequence[tuple[Any, ...]]]]:
        """Return the statements that save the changes, with their rows; forget the changes."""
        new, changed, gone, changes = [], [], [], self._changes
        for (serial, message_id), (queue, it) in changes.messages.items():
            state = (it.received, it.received_before, it.first_received, it.last_received)
            if queue.messages.get(message_id) is not it:
                gone.append((serial, message_id))
            elif it.is_saved:
                changed.append((*state, it.hidden_until, serial, message_id))
            else:
                it.is_saved = True
                more = _to_json(it.attributes) if it.attributes else b""
                fixed = (it.sent, _to_json(it.system), it.body, more)
                new.append((serial, message_id, *state, it.hidden_until, *fixed))
        there = [it for it in changes.queues if self._sqs.queues.get(it.arn) is it]
        emptied = [(serial,) for serial in changes.cleared]  # a deleted queue, too, was cleared
        taken = (("delete from queues where serial = ?", emptied),
            ("delete from messages where serial = ?", emptied),
            ("delete from memory where serial = ?", emptied),
            ("replace into queues values (?, ?, ?)", [it.saved_form() for it in there]),
            ("delete from messages where serial = ? and id = ?", gone),
            ("update messages set received = ?, before = ?, first = ?, last = ?, hidden = ?"
             " where serial = ? and id = ?", changed),
            (f"replace into messages values (null{', ?' * 11})", new),
            ("replace into memory values (?, ?, ?, ?)", changes.memory.copy()))  # fmt: skip
        for held in changes:
            held.clear()
        return [(statement, rows) for statement, rows in taken if rows]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


# [8.9] Hooks, and calls that wait
class Pending:
    """A call that waits for its reply.

    If `is_sent`, the loop calls `proceed` when `connection` is readable, else a worker `wait`."""

    is_sent = False

    def __init__(self, proxy: Proxy, exchange: Exchange, act: Act, attempt: Any = None) -> None:
        self._proxy, self._exchange, self._act = proxy, exchange, act
        self._attempt = attempt  # that an Upstream has begun, if any
        if attempt:
            self.connection, call = attempt.connection, attempt.call
            self.is_poll = call.action == RECEIVE  # waits for messages
            self._act = functools.partial(call.route.target._settled, attempt)

    def send(self) -> None:
        """Send the call without waiting, or leave that to `wait`."""
        if self._attempt:
            # The upstream's answer adds its own time.
            self._attempt.call.upstream_seconds = -time.monotonic()
            self.is_sent = self._attempt.begun = self.connection.send_now(self._attempt.data)
            if not self.is_sent:
                self.connection.close()  # `wait` takes another one

    def proceed(self) -> Optional[Outcome]:
        """Return the reply, this object if only `wait` can get it, or None if it is incomplete."""
        try:
            reply = self._attempt.call.route.target.arrived(self._attempt)
        except WouldWait:
            self.is_sent = False
            self.connection.unwatch()  # a worker reads the rest
            return self
        except Exception as error:
            return self._proxy.refuse(self._exchange, error)
        return self._proxy.observed(self._exchange, reply) if reply else None

    def wait(self) -> Reply:
        """Wait for the reply."""
        try:
            reply, is_call = self._act(), self._exchange.call is not None  # or a page of our own
            return self._proxy.observed(self._exchange, reply) if is_call else reply
        except Exception as error:
            return self._proxy.refuse(self._exchange, error)

    def cut_short(self) -> Reply:
        """Return an answer without messages, and let a worker put later messages back."""
        call, request_id = self._attempt.call, self._exchange.request_id
        self.connection.unwatch()
        self._proxy.workers.run(call.route.target.let_go(self._attempt))
        return self._proxy.observed(self._exchange, call.wire.output(call, {}, request_id))

    def give_up(self) -> Reply:
        """Close the connection, and return the refusal of the call."""
        self.connection.close()
        call = self._attempt.call
        why = "the client has left" if call.request.abandoned() else "it took too long"
        error = UpstreamError(f"no answer from {self.connection.endpoint.origin}: {why}")
        return self._proxy.refuse(self._exchange, call.route.target._given_up(call, error))


Outcome = Union[Reply, Pending]
SPOOLED_IN_MEMORY = 262144
MAX_SEARCHES = 10  # in a second, for the causes of wrong signatures


# [8.10] The proxy
class Proxy:
    """Answers requests: it verifies the caller, finds the operation, and returns the reply.

    clients: the keys that callers may sign with
    routes: the first route that matches a call answers it
    verified: False accepts unsigned calls, but refuses web pages
    public_url: the beginning of queue URLs; without it, `scheme` and the Host of the request
    hooks: objects, modules or HookFiles with methods of Hook
    hosts: further names of the proxy
    guard: checks the clients' policies
    admin: True serves the paths of `status` to all clients, and nothing else"""

    def __init__(self, clients: Clients, *, routes: Optional[Sequence[Route]] = None,
            verified: bool = True, clock_skew: Optional[int] = None, regions: Sequence[str] = (),
            account_id: str = "000000000000", public_url: str = "", scheme: str = "http",
            max_body: int = 16777216, hooks: Sequence[Any] = (), status: Optional[Status] = None,
            clock: Clock = time.time, sqs: Optional[Sqs] = None, hook_seconds: float = 60,
            hosts: Iterable[str] = (), admin: bool = False,
            guard: Optional[Guard] = None) -> None:  # fmt: skip
        self._guard = guard or Guard()
        self.draining = False  # whether the process ends soon: calls receive no messages
        self._account_id, self._verified, self._admin = account_id, verified, admin
        self.clients = clients
        self.sqs = sqs or Sqs(steady_time if clock is time.time else clock)
        default = [Route(pattern, Embedded(self.sqs)) for pattern, _ in DEFAULT_ROUTES]
        self._routes = default if routes is None else routes
        public = urllib.parse.urlsplit(public_url)  # no client puts the default port into Host
        self._public_host = public.netloc.removesuffix(f":{DEFAULT_PORTS.get(public.scheme)}")
        self.hosts = frozenset(filter(None, map(host_name, (public.netloc, *hosts))))
        self._public_url, self._scheme = public_url.rstrip("/"), scheme
        self._regions, self._clock_skew = regions, clock_skew
        self.max_body, self._clock, self._status = max_body, clock, status
        self._hooks, self._hook_seconds, self.workers = hooks, hook_seconds, Workers()
        self.refresh_hooks()
        self._searches = collections.deque([-math.inf] * MAX_SEARCHES, MAX_SEARCHES)
        self._steps = (self._own_path, self._verify, self._find_call, self._find_target,
            self._act, self._save)  # fmt: skip
        self._known_route = functools.lru_cache(maxsize=1024)(self._find_route)
        patterns = [_folded(r.pattern) for r in self._routes if isinstance(r.target, Upstream)]
        # Actions that a route names exactly and AWS may answer without a signature.
        self._open = [pattern for pattern in patterns if passes_unsigned(pattern)]

    @property
    def clients(self) -> Clients:
        """The keys that callers may sign with.  To change them, assign others at any time."""
        return types.MappingProxyType(self._clients)

    @clients.setter
    def clients(self, clients: Clients) -> None:
        """Use these clients from the next request on."""
        self._clients = {
            it: tuple(c if c.account_id else c._replace(account_id=self._account_id) for c in same)
            for it, same in clients.items()}  # fmt: skip
        self._token = object()  # set last and read first: it is never newer than the clients

    def handle(self, request: Request, refused: Optional[ServiceError] = None) -> Reply:
        """Answer one request; `refused` is a fault in the framing.  Never raises."""
        if refused:
            return self.refuse(self._exchange(request), refused)
        (outcome,) = self.begin([request], in_loop=False)
        return outcome if isinstance(outcome, Reply) else outcome.wait()

    def begin(self, requests: Sequence[Request], in_loop: bool = True) -> Sequence[Outcome]:
        """Take each request through the steps to an outcome.  A loop waits for upstreams itself.

        Each step runs for all requests before the next step: its code is then in the processor's
        caches, which saves a third of the time."""
        exchanges = [self._exchange(request, in_loop) for request in requests]
        for step in self._steps:
            for exchange in exchanges:
                if exchange.outcome is None:
                    try:
                        step(exchange)
                    except Exception as error:
                        exchange.outcome = self.refuse(exchange, error)
        outcomes = [exchange.outcome for exchange in exchanges if exchange.outcome]
        for outcome in outcomes:
            if isinstance(outcome, Pending):
                outcome.send()  # after all steps: to wake an upstream between them is slower
        return outcomes

    def _exchange(self, request: Request, in_loop: bool = False) -> Exchange:
        header, service = request.fields.get("authorization"), ""
        if not self._verified:
            service = self._unverified_scope(request).service
        elif not header or header[0].startswith("Bearer "):
            service = self._unsigned_service(request)
        exchange = Exchange(request, self._clock(), random_id(), service)
        exchange.unsigned, exchange.in_loop = self._verified and service != "", in_loop
        return exchange

    def _unsigned_service(self, request: Request) -> str:
        """Return the service of an unsigned call that a route may allow, "" for none."""
        if is_preflight(request):
            service = claim(request)[1].service or "s3"
            return service if service in ("s3", "s3express") else ""
        if not self._open:
            return ""
        try:
            authorization_of(request)
            return ""
        except ServiceError as error:
            if error.reason not in ("unsigned", "scheme"):
                return ""
        target, path = AWS_JSON["1.0"].service(request), request.method.lower()
        with contextlib.suppress(ServiceError):  # the path has several readings
            path += rest_meaning(request).path
        for service, _, operation in (action.partition(":") for action in self._open):
            by_form = service == "sts" and path == "post/" and _media_type(request) in ("", _FORM)
            is_meant = service == target if target else operation == path or by_form
            if is_meant and (service in BEARER_SERVICES) == ("authorization" in request.fields):
                return service
        return ""

    def _own_path(self, exchange: Exchange) -> None:
        request, status = exchange.request, self._status
        own = request.target.startswith((Status.PREFIX, Status.LOCALSTACK))
        if status and (self._admin or (own and is_loopback(request.peer))):
            # Kubernetes probes use the pod's address.  DNS rebinding needs a name.
            act = functools.partial(status.reply_to, request, self.hosts, self._admin)
            exchange.outcome = Pending(self, exchange, act) if status.others else act()

    def _may_search(self) -> bool:
        now, oldest = time.monotonic(), self._searches[0]
        if may_search := now >= oldest + 1:
            self._searches.append(now)
        return may_search

    def check(self, request: Request) -> Exchange:
        """Verify a request without answering it."""
        exchange = self._exchange(request)
        try:
            self._verify(exchange)
            self._find_call(exchange)
        except ServiceError as error:
            exchange.refused, exchange.error = error, error.code
        return exchange

    def judge(self, request: Request, length: int) -> int:
        """Return the limit of the body, or raise ServiceError if the head refuses the request."""
        streams = claim(request)[1].service in S3_FAMILY  # an object streams without a limit
        longest = sys.maxsize if streams and not self._admin else self.max_body
        if length > longest:
            raise too_large(longest)
        if not self._admin:
            self._check_head(self._exchange(request))
        return longest

    def _check_head(self, exchange: Exchange) -> Optional[Proven]:
        """Return what the head proves, None if nothing is verified, or raise ServiceError."""
        request, wire, proven = exchange.request, exchange.wire, None
        template, token, clients = request.template, self._token, self._clients
        known = template.known if template and template.is_learned else (None,) * 4
        before = known[2] if known[3] is token else None  # otherwise the clients have changed
        if not before:
            if request.method not in METHODS:
                raise not_implemented(request.method)
            if not self._verified or exchange.unsigned or has_demo_key(clients):
                preflight = exchange.unsigned and is_preflight(request)
                check_page(request, self.hosts, preflight=preflight)
        if self._verified and not exchange.unsigned:
            named = None if before else wire.service(request)
            proven = verify_head(request, clients, exchange.started, named, self._regions,
                self._clock_skew, wire.must_be_signed, other_host=self._public_host,
                private=self._scheme == "https" or is_loopback(request.peer),
                may_search=self._may_search, before=before)  # fmt: skip
        if not before:
            check_one_reading(request, wire, exchange.service)
        return proven

    def _verify(self, exchange: Exchange) -> None:
        token, proven = self._token, self._check_head(exchange)
        spool = functools.partial(self._spool, exchange)
        verified = verify_body(exchange.request, proven, spool) if proven else None
        exchange.verified = verified or self._unverified(exchange)
        if proven and (template := exchange.request.template):
            template.known = exchange.service, exchange.wire, proven, token

    def _find_call(self, exchange: Exchange) -> None:
        found = exchange.verified
        request = meant = exchange.request
        assert found
        if exchange.unsigned and is_preflight(request):
            method = request.fields["access-control-request-method"][0]
            meant = dataclasses.replace(request, method=method)
        meaning = exchange.wire.meaning(meant, found.scope.service, found.body, self.hosts)
        base_url = self._public_url or f"{self._scheme}://{request.header('host') or 'localhost'}"
        exchange.call = Call(request, exchange.wire, found.scope.service, meaning.operation,
            found.scope.region, found.client, found.body, found.payload_hash, found.presigned,
            base_url, meaning.encoded, exchange.began, meaning.path, found.signed_headers,
            meaning.bucket, meaning.other_paths)  # fmt: skip

    def _find_target(self, exchange: Exchange) -> None:
        call = exchange.call
        assert call
        route = call.route = self._route(call.action)
        if exchange.unsigned:
            preflight = is_preflight(exchange.request)
            exact = route and route.names_exactly(call.action) and passes_unsigned(call.action)
            if not (route and isinstance(route.target, Upstream) and (preflight or exact)):
                exchange.call = None
                raise refusal("unsigned", exchange.request, "")
            call.unsigned = True
            if preflight:
                call.operation = exchange.request.method  # hooks see it, and the upstream gets it
                call.__post_init__()
        for path in call.other_paths:
            if self._route(f"{call.service}:{call.operation}{path}") != route:
                raise ServiceError("InvalidURI", "The path has readings with different routes.")
        if route and isinstance(route.target, Upstream) and route.target.endpoint:
            call.region = route.target.endpoint.region or call.region  # it is signed for this one
        self._guard.check(call)
        if route is None:
            raise ServiceError("AccessDenied", self._no_route(call.action))
        if isinstance(route.target, Deny):
            call.advice = self._flag(call.action)

    def _act(self, exchange: Exchange) -> None:
        """Let the target answer if it need not wait."""
        call = exchange.call
        assert call and call.route
        target = call.route.target
        if self.draining and call.action == RECEIVE and not isinstance(target, Deny):
            no_messages = call.wire.output(call, {}, exchange.request_id)
            exchange.outcome = self.observed(exchange, no_messages)
            return
        hooks = [it for it in self._methods if not it.concerns or run_hook(it.concerns, call)]
        if not (hooks or target.may_block):
            try:
                call.may_wait = False
                exchange.reply = target.answer(call, exchange.request_id)
                return
            except WouldWait:
                call.may_wait = True
        act = functools.partial(target.answer, call, exchange.request_id)
        begun = None
        if hooks:
            act = functools.partial(self._hooked, call, hooks, act)
        elif exchange.in_loop and isinstance(target, Upstream):
            begun = target.begin(call)
        exchange.outcome = Pending(self, exchange, act, begun)

    def _save(self, exchange: Exchange) -> None:
        """Let a reply leave, after one commit has saved all calls of this turn."""
        if exchange.reply:
            self.sqs.commit()
            exchange.outcome = self.observed(exchange, exchange.reply)

    def refresh_hooks(self) -> None:
        """Load again the hook files that have changed, and find the methods of all hooks."""
        names, found = HookMethods._fields, []
        for hook in self._hooks:
            if isinstance(hook, Watched):
                hook.refresh()
                hook = hook.value
            own = [n for n in names if getattr(type(hook), n, None) is not getattr(Hook, n)]
            methods = [getattr(hook, n, None) if n in own else None for n in names]
            found.append(HookMethods(*methods))
        self._methods = [it for it in found if it.before or it.rewrite or it.after]
        self._observers = [it.observe for it in reversed(found) if it.observe]

    def _hooked(self, call: Call, hooks: Sequence[HookMethods], act: Callable[[], Reply]) -> Reply:
        answers = (self._bounded(Reply, it.before, call) for it in hooks if it.before)
        reply = next(filter(None, answers), None)
        if reply is None:
            call.changed = "input" in call.__dict__ and call.wire.input(call) != call.input
            bounded = functools.partial(self._bounded, Request)
            call.rewrites = [functools.partial(bounded, it.rewrite) for it in hooks if it.rewrite]
            reply = act()
        for hook in reversed(hooks):
            if hook.after:
                reply = self._bounded(Reply, hook.after, call, reply) or reply
        return reply

    def _bounded(self, kind: type, moment: Callable[..., Any], *given: Any) -> Any:
        """Return the result of a hook: `kind` or None, in time; else TypeError or TimeoutError."""
        outcome: queues.SimpleQueue[tuple[Any, Optional[Exception]]] = queues.SimpleQueue()

        def _run() -> None:
            try:
                outcome.put((run_hook(moment, *given), None))
            except Exception as error:
                outcome.put((None, error))

        self.workers.run(_run)
        name = f"{getattr(moment, '__module__', '')}.{getattr(moment, '__qualname__', moment)}"
        late = f"{name} took longer than {self._hook_seconds} s"
        with raising(TimeoutError, late, queues.Empty):
            result, error = outcome.get(timeout=self._hook_seconds)
        if error:
            raise error
        fault = fault_of_reply(result) if isinstance(result, Reply) else ""
        if not isinstance(result, (kind, type(None))):
            fault = f"{result!r:.80}, which is no {kind.__name__}"
        if fault:
            raise TypeError(f"{name} returned {fault}")
        return result

    def refuse(self, exchange: Exchange, error: Exception) -> Reply:
        """Return the refusal.  Log any error but ServiceError: it is a fault of the proxy."""
        if not isinstance(error, ServiceError):
            log.error("request %s failed", exchange.request_id, exc_info=error)
            error = ServiceError("InternalFailure", "The proxy failed; see its standard error.")
        # Its frames would keep the request in memory.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        exchange.refused, exchange.reason = error, error.reason
        reply = exchange.wire.error(exchange.request, error, exchange.request_id)
        code = error_code(reply)
        exchange.error = exchange.wire.fault(exchange.request, error).code if code == "-" else code
        return self.observed(exchange, reply)

    def observed(self, exchange: Exchange, reply: Reply) -> Reply:
        """Show the reply to the observing hooks, and return it."""
        exchange.reply, exchange.status = reply, reply.status
        if reply.status >= 400 and exchange.error == "-":
            exchange.error = error_code(reply)
        exchange.seconds = time.monotonic() - exchange.began
        if exchange.call and exchange.call.ignored:
            log.warning("%s has no parameters %r: ignored", exchange.action, exchange.call.ignored)
        exchange.reply_bytes = len(reply.body) if isinstance(reply.body, bytes) else 0
        if exchange.spooled:
            with contextlib.suppress(OSError):  # the disk is full; `_spool` logged it
                exchange.spooled.close()
        for observe in self._observers:
            try:
                run_hook(observe, exchange)
            except Exception:
                log.exception("a hook's observe failed")
        return reply

    def visibility_timeout(self, call: Call, queue: str) -> int:
        """Return the visibility timeout of a call's queue, in seconds, as its target answers."""
        asked = queue_call(call, "GetQueueAttributes", AttributeNames=["VisibilityTimeout"])
        asked.route = self._route(asked.action)
        if asked.route is None:
            raise ValueError("no route answers GetQueueAttributes")
        reply = asked.route.target.answer(asked, "")
        if reply.status != 200 or not isinstance(reply.body, bytes):
            raise ValueError(f"GetQueueAttributes was answered {reply.status}")
        return int(read_json(reply.body.decode())["Attributes"]["VisibilityTimeout"])

    def _route(self, action: str) -> Optional[Route]:
        # A caller chooses the path in an action: the cache keeps only short ones.
        return (self._known_route if len(action) <= 2 * MAX_SHOWN else self._find_route)(action)

    def _find_route(self, action: str) -> Optional[Route]:
        secret = hands_out_credentials(action)
        for route in self._routes:
            # Only a route that names the action exactly may return credentials to the caller.
            strict = secret and isinstance(route.target, Upstream)
            if route.matches(action) and (not strict or route.names_exactly(action)):
                return route
        return None

    def _flag(self, action: str) -> str:
        names = [getattr(route.target, "name", "") for route in self._routes]
        target = next((name for name in names if name.startswith("http")), "aws")
        if action.startswith("sqs:") and "embedded" in names:
            target = "embedded"
        quoted = shlex.quote(f"{action[:MAX_SHOWN]}={target}")
        return f"--route {quoted}" if quoted[0] == "'" else f"--route '{quoted}'"

    def _no_route(self, action: str) -> str:
        flags, shown = self._flag(action), action[:MAX_SHOWN]
        routes = tuple((r.pattern, getattr(r.target, "name", "")) for r in self._routes)
        if routes == DEFAULT_ROUTES:
            flags = f"--route 'sqs:*=embedded' {flags}"  # a flag alone would replace it
        if flags.endswith("=aws'") and has_demo_key(self.clients):
            flags += " --clients FILE"
        if hands_out_credentials(action) and any(route.matches(action) for route in self._routes):
            return f"This proxy refused {shown}: only an exact route returns credentials: {flags}"
        return f"This proxy refused the call: no route answers {shown}. Add: {flags}"

    def _unverified_scope(self, request: Request) -> CredentialScope:
        scope, of_host = claim(request)[1], service_of_host(request.header("host") or "")
        service = AWS_JSON["1.0"].service(request) or scope.service
        region = scope.region or of_host[1] or (*self._regions, "us-east-1")[0]
        return CredentialScope("", region, service or of_host[0] or "sqs")

    def _unverified(self, exchange: Exchange) -> Verified:
        request, name = exchange.request, exchange.service
        scope = self._unverified_scope(request)._replace(service=name)
        if exchange.unsigned and self._regions and scope.region not in self._regions:
            raise ServiceError("AccessDenied", f"The region '{scope.region}' is not allowed here.")
        if not (_SCOPE_NAME.fullmatch(name) and _SCOPE_NAME.fullmatch(scope.region)):
            raise ServiceError("AccessDenied", "The service or the region is not a name of AWS.")
        key = "" if exchange.unsigned else claim(request)[0]
        client = Client("anonymous", key or "anonymous", "", "", self._account_id)
        presigned = "authorization" not in request.fields and not exchange.unsigned
        if name in S3_FAMILY:
            declared = request.header("x-amz-content-sha256") or "UNSIGNED-PAYLOAD"
            body = streamed_body(request, declared, None)
            return Verified(client, scope, body, "UNSIGNED-PAYLOAD", presigned)
        body, payload_hash = self._spool(exchange, request.body)
        return Verified(client, scope, body, payload_hash, presigned)

    def _spool(self, exchange: Exchange, body: Body) -> tuple[Body, str]:
        """Return a body that can be read again, and its SHA-256; a long one is in a file."""
        gathered = body if isinstance(body, io.BytesIO) else None  # by the server
        data = gathered.getvalue() if gathered else Stream(body.read).read(SPOOLED_IN_MEMORY)
        digest, size = hashlib.sha256(data), len(data)
        file: BinaryIO = gathered or io.BytesIO(data)
        if not gathered and size == SPOOLED_IN_MEMORY:
            try:
                file = exchange.spooled = tempfile.TemporaryFile()
                while data and size <= self.max_body:
                    file.write(data)
                    data = body.read(65536)
                    digest.update(data)
                    size += len(data)
                file.seek(0)  # it writes the rest
            except OSError as error:
                log.warning("cannot write a long body to a temporary file: %s", error)
                raise ServiceError("ServiceUnavailable", "The body cannot be stored.") from error
        if size > self.max_body:
            raise too_large(self.max_body)
        return file, digest.hexdigest()


def has_demo_key(clients: Clients) -> bool:
    """Return whether callers may sign with the demo client's key, which is public."""
    same_key = clients.get(_DEMO.access_key_id, ())
    return any(client.secret_access_key == _DEMO.secret_access_key for client in same_key)


def fault_of_reply(reply: Reply) -> str:
    """Return the description of a hook's faulty Reply, "" if it can be sent."""
    status, headers, body = reply
    if type(status) is not int or not 200 <= status <= 599:
        return f"a Reply with the status {status!r:.40}"
    for name, value in headers:
        is_text = isinstance(name, str) and isinstance(value, str) and ":" not in name
        line = f"{name}:{value}" if is_text else ""
        if not _FIELD_LINE.fullmatch(line) or max(line) > "\xff":
            return f"a Reply with the header {(name, value)!r:.80}"
    if isinstance(body, (str, bytearray, memoryview, Mapping)) or not isinstance(body, Iterable):
        return f"a Reply with a body of type {type(body).__name__}"
    return ""


# ==== 9. The server: PeerConnection, Server ====
# One thread runs a loop.  It reads all connections that are idle or sending a request, and
# answers every call that need not wait: with more threads, such calls would compete for the
# interpreter.  Requests that arrive together go through each step together (see Proxy.begin).
# The same loop waits for small forwarded calls.  A worker thread runs any other call that may
# wait (a long poll, a hook, a long body): it owns the connection until it gives it back.

# [9.1] Connections
SMALL_BODY = 131072  # bytes; the loop gathers bodies up to this length
AT_A_TIME = 65536  # bytes of an answer: TLS sends a block within one timeout, or not at all
AT_ONCE = 16  # connections to read before the first is answered
MIN_BODY_RATE = 1024  # bytes a second, the slowest average of a longer body
SECONDS_LINGERING = 2
MAX_HELD = 50331648  # bytes of incomplete requests, of all connections together
_HUNG_UP = getattr(select, "POLLRDHUP", select.POLLHUP) | select.POLLHUP | select.POLLERR
_READ = selectors.EVENT_READ
_NO_HEAD = re.compile(rb"\A\x16|(?<!\r)\n")  # a ClientHello of TLS (RFC 8446, 5.1), or a bare LF
_http_date = functools.lru_cache(maxsize=4)(functools.partial(email.utils.formatdate, usegmt=True))


def read_certificate(path: str, key: str = "") -> ssl.SSLContext:
    """Return the SSL context of a PEM file with chain and key, or of two; OSError, ValueError."""

    def _refuse_to_ask() -> str:
        raise ValueError("its key is encrypted; the proxy cannot ask for the password")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    context.load_cert_chain(path, key or None, _refuse_to_ask)
    return context


class PeerConnection:
    """A connection, its unread bytes, its deadline, and the head of the request in progress."""

    head = Head("GET", "/", "1.0", (), {})
    buffer = b""
    parked = False  # whether it is registered with the selector
    pending: Optional[Pending] = None  # the call that waits for an upstream
    scanned = 0  # bytes of the buffer without the end of a head
    found: Optional[tuple[int, int]] = None  # the ends of the head and its body
    lingering = False  # whether to drop what arrives
    used = False  # whether it has sent a complete request
    writing = False  # whether the client reads an answer slowly
    deadline = 0.0

    def __init__(self, server: Server, sock: socket.socket, peer: str) -> None:
        self.server, self.socket, self.peer = server, sock, peer

    def readable(self) -> None:
        """Receive bytes into the buffer; over TLS, the first ones are the handshake."""
        if self in self.server.queue or self in self.server.replies or not self.parked:
            return  # it has a request to answer, or an answer to send, or a worker owns it
        if pending := self.pending:  # what a client says meanwhile can wait
            self.server.unpark(self)
            if self.abandoned():
                end = pending.cut_short if pending.is_poll else pending.give_up
                self.server.settle(self, end())
            return
        try:
            data = self.socket.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:  # or TLS must send, and the client does not read
            data = b""
        if not data:
            self.close()
        if not data or self.lingering:
            return
        if not self.buffer and data != b"\r\n":  # the first byte of a request
            self.deadline = time.monotonic() + self.server.timeout_seconds
        self.buffer += data
        if self.found is None or len(self.buffer) >= self.found[1]:
            self.server.queue[self] = None
        self.server.limit_held(len(data))

    def next_request(self) -> Optional[Request]:
        """Return the next request in the buffer, or None."""
        self.found = found = self.found or self._find_head()
        if found is None or len(self.buffer) < found[1]:
            return None
        end, beyond = found
        body = io.BytesIO(self.buffer[end:beyond])
        self.found, self.used, self.buffer = None, True, self.buffer[beyond:]
        if self.buffer:
            self.deadline = time.monotonic() + self.server.timeout_seconds
        return self.head.request(body, self.peer, self.abandoned)

    def _find_head(self) -> Optional[tuple[int, int]]:
        """Parse a head, and return where it and its body end in the buffer.

        None if it is incomplete or refused, or if a worker is to read the body."""
        if self.buffer[:2] == b"\r\n":  # RFC 9112, 2.2
            self.buffer = re.sub(rb"\A(?:\r\n)+", b"", self.buffer)
        buffer = self.buffer
        end = buffer.find(b"\r\n\r\n", max(self.scanned - 3, 0)) + 4
        if end == 3:
            if len(buffer) <= MAX_HEAD and not _NO_HEAD.search(buffer, max(self.scanned - 1, 0)):
                self.scanned = len(buffer)
                return None
            end = len(buffer)
        head, self.scanned = None, 0
        try:
            head = self.head = self.server.templates.parse(buffer[:end], self.head)
            length = body_framing(head)
            waits = expects_continue(head) or length is None or length > self.server.gathered
            beyond = end + (length or 0)
            if waits or len(buffer) < beyond:
                # Nothing is kept for somebody who will be refused anyway, and no thread waits.
                request = head.request(io.BytesIO(), self.peer, self.abandoned)
                longest = self.server.proxy.judge(request, length or 0)
        except ServiceError as error:
            self.head, self.lingering = head or salvage_head(buffer[:end]), True
            self._send(self.refusal(error), close=False)
            return None
        if waits:
            self.buffer = buffer[end:]
            self.server.work(self, functools.partial(self._converse, length, longest))
            return None
        return end, beyond

    def refusal(self, error: ServiceError) -> bytes:
        """Return the answer that refuses a request, and ends the connection."""
        request = self.head.request(io.BytesIO(), self.peer, self.abandoned)
        return self._encoded(self.server.proxy.handle(request, error), close=True)

    def send_outcome(self, outcome: Outcome) -> None:
        """Send a reply, or wait for it in the loop or in a worker."""
        self.server.park(self)
        if isinstance(outcome, Pending) and outcome.is_sent:
            self.server.wait(self, outcome)
        elif isinstance(outcome, Reply) and isinstance(outcome.body, bytes):
            close = self._closes()
            self._send(self._encoded(outcome, close), close)
        else:
            self.server.work(self, functools.partial(self._write, outcome))

    def _closes(self) -> bool:
        """Return whether the client wants the connection to end (RFC 9112, 9.6)."""
        options = ",".join(self.head.fields.get("connection", ())).lower()
        is_last = "close" in options and "close" in map(str.strip, options.split(","))
        return is_last or self.head.version == "1.0"

    def _encoded(self, reply: Reply, close: bool, streams: Optional[str] = None) -> bytes:
        date = _http_date(int(time.time()))
        return encode_reply(reply, date, close, self.head.method == "HEAD", streams)

    def _send(self, data: bytes, close: bool, sent: int = 0) -> None:
        """Send a reply from its byte `sent` on, as fast as the client reads."""
        try:
            while sent < len(data):
                sent += self.socket.send(data[sent : sent + AT_A_TIME])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            event = _READ if isinstance(error, ssl.SSLWantReadError) else selectors.EVENT_WRITE
            self.writing = True
            self.server.unpark(self)
            self.server.park(self, event, functools.partial(self._send, data, close, sent))
            return
        except OSError:
            close = True
        if close:
            self.close()
            return
        if self.lingering:
            self._linger()
        if self.writing or self.lingering:
            self.writing = False
            self.server.unpark(self)
            self.server.park(self)
        self.resume()

    def resume(self) -> None:
        """Continue with bytes that arrived before the answer was sent."""
        if isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            self.readable()  # the selector does not see decrypted bytes
        elif self.buffer:
            self.server.queue[self] = None

    def close(self) -> None:
        """Close the connection and forget it."""
        self.server.unpark(self)
        self.server.connections.discard(self)
        self.server.queue.pop(self, None)
        self.server.replies.pop(self, None)
        self.buffer = b""  # `limit_held` still refers to the connection
        self.hang_up()

    def hang_up(self) -> None:
        """Close the socket, after a close_notify over TLS."""
        self._send_close_notify()
        self.socket.close()

    def _send_close_notify(self) -> None:
        """Send close_notify over TLS without waiting for the client's (RFC 8446, 6.1)."""
        if isinstance(self.socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):  # it is closed, or had no handshake
                self.socket.setblocking(False)
                self.socket.unwrap()

    # ---- In a worker, which may wait; each returns whether the connection stays open ----

    def _converse(self, length: Optional[int], longest: int) -> bool:
        """Answer a request while its body arrives: `length` bytes, or chunks up to `longest`."""
        source = Stream(self._receive, self.buffer)
        self.deadline, self.buffer = time.monotonic() + self.server.timeout_seconds, b""
        proceed = functools.partial(self.socket.sendall, b"HTTP/1.1 100 Continue\r\n\r\n")
        begin = proceed if expects_continue(self.head) else None
        body = FramedBody(source, length, longest, begin)
        reply = self.server.proxy.handle(self.head.request(body, self.peer, self.abandoned))
        goes_on = self._write(reply, close=body.unread)
        self.buffer = source.buffer
        if body.unread:
            self._linger()
        return goes_on or self.lingering

    def _receive(self, size: int) -> bytes:
        """Receive a part of a body; ServiceError RequestTimeout if it arrives too slowly."""
        data, late = b"", time.monotonic() >= self.deadline
        try:
            data = b"" if late else self.socket.recv(size)
        except OSError as error:  # another one: the client has hung up
            late = isinstance(error, socket.timeout)
        if late:
            message = "Your socket connection to the server was not read from or written to."
            raise ServiceError("RequestTimeout", message)
        self.deadline += len(data) / MIN_BODY_RATE
        return data

    def _write(self, outcome: Outcome, close: bool = False) -> bool:
        """Send a reply; if a streaming body fails, close the connection."""
        reply = outcome if isinstance(outcome, Reply) else outcome.wait()
        close = close or self._closes()
        if isinstance(reply.body, bytes):
            self._send_all(self._encoded(reply, close))
            return not close
        measured = any(name.lower() == "content-length" for name, _ in reply.headers)
        coding = "" if measured or self.head.version != "1.1" else "Transfer-Encoding: chunked"
        blocks = itertools.chain(filter(None, reply.body), [b""])  # an empty chunk is the last one
        try:
            self._send_all(self._encoded(reply._replace(body=b""), close, coding))
            for block in () if self.head.method == "HEAD" else blocks:
                self._send_all(b"%x\r\n%b\r\n" % (len(block), block) if coding else block)
        except (OSError, ServiceError) as error:
            log.warning("an answer to %s is incomplete: %s", self.peer, error)
            if not coding and not measured:  # a normal end would look like the end of the body
                abort = struct.pack("ii", 1, 0)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
            self.socket.close()
            return False
        finally:
            if isinstance(reply.body, Generator):
                reply.body.close()
        return not close

    def _send_all(self, data: bytes) -> None:
        """Send all of the data, with a new timeout for each part."""
        left = memoryview(data)
        while left:
            left = left[self.socket.send(left[:AT_A_TIME]) :]

    def abandoned(self) -> bool:
        """Return whether the client has hung up, without receiving anything."""
        if self.socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self.socket, _HUNG_UP)
        return bool(poll.poll(0))

    def _linger(self) -> None:
        """Make the loop drop what arrives for a moment: a reset would overtake the answer."""
        self._send_close_notify()
        with contextlib.suppress(OSError):  # the client is gone
            self.socket.shutdown(socket.SHUT_WR)
        self.buffer, self.found, self.lingering = b"", None, True


# [9.2] The event loop
def listen(address: tuple[str, int], reuse_port: bool = False) -> socket.socket:
    """Return a socket that listens on a host and port; for `::` on IPv4, too."""
    v6 = ":" in address[0]
    return socket.create_server(address, backlog=1024, reuse_port=reuse_port,
        family=socket.AF_INET6 if v6 else socket.AF_INET, dualstack_ipv6=v6)  # fmt: skip


class Server(http.server.HTTPServer):
    """Listens for connections, and lets a Proxy answer their requests.

    A connection may be silent for `timeout` seconds.  A head or small body must arrive, and a
    write must end, in that time.  With a `certificate` it speaks TLS."""

    def __init__(self, where: Union[tuple[str, int], socket.socket], proxy: Proxy, *,
            timeout: float = 60, max_connections: int = 10000,
            every_half_second: Callable[[], None] = lambda: None,
            certificate: Optional[Watched] = None) -> None:  # fmt: skip
        super().__init__(("", 0), http.server.BaseHTTPRequestHandler, bind_and_activate=False)
        self.socket.close()  # it is not of the right family, nor bound
        self.socket = where if isinstance(where, socket.socket) else listen(where)
        self.server_address = self.socket.getsockname()
        self.proxy, self.timeout_seconds, self._max_connections = proxy, timeout, max_connections
        self._certificate, self._every_half_second = certificate, every_half_second
        self.gathered = min(SMALL_BODY, proxy.max_body)  # the longest body that the loop reads
        self.templates = HeadTemplates()
        self._arrived = 0  # bytes, since the last check of MAX_HELD
        self._workers, self.selector = Workers(), selectors.DefaultSelector()
        self.connections: set[PeerConnection] = set()  # that are open
        self.queue: OrderedDict[PeerConnection, None] = OrderedDict()  # may hold a request
        self._returned: collections.deque[PeerConnection] = collections.deque()  # by workers
        self._due: collections.deque[Callable[[], None]] = collections.deque()  # for the loop
        self.replies: dict[PeerConnection, Outcome] = {}  # of upstreams, not sent yet
        self._waiting: dict[Connection, PeerConnection] = {}  # by the upstream that must answer
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)  # the loop may wake itself
        self._stopping, self._stopped = False, threading.Event()
        self._stopped.set()
        for listening, act in ((self.socket, self._accept), (self._woken, self._take_back)):
            listening.setblocking(False)
            self.selector.register(listening, _READ, act)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `shutdown`."""
        self._stopped.clear()
        tick = time.monotonic() + poll_interval
        while not self._stopping:
            ready = self.selector.select(0.0 if self.queue else max(0.0, tick - time.monotonic()))
            for start in range(0, len(ready) or 1, AT_ONCE):
                for key, _ in ready[start : start + AT_ONCE]:
                    self._guarded(key.data, key.fileobj)
                self._guarded(self._answer)
            if time.monotonic() >= tick:
                tick = time.monotonic() + poll_interval
                for act in (self._check_deadlines, self._every_half_second, self._answer):
                    self._guarded(act)
        self._stopped.set()

    def limit_held(self, size: int) -> None:
        """Close the connections that hold most, if all together hold more than MAX_HELD bytes."""
        self._arrived += size
        if self._arrived < MAX_HELD // 8:
            return
        self._arrived, held = 0, sum(len(c.buffer) for c in self.connections)
        if held <= MAX_HELD:
            return
        log.warning("%d bytes of incomplete requests: dropping the longest ones", held)
        waiting = [c for c in self.connections - self.replies.keys() if c.parked and not c.pending]
        waiting.sort(key=lambda c: len(c.buffer))
        while waiting and held > MAX_HELD * 3 // 4:
            held -= len(waiting[-1].buffer)
            waiting.pop().close()

    def _answer(self) -> None:
        """Answer the upstreams' replies, and the next requests in the queue."""
        found: dict[PeerConnection, Request] = {}
        for _ in range(min(len(self.queue), AT_ONCE)):
            connection, _ = self.queue.popitem(last=False)
            if request := self._guarded(connection.next_request, connection.socket):
                found[connection] = request
        outcomes = self._guarded(self.proxy.begin, None, list(found.values()))
        if outcomes is None:  # the proxy failed
            for connection in found:
                connection.close()
        for connection, outcome in (*self.replies.items(), *zip(found, outcomes or ())):
            self.replies.pop(connection, None)
            if connection in self.connections:
                self._guarded(connection.send_outcome, connection.socket, outcome)

    def _guarded(self, act: Callable[..., Any], sock: Any = None, *given: Any) -> Any:
        """Return the result of `act`; log an exception and close the connection."""
        try:
            return act(*given)
        except Exception:
            log.exception("a connection failed")
            for connection in [c for c in self.connections if c.socket is sock]:
                connection.close()
            return None

    def stop(self) -> None:
        """Make `serve_forever` return."""
        self._stopping = True
        self.wake()

    def wake(self, *acts: Callable[[], None]) -> None:
        """Make the loop run these functions soon; a signal handler may call this."""
        self._due.extend(acts)
        with contextlib.suppress(OSError):  # it is awake already, or the server is closed
            self._wake.send(b"x")

    def shutdown(self) -> None:
        """Make `serve_forever` return, and wait until it does."""
        self.stop()
        self._stopped.wait()

    def server_close(self) -> None:
        """Close the listener and all connections."""
        self.socket.close()
        for connection in list(self.connections):
            if connection.pending:
                connection.pending.give_up()
            if connection.parked or connection.pending:
                connection.close()
            else:  # a worker owns it: after a close, it would continue without TLS
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)
        while self._returned:
            self._returned.popleft().hang_up()
        self._workers.end()
        self.selector.close()
        self._wake.close()
        self._woken.close()

    @property
    def is_idle(self) -> bool:
        """Return whether no call is being answered."""
        busy = any(c.writing or c.lingering or c.pending or not c.parked for c in self.connections)
        return not (busy or self.queue or self.replies)

    def cut_polls_short(self) -> None:
        """Answer all polls of upstreams without messages; only the loop may call this."""
        for connection, pending in [(c, c.pending) for c in self.connections]:
            if pending and pending.is_poll:
                self.settle(connection, pending.cut_short())

    @property
    def calls(self) -> int:
        """Return how many calls wait for an upstream, a message or a hook."""
        return sum(not c.parked or c.pending is not None for c in list(self.connections))

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, address = self.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):  # the next turn accepts the rest
                return
            except OSError as error:  # no file descriptor is left: try again in a moment
                log.warning("cannot accept a connection, trying again soon: %s", error)
                self.selector.unregister(self.socket)
                return
            full = len(self.connections) >= self._max_connections and not self._make_room()
            try:
                (self._refuse if full else self._welcome)(sock, address and address[0])
            except (OSError, ValueError):  # the client is gone
                sock.close()

    def _make_room(self) -> bool:
        """Close the connections that were idle longest, unused ones first; or slow senders."""
        idle = self.connections - self.queue.keys() - self.replies.keys()
        waiting = [c for c in idle if c.parked and not c.pending]
        waiting.sort(key=lambda c: (bool(c.buffer), c.used, c.deadline))
        for connection in waiting[: len(waiting) // 100 + 1]:
            connection.close()
        return bool(waiting)

    def _welcome(self, sock: socket.socket, peer: str) -> None:
        # Otherwise a second small write waits 40 ms for the acknowledgement of the first one.
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
        if self._certificate:
            context = self._certificate.value
            sock = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        connection = PeerConnection(self, sock, peer)
        self.park(connection)
        self.connections.add(connection)

    def _refuse(self, sock: socket.socket, peer: str) -> None:
        """Refuse a connection; with TLS, only close it."""
        error = ServiceError("ServiceUnavailable", "The proxy has too many connections.")
        answer = PeerConnection(self, sock, peer).refusal(error)
        sock.setblocking(False)
        with sock:
            if not self._certificate:
                sock.send(answer)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(65536)  # unread bytes would turn the end into a reset

    def park(self, connection: PeerConnection, event: int = _READ, act: Any = None) -> None:
        """Make the loop wait for the next bytes of the connection, or call `act` on the event."""
        seconds = SECONDS_LINGERING if connection.lingering else self.timeout_seconds
        connection.deadline = time.monotonic() + seconds
        if not connection.parked:
            connection.parked = True
            connection.socket.setblocking(False)
            self.selector.register(connection.socket, event, act or connection.readable)

    def unpark(self, connection: PeerConnection) -> None:
        """Make the loop stop waiting for the connection."""
        if connection.parked:
            connection.parked = False
            self.selector.unregister(connection.socket)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for connection in [c for c in self.connections if c.deadline < now]:
            if connection.pending:
                self.settle(connection, connection.pending.give_up())
            elif connection.parked:
                connection.close()
        if self.socket not in self.selector.get_map():  # `_accept` had no file descriptor
            self.selector.register(self.socket, _READ, self._accept)

    def wait(self, connection: PeerConnection, pending: Pending) -> None:
        """Make the loop wait for the answer of an upstream."""
        upstream = pending.connection
        connection.pending, connection.deadline = pending, time.monotonic() + upstream.timeout
        self._waiting[upstream] = connection
        if upstream.selector is not self.selector:  # watch it from now on, also while it is idle
            upstream.unwatch()
            upstream.selector = self.selector
            act = functools.partial(self._proceed, upstream)
            self.selector.register(upstream.socket, _READ, act)

    def _proceed(self, upstream: Connection) -> None:
        connection = self._waiting.get(upstream)
        if connection and connection.pending:
            if outcome := connection.pending.proceed():
                self.settle(connection, outcome)
        elif upstream.selector:  # it is idle, and has ended; otherwise a worker reads it
            upstream.close()

    def settle(self, connection: PeerConnection, outcome: Outcome) -> None:
        """Stop waiting for an upstream, and send the outcome in this turn of the loop."""
        assert connection.pending
        del self._waiting[connection.pending.connection]
        connection.pending = None
        if connection in self.connections:
            self.replies[connection] = outcome

    def work(self, connection: PeerConnection, act: Callable[[], bool]) -> None:
        """Run `act` in a worker, which returns whether the connection stays open."""
        self.unpark(connection)
        try:
            self._workers.run(functools.partial(self._do, connection, act))
        except RuntimeError as error:  # no more threads
            log.warning("a call is dropped because no thread can start: %s", error)
            connection.close()

    def _do(self, connection: PeerConnection, act: Callable[[], bool]) -> None:
        goes_on = False
        try:
            with contextlib.suppress(OSError):  # the client was silent for too long, or is gone
                connection.socket.settimeout(self.timeout_seconds)
                goes_on = act()
        except Exception:
            log.exception("a connection failed")
        finally:  # the body of a hook's Reply may raise anything
            if not goes_on or self.socket.fileno() < 0:  # the server is closed
                connection.hang_up()
            self._returned.append(connection)
            self.wake()

    def _take_back(self) -> None:
        self._woken.recv(4096)
        while self._due:
            self._due.popleft()()
        while self._returned:
            connection = self._returned.popleft()
            if connection.socket.fileno() < 0:
                self.connections.discard(connection)
            else:
                self._guarded(self.park, connection.socket, connection)
                self._guarded(connection.resume, connection.socket)


# ==== 10. Command line: read_clients, read_queues, build_parser, Program, Supervisor, main ====
# To add a flag: call `add` in build_parser or _add_answers, and use the option in Program.

# [10.1] The files of clients and queues
_KEY_ID = re.compile("[A-Za-z0-9._-]{3,128}")
_ACCOUNT_ID = re.compile("[0-9]{12}")
_CLIENT_KEYS = """aws_access_key_id aws_secret_access_key aws_session_token aws_account_id
    upstream_profile upstream_role_arn""".split()  # in the order of the fields of Client
_OF_POLICY = ("policy", "read_only")
_FORMS = {  # of the keys that are no attributes
    "region": ("[A-Za-z0-9_-]{0,64}", "a name, as in us-east-1"),
    "account": ("([0-9]{12})?", "12 digits"),
    "dead_letter": ("([^:]+:[0-9]+)?", "NAME:COUNT, as in failed:5"),
    "tags": ("([^=,]+=[^,]*(,|$))*", "KEY=VALUE, separated by commas")}  # fmt: skip


def read_clients(path: str) -> Clients:
    """Return the clients of a file like ~/.aws/credentials, or raise OSError or ValueError."""
    parser = configparser.RawConfigParser(default_section="")
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except configparser.Error as error:
        fault, *_ = str(error).splitlines()  # the other lines may repeat a secret
        lines = getattr(error, "errors", ())
        raise ValueError(f"{fault} (line {lines[0][0]})" if lines else fault) from error
    clients: dict[str, list[Client]] = {}
    for name in parser.sections():
        section = parser[name]
        values = (section.get(key, "") for key in _CLIENT_KEYS)
        client = Client(name, *values)._replace(policy=_policy_of(path, section))
        of_role = re.match("arn:[a-z-]+:iam::([0-9]{12}):", client.upstream_role_arn)
        if of_role and not client.account_id:
            client = client._replace(account_id=of_role[1])
        if not _KEY_ID.fullmatch(client.access_key_id) or not client.secret_access_key:
            needed = "aws_access_key_id (3 to 128 letters, digits, '.', '_', '-')"
            raise ValueError(f"[{name}] needs {needed} and aws_secret_access_key")
        for word in set(section).difference(_CLIENT_KEYS, _OF_POLICY):
            meant = did_you_mean(word, _CLIENT_KEYS, 0.9) or did_you_mean(word, _OF_POLICY)
            if meant:  # to ignore the word could give the client more than was meant
                raise ValueError(f"[{name}] has {word}{meant}")
        if client.account_id and not _ACCOUNT_ID.fullmatch(client.account_id):
            raise ValueError(f"[{name}] aws_account_id must be 12 digits")
        same_key = clients.setdefault(client.access_key_id, [])
        if any(other.session_token == client.session_token for other in same_key):
            raise ValueError(f"[{name}] repeats the key and token of another section")
        same_key.append(client)
    if not clients:
        raise ValueError("the file has no section")
    return clients


def _policy_of(path: str, section: configparser.SectionProxy) -> Any:
    """Return the policy of a section, None if it has none; ValueError if it cannot be used."""
    name, read_only = section.get("policy"), section.get("read_only", "false").lower()
    if read_only not in ("true", "false") or name == "":
        raise ValueError(f"[{section.name}] read_only must be true or false, and policy a file")
    statements = READ_ONLY if read_only == "true" else ()
    if name is None:
        return Policy(statements) if statements else None
    file = os.path.join(os.path.dirname(path), name)
    with raising(ValueError, f"[{section.name}] policy {file}: %s", OSError, ValueError):
        return Watched(functools.partial(Policy.read, more=statements), file)


def read_queues(path: str) -> Mapping[str, Section]:
    """Return the queues that a file declares, a section each.  Raise OSError or ValueError."""
    parser = configparser.RawConfigParser(default_section="")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read_string(pathlib.Path(path).read_text("utf-8"))
    except configparser.Error as error:
        raise ValueError(" ".join(str(error).split())) from error
    declared = {name: dict(parser[name]) for name in parser.sections()}
    for name, given in declared.items():
        for key in set(given).difference(SETTINGS, _FORMS):
            meant = did_you_mean(key, (*SETTINGS, *_FORMS))
            raise ValueError(f"[{name}] {key} is no attribute of a queue{meant}")
        for key, (form, wanted) in _FORMS.items():
            if not re.fullmatch(form, given.get(key, "")):
                raise ValueError(f"[{name}] {key} must be {wanted}")
    return declared


def create_queues(sqs: Sqs, declared: Mapping[str, Section], region: str, account: str) -> None:
    """Create queues, or change existing ones.  Raise ValueError with the name of a wrong one.

    NAME.fifo is a FIFO queue.  Dead-letter queues need no order: all queues exist before links."""

    def _perform(name: str, operation: str, **more: Any) -> bool:
        place = declared[name].get("region") or region
        owner = Client("", "", "", account_id=declared[name].get("account") or account)
        try:
            sqs.perform(sqs_call("localhost", operation, {"QueueUrl": name, **more}, place, owner))
        except ServiceError as error:
            if error.code != "QueueNameExists":
                raise ValueError(f"[{name}] {' '.join(error.message.split())}") from error
            return False
        return True

    for name, given in declared.items():
        attributes = {key: value for key, value in given.items() if key not in _FORMS}
        new = {"FifoQueue": "true", **attributes} if name.endswith(".fifo") else attributes
        if not _perform(name, "CreateQueue", QueueName=name, Attributes=new):
            _perform(name, "SetQueueAttributes", Attributes=attributes)
        tags = (it.partition("=") for it in given.get("tags", "").split(",") if it.strip())
        _perform(name, "TagQueue", Tags={key.strip(): value.strip() for key, _, value in tags})
    for name, given in declared.items():
        target, _, count = given.get("dead_letter", "").rpartition(":")
        place = f"{given.get('region') or region}:{given.get('account') or account}"
        policy = {"deadLetterTargetArn": f"arn:aws:sqs:{place}:{target}", "maxReceiveCount": count}
        if target:
            _perform(name, "SetQueueAttributes", Attributes={"RedrivePolicy": json.dumps(policy)})


# [10.2] Flags
class _Parser(argparse.ArgumentParser):
    """Reads the lines of `@FILE` as a shell does, and reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help shows all flags)\n")

    convert_arg_line_to_args = staticmethod(functools.partial(shlex.split, comments=True))


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], Any]:
    def number(text: str) -> float:  # argparse shows this name in its message
        """Return the number in the text; ArgumentTypeError if it is out of range."""
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return number


def _client(text: str) -> Client:
    key, _, secret = text.partition(":")
    if not _KEY_ID.fullmatch(key) or not secret:
        message = "not KEY:SECRET, the key 3 to 128 letters, digits, '.', '_' or '-'"
        raise argparse.ArgumentTypeError(message)  # it does not show the secret
    return Client(key, key, secret)


def _matched(pattern: str, form: str, text: str) -> Any:
    if not (found := re.fullmatch(pattern, text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return found.groups() or text


def _public_url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in DEFAULT_PORTS or not parts.netloc or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is not http(s)://host[:port][/path]")
    return text


def _route(text: str) -> tuple[str, str]:
    pattern, target = _matched("([!-~]+)=([^=]*)", "PATTERN=TARGET, as in 's3:Get*=aws'", text)
    return pattern, _target_name(target)


def _target_name(text: str) -> str:
    if text not in ("embedded", "aws", "deny") and not re.match("tape:.", text):
        known = "embedded, aws, deny, tape:FILE or http(s)://host[:port]"
        with raising(argparse.ArgumentTypeError, f"%s; a target is {known}", ValueError):
            parse_endpoint(text)
    return text


def _address(text: str) -> tuple[str, int]:
    host, port = _matched(r"\[?(.+?)\]?:([0-9]+)", "HOST:PORT", text)
    return host, _number(int, 0, 65535)(port)


_account_id = functools.partial(_matched, _ACCOUNT_ID.pattern, "12 digits")
_FILE: Any = {"default": "", "metavar": "FILE"}
_MANY: Any = {"action": "append", "default": []}
_EXAMPLES = """\
examples:
  python awsproxy.py --port 8081                       use the demo client, dummykey
  python awsproxy.py --upstream aws --clients clients  verify, sign again, forward to AWS
  python awsproxy.py --upstream http://localhost:4566  forward to another server
  python awsproxy.py --route 'sqs:Purge*=deny' --route 'sqs:*=aws' --clients clients
  python awsproxy.py @flags                            read flags from a file
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(prog="awsproxy", fromfile_prefix_chars="@", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # it keeps the lines of the examples
        description="Verify the signature of each AWS call; answer Amazon SQS from memory, or"
        " sign the call again and forward it to AWS.")  # fmt: skip
    add = parser.add_argument_group("where to listen").add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_number(int, 0, 65535), default=8081, help="port to listen on; 0 for any")
    add("--admin", type=_address, metavar="HOST:PORT", help="serve /_awsproxy/ here, not on PORT")
    add("--tls-cert", **_FILE, help="TLS certificate and chain (PEM), read again on change")
    add("--tls-key", **_FILE, help="private key of the certificate, if in another file")
    add("--processes", type=_number(int, 0, 256), default=1, metavar="N",
        help="processes on the port, 0 for one a core; every route must forward")  # fmt: skip
    add("--drain-seconds", type=_number(float, 0, 86400), default=5, metavar="SECONDS",
        help="before the exit, wait up to this long for calls and messages in flight")  # fmt: skip
    add("--public-url", type=_public_url, metavar="URL",
        help="beginning of queue URLs (default: scheme and Host of the request)")  # fmt: skip
    add("--host-name", **_MANY, help="a name of this proxy, repeatable; S3 buckets may precede it")
    add("--max-body", type=_number(int, 1, 1 << 40), default=16777216, help="most bytes of a body")
    add("--max-connections", type=_number(int, 1, 1000000), default=10000, metavar="N",
        help="most connections of a process; one more replaces an idle one, if any")  # fmt: skip
    add("--timeout", type=_number(float, 0.1, 86400), default=60, metavar="SECONDS",
        help="longest silence of a connection, and longest run of a hook")  # fmt: skip
    add = parser.add_argument_group("who may call").add_argument
    add("--clients", **_FILE, help="keys that callers sign with, as in ~/.aws/credentials; read"
        " again on change (default: dummykey with secret dummysecret, on loopback)")  # fmt: skip
    add("--client", **_MANY, type=_client, metavar="KEY:SECRET",
        help="a key that callers sign with, repeatable; the process list shows it")  # fmt: skip
    add("--no-verify", action="store_true", help="accept any signature, or none; on loopback only")
    add("--policy-mode", choices=("enforce", "observe"), default="enforce",
        help="observe: log the calls that a policy refuses, and let them pass")  # fmt: skip
    add("--region", **_MANY, help="a region that calls may name, repeatable (default: any)")
    _add_answers(parser)
    for action in parser._actions:
        if action.default not in (None, False, "", [], ("", ""), argparse.SUPPRESS):
            action.help = f"{action.help} (default: %(default)s)"
    return parser


def _add_answers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what answers").add_argument
    add("--route", **_MANY, type=_route, metavar="PATTERN=TARGET",
        help="actions as in IAM policies, REST calls as in lambda:POST/2015-03-31/functions/*, and"
        " their target: embedded (SQS in memory), aws, http(s)://host[:port], tape:FILE (recorded"
        " or canned answers) or deny; the first match counts (default: sqs:* and"
        " sts:GetCallerIdentity, embedded)")  # fmt: skip
    add("--upstream", type=_target_name, metavar="TARGET", help="short for --route '*=TARGET'")
    add("--upstream-timeout", type=_number(float, 1, 86400), default=UPSTREAM_SECONDS,
        metavar="SECONDS", help="longest wait; at most 65 for ReceiveMessage")  # fmt: skip
    add("--record", **_FILE, help="append forwarded calls and their answers to a tape")
    add("--hook", **_MANY, help=".py file: before, rewrite, after, observe, concerns; repeatable")
    add("--task-protection", action="store_true", help="protect an ECS task that holds messages")
    add("--profile", default="", metavar="NAME", help="profile in ~/.aws to forward with")
    add = parser.add_argument_group("Amazon SQS in memory").add_argument
    add("--account-id", type=_account_id, default="000000000000", help="owner of the queues")
    add("--queue", **_MANY, help="a queue to create at the start, repeatable; X.fifo is FIFO")
    add("--queues", **_FILE, help="queues to create, an INI section each: attributes as in the API"
        ", dead_letter = NAME:COUNT, region, account, tags; read again on change")  # fmt: skip
    add("--store", **_FILE, help="keep the queues in this SQLite file")
    add("--store-sync", choices=("normal", "full"), default="normal",
        help="full: acknowledged changes survive a loss of power, too")  # fmt: skip
    add = parser.add_argument_group("what to print").add_argument
    add("--log-format", choices=("text", "json"), default="text", help="form of the log lines")
    add("--log-file", **_FILE, help="file for log lines; SIGHUP reopens it")
    add("--quiet", action="store_true", help="do not print a line for each call")
    add("--explain", action="store_true", help="print each call with all steps of its signature")
    add("--inspect", action="store_true", help="serve a page at /_awsproxy/ that shows each call")
    add("--check", metavar="FILE", help="explain the signature of one request, as text or as"
        " `curl -v` shows it (- is stdin), and exit with 0 if right, otherwise 1")  # fmt: skip
    version = f"awsproxy {__version__} (sha256 {file_sha256()[:12]})"  # it identifies a copy
    add("--version", action="version", version=version, help="print version and hash of this file")


# [10.3] The program
class UsageError(Exception):
    """A fault in the flags or in a file that they name: one line with the remedy."""


def _usage_errors(prefix: str) -> contextlib.AbstractContextManager[None]:
    return raising(UsageError, f"{prefix}%s", OSError, ValueError, ServiceError)


def settle_memory() -> None:
    """Give unused memory back to the system, and let the collector visit only new objects."""
    with contextlib.suppress(ImportError, AttributeError, OSError, TypeError):  # only glibc does
        importlib.import_module("ctypes").CDLL(None).malloc_trim(0)
    # The collector need not visit all messages again and again: calls leave no cycles behind.
    gc.freeze()
    gc.set_threshold(100000, 50, 100)


class Program:
    """A running proxy with its files, hooks and ports.  Raises UsageError for bad flags."""

    SPARE_FILES = 64  # for admin connections, logs, long bodies and the interpreter
    _drain_until = math.inf
    _is_public = False  # whether it listens on more than loopback

    def __init__(self, options: argparse.Namespace, console: LineWriter, process: Process) -> None:
        self._options, self._console, self._writer = options, console, console
        self._process, self.admin = process, None
        path, key = options.tls_cert, options.tls_key
        if key and not path:
            raise UsageError("--tls-key needs --tls-cert")
        with _usage_errors(f"the certificate in {path}{key and f' and {key}'} cannot be used: "):
            read = functools.partial(read_certificate, key=key)
            self._certificate = Watched(read, path, key) if path else None
        self._scheme = "https" if self._certificate else "http"
        self._sqs, self._store = Sqs(), None
        self._metrics, self._keyring = Metrics(), Keyring(os.environ, options.profile)
        self._pool = Pool(timeout=options.upstream_timeout)
        routes = build_routes(options, self._keyring, self._sqs, self._pool)
        self._upstreams = [route.target for route in routes if isinstance(route.target, Upstream)]
        sqs = self._sqs if any(isinstance(it.target, Embedded) for it in routes) else None
        for name in ("queue", "queues", "store"):
            if getattr(options, name) and not sqs:
                raise UsageError(f"--{name} needs a route to 'embedded'")
        with _usage_errors(f"--queues {options.queues}: "):
            self._queues = Watched(read_queues, options.queues) if options.queues else None
        with _usage_errors(f"--store {options.store}: "):
            if options.store:
                self._store = Store(options.store, self._sqs, options.store_sync == "full")
        forwards = all(isinstance(it.target, (Upstream, Deny)) for it in routes)
        if options.processes != 1 and (options.task_protection or options.record or not forwards):
            raise UsageError("--processes cannot share queues, tapes, --record, --task-protection")
        path = options.clients
        with _usage_errors(path and f"the clients file {path} cannot be used: "):
            self._clients = Watched(lambda _: self._check_clients(all_clients(options)), path)
        with _usage_errors("AWS_CA_BUNDLE cannot be used: "):
            if self._upstreams:  # it takes 20 ms
                tls_context()
        self._in_flight = self._build_in_flight()
        with _usage_errors(""):
            self._check_clients(self._clients.value, CredentialCache.get)
            self._create_queues()
        least = (lambda: time.time_ns() // 1000) if process.others else int  # an order for all
        inspector = Inspector(least) if options.inspect else None
        guard = Guard(options.policy_mode == "observe")
        self._status = Status(self._metrics, self._in_flight, sqs, self._reset, inspector, guard)
        hooks = [self._metrics, self._in_flight, *filter(None, [inspector]), *self._read_hooks()]
        self.proxy = Proxy(self._clients.value, routes=routes, verified=not options.no_verify,
            hooks=hooks, sqs=self._sqs, regions=options.region, account_id=options.account_id,
            scheme=self._scheme, public_url=options.public_url or "", max_body=options.max_body,
            hook_seconds=options.timeout, status=None if options.admin else self._status,
            hosts=(options.admin[0] if options.admin else "", *options.host_name),
            guard=guard)  # fmt: skip
        listener, admin = process.listeners or _bind(options, reuse_port=process.supervisor > 0)
        self.server = Server(listener, self.proxy, timeout=options.timeout,
            max_connections=self._most_connections(), every_half_second=self._tick,
            certificate=self._certificate)  # fmt: skip
        if admin:
            pages = Proxy({}, hosts=self.proxy.hosts, max_body=0, status=self._status, admin=True)
            self.admin = Server(admin, pages, timeout=options.timeout, max_connections=32)
        if process.private:
            self._join(process)
        self._add_gauges()

    def _join(self, process: Process) -> None:
        """Join the pages and the messages in flight of all processes."""
        own = Proxy({}, max_body=0, status=dataclasses.replace(self._status), admin=True)
        threading.Thread(target=Server(process.private, own).serve_forever, daemon=True).start()
        self._status.others = [it.private.getsockname() for it in process.others]
        self._in_flight.others = [it.inlet for it in process.others]
        hear = functools.partial(self._in_flight.hear, process.pipe)
        self.server.selector.register(process.pipe, selectors.EVENT_READ, hear)

    def _add_gauges(self) -> None:
        gauge, server, keys = self._metrics.gauge, self.server, self._keyring
        gauge("log_lines_dropped", "Log lines that were lost.", lambda: self._writer.dropped)
        gauge("connections", "Open connections.", lambda: len(server.connections))
        gauge("calls", "Calls in progress.", lambda: server.calls)
        gauge("in_flight", "Messages in flight.", lambda: self._in_flight.total)
        of, every = ("visible", "in_flight", "delayed"), self._sqs.overview
        place, most = operator.itemgetter("region", "account", "name"), 200  # queues
        gauge("queue_messages", "Messages in memory.",
            lambda: {(*place(it), name): it[name] for it in every(most) for name in of},
            "region account queue state")  # fmt: skip
        gauge("queue_oldest_seconds", "Age of the oldest message in memory.",
            lambda: {place(it): it["oldest_seconds"] for it in every(most)},
            "region account queue")  # fmt: skip
        gauge("credentials_seconds", "Time until the first credentials expire.", keys.seconds_left)

    def _check_clients(self, clients: Clients, keys_of: Any = CredentialCache.ready) -> Clients:
        """Return the clients; ValueError if they must not reach the upstreams of the routes."""
        fix = "give clients keys of their own with --clients FILE or --client KEY:SECRET"
        if self._options.no_verify and any(it.policy for it in itertools.chain(*clients.values())):
            raise ValueError("--no-verify would ignore the policies of the clients")
        to_aws = any(not it.endpoint or is_aws_host(it.endpoint.host) for it in self._upstreams)
        if has_demo_key(clients) and (self._is_public or (to_aws and not self._options.no_verify)):
            why = "a route leads to aws" if to_aws else "--host is more than loopback"
            raise ValueError(f"the key dummykey is public, and {why}: {fix}")
        each = itertools.chain(*clients.values()) if self._upstreams else ()
        for name, cache in dict.fromkeys((it.name, self._keyring.of(it)) for it in each):
            try:
                own = keys_of(cache)
            except NoKeys as reason:
                log.warning("no credentials to forward calls of [%s]: %s", name, reason)
                continue
            if own and (key := own.access_key_id) in clients:
                raise ValueError(f"{key} is a client's and also the one to forward with: {fix}")
        return clients

    def _reset(self, name: str) -> int:
        """Drop all queues and create the queues of the flags, or empty the queues of one name."""
        count = self._sqs.reset(name)
        self._in_flight.forget(name)
        if not name:
            self._create_queues()
        self._sqs.commit()
        return count

    def _create_queues(self) -> None:
        options, declared = self._options, self._queues.value if self._queues else {}
        queues = {**{name: {} for name in options.queue}, **declared}
        create_queues(self._sqs, queues, (*options.region, "us-east-1")[0], options.account_id)
        self._sqs.commit()

    def _read_hooks(self) -> list[Any]:
        options, path, form = self._options, self._options.log_file, self._options.log_format
        with _usage_errors(f"the file {path} cannot be used: "):
            if path and not options.quiet:
                self._writer = LineWriter(open_log(path), path)
        if form == "text" and self._writer.is_terminal:
            form = "colours" if self._writer.in_colour else "columns"
        hooks: list[Any] = [] if options.quiet else [AccessLog(self._writer, form)]
        if options.explain:
            hooks += [Explainer(self._console, "colours" if self._console.in_colour else "text")]
        for path in options.hook:
            with _usage_errors(f"the file {path} cannot be used: "):
                hooks.append(HookFile(path))
        with _usage_errors(f"the tape {options.record} cannot be used: "):
            hooks += [Recorder(options.record)] if options.record else []
        return hooks

    def _build_in_flight(self) -> InFlight:
        agent, wanted = os.environ.get("ECS_AGENT_URI", ""), self._options.task_protection
        if wanted and not agent:
            log.warning("--task-protection has no effect: ECS_AGENT_URI is not set")
        ask, run = lambda *about: self.proxy.visibility_timeout(*about), Workers().run
        return TaskProtection(agent, ask, run) if wanted and agent else InFlight(ask, run)

    def _most_connections(self) -> int:
        """Return the most connections at once: each needs a file, and one for its upstream."""
        wanted, each = int(self._options.max_connections), 2 if self._upstreams else 1
        spare = self.SPARE_FILES + 3 * len(self._process.others) + Pool.MOST * (each - 1)
        allowed = raise_file_limit(spare + wanted * each)
        most = (allowed - min(spare, allowed // 3)) // each
        if most < wanted * 9 // 10:  # a small difference needs no line
            log.warning("at most %d connections: ulimit -n allows %d open files", most, allowed)
        return min(most, wanted)

    def _tick(self) -> None:
        self.proxy.refresh_hooks()
        self._pool.close_idle()
        policies = [client.policy for client in itertools.chain(*self.proxy.clients.values())]
        for watched in (self._certificate, *policies):
            if isinstance(watched, Watched):
                watched.refresh()
        if self._clients.refresh():
            self.proxy.clients = self._clients.value
            signing_key.cache_clear()
        if self._queues and not self._sqs.is_failing and self._queues.refresh():
            try:
                self._create_queues()
            except (ValueError, ServiceError) as error:
                log.error("--queues %s: %s", self._options.queues, error)
        if isinstance(self._in_flight, TaskProtection):
            self._in_flight.tend_later()
        if self._process.supervisor not in (0, os.getppid()):  # it was killed
            self._process.supervisor = 0
            self.end()
        if self._drain_until < math.inf:
            self.server.cut_polls_short()
            if self._is_settled or time.monotonic() > self._drain_until:
                self.server.stop()

    @property
    def _is_settled(self) -> bool:
        return self.server.is_idle and not (self._pool.given_up or self._in_flight.total)

    def end(self) -> None:
        """Drain if the flags say so, then stop.  Stop at once if called a second time."""
        if not self._options.drain_seconds or self._drain_until < math.inf or self._is_settled:
            self.server.stop()
            return
        self._drain_until = time.monotonic() + self._options.drain_seconds
        held, calls = self._in_flight.total, self.server.calls
        waits = f"{_counted(held, 'message')} in flight, {_counted(calls, 'call')} in progress"
        self._tell(f"draining: {waits}, up to {self._options.drain_seconds:g} s")
        self.proxy.draining = self._status.draining = self._pool.draining = True
        self._sqs.drain()

    def serve(self) -> int:
        """Serve until a signal arrives, and return the exit code."""
        options = self._options
        if not is_loopback(str(self.server.server_address[0]).partition("%")[0]):
            if options.no_verify:
                raise UsageError("--no-verify needs a loopback --host")
            self._is_public = True
            with _usage_errors(""):
                self._check_clients(self.proxy.clients)
        if options.no_verify:
            log.warning("--no-verify: no signature is checked; anyone may call this port")
        for number in SIGNALS:
            signal.signal(number, self._note_signal)
        if self.admin:
            threading.Thread(target=self.admin.serve_forever, daemon=True).start()
            self._announce("admin on http", options.admin[0], self.admin)
        address = self._announce(f"listening on {self._scheme}", options.host, self.server)
        routes = ", ".join(map(" -> ".join, given_routes(options)[:4]))
        clients = itertools.chain(*self._clients.value.values())
        names = ", ".join(dict.fromkeys(f"{it.name} (key {it.access_key_id})" for it in clients))
        self._tell(f"answers {routes}; clients: {names:.200}")
        keys = "dummykey:dummysecret" if has_demo_key(self.proxy.clients) else "KEY:SECRET"
        trust = f" --cacert {shlex.quote(options.tls_cert)}" if self._certificate else ""
        self._tell(f"try: curl {self._scheme}{address}{trust} --aws-sigv4 aws:amz:us-east-1:sqs"
            f" --user {keys} -H 'X-Amz-Target: AmazonSQS.ListQueues' -d '{{}}'")  # fmt: skip
        if self._process.supervisor:
            os.kill(self._process.supervisor, signal.SIGUSR1)
        settle_memory()
        self.server.serve_forever()
        if self._store:
            self._store.close()
        if not self._process.others:
            self._tell(f"stopped after {_counted(self._metrics.total, 'call')}")
        self._writer.close()
        return 0

    def _announce(self, what: str, host: str, server: Server) -> str:
        port = server.server_address[1]
        address = f"://[{host}]:{port}" if ":" in host else f"://{host}:{port}"
        self._tell(f"{what}{address}", always=True)
        return address

    def _tell(self, line: str, always: bool = False) -> None:
        """Print a line for a person at a terminal, or always; of several processes, one prints."""
        is_first = not (self._process.number or self._process.ended)
        if is_first and (always or self._console.is_terminal):
            self._console.write(f"{line}\n")

    def _note_signal(self, number: int, _: object) -> None:
        """Let the event loop handle the signal: a signal handler must not wait or fail."""
        self.server.wake(self._writer.reopen if number == signal.SIGHUP else self.end)


# [10.4] Processes
SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def _bind(options: argparse.Namespace, reuse_port: bool) -> list[Any]:
    """Return the socket that listens on --host and --port, and that of --admin, or None."""
    bound: list[Any] = []
    both = ((options.host, options.port), "--host and --port"), (options.admin, "--admin")
    for address, flags in both:
        place = address and f"{address[0]} port {address[1]}"
        remedy = f"choose others with {flags} (0 picks a free one)"
        with _usage_errors(f"cannot listen on {place}, {remedy}: "):
            bound.append(address and listen(address, reuse_port))
    return bound


@dataclass(eq=False)
class Process:
    """A process of the program.  One that replaces it has the same number, socket and pipes."""

    number: int
    private: Any = None  # the socket where other processes ask for its pages
    pipe: int = -1  # others write into `inlet` what they know about messages
    inlet: int = -1
    others: Sequence[Process] = ()
    supervisor: int = 0  # the process that gets SIGUSR1 when this one serves
    listeners: Sequence[Any] = ()  # on the ports; if empty, the process opens its own
    pid: int = 0
    began: float = 0.0
    ended: str = ""  # how the process before it ended


class Supervisor:
    """Runs processes on one port, starts one again if it ends, and passes signals on.

    Each process has its own socket on the port (SO_REUSEPORT).  Linux shares the connections."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._processes = options, list[Process]()
        self._serves, self._ending, self._code = False, False, 0

    def run(self) -> int:
        """Serve until all processes have ended, and return the exit code."""
        watched = {*SIGNALS, signal.SIGCHLD, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # macOS drops a signal without a handler
        with contextlib.ExitStack() as stack:
            with _usage_errors("the processes cannot start: "):
                self._open(stack.enter_context(tempfile.TemporaryDirectory(prefix="awsproxy-")))
            settle_memory()
            self._start(self._processes[0])  # the others follow when it serves
            while any(process.pid for process in self._processes):
                if (number := signal.sigwait(watched)) == signal.SIGCHLD:
                    self._reap()
                elif number != signal.SIGUSR1:
                    self._ending = self._ending or number != signal.SIGHUP
                    for process in filter(operator.attrgetter("pid"), self._processes):
                        os.kill(process.pid, number)
                elif not (self._serves or self._ending):
                    self._serves = True
                    for listener in filter(None, self._processes[0].listeners):
                        listener.close()  # the process keeps its copy
                    self._processes[0].listeners = ()
                    list(map(self._start, self._processes[1:]))
        return self._code

    def _open(self, folder: str) -> None:
        options = self._options
        of_this_machine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        count = options.processes or len(of_this_machine(0))
        raise_file_limit(Program.SPARE_FILES + 4 * count)
        for number in range(count):
            private = socket.socket(socket.AF_UNIX)
            private.bind(os.path.join(folder, str(number)))
            private.listen()
            for pipe in (pipes := os.pipe()):
                os.set_blocking(pipe, False)
            self._processes.append(Process(number, private, *pipes, (), os.getpid()))
        for process in self._processes:
            process.others = [it for it in self._processes if it is not process]
        # No other program has the ports; from now on, the other processes may share them.
        listener, admin = self._processes[0].listeners = _bind(options, reuse_port=False)
        for shared in filter(None, (listener, admin)):
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        options.port = listener.getsockname()[1]
        options.admin = admin and (options.admin[0], admin.getsockname()[1])

    def _start(self, process: Process) -> None:
        process.began, process.pid = time.monotonic(), os.fork()
        if process.pid:
            return
        code = 1
        try:
            os.setpgid(0, 0)  # the supervisor passes on what Ctrl-C sends
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write to the terminal
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            code = run_program(self._options, process)
        except UsageError as error:
            code = 2
            print(f"awsproxy: {error}", file=sys.stderr)
        except Exception:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def _reap(self) -> None:
        """Start the processes again that have ended; end if the first one could not start."""
        for process in [it for it in self._processes if it.pid]:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid:
                process.pid, code = 0, os.waitstatus_to_exitcode(status)
                if not self._serves:  # the flags have a fault
                    self._code = code
                elif not self._ending:
                    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                    process.ended = f"id {pid}, ended {how}"
                    time.sleep(max(0.0, process.began + 1 - time.monotonic()))
                    self._start(process)


# [10.5] In a test process
class MovableClock:
    """The system's clock, which a test can move ahead."""

    ahead = 0.0  # seconds
    wake: Callable[[], None] = staticmethod(lambda: None)  # `running` sets it

    def __call__(self) -> float:
        """Return seconds since 1970."""
        return steady_time() + self.ahead

    def advance(self, seconds: float) -> None:
        """Let time pass for the queues that use this clock."""
        self.ahead += seconds
        self.wake()


@contextlib.contextmanager
def running(queues: Sequence[str] = (), clock: Optional[MovableClock] = None, port: int = 0,
        clients: Clients = DEMO_CLIENTS, **options: Any) -> Iterator[str]:  # fmt: skip
    """Run a server in a thread, with queues in us-east-1, and yield its URL; stop all at the end.

    `clock` is the time of the queues; `options` are more arguments of Proxy."""
    sqs = Sqs(clock := clock or MovableClock())
    clock.wake = sqs.wake
    account = options.get("account_id", "000000000000")
    create_queues(sqs, {name: {} for name in queues}, "us-east-1", account)
    status = Status(Metrics(), None, sqs, sqs.reset, guard=options.setdefault("guard", Guard()))
    with Server(("127.0.0.1", port), Proxy(clients, sqs=sqs, status=status, **options)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            sqs.drain()
            server.stop()
            thread.join()


# [10.6] A saved request
def read_request(data: bytes) -> Request:
    """Return a request that a person saved: as text, or as the `>` lines of `curl -v`.

    Lines of the head may end with LF.  A newline after the body is dropped.  Raise ValueError if
    the request is malformed, or its body is missing."""
    sent = re.findall(rb"^> ?(.*)$", data, re.MULTILINE)
    lines = b"\n".join(sent) + b"\n\n" if sent else data.lstrip() + b"\n\n"
    head, body = re.split(rb"\r?\n\r?\n", lines, maxsplit=1)
    with raising(ValueError, "%s", ServiceError):
        parsed = parse_head(re.sub(rb"\r?\n", b"\r\n", head) + b"\r\n\r\n")
        length = body_framing(parsed)
    if length is None or length > len(body):
        raise ValueError("the body is missing (curl -v does not show it): write it after the head")
    return parsed.request(io.BytesIO(body[:length]), "127.0.0.1", lambda: False)


def all_clients(options: argparse.Namespace) -> Clients:
    """Return the clients of --clients and --client, or the demo client without both flags."""
    clients = dict(read_clients(options.clients)) if options.clients else {}
    for client in options.client:
        clients[client.access_key_id] = [*clients.get(client.access_key_id, ()), client]
    return clients or DEMO_CLIENTS


def check_file(path: str, options: argparse.Namespace) -> int:
    """Print the explanation of a saved request, checked at its own date; return 0 or 1."""
    with _usage_errors(f"--check {path}: "):
        clients = all_clients(options)
        data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
        request = read_request(data)
    now = time.time()
    with contextlib.suppress(ServiceError, ValueError):  # the check refuses a wrong date
        now = epoch(authorization_of(request).amz_date)
    hosts = (request.header("host") or "localhost", *options.host_name)  # it was sent elsewhere
    checked = Proxy(clients, clock=lambda: now, regions=options.region, hosts=hosts).check(request)
    print(explanation(explain(checked), sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    return 0 if checked.verified else 1


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def run_program(options: argparse.Namespace, process: Process) -> int:
    """Run one process of the program, and return its exit code; UsageError if it cannot start."""
    writer: Any = LineWriter(sys.stderr or open(os.devnull, "w"))  # None if it was closed
    form = "awsproxy: %(message)s"
    with contextlib.closing(writer):
        logging.basicConfig(
            format=form, level=logging.INFO, stream=writer, force=process.supervisor > 0
        )
        if process.ended:
            log.error("process %d, %s; starting it again", process.number, process.ended)
        program = Program(options, writer, process)
        with program.server:
            return program.serve()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program with these arguments, or the command line's, and return its exit code."""
    try:
        with _usage_errors("a file of flags cannot be used: "):  # a quote is open, or not UTF-8
            options = build_parser().parse_args(argv)
        if options.check:
            return check_file(options.check, options)
        alone = options.processes == 1
        return run_program(options, Process(0)) if alone else Supervisor(options).run()
    except UsageError as error:
        print(f"awsproxy: {error}", file=sys.stderr)
        return 2


def _main_as_hook(former: Any, *_: object) -> None:
    """Run the program, and report an exception as if no hook had run it."""
    sys.excepthook = former
    try:
        sys.exit(main())
    except (Exception, KeyboardInterrupt) as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)  # 128 + SIGINT


# [10.7] Routes of the flags
def given_routes(options: argparse.Namespace) -> Sequence[tuple[str, str]]:
    """Return the patterns and targets of the flags, or the default route."""
    upstream = [("*", options.upstream)] if options.upstream else []
    return [*options.route, *upstream] or DEFAULT_ROUTES


def build_routes(options: argparse.Namespace, keyring: Keyring, sqs: Sqs,
        pool: Pool) -> Sequence[Route]:  # fmt: skip
    """Return the routes that the flags ask for; log patterns that match no known action."""
    targets: dict[str, Target] = {"embedded": Embedded(sqs), "deny": Deny()}
    given = given_routes(options)
    for pattern, name in given:
        if name.startswith("tape:"):
            with _usage_errors(f"the tape {name[5:]} cannot be used: "):
                targets[name] = targets.get(name) or Tape(name[5:])
        elif name not in targets:
            endpoint = None if name == "aws" else parse_endpoint(name)
            targets[name] = Upstream(endpoint, keyring.of, pool)
        if (nearest := nearest_pattern(pattern)) is not None:
            meant = f"; did you mean '{nearest}'?" if nearest else ""
            log.warning("--route '%s=...' can match no action%s", pattern[:MAX_SHOWN], meant)
    return [Route(pattern, targets[name]) for pattern, name in given]


def raise_file_limit(wanted: int) -> int:
    """Raise the limit of open files to `wanted` if possible, and return the limit."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if it == resource.RLIM_INFINITY else it for it in limits)
    if soft < (more := min(wanted, hard)):
        with contextlib.suppress(OSError, ValueError):  # the system has a lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, limits[1]))
            soft = more
    return min(soft, more)


if __name__ == "__main__":
    # A module that imports awsproxy must get this copy, not a second one (cpython#103390).
    sys.modules.setdefault("awsproxy", sys.modules[__name__])
    if sys._getframe().f_back is None and not sys.flags.inspect:
        # Python keeps the syntax tree of a script, 25 MB, until the script ends (`pyrun_file` in
        # CPython's pythonrun.c).  This exception ends it, and the program runs in the hook.
        sys.excepthook = functools.partial(_main_as_hook, sys.excepthook)
        raise RuntimeError("nobody called sys.excepthook")
    sys.exit(main())
