"""Compare models of a zoo that use this package's attention with PyTorch's results, which make_reference.py wrote.

    python check.py mindnlp|mindone FOLDER [family ...]

It prints a line for each family with the largest difference of: logits; logits with left padding; logits of packed
rows; logits with a cache that gets the tokens in two chunks; the gradient of the embedding, relative to its largest
entry. The line also has the number of equal tokens of greedy `generate`. It exits with 1 if one is out of its bound and
known.py does not say why.
"""
import os
import subprocess
import sys
import traceback
from types import SimpleNamespace

import mindspore as ms
import numpy as np
from families import FAMILIES
from known import KNOWN

import local_attention
from local_attention import zoo

BOUNDS = dict(logits=3e-5, padded=3e-5, packed=3e-5, chunks=3e-5, gradient=1e-4)  # for logits with softcap: 3e-4
VERSIONS = dict(mindnlp="mindnlp 0.5.1, transformers 4.57.1", mindone="mindone 0.5.0, transformers 4.57.1")
ATTENTION = os.environ.get("ATTENTION", "local_attention")  # "eager" is the zoo's own


def mindnlp():
    import mindnlp  # noqa: F401  before transformers, so that this finds mindnlp's torch
    import torch
    import transformers
    from mindtorch import autograd
    torch.set_grad_enabled(False)

    def gradient(loss, weight):
        with torch.enable_grad():  # this is mindnlp's way: `backward` of a loss does nothing
            autograd.value_and_grad(loss, [weight])()
        return weight.grad.detach().numpy()
    return SimpleNamespace(models=transformers, tensor=torch.tensor, numpy=lambda x: x.detach().numpy(),
                           gradient=gradient)


def mindone():
    import mint_on_cpu  # noqa: F401  before mindone, which lacks kernels on CPU
    from mindone import transformers

    def gradient(loss, weight):
        return ms.grad(loss, None, [weight])()[0].asnumpy()
    return SimpleNamespace(models=transformers, tensor=ms.Tensor, numpy=lambda x: x.asnumpy(), gradient=gradient)


def load(there, folder, name):
    model = getattr(there.models, FAMILIES[name][1]).from_pretrained(
        os.path.join(folder, name), attn_implementation=ATTENTION)
    return model.eval() if hasattr(model, "eval") else model.set_train(False)


def checks(there, model, want):
    """Return a function for each check, by name. It returns a difference, or a number of tokens."""
    ids, mask, pos = (there.tensor(want[name]) for name in ("ids", "mask", "pos"))

    def call(*args, **options):
        return model(*args, **options, return_dict=True)

    def logits(tokens, **options):
        return call(tokens, use_cache=False, **options).logits

    def difference(got, wanted, where=slice(None)):
        return float(np.abs(there.numpy(got)[where] - wanted[where]).max())

    def chunks():
        first = call(ids[:, :23], use_cache=True)
        second = call(ids[:, 23:], past_key_values=first.past_key_values, use_cache=True)
        return difference(second.logits, want["logits"][:, 23:])

    def gradient():
        table = model.get_input_embeddings()
        weight = table.weight if hasattr(table, "weight") else table.embedding_table
        found = there.gradient(lambda: (logits(ids) ** 2).mean(), weight)
        return float(np.abs(found - want["grad"]).max() / np.abs(want["grad"]).max())

    def generate():
        tokens = there.numpy(model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0))
        return int((tokens == want["gen"])[:, 40:].sum())

    named = dict(
        logits=lambda: difference(logits(ids) if "gen" in want else call(ids).logits, want["logits"]),
        padded=lambda: difference(logits(ids, attention_mask=mask) if "gen" in want else
                                  call(ids, attention_mask=mask).logits, want["padded"], want["mask"].astype(bool)))
    if "gen" in want:
        named.update(packed=lambda: difference(logits(ids[:1], position_ids=pos), want["packed"]), chunks=chunks,
                     generate=generate, gradient=gradient)
    return named


def tried(call):
    """Return the result of a call, or its error as text."""
    try:
        return call()
    except Exception as error:  # the zoo's or ours: the line shows it
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:250]}"


def right(name, check, result):
    if check == "generate":
        return result == 24
    bound = BOUNDS[check] * (10 if check != "gradient" and "attn_logit_softcapping" in FAMILIES[name][2] else 1)
    return not isinstance(result, str) and result <= bound


def shown(result):
    return f"{result:.1e}" if isinstance(result, float) else result if isinstance(result, str) else f"{result} of 24"


def family(which, folder, name):
    """Check one family, print its lines, and return the failures that known.py does not list."""
    there = {"mindnlp": mindnlp, "mindone": mindone}[which]()
    zoo.register(zoos=which)
    model = tried(lambda: load(there, folder, name))
    if isinstance(model, str):
        found = {"model": model}
    else:
        with np.load(os.path.join(folder, name + ".npz")) as file:
            want = dict(file)
        found = {check: tried(call) for check, call in checks(there, model, want).items()}
    known, wrong = KNOWN[which].get(name, {}), []
    print(f"{name:18} " + ", ".join(f"{check} {shown(result)}" for check, result in found.items()), flush=True)
    for check, result in found.items():
        if check == "model" or not right(name, check, result):
            reason = known.get(check) or known.get("all")
            print(f"{'':18} {check}: {f'known: {reason}' if reason else 'WRONG'}", flush=True)
            wrong += [] if reason else [f"{name} {check}"]
    return wrong


def main(which, folder, *names):
    if len(names) == 1:
        return bool(family(which, folder, *names))
    print(f"MindSpore {ms.__version__}, {VERSIONS[which]}, local_attention {local_attention.__version__}", flush=True)
    wrong = []
    for name in names or FAMILIES:
        # each in its own process: after an operator without a kernel, MindSpore cannot index tensors any more
        process = subprocess.run([sys.executable, __file__, which, folder, name], capture_output=True, text=True)
        lines = [line for line in process.stdout.splitlines() if line.startswith((f"{name} ", " " * 18))]
        print("\n".join(lines or [f"{name:18} ended with {process.returncode}"]), flush=True)
        wrong += [name] if process.returncode else []
    print(f"wrong: {', '.join(wrong)}" if wrong else "all right, or known", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
