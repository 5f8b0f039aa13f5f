"""Sizes and settings of a model as plain dataclasses; imports neither torch nor Megatron."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hrm_megatron.model_types import HRM, MODEL_TYPES, ModelType

EXPANSION = 4  # HRM-Text, config/arch: ffn = expansion * hidden * 2/3, rounded up to a multiple of 256
VOCAB_MULTIPLE = 256  # HRM-Text pads the vocabulary to this, whatever the parallel layout
DEFAULT_FIXED_STD = 0.02  # HRM-Text, init_type fixed_normal without an init_std
PRESET_VOCAB_SIZE = 65_536  # HRM-Text's tokenizer
HEAD_CHUNK_BYTES = 1 << 29  # of fp32 logits that a rank holds at once: 2,048 positions x 65,536 tokens
MOST_LAYERS = 1_000_000  # layers a token passes, summed over ticks: a sanity limit far above any real model
INIT_SCHEMES = ("lecun_normal", "fixed_normal", "megatron")
PREFIX_LM, CAUSAL = ATTENTION_MASKS = ("prefix-lm", "causal")
NORM_PLACEMENTS = ("pre", "post")
SIGMOID, NO_GATE = ATTENTION_GATES = ("sigmoid", "none")
# Flags of a run that name its input data.
DATA_FLAGS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--sampled-data-path")


class ConfigError(ValueError):
    """An error in a setting, file or row that the user must correct. Its message is one line: place, value, remedy."""


def refuse_beside(flag: str, others: Mapping[str, object]) -> None:
    """Raise ConfigError if `flag` is combined with one of `others`, which maps each flag to whether both are given."""
    for other, given in others.items():
        if given:
            raise ConfigError(f"{flag} is incompatible with {other}: leave one of them out")


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def ffn_hidden_size(hidden_size: int, expansion: float = EXPANSION) -> int:
    """Return the width of the SwiGLU MLP: 2/3 * expansion * hidden_size, rounded up to a multiple of 256."""
    return round_up(round(expansion * hidden_size * 2 / 3), 256)


def padded_vocab_size(vocab_size: int) -> int:
    """Return the number of rows of the embedding and of the head."""
    return round_up(vocab_size, VOCAB_MULTIPLE)


LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): linear layers of both stacks compute with W + (alpha / rank) B
    A. A [rank, k] and B [n, rank] are trained; everything else is frozen."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = LORA_TARGETS

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / self.rank

    def layer_parameters(self, architecture: Architecture) -> int:
        """Number of weights of a layer's adapters."""
        return self.rank * sum(sum(architecture.linear_shapes[name]) for name in self.targets)

    def num_parameters(self, architecture: Architecture) -> int:
        """Number of trained weights."""
        layers = len(architecture.kind.stacks) * architecture.num_layers
        return layers * self.layer_parameters(architecture)


