"""Ctrl-C ends an example with a line instead of a traceback, from here on: imported before what is slow."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LINE = "\nStopped before the end."
STATUS = 128 + signal.SIGINT  # As a shell counts it.


def stop_at_once(*_: Any) -> None:
    """Ends the process; an exception could get lost in the imports or the clean-up that it falls into."""
    try:
        print(LINE, file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:
        os._exit(STATUS)


@contextmanager
def stopped_by_hand(advice: str = "") -> Iterator[None]:
    """Around what computes: on Ctrl-C the devices come to rest, and the line may hold some advice."""
    at_once = signal.getsignal(signal.SIGINT) is stop_at_once
    if at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            yield
        finally:
            if at_once:
                signal.signal(signal.SIGINT, stop_at_once)
    except KeyboardInterrupt:
        wait_for_devices()
        print(LINE + advice, file=sys.stderr)
        raise SystemExit(STATUS) from None


def wait_for_devices() -> None:
    import jax

    # What still runs on the devices must not outlive the interpreter: it would crash. The step whose call
    # was interrupted left no array to wait for.
    jax.block_until_ready(jax.live_arrays())
    time.sleep(1)


def is_program() -> bool:
    """Whether an example is what Python runs, and not a notebook or a test that imports one."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    return program is not None and Path(program).resolve().parent == Path(__file__).resolve().parent


# Where Ctrl-C is ignored, as in the background of a shell script, it stays so.
if is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_at_once)
