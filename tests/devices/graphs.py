"""What a rank computes and sends, read from the graph that MindSpore saves of a compiled step."""
import csv
import math
import re
from collections import Counter
from pathlib import Path

SHAPE = r"Tensor\[(\w+)\][^(]*\(([\d, ]*)\)"
COLLECTIVE = r"= (AllGather|AllReduce|ReduceScatter|AlltoAllV?|AllToAllV?|NeighborExchange\w*|Send|Receive)\("


def operators(folder):
    """Return `(name, inputs, scope)` of every operator; inputs are shapes, then the output's."""
    text = sorted(Path(folder).glob("rank_*/*_validate_*.ir"))[-1].read_text(errors="replace")
    lines, found = text.splitlines(), []
    for number, line in enumerate(lines):
        name = re.search(r"^\s+%\d+\([^)]*\) = (?:PrimFunc_)?(\w+)\(", line)
        if name:
            shapes = [tuple(int(one) for one in shape.split(",") if one.strip())
                      for _, shape in re.findall(SHAPE, lines[number + 1])]
            scope = re.search(r"Fullname with scope: \((.*)\)", "\n".join(lines[number:number + 4]))
            found.append((name.group(1), shapes, scope.group(1) if scope else "",
                          bool(re.search(COLLECTIVE, line))))
    return found


def attention(folder, where="core_attention"):
    """Return the shapes of queries and keys of every forward call of the fused operator, and the collectives within
    the attention as `(name, elements sent)`; `where` is a pattern of its operators' scopes."""
    calls, sent = [], []
    for name, shapes, scope, collective in operators(folder):
        if name == "FlashAttentionScore":
            calls.append((shapes[0], shapes[1]))
        if collective and re.search(where, scope):
            sent.append((name, math.prod(shapes[0])))
    return calls, sent


def sent(folder):
    """Return the bytes that a rank puts into each kind of collective in a step."""
    found = Counter()
    for file in Path(folder).glob("rank_*/execute_order/comm_execute_order.csv"):
        with open(file) as rows:
            for row in csv.DictReader(rows):
                found[row["primitive"]] += int(row["input_size"] or 0)
    return dict(found)
