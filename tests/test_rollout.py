"""rollout.py and what generate.stream does for it: whose turn it is, and that a trainer computes, of what was
noted, the same bits."""
from random import Random

import pytest
import torch

import generate
import grpo
import tasks
from config import Config
from generate import Rows, Steered, rounded
from model import Transformer
from parallel import Ranks
from rollout import Roller, Turns, join, part, prompt_columns, repeats, trim
from tasks import ANSWER, CALL, END, EOT, REPLY, encode, make
from tests.common import device_of

SIZES = dict(
    vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=16, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, index_n_heads=2,
    index_head_dim=16, index_topk=8, initializer_range=0.4)
CPU = torch.device("cpu")


def tiny(index_fp8=True, backend="torch", **changes):
    torch.manual_seed(0)
    return Transformer(Config(**SIZES | changes), backend, index_fp8=index_fp8).to(device_of(backend))


def tasks_of(*domains, seed=0, page=24):
    random = Random(seed)
    return [make(random, domain, page=page) for domain in domains]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- whose turn it is ----

class Scripted(tasks.Task):
    """A task whose tool answers with what it was asked, in capitals."""
    question = "say"

    def __init__(self, limit, mode="think", silent=False):
        self.limit = limit
        self.mode = mode
        self.silent = silent

    def tool(self, text):
        return None if self.silent else text.upper()


def play(task, tokens):
    """Feed a row with sampled tokens, until it is over -> what it took, and which of them the model wrote."""
    turns = Turns([task])
    for token in tokens:
        if not turns.over[0]:
            turns([token])
    return turns.outs[0], turns.own[0]


def test_a_call_is_answered():
    asked = [*encode("x"), CALL, *encode("ab"), REPLY]
    answered = [*encode("y"), ANSWER, *encode("z"), EOT]
    script = [*asked, *answered, 7, 7]
    out, own = play(Scripted(99), script)
    said = [*asked, *encode("AB"), END, *answered]
    assert out == said
    assert own == tasks.own_tokens(said)
    assert own[5:8] == [False, False, False] and sum(own) == len(said) - 3


def test_calls_that_are_none():
    """A <reply> without a call, a call without a <reply>, direct mode, a task without a tool: nothing is
    answered."""
    for task, script in (
            (Scripted(99), [REPLY, 5, EOT]), (Scripted(99), [CALL, 5, 6, ANSWER, EOT]),
            (Scripted(99, mode="direct"), [CALL, 5, REPLY, 6, EOT]),
            (Scripted(99, silent=True), [CALL, 5, REPLY, 6, EOT])):
        out, own = play(task, script)
        assert out == script and all(own)


def test_a_call_that_is_no_text_is_answered_and_worth_nothing():
    out, _ = play(Scripted(99), [CALL, 0xC3, REPLY, ANSWER, 5, EOT])
    assert out == [CALL, 0xC3, REPLY, END, ANSWER, 5, EOT]
    assert Scripted(99).episode(out) is None


def test_the_limit_ends_a_row_also_within_a_reply():
    out, own = play(Scripted(4), [5, 5, 5, 5, 5, 5])
    assert out == [5, 5, 5, 5] and own == [True] * 4
    out, own = play(Scripted(5), [CALL, *encode("ab"), REPLY, 1])
    assert out == [CALL, *encode("ab"), REPLY, *encode("A")] and own == [True] * 4 + [False]


class Reader(Scripted):
    """A task whose tool answers with a page of `length` letters."""

    def __init__(self, limit, length):
        super().__init__(limit)
        self.length = length

    def tool(self, text):
        return "".join("abcdefghij"[i * i % 10] for i in range(self.length))


def test_who_waits():
    """A row with a reply gets it whole and says so; one that its limit ends within the reply does not; rows
    that sampled nothing do nothing."""
    turns = Turns([Reader(99, 40), Reader(20, 40), Reader(99, 9)])
    for token in (CALL, 97):
        assert turns([token, token, 5]) == ({}, [False] * 3)
    replies, over = turns([REPLY, REPLY, EOT])
    page = turns.tasks[0].reply([97])
    assert replies == {0: [REPLY, *page]} and over == [False, True, True]
    assert turns.outs == [[CALL, 97, REPLY, *page], [CALL, 97, REPLY, *page[:17]], [5, 5, EOT]]
    assert turns.own == [[True] * 3 + [False] * 41, [True] * 3 + [False] * 17, [True] * 3]
    assert turns([-1, -1, -1]) == ({}, [False, True, True]) and turns.outs[2] == [5, 5, EOT]


