"""Initial weights depend on the seed and the name, and on nothing else."""

import torch

from hrm_megatron.config import Architecture
from hrm_megatron.model.initialize import draw, initialize, shard

ARCHITECTURE = Architecture(2, 24, 2, 40, 250)


def blank(shape, dim, stride, tp):
    local = list(shape)
    local[dim] //= tp
    weight = torch.empty(local)
    for name, value in dict(tensor_model_parallel=True, partition_dim=dim, partition_stride=stride).items():
        setattr(weight, name, value)
    return weight


def test_shards_of_two_ranks_are_the_whole_of_one():
    for name, shape, dim, stride in (("h_stack.layers.1.mlp.linear_fc1.weight", (80, 24), 0, 2),
                                     ("l_stack.layers.0.mlp.linear_fc2.weight", (24, 40), 1, 1)):
        whole = blank(shape, dim, stride, 1)
        initialize([(name, whole)], ARCHITECTURE, seed=3, tp_rank=0, tp_size=1)
        halves = []
        for rank in range(2):
            half = blank(shape, dim, stride, 2)
            initialize([(name, half)], ARCHITECTURE, seed=3, tp_rank=rank, tp_size=2)
            assert torch.equal(half, shard(whole, half, rank, 2))
            halves.append(half)
        pieces = [part for half in halves for part in half.chunk(stride, dim)]
        order = [0, 2, 1, 3] if stride == 2 else [0, 1]
        assert torch.equal(torch.cat([pieces[i] for i in order], dim), whole)


def test_names_and_seeds_make_different_weights():
    drawn = [draw(*key, (5, 7)) for key in ((1, "a"), (1, "b"), (2, "a"))]
    assert torch.equal(drawn[0], draw(1, "a", (5, 7)))
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])


def test_without_a_seed_all_is_nan_until_it_is_loaded(single_rank):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    empty, drawn = (HRMModel(hrm_config(ARCHITECTURE), seed).state_dict() for seed in (None, 3))
    tensors = {name: tensor for name, tensor in empty.items() if isinstance(tensor, torch.Tensor)}
    assert {"zL_init", "output_layer.weight"} < {*tensors} and all(t.isnan().all() for t in tensors.values())
    assert not any(drawn[name].isnan().any() for name in tensors)
