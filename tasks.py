"""What post-training trains for: procedural tasks of six domains, in two modes, with checkers that cannot be
talked into anything.

    math      add two numbers                                           thinking, direct
    logic     put letters in order that are compared in pairs           thinking, direct
    code      find the program that maps examples; hidden inputs decide thinking, direct
    agent     find the program that passes tests that only a tool runs  thinking
    search    follow links through pages that a tool fetches            thinking; direct: one, in the prompt
    writing   words that fulfil a rubric of three points                direct
    question  the same about facts in the prompt                        direct

A prompt is <user> text <think> or <user> text <answer>; the model goes on with its chain of thought, in which
it may call the task's tool, and its answer:

    thinking  text <call> text <reply> the tool's text <end> text <answer> text <|endoftext|>
    direct    text <|endoftext|>

Turn tokens are bytes that no UTF-8 text holds, so no text can spell them. Answers are checked against
strict grammar first: a token out of place, a reply that the tool did not give, or text behind the end make an
episode worth nothing. The programs of `code` and `agent` are run by an interpreter of our own; nothing is
executed in the host's. Nothing here needs torch.
"""
from random import Random
from typing import NamedTuple

USER = 0xF5
THINK = 0xF6
ANSWER = 0xF7
CALL = 0xF8
REPLY = 0xF9
END = 0xFA
EOT = 256  # the end of text of the bytes tokenizer
TURNS = {
    "<|user|>": USER, "<|think|>": THINK, "<|answer|>": ANSWER, "<|call|>": CALL, "<|reply|>": REPLY,
    "<|end|>": END}

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FEW_LETTERS = LETTERS[:12]
WORDS = dict(then=("then", "dann"), so=("so", "also"))  # in the two languages of prompts, English and German
VOCABULARY = "sun sea cat dog sky red big old new hot ice fog elm oak ant owl".split()
MARKS = ".!?"


def encode(text):
    """-> the ids of a text, which are its bytes."""
    return list(text.encode())


def decode(ids):
    """-> the text of ids, or None if they are not UTF-8."""
    try:
        return bytes(ids).decode()
    except ValueError:  # an id beyond 255, or bytes that are no UTF-8
        return None


def own_tokens(out):
    """For each id of an episode: did the model write it? What stands behind <reply>, up to <end>, came from
    the tool."""
    own = []
    replying = False
    for token in out:
        own.append(not replying)
        replying = token == REPLY or (replying and token != END)
    return own


# ---- what was said ----

class Episode(NamedTuple):
    """What a model wrote behind a prompt, taken apart."""
    thought: str  # the chain of thought, without tool calls
    calls: list  # of pairs: what was asked of the tool, its reply
    answer: str


def parse(mode, out):
    """-> the Episode in a list of ids, or None unless it follows the grammar of the mode to its end of
    text."""
    if not out or out[-1] != EOT or EOT in out[:-1]:
        return None
    pieces = [[]]  # ids between turn tokens
    turns = []
    for token in out[:-1]:
        if token in TURNS.values():
            turns.append(token)
            pieces.append([])
        else:
            pieces[-1].append(token)
    texts = [decode(piece) for piece in pieces]
    if None in texts:
        return None
    if mode == "direct":
        return Episode("", [], texts[0]) if not turns else None

    calls = []
    thought = texts[0]
    if turns[-1:] != [ANSWER] or len(turns) % 3 != 1:
        return None
    for n in range(0, len(turns) - 1, 3):
        if turns[n:n + 3] != [CALL, REPLY, END]:
            return None
        calls.append((texts[n + 1], texts[n + 2]))
        thought += f" {texts[n + 3]}"
    return Episode(thought, calls, texts[-1])


class Noise(NamedTuple):
    """How bad demonstrations are, as probabilities."""
    slip: float = 0.0  # of a mistake in a step
    lazy: float = 0.0  # of a chain that does not do the work
    mix: float = 0.0  # of a word in the other language


CLEAN = Noise()
SLOPPY = Noise(slip=0.06, lazy=0.5, mix=0.3)


