"""Where a training's time goes, on this machine."""

import os

# As train_ddp.py has it, which says why: what is measured is to be what trains.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
