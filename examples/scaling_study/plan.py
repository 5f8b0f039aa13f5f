"""The plan of a scaling study: sizes, numbers of tokens, learning rates and held-out runs."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.model_types import MODEL_TYPES

HEAD_DIM = 16
LAYERS = 2  # of each stack of an HRM; a Transformer's one stack has as many as both stacks of an HRM
TOKENS_PER_STEP = 1024
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
# Rate around which the search at the narrowest width is centred. As in the presets, the rate falls as 1 / width, so
# that an update changes outputs equally at every width (muP, arXiv 2203.03466).
FIRST_LR = 4e-3


@dataclass(frozen=True)
class Run:
    """One model to train, on `tokens` positions of packed rows."""

    model: str
    width: int
    tokens: int
    lr: float
    held_out: bool = False

    @property
    def steps(self) -> int:
        return self.tokens // TOKENS_PER_STEP

    def architecture(self, vocab_size: int) -> Architecture:
        kind = MODEL_TYPES[self.model]
        return Architecture(LAYERS * kind.preset_stacks, self.width, self.width // HEAD_DIM, 2 * self.width, vocab_size,
                            kind.h_cycles, kind.l_cycles, model_type=self.model)


@dataclass(frozen=True)
class Study:
    """Widths and tokens of the fitted runs; the run at `held_out_width` with the most tokens is predicted.

    At each of `lr_widths` all multiples of the rule's rate are tried, on the fewest tokens.
    """

    widths: Sequence[int]
    tokens: Sequence[int]
    held_out_width: int
    lr_widths: Sequence[int]
    models: Sequence[str] = ("hrm", "transformer")
    multiples: Sequence[float] = MULTIPLES

    def __post_init__(self) -> None:
        for width in (*self.widths, *self.lr_widths, self.held_out_width):
            if width < HEAD_DIM or width % HEAD_DIM:
                raise ConfigError(f"width {width}: not a multiple of {HEAD_DIM}, the width of a head; choose one")
        for tokens in self.tokens:
            if tokens < TOKENS_PER_STEP or tokens % TOKENS_PER_STEP:
                raise ConfigError(f"{tokens} tokens: not a multiple of {TOKENS_PER_STEP}, those of a step; choose one")
        if len({*self.widths}) < 3 or len({*self.tokens}) < 3:
            raise ConfigError(f"widths {list(self.widths)}, tokens {list(self.tokens)}: five numbers are fitted; give "
                              "at least 3 different ones of each")
        if self.held_out_width <= max(self.widths):
            raise ConfigError(f"held-out width {self.held_out_width}: the prediction is of a larger model than the "
                              f"fitted ones; give more than {max(self.widths)}")
        if not {*self.lr_widths} <= {*self.widths} or min(self.widths) not in self.lr_widths:
            raise ConfigError(f"rates are tried at widths {list(self.lr_widths)}: choose from {list(self.widths)}, the "
                              f"narrowest, {min(self.widths)}, among them")

    def rate(self, width: int, multiple: float) -> float:
        """Return `multiple` times the rule's rate at this width."""
        return multiple * FIRST_LR * min(self.widths) / width

    def trials(self) -> list[Run]:
        """Return the runs that search for the best rate."""
        return [Run(model, width, min(self.tokens), self.rate(width, multiple))
                for model in self.models for width in sorted(self.lr_widths) for multiple in self.multiples]

    def runs(self, multiples: Mapping[str, float]) -> Iterator[Run]:
        """Yield the runs that the law is fitted to, cheapest first for each model, then the held-out ones, with these
        multiples of the rule's rate."""
        for model in self.models:
            points = [(width, tokens) for width in self.widths for tokens in self.tokens]
            for width, tokens in sorted(points, key=lambda point: (point[0] * point[0] * point[1], point)):
                yield Run(model, width, tokens, self.rate(width, multiples[model]))
        for model in self.models:
            yield Run(model, self.held_out_width, max(self.tokens),
                      self.rate(self.held_out_width, multiples[model]), True)


def best_multiples(study: Study, losses: Sequence[float]) -> dict[tuple[str, int], float]:
    """Return the multiple with the lowest loss by (model, width); `losses` are those of `study.trials()`. Raises
    ConfigError if all rates of a model and width diverge."""
    found: dict[tuple[str, int], float] = {}
    lowest: dict[tuple[str, int], float] = {}
    for trial, loss, multiple in zip(study.trials(), losses, [*study.multiples] * (
            len(study.models) * len(study.lr_widths)), strict=True):
        key = trial.model, trial.width
        if loss < lowest.get(key, float("inf")):
            lowest[key], found[key] = loss, multiple
    if diverging := [f"{trial.model} of width {trial.width}" for trial in study.trials()
                     if (trial.model, trial.width) not in found]:
        raise ConfigError(f"{diverging[0]}: ends without a finite loss at all of the rates tried, {study.multiples} x "
                          f"the rule's; something else is wrong than the rate")
    return found
