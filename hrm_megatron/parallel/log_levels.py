"""Which messages of Megatron and torch are suppressed: in tools all but errors, in training those that no user can act
on."""
from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass
from functools import partial

WARNINGS, PRINTED = "warnings", "print"


@dataclass(frozen=True)
class Remark:
    """A suppressed message: its logger's name, WARNINGS or PRINTED; a pattern for the start of its text; the reason."""

    source: str
    text: str  # a regular expression
    reason: str


_OPTIONAL = ("not installed, and nothing of it is used: AdamATan2, the norms and the linear layers are ours or "
             "Megatron's local ones, and the start of a run names them")
_PINNED = "concerns later releases of megatron-core; this one is pinned"
_THEIR_MODEL = "about a class of Megatron that an HRM does not use"
_BY_MEGATRON = "each rank reads the common part of a checkpoint by itself, as Megatron calls torch"

UNACTIONABLE = (
    Remark(WARNINGS, "Transformer Engine and Apex are not installed", _OPTIONAL),
    Remark(WARNINGS, "Apex is not installed", _OPTIONAL),
    Remark(WARNINGS, "Only transformer-engine>=1.7.0 supports MoE experts", _THEIR_MODEL),
    Remark(WARNINGS, "MimoModelConfig is experimental", _THEIR_MODEL),
    Remark(WARNINGS, r"\s*It is recommended to use a ModelConfig", "there is none of an HRM; functions still work"),
    Remark(WARNINGS, "'pin_memory' argument is set as true but no accelerator", "Megatron always asks for it"),
    Remark(WARNINGS, "The .grad attribute of a Tensor that is not a leaf", "Megatron asks a view whether it has one"),
    Remark("torch.utils.cpp_extension", "No CUDA runtime is found", "the start of a run says that there is no GPU"),
    Remark("megatron.core.rerun_state_machine", "RerunStateMachine initialized in mode", "the default mode"),
    Remark("megatron.core.rerun_state_machine", "Result validation enabled", "the default mode"),
    Remark("megatron.core.rerun_state_machine", "Setting RerunStateMachine mode", "off and on again for an evaluation"),
    Remark("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated", _PINNED),
    Remark("megatron.core.rerun_state_machine", "RerunStateMachine checkpoints ONLY SUPPORTED",
           "there is no rerun to save, which is off"),
    Remark(WARNINGS, "enabling --no-load-optim when skipping training", "an evaluation needs no optimizer"),
    Remark(WARNINGS, "torch.distributed is disabled, unavailable or uninitialized, assuming", _BY_MEGATRON),
    Remark(WARNINGS, "The argument order of load has been changed", _BY_MEGATRON),
    Remark(WARNINGS, "`load_state_dict` is deprecated and will be removed", _BY_MEGATRON),
    Remark(PRINTED, "could not find arguments in the checkpoint", "they are there: a fine-tuning takes weights alone"),
    Remark(PRINTED, "WARNING: could not find the metadata file", "a run that begins, and says so"),
    Remark(PRINTED, "    will not load any checkpoints and will start from random", "the same"),
    Remark(PRINTED, "WARNING: one_logger package is required", "a service inside NVIDIA"),
)


def be_quiet() -> None:
    """Suppress warnings and, from Megatron, all log messages below ERROR; call it before Megatron is imported."""
    warnings.simplefilter("ignore")
    # Without an existing handler Megatron would enable INFO for all libraries.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_unactionable() -> None:
    """Suppress only the warnings in UNACTIONABLE; call it before Megatron is imported."""
    for remark in UNACTIONABLE:
        if remark.source == WARNINGS:
            warnings.filterwarnings("ignore", message=remark.text)
        elif remark.source != PRINTED:
            logging.getLogger(remark.source).addFilter(partial(_differs, remark.text))


def is_unactionable_print(line: str) -> bool:
    """Tell whether this line, which Megatron prints, is one of those in UNACTIONABLE."""
    return any(re.match(remark.text, line) for remark in UNACTIONABLE if remark.source == PRINTED)


def _differs(text: str, record: logging.LogRecord) -> bool:
    return not re.match(text, record.getMessage())
