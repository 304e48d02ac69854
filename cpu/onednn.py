"""oneDNN, from Paddle's own wheel, called directly: products, GELU and casts of CPU tensors.

On a CPU Paddle's eager mode never uses oneDNN, and MKL for float32 products only. Here are bfloat16
products that accumulate in float32, additions and multiplications within a product, GELU and its
gradient on all threads. Names and numbers are those of oneDNN's C API, version 3
(https://uxlfoundation.github.io/oneDNN).

A primitive is made once per set of shapes and kept. All calls wait for their result.
``RESMLP_ONEDNN=off`` leaves all this unused; `has` tells.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import threading
from pathlib import Path

import paddle

from cpu import setup

_MAJOR = 3  # of the C API below
_CPU_ENGINE, _IN_ORDER, _FORWARD_TRAINING = 1, 1, 64
_GELU_ERF = 0x31
_BINARY = {"add": 0x1FFF0, "multiply": 0x1FFF1}
_SRC, _SRC_1, _DST, _WEIGHTS, _BIAS, _DIFF_SRC, _DIFF_DST = 1, 2, 17, 33, 41, 129, 145
_POST_OP = 2**15
_QUERY_IMPLEMENTATION = 8
_TYPES = {paddle.bfloat16: 2, paddle.float32: 3}
_log = logging.getLogger("resmlp")


class Unsupported(Exception):
    """oneDNN is missing, or refuses a combination of shapes and types."""


class _Argument(ctypes.Structure):
    _fields_ = [("name", ctypes.c_int), ("memory", ctypes.c_void_p)]


class _Library:
    """The library with its engine and stream; every call is checked."""

    def __init__(self):
        path = Path(paddle.__file__).parent / "libs" / "libdnnl.so.3"
        try:
            self._functions = ctypes.CDLL(str(path))
            self._functions.dnnl_version.restype = ctypes.POINTER(ctypes.c_int)
            major = self._functions.dnnl_version()[0]
        except (OSError, AttributeError) as error:
            raise Unsupported(f"none in this Paddle that can be called ({error})") from None
        if major != _MAJOR:
            raise Unsupported(f"this Paddle brings version {major}, not {_MAJOR}")
        self.engine = self.new("engine_create", _CPU_ENGINE, ctypes.c_size_t(0))
        self.stream = self.new("stream_create", self.engine, _IN_ORDER)
        self.set_data_handle = self._functions.dnnl_memory_set_data_handle
        self.execute = self._functions.dnnl_primitive_execute

    def call(self, name: str, *arguments) -> None:
        if getattr(self._functions, f"dnnl_{name}")(*arguments):
            raise Unsupported(f"{name} was refused")

    def implementation(self, descriptor: ctypes.c_void_p) -> bytes:
        name = ctypes.c_char_p()
        self.call("primitive_desc_query", descriptor, _QUERY_IMPLEMENTATION, 0, ctypes.byref(name))
        return name.value

    def implemented_by(self, name: bytes, descriptor: ctypes.c_void_p) -> ctypes.c_void_p | None:
        """The descriptor, moved on to an implementation of that name; None where there is none."""
        while not self.implementation(descriptor).startswith(name):
            if self._functions.dnnl_primitive_desc_next_impl(descriptor):
                return None
        return descriptor

    def new(self, name: str, *arguments) -> ctypes.c_void_p:
        """What a ``..._create`` function puts where its first argument points."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle


@functools.cache
def _library() -> _Library:
    if not setup.enabled("RESMLP_ONEDNN"):
        raise Unsupported("switched off (RESMLP_ONEDNN)")
    return _Library()


@functools.cache
def has(dtype) -> bool:
    """Whether the functions below can be used on tensors of a type; if not, one line says why."""
    try:
        x = paddle.ones([2, 2], dtype)
        multiply(gelu(product(x, x, then=[("add", x)])), x[0])
    except Unsupported as error:
        if dtype == paddle.float32:
            _log.info(f"oneDNN: {error}; Paddle's own layers are used instead")
        return False
    return True


@functools.cache
def _log_once(text: str) -> None:
    _log.info(text)


def _or_step_by_step(function):
    """Does in steps what oneDNN refuses to do at once, and bfloat16 in float32 without AVX-512."""

    @functools.wraps(function)
    def attempt(*arguments, then=(), dtype=None, out=None, **options):
        dtype = arguments[0].dtype if dtype is None else dtype
        try:
            return function(*arguments, then=then, dtype=dtype, out=out, **options)
        except Unsupported as error:
            if then:
                y = attempt(*arguments, dtype=dtype, out=out, **options)
                for name, other in then:
                    y = y.add_(other) if name == "add" else y.multiply_(other)
                return y
            if arguments[0].dtype != paddle.bfloat16:
                raise
            _log_once(f"oneDNN: {error} in bfloat16, to which results are rounded instead")
            wide = [
                cast(a, paddle.float32) if getattr(a, "dtype", None) == paddle.bfloat16 else a
                for a in arguments
            ]
            return cast(attempt(*wide, **options), dtype, out)

    return attempt


