"""The architecture of a model: keys and meaning as in a published config.json."""
import math
from dataclasses import dataclass, field


# Who chooses the k tokens that a query reads: the indexer, or one of baselines.py
SELECTORS = ("indexer", "recent", "sinks", "random", "strided", "oracle")


def option(default, help, *choices, alone=None):
    """A dataclass field that scripts offer as --name: its default, its help text and, if any, its values.
    alone: what --name without a value means."""
    return field(default=default, metadata=dict(help=help, choices=choices or None, alone=alone))


def check_yarn(name, yarn, rope_theta):
    """ValueError, one line with key and value, unless the dict `yarn`, called `name`, is YaRN's."""
    kinds = [yarn[key] for key in ("rope_type", "type") if yarn.get(key) is not None]
    if not kinds or any(kind != "yarn" for kind in kinds):
        raise ValueError(f"{name}={yarn}: only type yarn is supported")
    for key in ("factor", "original_max_position_embeddings"):
        if yarn.get(key) is None:
            raise ValueError(f"{name}={yarn}: yarn needs {key}")
    lowest = dict(
        factor=1, original_max_position_embeddings=1, beta_fast=1e-9, beta_slow=1e-9, mscale=0,
        mscale_all_dim=0, attention_factor=1e-9)
    for key, low in lowest.items():
        value = yarn.get(key)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value < math.inf:
            raise ValueError(f"{name}.{key}={value!r}: must be a number from {low} on")
    if not isinstance(yarn.get("truncate", True), bool):
        raise ValueError(f"{name}.truncate={yarn['truncate']!r}: must be true or false")
    if (yarn.get("beta_fast") or 32) < (yarn.get("beta_slow") or 1) or rope_theta <= 1:
        raise ValueError(f"{name}={yarn}, rope_theta={rope_theta}: yarn needs a beta_fast not below "
                         "beta_slow (32 and 1 unless given) and a rope_theta above 1")


