"""Rollouts: a model solves a batch of tasks, each in turns of its own, for a trainer to learn from.

Generation is generate.stream. Prompts of different lengths are aligned at their end, so that all answers
begin in one column. A row whose tool replies waits for the others, and the replies are read at once. What the
trainer must know to compute the same numbers is kept: the log-probability of each token, what could be
sampled, and what every query of every layer selected.
"""
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from generate import FEWEST_ROWS, ROUND, Trace, make_decoder, rounded, stream
from tasks import CALL, EOT, REPLY

ROW_ROUND = 32  # rows on a GPU are multiples of it: each shape is captured as a CUDA graph of its own
MOST_DECODERS = 8  # shapes whose caches and CUDA graphs are kept


class Turns:
    """Decides what becomes of every row after each token: `steer` of generate.stream.

    A row writes until it closes a call of its tool; then comes the tool's reply. It is over at one of
    end_ids, or without one when it reaches its task's limit. outs: for each row the ids behind its prompt;
    own: for each of them, whether the model wrote it."""

    def __init__(self, tasks, end_ids=(EOT,)):
        self.tasks = tasks
        self.end_ids = end_ids
        self.outs = [[] for _ in tasks]
        self.own = [[] for _ in tasks]
        self.over = [False] * len(tasks)
        self.calls = [None] * len(tasks)  # ids since a <call> that is open

    def __call__(self, sampled):
        """sampled: a list of B tokens, -1 for none -> {row: its token and its tool's reply}, of rows that go
        on; for each row whether it is over."""
        replies = {}
        for row, token in enumerate(sampled):
            if token < 0:
                continue
            reply = self.take(row, token)
            if reply and not self.over[row]:
                replies[row] = [token, *reply]
        return replies, list(self.over)

    def take(self, row, token):
        """A token of the model's -> what follows it."""
        out = self.outs[row]
        reply = self.listen(row, token)[:self.tasks[row].limit - len(out) - 1]
        out += [token, *reply]
        self.own[row] += [True] + [False] * len(reply)
        self.over[row] = token in self.end_ids or len(out) >= self.tasks[row].limit
        return reply

    def listen(self, row, token):
        """-> the reply to a call that this token of the model closes, or []."""
        task = self.tasks[row]
        if token == CALL:
            self.calls[row] = []
        elif token == REPLY and self.calls[row] is not None and task.mode == "think":
            call = self.calls[row]
            self.calls[row] = None
            return task.reply(call)
        elif self.calls[row] is not None:
            self.calls[row].append(token)
        return []


@dataclass
class Rollout:
    """What came of B tasks. T columns: ends of text, the prompt, what followed, ends of text."""
    ids: Tensor  # (B, T) int64
    start: Tensor  # (B,) int64, the column where the prompt begins
    end: Tensor  # (B,) int64, the column behind the last token
    own: Tensor  # (B, T) bool: chosen by the model
    logp: Tensor | None  # (B, T) float32 of its own tokens when they were sampled, elsewhere 0
    kept: Tensor | None  # (B, T, vocab) bool, what top_p left; None: everything
    selections: list | None  # for each layer (B, T - 1, k) int32, of the queries that are read again
    outs: list  # for each row the ids behind the prompt
    offset: int = 0  # the position of column 0

    def first(self):
        """(B, T - 1) int32, the first column that a token sees: padding, at both ends, and the last token,
        which predicts nothing, see themselves alone."""
        at = torch.arange(self.ids.shape[1] - 1, device=self.ids.device)[None]  # (1, T - 1)
        first = torch.minimum(at, self.start[:, None])
        return torch.where(at < self.end[:, None] - 1, first, at).int()


