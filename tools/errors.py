"""How far the kernels are from the reference on the same inputs: relative errors of the whole tensor / of its worst row, gradients included.

    python errors.py                                  # random inputs at the shapes of DeepSeek-V3.2 and of a model of GPT-2-small size
    python errors.py --checkpoint=out/sparse          # and what a trained model feeds them
    compute-sanitizer --tool memcheck python errors.py --small        # every kernel on small shapes; or --tool racecheck

The reference takes what the kernels take, rounded to bf16 as it is, and computes in float32. A row smaller than the mean row is measured against that.
Selections are compared as sets: the share of queries that select exactly the reference's tokens.
"""
import torch

from support import tokenizer
from support import checkpoint
from support import cli
import data
import indexer
import kernels
import sparse_attn
from bench import randn, selection
from model import Transformer
from sparse_attn import pack_latents
from triton_kernels import index

OPERATIONS = {  # name: the reference, what it returns, which of its arguments receive a gradient
    "dense_attention": (sparse_attn.dense_attention, ("out", "lse"), dict(dq=0, dk=1, dv=2)),
    "sparse_attention": (sparse_attn.sparse_attention, ("out", "lse"), dict(dq=0, dlatents=1)),
    "indexer_loss_dense": (indexer.indexer_loss_dense, ("kl", "kl_uniform"), dict(dq=4, dk=5, dw=6)),
    "indexer_loss_sparse": (indexer.indexer_loss_sparse, ("kl", "kl_uniform"), dict(dq=5, dk=6, dw=7)),
}


def relative(got, want):
    """Tensors (..., n) -> |got - want| / |want| of the whole and of the worst row."""
    got, want = (x.detach().double().flatten(0, -2) for x in (got, want))
    rows = want.norm(dim=-1)
    return ((got - want).norm() / want.norm()).item(), ((got - want).norm(dim=-1) / rows.clamp(min=rows.mean())).max().item()


