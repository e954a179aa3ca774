"""Torch ops made of records: one named tuple is an op's schema, what its kernels take, and the C++ struct's twin.

An `Op` has two functions of a record: `allocate`, which makes the results and is the op's fake, and `launch`, which fills them.
An eager call on plain tensors runs them at once. Whatever stands between a call and its kernel (torch.compile, a tensor
subclass, a mode, functorch, autocast, a profiler) meets ``torch.ops.dnc_kernels.<name>`` in the dispatcher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import signature
from ..errors import describe
from ._common import kernels
from ._flops import count_flops

NAMESPACE = "dnc_kernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
#: Every op by its name.
OPS: dict[str, Op[Any]] = {}
R = TypeVar("R")
Record = TypeVar("Record", bound=type)

_C = torch._C
_AUTOGRAD = _C.DispatchKey.AutogradOther


def plain(call: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would find nothing to do for a call but autograd and the kernel."""
    return not (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._are_functorch_transforms_active()
        or _C._is_torch_function_mode_enabled()
        or _C._is_any_autocast_enabled()
        or _C._get_tracing_state() is not None
        or _C._autograd._profiler_enabled()  # who looks for the op finds it
        or (_C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD) and not torch.is_inference_mode_enabled())  # in another op
        or signature(call) is None
    )


def record(cls: Record) -> Record:
    """Decorator of a named tuple of arguments or results: its repr shows shapes, dtypes and strides, not values."""

    def shown(value: Any) -> str:
        return f"{describe(value)}, strides {list(value.stride())}" if isinstance(value, Tensor) else repr(value)

    def text(self: Any) -> str:
        return f"{cls.__name__}({', '.join(f'{k}={shown(v)}' for k, v in self._asdict().items() if v is not None)})"

    cls.__repr__ = text  # type: ignore[method-assign,assignment]
    return cls


