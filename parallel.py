"""More than one GPU: torchrun starts a process on each, a rank, and all of them run the same script.

    torchrun --standalone --nproc-per-node=4 train.py                       # batches spread over the ranks
    torchrun --standalone --nproc-per-node=4 train.py --context_parallel=4  # every sequence spread over them

Two ways to share the work, and any product of them. Parameters, gradients and optimizer state are sharded
over all ranks by PyTorch's FSDP2. `context` neighbouring ranks share the sequences of a batch (`Split`):
queries stay where they are, and what all must see of a token, its latent and its indexer key, is gathered.
Batches go round over the groups of such ranks. Without torchrun the same code runs in a world of one.
docs/PARALLEL.md shows who owns and who sends what.
"""
import atexit
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model import Transformer, Unfilled
from support import cli

# FSDP and DTensor are imported where they are used: one process need not wait a second for them.

# Gathers along dimension 0; by the second the gradient goes back as a sum by reduce-scatter. Renamed in torch
# 2.13, which warns of the old names
if hasattr(collectives, "all_gather_single"):
    all_gather = collectives.all_gather_single
    all_gather_autograd = collectives.all_gather_single_autograd
else:
    all_gather = collectives.all_gather_tensor
    all_gather_autograd = collectives.all_gather_tensor_autograd
PATIENCE = timedelta(hours=2)  # of a rank that waits, such as for rank 0 to write a large state


# ---- the ranks ----

def world_size():
    """Processes that torchrun started; 1 without it. ValueError: the environment names their number, but not
    which of them this is."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and not (size.isdigit() and os.environ.get("RANK", "").isdigit()):
        raise ValueError(f"WORLD_SIZE={size} in the environment, without a RANK beside it: start processes "
                         "by torchrun, or unset it")
    return int(size)


def device(name):
    """As cli.device; under torchrun each rank of a machine takes a GPU of its own. ValueError: fewer GPUs
    than ranks, or one GPU for all."""
    if world_size() == 1:
        return cli.device(name)
    if name.startswith("cuda:"):
        raise ValueError(f"--device={name}: under torchrun every process takes a GPU of its own; leave the "
                         "option out")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        there = torch.cuda.device_count()
        if here > there:
            raise ValueError(f"--nproc-per-node={here}: this machine has {there} GPUs; start one process per "
                             "GPU, or use --device=cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return cli.device(name)


def check_context(context, length):
    """ValueError unless groups of so many ranks make up the world, and can share a sequence of this
    length."""
    if context < 1 or world_size() % context:
        raise ValueError(f"--context_parallel={context}: must divide the number of processes, which is "
                         f"{world_size()} (torchrun --nproc-per-node)")
    if context > 1 and length % (2 * context):
        raise ValueError(f"--block_size={length}: --context_parallel={context} cuts it into {2 * context} "
                         f"chunks of equal length; use a multiple of {2 * context}")


@dataclass
class Ranks:
    """This process among those that torchrun started. What they tell each other here, but for `same`, are
    numbers and objects on the host, by gloo, which notices when one of them has died."""
    device: torch.device
    rank: int = 0
    world: int = 1
    context: int = 1  # neighbours that share sequences
    mesh: DeviceMesh | None = None  # of all ranks, over which parameters are sharded
    group: dist.ProcessGroup | None = None  # of those that share this rank's sequences

    @property
    def data(self):
        """Groups that work on batches of their own."""
        return self.world // self.context

    @property
    def data_rank(self):
        """The number of this rank's group."""
        return self.rank // self.context

    def turns(self, count):
        """Which of `count` batches the group of this rank computes -> [(number, does it count?)], equally
        many for each: with sharded parameters all compute, or none."""
        turns = []
        for beyond in range(0, count, self.data):
            number = beyond + self.data_rank
            turns.append((min(number, count - 1), number < count))
        return turns

    def split(self, length, start=0):
        """-> Split, or None where no other rank shares a sequence."""
        return Split(self, length, start) if self.context > 1 else None

    def reduced(self, values, how):
        """Numbers of this rank, combined with those of all others by a dist.ReduceOp -> list of float."""
        x = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(x, how)
        return x.tolist()

    def total(self, values):
        """Sums over all ranks of a list of numbers."""
        return self.reduced(values, dist.ReduceOp.SUM)

    def means(self, values):
        """A dict of numbers by name -> their means over all ranks."""
        sums = self.total(list(values.values()))
        return {name: x / self.world for name, x in zip(values, sums)}

    def largest(self, values):
        """Maxima over all ranks of a list of numbers."""
        return self.reduced(values, dist.ReduceOp.MAX)

    def gathered(self, value):
        """An object of each rank -> list of all."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def on_rank_0(self, function, *args):
        """Rank 0 alone calls function(*args), and all wait until it is done: for what is written and printed
        -> on rank 0 its result, elsewhere None. The OSError or ValueError that it raises is raised by all."""
        result = None
        error = None
        if self.rank == 0:
            try:
                result = function(*args)
            except (OSError, ValueError) as raised:
                error = raised
        if self.world > 1:
            box = [error]
            dist.broadcast_object_list(box)
            error = box[0]
        if error is not None:
            raise error
        return result

    def same(self, x):
        """A tensor of the device -> that of rank 0, everywhere."""
        if self.world > 1:
            dist.broadcast(x, 0)
        return x


def start(device, context=1, options=None):
    """-> the Ranks of this process, after a look whether all have the same options (a dict by name); context:
    see `check_context`. ValueError: they have not. From here on rank 0 speaks for all: others print nothing
    but what ends them."""
    world = world_size()
    if world == 1:
        return Ranks(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    ranks = Ranks(device, dist.get_rank(), world)
    agree(ranks, options or {})
    ranks.context = context
    ranks.mesh = init_device_mesh(device.type, (world,))
    ranks.group = dist.new_subgroups(context)[0]
    if ranks.rank:
        sys.stderr = open(os.devnull, "w")
        sys.stdout = sys.stderr
    return ranks


def agree(ranks, options):
    """ValueError naming the first option that another rank has otherwise than rank 0."""
    everyone = ranks.gathered(options)
    ours = everyone[0]
    for rank, theirs in enumerate(everyone):
        for name in ours | theirs:
            if theirs.get(name) != ours.get(name):
                raise ValueError(f"--{name}={theirs.get(name)} on rank {rank}, and {ours.get(name)} on rank "
                                 "0; start all of them with the same options")


# ---- the model over the ranks ----

def shard(model, ranks):
    """-> the model, with more than one rank its parameters sharded: a block is whole on a GPU only while it
    computes. Also of a model on the meta device, into which each rank then reads its part.

    Afterwards parameters are others: make the optimizer then. What learns must have one dtype before."""
    if ranks.world == 1:
        return model
    from torch.distributed.fsdp import fully_shard
    # of indexer keys, which a block hands on and nobody changes in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPBlock\) returned a view tensor")
    for block in model.model.layers:
        fully_shard(block, mesh=ranks.mesh)
    fully_shard(model, mesh=ranks.mesh)
    model.register_forward_hook(let_go)
    return model


def let_go(model, args, out):
    """After a forward without a backward FSDP keeps the outermost parameters whole: whoever asked for
    model.parameters() would get tensors that nothing trains."""
    if not torch.is_grad_enabled():
        model.reshard()


def is_sharded(x):
    """Is this module FSDP's, or this tensor a DTensor?"""
    return hasattr(x, "reshard") or hasattr(x, "full_tensor")


