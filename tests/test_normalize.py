"""Normalize gives one spelling per idea, and keeps the function: whole models, products, views and constants."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paretorch.capture import capture
from paretorch.ir.graph import origin_of
from paretorch.ir.ops import aten, is_op
from paretorch.ir.text import print_graph
from paretorch.rewrites.normalize import PASSES, normalize
from tests import tiny_transformers
from tests.graphs import Each, errors, names, zoo_normal, zoo_program
from tests.zoo import NAMES, Block, make

C = 12


# whole models


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_kept(name):
    program = zoo_program(name)
    assert errors(zoo_normal(name), program.run_original(*program.example), program.example) <= 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_twice_is_once(name):
    assert print_graph(normalize(zoo_normal(name))) == print_graph(zoo_normal(name))


@pytest.mark.parametrize("name", NAMES)
def test_each_pass_keeps_the_function(name):
    program = zoo_program(name)
    graph, expected = program.graph, program.run_original(*program.example)
    for step in PASSES:
        graph = step(graph)
        assert errors(graph, expected, program.example) <= 1e-9, step.__name__


@pytest.mark.parametrize("name", NAMES)
def test_canonical_forms_hold(name):
    graph = zoo_normal(name)
    for node in graph.calls:
        assert not is_op(node, "transpose", "alias", "clone", "addmm", "mm", "bmm", "scaled_dot_product_attention", "softmax"), node
        assert node.target is not aten("view.default")
        assert str(origin_of(node)) != "the model", f"{node} has no origin"
        if is_op(node, "add", "sub", "mul", "div"):
            assert str(node.target).endswith(".Tensor")
            assert isinstance(node.args[0], torch.fx.Node)
        if is_op(node, "permute"):
            assert not is_op(node.args[0], "permute")
            assert graph.constant(node.args[0]) is None
        if is_op(node, "view"):
            assert not is_op(node.args[0], "view")


def test_the_graph_given_is_not_changed():
    program = zoo_program("llama")
    before = print_graph(program.graph)
    normalize(program.graph)
    assert print_graph(program.graph) == before


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(name, attention, marks=() if (name, attention) in (("gpt2", "sdpa"), ("gemma3", "eager")) else pytest.mark.slow)
        for name in tiny_transformers.NAMES
        for attention in ("sdpa", "eager")
    ],
)
def test_transformers(name, attention):
    program = capture(*tiny_transformers.make(name, attention))
    graph = normalize(program.graph)
    assert errors(graph, program.run_original(*program.example), program.example) <= 1e-5
    assert print_graph(normalize(graph)) == print_graph(graph)


@pytest.mark.parametrize("name", ["vit_class", "llama"])
def test_dynamic_batch(name):
    model, inputs = make(name)
    program = capture(model, inputs, ({0: "batch"},))
    graph = normalize(program.graph)
    sizes = [node for node in graph.calls if is_op(node, "sym_size")]
    assert all(is_op(user, "expand") for node in sizes for user in node.users), "views write the batch as -1"
    for batch in (1, 5):
        other = tuple(x[:1].repeat(batch, *[1] * (x.ndim - 1)) for x in inputs)
        assert errors(graph, program.run_original(*other), other) <= 1e-5


def test_a_program_in_core_aten_becomes_the_same_kind_of_graph():
    model, inputs = make("vit_class")
    core = torch.export.export(model, inputs, strict=False).run_decompositions()
    program = capture(core, inputs)
    graph = normalize(program.graph)
    assert errors(graph, program.run_original(*inputs), inputs) <= 1e-5
    assert names(graph).count("layer_norm") == 5
    assert names(graph).count("linear") == 9
    assert not {"addmm", "mm", "transpose", "native_layer_norm"} & set(names(graph))


# golden text


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(8, 2, causal=True, gated=True, rms=True, kv_heads=1)

    def forward(self, x):
        angles = torch.arange(x.shape[1])[:, None] / 10.0 ** torch.tensor([0.0, 1.0, 0.0, 1.0])
        return self.block(x, None, (angles.cos(), angles.sin()))


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(8, 2, layout="post", spelled=True)

    def forward(self, x, seen):
        return self.block(x, (1.0 - seen[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min)


X = torch.randn(2, 5, 8)
BLOCKS = {
    "vit": (lambda: Block(8, 2, packed=True), (X,)),
    "bert": (Bert, (X, torch.ones(2, 5, dtype=torch.long))),
    "gpt": (lambda: Block(8, 2, packed=True, causal=True, spelled=False), (X,)),
    "llama": (Llama, (X,)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, golden):
    make_block, inputs = BLOCKS[name]
    graph = normalize(capture(make_block().eval(), inputs).graph)
    golden(print_graph(graph, hashes=False))


# small things


def normal(function, *inputs, weights=()):
    """The normalized graph of a function of inputs and weights, checked on the inputs."""
    module = Each([lambda x, *w: function(*inputs_of(x), *w)], *weights).eval()
    rest = list(inputs[1:])

    def inputs_of(x):
        return (x, *rest)

    program = capture(module, inputs[:1])
    graph = normalize(program.graph)
    assert errors(graph, program.run_original(*program.example), program.example) <= 1e-6
    return graph


W = torch.randn(C, 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.matmul(x, w.t().contiguous().t()),
        lambda x, w: torch.einsum("btc,cd->btd", x, w),
        lambda x, w: torch.einsum("dc,...c->...d", w.T, x),
        lambda x, w: torch.mm(x.reshape(-1, C), w).view(2, 3, 8),
        lambda x, w: torch.tensordot(x, w, dims=1),
        lambda x, w: F.linear(x, w.T),
    ],
    ids=["matmul", "transposed_twice", "einsum", "einsum_left", "mm", "tensordot", "linear"],
)
def test_a_product_with_a_constant_matrix_is_linear(function):
    assert names(normal(function, torch.randn(2, 3, C), weights=(W,))) == ["linear"]


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda x, w: torch.einsum("btc,chd->bthd", x, w), (2, 3, 6), ["linear", "view"]),
        (lambda x, w: torch.einsum("btc,chd->bhtd", x, w), (2, 3, 6), ["linear", "view", "permute"]),
        (lambda x, w: torch.einsum("bthd,chd->btc", x, w), (2, 3, 4, 5), ["view", "linear"]),
        (lambda x, w: torch.einsum("bhct,chd->bthd", x, w), (2, 4, 6, 3), ["permute", "permute", "view", "matmul", "view", "permute"]),
        (lambda x, w: torch.einsum("tcd,chd->t", x, w), (2, 6, 5), ["einsum"]),
        (lambda x, w: torch.tensordot(x, w, dims=([1, 2], [1, 2])), (2, 4, 5), ["view", "linear"]),
    ],
)
def test_contractions_with_a_constant(function, shape, expected):
    assert names(normal(function, torch.randn(shape), weights=(torch.randn(6, 4, 5),))) == expected


@pytest.mark.parametrize(("dim", "shape"), [(-1, (2, 3, 8)), (1, (2, 6, 5))])
def test_a_gated_linear_unit_is_what_it_is_made_of(dim, shape):
    x = torch.randn(shape)
    graph = normal(lambda x: F.glu(x, dim), x)
    assert names(graph)[-2:] == ["sigmoid", "mul"]
    assert "glu" not in names(graph)
    torch.testing.assert_close(graph.run(x)[0], F.glu(x, dim))


def test_a_bias_that_is_added_belongs_to_the_product():
    graph = normal(lambda x, w, b: b + x @ w, torch.randn(2, 3, C), weights=(W, torch.randn(8)))
    assert names(graph) == ["linear"]
    assert names(normal(lambda x, w, b: b + x @ w, torch.randn(8, C), weights=(W, torch.randn(8, 1)))) == ["linear", "add"]


def test_ops_of_two_names():
    def function(x):
        y = torch.multiply(x, 2.0).absolute().clip(0, 3)
        return torch.where(torch.greater(y, 1), torch.addcmul(y, x, x, value=0.5), torch.max(y, x)).square()

    found = names(normal(function, torch.randn(2, C)))
    assert found == ["mul", "abs", "clamp", "gt", "mul", "mul", "add", "maximum", "where", "pow"]


def test_a_transposed_weight_keeps_its_name():
    graph = normal(lambda x, w: x @ w.T, torch.randn(2, 8), weights=(W,))
    assert set(graph.constants) == {"weights.0"}


def test_conv1d_of_gpt2_with_tied_weights_is_transposed_once():
    graph = normal(lambda x, w, b: torch.addmm(b, torch.addmm(b, x, w), w), torch.randn(2, 8), weights=(torch.randn(8, 8), torch.randn(8)))
    assert names(graph) == ["linear", "linear"]
    assert set(graph.constants) == {"weights.0_transposed", "weights.1"}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.transpose(0, 1).transpose(0, 1) + 1, ["add"]),
        (lambda x: x.permute(2, 0, 1).permute(1, 0, 2) * 2, ["permute", "mul"]),
        (lambda x: x.view(6, C).view(3, 2, C).reshape(-1) + 1, ["view", "add"]),
        (lambda x: x.flatten(1).unflatten(1, (3, C)) + 1, ["add"]),
        (lambda x: x.unsqueeze(1).reshape(6, C).squeeze() + 1, ["view", "add"]),
        (lambda x: x.transpose(1, 2).contiguous().view(2, 36) + 1, ["permute", "view", "add"]),
        (lambda x: F.dropout(x.clone().detach(), 0.5, False).to(x.dtype).expand(2, 3, C) + 0 + 1, ["add"]),
        (lambda x: 2 - x, ["mul", "add"]),
        (lambda x: (x + torch.tensor(2.0)) * x.add(1, alpha=2), ["add", "add", "mul"]),
        (lambda x: x.exp() + x.exp(), ["exp", "add"]),
        (lambda x: x + torch.arange(C).float().sin()[None] * torch.ones(3, 1), ["add"]),
        (lambda x: x.double().float() + 1, ["add"]),
        (lambda x: torch.cat([torch.zeros(0), x, x.new_zeros(2, 0, C)], 1) + 1, ["add"]),  # a cache that holds nothing yet
        (lambda x: torch.cat([x, x[:, 1:2], x.new_zeros(2, 0, C)], 1), ["slice", "cat"]),
        (lambda x: F.adaptive_avg_pool1d(x, 1) + 1, ["mean", "add"]),
        (lambda x: F.adaptive_avg_pool1d(x, 2), ["adaptive_avg_pool"]),
        (lambda x: x.half().float(), ["to", "to"]),
        (lambda x: x + torch.rand(0).sum(), None),
    ],
)
def test_spelling(function, expected):
    torch.manual_seed(0)
    graph = normal(function, torch.randn(2, 3, C))
    assert expected is None or names(graph) == expected


def test_equal_masks_are_one_constant():
    def masks(x):
        return sum(torch.where(torch.arange(C) > 4, x, x + i) for i in range(3))

    assert len(normal(masks, torch.randn(2, C)).constants) == 1


def test_a_large_constant_stays_computed():
    graph = normal(lambda x: x + torch.arange(1 << 13).float()[:, None].mul(torch.arange(1 << 12).float()).sum(), torch.randn(1))
    assert all(tensor.numel() < 1 << 25 for tensor in graph.constants.values())


def test_what_the_caller_gets_may_be_written_into():
    functions = [lambda x, w: x.clone(), lambda x, w: w.clone(), lambda x, w: w * 2, lambda x, w: torch.cat([x, x.new_zeros(0)])]
    x = torch.zeros(3)
    program = capture(Each(functions, torch.ones(3)).eval(), (x, x, x, x))
    graph = normalize(program.graph)
    for _ in range(2):
        found = graph.run(*program.example)
        assert [float(value[0]) for value in found] == [0.0, 1.0, 2.0, 0.0]
        for value in found:
            value.fill_(7.0)


def test_a_model_that_counts_its_calls_is_not_folded():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    model = Counts().eval()
    program = capture(model, torch.ones(2))
    module = normalize(program.graph).module()
    assert [float(program.call(module, (torch.ones(2),), {})[0]) for _ in range(3)] == [1.0, 2.0, 3.0]


def test_eval_batch_norm_is_one_op():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)).eval()
    x = torch.randn(2, 3, 6, 6)
    core = torch.export.export(model, (x,), strict=False).run_decompositions()
    for given in (model, core):
        program = capture(given, x)
        graph = normalize(program.graph)
        assert names(graph) == ["convolution", "batch_norm", "group_norm"]
        assert errors(graph, program.run_original(x), (x,)) <= 1e-5


@pytest.mark.slow
def test_normalize_is_quick():
    import time

    from tests.zoo import ViT

    program = capture(ViT(197, 384, 6, depth=12).eval(), torch.randn(1, 3, 2, 392))
    began = time.perf_counter()
    normalize(program.graph)
    assert time.perf_counter() - began < 3
