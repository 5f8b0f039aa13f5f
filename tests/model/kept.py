"""Count what a forward pass keeps for its backward."""
import torch


def kept_bytes(run, leave_out):
    """Bytes of all that `run` saves for its backward and has not given back at its end, each storage once; without
    `leave_out`."""
    known, kept = {t.untyped_storage().data_ptr() for t in leave_out}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.untyped_storage())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
