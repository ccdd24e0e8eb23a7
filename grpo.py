"""Group Relative Policy Optimization, the loss and the step (GRPO: arXiv 2402.03300, section 4.1; the
stabilisers: the DeepSeek-V3.2 report, arXiv 2512.02556, section 3.1).

G answers o_1 ... o_G to one prompt q are sampled from pi_old and given rewards R_i. With
r_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t), the objective, which is maximised, is

    1/G sum_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) M_i - beta D_it ]

|o_i| counts the model's own tokens: replies of tools carry no loss. pi_old is what the rollout computed, not
what the trainer computes of it again, so that the ratio also holds what the two disagree in. Four things keep
it near 1 until the weights have changed, or take care where it is not:

    keep selection      the trainer's queries attend to what the rollout's selected (`selections`)
    keep sampling mask  what top-p left out stays out of the trainer's softmax (`kept`)
    M_i                 leaves out an answer that is worse than its group and that pi has moved away from
    D_it                an estimate of KL(pi || pi_ref) that is unbiased, as its gradient is

The indexers learn beside it, by the KL of the sparse stage over the same selections.
"""
import torch
from torch.nn.utils import clip_grad_norm_

from rollout import part, trim


def advantages(rewards, group, normalise=False):
    """A_i = R_i - mean of its group; rewards (N,) float32, each `group` of them after another -> (N,).

    normalise: divided by the group's standard deviation, as GRPO was published (arXiv 2402.03300, section
    4.1.2); without it questions that are nearly always or nearly never answered do not count more (Dr. GRPO,
    arXiv 2503.20783). A group of equal rewards gives 0."""
    rewards = rewards.view(-1, group)  # (groups, group)
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0)
    if normalise:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-6)
    return centred.flatten()


def token_logp(model, rollout, temperature=1.0, keep_selection=True, index_loss=False):
    """Log-probabilities of a Rollout's tokens by the model as it is now -> logp (B,T-1) of ids[:, 1:] and the
    entropy (B,T-1) of what they are drawn from, float32, and the model's losses.

    keep_selection: attend to the rollout's selections, else select anew, as the rollout did also where it saw
    no more than k tokens: dense attention would round otherwise."""
    selections = rollout.selections
    if selections and not keep_selection:
        selections = []  # which the model fills
    columns = rollout.ids.shape[1] - 1
    position = torch.arange(rollout.offset, rollout.offset + columns, device=rollout.ids.device)
    logits, losses = model(
        rollout.ids[:, :-1], first=rollout.first(), index_loss=index_loss, position=position,
        selections=selections)
    logits = logits.float() / temperature  # (B, T - 1, vocab)
    if rollout.kept is not None:
        logits = logits.masked_fill(~rollout.kept[:, 1:], float("-inf"))
    logp = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = torch.special.entr(logp.exp()).sum(-1)  # (B, T - 1)
    return logp.gather(-1, rollout.ids[:, 1:, None])[..., 0], entropy, losses


def unbiased_kl(logp, old, reference):
    """An estimate of KL(pi || pi_ref) from tokens drawn from pi_old, arguments and result (B,T):

        D = pi / pi_old (pi_ref / pi - log(pi_ref / pi) - 1)      (V3.2 report, section 3.1, eq. 7)

    The ratio is part of the graph: the mean of D is the KL, and the mean of its gradient the KL's gradient,
    wherever pi has gone from pi_old. Without it (k3, as GRPO was published) neither is."""
    log_ratio = reference - logp
    return (logp - old).exp() * (log_ratio.exp() - log_ratio - 1)


