"""Vector registers for kernels of numba: types of their own, and intrinsics that emit LLVM's vector operations.

What a kernel needs of a particular processor it adds itself, by `binary` and the like. numba's bounds checks do not
see into loads and stores: what keeps them within arrays stands in each kernel's file. numba's cache does not notice
changes of this file: whoever changes what an operation emits deletes the caches (`__pycache__`) of the kernels' files.
"""

# ruff: noqa: ARG001, ARG005  (numba gives intrinsics more than they need)

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model


class Vector(types.Type):
    """`count` unsigned integers of `bits` bits in a register."""

    def __init__(self, count: int, bits: int) -> None:
        self.count, self.bits = count, bits
        super().__init__(name=f"Vector({count} x u{bits})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, llvm_type(fe_type))


def llvm_type(vector: Vector) -> Any:
    """LLVM's type of a register."""
    return ir.VectorType(ir.IntType(vector.bits), vector.count)


def binary(emit: Any) -> Any:
    """An operation on two vectors of one type, as a function for kernels; `emit(builder, a, b)` gives its value."""

    @intrinsic
    def operation(typingctx, a, b):  # type: ignore[no-untyped-def]
        if isinstance(a, Vector) and a == b:
            return a(a, b), lambda context, builder, signature, args: emit(builder, *args)
        return None

    return operation


def convert(result: Vector, emit: Any) -> Any:
    """An operation on one vector or number, whose value is of type `result`."""

    @intrinsic
    def operation(typingctx, a):  # type: ignore[no-untyped-def]
        return result(a), lambda context, builder, signature, args: emit(builder, args[0])

    return operation


def shuffled(*lanes: int) -> Any:
    """The constant that names lanes for LLVM's `shufflevector`."""
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))


def call(name: str) -> Any:
    """`emit` for LLVM's function `name` of two vectors of one type."""

    def emit(builder: Any, a: Any, b: Any) -> Any:
        function = ir.FunctionType(a.type, [a.type, b.type])
        mangled = name.format(f"v{a.type.count}i{a.type.element.width}")
        return builder.call(cgutils.get_or_insert_function(builder.module, function, mangled), [a, b])

    return emit


def splat(vector: Vector) -> Any:
    """A number in all lanes; its higher bits are dropped."""

    def emit(builder: Any, value: Any) -> Any:
        element = builder.trunc(value, ir.IntType(vector.bits))
        single = builder.insert_element(ir.Constant(llvm_type(vector), None), element, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(single, single, shuffled(*[0] * vector.count))

    return convert(vector, emit)


def bitcast(vector: Vector) -> Any:
    """The same bits as another type."""
    return convert(vector, lambda builder, a: builder.bitcast(a, llvm_type(vector)))


add = binary(lambda builder, a, b: builder.add(a, b))
sub = binary(lambda builder, a, b: builder.sub(a, b))
mul = binary(lambda builder, a, b: builder.mul(a, b))
bits_and = binary(lambda builder, a, b: builder.and_(a, b))
bits_or = binary(lambda builder, a, b: builder.or_(a, b))
left = binary(lambda builder, a, b: builder.shl(a, b))
right = binary(lambda builder, a, b: builder.lshr(a, b))
least = binary(call("llvm.umin.{}"))


@intrinsic
def count_bits(typingctx, value):  # type: ignore[no-untyped-def]
    """How many bits of a number are set."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


def address_of(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    """A pointer to vectors, at an element of an array of one dimension."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@intrinsic
def high_products(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The upper halves of the 64-bit products of 32-bit lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lanes = signature.return_type.count
        wide = ir.VectorType(ir.IntType(64), lanes // 2)
        shift, low = ir.Constant(wide, [32] * (lanes // 2)), ir.Constant(wide, [0xFFFFFFFF] * (lanes // 2))
        narrow = args[0].type
        a, b = (builder.bitcast(value, wide) for value in args)
        even = builder.mul(builder.and_(a, low), builder.and_(b, low))
        odd = builder.mul(builder.lshr(a, shift), builder.lshr(b, shift))
        even, odd = builder.bitcast(builder.lshr(even, shift), narrow), builder.bitcast(odd, narrow)
        return builder.shuffle_vector(even, odd, shuffled(*[i + lanes * (i % 2) for i in range(lanes)]))

    return a(a, b), emit


def loader(vector: Vector) -> Any:
    """Loads a vector from consecutive elements of a contiguous array of one dimension, from `index` on."""

    @intrinsic
    def load(typingctx, array, index):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            address = address_of(context, builder, signature.args[0], args[0], args[1], llvm_type(vector))
            return builder.load(address, align=1)

        return vector(array, types.uint64), emit

    return load


@intrinsic
def store(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """Stores a vector to consecutive elements of a contiguous array of one dimension, from `index` on."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address = address_of(context, builder, signature.args[0], args[0], args[1], args[2].type)
        builder.store(args[2], address, align=1)

    return types.void(array, types.uint64, value), emit


@intrinsic
def prefetch(typingctx, array, index):  # type: ignore[no-untyped-def]
    """Ask for the cache line of an element, which need not exist."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = address_of(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        function = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        read, keep, data = (ir.Constant(number, n) for n in (0, 3, 1))
        function = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        builder.call(function, [address, read, keep, data])
        return context.get_dummy_value()

    return types.void(array, types.uint64), emit


def transpose(vector: Vector) -> Any:
    """Sixteen rows of bytes, each 16 x 16 of them transposed; rows begin `stride` bytes after each other."""

    @intrinsic
    def operation(typingctx, source, source_at, source_stride, target, target_at, target_stride):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            def address(which: int, row: int) -> Any:
                distance = builder.mul(args[which + 2], ir.Constant(ir.IntType(64), row))
                place = builder.add(args[which + 1], distance)
                return address_of(context, builder, signature.args[which], args[which], place, llvm_type(vector))

            rows = [builder.load(address(0, row), align=1) for row in range(16)]
            # Where bytes have the address (row, column), interleaving rows i and i + 8 rotates its eight bits by one.
            low = [i // 2 + vector.count * (i % 2) for i in range(16)]
            low = [i + 16 * part for part in range(vector.count // 16) for i in low]
            for _ in range(4):
                rows = [
                    builder.shuffle_vector(rows[i], rows[i + 8], shuffled(*[k + 8 * half for k in low]))
                    for i in range(8)
                    for half in range(2)
                ]
            for row in range(16):
                builder.store(rows[row], address(3, row), align=1)

        size = types.uint64
        return types.void(source, size, size, target, size, size), emit

    return operation