def test_when_replies_are_read():
    """With 16 rows: while more than an eighth as many write as wait, not; then together with the next token
    of those that write."""
    said = iter([
        ({row: [3, 4, 5] for row in range(12)}, [False] * 16),
        ({12: [3, 4]}, [False] * 13 + [True, True, False]),
        ({}, [False] * 13 + [True] * 3)])
    steered = Steered(lambda tokens: next(said), 16, 9)
    steered.hear(list(range(16)))
    assert steered.due() is None and steered.writes == [False] * 12 + [True] * 4
    steered.hear([-1] * 12 + [7, 8, 9, 10])
    assert steered.due() == [[3, 4, 5]] * 12 + [[3, 4], [], [], [10]]
    assert steered.pieces == {} and steered.lengths == [3] * 12 + [3, 2, 2, 2]
    steered.hear([1] * 13 + [-1, -1, 2])
    assert steered.due() is None and steered.writes == [True] * 13 + [False] * 3
    with pytest.raises(ValueError, match="row 1 has taken n=3 tokens"):
        Steered(lambda tokens: ({1: [1, 2, 3]}, [False] * 2), 2, 3).hear([1, 1])


@pytest.mark.parametrize("changes, options", [
    ({}, dict()), ({}, dict(chunk=7)), ({}, dict(top_p=0.7)),
    (dict(index_block=4, index_candidates=16), dict()), (dict(index_topk=200), dict())])
@pytest.mark.parametrize("backend", ["torch", "triton"] if torch.cuda.is_available() else ["torch"])
def test_replies_are_read_at_once(backend, changes, options, monkeypatch):
    """24 rows that call at different times, once, twice or never, whose replies and prompts differ in length,
    and a third of which end early, so that rows leave; rows that wait or are over draw ends of text. What
    each row holds, and what a trainer computes of it, is what it would be alone."""
    asked = [CALL, 97, REPLY]
    scripts = [asked, asked, [5, *asked], [5, 5, *asked, 6, *asked], [6, EOT], asked, [8, 7, EOT],
               [7, *asked]] * 3
    batch = []
    for third in range(3):
        batch += [Reader(60, 40 - third), Reader(135, 120), Reader(50, 50), Reader(99, 40), Reader(9, 9),
                  Reader(40, 50), Reader(60, 39), Reader(60, 3 + third)]
    batch[0].question = "say more"
    columns = prompt_columns(batch)
    wrote = [script + [48 + i % 10 for i in range(99)] for script in scripts]
    seen = {}
    reads = []
    init, rows_init, hear, read = Turns.__init__, Rows.__init__, Steered.hear, generate.read_pieces

    def turns_init(turns, *args):
        init(turns, *args)
        seen["turns"] = turns

    def kept_rows(rows, *args):
        rows_init(rows, *args)
        seen["rows"] = rows

    def heard(steered, tokens):
        hear(steered, tokens)
        seen["steered"] = steered

    def sample(logits, *args):
        """Each row's script; rows that fill up a batch are the last one."""
        writes = seen["steered"].writes if "steered" in seen else [True] * len(seen["turns"].own)
        resumed = seen.pop("resumed", None) or writes
        tokens = []
        for row in seen["rows"].at.tolist():
            own = sum(seen["turns"].own[row])
            tokens.append(wrote[min(row, 23)][own] if resumed[row] else EOT)
        return torch.tensor(tokens).to(logits.device)

    def counted(model, due, *args):
        full = [[] for _ in seen["turns"].own]
        for row, piece in zip(seen["rows"].at.tolist(), due):
            full[row] = piece
        reads.append([len(piece) for piece in full])
        seen["resumed"] = [bool(piece) for piece in full]
        return read(model, due, *args)

    monkeypatch.setattr(Turns, "__init__", turns_init)
    monkeypatch.setattr(Rows, "__init__", kept_rows)
    monkeypatch.setattr(Steered, "hear", heard)
    monkeypatch.setattr(generate, "sample", sample)
    monkeypatch.setattr(generate, "read_pieces", counted)
    model = tiny(backend=backend, **changes)
    device = torch.device(device_of(backend))
    rollout = Roller(model, device)(batch, traced=True, columns=columns, **options)
    assert reads[0][:8] == [42, 122, 0, 42, 0, 0, 0, 5] and reads[1][:8] == [0, 0, 0, 42, 0, 0, 0, 0]
    for row, (task, script, out) in enumerate(zip(batch, wrote, rollout.outs)):
        expected = []
        for token in script:
            expected.append(token)
            if token == REPLY:
                expected += task.reply([97])
            if token == EOT:
                break
        assert out == expected[:task.limit]
        end = columns + len(out)
        assert rollout.end[row] == end and rollout.ids[row, columns:end].tolist() == out
        assert rollout.own[row, columns:end].tolist() == tasks.own_tokens(out)
        assert not rollout.own[row, :columns].any() and not rollout.own[row, end:].any()
        for chosen in rollout.selections:
            chosen = chosen[row, columns:end - 1]
            at = torch.arange(columns, end - 1, device=chosen.device)[:, None]
            assert (chosen <= at).all()
            if row % 8 not in (2, 5):  # these are over within their replies, which nobody reads again
                in_sight = at[:, 0] - rollout.start[row] + 1
                assert torch.equal((chosen >= 0).sum(1), in_sight.clamp(max=model.config.index_topk))
    assert (rollout.logp[~rollout.own] == 0).all() and (rollout.logp[rollout.own] < 0).all()
    if "top_p" in options:  # it leaves tokens of the scripts out
        assert rollout.kept[~rollout.own].all() and not rollout.kept[rollout.own].all()
    elif backend == "torch":
        assert gap(model, rollout) == 0 and gap(model, rollout, keep_selection=False) == 0
    else:
        assert gap(model, rollout) < 1e-4