def objective(logp, old, reference, advantage, own, clip, kl_weight, drift_bound):
    """The loss, minus the objective above, over B answers.

    logp (B,T) of the model, old (B,T) when they were sampled, reference (B,T) of pi_ref or None with a
    kl_weight of 0; advantage (B,), own (B,T) bool: tokens that count. M_i = 0 where A_i < 0 and the mean over
    t of log(pi_old / pi) exceeds drift_bound (V3.2 report, section 3.1, eq. 9); it leaves out the first term
    alone. -> loss (), dict of detached () metrics."""
    length = own.sum(1).clamp(min=1)  # (B,)
    logp = torch.where(own, logp, 0)
    old = torch.where(own, old, 0)
    ratio = (logp - old).exp()  # (B, T)
    A = advantage[:, None]  # (B, 1)
    unclipped = ratio * A
    surrogate = torch.minimum(unclipped, ratio.clamp(1 - clip, 1 + clip) * A)
    drift = (old - logp.detach()).sum(1) / length  # (B,)
    masked = (advantage < 0) & (drift > drift_bound)
    gain = surrogate.masked_fill(masked[:, None], 0)
    kl = torch.zeros_like(logp)
    if kl_weight:
        kl = torch.where(own, unbiased_kl(logp, old, torch.where(own, reference, 0)), 0)
        gain = gain - kl_weight * kl
    loss = -((gain * own).sum(1) / length).mean()
    tokens = own.sum().clamp(min=1)
    metrics = dict(
        kl=kl.detach().sum() / tokens,
        drift=drift.mean(),
        masked=masked.float().mean(),
        clipped=((surrogate != unclipped) & own).sum() / tokens)
    return loss, metrics


def difference(logp, rollout):
    """How far log-probabilities (B,T-1) are from those of the rollout -> mean and maximum of the absolute
    difference over its own tokens."""
    gap = (logp - rollout.logp[:, 1:])[rollout.own[:, 1:]].abs()
    return gap.mean(), gap.max()


def step(model, reference, optimizer, groups, rollout, advantage, options, autocast, generator):
    """One step of training on a Rollout: options.updates updates of the weights, each by another part of the
    rows -> dict of floats, means over the rows.

    reference: the model of pi_ref, None with a kl_weight of 0. groups: the parameters, main and indexers,
    that are clipped apart. advantage (B,). options: clip, kl_weight, drift_bound, updates, micro_rows,
    keep_selection, train_indexer, grad_clip, temperature. autocast: makes the context of a
    forward. generator: of the order of rows, on the CPU.

    mismatch, mismatch_max: of |log pi - log pi_old| before the first update, where the two are the same
    weights; mismatch_reselected: its mean over a few rows if the trainer selects anew."""
    order = torch.randperm(len(advantage), generator=generator).to(advantage.device)
    metrics = {}

    def note(name, value, share):
        metrics[name] = metrics.get(name, 0) + value.detach() * share

    parts = order.chunk(options.updates)  # of few rows fewer
    for update, rows in enumerate(parts):
        # rows that end, and then that begin, in about the same column together: less padding
        rows = rows[rollout.start[rows].argsort(descending=True, stable=True)]
        rows = rows[rollout.end[rows].argsort(stable=True)]
        for micro_rows in rows.split(options.micro_rows):
            micro = trim(part(rollout, micro_rows))
            share = len(micro_rows) / len(rows)
            with autocast():
                reference_logp = None
                if options.kl_weight:
                    with torch.no_grad():
                        reference_logp = token_logp(
                            reference, micro, options.temperature, options.keep_selection)[0]
                logp, entropy, losses = token_logp(
                    model, micro, options.temperature, options.keep_selection, options.train_indexer)
            own = micro.own[:, 1:]
            loss, noted = objective(
                logp, micro.logp[:, 1:], reference_logp, advantage[micro_rows], own, options.clip,
                options.kl_weight, options.drift_bound)
            total = loss + losses.get("kl", 0)
            (total * share).backward()

            for name, value in noted.items():
                note(name, value, share / len(parts))
            note("entropy", (entropy * own).sum() / own.sum(), share / len(parts))
            if options.train_indexer:
                note("index_kl", losses["kl"], share / len(parts))
            if update == 0:
                mean, largest = difference(logp.detach(), micro)
                note("mismatch", mean, share)
                metrics["mismatch_max"] = torch.maximum(metrics.get("mismatch_max", largest), largest)
                if "mismatch_reselected" not in metrics:
                    with torch.no_grad(), autocast():
                        anew = token_logp(model, micro, options.temperature, keep_selection=False)[0]
                    metrics["mismatch_reselected"] = difference(anew, micro)[0]
        norms = []
        for group in groups:
            learning = [p for p in group if p.grad is not None]
            norms.append(clip_grad_norm_(learning, options.grad_clip))
        note("grad_norm", norms[0].to(advantage.device), 1 / len(parts))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    names = list(metrics)
    return dict(zip(names, torch.stack([metrics[name].float() for name in names]).tolist()))
