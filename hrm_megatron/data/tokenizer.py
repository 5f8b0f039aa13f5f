"""Text to ids: byte-level BPE as in HRM-Text, its special tokens, and how prefixes and responses are spelled."""
from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hrm_megatron.config import ConfigError
from hrm_megatron.data.engine import SPLIT_PATTERN, Ragged, TokenizersEngine, open_engine
from hrm_megatron.data.provenance import Provenance
from hrm_megatron.data.spelling import INFO_FILE, PAD, SPECIAL_TOKENS, Spelling, strings_of, tags_of
from hrm_megatron.program import check_folder, whole_folder

log = logging.getLogger(__name__)

BYTES = 256
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + BYTES

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MADE_FROM_FILE = "made_from.json"  # only beside tokenizers that were trained here
SPELLS_AS = "spells_as"  # in INFO_FILE of an export: its own fingerprint -> that of the tokenizer used in training
VARIED_TEXT = "It's Caf\u00e9 no. 12, \u4f60\u597d \U0001f600 x\u00b2:\n\n\tif a  < b { print(\"c\\\\d\") }"
PAD_TOKENS = (PAD, "<|endoftext|>")  # the first of these that a tokenizer has pads batches; else its eoa token does
TRAIN_COMMAND = "python tools/train_tokenizer.py"


def train_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries; small corpora give fewer.

    The alphabet holds all 256 bytes, so no character is ever lost (the reference drops bytes that it never saw).
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
    # To transformers, token type 1 means prefix; a prompt alone is all prefix.
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:1", pair="$A:1 $B:0")
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, name: str, pad_token: str = PAD, spelling: Spelling | None = None,
                    of_export: str | None = None, **settings: object) -> dict[str, str]:
    """Return the files, name -> text, of a folder `name` that `TextTokenizer` and transformers' AutoTokenizer load.

    `of_export` is the fingerprint of the tokenizer that this one was exported from and spells identically to: it is
    accepted in that one's place. `settings` are further entries of tokenizer_config.json.
    """
    spelling, contents = spelling or Spelling(), tokenizer.to_str(pretty=True)
    known = {SPELLS_AS: {fingerprint_of(contents.encode(), spelling): of_export}} if of_export else {}
    return {
        TOKENIZER_FILE: contents,
        TOKENIZER_CONFIG_FILE: json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": spelling.boq,
            "eos_token": spelling.eoa, "pad_token": pad_token,
            "padding_side": "left",  # generation continues after the last token of each row
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False, **settings}, indent=1),
        INFO_FILE: json.dumps({
            "tokenizer_path": name, **spelling.to_info(), "vocab_size": tokenizer.get_vocab_size(), **known}, indent=1),
    }


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, overwrite: bool = False,
                   provenance: Provenance | None = None) -> None:
    """Write a folder that `TextTokenizer` and transformers' AutoTokenizer load, completely or not at all."""
    folder = Path(folder)
    files = tokenizer_files(tokenizer, folder.name)
    if provenance:
        files[MADE_FROM_FILE] = json.dumps(provenance.to_json(), indent=1)
    check_output_folder(folder, overwrite)
    with whole_folder(folder) as partial:
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


