"""Attention in float64 NumPy, from `span(i)` alone: one query after another, without masks or blocks."""
import numpy as np


def attention(q, k, v, spec, scale, dout=None, **options):
    """Return the output `(g, n_q, d)` and, if its gradient is given, those of q, k, v, bias and rel_pos_emb."""
    got = everything(q, k, v, spec, scale, dout=dout, **options)
    return got["out"] if dout is None else tuple(got[name] for name in ("out", "q", "k", "v", "bias", "rel_pos_emb"))


def everything(q, k, v, spec, scale, key_mask=None, bias=None, rel_pos_emb=None, hide_self=False, offset=0,
               sinks=None, softcap=None, dout=None, dlse=None, order=None, rel_pos_query=None):
    """Return the output `(g, n_q, d_v)`, the `lse (g, n_q)` and, for given gradients of both, those of the inputs.

    A bias of four axes and sinks of three have a row for each query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups, n_q, _ = q.shape
    share, n_k = groups // len(k), k.shape[1]
    out, lse = np.zeros(q.shape[:2] + v.shape[2:]), np.full((groups, n_q), -np.inf)
    named = dict(q=q, k=k, v=v, bias=bias, rel_pos_emb=rel_pos_emb, sinks=sinks, rel_pos_query=rel_pos_query)
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
                    and (key_mask is None or key_mask[g * len(key_mask) // groups, j])
                    and (order is None or order[g * len(order) // groups, j] <= order[g * len(order) // groups, i])]
            if bias is not None:
                place = _bias_row(bias, spec, g, groups, row, i)
                of_bias = bias[place]
                columns = np.array(seen, int) - (i // _period(bias, spec) * _period(bias, spec) - spec.backward)
                there = of_bias[columns] > -1e29
                seen, columns = np.array(seen, int)[there], columns[there]
            products = scale * (k[of_key, seen] @ q[g, row])
            slope = 1.
            if softcap is not None:
                slope = 1 - np.tanh(products / softcap) ** 2
                products = softcap * np.tanh(products / softcap)
            scores = products
            if bias is not None:
                scores = scores + of_bias[columns]
            if rel_pos_emb is not None:
                offsets = np.array(seen, int) - (i - spec.backward)
                asks = "q" if rel_pos_query is None else "rel_pos_query"
                scores = scores + rel_pos_emb[offsets] @ named[asks][g, row]
            free = np.array([not (hide_self and j == i) for j in seen], bool)
            scores = np.where(free, scores, -5e4)
            at = None if sinks is None else _sink_place(sinks, g, row)
            of_sink = [] if sinks is None or sinks[at] == -np.inf else [sinks[at]]
            if not len(seen) and not of_sink:
                continue
            top = max([*scores, *of_sink])
            lse[g, row] = top + np.log(np.exp(np.array([*scores, *of_sink]) - top).sum())
            weights = np.exp(scores - lse[g, row])
            out[g, row] = weights @ v[of_key, seen]
            dweights = v[of_key, seen] @ dout[g, row]
            dlog = dlse[g, row] - weights @ dweights
            if of_sink:
                grads["sinks"][at] += np.exp(of_sink[0] - lse[g, row]) * dlog
            dscores = np.where(free, weights * (dweights + dlog), 0)
            dproducts = dscores * slope
            grads["q"][g, row] += scale * dproducts @ k[of_key, seen]
            grads["k"][of_key, seen] += scale * dproducts[:, None] * q[g, row]
            grads["v"][of_key, seen] += weights[:, None] * dout[g, row]
            if bias is not None:
                np.add.at(grads["bias"][place], columns, dscores)
            if rel_pos_emb is not None:
                grads[asks][g, row] += dscores @ rel_pos_emb[offsets]
                grads["rel_pos_emb"][offsets] += dscores[:, None] * named[asks][g, row]
    return dict(out=out, lse=lse, **grads)


def _period(bias, spec):
    return bias.shape[1] if bias.ndim == 3 else spec.bucket


def _bias_row(bias, spec, g, groups, row, i):
    """Return the index of the row of a bias for a query."""
    if bias.ndim == 3:
        return g % len(bias), i % bias.shape[1]
    return g // (groups // len(bias)), g % bias.shape[1], row


def _sink_place(sinks, g, row):
    return (g % len(sinks),) if np.ndim(sinks) == 1 else (g // sinks.shape[1], g % sinks.shape[1], row)


def in_documents(q, k, v, spec, scale, segment_ids, key_mask=None, dout=None, dlse=None, **options):
    """Do the same for rows `(batch * heads, ...)` of documents: each document on its own, without padding."""
    groups, n_q, _ = q.shape
    batch, n_k = segment_ids.shape
    inputs = "bias", "rel_pos_emb", "sinks", "rel_pos_query"
    named = dict(q=q, k=k, v=v, **{name: options.get(name) for name in inputs})
    total = {name: None if x is None else np.zeros(np.shape(x)) for name, x in named.items()}
    total.update(out=np.zeros(q.shape[:2] + v.shape[2:]), lse=np.full((groups, n_q), -np.inf))
    sinks, heads = options.get("sinks"), groups // batch
    if sinks is not None:  # padding sees its sink, though no key
        padding = np.repeat(segment_ids[:, n_k - n_q:] < 0, heads, 0)
        each = np.resize(sinks, groups)[:, None] if np.ndim(sinks) == 1 else np.reshape(sinks, (groups, n_q))
        total["lse"][:] = each
        if dlse is not None and np.ndim(sinks) == 1:
            np.add.at(total["sinks"], np.arange(groups) % len(sinks), (dlse * padding).sum(1))
        elif dlse is not None:
            total["sinks"] += (dlse * padding).reshape(sinks.shape)
    for b in range(batch):
        edges = [0, *(np.flatnonzero(np.diff(segment_ids[b])) + 1), n_k]
        for start, end in zip(edges[:-1], edges[1:]):
            first = max(start, n_k - n_q)  # the tokens of the document from here on have a query
            if segment_ids[b, start] < 0 or first >= end:
                continue
            rows = slice(first - (n_k - n_q), end - (n_k - n_q))
            of_q = slice(b * heads, (b + 1) * heads), rows
            of_k = slice(b * len(k) // batch, (b + 1) * len(k) // batch), slice(start, end)
            of_b = slice(b, b + 1)
            place = dict(q=of_q, k=of_k, v=of_k, rel_pos_query=of_q, out=of_q, lse=of_q)
            part = dict(options)
            if part.get("bias") is not None and part["bias"].ndim == 4:
                place["bias"] = (of_b if len(part["bias"]) > 1 else slice(None), slice(None), rows)
                part["bias"] = part["bias"][place["bias"]]
            if sinks is not None and np.ndim(sinks) == 3:
                place["sinks"] = (of_b, slice(None), rows)
                part["sinks"] = sinks[place["sinks"]]
            if part.get("order") is not None:
                order = part["order"]
                part["order"] = (order[of_b] if len(order) > 1 else order)[:, start:end]
            if part.get("rel_pos_query") is not None:
                part["rel_pos_query"] = part["rel_pos_query"][of_q]
            got = everything(q[of_q], k[of_k], v[of_k], spec, scale, offset=first - start,
                             key_mask=None if key_mask is None else key_mask[of_b, start:end],
                             dout=None if dout is None else dout[of_q], dlse=None if dlse is None else dlse[of_q],
                             **part)
            for name, x in got.items():
                if name in ("out", "lse"):
                    total[name][of_q] = x
                elif x is not None:
                    total[name][place.get(name, ...)] += x
    return total
