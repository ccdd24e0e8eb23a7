"""What tests/test_parallel.py runs on each rank: models whose losses and gradients must be those of one
process. A failed assertion ends the process with a traceback."""
import copy
import os
import sys
import tempfile

import torch

import parallel
import train
from model import Transformer
from support import cli
from tests.common import MEAN_ROW, assert_close, packed_batch, tiny_model

# Losses are means of some 64 tokens in float32, in another order; gradients as in tests/common.py. On GPUs
# products of other shapes round otherwise, and the kernels add by atomics
LOSS = dict(cpu=1e-6, cuda=1e-5)
GRADIENT = dict(cpu=(5e-6, 5e-5), cuda=(5e-5, 5e-4))
EXPERTS = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=20,
    first_k_dense_replace=1)

# stage, what it trains, attributes of the model, changes of its config
CASES = (
    ("dense", "all", {}, {}),
    ("dense", "all", dict(recompute=True), dict(tie_word_embeddings=True)),
    ("warmup", "all", {}, {}),
    ("sparse", "all", dict(index_fp8=True), {}),
    ("sparse", "all", dict(detach=False), EXPERTS),
    ("sparse", "attention", dict(recompute=True, offload=True), dict(q_lora_rank=0)),
    ("sparse", "none", {}, dict(indexer_types=["full", "shared", "full"])),
    ("control", "all", {}, {}),
    ("warmup", "all", dict(recompute=True), dict(indexer_types=["full", "shared", "full"])),
    ("sparse", "all", {}, dict(selector="random")),
    ("sparse", "all", {}, dict(selector="oracle")))


def backend_of(ranks):
    """The kernels on GPUs, the reference on CPUs."""
    return "triton" if ranks.device.type == "cuda" else "torch"


def steps(model, batches, stage, ranks=None, split=None):
    """Losses (means over the batches) and whole gradients by name."""
    model.attention = "sparse" if stage == "sparse" else "dense"
    means = {}
    for n, (x, y, first) in enumerate(batches):
        parallel.synchronise(model, n == len(batches) - 1)
        targets = None if stage == "warmup" else y
        _, losses = model(x, targets, first, index_loss=stage in ("warmup", "sparse"),
                          logits_of=None, split=split)
        (sum(losses[name] for name in ("lm", "kl") if name in losses) / len(batches)).backward()
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.item() / len(batches)
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradients[name] = parallel.whole_tensor(p.grad)
    return means if ranks is None else ranks.means(means), gradients


def compare(ranks, case, packed, compiled=False):
    """A case by one process with two micro-batches for each group, and by all ranks."""
    stage, choice, switches, changes = case
    torch.manual_seed(0)
    if compiled:
        changes = changes | dict(num_hidden_layers=1)
    backend = backend_of(ranks)
    plain = tiny_model(backend, **changes).to(ranks.device)
    for name, value in switches.items():
        setattr(plain, name, value)
    plain.requires_grad_(True)
    train.trainable(plain, stage, choice)
    batches = []
    for _ in range(2 * ranks.data):
        x, y, first = [t.to(ranks.device) for t in packed_batch(backend)]
        batches.append((x, y, first if packed else None))
    sharded = parallel.shard(copy.deepcopy(plain), ranks)
    want, want_gradients = steps(plain, batches, stage)

    split = ranks.split(batches[0][0].shape[1])
    ours = []
    for batch in batches[ranks.data_rank::ranks.data]:
        ours.append([x if x is None or split is None else split.part(x) for x in batch])
    if compiled:
        sharded.compile_layers(backend="aot_eager")
    got, gradients = steps(sharded, ours, stage, ranks, split)

    what = f"{case}, context {ranks.context}, packed {packed}, compiled {compiled}"
    assert got.keys() == want.keys() and gradients.keys() == want_gradients.keys(), what
    for name in got:
        if name != "recall" or ranks.context == 1:  # of other queries
            assert abs(got[name] - want[name]) < LOSS[ranks.device.type], (what, name, got[name], want[name])
        else:
            assert 0 < got[name] <= 1.001, (what, got)
    bounds = GRADIENT[ranks.device.type]
    for name in gradients:
        assert_close(gradients[name], want_gradients[name], *bounds, f"{what}, {name}", floor=MEAN_ROW)


def compare_prompts(ranks):
    """Prompts of all lengths up to a few chunks, dense and sparse, give what one process gives."""
    torch.manual_seed(1)
    for attention in ("dense", "sparse"):
        model = tiny_model(backend_of(ranks), attention, index_fp8=attention == "sparse")
        model = model.eval().to(ranks.device)
        for length in (1, 2, 5, 16, 33):
            x = torch.randint(61, (2, length)).to(ranks.device)
            options = dict(temperature=0, chunk=4, end_ids=(3,), go_on=True)
            want = model.generate(x, 6, **options)
            assert torch.equal(model.generate(x, 6, ranks=ranks, **options), want), (attention, length)


def compare_checkpoints(ranks):
    """Saved whole and read in parts: the same bits, of bf16 weights with float32 ones among them, too."""
    folder = ranks.gathered(tempfile.mkdtemp())[0]
    torch.manual_seed(2)
    plain = tiny_model("torch", **EXPERTS, tie_word_embeddings=True, vocab_size=63).bfloat16()
    ranks.on_rank_0(plain.save_pretrained, folder)

    def prepare(model):
        train.trainable(model, "sparse", "attention")
        return parallel.shard(model, ranks)

    sharded = Transformer.from_pretrained(folder, "torch", prepare=prepare, device=ranks.device)
    for name, x in sharded.named_parameters():
        whole = parallel.whole_tensor(x)
        assert torch.equal(whole.cpu(), plain.state_dict()[name].to(whole.dtype)), name
        assert (whole.dtype == torch.float32) == (".self_attn." in name), name
        assert x.to_local().numel() <= -(-len(x) // ranks.world) * x[0].numel(), name
    index = dict(index_n_heads=2, index_head_dim=8, index_topk=3)
    grafted = []
    for hook in (None, prepare):
        torch.manual_seed(3)
        grafted.append(Transformer.from_pretrained(
            folder, "torch", index=index, prepare=hook, device=ranks.device))
    for (name, x), y in zip(grafted[0].named_parameters(), grafted[1].parameters(), strict=True):
        whole = parallel.whole_tensor(y)
        assert torch.equal(x.to(whole.dtype), whole), name

    saved = parallel.whole_model(sharded, ranks)
    ranks.on_rank_0(lambda: saved.save_pretrained(folder + "-again"))
    again = Transformer.from_pretrained(folder + "-again", "torch")
    for name, x in plain.named_parameters():
        assert torch.equal(again.state_dict()[name].to(x.dtype), x), name


def main():
    """Every case on this rank; the command line: ranks that share a sequence, device."""
    context = int(sys.argv[1])
    ranks = parallel.start(parallel.device(sys.argv[2]), context)
    for number, case in enumerate(CASES):
        compare(ranks, case, packed=number % 2 == 1)
    compare(ranks, CASES[0], packed=True)
    compare(ranks, CASES[3], packed=False)
    if ranks.device.type == "cpu":
        compare(ranks, CASES[2], packed=True, compiled=True)  # tracing the others takes long
    compare_prompts(ranks)
    compare_checkpoints(ranks)
    print("all equal")
    return 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    cli.run(main)