@_or_step_by_step
def product(
    a, b, transpose_a=False, transpose_b=False, bias=None, gelu=False, then=(), dtype=None, out=None
):
    """``a @ b + bias``, then GELU, then each of ``then``, in one pass.

    Args:
        a, b: ``[M, K]`` or ``[B, M, K]``, transposed ``[..., K, M]``; ``[K, N]`` or ``[B, K, N]``.
        then: pairs ``("add" or "multiply", tensor)``; a tensor is broadcast to the result.
        dtype: of the result; None for that of ``a``.
        out: where the result is to be written, contiguous and of this type; None: a new tensor.

    Raises Unsupported without oneDNN or where it refuses; so do all functions here.
    """
    has_bias, names = bias is not None, tuple(name for name, _ in then)
    tensors = [a, b, *[bias] * has_bias, *(tensor for _, tensor in then)]
    run = _product(_kinds(tensors), transpose_a, transpose_b, has_bias, gelu, names, dtype)
    return run(tensors, out)


@_or_step_by_step
def multiply(a, b, *, then=(), dtype=None, out=None):
    """``a * b`` with ``b`` broadcast to ``a``, then each of ``then``; see `product`."""
    tensors = [a, b, *(tensor for _, tensor in then)]
    return _multiplication(_kinds(tensors), tuple(name for name, _ in then), dtype)(tensors, out)


@_or_step_by_step
def gelu(x, **_):
    """GELU in its exact form, of the type of ``x``."""
    return _gelu(tuple(x.shape), x.dtype)[0]([x])


@_or_step_by_step
def gelu_gradient(gradient, x, **_):
    """The gradient of GELU's argument ``x`` from that of its result, which it may overwrite."""
    return _gelu(tuple(x.shape), x.dtype)[1]([gradient, x], gradient)


def cast(x, dtype, out=None):
    return reorder(x, x.shape, range(len(x.shape)), dtype, out)


def reorder(x, shape, axes, dtype, out=None):
    """``x.reshape(shape).transpose(axes)`` in another type, in one pass."""
    return _reorder(tuple(shape), tuple(axes), x.dtype, dtype)([x], out)


def _kinds(tensors) -> tuple:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def _once(make):
    """Keeps what ``make`` made of its arguments; it works in a thread of its own.

    glibc then takes primitives' memory elsewhere than the tensors', whose gaps they would break up:
    with drop path, whose shapes come one by one, a process grew by a third.
    """
    kept = {}  # arguments -> what was made, or why that is not supported

    def work(arguments, failures):
        try:
            if setup.threads:  # oneDNN plans for as many; else for what the environment says
                setup.set_threads(setup.threads)
            kept[arguments] = make(*arguments)
        except Unsupported as error:
            kept[arguments] = error
        except Exception as error:
            failures.append(error)

    def made(*arguments):
        if arguments not in kept:
            failures = []
            thread = threading.Thread(target=work, args=(arguments, failures))
            try:
                thread.start()
                thread.join()
            except RuntimeError:  # Python 3.12 starts none any more once the main one has ended
                work(arguments, failures)
            if failures:
                raise failures[0]
        if isinstance(kept[arguments], Unsupported):
            raise Unsupported(*kept[arguments].args)  # raised itself, it would keep its callers
        return kept[arguments]

    return made


@_once
def _product(operands, transpose_a, transpose_b, has_bias, gelu, then, dtype):
    (shape_a, type_a), (shape_b, type_b), *others = operands
    rank = max(len(shape_a), len(shape_b))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    a, sizes_a = _operand(shape_a, type_a, rank, swapped if transpose_a else ())
    b, sizes_b = _operand(shape_b, type_b, rank, swapped if transpose_b else ())
    shape = [*map(max, sizes_a[:-2], sizes_b[:-2]), sizes_a[-2], sizes_b[-1]]
    others = [_operand(*other, rank)[0] for other in others]
    bias = others.pop(0) if has_bias else None
    result, _ = _operand(shape, dtype, rank)
    attributes, then = _attributes(gelu, then, others)
    library = _library()
    form = "matmul_primitive_desc_create", library.engine, a, b, bias, result, attributes
    descriptor = library.new(*form)
    hidden = transpose_b and len(shape_b) == 2 and sizes_a[-1] < sizes_b[-1]
    if hidden or (transpose_a and rank == 2):
        # For a weight gradient, and for the gradient of an MLP's hidden units, oneDNN's first
        # choice takes longer than its plain product: by a tenth, and by 2 to 7 % (AVX-512).
        descriptor = library.implemented_by(b"gemm", descriptor) or library.new(*form)
    arguments = [(_SRC, a), (_WEIGHTS, b), *[(_BIAS, bias)] * has_bias, *then, (_DST, result)]
    return _primitive(_fast(descriptor), arguments, shape, dtype)