def already_trained(folder: Path, provenance: Provenance) -> bool:
    """Return whether `folder` holds a tokenizer of this provenance; ConfigError if it has another, or none."""
    if not (folder / TOKENIZER_FILE).exists():
        return False  # empty, or check_output_folder will refuse it
    try:
        recorded = json.loads((folder / MADE_FROM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    provenance.check(str(folder), recorded)
    return True


def check_output_folder(folder: Path, overwrite: bool, flag: str = "--output") -> None:
    """Refuse a folder (given by `flag`) that cannot be written or whose contents would be lost: a tokenizer unless
    `overwrite`, anything else always."""
    check_folder(flag, folder)
    if not folder.exists():
        return
    own = {TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, INFO_FILE, MADE_FROM_FILE}
    foreign = {path.name for path in folder.iterdir()} - own if folder.is_dir() else {folder.name}
    if foreign:
        raise ConfigError(f"{folder} holds something else than a tokenizer ({min(foreign)}); choose another {flag}")
    if not overwrite and any(folder.iterdir()):
        raise ConfigError(f"{folder} already holds a tokenizer; pass --overwrite or choose another {flag}")


class TextTokenizer:
    """Encode examples as ids. The string of a special token inside a text is encoded as text, never as the control
    token, unless the spelling lists it in `in_text`."""

    def __init__(self, path: str | Path, engine: str = "tokenizers", spelling: Spelling | None = None) -> None:
        """Load a tokenizer folder or a tokenizer.json. `engine` is one of `ENGINES`; the default spelling is that of
        the tokenizer_info.json beside it."""
        self.path = tokenizer_file(path)
        self.engine_choice = engine
        try:
            contents = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.path}: no tokenizer there ({error.strerror}); train one with {TRAIN_COMMAND}"
                              ) from error
        self.spelling = spelling or Spelling.beside(self.path)
        if not spelling and (confused := self.spelling.confused()):  # a warning: existing data may use it
            log.warning("%s: %s", self.path.with_name(INFO_FILE), confused)
        self.tokenizer = self._load(contents)
        ids = self.special_ids = {token.content: i for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        if missing := [token for token in (*self.spelling.controls, *self.spelling.in_text) if token not in ids]:
            raise ConfigError(f"{self.path}: special tokens missing: {', '.join(missing)}; train a tokenizer with "
                              f"{TRAIN_COMMAND}, or name those that it has with --boq, --eoq, --eoa and --tag")
        own = fingerprint_of(contents, self.spelling)
        self.fingerprint = spells_as(self.path).get(own, own)
        self.hidden_strings = strings_of(token.content for token in self.tokenizer.get_added_tokens_decoder().values()
                                         if token.special)  # never produced from text
        self.boq, self.eoq, self.eoa = (ids[token] for token in self.spelling.controls[:3])
        self.tag_ids = {tag: ids[token] for tag, token in self.spelling.tags.items()}
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self._check_that_text_stays_text()
        octets = pre_tokenizers.ByteLevel.alphabet() if isinstance(self.tokenizer.decoder, decoders.ByteLevel) else []
        self.lost_bytes = sum(self.tokenizer.token_to_id(byte) is None for byte in octets)
        if self.lost_bytes:
            log.warning("%s: %d of %d bytes have no token; characters that need them are dropped", self.path,
                        self.lost_bytes, BYTES)
        self.engine = TokenizersEngine(self.tokenizer) if engine == "tokenizers" else open_engine(
            engine, self.tokenizer, json.loads(self.tokenizer.to_str()))

    def _load(self, contents: bytes) -> Tokenizer:
        """Read a tokenizer.json, marking as special exactly the tokens that text must not produce: special ones and our
        control tokens, except those of `in_text`."""
        tokenizer = parsed(self.path, contents)
        hidden = {*SPECIAL_TOKENS, *self.spelling.controls}
        added = tokenizer.get_added_tokens_decoder()
        special = {i: (token.special or token.content in hidden) and token.content not in self.spelling.in_text
                   for i, token in added.items()}
        if all(special[i] == token.special for i, token in added.items()):
            return tokenizer
        config = json.loads(contents)
        for token in config["added_tokens"]:
            token["special"] = special[token["id"]]
        return Tokenizer.from_str(json.dumps(config))

    def _check_that_text_stays_text(self) -> None:
        """Refuse a model that has a special token among its own pieces, as Unigram and WordLevel may: it would encode
        any text that contains the token's string as that token."""
        special = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        texts = [(i, text) for i, token in special.items() for text in (token, f"a{token}a", f"a {token} a")]
        spelled = self.tokenizer.encode_batch([text for _, text in texts], add_special_tokens=False)
        taken = {special[i]: None for (i, _), found in zip(texts, spelled, strict=True) if i in found.ids}
        if taken and self.unknown is not None:  # the unknown token is meant to be produced from text
            taken.pop(str(self.tokenizer.id_to_token(self.unknown)), None)
        if taken:
            raise ConfigError(f"{self.path}: its model, {type(self.tokenizer.model).__name__}, makes the special token "
                              f"of any text that holds {', '.join([*taken][:3])}{' ...' * (len(taken) > 3)}; take a "
                              f"tokenizer whose model has no such piece, or train one with {TRAIN_COMMAND}")

    @functools.cached_property
    def unknown(self) -> int | None:
        """The model's unknown token; None if it has none, or if it is a control token, which examples contain."""
        model = self.tokenizer.model
        if isinstance(model, models.Unigram):
            found = json.loads(self.tokenizer.to_str())["model"].get("unk_id")
        else:
            found = None if model.unk_token is None else self.tokenizer.token_to_id(model.unk_token)
        return None if found in (self.boq, self.eoq, self.eoa, *self.tag_ids.values()) else found

    def loss(self) -> str | None:
        """Return what a text of varied characters loses in encode and decode; None if it survives, or if the missing
        bytes were already reported on opening."""
        ids = self.tokenizer.encode(VARIED_TEXT, add_special_tokens=False).ids
        back = self.decode(ids)
        if self.lost_bytes or back.strip() == VARIED_TEXT:
            return None
        return (f"{self.path}: {VARIED_TEXT!r} comes back as {back!r} from this tokenizer; what it loses, no model "
                "of it can read or write")

    def encode_examples(self, conditions: Sequence[str], texts: Sequence[str]) -> Ragged:
        """Encode examples, given as instruction, response, instruction, ..., into prefix, target, prefix, ...: boq, one
        token per tag in order, instruction, eoq; response, eoa."""
        head_of = {condition: self._head(condition) for condition in set(conditions)}
        heads = [head_of[condition] for condition in conditions]
        spelled = self.engine.encode(texts)
        before = np.zeros(len(texts), np.int64)
        before[::2] = [len(head) for head in heads]
        lengths = before + spelled.lengths + 1
        ends = lengths.cumsum()
        ids = np.empty(int(lengths.sum()), np.int32)
        of_text = np.ones(len(ids), bool)
        of_text[ends - 1] = False
        starts = np.repeat(ends[::2] - lengths[::2], before[::2])
        at = starts + np.arange(len(starts)) - np.repeat(before[::2].cumsum() - before[::2], before[::2])
        of_text[at] = False
        ids[of_text] = spelled.ids
        ids[at] = [i for head in heads for i in head]
        ids[ends[::2] - 1], ids[ends[1::2] - 1] = self.eoq, self.eoa
        return Ragged(ids, lengths)

    def _head(self, condition: str) -> list[int]:
        return [self.boq, *(self.tag_ids[tag] for tag in tags_of(condition, self.tag_ids))]

    def encode_prefixes(self, conditions: Sequence[str], instructions: Sequence[str]) -> list[list[int]]:
        """Encode prefixes: boq, one token per tag in order, the instruction, eoq."""
        texts = [text for instruction in instructions for text in (instruction, "")]
        return self.encode_examples(conditions, texts).rows()[::2]

    def encode_responses(self, responses: Sequence[str]) -> list[list[int]]:
        """Encode targets: the response, eoa."""
        return [[*ids, self.eoa] for ids in self.engine.encode(responses).rows()]

    def encode_prefix(self, condition: str, instruction: str) -> list[int]:
        return self.encode_prefixes([condition], [instruction])[0]

    def encode_response(self, response: str) -> list[int]:
        return self.encode_responses([response])[0]

    @functools.cached_property
    def vocabulary(self) -> str:
        """Hash of all tokens and ids, in which an export equals the tokenizer that it was made from."""
        return vocabulary_of(self.tokenizer)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special tokens are skipped."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def parsed(path: Path, contents: bytes) -> Tokenizer:
    """Parse the contents of a tokenizer.json; `path` names it in errors."""
    try:
        return Tokenizer.from_str(contents.decode("utf-8"))
    except BaseException as error:  # a bare Exception, or a Rust panic, which is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ConfigError(f"{path}: not a tokenizer ({' '.join(str(error).split())}); train one with {TRAIN_COMMAND}"
                          ) from error


