"""Which changes of the package does no test notice? `python tests/mutants.py` changes it and runs the tests.

A mutant is the package with one change: of an operator, a comparison, a number, a flag, a dtype, a mask. The
tests run until one fails. Each mutant is printed, with its line as it was and as it is: it is noticed, or
SURVIVES.

    python tests/mutants.py                    # The faults below and a sample, by the quick tests.
    python tests/mutants.py --count 0          # The faults alone.
    python tests/mutants.py --marks "not slow" --ids 17 203   # These again, by the default tests.

It needs `os.fork`: Linux or macOS.
"""

import argparse
import ast
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import environment  # noqa: F401  Before JAX, which reads what it sets.
import pytest

TIMEOUT = 300  # Seconds after which a mutant is noticed.
ROOT = Path(__file__).resolve().parents[1]
# Figures, words of errors and files of PyTorch are looked at by tests of their own.
LEFT_OUT = {"__init__", "_arrays", "_checks", "_plot", "_torch"}
# These notice most, and come first, after those that have the word of the module in their names.
STRONGEST = ["test_update.py", "test_loss.py", "test_weights.py", "test_rows.py"]
WORDS = {"batch": "errors", "check_batch": "errors", "reduce": "loss", "rules": "update"}


def both_ways(*pairs):
    """What each is changed into. A pair's own direction comes before another's way back."""
    return {b: a for a, b in pairs} | dict(pairs)


OPERATORS = both_ways(
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.FloorDiv, ast.Mult),
    (ast.Mod, ast.FloorDiv),
    (ast.BitAnd, ast.BitOr),
    (ast.LShift, ast.RShift),
    (ast.BitXor, ast.BitAnd),
    (ast.And, ast.Or),
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
)
NAMES = both_ways(
    ("float32", "bfloat16"),
    ("float64", "float32"),
    ("isfinite", "isnan"),
    ("maximum", "minimum"),
    ("max", "min"),
    ("any", "all"),
    ("ones", "zeros"),
    ("ones_like", "zeros_like"),
    ("logical_not", "logical_and"),
)
# Without these a function returns its first argument.
DROPPED = {"stop_gradient", "replicate", "reshard", "abs", "round_rows", "optimization_barrier"}
# Faults of meaning that the quick tests have to notice: a module, its words, and what they become.
FAULTS = [
    ("_rules", "rate / (1 + counts)", "rate / counts"),  # The factor of the paper's rule,
    ("_rules", "2 / denominator", "1 / denominator"),  # of the gradient,
    ("_rules", "jnp.ones_like(counts), counts)", "jnp.ones_like(counts), counts + 1)"),  # and of the mean.
    # NaN of a masked row reaches the gradient, the loss, and the centers.
    ("_reduce", "jnp.where(used[..., None], x - rows, zero)", "x - rows"),
    ("_reduce", "values = jnp.where(used, values,", "values = jnp.where(used | True, values,"),
    ("_rules", "used & (labels < centers.shape[0])", "labels < centers.shape[0]"),
    # A label wraps: a negative one becomes the last class, one that is out of range becomes another.
    ("_batch", "used = indices >= 0", "used = indices >= -1"),
    ("_rows/table", "(labels >= 0) & (labels < num_classes)", "labels < 2 * num_classes"),
    # What has no class moves the center of class 0.
    ("_rows/table", "jnp.where(condition, classes, NO_CLASS)", "jnp.where(condition, classes, 0)"),
    # Rows of the optimizer's state move whose classes are not in the batch.
    ("_rows/moves", "(counts != 0) & samples.ready", "samples.ready"),
    ("_rows/groups", "jnp.where(owns_slot, labels, NO_CLASS)", "jnp.where(owns_slot, labels, 0)"),
]


def changes(node):
    """The changes of one node of a syntax tree: its field, and the new value."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield "op", OPERATORS[type(op)]()
        case ast.Compare(ops=[op, *others]) if type(op) in OPERATORS:
            yield "ops", [OPERATORS[type(op)](), *others]
        case ast.UnaryOp(op=ast.USub()):
            yield "op", ast.UAdd()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "operand", ast.UnaryOp(ast.Not(), operand)
        case ast.Constant(value=bool(value)):
            yield "value", not value
        case ast.Constant(value=int(value) | float(value)):
            yield "value", value + 1
        case ast.Attribute(attr=name) if name in NAMES:
            yield "attr", NAMES[name]
        case ast.IfExp(body=body):
            yield "orelse", body
        case ast.If(test=test):
            yield "test", ast.UnaryOp(ast.Not(), test)
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, yes, no]):
            yield "args", [condition, no, yes]
        case ast.Call(func=ast.Attribute(attr=name)) if name in DROPPED:
            yield "func", ast.parse("(lambda value, *_, **__: value)", mode="eval").body


def computing(node):
    """The nodes below this one, but for annotations, decorators and the words of errors."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from computing(child)


