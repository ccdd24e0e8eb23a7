"""The feed-forward half of a block: SwiGLU, and the mixture of experts of the DeepSeek families.

The weights of all experts are stacked, so that a GPU multiplies all of them in one grouped kernel; checkpoint.py splits the stacks into the
published per-expert tensors. Everything is differentiable, but made for models whose router is trained already: no balancing loss.
"""
import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def grouped_linear(x, weight, ends):
    """x (N,in), its rows sorted by expert, weight (E,out,in), ends (E,) int32: where the rows of each expert end -> (N,out).
    One kernel for all experts on a GPU in bf16 (rows of 16 bytes are its condition), else a loop over the experts that were hit."""
    if torch.is_autocast_enabled(x.device.type):  # grouped_mm is not on autocast's list
        x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and weight.shape[1] % 8 == weight.shape[2] % 8 == 0:
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
    bounds = [0, *ends.tolist()]
    return torch.cat([F.linear(x[a:b], w) for a, b, w in zip(bounds, bounds[1:], weight) if a < b])


class MoE(nn.Module):
    """DeepSeekMoE: every token passes num_experts_per_tok routed experts and the shared ones (V2, section 2.2; V3, section 2.1.2).

    The router computes in float32 and learns through the weights of the experts it chose. There is no balancing loss (from-scratch training of
    experts is not the aim), and V3's correction bias stays as loaded."""

    def __init__(self, config):
        super().__init__()
        c, self.config, E = config, config, config.n_routed_experts
        self.gate = nn.Linear(c.hidden_size, E, bias=False)
        if c.topk_method == "noaux_tc":
            self.gate.register_buffer("e_score_correction_bias", torch.zeros(E, dtype=torch.float32))
        self.experts = nn.ParameterDict(dict(gate_up_proj=torch.empty(E, 2 * c.moe_intermediate_size, c.hidden_size),
                                             down_proj=torch.empty(E, c.hidden_size, c.moe_intermediate_size)))
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts) if c.n_shared_experts else None

    def route(self, x):
        """x (N,hidden) -> weights (N,k) float32, experts (N,k) int64."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight.float())
        if c.topk_method == "noaux_tc":  # the bias balances the load: it decides who is chosen, not with which weight
            scores = logits.sigmoid()
            choice = scores + self.gate.e_score_correction_bias.float()
        else:
            choice = scores = logits.softmax(-1)
        if c.n_group > 1 and c.topk_method != "greedy":
            groups = choice.unflatten(-1, (c.n_group, -1))
            merit = groups.topk(2).values.sum(-1) if c.topk_method == "noaux_tc" else groups.amax(-1)
            worst = merit.topk(c.n_group - c.topk_group, largest=False).indices
            choice = groups.scatter(1, worst[..., None].expand(-1, -1, groups.shape[-1]), float("-inf")).flatten(1)
        experts = choice.topk(c.num_experts_per_tok).indices
        weights = scores.gather(1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, experts

    def forward(self, h):
        """h (B,S,hidden) -> the same."""
        x = h.flatten(0, 1)
        weights, experts = self.route(x)
        k = experts.shape[1]
        expert, order = experts.flatten().sort(stable=True)  # (token, expert) pairs, expert by expert
        ends = torch.searchsorted(expert, torch.arange(self.config.n_routed_experts, device=h.device), right=True).int()
        # copies before sorting: the gradient then sums k addends in a fixed order, where an index with repeats would use atomics
        pairs = x[:, None].expand(-1, k, -1).flatten(0, 1).index_select(0, order)
        gate, up = grouped_linear(pairs, self.experts["gate_up_proj"], ends).chunk(2, -1)
        out = grouped_linear(F.silu(gate) * up, self.experts["down_proj"], ends).index_select(0, order.argsort())
        out = (out.unflatten(0, (-1, k)) * weights[..., None]).sum(1).to(h.dtype).view_as(h)
        return out + self.shared_experts(h) if self.shared_experts else out
