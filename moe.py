"""The feed-forward half of a block: SwiGLU, and the mixture of experts of the DeepSeek families.

The weights of all experts are stacked, so that a GPU multiplies all of them in one grouped kernel;
checkpoints hold a tensor per expert. Everything is differentiable, but made for models whose router is
trained already: there is no balancing loss.
"""
import torch
import torch.nn.functional as F
from torch import nn

from precision import exact, product_dtype


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
    """x (N,in), its rows sorted by expert, weight (E,out,in), ends (E,) int32: where the rows of each expert
    end -> (N,out).

    One kernel for all experts on a GPU in bf16 (its rows must be multiples of 16 bytes), else a loop over the
    experts that were hit."""
    x = x.to(product_dtype(x))  # grouped_mm is not on autocast's list
    weight = weight.to(product_dtype(weight))
    bf16 = x.dtype == weight.dtype == torch.bfloat16
    if x.is_cuda and bf16 and weight.shape[1] % 8 == weight.shape[2] % 8 == 0:
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = []
    start = 0
    for end, expert in zip(ends.tolist(), weight):
        if end > start:
            parts.append(F.linear(x[start:end], expert))
        start = end
    return torch.cat(parts)


class MoE(nn.Module):
    """DeepSeekMoE: every token passes num_experts_per_tok routed experts and the shared ones (V2, section
    2.2; V3, section 2.1.2).

    The router computes in float32 and learns through the weights of the experts it chose. There is no
    balancing loss (from-scratch training of experts is not the aim), and V3's correction bias stays as
    loaded."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        E = config.n_routed_experts
        hidden = config.hidden_size
        inner = config.moe_intermediate_size
        self.gate = nn.Linear(hidden, E, bias=False)
        if config.topk_method == "noaux_tc":
            self.gate.register_buffer("e_score_correction_bias", torch.zeros(E, dtype=torch.float32))
        self.experts = nn.ParameterDict(dict(
            gate_up_proj=torch.empty(E, 2 * inner, hidden),
            down_proj=torch.empty(E, hidden, inner)))
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(hidden, inner * config.n_shared_experts)

    def scores(self, x):
        """x (N,hidden) -> scores and what experts are chosen by, (N,E) float32 each."""
        with exact(x):
            logits = F.linear(x.float(), self.gate.weight.float())  # (N, E)
        if self.config.topk_method == "noaux_tc":
            scores = logits.sigmoid()
            # the bias balances the load: it decides who is chosen, not with which weight
            return scores, scores + self.gate.e_score_correction_bias.float()
        scores = logits.softmax(-1)
        return scores, scores

    def best_groups(self, choice):
        """choice (N,E) -> the same, -inf outside the topk_group best groups of experts."""
        c = self.config
        groups = choice.unflatten(-1, (c.n_group, -1))  # (N, groups, E / groups)
        if c.topk_method == "noaux_tc":
            merit = groups.topk(2).values.sum(-1)  # (N, groups)
        else:
            merit = groups.amax(-1)
        worst = merit.topk(c.n_group - c.topk_group, largest=False).indices  # (N, groups left out)
        worst = worst[..., None].expand(-1, -1, groups.shape[-1])
        return groups.scatter(1, worst, float("-inf")).flatten(1)

    def route(self, x):
        """x (N,hidden) -> weights (N,k) float32, experts (N,k) int64."""
        c = self.config
        scores, choice = self.scores(x)
        if c.n_group > 1 and c.topk_method != "greedy":
            choice = self.best_groups(choice)
        experts = choice.topk(c.num_experts_per_tok).indices  # (N, k)
        weights = scores.gather(1, experts)  # (N, k)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, experts

    def forward(self, h):
        """h (B,S,hidden) -> the same."""
        x = h.flatten(0, 1)  # (N, hidden)
        weights, experts = self.route(x)  # (N, k) each
        k = experts.shape[1]
        # pairs (token, expert), expert by expert
        sorted_experts, order = experts.flatten().sort(stable=True)  # (N k,) each
        all_experts = torch.arange(self.config.n_routed_experts, device=h.device)  # (E,)
        ends = torch.searchsorted(sorted_experts, all_experts, right=True).int()  # (E,)
        # copies before sorting: the gradient then sums k addends in a fixed order, where an index with
        # repeats would use atomics
        pairs = x[:, None].expand(-1, k, -1).flatten(0, 1).index_select(0, order)  # (N k, hidden)
        gate, up = grouped_linear(pairs, self.experts["gate_up_proj"], ends).chunk(2, -1)  # (N k, inner) each
        out = grouped_linear(F.silu(gate) * up, self.experts["down_proj"], ends)  # (N k, hidden)
        out = out.index_select(0, order.argsort()).unflatten(0, (-1, k))  # (N, k, hidden)
        out = (out * weights[..., None]).sum(1).to(h.dtype).view_as(h)  # (B, S, hidden)
        return out + self.shared_experts(h) if self.shared_experts else out