def mutants(numbers=None):
    """Yields the mutants with these numbers, or all: file, line, what was changed, into what, and its module.

    A number is the place in an order that is the same each time.
    """
    count = itertools.count()
    for path in sorted((ROOT / "jax_centerloss").rglob("*.py")):
        if path.stem in LEFT_OUT:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in computing(tree):
            for field, value in changes(node):
                if numbers is not None and next(count) not in numbers:
                    continue
                old, before = getattr(node, field), ast.unparse(node)
                setattr(node, field, value)
                yield path.relative_to(ROOT), node.lineno, before, ast.unparse(node), ast.unparse(tree)
                setattr(node, field, old)


def faults():
    """Yields FAULTS in the form of `mutants`."""
    for name, before, after in FAULTS:
        path = Path("jax_centerloss", f"{name}.py")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path} has {text.count(before)} times {before!r}"
        line = text[: text.index(before)].count("\n") + 1
        yield path, line, before, after, text.replace(before, after)


def serve():
    """Runs pytest with the arguments in each line of the input, in a fork that has imported JAX already."""
    for name in ("chex", "flax.linen", "flax.nnx", "optax"):
        importlib.import_module(name)
    for line in sys.stdin:
        start = time.monotonic()
        if not (child := os.fork()):
            log = os.open("mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(int(pytest.main(json.loads(line))))
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() - start < TIMEOUT:
            time.sleep(0.05)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(ended[1]) if ended[0] else "timeout"
        said = Path("mutant.log").read_text(errors="replace").splitlines()
        failed = next((line for line in said if line.startswith(("FAILED", "ERROR"))), "")
        print(json.dumps([code, time.monotonic() - start, failed]), flush=True)


class Server:
    """A copy of the repository, and the process that runs its tests."""

    def __init__(self, tree):
        self.tree = tree
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "out"))
        # A module that is changed within a second has the time stamp of its compiled form.
        settings = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=tree,
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def test(self, path, marks):
        """The code that pytest ends with, its seconds and its first failure; tests named as `path` first."""
        module = path.stem.strip("_")
        word = WORDS.get(module, module)
        files = sorted(
            (ROOT / "tests").glob("test_*.py"),
            key=lambda file: (word not in file.name, file.name not in STRONGEST, file.name),
        )
        # pytest-randomly, if it is installed, would undo the order.
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", marks]
        print(
            json.dumps(options + [f"tests/{file.name}" for file in files]),
            file=self.process.stdin,
            flush=True,
        )
        return json.loads(self.process.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many mutants")
    parser.add_argument("--ids", type=int, nargs="*", help="these, by their numbers")
    parser.add_argument("--marks", default="quick", help="the tests, as for pytest -m")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    total = sum(1 for _ in mutants())
    chosen = sorted(args.ids or random.Random(0).sample(range(total), min(args.count, total)))
    named = [] if args.ids else [(f"fault {i}", fault) for i, fault in enumerate(faults())]
    print(f"{len(named)} faults, {len(chosen)} of {total} mutants", flush=True)
    idle = SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        servers = [Server(Path(folder, str(job))) for job in range(args.jobs)]
        for server in servers:
            idle.put(server)

        def survives(number, mutant):
            path, line, before, after, text = mutant
            server = idle.get()
            (server.tree / path).write_text(text, encoding="utf-8")
            code, seconds, failed = server.test(path, args.marks)
            shutil.copy(ROOT / path, server.tree / path)
            idle.put(server)
            change = f"{path}:{line} {before.splitlines()[0]!r} -> {after.splitlines()[0]!r}"
            said = "noticed" if code else "SURVIVES"
            print(f"{said} {number} {change} ({code}, {seconds:.0f} s) {failed}", flush=True)
            return not code

        try:
            if (failed := servers[0].test(Path("unchanged"), args.marks))[0]:
                sys.exit(f"The tests fail on the package as it is: {failed}")
            tried = itertools.chain(named, zip(chosen, mutants(set(chosen)), strict=True))
            survived = list(pool.map(survives, *zip(*tried, strict=True)))
        finally:
            for server in servers:
                server.process.kill()
    for kind, found in ("faults", survived[: len(named)]), ("mutants", survived[len(named) :]):
        print(f"{found.count(False)} of {len(found)} {kind} noticed")


if __name__ == "__main__":
    main()
