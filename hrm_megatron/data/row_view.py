"""One packed row as text: the token at each position, the label that it is to predict, and where examples begin."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hrm_megatron.data.batch import IGNORED_LABEL, PackedBatch
from hrm_megatron.data.tokenizer import TextTokenizer

PAD_TEXT, SPACE = "·", "␣"


@dataclass(frozen=True)
class RowView:
    """`texts` and `labels` [s] of the positions, "" where there is no label; for each example its (prefix, response)
    positions and its name."""

    texts: list[str]
    labels: list[str]
    pairs: tuple[tuple[int, int], ...]
    names: Sequence[str]

    def lines(self) -> list[str]:
        """Return a line for each position: its number, its part (prefix or response), its token and its label."""
        found, start = [], 0
        for name, (p, r) in zip(self.names, self.pairs, strict=True):
            found.append(f"--- {name}: {p} positions of prefix, {r} of response, "
                         f"{sum(map(bool, self.labels[start:start + p + r]))} labels")
            for at in range(start, start + p + r):
                label = f" → {self.labels[at]}" if self.labels[at] else ""
                found.append(f"{at:6} {'prefix  ' if at < start + p else 'response'} {self.texts[at]}{label}")
            start += p + r
        if start < len(self.texts):
            found.append(f"--- {len(self.texts) - start} positions of padding")
        return found


def view_row(batch: PackedBatch, tokenizer: TextTokenizer, names: Sequence[str]) -> RowView:
    """Decode the only row of `batch`; `names` are those of its examples."""
    shown = {i: text for text, i in tokenizer.special_ids.items()}
    pairs = batch.lengths[0]
    used = sum(p + r for p, r in pairs)

    def text(token: int) -> str:
        return shown.get(token) or repr(tokenizer.decode([token]))[1:-1].replace(" ", SPACE) or f"#{token}"

    texts = [text(token) if at < used else PAD_TEXT for at, token in enumerate(batch.tokens[0].tolist())]
    labels = ["" if label == IGNORED_LABEL else text(label) for label in batch.labels[0].tolist()]
    return RowView(texts, labels, pairs, names)
