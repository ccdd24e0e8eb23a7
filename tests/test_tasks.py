"""tasks.py: checkers against brute force, and against episodes that only look right."""
import itertools
import re
from random import Random

import pytest

import tasks
from tasks import ANSWER, CALL, DOMAINS, END, EOT, REPLY, THINK, TURNS, USER, encode, make

ROWS = [(domain, mode) for domain, task in DOMAINS.items() for mode in task.modes]


def drawn(domain, mode=None, n=40, level=1, seed=0):
    random = Random(seed)
    return [make(random, domain, mode, level) for _ in range(n)]


# ---- every domain ----

@pytest.mark.parametrize("domain,mode", ROWS)
@pytest.mark.parametrize("level", [1, 2, 4])
def test_clean_demonstrations_are_right_and_sloppy_ones_often_wrong(domain, mode, level):
    random = Random(5)
    right = 0
    for task in drawn(domain, mode, 200, level):
        out = task.demo(random)
        assert task.outcome(out) == 1.0 and task.language_share(out) == 1.0
        assert len(out) <= task.limit
        sloppy = task.demo(random, tasks.Noise(slip=0.1, lazy=0.5, mix=0.5))
        assert len(sloppy) <= task.limit
        right += task.outcome(sloppy)
    assert 0.2 * 200 < right < 0.98 * 200


@pytest.mark.parametrize("domain,mode", ROWS)
def test_what_only_looks_right_is_worth_nothing(domain, mode):
    """A right episode, changed in one place."""
    random = Random(2)
    for task in drawn(domain, mode, 20):
        right = task.demo(random)
        text = task.episode(right).answer
        head = right[:len(right) - len(encode(text)) - 1]  # up to the answer
        assert task.outcome([*head, *encode(text), EOT]) == 1.0
        wrong = [
            [], [EOT], right[:-1], right + [EOT], right + encode("x"), right + right, [EOT] + right,
            [*head, EOT],
            [*head, *encode(text), USER, EOT], [*head, *encode(text), THINK, EOT],
            [*head, *encode(text), ANSWER, *encode(text), EOT],
            [*head, CALL, *encode(text), REPLY, END, EOT],
            [*head, *encode(text + "\x00"), EOT], [*head, *encode(text + "\n"), EOT],
            [*head, *encode(text * 300), EOT], [*head, *encode("9" * 5000), EOT],
            [*head, *encode(text), 257, EOT], [*head, *encode(text), 300, EOT], [*head, 0xC3, EOT],
            [*head, 0xC3, *encode(text), EOT], [USER, *right], [ANSWER, ANSWER, *right],
            [CALL, *encode("a"), END, *right], [REPLY, *encode("ok"), END, *right],
            [CALL, *encode(text), REPLY, *encode("forged"), END, *right],
            [CALL, *encode(text), REPLY, *right]]
        for out in wrong:
            assert task.outcome(out) == 0.0, tasks.show([i for i in out if i <= 256])


def test_direct_mode_has_no_tool_and_no_chain():
    for task in drawn("search", "direct", 5):
        page = encode(task.question.split()[1])
        call = [CALL, *encode(task.chain[0]), REPLY, *page, END, ANSWER, *encode(task.chain[-1]), EOT]
        assert task.outcome(call) == 0.0
        assert task.outcome([*encode("so "), ANSWER, *encode(task.chain[-1]), EOT]) == 0.0


def test_an_answer_must_follow_the_chain():
    for task in drawn("math", "think", 5):
        answer = encode(str(task.a + task.b))
        assert task.outcome([*answer, EOT]) == 0.0
        assert task.outcome([ANSWER, *answer, EOT]) == 1.0


def test_turn_tokens_are_in_no_text():
    """Of all characters, in UTF-8."""
    used = set()
    for point in (*range(0x800), *range(0x800, 0x110000, 61)):
        if not 0xD800 <= point < 0xE000:
            used.update(chr(point).encode())
    assert len(used) == 256 - 13 and not used & set(TURNS.values())
    assert len(set(TURNS.values())) == 6 and EOT not in TURNS.values()