def assemble(tasks, prompts, turns, trace, device):
    """-> the Rollout of prompts (B,columns) that `turns` continued; trace: a filled Trace, or None."""
    B, columns = prompts.shape
    longest = max(map(len, turns.outs))
    # by way of NumPy, which reads lists of lists four times as fast
    followed = np.array([out + [EOT] * (longest - len(out)) for out in turns.outs])  # (B, longest)
    ids = torch.cat((prompts, torch.from_numpy(followed).to(device)), 1)  # (B, T)
    T = ids.shape[1]
    own = torch.zeros(B, T, dtype=torch.bool, device=device)
    wrote = [mine + [False] * (longest - len(mine)) for mine in turns.own]
    own[:, columns:] = torch.from_numpy(np.array(wrote))
    rollout = Rollout(
        ids=ids,
        start=torch.tensor([columns - len(task.prompt()) for task in tasks], device=device),
        end=torch.tensor([columns + len(out) for out in turns.outs], device=device),
        own=own,
        logp=None,
        kept=None,
        selections=None,
        outs=turns.outs)
    if trace is None:
        return rollout

    # log-probabilities, and what could be sampled
    rollout.logp = placed(ids.new_zeros(B, T, dtype=torch.float32), trace.columns, trace.logp)
    if trace.kept:
        everything = own.new_ones(B, T, trace.kept[0].shape[-1])
        rollout.kept = placed(everything, trace.columns, trace.kept)

    # selections; from a row's last token on a token sees itself alone, which teaches an indexer nothing, and
    # so does what was not computed, of a reply that the limit cuts off
    if trace.selections:
        at = torch.arange(T - 1, device=device)
        over = at[None] >= rollout.end[:, None] - 1  # (B, T - 1)
        rollout.selections = []
        for parts in zip(*trace.selections):
            alone = parts[0].new_full((B, T - 1, parts[0].shape[2]), -1)
            alone[..., 0] = at.int()
            chosen = placed(alone, trace.queries, parts)  # (B, T - 1, k)
            rollout.selections.append(torch.where(over[..., None], alone, chosen))
    return rollout


def placed(x, columns, parts):
    """A copy of x (B,T,...) with parts, each (B,...) or (B,n,...), in the columns (B,) or (B,n) int64 that
    belong to them; those of -1, or beyond T, nowhere."""
    B, T = x.shape[:2]
    columns = torch.cat([part.view(B, -1) for part in columns], 1)  # (B, N)
    columns = torch.where((columns < 0) | (columns >= T), T, columns)
    out = torch.cat((x, x[:, :1]), 1)  # (B, T + 1, ...), the last for what goes nowhere
    row = torch.arange(B, device=x.device)[:, None]
    out[row, columns] = torch.cat([part.view(B, -1, *x.shape[2:]) for part in parts], 1)
    return out[:, :T]


def prompt_columns(tasks):
    """How many columns their prompts take."""
    return rounded(max(len(task.prompt()) for task in tasks))


def repeats(tasks):
    """How many times each task stands there, all of it one behind the other; 1 if they differ in that."""
    n = next((i for i, task in enumerate(tasks) if task is not tasks[0]), len(tasks))
    same = len(tasks) % n == 0 and all(task is tasks[i - i % n] for i, task in enumerate(tasks))
    return n if same else 1


