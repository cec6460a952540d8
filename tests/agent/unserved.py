"""An attachment whose server is not there, for what is asked without one."""

from __future__ import annotations

from nbdstore.agent.records import AttachRecord

RECORD = AttachRecord(
    id="0123456789abcdef",
    volume="db",
    volume_uuid="u",
    driver="fuse",
    created="now",
    export="db",
    address="127.0.0.1:1",
    request_timeout_s=10,
    dead_timeout_s=60,
)