@_once
def _multiplication(operands, then, dtype):
    shape = operands[0][0]
    a, b, *others = (_operand(*operand, len(shape))[0] for operand in operands)
    result, _ = _operand(shape, dtype, len(shape))
    attributes, then = _attributes(False, then, others)
    form = _library().engine, _BINARY["multiply"], a, b, result, attributes
    descriptor = _fast(_library().new("binary_primitive_desc_create", *form))
    return _primitive(descriptor, [(_SRC, a), (_SRC_1, b), *then, (_DST, result)], shape, dtype)


@_once
def _gelu(shape, dtype):
    (x, _), zero, library = _operand(shape, dtype, len(shape)), ctypes.c_float(0), _library()
    form = library.engine, _FORWARD_TRAINING, _GELU_ERF, x, x, zero, zero, None
    forward = library.new("eltwise_forward_primitive_desc_create", *form)
    form = library.engine, _GELU_ERF, x, x, x, zero, zero, forward, None
    backward = library.new("eltwise_backward_primitive_desc_create", *form)
    return (
        _primitive(forward, [(_SRC, x), (_DST, x)], shape, dtype),
        _primitive(backward, [(_DIFF_DST, x), (_SRC, x), (_DIFF_SRC, x)], shape, dtype),
    )


@_once
def _reorder(shape, axes, source, target):
    a, shape = _operand(shape, source, len(shape), axes)
    b, _ = _operand(shape, target, len(shape))
    engine = _library().engine
    descriptor = _library().new("reorder_primitive_desc_create", a, engine, b, engine, None)
    return _primitive(descriptor, [(_SRC, a), (_DST, b)], shape, target)


def _fast(descriptor):
    """Refuses what would loop over every case, a thousand times slower."""
    if _library().implementation(descriptor).startswith(b"ref"):
        raise Unsupported("no kernel but plain loops")
    return descriptor


def _attributes(gelu: bool, then, operands: list):
    """Attributes of a primitive that goes on with GELU and ``then``; arguments of the latter."""
    library = _library()
    operations, attributes = library.new("post_ops_create"), library.new("primitive_attr_create")
    if gelu:
        zero = ctypes.c_float(0)
        library.call("post_ops_append_eltwise", operations, _GELU_ERF, zero, zero)
    for name, operand in zip(then, operands):
        library.call("post_ops_append_binary", operations, _BINARY[name], operand)
    library.call("primitive_attr_set_post_ops", attributes, operations)
    return attributes, [
        (_POST_OP * number | _SRC_1, operand) for number, operand in enumerate(operands, gelu + 1)
    ]


def _operand(shape, dtype, rank: int, axes=()):
    """oneDNN's descriptor of a contiguous tensor, whose ``shape`` is padded with ones in front to
    ``rank`` axes and seen with ``axes`` in that order; and the shape that it has then.
    """
    if dtype not in _TYPES:
        raise Unsupported(f"no {dtype} here")
    shape = [1] * (rank - len(shape)) + list(shape)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(rank)]
    if axes:
        shape, strides = ([sizes[axis] for axis in axes] for sizes in (shape, strides))
    sizes = ctypes.c_int64 * rank
    form = rank, sizes(*shape), _TYPES[dtype], sizes(*strides)
    return _library().new("memory_desc_create_with_strides", *form), shape


def _primitive(descriptor, arguments: list, shape, dtype):
    """Runs a primitive on tensors, given in the order of ``arguments``, and returns the last of
    them: a new tensor of a shape and type, or the one that is given.
    """
    library, count = _library(), len(arguments)
    primitive = library.new("primitive_create", descriptor)
    memories = [library.new("memory_create", a, library.engine, None) for _, a in arguments]
    names = [name for name, _ in arguments]
    array = (_Argument * count)(*map(_Argument, names, memories))

    def run(tensors: list, result=None):
        result = paddle.empty(shape, dtype) if result is None else result
        # Contiguous copies live as long as this list, that is until the primitive is done.
        tensors = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        for memory, tensor in zip(memories, [*tensors, result]):
            library.set_data_handle(memory, ctypes.c_void_p(tensor.data_ptr()))
        if library.execute(primitive, library.stream, count, array):
            raise RuntimeError("oneDNN failed in a computation")
        return result

    return run
