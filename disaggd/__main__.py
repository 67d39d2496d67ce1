"""`python -m disaggd`, and the `disaggd` script.

Ctrl-C ends the process at once, without a traceback, until `launch.interrupts_raise` says that somebody catches it.
"""

import os
import signal

from disaggd.errors import EXIT_INTERRUPTED

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job has it ignored
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))

from disaggd.cli import main  # what takes a third of a second, and may be interrupted

if __name__ == "__main__":
    main()
