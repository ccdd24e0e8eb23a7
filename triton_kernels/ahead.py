"""Compile kernels before they are needed, all at once instead of each where it is first launched, so that a
cold `sample.py` has its answer sooner (bench.py, part `cold`)."""
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from triton import knobs
from triton.runtime.cache import triton_key


def compile_kernel(function, specialization, device):
    """Make `function`, a JITFunction, ready for launches of this specialization."""
    with torch.cuda.device(device):
        binary = function.preload(specialization)
        binary.run  # a property that compiles the host's part of a launch and loads the kernel


def compile_ahead(rehearsals, device):
    """Call each function of `rehearsals`, launching nothing: what its kernels would write keeps what was
    there. Then threads compile what was to be launched, the first rehearsal's kernels first -> for each a
    list of futures. What cannot be compiled fails where it is launched, and is reported there.

    In a process that has launched no kernel: one that is compiled would run, on what was there. Kernels that
    are interpreted are not compiled: []."""
    if knobs.runtime.interpret:
        return []
    wanted = {}

    def note(*, key, fn, compile, **_):
        """Triton's hook before it compiles -> True: it neither compiles nor launches."""
        wanted.setdefault((fn.jit_function, key), compile["specialization_data"])
        return True

    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile")
    hashed = pool.submit(triton_key)  # of Triton itself, 400 MB: what every first compilation begins with
    ends = []
    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        for rehearsal in rehearsals:
            rehearsal()
            ends.append(len(wanted))
    finally:
        knobs.runtime.jit_cache_hook = before

    hashed.result()
    futures = []
    for (function, _), specialization in wanted.items():
        futures.append(pool.submit(compile_kernel, function, specialization, device))
    pool.shutdown(wait=False)
    return [futures[begin:end] for begin, end in zip([0, *ends], ends)]
