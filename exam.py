"""How good the models of post-training are: accuracy in every domain and mode on tasks that are the same for
all, and how far rollout and trainer agree."""
import json
from dataclasses import replace
from random import Random

import torch
from tqdm import tqdm

import grpo
import tasks
from rewards import judge_agreement, rewards_of, subjective
from rollout import Roller
from support import cli, files, post_report, runs

SEED = 10**6  # of the tasks; training draws its own by other seeds


# ---- evaluation ----

def exam(options, domain, mode, level):
    """The tasks that models are evaluated on, the same ones always."""
    random = Random(f"{SEED} {domain} {mode} {level}")
    return [tasks.make(random, domain, mode, level, options.page) for _ in range(options.eval_tasks)]


def examine(run, roller, judge, domain, mode, level):
    """One model in one domain and mode -> dict of what the table shows."""
    options = run.options
    batch = exam(options, domain, mode, level)
    greedy = outcomes(run, roller, judge, batch, 0.0)
    repeated = [task for task in batch for _ in range(options.eval_samples)]
    sampled = outcomes(run, roller, judge, repeated, 1.0)
    ok = torch.tensor(sampled.pop("all")).view(-1, options.eval_samples)
    del greedy["all"]
    row = {f"{name} at 0": value for name, value in greedy.items()}
    row |= {f"{name} at 1": value for name, value in sampled.items()}
    row["pass@k"] = (ok == 1).any(1).float().mean().item()
    roller.model.attention = "dense"
    row["ok at 0, dense"] = outcomes(run, run.roller(roller.model), judge, batch, 0.0)["ok"]
    roller.model.attention = "sparse"
    return row


def outcomes(run, roller, judge, batch, temperature):
    """-> means over tasks of ok, length, language and, of rubrics, judge; "all": ok of each."""
    generator = torch.Generator(run.device).manual_seed(SEED)
    outs = []
    for i in range(0, len(batch), run.options.rows):
        outs += roller(batch[i:i + run.options.rows], temperature, generator=generator).outs
    scored = rewards_of(run.options, batch, outs, judge)
    means = dict(length=sum(map(len, outs)) / len(outs))
    for key in ("ok", "language", "judge"):
        values = [result[key] for result in scored if key in result]
        if values:
            means[key] = sum(values) / len(values)
    means["all"] = [result["ok"] for result in scored]
    return means


def models_of(options, domains):
    """-> [(name of the checkpoint, its domains, level)] that are evaluated."""
    models = [("base", domains, options.level)]
    models += [(f"specialist-{domain}", [domain], options.level) for domain in domains]
    models += [(name, domains, options.level) for name in ("generalist", "mixed-base", "sequential", "mixed")]
    models += [(name, domains, options.level + 1) for name in ("base", "generalist", "mixed")]
    return models


def evaluate(run, domains):
    """evaluation.json: every model of out_dir in these domains, and rollout against trainer; then the tables.
    What an earlier call measured besides stays, with --resume also what it measured of these -> 0 or 130."""
    options = run.options
    path = run.out / "evaluation.json"
    found = files.read_json(path) if path.exists() and not options.overwrite else {}
    done = set(found) if options.resume else set()
    judge = run.judge() if subjective(domains) else None
    for name, its_domains, level in tqdm(models_of(options, domains), desc="evaluate", disable=None):
        if not files.locate(run.out / name).exists():
            continue
        roller = None
        for domain in its_domains:
            for mode in tasks.DOMAINS[domain].modes:
                key = f"{name}, level {level}, {domain}/{mode}"
                if key in done:
                    continue
                roller = roller or run.roller(run.load(run.out / name))
                found[key] = examine(run, roller, judge, domain, mode, level)
                if run.caught:
                    runs.write_text(path, json.dumps(found, indent=2) + "\n")
                    return 130
        runs.write_text(path, json.dumps(found, indent=2) + "\n")
    if judge:
        found["judge"] = dict(agreement=judge_agreement(judge, domains, options, SEED))
    found["replay"] = compare_replay(run, domains, run.load(run.out / "base"))
    runs.write_text(path, json.dumps(found, indent=2) + "\n")
    print(post_report.table(found))
    return 0


def compare_replay(run, domains, model):
    """Log-probabilities of the same tokens by rollout and trainer: in the same layout, and with positions
    that begin elsewhere; with the rollout's selections, and selecting anew; rolled out from the model's
    cache, and from the FP8 one -> {case: [mean, maximum of the absolute difference]}."""
    options = run.options
    random = Random(SEED)
    batch = tasks.batch(random, domains, max(1, options.rows // 16), options.level, options.page)
    caches = ["own cache"]
    if cli.has_e4m3(run.device):
        caches.append("FP8 cache")
    found = {}
    for cache in caches:
        roller = Roller(model, run.device, run.autocast, cache == "FP8 cache")
        generator = torch.Generator(run.device).manual_seed(SEED)
        rollout = roller(batch, generator=generator, traced=True)
        for layout, shift in (("same layout", 0), ("other layout", 1000)):
            moved = replace(rollout, offset=shift)
            for replayed in (True, False):
                with torch.no_grad(), run.autocast():
                    logp, _, _ = grpo.token_logp(model, moved, keep_selection=replayed)
                how = "replayed" if replayed else "selected anew"
                gap = grpo.difference(logp, moved)
                found[f"{cache}, {layout}, {how}"] = [value.item() for value in gap]
    return found
