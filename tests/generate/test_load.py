"""Folders that tell rows of the embedding alone are opened with the tokenizer that fills them."""
import pytest

from tests.random_checkpoint import TOKENIZER, write_random_checkpoint


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
        assert [checkpoint.takes(tokens) for tokens in (256, 257, 286, 512, 513)] == [False, True, True, True, False]
