"""``python -m realera_nodes`` and the command ``realera``.

Loading what the commands need takes seconds, so that a Ctrl-C may come while it is loaded; and output may have nowhere to go.
"""

import os
import signal
import sys
from types import FrameType

CANCELLED = b"cancelled: no file is half-written, the model is untouched.\n"


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends at once: an exception could be caught, or told as another one, by any of the modules that are being loaded."""
    os.write(2, CANCELLED)
    os._exit(130)


def main() -> None:
    """Runs a command; exit code 1 after an error of the user's or of the output's, 130 after Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    loading = before is signal.default_int_handler  # a background job ignores it
    if loading:
        signal.signal(signal.SIGINT, _leave)
    from .cli import app
    from .cli.common import explained, fail, silence

    if loading:
        signal.signal(signal.SIGINT, before)
    code: int | str | None = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        _leave(signal.SIGINT, None)
    except OSError as error:  # of help texts: commands tell their own
        silence(sys.stdout)
        fail(explained(error) or error)
        code = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        fail(explained(error) or error)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
