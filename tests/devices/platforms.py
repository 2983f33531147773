"""Loads MindSpore's GPU and Ascend plugins on a machine that has neither device.

MindSpore's wheel contains both plugins, but not the libraries of CUDA and CANN that they are linked with. This module
makes stubs of those libraries. They contain every function that a plugin leaves undefined. A stub does nothing and
returns 0, except for the few functions that must return something (stubs/).

So the plugin loads. For every operator, it looks for a kernel in its own tables, by dtype, and refuses an operator
without one, as on a device. Nothing is computed, so values mean nothing. On Ascend, MindSpore's own dry run
(MS_SIMULATION_LEVEL) also skips launches.
"""
import glob
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import mindspore

STUBS = Path(__file__).parent / "stubs"
LIBRARIES = Path(mindspore.__file__).parent / "lib"
PLUGINS = LIBRARIES / "plugin"
TOOLS = ("gcc", "g++", "readelf", "nm")
NEEDED = {"GPU": ("libmindspore_gpu.so.11.6", "gpu/libcuda_ops.so.11"), "Ascend": ("libmindspore_ascend.so.2",)}

STANDS_FOR = (  # C++ methods, by mangled name, that must do something, and their stubs
    ("_ZN2ge8OperatorC[12]E|_ZN2ge15OperatorFactory14CreateOperator", "stub_operator"),
    ("_ZN2ge(5Shape|6Tensor|10TensorDesc|12AscendString|5Graph)C[12]E", "stub_empty"),
    ("_ZNK2ge(10TensorDesc8GetShape|6Tensor13GetTensorDesc)", "stub_empty"),
    ("_ZNK2ge5Shape7GetDims", "stub_vector"), ("_ZNK2ge8Operator(7GetNameEv|9GetOpTypeEv)", "stub_string"),
    ("_ZN2ge8Operator(7SetAttr|8SetInput)", "stub_self"))