def test_rows_end_by_themselves(monkeypatch):
    """In one batch: the ids, who wrote them, where rows begin and end, padding at both ends."""
    script = [[5, 6, EOT, 9, 9, 9], [CALL, *encode("a"), REPLY, 9, 9, 9], [5, 5, 5, 5, 5, 5]]
    columns = iter(zip(*script))
    monkeypatch.setattr(generate, "sample", lambda *args: torch.tensor(next(columns)))
    batch = [Scripted(9), Scripted(6), Scripted(3)]
    batch[1].question = "say more"
    rollout = Roller(tiny(), CPU)(batch, traced=True)
    assert rollout.outs == [[5, 6, EOT], [CALL, *encode("a"), REPLY, *encode("A"), END, 9], [5, 5, 5]]
    assert rollout.start.tolist() == [11, 6, 11] and rollout.end.tolist() == [19, 22, 19]
    for row, task in enumerate(batch):
        ids = [EOT] * 16 + [0] * 6
        ids[16 - len(task.prompt()):16] = task.prompt()
        ids[16:] = rollout.outs[row] + [EOT] * (6 - len(rollout.outs[row]))
        assert rollout.ids[row].tolist() == ids
    own = torch.zeros(3, 22, dtype=torch.bool)
    own[0, 16:19] = True
    own[1, [16, 17, 18, 21]] = True
    own[2, 16:19] = True
    assert torch.equal(rollout.own, own)
    assert (rollout.logp[~own] == 0).all() and (rollout.logp[own] < 0).all()


# ---- rollout and trainer ----

def gap(model, rollout, **options):
    """Largest difference of log-probabilities from those of the rollout, over its own tokens."""
    with torch.no_grad():
        logp, _, _ = grpo.token_logp(model, rollout, **options)
    return grpo.difference(logp, rollout)[1].item()


ALL = ("math", "search", "agent", "search", "logic", "writing", "code", "question")