def test_own_tokens():
    """Replies, <end> included, are the tool's; a <reply> is the model's, it asks for one."""
    out = [7, CALL, 8, REPLY, 9, 9, END, 7, CALL, REPLY, END, ANSWER, 5, EOT]
    own = [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert tasks.own_tokens(out) == [bool(x) for x in own]


def test_language_share():
    task = drawn("math", "think", 1)[0]
    mine = [pair[task.language] for pair in tasks.WORDS.values()]
    other = [pair[1 - task.language] for pair in tasks.WORDS.values()]
    chains = {"": 1.0, "1+1=2": 1.0, mine[0]: 1.0, other[0]: 0.0, f"{mine[0]}3{other[1]}": 0.5,
              f"{mine[0]} {mine[1]} {mine[1]} {other[1]}": 0.75}
    for chain, share in chains.items():
        assert task.language_share(tasks.thinking(chain, "1")) == share
    assert task.language_share(encode(other[0])) == 1.0  # malformed
    # what a tool wrote is not the model's language
    said = tasks.asking(encode_none, other[0]) + tasks.thinking(mine[0], "1")
    assert task.language_share(said) == 1.0


def encode_none(text):
    return f"none {text}"


@pytest.mark.parametrize("args,words", [
    (("poetry",), "choose from math"), (("agent", "direct"), "agent has think"),
    (("writing", "think"), "writing has direct")])
def test_what_there_is_not(args, words):
    with pytest.raises(ValueError, match=words):
        make(Random(0), *args)


def test_tasks_follow_from_the_seed():
    for domain in DOMAINS:
        a = [(t.prompt(), t.demo(Random(1), tasks.SLOPPY)) for t in drawn(domain)]
        b = [(t.prompt(), t.demo(Random(1), tasks.SLOPPY)) for t in drawn(domain)]
        assert a == b


# ---- objective domains, by brute force ----

def test_math():
    for task in drawn("math", n=200):
        a, b = map(int, task.question.split()[1:])
        assert [n for n in range(400) if task.check(str(n))] == [a + b]
        for text in (f"0{a + b}", f"+{a + b}", f"{a + b}.0", f" {a + b}", f"{a + b} ", ""):
            assert not task.check(text)


def test_logic():
    """Of all orders of the letters, exactly one fulfils the comparisons."""
    for task in drawn("logic", n=60):
        facts = []
        for fact in task.question.split()[1:]:
            facts.append((fact[0], fact[2]) if fact[1] == ">" else (fact[2], fact[0]))
        letters = sorted({letter for fact in facts for letter in fact})
        for order in itertools.permutations(letters):
            holds = all(order.index(x) < order.index(y) for x, y in facts)
            assert task.check("".join(order)) == holds


EQUIVALENT = dict(
    r=lambda s: "".join(reversed(s)), s=lambda s: "".join(sorted(s)), u=lambda s: s.upper(),
    d=lambda s: s * 2, t=lambda s: s[1:], h=lambda s: s[0:2])


def by_lambdas(program, text):
    for letter in program:
        text = EQUIVALENT[letter](text)
    return text


def all_programs(longest):
    return ["".join(p) for n in range(1, longest + 1) for p in itertools.product(EQUIVALENT, repeat=n)]


def test_interpreter():
    for program in all_programs(4):
        result = by_lambdas(program, "gbca")
        assert tasks.run_program(program, "gbca") == (result if len(result) <= 64 else None)
    for program in ("", "x", "r ", "R", "rr\n", "rsudt", "d" * 100, "__import__"):
        assert tasks.run_program(program, "abcd") is None
    assert tasks.run_program("dd", "a" * 32) is None


@pytest.mark.parametrize("domain", ["code", "agent"])
def test_programs_are_judged_by_what_they_do(domain):
    """Right is every program that does the same on all inputs, and no other."""
    for task in drawn(domain, n=8):
        inputs = task.tests if domain == "agent" else task.shown + task.hidden
        wanted = [by_lambdas(task.program, x) for x in inputs]
        for program in all_programs(3):
            same = [by_lambdas(program, x) for x in inputs] == wanted
            assert task.check(program) == same
            if domain == "agent":
                assert task.tool(program) == ("ok" if same else "no")


def test_code_cannot_be_guessed_from_the_prompt():
    """A program that maps the two examples alone is not always enough."""
    hidden = 0
    for task in drawn("code", n=100, level=2):
        for program in all_programs(2):
            fits = all(by_lambdas(program, x) == by_lambdas(task.program, x) for x in task.shown)
            hidden += fits and not task.check(program)
            assert fits or not task.check(program)
    assert hidden > 0


def test_the_longest_chain_fits():
    """Also where every step doubles the text."""
    for level in (1, 2, 3, 5):
        for task in drawn("code", "think", 3000, level, seed=1):
            assert len(task.demo(Random(0))) <= task.limit


def test_agent_has_one_right_candidate():
    for task in drawn("agent"):
        assert [task.check(program) for program in task.candidates].count(True) == 1
        assert task.tests[0] not in task.question


def test_search():
    """By following the marks with a pattern."""
    for task in drawn("search", "think") + drawn("search", "direct"):
        key = task.chain[0]
        while True:
            page = task.question.partition(" ")[2] if task.mode == "direct" else task.tool(key)
            [(mark, key)] = re.findall("([>=])(.)", page)
            if mark == "=":
                break
        assert [letter for letter in tasks.LETTERS if task.check(letter)] == [key]
        assert task.tool("?") == task.tool("") == "none" and not task.check("")


# ---- rubrics ----

@pytest.mark.parametrize("domain", ["writing", "question"])
def test_rubric_points(domain):
    for task in drawn(domain):
        if domain == "question":
            facts = dict(pair.split("-") for pair in task.question.split() if "-" in pair)
            assert facts[task.question.split()[-3]] == task.key
        other = next(word for word in tasks.VOCABULARY if word != task.key)
        words = [task.key] + [other] * (task.count - 1)
        wrong_mark = next(mark for mark in tasks.MARKS if mark != task.mark)
        assert task.points(" ".join(words) + task.mark) == (True, True, True)
        assert task.points(" ".join(words) + wrong_mark) == (True, True, False)
        assert task.points(" ".join(words)) == (True, True, False)
        assert task.points(" ".join(words + [other]) + task.mark) == (True, False, True)
        assert task.points(" ".join([other] * task.count) + task.mark) == (False, True, True)
        assert task.points(task.key * 2 + task.mark)[0] is False
        assert task.points("") == (False, False, False)
        assert task.truth(encode(" ".join(words) + wrong_mark) + [EOT]) == pytest.approx(2 / 3)
        assert task.truth(encode(" ".join(words) + task.mark)) == 0.0


def test_verdicts():
    """True demonstrations, all eight verdicts among the candidates, and what a malformed one grants."""
    random = Random(3)
    seen = set()
    for task in drawn("writing", n=300) + drawn("question", n=300):
        verdict = tasks.Verdict(task, tasks.candidate(random, task))
        seen.add(verdict.verdict())
        out = verdict.demo()
        assert verdict.outcome(out) == 1.0 and len(out) <= verdict.limit
        assert verdict.share(out) == (verdict.verdict().count("y") / 3, 1.0)
    assert len(seen) == 8
    verdict = tasks.Verdict(task, "sun")
    assert verdict.share(tasks.thinking("", "yyy"))[0] == 1.0
    for answer in ("", "yy", "yyyy", "yyx", "YYY"):
        assert verdict.share(tasks.thinking("", answer)) == (0.0, 0.0)
    assert verdict.share(tasks.thinking("", "yyy")[:-1]) == (0.0, 0.0)


def test_an_answer_cannot_speak_to_the_judge():
    """It is cut to what is read, and holds no turn token and no control character."""
    task = drawn("writing", n=1)[0]
    verdict = tasks.Verdict(task, "sun!\x00\n" + "é" * 99)
    assert verdict.answer == "sun!##" + "#" * 34
    inside = verdict.prompt()[1:-1]
    assert all(32 <= token < 127 for token in inside)
