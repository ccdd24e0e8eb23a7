"""Generation: the prompt enters the caches in chunks, then one token at a time. On a GPU a decoding step is one CUDA graph."""
import torch

from sparse_attn import Cache


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B,vocab) -> (B,) int64 sampled tokens; temperature 0 takes the most likely one."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:], float("-inf"))
    if top_p is not None:  # a token stays while those before it hold less than top_p
        ranked, order = logits.sort(-1, descending=True)
        p = ranked.softmax(-1)
        logits = logits.masked_fill(torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= top_p), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def decoder(model, caches, B, device):
    """-> step(token (B,), t): logits (B,1,vocab) of the token at position t, which enters the caches.

    With the Triton kernels on a GPU the first call captures the step as a CUDA graph: lengths are read on the device, so that one graph serves
    every t and no time goes to launches. Routing to experts needs the host, so models with experts run step by step."""
    if device.type != "cuda" or model.backend_on(device) == "torch" or model.config.n_routed_experts:
        return lambda token, t: model(token[:, None], caches=caches, position=torch.tensor([t], device=device))[0]
    token_in, position = torch.zeros(B, 1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device)
    last, graph, out = torch.zeros(B, 1, dtype=torch.int32, device=device), torch.cuda.CUDAGraph(), []

    def step(token, t):
        token_in.copy_(token[:, None])
        position.fill_(t)
        last.fill_(t)
        if not out:
            side = torch.cuda.Stream()  # compiles the kernels, which a capture cannot; what it writes at t the replay writes again
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model(token_in, caches=caches, position=position, last=last)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                out.append(model(token_in, caches=caches, position=position, last=last)[0])
        graph.replay()
        return out[0]

    return step


@torch.inference_mode()
def stream(model, idx, n, temperature=1.0, top_k=None, top_p=None, generator=None, chunk=1024, fp8_cache=False):
    """Yield n times the next token (B,) int64 after the prompts idx (B,T), sampled at `temperature` (0: the most likely) from the top_k most likely
    and the smallest set of tokens with probability top_p. The prompt enters the caches `chunk` tokens at a time. fp8_cache: latents in the
    published FP8 layout. Sets model.cache_bytes_per_token. ValueError: longer than the model."""
    (B, T), config, device = idx.shape, model.config, idx.device
    if temperature < 0 or chunk < 1 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}, chunk={chunk}: at least 0, 1, above 0 up to 1, and at least 1")
    if T < 1 or T + n > config.max_position_embeddings:
        raise ValueError(f"prompt of {T} tokens + {n} new ones: must be between 1 and max_position_embeddings={config.max_position_embeddings}; shorten either")
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.lm_head.weight.dtype
    caches = [Cache(config, B, T + n, device, dtype, fp8_cache, model.index_fp8, config.has_indexer(layer))
              for layer in range(config.num_hidden_layers)]
    model.cache_bytes_per_token = sum(cache.bytes_per_token for cache in caches)
    for position in torch.arange(T, device=device).split(chunk):
        logits = model(idx[:, position], caches=caches, position=position)[0]
    step = decoder(model, caches, B, device)
    for t in range(T, T + n):
        token = sample(logits[:, -1], temperature, top_k, top_p, generator)
        yield token
        if t + 1 < T + n:
            logits = step(token, t)
