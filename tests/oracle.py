"""Attention in float64 NumPy, from `span(i)` alone: one query after another, no mask and no block anywhere."""
import numpy as np


def attention(q, k, v, spec, scale, key_mask=None, bias=None, bias_backward=0, rel_pos_emb=None, hide_self=False,
              offset=0, dout=None):
    """Output `(g, n_q, d)` and, given the output's gradient, those of q, k, v, bias and rel_pos_emb."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups, n_q, _ = q.shape
    n_k = k.shape[1]
    out = np.zeros(q.shape[:2] + v.shape[2:])
    grads = [None if x is None else np.zeros(x.shape) for x in (q, k, v, bias, rel_pos_emb)]
    for g in range(groups):
        for row in range(n_q):
            i = row + offset
            first, last = spec.span(i)
            seen = [j for j in range(max(first, 0), min(last, n_k - 1) + 1)
                    if key_mask is None or key_mask[g * len(key_mask) // groups, j]]
            if not seen:
                continue
            scores = scale * (k[g, seen] @ q[g, row])
            if bias is not None:
                head, period = g % len(bias), bias.shape[1]
                columns = np.array(seen) - (i // period * period - bias_backward)
                scores = scores + bias[head, i % period, columns]
            if rel_pos_emb is not None:
                offsets = np.array(seen) - (i - spec.backward)
                scores = scores + rel_pos_emb[offsets] @ q[g, row]
            free = np.array([not (hide_self and j == i) for j in seen])
            scores = np.where(free, scores, -5e4)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[g, row] = weights @ v[g, seen]
            if dout is None:
                continue
            dweights = v[g, seen] @ dout[g, row]
            dscores = np.where(free, weights * (dweights - weights @ dweights), 0)
            grads[0][g, row] += scale * dscores @ k[g, seen]
            grads[1][g, seen] += scale * dscores[:, None] * q[g, row]
            grads[2][g, seen] += weights[:, None] * dout[g, row]
            if bias is not None:
                np.add.at(grads[3], (head, i % period, columns), dscores)
            if rel_pos_emb is not None:
                grads[0][g, row] += dscores @ rel_pos_emb[offsets]
                grads[4][offsets] += dscores[:, None] * q[g, row]
    return out if dout is None else (out, *grads)
