"""Simplifies a recorded PyTorch graph without changing its results.

A graph that `make_fx` records has every operation that Keras called. Python calls each of them
again for each token. For a small model the calls take as long as the computation. So unnecessary
calls are removed: constants made of constants, values that every layer computes again from the same
position, views of views.

The cache, which is changed in place, is not simplified, and neither are its views, because the
order of reads and writes matters. Weights are read when the graph runs, and never folded.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
# Operations that return their first argument, if neither is written to.
_COPIES = {_aten.lift_fresh_copy.default, _aten.detach.default, _aten.alias.default}
# Results that show the numbers of their first argument in another arrangement.
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.expand.default,
}
_LARGEST_CONSTANT = 1 << 20  # maximum number of values of a constant; larger ones are recomputed


def simplified(recorded: fx.GraphModule) -> Callable[..., Any]:
    """A function that computes what a recorded graph computes, in fewer and quicker calls.

    Args:
        recorded: the result of `make_fx` for a function of tensors that returns a list of tensors.
            Its tensors that are not a `torch.nn.Parameter` are treated as constants. It is changed.

    Returns:
        A function of tensors of the same shapes, strides and dtypes. It reads the parameters
        themselves, so what is written to them in place counts.
    """
    for simplify in (drop_copies, fold_constants, join_views, merge_repeats, fuse_norms):
        simplify(recorded)
        _drop_unused(recorded.graph)
    call_directly(recorded)
    return _function(recorded)


def drop_copies(recorded: fx.GraphModule) -> None:
    """Take out copies, and conversions to the dtype that a tensor has."""
    written = _written(recorded.graph)
    for node in _calls(recorded.graph):
        if node.target in _COPIES or _keeps_its_dtype(node):
            source = node.all_input_nodes[0]
            if not written & {node, source}:
                _replace(node, source)


def fold_constants(recorded: fx.GraphModule) -> None:
    """Compute once what depends only on constants, and keep one of several equal ones."""
    graph, written = recorded.graph, _written(recorded.graph)
    values: dict[fx.Node, torch.Tensor] = {}
    holders: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        value = None if node in written else _constant_value(recorded, node, values)
        if value is None:
            continue
        is_parameter = isinstance(value, torch.nn.Parameter)
        key = id(value) if is_parameter else _contents(value)
        if key not in holders:
            holders[key] = node if node.op == "get_attr" else _hold(recorded, node, value)
        if not is_parameter:
            values[node] = values[holders[key]] = value
        if holders[key] is not node:
            _replace(node, holders[key])


def join_views(recorded: fx.GraphModule) -> None:
    """Make one view of a view of a view, and none where a view has its tensor's own shape.

    Two contiguous tensors over the same values have them in the same order, so all views between
    them are equivalent to one.
    """
    graph = recorded.graph
    for node in _calls(graph):
        if node.target not in _VIEWS or not _is_whole(node, node):
            continue
        root = chain = node
        while chain.target in _VIEWS:
            chain = chain.all_input_nodes[0]
            root = chain if _is_whole(chain, node) else root
        shape = list(_value(node).shape)
        if root is node:
            continue
        if list(_value(root).shape) == shape:
            _replace(node, root)
            continue
        with graph.inserting_before(node):
            view = graph.call_function(_aten.view.default, (root, shape))
        view.meta = dict(node.meta)
        _replace(node, view)


def merge_repeats(recorded: fx.GraphModule) -> None:
    """Compute once what is computed several times from the same arguments."""
    written = _written(recorded.graph)
    found: dict[Any, fx.Node] = {}
    for node in _calls(recorded.graph):
        if _is_pure(node) and not written & {node, *node.all_input_nodes}:
            # a node is written as its name, which no other has; so are numbers, 1 unlike 1.0
            first = found.setdefault(repr((node.target, node.args, node.kwargs)), node)
            if first is not node:
                _replace(node, first)


def fuse_norms(recorded: fx.GraphModule) -> None:
    """Call root mean square norms as one: the same operations in the same order, inside PyTorch."""
    graph = recorded.graph
    for node in _calls(graph):
        found = _norm(node)
        if found is not None:
            x, weight, epsilon = found
            with graph.inserting_before(node):
                shape = list(_value(weight).shape)
                norm = graph.call_function(torch.rms_norm, (x, shape, weight, epsilon))
            norm.meta = dict(node.meta)
            _replace(node, norm)


# Of a norm, from its end: each operation, and which argument is the operation before it.
_NORM = (
    (_aten.mul.Tensor, 0),
    (_aten.mul.Tensor, 1),
    (_aten.rsqrt.default, 0),
    (_aten.add.Tensor, 0),
    (_aten.mean.dim, 0),
    (_aten.pow.Tensor_Scalar, 0),
)


def _norm(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """Of `x * rsqrt(mean(x ** 2) + epsilon) * weight`: x, weight and epsilon."""
    steps, step = [], node
    for target, place in _NORM:
        if not isinstance(step, fx.Node) or step.target is not target:
            return None
        steps.append(step)
        step = step.args[place]
    _, normed, _, shifted, mean, square = steps
    x, weight, epsilon = normed.args[0], node.args[1], shifted.args[1]
    if square.args != (x, 2) or mean.args[1:] != ([-1], True) or not isinstance(epsilon, float):
        return None
    if not isinstance(weight, fx.Node) or _value(weight).shape != _value(x).shape[-1:]:
        return None
    return x, weight, epsilon


def call_directly(recorded: fx.GraphModule) -> None:
    """Call `torch.add`, not `torch.ops.aten.add.Tensor`: the same, in half the time for a call."""
    for node in _calls(recorded.graph):
        if node.target is _aten._softmax.default and not node.args[2]:
            node.target, node.args = torch.softmax, node.args[:2]
        elif node.target is _aten._to_copy.default and list(node.kwargs) == ["dtype"]:
            node.target, node.args = torch.Tensor.to, (node.args[0], node.kwargs["dtype"])
            node.kwargs = {}
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = _public(node.target) or node.target


def _public(operation: Any) -> Callable[..., Any] | None:
    """Returns PyTorch's own function or method of the operation, if it is not a Python function."""
    namespace, name = operation._schema.name.split("::")
    if namespace != "aten" or name.startswith("_"):
        return None
    for holder in (torch, torch._C._nn, torch.Tensor):
        function = getattr(holder, name, None)
        if isinstance(function, types.BuiltinFunctionType | types.MethodDescriptorType):
            return function
    return None


