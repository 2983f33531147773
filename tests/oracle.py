"""Attention in float64 NumPy, from `span(i)` alone: one query after another, without masks or blocks."""
import numpy as np


def attention(q, k, v, spec, scale, dout=None, **options):
    """Return the output `(g, n_q, d)` and, if its gradient is given, those of q, k, v, bias and rel_pos_emb."""
    got = everything(q, k, v, spec, scale, dout=dout, **options)
    return got["out"] if dout is None else tuple(got[name] for name in ("out", "q", "k", "v", "bias", "rel_pos_emb"))


def everything(q, k, v, spec, scale, key_mask=None, bias=None, rel_pos_emb=None, hide_self=False, offset=0,
               sinks=None, softcap=None, dout=None, dlse=None):
    """Return the output `(g, n_q, d)`, the `lse (g, n_q)` and, for given gradients of both, those of the inputs."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups, n_q, _ = q.shape
    share, n_k = groups // len(k), k.shape[1]
    out, lse = np.zeros(q.shape[:2] + v.shape[2:]), np.full((groups, n_q), -np.inf)
    named = dict(q=q, k=k, v=v, bias=bias, rel_pos_emb=rel_pos_emb, sinks=sinks)
    grads = {name: None if x is None else np.zeros(np.shape(x)) for name, x in named.items()}
    dout = np.zeros(out.shape) if dout is None else dout
    dlse = np.zeros(lse.shape) if dlse is None else dlse
    for g in range(groups):
        of_key = g // share
        for row in range(n_q):
            i = row + offset
            first, last = spec.span(i)
            seen = [j for j in range(n_k)
                    if (first <= j <= last or j < spec.prefix and (j <= i or not spec.causal))
                    and (key_mask is None or key_mask[g * len(key_mask) // groups, j])]
            products = scale * (k[of_key, seen] @ q[g, row])
            slope = 1.
            if softcap is not None:
                slope = 1 - np.tanh(products / softcap) ** 2
                products = softcap * np.tanh(products / softcap)
            scores = products
            if bias is not None:
                head, period = g % len(bias), bias.shape[1]
                columns = np.array(seen, int) - (i // period * period - spec.backward)
                scores = scores + bias[head, i % period, columns]
            if rel_pos_emb is not None:
                offsets = np.array(seen, int) - (i - spec.backward)
                scores = scores + rel_pos_emb[offsets] @ q[g, row]
            free = np.array([not (hide_self and j == i) for j in seen], bool)
            scores = np.where(free, scores, -5e4)
            of_sink = [] if sinks is None else [sinks[g % len(sinks)]]
            if not seen and not of_sink:
                continue
            top = max([*scores, *of_sink])
            lse[g, row] = top + np.log(np.exp(np.array([*scores, *of_sink]) - top).sum())
            weights = np.exp(scores - lse[g, row])
            out[g, row] = weights @ v[of_key, seen]
            dweights = v[of_key, seen] @ dout[g, row]
            dlog = dlse[g, row] - weights @ dweights
            if of_sink:
                grads["sinks"][g % len(sinks)] += np.exp(of_sink[0] - lse[g, row]) * dlog
            dscores = np.where(free, weights * (dweights + dlog), 0)
            dproducts = dscores * slope
            grads["q"][g, row] += scale * dproducts @ k[of_key, seen]
            grads["k"][of_key, seen] += scale * dproducts[:, None] * q[g, row]
            grads["v"][of_key, seen] += weights[:, None] * dout[g, row]
            if bias is not None:
                np.add.at(grads["bias"], (head, i % period, columns), dscores)
            if rel_pos_emb is not None:
                grads["q"][g, row] += dscores @ rel_pos_emb[offsets]
                grads["rel_pos_emb"][offsets] += dscores[:, None] * q[g, row]
    return dict(out=out, lse=lse, **grads)


def in_documents(q, k, v, spec, scale, segment_ids, key_mask=None, dout=None, dlse=None, **options):
    """Do the same for rows `(batch * heads, ...)` of documents: each document on its own, without padding."""
    groups, n_q, _ = q.shape
    batch, n_k = segment_ids.shape
    named = dict(q=q, k=k, v=v, **{name: options.get(name) for name in ("bias", "rel_pos_emb", "sinks")})
    total = {name: None if x is None else np.zeros(np.shape(x)) for name, x in named.items()}
    total.update(out=np.zeros(q.shape), lse=np.full((groups, n_q), -np.inf))
    if options.get("sinks") is not None:  # padding sees its sink, though no key
        total["lse"][:] = np.resize(options["sinks"], groups)[:, None]
        if dlse is not None:
            padding = np.repeat(segment_ids[:, n_k - n_q:] < 0, groups // batch, 0)
            np.add.at(total["sinks"], np.arange(groups) % len(options["sinks"]), (dlse * padding).sum(1))
    for b in range(batch):
        edges = [0, *(np.flatnonzero(np.diff(segment_ids[b])) + 1), n_k]
        for start, end in zip(edges[:-1], edges[1:]):
            first = max(start, n_k - n_q)  # the tokens of the document from here on have a query
            if segment_ids[b, start] < 0 or first >= end:
                continue
            of_q = slice(b * groups // batch, (b + 1) * groups // batch), slice(first - (n_k - n_q), end - (n_k - n_q))
            of_k = slice(b * len(k) // batch, (b + 1) * len(k) // batch), slice(start, end)
            got = everything(q[of_q], k[of_k], v[of_k], spec, scale, offset=first - start,
                             key_mask=None if key_mask is None else key_mask[b:b + 1, start:end],
                             dout=None if dout is None else dout[of_q], dlse=None if dlse is None else dlse[of_q],
                             **options)
            for name, x in got.items():
                if name in ("out", "lse"):
                    total[name][of_q] = x
                elif x is not None:
                    total[name][of_q if name == "q" else of_k if name in ("k", "v") else ...] += x
    return total
