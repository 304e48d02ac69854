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


class _Version(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("major", "minor", "patch")]


class _Argument(ctypes.Structure):
    _fields_ = [("name", ctypes.c_int), ("memory", ctypes.c_void_p)]


class _Library:
    """The library with its engine and stream; every call is checked."""

    def __init__(self):
        path = Path(paddle.__file__).parent / "libs" / "libdnnl.so.3"
        try:
            self._functions = ctypes.CDLL(str(path))
            self._functions.dnnl_version.restype = ctypes.POINTER(_Version)
            version = self._functions.dnnl_version().contents
        except (OSError, AttributeError) as error:
            raise Unsupported(f"none in this Paddle that can be called ({error})") from None
        if version.major != _MAJOR:
            raise Unsupported(f"this Paddle brings version {version.major}, not {_MAJOR}")
        self.engine = self.new("engine_create", _CPU_ENGINE, ctypes.c_size_t(0))
        self.stream = self.new("stream_create", self.engine, _IN_ORDER)
        self.set_data_handle = self._functions.dnnl_memory_set_data_handle
        self.execute = self._functions.dnnl_primitive_execute

    def call(self, name: str, *arguments) -> None:
        if getattr(self._functions, f"dnnl_{name}")(*arguments):
            raise Unsupported(f"{name} was refused")

    def implementation(self, descriptor: ctypes.c_void_p) -> bytes:
        """The name of what is going to compute a primitive."""
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
            wide = [cast(a, paddle.float32) if _is_bfloat16(a) else a for a in arguments]
            return cast(attempt(*wide, **options), dtype, out)

    return attempt


def _is_bfloat16(x) -> bool:
    return isinstance(x, paddle.Tensor) and x.dtype == paddle.bfloat16


@_or_step_by_step
def product(
    a, b, transpose_a=False, transpose_b=False, bias=None, gelu=False, then=(), dtype=None, out=None
):
    """``a @ b + bias``, then GELU, then each of ``then``, in one pass.

    Args:
        a: ``[M, K]`` or ``[B, M, K]``; transposed ``[..., K, M]``.
        b: ``[K, N]`` or ``[B, K, N]``; one of both may lack B.
        bias: ``[N]``.
        then: pairs ``("add" or "multiply", tensor)``; a tensor is broadcast to the result.
        dtype: of the result; None for that of ``a``.
        out: where the result is to be written, contiguous and of this type; None: a new tensor.

    Raises Unsupported without oneDNN or where it refuses; so do all functions here.
    """
    tensors = [a, b, *([] if bias is None else [bias]), *(tensor for _, tensor in then)]
    names = tuple(name for name, _ in then)
    has_bias = bias is not None
    run, shape = _product(_kinds(tensors), transpose_a, transpose_b, has_bias, gelu, names, dtype)
    return run(tensors, paddle.empty(shape, dtype) if out is None else out)


@_or_step_by_step
def multiply(a, b, *, then=(), dtype=None, out=None):
    """``a * b`` with ``b`` broadcast to ``a``, then each of ``then``; see `product`."""
    tensors = [a, b, *(tensor for _, tensor in then)]
    run = _multiplication(_kinds(tensors), tuple(name for name, _ in then), dtype)
    return run(tensors, paddle.empty(a.shape, dtype) if out is None else out)


@_or_step_by_step
def gelu(x, **_):
    """GELU in its exact form, of the type of ``x``."""
    return _gelu(tuple(x.shape), x.dtype)[0]([x], paddle.empty(x.shape, x.dtype))


@_or_step_by_step
def gelu_gradient(gradient, x, **_):
    """The gradient of GELU's argument ``x`` from that of its result, which it may overwrite."""
    return _gelu(tuple(x.shape), x.dtype)[1]([gradient, x], gradient)


def cast(x, dtype, out=None):
    return reorder(x, x.shape, range(len(x.shape)), dtype, out)


def reorder(x, shape, axes, dtype, out=None):
    """``x.reshape(shape).transpose(axes)`` in another type, in one pass."""
    run = _reorder(tuple(shape), tuple(axes), x.dtype, dtype)
    return run([x], paddle.empty([shape[axis] for axis in axes], dtype) if out is None else out)


def _kinds(tensors) -> tuple:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def _once(make):
    """Keeps what ``make`` made of its arguments; it works in a thread of its own.

    glibc then takes primitives' memory elsewhere than the tensors', whose gaps they would break up:
    with drop path, whose shapes come one by one, a process grew by a third.
    """
    kept = {}

    def work(arguments, results):
        try:
            if setup.threads:  # else what the environment says, with which a thread begins
                setup.set_threads(setup.threads)  # oneDNN plans for as many
            results.append(make(*arguments))
        except Exception as error:
            results.append(error)

    def made(*arguments):
        if arguments not in kept:
            results = []
            thread = threading.Thread(target=work, args=(arguments, results))
            thread.start()
            thread.join()
            (found,) = results
            if isinstance(found, Exception) and not isinstance(found, Unsupported):
                raise found
            kept[arguments] = found
        if isinstance(kept[arguments], Unsupported):
            raise Unsupported(*kept[arguments].args)  # raised itself, it would keep its callers
        return kept[arguments]

    return made


