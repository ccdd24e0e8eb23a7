"""The architecture of a model: keys and meaning as in a published config.json."""
from dataclasses import dataclass


@dataclass
class Config:
    """Architecture; keys as in the published config.json. Sizes in units of elements. ValueError from `check` names the key and the fix."""
    model_type: str = "deepseek_v32"  # the published family
    vocab_size: int = 257
    hidden_size: int = 128
    intermediate_size: int = 384  # SwiGLU width of dense layers
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    q_lora_rank: int = 96  # 0: queries come from the hidden state directly
    kv_lora_rank: int = 64  # what a token leaves in the cache, with qk_rope_head_dim
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    index_n_heads: int = 4
    index_head_dim: int = 32
    index_topk: int = 64  # k, tokens that a query attends to; 0: a dense model without indexer
    indexer_rope_interleave: bool = False  # GLM-5: True
    indexer_types: list | None = None  # "full" or "shared" (the selection of the layer before) per layer, GLM-5.2; None: all full
    n_routed_experts: int = 0  # 0: every layer is dense
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1  # seen by every token
    moe_intermediate_size: int = 128  # SwiGLU width of one expert
    first_k_dense_replace: int = 1  # the layers before this one are dense
    mlp_layer_types: list | None = None  # "dense" or "sparse" (experts) per layer; None: from first_k_dense_replace
    topk_method: str = "noaux_tc"  # V3: sigmoid scores and a correction bias; V2: softmax scores, greedy or group_limited_greedy
    n_group: int = 1  # a token's experts come from the best topk_group of n_group groups
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    max_position_embeddings: int = 65536
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # YaRN: type, factor, original_max_position_embeddings, beta_fast, beta_slow, mscale, mscale_all_dim
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    other: dict | None = None  # what a loaded config.json says beyond this (bos_token_id, ...), kept for saving

    def has_experts(self, layer):
        """Does this layer route to experts, instead of one dense MLP?"""
        sparse = self.mlp_layer_types[layer] == "sparse" if self.mlp_layer_types else layer >= self.first_k_dense_replace
        return self.n_routed_experts > 0 and sparse

    def has_indexer(self, layer):
        """Does this layer select tokens itself?"""
        return self.index_topk > 0 and not (self.indexer_types and self.indexer_types[layer] == "shared")

    def check(self):
        """Raise ValueError, one line naming key, value and fix, if no model of this shape can be built. Returns self."""
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
                    "qk_nope_head_dim", "v_head_dim", "max_position_embeddings"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        for key, low in (("q_lora_rank", 0), ("n_shared_experts", 0), ("initializer_range", 0), ("rope_theta", 1e-9), ("rms_norm_eps", 1e-30)):
            if not getattr(self, key) >= low:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least {low}")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim}: RoPE turns pairs, choose an even number >= 2")
        if self.index_topk < 0:
            raise ValueError(f"index_topk={self.index_topk}: a query selects at least 1 token (0 builds a dense model without indexer)")
        if self.index_topk and (self.index_n_heads < 1 or self.index_head_dim < self.qk_rope_head_dim or self.index_head_dim & (self.index_head_dim - 1)):
            raise ValueError(f"index_n_heads={self.index_n_heads}, index_head_dim={self.index_head_dim}: the indexer needs at least one head, and a "
                             f"power of two (Hadamard) not below qk_rope_head_dim={self.qk_rope_head_dim}")
        for key, kinds in (("indexer_types", ("full", "shared")), ("mlp_layer_types", ("dense", "sparse"))):
            types = getattr(self, key)
            if types and (len(types) != self.num_hidden_layers or not set(types) <= set(kinds) or types[0] == "shared"):
                raise ValueError(f"{key}={types}: give one of {kinds} for each of {self.num_hidden_layers} layers; the first cannot be shared")
        yarn = self.rope_scaling
        if yarn and (yarn.get("rope_type", yarn.get("type")) != "yarn" or not yarn.get("factor") or not yarn.get("original_max_position_embeddings")):
            raise ValueError(f"rope_scaling={yarn}: only type yarn, with factor and original_max_position_embeddings, is supported")
        E, groups = self.n_routed_experts, self.n_group
        if E and (E < 0 or groups < 1 or E % groups or not 1 <= self.topk_group <= groups or self.moe_intermediate_size < 1 or
                  not 1 <= self.num_experts_per_tok <= E // groups * self.topk_group or (self.topk_method == "noaux_tc" and groups > 1 and E < 2 * groups)):
            raise ValueError(f"n_routed_experts={E}, n_group={groups}, topk_group={self.topk_group}, num_experts_per_tok={self.num_experts_per_tok}, "
                             f"moe_intermediate_size={self.moe_intermediate_size}: groups must be equal, and those chosen hold the experts of a token")
        methods = ("greedy", "group_limited_greedy") if self.model_type == "deepseek_v2" else ("noaux_tc",)
        if E and (self.topk_method not in methods or (self.norm_topk_prob and self.model_type == "deepseek_v2")):  # V2: implementations disagree
            raise ValueError(f"topk_method={self.topk_method}, norm_topk_prob={self.norm_topk_prob}: {self.model_type} supports {' and '.join(methods)}"
                             f"{', not normalised' if self.model_type == 'deepseek_v2' else ''}")
        return self
