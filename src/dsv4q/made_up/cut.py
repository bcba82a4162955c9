"""A smaller model of the same kinds of layers: which layers, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4q.errors import UsageError
from dsv4q.layout import Dims


def chosen_layers(dims: Dims, count: int | None) -> tuple[int, ...]:
    """Numbers of `count` main layers: the first of each kind, then the lowest others; all of them for None.

    A kind is a compress ratio and a way of routing, by hash or by score.

    Raises:
        UsageError: not from 1 to the model's number of layers.
    """
    if count is None:
        return tuple(range(dims.layers))
    if not 1 <= count <= dims.layers:
        raise UsageError("There are not so many layers", where="--layers", expected=f"1 to {dims.layers}", found=count)
    first: dict[tuple[int, bool], int] = {}
    for layer, ratio in enumerate(dims.ratios):
        first.setdefault((ratio, layer < dims.hash_layers), layer)
    order = dict.fromkeys([*first.values(), *range(dims.layers)])
    return tuple(sorted(list(order)[:count]))


def cut_config(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The config.json of a model of these layers of `config`'s model, renumbered, and of its draft.

    A layer that DSpark looks at and that is cut away gives its place to the last one.
    """
    count, hashed = int(config["num_hidden_layers"]), int(config.get("num_hash_layers", 3))
    cut = dict(config)
    for key in ("compress_ratios", "layer_types", "mlp_layer_types"):
        if isinstance(config.get(key), list):
            cut[key] = [config[key][layer] for layer in layers] + config[key][count:]
    if "dspark_target_layer_ids" in config:
        numbers = {layer: number for number, layer in enumerate(layers)}
        targets = config["dspark_target_layer_ids"]
        cut["dspark_target_layer_ids"] = [numbers.get(layer, len(layers) - 1) for layer in targets]
    return cut | {"num_hidden_layers": len(layers), "num_hash_layers": sum(layer < hashed for layer in layers)}
