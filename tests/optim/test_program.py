"""Programs of the optimizer search: their form, kinds, fingerprints, mutations and runs."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from optimizer_contract import Net, OptimizerContract, data, losses
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.optim import Lion, Program, ProgramOptimizer, programs
from gradmatch.optim._program_functions import FUNCTIONS, Layout
from gradmatch.optim._program_mutate import LARGEST, mutate
from gradmatch.optim._program_run import Machine, _ready

KNOWN = [programs.adamw(), programs.lion(), programs.momentum(), programs.sgd()]


class TestProgramOptimizer(OptimizerContract):
    def make(self, params, **options):
        return ProgramOptimizer(params, programs.adamw(0.0), lr=1e-3, **options)


def program(*lines: str, states: str = "") -> Program:
    """A program of these lines."""
    names = ["w", "g", "lr", *states.split()]
    returned = ["update", *states.split()]
    body = "\n".join(f"    {line}" for line in lines)
    return Program.parse(f"def train({', '.join(names)}):\n{body}\n    return {', '.join(returned)}\n")


def run(own: Program, w: Tensor, g: Tensor, lr: float = 0.1, sizes: list[int] | None = None) -> Tensor:
    """The first update."""
    step = Machine(own, Layout(sizes or [w.shape[-1]]))
    return step(w, g, lr, [torch.zeros_like(w) for _ in step.states])[0]


# --- form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", KNOWN)
def test_source_and_program_are_the_same_thing(own: Program) -> None:
    assert Program.parse(own.to_source()) == own
    assert Program.parse(str(own)) == own
    compile(own.to_source(), "program", "exec")  # it is Python too


def test_constants_keep_every_digit() -> None:
    for value in (0.1, -1 / 3, 1e-8, 1e10, 123456789.123456789, 5e-324):
        own = program(f"update = mul(g, {value!r})")
        assert own.body[0].arguments[1] == value
        assert Program.parse(own.to_source()) == own


@pytest.mark.parametrize(
    ("signature", "lines", "words"),
    [
        ("w, g, lr", ["update = mul(g, lr)"], "it has no return line"),
        ("w, g, lr", ["update = mul(g, lr)", "return g"], "'return g'; it must be 'return update'"),
        ("w, g, lr, m", ["update = mul(g, lr)", "return update"], "must be 'return update, m'"),
        ("w, lr, g", ["return update"], "arguments are .w, lr, g.; they must be w, g, lr and"),
        ("w, g, lr", ["update = g * lr", "return update"], "line 2, 'update = g . lr', is not 'name ="),
        ("w, g, lr", ["update = mul(g, 'a')", "return update"], "neither a name nor a number"),
        ("w, g, lr", ["update = mul(g", "return update"], "syntax error in line"),
        ("w, g, lr", ["update = maul(g, lr)", "return update"], "function is 'maul'; it must be one of"),
        ("w, g, lr", ["update = mul(g, q)", "return update"], "line 1, .* reads 'q', which is not assigned"),
        ("w, g, lr", ["x = mul(g, lr)", "return update"], "never assigns 'update'"),
        ("w, g, lr", ["update = mul(g)", "return update"], r"arguments \(tensor\); it takes \(any, any\)"),
        ("w, g, lr", ["update = norm(lr)", "return update"], r"arguments \(scalar\); it takes \(tensor\)"),
        ("w, g, lr", ["update = global_norm(g)", "return update"], "a scalar in 'update'"),
        (
            "w, g, lr, m",
            ["m = global_norm(g)", "update = mul(g, m)", "return update, m"],
            "a scalar in 'm'; it must stay a tensor",
        ),
    ],
)
def test_malformed_programs_are_refused(signature: str, lines: list[str], words: str) -> None:
    body = "\n".join(f"    {line}" for line in lines)
    with pytest.raises(InputError, match=words):
        Program.parse(f"def train({signature}):\n{body}\n")


def test_what_is_no_function_or_calls_others_is_refused() -> None:
    with pytest.raises(InputError, match="it must be one function"):
        Program.parse("x = 1")
    with pytest.raises(InputError, match="is not 'name = function"):
        Program.parse("def train(w, g, lr):\n    update = __import__('os').getcwd()\n    return update\n")


# --- functions ------------------------------------------------------------------------------------------------


def test_interpolation_weighs_its_second_argument() -> None:
    own = program("update = interp(w, g, 0.25)")
    w, g = torch.tensor([4.0, 0.0]), torch.tensor([8.0, 1.0])
    assert run(own, w, g).tolist() == [5.0, 0.25]
    mixed = program("c = interp(lr, g, 0.25)", "update = interp(g, c, lr)")
    expected = 0.9 * g + 0.1 * (0.75 * 0.1 + 0.25 * g)
    torch.testing.assert_close(run(mixed, w, g), expected)


def test_norm_is_of_each_parameter_and_global_norm_of_all() -> None:
    w, g = torch.zeros(2, 5), torch.tensor([[3.0, 4.0, 0.0, 0.0, 2.0], [1.0, 0.0, 2.0, 2.0, 1.0]])
    sizes = [2, 3]
    by_tensor = run(program("update = norm(g)"), w, g, sizes=sizes)
    assert by_tensor.tolist() == [[5.0, 5.0, 2.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0, 3.0]]
    own = program("n = global_norm(g)", "update = mul(n, sign(g))".replace("sign(g)", "g"))
    torch.testing.assert_close(run(own, w, g, sizes=sizes), g * g.square().sum(1, keepdim=True).sqrt())


def test_functions_over_all_weights() -> None:
    g = torch.tensor([3.0, 4.0])
    w = torch.tensor([1.0, 0.0])
    for lines, expected in (
        (("d = dot(g, w)", "update = mul(g, d)"), 3.0 * g),
        (("d = cosine_sim(g, w)", "update = mul(g, d)"), 0.6 * g),
        (("update = clip_by_global_norm(g, 1.0)",), g / 5),
        (("update = clip_by_global_norm(g, 9.0)",), g),
    ):
        torch.testing.assert_close(run(program(*lines), w, g), expected)


def test_functions_are_total_where_they_say_so_and_values_everywhere() -> None:
    """In the released library cbrt names a function object, not a value."""
    x = torch.tensor([-8.0, 0.25, 2.0])
    log = math.log
    expected = {
        "cbrt": [-2.0, 0.25 ** (1 / 3), 2 ** (1 / 3)],
        "sqrt": [8**0.5, 0.5, 2**0.5],
        "log": [log(8), log(0.25), log(2)],
        "log1p": [log(7), log(1.25), log(3)],
        "log2": [3.0, -2.0, 1.0],
        "log10": [math.log10(8), math.log10(0.25), math.log10(2)],
        "exp10": [1e-8, 10**0.25, 100.0],
        "cube": [-512.0, 0.015625, 8.0],
        "reciprocal": [-0.125, 4.0, 0.5],
        "negative": [8.0, -0.25, -2.0],
        "sign": [-1.0, 1.0, 1.0],
        "abs": [8.0, 0.25, 2.0],
        "square": [64.0, 0.0625, 4.0],
    }
    for name, values in expected.items():
        found = FUNCTIONS[name].run(x)
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, torch.tensor(values), rtol=1e-5, atol=1e-9)
    for name, f in FUNCTIONS.items():
        if f.takes == ("any",):
            scalar = f.run(torch.tensor(0.3))
            torch.testing.assert_close(scalar, f.run(torch.tensor([0.3]))[0], msg=name, equal_nan=True)
            assert float(f.run(torch.tensor([0.3]))) == pytest.approx(
                by_numpy(name, 0.3), rel=1e-5, nan_ok=True
            )


def by_numpy(name: str, x: float) -> float:
    own = {
        "sqrt": lambda v: np.sqrt(abs(v)),
        "cube": lambda v: v**3,
        "exp10": lambda v: 10**v,
        "log": lambda v: np.log(abs(v)),
        "log2": lambda v: np.log2(abs(v)),
        "log10": lambda v: np.log10(abs(v)),
        "log1p": lambda v: np.log(abs(1 + v)),
    }
    with np.errstate(invalid="ignore"):
        return float(own.get(name, getattr(np, name, None))(x))


def test_constants_are_functions_without_arguments() -> None:
    own = program("p = pi()", "q = e()", "s = eps()", "t = add(p, q)", "u = add(t, s)", "update = mul(g, u)")
    found = run(own, torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert float(found) == pytest.approx(math.pi + math.e + 1e-8, rel=1e-7)


# --- what matters ---------------------------------------------------------------------------------------------


def changed(own: Program, *pairs: tuple[str, str]) -> str:
    """The source with whole words replaced."""
    source = own.to_source()
    for old, new in pairs:
        assert re.search(old, source), old
        source = re.sub(old, new, source)
    return source


def test_the_fingerprint_sees_what_is_computed() -> None:
    own = programs.adamw()
    first = r"    m = interp\(g, m, 0\.9\)\n"
    same = {
        "renamed": changed(own, (r"\bg2\b", "squared"), (r"\bq\b", "first")),
        "states renamed": changed(own, (r"\bm\b", "mean"), (r"\bv\b", "second")),
        "dead line": changed(own, (first, "    nothing = exp(w)\n    m = interp(g, m, 0.9)\n")),
        "dead state": changed(own, ("m, v", "z, m, v"), ("    g2", "    z = add(z, g)\n    g2")),
        "reordered": changed(own, (first, ""), ("    q", "    m = interp(g, m, 0.9)\n    q")),
        "commuted": changed(own, (r"add\(q, d\)", "add(d, q)")),
    }
    for name, source in same.items():
        other = Program.parse(source)
        assert other != own, name
        assert other.fingerprint() == own.fingerprint(), name
    different = {
        "constant": changed(own, (r"0\.999", "0.9990001")),
        "order of a quotient": changed(own, (r"div\(m, s\)", "div(s, m)")),
        "function": changed(own, (r"sqrt\(v\)", "square(v)")),
        "place of a state": changed(own, ("m, v", "v, m")),
    }
    for name, source in different.items():
        assert Program.parse(source).fingerprint() != own.fingerprint(), name


def test_only_what_reaches_the_update_is_kept() -> None:
    own = program(
        "a = exp(g)",
        "m = interp(g, m, 0.9)",
        "k = add(k, m)",
        "n = add(n, m)",
        "update = mul(m, lr)",
        "b = add(update, n)",
        states="m k n",
    )
    assert own.live() == (("m",), (False, True, False, False, True, False))
    assert own.trimmed() == program("m = interp(g, m, 0.9)", "update = mul(m, lr)", states="m")
    through_another_state = program("k = add(m, g)", "m = add(k, m)", "update = mul(k, lr)", states="m k")
    assert through_another_state.live()[0] == ("m",)
    late = program("update = mul(a, lr)", "a = add(b, g)", "b = add(b, w)", states="a b")
    assert late.live() == (("a", "b"), (True, True, True))


def test_dead_code_does_not_change_a_run() -> None:
    rng = np.random.default_rng(0)
    g = torch.Generator().manual_seed(0)
    w, slope = torch.randn(6, generator=g), torch.randn(6, generator=g)
    own = programs.adamw()
    for _ in range(60):
        own = mutate(own, rng)
        full = Machine(own, Layout([4, 2]))
        full.states, full._lines = own.states, [(s.target, *_ready(s, Layout([4, 2]))) for s in own.body]
        untrimmed = full(w, slope, 0.1, [torch.zeros(6) for _ in own.states])[0]
        trimmed = run(own, w, slope, sizes=[4, 2])
        torch.testing.assert_close(untrimmed, trimmed, equal_nan=True, rtol=0, atol=0)


# --- mutations ------------------------------------------------------------------------------------------------


def test_mutations_are_valid_programs_one_statement_apart() -> None:
    rng = np.random.default_rng(0)
    own, sizes, used = programs.adamw(), set(), set()
    for _ in range(1000):
        child = mutate(own, rng, max_len=12)
        child.kinds()
        assert Program.parse(child.to_source()) == child
        assert abs(len(child) - len(own)) <= 1
        if len(child) == len(own):
            changed = [(a, b) for a, b in zip(own.body, child.body, strict=True) if a != b]
            assert len(changed) == 1
            ((before, after),) = changed
            assert (before.target, before.function) == (after.target, after.function)
            assert sum(a != b for a, b in zip(before.arguments, after.arguments, strict=True)) == 1
        assert child.states == own.states
        sizes.add(len(child))
        used |= {s.function for s in child.body}
        own = child
    assert max(sizes) == 12  # no insertion at the longest length
    assert len(used) > 30


def test_insert_delete_and_modify_are_equally_likely() -> None:
    rng = np.random.default_rng(1)
    own = programs.sgd()  # one statement that cannot be deleted: insert and modify share what is left
    lengths = [len(mutate(own, rng)) for _ in range(600)]
    assert lengths.count(0) == 0
    assert {1, 2} == set(lengths)
    counts = [0, 0, 0]
    own = program("x = exp(g)", "y = exp(g)", "z = exp(g)", "update = mul(g, lr)")
    for _ in range(900):
        counts[len(mutate(own, rng)) - 3] += 1
    assert min(counts) > 200


def test_constants_are_multiplied_by_powers_of_two_and_clipped() -> None:
    rng = np.random.default_rng(0)
    own = program("update = mul(g, 3.0)")
    factors = [mutate(own, rng, constants_only=True).body[0].arguments[1] / 3.0 for _ in range(2000)]
    logs = np.log2(factors)
    assert abs(logs.mean()) < 0.1
    assert logs.std() == pytest.approx(1.0, abs=0.06)
    huge = program("update = mul(g, 9.9e9)")
    values = [mutate(huge, rng, constants_only=True).body[0].arguments[1] for _ in range(50)]
    assert max(values) == LARGEST
    with pytest.raises(InputError, match="no valid mutation"):
        mutate(programs.sgd(), rng, constants_only=True)


def test_functions_can_be_limited() -> None:
    rng, own = np.random.default_rng(0), programs.sgd()
    for _ in range(50):
        own = mutate(own, rng, functions=("sign", "add"))
    assert {s.function for s in own.body} <= {"sign", "add", "mul"}


# --- as optimizers --------------------------------------------------------------------------------------------


def trained(make, dtype: torch.dtype, steps: int = 50) -> list[Tensor]:
    net = Net(dtype)
    optimizer = make(net.parameters())
    for k in range(steps):
        x, y = data(k, dtype)
        optimizer.zero_grad()
        losses(net(x), y).mean().backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(("dtype", "decay"), [(torch.float32, 0.0), (torch.float64, 0.1)])
def test_the_lion_program_is_lion(dtype: torch.dtype, decay: float) -> None:
    ours = trained(lambda p: ProgramOptimizer(p, programs.lion(0.9, 0.99, decay), lr=1e-2), dtype)
    for a, b in zip(ours, trained(lambda p: Lion(p, lr=1e-2, weight_decay=decay), dtype), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_adamw_program_is_the_plain_loop() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = ProgramOptimizer([w], programs.adamw(0.1).to_source(), lr=0.01)
    x, m, v = w.detach().clone(), torch.zeros(3), torch.zeros(3)
    for k in range(20):
        g = torch.tensor([1.0, 0.0, -k])
        w.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - 0.01 * (m / (v.sqrt() + 1e-8) + 0.1 * x)
        torch.testing.assert_close(w.detach(), x, rtol=1e-5, atol=1e-6)
    assert set(optimizer.state[w]) == {"step", "s1", "s2"}


def test_a_program_sees_its_parameters_apart_and_together() -> None:
    a, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([12.0]))
    apart = program("n = norm(w)", "update = mul(n, lr)")
    together = program("n = global_norm(w)", "h = mul(w, 0.0)", "update = add(h, n)")
    for own, expected in ((apart, ([2.5, 3.5], 10.8)), (together, ([-10.0, -9.0], -1.0))):
        params = [nn.Parameter(p.detach().clone()) for p in (a, b)]
        for p in params:
            p.grad = torch.zeros_like(p)
        ProgramOptimizer(params, own, lr=0.1).step()
        assert params[0].flatten().tolist() == pytest.approx(expected[0])
        assert float(params[1].detach()) == pytest.approx(expected[1])


def test_updates_that_are_not_finite_and_bad_settings_are_refused() -> None:
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.zeros(2)
    broken = ProgramOptimizer([w], program("update = log(g)"))
    with pytest.raises(InputError, match="update of the program has 2 NaN or infinite values"):
        broken.step()
    assert w.tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match="lr is -1"):
        ProgramOptimizer([w], programs.sgd(), lr=-1)
    with pytest.raises(InputError, match="flat=True"):
        ProgramOptimizer([{"params": [w], "flat": True}], programs.sgd())
    unchecked = replace(programs.sgd(), body=())
    with pytest.raises(InputError, match="never assigns 'update'"):
        ProgramOptimizer([w], unchecked)
