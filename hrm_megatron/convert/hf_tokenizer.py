"""The tokenizer of an export: prompts are marked as prefixes, and batches are left-padded with an existing token."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from hrm_megatron.config import ConfigError
from hrm_megatron.convert.chat_template import chat_template
from hrm_megatron.convert.checkpoint import Checkpoint
from hrm_megatron.data.tokenizer import (
    PAD_TOKENS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    VARIED_TEXT,
    TextTokenizer,
    tokenizer_files,
)


def check_vocabulary(tokenizer: TextTokenizer, checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer whose tokens are not those that a checkpoint records, or has in its folder."""
    if checkpoint.vocabulary in (None, tokenizer.vocabulary):
        return
    if (own := checkpoint.path / TOKENIZER_FILE).exists():
        raise ConfigError(f"{tokenizer.path}: is another tokenizer than {own}, which is taken for the model's own; "
                          "give that one as --tokenizer-model, or remove it from there if it is not the model's")
    raise ConfigError(f"{tokenizer.path}: has other tokens than the tokenizer that {checkpoint.path} was trained with; "
                      "give that one as --tokenizer-model")


# Texts whose first or last token depends on the neighbouring text in some kind of tokenizer.
QUESTIONS = ("What is 2 + 3?", " a", "\na", "a ", "a\n", "\u00e9", "e\u0301", VARIED_TEXT, "a_b a-b aBc a1b a\u4e2db")


@dataclass(frozen=True)
class ExportTokenizer:
    """A tokenizer as transformers is to load it, `between_controls`; `pad_token` pads batches."""

    text: TextTokenizer
    pad_token: str
    between_controls: Tokenizer

    @staticmethod
    def open(path: str | Path) -> ExportTokenizer:
        """Load a tokenizer folder or a tokenizer.json.

        The pad token is the one that tokenizer_config.json names, if it is a special token of the tokenizer.json beside
        it, else the first of PAD_TOKENS that is one, else eoa. A tokenizer that encodes a text after control tokens
        differently from the text alone, as in training, is refused.
        """
        text = TextTokenizer(path)
        named = _config_beside(text.path).get("pad_token")
        own = named.get("content") if isinstance(named, dict) else named
        return ExportTokenizer(text, next(token for token in (str(own), *PAD_TOKENS, text.spelling.eoa)
                                          if token in text.special_ids), _between_controls(text))

    @property
    def token_ids(self) -> dict[str, int]:
        """Ids under transformers' configuration names."""
        return dict(pad_token_id=self.text.special_ids[self.pad_token], bos_token_id=self.text.boq,
                    eos_token_id=self.text.eoa)

    def write(self, folder: Path, max_tokens: int, causal: bool = False) -> None:
        """Write files with which transformers marks a prompt as prefix (token type 1) and a second text as response;
        for a `causal` model, which has no prefix, they return no token types."""
        tokenizer = Tokenizer.from_str(self.between_controls.to_str())
        single, pair = ("$A:0", "$A:0 $B:0") if causal else ("$A:1", "$A:1 $B:0")
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        files = tokenizer_files(tokenizer, "tokenizer", self.pad_token, self.text.spelling, self.text.fingerprint,
                                model_max_length=max_tokens, chat_template=chat_template(self.text.spelling),
                                **({"model_input_names": ["input_ids", "attention_mask"]} if causal else {}))
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")


def _between_controls(text: TextTokenizer) -> Tokenizer:
    """Return the tokenizer, changed to encode texts between control tokens: control tokens consume none of the text
    beside them, and after each of them a text begins."""
    config = json.loads(text.tokenizer.to_str())
    for token in config["added_tokens"]:
        if token["content"] in text.spelling.controls:
            token |= dict(lstrip=False, rstrip=False, single_word=False, normalized=False)
    splits = config["pre_tokenizer"] or {}
    # Only as first step: after another, "first" marks only a text's first piece, and "always" would mark each piece.
    for step in splits.get("pretokenizers", [splits])[:1]:
        if step.get("prepend_scheme") == "first":  # of Metaspace: applies to the whole input only
            step["prepend_scheme"] = "always"
    tokenizer = Tokenizer.from_str(json.dumps(config))
    in_text = [token.content for token in text.tokenizer.get_added_tokens_decoder().values() if not token.special]
    texts = [*QUESTIONS, *(f"a{token}b" for token in in_text)]
    condition = ",".join(text.spelling.tags)
    head = text.spelling.boq + "".join(text.spelling.tags.values())
    for question in texts:
        spelled = tokenizer.encode(f"{head}{question}{text.spelling.eoq}", add_special_tokens=False).ids
        if spelled != text.encode_prefix(condition, question):
            raise ConfigError(f"{text.path}: spells {question!r} behind {text.spelling.boq} otherwise than alone, as "
                              "in training, so that transformers would read other tokens; leave --tokenizer-model out "
                              f"(and remove {TOKENIZER_FILE} from the folder of --load) and give the model token ids")
    return tokenizer


def _config_beside(tokenizer_file: Path) -> dict[str, Any]:
    path = tokenizer_file.with_name(TOKENIZER_CONFIG_FILE)
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read ({error}); copy the tokenizer again, or give its tokenizer.json alone"
                          ) from error
    return loaded if isinstance(loaded, dict) else {}
