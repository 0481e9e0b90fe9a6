"""Kill the process groups whose numbers come on stdin, once that ends: with pytest, however it ends."""

import os
import signal
import sys

groups = [int(line) for line in sys.stdin]
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        continue  # it ended by itself
