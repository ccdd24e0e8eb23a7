"""The Triton path: twins of the functions that model.Operations lists, fast. Same names, same signatures,
same results, which tests hold.

This page is the table of contents: what each operation promises, and the file that holds it. Equations are
those of DeepSeek-V3.2-Exp. Registered with torch.library as torch.ops.dsa.* (dense_attention as
flash_attention, beside cuDNN's own), so that torch.compile(model, fullgraph=True) passes through them.

Which kernel runs
    select               on up to 2048 keys a row is its own list of candidates; on more, guess a threshold
                         from a sample of the scores, then gather in one pass what is above it
      few rows of 32K    several programs gather what is above it in a row: decoding fills the GPU
      many queries,      filter, from 48K visible keys and 2^29 pairs on, up to 4 heads: a bit per key says
      few heads          whether it may be among the best, and no score is kept, as these are bound by memory
    select_by_blocks     scores of two mixed heads by the kernel of `index_scores`, two top-k as in `select`,
                         and between them the scores of gathered blocks; as `select` where all blocks are
                         candidates
    dense_attention      causal over one document, 16-bit heads of a size that it knows: cuDNN, the fastest
      else               flash: documents, MQA on latents, odd sizes, float32; few queries: keys in parts
    split_attention      the same for two chunks of a sequence that ranks share: cuDNN in pieces
    sparse_attention     the published shape (bf16, latents 512 + 64, 64 heads and more) on Hopper: Gluon,
                         warps that gather beside warps that multiply
      up to 32 heads     flash over the union of neighbouring queries' selections: one gather serves several
      up to 8 queries    flash, each list in parts: decoding fills the GPU, and no kernel runs before it
      FP8 cache          the published shape on Hopper, unless programs are few: Gluon; else flash over
                         pieces of 128 values, whose scale goes into S and P: nothing is decoded
      backward           16 bits, values of 32 to 128, from A100 on: one kernel; else one for each product
    indexer_loss_dense   the target by Gluon on Hopper (bf16, 16 heads and more of 64, 128 or 192), else by
                         Triton; the rest by Triton
    indexer_loss_sparse  over unions, too, of as many queries as make 64 rows of the larger number of heads,
                         backward of the indexer's, and at most 8
    decode_block         a block's products in six launches, one row by sums, several by tensor cores; what
                         they select and attend to by the operations above
    Portable from Ampere on: tiles follow the device's shared memory, and below sm_89, which has no FP8
    products, e4m3 becomes fp16 in registers. triton_kernels/hopper.py alone needs sm_90.

Letters
    B  sequences         S  queries            T  keys                   K  slots of a selection
    H  attention heads   D  their dimensions   V  dimensions of a value  R  rope dimensions
    HI indexer heads     DI their dimensions   U  tokens of a union      N  rows (query, head) of a tile
    M  blocks of a list (select_by_blocks)
    m, l  running maximum and sum of a softmax         BLOCK_x  extent of a tile along x
    Equations keep the paper's indices, t a query and s a token that it may see; code counts queries by s < S
    and keys by t < T.
"""
from indexer import RECENT
from triton_kernels import cross_entropy as _cross_entropy
from triton_kernels import blocks, decode, dense, index, loss, sparse


# ---- the lightning indexer: triton_kernels/index.py ----

def quantise(x, block=128, rotate=False, ue8m0=True):
    """x (..., d) float -> e4m3 values (..., d), float32 scales (..., ceil(d / block)); x is near values *
    scale. Bit-equal to indexer.quantise.

    amax clamped at 1e-4, scale = amax * float32(1/448), ue8m0: rounded up to a power of two (act_quant of the
    V3.2-Exp inference code). rotate: the orthonormal Walsh-Hadamard transform of the last dimension first. A
    block that is not finite becomes NaN. Not differentiable. ValueError: rotate with a d that is not a power
    of two; a block below d that is not a power of two."""
    return index.quantise(x, block, rotate, ue8m0)


