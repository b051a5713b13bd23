"""What a program of this package runs first, before it imports anything that takes time: Ctrl-C without a traceback."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardstep.trainer.stopping.stop_requests import StopSignal

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""
STOPPED = 85
"""The exit code after a request to stop, where no agent would turn it into a failure."""
_MEETING_S = (
    5.0  # that ranks which are to stop still have to meet: a fraction of what batch systems wait before they kill
)


def main() -> int:
    """Entry point of the console script."""
    end_at_interrupt()
    from shardstep.launch import cli

    return cli.main()


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process at once, until `raise_interrupts`: it has nothing to clean up yet."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a background job of a shell
        signal.signal(signal.SIGINT, _end)


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on, if it would end this process."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _raise)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # held back by shardstep.train while Python starts


def raise_if_interrupted() -> None:
    """Raise an interrupt again that an import has swallowed ("Exception ignored in") or turned into an ImportError.

    Raises:
        KeyboardInterrupt: Ctrl-C has raised it before.
    """
    if _was_interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ending_at_signals(stop_signal: "StopSignal") -> Iterator[None]:
    """Let signals end this process in a block that waits for other ranks in C++, where no handler runs.

    Ctrl-C ends it at once. After another request to stop, the ranks may still meet for a while, to stop together.
    """
    from shardstep.trainer.distributed import launch_env

    is_over = threading.Event()
    ends_at_interrupt = signal.getsignal(signal.SIGINT) is _raise

    def watch() -> None:
        patience_s = _MEETING_S
        while not is_over.wait(0.1):
            if not stop_signal.has_arrived():
                continue
            if stop_signal.reason == signal.SIGINT.name and ends_at_interrupt:
                if launch_env.is_first_rank():
                    os.write(2, _MESSAGE)
                os._exit(INTERRUPTED)
            patience_s -= 0.1
            if patience_s < 0:
                os.write(2, f"stopped by {stop_signal.reason}, while waiting for the other ranks\n".encode())
                os._exit(0 if launch_env.has_agent() else STOPPED)

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    try:
        yield
    except Exception:
        if stop_signal.has_arrived():  # a rank that the signal has ended first broke the meeting
            watcher.join()  # ends this process, too
        raise
    finally:
        is_over.set()
        watcher.join()


_MESSAGE = b"interrupted\n"
_was_interrupted = False


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, _MESSAGE)
    os._exit(INTERRUPTED)


def _raise(number: int, frame: FrameType | None) -> None:
    global _was_interrupted
    _was_interrupted = True
    raise KeyboardInterrupt
