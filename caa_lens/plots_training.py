"""The figure of a fine-tuning: the loss of every step, and of every epoch on average."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caa_lens.figures import BLUE, ORANGE, Axes, Figure, canvas

if TYPE_CHECKING:
    from caa_lens.experiments.tuned import FinetuneResult


def plot_loss(result: FinetuneResult, *, ax: Axes | None = None) -> Figure:
    """The training loss against the step, with the mean of each epoch.

    Args:
        result: of `finetune`.
        ax: where to draw; a new figure by default.
    """
    made = result.provenance
    with canvas(ax, 4.8, 3.2) as (figure, (axis,)):
        axis.plot(result.log["step"], result.log["loss"], color=BLUE, marker=".", label="a step")
        epochs = result.log.groupby("epoch").agg({"step": ["min", "max"], "loss": "mean"})
        starts, ends = epochs["step"]["min"] - 0.5, epochs["step"]["max"] + 0.5
        axis.hlines(epochs["loss"]["mean"], starts, ends, color=ORANGE, linewidth=2, label="mean of an epoch")
        tokens = "the answer token" if made["loss"] == "answer" else "the completion's tokens"
        axis.set(xlabel="step", ylabel=f"loss on {tokens}\n(nats per token)", ylim=(0, None))
        axis.set_title(f"{made['pairs']}, {result.side} side, {result.method}")
        axis.legend(loc="best")
    return figure
