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
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import generate
import kernels
from config import Config
from model import Transformer
from sparse_attn import pack_latents
from triton_kernels import blocks, common, cross_entropy, decode, dense, index, loss, sparse

CHAPTERS = (blocks, common, cross_entropy, decode, dense, index, loss, sparse)
SHARED_MEMORY = 232448  # bytes of a program
BF16 = torch.bfloat16
E4M3 = torch.float8_e4m3fn


class Hopper:
    """What Triton asks of a GPU's driver before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compiling(most, done, failed):
    """-> what stands in the place of JITFunction.__getitem__: a launch compiles, and ends there. done: hashes
    of variants by kernel; failed: lines."""

    def launch(kernel, grid):
        def compiled(**arguments):
            name = kernel.__name__
            variants = done.setdefault(name, set())
            if len(variants) == most:
                return
            try:
                binary = kernel.run(grid=grid, warmup=True, **arguments)
            except Exception as error:  # of any stage of the compiler
                failed.append(f"{name}: {type(error).__name__}: {error}")
                return
            if binary.hash in variants:
                return
            variants.add(binary.hash)
            print(name, f"{binary.metadata.shared} bytes", flush=True)
            if binary.metadata.shared > SHARED_MEMORY:
                failed.append(f"{name}: {binary.metadata.shared} bytes of shared memory")

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
            kernels.topk(torch.zeros(1, 1, 70000), topk)
            if dtype != E4M3:
                kernels.quantise(k, 32, rotate=True)
                kernels.quantise(k.float(), DI)

    few = torch.zeros(1, 2048, 4, 64).to(E4M3), torch.zeros(1, 2**18, 64).to(E4M3), torch.zeros(1, 2048, 4)
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
            packed = pack_latents(latents.detach(), V)
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

    # of published widths, too
    wide = dict(num_attention_heads=2, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                qk_rope_head_dim=64, v_head_dim=128, index_head_dim=128)
    for sizes in (dict(), wide, wide | dict(v_head_dim=256)):
        for dtype, autocast in ((BF16, False), (torch.float32, False), (torch.float32, True)):
            model = Transformer(Config(num_hidden_layers=1, **sizes), "triton").to(dtype)
            for B, fp8 in ((1, False), (3, True), (40, False)):
                caches = generate.new_caches(model, B, 512, torch.device("cpu"), dtype, fp8)
                position = torch.zeros(B, 1, dtype=torch.long)
                with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
                    model(position, caches=caches, position=position, last=position.int())

    for grad in (False, True):
        kernels.cross_entropy(torch.zeros(8, 50000, dtype=BF16), torch.zeros(8, dtype=torch.int64), grad)


def main():
    """-> the exit status."""
    most = int(sys.argv[1]) if len(sys.argv) > 1 else -1
    done = {}
    failed = []
    driver.set_active(Hopper())
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