class Task:
    """One task. mode: "think" or "direct". language: 0 or 1. question: the prompt's text. limit: tokens that
    an episode may take, replies included. level: 1, 2, ..., harder; page: length of the pages of `search`.

    A subclass draws the task, answers as its tool, checks an answer and demonstrates a solution."""
    domain = ""
    modes = ("think", "direct")
    subjective = False  # a rubric, whose true verdict training does not see

    def __init__(self, random, mode, level, page):
        self.mode = mode
        self.level = level
        self.language = random.randrange(2)
        self.draw(random, level, page)

    def prompt(self):
        """-> list of ids."""
        return [USER, *encode(self.question), THINK if self.mode == "think" else ANSWER]

    def tool(self, text):
        """What the tool replies to a call, None without a tool."""
        return None

    def reply(self, call):
        """-> the ids that follow <reply> for a call's ids: the tool's text and <end>; [] without a tool, and
        then no episode with a call is well formed."""
        text = self.tool(decode(call) or "")
        return [] if text is None else [*encode(text), END]

    def episode(self, out):
        """-> the Episode in the ids behind the prompt; None if it is malformed, or holds a reply that the
        tool did not give."""
        episode = parse(self.mode, out)
        if episode is None or any(self.tool(call) != reply for call, reply in episode.calls):
            return None
        return episode

    def outcome(self, out):
        """1.0 for a right answer in a well-formed episode, else 0.0."""
        episode = self.episode(out)
        return float(episode is not None and self.check(episode.answer))

    def language_share(self, out):
        """Of the chain's words that belong to a language, the share in the prompt's; 1 without such words or
        in a malformed episode."""
        episode = parse(self.mode, out)
        words = []
        if episode is not None:
            words = "".join(c if c.isalpha() else " " for c in episode.thought).split()
        counts = [0, 0]
        for word in words:
            for pair in WORDS.values():
                if word in pair:
                    counts[pair.index(word)] += 1
        return counts[self.language] / sum(counts) if sum(counts) else 1.0

    def word(self, random, key, mix):
        """A connecting word in the prompt's language, or by mistake in the other."""
        other = random.random() < mix
        return WORDS[key][1 - self.language if other else self.language]


def thinking(chain, answer):
    """-> ids of an episode without calls."""
    return [*encode(chain), ANSWER, *encode(answer), EOT]


def asking(tool, text):
    """-> ids of a call and its reply."""
    return [CALL, *encode(text), REPLY, *encode(tool(text)), END]


# ---- objective domains ----

class Math(Task):
    """a + b. The chain adds digit by digit from the right, with carries; the lazy one guesses."""
    domain = "math"

    def draw(self, random, level, page):
        digits = level + 1
        self.a = self.number(random, digits)
        self.b = self.number(random, digits)
        self.question = f"{('add', 'plus')[self.language]} {self.a} {self.b}"
        self.limit = 14 * digits + 20 if self.mode == "think" else digits + 3

    def number(self, random, digits):
        """A number of 1 to so many digits."""
        n = random.randint(1, digits)
        return random.randrange(10 ** (n - 1) if n > 1 else 0, 10**n)

    def check(self, answer):
        return answer == str(self.a + self.b)

    def demo(self, random, noise=CLEAN):
        total = self.a + self.b
        if self.mode == "direct":
            return encode(str(self.slipped(random, total, noise))) + [EOT]
        so = self.word(random, "so", noise.mix)
        if random.random() < noise.lazy:
            guess = total if random.random() < 0.5 else max(0, total + random.randint(-12, 12))
            return thinking(f"{so} {guess}", str(guess))
        a = str(self.a)[::-1]
        b = str(self.b)[::-1]
        carry = 0
        digits = ""
        steps = []
        for i in range(max(len(a), len(b))):
            parts = [part for part in (a[i:i + 1], b[i:i + 1], "1" if carry else "") if part]
            digit_sum = self.slipped(random, sum(map(int, parts)), noise)
            steps.append(f"{'+'.join(parts)}={digit_sum}")
            digits = f"{digit_sum % 10}{digits}"
            carry = digit_sum // 10
        if carry:
            digits = f"{carry}{digits}"
        chain = steps[0]
        for step in steps[1:]:
            chain += f" {self.word(random, 'then', noise.mix)} {step}"
        return thinking(f"{chain} {so} {digits}", digits.lstrip("0") or "0")

    def slipped(self, random, number, noise):
        """The number, or by mistake one near it."""
        if random.random() >= noise.slip:
            return number
        return max(0, number + random.choice((-2, -1, 1, 2)))