@pytest.mark.parametrize("index_fp8", [True, False])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("top_p", [None, 0.7])
def test_replay_gives_the_same_bits(index_fp8, chunk, top_p):
    """Prompts of 6 to 50 tokens padded on the left, k = 8 crossed within prompts and behind them, prefilled
    at once or in chunks; then of some rows alone, trimmed and joined, with activation checkpointing."""
    model = tiny(index_fp8)
    batch = tasks_of(*ALL)
    lengths = [len(task.prompt()) for task in batch]
    assert min(lengths) < 8 < max(lengths)
    rollout = Roller(model, CPU)(batch, 1.3, top_p, seeded(1), traced=True, columns=64, chunk=chunk)
    assert rollout.own.sum() > 100
    assert gap(model, rollout, temperature=1.3) == 0
    few = part(rollout, torch.tensor([4, 0, 6]))
    assert few.outs == [rollout.outs[row] for row in (4, 0, 6)]
    trimmed = trim(few)
    assert trimmed.offset >= 16 and trimmed.start.min() < 16
    # other shapes, other orders of summing in matrix products; the bound of two sums of 48 and ten layers
    assert gap(model, trimmed, temperature=1.3) < 2e-5
    both = join([few, part(rollout, torch.tensor([1]))])
    assert gap(model, both, temperature=1.3) < 2e-5
    model.recompute = True
    logp, _, losses = grpo.token_logp(model, rollout, 1.3, index_loss=True)
    (logp[rollout.own[:, 1:]].mean() + losses["kl"]).backward()
    assert grpo.difference(logp.detach(), rollout)[1] == 0


def test_a_prompt_that_k_is_not_exceeded_by():
    """Nothing is left out, and yet what is replayed are selections: all visible tokens. (Sums over 200 slots
    are split otherwise for one query than for many, so bits may differ.) Selecting anew is then no other
    forward: dense attention in its place would sum otherwise."""
    model = tiny(index_topk=200)
    rollout = Roller(model, CPU)(tasks_of("math", "agent"), generator=seeded(), traced=True)
    assert gap(model, rollout) < 2e-5
    with torch.no_grad():
        replayed, _, _ = grpo.token_logp(model, rollout)
        anew, _, _ = grpo.token_logp(model, rollout, keep_selection=False)
    assert torch.equal(anew, replayed)
    chosen = rollout.selections[0]
    at = torch.arange(chosen.shape[1])
    assert torch.equal((chosen >= 0).sum(-1), at[None] - rollout.first() + 1)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_wrong_selection_shows(layer):
    """Of one query, of one layer, shifted by a token."""
    model = tiny()
    rollout = Roller(model, CPU)(tasks_of(*ALL), generator=seeded(), traced=True)
    row, column = (rollout.own & (rollout.ids != EOT)).nonzero()[-1].tolist()
    chosen = rollout.selections[layer]
    query = chosen[row, column - 1].clone()  # its own token's query
    assert (query >= 0).all()
    missing = [t for t in range(int(rollout.start[row]), column - 1) if t not in query.tolist()]
    chosen[row, column - 1, 0] = missing[0]
    assert gap(model, rollout) > 1e-4


def test_selecting_anew_in_another_layout_differs_and_replay_does_not():
    """Positions that begin at 1000: RoPE rounds otherwise, FP8 makes selections of it, replay does not care.
    The differences that replay leaves are float32's: cos and sin of 1000 rad are off by 1000 x 2^-24."""
    model = tiny()
    rollout = Roller(model, CPU)(tasks_of(*ALL * 2), generator=seeded(), traced=True)
    rollout.offset = 1000
    anew = gap(model, rollout, keep_selection=False)
    assert gap(model, rollout) < 1e-2 * anew and gap(model, rollout) < 2e-3


def test_the_fp8_cache_is_seen_by_the_metric():
    model = tiny()
    rollout = Roller(model, CPU, fp8_cache=True)(tasks_of(*ALL), generator=seeded(), traced=True)
    assert 1e-4 < gap(model, rollout)


def test_what_top_p_left_out_stays_out():
    """Each token was possible, the others are not; without the mask the trainer's probabilities are lower."""
    model = tiny()
    rollout = Roller(model, CPU)(tasks_of(*ALL), 1.0, 0.6, seeded(), traced=True)
    own = rollout.own
    kept = rollout.kept[own]  # (N, vocab)
    assert kept.gather(-1, rollout.ids[own][:, None]).all()
    assert (kept.sum(-1) < 257).all() and rollout.kept[:, :16].all()
    assert gap(model, rollout) == 0
    rollout.kept = None
    with torch.no_grad():
        logp, _, _ = grpo.token_logp(model, rollout)
    assert (logp - rollout.logp[:, 1:])[own[:, 1:]].mean() < -0.1


