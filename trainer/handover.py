"""Rank 0 finds out what all ranks act on, and the others wait for it; an error is said once and ends all at once."""

import datetime
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dali_pipes import DatasetError
from trainer.config import ConfigError

Found = TypeVar("Found")
REPORTED = "moco_v3/reported"


def lead(
    store: dist.Store | None,
    key: str,
    find: Callable[[], Found],
    pack: Callable[[Found], Any],
    report: Callable[[Exception], Any],
) -> Found | None:
    """For rank 0: what `find` returns, once the other ranks have its `pack`, JSON-ready, under `key`.

    None, for all ranks, if `find` raised a ConfigError or DatasetError, which is given to `report`, or SystemExit: then
    tyro has said which flag is wrong. store: see `World.store`, None for a single process.
    """
    found: Found | None = None
    try:
        found = find()
    except (ConfigError, DatasetError) as error:
        report(error)
    except SystemExit:
        pass
    except BaseException:
        if store is not None:
            store.set(key, json.dumps(None))  # or the others would wait for ever
        raise
    if store is not None:
        store.set(key, json.dumps(None if found is None else pack(found)))
    return found


def follow(store: dist.Store | None, key: str) -> Any:
    """For the other ranks: what rank 0 packed; None if it was an error, which it has reported by now."""
    assert store is not None
    return json.loads(store.get(key))


def report_once(store: dist.Store | None, say: Callable[[], Any]) -> int:
    """Report a fatal error on the first rank that gets here; returns the exit code 2.

    Others that get here wait until it is printed: torchrun ends all ranks with the first that exits.
    """
    if store is None:
        say()
    elif store.add("moco_v3/reporting", 1) == 1:
        try:
            say()
        finally:
            store.set(REPORTED, "1")
    else:
        store.wait([REPORTED], datetime.timedelta(minutes=5))
    return 2


def reported(store: dist.Store | None) -> bool:
    """Whether another rank has said by `report_once` why all end."""
    return store is not None and store.check([REPORTED])
