"""The layer pattern: one character per layer, `|` for a pipeline cut, nothing else."""

from __future__ import annotations

from .errors import PlanError

KIND_SYMBOLS = "M*-E"
PIPELINE_CUT = "|"


def parse_pattern(pattern: str) -> str:
    """The layer symbols of `pattern`, pipeline cuts left out.

    Raises:
        PlanError: a character that names no layer kind, or no layer at all.
    """
    for position, symbol in enumerate(pattern):
        if symbol not in KIND_SYMBOLS + PIPELINE_CUT:
            note = " ('/' is reserved for multi-token prediction)" if symbol == "/" else ""
            raise PlanError(
                f"model.pattern: character {symbol!r} at position {position} names no layer kind{note}; "
                f"accepted are M (Mamba-2), * (attention), - (MLP), E (experts) and | (pipeline cut)"
            )
    symbols = pattern.replace(PIPELINE_CUT, "")
    if not symbols:
        raise PlanError("model.pattern: no layer in it; write one character per layer, for example 'M-M*-E'")
    return symbols


def pattern_from_ratios(n_layers: int, attention: float, mlp: float) -> str:
    """Spread attention and MLP layers evenly among Mamba layers.

    The allocation of the 8B Mamba-2-Hybrid (Waleffe et al. 2024, "An Empirical Study of Mamba-based Language
    Models"): first `round(n·attention)` attention layers at equal distances, then `round(n·mlp)` MLP layers at
    equal distances among what is left.

    Args:
        n_layers: number of layers in all, Mamba layers included.
        attention: share of attention layers, 0 ≤ attention ≤ 1.
        mlp: share of MLP layers, attention + mlp ≤ 1.
    """
    n_attention, n_mlp = round(n_layers * attention), round(n_layers * mlp)
    if min(n_layers, n_attention, n_mlp) < 0 or n_attention + n_mlp > n_layers:
        raise PlanError(f"{n_attention} attention and {n_mlp} MLP layers do not fit into {n_layers} layers")
    layers = ["M"] * n_layers
    _place(layers, list(range(n_layers)), "*", n_attention, (n_layers - n_attention) / (n_attention + 1))
    if n_mlp:
        distance = (n_layers - n_attention - n_mlp) / n_mlp
        _place(layers, [i for i, symbol in enumerate(layers) if symbol == "M"], "-", n_mlp, distance)
    return "".join(layers)


def _place(layers: list[str], slots: list[int], symbol: str, count: int, distance: float) -> None:
    """Walk `slots`, writing `symbol` whenever `distance` other layers have gone by."""
    if not count:
        return
    remaining = distance
    for slot in slots:
        if remaining < 0.5:
            layers[slot] = symbol
            remaining += distance
        else:
            remaining -= 1