class Op(Generic[R]):
    """A torch op of a record: ``op(call, *more)`` gives the results.

    Args:
        family: whose kernels it runs.
        name: of the op, in torch.ops.dnc_kernels, and of the kernels' launchers ``f(call, results)``, one for each backend.
        allocate: ``allocate(call, *more)`` makes the results: a tensor, a named tuple of tensors, or None for an op that
            changes its arguments. A result that was not asked for is None. The annotations, `call` being a named tuple, are the
            op's schema.
        reference: ``reference(call, *more)`` gives the results in plain torch, differentiable as torch is.
        launch: ``launch(call, results, *more)`` fills them, where that is more than the launcher of that name.
        flops: ``flops(call, *more)``: floating-point operations of its matrix products, which is what torch's FlopCounterMode
            counts of an op.
        mutates: fields of the record that are changed in place.
    """

    def __init__(
        self,
        family: str,
        name: str,
        allocate: Callable[..., R],
        reference: Callable[..., R] | None = None,
        *,
        launch: Callable[..., None] | None = None,
        flops: Callable[..., int] | None = None,
        mutates: tuple[str, ...] = (),
    ) -> None:
        self.family, self.name, self.allocate, self.reference, self.mutates = family, name, allocate, reference, mutates
        self.launch = launch or self._launch
        self._launchers: dict[str, Callable[..., None]] = {}
        hints = get_type_hints(allocate)
        self._results = hints.pop("return")
        self._named = hasattr(self._results, "_fields")
        self._record, *_ = hints.values()
        self._width = len(self._record._fields)
        self._optional = any(a != Tensor for a in get_type_hints(self._results).values()) if self._named else False
        self._inputs: Callable[[Any], tuple[Tensor | None, ...]] | None = None

        arguments = {**get_type_hints(self._record), **dict(list(hints.items())[1:])}
        _library.define(name + _schema(arguments, len(self._results._fields) if self._named else self._results, mutates))
        _library.impl(name, self._kernel, "CompositeExplicitAutograd")
        _library.impl(name, self._autograd, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake, lib=_library)
        for device in ("CPU", "CUDA"):
            _library.impl(name, self._autocast, f"Autocast{device}")
        OPS[name] = self
        packet = getattr(torch.ops.dnc_kernels, name)
        self.overload = packet.default
        if flops is not None:
            count_flops(packet, lambda *flat, out_val=None: flops(*self._records(flat)))

    def differentiable(
        self,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        save: Callable[..., None],
        backward: Callable[..., tuple[Tensor | None, ...]],
        formula: Callable[..., Any] | None = None,
    ) -> None:
        """Make the op differentiable: once by its kernels, and where `save` keeps the call any number of times.

        Args:
            inputs: fields of the record that may get a gradient.
            outputs: fields of the results that have one; a lone tensor has no name.
            save: ``save(ctx, results, call, *more)`` keeps what `backward` needs.
            backward: ``backward(ctx, *gradients)``, one for each of `outputs` or None, gives those of `inputs`, in order;
                ``needed(ctx)`` says which count.
            formula: ``formula(call, *more)`` gives the differentiable results in plain torch, for higher derivatives; None:
                those of the reference.
        """
        self._inputs = attrgetter(*inputs) if len(inputs) > 1 else lambda call: (getattr(call, inputs[0]),)
        self.outputs = tuple(self._results._fields.index(name) for name in outputs) if self._named else ()
        self.save, self.backward, self.inputs, self.formula = save, backward, inputs, formula or self._referred

    def _referred(self, call: Any, *more: Any) -> Any:
        assert self.reference is not None
        results: Any = self.reference(call, *more)
        return tuple(results[i] for i in self.outputs) if self._named else results

    def __call__(self, call: Any, *more: Any) -> R:
        """The results, of the kernel that ``call.backend`` names or of the reference, with a graph where one is wanted."""
        if self.reference is not None and call.backend == "reference":
            return self.reference(call, *more)
        if not plain(call):
            return self._unpacked(self.overload(*call, *more))
        if self._inputs is not None and torch.is_grad_enabled():
            return self._differentiable(_apply_eagerly, self._run, call, more)
        return self._run(call, *more)

    def _differentiable(self, apply: Callable[..., Any], run: Callable[..., R], call: Any, more: tuple[Any, ...]) -> R:
        """The results of ``run(call, *more)``, with a graph where an input requires one. apply: of `_Differentiable`."""
        assert self._inputs is not None
        inputs = self._inputs(call)
        at = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
        if not at:
            return run(call, *more)
        task = _Task(self, run, call, more, at)
        made = apply(task, *[inputs[i] for i in at])
        if not self._named:
            return made
        results: list[Any] = list(task.results)
        if len(self.outputs) == 1:
            results[self.outputs[0]] = made
        else:
            for i, t in zip(self.outputs, made, strict=True):
                results[i] = t
        return self._results(*results)

    def _launch(self, call: Any, results: R, *_: Any) -> None:
        launcher = self._launchers.get(call.backend)
        if launcher is None:
            launcher = self._launchers[call.backend] = getattr(kernels(self.family, call.backend), self.name)
        launcher(call, results)

    def into(self, call: Any, results: R, *more: Any) -> None:
        """Fill given results; no autograd."""
        if self.reference is None or call.backend != "reference":
            self.launch(call, results, *more)
            return
        with torch.no_grad():
            found = self.reference(call, *more)
        pairs: Any = zip(results, found, strict=True) if self._named else ((results, found),)  # type: ignore[call-overload]
        for target, value in pairs:
            if target is not None:
                target.copy_(value)

    def _run(self, call: Any, *more: Any) -> R:
        results = self.allocate(call, *more)
        self.launch(call, results, *more)
        for field in self.mutates:
            changed = getattr(call, field)
            if changed is not None and not changed.is_inference():
                torch.autograd.graph.increment_version(changed)
        return results

    # Below: the dispatcher's kernels, on flat arguments. A result that was not asked for is an empty tensor of booleans there.

    def _records(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._record(*flat[: self._width]), *flat[self._width :]

    def _named_results(self, results: Any) -> Any:
        return self._results(*results) if self._named else results

    def _unpacked(self, results: Any) -> Any:
        if self._optional:
            results = (None if t.dtype == torch.bool else t for t in results)
        return self._named_results(results)

    def _packed(self, results: Any, like: Tensor) -> Any:
        if not self._named:
            return results
        return tuple(like.new_empty(0, dtype=torch.bool) if t is None else t for t in results)

    def _kernel(self, *flat: Any) -> Any:
        return self._packed(self._run(*self._records(flat)), flat[0])

    def _fake(self, *flat: Any) -> Any:
        return self._packed(self.allocate(*self._records(flat)), flat[0])

    def _below(self, call: Any, *more: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._unpacked(self.overload(*call, *more))

    def _autograd(self, *flat: Any) -> Any:
        call, *more = self._records(flat)
        if forward_ad._current_level >= 0 and any(
            isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in flat
        ):
            raise RuntimeError(
                f"{NAMESPACE}::{self.name} has no forward-mode derivative; the function of dnc_kernels.ops has one"
            )
        if self._inputs is not None and torch.is_grad_enabled():
            results = self._differentiable(_Differentiable.apply, self._below, call, tuple(more))
        elif torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return _Refusing.apply(self, call, more, *(t for t in flat if isinstance(t, Tensor)))
        else:  # as they are: a tracer would see a new tensor for each that was not asked for
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*flat)
        return self._packed(results, flat[0])

    def _autocast(self, *flat: Any) -> Any:
        """Inputs as they are: bfloat16 features are read in place, float32 ones keep their precision, sums are float32."""
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return self.overload(*flat)


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _schema(arguments: dict[str, Any], results: Any, mutates: tuple[str, ...]) -> str:
    """The schema of arguments with these annotations; results: how many tensors, or the annotation itself."""

    def op() -> None: ...

    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=a) for n, a in arguments.items()]
    returned: Any = None if results is type(None) else results
    if isinstance(results, int):
        returned = tuple.__class_getitem__((Tensor,) * results)
    op.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.infer_schema(op, mutates_args=mutates)


