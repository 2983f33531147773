"""`attend` with keyword arguments, in both modes, for the tests of backends."""
from mindspore.ops import constexpr

from local_attention.attend import Frame, attend, beside
from local_attention.spec import Scoring


@constexpr
def _numbers(scale, hide_self, dropout, offset, origin, bias_is_constant, softcap, lse):
    return (Scoring(scale, softcap, hide_self, dropout),
            Frame(offset, origin, bias_is_constant=bias_is_constant, lse=lse))


def attend_to(q, k, v, spec, scale, key_mask=None, bias=None, rel_pos_emb=None, hide_self=False, dropout=0., seed=None,
              offset=0, origin=(0, 0), backend=None, bias_is_constant=False, sinks=None, documents=None, softcap=None,
              lse=False):
    scoring, frame = _numbers(scale, hide_self, dropout, offset, origin, bias_is_constant, softcap, lse)
    return attend(q, k, v, spec, scoring, beside(key_mask, documents, bias, sinks, rel_pos_emb, seed), frame, backend)
