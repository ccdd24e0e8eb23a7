"""How far the kernels are from the reference on the same inputs: relative errors of the whole tensor / of its
worst row, gradients included.

    python -m tools.errors                              # random inputs: DeepSeek-V3.2's shapes, GPT-2-small's
    python -m tools.errors --checkpoint=out/sparse      # and what a trained model feeds them
    compute-sanitizer --tool memcheck python -m tools.errors --small    # every kernel, small (or racecheck)

The reference takes what the kernels take, rounded to bf16 as it is, and computes in float32. Rows are
measured as in tests/common.py. Selections are compared as sets: the share of queries that select exactly the
reference's tokens.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch

import data
import indexer
import kernels
import sparse_attn
from bench import randn, selection
from model import Transformer, watched
from sparse_attn import pack_latents
from support import cli, tokenizer
from tests.common import MEAN_ROW, relative_errors
from triton_kernels import index


class Operation(NamedTuple):
    """What is compared of an operation."""
    reference: Callable
    outputs: tuple  # names of what it returns
    gradients: dict  # name: which argument receives it


ATTENTION = ("out", "lse")
LOSS = ("kl", "kl_uniform")
OPERATIONS = {
    "dense_attention": Operation(sparse_attn.dense_attention, ATTENTION, dict(dq=0, dk=1, dv=2)),
    "sparse_attention": Operation(sparse_attn.sparse_attention, ATTENTION, dict(dq=0, dlatents=1)),
    "indexer_loss_dense": Operation(indexer.indexer_loss_dense, LOSS, dict(dq=4, dk=5, dw=6)),
    "indexer_loss_sparse": Operation(indexer.indexer_loss_sparse, LOSS, dict(dq=5, dk=6, dw=7)),
}
FILTER_ALWAYS = index.FilterRegime(
    pairs=1, keys=1, keys_per_topk=0, most_keys=2**20, most_topk=2048, most_heads=2**10)


# ---- the comparison ----

def is_real(x):
    """Is this argument a tensor of floating-point numbers?"""
    return torch.is_tensor(x) and x.is_floating_point()


def outcome(function, operation, args, upstream=None):
    """function(*args) -> {name: tensor} of its outputs and gradients, and the gradient it got with respect to
    its first output: `upstream`, or one made here."""
    leaves = [x.detach().clone() if is_real(x) else x for x in args]
    learning = {}
    if all(is_real(args[i]) for i in operation.gradients.values()):  # packed latents are for decoding
        learning = {name: leaves[i].requires_grad_() for name, i in operation.gradients.items()}
    values = function(*leaves)
    found = {}
    for name, value in zip(operation.outputs, values):
        found[name] = value if name == "out" else value.flatten()[None]  # lse and kl count as one row
    if upstream is None and operation.outputs[0] == "out":
        upstream = torch.randn_like(values[0])
    elif upstream is None:  # of the mean of a loss
        upstream = torch.full_like(values[0], 1 / values[0].numel())
    if learning:
        gradients = torch.autograd.grad(values[0], list(learning.values()), upstream.to(values[0].dtype))
        found |= zip(learning, gradients)
    return found, upstream


def differences(name, args):
    """An operation of OPERATIONS on the kernels' arguments -> {"out": (whole, worst row), "dq": ...}."""
    operation = OPERATIONS[name]
    got, upstream = outcome(getattr(kernels, name), operation, args)
    in_float = [x.float() if is_real(x) else x for x in args]
    want, _ = outcome(operation.reference, operation, in_float, upstream)
    return {label: relative_errors(got[label], want[label], MEAN_ROW) for label in got}


def same_selection(args):
    """Share of the queries for which kernels.select and indexer.select agree on every token."""
    return (kernels.select(*args) == indexer.select(*args)).all(-1).float().mean().item()


# ---- what is compared ----

def index_inputs(S, T, heads, dim):
    """q (1,S,heads,dim) and k (1,T,dim) bf16, positive w (1,S,heads) float32."""
    q = randn(1, S, heads, dim)
    k = randn(1, T, dim)
    w = randn(1, S, heads, dtype=torch.float32).abs() * (heads * dim) ** -0.5
    return q, k, w


def random_cases(small):
    """Yield (label, name of the operation, arguments): few heads and many, and documents."""
    yield from random_sparse_cases(small)
    yield from random_dense_cases(small)


def random_sparse_cases(small):
    """Sparse attention, its loss, and decoding from the FP8 cache."""
    S, T, k = (67, 300, 64) if small else (256, 8192, 2048)
    shapes = [(12, 128, 32, 4, 64), (16, 512, 64, 16, 128), (128, 512, 64, 64, 128)]
    if small:
        shapes.append((1, 16, 16, 3, 32))
    for H, V, R, HI, DI in shapes:
        q = randn(1, S, H, V + R)
        latents = randn(1, T, V + R)
        indices = selection(S, T, k)  # (1, S, k)
        scale = (V + R) ** -0.5
        lse = kernels.sparse_attention(q, latents, indices, scale, V)[1]  # (1, S, H)
        label = f"random, {H} heads, {V} + {R}, k {k} of {T}"
        args = (q, latents, indices, scale, V)
        yield f"{label}: sparse attention", "sparse_attention", args
        args = (q, latents, lse, indices, scale, *index_inputs(S, T, HI, DI))
        yield f"{label}: sparse loss, {HI} x {DI}", "indexer_loss_sparse", args
        if V % 128 == 0:
            args = (q[:, -1:], pack_latents(latents, V), indices[:, -1:], scale, V)
            yield f"{label}: decoding, FP8 cache", "sparse_attention", args