def test_padding_changes_nothing():
    """A row among longer ones takes, at temperature 0, what it takes alone."""
    model = tiny(index_fp8=False)
    batch = tasks_of("agent", "search", "math", "code")
    together = Roller(model, CPU)(batch, 0.0).outs
    assert together == [Roller(model, CPU)([task], 0.0).outs[0] for task in batch]


def test_rows_that_have_ended_leave(monkeypatch):
    """Of 32 rows that end between 8 and 120 tokens from here: what the others take stays the same, so do
    log-probabilities and selections, and the caches that the next rollout begins with are whole."""
    model = tiny()
    batch = tasks_of(*ALL * 4)
    roller = Roller(model, CPU)
    computed = []
    step = generate.Decoder.step

    def noted(decoder, token, position, first):
        computed.append(len(token))
        return step(decoder, token, position, first)

    monkeypatch.setattr(generate.Decoder, "step", noted)
    outs = roller(batch, 0.0).outs
    assert set(computed) == {32, 16, 8} and sum(computed) < 0.75 * 32 * len(computed)
    assert roller(batch, 0.0).outs == outs
    assert gap(model, roller(batch, generator=seeded(), traced=True)) == 0
    monkeypatch.setattr(generate, "FEWEST_ROWS", 32)
    computed.clear()
    assert roller(batch, 0.0).outs == outs and set(computed) == {32}


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_a_prompt_of_several_answers_is_read_once(fp8_cache, monkeypatch):
    """Four rows of each of eight tasks, read in chunks: answers, log-probabilities and selections are those
    of rows that each read their prompt."""
    model = tiny()
    batch = [task for task in tasks_of(*ALL) for _ in range(4)]
    options = dict(temperature=1.3, traced=True, chunk=5)
    read = []

    def noted(model, prompts, *args, **rest):
        read.append(len(prompts))
        return generate.stream(model, prompts, *args, **rest)

    monkeypatch.setattr("rollout.stream", noted)
    once = Roller(model, CPU, fp8_cache=fp8_cache)(batch, generator=seeded(), **options)
    assert fp8_cache or gap(model, once, temperature=1.3) == 0
    assert len({tuple(out) for out in once.outs}) > 24
    monkeypatch.setattr("rollout.repeats", lambda tasks: 1)
    each = Roller(model, CPU, fp8_cache=fp8_cache)(batch, generator=seeded(), **options)
    assert read == [8, 32]
    assert once.outs == each.outs and torch.equal(once.logp, each.logp)
    assert all(torch.equal(*chosen) for chosen in zip(once.selections, each.selections))


def test_tasks_that_repeat():
    a, b, c = tasks_of("math", "math", "search")
    assert repeats([a, a, b, b]) == 2 and repeats([a, a, a]) == 3 and repeats([a, b, c]) == 1
    assert repeats([a, a, b]) == repeats([a, a, b, c]) == repeats([a, b, b, a]) == repeats([a, b, b, b]) == 1


def test_a_decoder_serves_again_after_the_weights_changed():
    model = tiny()
    batch = tasks_of(*ALL)
    roller = Roller(model, CPU)
    first = roller(batch, generator=seeded(), traced=True)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    second = roller(batch, generator=seeded(), traced=True)
    fresh = Roller(model, CPU)(batch, generator=seeded(), traced=True)
    assert len(roller.decoders) == 1
    assert second.outs == fresh.outs != first.outs and torch.equal(second.logp, fresh.logp)


def test_decoders_of_the_last_shapes_are_kept(monkeypatch):
    """Not all that ever were: each holds caches, on a GPU a graph."""
    monkeypatch.setattr("rollout.MOST_DECODERS", 2)
    roller = Roller(tiny(), CPU)
    a = roller.decoder(1, 8, False)
    roller.decoder(2, 8, False)
    assert roller.decoder(1, 8, False) is a
    roller.decoder(3, 8, False)
    assert list(roller.decoders) == [(1, 8, False), (3, 8, False)]
    assert roller.decoder(1, 8, False) is a


