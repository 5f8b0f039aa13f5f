"""Text to ids: the byte-level BPE of HRM-Text, its special tokens, and how a prefix and a response are spelled."""
from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hrm_megatron.config import ConfigError
from hrm_megatron.data.provenance import Provenance
from hrm_megatron.program import whole_folder

log = logging.getLogger(__name__)

SPECIAL_TOKENS = (  # ids 0 to 30, in this order; HRM-Text, data_io tokenizer
    "<|PAD|>", "<|direct|>", "<|cot|>", "<|noisy|>", "<|synth|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)
PAD = "<|PAD|>"
BOQ, EOQ, EOA = "<|im_start|>", "<|im_end|>", "<|box_end|>"  # begin and end of the question, end of the answer
TAG_TOKENS = {  # not the tokens that carry the tags' names: those were never used
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}
SPLIT_PATTERN = (  # Qwen's, with single digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = 256
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + BYTES

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
INFO_FILE = "tokenizer_info.json"
MADE_FROM_FILE = "made_from.json"  # where it was trained here
TRAIN_COMMAND = "python tools/train_tokenizer.py"


def tags_of(condition: str) -> list[str]:
    """Split a condition at its commas; the empty condition has no tags. An unknown tag is a ConfigError."""
    tags = [tag.strip() for tag in condition.split(",")] if condition.strip() else []
    for tag in tags:
        if tag not in TAG_TOKENS:
            raise ConfigError(f"unknown tag {tag!r} in condition {condition!r}; use {', '.join(TAG_TOKENS)}")
    return tags


def train_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` entries; small corpora give fewer.

    All 256 bytes are in the alphabet, so no character is ever lost (the reference drops those it never saw).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size={vocab_size}: {len(SPECIAL_TOKENS)} special tokens and {BYTES} bytes already "
                          f"need {MIN_VOCAB_SIZE}; choose at least that")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    # transformers takes token type 1 for a prefix; a prompt alone is all prefix.
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:1", pair="$A:1 $B:0")
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, name: str, pad_token: str = PAD, **settings: object) -> dict[str, str]:
    """Return the files, name > text, of a folder `name` that `TextTokenizer` and transformers' AutoTokenizer load.

    `settings` are more of transformers' for its tokenizer_config.json.
    """
    return {
        TOKENIZER_FILE: tokenizer.to_str(pretty=True),
        CONFIG_FILE: json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOQ, "eos_token": EOA, "pad_token": pad_token,
            "padding_side": "left",  # an answer goes on after the last token of its row
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False, **settings}, indent=1),
        INFO_FILE: json.dumps({
            "tokenizer_path": name, "boq": BOQ, "eoq": EOQ, "eoa": EOA, "condition_mapping": TAG_TOKENS,
            "vocab_size": tokenizer.get_vocab_size()}, indent=1),
    }


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, overwrite: bool = False,
                   provenance: Provenance | None = None) -> None:
    """Write a folder that `TextTokenizer` and transformers' AutoTokenizer load, all of it or nothing."""
    folder = Path(folder)
    files = tokenizer_files(tokenizer, folder.name)
    if provenance:
        files[MADE_FROM_FILE] = json.dumps(provenance.to_json(), indent=1)
    check_output_folder(folder, overwrite)
    with whole_folder(folder) as partial:
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


def already_trained(folder: Path, provenance: Provenance) -> bool:
    """Say whether a tokenizer of this provenance is there; one of another, or without any, is a ConfigError."""
    if not (folder / TOKENIZER_FILE).exists():
        return False  # nothing, or what check_output_folder refuses
    try:
        recorded = json.loads((folder / MADE_FROM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    provenance.check(str(folder), recorded)
    return True


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder whose contents would be lost: a tokenizer without `overwrite`, anything else always."""
    if not folder.exists():
        return
    foreign = {path.name for path in folder.iterdir()} - {TOKENIZER_FILE, CONFIG_FILE, INFO_FILE, MADE_FROM_FILE} \
        if folder.is_dir() else {folder.name}
    if foreign:
        raise ConfigError(f"{folder} holds something else than a tokenizer ({min(foreign)}); choose another --output")
    if not overwrite and any(folder.iterdir()):
        raise ConfigError(f"{folder} already holds a tokenizer; pass --overwrite or choose another --output")


class TextTokenizer:
    """Spell examples as ids. Special-token strings inside a text are text, never control tokens."""

    def __init__(self, path: str | Path) -> None:
        """Load a tokenizer folder or a tokenizer.json."""
        path = Path(path)
        self.path = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            contents = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.path}: no tokenizer there ({error.strerror}); train one with {TRAIN_COMMAND}"
                              ) from error
        try:
            self.tokenizer = Tokenizer.from_str(contents.decode("utf-8"))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ConfigError(f"{self.path}: not a tokenizer ({' '.join(str(error).split())}); train one with "
                              f"{TRAIN_COMMAND}") from error
        self.fingerprint = hashlib.sha256(contents).hexdigest()
        ids = self.special_ids = {token.content: i for i, token in self.tokenizer.get_added_tokens_decoder().items()
                                  if token.special}
        needed = (BOQ, EOQ, EOA, *TAG_TOKENS.values())
        if missing := [token for token in needed if token not in ids]:
            raise ConfigError(f"{self.path}: special tokens missing: {', '.join(missing)}; train a tokenizer with "
                              f"{TRAIN_COMMAND}")
        self.boq, self.eoq, self.eoa = ids[BOQ], ids[EOQ], ids[EOA]
        self.tag_ids = {tag: ids[token] for tag, token in TAG_TOKENS.items()}
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        lost = sum(self.tokenizer.token_to_id(byte) is None for byte in pre_tokenizers.ByteLevel.alphabet())
        if lost:
            log.warning("%s: %d of %d bytes have no token; characters that need them are dropped", self.path, lost,
                        BYTES)

    def _texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_prefixes(self, conditions: Sequence[str], instructions: Sequence[str]) -> list[list[int]]:
        """Spell prefixes: boq, one token per tag in order, the instruction, eoq."""
        return [[self.boq, *(self.tag_ids[tag] for tag in tags_of(condition)), *ids, self.eoq]
                for condition, ids in zip(conditions, self._texts(instructions), strict=True)]

    def encode_responses(self, responses: Sequence[str]) -> list[list[int]]:
        """Spell targets: the response, eoa."""
        return [[*ids, self.eoa] for ids in self._texts(responses)]

    def encode_prefix(self, condition: str, instruction: str) -> list[int]:
        return self.encode_prefixes([condition], [instruction])[0]

    def encode_response(self, response: str) -> list[int]:
        return self.encode_responses([response])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special tokens have none."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
