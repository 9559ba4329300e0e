"""Entry of `torchrun train_ddp.py [PRESET] --data DIR --out RUN`: parse the configuration, train."""

import os
import sys

# OpenMP reads it once, when torch loads. Idle threads that spin take the cores from DALI's: on two busy cores a step of
# the sample run took 36 ms with sleeping threads and up to 1.7 s with spinning ones.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from trainer import run

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # file names may be in any encoding
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))