def test_padding_sees_itself_alone():
    """Before a row and behind it, and so does its last token, which predicts nothing: without a selection to
    replay, nothing else says so."""
    rollout = Roller(tiny(), CPU)(tasks_of("math", "agent", "code"), generator=seeded(), traced=True)
    first = rollout.first()
    for row in range(3):
        start = int(rollout.start[row])
        end = int(rollout.end[row])
        for at in range(first.shape[1]):
            assert first[row, at] == (start if start <= at < end - 1 else at)


def test_the_reference_replays_what_the_kernels_selected():
    """On a GPU that is what a CUDA graph left behind, which serves again after the weights changed. The bound
    is that of float32 above."""
    model = tiny(backend="triton", num_hidden_layers=1)
    device = torch.device(device_of("triton"))
    roller = Roller(model, device)
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)
        batch = [Scripted(3), Scripted(3)]
        rollout = roller(batch, generator=torch.Generator(device).manual_seed(1), traced=True)
        reference = tiny(num_hidden_layers=1).to(device)
        reference.load_state_dict(model.state_dict())
        assert gap(reference, rollout) < 2e-5
    assert len(roller.decoders) == 1


def test_dense_attention_has_no_selections():
    model = tiny()
    model.attention = "dense"
    rollout = Roller(model, CPU)(tasks_of("math", "code"), generator=seeded(), traced=True)
    assert rollout.selections is None and gap(model, rollout) < 2e-5


def test_a_trace_needs_a_temperature():
    with pytest.raises(ValueError, match="temperature=0"):
        Roller(tiny(), CPU)(tasks_of("math"), 0.0, traced=True)


def test_a_trace_needs_the_whole_prompt():
    """Of a prompt that ranks share, each selects for its part."""
    idx = torch.zeros(1, 9, dtype=torch.long)
    rows = generate.stream(tiny(), idx, 1, trace=generate.Trace(), ranks=Ranks(CPU, world=2, context=2))
    with pytest.raises(ValueError, match="2 ranks share the prompt"):
        next(rows)


def test_too_long_is_refused():
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        Roller(tiny(max_position_embeddings=40), CPU)(tasks_of("code"))


def test_columns():
    assert [rounded(n) for n in (1, 16, 17)] == [16, 16, 32]
    batch = tasks_of("math", "code")
    assert prompt_columns(batch) == rounded(max(len(task.prompt()) for task in batch))
    rollout = Roller(tiny(), CPU)(batch, columns=64, generator=seeded(), traced=True)
    assert torch.equal(rollout.start, torch.tensor([64 - len(task.prompt()) for task in batch]))


# ---- the model's one argument ----

def test_selections_are_recorded_and_replayed():
    model = tiny().eval()
    idx = torch.randint(0, 256, (2, 20))
    chosen = []
    with torch.no_grad():
        want, _ = model(idx, selections=chosen)
        got, _ = model(idx, selections=chosen)
        plain, _ = model(idx)
    assert torch.equal(want, got) and torch.equal(want, plain)
    assert [tuple(x.shape) for x in chosen] == [(2, 20, 8)] * 2


def test_the_indexer_learns_over_the_selections_it_is_given():
    """Its loss is that of the replayed selection, not of its own."""
    model = tiny()
    idx = torch.randint(0, 256, (2, 20))
    chosen = []
    own = model(idx, index_loss=True, selections=chosen)[1]["kl"]
    replayed = model(idx, index_loss=True, selections=chosen)[1]["kl"]
    assert own == replayed
    last = torch.arange(20).view(1, 20, 1) - torch.arange(7, -1, -1)  # the last 8
    window = torch.where(last < 0, 20, last).sort(-1).values  # empty slots stand last
    window = torch.where(window == 20, -1, window).int().expand(2, -1, -1).contiguous()
    other = model(idx, index_loss=True, selections=[window, window])[1]["kl"]
    assert other != own
    other.backward()
    indexers = {id(p) for p in model.indexer_parameters()}
    for p in model.parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == (id(p) in indexers)
