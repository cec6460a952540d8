"""Scripts for libnbd's shell, nbdsh, which has every command and flag at hand.

The shell belongs to the system's Python, which has libnbd; it runs as a program of its own.
"""

from __future__ import annotations

from textwrap import dedent

from tests.children import Children

PREAMBLE = '''
import errno, os, random

STRICT_NOTHING = 0

def same(found, expected):
    assert found == expected, f"expected {expected}, found {found}"

def expect(name, call, *arguments, **keywords):
    """Assert that a command fails with the error ``name``, such as "EINVAL"."""
    try:
        call(*arguments, **keywords)
    except nbd.Error as error:
        assert error.errno == name, f"expected {name}: {error}"
    else:
        raise AssertionError(f"expected {name}, but {call.__name__}{arguments} succeeded")

def extents(length, offset, flags=0):
    """Return {context: [(length, status), ...]} of a range."""
    found = {}
    def collect(context, start, entries, error):
        assert context not in found
        found[context] = list(zip(entries[::2], entries[1::2]))
    h.block_status(length, offset, collect, flags)
    return found

def chunks(length, offset, flags=0):
    """Return [(offset, length, nbd.READ_DATA or nbd.READ_HOLE), ...] of a read's reply."""
    found = []
    def collect(data, start, status, error):
        found.append((start, len(data), status))
    h.pread_structured(length, offset, collect, flags)
    return sorted(found)
'''


def nbdsh(
    children: Children,
    uri: str,
    script: str,
    *,
    contexts: tuple[str, ...] = (),
    timeout_s: float = 120,
) -> str:
    """Run a script with ``h`` connected to ``uri`` and return what it prints.

    The script has the functions of PREAMBLE. With an empty ``uri``, ``h`` is not connected yet.
    """
    __tracebackhide__ = True
    prepare = "".join(f"h.add_meta_context({context!r})\n" for context in contexts)
    connect = f"h.connect_uri({uri!r})\n" if uri else ""
    # From a file, so that a traceback shows the lines.
    path = children.directory / "script.py"
    path.write_text(PREAMBLE + prepare + connect + dedent(script))
    run = f"exec(compile(open({str(path)!r}).read(), {str(path)!r}, 'exec'))"
    # Only the system's python3 has libnbd, and nbdsh runs the first python3 of PATH.
    return children.run("nbdsh", "-c", run, env={"PATH": "/usr/bin:/bin"}, timeout_s=timeout_s)