class _Task:
    """What is differentiated: ``run(call, *more)`` of an op, in the inputs `at`."""

    __slots__ = ("at", "call", "more", "op", "results", "run")

    def __init__(self, op: Op[Any], run: Callable[..., Any], call: Any, more: tuple[Any, ...], at: list[int]) -> None:
        self.op, self.run, self.call, self.more, self.at = op, run, call, more, at
        self.results: Any = None


class _Differentiable(torch.autograd.Function):
    """``apply(task, *inputs)``: the differentiable results, all of them in ``task.results``."""

    @staticmethod
    def forward(ctx: Any, task: _Task, *_: Tensor) -> Any:
        op = task.op
        results = task.results = task.run(task.call, *task.more)
        ctx.op, ctx.at, ctx.more = op, task.at, task.more
        op.save(ctx, results, task.call, *task.more)
        if len(op.outputs) == 1:
            return results[op.outputs[0]]
        ctx.set_materialize_grads(False)
        return tuple([results[i] for i in op.outputs]) if op.outputs else results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # under create_graph=True
            return None, *_with_derivatives(ctx, grads)
        return None, *_backward(ctx, *grads)


#: ``_Differentiable.apply`` without its questions about functorch, which `plain` has asked.
_apply_eagerly = super(torch.autograd.Function, _Differentiable).apply


def _backward(ctx: Any, *grads: Tensor | None) -> list[Tensor | None]:
    if grads[0] is None and all(g is None for g in grads):
        return [None] * len(ctx.at)
    found = ctx.op.backward(ctx, *grads)
    return [found[i] for i in ctx.at]