def _function(recorded: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a function. What it holds become arguments: attributes of modules are slow."""
    graph, held = recorded.graph, []
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "get_attr":
            held.append(getattr(recorded, str(node.target)))
            with graph.inserting_before(first):
                _replace(node, graph.placeholder(f"held_{len(held)}"))
    graph.lint()
    run = fx.GraphModule({}, graph).forward
    return lambda *tensors: run(*held, *tensors)


# --- what a node is, and what may be done to it ---


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _value(node: fx.Node) -> torch.Tensor:
    """A tensor without numbers, of the node's shape, strides and dtype."""
    return node.meta["val"]


def _replace(node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or _is_pure(node)):
            graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    """Whether a call gives the same for the same arguments, and changes nothing."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not _is_mutable(node) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _shows(node: fx.Node) -> list[fx.Node]:
    """The arguments whose numbers the result may show, or the call may change."""
    if node.target is operator.getitem or node.target in _COPIES | _VIEWS:
        return node.all_input_nodes
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False))
    given |= node.kwargs
    shown = [given.get(a.name) for a in arguments if a.alias_info is not None]
    flat = [value for one in shown for value in (one if isinstance(one, list) else [one])]
    return [value for value in flat if isinstance(value, fx.Node)]


def _written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose numbers some call changes."""
    pairs = [(node, source) for node in _calls(graph) for source in _shows(node)]
    written: set[fx.Node] = {node for node in _calls(graph) if _is_mutable(node)}
    count = -1
    while len(written) != count:
        count = len(written)
        for pair in pairs:
            if written.intersection(pair):
                written.update(pair)
    return written


def _is_whole(node: fx.Node, like: fx.Node) -> bool:
    """Whether a node's value is contiguous, and of as many numbers as another's."""
    value = node.meta["val"]
    return (
        isinstance(value, torch.Tensor)
        and value.is_contiguous()
        and value.numel() == _value(like).numel()
    )


def _keeps_its_dtype(node: fx.Node) -> bool:
    return (
        node.target is _aten._to_copy.default
        and list(node.kwargs) == ["dtype"]
        and node.kwargs["dtype"] == _value(node.all_input_nodes[0]).dtype
    )


# --- constants ---


def _constant_value(recorded: fx.GraphModule, node: fx.Node, values) -> torch.Tensor | None:
    """Returns the constant value of a node: a parameter or an array; `None` if it may change or is
    large.

    Args:
        recorded: the graph's.
        node: one of its nodes.
        values: those of earlier nodes.
    """
    if node.op == "get_attr":
        value = getattr(recorded, str(node.target))
        if isinstance(value, torch.nn.Parameter):
            return value
    elif node.op == "call_function" and _is_pure(node) and node.target is not operator.getitem:
        if not isinstance(_value(node), torch.Tensor):
            return None
        if _value(node).numel() > _LARGEST_CONSTANT or not values.keys() >= set(
            node.all_input_nodes
        ):
            return None
        assert not isinstance(node.target, str)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        value = node.target(*args, **kwargs)
    else:
        return None
    return value if value.numel() <= _LARGEST_CONSTANT else None


def _contents(value: torch.Tensor) -> tuple[Any, ...]:
    """Returns a key that equal constants share."""
    numbers = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value.dtype, value.shape, value.stride(), value.device, numbers


def _hold(recorded: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> fx.Node:
    """A node that gets a constant, before another node."""
    name = f"folded_{node.name}"
    recorded.register_buffer(name, value)
    with recorded.graph.inserting_before(node):
        held = recorded.graph.get_attr(name)
    held.meta = dict(node.meta)
    return held
