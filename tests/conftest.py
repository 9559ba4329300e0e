"""One thread a process: many tests start several, and two spinning thread pools on busy cores crawl.

And a cache folder of their own: what a scan remembers is not for the user's. And no job of SLURM around them.
"""

import os
import tempfile

os.environ.pop("SLURM_JOB_ID", None)  # in such a job locks are waited for
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# torch reads it at the process's first matrix product on a GPU, and never again.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_CACHE = tempfile.TemporaryDirectory(prefix="moco-v3-tests-")  # removed with the process
os.environ["XDG_CACHE_HOME"] = _CACHE.name
