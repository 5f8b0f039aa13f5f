"""How prompts and answers are delimited: by HRM-Text's control tokens, or others of a tokenizer."""
from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.text_files import shown

INFO_FILE = "tokenizer_info.json"
SPECIAL_TOKENS = (  # ids 0 to 30, in this order; HRM-Text, data_io tokenizer
    "<|PAD|>", "<|direct|>", "<|cot|>", "<|noisy|>", "<|synth|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)
PAD = "<|PAD|>"
BOQ, EOQ, EOA = "<|im_start|>", "<|im_end|>", "<|box_end|>"  # begin of question, end of question, end of answer
TAG_TOKENS = {  # not the tokens named after the tags, which were never used
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}
IN_TEXT = "control_tokens_in_text"  # key in INFO_FILE, present if there are some


@dataclass(frozen=True)
class Spelling:
    """The control tokens: around questions and answers, one for each tag, and those that may occur inside a text."""

    boq: str = BOQ
    eoq: str = EOQ
    eoa: str = EOA
    tags: Mapping[str, str] = field(default_factory=lambda: dict(TAG_TOKENS))
    in_text: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if taken := [token for token in self.in_text if token in self.controls]:
            raise ConfigError(f"--control-tokens-in-text {taken[0]}: it marks where a question or an answer begins or "
                              "ends, or a tag, so a text that holds it would end too early; leave it out")
        for tag in self.tags:
            if not tag or tag != tag.strip() or "," in tag:
                raise ConfigError(f"--tag {tag!r}: a tag's name has no comma and no space around it")

    @property
    def controls(self) -> tuple[str, ...]:
        """The tokens that must never occur in a text."""
        return self.boq, self.eoq, self.eoa, *self.tags.values()

    def confused(self) -> str | None:
        """Return which tag shares its token with another tag or a delimiter, so that no model can tell them apart; None
        if no tag does."""
        flags = {self.boq: "--boq", self.eoq: "--eoq", self.eoa: "--eoa"}  # these three may share a token
        for tag, token in self.tags.items():
            if token in flags:
                return f"--tag {tag}={token}: {flags[token]} has that token too, and no model can tell them apart"
            flags[token] = f"--tag {tag}"
        return None

    def to_info(self) -> dict[str, Any]:
        """Return it in the format of HRM-Text's tokenizer_info.json."""
        more = {IN_TEXT: list(self.in_text)} if self.in_text else {}
        return dict(boq=self.boq, eoq=self.eoq, eoa=self.eoa, condition_mapping=dict(self.tags), **more)

    @classmethod
    def beside(cls, tokenizer_file: Path) -> Spelling:
        """Read the tokenizer_info.json beside a tokenizer.json; HRM-Text's spelling if there is none."""
        path = tokenizer_file.with_name(INFO_FILE)
        if not path.is_file():
            return cls()
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            boq, eoq, eoa, tags, in_text = (info["boq"], info["eoq"], info["eoa"], dict(info["condition_mapping"]),
                                            tuple(info.get(IN_TEXT, ())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: does not say boq, eoq, eoa and condition_mapping ({error!r}); copy the "
                              "tokenizer's folder again") from error
        if odd := [token for token in (boq, eoq, eoa, *tags.values(), *in_text) if not isinstance(token, str)]:
            raise ConfigError(f"{path}: {odd[0]!r} is no token; copy the tokenizer's folder again")
        try:
            return cls(boq, eoq, eoa, tags, in_text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def tags_of(condition: str, known: Iterable[str] = TAG_TOKENS) -> list[str]:
    """Split a condition at its commas; the empty condition has no tags. An unknown tag is a ConfigError."""
    tags = [tag.strip() for tag in condition.split(",")] if condition.strip() else []
    for tag in tags:
        if tag not in known:
            raise ConfigError(f"unknown tag {shown(tag)} in condition {shown(condition)}; use {', '.join(known)}")
    return tags


def strings_of(tokens: Iterable[str]) -> re.Pattern[bytes] | None:
    """Return a pattern that matches any of these strings in UTF-8; None if there are none."""
    ordered = sorted((token.encode() for token in tokens), key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, ordered))) if ordered else None


def add_spelling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `chosen_spelling` reads."""
    for name, what in (("boq", "begins a question"), ("eoq", "ends a question"), ("eoa", "ends an answer")):
        parser.add_argument(f"--{name}", metavar="TOKEN", help=f"added token of the tokenizer that {what} (default: "
                            f"that of its {INFO_FILE}, else {Spelling.__dataclass_fields__[name].default})")
    parser.add_argument("--tag", action="append", metavar="NAME=TOKEN",
                        help="a tag that conditions may name, and its token; repeat for each tag (default: those of "
                             f"{INFO_FILE}, else {', '.join(TAG_TOKENS)})")
    parser.add_argument("--control-tokens-in-text", nargs="+", action="extend", metavar="TOKEN",
                        help="special tokens, such as <think>, whose strings inside a text become that token (default: "
                             "every special token's string is spelled as text)")


def chosen_spelling(args: argparse.Namespace, tokenizer_file: Path) -> Spelling | None:
    """Return the spelling that the flags ask for; None if it is the tokenizer's own."""
    own = Spelling.beside(tokenizer_file)
    tags = dict(own.tags)
    if args.tag:
        pairs = [tag.partition("=") for tag in args.tag]
        if bad := [name for name, _, token in pairs if not token]:
            raise ConfigError(f"--tag {bad[0]}: give NAME=TOKEN")
        tags = {name: token for name, _, token in pairs}
        if len(tags) < len(pairs):
            raise ConfigError(f"--tag {' --tag '.join(args.tag)}: a tag has one token; name each once")
    in_text = own.in_text if args.control_tokens_in_text is None else tuple(args.control_tokens_in_text)
    chosen = Spelling(args.boq or own.boq, args.eoq or own.eoq, args.eoa or own.eoa, tags, in_text)
    if chosen == own:
        return None
    if confused := chosen.confused():
        raise ConfigError(f"{confused}; give the tag a token of its own")
    return chosen
