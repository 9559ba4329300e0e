"""Entry of `torchrun train_ddp.py [PRESET] --data DIR --out RUN`: parse the configuration, train."""

import sys

from trainer import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
