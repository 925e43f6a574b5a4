"""Recorded PyTorch graphs, made shorter: each pass removes something and changes no value."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_keras import GemmaCausalLM
from tests.models import GENERATIONS, write_tiny_hf

pytestmark = [pytest.mark.keras, pytest.mark.backends("torch")]


def recorded(function, *tensors):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda *flat: list(function(*flat)))(*tensors)


def count(graph_module):
    return sum(node.op == "call_function" for node in graph_module.graph.nodes)


def after(graph_module, simplify):
    """The graph's calls before and after a pass, and the graph."""
    from gemma_keras.generate import torch_graph as passes

    before = count(graph_module)
    getattr(passes, simplify)(graph_module)
    passes._drop_unused(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    return before, count(graph_module)


def functions(torch):
    """A pass to a function of one tensor `(2, 6)` on which it has something to do, and its counts."""
    weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def norm(x):
        return [x * torch.rsqrt(torch.mean(x.pow(2), -1, keepdim=True) + 1e-6) * (1 + weight)]

    return {
        "drop_copies": (lambda x: [x.detach() * torch.as_tensor(2.0)], 3, 1),
        "fold_constants": (lambda x: [x + torch.arange(6) * 2 + torch.arange(6) * 2], 6, 2),
        "join_views": (lambda x: [x.view(3, 4)[None].view(12).view(1, 12) + 1], 5, 2),
        "merge_repeats": (lambda x: [torch.cos(x * 2) + torch.cos(x * 2)], 5, 3),
        "fuse_norms": (norm, 7, 2),
    }


@pytest.mark.parametrize(
    "simplify", ["drop_copies", "fold_constants", "join_views", "merge_repeats", "fuse_norms"]
)
def test_a_pass_removes_calls_and_changes_no_value(simplify):
    import torch

    function, before, fewer = functions(torch)[simplify]
    x = torch.linspace(-3, 4, 12).view(2, 6)
    with torch.inference_mode():
        graph = recorded(function, x)
        assert after(graph, simplify) == (before, fewer)
        other = torch.linspace(5, -1, 12).view(2, 6)
        assert torch.equal(graph(other)[0], function(other)[0])


def test_what_is_written_in_place_is_read_when_it_was_read():
    import torch

    from gemma_keras.generate.torch_graph import simplified

    def function(cache, x):
        before = (cache.view(-1) * 2).sum()
        cache.index_copy_(0, torch.tensor([1]), x)
        return cache, before, (cache.view(-1) * 2).sum()

    with torch.inference_mode():
        cache, x = torch.ones(3, 2), torch.full((1, 2), 5.0)
        run = simplified(recorded(function, cache.clone(), x))
        found, before, then = run(cache, x)
    assert found is cache
    assert (before.item(), then.item()) == (12.0, 28.0)


def test_random_numbers_are_drawn_each_time():
    import torch

    from gemma_keras.generate.torch_graph import simplified

    with torch.inference_mode():
        run = simplified(
            recorded(lambda x: [torch.rand_like(x) - torch.rand_like(x)], torch.ones(9))
        )
        assert (run(torch.ones(9))[0] != 0).any()


def test_parameters_are_read_when_the_graph_runs():
    import torch

    from gemma_keras.generate.torch_graph import simplified

    weight = torch.nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        run = simplified(recorded(lambda x: [x * (weight + 1)], torch.ones(3)))
        weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        np.testing.assert_array_equal(run(torch.ones(3))[0], [2, 3, 4])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("rows_differ", [False, True])
def test_a_models_token_is_the_same_in_about_half_the_calls(
    tmp_path, generation, dtype, rows_differ
):
    import torch
    from keras import tree

    from gemma_keras.generate.torch_graph import simplified

    write_tiny_hf(tmp_path, generation)
    backbone = GemmaCausalLM.from_preset(tmp_path, dtype=dtype).backbone
    ids = np.random.default_rng(0).integers(4, 300, (2, 9)).astype("int32")
    start = torch.tensor([9, 7] if rows_differ else 9, dtype=torch.int32)
    with torch.inference_mode():
        lengths = torch.tensor([9, 7 if rows_differ else 9], dtype=torch.int32)
        _, cache = backbone.prefill(ids, lengths, 20)
        structure = tree.map_structure(lambda _: 0, cache)

        def token(*flat):
            cache = tree.pack_sequence_as(structure, flat[:-2])
            hidden, cache = backbone.call_with_cache(flat[-2], cache, flat[-1])
            return [hidden, *tree.flatten(cache)]

        def arguments():
            copies = [array.clone() for array in tree.flatten(cache)]
            return [*copies, torch.tensor([[5], [6]], dtype=torch.int32), start]

        graph = recorded(token, *arguments())
        calls, expected = count(graph), graph(*arguments())
        run = simplified(graph)
        # bfloat16 keeps the conversions around its norms
        assert count(graph) < calls * (0.5 if dtype == "float32" else 0.6)
        for found, value in zip(run(*arguments()), expected, strict=True):
            assert torch.equal(found, value)
