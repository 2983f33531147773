"""For the tests of backends: those that can run here, what they refuse, and `attend` with keyword arguments."""
import pytest
from mindspore.ops import constexpr

from local_attention.attend import Frame, Problem, attend, beside, refusals
from local_attention.spec import Scoring, WindowSpec

# the native kernel only if it was built
BACKENDS = [name for name, reason in refusals(Problem(WindowSpec(1, 7, 0, True), Scoring(1.), 6, 9, 9, 10, 10)).items()
            if reason is None]
COMPLETE = [name for name in BACKENDS if name in ("native", "blocked", "dense")]  # they refuse nothing


def skip_what_it_refuses(backend, call, *inputs):
    """Skip the test if the backend refuses the call. This runs outside a gradient, because an error within one leaves
    MindSpore in a bad state."""
    if backend not in COMPLETE:
        try:
            call(*inputs)
        except ValueError as error:
            if "cannot run this call" in str(error):
                pytest.skip(str(error).splitlines()[0])
            raise


@constexpr
def _numbers(scale, hide_self, dropout, offset, origin, bias_is_constant, softcap, lse):
    return (Scoring(scale, softcap, hide_self, dropout),
            Frame(offset, origin, bias_is_constant=bias_is_constant, lse=lse))


def attend_to(q, k, v, spec, scale, key_mask=None, bias=None, rel_pos_emb=None, hide_self=False, dropout=0., seed=None,
              offset=0, origin=(0, 0), backend=None, bias_is_constant=False, sinks=None, documents=None, softcap=None,
              lse=False):
    scoring, frame = _numbers(scale, hide_self, dropout, offset, origin, bias_is_constant, softcap, lse)
    tensors = beside(mask=key_mask, documents=documents, bias=bias, sinks=sinks, rel_pos_emb=rel_pos_emb, seed=seed)
    return attend(q, k, v, spec, scoring, tensors, frame, backend)
