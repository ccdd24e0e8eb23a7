"""Compile the portable kernels for Hopper (sm_90), which need not be there, with the tiles that they take on
an H100:

    python -m tests.compiling        # or with a 2: at most two variants of each kernel, 90 s

Triton's interpreter runs a kernel as Python. It does not see a variable whose type changes in a loop, a tile
of a shape that no instruction has, or more shared memory than there is; the compiler does. Each launch of the
calls below is compiled instead of run (what they return is not computed). A line for each; exit status 1 if
one fails, or if a kernel is launched by none. triton_kernels/hopper.py is left out: Gluon compiles otherwise.
"""
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import kernels
from triton_kernels import blocks, common, cross_entropy, dense, index, loss, sparse

CHAPTERS = (blocks, common, cross_entropy, dense, index, loss, sparse)
SHARED_MEMORY = 232448  # bytes of a program
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
BF16 = torch.bfloat16
E4M3 = torch.float8_e4m3fn


def compiling(most, done, failed):
    """-> what stands in the place of JITFunction.__getitem__: specialised as it would, a launch is compiled.
    done: variants by kernel; failed: lines."""

    def launch(kernel, grid):
        def compiled(**arguments):
            options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
            options = {name: value for name, value in options.items() if value is not None}
            signature = {}
            constants = {}
            attributes = {}
            for i, parameter in enumerate(kernel.params):
                value = arguments[parameter.name]
                signature[parameter.name] = "constexpr"
                if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                    constants[i,] = value
                elif isinstance(value, torch.Tensor):
                    signature[parameter.name] = TYPES[value.dtype]
                    attributes[i,] = [["tt.divisibility", 16]]
                elif isinstance(value, float):
                    signature[parameter.name] = "fp32"
                else:
                    signature[parameter.name] = "i32"
                    if value % 16 == 0:
                        attributes[i,] = [["tt.divisibility", 16]]
            name = kernel.__name__
            what = f"{name} {signature} {constants} {options}"
            variants = done.setdefault(name, set())
            if what in variants or len(variants) == most:
                return
            variants.add(what)
            try:
                binary = triton.compile(
                    ASTSource(kernel, signature, constants, attributes),
                    target=GPUTarget("cuda", 90, 32), options=options)
            except Exception as error:  # of any stage of the compiler
                failed.append(f"{what}: {type(error).__name__}: {error}")
                return
            if binary.metadata.shared > SHARED_MEMORY:
                failed.append(f"{what}: {binary.metadata.shared} bytes of shared memory")
            print(name, options, f"{binary.metadata.shared} bytes", flush=True)

        return compiled

    return launch


def call_the_kernels():
    """In each regime that kernels.py names, but for Hopper's own."""
    for HI, DI, topk, T in ((8, 64, 512, 8192), (64, 128, 2048, 8192), (3, 16, 5, 70)):
        for dtype in (E4M3, BF16, torch.float32):
            q = torch.zeros(1, 512, HI, DI).to(dtype)
            k = torch.zeros(1, T, DI).to(dtype)
            w = torch.zeros(1, 512, HI)
            k_scale = torch.ones(1, T) if dtype == E4M3 else None
            last = torch.zeros(1, 512, dtype=torch.int32)
            kernels.index_scores(q, k, w, k_scale)
            kernels.select(q, k, w, topk, k_scale)
            kernels.select(q[:, :1], k, w[:, :1], topk, k_scale, last=last[:, :1])
            kernels.select_by_blocks(q, k, w, topk, k_scale, block=16, candidates=32, recent=16)
            if dtype != E4M3:
                kernels.quantise(k, 32, rotate=True)
                kernels.quantise(k.float(), DI)

    few = torch.zeros(1, 256, 4, 64).to(E4M3), torch.zeros(1, 2**18, 64).to(E4M3), torch.zeros(1, 256, 4)
    kernels.select(*few, 512, torch.ones(1, 2**18))  # by a filter

    for H, V, R, S in ((12, 128, 32, 512), (16, 512, 64, 512), (128, 512, 64, 64), (3, 24, 8, 40)):
        for dtype in (BF16, torch.float32):
            HI, DI = 8, 64
            q = torch.zeros(1, S, H, V + R, dtype=dtype, requires_grad=True)
            latents = torch.zeros(1, 1024, V + R, dtype=dtype, requires_grad=True)
            indices = torch.zeros(1, S, 256, dtype=torch.int32)
            out, lse = kernels.sparse_attention(q, latents, indices, 0.1, V)
            out.sum().backward()
            kernels.sparse_attention(q[:, :1], latents, indices[:, :1], 0.1, V)
            one_head = latents.detach()[:, :, None]
            kernels.dense_attention(q.detach()[:, :1], one_head, one_head[..., :V], 0.1)
            entry = V + 4 * -(-V // 128) + 2 * R
            packed = torch.zeros(1, 1024, entry, dtype=torch.uint8)
            kernels.sparse_attention(q.detach()[:, :1], packed, indices[:, :1], 0.1, V)

            q_index = torch.zeros(1, S, HI, DI, dtype=dtype, requires_grad=True)
            k_index = torch.zeros(1, 1024, DI, dtype=dtype, requires_grad=True)
            w = torch.zeros(1, S, HI, requires_grad=True)
            kl, _ = kernels.indexer_loss_sparse(q, latents, lse, indices, 0.1, q_index, k_index, w)
            kl.sum().backward()

            q = torch.zeros(1, S, H, 96, dtype=dtype, requires_grad=True)
            k = torch.zeros(1, 1024, H, 96, dtype=dtype, requires_grad=True)
            v = torch.zeros(1, 1024, H, 64, dtype=dtype, requires_grad=True)
            out, lse = kernels.dense_attention(q, k, v, 0.1)
            out.sum().backward()
            kl, _ = kernels.indexer_loss_dense(q, k, lse, 0.1, q_index, k_index, w)
            kl.sum().backward()

    for grad in (False, True):
        kernels.cross_entropy(torch.zeros(8, 50000, dtype=BF16), torch.zeros(8, dtype=torch.int64), grad)


def main():
    most = int(sys.argv[1]) if len(sys.argv) > 1 else -1
    done = {}
    failed = []
    JITFunction.__getitem__ = compiling(most, done, failed)
    for module in CHAPTERS:
        for name, value in dict(shared_memory=SHARED_MEMORY, multiprocessors=132).items():
            if hasattr(module, name):
                setattr(module, name, lambda device, value=value: value)
    call_the_kernels()
    for module in CHAPTERS:
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, JITFunction) and name not in done:
                failed.append(f"{name}: launched by none of the calls")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
