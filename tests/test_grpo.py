"""grpo.py: the loss against its equations written plainly in float64, the KL by enumeration, the step."""
import math
from contextlib import nullcontext
from random import Random
from types import SimpleNamespace

import pytest
import torch

import grpo
import indexer
import tasks
from rollout import Roller, Turns, assemble, part, prompt_columns
from tests.test_rollout import CPU, seeded, tasks_of, tiny

OPTIONS = dict(
    clip=0.2, kl_weight=0.0, drift_bound=0.1, updates=1, micro_rows=4, keep_selection=True,
    train_indexer=True, grad_clip=1.0, temperature=1.0)


# ---- advantages ----

def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 0.0, 0.25])
    got = grpo.advantages(rewards, 4)
    assert got.tolist() == [0.5, -0.5, -0.5, 0.5, 0.25, 0.0, -0.25, 0.0]
    scaled = grpo.advantages(rewards, 4, normalise=True)
    deviations = [math.sqrt(4 * 0.25 / 3)] * 4 + [math.sqrt(2 * 0.0625 / 3)] * 4
    assert scaled.tolist() == pytest.approx([a / d for a, d in zip(got.tolist(), deviations)], rel=1e-4)


@pytest.mark.parametrize("normalise", [False, True])
def test_equal_rewards_give_no_advantage(normalise):
    """Exactly, also where their mean rounds to something else."""
    for value in (0.0, 1.0, 0.1, 0.7, 1 / 3):
        for group in (2, 3, 7, 8):
            assert not grpo.advantages(torch.full((2 * group,), value), group, normalise).any()


# ---- the loss ----

def plainly(logp, old, reference, advantage, own, clip, kl_weight, drift_bound):
    """The equations of grpo.py, a sum over answers and tokens, in float64."""
    total = 0
    for i in range(len(advantage)):
        own_tokens = [t for t in range(logp.shape[1]) if own[i, t]]
        drift = sum((old[i, t] - logp[i, t]).item() for t in own_tokens) / len(own_tokens)
        M = 0 if advantage[i] < 0 and drift > drift_bound else 1
        answer = 0
        for t in own_tokens:
            r = torch.exp(logp[i, t] - old[i, t])
            clipped = min(max(r, r.new_tensor(1 - clip)), r.new_tensor(1 + clip))
            gain = min(r * advantage[i], clipped * advantage[i])
            fraction = torch.exp(reference[i, t] - logp[i, t])  # pi_ref / pi
            kl = r * (fraction - torch.log(fraction) - 1)
            answer = answer + gain * M - kl_weight * kl
        total = total + answer / len(own_tokens)
    return -total / len(advantage)


def case(seed):
    """Random arguments of `objective` in float64: some answers drifted far, some ratios clipped."""
    random = seeded(seed)
    B = 6
    T = 9
    old = -torch.rand(B, T, generator=random, dtype=torch.float64) * 3
    shift = torch.tensor([0.3, -0.4, 0.1, 0.0, 0.4, -0.5], dtype=torch.float64)[:, None]  # row 1 is masked
    logp = old + shift + torch.randn(B, T, generator=random, dtype=torch.float64) * 0.2
    reference = old + torch.randn(B, T, generator=random, dtype=torch.float64) * 0.3
    advantage = torch.tensor([0.6, -0.4, -0.2, 0.0, -0.7, 0.3], dtype=torch.float64)
    own = torch.rand(B, T, generator=random) < 0.6
    own[:, 0] = True
    return logp.requires_grad_(), old, reference, advantage, own


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_objective_is_the_equations(seed, kl_weight):
    logp, old, reference, advantage, own = case(seed)
    loss, metrics = grpo.objective(logp, old, reference, advantage, own, 0.2, kl_weight, 0.1)
    [got] = torch.autograd.grad(loss, logp)
    want_loss = plainly(logp, old, reference, advantage, own, 0.2, kl_weight, 0.1)
    [want] = torch.autograd.grad(want_loss, logp)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert not got[~own].any()
    assert (metrics["kl"] > 0) == (kl_weight > 0)


def test_every_mask_matters():
    """Of these cases, each has answers that the off-policy mask leaves out, ratios that are clipped, and
    tokens of others: without one of them the loss is another."""
    for seed in range(8):
        logp, old, reference, advantage, own = case(seed)
        rest = (reference, advantage, own, 0.2, 0.3, 0.1)
        loss, metrics = grpo.objective(logp, old, *rest)
        assert metrics["masked"] > 0 and metrics["clipped"] > 0
        others = [
            grpo.objective(logp, old, *rest[:5], 1e9),
            grpo.objective(logp, old, reference, advantage, own, 1e9, 0.3, 0.1),
            grpo.objective(logp, old, reference, advantage, own.roll(1, 1), 0.2, 0.3, 0.1),
            grpo.objective(logp, old, reference, advantage, torch.ones_like(own), 0.2, 0.3, 0.1),
            grpo.objective(logp, old, old, *rest[1:])]
        for other, _ in others:
            assert abs(other - loss) > 1e-4


