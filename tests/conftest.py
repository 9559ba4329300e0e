"""One thread a process: many tests start several, and two spinning thread pools on busy cores crawl."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