def index_scores(q, k, w, k_scale=None, first=None, last=None):
    """I[t,s] = k_scale[s] sum_j w[t,j] relu(q[t,j] . k[s])   (eq. 1)

    q (B,S,HI,DI), k (B,T,DI) both bf16/fp16/fp32, or both e4m3 with k_scale (B,T) float32; w (B,S,HI) float32
    with HI^-1/2 DI^-1/2 (and q's scale) in it. first, last (B,S) int32: the visible range, None: 0 and T - S
    + i. -> (B,S,T) float32, -inf where not visible. Not differentiable. ValueError: types or shapes that do
    not fit."""
    return index.index_scores(q, k, w, k_scale, first, last)


def select(q, k, w, topk, k_scale=None, first=None, last=None):
    """S_t = the topk visible keys with the highest index score   (section 1)
    -> (B,S,K) int32, K = topk: ascending positions, then -1 in unused slots.

    Arguments as `index_scores`. Equal scores go to the lower position (-0.0 equals 0.0), NaN ranks above all,
    and what scores -inf counts as not visible; the same bits in every run. topk may exceed T. Memory: the
    result and at most some 1 GB of scores. Where it filters, the host reads once whether rows are left over;
    elsewhere, and while a CUDA graph is captured, it reads nothing. Not differentiable. ValueError: topk < 1,
    types or shapes that do not fit."""
    return index.select(q, k, w, topk, k_scale, first, last)


def topk(scores, topk, first=None, last=None):
    """`select` from scores (B,S,T) float32 that exist -> (B,S,K) int32. Not differentiable. ValueError:
    topk < 1."""
    return index.topk(scores, topk, first, last)


# ---- the same in two levels, beyond 128K: triton_kernels/blocks.py ----

def select_by_blocks(q, k, w, topk, k_scale=None, first=None, last=None, block=16, candidates=0,
                     recent=RECENT):
    """`select` in two levels, see docs/LONG.md: among what a query's document begins with (its first block of
    tokens), its `recent` last tokens, and of the blocks between those whose best token scores highest by two
    mixed heads (indexer.mixed_heads), `candidates` tokens of them (0: max(8 topk, T / 32)) -> (B,S,K) int32

    Other arguments, ties, NaN and -inf as `select`, which runs in place of this where all blocks are
    candidates. Memory: the result and some 1 GB of scores. The same bits in every run; the host reads
    nothing. Not differentiable. ValueError: topk or recent < 1, candidates < 0, a block that is no
    power of two up to 64, types or shapes that do not fit."""
    return blocks.select_by_blocks(q, k, w, topk, k_scale, first, last, block, candidates, recent)


# ---- attention: triton_kernels/dense.py, triton_kernels/sparse.py, triton_kernels/hopper.py ----

def dense_attention(q, k, v, scale, first=None, last=None):
    """Softmax attention over everything visible. q (B,S,H,D), k (B,T,Hk,D), v (B,T,Hk,V), Hk divides H: H
    (MHA), 1 (MQA on latents)
    -> out (B,S,H,V) in v's dtype, lse (B,S,H) float32, natural logarithm of sum exp(scale q.k).
    Differentiable in q, k, v, not through lse.

    A row that sees nothing: out 0, lse -inf, gradient 0. No atomics. ValueError: Hk does not divide H, shapes
    that do not fit."""
    return dense.dense_attention(q, k, v, scale, first, last)


def split_attention(q, k, v, scale, early, late):
    """`dense_attention` of queries that are two chunks of one document, of equal lengths, which begin at the
    positions early and late (a rank's part of a sequence, see parallel.py): arguments and results as there.

    Where cuDNN takes the heads: each chunk attends to its own keys causally, to all earlier ones without a
    mask, and the two are merged by their lse."""
    return dense.split_attention(q, k, v, scale, early, late)