def random_dense_cases(small):
    """Dense attention and the warm-up loss, one document and several."""
    T = 300 if small else 2048
    last = torch.arange(T, device="cuda", dtype=torch.int32)[None]  # (1, T)
    documents = (last // 99 * 99, last)
    for H, D, V, HI, DI in ((12, 96, 64, 4, 64), (16, 128, 128, 16, 128), (128, 192, 128, 64, 128)):
        q = randn(1, T, H, D)
        k = randn(1, T, H, D)
        v = randn(1, T, H, V)
        scale = D**-0.5
        for what, bounds in (("", (None, None)), (", documents", documents)):
            lse = kernels.dense_attention(q, k, v, scale, *bounds)[1]  # (1, T, H)
            label = f"random, {H} heads of {D}{what}"
            yield f"{label}: dense attention", "dense_attention", (q, k, v, scale, *bounds)
            args = (q, k, lse, scale, *index_inputs(T, T, HI, DI), *bounds)
            yield f"{label}: warm-up loss, {HI} x {DI}", "indexer_loss_dense", args


def recorded(model, tokens, dtype=None):
    """What a model on the kernels feeds them in a forward of either stage: {operation, or "select":
    [arguments of layer 0, 1, ...]}. tokens (B,T + 1) int64; dtype: of autocast, None without."""
    calls = {name: [] for name in (*OPERATIONS, "select")}
    T = tokens.shape[1] - 1

    def listen(name, function):
        def call(*args):
            if args[0].shape[1] == T:  # not the few queries on which recall is measured
                calls[name].append(args)
            return function(*args)

        return call

    def wrap(layer, h, ops):
        return ops._replace(**{name: listen(name, getattr(ops, name)) for name in calls})

    with watched(model, wrap):
        for attention in ("dense", "sparse"):
            model.attention = attention
            with torch.no_grad(), torch.autocast(tokens.device.type, dtype, enabled=dtype is not None):
                model(tokens[:, :-1], tokens[:, 1:], index_loss=True, logits_of=None)
    return calls


def small_kernels():
    """The kernels that no case reaches: selection by its ways, quantisation, cross entropy."""
    usual = index.SELECT_FILTER
    for HI, DI, S, T, k in ((4, 64, 300, 3000, 64), (64, 128, 70, 2500, 128), (3, 32, 1, 5000, 300)):
        q, k_index, w = index_inputs(S, T, HI, DI)
        q, q_scale = kernels.quantise(q, rotate=True)  # (1, S, HI, DI), (1, S, HI, 1)
        k_index, k_scale = kernels.quantise(k_index, rotate=True)  # (1, T, DI), (1, T, 1)
        w = w * q_scale[..., 0]
        k_scale = k_scale[..., 0]
        kernels.index_scores(q, k_index, w, k_scale)
        for regime in (usual, FILTER_ALWAYS):
            index.SELECT_FILTER = regime
            same = same_selection((q, k_index, w, k, k_scale))
            print(f"select, {HI} x {DI}, {k} of {T}: {same:.2%} of the queries as the reference", flush=True)
        index.SELECT_FILTER = usual
    kernels.topk(randn(1, 5, 70000, dtype=torch.float32), 2048)
    kernels.topk(torch.zeros(1, 4, 9000, device="cuda"), 500)
    targets = torch.randint(0, 5003, (70,), device="cuda")
    kernels.cross_entropy(randn(70, 5003), targets, True)
    kernels.cross_entropy(randn(70, 257), targets % 257, False)


# ---- the table ----

def print_case(label, name, args):
    """Measure a case and print its line."""
    errors = differences(name, args)
    figures = [f"{what} {whole:.1e} / {worst:.1e}" for what, (whole, worst) in errors.items()]
    print(f"{label:<66} " + "  ".join(figures), flush=True)


def print_trained(folder):
    """A line per operation for the first, the middle and the last layer of a trained model."""
    model = Transformer.from_pretrained(folder, device="cuda")
    text = data.prepare("python", tokenizer.tokenizer_name(folder))[1].tokens[:4097]
    calls = recorded(model, torch.from_numpy(text.astype("int64")).cuda()[None], torch.bfloat16)
    layers = model.config.num_hidden_layers
    shown = sorted({0, layers // 2, layers - 1})
    for name in OPERATIONS:
        for layer in shown:
            print_case(f"trained, layer {layer}: {name}", name, calls[name][layer])
    for layer in shown:
        same = same_selection(calls["select"][layer])
        print(f"trained, layer {layer}: {same:.2%} of the queries select as the reference")


def main():
    """Print a line per case as it is measured."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        help="a trained model on bytes, such as out/sparse: also compare on what it feeds the kernels")
    parser.add_argument(
        "--small", action="store_true", help="small shapes and every kernel, for compute-sanitizer")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here; without one, pytest compares the kernels through Triton's "
                         "interpreter")
    torch.manual_seed(0)
    for case in random_cases(options.small):
        print_case(*case)
    if options.checkpoint:
        print_trained(options.checkpoint)
    if options.small:
        small_kernels()


if __name__ == "__main__":
    cli.run(main)