@dataclass(frozen=True)
class Architecture:
    """Everything that determines which function a model computes. A checkpoint must match it.

    `num_layers` counts layers per stack. `vocab_size` is the tokenizer's; the embedding and the head have
    `padded_vocab_size` rows. `h_norm_placement` is the norm placement of the H stack if it differs from the L stack's.
    `attention_mask` is the mask within an example: PrefixLM attends to the prefix bidirectionally. `attention_gate` is
    the gate on the attention output, before the output projection.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    vocab_size: int
    h_cycles: int = 2
    l_cycles: int = 3
    norm_placement: str = "pre"
    h_norm_placement: str | None = None
    init_scheme: str = "lecun_normal"
    init_std: float | None = None
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    model_type: str = HRM
    attention_mask: str = PREFIX_LM
    attention_gate: str = SIGMOID

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size",
                     "h_cycles", "l_cycles"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if (layers := self.num_layers * self.h_cycles * (self.l_cycles + 1)) > MOST_LAYERS:  # from a damaged file
            raise ConfigError(f"num_layers={self.num_layers}, h_cycles={self.h_cycles}, l_cycles={self.l_cycles}: "
                              f"{layers:,} layers one after the other, of at most {MOST_LAYERS:,}; correct them")
        if not 0 <= self.norm_epsilon < math.inf:  # NaN too
            raise ConfigError(f"norm_epsilon={self.norm_epsilon}: must be a number from 0 on")
        for name in ("rope_theta", "init_std"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value}: must be a number above 0")
        if self.model_type not in MODEL_TYPES:
            raise ConfigError(f"model_type={self.model_type!r}: choose one of {', '.join(MODEL_TYPES)}")
        for name in self.kind.fixed:
            if (have := getattr(self, name)) != (fixed := getattr(self.kind, name)):
                raise ConfigError(f"{name}={have}: has no effect on, or no meaning in, a {self.kind.title} "
                                  f"(model_type={self.model_type}); leave it out, or give {fixed}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                              f"{self.num_attention_heads}; change one of them")
        if self.head_dim % 2:
            raise ConfigError(f"head size {self.head_dim} (hidden_size / num_attention_heads) is odd; rotary "
                              "position embedding needs an even one")
        if self.init_scheme not in INIT_SCHEMES:
            raise ConfigError(f"init_scheme={self.init_scheme!r}: choose one of {', '.join(INIT_SCHEMES)}")
        if self.attention_mask not in ATTENTION_MASKS:
            raise ConfigError(f"attention_mask={self.attention_mask!r}: choose one of {', '.join(ATTENTION_MASKS)}")
        if self.attention_gate not in ATTENTION_GATES:
            raise ConfigError(f"attention_gate={self.attention_gate!r}: choose one of {', '.join(ATTENTION_GATES)}")
        for placement in (self.norm_placement, self.h_norm_placement or self.norm_placement):
            if placement not in NORM_PLACEMENTS:
                raise ConfigError(f"norm_placement={placement!r}: choose one of {', '.join(NORM_PLACEMENTS)}")

    @property
    def causal(self) -> bool:
        """Whether prompts too are attended to causally."""
        return self.attention_mask == CAUSAL

    @property
    def gated(self) -> bool:
        """Whether attention has an output gate."""
        return self.attention_gate == SIGMOID

    @property
    def kind(self) -> ModelType:
        return MODEL_TYPES[self.model_type]

    @property
    def num_ticks(self) -> int:
        """Number of stack applications in a forward pass."""
        return self.h_cycles * ((self.l_cycles if self.kind.inner else 0) + bool(self.kind.outer))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        return padded_vocab_size(self.vocab_size)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes [n, k] of a layer's weights by Megatron's names: fused query, gate (if any), key and value; attention
        output; fused gate and up projection, and down projection of SwiGLU."""
        h, ffn = self.hidden_size, self.ffn_hidden_size
        return {"linear_qkv": ((3 + self.gated) * h, h), "linear_proj": (h, h), "linear_fc1": (2 * ffn, h),
                "linear_fc2": (h, ffn)}

    @property
    def layer_parameters(self) -> int:
        """Number of weights of a layer."""
        return sum(n * k for n, k in self.linear_shapes.values())

    @property
    def num_parameters(self) -> int:
        """Number of trained weights: all stacks, embedding and head."""
        return (len(self.kind.stacks) * self.num_layers * self.layer_parameters
                + 2 * self.padded_vocab_size * self.hidden_size)

    @property
    def input_std(self) -> float:
        """Standard deviation of the matrices that read the residual stream, of the embedding and of the head."""
        if self.init_scheme == "fixed_normal":
            return self.init_std or DEFAULT_FIXED_STD
        if self.init_scheme == "megatron" and self.init_std:
            return self.init_std
        return 1 / math.sqrt(self.hidden_size)

    @property
    def attention_output_std(self) -> float:
        """Standard deviation of the attention's output projection."""
        if self.init_scheme == "megatron":
            return self.input_std / math.sqrt(2 * self.num_layers)
        return self.input_std

    @property
    def mlp_output_std(self) -> float:
        """Standard deviation of the MLP's output projection."""
        if self.init_scheme == "lecun_normal":
            return 1 / math.sqrt(self.ffn_hidden_size)
        return self.attention_output_std

    @property
    def embedding_scale(self) -> float:
        """Factor on the embedding's output that restores unit variance."""
        return 1 / self.input_std


@dataclass(frozen=True)
class DefaultLayout:
    """Parallel layout of a preset on a given number of 80 GB GPUs, as found by tools/plan.py with rows of 4,096
    tokens."""

    tensor: int
    pipeline: int
    context: int
    micro_batch_size: int
    recompute_ticks: int = 0
    gated_act: bool = False


