"""HRM-Text's baselines as its files describe them: their architecture, and a model with their weights."""
from hrm_megatron.config import Architecture, ffn_hidden_size
from hrm_megatron.convert.native_recurrence import read_recurrence
from hrm_megatron.convert.table import table

NETS = ("transformer", "ut", "rins", "trm", "trm_match_recurrence")


def architecture_of(config):
    said = read_recurrence(config)
    return Architecture(
        said.num_layers, config["hidden_size"], config["num_heads"], ffn_hidden_size(config["hidden_size"],
                                                                                     config["expansion"]),
        config["vocab_size"], said.h_cycles, said.l_cycles, model_type=said.model_type,
        init_scheme=config["init_type"])


def filled(architecture, weights, **overrides):
    """A model with the weights called `param.*`; there must be a process group (`single_rank`)."""
    import torch

    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    model = HRMModel(hrm_config(architecture, **overrides), seed=11)
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert places.keys() == {entry.megatron for entry in table(architecture)}
    with torch.no_grad():
        for entry in table(architecture):
            places[entry.megatron].copy_(entry.to_megatron(weights[f"param.{entry.native}"]))
    return model
