"""Generation: the prompt enters the caches in chunks, then one token at a time. On a GPU a decoding step is
one CUDA graph."""
import functools
import math
from concurrent.futures import wait
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import torch

from precision import product_dtype
from sparse_attn import Cache

SMALL_CHUNK = 1024  # prompt tokens of a chunk, at least; on a CPU always
LARGE_CHUNK = 32768  # beyond, nothing is gained
GREEDY = 1e-6  # temperatures below it take the most likely token
LEAST_TOP_P = 1e-9  # below it rounding may leave no token at all
ROUND = 16  # lengths that texts are filled up to are multiples of it: kernels know few shapes
READ_SHARE = 8  # replies are read once so many rows wait for one that writes
FEWEST_ROWS = 8  # that a batch keeps, and multiples: a CPU sums products of other numbers in another order
CHUNK_SHARE = 8  # a chunk's tensors in one layer take at most 1 / CHUNK_SHARE of a GPU's free memory


def rounded(n, step=ROUND):
    """n, up to the next multiple of step."""
    return -(-n // step) * step


def restrict(logits, temperature=1.0, top_k=None, top_p=None):
    """logits (B,vocab) -> (B,vocab) float32, those that `sample` draws from: over the temperature, -inf for
    what top_k and top_p leave out. temperature above 0."""
    logits = logits.float() / temperature
    nucleus = top_p is not None and top_p < 1
    if top_k is not None or nucleus:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, vocab) each
        if top_k is not None:
            ranked[:, top_k:] = float("-inf")
        if nucleus:  # a token stays while those before it hold less than top_p
            p = ranked.softmax(-1)
            ranked = ranked.masked_fill(p.cumsum(-1) - p >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(-1, order, ranked)
    return logits


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B,vocab) -> (B,) int64 sampled tokens, from the top_k most likely ones and the smallest set of
    probability top_p. temperature 0 takes the most likely one. Of equal logits the lower ids come first."""
    if temperature < GREEDY:
        return logits.argmax(-1)
    p = restrict(logits, temperature, top_k, top_p).softmax(-1)  # (B, vocab)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


class Trace:
    """What a trainer needs to know of a generation, noted by `stream`. Columns are positions; what stands in
    column -1, of rows that wait or are over, means nothing.

    logp: for each step (B,) float32, the log-probability of the token sampled, among those that could be;
    kept: for each step (B,vocab) bool, which those were; [] without top_k and top_p. columns: for each step
    (B,) int64, where the token stands. selections: for each forward, of a chunk or of one token a row, a list
    of (B,S,k) int32 per layer; [] for a model with dense attention. queries: for each of them (B,S) int64,
    the columns of the queries."""

    def __init__(self):
        self.logp = []
        self.kept = []
        self.columns = []
        self.selections = []
        self.queries = []

    def add_token(self, rows, logits, token, column, temperature, top_k, top_p):
        """The token (n,) sampled where the model gave logits (n,vocab), of the Rows that are computed, for a
        column (n,)."""
        logits = restrict(logits, temperature, top_k, top_p)
        logp = logits.log_softmax(-1).gather(-1, token[:, None])  # (n, 1)
        self.logp.append(rows.everywhere(logp[:, 0], 0))
        self.columns.append(rows.everywhere(column, -1))
        if top_k is not None or top_p is not None:
            self.kept.append(rows.everywhere(logits > float("-inf"), True))

    def add_selections(self, rows, selections, queries):
        """Those of one forward, of the Rows that are computed; queries (n,S). Copies: a CUDA graph writes the
        next step's to the same place."""
        self.selections.append([rows.everywhere(chosen, -1).clone() for chosen in selections])
        self.queries.append(rows.everywhere(queries, -1))


