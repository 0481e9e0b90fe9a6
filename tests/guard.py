"""Kills the process groups whose numbers it reads once its stdin ends: they outlive nobody, not even pytest."""

import os
import signal
import sys

groups = [int(line) for line in sys.stdin]
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        continue  # it ended by itself
