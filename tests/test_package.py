"""The package as installed and imported."""
import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import local_attention

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["LocalAttention", "LocalMHA", "LocalTransformer", "DynamicPositionBias", "WindowSpec", "load_torch_weights",
         "export_torch_weights"]
SUBMODULES = {
    "local_attention.local_attention": ["LocalAttention", "default", "exists", "l2norm", "look_around", "max_neg_value",
                                        "pad_to_multiple"],
    "local_attention.rotary": ["SinusoidalEmbeddings", "apply_rotary_pos_emb", "exists", "rotate_half"],
    "local_attention.transformer": ["LocalMHA", "LocalTransformer", "DynamicPositionBias", "FeedForward", "GEGLU",
                                    "default", "eval_decorator", "exists", "l2norm", "top_k"],
}


def python(code, folder):
    """Run code in a new process and an empty folder, with the logging level that users have."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GLOG_v", "MS_OM_PATH")}
    return subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)


def test_import_prints_nothing_and_writes_nothing(tmp_path):
    done = python("import local_attention", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_numpy_2_is_refused_in_one_sentence(tmp_path):
    done = python("import numpy; numpy.__version__ = '2.1.0'; import local_attention", tmp_path)
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert message.startswith("ImportError: ") and "2.1.0" in message and "numpy>=1.25,<2" in message
    assert "SystemError" not in done.stderr


def test_public_names():
    assert set(NAMES) <= set(local_attention.__all__)
    for name in local_attention.__all__:
        assert callable(getattr(local_attention, name))


def test_help_is_an_index():
    """`help(local_attention)` begins with a line for each public name, and names modules that exist."""
    lines = [line.split() for line in local_attention.__doc__.splitlines() if line.startswith("    ")]
    names = [first for first, *said in lines if said]
    modules = [name for name in names if "." in name]
    assert sorted(set(names) - set(modules)) == sorted(local_attention.__all__) and len(set(names)) == len(names)
    for module in modules:
        importlib.import_module(module)


@pytest.mark.parametrize("module", SUBMODULES)
def test_submodules_keep_their_names(module):
    for name in SUBMODULES[module]:
        assert callable(getattr(importlib.import_module(module), name))


def test_helpers_of_upstream_s_submodules():
    """The values are those of release 1.11.2."""
    from local_attention.local_attention import TOKEN_SELF_ATTN_VALUE, default, exists, max_neg_value
    assert TOKEN_SELF_ATTN_VALUE == -5e4
    assert exists(0) and not exists(None) and default(0, 5) == 0 and default(None, 5) == 5
    for dtype, lowest in ((ms.float32, -3.4028234663852886e+38), (ms.float16, -65504.),
                          (ms.bfloat16, -3.3895313892515355e+38), (ms.float64, -1.7976931348623157e+308)):
        assert max_neg_value(Tensor(1, dtype)) == lowest

    def masked(x):
        return ops.where(x > 0, x, max_neg_value(x))
    assert ms.jit(masked)(Tensor([1., -1.])).asnumpy().tolist() == [1, np.finfo(np.float32).min]


def test_eval_decorator():
    from local_attention.transformer import eval_decorator
    model = nn.SequentialCell(nn.Dense(2, 2), nn.Dense(2, 2)).set_train()
    model[1].set_train(False)

    @eval_decorator
    def run(cell, fail):
        assert not any(part.training for _, part in cell.cells_and_names())
        return 1 // (not fail)
    assert run(model, False) == 1
    with pytest.raises(ZeroDivisionError):
        run(model, fail=True)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_printing_shows_settings():
    model = local_attention.LocalTransformer(num_tokens=23, max_seq_len=41, dim=12, depth=1, heads=3, dim_head=10,
                                             local_attn_window_size=5, ff_dropout=.25, use_dynamic_pos_bias=True)
    shown = str(model)
    for settings in ("num_tokens=23, max_seq_len=41, dim=12, depth=1, local_attn_window_size=5",
                     "dim=12, window_size=5, dim_head=10, heads=3, causal=True, prenorm=True",
                     "window_size=5, causal=True, look_forward=0, dim=10, autopad=True, exact_windowsize=True, "
                     "use_rotary_pos_emb=False", "rate=0.25", "DynamicPositionBias(\n      dim=6, heads=3"):
        assert settings.split("(\n")[-1].strip() in shown, shown
    assert shown.endswith(f")\n{sum(x.size for x in model.trainable_params()):,} weights")
    assert "depth=1, local_attn_window_size=512" in str(local_attention.LocalTransformer(
        num_tokens=2, max_seq_len=4, dim=2, depth=1, heads=1, dim_head=2))
    cell = local_attention.LocalSelfAttention(12, 3, window_size_left=5, dropout_rate=.5, use_rel_pos_emb=True)
    assert ("in_features=12, num_heads=3, qkv_features=12, out_features=12, window_size_left=5, window_size_right=128, "
            "dropout_rate=0.5, use_rel_pos_emb=True") in str(cell)


@pytest.mark.parametrize("name", local_attention.__all__)
def test_help_is_plain_text(name):
    """In a terminal, nobody reads LaTeX or Sphinx's roles; and whoever asks for `construct` is told where to look."""
    public = getattr(local_attention, name)
    own = [public, *(vars(public).get(method) for method in ("explain", "generate", "recompute", "show"))]
    for text in (inspect.getdoc(each) for each in own if each is not None):
        assert not re.search(r":\w+:`|\\[a-z]|\^\{|_\{|\.\. math", text), text
    if hasattr(public, "construct"):
        ours = {method for base in public.__mro__ if base.__module__.startswith("local_attention")
                for method, value in vars(base).items() if callable(value) and not method.startswith("_")}
        assert ours <= {"construct", "explain", "extend_repr", "exportable_step", "generate", "recompute"}
        assert "The class describes" in inspect.getdoc(public.construct)


@pytest.fixture
def setup_arguments(monkeypatch):
    """Return what setup.py passes to setuptools, which need not be installed."""
    given = {}
    fake = types.SimpleNamespace(setup=lambda **arguments: given.update(arguments),
                                 find_packages=lambda include: include, Extension=lambda name, **options: name)
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    tag = type("bdist_wheel", (), {"get_tag": lambda self: ("cp311", "cp311", "manylinux_2_27_x86_64")})
    for command in (type("build_ext", (), {}), tag):
        name = f"setuptools.command.{command.__name__}"
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{command.__name__: command}))
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_version(setup_arguments):
    assert setup_arguments["version"] == local_attention.__version__


def test_the_kernel_is_an_extension(setup_arguments):
    assert setup_arguments["ext_modules"] == ["local_attention.backends.native._native"]


def test_the_kernel_is_of_no_python_version(setup_arguments):
    """One wheel for a kind of machine serves every Python, and `native` looks for the name that is built."""
    commands = setup_arguments["cmdclass"]
    built = commands["build_ext"]().get_ext_filename("local_attention.backends.native._native")
    assert Path(built) == Path("local_attention", "backends", "native", "_native.so")
    assert commands["bdist_wheel"]().get_tag() == ("py3", "none", "manylinux_2_27_x86_64")


def test_requirements(setup_arguments):
    assert setup_arguments["install_requires"] == (ROOT / "requirements.txt").read_text().split()
    assert "numpy>=1.25,<2" in setup_arguments["install_requires"]
    assert setup_arguments["python_requires"] == ">=3.9,<3.13"
    assert {"train", "test", "dev"} == set(setup_arguments["extras_require"])
    assert set(setup_arguments["extras_require"]["train"]) <= set(setup_arguments["extras_require"]["test"])