@dataclass(frozen=True)
class Preset:
    """One size. `num_layers` counts layers per stack; `sizes`, `lr_from` and `batch_from` name the sources of the
    numbers.

    `positions` is the largest micro-batch in tokens, a multiple of 1,024, that leaves 5 % of 80 GB free without
    recompute, as estimated by planner/memory.py: on one GPU; on eight where one is too small; 0 where eight are too.
    `layouts` is keyed by number of GPUs.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    lr: float | None = None
    tokens_per_step: int | None = None
    positions: int = 0
    sizes: str = "by hand"
    lr_from: str = "by hand"
    batch_from: str = "by hand"
    layouts: Mapping[int, DefaultLayout] = field(default_factory=dict)

    @property
    def ffn_hidden_size(self) -> int:
        return ffn_hidden_size(self.hidden_size)

    def architecture(self, vocab_size: int = PRESET_VOCAB_SIZE, model_type: str = HRM) -> Architecture:
        kind = MODEL_TYPES[model_type]
        return Architecture(self.num_layers * kind.preset_stacks, self.hidden_size, self.num_attention_heads,
                            self.ffn_hidden_size, vocab_size, kind.h_cycles, kind.l_cycles, model_type=model_type)


PUBLISHED = "HRM-Text, config/arch/size"
FORK = "a public fork of HRM-Text (schneiderkamplab), config/arch/size"
OUR_SIZE = "our rule: heads of 128, as many layers as XXXL at most, a width that TP 8 divides"
# An update of a hidden matrix should change its outputs by the same amount at every width (muP, arXiv 2203.03466).
OUR_LR = "our rule: XL's x 1536 / hidden size, two digits"
# How the optimal batch size scales with compute (DeepSeek LLM, arXiv 2401.02954: B = 0.292 C^0.3271).
OUR_BATCH = "our rule: XL's x (FLOPs of a token / XL's)^0.3271, to the nearest 2^n or 3 x 2^n"
L_README, XL_CONFIG = "HRM-Text, README", "HRM-Text, cfg_pretrain"

PRESETS = {
    "B": Preset(6, 1024, 8, 3.3e-4, 98_304, 59_392, PUBLISHED, OUR_LR, OUR_BATCH,
           {8: DefaultLayout(1, 1, 1, 3), 64: DefaultLayout(4, 1, 2, 3),
            512: DefaultLayout(8, 1, 8, 3)}),
    "L": Preset(12, 1280, 10, 2.5e-4, 172_032, 20_480, PUBLISHED, L_README, L_README,
           {8: DefaultLayout(1, 2, 2, 3), 64: DefaultLayout(2, 4, 4, 3),
            512: DefaultLayout(2, 8, 16, 1)}),
    "XL": Preset(16, 1536, 12, 2.2e-4, 196_608, 10_240, PUBLISHED, XL_CONFIG, XL_CONFIG,
           {8: DefaultLayout(1, 1, 1, 2), 64: DefaultLayout(1, 8, 4, 3),
            512: DefaultLayout(4, 1, 8, 3)}),
    "XXL": Preset(36, 1792, 14, 1.9e-4, 262_144, 4_096, PUBLISHED, OUR_LR, OUR_BATCH,
           {8: DefaultLayout(1, 1, 1, 1), 64: DefaultLayout(1, 8, 1, 1),
            512: DefaultLayout(2, 4, 4, 1)}),
    "XXL_wide": Preset(16, 2560, 20, 1.3e-4, 262_144, 6_144, PUBLISHED, OUR_LR, OUR_BATCH,
           {8: DefaultLayout(1, 1, 1, 1), 64: DefaultLayout(1, 8, 2, 1),
            512: DefaultLayout(4, 8, 2, 1)}),
    "XXXL": Preset(48, 2048, 16, 1.6e-4, 393_216, 1_024, FORK, OUR_LR, OUR_BATCH,
           {8: DefaultLayout(1, 2, 1, 1, 2, True), 64: DefaultLayout(1, 8, 1, 1, 2, True),
            512: DefaultLayout(8, 1, 2, 3)}),
    "XXXXL": Preset(64, 2560, 20, 1.3e-4, 393_216, 0, FORK, OUR_LR, OUR_BATCH,
           {8: DefaultLayout(1, 4, 1, 1, 4, True), 64: DefaultLayout(1, 8, 2, 1, 1, True),
            512: DefaultLayout(2, 32, 4, 1)}),
    "20B": Preset(44, 4096, 32, 8.2e-5, 524_288, 0, OUR_SIZE, OUR_LR, OUR_BATCH,
           {8: DefaultLayout(2, 4, 1, 1, 4, True), 64: DefaultLayout(2, 4, 2, 1),
            512: DefaultLayout(2, 16, 2, 1)}),
    "32B": Preset(46, 5120, 40, 6.6e-5, 524_288, 0, OUR_SIZE, OUR_LR, OUR_BATCH,
           {64: DefaultLayout(2, 8, 2, 1, 0, True), 512: DefaultLayout(2, 16, 4, 1)}),
}