def _with_derivatives(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What `_backward` makes, and its own derivatives: those of the op's formula in plain torch, where the call was kept."""
    if getattr(ctx, "places", None) is None:
        raise RuntimeError(
            f"{NAMESPACE}::{ctx.op.name} made its gradient in the forward pass, which has no derivative of its own: call "
            'backward without create_graph=True, or for second derivatives use backend="reference" '
            '(`with dnc_kernels.use_backend("reference")` for a whole layer)'
        )
    call, _ = saved_call(ctx)
    inputs = [getattr(call, ctx.op.inputs[i]) for i in ctx.at]
    return _Derivatives.apply(ctx, call, len(grads), *grads, *inputs)


class _Derivatives(torch.autograd.Function):
    """``apply(ctx, call, count, *gradients, *inputs)``: gradients of an op's inputs for `count` incoming ones."""

    @staticmethod
    def forward(own: Any, ctx: Any, call: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        own.ctx, own.call, own.count = ctx, call, count
        own.save_for_backward(*tensors)
        own.set_materialize_grads(False)
        return tuple(_backward(ctx, *tensors[:count]))

    @staticmethod
    def backward(own: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        op, again = own.ctx.op, torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that what the tensors themselves are made of stays out
            fresh = [t.view_as(t) if t is not None and t.requires_grad else t for t in own.saved_tensors]
            grads, inputs = fresh[: own.count], fresh[own.count :]
            call = own.call._replace(**{op.inputs[i]: t for i, t in zip(own.ctx.at, inputs, strict=True)})
            outputs = op.formula(call, *own.ctx.more)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            firsts = _gradients(outputs, grads, inputs, create_graph=True)
            at = [i for i, t in enumerate(fresh) if t is not None and t.requires_grad]
            found = _gradients(firsts, seconds, [fresh[i] for i in at], create_graph=again)
        made: list[Tensor | None] = [None] * len(fresh)
        for i, g in zip(at, found, strict=True):
            made[i] = g
        return None, None, None, *made


def _gradients(
    outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], inputs: Sequence[Tensor], *, create_graph: bool
) -> Sequence[Tensor | None]:
    """Gradients of inputs for those of the outputs that have one."""
    pairs = [
        (o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    ends, incoming = zip(*pairs, strict=True)
    return torch.autograd.grad(ends, inputs, incoming, create_graph=create_graph, allow_unused=True)


def needed(ctx: Any) -> list[bool]:
    """Which of an op's inputs need a gradient."""
    need = [False] * len(ctx.op.inputs)
    for i, asked in zip(ctx.at, ctx.needs_input_grad[1:], strict=True):
        need[i] = asked
    return need


class _Refusing(torch.autograd.Function):
    """``apply(op, call, more, *tensors)``: the results of an op that has no derivative."""

    @staticmethod
    def forward(ctx: Any, op: Op[Any], call: Any, more: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.name = op.name
        return op._packed(op._below(call, *more), tensors[0])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{NAMESPACE}::{ctx.name} has no derivative: it is that of another op, or of nothing differentiable")


def save_call(ctx: Any, call: Any, *more: Tensor | None) -> None:
    """Keep a call, and more tensors, for backward: `saved_call` gives them back."""
    tensors = [(i, v) for i, v in enumerate(call) if isinstance(v, Tensor)]
    ctx.call, ctx.places = call._replace(**{call._fields[i]: None for i, _ in tensors}), [i for i, _ in tensors]
    ctx.save_for_backward(*(t for _, t in tensors), *more)


def saved_call(ctx: Any) -> tuple[Any, tuple[Any, ...]]:
    """The call that `save_call` kept, and the other tensors."""
    tensors, values = ctx.saved_tensors, list(ctx.call)
    for place, tensor in zip(ctx.places, tensors, strict=False):
        values[place] = tensor
    return type(ctx.call)(*values), tensors[len(ctx.places) :]