class Roller:
    """Rolls out one model, whose weights may change in place from call to call: caches and CUDA graphs are
    kept, those of the MOST_DECODERS shapes that were used last.

    autocast: makes the context that the model runs in; it must not cache casts of weights, which a CUDA graph
    would read when they are stale. fp8_cache: latents in the published FP8 layout."""

    def __init__(self, model, device, autocast=nullcontext, fp8_cache=False):
        self.model = model
        self.device = device
        self.autocast = autocast
        self.fp8_cache = fp8_cache
        self.decoders = {}

    def __call__(self, tasks, temperature=1.0, top_p=None, generator=None, traced=False, columns=0,
                 chunk=None):
        """Tasks, one for each row -> Rollout; traced: with what a trainer needs. columns: of the prompts, at
        least so many. Other arguments as generate.stream. ValueError: more tokens than the model reads."""
        real = len(tasks)
        if self.device.type == "cuda":
            tasks = tasks + [tasks[-1]] * (rounded(real, ROW_ROUND) - real)
        columns = max(columns, prompt_columns(tasks))
        copies = repeats(tasks)
        if len(tasks) // copies % FEWEST_ROWS:  # the logits of the prompts' last tokens would sum otherwise
            copies = 1
        prompts = torch.full((len(tasks) // copies, columns), EOT)
        for row, task in zip(prompts, tasks[::copies]):
            prompt = task.prompt()
            row[columns - len(prompt):] = torch.tensor(prompt)
        prompts = prompts.to(self.device)
        limit = rounded(max(task.limit for task in tasks))
        turns = Turns(tasks)
        trace = Trace() if traced else None
        with self.autocast():
            decoder = self.decoder(len(tasks), columns + limit, traced)
            for _ in stream(self.model, prompts, limit, temperature=temperature, top_p=top_p,
                            generator=generator, chunk=chunk, end_ids=(EOT,), steer=turns, trace=trace,
                            decoder=decoder, copies=copies):
                pass
        rollout = assemble(tasks, prompts.repeat_interleave(copies, 0), turns, trace, self.device)
        return rollout if len(tasks) == real else part(rollout, torch.arange(real, device=self.device))

    def decoder(self, rows, capacity, traced):
        """-> the decoder of this shape, the one that was made for it if it is still kept."""
        key = (rows, capacity, traced)
        decoder = self.decoders.pop(key, None)
        if decoder is None:
            while len(self.decoders) >= MOST_DECODERS:
                del self.decoders[next(iter(self.decoders))]  # the one that was not used for longest
            decoder = make_decoder(self.model, rows, capacity, self.device, self.fp8_cache, traced=traced)
        self.decoders[key] = decoder  # the last of all
        return decoder


def part(rollout, rows):
    """The rows (n,) int64 of a Rollout."""
    return replace(
        rollout,
        ids=rollout.ids[rows],
        start=rollout.start[rows],
        end=rollout.end[rows],
        own=rollout.own[rows],
        logp=None if rollout.logp is None else rollout.logp[rows],
        kept=None if rollout.kept is None else rollout.kept[rows],
        selections=rollout.selections and [chosen[rows] for chosen in rollout.selections],
        outs=[rollout.outs[row] for row in rows.tolist()])


def trim(rollout):
    """A Rollout without the columns that are padding in all its rows, up to multiples of ROUND; what remains
    keeps its positions, so that it is computed as it was sampled."""
    left = int(rollout.start.min()) // ROUND * ROUND
    right = min(rollout.ids.shape[1], rounded(int(rollout.end.max())))
    columns = slice(left, right)
    selections = None
    if rollout.selections:
        selections = []
        for chosen in rollout.selections:
            chosen = chosen[:, left:right - 1]
            selections.append(torch.where(chosen < 0, -1, chosen - left))  # only padding selects padding
    return replace(
        rollout,
        ids=rollout.ids[:, columns],
        start=rollout.start - left,
        end=rollout.end - left,
        own=rollout.own[:, columns],
        logp=rollout.logp[:, columns],
        kept=None if rollout.kept is None else rollout.kept[:, columns],
        selections=selections,
        offset=rollout.offset + left)


def join(rollouts):
    """Rollouts of the same columns as one, as wide as the widest of them."""
    T = max(rollout.ids.shape[1] for rollout in rollouts)

    def widened(name, fill, width):
        """The field of all rollouts, (sum of B, width, ...)."""
        parts = []
        for rollout in rollouts:
            x = getattr(rollout, name)
            missing = x.new_full((len(x), width - x.shape[1], *x.shape[2:]), fill)
            parts.append(torch.cat((x, missing), 1))
        return torch.cat(parts)

    selections = None
    if rollouts[0].selections:
        selections = []
        for layer in range(len(rollouts[0].selections)):
            parts = []
            for rollout in rollouts:
                chosen = rollout.selections[layer]  # (B, T - 1, k)
                beyond = torch.arange(chosen.shape[1], T - 1, device=chosen.device)
                alone = chosen.new_full((len(chosen), len(beyond), chosen.shape[2]), -1)
                alone[..., 0] = beyond.int()
                parts.append(torch.cat((chosen, alone), 1))
            selections.append(torch.cat(parts))
    return Rollout(
        ids=widened("ids", EOT, T),
        start=torch.cat([rollout.start for rollout in rollouts]),
        end=torch.cat([rollout.end for rollout in rollouts]),
        own=widened("own", False, T),
        logp=widened("logp", 0, T),
        kept=None if rollouts[0].kept is None else widened("kept", True, T),
        selections=selections,
        outs=sum((rollout.outs for rollout in rollouts), []))
