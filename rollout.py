"""Rollouts: a model solves a batch of tasks, each in turns of its own, for a trainer to learn from.

Generation is generate.stream. Prompts of different lengths are aligned at their end, so that all rows share
one position and, on a GPU, one CUDA graph; a row takes the token that was sampled, or the next one of its
tool's reply, so that turns need no ragged code. What the trainer must know to compute the same numbers is
kept: the log-probability of each token, what could be sampled, and what every query of every layer selected.
Where all rows are within replies, what these have in common in length is read at once, as a prompt is.
"""
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from generate import FEWEST_ROWS, Trace, make_decoder, stream
from tasks import CALL, EOT, REPLY

ROUND = 16  # lengths are multiples of it, so that few shapes occur
ROW_ROUND = 32  # and on a GPU the numbers of rows, since each shape is captured as a CUDA graph of its own
MOST_DECODERS = 8  # shapes whose caches and CUDA graphs are kept


def rounded(n, step=ROUND):
    """n, or the next multiple of step above it."""
    return -(-n // step) * step


class Turns:
    """Decides in each step what every row takes: `steer` of generate.stream.

    A row takes what the model sampled, until it closes a call of its tool; then the tool's reply, token by
    token or in a piece that all rows have. It is over at its end of text, or without one when it reaches its
    task's limit. outs: for each row the ids behind its prompt; own: for each column behind the prompts, which
    rows took a token of the model's."""

    def __init__(self, tasks):
        self.tasks = tasks
        self.outs = [[] for _ in tasks]
        self.own = []
        self.over = [False] * len(tasks)
        self.replies = [deque() for _ in tasks]
        self.calls = [None] * len(tasks)  # ids since a <call> that is open

    def __call__(self, sampled):
        """sampled (B,) -> (B,) int64, what is taken, and what is `given` behind it, (B,n) int64 or None.
        Waits for the device once, to read `sampled`."""
        tokens = sampled.tolist()
        own = []
        for row in range(len(self.tasks)):
            own.append(not self.over[row] and not self.replies[row])
            tokens[row] = self.take(row, tokens[row])
        self.own.append(own)
        given = self.given()
        if given is not None:
            given = torch.tensor(given).to(sampled.device, non_blocking=True)
        return torch.tensor(tokens).to(sampled.device, non_blocking=True), given

    def given(self):
        """The tokens that follow in every row whatever would be sampled: lists of one length, a multiple of
        ROUND; None if there are fewer. No row is over within them."""
        lengths = []
        for task, out, reply, over in zip(self.tasks, self.outs, self.replies, self.over):
            if not over:
                lengths.append(min(len(reply), task.limit - len(out) - 1))
        n = min(lengths, default=0) // ROUND * ROUND
        if n == 0:
            return None
        given = []
        for out, reply, over in zip(self.outs, self.replies, self.over):
            tokens = [EOT] * n if over else [reply.popleft() for _ in range(n)]
            given.append(tokens)
            if not over:
                out += tokens
        self.own += [[False] * len(self.tasks)] * n
        return given

    def take(self, row, token):
        """The next token of a row for which this one was sampled."""
        if self.over[row]:
            return EOT
        if self.replies[row]:
            token = self.replies[row].popleft()
        else:
            self.listen(row, token)
        out = self.outs[row]
        out.append(token)
        self.over[row] = token == EOT or len(out) >= self.tasks[row].limit
        return token

    def listen(self, row, token):
        """Answer a call that this token of the model closes."""
        task = self.tasks[row]
        if token == CALL:
            self.calls[row] = []
        elif token == REPLY and self.calls[row] is not None and task.mode == "think":
            reply = task.reply(self.calls[row])
            self.replies[row].extend(reply)
            self.calls[row] = None
        elif self.calls[row] is not None:
            self.calls[row].append(token)


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
    steps = len(turns.own)
    # by way of NumPy, which reads lists of lists four times as fast
    followed = np.array([out + [EOT] * (steps - len(out)) for out in turns.outs])  # (B, steps)
    ids = torch.cat((prompts, torch.from_numpy(followed).to(device)), 1)  # (B, T)
    own = torch.zeros(B, columns + steps, dtype=torch.bool, device=device)
    own[:, columns:] = torch.from_numpy(np.array(turns.own).T)
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
    logp = torch.stack(trace.logp, 1)  # (B, steps)
    before = logp.new_zeros(B, columns)
    rollout.logp = torch.cat((before, logp), 1).masked_fill(~own, 0)
    if trace.kept:
        kept = torch.stack(trace.kept, 1)  # (B, steps, vocab)
        before = kept.new_ones(B, columns, kept.shape[-1])
        rollout.kept = torch.cat((before, kept), 1)

    # selections; from a row's last token on a token sees itself alone, which teaches an indexer nothing
    if trace.selections:
        at = torch.arange(columns + steps - 1, device=device)
        over = at[None] >= rollout.end[:, None] - 1  # (B, T - 1)
        rollout.selections = []
        for parts in zip(*trace.selections):
            chosen = torch.cat(parts, 1)  # (B, T - 1, k)
            alone = torch.full_like(chosen[:1], -1)  # (1, T - 1, k)
            alone[..., 0] = at.int()
            rollout.selections.append(torch.where(over[..., None], alone, chosen))
    return rollout


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
                if all(turns.over):
                    break
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
