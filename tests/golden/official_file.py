"""Checkpoint files as the reference writes them, made from a golden's names and shapes and the formula's weights."""

import math

import torch

from tests.golden import formula
from tests.golden.cases import load, salt


def structure(tag):
    golden = load("checkpoint_structure")[tag]
    return golden, golden["case"]


def official_file(golden, path, optimizer=True, scaler=True, buffers=True, epoch=7, old=False):
    """Write one; returns the path. buffers: batch statistics by formula too, not the initial ones.

    old: the optimizer as torch 1.9 wrote it.
    """
    state = {name: entry(name.removeprefix("module."), shape, buffers) for name, shape, _ in golden["state_dict"]}
    content = {"epoch": epoch, "arch": golden["case"]["arch"], "state_dict": state}
    if optimizer:
        order = golden["optimizer"]["params_in_index_order"]
        content["optimizer"] = {
            "state": {
                index: optimizer_state(golden, order[index], state[order[index]].shape, old)
                for index in golden["optimizer"]["indices_with_state"]
            },
            "param_groups": [{**group_settings(golden, old), "params": list(range(len(order)))}],
        }
    if scaler:
        content["scaler"] = golden["scaler_state"]
    torch.save(content, path)
    return path


def entry(name, shape, buffers):
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(11 if buffers else 0)
    if leaf == "pos_embed":
        return sincos_table(shape)
    if leaf in ("running_mean", "running_var") and not buffers:
        return torch.zeros(shape) if leaf == "running_mean" else torch.ones(shape)
    if leaf == "running_mean":
        return torch.from_numpy(formula.array(salt(), f"buf|{name}", tuple(shape), 0.3))
    if leaf == "running_var":
        return torch.from_numpy(1 + 0.2 * abs(formula.array(salt(), f"buf|{name}", tuple(shape))))
    return torch.from_numpy(formula.weight(salt(), name, tuple(shape)))


def sincos_table(shape):
    _, tokens, width = shape
    grid, quarter = math.isqrt(tokens - 1), width // 4
    table = torch.zeros(shape)
    for token in range(1, tokens):
        for block, position in enumerate(divmod(token - 1, grid)):
            for i in range(quarter):
                angle = position * 10000 ** (-i / quarter)
                table[0, token, 2 * block * quarter + i] = math.sin(angle)
                table[0, token, (2 * block + 1) * quarter + i] = math.cos(angle)
    return table


def optimizer_state(golden, name, shape, old=False):
    """State of the parameter of that name in the file."""
    values = {
        key: torch.from_numpy(abs(formula.array(salt(), f"opt|{key}|{name}", tuple(shape), 1e-3)))
        for key in golden["optimizer"]["state_keys"]
        if key != "step"
    }
    return (
        {**values, "step": 3 if old else torch.tensor(3.0)} if "step" in golden["optimizer"]["state_keys"] else values
    )


def group_settings(golden, old):
    settings = {k: v for k, v in golden["optimizer"]["param_group_keys_this_torch"].items() if k != "params"}
    if old and "betas" in settings:
        settings = {key: settings[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