def differences(name, args):
    """An operation of OPERATIONS on the kernels' arguments -> {"out": (whole, worst row), "dq": ...}; kl and lse count as one row."""
    reference, outputs, learn = OPERATIONS[name]
    learn = learn if all(args[i].is_floating_point() for i in learn.values()) else {}  # packed latents are for decoding
    results, g = [], None
    for function, cast in ((getattr(kernels, name), lambda x: x), (reference, torch.Tensor.float)):
        leaves = [cast(x.detach()).clone() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        for i in learn.values():
            leaves[i].requires_grad_()
        values = function(*leaves)
        if g is None:  # attention: as random as a gradient; a loss: its mean
            g = torch.randn_like(values[0]) if outputs[0] == "out" else torch.full_like(values[0], 1 / values[0].numel())
        gradients = torch.autograd.grad(values[0], [leaves[i] for i in learn.values()], g.to(values[0].dtype)) if learn else ()
        results.append(dict(zip((*outputs, *learn), (*(x if n == "out" else x.flatten()[None] for n, x in zip(outputs, values)), *gradients))))
    return {label: relative(got, results[1][label]) for label, got in results[0].items()}


def index_inputs(S, T, heads, dim):
    """q (1,S,heads,dim) and k (1,T,dim) bf16, positive w (1,S,heads) float32."""
    return randn(1, S, heads, dim), randn(1, T, dim), randn(1, S, heads, dtype=torch.float32).abs() * (heads * dim) ** -0.5


def random_cases(small):
    """(label, name of the operation, arguments): both regimes, few heads and many, and documents."""
    S, T, k = (67, 300, 64) if small else (256, 8192, 2048)
    for H, D, R, heads, dim in ((12, 128, 32, 4, 64), (16, 512, 64, 16, 128), (128, 512, 64, 64, 128), *([(1, 16, 16, 3, 32)] * small)):
        q, latents, indices, scale = randn(1, S, H, D + R), randn(1, T, D + R), selection(S, T, k), (D + R) ** -0.5
        label, lse = f"random, {H} heads, {D} + {R}, k {k} of {T}", kernels.sparse_attention(q, latents, indices, scale, D)[1]
        yield f"{label}: sparse attention", "sparse_attention", (q, latents, indices, scale, D)
        yield f"{label}: sparse loss, {heads} x {dim}", "indexer_loss_sparse", (q, latents, lse, indices, scale, *index_inputs(S, T, heads, dim))
        if D % 128 == 0:
            yield f"{label}: decoding, FP8 cache", "sparse_attention", (q[:, -1:], pack_latents(latents, D), indices[:, -1:], scale, D)
    for H, d, dv, heads, dim in ((12, 96, 64, 4, 64), (16, 128, 128, 16, 128), (128, 192, 128, 64, 128)):
        T = 300 if small else 2048
        q, k, v = (randn(1, T, H, n) for n in (d, d, dv))
        last = torch.arange(T, device="cuda", dtype=torch.int32)[None]
        for what, bounds in (("", (None, None)), (", documents", (last // 99 * 99, last))):
            lse = kernels.dense_attention(q, k, v, d**-0.5, *bounds)[1]
            yield f"random, {H} heads of {d}{what}: dense attention", "dense_attention", (q, k, v, d**-0.5, *bounds)
            yield f"random, {H} heads of {d}{what}: warm-up loss, {heads} x {dim}", "indexer_loss_dense", (q, k, lse, d**-0.5, *index_inputs(T, T, heads, dim), *bounds)


def recorded(model, tokens, dtype=None):
    """What a model on the kernels feeds them in a forward of either stage: {operation, or "select": [arguments of layer 0, 1, ...]}.
    tokens (B,T + 1) int64; dtype: of autocast, None without."""
    calls = {name: [] for name in (*OPERATIONS, "select")}
    real = {name: getattr(kernels, name) for name in calls}

    def listen(name):
        def call(*args):
            if args[0].shape[1] == tokens.shape[1] - 1:  # not the few queries on which recall is measured
                calls[name].append(args)
            return real[name](*args)
        return call

    try:
        for name in calls:
            setattr(kernels, name, listen(name))
        for model.attention in ("dense", "sparse"):
            with torch.no_grad(), torch.autocast(tokens.device.type, dtype, enabled=dtype is not None):
                model(tokens[:, :-1], tokens[:, 1:], index_loss=True, return_logits=False)
    finally:
        for name in calls:
            setattr(kernels, name, real[name])
    return calls


def same_selection(args):
    """Share of the queries for which kernels.select and indexer.select agree on every token."""
    return (kernels.select(*args) == indexer.select(*args)).all(-1).float().mean().item()


def small_kernels():
    """The kernels that no case reaches: selection by its ways, quantisation, cross entropy."""
    for heads, dim, S, T, k in ((4, 64, 300, 3000, 64), (64, 128, 70, 2500, 128), (3, 32, 1, 5000, 300)):
        q, k_index, w = index_inputs(S, T, heads, dim)
        (q, q_scale), (k_index, k_scale) = (kernels.quantise(x, rotate=True) for x in (q, k_index))
        args = q, k_index, w * q_scale[..., 0], k, k_scale[..., 0]
        kernels.index_scores(*args[:3], args[4])
        usual = index.SELECT_FILTER
        always = index.FilterRegime(
            queries=1, keys=1, keys_per_head=0, keys_per_topk=0, most_keys=2**20, most_topk=2048)
        for index.SELECT_FILTER in (usual, always):
            print(f"select, {heads} x {dim}, {k} of {T}: {same_selection(args):.2%} of the queries as the reference", flush=True)
        index.SELECT_FILTER = usual
    kernels.topk(randn(1, 5, 70000, dtype=torch.float32), 2048)
    kernels.topk(torch.zeros(1, 4, 9000, device="cuda"), 500)
    y = torch.randint(0, 5003, (70,), device="cuda")
    kernels.cross_entropy(randn(70, 5003), y, True)
    kernels.cross_entropy(randn(70, 257), y % 257, False)


def main():
    """Print a line per case as it is measured."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", help="a trained model on bytes, such as out/sparse: also compare on what it feeds the kernels")
    parser.add_argument("--small", action="store_true", help="small shapes and every kernel, for compute-sanitizer")
    o = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here; without one, pytest compares the kernels through Triton's interpreter")
    torch.manual_seed(0)
    cases = random_cases(o.small)
    if o.checkpoint:
        model = Transformer.from_pretrained(o.checkpoint, device="cuda")
        text = data.prepare("python", tokenizer.tokenizer_name(o.checkpoint))[1].tokens[:4097]
        calls = recorded(model, torch.from_numpy(text.astype("int64")).cuda()[None], torch.bfloat16)
        layers = sorted({0, model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 1})
        cases = *cases, *((f"trained, layer {n}: {name}", name, calls[name][n]) for name in OPERATIONS for n in layers)
    for label, name, args in cases:
        print(f"{label:<66} " + "  ".join(f"{what} {whole:.1e} / {worst:.1e}" for what, (whole, worst) in differences(name, args).items()), flush=True)
    for n in layers if o.checkpoint else ():
        print(f"trained, layer {n}: {same_selection(calls['select'][n]):.2%} of the queries select as the reference")
    if o.small:
        small_kernels()


if __name__ == "__main__":
    cli.run(main)