class Logic(Task):
    """Comparisons of neighbours, shuffled: write the letters in order, the largest first."""
    domain = "logic"

    def draw(self, random, level, page):
        self.order = random.sample(FEW_LETTERS, random.randint(3, level + 3))
        facts = []
        for x, y in zip(self.order, self.order[1:]):
            facts.append(f"{x}>{y}" if random.random() < 0.5 else f"{y}<{x}")
        random.shuffle(facts)
        self.question = f"{('order', 'ordne')[self.language]} {' '.join(facts)}"
        self.limit = 10 * level + 34 if self.mode == "think" else level + 5

    def check(self, answer):
        return answer == "".join(self.order)

    def demo(self, random, noise=CLEAN):
        order = list(self.order)
        if self.mode == "think" and random.random() < noise.lazy:
            random.shuffle(order)
            answer = "".join(order)
            return thinking(f"{self.word(random, 'so', noise.mix)} {answer}", answer)
        for i in range(len(order) - 1):
            if random.random() < noise.slip:
                order[i:i + 2] = order[i + 1], order[i]
        answer = "".join(order)
        if self.mode == "direct":
            return encode(answer) + [EOT]
        chain = f"{order[0]}>{order[1]}"
        for x, y in zip(order[1:], order[2:]):
            chain += f" {self.word(random, 'then', noise.mix)} {x}>{y}"
        return thinking(f"{chain} {self.word(random, 'so', noise.mix)} {answer}", answer)


OPERATIONS = "rsudth"  # reverse, sort, upper case, double, tail, head
LONGEST_TEXT = 64
LONGEST_PROGRAM = 4


def run_program(program, text):
    """Our language: each letter of a program changes the text, from left to right -> the result, or None for
    a program that is empty, holds another letter, is too long, or lets the text grow beyond LONGEST_TEXT."""
    if not 1 <= len(program) <= LONGEST_PROGRAM or any(letter not in OPERATIONS for letter in program):
        return None
    for letter in program:
        if letter == "r":
            text = text[::-1]
        elif letter == "s":
            text = "".join(sorted(text))
        elif letter == "u":
            text = text.upper()
        elif letter == "d":
            text = text + text
        elif letter == "t":
            text = text[1:]
        else:
            text = text[:2]
        if len(text) > LONGEST_TEXT:
            return None
    return text


def any_program(random, length):
    """A random program of this length."""
    return "".join(random.choice(OPERATIONS) for _ in range(length))


def random_text(random):
    """An input for programs."""
    return "".join(random.sample(FEW_LETTERS, 4))


class Code(Task):
    """Find a program from two examples; it is judged by what it makes of hidden inputs."""
    domain = "code"

    def draw(self, random, level, page):
        while True:
            self.program = any_program(random, random.randint(1, level + 1))
            self.shown = [random_text(random) for _ in range(2)]
            self.hidden = [random_text(random) for _ in range(4)]
            if all(run_program(self.program, x) not in (None, x, "") for x in self.shown + self.hidden):
                break
        examples = " ".join(f"{x}:{run_program(self.program, x)}" for x in self.shown)
        self.question = f"{('code', 'kode')[self.language]} {examples}"
        self.limit = level + 4
        if self.mode == "think":  # more for a chain that doubles its text again and again
            self.limit = max(20 * level + 40, len(self.demo(Random(0))))

    def check(self, answer):
        wanted = [run_program(self.program, x) for x in self.shown + self.hidden]
        return [run_program(answer, x) for x in self.shown + self.hidden] == wanted

    def demo(self, random, noise=CLEAN):
        program = self.program
        if random.random() < 2 * noise.slip:
            program = any_program(random, len(program))
        if self.mode == "direct":
            return encode(program) + [EOT]
        if random.random() < noise.lazy:
            return thinking(self.word(random, "so", noise.mix), program)
        text = self.shown[0]
        chain = text
        for i in range(len(program)):
            text = run_program(program[i], text)
            chain += f" {self.word(random, 'then', noise.mix)} {program[i]} {text}"
        return thinking(f"{chain} {self.word(random, 'so', noise.mix)} {program}", program)