def vocabulary_of(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def vocabulary_beside(folder: Path) -> str | None:
    """Return the hash of the tokens of a folder's tokenizer.json; None if there is none, or if this tokenizers library
    does not know its kind (a warning says so). A damaged one is refused."""
    path = folder / TOKENIZER_FILE
    try:
        contents = path.read_bytes()
        json.loads(contents)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot read ({error}); copy it again, or remove it to take the model without its "
                          "tokens") from error
    try:
        return vocabulary_of(parsed(path, contents))
    except ConfigError as error:
        log.warning("%s: a tokenizer of a kind that is not known here (%s); any other of as many tokens is taken for "
                    "the model's own", path, " ".join(str(error.__cause__).split()))
        return None


def fingerprint_of(contents: bytes, spelling: Spelling) -> str:
    """Hash a tokenizer.json together with its spelling."""
    return hashlib.sha256(contents if spelling == Spelling() else
                          contents + json.dumps(spelling.to_info()).encode()).hexdigest()


def spells_as(tokenizer_file: Path) -> dict[str, str]:
    """Read from an export's tokenizer_info.json: its own fingerprint -> that of the equivalent tokenizer."""
    path = tokenizer_file.with_name(INFO_FILE)
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(SPELLS_AS)
    except (OSError, ValueError, AttributeError):  # missing, or not a JSON object
        return {}
    return found if isinstance(found, dict) else {}


def tokenizer_file(path: str | Path) -> Path:
    """Return the tokenizer.json of a folder, or the path itself if it is a file."""
    path = Path(path)
    return path / TOKENIZER_FILE if path.is_dir() else path
