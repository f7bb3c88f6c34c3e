"""Thirty models on one small server: first with too low a memory threshold, then with the threshold raised live.

``make demo`` runs it, in about two minutes and without an account anywhere. Models are trained here, put into an S3
store on this machine and served by the Flask example under gunicorn; nothing is left behind but a picture,
``build/demo/timeline.png``. What is told is ``story``; here is how it is started and stopped.
"""

import argparse
import contextlib
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn


def main() -> int:
    """Tell the story; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of load in each of the two phases")
    parser.add_argument("--models", type=Path, help="a folder that keeps the trained models for the next run")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    try:
        import story  # noqa: PLC0415 - takes seconds, and Ctrl-C is answered meanwhile

        with contextlib.ExitStack() as stack:
            story.tell(stack, options.seconds, options.models)
    except KeyboardInterrupt:
        print("\nStopped; servers and temporary files are gone.")
        return 130
    return 0


def _stop(number: int, _: Any) -> NoReturn:
    """Stop, once: while servers are being ended, a further Ctrl-C would leave some behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