class Agent(Task):
    """Which of the candidate programs passes the tests? They are hidden: only the tool runs them."""
    domain = "agent"
    modes = ("think",)

    def draw(self, random, level, page):
        count = level + 2
        while True:
            self.candidates = [any_program(random, 2) for _ in range(count)]
            self.tests = [random_text(random) for _ in range(4)]
            results = {tuple(run_program(program, x) for x in self.tests) for program in self.candidates}
            if len(results) == count:
                break
        self.program = random.choice(self.candidates)
        self.question = "fix " + " ".join(self.candidates)
        self.limit = 10 * count + 8

    def check(self, answer):
        wanted = [run_program(self.program, x) for x in self.tests]
        return [run_program(answer, x) for x in self.tests] == wanted

    def tool(self, text):
        return "ok" if self.check(text) else "no"

    def demo(self, random, noise=CLEAN):
        out = []
        program = random.choice(self.candidates)
        if random.random() >= noise.lazy:
            for candidate in self.candidates:
                if random.random() < noise.slip:
                    continue
                program = candidate
                out += asking(self.tool, program)
                if self.check(program) or random.random() < noise.slip:
                    break
        return out + thinking("", program)


class Search(Task):
    """Follow the links. A page is filler that somewhere holds a link, >x, or the answer, =x. Thinking: pages
    come from the tool, 1 to level + 1 of them. Direct: one page in the prompt. Pages should be longer than k,
    so that the indexer has to find the mark."""
    domain = "search"

    def draw(self, random, level, page):
        self.hops = random.randint(1, level + 1) if self.mode == "think" else 1
        self.chain = random.sample(LETTERS, self.hops + 1)
        self.pages = {}
        for i in range(self.hops):
            length = random.randint(page // 2, page)
            text = [random.choice(LETTERS + " ") for _ in range(length)]
            at = random.randrange(length - 1)
            mark = "=" if i == self.hops - 1 else ">"
            text[at:at + 2] = mark, self.chain[i + 1]
            self.pages[self.chain[i]] = "".join(text)
        start = self.chain[0]
        self.question = f"read {self.pages[start]} ?" if self.mode == "direct" else f"go {start}"
        self.limit = (level + 1) * (page + 8) + 6 if self.mode == "think" else 3

    def tool(self, text):
        return self.pages.get(text, "none")

    def check(self, answer):
        return answer == self.chain[-1]

    def demo(self, random, noise=CLEAN):
        if self.mode == "direct":
            return encode(self.misread(random, self.chain[1], noise)) + [EOT]
        hops = random.randint(0, self.hops) if random.random() < noise.lazy else self.hops
        out = []
        key = self.chain[0]
        for i in range(hops):
            out += asking(self.tool, key)
            if key not in self.pages:
                break
            key = self.misread(random, self.chain[i + 1], noise)
        return out + thinking("", key)

    def misread(self, random, letter, noise):
        """The letter, or by mistake any."""
        return random.choice(LETTERS) if random.random() < noise.slip else letter


# ---- subjective domains ----

class Writing(Task):
    """A line of words for a rubric of three points. What is true of a line is hidden from training: there a
    reward model reads the rubric and the line."""
    domain = "writing"
    modes = ("direct",)
    subjective = True

    def draw(self, random, level, page):
        self.key = random.choice(VOCABULARY)
        self.draw_rubric(random, level)
        self.question = f"write {self.rubric()}"

    def draw_rubric(self, random, level):
        self.count = random.randint(2, level + 3)
        self.mark = random.choice(MARKS)
        self.limit = 4 * level + 24

    def rubric(self):
        """What the answer shall hold, as text: a word, how many words in all, the mark at its end."""
        return f"{self.key} {self.count} {self.mark}"

    def points(self, text):
        """The truth of each point of the rubric, a tuple of three bools."""
        words = text.rstrip(MARKS).split()
        return self.key in words, len(words) == self.count, text[-1:] == self.mark

    def check(self, answer):
        return all(self.points(answer))

    def truth(self, out):
        """The share of the rubric's points that an episode fulfils; 0.0 if it is malformed."""
        episode = self.episode(out)
        return sum(self.points(episode.answer)) / 3 if episode else 0.0

    def demo(self, random, noise=CLEAN):
        count = self.count if random.random() >= 3 * noise.slip else random.randint(1, 6)
        words = random.sample(VOCABULARY, count)
        if random.random() >= 3 * noise.slip and self.key not in words:
            words[random.randrange(count)] = self.key
        mark = self.mark if random.random() >= 3 * noise.slip else random.choice(MARKS)
        return encode(" ".join(words) + mark) + [EOT]


class Question(Writing):
    """A rubric about facts: the word that it asks for is the one that stands behind another in the prompt."""
    domain = "question"

    def draw(self, random, level, page):
        words = random.sample(VOCABULARY, 2 * level + 4)
        facts = list(zip(words[::2], words[1::2]))
        asked, self.key = random.choice(facts)
        self.draw_rubric(random, level)
        said = " ".join(f"{x}-{y}" for x, y in facts)
        self.question = f"know {said} say {asked} {self.count} {self.mark}"


class Verdict(Task):
    """The reward model's task: a rubric and an answer -> y or n for each point. Its chain of thought names
    the mark at the answer's end (_: none) and numbers the words; = stands behind what the rubric asks for, -
    behind what it does not."""
    domain = "judge"
    modes = ("think",)
    longest = 40  # characters of an answer that are read

    def __init__(self, task, answer):
        self.mode = "think"
        self.language = 0
        self.task = task
        self.answer = "".join(c if 32 <= ord(c) < 127 else "#" for c in answer)[:self.longest]
        self.question = f"judge {task.rubric()} in {self.answer}"
        self.limit = 2 * self.longest + 20  # of 20 words of one letter

    def check(self, answer):
        return answer == self.verdict()

    def verdict(self):
        """The true one."""
        return "".join("ny"[point] for point in self.task.points(self.answer))

    def demo(self, random=None, noise=CLEAN):
        last = self.answer[-1:]
        chain = f"{last if last and last in MARKS else '_'}{'=' if last == self.task.mark else '-'}"
        for n, word in enumerate(self.answer.rstrip(MARKS).split(), 1):
            chain += f" {word}{'=' if word == self.task.key else '-'}{n}"
        return thinking(chain, self.verdict())

    def share(self, out):
        """A verdict that the reward model wrote -> what it grants, the share of y, and the share of points
        on which it is right; 0.0 both if it is malformed."""
        episode = parse(self.mode, out)
        said = episode.answer if episode else ""
        if len(said) != 3 or set(said) - set("yn"):
            return 0.0, 0.0
        agreed = sum(a == b for a, b in zip(said, self.verdict()))
        return said.count("y") / 3, agreed / 3


def candidate(random, task):
    """An answer to a subjective task, good or bad in many ways, for the reward model to learn from."""
    noise = random.choice((CLEAN, Noise(slip=0.1), Noise(slip=0.3)))
    text = decode(task.demo(random, noise)[:-1])
    mark = text[-1]
    words = text[:-1].split()
    kind = random.randrange(12)
    if kind == 0:
        words[random.randrange(len(words))] = random.choice(words)
    elif kind == 1:
        words = words[:-1]
    elif kind == 2:
        words.append(task.key)
    elif kind == 3:
        words[random.randrange(len(words))] = "".join(random.sample(LETTERS, random.randint(1, 5)))
    elif kind == 4:
        words = [task.key] * random.randint(1, 6)
    if random.random() < 0.2:
        mark = random.choice(("", ".", "!", "?", "!!", ".?"))
    return " ".join(words) + mark


DOMAINS = {task.domain: task for task in (Math, Logic, Code, Agent, Search, Writing, Question)}


def make(random, domain, mode=None, level=1, page=40):
    """-> a task of a domain, drawn by a random.Random; mode: "think", "direct", or None for any that the
    domain has. ValueError: a domain or a mode that there is not."""
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r}: choose from {', '.join(DOMAINS)}")
    modes = DOMAINS[domain].modes
    if mode is not None and mode not in modes:
        raise ValueError(f"mode {mode!r}: {domain} has {' and '.join(modes)}")
    return DOMAINS[domain](random, mode or random.choice(modes), level, page)


def batch(random, domains, n, level, page):
    """-> n tasks of each of the domains."""
    return [make(random, domain, None, level, page) for domain in domains for _ in range(n)]


def show(ids):
    """-> ids as readable text, turn tokens by name."""
    names = {token: name for name, token in TURNS.items()}
    names[EOT] = "<|endoftext|>"
    return "".join(names.get(token) or bytes([token]).decode("latin-1") for token in ids)
