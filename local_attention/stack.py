"""The blocks of a language model, between embedding tables and logits: checks of a call, positions and labels."""
import copy
import inspect

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from . import checks, padding, parallel
from .backends import portable
from .backends.any_length import unknown
from .backends.spans import document_bounds
from .cache import capacity, form
from .cells import Float32
from .hyper_connections import HyperConnections, add_output, expand, reduce
from .layers import FeedForward
from .mha import LocalMHA, check_cacheable, checked_block


def _seen(size, max_seq_len, causal, by_distance):
    """Return LocalMHA's arguments for a layer's window. A layer without one sees everything: by a single window as long
    as a sequence, or, with a bias of distances, by a span that moves and reaches as far, so that the bias is a single
    row."""
    if size is not None:
        return dict(window_size=size)
    if by_distance:
        return dict(window_size=max_seq_len, look_backward=1, look_forward=0 if causal else 1, exact_windowsize=True)
    return dict(window_size=max_seq_len, look_backward=0, look_forward=0, exact_windowsize=False)


def _takes(layer):
    """Return whether a global layer takes a mask, takes documents, keeps a cache; all True if there is none."""
    if layer is None:
        return True, True, True
    taken = inspect.signature(layer.construct).parameters
    takes_cache = "cache" in taken and "return_cache" in taken and getattr(layer, "causal", True)
    return "mask" in taken, "segment_ids" in taken, takes_cache


@constexpr
def _checked_shape(owner, out, shape):
    """Check that a global layer returned a tensor, as `checks.described`, of `shape`; return that shape. The caller
    uses the shape, because in a graph an unused check may run too late."""
    is_tensor = isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], tuple)
    if not is_tensor or out[0] != shape:
        raise checks.value_error(owner, "global_attn_layer", "a Cell that returns a Tensor of its input's shape "
                                 f"{shape}", out[0] if is_tensor else type(out).__name__)
    return shape


def _form(cache):
    """Return a cache's number of layers, its biases as `form`, and its number of tokens; None for anything else."""
    if isinstance(cache, tuple) and len(cache) == 3 and isinstance(cache[0], tuple):
        return len(cache[0]), form(cache[1]), cache[2]
    return None


@constexpr
def _check_cached_call(owner, n, cache, kind, depth, return_loss):
    rule = "what a call of this model with 'return_cache' returned, or None"
    if cache is None:
        raise TypeError(f"For '{owner}', 'cache' must be {rule}, but got one of type {kind}.")
    layers, biases, seen = cache
    if isinstance(seen, bool) or not isinstance(seen, int) or not isinstance(biases, tuple):
        raise checks.type_error(owner, "cache", rule, (biases, seen))
    if return_loss:
        raise checks.value_error(owner, "return_loss", "False with a cache", return_loss)
    if layers != depth:
        raise checks.value_error(owner, "cache", f"of {depth} layers, from a call of this model", layers)
    if n <= seen:
        raise checks.value_error(owner, "x", f"the whole sequence, longer than the {seen} tokens that the cache has "
                                 "seen", n)


@constexpr
def _checked_call(owner, num_tokens, max_seq_len, dim, x, mask, return_loss, return_cache, group):
    """Check a call; return the batch, and the length of what goes through the layers."""
    checks.boolean(owner, "return_loss", return_loss)
    checks.boolean(owner, "return_cache", return_cache)
    if num_tokens is None:
        if return_loss:
            raise checks.value_error(owner, "return_loss", "False where 'num_tokens' is None", return_loss)
        return checked_block(owner, dim, x, mask, return_cache)
    b, n = checks.tokens(owner, "x", x, mask)
    if group is not None:
        if n is None:
            raise checks.value_error(owner, "x", "of a known length with 'sequence_parallel'", n)
        longest = (max_seq_len + return_loss) // group.size
        if n > longest:
            raise checks.value_error(owner, "x", f"of at most {longest} tokens on each of the {group.size} ranks "
                                     f"('max_seq_len' is {max_seq_len})", n)
        return b, n
    if n is None:
        return b, n
    if return_loss and n < 2:
        raise checks.value_error(owner, "x", "of at least 2 tokens for a loss", n)
    if n - return_loss > max_seq_len:
        raise checks.value_error(owner, "x", f"of at most {max_seq_len + return_loss} tokens ('max_seq_len' is "
                                 f"{max_seq_len})", n)
    return b, n - return_loss