@dataclass
class Config:
    """Architecture; keys as in the published config.json, sizes in elements."""
    model_type: str = option("deepseek_v32", "the published family")
    vocab_size: int = option(257, "rows of the embedding")
    hidden_size: int = option(128, "width of the residual stream")
    intermediate_size: int = option(384, "width of the SwiGLU in dense layers")
    num_hidden_layers: int = option(4, "blocks")
    num_attention_heads: int = option(4, "heads of the main attention")
    q_lora_rank: int = option(96, "width of the query latent c^Q; 0: queries come from the hidden state")
    kv_lora_rank: int = option(64, "width of the latent c^KV, which a token leaves in the cache")
    qk_nope_head_dim: int = option(32, "dimensions of a query and key head without position")
    qk_rope_head_dim: int = option(16, "dimensions of a query head, and of the shared key, that RoPE rotates")
    v_head_dim: int = option(32, "dimensions of a value head")
    index_n_heads: int = option(4, "heads of the lightning indexer")
    index_head_dim: int = option(32, "dimensions of an indexer head, a power of two")
    index_topk: int = option(64, "k, tokens that a query attends to; 0: a dense model without indexer")
    index_block: int = option(0, "selection in two levels (docs/LONG.md): tokens of a block; two mixed heads "
                              "say which blocks all heads score; 0: all heads score all tokens")
    index_candidates: int = option(0, "tokens in the best blocks, which are scored (0: max(8 index_topk, "
                                   "T / 32))")
    index_exact_layers: int = option(2, "with index_block: so many first layers score all tokens by all "
                                     "heads")
    selector: str = option(
        "indexer", "who chooses the k tokens that a query reads (baselines.py): the indexer; recent: the "
        "last k; sinks: the first 4 and the last k - 4; random; strided: evenly spaced; oracle: those that "
        "dense attention looks at most, slow. The indexer learns on whoever chooses", *SELECTORS)
    indexer_rope_interleave: bool = option(False, "the indexer's RoPE pairs: (2i, 2i+1), else (i, i + dim/2)")
    indexer_types: list | None = option(None, "per layer: full, or shared (selects as the one before)")
    n_routed_experts: int = option(0, "experts of a mixture layer; 0: every layer is dense")
    num_experts_per_tok: int = option(2, "routed experts that a token passes")
    n_shared_experts: int = option(1, "experts that every token passes")
    moe_intermediate_size: int = option(128, "width of the SwiGLU of one expert")
    first_k_dense_replace: int = option(1, "the layers before this one are dense")
    mlp_layer_types: list | None = option(None, "per layer: dense, or sparse (experts)")
    topk_method: str = option("noaux_tc", "router; V3: noaux_tc, V2: greedy or group_limited_greedy")
    n_group: int = option(1, "groups of experts")
    topk_group: int = option(1, "groups that a token's experts come from")
    norm_topk_prob: bool = option(True, "the weights of a token's experts sum to one")
    routed_scaling_factor: float = option(1.0, "factor on what the routed experts add")
    max_position_embeddings: int = option(65536, "longest context in tokens")
    rope_theta: float = option(10000.0, "base of the RoPE frequencies")
    rope_scaling: dict | None = option(None, "YaRN: type, factor, original_max_position_embeddings, ...")
    rms_norm_eps: float = option(1e-6, "added to the mean square in the norms of the residual stream")
    attention_bias: bool = option(False, "biases in the attention's down and output projections")
    tie_word_embeddings: bool = option(False, "the output head is the embedding")
    initializer_range: float = option(0.1, "standard deviation of new weights (usual: 0.02); near 1 / "
                                           "sqrt(hidden_size) a small model learns in fewer steps")
    other: dict | None = option(None, "further keys of a loaded config.json, kept for saving")

    def has_experts(self, layer):
        """Does this layer route to experts, instead of one dense MLP?"""
        if self.n_routed_experts == 0:
            return False
        if self.mlp_layer_types:
            return self.mlp_layer_types[layer] == "sparse"
        return layer >= self.first_k_dense_replace

    def has_indexer(self, layer):
        """Does this layer select tokens itself?"""
        shared = self.indexer_types is not None and self.indexer_types[layer] == "shared"
        return self.index_topk > 0 and not shared

    def block_of(self, layer):
        """Tokens of a block if this layer selects in two levels; 0: among all tokens."""
        return self.index_block if layer >= self.index_exact_layers else 0

    def check(self):
        """-> self. ValueError, one line naming key, value and fix, if no model of this shape can be built."""
        self._check_sizes()
        self._check_indexer()
        self._check_layer_types()
        self._check_rope_scaling()
        if self.n_routed_experts:
            self._check_experts()
        return self

    def _check_sizes(self):
        lowest = dict(
            vocab_size=1, hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
            q_lora_rank=0, kv_lora_rank=1, qk_nope_head_dim=1, v_head_dim=1,
            n_routed_experts=0, n_shared_experts=0, first_k_dense_replace=0,
            max_position_embeddings=1, initializer_range=0, rope_theta=1e-9, rms_norm_eps=1e-30,
            routed_scaling_factor=0)
        for key, low in lowest.items():
            value = getattr(self, key)
            if not low <= value < math.inf:  # NaN and infinity compare false, too
                raise ValueError(f"{key}={value}: must be a number from {low} on")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim}: RoPE rotates pairs; choose an even "
                             "number from 2 on")

    def _check_indexer(self):
        if self.selector not in SELECTORS:
            raise ValueError(f"selector={self.selector!r}: choose one of {', '.join(SELECTORS)}")
        if self.selector != "indexer" and (self.index_block or not self.index_topk):
            raise ValueError(f"selector={self.selector} with index_block={self.index_block}, "
                             f"index_topk={self.index_topk}: needs an index_topk from 1 on, and selection in "
                             "two levels is the indexer's alone (index_block 0)")
        if self.index_topk < 0:
            raise ValueError(f"index_topk={self.index_topk}: a query selects at least 1 token "
                             "(0 builds a dense model without indexer)")
        if self.index_topk == 0:
            return
        power_of_two = self.index_head_dim > 0 and self.index_head_dim & (self.index_head_dim - 1) == 0
        if self.index_n_heads < 1 or self.index_head_dim < self.qk_rope_head_dim or not power_of_two:
            raise ValueError(
                f"index_n_heads={self.index_n_heads}, index_head_dim={self.index_head_dim}: the indexer "
                "needs at least one head, of a power of two (Hadamard) not below "
                f"qk_rope_head_dim={self.qk_rope_head_dim}")
        if not 0 <= self.index_block <= 64 or self.index_block & (self.index_block - 1):
            raise ValueError(f"index_block={self.index_block}: tokens of a block, a power of two up to 64 "
                             "(0: one level)")
        if min(self.index_candidates, self.index_exact_layers) < 0:
            raise ValueError(f"index_candidates={self.index_candidates}, "
                             f"index_exact_layers={self.index_exact_layers}: tokens and layers, from 0 on")

    def _check_layer_types(self):
        for key, kinds in dict(indexer_types=("full", "shared"), mlp_layer_types=("dense", "sparse")).items():
            types = getattr(self, key)
            if types is None:
                continue
            known = all(kind in kinds for kind in types)
            if not known or len(types) != self.num_hidden_layers:
                raise ValueError(f"{key}={types}: give one of {' or '.join(kinds)} for each of "
                                 f"{self.num_hidden_layers} layers")
            if types[0] == "shared":
                raise ValueError(f"{key}={types}: the first layer has no selection to share; make it full")

    def _check_rope_scaling(self):
        if self.rope_scaling is not None:
            check_yarn("rope_scaling", self.rope_scaling, self.rope_theta)

    def _check_experts(self):
        experts = self.n_routed_experts
        groups = self.n_group
        if self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size={self.moe_intermediate_size}: must be at least 1")
        if groups < 1 or experts % groups:
            raise ValueError(f"n_group={groups}: must divide n_routed_experts={experts}")
        if not 1 <= self.topk_group <= groups:
            raise ValueError(f"topk_group={self.topk_group}: must be between 1 and n_group={groups}")
        reachable = experts // groups * self.topk_group
        if not 1 <= self.num_experts_per_tok <= reachable:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: must be between 1 and "
                             f"{reachable}, the experts of topk_group={self.topk_group} groups")
        if self.topk_method == "noaux_tc" and groups > 1 and experts < 2 * groups:
            raise ValueError(f"n_group={groups}: noaux_tc ranks a group by its 2 best experts; with "
                             f"n_routed_experts={experts} choose at most {experts // 2}")
        v2 = self.model_type == "deepseek_v2"
        methods = ("greedy", "group_limited_greedy") if v2 else ("noaux_tc",)
        normalised_v2 = v2 and self.norm_topk_prob  # implementations disagree about its meaning
        if self.topk_method not in methods or normalised_v2:
            raise ValueError(
                f"topk_method={self.topk_method}, norm_topk_prob={self.norm_topk_prob}: {self.model_type} "
                f"supports {' and '.join(methods)}{', not normalised' if v2 else ''}")
