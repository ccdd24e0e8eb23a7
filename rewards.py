"""What an answer is worth: rules where a checker can tell, a generative reward model where it takes
judgement."""
from random import Random

import tasks


def subjective(domains):
    """-> those of the domains that are judged by rubrics."""
    return [domain for domain in domains if tasks.DOMAINS[domain].subjective]


class Judge:
    """The generative reward model: reads a rubric and an answer, writes a verdict on each point."""

    def __init__(self, roller):
        self.roller = roller

    def __call__(self, batch, episodes):
        """Subjective tasks and Episodes, None for a malformed one -> for each the share of points that it
        grants, 0 for None, and of those in which it is right (None where it was not asked)."""
        shares = [(0.0, None)] * len(episodes)
        asked = [i for i, episode in enumerate(episodes) if episode is not None]
        if not asked:
            return shares
        verdicts = [tasks.Verdict(batch[i], episodes[i].answer) for i in asked]
        outs = self.roller(verdicts, temperature=0.0).outs
        for i, verdict, out in zip(asked, verdicts, outs):
            shares[i] = verdict.share(out)
        return shares


def judge_agreement(judge, domains, options, seed):
    """-> the share of candidates on which the judge is right, for each of three points, of as many as an
    evaluation has answers."""
    random = Random(seed)
    n = options.eval_tasks * options.eval_samples
    verdicts = []
    for _ in range(n):
        task = tasks.make(random, random.choice(subjective(domains)), None, options.level, options.page)
        verdicts.append(tasks.Verdict(task, tasks.candidate(random, task)))
    right = [0, 0, 0]
    for verdict, out in zip(verdicts, judge.roller(verdicts, temperature=0.0).outs):
        episode = tasks.parse("think", out)
        said = episode.answer if episode else ""
        for point, truth in enumerate(verdict.verdict()):
            right[point] += said[point:point + 1] == truth
    return [count / n for count in right]


def rewards_of(options, batch, outs, judge):
    """-> for each answer a dict of its reward and what it is made of. A right answer is worth 1, less a
    little for its length and for words of the other language; an answer to a rubric what the judge grants."""
    scored = []
    episodes = [task.episode(out) for task, out in zip(batch, outs)]
    rubric = [i for i, task in enumerate(batch) if task.subjective]
    granted = {}
    if rubric:
        shares = judge([batch[i] for i in rubric], [episodes[i] for i in rubric])
        granted = dict(zip(rubric, shares))
    for i, (task, out) in enumerate(zip(batch, outs)):
        if task.subjective:
            share, agreed = granted[i]
            scored.append(dict(reward=share, ok=task.truth(out), judge=share, agreement=agreed, language=1.0))
            continue
        ok = task.outcome(out)
        language = task.language_share(out)
        price = options.length_penalty * len(out) / task.limit + options.language_penalty * (1 - language)
        scored.append(dict(reward=ok * (1 - price), ok=ok, language=language))
    return scored


def summary(scored, asked):
    """Means of what `rewards_of` found, also by domain and mode, and of lengths."""
    facts = {}
    for key in ("reward", "language", "judge", "agreement"):
        values = [result[key] for result in scored if result.get(key) is not None]
        if values:
            facts[key] = sum(values) / len(values)
    by_row = {}
    for result, (task, _) in zip(scored, asked):
        by_row.setdefault(f"ok {task.domain}/{task.mode}", []).append(result["ok"])
    facts |= {name: sum(values) / len(values) for name, values in sorted(by_row.items())}
    facts["length"] = sum(len(out) for _, out in asked) / len(asked)
    return facts