@constexpr
def _positions(b, start, stop, max_seq_len):
    """Return positions. With a loss there may be one too many, for a token that predicts nothing, so it is clipped."""
    return Tensor(np.tile(np.minimum(np.arange(start, stop, dtype=np.int32), max_seq_len - 1), (b, 1)))


@constexpr
def _checked_documents(owner, segment_ids, shape, global_takes_segments, sliced, exact, biased):
    """Check the documents of a call of a model."""
    checks.segment_ids(owner, segment_ids, *shape)
    for name, given in (("sequence_parallel' without 'exact_windowsize", not exact),
                        ("use_dynamic_pos_bias' with 'sequence_parallel", biased)):
        checks.together(owner, ("segment_ids", True), (name, sliced and given))
    if not global_takes_segments:
        raise checks.value_error(owner, "segment_ids", "None where the 'construct' of 'global_attn_layer' does not "
                                 "take it", "documents")


def _within(before, after, labels, ignore_index):
    """Return labels that are ignored where they are padding, or of another document than the token before them."""
    outside = ops.logical_or(after != before, after < 0)
    labels, outside = ops.cast(labels, ms.int32), ops.cast(outside, ms.int32)
    return ops.add(labels, ops.mul(outside, ops.sub(ignore_index, labels)))  # GPU has no masked fill of int32


def _given_back(x, out, beta):
    """Add the output of a part of a layer to the residual stream, or to the streams of hyper-connections."""
    return x + out if beta is None else add_output(x, out, beta)


class CrossEntropy(Float32):
    """Computes the mean of -log softmax over all ranks' labels that are not `ignore_index`; 0 if there are none."""

    def __init__(self, ignore_index, group=None):
        super().__init__()
        self.total = ops.NLLLoss(reduction="sum", ignore_index=ignore_index)
        self.mean = None if group is None else parallel.MeanOfRanks(group)

    def construct(self, logits, labels):
        weights = ops.ones((logits.shape[1],), ms.float32)
        total, count = self.total(ops.log_softmax(ops.cast(logits, ms.float32), -1), labels, weights)
        if self.mean is None:
            return total / ops.maximum(count, 1.)
        mean_count = self.mean(ops.stop_gradient(count))
        return self.mean(ops.depend(total, mean_count) / ops.maximum(mean_count, 1. / self.mean.size))