def document_starts(idx, end_ids):
    """idx (B,T) -> (B,T) int32: for each token the position where its document begins, behind the last end of
    text before it."""
    B, T = idx.shape
    ends = torch.isin(idx, torch.tensor(end_ids, dtype=idx.dtype, device=idx.device))  # (B, T)
    behind = torch.arange(1, T + 1, device=idx.device).expand(B, T).masked_fill(~ends, 0)
    starts = behind.cummax(-1).values.roll(1, -1)  # an end of text belongs to the document that it ends
    starts[:, 0] = 0
    return starts.int()


def new_caches(model, B, capacity, device, dtype, fp8=False):
    """-> an empty Cache for each layer: latents in dtype, or in the published FP8 layout."""
    caches = []
    for layer in range(model.config.num_hidden_layers):
        caches.append(Cache(
            model.config, B, capacity, device, dtype, fp8, model.index_fp8,
            indexed=model.config.has_indexer(layer)))
    return caches


class Decoder:
    """Decoding steps of B rows whose prompts are in the caches.

    With the Triton kernels on a GPU the first step is captured as a CUDA graph: lengths are read on the
    device, so one graph serves every position and no time goes to launches. No graph is used, and the host
    launches every step anew, where a step needs the host: by the PyTorch reference, which takes lengths from
    it; by a model with experts, which in any dtype but bf16 reads how many tokens each expert got, to loop
    over those that got any; by a sharded model, whose blocks are gathered one by one.

    compiled: by torch.compile first, unless kernels.decode_block takes all of a step. traced: selections of a
    step are kept in `selections`, (B,1,k) for each layer."""

    def __init__(self, model, caches, compiled=False, traced=False):
        latents = caches[0].latents  # (B, capacity, ...)
        B = len(latents)
        device = latents.device
        triton = model.backend_on(device) == "triton"
        if model.decodes_by_kernels(device) and not model.config.n_routed_experts:
            compiled = False
        self.model = torch.compile(model, dynamic=False) if compiled else model
        self.compiled = compiled
        self.caches = caches
        self.captures = device.type == "cuda" and triton and not model.config.n_routed_experts
        if hasattr(model, "reshard"):  # of FSDP
            self.captures = False
        self.rows_leave = device.type == "cpu" and not compiled  # see Rows
        self.graph = None
        self.logits = None
        self.traced = traced and model.attention == "sparse"
        self.selections = []
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.first = torch.zeros(B, 1, dtype=torch.int32, device=device)
        self.last = torch.zeros(B, 1, dtype=torch.int32, device=device)

    def part(self, rows):
        """-> a Decoder of these rows (n,) int64 alone, on copies of their caches."""
        return Decoder(self.model, [cache.part(rows) for cache in self.caches], traced=self.traced)

    def step(self, token, position, first):
        """token (B,) int64 at position (B,) int64, which enters the caches; first (B,) int64: where its
        document begins -> logits (B,1,vocab)."""
        self.token.copy_(token[:, None])
        self.position.copy_(position[:, None])
        self.first.copy_(first[:, None])
        self.last.copy_(position[:, None])
        if not self.captures:
            return self.forward()
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return self.logits

    def forward(self):
        """-> logits (B,1,vocab) of self.token"""
        last = self.last if self.captures or self.compiled else None  # None: only what is filled is read
        self.selections = []
        logits, _ = self.model(
            self.token, first=self.first, caches=self.caches, position=self.position, last=last,
            selections=self.selections if self.traced else None)
        return logits

    def capture(self):
        """The first forward runs beside the graph: it compiles kernels, which a capture cannot, and what it
        writes the replay writes again."""
        with torch.cuda.device(self.token.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.forward()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self.logits = self.forward()


def make_decoder(model, B, capacity, device, fp8_cache=False, compiled=False, traced=False):
    """-> the Decoder of B rows of up to `capacity` tokens, with empty caches: latents in the published FP8
    layout, or in what the model computes in."""
    dtype = product_dtype(model.lm_head.weight)
    caches = new_caches(model, B, capacity, device, dtype, fp8_cache)
    return Decoder(model, caches, compiled, traced)


class Rows:
    """The rows of a batch that are still computed. On a CPU, where no CUDA graph wants one shape and fewer
    rows are less work, rows that have ended leave, half of the batch at a time.

    at: (n,) int64, which of the B rows they are."""

    def __init__(self, B, device):
        self.B = B
        self.at = torch.arange(B, device=device)

    def everywhere(self, x, fill):
        """x (n,...) of these rows -> (B,...), `fill` in the others."""
        if len(x) == self.B:
            return x
        out = x.new_full((self.B, *x.shape[1:]), fill)
        out[self.at] = x
        return out

    def halve(self, ended):
        """ended (n,) bool -> (m,) int64, which of these rows stay, or None: too few have ended."""
        half = -(-len(ended) // (2 * FEWEST_ROWS)) * FEWEST_ROWS
        if half >= len(ended) or int((~ended).sum()) > half:
            return None
        staying = ended.int().argsort(stable=True)[:half].sort().values
        self.at = self.at[staying]
        return staying


class Steered:
    """What a steer function has said of B rows that may take n tokens each: who writes, who waits, and for
    what, who is over.

    steer(tokens): a list of B, what each row sampled, -1 for nothing -> {row: its token, which ends no text,
    and what follows in any case, such as the reply of a tool}, of rows that go on; for each row whether it is
    over."""

    def __init__(self, steer, B, n):
        self.steer = steer
        self.n = n
        self.tokens = []
        self.lengths = [0] * B
        self.pieces = {}  # of the rows that wait
        self.over = [False] * B
        self.writes = [True] * B

    def hear(self, tokens):
        """Another token of each row that writes, -1 of others. ValueError: a row has no room for more."""
        replies, self.over = self.steer(tokens)
        self.tokens = tokens
        for row, token in enumerate(tokens):
            if token >= 0:
                self.lengths[row] += len(replies.get(row, [token]))
            if self.lengths[row] >= self.n and not self.over[row]:
                raise ValueError(f"row {row} has taken n={self.n} tokens, and is not over; raise n")
        self.pieces |= replies
        self.writes = [not over and row not in self.pieces for row, over in enumerate(self.over)]

    def due(self):
        """-> for each row what it is to read now, [] if it is over; None while enough rows write."""
        if READ_SHARE * sum(self.writes) > len(self.pieces):
            return None
        due = []
        for row, writes in enumerate(self.writes):
            due.append(self.pieces.get(row, [self.tokens[row]] if writes else []))
        self.pieces = {}
        return due


def check(T, n, temperature, top_k, top_p, chunk, config):
    """ValueError: options of `stream` that mean nothing, a prompt that is empty or too long."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1")
    if top_p is not None and not LEAST_TOP_P <= top_p <= 1:
        raise ValueError(f"top_p={top_p}: must lie between {LEAST_TOP_P} and 1")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    longest = config.max_position_embeddings
    if T < 1 or n < 0 or T + n > longest:
        raise ValueError(f"prompt of {T} tokens + {n} new ones: must be between 1 and "
                         f"max_position_embeddings={longest}; shorten either")


def default_chunk(config, B, device):
    """Prompt tokens of B rows that enter the caches at once. On a GPU few large chunks are faster, as a small
    one costs as many launches: as many tokens as fit, by the widest tensors of a layer."""
    if device.type != "cuda":
        return SMALL_CHUNK
    qk = config.qk_nope_head_dim + config.qk_rope_head_dim
    absorbed = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    attention = config.num_attention_heads * (2 * qk + 2 * absorbed + config.v_head_dim)
    width = 8 * config.hidden_size + 3 * config.intermediate_size + attention  # elements per token
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    tokens = free // CHUNK_SHARE // (2 * width * B)  # 2 bytes an element
    return max(SMALL_CHUNK, min(LARGE_CHUNK, tokens))


def read_pieces(model, pieces, position, first, caches, chunk, note):
    """Let each row's piece, a list of ids or [], enter the caches from its position (B,) int64 on, `chunk`
    columns at once -> logits (B,1,vocab) behind it, of no use where it is []. first (B,) int64. note: None,
    or called with the selections of each forward and (B,S), the positions of their queries, -1 behind a
    piece's end."""
    longest = rounded(max(map(len, pieces)))
    tokens = torch.tensor([piece + [0] * (longest - len(piece)) for piece in pieces]).to(position.device)
    length = torch.tensor([len(piece) for piece in pieces]).to(position.device)[:, None]  # (B, 1)
    columns = torch.arange(longest, device=position.device)
    # what fills a row up is written behind its piece, where the next tokens will be written again; or into
    # the last slot, which no piece needs: a row that came so far is over, and its last token is not read
    at = (position[:, None] + columns).clamp(max=caches[0].capacity - 1)  # (B, longest)
    first = first.int()[:, None]  # (B, 1)
    logits = None
    for part in columns.split(chunk):
        end = length - 1 - part[0]  # (B, 1), where the piece's last token is in this part
        chosen = None if note is None else []
        found, _ = model(
            tokens[:, part], first=first.expand(-1, len(part)), caches=caches, position=at[:, part],
            logits_of=end[:, 0].clamp(0, len(part) - 1), selections=chosen)
        here = (end >= 0) & (end < len(part))  # (B, 1)
        logits = found if logits is None else torch.where(here[..., None], found, logits)
        if note is not None:
            note(chosen, torch.where(part < length, at[:, part], -1))
    return logits


def share_prompt(model, idx, first, caches, chunk, ranks):
    """Let a prompt idx (B,T) enter the caches, those of every rank, `chunk` tokens of each at once -> how
    many have: all but a few at the end, at least one, which every rank computes for itself. first (B,T) or
    None."""
    cut = 2 * ranks.context
    shared = (idx.shape[1] - 1) // cut * cut
    step = max(1, chunk // 2) * cut
    for begin in range(0, shared, step):
        end = min(begin + step, shared)
        split = ranks.split(end - begin, begin)
        bounds = None if first is None else split.part(first)
        position = torch.arange(begin, end, device=idx.device)
        model(
            split.part(idx), first=bounds, caches=caches, position=position, logits_of=None, split=split)
    return shared


@torch.inference_mode()
def stream(model, idx, n, temperature=1.0, top_k=None, top_p=None, generator=None, chunk=None,
           fp8_cache=False, end_ids=(), go_on=False, compiled=False, ranks=None, steer=None, trace=None,
           decoder=None, copies=1):
    """Yield up to n times the next token (B,) int64 after the prompts idx (B,T), sampled as by `sample`.

    end_ids: the ids that end a text. A row that has sampled one yields -1 from then on, and the stream stops
    with the last row; with go_on it starts another text instead. Either way no token sees what stands before
    an end of text, as in training; so of prompts of different lengths the shorter ones begin with ends of
    text, as many as are missing. The prompt enters the caches `chunk` tokens at a time, see
    `default_chunk`. fp8_cache: latents in the published FP8 layout. compiled: the steps by torch.compile.
    ranks: parallel.Ranks that share the prompt, called on all of them, all yield the same. Sets
    model.cache_bytes_per_token. ValueError: see `check`.

    For reinforcement learning: steer, see `Steered`, decides which rows go on, and what follows where a
    tool replies; end_ids then begin a document, and end no row. A row with a reply waits until few others
    write; then all replies enter the caches at once, as a prompt does, and so rows differ in length. Yielded
    is what was sampled, -1 in a row that waits or is over. trace: a Trace to fill; its selections also cover
    prompts up to k tokens. It takes a temperature above 0 and a prompt that no ranks share. decoder: one of
    `make_decoder` for these rows and T + n tokens, traced with a trace, whose caches and CUDA graph serve
    call after call. copies: rows that continue each prompt, one behind the other; idx is then (B / copies,T),
    each prompt read once."""
    T = idx.shape[1]
    B = len(idx) * copies
    config = model.config
    device = idx.device
    check(T, n, temperature, top_k, top_p, chunk, config)
    if trace is not None and temperature < GREEDY:
        raise ValueError(f"temperature={temperature}: a trace holds log-probabilities, which the most likely "
                         "token taken always has none of; sample above 0")
    if trace is not None and ranks is not None and ranks.context > 1:
        raise ValueError(f"{ranks.context} ranks share the prompt: a trace would hold the selections of a "
                         "part of it; leave ranks or trace out")
    end_ids = list(end_ids)
    if decoder is None:
        decoder = make_decoder(model, B, T + n, device, fp8_cache, compiled, traced=trace is not None)
    caches = decoder.caches
    prompt_caches = [cache.part(slice(len(idx))) for cache in caches]
    model.cache_bytes_per_token = sum(cache.bytes_per_token for cache in caches)

    first = document_starts(idx.cpu(), end_ids)  # (B / copies, T)
    packed = bool(first.any())  # one document needs no bounds
    first = first.to(device)
    prompt_chunk = chunk or default_chunk(config, len(idx), device)
    begin = 0
    if ranks is not None and ranks.context > 1:
        begin = share_prompt(model, idx, first if packed else None, prompt_caches, prompt_chunk, ranks)
    for position in torch.arange(begin, T, device=device).split(prompt_chunk):
        bounds = first[:, position] if packed else None
        chosen = [] if decoder.traced else None
        logits, _ = model(
            idx[:, position], first=bounds, caches=prompt_caches, position=position, logits_of="last",
            selections=chosen)
        if decoder.traced:
            trace.selections.append([x.repeat_interleave(copies, 0) for x in chosen])
            trace.queries.append(position.expand(B, -1))
    if copies > 1:
        for cache in caches:
            cache.repeat(copies)
        logits, first, idx = (x.repeat_interleave(copies, 0) for x in (logits, first, idx))

    if n == 0:
        return
    rows = Rows(B, device)
    ends = torch.tensor(end_ids, dtype=torch.long, device=device)
    start = first[:, -1].long()  # (B,) where the document of the last token begins
    is_end = torch.isin(idx[:, -1], ends)  # (B,), and from here on all (n,), of the rows that are computed
    free = torch.ones(B, dtype=torch.bool, device=device)  # what is sampled for other rows means nothing
    at = torch.full((B,), T, device=device)  # the position of the row's next token
    steered = None if steer is None else Steered(steer, B, n)
    steps = 0
    while True:
        if not logits[:, -1].isfinite().all():
            raise ValueError("the model's next token is not a number: its weights are damaged, or overflow "
                             "in this dtype")
        start = torch.where(is_end, at, start)
        token = sample(logits[:, -1], temperature, top_k, top_p, generator)  # (n,)
        if ranks is not None:
            token = ranks.same(token)
        if trace is not None:
            column = torch.where(free, at, -1)
            trace.add_token(rows, logits[:, -1], token, column, temperature, top_k, top_p)
        is_end = torch.isin(token, ends) & free
        told = rows.everywhere(torch.where(free, token, -1), -1)  # (B,)
        steps += 1

        # which rows write on
        if steered is not None:
            steered.hear(told.tolist())
            free = torch.tensor(steered.writes).to(device, non_blocking=True)[rows.at]
            finished = all(steered.over)
        else:
            if end_ids and not go_on:
                free = free & ~is_end
            finished = steps == n or (end_ids and not go_on and not free.any())
        yield told
        if finished:
            return
        if decoder.rows_leave:
            over = ~free if steered is None else torch.tensor(steered.over)[rows.at]
            staying = rows.halve(over)
            if staying is not None:
                decoder = decoder.part(staying)
                token, start, is_end, free, at = (x[staying] for x in (token, start, is_end, free, at))

        # the next logits: behind one more token of each row, or behind what rows waited for
        due = None if steered is None else steered.due()
        if due is None:
            logits = decoder.step(token, at, start)
            if decoder.traced:
                trace.add_selections(rows, decoder.selections, torch.where(free, at, -1)[:, None])
            at = at + free
        else:
            due = [due[row] for row in rows.at.tolist()]
            note = functools.partial(trace.add_selections, rows) if decoder.traced else None
            due_chunk = chunk or default_chunk(config, len(due), device)
            logits = read_pieces(model, due, at, start, decoder.caches, due_chunk, note)
            lengths = torch.tensor([len(piece) for piece in due]).to(device)
            at = at + lengths
            free = lengths > 0


def one_of_each_kind(model):
    """Leave of the layers that launch the same kernels the first alone."""
    config = model.config
    kinds = {}
    for layer in range(config.num_hidden_layers):
        kinds.setdefault((config.has_indexer(layer), config.block_of(layer)), layer)
    kept = sorted(kinds.values())
    types = config.indexer_types
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in kept)
    model.config = replace(
        config, num_hidden_layers=len(kept), indexer_types=types and [types[layer] for layer in kept],
        index_exact_layers=sum(config.block_of(layer) == 0 for layer in kept))


def compile_ahead(model, idx, n, device, end_ids=(), fp8_cache=False, chunk=None):
    """Before the weights of `model`, which are on the meta device, are read: let threads compile what
    `stream` will launch for the prompts idx (B,T), their first chunk, and for the step behind them, if n
    leaves one -> a list of futures for each, for `paced`. In a process that has launched no kernel. Without
    Triton kernels nothing: []."""
    if device.type != "cuda" or model.backend_on(device) != "triton":
        return []
    from triton_kernels import ahead
    B, T = idx.shape
    few_layers = deepcopy(model)
    one_of_each_kind(few_layers)
    weights = {}  # without numbers; not `to_empty`, which imports sympy, for seconds
    for name, x in few_layers.state_dict().items():
        weights[name] = torch.empty(x.shape, dtype=x.dtype, device=device)
    few_layers.load_state_dict(weights, assign=True)
    few_layers.rope_frequencies = torch.zeros(model.rope_frequencies.shape, device=device)
    few_layers.eval()
    decoder = make_decoder(few_layers, B, T + n, device, fp8_cache)
    position = torch.arange(min(T, chunk or default_chunk(model.config, B, device)), device=device)
    first = document_starts(idx.cpu(), list(end_ids))  # (B, T)
    bounds = first[:, :len(position)].to(device) if first.any() else None
    decoder.position.fill_(T)
    decoder.last.fill_(T)

    def read_prompt():
        few_layers(
            idx[:, :len(position)].to(device), first=bounds, caches=decoder.caches, position=position,
            logits_of="last")

    with torch.inference_mode():
        return ahead.compile_ahead([read_prompt, decoder.forward][:n], device)


def paced(rows, compiling):
    """What `stream` yields, which waits for the kernels that `compile_ahead` has compiled: for those of the
    prompt before the first token, for those of a step before the second."""
    for futures in compiling:
        wait(futures)
        yield from islice(rows, 1)
    yield from rows


def complete(model, idx, n, end_ids=(), copies=1, **options):
    """idx (B / copies,T) -> (B,T + up to n) int64: the prompts and what `stream` yields; rows that ended
    early are filled up with end_ids[0]."""
    tokens = stream(model, idx, n, end_ids=end_ids, copies=copies, **options)
    columns = [token[:, None] for token in tokens]
    out = torch.cat([idx.repeat_interleave(copies, 0), *columns], 1)
    return out.masked_fill(out == -1, end_ids[0]) if end_ids else out
