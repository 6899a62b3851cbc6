"""Which changes of the package does no test notice? `python tests/mutants.py` changes it and runs the tests.

A mutant is the package with one change: of an operator, a comparison, a number, a flag, a dtype, a mask. The
tests run until one fails. A mutant that none notices is printed, with its line as it was and as it is.

    python tests/mutants.py                               # A sample, by the quick tests.
    python tests/mutants.py --marks "not slow" --ids 17 203   # Some of them again, by the default tests.

It needs `os.fork`: Linux or macOS.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
# Figures, words of errors and files of PyTorch are looked at by tests of their own.
LEFT_OUT = {"__init__", "_arrays", "_checks", "_plot", "_torch"}
OPERATORS = [
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
]
NAMES = [
    ("float32", "bfloat16"),
    ("float64", "float32"),
    ("isfinite", "isnan"),
    ("maximum", "minimum"),
    ("max", "min"),
    ("any", "all"),
    ("ones", "zeros"),
    ("ones_like", "zeros_like"),
    ("logical_not", "logical_and"),
]
# Without these a function returns its first argument.
DROPPED = {"stop_gradient", "replicate", "reshard", "abs", "round_rows", "optimization_barrier"}


def both_ways(pairs):
    return dict([(b, a) for a, b in pairs] + pairs)


OPERATORS, NAMES = both_ways(OPERATORS), both_ways(NAMES)


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


def mutants():
    """All of them, in the same order each time: file, line, source before and after, and the whole module."""
    found = []
    for path in sorted((ROOT / "jax_centerloss").rglob("*.py")):
        if path.stem in LEFT_OUT:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in computing(tree):
            for field, value in changes(node):
                old, before = getattr(node, field), ast.unparse(node)
                setattr(node, field, value)
                mutant = (
                    str(path.relative_to(ROOT)),
                    node.lineno,
                    before,
                    ast.unparse(node),
                    ast.unparse(tree),
                )
                found.append(mutant)
                setattr(node, field, old)
    return found


def sample(found, count):
    """As many of each module as it has places, from all of its lines."""
    chosen = random.Random(0).sample(range(len(found)), min(count, len(found)))
    return sorted(chosen)


def serve():
    """Runs pytest with the arguments in each line of the input, in a fork that has imported JAX already."""
    import chex  # noqa: F401
    import flax.linen
    import flax.nnx  # noqa: F401
    import optax  # noqa: F401
    import pytest

    for line in sys.stdin:
        arguments, seconds = json.loads(line)
        start = time.monotonic()
        if not (child := os.fork()):
            log = os.open("mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(int(pytest.main(arguments)))
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() - start < seconds:
            time.sleep(0.05)
        if not ended[0]:
            os.kill(child, 9)
            os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(ended[1]) if ended[0] else "timeout"
        failed = [
            line
            for line in Path("mutant.log").read_text(errors="replace").splitlines()
            if "FAILED" in line[:6]
        ]
        print(json.dumps([code, time.monotonic() - start, failed[:1]]), flush=True)


def environment(tree):
    """What tests/conftest.py sets, which JAX reads as it is imported; one cache of compiled programs."""
    return os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def test_files(path, names):
    """The tests that bear the module's name come first."""
    word = Path(path).stem.strip("_")
    names = names or sorted(p.name for p in (ROOT / "tests").glob("test_*.py"))
    return [f"tests/{name}" for name in sorted(names, key=lambda name: word not in name)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many mutants")
    parser.add_argument("--ids", type=int, nargs="*", help="these, by their numbers")
    parser.add_argument("--marks", default="quick", help="the tests, as for pytest -m")
    parser.add_argument("--tests", nargs="*", help="names of test files; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=300, help="seconds, after which a mutant is noticed")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    found = mutants()
    chosen = args.ids if args.ids is not None else sample(found, args.count)
    print(f"{len(chosen)} of {len(found)} mutants", flush=True)
    first = "jax_centerloss/_loss.py"
    unchanged = first, 0, "the package", "the package", (ROOT / first).read_text(encoding="utf-8")
    servers = SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for job in range(args.jobs):
            tree = Path(folder, str(job))
            shutil.copytree(
                ROOT, tree, ignore=shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "out")
            )
            command = [sys.executable, __file__, "--serve"]
            server = subprocess.Popen(
                command,
                cwd=tree,
                env=environment(tree),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            servers.put((tree, server))

        def run(number):
            path, line, before, after, text = unchanged if number is None else found[number]
            tree, server = servers.get()
            (tree / path).write_text(text, encoding="utf-8")
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", args.marks]
            server.stdin.write(json.dumps([options + test_files(path, args.tests), args.timeout]) + "\n")
            server.stdin.flush()
            code, seconds, failed = json.loads(server.stdout.readline())
            shutil.copy(ROOT / path, tree / path)
            servers.put((tree, server))
            if number is not None:
                said = "SURVIVES" if code == 0 else "noticed"
                change = f"{path}:{line} {before.splitlines()[0]!r} -> {after.splitlines()[0]!r}"
                print(f"{said} {number} {change} ({code}, {seconds:.0f} s) {failed}", flush=True)
            return code == 0

        try:
            if not run(None):
                sys.exit("The tests fail on the package as it is.")
            survivors = sum(pool.map(run, chosen))
        finally:
            while not servers.empty():
                servers.get()[1].kill()
    print(f"{len(chosen) - survivors} of {len(chosen)} noticed, {1 - survivors / len(chosen):.1%}")


if __name__ == "__main__":
    main()