class Stack(nn.Cell):
    """The part of LocalTransformer that MindSpore's O1 does not rewrite (see `cells`)."""

    def _add_layers(self, attention, feed_forward, global_attn_layer, global_numbers, by_distance):
        """Make the blocks. `attention` and `feed_forward` are the arguments of each block, without its window;
        `by_distance` says whether there is a bias of distances."""
        self.layers = nn.CellList([nn.CellList([
            LocalMHA(**{**attention, **_seen(size, self.max_seq_len, attention["causal"], by_distance)}),
            FeedForward(**feed_forward)]) for size in self.window_sizes])
        # the different sizes of the layers' biases, and for each layer which of these is its own
        distances = [attn.attn_fn.windows.distances for attn, _ in self.layers] if by_distance else []
        self.bias_distances = tuple(dict.fromkeys(distances))
        self.bias_places = tuple(map(self.bias_distances.index, distances))
        first = self.layers[0][0].attn_fn
        self.causal, self.windows, self.group = first.causal, first.windows, first.group
        self.most_kept = max(capacity(attn.attn_fn.windows) for attn, _ in self.layers)
        for attn, _ in self.layers:
            attn.attn_fn.must_agree, attn.attn_fn.sees_all = False, attn.window_size >= self.max_seq_len
        # whether tokens may move by any number of places, all alike, without a change of what they see
        self.moves_freely = global_attn_layer is None and self.windows.prefix == 0 and all(
            attn.attn_fn.windows.exact or attn.attn_fn.sees_all for attn, _ in self.layers)
        # whether a call with a mask, and without documents, moves tokens
        self.moves_tokens = not self.moves_freely and (self.group is None or self.group.size == 1)
        # for each layer, where its global layer's cache is among all caches, after those of local blocks; 0 without one
        self.global_places = tuple(self.depth + global_numbers.index(number) if number in global_numbers else 0
                                   for number in range(self.depth))
        self.global_layers = nn.CellList([copy.deepcopy(global_attn_layer) if place else nn.Identity()
                                          for place in self.global_places if global_numbers])
        self.cached_cells = self.depth + len(global_numbers)
        self.global_takes_mask, self.global_takes_segments, self.global_takes_cache = _takes(global_attn_layer)
        self.global_cache_is_ours = global_attn_layer is None or isinstance(global_attn_layer, LocalMHA)
        self.hyper_connections = None
        if self.num_residual_streams > 1:
            self.hyper_connections = HyperConnections(self.num_residual_streams, self.dim, self.depth, global_numbers)

    def __repr__(self):
        return f"{super().__repr__()}\n{sum(weights.size for weights in self.get_parameters()):,} weights"

    def recompute(self, **options):
        """Recompute every block on its own (gradient checkpointing). If a whole model that returns its loss is
        recomputed, MindSpore makes a gradient with a cycle in it."""
        for number in range(self.depth):
            attn, ff = self.layers[number]
            attn.recompute(**options)
            ff.recompute(**options)
            if self.global_places[number] > 0:
                self.global_layers[number].recompute(**options)

    def _checked(self, x, mask, cache, return_loss, return_cache, segment_ids):
        """Check a call as LocalMHA does; return x, its batch, and the length of what goes through the layers."""
        b, n = _checked_call(self.cls_name, self.num_tokens, self.max_seq_len, self.dim, checks.described(x),
                             checks.described(mask), return_loss, return_cache, self.group)
        if cache is not None or return_cache:
            check_cacheable(self.cls_name, self.causal, mask is not None, n, self.group is not None,
                            segment_ids is not None, self.most_kept, self.global_takes_cache)
        if segment_ids is not None:
            _checked_documents(self.cls_name, checks.described(segment_ids), x.shape[:2], self.global_takes_segments,
                               self.group is not None, self.windows.exact, self.dynamic_pos_bias is not None)
        if cache is not None:
            _check_cached_call(self.cls_name, n, _form(cache), type(cache).__name__, self.cached_cells, return_loss)
        if self.group is not None:
            x = parallel.agreed(
                self.group, self.cls_name, x, n,
                (checks.described(x), checks.described(mask), checks.described(segment_ids), return_loss),
                ("mask", "segment_ids", "return_loss"))
        return x, b, n

    def _with_labels(self, x, mask, segment_ids, b, n):
        """Return what goes through the layers if a loss is requested, and the labels."""
        if self.group is None:
            labels = x[:, 1:]
            mask = None if mask is None else ops.cast(ops.cast(mask, ms.int32)[:, :-1], ms.bool_)  # sliced as integers
            if segment_ids is not None:
                labels = _within(segment_ids[:, :-1], segment_ids[:, 1:], labels, self.ignore_index)
                segment_ids = segment_ids[:, :-1]
            return x[:, :-1], mask, segment_ids, labels
        # slices keep one length: the last token of all has no label, and no other may see it
        labels = parallel.next_tokens(self.group, x, self.ignore_index)
        if segment_ids is not None:
            after = parallel.next_tokens(self.group, ops.depend(segment_ids, labels), -1)
            labels = _within(segment_ids, after, labels, self.ignore_index)
            segment_ids = ops.depend(segment_ids, labels)
        if not self.causal:
            mask = parallel.without_last(self.group, mask, b, n)
        return ops.depend(x, labels), mask, segment_ids, labels

    def _without_shift(self, x, mask, segment_ids, labels):
        """Undo what padding on the left shifts: positions, and windows that do not move with their query. Return the
        inputs; the place of each row's first real token, where only positions have to know; and the order that brings
        tokens back to their places, where they had to be moved."""
        if segment_ids is not None:
            mask, segment_ids = padding.without_leading(self.group, ops.depend(mask, x), segment_ids)
            return ops.depend(x, segment_ids), mask, segment_ids, labels, None, None
        if not self.moves_tokens:
            if self.num_tokens is None and self.moves_freely:
                return x, mask, None, labels, None, None
            first = padding.first_real(self.group, ops.depend(mask, x))
            if not self.moves_freely:  # tokens would have to move to other ranks
                first = padding.none_leading(self.cls_name, self.group.size * mask.shape[1])(first)
            return ops.depend(x, first), mask, None, labels, first if self.moves_freely else None, None
        order, back = padding.orders(mask)
        labels = None if labels is None else padding.moved(labels, order)
        return padding.moved(x, order), padding.moved(mask, order), None, labels, None, back

    def _moved_back(self, x, back):
        return padding.moved(x, back)

    def _embedded(self, x, segment_ids, first, b, seen, n):
        """Return the embeddings of tokens, the first of which comes after `seen` others. Positions count from the
        places `first (b, 1)`."""
        if segment_ids is not None and self.group is not None:
            places = parallel.places(self.group, segment_ids)
            return self.token_emb(ops.depend(x, places)) + self.pos_emb(places)
        start = seen if self.group is None else self.group.rank * n
        if unknown((b, n)):  # it must not exceed max_seq_len, which a compiled graph does not check
            places = ops.arange(0, x.shape[1], 1)[None]
        else:
            places = _positions(b, start, start + n - seen, self.max_seq_len)
        if segment_ids is not None:
            places = places - document_bounds(segment_ids)[..., 0]
        if first is not None:
            places = portable.maximum(places - first, 0)
        return self.token_emb(x) + self.pos_emb(places)

    def _biases(self):
        """Return the biases of the different windows."""
        biases = ()
        for queries, keys, after in self.bias_distances:
            biases += (self.dynamic_pos_bias(queries, keys, after),)
        return biases

    def _through_layers(self, x, mask, biases, layers, return_cache, segment_ids=None):
        """Run every block in turn, with its cache if `layers` are given. Return the output and the next caches: those
        of the local blocks, then those of the global layers."""
        caches, global_caches = [], []
        if self.hyper_connections is not None:
            x = expand(x, self.num_residual_streams)
        for number in range(len(self.layers)):
            attn, ff = self.layers[number]
            place = self.global_places[number]
            if place > 0:
                taken, x, beta = self._taken(x, number, 2)
                out = self._global(self.global_layers[number], taken, mask, None if layers is None else layers[place],
                                   return_cache, segment_ids)
                if return_cache:
                    out, cache = out
                    global_caches.append(cache)
                shape = _checked_shape(self.cls_name, checks.described(out), taken.shape)
                x = _given_back(x, out if unknown(shape) else out.reshape(shape), beta)
            taken, x, beta = self._taken(x, number, 0)
            attn_bias = biases[self.bias_places[number]] if self.bias_places else None
            out = attn(taken, mask=mask, attn_bias=attn_bias, cache=None if layers is None else layers[number],
                       return_cache=return_cache, segment_ids=segment_ids)
            if return_cache:
                out, cache = out
                caches.append(cache)
            x = _given_back(x, out, beta)
            taken, x, beta = self._taken(x, number, 1)
            x = _given_back(x, ff(taken), beta)
        if self.hyper_connections is not None:
            x = reduce(x)
        return x, tuple(caches + global_caches)

    def _taken(self, x, number, part):
        """Return the input of part 0 (local), 1 (feed-forward) or 2 (global), and what to add its output to."""
        if self.hyper_connections is None:
            return x, x, None
        if part == 2:
            return self.hyper_connections.global_layers[number](x)
        return self.hyper_connections.layers[number][part](x)

    def _global(self, layer, x, mask, cache, return_cache, segment_ids):
        if segment_ids is not None:
            return (layer(x, mask=mask, segment_ids=segment_ids) if self.global_takes_mask else
                    layer(x, segment_ids=segment_ids))
        if cache is not None or return_cache:
            return layer(x, cache=cache, return_cache=return_cache)
        return layer(x, mask=mask) if self.global_takes_mask else layer(x)

    def _loss(self, logits, labels):
        return self.cross_entropy(logits.reshape(-1, self.num_tokens), ops.cast(labels, ms.int32).reshape(-1))
