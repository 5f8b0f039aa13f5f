"""A tokenizer fits a model by the number of its tokens, or by its embedding rows if only those are recorded."""
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from hrm_megatron.checkpoint.manifest import TRACKER_FILE
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.data.tokenizer import TextTokenizer
from tests.random_checkpoint import TOKENIZER, write_random_checkpoint

ROWS = 512


@pytest.mark.parametrize("through", ["native", "hf"])
def test_a_model_that_knows_rows_alone_answers_with_its_tokenizer(single_rank, tmp_path, through):
    from hrm_megatron.convert.run import Conversion, convert
    from hrm_megatron.generate.load import opened
    from hrm_megatron.generate.questions import Question
    from hrm_megatron.generate.session import Answering, Session

    source = write_random_checkpoint(tmp_path / "source", seq_length=48, ffn_hidden_size=256)
    convert(Conversion(source, "megatron", tmp_path / through, through, verify=False))
    if through == "hf":  # as others save it
        (tmp_path / through / "generation_config.json").unlink()
    convert(Conversion(tmp_path / through, through, tmp_path / "back", "megatron", verify=False))
    answers = []
    for load in (source, tmp_path / through, tmp_path / "back"):
        session = Session(load, Answering(max_new_tokens=6), TOKENIZER)
        requests = session.requests([Question("here", "direct", "What is 7 plus 5?")])
        answers.append([sample.text for [sample] in session.answer(requests, 1, print)])
    assert answers[0] == answers[1] == answers[2] and answers[0][0]
    with opened(tmp_path / "back") as checkpoint:
        assert [checkpoint.takes(tokens) for tokens in (1, 256, 286, 512, 513)] == [True] * 4 + [False]


@pytest.fixture
def full(single_rank, tmp_path):
    """A Megatron checkpoint with exactly as many tokens as rows."""
    import torch

    from hrm_megatron.convert.checkpoint import PARTS, Checkpoint, Training
    from hrm_megatron.convert.to_megatron import write_megatron

    write_megatron(Checkpoint(
        Path("random"), Architecture(1, 24, 3, 256, ROWS), Training(seq_length=48), 7, 5, frozenset(PARTS),
        lambda _, entry: torch.zeros(entry.shape, dtype=torch.float32 if entry.trained else torch.bfloat16)),
        tmp_path / "full")
    return tmp_path / "full"


@pytest.mark.parametrize("formats, known", [
    ([], True), (["megatron"], True), (["hf"], True), (["hf", "hf", "megatron"], True),
    (["native"], False), (["native", "megatron"], False), (["native", "megatron", "megatron", "hf", "hf"], False),
])
def test_whether_the_number_of_tokens_is_known_survives_conversions(full, tmp_path, formats, known):
    """If it is known, it must be the tokenizer's; else generation takes fewer, and an export those that fill the rows.
    """
    from hrm_megatron.convert.hf import token_ids_of
    from hrm_megatron.convert.hf_tokenizer import ExportTokenizer
    from hrm_megatron.convert.run import Conversion, convert
    from hrm_megatron.generate.load import check_tokenizer, opened

    load, load_format, tokenizer = full, "megatron", TextTokenizer(TOKENIZER)
    for place, save_format in enumerate(formats):
        convert(Conversion(load, load_format, tmp_path / str(place), save_format, verify=False))
        load, load_format = tmp_path / str(place), save_format
    with opened(load) as checkpoint:
        assert checkpoint.tokens_known == known and checkpoint.architecture.vocab_size == ROWS
        assert [checkpoint.takes(tokens) for tokens in (200, ROWS - 1, ROWS, ROWS + 1)] == [
            not known, not known, True, False]
        wider = replace(checkpoint, architecture=replace(checkpoint.architecture, vocab_size=2 * ROWS))
        export = ExportTokenizer.open(TOKENIZER)
        if known:
            with pytest.raises(ConfigError, match=f"{tokenizer.vocab_size} entries, the checkpoint has {ROWS}; give"):
                check_tokenizer(tokenizer, checkpoint)
            with pytest.raises(ConfigError, match=f"has {tokenizer.vocab_size} tokens, the model .* with {ROWS}; give"):
                token_ids_of(checkpoint, export)
        else:
            for rows in (checkpoint, wider):
                check_tokenizer(tokenizer, rows)
            assert token_ids_of(checkpoint, export)["eos_token_id"] == tokenizer.eoa
            with pytest.raises(ConfigError, match=f"has {tokenizer.vocab_size} tokens, the model .* {2 * ROWS}; give"):
                token_ids_of(wider, export)


@pytest.mark.parametrize("samples, known", [(96, True), (0, False)])
def test_an_older_checkpoint_knows_its_tokens_if_a_run_wrote_it(full, monkeypatch, samples, known):
    """A run counts the samples that it has consumed, a conversion does not."""
    import hrm_megatron.convert.megatron as reader
    from hrm_megatron.generate.load import opened

    def older(stored, read=reader.read_run):
        common, architecture = read(stored)
        args = {name: value for name, value in vars(common["args"]).items() if name != "tokens_known"}
        return common | {"args": Namespace(**args | dict(consumed_train_samples=samples))}, architecture
    monkeypatch.setattr(reader, "read_run", older)
    with opened(full) as checkpoint:
        assert checkpoint.tokens_known == known and checkpoint.takes(ROWS - 1) != known


@pytest.mark.parametrize("weights, missing", [
    ("model.safetensors", "config.json"), ("model-00001-of-00002.safetensors", "config.json"),
    ("fsdp2_epoch_3", "all_config.yaml"), ("tokenizer.json", TRACKER_FILE)])
def test_the_missing_file_is_named_that_tells_the_format(tmp_path, weights, missing):
    from hrm_megatron.generate.load import opened

    (tmp_path / weights).touch()
    (tmp_path / "conversion.json").touch()  # beside exports of every format
    with pytest.raises(ConfigError, match=f"^{tmp_path}/{missing}: ") as refusal, opened(tmp_path):
        pass
    assert (f": missing beside {weights}; copy the folder again" in str(refusal.value)) == (missing != TRACKER_FILE)


def test_a_missing_index_of_shards_is_named(tmp_path):
    from hrm_megatron.convert.hf_files import HFFiles

    (tmp_path / "model-00002-of-00002.safetensors").touch()
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: missing beside model-00002-of-00002\.saf"):
        HFFiles(tmp_path, [])
