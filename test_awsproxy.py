"""Tests of awsproxy.py, in the order of its chapters.

python -m unittest                   all tests
python test_awsproxy.py bench        how quick it is
python test_awsproxy.py abuse        how it holds out
python test_awsproxy.py fuzz         random requests: --seconds N [--seed S]
"""

import argparse
import ast
import base64
import calendar
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import email.utils
import errno
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
import urllib.parse
import xml.etree.ElementTree as ElementTree
import zlib
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock
from xml.sax.saxutils import escape

import awsproxy
from awsproxy import (
    Client,
    CredentialCache,
    CredentialChain,
    Credentials,
    Keyring,
    Profile,
    Proxy,
    Reply,
    Request,
    Server,
    ServiceError,
    Skipped,
)

# ==== A signer of our own, a clock that waits for nobody, and a caller in both protocols ====

EXAMPLE = Client("example", "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
DEMO = Client("demo", "dummykey", "dummysecret")
EXAMPLE_TIME = 1440938160  # 20150830T123600Z
HOST = "localhost:8081"
DEADLINE = 60  # seconds; only a failure takes this long, however busy the machine is
CORES = os.cpu_count() or 1
SHORTER = 15  # seconds; a bound for waits that would otherwise last at least 20 seconds


def wait_until(condition, seconds=DEADLINE):
    """Wait until the condition holds; raise AssertionError if it never does."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"the condition did not hold within {seconds} s")
        time.sleep(0.01)


def fewest_seconds(act, enough, tries=10):
    """Return the fewest seconds that a call of act took; stop at the first try below enough.

    A busy machine can slow down some tries.  A program that waits is slow in each of them.
    """
    fewest = math.inf
    for _ in range(tries):
        began = time.monotonic()
        act()
        fewest = min(fewest, time.monotonic() - began)
        if fewest < enough:
            break
    return fewest


def amz_date(seconds):
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def escaped(text, keep):
    """Percent-encode all bytes but the unreserved and those to keep (RFC 3986, 2.3)."""
    plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~" + keep
    return "".join(chr(byte) if byte in plain else f"%{byte:02X}" for byte in text)


def sorted_query(query):
    """The canonical query of one that is percent-encoded as the specification wants it."""
    pairs = [part.partition("=")[::2] for part in query.split("&") if part]
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


class Signature(NamedTuple):
    scope: str
    canonical: str
    text: str
    hex: str


def signature(client, method, path, query, headers, names, payload_hash, at, scope):
    """Sign as "Create a signed AWS API request" of the IAM User Guide says.

    `path` and `query` are in canonical form; `names` are the signed headers.
    """
    values = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(re.sub("[ \t]+", " ", value).strip(" \t"))
    lines = "".join(f"{name}:{','.join(values[name])}\n" for name in names)
    canonical = "\n".join([method, path, query, lines, ";".join(names), payload_hash])
    text = "\n".join(
        ["AWS4-HMAC-SHA256", amz_date(at), scope, sha256(canonical.encode("latin-1"))]
    )
    key = b"AWS4" + client.secret_access_key.encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return Signature(
        scope, canonical, text, hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    )


def canonical_path(path, service):
    """A path without dot segments: encoded once more, but for Amazon S3."""
    return path if service == "s3" else escaped(path.encode("latin-1"), b"/")


def sign(
    method="POST",
    target="/",
    headers=(),
    body=b"",
    *,
    client=DEMO,
    service="sqs",
    region="us-east-1",
    at=EXAMPLE_TIME,
    payload_hash=None,
    unsigned=(),
    scope=None,
    date=None,
):
    """Return the headers of a request signed in its Authorization header.

    All headers but those named in `unsigned` are signed.  `scope` and `date` spoil what
    would be right.
    """
    headers = [("Host", HOST), *headers] if not has(headers, "host") else list(headers)
    if not has(headers, "x-amz-date") and not has(headers, "date"):
        headers.append(("X-Amz-Date", date or amz_date(at)))
    if client.session_token and not has(headers, "x-amz-security-token"):
        headers.append(("X-Amz-Security-Token", client.session_token))
    names = sorted({name.lower() for name, _ in headers} - {name.lower() for name in unsigned})
    path, _, query = target.partition("?")
    scope = scope or f"{amz_date(at)[:8]}/{region}/{service}/aws4_request"
    made = signature(
        client,
        method,
        canonical_path(path, service),
        sorted_query(query),
        headers,
        names,
        payload_hash or sha256(body),
        at,
        scope,
    )
    value = (
        f"AWS4-HMAC-SHA256 Credential={client.access_key_id}/{scope},"
        f" SignedHeaders={';'.join(names)}, Signature={made.hex}"
    )
    return (*headers, ("Authorization", value))


def has(headers, name):
    return any(given.lower() == name for given, _ in headers)


def signed(method="POST", target="/", headers=(), body=b"", **how):
    """Return a Request signed in its Authorization header; see `sign`."""
    return Request(method, target, sign(method, target, headers, body, **how), io.BytesIO(body))


def presign(
    method="GET",
    target="/",
    headers=(),
    *,
    client=DEMO,
    service="sqs",
    region="us-east-1",
    at=EXAMPLE_TIME,
    expires=3600,
    payload_hash=None,
):
    """Return a target signed in its query string; `headers` are sent, and signed, besides Host."""
    headers = [("Host", HOST), *headers] if not has(headers, "host") else list(headers)
    names = sorted({name.lower() for name, _ in headers})
    scope = f"{amz_date(at)[:8]}/{region}/{service}/aws4_request"
    given = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{client.access_key_id}/{scope}",
        "X-Amz-Date": amz_date(at),
        "X-Amz-SignedHeaders": ";".join(names),
    }
    if expires is not None:
        given["X-Amz-Expires"] = str(expires)
    if client.session_token:
        given["X-Amz-Security-Token"] = client.session_token
    path, _, query = target.partition("?")
    added = "&".join(f"{name}={escaped(value.encode(), b'')}" for name, value in given.items())
    query = f"{query}&{added}" if query else added
    if payload_hash is None:
        payload_hash = "UNSIGNED-PAYLOAD" if service == "s3" else sha256(b"")
    made = signature(
        client,
        method,
        canonical_path(path, service),
        sorted_query(query),
        headers,
        names,
        payload_hash,
        at,
        scope,
    )
    return f"{path}?{query}&X-Amz-Signature={made.hex}"


class Clock:
    """Stands still but when told, or waited for; then what was planned happens on the way."""

    def __init__(self, now=EXAMPLE_TIME):
        self.now = float(now)
        self.plans = []  # (when, action), in order
        self.waits = 0

    def __call__(self):
        return self.now

    def after(self, seconds, action):
        """Plan an action for the time when somebody waits."""
        self.plans.append((self.now + seconds, action))
        self.plans.sort(key=lambda plan: plan[0])

    def wait(self, condition, seconds):
        """Stand in for threading.Condition.wait.

        It ends when the time is over, or when what happens meanwhile notifies the waiter: to
        come back for less would hide that a notification was forgotten.
        """
        self.waits += 1
        if self.waits > 1000:
            raise AssertionError("a waiter that is woken over and over")
        until, notified = self.now + seconds, []
        with mock.patch.object(condition, "notify", lambda n=1: notified.append(n)):
            while not notified and self.plans and self.plans[0][0] <= until:
                self.now, action = self.plans.pop(0)
                action()
        if not notified:
            self.now = until


class Refused(Exception):
    """What a caller is told: HTTP status, code in XML, `__type` in JSON, message."""

    def __init__(self, status, code, shape, message, fault="Sender"):
        super().__init__(f"{status} {code or shape}: {message}")
        self.status = status
        self.code = code
        self.shape = shape
        self.message = message
        self.fault = fault


class Caller:
    """Calls an operation of SQS in memory, on a clock of its own, in one of the protocols.

    Input and output are spelled as in JSON, whichever the protocol; the answer's headers and
    body are kept in `reply`.
    """

    def __init__(self, protocol, clock=None, client=DEMO, region="us-east-1", **settings):
        self.protocol = protocol
        self.clock = clock or Clock()
        self.client = client
        self.region = region
        self.sqs = awsproxy.Sqs(self.clock, wait=self.clock.wait, **settings)
        self.proxy = Proxy(
            {**awsproxy.DEMO_CLIENTS, client.access_key_id: [client]},
            clock=self.clock,
            max_body=1 << 30,
            sqs=self.sqs,
        )
        self.reply = None

    def __call__(self, operation, /, headers=(), target="/", **given):
        if self.protocol == "json":
            body = json.dumps(given, default=as_base64).encode()
            kind = (
                ("X-Amz-Target", f"AmazonSQS.{operation}"),
                ("Content-Type", "application/x-amz-json-1.0"),
            )
        else:
            fields = [("Action", operation), ("Version", "2012-11-05"), *form(operation, given)]
            body = urllib.parse.urlencode(fields).encode()
            kind = (("Content-Type", "application/x-www-form-urlencoded; charset=utf-8"),)
        return self.send(operation, "POST", target, (*kind, *headers), body)

    def send(self, operation, method, target, headers, body=b""):
        """Send a request as it is, signed; return the output or raise Refused."""
        request = signed(
            method, target, headers, body, client=self.client, region=self.region, at=self.clock()
        )
        self.reply = reply = self.proxy.handle(request)
        if self.protocol == "json":
            return json_output(reply)
        return xml_output(operation, reply)

    def queue(self, name="jobs", **attributes):
        """Create a queue and return its URL."""
        return self("CreateQueue", QueueName=name, Attributes=attributes)["QueueUrl"]

    def receive(self, url, **given):
        """Return the messages received."""
        return self("ReceiveMessage", QueueUrl=url, **given).get("Messages", [])

    def bodies(self, url, **given):
        """Return the bodies of the messages received, up to ten."""
        given.setdefault("MaxNumberOfMessages", 10)
        return [message["Body"] for message in self.receive(url, **given)]


def as_base64(value):
    return base64.b64encode(value).decode()


def json_output(reply):
    headers = {name.lower(): value for name, value in reply.headers}
    document = json.loads(reply.body) if reply.body else None
    if reply.status == 200:
        return document
    code, _, fault = headers["x-amzn-query-error"].partition(";")
    raise Refused(reply.status, code, document["__type"], document["message"], fault)


# Facts of the query protocol of SQS 2012-11-05: how a list or a map is spelled in a form.
FORM_NAMES = {
    "AWSAccountIds": "AWSAccountId",
    "Actions": "ActionName",
    "AttributeNames": "AttributeName",
    "MessageSystemAttributeNames": "AttributeName",
    "MessageAttributeNames": "MessageAttributeName",
    "TagKeys": "TagKey",
    "StringListValues": "StringListValue",
    "BinaryListValues": "BinaryListValue",
    "Attributes": ("Attribute", "Name", "Value"),
    "MessageAttributes": ("MessageAttribute", "Name", "Value"),
    "MessageSystemAttributes": ("MessageSystemAttribute", "Name", "Value"),
    "tags": ("Tag", "Key", "Value"),
    "Tags": ("Tag", "Key", "Value"),
}


def form(operation, given, prefix=""):
    """Return the fields that a client of the query protocol sends."""
    fields = []
    for name, value in given.items():
        spelled = FORM_NAMES.get(name, name)
        if name == "Entries":
            spelled = f"{operation}RequestEntry"
        if isinstance(spelled, tuple):
            element, key_name, value_name = spelled
            for index, (key, item) in enumerate(value.items(), 1):
                fields.append((f"{prefix}{element}.{index}.{key_name}", key))
                at = f"{prefix}{element}.{index}.{value_name}"
                fields += (
                    form(operation, item, at + ".") if isinstance(item, dict) else [(at, item)]
                )
        elif isinstance(value, list):
            for index, item in enumerate(value, 1):
                at = f"{prefix}{spelled}.{index}"
                fields += (
                    form(operation, item, at + ".") if isinstance(item, dict) else [(at, item)]
                )
            if not value:
                fields.append((prefix + name, ""))  # as botocore spells an empty list
        elif isinstance(value, bytes):
            fields.append((prefix + name, as_base64(value)))
        else:
            fields.append((prefix + name, str(value).lower() if value in (True, False) else value))
    return fields


# The same for answers: element -> member, and how it repeats.
XML_LISTS = {
    "QueueUrl": "QueueUrls",
    "Message": "Messages",
    "BatchResultErrorEntry": "Failed",
    "SendMessageBatchResultEntry": "Successful",
    "DeleteMessageBatchResultEntry": "Successful",
    "ChangeMessageVisibilityBatchResultEntry": "Successful",
    "ListMessageMoveTasksResultEntry": "Results",
}
XML_MAPS = {
    "Attribute": ("Attributes", "Name", "Value"),
    "MessageAttribute": ("MessageAttributes", "Name", "Value"),
    "Tag": ("Tags", "Key", "Value"),
}
XML_NUMBERS = {
    "ApproximateNumberOfMessagesMoved",
    "ApproximateNumberOfMessagesToMove",
    "MaxNumberOfMessagesPerSecond",
    "StartedTimestamp",
}
NAMESPACE = "{http://queue.amazonaws.com/doc/2012-11-05/}"


def xml_output(operation, reply):
    if not reply.body.startswith(b'<?xml version="1.0"?>'):
        raise Refused(reply.status, reply.body.decode(), None, None)
    root = ElementTree.fromstring(reply.body)
    for element in root.iter():
        if not element.tag.startswith(NAMESPACE):
            raise AssertionError(f"{element.tag} is not in the namespace of SQS")
        element.tag = element.tag[len(NAMESPACE) :]
    if reply.status != 200:
        error = root.find("Error")
        assert root.tag == "ErrorResponse" and error.find("Detail") is not None
        code, text, fault = (error.findtext(name) for name in ("Code", "Message", "Type"))
        raise Refused(reply.status, code, None, text, fault)
    assert root.tag == f"{operation}Response" and root.findtext("ResponseMetadata/RequestId")
    result = root.find(f"{operation}Result")
    return None if result is None else from_xml(operation, result)


def from_xml(operation, element):
    """Return an element as JSON would have it."""
    output = {}
    for child in element:
        if child.tag in XML_MAPS:
            member, key, value = XML_MAPS[child.tag]
            item = child.find(value)
            item = from_xml(operation, item) if len(item) else item.text or ""
            output.setdefault(member, {})[child.findtext(key)] = item
        elif child.tag in XML_LISTS and is_list(operation, child):
            member = XML_LISTS[child.tag]
            if operation == "ListDeadLetterSourceQueues":
                member = "queueUrls"
            output.setdefault(member, []).append(
                from_xml(operation, child) if len(child) else child.text
            )
        elif child.tag in XML_NUMBERS:
            output[child.tag] = int(child.text)
        elif child.tag == "SenderFault":
            output[child.tag] = child.text == "true"
        else:
            output[child.tag] = child.text or ""
    return output


def is_list(operation, element):
    """Whether an element of XML_LISTS is one: QueueUrl and Message can also stand alone."""
    if element.tag == "QueueUrl":
        return operation not in ("CreateQueue", "GetQueueUrl")
    return element.tag != "Message" or len(element) > 0


ACCOUNT = "000000000000"
OTHER_ACCOUNT = "111122223333"
SQS = "AWS.SimpleQueueService."
NO_QUEUE = SQS + "NonExistentQueue"
MODELLED = "com.amazonaws.sqs#"
FRAMEWORK = "com.amazon.coral.service#"
INVALID = "InvalidParameterValue"
MISSING = "MissingParameter"
MEBIBYTE = 1048576
XMLNS = "http://queue.amazonaws.com/doc/2012-11-05/"
UUID = re.compile("[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")
JSON_1_0 = "application/x-amz-json-1.0"
JSON_1_1 = "application/x-amz-json-1.1"
FORM = ("Content-Type", "application/x-www-form-urlencoded")
FORM_UTF_8 = ("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")


def arn(name, region="us-east-1", account=ACCOUNT):
    return f"arn:aws:sqs:{region}:{account}:{name}"


def redrive(name, count):
    return json.dumps({"deadLetterTargetArn": arn(name), "maxReceiveCount": count})


def string(value):
    return {"DataType": "String", "StringValue": value}


def url_of(name, account=ACCOUNT):
    return f"http://{HOST}/{account}/{name}"


def reply_to(caller, method="POST", target="/", headers=(), body=b"", **how):
    """Send a request as it is, signed, and return the reply as it is."""
    request = signed(method, target, headers, body, at=caller.clock(), **how)
    return caller.proxy.handle(request)


def header(reply, wanted):
    """Return the value of a header that must not come twice, or None."""
    values = [value for name, value in reply.headers if name.lower() == wanted.lower()]
    assert len(values) < 2, values
    return values[0] if values else None


def read_cbor(data):
    """Return a map of texts (RFC 8949, 3.1)."""
    source, texts = io.BytesIO(data), []

    def head(wanted):
        first = source.read(1)[0]
        assert first >> 5 == wanted, data
        short = first & 31
        return short if short < 24 else int.from_bytes(source.read(1 << (short - 24)), "big")

    for _ in range(2 * head(5)):
        texts.append(source.read(head(3)).decode())
    assert not source.read()
    return dict(zip(texts[::2], texts[1::2]))


def in_both(test):
    @functools.wraps(test)
    def both(self):
        for protocol in ("json", "query"):
            with self.subTest(protocol=protocol):
                self.protocol = protocol
                self.start()
                test(self)

    return both


class Spoken(unittest.TestCase):
    """Runs each test in both protocols, each time with a clock and queues of its own."""

    def __init_subclass__(cls):
        for name, test in list(vars(cls).items()):
            if name.startswith("test_"):
                setattr(cls, name, in_both(test))

    def start(self, client=DEMO, region="us-east-1", **settings):
        self.clock = Clock()
        self.sqs = Caller(self.protocol, self.clock, client, region, **settings)

    def another(self, client=DEMO, region="us-east-1", protocol=None):
        """Return a second caller of the same queues."""
        caller = Caller(protocol or self.protocol, self.clock, client, region)
        clients = {**awsproxy.DEMO_CLIENTS, client.access_key_id: [client]}
        caller.sqs = self.sqs.sqs
        caller.proxy = Proxy(clients, clock=self.clock, sqs=caller.sqs)
        return caller

    def send(self, url, body="hello", **given):
        return self.sqs("SendMessage", QueueUrl=url, MessageBody=body, **given)

    def set(self, url, **attributes):
        self.sqs("SetQueueAttributes", QueueUrl=url, Attributes=attributes)

    def attributes(self, url, *names):
        given = {"QueueUrl": url, "AttributeNames": list(names or ["All"])}
        return self.sqs("GetQueueAttributes", **given).get("Attributes", {})

    def system(self, url, **given):
        """Receive one message and return its system attributes, all of them."""
        (message,) = self.sqs.receive(url, AttributeNames=["All"], **given)
        return message["Attributes"]

    def counts(self, url):
        """Return how many messages are visible, in flight, and delayed."""
        shown = self.attributes(url)
        return tuple(
            int(shown["ApproximateNumberOfMessages" + kind])
            for kind in ("", "NotVisible", "Delayed")
        )

    def refused(self, code, operation, /, text=None, status=400, shape=None, **given):
        with self.assertRaises(Refused) as caught:
            self.sqs(operation, **given)
        refusal = caught.exception
        got = (refusal.status, refusal.code, refusal.fault)
        self.assertEqual(got, (status, code, "Sender"), refusal)
        if text is not None:
            self.assertEqual(refusal.message, text)
        if shape and self.protocol == "json":
            self.assertEqual(refusal.shape, shape)

    def fifo(self, name="jobs.fifo", **attributes):
        return self.sqs.queue(name, FifoQueue="true", **attributes)

    def put(self, url, bodies, **given):
        """Send each body to the group of its first letter; return the answers."""
        return [
            self.send(url, body, MessageGroupId=body[0], MessageDeduplicationId=body, **given)
            for body in bodies.split()
        ]

    def take(self, url, **given):
        """Return the receipt handles of up to ten messages received, by body."""
        given.setdefault("MaxNumberOfMessages", 10)
        return {m["Body"]: m["ReceiptHandle"] for m in self.sqs.receive(url, **given)}

    def delete(self, url, handle):
        self.sqs("DeleteMessage", QueueUrl=url, ReceiptHandle=handle)

    def change(self, url, handle, timeout):
        self.sqs(
            "ChangeMessageVisibility",
            QueueUrl=url,
            ReceiptHandle=handle,
            VisibilityTimeout=timeout,
        )

    def dead_letters(self, count=1, kind=""):
        """Create a queue and its dead-letter queue, return their URLs."""
        make = self.fifo if kind else self.sqs.queue
        dead = make("dead" + kind)
        return make("jobs" + kind, RedrivePolicy=redrive("dead" + kind, count)), dead

    def kill(self, url, *bodies, **given):
        """Send messages and have them moved to the dead-letter queue, at the second receive."""
        for body in bodies:
            self.send(url, body, **given)
        self.assertEqual(sorted(self.take(url, VisibilityTimeout=0)), sorted(bodies))
        self.assertEqual(self.take(url, VisibilityTimeout=0), {})


# ==== 2. HTTP/1.1 framing ====

# Request lines that must be refused.
BROKEN_REQUEST_LINES = [
    ("a CR before the method", b"\rGET / HTTP/1.1"),
    ("a LF before the method", b"\nGET / HTTP/1.1"),
    ("a CR in the target", b"GET /\r HTTP/1.1"),
    ("a CR behind the version", b"GET / HTTP/1.1\r"),
    ("a NUL in the target", b"GET /\x00 HTTP/1.1"),
    ("an absolute-form target", b"GET http://a/ HTTP/1.1"),
    ("an asterisk-form target", b"OPTIONS * HTTP/1.1"),
    ("a target without a slash", b"GET a HTTP/1.1"),
    ("a query as target", b"GET ?a HTTP/1.1"),
    ("no target", b"GET HTTP/1.1"),
    ("an empty target", b"GET  HTTP/1.1"),
    ("a fragment", b"GET /a#b HTTP/1.1"),
    ("a fragment behind a query", b"GET /?a=1#b HTTP/1.1"),
    ("a blank in the target", b"GET /a b HTTP/1.1"),
    ("a control character in the target", b"GET /\x1f HTTP/1.1"),
    ("a DEL in the target", b"GET /\x7f HTTP/1.1"),
    ("two blanks before the target", b"GET  / HTTP/1.1"),
    ("two blanks behind the target", b"GET /  HTTP/1.1"),
    ("a tab before the target", b"GET\t/ HTTP/1.1"),
    ("a blank behind the version", b"GET / HTTP/1.1 "),
    ("a blank before the method", b" GET / HTTP/1.1"),
    ("a method that is no token", b"G@T / HTTP/1.1"),
    ("HTTP/0.9, said so", b"GET / HTTP/0.9"),
    ("HTTP/2.0", b"GET / HTTP/2.0"),
    ("http in lower case", b"GET / http/1.1"),
    ("HTTP/1.10", b"GET / HTTP/1.10"),
    ("HTTP/01.1", b"GET / HTTP/01.1"),
    ("a superscript digit in the version", b"GET / HTTP/1.\xb9"),
    ("another protocol", b"GET / RTSP/1.1"),
]

# Header lines that must be refused.
BROKEN_HEADERS = [
    ("a CR in a header value", b"Host: a\r\nX: 1\r2"),
    ("a CR and then a header", b"X: 1\rHost: a\r\nHost: a"),
    ("a CR before the line end", b"Host: a\r\nX: 1\r"),
    ("a CR before a header name", b"Host: a\r\n\rX: 1"),
    ("a LF in a header value", b"Host: a\r\nX: 1\n2"),
    ("a LF that ends a header", b"X: 1\nHost: a"),
    ("a LF as a line", b"Host: a\r\n\nX: 1"),
    ("a NUL in a header value", b"Host: a\r\nX: 1\x002"),
    ("a NUL in a header name", b"Host: a\r\nX\x00: 1"),
    ("a control character in a value", b"Host: a\r\nX: \x01"),
    ("a DEL in a value", b"Host: a\r\nX: \x7f"),
    ("a line folded with a space", b"Host: a\r\nX: 1\r\n 2"),
    ("a line folded with a tab", b"Host: a\r\nX: 1\r\n\t2"),
    ("a folded line that has a colon", b"Host: a\r\n X: 1"),
    ("a blank before the first header", b" Host: a\r\nHost: a"),
    ("a line of blanks", b"Host: a\r\n  "),
    ("a space before the colon", b"Host: a\r\nX : 1"),
    ("a tab before the colon", b"Host: a\r\nX\t: 1"),
    ("a line without a colon", b"Host: a\r\nX"),
    ("an empty header name", b"Host: a\r\n: 1"),
    ("a blank in a header name", b"Host: a\r\nX Y: 1"),
    ("a header name beyond ASCII", b"Host: a\r\nX\xe4: 1"),
    ("no Host", b"X: 1"),
    ("two Hosts", b"Host: a\r\nhost: b"),
    ("one Host twice", b"Host: a\r\nHost: a"),
    ("two Hosts in one line", b"Host: a, b"),
    ("a path in Host", b"Host: a/b"),
    ("a user in Host", b"Host: a@b"),
]

# Whole heads of the kind.
BROKEN_HEADS = [
    *((name, line + b"\r\nHost: a\r\n\r\n") for name, line in BROKEN_REQUEST_LINES),
    *((name, b"GET / HTTP/1.1\r\n%b\r\n\r\n" % lines) for name, lines in BROKEN_HEADERS),
    ("no header at all", b"GET / HTTP/1.1\r\n\r\n"),
    ("a LF that ends the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    ("two Hosts in HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
    ("an authority-form target", b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"),
    ("HTTP/0.9", b"GET /\r\n\r\n"),
    ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
]

# A head whose last lines do not end in CR LF CR LF.
BROKEN_ENDS = [
    ("a LF behind the last header", b"GET / HTTP/1.1\r\nHost: a\r\nX: 1234567\n\r\n"),
    ("a LF as the blank line", b"GET / HTTP/1.1\r\nHost: a\r\nX: 1234567\r\n\n"),
    ("both", b"GET / HTTP/1.1\r\nHost: a\r\nX: 1234567\n\n"),
    ("LF throughout", b"GET / HTTP/1.1\nHost: a\nX: 1234567\n\n"),
    ("a LF behind the request line alone", b"GET / HTTP/1.0\n\r\n"),
]

# Header lines of a POST that leave it open where its body ends.
BROKEN_FRAMINGS = [
    ("length and coding", b"Content-Length: 2\r\nTransfer-Encoding: chunked"),
    ("coding and length", b"transfer-encoding: chunked\r\ncontent-length: 2"),
    ("no length and coding", b"Content-Length: 0\r\nTransfer-Encoding: chunked"),
    ("two lengths", b"Content-Length: 2\r\nContent-Length: 3"),
    ("two spellings of a length", b"Content-Length: 2\r\nContent-Length: 02"),
    ("a length and an empty one", b"Content-Length: 2\r\nContent-Length:"),
    ("a list of lengths", b"Content-Length: 2,2"),
    ("a list of lengths with a blank", b"Content-Length: 2, 2"),
    ("a length with plus", b"Content-Length: +2"),
    ("a length with minus", b"Content-Length: -2"),
    ("a length of minus nothing", b"Content-Length: -0"),
    ("a length with an underscore", b"Content-Length: 1_0"),
    ("a length with a blank inside", b"Content-Length: 1 0"),
    ("a length in hex", b"Content-Length: 0x2"),
    ("a length with a letter", b"Content-Length: 2b"),
    ("a length with a point", b"Content-Length: 2.0"),
    ("a superscript length", b"Content-Length: \xb2"),
    ("a length with a superscript", b"Content-Length: 2\xb2"),
    ("a no-break space before the length", b"Content-Length: \xa02"),
    ("a no-break space behind the length", b"Content-Length: 2\xa0"),
    ("a next line behind the length", b"Content-Length: 2\x85"),
    ("an empty length", b"Content-Length:"),
    ("a length in quotes", b'Content-Length: "2"'),
    ("chunked twice", b"Transfer-Encoding: chunked, chunked"),
    ("chunked in two lines", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
    ("chunked and another line", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"),
    ("another line and chunked", b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"),
    ("gzip before chunked", b"Transfer-Encoding: gzip, chunked"),
    ("gzip behind chunked", b"Transfer-Encoding: chunked, gzip"),
    ("gzip", b"Transfer-Encoding: gzip"),
    ("identity", b"Transfer-Encoding: identity"),
    ("identity and a length", b"Transfer-Encoding: identity\r\nContent-Length: 2"),
    ("an empty coding", b"Transfer-Encoding:"),
    ("xchunked", b"Transfer-Encoding: xchunked"),
    ("chunkedx", b"Transfer-Encoding: chunkedx"),
    ("a comma behind chunked", b"Transfer-Encoding: chunked,"),
    ("a comma before chunked", b"Transfer-Encoding: , chunked"),
    ("chunked in quotes", b'Transfer-Encoding: "chunked"'),
    ("chunked with a parameter", b"Transfer-Encoding: chunked;q=1"),
    ("chunked and a vertical tab", b"Transfer-Encoding: chunked\x0b"),
    ("a vertical tab and chunked", b"Transfer-Encoding: \x0bchunked"),
    ("chunked and a no-break space", b"Transfer-Encoding: chunked\xa0"),
    ("a blank before the colon", b"Transfer-Encoding : chunked"),
    ("a folded coding", b"Transfer-Encoding:\r\n chunked"),
]

# Chunked bodies, and what they hold.
CHUNKED = [
    ("nothing", b"0\r\n\r\n", b""),
    ("one chunk", b"2\r\n{}\r\n0\r\n\r\n", b"{}"),
    ("three chunks", b"1\r\n{\r\n2\r\n\r\n\r\n1\r\n}\r\n0\r\n\r\n", b"{\r\n}"),
    ("hex in lower case", b"a\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    ("hex in upper case", b"B\r\n0123456789a\r\n0\r\n\r\n", b"0123456789a"),
    ("zeros in front", b"002\r\n{}\r\n000\r\n\r\n", b"{}"),
    ("data that look like an end", b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
    ("an extension", b"2;a\r\n{}\r\n0;b=1\r\n\r\n", b"{}"),
    ("an extension in quotes", b'2 ; a="b c"\r\n{}\r\n0\r\n\r\n', b"{}"),
    ("trailers", b"2\r\n{}\r\n0\r\nX: 1\r\nContent-Length: 9\r\n\r\n", b"{}"),
]

# Chunked bodies that a careless reader would take for `{}`, or for nothing.
BROKEN_CHUNKS = [
    ("0x before the size", b"0x2\r\n{}\r\n0\r\n\r\n"),
    ("a minus before the size", b"-2\r\n{}\r\n0\r\n\r\n"),
    ("minus one", b"-1\r\n{}\r\n0\r\n\r\n"),
    ("a plus before the size", b"+2\r\n{}\r\n0\r\n\r\n"),
    ("an underscore in the size", b"0_2\r\n{}\r\n0\r\n\r\n"),
    ("an empty size", b"\r\n{}\r\n0\r\n\r\n"),
    ("an empty size with an extension", b";a\r\n{}\r\n0\r\n\r\n"),
    ("a blank before the size", b" 2\r\n{}\r\n0\r\n\r\n"),
    ("a blank behind the size", b"2 \r\n{}\r\n0\r\n\r\n"),
    ("a tab behind the size", b"2\t\r\n{}\r\n0\r\n\r\n"),
    ("a size that is no number", b"x\r\n{}\r\n0\r\n\r\n"),
    ("a superscript size", b"\xb2\r\n{}\r\n0\r\n\r\n"),
    ("two sizes", b"2,2\r\n{}\r\n0\r\n\r\n"),
    ("a size of 17 digits", b"00000000000000002\r\n{}\r\n0\r\n\r\n"),
    ("a huge size of 17 digits", b"10000000000000002\r\n{}\r\n0\r\n\r\n"),
    ("a NUL behind the size", b"2\x00\r\n{}\r\n0\r\n\r\n"),
    ("a LF behind the size", b"2\n{}\r\n0\r\n\r\n"),
    ("a CR behind the size", b"2\r{}\r\n0\r\n\r\n"),
    ("CR CR LF behind the size", b"2\r\r\n{}\r\n0\r\n\r\n"),
    ("a LF in an extension", b"2;a\nb\r\n{}\r\n0\r\n\r\n"),
    ("a CR in an extension", b"2;a\rb\r\n{}\r\n0\r\n\r\n"),
    ("a NUL in an extension", b"2;a\x00\r\n{}\r\n0\r\n\r\n"),
    ("a LF behind a chunk", b"2\r\n{}\n0\r\n\r\n"),
    ("nothing behind a chunk", b"2\r\n{}0\r\n\r\n"),
    ("a chunk longer than its size", b"2\r\n{}x\r\n0\r\n\r\n"),
    ("a chunk shorter than its size", b"3\r\n{}\r\n0\r\n\r\n"),
    ("a LF behind the last size", b"2\r\n{}\r\n0\n\r\n"),
    ("a LF as the last line", b"2\r\n{}\r\n0\r\n\n"),
    ("a CR in the last line", b"2\r\n{}\r\n0\r\n\r\r\n\r\n"),
    ("a trailer without a colon", b"2\r\n{}\r\n0\r\nX\r\n\r\n"),
    ("a trailer without a name", b"2\r\n{}\r\n0\r\n: 1\r\n\r\n"),
    ("a blank before a trailer's colon", b"2\r\n{}\r\n0\r\nX : 1\r\n\r\n"),
    ("a folded trailer", b"2\r\n{}\r\n0\r\nX: 1\r\n 2\r\n\r\n"),
    ("a LF behind a trailer", b"2\r\n{}\r\n0\r\nX: 1\n\r\n"),
    ("a CR in a trailer", b"2\r\n{}\r\n0\r\nX: 1\r2\r\n\r\n"),
    ("a NUL in a trailer", b"2\r\n{}\r\n0\r\nX: \x00\r\n\r\n"),
]

DATE = "Sun, 30 Aug 2015 12:36:00 GMT"


def raw_post(lines, version=b"1.1", target=b"/"):
    """Return the head of a POST with these raw header lines besides Host."""
    return b"POST %b HTTP/%b\r\nHost: a\r\n%b\r\n\r\n" % (target, version, lines)


BROKEN_POSTS = [
    *((name, raw_post(lines)) for name, lines in BROKEN_FRAMINGS),
    ("a coding in HTTP/1.0", raw_post(b"Transfer-Encoding: chunked", b"1.0")),
]


def head_with(headers):
    """Return a head of so many header lines."""
    lines = b"".join(b"X-%d: 1\r\n" % index for index in range(headers - 1))
    return b"GET / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n"


def head_of(size, longest):
    """Return a head of so many bytes, in lines of so many at the most."""
    head = b"GET / HTTP/1.1\r\nHost: a\r\n"
    while len(head) < size - 2:
        length = min(size - 2 - len(head), longest)
        head += b"X: " + b"a" * (length - 5) + b"\r\n"
    return head + b"\r\n"


def framing(raw):
    return awsproxy.body_framing(awsproxy.parse_head(raw))


def refused_with(function, *given):
    """Return the status of the ServiceError that the call raises, 0 if it raises none."""
    try:
        function(*given)
    except ServiceError as error:
        return error.fault.status
    return 0


def read_in_pieces(body, size):
    data = piece = body.read(size)
    while piece and size > 0:
        piece = body.read(size)
        data += piece
    return data


class HeadTest(unittest.TestCase):
    def test_a_head_is_kept_to_the_byte(self):
        cases = [
            ("slashes", b"GET //a//b/../%2f?x=%2F&&y=a+b HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("a method in lower case", b"get / HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("a rare method", b"M-SEARCH / HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("bytes in the target", b"GET /\x80\x85\xa0\xff?\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("broken escapes", b"GET /%zz% HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("order, case, repeats", b"GET / HTTP/1.1\r\nb: 2\r\nHoST: a\r\nB: 1\r\nb: 2\r\n\r\n"),
            ("latin-1", b"GET / HTTP/1.1\r\nHost: a\r\nX: \x85\xa0\xe4\xa0\x85\r\n\r\n"),
            ("UTF-8", b"GET / HTTP/1.1\r\nHost: a\r\nX: \xc3\xa0 \xe2\x82\xac\r\n\r\n"),
            ("blanks within", b"GET / HTTP/1.1\r\nHost: a\r\nX: a  b\t\tc: d\r\n\r\n"),
            ("no value", b"GET / HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n"),
            ("an odd name", b"GET / HTTP/1.1\r\nHost: a\r\n!#$%&'*+-.^_`|~1: 1\r\n\r\n"),
            ("an IPv6 Host", b"GET / HTTP/1.1\r\nHost: [::1]:8081\r\n\r\n"),
            ("HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a\r\n\r\n"),
            ("HTTP/1.0 without Host", b"GET / HTTP/1.0\r\n\r\n"),
            ("a hundred headers", head_with(100)),
            ("64 KiB", head_of(65536, 65536)),
        ]
        for name, raw in cases:
            with self.subTest(name):
                head = awsproxy.parse_head(raw)
                lines = [f"{head.method} {head.target} HTTP/{head.version}"]
                lines += [f"{name}: {value}" for name, value in head.headers]
                self.assertEqual("\r\n".join([*lines, "", ""]).encode("latin-1"), raw)

    def test_spaces_and_tabs_around_a_value_are_no_part_of_it(self):
        head = awsproxy.parse_head(raw_post(b"A:1\r\nB:\t 2 \t\r\nC: \t \r\nD:\xa04\xa0"))
        expected = (("Host", "a"), ("A", "1"), ("B", "2"), ("C", ""), ("D", "\xa04\xa0"))
        self.assertEqual(head.headers, expected)

    def test_broken_heads_are_refused(self):
        for name, raw in BROKEN_HEADS:
            with self.subTest(name):
                end = raw.index(b"\r\n\r\n") + 4
                self.assertEqual(refused_with(awsproxy.parse_head, raw[:end]), 400)

    def test_a_head_ends_in_an_empty_line_and_nothing_less(self):
        for name, raw in BROKEN_ENDS:
            with self.subTest(name):
                self.assertEqual(refused_with(awsproxy.parse_head, raw), 400)

    def test_too_large_heads_are_refused(self):
        for name, raw in (("headers", head_with(101)), ("bytes", head_of(65537, 10000))):
            with self.subTest(name):
                self.assertEqual(refused_with(awsproxy.parse_head, raw), 431)


class BodyFramingTest(unittest.TestCase):
    def test_the_head_tells_how_long_the_body_is(self):
        cases = [
            ("neither", b"X: 1", 0),
            ("a length", b"Content-Length: 17", 17),
            ("a length in odd case", b"cONTENT-lENGTH:\t17 ", 17),
            ("a length of nothing", b"Content-Length: 0", 0),
            ("the longest", b"Content-Length: 1000", 1000),
            ("chunked", b"Transfer-Encoding: chunked", None),
            ("chunked in odd case", b"tRANSFER-eNCODING:\tchunked ", None),
            ("names that are like them", b"Content_Length: 3\r\nX-Transfer-Encoding: chunked", 0),
        ]
        for name, lines, expected in cases:
            with self.subTest(name):
                self.assertEqual(framing(raw_post(lines)), expected)

    def test_what_two_readers_could_read_in_two_ways_is_refused(self):
        for name, raw in BROKEN_POSTS:
            with self.subTest(name):
                self.assertEqual(refused_with(framing, raw), 400)

    def test_values_are_judged_as_they_are_whoever_made_the_head(self):
        for name, values in (
            ("Content-Length", (" 5", "5 ", "\n5", "5\n", "\x0c5", "\xa05", "5\x85", "\xb9", "")),
            ("Transfer-Encoding", (" chunked", "chunked\t", "chunked\n", "\x0bchunked", "\xa0")),
        ):
            for value in values:
                with self.subTest(name, value=value):
                    fields = {name.lower(): [value]}
                    head = awsproxy.Head("POST", "/", "1.1", ((name, value),), fields)
                    self.assertEqual(refused_with(awsproxy.body_framing, head), 400)


class BodyTest(unittest.TestCase):
    def test_a_body_ends_where_it_ends(self):
        cases = [
            ("by length", b"0123456", awsproxy.LengthBody, b"0123456"),
            *((name, wire, awsproxy.ChunkedBody, body) for name, wire, body in CHUNKED),
        ]
        for name, wire, make, expected in cases:
            for size in (-1, 1, 2, 3, 7, 100):
                with self.subTest(name, size=size):
                    source = io.BytesIO(wire + b"next")
                    body = make(source, 7 if make is awsproxy.LengthBody else 1000)
                    self.assertTrue(body.unread)
                    self.assertEqual(read_in_pieces(body, size), expected)
                    self.assertFalse(body.unread)
                    self.assertEqual((body.read(), body.read(5)), (b"", b""))
                    self.assertEqual(source.read(), b"next")

    def test_a_body_that_stops_early_is_refused(self):
        for make, wire in (
            (awsproxy.LengthBody, b"0123456789"),
            (awsproxy.ChunkedBody, b"4;a=1\r\nWiki\r\n5\r\npedia\r\n0\r\nX: 1\r\n\r\n"),
        ):
            for length in range(len(wire)):
                with self.subTest(make.__name__, length=length):
                    body = make(io.BytesIO(wire[:length]), 10)
                    self.assertEqual(refused_with(body.read), 400)
                    self.assertTrue(body.unread)

    def test_broken_chunks_are_refused(self):
        for name, wire in BROKEN_CHUNKS:
            for size in (-1, 1):
                with self.subTest(name, size=size):
                    body = awsproxy.ChunkedBody(io.BytesIO(wire + b"\r\n\r\n"), 1000)
                    self.assertEqual(refused_with(read_in_pieces, body, size), 400)
                    self.assertTrue(body.unread)

    def test_chunks_have_limits(self):
        cases = [
            ("as much", b"6\r\n012345\r\n4\r\n6789\r\n0\r\n\r\n", (0,)),
            ("one more", b"6\r\n012345\r\n5\r\n6789a\r\n0\r\n\r\n", (413,)),
            ("one chunk", b"b\r\n0123456789a\r\n0\r\n\r\n", (413,)),
            ("only announced", b"b\r\n", (413,)),
            ("a huge one announced", b"fffffffffffffff\r\n", (413,)),
            ("a long extension", b"2;" + b"a" * 70000 + b"\r\n{}\r\n0\r\n\r\n", (400, 431)),
            ("a long trailer", b"0\r\nX: " + b"a" * 70000 + b"\r\n\r\n", (400, 431)),
            ("many trailers", b"0\r\n" + b"X: 1\r\n" * 2000 + b"\r\n", (400, 431)),
        ]
        for name, wire, expected in cases:
            with self.subTest(name):
                body = awsproxy.ChunkedBody(io.BytesIO(wire), 10)
                self.assertIn(refused_with(body.read), expected)

    def test_a_body_in_small_parts_takes_no_more_room(self):
        size, parts = 200000, [b"%x" % number for number in range(16, 256)]
        for chunked in (False, True):
            coded = itertools.cycle(part for p in parts for part in (b"2\r\n", p, b"\r\n"))
            source = awsproxy.Stream(lambda _, it=coded: next(it) + b"")
            body = awsproxy.ChunkedBody(source, size)
            if not chunked:
                whole = io.BytesIO(bytes(size))
                source = awsproxy.Stream(lambda _, whole=whole: whole.read(2))
                body = awsproxy.LengthBody(source, size)
            with self.subTest(chunked=chunked):
                tracemalloc.start()
                self.addCleanup(tracemalloc.stop)
                self.assertEqual(len(body.read(size)), size)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                self.assertLess(peak, 4 * size)

    def test_a_body_is_asked_for_once_and_only_when_it_is_wanted(self):
        for make, wire in (
            (awsproxy.LengthBody, b"0123456"),
            (awsproxy.ChunkedBody, b"7\r\n0123456\r\n0\r\n\r\n"),
        ):
            with self.subTest(make.__name__):
                source = io.BytesIO()
                asked = []

                def begin(source=source, wire=wire, asked=asked):
                    asked.append(source.tell())
                    source.write(wire)
                    source.seek(0)

                body = make(source, 7, begin)
                self.assertEqual(asked, [])
                self.assertEqual(read_in_pieces(body, 2), b"0123456")
                self.assertEqual(asked, [0])

    def test_no_body_is_not_asked_for(self):
        body = awsproxy.LengthBody(io.BytesIO(), 0, lambda: self.fail("asked for nothing"))
        self.assertEqual((body.read(), body.unread), (b"", False))


class Answer(NamedTuple):
    status: int
    headers: dict  # name in lower case -> values
    body: bytes

    @property
    def closes(self):
        return self.headers.get("connection") == ["close"]

    @property
    def refusal(self):
        """The root of an error document, or "json", and the code; fails for anything else."""
        kind = self.headers["content-type"]
        if kind == ["application/x-amz-json-1.0"]:
            document = json.loads(self.body)
            assert sorted(document) == ["__type", "message"] and document["message"]
            return "json", document["__type"].rpartition("#")[2]
        root = ElementTree.fromstring(self.body)
        tag = root.tag.rpartition("}")[2]
        assert (tag, *kind) in (("ErrorResponse", "text/xml"), ("Error", "application/xml")), kind
        error = root if tag == "Error" else root.find(NAMESPACE + "Error")
        code, text = (element.text for element in error if element.tag[-4:] in ("Code", "sage"))
        assert code and text
        return tag, code


def read_answer(stream, head_only=False):
    """Read one response, strictly; None where the stream has ended."""
    lines = []
    while not lines or lines[-1]:
        line = stream.readline(65537)
        if not line and not lines:
            return None
        assert line.endswith(b"\r\n"), f"{line} is not a line"
        lines.append(line[:-2].decode("latin-1"))
    status = int(re.fullmatch(r"HTTP/1\.1 ([1-5][0-9]{2}) [ -~]*", lines[0]).group(1))
    headers = {}
    for line in lines[1:-1]:
        name, value = re.fullmatch(r"([!-9;-~]+): ([^\0-\x08\n-\x1f\x7f]*)", line).groups()
        headers.setdefault(name.lower(), []).append(value)
    assert "transfer-encoding" not in headers
    lengths = headers.get("content-length", [])
    if status < 200 or status in (204, 304):
        assert not lengths, f"{status} with Content-Length"
        return Answer(status, headers, b"")
    assert len(lengths) == 1, f"Content-Length {lengths}"
    body = b"" if head_only else stream.read(int(lengths[0]))
    assert head_only or len(body) == int(lengths[0]), "too short an answer"
    return Answer(status, headers, body)


class EncodeReplyTest(unittest.TestCase):
    def test_an_answer_is_framed_by_its_length(self):
        headers = (("X-A", "1"), ("x-b", "\xe4 \xc3\xa4"), ("X-A", "2"))
        cases = [
            ("a body", 200, b"{}\r\n", False, ["4"], b"{}\r\n"),
            ("an empty body", 200, b"", False, ["0"], b""),
            ("an error", 503, b"{}", False, ["2"], b"{}"),
            ("a status without a name", 299, b"{}", False, ["2"], b"{}"),
            ("an answer to HEAD", 200, b"{}", True, ["2"], b""),
            ("204", 204, b"", False, None, b""),
            ("304", 304, b"", False, None, b""),
            ("304 with a body", 304, b"{}", False, None, b""),
        ]
        for name, status, body, head_only, length, sent in cases:
            for close in (False, True):
                with self.subTest(name, close=close):
                    reply = Reply(status, headers, body)
                    raw = awsproxy.encode_reply(reply, DATE, close, head_only)
                    stream = io.BytesIO(raw)
                    answer = read_answer(stream, head_only)
                    self.assertEqual((answer.status, answer.body), (status, sent))
                    self.assertEqual(stream.read(), b"")
                    self.assertEqual(answer.headers.get("content-length"), length)
                    self.assertEqual(answer.headers["date"], [DATE])
                    self.assertEqual(answer.headers.get("connection"), ["close"] * close or None)
                    self.assertEqual(answer.headers["x-a"], ["1", "2"])
                    self.assertIn(b"\r\nx-b: \xe4 \xc3\xa4\r\n", raw)

    def test_a_header_cannot_break_out_of_its_line(self):
        cases = [(("X", "a\r"), ("Y", "\nb"))]
        for text in ("\r", "\n", "\0", "\r\n", "a\r\nX: 1", "a\nX: 1", "a\rX: 1", "a\r\n", "\na"):
            cases += [(("X", text),), ((text, "1"),)]
        for headers in cases:
            with self.subTest(repr(headers)), self.assertRaises(ValueError):
                awsproxy.encode_reply(Reply(200, headers, b""), DATE, False)


# ==== 3. Signature Version 4 ====


class Vector(NamedTuple):
    """A case of AWS's SigV4 test suite, signed in the header and in the query string.

    Copyright Amazon.com, Inc. or its affiliates; Apache License 2.0; from aws-c-auth.
    """

    name: str
    normalize: bool
    unsigned_token: bool
    header: list
    header_canonical_sha256: str
    query: list
    query_canonical_sha256: str


def request_of(lines):
    """Return a vector's request; a folded line is unfolded (RFC 9112, 5.2)."""
    text = "\n".join(lines).replace("\n  ", " ").encode().decode("latin-1")
    head, _, body = text.partition("\n\n")
    request_line, *fields = head.split("\n")
    method, _, rest = request_line.partition(" ")
    target = rest.rpartition(" ")[0]
    headers = tuple(tuple(line.split(":", 1)) for line in fields if line)
    return Request(method, target, headers, io.BytesIO(body.encode("latin-1")))


class VectorTest(unittest.TestCase):
    def verify(self, vector, lines):
        request = request_of(lines)
        tokens = [v for k, v in request.headers if k == "X-Amz-Security-Token"]
        tokens += [v.decode() for k, v in request.query if k == b"X-Amz-Security-Token"]
        client = EXAMPLE._replace(session_token="".join(tokens))
        profile = Profile(vector.normalize, False, vector.unsigned_token)
        return awsproxy.verify(
            request,
            {client.access_key_id: [client]},
            EXAMPLE_TIME,
            profiles={"service": profile},
        )

    def test_signed_requests_are_accepted(self):
        self.assertEqual(len(VECTORS), 38)
        for vector in VECTORS:
            for form, lines in (("header", vector.header), ("query", vector.query)):
                with self.subTest(vector.name, form=form):
                    self.assertEqual(self.verify(vector, lines).client.name, "example")

    def test_one_changed_digit_of_the_signature_is_refused(self):
        for vector in VECTORS:
            for form, lines in (("header", vector.header), ("query", vector.query)):
                with self.subTest(vector.name, form=form):
                    spoiled = []
                    for line in lines:
                        before, found, after = line.partition("Signature=")
                        if found:
                            line = before + found + ("0" if after[0] != "0" else "1") + after[1:]
                        spoiled.append(line)
                    with self.assertRaises(ServiceError) as caught:
                        self.verify(vector, spoiled)
                    self.assertEqual(caught.exception.code, "SignatureDoesNotMatch")


SESSION = DEMO._replace(name="session", session_token="dummysession")
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
LATER = EXAMPLE_TIME + 86400


def get(target, headers=(), method="GET", body=b""):
    return Request(method, target, tuple(headers), io.BytesIO(body))


def ask(service="sqs", edit=None, headers=(), body=b"{}", method="POST", target="/", **how):
    """Return a request signed in its header; `edit` then replaces in its Authorization."""
    if service == "s3" and not has(headers, "x-amz-content-sha256"):
        headers = (*headers, ("X-Amz-Content-Sha256", how.get("payload_hash") or sha256(body)))
    made = list(sign(method, target, headers, body, service=service, **how))
    if edit:
        name, value = made.pop()
        spoiled = re.sub(edit[0], edit[1], value)
        assert spoiled != value, edit
        made.append((name, spoiled))
    return get(target, made, method, body)


def link(service="sqs", edit=None, headers=(), method="GET", body=b"", **how):
    """Return a request signed in its query string; `edit` then replaces in its target."""
    target = presign(method, headers=headers, service=service, **how)
    if edit:
        spoiled = re.sub(edit[0], edit[1], target)
        assert spoiled != target, edit
        target = spoiled
    return get(target, (("Host", HOST), *headers), method, body)


def spelled(request, names):
    """Sign anew, rightly, under another list of signed headers."""
    *headers, (name, value) = request.headers
    body = request.body.getvalue()
    scope = re.search("Credential=[^/]*/([^,]*)", value).group(1)
    made = signature(
        DEMO, request.method, "/", "", headers, names, sha256(body), EXAMPLE_TIME, scope
    )
    value = (
        f"AWS4-HMAC-SHA256 Credential=dummykey/{scope},"
        f"SignedHeaders={';'.join(names)},Signature={made.hex}"
    )
    return get("/", (*headers, (name, value)), request.method, body)


def without(target, name):
    path, _, query = target.partition("?")
    return path + "?" + "&".join(p for p in query.split("&") if not p.startswith(name + "="))


class VerifyCase(unittest.TestCase):
    maxDiff = None

    def verify(self, request, now=EXAMPLE_TIME, clients=(DEMO,), **how):
        known = {}
        for client in clients:
            known.setdefault(client.access_key_id, []).append(client)
        found = awsproxy.verify(request, known, now, **how)
        return found._replace(body=found.body.read())

    def refused(self, request, answer, pattern="", now=EXAMPLE_TIME, **how):
        """Check that a request is refused: with which status and code, and in which words."""
        with self.assertRaises(ServiceError) as caught:
            self.verify(request, now, **how)
        error = caught.exception
        self.assertRegex(f"{error.fault.status} {error.code}", f"^({answer})$", error.message)
        self.assertRegex(error.message, pattern or "^")
        return error


class CanonicalFormTest(unittest.TestCase):
    def test_paths(self):
        table = [
            # as received; canonical for most services; canonical for Amazon S3
            ("/", "/", "/"),
            ("/a", "/a", "/a"),
            ("/a/", "/a/", "/a/"),
            ("//", "/", "//"),
            ("//a//b//", "/a/b/", "//a//b//"),
            ("/a/./b", "/a/b", "/a/./b"),
            ("/./", "/", "/./"),
            ("/a/../b", "/b", "/a/../b"),
            ("/a/b/../../c/", "/c/", "/a/b/../../c/"),
            ("/a/..", "/", "/a/.."),
            ("/a//../b", "/b", "/a//../b"),
            ("/...", "/...", "/..."),
            ("/a%2Fb", "/a%252Fb", "/a%2Fb"),
            ("/a%2fb", "/a%252fb", "/a%2Fb"),
            ("/a/%2e%2e/b", "/a/%252e%252e/b", "/a/../b"),
            ("/%41%7e", "/%2541%257e", "/A~"),
            ("/a%20b", "/a%2520b", "/a%20b"),
            ("/a+b", "/a%2Bb", "/a%2Bb"),
            ("/a%2Bb", "/a%252Bb", "/a%2Bb"),
            ("/-._~", "/-._~", "/-._~"),
            ("/arn:aws;v=1,(*)!$&'@", *["/arn%3Aaws%3Bv%3D1%2C%28%2A%29%21%24%26%27%40"] * 2),
            ("/\xe1\x88\xb4", "/%E1%88%B4", "/%E1%88%B4"),
            ("/%E1%88%B4", "/%25E1%2588%25B4", "/%E1%88%B4"),
            ("/\x85\xa0\xff", "/%85%A0%FF", "/%85%A0%FF"),
            ("/%FF%00", "/%25FF%2500", "/%FF%00"),
            ("", "/", "/"),
        ]
        for path, general, s3 in table:
            with self.subTest(path):
                self.assertEqual(awsproxy.canonical_path(path, True), general)
            with self.subTest(path, of="s3"):
                self.assertEqual(awsproxy.canonical_path(path, False), s3)

    def test_paths_without_a_canonical_form_are_refused(self):
        table = [
            ("/%", (True, False)),
            ("/%2", (True, False)),
            ("/%zz", (True, False)),
            ("/a%2/b", (True, False)),
            ("/%%41", (True, False)),
            ("/%+1", (True, False)),
            ("/..", (True,)),
            ("/../a", (True,)),
            ("/a/../../b", (True,)),
            ("/./..", (True,)),
            ("//..", (True,)),
        ]
        for path, ways in table:
            for normalize in ways:
                with self.subTest(path, normalize=normalize):
                    with self.assertRaises(ServiceError) as caught:
                        awsproxy.canonical_path(path, normalize)
                    self.assertEqual(caught.exception.fault.status, 400)
                    self.assertIn(caught.exception.code, ("InvalidURI", "MalformedQueryString"))

    def test_queries(self):
        table = [
            ("nothing", "", ""),
            ("nothing, many times", "&&&", ""),
            ("a name alone", "k", "k="),
            ("an empty value", "k=", "k="),
            ("an empty name", "=v", "=v"),
            ("two equal signs", "k=a=b", "k=a%3Db"),
            ("sorted by name", "b=1&a=2", "a=2&b=1"),
            ("then by value", "a=2&a=1&a=", "a=&a=1&a=2"),
            ("by bytes", "a=b&A=b&a=B", "A=b&a=B&a=b"),
            ("as pairs, not as text", "a-b=1&a=2", "a=2&a-b=1"),
            ("by what is encoded", "%7Bb=1&-a=2&za=3", "%7Bb=1&-a=2&za=3"),
            ("twice the same", "a=1&a=1", "a=1&a=1"),
            ("empty components dropped", "&a=1&&b=2&", "a=1&b=2"),
            ("a plus is a space", "a+b=c+d", "a%20b=c%20d"),
            ("an escaped plus is none", "a=%2B%2b", "a=%2B%2B"),
            ("a semicolon separates nothing", "a=1;b=2", "a=1%3Bb%3D2"),
            ("an escaped ampersand neither", "a=1%26b=2", "a=1%26b%3D2"),
            ("a question mark", "a=?&?=b", "%3F=b&a=%3F"),
            ("decoded only once", "a=%2525", "a=%2525"),
            ("unreserved plain", "a=%2D%2e%5F%7e%41", "a=-._~A"),
            ("hex in upper case", "a=%c3%a9", "a=%C3%A9"),
            ("bytes as they are", "a=\xc3\xa9", "a=%C3%A9"),
            ("bytes that are no UTF-8", "a=%ff%00%85", "a=%FF%00%85"),
            ("slash and star", "a=/*", "a=%2F%2A"),
        ]
        for name, query, expected in table:
            with self.subTest(name):
                self.assertEqual(awsproxy.canonical_query(get(f"/?{query}").query), expected)

    def test_a_query_with_a_broken_escape_is_refused(self):
        for query in ("%", "a=%", "a=%4", "a=%zz", "%4=a", "a=%%41", "a=%2 ", "a=1&b=% 1"):
            with self.subTest(query):
                with self.assertRaises(ServiceError) as caught:
                    get(f"/?{query}").query  # noqa: B018
                self.assertEqual(caught.exception.code, "MalformedQueryString")
                self.assertEqual(caught.exception.fault.status, 400)

    def test_headers(self):
        table = [
            ("plain", ["v"], "v"),
            ("trimmed", [" \t v\t "], "v"),
            ("blanks collapsed", ["a  b \t c"], "a b c"),
            ("a tab alone is a space", ["a\tb"], "a b"),
            ("inside quotes too", ['"a   b"'], '"a b"'),
            ("empty", [""], ""),
            ("blank", [" \t"], ""),
            ("repeats in the order received", ["z", "a", "m"], "z,a,m"),
            ("repeats each trimmed", [" z ", "\ta"], "z,a"),
            ("repeats of which one is empty", ["", "a", ""], ",a,"),
            ("blanks before a comma stay one", ["a  , b"], "a , b"),
            ("case of the value", ["A%2f"], "A%2f"),
            ("UTF-8 that ends in A0", ["caff\xc3\xa0"], "caff\xc3\xa0"),
            ("UTF-8 that ends in 85", ["\xc3\x85"], "\xc3\x85"),
            ("A0 and 85 are no blanks", ["\xa0\xa0\x85\x85"], "\xa0\xa0\x85\x85"),
        ]
        for name, values, expected in table:
            with self.subTest(name):
                request = get("/", [("X-A", value) for value in values])
                line = awsproxy.canonical_headers(request.fields, ("x-a",))
                self.assertEqual(line, f"x-a:{expected}\n")

    def test_headers_come_in_the_order_signed_and_no_others(self):
        request = get("/", [("b", "1"), ("C", "2"), ("a", "3"), ("B", "4"), ("d", "5")])
        lines = awsproxy.canonical_headers(request.fields, ("a", "b", "c"))
        self.assertEqual(lines, "a:3\nb:1,4\nc:2\n")

    def test_the_signing_key_of_the_documentation(self):
        scope = awsproxy.CredentialScope("20150830", "us-east-1", "iam")
        self.assertEqual(
            awsproxy.signing_key("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", scope).hex(),
            "c4afb1cc5771d871763a393e44b703571b55cc28424d1a5e86da6ed3c154a4b9",
        )

    def test_the_steps_of_the_documentation(self):
        """ "Create a signed AWS API request": ListUsers of IAM."""
        request = get(*LIST_USERS)
        claimed = awsproxy.parse_authorization(request)
        self.assertEqual(claimed.access_key_id, "AKIDEXAMPLE")
        self.assertEqual(str(claimed.scope), "20150830/us-east-1/iam/aws4_request")
        self.assertEqual(claimed.signed_headers, ("content-type", "host", "x-amz-date"))
        canonical = awsproxy.canonical_request(request, claimed, EMPTY, Profile())
        self.assertEqual(
            canonical.decode(),
            "GET\n/\nAction=ListUsers&Version=2010-05-08\n"
            "content-type:application/x-www-form-urlencoded; charset=utf-8\n"
            "host:iam.amazonaws.com\nx-amz-date:20150830T123600Z\n\n"
            f"content-type;host;x-amz-date\n{EMPTY}",
        )
        text = awsproxy.string_to_sign(claimed.amz_date, claimed.scope, canonical)
        self.assertEqual(
            text.decode(),
            "AWS4-HMAC-SHA256\n20150830T123600Z\n20150830/us-east-1/iam/aws4_request\n"
            "f536975d06c0309214f805bb90ccff089219ecd68b2577efef23edd43b7e1a59",
        )
        made = awsproxy.signature(EXAMPLE.secret_access_key, claimed.scope, text)
        self.assertEqual(made, claimed.signature)


LIST_USERS = (
    "/?Action=ListUsers&Version=2010-05-08",
    (
        ("Host", "iam.amazonaws.com"),
        ("Content-Type", "application/x-www-form-urlencoded; charset=utf-8"),
        ("X-Amz-Date", "20150830T123600Z"),
        (
            "Authorization",
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/iam/aws4_request,"
            " SignedHeaders=content-type;host;x-amz-date, Signature="
            "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7",
        ),
    ),
)
S3_EXAMPLE = Client("s3", "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
S3_TIME = 1369353600  # 20130524T000000Z


def s3_example(method, target, headers, signed_headers, made, body=b""):
    given = {
        "Host": "examplebucket.s3.amazonaws.com",
        "X-Amz-Content-Sha256": sha256(body),
        "X-Amz-Date": "20130524T000000Z",
        "Authorization": "AWS4-HMAC-SHA256"
        " Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        f"SignedHeaders={signed_headers},Signature={made}",
        **headers,
    }
    return get(target, given.items(), method, body)


class PublishedExampleTest(VerifyCase):
    def check(self, request, client, now):
        self.assertIs(self.verify(request, now, (client,)).client, client)
        changed = dataclasses.replace(request, method="PATCH", body=io.BytesIO())
        self.refused(changed, "403 SignatureDoesNotMatch", now=now, clients=(client,))

    def test_the_example_of_the_iam_user_guide(self):
        self.check(get(*LIST_USERS), EXAMPLE, EXAMPLE_TIME)

    def test_the_examples_of_the_s3_api_reference(self):
        """ "Examples: Signature Calculations", and the one of "Using Query Parameters"."""
        plain = "host;x-amz-content-sha256;x-amz-date"
        put = {
            "Date": "Fri, 24 May 2013 00:00:00 GMT",
            "x-amz-storage-class": "REDUCED_REDUNDANCY",
        }
        presigned = (
            "/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE"
            "%2F20130524%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=20130524T000000Z"
            "&X-Amz-Expires=86400&X-Amz-SignedHeaders=host&X-Amz-Signature="
            "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
        )
        table = [
            ("GET object", s3_example(
                "GET", "/test.txt", {"Range": "bytes=0-9"},
                "host;range;x-amz-content-sha256;x-amz-date",
                "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")),
            ("PUT object", s3_example(
                "PUT", "/test$file.text", put,
                "date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class",
                "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
                b"Welcome to Amazon S3.")),
            ("GET bucket lifecycle", s3_example(
                "GET", "/?lifecycle", {}, plain,
                "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543")),
            ("List objects", s3_example(
                "GET", "/?max-keys=2&prefix=J", {}, plain,
                "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7")),
            ("presigned", get(presigned, [("Host", "examplebucket.s3.amazonaws.com")])),
        ]  # fmt: skip
        for name, request in table:
            with self.subTest(name):
                self.check(request, S3_EXAMPLE, S3_TIME)

    def test_repeated_parameters_are_sorted_by_value(self):
        """AWS's first test suite (get-vanilla-query-order-value and -key); none since has one."""
        table = [
            (
                "value2",
                "value1",
                "5772eed61e12b33fae39ee5e7012498b51d56abc0abb7c60486157bd471c4694",
            ),
            (
                "value2",
                "Value1",
                "eedbc4e291e521cf13422ffca22be7d2eb8146eecf653089df300a15b2382bd1",
            ),
        ]
        for first, second, made in table:
            with self.subTest(second):
                value = (
                    "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service"
                    f"/aws4_request, SignedHeaders=host;x-amz-date, Signature={made}"
                )
                headers = [
                    ("Host", "example.amazonaws.com"),
                    ("X-Amz-Date", "20150830T123600Z"),
                    ("Authorization", value),
                ]
                request = get(f"/?Param1={first}&Param1={second}", headers)
                self.check(request, EXAMPLE, EXAMPLE_TIME)


class AuthorizationTest(VerifyCase):
    """How a request is refused that does not say who calls, or not so as AWS wants it."""

    def test_a_signed_request_is_accepted(self):
        for service in ("sqs", "s3", "s3-outposts", "sns"):
            with self.subTest(service):
                kind = "s3" if service.startswith("s3") else service
                request = ask(kind, scope=f"20150830/us-east-1/{service}/aws4_request")
                verified = self.verify(request)
                self.assertIs(verified.client, DEMO)
                self.assertEqual(verified.body, b"{}")
                scope = awsproxy.CredentialScope("20150830", "us-east-1", service)
                self.assertEqual(verified.scope, scope)

    def test_another_kind_of_authorization_or_none(self):
        good = ask().headers
        missing, incomplete = "403 MissingAuthenticationToken", "400 IncompleteSignature"
        of_s3 = "400 InvalidRequest"
        version_2 = r'(?s)Signature Version 2.*AWS4-HMAC-SHA256.*signature_version="s3v4"'
        table = [
            ("none", "/", [], missing, "^Request is missing Authentication Token$"),
            ("empty", "/", [""], missing, "Request is missing Authentication Token"),
            ("Basic", "/", ["Basic ZHVtbXk6a2V5"], missing, "'Basic'"),
            ("Bearer", "/", ["Bearer abc.def"], missing, "'Bearer'"),
            ("garbage", "/", ["%\xff!"], missing, "Request is missing Authentication Token"),
            ("a secret alone", "/", ["c2VjcmV0"], missing, "^(?!.*c2VjcmV0)"),
            ("version 2", "/", ["AWS dummykey:c2ln="], of_s3, version_2),
            ("SigV4a", "/", ["AWS4-ECDSA-P256-SHA256 Credential=dummykey/20150830/sqs"
             "/aws4_request, SignedHeaders=host, Signature=30"], incomplete,
             "^Unsupported AWS 'algorithm': 'AWS4-ECDSA-P256-SHA256'"),
            ("SHA-1", "/", ["AWS4-HMAC-SHA1 Credential=a/b/c/d/e"], incomplete,
             "^Unsupported AWS 'algorithm': 'AWS4-HMAC-SHA1'"),
            ("lower case", "/", [good[-1][1].replace("AWS4-HMAC", "aws4-hmac")], missing, ""),
            ("version 2 in the query", "/?AWSAccessKeyId=dummykey&Expires=1&Signature=c2ln", [],
             of_s3, version_2),
            ("version 2 of SQS in the query",
             "/?Action=ListQueues&AWSAccessKeyId=dummykey&SignatureVersion=2&Signature=c2ln", [],
             incomplete, version_2),
        ]  # fmt: skip
        for name, target, values, answer, pattern in table:
            with self.subTest(name):
                headers = [*good[:-1], *(("Authorization", value) for value in values)]
                self.refused(get(target, headers, "POST", b"{}"), answer, pattern)

    def test_two_authorizations_at_once(self):
        for service, answer in (
            ("sqs", "403 SignatureDoesNotMatch"),
            ("s3", "400 InvalidArgument"),
        ):
            good, other = ask(service), link(service, method="POST")
            authorization = good.headers[-1]
            table = [
                ("two lines", "/", [*good.headers, authorization]),
                ("two lines in other case", "/", [*good.headers, ("authorization", "Basic eA==")]),
                ("Basic first", "/", [("Authorization", "Basic eA=="), *good.headers]),
                ("in header and query", other.target, good.headers),
                ("in header and a bit of the query", "/?X-Amz-Signature=0", good.headers),
                ("the same in lower case", "/?x-amz-algorithm=0", good.headers),
                ("the same escaped", "/?X-Amz-%43redential=0", good.headers),
            ]
            for name, target, headers in table:
                with self.subTest(name, service=service):
                    request = get(target, headers, "POST", b"{}")
                    expected = f"{answer}|403 S.*" if name == "Basic first" else answer
                    self.refused(request, expected, "^Only one auth mechanism allowed")

    def test_parameters_of_the_header(self):
        incomplete, malformed = "400 IncompleteSignature", "400 AuthorizationHeaderMalformed"
        end = "Authorization=AWS4-HMAC-SHA256$"
        spelling = r"^SignedHeaders must be .*"
        table = [
            # name, edit, whether it can still be told that this is for S3, message
            ("no Credential", "Credential=[^,]*, ", "", False,
             "^Authorization header requires 'Credential' parameter. " + end),
            ("no SignedHeaders", "SignedHeaders=[^,]*, ", "", True,
             "^Authorization header requires 'SignedHeaders' parameter. " + end),
            ("no Signature", ", Signature=.*", "", True,
             "^Authorization header requires 'Signature' parameter. " + end),
            ("empty Credential", "Credential=[^,]*", "Credential=", False, "'Credential'"),
            ("empty SignedHeaders", "SignedHeaders=[^,]*", "SignedHeaders=", True,
             "'SignedHeaders'"),
            ("empty Signature", "Signature=.*", "Signature=", True, "'Signature'"),
            ("Credential twice", "(Credential=[^,]*)", r"\1, \1", True, "^'Credential' .*twice"),
            ("SignedHeaders twice", "(SignedHeaders=[^,]*)", r"\1,\1", True,
             "^'SignedHeaders' .*twice"),
            ("Signature twice", "(Signature=.*)", r"\1, \1", True, "^'Signature' .*twice"),
            ("two Signatures", "(Signature=.*)", r"Signature=0,\1", True, "'Signature' .*twice"),
            ("unknown", "$", ", Expires=60", True, "^'Expires' is no parameter"),
            ("other case", "Signature=", "signature=", True, "^'signature' is no parameter"),
            ("blank before the sign", "Signature=", "Signature =", True, "is no parameter"),
            ("no sign", ", Sig", ", oops, Sig", True,
             r"^'oops' not a valid key=value pair \(missing equal-sign\)"),
            ("comma at the end", "$", ",", True, r"^'' not a valid key=value pair"),
            ("comma at the beginning", " Cred", " ,Cred", True, r"^'' not a valid key=value pair"),
            ("no commas", ", S", " S", True, ""),
            ("4 parts", "/aws4_request", "", False,
             "^Credential must have exactly 5 slash-delimited elements,"
             " e.g. keyid/date/region/service/term, got 'dummykey/20150830/us-east-1/s[^/]*'"),
            ("6 parts", "dummykey", "dummy/key", False, "exactly 5 .*got 'dummy/key/20150830/"),
            ("slash at the end", "aws4_request", "aws4_request/", True, "exactly 5"),
            ("escaped slashes", "/(?=[^,]*,)", "%2F", False, "exactly 5"),
            ("unsorted", "SignedHeaders=host;", "SignedHeaders=x-a;host;", True, spelling),
            ("a name twice", "=host;", "=host;host;", True, spelling),
            ("upper case", "=host;", "=Host;", True, spelling),
            ("empty name", "=host;", "=host;;", True, spelling),
            ("empty name first", "=host;", "=;host;", True, spelling),
            ("semicolon at the end", "x-amz-date,", "x-amz-date;,", True, spelling),
            ("blank in a name", "=host;", "=host; ", True, spelling),
            ("no ASCII in a name", "=host;", "=host;x-\xe0;", True, spelling),
            ("upper case Signature", "[0-9a-f]{64}", lambda m: m.group().upper(), True,
             "^Signature must be 64 lower-case"),
            ("short Signature", ".$", "", True, "^Signature must be 64"),
            ("long Signature", "$", "0", True, "^Signature must be 64"),
            ("no hex in Signature", ".$", "g", True, "^Signature must be 64"),
            ("no ASCII in Signature", ".$", "\xb2", True, "^Signature must be 64"),
        ]  # fmt: skip
        for name, old, new, known, pattern in table:
            for service in ("sqs", "s3"):
                with self.subTest(name, service=service):
                    answer = malformed if service == "s3" and known else incomplete
                    self.refused(ask(service, (old, new)), answer, pattern)

    def test_all_that_is_missing_is_told_at_once(self):
        request = get("/", [("Host", HOST), ("Authorization", "AWS4-HMAC-SHA256")])
        error = self.refused(request, "400 IncompleteSignature")
        self.assertEqual(
            error.message,
            "Authorization header requires 'Credential' parameter."
            " Authorization header requires 'Signature' parameter."
            " Authorization header requires 'SignedHeaders' parameter."
            " Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header."
            " Authorization=AWS4-HMAC-SHA256",
        )

    def test_names_wrongly_listed_are_refused_though_rightly_signed(self):
        for names in (
            ("x-amz-date", "host"),
            ("host", "host", "x-amz-date"),
            ("host", "x-amz-date", "x-a"),
        ):
            with self.subTest(names):
                request = spelled(ask(headers=[("X-A", "1")]), names)
                self.refused(request, "400 IncompleteSignature", "^SignedHeaders must be ")

    def test_order_and_blanks_are_free(self):
        parts = dict(
            part.split("=", 1) for part in ask().headers[-1][1].split(" ", 1)[1].split(", ")
        )
        table = [
            ("no blanks", "AWS4-HMAC-SHA256 ", ","),
            ("many blanks", "AWS4-HMAC-SHA256    ", ",  \t "),
            ("blanks before the comma", "AWS4-HMAC-SHA256 ", " ,"),
        ]
        for name, scheme, comma in table:
            for turn in range(3):
                with self.subTest(name, turn=turn):
                    names = ["Credential", "SignedHeaders", "Signature"]
                    value = scheme + comma.join(
                        f"{key}={parts[key]}" for key in names[turn:] + names[:turn]
                    )
                    headers = (*ask().headers[:-1], ("authorization", value))
                    self.assertIs(self.verify(get("/", headers, "POST", b"{}")).client, DEMO)

    def test_a_header_that_must_be_alone_is_refused_twice(self):
        for name in ("X-Amz-Date", "X-Amz-Security-Token", "X-Amz-Content-Sha256"):
            value = {"X-Amz-Date": "20150830T123600Z"}.get(name, sha256(b"{}"))
            client = DEMO
            if name == "X-Amz-Security-Token":
                client, value = SESSION, SESSION.session_token
            with self.subTest(name):
                request = ask(headers=[(name, value)] * 2, client=client)
                error = self.refused(request, "400 IncompleteSignature", clients=(client,))
                self.assertIn(f"'{name.lower()}'", error.message)


class TimeTest(VerifyCase):
    NO_DATE = (
        "^Date must be in ISO-8601 'basic format'. Got '{}'. See http://en.wikipedia.org/wiki/"
    )

    def test_a_time_that_is_none_is_refused(self):
        for value in (
            "20150230T000000Z",
            "20151301T000000Z",
            "20150830T240000Z",
            "20150830T123660Z",
            "00000830T123600Z",
            "20150830T123600",
            "20150830T123600z",
            "20150830 123600Z",
            "2015-08-30T12:36:00Z",
            " 20150830T123600Z",
            "20150830T123600Z ",
            "+2150830T123600Z",
            "2015083\xb2T123600Z",
            "1440938160",
            "Sun, 30 Aug 2015 12:36:00 GMT",
            "",
        ):
            with self.subTest(value):
                pattern = self.NO_DATE.format(re.escape(value))
                request = ask(headers=[("X-Amz-Date", value)])
                self.refused(request, "400 IncompleteSignature", pattern)
                request = ask("s3", headers=[("X-Amz-Date", value)])
                self.refused(request, "403 AccessDenied", "^Date must be|valid Date")

    def test_a_date_header_stands_in_for_x_amz_date(self):
        table = [
            ("RFC 1123", "Sun, 30 Aug 2015 12:36:00 GMT", ""),
            ("ISO 8601 basic", "20150830T123600Z", ""),
            ("another second", "Sun, 30 Aug 2015 12:36:01 GMT", "403 SignatureDoesNotMatch"),
            ("nonsense", "yesterday", "400 IncompleteSignature"),
            ("empty", "", "400 IncompleteSignature"),
            ("seconds", "1440938160", "400 IncompleteSignature"),
            ("no such day", "Mon, 30 Feb 2015 12:36:00 GMT", "400 IncompleteSignature"),
            ("no such day in ISO", "20150230T000000Z", "400 IncompleteSignature"),
            ("too late", "Sun, 30 Aug 2015 12:51:01 GMT", "403 SignatureDoesNotMatch"),
            ("ISO 8601 extended", "2015-08-30T12:36:00Z", "400 IncompleteSignature"),
        ]
        for name, value, answer in table:
            with self.subTest(name):
                request = ask(headers=[("Date", value)])
                if answer:
                    self.refused(request, answer)
                else:
                    self.assertIs(self.verify(request).client, DEMO)

    def test_a_date_beyond_all_calendars_is_refused_like_any_other(self):
        for value in (
            "Fri, 31 Dec 9999 23:59:59 -2359",
            "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
            "Mon, 01 Jan 2015 00:00:00 +99999999999999",
            "Mon, 01 Jan 0000 00:00:00 +2359",
            "Mon, 01 Jan 0001 00:00:00 GMT",
            "Mon, 01 Jan 2015 99999999999:00:00 GMT",
        ):
            with self.subTest(value):
                with self.assertRaises(ServiceError):
                    self.verify(ask(headers=[("Date", value)]))
        for year in ("0001", "9999"):
            with self.subTest(year):
                value = f"{year}1231T235959Z"
                scope = f"{year}1231/us-east-1/sqs/aws4_request"
                request = ask(headers=[("X-Amz-Date", value)], scope=scope)
                self.refused(request, "403 SignatureDoesNotMatch", "^Signature (expired|not yet)")
                request = link(edit=("X-Amz-Date=[0-9]*T[0-9]*Z", f"X-Amz-Date={value}"))
                self.refused(request, "403 SignatureDoesNotMatch", "expired|not yet")

    def test_x_amz_date_wins_over_date(self):
        others = ("Sat, 29 Aug 2015 12:36:00 GMT", "nonsense", "20140830T123600Z")
        for value in others:
            with self.subTest(value):
                both = [("Date", value), ("X-Amz-Date", "20150830T123600Z")]
                self.assertIs(self.verify(ask(headers=both)).client, DEMO)
        # What was signed under the Date alone is not good under another X-Amz-Date.
        request = ask(headers=[("Date", "Sun, 30 Aug 2015 12:36:00 GMT")])
        headers = (("X-Amz-Date", amz_date(EXAMPLE_TIME + 60)), *request.headers)
        self.refused(get("/", headers, "POST", b"{}"), "403 SignatureDoesNotMatch")
        # An old request gets no new life from a fresh Date, nor from a fresh unsigned X-Amz-Date.
        old = ask()
        for name in ("Date", "X-Amz-Date"):
            with self.subTest(name):
                headers = [pair for pair in old.headers if pair[0] != name]
                request = get("/", [*headers, (name, amz_date(LATER))], "POST", b"{}")
                self.refused(request, "403 SignatureDoesNotMatch", now=LATER)

    def test_a_request_without_a_date(self):
        for service, answer in (("sqs", "400 IncompleteSignature"), ("s3", "403 AccessDenied")):
            with self.subTest(service):
                good = ask(service)
                headers = [pair for pair in good.headers if pair[0] != "X-Amz-Date"]
                pattern = (
                    "requires existence of either a 'X-Amz-Date' or a 'Date' header|valid Date"
                )
                self.refused(get("/", headers, "POST", b"{}"), answer, pattern)

    def test_the_window(self):
        table = [
            # seconds from signing to arrival, how much is allowed, whether it is in time
            (0, 900, True),
            (900, 900, True),
            (901, 900, False),
            (900.5, 900, False),
            (-900, 900, True),
            (-901, 900, False),
            (-900.5, 900, False),
            (300, 300, True),
            (301, 300, False),
            (-301, 300, False),
            (86400, 86400, True),  # the next day, of which the scope is not
            (86401, 86400, False),
            (0, 0, True),
            (1, 0, False),
            (-1, 0, False),
        ]
        for seconds, skew, good in table:
            with self.subTest(seconds=seconds, skew=skew):
                now = EXAMPLE_TIME + seconds
                if good:
                    self.verify(ask(), now, clock_skew=skew)
                    self.verify(ask("s3"), now, clock_skew=skew)
                    continue
                pattern = "Signature expired: " if seconds > 0 else "Signature not yet current: "
                self.refused(ask(), "403 SignatureDoesNotMatch", pattern, now=now, clock_skew=skew)
                error = self.refused(
                    ask("s3"), "403 RequestTimeTooSkewed", now=now, clock_skew=skew
                )
                self.assertEqual(error.detail["MaxAllowedSkewMilliseconds"], str(skew * 1000))
                self.assertEqual(error.detail["RequestTime"], "20150830T123600Z")
                self.assertIn("ServerTime", error.detail)

    def test_the_message_tells_both_times_and_the_limit(self):
        table = [
            (901, 900, "Signature expired: 20150830T123600Z is now earlier than 20150830T123601Z"
             " (20150830T125101Z - 15 min.)"),
            (-901, 900, "Signature not yet current: 20150830T123600Z is still later than"
             " 20150830T123559Z (20150830T122059Z + 15 min.)"),
            (301, 300, "Signature expired: 20150830T123600Z is now earlier than 20150830T123601Z"
             " (20150830T124101Z - 5 min.)"),
        ]  # fmt: skip
        for seconds, skew, message in table:
            with self.subTest(seconds):
                now = EXAMPLE_TIME + seconds
                answer = "403 SignatureDoesNotMatch"
                error = self.refused(ask(), answer, now=now, clock_skew=skew)
                self.assertEqual(error.message, message)

    def test_a_request_signed_before_midnight_is_good_after_it(self):
        late = calendar.timegm((2015, 8, 30, 23, 59, 59))
        self.verify(ask(at=late), late + 6)
        self.verify(link(at=late), late + 6)
        self.verify(ask(at=late + 2), late)  # a clock ahead of ours
        scope = "20150831/us-east-1/sqs/aws4_request"
        pattern = "Date in Credential scope does not match"
        self.refused(ask(at=late, scope=scope), "403 SignatureDoesNotMatch", pattern, now=late + 6)


class ScopeTest(VerifyCase):
    def test_each_part_of_the_scope(self):
        terminator = (
            "Credential should be scoped with a valid terminator: 'aws4_request', not '{}'."
        )
        day = (
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from"
            " HTTP: '{}' != '20150830', from '20150830T123600Z'."
        )
        region = "Credential should be scoped to a valid region, not '{}'."
        service = "Credential should be scoped to correct service: '{}'."
        table = [
            ("terminator", "20150830/us-east-1/{}/aws5_request",
             terminator.format("aws5_request")),
            ("no terminator", "20150830/us-east-1/{}/", terminator.format("")),
            ("yesterday", "20150829/us-east-1/{}/aws4_request", day.format("20150829")),
            ("the whole time", "20150830T123600Z/us-east-1/{}/aws4_request",
             day.format("20150830T123600Z")),
            ("no date", "/us-east-1/{}/aws4_request", day.format("")),
            ("region", "20150830/eu-west-1/{}/aws4_request", region.format("eu-west-1")),
            ("region in upper case", "20150830/US-EAST-1/{}/aws4_request",
             region.format("US-EAST-1")),
            ("no region", "20150830//{}/aws4_request", region.format("")),
            ("service", "20150830/us-east-1/other/aws4_request", service),
            ("no service", "20150830/us-east-1//aws4_request", service),
        ]  # fmt: skip
        for name, scope, message in table:
            for wanted in ("sqs", "s3"):
                with self.subTest(name, service=wanted):
                    filled = scope.format(wanted)
                    known = wanted == "s3" and "s3" in filled
                    self.refused(
                        ask(wanted, scope=filled),
                        "400 AuthorizationHeaderMalformed"
                        if known
                        else "403 SignatureDoesNotMatch",
                        "" if known else f"^{re.escape(message.format(wanted))}$",
                        service=wanted,
                        regions=("us-east-1", "us-west-2"),
                    )
        with self.subTest("all"):
            error = self.refused(
                ask(scope="20150829/mars/sns/aws5_request"),
                "403 SignatureDoesNotMatch",
                service="sqs",
                regions=("us-east-1",),
            )
            for message in (terminator, day, region, service):
                self.assertIn(message.partition("{")[0], error.message)

    def test_what_is_not_asked_for_is_free(self):
        for region in ("us-east-1", "mars-north-7", "local"):
            with self.subTest(region):
                self.assertEqual(self.verify(ask(region=region)).scope.region, region)
        self.verify(ask(region="eu-west-1"), regions=("us-east-1", "eu-west-1"))
        self.assertEqual(self.verify(ask("sns")).scope.service, "sns")
        for scope in ("20150830/a b/sqs/aws4_request", "20150830/us-east-1/s\xb2/aws4_request"):
            with self.subTest(scope):
                self.refused(ask(scope=scope), "403 SignatureDoesNotMatch", "scoped to")

    def test_a_presigned_scope_is_held_to_the_same(self):
        for old, new in (("20150830%2F", "20150829%2F"), ("aws4_request", "aws5_request")):
            with self.subTest(new):
                self.refused(link(edit=(old, new)), "403 SignatureDoesNotMatch", "Credential")
        for how in ({"service": "sns"}, {"region": "eu-west-1"}):
            with self.subTest(how):
                request, limits = link(**how), {"service": "sqs", "regions": ("us-east-1",)}
                self.refused(request, "403 SignatureDoesNotMatch", "scoped to", **limits)

    def test_no_operation_runs_for_who_signed_for_another_service(self):
        caller = Caller("query")
        target = ("X-Amz-Target", "AmazonSQS.CreateQueue")
        kind = ("Content-Type", "application/x-www-form-urlencoded")
        form_body = b"Action=CreateQueue&QueueName=stolen"
        table = [
            ("json as sns", "sns", [target], b'{"QueueName":"stolen"}', None),
            ("json as s3", "s3", [target], b'{"QueueName":"stolen"}', None),
            ("json as s3, body unsigned", "s3", [target], b'{"QueueName":"stolen"}',
             "UNSIGNED-PAYLOAD"),
            ("form as sns", "sns", [kind], form_body, None),
            ("form as s3", "s3", [kind], form_body, None),
            ("form as s3, body unsigned", "s3", [kind], form_body, "UNSIGNED-PAYLOAD"),
        ]  # fmt: skip
        for name, service, headers, body, payload in table:
            with self.subTest(name):
                request = ask(service, headers=headers, body=body, payload_hash=payload)
                self.assertIn(caller.proxy.handle(request).status, (400, 403))
                self.assertEqual(caller("ListQueues").get("QueueUrls", []), [])


class KeyTest(VerifyCase):
    def test_keys_and_tokens(self):
        other = DEMO._replace(access_key_id="otherkey")
        wrong = SESSION._replace(session_token="dummysessiom")
        longer = SESSION._replace(session_token="dummysession2")
        key = "^The security token included in the request is invalid\\.$"
        token = "^The security token included in the request is invalid$"
        both = [DEMO, SESSION]
        table = [
            # name, who signs, who is known, message unless accepted
            ("unknown", other, both, key),
            ("nobody known", DEMO, [], key),
            ("case matters", DEMO._replace(access_key_id="DummyKey"), both, key),
            ("no token, none wanted", DEMO, [DEMO], ""),
            ("no token, but wanted", DEMO, [SESSION], token),
            ("token, none wanted", SESSION, [DEMO], token),
            ("right token", SESSION, [SESSION], ""),
            ("wrong token", wrong, [SESSION], token),
            ("longer token", longer, both, token),
            ("either of two", DEMO, both, ""),
            ("the other of two", SESSION, both, ""),
            ("the other of two, first", SESSION, both[::-1], ""),
        ]
        for name, signer, known, pattern in table:
            for service, code in (("sqs", None), ("s3", "InvalidToken")):
                for build in (ask, link):
                    with self.subTest(name, service=service, build=build.__name__):
                        request = build(service, client=signer)
                        if not pattern:
                            verified = self.verify(request, clients=known)
                            self.assertEqual(verified.client, signer)
                        elif not code:
                            self.refused(
                                request, "403 InvalidClientTokenId", pattern, clients=known
                            )
                        elif pattern == token:
                            self.refused(request, "400 InvalidToken", clients=known)
                        else:
                            self.refused(request, "403 InvalidAccessKeyId", clients=known)

    def test_one_key_with_two_secrets_is_told_apart_by_its_token(self):
        first = Client("first", "sharedkey", "dummysecret", "tokenone")
        second = Client("second", "sharedkey", "dummysecret2", "tokentwo")
        for signer in (first, second):
            for build in (ask, link):
                with self.subTest(signer.name, build=build.__name__):
                    verified = self.verify(build(client=signer), clients=(first, second))
                    self.assertIs(verified.client, signer)
        # The secret of one with the token of the other.
        mixed = first._replace(session_token="tokentwo")
        for build in (ask, link):
            self.refused(build(client=mixed), "403 SignatureDoesNotMatch", clients=(first, second))

    def test_the_token_of_a_presigned_request_is_not_taken_from_its_headers(self):
        request = link(headers=[("X-Amz-Security-Token", "dummysession")])
        self.refused(request, "403 InvalidClientTokenId", clients=(SESSION,))
        request = link(client=SESSION)
        headers = (*request.headers, ("X-Amz-Security-Token", "another"))
        self.refused(get(request.target, headers), "403 SignatureDoesNotMatch", clients=(SESSION,))

    def test_a_token_appended_after_signing_is_for_the_services_that_say_so(self):
        profiles = {"iotdevicegateway": Profile(unsigned_token=True)}
        in_query = presign(service="iotdevicegateway") + "&X-Amz-Security-Token=dummysession"
        in_header = ask("iotdevicegateway", client=SESSION, unsigned=("x-amz-security-token",))
        for request in (get(in_query, [("Host", HOST)]), in_header):
            with self.subTest(request.target):
                self.verify(request, clients=(SESSION,))
                request.body.seek(0)
                self.verify(request, clients=(SESSION,), profiles=profiles)
                request.body.seek(0)
                answer = "403 SignatureDoesNotMatch"
                self.refused(request, answer, clients=(SESSION,), profiles={})
        for build in (ask, link):
            wrong = build("iotdevicegateway", client=SESSION._replace(session_token="x"))
            self.refused(wrong, "403 InvalidClientTokenId", clients=(SESSION,))

    def test_strangers_fill_no_cache(self):
        awsproxy.signing_key.cache_clear()
        for number in range(5):
            stranger = DEMO._replace(access_key_id=f"stranger{number}")
            for request in (ask(client=stranger), ask(region=f"r{number}"), ask(date="x")):
                with self.assertRaises(ServiceError):
                    self.verify(request, regions=("us-east-1",))
        self.assertEqual(awsproxy.signing_key.cache_info().currsize, 0)
        self.verify(ask())
        self.assertEqual(awsproxy.signing_key.cache_info().currsize, 1)


class SignedHeadersTest(VerifyCase):
    def test_every_x_amz_header_must_be_signed(self):
        names = (
            "X-Amz-Target",
            "x-amz-acl",
            "X-AMZ-COPY-SOURCE",
            "x-amz-meta-",
            "X-Amz-Grant-Full-Control",
            "X-Amz-Security-Token",
            "X-Amz-User-Agent",
            "X-Amz-Cf-Id",
        )
        says = "^There were headers present in the request which were not signed"
        for service, answer in (("sqs", "403 SignatureDoesNotMatch"), ("s3", "403 AccessDenied")):
            for name in names:
                client = SESSION if "Token" in name else DEMO
                headers = [(name, client.session_token)]
                table = [
                    ("header", ask(service, headers=headers, unsigned=[name], client=client)),
                    ("added later", ask(service)),
                    ("query", link(service)),
                ]
                for form, request in table:
                    if form != "header":
                        if client is SESSION:
                            continue
                        made = (*request.headers, (name, ""))
                        request = dataclasses.replace(request, headers=made)
                    with self.subTest(name, service=service, form=form):
                        error = self.refused(request, answer, says, clients=(client,))
                        self.assertEqual(error.detail["HeadersNotSigned"], name.lower())

    def test_the_hash_of_the_body_need_not_be_signed_for_s3(self):
        name = "X-Amz-Content-Sha256"
        self.verify(ask("s3", unsigned=[name]))
        self.verify(ask("s3"))
        request = ask(headers=[(name, sha256(b"{}"))], unsigned=[name])
        error = self.refused(request, "403 SignatureDoesNotMatch", "not signed")
        self.assertEqual(error.detail["HeadersNotSigned"], name.lower())

    def test_other_headers_may_be_unsigned(self):
        """curl signs no Content-Type of its own making; botocore adds amz-sdk-* later."""
        others = [
            ("Content-Type", "text/plain"),
            ("Content-MD5", "x"),
            ("Content-Length", "2"),
            ("User-Agent", "curl/8"),
            ("amz-sdk-invocation-id", "1"),
            ("amz-sdk-request", "attempt=1"),
            ("X-Amzn-Trace-Id", "Root=1"),
            ("Expect", "100-continue"),
            ("Connection", "keep-alive"),
        ]
        names = [name for name, _ in others]
        for service in ("sqs", "s3"):
            with self.subTest(service):
                self.verify(ask(service, headers=others, unsigned=names))
                self.verify(ask(service, headers=others))
                request = link(service)
                self.verify(dataclasses.replace(request, headers=(*request.headers, *others)))

    def test_what_the_reading_rests_on_must_be_signed(self):
        headers = [("Content-Type", "application/json")]
        must = {"must_be_signed": ("content-type",)}
        self.verify(ask(headers=headers), **must)
        self.verify(ask(), **must)
        request = ask(headers=headers, unsigned=["content-type"])
        self.refused(request, "403 SignatureDoesNotMatch", "not signed: content-type", **must)

    def test_host_and_date_must_be_signed(self):
        dated = [("Date", "Sun, 30 Aug 2015 12:36:00 GMT")]
        host = "^'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization.$"
        table = [
            ("no host", [], ["host"], host),
            ("no x-amz-date", [], ["x-amz-date"], "not signed.*x-amz-date"),
            ("no date", dated, ["date"], "not signed.*date"),
        ]
        for name, headers, unsigned, pattern in table:
            for service, answer in (
                ("sqs", "403 SignatureDoesNotMatch"),
                ("s3", "403 AccessDenied"),
            ):
                with self.subTest(name, service=service):
                    request = ask(service, headers=headers, unsigned=unsigned)
                    self.refused(request, answer, pattern)
        with self.subTest("date, of which another header decides"):
            both = [*dated, ("X-Amz-Date", "20150830T123600Z")]
            self.verify(ask(headers=both, unsigned=["date"]))
        with self.subTest("no host in the query"):
            request = link(edit=("SignedHeaders=host", "SignedHeaders=x-a"))
            headers = (*request.headers, ("X-A", "1"))
            self.refused(get(request.target, headers), "403 SignatureDoesNotMatch", host)

    def test_a_signed_header_that_is_absent(self):
        good = ask(headers=[("X-Empty", ""), ("X-Zeta", "1")])
        self.verify(good)
        for name in ("X-Empty", "X-Zeta"):
            with self.subTest(name):
                headers = [pair for pair in good.headers if pair[0] != name]
                request = get("/", headers, "POST", b"{}")
                self.refused(request, "403 SignatureDoesNotMatch", name.lower())
        with self.subTest("query"):
            request = link(headers=[("X-Empty", "")])
            self.verify(request)
            request = get(request.target, [("Host", HOST)])
            self.refused(request, "403 SignatureDoesNotMatch", "x-empty")


class ChangedRequestTest(VerifyCase):
    def test_whatever_is_changed_on_the_way_breaks_the_signature(self):
        headers = [("X-Amz-Target", "AmazonSQS.ListQueues"), ("X-Two", "a"), ("X-Two", "b")]
        target = "/000000000000/jobs?a=1&b=2"

        def header(name, value):
            return lambda given: [(k, value if k == name else v) for k, v in given]

        def same(given):
            return given

        table = [
            ("method", "PUT", target, same, b"{}"),
            ("method in lower case", "post", target, same, b"{}"),
            ("path", "POST", target.replace("jobs", "Jobs"), same, b"{}"),
            ("path with a slash more", "POST", target.replace("jobs", "jobs/"), same, b"{}"),
            ("path escaped", "POST", target.replace("jobs", "%6Aobs"), same, b"{}"),
            ("path with a segment less", "POST", target.replace("/jobs", ""), same, b"{}"),
            ("query value", "POST", target.replace("a=1", "a=2"), same, b"{}"),
            ("query values swapped", "POST", target.replace("a=1&b=2", "a=2&b=1"), same, b"{}"),
            ("query more", "POST", target + "&c", same, b"{}"),
            ("query less", "POST", target.replace("&b=2", ""), same, b"{}"),
            ("query twice", "POST", target + "&b=2", same, b"{}"),
            ("query none", "POST", target.partition("?")[0], same, b"{}"),
            ("query in the path", "POST", target.replace("?", "%3F"), same, b"{}"),
            ("header", "POST", target, header("X-Amz-Target", "AmazonSQS.PurgeQueue"), b"{}"),
            ("header in other case", "POST", target,
             header("X-Amz-Target", "amazonsqs.listqueues"), b"{}"),
            ("host", "POST", target, header("Host", "localhost:8082"), b"{}"),
            ("host without port", "POST", target, header("Host", "localhost"), b"{}"),
            ("host in upper case", "POST", target, header("Host", HOST.upper()), b"{}"),
            ("date", "POST", target, header("X-Amz-Date", amz_date(EXAMPLE_TIME + 1)), b"{}"),
            ("header line less", "POST", target,
             lambda given: [pair for pair in given if pair != ("X-Two", "b")], b"{}"),
            ("header line more", "POST", target, lambda given: [*given, ("x-two", "c")], b"{}"),
            ("header lines swapped", "POST", target,
             lambda given: sorted(given, key=lambda pair: pair[1] == "a"), b"{}"),
            ("one digit of the signature", "POST", target,
             lambda given: [(k, v[:-1] + ("0" if v[-1] != "0" else "1")) if k == "Authorization"
                            else (k, v) for k, v in given], b"{}"),
            ("a header less in the list", "POST", target,
             lambda given: [(k, v.replace(";x-two", "")) for k, v in given], b"{}"),
            ("region", "POST", target,
             lambda given: [(k, v.replace("us-east-1", "us-east-2")) for k, v in given], b"{}"),
            ("body", "POST", target, same, b"[]"),
            ("body longer", "POST", target, same, b"{} "),
            ("body gone", "POST", target, same, b""),
        ]  # fmt: skip
        for service in ("sqs", "s3"):
            good = ask(service, headers=headers, target=target)
            self.assertIs(self.verify(good).client, DEMO)
            for name, method, other, change, body in table:
                if service == "s3" and name in ("path escaped",):
                    continue  # there it is the same key
                with self.subTest(name, service=service):
                    given = change(list(good.headers))
                    request = get(other, given, method, body)
                    changed = (method, other, given, body)
                    self.assertNotEqual(changed, ("POST", target, list(good.headers), b"{}"))
                    if service == "s3" and name.startswith("body"):
                        error = self.refused(request, "400 XAmzContentSHA256Mismatch")
                        self.assertEqual(
                            error.detail,
                            {
                                "ClientComputedContentSHA256": sha256(b"{}"),
                                "S3ComputedContentSHA256": sha256(body),
                            },
                        )
                        continue
                    says = "^The request signature we calculated does not match the signature you"
                    self.refused(request, "403 SignatureDoesNotMatch", says)

    def test_a_form_that_curl_once_signed_is_refused_all_the_same(self):
        """Not in canonical form: curl before 8.9 (path), 8.3 and 8.5 (query), 7.86 (host)."""
        base = {"path": "/a%252520b", "query": "a=1&b=", "host": HOST, "payload": sha256(b"{}")}
        table = [
            ("right", {}),
            ("path as sent", {"path": "/a%2520b"}),
            ("query unsorted", {"query": "b=&a=1"}),
            ("query without an equal sign", {"query": "a=1&b"}),
            ("query as sent", {"query": "b&a=1"}),
            ("host without its port", {"host": "localhost"}),
            ("no body", {"payload": EMPTY}),
        ]
        scope = "20150830/us-east-1/sqs/aws4_request"
        for name, deviation in table:
            with self.subTest(name):
                form = {**base, **deviation}
                given = [("Host", form["host"]), ("X-Amz-Date", "20150830T123600Z")]
                made = signature(
                    DEMO, "POST", form["path"], form["query"], given, ["host", "x-amz-date"],
                    form["payload"], EXAMPLE_TIME, scope,
                )  # fmt: skip
                value = (
                    f"AWS4-HMAC-SHA256 Credential=dummykey/{scope},"
                    f" SignedHeaders=host;x-amz-date, Signature={made.hex}"
                )
                headers = [("Host", HOST), given[1], ("Authorization", value)]
                request = get("/a%2520b?b&a=1", headers, "POST", b"{}")
                if deviation:
                    self.refused(request, "403 SignatureDoesNotMatch", "we calculated")
                else:
                    self.verify(request)

    def test_a_signature_is_good_for_one_secret(self):
        for build in (ask, link):
            request = build(client=DEMO._replace(secret_access_key="dummysecret2"))
            self.refused(request, "403 SignatureDoesNotMatch", "we calculated")

    def test_the_header_signature_is_none_for_a_link_and_the_other_way_round(self):
        made = ask(method="GET", body=b"").headers[-1][1].rpartition("=")[2]
        request = link(edit=("Signature=.*", f"Signature={made}"))
        self.refused(request, "403 SignatureDoesNotMatch", "we calculated")
        made = link().target.rpartition("=")[2]
        request = ask(method="GET", body=b"", edit=("Signature=.*", f"Signature={made}"))
        self.refused(request, "403 SignatureDoesNotMatch", "we calculated")


class Recorder(io.BytesIO):
    """A body that knows whether anybody has read it."""

    reads = 0

    def read(self, size=-1):
        self.reads += 1
        return super().read(size)


class PayloadTest(VerifyCase):
    def test_the_declared_hash_of_services_other_than_s3(self):
        right, wrong = sha256(b"{}"), sha256(b"[]")
        events = "STREAMING-AWS4-HMAC-SHA256-EVENTS"
        chunks = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
        table = [
            # declared, in the signature, accepted
            ("right", right, right, True),
            ("wrong, as declared", wrong, wrong, False),
            ("wrong, as computed", wrong, right, False),
            ("UNSIGNED-PAYLOAD", "UNSIGNED-PAYLOAD", "UNSIGNED-PAYLOAD", False),
            ("UNSIGNED-PAYLOAD, body signed", "UNSIGNED-PAYLOAD", right, False),
            ("upper case", right.upper(), right, False),
            ("upper case, as declared", right.upper(), right.upper(), False),
            ("short", right[:-1], right, False),
            ("empty", "", right, False),
            ("chunks", chunks, chunks, False),
            ("events", events, events, False),
        ]
        for name, declared, payload, good in table:
            with self.subTest(name):
                headers = [("X-Amz-Content-Sha256", declared)]
                request = ask(headers=headers, payload_hash=payload)
                if good:
                    self.assertEqual(self.verify(request).body, b"{}")
                    continue
                self.refused(request, "403 SignatureDoesNotMatch")

    def test_what_amazon_s3_takes_for_a_payload(self):
        right, wrong = sha256(b"data"), sha256(b"atad")
        chunks = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
        trailer = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
        table = [
            ("right", right, ""),
            ("unsigned", "UNSIGNED-PAYLOAD", ""),
            ("wrong", wrong, "400 XAmzContentSHA256Mismatch"),
            ("of no body", EMPTY, "400 XAmzContentSHA256Mismatch"),
            ("upper case", right.upper(), "400 InvalidArgument"),
            ("unsigned in lower case", "unsigned-payload", "400 InvalidArgument"),
            ("empty", "", "400 InvalidArgument"),
            ("short", right[:-1], "400 InvalidArgument"),
            ("unknown", "UNSIGNED", "400 InvalidArgument"),
            ("chunks", chunks, "400 InvalidRequest"),
            ("trailer", chunks + "-TRAILER", "400 InvalidRequest"),
            ("unsigned trailer", trailer, "400 InvalidRequest"),
            ("no such chunks", "STREAMING-UNSIGNED-PAYLOAD", "(400|501) .*"),
        ]
        for name, declared, answer in table:
            for unsigned in ((), ("x-amz-content-sha256",)):
                with self.subTest(name, unsigned=unsigned):
                    headers = [("X-Amz-Content-Sha256", declared)]
                    request = ask(
                        "s3", headers=headers, body=b"data", payload_hash=declared,
                        unsigned=unsigned,
                    )  # fmt: skip
                    if not answer:
                        self.assertEqual(self.verify(request).body, b"data")
                        continue
                    says = (
                        "header does not match what was computed" if "Mismatch" in answer else ""
                    )
                    self.refused(request, answer, says)
        with self.subTest("missing"):
            request = signed("PUT", "/k", body=b"data", service="s3")
            says = "^Missing required header for this request: x-amz-content-sha256$"
            self.refused(request, "400 InvalidRequest", says)

    def test_an_unsigned_payload_is_for_the_s3_family_alone(self):
        for service in ("s3", "s3-express", "s3-outposts", "s3-object-lambda"):
            with self.subTest(service):
                scope = f"20150830/us-east-1/{service}/aws4_request"
                self.verify(ask("s3", scope=scope, payload_hash="UNSIGNED-PAYLOAD"))
        for service in ("sqs", "s3x", "S3", "s3tables", "vpc-lattice-svcs"):
            with self.subTest(service):
                headers = [("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")]
                request = ask(service, headers=headers, payload_hash="UNSIGNED-PAYLOAD")
                self.refused(request, "403 SignatureDoesNotMatch", "UNSIGNED-PAYLOAD")

    def test_the_body_is_read_when_nothing_else_is_left_to_refuse(self):
        stranger = DEMO._replace(access_key_id="stranger")
        bad = (".$", lambda found: "0" if found.group() != "0" else "1")
        unsigned = {"headers": [("X-Amz-Acl", "x")], "unsigned": ["x-amz-acl"]}
        table = [
            ("no key", "sqs", {"client": stranger}, 0),
            ("unsigned header", "sqs", unsigned, 0),
            ("old", "sqs", {"at": EXAMPLE_TIME - 901}, 0),
            ("declared badly", "sqs", {"headers": [("X-Amz-Content-Sha256", "x")]}, 0),
            ("signature", "sqs", {"edit": bad}, 1),
            ("no key", "s3", {"client": stranger}, 0),
            ("signature", "s3", {"edit": bad}, 0),
            ("signature, payload unsigned", "s3",
             {"edit": bad, "payload_hash": "UNSIGNED-PAYLOAD"}, 0),
            ("body", "s3", {"payload_hash": EMPTY}, 1),
        ]  # fmt: skip
        for name, service, how, reads in table:
            with self.subTest(name, service=service):
                body = Recorder(b"{}")
                request = dataclasses.replace(ask(service, **how), body=body)
                self.refused(request, ".*")
                self.assertEqual(body.reads > 0, reads > 0)


class PresignedTest(VerifyCase):
    NAMES = (
        "X-Amz-Algorithm",
        "X-Amz-Credential",
        "X-Amz-Date",
        "X-Amz-Expires",
        "X-Amz-SignedHeaders",
        "X-Amz-Signature",
    )
    ANSWERS = (("sqs", "400 IncompleteSignature"), ("s3", "400 AuthorizationQueryParametersError"))

    def test_a_link_is_accepted(self):
        for service in ("sqs", "s3"):
            for client in (DEMO, SESSION):
                with self.subTest(service, client=client.name):
                    request = link(service, client=client, target="/a%20b?k&a=1&a-b=2")
                    self.assertIs(self.verify(request, clients=(client,)).client, client)

    def test_a_parameter_is_missing(self):
        for service, answer in self.ANSWERS:
            for name in self.NAMES:
                if (name, service) == ("X-Amz-Expires", "sqs"):
                    continue  # it may be: then the window holds that is for headers
                known = name != "X-Amz-Credential"
                expected = answer if known else "400 IncompleteSignature"
                says = (
                    f"^AWS query-string parameters must include '{name}'."
                    ".* ?Re-examine the query-string parameters.$"
                )
                good = link(service)
                for form, target in (
                    ("missing", without(good.target, name)),
                    ("empty", re.sub(f"({name}=)[^&]*", r"\1", good.target)),
                ):
                    with self.subTest(name, service=service, form=form):
                        self.refused(get(target, good.headers), expected, says)

    def test_a_parameter_is_repeated_or_spelled_in_another_case(self):
        for service, answer in self.ANSWERS:
            for name in (*self.NAMES, "X-Amz-Security-Token"):
                good = link(service, client=SESSION).target
                value = re.search(f"{name}=([^&]*)", good).group(1)
                spelling = presign(target=f"/?{name.lower()}=1", service=service, client=SESSION)
                table = [
                    ("the same twice", f"{good}&{name}={value}"),
                    ("another first", good.replace("?", f"?{name}=1&", 1)),
                    ("two, both signed", presign(target=f"/?{name}=1", service=service,
                                                 client=SESSION)),
                    ("two spellings", f"{good}&{name.lower()}={value}"),
                    ("two spellings, both signed", spelling),
                    ("two spellings, one escaped", f"{good}&%58-amz{name[5:]}={value}"),
                    ("lower case", good.replace(f"{name}=", f"{name.lower()}=")),
                    ("upper case", good.replace(f"{name}=", f"{name.upper()}=")),
                ]  # fmt: skip
                for form, target in table:
                    with self.subTest(name, service=service, form=form):
                        request = get(target, [("Host", HOST)])
                        self.refused(request, answer, f"'{name}'", clients=(SESSION,))

    def test_the_values_of_the_parameters(self):
        spelling = "^SignedHeaders must be "
        table = [
            ("date", "Date=20150830T", "Date=20150230T", "^Date must be in ISO-8601"),
            (
                "date as in a header",
                "Date=[^&]*",
                "Date=Sun%2C%2030%20Aug%202015",
                "^Date must be",
            ),
            ("signed headers unsorted", "=host", "=x-a%3Bhost", spelling),
            ("signed headers in upper case", "=host", "=Host", spelling),
            ("signed headers twice", "=host", "=host%3Bhost", spelling),
            ("signed headers, empty name", "=host", "=host%3B", spelling),
            ("signed headers, double encoded", "=host", "=host%253Bx", ""),
            ("signature short", ".$", "", "^Signature must be 64"),
            ("signature in upper case", "[0-9a-f]{64}", lambda m: m.group().upper(), "must be 64"),
            ("credential of 4 parts", "%2Faws4_request", "", "exactly 5"),
            ("credential of 6 parts", "aws4_request", "aws4_request%2Fx", "exactly 5"),
            ("credential double encoded", "%2F", "%252F", "exactly 5"),
        ]
        for name, old, new, pattern in table:
            with self.subTest(name):
                self.refused(link(edit=(old, new)), "400 IncompleteSignature", pattern)

    def test_another_algorithm(self):
        table = [
            ("AWS4-ECDSA-P256-SHA256", "400 IncompleteSignature"),
            ("AWS4-HMAC-SHA1", "400 IncompleteSignature"),
            ("aws4-hmac-sha256", "40[03] (IncompleteSignature|MissingAuthenticationToken)"),
            ("HMAC-SHA256", "40[03] (IncompleteSignature|MissingAuthenticationToken)"),
        ]
        for algorithm, answer in table:
            with self.subTest(algorithm):
                request = link(edit=("AWS4-HMAC-SHA256", algorithm))
                self.refused(request, answer, f"'{algorithm}'")

    def test_version_4a_is_called_by_its_name(self):
        """Its scope has no region, which must not be what the caller is told."""
        request = link(edit=("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256"))
        target = request.target.replace("us-east-1%2F", "") + "&X-Amz-Region-Set=%2A"
        says = "^Unsupported AWS 'algorithm': 'AWS4-ECDSA-P256-SHA256'"
        self.refused(get(target, request.headers), "400 IncompleteSignature", says)

    def test_how_long_a_link_may_be_good(self):
        good = (1, 60, 604800)
        bad = (
            "0", "604801", "700000", "abc", "-1", "+60", "60.0", "6e1", "0x10", "1_0", " 60",
            "60 ", "\xb2", "\u0661", "9" * 19, "9" * 5000,
        )  # fmt: skip
        for service, answer in self.ANSWERS:
            for expires in good:
                with self.subTest(expires, service=service):
                    self.verify(link(service, expires=expires))
            for expires in bad:
                with self.subTest(expires, service=service):
                    self.refused(link(service, expires=expires), answer, "^X-Amz-Expires ")

    def test_seven_digits_of_seconds_are_none(self):
        for service, answer in self.ANSWERS:
            with self.subTest(service):
                self.refused(link(service, expires="0003600"), answer, "X-Amz-Expires")

    def test_from_when_to_when_a_link_is_good(self):
        over = ("^Signature expired: ", "^Request has expired")
        early = ("^Signature not yet current: ", "^Request is not valid yet")
        table = [
            # good for how long, seconds from signing to use, message unless accepted
            (1, 0, None),
            (1, 1, None),
            (1, 2, over),
            (1, 1.5, over),
            (604800, 604800, None),
            (604800, 604801, over),
            (60, 61, over),
            (60, -900, None),
            (60, -901, early),
            (604800, -86400, early),
        ]
        for index, (service, code) in enumerate(
            (("sqs", "SignatureDoesNotMatch"), ("s3", "AccessDenied"))
        ):
            for expires, seconds, patterns in table:
                with self.subTest(service, expires=expires, seconds=seconds):
                    request, now = link(service, expires=expires), EXAMPLE_TIME + seconds
                    if patterns:
                        self.refused(request, f"403 {code}", patterns[index], now=now)
                    else:
                        self.verify(request, now)

    def test_a_link_to_s3_must_say_how_long_it_is_good(self):
        """However its credential is spelled, and whatever else looks like one."""
        decoy = "X-Amz-Credential=a/20150830/us-east-1/sqs/aws4_request"
        hidden = escaped(decoy.encode(), b"/")

        def bare(target):
            return presign(target=target, service="s3", expires=None)

        table = [
            ("plain", bare("/")),
            ("name escaped", bare("/").replace("X-Amz-Credential", "X-Amz-%43redential")),
            ("decoy in a value", bare(f"/?a=%3F{escaped(decoy.encode(), b'')}")),
            ("the same, not escaped", bare(f"/?a=%3F{escaped(decoy.encode(), b'')}").replace(
                f"%3F{escaped(decoy.encode(), b'')}", f"?{decoy}")),
            ("decoy in the path", bare(f"/%26{hidden}").replace(f"%26{hidden}", f"&{decoy}")),
        ]  # fmt: skip
        for name, spelling in table:
            with self.subTest(name):
                says = "X-Amz-Expires"
                self.refused(get(spelling, [("Host", HOST)]), "400 .*", says)

    def test_without_expires_the_window_of_headers_holds(self):
        self.verify(link(expires=None), EXAMPLE_TIME + 900)
        for seconds in (901, -901):
            with self.subTest(seconds):
                self.refused(
                    link(expires=None),
                    "403 SignatureDoesNotMatch",
                    "^Signature (expired|not yet current): ",
                    now=EXAMPLE_TIME + seconds,
                )

    def test_a_link_is_for_one_method_path_and_host(self):
        for service in ("sqs", "s3"):
            good = link(service, target="/k?a=1")
            for method in ("HEAD", "POST", "PUT", "DELETE", "get"):
                with self.subTest(method, service=service):
                    request = dataclasses.replace(good, method=method)
                    self.refused(request, "403 SignatureDoesNotMatch", "we calculated")
            table = [
                ("path", good.target.replace("/k", "/l"), good.headers),
                ("query", good.target.replace("a=1", "a=2"), good.headers),
                ("query less", good.target.replace("a=1&", ""), good.headers),
                ("query more", good.target + "&b", good.headers),
                ("expires", good.target.replace("=3600", "=3601"), good.headers),
                ("host", good.target, [("Host", "elsewhere")]),
            ]
            for name, target, headers in table:
                with self.subTest(name, service=service):
                    self.refused(get(target, headers), "403 SignatureDoesNotMatch", "calculated")

    def test_headers_of_a_link(self):
        good = link("s3", headers=[("X-Amz-Acl", "private"), ("X-Zeta", "1")])
        self.verify(good)
        for name, value in good.headers[1:]:
            with self.subTest(name):
                changed = [(k, v + "x" if k == name else v) for k, v in good.headers]
                self.refused(get(good.target, changed), "403 SignatureDoesNotMatch")
                self.refused(
                    get(good.target, [*good.headers, (name, value)]), "403 SignatureDoesNotMatch"
                )

    def test_a_header_may_not_differ_from_the_parameter_of_its_name(self):
        for service, answer in self.ANSWERS:
            for name in ("X-Amz-Acl", "x-amz-acl", "x-AMZ-Acl"):
                target = f"/?{name}=private"
                with self.subTest(name, service=service):
                    self.verify(link(service, target=target))
                    self.verify(link(service, target=target, headers=[("x-amz-acl", "private")]))
                    for values in (["public"], ["private", "public"], [""]):
                        headers = [("X-Amz-Acl", value) for value in values]
                        request = link(service, target=target, headers=headers)
                        self.refused(request, answer, "'x-amz-acl' differs")
        dated = [("X-Amz-Date", amz_date(EXAMPLE_TIME + 1))]
        self.refused(link(headers=dated), "400 IncompleteSignature", "'x-amz-date' differs")
        self.verify(link(headers=[("X-Amz-Date", amz_date(EXAMPLE_TIME))]))

    def test_the_body_of_a_link(self):
        real, other = sha256(b"data"), sha256(b"other")
        name = "X-Amz-Content-Sha256"
        mismatch, no_match = "400 XAmzContentSHA256Mismatch", "403 SignatureDoesNotMatch"
        table = [
            # service, what target and headers say of the body, what is signed, answer
            ("s3", "/k", [], None, ""),
            ("s3", "/k", [], real, no_match),
            ("s3", f"/k?{name}=UNSIGNED-PAYLOAD", [], None, ""),
            ("s3", f"/k?{name}={real}", [], real, ""),
            ("s3", f"/k?{name.lower()}={real}", [], real, ""),
            ("s3", f"/k?{name}={other}", [], other, mismatch),
            ("s3", f"/k?{name}={real}", [], None, no_match),
            ("s3", f"/k?{name}=STREAMING-UNSIGNED-PAYLOAD-TRAILER", [], None,
             "403 SignatureDoesNotMatch"),
            ("s3", f"/k?{name}=nonsense", [], "nonsense", "400 InvalidArgument"),
            ("s3", "/k", [(name, real)], real, ""),
            ("s3", "/k", [(name, other)], other, mismatch),
            ("s3", "/k", [(name, "UNSIGNED-PAYLOAD")], None, ""),
            ("s3", f"/k?{name}={real}", [(name, "UNSIGNED-PAYLOAD")], None,
             "400 AuthorizationQueryParametersError"),
            ("sqs", "/k", [], real, ""),
            ("sqs", "/k", [], None, no_match),  # the hash of no body is signed
            ("sqs", "/k", [], "UNSIGNED-PAYLOAD", no_match),
            ("sqs", f"/k?{name}=UNSIGNED-PAYLOAD", [], "UNSIGNED-PAYLOAD", no_match),
            ("sqs", "/k", [(name, "UNSIGNED-PAYLOAD")], "UNSIGNED-PAYLOAD", no_match),
        ]  # fmt: skip
        for service, target, headers, payload, answer in table:
            with self.subTest(service, target=target, headers=headers, payload=payload):
                request = link(
                    service,
                    target=target,
                    headers=headers,
                    payload_hash=payload,
                    method="PUT",
                    body=b"data",
                )
                if answer:
                    self.refused(request, answer)
                else:
                    self.assertEqual(self.verify(request).body, b"data")

    def test_a_hash_added_to_a_link_does_not_change_what_was_signed(self):
        good = link("s3", method="PUT", body=b"data")
        headers = (*good.headers, ("X-Amz-Content-Sha256", sha256(b"data")))
        request = dataclasses.replace(good, headers=headers)
        self.refused(request, "403 SignatureDoesNotMatch")

    def test_a_link_that_signs_nothing_of_the_body_has_none_elsewhere(self):
        request = link(method="GET", body=b"Action=PurgeQueue")
        self.refused(request, "403 SignatureDoesNotMatch", "we calculated")


class MismatchTest(VerifyCase):
    """The answer shows what we computed, that the caller may compare."""

    def mismatch(self, request, client):
        """Return the refusal of a request signed with another secret."""
        known = client._replace(secret_access_key="dummysecret2")
        error = self.refused(request, "403 SignatureDoesNotMatch", clients=(known,))
        for secret in (client.secret_access_key, known.secret_access_key):
            self.assertNotIn(secret, error.message + repr(error) + repr(error.detail))
        return error

    def expected(self, request, client, service, payload):
        """Return what the signer of these tests would sign; the token not shown."""
        path, _, query = request.target.partition("?")
        query = without(f"?{query}", "X-Amz-Signature")[1:]
        given = request.header("authorization") or request.target
        names = re.search("SignedHeaders=([^,&]*)", given).group(1)
        return signature(
            client,
            request.method,
            canonical_path(path, service),
            sorted_query(query),
            request.headers,
            urllib.parse.unquote(names).split(";"),
            payload,
            EXAMPLE_TIME,
            f"20150830/us-east-1/{service}/aws4_request",
        )

    def test_the_canonical_request_and_the_string_to_sign_are_shown(self):
        headers = [("X-B", " two  words"), ("x-a", "caff\xc3\xa0"), ("X-B", "\xc3\x85")]
        target = "/a%20b/c?b=%2B&a-b=1&a=2&a="
        for service, payload in (("sqs", sha256(b"{}")), ("s3", sha256(b"{}"))):
            for client in (DEMO, SESSION):
                request = ask(service, headers=headers, target=target, client=client)
                error = self.mismatch(request, client)
                with self.subTest(service, client=client.name):
                    made = self.expected(request, client, service, payload)
                    self.check(error, made, client, service)
                    if service == "s3":
                        made = request.headers[-1][1].rpartition("=")[2]
                        self.check_s3(error, made)

    def test_those_of_a_link_too(self):
        for service, payload in (("sqs", EMPTY), ("s3", "UNSIGNED-PAYLOAD")):
            for client in (DEMO, SESSION):
                request = link(service, client=client, target="/a%20b?z=1&a=%2F")
                error = self.mismatch(request, client)
                with self.subTest(service, client=client.name):
                    made = self.expected(request, client, service, payload)
                    self.check(error, made, client, service)
                    if service == "s3":
                        self.check_s3(error, request.target.rpartition("=")[2])

    def check(self, error, made, client, service):
        text = made.canonical
        if client.session_token:
            self.assertIn("dummysession", text)
            text = re.sub("([Tt]oken[:=])dummysession", r"\1<redacted>", text)
            said = error.message + repr(error) + repr(error.detail)
            self.assertNotIn("dummysession", said)
            self.assertNotIn(b"dummysession".hex(" "), said)
        advice = (
            "Check your key and signing method."
            if service == "s3"
            else "Check your AWS Secret Access Key and signing method."
            " Consult the service documentation for details."
        )
        self.assertEqual(
            error.message.replace("should have been\n", "should have been ").strip(),
            "The request signature we calculated does not match the signature you provided."
            f" {advice}\n\n"
            f"The Canonical String for this request should have been '{text}'\n\n"
            f"The String-to-Sign should have been '{made.text}'",
        )
        self.text, self.made = text, made

    def check_s3(self, error, provided):
        detail = error.detail
        self.assertEqual(detail["AWSAccessKeyId"], "dummykey")
        self.assertEqual(detail["SignatureProvided"], provided)
        self.assertEqual(detail["StringToSign"], self.made.text)
        self.assertEqual(detail["CanonicalRequest"], self.text)
        for name in ("StringToSign", "CanonicalRequest"):
            listed = detail[f"{name}Bytes"]
            self.assertRegex(listed, "^[0-9a-f]{2}( [0-9a-f]{2})*$")
            self.assertEqual(bytes.fromhex(listed).decode("latin-1"), detail[name])

    def test_the_right_signature_is_not_told(self):
        request = ask(client=DEMO._replace(secret_access_key="dummysecret2"))
        right = ask().headers[-1][1].rpartition("=")[2]
        error = self.refused(request, "403 SignatureDoesNotMatch")
        self.assertNotIn(right, error.message + repr(error.detail))

    def test_the_answer_to_a_huge_request_is_bounded(self):
        request = ask(headers=[(f"X-A{n}", "x" * 8000) for n in range(40)])
        error = self.mismatch(request, DEMO)
        self.assertLess(len(error.message), 40000)


class OrderTest(VerifyCase):
    """Of several faults the earlier check tells; a later one could tell a stranger too much."""

    FAULTS = (
        # a fault of the request as arguments of `ask`, the code, the message
        ({"extra": [("Authorization", "Basic eA==")]}, "SignatureDoesNotMatch", "Only one auth"),
        ({"edit": ("SignedHeaders=", "SignedHeaders=;")}, "IncompleteSignature", "SignedHeaders"),
        ({"date": "20150230T000000Z"}, "IncompleteSignature", "Date must be"),
        ({"at": EXAMPLE_TIME - 901}, "SignatureDoesNotMatch", "Signature expired"),
        ({"region": "mars"}, "SignatureDoesNotMatch", "valid region"),
        ({"client": DEMO._replace(access_key_id="stranger")}, "InvalidClientTokenId",
         r"invalid\.$"),
        ({"headers": [("X-Amz-Acl", "x")], "unsigned": ["x-amz-acl"]}, "SignatureDoesNotMatch",
         "not signed"),
        ({"more": [("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")]}, "SignatureDoesNotMatch",
         "x-amz-content-sha256 must be"),
        ({"body": b"[]"}, "SignatureDoesNotMatch", "we calculated"),
    )  # fmt: skip

    def request(self, extra=(), more=(), headers=(), body=b"{}", **how):
        made = ask(headers=(*headers, *more), **how)
        return get("/", (*made.headers, *extra), "POST", body)

    def test_the_earlier_check_tells(self):
        for at, (early, code, pattern) in enumerate(self.FAULTS):
            for late, _, other in (({}, "", ""), *self.FAULTS[at + 1 :]):
                with self.subTest(pattern, later=other):
                    request = self.request(**{**late, **early})
                    self.refused(request, f"40[03] {code}", pattern, regions=("us-east-1",))
        with self.subTest("all at once"):
            everything = {}
            for fault, _, _ in reversed(self.FAULTS):
                everything.update(fault)
            for fault, code, pattern in self.FAULTS:
                request = self.request(**everything)
                self.refused(request, f"40[03] {code}", pattern, regions=("us-east-1",))
                for name in fault:
                    everything.pop(name)
            self.verify(self.request(**everything), regions=("us-east-1",))

    def test_for_s3_the_signature_comes_before_the_body(self):
        bad = (".$", lambda found: "0" if found.group() != "0" else "1")
        request = ask("s3", bad, payload_hash=EMPTY)
        self.refused(request, "403 SignatureDoesNotMatch")
        self.refused(ask("s3", payload_hash=EMPTY), "400 XAmzContentSHA256Mismatch")

    def test_a_token_comes_with_the_key_before_the_headers(self):
        request = self.request(client=SESSION, **self.FAULTS[6][0])
        self.refused(request, "403 InvalidClientTokenId", "invalid$")


class AmazonS3AnswersTest(VerifyCase):
    """Where Amazon S3 tells a fault by another code, or in other words, than other services."""

    def test_codes(self):
        query = "400 AuthorizationQueryParametersError"
        table = [
            ("credential of a link", link("s3", ("aws4_request", "aws4_request%2Fx")), query, {}),
            ("terminator of a link", link("s3", ("aws4_request", "aws5_request")), query, {}),
            ("region of a link", link("s3"), query, {"regions": ("eu-west-1",)}),
            ("algorithm of a link", link("s3", ("HMAC-SHA256", "X")), query, {}),
            ("escape of a query", get("/?%", ask("s3").headers), "400 InvalidURI", {}),
        ]
        for name, request, answer, how in table:
            with self.subTest(name):
                self.refused(request, answer, **how)

    def test_words(self):
        stranger = DEMO._replace(access_key_id="stranger")
        early, late = {"now": EXAMPLE_TIME - 901}, {"now": EXAMPLE_TIME + 901}
        other = DEMO._replace(secret_access_key="dummysecret2")
        skew = "The difference between the request time and the server's time is too large."
        malformed = "The authorization header is malformed; "
        table = [
            ("key", ask("s3", client=stranger), {},
             "The AWS Access Key Id you provided does not exist in our records."),
            ("early", ask("s3"), early, skew),
            ("late", ask("s3"), late, skew),
            ("date", ask("s3", date="x"), {},
             "AWS authentication requires a valid Date or x-amz-date header"),
            ("region", ask("s3"), {"regions": ("eu-west-1",)},
             malformed + "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
            ("terminator", ask("s3", ("aws4_request", "aws5_request")), {},
             malformed + 'incorrect terminal "aws5_request". This endpoint uses "aws4_request".'),
            ("signature", ask("s3", client=other), {},
             "The request signature we calculated does not match the signature you provided."
             " Check your key and signing method."),
        ]  # fmt: skip
        for name, request, how, words in table:
            with self.subTest(name):
                self.refused(request, ".*", re.escape(words), **how)

    def test_details(self):
        stranger = DEMO._replace(access_key_id="stranger")
        error = self.refused(ask("s3", client=stranger), "403 InvalidAccessKeyId")
        self.assertEqual(error.detail.get("AWSAccessKeyId"), "stranger")
        request, regions = ask("s3", region="us-east-1"), ("eu-west-1",)
        error = self.refused(request, "400 AuthorizationHeaderMalformed", regions=regions)
        self.assertEqual(error.detail.get("Region"), "eu-west-1")
        error = self.refused(link("s3", expires=60), "403 AccessDenied", now=EXAMPLE_TIME + 61)
        self.assertIn("ServerTime", error.detail)
        self.assertIn("Expires", error.detail)
        self.assertEqual(error.detail.get("X-Amz-Expires"), "60")


class SecrecyTest(VerifyCase):
    def test_what_is_printed_holds_no_secret(self):
        request, presigned = ask(client=SESSION), link(client=SESSION)
        made = re.compile("Signature=([0-9a-f]{64})")
        secrets = {
            "secret": "dummysecret",
            "token": "dummysession",
            "signature": made.search(request.headers[-1][1]).group(1),
            "signature of the link": made.search(presigned.target).group(1),
        }
        table = [
            ("Client", SESSION),
            ("Clients", {"dummykey": [DEMO, SESSION]}),
            ("Verified", self.verify(request, clients=(SESSION,))),
            ("Authorization", awsproxy.parse_authorization(request)),
            ("Authorization of a link", awsproxy.parse_authorization(presigned)),
            ("Request", request),
            ("Request of a link", presigned),
        ]
        for name, value in table:
            text = f"{value} {value!r}"
            for what, secret in secrets.items():
                with self.subTest(name, secret=what):
                    self.assertNotIn(secret, text)

    def test_no_refusal_holds_a_secret(self):
        known = SESSION._replace(secret_access_key="dummysecret2")
        for build in (ask, link):
            for service in ("sqs", "s3"):
                for how in (
                    {},
                    {"at": EXAMPLE_TIME + 86400},
                    {"region": "mars"},
                    {"client": known._replace(access_key_id="stranger")},
                    {"client": known._replace(session_token="wrongsession")},
                    {"edit": ("Credential=[^,&]*", "Credential=x")},
                    {"edit": ("SignedHeaders=[^,&]*", "SignedHeaders=X")},
                    {"edit": ("Signature=", "signature=")},
                    {"headers": [("X-Amz-Acl", "x"), ("X-Amz-Acl", "y")]},
                ):
                    with self.subTest(build.__name__, service=service, how=how):
                        request = build(service, **{"client": SESSION, **how})
                        with self.assertRaises(ServiceError) as caught:
                            self.verify(request, clients=(known,), regions=("us-east-1",))
                        error = caught.exception
                        text = repr(error) + str(error) + error.message + repr(error.detail)
                        self.assertNotIn("dummysecret", text)
                        self.assertNotIn("dummysession", text)
                        self.assertNotIn("wrongsession", text)


def meaning(request):
    """Reduce a request to what its receiver acts on, without the code under test."""
    path, _, query = request.target.partition("?")
    segments = []
    for segment in path.split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    pairs = []
    for part in query.split("&"):
        name, _, value = part.replace("+", " ").partition("=")
        pairs.append(
            tuple(urllib.parse.unquote_to_bytes(x.encode("latin-1")) for x in (name, value))
        )
    pairs = sorted(pair for pair in pairs if pair[0] not in (b"", b"X-Amz-Signature"))
    given = {}
    for name, value in request.headers:
        name, value = name.lower(), " ".join(re.split("[ \t]+", value)).strip(" ")
        if name.startswith("x-") or name == "host":
            given.setdefault(name, []).append(value)
    headers = {name: ",".join(values) for name, values in given.items()}
    ends = path.endswith("/") and bool(segments)
    return request.method, segments, ends, pairs, headers, request.body.getvalue()


class NonsenseTest(VerifyCase):
    PIECES = (
        *"/?&=;:,. \t%+#\"'{}[]\\\x00\x7f\x85\xa0\xe9\xff0aAZ_-~",
        "..", "//", "/./", "%2F", "%2e%2e", "%", "%zz", "%00", "%25", "%C3%A0", "&&", "==", "?a=b",
        "X-Amz-Signature=", "X-Amz-Algorithm=", "x-amz-date=", "X-Amz-Security-Token=x", "host",
        "Credential=", "SignedHeaders=", "Signature=", "AWS4-HMAC-SHA256 ", "9" * 50, "-1", "{}",
    )  # fmt: skip

    def mangled(self, chance, text):
        """Return the text with a bit inserted, removed, replaced, doubled or swapped."""
        at = chance.randrange(len(text) + 1)
        end = min(len(text), at + chance.choice((0, 0, 1, 1, 2, 5, 20)))
        piece = chance.choice((*self.PIECES, text[at:end], text[at:end].swapcase(), ""))
        return "".join(c for c in text[:at] + piece + text[end:] if ord(c) < 256)

    def test_a_mangled_request_is_refused_or_means_the_same(self):
        for seed in range(3000):
            chance = random.Random(seed)
            service = chance.choice(("sqs", "sqs", "s3"))
            headers = [("X-Amz-Meta-A", "one  two"), ("X-B", "1"), ("X-B", "caff\xc3\xa0")]
            if chance.random() < 0.5:
                client = chance.choice((DEMO, SESSION))
                good = ask(service, target="/a/b%20c?k=&l=%2F&a=1", headers=headers, client=client)
            else:
                client = DEMO
                target = "/a/b%20c?k=&l=%2F&a=1"
                good = link(service, target=target, headers=headers)
            self.verify(good, clients=(client,))
            method, target, given = good.method, good.target, list(good.headers)
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                what = chance.random()
                if what < 0.05:
                    method = self.mangled(chance, method)
                elif what < 0.45:
                    target = self.mangled(chance, target)
                elif what < 0.85:
                    at = chance.randrange(len(given))
                    name, value = given[at]
                    given[at] = (name, self.mangled(chance, value))
                elif what < 0.9:
                    given.append(chance.choice(given))
                elif what < 0.95:
                    chance.shuffle(given)
                else:
                    del given[chance.randrange(len(given))]
            request = get(target, given, method, good.body.getvalue())
            try:
                self.verify(request, clients=(client,))
            except ServiceError:
                continue
            except Exception as error:
                raise AssertionError(f"seed {seed}: {request!r}") from error
            if service == "sqs":
                self.assertEqual(meaning(request), meaning(good), f"seed {seed}")
            else:
                self.assertEqual(meaning(request)[3:], meaning(good)[3:], f"seed {seed}")
                paths = [urllib.parse.unquote(r.path, "latin-1") for r in (request, good)]
                self.assertEqual(*paths, f"seed {seed}")

    def test_what_is_long_is_refused_quickly(self):
        """Whoever has no key must not be able to keep us busy: all this is read before one."""
        many = 65536 // 11
        table = [
            ("Credential in the header", "/", "AWS4-HMAC-SHA256 " + "Credential=" * many),
            ("Credential in the query", "/?" + "Credential=" * many, None),
            ("commas", "/", "AWS4-HMAC-SHA256 " + "," * 65000),
            ("signed headers", "/", "AWS4-HMAC-SHA256 Credential=a/b/c/d/e,SignedHeaders="
             + "a;" * 32000 + ",Signature=0"),
            ("parameters", "/?" + "a&" * 32000 + "X-Amz-Signature=0", None),
            ("segments", "/.." * 20000 + "?X-Amz-Signature=0", None),
        ]  # fmt: skip
        for name, target, value in table:
            with self.subTest(name):
                headers = [("Host", HOST), ("X-Amz-Date", "20150830T123600Z")]
                headers += [("Authorization", value)] if value else []
                began = time.process_time()
                with self.assertRaises(ServiceError):
                    self.verify(get(target, headers))
                self.assertLess(time.process_time() - began, 0.5)


@unittest.skipUnless(importlib.util.find_spec("botocore"), "botocore is not installed")
class BotocoreTest(VerifyCase):
    """Requests as the AWS SDK for Python signs them, and the same with one thing changed."""

    TEXT = ("a", "Z", "0", "-", ".", "_", "~", " ", "+", "=", "&", "/", "%", "\xe9", "\u1234", ":")

    def word(self, chance, low=1):
        return "".join(chance.choice(self.TEXT) for _ in range(chance.randint(low, 8)))

    def escaped_word(self, chance, low=1):
        return escaped(self.word(chance, low).encode(), b"")

    def made(self, chance):
        """Return a request signed by botocore, its client and the time of its signature."""
        from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth, SigV4Auth, SigV4QueryAuth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        service, in_query = chance.choice(("sqs", "s3")), chance.random() < 0.5
        client = chance.choice((DEMO, SESSION))
        method = chance.choice(("GET", "POST", "PUT", "DELETE"))
        path = "/" + "/".join(self.escaped_word(chance) for _ in range(chance.randint(0, 3)))
        if service == "sqs" and chance.random() < 0.3:
            path += chance.choice(("/", "//", "/./", "/x/../", "/a/b/../c"))
        pairs = [
            f"{self.escaped_word(chance)}={self.escaped_word(chance, 0)}"
            for _ in range(chance.randint(0, 4))
        ]
        if pairs and not in_query:
            pairs.append(chance.choice(pairs))  # its query signer drops repeats
        body = b"" if in_query else self.word(chance, 0).encode()
        url = f"http://{HOST}{path}" + ("?" + "&".join(pairs) if pairs else "")
        request = AWSRequest(method, url, data=body)
        for number in range(chance.randint(0, 3)):
            for _ in range(chance.choice((1, 1, 2))):
                value = f"{self.word(chance)}  {self.word(chance)}"
                request.headers.add_header(f"X-Amz-Meta-{number}", value.strip())
        credentials = Credentials(
            client.access_key_id, client.secret_access_key, client.session_token or None
        )
        signers = {
            ("sqs", False): SigV4Auth,
            ("sqs", True): SigV4QueryAuth,
            ("s3", False): S3SigV4Auth,
            ("s3", True): S3SigV4QueryAuth,
        }
        signer = signers[service, in_query](credentials, service, "us-east-1")
        signer.add_auth(request)
        headers = [
            (name, value.encode().decode("latin-1")) for name, value in request.headers.items()
        ]
        target = request.url.partition(HOST)[2]
        stamp = re.search("X-Amz-Date=([0-9TZ]+)", target)
        stamp = stamp.group(1) if in_query else request.headers["X-Amz-Date"]
        now = calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
        return get(target, (("Host", HOST), *headers), method, body), client, now

    def changed(self, chance, request):
        """Return the request with one thing changed, and what that is."""
        method, target, headers = request.method, request.target, list(request.headers)
        body = request.body.getvalue()
        in_query = not has(headers, "authorization")
        choices = ["method", "path", "query", "header", "signature"]
        what = chance.choice(choices if in_query else [*choices, "body"])
        path, mark, query = target.partition("?")
        if what == "method":
            method = "PATCH"
        elif what == "path":
            target = chance.choice((path + "x", path + "/x", "/x" + path)) + mark + query
        elif what == "query":
            target += "&x=1" if mark else "?x"
        elif what == "header":
            signed_names = [n for n, _ in headers if n.lower() not in ("authorization",)]
            name = chance.choice(signed_names)
            at = [n for n, _ in headers].index(name)
            headers[at] = (name, headers[at][1] + "x")
        elif what == "signature":
            where = target if in_query else headers[-1][1]
            at = re.search("Signature=([0-9a-f]{64})", where).start(1) + chance.randrange(64)
            where = (
                where[:at] + f"{int(where[at], 16) ^ chance.randint(1, 15):x}" + where[at + 1 :]
            )
            if in_query:
                target = where
            else:
                headers[-1] = (headers[-1][0], where)
        else:
            body += b"x"
        return get(target, headers, method, body), what

    def test_what_botocore_signs_is_accepted_and_refused_once_changed(self):
        for seed in range(300):
            chance = random.Random(seed)
            request, client, now = self.made(chance)
            with self.subTest(seed=seed, target=request.target):
                verified = self.verify(request, now, (DEMO, SESSION))
                self.assertEqual(verified.client, client)
                self.assertEqual(verified.body, request.body.getvalue())
                spoiled, what = self.changed(chance, request)
                with self.assertRaises(ServiceError, msg=what):
                    self.verify(spoiled, now, (DEMO, SESSION))


# ==== 4. Wire protocols, and 5. SQS in memory ====


# ==== Which protocol a request is in ====


class ProtocolTest(unittest.TestCase):
    def setUp(self):
        self.sqs = Caller("query")

    def test_the_head_tells_json_from_query(self):
        target = ("X-Amz-Target", "AmazonSQS.ListQueues")

        def kind(value):
            return ("Content-Type", value)

        for asked, headers, body, expected in (
            ("POST /", (target, kind(JSON_1_0)), "{}", JSON_1_0),
            ("POST /", (target, kind(JSON_1_1)), "{}", JSON_1_1),
            ("POST /", (target, kind("application/json")), "{}", JSON_1_0),
            ("POST /", (target, kind(f"{JSON_1_0}; charset=utf-8")), "{}", JSON_1_0),
            ("POST /", (target, kind(f"{JSON_1_1} ;charset=utf-8")), "{}", JSON_1_1),
            ("POST /", (("X-AMZ-TARGET", target[1]), kind(JSON_1_1.upper())), "{}", JSON_1_1),
            ("POST /", (target,), "{}", JSON_1_0),
            ("POST /", (target, FORM), "{}", JSON_1_0),
            ("POST /?Action=GetQueueUrl", (target, kind(JSON_1_0)), "{}", JSON_1_0),
            ("POST /000000000000/jobs", (target,), "{}", JSON_1_0),
            ("POST /?Action=ListQueues", (kind(JSON_1_0),), "{}", JSON_1_0),
            ("POST /?Action=ListQueues", (kind("application/json"),), "{}", JSON_1_0),
            ("POST /", (FORM,), "Action=ListQueues", "text/xml"),
            ("POST /", (FORM,), "Action=ListQueues&Version=2012-11-05", "text/xml"),
            ("POST /", (FORM,), "Action=ListQueues&Version=2009-02-01", "text/xml"),
            ("POST /", (FORM_UTF_8,), "Action=ListQueues", "text/xml"),
            ("POST /", (kind(FORM[1].upper()),), "Action=ListQueues", "text/xml"),
            ("POST /?Action=ListQueues", (FORM,), "", "text/xml"),
            ("POST /?Action=ListQueues", (FORM,), "QueueNamePrefix=j", "text/xml"),
            ("POST /?Version=2012-11-05", (FORM,), "Action=ListQueues", "text/xml"),
            ("GET /?Action=ListQueues", (), "", "text/xml"),
            ("GET /?Action=ListQueues&Version=2012-11-05", (), "", "text/xml"),
        ):
            with self.subTest(asked, headers=headers, body=body):
                method, _, path = asked.partition(" ")
                reply = reply_to(self.sqs, method, path, headers, body.encode())
                self.assertEqual((reply.status, header(reply, "Content-Type")), (200, expected))

    def test_the_form_and_the_query_string_are_merged(self):
        self.sqs.queue("jobs")
        self.sqs.queue("other")
        reply = reply_to(self.sqs, "POST", "/?Action=ListQueues", (FORM,), b"QueueNamePrefix=j")
        self.assertEqual(xml_output("ListQueues", reply), {"QueueUrls": [url_of("jobs")]})

    def test_a_presigned_url_is_answered(self):
        for target, operation, expected in (
            ("/?Action=GetQueueUrl&QueueName=jobs", "GetQueueUrl", {"QueueUrl": url_of("jobs")}),
            ("/000000000000/jobs?Action=PurgeQueue", "PurgeQueue", None),
        ):
            with self.subTest(target):
                self.sqs.queue("jobs")
                target = presign(target=target)
                request = Request("GET", target, (("Host", HOST),), io.BytesIO())
                self.assertEqual(xml_output(operation, self.sqs.proxy.handle(request)), expected)

    def test_smithy_rpc_is_refused_in_its_own_protocol(self):
        path = "/service/AmazonSQS/operation/ListQueues"
        for protocol, kind, read in (
            ("rpc-v2-cbor", "application/cbor", read_cbor),
            ("rpc-v2-json", "application/json", json.loads),
        ):
            for target in (None, "X-Amz-Target", "X-Amzn-Target"):
                with self.subTest(protocol=protocol, target=target):
                    headers = [("Smithy-Protocol", protocol), ("Content-Type", kind)]
                    if target:
                        headers.append((target, "AmazonSQS.ListQueues"))
                    reply = reply_to(self.sqs, "POST", path, headers, b"\xa0")
                    self.assertIn(reply.status, [400] if target else range(400, 500))
                    self.assertEqual(header(reply, "Smithy-Protocol"), protocol)
                    self.assertEqual(header(reply, "Content-Type"), kind)
                    self.assertRegex(header(reply, "x-amzn-query-error"), "^[A-Za-z.]+;Sender$")
                    document = read(reply.body)
                    self.assertEqual(set(document), {"__type", "message"})
                    self.assertIn("#", document["__type"])

    def test_an_unknown_smithy_protocol_is_refused(self):
        for protocol in ("rpc-v9", "", "rpc-v2-cbor, rpc-v2-json"):
            for target in ((), (("X-Amz-Target", "AmazonSQS.ListQueues"),)):
                with self.subTest(protocol, target=target):
                    headers = (("Smithy-Protocol", protocol), *target)
                    reply = reply_to(self.sqs, "POST", "/", headers, b"{}")
                    self.assertIn(reply.status, range(400, 500))

    def test_a_target_must_name_an_operation(self):
        self.sqs.queue("jobs")
        for target in (
            "AmazonSQS.FooBar",
            "AmazonSQS.listQueues",
            "AmazonSQS.__init__",
            "AmazonSQS.answer",
            "AmazonSQS.",
            "AmazonSQS.ListQueues.",
            "AmazonSQS.\xe9",
        ):
            with self.subTest(target):
                headers = (("X-Amz-Target", target), ("Content-Type", JSON_1_0))
                reply = reply_to(self.sqs, "POST", "/", headers, b"{}")
                document = json.loads(reply.body)
                self.assertEqual(reply.status, 400)
                self.assertEqual(header(reply, "x-amzn-query-error"), "InvalidAction;Sender")
                self.assertEqual(document["__type"], FRAMEWORK + "UnknownOperationException")

    def test_a_target_of_another_service_is_refused(self):
        for target, service in (
            ("DynamoDB_20120810.ListQueues", "sqs"),
            ("DynamoDB_20120810.ListQueues", "dynamodb"),
            ("AmazonSQS.ListQueues", "dynamodb"),
            ("AmazonSQS.ListQueues", "s3"),
            ("amazonsqs.ListQueues", "sqs"),
            ("ListQueues", "sqs"),
            ("", "sqs"),
            ("com.amazonaws.AmazonSQS.ListQueues", "sqs"),
        ):
            with self.subTest(target, service=service):
                headers = [("X-Amz-Target", target), ("Content-Type", JSON_1_0)]
                if service == "s3":
                    headers.append(("X-Amz-Content-Sha256", sha256(b"{}")))
                reply = reply_to(self.sqs, "POST", "/", headers, b"{}", service=service)
                self.assertIn(reply.status, range(400, 500))
                self.assertEqual(header(reply, "Content-Type"), JSON_1_0)
                self.assertEqual(list(json.loads(reply.body)), ["__type", "message"])

    def test_two_targets_are_refused(self):
        for second in ("AmazonSQS.ListQueues", "AmazonSQS.PurgeQueue"):
            headers = (("X-Amz-Target", "AmazonSQS.ListQueues"), ("X-Amz-Target", second))
            with self.subTest(second):
                reply = reply_to(self.sqs, "POST", "/", headers, b"{}")
                self.assertIn(reply.status, range(400, 500))

    def test_a_form_with_a_target_is_read_as_json(self):
        headers = (("X-Amz-Target", "AmazonSQS.ListQueues"), FORM)
        reply = reply_to(self.sqs, "POST", "/", headers, b"Action=ListQueues")
        self.assertEqual(reply.status, 400)
        self.assertEqual(header(reply, "Content-Type"), JSON_1_0)
        kind = json.loads(reply.body)["__type"]
        self.assertEqual(kind, FRAMEWORK + "SerializationException")

    def test_a_content_type_that_is_not_signed_makes_no_json_of_a_query(self):
        url = self.sqs.queue("jobs")
        self.sqs("SendMessage", QueueUrl=url, MessageBody="hello")
        target = "/000000000000/jobs?Action=PurgeQueue"
        how = {"headers": [("Content-Type", JSON_1_0)], "unsigned": ["content-type"]}
        reply = reply_to(self.sqs, "POST", target, body=b'{"QueueUrl":"jobs"}', **how)
        self.assertIn(reply.status, range(400, 500))
        self.assertEqual(self.sqs.bodies(url), ["hello"])

    def test_a_broken_query_string_is_refused(self):
        for target in ("/?Action=ListQueues&x=%zz", "/?Action=%", "/?Action=ListQueues&%f=1"):
            with self.subTest(target):
                request = Request("GET", target, sign("GET", target), io.BytesIO())
                reply = self.sqs.proxy.handle(request)
                self.assertEqual(reply.status, 400)

    def test_what_names_no_operation_is_not_found(self):
        self.sqs.queue("jobs")
        nothing = b"<UnknownOperationException/>"
        for name, method, target, headers, body in (
            ("a queue", "GET", "/000000000000/jobs", (), b""),
            ("no queue", "GET", "/", (), b""),
            ("a query string", "GET", "/000000000000/jobs?Version=2012-11-05", (), b""),
            (
                "who wants JSON",
                "GET",
                "/000000000000/jobs",
                (("Accept", "application/json"),),
                b"",
            ),
            ("a form", "POST", "/000000000000/jobs", (FORM,), b"Version=2012-11-05"),
        ):
            with self.subTest(name):
                reply = reply_to(self.sqs, method, target, headers, body)
                self.assertEqual((reply.status, reply.body), (404, nothing))
                self.assertRegex(header(reply, "x-amzn-RequestId"), UUID)

    def test_an_unknown_action_is_not_valid_for_this_endpoint(self):
        self.sqs.queue("jobs")
        for action, path in itertools.product(
            ("FooBar", "listQueues", "__init__", "answer"), ("/", "/000000000000/jobs")
        ):
            with self.subTest(action, path=path):
                reply = reply_to(self.sqs, "GET", f"{path}?Action={action}")
                with self.assertRaises(Refused) as caught:
                    xml_output(action, reply)
                refusal = caught.exception
                got = (refusal.status, refusal.code, refusal.fault)
                self.assertEqual(got, (400, "InvalidAction", "Sender"))
                text = f"The action {action} is not valid for this endpoint."
                self.assertEqual(refusal.message, text)


class QueuePathTest(unittest.TestCase):
    """A queue's own URL as the endpoint."""

    def setUp(self):
        self.sqs = Caller("query")
        for name in ("jobs", "other"):
            self.sqs("SendMessage", QueueUrl=self.sqs.queue(name), MessageBody=name)

    def get(self, target):
        operation = urllib.parse.parse_qs(target.partition("?")[2])["Action"][0]
        return xml_output(operation, reply_to(self.sqs, "GET", target))

    def post(self, target, fields):
        operation = urllib.parse.parse_qs(fields)["Action"][0]
        reply = reply_to(self.sqs, "POST", target, (FORM,), fields.encode())
        return xml_output(operation, reply)

    def test_the_path_stands_for_the_queue(self):
        for path in (
            "/000000000000/jobs",
            "/000000000000/jobs/",
            "/queue/us-east-1/000000000000/jobs",
        ):
            with self.subTest(path):
                asked = "Action=ReceiveMessage&VisibilityTimeout=0"
                for output in (self.get(f"{path}?{asked}"), self.post(path, asked)):
                    self.assertEqual([m["Body"] for m in output["Messages"]], ["jobs"])

    def test_a_queue_url_wins_over_the_path(self):
        asked = "Action=ReceiveMessage&VisibilityTimeout=0&QueueUrl="
        for given in (url_of("other"), "other"):
            given = asked + urllib.parse.quote(given, safe="")
            for output in (
                self.get(f"/000000000000/jobs?{given}"),
                self.post("/000000000000/jobs", given),
            ):
                self.assertEqual([m["Body"] for m in output["Messages"]], ["other"])

    def test_what_belongs_to_no_queue_is_refused_there(self):
        for action in ("CreateQueue", "ListQueues"):
            for path in ("/000000000000/jobs", "/000000000000/unheard-of"):
                for call in (lambda path, asked: self.get(f"{path}?{asked}"), self.post):
                    with self.subTest(action, path=path):
                        with self.assertRaises(Refused) as caught:
                            call(path, f"Action={action}&QueueName=new")
                        self.assertEqual(caught.exception.status, 400)
                        self.assertEqual(caught.exception.code, "InvalidAction")
                        self.assertEqual(
                            caught.exception.message,
                            f"The action {action} is not valid for this endpoint.",
                        )

    def test_the_url_of_any_queue_can_be_asked_for_there(self):
        output = self.get("/000000000000/jobs?Action=GetQueueUrl&QueueName=other")
        self.assertEqual(output, {"QueueUrl": url_of("other")})

    def test_a_queue_that_is_not_there_is_missed(self):
        for path in ("/000000000000/unheard-of", "/111122223333/jobs"):
            with self.subTest(path), self.assertRaises(Refused) as caught:
                self.get(f"{path}?Action=ReceiveMessage")
            self.assertEqual(caught.exception.status, 400)
            self.assertEqual(caught.exception.code, SQS + "NonExistentQueue")

    def test_a_missing_parameter_is_named(self):
        with self.assertRaises(Refused) as caught:
            self.get("/000000000000/jobs?Action=SendMessage")
        refusal = caught.exception
        self.assertEqual((refusal.status, refusal.code), (400, MISSING))
        text = "The request must contain the parameter MessageBody."
        self.assertEqual(refusal.message, text)

    def test_json_is_answered_there(self):
        sqs = Caller("json")
        url = sqs.queue("jobs")
        path = "/000000000000/jobs"
        sqs("SendMessage", target=path, QueueUrl=url, MessageBody="hello")
        (message,) = sqs("ReceiveMessage", target=path, QueueUrl=url)["Messages"]
        self.assertEqual(message["Body"], "hello")
        self.assertEqual(sqs("ListQueues", target=path), {"QueueUrls": [url]})


# ==== What an answer looks like ====


class EnvelopeTest(Spoken):
    def test_an_output_is_in_its_envelope(self):
        self.sqs.queue("jobs")
        for name, operation, given, document, result in (
            (
                "an output",
                "GetQueueUrl",
                {"QueueName": "jobs"},
                b'{"QueueUrl":"%s"}' % url_of("jobs").encode(),
                f"<GetQueueUrlResult><QueueUrl>{url_of('jobs')}</QueueUrl></GetQueueUrlResult>",
            ),
            (
                "nothing in an output",
                "ReceiveMessage",
                {"QueueUrl": url_of("jobs")},
                b"{}",
                "<ReceiveMessageResult/>",
            ),
            ("no output", "PurgeQueue", {"QueueUrl": url_of("jobs")}, b"", ""),
        ):
            with self.subTest(name):
                self.sqs(operation, **given)
                reply = self.sqs.reply
                request_id = header(reply, "x-amzn-RequestId")
                self.assertEqual(reply.status, 200)
                self.assertRegex(request_id, UUID)
                self.assertIsNone(header(reply, "x-amzn-query-error"))
                if self.protocol == "json":
                    self.assertEqual(header(reply, "Content-Type"), JSON_1_0)
                    self.assertEqual(reply.body.replace(b": ", b":"), document)
                else:
                    self.assertEqual(header(reply, "Content-Type"), "text/xml")
                    self.assertEqual(
                        reply.body.decode(),
                        f'<?xml version="1.0"?><{operation}Response xmlns="{XMLNS}">{result}'
                        f"<ResponseMetadata><RequestId>{request_id}</RequestId>"
                        f"</ResponseMetadata></{operation}Response>",
                    )

    def test_an_error_is_in_its_envelope(self):
        for name, operation, given, status, code, shape, text in (
            (
                "modelled",
                "PurgeQueue",
                {"QueueUrl": "unheard-of"},
                400,
                SQS + "NonExistentQueue",
                MODELLED + "QueueDoesNotExist",
                "The specified queue does not exist"
                + (" for this wsdl version." if self.protocol == "query" else "."),
            ),
            (
                "of the framework",
                "CreateQueue",
                {"QueueName": "no name"},
                400,
                INVALID,
                FRAMEWORK + "InvalidParameterValueException",
                "Can only include alphanumeric characters, hyphens, or underscores."
                " 1 to 80 in length",
            ),
            (
                "not found",
                "DeleteMessage",
                {"QueueUrl": self.sqs.queue("jobs"), "ReceiptHandle": "garbage"},
                404,
                "ReceiptHandleIsInvalid",
                MODELLED + "ReceiptHandleIsInvalid",
                'The input receipt handle "garbage" is not a valid receipt handle.',
            ),
        ):
            with self.subTest(name):
                with self.assertRaises(Refused):
                    self.sqs(operation, **given)
                self.check_error(self.sqs.reply, status, code, shape, text)

    def check_error(self, reply, status, code, shape, text, side="Sender"):
        request_id = header(reply, "x-amzn-RequestId")
        self.assertEqual(reply.status, status)
        self.assertRegex(request_id, UUID)
        if self.protocol == "json":
            self.assertEqual(header(reply, "Content-Type"), JSON_1_0)
            self.assertEqual(header(reply, "x-amzn-query-error"), f"{code};{side}")
            self.assertEqual(json.loads(reply.body), {"__type": shape, "message": text})
        else:
            self.assertEqual(header(reply, "Content-Type"), "text/xml")
            self.assertIsNone(header(reply, "x-amzn-query-error"))
            text = escape(text, {'"': "&quot;"})
            self.assertEqual(
                reply.body.decode(),
                f'<?xml version="1.0"?><ErrorResponse xmlns="{XMLNS}"><Error>'
                f"<Type>{side}</Type><Code>{code}</Code><Message>{text}</Message><Detail/>"
                f"</Error><RequestId>{request_id}</RequestId></ErrorResponse>",
            )

    def test_a_fault_of_our_own_is_the_receivers(self):
        class Broken:
            def answer(self, call):
                raise LookupError("dummysecret")

        self.sqs.proxy = Proxy(awsproxy.DEMO_CLIENTS, clock=self.clock, sqs=Broken())
        with self.assertLogs("awsproxy", "ERROR"), self.assertRaises(Refused) as caught:
            self.sqs("ListQueues")
        refusal = caught.exception
        got = (refusal.status, refusal.code, refusal.fault)
        self.assertEqual(got, (500, "InternalFailure", "Receiver"))
        self.assertNotIn(b"dummysecret", self.sqs.reply.body)

    def test_each_answer_has_a_request_id_of_its_own(self):
        seen = set()
        for _ in range(3):
            self.sqs("ListQueues")
            seen.add(header(self.sqs.reply, "x-amzn-RequestId"))
        self.assertEqual(len(seen), 3)

    def test_the_query_mode_changes_nothing(self):
        for headers in ((), (("x-amzn-query-mode", "true"),)):
            with self.subTest(headers), self.assertRaises(Refused) as caught:
                self.sqs("PurgeQueue", headers, QueueUrl="unheard-of")
            self.assertEqual(caught.exception.code, SQS + "NonExistentQueue")


class CharactersTest(Spoken):
    AWKWARD = (
        ("line ends", "a\r\nb\rc\nd\te"),
        ("markup", "<a href=\"x\">'&amp;'</a> ]]> <!-- -->"),
        ("blanks", "  a  "),
        ("beyond ASCII", "h\xe9 \u20ac \U0001f600 \ud7ff \ue000 \ufffd"),
        ("what a form escapes", "a+b=c&d;e%20f?#"),
        ("what JSON escapes", '\\ \\u0041 "quoted" {}'),
    )

    def test_text_comes_back_as_it_was_sent(self):
        for name, text in self.AWKWARD:
            with self.subTest(name):
                url = self.sqs.queue(name.replace(" ", "-"))
                given = {"a": string(text), "b": {"DataType": "Binary", "BinaryValue": b"\r\0"}}
                sent = self.send(url, text, MessageAttributes=given)
                (message,) = self.sqs.receive(url, MessageAttributeNames=["All"])
                self.assertEqual(message["Body"], text)
                self.assertEqual(message["MessageAttributes"]["a"], string(text))
                self.assertEqual(message["MessageAttributes"]["b"]["BinaryValue"], "DQA=")
                digest = hashlib.md5(text.encode()).hexdigest()
                self.assertEqual((message["MD5OfBody"], sent["MD5OfMessageBody"]), (digest,) * 2)
                self.sqs("TagQueue", QueueUrl=url, Tags={text: text})
                output = self.sqs("ListQueueTags", QueueUrl=url)
                self.assertEqual(output, {"Tags": {text: text}})

    def test_xml_escapes_quotes_and_carriage_returns(self):
        url = self.sqs.queue()
        self.send(url, '"\r\n<&>')
        self.sqs.receive(url)
        if self.protocol == "query":
            self.assertIn(b"<Body>&quot;&#xD;\n&lt;&amp;&gt;</Body>", self.sqs.reply.body)
        else:
            self.assertEqual(json.loads(self.sqs.reply.body)["Messages"][0]["Body"], '"\r\n<&>')

    def test_what_xml_cannot_say_does_not_break_it(self):
        url = self.sqs.queue()
        text = "a\0b\ufffe" if self.protocol == "query" else "a\0b\ud800"
        self.sqs("TagQueue", QueueUrl=url, Tags={"tag": text})
        (tag,) = self.another(protocol="query")("ListQueueTags", QueueUrl=url)["Tags"].values()
        self.assertEqual((tag[0], tag[2]), ("a", "b"))
        given = {"QueueUrl": url, "AttributeNames": [text]}
        self.refused("InvalidAttributeName", "GetQueueAttributes", **given)

    def test_what_json_sends_the_query_protocol_receives(self):
        other = self.another(protocol="query" if self.protocol == "json" else "json")
        url = self.sqs.queue()
        for _, text in self.AWKWARD:
            self.send(url, text, MessageAttributes={"a": string(text)})
            (message,) = other.receive(url, MessageAttributeNames=["All"])
            got = message["Body"], message["MessageAttributes"]["a"]["StringValue"]
            self.assertEqual(got, (text, text))


# ==== How members are spelled ====


class Kept:
    """Equals a text of this form and keeps it; in a later input it stands for that text."""

    def __init__(self, form):
        self.form = re.compile(form)
        self.text = None

    def __eq__(self, other):
        if not isinstance(other, str) or not self.form.fullmatch(other):
            return False
        self.text = other
        return True

    __hash__ = None

    def __repr__(self):
        return f"<{self.form.pattern}>"


def resolved(given):
    """Return an input with the texts kept so far in it."""
    if isinstance(given, Kept):
        return given.text
    if isinstance(given, dict):
        return {name: resolved(value) for name, value in given.items()}
    return [resolved(value) for value in given] if isinstance(given, list) else given


JOBS, DEAD, ORDERED = url_of("jobs"), url_of("dead"), url_of("jobs.fifo")
POLICY = json.dumps(
    {"deadLetterTargetArn": arn("dead"), "maxReceiveCount": 1}, separators=(",", ":")
)
TRACE = "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"
ID, NUMBER, TEXT = Kept(UUID.pattern), Kept("[0-9]{20}"), Kept(".+")
HANDLE, TASK, TOKEN = Kept(r"\S{20,}"), Kept(r"\S{20,}"), Kept(r"\S+")
BLOB = {"DataType": "Binary", "BinaryValue": b"\1\2\3"}
BLOB_RECEIVED = {"DataType": "Binary", "BinaryValue": "AQID"}
SENT = {
    "DelaySeconds": 0,
    "MessageAttributes": {
        "color": string("blue"),
        "count": {"DataType": "Number", "StringValue": "3"},
        "blob": BLOB,
    },
    "MessageSystemAttributes": {"AWSTraceHeader": string(TRACE)},
}
ANSWERED = {
    "MessageId": ID,
    "MD5OfMessageBody": "5d41402abc4b2a76b9719d911017c592",
    "MD5OfMessageAttributes": "d838729972a4b70e2d2acd9d59ac847c",
    "MD5OfMessageSystemAttributes": "5ae4d5d7636402d80f4eb6d213245a88",
}
RECEIVED = {
    "MessageId": ID,
    "ReceiptHandle": HANDLE,
    "MD5OfBody": "5d41402abc4b2a76b9719d911017c592",
    "Body": "hello",
}
NO_SUCH_HANDLE = {
    "Id": "b",
    "SenderFault": True,
    "Code": "ReceiptHandleIsInvalid",
    "Message": 'The input receipt handle "garbage" is not a valid receipt handle.',
}
STORY = (  # operation, input, output
    ("CreateQueue", {"QueueName": "dead"}, {"QueueUrl": DEAD}),
    (
        "CreateQueue",
        {
            "QueueName": "jobs",
            "Attributes": {"DelaySeconds": "0", "VisibilityTimeout": "40"},
            "tags": {"team": "blue", "empty": ""},
        },
        {"QueueUrl": JOBS},
    ),
    ("GetQueueUrl", {"QueueName": "jobs", "QueueOwnerAWSAccountId": ACCOUNT}, {"QueueUrl": JOBS}),
    (
        "ListQueues",
        {"QueueNamePrefix": "", "MaxResults": 1},
        {"QueueUrls": [DEAD], "NextToken": TOKEN},
    ),
    ("ListQueues", {"MaxResults": 1, "NextToken": TOKEN}, {"QueueUrls": [JOBS]}),
    ("ListQueues", {"QueueNamePrefix": "x"}, {}),
    ("ListQueueTags", {"QueueUrl": JOBS}, {"Tags": {"team": "blue", "empty": ""}}),
    ("TagQueue", {"QueueUrl": JOBS, "Tags": {"team": "red", "Team": "green"}}, None),
    ("UntagQueue", {"QueueUrl": JOBS, "TagKeys": ["empty", "team", "unheard-of"]}, None),
    ("ListQueueTags", {"QueueUrl": JOBS}, {"Tags": {"Team": "green"}}),
    ("ListQueueTags", {"QueueUrl": DEAD}, {}),
    ("ListDeadLetterSourceQueues", {"QueueUrl": DEAD}, {}),
    ("SetQueueAttributes", {"QueueUrl": JOBS, "Attributes": {"RedrivePolicy": POLICY}}, None),
    (
        "CreateQueue",
        {"QueueName": "a", "Attributes": {"RedrivePolicy": POLICY}},
        {"QueueUrl": TEXT},
    ),
    (
        "ListDeadLetterSourceQueues",
        {"QueueUrl": DEAD, "MaxResults": 1},
        {"queueUrls": [url_of("a")], "NextToken": TOKEN},
    ),
    (
        "ListDeadLetterSourceQueues",
        {"QueueUrl": DEAD, "MaxResults": 1, "NextToken": TOKEN},
        {"queueUrls": [JOBS]},
    ),
    (
        "GetQueueAttributes",
        {"QueueUrl": JOBS, "AttributeNames": ["RedrivePolicy", "VisibilityTimeout", "Policy"]},
        {"Attributes": {"RedrivePolicy": POLICY, "VisibilityTimeout": "40"}},
    ),
    ("GetQueueAttributes", {"QueueUrl": JOBS}, {}),
    ("GetQueueAttributes", {"QueueUrl": JOBS, "AttributeNames": ["Policy"]}, {}),
    (
        "AddPermission",
        {
            "QueueUrl": DEAD,
            "Label": "l",
            "AWSAccountIds": [ACCOUNT, OTHER_ACCOUNT],
            "Actions": ["SendMessage", "ReceiveMessage"],
        },
        None,
    ),
    (
        "GetQueueAttributes",
        {"QueueUrl": DEAD, "AttributeNames": ["Policy"]},
        {"Attributes": {"Policy": TEXT}},
    ),
    ("RemovePermission", {"QueueUrl": DEAD, "Label": "l"}, None),
    (
        "SendMessage",
        {"QueueUrl": JOBS, "MessageBody": "hello", "MessageGroupId": "g", **SENT},
        ANSWERED,
    ),
    (
        "ReceiveMessage",
        {
            "QueueUrl": JOBS,
            "MessageSystemAttributeNames": ["AWSTraceHeader", "MessageGroupId"],
            "MessageAttributeNames": ["color", "blob"],
            "MaxNumberOfMessages": 10,
            "VisibilityTimeout": 5,
            "WaitTimeSeconds": 20,
            "ReceiveRequestAttemptId": "attempt",
        },
        {
            "Messages": [
                {
                    **RECEIVED,
                    "Attributes": {"AWSTraceHeader": TRACE, "MessageGroupId": "g"},
                    "MD5OfMessageAttributes": TEXT,
                    "MessageAttributes": {"color": string("blue"), "blob": BLOB_RECEIVED},
                }
            ]
        },
    ),
    (
        "ChangeMessageVisibility",
        {"QueueUrl": JOBS, "ReceiptHandle": HANDLE, "VisibilityTimeout": 9},
        None,
    ),
    (
        "ChangeMessageVisibilityBatch",
        {
            "QueueUrl": JOBS,
            "Entries": [
                {"Id": "a", "ReceiptHandle": HANDLE, "VisibilityTimeout": 0},
                {"Id": "b", "ReceiptHandle": "garbage", "VisibilityTimeout": 0},
            ],
        },
        {"Successful": [{"Id": "a"}], "Failed": [NO_SUCH_HANDLE]},
    ),
    ("ReceiveMessage", {"QueueUrl": JOBS}, {}),  # it went to the dead-letter queue
    ("SendMessage", {"QueueUrl": DEAD, "MessageBody": "hello", **SENT}, ANSWERED),
    ("SendMessage", {"QueueUrl": DEAD, "MessageBody": "hello", **SENT}, ANSWERED),
    (
        "StartMessageMoveTask",
        {
            "SourceArn": arn("dead"),
            "DestinationArn": arn("jobs"),
            "MaxNumberOfMessagesPerSecond": 1,
        },
        {"TaskHandle": TASK},
    ),
    (
        "ListMessageMoveTasks",
        {"SourceArn": arn("dead"), "MaxResults": 10},
        {
            "Results": [
                {
                    "TaskHandle": TASK,
                    "Status": "RUNNING",
                    "SourceArn": arn("dead"),
                    "DestinationArn": arn("jobs"),
                    "MaxNumberOfMessagesPerSecond": 1,
                    "ApproximateNumberOfMessagesMoved": mock.ANY,
                    "ApproximateNumberOfMessagesToMove": 3,
                    "StartedTimestamp": EXAMPLE_TIME * 1000,
                }
            ]
        },
    ),
    (
        "CancelMessageMoveTask",
        {"TaskHandle": TASK},
        {"ApproximateNumberOfMessagesMoved": mock.ANY},
    ),
    (
        "SendMessageBatch",
        {
            "QueueUrl": JOBS,
            "Entries": [
                {"Id": "a", "MessageBody": "hello", "MessageGroupId": "g", **SENT},
                {"Id": "b", "MessageBody": "\1"},
            ],
        },
        {
            "Successful": [{"Id": "a", **ANSWERED}],
            "Failed": [
                {"Id": "b", "SenderFault": True, "Code": "InvalidMessageContents", "Message": TEXT}
            ],
        },
    ),
    (
        "ReceiveMessage",
        {
            "QueueUrl": JOBS,
            "AttributeNames": ["SequenceNumber", "SentTimestamp"],
            "MessageAttributeNames": ["unheard-of"],
        },
        {"Messages": [{**RECEIVED, "Attributes": {"SentTimestamp": f"{EXAMPLE_TIME}000"}}]},
    ),
    (
        "DeleteMessageBatch",
        {
            "QueueUrl": JOBS,
            "Entries": [
                {"Id": "a", "ReceiptHandle": HANDLE},
                {"Id": "b", "ReceiptHandle": "garbage"},
            ],
        },
        {"Successful": [{"Id": "a"}], "Failed": [NO_SUCH_HANDLE]},
    ),
    ("DeleteMessage", {"QueueUrl": JOBS, "ReceiptHandle": HANDLE}, None),
    ("PurgeQueue", {"QueueUrl": JOBS}, None),
    ("DeleteQueue", {"QueueUrl": JOBS}, None),
    (
        "CreateQueue",
        {"QueueName": "jobs.fifo", "Attributes": {"FifoQueue": "true"}},
        {"QueueUrl": ORDERED},
    ),
    (
        "SendMessage",
        {
            "QueueUrl": ORDERED,
            "MessageBody": "hello",
            "MessageGroupId": "g",
            "MessageDeduplicationId": "d",
        },
        {
            "MessageId": ID,
            "MD5OfMessageBody": ANSWERED["MD5OfMessageBody"],
            "SequenceNumber": NUMBER,
        },
    ),
    (
        "SendMessageBatch",
        {
            "QueueUrl": ORDERED,
            "Entries": [
                {
                    "Id": "a",
                    "MessageBody": "hello",
                    "MessageGroupId": "g",
                    "MessageDeduplicationId": "e",
                }
            ],
        },
        {
            "Successful": [
                {
                    "Id": "a",
                    "MessageId": ID,
                    "MD5OfMessageBody": ANSWERED["MD5OfMessageBody"],
                    "SequenceNumber": NUMBER,
                }
            ]
        },
    ),
)


class SpellingTest(Spoken):
    def test_every_member_of_every_operation_is_spelled_as_its_protocol_does(self):
        for operation, given, expected in STORY:
            with self.subTest(operation):
                self.assertEqual(expected, self.sqs(operation, **resolved(given)))

    def test_all_operations_are_in_the_story(self):
        self.assertEqual({operation for operation, _, _ in STORY}, set(awsproxy.OPERATIONS))
        self.assertEqual(len(awsproxy.OPERATIONS), 23)

    def test_unknown_members_are_ignored(self):
        for operation, given, expected in STORY:
            given = {**resolved(given), "Unheard": "of", "Nested": {"a": [{"b": "c"}]}}
            if self.protocol == "query":
                given["Nested"] = [{"a": "b"}]
            with self.subTest(operation):
                self.assertEqual(expected, self.sqs(operation, **given))


class FormTest(unittest.TestCase):
    """What a form may look like beyond what today's clients send."""

    def setUp(self):
        self.sqs = Caller("query")
        self.url = self.sqs.queue("jobs", VisibilityTimeout="40")

    def post(self, operation, fields):
        """Send fields as they are, and the QueueUrl."""
        text = f"Action={operation}&QueueUrl={self.url}&{fields}"
        reply = reply_to(self.sqs, "POST", "/", (FORM,), text.encode())
        return xml_output(operation, reply)

    def test_attribute_names_are_a_list_however_spelled(self):
        two = {"Attributes": {"VisibilityTimeout": "40", "DelaySeconds": "0"}}
        for name, fields, expected in (
            ("numbered", "AttributeName.1=VisibilityTimeout&AttributeName.2=DelaySeconds", two),
            ("gaps", "AttributeName.7=VisibilityTimeout&AttributeName.30=DelaySeconds", two),
            ("backwards", "AttributeName.2=VisibilityTimeout&AttributeName.1=DelaySeconds", two),
            ("from zero", "AttributeName.0=VisibilityTimeout&AttributeName.1=DelaySeconds", two),
            (
                "no number",
                "AttributeName=VisibilityTimeout",
                {"Attributes": {"VisibilityTimeout": "40"}},
            ),
            ("empty", "AttributeNames=", {}),
            ("none", "", {}),
        ):
            with self.subTest(name):
                self.assertEqual(self.post("GetQueueAttributes", fields), expected)
        shown = self.post("GetQueueAttributes", "AttributeName=All")["Attributes"]
        self.assertEqual(len(shown), 12)

    def test_elements_are_in_the_order_of_their_numbers(self):
        entry = "SendMessageBatchRequestEntry"
        fields = "&".join(
            f"{entry}.{number}.Id=n{number}&{entry}.{number}.MessageBody=n{number}"
            for number in (10, 2, 33, 1)
        )
        output = self.post("SendMessageBatch", fields)
        ids = [result["Id"] for result in output["Successful"]]
        self.assertEqual(ids, ["n1", "n2", "n10", "n33"])

    def test_an_empty_batch_is_an_empty_batch(self):
        for operation in (
            "SendMessageBatch",
            "DeleteMessageBatch",
            "ChangeMessageVisibilityBatch",
        ):
            with self.subTest(operation), self.assertRaises(Refused) as caught:
                self.post(operation, "Entries=")
            self.assertEqual(caught.exception.status, 400)
            self.assertEqual(caught.exception.code, SQS + "EmptyBatchRequest")

    def test_tags_are_a_map_in_either_number(self):
        for member in ("Tag", "Tags"):
            with self.subTest(member):
                fields = f"{member}.1.Key={member}&{member}.1.Value=a+b%2Bc"
                self.post("TagQueue", fields)
                tags = self.post("ListQueueTags", "")["Tags"]
                self.assertEqual(tags[member], "a b+c")

    def test_a_queue_is_made_with_tags_in_either_number(self):
        for member in ("Tag", "Tags"):
            with self.subTest(member):
                self.url = url_of(f"of-{member}")
                fields = f"QueueName=of-{member}&{member}.1.Key=a&{member}.1.Value=b"
                self.post("CreateQueue", fields)
                self.assertEqual(self.post("ListQueueTags", ""), {"Tags": {"a": "b"}})

    def test_system_attribute_names_are_taken_in_both_spellings(self):
        for fields, expected in (
            ("AttributeName.1=ApproximateReceiveCount", {"ApproximateReceiveCount"}),
            ("MessageSystemAttributeName.1=ApproximateReceiveCount", {"ApproximateReceiveCount"}),
            ("AttributeName=SenderId", {"SenderId"}),
            ("MessageSystemAttributeName=SenderId", {"SenderId"}),
            (
                "MessageSystemAttributeName.1=SenderId&AttributeName.1=SentTimestamp",
                {"SenderId", "SentTimestamp"},
            ),
        ):
            with self.subTest(fields):
                self.post("SendMessage", "MessageBody=hello")
                (message,) = self.post("ReceiveMessage", fields)["Messages"]
                self.assertEqual(set(message["Attributes"]), expected)

    def test_a_message_is_as_its_fields_say(self):
        self.post(
            "SendMessage",
            "MessageBody=a%0D%0Ab+c%2Bd%26%C3%A9"
            "&MessageAttribute.2.Name=x&MessageAttribute.2.Value.DataType=String.of"
            "&MessageAttribute.2.Value.StringValue=%3Cb%3E"
            "&MessageAttribute.5.Name=y&MessageAttribute.5.Value.BinaryValue=%2B%2F8%3D"
            "&MessageAttribute.5.Value.DataType=Binary",
        )
        (message,) = self.post("ReceiveMessage", "MessageAttributeName.1=All")["Messages"]
        self.assertEqual(message["Body"], "a\r\nb c+d&\xe9")
        self.assertEqual(
            message["MessageAttributes"],
            {
                "x": {"DataType": "String.of", "StringValue": "<b>"},
                "y": {"DataType": "Binary", "BinaryValue": "+/8="},
            },
        )


class LegacyJsonTest(unittest.TestCase):
    """A query that asks for JSON is answered in a JSON older than the JSON protocol's."""

    def setUp(self):
        self.sqs = Caller("query")
        self.url = self.sqs.queue("jobs", VisibilityTimeout="0")

    def replies(self, fields):
        """Return the replies to a query that asks by its Accept header, or by ContentType.

        With each come its document and its request id.
        """
        accept = ("Accept", "application/json")
        replies = []
        for target, headers, body in (
            (f"/?{fields}", (accept,), ""),
            ("/", (accept, FORM), fields),
            (f"/?{fields}&ContentType=JSON", (), ""),
            ("/?ContentType=JSON", (FORM,), fields),
        ):
            reply = reply_to(self.sqs, "POST" if body else "GET", target, headers, body.encode())
            self.assertEqual(header(reply, "Content-Type"), "application/json")
            replies.append((reply, json.loads(reply.body), header(reply, "x-amzn-RequestId")))
        return replies

    def test_an_output_is_wrapped_as_in_xml(self):
        at = "QueueUrl=jobs"
        for operation, fields, result in (
            ("GetQueueUrl", "QueueName=jobs", {"QueueUrl": self.url}),
            ("ListQueues", "", {"queueUrls": [self.url], "NextToken": None}),
            ("ListQueues", "QueueNamePrefix=x", {"queueUrls": None, "NextToken": None}),
            (
                "GetQueueAttributes",
                f"{at}&AttributeName.1=DelaySeconds",
                {"Attributes": [{"Name": "DelaySeconds", "Value": "0"}]},
            ),
            ("GetQueueAttributes", at, {"Attributes": None}),
            ("ReceiveMessage", at, {"messages": None}),
        ):
            for reply, document, request_id in self.replies(f"Action={operation}&{fields}"):
                self.assertEqual(reply.status, 200)
                response = document.pop(f"{operation}Response")
                self.assertEqual(document, {})
                self.assertEqual(response["ResponseMetadata"], {"RequestId": request_id})
                got = response[f"{operation}Result"]
                self.assertEqual({name: got[name] for name in result}, result)

    def test_messages_are_under_their_old_name(self):
        self.sqs(
            "SendMessage",
            QueueUrl=self.url,
            MessageBody='"\r\n',
            MessageAttributes={"a": string("b")},
        )
        for reply, document, _ in self.replies(
            "Action=ReceiveMessage&QueueUrl=jobs&AttributeName=SenderId"
        ):
            self.assertEqual(reply.status, 200)
            (message,) = document["ReceiveMessageResponse"]["ReceiveMessageResult"]["messages"]
            self.assertEqual(message["Body"], '"\r\n')

    def test_a_void_operation_has_no_result(self):
        for _, document, request_id in self.replies("Action=PurgeQueue&QueueUrl=jobs"):
            response = {"ResponseMetadata": {"RequestId": request_id}}
            self.assertEqual(document, {"PurgeQueueResponse": response})

    def test_an_error_is_as_in_xml(self):
        for fields, status, code, text in (
            (
                "Action=FooBar",
                400,
                "InvalidAction",
                "The action FooBar is not valid for this endpoint.",
            ),
            (
                "Action=SendMessage&QueueUrl=jobs",
                400,
                MISSING,
                "The request must contain the parameter MessageBody.",
            ),
            (
                "Action=DeleteMessage&QueueUrl=jobs&ReceiptHandle=x",
                404,
                "ReceiptHandleIsInvalid",
                'The input receipt handle "x" is not a valid receipt handle.',
            ),
        ):
            for reply, document, request_id in self.replies(fields):
                self.assertEqual(reply.status, status)
                error = {"Code": code, "Message": text, "Type": "Sender"}
                self.assertEqual(document, {"Error": error, "RequestId": request_id})


# ==== Errors ====


class ErrorTest(Spoken):
    SPELLED = MappingProxyType(  # query code and status, by shape
        {
            "QueueDoesNotExist": (SQS + "NonExistentQueue", 400),
            "QueueNameExists": ("QueueAlreadyExists", 400),
            "QueueDeletedRecently": (SQS + "QueueDeletedRecently", 400),
            "PurgeQueueInProgress": (SQS + "PurgeQueueInProgress", 403),
            "ReceiptHandleIsInvalid": ("ReceiptHandleIsInvalid", 404),
            "InvalidAttributeName": ("InvalidAttributeName", 400),
            "InvalidAttributeValue": ("InvalidAttributeValue", 400),
            "InvalidMessageContents": ("InvalidMessageContents", 400),
            "BatchEntryIdsNotDistinct": (SQS + "BatchEntryIdsNotDistinct", 400),
            "BatchRequestTooLong": (SQS + "BatchRequestTooLong", 400),
            "EmptyBatchRequest": (SQS + "EmptyBatchRequest", 400),
            "InvalidBatchEntryId": (SQS + "InvalidBatchEntryId", 400),
            "TooManyEntriesInBatchRequest": (SQS + "TooManyEntriesInBatchRequest", 400),
            "UnsupportedOperation": (SQS + "UnsupportedOperation", 400),
            "OverLimit": ("OverLimit", 403),
            "ResourceNotFoundException": ("ResourceNotFoundException", 404),
        }
    )

    def start(self):
        super().start(cooldown=True)

    def test_each_error_has_its_status_and_spellings(self):
        url, other = self.sqs.queue("jobs"), self.sqs.queue("other")
        self.sqs("DeleteQueue", QueueUrl=other)
        self.sqs("PurgeQueue", QueueUrl=url)
        a, at = {"Id": "a", "MessageBody": "hello"}, {"QueueUrl": url}
        long = {"Id": "b", "MessageBody": "x" * MEBIBYTE}
        listed = {"MessageAttributes": {"a": {**string("x"), "StringListValues": ["b"]}}}
        eight = {"AWSAccountIds": [ACCOUNT], "Actions": ["SendMessage"] * 8}
        changed = {"QueueName": "jobs", "Attributes": {"DelaySeconds": "9"}}
        delay = {"DelaySeconds": "901"}
        for shape, operation, given in (
            ("QueueDoesNotExist", "PurgeQueue", {"QueueUrl": "unheard-of"}),
            ("QueueNameExists", "CreateQueue", changed),
            ("QueueDeletedRecently", "CreateQueue", {"QueueName": "other"}),
            ("PurgeQueueInProgress", "PurgeQueue", at),
            ("ReceiptHandleIsInvalid", "DeleteMessage", {**at, "ReceiptHandle": "x"}),
            ("InvalidAttributeName", "GetQueueAttributes", {**at, "AttributeNames": ["x"]}),
            ("InvalidAttributeValue", "SetQueueAttributes", {**at, "Attributes": delay}),
            ("InvalidMessageContents", "SendMessage", {**at, "MessageBody": "\0"}),
            ("BatchEntryIdsNotDistinct", "SendMessageBatch", {**at, "Entries": [a, a]}),
            ("BatchRequestTooLong", "SendMessageBatch", {**at, "Entries": [a, long]}),
            ("EmptyBatchRequest", "SendMessageBatch", {**at, "Entries": []}),
            ("InvalidBatchEntryId", "SendMessageBatch", {**at, "Entries": [{**a, "Id": "b c"}]}),
            (
                "TooManyEntriesInBatchRequest",
                "SendMessageBatch",
                {**at, "Entries": [{**a, "Id": str(number)} for number in range(11)]},
            ),
            ("UnsupportedOperation", "SendMessage", {**at, **a, **listed}),
            ("OverLimit", "AddPermission", {**at, "Label": "l", **eight}),
            (
                "ResourceNotFoundException",
                "StartMessageMoveTask",
                {"SourceArn": arn("unheard-of")},
            ),
        ):
            with self.subTest(shape):
                code, status = self.SPELLED[shape]
                shape = MODELLED + shape
                self.refused(code, operation, status=status, shape=shape, **given)

    def test_each_fault_of_the_framework_has_its_status_and_spellings(self):
        at = {"QueueUrl": self.sqs.queue("jobs")}
        bad, missing = "InvalidParameterValueException", "MissingRequiredParameterException"
        long = {**at, "MessageBody": "x" * (MEBIBYTE + 1)}
        for code, shape, operation, given in (
            (INVALID, bad, "ReceiveMessage", {**at, "MaxNumberOfMessages": 11}),
            (INVALID, bad, "CreateQueue", {"QueueName": "a b"}),
            (INVALID, bad, "GetQueueUrl", {}),
            (INVALID, bad, "SendMessage", long),
            (MISSING, missing, "SendMessage", at),
            ("InvalidAction", "UnknownOperationException", "FooBar", {}),
        ):
            with self.subTest(operation, code=code):
                self.refused(code, operation, shape=FRAMEWORK + shape, **given)

    def test_what_is_required_is_missed_by_name(self):
        url = self.sqs.queue("jobs")
        handle = {"QueueUrl": url, "ReceiptHandle": "x"}
        for operation, given, missing in (
            ("SendMessage", {}, "MessageBody"),
            ("SendMessage", {"MessageBody": ""}, "MessageBody"),
            ("DeleteMessage", {}, "ReceiptHandle"),
            ("ChangeMessageVisibility", {"VisibilityTimeout": 1}, "ReceiptHandle"),
            ("ChangeMessageVisibility", handle, "VisibilityTimeout"),
            ("SetQueueAttributes", {}, None),
            ("TagQueue", {}, None),
            ("UntagQueue", {}, None),
            ("AddPermission", {"AWSAccountIds": ["1"], "Actions": ["SendMessage"]}, None),
            ("RemovePermission", {}, None),
        ):
            with self.subTest(operation, missing=missing):
                text = missing and f"The request must contain the parameter {missing}."
                shape = FRAMEWORK + "MissingRequiredParameterException"
                self.refused(MISSING, operation, text, shape=shape, **{"QueueUrl": url, **given})

    def test_a_missing_queue_does_not_exist(self):
        text = "The specified queue does not exist."
        if self.protocol == "query":
            text = "The specified queue does not exist for this wsdl version."
        entry = {"Id": "a", "ReceiptHandle": "x"}
        for operation, given in (
            ("AddPermission", {"Label": "l", "AWSAccountIds": [ACCOUNT], "Actions": ["*"]}),
            ("ChangeMessageVisibility", {"ReceiptHandle": "x", "VisibilityTimeout": 0}),
            ("ChangeMessageVisibilityBatch", {"Entries": [{**entry, "VisibilityTimeout": 0}]}),
            ("DeleteMessage", {"ReceiptHandle": "x"}),
            ("DeleteMessageBatch", {"Entries": [entry]}),
            ("DeleteQueue", {}),
            ("GetQueueAttributes", {}),
            ("ListDeadLetterSourceQueues", {}),
            ("ListQueueTags", {}),
            ("PurgeQueue", {}),
            ("ReceiveMessage", {}),
            ("RemovePermission", {"Label": "l"}),
            ("SendMessage", {"MessageBody": "x"}),
            ("SendMessageBatch", {"Entries": [{"Id": "a", "MessageBody": "x"}]}),
            ("SetQueueAttributes", {"Attributes": {"DelaySeconds": "1"}}),
            ("TagQueue", {"Tags": {"a": "b"}}),
            ("UntagQueue", {"TagKeys": ["a"]}),
        ):
            for url in ({}, {"QueueUrl": ""}, {"QueueUrl": url_of("unheard-of")}):
                with self.subTest(operation, **url):
                    shape = MODELLED + "QueueDoesNotExist"
                    code = SQS + "NonExistentQueue"
                    self.refused(code, operation, text, shape=shape, **url, **given)
        code = SQS + "NonExistentQueue"
        self.refused(code, "GetQueueUrl", text, QueueName="unheard-of")


class UnsignedTest(Spoken):
    """Who may not call is told so in the protocol of the call."""

    def test_a_caller_who_is_not_known_is_refused(self):
        body, headers = b"{}", [("X-Amz-Target", "AmazonSQS.ListQueues")]
        if self.protocol == "query":
            body, headers = b"Action=ListQueues", [FORM]
        nobody = Client("nobody", "AKIDNOBODY", "dummysecret")
        wrong = DEMO._replace(secret_access_key="wrong")
        other = DEMO._replace(session_token="wrong")
        incomplete = [("Authorization", "AWS4-HMAC-SHA256 Credential=dummykey/x"), *headers]
        unsigned = [("Host", HOST), ("X-Amz-Date", amz_date(EXAMPLE_TIME))]
        how = {"headers": headers, "body": body}
        no_token = ("InvalidClientTokenId", "UnrecognizedClientException")
        no_match = ("SignatureDoesNotMatch", "InvalidSignatureException")
        for name, sent, status, code, shape in (
            ("no credentials", unsigned + headers, 403, "AccessDenied", "AccessDeniedException"),
            ("an unknown key", sign(**how, client=nobody), 403, *no_token),
            ("a wrong token", sign(**how, client=other), 403, *no_token),
            ("a wrong secret", sign(**how, client=wrong), 403, *no_match),
            ("another body", sign(headers=headers, body=body + b" "), 403, *no_match),
            ("too old", sign(**how, at=EXAMPLE_TIME - 901), 403, *no_match),
            ("too new", sign(**how, at=EXAMPLE_TIME + 901), 403, *no_match),
            (
                "incomplete",
                unsigned + incomplete,
                400,
                "IncompleteSignature",
                "IncompleteSignatureException",
            ),
        ):
            with self.subTest(name):
                request = Request("POST", "/", tuple(sent), io.BytesIO(body))
                reply = self.sqs.proxy.handle(request)
                output = json_output if self.protocol == "json" else self.xml
                with self.assertRaises(Refused) as caught:
                    output(reply)
                refusal = caught.exception
                got = (refusal.status, refusal.code, refusal.fault)
                self.assertEqual(got, (status, code, "Sender"))
                if self.protocol == "json":
                    self.assertEqual(refusal.shape, FRAMEWORK + shape)

    def xml(self, reply):
        return xml_output("ListQueues", reply)


# ==== Bad input ====


class BadInputTest(unittest.TestCase):
    """What cannot be decoded is refused, and nothing is changed by it."""

    MALFORMED = (400, "MalformedInput", FRAMEWORK + "SerializationException")

    def setUp(self):
        self.sqs = Caller("json")
        self.url = self.sqs.queue("jobs")
        self.query = Caller("query")
        self.query.queue("jobs")

    def state(self, sqs):
        """Return what can be seen of the queues."""
        queues = sqs("ListQueues")["QueueUrls"]
        given = {"QueueUrl": self.url, "AttributeNames": ["All"]}
        return queues, sqs("GetQueueAttributes", **given), sqs("ListQueueTags", QueueUrl=self.url)

    def check_malformed_json(self, operation, body):
        before = self.state(self.sqs)
        headers = (("X-Amz-Target", f"AmazonSQS.{operation}"), ("Content-Type", JSON_1_0))
        with self.assertRaises(Refused) as caught:
            self.sqs.send(operation, "POST", "/", headers, body)
        refusal = caught.exception
        got = (refusal.status, refusal.code, refusal.shape)
        self.assertEqual(got, self.MALFORMED, refusal)
        self.assertEqual(header(self.sqs.reply, "Content-Type"), JSON_1_0)
        self.assertEqual(self.state(self.sqs), before)

    def check_malformed_form(self, fields):
        before = self.state(self.query)
        with self.assertRaises(Refused) as caught:
            self.query.send("", "POST", "/", (FORM,), fields)
        refusal = caught.exception
        self.assertEqual((refusal.status, refusal.code), self.MALFORMED[:2], refusal)
        self.assertEqual(header(self.query.reply, "Content-Type"), "text/xml")
        self.assertEqual(self.state(self.query), before)

    def test_a_body_that_is_no_json_object_is_malformed(self):
        deep = 100_000
        for body in (
            b"[]",
            b"null",
            b"nul",
            b"NaN",
            b"1",
            b'"text"',
            b"true",
            b"{",
            b'{"MessageBody":"hello"',
            b'{"MessageBody":"hel',
            b'{"MessageBody":NaN}',
            b'{"MessageBody":Infinity}',
            b'{"Unheard":-Infinity}',
            b'{"MessageBody":"hello",}',
            b"{'MessageBody':'hello'}",
            b'{"MessageBody":"hello"} {}',
            b'{"MessageBody":"hel\nlo"}',
            b'{"MessageBody":"\xff"}',
            b'{"MessageBody":"\xed\xa0\x80"}',
            b'{"MessageBody":"\\x"}',
            b"\xef\xbb\xbf{}",
            b"\xff\xfe{\0}\0",
            b" ",
            b"[" * deep,
            b'{"a":' * deep,
            b"[" * deep + b"]" * deep,
            b'{"Unheard":' + b"[" * deep + b"]" * deep + b"}",
            b'{"Unheard":' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
            b'{"DelaySeconds":' + b"1" * 100_000 + b"}",
            b"MessageBody=hello",
            b"<MessageBody/>",
        ):
            with self.subTest(body[:30], length=len(body)):
                given = (
                    body.replace(b"{", b'{"QueueUrl":"jobs",', 1) if b":" in body[:20] else body
                )
                self.check_malformed_json("SendMessage", given)

    def test_no_body_is_an_empty_object(self):
        headers = (("X-Amz-Target", "AmazonSQS.ListQueues"), ("Content-Type", JSON_1_0))
        output = self.sqs.send("ListQueues", "POST", "/", headers, b"")
        self.assertEqual(output, {"QueueUrls": [self.url]})

    def test_a_null_is_a_member_left_out(self):
        self.sqs("CreateQueue", QueueName="new", Attributes=None, tags=None)
        url = self.url
        self.sqs("SendMessage", QueueUrl=url, MessageBody="a", DelaySeconds=None)
        asked = {"AttributeNames": None, "MaxNumberOfMessages": None}
        self.assertEqual(self.sqs.bodies(url, **asked), ["a"])
        with self.assertRaises(Refused) as caught:
            self.sqs("SendMessage", QueueUrl=url, MessageBody=None)
        self.assertEqual(caught.exception.code, MISSING)

    def test_a_value_of_the_wrong_type_is_malformed(self):
        a, b = {"Id": "a", "MessageBody": "b"}, {"QueueUrl": "jobs", "MessageBody": "b"}
        binary = {"DataType": "Binary"}
        for operation, given in (
            *(
                ("SendMessage", {"QueueUrl": "jobs", "MessageBody": value})
                for value in (1, 1.5, True, [], {}, ["b"], {"b": "b"})
            ),
            *(
                ("SendMessage", {**b, "DelaySeconds": value})
                for value in ("x", "", True, [], {}, [1])
            ),
            *(("SendMessage", {**b, "MessageAttributes": value}) for value in ("x", 1, [], True)),
            *(("SendMessage", {**b, "MessageAttributes": {"a": v}}) for v in ("x", 1, [], True)),
            *(
                ("SendMessage", {**b, "MessageAttributes": {"a": {**binary, "BinaryValue": v}}})
                for v in (1, [], {}, "=", "a", "AQI", "AQI=\n", "AQ I", "AQ==AQ==", "\u00e9A==")
            ),
            (
                "SendMessage",
                {**b, "MessageAttributes": {"a": {"DataType": "Number", "StringValue": 1}}},
            ),
            (
                "SendMessage",
                {**b, "MessageAttributes": {"a": {"DataType": "String", "StringListValues": "b"}}},
            ),
            ("SendMessage", {**b, "MessageSystemAttributes": []}),
            ("SendMessage", {**b, "MessageGroupId": 1}),
            ("SendMessage", {"QueueUrl": 1, "MessageBody": "b"}),
            ("SendMessage", {"QueueUrl": [], "MessageBody": "b"}),
            ("SendMessageBatch", {"QueueUrl": "jobs", "Entries": a}),
            ("SendMessageBatch", {"QueueUrl": "jobs", "Entries": "a"}),
            ("SendMessageBatch", {"QueueUrl": "jobs", "Entries": ["a"]}),
            ("SendMessageBatch", {"QueueUrl": "jobs", "Entries": [[a]]}),
            ("SendMessageBatch", {"QueueUrl": "jobs", "Entries": [a, {**a, "Id": 1}]}),
            ("CreateQueue", {"QueueName": 1}),
            ("CreateQueue", {"QueueName": "new", "Attributes": []}),
            ("CreateQueue", {"QueueName": "new", "Attributes": "a"}),
            ("CreateQueue", {"QueueName": "new", "Attributes": {"DelaySeconds": 1}}),
            ("CreateQueue", {"QueueName": "new", "Attributes": {"FifoQueue": True}}),
            ("CreateQueue", {"QueueName": "new", "tags": ["a"]}),
            ("CreateQueue", {"QueueName": "new", "tags": {"a": 1}}),
            ("SetQueueAttributes", {"QueueUrl": "jobs", "Attributes": {"DelaySeconds": 1}}),
            ("SetQueueAttributes", {"QueueUrl": "jobs", "Attributes": {"RedrivePolicy": {}}}),
            ("GetQueueAttributes", {"QueueUrl": "jobs", "AttributeNames": "All"}),
            ("GetQueueAttributes", {"QueueUrl": "jobs", "AttributeNames": {"1": "All"}}),
            ("GetQueueAttributes", {"QueueUrl": "jobs", "AttributeNames": [1]}),
            ("ReceiveMessage", {"QueueUrl": "jobs", "MaxNumberOfMessages": "x"}),
            ("ReceiveMessage", {"QueueUrl": "jobs", "WaitTimeSeconds": []}),
            ("TagQueue", {"QueueUrl": "jobs", "Tags": [["a", "b"]]}),
            ("TagQueue", {"QueueUrl": "jobs", "Tags": {"a": {"b": "c"}}}),
            ("UntagQueue", {"QueueUrl": "jobs", "TagKeys": "a"}),
            ("ListQueues", {"MaxResults": "x"}),
            ("ListQueues", {"QueueNamePrefix": 1}),
        ):
            with self.subTest(operation, given=given):
                self.check_malformed_json(operation, json.dumps(given).encode())

    def test_a_form_that_cannot_be_read_is_malformed(self):
        attribute = b"&MessageAttribute.1.Name=a&MessageAttribute.1.Value.DataType=Binary"
        sending = b"Action=SendMessage&QueueUrl=jobs&MessageBody=b"
        for fields in (
            sending + b"&DelaySeconds=x",
            sending + b"&DelaySeconds=",
            sending + b"&DelaySeconds=1.5",
            sending + b"&DelaySeconds=%D9%A3",  # three, in Arabic digits
            sending + b"&DelaySeconds=0x1",
            sending + b"&DelaySeconds=1_0",
            sending + b"&DelaySeconds=" + b"1" * 100_000,
            sending + b"&DelaySeconds.1=1",
            b"Action=SendMessage&QueueUrl=jobs&MessageBody=%FF",
            b"Action=SendMessage&QueueUrl=jobs&MessageBody=%ED%A0%80",
            b"Action=SendMessage&QueueUrl=jobs&MessageBody=\xff",
            sending + attribute + b"&MessageAttribute.1.Value.BinaryValue=%3D",
            sending + attribute + b"&MessageAttribute.1.Value.BinaryValue=AQI",
            sending + attribute + b"&MessageAttribute.1.Value.BinaryValue=AQ==AQ==",
            sending + attribute + b"&MessageAttribute.1.Value.BinaryValue=%C3%A9A==",
        ):
            with self.subTest(fields[-30:], length=len(fields)):
                self.check_malformed_form(fields)

    def test_more_fields_than_any_call_has_are_malformed(self):
        fields = b"Action=PurgeQueue&QueueUrl=jobs" + b"&x=y" * 50_000
        self.check_malformed_form(fields)

    def test_fields_that_contradict_each_other_break_nothing(self):
        ends = ("", ".", "..", ".1", ".1.", ".Value", ".1.Value", ".1.Name.x", ".1.Value.x.y")
        names = ("QueueUrl", "MessageBody", "DelaySeconds", "MessageAttribute", "Tag", "Entries")
        names += ("SendMessageBatchRequestEntry", "AttributeName", "Attribute", "Action", "")
        operations = ("SendMessage", "SendMessageBatch", "TagQueue", "ReceiveMessage")
        broke = []
        for operation, name in itertools.product(operations, names):
            for two in itertools.permutations(ends, 2):
                fields = [("QueueUrl", "jobs"), ("Action", operation)]
                fields += [(name + end, "x") for end in two]
                body = urllib.parse.urlencode(fields).encode()
                if reply_to(self.query, "POST", "/", (FORM,), body).status >= 500:
                    broke.append(body)
        self.assertEqual(broke[:3], [])


class OddInputTest(Spoken):
    ODD = (
        "",
        " ",
        "\0",
        "\u00e9",
        "/",
        "x" * 300,
        "1",
        "{}",
        "[]",
        "null",
        arn("jobs"),
        "arn:::::",
    )
    ODD_JSON = ("\ud800", 0, -1, 10**18, True, None, [], {}, [""], {"": ""}, ["\ud800"], [{}])
    ODD_JSON += ({"\ud800": "\ud800"}, {"a": {}}, [None], {"a": None}, [[]], 1.5)

    def test_no_value_of_a_member_breaks_anything(self):
        of_json = self.protocol == "json"
        odd, broke = self.ODD + self.ODD_JSON * of_json, []
        for operation, given, _ in STORY:
            self.sqs.queue("jobs")
            for name, value in itertools.product(given, odd):
                if not of_json and isinstance(given[name], (dict, list)):
                    continue
                try:
                    self.sqs(operation, **{**resolved(given), name: value})
                except Refused as refusal:
                    if refusal.status >= 500:
                        broke.append((operation, name, value))
        self.assertEqual(broke, [])


# ==== Queues ====


class QueueTest(Spoken):
    STANDARD = (
        "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length"
    )
    ORDERED = (
        "The name of a FIFO queue can only include alphanumeric characters, hyphens, or"
        " underscores, must end with .fifo suffix and be 1 to 80 in length"
    )

    def test_a_name_is_taken_as_the_rules_say(self):
        fifo = {"FifoQueue": "true"}
        for name, attributes, text in (
            ("a", {}, None),
            ("Az09_-", {}, None),
            ("-", {}, None),
            ("a" * 80, {}, None),
            ("a" * 81, {}, self.STANDARD),
            ("", {}, self.STANDARD),
            ("a b", {}, self.STANDARD),
            ("a.b", {}, self.STANDARD),
            ("a/b", {}, self.STANDARD),
            ("a\n", {}, self.STANDARD),
            ("h\u00e9", {}, self.STANDARD),
            ("\u0663", {}, self.STANDARD),  # a digit, but not an ASCII one
            ("a.fifo", {}, self.STANDARD),
            ("a.fifo", fifo, None),
            ("a" * 75 + ".fifo", fifo, None),
            ("a" * 76 + ".fifo", fifo, self.ORDERED),
            ("a", fifo, self.ORDERED),
            ("a.b.fifo", fifo, self.ORDERED),
            ("a.FIFO", fifo, self.ORDERED),
            ("a.fifo\n", fifo, self.ORDERED),
        ):
            with self.subTest(name, **attributes):
                if text is None:
                    self.assertEqual(self.sqs.queue(name, **attributes), url_of(name))
                    continue
                given = {"QueueName": name, "Attributes": attributes}
                shape = FRAMEWORK + "InvalidParameterValueException"
                self.refused(INVALID, "CreateQueue", text, shape=shape, **given)

    def test_names_are_told_apart_by_case(self):
        urls = [self.sqs.queue(name) for name in ("jobs", "Jobs")]
        self.send(urls[0])
        self.assertEqual((self.counts(urls[0])[0], self.counts(urls[1])[0]), (1, 0))
        self.assertEqual(self.sqs("ListQueues")["QueueUrls"], [url_of("Jobs"), url_of("jobs")])

    def test_a_queue_is_found_by_the_end_of_its_url(self):
        self.sqs.queue("jobs")
        at = "/000000000000/jobs"
        for url in (
            url_of("jobs"),
            url_of("jobs") + "/",
            "jobs",
            at,
            at[1:],
            "https://localhost" + at,
            "https://sqs.us-east-1.amazonaws.com" + at,
            "https://us-east-1.queue.amazonaws.com" + at,
            "https://queue.amazonaws.com" + at,
            "https://vpce-x.sqs.us-east-1.vpce.amazonaws.com" + at,
            "http://127.0.0.1:1/queue/us-east-1" + at,
        ):
            with self.subTest(url):
                self.assertEqual(self.attributes(url, "QueueArn"), {"QueueArn": arn("jobs")})

    def test_a_queue_is_not_found_by_another_name(self):
        self.sqs.queue("jobs")
        for url in (
            "",
            "/",
            "JOBS",
            "jobs ",
            "jobs?",
            "jobs%20",
            url_of("JOBS"),
            url_of("job"),
            url_of("jobs") + "/jobs",
            url_of("jobs", OTHER_ACCOUNT),
            url_of("jobs", "0"),
            url_of("jobs", "jobs"),
            arn("jobs"),
            "/jobs",
            "\u00e9",
            "x" * 100_000,
        ):
            with self.subTest(url[:80]):
                code, shape = SQS + "NonExistentQueue", MODELLED + "QueueDoesNotExist"
                self.refused(code, "GetQueueAttributes", shape=shape, QueueUrl=url)

    def test_the_url_leads_back_to_where_the_request_went(self):
        for host in ("localhost:8081", "sqs.internal", "[::1]:80"):
            with self.subTest(host):
                given = {"QueueName": "jobs", "headers": [("Host", host)]}
                for operation in ("CreateQueue", "GetQueueUrl"):
                    url = self.sqs(operation, **given)["QueueUrl"]
                    self.assertEqual(url, f"http://{host}/{ACCOUNT}/jobs")
                output = self.sqs("ListQueues", headers=[("Host", host)])
                self.assertEqual(output["QueueUrls"], [f"http://{host}/{ACCOUNT}/jobs"])

    def test_a_public_url_is_used_instead_where_there_is_one(self):
        self.sqs.proxy = Proxy(
            awsproxy.DEMO_CLIENTS,
            clock=self.clock,
            sqs=self.sqs.sqs,
            public_url="https://proxy.internal/aws/",
            account_id=OTHER_ACCOUNT,
        )
        url = self.sqs.queue("jobs")
        self.assertEqual(url, f"https://proxy.internal/aws/{OTHER_ACCOUNT}/jobs")
        self.send(url)
        path = f"/aws/{OTHER_ACCOUNT}/jobs"
        (message,) = self.sqs("ReceiveMessage", target=path, QueueUrl=url)["Messages"]
        self.assertEqual(message["Body"], "hello")

    def test_accounts_and_regions_have_queues_of_their_own(self):
        other = Client("other", "AKIDOTHER", "dummysecret", account_id=OTHER_ACCOUNT)
        mine = self.sqs.queue("jobs")
        self.send(mine)
        for name, caller, account, region in (
            ("an account", self.another(client=other), OTHER_ACCOUNT, "us-east-1"),
            ("a region", self.another(region="eu-west-1"), ACCOUNT, "eu-west-1"),
        ):
            with self.subTest(name):
                self.assertEqual(caller("ListQueues"), {})
                for url in (mine, "jobs"):
                    with self.assertRaises(Refused) as caught:
                        caller("ReceiveMessage", QueueUrl=url)
                    self.assertEqual(caught.exception.code, SQS + "NonExistentQueue")
                    self.assertEqual(caught.exception.status, 400)
                url = caller.queue("jobs")
                self.assertEqual(url, url_of("jobs", account))
                given = {"QueueUrl": url, "AttributeNames": ["QueueArn"]}
                shown = caller("GetQueueAttributes", **given)["Attributes"]
                self.assertEqual(shown["QueueArn"], arn("jobs", region, account))
                self.assertEqual(caller("ListQueues"), {"QueueUrls": [url]})
                self.assertEqual(caller.receive(url), [])
                caller("DeleteQueue", QueueUrl=url)
        self.assertEqual(self.sqs.bodies(mine), ["hello"])

    def test_the_url_of_a_queue_of_another_account_is_not_given(self):
        self.sqs.queue("jobs")
        given = {"QueueName": "jobs", "QueueOwnerAWSAccountId": OTHER_ACCOUNT}
        self.refused(SQS + "NonExistentQueue", "GetQueueUrl", **given)

    def test_a_queue_of_a_request_without_a_name_is_not_guessed(self):
        self.sqs.queue("jobs")
        for given in ({}, {"QueueName": ""}):
            shape = FRAMEWORK + "InvalidParameterValueException"
            self.refused(INVALID, "GetQueueUrl", shape=shape, **given)

    def test_a_deleted_queue_is_gone(self):
        url = self.sqs.queue("jobs", DelaySeconds="9")
        self.sqs("TagQueue", QueueUrl=url, Tags={"a": "b"})
        self.send(url)
        self.sqs("DeleteQueue", QueueUrl=url)
        self.assertEqual(self.sqs("ListQueues"), {})
        for operation in ("DeleteQueue", "ReceiveMessage", "PurgeQueue"):
            self.refused(SQS + "NonExistentQueue", operation, QueueUrl=url)
        self.refused(SQS + "NonExistentQueue", "GetQueueUrl", QueueName="jobs")
        self.assertEqual(self.sqs.queue("jobs"), url)  # at once, unless told to cool down
        self.assertEqual(self.counts(url), (0, 0, 0))
        self.assertEqual(self.attributes(url, "DelaySeconds"), {"DelaySeconds": "0"})
        self.assertEqual(self.sqs("ListQueueTags", QueueUrl=url), {})

    def test_with_a_cooldown_a_name_is_free_again_after_60_seconds(self):
        self.start(cooldown=True)
        text = (
            "You must wait 60 seconds after deleting a queue before you can create another with"
            " the same name."
        )
        self.sqs("DeleteQueue", QueueUrl=self.sqs.queue("jobs"))
        self.sqs.queue("other")
        for seconds in (0, 59):
            self.clock.now = EXAMPLE_TIME + seconds
            self.refused(SQS + "QueueDeletedRecently", "CreateQueue", text, QueueName="jobs")
        self.clock.now = EXAMPLE_TIME + 60
        self.assertEqual(self.sqs.queue("jobs"), url_of("jobs"))


class CreateQueueTest(Spoken):
    def create(self, **attributes):
        given = {"QueueName": "jobs", "Attributes": attributes}
        return self.sqs("CreateQueue", **given)["QueueUrl"]

    def test_a_queue_that_is_there_is_created_again_if_nothing_differs(self):
        url = self.create(DelaySeconds="5", VisibilityTimeout="40")
        self.sqs("TagQueue", QueueUrl=url, Tags={"a": "b"})
        self.send(url, DelaySeconds=0)
        self.clock.now += 100
        created = str(EXAMPLE_TIME)
        for name, attributes in (
            ("nothing named", {}),
            ("one named", {"DelaySeconds": "5"}),
            ("all named", {"VisibilityTimeout": "40", "DelaySeconds": "5"}),
            ("a default named", {"MaximumMessageSize": "1048576"}),
            ("one that is not set", {"Policy": "", "RedrivePolicy": ""}),
        ):
            with self.subTest(name):
                self.assertEqual(self.create(**attributes), url)
                shown = self.attributes(url)
                self.assertEqual(shown["DelaySeconds"], "5")
                self.assertEqual(shown["VisibilityTimeout"], "40")
                self.assertEqual(shown["CreatedTimestamp"], created)
                self.assertEqual(shown["LastModifiedTimestamp"], created)
                self.assertEqual(self.counts(url), (1, 0, 0))
                self.assertEqual(self.sqs("ListQueueTags", QueueUrl=url), {"Tags": {"a": "b"}})

    def test_what_differs_is_named(self):
        url = self.create(DelaySeconds="5")
        for name, value in (
            ("DelaySeconds", "6"),
            ("VisibilityTimeout", "31"),
            ("SqsManagedSseEnabled", "false"),
            ("KmsMasterKeyId", "alias/aws/sqs"),
            ("Policy", '{"Version":"2012-10-17"}'),
        ):
            with self.subTest(name):
                self.refused(
                    "QueueAlreadyExists",
                    "CreateQueue",
                    "A queue already exists with the same name and a different value for"
                    f" attribute {name}",
                    shape=MODELLED + "QueueNameExists",
                    QueueName="jobs",
                    Attributes={"MessageRetentionPeriod": "345600", name: value},
                )
        self.assertEqual(self.attributes(url, "DelaySeconds"), {"DelaySeconds": "5"})

    def test_current_values_are_compared_and_not_the_first(self):
        url = self.create(DelaySeconds="5")
        self.set(url, DelaySeconds="6")
        self.assertEqual(self.create(DelaySeconds="6"), url)
        given = {"QueueName": "jobs", "Attributes": {"DelaySeconds": "5"}}
        self.refused("QueueAlreadyExists", "CreateQueue", **given)

    def test_another_kind_of_queue_has_another_name(self):
        given = {"FifoQueue": "true", "ContentBasedDeduplication": "true"}
        url = self.sqs.queue("jobs.fifo", **given)
        self.assertEqual(self.sqs.queue("jobs.fifo", FifoQueue="true"), url)
        changed = {"FifoQueue": "true", "ContentBasedDeduplication": "false"}
        self.refused(
            "QueueAlreadyExists", "CreateQueue", QueueName="jobs.fifo", Attributes=changed
        )

    def test_tags_are_set_at_creation_and_not_compared(self):
        self.sqs("CreateQueue", QueueName="jobs", tags={"a": "b", "c": ""})
        expected = {"Tags": {"a": "b", "c": ""}}
        self.assertEqual(self.sqs("ListQueueTags", QueueUrl="jobs"), expected)

    def test_a_queue_that_cannot_be_is_not_made(self):
        for attributes in (
            {"DelaySeconds": "x"},
            {"Unheard": "of"},
            {"DelaySeconds": "1", "RedrivePolicy": redrive("unheard-of", 1)},
        ):
            with self.subTest(attributes), self.assertRaises(Refused):
                self.create(**attributes)
            self.assertEqual(self.sqs("ListQueues"), {})


DEFAULTS = {
    "ApproximateNumberOfMessages": "0",
    "ApproximateNumberOfMessagesDelayed": "0",
    "ApproximateNumberOfMessagesNotVisible": "0",
    "CreatedTimestamp": str(EXAMPLE_TIME),
    "DelaySeconds": "0",
    "LastModifiedTimestamp": str(EXAMPLE_TIME),
    "MaximumMessageSize": "1048576",
    "MessageRetentionPeriod": "345600",
    "QueueArn": arn("jobs"),
    "ReceiveMessageWaitTimeSeconds": "0",
    "SqsManagedSseEnabled": "true",
    "VisibilityTimeout": "30",
}
FIFO_DEFAULTS = {
    **DEFAULTS,
    "QueueArn": arn("jobs.fifo"),
    "FifoQueue": "true",
    "ContentBasedDeduplication": "false",
    "DeduplicationScope": "queue",
    "FifoThroughputLimit": "perQueue",
}


class AttributesTest(Spoken):
    RANGES = (
        ("DelaySeconds", 0, 900),
        ("MaximumMessageSize", 1024, 1048576),
        ("MessageRetentionPeriod", 60, 1209600),
        ("ReceiveMessageWaitTimeSeconds", 0, 20),
        ("VisibilityTimeout", 0, 43200),
        ("KmsDataKeyReusePeriodSeconds", 60, 86400),
    )

    def one(self, url, name):
        return self.attributes(url, name).get(name)

    def unknown(self, operation, name, **given):
        shape, text = MODELLED + "InvalidAttributeName", f"Unknown Attribute {name}."
        self.refused("InvalidAttributeName", operation, text, shape=shape, **given)

    def test_all_are_as_they_are_by_default(self):
        self.assertEqual(self.attributes(self.sqs.queue("jobs")), DEFAULTS)
        url = self.sqs.queue("jobs.fifo", FifoQueue="true")
        self.assertEqual(self.attributes(url), FIFO_DEFAULTS)

    def test_those_asked_for_are_given(self):
        url = self.sqs.queue("jobs", KmsDataKeyReusePeriodSeconds="60")
        for asked, expected in (
            (["DelaySeconds"], {"DelaySeconds"}),
            (["DelaySeconds", "QueueArn", "DelaySeconds"], {"DelaySeconds", "QueueArn"}),
            (["All"], {*DEFAULTS, "KmsDataKeyReusePeriodSeconds"}),
            (["QueueArn", "All"], {*DEFAULTS, "KmsDataKeyReusePeriodSeconds"}),
            (["Policy", "RedrivePolicy", "KmsMasterKeyId"], set()),
            (["RedriveAllowPolicy", "VisibilityTimeout"], {"VisibilityTimeout"}),
            ([], set()),
        ):
            with self.subTest(asked):
                given = {"QueueUrl": url, "AttributeNames": asked}
                output = self.sqs("GetQueueAttributes", **given)
                self.assertEqual(set(output.get("Attributes", {})), expected)
                self.assertEqual("Attributes" in output, bool(expected))

    def test_numbers_have_a_range(self):
        url = self.sqs.queue("jobs")
        for name, low, high in self.RANGES:
            for value in (low, high):
                with self.subTest(name, value=value):
                    created = self.sqs.queue(f"{name}-{value}", **{name: str(value)})
                    self.set(url, **{name: str(value)})
                    for at in (created, url):
                        self.assertEqual(self.one(at, name), str(value))
            before = self.attributes(url)
            wrong = [low - 1, high + 1, 10**30, "x", "1.5", "0x10", "\u0663", "1 0"]
            for value in wrong + [""] * (name in DEFAULTS):
                with self.subTest(name, value=value):
                    shape = MODELLED + "InvalidAttributeValue"
                    for operation, given in (
                        ("CreateQueue", {"QueueName": "new"}),
                        ("SetQueueAttributes", {"QueueUrl": url}),
                    ):
                        given["Attributes"] = {name: str(value)}
                        self.refused("InvalidAttributeValue", operation, shape=shape, **given)
                    self.assertEqual(self.attributes(url), before)

    def test_words_are_chosen_among(self):
        url = self.sqs.queue("jobs.fifo", FifoQueue="true")
        for name, right, wrong in (
            ("SqsManagedSseEnabled", ("false", "true"), ("yes", "1")),
            ("ContentBasedDeduplication", ("true", "false"), ("yes", "1")),
            ("DeduplicationScope", ("messageGroup", "queue"), ("group", "true")),
            ("FifoThroughputLimit", ("perMessageGroupId", "perQueue"), ("none", "true")),
        ):
            for value in right:
                with self.subTest(name, value=value):
                    self.set(url, **{name: value})
                    self.assertEqual(self.one(url, name), value)
            for value in wrong:
                with self.subTest(name, value=value):
                    given = {"QueueUrl": url, "Attributes": {name: value}}
                    self.refused("InvalidAttributeValue", "SetQueueAttributes", **given)

    def test_an_unknown_name_is_refused(self):
        url, fifo = self.sqs.queue("jobs"), self.sqs.queue("jobs.fifo", FifoQueue="true")
        for name in ("Foobar", "delaySeconds", "DelaySeconds ", "", "h\u00e9", "__class__"):
            with self.subTest(name):
                self.unknown(
                    "GetQueueAttributes", name, QueueUrl=url, AttributeNames=["All", name]
                )
                for at in (url, fifo):
                    given = {"QueueUrl": at, "Attributes": {name: "1"}}
                    self.unknown("SetQueueAttributes", name, **given)
                given = {"QueueName": "new", "Attributes": {name: "1"}}
                self.unknown("CreateQueue", name, **given)

    def test_what_is_computed_cannot_be_set(self):
        url = self.sqs.queue("jobs")
        for name in (
            "QueueArn",
            "CreatedTimestamp",
            "LastModifiedTimestamp",
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
            "ApproximateNumberOfMessagesDelayed",
            "All",
        ):
            with self.subTest(name):
                given = {"QueueUrl": url, "Attributes": {name: "1"}}
                self.unknown("SetQueueAttributes", name, **given)
        self.assertEqual(self.attributes(url), DEFAULTS)

    def test_a_standard_queue_has_no_attribute_of_a_fifo_queue(self):
        url = self.sqs.queue("jobs")
        for name, value, known in (
            ("FifoQueue", "false", False),
            ("FifoQueue", "true", False),
            ("ContentBasedDeduplication", "true", False),
            ("DeduplicationScope", "queue", True),
            ("FifoThroughputLimit", "perQueue", True),
        ):
            text = f"Unknown Attribute {name}."
            if known:
                text = f"You can specify the {name} only when FifoQueue is set to true."
            with self.subTest(name, value=value):
                given = {"QueueUrl": url, "Attributes": {name: value}}
                self.refused("InvalidAttributeName", "SetQueueAttributes", text, **given)
                if value != "true" or name != "FifoQueue":
                    given = {"QueueName": "new", "Attributes": {name: value}}
                    self.refused("InvalidAttributeName", "CreateQueue", text, **given)

    def test_a_fifo_queue_stays_one(self):
        url = self.sqs.queue("jobs.fifo", FifoQueue="true")
        self.set(url, FifoQueue="true")
        self.refused(
            "InvalidAttributeValue",
            "SetQueueAttributes",
            "Invalid value for the parameter FifoQueue. Reason: Modifying queue type is not"
            " supported.",
            QueueUrl=url,
            Attributes={"FifoQueue": "false"},
        )
        self.assertEqual(self.attributes(url), FIFO_DEFAULTS)

    def test_all_are_set_or_none(self):
        url = self.sqs.queue("jobs")
        for bad in ({"DelaySeconds": "901"}, {"Unheard": "of"}, {"RedrivePolicy": "x"}):
            with self.subTest(bad), self.assertRaises(Refused):
                self.set(url, VisibilityTimeout="1", **bad)
            self.assertEqual(self.attributes(url), DEFAULTS)

    def test_a_change_is_dated(self):
        url = self.sqs.queue("jobs")
        self.clock.now += 5.75
        self.set(url, DelaySeconds="1", VisibilityTimeout="2")
        changed = {
            "DelaySeconds": "1",
            "VisibilityTimeout": "2",
            "LastModifiedTimestamp": str(EXAMPLE_TIME + 5),
        }
        self.assertEqual(self.attributes(url), {**DEFAULTS, **changed})

    def test_a_policy_is_removed_by_an_empty_one(self):
        dead = self.sqs.queue("dead")
        for name, value in (
            ("Policy", '{"Version":"2012-10-17"}'),
            ("RedrivePolicy", POLICY),
            ("RedriveAllowPolicy", '{"redrivePermission":"denyAll"}'),
            ("KmsMasterKeyId", "alias/aws/sqs"),
        ):
            with self.subTest(name):
                url = self.sqs.queue(name, **{name: value})
                self.assertEqual(self.one(url, name), value)
                self.set(url, **{name: ""})
                self.assertNotIn(name, self.attributes(url))
                self.set(url, **{name: value})
                self.assertEqual(self.one(url, name), value)
                self.set(url, DelaySeconds="1")
                self.assertEqual(self.one(url, name), value)
                made = self.sqs.queue(f"{name}-none", **{name: ""})
                self.assertNotIn(name, self.attributes(made))
        self.assertNotIn("RedrivePolicy", self.attributes(dead))

    def test_a_policy_is_a_json_object(self):
        url = self.sqs.queue("jobs")
        for policy in ("x", "{", "[]", "1", '"x"', "null", "NaN", " ", "[" * 100_000):
            with self.subTest(policy[:9]), self.assertRaises(Refused) as caught:
                self.set(url, Policy=policy)
            self.assertEqual(caught.exception.status, 400)
            self.assertEqual(self.attributes(url), DEFAULTS)

    def test_a_policy_is_no_deeper_than_can_be_written_again(self):
        url, given = self.sqs.queue("jobs"), {"AWSAccountIds": ["1"], "Actions": ["*"]}
        for depth in (29, 30, 500, 900, 950, 980, 982, 984, 990):
            with self.subTest(depth=depth), contextlib.suppress(Refused):
                self.set(url, Policy='{"Statement":[{"a":' + "[" * depth + "]" * depth + "}]}")
                self.assertEqual(depth, 29)
            self.sqs("AddPermission", QueueUrl=url, Label=f"at-{depth}", **given)

    def test_a_key_turns_the_other_encryption_off_for_good(self):
        url = self.sqs.queue("jobs")
        self.set(url, KmsMasterKeyId="alias/aws/sqs", KmsDataKeyReusePeriodSeconds="600")
        asked = ("SqsManagedSseEnabled", "KmsMasterKeyId", "KmsDataKeyReusePeriodSeconds")
        self.assertEqual(
            self.attributes(url, *asked),
            {
                "SqsManagedSseEnabled": "false",
                "KmsMasterKeyId": "alias/aws/sqs",
                "KmsDataKeyReusePeriodSeconds": "600",
            },
        )
        self.set(url, KmsMasterKeyId="", KmsDataKeyReusePeriodSeconds="300")
        self.assertEqual(self.attributes(url, *asked), {"SqsManagedSseEnabled": "false"})
        self.set(url, SqsManagedSseEnabled="true")
        self.assertEqual(self.attributes(url, *asked), {"SqsManagedSseEnabled": "true"})
        created = self.sqs.queue("created", KmsMasterKeyId="alias/aws/sqs")
        self.assertEqual(self.one(created, "SqsManagedSseEnabled"), "false")

    def test_there_is_one_encryption_at_a_time(self):
        text = (
            "You can use one type of server-side encryption (SSE) at one time. You can either"
            " enable KMS SSE or SQS SSE."
        )
        both = {"KmsMasterKeyId": "alias/aws/sqs", "SqsManagedSseEnabled": "true"}
        url = self.sqs.queue("jobs")
        for operation, given in (
            ("CreateQueue", {"QueueName": "new"}),
            ("SetQueueAttributes", {"QueueUrl": url}),
        ):
            with self.subTest(operation):
                shape = MODELLED + "InvalidAttributeName"
                given["Attributes"] = both
                self.refused("InvalidAttributeName", operation, text, shape=shape, **given)
        self.assertEqual(self.attributes(url), DEFAULTS)
        self.sqs.queue("one", KmsMasterKeyId="alias/aws/sqs", SqsManagedSseEnabled="false")

    def test_messages_are_counted(self):
        url = self.sqs.queue("jobs")
        for seconds in (0, 0, 0, 9):
            self.send(url, DelaySeconds=seconds)
        self.sqs.receive(url)
        self.assertEqual(self.counts(url), (2, 1, 1))
        self.clock.now += 9
        self.assertEqual(self.counts(url), (3, 1, 0))
        self.clock.now += 21
        self.assertEqual(self.counts(url), (4, 0, 0))


class RedrivePolicyTest(Spoken):
    def refuse_policy(self, url, policy, text=None, name="RedrivePolicy"):
        before = self.attributes(url)
        shape = FRAMEWORK + "InvalidParameterValueException"
        given = {"QueueUrl": url, "Attributes": {name: policy, "DelaySeconds": "7"}}
        self.refused(INVALID, "SetQueueAttributes", text, shape=shape, **given)
        self.assertEqual(self.attributes(url), before)

    def sources(self, url):
        return self.sqs("ListDeadLetterSourceQueues", QueueUrl=url).get("queueUrls", [])

    def test_a_policy_is_read_back_in_one_form(self):
        self.sqs.queue("dead")
        url = self.sqs.queue("jobs")
        for policy, count in (
            ('{"deadLetterTargetArn":"%s","maxReceiveCount":1}', 1),
            ('{"deadLetterTargetArn":"%s","maxReceiveCount":"1"}', 1),
            (' { "maxReceiveCount" : "1000",\n "deadLetterTargetArn" : "%s" } ', 1000),
            ('{"deadLetterTargetArn":"%s","maxReceiveCount":1000}', 1000),
        ):
            with self.subTest(policy):
                self.set(url, RedrivePolicy=policy % arn("dead"))
                shown = self.attributes(url, "RedrivePolicy")["RedrivePolicy"]
                expected = '{"deadLetterTargetArn":"%s","maxReceiveCount":%d}'
                self.assertEqual(shown, expected % (arn("dead"), count))

    def test_a_queue_is_created_again_with_its_policy_in_another_form(self):
        self.sqs.queue("dead")
        url = self.sqs.queue("jobs", RedrivePolicy=redrive("dead", 3))
        self.assertEqual(self.sqs.queue("jobs", RedrivePolicy=redrive("dead", "3")), url)
        given = {"QueueName": "jobs", "Attributes": {"RedrivePolicy": redrive("dead", 4)}}
        self.refused("QueueAlreadyExists", "CreateQueue", **given)

    def test_a_policy_that_makes_no_sense_is_refused(self):
        self.sqs.queue("dead")
        self.sqs.queue("dead.fifo", FifoQueue="true")
        self.another(region="eu-west-1").queue("dead")
        url = self.sqs.queue("jobs")
        fifo = self.sqs.queue("jobs.fifo", FifoQueue="true")
        target = arn("dead")
        for at, policy in (
            *((url, redrive("dead", count)) for count in (0, -1, 1001, "0", "x", "", 1.5)),
            *((url, redrive("dead", count)) for count in (True, None, [], {}, 10**30)),
            (url, redrive("unheard-of", 1)),
            (url, redrive("dead.fifo", 1)),
            (fifo, redrive("dead", 1)),
            (url, redrive("dead", 1).replace("us-east-1", "eu-west-1")),
            (url, redrive("dead", 1).replace(ACCOUNT, OTHER_ACCOUNT)),
            (url, json.dumps({"deadLetterTargetArn": target})),
            (url, json.dumps({"maxReceiveCount": 1})),
            (url, json.dumps({"deadLetterTargetArn": None, "maxReceiveCount": 1})),
            (url, json.dumps({"deadLetterTargetArn": [target], "maxReceiveCount": 1})),
            (url, json.dumps({"deadLetterTargetArn": "dead", "maxReceiveCount": 1})),
            (url, json.dumps({"deadLetterTargetArn": url_of("dead"), "maxReceiveCount": 1})),
            *((url, text) for text in ("{}", "[]", "null", "1", "NaN", "x", "{", '"x"', " ")),
            (url, "[" * 100_000),
            (url, '{"maxReceiveCount":' + "1" * 5000 + "}"),
        ):
            with self.subTest(at=at, policy=policy[:120]):
                self.refuse_policy(at, policy)

    def test_a_queue_may_target_itself(self):
        url = self.sqs.queue("jobs")
        self.set(url, RedrivePolicy=redrive("jobs", 1))
        self.assertEqual(self.sources(url), [url])
        url = self.sqs.queue("other", RedrivePolicy=redrive("other", 1))
        self.assertEqual(self.sources(url), [url])

    def test_whom_a_target_allows(self):
        url, other = self.sqs.queue("jobs"), self.sqs.queue("other")
        dead = self.sqs.queue("dead")
        for permission, sources, allowed in (
            ("allowAll", None, {url, other}),
            ("denyAll", None, set()),
            ("byQueue", [arn("jobs")], {url}),
            ("byQueue", [arn("x"), arn("other")], {other}),
            ("byQueue", [arn("jobs", region="eu-west-1")], set()),
        ):
            policy = {"redrivePermission": permission}
            if sources:
                policy["sourceQueueArns"] = sources
            with self.subTest(policy):
                self.set(dead, RedriveAllowPolicy=json.dumps(policy))
                for at in (url, other):
                    if at in allowed:
                        self.set(at, RedrivePolicy=redrive("dead", 1))
                        self.set(at, RedrivePolicy="")
                    else:
                        self.refuse_policy(at, redrive("dead", 1))
        self.set(dead, RedriveAllowPolicy="")
        self.set(url, RedrivePolicy=redrive("dead", 1))

    def test_a_permission_is_checked_when_a_source_sets_its_policy(self):
        dead = self.sqs.queue("dead")
        url = self.sqs.queue("jobs", RedrivePolicy=redrive("dead", 1))
        self.set(dead, RedriveAllowPolicy='{"redrivePermission":"denyAll"}')
        self.set(url, DelaySeconds="0")
        self.assertEqual(self.sources(dead), [url])
        given = {"QueueName": "new", "Attributes": {"RedrivePolicy": redrive("dead", 1)}}
        self.refused(INVALID, "CreateQueue", **given)

    def test_a_permission_that_makes_no_sense_is_refused(self):
        url = self.sqs.queue("dead")
        eleven = [arn(f"jobs-{number}") for number in range(11)]
        for policy in (
            {"redrivePermission": "byQueue"},
            {"redrivePermission": "byQueue", "sourceQueueArns": []},
            {"redrivePermission": "byQueue", "sourceQueueArns": eleven},
            *(
                {"redrivePermission": "byQueue", "sourceQueueArns": value}
                for value in (arn("jobs"), "x", 5, True, {"a": "b"})
            ),
            {"redrivePermission": "allowAll", "sourceQueueArns": [arn("jobs")]},
            {"redrivePermission": "allow"},
            {"redrivePermission": None},
            {"redrivePermission": []},
            {"sourceQueueArns": [arn("jobs")]},
            {},
            [],
            None,
            "allowAll",
        ):
            with self.subTest(policy):
                self.refuse_policy(url, json.dumps(policy), name="RedriveAllowPolicy")
        for text in ("x", "{", "[" * 100_000):
            with self.subTest(text[:9]):
                self.refuse_policy(url, text, name="RedriveAllowPolicy")
        ten = {"redrivePermission": "byQueue", "sourceQueueArns": eleven[:10]}
        self.set(url, RedriveAllowPolicy=json.dumps(ten))
        shown = self.attributes(url, "RedriveAllowPolicy")["RedriveAllowPolicy"]
        self.assertEqual(json.loads(shown), ten)

    def test_the_sources_of_a_target_are_listed(self):
        dead = self.sqs.queue("dead")
        self.assertEqual(self.sources(dead), [])
        urls = [self.sqs.queue(f"jobs-{n}", RedrivePolicy=redrive("dead", 1)) for n in range(3)]
        self.sqs.queue("other")
        self.assertEqual(self.sources(dead), urls)
        self.set(urls[1], RedrivePolicy="")
        self.assertEqual(self.sources(dead), [urls[0], urls[2]])
        self.sqs("DeleteQueue", QueueUrl=urls[0])
        self.assertEqual(self.sources(dead), [urls[2]])
        self.assertEqual(self.sources(urls[2]), [])


# ==== Sending ====


class SendTest(Spoken):
    TOO_LONG = "One or more parameters are invalid. Reason: Message must be shorter than {} bytes."

    def start(self):
        super().start()
        self.url = self.sqs.queue("jobs")

    def refuse(self, code, text=None, shape=None, body="hello", **given):
        """Check that a message is refused and not queued."""
        given = {"QueueUrl": self.url, "MessageBody": body, **given}
        self.refused(code, "SendMessage", text, shape=shape, **given)
        self.assertEqual(self.counts(self.url), (0, 0, 0))

    def refuse_value(self, text=None, **given):
        shape = FRAMEWORK + "InvalidParameterValueException"
        self.refuse(INVALID, text, shape, **given)

    def sent(self, body="hello", **given):
        """Send a message and return it as it is received."""
        self.send(self.url, body, **given)
        asked = {"AttributeNames": ["All"], "MessageAttributeNames": ["All"]}
        (message,) = self.sqs.receive(self.url, **asked)
        return message

    def test_the_size_of_a_message_has_a_limit(self):
        self.set(self.url, MaximumMessageSize="1024")
        trace = {"AWSTraceHeader": string("x" * 100)}
        for name, body, given, size in (
            ("one byte", "x", {}, 1),
            ("the limit", "x" * 1024, {}, 1024),
            ("one more", "x" * 1025, {}, 1025),
            ("bytes and not letters", "\u20ac" * 341, {}, 1023),
            ("bytes and not letters, too many", "\u20ac" * 342, {}, 1026),
            (
                "attributes",
                "x" * 1013,  # 1 for the name, 6 for the type, 4 for the value
                {"MessageAttributes": {"n": string("blue")}},
                1024,
            ),
            (
                "attributes, too many",
                "x" * 1014,
                {"MessageAttributes": {"n": string("blue")}},
                1025,
            ),
            (
                "attributes, bytes and not letters",
                "x" * 1015,
                {"MessageAttributes": {"n": string("\u20ac")}},
                1025,
            ),
            (
                "binary attributes count as they are",
                "x" * 1014,
                {"MessageAttributes": {"n": {"DataType": "Binary", "BinaryValue": b"\0\1\2"}}},
                1024,
            ),
            (
                "labels count",
                "x" * 1012,
                {"MessageAttributes": {"n": {"DataType": "String.x", "StringValue": "blue"}}},
                1025,
            ),
            ("system attributes", "x" * 1024, {"MessageSystemAttributes": trace}, 1024),
        ):
            with self.subTest(name):
                self.sqs("PurgeQueue", QueueUrl=self.url)
                if size > 1024:
                    self.refuse_value(self.TOO_LONG.format(1024), body=body, **given)
                else:
                    self.assertEqual(self.sent(body, **given)["Body"], body)

    def test_the_size_of_a_message_has_a_limit_by_default(self):
        # "%" is three bytes in a form; in JSON this quote is two.
        for character in '%"':
            message = self.sent(character * MEBIBYTE)
            self.assertEqual(message["Body"], character * MEBIBYTE)
            given = {"QueueUrl": self.url, "ReceiptHandle": message["ReceiptHandle"]}
            self.sqs("DeleteMessage", **given)
        self.refuse_value(self.TOO_LONG.format(MEBIBYTE), body="x" * (MEBIBYTE + 1))

    def test_the_body_must_not_be_empty(self):
        text = "The request must contain the parameter MessageBody."
        self.refuse(MISSING, text, FRAMEWORK + "MissingRequiredParameterException", body="")

    def test_some_characters_are_not_allowed(self):
        for character in "\t\n\r \x20\x7f\x85\ud7ff\ue000\ufffd\U00010000\U0010ffff":
            with self.subTest(ascii(character)):
                given = {"MessageAttributes": {"a": string(character)}}
                message = self.sent(character, **given)
                got = message["Body"], message["MessageAttributes"]["a"]["StringValue"]
                self.assertEqual(got, (character, character))
                given = {"QueueUrl": self.url, "ReceiptHandle": message["ReceiptHandle"]}
                self.sqs("DeleteMessage", **given)
        characters = "\0\1\x08\x0b\x0c\x0e\x1f\ufffe\uffff"
        if self.protocol == "json":
            characters += "\ud800\udfff"  # in a form there is no way to write them
        for character in characters:
            with self.subTest(ascii(character)):
                shape = MODELLED + "InvalidMessageContents"
                self.refuse("InvalidMessageContents", shape=shape, body=f"a{character}b")
                self.refuse_value(MessageAttributes={"a": string(f"a{character}b")})

    def test_a_delay_has_a_range(self):
        for seconds in (-1, 901, 10**17):
            with self.subTest(seconds):
                self.refuse_value(DelaySeconds=seconds)
        for seconds in (0, 900):
            self.send(self.url, DelaySeconds=seconds)
        self.assertEqual(self.counts(self.url), (1, 0, 1))

    def test_a_delay_replaces_the_queues(self):
        self.set(self.url, DelaySeconds="9")
        self.send(self.url, "the queue's")
        self.send(self.url, "its own", DelaySeconds=4)
        self.send(self.url, "none", DelaySeconds=0)
        for seconds, bodies in ((0, ["none"]), (3.5, []), (4, ["its own"]), (9, ["the queue's"])):
            with self.subTest(seconds):
                self.clock.now = EXAMPLE_TIME + seconds
                self.assertEqual(self.sqs.bodies(self.url), bodies)

    def test_a_message_has_up_to_ten_attributes(self):
        ten = {f"a{number}": string("x") for number in range(10)}
        self.refuse_value(MessageAttributes={**ten, "b": string("x")})
        self.assertEqual(self.sent(MessageAttributes=ten)["MessageAttributes"], ten)

    def test_names_of_attributes_have_rules(self):
        for name in ("a", "A9_-.z", "a..b", "a" * 256, "aws", "awsx.a", "AmazonX", "h\u00e9", "9"):
            with self.subTest(name[:20], length=len(name)):
                given = {name: string("x")}
                message = self.sent(MessageAttributes=given)
                self.assertEqual(message["MessageAttributes"], given)
                self.sqs("PurgeQueue", QueueUrl=self.url)
        for name in (
            "",
            ".a",
            "a.",
            "a b",
            "a/b",
            "a\n",
            "a:b",
            "a" * 257,
            "aws.a",
            "AWS.a",
            "Aws.a",
            "amazon.a",
            "AMAZON.a",
        ):
            with self.subTest(name[:20], length=len(name)):
                self.refuse_value(MessageAttributes={name: string("x")})

    def test_types_of_attributes_have_rules(self):
        for kind, value in (
            ("String", "x"),
            ("String.x", "x"),
            ("String." + "x" * 248, "x"),
            ("Number", "0"),
            ("Number", "-1.50"),
            ("Number", "1493147359900"),
            ("Number.int", "1"),
        ):
            with self.subTest(kind[:20], value=value):
                given = {"a": {"DataType": kind, "StringValue": value}}
                message = self.sent(MessageAttributes=given)
                self.assertEqual(message["MessageAttributes"], given)
                self.sqs("PurgeQueue", QueueUrl=self.url)
        for attribute in (
            {"DataType": "", "StringValue": "x"},
            {"DataType": "string", "StringValue": "x"},
            {"DataType": "Int", "StringValue": "1"},
            {"DataType": "Strings", "StringValue": "x"},
            {"DataType": "String." + "x" * 250, "StringValue": "x"},
            {"DataType": "Number", "StringValue": "x"},
            {"DataType": "Number", "StringValue": ""},
            {"DataType": "Number", "StringValue": "\u0663"},
            {"DataType": "Binary", "BinaryValue": b""},
            {"DataType": "Binary", "StringValue": "x"},
            {"DataType": "String", "BinaryValue": b"x"},
            {"DataType": "String"},
            {"StringValue": "x"},
        ):
            with self.subTest(attribute):
                self.refuse_value(MessageAttributes={"a": attribute})

    def test_an_attribute_without_a_value_is_named(self):
        text = "Message (user) attribute 'X' must contain a non-empty value of type 'String'."
        self.refuse_value(text, MessageAttributes={"X": string("")})

    def test_lists_of_values_are_not_supported(self):
        for member, value in (("StringListValues", ["x"]), ("BinaryListValues", [b"x"])):
            if self.protocol == "query":
                value = ["eA=="]
            with self.subTest(member):
                code, shape = SQS + "UnsupportedOperation", MODELLED + "UnsupportedOperation"
                given = {"a": {**string("x"), member: value}}
                self.refuse(code, shape=shape, MessageAttributes=given)
        if self.protocol == "json":
            empty = {"a": {**string("x"), "StringListValues": [], "BinaryListValues": []}}
            message = self.sent(MessageAttributes=empty)
            self.assertEqual(message["MessageAttributes"]["a"]["StringValue"], "x")

    def test_the_one_system_attribute_is_the_trace_header(self):
        for attributes in (
            {"Other": string("x")},
            {"awstraceheader": string("x")},
            {"AWSTraceHeader": {"DataType": "Number", "StringValue": "1"}},
            {"AWSTraceHeader": {"DataType": "Binary", "BinaryValue": b"x"}},
            {"AWSTraceHeader": string("x"), "Other": string("x")},
            {"AWSTraceHeader": string("")},
            {"AWSTraceHeader": string("\0")},
        ):
            with self.subTest(attributes):
                self.refuse_value(MessageSystemAttributes=attributes)

    def test_a_trace_header_comes_as_a_parameter_or_a_header(self):
        parameter = {"MessageSystemAttributes": {"AWSTraceHeader": string("Root=1")}}
        header = {"headers": [("X-Amzn-Trace-Id", "Root=2")]}
        for name, given, expected, digested in (
            ("neither", {}, None, False),
            ("a parameter", parameter, "Root=1", True),
            ("a header", header, "Root=2", False),
            ("both", {**parameter, **header}, "Root=1", True),
        ):
            with self.subTest(name):
                output = self.send(self.url, **given)
                self.assertEqual("MD5OfMessageSystemAttributes" in output, digested)
                (message,) = self.sqs.receive(self.url, AttributeNames=["AWSTraceHeader"])
                expected = {"AWSTraceHeader": expected} if expected else None
                self.assertEqual(message.get("Attributes"), expected)

    def test_a_group_is_accepted_on_a_standard_queue(self):
        for group in ("g", "!-~", "a" * 128, "(x)[y]{z}"):
            with self.subTest(group):
                message = self.sent(MessageGroupId=group)
                self.assertEqual(message["Attributes"]["MessageGroupId"], group)
                self.assertNotIn("SequenceNumber", message["Attributes"])
                self.sqs("PurgeQueue", QueueUrl=self.url)
        for group in ("group 123", "", "a" * 129, "a\n", "h\u00e9"):
            with self.subTest(group):
                text = (
                    f"Value {group} for parameter MessageGroupId is invalid. Reason:"
                    " MessageGroupId can only include alphanumeric and punctuation characters."
                    " 1 to 128 in length."
                )
                self.refuse_value(text, MessageGroupId=group)

    def test_a_deduplication_id_is_not_accepted_on_a_standard_queue(self):
        self.refuse_value(MessageDeduplicationId="d")
        self.refuse_value(MessageDeduplicationId="d", MessageGroupId="g")

    def test_system_attributes_are_set_by_the_service(self):
        self.clock.now += 0.5
        message = self.sent()
        self.assertEqual(
            {name: value for name, value in message["Attributes"].items() if name != "SenderId"},
            {
                "SentTimestamp": f"{EXAMPLE_TIME}500",
                "ApproximateFirstReceiveTimestamp": f"{EXAMPLE_TIME}500",
                "ApproximateReceiveCount": "1",
            },
        )
        self.assertTrue(message["Attributes"]["SenderId"])
        self.assertNotIn("MessageAttributes", message)
        self.assertNotIn("MD5OfMessageAttributes", message)

    def test_each_message_has_an_id_of_its_own(self):
        ids = {self.send(self.url, "same")["MessageId"] for _ in range(9)}
        self.assertEqual(len(ids), 9)
        self.assertTrue(all(UUID.fullmatch(name) for name in ids))
        self.assertEqual(self.sqs.bodies(self.url), ["same"] * 9)


# ==== Purging, tags, permissions, listing ====


class PurgeTest(Spoken):
    def test_a_purge_drops_all_messages_of_its_queue(self):
        url, other = self.sqs.queue("jobs"), self.sqs.queue("other")
        for seconds in (0, 0, 9):
            self.send(url, DelaySeconds=seconds)
            self.send(other, DelaySeconds=seconds)
        for at in (url, other):
            self.sqs.receive(at)
            self.assertEqual(self.counts(at), (1, 1, 1))
        self.sqs("PurgeQueue", QueueUrl=url)
        self.assertEqual((self.counts(url), self.counts(other)), ((0, 0, 0), (1, 1, 1)))
        self.clock.now += 30
        self.assertEqual(self.sqs.bodies(url), [])
        self.assertEqual(self.sqs.bodies(other), ["hello"] * 3)
        self.send(url, "new")
        self.assertEqual(self.sqs.bodies(url), ["new"])

    def test_a_purge_can_be_repeated_at_once(self):
        url = self.sqs.queue("jobs")
        for _ in range(3):
            self.send(url)
            self.sqs("PurgeQueue", QueueUrl=url)
            self.assertEqual(self.counts(url), (0, 0, 0))

    def test_with_a_cooldown_a_queue_is_purged_every_60_seconds(self):
        self.start(cooldown=True)
        url, other = self.sqs.queue("jobs"), self.sqs.queue("other")
        text = "Only one PurgeQueue operation on jobs is allowed every 60 seconds."
        code, shape = SQS + "PurgeQueueInProgress", MODELLED + "PurgeQueueInProgress"
        self.sqs("PurgeQueue", QueueUrl=url)
        self.sqs("PurgeQueue", QueueUrl=other)
        self.send(url)
        for seconds in (0, 59):
            self.clock.now = EXAMPLE_TIME + seconds
            given = {"status": 403, "shape": shape, "QueueUrl": url}
            self.refused(code, "PurgeQueue", text, **given)
            self.assertEqual(self.counts(url), (1, 0, 0))
        self.clock.now = EXAMPLE_TIME + 60
        self.sqs("PurgeQueue", QueueUrl=url)
        self.assertEqual(self.counts(url), (0, 0, 0))


class TagsTest(Spoken):
    def tags(self, url):
        return self.sqs("ListQueueTags", QueueUrl=url).get("Tags", {})

    def test_tags_are_added_changed_and_removed(self):
        url, other = self.sqs.queue("jobs"), self.sqs.queue("other")
        self.sqs("TagQueue", QueueUrl=url, Tags={"a": "1", "A": "2", "": "empty", "b": ""})
        self.sqs("TagQueue", QueueUrl=url, Tags={"a": "3", "c": "4"})
        self.assertEqual(self.tags(url), {"a": "3", "A": "2", "": "empty", "b": "", "c": "4"})
        self.sqs("UntagQueue", QueueUrl=url, TagKeys=["a", "unheard-of", "c", "a"])
        self.assertEqual(self.tags(url), {"A": "2", "": "empty", "b": ""})
        self.sqs("UntagQueue", QueueUrl=url, TagKeys=["A", "", "b"])
        self.assertEqual(self.sqs("ListQueueTags", QueueUrl=url), {})
        self.assertEqual(self.tags(other), {})

    def test_fifty_tags_are_kept(self):
        url = self.sqs.queue("jobs")
        tags = {f"key-{number}": f"{number}" for number in range(50)}
        self.sqs("TagQueue", QueueUrl=url, Tags=tags)
        self.assertEqual(self.tags(url), tags)


class PermissionTest(Spoken):
    def start(self):
        super().start()
        self.url = self.sqs.queue("jobs")

    def add(self, label, accounts=(ACCOUNT,), actions=("SendMessage",)):
        self.sqs(
            "AddPermission",
            QueueUrl=self.url,
            Label=label,
            AWSAccountIds=list(accounts),
            Actions=list(actions),
        )

    def remove(self, label):
        self.sqs("RemovePermission", QueueUrl=self.url, Label=label)

    def policy(self):
        shown = self.attributes(self.url, "Policy")
        return json.loads(shown["Policy"]) if shown else None

    def statement(self, label, principal=f"arn:aws:iam::{ACCOUNT}:root", action="SQS:SendMessage"):
        return {
            "Sid": label,
            "Effect": "Allow",
            "Principal": {"AWS": principal},
            "Action": action,
            "Resource": arn("jobs"),
        }

    def test_permissions_are_statements_of_the_policy(self):
        base = {"Version": "2008-10-17", "Id": f"{arn('jobs')}/SQSDefaultPolicy"}
        self.add("one")
        one = self.statement("one")
        self.assertEqual(self.policy(), {**base, "Statement": [one]})
        self.add("two", (ACCOUNT, OTHER_ACCOUNT), ("SendMessage", "ReceiveMessage"))
        two = self.statement(
            "two",
            [f"arn:aws:iam::{account}:root" for account in (ACCOUNT, OTHER_ACCOUNT)],
            ["SQS:SendMessage", "SQS:ReceiveMessage"],
        )
        self.assertEqual(self.policy(), {**base, "Statement": [one, two]})
        self.remove("one")
        self.assertEqual(self.policy(), {**base, "Statement": [two]})
        self.remove("two")
        self.assertIsNone(self.policy())
        self.assertNotIn("Policy", self.attributes(self.url))
        self.add("one", actions=["*"])
        all_of_it = self.statement("one", action="SQS:*")
        self.assertEqual(self.policy(), {**base, "Statement": [all_of_it]})

    def test_permissions_join_a_policy_that_is_there(self):
        own = {"Sid": "own", "Effect": "Deny", "Principal": "*", "Action": "*", "Resource": "*"}
        document = {"Version": "2012-10-17", "Id": "mine", "Statement": [own]}
        for statements in ([own], own):
            with self.subTest(statements):
                self.set(self.url, Policy=json.dumps({**document, "Statement": statements}))
                self.add("one")
                both = [own, self.statement("one")]
                self.assertEqual(self.policy(), {**document, "Statement": both})
                self.remove("own")
                self.remove("one")
                self.assertIsNone(self.policy())

    def test_a_label_is_used_once(self):
        self.add("one")
        before = self.policy()
        self.refused(
            INVALID,
            "AddPermission",
            "Value one for parameter Label is invalid. Reason: Already exists.",
            QueueUrl=self.url,
            Label="one",
            AWSAccountIds=[OTHER_ACCOUNT],
            Actions=["ReceiveMessage"],
        )
        self.assertEqual(self.policy(), before)

    def test_a_label_that_is_not_there_cannot_be_removed(self):
        text = "Value two for parameter Label is invalid. Reason: can't find label."
        given = {"QueueUrl": self.url, "Label": "two"}
        self.refused(INVALID, "RemovePermission", text, **given)
        self.add("one")
        self.refused(INVALID, "RemovePermission", text, **given)

    def test_up_to_seven_actions_can_be_named(self):
        seven = ["SendMessage", "ReceiveMessage", "DeleteMessage", "GetQueueUrl", "PurgeQueue"]
        seven += ["ChangeMessageVisibility", "GetQueueAttributes"]
        self.add("seven", actions=seven)
        (statement,) = self.policy()["Statement"]
        self.assertEqual(statement["Action"], [f"SQS:{action}" for action in seven])
        self.refused(
            "OverLimit",
            "AddPermission",
            status=403,
            shape=MODELLED + "OverLimit",
            QueueUrl=self.url,
            Label="eight",
            AWSAccountIds=[ACCOUNT],
            Actions=[*seven, "ListQueueTags"],
        )

    def test_what_names_nobody_or_nothing_is_refused(self):
        for accounts, actions in (([], ["SendMessage"]), ([ACCOUNT], []), ([ACCOUNT], ["Foo"])):
            with self.subTest(accounts=accounts, actions=actions):
                with self.assertRaises(Refused) as caught:
                    self.add("one", accounts, actions)
                self.assertEqual(caught.exception.status, 400)
                self.assertIsNone(self.policy())


class ListTest(Spoken):
    def pages(self, operation, member, **given):
        """Return the lengths of the pages of a listing, and all that is on them."""
        lengths, found = [], []
        while True:
            output = self.sqs(operation, **given)
            page = output.get(member, [])
            lengths.append(len(page))
            found += page
            if "NextToken" not in output:
                return lengths, found
            self.assertLess(len(lengths), 50)
            given["NextToken"] = output["NextToken"]

    def test_queues_are_listed_by_prefix(self):
        urls = {name: self.sqs.queue(name) for name in ("b", "a", "ab", "abc", "B")}
        for prefix, names in (
            ("", ["B", "a", "ab", "abc", "b"]),
            ("a", ["a", "ab", "abc"]),
            ("ab", ["ab", "abc"]),
            ("abc", ["abc"]),
            ("abcd", []),
            ("b", ["b"]),
            ("c", []),
        ):
            with self.subTest(prefix):
                output = self.sqs("ListQueues", QueueNamePrefix=prefix)
                expected = {"QueueUrls": [urls[name] for name in names]} if names else {}
                self.assertEqual(output, expected)
        self.assertEqual(len(self.sqs("ListQueues")["QueueUrls"]), 5)

    def test_a_listing_comes_in_pages_where_a_page_was_asked_for(self):
        dead = self.sqs.queue("dead")
        urls = [self.sqs.queue(f"q{n}", RedrivePolicy=redrive("dead", 1)) for n in range(7)]
        self.sqs.queue("r")
        for operation, member, given in (
            ("ListQueues", "QueueUrls", {"QueueNamePrefix": "q"}),
            ("ListDeadLetterSourceQueues", "queueUrls", {"QueueUrl": dead}),
        ):
            for size, lengths in (
                (1, [1] * 7),
                (3, [3, 3, 1]),
                (6, [6, 1]),
                (7, [7]),
                (8, [7]),
                (1000, [7]),
                (None, [7]),
            ):
                with self.subTest(operation, size=size):
                    asked = {**given, "MaxResults": size} if size else given
                    self.assertEqual(self.pages(operation, member, **asked), (lengths, urls))

    def test_a_page_goes_on_where_the_last_one_ended_whatever_came_or_went(self):
        urls = [self.sqs.queue(name) for name in ("a", "c", "e")]
        first = self.sqs("ListQueues", MaxResults=2)
        self.assertEqual(first["QueueUrls"], urls[:2])
        self.sqs("DeleteQueue", QueueUrl=urls[1])
        d = self.sqs.queue("d")
        self.sqs.queue("b")
        second = self.sqs("ListQueues", MaxResults=2, NextToken=first["NextToken"])
        self.assertEqual(second, {"QueueUrls": [d, urls[2]]})

    def test_a_thousand_at_most_are_listed_at_once(self):
        for number in range(1001):
            self.sqs.queue(f"q{number}")
        output = self.sqs("ListQueues")
        self.assertEqual((len(output["QueueUrls"]), "NextToken" in output), (1000, False))
        lengths, found = self.pages("ListQueues", "QueueUrls", MaxResults=1000)
        self.assertEqual((lengths, len(set(found))), ([1000, 1], 1001))

    def test_a_page_or_token_that_makes_no_sense_is_refused(self):
        self.sqs.queue("jobs")
        tokens = ["garbage!", "=", "a", "/w==", "\u00e9"]
        if self.protocol == "json":
            tokens.append("\ud800")
        for given in (
            *({"MaxResults": size} for size in (0, -1, 1001, 10**17)),
            *({"MaxResults": 1, "NextToken": token} for token in tokens),
        ):
            with self.subTest(given):
                self.refused(INVALID, "ListQueues", **given)


# ==== Message digests ====


class DigestTest(Spoken):
    def test_a_body_is_digested_as_utf_8(self):
        url = self.sqs.queue()
        for body, expected in (
            ("message", "78e731027d8fd50ed642340b7c9a63b3"),
            ("hello", "5d41402abc4b2a76b9719d911017c592"),
            ("test", "098f6bcd4621d373cade4e832627b4f6"),
            ("h\u00e9", "33fcd01258e6ba07ef405dc9e721f3a7"),
        ):
            with self.subTest(body):
                self.assertEqual(self.send(url, body)["MD5OfMessageBody"], expected)
                (message,) = self.sqs.receive(url)
                self.assertEqual((message["Body"], message["MD5OfBody"]), (body, expected))

    def test_attributes_are_digested_by_name_type_and_value(self):
        url = self.sqs.queue()
        trace = b"traceparent\x1e00-774062d6c37081a5a0b9b5b88e30627c-2d2482211f6489da-01"
        for expected, attributes in (
            ("a45daa70926828a2f0a1db3418e6feb4", {"k": string("x")}),
            (
                "d838729972a4b70e2d2acd9d59ac847c",
                {
                    "color": string("blue"),
                    "count": {"DataType": "Number", "StringValue": "3"},
                    "blob": {"DataType": "Binary", "BinaryValue": b"\1\2\3"},
                },
            ),
            (
                "4c360f3fdafd970e05fae2f149d997f5",
                {"General": string("Kenobi"), "Hello": string("There"), "Help.Me": string("Me")},
            ),
            (
                "fca026605781cb4126a1e9044df24232",
                {"General": string("Kenobi"), "Hello": string("There")},
            ),
            ("a311262e065454b75da111d535b8dacd", {"Hello": string("There")}),
            (
                "83fee93c1bcd8b9a5a923ffacdc636c7",
                {"Hello": string("There"), "Help.Me": string("Me")},
            ),
            (
                "235c5c510d26fb653d073faed50ae77c",
                {"timestamp": {"DataType": "Number", "StringValue": "1493147359900"}},
            ),
            (
                "8cbe4db156db8a94db8b801b7addb984",
                {"attr1": {"DataType": "Binary", "BinaryValue": trace}},
            ),
            ("ae7155c6026991b6d54b11589678bf9c", {"Foo": string("Bar")}),
            ("adb59cd4678ea5a855436b949cd07ab6", {"MyAttribute": string("foobar")}),
        ):
            with self.subTest(sorted(attributes)):
                sent = self.send(url, MessageAttributes=attributes)
                self.assertEqual(sent["MD5OfMessageAttributes"], expected)
                self.assertNotIn("MD5OfMessageSystemAttributes", sent)
                (message,) = self.sqs.receive(url, MessageAttributeNames=["All"])
                self.assertEqual(message["MD5OfMessageAttributes"], expected)
                self.assertEqual(sorted(message["MessageAttributes"]), sorted(attributes))

    def test_system_attributes_have_a_digest_of_their_own(self):
        url = self.sqs.queue()
        root = "Root=1-5759e988-bd862e3fe1be46a994272793"
        header = string(root + ";Parent=53995c3f42cd8ad8;Sampled=1")
        sent = self.send(url, MessageSystemAttributes={"AWSTraceHeader": header})
        self.assertEqual(sent["MD5OfMessageSystemAttributes"], "5ae4d5d7636402d80f4eb6d213245a88")
        self.assertNotIn("MD5OfMessageAttributes", sent)
        both = self.send(
            url,
            MessageAttributes={"Foo": string("Bar")},
            MessageSystemAttributes={"AWSTraceHeader": header},
        )
        self.assertEqual(both["MD5OfMessageSystemAttributes"], "5ae4d5d7636402d80f4eb6d213245a88")
        self.assertEqual(both["MD5OfMessageAttributes"], "ae7155c6026991b6d54b11589678bf9c")
        self.assertFalse({"MD5OfMessageAttributes"} & set(self.send(url)))


# ==== FIFO queues: what is sent ====


class FifoSendTest(Spoken):
    NO_GROUP = "The request must contain the parameter MessageGroupId."
    NO_ID = (
        "The queue should either have ContentBasedDeduplication enabled or"
        " MessageDeduplicationId provided explicitly"
    )

    def test_a_group_and_a_deduplication_id_are_required(self):
        url = self.fifo()
        shape = "com.amazon.coral.service#MissingRequiredParameterException"
        given = {"QueueUrl": url, "MessageBody": "x"}
        dedup = {"MessageDeduplicationId": "1"}
        self.refused(MISSING, "SendMessage", self.NO_GROUP, shape=shape, **given, **dedup)
        self.refused(INVALID, "SendMessage", self.NO_ID, MessageGroupId="g", **given)
        self.assertEqual(self.counts(url), (0, 0, 0))

    def test_a_batch_fails_as_a_whole_where_one_entry_lacks_them(self):
        url = self.fifo()
        good = {
            "Id": "a",
            "MessageBody": "x",
            "MessageGroupId": "g",
            "MessageDeduplicationId": "1",
        }
        for name, text, bad in (
            ("no group", self.NO_GROUP, {"MessageDeduplicationId": "2"}),
            ("no deduplication id", self.NO_ID, {"MessageGroupId": "g"}),
        ):
            with self.subTest(name):
                entries = [good, {"Id": "b", "MessageBody": "y", **bad}]
                self.refused(INVALID, "SendMessageBatch", text, QueueUrl=url, Entries=entries)
                self.assertEqual(self.counts(url), (0, 0, 0))
        sent = self.sqs("SendMessageBatch", QueueUrl=url, Entries=[good])
        self.assertEqual(len(sent["Successful"]), 1)  # a refused batch is not remembered
        self.assertEqual(self.counts(url), (1, 0, 0))

    def test_content_is_told_apart_by_its_digest(self):
        url = self.fifo(ContentBasedDeduplication="true")
        first = self.send(url, "same", MessageGroupId="g")
        again = self.send(
            url, "same", MessageGroupId="g", MessageAttributes={"other": string("attributes")}
        )
        self.assertEqual(again["MessageId"], first["MessageId"])
        self.assertNotEqual(
            self.send(url, "other", MessageGroupId="g")["MessageId"], first["MessageId"]
        )
        self.assertEqual(self.counts(url), (2, 0, 0))
        self.assertEqual(self.system(url)["MessageDeduplicationId"], sha256(b"same"))

    def test_an_explicit_id_wins_over_the_content(self):
        url = self.fifo(ContentBasedDeduplication="true")
        for body, given in (
            ("x", {"MessageDeduplicationId": "1"}),
            ("x", {"MessageDeduplicationId": "2"}),
            ("y", {"MessageDeduplicationId": "1"}),  # a duplicate
            ("x", {}),
            ("z", {"MessageDeduplicationId": sha256(b"x")}),  # a duplicate
        ):
            self.send(url, body, MessageGroupId="g", **given)
        self.assertEqual(self.sqs.bodies(url), ["x", "x", "x"])

    def test_ids_are_remembered_for_five_minutes_from_the_first_send(self):
        for name, delete in (("still there", False), ("received and deleted", True)):
            with self.subTest(name):
                self.start()
                url = self.fifo()
                (first,) = self.put(url, "a1")
                if delete:
                    self.delete(url, self.take(url)["a1"])
                for seconds in (0, 150, 149.9):
                    self.clock.now += seconds
                    (again,) = self.put(url, "a1")
                    self.assertEqual(again["MessageId"], first["MessageId"])
                self.assertEqual(self.counts(url), (0 if delete else 1, 0, 0))
                self.clock.now += 0.2
                (later,) = self.put(url, "a1")
                self.assertNotEqual(later["MessageId"], first["MessageId"])
                self.assertEqual(self.counts(url), (1 if delete else 2, 0, 0))

    def test_an_id_counts_in_the_queue_or_in_the_group(self):
        changed = {"queue": "messageGroup", "messageGroup": "queue"}
        for scope, change, expected in (
            ("queue", False, ["one"]),
            ("messageGroup", False, ["one", "two"]),
            # As recorded from AWS: what counts is the scope at creation.
            ("queue", True, ["one"]),
            ("messageGroup", True, ["one", "two"]),
        ):
            with self.subTest(scope=scope, changed=change):
                self.start()
                url = self.fifo(DeduplicationScope=scope)
                if change:
                    self.set(url, DeduplicationScope=changed[scope])
                for body, group in (("one", "a"), ("two", "b"), ("three", "a"), ("four", "b")):
                    self.send(url, body, MessageGroupId=group, MessageDeduplicationId="same")
                self.assertEqual(self.sqs.bodies(url), expected)

    def test_two_queues_remember_apart(self):
        one, two = self.fifo("one.fifo"), self.fifo("two.fifo")
        self.put(one, "a1")
        self.put(two, "a1")
        self.assertEqual((self.counts(one), self.counts(two)), ((1, 0, 0), (1, 0, 0)))

    def test_a_duplicate_in_a_batch_succeeds_and_is_not_queued(self):
        url = self.fifo()
        entry = {"MessageBody": "x", "MessageGroupId": "g", "MessageDeduplicationId": "1"}
        entries = [{"Id": "a", **entry}, {"Id": "b", **entry}]
        sent = self.sqs("SendMessageBatch", QueueUrl=url, Entries=entries)
        self.assertNotIn("Failed", sent)
        self.assertEqual([done["Id"] for done in sent["Successful"]], ["a", "b"])
        self.assertEqual(len({done["MessageId"] for done in sent["Successful"]}), 1)
        self.assertEqual(self.counts(url), (1, 0, 0))

    def test_a_purge_forgets_ids_and_locks(self):
        url = self.fifo()
        (first,) = self.put(url, "a1")
        self.take(url)
        self.sqs("PurgeQueue", QueueUrl=url)
        (again,) = self.put(url, "a1")
        self.assertNotEqual(again["MessageId"], first["MessageId"])
        self.assertEqual(self.sqs.bodies(url), ["a1"])

    def test_sequence_numbers_have_20_digits_and_rise(self):
        url = self.fifo()
        numbers = [sent["SequenceNumber"] for sent in self.put(url, "a1 b1 a2")]
        entries = [
            {
                "Id": body,
                "MessageBody": body,
                "MessageGroupId": "a",
                "MessageDeduplicationId": body,
            }
            for body in ("a3", "a4", "a5")
        ]
        batch = self.sqs("SendMessageBatch", QueueUrl=url, Entries=entries)
        numbers += [done["SequenceNumber"] for done in batch["Successful"]]
        for number in numbers:
            self.assertRegex(number, r"\A[0-9]{20}\Z")
        self.assertEqual(numbers, sorted(set(numbers)))
        received = self.sqs.receive(url, MaxNumberOfMessages=10, AttributeNames=["SequenceNumber"])
        self.assertEqual(
            {m["Body"]: m["Attributes"] for m in received},
            {
                body: {"SequenceNumber": number}
                for body, number in zip(["a1", "b1", "a2", "a3", "a4", "a5"], numbers)
            },
        )

    def test_a_standard_queue_gives_no_sequence_number(self):
        url = self.sqs.queue()
        self.assertNotIn("SequenceNumber", self.send(url))
        entries = [{"Id": "a", "MessageBody": "x"}]
        batch = self.sqs("SendMessageBatch", QueueUrl=url, Entries=entries)
        self.assertNotIn("SequenceNumber", batch["Successful"][0])

    def test_a_delay_is_the_queues_and_no_messages(self):
        url = self.fifo(DelaySeconds="5")
        text = (
            "Value 2 for parameter DelaySeconds is invalid. Reason: The request include parameter"
            " that is not valid for this queue type."
        )
        given = {"MessageBody": "x", "MessageGroupId": "a", "MessageDeduplicationId": "x"}
        self.refused(INVALID, "SendMessage", text, QueueUrl=url, DelaySeconds=2, **given)
        self.put(url, "a1", DelaySeconds=0)
        self.assertEqual(self.counts(url), (0, 0, 1))
        self.clock.now += 4.9
        self.assertEqual(self.sqs.bodies(url), [])
        self.clock.now += 0.1
        self.assertEqual(self.sqs.bodies(url), ["a1"])

    def test_a_changed_delay_holds_for_what_a_fifo_queue_has_but_not_a_standard_one(self):
        fifo, standard = self.fifo(DelaySeconds="10"), self.sqs.queue(DelaySeconds="10")
        self.put(fifo, "a1 a2")
        self.send(standard)
        self.clock.now += 2
        for url in (fifo, standard):
            self.set(url, DelaySeconds="5")
        self.clock.now += 2.9
        self.assertEqual(self.sqs.bodies(fifo), [])
        self.clock.now += 0.2
        self.assertEqual(self.sqs.bodies(fifo), ["a1", "a2"])
        self.assertEqual(self.sqs.bodies(standard), [])
        self.clock.now += 4.9
        self.assertEqual(self.sqs.bodies(standard), ["hello"])


# ==== FIFO queues: what is received ====


class FifoReceiveTest(Spoken):
    def test_one_group_is_emptied_before_the_next(self):
        for most, expected in (
            (1, ["a1"]),
            (2, ["a1", "a2"]),
            (3, ["a1", "a2", "b1"]),
            (10, ["a1", "a2", "b1", "b2", "c1"]),
        ):
            with self.subTest(most):
                self.start()
                url = self.fifo()
                self.put(url, "a1 b1 a2 c1 b2")
                self.assertEqual(self.sqs.bodies(url, MaxNumberOfMessages=most), expected)

    def test_a_group_in_flight_is_locked_until_all_of_it_is_deleted(self):
        url = self.fifo()
        self.put(url, "a1 a2 a3")
        held = self.take(url, MaxNumberOfMessages=2)
        self.assertEqual(list(held), ["a1", "a2"])
        self.assertEqual(self.sqs.bodies(url), [])
        self.put(url, "a4 b1")
        self.assertEqual(self.sqs.bodies(url), ["b1"])
        self.delete(url, held["a2"])
        self.assertEqual(self.sqs.bodies(url), [])
        self.delete(url, held["a1"])
        self.assertEqual(self.sqs.bodies(url), ["a3", "a4"])

    def test_a_batch_of_deletes_frees_the_group(self):
        url = self.fifo()
        self.put(url, "a1 a2 a3")
        held = self.take(url, MaxNumberOfMessages=2)
        entries = [{"Id": body, "ReceiptHandle": handle} for body, handle in held.items()]
        self.sqs("DeleteMessageBatch", QueueUrl=url, Entries=entries)
        self.assertEqual(self.sqs.bodies(url), ["a3"])

    def test_a_group_that_was_emptied_can_be_filled_again(self):
        url = self.fifo()
        for body in ("a1", "a2", "a3"):
            self.put(url, body)
            self.delete(url, self.take(url)[body])
            self.assertEqual(self.sqs.bodies(url), [])

    def test_messages_come_back_in_their_order(self):
        url = self.fifo(VisibilityTimeout="10")
        self.put(url, "a1 a2 a3 a4")
        held = self.take(url, MaxNumberOfMessages=3)
        self.delete(url, held["a2"])
        self.clock.now += 9.9
        self.assertEqual(self.sqs.bodies(url), [])
        self.clock.now += 0.1
        self.assertEqual(self.sqs.bodies(url), ["a1", "a3", "a4"])

    def test_no_timeout_sends_the_group_to_the_end_of_the_rotation(self):
        url = self.fifo()
        self.put(url, "a1 a2 b1 b2 c1 c2")
        for expected in (["a1", "a2"], ["b1", "b2"], ["c1", "c2"], ["a1", "a2"]):
            given = {"MaxNumberOfMessages": 2, "VisibilityTimeout": 0}
            self.assertEqual(self.sqs.bodies(url, **given), expected)
        self.assertEqual(self.counts(url), (6, 0, 0))

    def test_an_extended_message_blocks_itself_and_later_ones_of_its_group(self):
        for index, expected in ((0, []), (1, ["a1"]), (2, ["a1", "a2"])):
            with self.subTest(index):
                self.start()
                url = self.fifo()
                self.put(url, "a1 a2 a3")
                held = list(self.take(url, VisibilityTimeout=30).values())
                self.change(url, held[index], 60)
                self.clock.now += 30
                self.assertEqual(self.sqs.bodies(url), expected)

    def test_a_message_made_visible_is_served_if_nothing_earlier_is_hidden(self):
        for name, bodies, expected in (
            ("first", ["a1"], ["a1"]),
            ("second", ["a2"], []),
            ("last", ["a3"], []),
            ("first two", ["a1", "a2"], ["a1", "a2"]),
            ("first and last", ["a1", "a3"], ["a1"]),
            ("all, backwards", ["a3", "a2", "a1"], ["a1", "a2", "a3", "a4"]),
        ):
            with self.subTest(name):
                self.start()
                url = self.fifo()
                self.put(url, "a1 a2 a3 a4")
                held = self.take(url, MaxNumberOfMessages=3)
                for body in bodies:
                    self.change(url, held[body], 0)
                self.assertEqual(self.sqs.bodies(url), expected)

    def test_what_is_left_of_a_group_is_served_with_what_follows(self):
        url = self.fifo()
        self.put(url, "a1 a2 a3")
        held = self.take(url, MaxNumberOfMessages=2)
        self.delete(url, held["a1"])
        self.change(url, held["a2"], 0)
        self.assertEqual(self.sqs.bodies(url), ["a2", "a3"])

    def test_a_delayed_message_blocks_later_ones_of_its_group_alone(self):
        url = self.fifo(DelaySeconds="10")
        self.put(url, "a1 b1")
        self.clock.now += 5
        self.put(url, "a2 b2")
        self.assertEqual(self.counts(url), (0, 0, 4))
        self.clock.now += 5
        self.assertEqual(self.counts(url), (2, 0, 2))
        held = self.take(url)
        self.assertEqual(list(held), ["a1", "b1"])
        self.delete(url, held["a1"])
        self.assertEqual(self.sqs.bodies(url), [])
        self.clock.now += 5
        self.assertEqual(self.sqs.bodies(url), ["a2"])

    def test_messages_locked_behind_others_are_counted_as_visible(self):
        url = self.fifo()
        self.put(url, "a1 a2 b1 b2 c1 c2")
        self.assertEqual(self.counts(url), (6, 0, 0))
        held = self.take(url, MaxNumberOfMessages=2)
        self.assertEqual(self.counts(url), (4, 2, 0))
        self.delete(url, held["a1"])
        self.assertEqual(self.counts(url), (4, 1, 0))
        self.clock.now += 30
        self.assertEqual(self.counts(url), (5, 0, 0))

    def test_an_expired_handle_deletes_nothing(self):
        url = self.fifo(VisibilityTimeout="10")
        self.put(url, "a1")
        handle = self.take(url)["a1"]
        self.clock.now += 10
        text = (
            f"Value {handle} for parameter ReceiptHandle is invalid. Reason: The receipt handle"
            " has expired."
        )
        self.refused(INVALID, "DeleteMessage", text, QueueUrl=url, ReceiptHandle=handle)
        self.assertEqual(self.sqs.bodies(url), ["a1"])

    def test_a_handle_that_was_extended_deletes(self):
        url = self.fifo(VisibilityTimeout="10")
        self.put(url, "a1 a2")
        handle = self.take(url, MaxNumberOfMessages=1)["a1"]
        self.clock.now += 9
        self.change(url, handle, 10)
        self.clock.now += 9
        self.delete(url, handle)
        self.assertEqual(self.sqs.bodies(url), ["a2"])

    def test_an_attempt_can_be_repeated(self):
        url = self.fifo(VisibilityTimeout="30")
        self.put(url, "a1 a2 b1")
        first = self.take(url, MaxNumberOfMessages=2, ReceiveRequestAttemptId="x")
        self.assertEqual(list(first), ["a1", "a2"])
        self.clock.now += 20
        self.assertEqual(self.take(url, ReceiveRequestAttemptId="x"), first)
        self.assertEqual(self.sqs.bodies(url), ["b1"])
        self.clock.now += 29  # the timeout began again
        self.assertEqual(self.sqs.bodies(url, ReceiveRequestAttemptId="y"), [])
        self.clock.now += 1
        self.assertEqual(self.sqs.bodies(url), ["a1", "a2", "b1"])

    def test_an_attempt_is_not_repeated_once_its_messages_were_deleted(self):
        url = self.fifo()
        self.put(url, "a1 a2")
        given = {"MaxNumberOfMessages": 1, "ReceiveRequestAttemptId": "x"}
        self.delete(url, self.take(url, **given)["a1"])
        self.assertNotIn("a1", self.sqs.bodies(url, **given))
        self.assertEqual(sum(self.counts(url)), 1)

    def test_an_attempt_is_forgotten_after_five_minutes(self):
        url = self.fifo(VisibilityTimeout="600")
        self.put(url, "a1")
        handles = self.take(url, ReceiveRequestAttemptId="x")
        self.clock.now += 299
        self.assertEqual(self.take(url, ReceiveRequestAttemptId="x"), handles)
        self.start()
        url = self.fifo(VisibilityTimeout="600")
        self.put(url, "a1")
        self.take(url, ReceiveRequestAttemptId="x")
        self.clock.now += 301
        self.assertEqual(self.take(url, ReceiveRequestAttemptId="x"), {})


# ==== Receiving ====


class Leaving:
    """A proxy whose clients go away when `gone` is set."""

    def __init__(self, proxy):
        self.proxy = proxy
        self.gone = threading.Event()

    def handle(self, request):
        return self.proxy.handle(dataclasses.replace(request, abandoned=self.gone.is_set))


class ReceiveTest(Spoken):
    def test_numbers_out_of_range_are_refused(self):
        url = self.sqs.queue()
        self.send(url)
        for name, value, reason in (
            ("MaxNumberOfMessages", 0, "Must be between 1 and 10, if provided."),
            ("MaxNumberOfMessages", 11, "Must be between 1 and 10, if provided."),
            ("MaxNumberOfMessages", -1, "Must be between 1 and 10, if provided."),
            ("WaitTimeSeconds", -1, "Must be >= 0 and <= 20, if provided."),
            ("WaitTimeSeconds", 21, "Must be >= 0 and <= 20, if provided."),
            ("VisibilityTimeout", -1, None),
            ("VisibilityTimeout", 43201, None),
        ):
            with self.subTest(name, value=value):
                text = (
                    reason and f"Value {value} for parameter {name} is invalid. Reason: {reason}"
                )
                shape = "com.amazon.coral.service#InvalidParameterValueException"
                given = {"QueueUrl": url, name: value}
                self.refused(INVALID, "ReceiveMessage", text, shape=shape, **given)
        self.assertEqual(self.counts(url), (1, 0, 0))

    def test_numbers_at_the_edge_of_their_range_are_taken(self):
        for name, value in (
            ("MaxNumberOfMessages", 1),
            ("MaxNumberOfMessages", 10),
            ("WaitTimeSeconds", 0),
            ("WaitTimeSeconds", 20),
            ("VisibilityTimeout", 0),
            ("VisibilityTimeout", 43200),
        ):
            with self.subTest(name, value=value):
                self.start()
                url = self.sqs.queue()
                self.send(url)
                self.assertEqual(len(self.sqs.receive(url, **{name: value})), 1)
                self.assertEqual(self.clock.now, EXAMPLE_TIME)

    def test_one_message_is_received_unless_more_are_asked_for(self):
        url = self.sqs.queue()
        for body in "abcdefghijkl":
            self.send(url, body)
        self.assertEqual(len(self.sqs.receive(url)), 1)
        self.assertEqual(len(self.sqs.receive(url, MaxNumberOfMessages=10)), 10)
        self.assertEqual(len(self.sqs.receive(url, MaxNumberOfMessages=10)), 1)

    def test_a_message_is_hidden_until_its_timeout_ends(self):
        url = self.sqs.queue(VisibilityTimeout="7")
        self.send(url)
        for given, seconds in (({}, 7), ({"VisibilityTimeout": 12}, 12), ({}, 7)):
            self.assertEqual(self.sqs.bodies(url, **given), ["hello"])
            self.clock.now += seconds - 0.1
            self.assertEqual(self.sqs.bodies(url), [])
            self.assertEqual(self.counts(url), (0, 1, 0))
            self.clock.now += 0.1
            self.assertEqual(self.counts(url), (1, 0, 0))

    def test_an_empty_queue_is_waited_for_as_asked(self):
        for name, attribute, given, expected in (
            ("nothing asked", "0", {}, 0),
            ("the parameter", "0", {"WaitTimeSeconds": 7}, 7),
            ("the queue's attribute", "5", {}, 5),
            ("the parameter wins", "5", {"WaitTimeSeconds": 9}, 9),
            ("no wait wins", "5", {"WaitTimeSeconds": 0}, 0),
        ):
            with self.subTest(name):
                self.start()
                url = self.sqs.queue(ReceiveMessageWaitTimeSeconds=attribute)
                self.assertEqual(self.sqs("ReceiveMessage", QueueUrl=url, **given), {})
                self.assertEqual(self.clock.now - EXAMPLE_TIME, expected)

    def test_a_queue_with_a_message_is_not_waited_for(self):
        url = self.sqs.queue()
        self.send(url)
        self.clock.after(1, lambda: self.send(url))
        given = {"WaitTimeSeconds": 20, "MaxNumberOfMessages": 10}
        self.assertEqual(self.sqs.bodies(url, **given), ["hello"])
        self.assertEqual(self.clock.now, EXAMPLE_TIME)

    def test_a_waiter_is_woken_by_what_brings_a_message(self):
        def after(seconds, act, *values, **given):
            self.clock.after(seconds, lambda: act(*values, **given))

        def send():
            url = self.sqs.queue()
            after(3, self.send, url)
            after(4, self.send, url, "too late")
            return url

        def send_batch():
            url = self.sqs.queue()
            entries = [{"Id": "a", "MessageBody": "hello"}]
            after(3, self.sqs, "SendMessageBatch", QueueUrl=url, Entries=entries)
            return url

        def delayed():
            url = self.sqs.queue()
            self.send(url, DelaySeconds=4)
            return url

        def delayed_later():
            url = self.sqs.queue()
            after(2, self.send, url, DelaySeconds=3)
            return url

        def in_flight(seconds):
            url = self.sqs.queue()
            self.send(url)
            return url, self.take(url, VisibilityTimeout=seconds)["hello"]

        def timed_out():
            return in_flight(6)[0]

        def changed(seconds):
            url, handle = in_flight(6)
            after(3, self.change, url, handle, seconds)
            return url

        def changed_in_batch():
            url, handle = in_flight(30)
            entries = [{"Id": "a", "ReceiptHandle": handle, "VisibilityTimeout": 0}]
            after(3, self.sqs, "ChangeMessageVisibilityBatch", QueueUrl=url, Entries=entries)
            return url

        def dead():
            url, dead = self.dead_letters()
            self.send(url)
            self.take(url, VisibilityTimeout=4)
            after(5, self.take, url)
            return dead

        def locked():
            url = self.fifo()
            self.put(url, "a1")
            self.send(url, MessageGroupId="a", MessageDeduplicationId="a2")
            return url, self.take(url, MaxNumberOfMessages=1, VisibilityTimeout=6)["a1"]

        def deleted_before():
            url, handle = locked()
            after(3, self.delete, url, handle)
            return url

        def deleted_before_in_batch():
            url, handle = locked()
            entries = [{"Id": "a", "ReceiptHandle": handle}]
            after(3, self.sqs, "DeleteMessageBatch", QueueUrl=url, Entries=entries)
            return url

        def fifo_delayed():
            url = self.fifo(DelaySeconds="4")
            self.send(url, MessageGroupId="a", MessageDeduplicationId="a1")
            return url

        def purged():
            url = self.sqs.queue()
            self.send(url, DelaySeconds=5)
            after(3, self.sqs, "PurgeQueue", QueueUrl=url)
            return url

        for name, plan, expected in (
            ("a send", send, (3, ["hello"])),
            ("a batch", send_batch, (3, ["hello"])),
            ("the end of a delay", delayed, (4, ["hello"])),
            ("the end of a delay that began meanwhile", delayed_later, (5, ["hello"])),
            ("the end of a timeout", timed_out, (6, ["hello"])),
            ("a timeout ended", lambda: changed(0), (3, ["hello"])),
            ("a timeout shortened", lambda: changed(2), (5, ["hello"])),
            ("a timeout prolonged", lambda: changed(10), (13, ["hello"])),
            ("a timeout ended in a batch", changed_in_batch, (3, ["hello"])),
            ("a dead letter", dead, (5, ["hello"])),
            ("the message before it deleted", deleted_before, (3, ["hello"])),
            ("the message before it deleted in a batch", deleted_before_in_batch, (3, ["hello"])),
            ("the message before it back", lambda: locked()[0], (6, ["a1", "hello"])),
            ("the end of a FIFO queue's delay", fifo_delayed, (4, ["hello"])),
            ("not by a purge", purged, (20, [])),
        ):
            with self.subTest(name):
                self.start()
                url = plan()
                bodies = self.sqs.bodies(url, WaitTimeSeconds=20)
                self.assertEqual((self.clock.now - EXAMPLE_TIME, bodies), expected)

    def test_each_receive_is_counted_and_has_a_handle_of_its_own(self):
        url = self.sqs.queue()
        self.clock.now += 0.25
        self.send(url)
        self.clock.now += 1.5
        first = None
        handles = set()
        for count in (1, 2, 3):
            (message,) = self.sqs.receive(url, VisibilityTimeout=5, AttributeNames=["All"])
            first = first or message["MessageId"]
            handles.add(message["ReceiptHandle"])
            self.assertEqual(message["MessageId"], first)
            self.assertLessEqual(
                {
                    "ApproximateReceiveCount": str(count),
                    "ApproximateFirstReceiveTimestamp": str(EXAMPLE_TIME * 1000 + 1750),
                    "SentTimestamp": str(EXAMPLE_TIME * 1000 + 250),
                }.items(),
                message["Attributes"].items(),
            )
            self.clock.now += 5
        self.assertEqual(len(handles), 3)

    def test_system_attributes_are_given_as_asked(self):
        always = "SenderId SentTimestamp ApproximateReceiveCount ApproximateFirstReceiveTimestamp"
        fifo = always + " SequenceNumber MessageDeduplicationId MessageGroupId"
        traced = {"MessageSystemAttributes": {"AWSTraceHeader": string("Root=1")}}
        group = {"MessageGroupId": "g"}
        for name, kind, given, asked, expected in (
            ("none", "", {}, [], ""),
            ("all", "", {}, ["All"], always),
            ("all, traced", "", traced, ["All"], always + " AWSTraceHeader"),
            ("all, with a group", "", group, ["All"], always + " MessageGroupId"),
            ("all of FIFO", ".fifo", {}, ["All"], fifo),
            ("some", "", traced, ["SenderId", "AWSTraceHeader"], "SenderId AWSTraceHeader"),
            ("one of FIFO", ".fifo", {}, ["MessageGroupId"], "MessageGroupId"),
            ("one that does not apply", "", {}, ["SequenceNumber", "SenderId"], "SenderId"),
            ("none that applies", "", {}, ["DeadLetterQueueSourceArn"], ""),
            ("unknown", "", {}, ["Foobar", "SenderId"], "SenderId"),
        ):
            for member in ("AttributeNames", "MessageSystemAttributeNames"):
                with self.subTest(name, member=member):
                    self.start()
                    if kind:
                        url = self.fifo()
                        self.put(url, "g1", **given)
                    else:
                        url = self.sqs.queue()
                        self.send(url, **given)
                    (message,) = self.sqs.receive(url, **{member: asked})
                    shown = message.get("Attributes", {})
                    self.assertEqual(sorted(shown), sorted(expected.split()))
                    self.assertEqual("Attributes" in message, bool(expected))

    def test_system_attributes_asked_for_by_either_name_are_a_union(self):
        url = self.sqs.queue()
        self.send(url)
        if self.protocol == "json":
            given = {
                "AttributeNames": ["SenderId"],
                "MessageSystemAttributeNames": ["SentTimestamp"],
            }
            (message,) = self.sqs.receive(url, **given)
        else:
            fields = {
                "Action": "ReceiveMessage",
                "QueueUrl": url,
                "AttributeName.1": "SenderId",
                "MessageSystemAttributeName.1": "SentTimestamp",
            }
            kind = (("Content-Type", "application/x-www-form-urlencoded"),)
            body = urllib.parse.urlencode(fields).encode()
            (message,) = self.sqs.send("ReceiveMessage", "POST", "/", kind, body)["Messages"]
        self.assertEqual(sorted(message["Attributes"]), ["SenderId", "SentTimestamp"])

    def test_message_attributes_are_chosen_by_name_and_digested_as_chosen(self):
        url = self.sqs.queue(VisibilityTimeout="0")
        given = {"General": "Kenobi", "Hello": "There", "Help.Me": "Me"}
        attributes = {name: string(value) for name, value in given.items()}
        self.send(url, MessageAttributes=attributes)
        everything = "4c360f3fdafd970e05fae2f149d997f5"
        general_hello = "fca026605781cb4126a1e9044df24232"
        hello = "a311262e065454b75da111d535b8dacd"
        hello_help = "83fee93c1bcd8b9a5a923ffacdc636c7"
        for names, expected, digest in (
            ([], "", None),
            (["All"], "General Hello Help.Me", everything),
            ([".*"], "General Hello Help.Me", everything),
            (["*"], "General Hello Help.Me", everything),
            (["Hello"], "Hello", hello),
            (["Hello", "General"], "General Hello", general_hello),
            (["Hel.*"], "Hello Help.Me", hello_help),
            (["Hello.*"], "Hello", hello),
            (["G.*", "Hello"], "General Hello", general_hello),
            (["Hello", "Hello"], "Hello", hello),
            (["hello"], "", None),
            (["Hel"], "", None),
            (["Missing"], "", None),
            (["AWS.", "..foo"], "", None),
            (["AWS.", "..foo", "Hello"], "Hello", hello),
        ):
            with self.subTest(names):
                (message,) = self.sqs.receive(url, MessageAttributeNames=names)
                chosen = {name: string(given[name]) for name in expected.split()}
                self.assertEqual(message.get("MessageAttributes", {}), chosen)
                self.assertEqual(message.get("MD5OfMessageAttributes"), digest)
                self.assertEqual("MessageAttributes" in message, bool(expected))

    def test_too_many_messages_in_flight_are_refused_on_a_standard_queue(self):
        with mock.patch.object(awsproxy, "MAX_IN_FLIGHT", 3):
            url, fifo = self.sqs.queue(), self.fifo()
            for body in ("a1", "b1", "c1", "d1"):
                self.send(url, body)
                self.put(fifo, body)
            held = self.take(url, MaxNumberOfMessages=3)
            shape = "com.amazonaws.sqs#OverLimit"
            self.refused("OverLimit", "ReceiveMessage", status=403, shape=shape, QueueUrl=url)
            self.delete(url, held["b1"])
            self.assertEqual(self.sqs.bodies(url, MaxNumberOfMessages=1), ["d1"])
            self.take(fifo, MaxNumberOfMessages=3)
            self.sqs.receive(fifo)

    def test_delayed_messages_are_not_in_flight(self):
        with mock.patch.object(awsproxy, "MAX_IN_FLIGHT", 3):
            url = self.sqs.queue()
            for body in ("a", "b", "c"):
                self.send(url, body, DelaySeconds=5)
            self.send(url, "d")
            self.assertEqual(self.counts(url), (1, 0, 3))
            self.assertEqual(self.sqs.bodies(url), ["d"])
            self.assertEqual(self.sqs.bodies(url), [])

    def test_a_client_that_hangs_up_is_handed_nothing(self):
        for name, send in (("jobs", self.send), ("jobs.fifo", lambda url: self.put(url, "a1"))):
            with self.subTest(name):
                self.start()
                url = self.sqs.queue() if name == "jobs" else self.fifo()
                poller = self.another()
                poller.proxy = Leaving(self.sqs.proxy)
                self.clock.after(3, poller.proxy.gone.set)
                self.clock.after(5, functools.partial(send, url))
                self.assertEqual(poller.receive(url, WaitTimeSeconds=20), [])
                self.assertLessEqual(self.clock.now - EXAMPLE_TIME, 5)
                for _, late in self.clock.plans:  # it was seen to leave before the message came
                    late()
                self.assertEqual(self.system(url)["ApproximateReceiveCount"], "1")

    def test_a_waiter_learns_that_its_queue_is_deleted(self):
        url = self.sqs.queue()
        self.clock.after(3, lambda: self.sqs("DeleteQueue", QueueUrl=url))
        self.refused(NO_QUEUE, "ReceiveMessage", QueueUrl=url, WaitTimeSeconds=20)
        self.assertEqual(self.clock.now - EXAMPLE_TIME, 3)


# ==== Receipt handles ====


class HandleTest(Spoken):
    def received(self, url, **given):
        self.send(url)
        return self.take(url, **given)["hello"]

    def test_a_handle_never_issued_is_refused(self):
        url, other = self.sqs.queue(), self.sqs.queue("other")
        handle, foreign = self.received(url), self.received(other)
        for name, given in (
            ("garbage", "garbage"),
            ("another queue's", foreign),
            ("cut", handle[:-4]),
            ("longer", handle + "AAAA"),
            ("altered", handle[:8] + ("A" if handle[8] != "A" else "B") + handle[9:]),
            ("its head", handle[:4]),
            ("not ASCII", "h\u00e9"),
            ("base64 of nothing", "AQEB===="),
            ("long", "A" * 5000),
        ):
            with self.subTest(name):
                text = f'The input receipt handle "{given}" is not a valid receipt handle.'
                for operation, more in (
                    ("DeleteMessage", {}),
                    ("ChangeMessageVisibility", {"VisibilityTimeout": 0}),
                ):
                    self.refused(
                        "ReceiptHandleIsInvalid",
                        operation,
                        text if name == "garbage" else None,
                        404,
                        "com.amazonaws.sqs#ReceiptHandleIsInvalid",
                        QueueUrl=url,
                        ReceiptHandle=given,
                        **more,
                    )
        self.assertEqual((self.counts(url), self.counts(other)), ((0, 1, 0), (0, 1, 0)))

    def test_what_is_required_is_missed(self):
        url = self.sqs.queue()
        handle = self.received(url)
        shape = "com.amazon.coral.service#MissingRequiredParameterException"
        for operation, given in (
            ("DeleteMessage", {}),
            ("ChangeMessageVisibility", {"VisibilityTimeout": 5}),
            ("ChangeMessageVisibility", {"ReceiptHandle": handle}),
        ):
            with self.subTest(operation, given=sorted(given)):
                self.refused(MISSING, operation, shape=shape, QueueUrl=url, **given)

    def test_deleting_succeeds_whatever_became_of_the_message(self):
        def deleted(url, handle):
            self.delete(url, handle)

        def timed_out(url, handle):
            self.clock.now += 31

        def received_again(url, handle):
            self.clock.now += 31
            self.take(url)

        def purged(url, handle):
            self.sqs("PurgeQueue", QueueUrl=url)

        def expired(url, handle):
            self.clock.now += 61

        for event in (deleted, timed_out, received_again, purged, expired):
            with self.subTest(event.__name__):
                self.start()
                url = self.sqs.queue(MessageRetentionPeriod="60")
                handle = self.received(url)
                event(url, handle)
                for _ in range(2):
                    self.assertIsNone(
                        self.sqs("DeleteMessage", QueueUrl=url, ReceiptHandle=handle)
                    )
                    self.assertEqual(self.counts(url), (0, 0, 0))

    def test_a_deleted_message_cannot_be_made_visible(self):
        for name, delete in (("deleted", True), ("expired", False)):
            with self.subTest(name):
                self.start()
                url = self.sqs.queue(MessageRetentionPeriod="60")
                handle = self.received(url)
                if delete:
                    self.delete(url, handle)
                else:
                    self.clock.now += 61
                text = (
                    f"Value {handle} for parameter ReceiptHandle is invalid. Reason: Message does"
                    " not exist or is not available for visibility timeout change."
                )
                given = {"ReceiptHandle": handle, "VisibilityTimeout": 0}
                self.refused(INVALID, "ChangeMessageVisibility", text, QueueUrl=url, **given)
                self.assertEqual(self.counts(url), (0, 0, 0))

    def test_a_message_that_is_visible_again_is_hidden_anew(self):
        url = self.sqs.queue()
        handle = self.received(url, VisibilityTimeout=5)
        self.clock.now += 6
        self.assertEqual(self.counts(url), (1, 0, 0))
        self.change(url, handle, 10)
        self.assertEqual(self.counts(url), (0, 1, 0))
        self.assertEqual(self.sqs.bodies(url), [])
        self.clock.now += 10
        self.assertEqual(self.system(url)["ApproximateReceiveCount"], "2")

    def test_a_superseded_handle_changes_the_timeout(self):
        url = self.sqs.queue()
        old = self.received(url, VisibilityTimeout=0)
        new = self.take(url, VisibilityTimeout=30)["hello"]
        self.assertNotEqual(old, new)
        self.change(url, old, 60)
        self.clock.now += 31
        self.assertEqual(self.sqs.bodies(url), [])
        self.change(url, old, 0)
        self.assertEqual(self.sqs.bodies(url), ["hello"])

    def test_a_timeout_ends_twelve_hours_after_the_receive(self):
        for name, passed, seconds, fits in (
            ("at once", 0, 43200, True),
            ("an hour later", 3600, 39600, True),
            ("an hour later, beyond", 3600, 39601, False),
            ("an hour later, as long as may be", 3600, 43200, False),
            ("too long", 0, 43201, False),
            ("negative", 0, -1, False),
        ):
            with self.subTest(name):
                self.start()
                url = self.sqs.queue(VisibilityTimeout="7200")
                handle = self.received(url)
                self.clock.now += passed
                if fits:
                    self.change(url, handle, seconds)
                    self.clock.now += seconds - 1
                    self.assertEqual(self.sqs.bodies(url), [])
                    self.clock.now += 1
                else:
                    self.refused(
                        INVALID,
                        "ChangeMessageVisibility",
                        QueueUrl=url,
                        ReceiptHandle=handle,
                        VisibilityTimeout=seconds,
                    )
                    self.clock.now += 7200 - passed
                self.assertEqual(self.sqs.bodies(url), ["hello"])

    def test_a_changed_timeout_lasts_for_this_receive_only(self):
        url = self.sqs.queue(VisibilityTimeout="10")
        self.change(url, self.received(url), 20)
        self.clock.now += 20
        self.assertEqual(self.sqs.bodies(url), ["hello"])
        self.clock.now += 9
        self.assertEqual(self.sqs.bodies(url), [])
        self.clock.now += 1
        self.assertEqual(self.sqs.bodies(url), ["hello"])


# ==== Batches ====


class BatchTest(Spoken):
    FIELDS = (
        ("SendMessageBatch", {"MessageBody": "x"}),
        ("DeleteMessageBatch", {"ReceiptHandle": "garbage"}),
        ("ChangeMessageVisibilityBatch", {"ReceiptHandle": "garbage", "VisibilityTimeout": 1}),
    )

    def batch(self, operation, url, *entries):
        return self.sqs(operation, QueueUrl=url, Entries=list(entries))

    def failed(self, output):
        """Return the codes by id of the entries that failed, all by the sender's fault."""
        for entry in output["Failed"]:
            self.assertIs(entry["SenderFault"], True)
        return {entry["Id"]: entry["Code"] for entry in output["Failed"]}

    def test_a_request_is_refused_for_its_first_fault(self):
        huge = {"MessageBody": "x" * MEBIBYTE}
        bad_id = (
            "A batch entry id can only contain alphanumeric characters, hyphens and underscores."
            " It can be at most 80 letters long."
        )
        too_long = (
            "Batch requests cannot be longer than 1048576 bytes. You have sent 2097152 bytes."
        )
        many = "Maximum number of entries per request are 10. You have sent 20."
        for operation, fields in self.FIELDS:
            sends = operation == "SendMessageBatch"
            large = huge if sends else fields
            faults = [
                ("unknown queue", "QueueDoesNotExist", None, []),
                ("empty", "EmptyBatchRequest", None, []),
                ("too many", "TooManyEntriesInBatchRequest", many, ["bad id"] * 20),
                ("an id with a blank", "InvalidBatchEntryId", bad_id, ["bad id"] * 2),
                ("an empty id", "InvalidBatchEntryId", bad_id, ["", "a", "a"]),
                ("an id too long", "InvalidBatchEntryId", bad_id, ["a", "a", "a" * 81]),
                ("an id with a dot", "InvalidBatchEntryId", bad_id, ["a", "b", "a.b"]),
                ("twice the same id", "BatchEntryIdsNotDistinct", None, ["a", "b", "a"]),
            ]
            if sends:
                faults.append(("too long", "BatchRequestTooLong", too_long, ["a", "b"]))
            url = self.fifo(operation + ".fifo")
            for name, shape, text, ids in faults:
                with self.subTest(name, operation=operation):
                    code = NO_QUEUE if shape == "QueueDoesNotExist" else SQS + shape
                    at = url if name != "unknown queue" else "http://localhost/0/none"
                    entries = [{"Id": given, **large} for given in ids]
                    shape = "com.amazonaws.sqs#" + shape
                    self.refused(code, operation, text, 400, shape, QueueUrl=at, Entries=entries)
            self.assertEqual(self.counts(url), (0, 0, 0))

    def test_ids_of_80_letters_and_ten_entries_are_taken(self):
        url = self.sqs.queue()
        ids = ["a" * 80, "A-z_9", "-", "_", "0", "1", "2", "3", "4", "5"]
        for operation, fields in self.FIELDS:
            with self.subTest(operation):
                output = self.batch(operation, url, *({"Id": given, **fields} for given in ids))
                entries = output.get("Successful", []) + output.get("Failed", [])
                self.assertEqual([entry["Id"] for entry in entries], ids)

    def test_the_size_of_a_batch_is_that_of_bodies_and_attributes(self):
        attribute = {"k": string("v")}  # 1 + 6 + 1 bytes
        header = {"AWSTraceHeader": string("Root=1")}  # does not count
        for size, attributes, sent in (
            (MEBIBYTE - 1, {}, None),
            (MEBIBYTE, {}, MEBIBYTE + 1),
            (MEBIBYTE - 9, attribute, None),
            (MEBIBYTE - 8, attribute, MEBIBYTE + 1),
        ):
            with self.subTest(size, attributes=attributes):
                self.start()
                url = self.sqs.queue()
                first = {"Id": "a", "MessageBody": "x", "MessageSystemAttributes": header}
                second = {"Id": "b", "MessageBody": "y" * size, "MessageAttributes": attributes}
                if sent:
                    text = (
                        "Batch requests cannot be longer than 1048576 bytes."
                        f" You have sent {sent} bytes."
                    )
                    self.refused(
                        SQS + "BatchRequestTooLong",
                        "SendMessageBatch",
                        text,
                        QueueUrl=url,
                        Entries=[first, second],
                    )
                    self.assertEqual(self.counts(url), (0, 0, 0))
                else:
                    output = self.batch("SendMessageBatch", url, first, second)
                    self.assertEqual(len(output["Successful"]), 2)
                    self.assertEqual(self.counts(url), (2, 0, 0))

    def test_the_limit_of_a_batch_does_not_depend_on_the_queues(self):
        url = self.sqs.queue(MaximumMessageSize="1024")
        entries = ({"Id": f"{n}", "MessageBody": "x" * 1024} for n in range(10))
        output = self.batch("SendMessageBatch", url, *entries)
        self.assertEqual(len(output["Successful"]), 10)
        self.assertNotIn("Failed", output)

    def test_entries_to_send_fail_one_by_one(self):
        url = self.sqs.queue(MaximumMessageSize="1024")
        output = self.batch(
            "SendMessageBatch",
            url,
            {"Id": "large", "MessageBody": "x" * 1025},
            {"Id": "good", "MessageBody": "x" * 1024},
            {"Id": "unclean", "MessageBody": "a\x01b"},
        )
        self.assertEqual([done["Id"] for done in output["Successful"]], ["good"])
        expected = {"large": INVALID, "unclean": "InvalidMessageContents"}
        self.assertEqual(self.failed(output), expected)
        (entry,) = (entry for entry in output["Failed"] if entry["Id"] == "large")
        text = (
            "One or more parameters cannot be validated. Reason: Message must be shorter than"
            " 1024 bytes."
        )
        # XML spells a received message and the text of a failure alike.
        self.assertIn(text, (entry.get("Message"), *entry.get("Messages", ())))
        self.assertEqual(self.counts(url), (1, 0, 0))

    def test_entries_sent_are_answered_like_messages_sent(self):
        url = self.sqs.queue()
        output = self.batch(
            "SendMessageBatch",
            url,
            {"Id": "plain", "MessageBody": "hello"},
            {
                "Id": "full",
                "MessageBody": "test",
                "DelaySeconds": 5,
                "MessageGroupId": "g",
                "MessageAttributes": {
                    "color": string("blue"),
                    "count": {"DataType": "Number", "StringValue": "3"},
                    "blob": {"DataType": "Binary", "BinaryValue": b"\1\2\3"},
                },
                "MessageSystemAttributes": {"AWSTraceHeader": string("Root=1")},
            },
        )
        self.assertNotIn("Failed", output)
        plain, full = output["Successful"]
        ids = [plain.pop("MessageId"), full.pop("MessageId")]
        self.assertEqual(
            plain, {"Id": "plain", "MD5OfMessageBody": "5d41402abc4b2a76b9719d911017c592"}
        )
        self.assertTrue(full.pop("MD5OfMessageSystemAttributes"))
        self.assertEqual(
            full,
            {
                "Id": "full",
                "MD5OfMessageBody": "098f6bcd4621d373cade4e832627b4f6",
                "MD5OfMessageAttributes": "d838729972a4b70e2d2acd9d59ac847c",
            },
        )
        self.assertEqual(self.counts(url), (1, 0, 1))
        (message,) = self.sqs.receive(url, MaxNumberOfMessages=10)
        self.assertEqual((message["MessageId"], message["Body"]), (ids[0], "hello"))
        self.clock.now += 5
        asked = {"AttributeNames": ["All"], "MessageAttributeNames": ["All"]}
        (message,) = self.sqs.receive(url, MaxNumberOfMessages=10, **asked)
        self.assertEqual((message["MessageId"], message["Body"]), (ids[1], "test"))
        self.assertEqual(message["MessageAttributes"]["blob"]["BinaryValue"], "AQID")
        self.assertEqual(message["Attributes"]["AWSTraceHeader"], "Root=1")
        self.assertEqual(message["Attributes"]["MessageGroupId"], "g")

    def test_entries_to_delete_or_change_fail_one_by_one(self):
        for operation, fields in self.FIELDS[1:]:
            with self.subTest(operation):
                self.start()
                url, other = self.sqs.queue(), self.sqs.queue("other")
                self.send(url, "a")
                self.send(url, "b")
                self.send(other, "c")
                held = {**self.take(url), **self.take(other)}
                self.delete(url, held["b"])
                entries = [
                    {**fields, "Id": name, "ReceiptHandle": handle}
                    for name, handle in (
                        ("garbage", "garbage"),
                        ("there", held["a"]),
                        ("gone", held["b"]),
                        ("foreign", held["c"]),
                    )
                ]
                output = self.batch(operation, url, *entries)
                deletes = operation == "DeleteMessageBatch"
                done, failed = ["there"], {"garbage": "ReceiptHandleIsInvalid"}
                failed["foreign"] = "ReceiptHandleIsInvalid"
                if deletes:
                    done.append("gone")
                else:
                    failed["gone"] = INVALID
                self.assertEqual(output["Successful"], [{"Id": name} for name in done])
                self.assertEqual(self.failed(output), failed)
                self.assertEqual(self.counts(url), (0, 0 if deletes else 1, 0))
                self.assertEqual(self.counts(other), (0, 1, 0))

    def test_an_empty_list_is_left_out(self):
        for operation, fields in self.FIELDS:
            with self.subTest(operation):
                self.start()
                url = self.sqs.queue()
                self.send(url)
                handle = self.take(url)["hello"]
                if operation == "SendMessageBatch":
                    good, bad = fields, {"MessageBody": "\x01"}
                else:
                    good, bad = {**fields, "ReceiptHandle": handle}, fields
                output = self.batch(operation, url, {"Id": "a", **good})
                self.assertEqual(list(output), ["Successful"])
                output = self.batch(operation, url, {"Id": "a", **bad})
                self.assertEqual(list(output), ["Failed"])

    def test_each_entry_has_a_timeout_of_its_own(self):
        url = self.sqs.queue()
        for body in ("a", "b", "c"):
            self.send(url, body)
        timeouts = {"a": 0, "b": 10, "c": 60}
        entries = [
            {"Id": body, "ReceiptHandle": handle, "VisibilityTimeout": timeouts[body]}
            for body, handle in self.take(url).items()
        ]
        self.batch("ChangeMessageVisibilityBatch", url, *entries)
        for seconds, expected in ((0, ["a"]), (10, ["b"]), (49, ["a", "b"]), (1, ["c"])):
            self.clock.now += seconds
            self.assertEqual(sorted(self.sqs.bodies(url)), expected)

    def test_all_of_a_batch_that_a_waiter_is_woken_for_is_at_hand(self):
        url = self.sqs.queue()
        entries = [{"Id": body, "MessageBody": body} for body in ("a", "b", "c")]
        self.clock.after(3, lambda: self.batch("SendMessageBatch", url, *entries))
        bodies = self.sqs.bodies(url, WaitTimeSeconds=20)
        self.assertEqual((self.clock.now - EXAMPLE_TIME, bodies), (3, ["a", "b", "c"]))


# ==== Dead letters ====


class DeadLetterTest(Spoken):
    def test_a_message_received_too_often_is_moved_as_it_is(self):
        for count in (1, "3"):
            with self.subTest(count):
                self.start()
                url, dead = self.dead_letters(count)
                sent = self.send(
                    url,
                    MessageAttributes={"Foo": string("Bar")},
                    MessageSystemAttributes={"AWSTraceHeader": string("Root=1")},
                )
                for _ in range(int(count)):
                    self.assertEqual(self.sqs.bodies(url, VisibilityTimeout=5), ["hello"])
                    self.assertEqual(self.sqs.bodies(url), [])  # hidden, not moved
                    self.assertEqual(self.counts(url), (0, 1, 0))
                    self.clock.now += 5
                self.assertEqual((self.counts(url), self.counts(dead)), ((1, 0, 0), (0, 0, 0)))
                self.assertEqual(self.sqs.bodies(url), [])
                self.assertEqual((self.counts(url), self.counts(dead)), ((0, 0, 0), (1, 0, 0)))
                asked = {"AttributeNames": ["All"], "MessageAttributeNames": ["All"]}
                (message,) = self.sqs.receive(dead, **asked)
                self.assertEqual(message["MessageId"], sent["MessageId"])
                self.assertEqual(message["Body"], "hello")
                self.assertEqual(message["MessageAttributes"], {"Foo": string("Bar")})
                self.assertEqual(message["MD5OfMessageAttributes"], sent["MD5OfMessageAttributes"])
                self.assertLessEqual(
                    {
                        "ApproximateReceiveCount": str(int(count) + 1),
                        "AWSTraceHeader": "Root=1",
                        "DeadLetterQueueSourceArn": arn("jobs"),
                    }.items(),
                    message["Attributes"].items(),
                )

    def test_what_was_never_moved_has_no_source(self):
        _, dead = self.dead_letters()
        self.send(dead)
        self.assertNotIn("DeadLetterQueueSourceArn", self.system(dead))

    def test_others_are_received_in_its_place(self):
        url, dead = self.dead_letters()
        self.send(url, "old")
        self.take(url, VisibilityTimeout=0)
        self.send(url, "new")
        self.assertEqual(self.sqs.bodies(url, MaxNumberOfMessages=1), ["new"])
        self.assertEqual(self.sqs.bodies(dead), ["old"])

    def test_a_waiter_goes_on_waiting_after_a_move(self):
        url, dead = self.dead_letters()
        self.send(url)
        self.take(url, VisibilityTimeout=0)
        self.clock.after(4, lambda: self.send(url, "new"))
        self.assertEqual(self.sqs.bodies(url, WaitTimeSeconds=20), ["new"])
        self.assertEqual(self.clock.now - EXAMPLE_TIME, 4)
        self.assertEqual(self.sqs.bodies(dead), ["hello"])

    def test_a_handle_of_before_the_move_does_not_reach_the_message(self):
        url, dead = self.dead_letters()
        self.send(url)
        handle = self.take(url, VisibilityTimeout=0)["hello"]
        self.assertEqual(self.sqs.bodies(url), [])
        self.delete(url, handle)
        self.assertEqual(self.counts(dead), (1, 0, 0))
        given = {"QueueUrl": dead, "ReceiptHandle": handle}
        self.refused("ReceiptHandleIsInvalid", "DeleteMessage", status=404, **given)

    def test_a_fifo_queue_moves_to_a_fifo_queue_and_goes_on_with_the_group(self):
        url, dead = self.dead_letters(kind=".fifo")
        self.put(url, "a1 a2")
        self.take(url, MaxNumberOfMessages=1, VisibilityTimeout=5)
        self.clock.now += 5
        held = self.take(url)
        held.update(self.take(url))  # in the same call or the next
        self.assertEqual(list(held), ["a2"])
        self.put(url, "a3")
        self.delete(url, held["a2"])
        self.assertEqual(self.sqs.bodies(url), ["a3"])
        self.assertLessEqual(
            {
                "MessageGroupId": "a",
                "MessageDeduplicationId": "a1",
                "ApproximateReceiveCount": "2",
                "DeadLetterQueueSourceArn": arn("jobs.fifo"),
            }.items(),
            self.system(dead).items(),
        )

    def test_queues_that_target_themselves_or_each_other_lose_nothing(self):
        for name, targets in (("itself", "a"), ("each other", "ba")):
            with self.subTest(name):
                self.start()
                urls = [self.sqs.queue(queue) for queue in sorted(targets)]
                for url, target in zip(urls, targets):
                    self.set(url, RedrivePolicy=redrive(target, 1))
                sent = self.send(urls[0])
                for _ in range(4):
                    for url in urls:
                        for message in self.sqs.receive(url, VisibilityTimeout=0):
                            self.assertEqual(message["MessageId"], sent["MessageId"])
                    self.assertEqual(sum(sum(self.counts(url)) for url in urls), 1)

    def test_nothing_is_lost_where_the_target_is_gone(self):
        url, dead = self.dead_letters()
        self.send(url)
        self.take(url, VisibilityTimeout=0)
        self.sqs("DeleteQueue", QueueUrl=dead)
        self.take(url, VisibilityTimeout=0)
        self.assertEqual(sum(self.counts(url)), 1)

    def test_a_policy_holds_from_when_it_is_set_until_it_is_removed(self):
        url, dead = self.dead_letters(2)
        self.send(url)
        self.take(url, VisibilityTimeout=0)
        self.set(url, RedrivePolicy="")
        for _ in range(3):
            self.assertEqual(self.sqs.bodies(url, VisibilityTimeout=0), ["hello"])
        self.set(url, RedrivePolicy=redrive("dead", 5))
        self.assertEqual(self.sqs.bodies(url, VisibilityTimeout=0), ["hello"])
        self.assertEqual(self.sqs.bodies(url), [])
        self.assertEqual(self.system(dead)["ApproximateReceiveCount"], "6")


# ==== Message move tasks ====


class MoveTaskTest(Spoken):
    MISSING_SOURCE = "The resource that you specified for the SourceArn parameter doesn't exist."
    MISSING_DESTINATION = (
        "The resource that you specified for the DestinationArn parameter doesn't exist."
    )
    NO_RESOURCE = "ResourceNotFoundException"

    def move(self, **given):
        return self.sqs("StartMessageMoveTask", SourceArn=arn("dead"), **given)["TaskHandle"]

    def tasks(self, source="dead", **given):
        given = {"SourceArn": arn(source), **given}
        return self.sqs("ListMessageMoveTasks", **given).get("Results", [])

    def task(self):
        (task,) = self.tasks()
        return task

    def running(self, rate=2, **given):
        """Begin to move ten messages, so many a second; return source, target and handle."""
        url, dead = self.dead_letters()
        self.kill(url, *"abcdefghij")
        return url, dead, self.move(MaxNumberOfMessagesPerSecond=rate, **given)

    def test_a_task_that_cannot_be_started_is_refused(self):
        self.dead_letters()
        source, target = "SourceArn", "DestinationArn"
        not_dead = "Source queue must be configured as a Dead Letter Queue."
        for name, code, status, text, given in (
            ("no source", MISSING, 400, None, {}),
            ("no such source", self.NO_RESOURCE, 404, self.MISSING_SOURCE, {source: arn("x")}),
            (
                "a source elsewhere",
                self.NO_RESOURCE,
                404,
                self.MISSING_SOURCE,
                {source: arn("dead", region="eu-west-1")},
            ),
            ("not a dead-letter queue", INVALID, 400, not_dead, {source: arn("jobs")}),
            (
                "no such destination",
                self.NO_RESOURCE,
                404,
                self.MISSING_DESTINATION,
                {source: arn("dead"), target: arn("x")},
            ),
        ):
            with self.subTest(name):
                shape = code == self.NO_RESOURCE and "com.amazonaws.sqs#" + code
                self.refused(code, "StartMessageMoveTask", text, status, shape, **given)
        for rate in (0, 501, -1):
            with self.subTest(rate), self.assertRaises(Refused) as caught:
                self.move(MaxNumberOfMessagesPerSecond=rate)
            self.assertEqual(caught.exception.status, 400)
        self.assertEqual(self.tasks(), [])

    def test_messages_go_back_to_where_they_came_from(self):
        dead = self.sqs.queue("dead")
        urls = [self.sqs.queue(name, RedrivePolicy=redrive("dead", 1)) for name in ("a", "b")]
        for url, bodies in zip(urls, ("a1 a2 a3", "b1 b2")):
            self.kill(url, *bodies.split(), MessageAttributes={"Foo": string("Bar")})
        self.assertEqual(self.counts(dead), (5, 0, 0))
        self.move()
        self.clock.now += 60
        self.assertEqual(self.counts(dead), (0, 0, 0))
        for url, bodies in zip(urls, ("a1 a2 a3", "b1 b2")):
            asked = {"MessageAttributeNames": ["All"], "MaxNumberOfMessages": 10}
            received = self.sqs.receive(url, **asked)
            self.assertEqual(sorted(message["Body"] for message in received), bodies.split())
            for message in received:
                self.assertEqual(message["MessageAttributes"], {"Foo": string("Bar")})
        task = self.task()
        self.assertEqual(
            {name: task[name] for name in task if name != "ApproximateNumberOfMessagesToMove"},
            {
                "Status": "COMPLETED",
                "SourceArn": arn("dead"),
                "ApproximateNumberOfMessagesMoved": 5,
                "StartedTimestamp": EXAMPLE_TIME * 1000,
            },
        )

    def test_messages_go_to_a_destination_that_is_given(self):
        url, dead = self.dead_letters()
        other = self.sqs.queue("other")
        self.kill(url, "a", "b")
        self.send(dead, "c")  # it has no source
        self.move(DestinationArn=arn("other"))
        self.clock.now += 60
        self.assertEqual(sorted(self.sqs.bodies(other)), ["a", "b", "c"])
        self.assertEqual((self.counts(url), self.counts(dead)), ((0, 0, 0), (0, 0, 0)))
        self.assertEqual(self.task()["DestinationArn"], arn("other"))

    def test_a_moved_message_can_be_received_as_often_as_a_new_one(self):
        url, dead = self.dead_letters()
        self.kill(url, "a")
        self.move()
        self.clock.now += 60
        self.assertEqual(self.sqs.bodies(url, VisibilityTimeout=0), ["a"])
        self.assertEqual(self.sqs.bodies(url), [])
        self.assertEqual(self.sqs.bodies(dead), ["a"])

    def test_fifo_messages_are_moved_in_order_although_their_ids_are_remembered(self):
        url, dead = self.dead_letters(kind=".fifo")
        self.put(url, "a1 a2 a3")
        for _ in range(6):
            self.take(url, VisibilityTimeout=0)
        self.assertEqual((self.counts(url), self.counts(dead)), ((0, 0, 0), (3, 0, 0)))
        self.sqs("StartMessageMoveTask", SourceArn=arn("dead.fifo"))
        self.clock.now += 60
        self.assertEqual((self.counts(url), self.counts(dead)), ((3, 0, 0), (0, 0, 0)))
        self.assertEqual(self.sqs.bodies(url), ["a1", "a2", "a3"])

    def test_a_rate_is_kept(self):
        url, dead, handle = self.running(rate=2)
        task = self.task()
        self.assertLessEqual(
            {
                "Status": "RUNNING",
                "TaskHandle": handle,
                "SourceArn": arn("dead"),
                "MaxNumberOfMessagesPerSecond": 2,
                "ApproximateNumberOfMessagesToMove": 10,
                "StartedTimestamp": EXAMPLE_TIME * 1000,
            }.items(),
            task.items(),
        )
        self.assertNotIn("DestinationArn", task)
        self.assertNotIn("FailureReason", task)
        for second in range(1, 4):
            self.clock.now += 1
            moved, left = self.counts(url)[0], self.counts(dead)[0]
            self.assertEqual(moved + left, 10)
            self.assertGreaterEqual(moved, 2 * (second - 1))
            self.assertLessEqual(moved, 2 * (second + 1))
            task = self.task()
            shown = (task["Status"], task["ApproximateNumberOfMessagesMoved"])
            self.assertEqual(shown, ("RUNNING", moved))
        self.clock.now += 5
        self.assertEqual((self.counts(url), self.counts(dead)), ((10, 0, 0), (0, 0, 0)))
        task = self.task()
        shown = (task["Status"], task["ApproximateNumberOfMessagesMoved"])
        self.assertEqual(shown, ("COMPLETED", 10))
        self.assertNotIn("TaskHandle", task)
        self.assertEqual(task["MaxNumberOfMessagesPerSecond"], 2)

    def test_a_waiter_is_woken_by_a_moved_message(self):
        for rate in (1, 3, 7, 500):
            with self.subTest(rate):
                self.start()
                url, _ = self.dead_letters()
                self.kill(url, "a", "b", "c")
                self.clock.after(
                    3, functools.partial(self.move, MaxNumberOfMessagesPerSecond=rate)
                )
                received = []
                for number in (1, 2, 3):
                    received += self.sqs.bodies(url, MaxNumberOfMessages=1, WaitTimeSeconds=20)
                    elapsed = self.clock.now - EXAMPLE_TIME - 3
                    self.assertLessEqual((number - 1) / rate, elapsed + 0.001)
                    self.assertLessEqual(elapsed, number / rate + 0.001)
                self.assertEqual(sorted(received), ["a", "b", "c"])

    def test_a_waiter_is_woken_by_a_message_that_is_moved_after_those_of_others(self):
        self.sqs.queue("dead")
        urls = [self.sqs.queue(name, RedrivePolicy=redrive("dead", 1)) for name in ("a", "b")]
        for url, bodies in zip(urls, (("a1", "a2"), ("b1",))):
            self.kill(url, *bodies)
        self.clock.after(3, functools.partial(self.move, MaxNumberOfMessagesPerSecond=1))
        self.assertEqual(self.sqs.bodies(urls[1], WaitTimeSeconds=20), ["b1"])
        self.assertLessEqual(self.clock.now - EXAMPLE_TIME, 6.001)

    def test_one_task_is_active_at_a_time(self):
        self.running()
        text = (
            "There is already a task running. Only one active task is allowed for a source queue"
            " arn at a given time."
        )
        self.refused(INVALID, "StartMessageMoveTask", text, SourceArn=arn("dead"))
        self.clock.now += 60
        self.move()
        self.clock.now += 60
        self.assertEqual(
            [task["Status"] for task in self.tasks(MaxResults=10)], ["COMPLETED", "COMPLETED"]
        )

    def test_tasks_are_listed_newest_first_one_unless_more_are_asked_for(self):
        self.dead_letters()
        self.assertEqual(self.tasks(), [])
        for _ in range(12):
            self.clock.now += 60
            self.move()
            self.clock.now += 60
        started = [EXAMPLE_TIME + 60 + 120 * number for number in range(12)][::-1]
        for given, expected in (({}, 1), ({"MaxResults": 3}, 3), ({"MaxResults": 10}, 10)):
            with self.subTest(expected):
                listed = [task["StartedTimestamp"] // 1000 for task in self.tasks(**given)]
                self.assertEqual(listed, started[:expected])
        for most in (0, 11):
            with self.subTest(most), self.assertRaises(Refused) as caught:
                self.tasks(MaxResults=most)
            self.assertEqual(caught.exception.status, 400)

    def test_tasks_of_what_is_no_queue_are_not_listed(self):
        text = (
            "You must use this format to specify the SourceArn:"
            " arn:<partition>:<service>:<region>:<account-id>:<resource-id>"
        )
        for given in ("jobs", "arn:aws:sqs", "http://localhost/000000000000/jobs"):
            with self.subTest(given):
                self.refused(INVALID, "ListMessageMoveTasks", text, SourceArn=given)
        self.refused(
            self.NO_RESOURCE,
            "ListMessageMoveTasks",
            self.MISSING_SOURCE,
            404,
            SourceArn=arn("none"),
        )
        self.refused(MISSING, "ListMessageMoveTasks")

    def test_a_cancelled_task_moves_nothing_more(self):
        url, dead, handle = self.running(rate=2)
        self.clock.now += 2
        moved = self.sqs("CancelMessageMoveTask", TaskHandle=handle)
        moved = moved["ApproximateNumberOfMessagesMoved"]
        self.assertTrue(2 <= moved <= 6, moved)
        self.assertEqual((self.counts(url)[0], self.counts(dead)[0]), (moved, 10 - moved))
        task = self.task()
        self.assertIn(task["Status"], ("CANCELLING", "CANCELLED"))
        self.assertNotIn("TaskHandle", task)
        self.clock.now += 60
        self.assertEqual((self.counts(url)[0], self.counts(dead)[0]), (moved, 10 - moved))
        task = self.task()
        shown = (task["Status"], task["ApproximateNumberOfMessagesMoved"])
        self.assertEqual(shown, ("CANCELLED", moved))
        self.move()
        self.clock.now += 60
        self.assertEqual((self.counts(url)[0], self.counts(dead)[0]), (10, 0))

    def test_a_task_fails_when_its_destination_goes(self):
        self.sqs.queue("other")
        _, dead, _ = self.running(rate=2, DestinationArn=arn("other"))
        self.clock.now += 2
        self.sqs("DeleteQueue", QueueUrl="other")
        left = self.counts(dead)[0]
        self.assertTrue(4 <= left <= 8, left)
        self.clock.now += 60
        self.assertEqual(self.counts(dead)[0], left)
        self.assertLessEqual(
            {
                "Status": "FAILED",
                "FailureReason": NO_QUEUE,
                "DestinationArn": arn("other"),
                "ApproximateNumberOfMessagesMoved": 10 - left,
            }.items(),
            self.task().items(),
        )
        self.assertNotIn("TaskHandle", self.task())

    def test_a_task_ends_with_its_source(self):
        url, dead, _ = self.running(rate=2)
        self.clock.now += 2
        self.sqs("DeleteQueue", QueueUrl=dead)
        moved = self.counts(url)[0]
        self.clock.now += 60
        self.assertEqual(self.counts(url), (moved, 0, 0))
        given = {"SourceArn": arn("dead")}
        self.refused(self.NO_RESOURCE, "ListMessageMoveTasks", self.MISSING_SOURCE, 404, **given)

    def test_a_handle_tells_the_task_and_its_source(self):
        _, _, handle = self.running()
        document = json.loads(base64.b64decode(handle, validate=True))
        self.assertEqual(sorted(document), ["sourceArn", "taskId"])
        self.assertEqual(document["sourceArn"], arn("dead"))
        self.assertRegex(document["taskId"], r"\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")

    def test_a_handle_of_no_task_is_refused(self):
        _, _, handle = self.running()
        known = json.loads(base64.b64decode(handle))
        invalid = "Value for parameter TaskHandle is invalid."
        for name, given in (
            ("garbage", "garbage"),
            ("not ASCII", "h\u00e9"),
            ("not JSON", as_base64(b"garbage")),
            ("not UTF-8", as_base64(b"\xff\xfe")),
            ("no object", as_base64(b"[1]")),
            ("deep", as_base64(b"[" * 5000)),
        ):
            with self.subTest(name):
                self.refused(INVALID, "CancelMessageMoveTask", invalid, TaskHandle=given)
        for name, change in (
            ("unknown task", {"taskId": "00000000-0000-0000-0000-000000000000"}),
            ("unknown source", {"sourceArn": arn("none")}),
        ):
            with self.subTest(name):
                other = as_base64(json.dumps({**known, **change}).encode())
                text = "Task does not exist." if "taskId" in change else None
                given = {"TaskHandle": other}
                self.refused(self.NO_RESOURCE, "CancelMessageMoveTask", text, 404, **given)
        self.refused(MISSING, "CancelMessageMoveTask")
        self.assertEqual(self.task()["Status"], "RUNNING")


# ==== Retention, fair queues, and whose queue it is ====


class RetentionTest(Spoken):
    def test_a_message_is_gone_when_it_is_too_old(self):
        def visible(url):
            self.send(url)

        def in_flight(url):
            self.send(url)
            self.take(url, VisibilityTimeout=600)

        def back(url):
            self.send(url)
            self.take(url, VisibilityTimeout=30)

        def delayed(url):
            self.send(url, DelaySeconds=900)

        for state, before in (
            (visible, (1, 0, 0)),
            (in_flight, (0, 1, 0)),
            (back, (1, 0, 0)),
            (delayed, (0, 0, 1)),
        ):
            with self.subTest(state.__name__):
                self.start()
                url = self.sqs.queue(MessageRetentionPeriod="60")
                state(url)
                self.clock.now += 59.9
                self.assertEqual(self.counts(url), before)
                self.clock.now += 0.2
                self.assertEqual(self.counts(url), (0, 0, 0))
                self.assertEqual(self.sqs.bodies(url), [])
                self.clock.now += 900
                self.assertEqual(self.sqs.bodies(url), [])

    def test_an_expired_message_frees_its_group(self):
        url = self.fifo(MessageRetentionPeriod="60")
        self.put(url, "a1")
        self.take(url, VisibilityTimeout=600)
        self.clock.now += 50
        self.put(url, "a2")
        self.clock.now += 9.9
        self.assertEqual(self.sqs.bodies(url), [])
        self.clock.now += 0.2
        self.assertEqual(self.sqs.bodies(url), ["a2"])

    def test_each_message_has_an_age_of_its_own(self):
        url = self.sqs.queue(MessageRetentionPeriod="60")
        for body in ("a", "b", "c"):
            self.send(url, body)
            self.clock.now += 20.1
        self.assertEqual(sorted(self.sqs.bodies(url, VisibilityTimeout=0)), ["b", "c"])
        self.clock.now += 20
        self.assertEqual(self.sqs.bodies(url), ["c"])

    def test_a_dead_letter_that_is_too_old_is_not_counted(self):
        dead = self.sqs.queue("dead", MessageRetentionPeriod="60")
        url = self.sqs.queue(RedrivePolicy=redrive("dead", 1))
        self.send(url, "old")
        self.take(url, VisibilityTimeout=0)
        self.clock.now += 40
        self.send(dead, "fresh")
        self.assertEqual(self.sqs.bodies(url), [])
        for seconds in (1, 20, 20, 20):
            self.clock.now += seconds
            counts = self.counts(dead)
            self.assertEqual(counts, (len(self.sqs.bodies(dead, VisibilityTimeout=0)), 0, 0))


class FairQueueTest(Spoken):
    def test_a_group_on_a_standard_queue_is_kept_and_locks_nothing(self):
        url = self.sqs.queue()
        self.send(url, "one", MessageGroupId="g")
        entries = [
            {"Id": "two", "MessageBody": "two", "MessageGroupId": "g"},
            {"Id": "three", "MessageBody": "three"},
        ]
        sent = self.sqs("SendMessageBatch", QueueUrl=url, Entries=entries)
        self.assertEqual(len(sent["Successful"]), 2)
        groups = {}
        for _ in range(3):
            (message,) = self.sqs.receive(url, AttributeNames=["MessageGroupId"])
            groups[message["Body"]] = message.get("Attributes")
        self.assertEqual(
            groups, {"one": {"MessageGroupId": "g"}, "two": {"MessageGroupId": "g"}, "three": None}
        )


class ApartTest(Spoken):
    OTHER = EXAMPLE._replace(account_id="111122223333")

    def test_regions_and_accounts_are_kept_apart(self):
        for name, client, region in (
            ("another region", DEMO, "eu-west-1"),
            ("another account", self.OTHER, "us-east-1"),
        ):
            with self.subTest(name):
                self.start(client=self.OTHER)
                mine, other = self.another(), self.another(client, region)
                given = {"VisibilityTimeout": "600"}
                urls = mine.queue(**given), other.queue(**given)
                sent = []
                for caller, url, body in ((mine, urls[0], "mine"), (other, urls[1], "other")):
                    caller("SendMessage", QueueUrl=url, MessageBody=body)
                    (message,) = caller.receive(url, MaxNumberOfMessages=10)
                    self.assertEqual(message["Body"], body)
                    sent.append(message["ReceiptHandle"])
                with self.assertRaises(Refused) as caught:
                    other("DeleteMessage", QueueUrl=urls[1], ReceiptHandle=sent[0])
                self.assertEqual(caught.exception.code, "ReceiptHandleIsInvalid")
                account = client.account_id or ACCOUNT
                shown = other("GetQueueAttributes", QueueUrl=urls[1], AttributeNames=["QueueArn"])
                self.assertEqual(shown["Attributes"], {"QueueArn": arn("jobs", region, account)})
                with self.assertRaises(Refused) as caught:
                    mine("ListMessageMoveTasks", SourceArn=arn("jobs", region, account))
                self.assertIn(caught.exception.status, (403, 404))
                other.queue("more")
                self.assertEqual(mine("ListQueues"), {"QueueUrls": [urls[0]]})
                mine("DeleteQueue", QueueUrl=urls[0])
                self.assertEqual(len(other("ListQueues")["QueueUrls"]), 2)
                other("DeleteMessage", QueueUrl=urls[1], ReceiptHandle=sent[1])

    def test_the_queue_of_another_account_does_not_exist(self):
        self.start(client=self.OTHER)
        other, mine = self.sqs, self.another()
        url = other.queue()
        other("SendMessage", QueueUrl=url, MessageBody="x")
        for operation, given in (
            ("ReceiveMessage", {}),
            ("SendMessage", {"MessageBody": "x"}),
            ("DeleteQueue", {}),
            ("GetQueueAttributes", {}),
        ):
            with self.subTest(operation), self.assertRaises(Refused) as caught:
                mine(operation, QueueUrl=url, **given)
            self.assertEqual((caught.exception.status, caught.exception.code), (400, NO_QUEUE))
        self.assertEqual(other.bodies(url), ["x"])


# ==== Against a model, and with real threads ====


class ModelTest(unittest.TestCase):
    """Random work, compared with a model that keeps a dict and searches it end to end."""

    def start(self, seed, protocol, **attributes):
        self.random = random.Random(seed)
        self.clock = Clock()
        self.sqs = Caller(protocol, self.clock)
        name = "jobs.fifo" if "FifoQueue" in attributes else "jobs"
        self.url = self.sqs.queue(name, **attributes)
        self.retention = int(attributes["MessageRetentionPeriod"])
        self.model = {}  # by body, in the order sent: group, sent, free (from), received (count)
        self.handles = []  # (body, handle) received, some no longer good
        self.sent = 0

    def pass_time(self, most):
        # Never a whole number, so that nothing is due at the very moment it is asked for.
        self.clock.now += self.random.uniform(0.001, most)
        oldest = self.clock.now - self.retention
        for body in list(
            itertools.takewhile(lambda b: self.model[b]["sent"] <= oldest, self.model)
        ):
            del self.model[body]

    def send(self, groups=""):
        delay = 0 if groups else self.random.choice((0, 0, 0, 5, 60))
        entries = []
        for _ in range(10):
            self.sent += 1
            body = str(self.sent)
            entry = {"Id": body, "MessageBody": body}
            if groups:
                entry["MessageGroupId"] = self.random.choice(groups)
                entry["MessageDeduplicationId"] = body
            else:
                entry["DelaySeconds"] = delay
            entries.append(entry)
            now, group = self.clock.now, entry.get("MessageGroupId")
            self.model[body] = {"group": group, "sent": now, "free": now + delay, "received": 0}
        done = self.sqs("SendMessageBatch", QueueUrl=self.url, Entries=entries)
        self.assertEqual(len(done["Successful"]), 10)

    def receive(self, timeout):
        given = {"MaxNumberOfMessages": 10, "VisibilityTimeout": timeout}
        received = self.sqs.receive(self.url, AttributeNames=["ApproximateReceiveCount"], **given)
        bodies = []
        for message in received:
            body, known = message["Body"], self.model.get(message["Body"])
            self.assertTrue(known and known["free"] <= self.clock.now, body)
            known["received"] += 1
            self.assertEqual(
                message["Attributes"]["ApproximateReceiveCount"], str(known["received"])
            )
            bodies.append(body)
            self.handles.append((body, message["ReceiptHandle"]))
        self.assertEqual(len(bodies), len(set(bodies)))
        return bodies

    def hide(self, bodies, timeout):
        for body in bodies:
            self.model[body]["free"] = self.clock.now + timeout

    def compare(self):
        now = self.clock.now
        names = ["ApproximateNumberOfMessages" + kind for kind in ("", "NotVisible", "Delayed")]
        shown = self.sqs("GetQueueAttributes", QueueUrl=self.url, AttributeNames=names)
        hidden = [m for m in self.model.values() if m["free"] > now]
        delayed = sum(not m["received"] for m in hidden)
        expected = (len(self.model) - len(hidden), len(hidden) - delayed, delayed)
        self.assertEqual(tuple(int(shown["Attributes"][name]) for name in names), expected)

    def test_a_standard_queue_of_20000_messages_agrees(self):
        self.start(1, "json", MessageRetentionPeriod="300")
        for _ in range(2000):
            self.pass_time(0.05)
            self.send()
        self.assertEqual(len(self.model), 20000)
        self.compare()
        for step in range(1600):
            self.pass_time(0.5)
            act = self.random.random()
            if act < 0.1:
                self.send()
            elif act < 0.55:
                timeout = self.random.choice((0, 5, 60, 400))
                bodies = self.receive(timeout)
                if len(bodies) < 10:
                    visible = {b for b, m in self.model.items() if m["free"] <= self.clock.now}
                    self.assertEqual(set(bodies), visible)
                self.hide(bodies, timeout)
            else:
                self.change_or_delete(act < 0.8)
            if step % 100 == 0:
                self.compare()
        self.compare()
        self.assertLess(len(self.model), 5000)

    def change_or_delete(self, delete):
        chosen = dict(self.random.sample(self.handles, min(10, len(self.handles))))
        if not chosen:
            return
        entries = [{"Id": body, "ReceiptHandle": handle} for body, handle in chosen.items()]
        if delete:
            done = self.sqs("DeleteMessageBatch", QueueUrl=self.url, Entries=entries)
            self.assertEqual(len(done["Successful"]), len(entries))
            for body in chosen:
                self.model.pop(body, None)
            self.handles = [pair for pair in self.handles if pair[0] not in chosen]
            return
        timeout = self.random.choice((0, 5, 60))
        entries = [{**entry, "VisibilityTimeout": timeout} for entry in entries]
        done = self.sqs("ChangeMessageVisibilityBatch", QueueUrl=self.url, Entries=entries)
        there = [body for body in chosen if body in self.model]
        self.assertEqual([entry["Id"] for entry in done.get("Successful", [])], there)
        self.hide(there, timeout)

    def test_a_fifo_queue_never_breaks_the_order_of_a_group(self):
        for protocol in ("json", "query"):
            with self.subTest(protocol):
                self.start(2, protocol, FifoQueue="true", MessageRetentionPeriod="60")
                served = 0
                for step in range(800):
                    self.pass_time(1)
                    act = self.random.random()
                    if act < 0.1:
                        self.send("abcdefgh")
                    elif act < 0.6:
                        timeout = self.random.choice((0, 3, 10, 30))
                        available = self.available()
                        bodies = self.receive(timeout)
                        self.assertLessEqual(set(bodies), set(available))
                        self.assertEqual(len(bodies), min(10, len(available)))
                        self.check_order(bodies, available)
                        self.hide(bodies, timeout)
                        served += len(bodies)
                    else:
                        self.fifo_change_or_delete(act < 0.85)
                    if step % 20 == 0:
                        self.compare()
                self.assertGreater(served, 500)

    def available(self):
        """Return the bodies to be served: those with nothing hidden up to them in their group."""
        bodies, blocked = [], set()
        for body, message in self.model.items():
            if message["free"] > self.clock.now:
                blocked.add(message["group"])
            elif message["group"] not in blocked:
                bodies.append(body)
        return bodies

    def check_order(self, bodies, available):
        """Each group served must be served from its first message on, without a gap."""
        groups = {}
        for body in bodies:
            groups.setdefault(self.model[body]["group"], []).append(body)
        for group, taken in groups.items():
            expected = [body for body in available if self.model[body]["group"] == group]
            self.assertEqual(taken, expected[: len(taken)])
        in_turn = [self.model[body]["group"] for body in bodies]
        self.assertEqual(in_turn, sorted(in_turn, key=list(groups).index), "groups are mixed")

    def fifo_change_or_delete(self, delete):
        held = {body: handle for body, handle in self.handles if body in self.model}  # the last
        held = {body: h for body, h in held.items() if self.model[body]["free"] > self.clock.now}
        if not held:
            return
        body = self.random.choice(list(held))
        given = {"QueueUrl": self.url, "ReceiptHandle": held[body]}
        if delete:
            self.sqs("DeleteMessage", **given)
            del self.model[body]
            return
        timeout = self.random.choice((0, 5, 20))
        self.sqs("ChangeMessageVisibility", VisibilityTimeout=timeout, **given)
        self.hide([body], timeout)


class RealClock:
    """The time of day; counts those who began to wait."""

    def __init__(self):
        self.waiting = threading.Semaphore(0)

    def __call__(self):
        return time.time()

    def wait(self, condition, seconds):
        self.waiting.release()  # the lock is held until the wait begins
        return condition.wait(seconds)


class ThreadTest(unittest.TestCase):
    def setUp(self):
        self.clock = RealClock()
        self.sqs = Caller("json", self.clock)
        self.url = self.sqs.queue()

    def send(self, body):
        self.sqs("SendMessage", QueueUrl=self.url, MessageBody=body)

    def poll(self, pool, caller=None):
        future = pool.submit((caller or self.sqs).bodies, self.url, WaitTimeSeconds=20)
        self.assertTrue(self.clock.waiting.acquire(timeout=DEADLINE))
        return future

    def test_fifty_waiters_share_fifty_messages(self):
        with concurrent.futures.ThreadPoolExecutor(100) as pool:
            polls = [
                pool.submit(self.sqs.receive, self.url, WaitTimeSeconds=20) for _ in range(50)
            ]
            for _ in polls:
                self.assertTrue(self.clock.waiting.acquire(timeout=DEADLINE))
            bodies = [str(number) for number in range(50)]
            sends = [pool.submit(self.send, body) for body in bodies]
            _, left = concurrent.futures.wait(polls + sends, timeout=SHORTER)
            self.assertFalse(left)
        for sent in sends:
            sent.result()
        received = [message["Body"] for poll in polls for message in poll.result()]
        self.assertEqual(sorted(received), sorted(bodies))
        self.assertEqual([len(poll.result()) for poll in polls], [1] * 50)

    def test_a_waiter_that_left_passes_its_turn_on(self):
        gone = Caller("json", self.clock)
        gone.proxy = Leaving(self.sqs.proxy)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            left = self.poll(pool, gone)
            stays = self.poll(pool)
            gone.proxy.gone.set()
            self.send("hello")
            self.assertEqual(stays.result(SHORTER), ["hello"])
            # Whichever of the two was woken, the other may find out later.
            self.send("for nobody")
            self.assertEqual(left.result(SHORTER), [])
        self.assertEqual(self.sqs.bodies(self.url), ["for nobody"])

    def test_waiters_whose_queues_target_each_other_do_not_keep_each_other_awake(self):
        """Both cases wait at once, as the shortest poll lasts a second."""
        waiting = []
        for targets, polled in (("aa", "aa"), ("ba", "ab")):
            self.setUp()
            for name in "ab":
                self.sqs.queue(name)
            for name, target in zip("ab", targets):
                policy = {"RedrivePolicy": redrive(target, 1)}
                self.sqs("SetQueueAttributes", QueueUrl=name, Attributes=policy)
            self.sqs("SendMessage", QueueUrl="a", MessageBody="poison")
            self.sqs.bodies("a", VisibilityTimeout=0)
            waiting += [(self.sqs, at) for at in polled]
        with concurrent.futures.ThreadPoolExecutor(len(waiting)) as pool:
            began = time.process_time()
            polls = [pool.submit(sqs.receive, at, WaitTimeSeconds=1) for sqs, at in waiting]
            for poll in polls:
                poll.result(DEADLINE)
            self.assertLess(time.process_time() - began, 0.3)

    def test_groups_are_worked_off_in_order_by_many(self):
        url = self.sqs.queue("jobs.fifo", FifoQueue="true", VisibilityTimeout="60")
        groups = [str(number) for number in range(10)]
        worked = {group: [] for group in groups}
        finished = threading.Event()

        def send(group, body):
            self.sqs(
                "SendMessage",
                QueueUrl=url,
                MessageBody=body,
                MessageGroupId=group,
                MessageDeduplicationId=f"{group}-{body}",
            )

        def work():
            while True:
                given = {"WaitTimeSeconds": 20, "AttributeNames": ["MessageGroupId"]}
                for message in self.sqs.receive(url, **given):
                    group = message["Attributes"]["MessageGroupId"]
                    if message["Body"] == "stop":
                        return
                    worked[group].append(message["Body"])
                    if sum(map(len, worked.values())) == 200:
                        finished.set()
                    handle = message["ReceiptHandle"]
                    self.sqs("DeleteMessage", QueueUrl=url, ReceiptHandle=handle)

        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            workers = [pool.submit(work) for _ in range(8)]
            for body in range(20):
                for group in groups:
                    send(group, str(body))
            done = finished.wait(DEADLINE)
            for number, _ in enumerate(workers):
                send(f"stop{number}", "stop")
        self.assertTrue(done)
        for worker in workers:
            worker.result()
        self.assertEqual(worked, {group: [str(n) for n in range(20)] for group in groups})

    def test_waiting_takes_no_processor_time(self):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = self.poll(pool)
            began = time.process_time()
            _, left = concurrent.futures.wait([waiting], timeout=0.5)
            spent = time.process_time() - began
            self.assertTrue(left)
            self.send("hello")
            self.assertEqual(waiting.result(SHORTER), ["hello"])
        self.assertLess(spent, 0.1)


IN_AN_HOUR = "2015-08-30T13:36:00Z"  # of EXAMPLE_TIME
NO_METADATA = {"AWS_EC2_METADATA_DISABLED": "true"}
RELATIVE = {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/it"}
FULL = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
BY_IDENTITY = {
    "AWS_WEB_IDENTITY_TOKEN_FILE": "~/identity",
    "AWS_ROLE_ARN": "arn:aws:iam::1:role/W",
}
STS = "https://sts.us-east-1.amazonaws.com/"
PORTAL = "https://portal.sso.eu-west-1.amazonaws.com/federation/credentials"
ROLES = "http://169.254.169.254/latest/meta-data/iam/security-credentials/"
SSO = "sso_account_id = 111122223333\nsso_role_name = Reader\n"
CORP = "sso_region = eu-west-1\nsso_start_url = https://corp.example/start\n"
BY_SESSION = f"sso_session = corp\n{SSO}[sso-session corp]\n{CORP}"


def keys(name):
    return f"aws_access_key_id = dummykey{name}\naws_secret_access_key = dummysecret{name}\n"


def fixed(name):
    return Credentials(f"dummykey{name}", f"dummysecret{name}")


def lasting(name):
    return Credentials(*fixed(name)[:2], f"dummysecretToken{name}", EXAMPLE_TIME + 3600)


def environment(name):
    return dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), fixed(name)))


def answered(name, changed=()):
    """Return the members of the answer of a credentials endpoint, without those that are "-"."""
    names = ("AccessKeyId", "SecretAccessKey", "Token", "Expiration")
    given = {**dict(zip(names, (*lasting(name)[:3], IN_AN_HOUR))), **dict(changed)}
    return {key: value for key, value in given.items() if value != "-"}


def document(name, **changed):
    return json.dumps(answered(name, changed)).encode()


def printed(name, **changed):
    return document(name, **changed).replace(b'"Token"', b'"SessionToken"')


def of_portal(name, **changed):
    values = (*lasting(name)[:3], (EXAMPLE_TIME + 3600) * 1000)
    names = ("accessKeyId", "secretAccessKey", "sessionToken", "expiration")
    given = {**dict(zip(names, values)), **changed}
    given = {key: value for key, value in given.items() if value != "-"}
    return json.dumps({"roleCredentials": given}).encode()


def of_sts(name, **changed):
    members = answered(name, changed).items()
    inner = "".join(f"<{k}>{v}</{k}>\n" for k, v in members).replace("Token>", "SessionToken>")
    xmlns = "https://sts.amazonaws.com/doc/2011-06-15/"
    return f'<A xmlns="{xmlns}"><Credentials>\n{inner}</Credentials></A>'.encode()


def role(name, assumed, **settings):
    """Return a profile with a role."""
    lines = [f"[profile {name}]", f"role_arn = arn:aws:iam::1:role/{assumed}"]
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in settings.items()), ""])


class Asked(NamedTuple):
    url: str
    headers: dict
    data: bytes = None
    method: str = None


class ChainTest(unittest.TestCase):
    """Runs chains with a home of their own and a `fetch` that keeps what it was asked."""

    def setUp(self):
        self.home = folder(self)
        os.makedirs(os.path.join(self.home, ".aws", "sso", "cache"))
        patch = mock.patch.dict(os.environ, {"HOME": self.home})
        patch.start()
        self.addCleanup(patch.stop)
        self.put("identity", "dummysecretIdentity\n")
        self.known = {k[0]: [Client("", *k[:3])] for k in map(fixed, "EPQ")}
        self.known.update({k[0]: [Client("", *k[:3])] for k in map(lasting, "CISABWR")})
        self.metadata = {"http://169.254.169.254/latest/api/token": b"dummysecretImds",
                         ROLES + "a%20b": document("I"), ROLES: b"a b\n"}  # fmt: skip
        self.web, self.asked, self.assumed = {}, [], []  # answers by the beginning of the URL

    def put(self, path, text):
        return write(os.path.join(self.home, path), text)

    def cache_token(self, name, **changed):
        token = {"accessToken": "dummysecretSso", "expiresAt": IN_AN_HOUR, **changed}
        digest = hashlib.sha1(name.encode()).hexdigest()
        self.put(f".aws/sso/cache/{digest}.json", json.dumps(token))

    def fetch(self, url, headers, *, data=None, method=None, timeout=5):
        self.asked.append(Asked(url, headers, data, method))
        for begin, answer in self.web.items():
            if url.startswith(begin):
                return answer
        if url.startswith("https://sts."):
            return self.sts(headers, data)
        raise Skipped("nobody answered")

    def sts(self, headers, data):
        """Answer for a role with the key of its name, to who signs with a key that is known."""
        form = dict(urllib.parse.parse_qsl(data.decode(), strict_parsing=True))
        who = region = ""
        if form["Action"] == "AssumeRole":
            request = Request("POST", "/", tuple(headers.items()), io.BytesIO(data))
            verified = awsproxy.verify(request, self.known, EXAMPLE_TIME, service="sts")
            who, region = verified.client.access_key_id[8:], verified.scope.region
        self.assertEqual(bool(who), "Authorization" in headers)
        self.assumed.append((who, region, form))
        return of_sts(form["RoleArn"].rpartition("/")[2])

    def chain(self, environ=NO_METADATA, config="", credentials="", profile="", **how):
        self.put(".aws/config", config)
        self.put(".aws/credentials", credentials)
        self.asked, self.assumed = [], []
        how = {"fetch": self.fetch, "clock": lambda: EXAMPLE_TIME, **how}
        return CredentialChain(environ, profile, **how)

    def found(self, *args, **how):
        made = self.chain(*args, **how).find()
        self.assertNotIn("secret", repr(made) + str(made))
        return made

    def skipped(self, *args, **how):
        """Return why there are no credentials."""
        with self.assertRaises(Skipped) as caught:
            self.chain(*args, **how).find()
        self.assertNotIn("dummysecret", repr(caught.exception))
        return str(caught.exception)


class SourceTest(ChainTest):
    def test_the_first_source_that_has_keys_is_taken(self):
        self.web = {"http://169.254.170.2/": document("C"), **self.metadata}
        left = everything = {**environment("E"), **BY_IDENTITY, **RELATIVE}
        default = "[default]\n" + keys("P")
        rows = [
            ("environment", default, "", fixed("E")),
            ("web identity", default, "AWS_ACCESS_KEY_ID", lasting("W")),
            ("profile", default, "AWS_ROLE_ARN", fixed("P")),
            ("container", "", "", lasting("C")),
            ("metadata", "", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", lasting("I")),
        ]
        for name, credentials, gone, expected in rows:
            left = {key: value for key, value in left.items() if key != gone}
            with self.subTest(name):
                self.assertEqual(self.found(left, credentials=credentials), expected)
        names = ("environment", "web identity", "profile default", "container", "EC2 metadata")
        expected = "; ".join(f"{name}: [^;]+" for name in names)
        self.assertRegex(self.skipped(), rf"\A{expected}\Z")
        reason = self.skipped(everything, credentials=default, profile="x")
        self.assertRegex(reason, r"\Aprofile x: [^;]+\Z")  # a named one is tried alone
        self.assertEqual(self.asked, [])

    def test_a_profile_is_read_from_both_files(self):
        key, secret = keys("P").splitlines()
        p, q, token = keys("P"), keys("Q"), "aws_session_token = dummysecretToken\n"
        other = self.put("other", "[default]\n" + p)
        files = {"AWS_CONFIG_FILE": "~/none", "AWS_SHARED_CREDENTIALS_FILE": other}
        rows = [
            ("credentials", {}, "", "[default]\n" + p, ""),
            ("config", {}, "[default]\n" + p, "", ""),
            ("credentials first", {}, "[default]\n" + q, "[default]\n" + p, ""),
            ("together", {}, f"[profile x]\n{key}", f"[x]\n{secret}", "x"),
            ("AWS_PROFILE", {"AWS_PROFILE": "x"}, "[profile x]\n" + p, "", ""),
            ("named", {"AWS_PROFILE": "y"}, "", f"[y]\n{q}[x]\n{p}", "x"),
            ("named, not the environment", environment("E"), "", f"[x]\n{p}", "x"),
            ("other files", files, "[default]\n" + q, "[default]\n" + q, ""),
            ("[profile default]", {}, "[profile default]\n" + p, "", ""),
            ("both, one way", {}, f"[profile default]\n{p}[default]\n{q}", "", ""),
            ("both, the other", {}, f"[default]\n{q}[profile default]\n{p}", "", ""),
            ("quoted", {}, f"[profile 'x']\n{q}[profile \"a b\"]\n{p}", "", "a b"),
            ("not quoted", {}, f"[profile a b]\n{p}[a b]\n{q}[profile ']\n{q}", "", "a b"),
        ]
        for name, environ, config, credentials, profile in rows:
            with self.subTest(name):
                made = self.found({**NO_METADATA, **environ}, config, credentials, profile)
                self.assertEqual(made, fixed("P"))
        made = self.found(config="[default]\n" + p + token)
        self.assertEqual(made, (*fixed("P")[:2], "dummysecretToken", float("inf")))

    def test_what_is_missing_or_malformed_is_said(self):
        key, by = keys("P").splitlines()[0], functools.partial(role, "x", "A")
        y, z = by(source_profile="y"), role("y", "B", source_profile="z")
        back = role("y", "B", source_profile="x")
        rows = [
            ("nothing", "", "", "no such section"),
            ("another", "[profile y]\n" + keys("P"), "", "no such section"),
            ("no secret", "", f"[x]\n{key}\n", "no keys"),
            ("empty secret", "", f"[x]\n{key}\naws_secret_access_key =\n", "no keys"),
            ("no section", keys("P"), "", "config is malformed"),
            ("no equals sign", "", "[x]\ndummysecret\n", "credentials is malformed"),
            ("not UTF-8", b"[profile x]\na = \xff\n", "", "config is malformed"),
            ("no source", by(), "", "source_profile"),
            ("odd source", by(credential_source="Moon"), "", "credential_source"),
            ("its source is missing", y, "", "no such section"),
            ("its source is empty", by(credential_source="Environment"), "", "AWS_ACCESS_KEY_ID"),
            ("no token file", by(web_identity_token_file="~/no"), "", "~/no cannot be read"),
            ("itself, without keys", by(source_profile="x"), "", "."),
            ("cycle", y + back, "", "."),
            ("cycle further on", y + z + role("z", "C", source_profile="y"), "", "."),
            # botocore: a profile may come back to itself alone.
            ("cycle with keys", y + keys("P") + back, "", "."),
        ]
        for name, config, credentials, expected in rows:
            with self.subTest(name):
                reason = self.skipped(config=config, credentials=credentials, profile="x")
                self.assertRegex(reason, rf"\Aprofile x: .*{expected}")
                self.assertEqual(self.asked, [])

    def test_an_answer_that_holds_no_keys_is_skipped(self):
        bodies = [b"", b"<html>", b"\xff\xfe\xff", b"[]", b"null", b'"dummysecret"', b"[" * 100000]
        rows = [dict.fromkeys(("json", "printed", "sts", "portal"), body) for body in bodies]
        changes = [(k, v) for k in ("AccessKeyId", "SecretAccessKey") for v in ("-", "", None, 5)]
        for name, value in [*changes, ("Token", {"dummysecret": 1}), ("Expiration", "tomorrow")]:
            change = {name: value}
            lower = {"Token": "sessionToken"}.get(name, name[0].lower() + name[1:])
            row = {"json": document("C", **change), "printed": printed("C", **change)}
            row["portal"] = of_portal("C", **{lower: value})
            if isinstance(value, str):
                row["sts"] = of_sts("C", **change)
            rows.append(row)
        rows += [{"json": document("C", Expiration=each)} for each in (5, "2015-02-30T00:00:00Z")]
        self.cache_token("corp")
        sources = [
            ("json", "container: ", {**NO_METADATA, **RELATIVE}, ""),
            ("json", "EC2 metadata: ", {}, ""),
            ("printed", "profile default: ", NO_METADATA,
             f"[default]\ncredential_process = cat {self.home}/printed\n"),
            ("portal", "profile default: ", NO_METADATA, "[default]\n" + BY_SESSION),
            ("sts", "web identity: ", {**NO_METADATA, **BY_IDENTITY}, ""),
        ]  # fmt: skip
        for row, (kind, source, environ, config) in itertools.product(rows, sources):
            if kind in row:
                body = row[kind]
                with self.subTest(source, kind=kind, body=body[:200]):
                    self.put("printed", body)
                    self.web = {"http://169.254.170.2/": body, PORTAL: body, STS: body}
                    self.web.update({**self.metadata, ROLES + "a%20b": body})
                    self.assertIn(source, self.skipped(environ, config))

    def test_a_process_prints_keys_or_says_why_not(self):
        self.put("whole", printed("P"))
        self.put("bare", printed("P", Token="-", Expiration="-"))
        head, run = "[default]\ncredential_process = ", subprocess.run
        self.assertEqual(self.found(config=f"{head}cat '{self.home}/whole'\n"), lasting("P"))
        self.assertEqual(self.found(config=f"{head}cat {self.home}/bare\n"), fixed("P"))

        def impatient(*args, timeout, **how):
            return run(*args, timeout=min(timeout, 0.3), **how)

        rows = [
            ("fails", "sh -c 'echo dummysecret; exit 3'", "3"),
            ("killed", "sh -c 'kill -9 $$'", "-9"), ("does not exist", "/none/dummysecret", ""),
            ("a folder", self.home, ""), ("quote left open", "cat 'dummysecret", ""),
            ("nothing", '""', ""), ("hangs", "sleep 30", ""),
        ]  # fmt: skip
        for name, command, expected in rows:
            patched = impatient if name == "hangs" else run
            with self.subTest(name), mock.patch.object(subprocess, "run", patched):
                reason = self.skipped(config=f"{head}{command}\n")
                self.assertRegex(reason, f"profile default: .*process.*{expected}")

    def test_an_sso_token_is_found_by_session_or_start_url(self):
        self.web = {PORTAL: of_portal("S")}
        rows = [("corp", BY_SESSION), ("https://corp.example/start", CORP + SSO)]
        for name, settings in rows:
            how = {"config": "[profile x]\n" + settings, "profile": "x"}
            with self.subTest(name):
                self.assertIn("aws sso login", self.skipped(**how))
                self.cache_token(name)
                self.assertEqual(self.found(**how), lasting("S"))
                query = urllib.parse.parse_qs(self.asked[0].url.partition("?")[2])
                expected = {"role_name": ["Reader"], "account_id": ["111122223333"]}
                self.assertEqual(query, expected)
                headers = {"x-amz-sso_bearer_token": "dummysecretSso"}
                self.assertEqual(self.asked, [Asked(self.asked[0].url, headers)])
            for expires, expected in (("2015-08-30T12:36:00Z", "expired"), ("no time", ""),
                                      ("2015-08-30T12:35:59UTC", "expired"), (5, "")):  # fmt: skip
                self.cache_token(name, expiresAt=expires)
                with self.subTest(name, expires=expires):
                    self.assertRegex(self.skipped(**how), expected + ".*aws sso login")
                    self.assertEqual(self.asked, [])

    def test_a_container_is_asked_with_its_token(self):
        token = {"AWS_CONTAINER_AUTHORIZATION_TOKEN": "dummysecret"}
        file = {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "~/identity"}
        ecs, eks = "http://169.254.170.2/v2/it", "http://169.254.170.23/v1/credentials"
        ipv6, https = "http://[fd00:ec2::23]/v1/credentials", "https://keys.example/x"
        rows = [
            ("relative first", {**RELATIVE, FULL: "http://localhost/"}, ecs, None),
            ("token", {**RELATIVE, **token}, ecs, "dummysecret"),
            ("file first", {FULL: eks, **token, **file}, eks, "dummysecretIdentity"),
            ("IPv6", {FULL: ipv6, **file}, ipv6, "dummysecretIdentity"),
            ("loopback", {FULL: "http://127.0.0.2:81/x?y"}, "http://127.0.0.2:81/x?y", None),
            ("IPv6 loopback", {FULL: "http://[::1]:81/x"}, "http://[::1]:81/x", None),
            ("https", {FULL: https, **token}, https, "dummysecret"),
        ]
        self.web = {"http": document("C")}
        for name, environ, url, authorization in rows:
            with self.subTest(name):
                self.assertEqual(self.found({**NO_METADATA, **environ}), lasting("C"))
                headers = {"Authorization": authorization} if authorization else {}
                self.assertEqual(self.asked, [Asked(url, headers)])
        rows = [(FULL, url) for url in (
            "http://keys.example/", "http://169.254.169.254/x", "http://127.0.0.1.example/",
            "http://", "http://localhost@keys.example/", "http://10.0.0.1/", "localhost/x",
            "http://[::1", "http://[]/", "ftp://localhost/x", "file://localhost/etc/hosts",
        )] + [(*RELATIVE, "@keys.example/"), (*file, "~/none")]  # fmt: skip
        for name, value in rows:
            with self.subTest(value):
                environ = {**NO_METADATA, **token, FULL: ipv6, name: value}
                self.assertRegex(self.skipped(environ), "container: [^;]")
                self.assertEqual(self.asked, [])
        environ = {**NO_METADATA, FULL: "http://127.0.0.1:9/"}
        for value in ("dummysecret\nmore", "dummysecret\u20ac"):  # neither can stand in a header
            with self.subTest(value):
                environ["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = value
                self.assertIn("container: ", self.skipped(environ, fetch=awsproxy.fetch))

    def test_metadata_are_asked_with_a_token(self):
        name, there = "AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254"
        for environ, origin in (({}, there), ({name: "http://[::1]:81/"}, "http://[::1]:81")):
            with self.subTest(origin):
                self.web = {k.replace(there, origin): v for k, v in self.metadata.items()}
                self.assertEqual(self.found(environ), lasting("I"))
                token, *rest = self.asked
                self.assertEqual((token.method, token.url), ("PUT", f"{origin}/latest/api/token"))
                self.assertEqual(list(token.headers), ["X-aws-ec2-metadata-token-ttl-seconds"])
                headers = {"X-aws-ec2-metadata-token": "dummysecretImds"}
                urls = [ROLES.replace(there, origin) + role for role in ("", "a%20b")]
                self.assertEqual(rest, [Asked(url, headers) for url in urls])
        for value in ("true", "True"):
            self.assertIn("DISABLED", self.skipped({"AWS_EC2_METADATA_DISABLED": value}))
            self.assertEqual(self.asked, [])
        self.web = {}
        self.assertRegex(self.skipped({}), "EC2 metadata: .*hop limit")
        with self.subTest("a role that is not UTF-8"):
            self.web = {**self.metadata, ROLES: b"\xff"}
            self.assertIn("EC2 metadata: ", self.skipped({}))
        with self.subTest("an endpoint that is no URL"):
            reason = self.skipped({name: "http://[::1"}, fetch=awsproxy.fetch)
            self.assertIn("EC2 metadata: ", reason)


class RoleTest(ChainTest):
    def test_a_role_is_assumed_with_the_keys_of_its_source(self):
        self.put("printed", printed("P", Token="-"))
        self.web = {
            "http://169.254.170.2/": document("C"),
            **self.metadata,
            PORTAL: of_portal("S"),
        }
        self.cache_token("corp")
        by = functools.partial(role, "x", "A")
        y, p, token = by(source_profile="y"), keys("P"), {"web_identity_token_file": "~/identity"}
        by_z = y + role("y", "B", source_profile="z")
        process = f"[profile y]\ncredential_process = cat {self.home}/printed\n"
        rows = [
            ("source profile", f"{y}[profile y]\n{p}", ["PA"]),
            ("itself", by(source_profile="x") + p, ["PA"]),
            ("process", y + process, ["PA"]),
            ("SSO", f"{y}[profile y]\n{BY_SESSION}", ["SA"]),
            ("environment", by(credential_source="Environment"), ["EA"]),
            ("container", by(credential_source="EcsContainer"), ["CA"]),
            ("metadata", by(credential_source="Ec2InstanceMetadata"), ["IA"]),
            ("web identity", by(**token), ["A"]),
            ("source with web identity", y + role("y", "B", **token), ["B", "BA"]),
            ("chain", f"{by_z}[profile z]\n{p}", ["PB", "BA"]),
            # botocore: "static credentials will otherwise take precedence" in a source profile.
            ("source with keys and a role", f"{by_z}{p}[profile z]\n{keys('Q')}", ["PA"]),
        ]
        for name, config, expected in rows:
            with self.subTest(name):
                environ = {**environment("E"), **RELATIVE}
                self.assertEqual(self.found(environ, config, profile="x"), lasting("A"))
                signers = [who + form["RoleArn"][-1] for who, _, form in self.assumed]
                self.assertEqual(signers, expected)

    def test_session_and_region_are_those_of_profile_and_environment(self):
        settings = {"role_session_name": "me", "duration_seconds": "900", "external_id": "a&b"}
        plain = {"Action": "AssumeRole", "RoleArn": "arn:aws:iam::1:role/A",
                 "RoleSessionName": "awsproxy", "Version": "2011-06-15"}  # fmt: skip
        whole = {**plain, "RoleSessionName": "me", "DurationSeconds": "900", "ExternalId": "a&b"}
        identity = {**plain, "Action": "AssumeRoleWithWebIdentity", "RoleSessionName": "me",
                    "WebIdentityToken": "dummysecretIdentity"}  # fmt: skip
        by_token = {"web_identity_token_file": "~/identity", "role_session_name": "me"}
        default, cn = {"AWS_DEFAULT_REGION": "eu-west-2"}, "cn-north-1"
        rows = [
            ({}, {}, plain, "us-east-1", "us-east-1.amazonaws.com"),
            ({}, settings, whole, "us-east-1", "us-east-1.amazonaws.com"),
            ({}, by_token, identity, "", "us-east-1.amazonaws.com"),
            ({}, {"region": "eu-west-1"}, plain, "eu-west-1", "eu-west-1.amazonaws.com"),
            (default, {"region": "eu-west-1"}, plain, "eu-west-2", "eu-west-2.amazonaws.com"),
            ({**default, "AWS_REGION": cn}, {}, plain, cn, "cn-north-1.amazonaws.com.cn"),
        ]
        for environ, given, form, region, host in rows:
            with self.subTest(environ=environ, given=given):
                config = role("x", "A", source_profile="x", **given) + keys("P")
                self.found(environ, config, profile="x")
                ((_, *asked),) = self.assumed
                self.assertEqual(asked, [region, form])
                self.assertEqual(self.asked[0].url, f"https://sts.{host}/")

    def test_a_session_name_is_made_valid(self):
        rows = [
            ("demo", "demo"), ("x" * 64, "x" * 64), ("x" * 65, "x" * 64), (None, "awsproxy"),
            ("", "awsproxy"), ("a b/c:d", "a-b-c-d"), ("A_1+=,.@-z", "A_1+=,.@-z"),
        ]  # fmt: skip
        for given, expected in rows:
            self.assertEqual(awsproxy.session_name(given), expected)
        for given in ("a", "-", "\u00e9", "a\n", " ", "-" * 70, "\u0662\u0662", "x" * 63 + "\n"):
            with self.subTest(given):
                made = awsproxy.session_name(given)
                self.assertRegex(made, r"\A[A-Za-z0-9_+=,.@-]{2,64}\Z")


class Local(http.server.BaseHTTPRequestHandler):
    """Is a container's endpoint, EC2's metadata and some that misbehave."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked = self.headers.get("Authorization") or self.headers.get("X-AWS-EC2-Metadata-Token")
        self.server.asked.append((self.command, self.path, asked))
        if self.path == "/slow":
            self.server.released.wait(DEADLINE)
        if self.path in ("/slow", "/nonsense", "/hangs-up"):
            self.wfile.write(b"nonsense\r\n\r\n" if self.path == "/nonsense" else b"")
            return
        status, body = self.server.answers.get(self.path, (404, b"dummysecret"))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", body.decode())
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET


class LoopbackTest(unittest.TestCase):
    def test_this_machine_is_known_by_each_of_its_addresses(self):
        for host, expected in (
            ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
            ("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", False), ("10.0.0.1", False),
            ("0.0.0.0", False), ("::", False), ("127.0.0.1.example", False), ("", False),
        ):  # fmt: skip
            with self.subTest(host):
                self.assertEqual(awsproxy.is_loopback(host), expected)


class FetchTest(ChainTest):
    def setUp(self):
        super().setUp()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Local)
        self.server.asked, self.server.released = [], threading.Event()
        self.origin = f"http://127.0.0.1:{self.server.server_port}"
        roles = ROLES[len("http://169.254.169.254") :]
        self.server.answers = {
            "/ok": (200, b"fine"), "/moved": (302, self.origin.encode() + b"/ok"),
            "/container": (200, document("C")), "/latest/api/token": (200, b"dummysecretImds"),
            roles: (200, b"role"), roles + "role": (200, document("I")),
        }  # fmt: skip
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        server = self.server
        for action in (server.server_close, thread.join, server.shutdown, server.released.set):
            self.addCleanup(action)

    def test_a_body_is_returned_or_a_reason_is_raised(self):
        self.assertEqual(awsproxy.fetch(self.origin + "/ok", {"Authorization": "b"}), b"fine")
        self.assertEqual(self.server.asked, [("GET", "/ok", "b")])
        with socket.create_server(("127.0.0.1", 0)) as free:
            closed = f"http://127.0.0.1:{free.getsockname()[1]}/"
        here = self.origin
        urls = [here + "/nothing", here + "/hangs-up", here + "/nonsense", here + "/slow", closed,
                "http://127.0.0.1:x/", "http://127.0.0.1/a b", "http://[::1"]  # fmt: skip
        for url in urls:
            with self.subTest(url):
                seconds = 0.2 if "slow" in url else DEADLINE
                with self.assertRaises(Skipped) as caught:
                    awsproxy.fetch(url, {"Authorization": "dummysecret"}, timeout=seconds)
                self.assertRegex(str(caught.exception), "404" if "nothing" in url else ".")
                self.assertNotIn("secret", str(caught.exception))

    def test_a_redirection_is_not_followed(self):  # it would take the token elsewhere
        with self.assertRaisesRegex(Skipped, "302"):
            awsproxy.fetch(self.origin + "/moved", {"Authorization": "dummysecret"})
        self.assertEqual(self.server.asked, [("GET", "/moved", "dummysecret")])

    def test_container_and_metadata_are_asked_over_http(self):
        token = {"AWS_CONTAINER_AUTHORIZATION_TOKEN": "dummysecret"}
        made = self.found({FULL: self.origin + "/container", **token}, fetch=awsproxy.fetch)
        self.assertEqual(made, lasting("C"))
        metadata = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.origin}
        self.assertEqual(self.found(metadata, fetch=awsproxy.fetch), lasting("I"))
        asked = [(method, token) for method, _, token in self.server.asked]
        imds = ("GET", "dummysecretImds")
        self.assertEqual(asked, [("GET", "dummysecret"), ("PUT", None), imds, imds])

    def test_no_proxy_is_asked_for_an_address_of_the_host(self):
        code = (
            "import awsproxy, sys\nfor url in sys.argv[1:]:\n"
            f"    seconds = {DEADLINE} if 'keys' in url else 0.3\n"
            "    try: awsproxy.fetch(url, {}, timeout=seconds)\n    except awsproxy.Skipped: pass\n"
        )
        hosts = "127.0.0.2:9 [::1]:9 localhost:9 169.254.170.2 169.254.170.23 169.254.169.254"
        hosts = [*hosts.split(), "[fd00:ec2::23]", "[fd00:ec2::254]", "keys.example"]
        environ = {"http_proxy": self.origin, "PYTHONPATH": os.path.dirname(awsproxy.__file__)}
        command = [sys.executable, "-c", code, *(f"http://{host}/" for host in hosts)]
        subprocess.run(command, env=environ, timeout=DEADLINE, check=True)
        self.assertEqual(self.server.asked, [("GET", "http://keys.example/", None)])


class Finding:
    """A chain that finds what it is told to, the last for ever; a function is called for it."""

    def __init__(self, *results):
        self.results, self.times = list(results), 0

    def find(self):
        self.times += 1
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        result = result() if callable(result) else result
        if isinstance(result, Exception):
            raise result
        return result


class CacheTest(unittest.TestCase):
    first, second = (
        Credentials(f"dummykey{hours}", "dummysecret", "", EXAMPLE_TIME + 3600 * hours)
        for hours in (1, 2)
    )

    def start(self, *results):
        self.clock, self.chain = Clock(), Finding(*results)
        self.cache = CredentialCache(self.chain, self.clock)

    def check(self, rows):
        """Run (seconds, what is got, how often the chain was asked by then)."""
        for seconds, expected, times in rows:
            with self.subTest(seconds):
                self.clock.now = EXAMPLE_TIME + seconds
                if isinstance(expected, str):
                    with self.assertRaisesRegex(Skipped, expected):
                        self.cache.get()
                else:
                    self.assertIs(self.cache.get(), expected)
                self.assertEqual(self.chain.times, times)

    def test_credentials_are_kept_until_five_minutes_before_their_end(self):
        self.start(self.first, self.second)
        self.assertNotEqual(self.cache.seconds_left, self.cache.seconds_left)  # not a number
        self.check([(0, self.first, 1), (10, self.first, 1), (3299, self.first, 1)])
        self.assertEqual(self.cache.seconds_left, 301)
        self.check([(3300, self.second, 2)])
        self.assertEqual(self.cache.seconds_left, 3900)
        endless = fixed("")
        self.start(endless)
        self.check([(0, endless, 1), (1e9, endless, 1)])
        self.assertEqual(self.cache.seconds_left, float("inf"))

    def test_a_failure_is_tried_again_after_ten_seconds_and_the_old_serve(self):
        first, no = self.first, "no dice"
        self.start(first, Skipped(no))
        self.check([(0, first, 1)])
        with self.assertLogs("awsproxy", "WARNING") as logged:
            self.check([(3300, first, 2), (3309, first, 2), (3310, first, 3), (3599, first, 4)])
        self.assertIn(no, logged.output[0])
        self.assertNotIn("secret", "".join(logged.output))
        self.check([(3600, no, 4), (3608, no, 4), (3609, no, 5), (3618, no, 5)])
        self.chain.results = [self.second]
        self.check([(3619, self.second, 6)])
        self.start(Skipped(no), first)  # the same where there were none
        self.check([(0, no, 1), (9.9, no, 1), (10, first, 2)])

    def test_short_ones_serve_and_expired_ones_do_not(self):
        short = self.first._replace(expires=EXAMPLE_TIME + 200)
        self.start(short)
        self.check([(0, short, 1), (9, short, 1), (10, short, 2), (199, short, 3)])
        self.start(self.first._replace(expires=EXAMPLE_TIME - 1))
        self.check([(0, "", 1), (1, "", 1), (9, "", 1)])

    def test_refused_ones_are_read_again_once(self):
        first, second = self.first, self.second
        self.start(first, second)
        self.check([(0, first, 1)])
        self.assertTrue(self.cache.expire(first))
        self.check([(0, second, 2)])
        self.assertTrue(self.cache.expire(first))  # somebody else has renewed them
        self.check([(0, second, 2)])
        self.chain.results = [Skipped("no dice")]
        self.assertTrue(self.cache.expire(second))
        self.assertFalse(self.cache.expire(second))
        with self.assertLogs("awsproxy", "WARNING"):
            self.check([(1, second, 3), (2, second, 3)])

    def test_one_thread_renews_and_only_who_has_none_waits_for_it(self):
        no, entered, leave = Skipped("no dice"), threading.Event(), threading.Event()
        self.addCleanup(leave.set)
        for old, new in ((self.first, self.second), (None, self.first), (None, no)):
            with self.subTest(old=old, new=new):
                entered.clear()
                leave.clear()

                def slow(new=new):
                    entered.set()
                    leave.wait(DEADLINE)
                    return new

                self.start(*([old, slow] if old else [slow]))
                if old:
                    self.cache.get()
                    self.clock.now += 3300
                with concurrent.futures.ThreadPoolExecutor(6) as pool:
                    renewing = pool.submit(self.cache.get)
                    self.assertTrue(entered.wait(DEADLINE))
                    others = [pool.submit(self.cache.get) for _ in range(5)]
                    ended, _ = concurrent.futures.wait(others, DEADLINE if old else 0.05)
                    self.assertEqual(len(ended), 5 if old else 0)
                    leave.set()
                    got = [
                        each.exception(DEADLINE) or each.result() for each in [renewing, *others]
                    ]
                self.assertEqual(list(map(str, got)), list(map(str, [new, *[old or new] * 5])))
                self.assertEqual(self.chain.times, 2 if old else 1)


class KeyringTest(ChainTest):
    def test_a_client_gets_the_keys_that_it_names_from_a_cache_of_its_own(self):
        arn = "upstream_role_arn = arn:aws:iam::1:role/R\n"
        more = ["", "", "upstream_profile = x\n", "upstream_profile = x\n", arn, arn,
                arn + "upstream_profile = x\n"]  # fmt: skip
        text = [section(f"n {i}", f"akid{i}", "secret") + m for i, m in enumerate(more)]
        clients = awsproxy.read_clients(self.put("clients", "".join(text)))
        self.assertNotIn("secret", repr(clients))
        self.put(".aws/credentials", f"[x]\n{keys('Q')}")
        ring = Keyring(environment("E"), fetch=self.fetch, clock=lambda: EXAMPLE_TIME)
        caches = [ring.of(clients[f"akid{i}"][0]) for i in range(len(more))]
        got = [cache.get().access_key_id[8:] for cache in caches]
        self.assertEqual(got, ["E", "E", "Q", "Q", "R", "R", "R"])
        sessions = [(who, form["RoleSessionName"]) for who, _, form in self.assumed]
        self.assertEqual(sessions, [("E", "n-4"), ("E", "n-5"), ("Q", "n-6")])
        self.assertEqual([caches.index(cache) for cache in caches], [0, 0, 2, 2, 4, 5, 6])
        self.assertIs(ring.of(clients["akid4"][0]), caches[4])
        self.web = {STS: b""}
        how = {"role_arn": "arn:aws:iam::1:role/R"}
        self.assertIn("STS", self.skipped({**NO_METADATA, **environment("E")}, **how))


class ForwardingFlagsTest(unittest.TestCase):
    def setUp(self):
        self.home = folder(self)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        self.environ = {**kept, "HOME": self.home, **NO_METADATA}

    def test_without_credentials_it_warns_at_start_and_refuses_calls(self):
        names = ["environment: ", "web identity: ", "profile default: ", "container: "]
        headers = (("X-Amz-Target", "AmazonSQS.ListQueues"), ("Content-Type", JSON_1_0))
        for flags, tried in (([], names), (["--profile", "nowhere"], ["profile nowhere: "])):
            with self.subTest(flags):
                flags = ["--upstream", "http://127.0.0.1:9", *flags]
                program = Program(self.addCleanup, *flags, env=self.environ)
                self.assertTrue(program.address)
                reply = program.handle(signed(headers=headers, body=b"{}", at=time.time()))
                document = json.loads(reply.body)
                self.assertEqual(reply.status, 403)
                self.assertIn("AccessDenied", document["__type"])
                for said in ("\n".join(program.warnings), document["message"]):
                    named = [name for name in (*names, "profile nowhere: ") if name in said]
                    self.assertEqual(named, tried)
                    self.assertNotIn("Traceback", said)

    def test_what_cannot_be_forwarded_with_or_to_is_refused_with_2(self):
        def put(name, text):
            return write(os.path.join(self.home, name), text)

        os.mkdir(os.path.join(self.home, ".aws"))
        put(".aws/credentials", f"[default]\n{keys('')}[x]\n{keys('A')}[y]\n{keys('B')}")
        mine = put("mine", section("a", "dummykeyA", "dummysecret"))
        named = put("named", section("a", "dummykeyA", "dummysecret") + "upstream_profile = x\n")
        same = [
            "--upstream aws", "--route s3:*=aws", f"--upstream aws --clients {mine} --profile x",
            f"--upstream http://h --clients {named} --profile y",
        ]  # fmt: skip
        wrong = [("--route", row) for row in (
            "", "sqs:*", "=aws", "sqs:*=", "sqs:*=gcp", "s3:Get*=ftp://x", "a b=aws",
            "*=http://h/x", "*=http://169.254.169.254",
        )] + [("--upstream", row) for row in (
            "", "gcp", "localhost:4566", "http://", "http://h:x", "http://h:65536", "http://h/?a",
            "http://u@h", "http://[::1", "http://[fe80::1]", "http://[::ffff:169.254.169.254]",
        )]  # fmt: skip
        rows = [(row, row.split(), r"\Aawsproxy: [^\n]*dummykey[^\n]*--clients[^\n]*\n\Z")
                for row in same]  # fmt: skip
        rows += [(f"{flag} {row}", [flag, row], rf"awsproxy: error: argument {flag}: [^\n]+\n\Z")
                 for flag, row in wrong]  # fmt: skip
        with mock.patch.dict(os.environ, self.environ, clear=True):
            ended = run_each((n, ["--port", "0", *a]) for n, a, _ in rows)
        for name, _, expected in rows:
            with self.subTest(name):
                code, output, errors = ended[name]
                self.assertEqual((code, output), (2, ""), errors)
                self.assertRegex(errors, expected)
                self.assertNotIn("dummysecret", errors)
                self.assertNotIn("Traceback", errors)

    def test_routes_go_to_the_targets_named_the_upstream_last(self):
        flags = "--route sqs:*=embedded --route s3:*=aws --route x:*=deny --upstream http://h:1"
        for given, expected in (
            (flags, "sqs:* Embedded, s3:* Upstream, x:* Deny, * Upstream"),
            ("", "sqs:* Embedded"),
        ):
            options = awsproxy.build_parser().parse_args(given.split())
            routes = awsproxy.build_routes(
                options, Keyring({}), awsproxy.Sqs(Clock()), awsproxy.Pool()
            )
            shown = ", ".join(f"{r.pattern} {type(r.target).__name__}" for r in routes)
            self.assertEqual(shown, expected)


# ==== 3. Streamed bodies ====

CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
CHUNKS_TRAILER = CHUNKS + "-TRAILER"
UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
S3_SCOPE = "20150830/us-east-1/s3/aws4_request"
SIZES = (1, 7, 4096, 65536, 1 << 20, -1)

# "Signature Calculations for the Authorization Header: Transferring Payload in Multiple Chunks"
# and the same "with trailing headers", Amazon S3 API Reference: what is signed, then signatures.
PUBLISHED_CHUNKS = (
    (
        CHUNKS,
        "content-encoding;content-length;host;x-amz-content-sha256;x-amz-date"
        ";x-amz-decoded-content-length;x-amz-storage-class",
        (("Content-Length", "66824"),),
        b"",
        "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9",
        b"ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648",
        b"0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497",
        b"b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9",
    ),
    (
        CHUNKS_TRAILER,
        "content-encoding;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length"
        ";x-amz-storage-class;x-amz-trailer",
        (("X-Amz-Trailer", "x-amz-checksum-crc32c"),),
        b"x-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-trailer-signature:"
        b"d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435\r\n",
        "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e",
        b"b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2",
        b"1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7",
        b"2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992",
    ),
)


def aws_chunked(pieces, seed="", trailers=(), client=DEMO, scope=S3_SCOPE, at=EXAMPLE_TIME):
    """Return an aws-chunked body; its chunks and trailers are signed if there is a seed."""
    key = b"AWS4" + client.secret_access_key.encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    last = seed

    def link(kind, *rest):
        nonlocal last
        text = "\n".join([f"AWS4-HMAC-SHA256-{kind}", amz_date(at), scope, last, *rest])
        last = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
        return last.encode()

    parts = []
    for piece in (*pieces, b""):
        sign_it = b";chunk-signature=" + link("PAYLOAD", EMPTY, sha256(piece)) if seed else b""
        parts += [b"%x%b\r\n%b" % (len(piece), sign_it, piece), b"\r\n" if piece else b""]
    parts += [f"{name}:{value}\r\n".encode() for name, value in trailers]
    if seed and trailers:
        lines = "".join(f"{name}:{value}\n" for name, value in sorted(trailers))
        made = link("TRAILER", sha256(lines.encode()))
        parts.append(b"x-amz-trailer-signature:" + made + b"\r\n")
    return b"".join((*parts, b"\r\n"))


def checksum(name, data):
    if name == "crc32":
        return as_base64(zlib.crc32(data).to_bytes(4, "big"))
    return as_base64(hashlib.new(name, data).digest())


def streamed(
    kind=CHUNKS,
    pieces=(b"a" * 9000, b"bc" * 4096, b"d" * 100),
    trailers=(),
    *,
    length=None,
    announced=None,
    edit=None,
    target="/bucket/key",
    headers=(),
    **how,
):
    """Return the headers of a PutObject in chunks, signed, and its body; `edit` spoils that."""
    if announced is None:
        announced = ",".join(name for name, _ in trailers)
    length = sum(map(len, pieces)) if length is None else length
    given = [("Content-Encoding", "aws-chunked"), ("X-Amz-Content-Sha256", kind)]
    given += [("X-Amz-Decoded-Content-Length", str(length)), *headers]
    given += [("X-Amz-Trailer", announced)] if announced else []
    made = sign("PUT", target, given, service="s3", payload_hash=kind, **how)
    seed = "" if kind == UNSIGNED_TRAILER else made[-1][1].rpartition("=")[2]
    body = aws_chunked(pieces, seed, trailers, how.get("client", DEMO))
    return made, edit(body) if edit else body


def replaced(old, new, count=1):
    def edit(body):
        assert old in body
        return body.replace(old, new, count)

    return edit


def swapped(body):
    """Swap the first two chunks."""
    first = body.index(b"\r\n", body.index(b"\r\n") + 2 + 9000) + 2
    second = body.index(b"\r\n", body.index(b"\r\n", first) + 2 + 8192) + 2
    return body[first:second] + body[:first] + body[second:]


def spoilt_signature(number):
    """Change the last digit of the signature of a chunk, or of the trailers."""

    def edit(body):
        ends = [m.end() for m in re.finditer(b"signature[=:][0-9a-f]{64}", body)]
        at = ends[number] - 1
        return body[:at] + (b"0" if body[at : at + 1] != b"0" else b"1") + body[at + 1 :]

    return edit


def without_last_chunk(body):
    return body[
        : body.rindex(b"\r\n0;") + 2 if b"\r\n0;" in body else body.rindex(b"\r\n0\r\n") + 2
    ]


CRC32 = (("x-amz-checksum-crc32", checksum("crc32", b"hello")),)
HELLO = {"pieces": (b"hello",)}
TRAILING = {"kind": CHUNKS_TRAILER, "trailers": CRC32, **HELLO}
PLAIN = {"kind": UNSIGNED_TRAILER, "trailers": CRC32, **HELLO}
SMALL_HEAD = b"x-amz-checksum-crc32:"
DAMAGED = [  # name, how it is made, the code of the refusal
    ("a byte of a chunk", {"edit": replaced(b"bcbc", b"bcbd")}, "SignatureDoesNotMatch"),
    ("a byte of the last chunk", {"edit": replaced(b"ddd\r", b"dde\r")}, "SignatureDoesNotMatch"),
    ("first signature", {"edit": spoilt_signature(0)}, "SignatureDoesNotMatch"),
    ("third signature", {"edit": spoilt_signature(2)}, "SignatureDoesNotMatch"),
    ("signature of the last chunk", {"edit": spoilt_signature(-1)}, "SignatureDoesNotMatch"),
    ("order", {"edit": swapped}, "SignatureDoesNotMatch"),
    ("size too small", {"edit": replaced(b"2000;", b"1fff;")}, "SignatureDoesNotMatch"),
    ("last size too large", {"edit": replaced(b"\n64;", b"\n65;")}, "SignatureDoesNotMatch"),
    ("size beyond the body", {"edit": replaced(b"\n64;", b"\nfff;")}, "IncompleteBody"),
    ("size beyond reason", {"edit": replaced(b"\n64;", b"\nffffffff;")}, "IncompleteBody"),
    ("no last chunk", {"edit": without_last_chunk}, "IncompleteBody"),
    ("no last chunk, unsigned", {**PLAIN, "edit": without_last_chunk}, "IncompleteBody"),
    ("half a last chunk", {"edit": lambda body: body[:-40]}, "IncompleteBody"),
    ("cut in a chunk", {"edit": lambda body: body[:10000]}, "IncompleteBody"),
    ("nothing", {"edit": lambda body: b""}, "IncompleteBody"),
    ("bytes after the end", {"edit": lambda body: body + b"x"}, "BadRequest"),
    ("a line after the end", {**PLAIN, "edit": lambda body: body + b"\r\n"}, "BadRequest"),
    ("a chunk after the end", {**PLAIN, "edit": lambda b: b + b"1\r\na\r\n"}, "BadRequest"),
    ("decoded length more", {"length": 17293}, "IncompleteBody"),
    ("decoded length less", {"length": 17291}, "IncompleteBody"),
    ("decoded length less, unsigned", {**PLAIN, "length": 4}, "IncompleteBody"),
    ("decoded length more, unsigned", {**PLAIN, "length": 6}, "IncompleteBody"),
    ("decoded length 0", {"length": 0}, "IncompleteBody"),
    ("no signature", {"edit": lambda b: re.sub(b";[^\r]+", b"", b)}, "IncompleteBody"),
    ("0x", {**PLAIN, "edit": replaced(b"5\r\n", b"0x5\r\n")}, "IncompleteBody"),
    ("plus", {**PLAIN, "edit": replaced(b"5\r\n", b"+5\r\n")}, "IncompleteBody"),
    ("blank", {**PLAIN, "edit": replaced(b"5\r\n", b"5 \r\n")}, "IncompleteBody"),
    ("LF", {**PLAIN, "edit": replaced(b"5\r\n", b"5\n")}, "IncompleteBody"),
    ("nine digits", {**PLAIN, "edit": replaced(b"5\r\n", b"000000005\r\n")}, "IncompleteBody"),
    ("extension", {**PLAIN, "edit": replaced(b"5\r\n", b"5;a=b\r\n")}, "IncompleteBody"),
    ("long line", {**PLAIN, "edit": replaced(b"5\r\n", b"5" * 9000)}, "IncompleteBody"),
    ("no line end", {**PLAIN, "edit": replaced(b"hello\r\n", b"hello\n\n")}, "IncompleteBody"),
    ("trailer's name", {**PLAIN, "announced": "x-amz-checksum-sha1"}, "MalformedTrailerError"),
    (
        "no trailer",
        {**PLAIN, "edit": lambda b: re.sub(b"x-amz-check[^\n]*\n", b"", b)},
        "MalformedTrailerError",
    ),
    (
        "trailer twice",
        {**PLAIN, "edit": lambda b: b.replace(b"x-amz", b"x-amz-checksum-crc32:AAAA\r\nx-amz", 1)},
        "MalformedTrailerError",
    ),
    (
        "one more",
        {**PLAIN, "edit": replaced(SMALL_HEAD, b"a:b\r\n" + SMALL_HEAD)},
        "MalformedTrailerError",
    ),
    ("not a line", {**PLAIN, "edit": replaced(SMALL_HEAD, b"a b\r\n")}, "MalformedTrailerError"),
    (
        "changed trailer",
        {**TRAILING, "edit": replaced(b"NhCmhg", b"AAAAAA")},
        "SignatureDoesNotMatch",
    ),
    ("trailers' signature", {**TRAILING, "edit": spoilt_signature(-1)}, "SignatureDoesNotMatch"),
    (
        "no signature of trailers",
        {**TRAILING, "edit": lambda b: re.sub(b"x-amz-trailer-s[^\n]*\n", b"", b)},
        "SignatureDoesNotMatch",
    ),
    (
        "a trailer after the signature",
        {**TRAILING, "edit": lambda b: b[:-2] + b"a:b\r\n\r\n"},
        "MalformedTrailerError",
    ),
    *[
        (
            f"wrong {name}",
            {
                "kind": kind,
                "trailers": ((f"x-amz-checksum-{name}", checksum(name, b"x")),),
                **HELLO,
            },
            "BadDigest",
        )
        for name in ("crc32", "sha1", "sha256")
        for kind in (CHUNKS_TRAILER, UNSIGNED_TRAILER)
    ],
    (
        "a checksum that is none",
        {"kind": UNSIGNED_TRAILER, "trailers": (("x-amz-checksum-crc32", "?"),), **HELLO},
        "InvalidRequest",
    ),
]


def checked_body(made, body, client=DEMO, at=EXAMPLE_TIME):
    request = Request("PUT", "/bucket/key", made, io.BytesIO(body))
    return awsproxy.verify(request, {client.access_key_id: [client]}, at).body


def taken(body, size):
    """Read to the end or to a refusal; return what was given out, and the code."""
    got = bytearray()
    try:
        while True:
            block = body.read(size)
            if not block:
                return bytes(got), None
            got += block
    except ServiceError as error:
        return bytes(got), error.code


class AwsChunkedTest(unittest.TestCase):
    def test_the_published_examples_hold_and_are_made_again(self):
        for kind, names, extra, trailer, seed, first, second, third in PUBLISHED_CHUNKS:
            wire = b"10000;chunk-signature=%b\r\n%b\r\n" % (first, b"a" * 65536)
            wire += b"400;chunk-signature=%b\r\n%b\r\n" % (second, b"a" * 1024)
            wire += b"0;chunk-signature=%b\r\n%b\r\n" % (third, trailer)
            headers = {
                "Host": "s3.amazonaws.com",
                "X-Amz-Date": "20130524T000000Z",
                "X-Amz-Storage-Class": "REDUCED_REDUNDANCY",
                "Authorization": "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524"
                f"/us-east-1/s3/aws4_request,SignedHeaders={names},Signature={seed}",
                "X-Amz-Content-Sha256": kind,
                "Content-Encoding": "aws-chunked",
                "X-Amz-Decoded-Content-Length": "66560",
                **dict(extra),
            }
            target = "/examplebucket/chunkObject.txt"
            clients = {S3_EXAMPLE.access_key_id: [S3_EXAMPLE]}
            scope = awsproxy.CredentialScope("20130524", "us-east-1", "s3")
            key = awsproxy.signing_key(S3_EXAMPLE.secret_access_key, scope)
            for size in SIZES:
                request = Request("PUT", target, tuple(headers.items()), io.BytesIO(wire))
                body = awsproxy.verify(request, clients, S3_TIME).body
                with self.subTest(kind, size=size):
                    self.assertEqual(taken(body, size), (b"a" * 66560, None))
            request = Request("PUT", target, tuple(headers.items()), io.BytesIO(wire))
            body = awsproxy.verify(request, clients, S3_TIME).body
            signer = awsproxy.ChunkSigner(key, scope, "20130524T000000Z", seed)
            with self.subTest(kind, made="again"):
                self.assertEqual(b"".join(awsproxy.aws_chunks(body, signer)), wire)
                self.assertEqual(awsproxy.aws_chunked_length(body), len(wire))

    def test_whatever_is_damaged_is_refused_before_the_last_byte(self):
        for name, how, code in DAMAGED:
            made, body = streamed(**how)
            content = b"".join(how.get("pieces", (b"a" * 9000, b"bc" * 4096, b"d" * 100)))
            for size in SIZES:
                with self.subTest(name, size=size):
                    got, refused = taken(checked_body(made, body), size)
                    self.assertEqual(refused, code)
                    self.assertLess(len(got), max(how.get("length", 0), len(content)))
                    self.assertTrue(content.startswith(got))

    def test_what_clients_leave_out_or_write_otherwise_is_taken(self):
        sha1 = ("x-amz-checksum-sha1", checksum("sha1", b"hello"))
        two = {"trailers": (*CRC32, sha1), **HELLO}
        crc32c = (("x-amz-checksum-crc32c", "mnG7TA=="),)
        for name, how in [
            ("signed", {}),
            ("trailer", TRAILING),
            ("unsigned", PLAIN),
            ("one byte chunks", {"pieces": [bytes([n]) for n in b"hello"]}),
            ("no content", {"pieces": ()}),
            ("two trailers", {"kind": CHUNKS_TRAILER, **two}),
            ("two trailers, unsigned", {"kind": UNSIGNED_TRAILER, **two}),
            (
                "a checksum not computed here",
                {"kind": CHUNKS_TRAILER, "trailers": crc32c, **HELLO},
            ),
            ("announced otherwise", {**PLAIN, "announced": " X-Amz-Checksum-CRC32 "}),
            ("upper-case size", {"pieces": (b"a" * 171,), "edit": replaced(b"ab;", b"AB;")}),
            (
                "minio-go",
                {**TRAILING, "edit": replaced(b"\r\nx-amz-trailer", b"\n\r\nx-amz-trailer")},
            ),
            ("minio-go, unsigned", {**PLAIN, "edit": lambda b: b[:-4] + b"\n\r\n\r\n"}),
            ("LF alone", {**PLAIN, "edit": lambda b: b[:-4] + b"\n\r\n"}),
            ("a blank after the colon", {**PLAIN, "edit": replaced(b"crc32:", b"crc32: ")}),
            ("no last CRLF", {"edit": lambda body: body[:-2]}),
        ]:
            made, body = streamed(**how)
            content = b"".join(how.get("pieces", (b"a" * 9000, b"bc" * 4096, b"d" * 100)))
            for size in SIZES:
                with self.subTest(name, size=size):
                    self.assertEqual(taken(checked_body(made, body), size), (content, None))

    def test_a_signed_chunk_is_not_held_beyond_16_mebibytes(self):
        made, body = streamed(pieces=(b"a" * (16 * MEBIBYTE + 1),))
        self.assertEqual(taken(checked_body(made, body), 65536), (b"", "IncompleteBody"))
        made, body = streamed(pieces=(b"a" * (16 * MEBIBYTE),))
        self.assertEqual(len(taken(checked_body(made, body), 65536)[0]), 16 * MEBIBYTE)

    def test_the_head_must_say_what_the_body_needs(self):
        for name, how, code in [
            ("length not a number", {"length": "-1"}, "MissingContentLength"),
            ("no length", {"length": ""}, "MissingContentLength"),
            ("no trailer announced", {**PLAIN, "announced": ""}, "MalformedTrailerError"),
            ("a trailer announced", {"announced": "a"}, "MalformedTrailerError"),
        ]:
            made, body = streamed(**how)
            with self.subTest(name), self.assertRaises(ServiceError) as caught:
                checked_body(made, body)
            self.assertEqual(caught.exception.code, code, name)

    def test_the_length_is_known_beforehand(self):
        names = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")
        random_lengths = random.Random(1).sample(range(300000), 20)
        lengths = (0, 1, 15, 16, 255, 256, 65535, 65536, 65537, 131072, 200000, *random_lengths)
        scope = awsproxy.CredentialScope("20150830", "us-east-1", "s3")
        values = {"crc32c": "mnG7TA==", "crc64nvme": "AAAAAAAAAAA="}
        for length in lengths:
            data = b"x" * length
            for chosen in ((), ("crc32",), names):
                given = [
                    (f"x-amz-checksum-{n}", values.get(n) or checksum(n, data)) for n in chosen
                ]
                for kind in (CHUNKS_TRAILER, UNSIGNED_TRAILER) if chosen else (CHUNKS,):
                    made, wire = streamed(kind, (data,) if data else (), given)
                    body = checked_body(made, wire)
                    signer = awsproxy.ChunkSigner(b"k", scope, "", "") if body.signed else None
                    for size in (65536, 1000):
                        body = checked_body(made, wire)
                        with self.subTest(length=length, kind=kind, names=chosen, size=size):
                            told = awsproxy.aws_chunked_length(body, size)
                            written = b"".join(awsproxy.aws_chunks(body, signer, size))
                            self.assertEqual(told, len(written))
        made, wire = streamed(UNSIGNED_TRAILER, trailers=(("x-amz-other", "1"),))
        self.assertIsNone(awsproxy.aws_chunked_length(checked_body(made, wire)))


class HashedBodyTest(unittest.TestCase):
    def test_the_last_byte_is_given_out_once_the_hash_has_proved_right(self):
        for content in (b"", b"a", b"hello", b"x" * 200000):
            for size in SIZES:
                for declared in (sha256(content), sha256(b"other")):
                    request = Request("PUT", "/", (), io.BytesIO(content))
                    got, code = taken(awsproxy.HashedBody(request, declared), size)
                    with self.subTest(length=len(content), size=size, declared=declared):
                        if declared == sha256(content):
                            self.assertEqual((got, code), (content, None))
                        else:
                            self.assertIsNotNone(code)
                            self.assertLess(len(got), max(len(content), 1))


# ==== 6. Upstream ====

OURS = Client("ours", EXAMPLE.access_key_id, EXAMPLE.secret_access_key, "oursession")
OUR_KEYS = awsproxy.Credentials(*OURS[1:4])
NEXT_KEYS = awsproxy.Credentials("AKIDNEXT", "nextsecret")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SEND = '{"QueueUrl":"http://localhost:8081/000000000000/jobs","MessageBody":"a"}'


def json_call(operation, body=b"{}"):
    """Return method, target, headers and body of a call of Amazon SQS."""
    kind = (("X-Amz-Target", f"AmazonSQS.{operation}"), ("Content-Type", JSON_1_0))
    return "POST", "/", kind, body


def form_call(text, target="/"):
    return "POST", target, (FORM,), text.encode()


LIST = json_call("ListQueues")
LIST_FORM = form_call("Action=ListQueues&Version=2012-11-05")
SEND_JSON = json_call("SendMessage", SEND.encode())
SEND_FORM = form_call("Action=SendMessage&Version=2012-11-05&MessageBody=a", "/000000000000/jobs")


class Keys:
    """Stands for credentials that may expire: then the next are taken, if there are any."""

    def __init__(self, *given):
        self.given = list(given)
        self.expired = []

    def ready(self):
        return self.given[0] if self.given else None

    def get(self):
        if not self.given:
            raise awsproxy.Skipped("there are none")
        return self.given[0]

    def expire(self, keys):
        self.expired.append(keys)
        if len(self.given) > 1:
            del self.given[0]
            return True
        return False


class Arrived(NamedTuple):
    connection: int
    method: str
    target: str
    headers: tuple
    body: bytes
    sha256: str
    complete: bool

    def all(self, name):
        return [value for given, value in self.headers if given.lower() == name]

    def one(self, name):
        (value,) = self.all(name) or (None,)
        return value


class Recording:
    """An upstream that keeps what arrives, and answers it with the next of its answers.

    An answer is bytes, or a function that is given the socket and the request; after b"" of
    it the connection goes on, after None it is closed.  `early` is called with the socket
    instead, before the body is read.
    """

    def __init__(self):
        self.arrived = queue.Queue()
        self.answers = []
        self.early = None
        self.keep = True
        self.connections = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def stop(self):
        for each in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(DEADLINE)
        self.listener.close()

    def next(self):
        return self.arrived.get(timeout=DEADLINE)

    def accept(self):
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections.append(connection)
            serve = threading.Thread(
                target=self.serve, args=(connection, len(self.connections)), daemon=True
            )
            self.threads.append(serve)
            serve.start()

    def serve(self, connection, number):
        with connection, connection.makefile("rb") as stream, contextlib.suppress(OSError):
            while True:
                lines = []
                while not lines or lines[-1] not in ("\r\n", ""):
                    lines.append(stream.readline().decode("latin-1"))
                if not lines.pop():
                    return
                method, target, _ = lines[0].split(" ")
                headers = tuple(tuple(line[:-2].split(": ", 1)) for line in lines[1:])
                if self.early:
                    self.early(connection)
                    return
                head = Arrived(number, method, target, headers, b"", "", False)
                arrived = self.read(head, stream)
                self.arrived.put(arrived)
                answer = self.answers.pop(0) if self.answers else OK
                if callable(answer):
                    answer = answer(connection, arrived)
                if answer is None or not arrived.complete:
                    return
                connection.sendall(answer)

    def read(self, head, stream):
        digest, kept = hashlib.sha256(), bytearray()

        def take(left):
            while left:
                block = stream.read(min(left, 65536))
                digest.update(block)
                kept.extend(block if self.keep else b"")
                left -= len(block)
                if not block:
                    return False
            return True

        with contextlib.suppress(OSError, ValueError):
            complete = False
            if head.all("transfer-encoding"):
                while take(size := int(stream.readline(), 16)) and size:
                    stream.readline()
                complete = stream.readline() == b"\r\n"
            else:
                complete = take(int(head.one("content-length") or 0))
        return head._replace(body=bytes(kept), sha256=digest.hexdigest(), complete=complete)


class Got(NamedTuple):
    status: int
    headers: list
    body: bytes
    whole: bool

    def all(self, name):
        return [value for given, value in self.headers if given.lower() == name]


def read_response(wire, method="GET"):
    """Read an answer by Python's own client, which is told where a body breaks off."""
    response = http.client.HTTPResponse(wire.socket, method=method)
    with contextlib.closing(response):
        response.begin()
        whole = True
        try:
            body = response.read()
        except http.client.IncompleteRead as error:
            body, whole = error.partial, False
        except ConnectionResetError:
            body, whole = b"", False
        return Got(response.status, response.getheaders(), body, whole)


class Through(unittest.TestCase):
    """A Server that forwards to a Recording, and a client of it."""

    service = "sqs"

    def setUp(self):
        self.upstream = Recording()
        self.addCleanup(self.upstream.stop)
        self.start()

    def start(self, endpoint=None, timeout=DEADLINE, keys=(OUR_KEYS,), **settings):
        self.endpoint = endpoint or awsproxy.Endpoint("http", "127.0.0.1", self.upstream.port)
        self.pool = awsproxy.Pool(connect_timeout=timeout, timeout=timeout)
        self.addCleanup(self.drain, self.pool, self.endpoint)
        self.keys = Keys(*keys)
        target = awsproxy.Upstream(
            self.endpoint, lambda client: self.keys, self.pool, clock=lambda: EXAMPLE_TIME
        )
        settings.setdefault("routes", [awsproxy.Route("*", target)])
        self.proxy = Proxy(awsproxy.DEMO_CLIENTS, clock=lambda: EXAMPLE_TIME, **settings)
        self.running = Running(self.proxy)
        self.addCleanup(self.running.stop)

    def drain(self, pool, endpoint):
        """Close the connections that are kept."""
        with contextlib.suppress(awsproxy.UpstreamError, UnicodeError):
            reused = True
            while reused:
                connection = pool.take(endpoint)
                reused = connection.reused
                connection.close()

    def put(self, raw, method="GET", wire=None):
        """Send the bytes of a request and return the answer."""
        kept = wire or self.running.connect()
        kept.socket.settimeout(2 * DEADLINE)
        kept.send(raw)
        got = read_response(kept, method)
        if not wire:
            kept.close()
        return got

    def call(self, method, target, headers=(), body=b"", wire=None, after=(), **how):
        """Send a signed request; `after` are headers that are not signed."""
        how.setdefault("service", self.service)
        made = sign(method, target, headers, body, **how)
        if body or method in ("POST", "PUT"):
            made += (("Content-Length", str(len(body))),)
        return self.put(raw_request(method, target, (*made, *after), body), method, wire)

    def s3(self, method, target, headers=(), body=b"", **how):
        declared = how.setdefault("payload_hash", sha256(body))
        headers = (*headers, ("X-Amz-Content-Sha256", declared))
        return self.call(method, target, headers, body, service="s3", **how)

    def assert_signed(self, arrived, service="sqs", client=OURS, region="us-east-1", plain=True):
        """Check the signature as our own signer makes it, as awsproxy does, and botocore."""
        scope = f"20150830/{region}/{service}/aws4_request"
        found = re.fullmatch(
            "AWS4-HMAC-SHA256 Credential=([^,]*), SignedHeaders=([^,]*), Signature=([0-9a-f]{64})",
            arrived.one("authorization"),
        )
        self.assertEqual(found[1], f"{client.access_key_id}/{scope}")
        names = found[2].split(";")
        present = {name.lower() for name, _ in arrived.headers}
        once = {"host", "content-type", "content-md5"}
        wanted = sorted(n for n in present if n in once or n.startswith("x-amz-"))
        self.assertEqual(names, wanted)
        self.assertEqual(arrived.one("x-amz-date"), "20150830T123600Z")
        self.assertEqual(arrived.one("x-amz-security-token"), client.session_token or None)
        self.assertEqual(arrived.one("host"), self.endpoint.authority)
        payload = arrived.one("x-amz-content-sha256") or arrived.sha256
        clients = {client.access_key_id: [client]}
        request = Request(
            arrived.method, arrived.target, arrived.headers, io.BytesIO(arrived.body)
        )
        checked = awsproxy.verify(request, clients, EXAMPLE_TIME, service=service)
        content = checked.body.read()
        if not plain:
            return content
        path, _, query = arrived.target.partition("?")
        given = (
            client, arrived.method, canonical_path(path, service), sorted_query(query),
            arrived.headers, names, payload, EXAMPLE_TIME, scope,
        )  # fmt: skip
        self.assertEqual(signature(*given).hex, found[3])
        if BOTO3:
            self.assertEqual(self.by_botocore(arrived, names, client, service, region), found[3])
        return content

    def by_botocore(self, arrived, names, client, service, region):
        from botocore.auth import S3SigV4Auth, SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        kind = S3SigV4Auth if service == "s3" else SigV4Auth
        auth = kind(Credentials(*client[1:4]), service, region)
        request = AWSRequest(
            method=arrived.method,
            url=self.endpoint.origin + arrived.target,
            headers={name: ",".join(arrived.all(name)) for name in names},
            data=arrived.body,
        )
        request.context["timestamp"] = "20150830T123600Z"
        text = auth.string_to_sign(request, auth.canonical_request(request))
        return auth.signature(text, request)


class ForwardedHeadersTest(Through):
    def test_what_signs_and_what_tells_of_the_way_is_gone_and_all_else_kept(self):
        gone = [
            ("Connection", "keep-alive, X-Hop"), ("X-Hop", "1"), ("Keep-Alive", "timeout=5"),
            ("TE", "trailers"), ("Trailer", "X-T"), ("Upgrade", "h2c"),
            ("Proxy-Authorization", "Basic eDp5"), ("Proxy-Connection", "keep-alive"),
            ("X-Forwarded-For", "192.0.2.1"), ("X-Forwarded-Proto", "https"),
            ("x-forwarded-anything", "1"), ("Forwarded", "for=192.0.2.1"), ("Via", "1.1 a"),
            ("Expect", "100-continue"),
        ]  # fmt: skip
        kept = [
            ("User-Agent", "Boto3/1.44"), ("amz-sdk-invocation-id", "1-2"),
            ("amz-sdk-request", "attempt=1; max=3"), ("X-Amzn-Trace-Id", "Root=1-2-3"),
            ("x-amzn-query-mode", "true"), ("Accept", "a"), ("X-ODD-Case", "b  c"),
            ("Accept", "d"), ("x-odd-case", "e"), ("Content-Md5", "mZFLkyvTelC5g8XnyQrpOw=="),
            ("Accept-Encoding", "gzip"), ("Date", "Sun, 30 Aug 2015 12:36:00 GMT"),
        ]  # fmt: skip
        method, target, kind, body = LIST
        headers = (*kind, *gone, ("X-Amz-Date", amz_date(EXAMPLE_TIME)), *kept)
        got = self.call(method, target, headers, body, client=SESSION)
        self.assertEqual((got.status, got.body), (200, b"ok"))
        arrived = self.upstream.next()
        self.assert_signed(arrived)
        names = {name.lower() for name, _ in arrived.headers}
        self.assertEqual(names & {name.lower() for name, _ in gone}, set())
        own = ("host", "content-length", "x-amz-date", "x-amz-security-token", "authorization")
        wanted = [pair for pair in (*kind, *kept) if pair[0] != "Date"]
        self.assertEqual([p for p in arrived.headers if p[0].lower() not in own], wanted)
        self.assertNotIn("dummy", str(arrived))

    def test_connection_cannot_take_away_what_decides_the_action(self):
        """Else the call is routed by its X-Amz-Target, and carried out by its query string."""
        deny = awsproxy.Route("sqs:Purge*", awsproxy.Deny())
        upstream = awsproxy.Route(
            "*",
            awsproxy.Upstream(
                self.endpoint, lambda client: self.keys, self.pool, clock=lambda: EXAMPLE_TIME
            ),
        )
        self.start(routes=[deny, upstream])
        for name in ("x-amz-target", "X-Amz-Target, content-type", "content-length", "host"):
            target = "/?Action=PurgeQueue&QueueUrl=a&Version=2012-11-05"
            headers = (*LIST[2], ("Connection", name))
            got = self.call("POST", target, headers, b"{}")
            with self.subTest(name):
                if got.status == 200:
                    arrived = self.upstream.next()
                    self.assertEqual(arrived.one("x-amz-target"), "AmazonSQS.ListQueues")
                    self.assert_signed(arrived)
                else:
                    self.assertEqual(got.status, 400)

    def test_path_and_query_are_kept_to_the_byte(self):
        for target, plain in [
            ("/", True),
            ("/bucket/a//b", True),
            ("//key", True),
            ("/bucket//", True),
            ("/bucket/a+b%20c%2Bd", False),
            ("/bucket/a%2Fb/%C3%A9", True),
            ("/bucket/a%2fb%c3%a9", False),
            ("/bucket/../a/./b/..", True),
            ("/bucket/%41(b)'*!", False),
            ("/bucket/a?uploadId=A%2FB%2B&partNumber=1", True),
            ("/bucket?list-type=2&prefix=a+b&delimiter=%2f", False),
            ("/bucket?acl", True),
            ("/bucket?b=2&a=1&a=0&c=", True),
            ("/bucket/a?x-amz-meta-a=1", True),
        ]:
            with self.subTest(target):
                canonical = awsproxy.canonical_path(target.partition("?")[0], False)
                query = Request("GET", target, (), io.BytesIO()).query
                encoded = awsproxy.canonical_query(query)
                how = f"{canonical}?{encoded}" if encoded else canonical
                made = sign(
                    "GET", how, (("X-Amz-Content-Sha256", EMPTY),), service="s3",
                    payload_hash=EMPTY,
                )  # fmt: skip
                got = self.put(raw_request("GET", target, made))
                self.assertEqual(got.status, 200, got.body)
                arrived = self.upstream.next()
                self.assertEqual(arrived.target, target)
                self.assert_signed(arrived, "s3", plain=plain)

    def test_paths_of_other_services_are_kept_to_the_byte(self):
        for target in (
            "/2015-03-31/functions/arn%3Aaws%3Alambda/invocations",
            "/2015-03-31/functions/a%2Fb?Marker=a%20b&MaxItems=1",
            "/2015-03-31/functions/",
        ):
            with self.subTest(target):
                self.assertEqual(self.call("GET", target, service="lambda").status, 200)
                arrived = self.upstream.next()
                self.assertEqual((arrived.target, arrived.all("content-length")), (target, []))
                self.assert_signed(arrived, "lambda")

    def test_a_presigned_call_is_signed_in_its_header(self):
        extra = "X-Amz-Meta-A=b%20c&x-id=GetObject&response-content-type=a%2Fb&versionId=1"
        rest = "x-id=GetObject&response-content-type=a%2Fb&versionId=1"
        action = "Action=ListQueues&Version=2012-11-05"
        for name, service, target, given, wanted, hoisted in [
            ("s3", "s3", f"/b/a%2Fb?{extra}", (), f"/b/a%2Fb?{rest}", "b c"),
            ("nothing else", "s3", "/b/a", (), "/b/a", None),
            ("a header", "s3", "/b/a", (("x-amz-meta-a", "d"),), "/b/a", "d"),
            ("both", "s3", "/b/a?x-amz-meta-a=d", (("x-amz-meta-a", "d"),), "/b/a", "d"),
            ("sqs", "sqs", f"/?{action}", (), f"/?{action}", None),
        ]:
            link = presign("GET", target, given, service=service, client=SESSION)
            got = self.put(raw_request("GET", link, given))
            with self.subTest(name):
                self.assertEqual(got.status, 200, got.body)
                arrived = self.upstream.next()
                self.assertEqual(arrived.target, wanted)
                self.assertEqual(arrived.one("x-amz-meta-a"), hoisted)
                self.assert_signed(arrived, service)
                self.assertNotIn("dummysession", str(arrived))

    def test_a_request_cannot_choose_where_it_goes(self):
        elsewhere = (("Host", "sqs.evil.example"),)
        self.assertEqual(self.call(*LIST[:2], (*LIST[2], *elsewhere), LIST[3]).status, 200)
        self.assert_signed(self.upstream.next())
        for target in ("http://127.0.0.1:1/", "//127.0.0.1:1/", "127.0.0.1:1", "*"):
            got = self.call("GET", target, service="lambda")
            with self.subTest(target):
                if target.startswith("//"):
                    self.assertNotEqual(got.status, 503)  # a path like any other, if not to sign
                else:
                    self.assertEqual(got.status, 400)


class ForwardedBodyTest(Through):
    BIG = random.Random(2).randbytes(300000) if sys.version_info >= (3, 9) else b""

    def test_a_body_of_amazon_s3_streams_if_it_is_what_was_signed(self):
        big = self.BIG
        crc = (("x-amz-checksum-crc32", checksum("crc32", big)),)
        bad = (("x-amz-checksum-crc32", checksum("crc32", b"")),)
        pieces = [big[at : at + 70000] for at in range(0, len(big), 70000)]
        spoil = {"edit": lambda body: body[:250000] + b"\0\1" + body[250002:]}
        for name, how, code in [
            ("signed", {}, None),
            ("signed, trailer", {"kind": CHUNKS_TRAILER, "trailers": crc}, None),
            ("unsigned, trailer", {"kind": UNSIGNED_TRAILER, "trailers": crc}, None),
            ("one chunk", {"kind": UNSIGNED_TRAILER, "trailers": crc, "pieces": [big]}, None),
            ("unknown trailer", {"kind": UNSIGNED_TRAILER, "trailers": (("a-b", "c"),)}, None),
            ("signed, spoilt", spoil, "SignatureDoesNotMatch"),
            ("crc", {"kind": UNSIGNED_TRAILER, "trailers": bad}, "BadDigest"),
            ("crc, signed", {"kind": CHUNKS_TRAILER, "trailers": bad}, "BadDigest"),
            ("no end", {"edit": lambda body: body[:-100]}, "IncompleteBody"),
        ]:
            made, body = streamed(**{"pieces": pieces, **how})
            for nested in (False, True):
                framing, sent = ("Content-Length", str(len(body))), body
                if nested:
                    framing, sent = ("Transfer-Encoding", "chunked"), in_chunks(body, 50021)
                got = self.put(raw_request("PUT", "/bucket/key", (*made, framing), sent), "PUT")
                arrived = self.upstream.next()
                with self.subTest(name, nested=nested):
                    self.assertEqual(arrived.complete, code is None)
                    if code:
                        self.assertEqual(got.status, 403 if code[0] == "S" else 400)
                        self.assertIn(f"<Code>{code}</Code>".encode(), got.body)
                    else:
                        self.assertEqual((got.status, got.body), (200, b"ok"))
                        self.assertEqual(self.assert_signed(arrived, "s3"), big)
                        known = name != "unknown trailer"
                        self.assertEqual(bool(arrived.all("content-length")), known)
        self.assertEqual(self.s3("GET", "/b/a").status, 200)

    def test_a_declared_hash_holds_or_the_body_is_not_completed(self):
        for name, declared, body, code in [
            ("right", sha256(self.BIG), self.BIG, None),
            ("small", sha256(b"abc"), b"abc", None),
            ("empty", EMPTY, b"", None),
            ("wrong", sha256(self.BIG), self.BIG[:-1] + b"\0", "XAmzContentSHA256Mismatch"),
            ("wrong, small", EMPTY, b"abc", "XAmzContentSHA256Mismatch"),
            ("unsigned", "UNSIGNED-PAYLOAD", self.BIG, None),
        ]:
            got = self.s3("PUT", "/b/a", (), body, payload_hash=declared)
            arrived = self.upstream.next()
            with self.subTest(name):
                self.assertEqual(arrived.complete, code is None)
                self.assertEqual(arrived.one("content-length"), str(len(body)))
                if code:
                    self.assertEqual(got.status, 400)
                    self.assertIn(f"<Code>{code}</Code>".encode(), got.body)
                else:
                    self.assertEqual((got.status, arrived.body), (200, body))
                    self.assertEqual(arrived.one("x-amz-content-sha256"), declared)
                    self.assert_signed(arrived, "s3")

    def test_a_client_that_hangs_up_leaves_the_body_incomplete(self):
        for declared in ("UNSIGNED-PAYLOAD", sha256(self.BIG)):
            made = sign(
                "PUT", "/b/a", (("X-Amz-Content-Sha256", declared),), service="s3",
                payload_hash=declared,
            )  # fmt: skip
            length = ("Content-Length", str(len(self.BIG)))
            wire = self.running.connect()
            wire.send(raw_request("PUT", "/b/a", (*made, length), self.BIG[:-1]))
            wire.close()
            with self.subTest(declared):
                self.assertFalse(self.upstream.next().complete)

    def test_a_long_body_of_another_service_is_forwarded_whole(self):
        self.start(max_body=4000000)
        for length, status in ((1048575, 200), (1048576, 200), (3999999, 200), (4000001, 413)):
            body = bytes(length)
            for chunked in (False, True):
                made = sign("POST", "/a", (), body, service="lambda")
                framing = (
                    ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", length)
                )
                sent = in_chunks(body, 100000) if chunked else body
                got = self.put(raw_request("POST", "/a", (*made, framing), sent), "POST")
                with self.subTest(length=length, chunked=chunked):
                    self.assertEqual(got.status, status)
                    if status == 200:
                        arrived = self.upstream.next()
                        self.assertEqual(arrived.one("content-length"), str(length))
                        self.assertEqual((len(arrived.body), arrived.complete), (length, True))
                        self.assert_signed(arrived, "lambda")
        self.assertTrue(self.upstream.arrived.empty())

    def test_an_object_of_64_mebibytes_passes_in_constant_memory(self):
        block, count = os.urandom(MEBIBYTE), 64
        digest = hashlib.sha256()
        for _ in range(count):
            digest.update(block)
        self.upstream.keep = False
        length = count * MEBIBYTE

        def answer_in(framing):
            def answer(connection, arrived):
                connection.sendall(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % framing)
                for _ in range(count):
                    chunked = (
                        b"%x\r\n%b\r\n" % (MEBIBYTE, block) if b"chunked" in framing else block
                    )
                    connection.sendall(chunked)
                return b"0\r\n\r\n" if b"chunked" in framing else b""

            return answer

        framings = (b"Content-Length: %d" % length, b"Transfer-Encoding: chunked")
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for declared in (digest.hexdigest(), "UNSIGNED-PAYLOAD"):
            made = sign(
                "PUT", "/b/a", (("X-Amz-Content-Sha256", declared),), service="s3",
                payload_hash=declared,
            )  # fmt: skip
            wire = self.running.connect()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            wire.send(raw_request("PUT", "/b/a", (*made, ("Content-Length", length))))
            for _ in range(count):
                wire.send(block)
            got = read_response(wire)
            arrived = self.upstream.next()
            with self.subTest(put=declared):
                self.assertEqual((got.status, arrived.sha256), (200, digest.hexdigest()))
                self.assertLess(tracemalloc.get_traced_memory()[1] - before, 16 * MEBIBYTE)
            wire.close()
        for framing in framings:
            self.upstream.answers = [answer_in(framing)]
            made = sign(
                "GET", "/b/a", (("X-Amz-Content-Sha256", EMPTY),), service="s3",
                payload_hash=EMPTY,
            )  # fmt: skip
            wire = self.running.connect()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            wire.send(raw_request("GET", "/b/a", made))
            response, received = http.client.HTTPResponse(wire.socket), hashlib.sha256()
            with contextlib.closing(response):
                response.begin()
                for data in iter(lambda r=response: r.read(65536), b""):
                    received.update(data)
            with self.subTest(get=framing):
                self.assertEqual(received.digest(), digest.digest())
                self.assertLess(tracemalloc.get_traced_memory()[1] - before, 16 * MEBIBYTE)
            wire.close()


def answer(status=b"200 OK", *lines, body=b""):
    return b"\r\n".join([b"HTTP/1.1 " + status, *lines, b"", body])


def length_of(body):
    return b"Content-Length: %d" % len(body)


def then_close(data):
    def act(connection, arrived):
        connection.sendall(data)

    return act


LONG = bytes(range(256)) * 1000
GZIP = b"\x1f\x8b\x08\0 not decompressed"


class ForwardedAnswerTest(Through):
    service = "s3"

    def test_an_answer_is_passed_on_as_it_is(self):
        repeated = (b"Set-Cookie: a=1", b"X-ODD-Case: b", b"Set-Cookie: c=2", b"x-amz-id-2: d")
        location = b"Location: http://elsewhere.example/"
        for name, method, given, status, body in [
            (
                "plain",
                "GET",
                answer(b"200 OK", *repeated, length_of(b"abc"), body=b"abc"),
                200,
                b"abc",
            ),
            ("odd reason", "GET", answer(b"299 ", length_of(b"a"), body=b"a"), 299, b"a"),
            ("no reason", "GET", answer(b"200", length_of(b"a"), body=b"a"), 200, b"a"),
            ("empty", "GET", answer(b"200 OK", b"Content-Length: 0"), 200, b""),
            ("long", "GET", answer(b"200 OK", *repeated, length_of(LONG), body=LONG), 200, LONG),
            (
                "chunked",
                "GET",
                answer(
                    b"200 OK",
                    b"Transfer-Encoding: chunked",
                    *repeated,
                    body=in_chunks(b"hello", 2),
                ),
                200,
                b"hello",
            ),
            (
                "chunked, long",
                "GET",
                answer(b"200 OK", b"transfer-encoding: Chunked", body=in_chunks(LONG, 70000)),
                200,
                LONG,
            ),
            (
                "gzip",
                "GET",
                answer(b"200 OK", b"Content-Encoding: gzip", length_of(GZIP), body=GZIP),
                200,
                GZIP,
            ),
            (
                "301",
                "GET",
                answer(
                    b"301 Moved",
                    location,
                    b"x-amz-bucket-region: eu-west-1",
                    length_of(b"x"),
                    body=b"x",
                ),
                301,
                b"x",
            ),
            (
                "307",
                "PUT",
                answer(b"307 Temporary Redirect", location, b"Content-Length: 0"),
                307,
                b"",
            ),
            ("304", "GET", answer(b"304 Not Modified", b'ETag: "a"'), 304, b""),
            (
                "304 with a length",
                "GET",
                answer(b"304 Not Modified", b"Content-Length: 9"),
                304,
                b"",
            ),
            ("204", "DELETE", answer(b"204 No Content", b"x-amz-id-2: d"), 204, b""),
            ("HEAD", "HEAD", answer(b"200 OK", b"Content-Length: 1234567", *repeated), 200, b""),
            ("HEAD, 404", "HEAD", answer(b"404 Not Found", b"Content-Type: a"), 404, b""),
            (
                "206",
                "GET",
                answer(b"206 Partial", b"Content-Range: bytes 0-0/5", length_of(b"a"), body=b"a"),
                206,
                b"a",
            ),
            (
                "403",
                "GET",
                answer(b"403 Forbidden", length_of(b"<Error/>"), body=b"<Error/>"),
                403,
                b"<Error/>",
            ),
            ("500", "GET", answer(b"500 Oops", length_of(b"x"), body=b"x"), 500, b"x"),
            ("100 before", "PUT", answer(b"100 Continue") + OK, 200, b"ok"),
            (
                "103 before",
                "GET",
                answer(b"103 Early Hints", b"Link: </a>") + answer(b"100 Continue") + OK,
                200,
                b"ok",
            ),
        ]:
            self.upstream.answers = [given, OK]
            wire = self.running.connect()
            with self.subTest(name):
                got = self.s3(method, "/b/a", wire=wire)
                self.assertEqual((got.status, got.body, got.whole), (status, body, True))
                final = (
                    given[given.rindex(b"HTTP/1.1 ") :]
                    .split(b"\r\n\r\n")[0]
                    .decode()
                    .split("\r\n")
                )
                wanted = [tuple(line.split(": ", 1)) for line in final[1:]]
                own = {"transfer-encoding", "connection"} | (
                    {"content-length"} if "304" in name else set()
                )
                wanted = [pair for pair in wanted if pair[0].lower() not in own]
                self.assertEqual([pair for pair in got.headers if pair in wanted], wanted)
                if method == "HEAD":
                    told = [value for name, value in wanted if name == "Content-Length"]
                    self.assertEqual(got.all("content-length"), told)
                self.assertEqual(len(got.all("date")), 1)
                self.assertEqual(self.s3("GET", "/b/a", wire=wire).body, b"ok")
            wire.close()
        self.assertEqual({self.upstream.next().connection for _ in range(20)}, {1})

    def test_an_answer_until_the_connection_closes_is_passed_on(self):
        for body in (b"", b"hello", LONG):
            for head in (b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nX-A: b\r\n\r\n"):
                self.upstream.answers = [then_close(head + body)]
                with self.subTest(head, length=len(body)):
                    got = self.s3("GET", "/b/a")
                    self.assertEqual((got.status, got.body, got.whole), (200, body, True))

    def test_an_answer_that_breaks_off_does_not_seem_whole(self):
        for name, data in [
            ("length", answer(b"200 OK", length_of(LONG), body=LONG[:-1])),
            ("length, small", answer(b"200 OK", b"Content-Length: 9", body=b"abc")),
            ("length, no body", answer(b"200 OK", length_of(LONG))),
            (
                "chunk",
                answer(
                    b"200 OK", b"Transfer-Encoding: chunked", body=in_chunks(LONG, 9999)[:-100]
                ),
            ),
            (
                "last chunk",
                answer(b"200 OK", b"Transfer-Encoding: chunked", body=in_chunks(LONG, 9999)[:-5]),
            ),
            (
                "last line",
                answer(b"200 OK", b"Transfer-Encoding: chunked", body=in_chunks(b"abc", 9)[:-2]),
            ),
            (
                "size",
                answer(b"200 OK", b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\nxyz\r\n"),
            ),
            (
                "long chunk",
                answer(b"200 OK", b"Transfer-Encoding: chunked", body=b"3\r\nabcd\r\n0\r\n\r\n"),
            ),
        ]:
            self.upstream.answers = [then_close(data)]
            with self.subTest(name), self.assertLogs("awsproxy", "WARNING") as logs:
                got = self.s3("GET", "/b/a")
                self.assertTrue(got.status == 503 or not got.whole, got)
                self.assertEqual(self.s3("GET", "/b/a").body, b"ok")
                wait_until(lambda logs=logs: logs.output)
            self.assertEqual(len(logs.output), 1, logs.output)
            self.assertNotIn("Traceback", str(logs.output))

    def test_a_client_that_leaves_early_does_not_spoil_the_connection(self):
        gone = threading.Event()

        def endless(connection, arrived):
            connection.sendall(answer(b"200 OK", b"Content-Length: 1000000000"))
            with contextlib.suppress(OSError):
                while True:
                    connection.sendall(LONG)
            gone.set()

        self.upstream.answers = [endless]
        made = sign(
            "GET", "/b/a", (("X-Amz-Content-Sha256", EMPTY),), service="s3", payload_hash=EMPTY
        )
        wire = self.running.connect()
        with self.assertLogs("awsproxy", "WARNING"):
            wire.send(raw_request("GET", "/b/a", made))
            self.assertEqual(wire.socket.recv(5), b"HTTP/")
            wire.close(reset=True)
            self.assertTrue(gone.wait(DEADLINE))
        self.assertEqual(self.s3("GET", "/b/a").body, b"ok")

    def test_an_upstream_that_fails_is_unavailable_and_the_next_call_works(self):
        lengths = (b"Content-Length: 1", b"Content-Length: 2")
        for name, data in [
            ("nothing", then_close(b"")),
            ("garbage", then_close(b"\x16\x03\x01\0\0garbage\r\n\r\n")),
            ("half a head", then_close(b"HTTP/1.1 200 OK\r\nContent-Le")),
            ("a huge head", then_close(answer(b"200 OK", b"X-A: " + b"b" * 70000))),
            ("many lines", then_close(answer(b"200 OK", *[b"X-A: b"] * 20000))),
            ("not a header", then_close(answer(b"200 OK", b"a b c"))),
            ("folded", then_close(answer(b"200 OK", b"a: b", b" c", b"Content-Length: 0"))),
            ("HTTP/2", then_close(b"HTTP/2 200\r\n\r\n")),
            ("status", then_close(b"HTTP/1.1 20 OK\r\n\r\n")),
            ("two lengths", then_close(answer(b"200 OK", *lengths, body=b"ab"))),
            ("no length", then_close(answer(b"200 OK", b"Content-Length: a", body=b"ab"))),
            ("negative", then_close(answer(b"200 OK", b"Content-Length: -1", body=b"ab"))),
            ("coding", then_close(answer(b"200 OK", b"Transfer-Encoding: gzip, chunked"))),
            ("101", then_close(answer(b"101 Switching Protocols", b"Upgrade: a"))),
            ("no answer", lambda connection, arrived: connection.recv(1)),  # until it is closed
        ]:
            for protocol, call in (("json", SEND_JSON), ("query", SEND_FORM)):
                self.upstream.answers = [data]
                if name == "no answer":
                    self.start(timeout=0.3)
                with self.subTest(name, protocol=protocol):
                    with self.assertLogs("awsproxy", "WARNING") as logs:
                        got = self.call(*call, service="sqs")
                    self.assert_unavailable(got, protocol, logs)
                    with mock.patch.object(self.pool, "_timeout", DEADLINE):
                        self.assertEqual(self.call(*call, service="sqs").status, 200)

    def assert_unavailable(self, got, protocol, logs):
        self.assertEqual(got.status, 503, got)
        if protocol == "json":
            kind, code = json.loads(got.body)["__type"].rpartition("#")[2], "ServiceUnavailable"
            self.assertEqual(kind, code)
        else:
            self.assertIn(b"<Code>ServiceUnavailable</Code>", got.body)
            self.assertTrue(got.body.startswith(b"<?xml"))
        self.assertEqual(len(logs.output), 1, logs.output)
        self.assertNotIn("Traceback", logs.output[0])

    def test_an_upstream_that_cannot_be_reached_is_unavailable(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        for name, endpoint in [
            ("refused", awsproxy.Endpoint("http", "127.0.0.1", port)),
            ("TLS to a plain port", awsproxy.Endpoint("https", "127.0.0.1", self.upstream.port)),
            ("no such host", awsproxy.Endpoint("http", "nothing.invalid", 80)),
            ("no host can be called so", awsproxy.Endpoint("http", "a" * 64 + ".invalid", 80)),
        ]:
            self.start(endpoint, timeout=0.3)
            for protocol, call in (("json", LIST), ("query", LIST_FORM)):
                with self.subTest(name, protocol=protocol):
                    with self.assertLogs("awsproxy", "WARNING") as logs:
                        got = self.call(*call, service="sqs")
                    self.assert_unavailable(got, protocol, logs)


class PoolTest(Through):
    def test_a_connection_is_used_again_and_one_that_says_so_is_not(self):
        close = answer(b"200 OK", b"Connection: close", b"Content-Length: 0")
        self.upstream.answers = [
            OK,
            OK,
            close,
            OK,
            b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        ]
        for _ in range(6):
            self.assertEqual(self.call(*LIST).status, 200)
        used = [self.upstream.next().connection for _ in range(6)]
        self.assertEqual(used, [1, 1, 1, 2, 2, 3])

    def test_one_that_was_closed_meanwhile_is_not_used(self):
        self.upstream.answers = [then_close(OK)]
        self.assertEqual(self.call(*LIST).status, 200)
        self.upstream.threads[1].join(DEADLINE)
        self.assertEqual(self.call(*SEND_JSON).status, 200)
        self.assertEqual([self.upstream.next().connection for _ in range(2)], [1, 2])

    def test_bytes_that_nobody_asked_for_are_nobodys_answer(self):
        self.upstream.answers = [OK + answer(b"200 OK", b"Content-Length: 5", body=b"wrong")]
        self.assertEqual(self.call(*LIST).body, b"ok")
        self.assertEqual(self.call(*LIST).body, b"ok")

    def test_a_stale_one_is_tried_again_once_where_nothing_can_happen_twice(self):
        for name, service, call, tries in [
            ("ListQueues", "sqs", LIST, 2),
            ("GetQueueUrl", "sqs", json_call("GetQueueUrl", b'{"QueueName":"a"}'), 2),
            ("GET", "lambda", ("GET", "/a"), 2),
            ("PUT", "lambda", ("PUT", "/a", (), b"body"), 2),
            ("SendMessage", "sqs", SEND_JSON, 1),
            ("ReceiveMessage", "sqs", json_call("ReceiveMessage", SEND.encode()), 1),
            ("POST", "lambda", ("POST", "/a", (), b"body"), 1),
        ]:
            for failures in (1, 2):
                self.assertEqual(self.call(*LIST).status, 200)
                first = self.upstream.next()
                self.upstream.answers = [then_close(b"")] * failures
                works = tries == 2 and failures == 1
                with self.subTest(name, failures=failures):
                    with contextlib.ExitStack() as stack:
                        if not works:
                            stack.enter_context(self.assertLogs("awsproxy", "WARNING"))
                        got = self.call(*call, service=service)
                    self.assertEqual(got.status, 200 if works else 503)
                    again = [self.upstream.next() for _ in range(tries)]
                    self.assertEqual(again[0].connection, first.connection)
                    self.assertEqual({a.body for a in again}, {again[0].body})
                    self.assertTrue(self.upstream.arrived.empty())
                    for arrived in again:
                        self.assert_signed(arrived, service)
                self.upstream.answers = []

    def test_a_fresh_one_that_fails_is_not_tried_again(self):
        self.upstream.answers = [then_close(b"")]
        with self.assertLogs("awsproxy", "WARNING"):
            self.assertEqual(self.call(*LIST).status, 503)
        self.upstream.next()
        self.assertTrue(self.upstream.arrived.empty())

    def test_half_an_answer_is_not_tried_again(self):
        self.call(*LIST)
        self.upstream.answers = [then_close(b"HTTP/1.1 200 OK\r\n")]
        with self.assertLogs("awsproxy", "WARNING"):
            self.assertEqual(self.call(*LIST).status, 503)

    def test_an_answer_that_comes_before_the_body_is_sent_is_passed_on(self):
        refusal = answer(b"403 Forbidden", b"Connection: close", b"Content-Length: 3", body=b"no!")

        def linger(connection):
            connection.sendall(refusal)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

        def hang_up(connection):
            connection.sendall(refusal)

        self.upstream.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        for name, act in (("linger", linger), ("hang up", hang_up)):
            self.upstream.early = act
            for body in (bytes(1000000), bytes(20000000)):
                for service in ("lambda", "s3"):
                    how = {"service": service}
                    if service == "s3":
                        how["payload_hash"] = "UNSIGNED-PAYLOAD"
                        how["headers"] = (("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD"),)
                    elif len(body) > 16000000:
                        continue
                    with self.subTest(name, length=len(body), service=service):
                        got = self.call("PUT", "/b/a", body=body, **how)
                        self.assertEqual((got.status, got.body), (403, b"no!"))

    def test_keys_that_expired_are_renewed_and_the_call_signed_again(self):
        of_json = b'{"__type":"com.amazon.coral.service#ExpiredTokenException"}'
        of_xml = b"<Error><Code>ExpiredToken</Code></Error>"
        body = b"x" * 10
        for name, refused, call in [
            ("json", of_json, LIST),
            ("SendMessage", of_json, SEND_JSON),
            ("query", of_xml, LIST_FORM),
        ]:
            for status in (b"400 Bad Request", b"403 Forbidden"):
                self.keys.given = [OUR_KEYS, NEXT_KEYS]
                self.keys.expired.clear()
                self.upstream.answers = [answer(status, length_of(refused), body=refused)]
                with self.subTest(name, status=status):
                    self.assertEqual(self.call(*call).status, 200)
                    self.assertEqual(self.keys.expired, [OUR_KEYS])
                    self.assert_signed(self.upstream.next())
                    self.assert_signed(self.upstream.next(), client=Client("n", *NEXT_KEYS[:3]))
        refused = answer(b"400 Bad Request", length_of(of_xml), body=of_xml)
        with self.subTest("no others"):
            self.keys.given = [OUR_KEYS]
            self.upstream.answers = [refused]
            self.assertEqual(self.call(*LIST).body, of_xml)
            self.upstream.next()
        with self.subTest("twice"):
            self.keys.given = [OUR_KEYS, NEXT_KEYS, OUR_KEYS]
            self.upstream.answers = [refused, refused]
            self.assertEqual(self.call(*LIST).body, of_xml)
            self.upstream.next(), self.upstream.next()
        with self.subTest("a body that is gone"):
            self.keys.given = [OUR_KEYS, NEXT_KEYS]
            self.upstream.answers = [refused]
            self.assertEqual(self.s3("PUT", "/b/a", body=body).status, 400)
            self.assertEqual(self.keys.given, [NEXT_KEYS])
            self.upstream.next()
        with self.subTest("none at all"):
            self.keys.given = []
            got = self.call(*LIST)
            self.assertEqual(got.status, 403)
            self.assertIn(b"AccessDenied", got.body)
        self.assertTrue(self.upstream.arrived.empty())

    def test_many_at_once_are_kept_apart(self):
        def echo(connection, arrived):
            return answer(b"200 OK", length_of(arrived.body), body=arrived.body)

        self.upstream.answers = [echo] * 200
        with concurrent.futures.ThreadPoolExecutor(20) as executor:
            bodies = [b"%d" % n * (n * 40) for n in range(200)]
            calls = [
                executor.submit(self.call, "POST", "/a", (), body, service="lambda")
                for body in bodies
            ]
            self.assertEqual([c.result().body == b for c, b in zip(calls, bodies)], [True] * 200)
        self.assertLessEqual(len(self.upstream.connections), 20)


# ==== Queue URLs ====


class ForwardedQueueTest(Spoken):
    """Calls through a proxy to a second one, which verifies them and has the queues."""

    def start(self):
        super().start()
        behind = Proxy(
            {OURS.access_key_id: [OURS]}, clock=self.clock, max_body=1 << 30, sqs=self.sqs.sqs
        )
        running = Running(behind)
        self.endpoint = awsproxy.Endpoint("http", *running.address)
        self.pool = awsproxy.Pool(2, 5)
        target = awsproxy.Upstream(
            self.endpoint, lambda client: Keys(OUR_KEYS), self.pool, clock=self.clock
        )
        self.addCleanup(running.stop)
        self.addCleanup(Through.drain, self, self.pool, self.endpoint)
        self.sqs.proxy = Proxy(
            awsproxy.DEMO_CLIENTS, clock=self.clock, routes=[awsproxy.Route("sqs:*", target)]
        )

    def test_queue_urls_lead_back_to_the_proxy_and_are_understood_behind_it(self):
        url = self.sqs.queue("jobs")
        dead = self.sqs.queue("dead")
        self.assertEqual([url, dead], [url_of("jobs"), url_of("dead")])
        self.set(url, RedrivePolicy=redrive("dead", 3))
        self.assertEqual(self.sqs("GetQueueUrl", QueueName="jobs")["QueueUrl"], url)
        self.assertEqual(self.sqs("ListQueues")["QueueUrls"], [dead, url])
        sources = self.sqs("ListDeadLetterSourceQueues", QueueUrl=dead)
        self.assertEqual(sources["queueUrls"], [url])
        self.send(url, f"{url} {self.endpoint.origin}/000000000000/jobs")
        (body,) = self.sqs.bodies(url)
        self.assertEqual(body, f"{url} {self.endpoint.origin}/000000000000/jobs")
        self.sqs("DeleteQueue", QueueUrl=dead)
        self.refused(NO_QUEUE, "SendMessage", QueueUrl=dead, MessageBody="a")

    def test_a_long_list_is_rewritten_too(self):
        names = [f"{number:04d}-" + "n" * 75 for number in range(1000)]
        for name in names:
            self.sqs("CreateQueue", QueueName=name)
        self.assertEqual(self.sqs("ListQueues")["QueueUrls"], [url_of(name) for name in names])

    def test_messages_whose_receiver_is_gone_are_visible_again(self):
        for size in (1, 100000):
            url = self.sqs.queue(f"jobs-{size}")
            for number in range(3):
                self.send(url, str(number) * size)
            handle = self.sqs.proxy.handle

            def leave(request, handle=handle):
                request.abandoned = lambda: True
                return handle(request)

            self.assertEqual(self.counts(url), (3, 0, 0))
            with mock.patch.object(self.sqs.proxy, "handle", leave):
                with self.assertLogs("awsproxy", "WARNING"):
                    self.sqs.receive(url, MaxNumberOfMessages=3)
            with self.subTest(size=size):
                self.assertEqual(self.counts(url), (3, 0, 0))


class QueueUrlTest(Through):
    def test_what_is_not_a_queue_url_of_ours_is_kept_to_the_byte(self):
        ours, other = "http://localhost:8081/000000000000/jobs", "http://other/000000000000/jobs"
        theirs = f"{self.endpoint.origin}/000000000000/jobs"
        quoted = {url: urllib.parse.quote(url, safe="") for url in (ours, other, theirs)}
        get = "/?Action=GetQueueAttributes&Version=2012-11-05&QueueUrl="
        for name, call, target, body in [
            (
                "json",
                json_call("SendMessage", SEND.encode()),
                "/",
                {"QueueUrl": theirs, "MessageBody": "a"},
            ),
            (
                "escaped",
                json_call("SendMessage", SEND.replace("/", r"\/").encode()),
                "/",
                {"QueueUrl": theirs, "MessageBody": "a"},
            ),
            (
                "in the body of a message",
                json_call(
                    "SendMessage", b'{"MessageBody" : "%b", "QueueUrl": "jobs"}' % ours.encode()
                ),
                "/",
                None,
            ),
            (
                "others'",
                json_call("SendMessage", b'{ "QueueUrl": "%b"}' % other.encode()),
                "/",
                None,
            ),
            ("none", json_call("ListQueues", b'{"MaxResults" : 5 }\n'), "/", None),
            ("not JSON", json_call("SendMessage", b"{" + ours.encode()), "/", None),
            ("a list", json_call("SendMessage", b'["QueueUrl", "%b"]' % ours.encode()), "/", None),
            ("a path", json_call("SendMessage", b'{"MessageBody":"a"}'), "/", None),
            (
                "form",
                form_call(f"Action=SendMessage&QueueUrl={quoted[ours]}&MessageBody=a+b"),
                "/",
                f"Action=SendMessage&QueueUrl={quoted[theirs]}&MessageBody=a+b",
            ),
            (
                "others' in a form",
                form_call(f"Action=SendMessage&QueueUrl={quoted[other]}"),
                "/",
                None,
            ),
            ("form without", form_call("Action=SendMessage&MessageBody=a%2fb+c&&"), "/", None),
            (
                "path of a form",
                form_call("Action=SendMessage&MessageBody=a", "/000000000000/jobs"),
                "/000000000000/jobs",
                None,
            ),
            ("query string", ("GET", get + quoted[ours], (), b""), get + quoted[theirs], None),
        ]:
            with self.subTest(name):
                got = self.call(*call)
                self.assertEqual(got.status, 200, got.body)
                arrived = self.upstream.next()
                self.assertEqual(arrived.target, target)
                if isinstance(body, dict):
                    self.assertEqual(json.loads(arrived.body), body)
                else:
                    self.assertEqual(arrived.body, body.encode() if body else call[3])
                self.assert_signed(arrived)

    def test_answers_are_rewritten_where_a_queue_url_stands(self):
        theirs, ours = "https://sqs.eu-west-1.amazonaws.com", "http://localhost:8081"
        urls = f'"{theirs}/1/a", "{theirs}:443/1/b"'
        json_kind, xml_kind = (
            b"Content-Type: application/x-amz-json-1.0",
            b"Content-Type: text/xml",
        )
        for operation, status, kind, body, changed in [
            ("CreateQueue", 200, json_kind, f'{{"QueueUrl": "{theirs}/1/a"}}', True),
            ("GetQueueUrl", 200, json_kind, f'{{"QueueUrl": "{theirs}/1/a"}}', True),
            (
                "ListQueues",
                200,
                json_kind,
                f'{{"QueueUrls": [{urls}], "NextToken": "{theirs}/"}}',
                True,
            ),
            ("ListDeadLetterSourceQueues", 200, json_kind, f'{{"queueUrls": [{urls}]}}', True),
            (
                "ListQueues",
                200,
                xml_kind,
                f"<QueueUrl>{theirs}/1/a</QueueUrl><B>{theirs}/</B>",
                True,
            ),
            ("ListQueues", 200, json_kind, "{}", False),
            ("ListQueues", 200, json_kind, "", False),
            ("ListQueues", 200, json_kind, "not JSON", False),
            ("ListQueues", 200, json_kind, "[1]", False),
            ("ListQueues", 200, json_kind, '{"QueueUrls": [1]}', False),
            ("CreateQueue", 400, json_kind, f'{{"message": "{theirs}/1/a"}}', False),
            (
                "ReceiveMessage",
                200,
                json_kind,
                f'{{"Messages": [{{"Body": "{theirs}/1/a"}}]}}',
                False,
            ),
        ]:
            for chunked in (False, True):
                raw = body.encode()
                framing = b"Transfer-Encoding: chunked" if chunked else length_of(raw)
                sent = in_chunks(raw, 7) if chunked else raw
                given = answer(b"%d X" % status, kind, b"x-amzn-RequestId: r", framing, body=sent)
                self.upstream.answers = [given]
                with self.subTest(operation, body=body, chunked=chunked):
                    got = self.call(*json_call(operation))
                    self.assertEqual((got.status, got.all("x-amzn-requestid")), (status, ["r"]))
                    wanted = body
                    if changed:
                        wanted = re.sub(r"https://[^/]*(/1/)", ours + r"\1", body)
                    if changed and kind is json_kind:
                        self.assertEqual(json.loads(got.body), json.loads(wanted))
                    else:
                        self.assertEqual(got.body.decode(), wanted)

    def test_the_public_url_is_what_they_begin_with(self):
        self.start(public_url="https://proxy.example/")
        body = b'{"QueueUrl": "https://sqs.example/1/a"}'
        kind = b"Content-Type: application/x-amz-json-1.0"
        self.upstream.answers = [answer(b"200 OK", kind, length_of(body), body=body)]
        url = json.loads(self.call(*json_call("GetQueueUrl")).body)["QueueUrl"]
        self.assertEqual(url, "https://proxy.example/1/a")
        self.call(*json_call("SendMessage", b'{"QueueUrl": "https://proxy.example/1/a"}'))
        self.upstream.next()
        url = json.loads(self.upstream.next().body)["QueueUrl"]
        self.assertEqual(url, self.endpoint.origin + "/1/a")

    def test_messages_for_a_client_that_hung_up_are_shown_again(self):
        of_json = b'{"Messages": [{"ReceiptHandle": "h/1"}, {"ReceiptHandle": "h&2"}]}'
        of_xml = b"<R><ReceiptHandle>h/1</ReceiptHandle><ReceiptHandle>h&amp;2</ReceiptHandle></R>"
        receive = '{"QueueUrl":"http://localhost:8081/000000000000/jobs","WaitTimeSeconds":20}'
        form = f"Action=ReceiveMessage&QueueUrl={urllib.parse.quote(url_of('jobs'), safe='')}"
        for call, kind, body in [
            (json_call("ReceiveMessage", receive.encode()), JSON_1_0, of_json),
            (form_call(form), "text/xml", of_xml),
            (form_call("Action=ReceiveMessage", "/000000000000/jobs"), "text/xml", of_xml),
        ]:
            for kept in (False, True):
                if kept:
                    self.call(*LIST)
                    self.upstream.next()
                gone = threading.Event()

                def wait(connection, arrived, gone=gone, kind=kind, body=body):
                    gone.wait(DEADLINE)
                    return answer(
                        b"200 OK", b"Content-Type: " + kind.encode(), length_of(body), body=body
                    )

                self.upstream.answers = [wait]
                made = sign(*call)
                wire = self.running.connect()
                length = ("Content-Length", len(call[3]))
                logged = self.assertLogs("awsproxy", "WARNING")
                with logged as logs, self.subTest(kind, kept=kept):
                    wire.send(raw_request(*call[:2], (*made, length), call[3]))
                    self.upstream.next()
                    wire.close()
                    gone.set()
                    shown = self.upstream.next()
                    self.assert_signed(shown)
                    name = "AmazonSQS.ChangeMessageVisibilityBatch"
                    self.assertEqual(shown.one("x-amz-target"), name)
                    document = json.loads(shown.body)
                    url = f"{self.endpoint.origin}/000000000000/jobs"
                    self.assertEqual(document["QueueUrl"], url)
                    entries = [
                        (e["ReceiptHandle"], e["VisibilityTimeout"]) for e in document["Entries"]
                    ]
                    self.assertEqual(entries, [("h/1", 0), ("h&2", 0)])
                    self.assertEqual(len({e["Id"] for e in document["Entries"]}), 2)
                    wait_until(lambda logs=logs: logs.records)


# ==== 8. Routes ====


class Nowhere(awsproxy.Pool):
    """Tells where a connection would have been opened to."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def idle(self, endpoint):
        return None

    def take(self, endpoint, fresh=False):
        self.asked.append(endpoint)
        raise awsproxy.UpstreamError("nowhere")


class RouteTest(unittest.TestCase):
    def aws(self, **settings):
        """Return a Proxy whose calls all go to AWS, or would if there were a network."""
        self.pool = Nowhere()
        keys = Keys(OUR_KEYS)
        target = awsproxy.Upstream(None, lambda c: keys, self.pool, clock=lambda: EXAMPLE_TIME)
        settings.setdefault("routes", [awsproxy.Route("*", target)])
        return Proxy(awsproxy.DEMO_CLIENTS, clock=lambda: EXAMPLE_TIME, **settings)

    def test_patterns_are_those_of_iam_policies(self):
        for pattern, action, matches in [
            ("*", "sqs:SendMessage", True),
            ("sqs:*", "sqs:SendMessage", True),
            ("sqs:*", "s3:GetObject", False),
            ("SQS:sendmessage", "sqs:SendMessage", True),
            ("sqs:Send*", "sqs:SendMessageBatch", True),
            ("sqs:SendMessage", "sqs:SendMessageBatch", False),
            ("sqs:?endMessage", "sqs:SendMessage", True),
            ("sqs:?SendMessage", "sqs:SendMessage", False),
            ("*:*Message", "sqs:SendMessage", True),
            ("s.s:*", "sqs:SendMessage", False),
            ("sqs:[S]*", "sqs:SendMessage", False),
            ("sqs:", "sqs:SendMessage", False),
            ("", "sqs:SendMessage", False),
            ("*", "sqs:a\nb", True),
        ]:
            with self.subTest(pattern, action=action):
                self.assertIs(awsproxy.Route(pattern, None).matches(action), matches)

    def answer(self, proxy, call, service="sqs", **how):
        return proxy.handle(signed(*call, service=service, **how))

    def test_the_first_route_that_matches_decides(self):
        embedded = awsproxy.Embedded(awsproxy.Sqs(lambda: EXAMPLE_TIME))
        routes = [
            awsproxy.Route("sqs:purge*", awsproxy.Deny()),
            awsproxy.Route("sqs:*", embedded),
            awsproxy.Route("sns:*", embedded),
            awsproxy.Route("sqs:ListQueues", awsproxy.Deny()),
        ]
        proxy = self.aws(routes=routes)
        publish = form_call("Action=Publish&Version=2010-03-31")
        s3 = ("GET", "/bucket/key", (("X-Amz-Content-Sha256", EMPTY),))
        for name, call, service, status, told in [
            ("embedded", LIST, "sqs", 200, "{"),
            (
                "deny",
                json_call("PurgeQueue"),
                "sqs",
                403,
                "user/demo is not authorized to perform: sqs:PurgeQueue",
            ),
            (
                "deny in XML",
                form_call("Action=PurgeQueue&Version=2012-11-05"),
                "sqs",
                403,
                "<Code>AccessDenied</Code>",
            ),
            ("not embedded", publish, "sns", 403, "embedded"),
            ("no such operation", json_call("Nonsense"), "sqs", 400, "Nonsense"),
            ("no route", s3, "s3", 403, "--route 's3:GetObject=aws'"),
            ("no route, lambda", ("GET", "/2015-03-31/functions/"), "lambda", 403, "lambda:GET"),
        ]:
            with self.subTest(name):
                reply = self.answer(
                    proxy, call, service, payload_hash=EMPTY if service == "s3" else None
                )
                self.assertEqual(reply.status, status)
                self.assertIn(told, reply.body.decode())
        self.assertEqual(self.pool.asked, [])

    def test_the_actions_of_amazon_s3(self):
        for method, target, action in [
            ("GET", "/", "ListAllMyBuckets"),
            ("GET", "/b", "ListBucket"),
            ("GET", "/b/", "ListBucket"),
            ("HEAD", "/b", "ListBucket"),
            ("GET", "/b?list-type=2", "ListBucket"),
            ("GET", "/b?versions", "ListBucketVersions"),
            ("GET", "/b?uploads", "ListBucketMultipartUploads"),
            ("PUT", "/b", "CreateBucket"),
            ("DELETE", "/b", "DeleteBucket"),
            ("POST", "/b?delete", "DeleteObject"),
            ("GET", "/b/k", "GetObject"),
            ("HEAD", "/b/k", "GetObject"),
            ("GET", "/b/k?versionId=1", "GetObjectVersion"),
            ("PUT", "/b/k", "PutObject"),
            ("PUT", "/b/k?partNumber=1&uploadId=a", "PutObject"),
            ("POST", "/b/k?uploads", "PutObject"),
            ("POST", "/b/k?uploadId=a", "PutObject"),
            ("DELETE", "/b/k?uploadId=a", "AbortMultipartUpload"),
            ("GET", "/b/k?uploadId=a", "ListMultipartUploadParts"),
            ("DELETE", "/b/k", "DeleteObject"),
            ("DELETE", "/b/k?versionId=1", "DeleteObjectVersion"),
            ("GET", "/b?acl", "GetBucketAcl"),
            ("PUT", "/b/k?acl", "PutObjectAcl"),
            ("GET", "/b?policy", "GetBucketPolicy"),
            ("PUT", "/b?policy", "PutBucketPolicy"),
            ("DELETE", "/b?policy", "DeleteBucketPolicy"),
            ("PUT", "/b/k?tagging", "PutObjectTagging"),
            ("DELETE", "/b/k?tagging", "DeleteObjectTagging"),
            ("DELETE", "/b?cors", "PutBucketCORS"),
            ("GET", "/b//", "GetObject"),
            ("GET", "/b?location", "GetBucketLocation"),
            ("PATCH", "/b/k", "PATCH"),
        ]:
            path = target[2:] if target.startswith("/b") else None
            hosts = [("localhost:8081", target)]
            if path is not None:
                path = path if path.startswith("/") else "/" + path
                hosts += [("b.localhost:8081", path), ("b.s3.us-east-1.amazonaws.com", path)]
            for host, given in hosts:
                request = Request(method, given, (("Host", host),), io.BytesIO())
                with self.subTest(f"{method} {host}{given}"):
                    self.assertEqual(awsproxy.s3_action(request), action)

    def test_where_services_answer(self):
        streams = "DynamoDBStreams_20120810.ListStreams"
        for service, region, target, host in [
            ("sqs", "us-east-1", "", "sqs.us-east-1.amazonaws.com"),
            ("sqs", "cn-north-1", "", "sqs.cn-north-1.amazonaws.com.cn"),
            ("sqs", "us-gov-west-1", "", "sqs.us-gov-west-1.amazonaws.com"),
            ("sqs", "us-iso-east-1", "", "sqs.us-iso-east-1.c2s.ic.gov"),
            ("sqs", "us-isob-east-1", "", "sqs.us-isob-east-1.sc2s.sgov.gov"),
            ("sqs", "eusc-de-east-1", "", "sqs.eusc-de-east-1.amazonaws.eu"),
            ("s3", "eu-west-1", "", "s3.eu-west-1.amazonaws.com"),
            ("iam", "us-east-1", "", "iam.amazonaws.com"),
            ("iam", "cn-north-1", "", "iam.cn-north-1.amazonaws.com.cn"),
            ("iam", "us-gov-west-1", "", "iam.us-gov.amazonaws.com"),
            ("route53", "us-east-1", "", "route53.amazonaws.com"),
            ("cloudfront", "us-east-1", "", "cloudfront.amazonaws.com"),
            ("organizations", "us-east-1", "", "organizations.us-east-1.amazonaws.com"),
            ("ecr", "eu-west-1", "", "api.ecr.eu-west-1.amazonaws.com"),
            ("ses", "eu-west-1", "", "email.eu-west-1.amazonaws.com"),
            ("dynamodb", "eu-west-1", "", "dynamodb.eu-west-1.amazonaws.com"),
            ("dynamodb", "eu-west-1", streams, "streams.dynamodb.eu-west-1.amazonaws.com"),
            ("sts", "eu-west-1", "", "sts.eu-west-1.amazonaws.com"),
        ]:
            with self.subTest(f"{service} in {region}"):
                endpoint = awsproxy.endpoint_for(service, region, target)
                self.assertEqual(endpoint, ("https", host, 443))

    def test_buckets_in_the_host_and_hosts_of_others(self):
        proxy, east = self.aws(), "s3.us-east-1.amazonaws.com"
        declared = ("X-Amz-Content-Sha256", EMPTY)
        for host, target, region, wanted in [
            ("localhost:8081", "/b/k", "us-east-1", east),
            ("b.localhost:8081", "/k", "us-east-1", f"b.{east}"),
            ("b.c.localhost:8081", "/k", "us-east-1", east),
            ("b.s3.localhost", "/k", "us-east-1", f"b.{east}"),
            ("b.s3.eu-west-1.amazonaws.com", "/k", "us-east-1", f"b.{east}"),
            ("s3.eu-west-1.amazonaws.com", "/k", "us-east-1", east),
            ("evil.example", "/k", "us-east-1", east),
            ("169.254.169.254", "/latest", "us-east-1", east),
            ("b.localhost", "/k", "cn-north-1", "b.s3.cn-north-1.amazonaws.com.cn"),
            ("evil.example:80", "//evil.example/", "us-east-1", east),
        ]:
            headers = (("Host", host), declared)
            with self.subTest(host), self.assertLogs("awsproxy", "WARNING"):
                request = signed(
                    "GET", target, headers, service="s3", region=region, payload_hash=EMPTY
                )
                self.assertEqual(proxy.handle(request).status, 503)
                self.assertEqual(self.pool.asked.pop(), ("https", wanted, 443))

    def test_what_is_no_endpoint_is_refused(self):
        for url, wanted in [
            ("http://localhost:4566", ("http", "localhost", 4566)),
            ("https://sqs.example/", ("https", "sqs.example", 443)),
            ("http://[::1]:80", ("http", "::1", 80)),
            ("ftp://a", None),
            ("localhost:4566", None),
            ("http://", None),
            ("", None),
            ("http://a/b", None),
            ("http://a?b", None),
            ("http://a#b", None),
            ("http://u:p@a", None),
            ("http://u@a", None),
            ("http://@a", None),
            ("http://169.254.169.254", None),
            ("http://169.254.170.2:80", None),
            ("http://[fe80::1]", None),
            ("http://[fd00:ec2::254]", None),
            ("http://[::ffff:169.254.169.254]", None),
            ("http://a:99999", None),
            ("http://a:b", None),
            ("http://[::1", None),
            ("http://2852039166", None),
            ("http://0xa9fea9fe", None),
            ("http://169.254.43518", None),
        ]:
            with self.subTest(url):
                if wanted:
                    self.assertEqual(awsproxy.parse_endpoint(url), wanted)
                else:
                    with self.assertRaises(ValueError):
                        awsproxy.parse_endpoint(url)

    def test_a_claim_that_makes_no_host_is_not_a_fault_of_ours(self):
        for service, region in (("a" * 64, "us-east-1"), ("a", "b" * 64)):
            request = signed("GET", "/", service=service, region=region)
            target = awsproxy.Upstream(
                None, lambda c: Keys(OUR_KEYS), awsproxy.Pool(1, 1), clock=lambda: EXAMPLE_TIME
            )
            proxy = self.aws(routes=[awsproxy.Route("*", target)])
            with self.subTest(service, region=region), self.assertLogs("awsproxy"):
                self.assertEqual(proxy.handle(request).status, 503)


class NoVerifyTest(Through):
    def test_what_an_unsigned_call_is_for_is_told_by_what_it_says(self):
        scope = "Credential=any/20150830/eu-west-1/sns/aws4_request"
        claimed = (
            ("Authorization", f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=a"),
        )
        host = (("Host", "lambda.eu-north-1.amazonaws.com"),)
        dualstack = (("Host", "b.s3.dualstack.eu-west-2.amazonaws.com"),)
        for name, sign_as, call, service, region in [
            ("a target", ("", ""), LIST, "sqs", "us-east-1"),
            (
                "a claim",
                ("", ""),
                ("POST", "/", (*claimed, FORM), b"Action=Publish"),
                "sns",
                "eu-west-1",
            ),
            ("a host", ("", ""), ("GET", "/a", host, b""), "lambda", "eu-north-1"),
            ("a host of Amazon S3", ("", ""), ("GET", "/a", dualstack, b""), "s3", "eu-west-2"),
            ("a flag", ("s3", "eu-west-3"), ("PUT", "/b/k", (), b"abc"), "s3", "eu-west-3"),
            ("a flag, and a target", ("s3", "eu-west-3"), LIST, "sqs", "eu-west-3"),
        ]:
            self.start(verified=False, sign_as=sign_as)
            method, target, headers, body = call
            framing = (("Content-Length", len(body)),) if body else ()
            with self.subTest(name):
                got = self.put(raw_request(method, target, (*headers, *framing), body), method)
                self.assertEqual(got.status, 200, got.body)
                arrived = self.upstream.next()
                content = self.assert_signed(arrived, service, region=region)
                self.assertEqual(content, body)

    def test_chunks_of_any_kind_are_forwarded_whole(self):
        self.start(verified=False, sign_as=("s3", "us-east-1"))
        for kind, trailers in (
            (CHUNKS, ()),
            (CHUNKS_TRAILER, CRC32),
            (UNSIGNED_TRAILER, CRC32),
            (UNSIGNED_TRAILER, (("x-amz-checksum-crc32c", "mnG7TA=="),)),
        ):
            for unsigned in (False, True):
                made, body = streamed(kind, (b"hello",), trailers)
                if unsigned:
                    made = [pair for pair in made if pair[0] != "Authorization"]
                framing = ("Content-Length", len(body))
                with self.subTest(kind, unsigned=unsigned):
                    got = self.put(raw_request("PUT", "/b/k", (*made, framing), body), "PUT")
                    self.assertEqual(got.status, 200, got.body)
                    arrived = self.upstream.next()
                    self.assertTrue(arrived.complete)
                    declared = arrived.one("x-amz-content-sha256")
                    self.assertEqual(self.assert_signed(arrived, "s3"), b"hello")
                    if not declared.startswith("STREAMING"):
                        self.assertIsNone(arrived.one("content-encoding"))
                        self.assertIsNone(arrived.one("x-amz-decoded-content-length"))

    def test_nonsense_is_not_a_fault_of_ours(self):
        self.start(verified=False)
        for header in ("", "AWS4-HMAC-SHA256", "Basic a", "AWS4-HMAC-SHA256 Credential=a/b/c/d/e"):
            for call in (LIST, LIST_FORM, ("GET", "/b", (), b"")):
                method, target, headers, body = call
                framing = (("Content-Length", len(body)), ("Authorization", header))
                with self.subTest(header, call=call):
                    got = self.put(raw_request(method, target, (*headers, *framing), body), method)
                    self.assertLess(got.status, 500)


MOTO = importlib.util.find_spec("moto") and importlib.util.find_spec("boto3")


@unittest.skipUnless(MOTO, "moto or boto3 is not installed")
class MotoTest(unittest.TestCase):
    """boto3 through the proxy to moto, which answers for many services."""

    @classmethod
    def setUpClass(cls):
        import moto.server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "BOTO"))}
        patch = mock.patch.dict(os.environ, {**kept, **nothing, "NO_PROXY": "*"}, clear=True)
        patch.start()
        cls.addClassCleanup(patch.stop)
        moto_server = moto.server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto_server.start()
        cls.addClassCleanup(moto_server.stop)
        endpoint = awsproxy.Endpoint("http", *moto_server.get_host_and_port())
        keys, pool = Keys(OUR_KEYS), awsproxy.Pool(5, 30)
        target = awsproxy.Upstream(endpoint, lambda client: keys, pool)
        proxy = Proxy(awsproxy.DEMO_CLIENTS, routes=[awsproxy.Route("*", target)])
        cls.running = Running(proxy)
        cls.addClassCleanup(cls.running.stop)
        cls.addClassCleanup(Through.drain, cls, pool, endpoint)

    def client(self, service, **settings):
        import boto3
        import botocore.config

        host, port = self.running.address
        config = botocore.config.Config(retries={"total_max_attempts": 1}, **settings)
        client = boto3.client(
            service, region_name="us-east-1", endpoint_url=f"http://{host}:{port}", config=config,
            aws_access_key_id="dummykey", aws_secret_access_key="dummysecret",
        )  # fmt: skip
        self.addCleanup(client.close)
        return client

    def test_amazon_sqs(self):
        sqs = self.client("sqs")
        url = sqs.create_queue(QueueName="jobs")["QueueUrl"]
        self.assertTrue(url.startswith("http://{}:{}/".format(*self.running.address)), url)
        self.assertEqual(sqs.list_queues()["QueueUrls"], [url])
        sqs.send_message(QueueUrl=url, MessageBody="hello \u00e9")
        (message,) = sqs.receive_message(QueueUrl=url)["Messages"]
        self.assertEqual(message["Body"], "hello \u00e9")
        sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        with self.assertRaises(sqs.exceptions.QueueDoesNotExist):
            sqs.get_queue_url(QueueName="none")

    def test_amazon_s3(self):
        s3 = self.client("s3", s3={"addressing_style": "path"}, signature_version="s3v4")
        s3.create_bucket(Bucket="things")
        keys = ["a//b", "a+b c", "\u00e9/\u65e5", "/leading", "a/../b", "a%2Fb", "~(b)'!*=&?#"]
        for key in keys:
            with self.subTest(key):
                s3.put_object(Bucket="things", Key=key, Body=key.encode(), Metadata={"a": "b"})
                got = s3.get_object(Bucket="things", Key=key)
                self.assertEqual((got["Body"].read(), got["Metadata"]), (key.encode(), {"a": "b"}))
                self.assertEqual(
                    s3.head_object(Bucket="things", Key=key)["ContentLength"], len(key.encode())
                )
        listed = [o["Key"] for o in s3.list_objects_v2(Bucket="things")["Contents"]]
        self.assertEqual(sorted(listed), sorted(keys))
        found = s3.list_objects_v2(Bucket="things", Prefix="a+b ")["Contents"]
        self.assertEqual([o["Key"] for o in found], ["a+b c"])
        big = os.urandom(6 * MEBIBYTE)
        upload = s3.create_multipart_upload(Bucket="things", Key="big")["UploadId"]
        parts = []
        for number, data in enumerate((big, b"end"), 1):
            etag = s3.upload_part(
                Bucket="things", Key="big", UploadId=upload, PartNumber=number, Body=data
            )["ETag"]
            parts.append({"PartNumber": number, "ETag": etag})
        s3.complete_multipart_upload(
            Bucket="things", Key="big", UploadId=upload, MultipartUpload={"Parts": parts}
        )
        s3.copy_object(Bucket="things", Key="copy", CopySource={"Bucket": "things", "Key": "big"})
        self.assertEqual(s3.get_object(Bucket="things", Key="copy")["Body"].read(), big + b"end")
        part = s3.get_object(Bucket="things", Key="big", Range="bytes=1-5")
        self.assertEqual(part["Body"].read(), big[1:6])
        for key in ("a+b c", "\u00e9/\u65e5", "a//b"):
            link = s3.generate_presigned_url("get_object", Params={"Bucket": "things", "Key": key})
            with urllib.request.urlopen(link) as answered:
                self.assertEqual(answered.read(), key.encode())
        s3.delete_object(Bucket="things", Key="big")
        with self.assertRaises(s3.exceptions.NoSuchKey):
            s3.get_object(Bucket="things", Key="big")

    def test_other_services(self):
        table = self.client("dynamodb")
        table.create_table(
            TableName="t", BillingMode="PAY_PER_REQUEST",
            KeySchema=[{"AttributeName": "k", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "k", "AttributeType": "S"}],
        )  # fmt: skip
        table.put_item(TableName="t", Item={"k": {"S": "a"}})
        self.assertEqual(
            table.get_item(TableName="t", Key={"k": {"S": "a"}})["Item"]["k"]["S"], "a"
        )
        self.assertIn("Arn", self.client("sts").get_caller_identity())
        sns = self.client("sns")
        topic = sns.create_topic(Name="news")["TopicArn"]
        self.assertIn("MessageId", sns.publish(TopicArn=topic, Message="a"))
        self.assertEqual(self.client("lambda").list_functions()["Functions"], [])
        iam = self.client("iam")
        iam.create_user(UserName="bob")
        self.assertEqual([u["UserName"] for u in iam.list_users()["Users"]], ["bob"])


UPSTREAM_KEYS = awsproxy.Credentials("upstreamkey", "upstreamsecret", "upstreamtoken")
UPSTREAM = Client("up", *UPSTREAM_KEYS[:3])


class SomeKeys:
    """Stands in for a CredentialCache."""

    def __init__(self, *several):
        self.several = list(several or [UPSTREAM_KEYS])
        self.refused = []

    def get(self):
        return self.several[0]

    ready = get

    def expire(self, keys):
        self.refused.append(keys)
        return len(self.several) > 1 and bool(self.several.pop(0))


ANSWER = b"HTTP/1.1 200 OK\r\nx-amzn-RequestId: r\r\nContent-Length: 2\r\n\r\n{}"


class FakeUpstream:
    """An upstream on plain sockets: keeps what arrives, answers what it was given.

    An answer is bytes; after b"" the connection is closed unanswered.
    """

    def __init__(self, test, *answers, default=ANSWER):
        self.answers = list(answers)
        self.default = default
        self.requests = []  # Requests, their body read; None for one that was cut short
        self.connections = 0
        self.open = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = awsproxy.Endpoint("http", "127.0.0.1", self.listener.getsockname()[1])
        test.addCleanup(self.listener.close)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.open.append(connection)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def hang_up(self):
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def serve(self, connection):
        source = awsproxy.Stream(connection.recv)
        with connection, contextlib.suppress(OSError):
            while True:
                raw = awsproxy.read_head(source)
                if not raw:
                    return
                head = awsproxy.parse_head(raw)
                length = awsproxy.body_framing(head)
                make = awsproxy.ChunkedBody if length is None else awsproxy.LengthBody
                try:
                    body = make(source, sys.maxsize if length is None else length).read()
                except ServiceError:
                    self.requests.append(None)
                    return
                request = Request(head.method, head.target, head.headers, io.BytesIO(body))
                self.requests.append(request)
                answer = self.answers.pop(0) if self.answers else self.default
                if not answer:
                    return
                connection.sendall(answer)
                if b"close" in answer.partition(b"\r\n\r\n")[0]:
                    return


class ForwardCase(unittest.TestCase):
    def pool(self, timeout=DEADLINE):
        """Return a Pool whose connections are closed at the end."""

        def close():
            for connection in itertools.chain.from_iterable(pool._idle.values()):
                connection.close()

        pool = awsproxy.Pool(DEADLINE, timeout)
        self.addCleanup(close)
        return pool

    def proxy(self, recorder, keys=None, timeout=DEADLINE, **settings):
        """Return a Proxy that forwards all there, with a standing clock."""
        keys = keys or SomeKeys()
        pool = self.pool(timeout)
        upstream = awsproxy.Upstream(
            recorder.endpoint, lambda client: keys, pool, lambda: EXAMPLE_TIME
        )
        settings.setdefault("routes", [awsproxy.Route("*", upstream)])
        return Proxy(awsproxy.DEMO_CLIENTS, clock=lambda: EXAMPLE_TIME, **settings)

    def check(self, request, client=UPSTREAM):
        """Check that a request that went upstream is signed as AWS wants it."""
        return awsproxy.verify(request, {client.access_key_id: [client]}, EXAMPLE_TIME)

    def forwarded(self, proxy, recorder, request):
        """Return the answer, and the request that came of it."""
        before = len(recorder.requests)
        reply = proxy.handle(request)
        body = reply.body if isinstance(reply.body, bytes) else b"".join(reply.body)
        (sent,) = recorder.requests[before:] or [None]
        return reply._replace(body=body), sent


def table_call(operation="ListTables", body=b"{}", headers=(), service="dynamodb", **how):
    target = ("X-Amz-Target", f"DynamoDB_20120810.{operation}")
    length = ("Content-Length", str(len(body)))
    return signed("POST", "/", (target, length, *headers), body, service=service, **how)


def object_request(method="GET", target="/b/k", headers=(), body=b"", declared=None, **how):
    declared = declared or sha256(body)
    headers = [*headers, ("X-Amz-Content-Sha256", declared)]
    if body or method == "PUT":
        headers.append(("Content-Length", str(len(body))))
    how.setdefault("payload_hash", declared)
    return signed(method, target, headers, body, service="s3", **how)


class AbuseTest(ForwardCase):
    """What a hostile or broken upstream, or client, must not bring about."""

    def test_an_answer_too_many_is_nobodys(self):
        surplus = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\ninjected"
        for name, answer in (
            ("two answers", ANSWER + surplus),
            ("a body where there is none", b"HTTP/1.1 204 No\r\n\r\n" + surplus),
        ):
            for repeated in (False, True):
                with self.subTest(name, on_a_kept_connection=repeated):
                    recorder = FakeUpstream(self, *[ANSWER] * repeated, answer)
                    proxy = self.proxy(recorder)
                    for _ in range(repeated + 1):
                        proxy.handle(table_call())
                    reply = proxy.handle(table_call())
                    self.assertEqual(reply.body, b"{}")
                    self.assertEqual(recorder.connections, 2)

    def test_a_message_is_not_sent_twice_though_it_is_sent_by_get(self):
        recorder = FakeUpstream(self, ANSWER, b"")
        proxy = self.proxy(recorder)
        url = urllib.parse.quote(url_of("jobs"), safe="")
        target = f"/?Action=SendMessage&Version=2012-11-05&QueueUrl={url}&MessageBody=a"
        with self.assertLogs("awsproxy", "WARNING"):
            statuses = [proxy.handle(signed("GET", target)).status for _ in range(2)]
        self.assertEqual((statuses, len(recorder.requests)), ([200, 503], 2))

    def test_the_code_of_an_upstreams_error_is_known_here_too(self):
        for header, body, code in (
            (b"x-amzn-errortype: a#ThrottlingException:http://x/", b"", "ThrottlingException"),
            (b"x-amzn-query-error: AWS.SimpleQueueService.NonExistentQueue;Sender",
             b'{"__type":"com.amazonaws.sqs#QueueDoesNotExist"}',
             "AWS.SimpleQueueService.NonExistentQueue"),
            (b"A: b", b'{"__type" : "com.amazon#ExpiredTokenException", "m": 1}',
             "ExpiredTokenException"),
            (b"A: b", b"<Error><Code>NoSuchKey</Code></Error>", "NoSuchKey"),
            (b"A: b", b"<Error><Code>a b</Code></Error>", "-"),
            (b"x-amzn-errortype: a b", b'{"code": ""}', "-"),
            (b"A: b", b"\xff", "-"),
        ):  # fmt: skip
            seen = []
            hook = mock.Mock(spec=["observe"], observe=seen.append)
            answer = b"HTTP/1.1 400 No\r\n%b\r\nContent-Length: %d\r\n\r\n%b"
            recorder = FakeUpstream(self, answer % (header, len(body), body))
            with self.subTest(code):
                reply = self.proxy(recorder, hooks=[hook]).handle(table_call())
                self.assertEqual((reply.status, reply.body), (400, body))
                self.assertEqual([exchange.error for exchange in seen], [code])

    def test_a_rewrite_returns_another_request_or_nothing(self):
        recorder = FakeUpstream(self, ANSWER)
        hook = mock.Mock(spec=["rewrite"])
        hook.rewrite.return_value = None
        proxy = self.proxy(recorder, hooks=[hook])
        self.assertEqual(proxy.handle(table_call()).status, 200)
        hook.rewrite.return_value = b"bytes"
        with self.assertLogs("awsproxy", "ERROR") as logged:
            self.assertEqual(proxy.handle(table_call()).status, 500)
        self.assertIn("returned b'bytes', which is no Request", "".join(logged.output))

    def test_a_rewrite_that_hangs_costs_its_own_call_alone(self):
        released = threading.Event()
        self.addCleanup(released.set)
        hook = mock.Mock(spec=["rewrite"])
        hook.rewrite.side_effect = lambda call, outgoing: released.wait(DEADLINE) and None
        proxy = self.proxy(FakeUpstream(self, ANSWER), hooks=[hook], hook_seconds=0.05)
        with self.assertLogs("awsproxy", "ERROR") as logged:
            self.assertEqual(proxy.handle(table_call()).status, 500)
        self.assertIn("took longer than 0.05 s", "".join(logged.output))

    def test_a_parameter_cannot_break_out_of_the_header_it_becomes(self):
        recorder = FakeUpstream(self, ANSWER)
        proxy = self.proxy(recorder)
        for text in ("a%0D%0AX-Amz-Acl%3A%20public-read", "a%0Ab", "a%00b", "a%0Db"):
            with self.subTest(text):
                target = presign(target=f"/b/k?X-Amz-Meta-A={text}", service="s3")
                reply = proxy.handle(Request("GET", target, (("Host", HOST),), io.BytesIO()))
                self.assertEqual((reply.status, recorder.requests), (400, []))

    def test_a_request_cut_short_does_not_swallow_the_next(self):
        """The upstream answers from the head alone and keeps the connection."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        seen = []

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                kept.append(connection)
                head = connection.recv(65536).partition(b"\r\n\r\n")[0]
                seen.append(head.partition(b" HTTP")[0])
                connection.sendall(b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno")

        kept = []
        self.addCleanup(lambda: [connection.close() for connection in kept])
        threading.Thread(target=serve, daemon=True).start()
        upstream = type("At", (), {})
        upstream.endpoint = awsproxy.Endpoint("http", *listener.getsockname())
        proxy = self.proxy(upstream)
        body = b"x" * 8000000
        reply = proxy.handle(object_request("PUT", body=body, declared="UNSIGNED-PAYLOAD"))
        self.assertEqual((reply.status, reply.body), (503, b"no"))
        self.assertEqual(proxy.handle(object_request(target="/b/second")).status, 503)
        self.assertEqual(seen, [b"PUT /b/k", b"GET /b/second"])

    def raw(self, request, version="1.1"):
        lines = [f"{name}: {value}" for name, value in request.headers]
        first = f"{request.method} {request.target} HTTP/{version}"
        return "\r\n".join([first, *lines, "", ""]).encode() + request.body.read()

    def running(self, recorder):
        running = Running(self.proxy(recorder))
        self.addCleanup(running.stop)
        return running

    def test_an_old_client_is_not_told_a_false_length(self):
        chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
        for answer, complete in ((chunks + b"0\r\n\r\n", True), (chunks + b"5\r\nab", False)):
            recorder = FakeUpstream(self, answer, b"")
            recorder.answers[0] = answer.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
            running = self.running(recorder)
            with self.subTest(complete=complete), contextlib.ExitStack() as stack:
                if not complete:
                    stack.enter_context(self.assertLogs("awsproxy", "WARNING"))
                wire = stack.enter_context(socket.create_connection(running.address, DEADLINE))
                wire.sendall(self.raw(object_request(), "1.0"))
                got, reset = b"", False
                try:
                    got = b"".join(iter(lambda wire=wire: wire.recv(65536), b""))
                except ConnectionResetError:
                    reset = True
                self.assertNotIn(b"Content-Length", got)
                self.assertEqual(reset, not complete)
                self.assertTrue(not complete or got.endswith(b"\r\n\r\nabc"))

    def test_what_an_upstream_says_is_passed_on_at_once(self):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nevent\r\n"
        recorder = FakeUpstream(self, head)  # and no end
        with socket.create_connection(self.running(recorder).address, DEADLINE) as wire:
            wire.sendall(self.raw(object_request()))
            got = b""
            while b"event" not in got:
                data = wire.recv(65536)
                self.assertTrue(data)
                got += data
            with self.assertLogs("awsproxy", "WARNING"), contextlib.suppress(ConnectionResetError):
                recorder.hang_up()
                while wire.recv(65536):
                    pass

    def test_an_upstream_cannot_keep_a_call_for_ever(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    for _ in range(20 * DEADLINE):
                        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                        time.sleep(0.05)

        threading.Thread(target=serve, daemon=True).start()
        upstream = type("At", (), {})
        upstream.endpoint = awsproxy.Endpoint("http", *listener.getsockname())
        begin = time.monotonic()
        with self.assertLogs("awsproxy", "WARNING"):
            reply = self.proxy(upstream, timeout=0.3).handle(table_call())
        self.assertEqual(reply.status, 503)
        self.assertLess(time.monotonic() - begin, DEADLINE / 2)

    def test_a_client_that_hangs_up_in_its_body_is_no_fault_of_ours(self):
        recorder = FakeUpstream(self)
        running = self.running(recorder)
        raw = self.raw(object_request("PUT", body=b"x" * 300000))
        with self.assertNoErrorLogged():
            with socket.create_connection(running.address, DEADLINE) as wire:
                wire.sendall(raw[:100000])
            request = self.raw(table_call())
            with socket.create_connection(running.address, DEADLINE) as wire:
                wire.sendall(request)
                self.assertIn(b"200 OK", wire.recv(65536))

    @contextlib.contextmanager
    def assertNoErrorLogged(self):
        with self.assertLogs("awsproxy", "WARNING") as logged:
            awsproxy.log.warning("so that there is one")
            yield
        self.assertEqual([r for r in logged.records if r.levelname != "WARNING"], [])

    def test_no_call_is_made_twice_where_connections_break(self):
        """Nor does any fail but those whose connection broke with the call under way."""
        recorder = FakeUpstream(self, *[ANSWER, ANSWER, b""] * 1000)
        upstream = awsproxy.Upstream(recorder.endpoint, lambda client: SomeKeys(), self.pool())
        proxy = Proxy(awsproxy.DEMO_CLIENTS, routes=[awsproxy.Route("*", upstream)])
        running = Running(proxy)
        self.addCleanup(running.stop)
        with self.assertNoErrorLogged():
            senders = Senders(running.address)
            self.addCleanup(senders.stop)
            wait_until(lambda: len(recorder.requests) >= 100)
            senders.stop()
        bodies = [json.loads(request.body.read())["MessageBody"] for request in recorder.requests]
        self.assertEqual(sorted(bodies), sorted(it.body for it in senders.sent))
        statuses = collections.Counter(it.answer.status for it in senders.sent)
        self.assertEqual(set(statuses), {200, 503})
        self.assertEqual(statuses[503], len(bodies) // 3)

    def test_calls_wait_for_an_upstream_without_holding_up_others(self):
        recorder = FakeUpstream(self, ANSWER, b"HTTP/1.1 200 OK\r\nContent-")
        upstream = awsproxy.Upstream(
            recorder.endpoint, lambda client: SomeKeys(), self.pool(), lambda: EXAMPLE_TIME
        )
        routes = [
            awsproxy.Route("sqs:*", awsproxy.Embedded(awsproxy.Sqs())),
            awsproxy.Route("*", upstream),
        ]
        running = Running(self.proxy(recorder, routes=routes))
        self.addCleanup(running.stop)

        def raw(request):
            lines = [f"{n}: {v}" for n, v in request.headers]
            return "\r\n".join(["POST / HTTP/1.1", *lines, "", ""]).encode() + b"{}"

        first, slow, other = (running.connect() for _ in range(3))
        first.send(raw(table_call()))
        self.assertEqual(first.answer().status, 200)
        slow.send(raw(table_call()) + raw(table_call()))  # the second behind it must wait its turn
        length = ("Content-Length", "2")
        target = ("X-Amz-Target", "AmazonSQS.ListQueues")
        other.send(raw(signed("POST", "/", (target, length), b"{}")))
        self.assertEqual(other.answer().status, 200)
        with self.assertLogs("awsproxy", "WARNING"):
            running.stop()  # which gives up the slow one


# ==== 7. Hooks ====


class HookTest(unittest.TestCase):
    def folder_with(self, text):
        return write(os.path.join(folder(self), "hook.py"), text)

    def caller(self, protocol, *hooks, **settings):
        caller = Caller(protocol)
        clients = awsproxy.DEMO_CLIENTS
        caller.proxy = Proxy(clients, clock=caller.clock, sqs=caller.sqs, hooks=hooks, **settings)
        return caller

    def test_moments_come_in_their_order(self):
        seen = []

        def hook(name):
            def note(moment, result):
                return lambda *given: seen.append(f"{moment} {name}") or result(*given)

            class Noting:
                before = staticmethod(note("before", lambda call: None))
                after = staticmethod(note("after", lambda call, reply: reply))
                observe = staticmethod(note("observe", lambda exchange: None))

            return Noting()

        self.caller("json", hook("a"), hook("b"))("ListQueues")
        self.assertEqual(
            seen, ["before a", "before b", "after b", "after a", "observe b", "observe a"]
        )

    def test_a_call_that_concerns_no_hook_makes_no_detour(self):
        path = self.folder_with(
            "seen = []\n"
            "def concerns(call):\n"
            "    return {'CreateQueue': False, 'DeleteMessage': True}[call.operation]\n"
            "def before(call):\n"
            "    seen.append(call.operation)\n"
        )
        hook = awsproxy.HookFile(path)

        class Every(awsproxy.Hook):
            def observe(self, exchange):
                hook.value.seen.append(f"{exchange.call.operation}, observed")

        proxy = self.caller("json", Every(), hook).proxy
        for operation, body, direct, status in (
            ("CreateQueue", b'{"QueueName":"a"}', True, 200),
            ("DeleteMessage", b'{"QueueUrl":"a","ReceiptHandle":"x"}', False, 404),
            ("ListQueues", b"{}", True, 500),
        ):
            kind = (("X-Amz-Target", f"AmazonSQS.{operation}"),)
            request = signed("POST", "/", kind, body, at=EXAMPLE_TIME)
            with self.subTest(operation), contextlib.ExitStack() as logs:
                if status == 500:
                    logs.enter_context(self.assertLogs("awsproxy", "ERROR"))
                (outcome,) = proxy.begin([request])
                self.assertEqual(isinstance(outcome, Reply), direct)
                self.assertEqual((outcome if direct else outcome()).status, status)
        observed = [f"{name}, observed" for name in ("CreateQueue", "DeleteMessage", "ListQueues")]
        self.assertEqual(hook.value.seen, [observed[0], "DeleteMessage", *observed[1:]])

    def test_input_is_the_same_in_either_protocol_and_may_be_changed(self):
        given = {"QueueUrl": "jobs", "MessageBody": "hello"}

        class Stamp:
            def before(self, call):
                if call.action == "sqs:SendMessage":
                    self.seen = dict(call.input)
                    call.input["MessageAttributes"] = {"by": string("hook")}

        for protocol in ("json", "query"):
            with self.subTest(protocol):
                hook = Stamp()
                caller = self.caller(protocol, hook)
                url = caller.queue()
                caller("SendMessage", **given)
                self.assertEqual(hook.seen, given)
                (message,) = caller.receive(url, MessageAttributeNames=["All"])
                self.assertEqual(message["MessageAttributes"], {"by": string("hook")})

    def test_a_hook_may_answer_refuse_and_fail(self):
        class Own:
            def before(self, call):
                if call.operation == "ListQueues":
                    return Reply(200, (), b'{"QueueUrls":["mine"]}')
                if call.operation == "PurgeQueue":
                    raise ServiceError("AccessDenied", "not today")
                if call.operation == "DeleteQueue":
                    raise ValueError("dummysecret")
                return None

        caller = self.caller("json", Own())
        url = caller.queue()
        self.assertEqual(caller("ListQueues"), {"QueueUrls": ["mine"]})
        with self.assertRaises(Refused) as caught:
            caller("PurgeQueue", QueueUrl=url)
        self.assertEqual((caught.exception.status, caught.exception.message), (403, "not today"))
        with self.assertLogs("awsproxy", "ERROR"), self.assertRaises(Refused) as caught:
            caller("DeleteQueue", QueueUrl=url)
        self.assertEqual(
            (caught.exception.status, caught.exception.code), (500, "InternalFailure")
        )
        self.assertNotIn("dummysecret", caught.exception.message)
        self.assertEqual(caller.queue(), url)

    def test_a_hook_that_hangs_costs_its_own_call_alone(self):
        released = threading.Event()
        self.addCleanup(released.set)

        class Slow:
            def before(self, call):
                if call.operation == "ListQueues":
                    released.wait(DEADLINE)

        caller = self.caller("json", Slow(), hook_seconds=0.05)
        with self.assertLogs("awsproxy", "ERROR") as logged, self.assertRaises(Refused):
            caller("ListQueues")
        self.assertIn("took longer than 0.05 s", "".join(logged.output))
        caller.proxy._hook_seconds = DEADLINE
        self.assertTrue(caller.queue())

    def test_what_is_returned_is_another_answer_or_nothing(self):
        answers = {"ListQueues": None, "CreateQueue": None, "GetQueueUrl": {"a": 1}}

        class After:
            def after(self, call, reply):
                if call.operation == "ListQueues":
                    return reply._replace(status=202)
                return answers[call.operation]

        class Before:
            def before(self, call):
                return answers.get(call.operation, "nothing")

        caller = self.caller("json", After(), Before())
        request = signed(headers=[("X-Amz-Target", "AmazonSQS.ListQueues")], body=b"{}")
        self.assertEqual(caller.proxy.handle(request).status, 202)
        self.assertIn("QueueUrl", caller("CreateQueue", QueueName="jobs"))
        for operation, said in (("GetQueueUrl", "{'a': 1}"), ("DeleteQueue", "'nothing'")):
            with self.assertLogs("awsproxy", "ERROR") as logged, self.assertRaises(Refused):
                caller(operation, QueueName="jobs")
            self.assertIn(f"Before.before returned {said}", "".join(logged.output))

    def test_an_observer_that_fails_costs_nobody_his_answer(self):
        class Observer:
            def observe(self, exchange):
                raise ValueError("no")

        with self.assertLogs("awsproxy", "ERROR"):
            self.assertEqual(self.caller("json", Observer())("ListQueues"), {})

    def test_a_file_is_loaded_again_when_it_changes_and_kept_when_it_breaks(self):
        path = self.folder_with("def before(call):\n    call.input['QueueName'] = 'first'\n")
        caller = self.caller("json", awsproxy.HookFile(path))
        self.assertTrue(caller.queue().endswith("/first"))
        for age, text, name in (
            (2, "def before(call:\n", "first"),
            (3, "def befor(call):\n    pass\n", "first"),
            (4, "def before(call):\n    call.input['QueueName'] = 'next'\n", "next"),
        ):
            with self.subTest(text), self.assertLogs("awsproxy"):
                write(path, text, age)
                caller.proxy.refresh_hooks()
                self.assertTrue(caller.queue().endswith(name))

    def test_a_file_that_is_no_hook_is_refused(self):
        for text, pattern in (
            ("def before(call:\n", "SyntaxError"),
            ("1 / 0\n", "ZeroDivisionError"),
            ("x = 1\n", "it has none of before"),
            ("def befor(call):\n    pass\n", "did you mean before"),
            ("def before(call):\n    pass\ndef helper():\n    pass\n", "helper is no moment"),
        ):
            with self.subTest(text), self.assertRaisesRegex(ValueError, pattern):
                awsproxy.HookFile(self.folder_with(text))
        private = "import os\nfrom os.path import join\ndef before(call):\n    _own()\n"
        awsproxy.HookFile(self.folder_with(private + "def _own():\n    pass\n"))

    def test_the_program_runs_a_hook_that_imports_it(self):
        hook = self.folder_with(
            "import awsproxy\n\n\ndef before(call):\n"
            "    raise awsproxy.ServiceError('OverLimit', 'enough')\n"
        )
        program = Program(self.addCleanup, "--hook", hook)
        with self.assertRaises(Refused) as caught:
            program.caller()("ListQueues")
        self.assertEqual((caught.exception.status, caught.exception.code), (403, "OverLimit"))
        code, _, errors = run_each([("missing", ["--hook", hook + "x"])])["missing"]
        self.assertEqual((code, errors.count("\n")), (2, 1), errors)


class MetricsTest(unittest.TestCase):
    SAMPLE = re.compile(
        r'awsproxy_\w+(\{\w+="([^"\\\n]|\\[\\"n])*"(,\w+="([^"\\\n]|\\[\\"n])*")*\})? \S+'
    )

    def counting(self):
        metrics = awsproxy.Metrics()
        caller = Caller("json")
        caller.proxy = Proxy(
            awsproxy.DEMO_CLIENTS, clock=caller.clock, sqs=caller.sqs, hooks=[metrics]
        )
        return metrics, caller

    def test_codes_beyond_the_most_are_one(self):
        metrics = awsproxy.Metrics()
        for number in range(metrics.MAX_ROWS + 9):
            exchange = awsproxy.Exchange(signed("POST", "/"), 0, "")
            exchange.error = f"Code{number}"
            metrics.observe(exchange)
        text = metrics.text()
        self.assertIn('code="other"} 9\n', text)
        self.assertEqual(text.count("\nawsproxy_requests_total{"), metrics.MAX_ROWS + 1)

    def test_what_cannot_be_told_is_500(self):
        metrics = awsproxy.Metrics()
        metrics.gauge("broken", "It is.", lambda: 1 / 0)
        proxy = Proxy({}, status=awsproxy.Status(metrics))
        request = Request("GET", "/_awsproxy/metrics", (), io.BytesIO(), "127.0.0.1")
        with self.assertLogs("awsproxy", "ERROR"):
            self.assertEqual(proxy.handle(request).status, 500)

    def test_operations_beyond_the_most_are_one_and_refusals_none(self):
        metrics = awsproxy.Metrics()
        caller = Caller("json")
        proxy = Proxy(awsproxy.DEMO_CLIENTS, clock=caller.clock, hooks=[metrics], routes=[])
        wrong = DEMO._replace(secret_access_key="wrong")
        for number in range(520):
            kind = (("X-Amz-Target", f"AmazonSQS.Made{number}"),)
            proxy.handle(signed("POST", "/", kind, b"{}", at=caller.clock()))
        proxy.handle(signed("POST", "/", OF_JSON, b"{}", at=caller.clock(), client=wrong))
        text = metrics.text()
        self.assertIn('{client="demo",service="other",operation="other",status="403"', text)
        refused = 'client="-",service="-",operation="-",status="403",code="SignatureDoesNotMatch"'
        self.assertIn(f"{{{refused}}} 1\n", text)
        counts = re.findall("^awsproxy_requests_total.* ([0-9]+)$", text, re.M)
        self.assertEqual((len(counts), sum(map(int, counts))), (502, 521))

    def test_calls_and_refusals_are_counted(self):
        metrics, caller = self.counting()
        url = caller.queue()
        for _ in range(3):
            caller(
                "SendMessage",
                QueueUrl=url,
                MessageBody="m",
                headers=[("amz-sdk-request", "attempt=2; max=3")],
            )
        caller.client = DEMO._replace(secret_access_key="wrong")
        with self.assertRaises(Refused):
            caller("ListQueues")
        text = metrics.text()
        labels = 'client="demo",service="sqs",operation="SendMessage",status="200",code="-"'
        for line in (
            f"awsproxy_requests_total{{{labels}}} 3",
            'awsproxy_attempts_total{attempt="2"} 3',
            'awsproxy_refusals_total{reason="signature"} 1',
            "awsproxy_throttles_total 0",
            "awsproxy_request_seconds_count 5",
            'awsproxy_request_seconds_bucket{le="+Inf"} 5',
        ):
            self.assertIn(line + "\n", text)

    def test_the_text_is_as_its_format_says(self):
        metrics, caller = self.counting()
        caller.client = DEMO._replace(access_key_id='a"\\b')
        with self.assertRaises(Refused):
            caller("ListQueues")
        metrics.gauge("open", "Open.", lambda: float("nan"))
        described = set()
        for line in metrics.text().splitlines():
            if line.startswith("#"):
                described.add(line.split()[2])
                continue
            self.assertRegex(line, self.SAMPLE.pattern + "$")
            name = re.match(r"\w+", line)[0]
            self.assertIn(re.sub("_(bucket|sum|count)$", "", name), described)

    def test_hostile_names_do_not_grow_it(self):
        metrics, caller = self.counting()
        for number in range(600):
            with self.assertRaises(Refused):
                caller(f"Bogus{number}")
        text = metrics.text()
        self.assertIn('operation="other"', text)
        self.assertLess(len(text.splitlines()), 700)

    def test_our_own_paths_are_told_to_this_machine_alone(self):
        status = awsproxy.Status(awsproxy.Metrics())
        proxy = Proxy(awsproxy.DEMO_CLIENTS, status=status)
        for path, peer, expected in (
            ("health", "127.0.0.1", 200),
            ("ready", "::1", 200),
            ("metrics", "127.0.0.1", 200),
            ("nothing", "127.0.0.1", 404),
            ("health", "192.0.2.1", 403),
            ("metrics", "", 403),
        ):
            with self.subTest(path, peer=peer):
                request = Request("GET", f"/_awsproxy/{path}", (), io.BytesIO(), peer)
                self.assertEqual(proxy.handle(request).status, expected)
        post = Request("POST", "/_awsproxy/health", (), io.BytesIO(), "127.0.0.1")
        self.assertEqual(proxy.handle(post).status, 405)

    def test_a_log_file_is_opened_again_on_sighup(self):
        path = os.path.join(folder(self), "log")
        program = Program(self.addCleanup, "--log-file", path, "--log-format", "json")
        program.caller()("ListQueues")
        os.rename(path, path + ".1")
        program.process.send_signal(signal.SIGHUP)
        wait_until(lambda: os.path.exists(path))
        program.caller()("ListQueues")
        for name in (path, path + ".1"):
            with open(name, encoding="ascii") as lines:
                entry = json.loads(lines.readline())
            self.assertEqual((entry["name"], entry["region"]), ("demo", "us-east-1"))


NOT_VISIBLE = "ApproximateNumberOfMessagesNotVisible"
JOBS = "000000000000/jobs"


def fill(caller, url, count=1):
    for number in range(count):
        caller("SendMessage", QueueUrl=url, MessageBody=str(number))


def handles(caller, url, **given):
    return [message["ReceiptHandle"] for message in caller.receive(url, **given)]


def own_path(address, path, method="GET"):
    connection = http.client.HTTPConnection(*address, timeout=DEADLINE)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()


class Beforehand(awsproxy.InFlight):
    """Has something happen between an operation and its note in the ledger."""

    plan = ("", None)

    def note(self, call, reply):
        operation, act = self.plan
        if call.operation == operation:
            self.plan = ("", None)
            act()
        super().note(call, reply)


class LedgerCase(unittest.TestCase):
    def caller(self, protocol="json", ledger=None, **settings):
        """Return a Caller whose calls a ledger takes note of."""
        caller = Caller(protocol)
        self.asked = []

        def ask(call, queue):
            self.asked.append(queue)
            return caller.proxy.visibility_timeout(call, queue)

        self.ledger = ledger or awsproxy.InFlight(ask, lambda act: act(), caller.clock)
        caller.proxy = Proxy(
            awsproxy.DEMO_CLIENTS,
            clock=caller.clock,
            sqs=caller.sqs,
            hooks=[self.ledger],
            **settings,
        )
        return caller


class InFlightTest(LedgerCase):
    def test_messages_are_held_until_they_are_settled(self):
        for protocol in ("json", "query"):
            with self.subTest(protocol):
                caller = self.caller(protocol)
                url = caller.queue(VisibilityTimeout="40")
                entries = [{"Id": f"{n}", "MessageBody": f"{n}"} for n in range(10)]
                caller("SendMessageBatch", QueueUrl=url, Entries=entries)
                held = [m["ReceiptHandle"] for m in caller.receive(url, MaxNumberOfMessages=10)]
                self.assertEqual(self.ledger.counts(), {"000000000000/jobs": 10})
                caller("DeleteMessage", QueueUrl=url, ReceiptHandle=held[0])
                given = {"QueueUrl": url, "ReceiptHandle": held[1]}
                caller("ChangeMessageVisibility", VisibilityTimeout=0, **given)
                batch = [{"Id": "a", "ReceiptHandle": held[2]}, {"Id": "b", "ReceiptHandle": "x"}]
                caller("DeleteMessageBatch", QueueUrl=url, Entries=batch)
                self.assertEqual(self.ledger.total, 7)
                changes = [
                    {"Id": "c", "ReceiptHandle": held[3], "VisibilityTimeout": 100},
                    {"Id": "d", "ReceiptHandle": held[4], "VisibilityTimeout": 0},
                ]
                caller("ChangeMessageVisibilityBatch", QueueUrl=url, Entries=changes)
                self.assertEqual(self.ledger.total, 6)
                caller.clock.now += 39.9
                self.assertEqual(self.ledger.total, 6)
                caller.clock.now += 0.2
                self.assertEqual(self.ledger.total, 1)
                caller.clock.now += 60
                self.assertEqual(self.ledger.counts(), {})

    def test_the_timeout_is_that_of_the_call_or_asked_for_once(self):
        caller = self.caller()
        url = caller.queue(VisibilityTimeout="50")
        for body in "abcd":
            caller("SendMessage", QueueUrl=url, MessageBody=body)
        caller.receive(url, VisibilityTimeout=10)
        self.assertEqual(self.asked, [])
        caller.receive(url)
        caller.receive(url)
        self.assertEqual(self.asked, ["000000000000/jobs"])
        caller.clock.now += 11
        self.assertEqual(self.ledger.total, 2)
        caller("SetQueueAttributes", QueueUrl=url, Attributes={"VisibilityTimeout": "5"})
        caller.receive(url)
        self.assertEqual(len(self.asked), 2)
        caller.clock.now += 6
        self.assertEqual(self.ledger.total, 2)

    def test_refused_calls_change_nothing_and_a_purge_settles_all(self):
        caller = self.caller()
        url = caller.queue()
        caller("SendMessage", QueueUrl=url, MessageBody="m")
        caller.receive(url)
        with self.assertRaises(Refused):
            caller("DeleteMessage", QueueUrl=url, ReceiptHandle="x")
        self.assertEqual(self.ledger.total, 1)
        caller("PurgeQueue", QueueUrl=url)
        self.assertEqual(self.ledger.total, 0)

    def test_it_agrees_with_the_queue_whatever_happens(self):
        caller = self.caller()
        url, random_ = caller.queue(VisibilityTimeout="20"), random.Random(4)
        held = []
        for number in range(600):
            act = random_.random()
            if act < 0.35:
                caller("SendMessage", QueueUrl=url, MessageBody="m")
            elif act < 0.65:
                held += [m["ReceiptHandle"] for m in caller.receive(url, MaxNumberOfMessages=3)]
            elif act < 0.9 and held:
                given = {"QueueUrl": url, "ReceiptHandle": held.pop(random_.randrange(len(held)))}
                operation = random_.choice(["DeleteMessage", "ChangeMessageVisibility"])
                if operation == "ChangeMessageVisibility":
                    given["VisibilityTimeout"] = random_.choice([0, 1, 30])
                with contextlib.suppress(Refused):
                    caller(operation, **given)
            else:
                caller.clock.now += random_.choice([0.1, 1, 7])
            names = ["ApproximateNumberOfMessagesNotVisible"]
            shown = caller("GetQueueAttributes", QueueUrl=url, AttributeNames=names)
            count = int(shown["Attributes"][names[0]])
            self.assertEqual(self.ledger.total, count, number)

    def test_eight_workers_over_10000_messages_leave_it_exactly_right(self):
        caller = self.caller()
        url = caller.queue(VisibilityTimeout="20")
        for start in range(0, 10000, 10):
            entries = [{"Id": f"{n}", "MessageBody": f"{n}"} for n in range(start, start + 10)]
            caller("SendMessageBatch", QueueUrl=url, Entries=entries)
        done = dict.fromkeys(range(8), 0)

        def work(seed):
            random_, own = random.Random(seed), Caller(("json", "query")[seed % 2])
            own.clock, own.proxy = caller.clock, caller.proxy
            while True:
                if random_.random() < 0.02:
                    together.wait()  # all stand still while the clock moves, then compare
                    together.wait()
                    together.wait()
                    if finished:
                        return
                held = own.receive(url, MaxNumberOfMessages=random_.randint(1, 10))
                for message in held:
                    act = random_.random()
                    given = {"QueueUrl": url, "ReceiptHandle": message["ReceiptHandle"]}
                    if act < 0.6:
                        own("DeleteMessage", **given)
                        done[seed] += 1
                    elif act < 0.8:
                        seconds = random_.choice([0, 5, 60])
                        own("ChangeMessageVisibility", VisibilityTimeout=seconds, **given)
                    elif act < 0.9:
                        entries = [{"Id": "a", "ReceiptHandle": message["ReceiptHandle"]}]
                        own("DeleteMessageBatch", QueueUrl=url, Entries=entries)
                        done[seed] += 1

        together, finished = threading.Barrier(9, timeout=DEADLINE), []
        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
        for thread in threads:
            thread.start()
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        while not finished:
            together.wait()
            caller.clock.now += 7
            together.wait()
            shown = caller("GetQueueAttributes", QueueUrl=url, AttributeNames=names)
            left, count = (int(shown["Attributes"][name]) for name in names)
            self.assertEqual(self.ledger.total, count)
            self.assertEqual(left + count, 10000 - sum(done.values()))
            if left + count == 0:
                finished.append(True)
            together.wait()
        for thread in threads:
            thread.join(DEADLINE)
        self.assertEqual(sum(done.values()), 10000)

    def not_visible(self, caller, url):
        shown = caller("GetQueueAttributes", QueueUrl=url, AttributeNames=[NOT_VISIBLE])
        return int(shown["Attributes"][NOT_VISIBLE])

    def test_one_queue_has_one_name(self):
        for spelled in ("jobs", "/000000000000/jobs", "http://elsewhere/000000000000/jobs/"):
            with self.subTest(spelled):
                caller = self.caller()
                url = caller.queue()
                fill(caller, url)
                caller.receive(url)
                self.assertEqual(self.ledger.counts(), {JOBS: 1})
                caller("PurgeQueue", QueueUrl=spelled)
                self.assertEqual(self.ledger.counts(), {})
                fill(caller, url)
                caller.receive(spelled)
                self.assertEqual(self.ledger.counts(), {JOBS: 1})

    def test_queues_of_another_region_are_others(self):
        caller = self.caller()
        url = caller.queue(VisibilityTimeout="20")
        fill(caller, url)
        caller.receive(url)
        caller.region = "eu-west-1"
        caller.queue(VisibilityTimeout="90")
        fill(caller, url)
        caller.receive(url)
        caller.clock.now += 21
        self.assertEqual(self.ledger.total, 1)
        caller.region = "us-east-1"
        caller("PurgeQueue", QueueUrl=url)
        self.assertEqual(self.ledger.total, 1)

    def test_a_queue_made_anew_has_a_timeout_of_its_own(self):
        caller = self.caller()
        for seconds in (100, 10):
            url = caller.queue(VisibilityTimeout=str(seconds))
            fill(caller, url, 2)
            caller.receive(url)
            caller.clock.now += seconds - 1
            self.assertEqual(self.ledger.total, 1)
            caller.clock.now += 2
            self.assertEqual(self.ledger.total, 0)
            caller.receive(url)
            caller("DeleteQueue", QueueUrl=url)
            self.assertEqual(self.ledger.total, 0)

    def test_answers_in_the_json_of_old_count_too(self):
        caller = self.caller("query")
        url = caller.queue()
        fill(caller, url, 2)
        given = {"QueueUrl": url, "MaxNumberOfMessages": 2}
        legacy = [FORM, ("Accept", "application/json")]

        def call(operation, **given):
            fields = [("Action", operation), ("Version", "2012-11-05"), *form(operation, given)]
            body = urllib.parse.urlencode(fields).encode()
            return json.loads(reply_to(caller, "POST", "/", legacy, body).body)

        result = call("ReceiveMessage", **given)["ReceiveMessageResponse"]
        held = result["ReceiveMessageResult"]["messages"]
        self.assertEqual(len(held), 2)
        self.assertEqual(self.ledger.counts(), {JOBS: 2})
        entries = [{"Id": "a", "ReceiptHandle": held[0]["ReceiptHandle"]}]
        call("DeleteMessageBatch", QueueUrl=url, Entries=entries)
        self.assertEqual(self.ledger.counts(), {JOBS: 1})

    def test_a_handle_of_the_source_queue_is_no_good_for_the_dead_letter_queue(self):
        caller = self.caller()
        dead = caller.queue("dead")
        url = caller.queue(RedrivePolicy=redrive("dead", 1), VisibilityTimeout="5")
        fill(caller, url)
        (old,) = handles(caller, url)
        caller.clock.now += 6
        self.assertEqual(caller.receive(url), [])
        self.assertEqual(len(caller.receive(dead)), 1)
        caller("DeleteMessage", QueueUrl=url, ReceiptHandle=old)  # too late, and no error
        self.assertEqual(self.not_visible(caller, dead), 1)
        self.assertEqual(self.ledger.counts(), {"000000000000/dead": 1})

    def test_notes_out_of_order_lose_and_leave_nothing(self):
        ledger = Beforehand(lambda *_: 30, lambda act: act(), None)
        for name, planned, expected in (
            ("released, and received before that is noted", "ChangeMessageVisibility", 1),
            ("received, and deleted before that is noted", "ReceiveMessage", 0),
        ):
            with self.subTest(name):
                caller = self.caller(ledger=ledger)
                ledger._clock = caller.clock
                url = caller.queue()
                fill(caller, url)
                (old,) = handles(caller, url)
                given = {"QueueUrl": url, "ReceiptHandle": old}
                receive = functools.partial(handles, caller, url)
                if planned == "ReceiveMessage":
                    caller.clock.now += 31
                    ledger.plan = (planned, functools.partial(caller, "DeleteMessage", **given))
                    receive()
                else:
                    ledger.plan = (planned, receive)
                    caller(planned, VisibilityTimeout=0, **given)
                self.assertEqual(self.not_visible(caller, url), expected)
                self.assertEqual(ledger.total, expected)
                caller("PurgeQueue", QueueUrl=url)

    def test_what_is_over_is_forgotten_though_nobody_asks(self):
        ledger = awsproxy.InFlight(lambda *_: 30, lambda act: act(), clock := Clock())
        ledger.REMEMBERED = 100
        request = Request("POST", "/", (), io.BytesIO())

        def note(operation, reply=b"{}", **given):
            call = awsproxy.Call(
                request, awsproxy.AWS_JSON["1.0"], "sqs", operation, "", DEMO, io.BytesIO()
            )
            call.input = {"QueueUrl": "/1/jobs", **given}
            ledger.note(call, Reply(200, (("Content-Type", JSON_1_0),), reply))

        def work(count):
            for number in range(count):
                message = {"MessageId": f"{number:036}", "ReceiptHandle": f"{number:0200}"}
                note("ReceiveMessage", json.dumps({"Messages": [message]}).encode())
                if number % 2:
                    note("DeleteMessage", ReceiptHandle=message["ReceiptHandle"])
                clock.now += 1

        work(300)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before = tracemalloc.get_traced_memory()[0]
        work(10000)
        self.assertLess(tracemalloc.get_traced_memory()[0] - before, 200000)


class ForwardedInFlightTest(ForwardCase):
    """The same, of what an upstream says."""

    MESSAGE = MappingProxyType({"MessageId": "m", "ReceiptHandle": "h", "Body": "b"})

    def ledger(self, *answers, **settings):
        upstream = FakeUpstream(self, *answers, default=self.answer({}))
        clock = Clock()
        ledger = awsproxy.InFlight(lambda *_: 30, lambda act: act(), clock)
        return ledger, self.proxy(upstream, hooks=[ledger], **settings), upstream

    def answer(self, document, chunked=False, kind=JSON_1_0):
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
        body = in_chunks(body, 1000) if chunked else body
        return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: %b\r\n%b\r\n\r\n%b" % (
            kind.encode(), framing, body,
        )  # fmt: skip

    def request(self, operation, **given):
        body = json.dumps({"QueueUrl": url_of("jobs"), **given}).encode()
        target = ("X-Amz-Target", f"AmazonSQS.{operation}")
        length = ("Content-Length", str(len(body)))
        return signed("POST", "/", (target, ("Content-Type", JSON_1_0), length), body)

    def test_messages_count_however_they_come(self):
        big = {**self.MESSAGE, "Body": "b" * 200000}
        pretty = (
            b'<?xml version="1.0"?>\n<ReceiveMessageResponse>\n <ReceiveMessageResult>\n'
            b"  <Message>\n   <MessageId>m</MessageId>\n   <ReceiptHandle>h</ReceiptHandle>\n"
            b"  </Message>\n </ReceiveMessageResult>\n</ReceiveMessageResponse>\n"
        )
        for name, answer in (
            ("as is usual", self.answer({"Messages": [dict(self.MESSAGE)]})),
            ("in chunks", self.answer({"Messages": [dict(self.MESSAGE)]}, True)),
            ("long", self.answer({"Messages": [big]})),
            ("XML with space between", self.answer(pretty, kind="text/xml")),
        ):
            with self.subTest(name):
                ledger, proxy, _ = self.ledger(answer)
                self.assertEqual(proxy.handle(self.request("ReceiveMessage")).status, 200)
                self.assertEqual(ledger.counts(), {JOBS: 1})
                self.assertEqual(
                    proxy.handle(self.request("DeleteMessage", ReceiptHandle="h")).status, 200
                )
                self.assertEqual(ledger.counts(), {})

    def test_batches_count_in_xml_with_space_between(self):
        messages = [{**self.MESSAGE, "MessageId": n, "ReceiptHandle": n} for n in "ab"]
        done = (
            b'<?xml version="1.0"?>\n<DeleteMessageBatchResponse>\n <DeleteMessageBatchResult>\n'
            b"  <DeleteMessageBatchResultEntry>\n   <Id>1</Id>\n"
            b"  </DeleteMessageBatchResultEntry>\n"
            b"  <BatchResultErrorEntry>\n   <Id>2</Id>\n  </BatchResultErrorEntry>\n"
            b" </DeleteMessageBatchResult>\n</DeleteMessageBatchResponse>\n"
        )
        ledger, proxy, _ = self.ledger(
            self.answer({"Messages": messages}), self.answer(done, kind="text/xml")
        )
        proxy.handle(self.request("ReceiveMessage"))
        entries = [{"Id": "1", "ReceiptHandle": "a"}, {"Id": "2", "ReceiptHandle": "b"}]
        proxy.handle(self.request("DeleteMessageBatch", Entries=entries))
        self.assertEqual(ledger.counts(), {JOBS: 1})

    def test_messages_whose_receiver_is_gone_are_not_held(self):
        ledger, proxy, upstream = self.ledger(self.answer({"Messages": [dict(self.MESSAGE)]}))
        request = self.request("ReceiveMessage")
        object.__setattr__(request, "abandoned", lambda: True)
        with self.assertLogs("awsproxy", "WARNING"):
            proxy.handle(request)
        self.assertEqual(len(upstream.requests), 2)  # the second makes it visible again
        self.assertEqual(ledger.counts(), {})

    def test_a_lenient_upstream_is_not_failed_by_task_protection(self):
        """Whatever the input, what the upstream has answered is passed on."""
        for name, operation, given, document in (
            ("a number as text", "ReceiveMessage", {"VisibilityTimeout": "30"},
             {"Messages": [dict(self.MESSAGE)]}),
            ("entries without an id", "DeleteMessageBatch",
             {"Entries": [{"ReceiptHandle": "h"}]}, {"Successful": [], "Failed": []}),
            ("no handle", "DeleteMessage", {}, {}),
            ("messages that are none", "ReceiveMessage", {}, {"Messages": [{"Body": 1}, 2]}),
        ):  # fmt: skip
            with self.subTest(name):
                upstream = FakeUpstream(self, self.answer(document))
                protection = awsproxy.TaskProtection(
                    "http://agent", lambda *_: 30, lambda act: act(), Clock(),
                    lambda *_: b'{"protection":{}}',
                )  # fmt: skip
                proxy = self.proxy(upstream, hooks=[protection])
                with contextlib.redirect_stderr(io.StringIO()):
                    reply = proxy.handle(self.request(operation, **given))
                if upstream.requests:
                    self.assertEqual((reply.status, json.loads(reply.body)), (200, document))


class TaskProtectionTest(LedgerCase):
    def protecting(self, *answers):
        """Return a Caller with a TaskProtection whose agent answers so, then as is right."""
        self.asked_of_agent, left = [], list(answers)

        def put(url, body, timeout):
            self.asked_of_agent.append((url, json.loads(body)))
            answer = left.pop(0) if left else b'{"protection":{}}'
            if isinstance(answer, Exception):
                raise answer
            return answer

        clock = Clock()
        self.protection = awsproxy.TaskProtection(
            "http://agent/v4/x", lambda *_: 30, lambda act: act(), clock, put
        )
        caller = self.caller(ledger=self.protection)
        caller.clock = clock
        caller.sqs._clock = clock
        caller.proxy._clock = clock
        return caller

    def wanted(self):
        return [body["ProtectionEnabled"] for _, body in self.asked_of_agent]

    def test_the_task_is_protected_while_messages_are_in_flight(self):
        caller = self.protecting()
        url = caller.queue()
        caller("SendMessage", QueueUrl=url, MessageBody="a")
        caller("SendMessage", QueueUrl=url, MessageBody="b")
        self.assertEqual(self.asked_of_agent, [])
        (first,) = caller.receive(url)
        expected = {"ProtectionEnabled": True, "ExpiresInMinutes": 60}
        at = "http://agent/v4/x/task-protection/v1/state"
        self.assertEqual(self.asked_of_agent, [(at, expected)])
        (second,) = caller.receive(url)
        caller("DeleteMessage", QueueUrl=url, ReceiptHandle=first["ReceiptHandle"])
        self.assertEqual(self.wanted(), [True])
        caller("DeleteMessage", QueueUrl=url, ReceiptHandle=second["ReceiptHandle"])
        self.assertEqual(self.wanted(), [True, False])
        self.protection.tend_later()
        self.assertEqual(self.wanted(), [True, False])

    def test_it_is_renewed_ahead_of_its_end(self):
        caller = self.protecting()
        url = caller.queue()
        caller("SendMessage", QueueUrl=url, MessageBody="a")
        caller.receive(url, VisibilityTimeout=43200)
        self.assertEqual(self.asked_of_agent[0][1]["ExpiresInMinutes"], 1440)
        for minutes, count in ((719, 1), (2, 2)):
            caller.clock.now += minutes * 60
            self.protection.tend_later()
            self.assertEqual(len(self.asked_of_agent), count, minutes)

    def test_no_message_fails_because_of_the_agent(self):
        blocked = b'{"failure":{"Reason":"DEPLOYMENT_BLOCKED"}}'
        for answer in (awsproxy.Skipped("agent answered 500"), blocked, b"garbage", b"[]"):
            with self.subTest(answer):
                caller = self.protecting(answer, answer)
                url = caller.queue()
                caller("SendMessage", QueueUrl=url, MessageBody="a")
                with self.assertLogs("awsproxy", "WARNING"):
                    self.assertEqual(caller.bodies(url), ["a"])
                    for seconds, count in ((0.5, 1), (1, 2), (1, 2), (1.5, 3)):
                        caller.clock.now += seconds
                        self.protection.tend_later()
                        self.assertEqual(len(self.asked_of_agent), count)
                self.assertEqual(self.wanted(), [True] * 3)

    def test_calls_do_not_queue_up_for_an_agent_that_is_slow(self):
        caller = self.protecting()
        url = caller.queue()
        fill(caller, url)
        (handle,) = handles(caller, url)
        asked = []
        self.protection._run = asked.append
        with self.protection._agent:  # as while the agent has not answered
            caller("DeleteMessage", QueueUrl=url, ReceiptHandle=handle)
            for _ in range(5):
                caller("ListQueues")
        self.assertEqual(asked, [])
        caller("ListQueues")
        self.assertEqual(len(asked), 1)

    def test_outside_ecs_one_line_says_so(self):
        environment = {k: v for k, v in os.environ.items() if k != "ECS_AGENT_URI"}
        program = Program(self.addCleanup, "--task-protection", env=environment)
        caller = program.caller()
        url = caller.queue()
        caller("SendMessage", QueueUrl=url, MessageBody="a")
        self.assertEqual(caller.bodies(url), ["a"])
        self.assertEqual(len(program.warnings), 1)
        self.assertIn("ECS_AGENT_URI", program.warnings[0])

    def agent(self, *answers):
        """Return the URI of a fake agent, and the queue of what it is asked.

        It answers with those, status and body, then as is right; None hangs.
        """
        seen, left = queue.Queue(), list(answers)

        class Agent(http.server.BaseHTTPRequestHandler):
            def do_PUT(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen.put((self.path, json.loads(body)))
                answer = left.pop(0) if left else (200, b'{"protection":{}}')
                if answer is None:
                    self.connection.recv(1)  # until the other side gives up
                    return
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(answer[1])

            def log_message(self, *_):
                pass

        agent = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Agent)
        agent.handle_error = lambda *_: None  # the program may end before it has read all
        self.addCleanup(agent.server_close)
        self.addCleanup(agent.shutdown)
        threading.Thread(target=agent.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{agent.server_address[1]}/api/x", seen

    def program(self, uri, *flags):
        environment = {**os.environ, "ECS_AGENT_URI": uri}
        flags = ("--task-protection", "--quiet", *flags)
        return Program(self.addCleanup, *flags, env=environment)

    def test_a_real_agent_is_asked(self):
        uri, seen = self.agent()
        caller = self.program(uri).caller()
        url = caller.queue()
        caller("SendMessage", QueueUrl=url, MessageBody="a")
        (message,) = caller.receive(url)
        path, body = seen.get(timeout=DEADLINE)
        self.assertEqual(path, "/api/x/task-protection/v1/state")
        self.assertTrue(body["ProtectionEnabled"])
        caller("DeleteMessage", QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        self.assertFalse(seen.get(timeout=DEADLINE)[1]["ProtectionEnabled"])

    def test_an_agent_that_refuses_or_hangs_holds_up_no_message_for_long(self):
        self.assertLess(awsproxy.TaskProtection.PATIENCE, 6)
        hook = write(
            os.path.join(folder(self), "hook.py"),
            "import awsproxy\nawsproxy.TaskProtection.PATIENCE = 0.5\ndef before(call): pass\n",
        )
        limited = b'{"error":{"Code":"ThrottlingException","Message":"Rate exceeded"}}'
        started = []
        for answer in ((429, limited), (400, b'{"error":{"Code":"InvalidParameter"}}'), None):
            with self.subTest(answer):
                uri, seen = self.agent(answer)
                program = self.program(uri, "--hook", hook)
                caller = program.caller()
                url = caller.queue()
                caller("SendMessage", QueueUrl=url, MessageBody="a")
                begin = time.monotonic()
                self.assertEqual(caller.bodies(url), ["a"])
                self.assertLess(time.monotonic() - begin, DEADLINE / 2)
                started.append((answer, seen, program))
        for answer, seen, program in started:
            with self.subTest(answer):
                for _ in range(2):  # the program asks again, after a pause
                    self.assertTrue(seen.get(timeout=DEADLINE)[1]["ProtectionEnabled"])
                self.assertIn("task protection not changed", program.line())

    def test_it_is_asked_before_the_messages_go_out(self):
        caller = self.protecting()
        url = caller.queue()
        fill(caller, url, 3)
        states = []
        handle = caller.proxy.handle

        def noting(request, refused=None):
            reply = handle(request, refused)
            states.append(self.wanted())
            return reply

        caller.proxy.handle = noting
        (first,) = handles(caller, url, VisibilityTimeout=0)
        self.assertEqual(states[-1], [])
        (first,) = handles(caller, url)
        self.assertEqual(states[-1], [True])
        with self.assertRaises(Refused):
            caller("DeleteMessage", QueueUrl=url, ReceiptHandle="x")
        caller.clock.now += 29
        self.protection.tend_later()
        handles(caller, url)
        self.assertEqual(self.wanted(), [True])
        caller("DeleteMessage", QueueUrl=url, ReceiptHandle=first)
        caller.clock.now += 31  # the other one expires, and nobody calls
        self.protection.tend_later()
        self.assertEqual(self.wanted(), [True, False])
        handles(caller, url)
        self.assertEqual(self.wanted(), [True, False, True])
        for minutes in (29, 29, 29):
            caller.clock.now += minutes * 60
            handles(caller, url)
        minutes = [b["ExpiresInMinutes"] for _, b in self.asked_of_agent if len(b) > 1]
        self.assertTrue(all(1 <= m <= 2880 for m in minutes), minutes)

    def test_messages_do_not_go_out_while_protection_is_given_back(self):
        states, begun, go_on = [], threading.Event(), threading.Event()

        def put(url, body, timeout):
            wanted = json.loads(body)["ProtectionEnabled"]
            if not wanted:
                begun.set()
                go_on.wait(DEADLINE)
            states.append(wanted)
            return b'{"protection":{}}'

        caller = self.protecting()
        self.protection._put = put
        run = []

        def begin(act):
            run.append(threading.Thread(target=act))
            run[-1].start()

        self.protection._run = begin
        url = caller.queue()
        fill(caller, url, 2)
        (first,) = handles(caller, url, VisibilityTimeout=30)
        caller("DeleteMessage", QueueUrl=url, ReceiptHandle=first)
        self.assertTrue(begun.wait(DEADLINE))
        timer = threading.Timer(0.2, go_on.set)
        timer.start()
        handles(caller, url, VisibilityTimeout=30)
        seen = list(states)
        for thread in (*run, timer):
            thread.join()
        self.assertEqual(seen[-1:], [True], "handed out unprotected")
        self.assertEqual(states, [True, False, True])

    def test_no_answer_of_the_agent_fails_a_message(self):
        for name, answer in (
            ("nested too deep", b"[" * 200000),
            ("null", b"null"),
            ("a number", b"1"),
            ("no UTF-8", b"\xff\xfe{"),
            ("empty", b""),
            ("failure of another shape", b'{"failure":["x"]}'),
            ("failure without a reason", b'{"failure":{"Arn":"a"}}'),
            ("error", b'{"error":{"Code":"ServerException"},"protection":null}'),
            ("4xx", awsproxy.Skipped("agent answered 400")),
            ("too many", awsproxy.Skipped("agent answered 429")),
        ):
            with self.subTest(name):
                caller = self.protecting(*[answer] * 4)
                url = caller.queue()
                fill(caller, url)
                with self.assertLogs("awsproxy", "WARNING") as logged:
                    (handle,) = handles(caller, url, VisibilityTimeout=40000)
                    asked = []
                    for second in range(40):
                        caller.clock.now += 1
                        before = len(self.asked_of_agent)
                        self.protection.tend_later()
                        asked += [second + 1] * (len(self.asked_of_agent) - before)
                self.assertEqual(asked, [1, 3, 8, 18])  # then it worked
                self.assertEqual(len(logged.output), 4)
                self.assertTrue(all(len(line) < 300 for line in logged.output))
                caller("DeleteMessage", QueueUrl=url, ReceiptHandle=handle)
                self.assertEqual(self.wanted(), [True] * 5 + [False])

    def test_what_could_not_be_given_back_is_given_back_later(self):
        caller = self.protecting(b"{}", awsproxy.Skipped("agent answered 500"))
        url = caller.queue()
        fill(caller, url)
        (handle,) = handles(caller, url)
        with self.assertLogs("awsproxy", "WARNING"):
            caller("DeleteMessage", QueueUrl=url, ReceiptHandle=handle)
        self.protection.tend_later()
        self.assertEqual(self.wanted(), [True, False])
        caller.clock.now += 1.1
        self.protection.tend_later()
        self.protection.tend_later()
        self.assertEqual(self.wanted(), [True, False, False])

    def test_an_agent_that_hangs_holds_up_a_receive_for_its_patience_at_the_most(self):
        def serve(listener, *given):
            with contextlib.suppress(OSError):
                while True:
                    words = (listener.accept()[0], *given)
                    threading.Thread(target=answer, args=words, daemon=True).start()

        def answer(connection, at_once, dripped):
            with contextlib.suppress(OSError), connection:
                connection.sendall(at_once)
                if dripped is None:
                    while connection.recv(65536):
                        pass
                    return
                for byte in dripped + bytes(20 * DEADLINE):
                    time.sleep(0.05)
                    connection.sendall(bytes([byte]))

        head = b"HTTP/1.1 200 OK\r\n"
        for name, at_once, dripped in (
            ("a head that drips", b"", head + b"Content-Length: 2\r\n"),
            ("a body that drips", head + b"\r\n", b"{}"),
            ("silent", b"", None),
        ):
            with self.subTest(name):
                listener = socket.create_server(("127.0.0.1", 0))
                self.addCleanup(listener.close)
                words = (listener, at_once, dripped)
                threading.Thread(target=serve, args=words, daemon=True).start()
                caller = self.protecting()
                self.protection.PATIENCE = 0.4
                self.protection._put = awsproxy._put
                self.protection._url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
                url = caller.queue()
                fill(caller, url)
                begin = time.monotonic()
                with self.assertLogs("awsproxy", "WARNING"):
                    self.assertEqual(caller.bodies(url), ["0"])
                self.assertLess(time.monotonic() - begin, DEADLINE / 2)


LONG_DRAIN = "1000"  # seconds, far longer than any test waits


class DrainTest(unittest.TestCase):
    def get(self, address, path):
        """Return status and body of one of our own paths."""
        connection = http.client.HTTPConnection(*address, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request("GET", f"/_awsproxy/{path}")
            answer = connection.getresponse()
            return answer.status, answer.read()

    def calls(self, program):
        """Return how many calls the program is answering."""
        metrics = self.get(program.address, "metrics")[1].decode()
        return int(re.search("^awsproxy_calls ([0-9]+)$", metrics, re.MULTILINE)[1])

    def poll(self, caller, url, upstream=None):
        """Begin a long poll, and wait until it has arrived at the program, or at its upstream.

        Return its thread, and where its outcome will be.
        """
        outcome = []
        there = upstream or caller.proxy
        before = self.calls(there)

        def run():
            begin = time.monotonic()
            messages = caller.receive(url, WaitTimeSeconds=20)
            outcome.append((messages, time.monotonic() - begin))

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: self.calls(there) > before)
        return thread, outcome

    def begin_to_drain(self, program):
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.get(program.address, "ready")[0] == 503)

    def bodies(self, caller):
        """Return the bodies of the next messages to arrive."""
        bodies = []

        def received():
            bodies.extend(caller.bodies("jobs"))
            return bodies

        wait_until(received)
        return bodies

    def test_messages_in_flight_are_waited_for(self):
        program = Program(self.addCleanup, "--drain-seconds", LONG_DRAIN, "--quiet")
        caller = program.caller()
        url, other = caller.queue(), caller.queue("other")
        caller("SendMessage", QueueUrl=url, MessageBody="a")
        (message,) = caller.receive(url)
        self.assertEqual(self.get(program.address, "ready")[0], 200)
        status, body = self.get(program.address, "in-flight")
        self.assertEqual((status, json.loads(body)), (200, {"000000000000/jobs": 1}))
        thread, outcome = self.poll(program.caller(), other)
        program.process.send_signal(signal.SIGTERM)
        thread.join(DEADLINE)
        ((messages, seconds),) = outcome
        self.assertEqual(messages, [])
        self.assertLess(seconds, SHORTER)
        self.assertEqual(self.get(program.address, "ready")[0], 503)
        self.assertEqual(self.get(program.address, "health")[0], 200)
        caller("SendMessage", QueueUrl=url, MessageBody="b")
        self.assertEqual(caller.bodies(url), [])
        self.assertIsNone(program.process.poll())
        caller("DeleteMessage", QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        self.assertEqual(program.process.wait(DEADLINE), 0)

    def test_it_ends_at_once_where_nothing_is_in_flight_or_asked_again(self):
        for held in (False, True):
            with self.subTest(held=held):
                program = Program(self.addCleanup, "--drain-seconds", LONG_DRAIN, "--quiet")
                caller = program.caller()
                url = caller.queue()
                caller("SendMessage", QueueUrl=url, MessageBody="a")
                if held:
                    caller.receive(url)
                    self.begin_to_drain(program)
                program.process.send_signal(signal.SIGTERM)
                self.assertEqual(program.process.wait(DEADLINE), 0)

    def test_it_does_not_wait_for_ever(self):
        program = Program(self.addCleanup, "--drain-seconds", "0.5", "--quiet")
        caller = program.caller()
        url = caller.queue()
        caller("SendMessage", QueueUrl=url, MessageBody="a")
        caller.receive(url)
        self.assertEqual(program.end()[0], 0)

    def forwarding(self, *flags):
        """Return a Program that forwards to another one, that one, and a client of that one."""
        client = Client("up", "upstreamkey", "upstreamsecret")
        clients = write(os.path.join(folder(self), "clients"), section(*client[:3]))
        upstream = Program(self.addCleanup, "--clients", clients, "--quiet")
        keys = {"AWS_ACCESS_KEY_ID": "upstreamkey", "AWS_SECRET_ACCESS_KEY": "upstreamsecret"}
        there = ("--upstream", f"http://127.0.0.1:{upstream.address[1]}")
        program = Program(self.addCleanup, *there, *flags, "--quiet", env={**os.environ, **keys})
        return program, upstream, client

    def test_forwarded_messages_are_counted_too(self):
        program, _, _ = self.forwarding()

        def counted():
            return json.loads(self.get(program.address, "in-flight")[1])

        for protocol in ("json", "query"):
            with self.subTest(protocol):
                caller = program.caller(protocol)
                url = caller.queue(protocol, VisibilityTimeout="300")
                for body in "abc":
                    caller("SendMessage", QueueUrl=url, MessageBody=body)
                held = [m for _ in range(3) for m in caller.receive(url)]
                self.assertEqual(counted(), {f"000000000000/{protocol}": 3})
                entries = [{"Id": "x", "ReceiptHandle": held[0]["ReceiptHandle"]}]
                caller("DeleteMessageBatch", QueueUrl=url, Entries=entries)
                again = {"ReceiptHandle": held[1]["ReceiptHandle"], "VisibilityTimeout": 0}
                caller("ChangeMessageVisibility", QueueUrl=url, **again)
                self.assertEqual(counted(), {f"000000000000/{protocol}": 1})
                caller("DeleteMessage", QueueUrl=url, ReceiptHandle=held[2]["ReceiptHandle"])
                self.assertEqual(counted(), {})

    def test_forwarded_polls_end_and_lose_no_message(self):
        program, upstream, client = self.forwarding("--drain-seconds", LONG_DRAIN)
        caller = program.caller()
        url = caller.queue()
        caller("ListQueues")  # so that a connection is kept
        thread, outcome = self.poll(program.caller(), url, upstream)
        self.assertEqual(self.calls(program), 1)
        program.process.send_signal(signal.SIGTERM)
        thread.join(DEADLINE)
        ((messages, seconds),) = outcome
        self.assertEqual(messages, [])
        self.assertLess(seconds, SHORTER)
        direct = upstream.caller(client=client)
        direct("SendMessage", QueueUrl="jobs", MessageBody="late")
        self.assertEqual(self.bodies(direct), ["late"])

    def test_our_paths_have_a_listener_of_their_own(self):
        program = Program(self.addCleanup, "--admin", "127.0.0.1:0", "--quiet")
        self.assertEqual(self.get(program.address, "health")[0], 403)
        ((host, port),) = re.findall("^admin on http://(.*):(.*)$", program.warnings[0])
        for path, status in (("health", 200), ("metrics", 200), ("in-flight", 200), ("x", 404)):
            self.assertEqual(self.get((host, int(port)), path)[0], status)
        rows = [("in use", ["--port", "0", "--admin", f"{host}:{port}"])]
        code, _, errors = run_each(rows)["in use"]
        self.assertEqual((code, errors.count("\n")), (2, 1), errors)

    def test_polls_end_whatever_way_they_went(self):
        hook = write(
            os.path.join(folder(self), "hook.py"), "def after(call, reply):\n    return reply\n"
        )
        for name, flags, kept in (
            ("on a kept connection", (), True),
            ("on a connection of its own", (), False),
            ("by way of a hook", ("--hook", hook), True),
        ):
            with self.subTest(name):
                seconds = []
                while min(seconds, default=math.inf) >= 1.2 and len(seconds) < 5:
                    seconds.append(self.seconds_until_a_poll_ends(kept, *flags))
                self.assertLess(min(seconds), 1.2)

    def seconds_until_a_poll_ends(self, kept, *flags):
        """Drain while a forwarded poll waits; check that no message is lost."""
        program, upstream, client = self.forwarding("--drain-seconds", LONG_DRAIN, *flags)
        direct = upstream.caller(client=client)
        url = program.caller().queue()
        if not kept:  # its only kept connection is in use
            other, _ = self.poll(program.caller(), program.caller().queue("other"), upstream)
        thread, outcome = self.poll(program.caller(), url, upstream)
        began = time.monotonic()
        program.process.send_signal(signal.SIGTERM)
        thread.join(DEADLINE)
        ended = time.monotonic() - began
        direct("SendMessage", QueueUrl="jobs", MessageBody="late")
        bodies = self.bodies(direct)
        if not kept:
            other.join(DEADLINE)
        program.stop()
        self.assertEqual(([received for received, _ in outcome], bodies), ([[]], ["late"]))
        return ended

    def test_a_long_message_is_put_back_too(self):
        program, upstream, client = self.forwarding("--drain-seconds", LONG_DRAIN)
        direct = upstream.caller(client=client)
        caller = program.caller()
        url = caller.queue()
        thread, outcome = self.poll(program.caller(), url, upstream)
        program.process.send_signal(signal.SIGTERM)
        thread.join(DEADLINE)
        self.assertEqual(outcome[0][0], [])
        direct("SendMessage", QueueUrl="jobs", MessageBody="m" * 200000)
        self.assertEqual([len(body) for body in self.bodies(direct)], [200000])

    def test_it_does_not_hand_out_what_arrives_and_may_not_be_received(self):
        program = Program(
            self.addCleanup, "--drain-seconds", LONG_DRAIN, "--quiet",
            "--route", "sqs:ReceiveMessageX=deny", "--route", "sqs:*=embedded",
        )  # fmt: skip
        caller = program.caller()
        url = caller.queue()
        fill(caller, url, 2)
        (held,) = handles(caller, url)
        self.begin_to_drain(program)
        for path, expected in (
            ("ready", (503, b"draining\n")),
            ("health", (200, b"ok\n")),
            ("in-flight", (200, b'{"000000000000/jobs": 1}')),
        ):
            self.assertEqual(own_path(program.address, f"/_awsproxy/{path}"), expected)
        for protocol in ("json", "query"):
            receive = functools.partial(program.caller(protocol).receive, url, WaitTimeSeconds=20)
            self.assertEqual(receive(), [])
            self.assertLess(fewest_seconds(receive, 0.5), 0.5)
        with self.assertRaises(Refused):
            program.caller(client=DEMO._replace(secret_access_key="wrong")).receive(url)
        given = {"QueueUrl": url, "ReceiptHandle": held, "VisibilityTimeout": 0}
        caller("ChangeMessageVisibility", **given)
        self.assertEqual(program.process.wait(DEADLINE), 0)

    def test_a_denied_receive_stays_denied(self):
        routes = [awsproxy.Route("*", awsproxy.Deny())]
        proxy = Proxy(awsproxy.DEMO_CLIENTS, routes=routes, clock=Clock())
        proxy.draining = True
        request = signed(
            headers=[("X-Amz-Target", "AmazonSQS.ReceiveMessage")], body=b'{"QueueUrl":"jobs"}'
        )
        self.assertEqual(proxy.handle(request).status, 403)


class AdminTest(unittest.TestCase):
    def test_it_tells_our_paths_and_no_others(self):
        status = awsproxy.Status(awsproxy.Metrics(), awsproxy.InFlight(None, None))
        running = Running(awsproxy.Admin(status))
        self.addCleanup(running.stop)
        for method, path, expected in (
            ("GET", "/_awsproxy/health", 200),
            ("HEAD", "/_awsproxy/health", 200),
            ("GET", "/_awsproxy/ready?x=1", 200),
            ("GET", "/_awsproxy/in-flight", 200),
            ("GET", "/_awsproxy/", 404),
            ("GET", "/_awsproxy", 404),
            ("GET", "/", 404),
            ("GET", "/health", 404),
            ("GET", "/x/_awsproxy/health", 404),
            ("GET", "/?Action=ListQueues", 404),
            ("POST", "/", 405),
            ("POST", "/_awsproxy/health", 405),
        ):
            with self.subTest(f"{method} {path}"):
                self.assertEqual(own_path(running.address, path, method)[0], expected)
        status.draining = True
        self.assertEqual(own_path(running.address, "/_awsproxy/ready")[0], 503)
        self.assertEqual(own_path(running.address, "/_awsproxy/health")[0], 200)
        wire, answer = running.ask(raw_post(b"Content-Length: 5") + b"hello")
        self.assertIn(answer.status, (405, 413))
        self.assertTrue(wire.ended())

    def test_wrong_values_end_it_with_code_2(self):
        values = "", ":1", "x", "x:", "x:y", "127.0.0.1:65536", "127.0.0.1:-1", "[::1]", "1"
        ended = run_each((value, ["--port", "0", f"--admin={value}"]) for value in values)
        for value in values:
            with self.subTest(value):
                code, _, errors = ended[value]
                self.assertEqual(code, 2)
                self.assertNotIn("Traceback", errors)


# ==== 9. The server ====


class Running:
    """A Server in a thread, on a port of its own, and the connections to it."""

    def __init__(self, proxy, address=("127.0.0.1", 0), **settings):
        self.server = Server(address, proxy, **settings)
        self.address = self.server.server_address[:2]
        self.wires = []
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self):
        for wire in self.wires:
            wire.close()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(DEADLINE)

    def connect(self):
        self.wires.append(Wire(self.address))
        return self.wires[-1]

    def ask(self, data, piece=0, head_only=False):
        """Send bytes on a connection of their own; return the connection and the answer."""
        wire = self.connect()
        wire.send(data, piece)
        return wire, wire.answer(head_only)


class Wire:
    """A client's connection: raw bytes out, answers in, and no wait longer than seconds."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, timeout=DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rb")

    def send(self, data, piece=0):
        """Send all, or in pieces; a server that has heard enough may have closed by then."""
        piece = piece or max(len(data), 1)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for start in range(0, len(data), piece):
                self.socket.sendall(data[start : start + piece])

    def done(self):
        """Say that nothing more will be sent."""
        self.socket.shutdown(socket.SHUT_WR)

    def answer(self, head_only=False):
        """Return the next answer, None at the end; check what every answer must have."""
        try:
            answer = read_answer(self.stream, head_only)
        except OSError as error:
            raise AssertionError(f"instead of an answer: {error!r}") from error
        if answer and answer.status >= 200:
            (date,), (request_id,) = answer.headers["date"], answer.headers["x-amzn-requestid"]
            sent = email.utils.parsedate_to_datetime(date).timestamp()
            assert date.endswith(" GMT") and abs(sent - time.time()) < DEADLINE, date
            assert request_id
        return answer

    def ended(self):
        """Tell whether the server has closed the connection, without another byte."""
        try:
            return self.stream.read(1) == b""
        except ConnectionResetError:
            return True
        except OSError:
            return False

    def close(self, reset=False):
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.stream.close()
        self.socket.close()


class Echo(Proxy):
    """Sends each body back, and keeps the requests.

    A path such as `/204` is the status wanted; `/unread` leaves the body alone.
    """

    def __init__(self):
        super().__init__(awsproxy.DEMO_CLIENTS, max_body=5000000)
        self.requests = []
        self.headers = ()

    def begin(self, requests):
        return list(map(self.handle, requests))

    def handle(self, request, refused=None):
        if refused:
            return super().handle(request, refused)
        self.requests.append(request)
        try:
            body = b"" if request.path == "/unread" else request.body.read()
        except ServiceError as error:
            return super().handle(request, error)
        status = int(request.path[1:]) if request.path[1:].isdigit() else 200
        headers = (("x-amzn-RequestId", str(len(self.requests))), *self.headers)
        return Reply(status, headers, body)


def by_length(body, target=b"/"):
    return raw_post(b"Content-Length: %d" % len(body), target=target) + body


def in_chunks(body, size):
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def by_chunks(body, size=5, target=b"/"):
    return raw_post(b"Transfer-Encoding: chunked", target=target) + in_chunks(body, size)


SECOND = by_length(b"second", b"/second")


class SocketTest(unittest.TestCase):
    """What the tests on sockets share: `running`, and what a refusal is."""

    def assert_refused(self, status, root, data, piece=0, head_only=False):
        """Expect one answer, a refusal of that form (any if None), and the connection closed."""
        wire, answer = self.running.ask(data, piece, head_only)
        self.assertIsNotNone(answer, "closed without an answer")
        self.assertEqual(answer.status, status, answer.body)
        self.assertTrue(answer.closes, "no Connection: close")
        self.assertTrue(wire.ended(), "not closed, or more than one answer")
        wire.close()
        if not head_only:
            self.assertIn(answer.refusal[0], (root or answer.refusal[0],))


class StreamTest(SocketTest):
    """Where a request ends and the next begins, judged by a proxy that repeats the bodies."""

    @classmethod
    def setUpClass(cls):
        cls.proxy = Echo()
        cls.running = Running(cls.proxy)
        cls.addClassCleanup(cls.running.stop)

    def test_a_request_reaches_the_proxy_as_it_was_sent(self):
        head = (
            b"PUT //a//b/../c%2f?x=%2F&y=a+b&\xe4 HTTP/1.1\r\nHOST: a:1\r\nx-b: 2\r\n"
            b"X-A: \xc3\xa4\r\nx-B:1 \t 3 \r\nContent-Length: 4\r\n\r\n"
        )
        headers = (("HOST", "a:1"), ("x-b", "2"), ("X-A", "\xc3\xa4"), ("x-B", "1 \t 3"))
        for piece in (0, 1):
            with self.subTest(piece=piece):
                _, answer = self.running.ask(head + b"\0\r\n\xff", piece)
                self.assertEqual(answer.body, b"\0\r\n\xff")
                got = self.proxy.requests[-1]
                self.assertEqual(got.target, "//a//b/../c%2f?x=%2F&y=a+b&\xe4")
                self.assertEqual(tuple(got.headers), (*headers, ("Content-Length", "4")))
                self.assertEqual((got.method, got.peer), ("PUT", "127.0.0.1"))

    def test_requests_are_told_apart_however_they_arrive(self):
        bodies = [b"one", b"two: 0\r\n\r\n", b"", b"three", SECOND, b"4" * 300]
        stream = (
            by_length(bodies[0])
            + by_chunks(bodies[1])
            + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
            + by_chunks(bodies[3])
            + by_length(bodies[4])
            + by_chunks(bodies[5], 7)
        )
        for piece, times in ((0, 1), (0, 50), (1, 1), (2, 1), (3, 1), (17, 5), (100, 5)):
            with self.subTest(piece=piece, times=times):
                wire = self.running.connect()
                wire.send(stream * times, piece)
                answers = [wire.answer() for _ in bodies * times]
                self.assertEqual([answer.body for answer in answers], bodies * times)
                self.assertEqual({(a.status, a.closes) for a in answers}, {(200, False)})
                wire.done()
                self.assertTrue(wire.ended())

    def test_a_stream_may_be_cut_anywhere(self):
        # The empty line is what old clients send behind a body (RFC 9112, 2.2).
        stream = by_length(b"one") + b"\r\n\r\n" + by_chunks(b"three", 3)
        for length in range(1, len(stream)):
            with self.subTest(upto=stream[:length][-12:]):
                wire = self.running.connect()
                wire.send(stream[:length])
                time.sleep(0.002)
                wire.send(stream[length:])
                self.assertEqual(wire.answer().body, b"one")
                answer = wire.answer()
                self.assertEqual((answer.status, answer.body), (200, b"three"))
                wire.close()

    def test_a_connection_is_kept_from_call_to_call(self):
        wire = self.running.connect()
        for index in range(20):
            body = b"%d" % index
            wire.send(by_chunks(body) if index % 2 else by_length(body))
            self.assertEqual(wire.answer().body, body)

    def test_chunks_arrive_decoded(self):
        head = raw_post(b"Transfer-Encoding: chunked")
        for name, coded, expected in CHUNKED:
            for piece in (0, 1):
                with self.subTest(name, piece=piece):
                    wire, answer = self.running.ask(head + coded + SECOND, piece)
                    self.assertEqual((answer.status, answer.body), (200, expected))
                    self.assertEqual(wire.answer().body, b"second")

    def test_broken_requests_are_refused_and_what_follows_is_not_read(self):
        head = raw_post(b"Transfer-Encoding: chunked")
        cases = [
            *((name, raw, b"") for name, raw in BROKEN_HEADS + BROKEN_ENDS),
            *((name, raw, b"2\r\n{}\r\n0\r\n\r\n") for name, raw in BROKEN_POSTS),
            *((name, head + coded, b"\r\n\r\n") for name, coded in BROKEN_CHUNKS),
        ]
        for name, raw, end in cases:
            with self.subTest(name):
                self.assert_refused(400, None, raw + end + SECOND)
            with self.subTest(name, sent="a byte at a time"):
                self.assert_refused(400, None, raw + (end if raw.startswith(head) else b""), 1)

    def test_too_large_heads_are_refused_and_what_follows_is_not_read(self):
        target = b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"
        for piece in (0, 1000):
            for name, raw in (
                ("64 KiB", head_of(65536, 65536)),
                ("64 KiB in lines", head_of(65536, 1000)),
                ("a hundred headers", head_with(100)),
            ):
                with self.subTest(name, piece=piece):
                    wire, answer = self.running.ask(raw + SECOND, piece)
                    self.assertEqual(answer.status, 200)
                    self.assertEqual(wire.answer().body, b"second")
            for name, raw in (
                ("one byte more", head_of(65537, 65537)),
                ("one byte more in lines", head_of(65537, 1000)),
                ("much more", head_of(200000, 200000)),
                ("much more in lines", head_of(200000, 4000)),
                ("the target alone", target),
                ("no end in sight", target[:70000]),
                ("a hundred headers and one", head_with(101)),
            ):
                with self.subTest(name, piece=piece):
                    end = b"" if name == "no end in sight" else SECOND
                    self.assert_refused(431, None, raw + end, piece)

    def test_a_large_body_comes_and_goes_whole(self):
        body = b"0123456789abcdef\r\n\r\n" * 150000
        for name, data in (("by length", by_length(body)), ("chunked", by_chunks(body, 65536))):
            with self.subTest(name):
                wire = self.running.connect()
                wire.send(data + SECOND)
                self.assertTrue(wire.answer().body == body)
                self.assertEqual(wire.answer().body, b"second")

    def test_a_body_that_nobody_reads_is_never_taken_for_a_request(self):
        for name, data in (
            ("by length", by_length(SECOND.ljust(200000), b"/unread")),
            ("chunked", by_chunks(SECOND, 1000, b"/unread")),
            ("chunked, its end missing", by_chunks(SECOND, 1000, b"/unread")[:-5]),
            ("by length, and one behind", by_length(b"{}".ljust(200000), b"/unread") + SECOND),
            ("chunked, and one behind", by_chunks(b"{}", 9, b"/unread") + SECOND),
        ):
            with self.subTest(name):
                wire, answer = self.running.ask(data)
                self.assertEqual((answer.status, answer.closes), (200, True))
                self.assertTrue(wire.ended())

    def test_an_answer_is_not_lost_for_a_body_that_nobody_reads(self):
        """A reset could overtake the answer (RFC 9112, 9.6); sendall would raise it."""
        for status, size, target in ((200, 4000000, b"/unread"), (413, 5000001, b"/")):
            for data in (by_length(b"a" * size, target), by_chunks(b"a" * size, 65536, target)):
                with self.subTest(status=status, head=data[:60]):
                    wire = self.running.connect()
                    wire.socket.sendall(data)
                    self.assertEqual(wire.answer().status, status)
                    self.assertTrue(wire.ended())

    def test_an_answer_without_a_body_does_not_disturb_the_next(self):
        for method, status in ((b"HEAD", 200), (b"HEAD", 404), (b"GET", 204), (b"GET", 304)):
            with self.subTest(method, status=status):
                data = by_length(b"{}", b"/%d" % status).replace(b"POST", method)
                wire, answer = self.running.ask(data + SECOND, head_only=method == b"HEAD")
                self.assertEqual((answer.status, answer.body), (status, b""))
                self.assertEqual(wire.answer().body, b"second")

    def test_a_refused_head_request_has_no_body(self):
        for status, lines in (
            (413, b"Host: a\r\nContent-Length: 9999999"),
            (417, b"Host: a\r\nExpect: more"),
            (417, b"Host: a\r\nExpect: more\r\nTransfer-Encoding: chunked"),
            (417, b"Host: a\r\nExpect: more\r\nContent-Length: 200000"),
            (400, b"Host: a\r\nContent-Length: x"),
            (400, b"X: 1"),
        ):
            with self.subTest(status=status, lines=lines):
                head = b"HEAD / HTTP/1.1\r\n%b\r\n\r\n" % lines
                self.assert_refused(status, None, head, head_only=True)

    def test_a_connection_ends_when_either_side_wants_it(self):
        cases = [
            ("nothing said", b"1.1", b"X: 1", False),
            ("keep-alive", b"1.1", b"Connection: keep-alive", False),
            ("something else", b"1.1", b"Connection: TE, X-Amz-Date", False),
            ("close", b"1.1", b"Connection: close", True),
            ("close in odd case", b"1.1", b"cONNECTION:cLOSE", True),
            ("close in a list", b"1.1", b"Connection: keep-alive ,CLOSE,TE", True),
            ("close at the end of a list", b"1.1", b"Connection: TE, close", True),
            ("close in another line", b"1.1", b"Connection: TE\r\nConnection: close", True),
            ("HTTP/1.0", b"1.0", b"X: 1", True),
            ("HTTP/1.0, keep-alive", b"1.0", b"Connection: keep-alive", True),
        ]
        for name, version, lines, closes in cases:
            with self.subTest(name):
                data = raw_post(b"Content-Length: 2\r\n" + lines, version) + b"{}"
                wire, answer = self.running.ask(data + SECOND)
                self.assertEqual((answer.status, answer.body), (200, b"{}"))
                self.assertEqual(answer.closes, closes)
                if closes:
                    self.assertTrue(wire.ended())
                else:
                    self.assertEqual(wire.answer().body, b"second")

    def test_who_has_finished_sending_is_answered(self):
        for name, data in (("by length", by_length(b"{}")), ("chunked", by_chunks(b"{}"))):
            for times in (1, 3):
                with self.subTest(name, times=times):
                    wire = self.running.connect()
                    wire.send(data * times)
                    wire.done()
                    answers = [wire.answer() for _ in range(times)]
                    self.assertEqual([answer.body for answer in answers], [b"{}"] * times)
                    self.assertTrue(wire.ended())

    def test_a_request_that_stops_early_is_never_answered_as_a_whole(self):
        for name, data in (
            ("a head", b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: abcdefghijkl\r\n\r\n"),
            ("a body", by_length(b"0123456789")),
            ("a chunked body", by_chunks(b"0123456789")),
        ):
            for length in range(1, len(data)):
                with self.subTest(name, upto=data[:length][-12:]):
                    wire = self.running.connect()
                    wire.send(data[:length])
                    wire.done()
                    answer = wire.answer()
                    if answer:
                        self.assertEqual((answer.status, answer.closes), (400, True))
                        self.assertTrue(answer.refusal)
                        self.assertTrue(wire.ended())
                    wire.close()

    def test_who_goes_away_harms_nobody(self):
        stalled = self.running.connect()
        stalled.send(by_length(b"0123456789")[:-3])
        silent = self.running.connect()
        large = by_length(b"a" * 4000000)
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            for data in (
                b"",
                b"GET / HT",
                b"GET / HTTP/1.1\r\nHost: a\r\n",
                by_length(b"{}")[:-1],
                by_chunks(b"0123456789")[:-12],
                by_chunks(b"0123456789")[:-2],
                by_length(b"{}"),
                large[:100000],
                large,
                BROKEN_HEADS[0][1],
            ):
                for reset in (False, True):
                    wire = self.running.connect()
                    wire.send(data)
                    wire.close(reset)
                    self.assertEqual(self.running.ask(SECOND)[1].body, b"second")
        self.assertEqual(errors.getvalue(), "")
        stalled.send(b"789")
        self.assertEqual(stalled.answer().body, b"0123456789")
        silent.send(SECOND)
        self.assertEqual(silent.answer().body, b"second")

    def test_a_small_answer_arrives_at_once(self):
        wire = self.running.connect()
        for data in (by_length(b"{}"), by_chunks(b"0123456789"), by_length(b"a" * 5000)) * 10:
            wire.send(data)
            stream = io.BytesIO(wire.socket.recv(65536))
            self.assertEqual(read_answer(stream).status, 200)
            self.assertEqual(stream.read(), b"")

    def test_an_answer_does_not_wait_for_an_acknowledgement(self):
        wire, _ = self.running.ask(SECOND)
        ends = (self.running.address, wire.socket.getsockname())
        delays = []
        for thing in gc.get_objects():
            if issubclass(type(thing), socket.socket) and thing.fileno() >= 0:
                with contextlib.suppress(OSError):  # a listening socket has no peer
                    if (thing.getsockname(), thing.getpeername()) == ends:
                        delays.append(not thing.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        self.assertEqual(delays, [False])

    def test_an_answer_cannot_be_split_by_a_header(self):
        self.addCleanup(setattr, self.proxy, "headers", ())
        for text in ("a\r\nInjected: 1", "a\nInjected: 1", "a\rInjected: 1", "a\0Injected: 1"):
            for header in (("X", text), (text, "1")):
                self.proxy.headers = (header,)
                received = b""
                with self.subTest(header), contextlib.redirect_stderr(io.StringIO()):
                    wire = self.running.connect()
                    wire.send(SECOND)
                    with contextlib.suppress(ConnectionResetError):
                        wire.done()
                        received = wire.stream.read()
                    self.assertNotIn(b"Injected", received)
                    self.assertNotIn(b"HTTP/1.1 200", received)
        self.proxy.headers = ()
        self.assertEqual(self.running.ask(SECOND)[1].body, b"second")


def raw_request(method, target, headers, body=b""):
    """Return the bytes of a request; Host is added where it is not among the headers."""
    headers = headers if has(headers, "host") else (("Host", HOST), *headers)
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


OF_JSON = (
    ("X-Amz-Target", "AmazonSQS.ListQueues"),
    ("Content-Type", "application/x-amz-json-1.0"),
)
OF_QUERY = (("Content-Type", "application/x-www-form-urlencoded; charset=utf-8"),)
LIST_QUEUES = b"Action=ListQueues&Version=2012-11-05"


def raw_call(kind=OF_JSON, body=b"{}", extra=(), *, chunked=False, **how):
    """Return the bytes of a signed ListQueues, or of what the body of a form says."""
    headers = sign(headers=(*kind, *extra), body=body, **how)
    if chunked:
        headers += (("Transfer-Encoding", "chunked"),)
        return raw_request("POST", "/", headers, in_chunks(body, len(body)))
    return raw_request("POST", "/", (*headers, ("Content-Length", len(body))), body)


OTHER_SECRET = DEMO._replace(secret_access_key="other")
EXPECT = ("Expect", "100-continue")


class ServerTest(SocketTest):
    """Calls of Amazon SQS over a socket."""

    @classmethod
    def setUpClass(cls):
        proxy = Proxy(awsproxy.DEMO_CLIENTS, clock=lambda: EXAMPLE_TIME, max_body=1000)
        cls.running = Running(proxy)
        cls.addClassCleanup(cls.running.stop)

    def test_calls_are_answered_in_their_order_and_protocol(self):
        create = b"Action=CreateQueue&Version=2012-11-05&QueueName=made-%d"
        for piece in (0, 1, 50):
            names = [f"made-{piece}", f"made-{piece + 1000}"]
            stream = [
                raw_call(OF_QUERY, create % piece),
                raw_call(OF_QUERY, create % (piece + 1000), chunked=True),
                raw_call(),
                raw_request("GET", presign(target=f"/?{LIST_QUEUES.decode()}"), ()),
                raw_call(body=b'{"MaxResults": 5000}'),
                raw_call(client=OTHER_SECRET, body=raw_call()),
                raw_call(client=OTHER_SECRET, body=raw_call(), chunked=True),
                raw_call(chunked=True),
            ]
            with self.subTest(piece=piece):
                wire = self.running.connect()
                wire.send(b"".join(stream), piece)
                answers = [wire.answer() for _ in stream]
                statuses = [answer.status for answer in answers]
                self.assertEqual(statuses, [200, 200, 200, 200, 400, 403, 403, 200])
                self.assertEqual({answer.closes for answer in answers}, {False})
                for name, answer in zip(names, answers):
                    self.assertIn(f"/{name}</QueueUrl>".encode(), answer.body)
                self.assertTrue(answers[3].body.endswith(b"</ListQueuesResponse>"))
                self.assertEqual(answers[6].refusal, ("json", "InvalidSignatureException"))
                for answer in (answers[2], answers[7]):
                    urls = json.loads(answer.body)["QueueUrls"]
                    self.assertLessEqual(set(names), {url.rpartition("/")[2] for url in urls})
                ids = {answer.headers["x-amzn-requestid"][0] for answer in answers}
                self.assertEqual(len(ids), len(stream))

    def test_a_head_request_is_answered_without_a_body(self):
        signed_target = presign("HEAD", f"/?{LIST_QUEUES.decode()}")
        for target, status in ((signed_target, 200), ("/", 403)):
            with self.subTest(status=status):
                data = raw_request("HEAD", target, ()) + raw_call()
                wire, answer = self.running.ask(data, head_only=True)
                self.assertEqual(answer.status, status)
                self.assertEqual(wire.answer().status, 200)

    def test_a_refusal_speaks_the_protocol_of_its_head(self):
        heads = [
            ("json", sign(headers=OF_JSON, body=b"{}")),
            ("json", (("Host", HOST), *OF_JSON)),
            ("ErrorResponse", sign(headers=OF_QUERY, body=LIST_QUEUES)),
        ]
        faults = [
            (400, "X", "1\nY: 2"),
            (400, "", "1"),
            (400, "Host", "b"),
            (400, "Content-Length", "x"),
            (400, "Transfer-Encoding", "chunked\r\nContent-Length: 2"),
            (413, "Content-Length", "1001"),
            (417, "Expect", "more"),
            (431, "X", "\r\nX: ".join("1" * 100)),
            (431, "X", "a" * 70000),
        ]
        for root, headers in heads:
            for status, *header in faults:
                with self.subTest(root, signed=len(headers) > 2, fault=header[0] + header[1][:9]):
                    data = raw_request("POST", "/", (*headers, header))
                    self.assert_refused(status, root, data + raw_call())

    def test_the_refusal_of_a_body_speaks_the_protocol_of_the_request_line(self):
        for name, root, method, target, headers in (
            ("an unsigned form", "ErrorResponse", "POST", "/", OF_QUERY),
            ("an Action", "ErrorResponse", "GET", "/?Action=ListQueues", ()),
            ("an Action in JSON", "json", "POST", "/?Action=ListQueues", OF_JSON[1:]),
            ("a presigned URL", "ErrorResponse", "GET", presign(target="/1/jobs"), ()),
            ("a path", "Error", "GET", "/bucket/key", ()),
        ):
            with self.subTest(name):
                data = raw_request(method, target, (*headers, ("Content-Length", "1001")))
                self.assert_refused(413, root, data)

    def test_the_body_has_a_limit(self):
        for root, kind, largest in (
            ("json", OF_JSON, b"{}".ljust(1000)),
            ("ErrorResponse", OF_QUERY, (LIST_QUEUES + b"&QueueNamePrefix=").ljust(1000, b"a")),
        ):
            for chunked in (False, True):
                with self.subTest(root, chunked=chunked):
                    _, answer = self.running.ask(raw_call(kind, largest, chunked=chunked))
                    self.assertEqual((answer.status, answer.closes), (200, False))
                    for more in (b"a", b"a" * 4000000):
                        data = raw_call(kind, largest + more, chunked=chunked)
                        self.assert_refused(413, root, data + raw_call())

    def test_a_body_is_asked_for_when_the_head_gives_no_reason_to_refuse(self):
        wire = self.running.connect()
        for chunked in (False, True, False):
            with self.subTest(chunked=chunked):
                head, end, body = raw_call(extra=[EXPECT], chunked=chunked).partition(b"\r\n\r\n")
                wire.send(head + end)
                answer = wire.answer()
                self.assertEqual((answer.status, answer.headers), (100, {}))
                wire.send(body, 1)
                answer = wire.answer()
                self.assertEqual((answer.status, answer.closes), (200, False))

    def test_who_does_not_wait_to_be_asked_is_answered_all_the_same(self):
        wire = self.running.connect()
        wire.send(raw_call(extra=[("Expect", "100-Continue")]) * 2 + raw_call())
        finals = []
        while len(finals) < 3:
            answer = wire.answer()
            finals += [answer.status] * (answer.status != 100)
        self.assertEqual(finals, [200, 200, 200])

    def test_a_body_is_not_asked_for_when_the_head_is_reason_to_refuse(self):
        def call(*extra, **how):
            return raw_call(extra=(*extra, EXPECT), **how)

        declared = ("X-Amz-Content-Sha256", sha256(b"{}"))
        cases = [
            ("no signature", 403, call().replace(b"Authorization: AWS4-HMAC-SHA256 ", b"X-Was: ")),
            ("an unknown key", 403, call(client=EXAMPLE)),
            ("an unknown token", 403, call(client=DEMO._replace(session_token="other"))),
            ("a date long past", 403, call(at=EXAMPLE_TIME - 3600)),
            ("a date to come", 403, call(at=EXAMPLE_TIME + 3600)),
            ("a broken date", 400, call(date="20150830T999999Z")),
            ("another service", 403, call(service="sns")),
            ("a header not signed", 403, call(unsigned=("X-Amz-Target",))),
            ("Host not signed", 403, call(unsigned=("Host",))),
            ("a broken signature", 400, call().replace(b", Signature=", b", Signature=0")),
            ("a declared body, another secret", 403, call(declared, client=OTHER_SECRET)),
            ("too large a body", 413, call().replace(b"Length: 2", b"Length: 1001")),
            ("a body without an end", 400, call().replace(b"Length: 2", b"Length: +2")),
            ("length and coding", 400, call(("Transfer-Encoding", "chunked"))),
            ("no Host", 400, call().replace(b"Host: ", b"X-Host: ")),
            ("another Expect", 417, call().replace(b": 100-continue", b": 101-continue")),
            ("another Expect in a list", 417, call().replace(b"100-", b"more, 100-")),
            ("another Expect in a line before", 417, call(("Expect", "more"))),
            ("another Expect in a line behind", 417, call(EXPECT).replace(b"ue\r\nX-", b"\r\nX-")),
        ]
        for name, status, data in cases:
            with self.subTest(name):
                wire, answer = self.running.ask(data.partition(b"{}")[0])
                self.assertEqual((answer.status, answer.closes), (status, True))
                self.assertEqual(answer.refusal[0], "json")
                wire.send(raw_call())
                self.assertTrue(wire.ended())

    def test_http_1_0_is_never_told_to_continue(self):
        data = raw_call(extra=[EXPECT]).replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\n", 1)
        _, answer = self.running.ask(data)
        self.assertEqual((answer.status, answer.closes), (200, True))

    def test_a_body_that_breaks_after_it_was_asked_for_is_refused(self):
        head, end, _ = raw_call(extra=[EXPECT], chunked=True).partition(b"\r\n\r\n")
        for body, status in ((b"+2\r\n{}\r\n0\r\n\r\n", 400), (b"fffff\r\n", 413)):
            with self.subTest(body):
                wire, answer = self.running.ask(head + end)
                self.assertEqual(answer.status, 100)
                wire.send(body + raw_call())
                answer = wire.answer()
                self.assertEqual((answer.status, answer.closes), (status, True))
                self.assertEqual(answer.refusal[0], "json")
                self.assertTrue(wire.ended())

    def test_a_call_inside_the_body_of_a_refused_one_is_not_answered(self):
        for name, how in (
            ("an unknown key", {"client": EXAMPLE}),
            ("a date long past", {"at": EXAMPLE_TIME - 3600}),
            ("another service", {"service": "sns"}),
        ):
            for chunked in (False, True):
                with self.subTest(name, chunked=chunked):
                    data = raw_call(body=raw_call(), chunked=chunked, **how)
                    wire, answer = self.running.ask(data)
                    self.assertEqual(answer.status, 403)
                    wire.socket.shutdown(socket.SHUT_WR)
                    self.assertTrue(wire.ended(), "there is more than one answer")


class ServerSettingsTest(unittest.TestCase):
    def start(self, *given, **settings):
        running = Running(Echo(), *given, **settings)
        self.addCleanup(running.stop)
        return running

    def test_an_idle_connection_is_closed_and_a_busy_one_is_not(self):
        running = self.start(timeout=0.8)
        begun = [
            ("nothing", b""),
            ("half a request line", b"GET / HT"),
            ("half a head", b"GET / HTTP/1.1\r\nHost: a\r\n"),
            ("half a body", by_length(b"0123456789")[:-3]),
            ("half a chunk", by_chunks(b"0123456789")[:-12]),
            ("a chunked body without its end", by_chunks(b"0123456789")[:-2]),
        ]
        idle = [(name, running.connect(), data) for name, data in begun]
        for _, wire, data in idle:
            wire.send(data)
        idle.append(("a call answered", running.ask(SECOND)[0], b""))
        busy = running.connect()
        for _ in range(6):
            busy.send(SECOND)
            self.assertEqual(busy.answer().body, b"second")
            time.sleep(0.2)
        for name, wire, _ in idle:
            with self.subTest(name):
                answer = wire.answer()
                if answer:
                    self.assertIn(answer.status, (400, 408))
                    self.assertTrue(answer.closes and answer.refusal)
                self.assertTrue(wire.ended())

    def test_work_is_done_between_calls(self):
        done = threading.Event()
        self.start(every_half_second=done.set)
        self.assertTrue(done.wait(DEADLINE))

    def test_it_listens_on_ipv6(self):
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError as error:
            self.skipTest(f"no IPv6 here: {error}")
        _, answer = self.start(("::1", 0)).ask(SECOND)
        self.assertEqual(answer.body, b"second")


def half(data):
    """Return a request's bytes in two parts, the second beginning within the body."""
    return data[:-20], data[-20:]


class CrowdTest(SocketTest):
    """What many clients at once, slow, deaf or gone, must not bring about."""

    def start(self, proxy=None, **settings):
        running = Running(proxy or Echo(), **settings)
        self.addCleanup(running.stop)
        return running

    def test_slow_clients_hold_up_nobody_and_are_answered_in_the_end(self):
        running = self.start()
        body = b"0123456789" * 5
        kinds = [
            (200, half(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"), b""),
            (50, half(by_length(body)), body),
            (25, half(by_length(body * 3000)), body * 3000),
            (25, half(by_chunks(body, 50)), body),
        ]
        slow = []
        for count, (begun, rest), expected in kinds:
            for _ in range(count):
                slow.append((running.connect(), rest, expected))
                slow[-1][0].send(begun)
        good = [running.connect() for _ in range(4)]
        began = time.monotonic()
        for step in range(15):
            for wire, rest, _ in slow:
                wire.send(rest[step : step + 1])
            for wire in good:
                wire.send(SECOND)
                self.assertEqual(wire.answer().body, b"second")
        self.assertLess(time.monotonic() - began, DEADLINE / 2)
        for wire, rest, expected in slow:
            wire.send(rest[15:])
            self.assertTrue(wire.answer().body == expected)

    def test_who_sends_too_slowly_is_given_up(self):
        """However regular the bytes are: a request has the timeout, or a rate to keep to."""
        running = self.start(timeout=0.3)
        large = raw_post(b"Content-Length: 200000")
        slow = [
            ("a head", raw_post(b"X-Slow: a")[:-4], None),
            ("a body", raw_post(b"Content-Length: 1000"), None),
            ("a large body", large, "RequestTimeout"),
            ("a chunk", raw_post(b"Transfer-Encoding: chunked") + b"ff\r\n", "RequestTimeout"),
            ("the size of a chunk", raw_post(b"Transfer-Encoding: chunked"), "RequestTimeout"),
        ]
        wires = [running.connect() for _ in slow]
        for wire, (_, begun, _) in zip(wires, slow):
            wire.send(begun)
        kept, until = set(wires), time.monotonic() + DEADLINE
        while kept and time.monotonic() < until:
            for wire in kept:
                wire.send(b"1")
            time.sleep(0.05)
            kept = {wire for wire in kept if not select.select([wire.socket], [], [], 0)[0]}
        for wire, (name, _, code) in zip(wires, slow):
            with self.subTest(name):
                self.assertNotIn(wire, kept, "not given up")
                if code:
                    answer = wire.answer()
                    self.assertEqual((answer.status, answer.closes), (400, True))
                    self.assertEqual(answer.refusal[1], code)
                self.assertTrue(wire.ended())
        wait_until(lambda: not running.server.connections)

    def test_connections_beyond_the_most_are_refused_until_others_end(self):
        running = self.start(max_connections=10)
        kept = [running.ask(SECOND)[0] for _ in range(10)]
        for data in (b"", SECOND):
            for _ in range(20):
                wire, answer = running.ask(data)
                self.assertEqual((answer.status, answer.closes), (503, True))
                self.assertEqual(answer.refusal[1], "ServiceUnavailable")
                self.assertTrue(wire.ended())
        for wire in kept:
            wire.send(SECOND)
            self.assertEqual(wire.answer().body, b"second")
        for wire in kept[:5]:
            wire.close()
        wait_until(lambda: running.server.connections == 5)
        for _ in range(5):
            self.assertEqual(running.ask(SECOND)[1].status, 200)
        self.assertEqual(running.ask(SECOND)[1].status, 503)

    def test_who_comes_and_goes_leaves_nothing_behind(self):
        running = self.start()
        files = len(os.listdir("/dev/fd"))
        most = threading.active_count() + 3 * 20
        large = by_length(b"a" * 200000)
        for data in (b"", SECOND[:-1], SECOND, by_chunks(b"abc")[:-5], large[:-9], large):
            for reset in (False, True):
                for _ in range(3):
                    wires = [Wire(running.address) for _ in range(20)]
                    for wire in wires:
                        wire.send(data)
                    for wire in wires:
                        wire.close(reset)
                    self.assertLessEqual(threading.active_count(), most)
                    wait_until(lambda: not running.server.connections)
        wait_until(lambda: len(os.listdir("/dev/fd")) <= files)
        self.assertTrue(running.server.is_idle)
        self.assertEqual(running.ask(SECOND)[1].body, b"second")

    def test_who_sends_many_calls_ahead_has_no_more_turns_than_others(self):
        proxy, held = Echo(), threading.Event()

        def hold(request):
            if request.path == "/hold":
                held.wait(DEADLINE)
            return proxy.handle(request)

        proxy.begin = lambda requests: list(map(hold, requests))
        running = self.start(proxy)
        first, many, one = (running.connect() for _ in range(3))
        first.send(by_length(b"", b"/hold"))
        many.send(by_length(b"") * 500)
        one.send(SECOND)
        held.set()
        self.assertEqual(one.answer().body, b"second")
        self.assertLess([it.path for it in proxy.requests].index("/second"), 100)
        self.assertEqual({many.answer().status for _ in range(500)}, {200})

    def test_a_poll_ends_soon_once_its_caller_has_hung_up(self):
        """Else polls begun and left would hold connections and threads that others need."""
        caller = Caller("json")
        given = {"QueueUrl": caller.queue(), "WaitTimeSeconds": 20}
        target = (("X-Amz-Target", "AmazonSQS.ReceiveMessage"),)
        request = signed("POST", "/", target, json.dumps(given).encode(), at=caller.clock())
        before = caller.clock()
        reply = caller.proxy.handle(dataclasses.replace(request, abandoned=lambda: True))
        self.assertEqual(reply.status, 200)
        self.assertLessEqual(caller.clock() - before, 5)

    def test_who_never_ceases_to_send_is_not_given_up(self):
        """The buffer is never empty: the beginning of a request arrives with each end."""
        wire = self.start(timeout=0.7).connect()
        wire.send(SECOND[:20])
        for _ in range(50):
            wire.send(SECOND[20:] + SECOND[:20])
            self.assertEqual(wire.answer().body, b"second")
            time.sleep(0.02)

    def test_a_crowd_of_calls_sent_ahead_is_answered_in_order(self):
        """So much ahead that they have to wait for their answers to be read."""
        running = self.start()
        bodies = [b"%d" % (index % 10) * 60000 for index in range(100)]
        data = b"".join(map(by_length, bodies))
        wires = [running.connect() for _ in range(5)]
        for wire in wires:
            sender = threading.Thread(target=wire.send, args=(data,))
            sender.start()
            self.addCleanup(sender.join)
        self.assertEqual(running.ask(SECOND)[1].body, b"second")
        for wire in wires:
            self.assertTrue([wire.answer().body for _ in bodies] == bodies)


# ==== 9. TLS ====


def made_certificate(test, name="localhost"):
    """Return the path of a new certificate, signed by itself, with its key in the same file."""
    if not shutil.which("openssl"):
        raise unittest.SkipTest("openssl is not installed")
    where = tempfile.mkdtemp()
    test.addClassCleanup(shutil.rmtree, where)
    path = os.path.join(where, "both.pem")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        f" -keyout {path}.key -out {path}.crt -subj /CN={name}"
        f" -addext subjectAltName=DNS:{name},IP:127.0.0.1"
    )
    subprocess.run(command.split(), check=True, stderr=subprocess.DEVNULL)
    with open(path, "wb") as both:
        for part in (".crt", ".key"):
            with open(path + part, "rb") as file:
                both.write(file.read())
    return path


class TlsWire(Wire):
    """The same over TLS; that it ends is believed only if the server has said so."""

    def __init__(self, address, context):
        super().__init__(address)
        self.stream.close()
        self.socket = context.wrap_socket(
            self.socket, server_hostname="localhost", suppress_ragged_eofs=False
        )
        self.stream = self.socket.makefile("rb")

    def send(self, data, piece=0):
        with contextlib.suppress(ssl.SSLError):  # by now it has closed
            super().send(data, piece)

    def done(self):
        """Say so, and wait for the server to say it too: ssl knows no half-closed connection."""
        self.socket.unwrap()


class RunningTls(Running):
    def __init__(self, proxy, path, **settings):
        self.certificate = awsproxy.Certificate(path)
        self.context = ssl.create_default_context(cafile=path)
        super().__init__(proxy, certificate=self.certificate, **settings)

    def connect(self):
        self.wires.append(TlsWire(self.address, self.context))
        return self.wires[-1]


class StreamOverTlsTest(StreamTest):
    """All of it once more, in records; but for what half-closes a connection."""

    test_who_has_finished_sending_is_answered = None
    test_a_request_that_stops_early_is_never_answered_as_a_whole = None
    test_an_answer_cannot_be_split_by_a_header = None

    @classmethod
    def setUpClass(cls):
        cls.proxy = Echo()
        cls.running = RunningTls(cls.proxy, made_certificate(cls))
        cls.addClassCleanup(cls.running.stop)


class LoopTest(unittest.TestCase):
    """The loop by hand, where the selector's word can be an old one."""

    def setUp(self):
        self.server = Server(("127.0.0.1", 0), Echo())
        self.addCleanup(self.server.server_close)
        self.ours, self.client = socket.socketpair()
        for end in (self.ours, self.client):
            self.addCleanup(end.close)
            end.setblocking(False)
        self.conversation = awsproxy.Conversation(self.server, self.ours, "")

    def test_what_has_arrived_for_a_worker_is_left_to_it(self):
        self.client.send(SECOND)
        self.conversation.readable()
        self.assertEqual(self.ours.recv(1000), SECOND)

    def test_a_request_has_one_turn_however_often_it_is_told_of(self):
        self.server._park(self.conversation)
        self.server._conversations.add(self.conversation)
        self.client.send(SECOND * 2)
        for _ in range(3):
            self.conversation.readable()
            self.server.queue(self.conversation)
            self.conversation.resume()
        self.server._answer()
        self.assertEqual(len(self.server.proxy.requests), 1)
        self.server._answer()
        self.server._answer()
        self.assertEqual(len(self.server.proxy.requests), 2)

    def test_no_descriptor_left_is_a_pause_and_not_the_end(self):
        listener = self.server.socket
        self.server.socket = mock.Mock(fileno=listener.fileno, close=listener.close)
        self.server.socket.accept.side_effect = OSError(errno.EMFILE, "Too many open files")
        with self.assertLogs("awsproxy", "WARNING"):
            self.server._accept()
        self.assertNotIn(listener, self.server._selector.get_map())
        self.server.socket = listener
        self.server._listen_again()
        self.assertIn(listener, self.server._selector.get_map())

    def test_a_closed_connection_makes_no_calls(self):
        self.server._park(self.conversation)
        self.server._conversations.add(self.conversation)
        self.client.send(SECOND)
        self.conversation.readable()
        self.conversation.close()
        self.server._answer()
        self.assertEqual(self.server.proxy.requests, [])

    def test_a_proxy_that_fails_ends_its_connections_alone(self):
        self.server._park(self.conversation)
        self.server._conversations.add(self.conversation)
        self.client.send(SECOND)
        self.conversation.readable()
        self.server.proxy.begin = None
        with self.assertLogs("awsproxy", "ERROR"):
            self.server._answer()
        self.assertEqual(self.client.recv(1), b"")
        self.assertEqual(self.server.connections, 0)


class TlsTest(SocketTest):
    @classmethod
    def setUpClass(cls):
        cls.path = made_certificate(cls)
        cls.other = made_certificate(cls)

    def start(self, proxy=None, **settings):
        running = RunningTls(proxy or Echo(), self.path, **settings)
        self.addCleanup(running.stop)
        return running

    def test_1_2_and_1_3_are_spoken_and_nothing_older(self):
        running = self.start()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            running.context.minimum_version = running.context.maximum_version = version
            running.context.set_alpn_protocols(["h2", "http/1.1"])
            wire, answer = running.ask(SECOND)
            self.assertEqual(
                (answer.body, wire.socket.version()[-3:]),
                (b"second", version.name[-3:].replace("_", ".")),
            )
            self.assertEqual(wire.socket.selected_alpn_protocol(), "http/1.1")
        with socket.create_connection(running.address, DEADLINE) as connection:
            connection.sendall(TLS_1_1_HELLO)
            answer = connection.recv(100)
        self.assertEqual(answer[:1] + answer[5:7], b"\x15\x02\x46")  # fatal: protocol_version

    def test_a_record_that_holds_more_than_a_worker_reads_is_not_forgotten(self):
        wire = self.start().connect()
        wire.send(by_chunks(b"first") + SECOND * 3)
        self.assertEqual([wire.answer().body for _ in range(4)], [b"first"] + [b"second"] * 3)

    def test_a_handshake_keeps_nobody_waiting(self):
        running = self.start(timeout=1)
        begun = []
        for data in (b"", b"\x16\x03\x01", TLS_1_1_HELLO[:-20]):
            for _ in range(20):
                begun.append(socket.create_connection(running.address, DEADLINE))
                self.addCleanup(begun[-1].close)
                begun[-1].sendall(data)
        self.assertEqual(running.ask(SECOND)[1].body, b"second")
        for connection in begun:
            self.assertEqual(connection.recv(1), b"")

    def test_who_speaks_without_tls_is_told(self):
        running = self.start(Proxy(awsproxy.DEMO_CLIENTS))
        nonsense = socket.create_connection(running.address, DEADLINE)
        self.addCleanup(nonsense.close)
        nonsense.sendall(b"\0" * 50)
        for data in (raw_call(), raw_call(body=b"{}".ljust(9000))):
            with socket.create_connection(running.address, DEADLINE) as connection:
                connection.sendall(data)
                answer = read_answer(connection.makefile("rb"))
                self.assertEqual((answer.status, answer.closes), (400, True))
                self.assertIn(b"https", answer.body)
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(nonsense.recv(100)[:1], b"\x15")  # an alert

    def test_who_reads_slowly_but_steadily_gets_all(self):
        running = self.start(timeout=0.6)
        wire = running.connect()
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        body = b"0123456789abcdef" * 250000
        wire.send(by_length(body))
        received = wire.stream.read(200)
        while not received.endswith(body[-100:]) or len(received) < len(body):
            received += wire.stream.read1(65536)
            time.sleep(0.007)
        self.assertTrue(received.endswith(b"\r\n\r\n" + body))

    def test_an_answer_that_breaks_off_does_not_seem_to_have_ended(self):
        def blocks():
            yield b"x" * 100
            raise ServiceError("ServiceUnavailable", "gone")

        running = self.start()
        running.server.proxy.begin = lambda requests: [Reply(200, (), blocks())]
        wire = running.connect()
        with self.assertLogs("awsproxy"), self.assertRaises(OSError):
            wire.send(b"GET / HTTP/1.0\r\n\r\n")
            wire.stream.read()

    def test_a_new_certificate_is_shown_and_a_broken_one_is_not(self):
        path = os.path.join(folder(self), "cert.pem")
        with open(self.path, "rb") as old, open(self.other, "rb") as new:
            old, new = old.read(), new.read()
        write(path, old)
        running = RunningTls(Echo(), path)
        self.addCleanup(running.stop)
        kept = running.connect()
        for content, age, level, known in (
            (b"nonsense", 1, "ERROR", self.path),
            (old[: old.index(b"-----END")], 2, "ERROR", self.path),
            (new, 3, "WARNING", self.other),
        ):
            write(path, content, age)
            with self.assertLogs("awsproxy", level) as logs:
                running.certificate.refresh()
                running.certificate.refresh()
            self.assertEqual(len(logs.records), 1)
            running.context = ssl.create_default_context(cafile=known)
            self.assertEqual(running.ask(SECOND)[1].body, b"second")
        kept.send(SECOND)
        self.assertEqual(kept.answer().body, b"second")

    def test_queue_urls_begin_with_https(self):
        program = Program(self.addCleanup, "--tls-cert", self.path, "--quiet")
        with socket.create_connection(program.address, DEADLINE) as connection:
            self.assertEqual(program.scheme, "https")
            context = ssl.create_default_context(cafile=self.path)
            with context.wrap_socket(connection, server_hostname="localhost") as secured:
                body = b'{"QueueName":"jobs"}'
                kind = (("X-Amz-Target", "AmazonSQS.CreateQueue"), OF_JSON[1])
                secured.sendall(raw_call(kind, body, at=time.time()))
                answer = read_answer(secured.makefile("rb"))
        url = json.loads(answer.body)["QueueUrl"]
        self.assertEqual(url, f"https://{HOST}/000000000000/jobs")

    def test_what_cannot_be_used_is_refused_with_one_line(self):
        secret = os.path.join(folder(self), "secret.pem")
        command = f"openssl ec -aes256 -passout pass:p -in {self.path} -out {secret}"
        subprocess.run(command.split(), check=True, stderr=subprocess.DEVNULL)
        rows = (
            ((f"--tls-key={self.path}",), "--tls-cert"),
            ((f"--tls-cert={self.path}.not",), "No such file"),
            ((f"--tls-cert={self.path}.crt",), "cannot be used"),
            ((f"--tls-cert={self.path}", f"--tls-key={self.other}"), "cannot be used"),
            ((f"--tls-cert={awsproxy.__file__}",), "cannot be used"),
            ((f"--tls-cert={self.path}.crt", f"--tls-key={secret}"), "encrypted"),
        )
        ended = run_each((words, ["--port=0", *words]) for words, _ in rows)
        for words, expected in rows:
            with self.subTest(words):
                code, _, errors = ended[words]
                self.assertEqual((code, errors.count("\n")), (2, 1))
                self.assertIn(expected, errors)


# What a client says first that knows TLS 1.1 and nothing later (RFC 4346, 7.4.1.2).
TLS_1_1_HELLO = b"\x16\x03\x01\0\x2f\x01\0\0\x2b\x03\x02" + bytes(33) + b"\0\x04\0\x2f\0\x35\x01\0"


# ==== The program as a process of its own, called by our own signer ====


def run_each(rows):
    """Run the program once for each (name, arguments); return name: (code, output, errors).

    Only as many processes run at once as the machine has cores.  The code is None if the
    program did not end, such as one that serves where it should have refused to start.
    """
    environment = {**os.environ, "COLUMNS": "100"}
    # As a module it starts twice as quickly: Python keeps the compiled code of modules only.
    command = [sys.executable, "-m", "awsproxy"]

    def run(row):
        name, arguments = row
        try:
            ended = subprocess.run(
                [*command, *arguments],
                cwd=os.path.dirname(os.path.abspath(awsproxy.__file__)),
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                timeout=DEADLINE,
            )
        except subprocess.TimeoutExpired:
            return name, (None, "", "")
        return name, (ended.returncode, ended.stdout, ended.stderr)

    with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
        return dict(pool.map(run, rows))


class Program:
    """awsproxy.py as a process; it can stand in for a Proxy, to which a Caller talks."""

    def __init__(self, cleanup, *flags, before=(), python=(), path=awsproxy.__file__, **how):
        command = [*before, sys.executable, *python, path, "--port", "0", *flags]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            **how,
        )
        cleanup(self.stop)
        self.warnings = []  # what it printed before it listened
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def line(self, seconds=DEADLINE):
        """Return the next line of standard error, None at its end."""
        line = self._lines.get(timeout=seconds)
        if line is None:  # so that whoever asks again is told again
            self._lines.put(None)
        return line

    def rest(self):
        """Return all lines to come, once the program has ended."""
        return list(iter(self.line, None))

    @functools.cached_property
    def address(self):
        """Wait until it listens; return where."""
        for line in iter(self.line, None):
            match = re.fullmatch(r"listening on (https?)://(\[.+\]|[^:]+):([0-9]+)", line)
            if match:
                self.scheme = match[1]
                return match[2].strip("[]"), int(match[3])
            self.warnings.append(line)
        raise AssertionError(f"it never listened, but printed {self.warnings}")

    def end(self, number=signal.SIGTERM):
        """Send a signal; return the exit code and the seconds it took to exit."""
        begin = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(DEADLINE), time.monotonic() - begin

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()

    def send(self, request):
        """Send a Request on a new connection; return the connection."""
        body = request.body.read()
        lines = [f"{request.method} {request.target} HTTP/1.1"]
        headers = (*request.headers, ("Content-Length", str(len(body))), ("Connection", "close"))
        lines += [f"{name}: {value}" for name, value in headers]
        connection = socket.create_connection(self.address, DEADLINE)
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return connection

    def handle(self, request):
        """Send a Request, return the Reply."""
        with self.send(request) as connection:
            response = http.client.HTTPResponse(connection, method=request.method)
            with response:
                response.begin()
                content = response.read()
                return awsproxy.Reply(response.status, tuple(response.getheaders()), content)

    def caller(self, protocol="json", seconds=0, **how):
        """Return a Caller that sends to this program; its clock is off by so many seconds."""
        caller = Caller(protocol, Clock(time.time() + seconds), **how)
        caller.proxy = self
        return caller


def folder(test):
    """Return a new directory."""
    made = tempfile.mkdtemp()
    test.addCleanup(shutil.rmtree, made)
    return made


def write(path, text, age=0):
    """Replace a file as an editor does, and make it so many seconds old."""
    with open(path + "~", "wb") as new:
        new.write(text if isinstance(text, bytes) else text.encode())
    os.utime(path + "~", (1e9 - age, 1e9 - age))
    os.replace(path + "~", path)
    return path


def section(name, key, secret, token="", account=""):
    lines = [f"[{name}]", f"aws_access_key_id = {key}", f"aws_secret_access_key = {secret}"]
    lines += [f"aws_session_token = {token}"] * bool(token)
    lines += [f"aws_account_id = {account}"] * bool(account)
    return "\n".join(lines) + "\n"


def refused_code(caller, operation="ListQueues", **given):
    """Return the code that a call is refused with, "" if it is not."""
    try:
        caller(operation, **given)
    except Refused as error:
        return error.code
    return ""


FLAGS = (
    " --route --upstream --profile --sign-as --hook --log-file --max-connections --admin"
    " --drain-seconds --task-protection "
    "--account-id --clients --clock-skew --cooldown --help --host --log-format --max-body"
    " --no-verify --port --public-url --quiet --region --reuse-port --timeout --tls-cert --tls-key --version"
).split()
LOG_FIELDS = "time client key action status error ms request_id".split()


class CommandLineTest(unittest.TestCase):
    def start(self, *flags, **how):
        return Program(self.addCleanup, *flags, **how)

    def test_help_and_version_are_printed(self):
        ended = run_each([("help", ["--help"]), ("version", ["--version"])])
        code, text, errors = ended["help"]
        self.assertEqual((code, errors), (0, ""))
        for flag in FLAGS:
            with self.subTest(flag):
                self.assertRegex(text, rf"(?m)^  (-h, )?{flag}\b")
        code, text, errors = ended["version"]
        self.assertEqual((code, errors), (0, ""))
        with open(awsproxy.__file__, "rb") as source:
            digest = sha256(source.read())
        match = re.fullmatch(r"awsproxy (\S+) \(sha256 ([0-9a-f]{12,64})\)\n", text)
        self.assertEqual(match[1], awsproxy.__version__)
        self.assertEqual(match[2], digest[: len(match[2])])

    def test_a_wrong_command_line_is_refused_with_2(self):
        rows = [
            "--nonsense", "argument", "--port 65536", "--port -1", "--port x", "--clock-skew -1",
            "--clock-skew 1.5", "--max-body 0", "--timeout 0", "--timeout nan", "--log-format xml",
            "--account-id 1234", "--account-id 12345678901x", "--public-url localhost:8081",
            "--public-url http://", "--public-url http://host/?x", "--public-url http://[::1",
            "@/nonexistent/flags",
        ]  # fmt: skip
        ended = run_each([(row, row.split()) for row in rows])
        for row in rows:
            with self.subTest(row):
                code, output, errors = ended[row]
                self.assertEqual((code, output), (2, ""))
                named = row.split()[0].lstrip("@")
                self.assertIn(named, errors)
                self.assertEqual(errors.count("\n"), 1)

    def test_what_cannot_be_started_is_refused_with_one_line_that_says_the_remedy(self):
        port = str(self.start("--quiet").address[1])
        clients = write(os.path.join(folder(self), "clients"), section("a", "akid", "secret"))
        rows = [
            ("port in use", ["--port", port], "--port"),
            ("host not ours", ["--host", "192.0.2.1"], "--host"),  # RFC 5737
            ("host no name", ["--host", "a..b"], "--host"),
            ("demo client, all addresses", ["--host", "0.0.0.0"], "--clients"),
            ("demo client, no address", ["--host", ""], "--clients"),
            ("unverified, all addresses", ["--host", "0.0.0.0", "--no-verify"], "--no-verify"),
            (
                "unverified, all addresses, clients",
                ["--host", "0.0.0.0", "--no-verify", "--clients", clients],
                "--no-verify",
            ),
        ]
        ended = run_each((name, ["--port", "0", *flags]) for name, flags, _ in rows)
        for name, _, remedy in rows:
            with self.subTest(name):
                code, output, errors = ended[name]
                self.assertEqual((code, output), (2, ""))
                self.assertRegex(errors, r"\Aawsproxy: [^\n]+\n\Z")
                self.assertIn(remedy, errors)

    def test_a_port_is_shared_by_processes_that_keep_nothing(self):
        sink = Running(Echo())
        self.addCleanup(sink.stop)
        flags = ("--reuse-port", "--quiet", "--upstream", "http://{}:{}".format(*sink.address))
        keys = {"AWS_ACCESS_KEY_ID": "upstreamkey", "AWS_SECRET_ACCESS_KEY": "upstreamsecret"}
        keys = {**os.environ, **keys}
        first = Program(self.addCleanup, *flags, env=keys)
        port = first.address[1]
        second = Program(self.addCleanup, *flags, f"--port={port}", env=keys)
        self.assertEqual(second.address[1], port)
        first.caller()("ListQueues")
        self.assertEqual(first.end()[0], 0)
        second.caller()("ListQueues")
        self.assertEqual(len(sink.server.proxy.requests), 2)
        rows = (
            ("embedded", ("--reuse-port",)),
            ("--task-protection", (*flags, "--task-protection")),
            ("in use", flags[1:]),
        )
        with mock.patch.dict(os.environ, keys):
            ended = run_each((expected, [f"--port={port}", *more]) for expected, more in rows)
        for expected, (code, _, errors) in ended.items():
            self.assertEqual((code, errors.count("\n")), (2, 1), errors)
            self.assertIn(expected, errors)

    def test_a_clients_file_that_cannot_be_used_is_refused_with_one_line(self):
        at = folder(self)
        hidden = "hunter2"
        files = {
            "empty": "",
            "comment": "# nothing yet\n",
            "no section": f"aws_secret_access_key = {hidden}\n",
            "no value": f"[a]\naws_access_key_id = akid\n{hidden}\n",
            "no key": f"[a]\naws_secret_access_key = {hidden}\n",
            "no secret": "[a]\naws_access_key_id = akid\n",
            "empty secret": section("a", "akid", ""),
            "key too short": section("a", "ak", hidden),
            "key with a blank": section("a", "a kid", hidden),
            "account": section("a", "akid", hidden, account="1234"),
            "section twice": section("a", "akid", hidden) + section("a", "akid2", hidden),
            "key twice": section("a", "akid", hidden) + section("b", "akid", hidden),
            "token twice": section("a", "k01", hidden, "t") + section("b", "k01", hidden, "t"),
            "not utf-8": section("a", "akid", hidden).encode() + b"# caf\xe9\n",
        }
        paths = {name: write(os.path.join(at, name), text) for name, text in files.items()}
        paths["missing"] = os.path.join(at, "missing")
        paths["directory"] = at
        ended = run_each(
            (name, ["--port", "0", "--clients", path]) for name, path in paths.items()
        )
        for name, path in paths.items():
            with self.subTest(name):
                code, output, errors = ended[name]
                self.assertEqual((code, output), (2, ""))
                self.assertRegex(errors, r"\Aawsproxy: [^\n]+\n\Z")
                self.assertIn(path, errors)
                self.assertNotIn(hidden, errors)

    def test_a_word_misspelt_in_the_clients_file_is_told(self):
        right = section("a", "keyA", "secret")
        for word, meant in (
            ("aws_acount_id", "aws_account_id"), ("upstream_profil", "upstream_profile"),
            ("aws_session_tokens", "aws_session_token"),
        ):  # fmt: skip
            path = write(os.path.join(folder(self), "clients"), f"{right}{word} = x\n")
            with self.subTest(word), self.assertRaisesRegex(ValueError, f"{word}.*{meant}"):
                awsproxy.read_clients(path)
        path = write(os.path.join(folder(self), "clients"), f"{right}region = x\noutput = json\n")
        self.assertEqual(list(awsproxy.read_clients(path)), ["keyA"])

    def test_clients_come_from_a_file_and_one_key_may_have_several_tokens(self):
        text = (
            section("old", "akid", "s3cr%t#;", "one", "111111111111")
            + section("new", "akid", "s3cr%t#;", "two", "222222222222")
            + section("DEFAULT", "AKID.-_2", "other")
        )
        path = write(os.path.join(folder(self), "clients"), text)
        program = self.start("--clients", path)
        rows = [
            (Client("", "akid", "s3cr%t#;", "one"), "", "111111111111"),
            (Client("", "akid", "s3cr%t#;", "two"), "", "222222222222"),
            (Client("", "akid", "s3cr%t#;", "three"), "InvalidClientTokenId", ""),
            (Client("", "akid", "s3cr%t#;"), "InvalidClientTokenId", ""),
            (Client("", "akid", "wrong", "one"), "SignatureDoesNotMatch", ""),
            (Client("", "AKID.-_2", "other"), "", "000000000000"),
            (DEMO, "InvalidClientTokenId", ""),
        ]
        for client, code, account in rows:
            with self.subTest(f"{client} {client.session_token}"):
                caller = program.caller(client=client)
                if code:
                    self.assertEqual(refused_code(caller), code)
                else:
                    self.assertIn(f"/{account}/", caller.queue())

    def test_the_clients_file_is_read_again_when_it_changes(self):
        path = write(os.path.join(folder(self), "clients"), section("a", "akid", "first"))
        program = self.start("--clients", path)
        first = program.caller(client=Client("", "akid", "first"))
        second = program.caller(client=Client("", "akid", "second"))
        self.assertEqual(refused_code(first), "")
        self.assertEqual(refused_code(second), "SignatureDoesNotMatch")
        write(path, section("a", "akid", "second"), age=1)
        wait_until(lambda: not refused_code(second))
        self.assertEqual(refused_code(second), "")
        self.assertEqual(refused_code(first), "SignatureDoesNotMatch")
        write(path, "[a]\naws_secret_access_key = hunter2\n", age=2)
        for line in iter(program.line, None):
            if "not read again" in line:
                break
        self.assertIn(path, line)
        self.assertNotIn("hunter2", line)
        self.assertEqual(refused_code(second), "")

    def test_a_clients_file_is_read_later_where_it_cannot_be_opened_now(self):
        path = write(os.path.join(folder(self), "clients"), section("a", "keyA", "secret"))
        watched = awsproxy.ClientsFile(path)
        write(path, section("b", "keyB", "secret"), age=9)
        with self.assertLogs("awsproxy"):
            with mock.patch("builtins.open", side_effect=OSError(errno.EMFILE, "too many")):
                self.assertFalse(watched.refresh())
            self.assertEqual(list(watched.value), ["keyA"])
            self.assertTrue(watched.refresh())
        self.assertEqual(list(watched.value), ["keyB"])

    def test_a_clients_file_is_told_of_once_each_time_it_changes(self):
        path = write(os.path.join(folder(self), "clients"), section("a", "akid", "first"))
        watched = awsproxy.ClientsFile(path)
        rows = [
            ("untouched", lambda: None, "first", ""),
            ("changed", lambda: write(path, section("a", "akid", "2nd"), 1), "2nd", "read again"),
            ("broken", lambda: write(path, "[a]", 2), "2nd", "not read again"),
            ("mended", lambda: write(path, section("a", "akid", "3rd"), 3), "3rd", "read again"),
            ("removed", lambda: os.remove(path), "3rd", "not read again"),
            ("back", lambda: write(path, section("a", "akid", "4th"), 4), "4th", "read again"),
        ]
        for name, change, secret, told in rows:
            with self.subTest(name), mock.patch.object(awsproxy.log, "_log") as log:
                change()
                fresh = [watched.refresh() for _ in range(3)]
                self.assertEqual(fresh, [told == "read again", False, False])
                self.assertEqual(watched.value["akid"][0].secret_access_key, secret)
                texts = [call.args[1] % call.args[2] for call in log.call_args_list]
                self.assertEqual(len(texts), bool(told), texts)
                self.assertTrue(all(text.startswith(f"{path} {told}") for text in texts), texts)

    def test_without_verification_anybody_may_call_and_is_warned_of(self):
        program = self.start("--no-verify")
        body = b'{"QueueName": "jobs"}'
        headers = (("Host", HOST), ("X-Amz-Target", "AmazonSQS.CreateQueue"))
        reply = program.handle(Request("POST", "/", headers, io.BytesIO(body)))
        self.assertEqual(reply.status, 200, reply.body)
        self.assertEqual(len(program.warnings), 1)
        self.assertIn("--no-verify", program.warnings[0])
        for client in (DEMO, Client("", "AKIAUNKNOWN", "wrong")):
            for protocol in ("json", "query"):
                caller = program.caller(protocol, seconds=-86400, client=client)
                urls = caller("ListQueues")["QueueUrls"]
                self.assertEqual(urls, [f"http://{HOST}/000000000000/jobs"])

    def test_flags_do_what_they_say(self):
        flags = os.path.join(folder(self), "flags")
        write(
            flags,
            "--account-id 123456789012   # of the team\n\n# where clients find it\n"
            "--public-url 'https://sqs.example.test/base/'\n--max-body=1000\n",
        )
        program = self.start(
            f"@{flags}", "--region", "eu-west-1", "--region", "us-west-2", "--clock-skew", "60"
        )
        caller = program.caller(region="us-west-2")
        url = caller.queue()
        self.assertEqual(url, "https://sqs.example.test/base/123456789012/jobs")
        for protocol in ("json", "query"):  # the URL's own path must lead here
            there = program.caller(protocol, region="us-west-2")
            sent = there(
                "SendMessage", target="/base/123456789012/jobs", QueueUrl=url, MessageBody="a"
            )
            self.assertIn("MessageId", sent)
        rows = [
            ("region", "us-west-2", 0, ""),
            ("another region", "eu-west-1", 0, ""),
            ("region not allowed", "us-east-1", 0, "SignatureDoesNotMatch"),
            ("a minute early", "eu-west-1", 50, ""),
            ("a minute late", "eu-west-1", -50, ""),
            ("too early", "eu-west-1", 100, "SignatureDoesNotMatch"),
            ("too late", "eu-west-1", -100, "SignatureDoesNotMatch"),
        ]
        for name, region, seconds, code in rows:
            with self.subTest(name):
                self.assertEqual(
                    refused_code(program.caller("json", seconds, region=region)), code
                )
        for size, status in ((1000, 200), (1001, 413)):
            with self.subTest(size=size):
                body = b"{%s}" % (b" " * (size - 2))
                headers = (("X-Amz-Target", "AmazonSQS.ListQueues"),)
                how = dict(region="eu-west-1", at=time.time())
                reply = program.handle(signed("POST", "/", headers, body, **how))
                self.assertEqual(reply.status, status)
                if status == 413:
                    self.assertIn("__type", json.loads(reply.body))

    def test_purging_again_at_once_is_refused_only_if_asked_for(self):
        refused = "AWS.SimpleQueueService.PurgeQueueInProgress"
        for flags, code in (([], ""), (["--cooldown"], refused)):
            with self.subTest(flags):
                caller = self.start("--quiet", *flags).caller()
                url = caller.queue()
                caller("PurgeQueue", QueueUrl=url)
                self.assertEqual(refused_code(caller, "PurgeQueue", QueueUrl=url), code)

    def test_a_silent_connection_is_closed_after_the_timeout(self):
        program = self.start("--timeout", "0.1", "--quiet")
        with socket.create_connection(program.address, DEADLINE) as connection:
            self.assertEqual(connection.recv(1), b"")

    def test_it_listens_on_ipv6(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("no IPv6 here")
        program = self.start("--host", "::1")
        self.assertEqual(program.address[0], "::1")
        self.assertEqual(program.caller()("ListQueues"), {})

    def log_lines(self, program, of_json, count):
        """Return this many lines of the access log as dicts."""
        entries = []
        for _ in range(count):
            line = program.line()
            self.assertRegex(line, r"\A[ -~]+\Z")
            if of_json:
                entries.append(json.loads(line))
            else:
                values = line.split(" ")
                self.assertEqual(len(values), len(LOG_FIELDS), line)
                entries.append(dict(zip(LOG_FIELDS, values)))
                entries[-1]["status"] = int(entries[-1]["status"])
                entries[-1]["ms"] = float(entries[-1]["ms"])
            self.assertEqual(list(entries[-1])[: len(LOG_FIELDS)], LOG_FIELDS)
        return entries

    def test_a_line_is_printed_for_each_call(self):
        missing = {"QueueUrl": "none", "MessageBody": "hunter2"}
        wrong = Client("", "dummykey", "hunter2")
        token = Client("", "dummykey", "dummysecret", "dummysession")
        gone = "AWS.SimpleQueueService.NonExistentQueue"
        mismatch = "SignatureDoesNotMatch"
        rows = [
            (DEMO, "ListQueues", {}, "dummykey", 200, "-"),
            (token, "CreateQueue", {"QueueName": "jobs"}, "dummykey", 200, "-"),
            (DEMO, "SendMessage", missing, "dummykey", 400, gone),
            (wrong, "ListQueues", {}, "?dummykey", 403, mismatch),
            (
                Client("", "akid", "hunter2"),
                "ListQueues",
                {},
                "?akid",
                403,
                "InvalidClientTokenId",
            ),
        ]
        for form_of_line in ("text", "json"):
            program = self.start("--log-format", form_of_line)
            for client, operation, given, key, status, error in rows:
                with self.subTest(f"{form_of_line} {client} {operation}"):
                    caller = program.caller(client=client)
                    refused_code(caller, operation, **given)
                    (entry,) = self.log_lines(program, form_of_line == "json", 1)
                    self.assertRegex(entry["time"], r"\A[0-9-]{10}T[0-9:]{8}\.[0-9]{3}Z\Z")
                    self.assertEqual(entry["client"], "127.0.0.1")
                    self.assertEqual(entry["key"], key)
                    self.assertEqual(entry["action"], f"sqs:{operation}")
                    self.assertEqual((entry["status"], entry["error"]), (status, error))
                    self.assertTrue(0 <= entry["ms"] < 10000)
                    headers = {name.lower(): value for name, value in caller.reply.headers}
                    self.assertEqual(entry["request_id"], headers["x-amzn-requestid"])

    def test_the_log_names_the_error_that_the_caller_got(self):
        program = self.start("--log-format", "json")
        target = (("Host", HOST), ("X-Amz-Target", "AmazonSQS.ListQueues"))
        rows = [
            ("unsigned", target),
            ("no host", target[1:]),
            ("bearer", (*target, ("Authorization", "Bearer hunter2"))),
            ("half", (*target, ("Authorization", "AWS4-HMAC-SHA256 Signature=hunter2"))),
        ]
        for name, headers in rows:
            with self.subTest(name):
                reply = program.handle(Request("POST", "/", headers, io.BytesIO(b"{}")))
                (entry,) = self.log_lines(program, True, 1)
                answered = {name.lower(): value for name, value in reply.headers}
                code = answered["x-amzn-query-error"].partition(";")[0]
                self.assertEqual((entry["status"], entry["error"]), (reply.status, code))
                self.assertEqual(entry["key"], "-")

    def test_no_secret_and_no_control_character_gets_into_the_log(self):
        token = Client("", "dummykey", "dummysecret", "dummysession")
        forged = "dummykey%0A2026-01-01T00:00:00.000Z%20x%1B[31m%C2%9B"
        for form_of_line in ("text", "json"):
            program = self.start("--log-format", form_of_line)
            now = time.time()
            target = presign(target="/?Action=ListQueues", client=token, at=now)
            headers = (("Host", HOST),)
            requests = [
                Request("GET", target, headers, io.BytesIO()),
                Request("GET", target.replace("dummykey", forged), headers, io.BytesIO()),
                Request("GET", target[:-1], headers, io.BytesIO()),
                signed("GET", "/?Action=ListQueues", client=token, at=now),
                signed("GET", "/?Action=\x85\x9b%0A", client=token, at=now),
                signed(client=Client("", "a b\x9b\xa0c", "dummysecret", "dummysession"), at=now),
            ]
            statuses = [program.handle(request).status for request in requests]
            self.assertEqual([statuses[0], statuses[3]], [200, 200])
            for entry in self.log_lines(program, form_of_line == "json", len(requests)):
                shown = json.dumps(entry)
                for hidden in ("dummysecret", "dummysession", "Signature=", "AWS4-HMAC"):
                    self.assertNotIn(hidden, shown)
                self.assertNotRegex(shown, "[0-9a-f]{60}")

    def test_whatever_was_claimed_stays_on_one_line_of_ascii(self):
        claimed = "a\r\nb\x1b[31m\x85\x9b\u2028\U0001f600\\"
        request = Request("GET", "/", (("X-Amz-Target", claimed),), io.BytesIO(), "::1")
        exchange = awsproxy.Exchange(request, 0, "id")
        exchange.error = claimed
        for of_json in (False, True):
            stream = io.StringIO()
            awsproxy.AccessLog(stream, of_json).observe(exchange)
            self.assertRegex(stream.getvalue(), r"\A[ -~]+\n\Z")
            self.assertIn("1970-01-01T00:00:00.000Z", stream.getvalue())
        self.assertEqual(json.loads(stream.getvalue())["error"], claimed)

    def test_lines_of_calls_at_the_same_time_stay_apart(self):
        program = self.start("--log-format", "json")
        request = signed("GET", "/?Action=ListQueues", at=time.time())

        def call():
            for _ in range(20):
                program.handle(Request("GET", request.target, request.headers, io.BytesIO()))

        threads = [threading.Thread(target=call) for _ in range(4)]
        self.assertTrue(program.address)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ids = {entry["request_id"] for entry in self.log_lines(program, True, 80)}
        self.assertEqual(len(ids), 80)

    def test_a_log_that_cannot_be_written_costs_no_answer(self):
        stream = mock.Mock()
        stream.write.side_effect = BrokenPipeError
        proxy = Proxy(
            awsproxy.DEMO_CLIENTS,
            hooks=[awsproxy.AccessLog(stream, False)],
            clock=lambda: EXAMPLE_TIME,
        )
        self.assertEqual(proxy.handle(signed("GET", "/?Action=ListQueues")).status, 200)
        self.assertTrue(stream.write.called)

    def test_quiet_prints_no_line_for_a_call(self):
        program = self.start("--quiet")
        self.assertEqual(refused_code(program.caller()), "")
        self.assertEqual(refused_code(program.caller(client=EXAMPLE)), "InvalidClientTokenId")
        self.assertEqual(program.end()[0], 0)
        self.assertEqual((program.warnings, program.rest()), ([], []))

    def test_signals_end_it_within_a_second(self):
        """Also while a connection is idle, and a long poll waits on another."""
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number.name):
                seconds = []
                while min(seconds, default=math.inf) >= 1 and len(seconds) < 10:
                    seconds.append(self.seconds_until_it_ends(number))
                self.assertLess(min(seconds), 1)

    def seconds_until_it_ends(self, number):
        program = self.start("--quiet")
        caller = program.caller()
        given = {"QueueUrl": caller.queue(), "WaitTimeSeconds": 20}
        target = (("X-Amz-Target", "AmazonSQS.ReceiveMessage"),)
        poll = signed("POST", "/", target, json.dumps(given).encode(), at=time.time())
        with program.send(poll), socket.create_connection(program.address):
            caller("ListQueues")  # connections are accepted in order
            code, seconds = program.end(number)
        self.assertEqual((code, program.rest()), (0, []))
        return seconds

    def test_it_starts_quickly_and_first_says_where_it_listens(self):
        quickest = math.inf
        for _ in range(20):
            begin = time.monotonic()
            program = self.start()
            self.assertEqual(program.address[0], "127.0.0.1")
            quickest = min(quickest, time.monotonic() - begin)
            self.assertEqual(program.warnings, [])
            socket.create_connection(program.address, DEADLINE).close()
            program.stop()
            if quickest < 1:
                return
        self.assertLess(quickest, 1)

    def test_it_runs_however_it_is_started(self):
        at = folder(self)
        link = os.path.join(at, "proxy")
        os.symlink(os.path.abspath(awsproxy.__file__), link)
        plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        rows = [
            ("UTF-8 mode", dict(python=["-X", "utf8"])),
            ("isolated", dict(python=["-I"])),
            ("without docstrings and asserts", dict(python=["-OO"])),
            ("warnings are errors", dict(python=["-X", "dev", "-W", "error"])),
            ("ASCII locale", dict(env=plain)),
            ("from another directory", dict(cwd=at, path=os.path.relpath(awsproxy.__file__, at))),
            ("through a symbolic link", dict(cwd=at, path="proxy")),
        ]
        text = "h\u00e9 \u65e5\u672c \U0001f600"
        for first in range(0, len(rows), CORES):
            batch = rows[first : first + CORES]
            started = [(name, self.start("--quiet", **how)) for name, how in batch]
            for name, program in started:
                with self.subTest(name):
                    for protocol in ("json", "query"):
                        caller = program.caller(protocol)
                        url = caller.queue(protocol)
                        caller("SendMessage", QueueUrl=url, MessageBody=text)
                        self.assertEqual(caller.bodies(url), [text])
            for _, program in started:
                program.process.terminate()
            for name, program in started:
                with self.subTest(name):
                    self.assertEqual(program.process.wait(DEADLINE), 0)
                    self.assertEqual((program.warnings, program.rest()), ([], []))

    def test_importing_it_from_within_gives_the_running_module(self):
        script = (
            "import runpy, sys\n"
            "sys.argv[1:] = ['--version']\n"
            f"try: runpy.run_path({awsproxy.__file__!r}, run_name='__main__')\n"
            "except SystemExit: import awsproxy; print(awsproxy.__name__)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=DEADLINE
        )
        self.assertEqual(ended.stdout.splitlines()[1:], ["__main__"], ended.stderr)


class HoldingOutTest(unittest.TestCase):
    """A program under abuse by more clients than it has time, memory or files for."""

    def start(self, *flags, **how):
        program = Program(self.addCleanup, "--quiet", *flags, **how)
        make_queues(program.address[1])
        return program

    def callers(self, program, count=8):
        callers = Callers(program.address[1], count)
        self.addCleanup(callers.close)
        return callers

    def connected(self, program, count, begun=b""):
        wires = connected(program.address[1], count, begun)
        self.addCleanup(lambda: [wire.close() for wire in wires])
        return wires

    def assert_answered(self, callers, seconds=0.3):
        """Check that all calls are answered, none after more than half of DEADLINE."""
        callers.run(prepared("ListQueues", 300), seconds)
        self.assertEqual(set(callers.statuses), {200})
        self.assertGreaterEqual(len(callers.seconds), len(callers.wires))
        self.assertLess(callers.quantile(1), 1000 * DEADLINE / 2)

    def test_who_is_connected_is_served_when_no_files_are_left(self):
        program = self.start(before=(*FEW_FILES, "64"))
        callers = self.callers(program)
        crowd = connected(program.address[1], 100)
        try:
            self.assert_answered(callers)
            cpu = cpu_and_memory(program.process)[0]
            time.sleep(0.6)
            self.assertLess(cpu_and_memory(program.process)[0] - cpu, 0.3)
        finally:
            for wire in crowd:
                wire.close()
        self.assertEqual(new_calls(program.address[1], seconds=DEADLINE), {200: 20})
        self.assert_answered(callers, 0.1)
        self.assertEqual(program.end()[0], 0)
        self.assertIn("at most 43 connections", *program.warnings)
        self.assertEqual(program.rest(), [])

    def test_memory_is_bounded_whatever_is_sent_or_not_read(self):
        large = call_with_body(b"Content-Length: 16000000")
        head = SLOW_HEAD + b"a" * 65000
        following = prepared("ListQueues", 300)
        many = b"".join(following(b"") for _ in range(300)) * 2
        for name, begun, count in (
            ("large bodies announced", large, 200),
            ("the beginnings of large bodies", large + b"a" * 100000, 100),
            ("heads without an end", head, 200),
            ("heads too long", head * 40, 50),
            ("calls whose answers are not read", many, 20),
        ):
            with self.subTest(name):
                program = self.start()
                before = cpu_and_memory(program.process)[1]
                for wire in self.connected(program, count):
                    wire.settimeout(0.05)
                    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    with contextlib.suppress(OSError):
                        wire.sendall(begun)
                wait_until_idle(program.process)
                self.assertEqual(new_calls(program.address[1], 1, DEADLINE), {200: 1})
                more = cpu_and_memory(program.process)[1] - before
                self.assertLess(more, 30e6)
                program.stop()

    def test_many_polls_at_once_neither_spin_nor_hold_up_others(self):
        program = self.start()
        port, count = program.address[1], 200
        polls = Callers(port, count)
        self.addCleanup(polls.close)
        following = prepared("ReceiveMessage", count, QueueUrl=QUEUES[0], WaitTimeSeconds=20)
        polls.send(following)
        self.assert_answered(self.callers(program))
        cpu = cpu_and_memory(program.process)[0]
        time.sleep(0.6)
        self.assertLess(cpu_and_memory(program.process)[0] - cpu, 0.3)
        sender, received = self.callers(program, 1), set()
        for number in range(count):
            body = {"QueueUrl": QUEUES[0], "MessageBody": str(number)}
            sender.run(prepared("SendMessage", 1, **body), 0)
        for wire in polls.wires:
            wire.settimeout(DEADLINE)
            answer = receive_answer(wire)
            (message,) = json.loads(answer.partition(b"\r\n\r\n")[2])["Messages"]
            received.add(message["Body"])
        self.assertEqual(received, set(map(str, range(count))))

    def test_no_call_arrives_twice_when_the_upstream_is_killed_and_started_again(self):
        with contextlib.ExitStack() as stack:
            sent, noted, killed, back = interrupt(stack, 0.3)
        arrived = collections.Counter(noted)
        self.assertEqual({body: times for body, times in arrived.items() if times > 1}, {})
        for it in sent:
            self.assertIsNotNone(it.answer, "a connection was cut")
            if it.answer.status == 200:
                self.assertIn(it.body, arrived)
            else:
                self.assertEqual((it.answer.status, it.answer.closes), (503, False))
                self.assertEqual(it.answer.refusal, ("json", "ServiceUnavailable"))
                self.assertGreater(it.ended, killed)
                self.assertLess(it.began, back)
        for begun in (0, back):
            self.assertIn(200, {it.answer.status for it in sent if it.began > begun})


# ==== Real clients ====

CURL = shutil.which("curl")
BESIDE = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
AWS = shutil.which("aws", path=BESIDE)
BOTO3 = importlib.util.find_spec("boto3")


def curl_signs():
    if not CURL:
        return False
    told = subprocess.run([CURL, "--help", "all"], capture_output=True)
    return b"--aws-sigv4" in told.stdout


class CurlTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        if not curl_signs():
            raise unittest.SkipTest("no curl that knows --aws-sigv4 is installed")
        cls.program = Program(cls.addClassCleanup, "--quiet")
        cls.port = str(cls.program.address[1])

    def curl(self, command):
        """Run curl as typed in a shell, but for PORT and KEYS; return status, kind, body."""
        keys = '--aws-sigv4 "aws:amz:ap-northeast-1:sqs" --user dummykey:dummysecret'
        words = shlex.split(command.replace("KEYS", keys).replace("PORT", self.port))
        words += ["--max-time", str(DEADLINE)]
        fixed = ["-q", "-sS", "--noproxy", "*", "-w", "\n%{http_code} %{content_type}"]
        ended = subprocess.run([CURL, *fixed, *words], capture_output=True, encoding="utf-8")
        self.assertEqual(ended.returncode, 0, ended.stderr)
        body, _, told = ended.stdout.rpartition("\n")
        return (*told.split(" ", 1), body)

    def test_calls_over_tls(self):
        path = made_certificate(type(self))
        program = Program(self.addCleanup, "--quiet", f"--tls-cert={path}")
        url = f"https://localhost:{program.address[1]}"
        call = f"""{url} KEYS -H "X-Amz-Target: AmazonSQS.CreateQueue" --cacert {path}"""
        for name in ("one", "two"):
            told = self.curl(f"""{call} -d '{{"QueueName": "{name}"}}'""")
            self.assertEqual(told[0], "200", told)
            self.assertEqual(json.loads(told[2])["QueueUrl"], f"{url}/000000000000/{name}")

    def test_calls_as_one_types_them(self):
        token = '-H "X-Amz-Security-Token: dummysession"'
        of_json = '-H "Content-Type: application/x-amz-json-1.0"'
        target = '-H "X-Amz-Target: AmazonSQS.ListQueues"'
        url = f"http://localhost:{self.port}/000000000000/test-curl-queue"
        created, listed = {"QueueUrl": url}, {"QueueUrls": [url]}
        rows = [
            (
                f'curl -X POST localhost:PORT KEYS {token} -H "X-Amz-Target: AmazonSQS.'
                """CreateQueue" -d '{"QueueName": "test-curl-queue"}'""",
                created,
            ),
            (f"curl -X POST localhost:PORT {target} KEYS {token} {of_json} -d '{{}}'", listed),
            (f"curl -X POST localhost:PORT {target} KEYS {of_json} -d '{{}}'", listed),
            (f'curl -X POST "localhost:PORT/?Action=ListQueues" KEYS {of_json} -d "{{}}"', listed),
        ]
        for command, expected in rows:
            with self.subTest(command):
                status, kind, body = self.curl(command[5:])
                self.assertEqual((status, kind), ("200", "application/x-amz-json-1.0"), body)
                self.assertEqual(json.loads(body), expected)
        for command in (
            'curl "localhost:PORT/?Action=ListQueues&Version=2012-11-05" KEYS',
            "curl localhost:PORT KEYS -d Action=ListQueues -d Version=2012-11-05",
        ):
            with self.subTest(command):
                status, kind, body = self.curl(command[5:])
                self.assertEqual((status, kind), ("200", "text/xml"), body)
                root = ElementTree.fromstring(body)
                self.assertEqual(
                    [found.text for found in root.iter(NAMESPACE + "QueueUrl")], [url]
                )

    def test_calls_that_are_refused(self):
        target = '-H "X-Amz-Target: AmazonSQS.ListQueues"'
        wrong = '--aws-sigv4 "aws:amz:us-east-1:sqs" --user dummykey:wrong'
        denied, mismatch = "#AccessDeniedException", "#InvalidSignatureException"
        rows = [
            (f"-X POST localhost:PORT {target} -d '{{}}'", denied),
            (f"-X POST localhost:PORT {target} {wrong} -d '{{}}'", mismatch),
        ]
        for command, shape in rows:
            with self.subTest(command):
                status, kind, body = self.curl(command)
                self.assertEqual((status, kind), ("403", "application/x-amz-json-1.0"))
                document = json.loads(body)
                self.assertEqual(document["__type"], "com.amazon.coral.service" + shape)
                self.assertTrue(document["message"])
        status, kind, body = self.curl(f'"localhost:PORT/?Action=ListQueues" {wrong}')
        self.assertEqual((status, kind), ("403", "text/xml"))
        code = ElementTree.fromstring(body).findtext(f"{NAMESPACE}Error/{NAMESPACE}Code")
        self.assertEqual(code, "SignatureDoesNotMatch")

    def test_a_long_message_is_not_held_up(self):
        """curl waits a second for the 100 that it asks for of its own accord, or is told to."""
        url = self.program.caller(region="eu-west-1").queue("long")
        text = json.dumps({"QueueUrl": url, "MessageBody": "x" * 204800})
        path = write(os.path.join(folder(self), "message"), text)
        for asked in ("", '-H "Expect: 100-continue"', '-H "Transfer-Encoding: chunked"'):
            call = (
                'localhost:PORT --aws-sigv4 "aws:amz:eu-west-1:sqs" -u dummykey:dummysecret'
                f' -H "X-Amz-Target: AmazonSQS.SendMessage" {asked} -d @{path}'
            )

            def send(call=call):
                status, _, body = self.curl(call)
                self.assertEqual(status, "200", body)

            with self.subTest(asked):
                self.assertLess(fewest_seconds(send, 0.9), 0.9)


@unittest.skipUnless(AWS, "the AWS command line is not installed")
class AwsCommandLineTest(unittest.TestCase):
    def aws(self, *arguments):
        host, port = self.program.address
        environment = {
            "PATH": BESIDE,
            "HOME": self.home,
            "AWS_ACCESS_KEY_ID": "dummykey",
            "AWS_SECRET_ACCESS_KEY": "dummysecret",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_PAGER": "",
            "NO_PROXY": "*",
        }
        at = [
            "--endpoint-url",
            f"http://{host}:{port}",
            "--region",
            "us-east-1",
            "--output",
            "json",
        ]
        ended = subprocess.run(
            [AWS, *at, "sqs", *arguments],
            capture_output=True,
            encoding="utf-8",
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
        if ended.returncode == 127:
            self.skipTest("the AWS command line does not run here")
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))
        return json.loads(ended.stdout) if ended.stdout.strip() else None

    def test_a_message_goes_round(self):
        self.program = Program(self.addCleanup, "--quiet")
        self.home = folder(self)
        at = ["--queue-url", self.aws("create-queue", "--queue-name", "jobs")["QueueUrl"]]
        self.assertEqual(self.aws("list-queues"), {"QueueUrls": at[1:]})
        sent = self.aws("send-message", *at, "--message-body", "h\u00e9")
        self.assertEqual(sent["MD5OfMessageBody"], "33fcd01258e6ba07ef405dc9e721f3a7")
        (message,) = self.aws("receive-message", *at)["Messages"]
        self.assertEqual((message["Body"], message["MessageId"]), ("h\u00e9", sent["MessageId"]))
        handle = message["ReceiptHandle"]
        self.assertIsNone(self.aws("delete-message", *at, "--receipt-handle", handle))


def as_it_was(model):
    """Return botocore's model of Amazon SQS with the query protocol's names back in it."""
    model = copy.deepcopy(model)
    metadata, shapes = model["metadata"], model["shapes"]
    metadata.pop("awsQueryCompatible", None)
    metadata.update(protocol="query", protocols=["query"], xmlNamespace=NAMESPACE.strip("{}"))
    for name, shape in shapes.items():
        for member, reference in shape.get("members", {}).items():
            if isinstance(FORM_NAMES.get(member), tuple):
                reference["locationName"], key, value = FORM_NAMES[member]
                shapes[reference["shape"]]["key"]["locationName"] = key
                shapes[reference["shape"]]["value"]["locationName"] = value
        if shape["type"] == "list":
            system = name == "MessageSystemAttributeList"
            spelled = "AttributeName" if system else re.sub("List$", "", name)
            shape["member"]["locationName"] = spelled
    for name, operation in model["operations"].items():
        if "output" in operation:
            operation["output"]["resultWrapper"] = f"{name}Result"
    code = "AWS.SimpleQueueService.NonExistentQueue"
    shapes["QueueDoesNotExist"]["error"] = {"code": code, "httpStatusCode": 400}
    return model


@unittest.skipUnless(BOTO3, "boto3 is not installed")
class Boto3Test(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "BOTO"))}
        patch = mock.patch.dict(os.environ, {**kept, **nothing, "NO_PROXY": "*"}, clear=True)
        patch.start()
        cls.addClassCleanup(patch.stop)
        cls.program = Program(cls.addClassCleanup, "--quiet")

    def client(self, protocol="json", service="sqs", secret="dummysecret"):
        import boto3
        import botocore.config
        import botocore.session

        core = botocore.session.Session()
        if protocol == "query":
            loader = core.get_component("data_loader")
            load = loader.load_service_model

            def load_as_it_was(name, kind, api_version=None):
                model = load(name, kind, api_version)
                return as_it_was(model) if (name, kind) == ("sqs", "service-2") else model

            loader.load_service_model = load_as_it_was
        host, port = self.program.address
        client = boto3.Session(botocore_session=core).client(
            service,
            region_name="us-east-1",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="dummykey",
            aws_secret_access_key=secret,
            config=botocore.config.Config(retries={"total_max_attempts": 1}),
        )
        self.addCleanup(client.close)
        return client

    def test_each_operation_is_understood(self):
        for protocol in ("json", "query"):
            self.call_each(self.client(protocol), protocol)

    def call_each(self, client, protocol):
        called = set()

        def call(operation, **given):
            called.add(operation)
            with self.subTest(f"{operation} in {protocol}"):
                method = re.sub("(?<!^)([A-Z])", r"_\1", operation).lower()
                return getattr(client, method)(**given)
            return {}

        def check(name, got, expected):
            with self.subTest(f"{name} in {protocol}"):
                self.assertEqual(got, expected)

        attribute = {"DataType": "Binary", "BinaryValue": b"\0\xff"}
        jobs = call("CreateQueue", QueueName=f"jobs-{protocol}", tags={"a": "1"}).get("QueueUrl")
        dead = call("CreateQueue", QueueName=f"dead-{protocol}").get("QueueUrl")
        found = call("GetQueueUrl", QueueName=f"jobs-{protocol}")
        check("found", found.get("QueueUrl"), jobs)
        urls = call("ListQueues", QueueNamePrefix=f"jobs-{protocol}").get("QueueUrls")
        check("listed", urls, [jobs])
        attributes = call("GetQueueAttributes", QueueUrl=dead, AttributeNames=["QueueArn"])
        arn = attributes.get("Attributes", {}).get("QueueArn", "none")
        check("arn", arn, f"arn:aws:sqs:us-east-1:000000000000:dead-{protocol}")
        policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 5})
        call("SetQueueAttributes", QueueUrl=jobs, Attributes={"RedrivePolicy": policy})
        sources = call("ListDeadLetterSourceQueues", QueueUrl=dead)
        check("sources", sources.get("queueUrls"), [jobs])
        call("TagQueue", QueueUrl=jobs, Tags={"b": "2", "c": ""})
        call("UntagQueue", QueueUrl=jobs, TagKeys=["a"])
        tags = call("ListQueueTags", QueueUrl=jobs).get("Tags")
        check("tags", tags, {"b": "2", "c": ""})
        account = {"AWSAccountIds": ["111111111111"], "Actions": ["SendMessage"]}
        call("AddPermission", QueueUrl=jobs, Label="one", **account)
        call("RemovePermission", QueueUrl=jobs, Label="one")
        given = {"QueueUrl": jobs, "MessageBody": "a\r\n<&", "MessageAttributes": {"k": attribute}}
        sent = call("SendMessage", **given)
        entries = [{"Id": str(n), "MessageBody": "b"} for n in range(3)]
        batch = call("SendMessageBatch", QueueUrl=dead, Entries=entries)
        check("sent", [entry["Id"] for entry in batch.get("Successful", [])], ["0", "1", "2"])
        asked = {"AttributeNames": ["All"], "MessageAttributeNames": ["All"]}
        received = call("ReceiveMessage", QueueUrl=jobs, **asked).get("Messages", [{}])[0]
        check("body", received.get("Body"), "a\r\n<&")
        check("attributes", received.get("MessageAttributes"), {"k": attribute})
        check("digest", received.get("MD5OfMessageAttributes"), sent.get("MD5OfMessageAttributes"))
        check("count", received.get("Attributes", {}).get("ApproximateReceiveCount"), "1")
        held = {"ReceiptHandle": received.get("ReceiptHandle", "none")}
        call("ChangeMessageVisibility", QueueUrl=jobs, **held, VisibilityTimeout=60)
        entry = {"Id": "x", **held}
        entries = [{**entry, "VisibilityTimeout": 90}]
        changed = call("ChangeMessageVisibilityBatch", QueueUrl=jobs, Entries=entries)
        check("changed", changed.get("Successful"), [{"Id": "x"}])
        call("DeleteMessage", QueueUrl=jobs, **held)
        entries = [entry, {"Id": "y", "ReceiptHandle": "none"}]
        deleted = call("DeleteMessageBatch", QueueUrl=jobs, Entries=entries)
        check("deleted", deleted.get("Successful"), [{"Id": "x"}])
        failed = [
            (one["Id"], one["Code"], one["SenderFault"]) for one in deleted.get("Failed", [])
        ]
        check("failed", failed, [("y", "ReceiptHandleIsInvalid", True)])
        task = call(
            "StartMessageMoveTask",
            SourceArn=arn,
            DestinationArn=arn.replace("dead", "jobs"),
            MaxNumberOfMessagesPerSecond=1,
        )
        tasks = call("ListMessageMoveTasks", SourceArn=arn).get("Results", [{}])
        check("task", tasks[0].get("Status"), "RUNNING")
        stopped = call("CancelMessageMoveTask", TaskHandle=task.get("TaskHandle", "none"))
        check("moved", type(stopped.get("ApproximateNumberOfMessagesMoved")), int)
        call("PurgeQueue", QueueUrl=jobs)
        call("DeleteQueue", QueueUrl=jobs)
        call("DeleteQueue", QueueUrl=dead)
        self.assertEqual(called, set(client.meta.service_model.operation_names))

    def test_errors_have_their_types(self):
        for protocol in ("json", "query"):
            client = self.client(protocol)
            given = {"QueueUrl": "none", "MessageBody": "a"}
            with self.subTest(protocol):
                with self.assertRaises(client.exceptions.QueueDoesNotExist) as caught:
                    client.send_message(**given)
                error = caught.exception.response["Error"]
                self.assertEqual(error["Code"], "AWS.SimpleQueueService.NonExistentQueue")
                wrong = self.client(protocol, secret="wrong")
                with self.assertRaises(client.exceptions.ClientError) as caught:
                    wrong.list_queues()
                error = caught.exception.response["Error"]
                self.assertEqual(error["Code"], "SignatureDoesNotMatch")

    def test_a_url_presigned_with_version_2_is_refused_with_a_hint(self):
        given = {"Bucket": "bucket", "Key": "key"}
        url = self.client(service="s3").generate_presigned_url("get_object", Params=given)
        self.assertIn("AWSAccessKeyId=", url)
        target = "/" + url.split("/", 3)[3]
        reply = self.program.handle(Request("GET", target, (("Host", HOST),), io.BytesIO()))
        self.assertEqual(reply.status, 400)
        error = ElementTree.fromstring(reply.body)
        self.assertEqual(error.findtext("Code"), "InvalidRequest")
        self.assertIn("s3v4", error.findtext("Message"))


# ==== Fuzzing ====
#
# A case begins valid and signed by the signer above, and is then spoilt in up to three places;
# some are made odd first and signed then.  Whether it may be answered 2xx is decided by a second
# reading of RFC 9112 and of the IAM User Guide, made for this, that knows no mercy but for what
# is said beside it.
#
# A case hangs on seed, kind and number, and a document's on what the few before it have left.


def must(held):
    if not held:
        raise ValueError("not as the specification has it")


TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TEXT_BYTES = bytes([9, *range(32, 127), *range(128, 256)])
TARGET_BYTES = bytes([*range(33, 127), *range(128, 256)])  # AWS takes them raw from 128 on, too


class Sighted(NamedTuple):
    """A request as the second reader sees it; `raw` are its bytes, `last` that it closes."""

    method: str
    target: str
    headers: tuple
    body: bytes
    raw: bytes = b""
    last: bool = False

    def values(self, name):
        return [value for given, value in self.headers if given.lower() == name]


def requests_in(data):
    """Return the requests that a strict reader sees in a stream, and what it cannot read."""
    seen, at = [], 0
    while not (seen and seen[-1].last):
        begin = at
        while data.startswith(b"\r\n", at):  # of empty lines one must be taken, more may be
            at += 2
        if at == len(data):
            break
        try:
            request = request_at(data, at)
        except ValueError:
            return seen, data[at:]
        at += len(request.raw)
        seen.append(request._replace(raw=data[begin:at]))
    return seen, b""


def request_at(data, at):
    """Return the request that begins there; ValueError if it is malformed, or incomplete."""
    end = data.index(b"\r\n\r\n", at)
    line, *fields = data[at:end].split(b"\r\n")
    method, target, version = line.split(b" ")
    must(method and not method.translate(None, TOKEN_BYTES))
    must(target.startswith(b"/") and b"#" not in target)
    must(not target.translate(None, TARGET_BYTES) and version in (b"HTTP/1.1", b"HTTP/1.0"))
    headers = tuple(map(field_of, fields))
    seen = Sighted(method.decode(), target.decode("latin-1"), headers, b"")
    lengths, codings = set(seen.values("content-length")), seen.values("transfer-encoding")
    must(len(seen.values("host")) == 1 or (version == b"HTTP/1.0" and not seen.values("host")))
    end += 4
    if codings:
        must(
            version == b"HTTP/1.1" and not lengths and [c.lower() for c in codings] == ["chunked"]
        )
        body, end = chunks_at(data, end)
    else:
        length = lengths.pop() if lengths else "0"
        must(not lengths and re.fullmatch("[0-9]{1,40}", length))
        must(len(data) >= end + int(length))
        body, end = data[end : end + int(length)], end + int(length)
    options = ",".join(seen.values("connection")).lower().split(",")
    last = version == b"HTTP/1.0" or "close" in [option.strip(" \t") for option in options]
    return seen._replace(body=body, raw=data[at:end], last=last)


def field_of(line):
    name, colon, value = line.partition(b":")
    must(name and colon and not name.translate(None, TOKEN_BYTES))
    must(not value.translate(None, TEXT_BYTES))
    return name.decode(), value.decode("latin-1").strip(" \t")


def chunks_at(data, at):
    """Return the content of a chunked body, and where it ends."""
    content = b""
    while True:
        end = data.index(b"\r\n", at)
        # What an extension says is nobody's business here; RFC 9112 has a grammar for it.
        size, _, extension = data[at:end].partition(b";")
        if extension:
            must(not extension.translate(None, TEXT_BYTES))
            size = size.rstrip(b" \t")
        must(size and not size.translate(None, b"0123456789ABCDEFabcdef"))
        at, size = end + 2, int(size, 16)
        if not size:
            break
        must(data[at + size : at + size + 2] == b"\r\n")
        content, at = content + data[at : at + size], at + size + 2
    while not data.startswith(b"\r\n", at):
        end = data.index(b"\r\n", at)
        field_of(data[at:end])
        at = end + 2
    return content, at + 2


class Proof(NamedTuple):
    """What proves that a request is signed."""

    service: str
    payload: str
    signature: str
    scope: str
    at: int


def proof(request, now):
    """Return what proves that one of the demo's keys has signed; ValueError if nothing does."""
    pairs = [tuple(part.decode("latin-1") for part in p) for p in query_pairs(request.target)]
    given = {name: value for name, value in pairs if name.startswith("X-Amz-")}
    headers = request.values("authorization")
    presigned = bool({"X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Signature"} & set(given))
    must(len(headers) + presigned == 1)
    if presigned:
        alike = [name.lower() for name, _ in pairs if name.lower().startswith("x-amz-")]
        must(len(alike) == len(given) and given["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256")
        stamp, tokens = given["X-Amz-Date"], [given.get("X-Amz-Security-Token", "")]
        credential, names, made = (
            given["X-Amz-" + name] for name in ("Credential", "SignedHeaders", "Signature")
        )
    else:
        scheme, _, rest = headers[0].partition(" ")
        must(scheme == "AWS4-HMAC-SHA256")
        # Blanks around the commas are the only freedom that clients take.
        parts = [part.strip(" \t").partition("=")[::2] for part in rest.split(",")]
        must(sorted(name for name, _ in parts) == ["Credential", "Signature", "SignedHeaders"])
        credential, made, names = (value for _, value in sorted(parts))
        dated_by = "x-amz-date" if request.values("x-amz-date") else "date"
        (stamp,) = request.values(dated_by)
        tokens = request.values("x-amz-security-token") or [""]
    at = seconds_of(stamp)
    key, scope = credential.split("/", 1)
    day, region, service, last = scope.split("/")
    must(last == "aws4_request" and day == amz_date(at)[:8] and region and service)
    (client,) = (
        c for c in (DEMO, SESSION) if [c.access_key_id, c.session_token] == [key, *tokens]
    )
    if "X-Amz-Expires" in given and presigned:
        must(re.fullmatch("[0-9]+", given["X-Amz-Expires"]))
        expires = int(given["X-Amz-Expires"])
        must(1 <= expires <= 604800 and at - 900 <= now <= at + expires)
    else:
        must(service != "s3" or not presigned)
        must(abs(now - at) <= 900)
    names = names.split(";")
    must(names == sorted(set(names)) and "host" in names and (presigned or dated_by in names))
    must(all(name == name.lower() and request.values(name) for name in names))
    for name, _ in request.headers:
        of_payload = service == "s3" and name.lower() == "x-amz-content-sha256"  # signed anyway
        must(not name.lower().startswith("x-amz-") or name.lower() in names or of_payload)
    payload = payload_of(request, service, given if presigned else {"": ""})
    path, query = plain_target(request.target, service, presigned)
    path = canonical_path(path, service)
    signed_ = signature(
        client, request.method, path, query, request.headers, names, payload, at, scope
    )
    must(signed_.hex == made)
    return Proof(service, payload, made, scope, at)


def query_pairs(target):
    query = target.partition("?")[2]
    must(not re.search("%(?![0-9A-Fa-f]{2})", query))
    # AWS takes `+` for a blank, `a` for `a=`, and nothing between two `&` for nothing.
    parts = [part.partition("=")[::2] for part in query.replace("+", " ").split("&") if part]
    unquote = urllib.parse.unquote_to_bytes
    return [(unquote(n.encode("latin-1")), unquote(v.encode("latin-1"))) for n, v in parts]


def plain_target(target, service, presigned=False):
    """Return path and query as `sign` wants them: resolved, and the query canonical."""
    pairs = [
        pair for pair in query_pairs(target) if not presigned or pair[0] != b"X-Amz-Signature"
    ]
    encoded = sorted((escaped(name, b""), escaped(value, b"")) for name, value in pairs)
    path, kept = target.partition("?")[0], []
    must(not re.search("%(?![0-9A-Fa-f]{2})", path))
    for segment in path.split("/"):
        if service == "s3":
            raw = urllib.parse.unquote_to_bytes(segment.encode("latin-1"))
            kept.append(escaped(raw, b""))
        elif segment == "..":
            kept.pop() if kept else must(False)
        elif segment not in ("", "."):
            kept.append(segment)
    if service != "s3":
        kept = ["", *kept, ""] if path.endswith("/") and kept else ["", *kept]
    return "/".join(kept) or "/", "&".join("=".join(pair) for pair in encoded)


def seconds_of(stamp):
    """Return the time of ISO 8601's basic format, or of RFC 9110's; a Date may have either."""
    if re.fullmatch("[0-9]{8}T[0-9]{6}Z", stamp):
        at = calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
        must(amz_date(at) == stamp)
        return at
    return int(email.utils.parsedate_to_datetime(stamp).timestamp())


def payload_of(request, service, given):
    """Return the payload line of a canonical request, which must be true."""
    declared = request.values("x-amz-content-sha256")
    must(len(declared) < 2)
    computed = sha256(request.body)
    if service != "s3":
        must(declared in ([], [computed]))
        return computed
    if not declared and "" not in given:
        declared = [given.get("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")]
    kinds = (CHUNKS, CHUNKS_TRAILER, UNSIGNED_TRAILER)
    must(declared in ([computed], ["UNSIGNED-PAYLOAD"], *([kind] for kind in kinds)))
    return declared[0]


TRAILERS = re.compile(
    # As some clients write them: LF alone, LF CR LF, and no empty line at the end.
    rb"((?:[^\r\n]+(?:\r\n|\n(?:\r\n)?))*)(?:\r\n)?"
)


def content_of(request, held):
    """Return the content of a body that is what its signatures and checksums say."""
    if not held.payload.startswith("STREAMING-"):
        return request.body
    (length,) = request.values("x-amz-decoded-content-length")
    must(re.fullmatch("[0-9]+", length))
    stream, pieces, given = io.BytesIO(request.body), [], []
    while True:
        line = stream.readline()
        size, semicolon, signed_with = line[:-2].partition(b";chunk-signature=")
        must(
            line.endswith(b"\r\n") and size and not size.translate(None, b"0123456789ABCDEFabcdef")
        )
        must(bool(semicolon) == (held.payload != UNSIGNED_TRAILER))
        given += [signed_with] if semicolon else []
        if not int(size, 16):
            break
        pieces.append(stream.read(int(size, 16)))
        must(len(pieces[-1]) == int(size, 16) and stream.read(2) == b"\r\n")
    lines = TRAILERS.fullmatch(stream.read())[1].decode("ascii")
    trailers = [line.partition(":")[::2] for line in re.split("[\r\n]+", lines) if line]
    trailers = [(name.lower(), value.strip(" \t")) for name, value in trailers]
    if given and trailers:
        name, value = trailers.pop()
        must(name == "x-amz-trailer-signature")
        given.append(value.encode())
    announced = ",".join(request.values("x-amz-trailer")[:1]).lower().split(",")
    announced = sorted(name.strip(" \t") for name in announced if name.strip(" \t"))
    must(announced == sorted(name for name, _ in trailers))
    must(bool(announced) == held.payload.endswith("-TRAILER"))
    if given:
        again = aws_chunked(pieces, held.signature, trailers, DEMO, held.scope, held.at)
        must(re.findall(rb"signature[=:]([0-9a-f]{64})\r\n", again) == given)
    content = b"".join(pieces)
    must(len(content) == int(length))
    for name, value in trailers:
        kind = name.rpartition("-")[2]
        must(kind not in ("crc32", "sha1", "sha256") or checksum(kind, content) == value)
    return content


def proven(request):
    """Return the proof of a request and its content, twice None if there is none."""
    try:
        held = proof(request, EXAMPLE_TIME)
        return held, content_of(request, held)
    except (ValueError, KeyError, TypeError, IndexError):
        return None, None


# ---- What cases are made of ----

ODD_WORDS = (
    *" \t,;=&/%+?.:~\"'\xe9\xff-", "", "..", "/./", "//", "%2F", "%2f", "%20", "%41", "%00", "%zz",
    "&&", "a", "A", "0", "-1", "9" * 30, "0" * 64, "host", "Host", "date", "x-amz-date", "sqs",
    "s3", "us-east-1", "aws4_request", "20150830", "20150831", "dummykey", "UNSIGNED-PAYLOAD",
    "X-Amz-Signature=", "X-Amz-Algorithm=AWS4-HMAC-SHA256", "AWS4-HMAC-SHA256", "Credential=",
    "SignedHeaders=", "Signature=", "&X-Amz-Date=20150830T123600Z", "&Action=DeleteQueue",
)  # fmt: skip
ODD_FIELDS = (
    ("X-Amz-Date", "20150830T123600Z"), ("X-Amz-Date", "20150830T120000Z"), ("Date", "x"),
    ("Date", "Sun, 30 Aug 2015 12:36:00 GMT"), ("X-Amz-Security-Token", "dummysession"),
    ("X-Amz-Security-Token", ""), ("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD"),
    ("X-Amz-Content-Sha256", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("Host", "localhost"), ("X-Amz-Target", "AmazonSQS.ListQueues"), ("X-Amz-Target", "x"),
    ("X-Amz-New", "1"), ("X-B", "1"), ("Content-Type", "application/json"), ("Accept", "*/*"),
    ("Authorization", "AWS4-HMAC-SHA256 Credential=a"), ("Authorization", "Basic eDp5"),
    ("Smithy-Protocol", "rpc-v2-cbor"), ("X-Http-Method-Override", "GET"),
)  # fmt: skip
STRANGERS = (
    DEMO._replace(access_key_id="stranger"),
    DEMO._replace(secret_access_key="other"),
    DEMO._replace(session_token="other"),
)
ODD_SIGNING = (
    *(("at", EXAMPLE_TIME + seconds) for seconds in (-86400, -901, -900, 900, 901)),
    *(("unsigned", (name,)) for name in ("host", "x-amz-date", "x-amz-meta-a", "x-b")),
    *(("scope", f"{day}/us-east-1/{{}}/aws4_request") for day in (20150829, 20150831, "")),
    *(("scope", f"20150830/{rest}") for rest in ("a/{}/aws4", "/{}/aws4_request", "a/{}/")),
    *(("client", client) for client in STRANGERS),
    *(("payload_hash", spelled) for spelled in ("UNSIGNED-PAYLOAD", "0" * 64, "", CHUNKS)),
)
ODD_PRESIGNING = (
    *(("at", EXAMPLE_TIME + seconds) for seconds in (-86400, -3601, -3600, 900, 901)),
    *(("expires", seconds) for seconds in (None, 0, 604800, 604801, -1)),
    *(("client", client) for client in STRANGERS),
)
ODD_PIECES = (
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\0", b" ", b"\t", b":", b";", b"\x0b", b"\x0c",
    b"\x1c", b"\x7f", b"\x85", b"\xff", b"0", b"/", b"%00", b"0\r\n\r\n", b"\r\n ", b"\r\r\n", b"",
    b"GET / HTTP/1.1\r\n\r\n",
)  # fmt: skip
ODD_LINES = (
    b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: +5", b"Content-Length: -1",
    b"Content-Length: 0x5", b"Content-Length: 5, 5", b"Content-Length: 5;", b"Content-Length:",
    b"Content-Length: 5\x0b", b"Content-Length: \xd9\xa3", b"Content-Length: 1_0",
    b"Content-Length: 10000", b"Content-Length: " + b"9" * 18, b"Content-Length: " + b"9" * 19,
    b"Content-Length: " + b"9" * 5000, b"Content-Length : 5", b"Content_Length: 5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding:\tCHUNKED ", b"Transfer-Encoding: identity",
    b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding:",
    b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: \"chunked\"", b"Transfer-Encoding",
    b"X: y\r\n Transfer-Encoding: chunked", b"X:\r\n\tContent-Length: 3", b"X: \0", b"X: a\rb",
    b"Host: b", b"Host: a b", b"Expect: 100-continue", b"Expect: 200-ok", b"Connection: close",
    b"Connection: x, Close", b"Connection: keep-alive", b"Upgrade: h2c", b"TE: trailers", b": x",
    b"X", b"", b"\xe9: 1", b"X-A: \xe9\x80", b"Trailer: X", b"X y: 1", b"X: " + b"y" * 70000,
    b"\r\n".join([b"X: y"] * 101),
)  # fmt: skip
ODD_TARGETS = (
    b"http://localhost:8081/", b"HTTP://a/?b", b"*", b"localhost:8081", b"//a/b", b"/../", b"",
    b"/?#a", b"/#", b"/a b", b"/\xe9", b"/%", b"/\x7f", b"\\", b"/?" + b"a" * 66000,
)  # fmt: skip
ODD_VERSIONS = (
    b"HTTP/1.0", b"HTTP/1.1 ", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.10",
    b"HTTP/01.1", b"HTTP/1,1", b"", b"X HTTP/1.1",
)  # fmt: skip
ODD_JSON = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-0",
        "01",
        "0x1",
        "1.",
        ".5",
        "9" * 5000,
        "1e99999",
    ),
    *('"\\ud800"', '"\\x"', '"\t"', "'a'", "tru", "[1,]", '{"a":1,}', '{"a":1,"a":2}', "", "/**/"),
    *("[" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 100000 + "]" * 100000, "\ufeff1"),
)
NESTED = tuple(
    "[" * depth + "]" * depth for depth in (30, 300, 930, 960, 970, 980, 990, 1000, 3000)
)
ODD_TOKENS = (
    *map(as_base64, (b"\xff", b"{}", b"[]", b'"a"', b"1", b"null", b"\xe9\0", b"[" * 3000)),
    *map(as_base64, (b'{"taskId":"a"}', b'{"taskId":[],"sourceArn":{}}')),
    "AQEB", "AQEBAAAA", "AQEB====", "=", "\udfff",
)  # fmt: skip
ODD_POLICIES = (
    *("{", "{}", "[]", "null", "1", '"a"', "NaN", '{"a":NaN}', '{"a":1e999}', '{"a":"\\ud800"}'),
    '{"deadLetterTargetArn":[],"maxReceiveCount":{}}', '{"deadLetterTargetArn":"x"}',
    '{"deadLetterTargetArn":"arn:aws:sqs:us-east-1:000000000000:dead","maxReceiveCount":1e2}',
    '{"deadLetterTargetArn":"arn:aws:sqs:us-east-1:000000000000:jobs","maxReceiveCount":"2"}',
    '{"deadLetterTargetArn":"\\ud800","maxReceiveCount":true}', '{"redrivePermission":[]}',
    '{"redrivePermission":"byQueue","sourceQueueArns":[[]]}', '{"redrivePermission":"denyAll"}',
    '{"redrivePermission":"byQueue","sourceQueueArns":{"a":1}}', '{"redrivePermission":null}',
    '{"Statement":null}', '{"Statement":{"Sid":[]}}', '{"Statement":[1,{"Sid":1},[]]}',
    '{"Statement":"a","Version":[]}', *NESTED, *(f'{{"a":{nested}}}' for nested in NESTED),
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, -1, 1, 10, 11, 901, 43201, 2**31, 2**63, 10**19, -(10**19), 10**25, 0.5,
    1e308, [], [[]], {}, {"": ""}, {"a": None}, {"Name": {"DataType": "String"}}, ["a"] * 11,
    ["", 1], "", "0", "x", "-0", "+1", "1e3", "1_0", " 1", "1\n", "\u0663", "\uff19", "9" * 30,
    "true", "All", ".*", "*", "a.*", "x" * 81, "x" * 300, "aws.a", "a..b", "\0", "\r\n\t",
    "\ud800", "\udc00\ud800", "\ufffe", "\U0001f600", "\xe9" * 80, "String", "Number.\ud800",
    "Binary.x", "Number", "DelaySeconds", "Policy", "RedrivePolicy", "RedriveAllowPolicy",
    "VisibilityTimeout", "QueueArn", "FifoQueue", "KmsMasterKeyId", "MessageRetentionPeriod",
    "AWSTraceHeader", "SendMessage", "/", "//", "http://a", "jobs", "jobs.fifo", ACCOUNT,
    "arn:aws:sqs:::", arn("jobs"), arn("dead"), *ODD_TOKENS, *ODD_POLICIES,
)  # fmt: skip
ODD_MEMBERS = {
    **dict.fromkeys(("TaskHandle", "NextToken", "ReceiptHandle"), ODD_TOKENS),
    **dict.fromkeys(("Policy", "RedrivePolicy", "RedriveAllowPolicy"), ODD_POLICIES),
}
ODD_CHARACTERS = "\ud800\udfff\0\x1b\x85\ufffe\U0001f600\r .:/\u0663"
ODD_NAMES = (
    *("", ".", "..", ".1", "1", "Action", "QueueUrl", "Attribute", "Attribute.1", "Tag.1.Key"),
    *("Attribute.1.Name", "Attribute.0.Name", "Attribute.-1.Name", "Attribute.9999999999.Name"),
    *("Attribute.\u0663.Name", "Attribute.1.Name.1", "Attributes", "Entries", "MessageAttribute"),
    *("MessageAttribute.1.Value", "SendMessageBatchRequestEntry.1", "AttributeName.x", "\xe9"),
    *("MessageAttribute.1.Value.StringListValue.1", "a." * 5000, "QueueUrl.1", "tags.1.Key", "\0"),
)


def tokens(text):
    return re.findall(r"%[0-9A-Fa-f]{2}|[A-Za-z0-9_.-]+|.", text, re.DOTALL)


def respelled(chance, text):
    """Return the text with a word of it dropped, doubled, moved, or spelled otherwise."""
    words = tokens(text) or [""]
    at = chance.randrange(len(words))
    what, word = chance.randrange(9), words[at]
    if what == 0:
        del words[at]
    elif what == 1:
        words.insert(at, word)
    elif what == 2:
        other = chance.randrange(len(words))
        words[at], words[other] = words[other], word
    elif what == 3:
        words[at] = word.swapcase()
    elif what == 4:
        inside = chance.randrange(len(word) + 1)
        words[at] = word[:inside] + chance.choice(ODD_WORDS) + word[inside:]
    elif what == 5 and word:
        inside = chance.randrange(len(word))
        code = chance.choice(("%%%02X", "%%%02x")) % (ord(word[inside]) & 255)
        words[at] = word[:inside] + code + word[inside + 1 :]
    elif what == 6:
        words[at] = chance.choice((*ODD_WORDS, word.upper(), word.lower(), word[:-1], word + word))
    else:
        words.insert(at, chance.choice(ODD_WORDS))
    return "".join(words)


def reordered(chance, text, joint):
    """Return the text with a part dropped, doubled, respelled, or the parts shuffled."""
    parts = text.split(joint)
    at, what = chance.randrange(len(parts)), chance.randrange(5)
    if what == 0:
        del parts[at]
    elif what == 1:
        parts.insert(chance.randrange(len(parts) + 1), parts[at])
    elif what == 2:
        chance.shuffle(parts)
    elif what == 3:
        parts[at] = respelled(chance, parts[at])
    else:
        parts.insert(at, chance.choice(ODD_WORDS))
    return joint.join(parts)


class Draft:
    """A request that is still worked on; what no framing lets through is left out at the end."""

    def __init__(self, method, target, headers, body):
        self.method = method
        self.target = target
        self.headers = list(headers)
        self.body = body

    def spoil(self, chance):
        what = chance.randrange(10)
        if what < 3:
            self.spoil_value(chance, "authorization")
        elif what < 4:
            self.spoil_value(chance, chance.choice(self.headers)[0].lower())
        elif what < 6:
            self.spoil_headers(chance)
        elif what < 9:
            self.spoil_target(chance)
        else:
            self.method = chance.choice(("GET", "POST", "PUT", "HEAD", "get", "X"))
            self.body = chance.choice((self.body, self.body + b"x", self.body[:-1]))

    def spoil_value(self, chance, name):
        for at, (given, value) in enumerate(self.headers):
            if given.lower() == name:
                joint = chance.choice((", ", ",", ";", "/"))
                changed = reordered(chance, value, joint) if chance.random() < 0.4 else None
                self.headers[at] = (given, changed or respelled(chance, value))

    def spoil_headers(self, chance):
        at, what = chance.randrange(len(self.headers)), chance.randrange(7)
        name, value = self.headers[at]
        if what == 0:
            del self.headers[at]
        elif what == 1:
            self.headers.insert(chance.randrange(len(self.headers) + 1), (name, value))
        elif what == 2:
            self.headers[at] = (name.swapcase(), re.sub("[ ,]", chance.choice((" ", "  ")), value))
        elif what == 3:
            chance.shuffle(self.headers)
        elif what == 4 and "," in value:
            self.headers[at : at + 1] = [(name, part) for part in value.split(",")]
        else:
            self.headers.insert(at, chance.choice(ODD_FIELDS))

    def spoil_target(self, chance):
        path, mark, query = self.target.partition("?")
        if query and chance.random() < 0.4:
            query = reordered(chance, query, "&")
        elif query and chance.random() < 0.6:
            query = respelled(chance, query)
        else:
            path = "/" + respelled(chance, path)[1:]
        self.target = path + mark + query

    def request(self):
        headers = [
            (name, re.sub("[^\t -~\x80-\xff]", "", value).strip(" \t"))
            for name, value in self.headers
        ]
        target = re.sub("[^!-~\x80-\xff]|#", "", self.target)
        return Sighted(self.method, target, tuple(headers), self.body)


def to_raw(request):
    """Return what a request looks like on the wire."""
    lines = [f"{request.method} {request.target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + request.body


def spoilt_bytes(chance, raw):
    """Return the bytes with a few of them replaced, mostly where lines end."""
    ends = [found.start() for found in re.finditer(b"[\r\n:; ]", raw)]
    at = chance.choice(ends) if ends and chance.random() < 0.7 else chance.randrange(len(raw) + 1)
    end = min(len(raw), at + chance.choice((0, 0, 1, 1, 2, 4, 30)))
    return raw[:at] + chance.choice((*ODD_PIECES, raw[at:end] * 2, raw[-9:])) + raw[end:]


def spoilt_wire(chance, raw):
    """Return the bytes of a request with one thing changed in its framing."""
    head, blank, body = raw.partition(b"\r\n\r\n")
    lines, what = head.split(b"\r\n"), chance.randrange(9)
    at = chance.randrange(1, len(lines)) if len(lines) > 1 else 0
    if what == 0:
        lines.insert(at, chance.choice(ODD_LINES))
    elif what == 1:
        chance.choice((lines.pop, lambda at: lines.append(lines[at])))(at)
    elif what == 2:
        words = lines[0].split(b" ")
        which = chance.randrange(len(words))
        odd = ((b"HEAD", b"get", b"PRI", b"G\xc9T", b""), ODD_TARGETS, ODD_VERSIONS)
        words[which] = chance.choice(odd[min(which, 2)])
        lines[0] = b" ".join(words)
    elif what == 3:
        name, _, value = lines[at].partition(b":")
        joint = chance.choice(
            (b" : ", b":\r\n ", b":\t", b"::", b": \0", b":\r\n\r\n", b":\n", b"\r:")
        )
        lines[at] = name + joint + value
    elif what == 4:
        body = chance.choice((body[:-1], body + b"\r\n", body + b"x", body[1:], b"", body * 2))
    elif what == 5:
        number = chance.choice((b"0", b"1", b"%d" % (len(body) + 1), b"%d" % (len(body) + 300)))
        lines = [re.sub(b"^(Content-Length: ).*", rb"\g<1>" + number, line) for line in lines]
    elif what == 6:
        blank = chance.choice(
            (b"\n\n", b"\r\n\n", b"\n\r\n", b"\r\r\n\r\n", b"\r\n \r\n", b"\r\n")
        )
    else:
        return spoilt_bytes(chance, raw)
    return b"\r\n".join(lines) + blank + body


def odd_chunks(chance, body):
    """Return a chunked body that is spelled in ways that are allowed, or not quite."""

    def odd(usual, *others):
        return chance.choice(others) if chance.random() < 0.12 else usual

    data = b""
    while body:
        size = chance.randint(1, len(body))
        line = b"%x" % size
        others = (
            b"0x" + line,
            b"+" + line,
            b" " + line,
            line + b" ",
            line + b";a=b",
            line + b" ;a",
        )
        more = (
            line.upper(),
            b"0" * 9 + line,
            b"0" * 30 + line,
            line + b";\r",
            line + b"\0",
            b"-1",
        )
        wrong = (b"%x" % (size + 1), b"%x" % (size - 1), b"f" * 16, b"", line + b";" + b"a" * 5000)
        end = odd(b"\r\n", b"\n", b"", b"\r\n\r\n", b"xx", b"\r")
        data += odd(line, *others, *more, *wrong) + odd(b"\r\n", b"\n", b"\r") + body[:size] + end
        body = body[size:]
    trailers = (
        b"X: y\r\n",
        b"X : y\r\n",
        b"X: y\n",
        b"Content-Length: 5\r\n",
        b"\0\r\n",
        b" y\r\n",
    )
    last = odd(b"0", b"000", b"0;a", b"00000000000000000", b"", b"-0", b"0 ")
    return (
        data + last + b"\r\n" + odd(b"", *trailers, b"X: y\r\n" * 102) + odd(b"\r\n", b"", b"\n")
    )


class Taker:
    """Answers what is meant for other services with the body it was sent, read in its own way."""

    may_block = False
    size = -1

    def answer(self, call, request_id):
        body = call.body if call.service == "s3" else io.BytesIO(awsproxy.read_again(call.body))
        content = b"".join(iter(lambda: body.read(self.size), b""))
        kind = ("Content-Type", "application/octet-stream")
        return Reply(200, (("x-amzn-RequestId", request_id), kind), content)


class Noted(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter())
        self.told = []

    def emit(self, record):
        self.told.append(self.format(record))


def deeper(frames, act):
    """Call with so many frames more on the stack."""
    return deeper(frames - 1, act) if frames else act()


# ---- The cases ----


class Fuzzer:
    """Makes cases and has them answered; AssertionError for the first that is not as it must be.

    `counts` tells how many cases of which kind were answered how.
    """

    KINDS = ("framing", "authorization", "target", "chunks", "document")
    CREATE = (("X-Amz-Target", "AmazonSQS.CreateQueue"), ("Content-Type", JSON_1_0))
    WORLD = 25  # cases in the same queues
    RICH = ("CreateQueue", "SendMessage", "SendMessageBatch", "SetQueueAttributes")  # in members

    def __init__(self, seed, **settings):
        self.seed = seed
        self.counts = {kind: dict.fromkeys(("2xx", "4xx", "cut"), 0) for kind in self.KINDS}
        self.cases = dict.fromkeys(self.KINDS, 0)
        self.noted = Noted()
        self.taker = Taker()
        sqs = awsproxy.Sqs(lambda: EXAMPLE_TIME)
        routes = (awsproxy.Route("sqs:*", awsproxy.Embedded(sqs)), awsproxy.Route("*", self.taker))
        self.proxy = Proxy(
            awsproxy.DEMO_CLIENTS,
            routes=routes,
            clock=lambda: EXAMPLE_TIME,
            max_body=3000,
            **settings,
        )
        self.running = None
        self.caller = None
        self.sent = b""

    def __enter__(self):
        logging.getLogger("awsproxy").addHandler(self.noted)
        self.running = Running(self.proxy)
        return self

    def __exit__(self, *_):
        wait_until(lambda: not self.running.server.connections)
        self.running.stop()
        logging.getLogger("awsproxy").removeHandler(self.noted)

    def case(self, kind, number):
        """Have one case answered."""
        self.cases[kind] += 1
        self.sent = b""
        try:
            getattr(self, kind)(random.Random(f"{self.seed} {kind} {number}"), number)
            assert not self.noted.told, "an error was logged"
        except Exception as error:
            told = f"seed {self.seed}, case {kind}:{number}: {error!r}\nsent: {self.sent!r}"
            logged, self.noted.told = self.noted.told, []
            raise AssertionError("\n".join([told, *logged])) from error

    def count(self, kind, status):
        """Count an answer, None for none; neither may be another than 2xx or 4xx."""
        assert status is None or status // 100 in (2, 4), f"answered {status}"
        self.counts[kind][f"{status // 100}xx" if status else "cut"] += 1

    # ---- Bytes on a connection ----

    def framing(self, chance, number):
        """Have valid requests before and behind a spoilt one, on one connection."""
        names, intact, self.taker.size = {}, set(), chance.choice((1000, -1))
        first = [self.call(chance, names, intact) for _ in range(chance.choice((0, 0, 1, 2)))]
        spoilt = self.call(chance, names, intact, odd=chance.random() < 0.3)
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            spoilt = spoilt_wire(chance, spoilt)
        marker = self.call(chance, names, intact)
        data = b"".join([*first, chance.choice((b"", b"", b"", b"\r\n", b"\n")), spoilt, marker])
        if chance.random() < 0.1:
            data = data[: max(len(data) - chance.randrange(500), 1)]
        cuts = {chance.randrange(len(data)) for _ in range(chance.choice((0, 0, 1, 2, 4)))}
        if chance.random() < 0.5:
            cuts.add(data.rfind(marker[:9]))
        if chance.random() < 0.01 and len(data) < 4000:
            cuts = set(range(len(data)))
        self.sent = data
        at = sorted({0, *cuts, len(data)})
        received = self.exchange(
            [data[a:b] for a, b in zip(at, at[1:])], chance.choice((0, 0, 0.001))
        )
        self.check_answers(data, received, names, intact)

    def call(self, chance, names, intact, odd=False):
        """Return the bytes of a signed request whose answer repeats a name; note which."""
        name = f"m{chance.randrange(90)}-{len(names)}"
        style = chance.choice(("json", "form", "decoy", "query", "object", "hashed"))
        method, target, body = "POST", "/", f"Action=CreateQueue&QueueName={name}".encode()
        content = f"/{name}<".encode() * chance.choice((1, 1, 500))
        if style == "query":
            method, body, made = "GET", b"", [("Host", HOST)]
            target = presign("GET", f"/?Action=CreateQueue&QueueName={name}&Version=2012-11-05")
        elif style == "object":
            method, target = "PUT", f"/bucket/{name}"
            trailers = [("x-amz-checksum-crc32", checksum("crc32", content))]
            kind = chance.choice((CHUNKS, CHUNKS_TRAILER, UNSIGNED_TRAILER))
            how = {"target": target, "trailers": trailers if kind != CHUNKS else ()}
            made, body = streamed(kind, (content[:5], content[5:]), **how)
        elif style == "hashed":
            method, target, body = "PUT", f"/bucket/{name}", content
            given = [("X-Amz-Content-Sha256", sha256(body))]
            made = sign(method, target, given, body, service="s3", payload_hash=sha256(body))
        elif style == "json":
            body = json.dumps({"QueueName": name}).encode()
            made = sign(method, target, self.CREATE, body)
        elif style == "form":
            made = sign(method, target, [FORM], body)
        else:  # whoever takes the body for requests answers this one
            inside = f'{{"QueueName":"decoy{name}"}}'.encode()
            made = sign(method, target, self.CREATE, inside)
            names[made[-1][1][-64:]] = f"decoy{name}"
            made += (("Content-Length", str(len(inside))),)
            body += b"&x=\r\n\r\n" + to_raw(Sighted(method, target, made, inside))
            made = sign(method, target, [FORM], body)
        names[(target if style == "query" else made[-1][1])[-64:]] = name
        extra = chance.choice(((), (), (), ("Expect: 100-continue",), ("Connection: keep-alive",)))
        lines = [f"{method} {target} HTTP/1.1", *(f"{n}: {v}" for n, v in made), *extra]
        if odd or (body and chance.random() < 0.3):
            lines.append("Transfer-Encoding: chunked")
            wire = odd_chunks(chance, body) if odd else in_chunks(body, chance.randint(20, 300))
        else:
            lines += [f"Content-Length: {len(body)}"] if body else []
            wire = body
        raw = "\r\n".join([*lines, "", ""]).encode() + wire
        if not odd:
            intact.update((raw, b"\r\n" + raw))
        return raw

    def exchange(self, pieces, pause):
        """Send the pieces on a connection of their own; return all that comes back."""
        received = []
        with socket.create_connection(self.running.address, timeout=DEADLINE) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    connection.sendall(piece)
                    if pause and len(pieces) < 9:
                        time.sleep(pause)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                received += iter(lambda: connection.recv(65536), b"")
        return b"".join(received)

    def check_answers(self, data, received, names, intact):
        """Compare the answers, one by one, with the requests that the second reader sees."""
        seen, rest = requests_in(data)
        stream = io.BytesIO(received)
        for request in seen:
            answer = self.answer_of(stream, request.method == "HEAD")
            self.count("framing", answer and answer.status)
            assert answer, f"no answer to {request.raw}"
            if request.raw in intact:
                assert answer.status == 200, f"{answer.status} to {request.raw}"
            if answer.status < 300:
                held, content = proven(request)
                assert held, f"{answer.status} though not signed: {request.raw}"
                name = names[held.signature]
                told = f"another answer than that of {name}: {answer.body[:300]}"
                if request.method != "HEAD":
                    assert re.search(f'/{name}[<"]'.encode(), answer.body), told
                    assert held.service == "sqs" or answer.body == content, told
            assert answer.closes or not request.last, "not closed though asked to"
            if answer.closes:
                rest = None
                break
        if rest:
            head_only = rest.startswith(b"HEAD ")
            answer = self.answer_of(stream, head_only)
            self.count("framing", answer and answer.status)
            assert not answer or (answer.status >= 400 and answer.closes), f"{answer} to {rest}"
            if head_only:  # or not: what is left of a broken head decides
                return
        left = stream.read()
        assert not left, f"more answers than requests: {left}"

    @staticmethod
    def answer_of(stream, head_only):
        answer = read_answer(stream, head_only)
        while answer and answer.status == 100:
            answer = read_answer(stream, head_only)
        return answer

    # ---- Requests without a socket ----

    def settle(self, kind, request, intact):
        """Have a request answered and check the answer; return it."""
        self.sent = to_raw(request)
        body = io.BytesIO(request.body)
        given = Request(request.method, request.target, request.headers, body)
        reply = self.proxy.handle(given)
        self.count(kind, reply.status)
        self.check_readable(reply)
        held, content = proven(request)
        assert held or reply.status >= 400, f"{reply.status} though not signed"
        if held and reply.status < 300 and held.service != "sqs":
            assert reply.body == content, f"another content: {reply.body}"
        # Of what decides how a request is read, more must be signed than AWS says; and what
        # signs in the query is one mechanism too many in whatever case it is spelled.
        stricter = (b"which were not signed", b"Only one auth mechanism")
        if held and not any(told in reply.body for told in stricter):
            refused = b"SignatureDoesNotMatch" in reply.body or b"InvalidSignature" in reply.body
            assert not refused, f"refused though it is signed: {reply.body}"
        assert not intact or reply.status == 200, f"{reply.status} {reply.body}"
        return reply

    @staticmethod
    def check_readable(reply):
        """Check that the answer can be sent and is a document of its kind."""
        awsproxy.encode_reply(reply, DATE, False)
        kind = header(reply, "content-type")
        if "json" in kind and reply.body:
            json.loads(reply.body)
        elif "xml" in kind:
            ElementTree.fromstring(reply.body)

    @staticmethod
    def draft(chance):
        """Return a valid request that says enough to be worth spoiling, and how to sign it."""
        service = chance.choice(("sqs", "sqs", "s3", "execute-api"))
        how = {"service": service, "client": chance.choice((DEMO, SESSION))}
        headers = [("X-Amz-Meta-A", "one  two, 3"), ("X-B", "1"), ("X-B", "caff\xc3\xa0")]
        path = chance.choice(("/", "/a/b%20c", "/a//b/", "/%C3%A9/x~y", "/000000000000/jobs"))
        if service != "s3" and chance.random() < 0.3:
            path = chance.choice(("/a/../", "/./a/b/../c", "//a/."))
        query = chance.choice(("", "k=&l=%2F&a=1", "b=2&a=1&a=1&a-b=c"))
        method, body = "POST", b"hello, x=1"
        if service == "sqs":
            query += ("&" if query else "") + "Action=ListQueues&QueueNamePrefix=a%2Bb"
            path, body = path if path[-4:] != "jobs" else "/", b""
        hashed = sha256(body)
        if service == "s3":
            method, hashed = "PUT", chance.choice((hashed, "UNSIGNED-PAYLOAD"))
            how["payload_hash"] = hashed
        if service == "s3" or chance.random() < 0.2:
            headers.append(("X-Amz-Content-Sha256", hashed))
        return method, f"{path}?{query}" if query else path, headers, body, how

    def signed_draft(self, chance, odd):
        """Return a draft that is signed, in an odd way if asked to."""
        method, target, headers, body, how = self.draft(chance)
        plain = "?".join(filter(None, plain_target(target, how["service"])))
        if chance.random() < 0.5:
            if chance.random() < 0.1:
                headers.append(("Date", email.utils.formatdate(EXAMPLE_TIME, usegmt=True)))
            if odd:
                name, value = chance.choice(ODD_SIGNING)
                how[name] = value.format(how["service"]) if name == "scope" else value
                if name == "payload_hash":
                    headers = [*headers[:3], ("X-Amz-Content-Sha256", value)]
            made = sign(method, plain, headers, body, **how)
            return Draft(method, target, made, body)
        headers = [pair for pair in headers if pair[0] != "X-Amz-Content-Sha256"]
        how["payload_hash"] = "UNSIGNED-PAYLOAD" if how["service"] == "s3" else sha256(b"")
        body = body if how["service"] == "s3" else b""
        how.update([chance.choice(ODD_PRESIGNING)] if odd else [])
        target = presign(method, plain, headers, **how)
        return Draft(method, target, [("Host", HOST), *headers], body)

    def authorization(self, chance, number):
        """Spoil what is signed, or how that is told."""
        odd = chance.random() < 0.15
        draft = self.signed_draft(chance, odd)
        times = 0 if odd else chance.choice((0, 1, 1, 1, 2, 3))
        for _ in range(times):
            draft.spoil(chance)
        self.settle("authorization", draft.request(), times == 0 and not odd)

    def target(self, chance, number):
        """Spoil path and query, and sign what has become of them, mostly."""
        method, target, headers, body, how = self.draft(chance)
        draft, times = Draft(method, target, headers, body), chance.choice((0, 1, 1, 2, 3))
        for _ in range(times):
            draft.spoil_target(chance)
        target, plain = draft.request().target, target
        with contextlib.suppress(ValueError):
            plain = "?".join(filter(None, plain_target(target, how["service"])))
        draft = Draft(method, target, sign(method, plain, headers, body, **how), body)
        if chance.random() < 0.2:
            draft.spoil_target(chance)
            times += 1
        self.settle("target", draft.request(), times == 0)

    def chunks(self, chance, number):
        """Spoil a body in aws-chunked form."""
        kind = chance.choice((CHUNKS, CHUNKS_TRAILER, UNSIGNED_TRAILER))
        content = bytes(chance.choice(b"abc\r\n;0") for _ in range(chance.randrange(60)))
        pieces = re.findall(b".{1,%d}" % chance.randint(1, 30), content, re.DOTALL)
        trailers = [
            (f"x-amz-checksum-{name}", checksum(name, content))
            for name in chance.sample(("crc32", "sha1", "sha256"), chance.randint(1, 2))
        ]
        how = {"trailers": trailers if kind != CHUNKS else ()}
        times = chance.choice((0, 1, 1, 2))
        if times and chance.random() < 0.1:
            how["length"] = chance.choice((len(content) + 1, len(content) - 1, "", "0x5", 10**30))
        elif times and chance.random() < 0.1:
            how["announced"] = chance.choice(("x-amz-checksum-crc32", "a,b", ",", "X-Amz-Meta-A"))
        made, body = streamed(kind, pieces, **how)
        for _ in range(times):
            body = self.spoilt_chunks(chance, body)
        draft = Draft("PUT", "/bucket/key", made, body)
        if times and chance.random() < 0.1:
            draft.spoil_headers(chance)
        self.taker.size = chance.choice((1, 7, 65536, -1))
        self.settle("chunks", draft.request(), times == 0)

    @staticmethod
    def spoilt_chunks(chance, body):
        lines = body.split(b"\r\n")
        at, what = chance.randrange(len(lines)), chance.randrange(7)
        if what == 0:
            lines.insert(at, lines[at])
        elif what == 1:
            del lines[at]
        elif what == 2:
            other = chance.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif what == 3:
            line = lines[at]
            others = (line.upper(), b"0" + line, line + b" ", b"1" + line[1:], b"0" + line[1:])
            lines[at] = chance.choice(others)
        elif what == 4:
            lines[at] = lines[at].replace(b":", b": ").replace(b";", b" ;")
        else:
            return spoilt_bytes(chance, body)
        return b"\r\n".join(lines)

    # ---- What the operations are given ----

    def renew(self, number):
        """Make queues with something in them, the same each time."""
        ids = map("{:08x}-0000-4000-a000-000000000000".format, itertools.count(1))
        self.caller = caller = Caller("json", new_id=ids.__next__, secret=b"secret")
        self.url = caller.queue("jobs")
        caller.queue("dead")
        self.fifo = caller.queue("jobs.fifo", FifoQueue="true", ContentBasedDeduplication="true")
        caller.queue("source", RedrivePolicy=redrive("dead", 3))
        caller.queue("gone")
        for body in "abcd":
            caller("SendMessage", QueueUrl=self.url, MessageBody=body)
            caller("SendMessage", QueueUrl=self.fifo, MessageBody=body, MessageGroupId="g")
        caller("AddPermission", QueueUrl=self.url, Label="l", AWSAccountIds=["1"], Actions=["*"])
        ordinary, ordered = caller.receive(self.url), caller.receive(self.fifo)
        self.handles = [m["ReceiptHandle"] for m in (*ordinary, *ordered)]

    def inputs(self, chance):
        """Return the operations, each with an input that is right in queues just made."""
        held, url = {"ReceiptHandle": self.handles[0]}, {"QueueUrl": self.url}
        attributes = {"a": string("1"), "b": {"DataType": "Binary", "BinaryValue": "YQ=="}}
        trace = {"AWSTraceHeader": string("Root=1")}
        entry = {"MessageBody": "m", "MessageAttributes": attributes}
        grouped = {"MessageGroupId": "g", "MessageDeduplicationId": "d"}
        settings = {"RedrivePolicy": redrive("dead", 3), "Policy": "{}", "DelaySeconds": "1"}
        settings["RedriveAllowPolicy"] = '{"redrivePermission":"denyAll"}'
        return {
            "AddPermission": {**url, "Label": "m", "AWSAccountIds": ["1"], "Actions": ["*"]},
            "CancelMessageMoveTask": {"TaskHandle": as_base64(b'{"taskId":"a","sourceArn":"b"}')},
            "ChangeMessageVisibility": {**url, **held, "VisibilityTimeout": 5},
            "ChangeMessageVisibilityBatch": {
                **url,
                "Entries": [{"Id": "a", **held, "VisibilityTimeout": 5}, {"Id": "b", **held}],
            },
            "CreateQueue": {"QueueName": "new", "Attributes": settings, "tags": {"a": "b"}},
            "DeleteMessage": {**url, **held},
            "DeleteMessageBatch": {**url, "Entries": [{"Id": "a", **held}, {"Id": "b", **held}]},
            "DeleteQueue": {"QueueUrl": url_of("gone")},
            "GetQueueAttributes": {**url, "AttributeNames": ["All", "QueueArn"]},
            "GetQueueUrl": {"QueueName": "jobs", "QueueOwnerAWSAccountId": ACCOUNT},
            "ListDeadLetterSourceQueues": {
                "QueueUrl": url_of("dead"),
                "MaxResults": 1,
                "NextToken": "YQ==",
            },
            "ListMessageMoveTasks": {"SourceArn": arn("dead"), "MaxResults": 1},
            "ListQueueTags": url,
            "ListQueues": {"QueueNamePrefix": "j", "MaxResults": 1, "NextToken": "YQ=="},
            "PurgeQueue": url,
            "ReceiveMessage": {
                "QueueUrl": chance.choice((self.url, self.fifo, url_of("gone"))),
                "AttributeNames": ["All"],
                "MessageAttributeNames": ["a.*", "All"],
                "MaxNumberOfMessages": 2,
                "VisibilityTimeout": 5,
                "WaitTimeSeconds": 1,
                "ReceiveRequestAttemptId": "r",
            },
            "RemovePermission": {**url, "Label": "l"},
            "SendMessage": chance.choice((
                {**url, **entry, "DelaySeconds": 1, "MessageSystemAttributes": trace},
                {"QueueUrl": self.fifo, **entry, **grouped},
            )),
            "SendMessageBatch": chance.choice((
                {**url, "Entries": [{"Id": "a", **entry}, {"Id": "b", "MessageBody": "m"}]},
                {"QueueUrl": self.fifo, "Entries": [{"Id": "a", **entry, **grouped}]},
            )),
            "SetQueueAttributes": {**url, "Attributes": settings},
            "StartMessageMoveTask": {
                "SourceArn": arn("dead"),
                "DestinationArn": arn("jobs"),
                "MaxNumberOfMessagesPerSecond": 5,
            },
            "TagQueue": {**url, "Tags": {"a": "b"}},
            "UntagQueue": {**url, "TagKeys": ["a"]},
        }  # fmt: skip

    def document(self, chance, number):
        """Make an operation's input odd, and sign it."""
        fresh = number % self.WORLD == 0 or self.caller is None
        if fresh:
            self.renew(number)
        self.caller.clock.waits = 0
        inputs, raw = self.inputs(chance), {}
        operation = chance.choice((*sorted(inputs), *self.RICH, *self.RICH))
        given = copy.deepcopy(inputs[operation])
        times = 0 if fresh else chance.choice((0, 1, 1, 2, 3))
        for _ in range(times):
            spoil_document(chance, given, raw)
        try:
            spell = chance.choice((self.as_json, self.as_form))
            made = spell(chance, operation, given, raw, times)
        except (AttributeError, TypeError):  # no form has a text where a map is due
            made = self.as_json(chance, operation, given, raw, times)
        method, target, headers, body = made
        headers = sign(method, target, headers, body, at=int(self.caller.clock()))
        self.sent = to_raw(Sighted(method, target, headers, body))
        request = Request(method, target, headers, io.BytesIO(body))
        handle = functools.partial(self.caller.proxy.handle, request)
        reply = deeper(chance.choice((0, 0, 0, 15, 40)), handle)
        self.count("document", reply.status)
        self.check_readable(reply)
        unknown = operation == "CancelMessageMoveTask"  # none is ever slow enough to be cancelled
        expected = 404 if unknown else 200
        assert not fresh or reply.status == expected, f"{reply.status} {reply.body}"

    @staticmethod
    def as_json(chance, operation, given, raw, times):
        text = json.dumps(given, ensure_ascii=chance.random() < 0.8)
        for name, spelled in raw.items():
            text = text.replace(f'"{name}"', spelled)
        body = text.encode("utf-8", "surrogatepass")
        if times and chance.random() < 0.1:
            body = chance.choice((
                body[:-1], b"\xef\xbb\xbf" + body, text.encode("utf-16", "surrogatepass"),
                body * 2, b"[" + body + b"]", b"", b"null", spoilt_bytes(chance, body),
            ))  # fmt: skip
        elif times and chance.random() < 0.1:
            body = respelled(chance, text).encode("utf-8", "surrogatepass")
        target, kind = "/", ("Content-Type", chance.choice((JSON_1_0, JSON_1_1)))
        if chance.random() < 0.1:
            return "POST", f"/?Action={operation}", [kind], body
        return "POST", target, [("X-Amz-Target", f"AmazonSQS.{operation}"), kind], body

    @staticmethod
    def as_form(chance, operation, given, raw, times):
        fields = [("Action", operation), ("Version", "2012-11-05"), *form(operation, given)]
        fields = [(name, raw.get(str(value), value)) for name, value in fields]
        for _ in range(times):
            at, what = chance.randrange(len(fields)), chance.randrange(7)
            name, value = fields[at]
            if what == 0:
                name = re.sub("[0-9]+", chance.choice(("0", "2", "-1", "9" * 9, "01", "")), name)
                fields[at] = (name, value)
            elif what == 1:
                fields.append((chance.choice((*ODD_NAMES, name)), value))
            elif what == 2:
                fields[at] = (chance.choice((*ODD_NAMES, name + ".1", name.lower())), value)
            elif what == 3:
                fields[at] = (name, chance.choice(ODD_VALUES))
        fields = [
            tuple(str(text).encode("utf-8", "surrogatepass") for text in pair) for pair in fields
        ]
        body = "&".join("=".join(escaped(text, b"") for text in pair) for pair in fields).encode()
        of_queue = times or "QueueUrl" in given  # not all operations may be called on a queue
        path = chance.choice(("/", "/000000000000/jobs")) if of_queue else "/"
        headers = [chance.choice((FORM, FORM_UTF_8))]
        if chance.random() < 0.1:
            headers.append(("Accept", "application/json"))
        if chance.random() < 0.1 and len(body) < 9000:
            return "GET", f"{path}?{body.decode()}", headers[1:], b""
        if times and chance.random() < 0.2:
            body = spoilt_bytes(chance, body)
        return "POST", path, headers, body


def spoil_document(chance, document, raw):
    """Change one thing in a tree of dicts and lists; `raw` is for what JSON cannot spell."""
    places, found = [], [document]
    for node in found:
        keys = range(len(node)) if isinstance(node, list) else list(node)
        places += [(node, key) for key in keys]
        found += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    if not places:
        return
    (node, key), (other, there) = chance.choice(places), chance.choice(places)
    what, odd = chance.randrange(10), copy.deepcopy(chance.choice(ODD_VALUES))
    if key in ODD_MEMBERS and chance.random() < 0.5:
        what, odd = 0, chance.choice(ODD_MEMBERS[key])
    if what < 3:
        node[key] = odd
    elif what > 7 and isinstance(node[key], str):
        inside = chance.randrange(len(node[key]) + 1)
        node[key] = node[key][:inside] + chance.choice(ODD_CHARACTERS) + node[key][inside:]
    elif what == 3:
        del node[key]
    elif what == 4:
        node[key] = copy.deepcopy(chance.choice((other[there], [node[key]], {"a": node[key]})))
    elif what == 5 and isinstance(node, dict):
        name = chance.choice((str(odd), key.lower(), key + "s", str(there)))
        node[name] = node.pop(key)
    elif what == 6 and isinstance(node, dict):
        node[str(odd)] = copy.deepcopy(chance.choice(ODD_VALUES))
    else:
        name = f"raw {len(raw)}"
        node[key], raw[name] = name, chance.choice(ODD_JSON)


class FuzzTest(unittest.TestCase):
    """The first cases of a seed; `python test_awsproxy.py fuzz` goes on with others."""

    SEED = 1

    @classmethod
    def setUpClass(cls):
        cls.fuzzer = Fuzzer(cls.SEED).__enter__()
        cls.addClassCleanup(cls.fuzzer.__exit__)

    def run_cases(self, kind, cases):
        for number in range(cases):
            self.fuzzer.case(kind, number)
        return self.fuzzer.counts[kind]

    def assert_mixed(self, counts, share):
        """Expect neither all to be refused nor all to be answered: that would prove nothing."""
        cases = sum(counts.values())
        self.assertGreater(counts["2xx"], cases * share, counts)
        self.assertGreater(counts["4xx"], cases * share, counts)

    def test_no_bytes_bring_a_connection_out_of_step(self):
        self.assert_mixed(self.run_cases("framing", 500), 0.1)
        wait_until(lambda: not self.fuzzer.running.server.connections)

    def test_no_other_authorization_than_the_right_one_is_taken(self):
        self.assert_mixed(self.run_cases("authorization", 2500), 0.1)

    def test_no_target_is_taken_for_another_than_was_signed(self):
        self.assert_mixed(self.run_cases("target", 1500), 0.1)

    def test_no_chunked_body_is_taken_for_what_it_is_not(self):
        self.assert_mixed(self.run_cases("chunks", 1500), 0.1)

    def test_no_input_makes_an_operation_fail(self):
        self.assert_mixed(self.run_cases("document", 2000), 0.1)

    def test_a_proxy_that_verifies_nothing_is_found_out(self):
        with Fuzzer(self.SEED, verified=False) as fuzzer:
            for kind in ("framing", "authorization", "target", "chunks"):
                with (
                    self.subTest(kind),
                    self.assertRaisesRegex(AssertionError, "though not signed"),
                ):
                    for number in range(200):
                        fuzzer.case(kind, number)


def fuzz(argv):
    """Run cases of all kinds for so long, or one; exit 1 with the first that goes wrong."""
    parser = argparse.ArgumentParser(prog="test_awsproxy.py fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--case", metavar="KIND:NUMBER", help="this one alone")
    given = parser.parse_args(argv)
    print(f"seed {given.seed}", flush=True)
    cases = ((kind, number) for number in itertools.count() for kind in Fuzzer.KINDS)
    if given.case:
        kind, _, number = given.case.partition(":")
        first = int(number) // Fuzzer.WORLD * Fuzzer.WORLD if kind == "document" else int(number)
        cases = [(kind, each) for each in range(first, int(number) + 1)]
    began, violation = time.monotonic(), None
    with Fuzzer(given.seed) as fuzzer:
        try:
            for kind, number in cases:
                if time.monotonic() > began + given.seconds:
                    break
                fuzzer.case(kind, number)
        except AssertionError as error:
            violation = error
    for kind, counts in fuzzer.counts.items():
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        print(f"{kind + ':':15}{fuzzer.cases[kind]:7} cases; answers: {told}")
    print(f"{sum(fuzzer.cases.values()) / (time.monotonic() - began):.0f} cases a second")
    if violation:
        print(violation)
        raise SystemExit(1)


# ==== What README says ====


class DocumentationTest(unittest.TestCase):
    """Each console block of README is typed into a shell, each Python block run, in order."""

    @classmethod
    def setUpClass(cls):
        path = os.path.join(os.path.dirname(os.path.abspath(awsproxy.__file__)), "README.md")
        with open(path, encoding="utf-8") as readme:
            cls.text = readme.read()
        with open(awsproxy.__file__, encoding="utf-8") as source:
            cls.source = source.read()

    def blocks(self, *languages):
        pattern = f"^```({'|'.join(languages)})\n(.*?)^```$"
        return re.findall(pattern, self.text, re.MULTILINE | re.DOTALL)

    def test_its_blocks_do_what_they_say(self):
        program = Program(self.addCleanup)
        port, shell = program.address[1], {"PATH": os.environ["PATH"], "HOME": os.devnull}
        shell["PATH"] = os.path.dirname(sys.executable) + os.pathsep + shell["PATH"]
        for language, block in self.blocks("console", "python"):
            block = block.replace("localhost:8081", f"localhost:{port}")
            with self.subTest(block.splitlines()[0][:70]):
                if language == "python":
                    self.run_python(block)
                    continue
                for typed in re.findall(r"^\$ ((?:.*\\\n)*.*\n)((?:(?!\$ ).*\n)*)", block, re.M):
                    self.run_command(*typed, shell)

    def run_python(self, block):
        if "import boto3" in block and not importlib.util.find_spec("boto3"):
            return
        done = self.run_in([sys.executable, "-c", block], os.environ)
        if done.returncode or not done.stdout:
            self.fail(f"README's block\n\n{block}\nended with {done.returncode}:\n\n{done.stdout}")

    def run_command(self, command, expected, shell):
        if command.startswith("export "):
            shell.update(word.split("=", 1) for word in command.split()[1:])
            return
        if not shutil.which(command.split()[0], path=shell["PATH"]):
            return
        done = self.run_in(command, shell)
        pattern = ".*".join(map(re.escape, expected.strip().split("...")))
        if not re.search(f"^{pattern}$", done.stdout.strip(), re.DOTALL):
            self.fail(f"README's block\n\n$ {command}{expected}\nprinted:\n\n{done.stdout}")

    @staticmethod
    def run_in(command, environment):
        return subprocess.run(
            command,
            shell=isinstance(command, str),
            env={**environment, "PYTHONPATH": os.path.dirname(awsproxy.__file__)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE,
            text=True,
        )

    def test_its_hook_does_what_it_says(self):
        ((_, block),) = self.blocks("hook")
        hook = write(os.path.join(folder(self), "hook.py"), block)
        caller = Program(self.addCleanup, "--hook", hook).caller()
        url = caller.queue()
        caller("SendMessage", QueueUrl=url, MessageBody="m")
        (message,) = caller.receive(url, MessageAttributeNames=["All"])
        self.assertEqual(message["MessageAttributes"]["sent-by"]["StringValue"], "demo")
        with self.assertRaisesRegex(Refused, "no purging; 1 tried"):
            caller("PurgeQueue", QueueUrl=url)

    def test_it_shows_the_help_as_it_is(self):
        ((_, shown),) = self.blocks("text")
        words = awsproxy.build_parser().format_help().replace("optional arguments:", "options:")
        # argparse of other versions breaks lines elsewhere.
        shown, words = "".join(shown.split()), "".join(words.split())
        if shown != words:
            pairs = itertools.zip_longest(shown, words)
            at = next(at for at, (one, other) in enumerate(pairs) if one != other)
            start = max(at - 60, 0)
            self.fail(
                f"README's help differs from --help: {shown[start : at + 60]!r}"
                f" should be {words[start : at + 60]!r}"
            )

    def test_it_names_each_operation(self):
        named = set(re.findall(r"\w+", self.text))
        self.assertEqual(set(awsproxy.OPERATIONS) - named, set())

    def test_the_source_survives_being_pasted(self):
        self.assertTrue(self.source.isascii())
        self.assertEqual([line for line in self.source.splitlines() if len(line) > 99], [])

    def test_the_pure_chapters_name_nothing_impure(self):
        impure = {"time", "os", "random", "socket", "logging", "threading", "ssl", "select", "log"}
        first = self.source.index("# ==== 1. ")
        pure = self.source[first : self.source.index("# ==== 5. ")]
        names = {node.id for node in ast.walk(ast.parse(pure)) if isinstance(node, ast.Name)}
        self.assertEqual(names & impure, set())


# ==== How quick it is ====
#
# The client is one thread on plain sockets; the row "nothing" shows how quick it can be.
# The row "bare" is what http.server costs with nothing behind it, at its quickest; "plain" is
# the same as one would write it, and as it logs.


class Threads(http.server.ThreadingHTTPServer):
    request_queue_size = 128


class Nothing(http.server.BaseHTTPRequestHandler):
    """Answers whatever arrives, unread."""

    def handle(self):
        while self.connection.recv(65536):
            self.connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n" + b"x" * 60)


class Bare(http.server.BaseHTTPRequestHandler):
    """Reads a body and answers 60 bytes, as quickly as http.server can."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "60")
        self.end_headers()
        self.wfile.write(b"x" * 60)

    def log_message(self, *_):
        pass


class Plain(http.server.BaseHTTPRequestHandler):
    """Does the same as one would write it, in two writes, and with the line that is logged."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each call takes 40 ms
    do_POST = Bare.do_POST


class Sink(http.server.BaseHTTPRequestHandler):
    """Takes objects and forgets them; gives as many bytes as the path says."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 262144)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        left = int(self.path.rpartition("/")[2])
        self.send_response(200)
        self.send_header("Content-Length", str(left))
        self.end_headers()
        while left:
            left -= self.wfile.write(ZEROS[: min(left, len(ZEROS))])

    def log_message(self, *_):
        pass


ZEROS = bytes(262144)


def transfer(port, method, size):
    """Put or get an object of so many zeros; Amazon S3's signature covers the hash of it."""
    digest = hashlib.sha256()
    for _ in range(size // len(ZEROS) if method == "PUT" else 0):
        digest.update(ZEROS)
    target = f"/bucket/{size}"
    headers = [("X-Amz-Content-Sha256", digest.hexdigest())]
    how = {"service": "s3", "at": time.time(), "payload_hash": digest.hexdigest()}
    lines = [f"{n}: {v}" for n, v in sign(method, target, headers, **how)]
    length = size if method == "PUT" else 0
    head = "\r\n".join(
        [f"{method} {target} HTTP/1.1", *lines, f"Content-Length: {length}", "", ""]
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode())
        for _ in range(length // len(ZEROS)):
            connection.sendall(ZEROS)
        received = connection.recv(65536)
        left = size if method == "GET" else 0
        while left > len(received):
            left -= len(received)
            received = connection.recv(262144)
            if not received:
                raise SystemExit("the transfer broke off")


def transfers(port, size=1 << 28):
    """Return the seconds that four transfers at once take, of each method."""
    for method in ("PUT", "GET"):
        threads = [threading.Thread(target=transfer, args=(port, method, size)) for _ in range(4)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield method, time.perf_counter() - begin


def peak_memory(process):
    """Return the most bytes that were ever resident; 0 without /proc."""
    try:
        with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
            return int(re.search(r"VmHWM:\s+([0-9]+)", status.read())[1]) * 1024
    except OSError:
        return 0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start(*words, port=0, before=()):
    """Start a server; return its process, its port and the seconds until it listened."""
    port = port or free_port()
    begin = time.perf_counter()
    command = [*before, sys.executable, *words, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while time.perf_counter() < begin + DEADLINE:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process, port, time.perf_counter() - begin
        except ConnectionRefusedError:
            time.sleep(0.001)
    raise SystemExit(f"{command} does not listen")


def cpu_and_memory(process):
    """Return seconds used in user and kernel mode, and bytes resident; 0 without /proc."""
    try:
        with open(f"/proc/{process.pid}/stat", encoding="ascii") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return 0, 0
    ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return ticks, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def to_wire(headers, body):
    lines = ["POST / HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def prepared(operation, count=3000, **given):
    """Return a function to so many signed requests, all different, over and over."""
    body, at = json.dumps(given).encode(), time.time()
    target = ("X-Amz-Target", f"AmazonSQS.{operation}")
    differ = [(target, ("X-Number", str(number))) for number in range(count)]
    made = [to_wire(sign(headers=headers, body=body, at=at), body) for headers in differ]
    following = itertools.cycle(made).__next__
    return lambda answer: following()


def receive_and_delete(url):
    """Return a function to ReceiveMessage, and to DeleteMessage of what it was answered."""
    receive, at = prepared("ReceiveMessage", QueueUrl=url), time.time()
    names = ["host", "x-amz-date", "x-amz-target"]
    headers = list(zip(names, [HOST, amz_date(at), "AmazonSQS.DeleteMessage"]))
    scope = f"{amz_date(at)[:8]}/us-east-1/sqs/aws4_request"
    made = signature(DEMO, "POST", "/", "", headers, names, "", at, scope)
    canonical, text = made.canonical.encode(), made.text[:-64]
    given = (
        f"AWS4-HMAC-SHA256 Credential=dummykey/{scope},SignedHeaders={';'.join(names)},Signature="
    )
    key = b"AWS4dummysecret"
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")

    def request(answer):
        begin = answer.find(b'"ReceiptHandle":"') + 17
        if begin == 16:
            return receive(answer)
        handle = answer[begin : answer.index(b'"', begin)]
        body = b'{"QueueUrl":"%s","ReceiptHandle":"%s"}' % (url.encode(), handle)
        proof = (text + sha256(canonical + sha256(body).encode())).encode()
        proof = hmac.digest(key, proof, "sha256").hex()
        return to_wire((*headers, ("Authorization", given + proof)), body)

    return request


def receive_answer(connection):
    """Return the next answer; OSError where it breaks off."""
    answer = connection.recv(65536)
    head = answer.find(b"\r\n\r\n")
    if head < 0:
        raise ConnectionError("no whole head at once")
    length = answer.find(b"Content-Length: ", 0, head) + 16
    size = head + 4 + int(answer[length : answer.index(b"\r", length)])
    while len(answer) < size:
        more = connection.recv(65536)
        if not more:
            raise ConnectionError("it broke off")
        answer += more
    return answer


def drive(port, count, request, seconds=60.0, calls=sys.maxsize):
    """Call on so many connections for so long, or so often; return calls and seconds."""
    connections, poll = {}, select.poll()
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port))
        connections[connection.fileno()] = connection
        poll.register(connection, select.POLLIN)
    done, begin = 0, time.perf_counter()
    now = begin
    for connection in connections.values():
        connection.send(request(b""))
    while now < begin + seconds and done < calls:
        for number, _ in poll.poll():
            connection = connections[number]
            answer = receive_answer(connection)
            if not answer.startswith(b"HTTP/1.1 200 ") or answer.endswith(b"{}"):  # no message
                raise SystemExit(answer.decode())
            connection.send(request(answer))
            done += 1
        now = time.perf_counter()
    for connection in connections.values():
        connection.recv(65536)
        connection.close()
    return done, now - begin


def options(command, argv, **more):
    """Return what the words after a command say."""
    parser = argparse.ArgumentParser(prog=f"test_awsproxy.py {command}")
    parser.add_argument(
        "seconds", nargs="?", type=float, default=60, help="about how long it takes"
    )
    for name, text in more.items():
        parser.add_argument(f"--{name}", type=float, help=text)
    return parser.parse_args(argv)


def bench(argv):
    """Print how many calls a second there are, and what each costs the server: bench [SECONDS]."""
    if argv[1:2] == ["--port"]:  # started by `start`
        Threads(("127.0.0.1", int(argv[2])), globals()[argv[0]]).serve_forever()
    until = time.perf_counter() + options("bench", argv).seconds
    servers, rows, runs = [], [], {}
    try:
        for name in ("Nothing", "Bare", "Plain"):
            servers.append(start(__file__, "bench", name))
        for flags in ((), ("--quiet",)):
            servers.append(start(awsproxy.__file__, *flags))
        nothing, bare, plain, logged, quiet = servers
        os.environ.update(AWS_ACCESS_KEY_ID="AKIDEXAMPLE", AWS_SECRET_ACCESS_KEY="example")
        sink = start(__file__, "bench", "Sink")
        servers.append(sink)
        for _, port, _ in (nothing, sink):
            url = f"http://127.0.0.1:{port}"
            servers.append(start(awsproxy.__file__, "--quiet", "--upstream", url))
        forwarding, objects = servers[-2:]
        idle = cpu_and_memory(quiet[0])[1] / 1e6
        jobs, waiting = f"http://{HOST}/000000000000/jobs", f"http://{HOST}/000000000000/waiting"
        lists, pairs = prepared("ListQueues"), receive_and_delete(jobs)
        sends = prepared("SendMessage", QueueUrl=jobs, MessageBody="m" * 1024)
        rows = [("nothing", nothing, lists), ("bare", bare, lists), ("plain", plain, lists)]
        for told, server in (("", quiet), (", logged", logged)):
            for name in ("jobs", "waiting"):
                drive(server[1], 1, prepared("CreateQueue", 2, QueueName=name), calls=1)
            rows.append((f"ListQueues{told}", server, lists))
            rows.append((f"SendMessage, 1 KiB{told}", server, sends))
            rows.append((f"Receive, Delete in turn{told}", server, pairs))
        rows.append(("ListQueues, forwarded", forwarding, lists))
        entries = [{"Id": str(number), "MessageBody": "m"} for number in range(10)]
        fill = prepared("SendMessageBatch", 2, QueueUrl=waiting, Entries=entries)
        drive(quiet[1], 1, fill, calls=10000)
        rows.append(("Receive of 100,000", quiet, prepared("ReceiveMessage", QueueUrl=waiting)))
        each = max((until - time.perf_counter()) / len(rows) / 10, 0.05)
        for _, (name, server, request), n in itertools.product(range(5), rows, (1, 16)):
            before = cpu_and_memory(server[0])[0]
            done, took = drive(server[1], n, request, each)
            used = cpu_and_memory(server[0])[0] - before
            runs.setdefault((name, n), []).append((done, took, used))
        moved = [
            (*of_sink, through[1])
            for of_sink, through in zip(transfers(sink[1]), transfers(objects[1]))
        ]
        peak = peak_memory(objects[0]) / 1e6
    finally:
        for process, *_ in servers:
            process.terminate()
            process.wait()
    rate = {key: max(done / took for done, took, _ in runs[key]) for key in runs}
    cost = {key: min(1e6 * used / done for done, _, used in runs[key]) for key in runs}
    told = f"{'calls/s':>8}{'/bare':>6}{'CPU us':>8}{'/bare':>6}  "
    print(
        f"awsproxy {awsproxy.__version__}, Python {platform.python_version()}, {os.cpu_count()}"
        f" CPUs: listens after {quiet[2] * 1000:.0f} ms, idle {idle:.1f} MB;"
        f" best of 5 runs of {each:.2f} s\n\n{'':32}{'1 connection':30}16 connections\n"
        f"{'':32}{told}{told.rstrip()}"
    )
    for name, *_ in rows:
        pairs = [(of[name, n], of["bare", n]) for n in (1, 16) for of in (rate, cost)]
        cells = [
            f"{it:8.0f}{it / base:6.2f}" if base else f"{'-':>8}{'-':>6}" for it, base in pairs
        ]
        print(f"{name:32}{cells[0]}{cells[1]}  {cells[2]}{cells[3]}")
    for method, direct, through in moved:
        print(
            f"{method} of 4 x 256 MiB at once: {1074 / direct:.0f} MB/s direct,"
            f" {1074 / through:.0f} MB/s forwarded; at most {peak:.1f} MB resident"
        )


# ---- How it holds out ----
#
# Who abuses it does so in a process of its own, so as not to take the good clients' time.

SLOW_HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nX-Slow: "
QUEUES = [f"http://{HOST}/000000000000/queue-{number}" for number in range(10)]
FEW_FILES = ("sh", "-c", 'ulimit -n "$0" && exec "$@"')  # a limit and a command are to follow
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of a socket whose end is to be a reset


def open_many_files():
    """Be allowed as many open files as can be had; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connected(port, count, begun=b""):
    """Return so many connections on which a request has begun."""
    made = []
    for _ in range(count):
        made.append(socket.create_connection(("127.0.0.1", port), DEADLINE))
        made[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made[-1].sendall(begun)
    return made


def ready():
    """Tell `Abuser` that it has begun."""
    print("ready", flush=True)


def call_with_body(framing):
    """Return the head of a signed call whose body is framed so."""
    head, _, _ = prepared("ListQueues", 1)(b"").partition(b"\r\nContent-Length")
    return head + b"\r\n" + framing + b"\r\n\r\n"


def idle(port, count):
    kept = connected(port, count)
    ready()
    while kept:
        signal.pause()


def drip(begun, port, count):
    """Send a byte a second on each connection, and connect again where that fails."""
    wires = connected(port, count, begun)
    ready()
    turns = 20  # of a second
    for turn in itertools.cycle(range(turns)):
        time.sleep(1 / turns)
        for number in range(turn, count, turns):
            try:
                wires[number].send(b"a")
            except OSError:
                wires[number].close()
                (wires[number],) = connected(port, 1, begun)


def slow_heads(port, count):
    drip(SLOW_HEAD, port, count)


def slow_small_bodies(port, count):
    drip(call_with_body(b"Content-Length: 100000"), port, count)


def slow_large_bodies(port, count):
    drip(call_with_body(b"Content-Length: 1000000"), port, count)


def slow_chunks(port, count):
    drip(call_with_body(b"Transfer-Encoding: chunked") + b"f4240\r\n", port, count)


def polls(port, count):
    several = [prepared("ReceiveMessage", 300, QueueUrl=u, WaitTimeSeconds=20) for u in QUEUES]
    following = itertools.cycle(several).__next__
    callers = Callers(port, count)
    callers.send(lambda answer: following()(b""))
    ready()
    while True:
        callers.run(lambda answer: following()(b""), 3600)


def deaf(port, count):
    """Send calls until no more are taken, and read no answer."""
    following = prepared("ListQueues")
    wires = connected(port, count)
    for wire in wires:
        wire.setblocking(False)
    ready()
    while True:
        for wire in wires:
            with contextlib.suppress(OSError):
                while True:
                    wire.send(following(b""))
        time.sleep(0.1)


def churn(port, count):
    request = prepared("ListQueues")
    ready()
    while True:
        with contextlib.suppress(OSError):
            for wire in connected(port, count, request(b"")):
                with wire:
                    wire.recv(65536)


def resets(port, count):
    ready()
    while True:
        with contextlib.suppress(OSError):
            for wire in connected(port, count, SLOW_HEAD):
                with wire:
                    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def forgeries(port, count):
    """Make calls whose signature does not hold."""
    following, callers = prepared("ListQueues"), Callers(port, count)
    ready()
    while True:
        callers.run(lambda answer: following(b"").replace(b"umber: ", b"umber: 1"), 3600)


def rounds(port, count):
    """Send, receive and delete messages; each of the connections in turn."""
    sends = prepared("SendMessage", QueueUrl=QUEUES[0], MessageBody="m" * 1024)
    others = receive_and_delete(QUEUES[0])

    def request(answer):
        return others(answer) if b'"MessageId"' in answer else sends(answer)

    callers = Callers(port, count)
    ready()
    while True:
        callers.run(request, 3600)


ABUSES = {
    act.__name__: act
    for act in (
        idle, slow_heads, slow_small_bodies, slow_large_bodies, slow_chunks, polls, deaf, churn,
        resets, forgeries, rounds,
    )
}  # fmt: skip


class Abuser:
    """A process that does one of the abuses, until it is stopped."""

    def __init__(self, name, port, count):
        words = [sys.executable, __file__, "abuse", name, "--port", str(port), str(count)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE)
        if self.process.stdout.readline() != b"ready\n":
            self.stop()
            raise SystemExit(f"{name} did not get ready")

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Callers:
    """Clients on connections that are kept, all in this thread; what each call took is noted."""

    def __init__(self, port, count):
        self.wires = connected(port, count)
        self.begun = {}  # connection -> when its call began
        self.seconds = []  # what each call took
        self.statuses = collections.Counter()  # 0 for a connection that was cut

    def send(self, request, answer=b""):
        """Begin a call on each connection that has none."""
        for wire in self.wires:
            if wire not in self.begun:
                wire.send(request(answer))
                self.begun[wire] = time.perf_counter()

    def run(self, request, seconds):
        """Make calls for so long, and have the last ones answered; return calls a second."""
        self.seconds, self.statuses = [], collections.Counter()
        poll, begin = select.poll(), time.perf_counter()
        numbered = {wire.fileno(): wire for wire in self.wires}
        for wire in self.wires:
            poll.register(wire, select.POLLIN)
        self.send(request)
        while self.begun and time.perf_counter() < begin + seconds + DEADLINE:
            for number, _ in poll.poll(1000):
                wire = numbered[number]
                answer = self.answer(wire)
                if not answer:
                    poll.unregister(wire)
                    self.wires.remove(wire)
                    wire.close()
                elif time.perf_counter() < begin + seconds:
                    self.begun[wire] = time.perf_counter()
                    wire.send(request(answer))
        return len(self.seconds) / (time.perf_counter() - begin)

    def answer(self, wire):
        """Take an answer, and note what it took; b"" where there is none."""
        began = self.begun.pop(wire)
        try:
            answer = receive_answer(wire)
        except OSError:
            self.statuses[0] += 1
            return b""
        self.seconds.append(time.perf_counter() - began)
        self.statuses[int(answer[9:12])] += 1
        return answer

    def quantile(self, part):
        """Return in how many milliseconds that part of the calls was answered."""
        ordered = sorted(self.seconds) or [math.inf]
        return 1000 * ordered[min(int(part * len(ordered)), len(ordered) - 1)]

    def close(self):
        for wire in self.wires:
            wire.close()


def wait_until_idle(process):
    """Wait until the process uses no processor time for a tenth of a second."""
    used = [math.nan]

    def is_idle():
        time.sleep(0.1)
        used.append(cpu_and_memory(process)[0])
        return used[-1] == used[-2]

    wait_until(is_idle)


def new_calls(port, count=20, seconds=3):
    """Return the statuses of so many calls, each on a new connection: "cut" and "none" are two."""
    statuses, wires, until = collections.Counter(), [], time.monotonic() + seconds
    request = prepared("ListQueues", count)
    try:
        for _ in range(count):
            wires.append(socket.create_connection(("127.0.0.1", port), DEADLINE))
            with contextlib.suppress(ConnectionError):  # refused already: the answer may be there
                wires[-1].sendall(request(b""))
        for wire in wires:
            wire.settimeout(max(until - time.monotonic(), 0.01))
            try:
                statuses[int(receive_answer(wire)[9:12])] += 1
            except socket.timeout:
                statuses["none"] += 1
            except OSError:
                statuses["cut"] += 1
    finally:
        for wire in wires:
            wire.close()
    return statuses


def make_queues(port):
    for url in QUEUES:
        drive(port, 1, prepared("CreateQueue", 2, QueueName=url.rpartition("/")[2]), calls=1)


def end(process):
    process.kill()
    process.wait()


def hold_out(title, name, count, each, flags=(), before=()):
    """Print how 16 clients fare undisturbed, beside abusers, and undisturbed again."""
    request = prepared("ListQueues")
    with contextlib.ExitStack() as stack:
        process, port, _ = start(awsproxy.__file__, "--quiet", *flags, before=before)
        stack.callback(end, process)
        make_queues(port)
        callers = Callers(port, 16)
        stack.callback(callers.close)
        callers.run(request, each / 4)
        rates, memory, others = [], [cpu_and_memory(process)[1] / 1e6], []
        for disturbed in (False, True, False):
            abuser = Abuser(name, port, count) if disturbed else None
            if abuser:
                stack.callback(abuser.stop)
            rates.append(callers.run(request, each))
            statuses = dict(callers.statuses)
            if abuser:
                times = [callers.quantile(part) for part in (0.5, 0.99, 1)]
                failed = sum(statuses.values()) - statuses.get(200, 0)
                memory.append(cpu_and_memory(process)[1] / 1e6)
                others.append(new_calls(port))
                abuser.stop()
                time.sleep(0.6)  # until a server without files listens again
        others.append(new_calls(port))
        memory.append(cpu_and_memory(process)[1] / 1e6)
    usual = (rates[0] + rates[2]) / 2
    new = ", then ".join(
        " ".join(f"{times}x{status}" for status, times in sorted(of.items(), key=str))
        for of in others
    )
    print(
        f"{title:34}{rates[1]:8.0f}{rates[1] / usual:7.2f}"
        + "".join(f"{it:8.1f}" for it in times)
        + f"{failed:7}"
        + "".join(f"{it:7.0f}" for it in memory)
        + f"  {new}",
        flush=True,
    )


NOTING = """
import os
from awsproxy import Reply
file = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def before(call):
    os.write(file, call.input["MessageBody"].encode() + b"\\n")
    return Reply(200, (("x-amzn-RequestId", "r"),), b"{{}}")
"""
FORWARDING_KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "example"}


class Sent(NamedTuple):
    body: str
    began: float
    ended: float
    answer: object  # an Answer; None where the connection was cut


class Senders:
    """Clients in threads that send messages, no two the same, and note what becomes of each."""

    def __init__(self, address, count=16):
        self.address = address
        self.sent = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number):
        target, wire = ("X-Amz-Target", "AmazonSQS.SendMessage"), None
        for serial in itertools.count():
            if self._stopping.is_set():
                break
            body = f"{number}-{serial}"
            given = json.dumps({"QueueUrl": QUEUES[0], "MessageBody": body}).encode()
            data = to_wire(sign(headers=(target,), body=given, at=time.time()), given)
            began = time.monotonic()
            wire = wire or Wire(self.address)
            wire.send(data)
            try:
                answer = wire.answer()
            except AssertionError:
                answer = None
            self.sent.append(Sent(body, began, time.monotonic(), answer))
            if answer is None:
                wire.close()
                wire = None
            if answer is None or answer.status != 200:
                time.sleep(0.02)
        if wire:
            wire.close()


class Interrupted(NamedTuple):
    """What came of calls whose upstream was killed with the calls under way, and came back."""

    sent: list  # of Sent
    noted: list  # the bodies that arrived at the upstream, as often as they did
    killed: float
    back: float


def interrupt(stack, seconds):
    """Send through a proxy for so long, twice; in between its upstream is away for a while."""
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    noted = os.path.join(directory, "noted")
    hook = write(os.path.join(directory, "noting.py"), NOTING.format(path=noted))
    words = (awsproxy.__file__, "--no-verify", "--quiet", "--hook", hook)
    upstream, port, _ = start(*words)
    stack.callback(end, upstream)
    with mock.patch.dict(os.environ, FORWARDING_KEYS):
        there = ("--upstream", f"http://127.0.0.1:{port}")
        front, front_port, _ = start(awsproxy.__file__, "--quiet", *there)
    stack.callback(end, front)
    senders = Senders(("127.0.0.1", front_port))
    stack.callback(senders.stop)

    def answered(since):
        return any(
            it.answer and it.answer.status == 200 and it.began > since for it in senders.sent
        )

    time.sleep(seconds)
    wait_until(lambda: answered(0))
    killed = time.monotonic()
    end(upstream)
    time.sleep(seconds / 4)
    upstream, _, _ = start(*words, port=port)
    stack.callback(end, upstream)
    back = time.monotonic()
    time.sleep(seconds)
    wait_until(lambda: answered(back))
    senders.stop()
    with open(noted, encoding="ascii") as lines:
        return Interrupted(senders.sent, lines.read().split(), killed, back)


def print_interrupted(seconds):
    with contextlib.ExitStack() as stack:
        sent, noted, killed, back = interrupt(stack, seconds)
    statuses = collections.Counter(it.answer.status if it.answer else "cut" for it in sent)
    late = sum(it.began > back and (not it.answer or it.answer.status != 200) for it in sent)
    lost = {it.body for it in sent if it.answer and it.answer.status == 200} - set(noted)
    twice = [body for body, times in collections.Counter(noted).items() if times > 1]
    print(
        f"upstream killed, away for {back - killed:.1f} s: {dict(statuses)}; failed once it was"
        f" back: {late}, arrived twice: {len(twice)}, answered but not arrived: {len(lost)}"
    )


def files_and_threads(process):
    """Return how many files a process has open, and its threads; 0 without /proc."""
    with contextlib.suppress(OSError):
        at = f"/proc/{process.pid}"
        return len(os.listdir(f"{at}/fd")), len(os.listdir(f"{at}/task"))
    return 0, 0


def mixed(minutes):
    """Print the memory of two proxies, one forwarding to the other, under load of all kinds."""
    slice_seconds = min(max(60 * minutes / 20, 10), 300)
    until = time.monotonic() + 60 * minutes
    with contextlib.ExitStack() as stack:
        clients = [section("up", "AKIDEXAMPLE", "example"), section("demo", *DEMO[1:3])]
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        path = write(os.path.join(directory, "clients"), "".join(clients))
        inner, inner_port, _ = start(awsproxy.__file__, "--quiet", "--clients", path)
        stack.callback(end, inner)
        with mock.patch.dict(os.environ, FORWARDING_KEYS):
            there = ("--upstream", f"http://127.0.0.1:{inner_port}")
            front, front_port, _ = start(awsproxy.__file__, "--quiet", *there)
        stack.callback(end, front)
        make_queues(inner_port)
        told = f"{'MB':>8}{'files':>8}{'threads':>8}"
        print(f"{'':16}in memory{'':15}forwarding\n{'s':>8}{told}{told}{'calls/s':>10}")
        request, begin, rate = prepared("ListQueues"), time.monotonic(), 0
        while True:
            cells = "".join(
                f"{cpu_and_memory(of)[1] / 1e6:8.1f}{files:8}{threads:8}"
                for of in (inner, front)
                for files, threads in [files_and_threads(of)]
            )
            print(f"{time.monotonic() - begin:8.0f}{cells}{rate:10.0f}", flush=True)
            if time.monotonic() >= until:
                return
            request = prepared("ListQueues")
            with contextlib.ExitStack() as slice_stack:
                for port in (inner_port, front_port):
                    kinds = ("rounds", 8), ("polls", 50), ("forgeries", 2), ("churn", 4)
                    for name, count in (*kinds, ("resets", 4), ("slow_large_bodies", 20)):
                        slice_stack.callback(Abuser(name, port, count).stop)
                callers = Callers(inner_port, 4)
                slice_stack.callback(callers.close)
                left = max(until - time.monotonic(), 1)
                rate = callers.run(request, min(slice_seconds, left))


def abuse(argv):
    """Print how good clients fare beside bad ones: abuse [SECONDS], or abuse --minutes M."""
    if argv[1:2] == ["--port"]:  # started by `Abuser`
        ABUSES[argv[0]](int(argv[2]), int(argv[3]))
        return
    given = options(
        "abuse", argv, minutes="of all at once, to see its memory, in place of the rows"
    )
    most = open_many_files() - 200
    if given.minutes:
        mixed(given.minutes)
        return
    rows = [
        ("idle connections", "idle", 5000),
        ("slow heads", "slow_heads", 1000),
        ("slow bodies of 100 kB", "slow_small_bodies", 500),
        ("slow bodies of 1 MB", "slow_large_bodies", 500),
        ("slow chunks", "slow_chunks", 500),
        ("long polls", "polls", 1000),
        ("who read no answers", "deaf", 200),
        ("who connect, call and close", "churn", 16),
        ("who reset half a head", "resets", 16),
        ("forged calls", "forgeries", 16),
        ("connections beyond 256 files", "idle", 400, (), (*FEW_FILES, "256")),
        ("connections beyond the most", "idle", 84, ("--max-connections", "100")),
    ]
    each = given.seconds / len(rows) / 4
    print(
        f"awsproxy {awsproxy.__version__}, Python {platform.python_version()}, {os.cpu_count()}"
        f" CPUs: 16 clients beside others, {each:.1f} s each\n\n"
        f"{'':34}{'calls/s':>8}{'share':>7}{'p50 ms':>8}{'p99 ms':>8}{'most ms':>8}{'failed':>7}"
        f"{'MB':>7}{'during':>7}{'after':>7}  new ones during and after"
    )
    for title, name, count, *how in rows:
        count = min(count, most)
        hold_out(f"{count:,} {title}", name, count, each, *how)
    print()
    print_interrupted(each)


# ==== The official cases, as data ====

VECTORS = [
    Vector(
        "get-header-key-duplicate",
        True,
        False,
        [
            "GET / HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:value2",
            "My-Header1:value2",
            "My-Header1:value1",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;my-header1;x-amz-date, Signature=c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea",
        ],
        "dc7f04a3abfde8d472b0ab1a418b741b7c67174dad1551b4117b15527fbe966c",
        [
            "GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host%3Bmy-header1&X-Amz-Expires=3600&X-Amz-Signature=3349ee0b81b4b589da0ff28a395c3591e04de515651dd74f298fa992d1507a97 HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:value2",
            "My-Header1:value2",
            "My-Header1:value1",
        ],
        "fe8b58fb44117d598520befc07c144a5699c661a8db78f9ce4caee1655dec813",
    ),
    Vector(
        "get-header-value-multiline",
        True,
        False,
        [
            "GET / HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:value1",
            "  value2",
            "     value3",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;my-header1;x-amz-date, Signature=cfd34249e4b1c8d6b91ef74165d41a32e5fab3306300901bb65a51a73575eefd",
        ],
        "e99419459a677bc11de234014be3c4e72c1ea5b454ceb58b613061f5d7a162e8",
        [
            "GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host%3Bmy-header1&X-Amz-Expires=3600&X-Amz-Signature=e6f5def831211aca02987a44b96826706278c7bc078112ae0263659c5b2f2d56 HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:value1",
            "  value2",
            "     value3",
        ],
        "0e73c10e35324b4d215da4bb70be61d13a3d30d569be4ed6e8fd8948965341ca",
    ),
    Vector(
        "get-header-value-order",
        True,
        False,
        [
            "GET / HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:value4",
            "My-Header1:value1",
            "My-Header1:value3",
            "My-Header1:value2",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;my-header1;x-amz-date, Signature=08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01",
        ],
        "31ce73cd3f3d9f66977ad3dd957dc47af14df92fcd8509f59b349e9137c58b86",
        [
            "GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host%3Bmy-header1&X-Amz-Expires=3600&X-Amz-Signature=313720e71ca6202fdcfa9b20f88de01a4eb0638a83c833b1c184359a4eda864e HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:value4",
            "My-Header1:value1",
            "My-Header1:value3",
            "My-Header1:value2",
        ],
        "f4d3f13084ba7664111670ce26458291d3e0c620acd9384f8cd6b60d8e83423e",
    ),
    Vector(
        "get-header-value-trim",
        True,
        False,
        [
            "GET / HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1: value1",
            'My-Header2: "a   b   c"',
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;my-header1;my-header2;x-amz-date, Signature=acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
        ],
        "a726db9b0df21c14f559d0a978e563112acb1b9e05476f0a6a1c7d68f28605c7",
        [
            "GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host%3Bmy-header1%3Bmy-header2&X-Amz-Expires=3600&X-Amz-Signature=e7bb0fd515e125e1aec2ecc4c0c17484fb06f6846b927c35e46005dd3df3acd4 HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1: value1",
            'My-Header2: "a   b   c"',
        ],
        "84c9e353b6161b689210977f93b93e6a7182f9ecb2ceae8af8c3d86b080a88ae",
    ),
    Vector(
        "get-relative-normalized",
        True,
        False,
        [
            "GET /example/.. HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ],
        "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
        [
            "GET /example/..?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=e93c787ed7f371d5c6b165c1b38ede9550f4dce4144713e844b25b7192d3865d HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "bb7705b4aa3cb8e8f5e1e0b3d4c0b64030797a313c8ceee43e33117cc43eadc5",
    ),
    Vector(
        "get-relative-relative-normalized",
        True,
        False,
        [
            "GET /example1/example2/../.. HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ],
        "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
        [
            "GET /example1/example2/../..?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=e93c787ed7f371d5c6b165c1b38ede9550f4dce4144713e844b25b7192d3865d HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "bb7705b4aa3cb8e8f5e1e0b3d4c0b64030797a313c8ceee43e33117cc43eadc5",
    ),
    Vector(
        "get-relative-relative-unnormalized",
        False,
        False,
        [
            "GET /example1/example2/../.. HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=dc33e0856fd4baca4d7aa2146c38958283844764f38c74252a333df5e613003b",
        ],
        "76115030c0f3ff06c20fdff5ceb6d5e0b835a1743e00b94fea7c7f381269437b",
        [
            "GET /example1/example2/../..?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=b45db0bfd1cf15003493b733e33aa208dd981bd0e63037a6ed953f71d2118a16 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "13b7758115ec070fe36a7ae9d754154ad73f6ee9a5eac022494857d0e7effc18",
    ),
    Vector(
        "get-relative-unnormalized",
        False,
        False,
        [
            "GET /example/.. HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=eca7ead57bb5aa5c8e28007acd4ff04e1ff9a0ff3b237ec1554a184887ff9282",
        ],
        "0511f456aa502b456d135fcb9d749374a55228f9dbeedda1eacf659e05b0615b",
        [
            "GET /example/..?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=cbcb213b928a077e43275df47b500f1dfaa864ab3f5a18f6b95f4ff0938167ee HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "6e02e2dba21d6f269bae339b86ff27a4b7bbc9d88c482abccbfbf8a49d602482",
    ),
    Vector(
        "get-slash-dot-slash-normalized",
        True,
        False,
        [
            "GET /./ HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ],
        "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
        [
            "GET /./?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=e93c787ed7f371d5c6b165c1b38ede9550f4dce4144713e844b25b7192d3865d HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "bb7705b4aa3cb8e8f5e1e0b3d4c0b64030797a313c8ceee43e33117cc43eadc5",
    ),
    Vector(
        "get-slash-dot-slash-unnormalized",
        False,
        False,
        [
            "GET /./ HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=68714168e6557f8f2de0ef956fc24dc2593a4bd2961f8df51898d8a134695145",
        ],
        "d67825e2268bd77a97c7688b8d72c31a3c1855b309808505ba0a9747d2465aa7",
        [
            "GET /./?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=a9b13e8f3484d9505bf1a6f347219f8f35b0fe8f128ceea597efc146a3dfe90c HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "21b2da17873f30c1a7410efdc271738b318ccc2c9c6fbe1289fc242aeb1a8ae1",
    ),
    Vector(
        "get-slash-normalized",
        True,
        False,
        [
            "GET // HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ],
        "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
        [
            "GET //?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=e93c787ed7f371d5c6b165c1b38ede9550f4dce4144713e844b25b7192d3865d HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "bb7705b4aa3cb8e8f5e1e0b3d4c0b64030797a313c8ceee43e33117cc43eadc5",
    ),
    Vector(
        "get-slash-pointless-dot-normalized",
        True,
        False,
        [
            "GET /./example HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=ef75d96142cf21edca26f06005da7988e4f8dc83a165a80865db7089db637ec5",
        ],
        "214d50c111a8edc4819da6a636336472c916b5240f51e9a51b5c3305180cf702",
        [
            "GET /./example?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=35034b1a0bdd969f346975386daf8aedfd4976573b8348cf4f67eaa41c5857de HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "88dd73bb06de69cb042dbb82cadbb4fce1a2623615d94520c271614abf94e738",
    ),
    Vector(
        "get-slash-pointless-dot-unnormalized",
        False,
        False,
        [
            "GET /./example HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=beb03f223f7deae4146464f06e29eebbee9c8afbe15c290cf07aa8b119e14cff",
        ],
        "73895e0e829507e28e39fd24669aedc2434a8e179e547e3c075b42921f952cdb",
        [
            "GET /./example?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=72b11f16d9530b18204bfb71f2d6ab085894c0ed8d352730a6e76234c58b5e10 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "cb23444939471187ac1f0fb25d437337af0d5f48b5ae0ede5baa3727c8c6af92",
    ),
    Vector(
        "get-slash-unnormalized",
        False,
        False,
        [
            "GET // HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=c88bcd3d312d75078c0cd961d6deae3f4c754924b01669efcfcb439fd5e5b76e",
        ],
        "80cb39203d058af815de2b79250ff56e1b73eb9b4718c86556cdc6f150c5d209",
        [
            "GET //?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=b2a9542809db687769200f56a844a03f2bd0291d6eb90232d5101c6a579446cd HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "e10a01494cafa1f2207c4de80c69b7a36d6f2d282aa63ee64a5ca50e175cf730",
    ),
    Vector(
        "get-slashes-normalized",
        True,
        False,
        [
            "GET //example// HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=9a624bd73a37c9a373b5312afbebe7a714a789de108f0bdfe846570885f57e84",
        ],
        "cb96b4ac96d501f7c5c15bc6d67b3035061cfced4af6585ad927f7e6c985c015",
        [
            "GET //example//?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=c1834e8fb0307243711f0f907f6ab7311ed300d87f13792d7ee4da89ab93e082 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "1a3e3fe19998c62136ed2ff9c8531973a46d4a21b336f58e8fcad185ec64d642",
    ),
    Vector(
        "get-slashes-unnormalized",
        False,
        False,
        [
            "GET //example// HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=87cca117541a147f6df867677d98a7d80dff226d2bfca9e4ffa899665623c7e5",
        ],
        "528ec3105ee1f34ab014bb0a1a45da0ed2742a4fea3555149e5b4d5d201eb240",
        [
            "GET //example//?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=822a5a9ba28072c5ab2bb4a6307d0c88276d40e49fec6b724c03fb4d4ba60fc2 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "82241114f9a6320f054333c890952474aa7a0069d28a4326c3a8d95bbecc69ee",
    ),
    Vector(
        "get-space-normalized",
        True,
        False,
        [
            "GET /example space/ HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741",
        ],
        "63ee75631ed7234ae61b5f736dfc7754cdccfedbff4b5128a915706ee9390d86",
        [
            "GET /example space/?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=7a1f416954786484c9824d93c1f26ef64acb9b1b6c9154d08c9f07d0e394abf6 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "cc3dd817bd405e51225826ec4934a96d065d6af5b6b0163c7a5abbd26a84519e",
    ),
    Vector(
        "get-space-unnormalized",
        False,
        False,
        [
            "GET /example space/ HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741",
        ],
        "63ee75631ed7234ae61b5f736dfc7754cdccfedbff4b5128a915706ee9390d86",
        [
            "GET /example space/?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=7a1f416954786484c9824d93c1f26ef64acb9b1b6c9154d08c9f07d0e394abf6 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "cc3dd817bd405e51225826ec4934a96d065d6af5b6b0163c7a5abbd26a84519e",
    ),
    Vector(
        "get-unreserved",
        True,
        False,
        [
            "GET /-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f",
        ],
        "6a968768eefaa713e2a6b16b589a8ea192661f098f37349f4e2c0082757446f9",
        [
            "GET /-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=95968482db1b9e0fadef6efc1bd24689f77c77d9ef56919c96a28cc92e0d6005 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "3134f2fbc6ef58f34b74b01643a159bfccbc121ea4288a4b75e65bc805d08219",
    ),
    Vector(
        "get-utf8",
        True,
        False,
        [
            "GET /\u1234 HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85",
        ],
        "2a0a97d02205e45ce2e994789806b19270cfbbb0921b278ccf58f5249ac42102",
        [
            "GET /\u1234?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=10eae3f14a260bd3911cc6d008d3c576d143b05b62f09782a7a4b37f52178e44 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "d8f78e05d0d9bb1c16ae1e60ed405de76cfb8fdcd3e414ffe65fad563b996d66",
    ),
    Vector(
        "get-vanilla",
        True,
        False,
        [
            "GET / HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ],
        "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
        [
            "GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=e93c787ed7f371d5c6b165c1b38ede9550f4dce4144713e844b25b7192d3865d HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "bb7705b4aa3cb8e8f5e1e0b3d4c0b64030797a313c8ceee43e33117cc43eadc5",
    ),
    Vector(
        "get-vanilla-empty-query-key",
        True,
        False,
        [
            "GET /?Param1=value1 HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb",
        ],
        "1e24db194ed7d0eec2de28d7369675a243488e08526e8c1c73571282f7c517ab",
        [
            "GET /?Param1=value1&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=49096700cbbaa5753443850f40df10f904fc2fdb544dc9512203cc77c471a9de HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "74828b608f939673ed5a839190452a943b0178760f258da766209b21f8ca3f86",
    ),
    Vector(
        "get-vanilla-query",
        True,
        False,
        [
            "GET / HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ],
        "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
        [
            "GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=e93c787ed7f371d5c6b165c1b38ede9550f4dce4144713e844b25b7192d3865d HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "bb7705b4aa3cb8e8f5e1e0b3d4c0b64030797a313c8ceee43e33117cc43eadc5",
    ),
    Vector(
        "get-vanilla-query-order-encoded",
        True,
        False,
        [
            "GET /?Param-3=Value3&Param=Value2&%E1%88%B4=Value1 HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=371d3713e185cc334048618a97f809c9ffe339c62934c032af5a0e595648fcac",
        ],
        "868294f5c38bd141c4972a373a76654f1418a8e4fc18b2e7903ae45e8ae0ec71",
        [
            "GET /?Param-3=Value3&Param=Value2&%E1%88%B4=Value1&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=c5f1848ceec943ac2ca68ee720460c23aaae30a2300586597ada94c4a65e4787 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "9808d6cdc8245c74e705c68350fc6a62b91778cdd613890e5d177998c02c6f53",
    ),
    Vector(
        "get-vanilla-query-order-key-case",
        True,
        False,
        [
            "GET /?Param2=value2&Param1=value1 HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ],
        "816cd5b414d056048ba4f7c5386d6e0533120fb1fcfa93762cf0fc39e2cf19e0",
        [
            "GET /?Param2=value2&Param1=value1&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=86012e2c9ad4d77369f5d81c11f75158aae4f895a085212cc6d3f923d300bed5 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "b82878ecb2ab7ad194b9fe79b2946c2a36ee1627a219408089b2d774c1a0cedb",
    ),
    Vector(
        "get-vanilla-query-unreserved",
        True,
        False,
        [
            "GET /?-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz=-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197",
        ],
        "c30d4703d9f799439be92736156d47ccfb2d879ddf56f5befa6d1d6aab979177",
        [
            "GET /?-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz=-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=8e76a88a7433637b12778d5592799b29ad21ecd6cf6325051c21d86f0acda2bf HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "c77f27ef2b499fbfee3f0b3c88bba7057b2b31ee9b62047078a5e0d6be91fd58",
    ),
    Vector(
        "get-vanilla-utf8-query",
        True,
        False,
        [
            "GET /?\u1234=bar HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04",
        ],
        "eb30c5bed55734080471a834cc727ae56beb50e5f39d1bff6d0d38cb192a7073",
        [
            "GET /?\u1234=bar&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=0bdd809b1519ac4f0c1dc3540e2cc46bd0c7f778eda408b2ebf3b913d21ff600 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "b2e8ae8e48ec880defebc6f6dc1d9fbc9f1856b33146f2943060ca71a50a7a77",
    ),
    Vector(
        "get-vanilla-with-session-token",
        True,
        False,
        [
            "GET / HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Security-Token:6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date;x-amz-security-token, Signature=07ec1639c89043aa0e3e2de82b96708f198cceab042d4a97044c66dd9f74e7f8",
        ],
        "067b36aa60031588cea4a4cde1f21215227a047690c72247f1d70b32fbbfad2b",
        [
            "GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Security-Token=6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267&X-Amz-Signature=7ff2b50b376cb4d151970630573d6291dc128cc5c2a12ffb237f73cc53f67b6c HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "cb30434103085aa9e73780fc60dc9a9df818fd2a7b1de12a9f6f4d791f898761",
    ),
    Vector(
        "post-header-key-case",
        True,
        False,
        [
            "POST / HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
        ],
        "553f88c9e4d10fc9e109e2aeb65f030801b70c2f6468faca261d401ae622fc87",
        [
            "POST /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=2ce6e6d2e0cf2f9d1b55fafec88cd20574c31dc2e7631979f71ba2310083e95b HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "d27fc6fe1afc1d88b248c5ae9194ec0943a693dd6d81d8d815c88a369eb0471e",
    ),
    Vector(
        "post-header-key-sort",
        True,
        False,
        [
            "POST / HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:value1",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;my-header1;x-amz-date, Signature=c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c",
        ],
        "9368318c2967cf6de74404b30c65a91e8f6253e0a8659d6d5319f1a812f87d65",
        [
            "POST /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host%3Bmy-header1&X-Amz-Expires=3600&X-Amz-Signature=c09d07e0d55871f10f2a6d350d994acf6825a3cae70673d7def55616e6119dd7 HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:value1",
        ],
        "1295ed77e4ef8b18b32815e493e0b0f78ee47615c0ecbebfec7c75709eb58c88",
    ),
    Vector(
        "post-header-value-case",
        True,
        False,
        [
            "POST / HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:VALUE1",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;my-header1;x-amz-date, Signature=cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d",
        ],
        "d51ced243e649e3de6ef63afbbdcbca03131a21a7103a1583706a64618606a93",
        [
            "POST /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host%3Bmy-header1&X-Amz-Expires=3600&X-Amz-Signature=0698bc9e4f7f9139065ba2909c0e99da257e8e2a42492a097bcd46d792391fed HTTP/1.1",
            "Host:example.amazonaws.com",
            "My-Header1:VALUE1",
        ],
        "9d4d1de88f0149695a91a01275fc72dc00fb50bdc78e424f012ec860d5f8c41d",
    ),
    Vector(
        "post-sts-header-after",
        True,
        True,
        [
            "POST / HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Security-Token:AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
        ],
        "553f88c9e4d10fc9e109e2aeb65f030801b70c2f6468faca261d401ae622fc87",
        [
            "POST /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Security-Token=AQoDYXdzEPT%2F%2F%2F%2F%2F%2F%2F%2F%2F%2FwEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI%2FqkPpKPi%2FkMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d%2Bxo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz%2BscqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR%2FoLxBA%3D%3D&X-Amz-Signature=2ce6e6d2e0cf2f9d1b55fafec88cd20574c31dc2e7631979f71ba2310083e95b HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "d27fc6fe1afc1d88b248c5ae9194ec0943a693dd6d81d8d815c88a369eb0471e",
    ),
    Vector(
        "post-sts-header-before",
        True,
        False,
        [
            "POST / HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Security-Token:AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date;x-amz-security-token, Signature=85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead",
        ],
        "c237e1b440d4c63c32ca95b5b99481081cb7b13c7e40434868e71567c1a882f6",
        [
            "POST /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Security-Token=AQoDYXdzEPT%2F%2F%2F%2F%2F%2F%2F%2F%2F%2FwEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI%2FqkPpKPi%2FkMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d%2Bxo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz%2BscqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR%2FoLxBA%3D%3D&X-Amz-Signature=46c2e3c63c1dbe7d39f8ada16fe7f001c1f56c5791441565323677f96308871c HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "37f7ba7a2ec89e8b29a0d637bcc70d8e8d0fdba854ddfc5bc06a12398cfe8605",
    ),
    Vector(
        "post-vanilla",
        True,
        False,
        [
            "POST / HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
        ],
        "553f88c9e4d10fc9e109e2aeb65f030801b70c2f6468faca261d401ae622fc87",
        [
            "POST /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=2ce6e6d2e0cf2f9d1b55fafec88cd20574c31dc2e7631979f71ba2310083e95b HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "d27fc6fe1afc1d88b248c5ae9194ec0943a693dd6d81d8d815c88a369eb0471e",
    ),
    Vector(
        "post-vanilla-empty-query-value",
        True,
        False,
        [
            "POST /?Param1=value1 HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11",
        ],
        "9d659678c1756bb3113e2ce898845a0a79dbbc57b740555917687f1b3340fbbd",
        [
            "POST /?Param1=value1&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=a9ef26247f293bffe40eeff86a0480ba8c14d31503b2e0c3399e3a16bf1a3682 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "98241d1c6f938789d34b92e16e08b7fc8fdaa774c5437ba30d505eedae43dd2b",
    ),
    Vector(
        "post-vanilla-query",
        True,
        False,
        [
            "POST /?Param1=value1 HTTP/1.1",
            "Host:example.amazonaws.com",
            "X-Amz-Date:20150830T123600Z",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, Signature=28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11",
        ],
        "9d659678c1756bb3113e2ce898845a0a79dbbc57b740555917687f1b3340fbbd",
        [
            "POST /?Param1=value1&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=host&X-Amz-Expires=3600&X-Amz-Signature=a9ef26247f293bffe40eeff86a0480ba8c14d31503b2e0c3399e3a16bf1a3682 HTTP/1.1",
            "Host:example.amazonaws.com",
        ],
        "98241d1c6f938789d34b92e16e08b7fc8fdaa774c5437ba30d505eedae43dd2b",
    ),
    Vector(
        "post-x-www-form-urlencoded",
        True,
        False,
        [
            "POST / HTTP/1.1",
            "Content-Type:application/x-www-form-urlencoded",
            "Host:example.amazonaws.com",
            "Content-Length:13",
            "X-Amz-Date:20150830T123600Z",
            "x-amz-content-sha256:9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=content-length;content-type;host;x-amz-content-sha256;x-amz-date, Signature=d3875051da38690788ef43de4db0d8f280229d82040bfac253562e56c3f20e0b",
            "",
            "Param1=value1",
        ],
        "b1edd1d03544c25390e32085d55b57acc9a3961bb59415ff86c45c3d89d16cfb",
        [
            "POST /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=content-length%3Bcontent-type%3Bhost&X-Amz-Expires=3600&X-Amz-Signature=89a40deed0f26f9461242825a082d2222717248abc7ab41f552ad84a94ad46e9 HTTP/1.1",
            "Content-Type:application/x-www-form-urlencoded",
            "Host:example.amazonaws.com",
            "Content-Length:13",
            "",
            "Param1=value1",
        ],
        "ee5059a7c437165a28d0e775e6498be428761255d657d8c04cb1baa41de6514c",
    ),
    Vector(
        "post-x-www-form-urlencoded-parameters",
        True,
        False,
        [
            "POST / HTTP/1.1",
            "Content-Type:application/x-www-form-urlencoded; charset=utf-8",
            "Host:example.amazonaws.com",
            "Content-Length:13",
            "X-Amz-Date:20150830T123600Z",
            "x-amz-content-sha256:9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e",
            "Authorization:AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=content-length;content-type;host;x-amz-content-sha256;x-amz-date, Signature=328d1b9eaadca9f5818ef05e8392801e091653bafec24fcab71e7344e7f51422",
            "",
            "Param1=value1",
        ],
        "a89f1a5b53e37702ee6363ce1da3ce8f54386f3c8f352ae652153c2982a0bc4d",
        [
            "POST /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Fservice%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-SignedHeaders=content-length%3Bcontent-type%3Bhost&X-Amz-Expires=3600&X-Amz-Signature=0dbeb9b026c7b6675f266b8427efec9b4fa8b1f6ef1477d717aea231106eab4d HTTP/1.1",
            "Content-Type:application/x-www-form-urlencoded; charset=utf-8",
            "Host:example.amazonaws.com",
            "Content-Length:13",
            "",
            "Param1=value1",
        ],
        "32192353b8ae6d857fac1c71cda066e6af2d3a3127ea7ac1fee22621ab4f05dc",
    ),
]


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        bench(sys.argv[2:])
    elif sys.argv[1:2] == ["abuse"]:
        abuse(sys.argv[2:])
    elif sys.argv[1:2] == ["fuzz"]:
        fuzz(sys.argv[2:])
    else:
        unittest.main()