def synchronise(model, now):
    """Do the gradients of the next backward go round, with those added up before? Only a step's last need
    to."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)


def whole(values, ranks):
    """Nested dicts of tensors -> the same with every sharded one whole on rank 0's CPU, None elsewhere. One
    at a time is whole on a GPU. All ranks must call this."""
    if isinstance(values, dict):
        return {name: whole(value, ranks) for name, value in values.items()}
    if not is_sharded(values):
        return values
    x = whole_tensor(values.detach())
    return None if ranks.rank else x.cpu()


def whole_tensor(x):
    """A tensor, sharded or not -> it whole, on all ranks."""
    return x.full_tensor() if is_sharded(x) else x


def local_tensor(x):
    """A tensor, sharded or not -> the part of it that this rank holds."""
    return x.to_local() if is_sharded(x) else x


def whole_model(model, ranks):
    """-> on rank 0 a model that can be saved, with all of the weights; None elsewhere."""
    if ranks.world == 1:
        return model
    weights = whole(model.state_dict(), ranks)
    if ranks.rank:
        return None
    with torch.device("meta"), Unfilled():
        plain = Transformer(model.config, attention="dense")
    for ours, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    plain.load_state_dict(weights, assign=True)
    return plain


def part_like(x, p):
    """A whole tensor -> the part of it that belongs to this rank's part of a parameter; no rank sends
    anything."""
    if is_sharded(p) and isinstance(x, torch.Tensor) and x.shape == p.shape:
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return x


def sharded_state(optimizer, state):
    """The state_dict of an optimizer, whole -> sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for number, values in state["state"].items():
        moments[number] = {name: part_like(x, parameters[number]) for name, x in values.items()}
    return state | dict(state=moments)


# ---- the sequence over the ranks ----

class Split:
    """Positions start .. start + length - 1 of a sequence over the ranks of a group, in 2 C chunks of equal
    length: rank r of C has chunks r and 2 C - 1 - r, so that all see equally many keys.

    2 C must divide the length, see `check_context`."""

    def __init__(self, ranks, length, start=0):
        C = ranks.context
        r = ranks.rank % C
        self.group = ranks.group
        self.context = C
        self.chunk = length // (2 * C)
        self.length = start + length  # of the sequence so far
        self.starts = (start + r * self.chunk, start + (2 * C - 1 - r) * self.chunk)
        self.position = self.part(torch.arange(self.length, device=ranks.device)[None])[0]  # (length / C,)

    def part(self, x):
        """The columns of x (B,start + length) that are this rank's -> (B,length / C)"""
        return torch.cat([x[:, start:start + self.chunk] for start in self.starts], 1)

    def gather(self, x):
        """x (B,length / C,D), each rank's -> (B,length,D) in the order of the sequence. Its gradient is the
        sum over all ranks of what they send back, each rank's own rows."""
        rows = x.transpose(0, 1).contiguous()  # (length / C, B, D)
        # before torch 2.13 all_gather_autograd takes nothing that needs no gradient
        learns = torch.is_grad_enabled() and x.requires_grad
        gather = all_gather_autograd if learns else all_gather
        rows = gather(rows, 0, self.group)  # (length, B, D), rank by rank
        lower, upper = rows.unflatten(0, (self.context, 2, self.chunk)).unbind(1)  # (C, chunk, B, D) each
        rows = torch.cat((lower.flatten(0, 1), upper.flip(0).flatten(0, 1)))  # (length, B, D)
        return rows.transpose(0, 1).contiguous()