def test_the_off_policy_mask():
    """Only bad answers, only those that became less likely by more than the bound, and not their KL."""
    old = torch.full((4, 5), -1.0)
    moved = torch.tensor([-0.11, -0.11, -0.09, 0.5])[:, None].expand(4, 5)
    logp = (old + moved).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, -1.0, -1.0])
    own = torch.ones(4, 5, dtype=torch.bool)
    loss, metrics = grpo.objective(logp, old, None, advantage, own, 9.0, 0.0, 0.1)
    [grad] = torch.autograd.grad(loss, logp)
    assert grad.ne(0).all(1).tolist() == [True, False, True, True]
    assert metrics["masked"] == 0.25
    loss, _ = grpo.objective(logp, old, old - 1, advantage, own, 9.0, 0.5, 0.1)
    [grad] = torch.autograd.grad(loss, logp)
    assert grad[1].ne(0).all()


def test_other_tokens_may_be_anything():
    """Log-probabilities of a tool's tokens may be -inf where top-p left them out: neither loss nor gradient
    sees it."""
    logp, old, reference, advantage, own = case(0)
    want = grpo.objective(logp, old, reference, advantage, own, 0.2, 0.3, 0.1)[0]
    poisoned = torch.where(own, logp.detach(), float("-inf")).requires_grad_()
    loss, metrics = grpo.objective(
        poisoned, torch.where(own, old, float("nan")), torch.where(own, reference, float("nan")), advantage,
        own, 0.2, 0.3, 0.1)
    loss.backward()
    assert loss == want and poisoned.grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


# ---- the KL ----

