"""Models of mindnlp with their attention from here, against PyTorch's answers of make_reference.py.

    python check.py FOLDER [family ...]

A line for each family: the largest differences of logits, of those with left padding and of packed rows, of the
gradient of the embedding relative to its largest, and how many tokens of `generate` are the same.
"""
import os
import sys
import traceback

import mindspore
import mindnlp  # noqa: F401  before transformers, which is to find its torch
import numpy as np
import torch
import transformers
from families import FAMILIES
from mindtorch import autograd

import local_attention
from local_attention import zoo

print(f"mindspore {mindspore.__version__}, mindnlp 0.5.1, transformers {transformers.__version__},",
      f"local_attention {local_attention.__version__}, registered with {zoo.register()}", flush=True)
folder, names = sys.argv[1], sys.argv[2:] or list(FAMILIES)
attention = os.environ.get("ATTENTION", "local_attention")


def difference(got, want):
    return float(np.abs(got - want).max())


def tried(call):
    """What a call gives, or what went wrong in it."""
    try:
        return call()
    except Exception as error:  # of the zoo or ours: the line says which
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:110] if str(error).strip() else ''}"


def shown(result):
    return result if isinstance(result, str) else f"{result:.1e}"


for name in names:
    want = np.load(os.path.join(folder, name + ".npz"))
    ids, mask = torch.tensor(want["ids"]), torch.tensor(want["mask"])
    pos, real = torch.tensor(want["pos"]), want["mask"].astype(bool)
    model = tried(lambda name=name: getattr(transformers, FAMILIES[name][1]).from_pretrained(
        os.path.join(folder, name), attn_implementation=attention).eval())
    if isinstance(model, str):
        print(f"{name:18} {model}", flush=True)
        continue

    def logits(tokens, model=model, **options):
        return model(tokens, use_cache=False, **options).logits

    def gradient(ids=ids, want=want, model=model):
        weight = model.get_input_embeddings().weight
        # mindnlp's own way: a loss has no `backward` that does anything
        autograd.value_and_grad(lambda: (logits(ids, model=model).float() ** 2).mean(), [weight])()
        return difference(weight.grad.detach().numpy(), want["grad"]) / float(np.abs(want["grad"]).max())

    def continued(ids=ids, mask=None, model=model, **options):
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
                              pad_token_id=0, **options).numpy()
    with torch.no_grad():  # B023: all of these are called at once
        found = [tried(lambda: difference(logits(ids).numpy(), want["logits"]))]  # noqa: B023
        found.append(tried(lambda: difference(logits(ids, attention_mask=mask).numpy()[real], want["padded"][real])))  # noqa: B023
        found.append(tried(lambda: difference(logits(ids[:1], position_ids=pos).numpy(), want["packed"])))  # noqa: B023
        same = [tried(lambda: f"{int((continued() == want['gen'])[:, 40:].sum())} of 24")]  # noqa: B023
    found.append(tried(gradient))
    labels = ("logits", "padded", "packed", "gradient")
    print(f"{name:18}", ", ".join(f"{label} {shown(x)}" for label, x in zip(labels, found)), f"generate {same[0]}",
          flush=True)
