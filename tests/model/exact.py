"""HRM-Text in fp64, formula by formula from the reference's own weights: what both it and we round.

Nothing here is shared with the model that it judges. Padding positions attend to nothing, as in the reference.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def allowed(lengths: list[tuple[int, int]], positions: int) -> torch.Tensor:
    """Which keys a query sees, [s, s]: of examples (prefix, response) the prefix whole, responses up to themselves."""
    mask = torch.zeros(positions, positions, dtype=torch.bool)
    start = 0
    for prefix, response in lengths:
        end = start + prefix + response
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        mask[start:start + prefix, start:start + prefix] = True
        start = end
    return mask


class Exact:
    """The model of a golden `config`, in fp64; its `weights` are copies of those given, and collect gradients."""

    def __init__(self, config: dict, weights: Tensors) -> None:
        self.config = config
        self.weights = {name: tensor.double().requires_grad_("zL_init" not in name) for name, tensor in weights.items()}

    def states(self, tokens: torch.Tensor, position_ids: torch.Tensor, lengths: list[tuple[int, int]],
               bp_steps: int | None = None) -> Tensors:
        """Every new state by its golden name, [s, h] each; the last `bp_steps` ticks build a graph (None: all)."""
        config, weights = self.config, self.weights
        h_cycles, l_cycles = config["H_cycles"], config["L_cycles"]
        std = {"lecun_normal": config["hidden_size"] ** -0.5, "fixed_normal": config.get("init_std") or 0.02,
               "megatron": config.get("init_std") or config["hidden_size"] ** -0.5}[config["init_type"]]
        angles = position_ids.clamp(min=0).double().outer(
            config["rope_theta"] ** -(torch.arange(0, self.head_dim, 2).double() / self.head_dim)).repeat(1, 2)
        around = angles.cos(), angles.sin(), allowed(lengths, len(tokens))
        every = h_cycles * (l_cycles + 1)
        h_bp = min(h_cycles, (bp_steps or every) - 1)
        l_bp = (bp_steps or every) - h_bp
        z_h = weights["embed_tokens.embedding_weight"][tokens] / std
        z_l = weights["model.zL_init"].expand_as(z_h)
        found = {"embedding_out": z_h}
        for h in range(h_cycles):
            for l in range(l_cycles):  # noqa: E741
                with torch.set_grad_enabled(h_cycles * l_cycles - (h * l_cycles + l) <= l_bp):
                    z_l = self.stack("L", z_l + z_h, *around)
                found[f"tick{len(found) - 1:02d}.z_L"] = z_l
            with torch.set_grad_enabled(h_cycles - h <= h_bp):
                z_h = self.stack("H", z_h + z_l, *around)
            found[f"tick{len(found) - 1:02d}.z_H"] = z_h
        return found

    @property
    def head_dim(self) -> int:
        return self.config["hidden_size"] // self.config["num_heads"]

    def logits(self, z_h: torch.Tensor) -> torch.Tensor:
        return z_h @ self.weights["lm_head.weight"].t()

    def stack(self, name: str, x: torch.Tensor, *around: torch.Tensor) -> torch.Tensor:
        eps = self.config["norm_eps"]
        pre = {**self.config, **(self.config["H_override"] if name == "H" else {})}["norm_type"] == "pre"
        for i in range(self.config["n_layers"] // 2):
            weights = {key.removesuffix(".weight").rpartition(".")[2]: tensor for key, tensor in self.weights.items()
                       if f"{name}_level.core.layers.{i}." in key}
            for part in (self.attention, self.mlp):
                x = x + part(weights, rms_norm(x, eps), *around) if pre else rms_norm(
                    x + part(weights, x, *around), eps)
        return rms_norm(x, eps) if pre else x

    def attention(self, weights: Tensors, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                  mask: torch.Tensor) -> torch.Tensor:
        gate, *qkv = (x @ weights["gqkv_proj"].t()).chunk(4, -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for t in qkv)  # [heads, s, d]
        q, k = (t * cos + torch.cat((-t[..., self.head_dim // 2:], t[..., :self.head_dim // 2]), -1) * sin
                for t in (q, k))
        scores = (q @ k.transpose(1, 2) / self.head_dim ** 0.5).masked_fill(~mask, float("-inf"))
        mixed = scores.softmax(-1).nan_to_num() @ v  # a query that sees nothing gets zeros
        return (gate.sigmoid() * mixed.transpose(0, 1).flatten(1)) @ weights["o_proj"].t()

    def mlp(self, weights: Tensors, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ weights["gate_up_proj"].t()).chunk(2, -1)
        return (F.silu(gate) * up) @ weights["down_proj"].t()