def test_unbiased_kl_by_enumeration():
    """The mean over all tokens, drawn from pi_old, is the KL of pi and pi_ref and has its gradient; that of
    k3 without the ratio, or with the ratio detached, has not."""
    random = seeded(4)
    logits = torch.randn(7, generator=random, dtype=torch.float64).requires_grad_()
    old = torch.randn(7, generator=random, dtype=torch.float64).log_softmax(-1)
    reference = torch.randn(7, generator=random, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    want = (logp.exp() * (logp - reference)).sum()
    [want_grad] = torch.autograd.grad(want, logits, retain_graph=True)

    mean = (old.exp() * grpo.unbiased_kl(logp, old, reference)).sum()
    [grad] = torch.autograd.grad(mean, logits, retain_graph=True)
    torch.testing.assert_close(mean, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-12, atol=1e-14)

    k3 = (reference - logp).exp() - (reference - logp) - 1
    for biased in (k3, (logp - old).exp().detach() * k3):
        [grad] = torch.autograd.grad((old.exp() * biased).sum(), logits, retain_graph=True)
        assert (grad - want_grad).norm() > 0.1 * want_grad.norm()


# ---- the step ----

def rolled(model, *domains):
    return Roller(model, CPU)(tasks_of(*domains), generator=seeded(), traced=True)


def take_step(model, rollout, advantage, lr=1e-3, reference=None, **changes):
    """-> the metrics of one step of AdamW."""
    indexers = set(model.indexer_parameters())
    groups = ([p for p in model.parameters() if p not in indexers], list(indexers))
    if not changes.get("train_indexer", True):
        for p in groups[1]:
            p.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    options = SimpleNamespace(**OPTIONS | changes)
    return grpo.step(model, reference, optimizer, groups, rollout, advantage, options, nullcontext, seeded())


def test_a_step_makes_good_answers_likelier():
    """The mean log-probability of own tokens rises where the advantage is positive, falls where it is
    negative."""
    model = tiny()
    rollout = rolled(model, "math", "code", "agent", "search")
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    metrics = take_step(model, rollout, advantage)
    assert metrics["mismatch"] == metrics["mismatch_max"] == metrics["drift"] == 0  # the same bits
    with torch.no_grad():
        logp, _, _ = grpo.token_logp(model, rollout)
    own = rollout.own[:, 1:]
    change = ((logp - rollout.logp[:, 1:]) * own).sum(1) / own.sum(1)
    assert torch.equal(change > 0, advantage > 0)


def test_a_reply_carries_no_loss():
    """Own tokens of a rollout are those that tasks.own_tokens names: the gradient of the objective in the
    log-probabilities is zero at each of the others, and at none of these."""
    model = tiny()
    batch = tasks_of("search", "agent", "agent", "search", seed=4)
    assert {task.mode for task in batch} >= {"think"}
    random = Random(0)
    demos = [task.demo(random) for task in batch]
    columns = prompt_columns(batch)
    prompts = torch.full((4, columns), tasks.EOT)
    turns = Turns(batch)
    for row, task in enumerate(batch):
        prompts[row, columns - len(task.prompt()):] = torch.tensor(task.prompt())
    while not all(turns.over):
        turns([-1 if over else demo[len(out)] for demo, out, over in zip(demos, turns.outs, turns.over)])
    assert turns.outs == demos
    rollout = assemble(batch, prompts, turns, None, CPU)
    logp, _, _ = grpo.token_logp(model, rollout)
    leaf = logp.detach().requires_grad_()
    loss, _ = grpo.objective(leaf, logp.detach(), None, torch.ones(4), rollout.own[:, 1:], 0.2, 0.0, 0.1)
    loss.backward()
    for row, demo in enumerate(demos):
        got = leaf.grad[row, columns - 1:columns - 1 + len(demo)].ne(0).tolist()
        assert got == tasks.own_tokens(demo)
    outside = leaf.grad.clone()
    for row, demo in enumerate(demos):
        outside[row, columns - 1:columns - 1 + len(demo)] = 0
    assert not outside.any()
    assert any(not all(tasks.own_tokens(demo)) for demo in demos)


def test_no_advantage_no_change():
    model = tiny()
    rollout = rolled(model, "math", "code")
    before = [p.detach().clone() for p in model.parameters()]
    take_step(model, rollout, torch.zeros(2), train_indexer=False)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_the_indexers_learn_by_their_kl_alone():
    """Without an advantage they still do, and nothing else does."""
    model = tiny()
    rollout = rolled(model, "math", "code", "search")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = take_step(model, rollout, torch.zeros(3))
    assert metrics["index_kl"] > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (".indexer." not in name), name


def test_selection_in_two_levels(monkeypatch):
    """The trainer replays it, too. Few recent tokens, as answers are short."""
    monkeypatch.setattr(indexer, "RECENT", 10)
    model = tiny(index_block=4, index_candidates=8, index_exact_layers=0)
    rollout = rolled(model, "search", "agent", "search")
    metrics = take_step(model, rollout, torch.tensor([1.0, -1.0, 0.5]))
    assert metrics["mismatch"] < 2e-5 and metrics["index_kl"] > 0


def test_micro_batches_add_up():
    """One update by micro-batches of 1, 2 and 5 rows moves the weights alike."""
    ends = []
    for micro_rows in (1, 2, 5):
        model = tiny(index_fp8=False)
        rollout = rolled(model, "math", "code", "agent", "search", "logic")
        metrics = take_step(model, rollout, torch.tensor([1.0, -1.0, 0.5, 0.2, -0.7]), train_indexer=False,
                            micro_rows=micro_rows, lr=0.0)
        ends.append(metrics["grad_norm"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-4) and ends[0] == pytest.approx(ends[2], rel=1e-4)


def test_several_updates():
    """The second one starts from changed weights, so ratios differ from 1; each has half of the rows."""
    model = tiny()
    rollout = rolled(model, "math", "code", "agent", "search")
    metrics = take_step(model, rollout, torch.tensor([1.0, -1.0, 0.5, -0.5]), updates=2, lr=3e-3)
    assert metrics["mismatch"] < 2e-5 and metrics["drift"] != 0


def test_more_updates_than_rows():
    """There are as many as there are rows, or parts of whole rows: metrics are means over these, not over
    those that were asked for. Of answers alike, by weights that do not change, that is the one of each."""
    model = tiny()
    rollout = rolled(model, *["math"] * 4)
    rollout = part(rollout, torch.tensor([0, 0, 0, 0]))
    entropies = []
    for updates in (1, 2, 3, 9):  # in 1, 2, 2 and 4 parts
        metrics = take_step(model, rollout, torch.ones(4), updates=updates, lr=0.0)
        entropies.append(metrics["entropy"])
    assert entropies == pytest.approx([entropies[0]] * 4, rel=1e-5)


def test_the_reference_pulls_back():
    """Without an advantage, with a KL to another model: pi comes nearer to it."""
    model = tiny()
    reference = tiny()
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    rollout = rolled(model, "math", "code", "agent", "search")

    def distance():
        with torch.no_grad():
            a, _, _ = grpo.token_logp(model, rollout)
            b, _, _ = grpo.token_logp(reference, rollout)
        return ((a - b)[rollout.own[:, 1:]] ** 2).mean().item()

    before = distance()
    metrics = take_step(model, rollout, torch.zeros(4), kl_weight=1.0, reference=reference, lr=1e-5)
    assert metrics["kl"] > 0 and distance() < before


def test_without_replay_the_step_sees_other_numbers():
    """In another layout the trainer's selections differ: the metric says so, replay removes it."""
    model = tiny()
    rollout = rolled(model, *("math", "code", "search", "search") * 4)
    rollout.offset = 1000
    advantage = torch.tensor([1.0, -1.0] * 8)
    kept = take_step(model, rollout, advantage, lr=0.0)
    anew = take_step(model, rollout, advantage, lr=0.0, keep_selection=False)
    assert anew["mismatch"] > 10 * kept["mismatch"] and kept["mismatch_reselected"] > 10 * kept["mismatch"]
    assert part(rollout, torch.tensor([0])).offset == 1000
