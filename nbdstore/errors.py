"""The one exception tree of nbdstore.

Owns every exception that nbdstore raises on purpose; imports nothing, is imported by all::

    NbdstoreError
     +- InvalidArgument        a person's value makes no sense           exit 2, HTTP 400
     |   +- NotFound           no such pool, volume, export              exit 1, HTTP 404
     |   +- AlreadyExists      the name is taken                         exit 1, HTTP 409
     |   +- BadStream          a backup is damaged, cut off, or none     exit 1, HTTP 400
     |   +- WrongBase          a backup needs another state to build on  exit 1, HTTP 409
     +- Busy                   somebody uses it now                      exit 1, HTTP 409
     +- Cancelled              somebody ended the operation              exit 1, HTTP 409
     +- StoreError             the pool cannot do it
     |   +- PoolLocked         another process serves this pool
     |   +- PoolFormatError    not a pool, or of a format not known here
     |   +- Corruption         bytes on disk are not what was written: where, expected, found
     |   +- NoSpace            the pool, or the disk under it, is full   NBD ENOSPC
     |   +- NotFast            it would have to wait, which was ruled out NBD ENOTSUP
     |   +- PoolFailed         a sync failed; nothing is acknowledged until a restart
     |   +- ReadFailed         the disk returned an error for a read     NBD EIO
     |   +- WriteFailed        the disk returned an error for a write    NBD EIO
     +- DeviceError            a device cannot be attached, formatted, mounted or detached
     +- ProtocolError          the peer broke NBD's rules: the connection is dropped
     +- ControlError           the control API cannot be reached, or answered nonsense
     |   +- Unauthorized       the token is missing or wrong             exit 1, HTTP 401
     |   +- Forbidden          the token may look, not change            exit 1, HTTP 403
     |   +- UnknownPath        the API has no such path                  exit 1, HTTP 404
     |   +- UnknownMethod      the path has no such method               exit 1, HTTP 405
     |   +- BodyTooLarge       the request is larger than any needs      exit 1, HTTP 413
     +- PlatformError          a container platform is away, or refuses  exit 1, HTTP 502
     +- Bug                    nbdstore itself is wrong                  exit 1, HTTP 500

Every message says what was wrong, with the value, and what to do next; ``code`` is a stable
word for machines (the control API's problem type), so a client can rebuild the exception.
"""

from __future__ import annotations


class NbdstoreError(Exception):
    """Base of everything nbdstore raises on purpose; ``str()`` is one line for a person."""

    code = "error"
    exit_status = 1
    http_status = 500


class InvalidArgument(NbdstoreError):
    """A value given by a person or a client makes no sense."""

    code = "invalid-argument"
    exit_status = 2
    http_status = 400


class NotFound(InvalidArgument):
    """There is no pool, volume or export of that name."""

    code = "not-found"
    exit_status = 1
    http_status = 404


class AlreadyExists(InvalidArgument):
    """The name is taken."""

    code = "already-exists"
    exit_status = 1
    http_status = 409


class BadStream(InvalidArgument):
    """A backup stream is damaged, cut off, or not one at all."""

    code = "bad-stream"
    exit_status = 1


class WrongBase(InvalidArgument):
    """What is there is not what a backup stream builds on."""

    code = "wrong-base"
    exit_status = 1
    http_status = 409


class Busy(NbdstoreError):
    """Somebody is using what should be changed."""

    code = "busy"
    http_status = 409


class Cancelled(NbdstoreError):
    """Somebody ended the operation before it was done."""

    code = "cancelled"
    http_status = 409


class StoreError(NbdstoreError):
    """The pool cannot do what was asked."""

    code = "store-error"


class PoolLocked(StoreError):
    """Another process holds the pool."""

    code = "pool-locked"
    http_status = 409


class PoolFormatError(StoreError):
    """The directory holds no pool, or one whose format this version does not know."""

    code = "pool-format"


class Corruption(StoreError):
    """Bytes on disk are not what was written there.

    Arguments:
        where: file, offset and what should stand there.
        expected, found: checksums (or other values) as a person should see them.
        advice: what to do next; not part of `fault`, for lists of many.
    """

    code = "corruption"

    def __init__(self, where: str, expected: str, found: str, advice: str = "") -> None:
        self.where = where
        self.expected = expected
        self.found = found
        self.advice = advice
        self.fault = f"{where}: expected {expected}, found {found}"
        super().__init__(f"{self.fault}; {advice}" if advice else self.fault)


class NoSpace(StoreError):
    """The pool's capacity, or the disk it lies on, is used up."""

    code = "no-space"
    http_status = 507


class NotFast(StoreError):
    """It would have to wait, and was asked to fail instead."""

    code = "not-fast"


class PoolFailed(StoreError):
    """The pool stopped acknowledging writes, since a sync failed; restart to recover."""

    code = "pool-failed"
    http_status = 503


class ReadFailed(StoreError):
    """The disk under the pool returned an error for a read."""

    code = "read-failed"


class WriteFailed(StoreError):
    """The disk under the pool returned an error for a write or a sync."""

    code = "write-failed"


class DeviceError(NbdstoreError):
    """A device or filesystem of this machine is not as it should be, or cannot be made so."""

    code = "device-error"


class ProtocolError(NbdstoreError):
    """The peer broke a rule of NBD that leaves the byte stream without meaning: drop it."""

    code = "protocol-error"


class ControlError(NbdstoreError):
    """The control API of a server cannot be reached, or its answer makes no sense."""

    code = "control-error"


class Unauthorized(ControlError):
    """The control API wants a token that was not given, or another one."""

    code = "unauthorized"
    http_status = 401


class Forbidden(ControlError):
    """The token of the control API is one that may look, but not change anything."""

    code = "forbidden"
    http_status = 403


class UnknownPath(ControlError):
    """The control API has no such path: perhaps the server is older than the caller."""

    code = "unknown-path"
    http_status = 404


class UnknownMethod(ControlError):
    """The control API has this path, but not this method on it."""

    code = "unknown-method"
    http_status = 405


class BodyTooLarge(ControlError):
    """The body of a request is larger than any request needs."""

    code = "body-too-large"
    http_status = 413


class Bug(NbdstoreError):
    """The server met an error that nobody foresaw; its log says more."""

    code = "bug"


class PlatformError(NbdstoreError):
    """A container platform cannot be reached, or refused what it was asked for."""

    code = "platform-error"
    http_status = 502