def missing(name):
    """Return why this platform cannot be loaded here, None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the stubs of its libraries are written for Linux on x86-64"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"the stubs of its libraries need a C compiler, and there is no {' or '.join(absent)}"
    if not all((PLUGINS / file).exists() for file in NEEDED[name]):
        return f"this wheel of MindSpore has no {name} plugin"
    return None


def make(name, folder):
    """Write the libraries of a platform into an empty folder; return the environment variables that select them."""
    environment = {"GPU": _gpu, "Ascend": _ascend}[name](Path(folder))
    # MindSpore's module DEVICE logs each operator that runs on CPU because the platform has no kernel
    return {**environment, "GLOG_v": "3", "GLOG_logtostderr": "1", "MS_SUBMODULE_LOG_v": "{DEVICE:1}",
            "MS_OM_PATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _symbols(path):
    """Return the symbols that a library needs, each with its version, and the symbols that it defines."""
    needed, defined = {}, set()
    for line in _output("readelf", "-W", "--dyn-syms", path).splitlines():
        fields = line.split()
        if len(fields) > 7 and fields[0].rstrip(":").isdigit():
            name, _, version = fields[7].replace("@@", "@").partition("@")
            if fields[6] == "UND":
                needed[name] = version
            else:
                defined.add(name)
    return needed, defined


def _compiled(folder, source, *options):
    """Compile a file of stubs; return the object file and the names of its functions."""
    target = str(folder / source) + ".o"
    compiler = "g++" if source.endswith(".cc") else "gcc"
    subprocess.run([compiler, "-c", "-O1", "-fPIC", "-w", *options, STUBS / source, "-o", target], check=True)
    return target, {line.split()[-1] for line in _output("nm", target).splitlines() if " T " in line}


def _link(folder, name, functions, *objects, version=None):
    """Link a library of these objects and of functions that return 0."""
    path = folder / name
    lines = [".text"]
    for function in sorted(functions):
        stub = next((stub for pattern, stub in STANDS_FOR if re.match(pattern, function)), None)
        lines += [f".globl {function}", f".type {function},@function", f"{function}:",
                  f"jmp {stub}@PLT" if stub else "xorl %eax,%eax\nret"]
    assembly = f"{path}.s"
    Path(assembly).write_text("\n".join(lines + ['.section .note.GNU-stack,"",@progbits', ""]))
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", path, assembly, *objects, f"-Wl,-soname,{name}"]
    if version:
        Path(f"{path}.map").write_text(f"{version} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={path}.map")
    subprocess.run(command, check=True)


def _gpu(folder):
    needed, _ = _symbols(PLUGINS / NEEDED["GPU"][0])
    _, cuda_ops = _symbols(PLUGINS / NEEDED["GPU"][1])
    driver = {name for name, version in needed.items() if not version and re.match("cu[A-Z]", name)}
    libraries = {"libcuda_ops.so.11": cuda_ops & set(needed), "libcuda.so.1": driver}  # the first: MindSpore's kernels
    for name, version in needed.items():
        if re.match("lib(cu|nvrtc)", version):
            libraries.setdefault(version, set()).add(name)
    written = {"libcudart.so.11.0": "cudart.c", "libcudnn.so.8": "cudnn.c", "libcuda_ops.so.11": "cuda_ops.c"}
    versions = set(needed.values())
    for name, functions in libraries.items():
        objects, own = (), set()
        if name in written:
            target, own = _compiled(folder, written[name])
            objects = (target,)
        _link(folder, name, functions - own, *objects, version=name if name in versions else None)
    compiler = folder / "bin" / "nvcc"  # MindSpore chooses the plugin by what this prints
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.6, V11.6.124\n")
    compiler.chmod(0o755)
    return {"CUDA_HOME": str(folder), "LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": str(folder / "libcuda_ops.so.11")}


def _ascend(folder):
    folder = folder / "latest" / "lib64"
    folder.mkdir(parents=True)
    dynamic = {path: _output("readelf", "-d", path) for path in glob.glob(f"{PLUGINS}/**/*.so*", recursive=True)
               if re.search("libmindspore_(ascend|ops_ascend|graph_ir|ascend_res)|collective|shmem|/libmf_", path)
               and "nvidia" not in path}
    plugins = [path for path, text in dynamic.items() if "aarch64" not in text]
    own, needed, libraries, asked = set(), set(), set(), set()
    for path in plugins + glob.glob(f"{LIBRARIES}/*.so*"):
        own |= _symbols(path)[1]
    for path in plugins:
        needed |= {name for name, version in _symbols(path)[0].items() if not version}
        libraries |= set(re.findall(r"NEEDED.*\[(.*)\]", dynamic[path]))
        looked_up = re.findall(rb"(?<=\0)(?:acl[a-z]*[A-Z]|Hccl[A-Z])\w{2,}(?=\0)", Path(path).read_bytes())
        asked |= {name.decode() for name in looked_up}
    asked |= {name + "GetWorkspaceSize" for name in asked if name.startswith("aclnn")} | {"aclnnInit", "aclnnFinalize"}
    target, there = _compiled(folder, "ascendcl.cc", "-std=c++17", "-D_GLIBCXX_USE_CXX11_ABI=0")
    functions = {name for name in needed - own | asked
                 if re.match("acl|Hccl|hal[A-Z]|hi_|rt[A-Z]|_ZNK?(2ge|7Lcal)", name)}
    _link(folder, "libascendcl.so", functions - there, target, "-lstdc++")
    present = {os.path.basename(path) for path in glob.glob(f"{LIBRARIES}/**/*.so*", recursive=True)}
    others = {"libacl_op_compiler.so", "libacl_tdt_channel.so", "libacl_tdt_queue.so", "libopapi.so"}
    for name in libraries - present | others:
        if not re.match("lib(stdc|c.so|m.so|gcc|pthread|dl.so|rt.so|gomp|z.so|ascendcl)|ld-|_c_", name):
            _link(folder, name, (), "-Wl,--no-as-needed", folder / "libascendcl.so")
    _link(folder, "libshmem.so", ())
    return {"LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": f"{folder}/libshmem.so:{folder}/libascendcl.so",
            "ASCEND_HOME_PATH": str(folder.parent), "MS_SIMULATION_LEVEL": "1"}