@_once
def _product(operands, transpose_a, transpose_b, has_bias, gelu, then, dtype):
    (shape_a, type_a), (shape_b, type_b), *others = operands
    rank = max(len(shape_a), len(shape_b))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    a = _Operand(shape_a, type_a, rank, swapped if transpose_a else ())
    b = _Operand(shape_b, type_b, rank, swapped if transpose_b else ())
    batch = [max(sizes) for sizes in zip(a.shape[:-2], b.shape[:-2])]
    shape = [*batch, a.shape[-2], b.shape[-1]]
    others = [_Operand(*other, rank) for other in others]
    bias = others.pop(0) if has_bias else None
    result = _Operand(shape, dtype, rank)
    attributes, names = _attributes(gelu, list(zip(then, others)))
    create = functools.partial(
        _library().new,
        *("matmul_primitive_desc_create", _library().engine, a.descriptor, b.descriptor),
        *(bias.descriptor if has_bias else None, result.descriptor, attributes),
    )
    descriptor = create()
    hidden = transpose_b and len(shape_b) == 2 and a.shape[-1] < b.shape[-1]
    if hidden or (transpose_a and rank == 2):
        # For a weight gradient, and for the gradient of an MLP's hidden units, oneDNN's first
        # choice takes longer than its plain product: by a tenth, and by 2 to 7 % (AVX-512).
        descriptor = _library().implemented_by(b"gemm", descriptor) or create()
    arguments = [(_SRC, a), (_WEIGHTS, b), *([(_BIAS, bias)] if has_bias else [])]
    return _fast(descriptor, [*arguments, *zip(names, others), (_DST, result)]), shape


@_once
def _multiplication(operands, then, dtype):
    rank = len(operands[0][0])
    a, b, *others = (_Operand(*operand, rank) for operand in operands)
    result = _Operand(operands[0][0], dtype, rank)
    attributes, names = _attributes(False, list(zip(then, others)))
    descriptor = _library().new(
        "binary_primitive_desc_create",
        _library().engine,
        _BINARY["multiply"],
        a.descriptor,
        b.descriptor,
        result.descriptor,
        attributes,
    )
    return _fast(descriptor, [(_SRC, a), (_SRC_1, b), *zip(names, others), (_DST, result)])


@_once
def _gelu(shape, dtype):
    x, zero = _Operand(shape, dtype, len(shape)), ctypes.c_float(0)
    library = _library()
    engine, form = library.engine, (x.descriptor, x.descriptor)
    forward = library.new(
        "eltwise_forward_primitive_desc_create",
        *(engine, _FORWARD_TRAINING, _GELU_ERF, *form, zero, zero, None),
    )
    backward = library.new(
        "eltwise_backward_primitive_desc_create",
        *(engine, _GELU_ERF, *form, x.descriptor, zero, zero, forward, None),
    )
    return (
        _Primitive(forward, [(_SRC, x), (_DST, x)]),
        _Primitive(backward, [(_DIFF_DST, x), (_SRC, x), (_DIFF_SRC, x)]),
    )


@_once
def _reorder(shape, axes, source, target):
    a = _Operand(shape, source, len(shape), axes)
    b = _Operand(a.shape, target, len(shape))
    engine = _library().engine
    descriptor = _library().new(
        "reorder_primitive_desc_create", a.descriptor, engine, b.descriptor, engine, None
    )
    return _Primitive(descriptor, [(_SRC, a), (_DST, b)])


def _fast(descriptor, arguments):
    """A primitive; refused where it would loop over every case, a thousand times slower."""
    if _library().implementation(descriptor).startswith(b"ref"):
        raise Unsupported("no kernel but plain loops")
    return _Primitive(descriptor, arguments)


def _attributes(gelu: bool, then: list):
    """Attributes of a primitive that goes on with GELU and ``then``; names of the latter's data."""
    library = _library()
    if not gelu and not then:
        return None, []
    operations, attributes = library.new("post_ops_create"), library.new("primitive_attr_create")
    if gelu:
        zero = ctypes.c_float(0)
        library.call("post_ops_append_eltwise", operations, _GELU_ERF, zero, zero)
    for name, operand in then:
        library.call("post_ops_append_binary", operations, _BINARY[name], operand.descriptor)
    library.call("primitive_attr_set_post_ops", attributes, operations)
    return attributes, [_POST_OP * (gelu + number + 1) | _SRC_1 for number in range(len(then))]


class _Operand:
    """A contiguous tensor's place in a primitive: ``shape`` is padded with ones in front to
    ``rank`` axes and seen with ``axes`` in that order; ``descriptor`` is oneDNN's.
    """

    def __init__(self, shape, dtype, rank: int, axes=()):
        if dtype not in _TYPES:
            raise Unsupported(f"no {dtype} here")
        shape = [1] * (rank - len(shape)) + list(shape)
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        if axes:
            shape, strides = ([sizes[axis] for axis in axes] for sizes in (shape, strides))
        sizes = ctypes.c_int64 * rank
        self.shape = shape
        self.descriptor = _library().new(
            "memory_desc_create_with_strides", rank, sizes(*shape), _TYPES[dtype], sizes(*strides)
        )


class _Primitive:
    """Runs a primitive on tensors, given in the order of ``arguments``; the last is the result."""

    def __init__(self, descriptor, arguments: list):
        library = _library()
        self._primitive = library.new("primitive_create", descriptor)
        memories = [
            library.new("memory_create", operand.descriptor, library.engine, None)
            for _, operand in arguments
        ]
        self._memories = memories
        self._arguments = (_Argument * len(arguments))(
            *(_Argument(name, memory) for (name, _), memory in zip(arguments, memories))
        )

    def __call__(self, tensors: list, result):
        library = _library()
        # Contiguous copies live as long as this list, that is until the primitive is done.
        tensors = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        for memory, tensor in zip(self._memories, [*tensors, result]):
            library.set_data_handle(memory, ctypes.c_void_p(tensor.data_ptr()))
        count = len(self._arguments)
        if library.execute(self._primitive, library.stream, count, self._arguments):
            raise RuntimeError("oneDNN failed in a computation")
        return result