def sparse_attention(q, latents, indices, scale, value_dim):
    """Softmax attention over the selected tokens only, MQA mode   (eq. 2)

    q (B,S,H,D) with W^UK absorbed, latents (B,T,D) = [c^KV ; k^R] (used in q's dtype) or a packed FP8 cache
    (B,T,bytes) uint8 (forward only), indices (B,S,K) int32, -1 = empty slot -> out (B,S,H,value_dim) in q's
    dtype, lse (B,S,H) float32, natural logarithm, not differentiated. A row with nothing selected: out 0, lse
    -inf, gradient 0. Differentiable in q and latents; dlatents is summed in float32 by atomics, so its last
    bits vary from run to run. Memory beyond outputs: 8 bytes x B S K (lists), scratch of the lists (133 MB
    at 128K with 16 heads, up to some 600 MB), at most 1 GB for P and dS, 4 bytes x B T D (dlatents).
    ValueError: shapes or dtypes that do not fit.

    Not finite: NaN in q, or in a token that a query selected, makes its rows NaN, out and lse. A token that
    nobody selected is not read, given that empty slots come last, as `select` leaves them. Queries that share
    a union, fewer than 32 neighbours, read all its tokens, with weight 0 what they did not select: there a
    token (and, in dlatents, a query) that is not finite may make NaN of the block's out and gradients, not of
    its lse. A row whose scores are all -inf counts as one with nothing selected."""
    return sparse.sparse_attention(q, latents, indices, scale, value_dim)


# ---- a decoding step: triton_kernels/decode.py ----

def decode_block(layer, h, state, selection, cache):
    """What a model.Block makes of one token of each sequence, h (B,1,hidden), with a cache, which the token
    enters; state, selection and results as in Block.forward, a tenth of its kernels. For queries that come
    from a latent and projections without biases; experts run as they do there. Rounded as there, in sums of
    another order. Not differentiable."""
    return decode.decode_block(layer, h, state, selection, cache)


# ---- how the indexer learns: triton_kernels/loss.py ----

def indexer_loss_dense(q, k, lse, scale, q_index, k_index, w, first=None, last=None):
    """Warm-up loss, KL(p_t || softmax(I_t)) over all visible tokens   (eq. 3)
    p the mean over heads of exp(scale q.k - lse).

    q (B,S,H,D), k (B,T,H or 1,D), lse (B,S,H) natural logarithm, of the frozen attention: no gradient.
    q_index (B,S,HI,DI), k_index (B,T,DI), w (B,S,HI) float32 receive one -> kl (B,S), kl_uniform (B,S)
    float32; 0 for a row that sees nothing. Deterministic. Never S x T in memory. ValueError: shapes that
    don't fit."""
    return loss.indexer_loss_dense(q, k, lse, scale, q_index, k_index, w, first, last)


def indexer_loss_sparse(q, latents, lse, indices, scale, q_index, k_index, w):
    """Sparse-stage loss, KL(p_{t,S_t} || softmax(I_{t,S_t})) over the selection only   (eq. 4)
    p the mean over heads of exp(scale q.latent - lse).

    q (B,S,H,D) absorbed, latents (B,T,D), lse (B,S,H) natural logarithm over the selection, indices (B,S,K)
    int32 ascending, then -1, as from `select`. Gradients to q_index (B,S,HI,DI), k_index (B,T,DI) (float32
    atomics: sums in no fixed order), w (B,S,HI) float32
    -> kl (B,S), kl_uniform (B,S) float32; 0 for a row with nothing selected. ValueError: shapes or types that
    don't fit."""
    return loss.indexer_loss_sparse(q, latents, lse, indices, scale, q_index, k_index, w)


# ---- the language-model loss of a slice of logits: triton_kernels/cross_entropy.py ----

def cross_entropy(logits, targets, grad):
    """logits (N,vocab) contiguous, targets (N,) int64 -> (N,) float32, -log softmax(logits)[target], in nats,
    NaN for a target that is none of the vocabulary; with grad its gradient softmax(logits) - [s = target]
    takes the logits' place."""
    return _cross_entropy.cross_entropy(logits, targets, grad)
